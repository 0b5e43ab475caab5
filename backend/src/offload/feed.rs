//! What the tables tell the manager: which flows of NICs' ports have come, changed and gone.

use crate::datapath::Mark;
use crate::wake::Waker;
use std::collections::HashSet;
use std::io;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use switch_core::flow::FlowRef;
use switch_core::packet::PortId;
use switch_core::slab::Slots;

/// A change of the tables. What a flow is now, the tables say.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Change {
    /// A flow has come, or has a new generation in the place of its last one.
    Put(FlowRef),
    /// A flow has gone.
    Delete(FlowRef),
    /// The MTU of a port is another.
    Mtu,
}

/// Changes that wait at most; beyond, the manager looks at all flows instead.
const MAX_WAITING: usize = 1 << 17;

#[derive(Default)]
struct Queue {
    changes: Vec<Change>,
    /// Changes so far.
    told: u64,
    /// Whether some were too many to be kept.
    lost: bool,
    /// Ports of NICs.
    ports: HashSet<PortId>,
}

/// What the manager has taken from a [`Feed`].
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Taken {
    /// The changes, in order.
    pub changes: Vec<Change>,
    /// Changes so far, these included.
    pub upto: u64,
    /// Whether some are missing: all flows are to be looked at.
    pub lost: bool,
}

/// The queue of changes. Its lock is the innermost: it is taken with the tables' lock held or without, and nothing is locked
/// while it is held.
pub struct Feed {
    queue: Mutex<Queue>,
    /// Changes that the devices have followed: what is gone from the tables is gone from them.
    followed: Arc<AtomicU64>,
    waker: Waker,
    slots: Arc<Slots>,
}

impl Feed {
    /// A feed of flows that devices count in `slots`.
    pub fn new(slots: Arc<Slots>) -> io::Result<Feed> {
        let followed = Arc::new(AtomicU64::new(0));
        Ok(Feed { queue: Mutex::default(), followed, waker: Waker::new()?, slots })
    }

    fn lock(&self) -> MutexGuard<'_, Queue> {
        self.queue.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Tells of a change that concerns this port: its flow's ingress. Called with the tables locked, after workers were told.
    pub fn tell(&self, port: PortId, change: Change) {
        let mut queue = self.lock();
        if !queue.ports.contains(&port) {
            return;
        }
        queue.told += 1;
        if queue.changes.len() < MAX_WAITING {
            queue.changes.push(change);
        } else {
            queue.lost = true;
        }
        drop(queue);
        self.waker.wake();
    }

    /// Where the devices will be when they have followed all changes so far.
    pub fn mark(&self) -> Mark {
        Mark::of_nics(self.lock().told, self.followed.clone())
    }

    /// Of which ports changes are told, from now on. Called with the tables locked, so that it is known which flows they have.
    pub fn watch(&self, ports: HashSet<PortId>) {
        self.lock().ports = ports;
    }

    /// Takes the changes that wait.
    pub fn take(&self) -> Taken {
        let mut queue = self.lock();
        Taken {
            changes: std::mem::take(&mut queue.changes),
            upto: queue.told,
            lost: std::mem::take(&mut queue.lost),
        }
    }

    /// Whether no change waits.
    pub fn is_empty(&self) -> bool {
        let queue = self.lock();
        queue.changes.is_empty() && !queue.lost
    }

    /// The devices have followed so many changes.
    pub fn follow(&self, upto: u64) {
        self.followed.store(upto, Ordering::Release);
    }

    /// Nobody follows any more: no device has a flow.
    pub fn close(&self) {
        self.lock().ports.clear();
        self.follow(u64::MAX);
    }

    /// Wakes the manager.
    pub fn waker(&self) -> &Waker {
        &self.waker
    }

    /// Where devices' packets are counted.
    pub fn slots(&self) -> &Slots {
        &self.slots
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn changes_of_watched_ports_are_told_and_marks_wait_for_them() {
        let feed = Feed::new(Arc::new(Slots::new(1, switch_core::hash::Hasher::new(0)))).unwrap();
        let port = |slot| PortId { slot, generation: 1 };
        let flow = |index| FlowRef { index, generation: 1 };
        feed.tell(port(1), Change::Put(flow(1)));
        assert!(feed.is_empty() && feed.mark().is_reached());
        feed.watch([port(1)].into());
        feed.tell(port(1), Change::Put(flow(2)));
        feed.tell(port(2), Change::Put(flow(3)));
        let mark = feed.mark();
        feed.tell(port(1), Change::Delete(flow(2)));
        let changes = vec![Change::Put(flow(2)), Change::Delete(flow(2))];
        assert_eq!(feed.take(), Taken { changes, upto: 2, lost: false });
        assert!(!mark.is_reached());
        feed.follow(1);
        assert!(mark.is_reached() && !feed.mark().is_reached());
        for _ in 0..=MAX_WAITING {
            feed.tell(port(1), Change::Mtu);
        }
        let taken = feed.take();
        assert!(taken.lost && taken.changes.len() == MAX_WAITING && feed.is_empty());
        assert_eq!(taken.upto, 2 + MAX_WAITING as u64 + 1);
        feed.close();
        feed.tell(port(1), Change::Mtu);
        assert!(feed.mark().is_reached());
    }
}
