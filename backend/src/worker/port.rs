//! A port as one worker has it: the rings it polls, the rings it fills, and what waits for room in them.

use super::BURST;
use super::handover::Handover;
use super::rings::{Rings, RxRing, TxRing};
use crate::counters::PortCounters;
use crate::frames::pool::{LARGE, Pool};
use crate::host::path::{Budget, HeldPacket};
use std::collections::VecDeque;
use std::sync::Arc;
use std::sync::atomic::{AtomicU8, Ordering::Relaxed};
use switch_core::drop::DropReason;
use switch_core::packet::PortId;

/// What a port can owe, in quanta.
const MAX_DEBT: i64 = 100;

/// Packets that may wait for room in one receive ring.
pub const MAX_PARKED: usize = 128;

/// Large buffers that one port's packets may have on their way to the host.
const MAX_LARGE_AT_HOST: u32 = LARGE as u32 / 4;

/// A ring that packets come by and that this worker polls.
pub struct RxQueue {
    /// Index of the queue pair.
    pub index: usize,
    /// The ring while it runs.
    pub ring: Option<RxRing>,
    /// Packets taken at a time: fewer while they are expensive.
    pub batch: usize,
}

impl RxQueue {
    /// A queue whose ring does not run.
    pub(super) fn new(index: usize) -> RxQueue {
        RxQueue { index, ring: None, batch: BURST }
    }

    /// Adapts the batch to what the last one has cost.
    pub fn adapt(&mut self, cycles: u64, quantum: i64) {
        if cycles > quantum as u64 {
            self.batch = (self.batch / 2).max(1);
        } else if cycles < quantum as u64 / 2 {
            self.batch = (self.batch * 2).min(BURST);
        }
    }
}

/// A packet that waits for room in a receive ring.
pub struct Parked {
    /// Its bytes; the offload state in it is final.
    pub held: Box<HeldPacket>,
    /// It leaves cut to this length.
    pub max_len: u32,
    /// When it is given up, in cycles.
    pub deadline: u64,
    /// Whether it counts as the packet it came from: the last segment does, the others do not.
    pub counts: bool,
}

/// A ring that packets leave by, and the packets that wait for room in it.
#[derive(Default)]
pub struct TxQueue {
    /// The ring while it runs; other workers have it too.
    pub ring: Option<TxRing>,
    /// In order; while it is not empty nothing overtakes it.
    pub parked: VecDeque<Parked>,
    /// Something was published since the last notification, or that has to be repeated.
    pub notify: bool,
}

impl TxQueue {
    /// Gives up what waits for room, because the ring is gone. Gives its number.
    pub fn drop_parked(&mut self, counters: &PortCounters, pool: &mut Pool) -> usize {
        let count = self.parked.len();
        for parked in self.parked.drain(..) {
            counters.tx_drops.add(DropReason::LinkDown, parked.counts as u64);
            pool.put(parked.held);
        }
        count
    }
}

/// Which receive queue a flow's packets go to: the one whose transmit side the guest last used for it (virtio 1.2
/// §5.1.6.5.6.2, automatic receive steering), else a stable choice by hash. Shared by all workers.
pub struct Steering {
    queue_of: [AtomicU8; Self::BUCKETS],
}

impl Default for Steering {
    fn default() -> Self {
        Steering { queue_of: [const { AtomicU8::new(Self::UNKNOWN) }; Self::BUCKETS] }
    }
}

impl Steering {
    const BUCKETS: usize = 1024;
    const UNKNOWN: u8 = u8::MAX;

    /// The guest has sent a packet of the flow with this symmetric hash on `queue`.
    #[inline]
    pub fn note(&self, hash: u32, queue: usize) {
        let bucket = &self.queue_of[hash as usize % Self::BUCKETS];
        if bucket.load(Relaxed) != queue as u8 {
            bucket.store(queue as u8, Relaxed);
        }
    }

    /// The queue for a packet of the flow with this symmetric hash, of `queues` that run.
    #[inline]
    pub fn queue(&self, hash: u32, queues: usize) -> usize {
        let known = self.queue_of[hash as usize % Self::BUCKETS].load(Relaxed) as usize;
        if known < queues { known } else { hash as usize / Self::BUCKETS % queues.max(1) }
    }
}

/// Limits a rate: tokens come evenly and are kept for up to a tenth of a second.
pub struct Rate {
    per_second: i64,
    /// Thousandths of an event; fewer than none after many events at once.
    tokens: i64,
    filled: u64,
}

impl Rate {
    /// A full bucket for `per_second` events.
    pub fn new(per_second: u32) -> Rate {
        let per_second = per_second.into();
        Rate { per_second, tokens: Self::capacity(per_second), filled: 0 }
    }

    /// A bucket holds a tenth of a second's worth, and at least 16 events.
    fn capacity(per_second: i64) -> i64 {
        (per_second * 100).max(16_000)
    }

    /// Whether `count` events may happen at `now` (milliseconds): if one may, all may, and the next ones wait the longer.
    pub fn allow(&mut self, now: u64, count: u32) -> bool {
        let elapsed = now.saturating_sub(self.filled).min(1 << 32) as i64;
        let new = elapsed.saturating_mul(self.per_second);
        self.tokens = self.tokens.saturating_add(new).min(Self::capacity(self.per_second));
        self.filled = now;
        let allowed = self.tokens >= 1000;
        if allowed {
            self.tokens -= 1000 * i64::from(count);
        }
        allowed
    }
}

/// Everything that one worker knows about a port.
pub struct WorkerPort {
    /// Identity; a stale output is recognised by its generation.
    pub id: PortId,
    /// Name, for the log.
    pub name: Arc<str>,
    /// What says which rings there are.
    pub rings: Rings,
    /// This worker's counters of the port.
    pub counters: Arc<PortCounters>,
    /// Queues that this worker polls.
    pub rx: Vec<RxQueue>,
    /// Those of them that rest while one of them is handed over.
    pub(super) resting: Vec<RxQueue>,
    /// How a hand-over stands.
    pub handover: Arc<Handover>,
    /// Which of them is served next.
    pub turn: usize,
    /// Cycles that the port may still use in this round, or owes (deficit round-robin).
    pub deficit: i64,
    /// The last round in which it was looked at.
    round: u64,
    /// Where packets leave, by queue pair.
    pub tx: Vec<TxQueue>,
    /// Those that run, from the first on.
    pub tx_active: usize,
    /// Largest packet that leaves, without the link header.
    pub mtu: u32,
    /// Which receive queue a flow goes to.
    pub steering: Arc<Steering>,
    /// Packets of the port on their way to the host, by [`Budget`].
    pub at_host: [u32; 3],
    /// Those of them that have a large buffer.
    pub large_at_host: u32,
    /// Limit of the rate of misses.
    pub misses: Rate,
}

/// What makes a [`WorkerPort`].
pub struct NewPort {
    /// Identity.
    pub id: PortId,
    /// Name.
    pub name: Arc<str>,
    /// What says which rings there are.
    pub rings: Rings,
    /// Queue pairs of the port.
    pub queues: usize,
    /// Those whose transmit ring this worker polls.
    pub polled: Vec<usize>,
    /// MTU for the guest.
    pub mtu: u32,
    /// Misses a second.
    pub miss_rate: u32,
    /// Shared by all workers.
    pub steering: Arc<Steering>,
    /// Shared by all workers and control.
    pub handover: Arc<Handover>,
}

impl WorkerPort {
    /// Built by control, with all the memory that it will ever need.
    pub fn new(new: NewPort) -> WorkerPort {
        let tx = |_| TxQueue { parked: VecDeque::with_capacity(MAX_PARKED), ..TxQueue::default() };
        // Any of them may come to be polled here.
        let mut rx = Vec::with_capacity(new.queues);
        rx.extend(new.polled.iter().map(|&index| RxQueue::new(index)));
        WorkerPort {
            id: new.id,
            name: new.name,
            rings: new.rings,
            counters: Arc::default(),
            rx,
            resting: Vec::with_capacity(new.queues),
            handover: new.handover,
            turn: 0,
            deficit: 0,
            round: 0,
            tx: (0..new.queues).map(tx).collect(),
            tx_active: 0,
            mtu: new.mtu,
            steering: new.steering,
            at_host: [0; 3],
            large_at_host: 0,
            misses: Rate::new(new.miss_rate),
        }
    }

    /// Bytes that a port of so many queue pairs has in each worker, and those that all workers share.
    pub fn bytes(queues: usize) -> (usize, usize) {
        let queue = 2 * size_of::<RxQueue>() + size_of::<TxQueue>() + MAX_PARKED * size_of::<Parked>();
        let each = size_of::<WorkerPort>() + size_of::<PortCounters>() + queues * queue;
        (each, size_of::<Steering>() + size_of::<Handover>())
    }

    /// The queues that this worker polls, those that rest included.
    pub(super) fn queues(&self) -> impl Iterator<Item = &RxQueue> {
        self.rx.iter().chain(&self.resting)
    }

    /// Looks in round number `round` whether the port has something. Each round gives a port `quantum` cycles, however many queues it
    /// has, those that have passed without a look at it included. What it owes stays owed while it is idle, or it would be
    /// served for nothing whenever it comes back.
    #[inline(always)]
    pub fn begin_round(&mut self, round: u64, quantum: i64) -> bool {
        let has_work = self.rx.iter().filter_map(|rx| rx.ring.as_ref()).any(RxRing::has_pending);
        let before = std::mem::replace(&mut self.round, round);
        if has_work || self.deficit != 0 {
            let passed = round.wrapping_sub(before).min(MAX_DEBT as u64);
            let most = if has_work { quantum } else { 0 };
            self.deficit = (self.deficit + quantum * passed as i64).min(most);
        }
        has_work
    }

    /// Charges the port for what packets of a queue pair have cost, and counts it there. A debt is limited, for it may be the operating system's that ran something
    /// else meanwhile; hence the batches shrink before what they cost can exceed the limit.
    pub fn charge(&mut self, queue: usize, cycles: u64, quantum: i64) {
        if let Some(count) = self.counters.queue_cycles.get(queue) {
            count.add(cycles);
        }
        self.deficit = self.deficit.saturating_sub_unsigned(cycles).max(-MAX_DEBT * quantum);
    }

    /// Takes a place in the budget, if there is one, for a packet that needs a `large` buffer or not: there are so few
    /// of those that a single port's misses could take them all.
    pub fn reserve(&mut self, budget: Budget, large: bool) -> bool {
        let free = self.has_room(budget, large);
        if free {
            self.at_host[budget as usize] += 1;
            self.large_at_host += large as u32;
        }
        free
    }

    /// Whether there is a place in the budget.
    pub fn has_room(&self, budget: Budget, large: bool) -> bool {
        let free = self.at_host[budget as usize] < budget.limit();
        free && (!large || self.large_at_host < MAX_LARGE_AT_HOST)
    }

    /// Gives a place back.
    pub fn release(&mut self, budget: Budget, large: bool) {
        let out = &mut self.at_host[budget as usize];
        *out = out.saturating_sub(1);
        self.large_at_host = self.large_at_host.saturating_sub(large as u32);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_flow_returns_where_it_came_from() {
        let steering = Steering::default();
        assert!(steering.queue(12345, 4) < 4);
        steering.note(12345, 3);
        assert_eq!(steering.queue(12345, 4), 3);
        assert!(steering.queue(12345, 2) < 2, "a queue that the guest no longer runs is not used");
        assert_eq!(steering.queue(777, 1), 0);
    }

    #[test]
    fn a_rate_is_kept_and_bursts_are_small() {
        let mut rate = Rate::new(1000);
        let burst = (0..1000).filter(|_| rate.allow(5_000, 1)).count();
        assert_eq!(burst, 100);
        let second = (1..=1000).filter(|ms| rate.allow(5_000 + ms, 1) || rate.allow(5_000 + ms, 1)).count();
        assert_eq!(second, 1000);
        assert!(rate.allow(10_000, 600), "one may, so all may");
        let later = (10_001..=11_000).filter(|&ms| rate.allow(ms, 1)).count();
        assert_eq!(later, 500, "they are paid for by what comes later");
        assert!(!Rate { per_second: 0, tokens: 0, filled: 0 }.allow(1 << 40, 1));
    }
}
