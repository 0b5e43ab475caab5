//! The four rings of an AF_XDP socket, mapped from the kernel (`struct xdp_ring` in net/xdp/xsk_queue.h).
//!
//! Each ring has one producer and one consumer, of which we are one and the kernel is the other. Both count entries
//! with free-running 32-bit indices. We write only our own index, with release order after the entries, and read the
//! other's with acquire order before them.
#![allow(unsafe_code)]

use rustix::fd::BorrowedFd;
use rustix::mm::{MapFlags, ProtFlags, mmap, munmap};
use rustix::net::xdp::{XdpDesc, XdpRingFlags, XdpRingOffset};
use std::ffi::c_void;
use std::io;
use std::marker::PhantomData;
use std::ptr;
use std::sync::atomic::{AtomicU32, Ordering, fence};

/// What a ring holds.
///
/// # Safety
/// Any bytes are a value of the type, and the kernel's rings hold it in this layout.
pub(super) unsafe trait Entry: Copy {}

// SAFETY: fill and completion rings hold `__u64` frame addresses.
unsafe impl Entry for u64 {}
// SAFETY: rx and tx rings hold `struct xdp_desc`, of which `XdpDesc` is the `repr(C)` twin: three integers.
unsafe impl Entry for XdpDesc {}

/// A mapped ring.
struct Ring<T> {
    base: *mut c_void,
    /// Bytes of the mapping.
    len: usize,
    /// Offsets in the mapping, of which each was checked to be inside and aligned.
    producer: usize,
    consumer: usize,
    flags: usize,
    entries: usize,
    /// Entries; a power of two.
    size: u32,
    of: PhantomData<T>,
}

// SAFETY: an address of a mapping that the ring owns; whoever has the ring exclusively may use it on any thread.
unsafe impl<T: Entry> Send for Ring<T> {}

impl<T: Entry> Ring<T> {
    /// Maps the ring of `size` entries at `page_offset` of the socket.
    fn map(fd: BorrowedFd<'_>, size: u32, page_offset: u64, at: &XdpRingOffset) -> io::Result<Ring<T>> {
        let invalid =
            || io::Error::new(io::ErrorKind::InvalidData, "the kernel's ring layout is not understood");
        let offset = |at: u64| usize::try_from(at).map_err(|_| invalid());
        let (producer, consumer, entries) = (offset(at.producer)?, offset(at.consumer)?, offset(at.desc)?);
        let flags = offset(at.flags.ok_or_else(invalid)?)?;
        let bytes = (size as usize).checked_mul(size_of::<T>()).ok_or_else(invalid)?;
        let len = entries.checked_add(bytes).ok_or_else(invalid)?;
        let index_fits = |at: usize| at.is_multiple_of(4) && at.checked_add(4).is_some_and(|end| end <= len);
        if !size.is_power_of_two()
            || ![producer, consumer, flags].into_iter().all(index_fits)
            || !entries.is_multiple_of(align_of::<T>())
        {
            return Err(invalid());
        }
        // SAFETY: a new shared mapping at an address of the kernel's choice touches nothing that exists.
        let base = unsafe {
            mmap(
                ptr::null_mut(),
                len,
                ProtFlags::READ | ProtFlags::WRITE,
                MapFlags::SHARED | MapFlags::POPULATE,
                fd,
                page_offset,
            )
        }?;
        Ok(Ring { base, len, producer, consumer, flags, entries, size, of: PhantomData })
    }

    /// The 32-bit word at `offset`, one of the checked three.
    fn word(&self, offset: usize) -> &AtomicU32 {
        // SAFETY: `map` found `offset` aligned and inside of the mapping, which lives as long as `self`. The kernel
        // accesses the word atomically, and so do we.
        unsafe { &*self.base.byte_add(offset).cast::<AtomicU32>() }
    }

    fn producer(&self) -> &AtomicU32 {
        self.word(self.producer)
    }

    fn consumer(&self) -> &AtomicU32 {
        self.word(self.consumer)
    }

    /// The entry of free-running index `index`.
    fn entry(&self, index: u32) -> *mut T {
        let place = (index & (self.size - 1)) as usize;
        // SAFETY: `place` is less than `size`, and `map` mapped `size` entries from `entries` on.
        unsafe { self.base.byte_add(self.entries).cast::<T>().add(place) }
    }

    /// Whether the kernel asks to be woken.
    fn needs_wakeup(&self) -> bool {
        // What was published must be visible before the flag is read, or both sides could wait for each other.
        fence(Ordering::SeqCst);
        self.word(self.flags).load(Ordering::Relaxed) & XdpRingFlags::XDP_RING_NEED_WAKEUP.bits() != 0
    }
}

impl<T> Drop for Ring<T> {
    fn drop(&mut self) {
        // SAFETY: the mapping is ours, and no reference into it outlives `self`.
        let _ = unsafe { munmap(self.base, self.len) };
    }
}

/// A ring that we fill: *fill* and *tx*.
pub(super) struct Producer<T: Entry> {
    ring: Ring<T>,
    /// The next index to write.
    next: u32,
    /// The kernel's index as last seen.
    seen: u32,
}

impl<T: Entry> Producer<T> {
    /// Maps a new ring of the socket.
    ///
    /// # Errors
    /// It cannot be mapped.
    pub(super) fn map(fd: BorrowedFd<'_>, size: u32, offset: u64, at: &XdpRingOffset) -> io::Result<Self> {
        let ring = Ring::map(fd, size, offset, at)?;
        let (next, seen) = (ring.producer().load(Ordering::Relaxed), ring.consumer().load(Ordering::Acquire));
        Ok(Producer { ring, next, seen })
    }

    /// Adds an entry, which the kernel sees when it is [published](Self::publish). False if the ring is full.
    #[inline]
    pub(super) fn push(&mut self, value: T) -> bool {
        if self.next.wrapping_sub(self.seen) >= self.ring.size {
            self.seen = self.ring.consumer().load(Ordering::Acquire);
            if self.next.wrapping_sub(self.seen) >= self.ring.size {
                return false;
            }
        }
        // SAFETY: the pointer is to an entry of the mapping. The kernel has consumed what was there, and does not read
        // it again before it is published; we are the only producer (`&mut self`).
        unsafe { self.ring.entry(self.next).write(value) };
        self.next = self.next.wrapping_add(1);
        true
    }

    /// Shows the kernel what was pushed.
    #[inline]
    pub(super) fn publish(&mut self) {
        self.ring.producer().store(self.next, Ordering::Release);
    }

    /// Entries that the kernel has not taken yet.
    pub(super) fn queued(&self) -> u32 {
        self.next.wrapping_sub(self.ring.consumer().load(Ordering::Acquire))
    }

    /// Whether the kernel has to be woken to see them.
    pub(super) fn needs_wakeup(&self) -> bool {
        self.ring.needs_wakeup()
    }
}

/// A ring that the kernel fills: *rx* and *completion*.
pub(super) struct Consumer<T: Entry> {
    ring: Ring<T>,
    /// The next index to read.
    next: u32,
}

impl<T: Entry> Consumer<T> {
    /// Maps a new ring of the socket.
    ///
    /// # Errors
    /// It cannot be mapped.
    pub(super) fn map(fd: BorrowedFd<'_>, size: u32, offset: u64, at: &XdpRingOffset) -> io::Result<Self> {
        let ring = Ring::map(fd, size, offset, at)?;
        let next = ring.consumer().load(Ordering::Relaxed);
        Ok(Consumer { ring, next })
    }

    /// Entries that can be read now.
    #[inline]
    pub(super) fn available(&self) -> u32 {
        // The kernel never is further ahead; that it could not matter even so, `entry` sees to.
        self.ring.producer().load(Ordering::Acquire).wrapping_sub(self.next).min(self.ring.size)
    }

    /// The entry `i` after the next one; of the [available](Self::available) ones, or what it holds is of no meaning.
    #[inline]
    pub(super) fn peek(&self, i: u32) -> T {
        // SAFETY: the pointer is to an entry of the mapping, and any bytes are a `T`. An entry that is available is not
        // written by the kernel before it is released.
        unsafe { self.ring.entry(self.next.wrapping_add(i)).read() }
    }

    /// Gives the next `n` entries' places back to the kernel.
    #[inline]
    pub(super) fn release(&mut self, n: u32) {
        self.next = self.next.wrapping_add(n);
        self.ring.consumer().store(self.next, Ordering::Release);
    }
}
