//! What the tables need of the machine: a seeded hash, tag groups compared at once, prefetch, and zeroed memory.
//!
//! The hash is NH (Black et al., UMAC, CRYPTO '99) on 64-bit words: pairs of words, each added to a secret key word, are
//! multiplied and summed to 128 bits. Two different inputs collide with probability 2^-64 over the choice of the secret,
//! whatever the inputs: unlike a CRC, whose collisions do not depend on its seed, a guest cannot prepare packets that
//! fall into one bucket. It costs half a multiplication a word and needs no special instruction.
//!
//! This is the one module of the crate with `unsafe`: vectors of tags, prefetching, a hint to the compiler, and memory that the
//! system hands out zeroed.
#![allow(unsafe_code)]

use crate::key::{Key, WORDS};
use std::ops::{Deref, DerefMut};
use std::ptr::NonNull;

/// A seeded hash of words. Tables of one worker share it; it takes new secrets at each start.
#[derive(Clone)]
pub struct Hasher {
    secrets: [u64; WORDS],
}

/// A part of a key: a word and the bits of it that count.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Term {
    /// Index into [`Key::words`].
    pub word: usize,
    /// The bits that count.
    pub bits: u64,
}

impl Term {
    /// The word of `key` under the bits.
    #[inline(always)]
    pub fn of(&self, key: &Key) -> u64 {
        // The index is below `WORDS` by construction; `min` lets the compiler see it and drops the panic path.
        key.words[self.word.min(WORDS - 1)] & self.bits
    }
}

/// The words of `mask` that are not empty.
pub fn terms(mask: &Key) -> Box<[Term]> {
    mask.words
        .iter()
        .enumerate()
        .filter(|(_, bits)| **bits != 0)
        .map(|(word, &bits)| Term { word, bits })
        .collect()
}

/// One step of splitmix64: a full-period generator good enough to spread a seed.
pub fn splitmix(state: &mut u64) -> u64 {
    *state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
    let mut z = *state;
    z = (z ^ z >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ z >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ z >> 31
}

#[inline(always)]
fn product(a: u64, b: u64, secret: &[u64; 2]) -> u128 {
    scalar(a).wrapping_add(secret[0]) as u128 * scalar(b).wrapping_add(secret[1]) as u128
}

/// The same word, in a register of its own. Without this, the compiler puts words that are treated alike into one vector, of
/// which it has to take them out again one by one to multiply them, which costs more than all else.
#[inline(always)]
fn scalar(mut word: u64) -> u64 {
    // SAFETY: no instruction at all.
    unsafe {
        std::arch::asm!("/* {0} */", inout(reg) word, options(pure, nomem, nostack, preserves_flags));
    }
    word
}

impl Hasher {
    /// A hash whose secrets are drawn from `seed`, which should be random.
    pub fn new(seed: u64) -> Hasher {
        let mut state = seed;
        Hasher { secrets: std::array::from_fn(|_| splitmix(&mut state)) }
    }

    /// The hash of so many words (at most [`WORDS`]), in pairs, as [`Hasher::words`] makes it, whose salt is the lower half of this one.
    #[inline(always)]
    pub fn pairs<const N: usize>(&self, salt: u128, pairs: [[u64; 2]; N]) -> u64 {
        const { assert!(2 * N <= WORDS) };
        let (secrets, _) = self.secrets.as_chunks::<2>();
        let sum =
            (0..N).fold(salt, |sum, i| sum.wrapping_add(product(pairs[i][0], pairs[i][1], &secrets[i])));
        Self::finish(sum)
    }

    #[inline(always)]
    fn finish(sum: u128) -> u64 {
        let h = (sum as u64 ^ (sum >> 64) as u64).wrapping_mul(0x9e37_79b9_7f4a_7c15);
        h ^ h >> 32
    }

    /// The hash of `words` (at most [`WORDS`]) and of `salt`. Inputs of different length need different salts.
    #[inline]
    pub fn words(&self, words: &[u64], salt: u64) -> u64 {
        let (secrets, _) = self.secrets.as_chunks::<2>();
        // NH spreads differences of sums as evenly as sums, so a salt need not be multiplied.
        let mut sum = salt as u128;
        let (pairs, rest) = words.as_chunks::<2>();
        for (pair, secret) in pairs.iter().zip(secrets) {
            sum = sum.wrapping_add(product(pair[0], pair[1], secret));
        }
        if let ([last], Some(secret)) = (rest, secrets.get(pairs.len())) {
            sum = sum.wrapping_add(product(*last, 0, secret));
        }
        Self::finish(sum)
    }

    /// The hash of the parts of `key` that `terms` name.
    #[inline]
    pub fn terms(&self, terms: &[Term], key: &Key) -> u64 {
        let (secrets, _) = self.secrets.as_chunks::<2>();
        let mut sum = 0u128;
        let (pairs, rest) = terms.as_chunks::<2>();
        for (pair, secret) in pairs.iter().zip(secrets) {
            sum = sum.wrapping_add(product(pair[0].of(key), pair[1].of(key), secret));
        }
        if let ([last], Some(secret)) = (rest, secrets.get(pairs.len())) {
            sum = sum.wrapping_add(product(last.of(key), 0, secret));
        }
        Self::finish(sum)
    }
}

/// Sixteen tags: a bit for each that equals `tag`.
#[inline(always)]
pub fn match_16(tags: &[u8; 16], tag: u8) -> u32 {
    #[cfg(target_arch = "x86_64")]
    {
        use std::arch::x86_64::{_mm_cmpeq_epi8, _mm_loadu_si128, _mm_movemask_epi8, _mm_set1_epi8};
        // SAFETY: every x86-64 processor has SSE2; the unaligned load reads the array's 16 bytes.
        unsafe {
            let group = _mm_loadu_si128(tags.as_ptr().cast());
            _mm_movemask_epi8(_mm_cmpeq_epi8(group, _mm_set1_epi8(tag as i8))) as u32
        }
    }
    #[cfg(not(target_arch = "x86_64"))]
    portable::match_16(tags, tag)
}

/// Eight wide tags: a bit for each that equals `tag`.
#[inline(always)]
pub fn match_8(tags: &[u16; 8], tag: u16) -> u32 {
    #[cfg(target_arch = "x86_64")]
    {
        use std::arch::x86_64::{
            _mm_cmpeq_epi16, _mm_loadu_si128, _mm_movemask_epi8, _mm_packs_epi16, _mm_set1_epi16,
            _mm_setzero_si128,
        };
        // SAFETY: every x86-64 processor has SSE2; the unaligned load reads the array's 16 bytes.
        unsafe {
            let group = _mm_loadu_si128(tags.as_ptr().cast());
            let equal = _mm_cmpeq_epi16(group, _mm_set1_epi16(tag as i16));
            _mm_movemask_epi8(_mm_packs_epi16(equal, _mm_setzero_si128())) as u32
        }
    }
    #[cfg(not(target_arch = "x86_64"))]
    portable::match_8(tags, tag)
}

#[cfg(any(test, not(target_arch = "x86_64")))]
mod portable {
    pub fn match_16(tags: &[u8; 16], tag: u8) -> u32 {
        tags.iter().enumerate().fold(0, |bits, (i, &t)| bits | ((t == tag) as u32) << i)
    }

    pub fn match_8(tags: &[u16; 8], tag: u16) -> u32 {
        tags.iter().enumerate().fold(0, |bits, (i, &t)| bits | ((t == tag) as u32) << i)
    }
}

/// Asks for the cache line at `address`, to be read soon. Any address is allowed: a prefetch never faults.
#[inline(always)]
pub fn prefetch_read<T>(address: *const T) {
    #[cfg(target_arch = "x86_64")]
    // SAFETY: PREFETCHT0 reads nothing that the program can see and raises no fault, whatever the address.
    unsafe {
        std::arch::x86_64::_mm_prefetch::<{ std::arch::x86_64::_MM_HINT_T0 }>(address.cast());
    }
    #[cfg(not(target_arch = "x86_64"))]
    let _ = address;
}

/// Asks for the cache line at `address`, to be written soon. Any address is allowed.
#[inline(always)]
pub fn prefetch_write<T>(address: *const T) {
    #[cfg(target_arch = "x86_64")]
    // SAFETY: PREFETCHW changes the line's ownership but no data and raises no fault; where the processor lacks it, it
    // is a no-op.
    unsafe {
        std::arch::x86_64::_mm_prefetch::<{ std::arch::x86_64::_MM_HINT_ET0 }>(address.cast());
    }
    #[cfg(not(target_arch = "x86_64"))]
    let _ = address;
}

/// A type of which all-zero bytes are a value, and which needs no drop.
///
/// # Safety
/// Each of its fields is an integer, a boolean, or an array or structure of such.
pub(crate) unsafe trait Zeroable {}

// SAFETY: integers only; see the definition.
unsafe impl Zeroable for crate::l1::Bucket {}
// SAFETY: integers only; see the definition.
unsafe impl Zeroable for crate::l1::Entry {}
// SAFETY: integers only; see the definition.
unsafe impl Zeroable for crate::l1::Tail {}
// SAFETY: integers only; see the definition.
unsafe impl Zeroable for crate::l1::Rest {}
// SAFETY: atomic integers and a boolean only; see the definition.
unsafe impl Zeroable for crate::slab::Slot {}

/// So many values that are zero at first, in memory that the system gives as it is used: pages that were never touched cost
/// nothing. (The standard library's allocator writes zeroes over memory of such alignment.)
pub(crate) struct Zeroed<T: Zeroable> {
    start: NonNull<T>,
    len: usize,
    /// The values, and what comes before the first boundary of their alignment.
    _memory: Vec<u64>,
}

impl<T: Zeroable> Zeroed<T> {
    pub(crate) fn new(len: usize) -> Zeroed<T> {
        const { assert!(align_of::<T>() >= align_of::<u64>() && size_of::<T>().is_multiple_of(size_of::<u64>())) };
        let words = size_of::<T>() / size_of::<u64>();
        let before = align_of::<T>() / size_of::<u64>();
        let mut memory = vec![0u64; len * words + before];
        let start = memory.as_mut_ptr();
        // SAFETY: `align_offset` of a pointer to words is less than `before`, so it stays inside of the memory.
        let start = unsafe { NonNull::new_unchecked(start.add(start.align_offset(align_of::<T>()))) };
        Zeroed { start: start.cast(), len, _memory: memory }
    }
}

impl<T: Zeroable> Deref for Zeroed<T> {
    type Target = [T];

    #[inline(always)]
    fn deref(&self) -> &[T] {
        // SAFETY: `start` is aligned, and behind it are `len` values in memory that is not used otherwise: all zero, which is a value
        // of `T`, or what has been written through this.
        unsafe { std::slice::from_raw_parts(self.start.as_ptr(), self.len) }
    }
}

impl<T: Zeroable> DerefMut for Zeroed<T> {
    #[inline(always)]
    fn deref_mut(&mut self) -> &mut [T] {
        // SAFETY: as above, and the borrow is unique.
        unsafe { std::slice::from_raw_parts_mut(self.start.as_ptr(), self.len) }
    }
}

// SAFETY: it owns its values as a box does.
unsafe impl<T: Zeroable + Send> Send for Zeroed<T> {}
// SAFETY: as above.
unsafe impl<T: Zeroable + Sync> Sync for Zeroed<T> {}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn groups_equal_the_portable_code(a: [u8; 16], b: [u16; 8], i in 0usize..16, tag8: u8, tag16: u16) {
            for tag in [a[i], tag8] {
                prop_assert_eq!(match_16(&a, tag), portable::match_16(&a, tag));
            }
            for tag in [b[i % 8], tag16] {
                prop_assert_eq!(match_8(&b, tag), portable::match_8(&b, tag));
            }
        }

        #[test]
        fn only_the_bits_that_count_are_hashed(words: [u64; 7], seed: u64, n in 1usize..8, word in 0usize..7, bit in 0u32..64) {
            let mut key = Key::default();
            let list: Vec<_> = (0..n).map(|i| Term { word: i * 3, bits: u64::MAX << (i * 9) }).collect();
            (0..7).for_each(|i| key.words[i * 3] = words[i]);
            let hasher = Hasher::new(seed);
            let before = hasher.terms(&list, &key);
            key.words[word * 3] ^= 1 << bit;
            let counts = list.get(word).is_some_and(|term| term.bits >> bit & 1 != 0);
            prop_assert_eq!(hasher.terms(&list, &key) != before, counts);
        }

        #[test]
        fn words_salt_and_seed_all_count(words: [u64; 7], seed: u64, n in 1usize..8, bit in 0u32..64) {
            let hash = Hasher::new(seed).words(&words[..n], 5);
            let mut other = words;
            other[n - 1] ^= 1 << bit;
            prop_assert_ne!(Hasher::new(seed).words(&other[..n], 5), hash);
            prop_assert_ne!(Hasher::new(seed).words(&words[..n], 5 ^ 1 << bit), hash);
            prop_assert_ne!(Hasher::new(!seed).words(&words[..n], 5), hash);
        }
    }

    /// Inputs as a scanning guest makes them (counting in one word) must spread evenly over buckets and tags.
    #[test]
    fn counting_keys_spread() {
        const N: usize = 1 << 16;
        const BUCKETS: usize = 1 << 8;
        for seed in 0..8 {
            let hasher = Hasher::new(seed);
            for (word, shift) in [(0, 0), (0, 32), (1, 16), (4, 48), (3, 63 - 16)] {
                for part in [0, 16, 32, 56] {
                    let mut load = [0usize; BUCKETS];
                    for i in 0..N {
                        let mut words = [0x0102_0304_0506_0708u64; 5];
                        words[word] ^= (i as u64) << shift;
                        load[(hasher.words(&words, 9) >> part) as usize % BUCKETS] += 1;
                    }
                    // Mean 256, standard deviation 16: six deviations.
                    let (min, max) = (load.iter().min().unwrap(), load.iter().max().unwrap());
                    assert!(*min > 256 - 96 && *max < 256 + 96, "word {word}, bits {part}: {min}..{max}");
                }
            }
        }
    }

    #[test]
    fn collisions_depend_on_the_seed() {
        let keys: Vec<[u64; 3]> = (0..4096u64).map(|i| [i << 40, i, !i]).collect();
        let collide = |seed: u64| {
            let hasher = Hasher::new(seed);
            let mut pairs = std::collections::HashMap::<u64, Vec<usize>>::new();
            for (i, key) in keys.iter().enumerate() {
                pairs.entry(hasher.words(key, 0) >> 52).or_default().push(i);
            }
            let mut sets: Vec<_> = pairs.into_values().filter(|v| v.len() > 1).collect();
            sets.sort();
            sets
        };
        let (a, b) = (collide(1), collide(2));
        let shared = a.iter().filter(|set| b.contains(set)).count();
        assert!(
            !a.is_empty() && shared * 100 < a.len(),
            "{shared} of {} sets collide under both seeds",
            a.len()
        );
    }

    #[test]
    fn one_bit_changes_half_of_the_hash() {
        let hasher = Hasher::new(77);
        let base = [1u64, 2, 3, 4, 5];
        let mut changed = 0;
        for bit in 0..320 {
            let mut words = base;
            words[bit / 64] ^= 1 << (bit % 64);
            changed += (hasher.words(&words, 0) ^ hasher.words(&base, 0)).count_ones();
        }
        let mean = changed as f64 / 320.0;
        assert!((28.0..36.0).contains(&mean), "{mean} bits change on average");
    }

    #[test]
    fn zeroed_memory_is_aligned_and_as_it_was_left() {
        let entries = Zeroed::<crate::slab::Slot>::new(1000);
        assert_eq!((entries.len(), entries.as_ptr() as usize % 64), (1000, 0));
        assert!(entries.iter().all(|slot| !slot.is_due()));
        entries[0].credit(1, 0, 2);
        entries[999].credit(3, 4, 5);
        let moved = entries;
        assert!(format!("{:?}", moved[999]).contains("tcp_flags: 4"), "{:?}", moved[999]);
        assert_eq!(Zeroed::<crate::l1::Entry>::new(0).len(), 0);
        prefetch_read(&moved[999]);
        prefetch_write(std::ptr::null::<u8>());
    }
}
