//! Time for the workers: cycles to account by, milliseconds to age by.
#![allow(unsafe_code)] // one instruction that reads a counter

use std::sync::OnceLock;
use std::time::Instant;

/// The processor's constant-rate counter: cheap enough to read twice a burst. Nanoseconds where there is none.
#[inline]
pub fn cycles() -> u64 {
    #[cfg(target_arch = "x86_64")]
    {
        // SAFETY: RDTSC is part of the x86-64 baseline, reads a counter and touches no memory.
        unsafe { core::arch::x86_64::_rdtsc() }
    }
    #[cfg(target_arch = "aarch64")]
    {
        let count: u64;
        // SAFETY: CNTVCT_EL0 is readable from user space under Linux; the instruction touches no memory.
        unsafe { core::arch::asm!("mrs {}, cntvct_el0", out(reg) count, options(nomem, nostack)) };
        count
    }
    #[cfg(not(any(target_arch = "x86_64", target_arch = "aarch64")))]
    {
        nanos()
    }
}

fn start() -> Instant {
    static START: OnceLock<Instant> = OnceLock::new();
    *START.get_or_init(Instant::now)
}

/// Nanoseconds since the daemon's first look at the clock.
pub fn nanos() -> u64 {
    start().elapsed().as_nanos() as u64
}

/// Milliseconds since the daemon's first look at the clock, and one: 0 stands for "never".
pub fn millis() -> u64 {
    nanos() / 1_000_000 + 1
}

/// Cycles in a microsecond, measured once (about a millisecond's work at start).
pub fn cycles_per_micro() -> u64 {
    static RATE: OnceLock<u64> = OnceLock::new();
    *RATE.get_or_init(|| {
        let (c0, t0) = (cycles(), nanos());
        while nanos() - t0 < 1_000_000 {
            std::hint::spin_loop();
        }
        ((cycles() - c0) * 1000 / (nanos() - t0).max(1)).max(1)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn clocks_go_forward() {
        let (c, n) = (cycles(), nanos());
        assert!(cycles_per_micro() > 0);
        assert!(cycles() > c && nanos() > n && millis() > 0);
    }
}
