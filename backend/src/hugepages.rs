//! Large tables on huge pages, where the system gives them: a lookup among a million flows then waits for lines of memory, and
//! not for where these lie too. And memory whose pages are there before a worker needs them, on the worker's NUMA node.
#![allow(unsafe_code)] // advice about memory and questions about it, which change nothing in it

use rustix::mm::{Advice, madvise};
use std::ops::Range;

/// What the system's page size is at least, and at most on the machines that this runs on.
const PAGE: (usize, usize) = (1 << 12, 1 << 16);
/// Smaller memory has no room for a huge page.
const WORTHWHILE: usize = 1 << 21;
/// How much is looked at and asked for at once, in bytes: others wait for so much of the address space at most.
const STEP: usize = 1 << 26;
/// `MPOL_PREFERRED` of set_mempolicy(2).
const MPOL_PREFERRED: libc::c_ulong = 1;

/// Asks for huge pages for memory that begins at `start` and is `len` bytes long, as its pages are used for the first time.
/// Where the system has none it stays as it is.
pub fn advise((start, len): (*const u8, usize)) {
    if len < WORTHWHILE {
        return;
    }
    let skip = start.align_offset(PAGE.1);
    let len = len.saturating_sub(skip) & !(PAGE.0 - 1);
    madvise_range(start.addr() + skip..start.addr() + skip + len, Advice::LinuxHugepage);
}

/// Has the pages of private memory there at once, on NUMA node `node` if there is room and one is given. Where the system cannot
/// (Linux before 5.14), they come as they are used.
pub fn prefault((start, len): (*const u8, usize), node: Option<u32>) {
    let range = pages(start.addr()..start.addr() + len);
    if let Some(node) = node.filter(|node| *node < 64) {
        let mask = 1_u64 << node;
        // SAFETY: a policy changes no byte of whatever is at these addresses, and no right to it; the mask is one word that is
        // only read, of which the kernel takes one bit less than it is told.
        unsafe {
            libc::syscall(
                libc::SYS_mbind,
                range.start,
                range.len(),
                MPOL_PREFERRED,
                &raw const mask,
                65_usize,
                0,
            );
        }
    }
    madvise_range(range, Advice::LinuxPopulateWrite);
}

/// Has those pages of a shared mapping, which begins at `start` and is `len` bytes long, in our page tables that its file has.
/// Gives how many bytes these are.
pub fn map_used(start: usize, len: usize) -> u64 {
    let mut used = 0;
    let whole = pages(start..start + len);
    let mut there = vec![0_u8; STEP / page()];
    for from in whole.clone().step_by(STEP) {
        let range = from..whole.end.min(from + STEP);
        // SAFETY: a question, which changes nothing; the answer has a byte for each page, for which there is room.
        let asked = unsafe { libc::mincore(range.start as *mut _, range.len(), there.as_mut_ptr().cast()) };
        if asked != 0 {
            continue; // it is not mapped any more
        }
        let mut at = range.start;
        for run in there[..range.len() / page()].chunk_by(|a, b| a & 1 == b & 1) {
            let bytes = run.len() * page();
            if run[0] & 1 == 1 {
                madvise_range(at..at + bytes, Advice::LinuxPopulateRead);
                used += bytes as u64;
            }
            at += bytes;
        }
    }
    used
}

/// Has all of a shared mapping in our page tables whose memory is set aside for its owner, as on hugetlbfs. Whether it could.
pub fn map_all(start: usize, len: usize) -> bool {
    let step = |from| madvise_range(from..(start + len).min(from + STEP), Advice::LinuxPopulateRead);
    (start..start + len).step_by(STEP).all(step)
}

fn page() -> usize {
    rustix::param::page_size()
}

/// The pages that have these bytes.
fn pages(bytes: Range<usize>) -> Range<usize> {
    bytes.start & !(page() - 1)..bytes.end.next_multiple_of(page())
}

fn madvise_range(range: Range<usize>, advice: Advice) -> bool {
    // SAFETY: whatever is at these addresses, the advice changes no byte of it and no right to it; of addresses that are not
    // mapped the system says so, which changes nothing either.
    unsafe { madvise(range.start as *mut _, range.len(), advice) }.is_ok()
}

#[cfg(test)]
mod tests {
    use super::*;
    use vm_memory::{
        GuestAddress, GuestMemoryBackend, GuestMemoryMmap, GuestMemoryRegion, MemoryRegionAddress,
    };

    #[test]
    fn advice_leaves_memory_as_it_is() {
        let memory: Vec<u8> = (0..3 * WORTHWHILE).map(|i| (i % 251) as u8).collect();
        advise((memory.as_ptr(), memory.len()));
        advise((memory[1..].as_ptr(), 10));
        prefault((memory.as_ptr(), memory.len()), None);
        prefault((memory[5..].as_ptr(), 7), Some(0));
        assert!(memory.iter().enumerate().all(|(i, &byte)| byte == (i % 251) as u8));
    }

    /// Pages that the calling thread had to wait for so far (proc_pid_stat(5), fields 10 and 12).
    fn faults() -> u64 {
        let stat = std::fs::read_to_string("/proc/thread-self/stat").unwrap();
        let fields: Vec<&str> = stat.rsplit_once(')').unwrap().1.split_whitespace().collect();
        fields[10 - 3].parse::<u64>().unwrap() + fields[12 - 3].parse::<u64>().unwrap()
    }

    #[test]
    fn memory_that_was_asked_for_is_there() {
        let mut memory = vec![0_u8; 8 * WORTHWHILE];
        prefault((memory.as_ptr(), memory.len()), Some(0));
        let before = faults();
        memory.iter_mut().step_by(PAGE.0).for_each(|byte| *byte = 1);
        let waited = faults() - before;
        assert!(waited < 16, "{waited} faults in {} pages", memory.len() / PAGE.0);
    }

    #[test]
    fn only_what_was_used_is_mapped() {
        const LEN: usize = 64 << 12;
        let memfd = rustix::fs::memfd_create("guest", rustix::fs::MemfdFlags::CLOEXEC).unwrap();
        let file = std::fs::File::from(memfd);
        file.set_len(LEN as u64).unwrap();
        let offset = vm_memory::FileOffset::new(file.try_clone().unwrap(), 0);
        let ranges = [(GuestAddress(0), LEN, Some(offset))];
        let memory = GuestMemoryMmap::<()>::from_ranges_with_files(ranges).unwrap();
        let region = memory.find_region(GuestAddress(0)).unwrap();
        let start = region.get_host_address(MemoryRegionAddress(0)).unwrap().addr();
        assert_eq!(map_used(start, LEN), 0);
        // Somebody else writes it, as a guest does.
        std::os::unix::fs::FileExt::write_at(&file, &[7; 3 * 4096], 5 * 4096).unwrap();
        let used = (3 * 4096_u64).next_multiple_of(page() as u64);
        assert!((used..=used + page() as u64).contains(&map_used(start, LEN)));
        let blocks = std::os::unix::fs::MetadataExt::blocks(&file.metadata().unwrap());
        assert!(blocks * 512 <= used + page() as u64, "{blocks} blocks of 512 bytes are used");
    }
}
