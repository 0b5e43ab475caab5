//! Whoever stops and comes back: nothing is lost, and nobody has to restart anybody else.

use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use qemu_tests::daemon::{Daemon, DaemonConfig, Host, PortConfig, binary};
use qemu_tests::host::{WorkDir, wait_for};
use qemu_tests::net::{QUIET, SOON};
use qemu_tests::ovs::{BRIDGE, Ovs};

use crate::stream::Stream;
use crate::{Bench, LATE, wait_in_bridge, wait_warning};

fn signal(name: &str, pid: u32) -> Result<()> {
    let status = Command::new("sh").args(["-c", "kill -$1 $2", "sh", name, &pid.to_string()]).status()?;
    ensure!(status.success(), "{name} to {pid}");
    Ok(())
}

/// The process of this Open vSwitch's ovs-vswitchd.
fn vswitchd(ovs: &Ovs) -> Result<u32> {
    Ok(std::fs::read_to_string(ovs.rundir().join("ovs-vswitchd.pid"))?.trim().parse()?)
}

/// Tells OVS of all guests again; some of what they say may be lost while it starts.
fn learn_again(it: &mut Bench) -> Result<()> {
    wait_for("OVS to learn the guests", LATE, || {
        for guest in &mut it.net.guests {
            let hello = crate::hello(guest.mac, guest.ip);
            guest.send(&hello)?;
        }
        let known = it.ovs.appctl(&["fdb/show", BRIDGE])?;
        Ok((1..=it.net.guests.len()).all(|n| known.contains(&format!("02:00:00:00:00:0{n}"))).then_some(()))
    })?;
    for guest in &mut it.net.guests {
        while guest.receive(QUIET)?.is_some() {}
    }
    Ok(())
}

#[test]
fn known_flows_go_on_without_ovs() -> Result<()> {
    let mut it = Bench::start(3)?;
    for killed in [false, true] {
        learn_again(&mut it)?;
        it.settle()?;
        let packet = it.net.packet(0, 1).udp(1, 2).payload_len(100);
        it.becomes_fast(0, 1, &packet)?;
        let stream = Stream::start(&mut it.net, 0, 1, &packet, 1000)?;
        stream.flows(200)?;
        match killed {
            // With its flows in the userspace datapath gone, ours go on.
            true => it.ovs.kill_vswitchd()?,
            false => it.ovs.stop()?,
        }
        let before = it.daemon().stats()?;
        stream.flows(2000)?;
        let after = it.daemon().stats()?;
        ensure!(after.ports["p1"].rx_forwarded >= before.ports["p1"].rx_forwarded + 1500, "{after:?}");
        wait_for("show to say it", SOON, || {
            let show = it.net.daemon.ctl(&["show"])?;
            let text = show["ovs"]["datapath_error"].as_str().unwrap_or_default().to_owned();
            Ok(text.contains("ovs-vswitchd").then_some(()))
        })
        .with_context(|| format!("{:#}", it.net.daemon.ctl(&["show"]).unwrap_or_default()))?;
        ensure!(it.net.daemon.refusal(&["sync", "--timeout", "2"])?.contains("cannot be read"));
        // A new flow has nobody who decides; it is counted, and nothing else suffers.
        let unknown = crate::hello(it.net.guests[2].mac, it.net.guests[2].ip);
        it.net.guests[2].send(&unknown)?;
        stream.flows(500)?;
        it.daemon().balanced_stats()?;

        it.ovs.start_server()?;
        it.ovs.start_vswitchd()?;
        // Its rules went with it; what it has now is another policy.
        it.ovs.ofctl(&["add-flow", BRIDGE, "priority=100,in_port=p1,actions=p3"])?;
        let start = Instant::now();
        it.daemon().ctl(&["sync", "--timeout", "5"])?;
        println!("in step after {:?}", start.elapsed());
        let before = it.net.guests[2].receive(SOON)?;
        ensure!(before.is_some(), "nothing goes where the new policy says");
        stream.stands_still()?;
        stream.stop(&mut it.net, 0, 1)?;
        it.ovs.ofctl(&["del-flows", BRIDGE])?;
        it.ovs.ofctl(&["add-flow", BRIDGE, "priority=0,actions=NORMAL"])?;
        it.settle()?;
        for guest in &mut it.net.guests {
            while guest.receive(QUIET)?.is_some() {}
        }
    }
    it.finish().map(drop)
}

#[test]
fn the_database_comes_back() -> Result<()> {
    let mut it = Bench::start(2)?;
    it.greet()?;
    let packet = it.net.packet(0, 1).udp(1, 2).payload_len(100);
    it.becomes_fast(0, 1, &packet)?;
    it.ovs.kill_server()?;
    wait_for("show to say it", SOON, || {
        Ok(it.net.daemon.ctl(&["show"])?["ovs"]["database_error"].is_string().then_some(()))
    })?;
    it.becomes_fast(0, 1, &packet)?;
    it.daemon().ctl(&["sync"])?;
    ensure!(it.daemon().refusal(&["add-port", "p9", "--socket", "/tmp/p9"])?.contains("p9"));
    it.ovs.start_server()?;
    wait_for("the database", LATE, || {
        Ok(it.net.daemon.ctl(&["show"])?["ovs"]["database_error"].is_null().then_some(()))
    })?;
    let socket = crate::text(&it.net.dir.path("p3.sock"));
    it.daemon().ctl(&["add-port", "p3", "--socket", &socket])?;
    wait_in_bridge(&it.ovs, "p3", "down")?;
    it.becomes_fast(0, 1, &packet)?;
    it.finish().map(drop)
}

#[test]
fn ovs_notices_nothing_of_a_daemon_that_dies() -> Result<()> {
    let mut it = Bench::start(2)?;
    let facts = |it: &Bench| -> Result<String> {
        let ofports =
            it.ovs.vsctl(&["--columns=name,ofport,ifindex,error", "list", "interface", "p1", "p2"])?;
        let devices = it.inside("ip", &["-o", "link"])?;
        let index = |line: &str| line.split(' ').take(2).collect::<String>();
        Ok(ofports + &devices.lines().map(index).collect::<Vec<_>>().join(" "))
    };
    let before = facts(&it)?;
    for round in 0..3 {
        it.greet()?;
        let packet = it.net.packet(0, 1).udp(1, 2).payload_len(100);
        it.becomes_fast(0, 1, &packet)?;
        if round == 1 {
            it.net.daemon.terminate()?;
        } else {
            it.net.daemon.kill()?;
        }
        it.net.restart()?;
        it.wait_ready()?;
        let after = facts(&it)?;
        ensure!(before == after, "before: {before}\nafter: {after}");
    }
    it.greet()?;
    it.finish().map(drop)
}

#[test]
fn it_ends_at_once_though_ovs_hangs() -> Result<()> {
    let mut it = Bench::start(2)?;
    it.greet()?;
    let packet = it.net.packet(0, 1).udp(1, 2).payload_len(100);
    it.becomes_fast(0, 1, &packet)?;
    let pid = vswitchd(&it.ovs)?;
    signal("STOP", pid)?;
    let outcome = (|| -> Result<()> {
        // A known flow goes on, and a person gets answers.
        let frame = packet.build();
        for _ in 0..5 {
            it.net.guests[0].send(&frame)?;
            it.net.guests[1].expect(&frame)?;
        }
        wait_for("the mirror to wait", SOON, || {
            let show = it.net.daemon.ctl(&["show"])?;
            Ok(show["ovs"]["datapath_error"].is_string().then_some(()))
        })?;
        it.net.daemon.stats()?;
        it.net.daemon.terminate()
    })();
    signal("CONT", pid)?;
    outcome?;
    it.net.restart()?;
    it.wait_ready()?;
    it.greet()?;
    it.becomes_fast(0, 1, &packet)?;
    it.finish().map(drop)
}

#[test]
fn what_is_missing_is_said() -> Result<()> {
    let dir = WorkDir::new()?;
    let mut ovs = Ovs::start(&dir)?;
    let port = PortConfig::server("vm1", &dir);
    // A socket that nobody listens at, then a bridge that is not there.
    let nobody = dir.path("nobody.sock");
    let host = Host::Ovs { bridge: BRIDGE.into(), db: format!("unix:{}", nobody.display()) };
    let config = DaemonConfig { host, ..DaemonConfig::under(&ovs, [port.clone()]) };
    let mut daemon = Daemon::start(&config, &dir)?;
    wait_for("show to say it", SOON, || {
        let show = daemon.ctl(&["show"])?;
        let error = show["ovs"]["database_error"].as_str().unwrap_or_default().to_owned();
        Ok((error.contains("nobody.sock") && !error.contains('\n')).then_some(()))
    })?;
    let refused = daemon.refusal(&["sync", "--timeout", "1"])?;
    ensure!(refused.contains("nobody.sock"), "{refused}");
    daemon.terminate()?;

    ovs.vsctl(&["del-br", BRIDGE])?;
    let config = DaemonConfig::under(&ovs, [port]);
    let mut daemon = Daemon::start(&config, &dir)?;
    wait_warning(&daemon, &["no bridge 'br0'", "ovs-vsctl add-br br0"])?;
    ensure!(daemon.refusal(&["sync"])?.contains("no bridge 'br0'"));
    ovs.vsctl(&["add-br", BRIDGE, "--", "set", "bridge", BRIDGE, "datapath_type=netdev"])?;
    wait_in_bridge(&ovs, "vm1", "down")?;
    daemon.ctl(&["sync"])?;
    daemon.terminate()?;

    // Nobody's own user may neither make TAPs nor read the database.
    std::fs::set_permissions(dir.root(), std::os::unix::fs::PermissionsExt::from_mode(0o777))?;
    for name in ["control.sock", "state.json", "vm1.sock"] {
        let _ = std::fs::remove_file(dir.path(name));
    }
    std::fs::write(dir.path("unprivileged.toml"), config.to_toml(&dir))?;
    let program = dir.path("pointworkd");
    std::fs::copy(binary("pointworkd")?, &program)?;
    let net = format!("--net={}", ovs.namespace().path().display());
    let start = Instant::now();
    let output = Command::new("timeout")
        .args(["20", "nsenter", &net, "--", "setpriv", "--reuid=65534", "--regid=65534", "--clear-groups"])
        .arg("--")
        .arg(&program)
        .arg("--config")
        .arg(dir.path("unprivileged.toml"))
        .stdin(Stdio::null())
        .output()?;
    let said = String::from_utf8_lossy(&output.stderr);
    ensure!(output.status.code() == Some(1), "{}: {said}", output.status);
    let last = said.lines().last().unwrap_or_default();
    ensure!(last.contains("vm1") && last.contains("CAP_NET_ADMIN"), "{said}");
    ensure!(start.elapsed() < Duration::from_secs(10), "{:?}", start.elapsed());
    ovs.stop()
}
