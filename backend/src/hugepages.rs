//! Large tables on huge pages, where the system gives them: a lookup among a million flows then waits for lines of memory, and
//! not for where these lie too. And memory whose pages are there before a worker needs them, on the worker's NUMA node.
#![allow(unsafe_code)] // advice about memory, which changes nothing in it

use rustix::fs::{SeekFrom, seek};
use rustix::mm::{Advice, madvise};
use std::fs::File;
use std::ops::Range;

/// What the system's page size is at least, and at most on the machines that this runs on.
const PAGE: (usize, usize) = (1 << 12, 1 << 16);
/// Smaller memory has no room for a huge page.
const WORTHWHILE: usize = 1 << 21;
/// Smaller memory has no policy of its own: each is one more mapping for the kernel.
const OWN_PAGES: usize = 1 << 16;
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
    // A policy is for whole pages, so not for those that have something else too.
    let whole = start.addr().next_multiple_of(page())..(start.addr() + len) & !(page() - 1);
    if let Some(node) = node.filter(|node| *node < 64 && len >= OWN_PAGES) {
        let mask = 1_u64 << node;
        // SAFETY: a policy changes no byte of whatever is at these addresses, and no right to it; the mask is one word that is
        // only read, of which the kernel takes one bit less than it is told.
        unsafe {
            libc::syscall(
                libc::SYS_mbind,
                whole.start,
                whole.len(),
                MPOL_PREFERRED,
                &raw const mask,
                65_usize,
                0,
            );
        }
    }
    madvise_range(range, Advice::LinuxPopulateWrite);
}

/// Has those pages of a shared mapping, which begins at `start` and is `len` bytes long, in our page tables that its file in
/// memory (tmpfs, memfd) has from `offset` on. Gives how many bytes these are. Ends early when it is not `wanted` any more.
///
/// It is the file that is asked, for mincore(2) says of one that we may not write that all of it is there, and what is not would
/// then be made. That moves the file's position, which means nothing for memory.
pub fn map_used(file: &File, offset: u64, (start, len): (usize, usize), wanted: impl Fn() -> bool) -> u64 {
    let (mut used, mut at, end) = (0, offset, offset + len as u64);
    // An error says that there is no more.
    while let Ok(data) = seek(file, SeekFrom::Data(at))
        && data < end
        && let Ok(hole) = seek(file, SeekFrom::Hole(data))
        && hole > data
    {
        at = hole.min(end);
        if !map((start + (data - offset) as usize, (at - data) as usize), &wanted) {
            break;
        }
        used += at - data;
    }
    used
}

/// Has all of a shared mapping in our page tables; only for what is there already. False if it is not `wanted` any more.
pub fn map((start, len): (usize, usize), wanted: impl Fn() -> bool) -> bool {
    let range = pages(start..start + len);
    range.clone().step_by(STEP).all(|from| {
        let is_wanted = wanted();
        if is_wanted {
            madvise_range(from..range.end.min(from + STEP), Advice::LinuxPopulateRead);
        }
        is_wanted
    })
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
        let map_used = || map_used(&file, 0, (start, LEN), || true);
        assert_eq!(map_used(), 0);
        // Somebody else writes it, as a guest does.
        std::os::unix::fs::FileExt::write_at(&file, &[7; 3 * 4096], 5 * 4096).unwrap();
        let used = (3 * 4096_u64).next_multiple_of(page() as u64);
        assert!((used..=used + page() as u64).contains(&map_used()));
        let blocks = std::os::unix::fs::MetadataExt::blocks(&file.metadata().unwrap());
        assert!(blocks * 512 <= used + page() as u64, "{blocks} blocks of 512 bytes are used");
        assert_eq!(super::map_used(&file, 0, (start, LEN), || false), 0, "nobody wants it");
        assert_eq!(super::map_used(&file, 8 * 4096, (start, LEN / 2), || true), 0, "nothing is used there");
    }
}
