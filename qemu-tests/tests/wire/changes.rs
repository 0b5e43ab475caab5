//! What changes under a wire: its device, its carrier, the daemon; and what is refused.

use anyhow::{Result, ensure};
use qemu_tests::host::wait_for;
use qemu_tests::net::SOON;

use crate::bed::{Bed, ORDINARY, Veth, join, settle, until};

fn warnings(bed: &Bed) -> Result<String> {
    Ok(bed.net.daemon.ctl(&["show"])?["warnings"].to_string())
}

#[test]
fn a_device_that_vanishes_is_named_and_taken_up_again() -> Result<()> {
    let mut bed = Bed::new(ORDINARY, "")?;
    bed.greet()?;
    bed.near.ip(&["link", "del", "eth1"])?;
    let shown = until(&bed.net, "eth1", "gone", |port| port.fault.is_some())?;
    ensure!(shown.fault.as_deref() == Some("no network device 'eth1'"), "{shown:?}");
    ensure!(shown.state == "waiting" && !shown.link && shown.active_queues == 0, "{shown:?}");
    // Others go on, and what is for the wire is counted.
    let over = bed.packet().udp(1, 2).payload_len(100).build();
    for _ in 0..5 {
        bed.net.guests[0].send(&over)?;
    }
    bed.net.guests[1].receive(SOON)?;
    let between = bed.net.packet(0, 1).udp(1, 2).payload_len(100).build();
    bed.net.guests[0].send(&between)?;
    bed.net.guests[1].expect_among_others(&between)?;
    wait_for("drops to be counted", SOON, || {
        let stats = bed.net.daemon.balanced_stats()?;
        Ok(stats.ports["eth1"].tx_drops.get("link_down").filter(|&&drops| drops > 0).copied())
    })?;
    // A new device of that name, and another MTU and number of queues.
    join(&bed.near, &bed.far, Veth { queues: 2, mtu: 1400 })?;
    let shown = until(&bed.net, "eth1", "back", |port| port.link && port.active_queues == 2)?;
    ensure!(shown.mtu == 1400 && shown.fault.is_none(), "{shown:?}");
    for guest in &mut bed.net.guests {
        while guest.receive(qemu_tests::net::QUIET)?.is_some() {}
    }
    bed.greet()?;
    let socket = bed.socket(9)?;
    bed.echo(&socket, 1372)?;
    bed.net.daemon.balanced_stats()?;
    Ok(())
}

#[test]
fn the_link_is_the_carrier_of_the_device() -> Result<()> {
    let mut bed = Bed::new(ORDINARY, "")?;
    bed.greet()?;
    for (namespace, device) in [(&bed.far, "host0"), (&bed.near, "eth1")] {
        namespace.ip(&["link", "set", device, "down"])?;
        until(&bed.net, "eth1", "down", |port| !port.link && port.state == "connected")?;
        namespace.ip(&["link", "set", device, "up"])?;
        until(&bed.net, "eth1", "up", |port| port.link)?;
    }
    settle(&bed.far)?;
    bed.far.ip(&["neigh", "replace", "10.0.0.1", "lladdr", "02:00:00:00:00:01", "dev", "host0"])?;
    let socket = bed.socket(9)?;
    bed.echo(&socket, 100)?;
    // Nothing is left to do, so nobody works.
    let usage = bed.net.daemon.cpu_usage(std::time::Duration::from_millis(500))?;
    ensure!(usage < 0.5, "an idle daemon uses {usage} of a processor");
    bed.net.daemon.balanced_stats()?;
    Ok(())
}

#[test]
fn a_restarted_daemon_takes_the_device_again() -> Result<()> {
    let mut bed = Bed::new(ORDINARY, "")?;
    bed.greet()?;
    for kill in [true, false] {
        if kill {
            bed.net.daemon.kill()?;
        } else {
            bed.net.daemon.terminate()?;
        }
        bed.net.restart()?;
        bed.net.daemon.wait_link(&["p1", "p2", "eth1"], true, SOON)?;
        bed.greet()?;
        let socket = bed.socket(9)?;
        bed.echo(&socket, 1000)?;
        bed.net.daemon.balanced_stats()?;
    }
    Ok(())
}

#[test]
fn wires_come_and_go_at_run_time_and_bad_ones_are_refused() -> Result<()> {
    let mut bed = Bed::new(ORDINARY, "xdp_mode = \"copy\"")?;
    bed.greet()?;
    ensure!(bed.show("eth1")?.features.contains(&"xdp-copy".to_owned()));
    // What AF_XDP does not serve is said in a line each, here and in the log.
    let (said, log) = (warnings(&bed)?, bed.net.daemon.log_tail(50));
    for why in ["no zero copy", "VLAN tags are not seen", "may come without complete checksums"] {
        ensure!(said.matches(why).count() == 1 && log.matches(why).count() == 1, "{why}: {said}\n{log}");
    }
    ensure!(said.contains("port 'eth1': eth1: "), "{said}");
    ensure!(log.contains("port eth1: eth1 by AF_XDP: copy mode, 1 queue"), "{log}");

    let refused = bed.net.daemon.refusal(&["add-port", "w", "--kind", "xdp", "--device", "eth1"])?;
    ensure!(refused.ends_with("port 'w': device eth1 belongs to port 'eth1' already"), "{refused}");
    let refused = bed.net.daemon.refusal(&["add-port", "w", "--kind", "xdp", "--device", "eth7"])?;
    ensure!(refused.ends_with("port 'w': no network device 'eth7'"), "{refused}");
    let refused = bed.net.daemon.refusal(&["add-port", "w", "--kind", "xdp", "--device", "lo"])?;
    ensure!(refused.contains("it is not an Ethernet device"), "{refused}");

    // The device is the host's own again, and whether it is up does not matter.
    bed.net.daemon.ctl(&["del-port", "eth1"])?;
    bed.near.ip(&["addr", "add", "10.0.0.50/24", "dev", "eth1"])?;
    settle(&bed.far)?;
    let near = bed.near.run(|| Ok(std::net::UdpSocket::bind("10.0.0.50:9")?))?;
    near.set_read_timeout(Some(SOON))?;
    bed.socket(0)?.send_to(b"hello", "10.0.0.50:9")?;
    ensure!(near.recv(&mut [0; 16])? == 5);
    bed.near.ip(&["addr", "flush", "dev", "eth1"])?;
    bed.near.ip(&["link", "set", "eth1", "down"])?;
    let words = ["add-port", "w", "--kind", "xdp", "--device", "eth1", "--xdp-mode", "generic"];
    bed.net.daemon.ctl(&words)?;
    until(&bed.net, "w", "open", |port| !port.link)?;
    bed.near.ip(&["link", "set", "eth1", "up"])?;
    until(&bed.net, "w", "up", |port| port.link && port.features.contains(&"xdp-generic".to_owned()))?;
    bed.greet()?;
    // It is kept.
    bed.net.daemon.terminate()?;
    bed.net.restart()?;
    bed.net.daemon.wait_link(&["p1", "w"], true, SOON)?;
    bed.greet()?;
    bed.net.daemon.balanced_stats()?;
    Ok(())
}
