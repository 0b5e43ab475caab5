//! A ring of descriptors with a buffer for each.

use std::time::{Duration, Instant};

use crate::io::NicError;
use crate::pci::{BadAccess, Bar, DmaMemory, PciError, PciFunction};

use super::regs;

/// Bytes of a descriptor: two words of 64 bits.
const DESCRIPTOR: usize = 16;
/// How long the device may take for what it does at the start.
const PATIENCE: Duration = Duration::from_secs(1);

/// A ring and a buffer for each of its slots. Slots from `tail` up to `head` are the device's.
#[derive(Debug)]
pub(super) struct Ring {
    descriptors: DmaMemory,
    buffers: DmaMemory,
    buffer: usize,
    mask: u32,
    head: u32,
    tail: u32,
    rung: u32,
    /// First register.
    base: u64,
}

impl Ring {
    pub fn new(
        function: &mut dyn PciFunction,
        base: u64,
        size: u32,
        buffer: usize,
    ) -> Result<Ring, PciError> {
        let descriptors = function.dma_alloc(size as usize * DESCRIPTOR)?;
        let buffers = function.dma_alloc(size as usize * buffer)?;
        Ok(Ring { descriptors, buffers, buffer, mask: size - 1, head: 0, tail: 0, rung: 0, base })
    }

    /// Gives the empty ring to the device and waits until it has it.
    pub fn start(&mut self, bar: &Bar) -> Result<(), NicError> {
        (self.head, self.tail, self.rung) = (0, 0, 0);
        self.descriptors.clear()?;
        let iova = self.descriptors.iova();
        bar.write32(self.base, iova as u32)?;
        bar.write32(self.base + regs::QUEUE_HIGH, (iova >> 32) as u32)?;
        bar.write32(self.base + regs::QUEUE_LEN, self.descriptors.len() as u32)?;
        bar.write32(self.base + regs::QUEUE_HEAD, 0)?;
        bar.write32(self.base + regs::QUEUE_TAIL, 0)?;
        let control = self.base + regs::QUEUE_CONTROL;
        bar.write32(control, bar.read32(control)? | regs::QUEUE_ENABLE)?;
        wait("does not enable a queue", || Ok(bar.read32(control)? & regs::QUEUE_ENABLE != 0))
    }

    /// Whether the device still has the ring.
    pub fn is_known(&self, bar: &Bar) -> Result<bool, PciError> {
        let len = bar.read32(self.base + regs::QUEUE_LEN)?;
        Ok(bar.read32(self.base)? == self.descriptors.iova() as u32 && len as usize == self.descriptors.len())
    }

    /// Number of slots.
    pub fn size(&self) -> u32 {
        self.mask + 1
    }

    /// Bytes of a buffer.
    pub fn buffer(&self) -> usize {
        self.buffer
    }

    /// Free slots; one is always left, as a full ring would look empty.
    pub fn free(&self) -> u32 {
        self.mask - (self.head.wrapping_sub(self.tail) & self.mask)
    }

    /// The slot that is filled next.
    pub fn head(&self) -> u32 {
        self.head
    }

    /// The oldest slot that the device has, if it has any.
    pub fn tail(&self) -> Option<u32> {
        (self.tail != self.rung).then_some(self.tail)
    }

    /// The slot `count` after another.
    pub fn after(&self, slot: u32, count: u32) -> u32 {
        slot.wrapping_add(count) & self.mask
    }

    fn at(&self, slot: u32) -> usize {
        slot as usize * self.buffer
    }

    /// Where the device finds a slot's buffer.
    pub fn address(&self, slot: u32) -> u64 {
        self.buffers.iova() + self.at(slot) as u64
    }

    /// Copies a slot's buffer.
    pub fn read(&self, slot: u32, to: &mut [u8]) -> Result<(), BadAccess> {
        self.buffers.read(self.at(slot), to)
    }

    /// Copies bytes to the buffers of several slots, from the `at`-th byte of them together on.
    pub fn write(&self, slot: u32, mut at: usize, mut bytes: &[u8]) -> Result<(), BadAccess> {
        while !bytes.is_empty() {
            let inside = at % self.buffer;
            let (now, rest) = bytes.split_at(bytes.len().min(self.buffer - inside));
            let slot = self.after(slot, (at / self.buffer) as u32);
            self.buffers.write(self.at(slot) + inside, now)?;
            at += now.len();
            bytes = rest;
        }
        Ok(())
    }

    /// Fills the next slot's descriptor; there must be a free one.
    pub fn push(&mut self, low: u64, high: u64) -> Result<(), BadAccess> {
        let at = self.head as usize * DESCRIPTOR;
        self.descriptors.store_u64(at, low)?;
        self.descriptors.store_u64(at + 8, high)?;
        self.head = self.after(self.head, 1);
        Ok(())
    }

    /// Takes slots back from the device, up to this one.
    pub fn take(&mut self, up_to: u32) {
        self.tail = up_to & self.mask;
    }

    /// Gives the device what was filled.
    pub fn ring(&mut self, bar: &Bar) -> Result<(), PciError> {
        if self.rung != self.head {
            bar.write32(self.base + regs::QUEUE_TAIL, self.head)?;
            self.rung = self.head;
        }
        Ok(())
    }

    /// The second word of a slot.
    pub fn word(&self, slot: u32) -> Result<u64, BadAccess> {
        self.descriptors.load_u64(slot as usize * DESCRIPTOR + 8)
    }
}

/// Waits for the device.
pub(super) fn wait(what: &str, mut done: impl FnMut() -> Result<bool, NicError>) -> Result<(), NicError> {
    let deadline = Instant::now() + PATIENCE;
    while !done()? {
        if Instant::now() >= deadline {
            return Err(NicError::Device(what.into()));
        }
        std::thread::yield_now();
    }
    Ok(())
}
