//! A model of a full SmartNIC, in this process: for tests of whoever decides what goes into a NIC.
//!
//! It matches every field that a frame can have, under any mask (a hash table for each mask, with a limit of masks and
//! of rules), rewrites what `switch-core` rewrites, has [tunnels](Underlay), counts packets and bytes, lets idle rules go by
//! itself, steers what is left to queues, and fails on demand. [`smart_nic`] gives the two halves of a driver, and the [`Bench`] on which the card lies: cables
//! and faults.

mod ports;
mod tunnel;

use std::collections::{HashMap, VecDeque};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use switch_core::action::{Action, PortRef, SetGroup};
use switch_core::flow::{FlowSpec, Match};
use switch_core::key::{Field, Key, Mask, PACKET_WORDS};
use switch_core::packet::{Offload, Packet, PortId};
use switch_core::parse::{self, Extracted};
use switch_core::reference::actions::{self as reference, Frame, Outcome, World};

use crate::io::{Link, Port, PortCounters, SendCaps, Steering};
use crate::offload::{
    ActionKind, Cost, CounterKind, Counts, Event, FlowOffload, FlowRule, Occupancy, OffloadCaps, OpError,
    Plan, Refusal, RuleId, Token,
};
pub use ports::ModelPorts;
use tunnel::{Inner, Outer};
pub use tunnel::{Kind as TunnelKind, Neighbour, Underlay};

/// The longest frame of its cables.
const MAX_FRAME: usize = 9216;

/// Settings of a card.
#[derive(Clone, Debug)]
pub struct Config {
    /// Ports, numbered from 1.
    pub ports: u32,
    /// The most rules.
    pub max_rules: u32,
    /// The most different masks.
    pub max_masks: u32,
    /// Rules that are idle for this long go.
    pub ageing: Option<Duration>,
    /// How long an operation may take before the driver resets the card.
    pub timeout: Duration,
    /// Operations that the card carries out between two polls.
    pub rate: usize,
    /// Frames that wait for the CPU at most.
    pub queue: usize,
    /// What ports do for frames that are sent.
    pub send: SendCaps,
    /// Receive queues of each port.
    pub queues: u8,
    /// Stations of a port whose frames can come to a queue of their own.
    pub stations: usize,
    /// Its tunnels.
    pub underlay: Underlay,
}

impl Default for Config {
    fn default() -> Config {
        Config {
            ports: 4,
            max_rules: 65_536,
            max_masks: 256,
            ageing: None,
            timeout: Duration::from_secs(1),
            rate: 1024,
            queue: 1024,
            send: SendCaps::default(),
            queues: 1,
            stations: 16,
            underlay: Underlay::default(),
        }
    }
}

/// A rule in the card's own terms: ports are the card's numbers.
#[derive(Clone, Debug)]
struct Rule {
    key: Key,
    mask: Mask,
    /// Without `set(tunnel(…))`.
    actions: Vec<Action>,
    /// The outer headers of what is output to tunnels.
    outer: Option<Outer>,
}

#[derive(Debug)]
struct Entry {
    rule: Rule,
    /// Counted since the owner was last told.
    counts: Counts,
    used: Instant,
}

/// What the driver asks of the card.
#[derive(Debug)]
enum Command {
    Put(RuleId, Box<Rule>),
    Delete(RuleId),
}

/// The card.
#[derive(Debug)]
struct Card {
    config: Config,
    rules: HashMap<RuleId, Entry>,
    /// Which rule has this key, for each mask.
    tables: HashMap<Mask, HashMap<Key, RuleId>>,
    commands: VecDeque<(u64, Command)>,
    answers: VecDeque<(u64, Result<Option<Counts>, OpError>)>,
    aged: Vec<(RuleId, Counts)>,
    /// Frames for the CPU: port, queue, and bytes.
    cpu: VecDeque<(u32, u8, Vec<u8>)>,
    /// Of each port.
    steering: Vec<Vec<Steering>>,
    wires: Vec<Vec<Vec<u8>>>,
    links: Vec<bool>,
    counters: Vec<PortCounters>,
    resets: u32,
    lose: usize,
    refuse: VecDeque<OpError>,
    stalled: bool,
}

fn lock(card: &Mutex<Card>) -> MutexGuard<'_, Card> {
    card.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Card {
    fn index(port: u32) -> usize {
        (port as usize).wrapping_sub(1)
    }

    fn reset(&mut self) {
        self.rules.clear();
        self.tables.clear();
        self.commands.clear();
        self.answers.clear();
        self.aged.clear();
        self.cpu.clear();
        self.resets += 1;
    }

    fn take_out(&mut self, id: RuleId) -> Option<Entry> {
        let entry = self.rules.remove(&id)?;
        if let Some(table) = self.tables.get_mut(&entry.rule.mask) {
            if table.get(&entry.rule.key) == Some(&id) {
                table.remove(&entry.rule.key);
            }
            if table.is_empty() {
                self.tables.remove(&entry.rule.mask);
            }
        }
        Some(entry)
    }

    fn put(&mut self, id: RuleId, rule: Rule, now: Instant) -> Result<Option<Counts>, OpError> {
        let is_new = !self.rules.contains_key(&id);
        let has_mask = self.tables.contains_key(&rule.mask);
        if is_new && self.rules.len() >= self.config.max_rules as usize
            || !has_mask && self.tables.len() >= self.config.max_masks as usize
        {
            return Err(OpError::NoSpace);
        }
        let counts = self.take_out(id).map_or(Counts::default(), |entry| entry.counts);
        self.tables.entry(rule.mask).or_default().insert(rule.key, id);
        self.rules.insert(id, Entry { rule, counts, used: now });
        Ok(None)
    }

    /// Carries out some of what was asked, and lets idle rules go.
    fn work(&mut self, now: Instant) {
        if self.stalled {
            return;
        }
        for _ in 0..self.config.rate {
            let Some((id, command)) = self.commands.pop_front() else { break };
            let result = match (self.refuse.pop_front(), command) {
                (Some(error), _) => Err(error),
                (None, Command::Put(rule, form)) => self.put(rule, *form, now),
                (None, Command::Delete(rule)) => {
                    self.take_out(rule).map(|entry| Some(entry.counts)).ok_or(OpError::NoRule)
                }
            };
            match self.lose.checked_sub(1) {
                Some(left) => self.lose = left,
                None => self.answers.push_back((id, result)),
            }
        }
        let Some(ageing) = self.config.ageing else { return };
        let idle = |entry: &Entry| now.saturating_duration_since(entry.used) >= ageing;
        let mut idle: Vec<_> =
            self.rules.iter().filter(|(_, entry)| idle(entry)).map(|(id, _)| *id).collect();
        idle.sort_unstable();
        for id in idle {
            if let Some(entry) = self.take_out(id) {
                self.aged.push((id, entry.counts));
            }
        }
    }

    /// The rule that a frame hits.
    fn lookup(&self, port: u32, frame: &[u8], outer: Option<&Inner<'_>>) -> Option<RuleId> {
        let mut packet = Packet::from_frame(PortId { slot: port, generation: 0 }, frame);
        let mut key = Key::default();
        if parse::extract(&mut packet, &mut key) != Extracted::Done {
            return None;
        }
        if let Some(outer) = outer {
            outer.write(&mut key);
        }
        self.tables.iter().find_map(|(mask, table)| table.get(&key.masked(mask)).copied())
    }

    /// What leaves for a frame by the rule that it hits: cables and frames. `None`: the CPU has to see to it.
    fn carry_out(&self, rule: &Rule, frame: &[u8]) -> Option<Vec<(u32, Vec<u8>)>> {
        let (mut recirculate, mut random) = (|_: &Frame| None, || 0);
        let mut world = World { recirculate: &mut recirculate, random: &mut random };
        let sent = match reference::execute(
            &rule.actions,
            Frame::new(frame.to_vec(), Offload::default()),
            &mut world,
        ) {
            Outcome::Sent(sent) => sent,
            Outcome::Dropped(_) => Vec::new(),
            Outcome::Unresolved => return None,
        };
        let leaves = |sent: reference::Sent| {
            let number = sent.port.slot;
            let Some(kind) = self.config.underlay.kind(number) else { return Some((number, sent.bytes)) };
            rule.outer.as_ref()?.wrap(kind, &self.config.underlay, &sent.bytes)
        };
        let all: Option<Vec<_>> = sent.into_iter().map(leaves).collect();
        all.filter(|all| all.iter().all(|(_, bytes)| bytes.len() <= MAX_FRAME))
    }

    /// Has a frame carried out by a rule, if there is one.
    fn forward(&mut self, port: u32, frame: &[u8], outer: Option<&Inner<'_>>, now: Instant) -> Option<()> {
        let id = self.lookup(port, frame, outer)?;
        let leaving = self.carry_out(&self.rules.get(&id)?.rule, frame)?;
        let entry = self.rules.get_mut(&id)?;
        entry.used = now;
        entry.counts.packets += 1;
        entry.counts.bytes += frame.len() as u64;
        for (number, bytes) in leaving {
            if let Some(wire) = self.wires.get_mut(Card::index(number)) {
                wire.push(bytes);
            }
        }
        Some(())
    }

    /// A frame comes in by a cable.
    fn ingress(&mut self, port: u32, frame: &[u8], now: Instant) {
        let inner = tunnel::unwrap(&self.config.underlay, frame);
        let by_tunnel = inner.and_then(|inner| self.forward(inner.port, inner.frame, Some(&inner), now));
        if by_tunnel.or_else(|| self.forward(port, frame, None, now)).is_some() {
            return;
        }
        if self.cpu.len() < self.config.queue {
            let rules = self.steering.get(Card::index(port)).map_or(&[][..], Vec::as_slice);
            let rule = rules.iter().find(|rule| frame.starts_with(&rule.mac));
            self.cpu.push_back((port, rule.map_or(0, |rule| rule.queue), frame.to_vec()));
        } else if let Some(counters) = self.counters.get_mut(Card::index(port)) {
            counters.rx_error += 1;
        }
    }
}

/// Where the card lies: its cables, and what can go wrong with it.
#[derive(Clone, Debug)]
pub struct Bench(Arc<Mutex<Card>>);

impl Bench {
    /// A frame comes in by a cable.
    pub fn inject(&self, port: u32, frame: &[u8], now: Instant) {
        let mut card = lock(&self.0);
        if card.links.get(Card::index(port)) == Some(&true) {
            card.ingress(port, frame, now);
        }
    }

    /// What has left by a cable since the last time.
    pub fn take(&self, port: u32) -> Vec<Vec<u8>> {
        lock(&self.0).wires.get_mut(Card::index(port)).map(std::mem::take).unwrap_or_default()
    }

    /// Pulls or plugs a cable.
    pub fn set_link(&self, port: u32, up: bool) {
        if let Some(link) = lock(&self.0).links.get_mut(Card::index(port)) {
            *link = up;
        }
    }

    /// The card forgets everything.
    pub fn reset(&self) {
        lock(&self.0).reset();
    }

    /// The next `count` answers are lost, though the card does what it was asked.
    pub fn lose_answers(&self, count: usize) {
        lock(&self.0).lose = count;
    }

    /// The next operation fails so; may be called several times.
    pub fn refuse(&self, error: OpError) {
        lock(&self.0).refuse.push_back(error);
    }

    /// The card does nothing while it is stalled.
    pub fn stall(&self, stalled: bool) {
        lock(&self.0).stalled = stalled;
    }

    /// The rules that the card has, in order.
    pub fn rules(&self) -> Vec<RuleId> {
        let mut rules: Vec<_> = lock(&self.0).rules.keys().copied().collect();
        rules.sort_unstable();
        rules
    }
}

/// A card: its ports, its tables, and the bench on which it lies.
pub fn smart_nic(config: Config) -> (ModelPorts, ModelFlows, Bench) {
    let ports: Vec<Port> = (1..=config.ports)
        .map(|number| Port {
            number,
            name: format!("model{number}"),
            mac: [2, 0, 0, 0, 0xff, number as u8],
            max_frame: MAX_FRAME,
            send: config.send,
            tags: false,
            link: Link { up: true, speed: 100_000 },
        })
        .collect();
    let count = ports.len();
    let caps = OffloadCaps {
        exact: Field::ALL,
        maskable: Field::ALL,
        required: &[Field::InPort],
        actions: ACTIONS,
        max_rules: Some(config.max_rules),
        max_masks: Some(config.max_masks),
        counters: CounterKind::PacketsAndBytes,
        ageing: config.ageing,
    };
    let (timeout, tunnels) = (config.timeout, config.underlay.tunnels.clone());
    let card = Arc::new(Mutex::new(Card {
        config,
        rules: HashMap::new(),
        tables: HashMap::new(),
        commands: VecDeque::new(),
        answers: VecDeque::new(),
        aged: Vec::new(),
        cpu: VecDeque::new(),
        steering: vec![Vec::new(); count],
        wires: vec![Vec::new(); count],
        links: vec![true; count],
        counters: vec![PortCounters::default(); count],
        resets: 0,
        lose: 0,
        refuse: VecDeque::new(),
        stalled: false,
    }));
    let flows = ModelFlows {
        card: card.clone(),
        caps,
        tunnels,
        timeout,
        resets: 0,
        rules: HashMap::new(),
        operations: HashMap::new(),
        next: 0,
        queue: Vec::new(),
        sent: VecDeque::new(),
        events: Vec::new(),
    };
    (ModelPorts { card: card.clone(), ports, resets: 0 }, flows, Bench(card))
}

const ACTIONS: &[ActionKind] = &[
    ActionKind::Output,
    ActionKind::MultiOutput,
    ActionKind::Drop,
    ActionKind::PushVlan,
    ActionKind::PopVlan,
    ActionKind::SetEth,
    ActionKind::SetIp,
    ActionKind::SetTransport,
    ActionKind::DecTtl,
    ActionKind::TunnelPush,
    ActionKind::TunnelPop,
];

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Kind {
    Insert,
    Replace,
    Remove,
}

/// The card's tables.
#[derive(Debug)]
pub struct ModelFlows {
    card: Arc<Mutex<Card>>,
    caps: OffloadCaps,
    tunnels: Vec<(u32, TunnelKind)>,
    timeout: Duration,
    resets: u32,
    /// Rules, and whether an operation on each is under way.
    rules: HashMap<RuleId, bool>,
    operations: HashMap<u64, (Kind, RuleId, Token)>,
    next: u64,
    queue: Vec<(u64, Command)>,
    sent: VecDeque<(u64, Instant)>,
    events: Vec<Event>,
}

impl ModelFlows {
    fn begin(&mut self, kind: Kind, rule: RuleId, token: Token, command: Command) {
        self.rules.insert(rule, true);
        self.operations.insert(self.next, (kind, rule, token));
        self.queue.push((self.next, command));
        self.next += 1;
    }

    fn done(&mut self, id: u64, result: Result<Option<Counts>, OpError>) {
        let Some((kind, rule, token)) = self.operations.remove(&id) else { return };
        let stays = match kind {
            Kind::Insert => result.is_ok(),
            Kind::Replace => true,
            Kind::Remove => result.is_err() && result != Err(OpError::NoRule),
        };
        if stays {
            self.rules.insert(rule, false);
        } else {
            self.rules.remove(&rule);
        }
        let last = result.as_ref().ok().copied().flatten();
        // A rule that was to be removed and is not there has gone by itself.
        let result = match result {
            Err(OpError::NoRule) if kind == Kind::Remove => Ok(()),
            result => result.map(drop),
        };
        self.events.push(Event::Done { token, rule, result, last });
    }

    fn lost(&mut self, error: OpError) {
        let mut ended: Vec<_> = self.operations.drain().collect();
        ended.sort_unstable_by_key(|(id, _)| *id);
        for (_, (_, rule, token)) in ended {
            self.events.push(Event::Done { token, rule, result: Err(error.clone()), last: None });
        }
        self.rules.clear();
        self.queue.clear();
        self.sent.clear();
        self.events.push(Event::Reset);
        self.resets = lock(&self.card).resets;
    }
}

impl FlowOffload for ModelFlows {
    fn caps(&self) -> &OffloadCaps {
        &self.caps
    }

    fn compile(&self, rule: &FlowRule<'_>) -> Result<Plan, Refusal> {
        let form = compile(rule, &self.tunnels)?;
        Ok(Plan { cost: Cost { rules: 1, groups: 0 }, ignores_fragments: false, rule: Box::new(form) })
    }

    fn insert(&mut self, rule: RuleId, plan: Plan, token: Token) -> Result<(), OpError> {
        if self.rules.contains_key(&rule) {
            return Err(OpError::Exists);
        }
        let form = plan.rule.downcast::<Rule>().map_err(|_| OpError::ForeignPlan)?;
        self.begin(Kind::Insert, rule, token, Command::Put(rule, form));
        Ok(())
    }

    fn replace(&mut self, rule: RuleId, plan: Plan, token: Token) -> Result<(), OpError> {
        if self.rules.get(&rule) != Some(&false) {
            return Err(OpError::NoRule);
        }
        let form = plan.rule.downcast::<Rule>().map_err(|_| OpError::ForeignPlan)?;
        self.begin(Kind::Replace, rule, token, Command::Put(rule, form));
        Ok(())
    }

    fn remove(&mut self, rule: RuleId, token: Token) -> Result<(), OpError> {
        if self.rules.get(&rule) != Some(&false) {
            return Err(OpError::NoRule);
        }
        self.begin(Kind::Remove, rule, token, Command::Delete(rule));
        Ok(())
    }

    fn sample(&mut self, rules: &[RuleId]) {
        let mut card = lock(&self.card);
        for &rule in rules {
            if let Some(entry) = card.rules.get_mut(&rule) {
                let delta = std::mem::take(&mut entry.counts);
                self.events.push(Event::Stats { rule, delta });
            }
        }
    }

    fn kick(&mut self, now: Instant) {
        let mut card = lock(&self.card);
        self.sent.extend(self.queue.iter().map(|(id, _)| (*id, now)));
        card.commands.extend(self.queue.drain(..));
    }

    fn poll(&mut self, now: Instant, events: &mut Vec<Event>) {
        if lock(&self.card).resets != self.resets {
            self.lost(OpError::Reset);
        }
        let (answers, aged) = {
            let mut card = lock(&self.card);
            card.work(now);
            (std::mem::take(&mut card.answers), std::mem::take(&mut card.aged))
        };
        for (id, result) in answers {
            self.done(id, result);
        }
        for (rule, last) in aged {
            // One that is being changed is told of by the operation's end.
            if self.rules.get(&rule) == Some(&false) {
                self.rules.remove(&rule);
                self.events.push(Event::Aged { rule, last });
            }
        }
        while self.sent.front().is_some_and(|(id, _)| !self.operations.contains_key(id)) {
            self.sent.pop_front();
        }
        if self.sent.front().is_some_and(|(_, since)| now.saturating_duration_since(*since) > self.timeout) {
            lock(&self.card).reset();
            self.lost(OpError::Unknown);
        }
        events.append(&mut self.events);
    }

    fn occupancy(&self) -> Occupancy {
        Occupancy {
            rules: self.rules.len() as u32,
            max_rules: self.caps.max_rules.unwrap_or(u32::MAX),
            groups: 0,
            operations: self.operations.len() as u32,
        }
    }

    fn flush(&mut self, _: Instant) {
        lock(&self.card).reset();
        self.lost(OpError::Reset);
    }
}

/// The card takes what `switch-core` can execute without another lookup, on frames from its own ports, and outputs to tunnels.
fn compile(rule: &FlowRule<'_>, tunnels: &[(u32, TunnelKind)]) -> Result<Rule, Refusal> {
    let matches = rule.matches;
    if matches.tunnel != Default::default() {
        return Err(Refusal::TunnelOptions);
    }
    if !matches.mask.is_exact(Field::InPort) {
        return Err(Refusal::Wildcard(Field::InPort));
    }
    let slot = matches.key.get(Field::InPort) as u32;
    let number = rule.ports.by_slot(slot).ok_or(Refusal::Port)?;
    let from_tunnel = tunnels.iter().any(|&(tunnel, _)| tunnel == number);
    let (mut key, mut mask) = (matches.key.masked(&matches.mask), matches.mask);
    key.set(Field::InPort, number.into());
    for &field in Field::ALL {
        let is_metadata = field.place().0 >= PACKET_WORDS || field == Field::RecircId;
        if is_metadata && mask.has(field) && !(from_tunnel && tunnel::FIELDS.contains(&field)) {
            let unread = field.name().starts_with("nsh.") || field == Field::Ipv6Exthdrs;
            if unread || key.get(field) != 0 {
                return Err(Refusal::Field(field));
            }
            mask.set(field, 0);
        }
    }
    let (mut actions, mut outer) = (Vec::new(), None);
    for action in rule.actions {
        if let Action::SetTunnel(sets, more) = action {
            // One for all outputs: another one would be for those behind it alone.
            if outer.replace(Outer::new(sets, more)?).is_some() {
                return Err(Refusal::Combination);
            }
            continue;
        }
        let action = translate(action, rule)?;
        if let Action::Output(PortRef::Ours(port)) = &action
            && let Some(&(_, kind)) = tunnels.iter().find(|(tunnel, _)| *tunnel == port.slot)
        {
            outer.as_ref().ok_or(Refusal::Combination)?.check(kind)?;
        }
        actions.push(action);
    }
    // Who has come by a tunnel plays no part in whether the actions can be carried out.
    let mut packet = mask;
    tunnel::FIELDS.iter().for_each(|&field| packet.set(field, 0));
    let matches = Match { key: key.masked(&packet), mask: packet, tunnel: Default::default() };
    let spec = FlowSpec { matches, actions, ufid: None, held: None };
    switch_core::compile::compile(&spec).map_err(|_| Refusal::Combination)?;
    Ok(Rule { key, mask, actions: spec.actions, outer })
}

/// An action with the card's port numbers.
fn translate(action: &Action, rule: &FlowRule<'_>) -> Result<Action, Refusal> {
    Ok(match action {
        Action::Output(PortRef::Ours(port)) => {
            let slot = rule.ports.by_id(*port).ok_or(Refusal::Port)?;
            Action::Output(PortRef::Ours(PortId { slot, generation: 0 }))
        }
        Action::Output(PortRef::Foreign(_)) => return Err(Refusal::Port),
        Action::Set(group, _) => match group {
            SetGroup::Eth | SetGroup::Ipv4 | SetGroup::Ipv6 | SetGroup::Tcp | SetGroup::Udp => action.clone(),
            _ => return Err(Refusal::Action("set")),
        },
        Action::DecTtl(exception) if exception.is_empty() => action.clone(),
        Action::Drop(_) | Action::PushVlan { .. } | Action::PopVlan | Action::CtClear => action.clone(),
        other => return Err(Refusal::Action(crate::offload::name(other))),
    })
}

#[cfg(test)]
mod tests;
