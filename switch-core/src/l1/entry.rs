//! How L1 lies in memory.

use super::{CHAIN, COMMON, Cached, Chain, KEY_WORDS, L1Key, LONG, MAX_PORTS, Place, SHORT};
use crate::flow::FlowRef;
use crate::hash::{Zeroed, prefetch_read};

/// Slots of a bucket.
pub(super) const SLOTS: usize = 8;

/// One cache line: where up to eight entries are.
#[derive(Clone, Copy)]
#[repr(C, align(64))]
pub struct Bucket {
    /// 0 is a free slot.
    pub(super) tags: [u16; SLOTS],
    pub(super) entries: [u32; SLOTS],
    /// Entries that belong here and lie in their second bucket.
    pub(super) spilled: u32,
    /// A bit for each tag that spilled: a miss whose bit is clear does not read the second bucket.
    pub(super) filter: u32,
}

/// One cache line, all of an entry that is looked at for a packet of a common shape whose port's flows look no further than
/// the `SHORT` words, and which goes through one flow.
#[derive(Clone, Copy)]
#[repr(C, align(64))]
pub struct Entry {
    /// From the lowest bit: 32 of the generation, 15 of the port, 1 for keys of common shapes, 7 of the number of flows in the
    /// chain (or `PENDING`, and packets that have missed), 1 for keys of more than `SHORT` words, 8 of the age step when it
    /// was last used. One word, so that it is compared at once.
    pub(super) stamp: u64,
    /// The first flow of the chain; for a pending entry the end of that time.
    pub(super) first: u64,
    pub(super) words: [u64; SHORT],
}

const _: () = assert!(size_of::<Entry>() == 64 && CHAIN < PENDING as usize);

/// The words of a key behind the first `SHORT`.
#[derive(Clone, Copy)]
#[repr(C, align(32))]
pub struct Tail(pub(super) [u64; KEY_WORDS - SHORT]);

/// What few entries have.
#[derive(Clone, Copy)]
#[repr(C, align(32))]
pub struct Rest {
    /// Of a key that is not of a common shape.
    present: u64,
    /// The other flows of a chain.
    further: [u64; CHAIN - 1],
}

const COUNT_SHIFT: u32 = 48;
const COUNT: u64 = 0x7f << COUNT_SHIFT;
const AGE_SHIFT: u32 = 56;
/// Generation, port and kind of key.
const OWNER: u64 = ((1 << COUNT_SHIFT) - 1) | LONG;

/// In place of a number of flows: a first packet is being decided about.
const PENDING: u8 = 64;
/// Packets that are counted meanwhile.
pub(super) const MAX_PENDING: u32 = (PENDING - 2) as u32;

/// Generation, port and kind of key of an entry.
#[inline(always)]
fn stamp(generation: u32, port: u16, kind: u64) -> u64 {
    generation as u64 | (port as u64 % MAX_PORTS as u64) << 32 | kind & (COMMON | LONG)
}

impl Entry {
    #[inline(always)]
    pub(super) fn generation(&self) -> u32 {
        self.stamp as u32
    }

    #[inline(always)]
    pub(super) fn port(&self) -> u16 {
        (self.stamp >> 32) as u16 % MAX_PORTS as u16
    }

    #[inline(always)]
    fn count(&self) -> u8 {
        ((self.stamp & COUNT) >> COUNT_SHIFT) as u8
    }

    /// Whether a first packet is being decided about.
    #[inline(always)]
    pub(super) fn is_pending(&self) -> bool {
        self.count() >= PENDING
    }

    #[inline(always)]
    pub(super) fn age(&self) -> u8 {
        (self.stamp >> AGE_SHIFT) as u8
    }

    fn set_count(&mut self, count: u8) {
        self.stamp = self.stamp & !COUNT | (count as u64) << COUNT_SHIFT & COUNT;
    }

    /// Notes that it was used in this age step.
    #[inline(always)]
    pub(super) fn touch(&mut self, age: u8) {
        if self.age() != age {
            self.stamp = self.stamp & !(0xff << AGE_SHIFT) | (age as u64) << AGE_SHIFT;
        }
    }

    /// One more packet has missed; the first one begins a time that ends at `until`. Gives how many have.
    pub(super) fn miss(&mut self, now: u64, until: u64) -> u32 {
        if !self.is_pending() || now >= self.first {
            self.first = until;
            self.set_count(PENDING);
        }
        let misses = (self.count() - PENDING).saturating_add(1).min(PENDING - 1);
        self.set_count(PENDING + misses);
        misses.into()
    }

    /// Whether its stamp is this one, its age aside: zero if so.
    #[inline(always)]
    pub(super) fn differs(&self, sole: u64) -> u64 {
        (self.stamp ^ sole) << (u64::BITS - AGE_SHIFT)
    }
}

/// The stamp of an entry whose chain is one flow, but for kind and age.
#[inline(always)]
pub(super) fn sole(generation: u32, port: u16) -> u64 {
    stamp(generation, port, 0) | 1 << COUNT_SHIFT
}

/// The entries, each in up to three pieces of the same number. Memory of a piece is touched only by an entry that has it.
pub(super) struct Entries {
    first: Zeroed<Entry>,
    tails: Zeroed<Tail>,
    rests: Zeroed<Rest>,
}

impl Entries {
    pub(super) fn new(capacity: usize) -> Entries {
        Entries { first: Zeroed::new(capacity), tails: Zeroed::new(capacity), rests: Zeroed::new(capacity) }
    }

    pub(super) fn len(&self) -> usize {
        self.first.len()
    }

    /// Where all first lines lie.
    pub(super) fn memory(&self) -> (*const u8, usize) {
        (self.first.as_ptr().cast(), size_of_val(&*self.first))
    }

    #[inline(always)]
    pub(super) fn get(&self, number: u32) -> Option<&Entry> {
        self.first.get(number as usize)
    }

    /// The entry of that number, which is one.
    #[inline(always)]
    pub(super) fn at(&self, number: u32) -> &Entry {
        &self.first[number as usize]
    }

    /// As [`Entries::at`].
    #[inline(always)]
    pub(super) fn at_mut(&mut self, number: u32) -> &mut Entry {
        &mut self.first[number as usize]
    }

    /// The entry of that number, if there is one, with the words behind the first `SHORT` if there are any.
    #[inline(always)]
    pub(super) fn with_tail(&mut self, number: u32, kind: u64) -> Option<(&mut Entry, Option<&Tail>)> {
        let tail = if kind & LONG != 0 { self.tails.get(number as usize) } else { None };
        Some((self.first.get_mut(number as usize)?, tail))
    }

    /// Asks for what a lookup reads of it, for a key of this kind.
    #[inline(always)]
    pub(super) fn prefetch(&self, number: u32, kind: u64) {
        let Some(entry) = self.get(number) else { return };
        prefetch_read(entry);
        if kind != COMMON {
            if kind & LONG != 0 {
                prefetch_read(&self.tails[number as usize]);
            }
            if kind & COMMON == 0 {
                prefetch_read(&self.rests[number as usize]);
            }
        }
    }

    /// Whether the entry is the key's and of this generation.
    #[inline(always)]
    pub(super) fn holds(&self, Place(number): Place, key: &L1Key, generation: u32) -> bool {
        let Some(entry) = self.get(number) else { return false };
        // Straight code instead of a call to compare so few words.
        let differ = (0..SHORT).fold(0, |sum, i| sum | (entry.words[i] ^ key.words[i]));
        let other = (entry.stamp ^ stamp(generation, key.port, key.kind)) & OWNER;
        if differ | other != 0 {
            return false;
        }
        let tail = |tail: &Tail| (SHORT..KEY_WORDS).all(|i| tail.0[i - SHORT] == key.words[i]);
        (key.kind & LONG == 0 || tail(&self.tails[number as usize]))
            && (key.kind & COMMON != 0 || self.rests[number as usize].present == key.present)
    }

    /// Makes an entry of `key`, pending since ever.
    pub(super) fn put(&mut self, number: u32, key: &L1Key, generation: u32, age: u8) {
        let stamp = stamp(generation, key.port, key.kind) | (age as u64) << AGE_SHIFT;
        let words = std::array::from_fn(|i| key.words[i]);
        *self.at_mut(number) = Entry { stamp, first: 0, words };
        self.at_mut(number).set_count(PENDING);
        if key.kind & LONG != 0 {
            self.tails[number as usize] = Tail(std::array::from_fn(|i| key.words[SHORT + i]));
        }
        if key.kind & COMMON == 0 {
            self.rests[number as usize].present = key.present;
        }
    }

    /// The key of an entry, but for its hash.
    pub(super) fn key(&self, number: u32) -> L1Key {
        let entry = self.at(number);
        let mut key = L1Key { kind: entry.stamp & (COMMON | LONG), port: entry.port(), ..L1Key::default() };
        key.words[..SHORT].copy_from_slice(&entry.words);
        if key.kind & LONG != 0 {
            key.words[SHORT..KEY_WORDS].copy_from_slice(&self.tails[number as usize].0);
        }
        key.present = match key.kind & COMMON {
            0 => self.rests[number as usize].present,
            _ => super::common_present(key.kind & LONG != 0),
        };
        key
    }

    /// What the entry says.
    #[inline]
    pub(super) fn cached(&self, number: u32) -> Cached {
        let entry = self.at(number);
        match entry.count() {
            PENDING.. => Cached::Pending,
            1 => Cached::Chain(Chain::of(flow_of(entry.first))),
            len => {
                let [b, c, d] = self.rests[number as usize].further.map(flow_of);
                Cached::Chain(Chain { flows: [flow_of(entry.first), b, c, d], len })
            }
        }
    }

    /// From now on the entry says this.
    pub(super) fn set_chain(&mut self, number: u32, chain: &Chain) {
        let [first, further @ ..] =
            chain.flows.map(|flow| flow.index as u64 | (flow.generation as u64) << 32);
        let entry = self.at_mut(number);
        entry.set_count(chain.len);
        entry.first = first;
        if chain.len != 1 {
            self.rests[number as usize].further = further;
        }
    }
}

#[inline(always)]
pub(super) fn flow_of(packed: u64) -> FlowRef {
    FlowRef { index: packed as u32, generation: (packed >> 32) as u32 }
}
