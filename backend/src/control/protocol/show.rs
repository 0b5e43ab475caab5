//! What `show` answers.

use super::Paths;
use crate::port_config::{KindName, Mode};
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;

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
    /// Why packets take the host path, whatever their flows do: rules of the host, or ways that are not known.
    #[serde(default)]
    pub host_path: Vec<HostPathShow>,
}

/// A reason of [`TunnelShow::host_path`].
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct HostPathShow {
    /// What the host does therefore: `encapsulate` or `decapsulate`.
    pub what: String,
    /// The reason.
    pub why: String,
    /// At how many places it is so: other ends of the tunnel, or devices by which its packets come; 0 is everywhere.
    pub places: u64,
    /// The first of them.
    pub first: Vec<String>,
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
