//! The driver's side of a split virtqueue (virtio 1.2 §2.7), with a buffer of its own for each slot.
//!
//! The device may use chains in any order, so what is with the device is kept in private memory: the chain of each head,
//! and which slots are free. What the device says is compared with that.

use std::sync::atomic::{Ordering, fence};

use crate::pci::{BadAccess, DmaMemory, PciError, PciFunction};

use super::transport::Window;

/// Bytes of a descriptor: address 8, length 4, flags 2, next 2.
const DESCRIPTOR: usize = 16;
const FLAG_NEXT: u16 = 1;
const FLAG_WRITE: u16 = 2;
/// Flag of the available ring: no interrupts; and of the used ring: no notifications.
const QUIET: u16 = 1;

/// What a look at the used ring has found.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Taken {
    /// Nothing new.
    Nothing,
    /// The chain that begins with this slot, and how many bytes the device says to have written.
    Chain(u16, u32),
    /// Something that cannot be: the ring is no longer to be trusted.
    Nonsense,
}

#[derive(Debug)]
pub(super) struct Ring {
    /// Descriptors, available ring, used ring.
    memory: DmaMemory,
    /// Where the two rings begin.
    available: usize,
    used: usize,
    buffers: DmaMemory,
    buffer: usize,
    size: u16,
    /// Slots that the device does not have.
    free: Vec<u16>,
    /// Of slots that head a chain which the device has: the number of slots. 0 for all others.
    chains: Vec<u16>,
    /// The slot after each slot of a chain.
    next: Vec<u16>,
    /// Chains that were made available, and those of them that the device knows of.
    head: u16,
    published: u16,
    /// Chains that were taken.
    tail: u16,
    /// Whether notifications and interrupts go by index.
    by_index: bool,
    armed: bool,
    doorbell: Option<(Window, u64, u16)>,
}

impl Ring {
    /// A ring of `size` slots, a power of two up to 32768, with buffers of `buffer` bytes.
    pub fn new(function: &mut dyn PciFunction, size: u16, buffer: usize) -> Result<Ring, PciError> {
        let slots = usize::from(size);
        let available = slots * DESCRIPTOR;
        let used = (available + 6 + 2 * slots).next_multiple_of(4);
        let memory = function.dma_alloc(used + 6 + 8 * slots)?;
        let buffers = function.dma_alloc(slots * buffer)?;
        Ok(Ring {
            memory,
            available,
            used,
            buffers,
            buffer,
            size,
            free: Vec::with_capacity(slots),
            chains: vec![0; slots],
            next: vec![0; slots],
            head: 0,
            published: 0,
            tail: 0,
            by_index: false,
            armed: false,
            doorbell: None,
        })
    }

    pub fn size(&self) -> u16 {
        self.size
    }

    /// Where the device finds descriptors, available ring and used ring.
    pub fn places(&self) -> [u64; 3] {
        let iova = self.memory.iova();
        [iova, iova + self.available as u64, iova + self.used as u64]
    }

    pub fn set_doorbell(&mut self, window: Window, offset: u64, queue: u16) {
        self.doorbell = Some((window, offset, queue));
    }

    /// Empties the ring, which no device has any more.
    pub fn start(&mut self, by_index: bool) -> Result<(), BadAccess> {
        self.memory.clear()?;
        self.free.clear();
        self.free.extend((0..self.size).rev());
        self.chains.fill(0);
        (self.head, self.published, self.tail) = (0, 0, 0);
        self.by_index = by_index;
        self.armed = true;
        self.disarm()
    }

    /// Chains that were not taken.
    pub fn outstanding(&self) -> u16 {
        self.head.wrapping_sub(self.tail)
    }

    /// Slots that are free.
    pub fn free(&self) -> usize {
        self.free.len()
    }

    /// The most bytes that fit into one chain.
    pub fn capacity(&self) -> usize {
        usize::from(self.size) * self.buffer
    }

    fn address(&self, slot: u16) -> usize {
        usize::from(slot) * self.buffer
    }

    /// Makes a chain of `len` bytes available, which `pieces` fill. `false`: there is no room.
    pub fn send<'p>(
        &mut self,
        pieces: impl Iterator<Item = &'p [u8]>,
        len: usize,
    ) -> Result<bool, BadAccess> {
        let count = len.div_ceil(self.buffer).max(1);
        let Some(first) = self.free.len().checked_sub(count) else { return Ok(false) };
        let (mut place, mut at) = (first, 0);
        for mut piece in pieces {
            while !piece.is_empty() {
                if at == self.buffer {
                    (place, at) = (place + 1, 0);
                }
                let (now, rest) = piece.split_at(piece.len().min(self.buffer - at));
                let Some(&slot) = self.free.get(place) else { return Ok(false) };
                self.buffers.write(self.address(slot) + at, now)?;
                at += now.len();
                piece = rest;
            }
        }
        self.chain(first, len, 0)?;
        Ok(true)
    }

    /// Makes a free slot available for the device to fill. `false`: there is none.
    pub fn post(&mut self) -> Result<bool, BadAccess> {
        let Some(first) = self.free.len().checked_sub(1) else { return Ok(false) };
        self.chain(first, self.buffer, FLAG_WRITE)?;
        Ok(true)
    }

    /// Makes a chain of the free slots from `first` on, which has `len` bytes.
    fn chain(&mut self, first: usize, len: usize, flags: u16) -> Result<(), BadAccess> {
        let slots = self.free.get(first..).unwrap_or_default();
        let mut left = len;
        for (index, &slot) in slots.iter().enumerate() {
            let next = slots.get(index + 1).copied();
            let at = usize::from(slot) * DESCRIPTOR;
            let step = left.min(self.buffer);
            self.memory.store_u64(at, self.buffers.iova() + self.address(slot) as u64)?;
            self.memory.store_u32(at + 8, step as u32)?;
            self.memory.store_u16(at + 12, flags | if next.is_some() { FLAG_NEXT } else { 0 })?;
            self.memory.store_u16(at + 14, next.unwrap_or(0))?;
            if let Some(place) = self.next.get_mut(usize::from(slot)) {
                *place = next.unwrap_or(0);
            }
            left -= step;
        }
        let (Some(&head), count) = (slots.first(), slots.len() as u16) else { return Ok(()) };
        self.memory.store_u16(self.available + 4 + 2 * self.index(self.head), head)?;
        if let Some(place) = self.chains.get_mut(usize::from(head)) {
            *place = count;
        }
        self.free.truncate(first);
        self.head = self.head.wrapping_add(1);
        Ok(())
    }

    fn index(&self, position: u16) -> usize {
        usize::from(position & (self.size - 1))
    }

    /// Tells the device of what was made available, unless it does not want to be told.
    pub fn flush(&mut self) -> Result<(), PciError> {
        if self.published == self.head {
            return Ok(());
        }
        self.memory.store_u16(self.available + 2, self.head)?;
        let before = std::mem::replace(&mut self.published, self.head);
        // What the device wants is read after what it was given is written.
        fence(Ordering::SeqCst);
        let wanted = if self.by_index {
            let event = self.memory.load_u16(self.used + 4 + 8 * usize::from(self.size))?;
            passes(event, before, self.head)
        } else {
            self.memory.load_u16(self.used)? & QUIET == 0
        };
        match &self.doorbell {
            Some((window, offset, queue)) if wanted => window.write16(*offset, *queue),
            _ => Ok(()),
        }
    }

    /// Takes the next chain that the device has used. It is the device's again only after [`Ring::release`].
    pub fn take(&mut self) -> Result<Taken, BadAccess> {
        let used = self.memory.load_u16(self.used + 2)?;
        match used.wrapping_sub(self.tail) {
            0 => return Ok(Taken::Nothing),
            new if new > self.published.wrapping_sub(self.tail) => return Ok(Taken::Nonsense),
            _ => {}
        }
        let at = self.used + 4 + 8 * self.index(self.tail);
        let (id, len) = (self.memory.load_u32(at)?, self.memory.load_u32(at + 4)?);
        let is_chain = self.chains.get(id as usize).is_some_and(|&count| count > 0);
        let Some(head) = u16::try_from(id).ok().filter(|_| is_chain) else { return Ok(Taken::Nonsense) };
        self.tail = self.tail.wrapping_add(1);
        Ok(Taken::Chain(head, len))
    }

    /// Copies bytes of a taken slot's buffer.
    pub fn read(&self, slot: u16, offset: usize, to: &mut [u8]) -> Result<(), BadAccess> {
        self.buffers.read(self.address(slot) + offset, to)
    }

    /// Frees the slots of a taken chain.
    pub fn release(&mut self, head: u16) {
        let count = self.chains.get_mut(usize::from(head)).map_or(0, std::mem::take);
        let mut slot = head;
        for _ in 0..count {
            self.free.push(slot);
            slot = self.next.get(usize::from(slot)).copied().unwrap_or(0);
        }
    }

    /// Whether there is something to be taken.
    pub fn is_ready(&self) -> Result<bool, BadAccess> {
        Ok(self.memory.load_u16(self.used + 2)? != self.tail)
    }

    /// Asks for an interrupt when something is used, and returns whether nothing is yet.
    pub fn arm(&mut self) -> Result<bool, BadAccess> {
        self.armed = true;
        if self.by_index {
            let event = self.available + 4 + 2 * usize::from(self.size);
            self.memory.store_u16(event, self.tail)?;
        } else {
            self.memory.store_u16(self.available, 0)?;
        }
        // What is used already is read after the device can know that it is waited for.
        fence(Ordering::SeqCst);
        Ok(!self.is_ready()?)
    }

    /// Asks for no more interrupts. By index, the device is silent once the index is behind it.
    pub fn disarm(&mut self) -> Result<(), BadAccess> {
        if std::mem::take(&mut self.armed) && !self.by_index {
            self.memory.store_u16(self.available, QUIET)?;
        }
        Ok(())
    }
}

/// Whether going from `before` to `now` passes `event` (virtio 1.2 §2.7.10).
fn passes(event: u16, before: u16, now: u16) -> bool {
    now.wrapping_sub(event).wrapping_sub(1) < now.wrapping_sub(before)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn events_are_passed_once() {
        assert!(passes(5, 5, 6));
        assert!(!passes(5, 6, 9) && !passes(9, 5, 9));
        assert!(passes(65535, 65530, 3), "across the end");
        assert!(!passes(3, 3, 3));
    }
}
