//! A guest's transmit ring, which we consume.

use std::os::fd::{AsFd, BorrowedFd};
use std::sync::Arc;

use virtio_bindings::virtio_net::{
    VIRTIO_NET_F_CSUM, VIRTIO_NET_F_HOST_TSO4, VIRTIO_NET_F_HOST_TSO6, VIRTIO_NET_F_HOST_UFO,
    VIRTIO_NET_F_HOST_USO,
};

use super::burst::{Burst, MAX_BURST, MAX_SEGS, Pieces};
use super::header::NetHeader;
use super::mem::{self, GuestRegions, Mapping, Seg, prefetch_read};
use super::notify::{Call, Kick};
use super::split::{Direction, SplitRing};
use super::{RingBase, RingConfig, RingError, header_len, next_ring_id};

/// Offloads under which the header that a guest transmits says anything.
const HEADER_MATTERS: u64 = 1 << VIRTIO_NET_F_CSUM
    | 1 << VIRTIO_NET_F_HOST_TSO4
    | 1 << VIRTIO_NET_F_HOST_TSO6
    | 1 << VIRTIO_NET_F_HOST_UFO
    | 1 << VIRTIO_NET_F_HOST_USO;

/// Cache lines of a frame's beginning that are asked for ahead: the virtio header and the usual headers.
const HEAD_LINES: usize = 2;

/// A guest's transmit ring. One owner at a time consumes it; dropping it leaves its position for the next start.
pub struct GuestTx {
    ring: SplitRing,
    id: u64,
    header_len: u32,
    read_header: bool,
    /// The next position of the available ring to take.
    next_avail: u16,
    /// Taken but not yet given back.
    in_flight: u16,
    next_used: u16,
    /// The region that was hit last.
    hint: usize,
    armed: bool,
    broken: bool,
    kick: Option<Arc<Kick>>,
    call: Arc<Call>,
    base: Arc<RingBase>,
}

impl GuestTx {
    /// Starts the ring at position `base`.
    ///
    /// # Errors
    /// [`RingError::Size`], [`RingError::Layout`].
    pub fn new(
        regions: Arc<GuestRegions>,
        config: &RingConfig,
        kick: Option<Arc<Kick>>,
        call: Arc<Call>,
        base: Arc<RingBase>,
    ) -> Result<Self, RingError> {
        let ring = SplitRing::new(regions, config)?;
        let next_avail = base.get();
        ring.start(next_avail);
        Ok(GuestTx {
            id: next_ring_id(),
            header_len: header_len(config.features),
            read_header: config.features & HEADER_MATTERS != 0,
            next_avail,
            in_flight: 0,
            next_used: ring.used_index(),
            hint: 0,
            armed: false,
            broken: false,
            kick,
            call,
            base,
            ring,
        })
    }

    /// Unlike that of any other ring, or of this one after a restart.
    pub fn id(&self) -> u64 {
        self.id
    }

    /// Takes up to `max` frames (at most [`MAX_BURST`]) into `burst`, which is cleared first. Returns their number.
    ///
    /// The ring is gone over by stages, each of which asks for the memory of the next: heads, descriptors, chains,
    /// headers. So one cache miss is not waited for after the other.
    ///
    /// # Errors
    /// The ring is malformed at its next chain. This is said once; from then on the ring is found empty. Frames before
    /// the malformed chain are still delivered.
    pub fn receive(&mut self, burst: &mut Burst, max: usize) -> Result<usize, RingError> {
        burst.clear();
        if self.broken {
            return Ok(0);
        }
        match self.try_receive(burst, max.min(MAX_BURST)) {
            Ok(n) => {
                self.next_avail = self.next_avail.wrapping_add(n as u16);
                self.in_flight += n as u16;
                if n > 0 {
                    burst.ring = self.id;
                    burst.owner = Some(Arc::clone(&self.ring.regions) as Arc<dyn Mapping>);
                }
                Ok(n)
            }
            Err(e) => {
                self.broken = true;
                burst.clear();
                Err(e)
            }
        }
    }

    fn try_receive(&mut self, burst: &mut Burst, max: usize) -> Result<usize, RingError> {
        let room = self.ring.size() - self.in_flight.min(self.ring.size());
        let n = usize::from(self.ring.available(self.next_avail)?.min(room)).min(max);
        if n == 0 {
            return Ok(0);
        }
        let bad_head = self.take_heads(burst, n);
        let bad_chain = if self.resolve_single(burst) { self.resolve_chains(burst) } else { None };
        match bad_chain.or(bad_head) {
            Some(e) if burst.count == 0 => Err(e),
            _ => {
                self.take_headers(burst);
                Ok(burst.count)
            }
        }
    }

    /// Stage 1: heads of chains; asks for their descriptors. As in the next stages, an error ends the burst before it.
    #[inline(always)]
    fn take_heads(&self, burst: &mut Burst, n: usize) -> Option<RingError> {
        burst.count = n;
        for (i, f) in burst.frames.iter_mut().take(n).enumerate() {
            match self.ring.head(self.next_avail.wrapping_add(i as u16)) {
                Ok(head) => {
                    self.ring.prefetch_desc(head);
                    f.head = head;
                }
                Err(e) => {
                    burst.count = i;
                    return Some(e);
                }
            }
        }
        None
    }

    /// Stage 2: frames of a single descriptor are resolved, and their first bytes asked for; of others, the table that
    /// is read next. Whether there are any others.
    #[inline(always)]
    fn resolve_single(&mut self, burst: &mut Burst) -> bool {
        let (mut memory, mut others) = (self.ring.regions.translator(self.hint), false);
        for f in burst.frames.iter_mut().take(burst.count) {
            let desc = self.ring.desc(f.head);
            if desc.is_single_readable()
                && let Some(seg) = memory.translate(desc.addr, desc.len)
            {
                seg.prefetch_read(HEAD_LINES);
                f.pieces = Pieces::One(seg);
                continue;
            }
            others = true;
            f.pieces = Pieces::None;
            if let Some(seg) = memory.translate(desc.addr, 1) {
                prefetch_read(seg.ptr());
            }
        }
        self.hint = memory.hint;
        others
    }

    /// Stage 3: the other frames. Their descriptors are read anew, which is as good: it is this copy that is checked.
    #[inline(never)]
    fn resolve_chains(&mut self, burst: &mut Burst) -> Option<RingError> {
        let Burst { frames, count: frame_count, segs, .. } = burst;
        for (i, f) in frames.iter_mut().take(*frame_count).enumerate() {
            if !matches!(f.pieces, Pieces::None) {
                continue;
            }
            let first = segs.len();
            let walked = self.ring.walk(f.head, Direction::FromGuest, u32::MAX, &mut self.hint, |seg| {
                if segs.len() == MAX_SEGS {
                    return Err(RingError::TooLong); // with frames before this one it is tried again, alone
                }
                if segs.len() < first + 2 {
                    seg.prefetch_read(HEAD_LINES);
                }
                segs.push(seg);
                Ok(())
            });
            match walked {
                Ok(len) => {
                    f.len = len;
                    f.pieces = Pieces::Many { first: first as u32, count: (segs.len() - first) as u32 };
                }
                Err(e) => {
                    *frame_count = i;
                    return Some(e);
                }
            }
        }
        None
    }

    /// Stage 4: the virtio headers are copied, if they can say anything, and taken off.
    #[inline(always)]
    fn take_headers(&mut self, burst: &mut Burst) {
        let header_len = self.header_len;
        let Burst { frames, count, segs, .. } = burst;
        for f in frames.iter_mut().take(*count) {
            f.header = NetHeader::EMPTY;
            match &mut f.pieces {
                Pieces::One(seg) if seg.len() > header_len => {
                    if self.read_header {
                        f.header = read_header(std::slice::from_ref(seg), header_len);
                    }
                    *seg = seg.skip(header_len);
                    f.len = seg.len();
                }
                Pieces::Many { first, count } => {
                    let segs = &mut segs[*first as usize..(*first + *count) as usize];
                    if self.read_header && f.len >= header_len {
                        f.header = read_header(segs, header_len);
                    }
                    f.len = f.len.saturating_sub(header_len);
                    let gone = take_off(segs, header_len);
                    *first += gone;
                    *count -= gone;
                }
                // Nothing but a header, or less: there is no frame.
                Pieces::One(_) | Pieces::None => (f.len, f.pieces) = (0, Pieces::None),
            }
        }
    }

    /// Gives the buffers of `burst` back to the guest, notifies it if it wants that, and clears the burst. A burst of
    /// another ring, or from before a restart, is only cleared.
    pub fn complete(&mut self, burst: &mut Burst) {
        let n = burst.count as u16;
        if burst.ring == self.id && n > 0 {
            for (i, f) in (0..).zip(burst.frames()) {
                self.ring.write_used(self.next_used.wrapping_add(i), f.head, 0);
            }
            let old = self.next_used;
            self.next_used = old.wrapping_add(n);
            self.in_flight -= n;
            self.ring.publish_used(self.next_used);
            if self.ring.wants_call(old, self.next_used) {
                self.call.signal();
            }
        }
        burst.clear();
    }

    /// Whether there is something to [receive](Self::receive), be it an error.
    #[inline(always)]
    pub fn has_pending(&self) -> bool {
        !self.broken && self.ring.avail_index() != self.next_avail
    }

    /// Asks the guest for a kick at its next frame. True: the ring is empty and the caller may sleep. False: there is
    /// something to receive, and kicks are off again; or the guest does not kick and expects to be polled.
    pub fn arm(&mut self) -> bool {
        if self.broken {
            return true;
        }
        if self.kick.is_none() {
            return false;
        }
        self.armed = true;
        let empty = self.ring.arm(self.next_avail);
        if !empty {
            self.disarm();
        }
        empty
    }

    /// Asks the guest for no more kicks.
    pub fn disarm(&mut self) {
        if self.armed {
            self.armed = false;
            self.ring.disarm();
        }
    }

    /// What becomes readable when the guest kicks; to be polled while asleep.
    pub fn kick_fd(&self) -> Option<BorrowedFd<'_>> {
        self.kick.as_deref().map(AsFd::as_fd)
    }

    /// The guest's kicks, if it does not expect to be polled.
    pub fn kick(&self) -> Option<&Arc<Kick>> {
        self.kick.as_ref()
    }

    /// Takes back a kick, so that [`kick_fd`](Self::kick_fd) is no longer readable. Call it when it was.
    pub fn clear_kick(&self) {
        if let Some(kick) = &self.kick {
            kick.clear();
        }
    }
}

impl Drop for GuestTx {
    fn drop(&mut self) {
        // What was taken but not given back will be taken again: buffers are completed in ring order.
        self.base.set(self.next_avail.wrapping_sub(self.in_flight));
    }
}

/// The virtio header at the beginning of `segs`, which are no shorter.
#[inline(always)]
fn read_header(segs: &[Seg], len: u32) -> NetHeader {
    let mut bytes = [0; NetHeader::LEN];
    match len as usize {
        NetHeader::LEN => mem::gather(segs, 0, &mut bytes),
        len => mem::gather(segs, 0, &mut bytes[..len]),
    };
    // Nearly all say that there is nothing to do; the other fields then mean nothing.
    if bytes[0] | bytes[1] == 0 { NetHeader::default() } else { NetHeader::from_bytes(&bytes) }
}

/// Takes the first `bytes` off `segs`. Returns how many whole pieces are gone.
fn take_off(segs: &mut [Seg], mut bytes: u32) -> u32 {
    let mut gone = 0;
    for seg in segs {
        if seg.len() > bytes {
            *seg = seg.skip(bytes);
            break;
        }
        bytes -= seg.len();
        gone += 1;
    }
    gone
}
