//! Whether rules are in use. The switch does not count, but sends copies to the CPU where a rule says so: a *probe* lets a
//! rule do that for a moment, and sees whether copies come that the rule must have made.

use std::sync::atomic::Ordering;
use std::time::Instant;

use crate::offload::{Counts, Event, RuleId};

use super::super::group::{Group, Progress};
use super::super::pipeline;
use super::super::regs::{command, flow};
use super::super::rule::Rule;
use super::super::tlv::Writer;
use super::{Command, RockerFlows};

/// The most probes at once: the packets of their rules come to the CPU as well.
const MAX_PROBES: usize = 16;

/// How far a probe is.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum State {
    /// The device has not said yet that it copies.
    Starting,
    /// It copies, until this moment if nothing comes.
    Open(Instant),
    /// It was told to stop.
    Stopping,
    /// It has stopped. What it has copied before may arrive until this moment.
    Stopped(Instant),
}

/// A rule that is being probed.
#[derive(Debug)]
pub(super) struct Probe {
    id: u64,
    /// The rule; `None` if nobody wants the answer any more.
    rule: Option<RuleId>,
    form: Rule,
    /// The group by which its copies go to the CPU, if it is not one that is always there.
    group: Option<Group>,
    /// The command that ends it.
    stop: Vec<u8>,
    state: State,
    /// The device has refused to begin.
    refused: bool,
    /// Copies seen.
    packets: u64,
}

impl Probe {
    fn is_answered(&self) -> bool {
        self.packets > 0 || self.rule.is_none()
    }
}

/// The command that makes a rule copy to the CPU, or not.
fn modify(form: &Rule, cookie: u64, group: Option<u32>, copy: bool) -> Vec<u8> {
    // What is left out stays as it was, so all is said anew.
    let mut to = Writer::default();
    form.write(cookie, group, &mut to);
    to.u8(flow::COPY_TO_CPU, copy.into());
    pipeline::message(command::FLOW_MOD, &to.finish())
}

impl RockerFlows {
    /// Asks for a probe of each of these rules, if it has none and no operation is under way on it.
    pub(super) fn ask(&mut self, rules: &[RuleId]) {
        for &rule in rules {
            let Some(entry) = self.rules.get_mut(&rule) else { continue };
            if !entry.busy && !std::mem::replace(&mut entry.probing, true) {
                self.asked.push_back(rule);
            }
        }
    }

    /// Begins as many probes as may be.
    pub(super) fn start_probes(&mut self) {
        while self.probes.len() < MAX_PROBES {
            let Some(rule) = self.asked.pop_front() else { break };
            let Some(entry) = self.rules.get_mut(&rule) else { continue };
            let (Some(cookie), Some(form)) = (entry.cookie, entry.form.clone()) else { continue };
            let mut changes = Vec::new();
            let group = pipeline::copy_group(form.tci & 0xfff);
            if let Some(group) = &group
                && self.groups.acquire(group, &mut changes).is_none()
            {
                entry.probing = false;
                continue;
            }
            // The ring is first in, first out: the group is there before the rule needs it.
            self.change(changes);
            let output = form.output.as_ref().and_then(|group| self.groups.id(group));
            let (start, stop) = (modify(&form, cookie, output, true), modify(&form, cookie, output, false));
            let id = self.next_operation;
            self.next_operation += 1;
            self.shared.probes.fetch_add(1, Ordering::AcqRel);
            self.queue.push_back((Command::StartCopies(id), start));
            let (rule, state) = (Some(rule), State::Starting);
            self.probes.push(Probe { id, rule, form, group, stop, state, refused: false, packets: 0 });
        }
    }

    /// The device copies, or has refused to.
    pub(super) fn copies_started(&mut self, id: u64, error: u16, now: Instant) {
        let Some(probe) = self.probes.iter_mut().find(|probe| probe.id == id) else { return };
        let works = probe.group.as_ref().is_none_or(|group| self.groups.progress(group) == Progress::Ready);
        match probe.state {
            State::Starting if error == 0 && works => probe.state = State::Open(now + self.config.probe),
            State::Starting if error == 0 => self.stop(id, true),
            State::Starting => self.end(id),
            // It was given up, and the command to stop is on its way.
            _ => probe.refused = error != 0,
        }
    }

    /// The device does not copy any more. `Err`: it does still.
    pub(super) fn copies_stopped(&mut self, id: u64, error: u16, now: Instant) -> Result<(), ()> {
        let Some(probe) = self.probes.iter_mut().find(|probe| probe.id == id) else { return Ok(()) };
        if error != 0 && !probe.refused {
            return Err(());
        }
        let group = probe.group.take();
        probe.state = State::Stopped(now + self.config.probe);
        let is_over = probe.rule.is_none();
        self.release(group);
        if is_over {
            self.end(id);
        }
        Ok(())
    }

    /// Ends a rule's probe, since the rule is about to be changed.
    pub(super) fn give_up(&mut self, rule: RuleId) {
        match self.rules.get_mut(&rule) {
            Some(entry) if entry.probing => entry.probing = false,
            _ => return,
        }
        self.asked.retain(|asked| *asked != rule);
        let Some(probe) = self.probes.iter().find(|probe| probe.rule == Some(rule)) else { return };
        match (probe.id, probe.state) {
            (id, State::Stopped(_)) => self.end(id),
            (id, _) => self.stop(id, true),
        }
    }

    /// Tells the device to stop, unless it was told already.
    fn stop(&mut self, id: u64, without_answer: bool) {
        let Some(probe) = self.probes.iter_mut().find(|probe| probe.id == id) else { return };
        if without_answer
            && let Some(rule) = probe.rule.take()
            && let Some(entry) = self.rules.get_mut(&rule)
        {
            entry.probing = false;
        }
        if matches!(probe.state, State::Starting | State::Open(_)) {
            probe.state = State::Stopping;
            let stop = std::mem::take(&mut probe.stop);
            self.queue.push_back((Command::StopCopies(id), stop));
        }
    }

    /// Forgets a probe that the device has nothing to do with any more.
    fn end(&mut self, id: u64) {
        let Some(at) = self.probes.iter().position(|probe| probe.id == id) else { return };
        let probe = self.probes.swap_remove(at);
        self.release(probe.group);
        if let Some(rule) = probe.rule
            && let Some(entry) = self.rules.get_mut(&rule)
        {
            entry.probing = false;
        }
    }

    /// Looks at the copies that have come, and answers.
    pub(super) fn follow_probes(&mut self, now: Instant) {
        let epoch = self.shared.usable();
        for copied in self.copies.try_iter().filter(|copied| Some(copied.epoch) == epoch) {
            for probe in self.probes.iter_mut().filter(|probe| copied.is_of(&probe.form)) {
                probe.packets += 1;
            }
        }
        // Asked afterwards, so that all is known that was lost until then.
        let lost = self.shared.lost.swap(false, Ordering::AcqRel);
        let probes: Vec<_> = self.probes.iter().map(|probe| probe.id).collect();
        for id in probes {
            let Some(probe) = self.probes.iter().find(|probe| probe.id == id) else { continue };
            let (is_answered, rule, packets) = (probe.is_answered(), probe.rule, probe.packets);
            match probe.state {
                // Nobody knows whose copies those were.
                State::Open(_) | State::Stopping if lost && !is_answered => self.stop(id, true),
                State::Stopped(_) if lost && !is_answered => self.end(id),
                State::Open(until) if is_answered || now >= until => self.stop(id, false),
                State::Stopped(until) if is_answered || now >= until => {
                    self.end(id);
                    if let Some(rule) = rule {
                        self.events.push(Event::Stats { rule, delta: Counts { packets, bytes: 0 } });
                    }
                }
                _ => {}
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::super::super::tests::{good, insert, settle, started};
    use super::*;
    use crate::offload::FlowOffload;

    #[test]
    fn lost_copies_are_no_answer() {
        let (_ports, mut flows) = started(&good());
        let start = Instant::now();
        assert_eq!(insert(&mut flows, 1, 1), Ok(()));
        assert_eq!(settle(&mut flows, start).0.len(), 1);
        let mut events = Vec::new();
        let mut later = start;
        let mut step = |flows: &mut RockerFlows, lost: bool| {
            flows.shared.lost.store(lost, Ordering::Release);
            later += Duration::from_millis(15);
            flows.poll(later, &mut events);
            flows.poll(later, &mut events);
            std::mem::take(&mut events)
        };
        let idle = Event::Stats { rule: RuleId(1), delta: Counts::default() };
        // Copies are lost while it is open, while it waits for the last ones, and never.
        flows.sample(&[RuleId(1)]);
        let told = [
            step(&mut flows, false),
            step(&mut flows, true),
            step(&mut flows, false),
            step(&mut flows, false),
        ];
        assert_eq!(told.concat(), []);
        flows.sample(&[RuleId(1)]);
        let told = [
            step(&mut flows, false),
            step(&mut flows, false),
            step(&mut flows, true),
            step(&mut flows, false),
        ];
        assert_eq!(told.concat(), []);
        assert!(flows.probes.is_empty());
        flows.sample(&[RuleId(1)]);
        let told = [step(&mut flows, false), step(&mut flows, false), step(&mut flows, false)];
        assert_eq!(told.concat(), [idle]);
    }
}
