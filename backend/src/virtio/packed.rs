//! The packed ring (virtio 1.2, 2.8): one ring of descriptors that the guest fills and we overwrite, and two words by which
//! either side says when it wants to be notified.
//!
//! A position is what the front-end calls a base: bits 0 to 14 are the place, bit 15 is the wrap counter, which is 1 in the
//! first lap and turned over at each end of the ring. Buffers are given back in the order in which they were made available, so
//! where one is given back is the place of its first descriptor, and what was used ends where what is in flight begins.

use std::ptr;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};

use virtio_bindings::virtio_config::VIRTIO_F_IN_ORDER;
use virtio_bindings::virtio_ring::{
    VIRTIO_RING_F_EVENT_IDX, VIRTIO_RING_F_INDIRECT_DESC, VRING_PACKED_DESC_F_AVAIL,
    VRING_PACKED_DESC_F_USED, VRING_PACKED_EVENT_FLAG_DESC, VRING_PACKED_EVENT_FLAG_DISABLE,
    VRING_PACKED_EVENT_FLAG_ENABLE,
};

use super::layout::{
    Chain, DESC_LEN, Direction, F_INDIRECT, F_NEXT, F_WRITE, Layout, Single, Table, prefetch_target,
};
use super::mem::{GuestRegions, Seg, prefetch_read};
use super::publication::Positions;
use super::record::{self, Batch, Gap, Last, RingRecord};
use super::{RingBase, RingConfig, RingError};
use crate::handshake::{leave_then_look, then_look};

/// The largest ring (virtio 1.2, 2.8.10.1). The size need not be a power of two.
const MAX_SIZE: u16 = 32768;

/// Descriptors are asked for so many bytes ahead: two cache lines, or eight descriptors.
const LOOK_AHEAD: usize = 128;

const F_AVAIL: u16 = 1 << VRING_PACKED_DESC_F_AVAIL;
const F_USED: u16 = 1 << VRING_PACKED_DESC_F_USED;
/// Bit 15 of a position.
const WRAP: u16 = 1 << 15;
/// Flags are the uppermost 16 bits of a descriptor's second word, which has length and id before them.
const FLAGS_AT: u32 = 48;

/// Descriptors of one buffer that are gone over behind those that are needed, to find its id: what they are good for is nobody's
/// but the guest's, and other ports' packets wait meanwhile.
const MAX_NEEDLESS: u16 = 256;
/// The flags of an event suppression word: the low two bits of its upper half.
const EVENT_MASK: u32 = 3;
const EVENT_ENABLE: u32 = VRING_PACKED_EVENT_FLAG_ENABLE;
const EVENT_DISABLE: u32 = VRING_PACKED_EVENT_FLAG_DISABLE;
const EVENT_DESC: u32 = VRING_PACKED_EVENT_FLAG_DESC;

/// Our private copy of a descriptor.
#[derive(Debug, Clone, Copy)]
struct Desc {
    addr: u64,
    len: u32,
    id: u16,
    flags: u16,
}

impl From<[u64; 2]> for Desc {
    #[inline(always)]
    fn from([addr, rest]: [u64; 2]) -> Self {
        Desc { addr, len: rest as u32, id: (rest >> 32) as u16, flags: (rest >> FLAGS_AT) as u16 }
    }
}

/// A packed ring by host pointers. The pointers and `size` were checked together and never change.
pub(super) struct PackedRing {
    desc: *mut u8,
    /// When the guest wants to be interrupted.
    driver: *mut u32,
    /// When we want to be kicked.
    device: *mut u32,
    size: u16,
    event_idx: bool,
    indirect: bool,
    in_order: bool,
    /// Where our place is kept for who comes after us.
    record: Option<RingRecord>,
    /// Where descriptors and device event area are for the guest.
    written_at: [u64; 2],
    regions: Arc<GuestRegions>,
}

// SAFETY: the pointers are into the mapping that `regions` keeps; each access is an atomic or volatile one to shared
// memory, and who may write which descriptor is settled by `GuestTx` (one owner) and `GuestRx` (reservation).
unsafe impl Send for PackedRing {}
// SAFETY: as above.
unsafe impl Sync for PackedRing {}

/// The flags of what is available in a lap.
#[inline(always)]
fn filled_flags(position: u16) -> u16 {
    if position & WRAP != 0 { F_AVAIL } else { F_USED }
}

/// The flags of what is used in a lap, as bits of the descriptor's second word.
#[inline(always)]
fn used_flags(position: u16) -> u64 {
    if position & WRAP != 0 { u64::from(F_AVAIL | F_USED) << FLAGS_AT } else { 0 }
}

/// The places that the buffers of some entries take.
#[inline(always)]
fn sum(entries: &[u64], places: &[u16]) -> u16 {
    if places.is_empty() { entries.len() as u16 } else { places.iter().sum() }
}

/// The place of a position.
#[inline(always)]
fn place(position: u16) -> u16 {
    position & !WRAP
}

impl PackedRing {
    /// The descriptor of a place.
    #[inline(always)]
    fn desc(&self, place: u16) -> *mut u8 {
        debug_assert!(place < self.size);
        self.desc.wrapping_add(usize::from(place) * DESC_LEN as usize)
    }

    /// Length, id and flags of the descriptor of a place.
    #[inline(always)]
    fn word(&self, place: u16) -> &AtomicU64 {
        // SAFETY: `place < size`, and the descriptors are in one region and aligned to 16. Shared memory is only accessed
        // atomically; the reference lives no longer than `self`, which keeps the mapping.
        unsafe { AtomicU64::from_ptr(self.desc(place).cast::<u64>().wrapping_add(1)) }
    }

    /// Copies the descriptor of a place, once.
    #[inline(always)]
    fn read(&self, place: u16) -> Desc {
        // Acquire: the address, and the descriptors after this one, are read after the flags that make them available.
        let rest = self.word(place).load(Ordering::Acquire);
        // SAFETY: as in `word`. Volatile: one read, however often the guest writes.
        let addr = unsafe { ptr::read_volatile(self.desc(place).cast::<u64>()) };
        Desc::from([addr, rest])
    }

    /// When the guest wants to be interrupted: a position, and flags above it.
    fn driver_event(&self) -> &AtomicU32 {
        // SAFETY: as in `word`, with an area of 4 bytes aligned to 4.
        unsafe { AtomicU32::from_ptr(self.driver) }
    }

    /// The same of our wish to be kicked.
    fn device_event(&self) -> &AtomicU32 {
        // SAFETY: as above.
        unsafe { AtomicU32::from_ptr(self.device) }
    }

    /// Writes entries with these flags to so many places from `place` on.
    #[inline(always)]
    fn write_run(&self, place: u16, entries: &[u64], flags: u64) {
        assert!(usize::from(place) + entries.len() <= usize::from(self.size));
        let mut at = self.desc.wrapping_add(usize::from(place) * DESC_LEN as usize + 8);
        for &entry in entries {
            // SAFETY: as in `word`: the second word of a descriptor before `place + entries.len()`.
            unsafe { AtomicU64::from_ptr(at.cast()) }.store(entry | flags, Ordering::Relaxed);
            at = at.wrapping_add(DESC_LEN as usize);
        }
    }

    /// Hands the pieces of an indirect table to `sink`. Gives the bytes seen.
    fn walk_table(
        &self,
        d: Desc,
        direction: Direction,
        enough: u32,
        hint: &mut usize,
        sink: &mut impl FnMut(Seg) -> Result<(), RingError>,
    ) -> Result<u32, RingError> {
        if !self.indirect {
            return Err(RingError::Indirect);
        }
        let table = Table::indirect(&self.regions, d.addr, d.len, d.flags, hint)?;
        let mut total = 0;
        for i in 0..table.size {
            // One after the other: there is no `next` in a table of this kind, and its flag says nothing (2.8.7).
            let d = Desc::from(table.read(i));
            if d.flags & F_INDIRECT != 0 {
                return Err(RingError::Indirect);
            }
            total = self.piece(d, direction, total, hint, sink)?;
            if total >= enough {
                break;
            }
        }
        Ok(total)
    }

    /// Hands the pieces of a plain descriptor to `sink`. Gives `total` and its bytes.
    #[inline(always)]
    fn piece(
        &self,
        d: Desc,
        direction: Direction,
        total: u32,
        hint: &mut usize,
        sink: &mut impl FnMut(Seg) -> Result<(), RingError>,
    ) -> Result<u32, RingError> {
        if d.flags & F_WRITE != direction.flag() {
            return if direction.is_part() { Ok(total) } else { Err(RingError::Direction) };
        }
        if d.len == 0 {
            return Err(RingError::ZeroLength);
        }
        self.regions.pieces(d.addr, d.len, hint, sink)?;
        total.checked_add(d.len).ok_or(RingError::TooLong)
    }

    /// Whether the ring can be at `position`, as far as its descriptors tell. A front-end whose backend has died names the
    /// position of the last start, and to go on there would be to give back what the guest is not waiting for.
    ///
    /// Before the position, all was made available in this lap; behind it, nothing was used in this lap. A receive ring
    /// that has just been made has nothing of another lap either: if all is available, as it mostly is, only that tells. What is
    /// in the gap is left out.
    fn is_at(&self, position: u16, direction: Direction, gap: Option<Gap>) -> bool {
        let both = F_AVAIL | F_USED;
        let used = if position & WRAP != 0 { both } else { 0 };
        let new = position == WRAP && direction == Direction::ToGuest;
        (0..self.size).filter(|&i| !self.is_in(i, gap)).all(|i| {
            let flags = (self.word(i).load(Ordering::Relaxed) >> FLAGS_AT) as u16 & both;
            if i < place(position) {
                flags != used ^ both
            } else {
                flags != used && !(new && flags == F_USED)
            }
        })
    }

    /// Whether the place lies in the gap.
    fn is_in(&self, place: u16, gap: Option<Gap>) -> bool {
        gap.is_some_and(|[from, to]| {
            let start = self::place(from);
            let behind = if place < start { place + (self.size - start) } else { place - start };
            behind < self.places(from, to)
        })
    }

    /// Where the ring is whose last entries these were; they are written now if they were not. `None`: it is not such a ring.
    fn resume(&self, last: &Batch, direction: Direction, gap: Option<Gap>) -> Option<u16> {
        let &Batch { at, after, ref entries, ref places } = last;
        if place(at) >= self.size || place(after) >= self.size {
            return None;
        }
        if entries.is_empty() {
            return (at == after && self.is_at(at, direction, gap)).then_some(at);
        }
        // They were written down whole, as far as it was us who did.
        let taken: u32 = match places.is_empty() {
            true => entries.len() as u32,
            false => places.iter().map(|&places| u32::from(places)).sum(),
        };
        let sound = taken <= self.size.into()
            && places.iter().all(|&places| places > 0)
            && self.advance(at, taken as u16) == after;
        if self.is_filled(at) {
            return sound.then(|| self.publish(at, entries, places));
        }
        if sound
            && let Some([_, to]) = gap.filter(|_| self.is_in(place(at), gap))
            && u32::from(self.places(at, to)) < taken
            && self.is_filled(to)
        {
            // The first ones were dropped, the others not.
            let mut from = at;
            let first = (0..entries.len()).find(|&i| {
                let is_there = from == to;
                from = self.advance(from, places.get(i).copied().unwrap_or(1));
                is_there
            });
            return Some(match first {
                Some(i) => self.publish(to, &entries[i..], places.get(i..).unwrap_or_default()),
                // One for all (2.8.9).
                None => self.publish(to, &entries[entries.len() - 1..], &[self.places(to, after)]),
            });
        }
        // They are there, so what is said of them does not matter: the next ones may have been half written down over it.
        // Used in that lap, or made available again for the next one, and perhaps dropped.
        let used = (self.word(place(at)).load(Ordering::Relaxed) >> FLAGS_AT) as u16 & F_USED != 0;
        (used == (at & WRAP != 0) || self.is_in(place(at), gap)).then_some(after)
    }

    /// What the front-end may have given back by itself since `last`, and was not passed yet: it names another position now.
    fn gap(&self, last: &Last, named: u16, direction: Direction) -> Option<Gap> {
        let gap = [last.gap.map_or(last.named, |[from, _]| from), named];
        let [from, to] = gap;
        (from != to && direction == Direction::FromGuest && place(from) < self.size && place(to) < self.size)
            .then_some(gap)
    }

    /// Whether what is at a position was given back, in the lap of that position.
    fn is_used(&self, position: u16) -> bool {
        let both = u64::from(F_AVAIL | F_USED) << FLAGS_AT;
        self.word(place(position)).load(Ordering::Relaxed) & both == used_flags(position)
    }

    /// The id by which the front-end has given back the buffer at a position, or what is left of the one that begins there.
    fn dropped(&self, from: u16) -> Option<u16> {
        let mut at = from;
        for _ in 0..self.size {
            let Desc { id, flags, .. } = self.read(place(at));
            if self.is_used(at) || flags & F_NEXT == 0 {
                return self.is_used(at).then_some(id);
            }
            at = self.advance(at, 1);
        }
        None
    }

    /// Whether a ring at `position` comes to this gap before it comes to what is not available yet.
    fn is_ahead(&self, position: u16, [from, to]: Gap) -> bool {
        [position, from, to].iter().all(|&at| place(at) < self.size)
            && self.places(position, from) < self.size
            && self.dropped(from).is_some()
    }

    /// Where a ring at `position` goes on in view of a gap, and what is left of it. Behind the position it is of no matter: what
    /// looked available there was the rest of a buffer that is back.
    fn meet(&self, position: u16, gap: Gap) -> (u16, Option<Gap>) {
        let [from, to] = gap;
        if self.places(from, position) <= self.places(from, to) {
            return (to, None);
        }
        (position, Some(gap).filter(|_| self.places(position, from) < self.size))
    }

    /// The gap, with all of a buffer in the midst of which it begins: what is left of that one is given back.
    fn whole(&self, position: u16, [from, to]: Gap) -> Gap {
        let mut head = position;
        while head != from {
            let mut at = head;
            while self.read(place(at)).flags & F_NEXT != 0 {
                at = self.advance(at, 1);
                if at == from {
                    return [head, to];
                }
            }
            head = self.advance(at, 1);
        }
        [from, to]
    }

    /// Gives back the first buffer of a gap, if only what is left of it is: the guest sees it when those before it are back.
    fn mend(&self, [from, _]: Gap) {
        if !self.is_used(from)
            && let Some(id) = self.dropped(from)
        {
            let entry = Self::entry(Direction::FromGuest, id, 0);
            self.word(place(from)).store(entry | used_flags(from), Ordering::Release);
        }
    }

    /// Where the ring goes on of which this was written down last, and what is to be passed. `None`: it is not such a ring.
    fn follow(&self, last: &Last, named: u16, direction: Direction) -> Option<(u16, Option<Gap>)> {
        let gap = self.gap(last, named, direction);
        if gap.is_none() && named != last.named {
            return None;
        }
        let position = self.resume(&last.batch, direction, gap)?;
        let (position, gap) = gap.map_or((position, None), |gap| self.meet(position, gap));
        let sound = gap.is_none_or(|gap| self.is_ahead(position, gap))
            && (named == last.named || self.is_at(position, direction, gap));
        sound.then_some((position, gap))
    }

    /// Where a position is in the two laps after which all repeats.
    #[inline(always)]
    fn linear(&self, position: u16) -> u32 {
        u32::from(place(position)) + if position & WRAP != 0 { 0 } else { u32::from(self.size) }
    }

    /// From `from` on to `to`, both linear.
    #[inline(always)]
    fn distance(&self, from: u32, to: u32) -> u32 {
        if to >= from { to - from } else { to + 2 * u32::from(self.size) - from }
    }
}

impl Positions for PackedRing {
    #[inline(always)]
    fn size(&self) -> u16 {
        self.size
    }

    #[inline(always)]
    fn advance(&self, at: u16, places: u16) -> u16 {
        let to = u32::from(place(at)) + u32::from(places);
        match to.checked_sub(self.size.into()) {
            None => at + places,
            Some(over) => (at & WRAP ^ WRAP) | over as u16,
        }
    }

    fn retreat(&self, at: u16, places: u16) -> u16 {
        match place(at).checked_sub(places) {
            Some(to) => at & WRAP | to,
            None => (at & WRAP ^ WRAP) | (place(at) + (self.size - places)),
        }
    }

    #[inline(always)]
    fn places(&self, from: u16, to: u16) -> u16 {
        self.distance(self.linear(from), self.linear(to)) as u16
    }
}

impl Layout for PackedRing {
    fn new(regions: Arc<GuestRegions>, config: &RingConfig) -> Result<Self, RingError> {
        let size = config.size;
        if size == 0 || size > MAX_SIZE {
            return Err(RingError::Size(size));
        }
        let desc = regions.ring_part("descriptor ring", config.desc, u32::from(size) * DESC_LEN, 16)?;
        let driver = regions.ring_part("driver event area", config.avail, 4, 4)?;
        let device = regions.ring_part("device event area", config.used, 4, 4)?;
        Ok(PackedRing {
            desc,
            driver: driver.cast(),
            device: device.cast(),
            size,
            event_idx: config.has(VIRTIO_RING_F_EVENT_IDX),
            indirect: config.has(VIRTIO_RING_F_INDIRECT_DESC),
            in_order: config.has(VIRTIO_F_IN_ORDER),
            record: None,
            written_at: [config.desc, config.used],
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
            let [desc, device] = self.written_at;
            log.mark(desc, u32::from(self.size) * DESC_LEN);
            log.mark(device, 4);
        }
    }

    fn start(
        &mut self,
        config: &RingConfig,
        base: &RingBase,
        direction: Direction,
    ) -> Result<(u16, u16), RingError> {
        let (at, named) = (base.get(), base.named());
        let record = base.record();
        let record = record.and_then(|record| Some((record, record::identify(&self.regions, config)?)));
        // Who has run before us is of interest only if we have not.
        let before =
            record.as_ref().filter(|_| at == named).and_then(|(record, identity)| record.last(identity));
        // A driver that has set the ring up anew has zeroed this word, which we never leave so.
        let before = before.filter(|_| self.device_event().load(Ordering::Relaxed) != 0);
        let here = |gap| (place(at) < self.size && self.is_at(at, direction, gap)).then_some((at, gap));
        let start = match before {
            Some(last) if last.named == named => self.follow(&last, named, direction),
            // Either some was given back meanwhile, or the front-end means something else.
            Some(last) => self.follow(&last, named, direction).or_else(|| here(None)),
            None => here(base.gap().filter(|&gap| self.is_ahead(at, gap))),
        };
        let (position, gap) = start.ok_or(RingError::Base(at))?;
        let gap = gap.map(|gap| self.whole(position, gap));
        base.set_gap(gap);
        if let Some((record, identity)) = record {
            record.begin(&identity, named, position, gap);
            self.record = Some(record.clone());
        }
        // Not before it is written down: who comes after us is not to find it given back before its turn.
        let mut position = position;
        if let Some(gap) = gap {
            self.mend(gap);
            let [from, to] = gap;
            if from == position {
                self.pass(to);
                base.set_gap(None);
                position = to;
            }
        }
        self.disarm();
        Ok((position, position))
    }

    fn pass(&self, to: u16) {
        if let Some(record) = &self.record {
            record.pass(to);
        }
    }

    /// All that is not in flight may be filled: each descriptor tells for itself.
    #[inline(always)]
    fn available(&self, _: u16, in_flight: u16) -> Result<u16, RingError> {
        Ok(self.size.saturating_sub(in_flight))
    }

    #[inline(always)]
    fn is_filled(&self, next: u16) -> bool {
        // Acquire: the rest of a buffer is read after the flags of its first descriptor.
        let flags = (self.word(place(next)).load(Ordering::Acquire) >> FLAGS_AT) as u16;
        flags & (F_AVAIL | F_USED) == filled_flags(next)
    }

    #[inline(always)]
    fn entry(direction: Direction, id: u16, len: u32) -> u64 {
        // The flag says that something was written (2.8.4).
        u64::from(len) | u64::from(id) << 32 | u64::from(direction.flag()) << FLAGS_AT
    }

    #[inline(always)]
    fn singles(
        &self,
        next: u16,
        n: u16,
        direction: Direction,
        mut each: impl FnMut(usize, Single) -> bool,
    ) -> u16 {
        const LOOK_AT: u16 = F_NEXT | F_WRITE | F_INDIRECT | F_AVAIL | F_USED;
        let (mut at, mut taken) = (next, 0);
        // One lap, and the rest of the next one.
        while taken < n {
            let run = (n - taken).min(self.size - place(at));
            let want = u64::from(filled_flags(at) | direction.flag()) << FLAGS_AT;
            let first = self.desc(place(at));
            for i in 0..run {
                let p = first.wrapping_add(usize::from(i) * DESC_LEN as usize);
                prefetch_read(p.wrapping_add(LOOK_AHEAD)); // never faults, wherever it is
                // SAFETY: `place(at) + run <= size`, so this is a descriptor of the ring, as in `word` and `read`.
                let rest =
                    unsafe { AtomicU64::from_ptr(p.cast::<u64>().wrapping_add(1)) }.load(Ordering::Acquire);
                if rest & (u64::from(LOOK_AT) << FLAGS_AT) != want {
                    return taken + i;
                }
                // SAFETY: as above.
                let addr = unsafe { ptr::read_volatile(p.cast::<u64>()) };
                if !each((taken + i).into(), Single { id: (rest >> 32) as u16, addr, len: rest as u32 }) {
                    return taken + i;
                }
            }
            taken += run;
            at = self.advance(at, run);
        }
        taken
    }

    #[inline]
    fn chain(
        &self,
        next: u16,
        available: u16,
        direction: Direction,
        enough: u32,
        hint: &mut usize,
        mut sink: impl FnMut(Seg) -> Result<(), RingError>,
    ) -> Result<Option<Chain>, RingError> {
        if available == 0 || !self.is_filled(next) {
            return Ok(None);
        }
        let (mut at, mut len, mut needless) = (next, 0u32, 0);
        for places in 1..=available {
            // The guest makes the first one available last, so those after it are what they are to be.
            let d = self.read(place(at));
            if len >= enough {
                needless += 1;
                if needless > MAX_NEEDLESS {
                    return Err(RingError::TooLong);
                }
            } else {
                len = if d.flags & F_INDIRECT != 0 {
                    let more = self.walk_table(d, direction, enough - len, hint, &mut sink)?;
                    len.checked_add(more).ok_or(RingError::TooLong)?
                } else {
                    self.piece(d, direction, len, hint, &mut sink)?
                };
            }
            if d.flags & F_NEXT == 0 {
                // The last one has the id (2.8.6).
                return Ok(Some(Chain { id: d.id, places, len }));
            }
            at = self.advance(at, 1);
        }
        // While there are others in flight: those that the guest has got back may not be counted yet.
        if available < self.size { Ok(None) } else { Err(RingError::Loop) }
    }

    fn prefetch_chain(&self, at: u16, hint: &mut usize) {
        prefetch_target(&self.regions, self.read(place(at)).addr, hint);
    }

    /// The first entry is written last: the guest looks at none behind it before.
    #[inline]
    fn publish(&self, at: u16, entries: &[u64], places: &[u16]) -> u16 {
        assert!(entries.len() <= usize::from(self.size));
        let Some((&first, behind)) = entries.split_first() else { return at };
        let after = self.advance(at, sum(entries, places));
        if let Some(record) = &self.record {
            record.note(at, after, entries, places);
        }
        if let Some((&first, others)) = places.split_first() {
            let mut to = self.advance(at, first);
            for (&entry, &places) in behind.iter().zip(others) {
                self.word(place(to)).store(entry | used_flags(to), Ordering::Relaxed);
                to = self.advance(to, places);
            }
        } else {
            let (lap, next_lap) = behind.split_at(behind.len().min(usize::from(self.size - place(at) - 1)));
            if !lap.is_empty() {
                self.write_run(place(at) + 1, lap, used_flags(at));
            }
            self.write_run(0, next_lap, used_flags(at ^ WRAP));
        }
        // Release: after the other entries, and the data that all of them announce.
        self.word(place(at)).store(first | used_flags(at), Ordering::Release);
        after
    }

    /// Guests that want it so see one entry for all: the last one's, where the first one would be (2.8.9).
    #[inline]
    fn give_back(&self, at: u16, entries: &[u64], places: &[u16]) -> u16 {
        match entries.last() {
            Some(&last) if self.in_order => self.publish(at, &[last], &[sum(entries, places)]),
            _ => self.publish(at, entries, places),
        }
    }

    #[inline]
    fn wants_call(&self, [old, new]: [u16; 2]) -> bool {
        // What is used must be visible before we read whether the guest sleeps; the guest does it the other way round.
        let event = then_look(|| self.driver_event().load(Ordering::Relaxed));
        match (event >> 16) & EVENT_MASK {
            EVENT_DISABLE => false,
            EVENT_DESC if self.event_idx => {
                let (old, new) = (self.linear(old), self.linear(new));
                self.distance(old, self.linear(event as u16)) < self.distance(old, new)
            }
            _ => true,
        }
    }

    fn arm(&self, next: u16) -> bool {
        // Without positions the lower half means nothing; that it is not zero tells that the ring is in use (`start`).
        let event = if self.event_idx {
            u32::from(next) | EVENT_DESC << 16
        } else {
            u32::from(WRAP) | EVENT_ENABLE << 16
        };
        let ask = || self.device_event().store(event, Ordering::Relaxed);
        // Our wish must be visible before we look again; the guest does it the other way round.
        leave_then_look(ask, || !self.is_filled(next))
    }

    fn disarm(&self) {
        // As above, even if a front-end comes to turn the upper half over to "enable", as QEMU does.
        self.device_event().store(u32::from(WRAP) | EVENT_DISABLE << 16, Ordering::Relaxed);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::virtio::testing::{Driver, MODERN};

    fn ring(size: u16) -> PackedRing {
        let d = Driver::new(8, MODERN);
        PackedRing::new(
            d.regions(),
            &RingConfig { size, desc: 0x1000, avail: 0x8000, used: 0x8004, features: MODERN },
        )
        .unwrap()
    }

    #[test]
    fn positions_wrap() {
        for size in [1, 2, 3, 8, 100, 256] {
            let r = ring(size);
            for at in [WRAP, 0, WRAP | (size - 1), size - 1, size / 2] {
                for n in [0, 1, size / 2, size - 1, size] {
                    let to = r.advance(at, n);
                    assert!(place(to) < size);
                    assert_eq!((r.retreat(to, n), r.places(at, to)), (at, n), "{size} {at:#x} {n}");
                }
                assert_eq!(r.advance(at, size), at ^ WRAP, "a lap");
            }
        }
    }

    #[test]
    fn the_guest_is_called_when_its_event_is_passed() {
        let r = ring(8);
        let set = |position: u16, flags: u32| {
            r.driver_event().store(u32::from(position) | flags << 16, Ordering::Relaxed);
        };
        let (old, new) = (WRAP | 6, 2); // places 6, 7, 0, 1
        set(0, EVENT_ENABLE);
        assert!(r.wants_call([old, new]));
        set(0, EVENT_DISABLE);
        assert!(!r.wants_call([old, new]));
        for (event, wants) in [
            (WRAP | 5, false),
            (WRAP | 6, true),
            (WRAP | 7, true),
            (0, true),
            (1, true),
            (2, false),
            (WRAP, false),
        ] {
            set(event, EVENT_DESC);
            assert_eq!(r.wants_call([old, new]), wants, "{event:#x}");
        }
        // Whatever a guest writes.
        for event in [WRAP | 8, 0x7fff, 0xffff] {
            set(event, EVENT_DESC);
            r.wants_call([old, new]);
        }
    }
}
