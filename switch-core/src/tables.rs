//! A worker's tables and the updates that change them.
//!
//! Control prepares everything that an update needs ([`crate::planner`]); a worker applies updates between bursts and
//! gives back what is no longer needed. It never allocates and never frees.

use crate::common::{Shape, WINDOW_WORDS, Window};
use crate::flow::{FlowRef, Source};
use crate::hash::{Hasher, Term};
use crate::key::{Field, Key, Mask, TUNNEL_WORDS, WORDS, is_tunnel_word};
use crate::l1::{CommonTerms, L1};
use crate::l2::{Array, Masked, Place, Subtable};
use crate::packet::PortId;
use crate::slab::{FlowEntry, Slab};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};

/// What became of a port's packets on one worker: each is counted in exactly one of these. A packet that is decapsulated is counted at
/// the tunnel's port.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
#[repr(C)]
pub struct PathStats {
    /// Executed here; the first stage's flow came from L1.
    pub l1_hits: u64,
    /// Executed here; the first stage's flow came from L2.
    pub l2_hits: u64,
    /// Sent to the host because a stage has no flow.
    pub misses: u64,
    /// Dropped because enough packets of the same key were sent to the host just now.
    pub pending: u64,
    /// Sent to the host because a stage's flow is a punt.
    pub punts: u64,
    /// Sent to the host so that it sees a flow alive.
    pub keepalives: u64,
    /// Sent to the host because the parser does not follow its headers.
    pub unparsable: u64,
    /// Dropped before lookup.
    pub refused: u64,
}

/// [`PathStats`] that one worker writes, once a burst, and anyone may read.
#[derive(Debug, Default)]
#[repr(align(64))]
pub struct PathCounters([AtomicU64; 8]);

impl PathCounters {
    pub(crate) fn add(&self, burst: &PathStats) {
        let PathStats { l1_hits, l2_hits, misses, pending, punts, keepalives, unparsable, refused } = *burst;
        let values = [l1_hits, l2_hits, misses, pending, punts, keepalives, unparsable, refused];
        for (counter, value) in self.0.iter().zip(values) {
            if value != 0 {
                counter.store(counter.load(Relaxed) + value, Relaxed);
            }
        }
    }

    /// The present values.
    pub fn read(&self) -> PathStats {
        let [l1_hits, l2_hits, misses, pending, punts, keepalives, unparsable, refused] =
            self.0.each_ref().map(|counter| counter.load(Relaxed));
        PathStats { l1_hits, l2_hits, misses, pending, punts, keepalives, unparsable, refused }
    }
}

/// The bits of a packet that are part of every L1 key, whatever the flows look at.
fn always() -> Mask {
    let mut mask = Mask::EMPTY;
    for field in [
        Field::Shape,
        Field::EthType,
        Field::VlanTpid,
        Field::VlanTci,
        Field::CvlanTpid,
        Field::CvlanTci,
        Field::IpProto,
        Field::IpFrag,
    ] {
        mask.set_exact(field);
    }
    mask
}

/// The tables of one ingress port.
#[derive(Debug)]
pub struct PortTable {
    /// The port.
    pub(crate) id: PortId,
    pub(crate) masked: Masked,
    /// Union of the masks of all its flows, of every stage.
    union: Mask,
    /// The words of an L1 key: the union and what is always in it, without ingress port and recirculation id, which
    /// are the same for all of a port's first lookups, and without those of tunnels.
    terms: [Term; WORDS],
    used_terms: usize,
    /// Those of tunnels, for which a number stands in keys.
    tunnel_terms: [Term; TUNNEL_WORDS],
    used_tunnel_terms: usize,
    /// The same for frames of the common shapes.
    common: [CommonTerms; Shape::COUNT],
    l1_quota: u32,
    /// Bursts for which packets of tunnels are looked out for; see [`crate::pipeline`].
    pub(crate) lookout: u16,
    pub(crate) counters: Arc<PathCounters>,
}

impl PortTable {
    /// Bytes that such a table has before it has flows.
    pub fn bytes(masks: usize) -> usize {
        size_of::<PortTable>() + Masked::bytes(masks)
    }

    /// A table without flows, for at most `masks` masks in each source and `l1_quota` entries in L1.
    pub fn new(id: PortId, masks: usize, l1_quota: u32, counters: Arc<PathCounters>) -> PortTable {
        let mut table = PortTable {
            id,
            masked: Masked::new(masks),
            union: Mask::EMPTY,
            terms: [Term { word: 0, bits: 0 }; WORDS],
            used_terms: 0,
            tunnel_terms: [Term { word: 0, bits: 0 }; TUNNEL_WORDS],
            used_tunnel_terms: 0,
            common: [CommonTerms::new(&[0; WINDOW_WORDS], false); Shape::COUNT],
            l1_quota,
            lookout: 0,
            counters,
        };
        table.set_union(Mask::EMPTY);
        table
    }

    fn set_union(&mut self, union: Mask) {
        self.union = union;
        let mut mask = always();
        mask |= &union;
        mask.0.words[0] = 0;
        (self.used_terms, self.used_tunnel_terms) = (0, 0);
        for (word, &bits) in mask.0.words.iter().enumerate().filter(|(_, bits)| **bits != 0) {
            let (terms, used) = match is_tunnel_word(word) {
                false => (&mut self.terms[..], &mut self.used_terms),
                true => (&mut self.tunnel_terms[..], &mut self.used_tunnel_terms),
            };
            terms[*used] = Term { word, bits };
            *used += 1;
        }
        let numbered = self.used_tunnel_terms != 0;
        for shape in Shape::all() {
            self.common[shape.index()] = CommonTerms::new(&Window::of(shape, &union).words(), numbered);
        }
    }

    /// The port's slot.
    #[inline(always)]
    pub(crate) fn slot(&self) -> u16 {
        self.id.slot as u16
    }

    /// What L1 keys of frames of a common shape are made of.
    #[inline(always)]
    pub fn common(&self, shape: Shape) -> &CommonTerms {
        &self.common[shape.index()]
    }

    /// The words of the port's L1 keys, without those of tunnels.
    #[inline]
    pub fn terms(&self) -> &[Term] {
        &self.terms[..self.used_terms]
    }

    /// The words of tunnels at which the port's flows look.
    #[inline]
    pub fn tunnel_terms(&self) -> &[Term] {
        &self.tunnel_terms[..self.used_tunnel_terms]
    }

    /// Whether some flow looks at the source port of outer headers.
    pub(crate) fn looks_at_tunnel_port(&self) -> bool {
        self.union.get(Field::TunTpSrc) != 0
    }

    /// Union of the masks of all its flows.
    pub fn union(&self) -> &Mask {
        &self.union
    }

    /// L2.
    pub fn masked(&self) -> &Masked {
        &self.masked
    }
}

/// A flow with the memory that it needs beside; and, on its way back, with what was left over.
#[derive(Debug)]
pub struct Room {
    /// The flow.
    pub flow: Option<(Arc<FlowEntry>, Place)>,
    /// The subtable of a mask that is new to the port and source.
    pub subtable: Option<Box<Subtable>>,
    /// A larger array for the flow's subtable; on its way back, an array that no flow is in any more.
    pub array: Option<Box<Array>>,
}

/// A change of a worker's tables. It says itself where its flow is to be or was, so that a worker can ask for all the lines that
/// it will need, each of which is far away, before it carries anything out: see [`Tables::ask`].
#[derive(Debug)]
pub enum Update {
    /// A port begins.
    AddPort(Box<PortTable>),
    /// A port ends; its flows have been removed.
    RemovePort(PortId),
    /// A flow begins.
    AddFlow(Arc<FlowEntry>, Place),
    /// A flow begins for which there is no room yet.
    AddFlowWith(Box<Room>),
    /// Other actions for a flow: the same index and key, a new generation.
    ReplaceFlow {
        /// The flow.
        entry: Arc<FlowEntry>,
        /// Its new name.
        flow: FlowRef,
        /// The generation that it had.
        before: u32,
    },
    /// A flow ends.
    RemoveFlow(Place),
    /// A port's union of masks, computed anew because it had grown much larger than its flows need.
    SetUnion(PortId, Box<Mask>),
}

// Two to a cache line, as they wait for a worker.
const _: () = assert!(size_of::<Update>() <= 32);

/// What an update, or upkeep, left over, to be freed by control. Nothing in it has been looked at.
#[derive(Debug, Default)]
pub enum Retired {
    /// Nothing.
    #[default]
    Nothing,
    /// A flow that ended or was replaced.
    Flow(Arc<FlowEntry>),
    /// The same, with its subtable, in which it was the last one.
    LastFlow(Arc<FlowEntry>, Box<Subtable>),
    /// A port that ended.
    Port(Box<PortTable>),
    /// The shell of a [`Room`], with what was left over or found no use.
    Room(Box<Room>),
    /// An array whose flows have moved.
    Array(Box<Array>),
    /// The mask of a [`Update::SetUnion`].
    Mask(Box<Mask>),
}

const _: () = assert!(size_of::<Retired>() <= 24);

impl Retired {
    /// Whether there is nothing to free.
    pub fn is_empty(&self) -> bool {
        matches!(self, Retired::Nothing)
    }
}

/// All tables of a worker but L1.
pub struct Tables {
    pub(crate) hasher: Hasher,
    pub(crate) slab: Slab,
    ports: Box<[Option<Box<PortTable>>]>,
    /// Where upkeep goes on.
    turn: usize,
}

impl Tables {
    /// Empty tables for ports in slots below `ports` and at most `flows` flows.
    pub fn new(ports: usize, flows: usize, hasher: Hasher) -> Tables {
        Tables {
            slab: Slab::new(flows, hasher.clone()),
            hasher,
            ports: (0..ports).map(|_| None).collect(),
            turn: 0,
        }
    }

    /// The flows.
    pub fn slab(&self) -> &Slab {
        &self.slab
    }

    /// The table of a port.
    pub fn port(&self, id: PortId) -> Option<&PortTable> {
        self.ports.get(id.slot as usize)?.as_deref().filter(|table| table.id == id)
    }

    /// The flows, and the table of a port to look them up in.
    #[inline]
    pub(crate) fn split(&mut self, id: PortId) -> (&Slab, &Hasher, Option<&mut PortTable>) {
        let table = self.ports.get_mut(id.slot as usize).and_then(Option::as_deref_mut);
        (&self.slab, &self.hasher, table.filter(|table| table.id == id))
    }

    fn slot_mut(&mut self, slot: u32) -> Option<&mut Option<Box<PortTable>>> {
        self.ports.get_mut(slot as usize)
    }

    /// Asks for the memory that [`Tables::apply`] will need, as far as the update itself says where it is.
    #[inline]
    pub fn ask(&self, update: &Update) {
        match update {
            Update::AddFlow(entry, place) => {
                entry.prefetch();
                self.ask_place(place);
            }
            Update::ReplaceFlow { entry, flow, .. } => {
                entry.prefetch();
                self.slab.prefetch_slot(flow.index);
            }
            Update::RemoveFlow(place) => self.ask_place(place),
            // Rare.
            Update::AddPort(_) | Update::RemovePort(_) | Update::AddFlowWith(_) | Update::SetUnion(..) => {}
        }
    }

    #[inline]
    fn ask_place(&self, place: &Place) {
        self.slab.prefetch_slot(place.flow.index);
        if let Some(Some(port)) = self.ports.get(usize::from(place.port)) {
            port.masked.prefetch(place);
        }
    }

    /// Asks for the rest, some time after [`Tables::ask`]: where that is depends on what was asked for there.
    #[inline]
    pub fn ask_more(&self, update: &Update) {
        if let Update::AddFlow(_, place) | Update::RemoveFlow(place) = update
            && let Some(Some(port)) = self.ports.get(usize::from(place.port))
        {
            port.masked.prefetch_record(place);
        }
    }

    /// Applies an update and gives back what is to be freed. What does not fit (control and worker disagree, which is a
    /// defect) changes nothing and comes back whole.
    pub fn apply(&mut self, update: Update, l1: &mut L1) -> Retired {
        match update {
            Update::AddFlow(entry, place) => {
                self.add_flow(entry, place, l1).map_or(Retired::Nothing, Retired::Flow)
            }
            Update::RemoveFlow(place) => match self.slab.take(place.flow) {
                Some(entry) => match self.masked(&place).and_then(|masked| masked.remove(&place)) {
                    Some(subtable) => Retired::LastFlow(entry, subtable),
                    None => Retired::Flow(entry),
                },
                None => Retired::Nothing,
            },
            Update::ReplaceFlow { entry, flow, before } => {
                // Flows of one name have one key, and are in one place.
                let is_there = self.slab.slot(FlowRef { generation: before, ..flow }).is_some();
                let left =
                    if is_there { self.slab.put(flow, entry).unwrap_or_else(Some) } else { Some(entry) };
                left.map_or(Retired::Nothing, Retired::Flow)
            }
            Update::AddFlowWith(mut room) => {
                self.make_room(&mut room, l1);
                let left = room.flow.take().and_then(|(entry, place)| {
                    let left = self.add_flow(entry, place, l1)?;
                    Some((left, place))
                });
                room.flow = left;
                Retired::Room(room)
            }
            Update::AddPort(table) => {
                let (slot, quota) = (table.id.slot, table.l1_quota);
                let left = match self.slot_mut(slot) {
                    Some(place) => place.replace(table),
                    None => Some(table),
                };
                l1.renew(slot);
                l1.set_quota(slot, quota);
                left.map_or(Retired::Nothing, Retired::Port)
            }
            Update::RemovePort(id) => {
                let place = self.slot_mut(id.slot);
                let gone = place.and_then(|place| place.take_if(|table| table.id == id));
                if gone.is_some() {
                    l1.renew(id.slot);
                }
                gone.map_or(Retired::Nothing, Retired::Port)
            }
            Update::SetUnion(id, mask) => {
                if let Some(Some(table)) = self.slot_mut(id.slot)
                    && table.id == id
                {
                    table.set_union(*mask);
                    l1.renew(id.slot);
                }
                Retired::Mask(mask)
            }
        }
    }

    fn masked(&mut self, place: &Place) -> Option<&mut Masked> {
        let port = self.ports.get_mut(usize::from(place.port)).and_then(Option::as_mut)?;
        Some(&mut port.masked)
    }

    /// Takes the memory that a flow brings along, and leaves what is not needed.
    fn make_room(&mut self, room: &mut Room, l1: &mut L1) {
        let Room { flow: Some((_, place)), subtable, array } = room else { return };
        let Some(Some(port)) = self.ports.get_mut(usize::from(place.port)) else { return };
        if let Some(table) = subtable.take() {
            // A wider union makes other keys. The union holds the masks of all subtables, so it has that of their flows.
            if !table.mask().is_subset(&port.union) {
                let mut union = port.union;
                union |= table.mask();
                port.set_union(union);
                l1.renew(place.port.into());
            }
            *subtable = port.masked.add_subtable(place.source, table);
        }
        if let Some(larger) = array.take() {
            *array = port.masked.grow(place.source, place.subtable, larger, &self.hasher);
        }
    }

    /// Adds a flow; gives back what was in its place, or the flow if it cannot be added.
    fn add_flow(&mut self, entry: Arc<FlowEntry>, place: Place, l1: &mut L1) -> Option<Arc<FlowEntry>> {
        let Tables { hasher, slab, ports, .. } = self;
        let Some(Some(port)) = ports.get_mut(usize::from(place.port)) else { return Some(entry) };
        let old = match slab.put(place.flow, entry) {
            Ok(old) => old,
            Err(entry) => return Some(entry),
        };
        let values = slab.at(place.flow.index).map(|entry| &entry.values);
        if !values.is_some_and(|values| port.masked.insert(&place, values, hasher)) {
            return slab.take(place.flow);
        }
        // A flow of a source that is searched earlier may stand before what L1 holds.
        if place.source != Source::Learned {
            l1.renew(place.port.into());
        }
        old
    }

    /// A bounded piece of upkeep, to be called between bursts: moves a few flows to a grown array, or brings subtables
    /// nearer to the order of their hits. Gives back an array to be freed.
    pub fn step(&mut self) -> Retired {
        let Tables { hasher, ports, turn, .. } = self;
        for _ in 0..ports.len().min(16) {
            *turn = if *turn + 1 < ports.len() { *turn + 1 } else { 0 };
            if let Some(port) = &mut ports[*turn] {
                return port.masked.step(hasher).map_or(Retired::Nothing, Retired::Array);
            }
        }
        Retired::Nothing
    }
}

impl Tables {
    /// The flow that a key of the port's packets matches; changes nothing.
    pub fn peek(&self, port: PortId, key: &Key) -> Option<FlowRef> {
        self.port(port)?.masked.peek(&self.hasher, &self.slab, key)
    }
}

#[cfg(test)]
mod tests;
