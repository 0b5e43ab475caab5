//! What OVS's datapath has, what the tables have of it, and the changes that make the two the same.
//!
//! Reads and events change only what is known of the datapath. [`State::apply`] then brings the tables in step, deletions
//! first: a new flow may overlap one that is gone. So a read is never half in the tables, and the events that were on their
//! way meanwhile come on top of it: a flow that they delete does not return by an older read.

use super::classes::Taking;
use super::keepalive::{Ends, KeepAlive};
use super::packed::Packed;
use super::ports::{PortKind, Ports, concerns, goes_by_tunnel};
use super::{MAX_LISTED, MirrorReport, MirrorTable, Refused};
use crate::host::Millis;
use crate::ovs::source::{Change, Sighting, Unreadable};
use crate::underlay::HostFlows;
use std::collections::{HashMap, HashSet, VecDeque};
use std::sync::Arc;
use switch_core::flow::{FlowRef, FlowSpec, Source, Ufid};
use switch_core::planner::PlanError;

/// A flow of the datapath.
struct Entry {
    flow: Result<Packed, Box<Unreadable>>,
    /// [`Sighting::print`] of what it was made of; none if not of a sighting, or ports have other names since.
    print: Option<u64>,
    place: Place,
    /// Whether it waits to be put.
    is_queued: bool,
    /// The read that saw it last.
    read: u32,
    /// Whether the last read did not see it.
    is_missing: bool,
}

/// Where a flow is in the tables.
enum Place {
    /// Not, or not yet.
    Out,
    /// There; the host carries it out for the reason given, if any.
    In(FlowRef, Option<Box<str>>),
    /// Not, as its ingress is the host's: these have it.
    Host(Arc<HostFlows>),
    /// Not while this other flow of the datapath is, which matches some of the same packets.
    Blocked(Ufid),
    /// Not, for that reason.
    Refused(PlanError),
}

/// Whether the refusal may pass although the flow stays the same.
fn may_pass(error: &PlanError) -> bool {
    use PlanError::*;
    matches!(error, NoPort(_) | Slot(_) | NoFlow | Exists(_) | Overlaps(_) | Masks(_) | Full(_))
}

/// What the datapath has, and what the tables have of it.
pub struct State {
    ports: Ports,
    entries: HashMap<Ufid, Entry>,
    /// By index of the tables: whose flow is there.
    owners: Vec<Option<Ufid>>,
    deletes: VecDeque<FlowRef>,
    puts: VecDeque<Ufid>,
    /// By flow: the flows that wait for it to go.
    blocked: HashMap<Ufid, HashSet<Ufid>>,
    /// Flows that were refused for what may pass. Some may be gone or in by now.
    refused: VecDeque<Ufid>,
    /// Whether a flow went since the last [`State::retry`].
    has_room: bool,
    /// The present read, or the last.
    read: u32,
    /// How many of the flows it saw, or an event has told of since.
    seen: usize,
    /// What it saw that no read or event has told of.
    unknown: HashSet<Ufid>,
    taking: Taking,
}

impl State {
    /// Nothing known, no ports.
    pub fn new() -> State {
        State {
            ports: Ports::default(),
            entries: HashMap::new(),
            owners: Vec::new(),
            deletes: VecDeque::new(),
            puts: VecDeque::new(),
            blocked: HashMap::new(),
            refused: VecDeque::new(),
            has_room: false,
            read: 0,
            seen: 0,
            unknown: HashSet::new(),
            taking: Taking::default(),
        }
    }

    /// The ports.
    pub fn ports(&self) -> &Ports {
        &self.ports
    }

    /// Other ports or restrictions. Flows of ports that are gone go; those that are held from now on, or no longer, are
    /// put again.
    pub fn set_ports(&mut self, ports: Ports) {
        let gone = self.ports.without(&ports);
        let (mut deleted, mut changed) = (Vec::new(), Vec::new());
        for (&id, entry) in &mut self.entries {
            entry.print = None;
            let Ok(flow) = &entry.flow else { continue };
            if !gone.is_empty() && concerns(flow, &gone) {
                deleted.push(id);
            } else if self.ports.held(flow) != ports.held(flow) {
                changed.push(id);
            }
        }
        self.ports = ports;
        deleted.into_iter().for_each(|id| self.forget(id));
        changed.into_iter().for_each(|id| self.enqueue(id));
    }

    /// Flows that have to do with tunnels are put again.
    pub fn reconsider(&mut self) {
        let concerned = |(&id, entry): (&Ufid, &Entry)| {
            entry.flow.as_ref().is_ok_and(|flow| goes_by_tunnel(flow.actions())).then_some(id)
        };
        let concerned: Vec<Ufid> = self.entries.iter().filter_map(concerned).collect();
        concerned.into_iter().for_each(|id| self.enqueue(id));
    }

    /// A read of the datapath begins.
    pub fn begin(&mut self) {
        self.read = self.read.wrapping_add(1);
        self.seen = 0;
        self.unknown.clear();
    }

    /// The read comes across a flow. Each thread of the userspace datapath has its own copy: the first counts.
    pub fn saw(&mut self, Sighting { id, print, read }: Sighting<'_>) {
        if let Some(entry) = self.entries.get_mut(&id) {
            if entry.read == self.read {
                return;
            }
            if print.is_some() && entry.print == print {
                (entry.read, entry.is_missing) = (self.read, false);
                self.seen += 1;
                return;
            }
        }
        self.learn(id, read(), print);
    }

    /// The datapath has that flow now.
    fn learn(&mut self, id: Ufid, flow: Result<FlowSpec, Unreadable>, print: Option<u64>) {
        let flow = flow.map(Packed::new).map_err(Box::new);
        self.unknown.remove(&id);
        let read = self.read;
        let Some(entry) = self.entries.get_mut(&id) else {
            let entry = Entry { flow, print, place: Place::Out, is_queued: false, read, is_missing: false };
            self.entries.insert(id, entry);
            self.seen += 1;
            return self.enqueue(id);
        };
        self.seen += (entry.read != read) as usize;
        (entry.read, entry.is_missing, entry.print) = (read, false, print);
        if entry.flow == flow {
            return;
        }
        let is_same_match = matches!((&entry.flow, &flow), (Ok(old), Ok(new)) if old.has_match_of(new));
        entry.flow = flow;
        if !is_same_match {
            let place = std::mem::replace(&mut entry.place, Place::Out);
            self.vacate(id, place);
        }
        self.enqueue(id);
    }

    /// The read tells that a flow is there.
    pub fn saw_id(&mut self, id: Ufid) {
        match self.entries.get_mut(&id) {
            Some(entry) => {
                self.seen += (entry.read != self.read) as usize;
                (entry.read, entry.is_missing) = (self.read, false);
            }
            None => {
                self.unknown.insert(id);
            }
        }
    }

    /// Applies an event; `false` if it says that everything is to be read again.
    pub fn absorb(&mut self, change: Change) -> bool {
        match change {
            Change::Put(flow) => self.learn(flow.id, flow.flow, None),
            Change::Delete(id) => {
                self.unknown.remove(&id);
                self.forget(id);
            }
            Change::Resync | Change::Lost => return false,
        }
        true
    }

    /// The read is through, and so are the events that were there at its end. A flow that it did not see goes if such a
    /// read misses none (`is_exact`) or if the one before did not see it either. Whether flows are missing that the next
    /// read must tell about.
    pub fn finish(&mut self, is_exact: bool) -> bool {
        let mut is_open = false;
        if self.seen == self.entries.len() {
            return is_open;
        }
        let mut gone = Vec::new();
        for (&id, entry) in self.entries.iter_mut().filter(|(_, entry)| entry.read != self.read) {
            if is_exact || entry.is_missing {
                gone.push(id);
            } else {
                entry.is_missing = true;
                is_open = true;
            }
        }
        gone.into_iter().for_each(|id| self.forget(id));
        is_open
    }

    /// Whether the read saw flows that nothing has told of.
    pub fn has_unknown(&self) -> bool {
        !self.unknown.is_empty()
    }

    /// Tries some flows again that were refused; if `always` is not set, only if something has gone since.
    pub fn retry(&mut self, max: usize, always: bool) {
        if !std::mem::take(&mut self.has_room) && !always {
            return;
        }
        for _ in 0..max.min(self.refused.len()) {
            let Some(id) = self.refused.pop_front() else { break };
            if self.entries.get(&id).is_some_and(|entry| matches!(entry.place, Place::Refused(_))) {
                self.enqueue(id);
            }
        }
    }

    fn enqueue(&mut self, id: Ufid) {
        if let Some(entry) = self.entries.get_mut(&id)
            && entry.flow.is_ok()
            && !entry.is_queued
        {
            entry.is_queued = true;
            self.puts.push_back(id);
        }
    }

    /// The datapath has the flow no longer.
    fn forget(&mut self, id: Ufid) {
        if let Some(entry) = self.entries.remove(&id) {
            self.seen -= (entry.read == self.read) as usize;
            self.vacate(id, entry.place);
        }
    }

    /// Gives up a flow's place in the tables.
    fn vacate(&mut self, id: Ufid, place: Place) {
        self.taking.leave(id);
        match place {
            Place::In(flow, _) => {
                if let Some(owner) =
                    self.owners.get_mut(flow.index as usize).filter(|owner| **owner == Some(id))
                {
                    *owner = None;
                }
                self.deletes.push_back(flow);
                self.has_room = true;
                self.unblock(id);
            }
            Place::Blocked(by) => {
                if let Some(waiting) = self.blocked.get_mut(&by) {
                    waiting.remove(&id);
                    if waiting.is_empty() {
                        self.blocked.remove(&by);
                    }
                }
            }
            Place::Host(flows) => flows.delete(id),
            Place::Out | Place::Refused(_) => {}
        }
    }

    /// Has all try again that wait for the flow to go.
    fn unblock(&mut self, by: Ufid) {
        for id in self.blocked.remove(&by).into_iter().flatten() {
            if let Some(entry) = self.entries.get_mut(&id) {
                entry.place = Place::Out;
                self.enqueue(id);
            }
        }
    }

    /// Changes the tables, by at most `max` changes; whether there are more.
    pub fn apply(
        &mut self,
        now: Millis,
        table: &mut dyn MirrorTable,
        alive: &mut KeepAlive,
        max: usize,
    ) -> bool {
        for _ in 0..max {
            if let Some(flow) = self.deletes.pop_front() {
                if self.owners.get(flow.index as usize).is_none_or(Option::is_none) {
                    alive.remove(flow.index);
                }
                table.delete(flow);
            } else if let Some(id) = self.puts.pop_front() {
                self.put(id, now, table, alive);
            } else {
                return false;
            }
        }
        !(self.deletes.is_empty() && self.puts.is_empty())
    }

    fn put(&mut self, id: Ufid, now: Millis, table: &mut dyn MirrorTable, alive: &mut KeepAlive) {
        // One that is gone since may have come back, and be queued twice.
        let Some(entry) = self.entries.get_mut(&id).filter(|entry| entry.is_queued) else { return };
        entry.is_queued = false;
        let Ok(flow) = &entry.flow else { return };
        let held = flow.held().or_else(|| self.ports.held(flow)).map(str::to_string);
        let spec = FlowSpec { held, ..flow.unpack(id) };
        match self.ports.kind(flow.in_port()) {
            Some(PortKind::Host(host)) => {
                host.put(id, spec);
                entry.place = Place::Host(host.clone());
                return;
            }
            Some(PortKind::Tunnels(Some(df))) => df.learn(&spec.matches),
            _ => {}
        }
        let ends = Ends::of(&spec);
        let before = std::mem::replace(&mut entry.place, Place::Out);
        match table.put(Source::Learned, spec) {
            Ok(flow) => {
                match before {
                    // The tables keep a flow of the same match at its index.
                    Place::In(old, _) if old.index == flow.index => {}
                    other => self.vacate(id, other),
                }
                let ends_of_tunnels = table.endpoints(flow).to_vec();
                let punt = table.punted(flow).map(String::into_boxed_str);
                match punt {
                    None => alive.add(flow, ends, table.counters(flow), now),
                    Some(_) => alive.remove(flow.index),
                }
                self.enter(id, flow, punt);
                if let Some(Entry { flow: Ok(flow), place: Place::In(_, punt), .. }) = self.entries.get(&id) {
                    self.taking.enter(id, flow, punt.is_none(), &ends_of_tunnels, &self.ports);
                }
            }
            Err(error) => {
                self.vacate(id, before);
                self.refuse(id, error);
                // The kernel carries it out, as if it were a punt.
                if let Some(Entry { flow: Ok(flow), .. }) = self.entries.get(&id) {
                    self.taking.enter(id, flow, false, &[], &self.ports);
                }
            }
        }
    }

    /// The flow has a place in the tables. Another may have had it, of the same match: events of two flows can come in the
    /// wrong order. That one waits until this is gone.
    fn enter(&mut self, id: Ufid, flow: FlowRef, punt: Option<Box<str>>) {
        let index = flow.index as usize;
        if index >= self.owners.len() {
            self.owners.resize(index + 1, None);
        }
        let other = self.owners[index].replace(id).filter(|other| *other != id);
        if let Some(entry) = self.entries.get_mut(&id) {
            entry.place = Place::In(flow, punt);
        }
        if let Some(other) = other {
            self.taking.leave(other);
            self.unblock(other);
            self.block(other, id);
        }
    }

    fn block(&mut self, id: Ufid, by: Ufid) {
        if let Some(entry) = self.entries.get_mut(&id) {
            entry.place = Place::Blocked(by);
            self.blocked.entry(by).or_default().insert(id);
        }
    }

    fn refuse(&mut self, id: Ufid, error: PlanError) {
        let owner = match error {
            PlanError::Overlaps(flow) => self.owners.get(flow.index as usize).copied().flatten(),
            _ => None,
        };
        if let Some(by) = owner.filter(|by| *by != id) {
            return self.block(id, by);
        }
        if may_pass(&error) {
            self.refused.push_back(id);
        }
        if let Some(entry) = self.entries.get_mut(&id) {
            entry.place = Place::Refused(error);
        }
    }

    /// Takes from devices that stay OVS's own the packets that [`Taking`] says, and no others any more. `settle` waits until
    /// the workers have the flows: before, packets would only miss.
    pub fn select(&mut self, settle: impl FnOnce()) {
        let changes = self.taking.changes();
        let set = |wanted| {
            for &(slot, class, _) in changes.iter().filter(|change| change.2 == wanted) {
                if let Some(selection) = self.ports.selection(slot) {
                    selection.set(class, wanted);
                }
            }
        };
        set(false);
        if changes.iter().any(|change| change.2) {
            settle();
            set(true);
        }
    }

    /// Number of flows in the tables.
    pub fn len(&self) -> usize {
        self.entries.values().filter(|entry| matches!(entry.place, Place::In(..))).count()
    }

    /// Fills in what is told of flows.
    pub fn report(&self, report: &mut MirrorReport) {
        for (&id, entry) in &self.entries {
            let flow = match &entry.flow {
                Ok(flow) => flow,
                Err(unreadable) => {
                    report.unreadable += 1;
                    if report.unreadable_flows.len() < MAX_LISTED {
                        report.unreadable_flows.push(Unreadable::clone(unreadable));
                    }
                    continue;
                }
            };
            let reason = match &entry.place {
                Place::Out => continue,     // it has only just been heard of
                Place::Host(_) => continue, // no packets of its come by here
                Place::In(_, punt) => {
                    report.flows += 1;
                    match punt {
                        None => report.fast += 1,
                        Some(reason) => match report.punts.get_mut(&**reason) {
                            Some(count) => *count += 1,
                            None => {
                                report.punts.insert(reason.to_string(), 1);
                            }
                        },
                    }
                    continue;
                }
                Place::Blocked(by) => format!("it overlaps the flow {by}"),
                Place::Refused(error) => error.to_string(),
            };
            report.refused += 1;
            if report.refused_flows.len() < MAX_LISTED {
                report.refused_flows.push(Refused { spec: flow.unpack(id), reason });
            }
        }
    }
}
