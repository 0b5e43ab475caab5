//! A packet's way through a worker: parse, L1, L2, actions.
//!
//! A burst is handled in stages, so that the cache lines of all its packets are on their way at once: recognize or parse, make
//! keys and ask for L1 buckets; compare tags and ask for entries; compare keys and ask for flows; look up what is left in L2,
//! subtable by subtable; then execute packet by packet, in order. A packet of a common shape is parsed only if L1 does not tell
//! its one flow, or if that needs more than its [slot](crate::slab::Slot) says.
//!
//! *Resolve, then commit*: a plan that cannot end in a miss is executed at once. Any other is first run dry on a copy,
//! which records the flows of its stages, and then for good, with the same flows and the same dice. So no output leaves
//! before every stage has a plan, and what goes to the host is the packet exactly as received.

use crate::common::Shape;
use crate::drop::DropReason;
use crate::exec::Scratch;
use crate::flow::FlowRef;
use crate::hash::{Hasher, splitmix};
use crate::key::{Field, Key};
use crate::l1::{L1, L1Config, Numbers};
use crate::l2::BURST;
use crate::packet::{MAX_FRAME, Packet, PortId};
use crate::parse::{Extracted, extract, is_settled};
use crate::slab::Slots;
use crate::tables::{PathStats, Retired, Tables, Update};
use burst::{Asking, Burst};
use pass::{Dice, Pass, Trail};
use popped::{Ends, Popped};
use std::sync::Arc;

/// Why a packet goes to the host.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Upcall {
    /// A stage of its way has no flow.
    Miss,
    /// This flow cannot be executed here, or not for this packet.
    Punt(FlowRef),
    /// The host is to see this flow alive.
    KeepAlive(FlowRef),
    /// The parser does not follow its headers, or datapaths do not agree about them.
    Unparsable,
}

/// What is known of a packet that has just come in.
#[derive(Clone, Copy, Debug)]
pub enum Found<'a> {
    /// It was parsed.
    Key(&'a Key),
    /// It is of a common shape.
    Common(Shape),
}

/// Where packets come from and go to. Packets are named by their index in the burst. Each ends in exactly one of: one or
/// more outputs, an upcall, a drop.
pub trait Egress {
    /// The headers go on behind the head: fills what [`Packet::extend`] gives.
    fn more(&mut self, i: usize, packet: &mut Packet);
    /// Checks the packet's offload state against what it was found to be. Not of a packet out of a tunnel: what its sender said
    /// was about the outer headers.
    fn admit(&mut self, i: usize, packet: &mut Packet, found: Found<'_>) -> Result<(), DropReason>;
    /// The folded sum of the frame's bytes from the end of the head to offset `end`, as if they began a word; `None` if nobody has summed
    /// them. See [`crate::tunnel::recognize`].
    fn sum_tail(&mut self, _i: usize, _packet: &Packet, _end: u32) -> Option<u16> {
        None
    }
    /// The packet itself leaves by `port` as it stands, whole, and that is all that becomes of it.
    fn forward(&mut self, i: usize, packet: &mut Packet, port: PortId) {
        self.output(i, packet, port, u32::MAX, true);
    }
    /// The packet as it stands leaves by `port`, cut to `max_len` bytes of frame; see [`Env::output`](crate::exec::Env::output).
    fn output(&mut self, i: usize, packet: &mut Packet, port: PortId, max_len: u32, last: bool);
    /// Whether the host has room for this packet as a keep-alive; if not, it is forwarded and a later one goes.
    fn has_room(&mut self, packet: &Packet) -> bool;
    /// The packet, exactly as received, goes to the host.
    fn upcall(&mut self, i: usize, packet: &mut Packet, why: Upcall);
    /// The packet ends here.
    fn drop(&mut self, i: usize, packet: &Packet, reason: DropReason);
}

/// Sizes, times and seed of a [`Switch`].
#[derive(Clone, Copy, Debug)]
pub struct SwitchConfig {
    /// L1, port slots included.
    pub l1: L1Config,
    /// Most flows; the same as the planner's.
    pub flows: usize,
    /// For hashes and samples; should be random.
    pub seed: u64,
}

/// One worker's switch.
pub struct Switch {
    tables: Tables,
    l1: L1,
    dice: Dice,
    scratch: Scratch,
    /// The copy that is run dry.
    spare: Box<Packet>,
    stage_key: Box<Key>,
    trail: Box<Trail>,
    burst: Box<Burst>,
    numbers: Numbers,
    /// Not here while packets inside tunnels are processed.
    popped: Option<Box<Popped>>,
}

impl Switch {
    /// A switch without ports.
    pub fn new(config: SwitchConfig) -> Switch {
        let mut seed = config.seed;
        let (l1, l2, dice) = (splitmix(&mut seed), splitmix(&mut seed), splitmix(&mut seed));
        Switch {
            tables: Tables::new(config.l1.ports, config.flows, Hasher::new(l2)),
            numbers: Numbers::new(Hasher::new(l1)),
            l1: L1::new(config.l1, Hasher::new(l1)),
            dice: Dice::new(dice),
            scratch: Scratch::default(),
            spare: Box::default(),
            stage_key: Box::default(),
            trail: Box::default(),
            burst: Box::default(),
            popped: Some(Box::default()),
        }
    }

    /// Asks for the memory that an update will need; see [`Tables::ask`].
    pub fn ask(&self, update: &Update) {
        self.tables.ask(update);
    }

    /// Asks for the rest of it; see [`Tables::ask_more`].
    pub fn ask_more(&self, update: &Update) {
        self.tables.ask_more(update);
    }

    /// Applies an update, between bursts; gives back what is to be freed.
    pub fn apply(&mut self, update: Update) -> Retired {
        self.tables.apply(update, &mut self.l1)
    }

    /// A bounded piece of upkeep, to be called between bursts; gives back what is to be freed.
    pub fn step(&mut self) -> Retired {
        self.tables.step()
    }

    /// The tables.
    pub fn tables(&self) -> &Tables {
        &self.tables
    }

    /// What control reads of its flows.
    pub fn slots(&self) -> &Arc<Slots> {
        self.tables.slab().slots()
    }

    /// Where the list of flows lies, as [`Slab::memory`](crate::slab::Slab::memory) gives it.
    pub fn flow_list(&self) -> (*const u8, usize) {
        self.tables.slab().memory()
    }

    /// L1.
    pub fn l1(&self) -> &L1 {
        &self.l1
    }

    /// What it takes beside L1, slots and the list of flows, in bytes: between bursts, and without the tables of its ports.
    pub fn bytes(&self) -> usize {
        let boxed = size_of::<Packet>() + size_of::<Key>() + size_of::<Trail>() + size_of::<Burst>();
        let popped = self.popped.as_ref().map_or(0, |popped| popped.bytes());
        size_of::<Switch>() + boxed + self.numbers.bytes() + popped
    }

    #[cfg(test)]
    fn dice(&self) -> Dice {
        self.dice
    }

    /// Takes up to [`BURST`] packets of one ingress port at time `now` (in ticks) to their ends.
    pub fn process<E: Egress>(&mut self, now: u64, packets: &mut [Packet], egress: &mut E) {
        debug_assert!(packets.len() <= BURST);
        debug_assert!(packets.windows(2).all(|pair| pair[0].in_port == pair[1].in_port));
        let n = packets.len().min(BURST);
        let packets = &mut packets[..n];
        let Some(in_port) = packets.first().map(|packet| packet.in_port) else { return };
        self.process_asked::<E, false>(
            now,
            in_port,
            u64::MAX,
            packets,
            None,
            egress,
            |burst, packets, asking| match asking.port.lookout {
                0 => burst.ask(packets, asking),
                _ => burst.ask_outer(packets, asking),
            },
        );
        if let Some(popped) = self.popped.take_if(|popped| popped.packets != 0) {
            self.process_popped(now, packets, popped, egress);
        }
    }

    /// Takes the packets of a burst to their ends that were decapsulated.
    #[inline(never)]
    fn process_popped<E: Egress>(
        &mut self,
        now: u64,
        packets: &mut [Packet],
        mut popped: Box<Popped>,
        egress: &mut E,
    ) {
        let mut left = std::mem::take(&mut popped.packets);
        while let Some((group, in_port)) = popped.group(left, packets) {
            left &= !group;
            let ends = self.process_inside(now, in_port, group, packets, &mut popped, egress);
            popped.credit(group, ends, self.tables.slab().slots(), now);
        }
        self.popped = Some(popped);
    }

    /// Takes some packets of a burst to their ends that came by one tunnel's port.
    fn process_inside<E: Egress>(
        &mut self,
        now: u64,
        in_port: PortId,
        group: u64,
        packets: &mut [Packet],
        popped: &mut Popped,
        egress: &mut E,
    ) -> Ends {
        let mut inside = popped.inside(egress);
        let mut learned = None;
        let asked = |burst: &mut Burst, packets: &mut [Packet], asking: Asking<'_, _>| {
            let (of, any_port) =
                (asking.l1.generation(asking.port.slot()), !asking.port.looks_at_tunnel_port());
            let left = burst.ask_inside(packets, group, popped, asking);
            learned = Some((burst.written(), of, any_port)).filter(|(written, ..)| *written != 0);
            left
        };
        self.process_asked::<_, true>(now, in_port, group, packets, Some(popped), &mut inside, asked);
        let ends = inside.ends;
        if let Some((written, generation, any_port)) = learned {
            popped.learn(written, &self.burst.numbers, generation, any_port);
        }
        self.burst.forget_tunnels();
        ends
    }

    /// Takes the packets of a `group` to their ends, of which `ask` asks for the lines in L1 and tells whether any is left. Those out of
    /// tunnels have had these `outer` headers.
    #[inline(always)]
    #[allow(clippy::too_many_arguments)] // two calls, of what the burst knows about the packets
    fn process_asked<E: Egress, const TUNNELLED: bool>(
        &mut self,
        now: u64,
        in_port: PortId,
        group: u64,
        packets: &mut [Packet],
        outer: Option<&Popped>,
        egress: &mut E,
        ask: impl FnOnce(&mut Burst, &mut [Packet], Asking<'_, E>) -> bool,
    ) {
        let Switch { tables, l1, dice, scratch, spare, stage_key, trail, burst, numbers, popped } = self;
        let (slab, hasher, Some(port)) = tables.split(in_port) else {
            // The port's update is still on its way; the host knows what to do.
            for (i, packet) in packets.iter_mut().enumerate().filter(|(i, _)| group >> i & 1 != 0) {
                match parse::<E, TUNNELLED>(i, packet, stage_key, egress) {
                    Ok(()) => egress.upcall(i, packet, Upcall::Miss),
                    Err(Refusal::Drop(reason)) => egress.drop(i, packet, reason),
                    Err(Refusal::Host) => egress.upcall(i, packet, Upcall::Unparsable),
                }
            }
            return;
        };
        let mut stats = PathStats::default();
        l1.set_time(now);
        let mut popped = popped.as_deref_mut();
        let popping = popped.as_deref_mut();
        if !ask(
            burst,
            packets,
            Asking { port, l1, slab, numbers, popped: popping, egress, stats: &mut stats },
        ) {
            return;
        }
        burst.point(packets.len(), l1);
        let left = burst.hit::<TUNNELLED>(packets, port, l1, slab);
        burst.search(packets, port, hasher, slab, outer, left);
        let mut pass = Pass {
            slab,
            hasher,
            port,
            l1,
            dice,
            scratch,
            spare,
            stage_key,
            trail,
            popped,
            egress,
            now,
            stats,
        };
        burst.execute::<E, TUNNELLED>(packets, outer, &mut pass);
        let stats = pass.stats;
        port.counters.add(&stats);
    }
}

enum Refusal {
    Drop(DropReason),
    Host,
}

/// Counts a packet that is not looked up.
#[cold]
fn refuse<E: Egress>(i: usize, packet: &mut Packet, why: Refusal, stats: &mut PathStats, egress: &mut E) {
    match why {
        Refusal::Drop(reason) => {
            stats.refused += 1;
            egress.drop(i, packet, reason);
        }
        Refusal::Host => {
            stats.unparsable += 1;
            egress.upcall(i, packet, Upcall::Unparsable);
        }
    }
}

#[inline(never)] // the rarer way
fn parse<E: Egress, const TUNNELLED: bool>(
    i: usize,
    packet: &mut Packet,
    key: &mut Key,
    egress: &mut E,
) -> Result<(), Refusal> {
    if packet.len > MAX_FRAME {
        return Err(Refusal::Drop(DropReason::Oversized));
    }
    let mut extracted = extract(packet, key);
    if extracted == Extracted::NeedMore {
        egress.more(i, packet);
        extracted = extract(packet, key);
    }
    match extracted {
        Extracted::Done => {
            if !TUNNELLED {
                egress.admit(i, packet, Found::Key(key)).map_err(Refusal::Drop)?;
            }
            if is_settled(packet, key) { Ok(()) } else { Err(Refusal::Host) }
        }
        Extracted::Runt => Err(Refusal::Drop(DropReason::Runt)),
        Extracted::NeedMore | Extracted::TooLong => Err(Refusal::Host),
    }
}

#[inline(always)]
fn tcp_flags(key: &Key) -> u16 {
    key.get(Field::TcpFlags) as u16
}

mod burst;
mod pass;
mod popped;
#[cfg(test)]
mod tests;
pub mod trace;
