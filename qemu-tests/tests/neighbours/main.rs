//! A pair of guests that offer less than their share, and a neighbour that does its worst: what arrives of theirs, and how fast.
//!
//! Measured in turn in one run: alone, disturbed, alone, disturbed. What is due while the guests' processor does something else
//! counts as not offered. A machine that does other things too takes the worker's time from either; so a round counts by the better
//! of the two times alone beside it, and the best of some rounds is judged. A switch that lets itself be disturbed is so in
//! each of them. With `POINTWORK_NEIGHBOURS_ROUNDS=9` so many rounds of a second are
//! measured, printed as a row of a table, and judged by their median:
//!
//! ```sh
//! POINTWORK_NEIGHBOURS_ROUNDS=9 cargo test --release -p qemu-tests --test neighbours -- --nocapture --test-threads=1
//! ```

mod noise;

use std::time::Duration;

use anyhow::{Context, Result, ensure};
use qemu_tests::daemon::{Daemon, DaemonConfig, PortConfig, Stats};
use qemu_tests::host::WorkDir;
use qemu_tests::load::{Load, LoadConfig, Order, Sizes, Socket, Traffic};

use noise::Noise;

/// What the pair offers, of what it could get alone.
const OFFERED: f64 = 0.3;
/// What has to arrive of what arrives alone.
const KEPT: f64 = 0.9;
/// A neighbour may cost a packet so much, in microseconds: it has 20 at a time, and a burst more, and so has the worker's upkeep.
const MEDIAN_MICROS: f64 = 100.0;
/// The same of the slowest of a hundred.
const P99_MICROS: f64 = 1000.0;
/// Where packets wait for a processor, longer than all that, the waits of two times differ by chance; by no more than this.
const CHANCE: f64 = 3.0;
/// Rounds at most until one is good.
const ROUNDS: usize = 40;
const PHASE: Duration = Duration::from_millis(300);
/// Before each: what is on its way from the one before.
const SETTLE: Duration = Duration::from_millis(30);

/// The pair, the neighbour, and one that is connected and receives nothing.
const PORTS: [&str; 4] = ["v1", "v2", "noisy", "silent"];

/// A daemon of one worker, and the guests' processor; both are this machine's first two, or anywhere if it has one only.
struct Bed {
    dir: WorkDir,
    daemon: Daemon,
    guests_cpu: Option<usize>,
}

impl Bed {
    fn new() -> Result<Self> {
        let dir = WorkDir::new()?;
        let allowed = rustix::thread::sched_getaffinity(None)?;
        let mut cpus = (0..1024).filter(|&cpu| allowed.is_set(cpu));
        let (worker, guests_cpu) = (cpus.next(), cpus.next());
        let config = DaemonConfig {
            cpus: worker.filter(|_| guests_cpu.is_some()).into_iter().collect(),
            ..DaemonConfig::new(PORTS.map(|name| PortConfig::server(name, &dir)))
        };
        let daemon = Daemon::start(&config, &dir)?;
        Ok(Self { dir, daemon, guests_cpu })
    }

    fn load(&self, rate: Option<f64>) -> LoadConfig {
        let traffic = Traffic { flows: 64, order: Order::Walk, sizes: Sizes::Fixed(64), classes: 1 };
        let sockets = ["v1", "v2"].map(|name| Socket::connect(self.socket(name)));
        LoadConfig {
            rate,
            strangers: true,
            check_every: 8,
            cpu: self.guests_cpu,
            ..LoadConfig::new(sockets, traffic)
        }
    }

    fn socket(&self, port: &str) -> std::path::PathBuf {
        self.dir.path(&format!("{port}.sock"))
    }

    /// Packets a second that the pair can have, alone.
    fn capacity(&self) -> Result<f64> {
        let mut load = Load::start(self.load(None))?;
        load.run_for(SETTLE)?;
        let before = load.sample();
        load.run_for(PHASE)?;
        let rate = load.sample().since(&before).packets_per_second();
        load.finish()?;
        ensure!(rate > 0.0, "nothing comes through: {}", self.daemon.log_tail(20));
        Ok(rate)
    }
}

/// What the pair got for a while.
#[derive(Clone, Copy, Debug)]
struct Phase {
    /// What arrived, of what was due.
    arrived: f64,
    /// Microseconds on the way, of half of them and of 99 %.
    median: f64,
    p99: f64,
}

impl Phase {
    fn measure(load: &mut Load, time: Duration) -> Result<Self> {
        load.run_for(SETTLE)?;
        load.take_latencies()?;
        let before = load.sample();
        load.run_for(time)?;
        let sample = load.sample().since(&before);
        let latency = load.take_latencies()?;
        let arrived = sample.received as f64 / (sample.sent + sample.refused).max(1) as f64;
        Ok(Self { arrived, median: latency.median, p99: latency.p99 })
    }
}

/// A time with the neighbour between two times without.
#[derive(Clone, Copy, Debug)]
struct Round {
    alone: [Phase; 2],
    disturbed: Phase,
    /// The neighbour's share of the worker's busy cycles.
    worker: f64,
    /// What the neighbour did, a second: packets that were taken from it, resets, or connections.
    deeds: f64,
}

impl Round {
    fn alone(&self, value: fn(&Phase) -> f64, better: fn(f64, f64) -> f64) -> f64 {
        better(value(&self.alone[0]), value(&self.alone[1]))
    }

    /// What arrives, of what arrives alone.
    fn kept(&self) -> f64 {
        self.disturbed.arrived / self.alone(|phase| phase.arrived, f64::max)
    }

    /// `deeds` are what the neighbour has to do for it to be one.
    fn is_good(&self, deeds: f64) -> bool {
        let median = CHANCE * self.alone(|phase| phase.median, f64::min) + MEDIAN_MICROS;
        let p99 = CHANCE * self.alone(|phase| phase.p99, f64::min) + P99_MICROS;
        self.deeds >= deeds
            && self.kept() >= KEPT
            && self.disturbed.median <= median
            && self.disturbed.p99 <= p99
    }
}

/// Of all busy cycles of the worker between two looks, the share of a port's queue.
fn share(before: &Stats, after: &Stats, port: &str) -> Result<f64> {
    let cycles = |stats: &Stats| -> Result<(u64, u64)> {
        let worker = stats.workers.first().context("a worker")?;
        let queue = worker.queues.iter().find(|queue| queue.port == port).context("its queue")?;
        Ok((queue.busy_cycles, worker.busy_cycles))
    };
    let ((of_port, of_all), (port_before, all_before)) = (cycles(after)?, cycles(before)?);
    Ok((of_port - port_before) as f64 / (of_all - all_before).max(1) as f64)
}

/// Measures what the pair gets beside this neighbour.
fn beside(name: &str, start: fn(&Bed) -> Result<Noise>, at_least: f64) -> Result<()> {
    let wanted: Option<usize> = match std::env::var("POINTWORK_NEIGHBOURS_ROUNDS") {
        Ok(text) => Some(text.parse().context("POINTWORK_NEIGHBOURS_ROUNDS")?),
        Err(_) => None,
    };
    let time = if wanted.is_some() { Duration::from_secs(1) } else { PHASE };
    let bed = Bed::new()?;
    let mut noise = start(&bed)?;
    let offered = OFFERED * bed.capacity()?;
    let mut load = Load::start_beside(bed.load(Some(offered)), noise.beside())?;
    let mut rounds: Vec<Round> = Vec::new();
    let mut before = Phase::measure(&mut load, time)?;
    while rounds.len() < wanted.unwrap_or(ROUNDS) {
        noise.begin();
        load.run_for(SETTLE)?;
        let (then, deeds) = (bed.daemon.stats()?, noise.deeds(&bed)?);
        let start = std::time::Instant::now();
        let disturbed = Phase::measure(&mut load, time)?;
        let deeds = (noise.deeds(&bed)? - deeds) as f64 / start.elapsed().as_secs_f64();
        let worker = share(&then, &bed.daemon.stats()?, "noisy")?;
        noise.end()?;
        let after = Phase::measure(&mut load, time)?;
        rounds.push(Round { alone: [before, after], disturbed, worker, deeds });
        before = after;
        if wanted.is_none() && rounds.last().is_some_and(|round| round.is_good(at_least)) {
            break;
        }
    }
    let outcome = load.finish()?;
    drop(noise);
    ensure!(outcome.wrong == 0 && outcome.disordered == 0, "{outcome:?}");
    print(name, offered, &rounds);
    let is_kept = match wanted {
        Some(_) => median(&rounds, Round::kept) >= KEPT && median(&rounds, |round| round.deeds) >= at_least,
        None => rounds.iter().any(|round| round.is_good(at_least)),
    };
    ensure!(is_kept, "{name}: {rounds:#?}\n{}", bed.daemon.log_tail(20));
    bed.daemon.balanced_stats()?;
    Ok(())
}

fn median(rounds: &[Round], of: impl Fn(&Round) -> f64) -> f64 {
    let mut all: Vec<f64> = rounds.iter().map(of).collect();
    all.sort_by(f64::total_cmp);
    all.get(all.len() / 2).copied().unwrap_or_default()
}

/// A row of the table in docs/performance.md: medians of the rounds.
fn print(name: &str, offered: f64, rounds: &[Round]) {
    let of = |value: fn(&Round) -> f64| median(rounds, value);
    let least = rounds.iter().map(Round::kept).fold(f64::INFINITY, f64::min);
    println!(
        "| {name} | {:.2} | {:.1} ({:.1}) | {:.1} → {:.1} | {:.1} → {:.1} | {:.0} | {:.0} |",
        offered / 1e6,
        100.0 * of(Round::kept),
        100.0 * least,
        of(|round| round.alone(|phase| phase.median, f64::min)),
        of(|round| round.disturbed.median),
        of(|round| round.alone(|phase| phase.p99, f64::min)),
        of(|round| round.disturbed.p99),
        100.0 * of(|round| round.worker),
        of(|round| round.deeds),
    );
}

#[test]
fn who_floods_broadcasts() -> Result<()> {
    beside("floods broadcasts", noise::flood, 1000.0)
}

#[test]
fn who_scans_five_tuples() -> Result<()> {
    beside("scans 5-tuples", noise::scan, 1000.0)
}

#[test]
fn who_sends_from_a_new_address_each_time() -> Result<()> {
    beside("a new address in each packet", noise::stations, 1000.0)
}

#[test]
fn whose_packets_are_looked_for_under_all_masks() -> Result<()> {
    beside("200 masks", noise::masks, 1000.0)
}

#[test]
fn who_resets_its_driver() -> Result<()> {
    beside("resets its driver", noise::reset, 2.0)
}

#[test]
fn who_connects_again_and_again() -> Result<()> {
    beside("reconnects", noise::reconnect, 2.0)
}
