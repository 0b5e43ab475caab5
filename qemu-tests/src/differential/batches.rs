//! Which cases are run at once.

use std::collections::BTreeMap;

use super::{Case, generate};

/// What cases that are run at once have in common: their `vlan_limit`, which Open vSwitch has for all its bridges; whether
/// they learn, and whether their packets are sent one by one, so that none waits for the other kind.
type Kind = (usize, bool, bool);

/// The cases of successive seeds, as many at once as fit.
pub struct Batches {
    seed: u64,
    left: u64,
    most: usize,
    open: BTreeMap<Kind, Vec<Case>>,
}

impl Batches {
    /// This many cases from `seed` on, `most` at once.
    pub fn new(seed: u64, cases: u64, most: usize) -> Self {
        Self { seed, left: cases, most, open: BTreeMap::new() }
    }
}

impl Iterator for Batches {
    type Item = Vec<Case>;

    fn next(&mut self) -> Option<Vec<Case>> {
        while self.left > 0 {
            let case = generate::case(self.seed);
            self.seed = self.seed.wrapping_add(1);
            self.left -= 1;
            let kind = (case.vlan_limit, case.learns, case.burst == 1);
            let open = self.open.entry(kind).or_default();
            open.push(case);
            if open.len() >= self.most {
                return self.open.remove(&kind);
            }
        }
        self.open.pop_first().map(|(_, cases)| cases)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_case_is_in_one_batch_of_its_kind() {
        let mut seeds = Vec::new();
        for batch in Batches::new(7, 100, 8) {
            assert!((1..=8).contains(&batch.len()));
            let kinds = batch.iter().map(|case| (case.vlan_limit, case.learns, case.burst == 1));
            assert_eq!(kinds.collect::<std::collections::BTreeSet<_>>().len(), 1);
            seeds.extend(batch.iter().map(|case| case.seed));
        }
        seeds.sort_unstable();
        assert_eq!(seeds, (7..107).collect::<Vec<_>>());
    }
}
