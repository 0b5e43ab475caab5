//! A packet as it is to leave: its head in private memory, and its tail wherever that is.

use super::software;
use crate::virtio::{Burst, Frame};
use switch_core::packet::{Gso, Offload, Packet};

/// The rest of a packet's frame, behind its head.
#[derive(Clone, Copy)]
pub enum Tail<'a> {
    /// In the sender's memory: frame `.1` of a burst, from byte `.2` on.
    Burst(&'a Burst, usize, u32),
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

/// Whether a packet cut to `max_len` is larger than a port with this MTU takes. What is to be segmented fits always.
#[inline]
pub fn exceeds(packet: &Packet, max_len: u32, mtu: u32) -> bool {
    // Without a look at the frame: no tag makes it longer.
    packet.len > mtu.saturating_add(ETH_HEADER)
        && packet.network_len(max_len) > mtu
        && packet.offload.gso == Gso::None
}

impl<'a> Outgoing<'a> {
    /// Length of the frame as it leaves.
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
        let len = self.frame_len();
        let head = self.packet.head();
        let head = &head[..head.len().min(len as usize)];
        let header = software::net_header(self, features);
        let rest = len as usize - head.len();
        match self.tail {
            Tail::Burst(burst, i, offset) => {
                Frame { header, head, body: &[], tail: burst.segments(i), tail_offset: offset, len }
            }
            Tail::Private(bytes) => {
                let body = &bytes[..rest.min(bytes.len())];
                let len = (head.len() + body.len()) as u32;
                Frame { header, head, body, tail: &[], tail_offset: 0, len }
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
            Tail::Burst(burst, i, offset) => burst.copy_range(i, offset + skip as u32, &mut to[n..want]),
            Tail::Private(bytes) => {
                let part = bytes.get(skip..).unwrap_or_default();
                let m = part.len().min(want - n);
                to[n..n + m].copy_from_slice(&part[..m]);
                m
            }
        }
    }
}
