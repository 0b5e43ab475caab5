//! A guest's transmit ring, which we consume.

use std::os::fd::{AsFd, BorrowedFd};
use std::ptr;
use std::sync::Arc;

use virtio_bindings::virtio_config::VIRTIO_F_RING_PACKED;
use virtio_bindings::virtio_net::{
    VIRTIO_NET_F_CSUM, VIRTIO_NET_F_HOST_TSO4, VIRTIO_NET_F_HOST_TSO6, VIRTIO_NET_F_HOST_UFO,
    VIRTIO_NET_F_HOST_USO,
};

use super::burst::{Burst, MAX_BURST, MAX_SEGS, Pieces};
use super::header::NetHeader;
use super::layout::{Direction, Layout};
use super::mem::{self, GuestRegions, Mapping, Seg};
use super::notify::{Call, Kick};
use super::packed::PackedRing;
use super::publication::Positions;
use super::record::Gap;
use super::split::SplitRing;
use super::{RingBase, RingConfig, RingError, header_len, next_ring_id};

/// Offloads under which the header that a guest transmits says anything.
const HEADER_MATTERS: u64 = 1 << VIRTIO_NET_F_CSUM
    | 1 << VIRTIO_NET_F_HOST_TSO4
    | 1 << VIRTIO_NET_F_HOST_TSO6
    | 1 << VIRTIO_NET_F_HOST_UFO
    | 1 << VIRTIO_NET_F_HOST_USO;

/// Buffers that are no single descriptors are asked for this many places ahead.
const LOOK_AHEAD: u16 = 2;

/// A guest's transmit ring. One owner at a time consumes it; dropping it leaves its position for the next start.
pub struct GuestTx {
    ring: Ring,
    id: u64,
    read_header: bool,
    armed: bool,
    broken: bool,
    kick: Option<Arc<Kick>>,
    call: Arc<Call>,
    base: Arc<RingBase>,
}

/// Told apart once a call.
enum Ring {
    Split(Taking<SplitRing>),
    Packed(Taking<PackedRing>),
}

/// Evaluates an expression for the ring of whatever layout.
macro_rules! with_ring {
    ($tx:expr, $ring:ident => $use:expr) => {
        match $tx {
            Ring::Split($ring) => $use,
            Ring::Packed($ring) => $use,
        }
    };
}

impl GuestTx {
    /// Starts the ring at position `base`.
    ///
    /// # Errors
    /// [`RingError::Size`], [`RingError::Layout`], [`RingError::Base`].
    pub fn new(
        regions: Arc<GuestRegions>,
        config: &RingConfig,
        kick: Option<Arc<Kick>>,
        call: Arc<Call>,
        base: Arc<RingBase>,
    ) -> Result<Self, RingError> {
        let ring = match config.has(VIRTIO_F_RING_PACKED) {
            true => Ring::Packed(Taking::new(regions, config, &base)?),
            false => Ring::Split(Taking::new(regions, config, &base)?),
        };
        call.signal_finished(&base);
        Ok(GuestTx {
            ring,
            id: next_ring_id(),
            read_header: config.features & HEADER_MATTERS != 0,
            armed: false,
            broken: false,
            kick,
            call,
            base,
        })
    }

    /// Unlike that of any other ring, or of this one after a restart.
    pub fn id(&self) -> u64 {
        self.id
    }

    /// Takes up to `max` frames (at most [`MAX_BURST`]) into `burst`, which is cleared first. Returns their number.
    ///
    /// Memory is asked for ahead at each step: descriptors some places ahead, headers for when all descriptors are read. So one
    /// cache miss is not waited for after the other.
    ///
    /// # Errors
    /// The ring is malformed at its next chain. This is said once; from then on the ring is found empty. Frames before
    /// the malformed chain are still delivered.
    pub fn receive(&mut self, burst: &mut Burst, max: usize) -> Result<usize, RingError> {
        burst.clear();
        if self.broken {
            return Ok(0);
        }
        let (max, read_header) = (max.min(MAX_BURST), self.read_header);
        match with_ring!(&mut self.ring, ring => ring.receive(burst, max, read_header)) {
            Ok(()) if burst.count > 0 => {
                burst.ring = self.id;
                burst.owner = Some(with_ring!(&self.ring, ring => ring.mapping()));
            }
            Ok(()) => {}
            Err(e) => {
                self.broken = true;
                burst.clear();
                return Err(e);
            }
        }
        Ok(burst.count)
    }

    /// Gives the buffers of `burst` back to the guest, notifies it if it wants that, and clears the burst. A burst of
    /// another ring, or from before a restart, is only cleared.
    pub fn complete(&mut self, burst: &mut Burst) {
        if burst.ring == self.id
            && burst.count > 0
            && with_ring!(&mut self.ring, ring => ring.give_back(burst))
        {
            self.call.signal();
        }
        burst.clear();
    }

    /// Whether there is something to [receive](Self::receive), be it an error.
    #[inline(always)]
    pub fn has_pending(&self) -> bool {
        // In this order: rings are asked that have nothing, but for a few.
        with_ring!(&self.ring, ring => ring.layout.is_filled(ring.next)) && !self.broken
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
        let empty = with_ring!(&self.ring, ring => ring.layout.arm(ring.next));
        with_ring!(&self.ring, ring => ring.layout.log_ring());
        if !empty {
            self.disarm();
        }
        empty
    }

    /// Asks the guest for no more kicks.
    pub fn disarm(&mut self) {
        if self.armed {
            self.armed = false;
            with_ring!(&self.ring, ring => ring.layout.disarm());
            with_ring!(&self.ring, ring => ring.layout.log_ring());
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
        self.base.set(with_ring!(&self.ring, ring => ring.layout.retreat(ring.next, ring.in_flight)));
        self.base.set_gap(with_ring!(&self.ring, ring => ring.gap));
    }
}

/// A transmit ring of layout `L`.
struct Taking<L> {
    layout: L,
    header_len: u32,
    /// The next position to take.
    next: u16,
    /// Places taken but not yet given back.
    in_flight: u16,
    /// The next position to give back.
    used: u16,
    /// What is not to be taken, but passed, once `next` is there.
    gap: Option<Gap>,
    /// The region that was hit last.
    hint: usize,
}

impl<L: Layout> Taking<L> {
    fn new(regions: Arc<GuestRegions>, config: &RingConfig, base: &RingBase) -> Result<Self, RingError> {
        let mut layout = L::new(regions, config)?;
        let (next, used) = layout.start(config, base, Direction::FromGuest)?;
        layout.log_ring();
        let header_len = header_len(config.features);
        Ok(Taking { layout, header_len, next, in_flight: 0, used, gap: base.gap(), hint: 0 })
    }

    fn mapping(&self) -> Arc<dyn Mapping> {
        Arc::clone(self.layout.regions()) as Arc<dyn Mapping>
    }

    /// Takes up to `max` frames into `burst`, which is empty. An error ends the burst before it, and is the result if there is
    /// nothing before it.
    #[inline]
    fn receive(&mut self, burst: &mut Burst, max: usize, read_header: bool) -> Result<(), RingError> {
        let mut room = self.layout.available(self.next, self.in_flight)?;
        while burst.count < max && room > 0 {
            let singles = self.take_singles(burst, room.min((max - burst.count) as u16));
            room -= singles;
            if burst.count == max || room == 0 {
                break;
            }
            match self.take_chain(burst, room) {
                Ok(Some(places)) => room -= places,
                Err(e) if burst.count == 0 => return Err(e),
                Ok(None) | Err(_) => break,
            }
        }
        if read_header || burst.uneven {
            self.take_headers(burst, read_header);
        }
        Ok(())
    }

    /// Goes on behind the gap, unless it or buffers before it are still to come. Whether the guest, which sees it only now, wants to
    /// be notified.
    #[cold]
    fn pass_gap(&mut self) -> bool {
        self.gap.take_if(|[from, _]| self.in_flight == 0 && self.next == *from).is_some_and(|[from, to]| {
            (self.next, self.used) = (to, to);
            self.layout.pass(to);
            self.layout.wants_call([from, to])
        })
    }

    #[inline(always)]
    fn took(&mut self, places: u16) {
        self.next = self.layout.advance(self.next, places);
        self.in_flight += places;
    }

    /// Frames of one descriptor each, up to `n` of them: they are taken without their virtio header, and their first bytes are
    /// asked for. Gives their number.
    #[inline(never)] // with registers of its own
    fn take_singles(&mut self, burst: &mut Burst, n: u16) -> u16 {
        let mut memory = self.layout.regions().translator(self.hint);
        let header_len = self.header_len;
        let Burst { frames, entries, count, .. } = burst;
        let taken = self.layout.singles(self.next, n, Direction::FromGuest, |i, buffer| {
            if buffer.len <= header_len {
                return false;
            }
            let Some(seg) = memory.translate_some(buffer.addr, buffer.len) else { return false };
            // `n` is no more than there is room for; this says so without a branch.
            let i = (*count + i) % MAX_BURST;
            let frame = &mut frames[i];
            seg.prefetch_head();
            let seg = seg.skip(header_len);
            frame.header = NetHeader::EMPTY;
            frame.len = seg.len();
            frame.pieces = Pieces::One(seg);
            entries[i] = L::entry(Direction::FromGuest, buffer.id, 0);
            true
        });
        self.hint = memory.hint;
        self.took(taken);
        *count += usize::from(taken);
        taken
    }

    /// The next frame, whatever it is made of, with its virtio header still on it. Gives the places that it takes.
    #[inline(never)]
    fn take_chain(&mut self, burst: &mut Burst, room: u16) -> Result<Option<u16>, RingError> {
        let Burst { frames, entries, places, uneven, segs, count, .. } = burst;
        let (Some(frame), first) = (frames.get_mut(*count), segs.len()) else { return Ok(None) };
        if room > LOOK_AHEAD {
            self.layout.prefetch_chain(self.layout.advance(self.next, LOOK_AHEAD), &mut self.hint);
        }
        let walked =
            self.layout.chain(self.next, room, Direction::FromGuest, u32::MAX, &mut self.hint, |seg| {
                if segs.len() == MAX_SEGS {
                    return Err(RingError::TooLong); // with frames before this one it is tried again, alone
                }
                if segs.len() < first + 2 {
                    seg.prefetch_head();
                }
                segs.push(seg);
                Ok(())
            });
        let chain = match walked {
            Ok(Some(chain)) => chain,
            other => {
                segs.truncate(first);
                return other.map(|_| None);
            }
        };
        if !*uneven {
            *uneven = true;
            places.fill(1);
        }
        frame.len = chain.len;
        frame.pieces = Pieces::Many { first: first as u32, count: (segs.len() - first) as u32 };
        (entries[*count], places[*count]) = (L::entry(Direction::FromGuest, chain.id, 0), chain.places);
        *count += 1;
        self.took(chain.places);
        Ok(Some(chain.places))
    }

    /// The virtio headers are copied, if they can say anything, and taken off where they are still on.
    #[inline(never)]
    fn take_headers(&self, burst: &mut Burst, read: bool) {
        let header_len = self.header_len;
        let Burst { frames, count, segs, .. } = burst;
        for f in frames.iter_mut().take(*count) {
            match &mut f.pieces {
                Pieces::One(seg) => {
                    if read {
                        f.header = header_before(seg, header_len);
                    }
                }
                Pieces::Many { first, count } => {
                    let segs = &mut segs[*first as usize..(*first + *count) as usize];
                    f.header = NetHeader::EMPTY;
                    if read && f.len >= header_len {
                        let mut bytes = [0; NetHeader::LEN];
                        mem::gather(segs, 0, &mut bytes[..header_len as usize]);
                        f.header = header_of(&bytes);
                    }
                    f.len = f.len.saturating_sub(header_len);
                    let gone = take_off(segs, header_len);
                    *first += gone;
                    *count -= gone;
                }
                Pieces::None => {}
            }
        }
    }

    /// Gives the buffers of a burst back. Whether the guest wants to be notified.
    #[inline]
    fn give_back(&mut self, burst: &Burst) -> bool {
        let places = if burst.uneven { &burst.places[..burst.count] } else { &[] };
        let old = self.used;
        self.used = self.layout.give_back(old, &burst.entries[..burst.count], places);
        self.layout.log_ring();
        self.in_flight -= self.layout.places(old, self.used);
        let wants_call = self.layout.wants_call([old, self.used]);
        match self.gap {
            None => wants_call,
            Some(_) => self.pass_gap() | wants_call,
        }
    }
}

/// The virtio header in front of the frame that a buffer of one piece has.
#[inline(always)]
fn header_before(frame: &Seg, header_len: u32) -> NetHeader {
    let mut bytes = [0; NetHeader::LEN];
    let n = (header_len as usize).min(NetHeader::LEN);
    let from = frame.ptr().wrapping_sub(header_len as usize);
    // SAFETY: `take_singles` found the header in front of the frame in the same mapped region, and took just it off. Private
    // memory overlaps no mapping; what the guest writes meanwhile makes the bytes any mix.
    unsafe {
        match n {
            NetHeader::LEN => ptr::copy_nonoverlapping(from, bytes.as_mut_ptr(), NetHeader::LEN),
            n => ptr::copy_nonoverlapping(from, bytes.as_mut_ptr(), n),
        }
    }
    header_of(&bytes)
}

/// What a guest's header says.
#[inline(always)]
fn header_of(bytes: &[u8; NetHeader::LEN]) -> NetHeader {
    // Nearly all say that there is nothing to do; the other fields then mean nothing.
    if bytes[0] | bytes[1] == 0 { NetHeader::EMPTY } else { NetHeader::from_bytes(bytes) }
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
