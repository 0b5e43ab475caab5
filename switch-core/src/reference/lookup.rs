//! The plain twin of the tables and of the pipeline: one list of flows, searched from end to end at every stage; no cache,
//! no bursts. What the packet would send is collected and counts only if every stage was resolved.

use crate::compile::{Plan, PuntReason, compile};
use crate::drop::DropReason;
use crate::exec::{Env, Metadata, Scratch, Verdict, execute};
use crate::flow::{FlowRef, FlowSpec, Source};
use crate::key::Key;
use crate::packet::{MAX_FRAME, Offload, Packet, PortId};
use crate::parse::{Extracted, extract, extract_recirculated};
use crate::pipeline::Upcall;

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
    /// A flow, compiled.
    pub fn new(flow: FlowRef, port: PortId, source: Source, spec: FlowSpec) -> Flow {
        let plan = compile(&spec);
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
        if packet.len > MAX_FRAME {
            return (Fate::Dropped(DropReason::Oversized), Vec::new());
        }
        let (mut packet, mut key) = (packet.clone(), Key::default());
        match extract(&mut packet, &mut key) {
            Extracted::Done => {}
            Extracted::Runt => return (Fate::Dropped(DropReason::Runt), Vec::new()),
            _ => return (Fate::Upcall(Upcall::Unparsable), Vec::new()),
        }
        let Some(first) = self.lookup(packet.in_port, &key) else {
            return (Fate::Upcall(Upcall::Miss), Vec::new());
        };
        let trail = vec![(first.flow, packet.len)];
        let Ok(plan) = &first.plan else { return (Fate::Upcall(Upcall::Punt(first.flow)), trail) };
        let mut walk = Walk { table: self, dice, sent: Vec::new(), trail, why: Upcall::Punt(first.flow) };
        let fate = match execute(plan, &mut packet, &mut Scratch::default(), &mut walk) {
            Verdict::Done => Fate::Sent(walk.sent),
            Verdict::Dropped(reason) => Fate::Dropped(reason),
            Verdict::Unresolved => Fate::Upcall(walk.why),
        };
        (fate, walk.trail)
    }
}

struct Walk<'t, 'd> {
    table: &'t Table,
    dice: &'d mut dyn FnMut() -> u32,
    sent: Vec<Sent>,
    trail: Vec<(FlowRef, u32)>,
    why: Upcall,
}

impl<'t> Env<'t> for Walk<'t, '_> {
    fn output(&mut self, packet: &mut Packet, port: PortId, max_len: u32, _: bool) {
        self.sent.push(Sent::new(packet, port, max_len));
    }

    fn recirculate(&mut self, packet: &mut Packet, metadata: &Metadata) -> Option<&'t Plan> {
        let mut key = Key::default();
        if extract_recirculated(packet, &mut key, metadata.recirc_id) != Extracted::Done {
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
