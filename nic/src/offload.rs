//! Flow offload: flows carried out by the device itself.
//!
//! [`FlowOffload::compile`] is pure: it says whether a flow can be carried out exactly, or why not. The rest is
//! asynchronous: operations are queued, sent to the device in batches by [`FlowOffload::kick`], and answered through
//! [`FlowOffload::poll`]. Only flows that are disjoint may be given, so any subset of them may be in the device.
//!
//! A driver never widens a match: a packet that hits the device's rule would have hit the flow. A rule may be narrower
//! than the flow; what it lets pass goes to the software. (The one exception has a name, [`Plan::ignores_fragments`].)

use std::any::Any;
use std::collections::HashMap;
use std::fmt;
use std::time::{Duration, Instant};

use switch_core::action::Action;
use switch_core::flow::Match;
use switch_core::key::Field;
use switch_core::packet::PortId;

/// The owner's name for a rule.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Debug)]
pub struct RuleId(pub u64);

/// The owner's name for an operation.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Debug)]
pub struct Token(pub u64);

/// Which ports of the switch are ports of this NIC.
#[derive(Clone, Debug, Default)]
pub struct PortMap {
    by_slot: HashMap<u32, (PortId, u32)>,
}

impl PortMap {
    /// A map from ports of the switch to numbers of the NIC's ports.
    pub fn new(ports: impl IntoIterator<Item = (PortId, u32)>) -> PortMap {
        PortMap { by_slot: ports.into_iter().map(|(port, number)| (port.slot, (port, number))).collect() }
    }

    /// The ports of the switch that are the NIC's.
    pub fn ports(&self) -> impl Iterator<Item = PortId> {
        self.by_slot.values().map(|&(port, _)| port)
    }

    /// The NIC's port for a slot of the switch, which is what flows match as `in_port`.
    pub fn by_slot(&self, slot: u32) -> Option<u32> {
        self.by_slot.get(&slot).map(|&(_, number)| number)
    }

    /// The NIC's port for a port of the switch, which is what actions output to.
    pub fn by_id(&self, port: PortId) -> Option<u32> {
        self.by_slot.get(&port.slot).filter(|(ours, _)| *ours == port).map(|&(_, number)| number)
    }
}

/// A flow that is offered to the device.
#[derive(Clone, Copy, Debug)]
pub struct FlowRule<'r> {
    /// What it matches.
    pub matches: &'r Match,
    /// What is done.
    pub actions: &'r [Action],
    /// Whose ports these are.
    pub ports: &'r PortMap,
}

/// Why a flow cannot be carried out by the device, whatever is in its tables. The same answer holds for every flow of
/// the same form, so owners may remember it.
#[derive(Clone, PartialEq, Eq, Hash, Debug)]
pub enum Refusal {
    /// The flow matches a field that the device does not look at.
    Field(Field),
    /// The device cannot match just these bits of the field.
    Mask(Field),
    /// The flow leaves a field open that the device must match.
    Wildcard(Field),
    /// The device cannot match this value of the field.
    Value(Field),
    /// The flow matches the fragment type, which the device does not see.
    Fragments,
    /// The flow's match has options that no field holds.
    TunnelOptions,
    /// The flow comes from, or goes to, a port that is not the device's.
    Port,
    /// The flow sends packets back where they came from, which the device does not do.
    ToIngress,
    /// An action that the device does not have, by its ODP name.
    Action(&'static str),
    /// A rewrite of a field that the device does not have, or not with this mask or value.
    Set(Field),
    /// A sequence of actions, each of which the device has, that it cannot do together.
    Combination,
    /// More outputs than one rule can have.
    TooManyOutputs,
}

impl fmt::Display for Refusal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Refusal::Field(field) => write!(f, "match on {}", field.name()),
            Refusal::Mask(field) => write!(f, "mask of {}", field.name()),
            Refusal::Wildcard(field) => write!(f, "no match on {}", field.name()),
            Refusal::Value(field) => write!(f, "match on this value of {}", field.name()),
            Refusal::Fragments => f.write_str("match on fragments"),
            Refusal::TunnelOptions => f.write_str("match on tunnel options"),
            Refusal::Port => f.write_str("port of another device"),
            Refusal::ToIngress => f.write_str("output to the ingress port"),
            Refusal::Action(name) => write!(f, "action {name}"),
            Refusal::Set(field) => write!(f, "set {}", field.name()),
            Refusal::Combination => f.write_str("combination of actions"),
            Refusal::TooManyOutputs => f.write_str("too many outputs"),
        }
    }
}

/// What a rule takes of the device.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Cost {
    /// Entries of the rule table.
    pub rules: u32,
    /// Groups, if none of them were there already.
    pub groups: u32,
}

/// A flow as the device will carry it out, made by [`FlowOffload::compile`] for that device.
#[derive(Debug)]
pub struct Plan {
    /// What it takes.
    pub cost: Cost,
    /// The rule matches all fragments alike, though the flow matches only some of them: the owner must see to it that no
    /// flow of that port treats other fragments differently.
    pub ignores_fragments: bool,
    /// The device's own form.
    pub(crate) rule: Box<dyn Any + Send>,
}

/// Why an operation failed.
#[derive(Clone, PartialEq, Eq, Hash, Debug, thiserror::Error)]
pub enum OpError {
    /// The table is full.
    #[error("no space for a rule")]
    NoSpace,
    /// Too many operations are under way.
    #[error("too many operations are under way")]
    Busy,
    /// There is no such rule, or one operation on it is under way.
    #[error("no such rule, or it is being changed")]
    NoRule,
    /// There is a rule of that name.
    #[error("there is a rule of that name")]
    Exists,
    /// The plan was made by another driver.
    #[error("the plan is not for this device")]
    ForeignPlan,
    /// The device refused.
    #[error("the device refused (error {0})")]
    Rejected(u16),
    /// The device did not answer in time; what it has done is not known, and it is reset.
    #[error("the device did not answer")]
    Unknown,
    /// The device was reset.
    #[error("the device was reset")]
    Reset,
}

/// What a rule has counted, as the difference to the last time.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Counts {
    /// Packets.
    pub packets: u64,
    /// Bytes.
    pub bytes: u64,
}

/// What [`FlowOffload::poll`] tells.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Event {
    /// An operation has ended.
    Done {
        /// The operation.
        token: Token,
        /// Its rule.
        rule: RuleId,
        /// How it ended. After a failed insertion there is no rule; after a failed replacement there is the old one.
        result: Result<(), OpError>,
        /// What the removed rule has counted since the last [`Event::Stats`], from devices that count.
        last: Option<Counts>,
    },
    /// A rule's counters.
    Stats {
        /// The rule.
        rule: RuleId,
        /// What was added since the last time.
        delta: Counts,
    },
    /// The device has removed a rule that was idle.
    Aged {
        /// The rule.
        rule: RuleId,
        /// What it has counted since the last [`Event::Stats`].
        last: Counts,
    },
    /// The device was reset: no rule is in it any more. All operations that were under way have ended before this.
    Reset,
}

/// What a device counts per rule.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum CounterKind {
    /// Nothing.
    None,
    /// Whether there were packets at all: [`Event::Stats`] says 0 packets, or some, but not how many, nor their bytes.
    /// It is about a short while after [`FlowOffload::sample`], not about the time since the last answer: a rule that
    /// is used now and then may seem idle. A rule that is being changed, or whose packets cannot be told from others', has
    /// no answer.
    Activity,
    /// Packets.
    Packets,
    /// Packets and bytes.
    PacketsAndBytes,
}

/// An action that a device may have.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
#[expect(missing_docs, reason = "named as in ODP")]
pub enum ActionKind {
    Output,
    MultiOutput,
    Drop,
    PushVlan,
    PopVlan,
    SetEth,
    SetIp,
    SetTransport,
    DecTtl,
    TunnelPush,
    TunnelPop,
}

/// What a device can do.
#[derive(Clone, Debug)]
pub struct OffloadCaps {
    /// Fields that can be matched exactly.
    pub exact: &'static [Field],
    /// Fields that can be matched under any mask.
    pub maskable: &'static [Field],
    /// Fields that must be matched exactly.
    pub required: &'static [Field],
    /// Actions.
    pub actions: &'static [ActionKind],
    /// The most rules that it takes.
    pub max_rules: Option<u32>,
    /// The most different masks that its rules may have together.
    pub max_masks: Option<u32>,
    /// What it counts.
    pub counters: CounterKind,
    /// Rules go by themselves when they are idle for this long.
    pub ageing: Option<Duration>,
}

/// How full a device is.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Occupancy {
    /// Rules in the device, those being inserted or removed included.
    pub rules: u32,
    /// The most rules that it takes.
    pub max_rules: u32,
    /// Groups in the device.
    pub groups: u32,
    /// Operations under way.
    pub operations: u32,
}

/// A device that carries out flows. All of it is for one thread and never waits; `now` only needs to be monotonic.
pub trait FlowOffload: Send {
    /// What the device can do.
    fn caps(&self) -> &OffloadCaps;

    /// Says how the device would carry out a flow, or why it cannot. Pure: it changes nothing and asks the device nothing.
    fn compile(&self, rule: &FlowRule<'_>) -> Result<Plan, Refusal>;

    /// Queues a new rule.
    fn insert(&mut self, rule: RuleId, plan: Plan, token: Token) -> Result<(), OpError>;

    /// Queues another form of a rule. At any moment the device carries out the old or the new one.
    fn replace(&mut self, rule: RuleId, plan: Plan, token: Token) -> Result<(), OpError>;

    /// Queues the end of a rule. When it is done no packet hits the rule any more.
    fn remove(&mut self, rule: RuleId, token: Token) -> Result<(), OpError>;

    /// Asks for the counters of rules; the answers are [`Event::Stats`]. Devices that do not count ignore it, and those
    /// that see [`CounterKind::Activity`] answer later, or not at all.
    fn sample(&mut self, rules: &[RuleId]);

    /// Gives the device what was queued.
    fn kick(&mut self, now: Instant);

    /// Takes the device's answers and appends what they mean. It also notices that the device does not answer, or was
    /// reset, and sets it up again.
    fn poll(&mut self, now: Instant, events: &mut Vec<Event>);

    /// How full the device is.
    fn occupancy(&self) -> Occupancy;

    /// Resets the tables: all rules go, all operations end with [`OpError::Reset`], and [`Event::Reset`] follows by
    /// [`FlowOffload::poll`].
    fn flush(&mut self, now: Instant);
}

/// An action's name in ODP.
pub(crate) fn name(action: &Action) -> &'static str {
    match action {
        Action::Output(_) => "output",
        Action::Drop(_) => "drop",
        Action::Userspace(_) => "userspace",
        Action::Set(..) => "set",
        Action::SetTunnel(..) => "set(tunnel)",
        Action::PushVlan { .. } => "push_vlan",
        Action::PopVlan => "pop_vlan",
        Action::Sample { .. } => "sample",
        Action::Recirc(_) => "recirc",
        Action::Hash { .. } => "hash",
        Action::PushMpls { .. } => "push_mpls",
        Action::PopMpls { .. } => "pop_mpls",
        Action::AddMpls { .. } => "add_mpls",
        Action::Ct(_) => "ct",
        Action::CtClear => "ct_clear",
        Action::Trunc(_) => "trunc",
        Action::PushEth { .. } => "push_eth",
        Action::PopEth => "pop_eth",
        Action::PushNsh(..) => "push_nsh",
        Action::PopNsh => "pop_nsh",
        Action::Meter(_) => "meter",
        Action::Clone(_) => "clone",
        Action::CheckPktLen { .. } => "check_pkt_len",
        Action::DecTtl(_) => "dec_ttl",
        Action::Psample(_) => "psample",
        Action::TnlPush(_) => "tnl_push",
        Action::TnlPop(_) => "tnl_pop",
        Action::LbOutput(_) => "lb_output",
        Action::Opaque(_) => "an unknown action",
    }
}
