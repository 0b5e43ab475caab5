//! The same with tunnels: packets come out of them and go into them.

use std::time::Instant;

use anyhow::{Context, Result, bail};
use qemu_tests::differential::guests::Guests;
use qemu_tests::differential::taps::Taps;
use qemu_tests::differential::tunnels::{CONFIGURATIONS, LANES, Tunnelled, case, underlay};
use qemu_tests::differential::{Case, Outcome, Player, Side, differences, minimise, play_both};

use crate::number;

/// Where both sides part in a case.
fn alone<A: Side, B: Side>(one: &mut Player<A>, other: &mut Player<B>, case: &Case) -> Result<Parted> {
    let cases = [case.clone(), underlay()];
    let (first, second) = play_both(one, other, &cases).with_context(|| case.to_string())?;
    let mut parted = Parted::default();
    for (lane, (case, name)) in cases.iter().zip(["", "by the uplink, "]).enumerate() {
        parted.frames += first[lane].iter().flat_map(Outcome::values).map(Vec::len).sum::<usize>();
        let lines = differences(case, &first[lane], &second[lane]);
        parted.lines.extend(lines.into_iter().map(|line| format!("{name}{line}")));
    }
    Ok(parted)
}

#[derive(Default)]
struct Parted {
    lines: Vec<String>,
    /// That came out.
    frames: usize,
}

/// Tries so many cases with each configuration of a tunnel.
fn compare<A: Side, B: Side>(one: A, other: B, cases: u64) -> Result<()> {
    let (mut one, mut other) = (Player::new(Tunnelled::new(one)?), Player::new(Tunnelled::new(other)?));
    let start = Instant::now();
    let (mut seed, mut packets, mut frames) = (number("POINTWORK_SEED", 1), 0, 0);
    for configuration in 0..CONFIGURATIONS {
        one.side().configure(configuration)?;
        other.side().configure(configuration)?;
        for _ in 0..cases {
            let (case, next) = case(configuration, seed);
            let parted = alone(&mut one, &mut other, &case)?;
            packets += case.sent();
            frames += parted.frames;
            if !parted.lines.is_empty() {
                let fails =
                    |case: &Case| alone(&mut one, &mut other, case).is_ok_and(|p| !p.lines.is_empty());
                let small = minimise(&case, fails);
                let lines = alone(&mut one, &mut other, &small)?.lines;
                let lines = if lines.is_empty() { parted.lines } else { lines };
                bail!(
                    "configuration {configuration}, seed {seed}: {} (first line) and {} (second) differ:\n{}\nin\n{small}",
                    one.side().name(),
                    other.side().name(),
                    lines.join("\n")
                );
            }
            seed = next;
        }
    }
    println!("{packets} packets, {frames} frames out, in {:.1} s", start.elapsed().as_secs_f64());
    println!("{}", other.side().conclude()?);
    Ok(())
}

#[test]
fn with_tunnels_open_vswitch_does_everything_twice_alike() -> Result<()> {
    compare(Taps::start(LANES, false)?, Taps::start(LANES, true)?, number("POINTWORK_CASES", 36) / 36)
}

#[test]
fn with_pointwork_and_tunnels_it_does_what_it_does_alone() -> Result<()> {
    compare(Taps::start(LANES, false)?, Guests::start(LANES)?, number("POINTWORK_CASES", 60).div_ceil(12))
}
