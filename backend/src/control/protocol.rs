//! Requests and answers.
//!
//! A request is `{"v":1,"cmd":"add-port","port":{…}}`: the protocol's version, the command, and its arguments. Unknown
//! commands and arguments are refused. An answer is the object of the command's type below, or `{"error":"one line"}`.
//! Answers may gain fields without a new version, so readers ignore those that they do not know.

use crate::port_config::{KindName, Mode, PortConfig};
use serde::{Deserialize, Serialize};
use serde_json::Value;
use std::collections::BTreeMap;
use std::time::Duration;
use switch_core::drop::DropReason;

/// Version of the protocol.
pub const VERSION: u64 = 1;

/// What a client asks.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "cmd", rename_all = "kebab-case", deny_unknown_fields)]
pub enum Request {
    /// State of the daemon and its ports: [`Show`].
    Show {},
    /// Counters: [`Stats`].
    Stats {
        /// Of this port only.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        port: Option<String>,
    },
    /// Flows: [`Flows`].
    DumpFlows {
        /// Of this ingress port only.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        port: Option<String>,
        /// Of this source only.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        source: Option<FlowSource>,
    },
    /// Adds an explicit flow, in ODP text: [`FlowAdded`].
    AddFlow {
        /// Match.
        flow: String,
        /// Actions.
        actions: String,
    },
    /// Deletes explicit flows and answers when no worker uses them any more: [`FlowsDeleted`].
    DelFlow {
        /// Which.
        which: FlowSelector,
    },
    /// Adds a port: [`Done`].
    AddPort {
        /// Its settings.
        port: PortConfig,
    },
    /// Changes settings of a port and answers when they are in force: [`Done`].
    SetPort {
        /// Its name.
        name: String,
        /// Workers that its queues are pinned to, as [`PortConfig::workers`]; none: chosen automatically.
        workers: Vec<u16>,
    },
    /// Deletes a port and answers when no worker uses it any more: [`Done`].
    DelPort {
        /// Its name.
        name: String,
    },
    /// What would happen to a packet: [`Trace`].
    Trace {
        /// The port that it comes from.
        port: String,
        /// The packet as bytes in hex, or as a flow in ODP text.
        packet: String,
    },
    /// Reads the source of flows in full and answers when every worker has them: [`Synced`].
    Sync {
        /// Seconds until this fails.
        timeout: f64,
    },
    /// Which version runs: [`Version`].
    Version {},
}

/// Longest time that a `sync` may ask for.
pub const MAX_SYNC: Duration = Duration::from_secs(3600);

/// Which explicit flows to delete.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum FlowSelector {
    /// The one with this match, in ODP text.
    Flow(String),
    /// The one with this `id` of [`Flow`], or `ufid:…`.
    Id(String),
    /// All explicit ones.
    All,
}

/// Who gave a flow; [`switch_core::flow::Source`] on the wire.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize, clap::ValueEnum)]
#[serde(rename_all = "lowercase")]
pub enum FlowSource {
    /// `add-flow`.
    Explicit,
    /// The embedded bridge or Open vSwitch.
    Learned,
}

impl From<switch_core::flow::Source> for FlowSource {
    fn from(source: switch_core::flow::Source) -> FlowSource {
        match source {
            switch_core::flow::Source::Explicit => FlowSource::Explicit,
            switch_core::flow::Source::Learned => FlowSource::Learned,
        }
    }
}

impl Request {
    /// Reads a line; the error is one line for the client.
    pub fn parse(line: &[u8]) -> Result<Request, String> {
        let value: Value = serde_json::from_slice(line).map_err(|error| format!("not JSON: {error}"))?;
        let Value::Object(mut object) = value else {
            return Err("a request is a JSON object".into());
        };
        match object.remove("v") {
            Some(version) if version == VERSION => {}
            Some(version) => {
                return Err(format!("protocol version {version} is not spoken here, {VERSION} is"));
            }
            None => return Err(format!("a request needs \"v\":{VERSION}")),
        }
        let request = Request::deserialize(Value::Object(object)).map_err(|error| error.to_string())?;
        if let Request::Sync { timeout } = request
            && !(0.0..=MAX_SYNC.as_secs_f64()).contains(&timeout)
        {
            return Err(format!("timeout {timeout}: must be 0 to {} seconds", MAX_SYNC.as_secs()));
        }
        Ok(request)
    }

    /// The request as a line, newline included.
    pub fn to_line(&self) -> serde_json::Result<String> {
        #[derive(Serialize)]
        struct Versioned<'a> {
            v: u64,
            #[serde(flatten)]
            request: &'a Request,
        }
        let mut line = serde_json::to_string(&Versioned { v: VERSION, request: self })?;
        line.push('\n');
        Ok(line)
    }
}

/// What the daemon answers; on the wire it is the object inside.
#[derive(Clone, Debug, PartialEq, Serialize)]
#[serde(untagged)]
pub enum Response {
    /// To `show`.
    Show(Box<Show>),
    /// To `stats`.
    Stats(Box<Stats>),
    /// To `dump-flows`.
    Flows(Flows),
    /// To `add-flow`.
    FlowAdded(FlowAdded),
    /// To `del-flow`.
    FlowsDeleted(FlowsDeleted),
    /// To `add-port`, `set-port` and `del-port`.
    Done(Done),
    /// To `trace`.
    Trace(Trace),
    /// To `sync`.
    Synced(Synced),
    /// To `version`.
    Version(Version),
}

/// Answer to `show`.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Show {
    /// Version of the daemon.
    pub version: String,
    /// Seconds since the daemon started.
    pub uptime: f64,
    /// Who decides about packets without a flow: `bridge` or `ovs`.
    pub host: String,
    /// Workers, by id.
    pub workers: Vec<WorkerShow>,
    /// How queues are spread over the workers.
    #[serde(default)]
    pub spread: SpreadShow,
    /// Ports.
    pub ports: Vec<PortShow>,
    /// Tunnels of Open vSwitch's datapath.
    #[serde(default)]
    pub tunnels: Vec<TunnelShow>,
    /// NICs that the daemon drives itself.
    #[serde(default)]
    pub nics: Vec<NicShow>,
    /// Number of flows.
    pub flows: FlowCounts,
    /// How packets found their actions since the daemon started.
    #[serde(default)]
    pub paths: Paths,
    /// Why flows are carried out by the host, the reason of most packets first; at most [`MAX_PUNTS`].
    #[serde(default)]
    pub punts: Vec<Punted>,
    /// Open vSwitch, where it is the host.
    #[serde(default)]
    pub ovs: Option<OvsShow>,
    /// NICs that flows are put into.
    #[serde(default)]
    pub offload: Vec<OffloadShow>,
    /// What an administrator should know, one line each.
    pub warnings: Vec<String>,
}

/// Reasons that [`Show`] has at most.
pub const MAX_PUNTS: usize = 8;

/// A reason why flows are carried out by the host.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Punted {
    /// The reason, as `dump-flows` shows it behind `punt: `.
    pub reason: String,
    /// Packets that went to the host for it.
    pub packets: u64,
    /// Flows that have it now.
    pub flows: u64,
}

/// Open vSwitch in [`Show`].
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct OvsShow {
    /// The bridge that `add-port` adds ports to.
    pub bridge: String,
    /// Its version, if the database is known.
    pub version: Option<String>,
    /// Address of the database.
    pub database: String,
    /// What is wrong with the connection to the database; `null` if nothing is.
    pub database_error: Option<String>,
    /// Where flows are read; `null` until the bridge is known.
    pub datapath: Option<String>,
    /// What is wrong with reading them; `null` if nothing is.
    pub datapath_error: Option<String>,
    /// Seconds since all flows were read last.
    pub read_seconds: Option<f64>,
    /// Times that all flows had to be read again because something was lost or may have changed in silence.
    pub resyncs: u64,
    /// Those of them for events that came faster than they were taken.
    pub lost_events: u64,
    /// Keep-alives that the flows in use need in a second.
    pub keepalives_per_second: f64,
    /// Flows that are too cold to be kept alive: OVS will expire them, and their next packet misses.
    pub given_up: u64,
}

/// The tables of a NIC in [`Show`].
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct OffloadShow {
    /// Name of the NIC.
    pub nic: String,
    /// Rules in it.
    pub rules: u32,
    /// Rules that it takes at most.
    pub max_rules: u32,
    /// Groups in it: what rules output to, where a NIC has such.
    pub groups: u32,
    /// Operations that it has not answered yet.
    pub operations: u32,
    /// Times that its tables were reset, and all flows went by software for a moment.
    pub resets: u64,
    /// Flows that are busy enough and wait for room.
    pub waiting: u64,
    /// Flows of its ports that are not in it, by the reason that `dump-flows` shows.
    pub not_offloaded: BTreeMap<String, u64>,
}

/// A worker in [`Show`].
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct WorkerShow {
    /// Number.
    pub id: u32,
    /// The CPU that it is pinned to.
    pub cpu: Option<u32>,
    /// Names of the ports whose transmit queues it polls.
    pub ports: Vec<String>,
    /// Those queues.
    #[serde(default)]
    pub queues: Vec<PolledQueue>,
    /// Share of its time that it sleeps, 0 to 1, over the last second or so.
    pub asleep: f64,
    /// NUMA node of that CPU.
    #[serde(default)]
    pub node: Option<u32>,
    /// Memory that it has for all ports together, in bytes: exact-match table, buffers, lines of flows.
    #[serde(default)]
    pub memory: u64,
}

/// A queue of a port that a worker polls.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct PolledQueue {
    /// Name of the port.
    pub port: String,
    /// Index of the queue pair.
    pub queue: u16,
    /// Whether the user has pinned it to a worker; if not, the worker was chosen automatically.
    pub pinned: bool,
}

/// How queues are spread over the workers, in [`Show`].
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct SpreadShow {
    /// Whether queues that are not pinned may move while the daemon runs.
    pub rebalance: bool,
    /// Queues that have moved since the daemon started.
    pub moves: u64,
    /// The last of them.
    pub last: Option<LastMove>,
}

/// A queue that has moved from one worker to another.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct LastMove {
    /// Name of the port.
    pub port: String,
    /// Index of the queue pair.
    pub queue: u16,
    /// The worker that polled it.
    pub from: u32,
    /// The worker that polls it since.
    pub to: u32,
    /// Whether the user has pinned it there.
    pub pinned: bool,
    /// Seconds since then.
    pub seconds: f64,
}

/// State of a port.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum PortState {
    /// No QEMU on the socket, no device of that name.
    #[default]
    Waiting,
    /// QEMU is connected, the device is open.
    Connected,
    /// The guest broke the rules, and the port waits for its driver to reset; or the device cannot be opened.
    Faulted,
}

/// What a port costs in memory, in [`PortShow`]; in bytes.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct MemoryShow {
    /// Tables of the port and its flows, over all workers.
    pub tables: u64,
    /// Its queues and counters, over all workers; of a wire, with the frames that its device and we share.
    pub queues: u64,
    /// What its guest shares with us.
    pub guest: u64,
    /// Of that, what the guest had used when it was last looked at: 1, 2, 4 … seconds after it was shared.
    pub used: u64,
    /// Size of the guest's pages.
    pub page: u64,
    /// How much of what is used is on which NUMA node.
    pub nodes: BTreeMap<u32, u64>,
}

/// A port in [`Show`].
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct PortShow {
    /// Name.
    pub name: String,
    /// Index in the datapath.
    pub slot: u32,
    /// What is behind it.
    #[serde(default)]
    pub kind: KindName,
    /// Connection to QEMU, or to the device.
    pub state: PortState,
    /// Whether packets flow: the guest's driver runs and its queues are enabled; the device is up and has a carrier.
    pub link: bool,
    /// Path of a guest's vhost-user socket.
    pub socket: String,
    /// Who listens there.
    pub mode: Mode,
    /// Name of a wire's device.
    #[serde(default)]
    pub device: String,
    /// Which port of which NIC it is: `nic1/1`.
    #[serde(default)]
    pub nic: String,
    /// Queue pairs that are offered, or that a wire has at most.
    pub queues: u16,
    /// Queue pairs that are in use.
    pub active_queues: u16,
    /// Negotiated features in short words (`mrg_rxbuf`, `csum`, `tso4` …), or how a device is used.
    pub features: Vec<String>,
    /// Enforced MTU in bytes.
    pub mtu: u32,
    /// `access 10`, `trunk 10,20 native 1`, `trunk all`; see [`crate::port_config::VlanMode`].
    pub vlan: String,
    /// Flows whose ingress it is.
    pub flows: u64,
    /// Masks of those flows.
    pub masks: u32,
    /// MAC addresses that the embedded bridge has learned here.
    pub macs: u32,
    /// What it costs in memory.
    #[serde(default)]
    pub memory: MemoryShow,
    /// Why it is faulted, or why a wire's device or a NIC is not open.
    pub fault: Option<String>,
}

/// A logical port of tunnels in [`Show`]: where the packets inside come in.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct TunnelShow {
    /// Name of the device in Open vSwitch's datapath, such as `vxlan_sys_4789`.
    pub name: String,
    /// Index in the datapath.
    pub slot: u32,
    /// `vxlan`, `geneve` or `gre`.
    pub kind: String,
    /// UDP port at which packets come; none of GRE.
    pub udp_port: Option<u16>,
    /// Flows whose ingress it is.
    pub flows: u64,
    /// Masks of those flows.
    pub masks: u32,
}

/// A NIC in [`Show`].
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct NicShow {
    /// Name.
    pub name: String,
    /// Address of its PCI function.
    pub address: String,
    /// Its driver; empty while it is not open.
    pub driver: String,
    /// Why it is not open.
    pub fault: Option<String>,
    /// Whether it has tables for flows.
    pub tables: bool,
    /// Whether flows may be put into them.
    pub offload: bool,
    /// Its ports, while it is open.
    pub ports: Vec<NicPortShow>,
    /// How often it was found to have been reset.
    pub resets: u64,
    /// Frames that it has forwarded itself, and of which it gave a copy that went no further.
    pub forwarded: u64,
    /// Frames that it has received by ports that are no ports of the switch.
    pub unclaimed: u64,
}

/// A port of a NIC in [`NicShow`].
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct NicPortShow {
    /// Its number.
    pub number: u32,
    /// Its name, as the NIC gives it.
    pub name: String,
    /// Its own MAC address.
    pub mac: String,
    /// Whether its link is up.
    pub link: bool,
    /// Its speed in Mbit/s; 0 if it is unknown.
    pub speed: u32,
    /// What the device does for frames itself: `checksum` and `tso` for those that leave, `vlan` both ways.
    #[serde(default)]
    pub does: Vec<String>,
    /// The port of the switch that it is.
    pub port: Option<String>,
}

/// Number of flows by source.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct FlowCounts {
    /// By `add-flow`.
    pub explicit: u64,
    /// Of the embedded bridge or Open vSwitch.
    pub learned: u64,
}

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

/// Answer to `dump-flows`.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Flows {
    /// The flows.
    pub flows: Vec<Flow>,
}

/// A flow with its counters.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Flow {
    /// What `del-flow` takes.
    pub id: String,
    /// The flow's name in Open vSwitch, as `ovs-dpctl dump-flows -m` prints it behind `ufid:`; `null` if it has none.
    #[serde(default)]
    pub ufid: Option<String>,
    /// Who gave it.
    pub source: FlowSource,
    /// Match in ODP text.
    pub flow: String,
    /// Actions in ODP text.
    pub actions: String,
    /// `fast`, or `punt: ` and the reason.
    pub handling: String,
    /// Packets that used it.
    pub packets: u64,
    /// Their bytes.
    pub bytes: u64,
    /// TCP flags seen, or-ed: FIN is 1.
    pub tcp_flags: u16,
    /// Seconds since it was last used; `null` if never.
    pub used_seconds: Option<f64>,
    /// Where flows are put into NICs: `yes`, `waiting`, or `no (reason)`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub offloaded: Option<String>,
    /// Whether some of its packets or bytes were estimated, because they were carried by a NIC that does not count them.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub estimated: bool,
}

/// Answer to `add-flow`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct FlowAdded {
    /// The flow's `id`.
    pub id: String,
    /// The match as the switch understood it, prerequisites completed.
    pub flow: String,
}

/// Answer to `del-flow`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct FlowsDeleted {
    /// Number of flows deleted.
    pub deleted: u64,
}

/// Answer to what has nothing to tell.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Done {
    /// Always true.
    pub ok: bool,
}

impl From<Done> for Response {
    fn from(done: Done) -> Response {
        Response::Done(done)
    }
}

/// Answer to `sync`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Synced {
    /// Number of flows that the source has.
    pub flows: u64,
}

/// Answer to `trace`.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Trace {
    /// What each layer does, in order.
    pub steps: Vec<TraceStep>,
    /// Where the packet ends, in one line.
    pub outcome: String,
}

/// A step of [`Trace`].
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct TraceStep {
    /// `parse`, `L1`, `L2`, `actions`, `host` …
    pub layer: String,
    /// What happens there, one or several lines.
    pub text: String,
}

/// Answer to `version`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Version {
    /// Version of the daemon.
    pub version: String,
    /// Version of the protocol.
    pub protocol: u64,
}

impl Version {
    /// This program's.
    pub fn own() -> Version {
        Version { version: env!("CARGO_PKG_VERSION").into(), protocol: VERSION }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn requests_on_the_wire() {
        let flow = || "in_port(vm1)".to_string();
        let cases = [
            (Request::Show {}, json!({"v":1,"cmd":"show"})),
            (Request::Stats { port: None }, json!({"v":1,"cmd":"stats"})),
            (Request::Stats { port: Some("a".into()) }, json!({"v":1,"cmd":"stats","port":"a"})),
            (
                Request::DumpFlows { port: None, source: Some(FlowSource::Learned) },
                json!({"v":1,"cmd":"dump-flows","source":"learned"}),
            ),
            (
                Request::AddFlow { flow: flow(), actions: "vm2".into() },
                json!({"v":1,"cmd":"add-flow","flow":"in_port(vm1)","actions":"vm2"}),
            ),
            (Request::DelFlow { which: FlowSelector::All }, json!({"v":1,"cmd":"del-flow","which":"all"})),
            (
                Request::DelFlow { which: FlowSelector::Flow(flow()) },
                json!({"v":1,"cmd":"del-flow","which":{"flow":"in_port(vm1)"}}),
            ),
            (
                Request::DelFlow { which: FlowSelector::Id("3.1".into()) },
                json!({"v":1,"cmd":"del-flow","which":{"id":"3.1"}}),
            ),
            (
                Request::AddPort { port: PortConfig::new("a", "/a") },
                json!({"v":1,"cmd":"add-port","port":{"name":"a","socket":"/a","mode":"server","queues":1,
                    "max_masks":256,"miss_rate":10000}}),
            ),
            (Request::DelPort { name: "a".into() }, json!({"v":1,"cmd":"del-port","name":"a"})),
            (
                Request::Trace { port: "a".into(), packet: "00 11".into() },
                json!({"v":1,"cmd":"trace","port":"a","packet":"00 11"}),
            ),
            (Request::Sync { timeout: 1.5 }, json!({"v":1,"cmd":"sync","timeout":1.5})),
            (Request::Version {}, json!({"v":1,"cmd":"version"})),
        ];
        for (request, wire) in cases {
            let line = request.to_line().unwrap();
            assert_eq!(line.find('\n'), Some(line.len() - 1));
            assert_eq!(serde_json::from_str::<Value>(&line).unwrap(), wire);
            assert_eq!(Request::parse(line.as_bytes()), Ok(request));
        }
    }

    #[test]
    fn bad_requests_are_one_line_errors() {
        for (line, reason) in [
            ("", "not JSON: EOF"),
            ("{", "not JSON"),
            ("[1]", "a request is a JSON object"),
            (r#"{"cmd":"show"}"#, "needs \"v\":1"),
            (r#"{"v":2,"cmd":"show"}"#, "protocol version 2 is not spoken here"),
            (r#"{"v":"1","cmd":"show"}"#, "protocol version \"1\""),
            (r#"{"v":1}"#, "missing field `cmd`"),
            (r#"{"v":1,"cmd":"halt"}"#, "unknown variant `halt`"),
            (r#"{"v":1,"cmd":"show","extra":1}"#, "unknown field `extra`"),
            (r#"{"v":1,"cmd":"del-port"}"#, "missing field `name`"),
            (r#"{"v":1,"cmd":"del-port","name":3}"#, "expected a string"),
            (r#"{"v":1,"cmd":"sync","timeout":-1}"#, "must be 0 to 3600"),
            (r#"{"v":1,"cmd":"sync","timeout":1e30}"#, "must be 0 to 3600"),
            (r#"{"v":1,"cmd":"add-port","port":{"name":"a","socket":"/a","x":1}}"#, "unknown field `x`"),
            (r#"{"v":1,"cmd":"del-flow","which":"some"}"#, "unknown variant `some`"),
        ] {
            let error = Request::parse(line.as_bytes()).expect_err(line);
            assert!(error.contains(reason), "'{error}' does not say '{reason}'");
            assert!(!error.contains('\n'));
        }
        let deep = "[".repeat(60_000);
        Request::parse(deep.as_bytes()).expect_err("nesting is limited");
        Request::parse(b"\xff\xfe").expect_err("not UTF-8");
    }

    #[test]
    fn answers_on_the_wire() {
        let mut counters = [0; DropReason::COUNT];
        counters[DropReason::MissRate as usize] = 7;
        let mut stats = Stats::default();
        stats.ports.insert("vm1".into(), PortStats { rx_drops: drops(&counters), ..PortStats::default() });
        let wire = serde_json::to_value(Response::Stats(Box::new(stats))).unwrap();
        assert_eq!(wire["ports"]["vm1"]["rx_drops"]["miss_rate"], 7);
        assert_eq!(wire["ports"]["vm1"]["rx_drops"]["runt"], 0);
        for key in [
            "rx_packets",
            "rx_bytes",
            "tx_packets",
            "tx_bytes",
            "rx_forwarded",
            "rx_to_host",
            "tx_drops",
            "fast_copies",
            "host_copies",
        ] {
            assert!(wire["ports"]["vm1"].get(key).is_some(), "{key} is missing");
        }
        assert_eq!(wire["paths"], json!({"l1":0,"l2":0,"miss":0,"punt":0,"keepalive":0}));
        assert_eq!(wire["workers"], json!([]));

        let show =
            Show { ports: vec![PortShow { name: "vm1".into(), ..PortShow::default() }], ..Show::default() };
        let wire = serde_json::to_value(Response::Show(Box::new(show))).unwrap();
        assert_eq!(wire["ports"][0]["name"], "vm1");
        assert_eq!(wire["ports"][0]["link"], false);
        assert_eq!(wire["ports"][0]["state"], "waiting");
        assert_eq!(wire["flows"], json!({"explicit":0,"learned":0}));

        let wire = |response| serde_json::to_value::<Response>(response).unwrap();
        assert_eq!(wire(Response::Done(Done { ok: true })), json!({"ok":true}));
        assert_eq!(wire(Response::FlowsDeleted(FlowsDeleted { deleted: 2 })), json!({"deleted":2}));
        assert_eq!(wire(Response::Flows(Flows::default())), json!({"flows":[]}));
    }

    #[test]
    fn readers_ignore_fields_of_later_versions() {
        let stats: PortStats = serde_json::from_value(json!({"rx_packets": 3, "colour": "red"})).unwrap();
        assert_eq!(stats, PortStats { rx_packets: 3, ..PortStats::default() });
    }
}
