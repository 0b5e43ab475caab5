//! What of a packed ring must outlive us: where we are in it.
//!
//! A split ring's used index is in guest memory. Of a packed ring only the two sides know their places; the front-end learns
//! ours when it stops the ring, and when we are killed, never. So each ring has a page of a file, which stays when we go: what the
//! ring is, where its last entries went, and these entries themselves, written down before they are written to the ring. Whoever
//! comes after us finds them in the ring, or writes them there.
//!
//! A page is believed only for the ring that it was written for: the same places of the same memory files.
#![allow(unsafe_code)] // a file that is mapped

use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::ptr::{self, NonNull};
use std::sync::Arc;
use std::sync::atomic::{AtomicU16, AtomicU64, Ordering};

use rustix::mm::{MapFlags, ProtFlags, mmap, munmap};

use super::RingConfig;
use super::mem::GuestRegions;

/// Entries that are given back at once, at most.
pub(super) const MAX_ENTRIES: usize = 256;
/// Bytes of a page.
const PAGE: usize = 4096;
/// Of the layout below, and that there is anything.
const VALID: u64 = 0x7077_7269_6e67_0002;

/// A ring, by where it is in files: its size, then of each of its three parts device, inode and offset.
pub(super) type Identity = [u64; 10];

/// What is in the file for a ring. All is zero, or was written by us or one before us; nothing of it is taken for granted.
#[repr(C, align(4096))]
struct Page {
    valid: AtomicU64,
    identity: [AtomicU64; 10],
    /// From bit 0: the position of the last entries, the one after them, and their number; bit 63: they take one place each.
    head: AtomicU64,
    entries: [AtomicU64; MAX_ENTRIES],
    places: [AtomicU16; MAX_ENTRIES],
    /// From bit 0: the position that the front-end has named, and the two ends of the [`Gap`]; there is none if they are the same.
    named: AtomicU64,
}

const _: () = assert!(size_of::<Page>() == PAGE);
const SINGLES: u64 = 1 << 63;

/// A mapping of the file.
#[derive(Debug)]
struct Pages {
    start: NonNull<Page>,
    count: usize,
}

// SAFETY: the mapping is made of atomics, which may be shared, and lives as long as this.
unsafe impl Send for Pages {}
// SAFETY: as above.
unsafe impl Sync for Pages {}

impl Drop for Pages {
    fn drop(&mut self) {
        // SAFETY: this mapping was made by `Pages::map` and nobody has references into it any more. An error would mean that it
        // is not there.
        let _ = unsafe { munmap(self.start.as_ptr().cast(), self.count * PAGE) };
    }
}

impl Pages {
    /// Maps a file that is so many pages long.
    fn map(file: &File, count: usize) -> io::Result<Pages> {
        // SAFETY: a new mapping at an address of the kernel's choice touches nothing that exists.
        let start = unsafe {
            mmap(ptr::null_mut(), count * PAGE, ProtFlags::READ | ProtFlags::WRITE, MapFlags::SHARED, file, 0)
        }?;
        let start = NonNull::new(start.cast()).ok_or(io::ErrorKind::OutOfMemory)?;
        Ok(Pages { start, count })
    }
}

/// The pages of a port's rings.
#[derive(Debug)]
pub struct RingRecords {
    path: PathBuf,
    pages: Arc<Pages>,
}

impl RingRecords {
    /// Opens the file at `path`, or makes it, with its directory, for so many rings.
    ///
    /// # Errors
    /// The system's.
    pub fn open(path: &Path, rings: usize) -> io::Result<RingRecords> {
        if let Some(dir) = path.parent() {
            std::fs::create_dir_all(dir)?;
        }
        // Another's link is not to lead us elsewhere.
        let nofollow = rustix::fs::OFlags::NOFOLLOW.bits() as i32;
        let mut options = OpenOptions::new();
        options.read(true).write(true).create(true).truncate(false).mode(0o600).custom_flags(nofollow);
        let file = options.open(path)?;
        let len = rings.max(1) as u64 * PAGE as u64;
        // All of it is there at once, and never less than before, which somebody may still use: a page that is not there when it
        // is written to would be a signal.
        if file.metadata()?.len() < len {
            file.set_len(len)?;
        }
        rustix::fs::fallocate(&file, rustix::fs::FallocateFlags::empty(), 0, len)?;
        Ok(RingRecords { path: path.to_owned(), pages: Arc::new(Pages::map(&file, rings.max(1))?) })
    }

    /// That of ring `index`.
    pub fn ring(&self, index: usize) -> Option<RingRecord> {
        (index < self.pages.count).then(|| RingRecord { pages: self.pages.clone(), index })
    }

    /// Removes the file: nobody is to come after us.
    pub fn remove(&self) {
        if let Err(e) = std::fs::remove_file(&self.path)
            && e.kind() != io::ErrorKind::NotFound
        {
            log::warn!("{}: cannot be removed: {e}", self.path.display());
        }
    }
}

/// A ring's page.
#[derive(Debug, Clone)]
pub struct RingRecord {
    pages: Arc<Pages>,
    index: usize,
}

/// From where to where a front-end has given buffers back by itself, with no back-end there, ahead of where that one was: QEMU
/// drops what a guest sends while its link is down, and does so in a packed ring from the position on that it knows, the one of the
/// last start (`virtqueue_packed_drop_all`). The guest comes to them when all before them are back.
pub(super) type Gap = [u16; 2];

/// The last entries that were given back.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Batch {
    /// The position of the first one.
    pub at: u16,
    /// The position after the last one.
    pub after: u16,
    pub entries: Vec<u64>,
    /// How many places each takes; empty if all take one.
    pub places: Vec<u16>,
}

/// What a page says.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Last {
    /// The position that the front-end had named.
    pub named: u16,
    /// What was still to be passed.
    pub gap: Option<Gap>,
    pub batch: Batch,
}

impl RingRecord {
    fn page(&self) -> &Page {
        debug_assert!(self.index < self.pages.count);
        // SAFETY: `ring` has checked the index; the mapping has `count` pages, is aligned to them, lives as long as `pages`, and
        // all bytes are atomics, of which any value is one.
        unsafe { self.pages.start.add(self.index).as_ref() }
    }

    /// Begins anew, with this ring at this position, which the front-end calls `named`.
    pub(super) fn begin(&self, identity: &Identity, named: u16, at: u16, gap: Option<Gap>) {
        let page = self.page();
        page.valid.store(0, Ordering::Relaxed);
        for (to, &word) in page.identity.iter().zip(identity) {
            to.store(word, Ordering::Release);
        }
        let [from, to] = gap.unwrap_or_default();
        page.named.store(head(named, from, to.into(), false), Ordering::Release);
        page.head.store(head(at, at, 0, true), Ordering::Release);
        page.valid.store(VALID, Ordering::Release);
    }

    /// From now on the page says nothing: the front-end knows the position, or there is no ring.
    pub fn forget(&self) {
        self.page().valid.store(0, Ordering::Relaxed);
    }

    /// Writes down what is about to be written to the ring.
    #[inline]
    pub(super) fn note(&self, at: u16, after: u16, entries: &[u64], places: &[u16]) {
        let page = self.page();
        // Whenever we end, what was written is there in this order. What is said of older entries while these take their place is
        // not needed any more, as those are in the ring.
        for (to, &entry) in page.entries.iter().zip(entries) {
            to.store(entry, Ordering::Relaxed);
        }
        for (to, &places) in page.places.iter().zip(places) {
            to.store(places, Ordering::Relaxed);
        }
        let count = entries.len().min(MAX_ENTRIES);
        page.head.store(head(at, after, count as u64, places.is_empty()), Ordering::Release);
    }

    /// As if the front-end had named another position.
    #[cfg(test)]
    pub(super) fn rename(&self, named: u16) {
        self.page().named.store(named.into(), Ordering::Release);
    }

    /// The gap is passed, and the ring goes on behind it.
    pub(super) fn pass(&self, to: u16) {
        let page = self.page();
        page.head.store(head(to, to, 0, true), Ordering::Release);
        let named = page.named.load(Ordering::Relaxed) as u16;
        page.named.store(named.into(), Ordering::Release);
    }

    /// What was written down last of this ring.
    pub(super) fn last(&self, identity: &Identity) -> Option<Last> {
        let page = self.page();
        let known = page.identity.iter().zip(identity).all(|(a, &b)| a.load(Ordering::Relaxed) == b);
        if page.valid.load(Ordering::Acquire) != VALID || !known {
            return None;
        }
        let head = page.head.load(Ordering::Acquire);
        let count = usize::from((head >> 32) as u16).min(MAX_ENTRIES);
        let with_places = if head & SINGLES != 0 { 0 } else { count };
        let named = page.named.load(Ordering::Acquire);
        let gap = [(named >> 16) as u16, (named >> 32) as u16];
        let batch = Batch {
            at: head as u16,
            after: (head >> 16) as u16,
            entries: page.entries[..count].iter().map(|entry| entry.load(Ordering::Relaxed)).collect(),
            places: page.places[..with_places].iter().map(|places| places.load(Ordering::Relaxed)).collect(),
        };
        Some(Last { named: named as u16, gap: Some(gap).filter(|[from, to]| from != to), batch })
    }
}

fn head(at: u16, after: u16, count: u64, singles: bool) -> u64 {
    u64::from(at) | u64::from(after) << 16 | count << 32 | if singles { SINGLES } else { 0 }
}

/// Which ring this is, if its memory is of files that somebody who comes after us may see again.
pub(super) fn identify(regions: &GuestRegions, config: &RingConfig) -> Option<Identity> {
    let mut identity = [config.size.into(), 0, 0, 0, 0, 0, 0, 0, 0, 0];
    for (addr, to) in [config.desc, config.avail, config.used].into_iter().zip(identity[1..].chunks_mut(3)) {
        let (file, offset) = regions.file_at(addr)?;
        let metadata = file.metadata().ok()?;
        to.copy_from_slice(&[metadata.dev(), metadata.ino(), offset]);
    }
    Some(identity)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_written_down_is_found_by_who_opens_the_file_again() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("rings").join("p1");
        let open = || RingRecords::open(&path, 4).unwrap();
        let identity = [7; 10];
        let of = |records: &RingRecords, ring| records.ring(ring).unwrap().last(&identity);
        {
            let records = open();
            assert!(records.ring(4).is_none() && of(&records, 3).is_none());
            let ring = records.ring(3).unwrap();
            let start = Batch { at: 0x8002, after: 0x8002, entries: vec![], places: vec![] };
            ring.begin(&identity, 0x8001, 0x8002, None);
            assert_eq!(of(&records, 3), Some(Last { named: 0x8001, gap: None, batch: start.clone() }));
            ring.begin(&identity, 0x8005, 0x8002, Some([0x8003, 0x8005]));
            assert_eq!(
                of(&records, 3),
                Some(Last { named: 0x8005, gap: Some([0x8003, 0x8005]), batch: start.clone() })
            );
            ring.pass(0x8005);
            let passed = Batch { at: 0x8005, after: 0x8005, ..start };
            assert_eq!(of(&records, 3), Some(Last { named: 0x8005, gap: None, batch: passed }));
            ring.note(0x8002, 5, &[1, 2], &[3, 4]);
        }
        let records = open();
        let batch = Batch { at: 0x8002, after: 5, entries: vec![1, 2], places: vec![3, 4] };
        let last = Last { named: 0x8005, gap: None, batch };
        assert_eq!((of(&records, 3), of(&records, 2)), (Some(last), None));
        let ring = records.ring(3).unwrap();
        assert_eq!(ring.last(&[7, 7, 7, 7, 7, 7, 7, 7, 7, 8]), None, "of another ring");
        let many: Vec<u64> = (0..MAX_ENTRIES as u64).collect();
        ring.note(5, 6, &many, &[]);
        assert_eq!(
            ring.last(&identity).map(|last| (last.batch.entries, last.batch.places)),
            Some((many, vec![]))
        );
        ring.forget();
        assert_eq!(ring.last(&identity), None);
        records.remove();
        records.remove();
        assert!(!path.exists());
    }

    #[test]
    fn a_file_of_anything_is_no_danger() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("p1");
        std::fs::write(&path, vec![0xff; PAGE + 3]).unwrap();
        let records = RingRecords::open(&path, 2).unwrap();
        let ring = records.ring(0).unwrap();
        assert_eq!(ring.last(&[u64::MAX; 10]), None);
        ring.page().valid.store(VALID, Ordering::Relaxed);
        assert_eq!(ring.last(&[u64::MAX; 10]).map(|last| last.batch.entries.len()), Some(MAX_ENTRIES));
        std::os::unix::fs::symlink(&path, dir.path().join("link")).unwrap();
        assert!(RingRecords::open(&dir.path().join("link"), 1).is_err());
    }
}
