//! What an operator of Open vSwitch does, with the commands that they would type.

use std::net::IpAddr;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};

use qemu_tests::daemon::{Daemon, PortConfig, binary};
use qemu_tests::guest::Guest;
use qemu_tests::host::wait_for;
use qemu_tests::ovs::{BRIDGE, Ovs};

/// Longer than anything here takes on a busy machine.
const DEADLINE: Duration = Duration::from_secs(20);
/// What stops the guests' pings: above the priority of a flow that is added without one.
const POLICY: &str = "priority=40000,icmp";

/// Adds the ports to Open vSwitch's bridge and waits until they are pointworkd's.
pub fn add_ports(ovs: &Ovs, daemon: &Daemon, ports: &[PortConfig]) -> Result<()> {
    println!("\nOVS_RUNDIR={}; as its operator:\n", ovs.rundir().display());
    type_in(ovs, &["ovs-ofctl", "add-flow", BRIDGE, "actions=NORMAL"])?;
    for port in ports {
        let socket = format!("external_ids:pointwork-socket={}", port.socket.display());
        let name = &port.name;
        type_in(ovs, &["ovs-vsctl", "add-port", BRIDGE, name, "--", "set", "Interface", name, &socket])?;
    }
    wait_for("the ports of the database in pointworkd", DEADLINE, || {
        let shown = daemon.show()?;
        Ok(ports.iter().all(|port| shown.iter().any(|shown| shown.name == port.name)).then_some(()))
    })?;
    // It looked for the devices before they were made; it notices by itself when they come.
    for port in ports {
        ovs.vsctl(&["wait-until", "Interface", &port.name, "ofport>0"])?;
    }
    println!("pointworkd has made the devices by now:\n");
    type_in(ovs, &["ovs-vsctl", "--columns=name,ofport,error", "list", "Interface", "vm1", "vm2"])?;
    println!();
    Ok(())
}

/// Shows what carried the traffic, here and in Open vSwitch.
pub fn look(ovs: &Ovs, daemon: &Daemon) -> Result<()> {
    daemon.ctl(&["sync"])?;
    pointwork(daemon, &["show"])?;
    pointwork(daemon, &["dump-flows"])?;
    type_in(ovs, &["ovs-appctl", "dpctl/dump-flows", "--names"])?;
    let stats = daemon.ctl(&["stats"])?;
    let paths = stats["paths"].as_object().context("pointwork stats: no paths")?;
    let count = |name: &str| paths.get(name).and_then(serde_json::Value::as_u64).unwrap_or(0);
    let all: u64 = paths.keys().map(|name| count(name)).sum();
    let fast = count("l1") + count("l2");
    ensure!(fast * 100 > all * 99, "only {fast} of {all} packets took the fast path");
    Ok(())
}

/// Has Open vSwitch drop the pings of `guest`, and then no longer.
pub fn drop_and_pass(ovs: &Ovs, daemon: &Daemon, guest: &Guest, to: IpAddr) -> Result<()> {
    type_in(ovs, &["ovs-ofctl", "add-flow", BRIDGE, &format!("{POLICY},actions=drop")])?;
    let start = Instant::now();
    wait_for("pings to stop", DEADLINE, || {
        Ok((guest.ping(to, 1, Duration::from_secs(1))?.received == 0).then_some(()))
    })?;
    let took = start.elapsed().as_secs_f64();
    let ping = guest.ping(to, 20, Duration::from_millis(20))?;
    ensure!(
        ping.received == 0,
        "the policy drops, and {} of {} pings were answered",
        ping.received,
        ping.sent
    );
    println!("  ping: {ping}; an answer stayed away within {took:.1} s of the command\n");
    pointwork(daemon, &["dump-flows", "vm1"])?;

    type_in(ovs, &["ovs-ofctl", "--strict", "del-flows", BRIDGE, POLICY])?;
    guest.wait_reachable(to, DEADLINE)?;
    let ping = guest.ping(to, 20, Duration::from_millis(20))?;
    ensure!(ping.lost() == 0, "the policy is gone, and {} of {} pings were lost", ping.lost(), ping.sent);
    println!("  ping: {ping}\n");
    Ok(())
}

/// Runs a command of Open vSwitch, shows both, and wants it to succeed.
pub fn type_in(ovs: &Ovs, words: &[&str]) -> Result<()> {
    let (program, arguments) = words.split_first().context("no command")?;
    println!("$ {}", words.join(" "));
    run(Command::new(program).args(arguments).env("OVS_RUNDIR", ovs.rundir()).env("OVS_LOGDIR", ovs.rundir()))
}

/// The same with `pointwork`.
pub fn pointwork(daemon: &Daemon, arguments: &[&str]) -> Result<()> {
    println!("$ pointwork {}", arguments.join(" "));
    let program: &Path = &binary("pointwork")?;
    run(Command::new(program).arg("--control").arg(daemon.control()).args(arguments))?;
    println!();
    Ok(())
}

fn run(command: &mut Command) -> Result<()> {
    let name = command.get_program().to_string_lossy().into_owned();
    let output = command.stdin(Stdio::null()).output().with_context(|| name.clone())?;
    for said in [&output.stdout, &output.stderr] {
        for line in String::from_utf8_lossy(said).lines() {
            println!("  {line}");
        }
    }
    ensure!(output.status.success(), "{name} ended with {}", output.status);
    Ok(())
}
