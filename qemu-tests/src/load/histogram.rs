//! Times in cycles, counted in classes that are 1/32 of their size wide.

const STEPS: u64 = 32;

/// Counts of values, each known to 3 %.
#[derive(Clone, Debug)]
pub struct Histogram {
    counts: Vec<u64>,
    total: u64,
    greatest: u64,
}

impl Default for Histogram {
    fn default() -> Self {
        Self { counts: vec![0; (class(u64::MAX) + 1) as usize], total: 0, greatest: 0 }
    }
}

fn class(value: u64) -> u64 {
    if value < STEPS {
        return value;
    }
    let shift = u64::from(value.ilog2()) - u64::from(STEPS.ilog2());
    (shift + 1) * STEPS + (value >> shift) - STEPS
}

/// The least value of a class.
fn least(class: u64) -> u64 {
    match (class / STEPS, class % STEPS) {
        (0, low) => low,
        (scale, low) => (STEPS + low) << (scale - 1),
    }
}

impl Histogram {
    /// Counts a value.
    #[inline]
    pub fn add(&mut self, value: u64) {
        self.counts[class(value) as usize] += 1;
        self.total += 1;
        self.greatest = self.greatest.max(value);
    }

    /// Adds what another has counted.
    pub fn merge(&mut self, other: &Self) {
        self.counts.iter_mut().zip(&other.counts).for_each(|(sum, count)| *sum += count);
        self.total += other.total;
        self.greatest = self.greatest.max(other.greatest);
    }

    /// Forgets everything.
    pub fn clear(&mut self) {
        self.counts.fill(0);
        (self.total, self.greatest) = (0, 0);
    }

    /// How many values there are.
    pub fn count(&self) -> u64 {
        self.total
    }

    /// The greatest.
    pub fn greatest(&self) -> u64 {
        self.greatest
    }

    /// A value that `share` of all do not exceed, 0 without any.
    pub fn percentile(&self, share: f64) -> u64 {
        let wanted = (self.total as f64 * share).ceil() as u64;
        let mut sum = 0;
        for (class, &count) in self.counts.iter().enumerate() {
            sum += count;
            if sum >= wanted && count > 0 {
                return least(class as u64 + 1).wrapping_sub(1).min(self.greatest);
            }
        }
        0
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn classes_are_contiguous_and_narrow() {
        let last = class(u64::MAX);
        for index in 0..last {
            let (low, high) = (least(index), least(index + 1) - 1);
            assert!(class(low) == index && class(high) == index, "{index}: {low} to {high}");
            assert!((high - low) * STEPS <= low.max(STEPS), "{index}: {low} to {high}");
        }
    }

    #[test]
    fn percentiles_are_those_of_the_values() {
        let mut histogram = Histogram::default();
        assert_eq!(histogram.percentile(0.5), 0);
        (1..=1000).for_each(|value| histogram.add(value * 100));
        for (share, exact) in [(0.5, 50_000.0), (0.99, 99_000.0), (0.001, 100.0)] {
            let got = histogram.percentile(share) as f64;
            assert!(got >= exact && got < exact * 1.04, "{share}: {got}");
        }
        assert_eq!(histogram.percentile(1.0), 100_000);
        let mut twice = histogram.clone();
        twice.merge(&histogram);
        assert_eq!((twice.count(), twice.greatest()), (2000, 100_000));
        twice.clear();
        assert_eq!((twice.count(), twice.percentile(0.9)), (0, 0));
    }
}
