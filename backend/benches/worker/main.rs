//! What a packet costs a worker with its rings, both drivers played by the same thread: `cargo bench -p backend --bench worker`.
//!
//! Nothing crosses from one processor to another, so this is what the worker's own work costs, and what waiting for a guest's
//! cache lines comes on top of. [`rings`] has rows of the rings alone, [`scale`] how costs grow with ports, flows and workers.
//! [`tunnel`] has an overlay. For instructions see `docs/performance.md`.

#[path = "../matches.rs"]
mod matches;
#[path = "../../../switch-core/benches/switch/meter.rs"]
mod meter;
mod rig;
mod rings;
mod scale;
mod tunnel;

use backend::clock;
use matches::{exact, five_tuple, from};
use meter::Meter;
use rig::{Kind, Rig, Setup, port};
use std::sync::Arc;
use switch_core::action::{Action, FieldSet, PortRef, SetGroup};
use switch_core::compile::compile;
use switch_core::flow::FlowSpec;
use switch_core::key::Field;

/// A row of one worker, with a guest that sends on one port and one that receives on another.
struct Row {
    name: &'static str,
    /// Bytes of the frame.
    len: u64,
    flows: usize,
    /// Whether flows look at the addresses and ports, or at the ingress port only.
    exact: bool,
    /// Whether MAC addresses and TTL are rewritten.
    rewrite: bool,
    /// Of all rings.
    kind: Kind,
}

const ROWS: [Row; 6] = [
    Row { name: "64B-io", len: 64, flows: 1, exact: false, rewrite: false, kind: Kind::Split },
    Row { name: "64B-64-flows", len: 64, flows: 64, exact: true, rewrite: false, kind: Kind::Split },
    Row { name: "64B-64-flows-packed", len: 64, flows: 64, exact: true, rewrite: false, kind: Kind::Packed },
    Row { name: "64B-4096-flows", len: 64, flows: 4096, exact: true, rewrite: false, kind: Kind::Split },
    Row { name: "64B-64-rewritten", len: 64, flows: 64, exact: true, rewrite: true, kind: Kind::Split },
    Row { name: "1518B-64-flows", len: 1514, flows: 64, exact: true, rewrite: false, kind: Kind::Split },
];

fn output(slot: usize) -> Action {
    Action::Output(PortRef::Ours(port(slot)))
}

fn setup(row: &Row) -> Setup {
    let mut actions = vec![];
    if row.rewrite {
        let set = |field, value| FieldSet { field, value, mask: (1 << 48) - 1 };
        let sets = vec![set(Field::EthSrc, 0x0200_0000_0009), set(Field::EthDst, 0x0200_0000_000a)];
        actions.push(Action::Set(SetGroup::Eth, sets));
        actions.push(Action::DecTtl(vec![]));
    }
    actions.push(output(1));
    let mut matches = vec![exact(&from(0))];
    if row.exact {
        matches = (0..row.flows as u32).map(|i| five_tuple(0, i, 0x0a01_0001)).collect();
    }
    let rules = matches.into_iter().map(|matches| (0, matches, actions.clone())).collect();
    Setup {
        ports: 2,
        workers: 1,
        senders: vec![0],
        len: row.len,
        flows: row.flows,
        ways: 1,
        kind: row.kind,
        rules,
        outer: vec![],
        pushed: 0,
    }
}

/// New flows only: the worker's part of the host path, there and back.
fn upcalls(meter: &Meter) {
    meter.row("worker/64B-upcalls", 1, || {
        let unmatched = five_tuple(0, 0, 0xc000_0201);
        let rules = vec![(0, unmatched, vec![])];
        let flows = 1 << 24;
        let setup = Setup { flows, rules, ..setup(&ROWS[0]) };
        let mut rig = Rig::new(&setup);
        let spec = FlowSpec { matches: exact(&from(0)), actions: vec![output(1)], ufid: None, held: None };
        let plan = Arc::new(compile(&spec).expect("it can be executed"));
        move |watch| rig.step_by_host(watch, &plan)
    });
}

fn main() {
    let meter = Meter::new(clock::cycles, "cycles a packet");
    for row in &ROWS {
        meter.row(&format!("worker/{}", row.name), row.flows.div_ceil(usize::from(rig::BURST)), || {
            let mut rig = Rig::new(&setup(row));
            move |watch| rig.step(watch)
        });
    }
    upcalls(&meter);
    tunnel::all(&meter);
    rings::all(&meter);
    scale::all(&meter);
}
