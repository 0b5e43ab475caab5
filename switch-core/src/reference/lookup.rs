//! The plain twin of the tables and of the pipeline: one list of flows, searched from end to end at every stage; no cache,
//! no bursts. What the packet would send is collected and counts only if every stage was resolved.

use crate::compile::{NoWays, Plan, PuntReason, Ways, compile_with};
use crate::drop::DropReason;
use crate::exec::{Env, Metadata, Scratch, Verdict, execute};
use crate::flow::{FlowRef, FlowSpec, Source};
use crate::key::Key;
use crate::packet::{MAX_FRAME, Offload, Packet, PortId};
use crate::parse::{Extracted, extract, extract_recirculated, is_settled};
use crate::pipeline::Upcall;
use crate::tunnel::{Endpoint, recognize};

/// A flow in the list.
#[derive(Debug)]
pub struct Flow {
    /// Its name.
    pub flow: FlowRef,
    /// The ingress port.
    pub port: PortId,
    /// Who gave it.
    pub source: Source,
    /// Match and actions.
    pub spec: FlowSpec,
    /// The plan, or why there is none.
    pub plan: Result<Plan, PuntReason>,
}

impl Flow {
    /// A flow, compiled where no port is a tunnel's.
    pub fn new(flow: FlowRef, port: PortId, source: Source, spec: FlowSpec) -> Flow {
        Flow::with_ways(flow, port, source, spec, &NoWays)
    }

    /// A flow, compiled with these ways of tunnels.
    pub fn with_ways(flow: FlowRef, port: PortId, source: Source, spec: FlowSpec, ways: &dyn Ways) -> Flow {
        let plan = compile_with(&spec, ways);
        Flow { flow, port, source, spec, plan }
    }
}

/// One packet that left.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Sent {
    /// By which port.
    pub port: PortId,
    /// Bytes of frame to be sent at most.
    pub max_len: u32,
    /// Length of the frame.
    pub len: u32,
    /// The frame's head.
    pub head: Vec<u8>,
    /// Checksum and segmentation state.
    pub offload: Offload,
}

impl Sent {
    /// What an output of `packet` sends.
    pub fn new(packet: &Packet, port: PortId, max_len: u32) -> Sent {
        Sent { port, max_len, len: packet.len, head: packet.head().to_vec(), offload: packet.offload }
    }
}

/// How a packet ended.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Fate {
    /// By these outputs, in order.
    Sent(Vec<Sent>),
    /// At the host.
    Upcall(Upcall),
    /// Nowhere.
    Dropped(DropReason),
}

/// All flows of a switch.
#[derive(Debug, Default)]
pub struct Table {
    /// In any order.
    pub flows: Vec<Flow>,
}

impl Table {
    /// The flow that a packet of `port` with that key goes by: of the sources that have one, the first's.
    pub fn lookup(&self, port: PortId, key: &Key) -> Option<&Flow> {
        self.flows
            .iter()
            .filter(|f| f.port == port && key.matches(&f.spec.matches.key, &f.spec.matches.mask))
            .min_by_key(|f| f.source)
    }

    /// Follows a packet, whose head is as long as it may become, to its end. `dice` gives random numbers for `sample`.
    /// Returns with its fate the flows that it went by, each with the length of the frame there.
    pub fn follow(&self, packet: &Packet, dice: &mut dyn FnMut() -> u32) -> (Fate, Vec<(FlowRef, u32)>) {
        let mut trail = Vec::new();
        let fate = self.follow_key(packet, Key::default(), true, dice, &mut trail);
        (fate, trail)
    }

    /// The same, of a packet that has these metadata; `may_pop`: it came in by a port, and not by a tunnel.
    fn follow_key(
        &self,
        packet: &Packet,
        mut key: Key,
        may_pop: bool,
        dice: &mut dyn FnMut() -> u32,
        trail: &mut Vec<(FlowRef, u32)>,
    ) -> Fate {
        if packet.len > MAX_FRAME {
            return Fate::Dropped(DropReason::Oversized);
        }
        let mut packet = packet.clone();
        match extract(&mut packet, &mut key) {
            Extracted::Done if is_settled(&packet, &key) => {}
            Extracted::Runt => return Fate::Dropped(DropReason::Runt),
            _ => return Fate::Upcall(Upcall::Unparsable),
        }
        let Some(first) = self.lookup(packet.in_port, &key) else {
            return Fate::Upcall(Upcall::Miss);
        };
        trail.push((first.flow, packet.len));
        let punt = Upcall::Punt(first.flow);
        let Ok(plan) = &first.plan else { return Fate::Upcall(punt) };
        if may_pop && let Some(endpoints) = plan.endpoints() {
            let inside = self.pop(packet, endpoints);
            return inside
                .map_or(Fate::Upcall(punt), |(inner, key)| self.follow_key(&inner, key, false, dice, trail));
        }
        let mut walk = Walk { table: self, dice, key, sent: Vec::new(), trail, why: punt };
        match execute(plan, &mut packet, &mut Scratch::default(), &mut walk) {
            Verdict::Done => Fate::Sent(walk.sent),
            Verdict::Dropped(reason) => Fate::Dropped(reason),
            Verdict::Unresolved => Fate::Upcall(walk.why),
        }
    }

    /// The packet inside a tunnel's, and what its key has of the outer headers; `None` if it is for none of these endpoints.
    fn pop(&self, mut packet: Packet, endpoints: &[Endpoint]) -> Option<(Packet, Key)> {
        let decap = recognize(&packet, endpoints, |_| None)?;
        decap.pop(&mut packet);
        let mut key = Key::default();
        decap.tunnel.write_to(&mut key);
        Some((packet, key))
    }
}

struct Walk<'t, 'd> {
    table: &'t Table,
    dice: &'d mut dyn FnMut() -> u32,
    /// What it has of outer headers goes along.
    key: Key,
    sent: Vec<Sent>,
    trail: &'d mut Vec<(FlowRef, u32)>,
    why: Upcall,
}

impl<'t> Env<'t> for Walk<'t, '_> {
    fn output(&mut self, packet: &mut Packet, port: PortId, max_len: u32, _: bool) {
        self.sent.push(Sent::new(packet, port, max_len));
    }

    fn recirculate(&mut self, packet: &mut Packet, metadata: &Metadata) -> Option<&'t Plan> {
        let mut key = self.key;
        if extract_recirculated(packet, &mut key, metadata.recirc_id) != Extracted::Done
            || !is_settled(packet, &key)
        {
            self.why = Upcall::Unparsable;
            return None;
        }
        metadata.write_to(&mut key);
        let Some(flow) = self.table.lookup(packet.in_port, &key) else {
            self.why = Upcall::Miss;
            return None;
        };
        self.trail.push((flow.flow, packet.len));
        self.why = Upcall::Punt(flow.flow);
        flow.plan.as_ref().ok()
    }

    fn random(&mut self) -> u32 {
        (self.dice)()
    }
}
