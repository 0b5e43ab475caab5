//! What others have changed behind everybody's back is put right without an operator.

use anyhow::{Context, Result, ensure};
use qemu_tests::daemon::{Daemon, DaemonConfig, PortConfig};
use qemu_tests::frontend::packet::Packet;
use qemu_tests::host::{WorkDir, wait_for};
use qemu_tests::net::{Net, QUIET, SOON};
use qemu_tests::ovs::{BRIDGE, Ovs};

use crate::{Bench, LATE, hello, inside, text, wait_in_bridge};

/// How often the daemon says so of a port since its last start.
fn said(daemon: &Daemon, port: &str, what: &str) -> Result<usize> {
    let log = std::fs::read_to_string(daemon.log())?;
    let port = format!("port {port}: ");
    Ok(log.lines().filter(|line| line.contains(&port) && line.contains(what)).count())
}

const STALE: &str = "still reads a TAP that is gone";
const AGAIN: &str = "reads its TAP again";

/// Waits until each guest hears the other's broadcasts, all of which OVS forwards.
fn wait_heard(it: &mut Bench) -> Result<()> {
    for (from, to) in [(0, 1), (1, 0)] {
        let frame = hello(it.net.guests[from].mac, it.net.guests[from].ip);
        wait_for(&format!("guest {to} to hear guest {from}"), LATE, || {
            it.net.guests[from].send(&frame)?;
            Ok(it.net.guests[to].receive(QUIET)?.is_some_and(|(_, _, got)| got == frame).then_some(()))
        })
        .with_context(|| it.ovs.appctl(&["dpctl/show"]).unwrap_or_default())?;
    }
    for guest in &mut it.net.guests {
        while guest.receive(QUIET)?.is_some() {}
    }
    Ok(())
}

#[test]
fn a_tap_that_somebody_deletes_is_read_again() -> Result<()> {
    let mut it = Bench::start(2)?;
    it.greet()?;
    let packet = it.net.packet(0, 1).udp(1, 2).payload_len(100);
    it.becomes_fast(0, 1, &packet)?;
    ensure!(said(it.daemon(), "p1", STALE)? == 0, "it was mended when there was nothing to mend");
    for times in 1..=2 {
        it.inside("ip", &["link", "del", "p1"])?;
        wait_heard(&mut it)?;
        it.becomes_fast(0, 1, &packet)?;
        wait_for("the end of the repair", SOON, || {
            Ok((said(it.daemon(), "p1", AGAIN)? == times).then_some(()))
        })?;
        ensure!(said(it.daemon(), "p1", STALE)? == times, "it took more than one attempt");
    }
    ensure!(said(it.daemon(), "p2", STALE)? == 0, "another port was touched");
    // The same while nobody looks.
    it.net.daemon.terminate()?;
    it.inside("ip", &["link", "del", "p2"])?;
    it.net.restart()?;
    wait_heard(&mut it)?;
    it.becomes_fast(0, 1, &packet)?;
    it.finish().map(drop)
}

#[test]
fn a_daemon_that_is_first_waits_for_the_database() -> Result<()> {
    let dir = WorkDir::new()?;
    let mut ovs = Ovs::start(&dir)?;
    ovs.ofctl(&["add-flow", BRIDGE, "priority=0,actions=NORMAL"])?;
    // p2 is in the database alone, p1 in the configuration alone.
    let ports = ["p1", "p2"].map(|name| PortConfig::server(name, &dir));
    let known = format!("external_ids:pointwork-socket={}", text(&ports[1].socket));
    ovs.vsctl(&["--no-wait", "add-port", BRIDGE, "p2", "--", "set", "interface", "p2", &known])?;
    ovs.stop()?;
    let config = DaemonConfig::under(&ovs, [ports[0].clone()]);
    let mut net = Net::start(dir, config, |_, builder| builder)?;
    // A guest has its port; what is missing is said, in a line.
    net.daemon.wait_link(&["p1"], true, SOON)?;
    wait_for("show to say it", SOON, || {
        let show = net.daemon.ctl(&["show"])?;
        let error = show["ovs"]["database_error"].as_str().unwrap_or_default().to_owned();
        Ok((error.contains("cannot connect") && !error.contains('\n')).then_some(()))
    })?;
    ensure!(net.daemon.refusal(&["sync", "--timeout", "1"])?.contains("cannot connect"));
    net.daemon.check()?;

    ovs.start_server()?;
    // Without ovs-vswitchd nothing is forwarded, but all ports are there.
    wait_for("the port of the database", SOON, || Ok(ports[1].socket.exists().then_some(())))?;
    wait_for("the port of the configuration", SOON, || {
        Ok(ovs.vsctl(&["--no-wait", "list-ports", BRIDGE])?.contains("p1").then_some(()))
    })?;
    ensure!(net.daemon.ctl(&["show"])?["ovs"]["database_error"].is_null());
    net.join(&ports[1])?;
    ovs.start_vswitchd()?;
    ovs.ofctl(&["add-flow", BRIDGE, "priority=0,actions=NORMAL"])?;
    for name in ["p1", "p2"] {
        wait_in_bridge(&ovs, name, "up")?;
    }
    net.config.ports.push(ports[1].clone());
    let mut it = Bench { net, ovs };
    it.wait_ready()?;
    wait_heard(&mut it)?;
    let packet = it.net.packet(0, 1).udp(1, 2).payload_len(100);
    it.becomes_fast(0, 1, &packet)?;
    ensure!(inside(&it.ovs, "ip", &["-o", "link"])?.contains(" p2: "), "p2 has no TAP");

    // Once it has seen the database, it starts with those ports. (OVS itself reads no packets without.)
    it.ovs.kill_server()?;
    it.net.daemon.terminate()?;
    it.net.config.ports.truncate(1);
    it.net.restart()?;
    it.daemon().wait_link(&["p1", "p2"], true, SOON)?;
    ensure!(it.daemon().ctl(&["show"])?["ovs"]["database_error"].is_string());
    it.ovs.start_server()?;
    wait_heard(&mut it)?;
    it.becomes_fast(0, 1, &packet)?;
    it.ovs.vsctl(&["del-port", "p2"])?;
    wait_for("p2 to go", SOON, || Ok((!ports[1].socket.exists()).then_some(())))?;
    ensure!(it.daemon().show()?.iter().all(|port| port.name != "p2"));
    it.finish().map(drop)
}

#[test]
fn a_station_that_moves_back_and_forth_is_followed() -> Result<()> {
    let mut it = Bench::start(3)?;
    // Keep-alives are as rare as they get: what is learned in time is not learned from those.
    it.ovs.vsctl(&["set", "Open_vSwitch", ".", "other_config:max-idle=60000"])?;
    it.greet()?;
    let there = Packet::eth(it.net.guests[0].mac, it.net.guests[2].mac).ipv4([10, 0, 0, 1], [10, 0, 0, 3]);
    let (there, back) = (there.udp(1, 2).payload_len(100), it.net.packet(2, 0).udp(2, 1).payload_len(100));
    it.becomes_fast(0, 2, &there)?;
    it.becomes_fast(2, 0, &back)?;
    for swing in 1..=6 {
        let (now, before) = (swing % 2, 1 - swing % 2);
        // One packet from the other port: of a flow that is known here, but for the first time.
        it.net.guests[now].send(&there.build())?;
        it.net.guests[2].expect(&there.build())?;
        let answer = back.build();
        wait_for(&format!("an answer at port p{} after swing {swing}", now + 1), LATE, || {
            it.net.guests[2].send(&answer)?;
            while it.net.guests[before].receive(QUIET / 10)?.is_some() {}
            Ok(it.net.guests[now].receive(QUIET)?.is_some_and(|(_, _, got)| got == answer).then_some(()))
        })
        .with_context(|| {
            format!(
                "{}{:#}",
                it.ovs.appctl(&["fdb/show", BRIDGE]).unwrap_or_default(),
                it.dump().unwrap_or_default()
            )
        })?;
        for guest in &mut it.net.guests {
            while guest.receive(QUIET)?.is_some() {}
        }
        it.becomes_fast(2, now, &back)?;
        it.daemon().ctl(&["sync"])?;
    }
    it.finish().map(drop)
}
