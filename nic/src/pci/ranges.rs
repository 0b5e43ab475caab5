//! An allocator of address ranges: IOVAs, or what stands for them.

use std::collections::BTreeMap;

/// Free ranges of a 64-bit address space, first fit, lowest first. It hands out numbers and touches no memory.
#[derive(Clone, Debug, Default)]
pub struct Ranges {
    /// Start and length of each free range; neighbours are always merged.
    free: BTreeMap<u64, u64>,
    /// Start and length of each allocation.
    used: BTreeMap<u64, u64>,
}

impl Ranges {
    /// An allocator of these ranges, each given by its first and last address. They may overlap and come in any order.
    pub fn new(ranges: impl IntoIterator<Item = (u64, u64)>) -> Ranges {
        let mut sorted: Vec<_> = ranges.into_iter().filter(|(first, last)| first <= last).collect();
        sorted.sort_unstable();
        let mut merged: Vec<(u64, u64)> = Vec::new();
        for (first, last) in sorted {
            match merged.last_mut() {
                Some((_, end)) if first <= end.saturating_add(1) => *end = last.max(*end),
                _ => merged.push((first, last)),
            }
        }
        // The very last address is left out, so that a length always fits into 64 bits.
        let free = merged.into_iter().map(|(first, last)| (first, last.saturating_add(1) - first));
        Ranges { free: free.filter(|&(_, len)| len > 0).collect(), used: BTreeMap::new() }
    }

    /// Takes `len` bytes (not 0) at a multiple of `align` (a power of two).
    pub fn allocate(&mut self, len: u64, align: u64) -> Option<u64> {
        if len == 0 || !align.is_power_of_two() {
            return None;
        }
        let (start, size, at) = self.free.iter().find_map(|(&start, &size)| {
            let at = start.checked_next_multiple_of(align)?;
            let end = at.checked_add(len)?;
            (end <= start.checked_add(size)?).then_some((start, size, at))
        })?;
        self.free.remove(&start);
        if at > start {
            self.free.insert(start, at - start);
        }
        if at + len < start + size {
            self.free.insert(at + len, start + size - at - len);
        }
        self.used.insert(at, len);
        Some(at)
    }

    /// Gives back what [`Ranges::allocate`] has given. Says whether there was such an allocation.
    pub fn release(&mut self, at: u64) -> bool {
        let Some(mut len) = self.used.remove(&at) else { return false };
        let mut start = at;
        if let Some((&before, &size)) = self.free.range(..at).next_back()
            && before + size == at
        {
            self.free.remove(&before);
            (start, len) = (before, len + size);
        }
        if let Some(size) = self.free.remove(&(start + len)) {
            len += size;
        }
        self.free.insert(start, len);
        true
    }

    /// Bytes that are free, in all ranges together.
    pub fn available(&self) -> u64 {
        self.free.values().fold(0, |sum, len| sum.saturating_add(*len))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn holes_are_respected_and_alignment_is_kept() {
        let mut ranges = Ranges::new([(0xfef0_0000, 0x7f_ffff_ffff), (0x1000, 0xfedf_ffff)]);
        let big = ranges.allocate(0xfe00_0000, 0x20_0000).unwrap();
        assert_eq!(big, 0x20_0000);
        let next = ranges.allocate(0x100_0000, 0x20_0000).unwrap();
        assert!(next >= 0xfef0_0000, "{next:#x} lies in the hole of the interrupts");
        assert!(ranges.release(big) && !ranges.release(big));
        assert_eq!(ranges.allocate(0x1000, 0x1000), Some(0x1000));
    }

    #[test]
    fn impossible_requests_are_refused() {
        let mut ranges = Ranges::new([(0, 0xfff), (5, 3), (u64::MAX, u64::MAX)]);
        assert_eq!(ranges.allocate(0x1001, 1), None);
        assert_eq!(ranges.allocate(0, 1), None);
        assert_eq!(ranges.allocate(1, 3), None);
        assert_eq!(ranges.allocate(u64::MAX, 1), None);
        assert_eq!(ranges.allocate(0x1000, 0x1000), Some(0));
        assert_eq!(ranges.available(), 0);
    }

    proptest! {
        #[test]
        fn allocations_never_overlap_and_all_come_back(
            steps in prop::collection::vec((any::<bool>(), 1u64..5000, 0u32..13), 1..200)
        ) {
            let mut ranges = Ranges::new([(100, 20_000), (30_000, 60_000)]);
            let total = ranges.available();
            let mut held: Vec<(u64, u64)> = Vec::new();
            for (free, len, shift) in steps {
                if free && !held.is_empty() {
                    let (at, _) = held.swap_remove(len as usize % held.len());
                    prop_assert!(ranges.release(at));
                } else if let Some(at) = ranges.allocate(len, 1 << shift) {
                    prop_assert_eq!(at % (1 << shift), 0);
                    let end = at + len;
                    prop_assert!(at >= 100 && end <= 60_001 && (end <= 20_001 || at >= 30_000));
                    prop_assert!(held.iter().all(|&(other, size)| end <= other || other + size <= at));
                    held.push((at, len));
                }
                let taken: u64 = held.iter().map(|&(_, len)| len).sum();
                prop_assert_eq!(ranges.available() + taken, total);
            }
            for (at, _) in held {
                prop_assert!(ranges.release(at));
            }
            prop_assert_eq!(ranges.available(), total);
            prop_assert_eq!(ranges.free.len(), 2, "neighbours are merged again");
        }
    }
}
