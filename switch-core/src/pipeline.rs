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

use crate::chain::{self, Extent};
use crate::common::{self, Shape};
use crate::compile::Plan;
use crate::drop::DropReason;
use crate::exec::{Env, Metadata, Scratch, Verdict, execute, rewrite};
use crate::flow::FlowRef;
use crate::hash::{Hasher, prefetch_read, prefetch_write, splitmix};
use crate::key::{Field, Key};
use crate::l1::{Cached, Chain, L1, L1Config, L1Key, Place};
use crate::l2::{BURST, Masked, bits};
use crate::packet::{Layout, MAX_FRAME, Packet, PortId};
use crate::parse::{Extracted, extract, extract_recirculated, is_settled};
use crate::slab::{Disposition, FlowCounters, FlowEntry, Slab, Way};
use crate::tables::{PathStats, PortTable, Retired, Tables, Update};

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

/// The dice of `sample`.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
struct Dice(u64);

impl Dice {
    fn next(&mut self) -> u32 {
        (splitmix(&mut self.0) >> 32) as u32
    }
}

/// Stages of one packet's way, over all its copies.
const MAX_STAGES: usize = 64;

/// The flows that a packet met, stage by stage.
struct Trail {
    flows: [FlowRef; MAX_STAGES],
    /// The layout that the parser found at a stage. Not of the first `known` stages, which were not parsed again.
    layouts: [Layout; MAX_STAGES],
    len: usize,
    known: usize,
}

impl Trail {
    fn start(&mut self, flows: &[FlowRef]) {
        self.len = flows.len().min(MAX_STAGES);
        self.known = self.len;
        self.flows[..self.len].copy_from_slice(&flows[..self.len]);
    }

    fn flows(&self) -> &[FlowRef] {
        &self.flows[..self.len]
    }

    fn push(&mut self, flow: FlowRef, layout: Layout) -> bool {
        if self.len == MAX_STAGES {
            return false;
        }
        self.flows[self.len] = flow;
        self.layouts[self.len] = layout;
        self.len += 1;
        true
    }
}

/// How far a packet of a burst is.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Stage {
    /// It has ended: it was dropped, or went to the host.
    Ended,
    /// No flow is known.
    Open,
    /// L1 knows its only flow, which needs but little to be looked at: [`Lane::flow`].
    Sole,
    /// L1 knows its flows, in the burst's chains.
    Cached,
    /// L2 knows its first flow, in the burst's chains.
    Found,
}

/// What is known about a packet of a burst, beside its key and its chain, which few packets need.
struct Lane {
    stage: Stage,
    /// It is of a common shape and was not parsed: it has no key.
    common: bool,
    shape: Shape,
    /// Whether it has an L1 key.
    keyed: bool,
    place: Place,
    flow: FlowRef,
    l1: L1Key,
}

impl Lane {
    fn l1_key(&self) -> Option<&L1Key> {
        self.keyed.then_some(&self.l1)
    }
}

/// What is known about the packets of a burst.
struct Burst {
    lanes: [Lane; BURST],
    keys: [Key; BURST],
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
            dice: Dice(dice),
            scratch: Scratch::default(),
            spare: Box::default(),
            stage_key: Box::default(),
            trail: Box::new(Trail {
                flows: [FlowRef::default(); MAX_STAGES],
                layouts: [Layout::default(); MAX_STAGES],
                len: 0,
                known: 0,
            }),
            burst: Box::new(Burst {
                lanes: std::array::from_fn(|_| Lane {
                    stage: Stage::Ended,
                    common: false,
                    shape: Shape::default(),
                    keyed: false,
                    place: Place::NONE,
                    flow: FlowRef::default(),
                    l1: L1Key::default(),
                }),
                keys: [Key::default(); BURST],
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
        let Burst { lanes, keys, chains } = &mut **burst;
        let lanes = &mut lanes[..n];
        let mut stats = PathStats::default();
        l1.set_time(now);

        // Recognize or parse, make L1 keys, ask for their buckets.
        let slot = in_port.slot as u16;
        for (i, (packet, lane)) in packets.iter_mut().zip(lanes.iter_mut()).enumerate() {
            let recognized = if packet.len <= MAX_FRAME { common::recognize(packet) } else { None };
            lane.common = recognized.is_some();
            let admitted = match recognized {
                Some(shape) => {
                    lane.shape = shape;
                    l1.make_common_key(slot, port.common(shape), packet.window(), &mut lane.l1);
                    lane.keyed = true;
                    egress.admit(i, packet, Found::Common(shape)).map_err(Refusal::Drop)
                }
                None => {
                    let parsed = parse(i, packet, &mut keys[i], egress);
                    lane.keyed = parsed.is_ok() && l1.make_key(slot, port.terms(), &keys[i], &mut lane.l1);
                    parsed
                }
            };
            lane.stage = match admitted {
                Ok(()) => {
                    l1.prefetch(&lane.l1); // of an old key, if there is none
                    Stage::Open
                }
                Err(refusal) => {
                    refuse(i, packet, refusal, &mut stats, egress);
                    Stage::Ended
                }
            };
        }

        // L1 entries, then flows.
        let generation = l1.generation(slot);
        for lane in lanes.iter_mut().filter(|lane| lane.stage == Stage::Open && lane.keyed) {
            lane.place = l1.prefetch_entry(&lane.l1);
        }
        for (i, lane) in lanes.iter_mut().enumerate().filter(|(_, l)| l.stage == Stage::Open && l.keyed) {
            let Some(place) = l1.find_near(&lane.l1, generation, lane.place) else { continue };
            let (first, len) = l1.first(place);
            if len == 1 {
                l1.touch(place);
                slab.prefetch_slot(first.index);
                (lane.flow, lane.stage) = (first, Stage::Sole);
            } else if let Cached::Chain(chain) = l1.get(place) {
                l1.touch(place);
                chain.flows().iter().for_each(|flow| slab.prefetch_slot(flow.index));
                (chains[i], lane.stage) = (chain, Stage::Cached);
            }
        }
        let (mut open, mut chained) = (0u64, 0u64);
        for (i, lane) in lanes.iter_mut().enumerate() {
            if lane.stage == Stage::Sole {
                match slab.way(lane.flow) {
                    Some((way, counters)) if way != Way::Long => {
                        prefetch_write(counters);
                        if way == Way::Straight {
                            slab.prefetch_entry(lane.flow);
                        }
                        continue;
                    }
                    _ => (chains[i], lane.stage) = (Chain::of(lane.flow), Stage::Cached),
                }
            }
            if lane.stage == Stage::Cached
                && chains[i].flows().iter().any(|&flow| slab.get_ahead(flow).is_none())
            {
                lane.stage = Stage::Open;
            }
            open |= ((lane.stage == Stage::Open) as u64) << i;
            chained |= ((lane.stage == Stage::Cached) as u64) << i;
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
            if let Some(entry) = chains[i].flows().first().and_then(|&flow| slab.get(flow)) {
                entry.prefetch();
            }
        }

        let mut pass =
            Pass { slab, hasher, port, l1, dice, scratch, spare, stage_key, trail, egress, now, stats };
        for (i, packet) in packets.iter_mut().enumerate() {
            let lane = &mut lanes[i];
            match lane.stage {
                Stage::Ended => continue,
                Stage::Open => {
                    pass.miss(i, packet, lane.l1_key());
                    continue;
                }
                Stage::Sole => {
                    if let Some((way, counters)) = slab.way(lane.flow)
                        && !counters.is_due()
                    {
                        let flags = match lane.common {
                            true => common::tcp_flags(lane.shape, packet),
                            false => tcp_flags(&keys[i]),
                        };
                        pass.go_straight(i, packet, flags, way, counters, lane.flow);
                        continue;
                    }
                    chains[i] = Chain::of(lane.flow);
                }
                Stage::Cached | Stage::Found => {}
            }
            parse_recognized(packet, &mut keys[i], lane);
            let (lane, first) = (&lanes[i], chains[i].flows().first());
            pass.run(
                i,
                packet,
                &keys[i],
                chains[i].flows(),
                lane.l1_key(),
                lane.stage != Stage::Found,
                || {
                    lanes[i + 1..].iter().zip(&chains[i + 1..]).any(|(lane, chain)| match lane.stage {
                        Stage::Sole => first == Some(&lane.flow),
                        Stage::Cached | Stage::Found => first == chain.flows().first(),
                        Stage::Ended | Stage::Open => false,
                    })
                },
            );
        }
        let stats = pass.stats;
        port.counters.add(&stats);
    }
}

impl FlowEntry {
    /// Asks for what the execution of the flow reads and writes.
    #[inline(always)]
    fn prefetch(&self) {
        if let Disposition::Fast(plan) = &self.disposition {
            prefetch_read(&**plan);
        }
        prefetch_write(&*self.counters);
    }
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
    if std::mem::take(&mut lane.common) {
        let extracted = extract(packet, key);
        debug_assert_eq!(extracted, Extracted::Done);
    }
}

/// What the execution of a burst's packets shares.
struct Pass<'r, 'p, E> {
    slab: &'p Slab,
    hasher: &'r Hasher,
    port: &'r mut PortTable,
    l1: &'r mut L1,
    dice: &'r mut Dice,
    scratch: &'r mut Scratch,
    spare: &'r mut Packet,
    stage_key: &'r mut Key,
    trail: &'r mut Trail,
    egress: &'r mut E,
    now: u64,
    stats: PathStats,
}

impl<'p, E: Egress> Pass<'_, 'p, E> {
    /// No flow at some stage: to the host, unless enough of its kind went there just now.
    fn miss(&mut self, i: usize, packet: &Packet, l1_key: Option<&L1Key>) {
        if l1_key.is_none_or(|key| self.l1.may_miss(key, self.now)) {
            self.stats.misses += 1;
            self.egress.upcall(i, packet, Upcall::Miss);
        } else {
            self.stats.pending += 1;
            self.egress.drop(i, packet, DropReason::MissPending);
        }
    }

    fn punt(&mut self, i: usize, packet: &Packet, key: &Key, flow: FlowRef) {
        self.stats.punts += 1;
        if let Some(entry) = self.slab.get(flow) {
            entry.counters.credit(packet.len as u64, tcp_flags(key), self.now);
            entry.counters.credit_punt();
        }
        self.egress.upcall(i, packet, Upcall::Punt(flow));
    }

    /// Takes a packet to its end whose flow L1 knows, and of which no keep-alive is due. For such a packet [`Pass::run`] would
    /// come to the same.
    #[inline(always)]
    fn go_straight(
        &mut self,
        i: usize,
        packet: &mut Packet,
        flags: u16,
        way: Way,
        counters: &FlowCounters,
        flow: FlowRef,
    ) {
        self.stats.l1_hits += 1;
        if let Way::Output(port) = way {
            counters.credit(packet.len as u64, flags, self.now);
            return self.egress.forward(i, packet, port);
        }
        self.trail.len = 0; // the plan has no further stage
        match self.slab.get(flow).map(|entry| (entry, &entry.disposition)) {
            Some((_, Disposition::Fast(plan))) if let Some(edits) = plan.rewrite() => {
                counters.credit(packet.len as u64, flags, self.now);
                match rewrite(edits, plan, packet) {
                    Ok(()) => self.egress.forward(i, packet, edits.to),
                    Err(reason) => self.egress.drop(i, packet, reason),
                }
            }
            Some((entry, Disposition::Fast(plan))) => self.commit(i, packet, flags, entry, plan),
            // Unreachable: only such flows go a straight way.
            _ => self.egress.drop(i, packet, DropReason::FlowDrop),
        }
    }

    /// Takes a packet whose first flows are known to its end. `again` tells whether a later packet of the burst begins
    /// with the same flow.
    #[inline(never)] // the rarer way; the frequent one is short without it
    #[allow(clippy::too_many_arguments)] // one call, of what the burst knows about the packet
    fn run(
        &mut self,
        i: usize,
        packet: &mut Packet,
        key: &Key,
        flows: &[FlowRef],
        l1_key: Option<&L1Key>,
        from_l1: bool,
        again: impl Fn() -> bool,
    ) {
        let mut learned = !from_l1;
        let mut extent = chain::extent(flows, self.slab);
        self.trail.start(flows);
        // On its way to a stage that punts the packet may still be dropped, so that is tried out too.
        if !matches!(extent, Extent::Whole) && extent != Extent::Punt(self.trail.flows[0]) {
            extent = match self.rehearse(packet, key) {
                Ok(()) => Extent::Whole,
                Err(Upcall::Punt(flow)) => Extent::Punt(flow),
                Err(Upcall::Miss | Upcall::KeepAlive(_)) => return self.miss(i, packet, l1_key),
                Err(Upcall::Unparsable) => {
                    self.stats.unparsable += 1;
                    return self.egress.upcall(i, packet, Upcall::Unparsable);
                }
            };
            // A stage that had no flow yet when the entry was made may be known now.
            learned |= self.trail.len > flows.len() && flows.len() < crate::l1::CHAIN;
        }
        if learned && let Some(l1_key) = l1_key {
            let chain = chain::fuse(self.trail.flows(), self.slab, key, self.port.union());
            if !from_l1 || chain.flows() != flows {
                self.l1.store(l1_key, &chain);
            }
        }
        if let Extent::Punt(flow) = extent {
            return self.punt(i, packet, key, flow);
        }
        let due =
            self.trail.flows().iter().find_map(|&flow| self.slab.get(flow).filter(|e| e.counters.is_due()));
        if let Some(entry) = due
            && !again()
            && self.egress.has_room(packet)
        {
            // One packet shows the host the whole chain.
            for entry in self.trail.flows().iter().filter_map(|&flow| self.slab.get(flow)) {
                entry.counters.clear_due();
                entry.counters.credit(packet.len as u64, tcp_flags(key), self.now);
            }
            self.stats.keepalives += 1;
            return self.egress.upcall(i, packet, Upcall::KeepAlive(entry.flow));
        }
        match from_l1 {
            true => self.stats.l1_hits += 1,
            false => self.stats.l2_hits += 1,
        }
        let first = self.trail.flows().first().and_then(|&flow| self.slab.get(flow));
        match first.map(|entry| (entry, &entry.disposition)) {
            Some((entry, Disposition::Fast(plan))) => self.commit(i, packet, tcp_flags(key), entry, plan),
            // Unreachable: the trail was resolved, and punts were told apart before.
            _ => self.egress.drop(i, packet, DropReason::FlowDrop),
        }
    }

    /// Runs the trail's first flow dry and adds the flows of the further stages to the trail.
    fn rehearse(&mut self, packet: &Packet, key: &Key) -> Result<(), Upcall> {
        let first = self.trail.flows().first().and_then(|&flow| self.slab.get(flow)).ok_or(Upcall::Miss)?;
        let Disposition::Fast(plan) = &first.disposition else { return Err(Upcall::Punt(first.flow)) };
        self.spare.copy_from(packet);
        *self.stage_key = *key;
        let mut dice = *self.dice; // the same dice fall again when it is for good
        let mut env = Rehearsal {
            slab: self.slab,
            hasher: self.hasher,
            masked: &mut self.port.masked,
            dice: &mut dice,
            key: self.stage_key,
            trail: self.trail,
            stage: 0,
            why: Upcall::Punt(first.flow),
        };
        match execute(plan, self.spare, self.scratch, &mut env) {
            Verdict::Unresolved => Err(env.why),
            Verdict::Done | Verdict::Dropped(_) => Ok(()),
        }
    }

    /// Executes a packet by the plan of its first flow; the flows of further stages are in the trail.
    #[inline(always)]
    fn commit(&mut self, i: usize, packet: &mut Packet, flags: u16, first: &FlowEntry, plan: &'p Plan) {
        first.counters.credit(packet.len as u64, flags, self.now);
        let mut env = Performance {
            slab: self.slab,
            trail: self.trail,
            dice: self.dice,
            egress: self.egress,
            i,
            stage: 0,
            flags,
            now: self.now,
            sent: false,
        };
        let verdict = execute(plan, packet, self.scratch, &mut env);
        let sent = env.sent;
        match verdict {
            Verdict::Dropped(reason) => self.egress.drop(i, packet, reason),
            // The rehearsal took another way: impossible, but then the packet is counted all the same.
            Verdict::Unresolved if !sent => self.egress.drop(i, packet, DropReason::TooDeep),
            Verdict::Done | Verdict::Unresolved => {}
        }
    }
}

#[inline(always)]
fn tcp_flags(key: &Key) -> u16 {
    key.get(Field::TcpFlags) as u16
}

/// A dry run: outputs vanish; further stages are taken from the trail as far as it is known, then looked up.
struct Rehearsal<'r, 'p> {
    slab: &'p Slab,
    hasher: &'r Hasher,
    masked: &'r mut Masked,
    dice: &'r mut Dice,
    key: &'r mut Key,
    trail: &'r mut Trail,
    stage: usize,
    /// Why it ended unresolved: at first, that the flow punts this packet.
    why: Upcall,
}

impl<'p> Env<'p> for Rehearsal<'_, 'p> {
    fn output(&mut self, _: &mut Packet, _: PortId, _: u32, _: bool) {}

    fn recirculate(&mut self, packet: &mut Packet, metadata: &Metadata) -> Option<&'p Plan> {
        self.stage += 1;
        let flow = match self.trail.flows().get(self.stage) {
            Some(&flow) => flow,
            None => {
                // What an edited packet needs from behind its head cannot be had any more.
                if extract_recirculated(packet, self.key, metadata.recirc_id) != Extracted::Done
                    || !is_settled(packet, self.key)
                {
                    self.why = Upcall::Unparsable;
                    return None;
                }
                metadata.write_to(self.key);
                let Some(flow) = self.masked.lookup(self.hasher, self.slab, self.key) else {
                    self.why = Upcall::Miss;
                    return None;
                };
                if !self.trail.push(flow, packet.layout) {
                    self.why = Upcall::Unparsable;
                    return None;
                }
                flow
            }
        };
        // If this plan gives up in the middle, it is its flow that punts.
        self.why = Upcall::Punt(flow);
        match &self.slab.get(flow)?.disposition {
            Disposition::Fast(plan) => Some(plan),
            Disposition::Punt(_) => None,
        }
    }

    fn random(&mut self) -> u32 {
        self.dice.next()
    }
}

/// The run for good, on the flows of a resolved trail.
struct Performance<'r, 'p, E> {
    slab: &'p Slab,
    trail: &'r Trail,
    dice: &'r mut Dice,
    egress: &'r mut E,
    i: usize,
    stage: usize,
    flags: u16,
    now: u64,
    sent: bool,
}

impl<'p, E: Egress> Env<'p> for Performance<'_, 'p, E> {
    #[inline]
    fn output(&mut self, packet: &mut Packet, port: PortId, max_len: u32, last: bool) {
        self.sent = true;
        self.egress.output(self.i, packet, port, max_len, last);
    }

    fn recirculate(&mut self, packet: &mut Packet, _: &Metadata) -> Option<&'p Plan> {
        self.stage += 1;
        let entry = self.slab.get(*self.trail.flows().get(self.stage)?)?;
        if self.stage >= self.trail.known {
            packet.layout = self.trail.layouts[self.stage];
        }
        entry.counters.credit(packet.len as u64, self.flags, self.now);
        match &entry.disposition {
            Disposition::Fast(plan) => Some(plan),
            Disposition::Punt(_) => None,
        }
    }

    #[inline]
    fn random(&mut self) -> u32 {
        self.dice.next()
    }
}

#[cfg(test)]
mod tests;
pub mod trace;
