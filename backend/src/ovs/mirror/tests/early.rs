//! Flows that OVS has changed are seen by it at once, at a price that is bounded.

use crate::host::FlowTable;
use crate::ovs::mirror::keepalive::{Ends, KeepAlive};
use crate::ovs::mirror::ports::Ports;
use crate::ovs::mirror::testing::*;
use crate::ovs::mirror::{MirrorTable, Settings};
use switch_core::flow::{FlowRef, FlowSpec, Source};
use switch_core::key::Field;

/// A flow between two stations.
fn between(port: &'static str, from: u64, to: u64, out: &'static str) -> FlowSpec {
    let ports = Ports::default().with_ports(vec![self::port("a", 1), self::port("b", 2), self::port("c", 3)]);
    let mut spec = dp(port, to, out).spec(&ports).unwrap();
    spec.matches.key.set(Field::EthSrc, from as u128);
    spec.matches.mask.set_exact(Field::EthSrc);
    spec
}

struct Bench {
    table: FakeTable,
    alive: KeepAlive,
    now: u64,
}

impl Bench {
    fn new(settings: Settings) -> Bench {
        Bench { table: FakeTable::default(), alive: KeepAlive::new(settings), now: 0 }
    }

    fn put(&mut self, spec: FlowSpec) -> FlowRef {
        let ends = Ends::of(&spec);
        let flow = self.table.put(Source::Learned, spec).unwrap();
        self.alive.add(flow, ends, self.table.counters(flow), self.now);
        flow
    }

    /// Lets time pass, in which each of these flows has a packet of the first worker every 10 ms.
    fn pass(&mut self, millis: u64, busy: &[FlowRef]) {
        let end = self.now + millis;
        while self.now < end {
            self.now += 10;
            busy.iter().for_each(|flow| self.table.traffic(flow.index, 0, 1));
            self.alive.turn(self.now);
        }
    }

    fn kept(&self, flow: FlowRef) -> u64 {
        self.table.flows[&flow.index].kept
    }

    fn asked(&self) -> u64 {
        self.table.flows.values().map(FakeFlow::asked).sum()
    }
}

#[test]
fn a_flow_that_has_changed_is_seen_at_once() {
    let mut it = Bench::new(Settings::default());
    let flow = it.put(between("a", 1, 2, "b"));
    let other = it.put(between("a", 1, 3, "b"));
    // Between two looks, which are 1.7 s apart.
    it.pass(10_700, &[flow, other]);
    let before = [flow, other].map(|flow| it.kept(flow));
    // The same again is no change.
    it.put(between("a", 1, 2, "b"));
    let changed = it.put(between("a", 1, 2, "c"));
    assert_eq!(changed.index, flow.index);
    it.pass(60, &[flow, other]);
    assert_eq!([flow, other].map(|flow| it.kept(flow)), [before[0] + 1, before[1]]);
    // It had packets of the first worker alone: no other was asked.
    assert!(!it.table.flows[&flow.index].counters[1].is_due());
    // Afterwards all is as before: one in a third of max-idle.
    it.pass(33_330, &[flow, other]);
    let more = it.kept(flow) - before[0];
    assert!((10..=12).contains(&more), "{more}");
}

#[test]
fn a_station_that_moves_is_seen_wherever_it_sends_from() {
    let mut it = Bench::new(Settings::default());
    let (here, there) = (it.put(between("a", 1, 9, "c")), it.put(between("b", 1, 9, "c")));
    let (back, others) = (it.put(between("c", 9, 1, "a")), it.put(between("a", 2, 9, "c")));
    // Between two looks, which are 833 ms apart, and so after each turn.
    it.pass(10_400, &[here, there, back, others]);
    for out in ["b", "a", "b"] {
        let before = [here, there, back, others].map(|flow| it.kept(flow));
        it.put(between("c", 9, 1, out));
        it.pass(60, &[here, there, back, others]);
        let after = [here, there, back, others].map(|flow| it.kept(flow));
        assert_eq!(after, [before[0] + 1, before[1] + 1, before[2] + 1, before[3]]);
        it.pass(5 * 833 - 60, &[here, there, back, others]);
    }
    // One that leads to a group says nothing about where anybody is.
    let group = 0x0100_5e00_0001;
    it.put(between("b", group, 9, "c"));
    it.put(between("c", 9, group, "a"));
    it.pass(200, &[]);
    let before = it.asked();
    it.put(between("c", 9, group, "b"));
    it.pass(20, &[]);
    assert!(it.asked() - before <= 3, "{}", it.asked() - before);
}

#[test]
fn changes_of_all_flows_keep_to_their_budget() {
    // 333 in a period, and a quarter of that for changes.
    let mut it = Bench::new(Settings { port_rate: 100, ..Settings::default() });
    let flows: Vec<FlowRef> = (0..300).map(|to| it.put(between("a", 1, to << 1, "b"))).collect();
    it.pass(10_000, &flows);
    let before = it.asked();
    for (to, out) in (0..3300).map(|n| (n % 300, ["c", "b"][n / 300 % 2])) {
        it.put(between("a", 1, (to as u64) << 1, out));
        it.now += 1;
        it.alive.turn(it.now);
        flows.iter().for_each(|flow| it.table.traffic(flow.index, 0, 1));
    }
    let asked = it.asked() - before;
    // What keeps flows alive, and a quarter, in two periods at most.
    assert!((83..=450 + 83).contains(&asked), "{asked}");
    assert_eq!(it.alive.given_up(), 0);
    let kept: Vec<u64> = flows.iter().map(|flow| it.kept(*flow)).collect();
    it.pass(10_000, &flows);
    for (flow, before) in flows.iter().zip(kept) {
        assert!(it.kept(*flow) - before >= 2, "a flow is no longer kept alive");
    }
}
