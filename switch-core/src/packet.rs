//! A packet on its way: a private snapshot of its headers, what was found in them, and its offload state.
//!
//! The payload stays where it came from (a guest's memory); only the head is copied, once, before anything is decided.
//! Headers are rewritten in the snapshot, and what leaves is the snapshot followed by the payload's tail, so a guest that
//! changes its memory after the check changes nothing that was checked.

use crate::common::WINDOW;
use crate::drop::DropReason;
use crate::key::ipproto;
use std::num::NonZeroU16;

/// Room in front of the frame for headers that actions push.
pub const HEADROOM: usize = 128;
/// Bytes copied of every packet at first.
pub const SNAPSHOT: usize = 256;
/// Bytes copied when the headers are longer than [`SNAPSHOT`]; a packet whose headers are longer still is punted.
pub const MAX_SNAPSHOT: usize = 1024;
/// Largest frame: a 64 KiB IP packet and its link headers.
pub const MAX_FRAME: u32 = 65_535 + 64;
/// An offset that is not known: the packet has no such header, or not all of it.
pub const NONE: u16 = u16::MAX;

/// A port at a moment: the slot is reused when a port goes, the generation is not.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, PartialOrd, Ord)]
pub struct PortId {
    /// Index of the port in tables, and the value of [`crate::key::Field::InPort`].
    pub slot: u32,
    /// Counts the ports that have had this slot.
    pub generation: u32,
}

/// Segmentation that is still to be done (virtio 1.2 §5.1.6).
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub enum Gso {
    /// An ordinary packet.
    #[default]
    None,
    /// TCP over IPv4.
    Tcp4,
    /// TCP over IPv6.
    Tcp6,
    /// UDP segmentation (`VIRTIO_NET_HDR_GSO_UDP_L4`), IPv4 or IPv6.
    UdpL4,
}

/// Checksum and segmentation state: the checked content of a virtio-net header.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Offload {
    /// The transport checksum holds only the pseudo-header's sum and is to be completed.
    pub needs_csum: bool,
    /// The transport checksum has been verified by whoever sent the packet.
    pub csum_valid: bool,
    /// With `needs_csum`: where the sum begins, from the start of the frame.
    pub csum_start: u16,
    /// With `needs_csum`: where the checksum lies, from `csum_start`.
    pub csum_offset: u16,
    /// Segmentation to be done.
    pub gso: Gso,
    /// TCP segment that carries congestion marks (`VIRTIO_NET_HDR_GSO_ECN`).
    pub ecn: bool,
    /// Payload bytes of a segment.
    pub gso_size: u16,
    /// The packet to be segmented is inside a tunnel: each segment gets the outer headers too.
    pub inner: Option<Inner>,
}

/// Where the headers are of a packet inside a tunnel that is still to be segmented, from the start of the frame. Its transport
/// header begins at [`Offload::csum_start`]; [`Layout`] is that of the outer packet.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Inner {
    /// Network header.
    pub l3: NonZeroU16,
    /// First byte after the transport header.
    pub payload: u16,
}

/// Where the headers begin, from the start of the frame. [`NONE`] where there is none.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Layout {
    /// Network header (after all VLAN tags; after the MPLS stack it is unknown).
    pub l3: u16,
    /// Transport header, if it is complete in the snapshot and this is not a later fragment.
    pub l4: u16,
    /// First byte after the transport header (TCP options included).
    pub payload: u16,
}

impl Default for Layout {
    fn default() -> Self {
        Layout { l3: NONE, l4: NONE, payload: NONE }
    }
}

/// The snapshot of a packet's head and everything known about the packet.
#[derive(Clone)]
#[repr(C, align(64))]
pub struct Packet {
    buffer: [u8; HEADROOM + MAX_SNAPSHOT],
    start: u16,
    head_len: u16,
    /// Length of the whole frame in bytes: the head here and the tail that stays outside.
    pub len: u32,
    /// Where the headers are; written by [`crate::parse::extract`], kept true by actions.
    pub layout: Layout,
    /// Checksum and segmentation state.
    pub offload: Offload,
    /// The port that it came in by.
    pub in_port: PortId,
}

impl Default for Packet {
    fn default() -> Self {
        Packet {
            buffer: [0; HEADROOM + MAX_SNAPSHOT],
            start: HEADROOM as u16,
            head_len: 0,
            len: 0,
            layout: Layout::default(),
            offload: Offload::default(),
            in_port: PortId { slot: 0, generation: 0 },
        }
    }
}

impl Packet {
    /// Makes this the packet of a frame of `len` bytes and gives the space for its first bytes, `min(len, want)` long
    /// (`want` is at most [`MAX_SNAPSHOT`]), for the caller to fill.
    pub fn reset(&mut self, in_port: PortId, len: u32, want: usize) -> &mut [u8] {
        self.start = HEADROOM as u16;
        self.len = len;
        self.layout = Layout::default();
        self.offload = Offload::default();
        self.in_port = in_port;
        let head = want.min(MAX_SNAPSHOT).min(len as usize);
        self.head_len = head as u16;
        &mut self.buffer[HEADROOM..HEADROOM + head]
    }

    /// Lengthens the head of a packet that was not edited yet, but for outer headers that were taken off, to `min(len,
    /// MAX_SNAPSHOT)`, or less where those have used up the room, and gives the new space to be filled with the frame's bytes
    /// from the old head's end on.
    pub fn extend(&mut self) -> &mut [u8] {
        let old = self.head_len as usize;
        let start = self.start as usize;
        let room = self.buffer.len() - start;
        let new = MAX_SNAPSHOT.min(room).min(self.len as usize).max(old);
        self.head_len = new as u16;
        &mut self.buffer[start + old..start + new]
    }

    /// A packet that is wholly in private memory, for tests and tools. Bytes past [`MAX_SNAPSHOT`] are the caller's tail.
    pub fn from_frame(in_port: PortId, frame: &[u8]) -> Packet {
        let mut packet = Packet::default();
        let head = packet.reset(in_port, frame.len() as u32, MAX_SNAPSHOT);
        let n = head.len();
        head.copy_from_slice(&frame[..n]);
        packet
    }

    /// The head: the frame's first bytes.
    #[inline(always)]
    pub fn head(&self) -> &[u8] {
        &self.buffer[self.start as usize..self.start as usize + self.head_len as usize]
    }

    /// Bytes of the head.
    #[inline(always)]
    pub(crate) fn head_len(&self) -> usize {
        self.head_len as usize
    }

    /// The head, to be rewritten.
    #[inline(always)]
    pub fn head_mut(&mut self) -> &mut [u8] {
        &mut self.buffer[self.start as usize..self.start as usize + self.head_len as usize]
    }

    /// The first bytes of a packet that was not edited since it came in, but for outer headers that were taken off one out of a
    /// tunnel. Behind the head's end they mean nothing.
    #[inline(always)]
    pub(crate) fn window<const TUNNELLED: bool>(&self) -> &[u8; WINDOW] {
        debug_assert!(TUNNELLED || self.start as usize == HEADROOM);
        const { assert!(WINDOW <= MAX_SNAPSHOT) };
        let start = if TUNNELLED { self.start as usize } else { HEADROOM };
        match self.buffer.get(start..).and_then(<[u8]>::first_chunk) {
            Some(window) => window,
            None => &[0; WINDOW], // of no shape; only behind outer headers that have used up the room
        }
    }

    /// Whether the head is the whole frame.
    pub fn is_whole(&self) -> bool {
        self.head_len as u32 >= self.len
    }

    /// Bytes of the frame that are not in the head: the tail's length.
    pub fn tail_len(&self) -> u32 {
        self.len.saturating_sub(self.head_len as u32)
    }

    /// Opens a gap of `n` bytes at offset `at` of the head by moving what lies before it to the front; the gap's bytes are
    /// undefined. Layout offsets at or after the gap and the checksum start move along. Fails when the headroom is used
    /// up or `at` is outside the head.
    #[inline(always)] // for a tag at a known place it is a few moves
    pub fn insert(&mut self, at: usize, n: usize) -> Result<(), DropReason> {
        if at > self.head_len as usize || n > self.start as usize {
            return Err(DropReason::TooDeep);
        }
        let start = self.start as usize;
        self.buffer.copy_within(start..start + at, start - n);
        self.start -= n as u16;
        self.head_len += n as u16;
        self.len += n as u32;
        self.shift(at, n as i32);
        Ok(())
    }

    /// The `BEFORE` bytes in front of the frame, and its first ones; `None` if there is no such room, or the head is shorter.
    #[inline(always)]
    pub(crate) fn around<const BEFORE: usize, const FIRST: usize>(
        &mut self,
    ) -> Option<(&mut [u8; BEFORE], &mut [u8; FIRST])> {
        if (self.head_len as usize) < FIRST {
            return None;
        }
        let from = (self.start as usize).wrapping_sub(BEFORE);
        let (before, rest) = self.buffer.get_mut(from..)?.split_first_chunk_mut::<BEFORE>()?;
        Some((before, rest.first_chunk_mut()?))
    }

    /// What is in the last `n` bytes in front of the frame is part of it from now on; there are so many. Unlike [`Packet::insert`] it
    /// leaves all offsets as they are.
    #[inline(always)]
    pub(crate) fn take_in(&mut self, n: u8) {
        debug_assert!(u16::from(n) <= self.start);
        self.start = self.start.saturating_sub(n.into());
        self.head_len += u16::from(n);
        self.len += u32::from(n);
    }

    /// Takes `n` bytes at offset `at` out of the head. Layout offsets after them and the checksum start move along.
    #[inline(always)] // as above
    pub fn remove(&mut self, at: usize, n: usize) -> Result<(), DropReason> {
        if at + n > self.head_len as usize {
            return Err(DropReason::TruncatedHeader);
        }
        let start = self.start as usize;
        self.buffer.copy_within(start..start + at, start + n);
        self.start += n as u16;
        self.head_len -= n as u16;
        self.len -= n as u32;
        self.shift(at, -(n as i32));
        Ok(())
    }

    /// Takes the first `n` bytes off, outer headers of a tunnel: the packet has then just come in, and nothing is known of it.
    #[inline(always)]
    pub(crate) fn strip(&mut self, n: usize) {
        let n = n.min(self.head_len as usize);
        self.start += n as u16;
        self.head_len -= n as u16;
        self.len -= n as u32;
        (self.layout, self.offload) = (Layout::default(), Offload::default());
    }

    /// Takes back that so many bytes of a frame were taken off its front by [`Packet::remove`] and off its end, all in the head, by
    /// [`Packet::truncate`], when nothing has been pushed since. Offsets stay as they are.
    pub(crate) fn restore(&mut self, front: usize, back: usize) {
        let (start, end) = (self.start as usize, self.start as usize + self.head_len as usize);
        if front > start || end + back > self.buffer.len() {
            return; // of another packet
        }
        self.start -= front as u16;
        self.head_len += (front + back) as u16;
        self.len += (front + back) as u32;
    }

    fn shift(&mut self, at: usize, by: i32) {
        let Layout { l3, l4, payload } = &mut self.layout;
        for offset in [l3, l4, payload] {
            if *offset != NONE && *offset as usize >= at {
                *offset = (*offset as i32 + by) as u16;
            }
        }
        if self.offload.needs_csum {
            self.offload.csum_start = (self.offload.csum_start as i32 + by) as u16;
            if self.offload.inner.is_some() {
                self.shift_inner(by);
            }
        }
    }

    #[cold]
    fn shift_inner(&mut self, by: i32) {
        let moved = |offset: u16| (offset as i32 + by) as u16;
        self.offload.inner = self.offload.inner.and_then(|Inner { l3, payload }| {
            let l3 = NonZeroU16::new(moved(l3.get()))?;
            Some(Inner { l3, payload: moved(payload) })
        });
    }

    /// Cuts the frame to `len` bytes, if it is longer.
    pub fn truncate(&mut self, len: u32) {
        self.len = self.len.min(len);
        self.head_len = (self.head_len as u32).min(len) as u16;
    }

    /// Whether the checksum that is still to be completed is that of the transport header in the [`Layout`], and not one inside
    /// a tunnel.
    #[inline]
    pub fn is_partial(&self) -> bool {
        self.offload.needs_csum && self.offload.csum_start == self.layout.l4
    }

    /// Length without the link header, as the MTU counts it (`packet_length` of the kernel's `openvswitch`: the outer
    /// VLAN tag is not counted), of the packet cut to `max_len`.
    pub fn network_len(&self, max_len: u32) -> u32 {
        let tagged = matches!(self.head().get(12..14), Some([0x81, 0x00] | [0x88, 0xa8]));
        self.len.min(max_len).saturating_sub(if tagged { 18 } else { 14 })
    }

    /// A hash of the flow that both directions share: of addresses, and ports if there are any. For spreading over
    /// queues; not a defence.
    #[inline]
    pub fn flow_hash(&self) -> u32 {
        let head = self.head();
        let word = |at: usize| match head.get(at..at + 4) {
            Some(&[a, b, c, d]) => u32::from_be_bytes([a, b, c, d]),
            _ => 0,
        };
        let l3 = self.layout.l3 as usize;
        let (addresses, proto) = match head.get(l3).map(|byte| byte >> 4) {
            Some(4) => (word(l3 + 12) ^ word(l3 + 16), head.get(l3 + 9)),
            Some(6) => ((2..10).fold(0, |sum, i| sum ^ word(l3 + 4 * i)), head.get(l3 + 6)),
            _ => (word(2) ^ word(8), None),
        };
        let ports = match proto {
            Some(&(ipproto::TCP | ipproto::UDP | ipproto::SCTP)) if self.layout.l4 != NONE => {
                word(self.layout.l4 as usize)
            }
            _ => 0,
        };
        mix(addresses, ports)
    }

    /// Makes `self` a copy of `other` without moving more bytes than the head has.
    pub fn copy_from(&mut self, other: &Packet) {
        let range = other.start as usize..other.start as usize + other.head_len as usize;
        self.buffer[range.clone()].copy_from_slice(&other.buffer[range]);
        self.start = other.start;
        self.head_len = other.head_len;
        self.len = other.len;
        self.layout = other.layout;
        self.offload = other.offload;
        self.in_port = other.in_port;
    }
}

/// TOS, TTL and [`Packet::flow_hash`] of a packet whose first bytes, as far as the ports, are these, if it is TCP or UDP over IPv4 without
/// options; its headers are known to be there.
#[inline(always)]
pub(crate) fn flow_v4<const FIRST: usize>(first: &[u8; FIRST]) -> Option<(u8, u8, u32)> {
    let ([0x08, 0x00], ip) = first.last_chunk::<26>()?.split_first_chunk()? else { return None };
    let &[0x45, tos, _, _, _, _, _, _, ttl, proto, _, _, ref rest @ ..] = ip else { return None };
    if ![ipproto::TCP, ipproto::UDP].contains(&proto) {
        return None;
    }
    let &[src, dst, ports] = rest.as_chunks::<4>().0.first_chunk()?;
    let [src, dst, ports] = [src, dst, ports].map(u32::from_be_bytes);
    Some((tos, ttl, mix(src ^ dst, ports)))
}

/// What [`Packet::flow_hash`] makes of addresses and ports that were put together.
#[inline(always)]
fn mix(addresses: u32, ports: u32) -> u32 {
    // Fibonacci hashing: the upper bits depend on all lower ones.
    let mixed = (addresses ^ (ports >> 16) ^ (ports & 0xffff)).wrapping_mul(0x9e37_79b1);
    mixed ^ mixed >> 15
}

#[cfg(test)]
mod tests {
    use super::*;

    const PORT: PortId = PortId { slot: 3, generation: 1 };

    #[test]
    fn insert_and_remove_are_inverse() {
        let frame: Vec<u8> = (0..100).collect();
        let mut packet = Packet::from_frame(PORT, &frame);
        packet.layout = Layout { l3: 14, l4: 34, payload: 42 };
        packet.offload = Offload { needs_csum: true, csum_start: 34, csum_offset: 6, ..Offload::default() };
        packet.insert(12, 4).unwrap();
        assert_eq!(packet.len, 104);
        assert_eq!(packet.layout, Layout { l3: 18, l4: 38, payload: 46 });
        assert_eq!(packet.offload.csum_start, 38);
        assert_eq!(&packet.head()[..12], &frame[..12]);
        assert_eq!(&packet.head()[16..], &frame[12..]);
        packet.remove(12, 4).unwrap();
        assert_eq!(packet.head(), &frame[..]);
        assert_eq!(packet.layout, Layout { l3: 14, l4: 34, payload: 42 });
        assert!(packet.remove(90, 11).is_err());
        assert!(packet.insert(0, HEADROOM + 1).is_err());
    }

    #[test]
    fn both_directions_of_a_flow_have_one_hash() {
        let mut there = vec![0u8; 60];
        there[14] = 0x45;
        there[23] = ipproto::UDP;
        there[26..34].copy_from_slice(&[10, 0, 0, 1, 10, 0, 0, 2]);
        there[34..38].copy_from_slice(&[0x12, 0x34, 0, 80]);
        let mut back = there.clone();
        back[26..34].copy_from_slice(&[10, 0, 0, 2, 10, 0, 0, 1]);
        back[34..38].copy_from_slice(&[0, 80, 0x12, 0x34]);
        let hash = |frame: &[u8]| {
            let mut packet = Packet::from_frame(PORT, frame);
            packet.layout = Layout { l3: 14, l4: 34, payload: 42 };
            packet.flow_hash()
        };
        assert_eq!(hash(&there), hash(&back));
        there[35] ^= 1;
        assert_ne!(hash(&there), hash(&back));
        assert_eq!(Packet::from_frame(PORT, &there).network_len(u32::MAX), 46);
        Packet::from_frame(PORT, &[]).flow_hash();
    }

    #[test]
    fn a_long_frame_keeps_its_tail_outside() {
        let frame = vec![7; 3000];
        let mut packet = Packet::default();
        packet.reset(PORT, 3000, SNAPSHOT).copy_from_slice(&frame[..SNAPSHOT]);
        assert_eq!(packet.tail_len(), 3000 - SNAPSHOT as u32);
        assert_eq!(packet.extend().len(), MAX_SNAPSHOT - SNAPSHOT);
        assert_eq!(packet.tail_len(), 3000 - MAX_SNAPSHOT as u32);
        assert_eq!(packet.extend().len(), 0);
        // Outer headers that were taken off have used up some of the room.
        packet.reset(PORT, 3000, SNAPSHOT).copy_from_slice(&frame[..SNAPSHOT]);
        packet.remove(0, 200).unwrap();
        assert_eq!(packet.extend().len(), MAX_SNAPSHOT - SNAPSHOT);
        assert_eq!(
            (packet.head().len(), packet.tail_len()),
            (MAX_SNAPSHOT - 200, 3000 - MAX_SNAPSHOT as u32)
        );
    }
}
