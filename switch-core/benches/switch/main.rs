//! What a packet costs in the switch alone, without rings: `cargo bench -p switch-core`.
//!
//! The rows *switch* take bursts of 32 UDP packets of 64 bytes through [`Switch::process`], as a worker does: a packet is made
//! of a frame, parsed, looked up and executed. Every flow of a row has the same number of packets, in a scattered order. The
//! others are of the switch's parts: [`parts`]. For instructions instead of time see `docs/performance.md`.

mod meter;
mod parts;

use meter::Meter;
use std::hint::black_box;
use std::sync::OnceLock;
use std::time::Instant;
use switch_core::action::{Action, FieldSet, PortRef, SetGroup};
use switch_core::drop::DropReason;
use switch_core::flow::{FlowSpec, Match, Source};
use switch_core::key::{ETH_P_IP, Field, Key, Mask, ipproto};
use switch_core::l1::L1Config;
use switch_core::packet::{Packet, PortId, SNAPSHOT};
use switch_core::pipeline::{Egress, Found, Switch, SwitchConfig, Upcall};
use switch_core::planner::{IfExists, Planner, PlannerConfig};

const PORT: PortId = PortId { slot: 0, generation: 1 };
const OUT: PortId = PortId { slot: 1, generation: 1 };
const BURST: usize = 32;
/// Bursts of a step.
const BURSTS: usize = 16;
const FRAME: usize = 64;
const MAX_FLOWS: usize = 1 << 16;

/// A row of the table.
struct Row {
    name: &'static str,
    /// Different packets.
    flows: usize,
    /// Masks of flows that match nothing, searched before the one that does.
    masks: usize,
    /// Whether L1 remembers.
    l1: bool,
    /// Whether MAC addresses and TTL are rewritten.
    rewrite: bool,
}

const ROWS: [Row; 7] = [
    Row { name: "1-flow", flows: 1, masks: 0, l1: true, rewrite: false },
    Row { name: "64-flows", flows: 64, masks: 0, l1: true, rewrite: false },
    Row { name: "4096-flows", flows: 4096, masks: 0, l1: true, rewrite: false },
    Row { name: "65536-flows", flows: MAX_FLOWS, masks: 0, l1: true, rewrite: false },
    Row { name: "64-rewritten", flows: 64, masks: 0, l1: true, rewrite: true },
    Row { name: "64-without-l1", flows: 64, masks: 0, l1: false, rewrite: false },
    Row { name: "16-masks-without-l1", flows: 64, masks: 16, l1: false, rewrite: false },
];

#[derive(Default)]
struct Sink {
    sent: u64,
    ended: u64,
}

impl Egress for Sink {
    fn more(&mut self, _: usize, packet: &mut Packet) {
        packet.extend().fill(0);
    }
    fn admit(&mut self, _: usize, _: &mut Packet, _: Found<'_>) -> Result<(), DropReason> {
        Ok(())
    }
    fn output(&mut self, _: usize, packet: &mut Packet, port: PortId, max_len: u32, _: bool) {
        black_box((packet.head().as_ptr(), port, max_len));
        self.sent += 1;
    }
    fn has_room(&mut self, _: &Packet) -> bool {
        true
    }
    fn upcall(&mut self, _: usize, _: &mut Packet, _: Upcall) {
        self.ended += 1;
    }
    fn drop(&mut self, _: usize, _: &Packet, _: DropReason) {
        self.ended += 1;
    }
}

/// The frame of packet number `i`: addresses and ports differ.
fn frame(i: usize) -> [u8; FRAME] {
    let mut frame = [0; FRAME];
    frame[..14].copy_from_slice(&[2, 0, 0, 0, 0, 1, 2, 0, 0, 0, 0, 2, 8, 0]);
    frame[14..24].copy_from_slice(&[0x45, 0, 0, (FRAME - 14) as u8, 0, 0, 0, 0, 64, ipproto::UDP]);
    frame[26..34].copy_from_slice(&[10, 0, (i >> 8) as u8, i as u8, 10, 1, 0, 1]);
    frame[34..40].copy_from_slice(&[(i >> 8) as u8, i as u8, 0, 53, 0, (FRAME - 34) as u8]);
    frame
}

pub(crate) fn exact(fields: &[(Field, u128)]) -> Match {
    let mut matches = Match { key: Key::default(), mask: Mask::EMPTY, ..Match::default() };
    for &(field, value) in fields {
        matches.key.set(field, value);
        matches.mask.set_exact(field);
    }
    matches
}

/// A switch that has flows for a row's packets.
fn switch(row: &Row) -> Switch {
    let flows = MAX_FLOWS + 64;
    let config = PlannerConfig { ports: 2, flows, masks: 64, seed: 1 };
    let l1 = L1Config { capacity: 1 << 17, ports: 2, pending_ticks: 10, pending_misses: 4, age_ticks: 1000 };
    let mut switch = Switch::new(SwitchConfig { l1, flows, seed: 1 });
    let mut planner = Planner::new(config, vec![switch.slots().clone()]);
    let quota = if row.l1 { u32::MAX } else { 0 };
    for update in planner.add_port(PORT, quota).expect("the slot is free").0 {
        drop(switch.apply(update));
    }
    let ip = [(Field::RecircId, 0), (Field::InPort, 0), (Field::EthType, ETH_P_IP as u128)];
    let mut add = |matches: Match, actions: Vec<Action>| {
        let spec = FlowSpec { matches, actions, ufid: None, held: None };
        let (_, updates) = planner.add(PORT, Source::Explicit, spec, IfExists::Refuse).expect("a new flow");
        for update in updates {
            drop(switch.apply(update));
            drop(switch.step());
        }
    };
    for i in 0..row.masks {
        let mut matches = exact(&ip);
        // Prefixes of different length that exclude each other and every packet: 192.128/9, 192.64/10, …
        matches.key.set(Field::Ipv4Src, 192 << 24 | 1 << (23 - i));
        matches.mask.set(Field::Ipv4Src, (u32::MAX << (23 - i)) as u128);
        add(matches, vec![]);
    }
    for i in 0..row.flows {
        let (src, dst) = (10 << 24 | i as u128, 10 << 24 | 1 << 16 | 1);
        let matches = exact(&[
            ip[0],
            ip[1],
            ip[2],
            (Field::IpFrag, 0),
            (Field::IpProto, ipproto::UDP as u128),
            (Field::Ipv4Src, src),
            (Field::Ipv4Dst, dst),
            (Field::TpSrc, i as u128),
            (Field::TpDst, 53),
        ]);
        let mut actions = vec![Action::Output(PortRef::Ours(OUT))];
        if row.rewrite {
            let set = |field, value| FieldSet { field, value, mask: (1 << 48) - 1 };
            let sets = vec![set(Field::EthDst, 0x0200_0000_0003), set(Field::EthSrc, 0x0200_0000_0004)];
            actions.splice(0..0, [Action::Set(SetGroup::Eth, sets), Action::DecTtl(vec![])]);
        }
        add(matches, actions);
    }
    switch
}

/// A row of the whole switch.
fn whole(meter: &Meter, row: &Row) {
    // An odd factor scatters the numbers below a power of two.
    let order: Vec<u32> = (0..row.flows.max(BURST)).map(|i| (i * 40_503 % row.flows) as u32).collect();
    let warm_up = order.len().div_ceil(BURSTS * BURST);
    meter.row(&format!("switch/{}", row.name), warm_up, || {
        let mut switch = switch(row);
        let frames: Vec<_> = (0..row.flows).map(frame).collect();
        let mut packets = vec![Packet::default(); BURST];
        let mut order = order.iter().cycle();
        move |watch| {
            let mut sink = Sink::default();
            watch.measure(|| {
                for _ in 0..BURSTS {
                    for packet in packets.iter_mut() {
                        let frame = order.next().map_or(0, |&i| i as usize);
                        packet.reset(PORT, FRAME as u32, SNAPSHOT).copy_from_slice(&frames[frame]);
                    }
                    switch.process(1, &mut packets, &mut sink);
                }
            });
            let packets = BURSTS * BURST;
            assert_eq!((sink.sent, sink.ended), (packets as u64, 0), "{}", row.name);
            packets
        }
    });
}

/// Nanoseconds since the first look.
fn nanos() -> u64 {
    static START: OnceLock<Instant> = OnceLock::new();
    START.get_or_init(Instant::now).elapsed().as_nanos() as u64
}

fn main() {
    let meter = Meter::new(nanos, "nanoseconds a packet");
    for row in &ROWS {
        whole(&meter, row);
    }
    parts::all(&meter);
}
