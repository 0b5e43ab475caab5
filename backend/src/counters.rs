//! Counters: written by one thread each, read by anyone, summed by the reader.
//!
//! The sums balance. Of the packets a port has sent us, each is forwarded, dropped under a reason, or went to the host:
//! `rx_packets = rx_forwarded + rx_to_host + Σ rx_drops`. Of the copies that were made for some port, each was handed over
//! or dropped: over all ports, `Σ fast_copies + Σ host_copies = Σ tx_packets + Σ tx_drops`. What the host has sent nowhere
//! is in `host_drops`. Under OVS each frame that comes from a port's representor counts as one of `host_copies` of that same
//! port: who has sent it is not known.
//!
//! What a device has received for a wire and no worker has seen, `wire::WireLosses` counts; the report adds it to `rx_packets`
//! and `rx_drops`.

use crate::port_config::MAX_QUEUES;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use switch_core::drop::DropReason;

/// A counter with one writer.
#[derive(Default, Debug)]
pub struct Count(AtomicU64);

impl Count {
    /// Adds `n`; to be called by the counter's one writer only, so that no locked instruction is needed.
    #[inline]
    pub fn add(&self, n: u64) {
        self.0.store(self.0.load(Relaxed).wrapping_add(n), Relaxed);
    }

    /// Sets the value, of what goes up and down; to be called by the counter's one writer only.
    pub fn set(&self, n: u64) {
        self.0.store(n, Relaxed);
    }

    /// The value as of some moment not long ago.
    pub fn get(&self) -> u64 {
        self.0.load(Relaxed)
    }
}

/// Counters by drop reason.
#[derive(Debug)]
pub struct Drops([Count; DropReason::COUNT]);

impl Default for Drops {
    fn default() -> Self {
        Drops(std::array::from_fn(|_| Count::default()))
    }
}

impl Drops {
    /// Counts one dropped packet.
    #[inline]
    pub fn count(&self, reason: DropReason) {
        self.0[reason as usize].add(1);
    }

    /// Counts `n` dropped packets.
    #[inline]
    pub fn add(&self, reason: DropReason, n: u64) {
        self.0[reason as usize].add(n);
    }

    /// Adds these to the sums in `totals`, indexed by reason.
    pub fn sum_into(&self, totals: &mut [u64; DropReason::COUNT]) {
        for (total, count) in totals.iter_mut().zip(&self.0) {
            *total += count.get();
        }
    }
}

/// One port's traffic through one worker. "rx" is what the guest sent, "tx" what it was given.
#[derive(Default, Debug)]
#[repr(align(128))]
pub struct PortCounters {
    /// Packets taken from the guest.
    pub rx_packets: Count,
    /// Their bytes, without the virtio header.
    pub rx_bytes: Count,
    /// Packets of which at least one copy was made.
    pub rx_forwarded: Count,
    /// Packets given to the host path.
    pub rx_to_host: Count,
    /// Copies made of this port's packets by the fast path.
    pub fast_copies: Count,
    /// Copies made of this port's packets on the host's word; frames that its representor has got from OVS.
    pub host_copies: Count,
    /// Packets handed to the guest; a segmented packet counts once.
    pub tx_packets: Count,
    /// Their bytes.
    pub tx_bytes: Count,
    /// Packets of this port that were dropped before any copy.
    pub rx_drops: Drops,
    /// Copies for this port that were dropped.
    pub tx_drops: Drops,
    /// Packets of this port that the host dropped.
    pub host_drops: Drops,
    /// Times that one of its rings was found malformed.
    pub ring_faults: Count,
    /// Cycles that packets of each of its queue pairs have cost, the host's answers to them included.
    pub queue_cycles: [Count; MAX_QUEUES as usize],
}

/// Classes of sizes of bursts, each twice the one before; the last is open.
pub const BURST_SIZES: usize = 7;

/// What a worker does with its time.
#[derive(Default, Debug)]
#[repr(align(128))]
pub struct WorkerCounters {
    /// Rounds over all queues.
    pub loops: Count,
    /// Rounds that found nothing.
    pub empty_polls: Count,
    /// Bursts taken from guests.
    pub bursts: Count,
    /// Of them, those of 1, of 2 or 3, of 4 to 7 packets, and so on.
    pub burst_sizes: [Count; BURST_SIZES],
    /// Packets in them.
    pub packets: Count,
    /// Cycles spent in rounds that found something.
    pub busy_cycles: Count,
    /// Cycles spent in rounds that found nothing.
    pub idle_cycles: Count,
    /// Times that it went to sleep.
    pub sleeps: Count,
    /// Flows in its exact-match table, as of a moment ago.
    pub l1_entries: Count,
}
