//! A NIC's tables as the manager sees them: which rules are in, on their way in, or to go, and what the device has told.

use super::eligible::{Neighbours, Question, Reason, Refusals};
use super::policy::{Id, Limits, Policy};
use super::{NicReport, Settings};
use crate::flows::Flows;
use log::{debug, info, warn};
use nic::offload::{CounterKind, Counts, Event, FlowOffload, OpError, Plan, PortMap, RuleId, Token};
use std::collections::{HashMap, HashSet};
use std::time::{Duration, Instant};
use switch_core::planner::Flow;

/// How long a rule may take to go: then the device is reset.
const PATIENCE: Duration = Duration::from_millis(900);
/// Flows that go in or out in a quarter of a second at most, because others are hotter or colder.
const CHURN: usize = 256;

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Stage {
    Entering,
    In,
    Leaving,
}

#[derive(Debug)]
struct Rule {
    /// Whose it is; none if the flow is no more.
    owner: Option<Id>,
    stage: Stage,
    cost: u32,
    /// Since when it is to go.
    unwanted: Option<Instant>,
}

/// What has become of a rule.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum News {
    /// It is in.
    Entered(RuleId, Id),
    /// It did not get in.
    Refused(RuleId, Option<Id>, OpError),
    /// It is out: it was removed, has aged, or went with all others.
    Left(RuleId, Option<Id>),
    /// It was counted so since the last time.
    Counted(Id, Counts),
}

/// A NIC and its rules.
pub struct Nic {
    /// Its name.
    pub name: String,
    pub settings: Settings,
    /// Which ports of the switch are its own.
    pub ports: PortMap,
    /// Which flows are worth a place in it.
    pub policy: Policy,
    /// What of the packets and bytes that it carried could be attributed to flows, or was extrapolated.
    pub carried: Counts,
    device: Box<dyn FlowOffload>,
    refusals: Refusals,
    rules: HashMap<RuleId, Rule>,
    /// Flows that have changed: what their last rules count is still theirs.
    heirs: HashMap<RuleId, Id>,
    /// Rules that are to go.
    unwanted: HashSet<RuleId>,
    /// Rules of which the device was asked last whether they are in use, and has not said it yet.
    asked: HashSet<RuleId>,
    resets: u64,
    /// Where the next turn of samples begins, of a device for which they are an effort.
    hand: usize,
    events: Vec<Event>,
}

impl Nic {
    /// A NIC without rules.
    pub fn new(name: String, device: Box<dyn FlowOffload>, settings: Settings) -> Nic {
        let most = device.caps().max_rules.unwrap_or(u32::MAX);
        let max_rules = settings.max_rules.unwrap_or(u32::MAX).min(most);
        let limits = Limits { max_rules, min_rate: settings.min_rate, churn: CHURN };
        Nic {
            name,
            settings,
            ports: PortMap::default(),
            policy: Policy::new(limits),
            carried: Counts::default(),
            device,
            refusals: Refusals::default(),
            rules: HashMap::new(),
            heirs: HashMap::new(),
            unwanted: HashSet::new(),
            asked: HashSet::new(),
            resets: 0,
            hand: 0,
            events: Vec::new(),
        }
    }

    /// What the device counts of rules.
    pub fn counters(&self) -> CounterKind {
        self.device.caps().counters
    }

    /// Whether the device counts packets: if not, what it carries is extrapolated.
    pub fn counts_packets(&self) -> bool {
        matches!(self.counters(), CounterKind::Packets | CounterKind::PacketsAndBytes)
    }

    /// How the device would carry out a flow of one of its ports, or why it may not.
    pub fn ask(&mut self, flows: &Flows, flow: &Flow, neighbours: &Neighbours) -> Result<Plan, Reason> {
        let question = Question {
            flows,
            device: &*self.device,
            ports: &self.ports,
            ignore_fragments: self.settings.ignore_fragments,
            neighbours,
        };
        question.ask(flow, &mut self.refusals)
    }

    /// Has a rule put in.
    pub fn insert(&mut self, rule: RuleId, owner: Id, plan: Plan) -> Result<(), OpError> {
        let cost = plan.cost.rules.max(1);
        self.device.insert(rule, plan, Token(rule.0))?;
        let entry = Rule { owner: Some(owner), stage: Stage::Entering, cost, unwanted: None };
        self.rules.insert(rule, entry);
        Ok(())
    }

    /// Has a rule taken out, whatever is being done with it.
    pub fn expel(&mut self, rule: RuleId, now: Instant) {
        if let Some(entry) = self.rules.get_mut(&rule)
            && entry.unwanted.is_none()
        {
            entry.unwanted = Some(now);
            self.unwanted.insert(rule);
        }
    }

    /// The rule's flow is no more. If it has only changed, what the rule counts goes to the `heir`.
    pub fn disown(&mut self, rule: RuleId, heir: Option<Id>) {
        if let Some(entry) = self.rules.get_mut(&rule) {
            entry.owner = None;
            self.heirs.extend(heir.map(|heir| (rule, heir)));
        }
    }

    /// A flow is no more, that others may have become.
    pub fn disinherit(&mut self, heir: Id) {
        if !self.heirs.is_empty() {
            self.heirs.retain(|_, other| *other != heir);
        }
    }

    /// All its rules.
    pub fn rules(&self) -> impl Iterator<Item = RuleId> {
        self.rules.keys().copied()
    }

    /// Whether a rule is in to stay.
    pub fn is_in(&self, rule: RuleId) -> bool {
        self.rules.get(&rule).is_some_and(|entry| entry.stage == Stage::In && entry.unwanted.is_none())
    }

    /// Asks for the counters of rules: of all, or of `some` in turn where that is an effort.
    pub fn sample(&mut self, some: usize) {
        let is_in = |(rule, entry): (&RuleId, &Rule)| (entry.stage == Stage::In).then_some(*rule);
        let mut rules: Vec<RuleId> = self.rules.iter().filter_map(is_in).collect();
        if !self.counts_packets() && rules.len() > some {
            rules.sort_unstable();
            let start = self.hand % rules.len();
            self.hand = start + some;
            rules.rotate_left(start);
            rules.truncate(some);
        }
        if !rules.is_empty() {
            self.device.sample(&rules);
        }
        self.asked.clear();
        if self.counters() == CounterKind::Activity {
            self.asked.extend(rules);
        }
    }

    /// Gives the device what is to be done, and resets it if a rule does not go.
    pub fn push(&mut self, now: Instant) {
        let mut is_late = false;
        for rule in &self.unwanted {
            let Some(entry) = self.rules.get_mut(rule) else { continue };
            // What fails now may do so because of what is under way: it is tried again. One on its way in is removed then.
            if entry.stage == Stage::In && self.device.remove(*rule, Token(rule.0)).is_ok() {
                entry.stage = Stage::Leaving;
            }
            is_late |= entry.unwanted.is_some_and(|since| now.saturating_duration_since(since) > PATIENCE);
        }
        if is_late {
            warn!("NIC {}: a rule does not go out of the tables; they are reset", self.name);
            self.device.flush(now);
        }
        self.device.kick(now);
    }

    /// What the device has told since the last time.
    pub fn poll(&mut self, now: Instant) -> Vec<News> {
        let mut events = std::mem::take(&mut self.events);
        self.device.poll(now, &mut events);
        let mut news = Vec::new();
        for event in events.drain(..) {
            match event {
                Event::Done { rule, result, last, .. } => self.done(rule, result, last, &mut news),
                Event::Stats { rule, delta } => {
                    self.asked.remove(&rule);
                    let owner = self.rules.get(&rule).and_then(|entry| entry.owner);
                    self.count(rule, owner, delta, &mut news);
                }
                Event::Aged { rule, last } => self.gone(rule, Some(last), &mut news),
                Event::Reset => {
                    self.resets += 1;
                    info!(
                        "NIC {}: its tables were reset; {} flows go by software",
                        self.name,
                        self.rules.len()
                    );
                    let mut rules: Vec<RuleId> = self.rules.keys().copied().collect();
                    rules.sort_unstable();
                    rules.into_iter().for_each(|rule| self.gone(rule, None, &mut news));
                }
            }
        }
        self.events = events;
        news
    }

    fn done(
        &mut self,
        rule: RuleId,
        result: Result<(), OpError>,
        last: Option<Counts>,
        news: &mut Vec<News>,
    ) {
        let Some(entry) = self.rules.get_mut(&rule) else { return };
        match (entry.stage, result) {
            (Stage::Entering, Ok(())) => {
                entry.stage = Stage::In;
                news.extend(entry.owner.map(|owner| News::Entered(rule, owner)));
            }
            (Stage::Entering, Err(error)) => {
                let owner = entry.owner;
                if owner.is_none() {
                    self.policy.vanished(entry.cost);
                }
                self.rules.remove(&rule);
                self.unwanted.remove(&rule);
                self.heirs.remove(&rule);
                news.push(News::Refused(rule, owner, error));
            }
            (_, Ok(()) | Err(OpError::NoRule | OpError::Unknown | OpError::Reset)) => {
                self.gone(rule, last, news);
            }
            (_, Err(error)) => {
                debug!("NIC {}: a rule was not removed: {error}", self.name);
                entry.stage = Stage::In; // it is tried again
            }
        }
    }

    fn gone(&mut self, rule: RuleId, last: Option<Counts>, news: &mut Vec<News>) {
        let Some(entry) = self.rules.remove(&rule) else { return };
        self.unwanted.remove(&rule);
        self.asked.remove(&rule);
        if entry.owner.is_none() {
            self.policy.vanished(entry.cost);
        }
        if let Some(last) = last {
            self.count(rule, entry.owner, last, news);
        }
        self.heirs.remove(&rule);
        news.push(News::Left(rule, entry.owner));
    }

    /// What a rule was counted; of a device that only knows whether there was any, the owner thinks of a figure.
    fn count(&mut self, rule: RuleId, owner: Option<Id>, counts: Counts, news: &mut Vec<News>) {
        let owner = owner.or_else(|| self.heirs.get(&rule).copied());
        if self.counts_packets() {
            self.carried.packets += counts.packets;
            self.carried.bytes += counts.bytes;
            if counts == Counts::default() {
                return;
            }
        }
        news.extend(owner.map(|owner| News::Counted(owner, counts)));
    }

    /// Whether the device has anything to do or to answer.
    pub fn is_busy(&self) -> bool {
        !self.unwanted.is_empty() || self.device.occupancy().operations > 0
    }

    /// Whether the device finds out which rules are in use. That costs their packets a copy until it is looked at again. Not all
    /// that was asked is answered, but the next sample takes its place.
    pub fn is_finding_out(&self) -> bool {
        !self.asked.is_empty()
    }

    /// Takes all rules out at once, for good.
    pub fn close(mut self, now: Instant) {
        self.device.flush(now);
        self.device.kick(now);
        let mut events = Vec::new();
        self.device.poll(now, &mut events);
    }

    /// How it stands.
    pub fn report(&self) -> NicReport {
        let occupancy = self.device.occupancy();
        NicReport {
            name: self.name.clone(),
            rules: occupancy.rules,
            max_rules: self.policy.limits().max_rules.min(occupancy.max_rules),
            groups: occupancy.groups,
            operations: occupancy.operations,
            resets: self.resets,
            carried: self.carried,
            estimated: !self.counts_packets(),
            ..NicReport::default()
        }
    }
}
