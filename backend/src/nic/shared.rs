//! What control and the workers share of a port of a NIC.

use super::card::{Card, NicTx, Stock};
use super::lock;
use super::queue::{NicRx, Tally};
use crate::quiesce::Quiescence;
use nic::io::{Port, PortCounters};
use std::io;
use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};
use switch_core::drop::DropReason;

/// How long a device may take to send what it was given last when a port is closed.
pub(super) const SETTLING: Duration = Duration::from_millis(100);
/// Between two looks at that.
const LOOK: Duration = Duration::from_micros(300);

/// What a port of a NIC has lost that no worker can count.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct NicLosses {
    /// Frames for which the port's queue had no room, or that were longer than the NIC's buffers.
    pub overrun: u64,
    /// Frames that the NIC failed to receive.
    pub error: u64,
    /// Frames that were received, and not taken before their queue was closed.
    pub closed: u64,
    /// Frames that the NIC could not send, or had not sent when it was reset or closed. They were counted as sent before.
    pub unsent: u64,
}

impl NicLosses {
    /// Those of a packet that the NIC has received, by their reasons.
    pub fn received(&self) -> [(DropReason, u64); 3] {
        [
            (DropReason::RxOverrun, self.overrun),
            (DropReason::DeviceClosed, self.closed),
            (DropReason::RxError, self.error),
        ]
    }
}

/// A receive queue.
struct Queue {
    id: u64,
    /// Until its worker has taken it.
    rx: Option<NicRx>,
}

/// The queues of a port while its NIC is open.
struct Queues {
    rx: Vec<Queue>,
    tx: Arc<NicTx>,
    card: Arc<Card>,
    tally: Arc<Tally>,
    /// What the driver had counted when they were opened.
    before: PortCounters,
}

impl Queues {
    /// What was lost so far, by the driver's counters.
    fn losses(&self, now: Option<PortCounters>) -> NicLosses {
        let now = now.unwrap_or(self.before);
        let since = |count: fn(&PortCounters) -> u64| count(&now).saturating_sub(count(&self.before));
        NicLosses {
            overrun: self.tally.overrun.load(Ordering::Relaxed) + since(|c| c.rx_too_long),
            error: since(|c| c.rx_error),
            closed: 0,
            unsent: since(|c| c.tx_error) + since(|c| c.tx_reset),
        }
    }

    /// Gives the device a moment to send what it was given, and the driver's counters after that.
    fn settle(&self, deadline: Instant, mut stock: impl FnMut() -> Option<Stock>) -> Option<PortCounters> {
        loop {
            let Stock { counters, is_last } = stock()?;
            let is_all = self.losses_in_all(Some(counters)).unsent <= self.losses(Some(counters)).unsent;
            if is_last || is_all || Instant::now() >= deadline {
                return Some(counters);
            }
            std::thread::sleep(LOOK);
        }
    }

    /// What was lost, now that it is closed and the driver has counted this.
    fn losses_in_all(&self, now: Option<PortCounters>) -> NicLosses {
        let sent = now.map_or(0, |now| now.sent.saturating_sub(self.before.sent));
        let unsent = self.tally.taken.load(Ordering::Relaxed).saturating_sub(sent);
        NicLosses { unsent, ..self.losses(now) }
    }
}

#[derive(Default)]
struct Live {
    queues: Option<Queues>,
    /// Whether frames can leave.
    up: bool,
    /// Queues that are being closed.
    closing: Option<Queues>,
    /// What workers have given back of those.
    returned: Vec<NicRx>,
    /// Of queues that are closed.
    past: NicLosses,
}

/// What control and the workers share of a port of a NIC.
pub struct NicPortShared {
    number: u32,
    /// Queues at most.
    most: usize,
    quiescence: Arc<Quiescence>,
    /// Held for an assignment: what workers look into when the version has moved.
    live: Mutex<Live>,
}

impl NicPortShared {
    pub(super) fn new(number: u32, most: usize, quiescence: Arc<Quiescence>) -> NicPortShared {
        NicPortShared { number, most, quiescence, live: Mutex::default() }
    }

    /// The NIC's number for the port.
    pub fn number(&self) -> u32 {
        self.number
    }

    /// For the worker that owns `queue`, when the version has moved: leaves in `slot` what frames come by from now on. What they
    /// came by until then is taken back.
    pub fn take_rx(&self, queue: usize, slot: &mut Option<NicRx>) {
        let Live { queues, returned, .. } = &mut *lock(&self.live);
        let current = queues.as_mut().and_then(|queues| queues.rx.get_mut(queue));
        if slot.is_some() && slot.as_ref().map(NicRx::id) == current.as_ref().map(|queue| queue.id) {
            return;
        }
        returned.extend(slot.take());
        *slot = current.and_then(|queue| queue.rx.take());
        if let Some(ring) = slot {
            ring.owned(true);
        }
    }

    /// For the worker that owned the queue: leaves what its frames come by for the worker that owns it from now on.
    pub fn give_back_rx(&self, ring: NicRx) {
        ring.owned(false);
        let Live { queues, returned, .. } = &mut *lock(&self.live);
        let mut current = queues.iter_mut().flat_map(|queues| &mut queues.rx);
        match current.find(|queue| queue.id == ring.id()) {
            Some(queue) => queue.rx = Some(ring),
            // The queue was closed meanwhile.
            None => returned.push(ring),
        }
    }

    /// What frames leave by, if they can. To be fetched anew when the version has moved. Whatever the number of receive queues, it
    /// is one.
    pub fn tx(&self, queue: usize) -> Option<Arc<NicTx>> {
        let live = lock(&self.live);
        live.queues.as_ref().filter(|_| live.up && queue == 0).map(|queues| queues.tx.clone())
    }

    /// The number of receive queues: none unless the port's NIC is open, and has such a port.
    pub fn queues(&self) -> usize {
        lock(&self.live).queues.as_ref().map_or(0, |queues| queues.rx.len())
    }

    /// Whether frames can go.
    pub fn link_up(&self) -> bool {
        let live = lock(&self.live);
        live.up && live.queues.is_some()
    }

    /// What was lost so far.
    pub fn losses(&self) -> NicLosses {
        let (card, mut sum) = {
            let live = lock(&self.live);
            (live.queues.as_ref().map(|queues| queues.card.clone()), live.past)
        };
        // The lock of the NIC is not taken under the other one, for which workers wait.
        let counters = card.and_then(|card| card.lock().as_ref()?.io.counters(self.number));
        if let Some(queues) = &lock(&self.live).queues {
            add(&mut sum, queues.losses(counters));
        }
        sum
    }

    /// Lets workers have the queues of a NIC that is open, whose port this is.
    pub(super) fn start(&self, card: &Arc<Card>, port: &Port) -> io::Result<()> {
        let tally = Arc::new(Tally::default());
        let before = card.lock().as_ref().and_then(|inner| inner.io.counters(self.number));
        let rx = card.open_queues(self.number, self.most, port.max_frame, &tally)?;
        let tx = Arc::new(NicTx::new(card, port, &tally));
        let before = before.unwrap_or_default();
        let rx = rx.into_iter().map(|rx| Queue { id: rx.id(), rx: Some(rx) }).collect();
        lock(&self.live).queues = Some(Queues { rx, tx, card: card.clone(), tally, before });
        self.quiescence.publish();
        Ok(())
    }

    /// Takes the queues from the workers, who still use them until the next barrier.
    pub(super) fn stop(&self) {
        let live = &mut *lock(&self.live);
        live.up = false;
        live.closing = live.queues.take();
    }

    /// Lets go of the queues that were taken from the workers, and counts what is in them, and what the device has not sent by its
    /// `stock` until `deadline`; `None`: there is no device.
    pub(super) fn bury(&self, deadline: Instant, stock: impl FnMut() -> Option<Stock>) {
        let (closing, returned) = {
            let Live { closing, returned, .. } = &mut *lock(&self.live);
            (closing.take(), std::mem::take(returned))
        };
        // No worker is to wait for the device, nor while memory is unmapped.
        let Some(queues) = closing else { return };
        let counters = queues.settle(deadline, stock);
        let kept = queues.rx.iter().filter_map(|queue| queue.rx.as_ref());
        let closed = returned.iter().chain(kept).map(NicRx::left).sum();
        let lost = NicLosses { closed, ..queues.losses_in_all(counters) };
        add(&mut lock(&self.live).past, lost);
    }

    /// Whether frames can leave has changed, or not. Gives whether it has.
    pub(super) fn set_up(&self, up: bool) -> bool {
        let changed = std::mem::replace(&mut lock(&self.live).up, up) != up;
        if changed {
            self.quiescence.publish();
        }
        changed
    }
}

fn add(sum: &mut NicLosses, more: NicLosses) {
    sum.overrun += more.overrun;
    sum.error += more.error;
    sum.closed += more.closed;
    sum.unsent += more.unsent;
}
