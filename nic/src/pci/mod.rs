//! A PCI function as a driver sees it, and the ways to reach one.
//!
//! A driver is written once, against [`PciFunction`], [`Bar`] and [`DmaMemory`]. The transports are [`vfio`] (the
//! kernel's VFIO) and [`qtest`] (QEMU's device models without a guest, for tests).

mod dma;
#[cfg(test)]
pub(crate) mod fake;
mod memory;
pub mod qtest;
mod ranges;
pub mod vfio;

use std::fmt;
use std::io;
use std::sync::Arc;

use rustix::fd::OwnedFd;

pub use dma::DmaMemory;
pub use memory::{BadAccess, Mapping};
pub use ranges::Ranges;

/// What can go wrong below a driver.
#[derive(Debug, thiserror::Error)]
pub enum PciError {
    /// An access outside a BAR, the configuration space or DMA memory, or not aligned.
    #[error(transparent)]
    Access(#[from] BadAccess),
    /// The function has no such memory BAR.
    #[error("the function has no memory BAR {0}")]
    NoBar(u8),
    /// No room for DMA memory.
    #[error("no room for {0} bytes of DMA memory")]
    NoDmaSpace(usize),
    /// `RLIMIT_MEMLOCK` is too low.
    #[error(
        "{asked} bytes of DMA memory beside {held} exceed the limit of locked memory, {limit} bytes: raise RLIMIT_MEMLOCK \
         (LimitMEMLOCK= of the service) or grant CAP_IPC_LOCK"
    )]
    LockedMemory {
        /// Bytes asked for.
        asked: u64,
        /// Bytes held already.
        held: u64,
        /// The limit in bytes.
        limit: u64,
    },
    /// Fewer interrupt vectors than the driver needs.
    #[error("{asked} interrupt vectors are needed, the function has {available}")]
    Interrupts {
        /// Vectors asked for.
        asked: u16,
        /// Vectors that there are.
        available: u16,
    },
    /// The function has no way to be reset from outside.
    #[error("neither the function nor its bus can be reset")]
    NoReset,
    /// The function is not what the driver drives.
    #[error("device {vendor:04x}:{device:04x} is not one of this driver's")]
    Foreign {
        /// Vendor id.
        vendor: u16,
        /// Device id.
        device: u16,
    },
    /// The way to the function is broken or was never there.
    #[error("{what}: {cause}")]
    Transport {
        /// What was tried.
        what: String,
        /// Why it did not work.
        cause: io::Error,
    },
}

impl PciError {
    /// A [`PciError::Transport`].
    pub(crate) fn transport(what: impl Into<String>, cause: impl Into<io::Error>) -> PciError {
        PciError::Transport { what: what.into(), cause: cause.into() }
    }
}

/// Width of one access to registers or configuration space, in bytes.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[repr(u8)]
pub enum Width {
    /// 8 bits.
    One = 1,
    /// 16 bits.
    Two = 2,
    /// 32 bits.
    Four = 4,
    /// 64 bits.
    Eight = 8,
}

/// The registers behind a BAR: one access each, in the device's order, little-endian.
pub trait Registers: fmt::Debug + Send + Sync {
    /// Size in bytes.
    fn size(&self) -> u64;
    /// Reads; the value is zero-extended.
    fn read(&self, offset: u64, width: Width) -> Result<u64, PciError>;
    /// Writes the value's low bytes, after all stores to DMA memory that came before.
    fn write(&self, offset: u64, width: Width, value: u64) -> Result<(), PciError>;
}

/// A BAR. Clones are the same registers, so that each queue can hold its own.
#[derive(Clone, Debug)]
pub struct Bar(Arc<dyn Registers>);

impl Bar {
    /// Registers as a BAR.
    pub fn new(registers: Arc<dyn Registers>) -> Bar {
        Bar(registers)
    }

    /// Size in bytes.
    pub fn size(&self) -> u64 {
        self.0.size()
    }

    /// Reads a byte.
    pub fn read8(&self, offset: u64) -> Result<u8, PciError> {
        Ok(self.0.read(offset, Width::One)? as u8)
    }

    /// Reads 16 bits.
    pub fn read16(&self, offset: u64) -> Result<u16, PciError> {
        Ok(self.0.read(offset, Width::Two)? as u16)
    }

    /// Reads 32 bits.
    pub fn read32(&self, offset: u64) -> Result<u32, PciError> {
        Ok(self.0.read(offset, Width::Four)? as u32)
    }

    /// Reads 64 bits in one access.
    pub fn read64(&self, offset: u64) -> Result<u64, PciError> {
        self.0.read(offset, Width::Eight)
    }

    /// Writes a byte.
    pub fn write8(&self, offset: u64, value: u8) -> Result<(), PciError> {
        self.0.write(offset, Width::One, value.into())
    }

    /// Writes 16 bits.
    pub fn write16(&self, offset: u64, value: u16) -> Result<(), PciError> {
        self.0.write(offset, Width::Two, value.into())
    }

    /// Writes 32 bits.
    pub fn write32(&self, offset: u64, value: u32) -> Result<(), PciError> {
        self.0.write(offset, Width::Four, value.into())
    }

    /// Writes 64 bits in one access.
    pub fn write64(&self, offset: u64, value: u64) -> Result<(), PciError> {
        self.0.write(offset, Width::Eight, value)
    }
}

/// A PCI function that this process drives alone.
///
/// Dropping it takes its bus mastering away and gives the function back. DMA memory outlives it.
pub trait PciFunction: fmt::Debug + Send {
    /// Reads configuration space at a naturally aligned offset.
    fn config_read(&mut self, offset: u16, width: Width) -> Result<u32, PciError>;
    /// Writes configuration space at a naturally aligned offset.
    fn config_write(&mut self, offset: u16, width: Width, value: u32) -> Result<(), PciError>;
    /// Memory BAR `index` (0 to 5; a 64-bit BAR counts by its first).
    fn bar(&mut self, index: u8) -> Result<Bar, PciError>;
    /// Zeroed memory that the device can reach, aligned to 4096 bytes under both addresses and contiguous for the device.
    fn dma_alloc(&mut self, len: usize) -> Result<DmaMemory, PciError>;
    /// Turns MSI-X on and gives one non-blocking eventfd for each of the vectors 0 to `vectors` - 1. A later call replaces an earlier one.
    fn interrupts(&mut self, vectors: u16) -> Result<Vec<OwnedFd>, PciError>;
    /// Resets the function, or the bus if it alone is on it. Interrupts are off afterwards, bus mastering too.
    fn reset(&mut self) -> Result<(), PciError>;

    /// Vendor and device id.
    fn id(&mut self) -> Result<(u16, u16), PciError> {
        let id = self.config_read(config::ID, Width::Four)?;
        Ok((id as u16, (id >> 16) as u16))
    }

    /// Lets the device access memory and its BARs be accessed, or neither.
    fn set_bus_master(&mut self, on: bool) -> Result<(), PciError> {
        let command = self.config_read(config::COMMAND, Width::Two)?;
        let bits = config::COMMAND_MEMORY | config::COMMAND_MASTER;
        let command = if on { command | bits } else { command & !config::COMMAND_MASTER };
        self.config_write(config::COMMAND, Width::Two, command)
    }
}

/// Configuration space (PCI Local Bus Specification 3.0, chapter 6).
pub mod config {
    use super::{PciError, PciFunction, Width};

    /// Vendor id, and device id above it.
    pub const ID: u16 = 0x00;
    /// Command register.
    pub const COMMAND: u16 = 0x04;
    /// Command: the device answers in memory space.
    pub const COMMAND_MEMORY: u32 = 1 << 1;
    /// Command: the device may master the bus.
    pub const COMMAND_MASTER: u32 = 1 << 2;
    /// Status register; bit 4 says that there are capabilities.
    pub const STATUS: u16 = 0x06;
    /// The first base address register.
    pub const BAR0: u16 = 0x10;
    /// Offset of the first capability.
    pub const CAPABILITIES: u16 = 0x34;
    /// Capability id of MSI-X.
    pub const CAP_MSIX: u8 = 0x11;
    /// Capability id of vendor specific data, by which virtio finds its structures.
    pub const CAP_VENDOR: u8 = 0x09;

    /// The capabilities: id and offset of each. A list that does not end is cut after 48 entries, the most that fit.
    pub fn capabilities(function: &mut dyn PciFunction) -> Result<Vec<(u8, u16)>, PciError> {
        let mut found = Vec::new();
        if function.config_read(STATUS, Width::Two)? & 1 << 4 == 0 {
            return Ok(found);
        }
        let mut at = function.config_read(CAPABILITIES, Width::One)? as u16 & 0xfc;
        while at >= 0x40 && found.len() < 48 {
            let header = function.config_read(at, Width::Two)?;
            found.push((header as u8, at));
            at = (header >> 8) as u16 & 0xfc;
        }
        Ok(found)
    }
}
