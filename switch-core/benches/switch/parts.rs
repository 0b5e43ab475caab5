//! The parts of the switch, each by itself: parsing, L1, L2, actions, and what a worker does for a change of flows.

use crate::meter::Meter;
use crate::{BURST, OUT, PORT, exact};
use std::hint::black_box;
use std::sync::Arc;
use switch_core::action::{Action, FieldSet, PortRef, SetGroup};
use switch_core::common::{Window, recognize};
use switch_core::compile::{Plan, compile};
use switch_core::exec::{Env, Metadata, Scratch, Verdict, execute};
use switch_core::flow::{FlowRef, FlowSpec, Match, Source};
use switch_core::hash::Hasher;
use switch_core::key::{ETH_P_8021Q, ETH_P_IP, ETH_P_IPV6, FRAG_NONE, Field, Key, VLAN_PRESENT, ipproto};
use switch_core::l1::{Chain, CommonTerms, L1, L1Config};
use switch_core::l2::Masked;
use switch_core::packet::{Packet, PortId};
use switch_core::parse::{Extracted, MAX_EXTENSIONS, extract};
use switch_core::pipeline::{Switch, SwitchConfig};
use switch_core::planner::{IfExists, Planner, PlannerConfig};
use switch_core::slab::{Slab, Slots};
use switch_core::tables::Update;

/// Flows that a table takes before it begins anew.
const FLOWS: usize = 4096;
/// Bytes that a common packet's L1 key is made of.
type Bytes = [u8; switch_core::common::WINDOW];

/// All rows.
pub fn all(meter: &Meter) {
    for (name, frame) in shapes() {
        recognition(meter, name, &frame);
    }
    for (name, frame) in shapes() {
        parse(meter, name, &frame);
    }
    parse(meter, "extensions", &frame(false, true, MAX_EXTENSIONS, ipproto::UDP));
    l1(meter);
    for masks in [1, 4, 16, 64] {
        l2(meter, masks);
    }
    actions(meter);
    updates(meter);
}

fn shapes() -> [(&'static str, Vec<u8>); 4] {
    [
        ("udp4", frame(false, false, 0, ipproto::UDP)),
        ("tcp4", frame(false, false, 0, ipproto::TCP)),
        ("tcp6", frame(false, true, 0, ipproto::TCP)),
        ("vlan-udp4", frame(true, false, 0, ipproto::UDP)),
    ]
}

/// A frame of at least 64 bytes, with so many IPv6 extension headers.
fn frame(tagged: bool, v6: bool, extensions: usize, proto: u8) -> Vec<u8> {
    const DESTINATION_OPTIONS: u8 = 60;
    let mut frame = vec![2, 0, 0, 0, 0, 1, 2, 0, 0, 0, 0, 2];
    if tagged {
        frame.extend(ETH_P_8021Q.to_be_bytes());
        frame.extend([0, 7]);
    }
    let mut transport = vec![0x30, 0x39, 0, 53];
    match proto {
        ipproto::TCP => transport.extend([0, 0, 0, 1, 0, 0, 0, 2, 0x50, 0x10, 1, 0, 0, 0, 0, 0]),
        _ => transport.extend([0, 30, 0, 0]),
    }
    transport.resize(30, 0);
    if v6 {
        let protos = (0..extensions).map(|_| DESTINATION_OPTIONS).chain([proto]).collect::<Vec<_>>();
        let len = (8 * extensions + transport.len()) as u16;
        frame.extend(ETH_P_IPV6.to_be_bytes());
        frame.extend([0x60, 0, 0, 0]);
        frame.extend(len.to_be_bytes());
        frame.extend([protos[0], 64]);
        frame.extend([0xfd; 32]);
        for &next in &protos[1..] {
            frame.extend([next, 0, 1, 4, 0, 0, 0, 0]); // PadN
        }
    } else {
        frame.extend(ETH_P_IP.to_be_bytes());
        frame.extend([0x45, 0, 0, 20 + transport.len() as u8, 0, 0, 0, 0, 64, proto, 0, 0]);
        frame.extend([10, 0, 0, 1, 10, 1, 0, 1]);
    }
    frame.extend(transport);
    frame
}

fn parse(meter: &Meter, name: &str, frame: &[u8]) {
    meter.row(&format!("parse/{name}"), 1, || {
        let mut packets = vec![Packet::from_frame(PORT, frame); BURST];
        let mut key = Key::default();
        move |watch| {
            let done = watch.measure(|| {
                let parsed = packets.iter_mut().map(|packet| extract(packet, black_box(&mut key)));
                parsed.filter(|extracted| *extracted == Extracted::Done).count()
            });
            assert_eq!(done, BURST);
            BURST
        }
    });
}

fn recognition(meter: &Meter, name: &str, frame: &[u8]) {
    meter.row(&format!("recognize/{name}"), 1, || {
        let mut packets = vec![Packet::from_frame(PORT, frame); BURST];
        move |watch| {
            let done = watch.measure(|| {
                packets.iter_mut().filter_map(|packet| recognize::<false>(black_box(packet))).count()
            });
            assert_eq!(done, BURST);
            BURST
        }
    });
}

/// The first bytes of a UDP packet; `n` is in its source address and port.
fn window(n: usize) -> Bytes {
    let mut window = [0; _];
    let frame = frame(false, false, 0, ipproto::UDP);
    window[..frame.len()].copy_from_slice(&frame);
    window[27..30].copy_from_slice(&(n as u32).to_be_bytes()[1..]);
    window[34..36].copy_from_slice(&(n as u16).to_be_bytes());
    window
}

/// The exact-match table of a port whose flows look at the 5-tuple.
struct Exact {
    l1: L1,
    terms: CommonTerms,
}

impl Exact {
    fn new(capacity: usize) -> Exact {
        let config = L1Config { capacity, ports: 1, pending_ticks: 10, pending_misses: 4, age_ticks: 1000 };
        let mut l1 = L1::new(config, Hasher::new(1));
        l1.renew(0);
        let frame = frame(false, false, 0, ipproto::UDP);
        let shape = recognize::<false>(&mut Packet::from_frame(PORT, &frame)).expect("a common packet").shape;
        let union = exact(&[Field::Ipv4Src, Field::Ipv4Dst, Field::TpSrc, Field::TpDst].map(|f| (f, 0))).mask;
        Exact { l1, terms: CommonTerms::new(&Window::of(shape, &union).words(), false) }
    }

    fn look_up(&mut self, window: &Bytes) -> bool {
        let home = self.l1.common_home(0, &self.terms, window, 0);
        let place = self.l1.prefetch_entry(home);
        let sole = self.l1.sole(0);
        self.l1.sole_flow(place, sole, &self.terms, window, 0).map(black_box).is_some()
    }

    /// As for the first packet of a flow: it is looked for, and put in.
    fn learn(&mut self, window: &Bytes, chain: &Chain) {
        let key = self.l1.common_key(0, &self.terms, window, 0);
        if self.l1.find(&key).is_none() {
            self.l1.store(&key, chain);
        }
    }
}

fn l1(meter: &Meter) {
    let chain = Chain::of(FlowRef { index: 1, generation: 1 });
    meter.row("l1/hit", 0, || {
        let mut table = Exact::new(4 * FLOWS);
        let windows: Vec<_> = (0..FLOWS).map(window).collect();
        windows.iter().for_each(|window| table.learn(window, &chain));
        let mut at = 0;
        move |watch| {
            let burst = &windows[at..at + BURST];
            at = (at + BURST) % FLOWS;
            assert!(watch.measure(|| burst.iter().all(|window| table.look_up(window))));
            BURST
        }
    });
    // In a table with room, and in one that has none.
    for (name, capacity, before) in [("insert", 4 * FLOWS, 0), ("replace", FLOWS / 4, FLOWS)] {
        meter.row(&format!("l1/miss-{name}"), 0, || {
            let full = move || {
                let mut table = Exact::new(capacity);
                (0..before).for_each(|n| table.learn(&window(n), &chain));
                (table, before)
            };
            let (mut table, mut n) = full();
            move |watch| {
                if n == before + FLOWS {
                    (table, n) = full();
                }
                let burst: [_; BURST] = std::array::from_fn(|i| window(n + i));
                n += BURST;
                watch.measure(|| burst.iter().for_each(|window| table.learn(window, &chain)));
                BURST
            }
        });
    }
}

fn spec(matches: Match, actions: Vec<Action>) -> FlowSpec {
    FlowSpec { matches, actions, ufid: None, held: None }
}

fn ip(more: &[(Field, u128)]) -> Match {
    let common = [(Field::RecircId, 0), (Field::InPort, 0), (Field::EthType, ETH_P_IP as u128)];
    exact(&[&common[..], more].concat())
}

/// A flow of a mask of its own that no packet of ours matches, nor any that another of these does.
fn stranger(i: usize) -> Match {
    let mut matches = ip(&[]);
    let mut prefix = |field: Field, width: usize, top: u128, i: usize| {
        let last = width - 2 - i;
        matches.key.set(field, top << (width - 8) | 1 << last);
        matches.mask.set(field, (1u128 << width) - (1 << last));
    };
    // Prefixes of different length that exclude each other: of the source address, or of the MAC address beside it.
    match i.checked_sub(20) {
        None => prefix(Field::Ipv4Src, 32, 0xc0, i + 7),
        Some(i) => {
            prefix(Field::EthSrc, 48, 0x80, i);
            matches.key.set(Field::Ipv4Src, 0xc1 << 24);
            matches.mask.set(Field::Ipv4Src, 0xff << 24);
        }
    }
    matches
}

/// Lookups in the last of so many subtables.
fn l2(meter: &Meter, masks: usize) {
    meter.row(&format!("l2/{masks}-masks"), 1, || {
        let hasher = Hasher::new(1);
        let (mut slab, mut masked) = (Slab::new(FLOWS, hasher.clone()), Masked::new(masks));
        let (mut planner, _) = planner(slab.slots());
        let mut put = |matches: Match| {
            let added = planner.add(PORT, Source::Explicit, spec(matches, vec![]), IfExists::Refuse);
            for update in added.expect("a new flow").1 {
                let (entry, place) = match update {
                    Update::AddFlow(entry, place) => (entry, place),
                    Update::AddFlowWith(room) => {
                        let (entry, place) = room.flow.expect("it is for one");
                        room.subtable.map(|table| masked.add_subtable(place.source, table));
                        room.array.map(|array| masked.grow(place.source, place.subtable, array, &hasher));
                        (entry, place)
                    }
                    _ => panic!("another update"),
                };
                assert!(masked.insert(&place, &entry.values, &hasher));
                assert!(slab.put(place.flow, entry).is_ok_and(|old| old.is_none()));
            }
        };
        (1..masks).for_each(|i| put(stranger(i - 1)));
        (0..FLOWS / 16).for_each(|n| put(flow(n)));
        assert_eq!(masked.masks(), masks);
        let mut keys = vec![Key::default(); FLOWS / 16];
        for (n, key) in keys.iter_mut().enumerate() {
            let mut packet = Packet::from_frame(PORT, &window(n)[..64]);
            assert_eq!(extract(&mut packet, key), Extracted::Done);
        }
        let mut at = 0;
        move |watch| {
            let burst = &keys[at..at + BURST];
            at = (at + BURST) % keys.len();
            let mut open = u32::MAX as u64;
            let mut found = [FlowRef::default(); BURST];
            watch.measure(|| masked.lookup_batch(&hasher, &slab, burst, &mut open, &mut found));
            assert_eq!(open, 0);
            BURST
        }
    });
}

/// Where actions end.
struct Out;

impl<'p> Env<'p> for Out {
    fn output(&mut self, packet: &mut Packet, port: PortId, max_len: u32, _: bool) {
        black_box((packet.head().as_ptr(), port, max_len));
    }
    fn recirculate(&mut self, _: &mut Packet, _: &Metadata) -> Option<&'p Plan> {
        None
    }
    fn random(&mut self) -> u32 {
        0
    }
}

fn actions(meter: &Meter) {
    let output = || Action::Output(PortRef::Ours(OUT));
    let set = |field, value| FieldSet { field, value, mask: (1 << 48) - 1 };
    let macs = vec![set(Field::EthDst, 0x0200_0000_0003), set(Field::EthSrc, 0x0200_0000_0004)];
    let (tpid, tci) = (ETH_P_8021Q, 7 | VLAN_PRESENT);
    let [udp, .., tagged] = shapes().map(|(_, frame)| frame);
    let rows = [
        ("output", &udp, vec![output()]),
        ("rewrite", &udp, vec![Action::Set(SetGroup::Eth, macs), Action::DecTtl(vec![]), output()]),
        ("push-vlan", &udp, vec![Action::PushVlan { tpid, tci }, output()]),
        ("pop-vlan", &tagged, vec![Action::PopVlan, output()]),
        ("clone", &udp, vec![Action::Clone(vec![Action::PushVlan { tpid, tci }, output()]), output()]),
    ];
    for (name, frame, actions) in rows {
        meter.row(&format!("actions/{name}"), 1, || {
            let mut key = Key::default();
            let mut original = Packet::from_frame(PORT, frame);
            assert_eq!(extract(&mut original, &mut key), Extracted::Done);
            let matches = ip(&[(Field::EthDst, 1), (Field::EthSrc, 1), (Field::IpTtl, 64)]);
            let plan = compile(&spec(matches, actions)).expect("it can be executed");
            let (mut packets, mut scratch) = (vec![Packet::default(); BURST], Scratch::default());
            move |watch| {
                packets.iter_mut().for_each(|packet| packet.clone_from(&original));
                let done = watch.measure(|| {
                    let verdicts =
                        packets.iter_mut().map(|packet| execute(&plan, packet, &mut scratch, &mut Out));
                    verdicts.filter(|verdict| *verdict == Verdict::Done).count()
                });
                assert_eq!(done, BURST);
                BURST
            }
        });
    }
}

/// Control of a worker of these slots, with one port, and the update that says so.
fn planner(slots: &Arc<Slots>) -> (Planner, Update) {
    let config = PlannerConfig { ports: 1, flows: 2 * FLOWS, masks: 64, seed: 1 };
    let mut planner = Planner::new(config, vec![slots.clone()]);
    let (mut updates, _) = planner.add_port(PORT, u32::MAX).expect("the slot is free");
    (planner, updates.remove(0))
}

/// The flow of [`window`] `n`.
fn flow(n: usize) -> Match {
    let number = n as u128;
    ip(&[
        (Field::IpFrag, FRAG_NONE as u128),
        (Field::IpProto, ipproto::UDP as u128),
        (Field::Ipv4Src, 10 << 24 | number & 0xff_ffff),
        (Field::Ipv4Dst, 0x0a01_0001),
        (Field::TpSrc, number & 0xffff),
        (Field::TpDst, 53),
    ])
}

/// Control and a worker's tables.
struct Twins {
    planner: Planner,
    switch: Switch,
    flows: Vec<FlowRef>,
}

impl Twins {
    fn new() -> Twins {
        let l1 = L1Config { capacity: 64, ports: 1, pending_ticks: 10, pending_misses: 4, age_ticks: 1000 };
        let mut switch = Switch::new(SwitchConfig { l1, flows: 2 * FLOWS, seed: 1 });
        let (planner, begin) = planner(switch.slots());
        drop(switch.apply(begin));
        Twins { planner, switch, flows: vec![] }
    }

    fn full() -> Twins {
        let mut twins = Twins::new();
        while twins.flows.len() < FLOWS {
            for update in twins.add() {
                drop(twins.switch.apply(update));
            }
        }
        twins
    }

    fn spec(n: usize) -> FlowSpec {
        spec(flow(n), vec![Action::Output(PortRef::Ours(OUT))])
    }

    fn add(&mut self) -> Vec<Update> {
        let spec = Twins::spec(self.flows.len());
        let added = self.planner.add(PORT, Source::Explicit, spec, IfExists::Refuse);
        let (flow, updates) = added.expect("a new flow");
        self.flows.push(flow);
        updates
    }

    fn replace(&mut self, n: usize) -> Vec<Update> {
        let (flow, updates) = self.planner.replace(self.flows[n], Twins::spec(n)).expect("the flow lives");
        self.flows[n] = flow;
        updates
    }

    fn remove(&mut self) -> Vec<Update> {
        let flow = self.flows.pop().expect("there are flows");
        self.planner.remove(flow).expect("the flow lives").1
    }
}

/// What a worker does for an update, over the life of a table of 4096 flows. Control's part is not in it.
fn updates(meter: &Meter) {
    update(meter, "add", Twins::new, |twins| (twins.flows.len() < FLOWS).then(|| twins.add()));
    let mut n = 0;
    update(meter, "replace", Twins::full, move |twins| {
        n = (n + 1) % FLOWS;
        Some(twins.replace(n))
    });
    update(meter, "remove", Twins::full, |twins| (!twins.flows.is_empty()).then(|| twins.remove()));
}

fn update(
    meter: &Meter,
    name: &str,
    start: fn() -> Twins,
    mut change: impl FnMut(&mut Twins) -> Option<Vec<Update>>,
) {
    meter.row(&format!("update/{name}"), 0, || {
        let mut twins = start();
        move |watch| {
            let mut updates = Vec::with_capacity(BURST);
            while updates.len() < BURST {
                match change(&mut twins) {
                    Some(more) => updates.extend(more),
                    None => twins = start(),
                }
            }
            let mut retired = Vec::with_capacity(BURST);
            watch.measure(|| retired.extend(updates.drain(..).map(|update| twins.switch.apply(update))));
            retired.len()
        }
    });
}
