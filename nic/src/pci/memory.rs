//! Memory that a device sees too: mapped BARs and DMA memory.
//!
//! This file holds all of the crate's raw memory. No Rust reference to such memory ever exists; everything is a volatile
//! or atomic access through a raw pointer that was checked against the mapping's length and the access's alignment, so a
//! device that writes whenever it likes can change values but not break the program.
#![allow(unsafe_code)]

use std::io;
use std::ptr::NonNull;
use std::sync::atomic::{AtomicU8, AtomicU16, AtomicU32, AtomicU64, Ordering, fence};

use super::Width;
use rustix::fd::{AsFd, BorrowedFd};
use rustix::mm::{MapFlags, ProtFlags, mmap, mmap_anonymous, munmap};

/// An access beyond the memory, or one that is not aligned to its own width.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
#[error("access of {width} bytes at {offset:#x} of {len:#x} bytes")]
pub struct BadAccess {
    /// Offset in bytes from the memory's start.
    pub offset: usize,
    /// Width in bytes.
    pub width: usize,
    /// Length of the memory in bytes.
    pub len: usize,
}

/// Pages shared with a device (or with the emulator that plays one), unmapped on drop.
#[derive(Debug)]
pub struct Mapping {
    start: NonNull<u8>,
    len: usize,
}

// SAFETY: the mapping is plain memory that stays where it is until the drop, which owns it; all accesses are volatile or
// atomic and allowed from any thread, since the device is already one more that accesses it at any time.
unsafe impl Send for Mapping {}
// SAFETY: as for `Send`; no method gives out a reference to the memory.
unsafe impl Sync for Mapping {}

macro_rules! access {
    ($load:ident, $store:ident, $type:ty, $atomic:ty) => {
        /// Reads one naturally aligned little-endian value.
        #[inline]
        pub fn $load(&self, offset: usize) -> Result<$type, BadAccess> {
            let pointer = self.at(offset, size_of::<$type>())?.cast::<$type>();
            // SAFETY: `at` has checked that the value lies inside the mapping, which lives as long as `self`, and that the
            // pointer is aligned; everybody in this process accesses the memory by atomics or volatile copies.
            let value = unsafe { <$atomic>::from_ptr(pointer) }.load(Ordering::Relaxed);
            fence(Ordering::Acquire);
            Ok(<$type>::from_le(value))
        }

        /// Writes one naturally aligned value in little-endian order, after all that was written before.
        #[inline]
        pub fn $store(&self, offset: usize, value: $type) -> Result<(), BadAccess> {
            let pointer = self.at(offset, size_of::<$type>())?.cast::<$type>();
            fence(Ordering::Release);
            // SAFETY: as in the load above.
            unsafe { <$atomic>::from_ptr(pointer) }.store(value.to_le(), Ordering::Relaxed);
            Ok(())
        }
    };
}

impl Mapping {
    /// Maps `len` bytes of a file or device from `offset` on, readable and writable, shared.
    pub fn of_file(file: impl AsFd, offset: u64, len: usize) -> io::Result<Mapping> {
        let file: BorrowedFd<'_> = file.as_fd();
        let protection = ProtFlags::READ | ProtFlags::WRITE;
        // SAFETY: the kernel chooses an unused range of addresses, so no memory of the program is replaced.
        let start = unsafe { mmap(std::ptr::null_mut(), len, protection, MapFlags::SHARED, file, offset) }?;
        Mapping::owning(start, len)
    }

    /// Maps `len` bytes of zeroed memory, of 2 MiB pages if `huge` (`len` is then a multiple of 2 MiB).
    pub fn anonymous(len: usize, huge: bool) -> io::Result<Mapping> {
        let mut flags = MapFlags::SHARED | MapFlags::POPULATE;
        if huge {
            flags |= MapFlags::HUGETLB | MapFlags::HUGE_2MB;
        }
        // SAFETY: as in `of_file`.
        let start =
            unsafe { mmap_anonymous(std::ptr::null_mut(), len, ProtFlags::READ | ProtFlags::WRITE, flags) }?;
        Mapping::owning(start, len)
    }

    fn owning(start: *mut std::ffi::c_void, len: usize) -> io::Result<Mapping> {
        let start = NonNull::new(start.cast()).ok_or(io::ErrorKind::AddrNotAvailable)?;
        Ok(Mapping { start, len })
    }

    /// Length in bytes.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether there is no memory at all.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// The address, for a kernel interface that maps the memory for a device. It is not to be dereferenced elsewhere.
    pub fn address(&self) -> *mut u8 {
        self.start.as_ptr()
    }

    #[inline]
    fn at(&self, offset: usize, width: usize) -> Result<*mut u8, BadAccess> {
        let fits = offset.checked_add(width).is_some_and(|end| end <= self.len);
        if !fits || !offset.is_multiple_of(width) {
            return Err(BadAccess { offset, width, len: self.len });
        }
        // SAFETY: `offset` lies inside the mapping (checked above), so the sum stays inside one allocation.
        Ok(unsafe { self.start.as_ptr().add(offset) })
    }

    access!(load_u8, store_u8, u8, AtomicU8);
    access!(load_u16, store_u16, u16, AtomicU16);
    access!(load_u32, store_u32, u32, AtomicU32);
    access!(load_u64, store_u64, u64, AtomicU64);

    /// Swaps one naturally aligned 32-bit value and returns what was there.
    pub fn swap_u32(&self, offset: usize, value: u32) -> Result<u32, BadAccess> {
        let pointer = self.at(offset, 4)?.cast::<u32>();
        // SAFETY: as for the loads: inside the mapping, aligned, and only ever accessed by atomics.
        let old = unsafe { AtomicU32::from_ptr(pointer) }.swap(value.to_le(), Ordering::AcqRel);
        Ok(u32::from_le(old))
    }

    /// Copies bytes out. What a device writes meanwhile may be seen in part.
    pub fn read(&self, offset: usize, to: &mut [u8]) -> Result<(), BadAccess> {
        self.range(offset, to.len())?;
        let (head, words) = split(self.start.as_ptr() as usize, offset, to.len());
        let (head, rest) = to.split_at_mut(head);
        let (body, tail) = rest.split_at_mut(words * 8);
        let mut at = offset;
        for byte in head {
            *byte = self.byte(at);
            at += 1;
        }
        for word in body.chunks_exact_mut(8) {
            // SAFETY: the whole range lies inside the mapping (checked above) and `split` has put `at` on a multiple of 8.
            let value = unsafe { self.start.as_ptr().add(at).cast::<u64>().read_volatile() };
            word.copy_from_slice(&value.to_ne_bytes());
            at += 8;
        }
        for byte in tail {
            *byte = self.byte(at);
            at += 1;
        }
        Ok(())
    }

    /// Copies bytes in.
    pub fn write(&self, offset: usize, from: &[u8]) -> Result<(), BadAccess> {
        self.range(offset, from.len())?;
        let (head, words) = split(self.start.as_ptr() as usize, offset, from.len());
        let (head, rest) = from.split_at(head);
        let (body, tail) = rest.split_at(words * 8);
        let mut at = offset;
        for &byte in head {
            self.set_byte(at, byte);
            at += 1;
        }
        for word in body.chunks_exact(8) {
            let value = u64::from_ne_bytes(word.try_into().unwrap_or_default());
            // SAFETY: as in `read`.
            unsafe { self.start.as_ptr().add(at).cast::<u64>().write_volatile(value) };
            at += 8;
        }
        for &byte in tail {
            self.set_byte(at, byte);
            at += 1;
        }
        Ok(())
    }

    fn range(&self, offset: usize, width: usize) -> Result<(), BadAccess> {
        match offset.checked_add(width) {
            Some(end) if end <= self.len => Ok(()),
            _ => Err(BadAccess { offset, width, len: self.len }),
        }
    }

    /// A byte inside the mapping, which the caller has checked.
    fn byte(&self, at: usize) -> u8 {
        debug_assert!(at < self.len);
        // SAFETY: `read` has checked that its whole range lies inside the mapping, and `at` lies in that range.
        unsafe { self.start.as_ptr().add(at).read_volatile() }
    }

    fn set_byte(&self, at: usize, value: u8) {
        debug_assert!(at < self.len);
        // SAFETY: as in `byte`.
        unsafe { self.start.as_ptr().add(at).write_volatile(value) };
    }
}

/// Bytes before the first multiple of eight, and whole words after them.
fn split(base: usize, offset: usize, len: usize) -> (usize, usize) {
    let head = (base.wrapping_add(offset).wrapping_neg() & 7).min(len);
    (head, (len - head) / 8)
}

impl Drop for Mapping {
    fn drop(&mut self) {
        // SAFETY: the range is the one that was mapped, nobody else unmaps it, and no pointer into it outlives `self`
        // (`address` says so to its callers).
        let unmapped = unsafe { munmap(self.start.as_ptr().cast(), self.len) };
        debug_assert!(unmapped.is_ok());
    }
}

/// Registers are accessed exactly once, by one instruction, as the compiler may not assume of atomics.
impl Mapping {
    /// Reads a register; the value is zero-extended.
    #[inline]
    pub(super) fn read_register(&self, offset: usize, width: Width) -> Result<u64, BadAccess> {
        let at = self.at(offset, width as usize)?;
        // SAFETY: `at` has checked bounds and alignment for this width; the mapping lives as long as `self`.
        let value = unsafe {
            match width {
                Width::One => at.read_volatile().into(),
                Width::Two => u16::from_le(at.cast::<u16>().read_volatile()).into(),
                Width::Four => u32::from_le(at.cast::<u32>().read_volatile()).into(),
                Width::Eight => u64::from_le(at.cast::<u64>().read_volatile()),
            }
        };
        fence(Ordering::Acquire);
        Ok(value)
    }

    /// Writes a register, after all stores that came before.
    #[inline]
    pub(super) fn write_register(&self, offset: usize, width: Width, value: u64) -> Result<(), BadAccess> {
        let at = self.at(offset, width as usize)?;
        fence(Ordering::SeqCst);
        // SAFETY: as in `read_register`.
        unsafe {
            match width {
                Width::One => at.write_volatile(value as u8),
                Width::Two => at.cast::<u16>().write_volatile((value as u16).to_le()),
                Width::Four => at.cast::<u32>().write_volatile((value as u32).to_le()),
                Width::Eight => at.cast::<u64>().write_volatile(value.to_le()),
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn values_read_back_and_bounds_are_kept() {
        let memory = Mapping::anonymous(4096, false).unwrap();
        memory.store_u32(8, 0x1234_5678).unwrap();
        assert_eq!(memory.load_u32(8), Ok(0x1234_5678));
        assert_eq!(memory.load_u8(8), Ok(0x78));
        assert_eq!(memory.swap_u32(8, 1), Ok(0x1234_5678));
        assert!(memory.load_u64(4092).is_err(), "past the end");
        assert!(memory.load_u32(6).is_err(), "not aligned");
        assert!(memory.load_u16(usize::MAX - 1).is_err(), "overflow");
        assert!(memory.write(4090, &[0; 7]).is_err());
    }

    #[test]
    fn copies_are_exact_at_any_alignment() {
        let memory = Mapping::anonymous(4096, false).unwrap();
        let bytes: Vec<u8> = (1..=200).collect();
        for offset in 0..17 {
            for len in [0, 1, 7, 8, 9, 63, 200] {
                memory.write(0, &[0; 256]).unwrap();
                memory.write(offset, &bytes[..len]).unwrap();
                let mut all = [0; 256];
                memory.read(0, &mut all).unwrap();
                assert_eq!(&all[offset..offset + len], &bytes[..len]);
                assert!(all[..offset].iter().chain(&all[offset + len..]).all(|&b| b == 0));
                let mut back = vec![0; len];
                memory.read(offset, &mut back).unwrap();
                assert_eq!(back, &bytes[..len]);
            }
        }
    }
}
