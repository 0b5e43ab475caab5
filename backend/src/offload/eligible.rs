//! Whether a flow may be carried out by a NIC, or why not.
//!
//! The device says what it can do exactly; here is what it cannot know: whether other flows stand before this one, whether
//! fragments may be treated like all else, and what the port's MTU lets pass.

use crate::flows::Flows;
use nic::offload::{FlowOffload, FlowRule, Plan, PortMap, Refusal};
use std::collections::{HashMap, HashSet};
use std::fmt;
use std::mem::Discriminant;
use switch_core::action::{Action, PortRef, SetGroup};
use switch_core::flow::{FlowRef, Match, Source};
use switch_core::key::{ETH_P_IP, ETH_P_IPV6, FRAG_NONE, Field, Mask, PACKET_WORDS};
use switch_core::planner::Flow;
use switch_core::slab::Disposition;

/// Why a flow is not carried out by a NIC.
#[derive(Clone, PartialEq, Eq, Hash, Debug)]
pub enum Reason {
    /// The host carries it out, or some of it.
    Punt,
    /// It is a later stage of other flows.
    Recirculated,
    /// The device cannot do it.
    Device(Refusal),
    /// The device refused, with this error.
    Rejected(u16),
    /// A flow of a source that is searched earlier matches some of the same packets.
    Overlap,
    /// The device would treat fragments like all else, which is not allowed, or not for this flow.
    Fragments,
    /// The device would treat fragments like all else, and another flow treats them otherwise.
    OtherFragments,
    /// An output has a smaller MTU than the ingress, which a device does not enforce.
    Mtu,
    /// Too few packets.
    Cold,
}

impl fmt::Display for Reason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Reason::Punt => f.write_str("punt"),
            Reason::Recirculated => f.write_str("recirculated"),
            Reason::Device(refusal) => refusal.fmt(f),
            Reason::Rejected(error) => write!(f, "the device refused it with error {error}"),
            Reason::Overlap => f.write_str("an explicit flow comes first"),
            Reason::Fragments => f.write_str("fragments would be ignored"),
            Reason::OtherFragments => f.write_str("fragments have other flows"),
            Reason::Mtu => f.write_str("smaller MTU at the output"),
            Reason::Cold => f.write_str("few packets"),
        }
    }
}

/// Flows of a port that stand in the way of others.
#[derive(Debug, Default)]
pub struct Neighbours {
    /// Flows of sources that are searched before others.
    pub first: HashSet<FlowRef>,
    /// Flows that match IP fragments.
    pub fragments: HashSet<FlowRef>,
}

impl Neighbours {
    /// Whether changes of that flow may change what may be said of others.
    pub fn has(&self, flow: FlowRef) -> bool {
        self.first.contains(&flow) || self.fragments.contains(&flow)
    }

    /// Notes a flow that has come; whether it may stand in the way of others. Of `fragments` there is need to know only if a
    /// device may ignore them.
    pub fn add(&mut self, flow: &Flow, fragments: bool) -> bool {
        if flow.source < Source::Learned {
            self.first.insert(flow.flow);
        }
        if fragments && matches_fragments(&flow.spec.matches) {
            self.fragments.insert(flow.flow);
        }
        self.has(flow.flow)
    }

    /// Forgets a flow that has gone; whether it may have stood in the way of others.
    pub fn remove(&mut self, flow: FlowRef) -> bool {
        let had = self.has(flow);
        self.first.remove(&flow);
        self.fragments.remove(&flow);
        had
    }
}

/// Refusals that are remembered at most.
const MAX_REMEMBERED: usize = 4096;

/// What decides about most refusals: the mask, which of the matched fields are zero, and the actions without their values.
#[derive(Clone, PartialEq, Eq, Hash, Debug)]
struct Form {
    mask: Mask,
    zero: u128,
    actions: Vec<Step>,
}

/// An action, and which bits of which fields it sets.
type Step = (Discriminant<Action>, Vec<(Field, u128)>);

const _: () = assert!(Field::ALL.len() <= u128::BITS as usize);

impl Form {
    fn of(matches: &Match, actions: &[Action]) -> Form {
        let is_zero = |field: &Field| matches.mask.has(*field) && matches.key.get(*field) == 0;
        let zero = (0..).zip(Field::ALL).filter(|(_, field)| is_zero(field));
        let sets = |action: &Action| match action {
            Action::Set(_, sets) => sets.iter().map(|set| (set.field, set.mask)).collect(),
            _ => Vec::new(),
        };
        Form {
            mask: matches.mask,
            zero: zero.fold(0, |bits, (bit, _): (u32, _)| bits | 1 << bit),
            actions: actions.iter().map(|action| (std::mem::discriminant(action), sets(action))).collect(),
        }
    }
}

/// What a device has said of flows' forms.
#[derive(Debug, Default)]
pub struct Refusals(HashMap<Form, Refusal>);

impl Refusals {
    /// Asks the device, unless it has refused a flow of that form already.
    fn compile(&mut self, device: &dyn FlowOffload, rule: &FlowRule<'_>) -> Result<Plan, Refusal> {
        if self.0.is_empty() {
            return self.ask(device, rule);
        }
        match self.0.get(&Form::of(rule.matches, rule.actions)) {
            Some(refusal) => Err(refusal.clone()),
            None => self.ask(device, rule),
        }
    }

    fn ask(&mut self, device: &dyn FlowOffload, rule: &FlowRule<'_>) -> Result<Plan, Refusal> {
        let answer = device.compile(rule);
        // Others hang on values, or on ports.
        let hangs_on_form = |refusal: &&Refusal| {
            use Refusal::{Action, Field, Mask, TooManyOutputs, Wildcard};
            matches!(refusal, Field(_) | Mask(_) | Wildcard(_) | Action(_) | TooManyOutputs)
        };
        if let Some(refusal) = answer.as_ref().err().filter(hangs_on_form)
            && rule.matches.tunnel == Default::default()
            && self.0.len() < MAX_REMEMBERED
        {
            self.0.insert(Form::of(rule.matches, rule.actions), refusal.clone());
        }
        answer
    }
}

/// What there is to ask about.
pub struct Question<'a> {
    /// All flows.
    pub flows: &'a Flows,
    /// The device.
    pub device: &'a dyn FlowOffload,
    /// Its ports.
    pub ports: &'a PortMap,
    /// Whether it may treat fragments like all else.
    pub ignore_fragments: bool,
    /// Flows of the same ingress.
    pub neighbours: &'a Neighbours,
}

impl Question<'_> {
    /// How the device would carry out a flow whose ingress is a port of it, or why it may not.
    pub fn ask(&self, flow: &Flow, refusals: &mut Refusals) -> Result<Plan, Reason> {
        let Disposition::Fast(way) = &flow.disposition else { return Err(Reason::Punt) };
        let Match { key, mask, .. } = &flow.spec.matches;
        if key.recirc_id() != 0 || !mask.is_exact(Field::RecircId) {
            return Err(Reason::Recirculated);
        }
        let rule = FlowRule { matches: &flow.spec.matches, actions: &flow.spec.actions, ports: self.ports };
        let plan = refusals.compile(self.device, &rule).map_err(Reason::Device)?;
        let room = self.flows.mtu(flow.port).unwrap_or(0);
        if way.outputs().iter().any(|&port| self.flows.mtu(port).is_none_or(|mtu| mtu < room)) {
            return Err(Reason::Mtu);
        }
        let overlaps = |other: &&Flow| {
            let other = &other.spec.matches;
            key.overlaps(mask, &other.key, &other.mask)
        };
        let first = self.neighbours.first.iter().filter_map(|&other| self.flows.get(other));
        if first.filter(|other| other.source < flow.source).any(|other| overlaps(&other)) {
            return Err(Reason::Overlap);
        }
        if plan.ignores_fragments {
            self.check_fragments(flow)?;
        }
        Ok(plan)
    }

    /// A rule that matches all fragments, though the flow matches those of one type alone.
    fn check_fragments(&self, flow: &Flow) -> Result<(), Reason> {
        let Match { key, mask, .. } = &flow.spec.matches;
        let reads_more =
            |field: &&Field| (4..PACKET_WORDS).contains(&field.place().0) && **field != Field::IpFrag;
        let is_l2 = |action: &Action| match action {
            Action::Output(PortRef::Ours(_)) | Action::Drop(_) => true,
            Action::PushVlan { .. } | Action::PopVlan | Action::CtClear => true,
            Action::Set(group, _) => *group == SetGroup::Eth,
            _ => false,
        };
        if !self.ignore_fragments
            || Field::ALL.iter().filter(reads_more).any(|field| mask.has(*field))
            || !flow.spec.actions.iter().all(is_l2)
        {
            return Err(Reason::Fragments);
        }
        let mut wide = *mask;
        wide.set(Field::IpFrag, 0);
        let differs = |other: &Flow| {
            other.flow != flow.flow
                && key.overlaps(&wide, &other.spec.matches.key, &other.spec.matches.mask)
                && (other.spec.actions != flow.spec.actions
                    || matches!(other.disposition, Disposition::Punt(_)))
        };
        let fragments = self.neighbours.fragments.iter().filter_map(|&other| self.flows.get(other));
        match fragments.into_iter().any(differs) {
            true => Err(Reason::OtherFragments),
            false => Ok(()),
        }
    }
}

/// Whether a flow may match IP fragments.
fn matches_fragments(matches: &Match) -> bool {
    let Match { key, mask, .. } = matches;
    let may_be_ip = !mask.is_exact(Field::EthType) || [ETH_P_IP, ETH_P_IPV6].contains(&key.eth_type());
    let only_whole = mask.is_exact(Field::IpFrag) && key.ip_frag() == FRAG_NONE;
    may_be_ip && !only_whole
}
