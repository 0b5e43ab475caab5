//! A driver's side of rings, for tests: it writes into guest memory what a guest would, or what one should not.

use std::collections::VecDeque;
use std::fs::File;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::sync::Arc;

use virtio_bindings::virtio_config::{VIRTIO_F_IN_ORDER, VIRTIO_F_RING_PACKED, VIRTIO_F_VERSION_1};
use virtio_bindings::virtio_net::VIRTIO_NET_F_MRG_RXBUF;
use virtio_bindings::virtio_ring::{VIRTIO_RING_F_EVENT_IDX, VIRTIO_RING_F_INDIRECT_DESC};
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use super::{Call, GuestRegions, GuestRx, GuestTx, Kick, RingBase, RingConfig, RingError};

pub const NEXT: u16 = 1;
pub const WRITE: u16 = 2;
pub const INDIRECT: u16 = 4;

/// The usual negotiated features of a modern driver.
pub const MODERN: u64 = 1 << VIRTIO_F_VERSION_1
    | 1 << VIRTIO_NET_F_MRG_RXBUF
    | 1 << VIRTIO_RING_F_INDIRECT_DESC
    | 1 << VIRTIO_RING_F_EVENT_IDX;

/// Guest memory: two adjacent regions, a gap, and a third.
pub const REGIONS: [(u64, usize); 3] = [(0, 0x10_0000), (0x10_0000, 0x10_0000), (0x40_0000, 0x10_0000)];

/// An eventfd as the two ends have it.
pub fn event() -> (EventFd, File) {
    let ours = EventFd::new(EFD_NONBLOCK).unwrap();
    let file = event_file(&ours);
    (ours, file)
}

fn event_file(fd: &EventFd) -> File {
    // SAFETY: duplicated here, so that nobody else has it.
    let owned = unsafe { OwnedFd::from_raw_fd(libc::dup(fd.as_raw_fd())) };
    File::from(owned)
}

/// How often an event was signalled since the last look.
pub fn signals(event: &EventFd) -> u64 {
    event.read().unwrap_or(0)
}

/// A ring in guest memory and its driver.
pub struct Driver {
    pub mem: Arc<GuestMemoryMmap<()>>,
    pub config: RingConfig,
    pub avail_idx: u16,
    pub used_seen: u16,
    pub call: Arc<Call>,
    /// What we signal to the guest.
    pub called: EventFd,
    /// What the guest signals to us.
    pub kick: EventFd,
    pub base: Arc<RingBase>,
}

impl Driver {
    /// A ring of `size` entries at `at`, in memory of its own.
    pub fn new(size: u16, features: u64) -> Self {
        let ranges = REGIONS.map(|(a, n)| (GuestAddress(a), n));
        Self::at(Arc::new(GuestMemoryMmap::from_ranges(&ranges).unwrap()), 0x1000, size, features)
    }

    /// A ring at `at` in given memory.
    pub fn at(mem: Arc<GuestMemoryMmap<()>>, at: u64, size: u16, features: u64) -> Self {
        let n = u64::from(size);
        let avail = at + 16 * n;
        let used = (avail + 6 + 2 * n).next_multiple_of(4);
        let call = Arc::new(Call::default());
        let (called, file) = event();
        call.set(Some(file));
        // A new descriptor is signalled.
        assert_eq!(signals(&called), 1);
        Driver {
            mem,
            config: RingConfig { size, desc: at, avail, used, features },
            avail_idx: 0,
            used_seen: 0,
            call,
            called,
            kick: EventFd::new(EFD_NONBLOCK).unwrap(),
            base: Arc::default(),
        }
    }

    pub fn regions(&self) -> Arc<GuestRegions> {
        Arc::new(GuestRegions::new(self.mem.clone()))
    }

    pub fn try_tx(&self) -> Result<GuestTx, RingError> {
        let kick = Arc::new(Kick::new(event_file(&self.kick)).unwrap());
        GuestTx::new(self.regions(), &self.config, Some(kick), self.call.clone(), self.base.clone())
    }

    pub fn tx(&self) -> GuestTx {
        self.try_tx().unwrap()
    }

    pub fn try_rx(&self) -> Result<GuestRx, RingError> {
        GuestRx::new(self.regions(), &self.config, self.call.clone(), self.base.clone())
    }

    pub fn rx(&self) -> GuestRx {
        self.try_rx().unwrap()
    }

    pub fn write(&self, addr: u64, bytes: &[u8]) {
        self.mem.write_slice(bytes, GuestAddress(addr)).unwrap();
    }

    pub fn read(&self, addr: u64, len: usize) -> Vec<u8> {
        let mut out = vec![0; len];
        self.mem.read_slice(&mut out, GuestAddress(addr)).unwrap();
        out
    }

    pub fn word(&self, addr: u64) -> u16 {
        self.mem.read_obj(GuestAddress(addr)).unwrap()
    }

    pub fn set_word(&self, addr: u64, value: u16) {
        self.mem.write_obj(value, GuestAddress(addr)).unwrap();
    }

    /// Writes a descriptor into the table at `table`.
    pub fn desc_at(&self, table: u64, i: u16, addr: u64, len: u32, flags: u16, next: u16) {
        let mut b = [0; 16];
        b[..8].copy_from_slice(&addr.to_le_bytes());
        b[8..12].copy_from_slice(&len.to_le_bytes());
        b[12..14].copy_from_slice(&flags.to_le_bytes());
        b[14..].copy_from_slice(&next.to_le_bytes());
        self.write(table + 16 * u64::from(i), &b);
    }

    pub fn desc(&self, i: u16, addr: u64, len: u32, flags: u16, next: u16) {
        self.desc_at(self.config.desc, i, addr, len, flags, next);
    }

    /// A chain in consecutive descriptors from `head` on, all with `flags`.
    pub fn chain(&self, head: u16, buffers: &[(u64, u32)], flags: u16) {
        for (i, &(addr, len)) in (head..).zip(buffers) {
            let last = usize::from(i - head) + 1 == buffers.len();
            self.desc(i, addr, len, flags | if last { 0 } else { NEXT }, i + 1);
        }
    }

    /// Makes a head available.
    pub fn offer(&mut self, head: u16) {
        let at = self.config.avail + 4 + 2 * u64::from(self.avail_idx % self.config.size);
        self.set_word(at, head);
        self.set_avail_idx(self.avail_idx.wrapping_add(1));
    }

    pub fn set_avail_idx(&mut self, idx: u16) {
        self.avail_idx = idx;
        self.mem
            .store(idx, GuestAddress(self.config.avail + 2), std::sync::atomic::Ordering::Release)
            .unwrap();
    }

    pub fn used_idx(&self) -> u16 {
        self.mem.load(GuestAddress(self.config.used + 2), std::sync::atomic::Ordering::Acquire).unwrap()
    }

    /// The next used entry, if there is one.
    pub fn take_used(&mut self) -> Option<(u32, u32)> {
        if self.used_idx() == self.used_seen {
            return None;
        }
        let at = self.config.used + 4 + 8 * u64::from(self.used_seen % self.config.size);
        self.used_seen = self.used_seen.wrapping_add(1);
        let word = |a| self.mem.read_obj::<u32>(GuestAddress(a)).unwrap();
        Some((word(at), word(at + 4)))
    }

    pub fn set_used_event(&self, event: u16) {
        self.set_word(self.config.avail + 4 + 2 * u64::from(self.config.size), event);
    }

    pub fn avail_event(&self) -> u16 {
        self.word(self.config.used + 4 + 8 * u64::from(self.config.size))
    }

    /// Starts both indices at `index`, as after a long run.
    pub fn start_at(&mut self, index: u16) {
        self.set_avail_idx(index);
        self.set_word(self.config.used + 2, index);
        self.used_seen = index;
        self.base.set(index);
    }
}

/// The first position of a packed ring, and the wrap counter in it.
pub const WRAP: u16 = 1 << 15;
pub const AVAIL: u16 = 1 << 7;
pub const USED: u16 = 1 << 15;

/// A packed ring in guest memory and its driver, which keeps books as plainly as can be: a queue of what is in flight.
pub struct PackedDriver {
    /// Memory, addresses and descriptors.
    pub at: Driver,
    /// Where it makes available next, and where it looks for used buffers, as positions.
    pub next: u16,
    pub used: u16,
    /// Ids and places of the buffers in flight, in order.
    pub out: VecDeque<(u16, u16)>,
}

impl PackedDriver {
    /// A ring of `size` entries in memory of its own.
    pub fn new(size: u16, features: u64) -> Self {
        Self::of(Driver::new(size, features | 1 << VIRTIO_F_RING_PACKED))
    }

    /// Where a split one would be.
    pub fn of(mut at: Driver) -> Self {
        at.config.features |= 1 << VIRTIO_F_RING_PACKED;
        at.config.avail = at.config.avail.next_multiple_of(4);
        at.config.used = at.config.avail + 8;
        let mut driver = PackedDriver { at, next: WRAP, used: WRAP, out: VecDeque::new() };
        driver.reset();
        driver
    }

    /// As a driver that takes over the device: nothing in the ring.
    pub fn reset(&mut self) {
        let config = self.at.config;
        self.at.write(config.desc, &vec![0; 16 * usize::from(config.size)]);
        self.at.write(config.used, &[0; 4]);
        self.set_event(0, 0);
        (self.next, self.used) = (WRAP, WRAP);
        self.out.clear();
        self.at.base.name(WRAP);
    }

    /// Begins at another position than the first, as after a long run: all before it was used.
    pub fn start_at(&mut self, position: u16) {
        let Driver { config: RingConfig { size, desc, .. }, .. } = self.at;
        for i in 0..size {
            let lap = if i < position & !WRAP { position & WRAP } else { position & WRAP ^ WRAP };
            let flags = if lap != 0 { AVAIL | USED } else { 0 };
            self.at.desc_at(desc, i, 0, 0, 0, flags);
        }
        (self.next, self.used) = (position, position);
        self.at.base.set(position);
    }

    /// The position so many places after another.
    pub fn after(&self, position: u16, places: u16) -> u16 {
        let (size, mut to) = (self.at.config.size, position);
        for _ in 0..places {
            to = if to & !WRAP == size - 1 { to & WRAP ^ WRAP } else { to + 1 };
        }
        to
    }

    /// Places that are not in flight.
    pub fn free(&self) -> u16 {
        self.at.config.size - self.out.iter().map(|(_, places)| places).sum::<u16>()
    }

    /// Writes one descriptor of the ring: id and flags are where the next field of a split one and its flags are, turned round.
    pub fn desc(&self, position: u16, addr: u64, len: u32, id: u16, flags: u16) {
        self.at.desc_at(self.at.config.desc, position & !WRAP, addr, len, id, flags);
    }

    /// The same, available.
    pub fn filled(&self, position: u16, addr: u64, len: u32, id: u16, flags: u16) {
        let lap = if position & WRAP != 0 { AVAIL } else { USED };
        self.desc(position, addr, len, id, flags | lap);
    }

    /// Makes a chain available, all of it with `flags`, the first descriptor last. There must be room.
    pub fn offer(&mut self, id: u16, buffers: &[(u64, u32)], flags: u16) {
        let places = buffers.len() as u16;
        assert!(places > 0 && places <= self.free());
        for (i, &(addr, len)) in (0..places).zip(buffers).rev() {
            let more = if i + 1 < places { NEXT } else { 0 };
            // Only the last one's id says anything.
            let id = if more == 0 { id } else { 0xdead };
            self.filled(self.after(self.next, i), addr, len, id, flags | more);
        }
        self.next = self.after(self.next, places);
        self.out.push_back((id, places));
    }

    /// What was used next, if anything: its id, the length, and how many buffers that gives back.
    pub fn take_used(&mut self) -> Option<(u16, u32, usize)> {
        let at = GuestAddress(self.at.config.desc + 16 * u64::from(self.used & !WRAP) + 8);
        let word: u64 = self.at.mem.load(at, std::sync::atomic::Ordering::Acquire).unwrap();
        let (len, id, flags) = (word as u32, (word >> 32) as u16, (word >> 48) as u16);
        let want = if self.used & WRAP != 0 { AVAIL | USED } else { 0 };
        if flags & (AVAIL | USED) != want || self.out.is_empty() {
            return None;
        }
        assert_eq!(flags & WRITE != 0, len > 0);
        let in_order = self.at.config.features & 1 << VIRTIO_F_IN_ORDER != 0;
        let mut n = 0;
        loop {
            let (first, places) = self.out.pop_front().expect("an id that is in flight");
            self.used = self.after(self.used, places);
            n += 1;
            if first == id {
                return Some((id, len, n));
            }
            assert!(in_order, "{id} instead of {first}");
        }
    }

    /// Forgets what was used, whatever else is in the ring: for a driver that has written what it should not.
    pub fn forget_used(&mut self) {
        while let Some(&(_, places)) = self.out.front() {
            let at = GuestAddress(self.at.config.desc + 16 * u64::from(self.used & !WRAP) + 14);
            let flags: u16 = self.at.mem.read_obj(at).unwrap();
            if flags & (AVAIL | USED) != if self.used & WRAP != 0 { AVAIL | USED } else { 0 } {
                break;
            }
            self.used = self.after(self.used, places);
            self.out.pop_front();
        }
    }

    /// All ids that come back now.
    pub fn reap(&mut self) -> usize {
        std::iter::from_fn(|| self.take_used()).map(|(_, _, n)| n).sum()
    }

    /// When the device is to call: a position and flags.
    pub fn set_event(&self, position: u16, flags: u16) {
        self.at.set_word(self.at.config.avail, position);
        self.at.set_word(self.at.config.avail + 2, flags);
    }

    /// When the device wants to be kicked.
    pub fn event(&self) -> (u16, u16) {
        (self.at.word(self.at.config.used), self.at.word(self.at.config.used + 2))
    }
}
