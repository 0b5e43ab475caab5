//! How a flow climbs from Open vSwitch into a NIC: a node with an IOMMU, a switch of QEMU's on real VFIO, and the packets that
//! each level has carried.

use std::time::Duration;

use anyhow::{Context, Result, ensure};

use qemu_tests::daemon::{Stats, binary};
use qemu_tests::frontend::packet::Mac;
use qemu_tests::host::wait_for;
use qemu_tests::image::{Accelerator, Image, ImageKind};
use qemu_tests::nics::{NicNode, PORTS};
use qemu_tests::node::CONFIG;
use qemu_tests::report::step;
use qemu_tests::traffic::{Stream, Traffic};

/// Longer than anything here takes on a busy machine.
const DEADLINE: Duration = Duration::from_secs(60);
/// Longer than a packet is on its way.
const GRACE: Duration = Duration::from_secs(3);
/// A station at the switch's first cable, and one at its second.
const NEAR: Mac = [2, 0, 0, 0, 2, 1];
const FAR: Mac = [2, 0, 0, 0, 2, 2];
/// Packets a second of the streams.
const RATE: u32 = 200;

/// Boots the node, and shows it.
pub fn run() -> Result<()> {
    step("node image (Debian packages)", |_| "ready".into(), || Image::get(ImageKind::Node))?;
    step("accelerator", Accelerator::to_string, Accelerator::best)?;
    let programs = [binary("pointwork")?, binary("pointworkd")?];
    let node = step("a node with an IOMMU and NICs", |_| "up".into(), || NicNode::boot(&programs))?;
    step("Open vSwitch, and pointworkd", |()| "up".into(), || node.start_switch(""))?;
    println!("\nIn the node:\n");
    type_in(&node, &format!("cat {CONFIG}"))?;
    type_in(&node, "ovs-vsctl show")?;
    climb(&node)?;
    node.node.shut_down()
}

/// What each level has carried so far of the packets from `up1` to `up2`.
#[derive(Debug, Clone, Copy, Default)]
struct Levels {
    sent: u64,
    /// Packets that `ovs-vswitchd` was asked about, and those that the kernel's flows have forwarded (`ovs-dpctl show`).
    vswitchd: u64,
    kernel: u64,
    /// Packets that workers have forwarded (`pointwork stats`).
    l2: u64,
    l1: u64,
    /// Packets that came out of the second cable, and not from `pointworkd`; less than none while some of its own are lost.
    nic: i64,
}

impl Levels {
    /// Reads all counters, once no packet is on its way.
    fn read(node: &NicNode, traffic: &Traffic) -> Result<Self> {
        let stats: Stats = wait_for("the counters to balance", DEADLINE, || {
            let stats: Stats = serde_json::from_value(node.pointwork("stats")?)?;
            Ok(stats.imbalance().is_none().then_some(stats))
        })?;
        let shown = node.sh("ovs-dpctl show")?;
        let lookups = |what: &str| -> Result<u64> {
            let words = shown.split_whitespace();
            let mut counts = words.filter_map(|word| word.strip_prefix(what)?.strip_prefix(':'));
            Ok(counts.next().with_context(|| format!("no '{what}' in {shown}"))?.parse()?)
        };
        let sent_by_us = stats.ports.get("up2").context("no port up2")?.tx_packets;
        Ok(Self {
            sent: traffic.sent.len() as u64,
            vswitchd: lookups("missed")?,
            kernel: lookups("hit")?,
            l2: stats.paths.l2,
            l1: stats.paths.l1,
            // Before the first packet it may be less than nothing too; only differences are shown.
            nic: traffic.count(1) as i64 - sent_by_us as i64,
        })
    }

    fn since(&self, before: &Self) -> Self {
        Self {
            sent: self.sent - before.sent,
            vswitchd: self.vswitchd - before.vswitchd,
            kernel: self.kernel - before.kernel,
            l2: self.l2 - before.l2,
            l1: self.l1 - before.l1,
            nic: self.nic - before.nic,
        }
    }

    fn row(&self, what: &str) -> String {
        let Self { sent, vswitchd, kernel, l2, l1, nic } = self;
        format!("{what:<28} {sent:>6} {vswitchd:>9} {kernel:>7} {l2:>5} {l1:>5} {nic:>6}")
    }
}

/// More and more packets of one flow, and who has forwarded them.
fn climb(node: &NicNode) -> Result<()> {
    node.learn(1, FAR)?;
    node.cables.iter().try_for_each(|cable| cable.drain())?;
    let mut traffic = Traffic::new(&node.cables[..PORTS], 0, NEAR, FAR);
    let first = Levels::read(node, &traffic)?;
    let mut rows = Vec::new();
    let mut last = first;
    let mut note = |what: &str, traffic: &Traffic| -> Result<()> {
        let now = Levels::read(node, traffic)?;
        rows.push(now.since(&last).row(what));
        last = now;
        Ok(())
    };

    println!("\nUDP packets of one flow go in by the switch's first cable, and come out by its second:\n");
    step(
        "ten at once, of a flow unknown",
        |()| "arrived".into(),
        || {
            (0..10).try_for_each(|_| traffic.send())?;
            traffic.wait_all(DEADLINE)
        },
    )?;
    note("ten at once, unknown flow", &traffic)?;
    step(
        "ten, one after another",
        |()| "arrived".into(),
        || {
            (0..10).try_for_each(|_| {
                traffic.send()?;
                traffic.wait_all(DEADLINE)
            })
        },
    )?;
    note("ten, one after another", &traffic)?;
    for (packets, what) in [(400, "400, at 200 a second"), (2000, "2,000 more")] {
        let stream = Stream::start(traffic, RATE);
        step(what, |()| "arrived".into(), || stream.wait_more(1, packets, DEADLINE))?;
        traffic = stream.stop(GRACE)?;
        note(what, &traffic)?;
    }
    let all = last.since(&first);
    rows.push(all.row("in all"));
    println!(
        "\n{:<28} {:>6} {:>9} {:>7} {:>5} {:>5} {:>6}",
        "packets forwarded by", "sent", "vswitchd", "kernel", "L2", "L1", "NIC"
    );
    rows.iter().for_each(|row| println!("{row}"));
    println!(
        "\nvswitchd, kernel: misses and hits of ovs-dpctl show; L2, L1: pointwork stats; NIC: what came out of the second\n\
         cable and was not sent by pointworkd. Now and then a packet takes the kernel's way, so that Open vSwitch sees the flow\n\
         alive.\n"
    );
    let lost = traffic.lost()?;
    // Some may be, on a busy machine: what an emulated NIC has no room for.
    ensure!(lost as u64 * 50 <= all.sent, "{lost} of {} packets were lost", all.sent);
    ensure!(all.nic > all.sent as i64 / 2, "the switch has forwarded {} of {} packets", all.nic, all.sent);

    look(node, Stream::start(traffic, RATE))
}

/// Shows the flow at each level while its packets come.
fn look(node: &NicNode, stream: Stream) -> Result<()> {
    let rule = wait_for("the flow to be in the switch again", DEADLINE, || {
        Ok(node.rules("sw")?.into_iter().find(|rule| rule.from == 1 && rule.hits > 0))
    })?;
    println!("The flow at each level, while more of its packets come:\n");
    type_in(node, "ovs-dpctl dump-flows --names | grep 'in_port(up1)'")?;
    pointwork(node, "dump-flows up1")?;
    pointwork(node, "show")?;
    println!("QEMU's query-rocker-of-dpa-flows, table 60:");
    let to = rule.to.map_or("-".into(), |port| port.to_string());
    println!("  from port {} to port {to}, {} hits since it was put in\n", rule.from, rule.hits);
    stream.stop(GRACE)?.lost().map(drop)
}

/// Runs a command in the node, shows both, and wants it to succeed.
fn type_in(node: &NicNode, command: &str) -> Result<()> {
    println!("$ {command}");
    show(&node.sh(command)?);
    Ok(())
}

/// The same with `pointwork`.
fn pointwork(node: &NicNode, arguments: &str) -> Result<()> {
    println!("$ pointwork {arguments}");
    show(&node.sh(&format!("{} {arguments}", node.program("pointwork")))?);
    Ok(())
}

fn show(said: &str) {
    said.lines().for_each(|line| println!("  {line}"));
    println!();
}
