//! L1, the exact-match table: from a packet's words under its port's union mask to the flows that it goes through.
//!
//! A lookup touches one bucket line (tags and entry numbers), then the line of the entry whose tag fits, or both. The key of a
//! packet of a common shape ([`crate::common`]) is made of words of the frame, and compared where they lie; that of any other
//! is made of words of its [`Key`]. It holds only the words that are not zero, and which those are, and of outer headers one word in place of
//! all ([`Numbers`]), so 10 words serve every kind of packet; a longer key is not cached. What few entries have (a key of more than `SHORT` words, more than one flow)
//! is kept apart (`entry`). An entry belongs to its port's present *generation*: a new generation makes all of the port's entries
//! stale at once. Entries are numbered densely and made on demand, so the memory in use follows the number of flows.
//!
//! Nothing is ever swept; room is made when it is needed (`room`).

mod entry;
mod numbers;
mod room;

use crate::common::{WINDOW, WINDOW_WORDS};
use crate::flow::FlowRef;
use crate::hash::{Hasher, Term, Zeroed, match_8, prefetch_read};
use crate::key::{Field, Key, WORDS};
pub use entry::{Bucket, Entry, Rest, Tail};
use entry::{Entries, SLOTS, flow_of};
pub use numbers::Numbers;
use room::FILL;

/// Words of the longest key.
pub const KEY_WORDS: usize = 10;
/// In the key of a packet of a common shape: the [number](Numbers) of the outer headers that it came in, 0 if there were none.
const NUMBER: usize = WINDOW_WORDS - 1;
/// In the word of that number: the words between it and the first `SHORT` are empty in all packets of the port and shape, and are
/// neither hashed nor compared.
const NARROW: u64 = 1 << 63;
/// Flows of the longest chain in an entry.
pub const CHAIN: usize = 4;
/// Sizes and times of an [`L1`].
#[derive(Clone, Copy, Debug)]
pub struct L1Config {
    /// Most entries.
    pub capacity: usize,
    /// Port slots.
    pub ports: usize,
    /// Ticks for which a first packet's entry is pending.
    pub pending_ticks: u64,
    /// Packets of a flow that may miss in that time.
    pub pending_misses: u32,
    /// Ticks of a step of an entry's age; ages count to 255.
    pub age_ticks: u64,
}

/// Port slots at most.
pub const MAX_PORTS: usize = 1 << 15;

/// A packet's key.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct L1Key {
    /// The last is not part of the key: there empty words go when all others are taken.
    words: [u64; KEY_WORDS + 1],
    /// Which words of the [`Key`] they are.
    present: u64,
    /// [`COMMON`] and [`LONG`].
    kind: u64,
    port: u16,
    hash: u64,
}

/// In `present`: the words are those of a frame of a common shape; how many they are is below. In the kind of a key: they are.
const COMMON: u64 = 1 << 47;
const _: () = assert!(WORDS < 47);
/// In the kind of a key: it has more than `SHORT` words.
const LONG: u64 = 1 << 55;

impl L1Key {
    /// Its hash, seeded.
    pub(crate) fn hash(&self) -> u64 {
        self.hash
    }
}

/// `present` of a common shape.
#[inline(always)]
fn common_present(long: bool) -> u64 {
    COMMON | if long { WINDOW_WORDS } else { SHORT } as u64
}

/// Keys of different length or port are different inputs of the hash.
#[inline(always)]
fn salt(present: u64, port: u16) -> u64 {
    present ^ ((port as u64) << 48)
}

/// The same with the last word of a [`NARROW`] key, which is not multiplied either.
#[inline(always)]
fn numbered(salt: u64, word: u64) -> u128 {
    u128::from(word) << 64 | u128::from(salt)
}

/// How many words a key has.
#[inline(always)]
fn words_of(present: u64) -> usize {
    let n = if present & COMMON != 0 { present as usize & 15 } else { present.count_ones() as usize };
    n.min(KEY_WORDS)
}

/// Words that are always hashed and compared of a frame of a common shape: as far as the TCP flags behind IPv4.
const SHORT: usize = 6;
const _: () = assert!(WINDOW_WORDS == KEY_WORDS && SHORT.is_multiple_of(2) && WINDOW_WORDS.is_multiple_of(2));

/// What keys of one common shape are made of: the first words of the frame, under a mask ([`crate::common::Window`]) that has
/// what tells the shape.
#[derive(Clone, Copy, Debug)]
pub struct CommonTerms {
    mask: [u64; WINDOW_WORDS],
    /// [`NARROW`] if outer headers have numbers, and that is all there is behind the first `SHORT` words.
    narrow: u64,
    present: u64,
    /// [`COMMON`], and [`LONG`] if there is something to look at behind the first `SHORT` words.
    kind: u64,
}

impl CommonTerms {
    /// Of a mask in window words. `numbered`: outer headers have numbers in keys.
    pub fn new(mask: &[u64; WINDOW_WORDS], numbered: bool) -> CommonTerms {
        debug_assert!(!numbered || mask[NUMBER] == 0);
        let wide = mask[SHORT..].iter().any(|&word| word != 0);
        let long = numbered || wide;
        let kind = COMMON | if long { LONG } else { 0 };
        let narrow = if numbered && !wide { NARROW } else { 0 };
        CommonTerms { mask: *mask, narrow, present: common_present(long), kind }
    }

    /// The mask.
    pub(crate) fn mask(&self) -> &[u64; WINDOW_WORDS] {
        &self.mask
    }

    #[inline(always)]
    fn is_long(&self) -> bool {
        self.kind & LONG != 0
    }

    /// Word `i` of the key.
    #[inline(always)]
    fn word(&self, window: &[u8; WINDOW], number: u64, i: usize) -> u64 {
        let word = u64::from_ne_bytes(window.as_chunks::<8>().0[i]) & self.mask[i];
        if i == NUMBER { word | number | self.narrow } else { word }
    }

    /// Words `2 * i` and `2 * i + 1`.
    #[inline(always)]
    fn pair(&self, window: &[u8; WINDOW], number: u64, i: usize) -> [u64; 2] {
        [self.word(window, number, 2 * i), self.word(window, number, 2 * i + 1)]
    }
}

/// Where a key of some hash is looked for first.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Home {
    hash: u64,
    bucket: u32,
    /// Of the key.
    kind: u64,
}

impl Home {
    /// The hash of the key.
    #[inline(always)]
    pub(crate) fn hash(self) -> u64 {
        self.hash
    }
}

/// An entry, by its number.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Place(u32);

impl Place {
    /// No entry.
    pub const NONE: Place = Place(NIL);
}

/// What tells an entry of a port whose chain is one flow.
#[derive(Clone, Copy, Debug)]
pub struct Sole(u64);

/// What an entry says.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Cached {
    /// The flows that packets of this key go through, as far as the key decides it.
    Chain(Chain),
    /// A first packet is being decided about.
    Pending,
}

/// Up to [`CHAIN`] flows.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Chain {
    flows: [FlowRef; CHAIN],
    len: u8,
}

impl Chain {
    /// Its flows, in order.
    #[inline(always)]
    pub fn flows(&self) -> &[FlowRef] {
        &self.flows[..(self.len as usize).min(CHAIN)]
    }

    /// One flow.
    #[inline(always)]
    pub fn of(flow: FlowRef) -> Chain {
        let mut chain = Chain::default();
        (chain.flows[0], chain.len) = (flow, 1);
        chain
    }

    /// Adds a flow; false if there is no room.
    pub fn push(&mut self, flow: FlowRef) -> bool {
        let Some(slot) = self.flows.get_mut(self.len as usize) else { return false };
        *slot = flow;
        self.len += 1;
        true
    }
}

#[derive(Clone, Copy, Debug)]
struct Owner {
    generation: u32,
    used: u32,
    quota: u32,
    /// The entry of the ring whose turn it is to be given up; [`NIL`] if there is none.
    hand: u32,
    /// New flows in a row that found no room, in this age step.
    refused: u8,
    step: u8,
}

/// No entry.
const NIL: u32 = u32::MAX;

/// The exact-match table of one worker, shared by its ports.
pub struct L1 {
    config: L1Config,
    hasher: Hasher,
    buckets: Zeroed<Bucket>,
    entries: Entries,
    /// For each entry the previous and the next of its port's ring; for a free one, the next free.
    links: Box<[[u32; 2]]>,
    owners: Box<[Owner]>,
    /// Entries below this were used at least once.
    fresh: u32,
    /// First of the free ones among those.
    free: u32,
    generation: u32,
    age: u8,
    /// For `PERSISTENCE`.
    dice: u64,
}

impl L1 {
    /// An empty table, hashed by `hasher`. Its memory is touched only as it fills.
    pub fn new(config: L1Config, hasher: Hasher) -> L1 {
        let capacity = config.capacity.clamp(1, NIL as usize);
        let owner = Owner { generation: 0, used: 0, quota: u32::MAX, hand: NIL, refused: 0, step: 0 };
        let dice = hasher.words(&[], 0);
        L1 {
            hasher,
            buckets: Zeroed::new(capacity.div_ceil(FILL)),
            entries: Entries::new(capacity),
            links: vec![[0; 2]; capacity].into(),
            owners: vec![owner; config.ports.min(MAX_PORTS)].into(),
            fresh: 0,
            free: NIL,
            generation: 0,
            age: 0,
            dice,
            config,
        }
    }

    /// The key of a packet of the port in slot `port`, by the port's terms; `None` if it is too long to be cached.
    pub fn key(&self, port: u16, terms: &[Term], key: &Key) -> Option<L1Key> {
        let mut made = L1Key::default();
        self.make_key(port, terms, key, 0, &mut made).then_some(made)
    }

    /// [`L1::key`] in its place, of a packet whose outer headers have this [number](Numbers), 0 if it has none. False if the key is too
    /// long; what is there is then unspecified.
    #[inline(always)]
    pub fn make_key(&self, port: u16, terms: &[Term], key: &Key, number: u64, made: &mut L1Key) -> bool {
        let words = &mut made.words;
        *words = [0; KEY_WORDS + 1];
        let (mut present, mut n) = (0u64, 0);
        for term in terms {
            // Without a branch on the packet: an empty word is overwritten by the next.
            let word = term.of(key);
            words[n.min(KEY_WORDS)] = word;
            present |= ((word != 0) as u64) << (term.word % 64);
            n += (word != 0) as usize;
        }
        if number != 0 {
            // In the place of what it stands for, which is in no key.
            words[n.min(KEY_WORDS)] = number;
            present |= 1 << Field::TunId.place().0;
            n += 1;
        }
        if n > KEY_WORDS {
            return false;
        }
        made.hash = self.hasher.words(&words[..n], salt(present, port));
        (made.present, made.port) = (present, port);
        made.kind = if n > SHORT { LONG } else { 0 };
        true
    }

    /// The key of a packet of a common shape, of its first bytes as they came in and the [number](Numbers) of its outer headers, 0
    /// if it has none.
    pub fn common_key(&self, port: u16, terms: &CommonTerms, window: &[u8; WINDOW], number: u64) -> L1Key {
        let mut made = L1Key::default();
        self.make_common_key(port, terms, window, number, &mut made);
        made
    }

    /// [`L1::common_key`] in its place.
    pub fn make_common_key(
        &self,
        port: u16,
        terms: &CommonTerms,
        window: &[u8; WINDOW],
        number: u64,
        made: &mut L1Key,
    ) {
        made.words = [0; KEY_WORDS + 1];
        (0..words_of(terms.present)).for_each(|i| made.words[i] = terms.word(window, number, i));
        (made.present, made.kind, made.port) = (terms.present, terms.kind, port);
        made.hash = self.common_hash(port, terms, window, number);
    }

    /// The hash of [`L1::common_key`], which need not be made for it.
    #[inline(always)]
    fn common_hash(&self, port: u16, terms: &CommonTerms, window: &[u8; WINDOW], number: u64) -> u64 {
        let salt = salt(terms.present, port);
        let pair = |i| terms.pair(window, number, i);
        match (terms.is_long(), terms.narrow) {
            (false, _) => self.hasher.pairs(salt.into(), std::array::from_fn::<_, { SHORT / 2 }, _>(pair)),
            (true, 0) => {
                self.hasher.pairs(salt.into(), std::array::from_fn::<_, { WINDOW_WORDS / 2 }, _>(pair))
            }
            (true, narrow) => {
                let salt = numbered(salt, number | narrow);
                self.hasher.pairs(salt, std::array::from_fn::<_, { SHORT / 2 }, _>(pair))
            }
        }
    }

    /// Where the key of a packet of a common shape is looked for; asks for that line.
    #[inline(always)]
    pub fn common_home(&self, port: u16, terms: &CommonTerms, window: &[u8; WINDOW], number: u64) -> Home {
        self.home(self.common_hash(port, terms, window, number), terms.kind)
    }

    /// Where `key` is looked for; asks for that line.
    #[inline(always)]
    pub fn home_of(&self, key: &L1Key) -> Home {
        self.home(key.hash, key.kind)
    }

    #[inline(always)]
    fn home(&self, hash: u64, kind: u64) -> Home {
        let bucket = self.homes(hash).0;
        prefetch_read(&self.buckets[bucket]);
        Home { hash, bucket: bucket as u32, kind }
    }

    /// Where the memory lies that every entry uses, for advice to the system (huge pages, NUMA): start and length in bytes.
    pub fn memory(&self) -> [(*const u8, usize); 3] {
        let buckets = (self.buckets.as_ptr().cast(), size_of_val(&*self.buckets));
        [buckets, self.entries.memory(), (self.links.as_ptr().cast(), size_of_val(&*self.links))]
    }

    /// Sets the time for the batch to come.
    pub fn set_time(&mut self, now: u64) {
        self.age = (now / self.config.age_ticks.max(1)) as u8;
    }

    /// Makes all entries of a port stale.
    pub fn renew(&mut self, port: u32) {
        // A generation is used once in 2^32 renewals; 0 is that of memory never touched.
        self.generation = self.generation.wrapping_add(1).max(1);
        if let Some(owner) = self.owners.get_mut(port as usize) {
            owner.generation = self.generation;
            owner.used = 0;
            owner.hand = NIL; // the stale entries' ring stays linked until each is evicted
        }
    }

    /// Sets how many entries a port may have.
    pub fn set_quota(&mut self, port: u32, quota: u32) {
        if let Some(owner) = self.owners.get_mut(port as usize) {
            owner.quota = quota;
        }
    }

    /// Entries of a port's present generation.
    pub fn used(&self, port: u32) -> u32 {
        self.owners.get(port as usize).map_or(0, |owner| owner.used)
    }

    #[inline(always)]
    fn homes(&self, hash: u64) -> (usize, usize) {
        let n = self.buckets.len() as u64;
        let scale = |part: u64| ((part * n) >> 32) as usize;
        (scale(hash >> 32), scale(hash & 0xffff_ffff))
    }

    /// Asks for the lines of the entry that the first bucket's tags point to, or for the second bucket. Gives that entry,
    /// which is likely to be the key's, or [`Place::NONE`].
    #[inline(always)]
    pub fn prefetch_entry(&self, home: Home) -> Place {
        let tag = tag_of(home.hash);
        let bucket = &self.buckets[home.bucket as usize];
        let matches = match_8(&bucket.tags, tag);
        if matches != 0 {
            let number = bucket.entries[matches.trailing_zeros() as usize % SLOTS];
            self.entries.prefetch(number, home.kind);
            return Place(number);
        }
        if bucket.filter & filter_bit(tag) != 0 {
            prefetch_read(&self.buckets[self.homes(home.hash).1]);
        }
        Place::NONE
    }

    /// What [`L1::sole_flow`] compares with for packets of a port, as long as its entries do not become stale.
    #[inline(always)]
    pub fn sole(&self, port: u16) -> Sole {
        Sole(entry::sole(self.generation(port), port))
    }

    /// The flow of the entry at `likely`, which is then in use, if its key is that of a packet of a common shape, its generation
    /// that of the port, and its chain one flow.
    #[inline(always)]
    pub fn sole_flow(
        &mut self,
        likely: Place,
        Sole(sole): Sole,
        terms: &CommonTerms,
        window: &[u8; WINDOW],
        number: u64,
    ) -> Option<FlowRef> {
        let (entry, tail) = self.entries.with_tail(likely.0, terms.kind)?;
        let mut differ = entry.differs(sole | terms.kind);
        differ = (0..SHORT).fold(differ, |sum, i| sum | entry.words[i] ^ terms.word(window, number, i));
        if let Some(Tail(tail)) = tail {
            // Those between are the same in all entries of the port.
            let first = if terms.narrow == 0 { SHORT } else { NUMBER };
            differ = (first..KEY_WORDS)
                .fold(differ, |sum, i| sum | tail[i - SHORT] ^ terms.word(window, number, i));
        }
        if differ != 0 {
            return None;
        }
        entry.touch(self.age);
        Some(flow_of(entry.first))
    }

    /// The present generation of a port's entries.
    #[inline(always)]
    pub(crate) fn generation(&self, port: u16) -> u32 {
        self.owners.get(port as usize).map_or(0, |owner| owner.generation)
    }

    #[inline(always)]
    fn find_in(&self, bucket: usize, key: &L1Key, generation: u32) -> Option<Place> {
        let line = &self.buckets[bucket];
        let mut matches = match_8(&line.tags, tag_of(key.hash));
        while matches != 0 {
            let place = Place(line.entries[matches.trailing_zeros() as usize % SLOTS]);
            if self.entries.holds(place, key, generation) {
                return Some(place);
            }
            matches &= matches - 1;
        }
        None
    }

    /// [`L1::find`], which looks at `likely` first.
    pub fn find_near(&self, key: &L1Key, likely: Place) -> Option<Place> {
        let generation = self.generation(key.port);
        if self.entries.holds(likely, key, generation) { Some(likely) } else { self.search(key, generation) }
    }

    /// The entry of `key`, if it is of its port's present generation.
    pub fn find(&self, key: &L1Key) -> Option<Place> {
        self.search(key, self.generation(key.port))
    }

    fn search(&self, key: &L1Key, generation: u32) -> Option<Place> {
        let (first, second) = self.homes(key.hash);
        if let Some(place) = self.find_in(first, key, generation) {
            return Some(place);
        }
        if self.buckets[first].filter & filter_bit(tag_of(key.hash)) != 0 && second != first {
            return self.find_in(second, key, generation);
        }
        None
    }

    /// What the entry says.
    #[inline]
    pub fn get(&self, place: Place) -> Cached {
        self.entries.cached(place.0)
    }

    /// Notes that the entry was used.
    pub fn touch(&mut self, place: Place) {
        self.entries.at_mut(place.0).touch(self.age);
    }
}

#[inline(always)]
fn tag_of(hash: u64) -> u16 {
    ((hash >> 32) as u16).max(1)
}

#[inline(always)]
fn filter_bit(tag: u16) -> u32 {
    1 << (tag & 31)
}

#[cfg(test)]
mod tests;
