//! Front-ends that do what QEMU does not: no kicks, tiny and huge rings, calls that come and go, memory in any number of
//! pieces, and wishes that were not granted.

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;

use anyhow::{Context, Result, ensure};
use qemu_tests::daemon::{DaemonConfig, PortConfig};
use qemu_tests::frontend::wire::message;
use qemu_tests::frontend::{Builder, Features, Layout, NetHeader, RegionSpec};
use qemu_tests::host::{WorkDir, tail, wait_for};
use qemu_tests::net::{Net, QUIET, SOON};
use vhost::vhost_user::message::FrontendReq;

/// Two guests that know each other; the first one's front-end is as `shape` makes it.
fn net(shape: impl Fn(Builder) -> Builder) -> Result<Net> {
    let dir = WorkDir::new()?;
    let ports = ["p1", "p2"].map(|name| PortConfig::server(name, &dir));
    let shape = |index, builder| if index == 0 { shape(builder) } else { builder };
    let mut net = Net::start(dir, DaemonConfig::new(ports), shape)?;
    net.greet()?;
    Ok(net)
}

/// Runs `test` with split rings and with packed ones.
fn both(test: impl Fn(fn(Builder) -> Builder) -> Result<()>) -> Result<()> {
    test(|builder| builder).context("split")?;
    test(Builder::packed).context("packed")
}

/// Packets both ways, each of them once and in order, some at a time.
fn talk(net: &mut Net, packets: u16) -> Result<()> {
    const AT_ONCE: usize = 3;
    for (from, to) in [(0, 1), (1, 0)] {
        let numbers: Vec<u16> = (0..packets).collect();
        for some in numbers.chunks(AT_ONCE) {
            let frame = |&number: &u16| {
                net.packet(from, to).udp(number, 7).payload_len(usize::from(number) % 1400).build()
            };
            let frames: Vec<_> = some.iter().map(frame).collect();
            for frame in &frames {
                net.guests[from].send(frame)?;
            }
            for frame in &frames {
                net.guests[to].expect(frame).with_context(|| format!("from guest {from}, of {some:?}"))?;
            }
        }
    }
    net.daemon.balanced_stats()?;
    Ok(())
}

#[test]
fn who_never_kicks_is_polled() -> Result<()> {
    both(|kind| {
        let mut net = net(|builder| kind(builder).without_kicks())?;
        talk(&mut net, 200)?;
        // Also after a silence, in which who kicks would be slept for.
        net.guests[0].expect_nothing()?;
        talk(&mut net, 1)
    })
}

#[test]
fn what_was_kicked_before_a_ring_is_enabled_goes_when_it_is() -> Result<()> {
    both(|kind| {
        let mut net = net(kind)?;
        let there = net.packet(0, 1).udp(1, 2).payload_len(99).build();
        let back = net.packet(1, 0).udp(2, 1).payload_len(99).build();
        for _ in 0..3 {
            net.guests[0].frontend.enable_ring(1, false)?;
            net.guests[0].send(&there)?;
            net.guests[0].frontend.queue(0).tx.kick()?;
            net.guests[1].expect_nothing()?;
            net.guests[0].frontend.enable_ring(1, true)?;
            net.guests[1].expect(&there)?;
            // Nothing is put into a receive ring that is disabled.
            net.guests[0].frontend.enable_ring(0, false)?;
            net.guests[1].send(&back)?;
            net.guests[0].expect_nothing()?;
            net.guests[0].frontend.enable_ring(0, true)?;
            net.guests[1].send(&back)?;
            net.guests[0].expect(&back)?;
        }
        talk(&mut net, 20)
    })
}

#[test]
fn rings_may_be_tiny() -> Result<()> {
    for size in [4, 16] {
        both(|kind| {
            let mut net = net(|builder| kind(builder).ring_size(size))?;
            talk(&mut net, 300)?;
            net.guests[0].frontend.stop()?;
            net.guests[0].frontend.resume()?;
            talk(&mut net, 20)
        })
        .with_context(|| format!("{size} descriptors"))?;
    }
    Ok(())
}

#[test]
fn rings_may_be_as_large_as_they_can() -> Result<()> {
    const SIZE: u16 = 32768;
    both(|kind| {
        let mut net = net(|builder| kind(builder).ring_size(SIZE))?;
        // A ring full of frames to nobody, taken in one go; then it goes on at the place where it began.
        net.daemon.ctl(&["add-flow", "in_port(p1),eth(dst=02:00:00:00:00:77)", "drop"])?;
        let before = net.daemon.balanced_stats()?.ports["p1"].rx_packets;
        net.guests[0].frontend.enable_ring(1, false)?;
        let mac = net.guests[0].mac;
        let tx = &mut net.guests[0].frontend.queue(0).tx;
        tx.tx_reap()?;
        let frame = qemu_tests::frontend::packet::Packet::eth(mac, [2, 0, 0, 0, 0, 0x77]).payload(&[0; 50]);
        let frame = tx.prepare(&frame.build(), &NetHeader::default(), &Layout::single())?;
        let posted = tx.tx_batch(std::iter::repeat_n(&frame, usize::from(SIZE) + 1))?;
        ensure!(posted == usize::from(SIZE), "{posted} descriptors");
        net.guests[0].frontend.enable_ring(1, true)?;
        let tx = &mut net.guests[0].frontend.queue(0).tx;
        wait_for("the ring to be empty", SOON, || {
            tx.tx_reap()?;
            Ok((tx.in_flight() == 0).then_some(()))
        })?;
        let taken = net.daemon.balanced_stats()?.ports["p1"].rx_packets - before;
        ensure!(taken == u64::from(SIZE), "{taken} packets were taken");
        talk(&mut net, 300)
    })
}

#[test]
fn calls_may_be_turned_off_and_on() -> Result<()> {
    both(|kind| {
        let mut net = net(kind)?;
        let frame = net.packet(1, 0).udp(1, 2).payload_len(99).build();
        for _ in 0..3 {
            net.guests[0].frontend.set_call(0, false)?;
            let rx = &mut net.guests[0].frontend.queue(0).rx;
            rx.arm();
            rx.calls();
            net.guests[1].send(&frame)?;
            let rx = &mut net.guests[0].frontend.queue(0).rx;
            wait_for("a frame", SOON, || Ok(rx.has_used().then_some(())))?;
            ensure!(rx.calls() == 0, "called by a descriptor that was taken away");
            // Given back, it says at once what may have been missed.
            net.guests[0].frontend.set_call(0, true)?;
            let rx = &mut net.guests[0].frontend.queue(0).rx;
            wait_for("the call that was missed", SOON, || Ok((rx.calls() > 0).then_some(())))?;
            net.guests[0].expect(&frame)?;
            net.guests[0].frontend.queue(0).rx.arm();
            net.guests[1].send(&frame)?;
            let rx = &mut net.guests[0].frontend.queue(0).rx;
            wait_for("a call", SOON, || Ok((rx.calls() > 0).then_some(())))?;
            net.guests[0].expect(&frame)?;
        }
        talk(&mut net, 20)
    })
}

/// So many regions, of 128 KiB each, with a hole after each.
fn regions(count: usize) -> Vec<RegionSpec> {
    (0..count as u64).map(|i| RegionSpec { gpa: i << 20, len: 128 << 10 }).collect()
}

#[test]
fn memory_may_be_in_any_number_of_regions() -> Result<()> {
    // In one table, and one after the other.
    for (count, slots) in [(1, false), (2, false), (8, false), (32, false), (1, true), (9, true), (509, true)]
    {
        let shape = |builder: Builder| {
            let builder =
                builder.memory(&if count == 1 { vec![RegionSpec::mib(0, 4)] } else { regions(count) });
            if slots { builder.memory_slots() } else { builder }
        };
        let few = |builder: Builder| builder.ring_size(if count < 8 { 16 } else { 256 });
        let mut net = net(|builder| few(shape(builder))).with_context(|| format!("{count} regions"))?;
        talk(&mut net, 100).with_context(|| format!("{count} regions, by slots: {slots}"))?;
    }
    Ok(())
}

#[test]
fn memory_may_come_and_go_while_packets_pass() -> Result<()> {
    both(|kind| {
        let mut net = net(|builder| kind(builder).memory_slots())?;
        for _ in 0..3 {
            let added: Vec<u64> = (1..=8).map(|number| number << 32).collect();
            for &gpa in &added {
                net.guests[0].frontend.add_region(RegionSpec::mib(gpa, 1))?;
                talk(&mut net, 9)?; // from buffers in all regions
            }
            net.guests[0].frontend.queue(0).tx.tx_reap()?;
            for &gpa in &added {
                net.guests[0].frontend.remove_region(gpa)?;
                talk(&mut net, 9)?;
            }
        }
        // Receive buffers in memory that was added.
        net.guests[0].frontend.add_region(RegionSpec::mib(1 << 40, 1))?;
        let rx = &mut net.guests[0].frontend.queue(0).rx;
        let room = rx.free();
        rx.rx_fill(2048, room)?;
        talk(&mut net, 300)
    })
}

/// A message that a front-end may not send to us: the number of its request, and its payload.
type Strange = (&'static str, u32, Vec<u8>);

fn strange_messages() -> Vec<Strange> {
    let number = |value: u64| value.to_ne_bytes().to_vec();
    let set_protocol_features = FrontendReq::SET_PROTOCOL_FEATURES.into();
    let mut messages = vec![
        ("all protocol features", set_protocol_features, number(u64::MAX)),
        ("a protocol feature of the future", set_protocol_features, number(1 << 40)),
        ("all features", FrontendReq::SET_FEATURES.into(), number(u64::MAX)),
        ("a request of the future", 200, number(0)),
        ("no request", 0, Vec::new()),
    ];
    let ring_of = |size: u32| [1, size].map(u32::to_ne_bytes).concat();
    messages.extend(
        [("a ring of nothing", 0), ("a ring larger than any", 32769), ("a ring of all numbers", u32::MAX)]
            .map(|(name, size)| (name, FrontendReq::SET_VRING_NUM.into(), ring_of(size))),
    );
    let foreign = [
        ("SEND_RARP", FrontendReq::SEND_RARP),
        ("NET_SET_MTU", FrontendReq::NET_SET_MTU),
        ("IOTLB_MSG", FrontendReq::IOTLB_MSG),
        ("GET_CONFIG", FrontendReq::GET_CONFIG),
        ("GET_INFLIGHT_FD", FrontendReq::GET_INFLIGHT_FD),
        ("SET_STATUS", FrontendReq::SET_STATUS),
        ("GET_STATUS", FrontendReq::GET_STATUS),
    ];
    messages.extend(foreign.map(|(name, request)| (name, request.into(), number(1))));
    messages
}

/// What is wrong, whoever says so: the limit of lines holds for what is said about a port, and for nothing else.
fn warnings(net: &Net) -> Vec<String> {
    let log = tail(net.daemon.log(), usize::MAX);
    let is_wrong = |line: &&str| ["WARN ]", "ERROR]"].iter().any(|level| line.contains(level));
    log.lines().filter(is_wrong).map(str::to_owned).collect()
}

#[test]
fn a_ring_may_be_of_any_size_without_a_word() -> Result<()> {
    let mut net = Net::plain(2)?;
    net.guests[0].frontend.disconnect()?;
    let mut front_end = UnixStream::connect(&net.config.ports[0].socket)?;
    front_end.set_read_timeout(Some(SOON))?;
    // Those of a packed ring need not be powers of two. Before it has features nobody knows which kind it is.
    for size in [3u32, 100, 255, 32767] {
        let ring_and_size = [1, size].map(u32::to_ne_bytes).concat();
        front_end.write_all(&message(FrontendReq::SET_VRING_NUM.into(), &ring_and_size))?;
    }
    // Messages are answered in order.
    front_end.write_all(&message(FrontendReq::GET_FEATURES.into(), &[]))?;
    front_end.read_exact(&mut [0; 20])?;
    ensure!(warnings(&net).is_empty(), "{:#?}", warnings(&net));
    Ok(())
}

#[test]
fn what_was_not_offered_is_refused_in_one_line_and_nobody_else_notices() -> Result<()> {
    let mut net = Net::plain(3)?;
    net.greet()?;
    let said = |net: &Net| warnings(net).len();
    for (name, request, payload) in strange_messages() {
        let before = said(&net);
        net.guests[0].frontend.disconnect()?;
        let mut stranger = UnixStream::connect(&net.config.ports[0].socket)?;
        stranger.set_read_timeout(Some(SOON))?;
        stranger.write_all(&message(request, &payload)).context(name)?;
        // There is no answer but the end of the connection.
        let mut answer = Vec::new();
        match stranger.read_to_end(&mut answer) {
            Ok(_) => {}
            Err(error) => ensure!(error.kind() == std::io::ErrorKind::ConnectionReset, "{name}: {error}"),
        }
        ensure!(answer.is_empty(), "{name} is answered: {answer:02x?}");
        for number in 0..20 {
            let packet = net.packet(1, 2).udp(number, 2).payload_len(64).build();
            net.guests[1].send(&packet)?;
            net.guests[2].expect(&packet).with_context(|| format!("after: {name}"))?;
        }
        // A decent front-end is served.
        net.guests[0].frontend.resume().with_context(|| format!("after: {name}"))?;
        while net.guests[0].receive(QUIET)?.is_some() {}
        let packet = net.packet(1, 0).udp(1, 2).payload_len(64).build();
        net.guests[1].send(&packet)?;
        net.guests[0].expect(&packet).with_context(|| format!("after: {name}"))?;
        let lines = warnings(&net).split_off(before);
        ensure!(lines.len() == 1 && lines[0].contains(" port p1: "), "{name} was worth {lines:#?}");
    }
    ensure!(net.guests[0].frontend.features().contains(Features::VERSION_1));
    net.daemon.balanced_stats()?;
    Ok(())
}
