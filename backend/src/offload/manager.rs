//! Carries out what the policy decides and what the tables demand: hardware first on the way in, last on the way out.
//!
//! A flow of a NIC's port is *in* when the device has its rule. Its packets are then seen by no worker; what the device counts
//! is added to the flow's statistics as if the NIC were one more worker. So whoever looks for use (the mirror's keep-alive)
//! finds it there, and a keep-alive that is asked of the NIC becomes a *detour*: the rule is taken out until a worker
//! has given one packet to the host path, and put back at once.
//!
//! A device that does not count is believed to carry what the flow had before, or has in detours, until it says that the rule is
//! idle, or a detour shows it; a rule of which nothing was heard for [`LEASE`] goes out, to see whether the flow comes back.

mod answers;
mod entry;
mod follow;

use super::device::Nic;
use super::eligible::{Neighbours, Reason};
use super::feed::Feed;
use super::policy::{Id, Millis, Place};
use super::{FlowsReport, NicReport, Offloaded, Settings};
use crate::flows::Flows;
use entry::{Entry, Guess};
use nic::offload::{FlowOffload, PortMap, RuleId};
use std::collections::{BTreeMap, HashMap, HashSet, VecDeque};
use std::sync::mpsc::Sender;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};
use switch_core::packet::PortId;

/// Time between two looks at rates.
const TICK: Millis = 250;
/// Flows that are out and looked at in a tick.
const LOOKS: usize = 16_384;
/// Rules that are looked at in a tick, of a device for which that is an effort.
const PROBES: usize = 64;
/// Detours at a time.
const DETOURS: usize = 64;
/// How long a detour waits for a packet: beyond, the flow is idle, and stays out.
const DETOUR: Millis = 2000;
/// How long a rule stays in of which nothing is heard.
const LEASE: Millis = 10_000;
/// Time until the next look while a device has something to do, and while a detour waits for a packet.
const SOON: (Duration, Duration) = (Duration::from_millis(1), Duration::from_millis(4));
/// Time until the next look while a device finds out whether rules are in use.
const FINDING_OUT: Duration = Duration::from_millis(10);
/// Time until the next look if there is no NIC.
const LONG: Duration = Duration::from_secs(60);

/// What is known of a port of a NIC.
#[derive(Default)]
struct PortState {
    neighbours: Neighbours,
    /// Rules that are on their way out because the tables say so: until they are gone, none goes in that may overlap them.
    leaving: HashSet<RuleId>,
}

/// Who waits for rules to be gone, and for all who have waited before: what they know of may be gone from the tables already.
struct Owed {
    rules: HashSet<RuleId>,
    then: Then,
}

enum Then {
    /// So many changes of the tables are followed.
    Follow(u64),
    Tell(Sender<()>),
}

/// All NICs and all flows of their ports.
pub struct Core {
    flows: Arc<Mutex<Flows>>,
    feed: Arc<Feed>,
    nics: BTreeMap<u32, Nic>,
    next_nic: u32,
    next_rule: u64,
    entries: HashMap<Id, Entry>,
    ports: HashMap<PortId, PortState>,
    /// Flows to be looked at anew.
    stale: VecDeque<Id>,
    detours: Vec<Id>,
    /// Flows whose rules are to be taken out for a keep-alive.
    due: Vec<Id>,
    /// Rules that have to go for the changes that are being looked at.
    going: HashSet<RuleId>,
    owed: VecDeque<Owed>,
    told: u64,
    next_tick: Millis,
}

fn lock(flows: &Mutex<Flows>) -> MutexGuard<'_, Flows> {
    flows.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Core {
    /// No NICs.
    pub fn new(flows: Arc<Mutex<Flows>>, feed: Arc<Feed>) -> Core {
        Core {
            flows,
            feed,
            nics: BTreeMap::new(),
            next_nic: 0,
            next_rule: 0,
            entries: HashMap::new(),
            ports: HashMap::new(),
            stale: VecDeque::new(),
            detours: Vec::new(),
            due: Vec::new(),
            going: HashSet::new(),
            owed: VecDeque::new(),
            told: 0,
            next_tick: 0,
        }
    }

    /// One look at everything; gives the time until the next, if nothing comes before.
    pub fn round(&mut self, now: Instant, millis: Millis) -> Duration {
        self.follow(now, millis);
        self.poll(now, millis);
        if millis >= self.next_tick {
            self.next_tick = millis + TICK;
            self.tick(now, millis);
        }
        self.follow_detours(now, millis);
        self.review(millis);
        self.nics.values_mut().for_each(|nic| nic.push(now));
        // Many devices have done it by now.
        self.poll(now, millis);
        self.settle();
        let tick = Duration::from_millis(self.next_tick.saturating_sub(millis).max(1));
        match () {
            () if !self.stale.is_empty() || self.nics.values().any(Nic::is_busy) => SOON.0,
            () if !self.detours.is_empty() => SOON.1,
            () if self.nics.is_empty() => LONG,
            () if self.nics.values().any(Nic::is_finding_out) => FINDING_OUT.min(tick),
            () => tick,
        }
    }

    /// Takes all rules out of all NICs, for good.
    pub fn close(&mut self, now: Instant) {
        std::mem::take(&mut self.nics).into_values().for_each(|nic| nic.close(now));
        self.feed.close();
    }

    /// A NIC has come.
    pub fn add_nic(&mut self, name: String, device: Box<dyn FlowOffload>, settings: Settings, now: Instant) {
        self.remove_nic(&name, now);
        self.nics.insert(self.next_nic, Nic::new(name, device, settings));
        self.next_nic += 1;
    }

    /// A NIC goes.
    pub fn remove_nic(&mut self, name: &str, now: Instant) {
        let Some((&id, _)) = self.nics.iter().find(|(_, nic)| nic.name == name) else { return };
        let gone: Vec<Id> =
            self.entries.iter().filter(|(_, entry)| entry.nic == id).map(|(id, _)| *id).collect();
        if let Some(nic) = self.nics.remove(&id) {
            for port in nic.ports.ports() {
                self.ports.remove(&port);
            }
            let rules: Vec<RuleId> = nic.rules().collect();
            nic.close(now);
            rules.into_iter().for_each(|rule| self.is_out(rule));
        }
        for id in gone {
            self.entries.remove(&id);
        }
        self.watch();
        self.settle();
    }

    /// Has changes of all NICs' ports told.
    fn watch(&self) {
        let _flows = lock(&self.flows);
        self.feed.watch(self.nics.values().flat_map(|nic| nic.ports.ports()).collect());
    }

    /// Which ports are the NIC's.
    pub fn set_ports(&mut self, name: &str, ports: PortMap, done: Sender<()>, now: Instant, millis: Millis) {
        let Some(nic) = self.nics.values_mut().find(|nic| nic.name == name) else {
            let _ = done.send(());
            return;
        };
        nic.ports = ports;
        self.watch();
        self.look_at_all(now, millis);
        // Of all NICs: changes that have not been taken yet are known now, and not seen when they are.
        self.recheck(|_| true, |_| true, now, millis);
        let known: HashSet<PortId> = self.nics.values().flat_map(|nic| nic.ports.ports()).collect();
        self.ports.retain(|port, state| known.contains(port) || !state.leaving.is_empty());
        self.owe(Then::Tell(done));
        self.settle();
    }

    fn nic_of(&self, port: PortId) -> Option<u32> {
        self.nics.iter().find(|(_, nic)| nic.ports.by_id(port).is_some()).map(|(id, _)| *id)
    }

    /// Goes on with flows that are out for a keep-alive.
    fn follow_detours(&mut self, now: Instant, millis: Millis) {
        let mut back = Vec::new();
        let (entries, nics) = (&mut self.entries, &mut self.nics);
        self.detours.retain(|id| {
            let Some(entry) = entries.get_mut(id) else { return false };
            let Some(since) = entry.detour else { return false };
            if entry.rule.is_some() {
                return true; // on its way out
            }
            if entry.take_given() {
                back.push(*id);
                return false;
            }
            if millis.saturating_sub(since) < DETOUR {
                return true;
            }
            // It is idle. The workers are still asked.
            (entry.detour, entry.guess) = (None, None);
            if let Some(nic) = nics.get_mut(&entry.nic) {
                nic.policy.left(*id, millis);
                nic.policy.restart(*id, entry.total().packets, millis);
            }
            false
        });
        for id in back {
            self.insert(id, millis);
        }
        while self.detours.len() < DETOURS
            && let Some(id) = self.due.pop()
        {
            self.begin_detour(id, now, millis);
        }
    }

    /// Takes a flow out until a worker has given a keep-alive.
    fn begin_detour(&mut self, id: Id, now: Instant, millis: Millis) {
        let Some(entry) = self.entries.get_mut(&id) else { return };
        let Some(nic) = self.nics.get_mut(&entry.nic) else { return };
        if let Some(rule) = entry.rule.filter(|&rule| nic.is_in(rule))
            && entry.is_due()
        {
            entry.ask_workers();
            entry.detour = Some(millis);
            self.detours.push(id);
            nic.expel(rule, now);
        }
    }

    /// A look at rates, and what follows from it.
    fn tick(&mut self, now: Instant, millis: Millis) {
        self.due.clear();
        let ids: Vec<u32> = self.nics.keys().copied().collect();
        for id in ids {
            if let Some(nic) = self.nics.get_mut(&id) {
                nic.sample(PROBES);
                let news = nic.poll(now);
                news.into_iter().for_each(|news| self.take(id, news, millis));
            }
            self.look(id, now, millis);
            let Some(nic) = self.nics.get_mut(&id) else { continue };
            let decision = nic.policy.tick(millis);
            decision.remove.into_iter().for_each(|flow| self.evict(id, flow, now, millis));
            decision.insert.into_iter().for_each(|flow| self.insert(flow, millis));
        }
    }

    /// Takes a flow out that could stay.
    fn evict(&mut self, id: u32, owner: Id, now: Instant, millis: Millis) {
        let Some(nic) = self.nics.get_mut(&id) else { return };
        let Some(entry) = self.entries.get_mut(&owner) else { return };
        match entry.rule {
            Some(rule) => {
                nic.policy.leaving(owner, millis);
                nic.expel(rule, now);
            }
            // It is on a detour, and stays there.
            None => {
                entry.guess = None;
                nic.policy.left(owner, millis);
            }
        }
        entry.detour = None;
    }

    /// Looks at what flows have had, and whether their keep-alives are due.
    fn look(&mut self, id: u32, now: Instant, millis: Millis) {
        let Some(nic) = self.nics.get_mut(&id) else { return };
        for owner in nic.policy.next_samples(LOOKS) {
            self.extrapolate(id, owner, millis);
            let Some(nic) = self.nics.get_mut(&id) else { return };
            let Some(entry) = self.entries.get_mut(&owner) else { continue };
            if entry.detour.is_some() {
                continue; // its rate is what it was
            }
            nic.policy.sample(owner, entry.total().packets, millis);
            match entry.rule.filter(|&rule| nic.is_in(rule)) {
                Some(_) if entry.is_due() => self.due.push(owner),
                Some(rule) => {
                    let is_over = |guess: Guess| millis.saturating_sub(guess.told) >= LEASE;
                    if entry.guess.is_some_and(is_over) {
                        entry.expired = true;
                        nic.policy.leaving(owner, millis);
                        nic.expel(rule, now);
                    }
                }
                None if entry.rule.is_some() => {}
                None if entry.asked => {
                    entry.take_given();
                }
                // It left while its keep-alive was due.
                None if entry.was_in && entry.is_due() => entry.ask_workers(),
                None => {}
            }
        }
    }

    /// Puts a flow in that the policy wants there, or that comes back from a detour, if it still may.
    fn insert(&mut self, owner: Id, millis: Millis) {
        let tables = self.flows.clone();
        let flows = lock(&tables);
        let Some(entry) = self.entries.get_mut(&owner).filter(|entry| entry.rule.is_none()) else { return };
        let Some(nic) = self.nics.get_mut(&entry.nic) else { return };
        let Some(state) = self.ports.get(&entry.port) else { return };
        let was_on_detour = entry.detour.take().is_some();
        let answer = match flows.get(entry.flow) {
            Some(flow) if state.leaving.is_empty() => nic.ask(&flows, flow, &state.neighbours),
            // It has just gone, or what goes may overlap it: later, if ever.
            _ => {
                entry.guess = None;
                return nic.policy.left(owner, millis);
            }
        };
        drop(flows);
        let plan = match answer {
            Ok(plan) => plan,
            Err(reason) => {
                nic.policy.left(owner, millis);
                nic.policy.remove(owner);
                (entry.reason, entry.guess) = (Some(reason), None);
                return;
            }
        };
        let rule = RuleId(self.next_rule);
        self.next_rule += 1;
        match nic.insert(rule, owner, plan) {
            Ok(()) => {
                entry.rule = Some(rule);
                if !was_on_detour {
                    nic.policy.entering(owner, millis);
                    // What was asked of the NIC before it had the flow, workers have given.
                    if let (Some(slot), false) = (entry.split().0, entry.was_in) {
                        slot.clear_due();
                    }
                }
            }
            Err(error) => self.refused(owner, &error, millis),
        }
    }

    fn stands(&self, id: Id, entry: &Entry) -> Offloaded {
        if let Some(reason) = &entry.reason {
            return Offloaded::No(reason.clone());
        }
        if let (None, Some(error)) = (entry.rule, entry.rejected) {
            return Offloaded::No(Reason::Rejected(error));
        }
        let Some(nic) = self.nics.get(&entry.nic) else { return Offloaded::No(Reason::Cold) };
        match nic.policy.place(id) {
            Place::Inside => Offloaded::Yes,
            Place::Entering => Offloaded::Waiting,
            Place::Out | Place::Leaving if nic.policy.is_waiting(id) => Offloaded::Waiting,
            Place::Out | Place::Leaving => Offloaded::No(Reason::Cold),
        }
    }

    /// How flows stand.
    pub fn flows_report(&self) -> FlowsReport {
        let flows = self.entries.iter();
        let flows =
            flows.map(|(&id, entry)| (entry.flow, (self.stands(id, entry), entry.estimated))).collect();
        FlowsReport { flows }
    }

    /// How NICs stand.
    pub fn report(&self) -> Vec<NicReport> {
        let mut reports: BTreeMap<u32, NicReport> =
            self.nics.iter().map(|(&id, nic)| (id, nic.report())).collect();
        for (&id, entry) in &self.entries {
            let Some(report) = reports.get_mut(&entry.nic) else { continue };
            match self.stands(id, entry) {
                Offloaded::Yes => {}
                Offloaded::Waiting => report.waiting += 1,
                Offloaded::No(reason) => *report.reasons.entry(reason.to_string()).or_default() += 1,
            }
        }
        reports.into_values().collect()
    }
}

#[cfg(test)]
mod tests;
