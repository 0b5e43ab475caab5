//! A packet as it is to leave: its head in private memory, and its tail wherever that is.

use super::software;
use crate::virtio::{Burst, Frame, Frames, Long};
use switch_core::packet::{Gso, Offload, Packet};

/// The rest of a packet's frame, behind its head.
#[derive(Clone, Copy)]
pub enum Tail<'a> {
    /// In the sender's memory: the end of frame `.1` of a burst.
    Burst(&'a Burst, usize),
    /// In private memory.
    Private(&'a [u8]),
}

/// A packet as it is to leave.
#[derive(Clone, Copy)]
pub struct Outgoing<'a> {
    /// Head, length and offload state.
    pub packet: &'a Packet,
    /// What follows the head.
    pub tail: Tail<'a>,
    /// It is cut to this length.
    pub max_len: u32,
}

/// Bytes of an Ethernet header without a tag.
const ETH_HEADER: u32 = 14;

/// The length of the longest frame that is not too long for this MTU, whatever it is: no tag makes it longer.
pub fn fitting(mtu: u32) -> u32 {
    mtu.saturating_add(ETH_HEADER)
}

/// Whether a packet cut to `max_len` is larger than a port with this MTU takes. What is to be segmented fits always, unless it is inside
/// a tunnel: then its segments have to fit, with the outer headers.
#[inline]
pub fn exceeds(packet: &Packet, max_len: u32, mtu: u32) -> bool {
    packet.len > fitting(mtu) // told without a look at the frame
        && packet.network_len(max_len) > mtu
        && (packet.offload.gso == Gso::None || segments_exceed(packet, mtu))
}

#[cold]
fn segments_exceed(packet: &Packet, mtu: u32) -> bool {
    let Offload { inner, gso_size, .. } = packet.offload;
    inner.is_some_and(|inner| {
        let longest = u32::from(inner.payload) + u32::from(gso_size);
        packet.network_len(longest) > mtu
    })
}

impl<'a> Outgoing<'a> {
    /// Length of the frame as it leaves.
    #[inline(always)]
    pub fn frame_len(&self) -> u32 {
        self.packet.len.min(self.max_len)
    }

    /// Whether it is shorter as it leaves. What its sender left to do is done before: no receiver could do it after.
    #[inline]
    pub fn is_cut(&self) -> bool {
        self.packet.len > self.max_len
    }

    /// Its offload state as it leaves.
    pub fn offload(&self) -> Offload {
        if self.is_cut() { Offload::default() } else { self.packet.offload }
    }

    /// For a ring whose driver negotiated `features`.
    pub fn frame(&self, features: u64) -> Frame<'a> {
        let header = software::net_header(self, features);
        let len = self.frame_len();
        let head = self.packet.head();
        let frame = Frame { header, head, body: &[], tail: &[], tail_offset: 0, len };
        if head.len() >= len as usize {
            return Frame { head: &head[..len as usize], ..frame };
        }
        match self.tail {
            Tail::Burst(burst, i) => {
                Frame { tail: burst.segments(i), tail_offset: tail_offset(burst, i, self.packet), ..frame }
            }
            Tail::Private(bytes) => {
                let body = &bytes[..(len as usize - head.len()).min(bytes.len())];
                Frame { body, len: (head.len() + body.len()) as u32, ..frame }
            }
        }
    }

    /// Copies the frame from byte `from` on into `to`; gives the number of bytes.
    pub fn copy_from(&self, from: usize, to: &mut [u8]) -> usize {
        self.copy_up_to(self.frame_len(), from, to)
    }

    /// Copies what the frame was before it was cut into `to`; gives the number of bytes.
    pub fn copy_uncut(&self, to: &mut [u8]) -> usize {
        self.copy_up_to(self.packet.len, 0, to)
    }

    fn copy_up_to(&self, len: u32, from: usize, to: &mut [u8]) -> usize {
        let want = (len as usize).saturating_sub(from).min(to.len());
        let head = self.packet.head();
        let part = head.get(from..).unwrap_or_default();
        let n = part.len().min(want);
        to[..n].copy_from_slice(&part[..n]);
        let skip = (from + n) - head.len().min(from + n);
        n + match self.tail {
            Tail::Burst(burst, i) => {
                burst.copy_range(i, tail_offset(burst, i, self.packet) + skip as u32, &mut to[n..want])
            }
            Tail::Private(bytes) => {
                let part = bytes.get(skip..).unwrap_or_default();
                let m = part.len().min(want - n);
                to[n..n + m].copy_from_slice(&part[..m]);
                m
            }
        }
    }
}

/// Where the tail begins in frame `i`, whose head may have been lengthened or shortened since.
#[inline(always)]
pub fn tail_offset(burst: &Burst, i: usize, packet: &Packet) -> u32 {
    burst.frames()[i].len - packet.tail_len()
}

/// Packets for one ring, in order. Each is described when it is asked for.
pub trait Batch {
    /// How many there are.
    fn count(&self) -> usize;
    /// The `i`th.
    fn outgoing(&self, i: usize) -> Outgoing<'_>;
    /// Length of the `i`th as it leaves.
    fn len(&self, i: usize) -> u32;
    /// Whether none of them needs anything done: they are complete, and leave as long as they are.
    fn is_plain(&self) -> bool;
}

impl Batch for Outgoing<'_> {
    fn count(&self) -> usize {
        1
    }

    fn outgoing(&self, _: usize) -> Outgoing<'_> {
        *self
    }

    fn len(&self, _: usize) -> u32 {
        self.frame_len()
    }

    fn is_plain(&self) -> bool {
        false
    }
}

/// Some packets of a batch, all of which a ring takes as they are, as the frames for it.
pub struct Ready<'a, B> {
    /// All packets.
    pub batch: &'a B,
    /// The first of these.
    pub from: usize,
    /// How many these are.
    pub count: usize,
    /// What the ring's driver negotiated.
    pub features: u64,
}

impl<B: Batch> Frames for Ready<'_, B> {
    #[inline(always)]
    fn count(&self) -> usize {
        self.count
    }

    #[inline(always)]
    fn len(&self, i: usize) -> u32 {
        self.batch.len(self.from + i)
    }

    #[inline(always)]
    fn frame(&self, i: usize) -> Frame<'_> {
        let outgoing = self.batch.outgoing(self.from + i);
        outgoing.frame(self.features)
    }

    #[inline(always)]
    fn simple(&self, i: usize) -> Option<&[u8]> {
        if !self.batch.is_plain() {
            return None;
        }
        let packet = self.batch.outgoing(self.from + i).packet;
        packet.is_whole().then(|| packet.head())
    }

    #[inline(always)]
    fn long(&self, i: usize) -> Option<Long<'_>> {
        if !self.batch.is_plain() {
            return None;
        }
        let Outgoing { packet, tail: Tail::Burst(burst, i), .. } = self.batch.outgoing(self.from + i) else {
            return None;
        };
        let [tail] = burst.segments(i) else { return None };
        Some(Long { head: packet.head(), tail, tail_offset: tail_offset(burst, i, packet) })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::num::NonZeroU16;
    use switch_core::packet::{Inner, PortId};

    #[test]
    fn segments_inside_a_tunnel_have_to_fit_with_its_header() {
        let exceeds = |tag: &[u8], gso_size, inner| {
            let mut frame = vec![0; 12];
            frame.extend(tag);
            frame.resize(9000, 0);
            let mut packet = Packet::from_frame(PortId { slot: 0, generation: 1 }, &frame);
            packet.offload =
                Offload { needs_csum: true, gso: Gso::Tcp4, gso_size, inner, ..Offload::default() };
            exceeds(&packet, u32::MAX, 1500)
        };
        // VXLAN, Ethernet, IPv4 and TCP, of which the first Ethernet header does not count.
        let inner = |tag: u16| NonZeroU16::new(64 + tag).map(|l3| Inner { l3, payload: 104 + tag });
        assert!(!exceeds(&[], 1460, None), "outside of tunnels all are cut to fit");
        assert_eq!((exceeds(&[], 1410, inner(0)), exceeds(&[], 1411, inner(0))), (false, true));
        let tag = [0x81, 0, 0, 5];
        assert_eq!((exceeds(&tag, 1410, inner(4)), exceeds(&tag, 1411, inner(4))), (false, true));
    }
}
