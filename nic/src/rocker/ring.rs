//! A ring of descriptors, each with a buffer of its own.
//!
//! The driver fills descriptors at the head and rings the doorbell; the device completes them in order, which shows in
//! each descriptor's last field. At most one less than all descriptors are posted.

use std::sync::atomic::{Ordering, fence};

use crate::pci::{BadAccess, Bar, DmaMemory, PciError, PciFunction};

use super::regs::{self, ring};

/// Bytes of a descriptor: address 8, cookie 8, buffer size 2, message size 2, reserved 10, completion 2.
const DESCRIPTOR: usize = 32;
const AT_SIZE: usize = 16;
const AT_MESSAGE: usize = 18;
const AT_COMPLETION: usize = 30;
const DONE: u16 = 0x8000;

/// What the device says of a descriptor.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) struct Completion {
    /// Which one.
    pub slot: u32,
    /// 0, or an error number.
    pub error: u16,
    /// Length of the device's message in the slot's buffer, at most the buffer's; `None` if the device claims more.
    pub len: Option<usize>,
}

/// A ring and its memory.
#[derive(Debug)]
pub(super) struct Ring {
    bar: Bar,
    base: u64,
    size: u32,
    buffer: u16,
    descriptors: DmaMemory,
    buffers: DmaMemory,
    /// The next slot to be filled.
    head: u32,
    /// The next slot to be completed.
    tail: u32,
    /// Where the device believes the head to be.
    rung: u32,
    /// Completions taken since the credits were returned.
    taken: u32,
}

impl Ring {
    /// Ring `number` with `size` slots (a power of two from 2 to 65536), each with a buffer of `buffer` bytes (a multiple of 8).
    pub fn new(
        function: &mut dyn PciFunction,
        bar: &Bar,
        number: u32,
        size: u32,
        buffer: u16,
    ) -> Result<Ring, PciError> {
        let descriptors = function.dma_alloc(size as usize * DESCRIPTOR)?;
        let buffers = function.dma_alloc(size as usize * usize::from(buffer))?;
        let base = regs::ring_base(number);
        let bar = bar.clone();
        Ok(Ring { bar, base, size, buffer, descriptors, buffers, head: 0, tail: 0, rung: 0, taken: 0 })
    }

    /// Gives the empty ring to the device, which has forgotten it or is to forget it.
    pub fn start(&mut self) -> Result<(), PciError> {
        (self.head, self.tail, self.rung, self.taken) = (0, 0, 0, 0);
        self.descriptors.clear()?;
        self.bar.write32(self.base + ring::CONTROL, 1)?;
        self.bar.write64(self.base + ring::ADDRESS, self.descriptors.iova())?;
        self.bar.write32(self.base + ring::SIZE, self.size)
    }

    /// Takes the ring from the device.
    pub fn stop(&self) -> Result<(), PciError> {
        self.bar.write32(self.base + ring::CONTROL, 1)
    }

    /// Whether the device still has this ring: it forgets it when it is reset.
    pub fn is_known(&self) -> Result<bool, PciError> {
        Ok(self.bar.read64(self.base + ring::ADDRESS)? == self.descriptors.iova())
    }

    /// Number of slots.
    pub fn size(&self) -> u32 {
        self.size
    }

    /// Slots that were pushed and not yet completed.
    pub fn outstanding(&self) -> u32 {
        self.head.wrapping_sub(self.tail) & (self.size - 1)
    }

    /// The slot that is pushed next, if there is one.
    pub fn next(&self) -> Option<u32> {
        (self.outstanding() < self.size - 1).then_some(self.head)
    }

    /// Fills the next slot with a message, which the device sees after [`Ring::ring`]. `false`: full, or too long.
    pub fn push(&mut self, message: &[u8]) -> Result<bool, PciError> {
        let Some(slot) = self.next().filter(|_| message.len() <= usize::from(self.buffer)) else {
            return Ok(false);
        };
        let buffer = slot as usize * usize::from(self.buffer);
        self.buffers.write(buffer, message)?;
        let at = slot as usize * DESCRIPTOR;
        self.descriptors.store_u64(at, self.buffers.iova() + buffer as u64)?;
        self.descriptors.store_u16(at + AT_SIZE, self.buffer)?;
        self.descriptors.store_u16(at + AT_MESSAGE, message.len() as u16)?;
        self.descriptors.store_u16(at + AT_COMPLETION, 0)?;
        self.head = (slot + 1) & (self.size - 1);
        Ok(true)
    }

    /// Rings the doorbell, if anything was pushed since the last time.
    pub fn ring(&mut self) -> Result<(), PciError> {
        if self.rung != self.head {
            fence(Ordering::SeqCst);
            self.bar.write32(self.base + ring::HEAD, self.head)?;
            self.rung = self.head;
        }
        Ok(())
    }

    /// Whether the device has completed something that was not taken.
    pub fn is_ready(&self) -> Result<bool, BadAccess> {
        if self.tail == self.rung {
            return Ok(false);
        }
        let at = self.tail as usize * DESCRIPTOR;
        Ok(self.descriptors.load_u16(at + AT_COMPLETION)? & DONE != 0)
    }

    /// Takes the next completion.
    pub fn take(&mut self) -> Result<Option<Completion>, BadAccess> {
        if self.tail == self.rung {
            return Ok(None);
        }
        let slot = self.tail;
        let at = slot as usize * DESCRIPTOR;
        let word = self.descriptors.load_u16(at + AT_COMPLETION)?;
        if word & DONE == 0 {
            return Ok(None);
        }
        let len = self.descriptors.load_u16(at + AT_MESSAGE)?;
        self.tail = (slot + 1) & (self.size - 1);
        self.taken += 1;
        Ok(Some(Completion { slot, error: word & !DONE, len: (len <= self.buffer).then_some(len.into()) }))
    }

    /// Copies a completed slot's message to `to`, which becomes as long as the message is.
    pub fn message(&self, completion: &Completion, to: &mut Vec<u8>) -> Result<(), BadAccess> {
        to.clear();
        to.resize(completion.len.unwrap_or(0), 0);
        self.buffers.read(completion.slot as usize * usize::from(self.buffer), to)
    }

    /// Tells the device what was taken, so that it interrupts for what comes next (or at once, if there is more already).
    pub fn return_credits(&mut self) -> Result<(), PciError> {
        if self.taken > 0 {
            self.bar.write32(self.base + ring::CREDITS, self.taken)?;
            self.taken = 0;
        }
        Ok(())
    }
}
