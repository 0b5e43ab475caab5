//! A worker's tables and the updates that change them.
//!
//! Control prepares everything that an update needs ([`crate::planner`]); a worker applies updates between bursts and
//! gives back what is no longer needed. It never allocates and never frees.

use crate::common::{Shape, WINDOW_WORDS, Window};
use crate::flow::{FlowRef, Source};
use crate::hash::{Hasher, Term};
use crate::key::{Field, Key, Mask, WORDS};
use crate::l1::{CommonTerms, L1};
use crate::l2::{Array, Masked, Subtable};
use crate::packet::PortId;
use crate::slab::{FlowEntry, Slab};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};

/// What became of a port's packets on one worker: each is counted in exactly one of these.
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
    /// are the same for all of a port's first lookups.
    terms: [Term; WORDS],
    used_terms: usize,
    /// The same for frames of the common shapes.
    common: [CommonTerms; Shape::COUNT],
    l1_quota: u32,
    pub(crate) counters: Arc<PathCounters>,
}

impl PortTable {
    /// A table without flows, for at most `masks` masks in each source and `l1_quota` entries in L1.
    pub fn new(id: PortId, masks: usize, l1_quota: u32, counters: Arc<PathCounters>) -> PortTable {
        let mut table = PortTable {
            id,
            masked: Masked::new(masks),
            union: Mask::EMPTY,
            terms: [Term { word: 0, bits: 0 }; WORDS],
            used_terms: 0,
            common: [CommonTerms::new(&[0; WINDOW_WORDS]); Shape::COUNT],
            l1_quota,
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
        self.used_terms = 0;
        for (word, &bits) in mask.0.words.iter().enumerate().filter(|(_, bits)| **bits != 0) {
            self.terms[self.used_terms] = Term { word, bits };
            self.used_terms += 1;
        }
        for shape in Shape::all() {
            self.common[shape.index()] = CommonTerms::new(&Window::of(shape, &union).words());
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

    /// The words of the port's L1 keys.
    #[inline]
    pub fn terms(&self) -> &[Term] {
        &self.terms[..self.used_terms]
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

/// Memory that an update brings along for what it adds.
#[derive(Debug, Default)]
pub struct Room {
    /// The subtable of a mask that is new to the port and source.
    pub subtable: Option<Box<Subtable>>,
    /// A larger array for the flow's subtable.
    pub array: Option<Array>,
}

/// A change of a worker's tables.
#[derive(Debug)]
pub enum Update {
    /// A port begins.
    AddPort(Box<PortTable>),
    /// A port ends; its flows have been removed.
    RemovePort(PortId),
    /// A flow begins.
    AddFlow {
        /// The flow.
        entry: Box<FlowEntry>,
        /// What it needs beside.
        room: Option<Box<Room>>,
    },
    /// Other actions for a flow: the same index and key, a new generation.
    ReplaceFlow(Box<FlowEntry>),
    /// A flow ends.
    RemoveFlow(FlowRef),
    /// A port's union of masks, computed anew because it had grown much larger than its flows need.
    SetUnion(PortId, Box<Mask>),
}

/// What an update, or upkeep, left over, to be freed by control.
#[derive(Debug, Default)]
pub struct Retired {
    /// A flow that ended or was replaced.
    pub entry: Option<Box<FlowEntry>>,
    /// A port that ended.
    pub port: Option<Box<PortTable>>,
    /// A subtable that became empty.
    pub subtable: Option<Box<Subtable>>,
    /// An array whose flows have moved.
    pub array: Option<Array>,
    /// The shell of a [`Room`], with what found no use.
    pub room: Option<Box<Room>>,
    /// The mask of a [`Update::SetUnion`].
    pub mask: Option<Box<Mask>>,
}

impl Retired {
    /// Whether there is nothing to free.
    pub fn is_empty(&self) -> bool {
        let Retired { entry, port, subtable, array, room, mask } = self;
        entry.is_none()
            && port.is_none()
            && subtable.is_none()
            && array.is_none()
            && room.is_none()
            && mask.is_none()
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
        Tables { hasher, slab: Slab::new(flows), ports: (0..ports).map(|_| None).collect(), turn: 0 }
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

    /// Applies an update and gives back what is to be freed. What does not fit (control and worker disagree, which is a
    /// defect) changes nothing and comes back whole.
    pub fn apply(&mut self, update: Update, l1: &mut L1) -> Retired {
        let mut retired = Retired::default();
        match update {
            Update::AddPort(table) => {
                let (slot, quota) = (table.id.slot, table.l1_quota);
                match self.slot_mut(slot) {
                    Some(place) => retired.port = place.replace(table),
                    None => retired.port = Some(table),
                }
                l1.renew(slot);
                l1.set_quota(slot, quota);
            }
            Update::RemovePort(id) => {
                if let Some(place) = self.slot_mut(id.slot).filter(|p| p.as_ref().is_some_and(|t| t.id == id))
                {
                    retired.port = place.take();
                    l1.renew(id.slot);
                }
            }
            Update::AddFlow { entry, room } => self.add_flow(entry, room, l1, &mut retired),
            Update::ReplaceFlow(entry) => {
                retired.entry = match self.slab.at(entry.flow.index) {
                    Some(old) if old.values == entry.values && old.subtable == entry.subtable => {
                        self.slab.put(entry).unwrap_or_else(Some)
                    }
                    _ => Some(entry),
                };
            }
            Update::RemoveFlow(flow) => {
                if let Some(entry) = self.slab.take(flow) {
                    if let Some(port) = self.ports.get_mut(entry.port as usize).and_then(Option::as_mut) {
                        retired.subtable = port.masked.remove(
                            entry.source,
                            entry.subtable,
                            &self.hasher,
                            &entry.values,
                            flow.index,
                        );
                    }
                    retired.entry = Some(entry);
                }
            }
            Update::SetUnion(id, mask) => {
                if let Some(Some(table)) = self.slot_mut(id.slot)
                    && table.id == id
                {
                    table.set_union(*mask);
                    l1.renew(id.slot);
                }
                retired.mask = Some(mask);
            }
        }
        retired
    }

    fn add_flow(
        &mut self,
        entry: Box<FlowEntry>,
        mut room: Option<Box<Room>>,
        l1: &mut L1,
        retired: &mut Retired,
    ) {
        let Tables { hasher, slab, ports, .. } = self;
        let Some(Some(port)) = ports.get_mut(entry.port as usize) else {
            (retired.entry, retired.room) = (Some(entry), room);
            return;
        };
        if let Some(room) = &mut room {
            room.subtable =
                room.subtable.take().and_then(|table| port.masked.add_subtable(entry.source, table));
            if let Some(array) = room.array.take() {
                retired.array = port.masked.grow(entry.source, entry.subtable, array, hasher);
            }
        }
        retired.room = room;
        let flow = entry.flow;
        // A wider union makes other keys. A flow of a source that is searched earlier may stand before what L1 holds.
        let wider = !entry.mask.is_subset(&port.union);
        if wider {
            let mut union = port.union;
            union |= &*entry.mask;
            port.set_union(union);
        }
        if wider || entry.source != Source::Learned {
            l1.renew(entry.port);
        }
        match slab.put(entry) {
            Ok(old) => retired.entry = old,
            Err(entry) => {
                retired.entry = Some(entry);
                return;
            }
        }
        let is_in = slab.at(flow.index).is_some_and(|entry| {
            port.masked.insert(entry.source, entry.subtable, hasher, &entry.values, flow.index)
        });
        if !is_in {
            retired.entry = slab.take(flow);
        }
    }

    /// A bounded piece of upkeep, to be called between bursts: moves a few flows to a grown array, or brings subtables
    /// nearer to the order of their hits. Gives back an array to be freed.
    pub fn step(&mut self) -> Retired {
        let Tables { hasher, ports, turn, .. } = self;
        for _ in 0..ports.len().min(16) {
            *turn = if *turn + 1 < ports.len() { *turn + 1 } else { 0 };
            if let Some(port) = &mut ports[*turn] {
                return Retired { array: port.masked.step(hasher), ..Retired::default() };
            }
        }
        Retired::default()
    }
}

impl Tables {
    /// The flow that a key of the port's packets matches; changes nothing.
    pub fn peek(&self, port: PortId, key: &Key) -> Option<FlowRef> {
        self.port(port)?.masked.peek(&self.hasher, &self.slab, key)
    }
}
