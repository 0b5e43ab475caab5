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
#[cfg(test)]
use crate::packet::Layout;
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
#[derive(Clone, Copy)]
struct Numbered {
    number: u64,
    /// Of the entries in L1 of the port inside, which have it: 0 if there is no number.
    generation: u32,
    /// Whether the source port makes no difference.
    any_port: bool,
    varying: Varying,
}

impl Default for Numbered {
    fn default() -> Numbered {
        Numbered { number: 0, generation: 0, any_port: false, varying: Varying { port: 0, options: 0 } }
    }
}

impl Numbered {
    /// It and its generation, if it is that of the headers in which this varies; else 0.
    #[inline(always)]
    fn of(&self, varying: Varying) -> (u64, u32) {
        let is_same =
            self.varying.options == varying.options && (self.any_port || self.varying.port == varying.port);
        (self.number, if is_same { self.generation } else { 0 })
    }
}

/// A packet out of a tunnel.
#[derive(Clone, Copy)]
enum Lane {
    /// It was recognized by the print at this place; the rest is there.
    Known {
        at: u16,
        /// Of the packet as it came.
        len: u32,
        varying: Varying,
    },
    Other {
        /// Its outer flow.
        flow: FlowRef,
        /// What it was.
        taken: Taken,
        /// What flows match of its outer headers.
        tunnel: TunnelKey,
    },
}

/// The packets of a burst that were decapsulated, and outer flows that are known.
pub struct Popped {
    /// The packets, as bits.
    pub packets: u64,
    /// The port by which they have come, in their outer headers.
    outer_port: PortId,
    /// The port by which the first of them has come inside its tunnel, and its outer flow; and whether that of another is another.
    first: (PortId, FlowRef),
    is_mixed: bool,
    /// Bytes of all, as they came.
    bytes: u64,
    lanes: [Lane; BURST],
    /// Of each packet, the number of its outer headers, if it is known, and the generation of entries that have it; else 0.
    numbers: [(u64, u32); BURST],
    known: Box<[Known]>,
    prints: Box<[Option<Print>]>,
}

impl Default for Popped {
    fn default() -> Popped {
        let nowhere = PortId { slot: 0, generation: 0 };
        let varying = Varying { port: 0, options: 0 };
        Popped {
            packets: 0,
            outer_port: nowhere,
            first: (nowhere, FlowRef::default()),
            is_mixed: false,
            bytes: 0,
            lanes: [Lane::Known { at: 0, len: 0, varying }; BURST],
            numbers: [(0, 0); BURST],
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

    /// Takes those packets out of their outer headers that are of known tunnels and of flows that are `fine`, and to which nothing is left to
    /// do. All have come by the same port, whose entries in L1 are of this generation.
    #[inline(never)] // with registers of its own
    pub fn pop_known<E: Egress>(
        &mut self,
        packets: &mut [Packet],
        generation: u32,
        fine: impl Fn(FlowRef) -> bool,
        egress: &mut E,
    ) {
        let Some(in_port) = packets.first().map(|packet| packet.in_port) else { return };
        self.outer_port = in_port;
        let is_of = |print: &Print| print.generation == generation && print.in_port == in_port;
        // Mostly it is that of the packet before.
        let mut near: Option<(usize, &Print)> = None;
        for (i, packet) in packets.iter_mut().enumerate().take(BURST) {
            let (at, print, varying) = match near {
                Some((at, print)) if let Some(varying) = print.imprint.find(packet) => (at, print, varying),
                _ => {
                    let at = place(packet);
                    let Some(print) = self.prints[at].as_ref().filter(|print| is_of(print)) else { continue };
                    let Some(varying) = print.imprint.find(packet) else { continue };
                    if !fine(print.flow) {
                        continue;
                    }
                    near = Some((at, print));
                    let first = (print.imprint.in_port, print.flow);
                    match self.packets {
                        0 => (self.first, self.is_mixed, self.bytes) = (first, false, 0),
                        _ => self.is_mixed |= self.first != first,
                    }
                    (at, print, varying)
                }
            };
            let imprint = &print.imprint;
            packet.layout = imprint.layout;
            // What is refused, or is more than plain, takes the ordinary way, where it is asked for again.
            if egress.admit(i, packet, Found::Common(imprint.shape)).is_err() || !Imprint::is_plain(packet) {
                continue;
            }
            self.lanes[i] = Lane::Known { at: at as u16, len: packet.len, varying };
            self.numbers[i] = print.numbered.of(varying);
            self.bytes += u64::from(packet.len);
            self.packets |= 1 << i;
            imprint.pop(packet);
        }
    }

    /// Remembers what is to be compared, unless it is known already.
    pub fn imprint(&mut self, packet: &Packet, generation: u32, flow: FlowRef, imprint: Imprint) {
        let (at, in_port) = (place(packet), packet.in_port);
        if let Some(print) = &self.prints[at]
            && (print.generation, print.in_port, print.flow) == (generation, in_port, flow)
            && print.imprint.find(packet).is_some()
        {
            return;
        }
        // What was known here before is still to be told of packets of this burst.
        for i in bits(self.packets) {
            if let Lane::Known { at: known, .. } = self.lanes[i]
                && usize::from(known) == at
                && let Some((flow, taken, tunnel)) = self.lane(i)
            {
                self.lanes[i] = Lane::Other { flow, taken, tunnel };
            }
        }
        let numbered = Numbered::default();
        self.prints[at] = Some(Print { imprint, in_port, generation, flow, numbered });
    }

    /// Takes packet `i` out of its outer headers, as its flow has it.
    #[inline]
    pub fn pop(&mut self, i: usize, packet: &mut Packet, flow: FlowRef, decap: &Decap) {
        let (i, first) = (i % BURST, (decap.in_port, flow));
        match self.packets {
            0 => (self.first, self.is_mixed, self.bytes) = (first, false, 0),
            _ => self.is_mixed |= self.first != first,
        }
        self.bytes += u64::from(packet.len);
        self.packets |= 1 << i;
        self.lanes[i] = Lane::Other { flow, taken: decap.pop(packet), tunnel: decap.tunnel };
        self.numbers[i] = (0, 0);
    }

    /// The flows of which there are imprints.
    #[cfg(test)]
    pub fn printed(&self) -> Vec<FlowRef> {
        self.prints.iter().flatten().map(|print| print.flow).collect()
    }

    /// Has packet `i` be out of such outer headers.
    #[cfg(test)]
    pub fn put(&mut self, i: usize, tunnel: TunnelKey) {
        let taken = Taken::plain(0, Layout::default(), self.outer_port, 0);
        self.lanes[i] = Lane::Other { flow: FlowRef::default(), taken, tunnel };
        self.numbers[i] = (0, 0);
    }

    /// The outer flow of packet `i`, what it was, and what flows match of its outer headers.
    fn lane(&self, i: usize) -> Option<(FlowRef, Taken, TunnelKey)> {
        Some(match &self.lanes[i % BURST] {
            Lane::Known { at, len, varying } => {
                let print = self.prints.get(usize::from(*at))?.as_ref()?;
                let taken = print.imprint.taken(self.outer_port, *len);
                (print.flow, taken, print.imprint.tunnel_of(*varying))
            }
            Lane::Other { flow, taken, tunnel } => (*flow, *taken, *tunnel),
        })
    }

    /// What flows match of the outer headers of packet `i`.
    pub fn tunnel(&self, i: usize) -> Option<TunnelKey> {
        Some(self.lane(i)?.2)
    }

    /// The number of the outer headers of packet `i` in entries of this generation, if it is known.
    #[inline(always)]
    pub fn number(&self, i: usize, generation: u32) -> Option<u64> {
        let (number, of) = self.numbers[i % BURST];
        (of == generation).then_some(number)
    }

    /// Remembers the numbers of the outer headers of these packets, of this generation, for others that are recognized by the same prints.
    #[cold]
    pub fn learn(&mut self, packets: u64, numbers: &[u64; BURST], generation: u32, any_port: bool) {
        for i in bits(packets) {
            if let Lane::Known { at, varying, .. } = self.lanes[i]
                && let Some(Some(print)) = self.prints.get_mut(usize::from(at))
            {
                print.numbered = Numbered { number: numbers[i], generation, any_port, varying };
            }
        }
    }

    /// Those of `left` that have come by the same tunnel's port as the first of them, and that port.
    #[inline(always)]
    pub fn group(&self, left: u64, packets: &[Packet]) -> Option<(u64, PortId)> {
        if left == 0 {
            return None;
        }
        if !self.is_mixed {
            return Some((left, self.first.0));
        }
        let in_port = packets.get(left.trailing_zeros() as usize)?.in_port;
        let of_port = |i: &usize| packets.get(*i).is_some_and(|packet| packet.in_port == in_port);
        Some((bits(left).filter(of_port).fold(0, |group, i| group | 1 << i), in_port))
    }

    /// The surroundings of the packets inside.
    #[inline(always)]
    pub fn inside<'a, E>(&'a self, egress: &'a mut E) -> Inside<'a, E> {
        Inside { egress, popped: self, ends: Ends::default() }
    }

    /// Counts the outer flows of some packets, now that it is known how these have ended.
    pub fn credit(&self, group: u64, ends: Ends, slots: &Slots, now: u64) {
        let count = |flow: FlowRef, packets: u64, bytes: u64| {
            if packets != 0
                && let Some(slot) = slots.slot(flow)
            {
                slot.add(packets, bytes, now);
            }
        };
        // Mostly they are all of one flow, and this is all of them.
        if !self.is_mixed && ends.open | ends.alive == 0 {
            return count(self.first.1, group.count_ones().into(), self.bytes);
        }
        let (mut flow, mut packets, mut bytes) = (FlowRef::default(), 0, 0);
        for i in bits(group & !ends.open) {
            let (of, len) = match &self.lanes[i] {
                Lane::Known { at, len, .. } => match self.prints.get(usize::from(*at)) {
                    Some(Some(print)) => (print.flow, *len),
                    _ => continue,
                },
                Lane::Other { flow, taken, .. } => (*flow, taken.frame_len()),
            };
            if of != flow {
                count(flow, packets, bytes);
                (flow, packets, bytes) = (of, 0, 0);
            }
            packets += 1;
            bytes += u64::from(len);
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
    popped: &'a Popped,
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
        if let Some((_, taken, _)) = self.popped.lane(i) {
            taken.put_back(packet);
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
