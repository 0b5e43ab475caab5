//! Virtio-net rings over guest memory, by raw pointers that were bounds-checked once.
//!
//! A guest is hostile: it may change any byte at any time. Hence
//! * every index and descriptor is copied once, then validated, and only the copy is used;
//! * a host pointer is made only from a range found whole in the [`GuestRegions`] table, whose mapping is kept alive by
//!   whoever holds the pointer;
//! * what a malformed ring costs is that ring: the methods give a [`RingError`] once and find the ring empty (or
//!   stopped) from then on, until the driver resets it.
//!
//! [`GuestTx`] is a guest's *transmit* ring, which we consume. It has one owner at a time:
//! ```text
//! tx.receive(&mut burst, 64)?      frames and where their bytes are; nothing is copied but virtio headers
//! … burst.copy_head(), burst.segments() …
//! tx.complete(&mut burst)          the buffers go back to the guest, which is notified if it wants to be
//! if tx.arm() { /* sleep on tx.kick_fd() */ } tx.disarm()
//! ```
//! [`GuestRx`] is a guest's *receive* ring, which we fill. Workers share it: buffers are reserved under a spin lock,
//! filled outside of it, and published in the order of reservation.
//! ```text
//! rx.send(&frames)                 leading frames that went in, and what blocked the next one
//! rx.notify()                      once after a burst
//! ```
//! [`ControlRing`] is a device's control queue, of commands that are answered one by one.
//!
//! The layout of a ring is a trait, `layout::Layout`: [`split`] and `packed` have it. Writes into guest memory happen there (what is used,
//! when to be notified), in `mem::Scatter` and `mem::Seg` (packets and acknowledgements), and nowhere else. Where we are in a packed ring is kept in a file,
//! too (`record`), so that whoever comes after us can go on.
#![allow(unsafe_code)]

mod burst;
mod control;
mod dirty;
mod filling;
mod guest_rx;
mod guest_tx;
mod header;
mod layout;
mod mem;
mod notify;
mod packed;
#[cfg(test)]
mod packed_tests;
mod pages;
mod publication;
mod record;
#[cfg(test)]
mod record_tests;
mod sigbus;
mod spin;
pub mod split;
#[cfg(test)]
pub(crate) mod testing;
#[cfg(test)]
mod tests;

pub use burst::{Burst, MAX_BURST, MAX_SEGS, Received};
pub use control::ControlRing;
pub use dirty::DirtyLog;
pub use guest_rx::{Blocked, Frame, Frames, GuestRx, Long, SendResult};
pub use guest_tx::GuestTx;
pub use header::NetHeader;
pub(crate) use mem::Scatter;
pub use mem::{GuestRegions, Mapping, Seg};
pub use notify::{Call, Kick};
pub use pages::{Pages, Placement};
pub use record::{RingRecord, RingRecords};
pub use sigbus::survive_loss;
pub(crate) use spin::SpinLock;

use std::sync::atomic::{AtomicU16, AtomicU32, AtomicU64, Ordering};

const _: () =
    assert!(cfg!(target_endian = "little"), "rings are read in their wire order, which is little-endian");

/// What is wrong with a guest's ring. It stops until the driver resets it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum RingError {
    /// The size is 0, more than 32768, or that of a split ring and not a power of two.
    #[error("a ring cannot have {0} entries")]
    Size(u16),
    /// A part of the ring is misaligned or not wholly in one memory region.
    #[error("the {part} at guest address {addr:#x} is misaligned or outside of guest memory")]
    Layout {
        /// "descriptor table", "available ring" or "used ring"; "descriptor ring", "driver event area" or "device event area".
        part: &'static str,
        /// Guest-physical.
        addr: u64,
    },
    /// The ring cannot go on where the front-end says.
    #[error("the ring cannot go on at position {0:#x}: its driver has to reset it")]
    Base(u16),
    /// More is available than the ring has room for.
    #[error("available index {index} is more than the ring's size ahead of {next}")]
    AvailIndex {
        /// As the guest wrote it.
        index: u16,
        /// The next entry that we would take.
        next: u16,
    },
    /// A descriptor index, of a chain's head or a next field, is outside of its table.
    #[error("descriptor index {index} is outside of its table of {size}")]
    DescIndex {
        /// As the guest wrote it.
        index: u16,
        /// Of the ring or the indirect table.
        size: u32,
    },
    /// A chain goes on for longer than its table, so it must be a loop.
    #[error("a descriptor chain loops")]
    Loop,
    /// A chain has more pieces than we accept in one frame, or more than 4 GiB.
    #[error("a descriptor chain is too long")]
    TooLong,
    /// A device-writable descriptor in a transmit ring, or a read-only one in a receive ring.
    #[error("descriptor with the wrong direction")]
    Direction,
    /// A descriptor of length zero.
    #[error("zero-length descriptor")]
    ZeroLength,
    /// A descriptor that is not wholly in guest memory.
    #[error("buffer at {addr:#x} of {len} bytes is outside of guest memory")]
    Address {
        /// Guest-physical.
        addr: u64,
        /// Bytes.
        len: u32,
    },
    /// An indirect table that was not negotiated, is nested, goes on with NEXT, or has an impossible length.
    #[error("invalid indirect descriptor")]
    Indirect,
}

/// Where a ring is and how its driver uses it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct RingConfig {
    /// Entries; a power of two in a split ring.
    pub size: u16,
    /// Guest-physical address of the descriptor table; of a packed ring's descriptors.
    pub desc: u64,
    /// Guest-physical address of the available ring; of a packed ring's driver event area.
    pub avail: u64,
    /// Guest-physical address of the used ring; of a packed ring's device event area.
    pub used: u64,
    /// Negotiated virtio features.
    pub features: u64,
}

impl RingConfig {
    /// Whether `bit` was negotiated.
    pub(crate) fn has(&self, bit: u32) -> bool {
        has_feature(self.features, bit)
    }
}

/// Whether `features` has feature `bit`.
pub fn has_feature(features: u64, bit: u32) -> bool {
    features & (1 << bit) != 0
}

/// Bytes of the virtio-net header under `features`: legacy drivers without mergeable buffers have a shorter one.
fn header_len(features: u64) -> u32 {
    use virtio_bindings::{virtio_config::VIRTIO_F_VERSION_1, virtio_net::VIRTIO_NET_F_MRG_RXBUF};
    let long = has_feature(features, VIRTIO_F_VERSION_1) || has_feature(features, VIRTIO_NET_F_MRG_RXBUF);
    (if long { NetHeader::LEN } else { NetHeader::LEGACY_LEN }) as u32
}

/// The position at which a ring goes on when it is started again; survives the ring's owner, who leaves it here.
#[derive(Debug, Default)]
pub struct RingBase {
    position: AtomicU16,
    /// The position that the front-end has named last; it names it again to who comes after us.
    named: AtomicU16,
    /// The two ends of the [`record::Gap`] that is still to be passed; there is none if they are the same.
    gap: AtomicU32,
    record: Option<RingRecord>,
}

impl RingBase {
    /// Of a ring that leaves its position in `record`, too, as long as it runs.
    pub fn recorded(record: Option<RingRecord>) -> Self {
        RingBase { record, ..RingBase::default() }
    }

    /// The next available index; in a packed ring the next place, and the wrap counter in bit 15.
    pub fn get(&self) -> u16 {
        self.position.load(Ordering::Acquire)
    }

    /// Sets what [`get`](Self::get) gives.
    pub fn set(&self, next_avail: u16) {
        self.position.store(next_avail, Ordering::Release);
    }

    /// The front-end says where the ring goes on, or is told.
    pub fn name(&self, base: u16) {
        self.named.store(base, Ordering::Release);
        // What is to be passed behind a position is there as long as the front-end means that one.
        if base != self.get() {
            self.set_gap(None);
        }
        self.set(base);
    }

    /// What the front-end has said.
    pub fn named(&self) -> u16 {
        self.named.load(Ordering::Acquire)
    }

    /// What the ring has to pass once it comes there.
    fn gap(&self) -> Option<record::Gap> {
        let gap = self.gap.load(Ordering::Acquire);
        Some([gap as u16, (gap >> 16) as u16]).filter(|[from, to]| from != to)
    }

    /// Sets what [`gap`](Self::gap) gives.
    fn set_gap(&self, gap: Option<record::Gap>) {
        let [from, to] = gap.unwrap_or_default();
        self.gap.store(u32::from(from) | u32::from(to) << 16, Ordering::Release);
    }

    /// What outlives us of the ring.
    pub fn record(&self) -> Option<&RingRecord> {
        self.record.as_ref()
    }
}

/// A number that no other ring has had: ties a burst to the ring that it came from.
pub(crate) fn next_ring_id() -> u64 {
    static NEXT: AtomicU64 = AtomicU64::new(1);
    NEXT.fetch_add(1, Ordering::Relaxed)
}
