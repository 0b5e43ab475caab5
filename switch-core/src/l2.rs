//! L2, the masked table of one ingress port: tuple space search over subtables, one for each mask.
//!
//! Within a source the flows of a port are disjoint, so the first subtable that has a match ends the search; subtables
//! are kept in the order of their recent hits. Each has an array of *groups* of 15 one-byte tags in front, so that a
//! subtable which does not have the packet costs one cache line of 16-byte groups, and only a tag that fits leads to an
//! entry, whose masked key is then compared in full.

use crate::flow::{FlowRef, Source};
use crate::hash::{Hasher, Term, match_16, prefetch_read, terms};
use crate::key::{Key, Mask, WORDS};
use crate::slab::Slab;
use std::sync::Arc;

/// Slots of a group.
const GROUP: usize = 15;
/// Entries for each group up to which an array is filled: 80 %.
const FILL: usize = 12;

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

/// An open-addressing array of slab indices.
#[derive(Debug)]
pub struct Array {
    groups: Box<[Group]>,
    indices: Box<[[u32; 16]]>,
    len: usize,
}

#[inline(always)]
fn tag_of(hash: u64) -> u8 {
    ((hash >> 56) as u8).max(1)
}

impl Array {
    /// An empty array for at least `n` entries.
    pub fn with_capacity(n: usize) -> Array {
        let groups = n.div_ceil(FILL).next_power_of_two();
        Array { groups: vec![Group::default(); groups].into(), indices: vec![[0; 16]; groups].into(), len: 0 }
    }

    /// Entries that fit before it should grow.
    pub fn capacity(&self) -> usize {
        self.groups.len() * FILL
    }

    #[inline(always)]
    fn home(&self, hash: u64) -> usize {
        hash as usize & (self.groups.len() - 1)
    }

    #[inline(always)]
    fn prefetch(&self, hash: u64) {
        let home = self.home(hash);
        prefetch_read(&self.groups[home]);
    }

    /// The entry of that hash for which `is` holds.
    #[inline(always)]
    fn find(&self, hash: u64, mut is: impl FnMut(u32) -> bool) -> Option<u32> {
        let tag = tag_of(hash);
        let mut at = self.home(hash);
        for _ in 0..self.groups.len() {
            let group = &self.groups[at];
            let mut matches = group.matches(tag);
            while matches != 0 {
                let index = self.indices[at][matches.trailing_zeros() as usize];
                if is(index) {
                    return Some(index);
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

    /// Puts `index` in; false if there is no slot left at all.
    fn insert(&mut self, hash: u64, index: u32) -> bool {
        if self.len == self.groups.len() * GROUP {
            return false;
        }
        let mut at = self.home(hash);
        loop {
            let free = self.groups[at].matches(0);
            if free != 0 {
                let slot = free.trailing_zeros() as usize;
                self.groups[at].0[slot] = tag_of(hash);
                self.indices[at][slot] = index;
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
                if self.indices[at][slot] == index {
                    self.groups[at].0[slot] = 0;
                    self.len -= 1;
                    for passed in 0..step {
                        let count = &mut self.groups[(home + passed) & (self.indices.len() - 1)].0[GROUP];
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
    /// The array that `array` takes over from, and the next of its groups to move.
    old: Option<(Array, usize)>,
    hits: u64,
}

impl Subtable {
    /// A subtable for flows under `mask`, with room for `n`. `id` is unique over all ports.
    pub fn new(id: u32, mask: Arc<Mask>, n: usize) -> Subtable {
        let terms = terms(&mask.0);
        Subtable { id, mask, terms, array: Array::with_capacity(n), old: None, hits: 0 }
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
    fn find(&self, hash: u64, key: &Key, slab: &Slab) -> Option<u32> {
        let is = |index: u32| {
            slab.at(index).is_some_and(|entry| {
                self.terms.iter().all(|t| t.of(key) == entry.key.words[t.word.min(WORDS - 1)])
            })
        };
        match (self.array.find(hash, is), &self.old) {
            (None, Some((old, _))) => old.find(hash, is),
            (found, _) => found,
        }
    }

    fn insert(&mut self, hasher: &Hasher, key: &Key, index: u32) -> bool {
        self.array.insert(hasher.terms(&self.terms, key), index)
    }

    fn remove(&mut self, hasher: &Hasher, key: &Key, index: u32) -> bool {
        let hash = hasher.terms(&self.terms, key);
        self.array.remove(hash, index) || self.old.as_mut().is_some_and(|(old, _)| old.remove(hash, index))
    }

    /// Moves the next group of the old array; gives the old array back when it is empty.
    fn step(&mut self, hasher: &Hasher, slab: &Slab) -> Option<Array> {
        let (old, next) = self.old.as_mut()?;
        if let Some(group) = old.groups.get_mut(*next) {
            for slot in 0..GROUP {
                let index = old.indices[*next][slot];
                if group.0[slot] == 0 {
                    continue;
                }
                group.0[slot] = 0;
                old.len -= 1;
                if let Some(entry) = slab.at(index) {
                    self.array.insert(hasher.terms(&self.terms, &entry.key), index);
                }
            }
            *next += 1;
        }
        if *next < old.groups.len() && old.len > 0 {
            return None;
        }
        self.old.take().map(|(old, _)| old)
    }

    /// Starts the move to a larger array. A move still under way is finished first; its array is given back.
    fn grow(&mut self, array: Array, hasher: &Hasher, slab: &Slab) -> Option<Array> {
        let mut retired = None;
        while self.old.is_some() {
            retired = self.step(hasher, slab);
        }
        self.old = Some((std::mem::replace(&mut self.array, array), 0));
        retired
    }
}

/// The subtables of one port.
#[derive(Debug)]
pub struct Masked {
    #[allow(clippy::vec_box)] // a subtable comes, moves and goes as one pointer
    sources: [Vec<Box<Subtable>>; Source::COUNT],
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

    /// The subtables in the order of search.
    pub fn subtables(&self) -> impl Iterator<Item = (Source, &Subtable)> {
        [Source::Explicit, Source::Learned]
            .into_iter()
            .flat_map(|source| self.sources[source as usize].iter().map(move |table| (source, &**table)))
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
        let mut hashes = [0u64; BURST];
        for table in self.sources.iter_mut().flatten() {
            for i in bits(*open) {
                hashes[i] = hasher.terms(&table.terms, &keys[i]);
                table.array.prefetch(hashes[i]);
            }
            for i in bits(*open) {
                if let Some(entry) = table.find(hashes[i], &keys[i], slab).and_then(|index| slab.at(index)) {
                    found[i] = entry.flow;
                    table.hits += 1;
                    *open &= !(1 << i);
                }
            }
            if *open == 0 {
                return;
            }
        }
    }

    /// The flow that `key` matches, counted as a hit.
    pub fn lookup(&mut self, hasher: &Hasher, slab: &Slab, key: &Key) -> Option<FlowRef> {
        for table in self.sources.iter_mut().flatten() {
            if let Some(index) = table.find(hasher.terms(&table.terms, key), key, slab) {
                table.hits += 1;
                return slab.at(index).map(|entry| entry.flow);
            }
        }
        None
    }

    /// The flow that `key` matches; changes nothing.
    pub fn peek(&self, hasher: &Hasher, slab: &Slab, key: &Key) -> Option<FlowRef> {
        self.sources
            .iter()
            .flatten()
            .find_map(|table| table.find(hasher.terms(&table.terms, key), key, slab))
            .and_then(|index| slab.at(index))
            .map(|entry| entry.flow)
    }

    fn position(&self, source: Source, id: u32) -> Option<usize> {
        self.sources[source as usize].iter().position(|table| table.id == id)
    }

    /// Adds a subtable; gives it back when there is no room for its pointer.
    pub fn add_subtable(&mut self, source: Source, table: Box<Subtable>) -> Option<Box<Subtable>> {
        let list = &mut self.sources[source as usize];
        if list.len() == list.capacity() {
            return Some(table);
        }
        list.push(table);
        None
    }

    /// Starts the move of a subtable to a larger array; gives back what is no longer needed.
    pub fn grow(
        &mut self,
        source: Source,
        id: u32,
        array: Array,
        hasher: &Hasher,
        slab: &Slab,
    ) -> Option<Array> {
        match self.position(source, id) {
            Some(at) => self.sources[source as usize][at].grow(array, hasher, slab),
            None => Some(array),
        }
    }

    /// Puts the flow at `index` into its subtable; false if that is not there or full.
    pub fn insert(&mut self, source: Source, id: u32, hasher: &Hasher, key: &Key, index: u32) -> bool {
        self.position(source, id)
            .is_some_and(|at| self.sources[source as usize][at].insert(hasher, key, index))
    }

    /// Takes the flow at `index` out of its subtable, and gives the subtable back if it is then empty.
    pub fn remove(
        &mut self,
        source: Source,
        id: u32,
        hasher: &Hasher,
        key: &Key,
        index: u32,
    ) -> Option<Box<Subtable>> {
        let at = self.position(source, id)?;
        let list = &mut self.sources[source as usize];
        list[at].remove(hasher, key, index);
        if list[at].is_empty() { Some(list.remove(at)) } else { None }
    }

    /// A bounded piece of upkeep: moves one group of a growing subtable, else goes one pass nearer to the order of hits.
    /// Gives back an array that was moved empty.
    pub fn step(&mut self, hasher: &Hasher, slab: &Slab) -> Option<Array> {
        for table in self.sources.iter_mut().flatten() {
            if table.old.is_some() {
                return table.step(hasher, slab);
            }
        }
        self.turn += 1;
        for list in &mut self.sources {
            // From the back, so that one pass takes the most hit subtable to the front.
            for i in (1..list.len()).rev() {
                if list[i].hits > list[i - 1].hits {
                    list.swap(i, i - 1);
                }
            }
            if self.turn.is_multiple_of(16) {
                list.iter_mut().for_each(|table| table.hits >>= 1);
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
