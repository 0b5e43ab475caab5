//! Receive: the driver's side of the even rings, with mergeable buffers put together again.

use std::ops::{Deref, DerefMut};
use std::time::{Duration, Instant};

use super::layout::Chain;
use super::tx::header_len;
use super::{Descriptor, Error, Features, Layout, NetHeader, Notify, Result, Ring, RingFault};

/// A receive ring with the buffers that were given to the device.
pub struct RxRing {
    ring: Ring,
    header_len: usize,
    mergeable: bool,
    repost: bool,
    /// Per head: the buffer in flight there.
    posted: Vec<Option<Chain>>,
    /// Used buffers that wait for [`Self::rx_repost`].
    spare: Vec<Chain>,
    /// The buffers of the frame at hand, with the bytes that the device wrote into each.
    parts: Vec<(Chain, usize)>,
}

/// A received frame, still in guest memory.
pub struct RxFrame<'a> {
    parts: &'a [(Chain, usize)],
    header: NetHeader,
    header_len: usize,
    len: usize,
}

impl RxFrame<'_> {
    /// Its virtio-net header.
    pub fn header(&self) -> NetHeader {
        self.header
    }

    /// Length of the frame without that header.
    pub fn frame_len(&self) -> usize {
        self.len
    }

    /// How many buffers it spans.
    pub fn buffers(&self) -> usize {
        self.parts.len()
    }

    /// Fills `bytes` from offset `at` of the frame.
    ///
    /// # Panics
    /// If the frame ends before.
    pub fn read(&self, at: usize, bytes: &mut [u8]) {
        assert!(at + bytes.len() <= self.len, "read beyond the frame");
        let (mut at, mut done) = (self.header_len + at, 0);
        for (chain, written) in self.parts {
            if at >= *written {
                at -= written;
                continue;
            }
            let count = (bytes.len() - done).min(written - at);
            chain.read(at, &mut bytes[done..done + count]);
            (at, done) = (0, done + count);
        }
    }
}

impl RxRing {
    pub(super) fn new(ring: Ring) -> Self {
        let size = usize::from(ring.size());
        Self {
            ring,
            header_len: NetHeader::LEN,
            mergeable: false,
            repost: true,
            posted: (0..size).map(|_| None).collect(),
            spare: Vec::with_capacity(size),
            parts: Vec::with_capacity(size),
        }
    }

    pub(super) fn reset(&mut self, features: Features, notify: Notify, first: u16) -> u16 {
        let base = self.ring.reset(features, notify, first);
        self.posted.fill_with(|| None);
        self.spare.clear();
        self.header_len = header_len(features);
        self.mergeable = features.contains(Features::MRG_RXBUF);
        base
    }

    /// Whether buffers go back to the device as soon as their frame was read (the default). If not, they wait for
    /// [`Self::rx_repost`]: the way to let a ring run dry.
    pub fn set_repost(&mut self, repost: bool) {
        self.repost = repost;
    }

    /// Gives the device `count` more buffers of `size` bytes, virtio-net header included.
    ///
    /// # Errors
    /// [`Error::RingFull`] or [`Error::OutOfMemory`]; those posted before stay posted.
    pub fn rx_fill(&mut self, size: usize, count: usize) -> Result<()> {
        self.rx_fill_with(size, count, &Layout::single())
    }

    /// The same with each buffer cut as `layout` says: drivers without mergeable buffers post chains of pages to take 64 KiB.
    ///
    /// # Errors
    /// As for [`Self::rx_fill`].
    pub fn rx_fill_with(&mut self, size: usize, count: usize, layout: &Layout) -> Result<()> {
        let mut outcome = Ok(());
        for _ in 0..count {
            let kind = (self.ring.is_packed(), Descriptor::WRITE);
            let chain = Chain::new(self.ring.memory(), size, self.header_len, layout, kind);
            outcome = chain.and_then(|chain| self.post(chain));
            if outcome.is_err() {
                break;
            }
        }
        self.ring.publish()?;
        outcome
    }

    /// Gives the device up to `count` of the buffers back that were used while [`Self::set_repost`] was off.
    ///
    /// # Errors
    /// If the device cannot be kicked.
    pub fn rx_repost(&mut self, count: usize) -> Result<usize> {
        let count = count.min(self.spare.len());
        for _ in 0..count {
            if let Some(chain) = self.spare.pop() {
                self.post(chain)?;
            }
        }
        self.ring.publish()?;
        Ok(count)
    }

    /// The next received frame, copied out, if there is one.
    ///
    /// # Errors
    /// If the device broke the used ring or the header.
    pub fn rx_poll(&mut self) -> Result<Option<(NetHeader, Vec<u8>)>> {
        let mut received = None;
        self.rx_batch(1, |frame| {
            let mut bytes = vec![0; frame.frame_len()];
            frame.read(0, &mut bytes);
            received = Some((frame.header(), bytes));
        })?;
        Ok(received)
    }

    /// As [`Self::rx_poll`], but waits for a frame, `timeout` at most.
    ///
    /// # Errors
    /// As for [`Self::rx_poll`], and if waiting fails.
    pub fn rx_wait(&mut self, timeout: Duration) -> Result<Option<(NetHeader, Vec<u8>)>> {
        let deadline = Instant::now() + timeout;
        while self.ring.wait(deadline.saturating_duration_since(Instant::now()))? {
            if let Some(received) = self.rx_poll()? {
                return Ok(Some(received));
            }
        }
        Ok(None)
    }

    /// Shows up to `max` received frames to `each` and then gives their buffers back to the device, with one store of the
    /// index. Allocates nothing. Returns how many there were.
    ///
    /// # Errors
    /// If the device broke the used ring or a header; frames before that were shown.
    pub fn rx_batch(&mut self, max: usize, mut each: impl FnMut(RxFrame<'_>)) -> Result<usize> {
        let mut pending = self.ring.used_pending()?;
        let mut count = 0;
        let mut outcome = Ok(());
        while pending > 0 && count < max {
            match self.next_frame(&mut pending) {
                Ok((header, len)) => {
                    each(RxFrame { parts: &self.parts, header, header_len: self.header_len, len })
                }
                Err(error) => outcome = Err(error),
            }
            while let Some((chain, _)) = self.parts.pop() {
                if self.repost {
                    self.post(chain)?;
                } else {
                    self.spare.push(chain);
                }
            }
            if outcome.is_err() {
                break;
            }
            count += 1;
        }
        self.ring.publish()?;
        outcome.map(|()| count)
    }

    /// Takes the buffers of the next frame into `parts`; returns its header and length.
    fn next_frame(&mut self, pending: &mut u16) -> Result<(NetHeader, usize)> {
        let written = self.take_part(pending)?;
        if written < self.header_len {
            return Err(self.ring.fault(RingFault::UsedLength(written as u32)));
        }
        let mut bytes = [0; NetHeader::LEN];
        self.parts[0].0.read(0, &mut bytes[..self.header_len]);
        let header = NetHeader::from_bytes(bytes);
        let mut total = written;
        if self.mergeable {
            // Linux drops a packet of which not all buffers are there yet, so to us it is a fault of the device.
            if header.num_buffers == 0 || header.num_buffers - 1 > *pending {
                return Err(self.ring.fault(RingFault::NumBuffers(header.num_buffers)));
            }
            for _ in 1..header.num_buffers {
                total += self.take_part(pending)?;
            }
        }
        Ok((header, total - self.header_len))
    }

    fn take_part(&mut self, pending: &mut u16) -> Result<usize> {
        let (head, written) = self.ring.take_used()?;
        *pending -= 1;
        let written = written as usize;
        match self.posted[usize::from(head)].take() {
            Some(chain) if written <= chain.len => {
                self.parts.push((chain, written));
                Ok(written)
            }
            Some(chain) => {
                self.parts.push((chain, 0));
                Err(self.ring.fault(RingFault::UsedLength(written as u32)))
            }
            // Only heads in flight come out of the ring, and each of those has its buffer.
            None => Err(self.ring.fault(RingFault::UsedId(u32::from(head)))),
        }
    }

    fn post(&mut self, chain: Chain) -> Result<()> {
        let head = self.ring.post(&chain.descriptors).ok_or(Error::RingFull(self.ring.index()))?;
        self.posted[usize::from(head)] = Some(chain);
        Ok(())
    }
}

impl Deref for RxRing {
    type Target = Ring;
    fn deref(&self) -> &Ring {
        &self.ring
    }
}

impl DerefMut for RxRing {
    fn deref_mut(&mut self) -> &mut Ring {
        &mut self.ring
    }
}
