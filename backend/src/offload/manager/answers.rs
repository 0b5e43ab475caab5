//! What follows from what devices tell: where rules are, and what was counted.

use super::Core;
use super::entry::Guess;
use crate::offload::device::News;
use crate::offload::policy::{Failure, Id, Millis};
use log::debug;
use nic::offload::{CounterKind, Counts, OpError, RuleId};
use std::time::Instant;

impl Core {
    /// Takes what devices have told.
    pub(super) fn poll(&mut self, now: Instant, millis: Millis) {
        let ids: Vec<u32> = self.nics.keys().copied().collect();
        for id in ids {
            let news = self.nics.get_mut(&id).map(|nic| nic.poll(now)).unwrap_or_default();
            news.into_iter().for_each(|news| self.take(id, news, millis));
        }
    }

    pub(super) fn take(&mut self, id: u32, news: News, millis: Millis) {
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
    pub(super) fn is_out(&mut self, rule: RuleId) {
        for rules in self.owed.iter_mut().map(|owed| &mut owed.rules) {
            rules.remove(&rule);
        }
        for state in self.ports.values_mut() {
            state.leaving.remove(&rule);
        }
        self.going.remove(&rule);
    }

    pub(super) fn entered(&mut self, id: u32, rule: RuleId, owner: Id, millis: Millis) {
        let Some(nic) = self.nics.get_mut(&id) else { return };
        let Some(entry) = self.entries.get_mut(&owner).filter(|entry| entry.rule == Some(rule)) else {
            return;
        };
        if nic.is_in(rule) {
            nic.policy.entered(owner, millis);
        }
        entry.was_in = true;
        entry.rejected = None;
        if !nic.counts_packets() {
            let (rate, size, by_workers) = (nic.policy.rate(owner), entry.size(), entry.by_workers());
            let new = Guess {
                rate,
                watched: 0.0,
                begun: None,
                size,
                part: 0.0,
                upto: millis,
                told: millis,
                idle: false,
            };
            let guess = entry.guess.get_or_insert(new);
            // After a detour it goes on, and a packet has shown that there are some.
            (guess.upto, guess.told, guess.idle) = (millis, millis, false);
            guess.correct(by_workers, millis);
        }
    }

    pub(super) fn refused(&mut self, owner: Id, error: &OpError, millis: Millis) {
        let Some(entry) = self.entries.get_mut(&owner) else { return };
        (entry.rule, entry.detour, entry.guess) = (None, None, None);
        let Some(nic) = self.nics.get_mut(&entry.nic) else { return };
        let failure = match error {
            OpError::NoSpace => Failure::NoSpace,
            OpError::Rejected(error) => {
                debug!("NIC {}: a flow was refused with error {error}", nic.name);
                entry.rejected = Some(*error);
                Failure::Rejected
            }
            _ => Failure::Busy,
        };
        nic.policy.failed(owner, failure, millis);
    }

    pub(super) fn left(&mut self, id: u32, owner: Id, millis: Millis) {
        self.extrapolate(id, owner, millis);
        let Some(nic) = self.nics.get_mut(&id) else { return };
        let Some(entry) = self.entries.get_mut(&owner) else { return };
        entry.rule = None;
        if entry.detour.is_some() {
            let by_workers = entry.by_workers();
            if let Some(guess) = &mut entry.guess {
                guess.begun = Some((by_workers, millis));
            }
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
    pub(super) fn count(&mut self, id: u32, owner: Id, counts: Counts, millis: Millis) {
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
    pub(super) fn extrapolate(&mut self, id: u32, owner: Id, millis: Millis) {
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
}
