//! The order in which workers show a guest what they have put into its receive ring, and of what it is notified by whom.
//!
//! Each takes places under a lock, fills them outside of it, and waits until those before its own are published. Whoever notifies,
//! after a burst, does so for all that was published since somebody did.
//!
//! Checked by models.

use super::spin::Spins;
use crate::atomic::{AtomicU16, Ordering};

/// What the 16 bits of a position in a ring mean.
pub(crate) trait Positions {
    /// Places of the ring.
    fn size(&self) -> u16;

    /// The position so many places further.
    fn advance(&self, at: u16, places: u16) -> u16;

    /// The position so many places back.
    fn retreat(&self, at: u16, places: u16) -> u16;

    /// Places from `from` on to `to`.
    fn places(&self, from: u16, to: u16) -> u16;
}

/// The position up to which buffers are published. Only who has taken the places from there on may write it.
pub(crate) struct Published(AtomicU16);

impl Published {
    pub(crate) fn new(position: u16) -> Published {
        Published(AtomicU16::new(position))
    }

    /// Acquire: a place is not taken again before what was written to it.
    #[inline(always)]
    pub(crate) fn position(&self) -> u16 {
        self.0.load(Ordering::Acquire)
    }

    /// Waits for all who have taken places before the one at `first`.
    #[inline(always)]
    pub(crate) fn await_turn(&self, first: u16) {
        let mut spins = Spins::default();
        // Acquire: what the workers before us wrote comes before our index, which covers it.
        while self.0.load(Ordering::Acquire) != first {
            spins.wait();
        }
    }

    /// It is the turn of who has taken the place at `next`.
    #[inline(always)]
    pub(crate) fn pass_on(&self, next: u16) {
        self.0.store(next, Ordering::Release);
    }
}

/// What was taken, and of what the guest was notified; under the lock of those who take.
pub(crate) struct Books {
    /// The next position to give back.
    used: u16,
    /// The position up to which the guest was notified.
    notified: u16,
    /// Places that were taken and that the guest has not been notified of. Positions do not tell how many laps they are apart.
    pending: u32,
}

impl Books {
    /// Of a ring in which nothing is in flight, and of which the guest knows all.
    pub(crate) fn new(used: u16) -> Books {
        Books { used, notified: used, pending: 0 }
    }

    /// Where what is taken next will be given back.
    #[inline(always)]
    pub(crate) fn used(&self) -> u16 {
        self.used
    }

    /// Takes so many places.
    #[inline(always)]
    pub(crate) fn take(&mut self, ring: &impl Positions, places: u16) {
        self.used = ring.advance(self.used, places);
        self.pending = self.pending.saturating_add(places.into());
    }

    /// Begins to notify: between which positions buffers were published since somebody did, if any were.
    pub(crate) fn settle(&mut self, ring: &impl Positions, published: &Published) -> Option<[u16; 2]> {
        let new = published.position();
        let in_flight = u32::from(ring.places(new, self.used));
        let count = std::mem::replace(&mut self.pending, in_flight).saturating_sub(in_flight);
        let mut old = std::mem::replace(&mut self.notified, new);
        if count > u32::from(ring.size()) {
            // The guest has taken all of a lap back meanwhile; what it waits for now is no further back than the next one.
            old = ring.retreat(new, ring.size());
        }
        (count != 0).then_some([old, new])
    }
}

/// Shows the guest what was written to a split ring before this index. Release: after the entries, and the data that they announce.
#[inline(always)]
pub(crate) fn show(index: &AtomicU16, to: u16) {
    index.store(to, Ordering::Release);
}

/// Whether an index that went from `old` to `new` has passed `event` (`vring_need_event`, virtio 1.2, 2.7.7.1).
#[inline]
pub(crate) fn passed(event: u16, [old, new]: [u16; 2]) -> bool {
    new.wrapping_sub(event).wrapping_sub(1) < new.wrapping_sub(old)
}
