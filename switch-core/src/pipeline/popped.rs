//! Packets of tunnels: those whose flow decapsulates them are taken out of their outer headers, and go on as packets that the
//! tunnel's port has got.
//!
//! The outer flow decides first, and is found like any other. What is found is remembered for the packets to come, by the L1 key of
//! the outer packet: so of a packet whose flows are known L1 is asked once, about what is inside. A port is looked at in this way from
//! its first such packet on, and until it has had none for a while; others pay nothing.
//!
//! A packet inside a tunnel that is itself for a tunnel of ours is not decapsulated again: it is a punt. And whatever of these packets
//! goes to the host goes as it was received, by the port by which it was.

use super::{Egress, Found, Upcall};
use crate::drop::DropReason;
use crate::flow::FlowRef;
use crate::l1::L1Key;
use crate::l2::{BURST, bits};
use crate::packet::{Packet, PortId};
use crate::slab::Slots;
use crate::tunnel::{Decap, Imprint, Taken, TunnelKey, Varying};

/// Flows that are remembered, for all ports together.
const KNOWN: usize = 256;
/// Imprints that are remembered, likewise.
const PRINTS: usize = 1024;
/// Bursts without a packet of a tunnel after which a port is no longer looked at.
pub const LOOKOUT: u16 = 1000;

/// A flow that decapsulates, by the key of a packet that it was found for.
#[derive(Clone, Copy, Default)]
struct Known {
    key: L1Key,
    /// Of the port's entries in L1 when it was found: a key says no more than those do.
    generation: u32,
    flow: FlowRef,
}

/// What a known flow's packets of one tunnel have in common.
#[derive(Clone, Copy)]
struct Print {
    imprint: Imprint,
    /// Port by which they come, and as in [`Known`].
    in_port: PortId,
    generation: u32,
    flow: FlowRef,
    /// Of the last packet whose number was looked for.
    numbered: Numbered,
}

/// The [number](crate::l1::Numbers) of a packet's outer headers.
#[derive(Clone, Copy, Default)]
struct Numbered {
    number: u64,
    /// Of the entries in L1 of the port inside, which have it: 0 if there is no number.
    generation: u32,
    /// The source port, and whether it makes no difference.
    port: u16,
    any_port: bool,
    options: u64,
}

impl Numbered {
    /// Whether it is that of the headers of which this was found, too.
    #[inline(always)]
    fn is_of(&self, found: Varying) -> bool {
        self.options == found.options && (self.any_port || self.port == found.port)
    }
}

/// A packet out of a tunnel.
#[derive(Clone, Copy)]
struct Lane {
    /// Its outer flow.
    flow: FlowRef,
    /// Place of the print by which it was recognized.
    print: Option<u16>,
    /// What it was.
    taken: Taken,
}

/// The packets of a burst that were decapsulated, and outer flows that are known.
pub struct Popped {
    /// The packets, as bits.
    pub packets: u64,
    /// Of each packet, what flows match of its outer headers.
    pub tunnels: [TunnelKey; BURST],
    /// Of each packet, the number of its outer headers, if it is known, and the generation of entries that have it; else 0.
    pub numbers: [(u64, u32); BURST],
    /// The port by which the first of them has come inside its tunnel, and whether others have come by others.
    first_port: PortId,
    is_mixed: bool,
    lanes: [Option<Lane>; BURST],
    known: Box<[Known]>,
    prints: Box<[Option<Print>]>,
}

impl Default for Popped {
    fn default() -> Popped {
        Popped {
            packets: 0,
            tunnels: [TunnelKey::default(); BURST],
            numbers: [(0, 0); BURST],
            first_port: PortId { slot: 0, generation: 0 },
            is_mixed: false,
            lanes: [None; BURST],
            known: vec![Known::default(); KNOWN].into(),
            prints: vec![None; PRINTS].into(),
        }
    }
}

impl Popped {
    /// What it takes, in bytes.
    pub fn bytes(&self) -> usize {
        size_of::<Popped>() + size_of_val(&*self.known) + size_of_val(&*self.prints)
    }

    /// The flow that is known to decapsulate packets of a key of this hash.
    #[inline]
    pub fn known(&self, hash: u64, generation: u32) -> Option<(&L1Key, FlowRef)> {
        let known = &self.known[hash as usize % KNOWN];
        (known.generation == generation && known.key.hash() == hash).then_some((&known.key, known.flow))
    }

    /// Remembers it.
    pub fn remember(&mut self, key: &L1Key, generation: u32, flow: FlowRef) {
        self.known[key.hash() as usize % KNOWN] = Known { key: *key, generation, flow };
    }

    /// Of a packet of a known tunnel its flow, what is known of it and where that is, and what is not.
    #[inline(always)]
    pub fn recognize(&self, packet: &Packet, generation: u32) -> Option<(FlowRef, &Imprint, usize, Varying)> {
        let at = place(packet);
        let print = self.prints[at].as_ref()?;
        if (print.generation, print.in_port) != (generation, packet.in_port) {
            return None;
        }
        Some((print.flow, &print.imprint, at, print.imprint.find(packet)?))
    }

    /// Remembers what is to be compared.
    pub fn imprint(&mut self, packet: &Packet, generation: u32, flow: FlowRef, imprint: Imprint) {
        let (in_port, numbered) = (packet.in_port, Numbered::default());
        self.prints[place(packet)] = Some(Print { imprint, in_port, generation, flow, numbered });
    }

    /// Takes packet `i` out of its outer headers, as its flow has it.
    #[inline]
    pub fn pop(&mut self, i: usize, packet: &mut Packet, flow: FlowRef, decap: &Decap) {
        self.tunnels[i % BURST] = decap.tunnel;
        self.numbers[i % BURST] = (0, 0);
        self.lanes[i % BURST] = Some(Lane { flow, print: None, taken: decap.pop(packet) });
        self.add(i, decap.in_port);
    }

    /// The same for one that was recognized by the print at this place, where that still is.
    #[inline(always)]
    pub fn pop_known(&mut self, i: usize, packet: &mut Packet, at: usize, found: Varying) -> bool {
        let Some(Print { imprint, flow, numbered, .. }) = &self.prints[at % PRINTS] else { return false };
        self.tunnels[i % BURST] = imprint.tunnel_of(found);
        self.numbers[i % BURST] =
            if numbered.is_of(found) { (numbered.number, numbered.generation) } else { (0, 0) };
        let lane = Lane { flow: *flow, print: Some(at as u16), taken: imprint.pop(packet) };
        self.lanes[i % BURST] = Some(lane);
        self.add(i, packet.in_port);
        true
    }

    #[inline(always)]
    fn add(&mut self, i: usize, in_port: PortId) {
        match self.packets {
            0 => (self.first_port, self.is_mixed) = (in_port, false),
            _ => self.is_mixed |= self.first_port != in_port,
        }
        self.packets |= 1 << (i % BURST);
    }

    /// Remembers the numbers of the outer headers of these packets, of this generation, for others that are recognized by the same prints.
    #[cold]
    pub fn learn(&mut self, packets: u64, numbers: &[u64; BURST], generation: u32, any_port: bool) {
        for i in bits(packets) {
            let TunnelKey { ports: (port, _), options, .. } = self.tunnels[i];
            if let Some(Lane { print: Some(at), .. }) = self.lanes[i]
                && let Some(Some(print)) = self.prints.get_mut(usize::from(at))
                // There may be another by now.
                && print.imprint.tunnel_of(Varying { port, options }) == self.tunnels[i]
                && print.imprint.in_port == self.first_port
            {
                print.numbered = Numbered { number: numbers[i], generation, port, any_port, options };
            }
        }
    }

    /// Those of `left` that have come by the same tunnel's port as the first of them, and that port.
    #[inline(always)]
    pub fn group(&mut self, left: u64, packets: &[Packet]) -> Option<(u64, PortId)> {
        if left == 0 {
            return None;
        }
        if !self.is_mixed {
            return Some((left, self.first_port));
        }
        let in_port = packets.get(left.trailing_zeros() as usize)?.in_port;
        self.first_port = in_port;
        let of_port = |i: &usize| packets.get(*i).is_some_and(|packet| packet.in_port == in_port);
        Some((bits(left).filter(of_port).fold(0, |group, i| group | 1 << i), in_port))
    }

    /// The surroundings of the packets inside, their outer headers, and what numbers of those are known.
    #[inline(always)]
    pub fn inside<'a, E>(
        &'a self,
        egress: &'a mut E,
    ) -> (Inside<'a, E>, &'a [TunnelKey; BURST], &'a [(u64, u32); BURST]) {
        (Inside { egress, lanes: &self.lanes, ends: Ends::default() }, &self.tunnels, &self.numbers)
    }

    /// Counts the outer flows of some packets, now that it is known how these have ended.
    pub fn credit(&self, group: u64, ends: Ends, slots: &Slots, now: u64) {
        // Mostly they are all of one flow.
        let (mut flow, mut packets, mut bytes) = (FlowRef::default(), 0, 0);
        let count = |flow: FlowRef, packets: u64, bytes: u64| {
            if packets != 0
                && let Some(slot) = slots.slot(flow)
            {
                slot.add(packets, bytes, now);
            }
        };
        for i in bits(group & !ends.open) {
            let Some(lane) = &self.lanes[i] else { continue };
            if lane.flow != flow {
                count(flow, packets, bytes);
                (flow, packets, bytes) = (lane.flow, 0, 0);
            }
            packets += 1;
            bytes += u64::from(lane.taken.frame_len());
            if ends.alive >> i & 1 != 0
                && let Some(slot) = slots.slot(flow)
            {
                slot.clear_due();
            }
        }
        count(flow, packets, bytes);
    }
}

/// Where the print of a packet's tunnel is.
#[inline(always)]
fn place(packet: &Packet) -> usize {
    // Fibonacci hashing.
    (Imprint::peer(packet).wrapping_mul(0x9e37_79b1) >> 16) as usize % PRINTS
}

/// How packets have ended, as bits.
#[derive(Clone, Copy, Default)]
pub struct Ends {
    /// What becomes of them the host is to find out; they went there, or enough of their kind did.
    open: u64,
    /// They went there to show that their flows live.
    alive: u64,
}

/// Surroundings of packets out of a tunnel.
pub struct Inside<'a, E> {
    egress: &'a mut E,
    lanes: &'a [Option<Lane>; BURST],
    /// How they have ended.
    pub ends: Ends,
}

impl<E: Egress> Egress for Inside<'_, E> {
    fn more(&mut self, i: usize, packet: &mut Packet) {
        self.egress.more(i, packet);
    }

    fn admit(&mut self, _: usize, _: &mut Packet, _: Found<'_>) -> Result<(), DropReason> {
        Ok(()) // that was asked of the packet as it came
    }

    #[inline(always)]
    fn forward(&mut self, i: usize, packet: &mut Packet, port: PortId) {
        self.egress.forward(i, packet, port);
    }

    fn output(&mut self, i: usize, packet: &mut Packet, port: PortId, max_len: u32, last: bool) {
        self.egress.output(i, packet, port, max_len, last);
    }

    fn has_room(&mut self, packet: &Packet) -> bool {
        self.egress.has_room(packet)
    }

    fn upcall(&mut self, i: usize, packet: &mut Packet, why: Upcall) {
        match why {
            Upcall::KeepAlive(_) => self.ends.alive |= 1 << (i % BURST),
            _ => self.ends.open |= 1 << (i % BURST),
        }
        if let Some(lane) = &self.lanes[i % BURST] {
            lane.taken.put_back(packet);
        }
        self.egress.upcall(i, packet, why);
    }

    fn drop(&mut self, i: usize, packet: &Packet, reason: DropReason) {
        if reason == DropReason::MissPending {
            self.ends.open |= 1 << (i % BURST);
        }
        self.egress.drop(i, packet, reason);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn marks_of_one_peer_have_places_of_their_own() {
        let mut packet = Packet::default();
        let mut place_of = |tos: u8| {
            let head = packet.reset(PortId { slot: 1, generation: 1 }, 64, 64);
            head.fill(0);
            head[12] = 0x08; // IPv4
            head[15] = tos;
            head[26..30].copy_from_slice(&[192, 0, 2, 2]);
            place(&packet)
        };
        let mut places = [0, 1, 2, 3, 0xb8, 0xba].map(&mut place_of);
        places.sort_unstable();
        assert!(places.is_sorted_by(|one, next| one < next), "{places:?}");
    }
}
