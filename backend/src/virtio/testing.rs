//! A driver's side of split rings, for tests: it writes into guest memory what a guest would, or what one should not.

use std::fs::File;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::sync::Arc;

use virtio_bindings::virtio_config::VIRTIO_F_VERSION_1;
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

    pub fn rx(&self) -> GuestRx {
        GuestRx::new(self.regions(), &self.config, self.call.clone(), self.base.clone()).unwrap()
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
