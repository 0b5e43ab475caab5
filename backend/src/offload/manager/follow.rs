//! What follows from changes of the tables: flows are taken up and forgotten, and rules go that may not stay.

use super::entry::Entry;
use super::{Core, Owed, Then, lock};
use crate::flows::Flows;
use crate::offload::eligible::Reason;
use crate::offload::feed::Change;
use crate::offload::policy::{Id, Millis};
use std::collections::HashSet;
use std::time::Instant;
use switch_core::flow::FlowRef;
use switch_core::packet::PortId;
use switch_core::planner::Flow;

/// Flows that are dealt with under one lock of the tables.
const BATCH: usize = 256;

impl Core {
    /// Follows what has changed in the tables. Rules of what is gone, or may be in no longer, go.
    pub(super) fn follow(&mut self, now: Instant, millis: Millis) {
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
    pub(super) fn owe(&mut self, then: Then) {
        self.owed.push_back(Owed { rules: std::mem::take(&mut self.going), then });
    }

    /// Tells those for whom all rules are gone, in order.
    pub(super) fn settle(&mut self) {
        while self.owed.front().is_some_and(|owed| owed.rules.is_empty())
            && let Some(owed) = self.owed.pop_front()
        {
            match owed.then {
                Then::Follow(upto) => self.feed.follow(upto),
                Then::Tell(done) => {
                    // Who no longer waits is no error.
                    let _ = done.send(());
                }
            }
        }
    }

    /// Compares all flows with what is known, where it is not known what has changed.
    pub(super) fn look_at_all(&mut self, now: Instant, millis: Millis) {
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
    pub(super) fn put(
        &mut self,
        flows: &Flows,
        name: FlowRef,
        now: Instant,
        millis: Millis,
    ) -> Option<PortId> {
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
            rejected: None,
            detour: None,
            asked: false,
            was_in: flow.counters.last().is_some_and(|counters| counters.read().packets > 0),
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
    pub(super) fn delete(&mut self, name: FlowRef, now: Instant) -> Option<PortId> {
        self.feed.slots().end(name);
        self.nics.values_mut().for_each(|nic| nic.disinherit(name.index));
        self.forget(name, None, now)
    }

    /// Forgets a flow; its rule goes, whose last counts are the `heir`'s. Gives its port if it may have stood in the way of
    /// others.
    pub(super) fn forget(&mut self, name: FlowRef, heir: Option<Id>, now: Instant) -> Option<PortId> {
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
    pub(super) fn judge(&mut self, flows: &Flows, flow: &Flow, millis: Millis) {
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
    pub(super) fn recheck(
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

    pub(super) fn recheck_rule(&mut self, flows: &Flows, id: Id, now: Instant, millis: Millis) {
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
    pub(super) fn review(&mut self, millis: Millis) {
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
}
