//! What benchmarks have in common: rows that are timed, or whose instructions are counted.
//!
//! A row is a *step* that is repeated; a step hands the work that counts to [`Watch::measure`] and does the rest around it.
//!
//! * Without arguments, each row is timed: the best and the median of 15 rounds. A word picks a row, with or without its group,
//!   or a group.
//! * With `--instructions`, each row runs for a few thousand units after it has warmed up, once. This is for callgrind, which
//!   collects only inside of [`measured`], is reset by [`warmed_up`], and dumps what it has at [`row_ends`]: one dump a row,
//!   in the order of the lines on standard output. `scripts/instructions` does that.

use std::hint::black_box;
use std::time::Instant;

const ROUNDS: usize = 15;
/// How long a timed round is, in milliseconds.
const ROUND: u128 = 50;
/// Units that are counted at least.
const COUNTED: usize = 4096;

/// Callgrind collects in here.
#[inline(never)]
fn measured<T>(work: impl FnOnce() -> T) -> T {
    work()
}

/// Callgrind forgets here what it has collected.
#[inline(never)]
fn warmed_up() {
    black_box("warmed up"); // unlike the other, or they would be made one function
}

/// Callgrind writes down here what it has collected.
#[inline(never)]
fn row_ends() {
    black_box("row ends");
}

/// Measures the part of a step that counts.
pub struct Watch {
    now: fn() -> u64,
    spent: u64,
}

impl Watch {
    /// Does `work`, and counts what it takes.
    pub fn measure<T>(&mut self, work: impl FnOnce() -> T) -> T {
        let start = (self.now)();
        let made = measured(work);
        self.spent += (self.now)().wrapping_sub(start);
        made
    }
}

/// Runs rows.
pub struct Meter {
    counts: bool,
    wanted: Option<String>,
    now: fn() -> u64,
}

impl Meter {
    /// As the program's arguments say, with a clock and the name of its units.
    pub fn new(now: fn() -> u64, unit: &'static str) -> Meter {
        let (options, words): (Vec<_>, Vec<_>) =
            std::env::args().skip(1).partition(|argument| argument.starts_with("--"));
        let counts = options.iter().any(|option| option == "--instructions");
        if !counts {
            println!("{:28} {:>10} {:>10}  {unit}", "", "best", "median");
        }
        Meter { counts, wanted: words.into_iter().next(), now }
    }

    /// A row. `make` prepares its step, which gives how many units (packets, mostly) it has handled; after `warm_up` steps it
    /// meets nothing new.
    pub fn row<S: FnMut(&mut Watch) -> usize>(&self, name: &str, warm_up: usize, make: impl FnOnce() -> S) {
        let parts = [Some(name), name.split(['/', '=']).next(), name.split(['/', '=']).next_back()];
        if self.wanted.is_some() && !parts.contains(&self.wanted.as_deref()) {
            return;
        }
        let mut step = make();
        let mut watch = Watch { now: self.now, spent: 0 };
        for _ in 0..warm_up {
            step(&mut watch);
        }
        if self.counts {
            warmed_up();
            let units = run(&mut step, &mut watch, |units| units >= COUNTED);
            row_ends();
            println!("{name}\t{units}");
            return;
        }
        let mut results: Vec<f64> = (0..ROUNDS)
            .map(|_| {
                watch.spent = 0;
                let start = Instant::now();
                let units = run(&mut step, &mut watch, |_| start.elapsed().as_millis() >= ROUND);
                watch.spent as f64 / units as f64
            })
            .collect();
        results.sort_by(f64::total_cmp);
        println!("{name:28} {:10.1} {:10.1}", results[0], results[ROUNDS / 2]);
    }
}

/// Steps until it is enough; gives the number of units.
fn run(
    step: &mut impl FnMut(&mut Watch) -> usize,
    watch: &mut Watch,
    is_enough: impl Fn(usize) -> bool,
) -> usize {
    let mut units = 0;
    while !is_enough(units) {
        units += step(watch);
    }
    units
}
