//! Filling a guest's receive ring of either layout, by any number of workers: buffers are reserved under a spin lock, filled
//! outside of it, and published in the order of reservation.

use std::mem::MaybeUninit;
use std::sync::Arc;
use std::time::{Duration, Instant};

use virtio_bindings::virtio_net::VIRTIO_NET_F_MRG_RXBUF;

use super::dirty::DirtyLog;
use super::guest_rx::{Blocked, Frame, Frames, Long, SendResult};
use super::header::NetHeader;
use super::layout::{Direction, Layout};
use super::mem::{GuestRegions, Scatter, Seg};
use super::publication::{Books, Published};
use super::record;
use super::spin::SpinLock;
use super::{RingBase, RingConfig, RingError, header_len};

/// Chains reserved at a time.
const MAX_CHAINS: usize = record::MAX_ENTRIES;
/// Pieces reserved at a time. A frame that needs more is too big.
const MAX_PIECES: usize = 512;
/// Frames reserved at a time.
const MAX_FRAMES: usize = 64;
/// Cache lines of a larger frame that are asked for one frame ahead of the copy.
const BODY_LINES: usize = 14;
/// How many frames ahead.
const AHEAD: usize = 1;
/// Frames of no more than these bytes have no more lines than are asked for anyway.
const SMALL: u32 = 128;
/// How long a stop waits for reserved buffers to be filled.
const DRAIN_TIMEOUT: Duration = Duration::from_secs(2);

/// The header of a frame in one buffer that leaves nothing to do.
const SIMPLE_HEADER: [u8; NetHeader::LEN] = [0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1, 0];

struct State {
    /// The next position to take.
    next: u16,
    /// Places from there that may be taken, as far as is known.
    available: u16,
    /// What is taken, and of what the guest was notified.
    books: Books,
    /// The region that was hit last.
    hint: usize,
    stopped: bool,
}

/// A receive ring of layout `L`.
pub(super) struct Filling<L> {
    ring: L,
    header_len: u32,
    mergeable: bool,
    state: SpinLock<State>,
    published: Published,
}

/// Buffers reserved for some frames, outside of the lock.
struct Reservation {
    /// What gives back each chain, in ring order.
    entries: [MaybeUninit<u64>; MAX_CHAINS],
    /// The places of each chain, if there are any but `singles`.
    places: [MaybeUninit<u16>; MAX_CHAINS],
    chains: usize,
    pieces: [MaybeUninit<Seg>; MAX_PIECES],
    /// Leading frames that have one chain of one place and one piece each.
    singles: usize,
    /// Chains and pieces up to and including those of frame `i`, which is not among the `singles`.
    ends: [MaybeUninit<(u16, u16)>; MAX_FRAMES],
    frames: usize,
    /// Whether a frame among the `singles` is more than [`SMALL`].
    large: bool,
    /// The position to which the first chain is given back.
    first_used: u16,
}

impl Reservation {
    fn new() -> Self {
        // Arrays of `MaybeUninit` need no initialisation: 11 KiB that are not written for each burst.
        Reservation {
            entries: [const { MaybeUninit::uninit() }; MAX_CHAINS],
            places: [const { MaybeUninit::uninit() }; MAX_CHAINS],
            chains: 0,
            pieces: [const { MaybeUninit::uninit() }; MAX_PIECES],
            singles: 0,
            ends: [const { MaybeUninit::uninit() }; MAX_FRAMES],
            frames: 0,
            large: false,
            first_used: 0,
        }
    }

    /// The buffers of the `singles`.
    #[inline(always)]
    fn singles(&self) -> &[Seg] {
        // SAFETY: `reserve_singles` writes as many pieces as it sets `singles` to.
        unsafe { self.pieces[..self.singles].assume_init_ref() }
    }

    /// Chains and pieces before those of frame `i`.
    fn start(&self, i: usize) -> (u16, u16) {
        if i == self.singles { (i as u16, i as u16) } else { self.end(i - 1) }
    }

    fn end(&self, i: usize) -> (u16, u16) {
        assert!((self.singles..self.frames).contains(&i));
        // SAFETY: `reserve_rest` writes `ends[i]` before it sets `frames` to more than `i`.
        unsafe { self.ends[i].assume_init() }
    }

    /// How many chains frame `i` has.
    fn chains(&self, i: usize) -> u16 {
        self.end(i).0 - self.start(i).0
    }

    fn pieces(&self, i: usize) -> &[Seg] {
        let (from, to) = (self.start(i).1, self.end(i).1);
        // SAFETY: `reserve_rest` writes pieces in order, and sets `ends[i]` to no more than the number written.
        unsafe { self.pieces[usize::from(from)..usize::from(to)].assume_init_ref() }
    }

    /// Entries of all chains, and their places, as [`Layout::publish`] wants them.
    #[inline(always)]
    fn used(&self) -> (&[u64], &[u16]) {
        let with_places = if self.frames > self.singles { self.chains } else { 0 };
        // SAFETY: `chains` is no more than the number of entries written; `reserve_rest` writes the places of all chains, those
        // of the `singles` too, if it finds a frame.
        unsafe {
            (self.entries[..self.chains].assume_init_ref(), self.places[..with_places].assume_init_ref())
        }
    }
}

impl<L: Layout> Filling<L> {
    /// As [`GuestRx::new`](super::GuestRx::new).
    pub(super) fn new(
        regions: Arc<GuestRegions>,
        config: &RingConfig,
        base: &RingBase,
    ) -> Result<Self, RingError> {
        let mut ring = L::new(regions, config)?;
        let (next, used) = ring.start(config, base, Direction::ToGuest)?;
        ring.log_ring();
        Ok(Filling {
            header_len: header_len(config.features),
            mergeable: config.has(VIRTIO_NET_F_MRG_RXBUF),
            state: SpinLock::new(State {
                next,
                available: 0,
                books: Books::new(used),
                hint: 0,
                stopped: false,
            }),
            published: Published::new(used),
            ring,
        })
    }

    #[inline]
    pub(super) fn send<F: Frames + ?Sized>(&self, frames: &F) -> SendResult {
        let mut sent = 0;
        let mut reserved = Reservation::new();
        while sent < frames.count() {
            let blocked = self.reserve(frames, sent, &mut reserved);
            self.fill(frames, sent, &reserved);
            sent += reserved.frames;
            if blocked.is_some() {
                return SendResult { sent, blocked };
            }
        }
        SendResult { sent, blocked: None }
    }

    /// Takes buffers for as many frames as possible, from frame `from` on, and asks for their memory. `None` if nothing
    /// blocks but the size of the reservation.
    #[inline(always)]
    fn reserve<F: Frames + ?Sized>(&self, frames: &F, from: usize, r: &mut Reservation) -> Option<Blocked> {
        let mut state = self.state.lock();
        let state = &mut *state;
        (r.frames, r.singles, r.chains, r.first_used) = (0, 0, 0, state.books.used());
        if state.stopped {
            return Some(Blocked::Stopped);
        }
        let wanted = (frames.count() - from).min(MAX_FRAMES);
        self.reserve_singles(frames, from, wanted, state, r);
        if r.frames == wanted { None } else { self.reserve_rest(frames, from, wanted, state, r) }
    }

    /// How many places may be taken.
    #[inline]
    fn available(&self, state: &State) -> Result<u16, RingError> {
        let in_flight = self.ring.places(self.published.position(), state.books.used());
        self.ring.available(state.next, in_flight)
    }

    /// Takes so many places off the ring, which are available.
    #[inline(always)]
    fn take(&self, state: &mut State, places: u16) {
        state.next = self.ring.advance(state.next, places);
        state.available -= places;
        state.books.take(&self.ring, places);
    }

    /// As long as each frame finds what nearly all drivers offer: a buffer of one descriptor that takes it.
    #[inline(never)] // with registers of its own
    fn reserve_singles<F: Frames + ?Sized>(
        &self,
        frames: &F,
        from: usize,
        wanted: usize,
        state: &mut State,
        r: &mut Reservation,
    ) {
        if usize::from(state.available) < wanted
            && let Ok(available) = self.available(state)
        {
            state.available = available; // what is wrong with it is found by whoever needs more
        }
        let n = wanted.min(state.available.into()).min(MAX_FRAMES);
        let mut memory = self.ring.regions().translator(state.hint);
        let header_len = u64::from(self.header_len);
        let mut longest = 0;
        let taken = self.ring.singles(state.next, n as u16, Direction::ToGuest, |i, buffer| {
            let need = header_len + u64::from(frames.len(from + i));
            if u64::from(buffer.len) < need {
                return false;
            }
            // Not empty, as there is a header in what it has to take.
            let Some(seg) = memory.translate_some(buffer.addr, buffer.len) else { return false };
            seg.prefetch_head_for_write();
            // No more than `MAX_FRAMES` are asked for; this says so without a branch.
            let i = i % MAX_FRAMES;
            r.pieces[i].write(seg);
            r.entries[i].write(L::entry(Direction::ToGuest, buffer.id, need as u32));
            longest |= need; // or a little more
            true
        });
        state.hint = memory.hint;
        self.take(state, taken);
        let taken = usize::from(taken);
        (r.frames, r.singles, r.chains) = (taken, taken, taken);
        r.large = longest > header_len + u64::from(SMALL);
    }

    /// The general way, for frames or buffers in pieces.
    #[inline(never)]
    fn reserve_rest<F: Frames + ?Sized>(
        &self,
        frames: &F,
        from: usize,
        wanted: usize,
        state: &mut State,
        r: &mut Reservation,
    ) -> Option<Blocked> {
        r.places[..r.singles].fill(MaybeUninit::new(1));
        let (mut chains, mut pieces) = (r.singles, r.singles);
        while r.frames < wanted {
            let pieces_before = pieces;
            match self.reserve_frame(frames.len(from + r.frames), state, r, &mut chains, &mut pieces) {
                Ok(places) => {
                    r.ends[r.frames].write((chains as u16, pieces as u16));
                    r.frames += 1;
                    r.chains = chains;
                    self.take(state, places);
                }
                // The reservation is full of the frames before this one: what is there goes first.
                Err(Blocked::TooBig) if pieces_before > 0 => break,
                Err(blocked) => {
                    state.stopped |= matches!(blocked, Blocked::Fault(_));
                    return Some(blocked);
                }
            }
        }
        None
    }

    /// Finds buffers for one frame of `len` bytes. Gives their places, which the caller then takes off the ring.
    fn reserve_frame(
        &self,
        len: u32,
        state: &mut State,
        r: &mut Reservation,
        chains: &mut usize,
        pieces: &mut usize,
    ) -> Result<u16, Blocked> {
        let need = self.header_len.saturating_add(len);
        let (mut have, mut taken) = (0, 0);
        while have < need {
            if taken > 0 && !self.mergeable || *chains == MAX_CHAINS {
                return Err(Blocked::TooBig);
            }
            let missing = if taken == self.ring.size() { Blocked::TooBig } else { Blocked::Full };
            if taken >= state.available {
                state.available = self.available(state).map_err(Blocked::Fault)?;
                if taken >= state.available {
                    return Err(missing);
                }
            }
            let at = self.ring.advance(state.next, taken);
            let (pieces_before, mut full) = (*pieces, false);
            let chain = loop {
                let room = state.available - taken;
                let chain =
                    self.ring.chain(at, room, Direction::ToGuest, need - have, &mut state.hint, |seg| {
                        if *pieces == MAX_PIECES {
                            full = true;
                            return Err(RingError::TooLong);
                        }
                        seg.prefetch_head_for_write();
                        r.pieces[*pieces].write(seg);
                        *pieces += 1;
                        Ok(())
                    });
                let chain = chain.map_err(|e| if full { Blocked::TooBig } else { Blocked::Fault(e) })?;
                if chain.is_some() {
                    break chain;
                }
                // It may need more places than were known to be there.
                let available = self.available(state).map_err(Blocked::Fault)?;
                if available <= state.available {
                    break None;
                }
                (state.available, *pieces) = (available, pieces_before);
            };
            let chain = chain.ok_or(missing)?;
            let len = chain.len.min(need - have);
            r.entries[*chains].write(L::entry(Direction::ToGuest, chain.id, len));
            r.places[*chains].write(chain.places);
            *chains += 1;
            taken += chain.places;
            have += len;
        }
        Ok(taken)
    }

    /// Copies the reserved frames, from frame `from` on, into their buffers and publishes them, when all reserved before
    /// have been.
    #[inline(always)]
    fn fill<F: Frames + ?Sized>(&self, frames: &F, from: usize, r: &Reservation) {
        let (entries, places) = r.used();
        if entries.is_empty() {
            return;
        }
        self.fill_singles(frames, from, r);
        if r.singles < r.frames {
            self.fill_rest(frames, from, r);
        }
        self.published.await_turn(r.first_used);
        if let Some(log) = self.ring.regions().log() {
            self.log_frames(log, frames, from, r);
        }
        let after = self.ring.publish(r.first_used, entries, places);
        self.ring.log_ring();
        self.published.pass_on(after);
    }

    /// Those that have a buffer of one piece each.
    #[inline(never)]
    fn fill_singles<F: Frames + ?Sized>(&self, frames: &F, from: usize, r: &Reservation) {
        if r.large {
            return self.fill_large(frames, from, r.singles());
        }
        let simple_len = self.header_len as usize == NetHeader::LEN;
        for (i, seg) in r.singles().iter().enumerate() {
            match frames.simple(from + i) {
                Some(bytes) if simple_len && seg.put_both(&SIMPLE_HEADER, bytes) => {}
                _ => frames.frame(from + i).write(seg, self.header_len),
            }
        }
    }

    /// The same where some are large: the lines of each are asked for ahead of its copy.
    #[inline(never)]
    fn fill_large<F: Frames + ?Sized>(&self, frames: &F, from: usize, buffers: &[Seg]) {
        let simple_len = self.header_len as usize == NetHeader::LEN;
        let ask = |i: usize| {
            let Some(buffer) = buffers.get(i) else { return };
            if frames.len(from + i) <= SMALL {
                return;
            }
            match frames.long(from + i) {
                Some(Long { tail, tail_offset, .. }) if tail_offset < tail.len() => {
                    tail.skip(tail_offset).prefetch_read(BODY_LINES);
                    buffer.prefetch_write(BODY_LINES);
                }
                _ => prefetch_body(&frames.frame(from + i), std::slice::from_ref(buffer)),
            }
        };
        (0..AHEAD).for_each(ask);
        for (i, buffer) in buffers.iter().enumerate() {
            ask(i + AHEAD);
            let done = simple_len
                && frames.long(from + i).is_some_and(|Long { head, tail, tail_offset }| {
                    buffer.put_long(&SIMPLE_HEADER, head, tail, tail_offset)
                });
            if !done {
                frames.frame(from + i).write(buffer, self.header_len);
            }
        }
    }

    /// The general way, for what [`reserve_rest`](Self::reserve_rest) has found.
    #[inline(never)]
    fn fill_rest<F: Frames + ?Sized>(&self, frames: &F, from: usize, r: &Reservation) {
        for i in r.singles..r.frames {
            let frame = frames.frame(from + i);
            if i + 1 < r.frames && frames.len(from + i + 1) > SMALL {
                prefetch_body(&frames.frame(from + i + 1), r.pieces(i + 1));
            }
            let header = NetHeader { num_buffers: r.chains(i), ..frame.header };
            let mut out = Scatter::new(r.pieces(i));
            out.put_bytes(&header.to_bytes()[..self.header_len as usize]);
            frame.put(&mut out);
        }
    }

    /// Notes what was written into the buffers.
    #[inline(never)] // while a guest migrates
    fn log_frames<F: Frames + ?Sized>(&self, log: &DirtyLog, frames: &F, from: usize, r: &Reservation) {
        let regions = self.ring.regions();
        for i in 0..r.frames {
            let mut left = self.header_len.saturating_add(frames.len(from + i));
            let pieces = if i < r.singles { &r.singles()[i..=i] } else { r.pieces(i) };
            for piece in pieces {
                regions.wrote(log, piece, left);
                left = left.saturating_sub(piece.len());
            }
        }
    }

    /// Whether the guest is to be interrupted for what was published since the last time.
    pub(super) fn wants_call(&self) -> bool {
        let published = self.state.lock().books.settle(&self.ring, &self.published);
        published.is_some_and(|published| self.ring.wants_call(published))
    }

    pub(super) fn is_stopped(&self) -> bool {
        self.state.lock().stopped
    }

    /// Gives the position for the next start, and whether all that was reserved is published.
    pub(super) fn stop(&self) -> (u16, bool) {
        let (next, used) = {
            let mut state = self.state.lock();
            state.stopped = true;
            (state.next, state.books.used())
        };
        let deadline = Instant::now() + DRAIN_TIMEOUT;
        while self.published.position() != used {
            if Instant::now() > deadline {
                return (next, false);
            }
            std::thread::sleep(Duration::from_micros(50));
        }
        (next, true)
    }
}

/// Asks for the body of a larger frame, both sides.
#[inline]
fn prefetch_body(frame: &Frame<'_>, dst: &[Seg]) {
    let mut skip = frame.tail_offset;
    for seg in frame.tail {
        if skip < seg.len() {
            seg.skip(skip).prefetch_read(BODY_LINES);
            break;
        }
        skip -= seg.len();
    }
    if let Some(seg) = dst.iter().find(|s| s.len() > SMALL) {
        seg.prefetch_write(BODY_LINES);
    }
}
