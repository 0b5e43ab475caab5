//! A queue of received frames: one end is filled by whoever has the NIC's lock, the other one emptied by the queue's worker.

use super::card::{Card, MIN_LEN};
use crate::virtio::{Burst, Frame, MAX_BURST, Mapping, NetHeader, next_ring_id};
use crate::xdp::Umem;
use rtrb::{Consumer, Producer, RingBuffer};
use rustix::event::{EventfdFlags, eventfd};
use rustix::fd::OwnedFd;
use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering, fence};

/// Frames that a port's queue holds: all that may come while its worker is busy elsewhere.
pub(super) const FRAMES: usize = 256;

/// Wakes a worker that sleeps although it has the queue of a port.
pub(super) struct Bell {
    armed: AtomicBool,
    event: Arc<OwnedFd>,
}

impl Bell {
    fn new() -> io::Result<Bell> {
        let event = eventfd(0, EventfdFlags::NONBLOCK | EventfdFlags::CLOEXEC)?;
        Ok(Bell { armed: AtomicBool::new(false), event: Arc::new(event) })
    }

    pub(super) fn is_armed(&self) -> bool {
        self.armed.load(Ordering::Relaxed)
    }

    /// Wakes who has armed it, once.
    pub(super) fn ring(&self) {
        // Behind whatever it is rung for: the sleeper arms it, then looks once more.
        fence(Ordering::SeqCst);
        if self.is_armed() && self.armed.swap(false, Ordering::AcqRel) {
            signal(&self.event);
        }
    }
}

/// A number for the thread that asks, unlike that of any other. Not 0.
pub(super) fn this_thread() -> u64 {
    static NEXT: AtomicU64 = AtomicU64::new(1);
    thread_local!(static NUMBER: u64 = NEXT.fetch_add(1, Ordering::Relaxed));
    NUMBER.with(|number| *number)
}

/// Makes an eventfd readable.
pub(super) fn signal(event: &OwnedFd) {
    // One whose count is full says all that there is to say.
    let _ = rustix::io::write(event, &1u64.to_ne_bytes());
}

/// What is counted of a port between the NIC and its queue.
#[derive(Default)]
pub(super) struct Tally {
    /// Frames for which the queue had no room.
    pub(super) overrun: AtomicU64,
    /// Frames that the NIC has taken to be sent.
    pub(super) taken: AtomicU64,
}

/// Where frames of a queue go in.
pub(super) struct Inlet {
    memory: Arc<Umem>,
    free: Consumer<u64>,
    filled: Producer<(u64, u32)>,
    pub(super) bell: Arc<Bell>,
    tally: Arc<Tally>,
    /// Number of its worker's thread; 0 while it has none.
    pub(super) owner: Arc<AtomicU64>,
    /// Something was put in that its worker was not told of.
    pub(super) fresh: bool,
}

impl Inlet {
    /// Copies a frame into the queue, or counts that there was no room.
    pub(super) fn put(&mut self, frame: &[u8]) {
        let len = frame.len() as u32;
        let fits = frame.len() <= self.memory.frame_size() as usize && !frame.is_empty();
        let place = if fits { self.free.pop().ok() } else { None };
        let Some(addr) = place else {
            self.tally.overrun.fetch_add(1, Ordering::Relaxed);
            return;
        };
        let whole =
            Frame { header: NetHeader::EMPTY, head: frame, body: &[], tail: &[], tail_offset: 0, len };
        self.memory.write(&whole, std::iter::once((addr, len)));
        // The queue has room for all frames that there are.
        let pushed = self.filled.push((addr, len));
        debug_assert!(pushed.is_ok());
        self.fresh = true;
    }
}

/// Both ends of a queue for frames of at most `longest` bytes.
pub(super) fn queue(card: &Arc<Card>, longest: usize, tally: &Arc<Tally>) -> io::Result<(Inlet, NicRx)> {
    let size = longest.max(MIN_LEN).next_power_of_two();
    let size = u32::try_from(size).map_err(|_| io::ErrorKind::InvalidInput)?;
    let memory = Arc::new(Umem::new(FRAMES as u32, size)?);
    let (mut give, free) = RingBuffer::new(FRAMES);
    for index in 0..FRAMES as u32 {
        // There is room for all.
        let _ = give.push(memory.frame(index));
    }
    let (fill, filled) = RingBuffer::new(FRAMES);
    let (bell, owner) = (Arc::new(Bell::new()?), Arc::<AtomicU64>::default());
    let inlet = Inlet {
        memory: memory.clone(),
        free,
        filled: fill,
        bell: bell.clone(),
        tally: tally.clone(),
        owner: owner.clone(),
        fresh: false,
    };
    let queue = NicRx {
        id: next_ring_id(),
        card: card.clone(),
        bell,
        owner,
        mapping: memory.clone(),
        memory,
        filled,
        free: give,
    };
    Ok((inlet, queue))
}

/// What a queue of a NIC's port has received, in its order. One owner at a time; it brings frames as a guest's transmit ring does.
pub struct NicRx {
    id: u64,
    card: Arc<Card>,
    bell: Arc<Bell>,
    owner: Arc<AtomicU64>,
    memory: Arc<Umem>,
    mapping: Arc<dyn Mapping>,
    filled: Consumer<(u64, u32)>,
    free: Producer<u64>,
}

impl NicRx {
    /// Unlike that of any other ring.
    pub fn id(&self) -> u64 {
        self.id
    }

    /// Whose it is from now on: the worker's that asks, or nobody's.
    pub(super) fn owned(&self, owned: bool) {
        self.owner.store(if owned { this_thread() } else { 0 }, Ordering::Relaxed);
    }

    /// Whether there is something to receive. If there is nothing, asks the NIC.
    #[inline(never)] // guests' rings are asked in the same place
    pub fn has_pending(&self) -> bool {
        if self.filled.is_empty() {
            self.card.pump();
        }
        !self.filled.is_empty()
    }

    /// Takes up to `max` frames (at most [`MAX_BURST`]) into `burst`, which is cleared first. Returns their number. Their
    /// headers are empty.
    pub fn receive(&mut self, burst: &mut Burst, max: usize) -> usize {
        if !self.has_pending() {
            burst.clear();
            return 0;
        }
        burst.begin(self.id, Arc::clone(&self.mapping));
        while burst.frames().len() < max.min(MAX_BURST)
            && let Ok(piece) = self.filled.pop()
        {
            let pushed = self.memory.push(burst, std::iter::once(piece));
            debug_assert!(pushed, "a burst has room for as many pieces as frames");
        }
        burst.frames().len()
    }

    /// Gives the buffers of `burst` back, and clears it. A burst of another ring is only cleared.
    pub fn complete(&mut self, burst: &mut Burst) {
        if burst.ring() == self.id {
            for frame in burst.pushed_segments().iter().filter_map(|seg| self.memory.frame_of(seg)) {
                let pushed = self.free.push(frame);
                debug_assert!(pushed.is_ok(), "there is room for all frames that there are");
            }
        }
        burst.clear();
    }

    /// Prepares for sleep. True: there is nothing to receive and the caller may sleep until the port's bell is rung. False:
    /// there is something, or it cannot be found out now.
    pub fn arm(&mut self) -> bool {
        self.bell.armed.store(true, Ordering::Relaxed);
        // Before the last look at the queue: who puts something in looks at the bell afterwards.
        fence(Ordering::SeqCst);
        self.card.arm() && self.filled.is_empty()
    }

    /// Ends what [`arm`](Self::arm) began.
    pub fn disarm(&mut self) {
        self.bell.armed.store(false, Ordering::Relaxed);
    }

    /// What becomes readable, once, when there is something; to be watched for edges while asleep.
    pub(crate) fn kick(&self) -> &Arc<OwnedFd> {
        &self.bell.event
    }

    /// Frames that have come and were not received.
    pub fn left(&self) -> u64 {
        self.filled.slots() as u64
    }
}
