//! Whatever Open vSwitch does with a packet alone, it does with Pointwork: the same bytes out of the same ports.
//!
//! A case is a pipeline with its packets. `POINTWORK_CASES` says how many are tried, `POINTWORK_SEED` where they begin: a case
//! that failed is tried alone by its seed and one case.

mod tunnels;

use std::time::{Duration, Instant};

use anyhow::{Context, Error, Result, anyhow, ensure};
use qemu_tests::differential::batches::Batches;
use qemu_tests::differential::change::{self, Tally};
use qemu_tests::differential::guests::Guests;
use qemu_tests::differential::offloads::Load;
use qemu_tests::differential::taps::Taps;
use qemu_tests::differential::{
    Case, LANES, Outcome, PORTS, Player, Side, VlanMode, differences, minimise, play_both,
};
use qemu_tests::frames::EXPERIMENTAL;
use qemu_tests::ovs::Ovs;

fn number(name: &str, default: u64) -> u64 {
    std::env::var(name).ok().and_then(|text| text.parse().ok()).unwrap_or(default)
}

/// Tries this many cases, several at once; the first that the sides do not agree about is made small and shown.
fn compare<A: Side, B: Side>(one: A, other: B, cases: u64) -> Result<()> {
    let (mut one, mut other) = (Player::new(one), Player::new(other));
    let lanes = one.side().lanes().min(other.side().lanes());
    let start = Instant::now();
    let (mut packets, mut frames) = (0, 0);
    for batch in Batches::new(number("POINTWORK_SEED", 1), cases, lanes) {
        let (first, second) = play_both(&mut one, &mut other, &batch)
            .with_context(|| batch.iter().map(Case::to_string).collect::<String>())?;
        packets += batch.iter().map(Case::sent).sum::<usize>();
        frames += first.iter().flatten().flat_map(Outcome::values).map(Vec::len).sum::<usize>();
        for ((case, first), second) in batch.iter().zip(&first).zip(&second) {
            let found = differences(case, first, second);
            if !found.is_empty() {
                return Err(explain(&mut one, &mut other, case, found));
            }
        }
    }
    println!(
        "{cases} cases, {packets} packets, {frames} frames out, in {:.1} s",
        start.elapsed().as_secs_f64()
    );
    println!("{}", other.side().conclude()?);
    Ok(())
}

/// What two sides do with a case, alone.
fn alone<A: Side, B: Side>(one: &mut Player<A>, other: &mut Player<B>, case: &Case) -> Result<Vec<String>> {
    let (first, second) = play_both(one, other, std::slice::from_ref(case))?;
    let (first, second) = (first.first(), second.first());
    Ok(differences(case, first.map_or(&[], Vec::as_slice), second.map_or(&[], Vec::as_slice)))
}

/// Makes a case in which differences were `found` small, and shows it.
fn explain<A: Side, B: Side>(
    one: &mut Player<A>,
    other: &mut Player<B>,
    case: &Case,
    found: Vec<String>,
) -> Error {
    let fails = |case: &Case| alone(one, other, case).is_ok_and(|lines| !lines.is_empty());
    let small = minimise(case, fails);
    let mut lines = alone(one, other, &small).unwrap_or_default();
    if lines.is_empty() {
        lines = found;
        lines.push("only now and then, or beside the cases of the seeds around it: by its seed it is".into());
    }
    let (name, other_name) = (one.side().name(), other.side().name());
    anyhow!(
        "{name} (first line) and {other_name} (second) differ:\n{}\nin\n{small}\n\
         # the whole again: POINTWORK_SEED={} POINTWORK_CASES=1",
        lines.join("\n"),
        case.seed
    )
}

/// Without this, nothing that follows means anything: with and without the flows of its datapath.
#[test]
fn open_vswitch_does_everything_twice_alike() -> Result<()> {
    compare(Taps::start(LANES, false)?, Taps::start(LANES, true)?, number("POINTWORK_CASES", 200))
}

#[test]
fn with_pointwork_it_does_what_it_does_alone() -> Result<()> {
    compare(Taps::start(LANES, false)?, Guests::start(LANES)?, number("POINTWORK_CASES", 2000))
}

/// Why the cases have no `clone` that pops a label (docs/ovs-facts.md): the datapath's flow does not look at the label, but
/// pushes the one of the packet that it was made for.
#[test]
fn open_vswitch_gives_a_packet_the_label_of_another() -> Result<()> {
    let frame = |label: u8| {
        let ip = [0x45, 0, 0, 20, 0, 0, 0x40, 0, 64, 47, 0, 0, 10, 0, 0, 1, 10, 0, 0, 2];
        let stack = [0, label, 1, 64];
        [&[2, 0, 0, 0, 2, 1, 2, 0, 0, 0, 1, 1, 0x88, 0x47][..], &stack, &ip, &[0; 22]].concat()
    };
    let mut ovs = Player::new(Taps::start(1, false)?);
    for order in [[1, 2], [2, 1]] {
        let case = Case {
            vlan_limit: 1,
            ports: vec![VlanMode::All; PORTS],
            flows: vec!["table=0,mpls,actions=clone(pop_mpls:0x0800,output:2),output:3".into()],
            burst: 1,
            packets: order.map(|label| (0, frame(label))).into(),
            ..Case::default()
        };
        let outcomes = ovs.play(&[case])?;
        let out: Vec<&Vec<u8>> = outcomes[0][..2].iter().flat_map(|outcome| &outcome[&2]).collect();
        ensure!(out == [&frame(order[0]); 2], "{order:?}: {out:02x?}");
    }
    Ok(())
}

/// Each packet is treated by the old tables or the new ones, never by something between, and never twice.
#[test]
fn tables_change_under_traffic() -> Result<()> {
    let (mut right, mut tried) = (Player::new(Taps::start(1, false)?), Player::new(Guests::start(1)?));
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

    fn lanes(&self) -> usize {
        self.taps.lanes()
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
        let faulty = Faulty { taps: Taps::start(1, false)?, fault, frames: 0 };
        let error = compare(Taps::start(1, false)?, faulty, 20)
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
    let (mut right, mut wrong) = (Player::new(Taps::start(1, false)?), Player::new(Taps::start(1, false)?));
    let mut fails = |case: &Case| {
        let mut mistaken = case.clone();
        for wanted in mistaken.flows.iter_mut().filter(|wanted| **wanted == flow(5, 2)) {
            *wanted = flow(5, 3);
        }
        let one = right.play(std::slice::from_ref(case)).unwrap();
        let other = wrong.play(&[mistaken]).unwrap();
        !differences(case, &one[0], &other[0]).is_empty()
    };
    ensure!(fails(&case), "it was not found");
    let small = minimise(&case, &mut fails);
    ensure!(small.flows == [flow(5, 2)] && small.packets == [(0, frame(5))], "{small}");
    Ok(())
}
