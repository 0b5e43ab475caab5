//! Handing a queue over from one worker to another, without a packet of it overtaking another.
//!
//! A packet that a worker has taken is, at the end of its burst, in the ring that it leaves by, dropped, *parked* (waiting
//! for room in such a ring), or at the host, whose answer comes back to this worker. So the one that hands a queue over
//! lets the port's queues rest until nothing of the port is at the host any more, and until what was parked by then has
//! left or was given up, which takes as long as a packet is patient. Then the ring goes back to where rings come from
//! (`vhost::PortShared`, `wire::WireShared`), and control tells the other worker to take it. That command travels behind
//! every change of the tables that the first worker has applied: a flow known here is known there.
//!
//! Meanwhile packets wait in the guest's ring. A host that takes too long ends the attempt: the queue stays, as it was.

use super::io::Io;
use super::port::RxQueue;
use std::sync::atomic::{AtomicI64, AtomicU8, Ordering};
use switch_core::packet::PortId;

/// How long a port's queues rest for an answer of the host, in patiences of a parked packet: 20 ms.
const REST: u64 = 400;

/// How the hand-over of a queue of a port stands; one at a time. Shared by the workers and control.
#[derive(Default, Debug)]
pub struct Handover {
    stage: AtomicU8,
    /// What the port owes to the worker that has none of its queues any more, in cycles: 0 or less.
    debt: AtomicI64,
}

/// The stages of a hand-over.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[repr(u8)]
pub enum Stage {
    /// No queue is being handed over.
    Idle,
    /// The worker has not let go of it yet.
    Asked,
    /// Nobody has it.
    Free,
    /// The worker has kept it: it never had it, or the host took too long.
    Kept,
}

impl Handover {
    /// Begins; to be called by control before it asks a worker.
    pub fn begin(&self) {
        self.debt.store(0, Ordering::Relaxed);
        self.set(Stage::Asked);
    }

    /// Ends it, to be called by control when the worker has let go or has kept the queue; gives what the port owes.
    pub fn end(&self) -> i64 {
        self.set(Stage::Idle);
        self.debt.load(Ordering::Relaxed)
    }

    /// How it stands.
    pub fn stage(&self) -> Stage {
        match self.stage.load(Ordering::Acquire) {
            stage if stage == Stage::Asked as u8 => Stage::Asked,
            stage if stage == Stage::Free as u8 => Stage::Free,
            stage if stage == Stage::Kept as u8 => Stage::Kept,
            _ => Stage::Idle,
        }
    }

    fn set(&self, stage: Stage) {
        self.stage.store(stage as u8, Ordering::Release);
    }
}

/// A queue that a worker is to hand over.
pub(super) struct Leaving {
    /// The port.
    pub(super) port: PortId,
    /// Index of its queue pair.
    queue: usize,
    /// Whether something of the port was at the host when it was looked at last.
    at_host: bool,
    /// When that was so last, in cycles: what was parked later is of other ports.
    since: u64,
    /// When the attempt ends, in cycles.
    deadline: u64,
}

impl Io {
    /// Begins to hand over a queue.
    pub(super) fn release_queue(&mut self, id: PortId, queue: usize) {
        let (now, rest) = (self.now_cycles, REST * self.patience);
        let is_free = self.leaving.is_none();
        let Some(port) = self.port(id) else { return };
        if !is_free || !port.rx.iter().any(|rx| rx.index == queue) {
            return port.handover.set(Stage::Kept);
        }
        port.resting.append(&mut port.rx);
        port.turn = 0;
        self.leaving = Some(Leaving { port: id, queue, at_host: true, since: now, deadline: now + rest });
    }

    /// Goes on with that, once a round, after parked packets were tried again; whether something has changed.
    #[inline]
    pub(super) fn let_go(&mut self) -> bool {
        self.leaving.is_some() && self.try_to_let_go()
    }

    #[cold]
    fn try_to_let_go(&mut self) -> bool {
        let (now, patience, is_parked) = (self.now_cycles, self.patience, self.parked > 0);
        // Its port is there: it goes with it.
        let Some(Leaving { port: id, queue, at_host, since, deadline }) = &mut self.leaving else {
            return false;
        };
        let Some(port) = self.ports[id.slot as usize].as_deref_mut() else { return false };
        let (queue, deadline) = (*queue, *deadline);
        let is_at_host = port.at_host.iter().any(|&packets| packets > 0);
        // The last answer, too, may have left something parked.
        if std::mem::replace(at_host, is_at_host) {
            *since = now;
        }
        let is_waiting = is_at_host || is_parked && now.wrapping_sub(*since) <= patience;
        if is_waiting && now < deadline {
            return false;
        }
        self.leaving = None;
        let at = port.resting.iter().position(|rx| rx.index == queue).filter(|_| !is_waiting);
        let left = at.map(|at| port.resting.remove(at));
        port.rx.append(&mut port.resting);
        let Some(left) = left else {
            port.handover.set(Stage::Kept);
            return true;
        };
        if let Some(ring) = left.ring {
            if let Some(kick) = ring.kick() {
                self.kicks.unwatch(&*kick);
            }
            port.rings.give_back(queue, ring);
        }
        if port.rx.is_empty() {
            // Nobody is left here who could pay.
            port.handover.debt.store(port.deficit.min(0), Ordering::Relaxed);
            port.deficit = 0;
        }
        port.handover.set(Stage::Free);
        true
    }

    /// Takes up a queue that another worker has handed over, and the `debt` that came with it.
    pub(super) fn take_queue(&mut self, id: PortId, queue: usize, debt: i64) {
        let Some(port) = self.port(id) else { return };
        port.rx.push(RxQueue::new(queue));
        port.deficit = port.deficit.saturating_add(debt);
        self.refresh_port(id.slot as usize);
    }
}
