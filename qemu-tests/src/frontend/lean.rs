//! Rings as a driver drives them that polls, and that does for a packet as little as it can: the load generator's.
//!
//! Every descriptor has a buffer of its own for good, so that neither the descriptor table nor the available ring is
//! written again, unless the device uses buffers in another order than they were posted. Sending a packet is to change a
//! few of its bytes and to raise an index; giving a receive buffer back is to raise an index. In a packed ring it is one word of
//! a descriptor for each packet, of which the first of all that are published is written last. What the device writes is checked
//! all the same.

use std::sync::Arc;
use std::sync::atomic::{AtomicU16, AtomicU32, AtomicU64, Ordering};

use super::ring::{AVAIL, EVENT_DISABLE, NO_NOTIFY, RingShared, USED, WRAP, avail_flags, cell, used_flags};
use super::tx::header_len;
use super::{Buffer, Descriptor, Error, Features, GuestMemory, NetHeader, Result, RingFault, RxRing, TxRing};

/// A buffer's frame starts where a cache line starts, as in the memory of most drivers; its header lies before that.
const LINE: usize = 64;

/// The processor's constant-rate counter; nanoseconds where there is none.
#[inline(always)]
pub fn cycles() -> u64 {
    #[cfg(target_arch = "x86_64")]
    {
        // SAFETY: RDTSC is part of the x86-64 baseline, reads a counter and touches no memory.
        unsafe { core::arch::x86_64::_rdtsc() }
    }
    #[cfg(not(target_arch = "x86_64"))]
    {
        use std::sync::OnceLock;
        use std::time::Instant;
        static START: OnceLock<Instant> = OnceLock::new();
        START.get_or_init(Instant::now).elapsed().as_nanos() as u64
    }
}

/// What both directions have in common.
struct LeanRing {
    shared: Arc<RingShared>,
    buffers: Buffer,
    /// Bytes from one buffer to the next.
    stride: usize,
    header_len: usize,
    mask: u16,
    next_avail: u16,
    published: u16,
    last_used: u16,
    /// The used index as last read.
    used: u16,
    /// What was published when the device was last kicked.
    kicked: u16,
    /// What stands in each place of the available ring, or in each descriptor of a packed one.
    heads: Box<[u16]>,
    /// Whether the ring is packed. Indices are those of a split one, of which a position is made.
    packed: bool,
    /// Of a packed ring: length and flags of each buffer, as its descriptor has them.
    words: Box<[u64]>,
}

impl LeanRing {
    /// Takes a ring over that is empty. `room` is for the frame; `access` is 0 or [`Descriptor::WRITE`].
    fn new(
        shared: Arc<RingShared>,
        memory: &GuestMemory,
        features: Features,
        room: usize,
        access: u16,
    ) -> Result<Self> {
        // An odd number of lines: buffers must not compete for the same sets of a cache.
        let stride = ((LINE + room).div_ceil(LINE) | 1) * LINE;
        let (size, header_len) = (usize::from(shared.size), header_len(features));
        let buffers = memory.alloc(size * stride, 4096)?;
        // Nothing is to be paged in while packets run.
        buffers.fill(0);
        let packed = features.contains(Features::RING_PACKED);
        let mut ring = Self {
            mask: shared.size - 1,
            packed,
            words: vec![0; if packed { size } else { 0 }].into(),
            next_avail: 0,
            published: 0,
            last_used: 0,
            used: 0,
            kicked: 0,
            heads: (0..shared.size).collect(),
            shared,
            buffers,
            stride,
            header_len,
        };
        for id in 0..ring.shared.size {
            ring.describe(id, room, access);
            if !packed {
                cell(&ring.shared.avail, 4 + 2 * usize::from(id)).store(id, Ordering::Relaxed);
            }
        }
        if packed {
            cell(&ring.shared.avail, 2).store(EVENT_DISABLE, Ordering::Relaxed);
            return Ok(ring);
        }
        // Neither flags nor indices ask for calls: this driver looks.
        cell(&ring.shared.avail, 0).store(super::ring::NO_INTERRUPT, Ordering::Relaxed);
        Ok(ring)
    }

    /// Points descriptor `id` to a frame of `len` bytes in its buffer.
    fn describe(&mut self, id: u16, len: usize, access: u16) {
        let addr = self.address(id);
        let len = (self.header_len + len) as u32;
        if self.packed {
            self.words[usize::from(id)] = u64::from(len) | u64::from(id) << 32 | u64::from(access) << 48;
            self.shared.descriptors.write(usize::from(id) * Descriptor::SIZE, &addr.to_le_bytes());
            return;
        }
        let descriptor = Descriptor { addr, len, flags: access, next: 0 };
        self.shared.descriptors.write(usize::from(id) * Descriptor::SIZE, &descriptor.to_bytes());
    }

    /// Guest-physical address of a buffer.
    fn address(&self, id: u16) -> u64 {
        self.buffers.gpa() + (self.frame_at(id) - self.header_len) as u64
    }

    /// The position in a packed ring that an index stands for.
    #[inline(always)]
    fn position(&self, index: u16) -> u16 {
        // The size is a power of two, of which two go into the range of indices.
        let lap = index & (self.mask + 1);
        index & self.mask | if lap == 0 { WRAP } else { 0 }
    }

    /// The word of the descriptor that an index stands for.
    #[inline(always)]
    fn word(&self, index: u16) -> &AtomicU64 {
        let slot = usize::from(index & self.mask);
        // SAFETY: `slot` is below the ring's size, so this is the second word of a descriptor, in a page-aligned buffer. Both
        // sides access it atomically.
        unsafe {
            AtomicU64::from_ptr(self.shared.descriptors.as_ptr().add(slot * Descriptor::SIZE + 8).cast())
        }
    }

    /// As [`Self::poll`] in a packed ring.
    #[inline(always)]
    fn poll_packed(&mut self) -> Result<u16> {
        while self.used != self.published {
            let flags = (self.word(self.used).load(Ordering::Acquire) >> 48) as u16;
            if flags & (AVAIL | USED) != used_flags(self.position(self.used)) {
                break;
            }
            self.used = self.used.wrapping_add(1);
        }
        // As with a split ring, no barrier: the next look kicks.
        if self.kicked != self.published
            && cell(&self.shared.used, 2).load(Ordering::Relaxed) & 3 != EVENT_DISABLE
        {
            self.kicked = self.published;
            self.shared.kick.write(1).map_err(Error::io("kick the device"))?;
        }
        Ok(self.pending())
    }

    /// As [`Self::take`] in a packed ring.
    #[inline(always)]
    fn take_packed(&mut self) -> Result<(u16, u32)> {
        let word = self.word(self.last_used).load(Ordering::Relaxed);
        let (id, len, slot) = ((word >> 32) as u16, word as u32, usize::from(self.last_used & self.mask));
        if id > self.mask {
            return Err(self.fault(RingFault::UsedId(id.into())));
        }
        if self.heads[slot] != id {
            self.heads[slot] = id;
            self.shared.descriptors.write(slot * Descriptor::SIZE, &self.address(id).to_le_bytes());
        }
        self.last_used = self.last_used.wrapping_add(1);
        Ok((id, len))
    }

    /// As [`Self::publish`] in a packed ring.
    #[inline(always)]
    fn publish_packed(&mut self) {
        let filled = |index: u16| {
            let id = self.heads[usize::from(index & self.mask)];
            self.words[usize::from(id)] | u64::from(avail_flags(self.position(index))) << 48
        };
        for i in 1..self.next_avail.wrapping_sub(self.published) {
            let index = self.published.wrapping_add(i);
            self.word(index).store(filled(index), Ordering::Relaxed);
        }
        self.word(self.published).store(filled(self.published), Ordering::Release);
        self.published = self.next_avail;
    }

    /// Offset in `buffers` of the frame of `id`.
    #[inline(always)]
    fn frame_at(&self, id: u16) -> usize {
        usize::from(id) * self.stride + LINE
    }

    /// Reads how far the device has come, kicks it if it sleeps over something published, and says how many buffers it
    /// has used that were not taken.
    #[inline(always)]
    fn poll(&mut self) -> Result<u16> {
        if self.packed {
            return self.poll_packed();
        }
        // SAFETY: the used ring starts with flags and index, 16 bits each; the buffer is 64-aligned and longer than that.
        // Both sides access them by atomic loads and stores.
        let word = unsafe { AtomicU32::from_ptr(self.shared.used.as_ptr().cast()) }.load(Ordering::Acquire);
        self.used = (word >> 16) as u16;
        let pending = self.used.wrapping_sub(self.last_used);
        if pending > self.published.wrapping_sub(self.last_used) {
            return Err(self.fault(RingFault::UsedIndex(self.last_used, self.used)));
        }
        // Read again at each poll, so that no barrier between index and flags is needed: who armed notifications too late
        // to see the index is kicked by the next look.
        if word as u16 & NO_NOTIFY == 0 && self.kicked != self.published {
            self.kicked = self.published;
            self.shared.kick.write(1).map_err(Error::io("kick the device"))?;
        }
        Ok(pending)
    }

    #[inline(always)]
    fn pending(&self) -> u16 {
        self.used.wrapping_sub(self.last_used)
    }

    /// Takes the next used buffer, of which [`Self::pending`] must have counted one: its descriptor and its length.
    #[inline(always)]
    fn take(&mut self) -> Result<(u16, u32)> {
        if self.packed {
            return self.take_packed();
        }
        let slot = usize::from(self.last_used & self.mask);
        // SAFETY: slot < size, so the 8 bytes lie in the used ring, 4-aligned. The device may write at any time, so they are
        // read once, by a volatile access, and checked below.
        let [id, len] =
            unsafe { self.shared.used.as_ptr().add(4 + 8 * slot).cast::<[u32; 2]>().read_volatile() };
        if id > u32::from(self.mask) {
            return Err(self.fault(RingFault::UsedId(id)));
        }
        let id = id as u16;
        if self.heads[slot] != id {
            // The device has read this entry, as it has used more buffers than there are before it.
            self.heads[slot] = id;
            cell(&self.shared.avail, 4 + 2 * slot).store(id, Ordering::Relaxed);
        }
        self.last_used = self.last_used.wrapping_add(1);
        Ok((id, len))
    }

    #[inline(always)]
    fn publish(&mut self) {
        if self.published != self.next_avail {
            if self.packed {
                return self.publish_packed();
            }
            self.published = self.next_avail;
            let index: &AtomicU16 = cell(&self.shared.avail, 2);
            index.store(self.published, Ordering::Release);
        }
    }

    fn fault(&self, fault: RingFault) -> Error {
        Error::Fault { ring: self.shared.index, fault }
    }
}

/// A transmit ring with a frame in each of its buffers.
pub struct LeanTx {
    ring: LeanRing,
    /// Every frame is at least this long.
    shortest: usize,
}

impl LeanTx {
    /// Takes a fresh ring over. `frame` gives the frame of each slot with its header, `longest` is the longest of them.
    ///
    /// # Errors
    /// If guest memory is exhausted.
    ///
    /// # Panics
    /// If a frame is longer than `longest`.
    pub fn new(
        tx: TxRing,
        features: Features,
        longest: usize,
        mut frame: impl FnMut(u16) -> (NetHeader, Vec<u8>),
    ) -> Result<Self> {
        let mut ring = LeanRing::new(tx.shared().clone(), tx.memory(), features, longest, 0)?;
        let mut shortest = usize::MAX;
        for id in 0..ring.shared.size {
            let (header, bytes) = frame(id);
            assert!(bytes.len() <= longest, "a frame of {} bytes, and {longest} at most", bytes.len());
            shortest = shortest.min(bytes.len());
            let at = ring.frame_at(id);
            ring.buffers.write(at - ring.header_len, &header.to_bytes()[..ring.header_len]);
            ring.buffers.write(at, &bytes);
            ring.describe(id, bytes.len(), 0);
        }
        Ok(Self { ring, shortest })
    }

    /// Takes back what the device has sent.
    ///
    /// # Errors
    /// If the device broke the ring, or cannot be kicked.
    #[inline(always)]
    pub fn reap(&mut self) -> Result<()> {
        for _ in 0..self.ring.poll()? {
            self.ring.take()?;
        }
        Ok(())
    }

    /// Frames that can be sent now.
    #[inline(always)]
    pub fn space(&self) -> u16 {
        self.ring.shared.size - self.ring.next_avail.wrapping_sub(self.ring.last_used)
    }

    /// Changes bytes of the frame that goes next.
    ///
    /// # Panics
    /// If the shortest of the frames does not have them.
    #[inline(always)]
    pub fn patch<const N: usize>(&mut self, at: usize, bytes: [u8; N]) {
        assert!(at + N <= self.shortest, "patch beyond the frame");
        let id = self.ring.heads[usize::from(self.ring.next_avail & self.ring.mask)];
        // SAFETY: `id` is below the ring's size, and every buffer has at least `shortest` bytes from where its frame
        // starts, so these N lie in `buffers`. The device only reads there, and not before the frame is published.
        unsafe {
            self.ring.buffers.as_ptr().add(self.ring.frame_at(id) + at).cast::<[u8; N]>().write(bytes);
        }
    }

    /// The frame that goes next goes with the next [`Self::publish`]. There must be [`Self::space`] for it. Gives its slot.
    #[inline(always)]
    pub fn push(&mut self) -> u16 {
        debug_assert!(self.space() > 0);
        let slot = self.ring.heads[usize::from(self.ring.next_avail & self.ring.mask)];
        self.ring.next_avail = self.ring.next_avail.wrapping_add(1);
        slot
    }

    /// Shows everything pushed to the device.
    #[inline(always)]
    pub fn publish(&mut self) {
        self.ring.publish();
    }
}

/// A receive ring whose buffers all go back to the device together.
pub struct LeanRx {
    ring: LeanRing,
    room: usize,
    mergeable: bool,
    /// Buffers of the frame at hand, and the bytes of each that the device says it wrote.
    parts: Vec<(u16, usize)>,
}

impl LeanRx {
    /// Takes a fresh ring over and gives the device all buffers, each for `room` bytes of a frame. If no frame is longer than
    /// that, headers need not be looked at.
    ///
    /// # Errors
    /// If guest memory is exhausted.
    pub fn new(rx: RxRing, features: Features, room: usize, longest: usize) -> Result<Self> {
        let mut ring = LeanRing::new(rx.shared().clone(), rx.memory(), features, room, Descriptor::WRITE)?;
        ring.next_avail = ring.shared.size;
        ring.publish();
        let mergeable = features.contains(Features::MRG_RXBUF) && longest > room;
        Ok(Self { parts: Vec::with_capacity(usize::from(ring.shared.size)), ring, room, mergeable })
    }

    /// How many buffers the device has filled that were not taken.
    ///
    /// # Errors
    /// If the device broke the ring, or cannot be kicked.
    #[inline(always)]
    pub fn poll(&mut self) -> Result<u16> {
        self.ring.poll()
    }

    /// Gives the buffers of all frames that were taken back to the device.
    #[inline(always)]
    pub fn release(&mut self) {
        self.ring.next_avail = self.ring.last_used.wrapping_add(self.ring.shared.size);
        self.ring.publish();
    }

    /// Takes the next frame, if [`Self::poll`] has counted its buffers, and gives its length.
    ///
    /// # Errors
    /// If the device broke the ring or the frame's header.
    #[inline(always)]
    pub fn take(&mut self) -> Result<Option<usize>> {
        if self.ring.pending() == 0 {
            return Ok(None);
        }
        let limit = self.ring.header_len + self.room;
        let (first, len) = self.ring.take()?;
        let written = len as usize;
        if !(self.ring.header_len..=limit).contains(&written) {
            return Err(self.ring.fault(RingFault::UsedLength(len)));
        }
        self.parts.clear();
        self.parts.push((first, written));
        let mut total = written;
        if self.mergeable {
            let count = self.num_buffers();
            if count == 0 || count - 1 > self.ring.pending() {
                return Err(self.ring.fault(RingFault::NumBuffers(count)));
            }
            for _ in 1..count {
                let (id, len) = self.ring.take()?;
                if len as usize > limit {
                    return Err(self.ring.fault(RingFault::UsedLength(len)));
                }
                self.parts.push((id, len as usize));
                total += len as usize;
            }
        }
        Ok(Some(total - self.ring.header_len))
    }

    /// The header's count of buffers of the frame at hand.
    fn num_buffers(&self) -> u16 {
        let Some(&(first, _)) = self.parts.first() else { return 0 };
        let mut header = [0; NetHeader::LEN];
        let at = self.ring.frame_at(first) - self.ring.header_len;
        self.ring.buffers.read(at, &mut header[..self.ring.header_len]);
        NetHeader::from_bytes(header).num_buffers
    }

    /// Copies the frame at hand, from its offset `at`, into `bytes`; gives how many there were. Valid until the next
    /// [`Self::take`] or [`Self::release`].
    pub fn read(&self, at: usize, bytes: &mut [u8]) -> usize {
        // Buffers after the first have no header: their bytes start where the first one's header does.
        let (mut skip, mut done) = (at + self.ring.header_len, 0);
        for &(id, written) in &self.parts {
            if skip >= written {
                skip -= written;
                continue;
            }
            let count = (written - skip).min(bytes.len() - done);
            let from = self.ring.frame_at(id) - self.ring.header_len + skip;
            self.ring.buffers.read(from, &mut bytes[done..done + count]);
            (skip, done) = (0, done + count);
        }
        done
    }
}
