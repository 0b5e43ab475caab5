//! A guest's receive ring, which we fill.

use std::cell::UnsafeCell;
use std::mem::MaybeUninit;
use std::ops::{Deref, DerefMut};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU16, Ordering};
use std::time::{Duration, Instant};

use virtio_bindings::virtio_net::VIRTIO_NET_F_MRG_RXBUF;

use super::header::NetHeader;
use super::mem::{GuestRegions, Scatter, Seg};
use super::notify::Call;
use super::split::{Direction, SplitRing};
use super::{RingBase, RingConfig, RingError, header_len};

/// Chains reserved at a time.
const MAX_CHAINS: usize = 256;
/// Pieces reserved at a time. A frame that needs more is too big.
const MAX_PIECES: usize = 512;
/// Frames reserved at a time.
const MAX_FRAMES: usize = 64;
/// Descriptors are asked for this many chains ahead.
const LOOK_AHEAD: u16 = 8;
/// Cache lines of a frame that are asked for when its buffers are reserved.
const HEAD_LINES: usize = 2;
/// Cache lines of a larger frame that are asked for one frame ahead of the copy.
const BODY_LINES: usize = 14;
/// Frames of no more than these bytes have no more lines than are asked for anyway.
const SMALL: u32 = 128;
/// How long a stop waits for reserved buffers to be filled.
const DRAIN_TIMEOUT: Duration = Duration::from_secs(2);

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
    fn write(&self, seg: &Seg, header_len: u32) {
        let header = NetHeader { num_buffers: 1, ..self.header }.to_bytes();
        let mut out = Scatter::new(std::slice::from_ref(seg));
        out.put_bytes(&header[..header_len as usize]);
        self.put(&mut out);
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
}

/// The header of a frame in one buffer that leaves nothing to do.
const SIMPLE_HEADER: [u8; NetHeader::LEN] = [0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1, 0];

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

struct State {
    /// The next position of the available ring to take.
    next_avail: u16,
    /// Chains known to be available from there.
    available: u16,
    /// The next position of the used ring to reserve.
    next_used: u16,
    /// The used index up to which the guest was notified.
    notified: u16,
    /// The region that was hit last.
    hint: usize,
    stopped: bool,
}

impl State {
    /// Takes `n` chains off the ring, which are available.
    #[inline(always)]
    fn take(&mut self, n: u16) {
        self.next_avail = self.next_avail.wrapping_add(n);
        self.next_used = self.next_used.wrapping_add(n);
        self.available -= n;
    }
}

/// A guest's receive ring, shared by all workers that send to it.
pub struct GuestRx {
    ring: SplitRing,
    features: u64,
    header_len: u32,
    mergeable: bool,
    state: SpinLock<State>,
    /// The used index as published. Only who reserved from here on may write it.
    published: AtomicU16,
    call: Arc<Call>,
    base: Arc<RingBase>,
}

/// Buffers reserved for some frames, outside of the lock.
struct Reservation {
    /// `(head, bytes of it)`, in ring order.
    chains: [MaybeUninit<(u16, u32)>; MAX_CHAINS],
    pieces: [MaybeUninit<Seg>; MAX_PIECES],
    /// Leading frames that have one chain of one piece each, as many of both as frames.
    singles: usize,
    /// Chains and pieces up to and including those of frame `i`, which is not among the `singles`.
    ends: [(u16, u16); MAX_FRAMES],
    frames: usize,
    /// The position in the used ring of the first chain.
    first_used: u16,
}

impl Reservation {
    fn new() -> Self {
        // Arrays of `MaybeUninit` need no initialisation: 12 KiB that are not written for each burst.
        Reservation {
            chains: [const { MaybeUninit::uninit() }; MAX_CHAINS],
            pieces: [const { MaybeUninit::uninit() }; MAX_PIECES],
            singles: 0,
            ends: [(0, 0); MAX_FRAMES],
            frames: 0,
            first_used: 0,
        }
    }

    /// Head, bytes and buffer of one of the `singles`.
    #[inline(always)]
    fn single(&self, i: usize) -> (u16, u32, &Seg) {
        assert!(i < self.singles);
        // SAFETY: `reserve_singles` writes chain and piece `i` before it sets `singles` to more than `i`.
        unsafe {
            let (head, len) = self.chains[i].assume_init_read();
            (head, len, self.pieces[i].assume_init_ref())
        }
    }

    /// Chains and pieces before those of frame `i`.
    fn start(&self, i: usize) -> (u16, u16) {
        if i == self.singles { (i as u16, i as u16) } else { self.ends[i - 1] }
    }

    fn chains(&self, i: usize) -> &[(u16, u32)] {
        let (from, to) = (self.start(i).0, self.ends[i].0);
        // SAFETY: `reserve` writes chains in order, and sets `ends[i]` to no more than the number written.
        unsafe { self.chains[usize::from(from)..usize::from(to)].assume_init_ref() }
    }

    fn pieces(&self, i: usize) -> &[Seg] {
        let (from, to) = (self.start(i).1, self.ends[i].1);
        // SAFETY: as for chains.
        unsafe { self.pieces[usize::from(from)..usize::from(to)].assume_init_ref() }
    }
}

impl GuestRx {
    /// Starts the ring at position `base`.
    ///
    /// # Errors
    /// [`RingError::Size`], [`RingError::Layout`].
    pub fn new(
        regions: Arc<GuestRegions>,
        config: &RingConfig,
        call: Arc<Call>,
        base: Arc<RingBase>,
    ) -> Result<Self, RingError> {
        let ring = SplitRing::new(regions, config)?;
        let next_avail = base.get();
        let used = ring.used_index();
        ring.start(next_avail);
        Ok(GuestRx {
            features: config.features,
            header_len: header_len(config.features),
            mergeable: config.has(VIRTIO_NET_F_MRG_RXBUF),
            state: SpinLock::new(State {
                next_avail,
                available: 0,
                next_used: used,
                notified: used,
                hint: 0,
                stopped: false,
            }),
            published: AtomicU16::new(used),
            ring,
            call,
            base,
        })
    }

    /// The virtio features that the ring's driver has negotiated.
    pub fn features(&self) -> u64 {
        self.features
    }

    /// Puts frames into the ring, in order, until one does not go in. The guest sees them when this returns, but is
    /// not [notified](Self::notify) yet.
    #[inline]
    pub fn send<F: Frames + ?Sized>(&self, frames: &F) -> SendResult {
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
        (r.frames, r.singles, r.first_used) = (0, 0, state.next_used);
        if state.stopped {
            return Some(Blocked::Stopped);
        }
        let wanted = (frames.count() - from).min(MAX_FRAMES);
        self.reserve_singles(frames, from, wanted, state, r);
        if r.frames == wanted { None } else { self.reserve_rest(frames, from, wanted, state, r) }
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
            && let Ok(available) = self.ring.available(state.next_avail)
        {
            state.available = available; // what is wrong with it is found by whoever needs more
        }
        let n = wanted.min(state.available.into()).min(MAX_FRAMES);
        let (mut memory, mut i) = (self.ring.regions.translator(state.hint), 0);
        while i < n {
            let at = state.next_avail.wrapping_add(i as u16);
            self.ring.prefetch_head(at.wrapping_add(LOOK_AHEAD));
            let need = self.header_len.saturating_add(frames.len(from + i));
            let Ok(head) = self.ring.head(at) else { break };
            let Some(seg) = self.ring.single_writable(head, need, &mut memory) else { break };
            seg.prefetch_write(HEAD_LINES);
            r.pieces[i].write(seg);
            r.chains[i].write((head, need));
            i += 1;
        }
        state.hint = memory.hint;
        state.take(i as u16);
        (r.frames, r.singles) = (i, i);
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
        let (mut chains, mut pieces) = (r.singles, r.singles);
        while r.frames < wanted {
            let (chains_before, pieces_before) = (chains, pieces);
            match self.reserve_frame(frames.len(from + r.frames), state, r, &mut chains, &mut pieces) {
                Ok(()) => {
                    r.ends[r.frames] = (chains as u16, pieces as u16);
                    r.frames += 1;
                    state.take((chains - chains_before) as u16);
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

    /// Finds buffers for one frame of `len` bytes, which the caller then takes off the ring.
    fn reserve_frame(
        &self,
        len: u32,
        state: &mut State,
        r: &mut Reservation,
        chains: &mut usize,
        pieces: &mut usize,
    ) -> Result<(), Blocked> {
        let need = self.header_len.saturating_add(len);
        let (mut have, mut taken) = (0, 0);
        while have < need {
            if taken > 0 && !self.mergeable || *chains == MAX_CHAINS {
                return Err(Blocked::TooBig);
            }
            if taken == state.available {
                state.available = self.ring.available(state.next_avail).map_err(Blocked::Fault)?;
                if taken == state.available {
                    return Err(if taken == self.ring.size() { Blocked::TooBig } else { Blocked::Full });
                }
            }
            let at = state.next_avail.wrapping_add(taken);
            self.ring.prefetch_head(at.wrapping_add(LOOK_AHEAD));
            let head = self.ring.head(at).map_err(Blocked::Fault)?;
            let mut full = false;
            let walked = self.ring.walk(head, Direction::ToGuest, need - have, &mut state.hint, |seg| {
                if *pieces == MAX_PIECES {
                    full = true;
                    return Err(RingError::TooLong);
                }
                seg.prefetch_write(HEAD_LINES);
                r.pieces[*pieces].write(seg);
                *pieces += 1;
                Ok(())
            });
            let len =
                walked.map_err(|e| if full { Blocked::TooBig } else { Blocked::Fault(e) })?.min(need - have);
            r.chains[*chains].write((head, len));
            *chains += 1;
            taken += 1;
            have += len;
        }
        Ok(())
    }

    /// Copies the reserved frames, from frame `from` on, into their buffers and publishes them, when all reserved before
    /// have been.
    #[inline(always)]
    fn fill<F: Frames + ?Sized>(&self, frames: &F, from: usize, r: &Reservation) {
        if r.frames == 0 {
            return;
        }
        self.fill_singles(frames, from, r);
        let mut at = r.first_used.wrapping_add(r.singles as u16);
        if r.singles < r.frames {
            self.fill_rest(frames, from, r, &mut at);
        }
        let mut spins = Spins::default();
        // Acquire: what the workers before us wrote comes before our index, which covers it.
        while self.published.load(Ordering::Acquire) != r.first_used {
            spins.wait();
        }
        self.ring.publish_used(at);
        self.published.store(at, Ordering::Release);
    }

    /// Those that have a buffer of one piece each.
    #[inline(never)]
    fn fill_singles<F: Frames + ?Sized>(&self, frames: &F, from: usize, r: &Reservation) {
        let simple_len = self.header_len as usize == NetHeader::LEN;
        for i in 0..r.singles {
            let (head, len, seg) = r.single(i);
            if i + 1 < r.singles && frames.len(from + i + 1) > SMALL {
                prefetch_body(&frames.frame(from + i + 1), std::slice::from_ref(r.single(i + 1).2));
            }
            match frames.simple(from + i) {
                Some(bytes) if simple_len && seg.put_both(&SIMPLE_HEADER, bytes) => {}
                _ => frames.frame(from + i).write(seg, self.header_len),
            }
            self.ring.write_used(r.first_used.wrapping_add(i as u16), head, len);
        }
    }

    /// The general way, for what [`reserve_rest`](Self::reserve_rest) has found. `at` is the place in the used ring.
    #[inline(never)]
    fn fill_rest<F: Frames + ?Sized>(&self, frames: &F, from: usize, r: &Reservation, at: &mut u16) {
        for i in r.singles..r.frames {
            let frame = frames.frame(from + i);
            if i + 1 < r.frames && frames.len(from + i + 1) > SMALL {
                prefetch_body(&frames.frame(from + i + 1), r.pieces(i + 1));
            }
            let chains = r.chains(i);
            let header = NetHeader { num_buffers: chains.len() as u16, ..frame.header };
            let mut out = Scatter::new(r.pieces(i));
            out.put_bytes(&header.to_bytes()[..self.header_len as usize]);
            frame.put(&mut out);
            for &(head, len) in chains {
                self.ring.write_used(*at, head, len);
                *at = at.wrapping_add(1);
            }
        }
    }

    /// Interrupts the guest if it wants that for what was published since the last time. Once after a burst.
    pub fn notify(&self) {
        let (old, new) = {
            let mut state = self.state.lock();
            let new = self.published.load(Ordering::Acquire);
            (std::mem::replace(&mut state.notified, new), new)
        };
        if old != new && self.ring.wants_call(old, new) {
            self.call.signal();
        }
    }

    /// Whether the ring takes nothing any more.
    pub fn is_stopped(&self) -> bool {
        self.state.lock().stopped
    }

    /// Refuses new frames, waits until those under way are published, and leaves the position for the next start.
    /// False if a worker did not finish within seconds.
    pub fn stop(&self) -> bool {
        let (next_avail, next_used) = {
            let mut state = self.state.lock();
            state.stopped = true;
            (state.next_avail, state.next_used)
        };
        self.base.set(next_avail);
        let deadline = Instant::now() + DRAIN_TIMEOUT;
        while self.published.load(Ordering::Acquire) != next_used {
            if Instant::now() > deadline {
                return false;
            }
            std::thread::sleep(Duration::from_micros(50));
        }
        true
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

/// Waiting for another worker's few instructions: spins, and lets it run if it lost its processor.
#[derive(Default)]
struct Spins(u32);

impl Spins {
    #[inline]
    fn wait(&mut self) {
        self.0 += 1;
        if self.0.is_multiple_of(128) {
            std::thread::yield_now();
        } else {
            std::hint::spin_loop();
        }
    }
}

/// A lock that is held for well under a microsecond.
pub(crate) struct SpinLock<T> {
    locked: AtomicBool,
    value: UnsafeCell<T>,
}

// SAFETY: `value` is only reached through a guard, of which there is one at a time.
unsafe impl<T: Send> Sync for SpinLock<T> {}

impl<T> SpinLock<T> {
    pub(crate) fn new(value: T) -> Self {
        SpinLock { locked: AtomicBool::new(false), value: UnsafeCell::new(value) }
    }

    #[inline]
    pub(crate) fn lock(&self) -> SpinGuard<'_, T> {
        let mut spins = Spins::default();
        while self.locked.compare_exchange_weak(false, true, Ordering::Acquire, Ordering::Relaxed).is_err() {
            while self.locked.load(Ordering::Relaxed) {
                spins.wait();
            }
        }
        SpinGuard(self)
    }
}

pub(crate) struct SpinGuard<'a, T>(&'a SpinLock<T>);

impl<T> Deref for SpinGuard<'_, T> {
    type Target = T;
    fn deref(&self) -> &T {
        // SAFETY: the guard exists only while it alone holds the lock.
        unsafe { &*self.0.value.get() }
    }
}

impl<T> DerefMut for SpinGuard<'_, T> {
    fn deref_mut(&mut self) -> &mut T {
        // SAFETY: as above.
        unsafe { &mut *self.0.value.get() }
    }
}

impl<T> Drop for SpinGuard<'_, T> {
    fn drop(&mut self) {
        self.0.locked.store(false, Ordering::Release);
    }
}
