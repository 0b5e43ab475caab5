//! What `stats` answers.

use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use switch_core::drop::DropReason;

/// Answer to `stats`.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Stats {
    /// Counters of each port by name.
    pub ports: BTreeMap<String, PortStats>,
    /// Sums of the ports that were deleted; sums over all ports balance only with them.
    #[serde(default)]
    pub deleted: PortStats,
    /// How packets found their actions.
    pub paths: Paths,
    /// Workers, by id.
    pub workers: Vec<WorkerStats>,
    /// What NICs have forwarded or dropped by their tables, by name. No port and no worker counts it.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub offload: BTreeMap<String, OffloadStats>,
}

/// What a NIC has carried by its tables.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct OffloadStats {
    /// Packets.
    pub packets: u64,
    /// Their bytes.
    pub bytes: u64,
    /// Whether these are estimates, because the NIC does not count.
    pub estimated: bool,
}

/// Counters of a port, seen from the switch: received is what the guest sent.
///
/// They balance: `rx_packets` = `rx_forwarded` + `rx_to_host` + the sum of `rx_drops`; and over all ports, the sum of
/// `fast_copies` and `host_copies` = the sum of `tx_packets` and `tx_drops`.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct PortStats {
    /// Packets from the guest.
    pub rx_packets: u64,
    /// Their bytes, Ethernet header included.
    pub rx_bytes: u64,
    /// Packets put into the guest's receive queues.
    pub tx_packets: u64,
    /// Their bytes.
    pub tx_bytes: u64,
    /// Of `rx_packets`: executed by a worker.
    pub rx_forwarded: u64,
    /// Of `rx_packets`: given to the host for a decision.
    pub rx_to_host: u64,
    /// Of `rx_packets`: dropped on the way in, by reason; see [`drops`].
    pub rx_drops: BTreeMap<String, u64>,
    /// Copies for this port that were dropped on the way out, by reason.
    pub tx_drops: BTreeMap<String, u64>,
    /// Packets of this port that the host sent nowhere, by reason.
    pub host_drops: BTreeMap<String, u64>,
    /// Copies made of this port's packets by workers.
    pub fast_copies: u64,
    /// Copies made of this port's packets on the host's word; under OVS, the frames that OVS has output on its representor.
    pub host_copies: u64,
    /// Times that one of its rings was found malformed.
    pub ring_faults: u64,
}

impl PortStats {
    /// Adds the counters of another port.
    pub fn add(&mut self, other: &PortStats) {
        let sum = |into: &mut BTreeMap<String, u64>, from: &BTreeMap<String, u64>| {
            for (reason, count) in from {
                *into.entry(reason.clone()).or_default() += count;
            }
        };
        self.rx_packets += other.rx_packets;
        self.rx_bytes += other.rx_bytes;
        self.tx_packets += other.tx_packets;
        self.tx_bytes += other.tx_bytes;
        self.rx_forwarded += other.rx_forwarded;
        self.rx_to_host += other.rx_to_host;
        sum(&mut self.rx_drops, &other.rx_drops);
        sum(&mut self.tx_drops, &other.tx_drops);
        sum(&mut self.host_drops, &other.host_drops);
        self.fast_copies += other.fast_copies;
        self.host_copies += other.host_copies;
        self.ring_faults += other.ring_faults;
    }
}

/// Counters of drop reasons as [`PortStats`] has them: every reason by its name, those at zero too.
pub fn drops(counters: &[u64; DropReason::COUNT]) -> BTreeMap<String, u64> {
    DropReason::ALL.iter().map(|&reason| (reason.name().to_owned(), counters[reason as usize])).collect()
}

/// How packets found their actions.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Paths {
    /// In the exact-match table.
    pub l1: u64,
    /// In the masked tables.
    pub l2: u64,
    /// No flow: to the host for a decision.
    pub miss: u64,
    /// A flow that only the host can execute.
    pub punt: u64,
    /// To the host so that it sees its flow being used.
    pub keepalive: u64,
}

impl Paths {
    /// Adds other packets' paths.
    pub fn add(&mut self, other: &Paths) {
        self.l1 += other.l1;
        self.l2 += other.l2;
        self.miss += other.miss;
        self.punt += other.punt;
        self.keepalive += other.keepalive;
    }
}

/// Counters of a worker.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct WorkerStats {
    /// Number.
    pub id: u32,
    /// Rounds over its queues.
    pub loops: u64,
    /// Cycles in rounds that moved packets.
    pub busy_cycles: u64,
    /// Cycles in rounds that found none.
    pub idle_cycles: u64,
    /// Packets.
    pub packets: u64,
    /// `busy_cycles` for each packet.
    pub cycles_per_packet: f64,
    /// Bursts that had packets.
    pub bursts: u64,
    /// Of them, those of 1, of 2 or 3, of 4 to 7 packets, and so on; the last are of 64 and more.
    #[serde(default)]
    pub burst_sizes: Vec<u64>,
    /// Polls of a queue that found none.
    pub empty_polls: u64,
    /// Times that it went to sleep.
    pub sleeps: u64,
    /// Flows in its exact-match table (L1).
    #[serde(default)]
    pub l1_entries: u64,
    /// The queues that it polls or has polled, of the ports that were asked for.
    #[serde(default)]
    pub queues: Vec<QueueStats>,
}

/// What a worker has spent on a queue of a port.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct QueueStats {
    /// Name of the port.
    pub port: String,
    /// Index of the queue pair.
    pub queue: u16,
    /// Whether the worker polls it now.
    pub polled: bool,
    /// Cycles that its packets have cost, the host's answers to them included.
    pub busy_cycles: u64,
}
