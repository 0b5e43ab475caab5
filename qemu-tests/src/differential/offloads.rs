//! What guests leave to their device, and what the same packets are on the wire.
//!
//! Open vSwitch alone gets frames as they are on the wire; a guest hands over the same with its checksum left out, or several
//! of them as one that is to be cut. What comes out for a guest that takes such frames is finished before it is compared.

use anyhow::{Result, bail, ensure};

use crate::frontend::NetHeader;
use crate::frontend::packet::{Checked, IPV4, check};

/// How guests hand over the frames of a case.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Load {
    /// As they are on the wire.
    #[default]
    Whole,
    /// The checksums of TCP and UDP are left out.
    Partial,
    /// TCP and UDP come in one piece that is to be cut.
    Segments,
}

const TCP: u8 = 6;
const UDP: u8 = 17;
/// FIN, PSH and CWR, which are not in all segments of a packet that has them.
const ONCE: u8 = 0x89;

impl Load {
    /// The frames that `frame` is on the wire.
    pub fn on_wire(self, frame: &[u8]) -> Vec<Vec<u8>> {
        match self.offered(frame) {
            (header, _) if header.gso_type == NetHeader::GSO_NONE => vec![frame.to_vec()],
            // A complete frame can always be cut.
            (header, partial) => finish(&header, partial).unwrap_or_default(),
        }
    }

    /// The frame as a guest hands it over. What is no whole TCP or UDP packet in perfect order is left as it is.
    pub fn offered(self, frame: &[u8]) -> (NetHeader, Vec<u8>) {
        let as_it_is = || (NetHeader::default(), frame.to_vec());
        let Some(packet) = transport(frame).filter(|_| self != Self::Whole) else { return as_it_is() };
        let at = checksum_at(&packet);
        let mut partial = frame.to_vec();
        let pseudo = pseudo_sum(frame, &packet, frame.len() - packet.transport);
        partial[at..at + 2].copy_from_slice(&fold(pseudo).to_be_bytes());
        let mut header = NetHeader {
            flags: NetHeader::NEEDS_CSUM,
            csum_start: packet.transport as u16,
            csum_offset: (at - packet.transport) as u16,
            ..NetHeader::default()
        };
        let (payload, once) = (packet.payload.len(), packet.protocol == TCP && packet.flags & ONCE != 0);
        if self == Self::Segments && payload > 16 && !once {
            header.gso_type = match (packet.protocol, packet.ethertype) {
                (UDP, _) => NetHeader::GSO_UDP_L4,
                (_, IPV4) => NetHeader::GSO_TCPV4,
                _ => NetHeader::GSO_TCPV6,
            };
            header.hdr_len = packet.payload.start as u16;
            // Two to five segments, the last of which may be as long as the others.
            header.gso_size = (payload / (1 + payload % 4)).max(8) as u16;
            if usize::from(header.gso_size) >= payload {
                header.gso_size = payload as u16 / 2;
            }
        }
        (header, partial)
    }
}

/// The frames that a received one is on the wire: its checksum computed, its segments cut.
///
/// # Errors
/// If its header makes no sense for it.
pub fn finish(header: &NetHeader, mut frame: Vec<u8>) -> Result<Vec<Vec<u8>>> {
    if header.flags & NetHeader::NEEDS_CSUM == 0 {
        ensure!(header.gso_type == NetHeader::GSO_NONE, "segments without checksums: {header:?}");
        return Ok(vec![frame]);
    }
    let (start, at) = (usize::from(header.csum_start), usize::from(header.csum_start + header.csum_offset));
    ensure!(start >= 14 && at + 2 <= frame.len(), "no place for the checksum: {header:?}");
    if header.gso_type == NetHeader::GSO_NONE {
        complete(&mut frame, start, at);
        return Ok(vec![frame]);
    }
    // Its fields are in order, or else the sum of its pseudo-header would not be the right one.
    let packet = match check(header, &frame) {
        Ok(packet) => packet,
        Err(why) => bail!("{why}: {header:?}"),
    };
    cut(&packet, at, usize::from(header.gso_size), &frame)
}

fn cut(packet: &Checked, checksum_at: usize, size: usize, frame: &[u8]) -> Result<Vec<Vec<u8>>> {
    ensure!(size > 0, "segments of no length");
    let (network, transport) = (packet.network, packet.transport);
    let mut frames = Vec::new();
    for (index, payload) in frame[packet.payload.clone()].chunks(size).enumerate() {
        let mut segment = [&frame[..packet.payload.start], payload].concat();
        let len = segment.len();
        let mut put = |at: usize, word: u16| segment[at..at + 2].copy_from_slice(&word.to_be_bytes());
        if packet.ethertype == IPV4 {
            put(network + 2, (len - network) as u16);
            let id = u16::from_be_bytes([frame[network + 4], frame[network + 5]]);
            put(network + 4, id.wrapping_add(index as u16));
            put(network + 10, 0);
            let check = !fold(sum(&segment[network..transport]));
            segment[network + 10..network + 12].copy_from_slice(&check.to_be_bytes());
        } else {
            put(network + 4, (len - network - 40) as u16);
        }
        if packet.protocol == TCP {
            let seq = packet.seq.wrapping_add((index * size) as u32);
            segment[transport + 4..transport + 8].copy_from_slice(&seq.to_be_bytes());
        } else {
            segment[transport + 4..transport + 6].copy_from_slice(&((len - transport) as u16).to_be_bytes());
        }
        let pseudo = pseudo_sum(&segment, packet, len - transport);
        segment[checksum_at..checksum_at + 2].copy_from_slice(&fold(pseudo).to_be_bytes());
        complete(&mut segment, transport, checksum_at);
        frames.push(segment);
    }
    Ok(frames)
}

/// Puts the complement of the sum from `start` on where the sum of the pseudo-header is (virtio 1.2 §5.1.6.2).
fn complete(frame: &mut [u8], start: usize, at: usize) {
    // To UDP 0 is "no checksum" (RFC 768), and Linux writes the other zero for all (`skb_checksum_help`).
    let check = match !fold(sum(&frame[start..])) {
        0 => 0xffff,
        check => check,
    };
    frame[at..at + 2].copy_from_slice(&check.to_be_bytes());
}

/// The frame, if it is an unfragmented TCP or UDP packet in perfect order behind two tags at most, and nothing else.
fn transport(frame: &[u8]) -> Option<Checked> {
    let packet = check(&NetHeader::default(), frame).ok()?;
    let word = |at: usize| u16::from_be_bytes([frame[at], frame[at + 1]]);
    let fragment = packet.ethertype == IPV4 && word(packet.network + 6) & 0x3fff != 0;
    let sound = matches!(packet.protocol, TCP | UDP)
        && packet.tags.len() <= 2
        && !fragment
        && packet.payload.end == frame.len()
        // A header shorter than TCP's says nothing about where it ends.
        && (packet.protocol != TCP || frame[packet.transport + 12] >> 4 >= 5)
        // What the sum came out as is what a device computes, not another form of zero.
        && !matches!((packet.protocol, word(checksum_at(&packet))), (UDP, 0) | (TCP, 0));
    sound.then_some(packet)
}

fn checksum_at(packet: &Checked) -> usize {
    packet.transport + if packet.protocol == TCP { 16 } else { 6 }
}

fn pseudo_sum(frame: &[u8], packet: &Checked, len: usize) -> u64 {
    let addresses = match packet.ethertype {
        IPV4 => packet.network + 12..packet.network + 20,
        _ => packet.network + 8..packet.network + 40,
    };
    sum(&frame[addresses]) + u64::from(packet.protocol) + len as u64
}

/// Sum of the big-endian 16-bit words (RFC 1071); an odd last byte counts as if followed by 0.
fn sum(bytes: &[u8]) -> u64 {
    bytes.chunks(2).map(|word| u64::from(word[0]) << 8 | u64::from(*word.get(1).unwrap_or(&0))).sum()
}

fn fold(mut sum: u64) -> u16 {
    while sum > 0xffff {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    sum as u16
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::frames::Frame;
    use crate::random::Random;

    #[test]
    fn what_is_left_out_can_be_put_in_again() {
        let mut random = Random::new(3);
        let (mut partial, mut cut) = (0, 0);
        for _ in 0..5000 {
            let frame = Frame::random(&mut random, 1, 4).bytes;
            let (header, left_out) = Load::Partial.offered(&frame);
            partial += usize::from(left_out != frame);
            assert_eq!(finish(&header, left_out).unwrap(), std::slice::from_ref(&frame));
            assert_eq!(Load::Partial.on_wire(&frame), std::slice::from_ref(&frame));
            let segments = Load::Segments.on_wire(&frame);
            if segments.len() > 1 {
                cut += 1;
                let (header, whole) = Load::Segments.offered(&frame);
                let packet = check(&header, &whole).unwrap();
                let mut payload: Vec<u8> = Vec::new();
                for segment in &segments {
                    let part = check(&NetHeader::default(), segment).unwrap();
                    assert_eq!(part.ports, packet.ports);
                    payload.extend(&segment[part.payload]);
                }
                assert_eq!(payload, &frame[packet.payload]);
            }
        }
        assert!(partial > 500 && cut > 200, "{partial} {cut}");
    }
}
