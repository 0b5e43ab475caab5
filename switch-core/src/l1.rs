//! L1, the exact-match table: from a packet's words under its port's union mask to the flows that it goes through.
//!
//! A lookup touches one bucket line (tags and entry numbers), then the first line of the entry whose tag fits, or both. The key of a
//! packet of a common shape ([`crate::common`]) is made of words of the frame, and compared where they lie; that of any other
//! is made of words of its [`Key`]. It holds only the words that are not zero, and which those are, so 10 words serve every
//! kind of packet; a longer key is not cached. An entry belongs to its port's present *generation*: a new generation makes all of the port's entries
//! stale at once. Entries are numbered densely and made on demand, so the memory in use follows the number of flows.
//!
//! Nothing is ever swept. Room is made among the 16 slots of a key's two buckets: stale entries first, then the one
//! unused for longest. The entries of a port are linked in a ring, so that one which has used up its quota gives up one
//! of its own, in order of age with a second chance.

use crate::common::{WINDOW, WINDOW_WORDS};
use crate::flow::FlowRef;
use crate::hash::{Hasher, Term, Zeroed, match_8, prefetch_read, splitmix};
use crate::key::{Key, WORDS};

/// Words of the longest key.
pub const KEY_WORDS: usize = 10;
/// Flows of the longest chain in an entry.
pub const CHAIN: usize = 4;
/// Slots of a bucket.
const SLOTS: usize = 8;
/// Of them used when the table is full: 75 %.
const FILL: usize = 6;
/// Age steps for which an entry is in use after its last packet: the present one, which may have just begun, and the one
/// before.
const IDLE: u16 = 2;
/// One in so many new flows may drive out an entry in use. When more flows are active than there is room for, nearly every
/// packet misses, and remembering each of them would cost more than all of the hits bring.
const PERSISTENCE: u64 = 16;
/// After so many new flows in a row that found no room, none but these is tried until the next age step.
const CROWD: u8 = 32;

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

/// One cache line: where up to eight entries are.
#[derive(Clone, Copy)]
#[repr(C, align(64))]
pub struct Bucket {
    /// 0 is a free slot.
    tags: [u16; SLOTS],
    entries: [u32; SLOTS],
    /// Entries that belong here and lie in their second bucket.
    spilled: u32,
    /// A bit for each tag that spilled: a miss whose bit is clear does not read the second bucket.
    filter: u32,
}

/// Two cache lines: a key and what it leads to. The first has all that is looked at for a packet of a common shape whose port's
/// flows look no further than the [`SHORT`] words, and which goes through one flow.
#[derive(Clone, Copy)]
#[repr(C, align(64))]
pub struct Entry {
    /// From the lowest bit: 32 of the generation, 15 of the port and 1 for keys of common shapes ([`stamp`]); 8 of the number of
    /// flows in the chain, 0 while a first packet is being decided about; 8 of the age step when it was last used. One
    /// word, so that it is compared at once.
    stamp: u64,
    /// The first flow of the chain; for a pending entry the end of that time.
    first: u64,
    words: [u64; KEY_WORDS],
    present: u64,
    /// The other flows of the chain; for a pending entry the misses.
    further: [u64; CHAIN - 1],
}

const _: () = assert!(size_of::<Entry>() == 128 && std::mem::offset_of!(Entry, words) + 8 * SHORT == 64);

/// Port slots at most.
pub const MAX_PORTS: usize = 1 << 15;

/// Of [`Entry::stamp`]: generation, port and kind of key.
const OWNER: u64 = (1 << COUNT_SHIFT) - 1;
const COUNT_SHIFT: u32 = 48;
const AGE_SHIFT: u32 = 56;

/// Generation, port and kind of key of an entry.
#[inline(always)]
fn stamp(generation: u32, port: u16, present: u64) -> u64 {
    generation as u64 | (port as u64 % MAX_PORTS as u64) << 32 | present & COMMON
}

impl Entry {
    #[inline(always)]
    fn generation(&self) -> u32 {
        self.stamp as u32
    }

    #[inline(always)]
    fn port(&self) -> u16 {
        (self.stamp >> 32) as u16 % MAX_PORTS as u16
    }

    #[inline(always)]
    fn count(&self) -> u8 {
        (self.stamp >> COUNT_SHIFT) as u8
    }

    #[inline(always)]
    fn age(&self) -> u8 {
        (self.stamp >> AGE_SHIFT) as u8
    }

    fn set_count(&mut self, count: u8) {
        self.stamp = self.stamp & !(0xff << COUNT_SHIFT) | (count as u64) << COUNT_SHIFT;
    }

    #[inline(always)]
    fn touch(&mut self, age: u8) {
        if self.age() != age {
            self.stamp = self.stamp & !(0xff << AGE_SHIFT) | (age as u64) << AGE_SHIFT;
        }
    }
}

/// A packet's key.
#[derive(Clone, Copy, Debug, Default)]
pub struct L1Key {
    /// The last is not part of the key: there empty words go when all others are taken.
    words: [u64; KEY_WORDS + 1],
    /// Which words of the [`Key`] they are.
    present: u64,
    port: u16,
    hash: u64,
}

/// In `present`: the words are those of a frame of a common shape; how many they are is below.
const COMMON: u64 = 1 << 47;
const _: () = assert!(WORDS < 47);

/// Keys of different length or port are different inputs of the hash.
#[inline(always)]
fn salt(present: u64, port: u16) -> u64 {
    present ^ ((port as u64) << 48)
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
    /// There is something to look at behind the first [`SHORT`] words.
    long: bool,
    present: u64,
}

impl CommonTerms {
    /// Of a mask in window words.
    pub fn new(mask: &[u64; WINDOW_WORDS]) -> CommonTerms {
        let long = mask[SHORT..].iter().any(|&word| word != 0);
        let words = if long { WINDOW_WORDS } else { SHORT };
        CommonTerms { mask: *mask, long, present: COMMON | words as u64 }
    }

    /// Word `i` of the key.
    #[inline(always)]
    fn word(&self, window: &[u8; WINDOW], i: usize) -> u64 {
        u64::from_ne_bytes(window.as_chunks::<8>().0[i]) & self.mask[i]
    }

    /// Words `2 * i` and `2 * i + 1`.
    #[inline(always)]
    fn pair(&self, window: &[u8; WINDOW], i: usize) -> [u64; 2] {
        [self.word(window, 2 * i), self.word(window, 2 * i + 1)]
    }
}

/// Where a key of some hash is looked for first.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Home {
    hash: u64,
    bucket: u32,
    /// More than the first line of an entry is to be compared.
    long: bool,
}

/// An entry, by its number.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Place(u32);

impl Place {
    /// No entry.
    pub const NONE: Place = Place(NIL);
}

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
    entries: Zeroed<Entry>,
    /// For each entry the previous and the next of its port's ring; for a free one, the next free.
    links: Box<[[u32; 2]]>,
    owners: Box<[Owner]>,
    /// Entries below this were used at least once.
    fresh: u32,
    /// First of the free ones among those.
    free: u32,
    generation: u32,
    age: u8,
    /// For [`PERSISTENCE`].
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
            entries: Zeroed::new(capacity),
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
        self.make_key(port, terms, key, &mut made).then_some(made)
    }

    /// [`L1::key`] in its place. False if the key is too long; what is there is then unspecified.
    #[inline]
    pub fn make_key(&self, port: u16, terms: &[Term], key: &Key, made: &mut L1Key) -> bool {
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
        if n > KEY_WORDS {
            return false;
        }
        made.hash = self.hasher.words(&words[..n], salt(present, port));
        (made.present, made.port) = (present, port);
        true
    }

    /// The key of a packet of a common shape, of its first bytes as they came in.
    pub fn common_key(&self, port: u16, terms: &CommonTerms, window: &[u8; WINDOW]) -> L1Key {
        let mut made = L1Key::default();
        self.make_common_key(port, terms, window, &mut made);
        made
    }

    /// [`L1::common_key`] in its place.
    pub fn make_common_key(&self, port: u16, terms: &CommonTerms, window: &[u8; WINDOW], made: &mut L1Key) {
        made.words = [0; KEY_WORDS + 1];
        (0..words_of(terms.present)).for_each(|i| made.words[i] = terms.word(window, i));
        (made.present, made.port) = (terms.present, port);
        made.hash = self.common_hash(port, terms, window);
    }

    /// The hash of [`L1::common_key`], which need not be made for it.
    #[inline(always)]
    fn common_hash(&self, port: u16, terms: &CommonTerms, window: &[u8; WINDOW]) -> u64 {
        let salt = salt(terms.present, port);
        if terms.long {
            self.hasher
                .pairs(salt, std::array::from_fn::<_, { WINDOW_WORDS / 2 }, _>(|i| terms.pair(window, i)))
        } else {
            self.hasher.pairs(salt, std::array::from_fn::<_, { SHORT / 2 }, _>(|i| terms.pair(window, i)))
        }
    }

    /// Where the key of a packet of a common shape is looked for; asks for that line.
    #[inline(always)]
    pub fn common_home(&self, port: u16, terms: &CommonTerms, window: &[u8; WINDOW]) -> Home {
        self.home(self.common_hash(port, terms, window), terms.long)
    }

    /// Where `key` is looked for; asks for that line.
    #[inline(always)]
    pub fn home_of(&self, key: &L1Key) -> Home {
        self.home(key.hash, true)
    }

    #[inline(always)]
    fn home(&self, hash: u64, long: bool) -> Home {
        let bucket = self.homes(hash).0;
        prefetch_read(&self.buckets[bucket]);
        Home { hash, bucket: bucket as u32, long }
    }

    /// Where its memory lies, for advice to the system (huge pages, NUMA): start and length in bytes.
    pub fn memory(&self) -> [(*const u8, usize); 2] {
        [
            (self.buckets.as_ptr().cast(), size_of_val(&*self.buckets)),
            (self.entries.as_ptr().cast(), size_of_val(&*self.entries)),
        ]
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
            if let Some(entry) = self.entries.get(number as usize) {
                prefetch_read(entry);
                if home.long {
                    prefetch_read(&entry.further);
                }
            }
            return Place(number);
        }
        if bucket.filter & filter_bit(tag) != 0 {
            prefetch_read(&self.buckets[self.homes(home.hash).1]);
        }
        Place::NONE
    }

    /// The flow of the entry at `likely`, which is then in use, if its key is that of a packet of a common shape, its generation
    /// that of the port, and its chain one flow.
    #[inline(always)]
    pub fn sole_flow(
        &mut self,
        likely: Place,
        (generation, port): (u32, u16),
        terms: &CommonTerms,
        window: &[u8; WINDOW],
    ) -> Option<FlowRef> {
        let entry = self.entries.get_mut(likely.0 as usize)?;
        let sole = stamp(generation, port, COMMON) | 1 << COUNT_SHIFT;
        let mut differ = (entry.stamp ^ sole) << (u64::BITS - AGE_SHIFT);
        differ = (0..SHORT).fold(differ, |sum, i| sum | entry.words[i] ^ terms.word(window, i));
        if terms.long {
            differ = (SHORT..KEY_WORDS).fold(differ, |sum, i| sum | entry.words[i] ^ terms.word(window, i));
        }
        if differ != 0 {
            return None;
        }
        entry.touch(self.age);
        Some(flow_of(entry.first))
    }

    /// The present generation of a port's entries.
    #[inline(always)]
    pub fn generation(&self, port: u16) -> u32 {
        self.owners.get(port as usize).map_or(0, |owner| owner.generation)
    }

    #[inline(always)]
    fn find_in(&self, bucket: usize, key: &L1Key, generation: u32) -> Option<Place> {
        let line = &self.buckets[bucket];
        let mut matches = match_8(&line.tags, tag_of(key.hash));
        while matches != 0 {
            let place = Place(line.entries[matches.trailing_zeros() as usize % SLOTS]);
            if self.holds(place, key, generation) {
                return Some(place);
            }
            matches &= matches - 1;
        }
        None
    }

    /// Whether the entry is the key's and of this generation.
    #[inline(always)]
    fn holds(&self, place: Place, key: &L1Key, generation: u32) -> bool {
        let Some(entry) = self.entries.get(place.0 as usize) else { return false };
        // Straight code instead of a call to compare so few words.
        let differ = (0..KEY_WORDS).fold(0, |sum, i| sum | (entry.words[i] ^ key.words[i]));
        let other = (entry.stamp ^ stamp(generation, key.port, key.present)) & OWNER;
        differ | (entry.present ^ key.present) | other == 0
    }

    #[inline(always)]
    fn is_current(&self, entry: &Entry) -> bool {
        self.owners[entry.port() as usize].generation == entry.generation()
    }

    /// [`L1::find`], which looks at `likely` first.
    pub fn find_near(&self, key: &L1Key, likely: Place) -> Option<Place> {
        let generation = self.generation(key.port);
        if self.holds(likely, key, generation) { Some(likely) } else { self.search(key, generation) }
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
        let entry = &self.entries[place.0 as usize];
        if entry.count() == 0 {
            return Cached::Pending;
        }
        let [b, c, d] = entry.further.map(flow_of);
        Cached::Chain(Chain { flows: [flow_of(entry.first), b, c, d], len: entry.count() })
    }

    /// Notes that the entry was used.
    pub fn touch(&mut self, place: Place) {
        self.entries[place.0 as usize].touch(self.age);
    }

    /// Remembers the flows that packets of `key` go through, if there is room; one time in [`PERSISTENCE`] even if that is
    /// taken from an entry in use.
    pub fn store(&mut self, key: &L1Key, chain: &Chain) {
        if let Some(place) = self.find(key).or_else(|| self.insert_if_room(key)) {
            let entry = &mut self.entries[place.0 as usize];
            entry.set_count(chain.len);
            let packed = chain.flows.map(|flow| flow.index as u64 | (flow.generation as u64) << 32);
            entry.first = packed[0];
            entry.further.copy_from_slice(&packed[1..]);
            self.touch(place);
        }
    }

    /// A packet of `key` found no flow: whether it may go to the host, or too many did while the first is decided about.
    pub fn may_miss(&mut self, key: &L1Key, now: u64) -> bool {
        let Some(place) = self.find(key).or_else(|| self.insert(key, true)) else { return true };
        let L1Config { pending_ticks, pending_misses, .. } = self.config;
        self.touch(place);
        let entry = &mut self.entries[place.0 as usize];
        let (until, misses) = (&mut entry.first, &mut entry.further[0]);
        if entry.stamp >> COUNT_SHIFT & 0xff != 0 || now >= *until {
            (*until, *misses) = (now.saturating_add(pending_ticks), 0);
            entry.stamp &= !(0xff << COUNT_SHIFT);
        }
        *misses = misses.saturating_add(1);
        *misses <= pending_misses as u64
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
        let tag = tag_of(key.hash);
        if bucket != first {
            let home = &mut self.buckets[first];
            home.spilled += 1;
            home.filter |= filter_bit(tag);
        }
        let line = &mut self.buckets[bucket];
        line.tags[slot] = tag;
        line.entries[slot] = number;
        self.entries[number as usize] = Entry {
            stamp: stamp(owner.generation, key.port, key.present) | (self.age as u64) << AGE_SHIFT,
            first: 0,
            words: std::array::from_fn(|i| key.words[i]),
            present: key.present,
            further: [0; CHAIN - 1],
        };
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

    /// One time in [`PERSISTENCE`].
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
            let idle = self.idle(&self.entries[hand as usize]);
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

    fn hash_of(&self, number: u32) -> u64 {
        let entry = &self.entries[number as usize];
        self.hasher.words(&entry.words[..words_of(entry.present)], salt(entry.present, entry.port()))
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
                let entry = &self.entries[line.entries[slot] as usize];
                let idle = self.idle(entry);
                if best.is_none_or(|(most, ..)| idle > most) {
                    best = Some((idle, bucket, slot));
                }
            }
        }
        best
    }

    /// For how many age steps an entry was not used; more than any other if it is stale. One that is pending has not shown yet
    /// that it is of use.
    fn idle(&self, entry: &Entry) -> u16 {
        let idle = self.age.wrapping_sub(entry.age()) as u16;
        match (self.is_current(entry), entry.count()) {
            (true, 0) => idle.max(IDLE),
            (true, _) => idle,
            (false, _) => 256,
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
        let entry = self.entries[number as usize];
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

#[inline(always)]
fn flow_of(packed: u64) -> FlowRef {
    FlowRef { index: packed as u32, generation: (packed >> 32) as u32 }
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
