//! The switches that are compared, each with a way to load it and to ask what a packet cost it.

use std::collections::BTreeMap;
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use qemu_tests::daemon::{Daemon, DaemonConfig, Paths, PortConfig, WorkerStats};
use qemu_tests::host::{WorkDir, wait_for};
use qemu_tests::load::{Rules, Socket};
use qemu_tests::overlay::{self, Kind, Site, TUNNEL, UNDERLAY, add_underlay, set_tunnel};
use qemu_tests::ovs::{BRIDGE, Ovs};
use qemu_tests::testpmd;

use crate::rows::Row;

const PORTS: [&str; 2] = ["p1", "p2"];
const WAYS: [[usize; 2]; 2] = [[0, 1], [1, 0]];
const DEADLINE: Duration = Duration::from_secs(30);
/// Megabytes of hugepages for Open vSwitch, and for testpmd. Open vSwitch tries to have 262,144 packet buffers first: with less,
/// it runs out of memory for a moment, in which a port that connects is refused.
const OVS_MEMORY: u32 = 1024;
const TESTPMD_MEMORY: u32 = 256;
/// An MTU for 1518 bytes in any tunnel.
const TUNNEL_MTU: u16 = 1800;

/// What a switch says of its polling thread, over some time.
#[derive(Clone, Debug, Default)]
pub struct Spent {
    /// Packets.
    pub packets: u64,
    /// Cycles in which it had something to do.
    pub busy_cycles: u64,
    /// Cycles in which it had not, if it says so.
    pub idle_cycles: Option<u64>,
    /// Flows in the exact-match table, if it says so.
    pub l1_flows: Option<u64>,
    /// The share of packets whose flow came from the masked table, if it says so.
    pub masked_share: Option<f64>,
    /// What else it counts.
    pub more: BTreeMap<String, f64>,
}

/// A switch under test: started, loaded, asked, and ended when dropped.
pub trait Switch {
    /// Where the load's ports are.
    fn sockets(&self) -> Vec<Socket>;
    /// The rules that it was given, as it was given them.
    fn rules(&self) -> &[String];
    /// Its process.
    fn pid(&self) -> Result<u32>;
    /// From now on its time counts.
    fn begin(&mut self) -> Result<()>;
    /// What it did since.
    fn end(&mut self) -> Result<Spent>;
    /// Its last words.
    fn log(&self) -> String;
}

/// A tunnel from this node, [`Site`] 1, to another, from the guest's port (the first) by the uplink (the second): what both
/// switches are told alike. Gives the commands.
fn lay_tunnel(ovs: &Ovs, kind: Kind) -> Result<Vec<String>> {
    let there = Site(2);
    set_tunnel(ovs, kind, there.v4().into(), &[])?;
    // The other end is a load: it answers nobody.
    let neighbour = ["tnl/neigh/set", UNDERLAY, &there.v4().to_string(), &overlay::text(there.mac())];
    ovs.appctl(&neighbour)?;
    let [guest, uplink] = PORTS;
    let rules = [
        (BRIDGE, format!("in_port={guest},actions={TUNNEL}")),
        (UNDERLAY, format!("in_port=LOCAL,actions={uplink}")),
        (UNDERLAY, format!("in_port={uplink},actions=LOCAL")),
        (BRIDGE, format!("in_port={TUNNEL},actions={guest}")),
    ];
    for (bridge, rule) in &rules {
        ovs.ofctl(&["add-flow", bridge, rule])?;
    }
    let mut commands: Vec<String> =
        rules.map(|(bridge, rule)| format!("ovs-ofctl add-flow {bridge} '{rule}'")).into();
    // A half of them is for each direction.
    let tunnel = format!("type={kind} options:remote_ip={} options:key={}", there.v4(), overlay::VNI);
    commands.insert(0, format!("ovs-vsctl add-port {BRIDGE} {TUNNEL} -- set interface {TUNNEL} {tunnel}"));
    commands.push(format!("ovs-appctl {}", neighbour.join(" ")));
    Ok(commands)
}

/// `pointworkd`, started for one row.
pub struct Pointwork {
    daemon: Daemon,
    /// Makes its flows, where there is a tunnel; ends after it.
    ovs: Option<Ovs>,
    sockets: Vec<Socket>,
    rules: Vec<String>,
    before: (WorkerStats, Paths),
}

impl Pointwork {
    pub fn start(row: &Row, cpu: usize, dir: &WorkDir) -> Result<Self> {
        if let Some((kind, _)) = row.tunnel {
            return Self::tunnel(kind, cpu, dir);
        }
        let mut switch = Self::bridge(cpu, Some(row.table()), dir)?;
        for ways in WAYS {
            let names = ways.map(|port| PORTS[port]);
            for (flow, actions) in row.rules.pointwork(names, ways.map(|port| port as u8), &row.traffic) {
                switch.daemon.ctl(&["add-flow", &flow, &actions])?;
                switch.rules.push(format!("pointwork add-flow '{flow}' '{actions}'"));
            }
        }
        Ok(switch)
    }

    /// As it comes: its embedded bridge decides.
    pub fn bridge(cpu: usize, l1_entries: Option<usize>, dir: &WorkDir) -> Result<Self> {
        // An MTU that counts no Ethernet header; Open vSwitch lets frames of 1518 bytes pass at 1500.
        let ports = PORTS.map(|name| PortConfig::server(name, dir).with("mtu = 1504"));
        let sockets = ports.iter().map(|port| Socket::connect(&port.socket)).collect();
        let config = DaemonConfig { cpus: vec![cpu], l1_entries, ..DaemonConfig::new(ports) };
        let daemon = Daemon::start(&config, dir)?;
        Ok(Self { daemon, ovs: None, sockets, rules: Vec::new(), before: Default::default() })
    }

    /// Under a stock Open vSwitch with its userspace datapath, which has a tunnel.
    fn tunnel(kind: Kind, cpu: usize, dir: &WorkDir) -> Result<Self> {
        let ovs = Ovs::start(dir)?;
        add_underlay(&ovs, Site(1), TUNNEL_MTU)?;
        let config = DaemonConfig { cpus: vec![cpu], ..DaemonConfig::under(&ovs, []) };
        let daemon = Daemon::start(&config, dir)?;
        let mtu = format!("mtu_request={TUNNEL_MTU}");
        let mut sockets = Vec::new();
        for (bridge, name) in [BRIDGE, UNDERLAY].into_iter().zip(PORTS) {
            let path = dir.path(&format!("{name}.sock"));
            let socket = format!("external_ids:pointwork-socket={}", path.display());
            ovs.vsctl(&["add-port", bridge, name, "--", "set", "interface", name, &socket, &mtu])?;
            ovs.vsctl(&["wait-until", "interface", name, "ofport>0"])?;
            sockets.push(Socket::connect(path));
        }
        let rules = lay_tunnel(&ovs, kind)?;
        Ok(Self { daemon, ovs: Some(ovs), sockets, rules, before: Default::default() })
    }

    fn stats(&self) -> Result<(WorkerStats, Paths)> {
        let stats = self.daemon.stats()?;
        Ok((stats.workers.into_iter().next().context("no worker")?, stats.paths))
    }
}

impl Switch for Pointwork {
    fn sockets(&self) -> Vec<Socket> {
        self.sockets.clone()
    }

    fn rules(&self) -> &[String] {
        &self.rules
    }

    fn pid(&self) -> Result<u32> {
        Ok(self.daemon.pid())
    }

    fn begin(&mut self) -> Result<()> {
        if self.ovs.is_some() {
            // Its flows are read some time after their first packets.
            wait_for("workers to carry the load", DEADLINE, || {
                let (then, paths_then) = self.stats()?;
                std::thread::sleep(Duration::from_millis(100));
                let (now, paths) = self.stats()?;
                let fast = paths.l1 + paths.l2 - paths_then.l1 - paths_then.l2;
                let packets = now.packets - then.packets;
                Ok((packets > 0 && fast * 100 >= packets * 99).then_some(()))
            })?;
        }
        self.before = self.stats()?;
        Ok(())
    }

    fn end(&mut self) -> Result<Spent> {
        let ((then, paths_then), (now, paths)) = (&self.before, self.stats()?);
        let bursts = (now.bursts - then.bursts).max(1);
        let packets = now.packets - then.packets;
        let (l1, l2) = (paths.l1 - paths_then.l1, paths.l2 - paths_then.l2);
        let share = |of: u64| of as f64 / packets.max(1) as f64;
        let more = [
            ("packets a burst", packets as f64 / bursts as f64),
            ("share of l1 hits", share(l1)),
            ("share of l2 hits", share(l2)),
        ];
        Ok(Spent {
            packets,
            busy_cycles: now.busy_cycles - then.busy_cycles,
            idle_cycles: Some(now.idle_cycles - then.idle_cycles),
            l1_flows: Some(now.l1_entries),
            masked_share: Some(share(l2)),
            more: more.map(|(name, value)| (name.to_owned(), value)).into(),
        })
    }

    fn log(&self) -> String {
        self.daemon.log_tail(20)
    }
}

/// Open vSwitch with DPDK. It takes long to start, so it stays, and is halted while others are measured.
pub struct OvsDpdk {
    ovs: Ovs,
    dir: WorkDir,
    tso: bool,
    tunnel: Option<Kind>,
    rules: Vec<String>,
}

impl OvsDpdk {
    /// With or without `userspace-tso-enable`; with a tunnel, the second port is the uplink.
    pub fn start(tso: bool, tunnel: Option<Kind>, cpu: usize) -> Result<Self> {
        let dir = WorkDir::new()?;
        let settings = [
            // All memory is its own, without files: nothing stays behind, and none is left to take for others.
            "dpdk-extra=\"--in-memory --no-pci --no-telemetry\"".to_owned(),
            format!("dpdk-socket-mem=\"{OVS_MEMORY}\""),
            format!("dpdk-socket-limit=\"{OVS_MEMORY}\""),
            format!("pmd-cpu-mask={:#x}", 1u64 << cpu),
            format!("userspace-tso-enable={tso}"),
        ];
        let settings: Vec<&str> = settings.iter().map(String::as_str).collect();
        let ovs = Ovs::start_dpdk(&dir, &settings)?;
        let mtu = format!("mtu_request={TUNNEL_MTU}");
        if tunnel.is_some() {
            add_underlay(&ovs, Site(1), TUNNEL_MTU)?;
        }
        for (index, name) in PORTS.into_iter().enumerate() {
            let bridge = if tunnel.is_some() && index == 1 { UNDERLAY } else { BRIDGE };
            let path = format!("options:vhost-server-path={}", dir.path(name).display());
            let number = format!("ofport_request={}", index + 1);
            let words =
                ["add-port", bridge, name, "--", "set", "Interface", name, "type=dpdkvhostuserclient"];
            let more = [&*path, &number, &mtu];
            ovs.vsctl(&[&words[..], &more[..if tunnel.is_some() { 3 } else { 2 }]].concat())?;
        }
        Ok(Self { ovs, dir, tso, tunnel, rules: Vec::new() })
    }

    /// Whether it is set up as this row needs it.
    pub fn suits(&self, row: &Row) -> bool {
        self.tso == row.needs_tso() && self.tunnel == row.tunnel.map(|(kind, _)| kind)
    }

    /// Goes on, if it was halted, with the rules of this row.
    pub fn resume(&mut self, row: &Row) -> Result<()> {
        if let Some(kind) = self.tunnel {
            self.ovs.pause(false)?;
            self.rules = lay_tunnel(&self.ovs, kind)?;
            return self.ovs.appctl(&["revalidator/purge"]).map(drop);
        }
        let rules = WAYS.iter().flat_map(|ways| {
            let numbers = ways.map(|port| port as u32 + 1);
            row.rules.openflow(numbers, ways.map(|port| port as u8), &row.traffic)
        });
        self.go_on(rules.collect())
    }

    /// Goes on as a learning switch, as it comes.
    pub fn resume_normal(&mut self) -> Result<()> {
        self.go_on(vec!["actions=NORMAL".to_owned()])
    }

    fn go_on(&mut self, rules: Vec<String>) -> Result<()> {
        self.ovs.pause(false)?;
        self.ovs.ofctl(&["del-flows", BRIDGE])?;
        self.rules.clear();
        for rule in rules {
            self.ovs.ofctl(&["add-flow", BRIDGE, &rule])?;
            self.rules.push(format!("ovs-ofctl add-flow {BRIDGE} '{rule}'"));
        }
        // What the last row has left in the datapath.
        self.ovs.appctl(&["revalidator/purge"])?;
        Ok(())
    }

    /// Takes no more cycles until it goes on (`false`).
    pub fn pause(&self, pause: bool) -> Result<()> {
        self.ovs.pause(pause)
    }
}

impl Switch for OvsDpdk {
    fn sockets(&self) -> Vec<Socket> {
        PORTS.map(|name| Socket::listen(self.dir.path(name))).into()
    }

    fn rules(&self) -> &[String] {
        &self.rules
    }

    fn pid(&self) -> Result<u32> {
        self.ovs.pid()
    }

    fn begin(&mut self) -> Result<()> {
        self.ovs.appctl(&["dpif-netdev/pmd-stats-clear"]).map(drop)
    }

    fn end(&mut self) -> Result<Spent> {
        let text = self.ovs.appctl(&["dpif-netdev/pmd-stats-show"])?;
        pmd_stats(&text).with_context(|| format!("pmd-stats-show: {text}"))
    }

    fn log(&self) -> String {
        qemu_tests::host::tail(&self.dir.path("ovs-vswitchd-dpdk.log"), 20)
    }
}

/// Reads what `pmd-stats-show` says of the only polling thread.
fn pmd_stats(text: &str) -> Result<Spent> {
    let (_, thread) = text.split_once("pmd thread").context("no polling thread")?;
    // Lines of the main thread may follow.
    let lines = thread.lines().skip(1).take_while(|line| line.starts_with("  "));
    let values: BTreeMap<&str, f64> = lines
        .filter_map(|line| {
            let (name, value) = line.trim().split_once(": ")?;
            Some((name, value.split_whitespace().next()?.parse().ok()?))
        })
        .collect();
    let value = |name: &str| values.get(name).copied().with_context(|| format!("no '{name}'"));
    let mut more = BTreeMap::new();
    for name in [
        "simple match hits",
        "emc hits",
        "smc hits",
        "megaflow hits",
        "avg. subtable lookups per megaflow hit",
        "avg. packets per output batch",
    ] {
        if let Some(&value) = values.get(name) {
            more.insert(name.to_owned(), value);
        }
    }
    Ok(Spent {
        packets: value("packets received")? as u64,
        busy_cycles: value("processing cycles")? as u64,
        idle_cycles: Some(value("idle cycles")? as u64),
        l1_flows: None,
        masked_share: None,
        more,
    })
}

/// `dpdk-testpmd`, which sends on from port to port whatever comes, started for one row: DPDK's vhost library alone.
pub struct Testpmd {
    program: testpmd::Testpmd,
    sockets: Vec<Socket>,
}

impl Testpmd {
    /// Whether it is installed.
    pub fn is_available() -> bool {
        testpmd::Testpmd::is_available()
    }

    /// Whether it can do what the row asks for.
    pub fn suits(row: &Row) -> bool {
        row.rules == Rules::Port && row.tunnel.is_none()
    }

    pub fn start(cpus: [usize; 2], dir: &WorkDir) -> Result<Self> {
        let paths = PORTS.map(|name| dir.path(name));
        let [load, switch] = cpus;
        let mut environment = vec![
            format!("--lcores={load},{switch}"),
            format!("--main-lcore={load}"),
            "--in-memory".to_owned(),
            "-m".to_owned(),
            TESTPMD_MEMORY.to_string(),
        ];
        for (index, path) in paths.iter().enumerate() {
            environment.push(format!("--vdev=net_vhost{index},iface={}", path.display()));
        }
        let own = [
            "--auto-start",
            "--forward-mode=io",
            "--nb-cores=1",
            "--record-core-cycles",
            "--disable-link-check",
            "--total-num-mbufs=16384",
            "--mbuf-size=2176",
        ]
        .map(str::to_owned);
        let mut program = testpmd::Testpmd::start(&environment, &own, dir)?;
        wait_for("dpdk-testpmd to listen", DEADLINE, || {
            program.check()?;
            Ok(paths.iter().all(|path| path.exists()).then_some(()))
        })?;
        let sockets = paths.iter().map(Socket::connect).collect();
        Ok(Self { program, sockets })
    }
}

impl Switch for Testpmd {
    fn sockets(&self) -> Vec<Socket> {
        self.sockets.clone()
    }

    fn rules(&self) -> &[String] {
        &[]
    }

    fn pid(&self) -> Result<u32> {
        Ok(self.program.pid())
    }

    fn begin(&mut self) -> Result<()> {
        self.program.command("clear fwd stats all")
    }

    fn end(&mut self) -> Result<Spent> {
        self.program.command("show fwd stats all")?;
        wait_for("the statistics of dpdk-testpmd", DEADLINE, || {
            self.program.check()?;
            Ok(core_cycles(&self.program.log_tail(40)))
        })
    }

    fn log(&self) -> String {
        self.program.log_tail(20)
    }
}

/// Reads what `show fwd stats all` ends with: `CPU cycles/packet=… (total cycles=… / total RX packets=…) at … MHz Clock`.
fn core_cycles(log: &str) -> Option<Spent> {
    let line = log.lines().rev().find(|line| line.contains("CPU cycles/packet="))?;
    let number = |name: &str| -> Option<u64> {
        let (_, digits) = line.split_once(name)?;
        digits.split(|c: char| !c.is_ascii_digit()).next()?.parse().ok()
    };
    let (busy_cycles, packets) = (number("total cycles=")?, number("packets=")?);
    Some(Spent { packets, busy_cycles, ..Spent::default() })
}

/// Which processors load and switch have: the last two that we may use.
pub fn processors() -> Result<[usize; 2]> {
    let set = rustix::thread::sched_getaffinity(None)?;
    let cpus: Vec<usize> = (0..rustix::thread::CpuSet::MAX_CPU).filter(|&cpu| set.is_set(cpu)).collect();
    match cpus[..] {
        [.., load, switch] if switch < 64 => Ok([load, switch]),
        [.., _, switch] => bail!("processor {switch}: choose two below 64 with taskset"),
        _ => bail!("two processors are needed"),
    }
}

/// Keeps this thread, and what it starts from now on, off the switch's processor.
pub fn leave(cpu: usize) -> Result<()> {
    let mut set = rustix::thread::sched_getaffinity(None)?;
    set.unset(cpu);
    ensure!(set.count() > 0, "no processor is left");
    Ok(rustix::thread::sched_setaffinity(None, &set)?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_the_polling_thread_of_ovs_says_is_read() {
        let text = "pmd thread numa_id 0 core_id 1:\n  packets received: 2000\n  packet recirculations: 0\n  \
                    emc hits: 1500\n  megaflow hits: 500\n  avg. subtable lookups per megaflow hit: 1.50\n  \
                    idle cycles: 100 (10.00%)\n  processing cycles: 900 (90.00%)\n  \
                    avg cycles per packet: 0.50 (1000/2000)\nmain thread:\n  packets received: 7\n";
        let spent = pmd_stats(text).unwrap();
        assert_eq!((spent.packets, spent.busy_cycles, spent.idle_cycles), (2000, 900, Some(100)));
        assert_eq!(spent.more["emc hits"], 1500.0);
        assert_eq!(spent.more["avg. subtable lookups per megaflow hit"], 1.5);
        assert!(pmd_stats("main thread:\n  packets received: 7\n").is_err());
    }

    #[test]
    fn what_testpmd_says_last_is_read() {
        let line = |cycles| {
            format!(
                "  CPU cycles/packet=2.00 (total cycles={cycles} / total RX packets=20) at 2596 MHz Clock\n"
            )
        };
        let spent = core_cycles(&format!("{}{}testpmd> ", line(30), line(40))).unwrap();
        assert_eq!((spent.busy_cycles, spent.packets), (40, 20));
        assert!(core_cycles("testpmd> ").is_none());
    }
}
