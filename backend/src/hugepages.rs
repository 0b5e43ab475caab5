//! Large tables on huge pages, where the system gives them: a lookup among a million flows then waits for lines of memory, and
//! not for where these lie too.
#![allow(unsafe_code)] // advice about memory, which changes nothing in it

use rustix::mm::{Advice, madvise};

/// What the system's page size is at least, and at most on the machines that this runs on.
const PAGE: (usize, usize) = (1 << 12, 1 << 16);
/// Smaller memory has no room for a huge page.
const WORTHWHILE: usize = 1 << 21;

/// Asks for huge pages for memory that begins at `start` and is `len` bytes long, as its pages are used for the first time.
/// Where the system has none it stays as it is.
pub fn advise((start, len): (*const u8, usize)) {
    if len < WORTHWHILE {
        return;
    }
    let skip = start.align_offset(PAGE.1);
    let len = len.saturating_sub(skip) & !(PAGE.0 - 1);
    // SAFETY: whatever is at these addresses, the advice changes no byte of it and no right to it; of addresses that are not
    // mapped the system says so, which changes nothing either.
    let _ = unsafe { madvise(start.wrapping_add(skip).cast_mut().cast(), len, Advice::LinuxHugepage) };
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn advice_leaves_memory_as_it_is() {
        let memory: Vec<u8> = (0..3 * WORTHWHILE).map(|i| (i % 251) as u8).collect();
        advise((memory.as_ptr(), memory.len()));
        advise((memory[1..].as_ptr(), 10));
        assert!(memory.iter().enumerate().all(|(i, &byte)| byte == (i % 251) as u8));
    }
}
