//! A burst of packets on its way to their flows, stage by stage, each over all packets, so that the cache lines of all are on
//! their way at once. A stage is a function of its own, with registers of its own.

use super::pass::Pass;
use super::{Egress, Found, Refusal, parse, refuse, tcp_flags};
use crate::common::{self, Recognized, Shape};
use crate::flow::FlowRef;
use crate::hash::Hasher;
use crate::key::{Key, PACKET_WORDS};
use crate::l1::{Cached, Chain, Home, L1, L1Key, Place};
use crate::l2::{BURST, bits};
use crate::packet::{MAX_FRAME, Packet};
use crate::parse::{Extracted, extract};
use crate::slab::Slab;
use crate::tables::{PathStats, PortTable};
use crate::tunnel::TunnelKey;

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

impl Burst {
    /// Recognizes packets or parses them, and asks for their lines in L1.
    #[inline(never)]
    pub fn ask<E: Egress>(
        &mut self,
        packets: &mut [Packet],
        port: &PortTable,
        l1: &L1,
        egress: &mut E,
        stats: &mut PathStats,
    ) {
        let Burst { lanes, keys, l1_keys, .. } = self;
        for (i, (packet, lane)) in packets.iter_mut().zip(lanes.iter_mut()).enumerate() {
            let recognized = if packet.len <= MAX_FRAME { common::recognize(packet) } else { None };
            let admitted = match recognized {
                Some(Recognized { shape, tcp_flags }) => {
                    lane.home = l1.common_home(port.slot(), port.common(shape), packet.window());
                    (lane.shape, lane.tcp_flags) = (shape, tcp_flags);
                    (lane.keyed, lane.parsed, lane.stage) = (Keyed::Common, false, Stage::Asked);
                    egress.admit(i, packet, Found::Common(shape)).map_err(Refusal::Drop)
                }
                None => lane.ask_parsed(i, packet, &mut keys[i], &mut l1_keys[i], port, l1, egress, None),
            };
            if let Err(refusal) = admitted {
                refuse(i, packet, refusal, stats, egress);
                lane.stage = Stage::Ended;
            }
        }
    }

    /// [`Burst::ask`] for packets that came by a tunnel. What is the same in all packets of a common shape is not so here, so all
    /// are parsed.
    #[inline(never)]
    pub fn ask_tunnelled<E: Egress>(
        &mut self,
        packets: &mut [Packet],
        tunnels: &[TunnelKey],
        port: &PortTable,
        l1: &L1,
        egress: &mut E,
        stats: &mut PathStats,
    ) {
        let Burst { lanes, keys, l1_keys, .. } = self;
        for (i, (packet, tunnel)) in packets.iter_mut().zip(tunnels).enumerate() {
            let lane = &mut lanes[i];
            let (key, l1_key) = (&mut keys[i], &mut l1_keys[i]);
            let asked = lane.ask_parsed(i, packet, key, l1_key, port, l1, egress, Some(tunnel));
            if let Err(refusal) = asked {
                refuse(i, packet, refusal, stats, egress);
                lane.stage = Stage::Ended;
            }
        }
    }

    /// Forgets the tunnels of so many packets: keys of other packets have no such fields, and the parser leaves them alone.
    pub fn forget_tunnels(&mut self, count: usize) {
        self.keys.iter_mut().take(count).for_each(|key| key.words[PACKET_WORDS..].fill(0));
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
    pub fn hit(&mut self, packets: &[Packet], port: &PortTable, l1: &mut L1, slab: &Slab) -> Left {
        let Burst { lanes, l1_keys, chains, .. } = self;
        let (slots, sole) = (&**slab.slots(), l1.sole(port.slot()));
        let mut left = Left { open: 0, chained: 0 };
        for (i, (packet, lane)) in packets.iter().zip(lanes.iter_mut()).enumerate() {
            if lane.stage == Stage::Asked
                && lane.keyed == Keyed::Common
                && let terms = port.common(lane.shape)
                && let Some(flow) = l1.sole_flow(lane.place, sole, terms, packet.window())
            {
                slots.prefetch(flow.index);
                (lane.flow, lane.stage) = (flow, Stage::Sole);
                continue;
            }
            if lane.stage == Stage::Asked {
                let key = lane.l1_key(packet, &mut l1_keys[i], l1, port);
                chains[i] = key.map_or(Chain::default(), |key| cached(key, lane.place, l1, slab));
                lane.stage = if chains[i].flows().is_empty() { Stage::Open } else { Stage::Cached };
            }
            left.open |= ((lane.stage == Stage::Open) as u64) << i;
            left.chained |= ((lane.stage == Stage::Cached) as u64) << i;
        }
        left
    }

    /// Looks up in L2 what is left.
    pub fn search(
        &mut self,
        packets: &mut [Packet],
        port: &mut PortTable,
        hasher: &Hasher,
        slab: &Slab,
        Left { mut open, mut chained }: Left,
    ) {
        let Burst { lanes, keys, chains, .. } = self;
        for i in bits(chained) {
            if chains[i].flows().iter().any(|&flow| slab.get_ahead(flow).is_none()) {
                lanes[i].stage = Stage::Open;
                (open, chained) = (open | 1 << i, chained & !(1 << i));
            }
        }
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
    pub fn execute<E: Egress>(&mut self, packets: &mut [Packet], pass: &mut Pass<'_, '_, E>) {
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
                self.execute_one(i, count, packet, pass);
            }
        }
    }

    #[inline(never)] // the rarer way
    fn execute_one<E: Egress>(
        &mut self,
        i: usize,
        count: usize,
        packet: &mut Packet,
        pass: &mut Pass<'_, '_, E>,
    ) {
        let Burst { lanes, keys, l1_keys, chains } = self;
        // The others are of earlier bursts.
        let Some((lane, later)) = lanes[i..count].split_first_mut() else { return };
        let l1_key = lane.l1_key(packet, &mut l1_keys[i], pass.l1, pass.port);
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
    /// Parses a packet that is of no common shape, and asks for its line in L1.
    #[inline(never)] // the rarer way
    #[allow(clippy::too_many_arguments)] // one call, of what the burst knows about the packet
    fn ask_parsed<E: Egress>(
        &mut self,
        i: usize,
        packet: &mut Packet,
        key: &mut Key,
        l1_key: &mut L1Key,
        port: &PortTable,
        l1: &L1,
        egress: &mut E,
        tunnel: Option<&TunnelKey>,
    ) -> Result<(), Refusal> {
        let parsed = match tunnel {
            None => parse::<E, false>(i, packet, key, egress),
            Some(tunnel) => {
                let parsed = parse::<E, true>(i, packet, key, egress);
                tunnel.write_to(key);
                parsed
            }
        };
        (self.keyed, self.parsed, self.stage) = (Keyed::No, true, Stage::Open);
        if parsed.is_ok() && l1.make_key(port.slot(), port.terms(), key, l1_key) {
            self.home = l1.home_of(l1_key);
            (self.keyed, self.stage) = (Keyed::Made, Stage::Asked);
        }
        self.tcp_flags = tcp_flags(key);
        parsed
    }

    /// The L1 key of a packet as it came in, made if that was not done before; `None` if it is too long.
    #[inline(never)] // the rarer way
    fn l1_key<'k>(
        &mut self,
        packet: &Packet,
        key: &'k mut L1Key,
        l1: &L1,
        port: &PortTable,
    ) -> Option<&'k L1Key> {
        if self.keyed == Keyed::Common {
            l1.make_common_key(port.slot(), port.common(self.shape), packet.window(), key);
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
