//! The split ring (virtio 1.2, 2.7): its layout in guest memory, and the walk of descriptor chains.

use std::ptr;
use std::sync::Arc;
use std::sync::atomic::{AtomicU16, Ordering, fence};

use virtio_bindings::virtio_ring::{
    VIRTIO_RING_F_EVENT_IDX, VIRTIO_RING_F_INDIRECT_DESC, VRING_AVAIL_F_NO_INTERRUPT, VRING_DESC_F_INDIRECT,
    VRING_DESC_F_NEXT, VRING_DESC_F_WRITE, VRING_USED_F_NO_NOTIFY,
};

use super::mem::{GuestRegions, Seg, Translator, prefetch_read};
use super::{RingConfig, RingError};

/// The largest ring (virtio 1.2, 2.7).
pub const MAX_SIZE: u16 = 32768;

const DESC_LEN: u32 = 16;
const F_NEXT: u16 = VRING_DESC_F_NEXT as u16;
const F_WRITE: u16 = VRING_DESC_F_WRITE as u16;
const F_INDIRECT: u16 = VRING_DESC_F_INDIRECT as u16;

/// Our private copy of a descriptor.
#[derive(Debug, Clone, Copy)]
pub(super) struct Desc {
    pub addr: u64,
    pub len: u32,
    pub flags: u16,
    pub next: u16,
}

impl Desc {
    fn from_words(addr: u64, rest: u64) -> Self {
        Desc { addr, len: rest as u32, flags: (rest >> 32) as u16, next: (rest >> 48) as u16 }
    }

    /// A whole chain of one plain descriptor that the device may only read.
    pub(super) fn is_single_readable(&self) -> bool {
        self.flags & (F_NEXT | F_WRITE | F_INDIRECT) == 0 && self.len > 0
    }
}

/// A descriptor table in guest memory: the ring's, or an indirect one.
#[derive(Clone, Copy)]
struct Table {
    ptr: *const u8,
    /// Descriptors.
    size: u32,
}

impl Table {
    /// Copies descriptor `index`, which must be less than `size`, once.
    #[inline]
    fn read(&self, index: u32) -> Desc {
        debug_assert!(index < self.size);
        let p = self.ptr.wrapping_add((index * DESC_LEN) as usize);
        if p.cast::<u64>().is_aligned() {
            let p = p.cast::<u64>();
            // SAFETY: `index < size`, and a table is `size` descriptors of mapped guest memory; aligned as checked.
            // Volatile: one read each, however often the guest writes.
            let words = unsafe { (ptr::read_volatile(p), ptr::read_volatile(p.wrapping_add(1))) };
            Desc::from_words(words.0, words.1)
        } else {
            let mut bytes = [0; DESC_LEN as usize];
            for (i, b) in bytes.iter_mut().enumerate() {
                // SAFETY: in bounds as above; single bytes are always aligned.
                *b = unsafe { ptr::read_volatile(p.wrapping_add(i)) };
            }
            let (a, b) = bytes.split_at(8);
            let word = |s: &[u8]| s.iter().rev().fold(0, |w, &b| w << 8 | u64::from(b));
            Desc::from_words(word(a), word(b))
        }
    }
}

/// Which way the bytes of a ring's buffers go.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Direction {
    /// We read them: a guest's transmit ring.
    FromGuest,
    /// We write them: a guest's receive ring.
    ToGuest,
}

/// A split ring by host pointers. The pointers and `size` were checked together and never change.
pub(super) struct SplitRing {
    desc: Table,
    avail: *mut u16,
    used: *mut u16,
    size: u16,
    event_idx: bool,
    indirect: bool,
    pub(super) regions: Arc<GuestRegions>,
}

// SAFETY: the pointers are into the mapping that `regions` keeps; each access is an atomic or volatile one to shared
// memory, and who may write which entry is settled by `GuestTx` (one owner) and `GuestRx` (reservation).
unsafe impl Send for SplitRing {}
// SAFETY: as above.
unsafe impl Sync for SplitRing {}

impl SplitRing {
    /// Resolves a ring's addresses.
    ///
    /// # Errors
    /// [`RingError::Size`], [`RingError::Layout`].
    pub(super) fn new(regions: Arc<GuestRegions>, config: &RingConfig) -> Result<Self, RingError> {
        let size = config.size;
        if !size.is_power_of_two() || size > MAX_SIZE {
            return Err(RingError::Size(size));
        }
        let n = u32::from(size);
        // Each part in one region, and aligned in our address space as well as in the guest's: an atomic access needs
        // it, and a region may be mapped at any offset. Both rings end with an event index, used or not.
        let resolve = |part, addr, len, align| {
            regions
                .translate(addr, len)
                .map(|seg| seg.ptr())
                .filter(|p| (*p as usize).is_multiple_of(align))
                .ok_or(RingError::Layout { part, addr })
        };
        let desc = resolve("descriptor table", config.desc, n * DESC_LEN, 16)?;
        let avail = resolve("available ring", config.avail, 4 + 2 * n + 2, 2)?;
        let used = resolve("used ring", config.used, 4 + 8 * n + 2, 4)?;
        Ok(SplitRing {
            desc: Table { ptr: desc, size: n },
            avail: avail.cast(),
            used: used.cast(),
            size,
            event_idx: config.has(VIRTIO_RING_F_EVENT_IDX),
            indirect: config.has(VIRTIO_RING_F_INDIRECT_DESC),
            regions,
        })
    }

    /// Entries.
    pub(super) fn size(&self) -> u16 {
        self.size
    }

    /// The `i`th 16-bit word of the available ring: flags, idx, ring[size], used_event.
    #[inline]
    fn avail_word(&self, i: usize) -> &AtomicU16 {
        debug_assert!(i < usize::from(self.size) + 3);
        // SAFETY: the area of `size + 3` words was found in one region and aligned; shared memory is only accessed
        // atomically. The reference lives no longer than `self`, which keeps the mapping.
        unsafe { AtomicU16::from_ptr(self.avail.wrapping_add(i)) }
    }

    /// The `i`th 16-bit word of the used ring: flags, idx, ring[size] of four words each, avail_event.
    #[inline]
    fn used_word(&self, i: usize) -> &AtomicU16 {
        debug_assert!(i < 4 * usize::from(self.size) + 3);
        // SAFETY: as `avail_word`, with `4 * size + 3` words.
        unsafe { AtomicU16::from_ptr(self.used.wrapping_add(i)) }
    }

    fn used_event(&self) -> &AtomicU16 {
        self.avail_word(2 + usize::from(self.size))
    }

    fn avail_event(&self) -> &AtomicU16 {
        self.used_word(2 + 4 * usize::from(self.size))
    }

    /// Up to which position the guest has made chains available, as it says.
    #[inline(always)]
    pub(super) fn avail_index(&self) -> u16 {
        self.avail_word(1).load(Ordering::Relaxed)
    }

    /// How many chains the guest has made available from `next` on.
    ///
    /// # Errors
    /// [`RingError::AvailIndex`]: more than the ring's size.
    #[inline]
    pub(super) fn available(&self, next: u16) -> Result<u16, RingError> {
        // Acquire: entries and descriptors are read after the index that covers them.
        let index = self.avail_word(1).load(Ordering::Acquire);
        let n = index.wrapping_sub(next);
        if n > self.size { Err(RingError::AvailIndex { index, next }) } else { Ok(n) }
    }

    /// The head of the chain at position `at` of the available ring.
    ///
    /// # Errors
    /// [`RingError::DescIndex`].
    #[inline]
    pub(super) fn head(&self, at: u16) -> Result<u16, RingError> {
        let head = self.avail_word(2 + usize::from(at & (self.size - 1))).load(Ordering::Relaxed);
        if head < self.size {
            Ok(head)
        } else {
            Err(RingError::DescIndex { index: head, size: u32::from(self.size) })
        }
    }

    /// Asks for the descriptor of the head at position `at` of the available ring, whatever that is yet.
    #[inline(always)]
    pub(super) fn prefetch_head(&self, at: u16) {
        let head = self.avail_word(2 + usize::from(at & (self.size - 1))).load(Ordering::Relaxed);
        self.prefetch_desc(head); // a prefetch never faults
    }

    /// Asks for the descriptor of a head.
    #[inline]
    pub(super) fn prefetch_desc(&self, head: u16) {
        prefetch_read(self.desc.ptr.wrapping_add(usize::from(head) * DESC_LEN as usize));
    }

    /// Copies the descriptor of a checked head.
    #[inline]
    pub(super) fn desc(&self, head: u16) -> Desc {
        self.desc.read(u32::from(head))
    }

    /// The buffer of a chain that is one plain descriptor, writable, of at least `need` bytes and in one region. For any other
    /// chain, [`walk`](Self::walk) it.
    #[inline(always)]
    pub(super) fn single_writable(&self, head: u16, need: u32, memory: &mut Translator) -> Option<Seg> {
        let desc = self.desc(head);
        if desc.flags & (F_NEXT | F_WRITE | F_INDIRECT) != F_WRITE || desc.len < need {
            return None;
        }
        memory.translate(desc.addr, desc.len)
    }

    /// Hands the pieces of the chain that begins at a checked `head` to `sink`, until they hold `enough` bytes or the
    /// chain ends. Returns the bytes seen, at least `enough` if the chain has them.
    ///
    /// # Errors
    /// What the chain does wrong; what `sink` returns.
    #[inline]
    pub(super) fn walk(
        &self,
        head: u16,
        direction: Direction,
        enough: u32,
        hint: &mut usize,
        mut sink: impl FnMut(Seg) -> Result<(), RingError>,
    ) -> Result<u32, RingError> {
        let want_write = direction == Direction::ToGuest;
        let mut table = self.desc;
        let mut in_table = false;
        let mut index = u32::from(head);
        // A chain visits each descriptor of its table at most once.
        let mut visits = table.size;
        let mut total = 0u32;
        loop {
            let d = table.read(index);
            if d.flags & F_INDIRECT != 0 {
                // The write flag of the indirect descriptor itself is to be ignored (virtio 1.2, 2.7.5.3.2).
                let whole = d.len >= DESC_LEN && d.len.is_multiple_of(DESC_LEN);
                if !self.indirect || in_table || d.flags & F_NEXT != 0 || !whole {
                    return Err(RingError::Indirect);
                }
                let seg = self
                    .regions
                    .translate_hinted(d.addr, d.len, hint)
                    .ok_or(RingError::Address { addr: d.addr, len: d.len })?;
                table = Table { ptr: seg.ptr(), size: d.len / DESC_LEN };
                in_table = true;
                index = 0;
                visits = table.size;
                continue;
            }
            if (d.flags & F_WRITE != 0) != want_write {
                return Err(RingError::Direction);
            }
            if d.len == 0 {
                return Err(RingError::ZeroLength);
            }
            self.regions.pieces(d.addr, d.len, hint, &mut sink)?;
            total = total.checked_add(d.len).ok_or(RingError::TooLong)?;
            if d.flags & F_NEXT == 0 || total >= enough {
                return Ok(total);
            }
            visits -= 1;
            if visits == 0 {
                return Err(RingError::Loop);
            }
            index = u32::from(d.next);
            if index >= table.size {
                return Err(RingError::DescIndex { index: d.next, size: table.size });
            }
        }
    }

    /// The used index in guest memory: where a ring that is started again goes on.
    pub(super) fn used_index(&self) -> u16 {
        self.used_word(1).load(Ordering::Relaxed)
    }

    /// Writes the used entry at position `at`. It must be the caller's: not yet published, and nobody else's.
    #[inline]
    pub(super) fn write_used(&self, at: u16, head: u16, len: u32) {
        // Entries begin 4 bytes into an area aligned to 4, so they are written as two words of 32 bits.
        let entry = self.used.wrapping_add(2 + 4 * usize::from(at & (self.size - 1))).cast::<u32>();
        // SAFETY: within the used ring, which was found in one region and aligned to 4. The guest may read it
        // meanwhile, hence volatile.
        unsafe {
            ptr::write_volatile(entry, u32::from(head));
            ptr::write_volatile(entry.wrapping_add(1), len);
        }
    }

    /// Publishes all used entries before position `index`.
    #[inline]
    pub(super) fn publish_used(&self, index: u16) {
        // Release: after the entries, and the data that they announce.
        self.used_word(1).store(index, Ordering::Release);
    }

    /// Whether the guest wants to be interrupted, the used index having gone from `old` to `new`.
    #[inline]
    pub(super) fn wants_call(&self, old: u16, new: u16) -> bool {
        // Our index must be visible before we read whether the guest sleeps; the guest does it the other way round
        // (virtio 1.2, 2.7.10.1).
        fence(Ordering::SeqCst);
        if self.event_idx {
            let event = self.used_event().load(Ordering::Relaxed);
            passed(event, old, new)
        } else {
            self.avail_word(0).load(Ordering::Relaxed) & VRING_AVAIL_F_NO_INTERRUPT as u16 == 0
        }
    }

    /// Asks the guest for a kick at what comes after `next`. True if there is nothing at `next` yet, so that we may
    /// sleep.
    pub(super) fn arm(&self, next: u16) -> bool {
        if self.event_idx {
            self.avail_event().store(next, Ordering::Relaxed);
        } else {
            self.used_word(0).store(0, Ordering::Relaxed);
        }
        // Our wish must be visible before we look again; the guest does it the other way round (2.7.10.1).
        fence(Ordering::SeqCst);
        self.avail_word(1).load(Ordering::Relaxed) == next
    }

    /// Asks the guest for no kicks. With an event index there is nothing to write: a stale one does not match, but
    /// for once in 65,536.
    pub(super) fn disarm(&self) {
        if !self.event_idx {
            self.used_word(0).store(VRING_USED_F_NO_NOTIFY as u16, Ordering::Relaxed);
        }
    }

    /// Writes what a ring starts with: no kicks, and an event index that `next` has just passed.
    pub(super) fn start(&self, next: u16) {
        if self.event_idx {
            self.used_word(0).store(0, Ordering::Relaxed);
            self.avail_event().store(next.wrapping_sub(1), Ordering::Relaxed);
        }
        self.disarm();
    }
}

/// Whether an index that went from `old` to `new` has passed `event` (`vring_need_event`, virtio 1.2, 2.7.7.1).
#[inline]
fn passed(event: u16, old: u16, new: u16) -> bool {
    new.wrapping_sub(event).wrapping_sub(1) < new.wrapping_sub(old)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn event_index_wraps() {
        assert!(passed(5, 5, 6));
        assert!(!passed(6, 5, 6));
        assert!(!passed(4, 5, 6));
        assert!(passed(0xffff, 0xfffe, 1));
        assert!(passed(0, 0xfffe, 1));
        assert!(!passed(1, 0xfffe, 1));
        assert!(!passed(0xfffd, 0xfffe, 1));
        assert!(!passed(7, 7, 7), "nothing new");
    }
}
