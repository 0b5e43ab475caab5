//! Processors for workers.

use rustix::thread::{CpuSet, sched_setaffinity};
use std::io;

/// Keeps the calling thread on one processor.
pub fn pin(cpu: usize) -> io::Result<()> {
    if cpu >= CpuSet::MAX_CPU {
        return Err(io::Error::from(io::ErrorKind::InvalidInput));
    }
    let mut set = CpuSet::new();
    set.set(cpu);
    Ok(sched_setaffinity(None, &set)?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_processor_that_does_not_exist_is_refused() {
        assert!(pin(CpuSet::MAX_CPU).is_err());
        std::thread::spawn(|| pin(0).unwrap()).join().unwrap();
    }
}
