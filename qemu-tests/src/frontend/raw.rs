//! A ring without rules, for tests that play a hostile or broken driver (or, in unit tests, the device).

use std::sync::atomic::Ordering;

use super::ring::{RingShared, cell};
use super::{Buffer, Descriptor};

/// Direct access to every field of a split ring in guest memory, and by addresses to that of a packed one.
///
/// The [`super::Ring`]'s own books are not told of what is written here. After playing with it, take the ring over afresh
/// ([`super::Frontend::start`], [`super::Frontend::start_ring_fresh`]).
///
/// Slots are taken modulo the ring size, so indices can be passed as they are. Memory for hostile buffers and indirect
/// tables comes from [`super::GuestMemory::alloc`].
pub struct RawRing<'a> {
    shared: &'a RingShared,
}

impl<'a> RawRing<'a> {
    pub(super) fn new(shared: &'a RingShared) -> Self {
        Self { shared }
    }

    fn slot(&self, index: u16) -> usize {
        usize::from(index) % usize::from(self.shared.size)
    }

    /// Descriptor `id` of the table.
    pub fn descriptor(&self, id: u16) -> Descriptor {
        let mut bytes = [0; Descriptor::SIZE];
        self.shared.descriptors.read(self.slot(id) * Descriptor::SIZE, &mut bytes);
        Descriptor::from_bytes(bytes)
    }

    /// Overwrites descriptor `id` of the table.
    pub fn set_descriptor(&mut self, id: u16, descriptor: Descriptor) {
        self.shared.descriptors.write(self.slot(id) * Descriptor::SIZE, &descriptor.to_bytes());
    }

    /// Flags of the available ring.
    pub fn avail_flags(&self) -> u16 {
        word(&self.shared.avail, 0)
    }

    /// Sets the flags of the available ring.
    pub fn set_avail_flags(&mut self, flags: u16) {
        set_word(&self.shared.avail, 0, flags);
    }

    /// Index of the available ring.
    pub fn avail_index(&self) -> u16 {
        word(&self.shared.avail, 2)
    }

    /// Sets the index of the available ring; the device sees it at once.
    pub fn set_avail_index(&mut self, index: u16) {
        set_word(&self.shared.avail, 2, index);
    }

    /// Entry of the available ring: a head.
    pub fn avail_entry(&self, index: u16) -> u16 {
        word(&self.shared.avail, 4 + 2 * self.slot(index))
    }

    /// Sets an entry of the available ring.
    pub fn set_avail_entry(&mut self, index: u16, head: u16) {
        set_word(&self.shared.avail, 4 + 2 * self.slot(index), head);
    }

    /// Makes `head` available: the next entry, then the index.
    pub fn offer(&mut self, head: u16) {
        let index = self.avail_index();
        self.set_avail_entry(index, head);
        self.set_avail_index(index.wrapping_add(1));
    }

    /// Where the driver wants to be called (`EVENT_IDX`).
    pub fn used_event(&self) -> u16 {
        word(&self.shared.avail, 4 + 2 * usize::from(self.shared.size))
    }

    /// Sets where the driver wants to be called.
    pub fn set_used_event(&mut self, index: u16) {
        set_word(&self.shared.avail, 4 + 2 * usize::from(self.shared.size), index);
    }

    /// Flags of the used ring.
    pub fn used_flags(&self) -> u16 {
        word(&self.shared.used, 0)
    }

    /// Sets the flags of the used ring, which is the device's to write.
    pub fn set_used_flags(&mut self, flags: u16) {
        set_word(&self.shared.used, 0, flags);
    }

    /// Index of the used ring.
    pub fn used_index(&self) -> u16 {
        word(&self.shared.used, 2)
    }

    /// Sets the index of the used ring, which is the device's to write.
    pub fn set_used_index(&mut self, index: u16) {
        set_word(&self.shared.used, 2, index);
    }

    /// Entry of the used ring: head and length.
    pub fn used_entry(&self, index: u16) -> (u32, u32) {
        let mut bytes = [0; 8];
        self.shared.used.read(4 + 8 * self.slot(index), &mut bytes);
        let [a, b, c, d, e, f, g, h] = bytes;
        (u32::from_le_bytes([a, b, c, d]), u32::from_le_bytes([e, f, g, h]))
    }

    /// Sets an entry of the used ring, which is the device's to write.
    pub fn set_used_entry(&mut self, index: u16, id: u32, len: u32) {
        let at = 4 + 8 * self.slot(index);
        self.shared.used.write(at, &id.to_le_bytes());
        self.shared.used.write(at + 4, &len.to_le_bytes());
    }

    /// Where the device wants to be kicked (`EVENT_IDX`).
    pub fn avail_event(&self) -> u16 {
        word(&self.shared.used, 4 + 8 * usize::from(self.shared.size))
    }

    /// Sets where the device wants to be kicked, which is the device's to write.
    pub fn set_avail_event(&mut self, index: u16) {
        set_word(&self.shared.used, 4 + 8 * usize::from(self.shared.size), index);
    }

    /// Guest-physical addresses of descriptor table, available ring and used ring: what a hostile chain may point at.
    pub fn addresses(&self) -> [u64; 3] {
        [self.shared.descriptors.gpa(), self.shared.avail.gpa(), self.shared.used.gpa()]
    }
}

fn word(buffer: &Buffer, at: usize) -> u16 {
    cell(buffer, at).load(Ordering::SeqCst)
}

fn set_word(buffer: &Buffer, at: usize, value: u16) {
    // In this order the device sees what was written before no later than an index.
    cell(buffer, at).store(value, Ordering::SeqCst);
}
