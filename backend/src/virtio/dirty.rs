//! The log of dirty pages: while a guest migrates, its front-end wants to know which of its pages we have written
//! (`VHOST_F_LOG_ALL`, `VHOST_USER_SET_LOG_BASE`; vhost-user protocol, "Migration").
//!
//! It is a file with a bit for each page of 4096 bytes by guest-physical address, which we set *after* the page was written; the
//! front-end clears it before it copies the page. Rings log the frames that they write and the parts of themselves that they
//! do. Without a log, what all this costs is a branch a burst.
#![allow(unsafe_code)] // a file that is mapped

use std::fs::File;
use std::io;
use std::ptr::{self, NonNull};
use std::sync::atomic::{AtomicU8, Ordering};

use rustix::mm::{MapFlags, ProtFlags, mmap, munmap};

use super::sigbus::Watched;

/// Bits of an address within a page (`VHOST_LOG_PAGE`).
const PAGE_BITS: u32 = 12;

/// A mapped log.
#[derive(Debug)]
pub struct DirtyLog {
    start: NonNull<u8>,
    /// Bytes that are mapped.
    mapped: usize,
    /// Where in them the log begins.
    offset: usize,
    /// A front-end that takes its log away does not end us.
    watched: Option<Watched>,
}

// SAFETY: the mapping is accessed as atomic bytes only, and lives as long as this.
unsafe impl Send for DirtyLog {}
// SAFETY: as above.
unsafe impl Sync for DirtyLog {}

impl Drop for DirtyLog {
    fn drop(&mut self) {
        self.watched = None; // before somebody else may be mapped there
        // SAFETY: this mapping was made by `map`, and nobody has references into it any more. An error would mean that it is not there.
        let _ = unsafe { munmap(self.start.as_ptr().cast(), self.mapped) };
    }
}

impl DirtyLog {
    /// Maps `size` bytes of a file from `offset` on.
    ///
    /// # Errors
    /// The file is shorter, or the system refuses.
    pub fn map(file: &File, size: u64, offset: u64) -> io::Result<DirtyLog> {
        let invalid = || io::Error::from(io::ErrorKind::InvalidInput);
        let end = size.checked_add(offset).filter(|&end| size > 0 && end <= isize::MAX as u64);
        let end = end.ok_or_else(invalid)?;
        if file.metadata()?.len() < end {
            return Err(invalid());
        }
        let access = ProtFlags::READ | ProtFlags::WRITE;
        // SAFETY: a new mapping at an address of the kernel's choice touches nothing that exists.
        let start = unsafe { mmap(ptr::null_mut(), end as usize, access, MapFlags::SHARED, file, 0) }?;
        let start = NonNull::new(start.cast()).ok_or_else(invalid)?;
        let watched = Watched::new(start.as_ptr(), end as usize);
        Ok(DirtyLog { start, mapped: end as usize, offset: offset as usize, watched })
    }

    /// Whether it was taken away.
    pub(super) fn is_lost(&self) -> bool {
        self.watched.as_ref().is_some_and(Watched::is_lost)
    }

    /// Notes that `len` bytes at guest-physical `gpa` were written. What the log has no bit for is not the front-end's.
    pub(super) fn mark(&self, gpa: u64, len: u32) {
        let Some(last) = gpa.checked_add(u64::from(len).saturating_sub(1)).filter(|_| len > 0) else {
            return;
        };
        for page in gpa >> PAGE_BITS..=last >> PAGE_BITS {
            let at = (page / 8) as usize;
            if at >= self.mapped - self.offset {
                return;
            }
            // SAFETY: `offset + at` is less than `mapped`; shared memory is accessed atomically, and the reference lives no longer
            // than this statement.
            let byte = unsafe { AtomicU8::from_ptr(self.start.as_ptr().add(self.offset + at)) };
            let bit = 1 << (page % 8);
            // Most pages of a burst are the same: a look is cheaper. Release, after what was written; and who has cleared the
            // bit before we look at it copies the page after what we have written.
            std::sync::atomic::fence(Ordering::SeqCst);
            if byte.load(Ordering::Relaxed) & bit == 0 {
                byte.fetch_or(bit, Ordering::Release);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Read;
    use std::os::unix::fs::FileExt;

    #[test]
    fn the_pages_of_what_was_written_are_marked() {
        let file = File::from(rustix::fs::memfd_create("log", rustix::fs::MemfdFlags::CLOEXEC).unwrap());
        file.set_len(24).unwrap();
        for (size, offset) in [(0, 0), (25, 0), (16, 9), (u64::MAX, 1), (u64::MAX, 0)] {
            assert!(DirtyLog::map(&file, size, offset).is_err(), "{size} {offset}");
        }
        let log = DirtyLog::map(&file, 16, 8).unwrap();
        log.mark(0x1fff, 1);
        log.mark(0x7fff, 2);
        log.mark(0x10_000, 0);
        log.mark(0x20_000, 0x3001);
        for beyond in [128 << 12, u64::MAX, u64::MAX - 5] {
            log.mark(beyond, 7);
        }
        log.mark((128 << 12) - 1, 1);
        let mut bytes = vec![];
        (&file).read_to_end(&mut bytes).unwrap();
        let mut want = [0; 24];
        (want[8], want[9], want[8 + 4], want[23]) = (1 << 1 | 1 << 7, 1, 0b1111, 1 << 7);
        assert_eq!(bytes, want);
        // Cleared by who copies, and marked again.
        file.write_all_at(&[0], 8).unwrap();
        log.mark(0x1fff, 1);
        let mut byte = [0];
        file.read_exact_at(&mut byte, 8).unwrap();
        assert_eq!(byte, [1 << 1]);
    }
}
