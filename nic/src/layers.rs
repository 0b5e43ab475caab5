//! Where the layers of a frame begin that asks for an offload. Devices believe what they are told, so it is compared with
//! the frame first.

use switch_core::key::{ETH_P_8021AD, ETH_P_8021Q, ETH_P_IP, ETH_P_IPV6, ipproto};
use switch_core::offload::{TCP_CHECKSUM, UDP_CHECKSUM};
use switch_core::packet::{Gso, Offload};

/// Bytes of a frame that are looked at: two tags, and all options that IPv4 and TCP can have.
const HEAD: usize = 192;
/// The most tags that are gone over.
const MAX_TAGS: usize = 2;
/// IPv6 headers that may stand before the transport header: hop-by-hop, routing, destination.
const EXTENSIONS: [u8; 3] = [0, 43, 60];

/// A private copy of a frame's first bytes.
#[derive(Clone, Debug)]
pub(crate) struct Head {
    bytes: [u8; HEAD],
    len: usize,
}

/// A frame with a TCP or UDP header that is not a fragment's.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct Layers {
    /// Where the IP header begins.
    pub network: usize,
    /// Where the transport header begins.
    pub transport: usize,
    /// Where its payload begins.
    pub payload: usize,
    /// Where the IP packet ends by its own length; what is behind is padding.
    pub end: usize,
    /// IPv4, not IPv6.
    pub ipv4: bool,
    /// TCP, not UDP.
    pub tcp: bool,
}

impl Head {
    /// Copies the first bytes of a frame in pieces.
    pub fn new(frame: &[&[u8]]) -> Head {
        let mut head = Head { bytes: [0; HEAD], len: 0 };
        for piece in frame {
            let room = head.bytes.get_mut(head.len..).unwrap_or_default();
            let count = piece.len().min(room.len());
            if let (Some(to), Some(from)) = (room.get_mut(..count), piece.get(..count)) {
                to.copy_from_slice(from);
            }
            head.len += count;
        }
        head
    }

    /// The first `len` bytes, to be changed.
    pub fn first_mut(&mut self, len: usize) -> Option<&mut [u8]> {
        self.bytes.get_mut(..len.min(self.len))
    }

    fn get(&self, at: usize) -> Option<u8> {
        self.bytes.get(..self.len)?.get(at).copied()
    }

    fn get16(&self, at: usize) -> Option<u16> {
        Some(u16::from_be_bytes([self.get(at)?, self.get(at + 1)?]))
    }

    /// Where what follows the Ethernet header and its tags begins.
    pub fn network(&self) -> Option<usize> {
        let mut at = 12;
        while at < 12 + 4 * MAX_TAGS && [ETH_P_8021Q, ETH_P_8021AD].contains(&self.get16(at)?) {
            at += 4;
        }
        Some(at + 2)
    }

    /// Finds the layers of a frame of `len` bytes, if they are what `offload` says: its checksum is that of the transport
    /// header, and what is to be segmented is TCP of the version of IP that it names.
    pub fn layers(&self, len: usize, offload: &Offload) -> Option<Layers> {
        let network = self.network()?;
        let ipv4 = match self.get16(network - 2)? {
            ETH_P_IP => true,
            ETH_P_IPV6 => false,
            _ => return None,
        };
        let (protocol, transport, end) = if ipv4 { self.ipv4(network)? } else { self.ipv6(network)? };
        let (tcp, field) = match protocol {
            ipproto::TCP => (true, TCP_CHECKSUM),
            ipproto::UDP => (false, UDP_CHECKSUM),
            _ => return None,
        };
        let payload = match tcp {
            true => transport + usize::from(self.get(transport + 12)? >> 4).max(5) * 4,
            false => transport + 8,
        };
        let segmented = match offload.gso {
            Gso::None => true,
            Gso::Tcp4 => tcp && ipv4 && offload.gso_size > 0,
            Gso::Tcp6 => tcp && !ipv4 && offload.gso_size > 0,
            Gso::UdpL4 => false,
        };
        let agrees = offload.needs_csum
            && usize::from(offload.csum_start) == transport
            && offload.csum_offset == field;
        // A super-frame is longer than IP can say, so its length is not looked at.
        let fits =
            payload <= len.min(self.len) && (offload.gso != Gso::None || (payload..=len).contains(&end));
        (agrees && segmented && fits).then_some(Layers { network, transport, payload, end, ipv4, tcp })
    }

    /// Protocol, transport header, and the packet's end.
    fn ipv4(&self, at: usize) -> Option<(u8, usize, usize)> {
        let first = self.get(at)?;
        let header = usize::from(first & 15) * 4;
        // Not a fragment: neither an offset nor more to come.
        if first >> 4 != 4 || header < 20 || self.get16(at + 6)? & 0x3fff != 0 {
            return None;
        }
        Some((self.get(at + 9)?, at + header, at + usize::from(self.get16(at + 2)?)))
    }

    fn ipv6(&self, at: usize) -> Option<(u8, usize, usize)> {
        if self.get(at)? >> 4 != 6 {
            return None;
        }
        let end = at + 40 + usize::from(self.get16(at + 4)?);
        let (mut protocol, mut transport) = (self.get(at + 6)?, at + 40);
        while EXTENSIONS.contains(&protocol) {
            (protocol, transport) =
                (self.get(transport)?, transport + 8 * (1 + usize::from(self.get(transport + 1)?)));
        }
        Some((protocol, transport, end))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn tcp4(tags: usize) -> Vec<u8> {
        let mut frame = vec![2; 12];
        frame.extend([0x81, 0x00, 0x00, 0x05].repeat(tags));
        frame.extend([0x08, 0x00]);
        frame.extend([0x45, 0, 0, 60, 0, 0, 0x40, 0, 64, 6, 0, 0, 10, 0, 0, 1, 10, 0, 0, 2]);
        let mut tcp = [0; 40];
        tcp[12] = 0x60;
        frame.extend(tcp);
        frame
    }

    fn offload(csum_start: u16) -> Offload {
        Offload { needs_csum: true, csum_start, csum_offset: 16, ..Offload::default() }
    }

    #[test]
    fn layers_are_found_behind_tags() {
        for tags in 0..=2 {
            let frame = tcp4(tags);
            let network = 14 + 4 * tags;
            let asked = offload(network as u16 + 20);
            let layers = Head::new(&[&frame[..9], &frame[9..]]).layers(frame.len(), &asked).unwrap();
            let expected = Layers {
                network,
                transport: network + 20,
                payload: network + 44,
                end: network + 60,
                ipv4: true,
                tcp: true,
            };
            assert_eq!(layers, expected);
        }
        let frame = tcp4(3);
        assert_eq!(Head::new(&[&frame]).layers(frame.len(), &offload(46)), None, "three tags");
    }

    #[test]
    fn extension_headers_are_gone_over() {
        let mut frame = vec![2; 12];
        frame.extend([0x86, 0xdd, 0x60, 0, 0, 0, 0, 8 + 16 + 20, 0, 64]);
        frame.extend([1; 32]);
        frame.extend([60, 0, 1, 4, 0, 0, 0, 0, 6, 1]);
        frame.extend([0; 14]);
        frame.extend([0; 20]);
        let (len, start) = (frame.len(), 14 + 40 + 24);
        let found = Head::new(&[&frame]).layers(len, &offload(start)).unwrap();
        assert_eq!((found.transport, found.end, found.ipv4), (start.into(), len, false));
        frame[54] = 44;
        assert_eq!(Head::new(&[&frame]).layers(len, &offload(start)), None, "a fragment");
    }

    #[test]
    fn what_does_not_agree_is_refused() {
        let frame = tcp4(0);
        let of = |change: &dyn Fn(&mut Vec<u8>, &mut Offload)| {
            let (mut frame, mut offload) = (frame.clone(), offload(34));
            change(&mut frame, &mut offload);
            Head::new(&[&frame]).layers(frame.len(), &offload)
        };
        assert!(of(&|_, _| {}).is_some());
        assert!(of(&|frame, _| frame.extend([0; 9])).is_some_and(|layers| layers.end == 74), "padding");
        assert_eq!(of(&|frame, _| frame.truncate(70)), None, "cut short");
        assert_eq!(of(&|frame, _| frame[20] = 0x20), None, "a fragment");
        assert_eq!(of(&|frame, _| frame[14] = 0x44), None, "a header too short");
        assert_eq!(of(&|frame, _| frame[23] = 17), None, "another protocol");
        assert_eq!(of(&|_, offload| offload.csum_start = 33), None);
        assert_eq!(of(&|_, offload| offload.csum_offset = 6), None);
        assert_eq!(of(&|_, offload| offload.needs_csum = false), None);
        assert_eq!(of(&|_, offload| offload.gso = Gso::Tcp4), None, "segments of nothing");
        assert_eq!(of(&|_, offload| (offload.gso, offload.gso_size) = (Gso::Tcp6, 10)), None);
        assert!(of(&|_, offload| (offload.gso, offload.gso_size) = (Gso::Tcp4, 10)).is_some());
    }

    proptest! {
        #[test]
        fn no_frame_harms(
            bytes in prop::collection::vec(any::<u8>(), 0..250),
            good in any::<bool>(),
            csum_start in any::<u16>(),
            len in any::<usize>(),
        ) {
            let mut bytes = bytes;
            if good {
                let frame = tcp4(1);
                bytes.splice(..20.min(bytes.len()), frame[..20].iter().copied());
            }
            let asked = Offload { gso: Gso::Tcp4, gso_size: 9, ..offload(csum_start) };
            if let Some(found) = Head::new(&[&bytes]).layers(len, &asked) {
                prop_assert!(found.network < found.transport && found.transport < found.payload);
                prop_assert!(found.payload <= len);
            }
        }
    }
}
