//! What would happen to a packet, layer by layer.

use super::{Dice, Switch, Upcall};
use crate::chain::{Extent, extent};
use crate::common;
use crate::compile::Plan;
use crate::drop::DropReason;
use crate::exec::{Env, Metadata, Scratch, Verdict, execute};
use crate::flow::FlowRef;
use crate::key::Key;
use crate::l1::{Cached, L1Key};
use crate::packet::{MAX_FRAME, Packet, PortId};
use crate::parse::{Extracted, extract, extract_recirculated, is_settled};
use crate::slab::Disposition;
use crate::tunnel::recognize;

/// What L1 says about a packet.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum L1Trace {
    /// The port has no table, or the parser gave up.
    NotAsked,
    /// The key has more words than an entry holds.
    TooLong,
    /// There is no entry.
    Miss,
    /// A first packet is being decided about.
    Pending,
    /// An entry with these flows. With `live` false one of them is gone, and L2 is asked.
    Hit {
        /// The flows of the chain.
        flows: Vec<FlowRef>,
        /// Whether all of them live.
        live: bool,
        /// Whether they are the packet's whole way, so that L2 is not asked.
        whole: bool,
    },
}

/// One lookup.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Stage {
    /// The key, recirculation id included.
    pub key: Key,
    /// The flow found.
    pub flow: Option<FlowRef>,
}

/// One packet that would leave.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Output {
    /// By which port.
    pub port: PortId,
    /// Bytes of frame to be sent at most; `u32::MAX` is all.
    pub max_len: u32,
    /// Length of the frame.
    pub len: u32,
    /// The frame's head.
    pub head: Vec<u8>,
}

/// How the packet would end.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Outcome {
    /// By the outputs.
    Sent,
    /// At the host.
    Upcall(Upcall),
    /// Nowhere.
    Dropped(DropReason),
}

/// The description that [`Switch::trace`] gives.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Trace {
    /// What L1 says.
    pub l1: L1Trace,
    /// If the flow that was found first takes the packet out of a tunnel: what L1 says about the packet inside.
    pub inside: Option<L1Trace>,
    /// Lookups in L2, in order. The first has the key of the packet as it came in; if it came by a tunnel, the second has the key
    /// of the packet inside, as it comes in by the tunnel's port.
    pub stages: Vec<Stage>,
    /// What would leave; nothing, unless the outcome is [`Outcome::Sent`].
    pub outputs: Vec<Output>,
    /// The end.
    pub outcome: Outcome,
}

impl Switch {
    /// Describes what would happen to `packet`, whose head is as long as it may become; changes nothing. `sample` throws
    /// the dice that the next packet would get. (Of a longer packet out of a tunnel whose checksum would have to be verified
    /// it says that the host gets it.)
    pub fn trace(&self, packet: &Packet) -> Trace {
        let mut packet = packet.clone();
        let mut trace = Trace {
            l1: L1Trace::NotAsked,
            inside: None,
            stages: Vec::new(),
            outputs: Vec::new(),
            outcome: Outcome::Upcall(Upcall::Miss),
        };
        trace.outcome = self.trace_arrival(&mut packet, Key::default(), &mut trace, false);
        if trace.outcome != Outcome::Sent {
            trace.outputs.clear();
        }
        trace
    }

    /// What becomes of a packet that has come in with these metadata: by a port, or `inside` a tunnel.
    fn trace_arrival(&self, packet: &mut Packet, mut key: Key, trace: &mut Trace, inside: bool) -> Outcome {
        match extract(packet, &mut key) {
            _ if packet.len > MAX_FRAME => Outcome::Dropped(DropReason::Oversized),
            Extracted::Runt => Outcome::Dropped(DropReason::Runt),
            Extracted::NeedMore | Extracted::TooLong => Outcome::Upcall(Upcall::Unparsable),
            Extracted::Done if !is_settled(packet, &key) => Outcome::Upcall(Upcall::Unparsable),
            Extracted::Done => {
                let l1 = self.trace_l1(packet, &key, inside);
                *(if inside { trace.inside.insert(L1Trace::NotAsked) } else { &mut trace.l1 }) = l1;
                self.trace_stages(packet, &key, trace, inside)
            }
        }
    }

    fn trace_l1(&self, packet: &mut Packet, key: &Key, inside: bool) -> L1Trace {
        let Some(table) = self.tables.port(packet.in_port) else { return L1Trace::NotAsked };
        let slot = packet.in_port.slot as u16;
        let mut number = 0;
        if inside {
            let generation = self.l1.generation(slot);
            let known = self.numbers.find(slot, generation, table.tunnel_terms(), key);
            let Some(known) = known else { return L1Trace::Miss };
            number = known;
        }
        let mut l1_key = L1Key::default();
        let is_short = match common::recognize::<true>(packet) {
            Some(found) => {
                let terms = table.common(found.shape);
                l1_key = self.l1.common_key(slot, terms, packet.window::<true>(), number);
                true
            }
            None => self.l1.make_key(slot, table.terms(), key, number, &mut l1_key),
        };
        if !is_short {
            return L1Trace::TooLong;
        }
        match self.l1.find(&l1_key).map(|place| self.l1.get(place)) {
            None => L1Trace::Miss,
            Some(Cached::Pending) => L1Trace::Pending,
            Some(Cached::Chain(chain)) => {
                let slab = self.tables.slab();
                L1Trace::Hit {
                    flows: chain.flows().to_vec(),
                    live: chain.flows().iter().all(|&flow| slab.get(flow).is_some()),
                    whole: extent(chain.flows(), slab) != Extent::Open,
                }
            }
        }
    }

    fn trace_stages(&self, packet: &mut Packet, key: &Key, trace: &mut Trace, inside: bool) -> Outcome {
        let mut walk = Walk { switch: self, dice: self.dice, key, trace, why: Upcall::Miss };
        let Some(plan) = walk.look_up(packet.in_port, key) else { return Outcome::Upcall(walk.why) };
        if !inside
            && let Some(endpoints) = plan.endpoints()
            && let Some(decap) = recognize(packet, endpoints, |_| None)
        {
            decap.pop(packet);
            let mut key = Key::default();
            decap.tunnel.write_to(&mut key);
            return self.trace_arrival(packet, key, trace, true);
        }
        match execute(plan, packet, &mut Scratch::default(), &mut walk) {
            Verdict::Done => Outcome::Sent,
            Verdict::Dropped(reason) => Outcome::Dropped(reason),
            Verdict::Unresolved => Outcome::Upcall(walk.why),
        }
    }
}

struct Walk<'s, 't> {
    switch: &'s Switch,
    dice: Dice,
    /// Of the packet as it came in.
    key: &'t Key,
    trace: &'t mut Trace,
    why: Upcall,
}

impl<'s> Walk<'s, '_> {
    fn look_up(&mut self, port: PortId, key: &Key) -> Option<&'s Plan> {
        let flow = self.switch.tables.peek(port, key);
        self.trace.stages.push(Stage { key: *key, flow });
        self.why = flow.map_or(Upcall::Miss, Upcall::Punt);
        match &self.switch.tables.slab().get(flow?)?.disposition {
            Disposition::Fast(plan) => Some(plan),
            Disposition::Punt(_) => None,
        }
    }
}

impl<'s> Env<'s> for Walk<'s, '_> {
    fn output(&mut self, packet: &mut Packet, port: PortId, max_len: u32, _: bool) {
        let output = Output { port, max_len, len: packet.len, head: packet.head().to_vec() };
        self.trace.outputs.push(output);
    }

    fn recirculate(&mut self, packet: &mut Packet, metadata: &Metadata) -> Option<&'s Plan> {
        let mut key = *self.key;
        let extracted = extract_recirculated(packet, &mut key, metadata.recirc_id);
        if extracted != Extracted::Done || !is_settled(packet, &key) {
            self.why = Upcall::Unparsable;
            return None;
        }
        metadata.write_to(&mut key);
        self.look_up(packet.in_port, &key)
    }

    fn random(&mut self) -> u32 {
        self.dice.next()
    }
}
