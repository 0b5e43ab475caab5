//! Packets while the tables change: each is treated by the old tables or by the new ones, whole, and once.

use std::collections::BTreeMap;

use anyhow::{Context, Result, bail, ensure};

use super::guests::Guests;
use super::offloads::Load;
use super::taps::Taps;
use super::{Case, Outcome, PORTS, Player, Side, generate, write_tables};
use crate::frames::hex;

/// How often the tables change while packets are sent.
const CHANGES: usize = 6;
/// What the last bytes of each packet begin with; its number follows.
const MARK: [u8; 4] = [0xc4, 0x5a, 0xc4, 0x5a];
/// Packets at least this long have their headers in front of the mark.
const LONG: usize = 100;

/// How many packets came out, and how many did not though they would have by both tables.
#[derive(Clone, Copy, Debug, Default)]
pub struct Tally {
    /// Treated by the old or the new tables.
    pub treated: usize,
    /// Lost.
    pub lost: usize,
}

/// The first case from `seed` on with two sets of tables that are fit for this, and its seed.
///
/// A packet that goes round again may meet the old tables at first and the new ones then, in Open vSwitch alone too; one
/// that is cut loses its number.
pub fn case(seed: u64) -> (u64, Case) {
    for seed in seed.. {
        let mut case = generate::case(seed);
        case.packets.retain(|(_, frame)| frame.len() >= LONG);
        let fits = case.later.len() == 1 && !case.learns && case.load == Load::Whole;
        let text = case.to_string();
        let unfit = ["debug_recirc", "ct(", "mpls", "dp_hash", "max_len", "controller"];
        if fits && case.packets.len() > 3 && !unfit.iter().any(|word| text.contains(word)) {
            return (seed, case);
        }
    }
    unreachable!("there is a fit case among all")
}

fn marked(frame: &[u8], number: u32) -> Vec<u8> {
    [frame, &MARK, &number.to_be_bytes()].concat()
}

/// Takes the number off a frame.
fn number(frame: &mut [u8]) -> Option<u32> {
    let (rest, number) = frame.split_last_chunk_mut::<4>()?;
    let is_marked = rest.ends_with(&MARK);
    is_marked.then(|| u32::from_be_bytes(std::mem::take(number)))
}

/// Changes the tables of a case again and again while its packets are sent.
pub fn play(right: &mut Player<Taps>, tried: &mut Player<Guests>, case: &Case) -> Result<Tally> {
    let policies = [case.flows.clone(), case.later[0].clone()];
    let mut wanted = Vec::new();
    for flows in &policies {
        let packets = case.packets.iter().map(|(port, frame)| (*port, marked(frame, 0))).collect();
        let still = Case { flows: flows.clone(), later: Vec::new(), packets, burst: 1, ..case.clone() };
        wanted.push(right.play(&[still])?.remove(0));
    }
    tried.prepare(std::slice::from_ref(case))?;
    let mut sent = 0u32;
    let count = case.packets.len();
    let next = || {
        let (port, frame) = &case.packets[sent as usize % count];
        sent += 1;
        (*port, marked(frame, sent - 1))
    };
    let change = |ovs: &crate::ovs::Ovs| {
        (1..=CHANGES).try_for_each(|change| write_tables(ovs, 0, &case.bundle(0, &policies[change % 2])))
    };
    let mut out = tried.side().send_during(change, next)?;
    let mut rest = Outcome::new();
    (0..PORTS).try_for_each(|port| tried.quiesce(&[port], &mut rest))?;
    out.extend(
        rest.into_iter().flat_map(|(port, frames)| frames.into_iter().map(move |frame| (port, frame))),
    );

    let mut outcomes: BTreeMap<u32, Outcome> = BTreeMap::new();
    for (port, mut frame) in out {
        let number = number(&mut frame).with_context(|| format!("{} came out", hex(&frame)))?;
        ensure!(number < sent, "packet {number} was never sent");
        outcomes.entry(number).or_default().entry(port).or_default().push(frame);
    }
    let mut tally = Tally::default();
    for number in 0..sent {
        let index = number as usize % count;
        let outcome = outcomes.remove(&number).unwrap_or_default();
        let possible = [&wanted[0][index], &wanted[1][index]];
        if possible.contains(&&outcome) {
            tally.treated += 1;
        } else if outcome.is_empty() {
            tally.lost += 1;
        } else {
            let shown = [&outcome, possible[0], possible[1]].map(super::show).join("\n  ");
            bail!("packet {index} came out as by neither tables:\n  {shown}\nin\n{case}");
        }
    }
    // When all is still, the last tables hold.
    tried.side().settle()?;
    let last = &wanted[CHANGES % 2];
    for round in 0..2 {
        for (index, (port, frame)) in case.packets.iter().enumerate() {
            let packet = [(*port, marked(frame, 0))];
            let outcome = tried.step(&[(0, &packet[..], Load::Whole)])?.remove(&0).unwrap_or_default();
            if outcome != last[index] {
                let (one, other) = (super::show(&last[index]), super::show(&outcome));
                bail!("afterwards, round {round}, packet {index}:\n  {one}\n  {other}\nin\n{case}");
            }
        }
    }
    Ok(tally)
}
