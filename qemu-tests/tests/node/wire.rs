//! A device that is itself a port of the bridge, as a wire: what flows of ours carry is taken from it, all else stays the
//! kernel's.

mod classes;

use std::time::Duration;

use anyhow::{Context, Result, anyhow, ensure};
use qemu_tests::daemon::{PortStats, Stats};
use qemu_tests::host::wait_for;
use qemu_tests::tools::Ping;

use crate::bench::{Bench, DEADLINE, HOST, VM1, VM2, lost};

/// The device in the bridge, and who is at its other end.
const DEVICE: &str = "eth1";
const FAR: &str = "10.1.0.3";
/// Packets that the far end may send beside those that are counted: it looks once more for the neighbours that traffic has left.
const ASIDE: u64 = 4;
/// Longer than a flow lives without packets.
const IDLE: Duration = Duration::from_secs(14);

pub struct Wire<'a>(&'a Bench);

impl Wire<'_> {
    /// A veth pair, one end a port of the bridge, the other in a namespace of its own that leaves nothing to the hardware.
    fn lay(&self) -> Result<()> {
        self.0.node.sh(&format!(
            "ip netns add far && ip link add {DEVICE} type veth peer name eth0 netns far && \
             ip netns exec far sh -c 'echo 1 >/proc/sys/net/ipv6/conf/eth0/disable_ipv6' && \
             echo 1 >/proc/sys/net/ipv6/conf/{DEVICE}/disable_ipv6 && ip link set {DEVICE} up && \
             ip netns exec far ethtool -K eth0 tx off txvlan off tx-vlan-stag-hw-insert off && \
             ip -n far address add {FAR}/24 dev eth0 && ip -n far link set eth0 up"
        ))?;
        self.0.vsctl(&format!("add-port br0 {DEVICE}"))?;
        self.0.node.sh("ip netns exec far iperf3 -s -D -I /run/far.pid").map(drop)
    }

    /// A wire whose tags are seen, which may not be open.
    pub fn lay_open(bench: &'_ Bench) -> Result<Wire<'_>> {
        let wire = Wire(bench);
        wire.lay()?;
        classes::set_tags(&wire, "off", "off")?;
        bench.vsctl(&format!("set interface {DEVICE} external_ids:pointwork-device={DEVICE}"))?;
        Ok(wire)
    }

    /// Why its device is not open.
    pub fn wait_fault(&self) -> Result<String> {
        wait_for("a fault", DEADLINE, || {
            let show = self.0.pointwork("show")?;
            let ports = show["ports"].as_array().context("no ports")?;
            let port = ports.iter().find(|port| port["name"] == DEVICE);
            Ok(port.and_then(|port| port["fault"].as_str()).map(str::to_owned))
        })
    }

    /// Waits until classes are taken of it, and how many.
    pub fn wait_taking(&self) -> Result<usize> {
        self.wait_classes("the wire", |_| true)?;
        self.wait_reachable(VM1)?;
        self.wait_classes("a class", |classes| classes > 0)
    }

    pub fn take_up(&self) -> Result<()> {
        self.0.node.sh("kill $(cat /run/far.pid) && ip netns delete far")?;
        self.0.vsctl(&format!("del-port br0 {DEVICE}")).map(drop)
    }

    fn ping(&self, to: &str, count: u32) -> Result<Ping> {
        let command = format!("ip netns exec far ping -n -q -c {count} -i 0.05 -W 2 {to}");
        let output = self.0.node.run(&command, DEADLINE)?;
        Ping::parse(&output.stdout).with_context(|| format!("{output:?}"))
    }

    fn wait_reachable(&self, to: &str) -> Result<()> {
        wait_for(&format!("far to reach {to}"), DEADLINE, || {
            Ok(self.ping(to, 2).is_ok_and(|ping| ping.lost() == 0).then_some(()))
        })
    }

    /// How many classes are taken from the device, once it is open.
    fn classes(&self) -> Result<Option<usize>> {
        let show = self.0.pointwork("show")?;
        let ports = show["ports"].as_array().context("no ports")?;
        let Some(port) = ports.iter().find(|port| port["name"] == DEVICE && port["link"] == true) else {
            return Ok(None);
        };
        let features = port["features"].as_array().context("no features")?;
        let count = |feature: &serde_json::Value| feature.as_str()?.strip_prefix("classes=")?.parse().ok();
        features.iter().find_map(count).context("no classes").map(Some)
    }

    fn wait_classes(&self, what: &str, wanted: impl Fn(usize) -> bool) -> Result<usize> {
        wait_for(what, DEADLINE, || Ok(self.classes()?.filter(|classes| wanted(*classes))))
            .with_context(|| format!("{:#?}\n{}", self.0.flows(), self.0.warnings().unwrap_or_default()))
    }

    fn counters(&self) -> Result<PortStats> {
        self.0.stats()?.ports.remove(DEVICE).context("no such port")
    }

    /// Packets that are taken from the device while something is done.
    fn taken(&self, what: impl FnOnce() -> Result<()>) -> Result<u64> {
        let before = self.counters()?.rx_packets;
        what()?;
        Ok(self.counters()?.rx_packets - before)
    }

    /// Echo requests that have reached `vm1`.
    fn echoes(&self) -> Result<u64> {
        self.echoes_at("vm1")
    }

    fn echoes_at(&self, guest: &str) -> Result<u64> {
        let snmp = self.0.node.sh(&format!("ip netns exec {guest} cat /proc/net/snmp"))?;
        let mut lines = snmp.lines().filter_map(|line| line.strip_prefix("Icmp: "));
        let (names, values) = (lines.next().context("no names")?, lines.next().context("no values")?);
        let at = names.split(' ').position(|name| name == "InEchos").context("no InEchos")?;
        Ok(values.split(' ').nth(at).context("no value")?.parse()?)
    }

    /// Takes steps, one after another, and adds what was seen.
    fn see(&self, steps: &[Step], seen: &mut Vec<String>) -> Result<()> {
        for (what, step) in steps {
            let outcome = step(self);
            seen.push(outcome.map_err(|e| anyhow!("{what}: {e:#}\n{:#?}", self.0.flows()))?);
        }
        Ok(())
    }

    fn balanced(&self) -> Result<Stats> {
        wait_for("the counters to balance", DEADLINE, || {
            let stats = self.0.stats()?;
            Ok(stats.imbalance().is_none().then_some(stats))
        })
        .with_context(|| format!("{:#?}", self.0.stats()))
    }
}

/// A step of the check, and what it is called.
type Step = (&'static str, fn(&Wire) -> Result<String>);

/// What is seen of the wire, one after another.
const STEPS: &[Step] = &[
    ("fast", fast),
    ("the kernel's own", kernels_own),
    ("misses", misses),
    ("tagged", classes::tagged),
    ("tags beside packets", classes::beside),
    ("an ethertype", classes::ethertype),
    ("kept alive", kept_alive),
    ("policy", policy),
    ("restart", restart),
    ("generic mode", generic),
];

/// What is seen again where the kernel runs the program.
const GENERIC: &[Step] = &[
    ("fast", fast),
    ("tagged", classes::tagged),
    ("tags beside packets", classes::beside),
    ("an ethertype", classes::ethertype),
];

/// The check: what a device of the bridge is when it becomes a wire, and when it is none any more.
pub fn device_of_the_bridge(bench: &Bench) -> Result<String> {
    let wire = Wire(bench);
    wire.lay()?;
    wire.wait_reachable(VM1)?;
    let program = bench.node.program("pointwork");
    let refused =
        bench.node.run(&format!("{program} add-port wire1 --kind xdp --device {DEVICE} 2>&1"), DEADLINE)?;
    ensure!(refused.status != 0 && refused.stdout.contains("has the name of its device"), "{refused:?}");
    bench.vsctl(&format!("set interface {DEVICE} external_ids:pointwork-device={DEVICE}"))?;
    wire.wait_classes("the wire", |_| true)?;

    let mut seen = vec![classes::unseen(&wire)?];
    wire.see(STEPS, &mut seen)?;

    // It is deleted here, and stays in the bridge.
    wire.wait_reachable(VM1)?;
    bench.pointwork(&format!("del-port {DEVICE}"))?;
    let ids = bench.vsctl(&format!("get interface {DEVICE} external_ids"))?;
    ensure!(!ids.contains("pointwork") && bench.vsctl("list-ports br0")?.contains(DEVICE), "{ids}");
    wire.wait_reachable(VM1)?;
    ensure!(wire.classes()?.is_none(), "it is still there");
    let features = bench.node.sh(&format!("ip link show {DEVICE}"))?;
    ensure!(!features.contains("xdp"), "{features}");
    // And it can be had again, and go with its port of the bridge.
    bench.pointwork(&format!("add-port {DEVICE} --kind xdp"))?;
    wire.wait_classes("the wire again", |_| true)?;
    wire.take_up()?;
    wait_for("the wire to go", DEADLINE, || Ok(wire.classes()?.is_none().then_some(())))?;
    wire.balanced()?;
    Ok(seen.join("; "))
}

/// Packets between a guest and the far end pass the kernel's datapath in neither direction.
fn fast(wire: &Wire) -> Result<String> {
    wire.wait_reachable(VM1)?;
    wire.wait_classes("a class", |classes| classes > 0)?;
    let before = (wire.counters()?, wire.0.stats()?.ports["vm1"].fast_copies);
    let there = wire.0.iperf3("vm1", FAR, "")?;
    let back = wire.0.iperf3("vm1", FAR, "-R")?;
    let udp = wire.0.iperf3("vm1", FAR, "-u -b 2M")?;
    let udp_back = wire.0.iperf3("vm1", FAR, "-u -b 2M -R")?;
    let stats = wire.balanced()?;
    let (after, sent) = (&stats.ports[DEVICE], stats.ports["vm1"].fast_copies - before.1);
    let (copies, host) = (after.fast_copies - before.0.fast_copies, after.rx_to_host - before.0.rx_to_host);
    ensure!(copies > 1000 && copies > 50 * host, "from the device: {copies} fast, {host} by the host");
    ensure!(sent > 1000 && after.tx_packets - before.0.tx_packets > 1000, "to the device: {sent} fast");
    for report in [udp, udp_back] {
        let (lost, sent) = report.datagrams.context("not UDP")?;
        ensure!(sent > 200 && lost * 4 < sent, "{lost} of {sent} datagrams lost");
    }
    let mode = wire.0.pointwork("show")?["ports"]
        .as_array()
        .and_then(|ports| {
            ports.iter().find(|port| port["name"] == DEVICE).map(|port| port["features"].to_string())
        })
        .unwrap_or_default();
    Ok(format!(
        "{mode}: {:.0} and {:.0} Mbit/s, {copies} copies from the device and {sent} from the guest fast, {host} by the host",
        there.megabits(),
        back.megabits()
    ))
}

/// What has no fast flow never leaves the kernel.
fn kernels_own(wire: &Wire) -> Result<String> {
    wire.wait_reachable(HOST)?;
    let before = wire.counters()?.rx_packets;
    let ping = wire.ping(HOST, 40)?;
    let taken = wire.counters()?.rx_packets - before;
    ensure!(ping.lost() == 0 && taken <= ASIDE, "{ping}, {taken} packets taken");
    Ok(format!("{} to the host and {taken} taken", ping.sent))
}

/// A packet of a class without a flow of its own arrives once.
fn misses(wire: &Wire) -> Result<String> {
    const SENDERS: u64 = 10;
    let node = &wire.0.node;
    let mac = node.sh("ip netns exec far cat /sys/class/net/eth0/address")?;
    let neighbour = |mac: &str| {
        node.sh(&format!(
            "ip -n far link set eth0 address {mac} && ip -n vm1 neighbour replace {FAR} lladdr {mac} dev eth0 && \
             ip -n far neighbour replace {VM1} lladdr 02:00:00:00:00:01 dev eth0"
        ))
    };
    wire.wait_reachable(VM1)?;
    wire.wait_classes("a class", |classes| classes > 0)?;
    let before = (wire.echoes()?, wire.counters()?);
    for sender in 1..=SENDERS {
        // Flows are of one sender each.
        neighbour(&format!("02:00:00:00:03:{sender:02x}"))?;
        let ping = wire.ping(VM1, 1)?;
        ensure!(ping.lost() == 0, "{ping}");
    }
    // A second one would be behind the answer to the first.
    let ping = wire.ping(VM1, 1)?;
    let (echoes, after) = (wire.echoes()? - before.0, wire.counters()?);
    ensure!(ping.lost() == 0 && echoes == SENDERS + 1, "{echoes} requests for {} sent", SENDERS + 1);
    let host = after.rx_to_host - before.1.rx_to_host;
    ensure!(host >= SENDERS, "{host} packets have missed");
    ensure!(after.rx_drops == before.1.rx_drops, "{after:?}");
    neighbour(mac.trim())?;
    node.sh(&format!(
        "ip -n vm1 neighbour delete {FAR} dev eth0 && ip -n far neighbour delete {VM1} dev eth0"
    ))?;
    Ok(format!("{host} misses, each once"))
}

/// A flow from the device lives on by the packets that are given back.
fn kept_alive(wire: &Wire) -> Result<String> {
    let mac = wire.0.node.sh("ip netns exec far cat /sys/class/net/eth0/address")?;
    let addresses = format!("in_port({DEVICE}),eth(src={},dst=02:00:00:00:00:01)", mac.trim());
    let from_device = || -> Result<Option<String>> {
        let is_it = |(_, handling, flow): &(String, String, String)| {
            handling == "fast" && flow.contains(&addresses) && flow.contains("eth_type(0x0800)")
        };
        Ok(wire.0.flows()?.into_iter().find(is_it).map(|(ufid, ..)| ufid))
    };
    let job = wire.0.node.spawn(&format!("ip netns exec far ping -n -q -i 0.1 {VM1}"))?;
    let before = wait_for("a flow from the device", DEADLINE, from_device)?;
    let misses = wire.0.paths()?;
    std::thread::sleep(IDLE);
    let after = wire.0.paths()?;
    let (sent, unanswered) = lost(job)?;
    ensure!(unanswered == 0, "{unanswered} of {sent} lost");
    ensure!(from_device()?.as_ref() == Some(&before), "the flow has not lived");
    let kept = after.keepalive - misses.keepalive;
    ensure!(kept >= 4, "{kept} keep-alives");
    Ok(format!("{kept} keep-alives"))
}

/// A rule acts within a second, and a class goes with its flows.
fn policy(wire: &Wire) -> Result<String> {
    let bench = wire.0;
    let job = bench.node.spawn(&format!("ip netns exec far ping -n -q -i 0.01 {VM1}"))?;
    let moves = || {
        let before = wire.echoes()?;
        wait_for("traffic", DEADLINE, || Ok((wire.echoes()? > before + 50).then_some(())))
    };
    moves()?;
    let rule = format!("ip,nw_src={FAR},nw_dst={VM1}");
    bench.node.sh(&format!("ovs-ofctl add-flow br0 priority=100,{rule},actions=drop"))?;
    std::thread::sleep(Duration::from_secs(1));
    let before = wire.echoes()?;
    std::thread::sleep(Duration::from_secs(1));
    let leaked = wire.echoes()? - before;
    ensure!(leaked == 0, "{leaked} packets after a second");
    bench.node.sh(&format!("ovs-ofctl --strict del-flows br0 priority=100,{rule}"))?;
    moves()?;
    let taken = wire.wait_classes("a class", |classes| classes > 0)?;
    lost(job)?;
    bench.node.sh("ovs-appctl --timeout=10 revalidator/purge")?;
    let begin = std::time::Instant::now();
    wire.wait_classes("the classes to go", |classes| classes == 0)?;
    let took = begin.elapsed().as_secs_f64();
    // What restricts the device keeps its packets in the kernel.
    bench.vsctl(&format!("set interface {DEVICE} ingress_policing_rate=100000"))?;
    bench.wait_warning("port 'eth1': ingress policing: what it receives stays the kernel's", true)?;
    wire.wait_reachable(VM1)?;
    let rx = wire.counters()?.rx_packets;
    let ping = wire.ping(VM1, 20)?;
    ensure!(ping.lost() == 0 && wire.counters()?.rx_packets == rx, "{ping}");
    bench.vsctl(&format!("set interface {DEVICE} ingress_policing_rate=0"))?;
    bench.wait_warning("stays the kernel's", false)?;
    Ok(format!("{taken} classes gone after {took:.1} s"))
}

/// Without us the kernel has it all; started again we find the port in the database.
fn restart(wire: &Wire) -> Result<String> {
    let bench = wire.0;
    wire.wait_reachable(HOST)?;
    let job = bench.node.spawn(&format!("ip netns exec far ping -n -q -i 0.05 {HOST}"))?;
    // Its sockets at the device take a moment to end, and it has its state until then.
    bench.stop_pointworkd()?;
    bench.start_pointworkd()?;
    wire.wait_classes("the wire", |_| true)?;
    wire.wait_reachable(VM1)?;
    wire.wait_classes("a class", |classes| classes > 0)?;
    let (sent, unanswered) = lost(job)?;
    ensure!(unanswered * 10 <= sent, "{unanswered} of {sent} lost");
    Ok(format!("{unanswered} of {sent} to the host lost in a restart"))
}

/// The same where the driver does not run the program.
fn generic(wire: &Wire) -> Result<String> {
    let bench = wire.0;
    bench.vsctl(&format!("set interface {DEVICE} external_ids:pointwork-xdp-mode=generic"))?;
    wait_for("generic mode", DEADLINE, || {
        Ok(bench.node.sh(&format!("ip link show {DEVICE}"))?.contains("xdpgeneric").then_some(()))
    })?;
    wire.wait_classes("the wire", |_| true)?;
    let mut seen = Vec::new();
    wire.see(GENERIC, &mut seen)?;
    bench.vsctl(&format!("remove interface {DEVICE} external_ids pointwork-xdp-mode"))?;
    wait_for("native mode", DEADLINE, || {
        let shown = bench.node.sh(&format!("ip link show {DEVICE}"))?;
        Ok((shown.contains("xdp") && !shown.contains("xdpgeneric")).then_some(()))
    })?;
    wire.wait_classes("the wire", |_| true)?;
    Ok(format!("generic mode: {}", seen.join("; ")))
}
