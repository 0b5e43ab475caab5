//! The split ring (virtio 1.2, 2.7): its layout in guest memory, and the walk of descriptor chains. Positions are the 16-bit
//! indices of the available and the used ring.

use std::ptr;
use std::sync::Arc;
use std::sync::atomic::{AtomicU16, Ordering};

use virtio_bindings::virtio_ring::{
    VIRTIO_RING_F_EVENT_IDX, VIRTIO_RING_F_INDIRECT_DESC, VRING_AVAIL_F_NO_INTERRUPT, VRING_USED_F_NO_NOTIFY,
};

use super::layout::{
    Chain, DESC_LEN, Direction, F_INDIRECT, F_NEXT, F_WRITE, Layout, Single, Table, prefetch_target,
    read_aligned,
};
use super::mem::{GuestRegions, Seg, prefetch_read};
use super::publication::{Positions, passed, show};
use super::{RingBase, RingConfig, RingError};
use crate::handshake::{leave_then_look, then_look};

/// The largest ring (virtio 1.2, 2.7).
pub const MAX_SIZE: u16 = 32768;

/// Descriptors are asked for this many chains ahead.
const LOOK_AHEAD: u16 = 8;

/// Our private copy of a descriptor.
#[derive(Debug, Clone, Copy)]
struct Desc {
    addr: u64,
    len: u32,
    flags: u16,
    next: u16,
}

impl From<[u64; 2]> for Desc {
    #[inline(always)]
    fn from([addr, rest]: [u64; 2]) -> Self {
        Desc { addr, len: rest as u32, flags: (rest >> 32) as u16, next: (rest >> 48) as u16 }
    }
}

/// A split ring by host pointers. The pointers and `size` were checked together and never change.
pub(super) struct SplitRing {
    desc: Table,
    avail: *mut u16,
    used: *mut u16,
    /// Where the used ring is for the guest.
    used_at: u64,
    size: u16,
    event_idx: bool,
    indirect: bool,
    regions: Arc<GuestRegions>,
}

// SAFETY: the pointers are into the mapping that `regions` keeps; each access is an atomic or volatile one to shared
// memory, and who may write which entry is settled by `GuestTx` (one owner) and `GuestRx` (reservation).
unsafe impl Send for SplitRing {}
// SAFETY: as above.
unsafe impl Sync for SplitRing {}

impl SplitRing {
    /// The `i`th 16-bit word of the available ring: `flags, idx, ring[size], used_event`.
    #[inline]
    fn avail_word(&self, i: usize) -> &AtomicU16 {
        debug_assert!(i < usize::from(self.size) + 3);
        // SAFETY: the area of `size + 3` words was found in one region and aligned; shared memory is only accessed
        // atomically. The reference lives no longer than `self`, which keeps the mapping.
        unsafe { AtomicU16::from_ptr(self.avail.wrapping_add(i)) }
    }

    /// The `i`th 16-bit word of the used ring: `flags, idx, ring[size], avail_event`, of four words each in the ring.
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

    /// The entry at position `at` of the available ring, as the guest wrote it.
    #[inline(always)]
    fn avail_entry(&self, at: u16) -> u16 {
        self.avail_word(2 + usize::from(at & (self.size - 1))).load(Ordering::Relaxed)
    }

    /// Where the descriptor of a head is, if the head is less than `size`.
    #[inline(always)]
    fn desc_of(&self, head: u16) -> *const u8 {
        self.desc.ptr.wrapping_add(usize::from(head) * DESC_LEN as usize)
    }

    /// Hands the pieces of the chain that begins at a checked `head` to `sink`. Gives the bytes seen.
    fn walk(
        &self,
        head: u16,
        direction: Direction,
        enough: u32,
        hint: &mut usize,
        mut sink: impl FnMut(Seg) -> Result<(), RingError>,
    ) -> Result<u32, RingError> {
        let mut table = self.desc;
        let mut in_table = false;
        let mut index = u32::from(head);
        // A chain visits each descriptor of its table at most once.
        let mut visits = table.size;
        let mut total = 0u32;
        loop {
            let d = Desc::from(table.read(index));
            if d.flags & F_INDIRECT != 0 {
                if !self.indirect || in_table {
                    return Err(RingError::Indirect);
                }
                table = Table::indirect(&self.regions, d.addr, d.len, d.flags, hint)?;
                in_table = true;
                index = 0;
                visits = table.size;
                continue;
            }
            if d.flags & F_WRITE == direction.flag() {
                if d.len == 0 {
                    return Err(RingError::ZeroLength);
                }
                self.regions.pieces(d.addr, d.len, hint, &mut sink)?;
                total = total.checked_add(d.len).ok_or(RingError::TooLong)?;
            } else if !direction.is_part() {
                return Err(RingError::Direction);
            }
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
}

impl Positions for SplitRing {
    #[inline(always)]
    fn size(&self) -> u16 {
        self.size
    }

    #[inline(always)]
    fn advance(&self, at: u16, places: u16) -> u16 {
        at.wrapping_add(places)
    }

    #[inline(always)]
    fn retreat(&self, at: u16, places: u16) -> u16 {
        at.wrapping_sub(places)
    }

    #[inline(always)]
    fn places(&self, from: u16, to: u16) -> u16 {
        to.wrapping_sub(from)
    }
}

impl Layout for SplitRing {
    fn new(regions: Arc<GuestRegions>, config: &RingConfig) -> Result<Self, RingError> {
        let size = config.size;
        if !size.is_power_of_two() || size > MAX_SIZE {
            return Err(RingError::Size(size));
        }
        let n = u32::from(size);
        // Both rings end with an event index, used or not.
        let desc = regions.ring_part("descriptor table", config.desc, n * DESC_LEN, 16)?;
        let avail = regions.ring_part("available ring", config.avail, 4 + 2 * n + 2, 2)?;
        let used = regions.ring_part("used ring", config.used, 4 + 8 * n + 2, 4)?;
        Ok(SplitRing {
            desc: Table { ptr: desc, size: n },
            avail: avail.cast(),
            used: used.cast(),
            used_at: config.used,
            size,
            event_idx: config.has(VIRTIO_RING_F_EVENT_IDX),
            indirect: config.has(VIRTIO_RING_F_INDIRECT_DESC),
            regions,
        })
    }

    #[inline(always)]
    fn regions(&self) -> &Arc<GuestRegions> {
        &self.regions
    }

    #[inline(always)]
    fn log_ring(&self) {
        if let Some(log) = self.regions.log() {
            log.mark(self.used_at, 6 + 8 * u32::from(self.size));
        }
    }

    /// Goes on behind what was used, as guest memory has it: all of our rings give buffers back in the order in which they took
    /// them, so whatever is behind was not taken, or is with nobody any more. The front-end knows no better, and some that have
    /// lost a backend know nothing: DPDK's virtio-user then names 0.
    fn start(&mut self, _: &RingConfig, base: &RingBase, _: Direction) -> Result<(u16, u16), RingError> {
        let used = self.used_word(1).load(Ordering::Relaxed);
        if self.event_idx {
            self.used_word(0).store(0, Ordering::Relaxed);
            // An index that `used` has just passed.
            self.avail_event().store(used.wrapping_sub(1), Ordering::Relaxed);
        }
        self.disarm();
        // A front-end that gives buffers back by itself says so in the used index.
        base.set_gap(None);
        Ok((used, used))
    }

    fn pass(&self, _: u16) {}

    #[inline]
    fn available(&self, next: u16, in_flight: u16) -> Result<u16, RingError> {
        // Acquire: entries and descriptors are read after the index that covers them.
        let index = self.avail_word(1).load(Ordering::Acquire);
        let n = index.wrapping_sub(next);
        if n > self.size {
            return Err(RingError::AvailIndex { index, next });
        }
        Ok(n.min(self.size.saturating_sub(in_flight)))
    }

    #[inline(always)]
    fn is_filled(&self, next: u16) -> bool {
        self.avail_word(1).load(Ordering::Relaxed) != next
    }

    #[inline(always)]
    fn entry(_: Direction, id: u16, len: u32) -> u64 {
        u64::from(id) | u64::from(len) << 32
    }

    #[inline(always)]
    fn singles(
        &self,
        next: u16,
        n: u16,
        direction: Direction,
        mut each: impl FnMut(usize, Single) -> bool,
    ) -> u16 {
        for i in 0..n {
            let at = next.wrapping_add(i);
            // Whatever is there yet: a prefetch never faults.
            prefetch_read(self.desc_of(self.avail_entry(at.wrapping_add(LOOK_AHEAD))));
            let head = self.avail_entry(at);
            if head >= self.size {
                return i;
            }
            // SAFETY: the table has `size` descriptors and is aligned to 16, as was checked.
            let desc = Desc::from(unsafe { read_aligned(self.desc_of(head)) });
            if desc.flags & (F_NEXT | F_WRITE | F_INDIRECT) != direction.flag()
                || !each(i.into(), Single { id: head, addr: desc.addr, len: desc.len })
            {
                return i;
            }
        }
        n
    }

    #[inline]
    fn chain(
        &self,
        next: u16,
        available: u16,
        direction: Direction,
        enough: u32,
        hint: &mut usize,
        sink: impl FnMut(Seg) -> Result<(), RingError>,
    ) -> Result<Option<Chain>, RingError> {
        if available == 0 {
            return Ok(None);
        }
        let head = self.avail_entry(next);
        if head >= self.size {
            return Err(RingError::DescIndex { index: head, size: u32::from(self.size) });
        }
        let len = self.walk(head, direction, enough, hint, sink)?;
        Ok(Some(Chain { id: head, places: 1, len }))
    }

    fn prefetch_chain(&self, at: u16, hint: &mut usize) {
        let head = self.avail_entry(at);
        if head < self.size {
            prefetch_target(&self.regions, Desc::from(self.desc.read(head.into())).addr, hint);
        }
    }

    #[inline]
    fn publish(&self, at: u16, entries: &[u64], _: &[u16]) -> u16 {
        assert!(entries.len() <= usize::from(self.size));
        let slot = usize::from(at & (self.size - 1));
        let (before, after) = entries.split_at(entries.len().min(usize::from(self.size) - slot));
        for (slot, part) in [(slot, before), (0, after)] {
            // SAFETY: `slot + part.len() <= size`, so this is within the used ring, which was found in one region. Entries
            // begin 4 bytes into it and are copied as bytes; the guest reads them when their index is published.
            unsafe {
                ptr::copy_nonoverlapping(
                    part.as_ptr().cast::<u8>(),
                    self.used.wrapping_add(2 + 4 * slot).cast::<u8>(),
                    8 * part.len(),
                );
            }
        }
        let after = at.wrapping_add(entries.len() as u16);
        show(self.used_word(1), after);
        after
    }

    #[inline]
    fn wants_call(&self, published: [u16; 2]) -> bool {
        // Our index must be visible before we read whether the guest sleeps; the guest does it the other way round
        // (virtio 1.2, 2.7.10.1).
        then_look(|| match self.event_idx {
            true => passed(self.used_event().load(Ordering::Relaxed), published),
            false => self.avail_word(0).load(Ordering::Relaxed) & VRING_AVAIL_F_NO_INTERRUPT as u16 == 0,
        })
    }

    fn arm(&self, next: u16) -> bool {
        let ask = || match self.event_idx {
            true => self.avail_event().store(next, Ordering::Relaxed),
            false => self.used_word(0).store(0, Ordering::Relaxed),
        };
        // Our wish must be visible before we look again; the guest does it the other way round (2.7.10.1).
        leave_then_look(ask, || !self.is_filled(next))
    }

    /// With an event index there is nothing to write: a stale one does not match, but for once in 65,536.
    fn disarm(&self) {
        if !self.event_idx {
            self.used_word(0).store(VRING_USED_F_NO_NOTIFY as u16, Ordering::Relaxed);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn event_index_wraps() {
        assert!(passed(5, [5, 6]));
        assert!(!passed(6, [5, 6]));
        assert!(!passed(4, [5, 6]));
        assert!(passed(0xffff, [0xfffe, 1]));
        assert!(passed(0, [0xfffe, 1]));
        assert!(!passed(1, [0xfffe, 1]));
        assert!(!passed(0xfffd, [0xfffe, 1]));
        assert!(!passed(7, [7, 7]), "nothing new");
    }
}
