//! Two nodes with a guest each, and VXLAN between them.

use std::net::{IpAddr, Ipv4Addr};
use std::time::Duration;

use anyhow::{Context, Result, ensure};

use qemu_tests::daemon::{Daemon, DaemonConfig, PortConfig, Stats};
use qemu_tests::guest::{Guest, GuestConfig, Nic, NicBackend};
use qemu_tests::host::{WorkDir, interrupted};
use qemu_tests::image::{Accelerator, Image, ImageKind};
use qemu_tests::overlay::{Kind, Nodes, WIRE};
use qemu_tests::ovs::{BRIDGE, Ovs};
use qemu_tests::report::{Table, step};
use qemu_tests::tools::{IperfOptions, Ping};

use crate::{operator, speed};

/// Longer than anything here takes on a busy machine.
const DEADLINE: Duration = Duration::from_secs(30);
/// Of the wire.
const MTU: u16 = 1500;
/// The first guest's port of pointworkd, its TAP for plain Open vSwitch, and the second guest's TAP.
const PORTS: [&str; 3] = ["vm1", "tap1", "vm2"];
/// MAC addresses of the guests' first interfaces.
const MACS: [&str; 2] = ["02:00:00:00:00:01", "02:00:00:00:00:02"];
/// What Open vSwitch does not take from a TAP: it has neither partial checksums nor segments in its userspace datapath.
const WHOLE: &str = "csum=off,gso=off,guest_csum=off,guest_tso4=off,guest_tso6=off,guest_ecn=off,guest_ufo=off,\
                     host_tso4=off,host_tso6=off,host_ecn=off,host_ufo=off";

/// The second guest's address: in the network by pointworkd, or by plain Open vSwitch.
fn second(plain: bool) -> IpAddr {
    IpAddr::V4(Ipv4Addr::new(10, plain.into(), 0, 2))
}

/// Builds both nodes, and shows them.
pub fn run() -> Result<()> {
    let dir = WorkDir::new()?;
    step("guest image (Debian packages)", |_| "ready".into(), || Image::get(ImageKind::Guest))?;
    step("accelerator", Accelerator::to_string, Accelerator::best)?;
    let nodes = step(
        "two nodes, Open vSwitch on each",
        |nodes: &Nodes| nodes.ovs.each_ref().map(|ovs| ovs.namespace().name().to_owned()).join(", "),
        || {
            let nodes = Nodes::start(MTU)?;
            nodes.tunnel(Kind::Vxlan, false)?;
            Ok(nodes)
        },
    )?;
    let port = PortConfig::server(PORTS[0], &dir);
    let mut daemon = step(
        "pointworkd on the first",
        |d: &Daemon| format!("pid {}", d.pid()),
        || {
            let daemon = Daemon::start(&DaemonConfig::under(&nodes.ovs[0], [port.clone()]), &dir)?;
            nodes.plug(MTU)?;
            Ok(daemon)
        },
    )?;
    let outcome = show(&nodes, &daemon, &port, &dir);
    if outcome.is_err() && !interrupted() {
        eprintln!("--- pointworkd's last words ---\n{}", daemon.log_tail(20));
    }
    let (guests, mut table) = outcome?;
    daemon.terminate()?;
    plain(&nodes, &guests, &mut table)?;
    println!("\n{table}");
    println!(
        "iperf3, TCP, between two guests on two nodes of this machine. With pointworkd the first guest leaves checksums and\n\
         segments to its port; from and to TAPs the userspace datapath takes whole frames only.\n"
    );
    guests.into_iter().try_for_each(Guest::quit)
}

/// What there is to see with pointworkd.
fn show(nodes: &Nodes, daemon: &Daemon, port: &PortConfig, dir: &WorkDir) -> Result<([Guest; 2], Table)> {
    let guests = step("a guest on each", |_| "up".into(), || boot(nodes, daemon, port, dir))?;
    println!("\nOn the first node:\n");
    operator::type_in(&nodes.ovs[0], &["ovs-vsctl", "show"])?;
    println!();
    let mut table = Table::default();
    let ping = step("ping", Ping::to_string, || ping(&guests[0], false))?;
    if let Some((min, avg, max)) = ping.times {
        table.row("ping with pointworkd, min/avg/max", format!("{min:.2}/{avg:.2}/{max:.2} ms"));
    }
    guests[1].iperf3_server()?;
    let before = daemon.balanced_stats()?;
    measure(&guests[0], "with pointworkd", false, &mut table)?;
    let after = daemon.balanced_stats()?;
    for (port, way) in [(PORTS[0], "encapsulated"), (WIRE, "decapsulated")] {
        let (fast, all) = counts(&before, &after, port)?;
        table.row(
            &format!("packets from {port} {way} by workers"),
            format!("{fast} of {all} ({:.1} %)", 100.0 * fast as f64 / all.max(1) as f64),
        );
    }
    println!("\nThe way of a packet from the first guest to the second, and how it is carried:\n");
    let packet = format!(
        "eth(src={},dst={}),eth_type(0x0800),ipv4(src=10.0.0.1,dst=10.0.0.2,proto=6,ttl=64),tcp(src=40000,dst=5201)",
        MACS[0], MACS[1]
    );
    operator::pointwork(daemon, &["trace", PORTS[0], &packet])?;
    operator::pointwork(daemon, &["show"])?;
    operator::pointwork(daemon, &["dump-flows"])?;
    operator::type_in(&nodes.ovs[0], &["ovs-appctl", "dpctl/dump-flows", "--names"])?;
    for port in [PORTS[0], WIRE] {
        let (fast, all) = counts(&before, &after, port)?;
        ensure!(fast * 100 >= all * 95, "workers have carried only {fast} of {all} packets from {port}");
    }
    Ok((guests, table))
}

/// Boots the guests and gives them both networks; the first is up.
fn boot(nodes: &Nodes, daemon: &Daemon, port: &PortConfig, dir: &WorkDir) -> Result<[Guest; 2]> {
    let tap = |name: &str| Nic::on(NicBackend::Tap(name.into())).options(WHOLE);
    let on = |name: &str, node: usize, nics: Vec<Nic>| GuestConfig {
        name: name.into(),
        nics,
        namespace: Some(nodes.ovs[node].namespace().path()),
        ..GuestConfig::default()
    };
    let first = vec![Nic::connect(&port.socket).mac(MACS[0]), tap(PORTS[1])];
    let guests =
        Guest::start_all([on("guest1", 0, first), on("guest2", 1, vec![tap(PORTS[2]).mac(MACS[1])])], dir)?;
    for (ovs, name) in nodes.ovs.iter().zip([PORTS[1], PORTS[2]]) {
        ovs.namespace().ip(&["link", "set", name, "up"])?;
    }
    add_port(&nodes.ovs[1], PORTS[2])?;
    let mtu = MTU - Kind::Vxlan.overhead(false);
    guests[0].sh(&format!("ip link set eth0 mtu {mtu} up && ip addr add 10.0.0.1/24 dev eth0"))?;
    guests[1].sh(&format!(
        "ip link set eth0 mtu {mtu} up && ip addr add 10.0.0.2/24 dev eth0 && ip addr add 10.1.0.2/24 dev eth0"
    ))?;
    daemon.wait_link(&[PORTS[0], WIRE], true, DEADLINE)?;
    Ok(guests)
}

fn add_port(ovs: &Ovs, name: &str) -> Result<()> {
    ovs.vsctl(&["add-port", BRIDGE, name]).map(drop)
}

/// The same without pointworkd: the first guest's TAP and the wire are ports of Open vSwitch.
fn plain(nodes: &Nodes, guests: &[Guest; 2], table: &mut Table) -> Result<()> {
    let ping = step("plain Open vSwitch on both: ping", Ping::to_string, || {
        nodes.plug_plain()?;
        add_port(&nodes.ovs[0], PORTS[1])?;
        let mtu = MTU - Kind::Vxlan.overhead(false);
        guests[0].sh(&format!(
            "ip link set eth0 down && ip link set eth1 mtu {mtu} up && ip addr add 10.1.0.1/24 dev eth1"
        ))?;
        ping(&guests[0], true)
    })?;
    if let Some((min, avg, max)) = ping.times {
        table.row("ping with plain Open vSwitch", format!("{min:.2}/{avg:.2}/{max:.2} ms"));
    }
    measure(&guests[0], "plain Open vSwitch", true, table)
}

/// Waits until the second guest is reached, and pings it.
fn ping(first: &Guest, plain: bool) -> Result<Ping> {
    first.wait_reachable(second(plain), DEADLINE)?;
    let ping = first.ping(second(plain), 50, Duration::from_millis(20))?;
    ensure!(ping.lost() == 0, "{} of {} pings were lost", ping.lost(), ping.sent);
    Ok(ping)
}

/// TCP both ways.
fn measure(first: &Guest, with: &str, plain: bool, table: &mut Table) -> Result<()> {
    for (arrow, reverse) in [("guest1 -> guest2", false), ("guest2 -> guest1", true)] {
        let name = format!("TCP {arrow}, {with}");
        let options = IperfOptions { reverse, ..Default::default() };
        let tcp = step(&name, speed, || first.iperf3(second(plain), &options))?;
        ensure!(tcp.bits_per_second > 0.0, "no TCP payload arrived");
        table.row(&name, speed(&tcp));
    }
    Ok(())
}

/// Packets of a port that workers have forwarded between two looks, and all.
fn counts(before: &Stats, after: &Stats, port: &str) -> Result<(u64, u64)> {
    let of = |stats: &Stats| {
        let port = stats.ports.get(port).with_context(|| format!("no port {port}"))?;
        Ok::<_, anyhow::Error>((port.rx_forwarded, port.rx_packets))
    };
    let (before, after) = (of(before)?, of(after)?);
    Ok((after.0 - before.0, after.1 - before.1))
}
