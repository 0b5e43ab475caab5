//! Where a guest's memory is: how large its pages are, how much of it the guest has used, on which NUMA nodes. What it has used is
//! put into our page tables by a thread of its own, so that no worker waits for the kernel to do that.

use std::collections::BTreeMap;
use std::os::unix::fs::MetadataExt;
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};
use std::sync::{Arc, Mutex, OnceLock, PoisonError, Weak};
use std::time::{Duration, Instant};

use rustix::fs::fstatfs;
use vm_memory::{FileOffset, GuestMemoryBackend, GuestMemoryMmap, GuestMemoryRegion, MemoryRegionAddress};

use crate::hugepages;
use crate::numa;

/// A guest that boots uses memory all the time, one that runs for long little that is new: memory is looked at as soon as it is
/// shared, then after this time, and each time after twice as long, up to [`SLOWEST`].
const FIRST: Duration = Duration::from_secs(1);
const SLOWEST: Duration = Duration::from_secs(3600);
/// For the nodes, the kernel walks all that we have mapped: not before so many times what it took last.
const SPARING: u32 = 100;
/// The types of tmpfs, which memfds have too, and of hugetlbfs (linux/magic.h).
const TMPFS_MAGIC: rustix::fs::FsWord = 0x0102_1994;
const HUGETLBFS_MAGIC: rustix::fs::FsWord = 0x9584_58f6;

/// What is known of a guest's memory.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Placement {
    /// Bytes that it shares with us.
    pub shared: u64,
    /// Of them, what it has used when it was last looked at.
    pub used: u64,
    /// The size of its pages in bytes; the smallest if it has several.
    pub page: u64,
    /// On which NUMA nodes that is.
    pub nodes: numa::Bytes,
}

/// A region of it in our address space.
#[derive(Debug)]
struct Range {
    start: usize,
    len: usize,
    /// Where it is in which file, of which file system.
    file: FileOffset,
    system: rustix::fs::FsWord,
    /// Its size of pages.
    page: u64,
}

impl Range {
    /// Maps what the guest has used, while it is `wanted`. Gives how much that is in bytes, as far as the file system tells.
    fn map(&self, wanted: impl Fn() -> bool) -> u64 {
        let place = (self.start, self.len);
        match self.system {
            TMPFS_MAGIC => hugepages::map_used(self.file.file(), self.file.start(), place, wanted),
            // It does not say which pages it has. If these are not all, the others are the pool's, which we must not take.
            HUGETLBFS_MAGIC => {
                let Ok(file) = self.file.file().metadata() else { return 0 };
                let there = file.blocks() * 512;
                if there >= file.len() {
                    hugepages::map(place, wanted);
                }
                there.min(self.len as u64)
            }
            // To map what is on a disk would be to read it.
            _ => 0,
        }
    }
}

/// A guest's memory, mapped as long as this exists.
#[derive(Debug)]
pub struct Pages {
    ranges: Vec<Range>,
    placement: Mutex<Placement>,
    _mapping: Arc<GuestMemoryMmap<()>>,
}

impl Pages {
    /// The pages of a guest's memory; they are looked at from [`Pages::keep`] on.
    pub(super) fn new(mapping: Arc<GuestMemoryMmap<()>>) -> Pages {
        let range = |region: &vm_memory::GuestRegionMmap| {
            let start = region.get_host_address(MemoryRegionAddress(0)).ok()?.addr();
            let file = region.file_offset()?.clone();
            let system = fstatfs(file.file()).ok()?;
            let page = system.f_bsize as u64;
            Some(Range { start, len: region.len() as usize, file, system: system.f_type, page })
        };
        let ranges: Vec<Range> = mapping.iter().filter_map(range).collect();
        let shared = ranges.iter().map(|range| range.len as u64).sum();
        let page = ranges.iter().map(|range| range.page).min().unwrap_or(0);
        let placement = Mutex::new(Placement { shared, page, ..Placement::default() });
        Pages { ranges, placement, _mapping: mapping }
    }

    /// What was known when they were looked at last.
    pub fn placement(&self) -> Placement {
        self.placement.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Has them looked at from now on, as long as somebody else has this object.
    pub fn keep(self: &Arc<Self>) {
        static KEEPER: OnceLock<Option<Sender<Weak<Pages>>>> = OnceLock::new();
        let keeper = KEEPER.get_or_init(|| {
            let (sender, news) = channel();
            let thread = std::thread::Builder::new().name("memory".into()).spawn(move || keep_all(&news));
            thread
                .inspect_err(|error| log::warn!("guests' memory is mapped as it is used, no thread: {error}"))
                .ok()
                .map(|_| sender)
        });
        if let Some(keeper) = keeper {
            // Its end is that of the process.
            let _ = keeper.send(Arc::downgrade(self));
        }
    }

    /// Maps what the guest has used. Gives up when nobody else has the memory any more.
    fn map(self: &Arc<Self>) {
        let is_wanted = || Arc::strong_count(self) > 1;
        let used = self.ranges.iter().map(|range| range.map(is_wanted)).sum();
        if !is_wanted() {
            return;
        }
        self.placement.lock().unwrap_or_else(PoisonError::into_inner).used = used;
    }

    /// Notes on which nodes it is, of all our mappings; all is on the only node where none are given.
    fn locate(&self, mappings: Option<&BTreeMap<usize, numa::Bytes>>) {
        let mut placement = self.placement.lock().unwrap_or_else(PoisonError::into_inner);
        let Some(mappings) = mappings else {
            placement.nodes = numa::Bytes::from([(0, placement.used)]);
            return;
        };
        let mut nodes = numa::Bytes::new();
        for range in &self.ranges {
            let parts = mappings.range(range.start..range.start + range.len);
            parts.flat_map(|(_, bytes)| bytes).for_each(|(node, bytes)| {
                *nodes.entry(*node).or_default() += bytes;
            });
        }
        placement.nodes = nodes;
    }
}

/// Memory that is looked at: when next, and how long after that again.
struct Kept {
    pages: Weak<Pages>,
    due: Instant,
    pause: Duration,
}

/// Looks at the memory of all guests, for as long as the process lives.
fn keep_all(news: &Receiver<Weak<Pages>>) {
    let mut kept: Vec<Kept> = Vec::new();
    let has_nodes = numa::has_several();
    // When nodes may be asked for again, and whether that is to be done.
    let (mut sparing, mut looked) = (Instant::now(), false);
    loop {
        let next = kept.iter().map(|kept| kept.due).chain(looked.then_some(sparing)).min();
        let wait = next.map_or(SLOWEST, |due| due.saturating_duration_since(Instant::now()));
        match news.recv_timeout(wait) {
            Ok(pages) => kept.push(Kept { pages, due: Instant::now(), pause: FIRST }),
            Err(RecvTimeoutError::Timeout) => {}
            Err(RecvTimeoutError::Disconnected) => return,
        }
        let now = Instant::now();
        kept.retain_mut(|kept| {
            let Some(pages) = kept.pages.upgrade() else { return false };
            if kept.due <= now {
                pages.map();
                looked = true;
                kept.due = Instant::now() + kept.pause;
                kept.pause = (kept.pause * 2).min(SLOWEST);
            }
            true
        });
        let begin = Instant::now();
        if looked && (!has_nodes || begin >= sparing) {
            looked = false;
            let mappings = has_nodes.then(numa::own_mappings);
            let there = kept.iter().filter_map(|kept| kept.pages.upgrade());
            there.for_each(|pages| pages.locate(mappings.as_ref()));
            sparing = begin + begin.elapsed() * SPARING;
        }
    }
}
