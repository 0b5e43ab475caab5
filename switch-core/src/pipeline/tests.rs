//! The pipeline against its plain twin, on generated tables and packets, and its policies one by one.

use super::trace::{L1Trace, Outcome};
use super::*;
use crate::action::{Action, FieldSet, PortRef, SetGroup, Userspace};
use crate::compile::{NoWays, Ways};
use crate::flow::{FlowSpec, Match, Source};
use crate::key::{ETH_P_8021AD, ETH_P_8021Q, ETH_P_ARP, ETH_P_IP, ETH_P_IPV6, VLAN_PRESENT, ipproto};
use crate::planner::{IfExists, PlanError, Planner, PlannerConfig};
use crate::reference::lookup::{Fate, Flow, Sent, Table};
use crate::slab::FlowStats;
use proptest::prelude::*;
use std::collections::HashMap;
use std::sync::Arc;

fn port(slot: u32, generation: u32) -> PortId {
    PortId { slot, generation }
}

const PORT: PortId = PortId { slot: 0, generation: 1 };
const OUT: PortId = PortId { slot: 1, generation: 1 };

/// What became of each packet of a burst.
#[derive(Default)]
struct Sink {
    sent: HashMap<usize, Vec<Sent>>,
    ended: HashMap<usize, Fate>,
    received: Vec<Vec<u8>>,
    /// The port by which all came in.
    in_port: Option<PortId>,
    host_is_full: bool,
}

impl Egress for Sink {
    fn more(&mut self, i: usize, packet: &mut Packet) {
        let at = packet.head().len();
        let frame = self.received[i].clone();
        let gap = packet.extend();
        let n = gap.len();
        gap.copy_from_slice(&frame[at..at + n]);
    }

    fn admit(&mut self, _: usize, packet: &mut Packet, _: Found<'_>) -> Result<(), DropReason> {
        if packet.offload.gso_size == 666 { Err(DropReason::BadOffload) } else { Ok(()) }
    }

    fn output(&mut self, i: usize, packet: &mut Packet, port: PortId, max_len: u32, _: bool) {
        self.sent.entry(i).or_default().push(Sent::new(packet, port, max_len));
    }

    fn has_room(&mut self, _: &Packet) -> bool {
        !self.host_is_full
    }

    fn upcall(&mut self, i: usize, packet: &mut Packet, why: Upcall) {
        assert_eq!(packet.head(), &self.received[i][..packet.head().len()], "not as received");
        assert_eq!(packet.len as usize, self.received[i].len(), "not as received");
        assert!(self.in_port.is_none_or(|port| port == packet.in_port), "not of the port it came by");
        assert!(self.ended.insert(i, Fate::Upcall(why)).is_none(), "two ends");
    }

    fn drop(&mut self, i: usize, _: &Packet, reason: DropReason) {
        assert!(self.ended.insert(i, Fate::Dropped(reason)).is_none(), "two ends");
    }
}

/// Takes packets through `switch` and gives each one's fate.
fn run(switch: &mut Switch, now: u64, packets: &[Packet]) -> Vec<Fate> {
    run_beside(switch, now, packets, false)
}

/// The same beside a host that has no room for keep-alives, or has.
fn run_beside(switch: &mut Switch, now: u64, packets: &[Packet], host_is_full: bool) -> Vec<Fate> {
    let received = packets.iter().map(|p| p.head().to_vec()).collect();
    let in_port = packets.first().map(|packet| packet.in_port);
    let mut sink = Sink { received, in_port, host_is_full, ..Sink::default() };
    switch.process(now, &mut packets.to_vec(), &mut sink);
    (0..packets.len())
        .map(|i| match (sink.sent.remove(&i), sink.ended.remove(&i)) {
            (Some(sent), None) => Fate::Sent(sent),
            (None, Some(fate)) => fate,
            (sent, ended) => panic!("packet {i} ended as {sent:?} and {ended:?}"),
        })
        .collect()
}

/// A frame: tags from the outside in, then IPv4, IPv6 or ARP.
#[derive(Clone)]
struct FrameSpec {
    dst: u8,
    tags: Vec<(u16, u16)>,
    eth_type: u16,
    ip: u8,
    ttl: u8,
    proto: u8,
    tp_dst: u16,
    frag: u16,
}

const FRAME: FrameSpec = FrameSpec {
    dst: 1,
    tags: Vec::new(),
    eth_type: ETH_P_IP,
    ip: 1,
    ttl: 64,
    proto: ipproto::UDP,
    tp_dst: 53,
    frag: 0,
};

impl FrameSpec {
    fn bytes(&self) -> Vec<u8> {
        let mut l4 = Vec::new();
        l4.extend(1000u16.to_be_bytes());
        l4.extend(self.tp_dst.to_be_bytes());
        match self.proto {
            ipproto::TCP => l4.extend([0, 0, 0, 1, 0, 0, 0, 2, 0x50, 0x12, 1, 0, 0, 0, 0, 0]),
            _ => l4.extend([0, 12, 0, 0]),
        }
        l4.extend([9; 4]);
        let mut frame = vec![2, 0, 0, 0, 0, self.dst, 2, 0, 0, 0, 0, 99];
        for (tpid, tci) in &self.tags {
            frame.extend(tpid.to_be_bytes());
            frame.extend(tci.to_be_bytes());
        }
        frame.extend(self.eth_type.to_be_bytes());
        match self.eth_type {
            ETH_P_IP => {
                frame.extend([0x45, 0]);
                frame.extend((20 + l4.len() as u16).to_be_bytes());
                frame.extend([0, 1]);
                frame.extend(self.frag.to_be_bytes());
                frame.extend([self.ttl, self.proto, 0, 0, 10, 0, 9, 9, 10, 0, self.ip >> 4, self.ip & 15]);
                frame.extend(&l4);
            }
            ETH_P_IPV6 => {
                frame.extend([0x60, 0, 0, 0]);
                frame.extend((l4.len() as u16).to_be_bytes());
                frame.extend([self.proto, self.ttl]);
                frame.extend([0xfd; 15]);
                frame.push(9);
                frame.extend([0xfd; 15]);
                frame.push(self.ip);
                frame.extend(&l4);
            }
            _ => {
                frame.extend([0, 1, 8, 0, 6, 4, 0, 1, 2, 0, 0, 0, 0, 99, 10, 0, 9, 9]);
                frame.extend([0, 0, 0, 0, 0, 0, 10, 0, self.ip >> 4, self.ip & 15]);
            }
        }
        frame
    }

    fn packet(&self, port: PortId) -> Packet {
        Packet::from_frame(port, &self.bytes())
    }
}

/// A match on the given fields: exact unless a mask is given.
fn matches(port: PortId, recirc: u32, fields: &[(Field, u128, Option<u128>)]) -> Match {
    let mut m = Match::default();
    m.key.set(Field::InPort, port.slot as u128);
    m.mask.set_exact(Field::InPort);
    m.key.set(Field::RecircId, recirc as u128);
    m.mask.set_exact(Field::RecircId);
    for &(field, value, mask) in fields {
        m.mask.set(field, mask.unwrap_or(u128::MAX));
        m.key.set(field, value);
    }
    m.key = m.key.masked(&m.mask);
    m
}

fn spec(matches: Match, actions: Vec<Action>) -> FlowSpec {
    FlowSpec { matches, actions, ufid: None, held: None }
}

fn output(port: PortId) -> Action {
    Action::Output(PortRef::Ours(port))
}

fn set(group: SetGroup, field: Field, value: u128, mask: u128) -> Action {
    Action::Set(group, vec![FieldSet { field, value, mask }])
}

/// A planner, its workers' switches and the plain twin, kept in step.
struct Bench {
    planner: Planner,
    switches: Vec<Switch>,
    twin: Table,
    /// What the twin counted for each flow, by index.
    credits: HashMap<u32, (u64, u64)>,
    paths: HashMap<u32, Vec<Arc<crate::tables::PathCounters>>>,
    /// What became of the first worker's packets, over all ports.
    total: PathStats,
    /// Packets whose way through several stages was known whole from L1.
    fused: u64,
    /// Packets that were decapsulated: those are counted at two ports.
    popped: u64,
    now: u64,
    ways: Arc<dyn Ways + Send + Sync>,
}

const FLOWS: usize = 600;

impl Bench {
    fn new(workers: usize, seed: u64, l1: L1Config) -> Bench {
        let config = PlannerConfig { ports: l1.ports, flows: FLOWS, masks: 40, seed };
        let switches: Vec<_> =
            (0..workers).map(|_| Switch::new(SwitchConfig { l1, flows: FLOWS, seed })).collect();
        Bench {
            planner: Planner::new(config, switches.iter().map(|switch| switch.slots().clone()).collect()),
            switches,
            twin: Table::default(),
            credits: HashMap::new(),
            paths: HashMap::new(),
            total: PathStats::default(),
            fused: 0,
            popped: 0,
            now: 1,
            ways: Arc::new(NoWays),
        }
    }

    fn plain() -> Bench {
        let mut bench = Bench::new(1, 5, l1_config(1024));
        bench.add_port(PORT, 1024);
        bench
    }

    fn apply(&mut self, updates: Vec<Update>) {
        assert_eq!(updates.len(), self.switches.len());
        for (switch, update) in self.switches.iter_mut().zip(updates) {
            drop(switch.apply(update));
        }
    }

    fn add_port(&mut self, id: PortId, quota: u32) {
        let (updates, counters) = self.planner.add_port(id, quota).unwrap();
        self.apply(updates);
        self.paths.insert(id.slot, counters);
    }

    fn add(&mut self, port: PortId, source: Source, spec: FlowSpec) -> Result<FlowRef, PlanError> {
        let (flow, updates) = self.planner.add(port, source, spec.clone(), IfExists::Refuse)?;
        self.apply(updates);
        self.twin.flows.push(Flow::with_ways(flow, port, source, spec, &*self.ways));
        Ok(flow)
    }

    fn replace(&mut self, flow: FlowRef, actions: Vec<Action>) -> FlowRef {
        let at = self.twin.flows.iter().position(|f| f.flow == flow).unwrap();
        let old = self.twin.flows.remove(at);
        let spec = FlowSpec { actions, ..old.spec };
        let (new, updates) = self.planner.add(old.port, old.source, spec.clone(), IfExists::Replace).unwrap();
        assert!(new.index == flow.index && new.generation != flow.generation);
        self.apply(updates);
        self.twin.flows.push(Flow::with_ways(new, old.port, old.source, spec, &*self.ways));
        new
    }

    fn remove(&mut self, flow: FlowRef) {
        let (removed, updates) = self.planner.remove(flow).unwrap();
        let (packets, bytes) = self.credits.get(&flow.index).copied().unwrap_or_default();
        let last = removed.counters[0].read();
        assert_eq!((last.packets, last.bytes), (packets, bytes), "the last statistics");
        self.apply(updates);
        assert_eq!(removed.stats(), FlowStats::default());
        self.credits.remove(&flow.index);
        self.twin.flows.retain(|f| f.flow != flow);
    }

    fn remove_port(&mut self, id: PortId) {
        for flow in self.planner.flows().filter(|flow| flow.port == id) {
            self.credits.remove(&flow.flow.index);
        }
        for updates in self.planner.remove_port(id).unwrap() {
            self.apply(updates);
        }
        let paths = self.paths.remove(&id.slot).unwrap()[0].read();
        self.total.l1_hits += paths.l1_hits;
        self.total.l2_hits += paths.l2_hits;
        self.total.misses += paths.misses;
        self.total.pending += paths.pending;
        self.total.punts += paths.punts;
        self.total.keepalives += paths.keepalives;
        self.total.unparsable += paths.unparsable;
        self.total.refused += paths.refused;
        self.twin.flows.retain(|f| f.port != id);
    }

    /// Takes a burst through every switch and compares each packet's fate, and trace, with the twin's.
    fn burst(&mut self, packets: &[Packet]) -> Vec<Fate> {
        let mut fates = Vec::new();
        for worker in 0..self.switches.len() {
            let mut dice = self.switches[worker].dice();
            let traced = self.switches[worker].trace(&packets[0]);
            fates = run(&mut self.switches[worker], self.now, packets);
            // What comes by tunnels is executed after the rest.
            let (inside, rest): (Vec<_>, Vec<_>) = (0..packets.len()).partition(|&i| {
                let (fate, trail) = self.twin.follow(&packets[i], &mut || 0);
                self.pops(&fate, &trail)
            });
            self.popped += if worker == 0 { inside.len() as u64 } else { 0 };
            for i in rest.into_iter().chain(inside) {
                let (fate, packet) = (&fates[i], &packets[i]);
                let mut thrown = dice;
                let (expected, trail) = self.twin.follow(packet, &mut || thrown.next());
                if i == 0 {
                    if let L1Trace::Hit { flows, live: true, whole: true } = &traced.l1
                        && flows.len() > 1
                    {
                        self.fused += 1;
                    }
                    let outcome = match &expected {
                        Fate::Sent(_) => Outcome::Sent,
                        Fate::Upcall(why) => Outcome::Upcall(*why),
                        Fate::Dropped(reason) => Outcome::Dropped(*reason),
                    };
                    assert_eq!(traced.outcome, outcome, "trace");
                }
                if *fate == Fate::Dropped(DropReason::MissPending) {
                    assert_eq!(expected, Fate::Upcall(Upcall::Miss));
                    continue;
                }
                assert_eq!(
                    *fate,
                    expected,
                    "packet {i} of worker {worker}: {packet:x?}",
                    packet = packet.head()
                );
                let credited = match &expected {
                    // As long as it came in, by the port or by the tunnel.
                    Fate::Upcall(Upcall::Punt(flow)) => {
                        vec![(*flow, trail[self.pops(&expected, &trail) as usize].1)]
                    }
                    Fate::Upcall(_) => Vec::new(),
                    _ => trail,
                };
                if !matches!(expected, Fate::Upcall(_)) {
                    dice = thrown;
                }
                if worker == 0 {
                    for (flow, len) in credited {
                        let credit = self.credits.entry(flow.index).or_default();
                        *credit = (credit.0 + 1, credit.1 + len as u64);
                    }
                }
            }
        }
        fates
    }

    /// Whether a packet with that fate and trail was decapsulated.
    fn pops(&self, fate: &Fate, trail: &[(FlowRef, u32)]) -> bool {
        let is_pop = |flow: FlowRef| {
            let flow = self.twin.flows.iter().find(|f| f.flow == flow);
            flow.is_some_and(|f| f.plan.as_ref().is_ok_and(|plan| plan.endpoints().is_some()))
        };
        trail.first().is_some_and(|&(first, _)| is_pop(first) && *fate != Fate::Upcall(Upcall::Punt(first)))
    }

    fn check_counters(&self) {
        for flow in self.planner.flows() {
            let (packets, bytes) = self.credits.get(&flow.flow.index).copied().unwrap_or_default();
            for counters in &flow.counters {
                let stats = counters.read();
                assert_eq!((stats.packets, stats.bytes), (packets, bytes), "{:?}", flow.spec);
            }
        }
    }

    /// Takes everything away; nothing may be left in the workers or held by anyone.
    fn finish(mut self, ports: &[PortId]) -> PathStats {
        self.check_counters();
        for &id in ports {
            self.remove_port(id);
        }
        for switch in &self.switches {
            assert!(switch.tables.slab().is_empty());
            assert!(ports.iter().all(|&id| switch.tables.port(id).is_none()));
        }
        assert!(self.planner.is_empty());
        self.total
    }
}

#[test]
fn what_a_switch_takes_is_counted() {
    let config = SwitchConfig { l1: l1_config(64), flows: 16, seed: 1 };
    let bytes = Switch::new(config).bytes();
    let numbers = Numbers::new(Hasher::new(1)).bytes();
    assert!(numbers > 300_000, "{numbers}");
    let parts = [numbers, Popped::default().bytes(), size_of::<Burst>(), size_of::<Packet>()];
    assert!(bytes > parts.iter().sum(), "{bytes} {parts:?}");
}

/// The packets that took any path.
fn packets(paths: &PathStats) -> u64 {
    let PathStats { l1_hits, l2_hits, misses, pending, punts, keepalives, unparsable, refused } = paths;
    l1_hits + l2_hits + misses + pending + punts + keepalives + unparsable + refused
}

fn l1_config(capacity: usize) -> L1Config {
    L1Config { capacity, ports: 8, pending_ticks: 100, pending_misses: 8, age_ticks: 10 }
}

/// Small domains, so that flows and packets meet.
struct Gen(Dice);

impl Gen {
    fn below(&mut self, n: u32) -> u32 {
        self.0.next() % n
    }

    fn pick<T: Copy>(&mut self, of: &[T]) -> T {
        of[self.below(of.len() as u32) as usize]
    }

    fn chance(&mut self, percent: u32) -> bool {
        self.below(100) < percent
    }

    fn frame(&mut self) -> FrameSpec {
        let tags = match self.below(10) {
            0..5 => 0,
            5..8 => 1,
            8 => 2,
            _ => 3,
        };
        FrameSpec {
            dst: self.pick(&[1, 2, 3]),
            tags: (0..tags).map(|_| (self.pick(&[ETH_P_8021Q, ETH_P_8021AD]), self.pick(&[5, 6]))).collect(),
            eth_type: self.pick(&[ETH_P_IP, ETH_P_IP, ETH_P_IPV6, ETH_P_ARP]),
            ip: self.pick(&[0x11, 0x12, 0x21]),
            ttl: self.pick(&[1, 2, 64]),
            proto: self.pick(&[ipproto::TCP, ipproto::UDP]),
            tp_dst: self.pick(&[53, 80]),
            frag: self.pick(&[0, 0, 0, 0x2000, 1]),
        }
    }

    fn matches(&mut self, port: PortId, frames: &[FrameSpec]) -> Match {
        let frame = &frames[self.below(frames.len() as u32) as usize];
        let recirc = self.pick(&[0, 0, 0, 1, 1, 2, 3]);
        let mut fields = Vec::new();
        if self.chance(40) {
            fields.push((Field::EthDst, 0x0200_0000_0000 | frame.dst as u128, None));
        }
        if self.chance(20) {
            let (tpid, tci) = frame.tags.first().map_or((0, 0), |&(tpid, tci)| (tpid, tci | VLAN_PRESENT));
            fields.push((Field::VlanTpid, tpid as u128, None));
            fields.push((Field::VlanTci, tci as u128, None));
        }
        if recirc != 0 && self.chance(20) {
            fields.push((Field::SkbMark, self.pick(&[0, 7]), None));
        }
        if self.chance(60) {
            fields.push((Field::EthType, frame.eth_type as u128, None));
            let ip = frame.ip as u128;
            if frame.eth_type == ETH_P_IPV6 {
                if self.chance(40) {
                    let address = u128::from_be_bytes([0xfd; 16]) & !0xff | ip;
                    fields.push((Field::Ipv6Dst, address, None));
                }
            } else if self.chance(40) {
                let mask = self.pick(&[0xffff_ffff, 0xffff_ff00, 0xff00_0000]);
                fields.push((Field::Ipv4Dst, 0x0a00_0000 | (ip >> 4) << 8 | ip & 15, Some(mask)));
            }
            if frame.eth_type != ETH_P_ARP {
                if self.chance(20) {
                    fields.push((Field::IpTtl, frame.ttl as u128, self.pick(&[None, Some(0xc0)])));
                }
                if self.chance(50) {
                    let frag = match frame.frag {
                        0 => 0,
                        0x2000 => 1,
                        _ => 2,
                    };
                    let frag = if frame.eth_type == ETH_P_IP { frag } else { 0 };
                    fields.push((Field::IpFrag, frag, None));
                }
                if self.chance(40) {
                    fields.push((Field::IpProto, frame.proto as u128, None));
                    if self.chance(50) {
                        fields.push((Field::TpDst, frame.tp_dst as u128, None));
                    }
                }
            }
        }
        matches(port, recirc, &fields)
    }

    fn action(&mut self, m: &Match, depth: u32) -> Action {
        let ip = 0x0a00_0000 + self.pick(&[0x101u128, 0x102, 0x201]);
        match self.below(15) {
            0..4 => output(port(self.below(3), 1)),
            4 => set(SetGroup::Eth, Field::EthDst, 0x0200_0000_0001 + self.below(3) as u128, u128::MAX >> 80),
            5 if m.key.eth_type() == ETH_P_IP => set(SetGroup::Ipv4, Field::Ipv4Dst, ip, 0xffff_ffff),
            6 if m.key.eth_type() == ETH_P_IP => set(SetGroup::Ipv4, Field::IpTtl, 0x40, 0xc0),
            7 => Action::PushVlan {
                tpid: self.pick(&[ETH_P_8021Q, ETH_P_8021AD]),
                tci: self.pick(&[5, 6]) | VLAN_PRESENT,
            },
            8 => Action::PopVlan,
            9 => Action::DecTtl(if self.chance(20) {
                vec![Action::Userspace(Userspace::default())]
            } else {
                Vec::new()
            }),
            10 => set(SetGroup::SkbMark, Field::SkbMark, 7, 0xffff_ffff),
            11 if depth < 2 => Action::Clone(self.actions(m, depth + 1)),
            12 if depth < 2 => Action::Sample { probability: 1 << 31, actions: self.actions(m, depth + 1) },
            13 if depth < 2 => Action::CheckPktLen {
                size: 60,
                greater: self.actions(m, depth + 1),
                less_equal: self.actions(m, depth + 1),
            },
            _ => Action::Trunc(40),
        }
    }

    fn actions(&mut self, m: &Match, depth: u32) -> Vec<Action> {
        let mut list: Vec<_> = (0..self.below(4)).map(|_| self.action(m, depth)).collect();
        let recirc = m.key.recirc_id();
        match self.below(10) {
            0..4 if recirc < 3 => list.push(Action::Recirc(recirc + 1 + self.below(2))),
            4 => list.push(Action::Userspace(Userspace::default())),
            _ => list.push(output(port(self.below(3), 1))),
        }
        list
    }
}

/// One history of a bench: changes and bursts in random order.
fn history(seed: u64, steps: usize, capacity: usize, quota: u32) -> (PathStats, u64) {
    let mut random = Gen(Dice::new(seed));
    let mut bench = Bench::new(2, seed, L1Config { pending_misses: 3, ..l1_config(capacity) });
    let frames: Vec<_> = (0..10).map(|_| random.frame()).collect();
    let mut ports = [port(0, 1), port(1, 1), port(2, 1)];
    ports.iter().for_each(|&id| bench.add_port(id, quota));
    let (mut packets_in, mut accepted) = (0, 0);
    for step in 0..steps {
        bench.now += random.below(40) as u64;
        let id = random.pick(&ports);
        match random.below(100) {
            0..32 => {
                let m = random.matches(id, &frames);
                let actions = random.actions(&m, 0);
                let source =
                    random.pick(&[Source::Explicit, Source::Learned, Source::Learned, Source::Learned]);
                // The planner refuses exactly what overlaps.
                let others: Vec<FlowRef> = bench
                    .twin
                    .flows
                    .iter()
                    .filter(|f| f.port == id && f.source == source)
                    .filter(|f| m.key.overlaps(&m.mask, &f.spec.matches.key, &f.spec.matches.mask))
                    .map(|f| f.flow)
                    .collect();
                match bench.add(id, source, spec(m, actions)) {
                    Ok(_) => {
                        assert!(others.is_empty());
                        accepted += 1;
                    }
                    Err(PlanError::Overlaps(other) | PlanError::Exists(other)) => {
                        assert!(others.contains(&other));
                    }
                    Err(PlanError::Masks(_)) => {}
                    Err(error) => panic!("{error}"),
                }
            }
            32..37 if !bench.twin.flows.is_empty() => {
                let at = random.below(bench.twin.flows.len() as u32) as usize;
                bench.remove(bench.twin.flows[at].flow);
            }
            37..41 if !bench.twin.flows.is_empty() => {
                let at = random.below(bench.twin.flows.len() as u32) as usize;
                let old = &bench.twin.flows[at];
                let actions = random.actions(&old.spec.matches, 0);
                bench.replace(old.flow, actions);
            }
            41 if step % 8 == 0 => {
                let slot = id.slot as usize;
                bench.remove_port(id);
                // A packet of a port that is gone, or not yet there, is the host's.
                let orphan = random.frame().packet(id);
                assert_eq!(run(&mut bench.switches[0], 1, &[orphan]), [Fate::Upcall(Upcall::Miss)]);
                ports[slot].generation += 1;
                bench.add_port(ports[slot], quota);
            }
            42 => {
                let updates = bench.planner.shrink_union(id).unwrap();
                bench.apply(updates);
            }
            43..48 => bench.switches.iter_mut().for_each(|switch| drop(switch.step())),
            _ => {
                let n = 1 + random.below(BURST as u32);
                let packets: Vec<_> =
                    (0..n).map(|_| frames[random.below(frames.len() as u32) as usize].packet(id)).collect();
                bench.burst(&packets);
                packets_in += packets.len() as u64;
            }
        }
    }
    assert!(accepted > 0);
    let fused = bench.fused;
    let total = bench.finish(&ports);
    assert_eq!(packets(&total), packets_in, "every packet is counted once");
    (total, fused)
}

/// The histories would prove little if they did not come by everywhere.
#[test]
fn histories_take_every_path() {
    let totals: Vec<_> = (0..6).map(|seed| history(seed, 300, 1024, 1024)).collect();
    let sum = |of: fn(&PathStats) -> u64| totals.iter().map(|(total, _)| of(total)).sum::<u64>();
    assert!(totals.iter().map(|(_, fused)| fused).sum::<u64>() > 20, "{totals:?}");
    for count in
        [sum(|t| t.l1_hits), sum(|t| t.l2_hits), sum(|t| t.misses), sum(|t| t.pending), sum(|t| t.punts)]
    {
        assert!(count > 100, "{totals:?}");
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 48, ..ProptestConfig::default() })]

    #[test]
    fn equals_the_plain_twin(seed: u64) {
        history(seed, 250, 1024, 1024);
    }

    #[test]
    fn equals_the_plain_twin_with_a_tiny_l1(seed: u64) {
        history(seed, 150, 5, 3);
    }
}

mod policies;
mod tunnelled;
