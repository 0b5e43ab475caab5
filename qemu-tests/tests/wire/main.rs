//! Wires: network devices as plain ports, by AF_XDP over veth pairs, between guests and the network stack of a namespace.

mod bed;
mod changes;
mod ovs;

use std::io::{Read, Write};
use std::net::{Ipv4Addr, TcpListener, TcpStream};

use anyhow::{Context, Result, ensure};
use bed::{Bed, HOST_IP, HOST_MAC, Joined, ORDINARY, Veth};
use qemu_tests::daemon::{DaemonConfig, PortConfig};
use qemu_tests::host::{WorkDir, wait_for};
use qemu_tests::net::{Net, QUIET, SOON};
use qemu_tests::netns::Namespace;
use qemu_tests::tap::Tap;

#[test]
fn a_guest_and_a_host_talk_over_the_embedded_bridge() -> Result<()> {
    let mut bed = Bed::new(ORDINARY, "")?;
    bed.greet()?;
    let socket = bed.socket(9)?;
    for len in [0, 1, 18, 1000, 1472] {
        bed.echo(&socket, len)?;
    }
    // A device takes nothing whole: the segments are cut and their checksums completed here.
    let (header, frame) = bed.packet().udp(1000, 9).payload_len(10_000).build_gso(1000);
    bed.net.guests[0].send_with(&header, &frame)?;
    let mut buffer = vec![0; 1 << 16];
    for _ in 0..10 {
        ensure!(socket.recv(&mut buffer)? == 1000);
    }
    let shown = bed.show("eth1")?;
    ensure!(shown.state == "connected" && shown.mtu == 1500 && shown.active_queues == 1, "{shown:?}");
    ensure!(shown.features.iter().any(|word| word.starts_with("xdp-")), "{shown:?}");
    let stats = bed.net.daemon.balanced_stats()?;
    ensure!(stats.ports["eth1"].rx_packets >= 7 && stats.ports["eth1"].tx_packets >= 8, "{stats:#?}");
    ensure!(stats.drops().is_empty(), "{:?}", stats.drops());
    Ok(())
}

#[test]
fn what_is_flooded_reaches_the_wire_and_its_floods_the_guests() -> Result<()> {
    use qemu_tests::frontend::packet::{BROADCAST, Packet};
    let mut bed = Bed::new(ORDINARY, "")?;
    let guest = &bed.net.guests[0];
    let hello = Packet::eth(guest.mac, BROADCAST).arp_request(guest.ip, [10, 0, 0, 77]).build();
    bed.net.guests[0].send(&hello)?;
    bed.net.guests[1].expect(&hello)?;
    let asking = bed.far.run(|| {
        let socket = std::net::UdpSocket::bind((Ipv4Addr::from(HOST_IP), 0))?;
        Ok(socket.send_to(b"who has?", "10.0.0.55:9")?)
    })?;
    ensure!(asking == 8);
    for guest in &mut bed.net.guests {
        let (_, frame, checked) = guest.expect_checked()?;
        ensure!(checked.ethertype == 0x0806 && frame[38..42] == [10, 0, 0, 55], "{checked:?}");
    }
    // What the bridge knows it does not flood.
    bed.greet()?;
    ensure!(bed.net.guests[1].receive(QUIET)?.is_none_or(|(_, _, frame)| frame[12..14] == [8, 6]));
    bed.net.daemon.balanced_stats()?;
    Ok(())
}

#[test]
fn tcp_goes_both_ways_with_complete_checksums() -> Result<()> {
    const LEN: usize = 1 << 20;
    let mut bed = Bed::new(ORDINARY, "")?;
    let guest = bed.net.guests.remove(0);
    let joined = Joined::new(guest)?;
    let listener = bed.far.run(|| Ok(TcpListener::bind((Ipv4Addr::from(HOST_IP), 80))?))?;
    let bytes: Vec<u8> = (0..LEN).map(|at| (at % 251) as u8).collect();
    std::thread::scope(|scope| -> Result<()> {
        // The host sends back what it gets, and both ways are full at once.
        scope.spawn(|| -> Result<()> {
            let (mut stream, _) = listener.accept()?;
            let mut reader = stream.try_clone()?;
            std::io::copy(&mut reader, &mut stream)?;
            Ok(stream.shutdown(std::net::Shutdown::Write)?)
        });
        let connect = || {
            let address = (Ipv4Addr::from(HOST_IP), 80).into();
            TcpStream::connect_timeout(&address, SOON).context("no connection")
        };
        let stream = joined.namespace.run(connect)?;
        stream.set_read_timeout(Some(SOON * 4))?;
        let (mut writer, bytes) = (stream.try_clone()?, &bytes);
        let sender = scope.spawn(move || -> Result<()> {
            writer.write_all(bytes)?;
            Ok(writer.shutdown(std::net::Shutdown::Write)?)
        });
        let mut got = Vec::new();
        (&stream).read_to_end(&mut got)?;
        sender.join().map_err(|_| anyhow::anyhow!("the sender panicked"))??;
        ensure!(got == *bytes, "{} of {LEN} bytes came back", got.len());
        Ok(())
    })?;
    joined.stop()?;
    let snmp = bed.far.run(|| Ok(std::fs::read_to_string("/proc/thread-self/net/snmp")?))?;
    ensure!(counter(&snmp, "Tcp:", "InCsumErrors")? == 0, "{snmp}");
    bed.net.daemon.balanced_stats()?;
    Ok(())
}

/// A counter of `/proc/net/snmp`.
fn counter(snmp: &str, protocol: &str, name: &str) -> Result<u64> {
    let mut lines = snmp.lines().filter(|line| line.starts_with(protocol)).map(str::split_whitespace);
    let (names, values) = (lines.next().context("no names")?, lines.next().context("no values")?);
    let mut pairs = names.zip(values);
    Ok(pairs.find(|(known, _)| *known == name).context("no such counter")?.1.parse()?)
}

#[test]
fn jumbo_packets_pass_in_several_buffers() -> Result<()> {
    let mut bed = Bed::new(Veth { queues: 1, mtu: 9000 }, "")?;
    bed.greet()?;
    let shown = bed.show("eth1")?;
    ensure!(shown.mtu == 9000 && shown.features.contains(&"multi-buffer".to_owned()), "{shown:?}");
    let socket = bed.socket(9)?;
    for len in [1473, 4000, 4100, 8972] {
        bed.echo(&socket, len)?;
    }
    let stats = bed.net.daemon.balanced_stats()?;
    ensure!(stats.drops().is_empty(), "{:?}", stats.drops());
    Ok(())
}

#[test]
fn the_mtu_of_the_device_is_enforced_and_followed() -> Result<()> {
    let mut bed = Bed::new(ORDINARY, "")?;
    bed.greet()?;
    let socket = bed.socket(9)?;
    let long = bed.packet().udp(1000, 9).payload_len(1473).build();
    for _ in 0..3 {
        bed.net.guests[0].send(&long)?;
    }
    bed.echo(&socket, 1472)?;
    let stats = bed.net.daemon.balanced_stats()?;
    ensure!(stats.ports["eth1"].tx_drops.get("mtu") == Some(&3), "{:?}", stats.drops());
    // The device takes more from now on.
    bed.near.ip(&["link", "set", "eth1", "mtu", "2000"])?;
    bed.far.ip(&["link", "set", "host0", "mtu", "2000"])?;
    bed::until(&bed.net, "eth1", "MTU 2000", |port| port.mtu == 2000 && port.link)?;
    let (header, frame) = bed.packet().udp(1000, 9).payload_len(1900).build_partial();
    bed.net.guests[0].send_with(&header, &frame)?;
    ensure!(socket.recv(&mut [0; 4096])? == 1900);
    bed.net.daemon.balanced_stats()?;
    Ok(())
}

#[test]
fn flows_over_several_queues_all_come_back() -> Result<()> {
    let mut bed = Bed::new(Veth { queues: 4, mtu: 1500 }, "")?;
    bed.greet()?;
    ensure!(bed.show("eth1")?.active_queues == 4, "{:?}", bed.show("eth1")?);
    let sockets = (2000..2032).map(|port| bed.socket(port)).collect::<Result<Vec<_>>>()?;
    // Whoever polls them.
    for workers in ["", "1", "0", "1,0", "auto"] {
        if !workers.is_empty() {
            bed.net.daemon.ctl(&["set-port", "eth1", "--workers", workers])?;
        }
        for (port, socket) in (2000..2032).zip(&sockets) {
            let packet = bed.packet().udp(port, port).payload_len(100);
            let answer = bed::echo(&mut bed.net.guests[0], socket, &packet, 100);
            answer.with_context(|| format!("flow {port}, workers '{workers}'"))?;
        }
    }
    let polled = bed.net.daemon.polls()?;
    ensure!(polled.iter().any(|queue| queue == "eth1.3@0"), "{polled:?}");
    let stats = bed.net.daemon.balanced_stats()?;
    ensure!(stats.drops().is_empty(), "{:?}", stats.drops());
    Ok(())
}

#[test]
fn tags_of_a_trunk_are_on_the_wire() -> Result<()> {
    use qemu_tests::frontend::packet::{BROADCAST, Packet};
    let near = Namespace::new()?;
    // The device is a TAP, so that its other end sees every byte.
    let mut tap = Tap::new(&near, "eth1")?;
    let dir = WorkDir::new()?;
    let ports = [PortConfig::server("p1", &dir).with("vlan = 10")];
    let config = DaemonConfig {
        namespace: Some(near.path()),
        more: bed::wire("eth1", "trunks = [10, 20]"),
        ..DaemonConfig::new(ports)
    };
    let mut net = Net::start(dir, config, |_, builder| builder)?;
    net.daemon.wait_link(&["p1", "eth1"], true, SOON)?;
    let mac = net.guests[0].mac;
    let ask = |packet: Packet| packet.arp_request([10, 0, 0, 1], HOST_IP).build();
    net.guests[0].send(&ask(Packet::eth(mac, BROADCAST)))?;
    let sent = wait_for("a frame on the wire", SOON, || tap.receive())?;
    let expected = ask(Packet::eth(mac, BROADCAST).vlan(10));
    ensure!(sent.starts_with(&expected), "{sent:02x?} is not {expected:02x?}");
    let answer = |packet: Packet| packet.ipv4(HOST_IP, [10, 0, 0, 1]).udp(1, 2).payload_len(100).build();
    // VLAN 30 is not on the trunk, and VLAN 20 not the guest's.
    for vlan in [30, 20, 10] {
        tap.send(&answer(Packet::eth(HOST_MAC, mac).vlan(vlan)))?;
    }
    net.guests[0].expect(&answer(Packet::eth(HOST_MAC, mac)))?;
    net.guests[0].expect_nothing()?;
    net.daemon.balanced_stats()?;
    Ok(())
}

#[test]
fn what_is_counted_as_sent_has_left() -> Result<()> {
    use qemu_tests::frontend::{Layout, NetHeader};
    let mut bed = Bed::new(ORDINARY, "")?;
    bed.greet()?;
    let received = |bed: &Bed| {
        let text = bed.far.run(|| Ok(std::fs::read_to_string("/proc/thread-self/net/dev")?))?;
        let line = text.lines().find_map(|line| line.trim().strip_prefix("host0:")).context("no host0")?;
        Ok::<u64, anyhow::Error>(line.split_whitespace().nth(1).context("no packets")?.parse()?)
    };
    let before = (received(&bed)?, bed.net.daemon.balanced_stats()?.ports["eth1"].tx_packets);
    // More at a time than the kernel sends by one call.
    let frame = bed.packet().udp(1000, 9).payload_len(100).build();
    let tx = &mut bed.net.guests[0].frontend.queue(0).tx;
    let prepared = tx.prepare(&frame, &NetHeader::default(), &Layout::single())?;
    let mut posted = 0;
    wait_for("a storm of packets", SOON * 2, || {
        posted += tx.tx_batch(std::iter::repeat_n(&prepared, 256))?;
        tx.tx_reap()?;
        Ok((posted > 10_000).then_some(()))
    })?;
    wait_for("all that was sent", SOON * 2, || {
        let stats = bed.net.daemon.balanced_stats()?;
        let sent = stats.ports["eth1"].tx_packets - before.1;
        let dropped: u64 = stats.ports["eth1"].tx_drops.values().sum();
        let taken = sent + dropped >= posted as u64;
        Ok((taken && sent > 0 && received(&bed)? - before.0 == sent).then_some(()))
    })?;
    let said = bed.net.daemon.ctl(&["show"])?["warnings"].to_string();
    ensure!(!said.contains("refused by the device's driver"), "{said}");
    Ok(())
}
