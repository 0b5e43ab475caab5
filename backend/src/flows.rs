//! All flows on the control side: checked, compiled, given to every worker, counted together.

use crate::clock;
use crate::counters::PortCounters;
use crate::datapath::{Mark, WorkerFeed};
use crate::host::{FlowTable, Millis};
use crate::hugepages;
use crate::offload::feed::{Change, Feed};
use crate::worker::port::WorkerPort;
use crate::worker::{Command, MAX_PORTS};
use log::error;
use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::mpsc::Sender;
use switch_core::compile::Ways;
use switch_core::flow::{FlowRef, FlowSpec, Source};
use switch_core::key::Field;
use switch_core::packet::{Packet, PortId};
use switch_core::pipeline::trace::Trace;
use switch_core::planner::{Flow, IfExists, PlanError, Planner, PlannerConfig};
use switch_core::slab::{Disposition, Slots};
use switch_core::tables::{PathCounters, PathStats, Update};

/// Flows at most, over all ports.
pub const MAX_FLOWS: usize = 1 << 20;
/// Flows whose slots are prepared at a time: those of a huge page.
const READY_FLOWS: usize = 1 << 15;
const _: () = assert!(MAX_FLOWS.is_multiple_of(READY_FLOWS));

/// The flows, and the feeds of the workers that have them.
pub struct Flows {
    planner: Planner,
    feeds: Vec<WorkerFeed>,
    /// By slot.
    ports: Vec<Option<FlowPort>>,
    /// By flow index: when it was put in.
    born: Vec<Millis>,
    /// Packets that flows which are gone have punted, by reason.
    punted: BTreeMap<String, u64>,
    /// Flows for which there are pages in the workers' slots.
    ready: usize,
    /// Who puts flows into NICs, if anybody does.
    offload: Option<Arc<Feed>>,
}

/// Reasons of flows which are gone that are told apart; there are a dozen, but some name ports or unknown actions.
const MAX_REASONS: usize = 64;

struct FlowPort {
    id: PortId,
    max_masks: usize,
    /// What it may be sent, in bytes.
    mtu: u32,
    paths: Vec<Arc<PathCounters>>,
}

impl Flows {
    /// No flows, for these workers.
    pub fn new(feeds: Vec<WorkerFeed>, seed: u64) -> Flows {
        let config = PlannerConfig { ports: MAX_PORTS, flows: MAX_FLOWS, masks: MAX_MASKS, seed };
        let workers = feeds.iter().map(|feed| feed.slots.clone()).collect();
        Flows {
            planner: Planner::new(config, workers),
            feeds,
            ports: (0..MAX_PORTS).map(|_| None).collect(),
            born: Vec::new(),
            punted: BTreeMap::new(),
            ready: 0,
            offload: None,
        }
    }

    /// Tells changes of flows to whoever puts them into NICs from now on, and counts what NICs count. Only before there are
    /// flows: false if it is too late.
    pub fn tell_offload(&mut self, feed: Arc<Feed>, slots: Arc<Slots>) -> bool {
        let may = self.planner.count_beside(slots);
        if may {
            self.offload = Some(feed);
        }
        may
    }

    /// Has flows compiled with these ways of tunnels. A flow that is there is compiled anew when it is put again.
    pub fn set_ways(&mut self, ways: Arc<dyn Ways + Send + Sync>) {
        self.planner.set_ways(ways);
    }

    /// Gives each worker its update.
    fn send(&mut self, updates: Vec<Update>) {
        for (feed, update) in self.feeds.iter_mut().zip(updates) {
            if let Update::AddFlowWith(room) = &update
                && let Some(array) = &room.array
            {
                array.memory().into_iter().for_each(|memory| {
                    hugepages::advise(memory);
                    hugepages::prefault(memory, feed.node);
                });
            }
            feed.send(Command::Table(update));
            feed.flush();
        }
    }

    /// Has the pages there of the slots that the flow of this index and the next ones get.
    fn prepare_slots(&mut self, index: usize) {
        while self.ready < MAX_FLOWS && index + READY_FLOWS / 2 >= self.ready {
            for feed in &self.feeds {
                let memory = feed.slots.memory_of(self.ready..self.ready + READY_FLOWS);
                hugepages::prefault(memory, feed.node);
            }
            self.ready += READY_FLOWS;
        }
    }

    /// Adds a port's table and the port itself, made by `worker_port` for each worker. Gives its counters.
    pub fn add_port(
        &mut self,
        id: PortId,
        max_masks: usize,
        l1_quota: u32,
        worker_port: impl Fn(usize) -> Box<WorkerPort>,
    ) -> Result<Vec<Arc<PortCounters>>, PlanError> {
        let (updates, paths) = self.planner.add_port(id, l1_quota)?;
        let made: Vec<_> = (0..self.feeds.len()).map(worker_port).collect();
        let mtu = made.first().map_or(0, |port| port.mtu);
        self.ports[id.slot as usize] = Some(FlowPort { id, max_masks, mtu, paths });
        self.send(updates);
        let mut counters = Vec::with_capacity(self.feeds.len());
        for (feed, port) in self.feeds.iter_mut().zip(made) {
            counters.push(port.counters.clone());
            feed.send(Command::AddPort(port));
            feed.flush();
        }
        Ok(counters)
    }

    /// Adds the table of a tunnel's logical port, which has no rings: packets come there by decapsulation.
    pub fn add_tunnel(&mut self, id: PortId, max_masks: usize, l1_quota: u32) -> Result<(), PlanError> {
        let (updates, paths) = self.planner.add_port(id, l1_quota)?;
        // Nothing is sent to it but inside another header, by another port.
        self.ports[id.slot as usize] = Some(FlowPort { id, max_masks, mtu: u32::MAX, paths });
        self.send(updates);
        Ok(())
    }

    /// Why flows are carried out by the host: packets and present flows, by reason.
    pub fn punts(&self) -> BTreeMap<String, (u64, u64)> {
        let mut punts: BTreeMap<String, (u64, u64)> =
            self.punted.iter().map(|(reason, &packets)| (reason.clone(), (packets, 0))).collect();
        for flow in self.iter() {
            if let Some((reason, packets)) = punted(flow) {
                let entry = punts.entry(reason).or_default();
                *entry = (entry.0 + packets, entry.1 + 1);
            }
        }
        punts
    }

    /// Keeps what a flow that goes has punted.
    fn settle(&mut self, gone: &Flow) {
        if let Some((reason, packets)) = punted(gone)
            && packets > 0
            && (self.punted.len() < MAX_REASONS || self.punted.contains_key(&reason))
        {
            *self.punted.entry(reason).or_default() += packets;
        }
    }

    /// Removes a port from all workers, and its flows.
    pub fn remove_port(&mut self, id: PortId) {
        let gone: Vec<FlowRef> = self.iter().filter(|flow| flow.port == id).map(|flow| flow.flow).collect();
        gone.into_iter().for_each(|flow| self.delete(flow));
        for feed in &mut self.feeds {
            feed.send(Command::RemovePort(id));
            feed.flush();
        }
        match self.planner.remove_port(id) {
            Ok(updates) => updates.into_iter().for_each(|updates| self.send(updates)),
            Err(error) => error!("a port cannot be removed from the tables: {error}"),
        }
        self.ports[id.slot as usize] = None;
    }

    /// Deletes all flows of a source.
    pub fn clear(&mut self, source: Source) {
        let gone: Vec<FlowRef> =
            self.iter().filter(|flow| flow.source == source).map(|flow| flow.flow).collect();
        gone.into_iter().for_each(|flow| self.delete(flow));
    }

    /// Changes the MTU that is enforced on the way to a port's guest.
    pub fn set_mtu(&mut self, id: PortId, mtu: u32) {
        for feed in &mut self.feeds {
            feed.send(Command::SetMtu(id, mtu));
            feed.flush();
        }
        if let Some(port) = self.ports.get_mut(id.slot as usize).and_then(Option::as_mut)
            && port.id == id
        {
            port.mtu = mtu;
            self.tell(id, Change::Mtu);
        }
    }

    /// The MTU that is enforced on the way to a port.
    pub fn mtu(&self, id: PortId) -> Option<u32> {
        let port = self.ports.get(id.slot as usize)?.as_ref().filter(|port| port.id == id)?;
        Some(port.mtu)
    }

    fn tell(&self, port: PortId, change: Change) {
        if let Some(feed) = &self.offload {
            feed.tell(port, change);
        }
    }

    /// Tells one worker something.
    pub fn command(&mut self, worker: usize, command: Command) {
        if let Some(feed) = self.feeds.get_mut(worker) {
            feed.send(command);
            feed.flush();
        }
    }

    /// Has a worker describe what would happen to a packet.
    pub fn trace(&mut self, worker: usize, packet: Box<Packet>, answer: Sender<Trace>) {
        self.command(worker, Command::Trace(packet, answer));
    }

    /// Where the workers will be when they have applied all that has been sent, and behind them where NICs will be when they
    /// have followed.
    pub fn marks(&self) -> Vec<Mark> {
        let offload = self.offload.iter().map(|feed| feed.mark());
        self.feeds.iter().map(WorkerFeed::mark).chain(offload).collect()
    }

    /// All flows.
    pub fn iter(&self) -> impl Iterator<Item = &Flow> {
        self.planner.flows()
    }

    /// The flow of that name.
    pub fn get(&self, flow: FlowRef) -> Option<&Flow> {
        self.planner.get(flow)
    }

    /// Bytes that a port's tables have, over all workers.
    pub fn bytes(&self, id: PortId) -> u64 {
        let (each, shared) = self.planner.bytes(id);
        (each * self.feeds.len() + shared) as u64
    }

    /// Masks of a port's flows.
    pub fn masks(&self, id: PortId) -> usize {
        self.planner.masks(id)
    }

    /// The counters of how a port's packets were handled, one for each worker.
    pub fn path_counters(&self, id: PortId) -> Vec<Arc<PathCounters>> {
        let port = self.ports.get(id.slot as usize).and_then(Option::as_ref).filter(|port| port.id == id);
        port.map_or_else(Vec::new, |port| port.paths.clone())
    }

    /// How a port's packets were handled, over all workers.
    pub fn paths(&self, id: PortId) -> PathStats {
        sum_paths(&self.path_counters(id))
    }
}

/// Why a flow is carried out by the host, if it is or was for some packets, and how many went there.
fn punted(flow: &Flow) -> Option<(String, u64)> {
    let packets = flow.stats().punted;
    match &flow.disposition {
        Disposition::Punt(reason) => Some((reason.to_string(), packets)),
        Disposition::Fast(_) => (packets > 0).then(|| ("some packets of fast flows".to_owned(), packets)),
    }
}

/// The counters of all workers together.
pub fn sum_paths(counters: &[Arc<PathCounters>]) -> PathStats {
    counters.iter().map(|paths| paths.read()).fold(PathStats::default(), |a, b| PathStats {
        l1_hits: a.l1_hits + b.l1_hits,
        l2_hits: a.l2_hits + b.l2_hits,
        misses: a.misses + b.misses,
        pending: a.pending + b.pending,
        punts: a.punts + b.punts,
        keepalives: a.keepalives + b.keepalives,
        unparsable: a.unparsable + b.unparsable,
        refused: a.refused + b.refused,
    })
}

/// Masks that any port may have; each port's own limit is at most this.
pub const MAX_MASKS: usize = 1024;

impl FlowTable for Flows {
    fn put(&mut self, source: Source, spec: FlowSpec) -> Result<FlowRef, PlanError> {
        let slot = spec.matches.key.get(Field::InPort) as usize;
        let port = self.ports.get(slot).and_then(Option::as_ref);
        let Some(&FlowPort { id, max_masks, .. }) = port else {
            return Err(PlanError::NoPort(PortId { slot: slot as u32, generation: 0 }));
        };
        if let Some(flow) = self.planner.find(id, source, &spec.matches)
            && self.planner.get(flow).is_some_and(|known| {
                // Open vSwitch may give a flow of the same match another name when it makes it anew.
                let FlowSpec { actions, ufid, held, .. } = &known.spec;
                (actions, ufid, held) == (&spec.actions, &spec.ufid, &spec.held)
            })
            && !self.planner.is_outdated(flow)
        {
            return Ok(flow);
        }
        let is_new = !self.planner.has_mask(id, source, &spec.matches.mask);
        if is_new && self.planner.masks(id) >= max_masks {
            return Err(PlanError::Masks(max_masks));
        }
        let (flow, updates) = self.planner.add(id, source, spec, IfExists::Replace)?;
        let index = flow.index as usize;
        self.prepare_slots(index);
        self.send(updates);
        if index >= self.born.len() {
            self.born.resize(index + 1, 0);
        }
        self.born[index] = clock::millis();
        self.tell(id, Change::Put(flow));
        Ok(flow)
    }

    fn delete(&mut self, flow: FlowRef) {
        if let Ok((gone, updates)) = self.planner.remove(flow) {
            self.settle(&gone);
            self.send(updates);
            self.tell(gone.port, Change::Delete(flow));
        }
    }

    fn last_used(&self, flow: FlowRef) -> Millis {
        let used = self.planner.get(flow).map_or(0, |flow| flow.stats().last_used);
        used.max(self.born.get(flow.index as usize).copied().unwrap_or(0))
    }
}
