//! A burst of packets on its way to their flows, stage by stage, each over all packets, so that the cache lines of all are on
//! their way at once. A stage is a function of its own, with registers of its own.

use super::pass::Pass;
use super::popped::{LOOKOUT, Popped};
use super::{Egress, Found, Refusal, parse, refuse, tcp_flags};
use crate::common::{self, Recognized, Shape};
use crate::flow::FlowRef;
use crate::hash::Hasher;
use crate::key::{Key, ipproto};
use crate::l1::{Cached, Chain, Home, L1, L1Key, Numbers, Place};
use crate::l2::{BURST, bits};
use crate::packet::{MAX_FRAME, Packet};
use crate::parse::{Extracted, extract};
use crate::slab::{Disposition, Slab};
use crate::tables::{PathStats, PortTable};
use crate::tunnel::{Imprint, TunnelKey, recognize};

/// How far a packet of a burst is.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Stage {
    /// It has ended: it was dropped, or went to the host.
    Ended,
    /// It has an L1 key, and the line was asked for where that is looked for.
    Asked,
    /// No flow is known.
    Open,
    /// L1 knows its only flow: [`Lane::flow`].
    Sole,
    /// L1 knows its flows, in the burst's chains.
    Cached,
    /// L2 knows its first flow, in the burst's chains.
    Found,
}

/// What L1 keys of a packet there are.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Keyed {
    /// None: it is too long.
    No,
    /// It is in the burst's L1 keys.
    Made,
    /// It is of a common shape, and its key has not been made yet, since few packets need one.
    Common,
}

/// What is known about a packet of a burst, beside its keys and its chain, which few packets need.
#[derive(Clone, Copy)]
struct Lane {
    home: Home,
    flow: FlowRef,
    place: Place,
    tcp_flags: u16,
    stage: Stage,
    keyed: Keyed,
    shape: Shape,
    /// Whether it has a key.
    parsed: bool,
}

/// What is known about the packets of a burst.
pub struct Burst {
    lanes: [Lane; BURST],
    keys: [Key; BURST],
    l1_keys: [L1Key; BURST],
    chains: [Chain; BURST],
    /// Of packets out of tunnels: the numbers of their outer headers.
    pub numbers: [u64; BURST],
    /// Those in whose keys their outer headers are, as bits.
    written: u64,
}

impl Default for Burst {
    fn default() -> Burst {
        let lane = Lane {
            home: Home::default(),
            flow: FlowRef::default(),
            place: Place::NONE,
            tcp_flags: 0,
            stage: Stage::Ended,
            keyed: Keyed::No,
            shape: Shape::default(),
            parsed: false,
        };
        Burst {
            lanes: [lane; BURST],
            keys: [Key::default(); BURST],
            l1_keys: [L1Key::default(); BURST],
            chains: [Chain::default(); BURST],
            numbers: [0; BURST],
            written: 0,
        }
    }
}

/// Packets, as bits, whose flow L1 has not told.
#[derive(Clone, Copy)]
pub struct Left {
    /// There is none.
    open: u64,
    /// There are several.
    chained: u64,
}

/// What is asked, and by whom.
pub struct Asking<'a, E> {
    pub port: &'a mut PortTable,
    pub l1: &'a L1,
    pub slab: &'a Slab,
    pub numbers: &'a mut Numbers,
    pub popped: Option<&'a mut Popped>,
    pub egress: &'a mut E,
    pub stats: &'a mut PathStats,
}

impl Burst {
    /// Recognizes packets or parses them, and asks for their lines in L1. Tells whether any is left to be looked up.
    #[inline(never)]
    pub fn ask<E: Egress>(&mut self, packets: &mut [Packet], asking: Asking<'_, E>) -> bool {
        let Asking { port, l1, egress, stats, .. } = asking;
        let Burst { lanes, keys, l1_keys, .. } = self;
        for (i, (packet, lane)) in packets.iter_mut().zip(lanes.iter_mut()).enumerate() {
            lane.ask::<E, false>(i, packet, &mut keys[i], &mut l1_keys[i], port, l1, 0, egress, stats);
        }
        true
    }

    /// [`Burst::ask`] on a port that has had packets of tunnels lately. Those whose flow is known to decapsulate are taken out of their
    /// outer headers, and end here.
    #[inline(never)]
    pub fn ask_outer<E: Egress>(&mut self, packets: &mut [Packet], asking: Asking<'_, E>) -> bool {
        let Some(popped) = asking.popped else { return self.ask(packets, Asking { popped: None, ..asking }) };
        let Asking { port, l1, slab, egress, stats, .. } = asking;
        let Burst { lanes, keys, l1_keys, .. } = self;
        port.lookout = port.lookout.saturating_sub(1);
        let generation = l1.generation(port.slot());
        // A flow that the host is to see takes the ordinary way, with all its packets.
        let is_fine = |flow: FlowRef| slab.slot(flow).is_some_and(|slot| !slot.is_due());
        popped.pop_known(packets, generation, is_fine, egress);
        if popped.packets.count_ones() as usize == packets.len() {
            port.lookout = LOOKOUT;
            return false;
        }
        for (i, (packet, lane)) in packets.iter_mut().zip(lanes.iter_mut()).enumerate() {
            if popped.packets >> i & 1 != 0 {
                lane.stage = Stage::Ended;
                continue;
            }
            let (key, l1_key) = (&mut keys[i], &mut l1_keys[i]);
            lane.ask::<E, false>(i, packet, key, l1_key, port, l1, 0, egress, stats);
            let is_candidate = lane.stage == Stage::Asked
                && match lane.keyed {
                    Keyed::Common => !lane.shape.is_tcp(),
                    Keyed::Made => keys[i].ip_proto() == ipproto::GRE,
                    Keyed::No => false,
                };
            if !is_candidate {
                continue;
            }
            let Some((known, flow)) = popped.known(lane.home.hash(), generation) else { continue };
            let mut common_key = L1Key::default();
            let key = match lane.keyed {
                Keyed::Common => {
                    let terms = port.common(lane.shape);
                    l1.make_common_key(port.slot(), terms, packet.window::<false>(), 0, &mut common_key);
                    &common_key
                }
                _ => &l1_keys[i],
            };
            if known == key
                && is_fine(flow)
                && let Some(Disposition::Fast(plan)) = slab.at(flow.index).map(|entry| &entry.disposition)
                && let Some(endpoints) = plan.endpoints()
                && let Some(decap) = recognize(packet, endpoints, |end| egress.sum_tail(i, packet, end))
            {
                if lane.keyed == Keyed::Common
                    && let mask = port.common(lane.shape).mask()
                    && let Some(imprint) = Imprint::of(packet, lane.shape, mask, &decap, endpoints)
                {
                    popped.imprint(packet, generation, flow, imprint);
                }
                popped.pop(i, packet, flow, &decap);
                lane.stage = Stage::Ended;
            }
        }
        if popped.packets != 0 {
            port.lookout = LOOKOUT;
        }
        popped.packets.count_ones() as usize != packets.len()
    }

    /// [`Burst::ask`] for those packets of a burst that came by one tunnel's port, out of their `outer` headers.
    #[inline(never)]
    pub fn ask_inside<E: Egress>(
        &mut self,
        packets: &mut [Packet],
        group: u64,
        outer: &Popped,
        asking: Asking<'_, E>,
    ) -> bool {
        let Asking { port, l1, numbers, egress, stats, .. } = asking;
        let (slot, terms) = (port.slot(), port.tunnel_terms());
        let generation = l1.generation(slot);
        for (i, packet) in packets.iter_mut().enumerate().take(BURST) {
            let lane = &mut self.lanes[i];
            lane.stage = Stage::Ended;
            if group >> i & 1 == 0 {
                continue;
            }
            let (key, l1_key) = (&mut self.keys[i], &mut self.l1_keys[i]);
            let number = match outer.number(i, generation) {
                Some(number) => number,
                None => {
                    outer.tunnel(i).unwrap_or_default().write_to(key);
                    self.written |= 1 << i;
                    numbers.number(slot, generation, terms, key)
                }
            };
            self.numbers[i] = number;
            lane.ask::<E, true>(i, packet, key, l1_key, port, l1, number, egress, stats);
        }
        true
    }

    /// Packets in whose keys their outer headers are, as bits.
    pub fn written(&self) -> u64 {
        self.written
    }

    /// Writes the outer headers of these packets into their keys, if that was not done before.
    fn write_tunnels(&mut self, packets: u64, outer: &Popped) {
        for i in bits(packets & !self.written) {
            outer.tunnel(i).unwrap_or_default().write_to(&mut self.keys[i]);
        }
        self.written |= packets;
    }

    /// Forgets the tunnels of packets: keys of other packets have no such fields, and the parser leaves them alone.
    pub fn forget_tunnels(&mut self) {
        bits(std::mem::take(&mut self.written))
            .for_each(|i| TunnelKey::default().write_to(&mut self.keys[i]));
    }

    /// Looks for the entries in L1 and asks for their lines.
    #[inline(never)]
    pub fn point(&mut self, count: usize, l1: &L1) {
        for lane in self.lanes[..count].iter_mut().filter(|lane| lane.stage == Stage::Asked) {
            lane.place = l1.prefetch_entry(lane.home);
        }
    }

    /// Compares them, and asks for the lines of the flows.
    #[inline(never)]
    pub fn hit<const TUNNELLED: bool>(
        &mut self,
        packets: &[Packet],
        port: &PortTable,
        l1: &mut L1,
        slab: &Slab,
    ) -> Left {
        let Burst { lanes, l1_keys, chains, numbers, .. } = self;
        let (slots, sole) = (&**slab.slots(), l1.sole(port.slot()));
        let mut left = Left { open: 0, chained: 0 };
        for (i, (packet, lane)) in packets.iter().zip(lanes.iter_mut()).enumerate() {
            let number = if TUNNELLED { numbers[i] } else { 0 };
            if lane.stage == Stage::Asked
                && lane.keyed == Keyed::Common
                && let terms = port.common(lane.shape)
                && let Some(flow) =
                    l1.sole_flow(lane.place, sole, terms, packet.window::<TUNNELLED>(), number)
            {
                slots.prefetch(flow.index);
                (lane.flow, lane.stage) = (flow, Stage::Sole);
                continue;
            }
            if lane.stage == Stage::Asked {
                let key = lane.l1_key::<TUNNELLED>(packet, &mut l1_keys[i], l1, port, number);
                chains[i] = key.map_or(Chain::default(), |key| cached(key, lane.place, l1, slab));
                lane.stage = match *chains[i].flows() {
                    [] => Stage::Open,
                    [flow] => {
                        lane.flow = flow;
                        Stage::Sole
                    }
                    _ => Stage::Cached,
                };
            }
            left.open |= ((lane.stage == Stage::Open) as u64) << i;
            left.chained |= ((lane.stage == Stage::Cached) as u64) << i;
        }
        left
    }

    /// Looks up in L2 what is left. Packets out of tunnels have had these `outer` headers.
    pub fn search(
        &mut self,
        packets: &mut [Packet],
        port: &mut PortTable,
        hasher: &Hasher,
        slab: &Slab,
        outer: Option<&Popped>,
        Left { mut open, mut chained }: Left,
    ) {
        let Burst { lanes, chains, .. } = self;
        for i in bits(chained) {
            if chains[i].flows().iter().any(|&flow| slab.get_ahead(flow).is_none()) {
                lanes[i].stage = Stage::Open;
                (open, chained) = (open | 1 << i, chained & !(1 << i));
            }
        }
        if open != 0 {
            outer.into_iter().for_each(|outer| self.write_tunnels(open, outer));
        }
        let Burst { lanes, keys, chains, .. } = self;
        if open != 0 {
            for i in bits(open) {
                lanes[i].parse_recognized(&mut packets[i], &mut keys[i]);
            }
            let mut found = [FlowRef::default(); BURST];
            let mut left = open;
            port.masked.lookup_batch(hasher, slab, keys, &mut left, &mut found);
            for i in bits(open & !left) {
                (chains[i], lanes[i].stage) = (Chain::of(found[i]), Stage::Found);
            }
            chained |= open & !left;
        }
        for i in bits(chained) {
            chains[i].flows().first().into_iter().for_each(|&flow| slab.prefetch(flow));
        }
    }

    /// Takes the packets to their ends, in order.
    #[inline(never)]
    pub fn execute<E: Egress, const TUNNELLED: bool>(
        &mut self,
        packets: &mut [Packet],
        outer: Option<&Popped>,
        pass: &mut Pass<'_, '_, E>,
    ) {
        let (slots, count) = (&**pass.slab.slots(), packets.len());
        for (i, packet) in packets.iter_mut().enumerate() {
            let &Lane { stage, flow, tcp_flags, .. } = &self.lanes[i % BURST];
            if stage == Stage::Sole
                && let Some(slot) = slots.slot(flow)
                && pass.go_straight::<true>(i, packet, tcp_flags, flow, slot)
            {
                continue;
            }
            if stage != Stage::Ended {
                self.execute_one::<E, TUNNELLED>(i, count, packet, outer, pass);
            }
        }
    }

    #[inline(never)] // the rarer way
    fn execute_one<E: Egress, const TUNNELLED: bool>(
        &mut self,
        i: usize,
        count: usize,
        packet: &mut Packet,
        outer: Option<&Popped>,
        pass: &mut Pass<'_, '_, E>,
    ) {
        if TUNNELLED && let Some(outer) = outer {
            self.write_tunnels(1 << i, outer);
        }
        let Burst { lanes, keys, l1_keys, chains, numbers, .. } = self;
        // The others are of earlier bursts.
        let Some((lane, later)) = lanes[i..count].split_first_mut() else { return };
        let number = if TUNNELLED { numbers[i] } else { 0 };
        let l1_key = lane.l1_key::<TUNNELLED>(packet, &mut l1_keys[i], pass.l1, pass.port, number);
        if lane.stage == Stage::Found
            && let Some(&flow) = chains[i].flows().first()
            && pass.learn_straight(i, packet, lane.tcp_flags, flow, l1_key)
        {
            return;
        }
        if lane.stage != Stage::Open {
            lane.parse_recognized(packet, &mut keys[i]);
        }
        if lane.stage == Stage::Sole {
            // Unlike those of longer chains it has not been looked at before.
            let found = match pass.slab.get(lane.flow) {
                Some(_) => Some((lane.flow, Stage::Sole)),
                None => pass.search(&keys[i]).map(|flow| (flow, Stage::Found)),
            };
            (chains[i], lane.stage) =
                found.map_or((Chain::default(), Stage::Open), |(flow, stage)| (Chain::of(flow), stage));
        }
        if lane.stage == Stage::Open {
            return pass.miss(i, packet, l1_key);
        }
        let first = chains[i].flows().first();
        let again = || {
            later.iter().zip(&chains[i + 1..]).any(|(lane, chain)| match lane.stage {
                // By then it may have another generation.
                Stage::Sole => first.is_some_and(|first| first.index == lane.flow.index),
                Stage::Cached | Stage::Found => first == chain.flows().first(),
                Stage::Ended | Stage::Asked | Stage::Open => false,
            })
        };
        pass.run(i, packet, &keys[i], chains[i].flows(), l1_key, lane.stage != Stage::Found, again);
    }
}

impl Lane {
    /// Recognizes a packet or parses it, and asks for its line in L1.
    #[inline(always)]
    #[allow(clippy::too_many_arguments)] // what the burst knows about the packet
    fn ask<E: Egress, const TUNNELLED: bool>(
        &mut self,
        i: usize,
        packet: &mut Packet,
        key: &mut Key,
        l1_key: &mut L1Key,
        port: &PortTable,
        l1: &L1,
        number: u64,
        egress: &mut E,
        stats: &mut PathStats,
    ) {
        let recognized = if packet.len <= MAX_FRAME { common::recognize::<TUNNELLED>(packet) } else { None };
        let admitted = match recognized {
            Some(found) => {
                self.ask_common::<TUNNELLED>(found, packet, port, l1, number);
                // What was said of a packet of a tunnel was said of it as it came.
                if TUNNELLED {
                    return;
                }
                egress.admit(i, packet, Found::Common(found.shape)).map_err(Refusal::Drop)
            }
            None => self.ask_parsed::<E, TUNNELLED>(i, packet, key, l1_key, port, l1, number, egress),
        };
        if let Err(refusal) = admitted {
            refuse(i, packet, refusal, stats, egress);
            self.stage = Stage::Ended;
        }
    }

    /// Asks for the line in L1 of a packet that was recognized.
    #[inline(always)]
    fn ask_common<const TUNNELLED: bool>(
        &mut self,
        Recognized { shape, tcp_flags }: Recognized,
        packet: &Packet,
        port: &PortTable,
        l1: &L1,
        number: u64,
    ) {
        let window = packet.window::<TUNNELLED>();
        self.home = l1.common_home(port.slot(), port.common(shape), window, number);
        (self.shape, self.tcp_flags) = (shape, tcp_flags);
        (self.keyed, self.parsed, self.stage) = (Keyed::Common, false, Stage::Asked);
    }

    /// Parses a packet that is of no common shape, and asks for its line in L1.
    #[inline(never)] // the rarer way
    #[allow(clippy::too_many_arguments)] // one call, of what the burst knows about the packet
    fn ask_parsed<E: Egress, const TUNNELLED: bool>(
        &mut self,
        i: usize,
        packet: &mut Packet,
        key: &mut Key,
        l1_key: &mut L1Key,
        port: &PortTable,
        l1: &L1,
        number: u64,
        egress: &mut E,
    ) -> Result<(), Refusal> {
        let parsed = parse::<E, TUNNELLED>(i, packet, key, egress);
        let is_short = parsed.is_ok() && l1.make_key(port.slot(), port.terms(), key, number, l1_key);
        (self.keyed, self.parsed, self.stage) = (Keyed::No, true, Stage::Open);
        if is_short {
            self.home = l1.home_of(l1_key);
            (self.keyed, self.stage) = (Keyed::Made, Stage::Asked);
        }
        self.tcp_flags = tcp_flags(key);
        parsed
    }

    /// The L1 key of a packet as it came in, made if that was not done before; `None` if it is too long.
    #[inline(never)] // the rarer way
    fn l1_key<'k, const TUNNELLED: bool>(
        &mut self,
        packet: &Packet,
        key: &'k mut L1Key,
        l1: &L1,
        port: &PortTable,
        number: u64,
    ) -> Option<&'k L1Key> {
        if self.keyed == Keyed::Common {
            let window = packet.window::<TUNNELLED>();
            l1.make_common_key(port.slot(), port.common(self.shape), window, number, key);
            self.keyed = Keyed::Made;
        }
        (self.keyed == Keyed::Made).then_some(key)
    }

    /// Parses a packet of a common shape, of which all is known to be there, if that was not done before.
    fn parse_recognized(&mut self, packet: &mut Packet, key: &mut Key) {
        if !std::mem::replace(&mut self.parsed, true) {
            let extracted = extract(packet, key);
            debug_assert_eq!(extracted, Extracted::Done);
        }
    }
}

/// The flows that L1 knows for a key, asked for; none if there are none.
#[inline(never)] // the rarer way
fn cached(key: &L1Key, likely: Place, l1: &mut L1, slab: &Slab) -> Chain {
    let Some(place) = l1.find_near(key, likely) else { return Chain::default() };
    let Cached::Chain(chain) = l1.get(place) else { return Chain::default() };
    l1.touch(place);
    chain.flows().iter().for_each(|flow| slab.prefetch_slot(flow.index));
    chain
}
