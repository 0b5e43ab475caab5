//! A packet's way through a worker: parse, L1, L2, actions.
//!
//! A burst is handled in stages, so that the cache lines of all its packets are on their way at once: recognize or parse, make
//! keys and ask for L1 buckets; compare tags and ask for entries; compare keys and ask for flows; look up what is left in L2,
//! subtable by subtable; then execute packet by packet, in order. A packet of a common shape is parsed only when more than
//! one flow's plan is to be found for it.
//!
//! *Resolve, then commit*: a plan that cannot end in a miss is executed at once. Any other is first run dry on a copy,
//! which records the flows of its stages, and then for good, with the same flows and the same dice. So no output leaves
//! before every stage has a plan, and what goes to the host is the packet exactly as received.

use crate::common::{self, Recognized, Shape};
use crate::drop::DropReason;
use crate::exec::Scratch;
use crate::flow::FlowRef;
use crate::hash::{Hasher, splitmix};
use crate::key::{Field, Key};
use crate::l1::{Cached, Chain, Home, L1, L1Config, L1Key, Place};
use crate::l2::{BURST, bits};
use crate::packet::{MAX_FRAME, Packet, PortId};
use crate::parse::{Extracted, extract, is_settled};
use crate::slab::{Slab, Slots};
use crate::tables::{PathStats, PortTable, Retired, Tables, Update};
use pass::{Dice, Pass, Trail};
use std::sync::Arc;

/// Why a packet goes to the host.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Upcall {
    /// A stage of its way has no flow.
    Miss,
    /// This flow cannot be executed here, or not for this packet.
    Punt(FlowRef),
    /// The host is to see this flow alive.
    KeepAlive(FlowRef),
    /// The parser does not follow its headers, or datapaths do not agree about them.
    Unparsable,
}

/// What is known of a packet that has just come in.
#[derive(Clone, Copy, Debug)]
pub enum Found<'a> {
    /// It was parsed.
    Key(&'a Key),
    /// It is of a common shape.
    Common(Shape),
}

/// Where packets come from and go to. Packets are named by their index in the burst. Each ends in exactly one of: one or
/// more outputs, an upcall, a drop.
pub trait Egress {
    /// The headers go on behind the head: fills what [`Packet::extend`] gives.
    fn more(&mut self, i: usize, packet: &mut Packet);
    /// Checks the packet's offload state against what it was found to be.
    fn admit(&mut self, i: usize, packet: &mut Packet, found: Found<'_>) -> Result<(), DropReason>;
    /// The packet itself leaves by `port` as it stands, whole, and that is all that becomes of it.
    fn forward(&mut self, i: usize, packet: &mut Packet, port: PortId) {
        self.output(i, packet, port, u32::MAX, true);
    }
    /// The packet as it stands leaves by `port`, cut to `max_len` bytes of frame; see [`Env::output`].
    fn output(&mut self, i: usize, packet: &mut Packet, port: PortId, max_len: u32, last: bool);
    /// Whether the host has room for this packet as a keep-alive; if not, it is forwarded and a later one goes.
    fn has_room(&mut self, packet: &Packet) -> bool;
    /// The packet, exactly as received, goes to the host.
    fn upcall(&mut self, i: usize, packet: &Packet, why: Upcall);
    /// The packet ends here.
    fn drop(&mut self, i: usize, packet: &Packet, reason: DropReason);
}

/// Sizes, times and seed of a [`Switch`].
#[derive(Clone, Copy, Debug)]
pub struct SwitchConfig {
    /// L1, port slots included.
    pub l1: L1Config,
    /// Most flows; the same as the planner's.
    pub flows: usize,
    /// For hashes and samples; should be random.
    pub seed: u64,
}

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
struct Burst {
    lanes: [Lane; BURST],
    keys: [Key; BURST],
    l1_keys: [L1Key; BURST],
    chains: [Chain; BURST],
}

/// One worker's switch.
pub struct Switch {
    tables: Tables,
    l1: L1,
    dice: Dice,
    scratch: Scratch,
    /// The copy that is run dry.
    spare: Box<Packet>,
    stage_key: Box<Key>,
    trail: Box<Trail>,
    burst: Box<Burst>,
}

impl Switch {
    /// A switch without ports.
    pub fn new(config: SwitchConfig) -> Switch {
        let mut seed = config.seed;
        let (l1, l2, dice) = (splitmix(&mut seed), splitmix(&mut seed), splitmix(&mut seed));
        Switch {
            tables: Tables::new(config.l1.ports, config.flows, Hasher::new(l2)),
            l1: L1::new(config.l1, Hasher::new(l1)),
            dice: Dice::new(dice),
            scratch: Scratch::default(),
            spare: Box::default(),
            stage_key: Box::default(),
            trail: Box::default(),
            burst: Box::new(Burst {
                lanes: [Lane {
                    home: Home::default(),
                    flow: FlowRef::default(),
                    place: Place::NONE,
                    tcp_flags: 0,
                    stage: Stage::Ended,
                    keyed: Keyed::No,
                    shape: Shape::default(),
                    parsed: false,
                }; BURST],
                keys: [Key::default(); BURST],
                l1_keys: [L1Key::default(); BURST],
                chains: [Chain::default(); BURST],
            }),
        }
    }

    /// Applies an update, between bursts; gives back what is to be freed.
    pub fn apply(&mut self, update: Update) -> Retired {
        self.tables.apply(update, &mut self.l1)
    }

    /// A bounded piece of upkeep, to be called between bursts; gives back what is to be freed.
    pub fn step(&mut self) -> Retired {
        self.tables.step()
    }

    /// The tables.
    pub fn tables(&self) -> &Tables {
        &self.tables
    }

    /// What control reads of its flows.
    pub fn slots(&self) -> &Arc<Slots> {
        self.tables.slab().slots()
    }

    /// L1.
    pub fn l1(&self) -> &L1 {
        &self.l1
    }

    #[cfg(test)]
    fn dice(&self) -> Dice {
        self.dice
    }

    /// Takes up to [`BURST`] packets of one ingress port at time `now` (in ticks) to their ends.
    pub fn process<E: Egress>(&mut self, now: u64, packets: &mut [Packet], egress: &mut E) {
        debug_assert!(packets.len() <= BURST);
        debug_assert!(packets.windows(2).all(|pair| pair[0].in_port == pair[1].in_port));
        let n = packets.len().min(BURST);
        let packets = &mut packets[..n];
        let Some(in_port) = packets.first().map(|packet| packet.in_port) else { return };
        let Switch { tables, l1, dice, scratch, spare, stage_key, trail, burst } = self;
        let (slab, hasher, Some(port)) = tables.split(in_port) else {
            // The port's update is still on its way; the host knows what to do.
            for (i, packet) in packets.iter_mut().enumerate() {
                match parse(i, packet, stage_key, egress) {
                    Ok(()) => egress.upcall(i, packet, Upcall::Miss),
                    Err(Refusal::Drop(reason)) => egress.drop(i, packet, reason),
                    Err(Refusal::Host) => egress.upcall(i, packet, Upcall::Unparsable),
                }
            }
            return;
        };
        let Burst { lanes, keys, l1_keys, chains } = &mut **burst;
        let lanes = &mut lanes[..n];
        let mut stats = PathStats::default();
        l1.set_time(now);

        // Recognize or parse, and ask for L1 buckets.
        let slot = in_port.slot as u16;
        for (i, (packet, lane)) in packets.iter_mut().zip(lanes.iter_mut()).enumerate() {
            let recognized = if packet.len <= MAX_FRAME { common::recognize(packet) } else { None };
            let admitted = match recognized {
                Some(Recognized { shape, tcp_flags }) => {
                    lane.home = l1.common_home(slot, port.common(shape), packet.window());
                    (lane.shape, lane.tcp_flags) = (shape, tcp_flags);
                    (lane.keyed, lane.parsed, lane.stage) = (Keyed::Common, false, Stage::Asked);
                    egress.admit(i, packet, Found::Common(shape)).map_err(Refusal::Drop)
                }
                None => {
                    let (key, l1_key) = (&mut keys[i], &mut l1_keys[i]);
                    let parsed = parse(i, packet, key, egress);
                    (lane.keyed, lane.parsed, lane.stage) = (Keyed::No, true, Stage::Open);
                    if parsed.is_ok() && l1.make_key(slot, port.terms(), key, l1_key) {
                        lane.home = l1.home_of(l1_key);
                        (lane.keyed, lane.stage) = (Keyed::Made, Stage::Asked);
                    }
                    lane.tcp_flags = tcp_flags(key);
                    parsed
                }
            };
            if let Err(refusal) = admitted {
                refuse(i, packet, refusal, &mut stats, egress);
                lane.stage = Stage::Ended;
            }
        }

        // L1 entries, then slots of flows.
        for lane in lanes.iter_mut().filter(|lane| lane.stage == Stage::Asked) {
            lane.place = l1.prefetch_entry(lane.home);
        }
        let slots = &**slab.slots();
        let generation = l1.generation(slot);
        let (mut open, mut chained) = (0u64, 0u64);
        for (i, (packet, lane)) in packets.iter().zip(lanes.iter_mut()).enumerate() {
            if lane.stage == Stage::Asked
                && lane.keyed == Keyed::Common
                && let terms = port.common(lane.shape)
                && let Some(flow) = l1.sole_flow(lane.place, (generation, slot), terms, packet.window())
            {
                slots.prefetch(flow.index);
                (lane.flow, lane.stage) = (flow, Stage::Sole);
                continue;
            }
            if lane.stage == Stage::Asked {
                let key = l1_key(lane, packet, &mut l1_keys[i], l1, port);
                chains[i] = key.map_or(Chain::default(), |key| cached(key, lane.place, generation, l1, slab));
                lane.stage = if chains[i].flows().is_empty() { Stage::Open } else { Stage::Cached };
            }
            open |= ((lane.stage == Stage::Open) as u64) << i;
            chained |= ((lane.stage == Stage::Cached) as u64) << i;
        }
        for i in bits(chained) {
            if chains[i].flows().iter().any(|&flow| slab.get_ahead(flow).is_none()) {
                lanes[i].stage = Stage::Open;
                (open, chained) = (open | 1 << i, chained & !(1 << i));
            }
        }

        // L2 for the rest.
        if open != 0 {
            for i in bits(open) {
                parse_recognized(&mut packets[i], &mut keys[i], &mut lanes[i]);
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

        let mut pass =
            Pass { slab, hasher, port, l1, dice, scratch, spare, stage_key, trail, egress, now, stats };
        for (i, packet) in packets.iter_mut().enumerate() {
            let Some((lane, later)) = lanes[i..].split_first_mut() else { break };
            if lane.stage == Stage::Sole
                && let Some(slot) = slots.slot(lane.flow)
                && pass.go_straight(i, packet, lane.tcp_flags, lane.flow, slot)
            {
                continue;
            }
            if lane.stage == Stage::Ended {
                continue;
            }
            let l1_key = l1_key(lane, packet, &mut l1_keys[i], pass.l1, pass.port);
            if lane.stage != Stage::Open {
                parse_recognized(packet, &mut keys[i], lane);
            }
            if lane.stage == Stage::Sole {
                // Unlike those of longer chains it has not been looked at before.
                let found = match slab.get(lane.flow) {
                    Some(_) => Some((lane.flow, Stage::Sole)),
                    None => {
                        pass.port.masked.lookup(hasher, slab, &keys[i]).map(|flow| (flow, Stage::Found))
                    }
                };
                (chains[i], lane.stage) =
                    found.map_or((Chain::default(), Stage::Open), |(flow, stage)| (Chain::of(flow), stage));
            }
            if lane.stage == Stage::Open {
                pass.miss(i, packet, l1_key);
                continue;
            }
            let first = chains[i].flows().first();
            let again = || {
                later.iter().zip(&chains[i + 1..]).any(|(lane, chain)| match lane.stage {
                    Stage::Sole => first == Some(&lane.flow),
                    Stage::Cached | Stage::Found => first == chain.flows().first(),
                    Stage::Ended | Stage::Asked | Stage::Open => false,
                })
            };
            pass.run(i, packet, &keys[i], chains[i].flows(), l1_key, lane.stage != Stage::Found, again);
        }
        let stats = pass.stats;
        port.counters.add(&stats);
    }
}

/// The L1 key of a packet as it came in, made if that was not done before; `None` if it is too long.
#[inline(never)] // the rarer way
fn l1_key<'k>(
    lane: &mut Lane,
    packet: &Packet,
    key: &'k mut L1Key,
    l1: &L1,
    port: &PortTable,
) -> Option<&'k L1Key> {
    if lane.keyed == Keyed::Common {
        l1.make_common_key(packet.in_port.slot as u16, port.common(lane.shape), packet.window(), key);
        lane.keyed = Keyed::Made;
    }
    (lane.keyed == Keyed::Made).then_some(key)
}

/// The flows that L1 knows for a key, asked for; none if there are none.
#[inline(never)] // the rarer way
fn cached(key: &L1Key, likely: Place, generation: u32, l1: &mut L1, slab: &Slab) -> Chain {
    let Some(place) = l1.find_near(key, generation, likely) else { return Chain::default() };
    let Cached::Chain(chain) = l1.get(place) else { return Chain::default() };
    l1.touch(place);
    chain.flows().iter().for_each(|flow| slab.prefetch_slot(flow.index));
    chain
}

enum Refusal {
    Drop(DropReason),
    Host,
}

/// Counts a packet that is not looked up.
#[cold]
fn refuse<E: Egress>(i: usize, packet: &Packet, why: Refusal, stats: &mut PathStats, egress: &mut E) {
    match why {
        Refusal::Drop(reason) => {
            stats.refused += 1;
            egress.drop(i, packet, reason);
        }
        Refusal::Host => {
            stats.unparsable += 1;
            egress.upcall(i, packet, Upcall::Unparsable);
        }
    }
}

#[inline(never)] // the rarer way
fn parse<E: Egress>(i: usize, packet: &mut Packet, key: &mut Key, egress: &mut E) -> Result<(), Refusal> {
    if packet.len > MAX_FRAME {
        return Err(Refusal::Drop(DropReason::Oversized));
    }
    let mut extracted = extract(packet, key);
    if extracted == Extracted::NeedMore {
        egress.more(i, packet);
        extracted = extract(packet, key);
    }
    match extracted {
        Extracted::Done => {
            egress.admit(i, packet, Found::Key(key)).map_err(Refusal::Drop)?;
            if is_settled(packet, key) { Ok(()) } else { Err(Refusal::Host) }
        }
        Extracted::Runt => Err(Refusal::Drop(DropReason::Runt)),
        Extracted::NeedMore | Extracted::TooLong => Err(Refusal::Host),
    }
}

/// Parses a packet of a common shape, of which all is known to be there, if that was not done before.
fn parse_recognized(packet: &mut Packet, key: &mut Key, lane: &mut Lane) {
    if !std::mem::replace(&mut lane.parsed, true) {
        let extracted = extract(packet, key);
        debug_assert_eq!(extracted, Extracted::Done);
    }
}

#[inline(always)]
fn tcp_flags(key: &Key) -> u16 {
    key.get(Field::TcpFlags) as u16
}

mod pass;
#[cfg(test)]
mod tests;
pub mod trace;
