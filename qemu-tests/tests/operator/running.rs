//! Ports, flows and the daemon itself come and go under traffic.

use std::fs;
use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::UnixStream;

use anyhow::{Context, Result, ensure};
use qemu_tests::daemon::{DaemonConfig, PortConfig};
use qemu_tests::frontend::packet::Packet;
use qemu_tests::frontend::{NetHeader, RegionSpec};
use qemu_tests::host::{WorkDir, wait_for};
use qemu_tests::net::{Guest, Net, QUIET, SOON, builder};
use serde_json::{Value, json};

use crate::traffic::Traffic;
use crate::{terminate, text};

/// Two workers, and ports p1 and on with this many queue pairs each.
fn two_workers(queues: &[u16]) -> Result<Net> {
    let dir = WorkDir::new()?;
    let ports: Vec<PortConfig> = (1..)
        .zip(queues)
        .map(|(number, &queues)| PortConfig::server(&format!("p{number}"), &dir).queues(queues))
        .collect();
    let config = DaemonConfig { cpus: vec![0, 1], ..DaemonConfig::new(ports) };
    Net::start(dir, config, |_, builder| builder)
}

fn send_on(guest: &mut Guest, queue: usize, packet: &Packet) -> Result<()> {
    Ok(guest.frontend.queue(queue).tx.tx(&packet.build(), &NetHeader::default())?)
}

#[test]
fn sigterm_ends_it_at_once_with_traffic_running() -> Result<()> {
    let mut net = two_workers(&[2, 2])?;
    for round in 0..2 {
        net.greet().with_context(|| format!("round {round}"))?;
        let (there, back) = (net.packet(0, 1).udp(1, 2), net.packet(1, 0).udp(2, 1));
        let traffic =
            [Traffic::start(&mut net.guests[0], &there)?, Traffic::start(&mut net.guests[1], &back)?];
        traffic.iter().try_for_each(|traffic| traffic.flows(1000))?;
        terminate(&mut net)?;
        for (traffic, guest) in traffic.into_iter().zip(&mut net.guests) {
            traffic.stop(guest, false)?;
        }
        net.restart()?;
    }
    net.greet()?;
    net.daemon.balanced_stats()?;
    Ok(())
}

#[test]
fn a_port_is_deleted_under_traffic_and_its_slot_is_clean() -> Result<()> {
    let dir = WorkDir::new()?;
    let ports = ["p1", "p2", "p3"].map(|name| PortConfig::server(name, &dir).queues(2).with("vlan = 10"));
    let config = DaemonConfig { cpus: vec![0, 1], ..DaemonConfig::new(ports) };
    let mut net = Net::start(dir, config, |_, builder| builder)?;
    for round in 0..3 {
        net.greet().with_context(|| format!("round {round}"))?;
        // To p2 by learned and by explicit flows, and from it.
        let flow = "in_port(p3),eth(dst=02:00:00:00:00:02)";
        net.daemon.ctl(&["add-flow", flow, "p2"])?;
        let packets = [(0, 1), (1, 0), (2, 1)].map(|(from, to)| net.packet(from, to).udp(1, 2));
        let mut traffic: Vec<Traffic> = net
            .guests
            .iter_mut()
            .zip(&packets)
            .map(|(guest, packet)| Traffic::start(guest, packet))
            .collect::<Result<_>>()?;
        traffic[..2].iter().try_for_each(|traffic| traffic.flows(1000))?;
        let slot_of = |net: &Net, name: &str| -> Result<Option<u64>> {
            let show = net.daemon.ctl(&["show"])?;
            let ports = show["ports"].as_array().cloned().unwrap_or_default();
            Ok(ports.iter().find(|port| port["name"] == name).and_then(|port| port["slot"].as_u64()))
        };
        let slot = slot_of(&net, "p2")?;
        net.daemon.ctl(&["del-port", "p2"])?;
        ensure!(
            net.guests[1].frontend.wait_disconnected(SOON),
            "the guest of a deleted port stays connected"
        );

        // Another VLAN: whatever arrives there is what was meant for the slot's last port.
        let p4 = PortConfig::server("p4", &net.dir).queues(2);
        let socket = text(&p4.socket);
        net.daemon.ctl(&["add-port", "p4", "--socket", &socket, "--queues", "2", "--vlan", "20"])?;
        ensure!(slot_of(&net, "p4")? == slot, "the test needs the slot of p2 to be used again");
        let fourth = net.join(&p4)?;
        // The others go on: what goes to an address that is gone is flooded.
        traffic[0].flows(1000)?;
        traffic[2].flows(1000)?;
        net.guests[fourth].expect_nothing().context("at the slot's next port")?;

        let last = traffic.remove(2);
        last.stop(&mut net.guests[2], true)?;
        traffic.remove(1).stop(&mut net.guests[1], false)?;
        traffic.remove(0).stop(&mut net.guests[0], true)?;
        for guest in &mut net.guests {
            while guest.receive(QUIET)?.is_some() {}
        }
        let stats = net.daemon.balanced_stats().with_context(|| format!("round {round}"))?;
        ensure!(stats.ports["p4"].tx_packets == 0 && stats.ports["p4"].rx_packets == 0, "{stats:#?}");

        net.daemon.ctl(&["del-port", "p4"])?;
        net.daemon.ctl(&["del-flow", "--all"])?;
        net.guests.truncate(3);
        let socket = text(&net.config.ports[1].socket);
        net.daemon.ctl(&["add-port", "p2", "--socket", &socket, "--queues", "2", "--vlan", "10"])?;
        net.guests[1].frontend.start()?;
        net.guests[1].post_buffers()?;
    }
    Ok(())
}

/// File descriptors, threads, and KiB of memory of a process.
fn held(pid: u32) -> Result<(usize, usize, u64)> {
    let count = |what| Ok::<_, anyhow::Error>(fs::read_dir(format!("/proc/{pid}/{what}"))?.count());
    let status = fs::read_to_string(format!("/proc/{pid}/status"))?;
    let rss =
        status.lines().find_map(|line| line.strip_prefix("VmRSS:")?.split_whitespace().next()?.parse().ok());
    Ok((count("fd")?, count("task")?, rss.context("no VmRSS")?))
}

#[test]
fn ports_that_come_and_go_leave_nothing_behind() -> Result<()> {
    let mut net = two_workers(&[2, 2])?;
    net.greet()?;
    let pid = net.daemon.pid();
    let port = PortConfig::server("p3", &net.dir).queues(4);
    let socket = text(&port.socket);
    let frontend = builder(&port).memory(&[RegionSpec::mib(0, 16)]).build()?;
    let mut guest = Guest { frontend, mac: [2, 0, 0, 0, 1, 3], ip: [10, 0, 1, 3], ip6: [0xfd; 16] };
    let hello = Packet::eth(guest.mac, net.guests[0].mac).udp(1, 2).payload_len(64).build();
    let mut round = |net: &mut Net| -> Result<()> {
        net.daemon.ctl(&["add-port", "p3", "--socket", &socket, "--queues", "4"])?;
        guest.frontend.start()?;
        guest.post_buffers()?;
        guest.send(&hello)?;
        net.guests[0].expect(&hello)?;
        net.daemon.ctl(&["del-port", "p3"])?;
        ensure!(guest.frontend.wait_disconnected(SOON), "a deleted port's connection stays");
        ensure!(!port.socket.exists(), "a deleted port's socket stays");
        Ok(())
    };
    for _ in 0..10 {
        round(&mut net)?;
    }
    let before = held(pid)?;
    for _ in 0..50 {
        round(&mut net)?;
    }
    // What a worker has given back is freed with the next change, so a descriptor more or less is no leak.
    wait_for("descriptors and threads to be as many as before", SOON, || {
        let now = held(pid)?;
        Ok((now.0 < before.0 + 5 && now.1 <= before.1).then_some(()))
    })
    .with_context(|| format!("{before:?} has become {:?}", held(pid)))?;
    let after = held(pid)?;
    ensure!(after.2 < before.2 + 4096, "{} KiB have become {} KiB", before.2, after.2);
    net.greet()?;
    net.daemon.balanced_stats()?;
    Ok(())
}

#[test]
fn after_sync_every_worker_has_what_one_has_learned() -> Result<()> {
    let mut net = two_workers(&[2, 1])?;
    net.greet()?;
    for round in 0..20_u8 {
        // A new station is learned from what it sends on one worker's queue …
        let station = Packet::eth([2, 0, 0, 0, 5, round], net.guests[1].mac);
        let packet = station.ipv4([10, 0, 5, round], net.guests[1].ip).udp(1, 2).payload_len(30);
        let queue = usize::from(round % 2);
        send_on(&mut net.guests[0], queue, &packet)?;
        net.guests[1].expect(&packet.build())?;
        let synced = net.daemon.ctl(&["sync"])?;
        ensure!(synced["flows"].as_u64() > Some(u64::from(round)), "{synced}");
        let before = net.daemon.stats()?;
        // … and known to the other.
        send_on(&mut net.guests[0], 1 - queue, &packet)?;
        net.guests[1].expect(&packet.build())?;
        let after = net.daemon.stats()?;
        let asked = after.ports["p1"].rx_to_host - before.ports["p1"].rx_to_host;
        ensure!(asked == 0, "round {round}: a worker did not know the flow");
    }
    net.daemon.balanced_stats()?;
    Ok(())
}

/// Asks over a control connection that is open already: the answer is here sooner than a command would end.
fn ask(control: &mut BufReader<UnixStream>, request: &Value) -> Result<Value> {
    control.get_mut().write_all(format!("{request}\n").as_bytes())?;
    let mut line = String::new();
    control.read_line(&mut line)?;
    let answer: Value = serde_json::from_str(&line)?;
    ensure!(answer.get("error").is_none(), "{request}: {answer}");
    Ok(answer)
}

#[test]
fn the_first_packet_after_del_flow_does_not_match() -> Result<()> {
    let mut net = two_workers(&[2, 1, 1])?;
    net.greet()?;
    let mut control = BufReader::new(UnixStream::connect(net.daemon.control())?);
    let flow = "in_port(p1),eth_type(0x0800),ipv4(proto=17),udp(dst=7)";
    for round in 0..200 {
        // Each packet is another, so that one that comes late or twice is noticed.
        let packet = |number: usize| net.packet(0, 1).udp(1000 + round, 7).payload_len(30 + number);
        let [by_flow, again, first, second] = [0, 1, 2, 3].map(packet);
        let queue = usize::from(round % 2);
        ask(&mut control, &json!({ "v": 1, "cmd": "add-flow", "flow": flow, "actions": "p3" }))?;
        for (queue, packet) in [(queue, &by_flow), (1 - queue, &again)] {
            send_on(&mut net.guests[0], queue, packet)?;
            net.guests[2].expect(&packet.build()).with_context(|| format!("round {round}"))?;
        }
        ask(&mut control, &json!({ "v": 1, "cmd": "del-flow", "which": { "flow": flow } }))?;
        for (queue, packet) in [(queue, &first), (1 - queue, &second)] {
            send_on(&mut net.guests[0], queue, packet)?;
            net.guests[1].expect(&packet.build()).with_context(|| format!("round {round}"))?;
        }
    }
    net.guests[1].expect_nothing()?;
    net.guests[2].expect_nothing()?;
    net.daemon.balanced_stats()?;
    Ok(())
}

#[test]
fn workers_share_ports_of_several_queues() -> Result<()> {
    let mut net = two_workers(&[4, 2, 1])?;
    net.greet()?;
    for flow in 0..24_u16 {
        for (from, to) in [(0, 1), (1, 2), (2, 0), (1, 0), (0, 2)] {
            let queues = net.guests[from].frontend.queue_pairs();
            for number in 0..4 {
                let packet = net.packet(from, to).udp(flow, 7).payload_len(10 + number);
                send_on(&mut net.guests[from], usize::from(flow) % queues, &packet)?;
                net.guests[to].expect(&packet.build()).with_context(|| format!("{from} to {to}, {flow}"))?;
            }
        }
    }
    let packets = [(0, 1), (1, 2), (2, 0)].map(|(from, to)| net.packet(from, to).udp(1, 2).payload_len(500));
    let traffic: Vec<Traffic> = net
        .guests
        .iter_mut()
        .zip(&packets)
        .map(|(guest, packet)| Traffic::start(guest, packet))
        .collect::<Result<_>>()?;
    traffic.iter().try_for_each(|traffic| traffic.flows(5000))?;
    for (traffic, guest) in traffic.into_iter().zip(&mut net.guests) {
        traffic.stop(guest, true)?;
    }
    let stats = net.daemon.balanced_stats()?;
    for drop in stats.drops().keys() {
        ensure!(drop.ends_with("tx rx_ring_full"), "{drop}: {stats:#?}");
    }
    let stats = net.daemon.ctl(&["stats"])?;
    for worker in ["/workers/0/packets", "/workers/1/packets"] {
        let packets = stats.pointer(worker).and_then(Value::as_u64);
        ensure!(packets > Some(1000), "{worker}: {packets:?}");
    }
    Ok(())
}
