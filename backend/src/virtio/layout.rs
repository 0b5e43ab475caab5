//! What the two layouts of a ring, [split](super::split) and [packed](super::packed), have in common for who uses them.
//!
//! Both are sequences of *places* that the guest fills in turn and that we give back in the same order. In a split ring a
//! place is an entry of the available ring, and later one of the used ring; in a packed ring it is a descriptor. A
//! *position* says where in the sequence one is; what its 16 bits mean is the layout's own affair.

use std::ptr;
use std::sync::Arc;

use virtio_bindings::virtio_ring::{VRING_DESC_F_INDIRECT, VRING_DESC_F_NEXT, VRING_DESC_F_WRITE};

use super::mem::{GuestRegions, Seg, prefetch_read};
use super::publication::Positions;
use super::{RingBase, RingConfig, RingError};

/// Bytes of a descriptor.
pub(super) const DESC_LEN: u32 = 16;
pub(super) const F_NEXT: u16 = VRING_DESC_F_NEXT as u16;
pub(super) const F_WRITE: u16 = VRING_DESC_F_WRITE as u16;
pub(super) const F_INDIRECT: u16 = VRING_DESC_F_INDIRECT as u16;

/// Which way the bytes of a ring's buffers go.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Direction {
    /// We read them: a guest's transmit ring.
    FromGuest,
    /// We write them: a guest's receive ring.
    ToGuest,
    /// We read the first part of each buffer, and this is it: a control queue.
    Command,
    /// We write the rest of it, and this is that.
    Reply,
}

impl Direction {
    /// The flag that each of its descriptors has, or each of this part.
    #[inline(always)]
    pub(super) fn flag(self) -> u16 {
        match self {
            Direction::FromGuest | Direction::Command => 0,
            Direction::ToGuest | Direction::Reply => F_WRITE,
        }
    }

    /// Whether a buffer has descriptors of the other direction beside, which are none of its business.
    #[inline(always)]
    pub(super) fn is_part(self) -> bool {
        matches!(self, Direction::Command | Direction::Reply)
    }
}

/// A buffer of one plain descriptor, as the guest describes it: a private copy, of which nothing is checked yet.
#[derive(Debug, Clone, Copy)]
pub(super) struct Single {
    /// By which it is given back.
    pub id: u16,
    /// Guest-physical.
    pub addr: u64,
    /// Bytes.
    pub len: u32,
}

/// A buffer in any number of pieces.
#[derive(Debug, Clone, Copy)]
pub(super) struct Chain {
    /// By which it is given back.
    pub id: u16,
    /// Places that it takes.
    pub places: u16,
    /// Bytes that were asked for, or all that it has.
    pub len: u32,
}

/// A ring by host pointers, which were checked once and never change.
///
/// Positions that are passed in come from [`start`](Self::start), [`advance`](Self::advance) and
/// [`retreat`](Self::retreat); numbers of places are no more than the ring's size.
pub(super) trait Layout: Positions + Sized {
    /// Resolves a ring's addresses.
    ///
    /// # Errors
    /// [`RingError::Size`], [`RingError::Layout`].
    fn new(regions: Arc<GuestRegions>, config: &RingConfig) -> Result<Self, RingError>;

    /// The memory that the ring and its buffers are in.
    fn regions(&self) -> &Arc<GuestRegions>;

    /// Notes that the parts of the ring were written that we write, if anybody wants to know: after each time that we did.
    fn log_ring(&self);

    /// Begins at position `base`, as the front-end says it, or where the ring's record says, and asks for no kicks. Gives
    /// the position that is taken next, and the one that is used next. What is to be passed behind it is left in `base`.
    ///
    /// # Errors
    /// [`RingError::Base`]: the ring cannot go on there.
    fn start(
        &mut self,
        config: &RingConfig,
        base: &RingBase,
        direction: Direction,
    ) -> Result<(u16, u16), RingError>;

    /// How many places from `next` on may be filled, `in_flight` before it having been taken and not given back.
    ///
    /// # Errors
    /// [`RingError::AvailIndex`].
    fn available(&self, next: u16, in_flight: u16) -> Result<u16, RingError>;

    /// Goes on behind a [`Gap`](super::record::Gap), whose end this is.
    fn pass(&self, to: u16);

    /// Whether there is something at `next`, be it an error.
    fn is_filled(&self, next: u16) -> bool;

    /// What gives a buffer of a ring of this direction back, when it is written to its place: its id, and the bytes that were
    /// written into it.
    fn entry(direction: Direction, id: u16, len: u32) -> u64;

    /// Shows the buffers from `next` on, no more than `n`, each with its number from 0 on, as long as each is one plain descriptor
    /// of a ring of this direction, and `each` takes it. Gives the number of those taken.
    fn singles(
        &self,
        next: u16,
        n: u16,
        direction: Direction,
        each: impl FnMut(usize, Single) -> bool,
    ) -> u16;

    /// Hands the pieces of the buffer at `next`, which takes no more than `available` places, to `sink`, until they hold
    /// `enough` bytes or there are no more. `None`: there is no whole buffer yet, whatever pieces were handed out.
    ///
    /// # Errors
    /// What the buffer does wrong; what `sink` returns.
    fn chain(
        &self,
        next: u16,
        available: u16,
        direction: Direction,
        enough: u32,
        hint: &mut usize,
        sink: impl FnMut(Seg) -> Result<(), RingError>,
    ) -> Result<Option<Chain>, RingError>;

    /// Asks for what [`chain`](Self::chain) reads first, of whatever is at `at`.
    fn prefetch_chain(&self, at: u16, hint: &mut usize);

    /// Gives buffers back, from position `at` on, whose turn it is: writes their entries, and shows all of them to the guest at once.
    /// `places`: how many the buffer of each takes; empty if all take one. Gives the position after them.
    fn publish(&self, at: u16, entries: &[u64], places: &[u16]) -> u16;

    /// As [`publish`](Self::publish), of buffers into which nothing was written.
    fn give_back(&self, at: u16, entries: &[u64], places: &[u16]) -> u16 {
        self.publish(at, entries, places)
    }

    /// Whether the guest wants to be interrupted, what is published having gone from the first to the second position.
    fn wants_call(&self, published: [u16; 2]) -> bool;

    /// Asks the guest for a kick at what comes at `next`. True if there is nothing yet, so that we may sleep.
    fn arm(&self, next: u16) -> bool;

    /// Asks the guest for no kicks.
    fn disarm(&self);
}

/// Descriptors in guest memory: a ring's, or an indirect table.
#[derive(Clone, Copy)]
pub(super) struct Table {
    pub(super) ptr: *const u8,
    /// Descriptors.
    pub(super) size: u32,
}

impl Table {
    /// The indirect table that a descriptor with these flags points to. Its own write flag is to be ignored (virtio 1.2,
    /// 2.7.5.3.2 and 2.8.7).
    ///
    /// # Errors
    /// [`RingError::Indirect`], [`RingError::Address`].
    pub(super) fn indirect(
        regions: &GuestRegions,
        addr: u64,
        len: u32,
        flags: u16,
        hint: &mut usize,
    ) -> Result<Table, RingError> {
        if flags & F_NEXT != 0 || len < DESC_LEN || !len.is_multiple_of(DESC_LEN) {
            return Err(RingError::Indirect);
        }
        let seg = regions.translate_hinted(addr, len, hint).ok_or(RingError::Address { addr, len })?;
        Ok(Table { ptr: seg.ptr(), size: len / DESC_LEN })
    }

    /// Copies descriptor `index`, which must be less than `size`, once.
    #[inline]
    pub(super) fn read(&self, index: u32) -> [u64; 2] {
        debug_assert!(index < self.size);
        let p = self.ptr.wrapping_add((index * DESC_LEN) as usize);
        if p.cast::<u64>().is_aligned() {
            // SAFETY: `index < size`, and a table is `size` descriptors of mapped guest memory; aligned as checked.
            return unsafe { read_aligned(p) };
        }
        let mut bytes = [0; DESC_LEN as usize];
        for (i, b) in bytes.iter_mut().enumerate() {
            // SAFETY: in bounds as above; single bytes are always aligned.
            *b = unsafe { ptr::read_volatile(p.wrapping_add(i)) };
        }
        let (a, b) = bytes.split_at(8);
        let word = |s: &[u8]| s.iter().rev().fold(0, |w, &b| w << 8 | u64::from(b));
        [word(a), word(b)]
    }
}

/// Copies a descriptor.
///
/// # Safety
/// `p` is aligned to 8 bytes, and 16 bytes of mapped memory are there.
#[inline(always)]
pub(super) unsafe fn read_aligned(p: *const u8) -> [u64; 2] {
    let p = p.cast::<u64>();
    // SAFETY: the caller's promise. Volatile: one read each, however often the guest writes.
    unsafe { [ptr::read_volatile(p), ptr::read_volatile(p.wrapping_add(1))] }
}

/// Asks for what a descriptor of one piece or of a table points to.
pub(super) fn prefetch_target(regions: &GuestRegions, addr: u64, hint: &mut usize) {
    if let Some(seg) = regions.translate_hinted(addr, 1, hint) {
        prefetch_read(seg.ptr());
    }
}
