//! Segmentation in software, for a receiver that cannot: a 64 KiB TCP segment or a train of UDP datagrams becomes frames
//! that fit its MTU, each with its own headers and complete checksums (as `tcp_gso_segment` and `__udp_gso_segment` of
//! Linux do it).
//!
//! A packet inside a tunnel is cut in the same pass, with the outer headers on each segment (`skb_udp_tunnel_segment`,
//! `gre_gso_segment`). An outer checksum costs no second look at the payload: what the inner one covers sums up to a value
//! that the inner pseudo-header tells.

use crate::checksum;
use crate::drop::DropReason;
use crate::key::{ETH_P_IP, ETH_P_IPV6, ipproto};
use crate::offload::{TCP_CHECKSUM, UDP_CHECKSUM, checksum_field};
use crate::packet::{Gso, Layout, Offload};
use crate::tunnel::GRE_CHECKSUM_PRESENT;

const TCP_FIN: u8 = 0x01;
const TCP_PSH: u8 = 0x08;
const TCP_CWR: u8 = 0x80;

/// Frames that a frame of `frame_len` bytes is cut into; 1 if it needs no segmentation.
pub fn count(frame_len: usize, layout: &Layout, offload: &Offload) -> usize {
    if offload.gso == Gso::None || offload.gso_size == 0 {
        return 1;
    }
    let payload = offload.inner.map_or(layout.payload, |inner| inner.payload);
    frame_len.saturating_sub(payload as usize).div_ceil(offload.gso_size as usize).max(1)
}

/// Cuts `frame` into segments of at most `offload.gso_size` payload bytes. Each is built in `buffer`, which must hold the
/// headers and one segment's payload, and lent to `emit` before the next one. Returns how many there were.
///
/// The headers are those of the frame (VLAN tags, IP options and extension headers, TCP options), with what must differ:
/// lengths, checksums, IPv4 identification counted up, TCP sequence numbers; FIN and PSH only on the last segment, CWR only on
/// the first. The frame's checksum field must hold the sum of the pseudo-header, with the whole transport length.
///
/// With [`Offload::inner`] that is the packet inside, and `layout` that of the outer one: IP without options or extension
/// headers, then UDP or GRE. An outer checksum is made if the frame has one.
///
/// Fails before anything is emitted: [`DropReason::BadOffload`] if layout and offload do not describe a segmentable frame,
/// [`DropReason::NoBuffer`] if `buffer` is too small.
pub fn segment(
    frame: &[u8],
    layout: &Layout,
    offload: &Offload,
    buffer: &mut [u8],
    mut emit: impl FnMut(&[u8]),
) -> Result<usize, DropReason> {
    let template = Template::new(frame, layout, offload).ok_or(DropReason::BadOffload)?;
    let (headers, payload) = frame.split_at_checked(template.payload).ok_or(DropReason::BadOffload)?;
    let longest = template.payload + payload.len().min(template.size);
    let buffer = buffer.get_mut(..longest).ok_or(DropReason::NoBuffer)?;
    buffer[..template.payload].copy_from_slice(headers);
    let count = payload.len().div_ceil(template.size);
    for (index, chunk) in payload.chunks(template.size).enumerate() {
        let segment = &mut buffer[..template.payload + chunk.len()];
        segment[template.payload..].copy_from_slice(chunk);
        template.write_l3(headers, segment, index);
        let sum = template.write_l4(headers, segment, index, index + 1 == count);
        if let Some(around) = &template.around {
            around.write(headers, segment, index, template.l4, sum);
        }
        emit(segment);
    }
    Ok(count)
}

/// Offsets of what is written into each segment. [`Template::new`] makes sure that they lie inside the headers.
struct Template {
    l3: usize,
    l4: usize,
    payload: usize,
    /// Payload bytes of a segment; not 0.
    size: usize,
    ipv6: bool,
    /// Bytes of an IPv4 header.
    ihl: usize,
    tcp: bool,
    /// Sum of the pseudo-header without its length.
    pseudo: u64,
    around: Option<Around>,
}

impl Template {
    fn new(frame: &[u8], layout: &Layout, offload: &Offload) -> Option<Template> {
        let (l3, l4, payload) = match offload.inner {
            None => (layout.l3, layout.l4, layout.payload),
            Some(inner) => (inner.l3.get(), offload.csum_start, inner.payload),
        };
        let around = match offload.inner {
            None => None,
            Some(_) => Some(Around::new(frame, layout.l3 as usize, l4 as usize)?),
        };
        let outermost = around.as_ref().map_or(l3 as usize, |around| around.l3);
        let (csum_start, l3, l4, payload) =
            (offload.csum_start as usize, l3 as usize, l4 as usize, payload as usize);
        let size = offload.gso_size as usize;
        let ipv6 = match be16(frame, l3.checked_sub(2)?)? {
            ETH_P_IP => false,
            ETH_P_IPV6 => true,
            _ => return None,
        };
        let (tcp, field) = match offload.gso {
            Gso::None => return None,
            Gso::Tcp4 if ipv6 => return None,
            Gso::Tcp6 if !ipv6 => return None,
            Gso::Tcp4 | Gso::Tcp6 => (true, TCP_CHECKSUM),
            Gso::UdpL4 => (false, UDP_CHECKSUM),
        };
        let ihl = (frame.get(l3)? & 15) as usize * 4;
        let l3_fits = if ipv6 { l3 + 40 <= l4 } else { ihl >= 20 && l3 + ihl <= l4 };
        let l4_fits = l4 + if tcp { 20 } else { 8 } <= payload && payload < frame.len();
        let partial = offload.needs_csum && csum_start == l4 && offload.csum_offset == field;
        // The largest length that the IP header can say.
        let lengths_fit = payload - outermost.min(payload) + size.min(frame.len()) <= u16::MAX as usize;
        if !(l3_fits && l4_fits && partial && lengths_fit && size > 0) {
            return None;
        }
        let sum = be16(frame, l4 + field as usize)?;
        let len = checksum::fold((frame.len() - l4) as u64);
        Some(Template { l3, l4, payload, size, ipv6, ihl, tcp, pseudo: sum as u64 + !len as u64, around })
    }

    fn write_l3(&self, headers: &[u8], segment: &mut [u8], index: usize) {
        let len = segment.len() - self.l3;
        let (whole, ip) = (&headers[self.l3..], &mut segment[self.l3..self.l4]);
        match self.ipv6 {
            true => put16(ip, 4, (len - 40) as u16),
            false => write_ipv4(whole, &mut ip[..self.ihl], len, index),
        }
    }

    /// Gives the sum of the transport header and payload, checksum included.
    fn write_l4(&self, headers: &[u8], segment: &mut [u8], index: usize, last: bool) -> u16 {
        let l4 = &mut segment[self.l4..];
        let len = l4.len();
        let field = if self.tcp {
            let whole = &headers[self.l4..];
            let sequence = u32::from_be_bytes([whole[4], whole[5], whole[6], whole[7]]);
            let sequence = sequence.wrapping_add((index * self.size) as u32);
            l4[4..8].copy_from_slice(&sequence.to_be_bytes());
            let only_first = if index > 0 { TCP_CWR } else { 0 };
            let only_last = if last { 0 } else { TCP_FIN | TCP_PSH };
            l4[13] = whole[13] & !(only_first | only_last);
            TCP_CHECKSUM
        } else {
            put16(l4, 4, len as u16);
            UDP_CHECKSUM
        } as usize;
        put16(l4, field, 0);
        let sum = match !checksum::fold(checksum::add(self.pseudo + len as u64, l4)) {
            // To UDP 0 means "no checksum" (RFC 768).
            0 if !self.tcp => 0xffff,
            sum => sum,
        };
        put16(l4, field, sum);
        // With the pseudo-header it comes to nothing.
        !checksum::fold(self.pseudo + len as u64)
    }
}

/// Length, identification and checksum of the IPv4 header of a segment of `len` bytes from there.
fn write_ipv4(whole: &[u8], ip: &mut [u8], len: usize, index: usize) {
    let id = u16::from_be_bytes([whole[4], whole[5]]);
    put16(ip, 2, len as u16);
    put16(ip, 4, id.wrapping_add(index as u16));
    put16(ip, 10, 0);
    let sum = checksum::checksum(ip);
    put16(ip, 10, sum);
}

/// The outer headers of a packet inside a tunnel. [`Around::new`] makes sure that they lie in front of the inner headers.
struct Around {
    l3: usize,
    l4: usize,
    ipv6: bool,
    udp: bool,
    /// Where in the outer transport header the checksum is, if there is one.
    field: Option<usize>,
}

impl Around {
    /// The headers from the network header at `l3` on, of a packet whose inner transport header is at `inner_l4`.
    fn new(frame: &[u8], l3: usize, inner_l4: usize) -> Option<Around> {
        let ipv6 = match be16(frame, l3.checked_sub(2)?)? {
            ETH_P_IP if *frame.get(l3)? == 0x45 => false,
            ETH_P_IPV6 => true,
            _ => return None,
        };
        let (l4, proto) = if ipv6 { (l3 + 40, *frame.get(l3 + 6)?) } else { (l3 + 20, *frame.get(l3 + 9)?) };
        let (udp, field) = match proto {
            ipproto::UDP => (true, (be16(frame, l4 + UDP_CHECKSUM as usize)? != 0).then_some(6)),
            ipproto::GRE => (false, (be16(frame, l4)? & GRE_CHECKSUM_PRESENT != 0).then_some(4)),
            _ => return None,
        };
        // A sum can be taken over only where words begin.
        let room = l4 + 8 <= inner_l4 && (inner_l4 - l4).is_multiple_of(2);
        room.then_some(Around { l3, l4, ipv6, udp, field })
    }

    /// Writes what differs in a segment, of which the bytes from `inner_l4` on sum up to `inner`.
    fn write(&self, headers: &[u8], segment: &mut [u8], index: usize, inner_l4: usize, inner: u16) {
        let len = segment.len() - self.l3;
        let l4_len = segment.len() - self.l4;
        let (whole, ip) = (&headers[self.l3..], &mut segment[self.l3..self.l4]);
        let addresses = match self.ipv6 {
            true => {
                put16(ip, 4, (len - 40) as u16);
                &ip[8..]
            }
            false => {
                write_ipv4(whole, ip, len, index);
                &ip[12..]
            }
        };
        let mut sum = inner as u64;
        if self.udp {
            sum += checksum::add(ipproto::UDP as u64 + l4_len as u64, addresses);
            put16(segment, self.l4 + 4, l4_len as u16);
        }
        let Some(field) = self.field else { return };
        put16(segment, self.l4 + field, 0);
        let sum = !checksum::fold(checksum::add(sum, &segment[self.l4..inner_l4]));
        put16(segment, self.l4 + field, checksum_field(sum));
    }
}

fn be16(bytes: &[u8], at: usize) -> Option<u16> {
    Some(u16::from_be_bytes(*bytes.get(at..)?.first_chunk()?))
}

fn put16(bytes: &mut [u8], at: usize, value: u16) {
    bytes[at..at + 2].copy_from_slice(&value.to_be_bytes());
}

#[cfg(test)]
mod tests;
