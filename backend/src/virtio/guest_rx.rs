//! A guest's receive ring, which we fill.

use std::sync::Arc;

use virtio_bindings::virtio_config::VIRTIO_F_RING_PACKED;

use super::filling::Filling;
use super::header::NetHeader;
use super::mem::{self, GuestRegions, Scatter, Seg};
use super::notify::Call;
use super::packed::PackedRing;
use super::split::SplitRing;
use super::{RingBase, RingConfig, RingError};

/// A frame to be put into a guest's receive ring: private bytes, followed by bytes of another guest.
#[derive(Debug, Clone, Copy)]
pub struct Frame<'a> {
    /// As the receiver shall see it; `num_buffers` is filled in.
    pub header: NetHeader,
    /// The first bytes, in private memory: rewritten headers, or all of a materialised frame.
    pub head: &'a [u8],
    /// What follows them in private memory, if anything.
    pub body: &'a [u8],
    /// Where the rest is.
    pub tail: &'a [Seg],
    /// Bytes of `tail` to leave out.
    pub tail_offset: u32,
    /// Bytes of the whole frame: of `head` and `body`, and the rest from `tail`.
    pub len: u32,
}

impl Frame<'_> {
    /// Writes header and frame into one segment that takes them.
    #[inline(never)] // the rarer way
    pub(super) fn write(&self, seg: &Seg, header_len: u32) {
        let header = NetHeader { num_buffers: 1, ..self.header }.to_bytes();
        let mut out = Scatter::new(std::slice::from_ref(seg));
        out.put_bytes(&header[..header_len as usize]);
        self.put(&mut out);
    }

    /// As [`Frames::simple`].
    fn simple(&self) -> Option<&[u8]> {
        (self.head.len() == self.len as usize && self.header == NetHeader::EMPTY).then_some(self.head)
    }

    /// The frame's bytes, in order, without the virtio header: what is in private memory, and a copy of the rest in `room`,
    /// which is long enough if it is as long as the frame. What is not there is zero, lest another's bytes leave with it.
    pub(crate) fn pieces<'r>(&'r self, room: &'r mut [u8]) -> [&'r [u8]; 3] {
        let len = self.len as usize;
        let head = &self.head[..self.head.len().min(len)];
        let body = &self.body[..self.body.len().min(len - head.len())];
        let rest = (len - head.len() - body.len()).min(room.len());
        let rest = &mut room[..rest];
        let copied = mem::gather(self.tail, self.tail_offset, rest);
        rest[copied..].fill(0);
        [head, body, rest]
    }

    /// Appends the frame's bytes to `out`, without the virtio header.
    #[inline]
    pub(crate) fn put(&self, out: &mut Scatter<'_>) {
        let head = &self.head[..self.head.len().min(self.len as usize)];
        out.put_bytes(head);
        let rest = self.len - head.len() as u32;
        let body = &self.body[..self.body.len().min(rest as usize)];
        out.put_bytes(body);
        out.put_segs(self.tail, self.tail_offset, rest - body.len() as u32);
    }
}

/// Frames to be put into a ring, in order. Each is made when it is asked for, so that none of them is moved about.
pub trait Frames {
    /// How many there are.
    fn count(&self) -> usize;
    /// Bytes of frame `i`, the [`len`](Frame::len) that it will have when it is made.
    fn len(&self, i: usize) -> u32;
    /// Makes frame `i`.
    fn frame(&self, i: usize) -> Frame<'_>;
    /// All bytes of frame `i`, if they are in one place in private memory, and its header says nothing: the frequent case,
    /// for which no [`Frame`] need be made.
    fn simple(&self, i: usize) -> Option<&[u8]> {
        let _ = i;
        None
    }
    /// Frame `i` in its two parts, if it is a long one whose header says nothing: the frequent case of those, for which no
    /// [`Frame`] need be made either.
    fn long(&self, i: usize) -> Option<Long<'_>> {
        let _ = i;
        None
    }
}

/// A frame of which only the head is in private memory, and the rest in one piece of its sender's.
#[derive(Debug, Clone, Copy)]
pub struct Long<'a> {
    /// The first bytes.
    pub head: &'a [u8],
    /// The piece that all others are in, to its end.
    pub tail: &'a Seg,
    /// Bytes of `tail` to leave out.
    pub tail_offset: u32,
}

impl Frames for [Frame<'_>] {
    fn count(&self) -> usize {
        <[_]>::len(self)
    }

    fn len(&self, i: usize) -> u32 {
        self[i].len
    }

    fn frame(&self, i: usize) -> Frame<'_> {
        self[i]
    }

    #[inline(always)]
    fn simple(&self, i: usize) -> Option<&[u8]> {
        self[i].simple()
    }
}

impl<const N: usize> Frames for [Frame<'_>; N] {
    fn count(&self) -> usize {
        N
    }

    fn len(&self, i: usize) -> u32 {
        self[i].len
    }

    fn frame(&self, i: usize) -> Frame<'_> {
        self[i]
    }

    #[inline(always)]
    fn simple(&self, i: usize) -> Option<&[u8]> {
        self[i].simple()
    }
}

/// Why a frame did not go in.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Blocked {
    /// The guest has offered too few buffers so far.
    Full,
    /// The ring is stopped.
    Stopped,
    /// The frame never fits: larger than the buffers of a driver without mergeable ones, or than the whole ring. It
    /// is the frame at index `sent`; go on with the one after it.
    TooBig,
    /// The ring is malformed, which is said once. It is stopped from now on.
    Fault(RingError),
}

/// What became of a burst of frames.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct SendResult {
    /// Leading frames that the guest has received.
    pub sent: usize,
    /// Why the next one was not.
    pub blocked: Option<Blocked>,
}

/// A guest's receive ring, shared by all workers that send to it.
pub struct GuestRx {
    ring: Ring,
    features: u64,
    call: Arc<Call>,
    base: Arc<RingBase>,
}

/// Told apart once a call.
enum Ring {
    Split(Filling<SplitRing>),
    Packed(Filling<PackedRing>),
}

/// Evaluates an expression for the ring of whatever layout.
macro_rules! with_ring {
    ($rx:expr, $ring:ident => $use:expr) => {
        match &$rx.ring {
            Ring::Split($ring) => $use,
            Ring::Packed($ring) => $use,
        }
    };
}

impl GuestRx {
    /// Starts the ring at position `base`.
    ///
    /// # Errors
    /// [`RingError::Size`], [`RingError::Layout`], [`RingError::Base`].
    pub fn new(
        regions: Arc<GuestRegions>,
        config: &RingConfig,
        call: Arc<Call>,
        base: Arc<RingBase>,
    ) -> Result<Self, RingError> {
        let ring = match config.has(VIRTIO_F_RING_PACKED) {
            true => Ring::Packed(Filling::new(regions, config, &base)?),
            false => Ring::Split(Filling::new(regions, config, &base)?),
        };
        call.signal_finished(&base);
        Ok(GuestRx { ring, features: config.features, call, base })
    }

    /// The virtio features that the ring's driver has negotiated.
    pub fn features(&self) -> u64 {
        self.features
    }

    /// Puts frames into the ring, in order, until one does not go in. The guest sees them when this returns, but is
    /// not [notified](Self::notify) yet.
    #[inline]
    pub fn send<F: Frames + ?Sized>(&self, frames: &F) -> SendResult {
        with_ring!(self, ring => ring.send(frames))
    }

    /// Interrupts the guest if it wants that for what was published since the last time. Once after a burst.
    pub fn notify(&self) {
        if with_ring!(self, ring => ring.wants_call()) {
            self.call.signal();
        }
    }

    /// Whether the ring takes nothing any more.
    pub fn is_stopped(&self) -> bool {
        with_ring!(self, ring => ring.is_stopped())
    }

    /// Refuses new frames, waits until those under way are published, and leaves the position for the next start.
    /// False if a worker did not finish within seconds.
    pub fn stop(&self) -> bool {
        let (base, finished) = with_ring!(self, ring => ring.stop());
        self.base.set(base);
        finished
    }
}
