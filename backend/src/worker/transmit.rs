//! Sending: batches into receive rings, packets that wait there for room, and what a guest cannot take as it is.

use super::io::Io;
use super::port::{MAX_PARKED, Parked, TxQueue};
use super::rings::{Rings, TxRing};
use crate::counters::PortCounters;
use crate::frames::outgoing::{Batch, Outgoing, Ready, Tail};
use crate::frames::pool::Pool;
use crate::frames::software;
use crate::host::path::HeldPacket;
use crate::vhost::rx_ring;
use crate::virtio::{Blocked, Frame, NetHeader};
use std::collections::VecDeque;
use switch_core::drop::DropReason;
use switch_core::packet::MAX_SNAPSHOT;

impl Io {
    /// Hands a batch to a ring, in order: whole where the guest takes it so, in software what it cannot. What finds no room
    /// waits.
    pub(super) fn deliver<B: Batch>(&mut self, slot: u16, queue: u8, batch: &B) {
        let Some(port) = self.ports[slot as usize].as_deref_mut() else { return };
        let counters = &*port.counters;
        let TxQueue { ring, parked, notify } = &mut port.tx[queue as usize];
        let Some(ring) = ring else {
            return counters.tx_drops.add(DropReason::LinkDown, batch.count() as u64);
        };
        if !*notify {
            *notify = true;
            self.due.push((slot, queue));
        }
        let before = parked.len();
        let mut lane = Lane {
            ring,
            features: ring.features(),
            parked,
            pool: &mut self.pool,
            deadline: self.now_cycles + self.patience,
            counters,
            rings: &port.rings,
            queue: queue as usize,
        };
        let (mut at, count, plain) = (0, batch.count(), batch.is_plain());
        while at < count {
            at += if !plain && !lane.accepts(&batch.outgoing(at)) {
                // In pieces or whole, it keeps its place in the order.
                let sent =
                    self.software.send(&batch.outgoing(at), |frame, counts| lane.send_made(frame, counts));
                if let Err(reason) = sent {
                    counters.tx_drops.count(reason);
                }
                1
            } else if lane.parked.is_empty() {
                let end = match plain {
                    true => count,
                    false => (at..count).find(|&i| !lane.accepts(&batch.outgoing(i))).unwrap_or(count),
                };
                lane.send(batch, at, end)
            } else {
                lane.park(&batch.outgoing(at));
                1
            };
        }
        self.parked += parked.len() - before;
    }

    /// Tries the packets that wait for room again, and gives up those that have waited long enough.
    pub fn retry_parked(&mut self) -> bool {
        if self.parked == 0 {
            return false;
        }
        let (now, mut progress) = (self.now_cycles, false);
        for (slot, port) in self.ports[..self.used_slots].iter_mut().enumerate() {
            let Some(port) = port.as_deref_mut() else { continue };
            for (queue, tx) in port.tx.iter_mut().enumerate() {
                let mut full = false;
                while let Some(first) = tx.parked.front() {
                    let Parked { held, max_len, deadline, counts } = first;
                    let tail = Tail::Private(&held.tail[..held.packet.tail_len() as usize]);
                    let outgoing = Outgoing { packet: &held.packet, tail, max_len: *max_len };
                    // A ring that had no room for the one before has none for this: it is not asked again.
                    let blocked = match &tx.ring {
                        Some(_) if full => Some(Blocked::Full),
                        Some(ring) => ring.send(&[outgoing.frame(ring.features())]).blocked,
                        None => Some(Blocked::Stopped),
                    };
                    let reason = match blocked {
                        None => None,
                        Some(Blocked::Full) if now < *deadline => break,
                        Some(blocked) => {
                            full = blocked == Blocked::Full;
                            Some(lost(blocked, queue, &port.rings, &port.counters))
                        }
                    };
                    match reason {
                        Some(reason) => port.counters.tx_drops.add(reason, *counts as u64),
                        None => {
                            port.counters.tx_packets.add(*counts as u64);
                            port.counters.tx_bytes.add(outgoing.frame_len() as u64);
                        }
                    }
                    if reason.is_none() && !tx.notify {
                        tx.notify = true;
                        self.due.push((slot as u16, queue as u8));
                    }
                    if let Some(parked) = tx.parked.pop_front() {
                        self.pool.put(parked.held);
                        self.parked -= 1;
                        progress = true;
                    }
                }
            }
        }
        progress
    }

    /// Notifies those that got something, once each. A device that has not taken all is told again after a while.
    pub fn notify_guests(&mut self) {
        if !self.unsent.is_empty() && self.now_cycles >= self.again {
            // None of them is among those due: what is to be notified anyway is not added.
            self.due.append(&mut self.unsent);
        }
        if self.due.is_empty() {
            return;
        }
        for (slot, queue) in self.due.drain(..) {
            let Some(port) = self.ports[slot as usize].as_deref_mut() else { continue };
            let Some(tx) = port.tx.get_mut(queue as usize) else { continue };
            tx.notify = tx.ring.as_ref().is_some_and(TxRing::notify);
            if tx.notify {
                self.unsent.push((slot, queue));
                self.again = self.now_cycles + self.patience;
            }
        }
    }
}

/// Why a packet did not go into a ring for good; a malformed ring is reported, once.
fn lost(blocked: Blocked, queue: usize, rings: &Rings, counters: &PortCounters) -> DropReason {
    match blocked {
        Blocked::Full => DropReason::RxRingFull,
        Blocked::TooBig => DropReason::RxBufferSmall,
        Blocked::Stopped => DropReason::LinkDown,
        Blocked::Fault(fault) => {
            counters.ring_faults.add(1);
            rings.fault(rx_ring(queue), fault);
            DropReason::RxRingFault
        }
    }
}

/// The way into one receive ring: the ring while it has room, the queue of parked packets from then on.
struct Lane<'a> {
    ring: &'a TxRing,
    /// What the ring's other side takes as it is.
    features: u64,
    parked: &'a mut VecDeque<Parked>,
    pool: &'a mut Pool,
    deadline: u64,
    counters: &'a PortCounters,
    rings: &'a Rings,
    queue: usize,
}

impl Lane<'_> {
    /// Whether the guest, or the device, takes the packet as it is.
    fn accepts(&self, outgoing: &Outgoing) -> bool {
        software::is_accepted(outgoing, self.features) && self.ring.does(outgoing)
    }

    /// Sends packets `from` to `end` of a batch, which the guest takes as they are. Gives the number of those that are done
    /// with.
    #[inline(always)]
    fn send<B: Batch>(&mut self, batch: &B, from: usize, end: usize) -> usize {
        let ready = Ready { batch, from, count: end - from, features: self.features };
        let result = self.ring.send(&ready);
        let sent = result.sent;
        self.counters.tx_packets.add(sent as u64);
        self.counters.tx_bytes.add((from..from + sent).map(|i| batch.len(i) as u64).sum());
        match result.blocked {
            None => sent,
            Some(Blocked::Full) => {
                self.park(&batch.outgoing(from + sent));
                sent + 1
            }
            Some(blocked) => {
                let reason = lost(blocked, self.queue, self.rings, self.counters);
                self.counters.tx_drops.count(reason);
                sent + 1
            }
        }
    }

    /// Sends one frame that was made in software. `counts`: it stands for its packet in the counters.
    fn send_made(&mut self, frame: &[u8], counts: bool) {
        if self.parked.is_empty() {
            let len = frame.len() as u32;
            let header = NetHeader::default();
            let out = Frame { header, head: frame, body: &[], tail: &[], tail_offset: 0, len };
            match self.ring.send(&[out]).blocked {
                None => {
                    self.counters.tx_packets.add(counts as u64);
                    self.counters.tx_bytes.add(frame.len() as u64);
                    return;
                }
                Some(Blocked::Full) => {}
                Some(blocked) => {
                    let reason = lost(blocked, self.queue, self.rings, self.counters);
                    return self.counters.tx_drops.add(reason, counts as u64);
                }
            }
        }
        let Some(mut held) = self.place(frame.len().saturating_sub(MAX_SNAPSHOT)) else {
            return self.counters.tx_drops.add(DropReason::RxRingFull, counts as u64);
        };
        let in_port = held.packet.in_port;
        let head = held.packet.reset(in_port, frame.len() as u32, MAX_SNAPSHOT);
        let n = head.len();
        head.copy_from_slice(&frame[..n]);
        held.tail[..frame.len() - n].copy_from_slice(&frame[n..]);
        self.wait(held, u32::MAX, counts);
    }

    /// Puts a packet aside that the guest takes as it is.
    fn park(&mut self, outgoing: &Outgoing) {
        let tail_len = outgoing.packet.tail_len() as usize;
        let Some(mut held) = self.place(tail_len) else {
            return self.counters.tx_drops.count(DropReason::RxRingFull);
        };
        held.packet.copy_from(outgoing.packet);
        outgoing.copy_from(outgoing.packet.head().len(), &mut held.tail[..tail_len]);
        self.wait(held, outgoing.max_len, true);
    }

    fn place(&mut self, tail_len: usize) -> Option<Box<HeldPacket>> {
        if self.parked.len() < MAX_PARKED { self.pool.take(tail_len) } else { None }
    }

    fn wait(&mut self, held: Box<HeldPacket>, max_len: u32, counts: bool) {
        self.parked.push_back(Parked { held, max_len, deadline: self.deadline, counts });
    }
}
