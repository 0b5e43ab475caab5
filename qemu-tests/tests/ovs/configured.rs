//! What is configured around a port: VLANs, mirrors, policing, QoS, sampling, the kernel's own rules, MTUs.

use anyhow::{Context, Result, ensure};
use qemu_tests::daemon::PortConfig;
use qemu_tests::frontend::packet::Packet;
use qemu_tests::host::wait_for;
use qemu_tests::net::{Guest, SOON};
use qemu_tests::ovs::BRIDGE;

use crate::{Bench, hello};

/// The next frame, with its tags written out, whatever its header says.
fn frame(guest: &mut Guest) -> Result<Vec<u8>> {
    Ok(guest.receive(SOON)?.context("nothing came")?.2)
}

#[test]
fn access_and_trunk_ports() -> Result<()> {
    let mut it = Bench::start(4)?;
    // p1 and p2 are in VLAN 10, p3 in 20; p4 is a trunk of both.
    it.ovs.vsctl(&["set", "port", "p1", "tag=10", "--", "set", "port", "p2", "tag=10"])?;
    it.ovs.vsctl(&["set", "port", "p3", "tag=20", "--", "set", "port", "p4", "trunks=10,20"])?;
    it.settle()?;
    let [a, b, c, d] = [0, 1, 2, 3].map(|guest: usize| it.net.guests[guest].mac);
    let ip = [10, 0, 0, 9];
    let tagged = |src, vlan: u16| Packet::eth(src, [0xff; 6]).vlan(vlan).arp_request(ip, ip).build();
    for _ in 0..4 {
        it.net.guests[0].send(&hello(a, ip))?;
        it.net.guests[1].expect(&hello(a, ip))?;
        ensure!(frame(&mut it.net.guests[3])? == tagged(a, 10));
        it.net.guests[2].send(&hello(c, ip))?;
        ensure!(frame(&mut it.net.guests[3])? == tagged(c, 20));
        it.net.guests[3].send(&tagged(d, 20))?;
        it.net.guests[2].expect(&hello(d, ip))?;
        it.net.guests[1].send(&hello(b, ip))?;
        it.net.guests[0].expect(&hello(b, ip))?;
        ensure!(frame(&mut it.net.guests[3])? == tagged(b, 10));
        it.settle()?;
    }
    for guest in &mut it.net.guests {
        guest.expect_nothing()?;
    }
    // Unicast, by the fast path: within the VLAN, and over the trunk with the tag pushed and popped.
    let within = it.net.packet(0, 1).udp(1, 2).payload_len(64);
    it.becomes_fast(0, 1, &within)?;
    let plain = Packet::eth(d, a).ipv4([10, 0, 0, 4], [10, 0, 0, 1]).udp(1, 2).payload_len(64);
    let on_trunk = Packet::eth(d, a).vlan(10).ipv4([10, 0, 0, 4], [10, 0, 0, 1]).udp(1, 2).payload_len(64);
    let back = Packet::eth(a, d).ipv4([10, 0, 0, 1], [10, 0, 0, 4]).udp(1, 2).payload_len(64);
    let back_on_trunk =
        Packet::eth(a, d).vlan(10).ipv4([10, 0, 0, 1], [10, 0, 0, 4]).udp(1, 2).payload_len(64);
    it.net.guests[3].send(&tagged(d, 10))?;
    for guest in [0, 1] {
        it.net.guests[guest].expect(&hello(d, ip))?;
    }
    it.settle()?;
    let before = it.daemon().stats()?;
    for _ in 0..5 {
        it.net.guests[3].send(&on_trunk.build())?;
        it.net.guests[0].expect(&plain.build())?;
        it.net.guests[0].send(&back.build())?;
        ensure!(frame(&mut it.net.guests[3])? == back_on_trunk.build());
        it.settle()?;
    }
    let after = it.daemon().stats()?;
    for port in ["p1", "p4"] {
        ensure!(after.ports[port].rx_forwarded >= before.ports[port].rx_forwarded + 3, "{after:?}");
    }
    // A VLAN that the trunk does not carry.
    it.net.guests[3].send(&tagged(d, 30))?;
    for guest in &mut it.net.guests {
        guest.expect_nothing()?;
    }
    it.finish().map(drop)
}

#[test]
fn a_mirror_to_another_guest_is_fast() -> Result<()> {
    let mut it = Bench::start(3)?;
    it.greet()?;
    it.ovs.vsctl(&[
        "--",
        "--id=@to",
        "get",
        "port",
        "p3",
        "--",
        "--id=@from",
        "get",
        "port",
        "p1",
        "--",
        "--id=@m",
        "create",
        "mirror",
        "name=m0",
        "select-src-port=@from",
        "output-port=@to",
        "--",
        "set",
        "bridge",
        BRIDGE,
        "mirrors=@m",
    ])?;
    let packet = it.net.packet(0, 1).udp(1, 2).payload_len(200);
    let frame = packet.build();
    it.settle()?;
    wait_for("the fast path", SOON, || {
        let before = it.net.daemon.stats()?.ports["p1"].clone();
        it.net.guests[0].send(&frame)?;
        for guest in [1, 2] {
            it.net.guests[guest].expect(&frame)?;
        }
        let after = it.net.daemon.stats()?.ports["p1"].clone();
        Ok((after.rx_forwarded > before.rx_forwarded && after.fast_copies == before.fast_copies + 2)
            .then_some(()))
    })?;
    it.settle()?;
    it.ovs.vsctl(&["clear", "bridge", BRIDGE, "mirrors"])?;
    it.settle()?;
    it.becomes_fast(0, 1, &packet)?;
    it.net.guests[2].expect_nothing()?;
    it.finish().map(drop)
}

#[test]
fn what_the_fast_path_would_miss_keeps_a_port_from_it() -> Result<()> {
    let mut it = Bench::start(2)?;
    it.greet()?;
    let packet = it.net.packet(0, 1).udp(1, 2).payload_len(100);
    it.becomes_fast(0, 1, &packet)?;

    it.ovs.vsctl(&["set", "interface", "p1", "ingress_policing_rate=1000000"])?;
    it.wait_warning(&["p1", "policing", "sends takes the host path"])?;
    it.stays_slow(0, 1, &packet)?;
    ensure!(it.handling("in_port(p1)")?.iter().all(|how| how != "fast"), "{:#}", it.dump()?);
    it.ovs.vsctl(&["set", "interface", "p1", "ingress_policing_rate=0"])?;
    it.wait_no_warning("p1")?;
    it.becomes_fast(0, 1, &packet)?;

    it.ovs.vsctl(&[
        "set",
        "port",
        "p2",
        "qos=@q",
        "--",
        "--id=@q",
        "create",
        "qos",
        "type=linux-htb",
        "other-config:max-rate=1000000000",
    ])?;
    it.wait_warning(&["p2", "QoS linux-htb", "gets takes the host path"])?;
    it.stays_slow(0, 1, &packet)?;
    it.ovs.vsctl(&["--", "clear", "port", "p2", "qos", "--", "--all", "destroy", "qos"])?;
    it.wait_no_warning("p2")?;
    it.becomes_fast(0, 1, &packet)?;

    it.inside("tc", &["qdisc", "add", "dev", "p2", "root", "handle", "5:", "htb"])?;
    it.wait_warning(&["p2", "tc qdisc htb"])?;
    it.stays_slow(0, 1, &packet)?;
    it.inside("tc", &["qdisc", "del", "dev", "p2", "root"])?;
    it.wait_no_warning("p2")?;
    it.becomes_fast(0, 1, &packet)?;

    // A rule of nftables drops what its guest sends, so it has to drop it here, too.
    it.inside("nft", &["add", "table", "netdev", "t"])?;
    it.inside("nft", &["add chain netdev t c { type filter hook ingress device p1 priority 0; }"])?;
    it.wait_warning(&["p1", "nftables"])?;
    it.stays_slow(0, 1, &packet)?;
    it.inside("nft", &["delete", "table", "netdev", "t"])?;
    it.wait_no_warning("p1")?;
    it.becomes_fast(0, 1, &packet)?;
    it.finish().map(drop)
}

#[test]
fn samples_are_taken_by_ovs() -> Result<()> {
    let mut it = Bench::start(2)?;
    it.inside("ip", &["link", "set", "lo", "up"])?;
    it.greet()?;
    let packet = it.net.packet(0, 1).udp(1, 2).payload_len(100);
    it.becomes_fast(0, 1, &packet)?;
    it.ovs.vsctl(&[
        "--",
        "--id=@s",
        "create",
        "sflow",
        "agent=lo",
        "target=\"127.0.0.1:6343\"",
        "sampling=1",
        "--",
        "set",
        "bridge",
        BRIDGE,
        "sflow=@s",
    ])?;
    it.settle()?;
    it.stays_slow(0, 1, &packet)?;
    let handling = it.handling("in_port(p1)")?;
    ensure!(handling.iter().any(|how| how.starts_with("punt: userspace")), "{:#}", it.dump()?);
    it.ovs.vsctl(&["clear", "bridge", BRIDGE, "sflow"])?;
    it.settle()?;
    it.becomes_fast(0, 1, &packet)?;
    it.finish().map(drop)
}

#[test]
fn the_mtu_of_the_database_is_enforced() -> Result<()> {
    let mut it =
        Bench::secure(3, |port: PortConfig| if port.name == "p2" { port.with("mtu = 1400") } else { port })?;
    it.ovs.ofctl(&["add-flow", BRIDGE, "in_port=p1,actions=p2,p3"])?;
    ensure!(it.ovs.vsctl(&["get", "interface", "p2", "mtu_request"])?.trim() == "1400");
    wait_for("the MTU", SOON, || {
        let show = it.daemon().ctl(&["show"])?;
        Ok((show["ports"][1]["mtu"] == 1400 && show["ports"][2]["mtu"] == 1500).then_some(()))
    })?;
    let packet = |it: &Bench, len: usize| it.net.packet(0, 1).udp(1, 2).payload_len(len - 28);
    let small = packet(&it, 1400).build();
    for _ in 0..4 {
        it.net.guests[0].send(&small)?;
        for guest in [1, 2] {
            it.net.guests[guest].expect(&small)?;
        }
        it.settle()?;
    }
    let before = it.daemon().stats()?;
    let large = packet(&it, 1401).build();
    for _ in 0..4 {
        it.net.guests[0].send(&large)?;
        it.net.guests[2].expect(&large)?;
    }
    it.net.guests[1].expect_nothing()?;
    let after = it.daemon().balanced_stats()?;
    ensure!(after.ports["p1"].rx_forwarded == before.ports["p1"].rx_forwarded + 4, "{after:?}");
    let too_long = |drops: &std::collections::BTreeMap<String, u64>| drops.values().sum::<u64>();
    ensure!(too_long(&after.ports["p2"].tx_drops) == too_long(&before.ports["p2"].tx_drops) + 4, "{after:?}");

    // A change is in force without the guest's losing its port.
    it.ovs.vsctl(&["set", "interface", "p2", "mtu_request=1450"])?;
    wait_for("the MTU", SOON, || Ok((it.daemon().ctl(&["show"])?["ports"][1]["mtu"] == 1450).then_some(())))?;
    it.settle()?;
    it.net.guests[0].send(&large)?;
    for guest in [1, 2] {
        it.net.guests[guest].expect(&large)?;
    }
    it.finish().map(drop)
}
