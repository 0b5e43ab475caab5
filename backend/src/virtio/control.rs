//! A device's control queue, which we serve where the front-end hands it over (virtio 1.2, 5.1.6.5). No worker has to do with it.
//!
//! A buffer of it is a command, which we read, and behind it room for at least a byte, the acknowledgement, which we write.

use std::os::fd::{AsFd, BorrowedFd};
use std::sync::Arc;

use virtio_bindings::virtio_config::VIRTIO_F_RING_PACKED;

use super::burst::MAX_SEGS;
use super::layout::{Direction, Layout};
use super::mem::{self, GuestRegions, Scatter, Seg};
use super::notify::{Call, Kick};
use super::packed::PackedRing;
use super::split::SplitRing;
use super::{RingBase, RingConfig, RingError};

/// Bytes of the longest command: a table of 2,700 addresses.
const MAX_COMMAND: u32 = 16 << 10;

/// A control queue. It has one owner; dropping it leaves its position for the next start.
pub struct ControlRing {
    ring: Ring,
    armed: bool,
    broken: bool,
    kick: Option<Arc<Kick>>,
    call: Arc<Call>,
    base: Arc<RingBase>,
}

enum Ring {
    Split(Serving<SplitRing>),
    Packed(Serving<PackedRing>),
}

/// Evaluates an expression for the ring of whatever layout.
macro_rules! with_ring {
    ($control:expr, $ring:ident => $use:expr) => {
        match $control {
            Ring::Split($ring) => $use,
            Ring::Packed($ring) => $use,
        }
    };
}

impl ControlRing {
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
            true => Ring::Packed(Serving::new(regions, config, &base)?),
            false => Ring::Split(Serving::new(regions, config, &base)?),
        };
        Ok(ControlRing { ring, armed: false, broken: false, kick, call, base })
    }

    /// Whether it stands where rings begin: its driver has not said a word yet, or has come by again, as rings go round.
    pub fn is_at_start(&self) -> bool {
        // In a packed ring the uppermost bit is the lap, which is 1 in the first one, and again in each second.
        match &self.ring {
            Ring::Split(ring) => ring.next == 0,
            Ring::Packed(ring) => ring.next == 1 << 15,
        }
    }

    /// Has `answer` acknowledge the next command, if there is one, and gives its buffer back. Whether there was one.
    ///
    /// # Errors
    /// The ring is malformed there. This is said once; from then on it is found empty.
    pub fn serve(&mut self, answer: impl FnOnce(&[u8]) -> u8) -> Result<bool, RingError> {
        if self.broken {
            return Ok(false);
        }
        match with_ring!(&mut self.ring, ring => ring.serve(answer)) {
            Ok(None) => Ok(false),
            Ok(Some(wants_call)) => {
                if wants_call {
                    self.call.signal();
                }
                Ok(true)
            }
            Err(e) => {
                self.broken = true;
                Err(e)
            }
        }
    }

    /// Asks for a kick at the next command. False: there is one, or the guest does not kick.
    pub fn arm(&mut self) -> bool {
        if self.broken {
            return true;
        }
        self.armed = true;
        let empty = with_ring!(&self.ring, ring => ring.layout.arm(ring.next));
        with_ring!(&self.ring, ring => ring.layout.log_ring());
        empty && self.kick.is_some()
    }

    /// Asks for no more kicks, and takes those back that came.
    pub fn disarm(&mut self) {
        if self.armed {
            self.armed = false;
            with_ring!(&self.ring, ring => ring.layout.disarm());
            with_ring!(&self.ring, ring => ring.layout.log_ring());
        }
        if let Some(kick) = &self.kick {
            kick.clear();
        }
    }

    /// What becomes readable when the guest kicks, if it does.
    pub fn kick_fd(&self) -> Option<BorrowedFd<'_>> {
        self.kick.as_deref().map(AsFd::as_fd)
    }
}

impl Drop for ControlRing {
    fn drop(&mut self) {
        self.base.set(with_ring!(&self.ring, ring => ring.next));
    }
}

/// A control queue of layout `L`. What is taken is given back at once.
struct Serving<L> {
    layout: L,
    next: u16,
    used: u16,
    hint: usize,
}

impl<L: Layout> Serving<L> {
    fn new(regions: Arc<GuestRegions>, config: &RingConfig, base: &RingBase) -> Result<Self, RingError> {
        let mut layout = L::new(regions, config)?;
        let (next, used) = layout.start(config, base, Direction::Command)?;
        layout.log_ring();
        Ok(Serving { layout, next, used, hint: 0 })
    }

    /// Whether the guest wants to be notified; nothing if there is no command.
    fn serve(&mut self, answer: impl FnOnce(&[u8]) -> u8) -> Result<Option<bool>, RingError> {
        let room = self.layout.available(self.next, 0)?;
        let mut pieces = Vec::new();
        let Some(command) = self.part(room, Direction::Command, &mut pieces)? else { return Ok(None) };
        let mut bytes = vec![0; command.len.min(MAX_COMMAND) as usize];
        let copied = mem::gather(&pieces, 0, &mut bytes);
        // The guest may have changed the chain since: what counts is what each look has found.
        pieces.clear();
        let Some(reply) = self.part(room, Direction::Reply, &mut pieces)? else { return Ok(None) };
        let first = pieces.first().ok_or(RingError::Direction)?;
        Scatter::new(std::slice::from_ref(first)).put_bytes(&[answer(&bytes[..copied])]);
        let regions = self.layout.regions();
        if let Some(log) = regions.log() {
            regions.wrote(log, first, 1);
        }
        let old = self.used;
        let entry = L::entry(Direction::Reply, reply.id, 1);
        self.used = self.layout.publish(old, &[entry], &[reply.places]);
        self.next = self.layout.advance(self.next, reply.places);
        self.layout.log_ring();
        Ok(Some(self.layout.wants_call([old, self.used])))
    }

    /// The pieces of one part of the buffer that is next.
    fn part(
        &mut self,
        room: u16,
        direction: Direction,
        pieces: &mut Vec<Seg>,
    ) -> Result<Option<super::layout::Chain>, RingError> {
        let mut bytes = 0;
        self.layout.chain(self.next, room, direction, u32::MAX, &mut self.hint, |piece| {
            bytes += u64::from(piece.len());
            if pieces.len() == MAX_SEGS || bytes > u64::from(MAX_COMMAND) {
                return Err(RingError::TooLong);
            }
            pieces.push(piece);
            Ok(())
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::virtio::testing::{Driver, INDIRECT, MODERN, NEXT, WRITE, signals};

    /// Commands from here on, acknowledgements behind them.
    const AT: u64 = 0x2_0000;

    fn ring(d: &Driver) -> ControlRing {
        ControlRing::new(d.regions(), &d.config, None, d.call.clone(), d.base.clone()).unwrap()
    }

    /// Offers a command in pieces of these lengths, with this many bytes to be written behind it.
    fn offer(d: &mut Driver, head: u16, lengths: &[u32], room: u32) {
        let mut at = AT;
        for (i, &len) in (head..).zip(lengths) {
            d.desc(i, at, len, NEXT, i + 1);
            at += u64::from(len);
        }
        d.desc(head + lengths.len() as u16, AT + 0x1000, room, WRITE, 0);
        d.offer(head);
    }

    #[test]
    fn a_command_is_read_and_acknowledged() {
        let mut d = Driver::new(16, MODERN);
        let mut ring = ring(&d);
        assert!(ring.is_at_start());
        assert_eq!(ring.serve(|_| unreachable!()), Ok(false));
        d.write(AT, &[4, 0, 2, 0]);
        d.write(AT + 0x1000, &[0xee, 0xee]);
        for (round, lengths) in [&[4][..], &[2, 2], &[1, 1, 2]].into_iter().enumerate() {
            offer(&mut d, 0, lengths, 2);
            assert_eq!(
                ring.serve(|command| {
                    assert_eq!(command, [4, 0, 2, 0]);
                    round as u8
                }),
                Ok(true)
            );
            assert_eq!(d.take_used(), Some((0, 1)));
            assert_eq!(d.read(AT + 0x1000, 2), [round as u8, 0xee]);
        }
        assert!(signals(&d.called) > 0 && !ring.is_at_start());
        drop(ring);
        assert_eq!(d.base.get(), 3);
        assert!(!self::ring(&d).is_at_start());
    }

    #[test]
    fn a_malformed_command_stops_the_ring_once() {
        type Attack = fn(&mut Driver);
        let attacks: [(Attack, RingError); 5] = [
            (
                |d| {
                    d.desc(0, AT, 4, 0, 0);
                    d.offer(0)
                },
                RingError::Direction,
            ),
            (|d| offer(d, 0, &[MAX_COMMAND + 1], 1), RingError::TooLong),
            (|d| offer(d, 0, &[0], 1), RingError::ZeroLength),
            (
                |d| {
                    d.desc(0, AT, 4, NEXT, 0);
                    d.offer(0)
                },
                RingError::TooLong,
            ),
            (
                |d| {
                    d.desc(0, 1 << 50, 32, INDIRECT, 0);
                    d.offer(0)
                },
                RingError::Address { addr: 1 << 50, len: 32 },
            ),
        ];
        for (attack, error) in attacks {
            let mut d = Driver::new(8192, MODERN);
            let mut ring = ring(&d);
            attack(&mut d);
            assert_eq!(ring.serve(|_| 0), Err(error));
            assert_eq!(ring.serve(|_| 0), Ok(false));
        }
    }
}
