//! The way to the host and back: packets go up within their port's budgets, and the host's answers are carried out.

use super::io::Io;
use crate::frames::outgoing::{Outgoing, Tail};
use crate::frames::pool::is_large;
use crate::host::Decision;
use crate::host::path::{Budget, HeldPacket};
use switch_core::compile::Plan;
use switch_core::drop::DropReason;
use switch_core::exec::{Env, Metadata, Scratch, Verdict, execute};
use switch_core::packet::{Offload, Packet, PortId};
use switch_core::segment;

impl Io {
    /// Whether [`Io::send_up`] would take a packet now, of the port in that slot and with so long a tail, that is not limited in rate.
    pub(super) fn has_room(&self, slot: usize, tail_len: usize, why: Budget) -> bool {
        let port = self.ports[slot].as_deref();
        port.is_some_and(|port| port.has_room(why, is_large(tail_len))) && self.pool.has(tail_len)
    }

    /// Sends a packet up as received, by that queue pair and with this offload state, within its port's budgets.
    pub(super) fn send_up(
        &mut self,
        packet: &Packet,
        queue: usize,
        offload: Offload,
        tail: Tail,
        why: Budget,
    ) {
        let now = self.now;
        let Some(port) = self.ports[packet.in_port.slot as usize].as_deref_mut() else { return };
        let tail_len = packet.tail_len() as usize;
        let large = is_large(tail_len);
        // The host cuts what misses into its segments, and asks about each.
        let frames = segment::count(packet.len as usize, &packet.layout, &offload) as u32;
        let drop = if why == Budget::Miss && !port.misses.allow(now, frames) {
            Some(DropReason::MissRate)
        } else if !port.reserve(why, large) {
            Some(DropReason::HostQueueFull)
        } else {
            None
        };
        if let Some(reason) = drop {
            port.counters.rx_drops.count(reason);
            return;
        }
        let Some(mut held) = self.pool.take(tail_len) else {
            port.release(why, large);
            port.counters.rx_drops.count(DropReason::NoBuffer);
            return;
        };
        held.packet.copy_from(packet);
        held.packet.offload = offload;
        (held.budget, held.queue) = (why, queue as u8);
        let outgoing = Outgoing { packet, tail, max_len: u32::MAX };
        outgoing.copy_from(packet.head().len(), &mut held.tail[..tail_len]);
        match self.to_host.push(held) {
            Ok(()) => {
                port.counters.rx_to_host.add(1);
                self.host_due = true;
            }
            Err(rtrb::PushError::Full(held)) => {
                port.release(why, large);
                port.counters.rx_drops.count(DropReason::HostQueueFull);
                self.pool.put(held);
            }
        }
    }

    /// Wakes the host path if something went up in this round, or if it waits for buffers that it gets back now.
    pub fn wake_host(&mut self) {
        let buffers = std::mem::take(&mut self.host_buffers_due);
        if std::mem::take(&mut self.host_due) {
            self.host.wake();
        } else if buffers {
            self.host.wake_if_short();
        }
    }

    /// Gives a guest what was read from its port's representor, without a lookup; or counts why it cannot have it. What is
    /// for a port that is gone goes nowhere. Gives the port.
    pub fn deliver_down(&mut self, held: &HeldPacket) -> PortId {
        let HeldPacket { packet, tail, answer, .. } = held;
        let to = packet.in_port;
        let Some(port) = self.port(to) else { return to };
        port.counters.host_copies.add(1);
        let route = match answer {
            Some(Decision::Drop(reason)) => Err(*reason),
            _ => self.route(packet, to, u32::MAX),
        };
        match route {
            Ok((slot, queue)) => {
                let tail = Tail::Private(&tail[..packet.tail_len() as usize]);
                self.deliver(slot, queue, &Outgoing { packet, tail, max_len: u32::MAX });
            }
            Err(reason) => self.drop_copy(to, to, reason),
        }
        to
    }

    /// Carries out the host's answer about a packet and takes its buffer back. Gives the port and the queue pair that it came
    /// by. What was sent by a port that is gone since goes nowhere: there is nobody left to count it for.
    pub fn host_answer(&mut self, mut held: Box<HeldPacket>, scratch: &mut Scratch) -> (PortId, usize) {
        let (in_port, queue) = (held.packet.in_port, usize::from(held.queue));
        if self.port(in_port).is_some() {
            let HeldPacket { packet, tail, answer, .. } = &mut *held;
            let dropped = match answer {
                Some(Decision::Execute(plan)) => {
                    let tail = Tail::Private(&tail[..packet.tail_len() as usize]);
                    let mut env = HeldEnv { io: self, in_port, tail };
                    match execute(plan, packet, scratch, &mut env) {
                        Verdict::Done => None,
                        Verdict::Dropped(reason) => Some(reason),
                        Verdict::Unresolved => Some(DropReason::HostDrop),
                    }
                }
                Some(Decision::Drop(reason)) => Some(*reason),
                Some(Decision::Taken) => None,
                None => Some(DropReason::HostDrop),
            };
            if let Some(port) = self.port(in_port) {
                if let Some(reason) = dropped {
                    port.counters.host_drops.count(reason);
                }
                port.release(held.budget, is_large(held.tail.len()));
            }
        }
        self.pool.put(held);
        (in_port, queue)
    }
}

/// Surroundings of a packet that the host has answered about.
struct HeldEnv<'a> {
    io: &'a mut Io,
    in_port: PortId,
    tail: Tail<'a>,
}

impl<'p> Env<'p> for HeldEnv<'_> {
    fn output(&mut self, packet: &mut Packet, port: PortId, max_len: u32, _: bool) {
        if let Some(origin) = self.io.port(self.in_port) {
            origin.counters.host_copies.add(1);
        }
        match self.io.route(packet, port, max_len) {
            Ok((slot, queue)) => self.io.deliver(slot, queue, &Outgoing { packet, tail: self.tail, max_len }),
            Err(reason) => self.io.drop_copy(port, self.in_port, reason),
        }
    }

    /// The host's answers are complete: they name no further stage.
    fn recirculate(&mut self, _: &mut Packet, _: &Metadata) -> Option<&'p Plan> {
        None
    }

    fn random(&mut self) -> u32 {
        // xorshift32 (Marsaglia 2003): spreads samples, guards nothing.
        let random = &mut self.io.random;
        *random ^= *random << 13;
        *random ^= *random >> 17;
        *random ^= *random << 5;
        *random
    }
}
