//! Numbers of outer headers: what the flows of a tunnel's port see of them is up to nine words, and one in a key.
//!
//! A number stands for these words for ever, and is not given twice, so two keys with one number have the same words there. What is
//! forgotten gets another number when it comes again, and is then in nobody's way: entries with the old one are not found any more.

use crate::hash::{Hasher, Term};
use crate::key::{Key, TUNNEL_WORDS};

/// Outer headers that are known at a time, at most.
const KNOWN: usize = WAYS * 1024;
/// Of them, those that have the same hash. The one with the oldest number is forgotten.
const WAYS: usize = 4;

#[derive(Clone, Copy, Default)]
struct Known {
    /// 0 if there is none.
    number: u64,
    words: [u64; TUNNEL_WORDS],
    /// Of the port's entries: other flows may see other words.
    generation: u32,
    port: u16,
}

/// The outer headers that were met lately.
pub struct Numbers {
    hasher: Hasher,
    known: Box<[Known]>,
    last: u64,
    /// The place that was asked for last.
    near: usize,
}

impl Numbers {
    /// None.
    pub fn new(hasher: Hasher) -> Numbers {
        Numbers { hasher, known: vec![Known::default(); KNOWN].into(), last: 0, near: 0 }
    }

    /// What it takes, in bytes.
    pub fn bytes(&self) -> usize {
        size_of_val(&*self.known)
    }

    /// The number of what a port's `terms`, of the words of tunnels, see in `key`.
    #[inline]
    pub fn number(&mut self, port: u16, generation: u32, terms: &[Term], key: &Key) -> u64 {
        // Mostly it is that of the packet before.
        let near = &self.known[self.near % KNOWN];
        if (near.generation, near.port) == (generation, port) && near.number != 0 {
            let words = terms.iter().zip(&near.words);
            if words.fold(0, |sum, (term, word)| sum | (term.of(key) ^ word)) == 0 {
                return near.number;
            }
        }
        let (first, seen) = self.first(port, generation, terms, key);
        let found = (first..first + WAYS).find(|&at| self.known[at].is(&seen));
        // Free places have the lowest number of all.
        let oldest = || (first..first + WAYS).min_by_key(|&at| self.known[at].number);
        let at = found.or_else(oldest).unwrap_or(first);
        if found.is_none() {
            self.last += 1;
            self.known[at] = Known { number: self.last, ..seen };
        }
        self.near = at;
        self.known[at].number
    }

    /// That number, if there is one.
    pub fn find(&self, port: u16, generation: u32, terms: &[Term], key: &Key) -> Option<u64> {
        let (first, seen) = self.first(port, generation, terms, key);
        let found = self.known[first..][..WAYS].iter().find(|known| known.is(&seen));
        found.map(|known| known.number)
    }

    /// The first of the places where it is if it is known, and all of it but its number.
    #[inline]
    fn first(&self, port: u16, generation: u32, terms: &[Term], key: &Key) -> (usize, Known) {
        let mut words = [0; TUNNEL_WORDS];
        words.iter_mut().zip(terms).for_each(|(word, term)| *word = term.of(key));
        let n = terms.len().min(TUNNEL_WORDS);
        let hash = self.hasher.words(&words[..n], u64::from(port));
        (hash as usize % (KNOWN / WAYS) * WAYS, Known { number: 0, words, generation, port })
    }
}

impl Known {
    #[inline]
    fn is(&self, seen: &Known) -> bool {
        let differ = self.words.iter().zip(&seen.words).fold(0, |sum, (a, b)| sum | (a ^ b));
        differ == 0 && (self.generation, self.port) == (seen.generation, seen.port) && self.number != 0
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::hash::terms;
    use crate::key::{Field, Mask};

    #[test]
    fn a_number_stands_for_the_same_words_for_ever() {
        let mut numbers = Numbers::new(Hasher::new(3));
        let mut mask = Mask::EMPTY;
        mask.set_exact(Field::TunId);
        mask.set_exact(Field::TunIpv4Src);
        let terms = terms(&mask.0);
        let key = |id: u128| {
            let mut key = Key::default();
            key.set(Field::TunId, id);
            key.set(Field::TunTtl, id); // nobody looks there
            key
        };
        let first = numbers.number(1, 1, &terms, &key(7));
        assert_eq!(numbers.number(1, 1, &terms, &key(7)), first);
        assert_eq!(numbers.find(1, 1, &terms, &key(7)), Some(first));
        for (port, generation, id) in [(2, 1, 7), (1, 2, 7), (1, 1, 8)] {
            assert_eq!(numbers.find(port, generation, &terms, &key(id)), None);
            assert_ne!(numbers.number(port, generation, &terms, &key(id)), first);
        }
        // More than are known at a time: each that is known has a number of its own, and none that was another's.
        let mut owner = std::collections::HashMap::new();
        for round in 0..3 {
            for id in 0..2 * KNOWN as u128 {
                let number = numbers.number(1, 1, &terms, &key(id));
                assert_eq!(*owner.entry(number).or_insert(id), id, "round {round}");
            }
        }
    }

    #[test]
    fn headers_with_one_hash_do_not_take_turns() {
        let mut numbers = Numbers::new(Hasher::new(3));
        let mut mask = Mask::EMPTY;
        mask.set_exact(Field::TunId);
        let terms = terms(&mask.0);
        let key = |id: u128| {
            let mut key = Key::default();
            key.set(Field::TunId, id);
            key
        };
        let place = |id: u128| numbers.first(1, 1, &terms, &key(id)).0;
        let home = place(0);
        let same: Vec<u128> = (0..).filter(|&id| place(id) == home).take(WAYS + 1).collect();
        let (kept, more) = same.split_at(WAYS);
        let given: Vec<u64> = kept.iter().map(|&id| numbers.number(1, 1, &terms, &key(id))).collect();
        for (&id, &number) in kept.iter().zip(&given) {
            assert_eq!(numbers.number(1, 1, &terms, &key(id)), number);
        }
        // One more takes the place of the first, and of no other.
        numbers.number(1, 1, &terms, &key(more[0]));
        let found: Vec<_> = kept.iter().map(|&id| numbers.find(1, 1, &terms, &key(id))).collect();
        let expected: Vec<_> =
            [None].into_iter().chain(given[1..].iter().map(|&number| Some(number))).collect();
        assert_eq!(found, expected);
    }
}
