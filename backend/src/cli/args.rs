//! The command line of `pointwork`.

use super::nic::NicCommand;
use crate::config::DEFAULT_CONTROL;
use crate::control::protocol::{FlowSelector, FlowSource, MAX_SYNC};
use crate::port_config::{FileMode, KindName, Mode, NicPlace, PortConfig, PortTable, XdpChoice};
use clap::{Parser, Subcommand};
use std::ffi::OsString;
use std::path::PathBuf;
use std::time::Duration;

/// Talks to pointworkd: shows its ports, counters and flows, and changes them at run time.
#[derive(Debug, Parser)]
#[command(
    name = "pointwork",
    version,
    max_term_width = 100,
    arg_required_else_help = false,
    after_help = "\
Examples:
  pointwork show                                   ports, workers and warnings
  pointwork stats --watch                          packet rates, every second
  pointwork dump-flows vm1                         the flows of what vm1 sends
  pointwork add-port vm3 --socket /run/pointwork/vm3.sock --vlan 10
  pointwork set-port vm3 --workers 0,1             pin its queues to workers
  pointwork add-flow 'in_port(vm1),eth_type(0x0800),ipv4(dst=10.0.0.2)' vm2
  pointwork trace vm1 'eth(src=52:54:00:00:00:01,dst=52:54:00:00:00:02),eth_type(0x0806)'
  pointwork --json stats vm1 | jq .ports.vm1.rx_drops

Exit status: 0, or 1 with one line on standard error that says what was wrong."
)]
pub struct Args {
    /// Control socket of the daemon [env: POINTWORK_CONTROL] [default: /run/pointwork/control.sock]
    #[arg(long, global = true, value_name = "PATH")]
    pub control: Option<PathBuf>,
    /// Print the daemon's answer as JSON
    #[arg(long, global = true)]
    pub json: bool,
    /// What to do.
    #[command(subcommand)]
    pub command: Command,
}

impl Args {
    /// The control socket: as given, else by the value of `POINTWORK_CONTROL`, else where it is by default.
    pub fn control(&self, environment: Option<OsString>) -> PathBuf {
        let environment = environment.filter(|value| !value.is_empty()).map(PathBuf::from);
        self.control.clone().or(environment).unwrap_or_else(|| PathBuf::from(DEFAULT_CONTROL))
    }
}

/// What to do.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Show the daemon's ports, workers and warnings
    #[command(after_help = "\
Examples:
  pointwork show
  pointwork --json show | jq '.ports[] | select(.link | not) | .name'      ports without link
  pointwork --json show | jq '.workers[] | {id, queues}'                   who polls which queue, and why

QUEUES are those in use and those offered. A port is connected when QEMU is on its socket; its link is up when
the guest's driver runs. POLLS lists a worker's queues by port; those that are not said to be pinned (set-port)
were given to the worker that had least to do, and may move.")]
    Show,
    /// Show counters of ports, lookup paths and workers
    #[command(after_help = "\
Examples:
  pointwork stats                 everything since the daemon started
  pointwork stats vm1 --all       one port, drop reasons at zero too
  pointwork stats --watch         rates of the last second, again and again
  pointwork stats --watch 5 vm1   every 5 seconds, one port

Seen from the switch: RX is what the guest sent, TX is what it was given.
RX = FORWARDED + TO HOST + RX DROPS, and TX = by workers + from the host.
OF BUSY is a queue's share of what its worker was busy for; the rest went to updates, to what came from
representors, and to looking.")]
    Stats(StatsArgs),
    /// List flows with their counters, as `ovs-dpctl dump-flows` does
    #[command(after_help = "\
Examples:
  pointwork dump-flows                       all flows
  pointwork dump-flows vm1 --more            those of what vm1 sends, with ids and who gave them
  pointwork dump-flows --source explicit     those of add-flow

A flow that shows 'handling:punt: REASON' is executed by the host, not by a worker.")]
    DumpFlows {
        /// Only flows of what this port sends
        port: Option<String>,
        /// Only flows of this source
        #[arg(long, value_enum)]
        source: Option<FlowSource>,
        /// Show ids and sources
        #[arg(long)]
        more: bool,
    },
    /// Add a flow that is searched before learned ones
    #[command(after_help = "\
Examples:
  pointwork add-flow 'in_port(vm1),eth_type(0x0806)' 'vm2,vm3'
  pointwork add-flow 'in_port(vm1),eth_type(0x0800),ipv4(proto=6),tcp(dst=22)' drop
  pointwork add-flow 'in_port(vm2)' 'push_vlan(vid=10,pcp=0),vm1'

Match and actions are in the syntax of `ovs-dpctl`, with names for ports. A flow that needs what it does not say
(an ethertype, a protocol) is completed or refused; one that overlaps another explicit flow is refused. Flows
are kept across restarts of the daemon.")]
    AddFlow {
        /// What the flow matches
        flow: String,
        /// What is done with such packets
        actions: String,
    },
    /// Delete flows that were added with add-flow
    #[command(after_help = "\
Examples:
  pointwork del-flow 'in_port(vm1),eth_type(0x0806)'   by its match
  pointwork del-flow 3.1                               by its id (dump-flows --more)
  pointwork del-flow --all                             all explicit flows

When this returns, no worker uses the flow any more.")]
    DelFlow {
        /// The match of the flow as dump-flows shows it, or its id
        #[arg(value_name = "FLOW|ID", required_unless_present = "all", conflicts_with = "all")]
        flow: Option<String>,
        /// Delete all explicit flows
        #[arg(long)]
        all: bool,
    },
    /// Add a port for a guest, for a network device, or for a port of a NIC
    #[command(after_help = "\
Examples:
  pointwork add-port vm3 --socket /run/pointwork/vm3.sock
  pointwork add-port wire1 --kind xdp --device eth1
  pointwork add-port uplink1 --nic nic1/1
  pointwork add-port vm4 --socket /run/qemu/vm4.sock --mode client --queues 4
  pointwork add-port vm5 --socket /run/pointwork/vm5.sock --vlan 10
  pointwork add-port fw --socket /run/pointwork/fw.sock --trunks 10,20 --native-vlan 1

QEMU's side of a port in server mode (the default), for a guest with memory in a shared file:
  -object memory-backend-memfd,id=mem,size=1G,share=on -numa node,memdev=mem
  -chardev socket,id=c3,path=/run/pointwork/vm3.sock
  -netdev vhost-user,id=n3,chardev=c3 -device virtio-net-pci,netdev=n3

The port is kept across restarts of the daemon until del-port. Under Open vSwitch it is added to the bridge of the
configuration too, with its VLANs as tag, trunks and vlan_mode; the same, but for those, is done by
  ovs-vsctl add-port br0 vm3 -- set Interface vm3 external_ids:pointwork-socket=/run/pointwork/vm3.sock")]
    AddPort(AddPortArgs),
    /// Pin a port's queues to workers, or have workers chosen for them
    #[command(after_help = "\
Examples:
  pointwork set-port vm3 --workers 1          all queues to worker 1
  pointwork set-port vm3 --workers 0,1        queue 0 to worker 0, queue 1 to worker 1, queue 2 to worker 0 ...
  pointwork set-port vm3 --workers 0,0,1      queues 0 and 1 to worker 0, queue 2 to worker 1
  pointwork set-port vm3 --workers auto       pinned no longer: they may move when a worker is short of time

`pointwork show` lists the workers and which queues they poll, `pointwork stats --watch` what each queue costs them.
When this returns, the queues have moved; nothing was lost, and no flow reordered. It is kept across restarts of the
daemon. Under Open vSwitch it is external_ids:pointwork-workers of the interface. A queue that is not pinned is
polled by the worker that had least to do when its port was added, and moves from a worker that is busy for more
than 60 % of the time, one queue in 5 seconds at most, unless the configuration has rebalance = false.")]
    SetPort {
        /// The port
        name: String,
        /// Numbers of workers with commas between them, or 'auto'
        #[arg(long, value_name = "N,N|auto", value_parser = workers)]
        workers: Workers,
    },
    /// Delete a port; its guest loses its link
    #[command(after_help = "\
Examples:
  pointwork del-port vm3

When this returns, no worker uses the port any more. A port of the configuration file stays deleted when the
daemon restarts, until it is added again. Under Open vSwitch the port is deleted from its bridge, and its TAP too.")]
    DelPort {
        /// The port
        name: String,
    },
    /// Show what would happen to a packet, layer by layer; nothing is sent
    #[command(after_help = "\
Examples:
  pointwork trace vm1 'eth(src=52:54:00:00:00:01,dst=ff:ff:ff:ff:ff:ff),eth_type(0x0806)'
  pointwork trace vm1 525400000002 525400000001 0800 45000054...      the packet's bytes in hex")]
    Trace {
        /// The port that the packet comes from
        port: String,
        /// The packet: a flow in ODP syntax, or bytes in hex, spaces allowed
        #[arg(required = true, num_args = 1..)]
        packet: Vec<String>,
    },
    /// Read the source of flows in full and wait until every worker has them
    #[command(after_help = "\
Examples:
  pointwork sync               before looking at flows in a script
  pointwork sync --timeout 30")]
    Sync {
        /// Give up after this many seconds
        #[arg(long, value_name = "S", default_value = "10", value_parser = sync_timeout)]
        timeout: Duration,
    },
    /// List PCI NICs, and give them to the daemon or back to the kernel; needs no daemon
    #[command(after_help = "\
Examples:
  pointwork nic list                         which there are, and what keeps the daemon from them
  pointwork nic bind 0000:01:00.0            from the kernel's driver to vfio-pci
  pointwork nic unbind 0000:01:00.0          and back
  pointwork nic reset 0000:01:00.0           end what a NIC does for a daemon that is dead")]
    Nic {
        /// What to do.
        #[command(subcommand)]
        command: NicCommand,
    },
    /// Show the versions of this command and of the daemon
    #[command(after_help = "Examples:\n  pointwork version")]
    Version,
}

/// Workers that queues are pinned to; none: chosen automatically.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Workers(pub Vec<u16>);

fn workers(text: &str) -> Result<Workers, String> {
    if text == "auto" {
        return Ok(Workers(Vec::new()));
    }
    let numbers: Option<Vec<u16>> = text.split(',').map(|number| number.parse().ok()).collect();
    numbers
        .map(Workers)
        .ok_or_else(|| "numbers of workers expected, with commas between them, or 'auto'".into())
}

/// Arguments of `stats`.
#[derive(Debug, clap::Args)]
pub struct StatsArgs {
    /// Only this port
    pub port: Option<String>,
    /// Show rates, again every S seconds (1 if not given), until interrupted
    // A word that is no number is the port after all: `stats --watch vm1`.
    #[arg(long, value_name = "S", num_args = 0..=1, default_missing_value = "1")]
    watch: Option<String>,
    /// With --watch: stop after N times
    #[arg(long, value_name = "N", requires = "watch")]
    pub count: Option<u64>,
    /// Show drop reasons at zero too
    #[arg(long)]
    pub all: bool,
}

impl StatsArgs {
    /// The port and the interval of `--watch`; the error is one line.
    pub fn resolve(&self) -> Result<(Option<String>, Option<Duration>), String> {
        let Some(word) = &self.watch else { return Ok((self.port.clone(), None)) };
        let number = !word.is_empty() && word.bytes().all(|b| b.is_ascii_digit() || b == b'.');
        if !number && self.port.is_none() {
            return Ok((Some(word.clone()), Some(Duration::from_secs(1))));
        }
        match word.parse::<f64>() {
            Ok(seconds) if number && (0.1..=86_400.0).contains(&seconds) => {
                Ok((self.port.clone(), Some(Duration::from_secs_f64(seconds))))
            }
            _ => Err(format!("--watch {word}: must be 0.1 to 86400 seconds")),
        }
    }
}

/// Arguments of `add-port`.
#[derive(Debug, clap::Args)]
pub struct AddPortArgs {
    /// Name of the port, 15 characters at most; under Open vSwitch also of its TAP
    name: String,
    /// A guest, a network device by AF_XDP, or a port of a NIC of the configuration file [default: vhost-user]
    #[arg(long, value_enum)]
    kind: Option<KindName>,
    /// The vhost-user socket of a guest
    #[arg(long, value_name = "PATH", required_unless_present_any = ["kind", "nic"])]
    socket: Option<PathBuf>,
    /// Who listens on the socket: the daemon (server) or QEMU (client) [default: server]
    #[arg(long, value_enum)]
    mode: Option<Mode>,
    /// The network device of an xdp port [default: as the port]
    #[arg(long, value_name = "NAME")]
    device: Option<String>,
    /// How packets get from the network device [default: auto]
    #[arg(long, value_enum)]
    xdp_mode: Option<XdpChoice>,
    /// A port of a NIC: the NIC's name in the configuration file, and its number for the port
    #[arg(long, value_name = "NIC/PORT")]
    nic: Option<NicPlace>,
    /// Queue pairs, 1 to 8 [default: 1 of a guest, those that a device has]
    #[arg(long, value_name = "N")]
    queues: Option<u16>,
    /// Make it an access port of this VLAN (under Open vSwitch: its tag)
    #[arg(long, value_name = "N")]
    vlan: Option<u16>,
    /// Make it a trunk of these VLANs only, with commas between them
    #[arg(long, value_name = "N,N", value_delimiter = ',')]
    trunks: Option<Vec<u16>>,
    /// VLAN of a trunk's untagged frames
    #[arg(long, value_name = "N")]
    native_vlan: Option<u16>,
    /// MTU to tell the guest and to enforce (under Open vSwitch: its mtu_request) [default: 1500, not told]
    #[arg(long, value_name = "N")]
    mtu: Option<u16>,
    /// Group of the socket file, by name or number
    #[arg(long, value_name = "GROUP")]
    socket_group: Option<String>,
    /// Permissions of the socket file in octal [default: 0660]
    #[arg(long, value_name = "MODE")]
    socket_mode: Option<FileMode>,
    /// Masks that the port's flows may have [default: 256]
    #[arg(long, value_name = "N")]
    max_masks: Option<u32>,
    /// Packets per second that may go to the host for a decision [default: 10000]
    #[arg(long, value_name = "N")]
    miss_rate: Option<u32>,
    /// Workers to pin its queues to, in turn, as set-port does [default: auto]
    #[arg(long, value_name = "N,N|auto", value_parser = workers)]
    workers: Option<Workers>,
}

impl AddPortArgs {
    /// The port's settings, checked; the error is one line. A relative socket path is meant from here, not from where the
    /// daemon runs.
    pub fn to_config(&self) -> Result<PortConfig, String> {
        let absolute = |socket: &PathBuf| std::path::absolute(socket);
        let socket = self.socket.as_ref().map(absolute).transpose();
        let defaults = PortTable::default();
        let port = PortTable {
            name: self.name.clone(),
            kind: self.kind.or(self.nic.as_ref().map(|_| KindName::Nic)),
            socket: socket.map_err(|error| format!("--socket: {error}"))?,
            mode: self.mode,
            device: self.device.clone(),
            xdp_mode: self.xdp_mode,
            nic: self.nic.as_ref().map(|place| place.nic.clone()),
            nic_port: self.nic.as_ref().map(|place| place.port),
            queues: self.queues,
            vlan: self.vlan,
            trunks: self.trunks.clone(),
            native_vlan: self.native_vlan,
            mtu: self.mtu,
            socket_group: self.socket_group.clone(),
            socket_mode: self.socket_mode,
            max_masks: self.max_masks.unwrap_or(defaults.max_masks),
            miss_rate: self.miss_rate.unwrap_or(defaults.miss_rate),
            workers: self.workers.clone().map(|workers| workers.0).filter(|workers| !workers.is_empty()),
        };
        let port = PortConfig::try_from(port).map_err(|invalid| invalid.reason)?;
        port.validate().map_err(|invalid| invalid.reason)?;
        Ok(port)
    }
}

/// Which flows `del-flow` means: a match has parentheses, an id has none.
pub fn selector(flow: &Option<String>) -> FlowSelector {
    match flow {
        None => FlowSelector::All,
        Some(text) if text.contains('(') => FlowSelector::Flow(text.clone()),
        Some(text) => FlowSelector::Id(text.clone()),
    }
}

fn sync_timeout(text: &str) -> Result<Duration, String> {
    let seconds = text.parse::<f64>().ok().filter(|s| (0.0..=MAX_SYNC.as_secs_f64()).contains(s));
    seconds.map(Duration::from_secs_f64).ok_or_else(|| format!("must be 0 to {} seconds", MAX_SYNC.as_secs()))
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::CommandFactory;

    fn stats(words: &str) -> Result<(Option<String>, Option<Duration>), String> {
        match Args::try_parse_from(format!("pointwork stats {words}").split_whitespace()).unwrap().command {
            Command::Stats(stats) => stats.resolve(),
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn the_definition_is_consistent_and_teaches() {
        Args::command().debug_assert();
        for command in Args::command().get_subcommands() {
            let help = command.get_after_help().map(ToString::to_string).unwrap_or_default();
            let example = format!("pointwork {}", command.get_name());
            assert!(
                help.contains(&example) || help.contains("--json"),
                "{} has no example",
                command.get_name()
            );
        }
    }

    #[test]
    fn watch_takes_seconds_a_port_or_both() {
        let second = Duration::from_secs(1);
        let vm1 = || Some("vm1".to_string());
        assert_eq!(stats(""), Ok((None, None)));
        assert_eq!(stats("vm1"), Ok((vm1(), None)));
        assert_eq!(stats("--watch"), Ok((None, Some(second))));
        assert_eq!(stats("--watch vm1"), Ok((vm1(), Some(second))));
        assert_eq!(stats("vm1 --watch"), Ok((vm1(), Some(second))));
        assert_eq!(stats("--watch 2.5 vm1"), Ok((vm1(), Some(second.mul_f64(2.5)))));
        assert_eq!(stats("vm1 --watch 0"), Err("--watch 0: must be 0.1 to 86400 seconds".into()));
        stats("--watch 1.2.3").unwrap_err();
        stats("--watch vm1 vm2").unwrap_err();
        // A name that Rust reads as a number is a name.
        assert_eq!(stats("--watch 1e3"), Ok((Some("1e3".into()), Some(second))));
    }

    #[test]
    fn the_control_path_is_given_or_of_the_environment_or_default() {
        let path = |words: &[&str], env: Option<&str>| {
            Args::try_parse_from(words).unwrap().control(env.map(OsString::from))
        };
        assert_eq!(path(&["pointwork", "show"], None), PathBuf::from(DEFAULT_CONTROL));
        assert_eq!(path(&["pointwork", "show"], Some("")), PathBuf::from(DEFAULT_CONTROL));
        assert_eq!(path(&["pointwork", "show"], Some("/e")), PathBuf::from("/e"));
        assert_eq!(path(&["pointwork", "show", "--control", "/c"], Some("/e")), PathBuf::from("/c"));
        assert_eq!(path(&["pointwork", "--control", "/c", "show"], Some("/e")), PathBuf::from("/c"));
    }

    #[test]
    fn flows_are_selected_by_match_or_id() {
        assert_eq!(selector(&None), FlowSelector::All);
        assert_eq!(selector(&Some("3.1".into())), FlowSelector::Id("3.1".into()));
        assert_eq!(selector(&Some("ufid:0-1".into())), FlowSelector::Id("ufid:0-1".into()));
        assert_eq!(selector(&Some("in_port(a)".into())), FlowSelector::Flow("in_port(a)".into()));
    }
}
