//! Guests played by the frontend library on a real `pointworkd` with the embedded bridge: the ports as users see them.

mod control;
mod faults;
mod memory;
mod migration;
mod odd;
mod offloads;
mod packed;

use anyhow::{Context, Result, ensure};
use qemu_tests::daemon::{DaemonConfig, PortConfig};
use qemu_tests::frontend::packet::{BROADCAST, Packet};
use qemu_tests::frontend::{Features, Layout, NetHeader};
use qemu_tests::host::WorkDir;
use qemu_tests::net::{Net, SOON};

#[test]
fn unknown_stations_are_flooded_to_and_known_ones_are_not() -> Result<()> {
    let mut net = Net::plain(3)?;
    // Nobody has spoken yet: to a stranger means to all.
    let first = net.packet(0, 1).udp(1, 2).payload_len(50);
    net.reaches(0, &first, &[1, 2])?;
    // The answer goes where the question came from; from then on both are known.
    let answer = net.packet(1, 0).udp(2, 1).payload_len(60);
    net.reaches(1, &answer, &[0])?;
    net.reaches(0, &first, &[1])?;
    // A known flow takes the same way as its first packet, however often.
    for payload in 0..200 {
        let packet = net.packet(0, 1).udp(1, 2).payload_len(payload).build();
        net.guests[0].send(&packet)?;
        net.guests[1].expect(&packet)?;
    }
    net.guests[2].expect_nothing()?;

    let mac = net.guests[2].mac;
    net.reaches(2, &Packet::eth(mac, BROADCAST).arp_request([10, 0, 0, 3], [10, 0, 0, 1]), &[0, 1])?;
    let multicast = Packet::eth(mac, [1, 0, 0x5e, 0, 0, 251]).ipv4([10, 0, 0, 3], [224, 0, 0, 251]);
    net.reaches(2, &multicast.udp(5353, 5353).payload(b"who?"), &[0, 1])?;
    net.reaches(2, &Packet::eth(mac, [2, 0, 0, 0, 9, 9]).payload(b"not IP, to a stranger"), &[0, 1])?;

    let stats = net.daemon.balanced_stats()?;
    ensure!(stats.ports["p1"].rx_packets == 202, "{stats:#?}");
    ensure!(stats.ports["p2"].tx_packets == 205, "{stats:#?}");
    ensure!(stats.ports["p1"].rx_forwarded > 190, "known flows take the fast path: {stats:#?}");
    Ok(())
}

#[test]
fn a_station_that_moves_is_found_again() -> Result<()> {
    let mut net = Net::plain(3)?;
    net.greet()?;
    let to_first = net.packet(1, 0).udp(7, 7).payload_len(30);
    net.reaches(1, &to_first, &[0])?;
    // The first guest's address now speaks from the third port, as after a migration.
    let moved = Packet::eth(net.guests[0].mac, BROADCAST).arp_request([10, 0, 0, 1], [10, 0, 0, 1]);
    net.reaches(2, &moved, &[0, 1])?;
    net.reaches(1, &to_first, &[2])?;
    // And back, by a unicast frame of an old flow.
    let back = net.packet(0, 1).udp(7, 7).payload_len(30);
    net.reaches(0, &back, &[1])?;
    net.reaches(1, &to_first, &[0])?;
    net.daemon.balanced_stats()?;
    Ok(())
}

#[test]
fn answers_come_back_on_the_queue_that_asked() -> Result<()> {
    let dir = WorkDir::new()?;
    let ports = [PortConfig::server("p1", &dir).queues(4), PortConfig::server("p2", &dir).queues(2)];
    let mut net = Net::start(dir, DaemonConfig::new(ports), |_, builder| builder)?;
    net.greet()?;
    for flow in 0..32_u16 {
        let pair = usize::from(flow % 4);
        let question = net.packet(0, 1).udp(1000 + flow, 53).payload_len(40).build();
        net.guests[0].frontend.queue(pair).tx.tx(&question, &NetHeader::default())?;
        net.guests[1].expect(&question)?;
        let answer = net.packet(1, 0).udp(53, 1000 + flow).payload_len(40).build();
        net.guests[1].frontend.queue(usize::from(flow / 4 % 2)).tx.tx(&answer, &NetHeader::default())?;
        let (came_on, _, frame) = net.guests[0].receive(SOON)?.expect("an answer");
        ensure!(frame == answer, "flow {flow}: another frame came");
        ensure!(came_on == pair, "flow {flow} asked on queue {pair}, the answer came on {came_on}");
    }
    // Without the second half of the queues, everything still arrives on the first.
    net.guests[0].frontend.enable_queue_pairs(2)?;
    for flow in 0..8_u16 {
        let answer = net.packet(1, 0).udp(53, 1000 + flow).payload_len(40).build();
        net.guests[1].send(&answer)?;
        let (came_on, _, frame) = net.guests[0].receive(SOON)?.expect("a frame on an enabled queue");
        ensure!(frame == answer && came_on < 2, "flow {flow} came on queue {came_on}");
    }
    net.daemon.balanced_stats()?;
    Ok(())
}

#[test]
fn every_descriptor_layout_reaches_every_kind_of_buffer() -> Result<()> {
    let layouts = [
        Layout::single(),
        Layout::split_header(),
        Layout::chain(3),
        Layout::pieces(&[1, 10, 1, 13, 21]),
        Layout::split_header().indirect(),
        Layout::chain(30).indirect(),
    ];
    let left_out = [
        Features::default(),
        Features::MRG_RXBUF,
        Features::EVENT_IDX,
        Features::INDIRECT_DESC,
        Features::MRG_RXBUF | Features::EVENT_IDX,
    ];
    for (left_out, packed) in left_out.into_iter().flat_map(|features| [(features, false), (features, true)])
    {
        let dir = WorkDir::new()?;
        let ports = ["p1", "p2"].map(|name| PortConfig::server(name, &dir).with("mtu = 9000"));
        let mut net = Net::start(dir, DaemonConfig::new(ports), |_, builder| {
            let builder = builder.without(left_out);
            if packed { builder.packed() } else { builder }
        })?;
        net.greet()?;
        ensure!(net.guests[0].frontend.features().contains(Features::RING_PACKED) == packed);
        let indirect = net.guests[0].frontend.features().contains(Features::INDIRECT_DESC);
        for (number, layout) in layouts.iter().enumerate().filter(|(number, _)| indirect || *number < 4) {
            for len in [0, 1, 18, 1472, 2000, 4000, 8972] {
                let frame = net.packet(0, 1).udp(number as u16 + 1, 2).payload_len(len).build();
                net.guests[0].frontend.queue(0).tx.tx_with(&frame, &NetHeader::default(), layout)?;
                let what = || format!("{layout:?}, {len} bytes, without {left_out:?}, packed: {packed}");
                net.guests[1].expect(&frame).with_context(what)?;
            }
        }
        net.daemon.balanced_stats()?;
    }
    Ok(())
}

#[test]
fn a_polling_driver_is_not_called_and_indices_wrap() -> Result<()> {
    for packed in [false, true] {
        polls(packed).with_context(|| format!("packed: {packed}"))?;
    }
    Ok(())
}

fn polls(packed: bool) -> Result<()> {
    use qemu_tests::frontend::Notify;
    let dir = WorkDir::new()?;
    let ports = ["p1", "p2"].map(|name| PortConfig::server(name, &dir));
    let config = DaemonConfig::new(ports);
    let mut net = Net::start(dir, config, |_, builder| {
        let builder = builder.notify(Notify::Poll).first_index(65_500);
        if packed { builder.packed() } else { builder }
    })?;
    net.greet()?;
    let calls = |net: &mut Net| {
        let queue = net.guests[1].frontend.queue(0);
        queue.rx.calls() + queue.tx.calls()
    };
    calls(&mut net);
    let frame = net.packet(0, 1).udp(1, 2).payload_len(80).build();
    for _ in 0..1000 {
        net.guests[0].send(&frame)?;
        net.guests[1].expect(&frame)?;
    }
    ensure!(calls(&mut net) == 0, "a driver that polls was called");
    net.daemon.balanced_stats()?;
    Ok(())
}

#[test]
fn access_ports_and_trunks_keep_vlans_apart() -> Result<()> {
    let dir = WorkDir::new()?;
    let ports = [
        PortConfig::server("p1", &dir).with("vlan = 10"),
        PortConfig::server("p2", &dir),
        PortConfig::server("p3", &dir).with("vlan = 20"),
        PortConfig::server("p4", &dir).with("trunks = [20, 30]"),
    ];
    let mut net = Net::start(dir, DaemonConfig::new(ports), |_, builder| builder)?;
    let untagged = Packet::eth(net.guests[0].mac, BROADCAST).arp_request([10, 0, 0, 1], [10, 0, 0, 2]);
    net.guests[0].send(&untagged.build())?;
    net.guests[1].expect(&untagged.clone().vlan(10).build())?;
    net.guests[2].expect_nothing()?;
    net.guests[3].expect_nothing()?;

    let answer = net.packet(1, 0).udp(1, 2).payload_len(30);
    net.guests[1].send(&answer.clone().vlan(10).build())?;
    net.guests[0].expect(&answer.build())?;
    // The same station is unknown in VLAN 20, and the first guest is not there.
    net.guests[1].send(&answer.clone().vlan(20).build())?;
    net.guests[2].expect(&answer.build())?;
    net.guests[3].expect(&answer.clone().vlan(20).build())?;
    net.guests[0].expect_nothing()?;
    // A trunk takes only what it carries; an access port takes no other VLAN's tag.
    let stray = net.packet(3, 1).vlan(10).udp(1, 2).build();
    net.guests[3].send(&stray)?;
    net.guests[1].expect_nothing()?;
    let stray = net.packet(2, 1).vlan(10).udp(1, 2).build();
    net.guests[2].send(&stray)?;
    net.guests[0].expect_nothing()?;
    net.guests[1].expect_nothing()?;
    net.daemon.balanced_stats()?;
    Ok(())
}

#[test]
fn explicit_flows_go_before_the_bridge_and_leave_without_a_trace() -> Result<()> {
    let mut net = Net::plain(3)?;
    net.greet()?;
    let doomed = Packet::eth(net.guests[0].mac, net.guests[1].mac)
        .ipv4([10, 0, 0, 1], [10, 0, 0, 9])
        .udp(1, 2)
        .payload_len(20);
    let other = net.packet(0, 1).udp(1, 2).payload_len(20);
    net.reaches(0, &doomed, &[1])?;

    let flow = "in_port(p1),eth_type(0x0800),ipv4(dst=10.0.0.9)";
    net.daemon.ctl(&["add-flow", flow, "drop"])?;
    net.reaches(0, &doomed, &[])?;
    net.reaches(0, &other, &[1])?;
    let stats = net.daemon.balanced_stats()?;
    ensure!(stats.ports["p1"].rx_drops["flow_drop"] == 1, "{stats:#?}");
    ensure!(net.daemon.ctl(&["add-flow", flow, "p3"]).is_err(), "the same flow twice overlaps");
    net.daemon.ctl(&["del-flow", flow])?;
    net.reaches(0, &doomed, &[1])?;

    // Elsewhere, to several, and rewritten.
    net.daemon.ctl(&["add-flow", flow, "p3"])?;
    net.reaches(0, &doomed, &[2])?;
    net.daemon.ctl(&["del-flow", flow])?;
    net.daemon.ctl(&["add-flow", flow, "p2,p3"])?;
    net.reaches(0, &doomed, &[1, 2])?;
    net.daemon.ctl(&["del-flow", flow])?;
    net.daemon.ctl(&["add-flow", flow, "push_vlan(vid=7,pcp=0),p3"])?;
    net.guests[0].send(&doomed.build())?;
    net.guests[2].expect(&doomed.clone().vlan(7).build())?;
    net.daemon.ctl(&["del-flow", "--all"])?;
    net.reaches(0, &doomed, &[1])?;
    net.daemon.balanced_stats()?;
    Ok(())
}
