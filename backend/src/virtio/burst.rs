//! What one visit to a guest's transmit ring, or a device's receive ring, brings: up to 64 frames, by reference.

use std::sync::Arc;

use super::header::NetHeader;
use super::mem::{self, HEAD_LINES, Mapping, Seg};

/// The most frames of a burst: what fits the caches and keeps look-ahead deep.
pub const MAX_BURST: usize = 64;

/// The most pieces of all frames of a burst together, and of any one frame.
pub const MAX_SEGS: usize = 2048;

/// One frame of a burst.
#[derive(Debug, Default)]
pub struct Received {
    /// As the guest wrote it: not to be believed. All zero if no offload was negotiated, or none is wanted.
    pub header: NetHeader,
    /// Bytes of the frame, without the virtio header. It may be 0, or more than any frame should have.
    pub len: u32,
    /// Where its bytes are.
    pub(super) pieces: Pieces,
}

/// Where a frame's bytes are.
#[derive(Debug, Default)]
pub(super) enum Pieces {
    /// Nowhere: it is not known yet, or there are none.
    #[default]
    None,
    /// In one piece, as nearly all are.
    One(Seg),
    /// In so many pieces of the arena, from this one on.
    Many { first: u32, count: u32 },
}

/// A reusable arena for a burst of frames and their pieces. It keeps their memory mapped until it is cleared.
#[derive(Debug)]
pub struct Burst {
    /// The first `count` are of this burst.
    pub(super) frames: Box<[Received; MAX_BURST]>,
    pub(super) count: usize,
    /// What gives the buffer of each frame back.
    pub(super) entries: Box<[u64; MAX_BURST]>,
    /// The places of the ring that the buffer of each frame takes, if not all take one.
    pub(super) places: Box<[u16; MAX_BURST]>,
    pub(super) uneven: bool,
    /// The arena of pieces.
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
            frames: Box::new(
                [const { Received { header: NetHeader::EMPTY, len: 0, pieces: Pieces::None } }; MAX_BURST],
            ),
            count: 0,
            entries: Box::new([0; MAX_BURST]),
            places: Box::new([1; MAX_BURST]),
            uneven: false,
            segs: Vec::with_capacity(MAX_SEGS),
            ring: 0,
            owner: None,
        }
    }

    /// Forgets the frames. Those not [completed](super::GuestTx::complete) stay with the device until the ring is
    /// started again.
    pub fn clear(&mut self) {
        self.count = 0;
        self.uneven = false;
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
        let Some(frame) = self.frames.get_mut(self.count) else { return false };
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
        let pieces = Pieces::Many { first: first as u32, count: (self.segs.len() - first) as u32 };
        *frame = Received { len, pieces, ..Received::default() };
        self.count += 1;
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

    /// All pieces of frames that were [pushed](Self::push).
    pub(crate) fn pushed_segments(&self) -> &[Seg] {
        &self.segs
    }

    /// The frames, in the order of the ring.
    #[inline(always)]
    pub fn frames(&self) -> &[Received] {
        &self.frames[..self.count]
    }

    /// Where the bytes of frame `i` are, without the virtio header. Empty if there is no such frame.
    #[inline(always)]
    pub fn segments(&self, i: usize) -> &[Seg] {
        match self.frames().get(i).map(|frame| &frame.pieces) {
            Some(Pieces::One(seg)) => std::slice::from_ref(seg),
            Some(&Pieces::Many { first, count }) => &self.segs[first as usize..(first + count) as usize],
            Some(Pieces::None) | None => &[],
        }
    }

    /// Copies the first bytes of frame `i`, as many as there are and fit. Returns their number.
    #[inline(always)]
    pub fn copy_head(&self, i: usize, dst: &mut [u8]) -> usize {
        mem::gather(self.segments(i), 0, dst)
    }

    /// Copies bytes of frame `i` from `offset` on, as many as there are and fit. Returns their number.
    pub fn copy_range(&self, i: usize, offset: u32, dst: &mut [u8]) -> usize {
        mem::gather(self.segments(i), offset, dst)
    }
}
