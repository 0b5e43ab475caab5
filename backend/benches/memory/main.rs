//! How much memory flows take: `cargo bench -p backend --bench memory`. With `--check`, more than the bounds is a failure.
//!
//! What counts is what the system has given (`Rss`), so that all is in it: the allocator's own bytes, and what is lost to
//! alignment. Tables are filled in this process, nothing is given back meanwhile, and no row touches what another one has.
//! What a worker needs is the difference between tables of several workers and of one; the rest is control's, once.

#[path = "../matches.rs"]
mod matches;

use clap::Parser;
use matches::five_tuple;
use std::array;
use std::mem::size_of;
use std::process::ExitCode;
use switch_core::action::{Action, FieldSet, PortRef, SetGroup};
use switch_core::common::WINDOW;
use switch_core::compile::Plan;
use switch_core::flow::{FlowRef, FlowSpec, Match, Source};
use switch_core::hash::{Hasher, terms};
use switch_core::key::Field;
use switch_core::l1::{Bucket, Chain, CommonTerms, Entry, L1, L1Config, Rest, Tail};
use switch_core::packet::PortId;
use switch_core::pipeline::{Switch, SwitchConfig};
use switch_core::planner::{Flow, IfExists, Planner, PlannerConfig};
use switch_core::slab::{FlowEntry, Slot};

/// Bytes of an L1 entry at most, in a full table.
const L1_BOUND: f64 = 128.0;
/// Bytes of a flow in the tables of one worker at most.
const FLOW_BOUND: f64 = 512.0;
/// Workers of the tables that are compared with those of one.
const WORKERS: usize = 5;
const PORT: PortId = PortId { slot: 0, generation: 1 };

#[derive(Parser)]
struct Options {
    /// Flows, and entries of L1.
    #[arg(default_value_t = 200_000)]
    flows: u32,
    /// Fail if a bound is exceeded.
    #[arg(long)]
    check: bool,
    /// What cargo says to every benchmark.
    #[arg(long, hide = true)]
    bench: bool,
}

/// Memory that this process has, in bytes.
fn resident() -> f64 {
    let text = std::fs::read_to_string("/proc/self/smaps_rollup").expect("/proc");
    let line = text.lines().find_map(|line| line.strip_prefix("Rss:")).expect("Rss");
    1024.0 * line.trim().trim_end_matches(" kB").parse::<f64>().expect("a number")
}

/// What `make` has taken for each of `n`, in bytes. What it gives is kept for ever.
fn taken<T>(n: usize, make: impl FnOnce() -> T) -> f64 {
    let before = resident();
    std::mem::forget(std::hint::black_box(make()));
    (resident() - before) / n as f64
}

/// MAC addresses and TTL are rewritten.
fn actions() -> Vec<Action> {
    let set = |field, value| FieldSet { field, value, mask: (1 << 48) - 1 };
    let sets = vec![set(Field::EthSrc, 0x0200_0000_0009), set(Field::EthDst, 0x0200_0000_000a)];
    vec![Action::Set(SetGroup::Eth, sets), Action::DecTtl(vec![]), Action::Output(PortRef::Ours(PORT))]
}

fn l1_config(capacity: usize) -> L1Config {
    L1Config { capacity, ports: 1, pending_ticks: 10, pending_misses: 4, age_ticks: 1000 }
}

/// What the packets of a table are.
#[derive(Clone, Copy)]
enum Packets {
    /// Of a common shape, of whose frames the flows look at so many words.
    Common(usize),
    /// Of another.
    Other,
}

/// A table of so many entries that has been offered twice as many, and how many it has taken.
fn full_l1(entries: u32, packets: Packets) -> (L1, u32) {
    let mut l1 = L1::new(l1_config(entries as usize), Hasher::new(1));
    l1.renew(0);
    for i in 0..2 * entries {
        let key = match packets {
            Packets::Common(words) => {
                let looked_at =
                    CommonTerms::new(&array::from_fn(|word| if word < words { !0 } else { 0 }), false);
                let mut window = [7; WINDOW];
                window[8 * words - 4..8 * words].copy_from_slice(&i.to_ne_bytes());
                l1.common_key(0, &looked_at, &window, 0)
            }
            Packets::Other => {
                let Match { key, mask, .. } = five_tuple(0, i, 0x0a01_0001);
                l1.key(0, &terms(&mask.0), &key).expect("a short key")
            }
        };
        l1.store(&key, &Chain::of(FlowRef { index: i, generation: 1 }));
    }
    let used = l1.used(0);
    (l1, used)
}

/// Control's flows and the tables of so many workers that have them.
fn tables(workers: usize, flows: u32) -> (Planner, Vec<Switch>) {
    let max = flows as usize;
    let config = SwitchConfig { l1: l1_config(1024), flows: max, seed: 1 };
    let mut switches: Vec<Switch> = (0..workers).map(|_| Switch::new(config)).collect();
    let config = PlannerConfig { ports: 1, flows: max, masks: 64, seed: 1 };
    let mut planner = Planner::new(config, switches.iter().map(|switch| switch.slots().clone()).collect());
    let apply = |switches: &mut [Switch], updates| {
        for (switch, update) in switches.iter_mut().zip::<Vec<_>>(updates) {
            drop(switch.apply(update));
            drop(switch.step());
        }
    };
    apply(&mut switches, planner.add_port(PORT, u32::MAX).expect("the slot is free").0);
    for i in 0..flows {
        let spec =
            FlowSpec { matches: five_tuple(0, i, 0x0a01_0001), actions: actions(), ufid: None, held: None };
        let added = planner.add(PORT, Source::Learned, spec, IfExists::Refuse);
        apply(&mut switches, added.expect("a new flow").1);
    }
    assert!(switches.iter().all(|switch| switch.tables().slab().len() == max), "every worker has every flow");
    (planner, switches)
}

fn main() -> ExitCode {
    let Options { flows, check, .. } = Options::parse();
    let n = flows as usize;
    let row = |what: &str, bytes: f64, note: &str| println!("{what:<44} {bytes:>8.1}  {note}");
    let part = |what: &str, bytes: f64, note: &str| row(&format!("  {what}"), bytes, note);
    println!("{flows} flows of 5-tuples, with rewritten MAC addresses and TTL: bytes of each\n");

    let bucket = size_of::<Bucket>();
    let mut l1 = 0.0_f64;
    for (what, packets, parts) in [
        ("TCP over IPv4", Packets::Common(6), size_of::<Entry>()),
        ("TCP over IPv6", Packets::Common(10), size_of::<Entry>() + size_of::<Tail>()),
        ("other packets", Packets::Other, size_of::<Entry>() + size_of::<Rest>()),
    ] {
        let mut used = 0;
        let bytes = taken(n, || {
            let (l1, taken) = full_l1(flows, packets);
            used = taken;
            l1
        });
        row(&format!("entry of L1, {what}"), bytes, &format!("bound {L1_BOUND}; {used} entries in use"));
        part("entry", parts as f64, "key, flows, age");
        part("buckets and links", bytes - parts as f64, &format!("a bucket is {bucket}"));
        assert!(
            f64::from(used) > 0.9 * f64::from(flows),
            "{used} of {flows} entries of L1 in use: it is not full"
        );
        l1 = l1.max(bytes);
    }

    let one = taken(n, || tables(1, flows));
    let many = taken(n, || tables(WORKERS, flows));
    let worker = (many - one) / (WORKERS - 1) as f64;
    row("\nflow in the tables of one worker", worker, &format!("bound {FLOW_BOUND}"));
    let slot = size_of::<Slot>() as f64;
    part("slot", slot, "what the frequent packet needs, and counters");
    part("places in slab and subtable", worker - slot, "");

    let control = one - worker;
    row("\nflow in control, for all workers together", control, "without the mirror");
    let record = size_of::<Flow>() as f64;
    part("record", record, &format!("of which the match is {}", size_of::<Match>()));
    let entry = size_of::<FlowEntry>() as f64;
    part("entry", entry, "which all workers share, with the words of its key");
    part("plan", size_of::<Plan>() as f64, "without its operations");
    part("actions, operations, index, allocator", control - record - entry - size_of::<Plan>() as f64, "");
    row("\nflow, with one worker", one, "");

    if check && (l1 > L1_BOUND || worker > FLOW_BOUND) {
        eprintln!("error: an entry of L1 may take {L1_BOUND} bytes, a flow in a worker {FLOW_BOUND}");
        return ExitCode::FAILURE;
    }
    ExitCode::SUCCESS
}
