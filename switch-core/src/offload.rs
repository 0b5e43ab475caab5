//! The virtio-net header (virtio 1.2 §5.1.6): checked against the parsed packet, and written anew.
//!
//! What a guest writes there is believed only where the packet itself agrees: the checksum to be completed must be that of
//! the transport header that the parser found, and segmentation must name the packet's own protocol. The rest of the switch
//! works on the checked [`Offload`], and a receiver gets a header made from that, never the sender's.

use crate::checksum;
use crate::common::Shape;
use crate::drop::DropReason;
use crate::key::{
    ETH_P_ARP, ETH_P_IP, ETH_P_IPV6, ETH_P_MPLS_MC, ETH_P_MPLS_UC, ETH_P_RARP, FRAG_NONE, Field, Key,
    ipproto, shape,
};
use crate::packet::{Gso, NONE, Offload, Packet};

/// `VIRTIO_NET_HDR_F_NEEDS_CSUM`.
pub const F_NEEDS_CSUM: u8 = 1;
/// `VIRTIO_NET_HDR_F_DATA_VALID`.
pub const F_DATA_VALID: u8 = 2;
/// `VIRTIO_NET_HDR_GSO_NONE`.
pub const GSO_NONE: u8 = 0;
/// `VIRTIO_NET_HDR_GSO_TCPV4`.
pub const GSO_TCPV4: u8 = 1;
/// `VIRTIO_NET_HDR_GSO_TCPV6`.
pub const GSO_TCPV6: u8 = 4;
/// `VIRTIO_NET_HDR_GSO_UDP_L4`.
pub const GSO_UDP_L4: u8 = 5;
/// `VIRTIO_NET_HDR_GSO_ECN`, a bit on top of the TCP types.
pub const GSO_ECN: u8 = 0x80;

/// Offset of the checksum in a TCP header.
pub const TCP_CHECKSUM: u16 = 16;
/// Offset of the checksum in a UDP header.
pub const UDP_CHECKSUM: u16 = 6;

/// Bytes of an Ethernet header.
const ETHERNET_HEADER: u16 = 14;
/// The smallest TCP segment (`TCP_MIN_GSO_SIZE` of Linux): no stack sends smaller ones, and they multiply work.
const MIN_TCP_SEGMENT: u16 = 8;
/// The most datagrams that one packet may be cut into (`UDP_MAX_SEGMENTS` of Linux).
const MAX_UDP_SEGMENTS: u32 = 128;
/// The largest segment with its headers.
const MAX_SEGMENT: u32 = 65_535;

/// The fields of `struct virtio_net_hdr` in host byte order.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct RawHeader {
    /// [`F_NEEDS_CSUM`] and [`F_DATA_VALID`].
    pub flags: u8,
    /// One of [`GSO_NONE`], [`GSO_TCPV4`], [`GSO_TCPV6`], [`GSO_UDP_L4`]; [`GSO_ECN`] may be added to the TCP types.
    pub gso_type: u8,
    /// Bytes of all headers of a packet to be segmented; a hint that is not read.
    pub hdr_len: u16,
    /// Payload bytes of a segment.
    pub gso_size: u16,
    /// With [`F_NEEDS_CSUM`]: where the sum begins, from the start of the frame.
    pub csum_start: u16,
    /// With [`F_NEEDS_CSUM`]: where the checksum lies, from `csum_start`.
    pub csum_offset: u16,
}

/// Checks the header that came with `packet`, which has been parsed into `key` and not been edited.
///
/// * Flags that are not known are ignored, as a device must (virtio 1.2 §5.1.6.2.2); segmentation types are not.
/// * [`F_DATA_VALID`] is the sender's word, no more: whoever relays it vouches for as much as for a partial checksum.
/// * With [`F_NEEDS_CSUM`] the parsed transport header must be TCP or UDP of an unfragmented packet, and the offsets those
///   of its checksum: guests compute the checksums of ICMPv6 and, as its offload is not offered, of SCTP themselves.
///   Only behind headers that the parser does not follow (MPLS, GRE, …) any offsets inside the head are taken, after all
///   that was parsed: rewrites find no transport header there that they could touch, and no field that a flow has matched
///   is overwritten when the checksum is completed.
/// * Segmentation needs [`F_NEEDS_CSUM`], a parsed header of the right protocol, and a size that makes sense. If the
///   packet is one segment anyway, there is nothing to segment.
#[inline]
pub fn check(raw: &RawHeader, packet: &Packet, key: &Key) -> Result<Offload, DropReason> {
    if raw.flags & (F_NEEDS_CSUM | F_DATA_VALID) == 0 && raw.gso_type == GSO_NONE {
        return Ok(Offload::default());
    }
    check_offloads(raw, packet, key).ok_or(DropReason::BadOffload)
}

/// [`check`] of a packet of a common shape.
#[inline]
pub fn check_common(raw: &RawHeader, packet: &Packet, shape: Shape) -> Result<Offload, DropReason> {
    if raw.flags & (F_NEEDS_CSUM | F_DATA_VALID) == 0 && raw.gso_type == GSO_NONE {
        return Ok(Offload::default());
    }
    let checked = match raw.flags & F_NEEDS_CSUM {
        0 => check_complete(raw),
        _ => check_partial(raw, packet, shape.eth_type(), shape.ip_proto()),
    };
    checked.ok_or(DropReason::BadOffload)
}

/// Without [`F_NEEDS_CSUM`].
fn check_complete(raw: &RawHeader) -> Option<Offload> {
    let csum_valid = Offload { csum_valid: true, ..Offload::default() };
    (raw.gso_type == GSO_NONE).then_some(csum_valid)
}

fn partial(raw: &RawHeader) -> Offload {
    Offload {
        needs_csum: true,
        csum_start: raw.csum_start,
        csum_offset: raw.csum_offset,
        ..Offload::default()
    }
}

fn check_offloads(raw: &RawHeader, packet: &Packet, key: &Key) -> Option<Offload> {
    if raw.flags & F_NEEDS_CSUM == 0 {
        return check_complete(raw);
    }
    if key.ip_frag() != FRAG_NONE {
        return None;
    }
    if packet.layout.l4 == NONE {
        let end = raw.csum_start as usize + raw.csum_offset as usize + 2;
        let inside = raw.csum_start as usize >= parsed_end(packet, key)? && end <= packet.head().len();
        return (inside && raw.gso_type == GSO_NONE).then_some(partial(raw));
    }
    check_partial(raw, packet, key.eth_type(), key.ip_proto())
}

/// With [`F_NEEDS_CSUM`], of an unfragmented packet with a transport header.
fn check_partial(raw: &RawHeader, packet: &Packet, eth_type: u16, ip_proto: u8) -> Option<Offload> {
    let partial = partial(raw);
    let csum_offset = match ip_proto {
        ipproto::TCP => TCP_CHECKSUM,
        ipproto::UDP => UDP_CHECKSUM,
        _ => return None,
    };
    if raw.csum_start != packet.layout.l4 || raw.csum_offset != csum_offset {
        return None;
    }
    let gso = match (raw.gso_type & !GSO_ECN, eth_type, ip_proto) {
        (GSO_NONE, ..) if raw.gso_type == GSO_NONE => return Some(partial),
        (GSO_TCPV4, ETH_P_IP, ipproto::TCP) => Gso::Tcp4,
        (GSO_TCPV6, ETH_P_IPV6, ipproto::TCP) => Gso::Tcp6,
        (GSO_UDP_L4, ETH_P_IP | ETH_P_IPV6, ipproto::UDP) if raw.gso_type == GSO_UDP_L4 => Gso::UdpL4,
        _ => return None,
    };
    let headers = packet.layout.payload as u32;
    let payload = packet.len.checked_sub(headers)?;
    let size = raw.gso_size as u32;
    let sane = match gso {
        Gso::UdpL4 => size > 0 && payload <= size * MAX_UDP_SEGMENTS,
        _ => raw.gso_size >= MIN_TCP_SEGMENT,
    };
    if !sane || headers + size > MAX_SEGMENT {
        return None;
    }
    if payload <= size {
        return Some(partial);
    }
    Some(Offload { gso, ecn: raw.gso_type & GSO_ECN != 0, gso_size: raw.gso_size, ..partial })
}

/// Checks the header that came with a frame of `len` bytes whose headers the parser does not follow. There is no parsed
/// header to compare with, so all that is promised is that the checksum lies inside the frame and behind its Ethernet
/// header; complete it before anything goes by the frame's content. Segmentation is refused: nobody could do it.
pub fn check_unparsed(raw: &RawHeader, len: u32) -> Result<Offload, DropReason> {
    if raw.gso_type != GSO_NONE {
        return Err(DropReason::BadOffload);
    }
    if raw.flags & F_NEEDS_CSUM == 0 {
        return Ok(Offload::default());
    }
    let end = raw.csum_start as u32 + raw.csum_offset as u32 + 2;
    if raw.csum_start < ETHERNET_HEADER || end > len {
        return Err(DropReason::BadOffload);
    }
    Ok(Offload {
        needs_csum: true,
        csum_start: raw.csum_start,
        csum_offset: raw.csum_offset,
        ..Offload::default()
    })
}

/// Where the headers end that were parsed, of a packet without a transport header: a checksum that is completed later must
/// not change what flows have matched. `None` if that is unknown, or if what follows has no such checksum.
#[cold]
fn parsed_end(packet: &Packet, key: &Key) -> Option<usize> {
    let l3 = packet.layout.l3 as usize;
    let head = packet.head().get(l3..)?;
    match (key.eth_type(), key.ip_proto()) {
        // A TCP or UDP header that is cut short has no checksum to complete.
        (ETH_P_IP | ETH_P_IPV6, ipproto::TCP | ipproto::UDP) => None,
        (ETH_P_IP, _) => Some(l3 + (head.first()? & 15) as usize * 4),
        // The end of extension headers is not kept.
        (ETH_P_IPV6, _) => (key.get(Field::Shape) as u16 & shape::L3_OPTIONS == 0).then_some(l3 + 40),
        (ETH_P_ARP | ETH_P_RARP, _) => None,
        (ETH_P_MPLS_UC | ETH_P_MPLS_MC, _) => {
            let labels = head.chunks_exact(4).position(|label| label[2] & 1 != 0)? + 1;
            Some(l3 + 4 * labels)
        }
        _ => Some(l3),
    }
}

/// The header that goes with `packet` to a receiver that takes the offloads the packet still needs. Offsets are those
/// that edits have kept true.
#[inline]
pub fn to_raw(packet: &Packet) -> RawHeader {
    let offload = &packet.offload;
    if !offload.needs_csum {
        return RawHeader {
            flags: if offload.csum_valid { F_DATA_VALID } else { 0 },
            ..RawHeader::default()
        };
    }
    let (gso_type, l4_len) = match offload.gso {
        Gso::None => (GSO_NONE, 0),
        Gso::Tcp4 => (GSO_TCPV4, 20),
        Gso::Tcp6 => (GSO_TCPV6, 20),
        Gso::UdpL4 => (GSO_UDP_L4, 8),
    };
    let hdr_len = match (offload.gso, packet.layout.payload) {
        (Gso::None, _) => 0,
        // The layout was lost by an edit: at least the fixed header.
        (_, NONE) => offload.csum_start.saturating_add(l4_len),
        (_, payload) => payload,
    };
    RawHeader {
        flags: F_NEEDS_CSUM,
        gso_type: if offload.ecn { gso_type | GSO_ECN } else { gso_type },
        hdr_len,
        gso_size: if offload.gso == Gso::None { 0 } else { offload.gso_size },
        csum_start: offload.csum_start,
        csum_offset: offload.csum_offset,
    }
}

/// What a completed checksum is written as. A sum of 0 becomes 0xffff: to UDP 0 means "no checksum" (RFC 768), to the others
/// both are the same.
pub fn checksum_field(sum: u16) -> u16 {
    if sum == 0 { 0xffff } else { sum }
}

/// Completes the partial checksum of `frame`, which is whole in memory, for a receiver without `GUEST_CSUM`; does nothing
/// unless `offload` asks for it. Fails if the checksum is not inside the frame.
pub fn finish_checksum(frame: &mut [u8], offload: &Offload) -> Result<(), DropReason> {
    if !offload.needs_csum {
        return Ok(());
    }
    let covered = frame.get_mut(offload.csum_start as usize..).ok_or(DropReason::BadOffload)?;
    // The field already holds the pseudo-header's sum, so summing over it adds that in.
    let sum = checksum_field(checksum::checksum(covered));
    let field = offload.csum_offset as usize;
    covered.get_mut(field..field + 2).ok_or(DropReason::BadOffload)?.copy_from_slice(&sum.to_be_bytes());
    Ok(())
}

#[cfg(test)]
mod tests;
