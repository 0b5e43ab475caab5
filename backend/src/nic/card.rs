//! An open NIC as the workers share it: its packet I/O under a lock that is held for a burst, and queues of received frames for
//! each port of the switch.
//!
//! Whoever polls a port's queue and finds it empty takes frames from the NIC, for all ports: a frame is dealt to the queue of
//! its port that the device has named, and that queue's worker is woken if it sleeps. So any worker may poll any queue, and nobody
//! waits for the lock in order to receive: who has it receives for all. Sending waits for it, but not for long.

use super::queue::{Inlet, NicRx, Tally, queue, signal, this_thread};
use super::stations::Stations;
use crate::clock;
use crate::frames::outgoing::Outgoing;
use crate::virtio::{Blocked, Frame, Frames, NetHeader, SendResult};
use nic::io::{PacketIo, Port, PortCounters, PortEvent, Received, SendCaps, SendError};
use rustix::fd::OwnedFd;
use std::io;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, TryLockError};
use std::time::Instant;
use switch_core::packet::{Gso, Offload};
use virtio_bindings::virtio_net::{
    VIRTIO_NET_F_GUEST_CSUM, VIRTIO_NET_F_GUEST_ECN, VIRTIO_NET_F_GUEST_TSO4, VIRTIO_NET_F_GUEST_TSO6,
};

/// Frames that are taken from the NIC at a time.
const BUDGET: usize = 64;
/// What a frame is padded to: the shortest of Ethernet (IEEE 802.3, without FCS). Not every device does that itself.
pub(super) const MIN_LEN: usize = 60;
/// How long a sender waits for the lock, once: it is held longer only while a device that was reset is set up again.
const PATIENCE_MICROS: u64 = 20_000;

/// A port of the NIC that is a port of the switch.
struct Lane {
    number: u32,
    /// One for each queue.
    inlets: Vec<Inlet>,
    stations: Stations,
}

impl Lane {
    /// Puts a frame into a queue, or into the first one if there is no such.
    fn put(&mut self, queue: u32, frame: &[u8]) {
        let place = if (queue as usize) < self.inlets.len() { queue as usize } else { 0 };
        if let Some(inlet) = self.inlets.get_mut(place) {
            inlet.put(frame);
        }
    }

    /// The queue whose worker asks, if frames are steered.
    fn own_queue(&self) -> Option<u8> {
        if self.inlets.len() < 2 {
            return None;
        }
        let me = this_thread();
        let place = self.inlets.iter().position(|inlet| inlet.owner.load(Ordering::Relaxed) == me)?;
        u8::try_from(place).ok()
    }
}

/// What a port's driver has counted.
pub(super) struct Stock {
    pub(super) counters: PortCounters,
    /// It counts nothing any more: the device is gone.
    pub(super) is_last: bool,
}

/// What the lock protects.
pub(super) struct Inner {
    pub(super) io: Box<dyn PacketIo>,
    lanes: Vec<Lane>,
    /// For what of a frame is in a guest's memory.
    room: Box<[u8]>,
    /// Something was given to the NIC that it was not told of.
    unflushed: bool,
    /// The NIC interrupts when something happens.
    armed: bool,
    /// Frames that the NIC has forwarded itself, of which it has given us a copy.
    pub(super) forwarded: u64,
    /// Frames of its ports that are no ports of the switch.
    pub(super) unclaimed: u64,
}

impl Inner {
    /// Takes frames from the NIC and deals them to the ports' queues.
    fn pump(&mut self) -> Result<(), nic::io::NicError> {
        let Inner { io, lanes, forwarded, unclaimed, .. } = self;
        let mut deal = |received: Received<'_>| {
            if received.forwarded {
                *forwarded += 1;
            } else if let Some(lane) = lanes.iter_mut().find(|lane| lane.number == received.port) {
                lane.put(received.mark, received.frame);
            } else {
                *unclaimed += 1;
            }
        };
        let result = io.receive(BUDGET, &mut deal);
        // What was taken without an interrupt may have taken the next one away, and drivers that poll ask for none.
        self.armed = false;
        if !matches!(result, Ok(0)) {
            for inlet in self.lanes.iter_mut().flat_map(|lane| &mut lane.inlets) {
                if std::mem::take(&mut inlet.fresh) {
                    inlet.bell.ring();
                }
            }
        }
        result.map(drop)
    }

    /// Asks for an interrupt; `false`: something has happened already.
    fn arm(&mut self) -> Result<bool, nic::io::NicError> {
        if !self.armed {
            self.armed = self.io.arm()?;
        }
        Ok(self.armed)
    }

    /// Wakes the workers that sleep although they have a queue of the NIC: there may be something.
    fn wake(&mut self) {
        self.armed = false;
        self.inlets().for_each(|inlet| inlet.bell.ring());
    }

    fn inlets(&self) -> impl Iterator<Item = &Inlet> {
        self.lanes.iter().flat_map(|lane| &lane.inlets)
    }

    /// Tells the device where frames for the stations behind the switch are to come to, if that has changed.
    fn steer(&mut self, now: Instant) -> Result<(), nic::io::NicError> {
        for Lane { number, inlets, stations } in &mut self.lanes {
            if inlets.len() > 1
                && let Some(rules) = stations.decide(now)
            {
                let taken = self.io.set_steering(*number, &rules)?;
                stations.taken(&rules, taken);
            }
        }
        Ok(())
    }

    /// What control does now and then, and when the NIC has `interrupted`: asks what has happened, and sees to it that nobody
    /// sleeps for an interrupt that was lost.
    pub(super) fn look(
        &mut self,
        interrupted: bool,
        now: Instant,
        events: &mut Vec<PortEvent>,
    ) -> Result<(), nic::io::NicError> {
        self.io.poll_events(events)?;
        self.steer(now)?;
        if events.contains(&PortEvent::Reset) {
            self.armed = false;
        }
        let is_waited_for = self.inlets().any(|inlet| inlet.bell.is_armed());
        if is_waited_for && (interrupted || !self.io.arm()?) {
            self.wake();
        }
        Ok(())
    }

    /// Whether the device takes frames at all. What it says of a frame without bytes tells.
    pub(super) fn is_usable(&mut self) -> bool {
        let Some(number) = self.io.ports().first().map(|port| port.number) else { return false };
        self.io.send(number, &[], &Offload::default()) != Err(SendError::Device)
    }

    fn send(&mut self, number: u32, frame: &Frame<'_>) -> Result<(), Blocked> {
        const PADDING: [u8; MIN_LEN] = [0; MIN_LEN];
        let len = frame.len as usize;
        if len > self.room.len() {
            return Err(Blocked::TooBig);
        }
        let [head, body, rest] = frame.pieces(&mut self.room);
        let pieces = [head, body, rest, &PADDING[..MIN_LEN.saturating_sub(len)]];
        let offload = offload(&frame.header);
        let mut result = self.io.send(number, &pieces, &offload);
        if result == Err(SendError::Full) {
            // It takes up what it has sent when it is told to go on.
            self.io.flush().map_err(|_| Blocked::Stopped)?;
            result = self.io.send(number, &pieces, &offload);
        }
        self.unflushed |= result.is_ok();
        result.map_err(|error| match error {
            SendError::Full => Blocked::Full,
            SendError::LinkDown | SendError::Device | SendError::NoPort => Blocked::Stopped,
            SendError::TooLong | SendError::TooShort | SendError::Offload => Blocked::TooBig,
        })
    }

    /// Has the device send what it was given, and gives what it has sent of a port.
    pub(super) fn stock(&mut self, number: u32) -> Option<Stock> {
        let is_last = self.io.flush().is_err();
        Some(Stock { counters: self.io.counters(number)?, is_last })
    }

    fn flush(&mut self) -> Result<(), nic::io::NicError> {
        if std::mem::take(&mut self.unflushed) { self.io.flush() } else { Ok(()) }
    }
}

/// What is left to be done of a frame whose header was made for a ring with [`NicTx::features`].
fn offload(header: &NetHeader) -> Offload {
    if header.flags & NetHeader::NEEDS_CSUM == 0 {
        return Offload::default();
    }
    let gso = match header.gso_type & !NetHeader::GSO_ECN {
        NetHeader::GSO_TCPV4 => Gso::Tcp4,
        NetHeader::GSO_TCPV6 => Gso::Tcp6,
        NetHeader::GSO_UDP_L4 => Gso::UdpL4,
        _ => Gso::None,
    };
    Offload {
        needs_csum: true,
        csum_valid: false,
        csum_start: header.csum_start,
        csum_offset: header.csum_offset,
        gso,
        ecn: header.gso_type & NetHeader::GSO_ECN != 0,
        gso_size: header.gso_size,
        inner: None,
    }
}

/// The virtio features of a receiver that takes what a device can do.
fn features(send: &SendCaps) -> u64 {
    let of = |can: bool, bits: &[u32]| bits.iter().filter(|_| can).fold(0, |all, bit| all | 1 << bit);
    let tso = send.checksum && send.tso;
    of(send.checksum, &[VIRTIO_NET_F_GUEST_CSUM])
        | of(tso, &[VIRTIO_NET_F_GUEST_TSO4, VIRTIO_NET_F_GUEST_TSO6])
        | of(tso && send.ecn, &[VIRTIO_NET_F_GUEST_ECN])
}

/// A NIC while it is open.
pub(super) struct Card {
    /// `None` once it is closed.
    inner: Mutex<Option<Inner>>,
    /// Somebody has waited for the lock in vain, and it was not free since: nobody else waits.
    stuck: AtomicBool,
    /// Why it is of no use any more.
    failure: OnceLock<String>,
    /// Wakes control.
    control: Arc<OwnedFd>,
}

impl Card {
    /// `control` becomes readable when the NIC is of no use any more.
    pub(super) fn new(io: Box<dyn PacketIo>, control: Arc<OwnedFd>) -> Card {
        let longest = io.ports().iter().map(|port| port.max_frame.max(port.send.max_super)).max();
        let inner = Inner {
            io,
            lanes: Vec::new(),
            room: vec![0; longest.unwrap_or_default().max(MIN_LEN)].into(),
            unflushed: false,
            armed: false,
            forwarded: 0,
            unclaimed: 0,
        };
        Card {
            inner: Mutex::new(Some(inner)),
            stuck: AtomicBool::new(false),
            failure: OnceLock::new(),
            control,
        }
    }

    /// Its inside, for control, which may wait.
    pub(super) fn lock(&self) -> MutexGuard<'_, Option<Inner>> {
        super::lock(&self.inner)
    }

    fn try_lock(&self) -> Option<MutexGuard<'_, Option<Inner>>> {
        match self.inner.try_lock() {
            Ok(guard) => Some(guard),
            Err(TryLockError::Poisoned(poisoned)) => Some(poisoned.into_inner()),
            Err(TryLockError::WouldBlock) => None,
        }
    }

    /// Its inside, for a worker that has something to send.
    fn lock_soon(&self) -> Option<MutexGuard<'_, Option<Inner>>> {
        if let Some(guard) = self.try_lock() {
            self.stuck.store(false, Ordering::Relaxed);
            return Some(guard);
        }
        if self.stuck.load(Ordering::Relaxed) {
            return None;
        }
        let (start, patience) = (clock::cycles(), PATIENCE_MICROS * clock::cycles_per_micro());
        while clock::cycles().wrapping_sub(start) < patience {
            for _ in 0..64 {
                std::hint::spin_loop();
            }
            if let Some(guard) = self.try_lock() {
                return Some(guard);
            }
            // Who has it may have lost its processor.
            std::thread::yield_now();
        }
        self.stuck.store(true, Ordering::Relaxed);
        None
    }

    /// Why it is of no use any more, if that is so.
    pub(super) fn failure(&self) -> Option<&str> {
        self.failure.get().map(String::as_str)
    }

    /// Notes that it is of no use any more, and tells control.
    fn check<T>(&self, result: Result<T, nic::io::NicError>) -> Option<T> {
        match result {
            Ok(value) => Some(value),
            Err(error) => {
                if self.failure.set(error.to_string()).is_ok() {
                    signal(&self.control);
                }
                None
            }
        }
    }

    /// Deals what the NIC has received, unless somebody does so already.
    pub(super) fn pump(&self) {
        if self.failure.get().is_none()
            && let Some(mut guard) = self.try_lock()
            && let Some(inner) = guard.as_mut()
        {
            self.check(inner.pump());
        }
    }

    /// Deals what the NIC has received, and asks for an interrupt. Whether nothing has happened since: an interrupt will tell, or
    /// nothing will ever happen. False too if somebody else has the NIC now.
    pub(super) fn arm(&self) -> bool {
        if self.failure.get().is_some() {
            return true;
        }
        let Some(mut guard) = self.try_lock() else { return false };
        let Some(inner) = guard.as_mut() else { return true };
        self.check(inner.pump().and_then(|()| inner.arm())).unwrap_or(true)
    }

    /// Opens queues for port `number`, as many as the device has, but no more than `most`: frames of at most `longest` bytes.
    pub(super) fn open_queues(
        self: &Arc<Self>,
        number: u32,
        most: usize,
        longest: usize,
        tally: &Arc<Tally>,
    ) -> io::Result<Vec<NicRx>> {
        let has = self.lock().as_ref().map_or(1, |inner| inner.io.queues().into());
        let queues = (0..most.min(has).max(1)).map(|_| queue(self, longest, tally));
        let (inlets, queues) = queues.collect::<io::Result<Vec<_>>>()?.into_iter().unzip();
        if let Some(inner) = self.lock().as_mut() {
            inner.lanes.push(Lane { number, inlets, stations: Stations::default() });
        }
        Ok(queues)
    }

    /// Puts nothing into the queues of port `number` any more.
    pub(super) fn close_queues(&self, number: u32) {
        if let Some(inner) = self.lock().as_mut() {
            inner.lanes.retain(|lane| lane.number != number);
        }
    }
}

/// The send side of a port of a NIC, shared by all workers.
pub struct NicTx {
    card: Arc<Card>,
    /// As it was when it was opened. A device that can do something else after a reset is opened anew.
    port: Port,
    features: u64,
    tally: Arc<Tally>,
}

impl NicTx {
    pub(super) fn new(card: &Arc<Card>, port: &Port, tally: &Arc<Tally>) -> NicTx {
        let features = features(&port.send);
        NicTx { card: card.clone(), port: port.clone(), features, tally: tally.clone() }
    }

    /// The virtio features of a receiver that takes what the device can do: which checksums it completes and what it segments,
    /// if it [does](Self::does) so for the packet.
    pub fn features(&self) -> u64 {
        self.features
    }

    /// Whether the device does for this packet what is left to be done: it has limits of its own, and wants to find the headers.
    pub fn does(&self, outgoing: &Outgoing) -> bool {
        let (offload, len) = (outgoing.offload(), outgoing.frame_len() as usize);
        self.port.does(&offload, &[outgoing.packet.head()], len)
    }

    /// Gives frames to the NIC, in order, until it does not take one. They leave when it is [notified](Self::notify).
    pub fn send<F: Frames + ?Sized>(&self, frames: &F) -> SendResult {
        let stopped = SendResult { sent: 0, blocked: Some(Blocked::Stopped) };
        if self.card.failure.get().is_some() {
            return stopped;
        }
        let Some(mut guard) = self.card.lock_soon() else {
            return SendResult { sent: 0, blocked: Some(Blocked::Full) };
        };
        let Some(inner) = guard.as_mut() else { return stopped };
        let count = frames.count();
        let mut blocked = None;
        let lane = inner.lanes.iter().position(|lane| lane.number == self.port.number);
        let own = lane.and_then(|lane| Some((lane, inner.lanes.get(lane)?.own_queue()?)));
        let sent = (0..count).find(|&i| {
            let frame = frames.frame(i);
            blocked = inner.send(self.port.number, &frame).err();
            if blocked.is_none()
                && let Some((lane, queue)) = own
                && let Some(lane) = inner.lanes.get_mut(lane)
                && let Some(&mac) = frame.head.get(6..).and_then(|rest| rest.first_chunk())
            {
                lane.stations.note(mac, queue);
            }
            blocked.is_some()
        });
        let sent = sent.unwrap_or(count);
        self.tally.taken.fetch_add(sent as u64, Ordering::Relaxed);
        SendResult { sent, blocked }
    }

    /// Lets the NIC send what it was given. Whether that has to be done again, soon.
    pub fn notify(&self) -> bool {
        let Some(mut guard) = self.card.lock_soon() else {
            return true;
        };
        if let Some(inner) = guard.as_mut().filter(|_| self.card.failure.get().is_none()) {
            self.card.check(inner.flush());
        }
        false
    }

    /// Whether it takes nothing any more.
    pub fn is_stopped(&self) -> bool {
        self.card.failure.get().is_some()
    }
}
