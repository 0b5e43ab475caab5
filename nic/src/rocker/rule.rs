//! From a flow to an ACL entry and what it outputs to: pure, and exact or refused.
//!
//! The ACL table sees ingress port, MAC addresses, ethertype and TCI. Untagged frames carry VLAN id 4095 inside the
//! switch (see [`super::pipeline`]). Of IP it could compare protocol and TOS, but not the fragment type, nor whether the
//! header is sane, so no flow that reads layer 3 goes in: it would match more here than there.

use switch_core::action::{Action, FieldSet, PortRef, SetGroup};
use switch_core::flow::Match;
use switch_core::key::{ETH_P_8021AD, ETH_P_8021Q, ETH_P_IP, ETH_P_IPV6, FRAG_NONE, Field, VLAN_PRESENT};

use crate::offload::{ActionKind, FlowRule, Refusal, name};

use super::group::Group;
use super::tlv::Writer;
use super::{pipeline, regs::flow};

/// The VLAN id that stands for "untagged" inside the switch. It never appears on a wire (802.1Q, table 9-2).
pub(super) const UNTAGGED: u16 = 4095;
/// The most outputs of a rule: what fits into a command.
const MAX_OUTPUTS: usize = 64;
const MAC: u64 = (1 << 48) - 1;

/// Fields that the ACL table compares exactly.
pub(super) const EXACT: &[Field] =
    &[Field::InPort, Field::EthDst, Field::EthSrc, Field::EthType, Field::VlanTpid, Field::VlanTci];
/// Fields that it compares under any mask.
pub(super) const MASKABLE: &[Field] = &[Field::EthDst, Field::EthSrc];
/// Fields that it must compare.
pub(super) const REQUIRED: &[Field] = &[Field::InPort, Field::EthType, Field::VlanTci];
/// What it can do.
pub(super) const ACTIONS: &[ActionKind] = &[
    ActionKind::Output,
    ActionKind::MultiOutput,
    ActionKind::Drop,
    ActionKind::PushVlan,
    ActionKind::PopVlan,
    ActionKind::SetEth,
];

/// A flow as the switch carries it out.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(super) struct Rule {
    /// Ingress port.
    pub in_port: u32,
    /// Ethertype after the outer tag.
    pub eth_type: u16,
    /// TCI without the bit that is "present" in keys; [`UNTAGGED`] for untagged frames. Never 0.
    pub tci: u16,
    /// Its mask; covers the VLAN id.
    pub tci_mask: u16,
    /// Source MAC and mask.
    pub src: (u64, u64),
    /// Destination MAC and mask.
    pub dst: (u64, u64),
    /// Where it leads; `None` drops.
    pub output: Option<Group>,
    /// All fragments match, though the flow names a fragment type.
    pub ignores_fragments: bool,
}

/// Compiles a flow for a switch with `ports` ports.
pub(super) fn compile(rule: &FlowRule<'_>, ports: u32, ignore_fragments: bool) -> Result<Rule, Refusal> {
    let matches = rule.matches;
    if matches.tunnel != Default::default() {
        return Err(Refusal::TunnelOptions);
    }
    for &field in REQUIRED {
        if !matches.mask.has(field) {
            return Err(Refusal::Wildcard(field));
        }
    }
    let slot = exact(matches, Field::InPort)? as u32;
    let in_port = rule.ports.by_slot(slot).filter(|port| (1..=ports).contains(port)).ok_or(Refusal::Port)?;
    let eth_type = exact(matches, Field::EthType)? as u16;
    // What is less is the length of an 802.3 frame on the wire; a tag's TPID is not what the key has here.
    if eth_type < 0x600 || [ETH_P_8021Q, ETH_P_8021AD].contains(&eth_type) {
        return Err(Refusal::Value(Field::EthType));
    }
    let (tci, tci_mask) = tag(matches)?;
    let mut compiled = Rule {
        in_port,
        eth_type,
        tci,
        tci_mask,
        src: masked(matches, Field::EthSrc),
        dst: masked(matches, Field::EthDst),
        output: None,
        ignores_fragments: false,
    };
    let others = Field::ALL.iter().filter(|field| matches.mask.has(**field) && !EXACT.contains(field));
    for &field in others {
        compiled.ignores_fragments |= other_field(matches, eth_type, field, ignore_fragments)?;
    }
    let outputs = Actions { rule, in_port, ports, compiled: &compiled, state: State::default() }.run()?;
    compiled.output = join(outputs, tci & 0xfff);
    Ok(compiled)
}

fn exact(matches: &Match, field: Field) -> Result<u128, Refusal> {
    if !matches.mask.is_exact(field) {
        return Err(Refusal::Mask(field));
    }
    Ok(matches.key.get(field))
}

fn masked(matches: &Match, field: Field) -> (u64, u64) {
    let mask = matches.mask.get(field) as u64 & MAC;
    (matches.key.get(field) as u64 & mask, mask)
}

/// TCI and mask for the ACL table.
fn tag(matches: &Match) -> Result<(u16, u16), Refusal> {
    let mask = matches.mask.get(Field::VlanTci) as u16;
    let tci = matches.key.get(Field::VlanTci) as u16 & mask;
    let tpid_mask = matches.mask.get(Field::VlanTpid) as u16;
    let tpid = matches.key.get(Field::VlanTpid) as u16 & tpid_mask;
    if mask & VLAN_PRESENT == 0 {
        return Err(Refusal::Mask(Field::VlanTci));
    }
    if tci & VLAN_PRESENT == 0 {
        // An untagged frame's TPID and TCI are all zeros.
        return match (tci, tpid) {
            (0, 0) => Ok((UNTAGGED, 0xfff)),
            (0, _) => Err(Refusal::Value(Field::VlanTpid)),
            _ => Err(Refusal::Value(Field::VlanTci)),
        };
    }
    if tpid != ETH_P_8021Q & tpid_mask {
        return Err(Refusal::Value(Field::VlanTpid));
    }
    if mask & 0xfff != 0xfff {
        return Err(Refusal::Mask(Field::VlanTci));
    }
    // VLAN id 0 does not pass the VLAN table as a tag, and 4095 is ours.
    if !(1..UNTAGGED).contains(&(tci & 0xfff)) {
        return Err(Refusal::Value(Field::VlanTci));
    }
    Ok((tci & !VLAN_PRESENT, mask & !VLAN_PRESENT))
}

/// A field that the ACL table does not compare: it is fine if every frame that hits meets it. Returns whether it is
/// met only because fragments are ignored.
fn other_field(
    matches: &Match,
    eth_type: u16,
    field: Field,
    ignore_fragments: bool,
) -> Result<bool, Refusal> {
    let wanted = matches.key.get(field) & matches.mask.get(field);
    let is_ip = [ETH_P_IP, ETH_P_IPV6].contains(&eth_type);
    match field {
        // The ethertype behind the outer tag is not a tag's, so there is no inner one.
        Field::CvlanTpid | Field::CvlanTci if wanted == 0 => Ok(false),
        Field::CvlanTpid | Field::CvlanTci => Err(Refusal::Field(field)),
        Field::IpFrag if !is_ip && wanted == 0 => Ok(false),
        Field::IpFrag if is_ip && ignore_fragments && wanted == u128::from(FRAG_NONE) => Ok(true),
        Field::IpFrag => Err(Refusal::Fragments),
        // A frame from a wire comes without these.
        Field::RecircId
        | Field::SkbMark
        | Field::SkbPriority
        | Field::DpHash
        | Field::PacketType
        | Field::CtState
        | Field::CtZone
        | Field::CtMark
        | Field::CtLabel
            if wanted == 0 =>
        {
            Ok(false)
        }
        _ if wanted == 0 && ["tunnel.", "ct_tuple"].iter().any(|group| field.name().starts_with(group)) => {
            Ok(false)
        }
        _ => Err(Refusal::Field(field)),
    }
}

/// What has become of the outer tag.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
enum Tag {
    #[default]
    Same,
    Popped,
    Pushed(u16),
}

/// What has become of the frame.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
struct State {
    tag: Tag,
    src: Option<u64>,
    dst: Option<u64>,
}

/// Actions being followed.
struct Actions<'a> {
    rule: &'a FlowRule<'a>,
    in_port: u32,
    ports: u32,
    compiled: &'a Rule,
    state: State,
}

impl Actions<'_> {
    /// The groups of all outputs, in order.
    fn run(mut self) -> Result<Vec<Group>, Refusal> {
        let mut outputs = Vec::new();
        for action in self.rule.actions {
            match action {
                Action::Output(port) => outputs.push(self.output(port)?),
                Action::Drop(_) => break,
                Action::Set(SetGroup::Eth, sets) => sets.iter().try_for_each(|set| self.set(set))?,
                Action::PushVlan { tpid, tci } => self.push(*tpid, *tci)?,
                Action::PopVlan => self.pop()?,
                Action::CtClear => {}
                other => return Err(Refusal::Action(name(other))),
            }
            if outputs.len() > MAX_OUTPUTS {
                return Err(Refusal::TooManyOutputs);
            }
        }
        Ok(outputs)
    }

    fn untagged(&self) -> bool {
        self.compiled.tci == UNTAGGED
    }

    fn output(&self, port: &PortRef) -> Result<Group, Refusal> {
        let PortRef::Ours(port) = port else { return Err(Refusal::Port) };
        let port = self.rule.ports.by_id(*port).filter(|port| (1..=self.ports).contains(port));
        let port = port.ok_or(Refusal::Port)?;
        if port == self.in_port {
            return Err(Refusal::ToIngress);
        }
        let (vlan, tci) = match self.state.tag {
            Tag::Same => (self.compiled.tci & 0xfff, None),
            Tag::Popped => (UNTAGGED, None),
            Tag::Pushed(tci) => (tci & 0xfff, Some(tci)),
        };
        let State { src, dst, .. } = self.state;
        if tci.is_none() && src.is_none() && dst.is_none() {
            return Ok(Group::Interface { vlan, port });
        }
        Ok(Group::Rewrite { vlan, port, tci, src, dst })
    }

    fn set(&mut self, set: &FieldSet) -> Result<(), Refusal> {
        let (place, (known, known_mask)) = match set.field {
            Field::EthSrc => (&mut self.state.src, self.compiled.src),
            Field::EthDst => (&mut self.state.dst, self.compiled.dst),
            field => return Err(Refusal::Set(field)),
        };
        let mask = set.mask as u64 & MAC;
        let before = match *place {
            Some(value) => value,
            // Bits that stay must be known.
            None if !mask & !known_mask & MAC != 0 => return Err(Refusal::Set(set.field)),
            None => known,
        };
        let value = before & !mask | set.value as u64 & mask;
        // The switch takes the zero address for "leave it".
        if value == 0 {
            return Err(Refusal::Set(set.field));
        }
        *place = Some(value);
        Ok(())
    }

    fn push(&mut self, tpid: u16, tci: u16) -> Result<(), Refusal> {
        let tci = tci & !VLAN_PRESENT;
        if tpid != ETH_P_8021Q || !(1..UNTAGGED).contains(&(tci & 0xfff)) {
            return Err(Refusal::Action("push_vlan"));
        }
        self.state.tag = match self.state.tag {
            Tag::Same if self.untagged() => Tag::Pushed(tci),
            // The tag that was there comes back.
            Tag::Popped if self.compiled.tci_mask == !VLAN_PRESENT && tci == self.compiled.tci => Tag::Same,
            // Another tag in its place is what the emulated switch does wrong: it loses the ethertype. A second tag it
            // does not have at all.
            _ => return Err(Refusal::Combination),
        };
        Ok(())
    }

    fn pop(&mut self) -> Result<(), Refusal> {
        self.state.tag = match self.state.tag {
            Tag::Same if !self.untagged() => Tag::Popped,
            Tag::Pushed(_) => Tag::Same,
            _ => return Err(Refusal::Combination),
        };
        Ok(())
    }
}

/// One group for all outputs of a flow whose frames have VLAN id `vlan` inside the switch.
fn join(mut outputs: Vec<Group>, vlan: u16) -> Option<Group> {
    if outputs.len() < 2 {
        return outputs.pop();
    }
    // An interface group in a list must be of the list's VLAN; a rewrite may be of any.
    let members = outputs.into_iter().map(|group| match group {
        Group::Interface { vlan: other, port } if other != vlan => {
            Group::Rewrite { vlan: other, port, tci: None, src: None, dst: None }
        }
        group => group,
    });
    Some(Group::Flood { vlan, members: members.collect() })
}

impl Rule {
    /// The entry as a command's arguments. `group` is the id of [`Rule::output`].
    pub fn write(&self, cookie: u64, group: Option<u32>, to: &mut Writer) {
        pipeline::acl(to, cookie, pipeline::PRIORITY_RULE, self.tci, self.tci_mask);
        to.u32(flow::IN_PORT, self.in_port)
            .u32(flow::IN_PORT_MASK, u32::MAX)
            .be16(flow::ETHERTYPE, self.eth_type);
        to.mac(flow::SRC_MAC, self.src.0).mac(flow::SRC_MAC_MASK, self.src.1);
        to.mac(flow::DST_MAC, self.dst.0).mac(flow::DST_MAC_MASK, self.dst.1);
        if let Some(group) = group {
            to.u32(flow::GROUP, group);
        }
    }
}

#[cfg(test)]
mod tests;
