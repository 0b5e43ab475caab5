//! The rings of a port, be it a guest's, a wire or a NIC's: a guest's transmit ring and a device's receive queue bring packets
//! alike, and a guest's receive ring and a device's send queue take them alike.
//!
//! They are told apart once a burst. What a wire or NIC brings has an empty header. What a wire takes has complete checksums; to
//! a NIC is left what its device does.

use crate::frames::outgoing::Outgoing;
use crate::nic::{NicPortShared, NicRx, NicTx};
use crate::vhost::PortShared;
use crate::virtio::{Burst, Frames, GuestRx, GuestTx, RingError, SendResult};
use crate::wire::WireShared;
use crate::xdp::{XdpRx, XdpTx};
use std::os::fd::AsFd;
use std::sync::Arc;

/// What says which rings a port has right now.
#[derive(Clone)]
pub enum Rings {
    /// A guest's vhost-user side.
    Guest(Arc<PortShared>),
    /// A device.
    Wire(Arc<WireShared>),
    /// A port of a NIC.
    Nic(Arc<NicPortShared>),
}

impl Rings {
    /// For the worker that owns `queue`: leaves in `slot` the ring that packets come by from now on.
    pub fn take_rx(&self, queue: usize, slot: &mut Option<RxRing>) {
        *slot = match self {
            Rings::Guest(shared) => {
                let mut ring = match slot.take() {
                    Some(RxRing::Guest(ring)) => Some(ring),
                    _ => None,
                };
                shared.take_tx(queue, &mut ring);
                ring.map(RxRing::Guest)
            }
            Rings::Wire(shared) => {
                let mut ring = match slot.take() {
                    Some(RxRing::Wire(ring)) => Some(ring),
                    _ => None,
                };
                shared.take_rx(queue, &mut ring);
                ring.map(RxRing::Wire)
            }
            Rings::Nic(shared) => {
                let mut ring = match slot.take() {
                    Some(RxRing::Nic(ring)) => Some(ring),
                    _ => None,
                };
                shared.take_rx(queue, &mut ring);
                ring.map(RxRing::Nic)
            }
        };
    }

    /// For the worker that owned `queue`: leaves its ring for the worker that owns it from now on, if it still runs.
    pub fn give_back(&self, queue: usize, ring: RxRing) {
        match (self, ring) {
            (Rings::Guest(shared), RxRing::Guest(ring)) => shared.give_back_tx(queue, ring),
            (Rings::Wire(shared), RxRing::Wire(ring)) => shared.give_back_rx(queue, ring),
            (Rings::Nic(shared), RxRing::Nic(ring)) => shared.give_back_rx(ring),
            // A port's rings are all of its kind.
            _ => {}
        }
    }

    /// The ring that packets of `queue` leave by, if there is one.
    pub fn tx(&self, queue: usize) -> Option<TxRing> {
        match self {
            Rings::Guest(shared) => shared.rx(queue).map(TxRing::Guest),
            Rings::Wire(shared) => shared.tx(queue).map(TxRing::Wire),
            Rings::Nic(shared) => shared.tx(queue).map(TxRing::Nic),
        }
    }

    /// A ring (by its index in vhost-user messages) was found malformed. The kernel's and ours never are.
    pub fn fault(&self, ring: usize, error: RingError) {
        if let Rings::Guest(shared) = self {
            shared.fault(ring, error);
        }
    }
}

/// A ring that packets come by.
pub enum RxRing {
    /// A guest transmits.
    Guest(GuestTx),
    /// A device has received.
    Wire(XdpRx),
    /// A port of a NIC has received.
    Nic(NicRx),
}

impl RxRing {
    /// Unlike that of any other ring.
    pub fn id(&self) -> u64 {
        match self {
            RxRing::Guest(ring) => ring.id(),
            RxRing::Wire(ring) => ring.id(),
            RxRing::Nic(ring) => ring.id(),
        }
    }

    /// Takes up to `max` packets into `burst` and gives their number.
    ///
    /// # Errors
    /// As [`GuestTx::receive`].
    #[inline]
    pub fn receive(&mut self, burst: &mut Burst, max: usize) -> Result<usize, RingError> {
        match self {
            RxRing::Guest(ring) => ring.receive(burst, max),
            RxRing::Wire(ring) => Ok(ring.receive(burst, max)),
            RxRing::Nic(ring) => Ok(ring.receive(burst, max)),
        }
    }

    /// Gives the buffers of `burst` back.
    #[inline]
    pub fn complete(&mut self, burst: &mut Burst) {
        match self {
            RxRing::Guest(ring) => ring.complete(burst),
            RxRing::Wire(ring) => ring.complete(burst),
            RxRing::Nic(ring) => ring.complete(burst),
        }
    }

    /// Whether there is something to receive.
    #[inline(always)]
    pub fn has_pending(&self) -> bool {
        match self {
            RxRing::Guest(ring) => ring.has_pending(),
            RxRing::Wire(ring) => ring.pending() > 0,
            RxRing::Nic(ring) => ring.has_pending(),
        }
    }

    /// Prepares for sleep; whether there is nothing to receive.
    pub fn arm(&mut self) -> bool {
        match self {
            RxRing::Guest(ring) => ring.arm(),
            RxRing::Wire(ring) => ring.arm(),
            RxRing::Nic(ring) => ring.arm(),
        }
    }

    /// Ends what [`arm`](Self::arm) began.
    pub fn disarm(&mut self) {
        match self {
            RxRing::Guest(ring) => ring.disarm(),
            RxRing::Wire(ring) => ring.disarm(),
            RxRing::Nic(ring) => ring.disarm(),
        }
    }

    /// What becomes readable when there is something, if anything does.
    pub fn kick(&self) -> Option<Arc<dyn AsFd>> {
        match self {
            RxRing::Guest(ring) => ring.kick().map(|kick| kick.clone() as Arc<dyn AsFd>),
            RxRing::Wire(ring) => Some(ring.socket().clone()),
            RxRing::Nic(ring) => Some(ring.kick().clone()),
        }
    }
}

/// A ring that packets leave by; other workers have it too.
#[derive(Clone)]
pub enum TxRing {
    /// A guest receives.
    Guest(Arc<GuestRx>),
    /// A device sends.
    Wire(Arc<XdpTx>),
    /// A port of a NIC sends.
    Nic(Arc<NicTx>),
}

impl TxRing {
    /// The virtio features by which is decided what has to be done in software.
    #[inline]
    pub fn features(&self) -> u64 {
        match self {
            TxRing::Guest(ring) => ring.features(),
            TxRing::Wire(ring) => ring.features(),
            TxRing::Nic(ring) => ring.features(),
        }
    }

    /// Whether what the other side takes by its [features](Self::features), it takes of this packet.
    #[inline]
    pub fn does(&self, outgoing: &Outgoing) -> bool {
        match self {
            TxRing::Guest(_) | TxRing::Wire(_) => true,
            TxRing::Nic(ring) => ring.does(outgoing),
        }
    }

    /// Puts frames into the ring, in order, until one does not go in.
    #[inline]
    pub fn send<F: Frames + ?Sized>(&self, frames: &F) -> SendResult {
        match self {
            TxRing::Guest(ring) => ring.send(frames),
            TxRing::Wire(ring) => ring.send(frames),
            TxRing::Nic(ring) => ring.send(frames),
        }
    }

    /// Tells the other side of what was put in; whether it has to be told again, soon.
    pub fn notify(&self) -> bool {
        match self {
            TxRing::Guest(ring) => {
                ring.notify();
                false
            }
            TxRing::Wire(ring) => {
                ring.notify();
                ring.is_waiting()
            }
            TxRing::Nic(ring) => ring.notify(),
        }
    }

    /// Whether the ring takes nothing any more.
    #[cfg(test)]
    pub fn is_stopped(&self) -> bool {
        match self {
            TxRing::Guest(ring) => ring.is_stopped(),
            TxRing::Wire(ring) => ring.is_stopped(),
            TxRing::Nic(ring) => ring.is_stopped(),
        }
    }

    /// Whether both are the same ring.
    pub fn is(&self, other: &TxRing) -> bool {
        match (self, other) {
            (TxRing::Guest(a), TxRing::Guest(b)) => Arc::ptr_eq(a, b),
            (TxRing::Wire(a), TxRing::Wire(b)) => Arc::ptr_eq(a, b),
            (TxRing::Nic(a), TxRing::Nic(b)) => Arc::ptr_eq(a, b),
            _ => false,
        }
    }
}
