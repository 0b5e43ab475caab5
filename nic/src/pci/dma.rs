//! DMA memory: what the program writes and the device reads, and the other way round, under two addresses.

use std::fmt;
use std::sync::Arc;

use super::memory::{BadAccess, Mapping};

/// A piece of memory that a device can reach, zeroed when it was allocated.
///
/// Cloning or slicing it makes another view of the same memory. The memory goes back when the last view is dropped.
#[derive(Clone, Debug)]
pub struct DmaMemory {
    region: Arc<Region>,
    offset: usize,
    len: usize,
}

/// What [`DmaMemory`] is a part of: a whole allocation, and what undoes it.
pub(super) struct Region {
    memory: Arc<Mapping>,
    /// Where the region begins in `memory`.
    start: usize,
    iova: u64,
    /// Called with the region's IOVA before the memory goes.
    release: Box<dyn Fn(u64) + Send + Sync>,
}

impl fmt::Debug for Region {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Region({:#x})", self.iova)
    }
}

impl Drop for Region {
    fn drop(&mut self) {
        (self.release)(self.iova);
    }
}

impl DmaMemory {
    /// `len` bytes of `memory` from `start` on, which the device finds at `iova`.
    pub(super) fn new(
        memory: Arc<Mapping>,
        start: usize,
        len: usize,
        iova: u64,
        release: Box<dyn Fn(u64) + Send + Sync>,
    ) -> DmaMemory {
        DmaMemory { region: Arc::new(Region { memory, start, iova, release }), offset: 0, len }
    }

    /// The address by which the device knows the first byte.
    pub fn iova(&self) -> u64 {
        self.region.iova + self.offset as u64
    }

    /// Length in bytes.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether this is an empty piece.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// A part of it.
    pub fn slice(&self, offset: usize, len: usize) -> Result<DmaMemory, BadAccess> {
        self.check(offset, len)?;
        Ok(DmaMemory { region: self.region.clone(), offset: self.offset + offset, len })
    }

    /// Reads a byte.
    pub fn load_u8(&self, offset: usize) -> Result<u8, BadAccess> {
        self.region.memory.load_u8(self.check(offset, 1)?)
    }

    /// Reads an aligned little-endian value. What the device wrote before it is then visible.
    #[inline]
    pub fn load_u16(&self, offset: usize) -> Result<u16, BadAccess> {
        self.region.memory.load_u16(self.check(offset, 2)?)
    }

    /// Reads an aligned little-endian value. What the device wrote before it is then visible.
    #[inline]
    pub fn load_u32(&self, offset: usize) -> Result<u32, BadAccess> {
        self.region.memory.load_u32(self.check(offset, 4)?)
    }

    /// Reads an aligned little-endian value. What the device wrote before it is then visible.
    #[inline]
    pub fn load_u64(&self, offset: usize) -> Result<u64, BadAccess> {
        self.region.memory.load_u64(self.check(offset, 8)?)
    }

    /// Writes an aligned little-endian value, after all that was written before.
    #[inline]
    pub fn store_u16(&self, offset: usize, value: u16) -> Result<(), BadAccess> {
        self.region.memory.store_u16(self.check(offset, 2)?, value)
    }

    /// Writes an aligned little-endian value, after all that was written before.
    #[inline]
    pub fn store_u32(&self, offset: usize, value: u32) -> Result<(), BadAccess> {
        self.region.memory.store_u32(self.check(offset, 4)?, value)
    }

    /// Writes an aligned little-endian value, after all that was written before.
    #[inline]
    pub fn store_u64(&self, offset: usize, value: u64) -> Result<(), BadAccess> {
        self.region.memory.store_u64(self.check(offset, 8)?, value)
    }

    /// Swaps an aligned 32-bit value.
    pub(super) fn swap_u32(&self, offset: usize, value: u32) -> Result<u32, BadAccess> {
        self.region.memory.swap_u32(self.check(offset, 4)?, value)
    }

    /// Copies bytes out.
    pub fn read(&self, offset: usize, to: &mut [u8]) -> Result<(), BadAccess> {
        self.region.memory.read(self.check(offset, to.len())?, to)
    }

    /// Copies bytes in.
    pub fn write(&self, offset: usize, from: &[u8]) -> Result<(), BadAccess> {
        self.region.memory.write(self.check(offset, from.len())?, from)
    }

    /// Makes all of it zero.
    pub fn clear(&self) -> Result<(), BadAccess> {
        const ZEROS: [u8; 4096] = [0; 4096];
        let mut at = 0;
        while let Some(left) = self.len.checked_sub(at).filter(|&left| left > 0) {
            let step = left.min(ZEROS.len());
            self.write(at, &ZEROS[..step])?;
            at += step;
        }
        Ok(())
    }

    /// Checks an access against this piece and gives its offset in the mapping.
    #[inline]
    fn check(&self, offset: usize, width: usize) -> Result<usize, BadAccess> {
        match offset.checked_add(width) {
            Some(end) if end <= self.len => Ok(self.region.start + self.offset + offset),
            _ => Err(BadAccess { offset, width, len: self.len }),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::atomic::{AtomicU64, Ordering};

    #[test]
    fn views_share_memory_and_the_last_one_gives_it_back() {
        static RELEASED: AtomicU64 = AtomicU64::new(0);
        let mapping = Arc::new(Mapping::anonymous(8192, false).unwrap());
        let release = Box::new(|iova| RELEASED.store(iova, Ordering::Relaxed));
        let whole = DmaMemory::new(mapping, 4096, 4096, 0x10_0000, release);
        let part = whole.slice(64, 16).unwrap();
        assert_eq!(part.iova(), 0x10_0040);
        part.store_u32(0, 7).unwrap();
        assert_eq!(whole.load_u32(64), Ok(7));
        assert!(part.load_u32(16).is_err(), "the part's own length counts");
        assert!(whole.slice(4095, 2).is_err());
        whole.clear().unwrap();
        assert_eq!(part.load_u32(0), Ok(0));
        drop(whole);
        assert_eq!(RELEASED.load(Ordering::Relaxed), 0);
        drop(part);
        assert_eq!(RELEASED.load(Ordering::Relaxed), 0x10_0000);
    }
}
