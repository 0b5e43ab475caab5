//! Flow offload: rules and groups through the command ring.
//!
//! The ring is first in, first out. An operation has at most one command of its own under way: a rule is added when all
//! its groups are there, and groups go when the rule that named them is gone. Whatever the device does that these
//! tables cannot explain (no answer, a refusal to delete what is there) ends in a reset, after which both agree again.

mod activity;

use std::collections::{HashMap, VecDeque};
use std::sync::Arc;
use std::sync::mpsc::Receiver;
use std::time::{Duration, Instant};

use crate::offload::{
    Cost, CounterKind, Event, FlowOffload, FlowRule, Occupancy, OffloadCaps, OpError, Plan, Refusal, RuleId,
    Token,
};
use crate::pci::PciFunction;

use activity::Probe;

use super::copies::Copied;
use super::group::{Change, Group, Groups, Progress};
use super::regs::{command, errno, flow};
use super::rule::{self, Rule};
use super::tlv::Writer;
use super::{Config, Control, Shared, pipeline, regs};

/// The most operations under way.
const MAX_OPERATIONS: usize = 1024;
/// How often the device is asked whether it still has its ring.
const CHECK: Duration = Duration::from_millis(100);
/// How long after a failed setup the next is tried.
const RETRY: Duration = Duration::from_secs(1);

/// The tables of a switch; see [`super::open`].
#[derive(Debug)]
pub struct RockerFlows {
    function: Box<dyn PciFunction>,
    control: Control,
    config: Config,
    shared: Arc<Shared>,
    caps: OffloadCaps,
    rules: HashMap<RuleId, Entry>,
    groups: Groups,
    operations: HashMap<u64, Operation>,
    next_operation: u64,
    next_cookie: u64,
    /// Operations whose groups are not there yet, in order.
    waiting: VecDeque<u64>,
    /// Commands for which there was no slot yet.
    queue: VecDeque<(Command, Vec<u8>)>,
    /// Commands that the device has, in the ring's order, and since when.
    sent: VecDeque<(Command, Instant)>,
    /// Rules that are to be probed, and those that are.
    asked: VecDeque<RuleId>,
    probes: Vec<Probe>,
    copies: Receiver<Copied>,
    events: Vec<Event>,
    checked: Option<Instant>,
    /// The device is not usable; when to try again.
    down: Option<Instant>,
}

/// A rule in the device.
#[derive(Debug)]
struct Entry {
    /// What the device calls it; `None` while it is being inserted.
    cookie: Option<u64>,
    /// What it is; `None` as for the cookie.
    form: Option<Rule>,
    /// An operation on it is under way.
    busy: bool,
    /// It is asked for, or being found out, whether it is used.
    probing: bool,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Kind {
    Insert,
    Replace,
    Remove,
}

#[derive(Debug)]
struct Operation {
    kind: Kind,
    rule: RuleId,
    token: Token,
    /// The rule's new form and what the device is to call it.
    new: Option<(Rule, u64)>,
}

/// What a completion of the ring is about.
#[derive(Debug)]
enum Command {
    AddGroup(Group),
    DeleteGroup,
    AddRule(u64),
    DeleteRule(u64),
    StartCopies(u64),
    StopCopies(u64),
}

impl RockerFlows {
    pub(super) fn new(
        function: Box<dyn PciFunction>,
        control: Control,
        config: Config,
        shared: Arc<Shared>,
        copies: Receiver<Copied>,
    ) -> RockerFlows {
        let caps = OffloadCaps {
            exact: rule::EXACT,
            maskable: rule::MASKABLE,
            required: rule::REQUIRED,
            actions: rule::ACTIONS,
            max_rules: Some(config.max_rules),
            max_masks: None,
            counters: CounterKind::Activity,
            ageing: None,
        };
        RockerFlows {
            function,
            control,
            config,
            shared,
            caps,
            rules: HashMap::new(),
            groups: Groups::default(),
            operations: HashMap::new(),
            next_operation: 0,
            next_cookie: pipeline::FIRST_COOKIE,
            waiting: VecDeque::new(),
            queue: VecDeque::new(),
            sent: VecDeque::new(),
            asked: VecDeque::new(),
            probes: Vec::new(),
            copies,
            events: Vec::new(),
            checked: None,
            down: None,
        }
    }

    /// Begins an operation with a new form of a rule.
    fn begin(&mut self, kind: Kind, rule: RuleId, form: Rule, token: Token) -> Result<(), OpError> {
        let mut changes = Vec::new();
        if let Some(group) = &form.output
            && self.groups.acquire(group, &mut changes).is_none()
        {
            return Err(OpError::NoSpace);
        }
        self.change(changes);
        let cookie = self.next_cookie;
        self.next_cookie += 1;
        let id = self.operation(Operation { kind, rule, token, new: Some((form, cookie)) });
        self.waiting.push_back(id);
        Ok(())
    }

    fn operation(&mut self, operation: Operation) -> u64 {
        let id = self.next_operation;
        self.next_operation += 1;
        self.operations.insert(id, operation);
        id
    }

    fn check_usable(&self) -> Result<(), OpError> {
        if self.down.is_some() {
            return Err(OpError::Reset);
        }
        if self.operations.len() >= MAX_OPERATIONS {
            return Err(OpError::Busy);
        }
        Ok(())
    }

    /// Queues changes of groups.
    fn change(&mut self, changes: Vec<Change>) {
        for change in changes {
            self.queue.push_back(match change {
                Change::Add(group, arguments) => {
                    (Command::AddGroup(group), pipeline::message(command::GROUP_ADD, &arguments))
                }
                Change::Delete(id) => {
                    let mut to = Writer::default();
                    to.u32(flow::GROUP, id);
                    (Command::DeleteGroup, pipeline::message(command::GROUP_DEL, &to.finish()))
                }
            });
        }
    }

    fn release(&mut self, group: Option<Group>) {
        if let Some(group) = group {
            let mut changes = Vec::new();
            self.groups.release(&group, &mut changes);
            self.change(changes);
        }
    }

    /// Queues the rules whose groups have come.
    fn promote(&mut self) {
        for _ in 0..self.waiting.len() {
            let Some(id) = self.waiting.pop_front() else { break };
            let Some((form, cookie)) = self.operations.get(&id).and_then(|operation| operation.new.as_ref())
            else {
                continue;
            };
            match form.output.as_ref().map_or(Progress::Ready, |group| self.groups.progress(group)) {
                Progress::Pending => self.waiting.push_back(id),
                Progress::Failed(error) => self.refused(id, error),
                Progress::Ready => {
                    let mut to = Writer::default();
                    let group = form.output.as_ref().and_then(|group| self.groups.id(group));
                    form.write(*cookie, group, &mut to);
                    let message = pipeline::message(command::FLOW_ADD, &to.finish());
                    self.queue.push_back((Command::AddRule(id), message));
                }
            }
        }
    }

    fn delete_rule(&mut self, id: u64, cookie: u64) {
        let mut to = Writer::default();
        to.u64(flow::COOKIE, cookie);
        self.queue.push_back((Command::DeleteRule(id), pipeline::message(command::FLOW_DEL, &to.finish())));
    }

    /// The device did not take an operation's new rule.
    fn refused(&mut self, id: u64, error: u16) {
        let Some(operation) = self.operations.remove(&id) else { return };
        match operation.kind {
            Kind::Insert => {
                self.rules.remove(&operation.rule);
            }
            _ => self.idle(operation.rule),
        }
        self.release(operation.new.and_then(|(form, _)| form.output));
        let error = match error {
            errno::ENOMEM | errno::ENOBUFS => OpError::NoSpace,
            error => OpError::Rejected(error),
        };
        self.done(operation.token, operation.rule, Err(error));
    }

    fn idle(&mut self, rule: RuleId) {
        if let Some(entry) = self.rules.get_mut(&rule) {
            entry.busy = false;
        }
    }

    fn done(&mut self, token: Token, rule: RuleId, result: Result<(), OpError>) {
        self.events.push(Event::Done { token, rule, result, last: None });
    }

    /// A command has completed. `Err`: the device and these tables disagree.
    fn completed(&mut self, command: Command, error: u16, now: Instant) -> Result<(), ()> {
        match command {
            Command::AddGroup(group) => self.groups.added(&group, error),
            Command::DeleteGroup if error != 0 => return Err(()),
            Command::DeleteGroup => {}
            Command::AddRule(id) if error != 0 => self.refused(id, error),
            Command::AddRule(id) => self.added(id),
            Command::DeleteRule(_) if error != 0 => return Err(()),
            Command::DeleteRule(id) => self.deleted(id),
            Command::StartCopies(id) => self.copies_started(id, error, now),
            Command::StopCopies(id) => return self.copies_stopped(id, error, now),
        }
        Ok(())
    }

    /// An operation's new rule is in the device. A replaced one is now deleted: so there is always one of them.
    fn added(&mut self, id: u64) {
        let Some(operation) = self.operations.get(&id) else { return };
        let old = self.rules.get(&operation.rule).and_then(|entry| entry.cookie);
        match (operation.kind, old) {
            (Kind::Replace, Some(old)) => self.delete_rule(id, old),
            _ => self.finish(id),
        }
    }

    /// An operation's old rule is out of the device.
    fn deleted(&mut self, id: u64) {
        let Some(operation) = self.operations.get(&id) else { return };
        let rule = operation.rule;
        let old = self.rules.get_mut(&rule).and_then(|entry| entry.form.take());
        self.release(old.and_then(|form| form.output));
        self.finish(id);
    }

    fn finish(&mut self, id: u64) {
        let Some(Operation { kind, rule, token, new }) = self.operations.remove(&id) else { return };
        match new {
            Some((form, cookie)) => {
                let entry = Entry { cookie: Some(cookie), form: Some(form), busy: false, probing: false };
                self.rules.insert(rule, entry);
            }
            None => {
                debug_assert_eq!(kind, Kind::Remove);
                self.rules.remove(&rule);
            }
        }
        self.done(token, rule, Ok(()));
    }

    /// Gives up all that is under way and all that is there, and sets the device up anew.
    fn reset(&mut self, now: Instant, error: OpError) {
        self.shared.raise(false);
        let mut operations: Vec<_> = self.operations.drain().collect();
        operations.sort_unstable_by_key(|(id, _)| *id);
        for (_, operation) in operations {
            self.done(operation.token, operation.rule, Err(error.clone()));
        }
        self.rules.clear();
        self.groups.clear();
        self.waiting.clear();
        self.queue.clear();
        self.sent.clear();
        self.asked.clear();
        self.probes.clear();
        self.events.push(Event::Reset);
        self.set_up(now);
    }

    fn set_up(&mut self, now: Instant) {
        self.checked = Some(now);
        // Whoever reset the device may have taken bus mastering away too.
        let set_up =
            self.function.set_bus_master(true).map_err(Into::into).and_then(|()| self.control.set_up());
        match set_up {
            Ok(()) => {
                self.down = None;
                self.shared.raise(true);
            }
            Err(error) => {
                log::warn!("rocker: the switch cannot be set up: {error}");
                self.down = Some(now + RETRY);
            }
        }
    }

    /// Moves what is queued to the ring.
    fn send(&mut self, now: Instant) {
        self.promote();
        self.start_probes();
        while let Some((_, message)) = self.queue.front() {
            match self.control.ring.push(message) {
                Ok(true) => {}
                Ok(false) => break,
                Err(_) => return self.reset(now, OpError::Unknown),
            }
            if let Some((command, _)) = self.queue.pop_front() {
                self.sent.push_back((command, now));
            }
        }
        if self.control.ring.ring().is_err() {
            self.reset(now, OpError::Unknown);
        }
    }

    /// Takes what the device has answered. `false`: it makes no sense.
    fn take(&mut self, now: Instant) -> bool {
        loop {
            let completion = match self.control.ring.take() {
                Ok(Some(completion)) => completion,
                Ok(None) => return self.control.ring.return_credits().is_ok(),
                Err(_) => return false,
            };
            let Some((command, _)) = self.sent.pop_front() else { return false };
            if self.completed(command, completion.error, now).is_err() {
                return false;
            }
        }
    }

    /// Whether the device still is as it was set up.
    fn is_alive(&mut self, now: Instant) -> bool {
        if self
            .sent
            .front()
            .is_some_and(|(_, since)| now.saturating_duration_since(*since) > self.config.timeout)
        {
            return false;
        }
        if self.checked.is_some_and(|last| now.saturating_duration_since(last) < CHECK) {
            return true;
        }
        self.checked = Some(now);
        self.control.ring.is_known().unwrap_or(false)
    }
}

impl FlowOffload for RockerFlows {
    fn caps(&self) -> &OffloadCaps {
        &self.caps
    }

    fn compile(&self, rule: &FlowRule<'_>) -> Result<Plan, Refusal> {
        let rule = rule::compile(rule, self.control.ports, self.config.ignore_fragments)?;
        let cost = Cost { rules: 1, groups: rule.output.as_ref().map_or(0, Group::count) };
        Ok(Plan { cost, ignores_fragments: rule.ignores_fragments, rule: Box::new(rule) })
    }

    fn insert(&mut self, rule: RuleId, plan: Plan, token: Token) -> Result<(), OpError> {
        self.check_usable()?;
        if self.rules.contains_key(&rule) {
            return Err(OpError::Exists);
        }
        if self.rules.len() >= self.config.max_rules as usize {
            return Err(OpError::NoSpace);
        }
        let form = plan.rule.downcast::<Rule>().map_err(|_| OpError::ForeignPlan)?;
        self.begin(Kind::Insert, rule, *form, token)?;
        self.rules.insert(rule, Entry { cookie: None, form: None, busy: true, probing: false });
        Ok(())
    }

    fn replace(&mut self, rule: RuleId, plan: Plan, token: Token) -> Result<(), OpError> {
        self.check_usable()?;
        if self.rules.get(&rule).is_none_or(|entry| entry.busy) {
            return Err(OpError::NoRule);
        }
        let form = plan.rule.downcast::<Rule>().map_err(|_| OpError::ForeignPlan)?;
        self.give_up(rule);
        self.begin(Kind::Replace, rule, *form, token)?;
        if let Some(entry) = self.rules.get_mut(&rule) {
            entry.busy = true;
        }
        Ok(())
    }

    fn remove(&mut self, rule: RuleId, token: Token) -> Result<(), OpError> {
        self.check_usable()?;
        let entry = self.rules.get_mut(&rule).filter(|entry| !entry.busy).ok_or(OpError::NoRule)?;
        let cookie = entry.cookie.ok_or(OpError::NoRule)?;
        entry.busy = true;
        self.give_up(rule);
        let id = self.operation(Operation { kind: Kind::Remove, rule, token, new: None });
        self.delete_rule(id, cookie);
        Ok(())
    }

    fn sample(&mut self, rules: &[RuleId]) {
        if self.down.is_none() {
            self.ask(rules);
        }
    }

    fn kick(&mut self, now: Instant) {
        if self.down.is_none() {
            self.send(now);
        }
    }

    fn poll(&mut self, now: Instant, events: &mut Vec<Event>) {
        match self.down {
            Some(at) if now >= at => self.set_up(now),
            Some(_) => {}
            None => {
                if !self.take(now) || !self.is_alive(now) {
                    self.reset(now, OpError::Unknown);
                } else {
                    self.follow_probes(now);
                    self.send(now);
                }
            }
        }
        events.append(&mut self.events);
    }

    fn occupancy(&self) -> Occupancy {
        Occupancy {
            rules: self.rules.len() as u32,
            max_rules: self.config.max_rules,
            groups: self.groups.len(),
            operations: self.operations.len() as u32,
        }
    }

    fn flush(&mut self, now: Instant) {
        self.reset(now, OpError::Reset);
    }
}

impl Drop for RockerFlows {
    fn drop(&mut self) {
        self.shared.raise(false);
        // The function may be gone already. It has no other reset, and would go on forwarding.
        let _ = self.control.bar.write32(regs::CONTROL, regs::CONTROL_RESET);
        let _ = self.function.set_bus_master(false);
    }
}
