//! What Pointwork leaves to Open vSwitch: first packets, the host's own, and all that is unusual.

use std::io::Read;
use std::net::{TcpListener, UdpSocket};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use qemu_tests::frontend::NetHeader;
use qemu_tests::frontend::packet::tcp::{ACK, PSH, SYN};
use qemu_tests::frontend::packet::{BROADCAST, Packet};
use qemu_tests::host::wait_for;
use qemu_tests::net::{QUIET, SOON};

use crate::Bench;

/// Where the host is on the bridge.
const HOST: [u8; 4] = [10, 0, 0, 254];

#[test]
fn the_first_packet_is_decided_by_ovs_and_the_next_here() -> Result<()> {
    let mut it = Bench::start(2)?;
    it.greet()?;
    let before = it.daemon().stats()?;
    let packet = it.net.packet(0, 1).udp(1, 2).payload_len(300);
    let frame = packet.build();
    it.net.guests[0].send(&frame)?;
    it.net.guests[1].expect(&frame)?;
    let first = it.daemon().stats()?;
    ensure!(first.ports["p1"].rx_to_host == before.ports["p1"].rx_to_host + 1, "{first:?}");
    ensure!(first.paths.miss == before.paths.miss + 1, "{first:?}");
    it.daemon().ctl(&["sync"])?;
    for _ in 0..10 {
        it.net.guests[0].send(&frame)?;
        it.net.guests[1].expect(&frame)?;
    }
    let then = it.daemon().stats()?;
    ensure!(then.ports["p1"].rx_to_host == first.ports["p1"].rx_to_host, "{then:?}");
    ensure!(then.ports["p1"].rx_forwarded == first.ports["p1"].rx_forwarded + 10, "{then:?}");
    ensure!(then.paths.l1 + then.paths.l2 == first.paths.l1 + first.paths.l2 + 10, "{then:?}");
    ensure!(it.handling("dst=02:00:00:00:00:02")?.contains(&"fast".to_owned()), "{:#}", it.dump()?);
    it.net.guests[1].expect_nothing()?;
    it.finish().map(drop)
}

/// The host's Ethernet address on the bridge, which the guest asks for; only one may answer.
fn ask_for_host(it: &mut Bench) -> Result<[u8; 6]> {
    let (mac, ip) = (it.net.guests[0].mac, it.net.guests[0].ip);
    it.net.guests[0].send(&Packet::eth(mac, BROADCAST).arp_request(ip, HOST).build())?;
    let (_, _, reply) = it.net.guests[0].receive(SOON)?.context("no answer")?;
    ensure!(reply[12..14] == [8, 6] && reply[20..22] == [0, 2] && reply[28..32] == HOST, "{reply:02x?}");
    it.net.guests[0].expect_nothing().context("a second answer")?;
    Ok(reply[6..12].try_into()?)
}

#[test]
fn the_host_talks_to_guests() -> Result<()> {
    let mut it = Bench::start(2)?;
    it.inside("ip", &["addr", "add", "10.0.0.254/24", "dev", "br0"])?;
    it.inside("ip", &["link", "set", "lo", "up"])?;
    it.greet()?;
    let host = ask_for_host(&mut it)?;
    let (mac, ip) = (it.net.guests[0].mac, it.net.guests[0].ip);
    let to_host = || Packet::eth(mac, host).ipv4(ip, HOST);

    // Ping from the guest: one answer each.
    for seq in 0..5 {
        it.net.guests[0].send(&to_host().echo_request(7, seq).payload_len(56).build())?;
        let (_, _, checked) = it.net.guests[0].expect_checked()?;
        ensure!(checked.protocol == 1 && checked.dst == mac, "{checked:?}");
    }
    it.net.guests[0].expect_nothing()?;

    // UDP both ways, and what the host's stack would say where nobody listens: one answer, not two.
    let socket = it.ovs.namespace().run(|| Ok(UdpSocket::bind(("10.0.0.254", 9000))?))?;
    socket.set_read_timeout(Some(SOON))?;
    for number in 0..20_u8 {
        it.net.guests[0].send(&to_host().udp(5000, 9000).payload(&[number; 100]).build())?;
        let mut datagram = [0; 200];
        let (len, from) = socket.recv_from(&mut datagram)?;
        ensure!(datagram[..len] == [number; 100] && from.port() == 5000, "{from}: {len}");
        socket.send_to(&[number + 1; 50], from)?;
        let (_, frame, answer) = it.net.guests[0].expect_checked()?;
        ensure!(
            frame[answer.payload.clone()] == [number + 1; 50] && answer.ports == (9000, 5000),
            "{answer:?}"
        );
    }
    it.net.guests[0].send(&to_host().udp(5000, 9).build())?;
    let (_, _, unreachable) = it.net.guests[0].expect_checked()?;
    ensure!(unreachable.protocol == 1, "{unreachable:?}");
    it.net.guests[0].expect_nothing()?;

    // TCP: a connection that carries data.
    let listener = it.ovs.namespace().run(|| Ok(TcpListener::bind(("10.0.0.254", 9001))?))?;
    let (header, syn) = to_host().tcp_segment((6000, 9001), 100, 0, SYN).build_partial();
    it.net.guests[0].send_with(&header, &syn)?;
    let (_, frame, answer) = it.net.guests[0].expect_checked()?;
    ensure!(answer.flags == SYN | ACK, "{answer:?}");
    let at = answer.transport;
    let theirs = u32::from_be_bytes(frame[at + 4..at + 8].try_into()?) + 1;
    let data = to_host().tcp_segment((6000, 9001), 101, theirs, ACK | PSH).payload_len(900);
    let (header, data) = data.build_partial();
    it.net.guests[0].send_with(&header, &data)?;
    let (mut stream, _) = listener.accept()?;
    stream.set_read_timeout(Some(SOON))?;
    let mut got = [0; 900];
    stream.read_exact(&mut got)?;
    ensure!(data.ends_with(&got), "other data");
    drop(stream);
    while it.net.guests[0].receive(Duration::from_millis(300))?.is_some() {}

    it.settle()?;
    let handling = it.handling("in_port(p1)")?;
    ensure!(handling.iter().any(|how| how == "punt: foreign port br0"), "{:#}", it.dump()?);
    let show = it.daemon().ctl(&["show"])?;
    let punts = show["punts"].as_array().cloned().unwrap_or_default();
    ensure!(punts.iter().any(|punt| punt["reason"] == "foreign port br0"), "{show:#}");
    // Meanwhile guests talk past the host; the other has heard the question for its address.
    while it.net.guests[1].receive(QUIET)?.is_some() {}
    let packet = it.net.packet(0, 1).udp(1, 2);
    it.becomes_fast(0, 1, &packet)?;
    it.finish().map(drop)
}

#[test]
fn what_nobody_knows_is_carried() -> Result<()> {
    let mut it = Bench::start(2)?;
    it.greet()?;
    let (a, b) = (it.net.guests[0].mac, it.net.guests[1].mac);
    let [ip_a, ip_b] = [it.net.guests[0].ip6, it.net.guests[1].ip6];
    let by_hand = |next: u8, length: usize, headers: &[u8]| {
        let mut frame = Packet::eth(a, b).ethertype(0x86dd).build()[..14].to_vec();
        frame.extend([0x60, 0, 0, 0, (length >> 8) as u8, length as u8, next, 64]);
        frame.extend(ip_a.iter().chain(&ip_b));
        frame.extend(headers);
        frame
    };
    // Destination options of 1200 bytes before the transport header: PadN options (RFC 8200, §4.2), then UDP.
    let mut options = vec![17, 149];
    options.extend([1, 0]);
    while options.len() + 200 <= 1200 {
        options.extend([&[1, 198][..], &[0; 198]].concat());
    }
    let rest = 1200 - options.len() - 2;
    options.extend([&[1, rest as u8][..], &vec![0; rest]].concat());
    ensure!(options.len() == 1200);
    options.extend([0, 1, 0, 2, 0, 8, 0, 0]);
    let long = by_hand(60, options.len(), &options);
    let odd_protocol = by_hand(253, 40, &[0xa5; 40]);
    let mut ipv4 = it.net.packet(0, 1).udp(1, 2).payload_len(40).build();
    // Protocol 253 (RFC 3692), with the checksum as it must be then.
    ipv4[23] = 253;
    ipv4[24..26].fill(0);
    let sum: u32 = ipv4[14..34].chunks(2).map(|word| u32::from(word[0]) << 8 | u32::from(word[1])).sum();
    let sum = !((sum & 0xffff) + (sum >> 16)) as u16;
    ipv4[24..26].copy_from_slice(&sum.to_be_bytes());
    let unknown_type = Packet::eth(a, b).ethertype(0x9999).payload_len(100).build();
    let mut llc = Packet::eth(a, b).ethertype(50).payload_len(50).build();
    llc[14..17].copy_from_slice(&[0x42, 0x42, 3]);
    let cases = [
        ("an unknown Ethernet type", unknown_type),
        ("802.2", llc),
        ("an unknown protocol on IPv4", ipv4),
        ("an unknown protocol on IPv6", odd_protocol),
        ("long headers", long),
    ];
    for (what, frame) in cases {
        for round in 0..5 {
            it.net.guests[0].send(&frame)?;
            let (_, _, received) = it.net.guests[1].receive(SOON)?.with_context(|| what.to_owned())?;
            ensure!(received == frame, "{what}, {round}: {received:02x?}");
            it.settle()?;
        }
        it.net.guests[1].expect_nothing().context(what)?;
    }
    let stats = it.finish()?;
    ensure!(stats.drops().is_empty(), "{:?}", stats.drops());
    Ok(())
}

#[test]
fn offloads_are_carried_out_before_ovs_sees_a_packet() -> Result<()> {
    let mut it = Bench::start(2)?;
    it.greet()?;
    let packet = |it: &Bench, seq: u32, flags: u8| it.net.packet(0, 1).tcp_segment((80, 8080), seq, 0, flags);
    let (header, syn) = packet(&it, 1, SYN).build_partial();
    ensure!(header.flags & NetHeader::NEEDS_CSUM != 0);
    it.net.guests[0].send_with(&header, &syn)?;
    let (header, _, checked) = it.net.guests[1].expect_checked()?;
    ensure!(header.flags & NetHeader::NEEDS_CSUM == 0 && checked.flags == SYN, "{header:?} {checked:?}");

    // A super-frame without a flow becomes frames, one after the other.
    let other = it.net.packet(0, 1).tcp_segment((81, 8081), 1000, 1, ACK).payload_len(20_000);
    let (header, long) = other.build_gso(1400);
    it.net.guests[0].send_with(&header, &long)?;
    let mut next = 1000;
    while next < 21_000 {
        let (header, _, checked) = it.net.guests[1].expect_checked()?;
        ensure!(header.flags & NetHeader::NEEDS_CSUM == 0 && checked.seq == next, "{checked:?}");
        ensure!(checked.payload.len() <= 1400);
        next += checked.payload.len() as u32;
    }
    // With a flow it goes whole, as the receiver takes it so.
    it.settle()?;
    wait_for("a whole super-frame", SOON, || {
        it.net.guests[0].send_with(&header, &long)?;
        let (header, _, checked) = it.net.guests[1].expect_checked()?;
        if header.gso_size == 1400 {
            ensure!(checked.payload.len() == 20_000, "{}", checked.payload.len());
            return Ok(Some(()));
        }
        while it.net.guests[1].receive(Duration::from_millis(50))?.is_some() {}
        it.settle()?;
        Ok(None)
    })?;
    let stats = it.finish()?;
    ensure!(stats.drops().is_empty(), "{:?}", stats.drops());
    Ok(())
}
