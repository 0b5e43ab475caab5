//! A datapath, tables and a clock for the mirror's tests.

use super::follow::Follower;
use super::ports::{MirrorPort, PortKind, Restriction};
use super::{MirrorReport, MirrorTable, Settings};
use crate::datapath::Mark;
use crate::host::{FlowTable, Millis};
use crate::ovs::source::{Change, DatapathFlow, FlowSource, Sighting, SourceError, Unreadable};
use crate::wake::Waker;
use std::collections::{BTreeMap, HashSet, VecDeque};
use std::hash::{BuildHasher, RandomState};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::{Receiver, channel};
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::Duration;
use switch_core::action::{Action, PortRef};
use switch_core::flow::{FlowRef, FlowSpec, Match, PortNames, Source, Ufid};
use switch_core::key::{Field, Key, Mask};
use switch_core::packet::PortId;
use switch_core::planner::PlanError;
use switch_core::slab::FlowCounters;

/// A flow as the datapath has it: ports by name.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct DpFlow {
    pub from: &'static str,
    /// Destination address; none is any.
    pub to: Option<u64>,
    pub out: Vec<&'static str>,
    pub readable: bool,
}

/// A flow from a port to one address and port.
pub fn dp(from: &'static str, to: u64, out: &'static str) -> DpFlow {
    DpFlow { from, to: Some(to), out: vec![out], readable: true }
}

/// A flow of all addresses.
pub fn wide(from: &'static str, out: &'static str) -> DpFlow {
    DpFlow { to: None, ..dp(from, 0, out) }
}

impl DpFlow {
    pub fn spec(&self, names: &dyn PortNames) -> Option<FlowSpec> {
        let port = names.ingress(self.from)?;
        let (mut key, mut mask) = (Key::default(), Mask::EMPTY);
        key.set(Field::InPort, port.slot as u128);
        mask.set_exact(Field::InPort);
        mask.set_exact(Field::RecircId);
        if let Some(to) = self.to {
            key.set(Field::EthDst, to as u128);
            mask.set_exact(Field::EthDst);
        }
        let out = |name: &&str| match names.by_name(name) {
            Some(id) => Action::Output(PortRef::Ours(id)),
            None => Action::Output(PortRef::Foreign(name.to_string())),
        };
        let actions = self.out.iter().map(out).collect();
        let matches = Match { key, mask, ..Match::default() };
        Some(FlowSpec { matches, actions, ufid: None, held: None })
    }

    fn read(&self, names: &dyn PortNames, id: Ufid) -> Option<DatapathFlow> {
        let spec = self.spec(names)?;
        let unreadable =
            || Unreadable { text: format!("flow to {:?}", self.to), reason: "a strange field".into() };
        let flow = if self.readable { Ok(spec) } else { Err(unreadable()) };
        Some(DatapathFlow { id, flow })
    }
}

#[derive(Clone)]
pub enum Event {
    Put(Ufid, DpFlow),
    Delete(Ufid),
    Lost,
}

type Hook = Box<dyn FnOnce(&mut Datapath) + Send>;

/// OVS's datapath.
#[derive(Default)]
pub struct Datapath {
    pub flows: BTreeMap<Ufid, DpFlow>,
    pub events: VecDeque<Event>,
    pub error: Option<String>,
    pub is_exact: bool,
    pub has_ids: bool,
    /// What the next reads leave out, one by one.
    pub skips: VecDeque<HashSet<Ufid>>,
    /// Happens while the next read is under way, after it has seen all.
    pub meanwhile: Option<Hook>,
    pub dumps: usize,
    pub id_dumps: usize,
    /// Flows that were not told by their print.
    pub taken_apart: usize,
    /// Happens in each read.
    pub effort: Option<Box<dyn FnMut() + Send>>,
}

impl Datapath {
    pub fn put(&mut self, id: u128, flow: DpFlow) {
        self.flows.insert(Ufid(id), flow.clone());
        self.events.push_back(Event::Put(Ufid(id), flow));
    }

    pub fn delete(&mut self, id: u128) {
        if self.flows.remove(&Ufid(id)).is_some() {
            self.events.push_back(Event::Delete(Ufid(id)));
        }
    }

    fn read(&mut self) -> Result<Vec<(Ufid, DpFlow)>, SourceError> {
        if let Some(error) = &self.error {
            return Err(SourceError(error.clone()));
        }
        if let Some(effort) = &mut self.effort {
            effort();
        }
        let skip = self.skips.pop_front().unwrap_or_default();
        let seen = self.flows.clone().into_iter().filter(|(id, _)| !skip.contains(id)).collect();
        if let Some(hook) = self.meanwhile.take() {
            hook(self);
        }
        Ok(seen)
    }
}

pub struct FakeSource {
    pub datapath: Arc<Mutex<Datapath>>,
    /// The ports that the last dump was made for: ids of other flows are left out.
    ours: HashSet<&'static str>,
    hash: RandomState,
}

impl FakeSource {
    pub fn new(datapath: Arc<Mutex<Datapath>>) -> FakeSource {
        FakeSource { datapath, ours: HashSet::new(), hash: RandomState::new() }
    }
}

impl FlowSource for FakeSource {
    fn describe(&self) -> String {
        "the test's datapath".into()
    }

    fn is_exact(&self) -> bool {
        self.datapath.lock().unwrap().is_exact
    }

    fn dump(&mut self, names: &dyn PortNames, each: &mut dyn FnMut(Sighting<'_>)) -> Result<(), SourceError> {
        let flows = {
            let mut datapath = self.datapath.lock().unwrap();
            datapath.dumps += 1;
            datapath.read()?
        };
        self.ours = ["a", "b", "c"].into_iter().filter(|name| names.ingress(name).is_some()).collect();
        for (id, flow) in &flows {
            let Some(DatapathFlow { id, flow: read }) = flow.read(names, *id) else { continue };
            let read = || {
                self.datapath.lock().unwrap().taken_apart += 1;
                read.clone()
            };
            each(Sighting { id, print: Some(self.hash.hash_one(flow)), read: &read });
        }
        Ok(())
    }

    fn dump_ids(&mut self, each: &mut dyn FnMut(Ufid)) -> Result<bool, SourceError> {
        let flows = {
            let mut datapath = self.datapath.lock().unwrap();
            if !datapath.has_ids {
                return Ok(false);
            }
            datapath.id_dumps += 1;
            datapath.read()?
        };
        flows.iter().filter(|(_, flow)| self.ours.contains(flow.from)).for_each(|(id, _)| each(*id));
        Ok(true)
    }

    fn sweep_interval(&self) -> Duration {
        Duration::from_millis(1000)
    }

    fn wait(
        &mut self,
        names: &dyn PortNames,
        _: &Waker,
        _: Duration,
        changes: &mut Vec<Change>,
    ) -> Result<(), SourceError> {
        let mut datapath = self.datapath.lock().unwrap();
        if let Some(error) = &datapath.error {
            return Err(SourceError(error.clone()));
        }
        // A few at a time, as sockets give them.
        let some = datapath.events.len().min(3);
        let events: Vec<_> = datapath.events.drain(..some).collect();
        changes.extend(events.into_iter().filter_map(|event| match event {
            Event::Put(id, flow) => Some(Change::Put(Box::new(flow.read(names, id)?))),
            Event::Delete(id) => Some(Change::Delete(id)),
            Event::Lost => Some(Change::Lost),
        }));
        Ok(())
    }
}

pub struct FakeFlow {
    pub flow: FlowRef,
    pub spec: FlowSpec,
    pub counters: Vec<FlowCounters>,
    /// Keep-alives given.
    pub kept: u64,
}

impl FakeFlow {
    fn new(flow: FlowRef, spec: FlowSpec) -> FakeFlow {
        FakeFlow { flow, spec, counters: (0..WORKERS).map(|_| FlowCounters::default()).collect(), kept: 0 }
    }

    /// Keep-alives asked for.
    pub fn asked(&self) -> u64 {
        self.kept + self.counters.iter().filter(|counters| counters.is_due()).count() as u64
    }
}

/// Tables that keep no more than the rules.
#[derive(Default)]
pub struct FakeTable {
    pub flows: BTreeMap<u32, FakeFlow>,
    generation: u32,
    pub max: Option<usize>,
    pub puts: usize,
    pub deletes: usize,
}

pub const WORKERS: usize = 2;

impl FakeTable {
    /// Packets of a flow on a worker: one of them is the keep-alive, if one is due.
    pub fn traffic(&mut self, index: u32, worker: usize, packets: u64) {
        let flow = self.flows.get_mut(&index).unwrap();
        let counters = flow.counters[worker].slot().expect("the flow's slot");
        let kept = counters.is_due() as u64;
        counters.clear_due();
        flow.kept += kept;
        (kept..packets).for_each(|_| counters.credit(60, 0, 1));
    }

    /// A flow that overlaps no other, without the search for one.
    pub fn insert(&mut self, spec: FlowSpec) -> FlowRef {
        let flow = self.next(self.flows.len() as u32);
        self.flows.insert(flow.index, FakeFlow::new(flow, spec));
        flow
    }

    pub fn content(&self) -> Vec<FlowSpec> {
        let mut content: Vec<_> = self.flows.values().map(|flow| flow.spec.clone()).collect();
        content.sort_by_key(|spec| spec.matches.key.words);
        content
    }

    fn next(&mut self, index: u32) -> FlowRef {
        self.generation += 1;
        FlowRef { index, generation: self.generation }
    }
}

impl FlowTable for FakeTable {
    fn put(&mut self, source: Source, spec: FlowSpec) -> Result<FlowRef, PlanError> {
        assert_eq!(source, Source::Learned);
        self.puts += 1;
        let found = self.flows.values().find(|flow| flow.spec.matches == spec.matches);
        if let Some(FakeFlow { flow, spec: old, .. }) = found {
            let old_flow = *flow;
            if old.actions == spec.actions && old.held == spec.held {
                return Ok(old_flow);
            }
            let flow = self.next(old_flow.index);
            let entry = self.flows.get_mut(&flow.index).unwrap();
            (entry.flow, entry.spec) = (flow, spec);
            return Ok(flow);
        }
        let Match { key, mask, .. } = &spec.matches;
        let overlaps = |flow: &&FakeFlow| key.overlaps(mask, &flow.spec.matches.key, &flow.spec.matches.mask);
        if let Some(other) = self.flows.values().find(overlaps) {
            return Err(PlanError::Overlaps(other.flow));
        }
        if let Some(max) = self.max.filter(|max| self.flows.len() >= *max) {
            return Err(PlanError::Full(max));
        }
        let index = (0..).find(|index| !self.flows.contains_key(index)).unwrap();
        let flow = self.next(index);
        self.flows.insert(index, FakeFlow::new(flow, spec));
        Ok(flow)
    }

    fn delete(&mut self, flow: FlowRef) {
        self.deletes += 1;
        if self.flows.get(&flow.index).is_some_and(|entry| entry.flow == flow) {
            self.flows.remove(&flow.index);
        }
    }

    fn last_used(&self, _: FlowRef) -> Millis {
        0
    }
}

impl MirrorTable for FakeTable {
    fn punted(&self, flow: FlowRef) -> Option<String> {
        let spec = &self.flows.get(&flow.index).filter(|entry| entry.flow == flow)?.spec;
        let foreign = |action: &Action| match action {
            Action::Output(PortRef::Foreign(name)) => Some(format!("foreign port {name}")),
            _ => None,
        };
        spec.held.clone().or_else(|| spec.actions.iter().find_map(foreign))
    }

    fn counters(&self, flow: FlowRef) -> &[FlowCounters] {
        let entry = self.flows.get(&flow.index).filter(|entry| entry.flow == flow);
        entry.map_or(&[], |entry| &entry.counters)
    }

    fn marks(&self) -> Vec<Mark> {
        Vec::new()
    }
}

/// A port of ours in that slot.
pub fn port(name: &str, slot: u32) -> MirrorPort {
    let id = PortId { slot, generation: 1 };
    MirrorPort { name: name.into(), id, restriction: Restriction::default(), kind: PortKind::Own }
}

/// The mirror between them.
pub struct Rig {
    pub datapath: Arc<Mutex<Datapath>>,
    pub table: Arc<Mutex<FakeTable>>,
    pub follower: Follower,
    pub time: Arc<AtomicU64>,
    /// What the thread has had of a processor, in milliseconds.
    pub spent: Arc<AtomicU64>,
    waker: Waker,
}

impl Rig {
    /// Ports a and b, and a datapath like the kernel's.
    pub fn new() -> Rig {
        let datapath = Arc::new(Mutex::new(Datapath { has_ids: true, ..Datapath::default() }));
        let table = Arc::new(Mutex::new(FakeTable::default()));
        let time = Arc::new(AtomicU64::new(1));
        let (clock, spent) = (time.clone(), Arc::new(AtomicU64::new(0)));
        let cpu = spent.clone();
        let follower = Follower::new(
            Box::new(FakeSource::new(datapath.clone())),
            table.clone(),
            Settings::default(),
            Box::new(move || clock.load(Ordering::Relaxed)),
            Box::new(move || Duration::from_millis(cpu.load(Ordering::Relaxed))),
        );
        let mut rig = Rig { datapath, table, follower, time, spent, waker: Waker::new().unwrap() };
        rig.follower.set_ports(vec![port("a", 1), port("b", 2)]);
        rig.run(1);
        rig
    }

    pub fn datapath(&self) -> MutexGuard<'_, Datapath> {
        self.datapath.lock().unwrap()
    }

    pub fn table(&self) -> MutexGuard<'_, FakeTable> {
        self.table.lock().unwrap()
    }

    /// Flows put into the tables so far, and deleted.
    pub fn changes(&self) -> (usize, usize) {
        let table = self.table();
        (table.puts, table.deletes)
    }

    /// What the source can do from now on.
    pub fn is_like(&mut self, has_ids: bool, is_exact: bool) {
        let mut datapath = self.datapath();
        (datapath.has_ids, datapath.is_exact) = (has_ids, is_exact);
    }

    /// Nothing happens to the datapath any more.
    pub fn calm(&mut self) {
        let mut datapath = self.datapath();
        (datapath.error, datapath.meanwhile) = (None, None);
        datapath.skips.clear();
    }

    pub fn now(&self) -> Millis {
        self.time.load(Ordering::Relaxed)
    }

    /// Lets so much time pass. What happens at its end is done.
    pub fn run(&mut self, millis: Millis) {
        let end = self.now() + millis;
        loop {
            self.follower.wait(&self.waker, 0);
            while self.follower.report().error.is_none() && !self.datapath().events.is_empty() {
                self.follower.wait(&self.waker, 0);
            }
            let next = self.follower.round(&self.waker).max(1);
            if self.now() >= end {
                break;
            }
            self.time.fetch_add(next.min(end - self.now()), Ordering::Relaxed);
        }
    }

    pub fn start_sync(&mut self) -> Receiver<Result<usize, String>> {
        let (answer, wait) = channel();
        self.follower.sync(answer);
        wait
    }

    /// Syncs, which takes a second at most.
    pub fn sync(&mut self) -> Result<usize, String> {
        let answer = self.start_sync();
        self.run(1000);
        answer.try_recv().expect("no answer")
    }

    pub fn report(&self) -> MirrorReport {
        self.follower.report()
    }

    /// What the tables would have if they were in step.
    pub fn wanted(&self, names: &dyn PortNames) -> Vec<FlowSpec> {
        let datapath = self.datapath();
        let mut wanted: Vec<_> = datapath.flows.values().filter_map(|flow| flow.spec(names)).collect();
        wanted.sort_by_key(|spec| spec.matches.key.words);
        wanted
    }
}
