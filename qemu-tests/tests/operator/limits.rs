//! What one port may use up, and that others do not notice.

use std::time::Instant;

use anyhow::{Context, Result, ensure};
use qemu_tests::daemon::{DaemonConfig, PortConfig};
use qemu_tests::frontend::packet::Packet;
use qemu_tests::frontend::{Layout, NetHeader};
use qemu_tests::host::{WorkDir, tail, wait_for};
use qemu_tests::net::{Net, SOON};

use crate::{says, settings};

/// Ports p1 to p4, the first of which has this line in its configuration.
fn limited(line: &str) -> Result<Net> {
    let dir = WorkDir::new()?;
    let mut ports = ["p1", "p2", "p3", "p4"].map(|name| PortConfig::server(name, &dir));
    ports[0] = ports[0].clone().with(line);
    Net::start(dir, DaemonConfig::new(ports), |_, builder| builder)
}

#[test]
fn a_storm_of_addresses_is_limited_and_others_are_not_disturbed() -> Result<()> {
    const RATE: u64 = 200;
    let mut net = limited(&format!("miss_rate = {RATE}"))?;
    net.greet()?;
    let other = net.packet(2, 3).udp(1, 2).payload_len(100);
    net.reaches(2, &other, &[3])?;
    let other = other.build();
    let before = net.daemon.balanced_stats()?;
    let start = Instant::now();
    let stranger = |number: u16| {
        let [high, low] = number.to_be_bytes();
        Packet::eth([2, 0, 0, 7, high, low], [2, 0, 0, 0, 0, 2]).payload_len(50)
    };
    let (strangers, others) = (4000_u16, 400);
    for number in 0..strangers {
        net.guests[0].send(&stranger(number).build())?;
        if number % (strangers / others) == 0 {
            net.guests[2].send(&other)?;
            net.guests[3].expect(&other).context("the other pair, during the storm")?;
        }
    }
    wait_for("the storm to be sent", SOON, || {
        let tx = &mut net.guests[0].frontend.queue(0).tx;
        tx.tx_reap()?;
        Ok((tx.in_flight() == 0).then_some(()))
    })?;
    let after = net.daemon.balanced_stats()?;
    // A bucket holds 16 packets or a tenth of a second's worth; one more for the edges of the clock.
    let allowed = (RATE as f64 * (start.elapsed().as_secs_f64() + 0.1)) as u64 + 1;
    let of = |counter: fn(&qemu_tests::daemon::PortStats) -> u64, port: &str| {
        counter(&after.ports[port]) - counter(&before.ports[port])
    };
    let asked = of(|port| port.rx_to_host, "p1");
    ensure!(asked > 0 && asked <= allowed, "{asked} packets went to the host, {allowed} may: {after:#?}");
    let limited = of(|port| port.rx_drops["miss_rate"], "p1");
    ensure!(limited >= u64::from(strangers) - allowed, "{limited} were dropped as miss_rate: {after:#?}");
    ensure!(of(|port| port.rx_packets, "p1") == u64::from(strangers));
    ensure!(of(|port| port.rx_packets, "p3") == u64::from(others) && of(|port| port.rx_to_host, "p3") == 0);
    ensure!(of(|port| port.tx_packets, "p4") == u64::from(others), "{after:#?}");
    for (name, port) in after.ports.iter().filter(|(name, _)| *name != "p1") {
        let drops: u64 = port.rx_drops.values().chain(port.tx_drops.values()).sum();
        ensure!(drops == 0 || name == "p2", "{name}: {port:#?}");
    }

    // What it had known goes on as if nothing was, and in time a stranger is let in again.
    let known = net.packet(0, 1).udp(1, 2).payload_len(33).build();
    wait_for("a known station to be heard", SOON, || {
        net.guests[0].send(&known)?;
        let frame = net.guests[1].receive(std::time::Duration::from_millis(20))?;
        Ok(frame.filter(|(_, _, frame)| *frame == known).map(drop))
    })
}

#[test]
fn only_a_few_packets_of_a_new_flow_ask_the_host() -> Result<()> {
    let mut net = limited("")?;
    net.greet()?;
    let before = net.daemon.balanced_stats()?;
    let packet = net.packet(0, 1).udp(1, 2).payload_len(20);
    let tx = &mut net.guests[0].frontend.queue(0).tx;
    let prepared = tx.prepare(&packet.build(), &NetHeader::default(), &Layout::single())?;
    // All at once: the worker takes up to 32 together, before anybody can have answered about the first.
    ensure!(tx.tx_batch(std::iter::repeat_n(&prepared, 32))? == 32);
    wait_for("the burst to be sent", SOON, || {
        tx.tx_reap()?;
        Ok((tx.in_flight() == 0).then_some(()))
    })?;
    let after = net.daemon.balanced_stats()?;
    let (then, now) = (&before.ports["p1"], &after.ports["p1"]);
    ensure!(now.rx_packets - then.rx_packets == 32, "{now:#?}");
    let asked = now.rx_to_host - then.rx_to_host;
    ensure!((1..=8).contains(&asked), "{asked} packets of one flow went to the host");
    let pending = now.rx_drops["miss_pending"] - then.rx_drops["miss_pending"];
    ensure!(asked + pending + now.rx_forwarded - then.rx_forwarded == 32, "{now:#?}");
    ensure!(pending > 0, "{now:#?}");
    // They were decided about in order, and from now on all are carried.
    while net.guests[1].receive(qemu_tests::net::QUIET)?.is_some() {}
    for _ in 0..50 {
        net.guests[0].send(&packet.build())?;
        net.guests[1].expect(&packet.build())?;
    }
    let last = net.daemon.balanced_stats()?;
    ensure!(last.ports["p1"].rx_forwarded - now.rx_forwarded == 50, "{last:#?}");
    Ok(())
}

#[test]
fn masks_are_a_port_s_own_budget() -> Result<()> {
    let mut net = limited("max_masks = 3")?;
    // None of them matches a packet that another matches.
    let masks = [
        "ipv4(dst=10.9.0.1)",
        "ipv4(src=10.9.0.0/255.255.255.0,dst=10.8.0.0/255.255.255.0)",
        "ipv4(dst=10.7.0.1,tos=0x10)",
    ];
    for mask in masks {
        net.daemon.ctl(&["add-flow", &format!("in_port(p1),eth_type(0x0800),{mask}"), "drop"])?;
    }
    let before = settings(&net.daemon)?;
    let fourth = "in_port(p1),eth_type(0x86dd),ipv6(proto=6)";
    says(&net.daemon.refusal(&["add-flow", fourth, "drop"])?, &["3 masks"])?;
    ensure!(settings(&net.daemon)? == before);
    // Another flow under a known mask, another port, and the port itself when it has room again.
    net.daemon.ctl(&["add-flow", "in_port(p1),eth_type(0x0800),ipv4(dst=10.9.0.2)", "drop"])?;
    net.daemon.ctl(&["add-flow", "in_port(p2),eth_type(0x86dd),ipv6(proto=6)", "drop"])?;

    // The bridge has no place for its flows: packets are answered one by one, which is not logged one by one.
    net.greet()?;
    let lines = |net: &Net| tail(net.daemon.log(), usize::MAX).lines().count();
    let (logged, start) = (lines(&net), Instant::now());
    let stats = net.daemon.balanced_stats()?;
    for number in 0..200 {
        // Of one flow only a few may ask in a while.
        let guest = &net.guests[0];
        let packet =
            Packet::eth(guest.mac, net.guests[1].mac).ipv4(guest.ip, [10, 1, 1, number]).udp(1, 2).build();
        net.guests[0].send(&packet)?;
        net.guests[1].expect(&packet).with_context(|| format!("packet {number}"))?;
    }
    let now = net.daemon.balanced_stats()?;
    ensure!(now.ports["p1"].rx_to_host - stats.ports["p1"].rx_to_host == 200, "{now:#?}");
    let allowed = 2 + start.elapsed().as_secs() as usize;
    ensure!(lines(&net) - logged <= allowed, "{}", net.daemon.log_tail(20));

    net.daemon.ctl(&["del-flow", "--all"])?;
    net.daemon.ctl(&["add-flow", fourth, "drop"])?;
    let packet = net.packet(0, 1).udp(1, 2);
    net.reaches(0, &packet, &[1])?;
    net.reaches(0, &packet, &[1])?;
    let last = net.daemon.balanced_stats()?;
    ensure!(last.ports["p1"].rx_forwarded > now.ports["p1"].rx_forwarded, "{last:#?}");
    Ok(())
}
