//! What is kept of a flow.

use crate::offload::eligible::Reason;
use crate::offload::policy::Millis;
use nic::offload::{Counts, RuleId};
use switch_core::flow::FlowRef;
use switch_core::packet::PortId;
use switch_core::slab::{FlowCounters, Slot};

/// A flow whose ingress is a port of a NIC.
pub struct Entry {
    pub flow: FlowRef,
    pub port: PortId,
    pub nic: u32,
    /// By worker, and behind them that of the NIC.
    pub counters: Vec<FlowCounters>,
    /// Why it may not go in.
    pub reason: Option<Reason>,
    pub rule: Option<RuleId>,
    /// With which error the device has refused it last.
    pub rejected: Option<u16>,
    /// Since when it is out only until a worker has given a keep-alive.
    pub detour: Option<Millis>,
    /// Whether workers were asked for a keep-alive in the NIC's place.
    pub asked: bool,
    /// Whether the NIC has carried any of it.
    pub was_in: bool,
    pub guess: Option<Guess>,
    pub estimated: bool,
    /// It is to be looked at anew.
    pub stale: bool,
    /// The rule goes because nothing is known of it.
    pub expired: bool,
}

/// What a device is believed to carry that does not count.
#[derive(Clone, Copy, Debug)]
pub struct Guess {
    /// Packets a second.
    pub rate: f64,
    /// Seconds of detours that this comes from, those of earlier ones counting less; none if it is what the flow had before it
    /// went in.
    pub watched: f64,
    /// On a detour: how many packets workers had carried when it began, and when that was.
    pub begun: Option<(u64, Millis)>,
    /// Bytes of each.
    pub size: f64,
    /// Packets, not whole ones yet.
    pub part: f64,
    /// Up to when it was counted.
    pub upto: Millis,
    /// When it was known last whether there are any.
    pub told: Millis,
    pub idle: bool,
}

impl Guess {
    /// How much of what earlier detours have shown counts beside the next one.
    const KEPT: f64 = 0.5;

    /// A detour is over; workers have carried so many packets by now.
    ///
    /// It ends soon after a packet, so that the rate of a short one alone would mostly be too high; all packets of several by all
    /// of their time are right.
    pub fn correct(&mut self, by_workers: u64, now: Millis) {
        let Some((packets, since)) = self.begun.take() else { return };
        let elapsed = now.saturating_sub(since) as f64 / 1000.0;
        if elapsed > 0.0 {
            let kept = Self::KEPT * if self.watched > 0.0 { self.watched } else { elapsed };
            self.watched = kept + elapsed;
            self.rate = (self.rate * kept + by_workers.saturating_sub(packets) as f64) / self.watched;
        }
    }
}

impl Entry {
    /// The NIC's slot of statistics and the workers'.
    pub fn split(&self) -> (Option<&Slot>, impl Iterator<Item = &Slot>) {
        let (nic, workers) = match self.counters.split_last() {
            Some((nic, workers)) => (nic.slot(), workers),
            None => (None, &[][..]),
        };
        (nic, workers.iter().filter_map(FlowCounters::slot))
    }

    pub fn total(&self) -> Counts {
        let stats = self.counters.iter().map(FlowCounters::read);
        stats.fold(Counts::default(), |sum, stats| Counts {
            packets: sum.packets + stats.packets,
            bytes: sum.bytes + stats.bytes,
        })
    }

    /// Packets that workers have carried.
    pub fn by_workers(&self) -> u64 {
        let workers = self.counters.split_last().map_or(&[][..], |(_, workers)| workers);
        workers.iter().map(|counters| counters.read().packets).sum()
    }

    /// Bytes of a packet, on average.
    pub fn size(&self) -> f64 {
        let Counts { packets, bytes } = self.total();
        bytes as f64 / packets.max(1) as f64
    }

    pub fn is_due(&self) -> bool {
        self.split().0.is_some_and(Slot::is_due)
    }

    /// Asks all workers for a keep-alive, one of which will see the next packet.
    pub fn ask_workers(&mut self) {
        if let Some((_, workers)) = self.counters.split_last() {
            for counters in workers {
                counters.set_due();
            }
        }
        self.asked = true;
    }

    /// Whether a worker has given the keep-alive that was asked for; then it is no longer asked of anybody.
    pub fn take_given(&mut self) -> bool {
        if !self.asked || self.split().1.all(Slot::is_due) {
            return false;
        }
        let (nic, workers) = self.split();
        nic.into_iter().chain(workers).for_each(Slot::clear_due);
        self.asked = false;
        true
    }
}
