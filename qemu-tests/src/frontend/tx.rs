//! Transmit: the driver's side of the odd rings.

use std::ops::{Deref, DerefMut};

use super::layout::Chain;
use super::{Error, Features, Layout, NetHeader, Notify, Result, Ring};

/// A frame in guest memory, ready to be posted as often as wanted, also several times at once: devices only read it.
/// The load generator's ammunition. Keep it until [`TxRing::tx_reap`] has taken back what was posted of it, or the device may
/// send what its memory is used for next.
pub struct Prepared {
    chain: Chain,
    header_len: usize,
}

impl Prepared {
    /// Length of the frame, its virtio-net header not counted.
    pub fn frame_len(&self) -> usize {
        self.chain.len - self.header_len
    }

    /// Changes bytes of the frame, a sequence number say.
    ///
    /// # Panics
    /// If they reach beyond the frame.
    pub fn patch(&self, at: usize, bytes: &[u8]) {
        assert!(at + bytes.len() <= self.frame_len(), "patch beyond the frame");
        self.chain.write(self.header_len + at, bytes);
    }
}

/// A transmit ring with the frames that are in flight on it.
pub struct TxRing {
    ring: Ring,
    header_len: usize,
    /// Per head: the frame that [`Self::tx_with`] posted there and that goes when it is used.
    owned: Vec<Option<Chain>>,
}

impl TxRing {
    pub(super) fn new(ring: Ring) -> Self {
        let owned = (0..ring.size()).map(|_| None).collect();
        Self { ring, header_len: NetHeader::LEN, owned }
    }

    pub(super) fn reset(&mut self, features: Features, notify: Notify, first: u16) -> u16 {
        let base = self.ring.reset(features, notify, first);
        self.owned.fill_with(|| None);
        self.header_len = header_len(features);
        base
    }

    /// Sends one frame in one descriptor, and kicks the device if it wants to be kicked.
    ///
    /// # Errors
    /// [`Error::RingFull`] if no descriptor is free even after taking back what the device has used.
    pub fn tx(&mut self, frame: &[u8], header: &NetHeader) -> Result<()> {
        self.tx_with(frame, header, &Layout::single())
    }

    /// Sends one frame cut as `layout` says.
    ///
    /// # Errors
    /// As for [`Self::tx`].
    pub fn tx_with(&mut self, frame: &[u8], header: &NetHeader, layout: &Layout) -> Result<()> {
        let Prepared { chain, .. } = self.prepare(frame, header, layout)?;
        if self.ring.free() < chain.descriptors.len() {
            self.tx_reap()?;
        }
        let head = self.ring.post(&chain.descriptors).ok_or(Error::RingFull(self.ring.index()))?;
        self.owned[usize::from(head)] = Some(chain);
        self.ring.publish()
    }

    /// Puts a frame into guest memory for [`Self::tx_batch`]. It may be posted on every transmit ring of this guest.
    ///
    /// # Errors
    /// If guest memory is exhausted.
    pub fn prepare(&self, frame: &[u8], header: &NetHeader, layout: &Layout) -> Result<Prepared> {
        let len = self.header_len + frame.len();
        let chain = Chain::new(self.ring.memory(), len, self.header_len, layout, (self.ring.is_packed(), 0))?;
        chain.write(0, &header.to_bytes()[..self.header_len]);
        chain.write(self.header_len, frame);
        Ok(Prepared { chain, header_len: self.header_len })
    }

    /// Posts frames until the iterator or the ring ends; one store of the index and at most one kick for all. Allocates
    /// nothing. Returns how many were posted.
    ///
    /// # Errors
    /// If the device cannot be kicked.
    pub fn tx_batch<'a>(&mut self, frames: impl IntoIterator<Item = &'a Prepared>) -> Result<usize> {
        let mut count = 0;
        for frame in frames {
            if self.ring.post(&frame.chain.descriptors).is_none() {
                break;
            }
            count += 1;
        }
        self.ring.publish()?;
        Ok(count)
    }

    /// Takes back what the device has sent. Returns the number of frames.
    ///
    /// # Errors
    /// If the device broke the used ring.
    pub fn tx_reap(&mut self) -> Result<usize> {
        let pending = self.ring.used_pending()?;
        for _ in 0..pending {
            let (head, _) = self.ring.take_used()?;
            self.owned[usize::from(head)] = None;
        }
        Ok(usize::from(pending))
    }
}

impl Deref for TxRing {
    type Target = Ring;
    fn deref(&self) -> &Ring {
        &self.ring
    }
}

impl DerefMut for TxRing {
    fn deref_mut(&mut self) -> &mut Ring {
        &mut self.ring
    }
}

/// Bytes of the virtio-net header under the given features (virtio 1.2, §5.1.6.1).
pub(super) fn header_len(features: Features) -> usize {
    let long = features.contains(Features::VERSION_1) || features.contains(Features::MRG_RXBUF);
    if long { NetHeader::LEN } else { NetHeader::LEGACY_LEN }
}
