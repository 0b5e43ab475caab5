//! Whatever Open vSwitch does with a packet alone, it does with Pointwork: the same bytes out of the same ports.
//!
//! `POINTWORK_CASES` says how many cases are tried, `POINTWORK_SEED` where they begin: a case that failed is tried alone by
//! its seed and one case.

use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use qemu_tests::differential::change::{self, Tally};
use qemu_tests::differential::guests::Guests;
use qemu_tests::differential::offloads::Load;
use qemu_tests::differential::taps::Taps;
use qemu_tests::differential::{
    Case, Outcome, PORTS, Player, Side, differences, generate, minimise, play_both,
};
use qemu_tests::frames::EXPERIMENTAL;
use qemu_tests::ovs::Ovs;

fn number(name: &str, default: u64) -> u64 {
    std::env::var(name).ok().and_then(|text| text.parse().ok()).unwrap_or(default)
}

/// Tries this many cases; the first that the sides do not agree about is made small and shown.
fn compare<A: Side, B: Side>(one: A, other: B, cases: u64) -> Result<()> {
    let (mut one, mut other) = (Player::new(one), Player::new(other));
    let seed = number("POINTWORK_SEED", 1);
    let start = Instant::now();
    let (mut steps, mut frames) = (0, 0);
    for seed in seed..seed + cases {
        let case = generate::case(seed);
        let (first, second) = play_both(&mut one, &mut other, &case).with_context(|| case.to_string())?;
        steps += first.len();
        frames += first.iter().flat_map(Outcome::values).map(Vec::len).sum::<usize>();
        if differences(&case, &first, &second).is_empty() {
            continue;
        }
        let small = minimise(&case, |case| {
            play_both(&mut one, &mut other, case).is_ok_and(|(a, b)| !differences(case, &a, &b).is_empty())
        });
        let (again, second_again) = play_both(&mut one, &mut other, &small)?;
        let mut lines = differences(&small, &again, &second_again);
        if lines.is_empty() {
            lines = differences(&case, &first, &second);
            lines.push("only now and then: by its seed it is".into());
        }
        let (name, other_name) = (one.side().name(), other.side().name());
        bail!("{name} (first line) and {other_name} (second) differ:\n{}\nin\n{small}", lines.join("\n"));
    }
    println!("{steps} packets, {frames} frames out, in {:.1} s", start.elapsed().as_secs_f64());
    println!("{}", other.side().conclude()?);
    Ok(())
}

/// Without this, nothing that follows means anything: with and without the flows of its datapath.
#[test]
fn open_vswitch_does_everything_twice_alike() -> Result<()> {
    compare(Taps::start(false)?, Taps::start(true)?, number("POINTWORK_CASES", 60))
}

#[test]
fn with_pointwork_it_does_what_it_does_alone() -> Result<()> {
    compare(Taps::start(false)?, Guests::start()?, number("POINTWORK_CASES", 120))
}

/// Each packet is treated by the old tables or the new ones, never by something between, and never twice.
#[test]
fn tables_change_under_traffic() -> Result<()> {
    let (mut right, mut tried) = (Player::new(Taps::start(false)?), Player::new(Guests::start()?));
    let (mut seed, mut all) = (number("POINTWORK_SEED", 1), Tally::default());
    for _ in 0..number("POINTWORK_CASES", 60).div_ceil(20) {
        let (found, case) = change::case(seed);
        let tally = change::play(&mut right, &mut tried, &case)?;
        (all.treated, all.lost, seed) = (all.treated + tally.treated, all.lost + tally.lost, found + 1);
    }
    println!("{all:?}; {}", tried.side().conclude()?);
    // A miss may be lost while as many others wait for a decision.
    ensure!(all.treated > 10 * all.lost, "{all:?}");
    Ok(())
}

/// What a switch may do wrong.
#[derive(Clone, Copy, Debug)]
enum Fault {
    Loses,
    Doubles,
    Changes,
    Misdirects,
    Invents,
}

/// A side that does something wrong with one frame of a hundred.
struct Faulty {
    taps: Taps,
    fault: Fault,
    frames: usize,
}

impl Side for Faulty {
    fn name(&self) -> &'static str {
        "a faulty switch"
    }

    fn ovs(&self) -> &Ovs {
        self.taps.ovs()
    }

    fn inject(&mut self, port: usize, frame: &[u8], load: Load) -> Result<()> {
        self.taps.inject(port, frame, load)
    }

    fn drain(&mut self, patience: Duration) -> Result<Vec<(usize, Vec<u8>)>> {
        let mut frames = Vec::new();
        for (port, mut frame) in self.taps.drain(patience)? {
            if frame[12..14] != EXPERIMENTAL.to_be_bytes() {
                self.frames += 1;
                match self.fault {
                    _ if !self.frames.is_multiple_of(100) => {}
                    Fault::Loses => continue,
                    Fault::Doubles => frames.push((port, frame.clone())),
                    Fault::Changes => *frame.last_mut().context("a frame is empty")? ^= 1,
                    Fault::Misdirects => {
                        frames.push(((port + 1) % PORTS, frame));
                        continue;
                    }
                    Fault::Invents => frames.push((port, vec![0; 60])),
                }
            }
            frames.push((port, frame));
        }
        Ok(frames)
    }

    fn settle(&mut self) -> Result<()> {
        self.taps.settle()
    }
}

#[test]
fn every_kind_of_fault_is_found() -> Result<()> {
    for fault in [Fault::Loses, Fault::Doubles, Fault::Changes, Fault::Misdirects, Fault::Invents] {
        let faulty = Faulty { taps: Taps::start(false)?, fault, frames: 0 };
        let error = compare(Taps::start(false)?, faulty, 20)
            .err()
            .with_context(|| format!("{fault:?} was not found"))?;
        let error = error.to_string();
        ensure!(error.contains("a faulty switch (second) differ:\nround "), "{fault:?}: {error}");
    }
    Ok(())
}

/// A switch that goes by other flows than it should is found out, and the flow that it is about is named.
#[test]
fn a_wrong_flow_is_found_and_named() -> Result<()> {
    let frame = |kind: u8| [&[2, 0, 0, 0, 2, 1, 2, 0, 0, 0, 1, 1, 0x12, kind][..], &[0; 46]].concat();
    let flow = |kind: u8, port: usize| format!("table=0,dl_type=0x12{kind:02x},actions=output:{port}");
    let case = Case {
        vlan_limit: 1,
        flows: (1..9).map(|kind| flow(kind, 2)).collect(),
        packets: (1..9).map(|kind| (0, frame(kind))).collect(),
        ..Case::default()
    };
    let (mut right, mut wrong) = (Player::new(Taps::start(false)?), Player::new(Taps::start(false)?));
    let mut fails = |case: &Case| {
        let mut mistaken = case.clone();
        for wanted in mistaken.flows.iter_mut().filter(|wanted| **wanted == flow(5, 2)) {
            *wanted = flow(5, 3);
        }
        let (one, other) = (right.play(case).unwrap(), wrong.play(&mistaken).unwrap());
        !differences(case, &one, &other).is_empty()
    };
    ensure!(fails(&case), "it was not found");
    let small = minimise(&case, &mut fails);
    ensure!(small.flows == [flow(5, 2)] && small.packets == [(0, frame(5))], "{small}");
    Ok(())
}
