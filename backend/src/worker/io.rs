//! A worker's ports and buffers, and everything that leaves by them.

use super::MAX_PORTS;
use super::handover::Leaving;
use super::kicks::Kicks;
use super::port::WorkerPort;
use super::rings::RxRing;
use crate::frames::outgoing;
use crate::frames::pool::Pool;
use crate::frames::software::Software;
use crate::host::path::HeldPacket;
use crate::port_config::MAX_QUEUES;
use crate::wake::Waker;
use rtrb::Producer;
use std::sync::Arc;
use switch_core::drop::DropReason;
use switch_core::packet::{Packet, PortId};

/// Ports, buffers, and what is on its way out. How packets are sent is in [`super::transmit`], how they go to the host
/// and what its answers do in [`super::upcall`].
pub struct Io {
    /// Ports by slot.
    pub ports: Vec<Option<Box<WorkerPort>>>,
    /// Slots that may have a port: none has from this one on.
    pub(super) used_slots: usize,
    /// Free buffers.
    pub pool: Pool,
    /// Milliseconds.
    pub now: u64,
    /// Cycles.
    pub now_cycles: u64,
    /// How long a packet waits for room in a receive ring, in cycles.
    pub(super) patience: u64,
    /// Rings whose other side is to be notified at the round's end.
    pub(super) due: Vec<(u16, u8)>,
    /// Rings of wires that have not taken all; they are notified again when this time has come, in cycles.
    pub(super) unsent: Vec<(u16, u8)>,
    pub(super) again: u64,
    /// Packets that wait for room, over all rings.
    pub(super) parked: usize,
    pub(super) software: Software,
    pub(super) to_host: Producer<Box<HeldPacket>>,
    pub(super) host: Arc<Waker>,
    pub(super) host_due: bool,
    /// Buffers of the host path were given back in this round.
    pub(super) host_buffers_due: bool,
    /// A queue that another worker is to poll.
    pub(super) leaving: Option<Leaving>,
    /// The dice for what the host's answers sample (xorshift32, never 0).
    pub(super) random: u32,
    /// What wakes the worker.
    pub kicks: Kicks,
}

impl Io {
    /// All the memory that the worker will need.
    pub fn new(
        patience_cycles: u64,
        to_host: Producer<Box<HeldPacket>>,
        host: Arc<Waker>,
        kicks: Kicks,
    ) -> Io {
        Io {
            ports: (0..MAX_PORTS).map(|_| None).collect(),
            used_slots: 0,
            pool: Pool::default(),
            now: 0,
            now_cycles: 0,
            patience: patience_cycles,
            due: Vec::with_capacity(MAX_PORTS * MAX_QUEUES as usize),
            unsent: Vec::with_capacity(MAX_PORTS * MAX_QUEUES as usize),
            again: 0,
            parked: 0,
            software: Software::default(),
            to_host,
            host,
            host_due: false,
            host_buffers_due: false,
            leaving: None,
            random: crate::clock::cycles() as u32 | 1,
            kicks,
        }
    }

    /// The port, unless another has taken its slot.
    #[inline]
    pub fn port(&mut self, id: PortId) -> Option<&mut WorkerPort> {
        self.ports.get_mut(id.slot as usize)?.as_deref_mut().filter(|port| port.id == id)
    }

    /// Adds a port to its slot, which is free; gives it back if it is not.
    pub fn add_port(&mut self, port: Box<WorkerPort>) -> Option<Box<WorkerPort>> {
        let slot = port.id.slot as usize;
        match self.ports.get_mut(slot) {
            Some(place) if place.is_none() => *place = Some(port),
            _ => return Some(port),
        }
        self.used_slots = self.used_slots.max(slot + 1);
        self.refresh_port(slot);
        None
    }

    /// Takes a port out, and drops what waits for room in its rings.
    pub fn remove_port(&mut self, id: PortId) -> Option<Box<WorkerPort>> {
        let place = self.ports.get_mut(id.slot as usize)?;
        let mut port = place.take_if(|port| port.id == id)?;
        self.used_slots = self.ports.iter().rposition(Option::is_some).map_or(0, |last| last + 1);
        self.leaving.take_if(|leaving| leaving.port == id);
        for kick in port.queues().filter_map(|rx| rx.ring.as_ref()?.kick()) {
            self.kicks.unwatch(&*kick);
        }
        for tx in &mut port.tx {
            self.parked -= tx.drop_parked(&port.counters, &mut self.pool);
        }
        self.unsent.retain(|(slot, _)| u32::from(*slot) != id.slot);
        Some(port)
    }

    /// Reads all ports' rings again: some have started, stopped or moved.
    pub fn refresh(&mut self) {
        for slot in 0..self.used_slots {
            self.refresh_port(slot);
        }
    }

    pub(super) fn refresh_port(&mut self, slot: usize) {
        let Some(port) = self.ports[slot].as_deref_mut() else { return };
        for rx in port.rx.iter_mut().chain(&mut port.resting) {
            let id = |ring: &Option<RxRing>| ring.as_ref().map(RxRing::id);
            let (before, kick) = (id(&rx.ring), rx.ring.as_ref().and_then(RxRing::kick));
            port.rings.take_rx(rx.index, &mut rx.ring);
            if id(&rx.ring) == before {
                continue;
            }
            if let Some(kick) = kick {
                self.kicks.unwatch(&*kick);
            }
            if let Some(kick) = rx.ring.as_ref().and_then(RxRing::kick) {
                self.kicks.watch(&*kick, &port.name);
            }
        }
        for (queue, tx) in port.tx.iter_mut().enumerate() {
            let ring = port.rings.tx(queue);
            let same = match (&ring, &tx.ring) {
                (Some(new), Some(old)) => new.is(old),
                (None, None) => true,
                _ => false,
            };
            if !same {
                // They were made ready for another driver, or for what this one had negotiated then.
                self.parked -= tx.drop_parked(&port.counters, &mut self.pool);
                tx.ring = ring;
            }
        }
        port.tx_active = port.tx.iter().take_while(|tx| tx.ring.is_some()).count();
    }

    /// Lets go of every ring.
    pub fn release_rings(&mut self) {
        for port in self.ports.iter_mut().flatten() {
            port.rx.iter_mut().chain(&mut port.resting).for_each(|rx| rx.ring = None);
            port.tx.iter_mut().for_each(|tx| tx.ring = None);
        }
    }

    /// Whether something here will need attention at once, without anybody waking us.
    pub fn is_waiting(&self) -> bool {
        self.parked > 0 || self.leaving.is_some()
    }

    /// How long a sleep may be, in milliseconds: a device that has not taken all is tried again. `None`: for ever.
    pub fn wake_after(&self) -> Option<i32> {
        (!self.unsent.is_empty()).then_some(1)
    }

    /// Asks to be woken by all rings; whether they are still empty.
    pub fn arm(&mut self) -> bool {
        let mut rings =
            self.ports.iter_mut().flatten().flat_map(|p| &mut p.rx).filter_map(|rx| rx.ring.as_mut());
        rings.all(|ring| ring.arm())
    }

    /// Ends what [`Io::arm`] began.
    pub fn disarm(&mut self) {
        for port in self.ports.iter_mut().flatten() {
            for ring in port.rx.iter_mut().filter_map(|rx| rx.ring.as_mut()) {
                ring.disarm();
            }
        }
    }

    /// The receive ring of `id` for this packet, if the packet may go there now.
    #[inline]
    pub(super) fn route(
        &mut self,
        packet: &Packet,
        id: PortId,
        max_len: u32,
    ) -> Result<(u16, u8), DropReason> {
        let Some(port) = self.port(id) else { return Err(DropReason::NoPort) };
        if port.tx_active == 0 {
            return Err(DropReason::LinkDown);
        }
        if outgoing::exceeds(packet, max_len, port.mtu) {
            return Err(DropReason::Mtu);
        }
        let queue = match port.tx_active {
            1 => 0,
            active => port.steering.queue(packet.flow_hash(), active),
        };
        Ok((id.slot as u16, queue as u8))
    }

    /// Counts a copy that could not be sent, at the port it was for, or at its origin if that port is gone.
    pub(super) fn drop_copy(&mut self, to: PortId, from: PortId, reason: DropReason) {
        let id = if self.port(to).is_some() { to } else { from };
        if let Some(port) = self.port(id) {
            port.counters.tx_drops.count(reason);
        }
    }
}
