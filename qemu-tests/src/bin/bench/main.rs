//! Compares `pointworkd` with what a user would run instead, on this machine, in one run.

mod iperf;
mod report;
mod rows;
mod switches;

use std::path::PathBuf;
use std::process::ExitCode;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use clap::Parser;

use qemu_tests::host::{WorkDir, interrupted, run_to_end};
use qemu_tests::load::{Load, LoadConfig, Outcome, Sample, Tunnel, copy_frames};
use qemu_tests::overlay::{Envelope, Site};
use report::{Measurement, Peer, Report};
use rows::{Row, Way};
use switches::{OvsDpdk, Pointwork, Spent, Switch, Testpmd, leave, processors};

/// A switch that forwards nothing for so long is taken for broken.
const STANDSTILL: Duration = Duration::from_secs(15);

/// Puts the same load on pointworkd and, with the same rules, on Open vSwitch with DPDK (and on DPDK's own vhost port where
/// nothing is to be decided), in turn, on the same processors, and prints what they carried and what a packet cost them. Then
/// two QEMU guests run iperf3 through each.
///
/// The switch's polling thread has the last processor to itself, the load the one before. Everything that was started is
/// gone afterwards, after Ctrl-C too.
#[derive(Parser)]
#[command(name = "scripts/bench")]
struct Options {
    /// Only rows whose name contains one of these.
    rows: Vec<String>,
    /// Show the names of the rows.
    #[arg(long)]
    list: bool,
    /// A round of one second for each row: to see that it works, not to quote.
    #[arg(long)]
    quick: bool,
    /// Rounds.
    #[arg(long)]
    rounds: Option<u32>,
    /// Seconds to measure in each round.
    #[arg(long)]
    seconds: Option<f64>,
    /// Measure only these.
    #[arg(long, value_enum, value_delimiter = ',')]
    switches: Option<Vec<Peer>>,
    /// The load reads every packet's start, and not one of 32.
    #[arg(long)]
    read_all: bool,
    /// Write the measurements to this file as JSON.
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
}

fn main() -> ExitCode {
    let options = Options::parse();
    run_to_end(|| run(&options))
}

fn run(options: &Options) -> Result<()> {
    let wanted = |row: &str| options.rows.is_empty() || options.rows.iter().any(|name| row.contains(&**name));
    let rows: Vec<Row> = rows::all().into_iter().filter(|row| wanted(row.name)).collect();
    let iperf = wanted(iperf::ROW);
    ensure!(!rows.is_empty() || iperf, "no row has such a name (--list shows them)");
    if options.list {
        rows.iter()
            .map(|row| row.name)
            .chain(iperf.then_some(iperf::ROW))
            .for_each(|name| println!("{name}"));
        return Ok(());
    }
    let mut peers = options.switches.clone().unwrap_or_else(|| Peer::ALL.into());
    if peers.contains(&Peer::Testpmd) && !Testpmd::is_available() {
        ensure!(options.switches.is_none(), "dpdk-testpmd is not installed");
        eprintln!("dpdk-testpmd is not installed: going on without it");
        peers.retain(|&peer| peer != Peer::Testpmd);
    }
    let rounds = options.rounds.unwrap_or(if options.quick { 1 } else { 5 });
    let seconds = options.seconds.unwrap_or(if options.quick { 1.0 } else { 3.0 });
    ensure!((0.1..=3600.0).contains(&seconds) && rounds > 0, "nothing to measure");
    let cpus = processors()?;
    leave(cpus[1])?;
    let others = std::fs::read_to_string("/proc/loadavg")?;
    if others.split(' ').next().and_then(|load| load.parse::<f64>().ok()).is_some_and(|load| load > 0.5) {
        eprintln!(
            "warning: other things run on this machine (load average {}): do not quote what follows",
            others.trim()
        );
    }
    let mut report = Report::new(cpus, rounds, seconds);
    let mut bench =
        Bench { cpus, time: Duration::from_secs_f64(seconds), read_all: options.read_all, ovs: None };
    for row in &rows {
        for round in 1..=rounds {
            for &peer in &peers {
                if !peer.suits(row) {
                    continue;
                }
                let measurement = bench
                    .measure(peer, row, round)
                    .with_context(|| format!("{peer}, row '{}', round {round}", row.name))?;
                println!("{measurement}");
                report.add(measurement);
            }
        }
    }
    drop(bench);
    if iperf {
        iperf::run(&peers, cpus[1], rounds, |transfer| {
            println!("{transfer}");
            report.add_transfer(transfer);
        })
        .context(iperf::ROW)?;
    }
    println!("\n{report}");
    if let Some(file) = &options.json {
        std::fs::write(file, serde_json::to_string_pretty(&report)?)
            .with_context(|| file.display().to_string())?;
    }
    Ok(())
}

struct Bench {
    /// Of load and switch.
    cpus: [usize; 2],
    time: Duration,
    read_all: bool,
    ovs: Option<OvsDpdk>,
}

impl Bench {
    fn measure(&mut self, peer: Peer, row: &Row, round: u32) -> Result<Measurement> {
        let dir = WorkDir::new()?;
        let [_, cpu] = self.cpus;
        match peer {
            Peer::Pointwork => self.load(&mut Pointwork::start(row, cpu, &dir)?, peer, row, round),
            Peer::Testpmd => self.load(&mut Testpmd::start(self.cpus, &dir)?, peer, row, round),
            Peer::Copy => self.copy(row, round),
            Peer::Ovs => {
                let mut ovs = match self.ovs.take() {
                    Some(ovs) if ovs.suits(row) => ovs,
                    other => {
                        drop(other);
                        OvsDpdk::start(row.needs_tso(), row.tunnel.map(|(kind, _)| kind), cpu)?
                    }
                };
                ovs.resume(row)?;
                let measurement = self.load(&mut ovs, peer, row, round)?;
                ovs.pause(true)?;
                self.ovs = Some(ovs);
                Ok(measurement)
            }
        }
    }

    /// What the frames of this row take to be copied from guest to guest, by the switch's processor.
    fn copy(&self, row: &Row, round: u32) -> Result<Measurement> {
        let config = LoadConfig::new([], row.traffic);
        let sample = copy_frames(&config, self.cpus[1], self.time)?;
        let spent = Spent {
            packets: sample.received,
            busy_cycles: sample.busy_cycles,
            idle_cycles: Some(0),
            ..Spent::default()
        };
        // There is no load beside it.
        let sample = Sample { busy_cycles: 0, ..sample };
        Ok(Measurement::new(Peer::Copy, row, round, &[], sample, spent, Outcome::default()))
    }

    fn load(&self, switch: &mut dyn Switch, peer: Peer, row: &Row, round: u32) -> Result<Measurement> {
        let outcome = self.load_switch(switch, peer, row, round);
        if outcome.is_err() && !interrupted() {
            eprintln!("--- last words of {peer} ---\n{}", switch.log());
        }
        outcome
    }

    fn load_switch(&self, switch: &mut dyn Switch, peer: Peer, row: &Row, round: u32) -> Result<Measurement> {
        let mut sockets = switch.sockets();
        let tunnel = row.tunnel.map(|(kind, way)| match way {
            Way::Encapsulate => Tunnel::Received(Envelope::between(kind, Site(1), Site(2))),
            Way::Decapsulate => {
                sockets.reverse();
                Tunnel::Sent(Envelope::between(kind, Site(2), Site(1)))
            }
        });
        let config = LoadConfig::new(sockets, row.traffic);
        let mut load = Load::start(LoadConfig {
            routed: row.rules.routed(),
            rate: row.rate,
            packed: row.packed,
            tunnel,
            one_way: tunnel.is_some(),
            // The uplink hears what the switch asks for by itself.
            strangers: tunnel.is_some(),
            cpu: Some(self.cpus[0]),
            check_every: if self.read_all || row.rate.is_some() { 1 } else { config.check_every },
            ..config
        })?;
        load.run_for(self.time / 3)?;
        // Where all flows fit, every one of them has come before it counts.
        let flows = if row.fits() { 2 * u64::from(row.traffic.flows) } else { 0 };
        let (mut before, mut seen) = (0, Instant::now());
        while load.sample().received < flows + flows / 8 {
            let received = load.sample().received;
            if received > before {
                (before, seen) = (received, Instant::now());
            }
            ensure!(seen.elapsed() < STANDSTILL, "nothing has come through for {STANDSTILL:?}");
            load.run_for(Duration::from_millis(100))?;
        }
        switch.begin()?;
        load.forget_latencies();
        let start = load.sample();
        load.run_for(self.time)?;
        let sample = load.sample().since(&start);
        let spent = switch.end()?;
        let outcome = load.finish()?;
        let measurement = Measurement::new(peer, row, round, switch.rules(), sample, spent, outcome);
        measurement.check(row)?;
        Ok(measurement)
    }
}
