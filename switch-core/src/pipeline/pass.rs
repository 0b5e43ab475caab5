//! The execution of a burst's packets, one after the other.

use super::popped::{LOOKOUT, Popped};
use super::{Egress, Upcall, tcp_flags};
use crate::chain::{self, Extent};
use crate::compile::Plan;
use crate::drop::DropReason;
use crate::exec::{Env, Metadata, Scratch, Verdict, execute, rewrite, rewrite_by_ops};
use crate::flow::FlowRef;
use crate::hash::Hasher;
use crate::key::Key;
use crate::l1::{Chain, L1, L1Key};
use crate::l2::Masked;
use crate::packet::{Layout, Packet, PortId};
use crate::parse::{Extracted, extract_recirculated, is_settled};
use crate::slab::{Disposition, Slab, Slot};
use crate::tables::{PathStats, PortTable};
use crate::tunnel::{Outer, recognize};

/// The dice of `sample`.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Dice(u64);

impl Dice {
    /// Dice that fall as `seed` says.
    pub fn new(seed: u64) -> Dice {
        Dice(seed)
    }

    /// The next 32 bits: the upper ones of a linear congruential generator (Knuth's MMIX), of which a flow that samples, or an
    /// identification, needs no better.
    #[inline(always)]
    pub fn next(&mut self) -> u32 {
        self.0 = self.0.wrapping_mul(0x5851_f42d_4c95_7f2d).wrapping_add(0x1405_7b7e_f767_814f);
        (self.0 >> 32) as u32
    }
}

/// Stages of one packet's way, over all its copies.
const MAX_STAGES: usize = 64;

/// The flows that a packet met, stage by stage.
pub struct Trail {
    flows: [FlowRef; MAX_STAGES],
    /// The layout that the parser found at a stage. Not of the first `known` stages, which were not parsed again.
    layouts: [Layout; MAX_STAGES],
    len: usize,
    known: usize,
}

impl Default for Trail {
    fn default() -> Trail {
        let (flows, layouts) = ([FlowRef::default(); MAX_STAGES], [Layout::default(); MAX_STAGES]);
        Trail { flows, layouts, len: 0, known: 0 }
    }
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

/// What the execution of a burst's packets shares.
pub struct Pass<'r, 'p, E> {
    pub slab: &'p Slab,
    pub hasher: &'r Hasher,
    pub port: &'r mut PortTable,
    pub l1: &'r mut L1,
    pub dice: &'r mut Dice,
    pub scratch: &'r mut Scratch,
    /// The copy that is run dry.
    pub spare: &'r mut Packet,
    /// The key of a later stage.
    pub stage_key: &'r mut Key,
    pub trail: &'r mut Trail,
    /// Where packets go that are decapsulated; none are that are inside a tunnel.
    pub popped: Option<&'r mut Popped>,
    pub egress: &'r mut E,
    /// In ticks.
    pub now: u64,
    pub stats: PathStats,
}

impl<'p, E: Egress> Pass<'_, 'p, E> {
    /// No flow at some stage: to the host, unless enough of its kind went there just now.
    pub fn miss(&mut self, i: usize, packet: &mut Packet, l1_key: Option<&L1Key>) {
        if l1_key.is_none_or(|key| self.l1.may_miss(key, self.now)) {
            self.stats.misses += 1;
            self.egress.upcall(i, packet, Upcall::Miss);
        } else {
            self.stats.pending += 1;
            self.egress.drop(i, packet, DropReason::MissPending);
        }
    }

    fn punt(&mut self, i: usize, packet: &mut Packet, key: &Key, flow: FlowRef) {
        self.stats.punts += 1;
        if let Some(slot) = self.slab.slot(flow) {
            slot.credit(packet.len as u64, tcp_flags(key), self.now);
            slot.credit_punt();
        }
        self.egress.upcall(i, packet, Upcall::Punt(flow));
    }

    /// Takes a packet to its end of which L1 knows the only flow, or L2 the first, unless that needs more of a look, or a keep-alive
    /// of it is due. For such a packet [`Pass::run`] would come to the same.
    #[inline(always)]
    pub fn go_straight<const FROM_L1: bool>(
        &mut self,
        i: usize,
        packet: &mut Packet,
        flags: u16,
        flow: FlowRef,
        slot: &Slot,
    ) -> bool {
        let way = slot.way();
        if slot.is_due() || way.is_long() {
            return false;
        }
        if !way.is_short() {
            if way.is_tunnel() && slot.is_exceeded_by(packet) {
                return false;
            }
            self.count::<FROM_L1>();
            match way.is_tunnel() {
                true => self.follow_tunnel(i, packet, flags, flow, slot),
                false => self.follow_plan(i, packet, flags, flow),
            }
            return true;
        }
        self.count::<FROM_L1>();
        slot.credit(packet.len as u64, flags, self.now);
        if way.is_rewrite()
            && let (patch, ttl) = slot.rewrite(way)
            && let Err(reason) = rewrite(&patch, ttl, packet)
        {
            self.egress.drop(i, packet, reason);
        } else {
            self.egress.forward(i, packet, slot.to());
        }
        true
    }

    #[inline(always)]
    fn count<const FROM_L1: bool>(&mut self) {
        match FROM_L1 {
            true => self.stats.l1_hits += 1,
            false => self.stats.l2_hits += 1,
        }
    }

    /// Takes a packet to its end whose plan has no further stage.
    #[inline(never)] // the rarer way
    fn follow_plan(&mut self, i: usize, packet: &mut Packet, flags: u16, flow: FlowRef) {
        let Some(Disposition::Fast(plan)) = self.slab.get(flow).map(|entry| &entry.disposition) else {
            // Unreachable: only such flows go a straight way.
            return self.egress.drop(i, packet, DropReason::FlowDrop);
        };
        self.trail.start(&[]);
        match plan.rewrite() {
            Some(edits) => {
                self.credit(flow, packet, flags);
                match rewrite_by_ops(plan, packet) {
                    Ok(()) => self.egress.forward(i, packet, edits.to),
                    Err(reason) => self.egress.drop(i, packet, reason),
                }
            }
            None => self.commit(i, packet, flags, flow, plan),
        }
    }

    /// [`Pass::follow_plan`] of one that lays a header around packets and sends them to one port: shorter than [`execute`], of which the
    /// outcome is the same.
    #[inline(never)] // so that other plans are executed as before
    fn follow_tunnel(&mut self, i: usize, packet: &mut Packet, flags: u16, flow: FlowRef, slot: &Slot) {
        if let Some(entry) = self.slab.at(flow.index)
            && let Disposition::Fast(plan) = &entry.disposition
            && let Some(outer) = plan.tunnel()
        {
            slot.credit(packet.len as u64, flags, self.now);
            return self.encapsulate(i, packet, outer, slot.to());
        }
        // Unreachable, as above.
        self.egress.drop(i, packet, DropReason::FlowDrop);
    }

    #[inline(always)]
    fn encapsulate(&mut self, i: usize, packet: &mut Packet, outer: &Outer, to: PortId) {
        let id = self.dice.next() as u16;
        match outer.push_plain(packet, id) {
            true => self.egress.forward(i, packet, to),
            false => self.encapsulate_any(i, packet, outer, to, id),
        }
    }

    #[inline(never)] // the rarer way
    fn encapsulate_any(&mut self, i: usize, packet: &mut Packet, outer: &Outer, to: PortId, id: u16) {
        match outer.push_any(packet, id) {
            // The sender's burst does not know that there is something left to do to this packet.
            Ok(()) if packet.offload.needs_csum => self.egress.output(i, packet, to, u32::MAX, true),
            Ok(()) => self.egress.forward(i, packet, to),
            Err(reason) => self.egress.drop(i, packet, reason),
        }
    }

    /// [`Pass::go_straight`] for a flow that L2 has found, which L1 then remembers.
    pub fn learn_straight(
        &mut self,
        i: usize,
        packet: &mut Packet,
        flags: u16,
        flow: FlowRef,
        l1_key: Option<&L1Key>,
    ) -> bool {
        let Some(slot) = self.slab.slot(flow) else { return false };
        let is_straight = self.go_straight::<false>(i, packet, flags, flow, slot);
        if is_straight && let Some(key) = l1_key {
            self.l1.store(key, &Chain::of(flow));
        }
        is_straight
    }

    /// Looks for a packet's first flow in L2.
    pub fn search(&mut self, key: &Key) -> Option<FlowRef> {
        self.port.masked.lookup(self.hasher, self.slab, key)
    }

    #[inline(always)]
    fn credit(&self, flow: FlowRef, packet: &Packet, flags: u16) {
        if let Some(slot) = self.slab.slot(flow) {
            slot.credit(packet.len as u64, flags, self.now);
        }
    }

    /// Takes a packet whose first flows are known to its end. `again` tells whether a later packet of the burst begins
    /// with the same flow.
    #[inline(never)] // the rarer way; the frequent one is short without it
    #[allow(clippy::too_many_arguments)] // one call, of what the burst knows about the packet
    pub fn run(
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
        if extent == Extent::Open
            && let &[flow] = flows
            && let Some(Disposition::Fast(plan)) = self.slab.get(flow).map(|entry| &entry.disposition)
            && plan.is_certain_for(packet)
        {
            extent = Extent::Whole;
        }
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
            if !self.pop(i, packet, key, flow, l1_key, again) {
                self.punt(i, packet, key, flow);
            }
            return;
        }
        if self.show(i, packet, key, again) {
            return;
        }
        match from_l1 {
            true => self.stats.l1_hits += 1,
            false => self.stats.l2_hits += 1,
        }
        let first = self.trail.flows().first().and_then(|&flow| self.slab.get(flow));
        match first.map(|entry| (entry, &entry.disposition)) {
            Some((entry, Disposition::Fast(plan))) => {
                self.commit(i, packet, tcp_flags(key), entry.flow, plan);
            }
            // Unreachable: the trail was resolved, and punts were told apart before.
            _ => self.egress.drop(i, packet, DropReason::FlowDrop),
        }
    }

    /// Shows the host that the trail's flows live, if it has asked for that and no later packet of the burst can do it.
    #[inline(always)]
    fn show(&mut self, i: usize, packet: &mut Packet, key: &Key, again: impl Fn() -> bool) -> bool {
        let is_due = |flow: &&FlowRef| self.slab.slot(**flow).is_some_and(Slot::is_due);
        if let Some(&flow) = self.trail.flows().iter().find(is_due)
            && !again()
            && self.egress.has_room(packet)
        {
            // One packet shows the host the whole chain.
            for slot in self.trail.flows().iter().filter_map(|&flow| self.slab.slot(flow)) {
                slot.clear_due();
                slot.credit(packet.len as u64, tcp_flags(key), self.now);
            }
            self.stats.keepalives += 1;
            self.egress.upcall(i, packet, Upcall::KeepAlive(flow));
            return true;
        }
        false
    }

    /// Takes a packet that has just come in out of its outer headers, if that is what its `flow` does and it is for one of the flow's
    /// endpoints; and remembers the flow.
    #[inline(never)] // the rarer way
    #[allow(clippy::too_many_arguments)] // one call, of what the burst knows about the packet
    fn pop(
        &mut self,
        i: usize,
        packet: &mut Packet,
        key: &Key,
        flow: FlowRef,
        l1_key: Option<&L1Key>,
        again: impl Fn() -> bool,
    ) -> bool {
        let is_first = self.trail.flows().first() == Some(&flow);
        if is_first
            && self.popped.is_some()
            && let Some(Disposition::Fast(plan)) = self.slab.get(flow).map(|entry| &entry.disposition)
            && let Some(endpoints) = plan.endpoints()
            && let Some(decap) = recognize(packet, endpoints, |end| self.egress.sum_tail(i, packet, end))
        {
            self.trail.start(&[flow]);
            if self.show(i, packet, key, again) {
                return true;
            }
            if let Some(popped) = self.popped.as_deref_mut() {
                if let Some(key) = l1_key {
                    popped.remember(key, self.l1.generation(self.port.slot()), flow);
                }
                popped.pop(i, packet, flow, &decap);
                self.port.lookout = LOOKOUT;
            }
            return true;
        }
        false
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
    fn commit(&mut self, i: usize, packet: &mut Packet, flags: u16, first: FlowRef, plan: &'p Plan) {
        self.credit(first, packet, flags);
        if let (Some(outer), Some(&to)) = (plan.tunnel(), plan.outputs().first()) {
            return self.encapsulate(i, packet, outer, to);
        }
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
        if let Some(slot) = self.slab.slot(entry.flow) {
            slot.credit(packet.len as u64, self.flags, self.now);
        }
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
