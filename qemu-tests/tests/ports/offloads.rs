//! Checksum and segmentation offloads: whole to who takes them, done in software for who does not.

use anyhow::{Result, ensure};
use qemu_tests::daemon::{DaemonConfig, PortConfig};
use qemu_tests::frontend::packet::{Packet, tcp};
use qemu_tests::frontend::{Builder, Features, NetHeader};
use qemu_tests::host::WorkDir;
use qemu_tests::net::{Guest, Net};

/// Sender, a receiver with every offload, and one with none.
fn net() -> Result<Net> {
    let dir = WorkDir::new()?;
    let ports = ["p1", "p2", "p3"].map(|name| PortConfig::server(name, &dir));
    let shape = |index, builder: Builder| match index {
        2 => builder.without(Features::GUEST_OFFLOADS),
        _ => builder,
    };
    let mut net = Net::start(dir, DaemonConfig::new(ports), shape)?;
    ensure!(net.guests[1].frontend.features().contains(Features::GUEST_TSO4 | Features::GUEST_TSO6));
    ensure!((net.guests[2].frontend.features() & Features::GUEST_OFFLOADS).0 == 0);
    net.greet()?;
    Ok(net)
}

/// TCP packets from the first guest to guest `to`, over IPv4 and IPv6, with flags that only the first (CWR) or the last
/// (PSH, FIN) segment may have.
fn tcp_packets(net: &Net, to: usize) -> [Packet; 2] {
    let flags = tcp::ACK | tcp::PSH | tcp::FIN | tcp::CWR;
    let (a, b) = (&net.guests[0], &net.guests[to]);
    let eth = Packet::eth(a.mac, b.mac);
    [eth.clone().ipv4(a.ip, b.ip), eth.ipv6(a.ip6, b.ip6)]
        .map(|packet| packet.tcp_segment((4000, 5001), u32::MAX - 20_000, 1, flags).payload_len(60_000))
}

/// Receives TCP segments until their payloads make up `payload`, and checks each.
fn receive_segments(guest: &mut Guest, payload: &[u8], size: usize, mtu: usize) -> Result<()> {
    let mut got: Vec<u8> = Vec::new();
    let mut sequence = u32::MAX - 20_000;
    while got.len() < payload.len() {
        let (header, frame, segment) = guest.expect_checked()?;
        ensure!(
            header.gso_type == NetHeader::GSO_NONE && header.flags & NetHeader::NEEDS_CSUM == 0,
            "{header:?}"
        );
        ensure!(frame.len() <= 14 + mtu, "a segment has {} bytes", frame.len());
        ensure!(segment.seq == sequence, "sequence {} follows {sequence}", segment.seq);
        let (first, last) = (got.is_empty(), got.len() + segment.payload.len() == payload.len());
        ensure!(last || segment.payload.len() == size, "{} bytes of payload", segment.payload.len());
        ensure!((segment.flags & tcp::CWR != 0) == first, "CWR stands in the first segment only");
        ensure!((segment.flags & (tcp::PSH | tcp::FIN) != 0) == last, "PSH and FIN stand in the last only");
        sequence = sequence.wrapping_add(segment.payload.len() as u32);
        got.extend(&frame[segment.payload]);
    }
    ensure!(got == payload, "the payload was changed");
    guest.expect_nothing()
}

#[test]
fn tso_goes_whole_to_who_takes_it_and_in_segments_to_who_does_not() -> Result<()> {
    let mut net = net()?;
    for round in 0..2 {
        for packet in tcp_packets(&net, 1) {
            let (header, frame) = packet.build_gso(1400);
            net.guests[0]
                .send_with(&NetHeader { gso_type: header.gso_type | NetHeader::GSO_ECN, ..header }, &frame)?;
            let (received, whole, _) = net.guests[1].expect_checked()?;
            ensure!(whole == frame, "round {round}: the super-frame was changed");
            ensure!(received.gso_type & !NetHeader::GSO_ECN == header.gso_type, "{received:?}");
            ensure!(received.gso_size == 1400 && received.flags & NetHeader::NEEDS_CSUM != 0, "{received:?}");
            ensure!(received.hdr_len == header.hdr_len, "{received:?}");
        }
        for packet in tcp_packets(&net, 2) {
            let (header, frame) = packet.build_gso(1400);
            let payload = frame[usize::from(header.hdr_len)..].to_vec();
            net.guests[0]
                .send_with(&NetHeader { gso_type: header.gso_type | NetHeader::GSO_ECN, ..header }, &frame)?;
            receive_segments(&mut net.guests[2], &payload, 1400, 1500)?;
        }
    }
    net.daemon.balanced_stats()?;
    Ok(())
}

#[test]
fn a_flooded_super_frame_suits_every_receiver() -> Result<()> {
    let mut net = net()?;
    let stranger = Packet::eth(net.guests[0].mac, [2, 0, 0, 0, 7, 7]).ipv4([10, 0, 0, 1], [10, 0, 0, 77]);
    let flags = tcp::ACK | tcp::PSH | tcp::CWR;
    let packet = stranger.tcp_segment((1, 2), u32::MAX - 20_000, 1, flags).payload_len(30_000);
    let (header, frame) = packet.build_gso(1448);
    net.guests[0]
        .send_with(&NetHeader { gso_type: header.gso_type | NetHeader::GSO_ECN, ..header }, &frame)?;
    let (_, whole, _) = net.guests[1].expect_checked()?;
    ensure!(whole == frame, "the super-frame was changed");
    let payload = frame[usize::from(header.hdr_len)..].to_vec();
    receive_segments(&mut net.guests[2], &payload, 1448, 1500)?;
    net.daemon.balanced_stats()?;
    Ok(())
}

#[test]
fn udp_segmentation_makes_datagrams() -> Result<()> {
    let mut net = net()?;
    let offered = net.guests[0].frontend.features();
    ensure!(offered.contains(Features::HOST_USO), "the port offers no USO: {offered:?}");
    let packet = net.packet(0, 1).udp(9, 10).payload_len(20_000);
    let (header, frame) = packet.build_gso(1200);
    net.guests[0].send_with(&header, &frame)?;
    let (received, whole, _) = net.guests[1].expect_checked()?;
    ensure!(whole == frame && received.gso_type == NetHeader::GSO_UDP_L4, "{received:?}");

    let (header, frame) = net.packet(0, 2).udp(9, 10).payload_len(20_000).build_gso(1200);
    net.guests[0].send_with(&header, &frame)?;
    let mut got: Vec<u8> = Vec::new();
    while got.len() < 20_000 {
        // Each is complete: the checker verifies its UDP length and checksum.
        let (_, datagram, checked) = net.guests[2].expect_checked()?;
        ensure!(checked.payload.len() == 1200.min(20_000 - got.len()), "{checked:?}");
        got.extend(&datagram[checked.payload]);
    }
    ensure!(got == frame[usize::from(header.hdr_len)..], "the payload was changed");
    net.daemon.balanced_stats()?;
    Ok(())
}

#[test]
fn a_partial_checksum_is_completed_for_who_cannot() -> Result<()> {
    let mut net = net()?;
    for to in [1, 2] {
        let (a, b) = (&net.guests[0], &net.guests[to]);
        let eth = Packet::eth(a.mac, b.mac);
        let packets = [
            eth.clone().ipv4(a.ip, b.ip).tcp(1, 2).payload_len(101),
            eth.clone().ipv4(a.ip, b.ip).udp(1, 2).payload_len(100),
            eth.clone().ipv6(a.ip6, b.ip6).tcp(1, 2).payload_len(1),
            eth.ipv6(a.ip6, b.ip6).udp(1, 2).payload_len(1400),
        ];
        for packet in packets {
            let (header, frame) = packet.build_partial();
            // The first packet of a flow and the second take different ways.
            for _ in 0..3 {
                net.guests[0].send_with(&header, &frame)?;
                let (received, bytes, _) = net.guests[to].expect_checked()?;
                if to == 2 {
                    ensure!(received.flags & NetHeader::NEEDS_CSUM == 0, "{received:?}");
                    ensure!(bytes == packet.build(), "completed otherwise than by us");
                } else {
                    ensure!(bytes == frame || bytes == packet.build(), "neither left alone nor completed");
                }
            }
        }
    }
    net.daemon.balanced_stats()?;
    Ok(())
}

#[test]
fn offsets_move_with_a_pushed_or_popped_tag() -> Result<()> {
    let dir = WorkDir::new()?;
    let ports = [PortConfig::server("p1", &dir).with("vlan = 10"), PortConfig::server("p2", &dir)];
    let mut net = Net::start(dir, DaemonConfig::new(ports), |_, builder| builder)?;
    // The checker compares checksum start and offset with where the headers really are.
    let (header, frame) = net.packet(0, 1).tcp(1, 2).payload_len(20_000).build_gso(1400);
    let (moved, tagged) = net.packet(0, 1).vlan(10).tcp(1, 2).payload_len(20_000).build_gso(1400);
    net.guests[0].send_with(&header, &frame)?;
    let (received, bytes, _) = net.guests[1].expect_checked()?;
    ensure!(bytes == tagged && received.hdr_len == moved.hdr_len, "{received:?}");

    let (header, frame) = net.packet(1, 0).vlan(10).tcp(2, 1).payload_len(20_000).build_gso(1400);
    let (moved, untagged) = net.packet(1, 0).tcp(2, 1).payload_len(20_000).build_gso(1400);
    net.guests[1].send_with(&header, &frame)?;
    let (received, bytes, _) = net.guests[0].expect_checked()?;
    ensure!(bytes == untagged && received.hdr_len == moved.hdr_len, "{received:?}");
    net.daemon.balanced_stats()?;
    Ok(())
}

#[test]
fn a_lying_offload_header_is_a_named_drop() -> Result<()> {
    let mut net = net()?;
    let (honest, frame) = net.packet(0, 1).tcp(1, 2).payload_len(5000).build_gso(1400);
    let lies = [
        NetHeader { csum_start: honest.csum_start + 2, ..honest },
        NetHeader { csum_start: 0xffff, ..honest },
        NetHeader { csum_offset: 6, ..honest },
        NetHeader { csum_offset: 0xffff, ..honest },
        NetHeader { gso_size: 0, ..honest },
        NetHeader { gso_type: 0x42, ..honest },
        NetHeader { gso_type: NetHeader::GSO_TCPV6, ..honest },
        NetHeader { gso_type: NetHeader::GSO_UDP_L4, ..honest },
        NetHeader { flags: 0, ..honest },
    ];
    for (count, lie) in lies.iter().enumerate() {
        net.guests[0].send_with(lie, &frame)?;
        net.guests[1].expect_nothing()?;
        let stats = net.daemon.balanced_stats()?;
        let dropped = stats.ports["p1"].rx_drops["bad_offload"];
        ensure!(dropped == count as u64 + 1, "{lie:?} was not dropped as bad_offload: {stats:#?}");
    }
    // hdr_len is only a hint (virtio 1.2, §5.1.6.2): a wrong one must neither harm nor be passed on.
    net.guests[0].send_with(&NetHeader { hdr_len: 9, ..honest }, &frame)?;
    let (received, bytes, _) = net.guests[1].expect_checked()?;
    ensure!(bytes == frame && received.hdr_len == honest.hdr_len, "{received:?}");
    Ok(())
}
