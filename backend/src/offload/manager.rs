//! Carries out what the policy decides and what the tables demand: hardware first on the way in, last on the way out.
//!
//! A flow of a NIC's port is *in* when the device has its rule. Its packets are then seen by no worker; what the device counts
//! is added to the flow's statistics as if the NIC were one more worker. So whoever looks for use (the mirror's keep-alive)
//! finds it there, and a keep-alive that is asked of the NIC becomes a *detour*: the rule is taken out until a worker
//! has given one packet to the host path, and put back at once.
//!
//! A device that does not count is believed to carry what the flow had before, until it says that the rule is idle, or a
//! detour shows it; a rule of which nothing was heard for [`LEASE`] goes out, to see whether the flow comes back.

use super::device::{News, Nic};
use super::eligible::{Neighbours, Reason};
use super::feed::{Change, Feed};
use super::policy::{Failure, Id, Millis, Place};
use super::{FlowsReport, NicReport, Offloaded, Settings};
use crate::flows::Flows;
use log::info;
use nic::offload::{CounterKind, Counts, FlowOffload, OpError, PortMap, RuleId};
use std::collections::{BTreeMap, HashMap, HashSet, VecDeque};
use std::sync::mpsc::Sender;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};
use switch_core::flow::FlowRef;
use switch_core::packet::PortId;
use switch_core::planner::Flow;
use switch_core::slab::{FlowCounters, Slot};

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
pub const LEASE: Millis = 10_000;
/// Flows that are dealt with under one lock of the tables.
const BATCH: usize = 256;
/// Time until the next look while a device has something to do, and while a detour waits for a packet.
const SOON: (Duration, Duration) = (Duration::from_millis(1), Duration::from_millis(4));
/// Time until the next look if there is no NIC.
const LONG: Duration = Duration::from_secs(60);

/// A flow whose ingress is a port of a NIC.
struct Entry {
    flow: FlowRef,
    port: PortId,
    nic: u32,
    /// By worker, and behind them that of the NIC.
    counters: Vec<FlowCounters>,
    /// Why it may not go in.
    reason: Option<Reason>,
    rule: Option<RuleId>,
    /// Since when it is out only until a worker has given a keep-alive.
    detour: Option<Millis>,
    /// Whether workers were asked for a keep-alive in the NIC's place.
    asked: bool,
    /// Whether the NIC has carried any of it.
    was_in: bool,
    guess: Option<Guess>,
    estimated: bool,
    /// It is to be looked at anew.
    stale: bool,
    /// The rule goes because nothing is known of it.
    expired: bool,
}

/// What a device is believed to carry that does not count.
#[derive(Clone, Copy, Debug)]
struct Guess {
    /// Packets a second.
    rate: f64,
    /// Bytes of each.
    size: f64,
    /// Packets, not whole ones yet.
    part: f64,
    /// Up to when it was counted.
    upto: Millis,
    /// When it was known last whether there are any.
    told: Millis,
    idle: bool,
}

impl Entry {
    /// The NIC's slot of statistics and the workers'.
    fn split(&self) -> (Option<&Slot>, impl Iterator<Item = &Slot>) {
        let (nic, workers) = match self.counters.split_last() {
            Some((nic, workers)) => (nic.slot(), workers),
            None => (None, &[][..]),
        };
        (nic, workers.iter().filter_map(FlowCounters::slot))
    }

    fn total(&self) -> Counts {
        let stats = self.counters.iter().map(FlowCounters::read);
        stats.fold(Counts::default(), |sum, stats| Counts {
            packets: sum.packets + stats.packets,
            bytes: sum.bytes + stats.bytes,
        })
    }

    /// Bytes of a packet, on average.
    fn size(&self) -> f64 {
        let Counts { packets, bytes } = self.total();
        bytes as f64 / packets.max(1) as f64
    }

    fn is_due(&self) -> bool {
        self.split().0.is_some_and(Slot::is_due)
    }

    /// Asks all workers for a keep-alive, one of which will see the next packet.
    fn ask_workers(&mut self) {
        if let Some((_, workers)) = self.counters.split_last() {
            for counters in workers {
                counters.set_due();
            }
        }
        self.asked = true;
    }

    /// Whether a worker has given the keep-alive that was asked for; then it is no longer asked of anybody.
    fn take_given(&mut self) -> bool {
        if !self.asked || self.split().1.all(Slot::is_due) {
            return false;
        }
        let (nic, workers) = self.split();
        nic.into_iter().chain(workers).for_each(Slot::clear_due);
        self.asked = false;
        true
    }
}

/// What is known of a port of a NIC.
#[derive(Default)]
struct PortState {
    neighbours: Neighbours,
    /// Rules that are on their way out because the tables say so: until they are gone, none goes in that may overlap them.
    leaving: HashSet<RuleId>,
}

/// Who waits for rules to be gone.
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
        self.follow_detours(millis);
        if millis >= self.next_tick {
            self.next_tick = millis + TICK;
            self.tick(now, millis);
        }
        self.review(millis);
        self.nics.values_mut().for_each(|nic| nic.push(now));
        // Many devices have done it by now.
        self.poll(now, millis);
        self.settle();
        match () {
            () if !self.stale.is_empty() || self.nics.values().any(Nic::is_busy) => SOON.0,
            () if !self.detours.is_empty() => SOON.1,
            () if self.nics.is_empty() => LONG,
            () => Duration::from_millis(self.next_tick.saturating_sub(millis).max(1)),
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
        let Some((&id, nic)) = self.nics.iter_mut().find(|(_, nic)| nic.name == name) else {
            let _ = done.send(());
            return;
        };
        nic.ports = ports;
        self.watch();
        self.look_at_all(now, millis);
        self.recheck(|entry| entry.nic == id, |_| true, now, millis);
        let known: HashSet<PortId> = self.nics.values().flat_map(|nic| nic.ports.ports()).collect();
        self.ports.retain(|port, state| known.contains(port) || !state.leaving.is_empty());
        self.owe(Then::Tell(done));
        self.settle();
    }

    fn nic_of(&self, port: PortId) -> Option<u32> {
        self.nics.iter().find(|(_, nic)| nic.ports.by_id(port).is_some()).map(|(id, _)| *id)
    }

    /// Follows what has changed in the tables. Rules of what is gone, or may be in no longer, go.
    fn follow(&mut self, now: Instant, millis: Millis) {
        let taken = self.feed.take();
        if taken.upto == self.told {
            return;
        }
        self.told = taken.upto;
        let mut dirty = HashSet::new();
        if taken.lost {
            self.look_at_all(now, millis);
            dirty.extend(self.ports.keys().copied());
        } else {
            for changes in taken.changes.chunks(BATCH) {
                let tables = self.flows.clone();
                let flows = lock(&tables);
                for change in changes {
                    match *change {
                        Change::Put(flow) => dirty.extend(self.put(&flows, flow, now, millis)),
                        Change::Delete(flow) => dirty.extend(self.delete(flow, now)),
                        Change::Mtu => dirty.extend(self.ports.keys().copied()),
                    }
                }
            }
        }
        if !dirty.is_empty() {
            // What stands nothing in the way is asked about once more before it goes in.
            let hangs_on_others = |reason: Option<&Reason>| {
                matches!(reason, Some(Reason::Overlap | Reason::OtherFragments | Reason::Mtu))
            };
            self.recheck(|entry| dirty.contains(&entry.port), hangs_on_others, now, millis);
        }
        self.owe(Then::Follow(taken.upto));
    }

    /// Somebody waits for the rules that are to go now.
    fn owe(&mut self, then: Then) {
        self.owed.push_back(Owed { rules: std::mem::take(&mut self.going), then });
    }

    /// Tells those for whom all rules are gone; changes are followed in order.
    fn settle(&mut self) {
        let mut behind = false;
        let feed = &self.feed;
        self.owed.retain(|owed| match &owed.then {
            Then::Follow(upto) if owed.rules.is_empty() && !behind => {
                feed.follow(*upto);
                false
            }
            Then::Follow(_) => {
                behind = true;
                true
            }
            Then::Tell(done) if owed.rules.is_empty() => {
                // Who no longer waits is no error.
                let _ = done.send(());
                false
            }
            Then::Tell(_) => true,
        });
    }

    /// Compares all flows with what is known, where it is not known what has changed.
    fn look_at_all(&mut self, now: Instant, millis: Millis) {
        let tables = self.flows.clone();
        let flows = lock(&tables);
        let is_gone =
            |entry: &Entry| flows.get(entry.flow).is_none() || self.nic_of(entry.port) != Some(entry.nic);
        let gone: Vec<FlowRef> =
            self.entries.values().filter(|entry| is_gone(entry)).map(|entry| entry.flow).collect();
        for flow in gone {
            match flows.get(flow) {
                // Its port is another NIC's now, or none's. What was counted of it stays.
                Some(_) => self.forget(flow, None, now),
                None => self.delete(flow, now),
            };
        }
        let is_new = |flow: &&Flow| !self.entries.contains_key(&flow.flow.index);
        let new: Vec<FlowRef> = flows
            .iter()
            .filter(|flow| self.nic_of(flow.port).is_some())
            .filter(is_new)
            .map(|flow| flow.flow)
            .collect();
        for flow in new {
            self.put(&flows, flow, now, millis);
        }
    }

    /// A flow has come or changed. Gives its port if it may stand in the way of others, or did.
    fn put(&mut self, flows: &Flows, name: FlowRef, now: Instant, millis: Millis) -> Option<PortId> {
        let (mut dirty, mut estimated) = (None, false);
        if let Some((old, nic)) = self.entries.get(&name.index).map(|old| (old.flow, old.nic)) {
            if old == name {
                return None;
            }
            self.extrapolate(nic, name.index, millis);
            estimated = self.entries.get(&name.index).is_some_and(|old| old.estimated);
            dirty = self.forget(old, Some(name.index), now);
        }
        // If it is gone by now, that will be told.
        let Some(flow) = flows.get(name) else { return dirty };
        let Some(nic) = self.nic_of(flow.port) else { return dirty };
        let goes_on = flow.counters.last().is_some_and(|counters| counters.slot().is_some());
        self.feed.slots().begin(name, goes_on);
        let state = self.ports.entry(flow.port).or_default();
        let fragments = self.nics.get(&nic).is_some_and(|nic| nic.settings.ignore_fragments);
        if state.neighbours.add(flow, fragments) {
            dirty = Some(flow.port);
        }
        let entry = Entry {
            flow: name,
            port: flow.port,
            nic,
            counters: flow.counters.clone(),
            reason: None,
            rule: None,
            detour: None,
            asked: false,
            was_in: goes_on,
            guess: None,
            estimated: estimated && goes_on,
            stale: false,
            expired: false,
        };
        self.entries.insert(name.index, entry);
        self.judge(flows, flow, millis);
        dirty
    }

    /// A flow has gone.
    fn delete(&mut self, name: FlowRef, now: Instant) -> Option<PortId> {
        self.feed.slots().end(name);
        self.nics.values_mut().for_each(|nic| nic.disinherit(name.index));
        self.forget(name, None, now)
    }

    /// Forgets a flow; its rule goes, whose last counts are the `heir`'s. Gives its port if it may have stood in the way of
    /// others.
    fn forget(&mut self, name: FlowRef, heir: Option<Id>, now: Instant) -> Option<PortId> {
        if self.entries.get(&name.index)?.flow != name {
            return None;
        }
        let entry = self.entries.remove(&name.index)?;
        let state = self.ports.get_mut(&entry.port)?;
        let was_in_the_way = state.neighbours.remove(name);
        if let Some(nic) = self.nics.get_mut(&entry.nic) {
            let held = nic.policy.remove(name.index);
            match entry.rule {
                Some(rule) => {
                    nic.disown(rule, heir);
                    nic.expel(rule, now);
                    state.leaving.insert(rule);
                    self.going.insert(rule);
                }
                // If it is on a detour, its place is free now.
                None => nic.policy.vanished(held),
            }
        }
        was_in_the_way.then_some(entry.port)
    }

    /// Finds out whether a flow that is out may go in.
    fn judge(&mut self, flows: &Flows, flow: &Flow, millis: Millis) {
        let id = flow.flow.index;
        let Some(entry) = self.entries.get_mut(&id) else { return };
        let Some(nic) = self.nics.get_mut(&entry.nic) else { return };
        let Some(state) = self.ports.get(&entry.port) else { return };
        match nic.ask(flows, flow, &state.neighbours) {
            Ok(plan) => {
                if entry.reason.take().is_some() || !nic.policy.knows(id) {
                    nic.policy.add(id, plan.cost.rules.max(1), entry.total().packets, millis);
                }
            }
            Err(reason) => {
                nic.policy.remove(id);
                entry.reason = Some(reason);
            }
        }
    }

    /// Looks at flows anew: those with rules now, so that no rule stays that may not, and of the others those with such a reason
    /// soon.
    fn recheck(
        &mut self,
        which: impl Fn(&Entry) -> bool,
        reason: impl Fn(Option<&Reason>) -> bool,
        now: Instant,
        millis: Millis,
    ) {
        let mut with_rules = Vec::new();
        for (&id, entry) in self.entries.iter_mut().filter(|(_, entry)| which(entry)) {
            if entry.rule.is_some() {
                with_rules.push(id);
            } else if !entry.stale && entry.detour.is_none() && reason(entry.reason.as_ref()) {
                entry.stale = true;
                self.stale.push_back(id);
            }
        }
        let tables = self.flows.clone();
        for ids in with_rules.chunks(BATCH) {
            let flows = lock(&tables);
            ids.iter().for_each(|&id| self.recheck_rule(&flows, id, now, millis));
        }
    }

    fn recheck_rule(&mut self, flows: &Flows, id: Id, now: Instant, millis: Millis) {
        let Some(entry) = self.entries.get_mut(&id) else { return };
        let (Some(rule), Some(flow)) = (entry.rule, flows.get(entry.flow)) else { return };
        let Some(nic) = self.nics.get_mut(&entry.nic) else { return };
        let Some(state) = self.ports.get_mut(&entry.port) else { return };
        if let Err(reason) = nic.ask(flows, flow, &state.neighbours) {
            entry.reason = Some(reason);
            entry.detour = None;
            nic.policy.leaving(id, millis);
            nic.expel(rule, now);
            state.leaving.insert(rule);
            self.going.insert(rule);
        }
    }

    /// Looks anew at some of the flows that are out.
    fn review(&mut self, millis: Millis) {
        let count = self.stale.len().min(BATCH);
        if count == 0 {
            return;
        }
        let tables = self.flows.clone();
        let flows = lock(&tables);
        for id in self.stale.drain(..count).collect::<Vec<_>>() {
            let Some(entry) = self.entries.get_mut(&id) else { continue };
            entry.stale = false;
            if entry.rule.is_none()
                && entry.detour.is_none()
                && let Some(flow) = flows.get(entry.flow)
            {
                self.judge(&flows, flow, millis);
            }
        }
    }

    /// Takes what devices have told.
    fn poll(&mut self, now: Instant, millis: Millis) {
        let ids: Vec<u32> = self.nics.keys().copied().collect();
        for id in ids {
            let news = self.nics.get_mut(&id).map(|nic| nic.poll(now)).unwrap_or_default();
            news.into_iter().for_each(|news| self.take(id, news, millis));
        }
    }

    fn take(&mut self, id: u32, news: News, millis: Millis) {
        match news {
            News::Entered(rule, owner) => self.entered(id, rule, owner, millis),
            News::Refused(rule, owner, error) => {
                self.is_out(rule);
                if let Some(owner) = owner {
                    self.refused(owner, &error, millis);
                }
            }
            News::Left(rule, owner) => {
                self.is_out(rule);
                if let Some(owner) = owner {
                    self.left(id, owner, millis);
                }
            }
            News::Counted(owner, counts) => self.count(id, owner, counts, millis),
        }
    }

    /// The device has no such rule any more.
    fn is_out(&mut self, rule: RuleId) {
        for rules in self.owed.iter_mut().map(|owed| &mut owed.rules) {
            rules.remove(&rule);
        }
        for state in self.ports.values_mut() {
            state.leaving.remove(&rule);
        }
        self.going.remove(&rule);
    }

    fn entered(&mut self, id: u32, rule: RuleId, owner: Id, millis: Millis) {
        let Some(nic) = self.nics.get_mut(&id) else { return };
        let Some(entry) = self.entries.get_mut(&owner).filter(|entry| entry.rule == Some(rule)) else {
            return;
        };
        if nic.is_in(rule) {
            nic.policy.entered(owner, millis);
        }
        entry.was_in = true;
        if !nic.counts_packets() {
            let size = entry.size();
            let rate = nic.policy.rate(owner);
            // After a detour: as before, and a packet has shown that there are some.
            let (rate, size) = entry.guess.map_or((rate, size), |before| (before.rate, before.size));
            entry.guess = Some(Guess { rate, size, part: 0.0, upto: millis, told: millis, idle: false });
        }
    }

    fn refused(&mut self, owner: Id, error: &OpError, millis: Millis) {
        let Some(entry) = self.entries.get_mut(&owner) else { return };
        (entry.rule, entry.detour, entry.guess) = (None, None, None);
        let Some(nic) = self.nics.get_mut(&entry.nic) else { return };
        let failure = match error {
            OpError::NoSpace => Failure::NoSpace,
            OpError::Rejected(error) => {
                info!("NIC {}: a flow was refused with error {error}", nic.name);
                Failure::Rejected
            }
            _ => Failure::Busy,
        };
        nic.policy.failed(owner, failure, millis);
    }

    fn left(&mut self, id: u32, owner: Id, millis: Millis) {
        self.extrapolate(id, owner, millis);
        let Some(nic) = self.nics.get_mut(&id) else { return };
        let Some(entry) = self.entries.get_mut(&owner) else { return };
        entry.rule = None;
        if entry.detour.is_some() {
            return;
        }
        entry.guess = None;
        nic.policy.left(owner, millis);
        if std::mem::take(&mut entry.expired) {
            nic.policy.restart(owner, entry.total().packets, millis);
        }
        if entry.reason.is_some() {
            nic.policy.remove(owner);
        }
    }

    /// Adds to a flow's statistics what the device has counted.
    fn count(&mut self, id: u32, owner: Id, counts: Counts, millis: Millis) {
        let Some(nic) = self.nics.get_mut(&id) else { return };
        let Some(entry) = self.entries.get_mut(&owner) else { return };
        let bytes = match nic.counters() {
            CounterKind::PacketsAndBytes => counts.bytes,
            CounterKind::Packets => {
                entry.estimated |= counts.packets > 0;
                (entry.size() * counts.packets as f64) as u64
            }
            // It only says whether there were any.
            _ => {
                if let Some(guess) = &mut entry.guess {
                    let begins = guess.idle && counts.packets > 0;
                    (guess.idle, guess.told) = (counts.packets == 0, millis);
                    if begins {
                        guess.upto = millis;
                    }
                }
                return;
            }
        };
        if let Some(slot) = entry.split().0 {
            slot.add(counts.packets, bytes, millis);
        }
    }

    /// Adds to a flow's statistics what the device is believed to have carried.
    fn extrapolate(&mut self, id: u32, owner: Id, millis: Millis) {
        let Some(nic) = self.nics.get_mut(&id) else { return };
        let Some(entry) = self.entries.get_mut(&owner) else { return };
        let Some(guess) = &mut entry.guess else { return };
        let elapsed = millis.saturating_sub(std::mem::replace(&mut guess.upto, millis));
        if guess.idle || entry.rule.is_none() {
            return;
        }
        let packets = guess.part + guess.rate * elapsed as f64 / 1000.0;
        guess.part = packets.fract();
        let added = Counts { packets: packets as u64, bytes: (packets.floor() * guess.size) as u64 };
        if added.packets > 0 {
            entry.estimated = true;
            nic.carried.packets += added.packets;
            nic.carried.bytes += added.bytes;
            if let Some(slot) = entry.split().0 {
                slot.add(added.packets, added.bytes, millis);
            }
        }
    }

    /// Goes on with flows that are out for a keep-alive.
    fn follow_detours(&mut self, millis: Millis) {
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
    }

    /// A look at rates, and what follows from it.
    fn tick(&mut self, now: Instant, millis: Millis) {
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
            None => nic.policy.left(owner, millis),
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
                Some(rule) if entry.is_due() && self.detours.len() < DETOURS => {
                    entry.ask_workers();
                    entry.detour = Some(millis);
                    self.detours.push(owner);
                    nic.expel(rule, now);
                }
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
