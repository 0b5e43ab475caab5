//! Guests that misbehave, run dry, vanish and come back.

use std::time::Instant;

use anyhow::{Context, Result, ensure};
use qemu_tests::daemon::{DaemonConfig, PortConfig};
use qemu_tests::frontend::packet::{BROADCAST, Packet};
use qemu_tests::frontend::{Buffer, Descriptor, GuestMemory, RawRing, RegionSpec};
use qemu_tests::host::{WorkDir, tail, wait_for};
use qemu_tests::net::{Net, QUIET, SOON};

#[test]
fn a_full_receive_ring_drops_by_name_and_recovers() -> Result<()> {
    let mut net = Net::plain(2)?;
    net.greet()?;
    let frame = net.packet(0, 1).udp(1, 2).payload_len(100).build();
    wait_for("the flow", SOON, || {
        let before = net.daemon.stats()?.ports["p1"].rx_forwarded;
        net.guests[0].send(&frame)?;
        net.guests[1].expect(&frame)?;
        Ok((net.daemon.stats()?.ports["p1"].rx_forwarded > before).then_some(()))
    })?;
    let rx = &mut net.guests[1].frontend.queue(0).rx;
    rx.set_repost(false);
    let buffers = rx.in_flight() as u64;
    let before = net.daemon.balanced_stats()?.ports["p2"].tx_packets;
    // One at a time, so that what is dropped is not the sender's doing.
    for _ in 0..buffers + 50 {
        net.guests[0].send(&frame)?;
        let tx = &mut net.guests[0].frontend.queue(0).tx;
        ensure!(tx.wait(SOON)?, "the sender is not held up by a receiver that does not read");
        tx.tx_reap()?;
    }
    let stats = net.daemon.balanced_stats()?;
    ensure!(stats.ports["p2"].tx_packets == before + buffers, "{stats:#?}");
    ensure!(stats.ports["p2"].tx_drops["rx_ring_full"] == 50, "{stats:#?}");
    for _ in 0..buffers {
        net.guests[1].expect(&frame)?;
    }
    net.guests[1].expect_nothing()?;
    net.guests[1].frontend.queue(0).rx.rx_repost(usize::MAX)?;
    net.guests[0].send(&frame)?;
    net.guests[1].expect(&frame)?;
    net.daemon.balanced_stats()?;
    Ok(())
}

/// What a hostile driver does to its transmit ring. The buffers that it returns are what the ring points at.
type Attack = fn(&mut RawRing<'_>, &GuestMemory) -> Result<Vec<Buffer>>;

/// Offers descriptor 0 with these contents.
fn offer(raw: &mut RawRing<'_>, descriptor: Descriptor) -> Result<Vec<Buffer>> {
    raw.set_descriptor(0, descriptor);
    raw.offer(0);
    Ok(Vec::new())
}

/// Offers an indirect table with these descriptors.
fn offer_table(
    raw: &mut RawRing<'_>,
    memory: &GuestMemory,
    table: &[Descriptor],
    len: u32,
) -> Result<Vec<Buffer>> {
    let buffer = memory.alloc(table.len() * Descriptor::SIZE, 16)?;
    for (index, descriptor) in table.iter().enumerate() {
        buffer.write(index * Descriptor::SIZE, &descriptor.to_bytes());
    }
    raw.set_descriptor(0, Descriptor { addr: buffer.gpa(), len, flags: Descriptor::INDIRECT, next: 0 });
    raw.offer(0);
    Ok(vec![buffer])
}

fn attacks() -> Vec<(&'static str, Attack)> {
    vec![
        ("index far ahead", |raw, _| {
            raw.set_avail_index(raw.avail_index().wrapping_add(20_000));
            Ok(Vec::new())
        }),
        ("index going back", |raw, _| {
            raw.set_avail_index(raw.avail_index().wrapping_sub(1));
            Ok(Vec::new())
        }),
        ("head beyond the table", |raw, _| {
            raw.offer(0xffff);
            Ok(Vec::new())
        }),
        ("address outside memory", |raw, _| {
            offer(raw, Descriptor { addr: 1 << 50, len: 100, flags: 0, next: 0 })
        }),
        ("address that overflows", |raw, _| {
            offer(raw, Descriptor { addr: u64::MAX - 10, len: 100, flags: 0, next: 0 })
        }),
        ("end outside memory", |raw, _| {
            offer(raw, Descriptor { addr: (64 << 20) - 50, len: 100, flags: 0, next: 0 })
        }),
        ("length of 4 GiB", |raw, _| offer(raw, Descriptor { addr: 4096, len: u32::MAX, flags: 0, next: 0 })),
        ("chain that is a loop", |raw, _| {
            offer(raw, Descriptor { addr: 4096, len: 64, flags: Descriptor::NEXT, next: 0 })
        }),
        ("next beyond the table", |raw, _| {
            offer(raw, Descriptor { addr: 4096, len: 64, flags: Descriptor::NEXT, next: 0x8000 })
        }),
        ("write-only transmit buffer", |raw, _| {
            offer(raw, Descriptor { addr: 4096, len: 64, flags: Descriptor::WRITE, next: 0 })
        }),
        ("shorter than the header", |raw, _| {
            offer(raw, Descriptor { addr: 4096, len: 11, flags: 0, next: 0 })
        }),
        ("empty descriptor", |raw, _| offer(raw, Descriptor { addr: 4096, len: 0, flags: 0, next: 0 })),
        ("indirect table of half a descriptor", |raw, memory| {
            let entry = Descriptor { addr: 4096, len: 64, flags: 0, next: 0 };
            offer_table(raw, memory, &[entry; 2], 24)
        }),
        ("empty indirect table", |raw, memory| offer_table(raw, memory, &[Descriptor::default()], 0)),
        ("indirect table outside memory", |raw, _| {
            offer(raw, Descriptor { addr: 1 << 50, len: 32, flags: Descriptor::INDIRECT, next: 0 })
        }),
        ("indirect table with a loop", |raw, memory| {
            let entry = Descriptor { addr: 4096, len: 64, flags: Descriptor::NEXT, next: 0 };
            offer_table(raw, memory, &[entry; 2], 32)
        }),
        ("indirect within indirect", |raw, memory| {
            let entry = Descriptor { addr: 4096, len: 32, flags: Descriptor::INDIRECT, next: 0 };
            offer_table(raw, memory, &[entry; 2], 32)
        }),
        ("frame that is its own ring", |raw, _| {
            let [_, avail, used] = raw.addresses();
            offer(raw, Descriptor { addr: avail.min(used), len: 600, flags: 0, next: 0 })
        }),
    ]
}

#[test]
fn a_malformed_ring_harms_its_own_port_only() -> Result<()> {
    let mut net = Net::plain(3)?;
    net.greet()?;
    for (name, attack) in attacks() {
        let memory = net.guests[0].frontend.memory().clone();
        let tx = &mut net.guests[0].frontend.queue(0).tx;
        let buffers = attack(&mut tx.raw(), &memory).context(name)?;
        tx.kick()?;
        // The worker bites, and still serves the others, to whom some of these "frames" may be flooded.
        let packet = net.packet(1, 2).udp(1, 2).payload_len(64).build();
        for _ in 0..50 {
            net.guests[1].send(&packet)?;
            net.guests[2].expect_among_others(&packet).with_context(|| format!("after: {name}"))?;
        }
        drop(buffers);
        // The driver is loaded again, on a new connection if the daemon has closed the old one.
        net.guests[0].frontend.start().with_context(|| format!("restart after: {name}"))?;
        net.guests[0].post_buffers()?;
        while net.guests[0].receive(QUIET)?.is_some() {}
        for (from, to) in [(0, 1), (1, 0)] {
            let packet = net.packet(from, to).udp(3, 4).payload_len(64).build();
            net.guests[from].send(&packet)?;
            net.guests[to].expect_among_others(&packet).with_context(|| format!("recovery after: {name}"))?;
        }
        net.daemon.balanced_stats().context(name)?;
    }
    Ok(())
}

#[test]
fn a_malformed_receive_ring_harms_its_own_port_only() -> Result<()> {
    let mut net = Net::plain(3)?;
    net.greet()?;
    let attacks: [(&str, Descriptor); 4] = [
        ("read-only buffer", Descriptor { addr: 4096, len: 2048, flags: 0, next: 0 }),
        ("outside memory", Descriptor { addr: 1 << 50, len: 2048, flags: Descriptor::WRITE, next: 0 }),
        ("too short for a header", Descriptor { addr: 4096, len: 5, flags: Descriptor::WRITE, next: 0 }),
        (
            "chain that is a loop",
            Descriptor { addr: 4096, len: 0, flags: Descriptor::WRITE | Descriptor::NEXT, next: 0 },
        ),
    ];
    for (name, descriptor) in attacks {
        net.guests[0].frontend.start_ring_fresh(0)?;
        let rx = &mut net.guests[0].frontend.queue(0).rx;
        let mut raw = rx.raw();
        for _ in 0..4 {
            offer(&mut raw, descriptor)?;
        }
        rx.kick()?;
        let lost = net.packet(1, 0).udp(1, 2).payload_len(64).build();
        let packet = net.packet(1, 2).udp(1, 2).payload_len(64).build();
        for _ in 0..10 {
            net.guests[1].send(&lost)?;
            net.guests[1].send(&packet)?;
            net.guests[2].expect(&packet).with_context(|| format!("after: {name}"))?;
        }
        net.guests[0].frontend.start().with_context(|| format!("restart after: {name}"))?;
        net.guests[0].post_buffers()?;
        net.guests[1].send(&lost)?;
        net.guests[0].expect(&lost).with_context(|| format!("recovery after: {name}"))?;
        net.daemon.balanced_stats().context(name)?;
    }
    Ok(())
}

#[test]
fn a_storm_of_resets_and_connections_is_summed_up_in_the_log() -> Result<()> {
    const TIMES: usize = 100;
    let mut net = Net::plain(2)?;
    net.greet()?;
    let start = Instant::now();
    for _ in 0..TIMES {
        net.guests[0].frontend.start()?;
    }
    for _ in 0..TIMES {
        net.guests[0].frontend.abandon();
        net.guests[0].frontend.start()?;
    }
    net.guests[0].post_buffers()?;
    net.greet()?;
    // What is wrong is not lost in it.
    let tx = &mut net.guests[0].frontend.queue(0).tx;
    tx.raw().offer(0xffff);
    tx.kick()?;
    wait_for("the fault", SOON, || {
        let log = tail(net.daemon.log(), usize::MAX);
        Ok(log.contains("port p1: transmit ring of queue 0 stopped").then_some(()))
    })?;
    net.daemon.terminate()?;
    let periods = start.elapsed().as_secs() as usize / 30 + 1;
    let log = tail(net.daemon.log(), usize::MAX);
    let lines: Vec<&str> = log.lines().filter(|line| line.contains(" port p1: ")).collect();
    // Twenty that happen as a matter of course, as many that are wrong, and a sum of each for each period.
    ensure!(lines.len() <= 2 * (20 + periods), "{} lines:\n{log}", lines.len());
    let left_out =
        |line: &&str| -> Option<usize> { line.split_once(" more lines")?.0.rsplit(' ').next()?.parse().ok() };
    let left_out: usize = lines.iter().filter_map(left_out).sum();
    // A reset is the end of a link and its beginning, a connection has a beginning and an end.
    ensure!(left_out + lines.len() >= 4 * TIMES, "{left_out} left out of:\n{log}");
    Ok(())
}

#[test]
fn a_guest_may_vanish_come_back_and_reboot() -> Result<()> {
    let mut net = Net::plain(2)?;
    net.greet()?;
    let there = net.packet(0, 1).udp(1, 2).payload_len(64).build();
    let back = net.packet(1, 0).udp(2, 1).payload_len(64).build();
    let talk = |net: &mut Net, when: &str| -> Result<()> {
        net.guests[0].send(&there)?;
        net.guests[1].expect(&there).context(when.to_owned())?;
        net.guests[1].send(&back)?;
        net.guests[0].expect(&back).context(when.to_owned())?;
        net.daemon.balanced_stats().context(when.to_owned())?;
        Ok(())
    };
    talk(&mut net, "at first")?;
    for _ in 0..3 {
        net.guests[1].frontend.abandon();
        net.guests[0].send(&there)?;
        net.guests[1].frontend.resume()?;
        // What was sent meanwhile may or may not have made it.
        while net.guests[1].receive(QUIET)?.is_some() {}
        talk(&mut net, "after QEMU was killed and came back")?;
    }
    net.guests[1].frontend.disconnect()?;
    net.guests[1].frontend.resume()?;
    talk(&mut net, "after an orderly disconnection")?;
    net.guests[1].frontend.start()?;
    net.guests[1].post_buffers()?;
    talk(&mut net, "after a reboot")?;
    net.guests[1].frontend.stop_ring(0)?;
    net.guests[1].frontend.start_ring(0)?;
    talk(&mut net, "after one ring was stopped and started")?;
    net.guests[1].frontend.add_region(RegionSpec::mib(4 << 30, 16))?;
    net.guests[1].frontend.queue(0).rx.rx_fill(2048, 64)?;
    talk(&mut net, "after memory was added")
}

#[test]
fn the_daemon_may_be_restarted_under_its_guests() -> Result<()> {
    for mode in ["client", "server"] {
        let dir = WorkDir::new()?;
        let ports = ["p1", "p2"].map(|name| match mode {
            "client" => PortConfig::client(name, &dir),
            _ => PortConfig::server(name, &dir),
        });
        let mut net = Net::start(dir, DaemonConfig::new(ports), |_, builder| builder)?;
        net.greet()?;
        for round in 0..2 {
            net.daemon.kill()?;
            for guest in &mut net.guests {
                ensure!(guest.frontend.wait_disconnected(SOON), "{mode}: the connection outlives the daemon");
                // A guest does not know, and goes on sending.
                guest.send(&Packet::eth(guest.mac, BROADCAST).payload(b"to nobody").build())?;
            }
            net.restart().with_context(|| format!("{mode}, round {round}"))?;
            net.greet().with_context(|| format!("{mode}, round {round}"))?;
            let packet = net.packet(0, 1).udp(1, 2).payload_len(64);
            net.reaches(0, &packet, &[1])?;
            net.daemon.balanced_stats()?;
        }
    }
    Ok(())
}

#[test]
fn memory_that_is_taken_away_stops_its_own_port_only() -> Result<()> {
    let mut net = Net::plain(3)?;
    net.greet()?;
    for round in 1..=2 {
        let region = net.guests[0].frontend.memory().regions()[0].clone();
        let len = region.file().metadata()?.len();
        region.file().set_len(0)?;
        // Nobody looks into its rings before there is a reason.
        let to_it = net.packet(1, 0).udp(1, 2).payload_len(64).build();
        net.guests[1].send(&to_it)?;
        net.daemon.wait_link(&["p1"], false, SOON)?;
        let fault = wait_for("the fault to be shown", SOON, || {
            Ok(net.daemon.show()?.into_iter().find(|port| port.name == "p1").and_then(|port| port.fault))
        })?;
        ensure!(fault.contains("memory of the guest is gone"), "{fault}");
        for number in 0..50 {
            let packet = net.packet(1, 2).udp(number, 2).payload_len(64).build();
            net.guests[1].send(&packet)?;
            net.guests[2].expect(&packet)?;
        }
        // Given back, all zeroes, before this process touches it; then a driver takes the device over.
        region.file().set_len(len)?;
        net.guests[0].frontend.start()?;
        net.guests[0].post_buffers()?;
        while net.guests[0].receive(QUIET)?.is_some() {}
        net.daemon.wait_link(&["p1"], true, SOON)?;
        for (from, to) in [(0, 1), (1, 0)] {
            let packet = net.packet(from, to).udp(3, 4).payload_len(64).build();
            net.guests[from].send(&packet)?;
            net.guests[to].expect(&packet).with_context(|| format!("round {round}"))?;
        }
        let told = tail(net.daemon.log(), usize::MAX).matches("memory of the guest is gone").count();
        ensure!(told == round, "told {told} times in {round} rounds");
        net.daemon.balanced_stats()?;
    }
    Ok(())
}
