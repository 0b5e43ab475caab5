//! Front-ends that hand the control queue over, as those do that know nothing of network devices.

use std::collections::BTreeSet;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use qemu_tests::daemon::{DaemonConfig, PortConfig};
use qemu_tests::frontend::packet::Packet;
use qemu_tests::frontend::{Builder, Descriptor};
use qemu_tests::host::{WorkDir, tail, wait_for};
use qemu_tests::net::{Net, QUIET, SOON};

const OK: u8 = 0;
const ERROR: u8 = 1;

/// Two guests; the first one hands its control queue over, and has so many queue pairs.
fn net(queues: u16, kind: fn(Builder) -> Builder) -> Result<Net> {
    let dir = WorkDir::new()?;
    let ports = [PortConfig::server("p1", &dir).queues(queues), PortConfig::server("p2", &dir)];
    Net::start(dir, DaemonConfig::new(ports), |index, builder| match index {
        0 => kind(builder).control_queue(),
        _ => builder,
    })
}

/// The commands by which a driver says how many queue pairs it uses.
fn pairs(count: u8) -> [u8; 4] {
    [4, 0, count, 0]
}

/// The queues by which packets of many flows come to the first guest.
fn queues_of_many_flows(net: &mut Net) -> Result<BTreeSet<usize>> {
    let mut queues = BTreeSet::new();
    for flow in 0..64 {
        let packet = net.packet(1, 0).udp(flow, 7).payload_len(10).build();
        net.guests[1].send(&packet)?;
        let (queue, _, frame) =
            net.guests[0].receive(SOON)?.with_context(|| format!("flow {flow} is lost"))?;
        ensure!(frame == packet, "another frame came");
        queues.insert(queue);
    }
    Ok(queues)
}

#[test]
fn commands_are_answered_and_filters_drop_nothing() -> Result<()> {
    for kind in [|builder| builder, Builder::packed] {
        let mut net = net(1, kind)?;
        net.greet()?;
        let mac = net.guests[0].mac;
        let table = [&[1, 0, 1, 0, 0, 0][..], &mac, &[0, 0, 0, 0]].concat();
        let good: [&[u8]; 8] = [
            &[0, 0, 0], // not promiscuous
            &[0, 1, 0], // not all multicast
            &[0, 5, 1], // no broadcast
            &table,
            &[&[1, 1][..], &mac].concat(),
            &[2, 0, 7, 0],
            &[2, 1, 7, 0],
            &[3, 0],
        ];
        for _ in 0..30 {
            for command in good {
                ensure!(net.guests[0].frontend.control(command)? == OK, "{command:?} is refused");
            }
        }
        for command in
            [&[0, 9, 1][..], &[1, 0, 9, 9, 9, 9], &pairs(1), &[9, 9], &[5, 0, 0, 0, 0, 0, 0, 0, 0, 0]]
        {
            ensure!(net.guests[0].frontend.control(command)? == ERROR, "{command:?} is taken");
        }
        // What the switch has for the port comes, whatever the driver has said.
        let other = Packet::eth(net.guests[1].mac, [2, 0, 0, 0, 9, 9]).vlan(9).payload(b"to a stranger");
        net.reaches(1, &other, &[0])?;
        net.greet()?;
        net.guests[0].frontend.stop()?;
        net.guests[0].frontend.resume()?;
        ensure!(net.guests[0].frontend.control(&[3, 0])? == OK);
        net.daemon.kill()?;
        net.restart()?;
        ensure!(net.guests[0].frontend.control(&[3, 0])? == OK, "after a restart");
        net.greet()?;
        net.daemon.balanced_stats()?;
    }
    Ok(())
}

#[test]
fn the_driver_says_how_many_queues_it_receives_by() -> Result<()> {
    for kind in [|builder| builder, Builder::packed] {
        let mut net = net(4, kind)?;
        net.greet()?;
        let active = |net: &Net| -> Result<u16> {
            let shown = net.daemon.show()?;
            Ok(shown.iter().find(|port| port.name == "p1").context("p1")?.active_queues)
        };
        ensure!(queues_of_many_flows(&mut net)? == BTreeSet::from([0]), "one, before it says anything");
        for (count, answer) in [(4, OK), (5, ERROR), (0, ERROR), (2, OK)] {
            ensure!(net.guests[0].frontend.control(&pairs(count))? == answer, "{count} pairs");
            let now: u16 = if count == 2 { 2 } else { 4 };
            ensure!(active(&net)? == now, "{} are active", active(&net)?);
            let queues = queues_of_many_flows(&mut net)?;
            ensure!(
                queues == (0..usize::from(now)).collect(),
                "{now} are active, packets came by {queues:?}"
            );
        }
        // It sends by any, at any time.
        let packet = net.packet(0, 1).udp(1, 2).payload_len(9).build();
        net.guests[0].frontend.queue(3).tx.tx(&packet, &Default::default())?;
        net.guests[1].expect(&packet)?;
        // A guest that is halted for a while says nothing when it goes on.
        net.guests[0].frontend.stop()?;
        net.guests[0].frontend.resume()?;
        ensure!(queues_of_many_flows(&mut net)? == BTreeSet::from([0, 1]));
        // On another connection it may have said anything before: the first queue is always right.
        net.guests[0].frontend.disconnect()?;
        net.guests[0].frontend.resume()?;
        ensure!(queues_of_many_flows(&mut net)? == BTreeSet::from([0]));
        // A driver that takes the device over has one again.
        ensure!(net.guests[0].frontend.control(&pairs(4))? == OK);
        net.guests[0].frontend.start()?;
        net.guests[0].post_buffers()?;
        while net.guests[0].receive(QUIET)?.is_some() {}
        ensure!(queues_of_many_flows(&mut net)? == BTreeSet::from([0]));
        net.daemon.balanced_stats()?;
    }
    Ok(())
}

/// A guest that asks without end is answered no faster than the control queue's rounds and pauses allow: however slow the machine
/// is, it takes that long at least.
#[test]
fn floods_are_slow() -> Result<()> {
    /// Commands that the ring has room for.
    const ROOM: usize = 32;
    for kind in [|builder| builder, Builder::packed] {
        let mut net = net(2, kind)?;
        net.greet()?;
        let mut flood = |commands: [&[u8]; 2], times: usize| -> Result<Duration> {
            let batch: Vec<&[u8]> = commands.into_iter().cycle().take(ROOM).collect();
            let start = Instant::now();
            for _ in 0..times {
                let answers = net.guests[0].frontend.controls(&batch)?;
                ensure!(answers == [OK; ROOM], "{answers:?}");
            }
            Ok(start.elapsed())
        };
        // Each of these sets another number, for which all workers are woken: one in 10 ms.
        let changes = flood([&pairs(2), &pairs(1)], 1)?;
        // These change nothing: eight in 1 ms.
        let same = flood([&pairs(1), &[3, 0]], 10)?;
        println!("{ROOM} changes in {changes:?}, {} other commands in {same:?}", 10 * ROOM);
        ensure!(changes >= Duration::from_millis(10) * (ROOM as u32 - 1), "changes took {changes:?}");
        ensure!(same >= Duration::from_millis(1) * (10 * ROOM as u32 / 8 - 1), "others took {same:?}");
        net.greet()?;
        net.daemon.balanced_stats()?;
    }
    Ok(())
}

#[test]
fn a_malformed_control_queue_stops_alone() -> Result<()> {
    let mut net = net(1, |builder| builder)?;
    net.greet()?;
    let attacks = [
        Descriptor { addr: 4096, len: 4, flags: 0, next: 0 },
        Descriptor { addr: 1 << 50, len: 4, flags: Descriptor::NEXT, next: 1 },
        Descriptor { addr: 4096, len: 1 << 20, flags: Descriptor::NEXT, next: 1 },
        Descriptor { addr: 4096, len: 4, flags: Descriptor::NEXT, next: 0 },
    ];
    for (number, attack) in attacks.into_iter().enumerate() {
        let ring = net.guests[0].frontend.control_ring()?;
        let mut raw = ring.raw();
        raw.set_descriptor(0, attack);
        raw.offer(0);
        ring.kick()?;
        wait_for("the fault", SOON, || {
            let told = tail(net.daemon.log(), usize::MAX).matches("port p1: control queue stopped").count();
            ensure!(told <= number + 1, "told {told} times");
            Ok((told == number + 1).then_some(()))
        })?;
        // Kicks without end are not worth anything.
        for _ in 0..1000 {
            net.guests[0].frontend.control_ring()?.kick()?;
        }
        // Packets go on.
        for (from, to) in [(0, 1), (1, 0)] {
            let packet = net.packet(from, to).udp(1, 2).payload_len(64).build();
            net.guests[from].send(&packet)?;
            net.guests[to].expect(&packet)?;
        }
        net.guests[0].frontend.start()?;
        net.guests[0].post_buffers()?;
        ensure!(net.guests[0].frontend.control(&[3, 0])? == OK, "after a reset");
    }
    net.daemon.balanced_stats()?;
    Ok(())
}
