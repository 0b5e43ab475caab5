//! What one visit to a guest's transmit ring, or a device's receive ring, brings: up to 64 frames, by reference.

use std::sync::Arc;

use super::header::NetHeader;
use super::mem::{self, Mapping, Seg};

/// The most frames of a burst: what fits the caches and keeps look-ahead deep.
pub const MAX_BURST: usize = 64;

/// The most pieces of all frames of a burst together, and of any one frame.
pub const MAX_SEGS: usize = 2048;

/// Cache lines of a frame's beginning that are asked for ahead: the usual headers.
const HEAD_LINES: usize = 2;

/// One frame of a burst.
#[derive(Debug, Clone, Copy, Default)]
pub struct Received {
    /// As the guest wrote it: not to be believed. All zero if no offload was negotiated.
    pub header: NetHeader,
    /// Bytes of the frame, without the virtio header. It may be 0, or more than any frame should have.
    pub len: u32,
    /// First piece in the arena.
    pub(super) first: u32,
    /// Number of pieces.
    pub(super) count: u32,
    /// The chain's head, to give back.
    pub(super) head: u16,
}

/// A reusable arena for a burst of frames and their pieces. It keeps their memory mapped until it is cleared.
#[derive(Debug)]
pub struct Burst {
    pub(super) frames: Vec<Received>,
    pub(super) segs: Vec<Seg>,
    /// The ring that the frames came from.
    pub(super) ring: u64,
    pub(super) owner: Option<Arc<dyn Mapping>>,
}

impl Default for Burst {
    fn default() -> Self {
        Self::new()
    }
}

impl Burst {
    /// Allocates the arena, once.
    pub fn new() -> Self {
        Burst {
            frames: Vec::with_capacity(MAX_BURST),
            segs: Vec::with_capacity(MAX_SEGS),
            ring: 0,
            owner: None,
        }
    }

    /// Forgets the frames. Those not [completed](super::GuestTx::complete) stay with the device until the ring is
    /// started again.
    pub fn clear(&mut self) {
        self.frames.clear();
        self.segs.clear();
        self.ring = 0;
        self.owner = None;
    }

    /// Begins a burst of frames that do not come from a guest: of ring `ring`, with pieces of `owner`'s memory.
    pub(crate) fn begin(&mut self, ring: u64, owner: Arc<dyn Mapping>) {
        self.clear();
        self.ring = ring;
        self.owner = Some(owner);
    }

    /// Adds a frame, of pieces of the memory of who [began](Self::begin) the burst. False if there is no room, and
    /// then nothing is added.
    pub(crate) fn push(&mut self, pieces: impl IntoIterator<Item = Seg>) -> bool {
        if self.frames.len() == MAX_BURST {
            return false;
        }
        let first = self.segs.len();
        let mut len = 0u32;
        for seg in pieces {
            if self.segs.len() == MAX_SEGS {
                self.segs.truncate(first);
                return false;
            }
            if self.segs.len() == first {
                seg.prefetch_read(HEAD_LINES);
            }
            len = len.saturating_add(seg.len());
            self.segs.push(seg);
        }
        let count = (self.segs.len() - first) as u32;
        self.frames.push(Received { len, first: first as u32, count, ..Received::default() });
        true
    }

    /// The ring that the frames came from; 0 if there are none.
    pub(crate) fn ring(&self) -> u64 {
        self.ring
    }

    /// What keeps the frames' memory.
    pub(crate) fn owner(&self) -> Option<&Arc<dyn Mapping>> {
        self.owner.as_ref()
    }

    /// All pieces of all frames.
    pub(crate) fn all_segments(&self) -> &[Seg] {
        &self.segs
    }

    /// The frames, in the order of the ring.
    pub fn frames(&self) -> &[Received] {
        &self.frames
    }

    /// Where the bytes of frame `i` are, without the virtio header. Empty if there is no such frame.
    #[inline]
    pub fn segments(&self, i: usize) -> &[Seg] {
        let Some(f) = self.frames.get(i) else { return &[] };
        &self.segs[f.first as usize..(f.first + f.count) as usize]
    }

    /// Copies the first bytes of frame `i`, as many as there are and fit. Returns their number.
    #[inline]
    pub fn copy_head(&self, i: usize, dst: &mut [u8]) -> usize {
        mem::gather(self.segments(i), 0, dst)
    }

    /// Copies bytes of frame `i` from `offset` on, as many as there are and fit. Returns their number.
    pub fn copy_range(&self, i: usize, offset: u32, dst: &mut [u8]) -> usize {
        mem::gather(self.segments(i), offset, dst)
    }
}
