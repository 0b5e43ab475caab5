//! Control's twin of the workers' tables: names flows, refuses what may not be in a table, and prepares the updates with
//! all the memory that they need.

use crate::compile::{NoWays, Ways, compile_with};
use crate::flow::{FlowRef, FlowSpec, Match, Source};
use crate::hash::{Hasher, Term, terms};
use crate::key::{ETH_P_ARP, ETH_P_RARP, Field, Key, Mask, VLAN_PRESENT};
use crate::l1::MAX_PORTS;
use crate::l2::{Array, Place, Subtable};
use crate::packet::PortId;
use crate::slab::{Disposition, FlowCounters, FlowEntry, FlowStats, Slots, Values};
use crate::tables::{PathCounters, PortTable, Room, Update};
use std::collections::BTreeSet;
use std::sync::Arc;

/// Why a change was refused. Nothing was changed.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
pub enum PlanError {
    /// The port is not in the tables.
    #[error("no such port (slot {})", .0.slot)]
    NoPort(PortId),
    /// The slot has a port already, or is too high.
    #[error("port slot {} cannot be used", .0.slot)]
    Slot(PortId),
    /// No flow has that name now.
    #[error("no such flow")]
    NoFlow,
    /// A flow of the same source has the same match.
    #[error("the flow exists")]
    Exists(FlowRef),
    /// A flow of the same source matches some of the same packets; [`Planner::get`] tells about it.
    #[error("the flow overlaps another one")]
    Overlaps(FlowRef),
    /// A field is matched whose presence is not.
    #[error("a match on {0} needs one on {1}")]
    Prerequisite(&'static str, &'static str),
    /// A field that no flow may match.
    #[error("{0} cannot be matched")]
    Field(&'static str),
    /// The match is of another ingress port.
    #[error("in_port is not the port of the table")]
    InPort,
    /// The port has as many masks as it may have.
    #[error("the port has used up its {0} masks")]
    Masks(usize),
    /// The tables have as many flows as they may have.
    #[error("the tables have {0} flows, which is all that they may have")]
    Full(usize),
}

/// Sizes of the tables.
#[derive(Clone, Copy, Debug)]
pub struct PlannerConfig {
    /// Port slots.
    pub ports: usize,
    /// Most flows.
    pub flows: usize,
    /// Most masks of one port, over its sources.
    pub masks: usize,
    /// For the hash of this planner's own indices.
    pub seed: u64,
}

/// A flow, as control knows it.
#[derive(Debug)]
pub struct Flow {
    /// Its name.
    pub flow: FlowRef,
    /// The ingress port.
    pub port: PortId,
    /// Who gave it.
    pub source: Source,
    /// Match and actions.
    pub spec: FlowSpec,
    /// The plan, or why there is none.
    pub disposition: Disposition,
    /// One for each worker, and behind them that of [`Planner::count_beside`].
    pub counters: Vec<FlowCounters>,
}

impl Flow {
    /// The statistics of all workers together.
    pub fn stats(&self) -> FlowStats {
        self.counters.iter().map(|counters| counters.read()).fold(FlowStats::default(), |a, b| FlowStats {
            packets: a.packets + b.packets,
            bytes: a.bytes + b.bytes,
            tcp_flags: a.tcp_flags | b.tcp_flags,
            last_used: a.last_used.max(b.last_used),
            punted: a.punted + b.punted,
        })
    }

    /// Marks the flow due for a keep-alive on the worker that has seen most of its traffic.
    pub fn set_due(&self) {
        if let Some(counters) = self.counters.iter().max_by_key(|counters| counters.read().packets) {
            counters.set_due();
        }
    }
}

/// What [`Planner::add`] does when a flow of the same match is there.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum IfExists {
    /// [`PlanError::Exists`].
    Refuse,
    /// The flow takes the other's place; its statistics go on.
    Replace,
}

/// The flows of a port and source under one mask.
#[derive(Debug)]
struct MaskPlan {
    id: u32,
    mask: Arc<Mask>,
    /// The words that it looks at.
    terms: Box<[Term]>,
    count: usize,
    capacity: usize,
    /// The flows ordered by the hash of their key under a mask: first this very mask, then those that it has in common
    /// with others, each made when it is first needed.
    views: Vec<(Mask, BTreeSet<(u64, u32)>)>,
}

#[derive(Debug)]
struct PortPlan {
    id: PortId,
    sources: [Vec<MaskPlan>; Source::COUNT],
    flows: BTreeSet<u32>,
}

#[derive(Debug, Default)]
struct Slot {
    generation: u32,
    flow: Option<Box<Flow>>,
}

/// All flows, and what the workers hold.
pub struct Planner {
    config: PlannerConfig,
    /// Of each worker.
    workers: Vec<Arc<Slots>>,
    /// See [`Planner::count_beside`].
    beside: Option<Arc<Slots>>,
    hasher: Hasher,
    ports: Vec<Option<PortPlan>>,
    slots: Vec<Slot>,
    free: Vec<u32>,
    subtables: u32,
    ways: Arc<dyn Ways + Send + Sync>,
}

fn hash(hasher: &Hasher, key: &Key, mask: &Mask) -> u64 {
    hasher.words(&key.masked(mask).words, 0)
}

fn common(a: &Mask, b: &Mask) -> Mask {
    Mask(a.0.masked(b))
}

impl MaskPlan {
    /// Flows whose key agrees with `key` in the bits of `mask`, but for collisions of the hash.
    fn agreeing<'a>(
        &'a mut self,
        key: &Key,
        mask: &Mask,
        hasher: &Hasher,
        slots: &[Slot],
    ) -> impl Iterator<Item = u32> + use<'a> {
        let at = self.views.iter().position(|(of, _)| of == mask).unwrap_or_else(|| {
            let flows = self.views[0].1.iter().filter_map(|&(_, index)| {
                let flow = slots[index as usize].flow.as_ref()?;
                Some((hash(hasher, &flow.spec.matches.key, mask), index))
            });
            let view = (*mask, flows.collect());
            self.views.push(view);
            self.views.len() - 1
        });
        let hash = hash(hasher, key, mask);
        self.views[at].1.range((hash, 0)..=(hash, u32::MAX)).map(|&(_, index)| index)
    }

    /// The words of a key that the mask looks at.
    fn values(&self, key: &Key) -> Values {
        self.terms.iter().map(|term| term.of(key)).collect()
    }

    fn insert(&mut self, hasher: &Hasher, key: &Key, index: u32) {
        self.count += 1;
        for (mask, view) in &mut self.views {
            view.insert((hash(hasher, key, mask), index));
        }
    }

    fn remove(&mut self, hasher: &Hasher, key: &Key, index: u32) {
        self.count -= 1;
        for (mask, view) in &mut self.views {
            view.remove(&(hash(hasher, key, mask), index));
        }
    }
}

impl Planner {
    /// No ports and no flows, of workers with these slots.
    pub fn new(config: PlannerConfig, workers: Vec<Arc<Slots>>) -> Planner {
        Planner {
            workers,
            beside: None,
            hasher: Hasher::new(config.seed),
            ports: (0..config.ports).map(|_| None).collect(),
            slots: Vec::new(),
            free: Vec::new(),
            subtables: 0,
            ways: Arc::new(NoWays),
            config,
        }
    }

    /// Has flows counted by somebody beside the workers too, who begins and ends with each flow by
    /// [`Slots::begin`] and [`Slots::end`]. Only before there are flows: false if it is too late.
    pub fn count_beside(&mut self, slots: Arc<Slots>) -> bool {
        let may = self.is_empty();
        if may {
            self.beside = Some(slots);
        }
        may
    }

    /// Has flows compiled with these ways of tunnels from now on. When what `ways` says has changed, or is said for the first time,
    /// flows that are there are [`is_outdated`](Self::is_outdated) until they are replaced.
    pub fn set_ways(&mut self, ways: Arc<dyn Ways + Send + Sync>) {
        self.ways = ways;
    }

    /// Whether the flow would be compiled to something else now.
    pub fn is_outdated(&self, flow: FlowRef) -> bool {
        self.get(flow).is_some_and(|flow| flow.disposition != self.disposition(&flow.spec))
    }

    fn disposition(&self, spec: &FlowSpec) -> Disposition {
        match compile_with(spec, &*self.ways) {
            Ok(plan) => Disposition::Fast(Arc::new(plan)),
            Err(reason) => Disposition::Punt(Arc::new(reason)),
        }
    }

    /// Adds a port with room for `l1_quota` entries in each worker's L1. Gives an update for each worker, and its counters.
    pub fn add_port(
        &mut self,
        id: PortId,
        l1_quota: u32,
    ) -> Result<(Vec<Update>, Vec<Arc<PathCounters>>), PlanError> {
        let slot = self
            .ports
            .get_mut(id.slot as usize)
            .filter(|slot| slot.is_none() && (id.slot as usize) < MAX_PORTS);
        let slot = slot.ok_or(PlanError::Slot(id))?;
        *slot = Some(PortPlan { id, sources: Default::default(), flows: BTreeSet::new() });
        let counters: Vec<_> = (0..self.workers.len()).map(|_| Arc::<PathCounters>::default()).collect();
        let update = |counters: &Arc<PathCounters>| {
            Update::AddPort(Box::new(PortTable::new(id, self.config.masks, l1_quota, counters.clone())))
        };
        Ok((counters.iter().map(update).collect(), counters))
    }

    /// Removes a port and its flows. Gives the updates in order, each for every worker.
    pub fn remove_port(&mut self, id: PortId) -> Result<Vec<Vec<Update>>, PlanError> {
        let flows = self.port(id)?.flows.clone();
        let mut updates = Vec::with_capacity(flows.len() + 1);
        for index in flows {
            let generation = self.slots[index as usize].generation;
            updates.push(self.remove(FlowRef { index, generation })?.1);
        }
        self.ports[id.slot as usize] = None;
        updates.push((0..self.workers.len()).map(|_| Update::RemovePort(id)).collect());
        Ok(updates)
    }

    fn port(&self, id: PortId) -> Result<&PortPlan, PlanError> {
        let port = self.ports.get(id.slot as usize).and_then(Option::as_ref);
        port.filter(|port| port.id == id).ok_or(PlanError::NoPort(id))
    }

    /// The flow of that name.
    pub fn get(&self, flow: FlowRef) -> Option<&Flow> {
        let slot = self.slots.get(flow.index as usize).filter(|slot| slot.generation == flow.generation)?;
        slot.flow.as_deref()
    }

    /// Bytes that a port's table has in each worker, and those that its flows have beside, of which all workers share one; without
    /// the lines of flows that are counted by slot.
    pub fn bytes(&self, id: PortId) -> (usize, usize) {
        let Ok(port) = self.port(id) else { return (0, 0) };
        let plans = port.sources.iter().flatten();
        let arrays: usize =
            plans.map(|plan| size_of::<Subtable>() + Array::bytes(plan.capacity, plan.terms.len())).sum();
        (PortTable::bytes(self.config.masks) + arrays, port.flows.len() * size_of::<FlowEntry>())
    }

    /// All flows, by index.
    pub fn flows(&self) -> impl Iterator<Item = &Flow> {
        self.slots.iter().filter_map(|slot| slot.flow.as_deref())
    }

    /// Number of flows.
    pub fn len(&self) -> usize {
        self.slots.len() - self.free.len()
    }

    /// Whether there is no flow.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// The flow of a port and source with exactly that match.
    pub fn find(&mut self, port: PortId, source: Source, matches: &Match) -> Option<FlowRef> {
        let Planner { hasher, ports, slots, .. } = self;
        let port = ports.get_mut(port.slot as usize)?.as_mut().filter(|p| p.id == port)?;
        let plan = port.sources[source as usize].iter_mut().find(|plan| *plan.mask == matches.mask)?;
        let key = matches.key.masked(&matches.mask);
        let same = |index: &u32| {
            slots[*index as usize].flow.as_ref().is_some_and(|flow| flow.spec.matches.key == key)
        };
        let index = plan.agreeing(&key, &matches.mask, hasher, slots).find(same)?;
        Some(FlowRef { index, generation: slots[index as usize].generation })
    }

    /// Adds a flow to a port's table. Gives its name and an update for each worker.
    pub fn add(
        &mut self,
        port: PortId,
        source: Source,
        mut spec: FlowSpec,
        if_exists: IfExists,
    ) -> Result<(FlowRef, Vec<Update>), PlanError> {
        self.port(port)?;
        spec.matches.key = spec.matches.key.masked(&spec.matches.mask);
        check_prerequisites(port, &spec.matches)?;
        if let Some(flow) = self.find(port, source, &spec.matches) {
            return match if_exists {
                IfExists::Refuse => Err(PlanError::Exists(flow)),
                IfExists::Replace => self.replace(flow, spec),
            };
        }
        let Planner { config, hasher, ports, slots, .. } = &mut *self;
        let Some(plan) = &mut ports[port.slot as usize] else { return Err(PlanError::NoPort(port)) };
        let Match { key, mask, .. } = spec.matches;
        for other in &mut plan.sources[source as usize] {
            if *other.mask == mask {
                continue;
            }
            let common = common(&other.mask, &mask);
            for index in other.agreeing(&key, &common, hasher, slots) {
                let slot = &slots[index as usize];
                let Some(flow) = &slot.flow else { continue };
                if key.overlaps(&mask, &flow.spec.matches.key, &flow.spec.matches.mask) {
                    return Err(PlanError::Overlaps(flow.flow));
                }
            }
        }
        let is_new = plan.sources[source as usize].iter().all(|plan| *plan.mask != mask);
        if is_new && plan.sources.iter().map(Vec::len).sum::<usize>() >= config.masks {
            return Err(PlanError::Masks(config.masks));
        }
        if self.free.is_empty() && self.slots.len() >= self.config.flows {
            return Err(PlanError::Full(self.config.flows));
        }
        Ok(self.commit(port, source, spec, is_new))
    }

    /// Puts in a flow that has passed every check.
    fn commit(
        &mut self,
        port: PortId,
        source: Source,
        spec: FlowSpec,
        is_new: bool,
    ) -> (FlowRef, Vec<Update>) {
        let Match { key, mask, .. } = spec.matches;
        let index = self.free.pop().unwrap_or_else(|| {
            self.slots.push(Slot::default());
            self.slots.len() as u32 - 1
        });
        let generation = next_generation(self.slots[index as usize].generation);
        let flow = FlowRef { index, generation };

        let plan = self.ports[port.slot as usize].get_or_insert_with(|| PortPlan {
            id: port,
            sources: Default::default(),
            flows: BTreeSet::new(),
        });
        plan.flows.insert(index);
        let list = &mut plan.sources[source as usize];
        if is_new {
            let terms = terms(&mask.0);
            let capacity = Array::capacity_for(1);
            self.subtables = self.subtables.wrapping_add(1);
            let views = vec![(mask, BTreeSet::new())];
            list.push(MaskPlan {
                id: self.subtables,
                mask: Arc::new(mask),
                terms,
                count: 0,
                capacity,
                views,
            });
        }
        let mut grown = None;
        let (mut id, mut shared, mut values) = (0, None, Values::default());
        if let Some(plan) = list.iter_mut().find(|plan| *plan.mask == mask) {
            plan.insert(&self.hasher, &key, index);
            if plan.count > plan.capacity {
                plan.capacity = Array::capacity_for(plan.capacity * 2);
                grown = Some((plan.capacity, plan.terms.len()));
            }
            (id, shared, values) = (plan.id, Some(plan.mask.clone()), plan.values(&key));
        }

        let counters: Vec<_> =
            self.workers.iter().chain(&self.beside).map(|slots| FlowCounters::new(slots, flow)).collect();
        let disposition = self.disposition(&spec);
        let entry = Arc::new(FlowEntry::new(flow, values, disposition.clone()));
        let updates = self.places(flow, port, source, id, &entry.values).map(|place| {
            let entry = entry.clone();
            if !is_new && grown.is_none() {
                return Update::AddFlow(entry, place);
            }
            let mask = shared.iter().filter(|_| is_new);
            Update::AddFlowWith(Box::new(Room {
                flow: Some((entry, place)),
                subtable: mask.map(|mask| Box::new(Subtable::new(id, mask.clone(), 1))).next(),
                array: grown.map(|(n, words)| Box::new(Array::with_capacity(n, words))),
            }))
        });
        let updates = updates.collect();
        let record = Flow { flow, port, source, spec, disposition, counters };
        self.slots[index as usize] = Slot { generation, flow: Some(Box::new(record)) };
        (flow, updates)
    }

    /// Where a flow is in the tables of each worker.
    fn places(
        &self,
        flow: FlowRef,
        port: PortId,
        source: Source,
        subtable: u32,
        values: &[u64],
    ) -> impl Iterator<Item = Place> {
        // Slots of ports are below `MAX_PORTS`.
        let port = port.slot as u16;
        self.workers.iter().map(move |slots| Place { hash: slots.hash(values), flow, subtable, port, source })
    }

    /// Gives a flow other actions (its match stays) under a new generation; its statistics go on.
    pub fn replace(&mut self, flow: FlowRef, spec: FlowSpec) -> Result<(FlowRef, Vec<Update>), PlanError> {
        // Its match stays, and edits are compiled by that.
        let matches = self.get(flow).ok_or(PlanError::NoFlow)?.spec.matches.clone();
        let spec = FlowSpec { matches, ..spec };
        let disposition = self.disposition(&spec);
        let slot = self.slots.get_mut(flow.index as usize).filter(|slot| slot.generation == flow.generation);
        let slot = slot.ok_or(PlanError::NoFlow)?;
        let record = slot.flow.as_deref_mut().ok_or(PlanError::NoFlow)?;
        let port = self.ports.get(record.port.slot as usize).and_then(Option::as_ref);
        let plans = port.map_or(&[][..], |port| &port.sources[record.source as usize]);
        let plan =
            plans.iter().find(|plan| *plan.mask == record.spec.matches.mask).ok_or(PlanError::NoFlow)?;
        record.spec = spec;
        let before = std::mem::replace(&mut slot.generation, next_generation(flow.generation));
        let flow = FlowRef { index: flow.index, generation: slot.generation };
        record.flow = flow;
        record.disposition = disposition;
        let values = plan.values(&record.spec.matches.key);
        record.counters.iter_mut().for_each(|counters| counters.renew(flow.generation));
        let entry = Arc::new(FlowEntry::new(flow, values, record.disposition.clone()));
        let update = || Update::ReplaceFlow { entry: entry.clone(), flow, before };
        Ok((flow, self.workers.iter().map(|_| update()).collect()))
    }

    /// Removes a flow. Gives it, whose statistics can be read until the updates are sent, and an update for each worker.
    pub fn remove(&mut self, flow: FlowRef) -> Result<(Flow, Vec<Update>), PlanError> {
        let slot = self.slots.get_mut(flow.index as usize).filter(|slot| slot.generation == flow.generation);
        let record = slot.and_then(|slot| slot.flow.take()).ok_or(PlanError::NoFlow)?;
        self.free.push(flow.index);
        let (mut subtable, mut values) = (0, Values::default());
        if let Some(Some(port)) = self.ports.get_mut(record.port.slot as usize) {
            port.flows.remove(&flow.index);
            let list = &mut port.sources[record.source as usize];
            if let Some(at) = list.iter().position(|plan| *plan.mask == record.spec.matches.mask) {
                (subtable, values) = (list[at].id, list[at].values(&record.spec.matches.key));
                list[at].remove(&self.hasher, &record.spec.matches.key, flow.index);
                if list[at].count == 0 {
                    list.remove(at);
                    let masks: Vec<_> = list.iter().map(|plan| plan.mask.clone()).collect();
                    for plan in list {
                        // Views that only the mask that is gone had in common.
                        let own = plan.mask.clone();
                        plan.views.retain(|(view, _)| masks.iter().any(|mask| common(mask, &own) == *view));
                    }
                }
            }
        }
        let places = self.places(flow, record.port, record.source, subtable, &values);
        let updates = places.map(Update::RemoveFlow).collect();
        Ok((*record, updates))
    }

    /// Makes the L1 keys of a port as short as its present flows allow; worth it after many masks are gone.
    pub fn shrink_union(&self, port: PortId) -> Result<Vec<Update>, PlanError> {
        let mut union = Mask::EMPTY;
        for plan in self.port(port)?.sources.iter().flatten() {
            union |= &*plan.mask;
        }
        Ok((0..self.workers.len()).map(|_| Update::SetUnion(port, Box::new(union))).collect())
    }

    /// Whether a port and source have flows under that very mask.
    pub fn has_mask(&self, port: PortId, source: Source, mask: &Mask) -> bool {
        self.port(port).is_ok_and(|port| port.sources[source as usize].iter().any(|plan| *plan.mask == *mask))
    }

    /// Number of masks of a port, over its sources.
    pub fn masks(&self, port: PortId) -> usize {
        self.port(port).map_or(0, |port| port.sources.iter().map(Vec::len).sum())
    }
}

/// Generation 0 is never a live flow.
fn next_generation(generation: u32) -> u32 {
    generation.wrapping_add(1).max(1)
}

/// A field that a packet lacks is zero in its key; a mask that looks at a field must also tell whether it is there.
fn check_prerequisites(port: PortId, matches: &Match) -> Result<(), PlanError> {
    let Match { key, mask, .. } = matches;
    if !mask.is_exact(Field::InPort) || key.get(Field::InPort) != port.slot as u128 {
        return Err(PlanError::InPort);
    }
    let need = |field: Field, needs: Field| {
        if mask.is_exact(needs) { Ok(()) } else { Err(PlanError::Prerequisite(field.name(), needs.name())) }
    };
    need(Field::InPort, Field::RecircId)?;
    for &field in Field::ALL.iter().filter(|&&field| mask.has(field)) {
        match field {
            Field::Shape => return Err(PlanError::Field(field.name())),
            Field::VlanTci if mask.get(field) as u16 & VLAN_PRESENT == 0 => {
                return Err(PlanError::Prerequisite(field.name(), "the tag's presence"));
            }
            Field::CvlanTci if mask.get(field) as u16 & VLAN_PRESENT == 0 => {
                return Err(PlanError::Prerequisite(field.name(), "the tag's presence"));
            }
            Field::IpProto | Field::IpTos | Field::IpTtl | Field::IpFrag | Field::Ipv6Label => {
                need(field, Field::EthType)?;
            }
            Field::Ipv4Src | Field::Ipv4Dst | Field::Ipv6Src | Field::Ipv6Dst => need(field, Field::EthType)?,
            Field::Mpls0 | Field::Mpls1 | Field::Mpls2 | Field::MplsCount => need(field, Field::EthType)?,
            Field::TpSrc | Field::TpDst | Field::TcpFlags | Field::NdTarget => {
                need(field, Field::EthType)?;
                need(field, Field::IpProto)?;
            }
            Field::ArpSha | Field::ArpTha => {
                need(field, Field::EthType)?;
                if ![ETH_P_ARP, ETH_P_RARP].contains(&key.eth_type()) {
                    need(field, Field::IpProto)?; // neighbour discovery
                }
            }
            _ => {}
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests;
