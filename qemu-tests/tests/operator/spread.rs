//! Which worker polls which queue: by the rule, by hand, and after a restart.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use qemu_tests::daemon::{Daemon, DaemonConfig, PortConfig};
use qemu_tests::frontend::{Builder, Features, Layout};
use qemu_tests::host::{WorkDir, wait_for};
use qemu_tests::net::Net;

use crate::traffic::Traffic;
use crate::{says, settings, terminate, text, warnings};

/// Longer than a queue takes to be moved for the load's sake: two windows and a busy machine.
const LATE: Duration = Duration::from_secs(40);

/// Two workers and these ports.
fn two_workers(ports: impl FnOnce(&WorkDir) -> Vec<PortConfig>) -> Result<Net> {
    let dir = WorkDir::new()?;
    let config = DaemonConfig { cpus: vec![0, 1], ..DaemonConfig::new(ports(&dir)) };
    Net::start(dir, config, |_, builder| builder)
}

fn polls(daemon: &Daemon, wanted: &[&str]) -> Result<()> {
    let polls = daemon.polls()?;
    ensure!(polls == wanted, "{polls:?}, not {wanted:?}");
    Ok(())
}

#[test]
fn workers_are_shown_set_and_kept() -> Result<()> {
    let mut net = two_workers(|dir| {
        let port = |name, queues| PortConfig::server(name, dir).queues(queues);
        vec![port("p1", 2), port("p2", 2).with("workers = [1]"), port("p3", 1)]
    })?;
    // Each to the worker with fewer queues, but for those that are pinned.
    polls(&net.daemon, &["p1.0@0", "p1.1@1", "p2.0@1!", "p2.1@1!", "p3.0@0"])?;
    net.greet()?;
    net.daemon.ctl(&["set-port", "p1", "--workers", "1,0"])?;
    net.daemon.ctl(&["set-port", "p2", "--workers", "auto"])?;
    let p4 = PortConfig::server("p4", &net.dir);
    let socket = text(&p4.socket);
    net.daemon.ctl(&["add-port", "p4", "--socket", &socket, "--workers", "0"])?;
    let set = ["p1.0@1!", "p1.1@0!", "p2.0@1", "p2.1@1", "p3.0@0", "p4.0@0!"];
    polls(&net.daemon, &set)?;
    net.greet()?;
    let before = settings(&net.daemon)?;
    for (words, parts) in [
        (&["set-port", "p1", "--workers", "0,2"][..], &["port 'p1'", "no worker 2", "workers 0 to 1"][..]),
        (&["set-port", "p9", "--workers", "0"], &["there is no port 'p9'"]),
        (&["set-port", "p1", "--workers", "0,0,0,0,0,0,0,0,0"], &["port 'p1'", "9 entries"]),
        (&["add-port", "p5", "--socket", "/tmp/never", "--workers", "7"], &["port 'p5'", "no worker 7"]),
    ] {
        says(&net.daemon.refusal(words)?, parts)?;
    }
    // But for the seconds since the last move nothing has changed.
    let unchanged = |of: &serde_json::Value| of.pointer("/show/workers").cloned();
    ensure!(unchanged(&settings(&net.daemon)?) == unchanged(&before));

    for end in ["kill", "terminate"] {
        match end {
            "kill" => net.daemon.kill()?,
            _ => terminate(&mut net)?,
        }
        net.restart()?;
        // What is not pinned is placed anew.
        let kept: Vec<String> =
            net.daemon.polls()?.into_iter().filter(|queue| queue.ends_with('!')).collect();
        ensure!(kept == ["p1.0@1!", "p1.1@0!", "p4.0@0!"], "after {end}: {kept:?}");
        let differs = |name| format!("port '{name}': its workers were set at run time");
        says(&warnings(&net.daemon)?, &[&differs("p1"), &differs("p2")])?;
        net.greet()?;
    }
    // With a worker less, guests are served all the same.
    net.daemon.kill()?;
    net.config.cpus = vec![0];
    net.config.ports.retain(|port| port.name != "p2");
    net.guests.remove(1);
    net.restart()?;
    polls(&net.daemon, &["p1.0@0", "p1.1@0", "p3.0@0", "p4.0@0!"])?;
    let fallback = "port 'p1': workers: no worker 1, only worker 0 is there";
    says(&warnings(&net.daemon)?, &[fallback, "chosen automatically"])?;
    net.greet()?;
    // What is as configured is no change any more.
    net.daemon.ctl(&["set-port", "p1", "--workers", "auto"])?;
    ensure!(warnings(&net.daemon)?.is_empty(), "{}", warnings(&net.daemon)?);
    net.daemon.balanced_stats()?;
    Ok(())
}

#[test]
fn queues_move_under_traffic_and_every_packet_is_accounted_for() -> Result<()> {
    let mut net =
        two_workers(|dir| ["p1", "p2"].map(|name| PortConfig::server(name, dir).queues(2)).to_vec())?;
    net.greet()?;
    let packets = [(0, 1), (1, 0)].map(|(from, to)| net.packet(from, to).udp(1, 2));
    // The bridge has made flows of them, for both workers.
    for ((from, to), packet) in [(0, 1), (1, 0)].into_iter().zip(&packets) {
        (0..3).try_for_each(|_| net.reaches(from, packet, &[to]))?;
    }
    let mut traffic = Vec::new();
    for (guest, packet) in net.guests.iter_mut().zip(&packets) {
        traffic.push(Traffic::start(guest, packet)?);
    }
    for workers in ["0", "1", "1,0", "0,1"].into_iter().cycle().take(24) {
        for port in ["p1", "p2"] {
            net.daemon.ctl(&["set-port", port, "--workers", workers])?;
        }
        traffic.iter().try_for_each(|traffic| traffic.flows(500))?;
    }
    polls(&net.daemon, &["p1.0@0!", "p1.1@1!", "p2.0@0!", "p2.1@1!"])?;
    for (traffic, guest) in traffic.into_iter().zip(&mut net.guests) {
        traffic.stop(guest, true)?;
    }
    let stats = net.daemon.balanced_stats()?;
    // A guest that is late may find its ring full; nothing else is lost.
    let drops = stats.drops();
    ensure!(drops.keys().all(|reason| reason.ends_with("tx rx_ring_full")), "{drops:?}");
    for worker in &stats.workers {
        let queues: Vec<(&str, u16)> =
            worker.queues.iter().map(|queue| (&*queue.port, queue.queue)).collect();
        ensure!(queues == [("p1", 0), ("p1", 1), ("p2", 0), ("p2", 1)], "{worker:?}");
        ensure!(worker.queues.iter().all(|queue| queue.busy_cycles > 0), "{worker:?}");
        let sum: u64 = worker.queues.iter().map(|queue| queue.busy_cycles).sum();
        ensure!(sum <= worker.busy_cycles, "{worker:?}");
    }
    Ok(())
}

#[test]
fn a_busy_worker_gives_queues_away() -> Result<()> {
    let dir = WorkDir::new()?;
    let ports = [
        PortConfig::server("p1", &dir).queues(4).with("workers = [0]"),
        PortConfig::server("p2", &dir).with("workers = [0]"),
    ];
    let config = DaemonConfig { cpus: vec![0, 1], ..DaemonConfig::new(ports) };
    // What p1 leaves to be segmented is work for the worker, and next to none for who sends it.
    let offloads = |index, builder: Builder| match index {
        0 => builder,
        _ => builder.without(Features::GUEST_OFFLOADS),
    };
    let mut net = Net::start(dir, config, offloads)?;
    net.greet()?;
    let (header, frame) = net.packet(0, 1).tcp(1, 2).payload_len(60_000).build_gso(1400);
    let guest = &mut net.guests[0];
    let mut queues = Vec::new();
    for queue in guest.frontend.take_queues() {
        let prepared = queue.tx.prepare(&frame, &header, &Layout::single())?;
        queues.push((queue, prepared));
    }
    // There is always something to take; its receiver takes nothing, so all but the first is dropped.
    let stop = Arc::new(AtomicBool::new(false));
    let told = stop.clone();
    let sender = std::thread::spawn(move || -> Result<()> {
        while !told.load(Ordering::Relaxed) {
            for (queue, prepared) in &mut queues {
                queue.tx.tx_reap()?;
                queue.tx.tx_batch(std::iter::repeat_n(&*prepared, 256))?;
            }
            // There are more threads than processors.
            std::thread::sleep(Duration::from_millis(1));
        }
        // The rings may still point at them: the test's process is short-lived.
        std::mem::forget(queues);
        Ok(())
    });
    let moves = |net: &Net| -> Result<u64> {
        let show = net.daemon.ctl(&["show"])?;
        ensure!(show["spread"]["rebalance"] == true, "{}", show["spread"]);
        show["spread"]["moves"].as_u64().context("no moves")
    };
    ensure!(moves(&net)? == 0);
    net.daemon.ctl(&["set-port", "p1", "--workers", "auto"])?;
    let moved = wait_for("a queue to move", LATE, || Ok((moves(&net)? > 0).then_some(())));
    stop.store(true, Ordering::Relaxed);
    ensure!(sender.join().is_ok_and(|sent| sent.is_ok()), "the sender has failed");
    moved.with_context(|| format!("{:?}", net.daemon.stats().map(|stats| stats.workers)))?;
    let show = net.daemon.ctl(&["show"])?;
    let last = &show["spread"]["last"];
    ensure!(
        last["port"] == "p1"
            && last["pinned"] == false
            && (&last["from"], &last["to"]) == (&0.into(), &1.into())
    );
    ensure!(
        net.daemon.polls()?.iter().any(|queue| queue.starts_with("p1.") && queue.ends_with("@1")),
        "{show:#}"
    );
    net.daemon.balanced_stats()?;
    Ok(())
}
