//! Guest memory that is taken away under us.
//!
//! A guest's memory is a file of the front-end's, who may make it shorter, or whose huge pages may not be there when they
//! are touched: whoever reads or writes there then gets SIGBUS. The handler puts memory of nobody's in the place of the whole region,
//! so that the access goes on (and finds zeroes), notes the region, and tells the event loop, which stops the port. Other
//! ports notice nothing.

use std::io;
use std::ptr;
use std::sync::atomic::{AtomicBool, AtomicI32, AtomicU32, AtomicUsize, Ordering};
use std::sync::{Mutex, OnceLock, PoisonError};

use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};
use vmm_sys_util::signal::register_signal_handler;

/// Regions at most, of all guests. Those beyond are not watched.
const MAX_REGIONS: usize = 1 << 14;

/// A region as the handler finds it. Written under [`FREE`]'s lock; `version` is odd meanwhile.
struct Slot {
    version: AtomicU32,
    start: AtomicUsize,
    /// Bytes; 0: no region.
    len: AtomicUsize,
    lost: AtomicBool,
}

static SLOTS: [Slot; MAX_REGIONS] = [const {
    Slot {
        version: AtomicU32::new(0),
        start: AtomicUsize::new(0),
        len: AtomicUsize::new(0),
        lost: AtomicBool::new(false),
    }
}; MAX_REGIONS];
/// Slots from here on were never used.
static USED: AtomicUsize = AtomicUsize::new(0);
/// Slots below that are free.
static FREE: Mutex<Vec<usize>> = Mutex::new(Vec::new());
/// What the handler writes to; -1 until there is a handler.
static TELL: AtomicI32 = AtomicI32::new(-1);

impl Slot {
    fn set(&self, start: usize, len: usize) {
        let version = self.version.load(Ordering::Relaxed);
        self.version.store(version.wrapping_add(1), Ordering::Relaxed);
        // Release, twice: nobody who sees what is between sees the version of before, or misses that of after.
        self.len.store(0, Ordering::Release);
        self.start.store(start, Ordering::Release);
        self.lost.store(false, Ordering::Release);
        self.len.store(len, Ordering::Release);
        self.version.store(version.wrapping_add(2), Ordering::Release);
    }

    /// Start and length, if `addr` is in it. That of the region in which somebody is just now does not change.
    fn around(&self, addr: usize) -> Option<(usize, usize)> {
        let version = self.version.load(Ordering::Acquire);
        let (start, len) = (self.start.load(Ordering::Acquire), self.len.load(Ordering::Acquire));
        let stable = version.is_multiple_of(2) && self.version.load(Ordering::Relaxed) == version;
        (stable && addr.checked_sub(start)? < len).then_some((start, len))
    }
}

/// Watches a region of guest memory for as long as it is mapped.
#[derive(Debug)]
pub(super) struct Watched(usize);

impl Watched {
    /// Of `len` bytes at `start`. `None`: there are too many.
    pub fn new(start: *const u8, len: usize) -> Option<Watched> {
        let mut free = FREE.lock().unwrap_or_else(PoisonError::into_inner);
        let index = match free.pop() {
            Some(index) => index,
            None => USED.load(Ordering::Relaxed),
        };
        // Who watches the same mapping, of which something was lost already, watches no guest's memory.
        let used = USED.load(Ordering::Relaxed).min(MAX_REGIONS);
        let lost = SLOTS[..used].iter().any(|slot| {
            slot.around(start.addr()).is_some_and(|(known, _)| known == start.addr())
                && slot.lost.load(Ordering::Acquire)
        });
        let slot = SLOTS.get(index)?;
        slot.set(start.addr(), len);
        slot.lost.store(lost, Ordering::Release);
        USED.fetch_max(index + 1, Ordering::Release);
        Some(Watched(index))
    }

    /// Whether it is not the guest's any more.
    pub fn is_lost(&self) -> bool {
        SLOTS.get(self.0).is_some_and(|slot| slot.lost.load(Ordering::Acquire))
    }
}

impl Drop for Watched {
    fn drop(&mut self) {
        let mut free = FREE.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(slot) = SLOTS.get(self.0) {
            slot.set(0, 0);
            free.push(self.0);
        }
    }
}

/// From now on the loss of guest memory is no end of this process. Gives what becomes readable when some was lost; it is the same for
/// all who ask.
///
/// # Errors
/// The system's.
pub fn survive_loss() -> io::Result<&'static EventFd> {
    static EVENT: OnceLock<EventFd> = OnceLock::new();
    static MAKING: Mutex<()> = Mutex::new(());
    let _making = MAKING.lock().unwrap_or_else(PoisonError::into_inner);
    if let Some(event) = EVENT.get() {
        return Ok(event);
    }
    let event = EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC)?;
    let event = EVENT.get_or_init(|| event); // never closed
    TELL.store(std::os::fd::AsRawFd::as_raw_fd(event), Ordering::Release);
    register_signal_handler(libc::SIGBUS, on_sigbus).map_err(|e| io::Error::from_raw_os_error(e.errno()))?;
    Ok(event)
}

/// Only what a signal handler may do: atomics and system calls.
extern "C" fn on_sigbus(signal: libc::c_int, info: *mut libc::siginfo_t, _: *mut libc::c_void) {
    // SAFETY: the kernel calls this with `info` for SA_SIGINFO, and a fault has an address.
    let addr = unsafe { info.as_ref().map_or(0, |info| info.si_addr().addr()) };
    let used = USED.load(Ordering::Acquire).min(MAX_REGIONS);
    // While the table of regions changes, a mapping is watched twice.
    let around = || SLOTS[..used].iter().filter_map(|slot| Some((slot, slot.around(addr)?)));
    if let Some((_, (start, len))) = around().next()
        && replace(start, len)
    {
        around().for_each(|(slot, _)| slot.lost.store(true, Ordering::Release));
        let one = 1u64;
        // SAFETY: eight bytes of our own, to a descriptor that is never closed. `errno` is as it was for whoever was interrupted.
        unsafe {
            let errno = *libc::__errno_location();
            libc::write(TELL.load(Ordering::Acquire), ptr::from_ref(&one).cast(), 8);
            *libc::__errno_location() = errno;
        }
        return;
    }
    // Not ours: it happens again when this returns, and is then what it would have been without us.
    // SAFETY: the default action is always a valid one.
    unsafe { libc::signal(signal, libc::SIG_DFL) };
}

/// Puts private memory, all zeroes, in the place of a region.
fn replace(start: usize, len: usize) -> bool {
    let access = libc::PROT_READ | libc::PROT_WRITE;
    let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_FIXED | libc::MAP_NORESERVE;
    let start = ptr::with_exposed_provenance_mut(start);
    // SAFETY: the range is a mapping of guest memory, whole, of which there are no references, and somebody is accessing it, so
    // it is not unmapped meanwhile; who unmaps it later unmaps this.
    unsafe {
        let errno = *libc::__errno_location();
        let at = libc::mmap(start, len, access, flags, -1, 0);
        *libc::__errno_location() = errno;
        at == start
    }
}

#[cfg(test)]
mod tests {
    use super::super::GuestRegions;
    use std::fs::File;
    use std::sync::Arc;
    use vm_memory::{FileOffset, GuestAddress, GuestMemoryMmap};

    #[test]
    fn memory_that_is_taken_away_is_replaced_and_noted() {
        let event = super::survive_loss().unwrap();
        let make = || {
            let file = File::from(rustix::fs::memfd_create("m", rustix::fs::MemfdFlags::CLOEXEC).unwrap());
            file.set_len(0x10_0000).unwrap();
            let range =
                (GuestAddress(0x4000), 0x10_0000, Some(FileOffset::new(file.try_clone().unwrap(), 0)));
            let mapping = Arc::new(GuestMemoryMmap::from_ranges_with_files([range]).unwrap());
            (file, GuestRegions::new(mapping))
        };
        let read = |regions: &GuestRegions, at| {
            let seg = regions.translate(at, 4).unwrap();
            let mut bytes = [9; 4];
            super::super::mem::gather(&[seg], 0, &mut bytes);
            bytes
        };
        let ((file, regions), (_kept, others)) = (make(), make());
        std::os::unix::fs::FileExt::write_all_at(&file, &[1, 2, 3, 4], 0x8000).unwrap();
        assert_eq!(read(&regions, 0xc000), [1, 2, 3, 4]);
        file.set_len(0x1000).unwrap();
        assert!(!regions.is_lost());
        assert_eq!(read(&regions, 0xc000), [0; 4]);
        assert!(regions.is_lost() && !others.is_lost());
        assert!(event.read().is_ok());
        let (file, shrunk) = make();
        file.set_len(0).unwrap();
        let shrunk = &shrunk;
        std::thread::scope(|scope| {
            for page in 0..8 {
                scope.spawn(move || assert_eq!(read(shrunk, 0x4000 + page * 0x1000), [0; 4]));
            }
        });
        let same = regions.with_log(None);
        drop(regions);
        let again = GuestRegions::new(same.mapping().clone());
        assert!(again.is_lost(), "the same mapping in another table");
        drop((same, again));
        let (_file, regions) = make();
        assert!(!regions.is_lost(), "another one in the same place of the list");
    }
}
