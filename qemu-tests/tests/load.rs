//! The load generator against a running `pointworkd`: nothing is lost, changed or out of order, and the switch's own
//! figures are those of the load. Nothing here asserts a speed.

use std::time::Duration;

use anyhow::{Context, Result, ensure};

use qemu_tests::daemon::{Daemon, DaemonConfig, PortConfig, Stats};
use qemu_tests::host::{WorkDir, wait_for};
use qemu_tests::load::{Load, LoadConfig, Order, Outcome, Rules, Sizes, Socket, Traffic};

/// Longer than anything here takes on a busy machine.
const DEADLINE: Duration = Duration::from_secs(30);
const PORTS: [&str; 4] = ["p1", "p2", "p3", "p4"];

/// The sockets of so many ports.
fn sockets(dir: &WorkDir, ports: usize) -> Vec<Socket> {
    PORTS[..ports].iter().map(|name| Socket::connect(dir.path(&format!("{name}.sock")))).collect()
}

/// A daemon with the rules for `traffic` both ways between the first two ports and between the others.
fn daemon(dir: &WorkDir, rules: Rules, traffic: &Traffic) -> Result<Daemon> {
    // An MTU that counts no Ethernet header, for frames of 1518 bytes.
    let ports = PORTS.map(|name| PortConfig::server(name, dir).with("mtu = 1504"));
    let daemon = Daemon::start(&DaemonConfig::new(ports), dir)?;
    for ways in [[0, 1], [1, 0], [2, 3], [3, 2]] {
        let numbers = ways.map(|port| port as u8);
        for (flow, actions) in rules.pointwork(ways.map(|port: usize| PORTS[port]), numbers, traffic) {
            daemon.ctl(&["add-flow", &flow, &actions])?;
        }
    }
    Ok(daemon)
}

/// Full load until `packets` have arrived, every one of which is looked at, all of every other.
fn run(
    dir: &WorkDir,
    daemon: &Daemon,
    traffic: Traffic,
    packets: u64,
    configure: impl FnOnce(LoadConfig) -> LoadConfig,
) -> Result<(Outcome, Stats)> {
    let config = LoadConfig { check_every: 1, check_whole: 2, ..LoadConfig::new(sockets(dir, 2), traffic) };
    let load = Load::start(configure(config))?;
    wait_for("packets to arrive", DEADLINE, || Ok((load.sample().received >= packets).then_some(())))?;
    let outcome = load.finish()?;
    ensure!(outcome.received >= packets && outcome.checked == outcome.received, "{outcome:?}");
    let faults = (outcome.lost, outcome.wrong, outcome.disordered);
    let stats = daemon.balanced_stats()?;
    ensure!(faults == (0, 0, 0), "{outcome:?}, drops: {:?}", stats.drops());
    // Packets that asked whether anything comes through are not in the generator's books.
    let forwarded: u64 = stats.ports.values().map(|port| port.tx_packets).sum();
    ensure!(forwarded >= outcome.received, "{outcome:?}, {stats:#?}");
    let worker = stats.workers.first().context("a worker")?;
    ensure!(worker.packets == forwarded, "{worker:?}, {forwarded} packets forwarded");
    ensure!(worker.burst_sizes.iter().sum::<u64>() == worker.bursts, "{worker:?}");
    ensure!(worker.busy_cycles > 0 && worker.bursts <= worker.packets, "{worker:?}");
    Ok((outcome, stats))
}

/// Waits until the exact-match table has as many flows as so many directions together.
fn has_flows(daemon: &Daemon, each: u32, directions: u64) -> Result<()> {
    let wanted = directions * u64::from(each);
    wait_for("the flows in L1", DEADLINE, || {
        let l1: u64 = daemon.stats()?.workers.iter().map(|worker| worker.l1_entries).sum();
        ensure!(l1 <= wanted, "{l1} flows in L1, and {wanted} were sent");
        Ok((l1 == wanted).then_some(()))
    })
}

#[test]
fn every_packet_of_every_flow_arrives_rewritten_and_in_order() -> Result<()> {
    for (flows, classes) in [(64, 1), (4096, 16)] {
        let traffic = Traffic { flows, order: Order::Walk, sizes: Sizes::Fixed(64), classes };
        let dir = WorkDir::new()?;
        let daemon = daemon(&dir, Rules::Routes, &traffic)?;
        run(&dir, &daemon, traffic, 20_000, |config| LoadConfig { routed: true, ..config })?;
        has_flows(&daemon, flows, 2)?;
        // The rule of each class has carried its share, the one that no packet matches nothing.
        let dump = daemon.ctl(&["dump-flows"])?;
        let all = dump["flows"].as_array().context("flows")?;
        let of = |drop: bool| all.iter().filter(move |flow| (flow["actions"] == "drop") == drop);
        let carried = of(false).filter(|flow| flow["packets"].as_u64() > Some(100)).count();
        ensure!(carried == 2 * classes as usize, "{dump}");
        ensure!(of(true).all(|flow| flow["packets"] == 0) && of(true).count() == 4, "{dump}");
    }
    Ok(())
}

#[test]
fn flows_that_no_rule_tells_apart_are_one_to_the_exact_match_table() -> Result<()> {
    let traffic = Traffic { flows: 4096, order: Order::Random, sizes: Sizes::Fixed(64), classes: 1 };
    let dir = WorkDir::new()?;
    let daemon = daemon(&dir, Rules::Port, &traffic)?;
    run(&dir, &daemon, traffic, 20_000, |config| config)?;
    has_flows(&daemon, 1, 2)
}

#[test]
fn two_pairs_of_ports_at_once_and_one_way() -> Result<()> {
    let traffic = Traffic { flows: 100, order: Order::Walk, sizes: Sizes::Fixed(64), classes: 2 };
    let dir = WorkDir::new()?;
    let daemon = daemon(&dir, Rules::Routes, &traffic)?;
    let configure = |config| LoadConfig { sockets: sockets(&dir, 4), routed: true, ..config };
    let (outcome, stats) = run(&dir, &daemon, traffic, 20_000, configure)?;
    ensure!(stats.ports.values().all(|port| port.rx_packets > 0 && port.tx_packets > 0), "{stats:#?}");
    has_flows(&daemon, 100, 4)?;
    // Only what the first of each pair sends is more than before.
    let config = LoadConfig::new(sockets(&dir, 4), traffic);
    let load = Load::start(LoadConfig { routed: true, one_way: true, ..config })?;
    wait_for("packets to arrive", DEADLINE, || Ok((load.sample().received >= 10_000).then_some(())))?;
    let one_way = load.finish()?;
    ensure!(outcome.lost == 0 && one_way.lost == 0 && one_way.wrong == 0, "{outcome:?}, {one_way:?}");
    let after = daemon.balanced_stats()?;
    let sent = |name: &str| after.ports[name].rx_packets - stats.ports[name].rx_packets;
    ensure!(sent("p1") > 0 && sent("p3") > 0 && sent("p2") == 0 && sent("p4") == 0, "{after:#?}");
    Ok(())
}

#[test]
fn sizes_and_rings_of_every_kind() -> Result<()> {
    let kinds = [
        (Sizes::Fixed(1518), 256, true, None),
        (Sizes::Imix, 1024, false, None),
        (Sizes::Imix, 64, true, Some(50_000.0)),
        (Sizes::Tso, 256, true, None),
        (Sizes::Tso, 64, false, None),
    ];
    let both = kinds.into_iter().flat_map(|kind| [(kind, false), (kind, true)]);
    for ((sizes, ring, mergeable, rate), packed) in both {
        let traffic = Traffic { flows: 10, order: Order::Walk, sizes, classes: 1 };
        let dir = WorkDir::new()?;
        let daemon = daemon(&dir, Rules::Routes, &traffic)?;
        let configure = |config| LoadConfig { routed: true, ring, mergeable, rate, packed, ..config };
        let (outcome, _) = run(&dir, &daemon, traffic, 3000, configure).with_context(|| {
            format!("{sizes}, rings of {ring}, mergeable: {mergeable}, {rate:?}, packed: {packed}")
        })?;
        let times = outcome.latency;
        ensure!(times.count == outcome.received && times.median > 0.0, "{outcome:?}");
        ensure!(times.median <= times.p99 && times.p99 <= times.max, "{outcome:?}");
    }
    Ok(())
}

#[test]
fn a_switch_that_loses_or_changes_packets_is_found_out() -> Result<()> {
    let traffic = Traffic { flows: 16, order: Order::Walk, sizes: Sizes::Fixed(64), classes: 16 };
    let dir = WorkDir::new()?;
    let daemon = daemon(&dir, Rules::Routes, &traffic)?;
    // One class of sixteen goes nowhere, another one arrives as it was sent.
    let rules = Rules::Routes.pointwork(["p1", "p2"], [0, 1], &traffic);
    daemon.ctl(&["del-flow", &rules[3].0])?;
    daemon.ctl(&["add-flow", &rules[3].0, "drop"])?;
    daemon.ctl(&["del-flow", &rules[5].0])?;
    daemon.ctl(&["add-flow", &rules[5].0, "p2"])?;
    let config = LoadConfig { check_every: 1, routed: true, ..LoadConfig::new(sockets(&dir, 2), traffic) };
    let load = Load::start(config)?;
    wait_for("packets to arrive", DEADLINE, || Ok((load.sample().received >= 10_000).then_some(())))?;
    let outcome = load.finish()?;
    let dropped: u64 = daemon.balanced_stats()?.drops().values().sum();
    ensure!(outcome.lost > 0 && outcome.wrong > 0 && outcome.disordered == 0, "{outcome:?}");
    ensure!(outcome.lost as u64 <= dropped, "{outcome:?}, and the switch has dropped {dropped}");
    Ok(())
}
