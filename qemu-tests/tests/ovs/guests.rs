//! Two real guests under Open vSwitch.

use std::net::{IpAddr, Ipv4Addr};
use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use qemu_tests::daemon::{Daemon, DaemonConfig, PortConfig, Stats};
use qemu_tests::guest::{Guest, GuestConfig, Nic};
use qemu_tests::host::{Process, WorkDir, wait_for};
use qemu_tests::ovs::{BRIDGE, Ovs};
use qemu_tests::tools::{Iperf, IperfOptions};

use crate::{LATE, inside, wait_in_bridge};

const fn ip(host: u8) -> IpAddr {
    IpAddr::V4(Ipv4Addr::new(10, 0, 0, host))
}

const A: IpAddr = ip(1);
const B: IpAddr = ip(2);
const HOST: IpAddr = ip(254);

/// A train of pings, of which the first may take a while.
fn pings(from: &Guest, to: IpAddr) -> Result<()> {
    from.wait_reachable(to, LATE)?;
    let ping = from.ping(to, 50, Duration::from_millis(20))?;
    println!("{} to {to}: {ping}", from.name());
    ensure!(ping.lost() == 0, "{} to {to}: {ping}", from.name());
    Ok(())
}

fn tcp(from: &Guest, to: IpAddr, options: &IperfOptions) -> Result<Iperf> {
    let result = from.iperf3(to, options)?;
    println!("{} to {to}: {:.0} Mbit/s, {result:?}", from.name(), result.megabits());
    ensure!(result.megabits() > 5.0, "{result:?}");
    Ok(result)
}

/// The share of packets of the fast path between two looks.
fn fast(before: &Stats, after: &Stats) -> f64 {
    let sum = |stats: &Stats| {
        let ports = stats.ports.values();
        ports.fold((0, 0), |sum, port| (sum.0 + port.rx_forwarded, sum.1 + port.rx_packets))
    };
    let (before, after) = (sum(before), sum(after));
    (after.0 - before.0) as f64 / (after.1 - before.1).max(1) as f64
}

/// Bytes that guests have got.
fn bytes(daemon: &Daemon) -> Result<u64> {
    Ok(daemon.stats()?.ports.values().map(|port| port.tx_bytes).sum())
}

fn wait_flowing(daemon: &Daemon) -> Result<()> {
    let before = bytes(daemon)?;
    wait_for("a megabyte of iperf3", LATE, || Ok((bytes(daemon)? > before + 1_000_000).then_some(())))
}

#[test]
fn ping_and_iperf3() -> Result<()> {
    let dir = WorkDir::new()?;
    let mut ovs = Ovs::start(&dir)?;
    let normal = |ovs: &Ovs| ovs.ofctl(&["add-flow", BRIDGE, "priority=0,actions=NORMAL"]);
    normal(&ovs)?;
    inside(&ovs, "ip", &["addr", "add", "10.0.0.254/24", "dev", BRIDGE])?;
    inside(&ovs, "ip", &["link", "set", "lo", "up"])?;
    let ports = ["vm1", "vm2"].map(|name| PortConfig::server(name, &dir));
    let mut daemon = Daemon::start(&DaemonConfig::under(&ovs, ports.clone()), &dir)?;
    let guest = |port: &PortConfig| GuestConfig::new(&port.name, Nic::connect(&port.socket));
    let [a, b] = Guest::start_all(ports.each_ref().map(guest), &dir)?;
    a.address("10.0.0.1/24")?;
    b.address("10.0.0.2/24")?;
    for name in ["vm1", "vm2"] {
        wait_in_bridge(&ovs, name, "up")?;
    }
    pings(&a, B)?;
    pings(&b, A)?;
    pings(&a, HOST)?;

    b.iperf3_server()?;
    daemon.ctl(&["sync"])?;
    for reverse in [false, true] {
        let before = daemon.balanced_stats()?;
        tcp(&a, B, &IperfOptions { reverse, ..Default::default() })?;
        let share = fast(&before, &daemon.balanced_stats()?);
        println!("{:.2} % on the fast path", share * 100.0);
        ensure!(share > 0.99, "{share}");
    }
    let paths = &daemon.ctl(&["show"])?["paths"];
    println!("{paths}");

    // The host, by the host path: without offloads, so slower.
    let server = |command: &mut std::process::Command| {
        command.arg(format!("--net={}", ovs.namespace().path().display())).args(["--", "iperf3", "-s"]);
    };
    let log = dir.path("iperf3.log");
    let mut server = Process::spawn("iperf3", Path::new("nsenter"), server, &log)?;
    for reverse in [false, true] {
        server.check()?;
        let options = IperfOptions { reverse, seconds: 2, ..Default::default() };
        let said = || std::fs::read_to_string(&log).unwrap_or_default();
        let result = a.iperf3(HOST, &options).with_context(|| format!("the server: {}", said()))?;
        println!("{} to the host: {:.0} Mbit/s", a.name(), result.megabits());
        ensure!(result.megabits() > 0.5, "{result:?}");
    }
    drop(server);

    // A policy stops it, and its end brings it back; so does a restart of OVS.
    let job = a.spawn("iperf3 -c 10.0.0.2 -t 100")?;
    wait_flowing(&daemon)?;
    ovs.ofctl(&["add-flow", BRIDGE, "priority=100,in_port=vm1,tcp,actions=drop"])?;
    wait_for("iperf3 to stand still", LATE, || {
        let before = bytes(&daemon)?;
        std::thread::sleep(Duration::from_millis(300));
        Ok((bytes(&daemon)? < before + 10_000).then_some(()))
    })?;
    ovs.ofctl(&["del-flows", "--strict", BRIDGE, "priority=100,in_port=vm1,tcp"])?;
    wait_flowing(&daemon)?;
    ovs.kill_vswitchd()?;
    wait_flowing(&daemon)?;
    ovs.start_vswitchd()?;
    normal(&ovs)?;
    wait_flowing(&daemon)?;
    daemon.ctl(&["sync"])?;
    wait_flowing(&daemon)?;
    ensure!(job.running(), "iperf3 has ended");
    job.kill()?;
    inside(&ovs, "ip", &["link", "set", BRIDGE, "up"])?;
    pings(&b, A)?;
    let stats = daemon.balanced_stats().context("at the end")?;
    println!("{:?}; drops {:?}", stats.paths, stats.drops());
    daemon.terminate()
}
