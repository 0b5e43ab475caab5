//! How L1 makes room.
//!
//! It is looked for among the 16 slots of a key's two buckets: stale entries first, then the one unused for longest. A stale entry that a
//! lookup of the new key would look at first goes even where there is room. The entries of a port are linked in a ring, so that one which has used up its quota gives up one of its own, in order of age with a second
//! chance.

use super::entry::{Entry, MAX_PENDING, SLOTS};
use super::{
    COMMON, Chain, L1, L1Config, L1Key, LONG, NARROW, NIL, NUMBER, Place, SHORT, filter_bit, numbered, salt,
    tag_of, words_of,
};
use crate::hash::{match_8, splitmix};

/// Of them used when the table is full: 75 %.
pub(super) const FILL: usize = 6;
/// Age steps for which an entry is in use after its last packet: the present one, which may have just begun, and the one
/// before.
pub(super) const IDLE: u16 = 2;
/// One in so many new flows may drive out an entry in use. When more flows are active than there is room for, nearly every
/// packet misses, and remembering each of them would cost more than all of the hits bring.
const PERSISTENCE: u64 = 16;
/// After so many new flows in a row that found no room, none but these is tried until the next age step.
const CROWD: u8 = 32;

impl L1 {
    /// Remembers the flows that packets of `key` go through, if there is room; one time in `PERSISTENCE` even if that is
    /// taken from an entry in use.
    pub fn store(&mut self, key: &L1Key, chain: &Chain) {
        if let Some(place) = self.find(key).or_else(|| self.insert_if_room(key)) {
            self.entries.set_chain(place.0, chain);
            self.touch(place);
        }
    }

    /// A packet of `key` found no flow: whether it may go to the host, or too many did while the first is decided about.
    pub fn may_miss(&mut self, key: &L1Key, now: u64) -> bool {
        let Some(place) = self.find(key).or_else(|| self.insert(key, true)) else { return true };
        let L1Config { pending_ticks, pending_misses, .. } = self.config;
        self.touch(place);
        let misses = self.entries.at_mut(place.0).miss(now, now.saturating_add(pending_ticks));
        misses <= pending_misses.min(MAX_PENDING)
    }

    /// [`L1::insert`], which is tried now and then only while no room is found.
    fn insert_if_room(&mut self, key: &L1Key) -> Option<Place> {
        let crowded = self.is_crowded(key.port);
        if crowded && !self.is_lucky() { None } else { self.insert(key, crowded) }
    }

    /// A place for `key`, which is not in the table; its entry is pending since ever. Unless `persistent` it rarely takes room
    /// from entries in use.
    fn insert(&mut self, key: &L1Key, persistent: bool) -> Option<Place> {
        let owner = *self.owners.get(key.port as usize)?;
        if owner.generation == 0 {
            return None;
        }
        if owner.used >= owner.quota && !self.reclaim(key.port, persistent) {
            self.found_room(key.port, false);
            return None;
        }
        let (first, second) = self.homes(key.hash);
        let tag = tag_of(key.hash);
        self.clear_stale(first, tag);
        let free = |bucket: usize| match_8(&self.buckets[bucket].tags, 0);
        let (free_first, free_second) = (free(first), free(second));
        // The first bucket unless it is nearly full and the second is emptier: few lookups then need the second.
        let spill = free_first.count_ones() as usize <= SLOTS - FILL
            && free_second.count_ones() > free_first.count_ones();
        let (bucket, open) = if spill { (second, free_second) } else { (first, free_first) };
        let full = self.free == NIL && self.fresh as usize == self.entries.len();
        let (bucket, slot) = if open == 0 || full {
            let (idle, bucket, slot) = self.victim(first, second)?;
            self.found_room(key.port, idle >= IDLE);
            if idle < IDLE && !persistent && !self.is_lucky() {
                return None;
            }
            self.evict(bucket, slot);
            (bucket, slot)
        } else {
            if !persistent {
                self.found_room(key.port, true);
            }
            (bucket, open.trailing_zeros() as usize % SLOTS)
        };
        let number = self.take();
        if bucket != first {
            let home = &mut self.buckets[first];
            home.spilled += 1;
            home.filter |= filter_bit(tag);
        }
        let line = &mut self.buckets[bucket];
        line.tags[slot] = tag;
        line.entries[slot] = number;
        self.entries.put(number, key, owner.generation, self.age);
        self.link(key.port, number);
        Some(Place(number))
    }

    /// Whether new flows of a port have found no room for a while, and few are to be tried.
    #[inline]
    fn is_crowded(&self, port: u16) -> bool {
        let owner = self.owners.get(port as usize);
        owner.is_some_and(|owner| owner.refused >= CROWD && owner.step == self.age)
    }

    /// A new flow of a port has found room, or has not.
    fn found_room(&mut self, port: u16, found: bool) {
        let owner = &mut self.owners[port as usize];
        let before = if owner.step == self.age { owner.refused } else { 0 };
        owner.refused = if found { 0 } else { before.saturating_add(1) };
        owner.step = self.age;
    }

    /// One time in `PERSISTENCE`.
    fn is_lucky(&mut self) -> bool {
        splitmix(&mut self.dice).is_multiple_of(PERSISTENCE)
    }

    /// A free entry's number; there is one.
    fn take(&mut self) -> u32 {
        if self.free == NIL {
            self.fresh += 1;
            return self.fresh - 1;
        }
        let number = self.free;
        self.free = self.links[number as usize][0];
        number
    }

    /// Puts an entry into its port's ring, as the last whose turn comes.
    fn link(&mut self, port: u16, number: u32) {
        let owner = &mut self.owners[port as usize];
        owner.used += 1;
        if owner.hand == NIL {
            owner.hand = number;
            self.links[number as usize] = [number; 2];
            return;
        }
        let next = owner.hand;
        let previous = std::mem::replace(&mut self.links[next as usize][0], number);
        self.links[previous as usize][1] = number;
        self.links[number as usize] = [previous, next];
    }

    /// Makes a port give up one of its entries: the one whose turn it is, or one soon after that was not used lately.
    fn reclaim(&mut self, port: u16, persistent: bool) -> bool {
        for last in [false, false, false, true] {
            let hand = self.owners[port as usize].hand;
            if hand == NIL {
                return false;
            }
            let idle = self.idle(self.entries.at(hand));
            if idle >= IDLE || last && (persistent || self.is_lucky()) {
                let Some((bucket, slot)) = self.locate(hand) else { return false };
                self.evict(bucket, slot);
                if idle >= IDLE {
                    self.found_room(port, true);
                }
                return true;
            }
            self.owners[port as usize].hand = self.links[hand as usize][1];
        }
        false
    }

    pub(super) fn hash_of(&self, number: u32) -> u64 {
        let key = self.entries.key(number);
        let (salt, last) = (salt(key.present, key.port), key.words[NUMBER]);
        if key.kind == COMMON | LONG && last & NARROW != 0 {
            let pairs = key.words.as_chunks().0;
            return self
                .hasher
                .pairs(numbered(salt, last), std::array::from_fn::<_, { SHORT / 2 }, _>(|i| pairs[i]));
        }
        self.hasher.words(&key.words[..words_of(key.present)], salt)
    }

    /// The bucket and slot that point to an entry.
    fn locate(&self, number: u32) -> Option<(usize, usize)> {
        let hash = self.hash_of(number);
        let (first, second) = self.homes(hash);
        [first, second].into_iter().find_map(|bucket| {
            let line = &self.buckets[bucket];
            let slot = (0..SLOTS).find(|&i| line.tags[i] == tag_of(hash) && line.entries[i] == number)?;
            Some((bucket, slot))
        })
    }

    /// The slot of the two buckets to be given up, a stale one, else the one unused for longest, and for how long it was.
    fn victim(&self, first: usize, second: usize) -> Option<(u16, usize, usize)> {
        let mut best: Option<(u16, usize, usize)> = None;
        for bucket in [first, second] {
            let line = &self.buckets[bucket];
            for slot in (0..SLOTS).filter(|&slot| line.tags[slot] != 0) {
                let entry = self.entries.at(line.entries[slot]);
                let idle = self.idle(entry);
                if best.is_none_or(|(most, ..)| idle > most) {
                    best = Some((idle, bucket, slot));
                }
            }
        }
        best
    }

    #[inline(always)]
    pub(super) fn is_current(&self, entry: &Entry) -> bool {
        self.owners[entry.port() as usize].generation == entry.generation()
    }

    /// For how many age steps an entry was not used; more than any other if it is stale. One that is pending has not shown yet
    /// that it is of use.
    fn idle(&self, entry: &Entry) -> u16 {
        let idle = self.age.wrapping_sub(entry.age()) as u16;
        match (self.is_current(entry), entry.is_pending()) {
            (true, true) => idle.max(IDLE),
            (true, false) => idle,
            (false, _) => 256,
        }
    }

    /// Frees the slots of a bucket with stale entries of this tag, most often of the same key: a lookup would look at them first.
    fn clear_stale(&mut self, bucket: usize, tag: u16) {
        let mut matches = match_8(&self.buckets[bucket].tags, tag);
        while matches != 0 {
            let slot = matches.trailing_zeros() as usize % SLOTS;
            if !self.is_current(self.entries.at(self.buckets[bucket].entries[slot])) {
                self.evict(bucket, slot);
            }
            matches &= matches - 1;
        }
    }

    /// Frees a slot and its entry.
    fn evict(&mut self, bucket: usize, slot: usize) {
        let number = self.buckets[bucket].entries[slot];
        let home = self.homes(self.hash_of(number)).0;
        self.buckets[bucket].tags[slot] = 0;
        if home != bucket {
            let home = &mut self.buckets[home];
            home.spilled -= 1;
            if home.spilled == 0 {
                home.filter = 0;
            }
        }
        let [previous, next] = self.links[number as usize];
        self.links[previous as usize][1] = next;
        self.links[next as usize][0] = previous;
        let entry = *self.entries.at(number);
        if self.is_current(&entry) {
            let owner = &mut self.owners[entry.port() as usize];
            owner.used -= 1;
            if owner.hand == number {
                owner.hand = if next == number { NIL } else { next };
            }
        }
        self.links[number as usize][0] = self.free;
        self.free = number;
    }
}
