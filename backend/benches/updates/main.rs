//! What changes of its tables cost a worker under full load: `cargo bench -p backend --bench updates`.
//!
//! A worker carries packets as in the benchmark `worker`, both drivers played by its own thread, which has the last processor.
//! Meanwhile control, a thread on the processor before, sends it flows that begin and flows that end, through the queue of
//! commands and with the memory that they need, and frees what comes back. Only the worker's own time counts, for packets and
//! for updates: it is all that a worker has if its guests have processors of their own. See `docs/performance.md`.

#[path = "../matches.rs"]
mod matches;
#[allow(dead_code, reason = "what rows of packets need")]
#[path = "../../../switch-core/benches/switch/meter.rs"]
mod meter;
#[allow(dead_code, reason = "what rows of packets need")]
#[path = "../worker/rig.rs"]
mod rig;

use backend::worker::{Command, Waste};
use backend::{affinity, clock};
use clap::Parser;
use matches::five_tuple;
use rig::{Control, Kind, Rig, Setup, port};
use rustix::time::{ClockId, clock_gettime};
use serde::Serialize;
use std::collections::VecDeque;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::Acquire, Ordering::Relaxed};
use std::time::Instant;
use switch_core::action::{Action, FieldSet, PortRef, SetGroup};
use switch_core::flow::{FlowRef, FlowSpec, Source};
use switch_core::key::Field;
use switch_core::planner::{IfExists, Planner};
use switch_core::tables::{Retired, Update};

/// Flows that packets match.
const FLOWS: usize = 64;
/// Flows that come and go, at any time.
const STANDING: usize = 65_536;
/// The worker's time is looked at once in so many rounds of it, of a microsecond or two.
const LOOK: u32 = 64;
/// Updates of a round that has all that the worker takes.
const FLOOD: usize = 1_000_000;

#[derive(Parser)]
struct Options {
    /// Updates a second, of the row that has a rate.
    #[arg(long, default_value_t = 500_000)]
    rate: u32,
    #[arg(long, default_value_t = 5)]
    rounds: usize,
    /// Seconds of the worker's time in each round.
    #[arg(long, default_value_t = 1.0)]
    seconds: f64,
    /// Write all measurements to this file as JSON.
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
    /// What cargo says to every benchmark.
    #[arg(long, hide = true)]
    bench: bool,
}

/// Who makes the updates, and how many.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
#[serde(rename_all = "snake_case")]
enum Row {
    /// None.
    Quiet,
    /// Made ahead, so many in a second of the worker's time.
    Rate(u32),
    /// Made ahead, as many as the worker takes.
    Flood,
    /// As many as the planner makes.
    Planned,
}

/// What a worker did in a round.
#[derive(Clone, Copy, Debug, Serialize)]
struct Measured {
    row: Row,
    round: usize,
    /// Of the worker's time.
    seconds: f64,
    /// The share of its processor that its thread has had.
    share: f64,
    packets: u64,
    updates: u64,
}

impl Measured {
    fn packets_per_second(&self) -> f64 {
        self.packets as f64 / self.seconds
    }

    fn updates_per_second(&self) -> f64 {
        self.updates as f64 / self.seconds
    }
}

/// MAC addresses and TTL are rewritten.
fn actions() -> Vec<Action> {
    let set = |field, value| FieldSet { field, value, mask: (1 << 48) - 1 };
    let sets = vec![set(Field::EthSrc, 0x0200_0000_0009), set(Field::EthDst, 0x0200_0000_000a)];
    let out = Action::Output(PortRef::Ours(port(1)));
    vec![Action::Set(SetGroup::Eth, sets), Action::DecTtl(vec![]), out]
}

/// Makes the updates: the oldest flow ends, another one begins, and so on.
struct Maker {
    planner: Planner,
    standing: VecDeque<FlowRef>,
    next: u32,
    /// Flows that were ended.
    ended: u64,
}

impl Maker {
    fn update(&mut self) -> Update {
        let oldest = if self.standing.len() >= STANDING { self.standing.pop_front() } else { None };
        let updates = match oldest {
            Some(flow) => {
                self.ended += 1;
                self.planner.remove(flow).expect("it was added").1
            }
            None => {
                let matches = five_tuple(0, self.next % (1 << 24), 0xc000_0201);
                self.next += 1;
                let spec = FlowSpec { matches, actions: actions(), ufid: None, held: None };
                let added = self.planner.add(port(0), Source::Learned, spec, IfExists::Refuse);
                let (flow, updates) = added.expect("a new flow");
                self.standing.push_back(flow);
                updates
            }
        };
        updates.into_iter().next().expect("one worker")
    }
}

/// Control's side of the worker, and its books.
struct Sender {
    control: Control,
    sent: u64,
    /// Flows that the worker has given back.
    returned: u64,
}

impl Sender {
    /// Frees what the worker has given back.
    fn collect(&mut self) {
        while let Ok(waste) = self.control.waste.pop() {
            self.returned += matches!(waste, Waste::Table(Retired::Flow(_) | Retired::LastFlow(..))) as u64;
        }
    }

    /// Sends an update as soon as there is room.
    fn send(&mut self, update: Update) {
        let mut command = Command::Table(update);
        while let Err(rtrb::PushError::Full(back)) = self.control.commands.push(command) {
            command = back;
            self.collect();
        }
        self.sent += 1;
        self.collect();
    }
}

/// What worker and control say to each other beside the queues.
#[derive(Default)]
struct Talk {
    /// Cycles that the worker has worked in this round.
    worked: AtomicU64,
    /// The time that counts is over.
    over: AtomicBool,
    /// Control has sent all that it has.
    sent: AtomicBool,
}

struct Bench {
    rig: Rig,
    maker: Maker,
    sender: Sender,
    /// Of control.
    cpu: usize,
    seconds: f64,
}

impl Bench {
    /// On the worker's processor.
    fn new(cpu: usize, seconds: f64) -> Bench {
        let rules = (0..FLOWS as u32).map(|i| (0, five_tuple(0, i, 0x0a01_0001), actions())).collect();
        let (kind, senders) = (Kind::Split, vec![0]);
        let setup = Setup {
            kind,
            ports: 2,
            workers: 1,
            senders,
            len: 64,
            flows: FLOWS,
            ways: 1,
            rules,
            outer: vec![],
            pushed: 0,
        };
        let mut rig = Rig::new(&setup);
        let (planner, control) = rig.take_control().expect("nobody has it");
        let maker = Maker { planner, standing: VecDeque::new(), next: 0, ended: 0 };
        Bench { rig, maker, sender: Sender { control, sent: 0, returned: 0 }, cpu, seconds }
    }

    fn round(&mut self, row: Row, round: usize) -> Measured {
        let Bench { rig, maker, sender, cpu, seconds } = self;
        let hz = clock::cycles_per_micro() as f64 * 1e6;
        let ahead: Vec<Update> = match row {
            Row::Quiet | Row::Planned => Vec::new(),
            Row::Rate(rate) => (0..(f64::from(rate) * *seconds) as usize).map(|_| maker.update()).collect(),
            Row::Flood => (0..FLOOD).map(|_| maker.update()).collect(),
        };
        let (limit, before) = ((*seconds * hz) as u64, sender.sent);
        let (talk, applied) = (Talk::default(), sender.control.applied.clone());
        let control = || {
            affinity::pin(*cpu).expect("a processor");
            let due = |sent: u64| match row {
                Row::Rate(rate) => talk.worked.load(Relaxed) as f64 * f64::from(rate) > sent as f64 * hz,
                _ => true,
            };
            for (sent, update) in (0..).zip(ahead) {
                while !due(sent) && !talk.over.load(Relaxed) {
                    sender.collect();
                    std::hint::spin_loop();
                }
                sender.send(update);
            }
            while row == Row::Planned && !talk.over.load(Relaxed) {
                sender.send(maker.update());
            }
            talk.sent.store(true, Relaxed);
        };
        let (packets, worked, updates, share) = std::thread::scope(|scope| {
            let control = scope.spawn(control);
            let (start, cpu_start) = (Instant::now(), cpu_time());
            let (mut packets, mut worked, mut steps) = (0, 0, 0u32);
            // On a processor that others use too, part of the time is theirs.
            let share = || ((cpu_time() - cpu_start) / start.elapsed().as_secs_f64()).min(1.0);
            let step = |rig: &mut Rig, worked: &mut u64| {
                let round = |worker: &mut backend::worker::Worker| {
                    let start = clock::cycles();
                    worker.round();
                    *worked += clock::cycles().wrapping_sub(start);
                };
                rig.step_by(round) as u64
            };
            while talk.worked.load(Relaxed) < limit && !(row == Row::Flood && talk.sent.load(Relaxed)) {
                packets += step(rig, &mut worked);
                steps += 1;
                if steps.is_multiple_of(LOOK) {
                    talk.worked.store((worked as f64 * share()) as u64, Relaxed);
                }
            }
            let counted = (packets, worked, applied.load(Acquire) - before, share());
            talk.over.store(true, Relaxed);
            // What is under way is carried out, and does not count.
            while !control.is_finished() {
                step(rig, &mut worked);
            }
            control.join().expect("control does not panic");
            counted
        });
        self.settle();
        Measured { row, round, seconds: worked as f64 / hz * share, share, packets, updates }
    }

    /// Has all that was sent carried out; what control and worker say of it must agree.
    fn settle(&mut self) {
        let Bench { rig, maker, sender, .. } = self;
        while sender.control.applied.load(Acquire) < sender.sent {
            rig.step_by(|worker| {
                worker.round();
            });
        }
        sender.collect();
        assert_eq!(sender.control.applied.load(Acquire), sender.sent, "updates carried out");
        assert_eq!(sender.returned, maker.ended, "flows that the worker has given back");
        assert_eq!(maker.planner.len(), FLOWS + maker.standing.len(), "flows");
    }

    /// The flows that are to come and go.
    fn fill(&mut self) {
        while self.maker.standing.len() < STANDING {
            self.sender.send(self.maker.update());
            self.rig.step_by(|worker| {
                worker.round();
            });
        }
        self.settle();
    }
}

/// Processor time of this thread, in seconds.
fn cpu_time() -> f64 {
    let time = clock_gettime(ClockId::ThreadCPUTime);
    time.tv_sec as f64 + time.tv_nsec as f64 / 1e9
}

/// Median, least and greatest.
fn spread(values: impl Iterator<Item = f64>) -> [f64; 3] {
    let mut values: Vec<f64> = values.collect();
    values.sort_by(f64::total_cmp);
    [values[values.len() / 2], values[0], values[values.len() - 1]]
}

/// The last two processors that we may use: control's and the worker's.
fn processors() -> [usize; 2] {
    let set = rustix::thread::sched_getaffinity(None).expect("our processors");
    let cpus: Vec<usize> = (0..rustix::thread::CpuSet::MAX_CPU).filter(|&cpu| set.is_set(cpu)).collect();
    let [.., control, worker] = cpus[..] else { panic!("two processors are needed") };
    [control, worker]
}

fn main() -> std::io::Result<()> {
    let options = Options::parse();
    let [control, worker] = processors();
    affinity::pin(worker)?;
    let mut bench = Bench::new(control, options.seconds);
    bench.fill();
    let rows = [Row::Rate(options.rate), Row::Flood, Row::Planned];
    let mut all: Vec<Measured> = Vec::new();
    for round in 1..=options.rounds.max(1) {
        all.push(bench.round(Row::Quiet, round));
        all.extend(rows.map(|row| bench.round(row, round)));
    }
    if let Some(least) = all.iter().map(|m| m.share).min_by(f64::total_cmp).filter(|&share| share < 0.98) {
        println!(
            "warning: the worker has had {:.0} % of its processor only: do not quote what follows",
            100.0 * least
        );
    }
    println!(
        "64 B, {FLOWS} flows, rewritten; {STANDING} other flows of which one ends, one begins; worker's time only

\
         {:<34} {:>8} {:>20} {:>12} {:>15}",
        "UPDATES", "MPPS", "OF THAT WITHOUT", "UPDATES/S", "CYCLES/UPDATE"
    );
    let hz = clock::cycles_per_micro() as f64 * 1e6;
    let quiet = |round: usize| all.iter().find(|m| m.row == Row::Quiet && m.round == round);
    for row in [Row::Quiet].into_iter().chain(rows) {
        let of = || all.iter().filter(|m| m.row == row);
        let name = match row {
            Row::Quiet => "none".to_owned(),
            Row::Rate(rate) => format!("{rate} a second, made ahead"),
            Row::Flood => "all that it takes, made ahead".to_owned(),
            Row::Planned => "as the planner makes them".to_owned(),
        };
        let [rate, ..] = spread(of().map(Measured::packets_per_second));
        print!("{name:<34} {:>8.3}", rate / 1e6);
        if row == Row::Quiet {
            println!();
            continue;
        }
        let pairs = || of().filter_map(|m| Some((m, quiet(m.round)?)));
        let ratios = pairs().map(|(m, q)| m.packets_per_second() / q.packets_per_second());
        let [share, least, most] = spread(ratios);
        // What is left of the time when the packets have had what they take without updates.
        let cost = pairs().map(|(m, q)| {
            (m.seconds - m.packets as f64 / q.packets_per_second()) * hz / m.updates.max(1) as f64
        });
        println!(
            " {:>20} {:>12.0} {:>15.0}",
            format!("{share:.3} ({least:.3}–{most:.3})"),
            spread(of().map(Measured::updates_per_second))[0],
            spread(cost)[0],
        );
    }
    if let Some(file) = &options.json {
        std::fs::write(file, serde_json::to_string_pretty(&all)?)?;
    }
    Ok(())
}
