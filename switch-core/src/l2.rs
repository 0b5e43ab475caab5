//! L2, the masked table of one ingress port: tuple space search over subtables, one for each mask.
//!
//! Within a source the flows of a port are disjoint, so the first subtable that has a match ends the search; subtables
//! are kept in the order of their recent hits. Each has an array of *groups* of 15 one-byte tags in front, so that a
//! subtable which does not have the packet costs one cache line of 16-byte groups, and only a tag that fits leads to a
//! *record*: the flow's index, and the words of its key that the mask looks at, which are then compared in full.

use crate::flow::{FlowRef, Source};
use crate::hash::{Hasher, Term, match_16, prefetch_read, prefetch_write, terms};
use crate::key::{Key, Mask};
use crate::slab::Slab;
use std::sync::Arc;

/// Slots of a group.
const GROUP: usize = 15;
/// Entries for each group up to which an array is filled: 80 %.
const FILL: usize = 12;
/// A growing array takes over a group with each so many flows that are put in, beside those that upkeep moves: so all have been
/// moved long before it has to grow again.
const STEP: usize = 8;

/// Where a flow is in the tables of one worker: all that has to be known to put it there or to take it away, so that nothing of
/// the flow itself needs to be read for it.
#[derive(Clone, Copy, Debug)]
pub struct Place {
    /// Of the words of its key, by [`Slots::hash`](crate::slab::Slots::hash) of the worker.
    pub hash: u64,
    /// Its name.
    pub flow: FlowRef,
    /// Its subtable, by an id that is unique over all ports.
    pub subtable: u32,
    /// Slot of the ingress port in whose table it is.
    pub port: u16,
    /// Who gave it.
    pub source: Source,
}

/// Fifteen tags (0 is a free slot) and, last, the number of entries that passed by because the group was full. The count
/// ends a search without tombstones; at 255 it sticks, which costs searches of one more group and nothing else.
#[derive(Clone, Copy, Debug, Default)]
#[repr(align(16))]
struct Group([u8; 16]);

impl Group {
    #[inline(always)]
    fn matches(&self, tag: u8) -> u32 {
        match_16(&self.0, tag) & ((1 << GROUP) - 1)
    }

    #[inline(always)]
    fn overflow(&self) -> u8 {
        self.0[GROUP]
    }
}

/// An open-addressing array of records.
#[derive(Debug)]
pub struct Array {
    groups: Box<[Group]>,
    /// Of each slot of each group `stride` words: the index in the slab, and the values.
    records: Box<[u64]>,
    stride: usize,
    len: usize,
}

#[inline(always)]
fn tag_of(hash: u64) -> u8 {
    ((hash >> 56) as u8).max(1)
}

impl Array {
    /// An empty array for at least `n` flows, of which so many words are compared.
    pub fn with_capacity(n: usize, words: usize) -> Array {
        let groups = Array::capacity_for(n) / FILL;
        let stride = words + 1;
        let records = vec![0; groups * GROUP * stride].into();
        Array { groups: vec![Group::default(); groups].into(), records, stride, len: 0 }
    }

    /// The [capacity](Array::capacity) of an array for at least `n` flows.
    pub fn capacity_for(n: usize) -> usize {
        n.div_ceil(FILL).next_power_of_two() * FILL
    }

    /// Bytes that an array of this [capacity](Array::capacity) has.
    pub fn bytes(capacity: usize, words: usize) -> usize {
        capacity / FILL * (size_of::<Group>() + GROUP * (words + 1) * size_of::<u64>())
    }

    /// Where its memory lies, for advice to the system: start and length in bytes.
    pub fn memory(&self) -> [(*const u8, usize); 2] {
        let groups = (self.groups.as_ptr().cast(), size_of_val(&*self.groups));
        [groups, (self.records.as_ptr().cast(), size_of_val(&*self.records))]
    }

    /// Flows that fit before it should grow.
    pub fn capacity(&self) -> usize {
        self.groups.len() * FILL
    }

    #[inline(always)]
    fn home(&self, hash: u64) -> usize {
        hash as usize & (self.groups.len() - 1)
    }

    #[inline(always)]
    fn prefetch(&self, hash: u64) {
        prefetch_read(&self.groups[self.home(hash)]);
    }

    /// Whether the hash may be here; asks for the record that is likely to be its flow's.
    #[inline(always)]
    fn may_have(&self, hash: u64) -> bool {
        let home = self.home(hash);
        let group = &self.groups[home];
        let matches = group.matches(tag_of(hash));
        if matches != 0 {
            let at = (home * GROUP + matches.trailing_zeros() as usize) * self.stride;
            if let (Some(first), Some(last)) = (self.records.get(at), self.records.get(at + self.stride - 1))
            {
                prefetch_read(first);
                prefetch_read(last);
            }
        }
        matches != 0 || group.overflow() != 0
    }

    /// Asks for the record that is likely to be that of the flow of this hash, or is to be it if there is none.
    #[inline]
    fn prefetch_record(&self, hash: u64) {
        let home = self.home(hash);
        let group = &self.groups[home];
        let (own, free) = (group.matches(tag_of(hash)), group.matches(0));
        let slot = if own != 0 { own } else { free }.trailing_zeros() as usize;
        let at = (home * GROUP + slot.min(GROUP - 1)) * self.stride;
        if let (Some(first), Some(last)) = (self.records.get(at), self.records.get(at + self.stride - 1)) {
            prefetch_write(first);
            prefetch_write(last);
        }
    }

    #[inline(always)]
    fn record(&self, group: usize, slot: usize) -> &[u64] {
        &self.records[(group * GROUP + slot) * self.stride..][..self.stride]
    }

    /// The index of that hash, of whose values `is` holds.
    #[inline(always)]
    fn find(&self, hash: u64, mut is: impl FnMut(&[u64]) -> bool) -> Option<u32> {
        let tag = tag_of(hash);
        let mut at = self.home(hash);
        for _ in 0..self.groups.len() {
            let group = &self.groups[at];
            let mut matches = group.matches(tag);
            while matches != 0 {
                if let [index, values @ ..] = self.record(at, matches.trailing_zeros() as usize)
                    && is(values)
                {
                    return Some(*index as u32);
                }
                matches &= matches - 1;
            }
            if group.overflow() == 0 {
                return None;
            }
            at = (at + 1) & (self.groups.len() - 1);
        }
        None
    }

    /// Puts a flow in; false if there is no slot left at all, or its values are not as many as the others'.
    fn insert(&mut self, hash: u64, index: u32, values: &[u64]) -> bool {
        if self.len == self.groups.len() * GROUP || values.len() + 1 != self.stride {
            return false;
        }
        let mut at = self.home(hash);
        loop {
            let free = self.groups[at].matches(0);
            if free != 0 {
                let slot = free.trailing_zeros() as usize;
                self.groups[at].0[slot] = tag_of(hash);
                let record = (at * GROUP + slot) * self.stride;
                self.records[record] = index.into();
                self.records[record + 1..record + self.stride].copy_from_slice(values);
                self.len += 1;
                return true;
            }
            self.groups[at].0[GROUP] = self.groups[at].0[GROUP].saturating_add(1);
            at = (at + 1) & (self.groups.len() - 1);
        }
    }

    /// Takes `index` out; false if it is not here.
    fn remove(&mut self, hash: u64, index: u32) -> bool {
        let (tag, home) = (tag_of(hash), self.home(hash));
        for step in 0..self.groups.len() {
            let at = (home + step) & (self.groups.len() - 1);
            let mut matches = self.groups[at].matches(tag);
            while matches != 0 {
                let slot = matches.trailing_zeros() as usize;
                if self.record(at, slot)[0] == index.into() {
                    self.groups[at].0[slot] = 0;
                    self.len -= 1;
                    for passed in 0..step {
                        let passed = (home + passed) & (self.groups.len() - 1);
                        let count = &mut self.groups[passed].0[GROUP];
                        if *count != u8::MAX {
                            *count -= 1;
                        }
                    }
                    return true;
                }
                matches &= matches - 1;
            }
            if self.groups[at].overflow() == 0 {
                return false;
            }
        }
        false
    }
}

/// The flows of one port, source and mask.
#[derive(Debug)]
pub struct Subtable {
    id: u32,
    mask: Arc<Mask>,
    terms: Box<[Term]>,
    array: Array,
    /// The array that `array` takes over from, and the next of its groups to move. It is boxed, so that it comes and goes as one
    /// pointer.
    old: Option<(Box<Array>, usize)>,
    hits: u64,
}

impl Subtable {
    /// A subtable for flows under `mask`, with room for `n`. `id` is unique over all ports.
    pub fn new(id: u32, mask: Arc<Mask>, n: usize) -> Subtable {
        let terms = terms(&mask.0);
        let array = Array::with_capacity(n, terms.len());
        Subtable { id, mask, terms, array, old: None, hits: 0 }
    }

    /// Number of flows.
    pub fn len(&self) -> usize {
        self.array.len + self.old.as_ref().map_or(0, |(old, _)| old.len)
    }

    /// Whether it has no flow.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// The mask.
    pub fn mask(&self) -> &Mask {
        &self.mask
    }

    #[inline(always)]
    fn find(&self, hash: u64, key: &Key) -> Option<u32> {
        let is = |values: &[u64]| self.terms.iter().zip(values).all(|(term, value)| term.of(key) == *value);
        match (self.array.find(hash, is), &self.old) {
            (None, Some((old, _))) => old.find(hash, is),
            (found, _) => found,
        }
    }

    fn insert(&mut self, place: &Place, values: &[u64], hasher: &Hasher) -> bool {
        if self.array.len.is_multiple_of(STEP) {
            self.move_group(hasher);
        }
        self.array.insert(place.hash, place.flow.index, values)
    }

    fn remove(&mut self, place: &Place) -> bool {
        let Place { hash, flow, .. } = *place;
        self.array.remove(hash, flow.index)
            || self.old.as_mut().is_some_and(|(old, _)| old.remove(hash, flow.index))
    }

    /// Moves the next group of the old array, if there is one left.
    fn move_group(&mut self, hasher: &Hasher) {
        let Some((old, next)) = self.old.as_mut().filter(|(old, next)| *next < old.groups.len()) else {
            return;
        };
        for slot in 0..GROUP {
            if std::mem::take(&mut old.groups[*next].0[slot]) == 0 {
                continue;
            }
            old.len -= 1;
            if let [index, values @ ..] = old.record(*next, slot) {
                self.array.insert(hasher.words(values, 0), *index as u32, values);
            }
        }
        *next += 1;
    }

    /// Moves the next group of the old array; gives the old array back when it is empty.
    fn step(&mut self, hasher: &Hasher) -> Option<Box<Array>> {
        self.move_group(hasher);
        let (old, _) = self.old.take_if(|(old, next)| *next >= old.groups.len() || old.len == 0)?;
        Some(old)
    }

    /// Starts the move to a larger array. A move still under way is finished first; its array is given back.
    fn grow(&mut self, mut array: Box<Array>, hasher: &Hasher) -> Option<Box<Array>> {
        let mut retired = None;
        while self.old.is_some() {
            retired = self.step(hasher);
        }
        std::mem::swap(&mut self.array, &mut array);
        self.old = Some((array, 0));
        retired
    }
}

/// The subtables of one port.
#[derive(Debug)]
pub struct Masked {
    /// With each its id, which is looked for without a look into the subtables.
    #[allow(clippy::vec_box)] // a subtable comes, moves and goes as one pointer
    sources: [Vec<(u32, Box<Subtable>)>; Source::COUNT],
    /// Where [`Masked::step`] goes on.
    turn: usize,
}

/// Packets of a batch.
pub const BURST: usize = 64;

impl Masked {
    /// No subtables, and room for `masks` in each source.
    pub fn new(masks: usize) -> Masked {
        Masked { sources: std::array::from_fn(|_| Vec::with_capacity(masks)), turn: 0 }
    }

    /// Bytes of that room.
    pub fn bytes(masks: usize) -> usize {
        Source::COUNT * masks * size_of::<(u32, Box<Subtable>)>()
    }

    /// The subtables in the order of search.
    pub fn subtables(&self) -> impl Iterator<Item = (Source, &Subtable)> {
        [Source::Explicit, Source::Learned]
            .into_iter()
            .flat_map(|source| self.sources[source as usize].iter().map(move |(_, table)| (source, &**table)))
    }

    /// Number of subtables.
    pub fn masks(&self) -> usize {
        self.sources.iter().map(Vec::len).sum()
    }

    /// Looks up the keys whose bits in `open` are set; a found one's bit is cleared and its flow is put into `found`.
    /// Goes subtable by subtable, so that the lines of the whole batch are fetched at once.
    pub fn lookup_batch(
        &mut self,
        hasher: &Hasher,
        slab: &Slab,
        keys: &[Key],
        open: &mut u64,
        found: &mut [FlowRef],
    ) {
        if *open == 0 {
            return;
        }
        let wanted = *open;
        let mut hashes = [0u64; BURST];
        for (_, table) in self.sources.iter_mut().flatten() {
            for i in bits(*open) {
                hashes[i] = hasher.terms(&table.terms, &keys[i]);
                table.array.prefetch(hashes[i]);
            }
            let mut likely = *open;
            if table.old.is_none() {
                for i in bits(*open) {
                    likely &= !((!table.array.may_have(hashes[i]) as u64) << i);
                }
            }
            for i in bits(likely) {
                if let Some(index) = table.find(hashes[i], &keys[i]) {
                    slab.prefetch_slot(index);
                    found[i].index = index;
                    table.hits += 1;
                    *open &= !(1 << i);
                }
            }
            if *open == 0 {
                break;
            }
        }
        for i in bits(wanted & !*open) {
            found[i] = slab.flow(found[i].index);
        }
    }

    /// The flow that `key` matches, counted as a hit.
    pub fn lookup(&mut self, hasher: &Hasher, slab: &Slab, key: &Key) -> Option<FlowRef> {
        for (_, table) in self.sources.iter_mut().flatten() {
            if let Some(index) = table.find(hasher.terms(&table.terms, key), key) {
                table.hits += 1;
                return Some(slab.flow(index));
            }
        }
        None
    }

    /// The flow that `key` matches; changes nothing.
    pub fn peek(&self, hasher: &Hasher, slab: &Slab, key: &Key) -> Option<FlowRef> {
        let mut tables = self.sources.iter().flatten();
        let index = tables.find_map(|(_, table)| table.find(hasher.terms(&table.terms, key), key))?;
        Some(slab.flow(index))
    }

    fn position(&self, source: Source, id: u32) -> Option<usize> {
        self.sources[source as usize].iter().position(|(of, _)| *of == id)
    }

    fn subtable(&self, place: &Place) -> Option<&Subtable> {
        let list = &self.sources[place.source as usize];
        list.iter().find(|(id, _)| *id == place.subtable).map(|(_, table)| &**table)
    }

    /// Asks for what [`Masked::insert`] and [`Masked::remove`] look at first: the tags.
    #[inline]
    pub fn prefetch(&self, place: &Place) {
        if let Some(table) = self.subtable(place) {
            table.array.prefetch(place.hash);
        }
    }

    /// Asks for what they look at then, as the tags say.
    #[inline]
    pub fn prefetch_record(&self, place: &Place) {
        if let Some(table) = self.subtable(place) {
            table.array.prefetch_record(place.hash);
        }
    }

    /// Adds a subtable; gives it back when there is no room for its pointer.
    pub fn add_subtable(&mut self, source: Source, table: Box<Subtable>) -> Option<Box<Subtable>> {
        let list = &mut self.sources[source as usize];
        if list.len() == list.capacity() {
            return Some(table);
        }
        list.push((table.id, table));
        None
    }

    /// Starts the move of a subtable to a larger array; gives back what is no longer needed.
    pub fn grow(
        &mut self,
        source: Source,
        id: u32,
        array: Box<Array>,
        hasher: &Hasher,
    ) -> Option<Box<Array>> {
        match self.position(source, id) {
            Some(at) => self.sources[source as usize][at].1.grow(array, hasher),
            None => Some(array),
        }
    }

    /// Puts a flow of such [values](crate::slab::FlowEntry::values) in its place; false if its subtable is not there or full.
    pub fn insert(&mut self, place: &Place, values: &[u64], hasher: &Hasher) -> bool {
        self.position(place.source, place.subtable)
            .is_some_and(|at| self.sources[place.source as usize][at].1.insert(place, values, hasher))
    }

    /// Takes a flow out of its place, and gives the subtable back if it is then empty.
    pub fn remove(&mut self, place: &Place) -> Option<Box<Subtable>> {
        let at = self.position(place.source, place.subtable)?;
        let list = &mut self.sources[place.source as usize];
        list[at].1.remove(place);
        if list[at].1.is_empty() { Some(list.remove(at).1) } else { None }
    }

    /// A bounded piece of upkeep: moves one group of a growing subtable, else goes one pass nearer to the order of hits.
    /// Gives back an array that was moved empty.
    pub fn step(&mut self, hasher: &Hasher) -> Option<Box<Array>> {
        for (_, table) in self.sources.iter_mut().flatten() {
            if table.old.is_some() {
                return table.step(hasher);
            }
        }
        self.turn += 1;
        for list in &mut self.sources {
            // From the back, so that one pass takes the most hit subtable to the front.
            for i in (1..list.len()).rev() {
                if list[i].1.hits > list[i - 1].1.hits {
                    list.swap(i, i - 1);
                }
            }
            if self.turn.is_multiple_of(16) {
                list.iter_mut().for_each(|(_, table)| table.hits >>= 1);
            }
        }
        None
    }
}

/// The positions of the set bits.
#[inline(always)]
pub(crate) fn bits(mut set: u64) -> impl Iterator<Item = usize> {
    std::iter::from_fn(move || {
        (set != 0).then(|| {
            let i = set.trailing_zeros() as usize;
            set &= set - 1;
            i
        })
    })
}

#[cfg(test)]
mod tests;
