//! Actions compiled to plans: compile or punt, never approximate.
//!
//! A flow becomes a [`Plan`] only if every field that it matches and every action that it has is understood; otherwise
//! there is a [`PuntReason`] and the flow's packets go to the host unchanged.

use crate::action::{Action, FieldSet, PortRef, SetGroup, TunnelOpts};
use crate::edit::{Edit, LinkPatch, Patch};
use crate::exec::segment_len;
use crate::flow::{FlowSpec, Match};
use crate::key::{ETH_P_8021AD, ETH_P_8021Q, Field, PACKET_WORDS, VLAN_PRESENT};
use crate::packet::{Packet, PortId};
use crate::tunnel::{Endpoint, Outer, Remote};
use std::fmt;
use std::sync::Arc;
pub use tunnelled::{NoWays, TunnelReason, Way, Ways};
use tunnelled::{Tunnelled, decapsulation, pushed};

mod tunnelled;

/// A flow's actions, ready to be executed by [`crate::exec::execute`].
#[derive(Debug, PartialEq, Eq)]
pub struct Plan {
    pub(crate) ops: Box<[Op]>,
    certain: bool,
    /// It is certain for frames, or segments, of at most this length.
    certain_up_to: u32,
    rewrite: Option<Rewrite>,
    outputs: Box<[PortId]>,
    recirculations: Box<[u32]>,
    endpoints: Option<Arc<[Endpoint]>>,
    tunnel: Option<Arc<Outer>>,
}

impl Plan {
    /// Whether execution never ends as [`crate::exec::Verdict::Unresolved`]: no recirculation, and no branch that punts. (A header
    /// that is pushed on a packet with a cut pending does; a cut that is handed on makes the chain be run dry first.)
    pub fn is_certain(&self) -> bool {
        self.certain
    }

    /// Whether it is certain for this packet, of which it is the first stage: where its way is one for packets of a length, that is known
    /// before anything is done.
    #[inline]
    pub(crate) fn is_certain_for(&self, packet: &Packet) -> bool {
        self.certain || self.certain_up_to != 0 && segment_len(packet) <= self.certain_up_to
    }

    /// For frames, or segments, of what length it is.
    pub(crate) fn certain_up_to(&self) -> u32 {
        if self.certain { u32::MAX } else { self.certain_up_to }
    }

    /// The port, if all that it does is one output.
    pub fn sole_output(&self) -> Option<PortId> {
        match *self.ops {
            [Op::Output(port)] => Some(port),
            _ => None,
        }
    }

    /// The header, if all that it does is to lay that around the packet and to send it to one port.
    #[inline(always)]
    pub fn tunnel(&self) -> Option<&Outer> {
        self.tunnel.as_deref()
    }

    /// What it comes to, if all that it does is to rewrite the packet and send it to one port.
    #[inline(always)]
    pub fn rewrite(&self) -> Option<&Rewrite> {
        self.rewrite.as_ref()
    }

    /// The ports that it may output to, each once, in ascending order.
    pub fn outputs(&self) -> &[PortId] {
        &self.outputs
    }

    /// What is decapsulated of packets that have just come in; a packet that is for none of these is punted. All that such a plan has to
    /// do is done to the packet inside, by that one's flow.
    pub fn endpoints(&self) -> Option<&[Endpoint]> {
        self.endpoints.as_deref()
    }

    /// The recirculation ids that it may continue at, each once, in ascending order.
    pub fn recirculations(&self) -> &[u32] {
        &self.recirculations
    }
}

/// A plan that rewrites packets and sends them to one port, for `exec::rewrite`.
#[derive(Debug, PartialEq, Eq, Clone, Copy)]
pub struct Rewrite {
    /// Where they go.
    pub to: PortId,
    /// What becomes of the MAC addresses.
    pub(crate) link: LinkPatch,
    /// What becomes of the TTL.
    pub(crate) ttl: Ttl,
    /// There is more: the ops are to be gone through instead.
    pub(crate) more: bool,
}

/// What a [`Rewrite`] does to the TTL, or hop limit.
#[derive(Debug, PartialEq, Eq, Clone, Copy)]
pub(crate) enum Ttl {
    Keep,
    Decrement,
    /// Of IPv4.
    Set4(u8),
    /// Of IPv6.
    Set6(u8),
}

impl Rewrite {
    fn of(ops: &[Op]) -> Option<Rewrite> {
        let [before @ .., Op::Output(to)] = ops else { return None };
        let mut link = Patch::NOTHING;
        let (mut ttl, mut more) = (Ttl::Keep, false);
        for op in before {
            match op {
                Op::Edit(Edit::Eth(patch)) => link.then(patch),
                Op::DecTtl(exception) if exception.is_empty() => {
                    more |= ttl != Ttl::Keep;
                    ttl = Ttl::Decrement;
                }
                Op::Edit(edit) if let Some(set) = edit.sets_ttl() => {
                    more |= ttl != Ttl::Keep;
                    ttl = set;
                }
                op if op.only_rewrites() => more = true,
                _ => return None,
            }
        }
        Some(Rewrite { to: *to, link: link.into(), ttl, more })
    }
}

/// One step of a plan. The list's end, and what an explicit `drop` compiles to, is that the packet is given up.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Op {
    Output(PortId),
    Edit(Edit),
    /// `skb_mark = skb_mark & !mask | value`.
    SetMark {
        value: u32,
        mask: u32,
    },
    SetPriority {
        value: u32,
        mask: u32,
    },
    /// TPID and TCI as they stand in the frame.
    PushVlan([u8; 4]),
    PopVlan,
    /// When the TTL is used up, these are the last ops.
    DecTtl(Box<[Op]>),
    /// Length of the next output.
    Trunc(u32),
    /// On a copy.
    Clone(Box<[Op]>),
    /// On a copy, if a random number is at most `probability`, which is neither never nor always.
    Sample {
        probability: u32,
        ops: Box<[Op]>,
    },
    /// One of two lists, on a copy.
    CheckLen(Box<CheckLen>),
    /// Output of a copy inside a tunnel's header.
    Through(Way),
    /// What follows is done to the packet inside this header.
    Push(Arc<Outer>),
    Recirc(u32),
    /// This way through the plan cannot be executed here.
    Punt,
}

impl Op {
    /// Whether all that the op does is to change the packet's bytes, or to drop it.
    fn only_rewrites(&self) -> bool {
        match self {
            Op::Edit(_) | Op::PushVlan(_) | Op::PopVlan => true,
            Op::DecTtl(exception) => exception.is_empty(),
            _ => false,
        }
    }

    /// Whether all that the op does is to change the packet's bytes, one for one, or to drop it.
    fn keeps_length(&self) -> bool {
        self.only_rewrites() && !matches!(self, Op::PushVlan(_) | Op::PopVlan)
    }

    /// Whether the op is of no effect when none follows.
    fn changes_only_the_packet(&self) -> bool {
        use Op::*;
        let changes = matches!(self, Edit(_) | SetMark { .. } | SetPriority { .. } | PushVlan(_) | PopVlan);
        changes || matches!(self, Trunc(_) | Push(_))
    }
}

// Two ops to a cache line.
const _: () = assert!(size_of::<Op>() <= 32);

/// A branch on the packet's length.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct CheckLen {
    pub(crate) size: u32,
    pub(crate) greater: Box<[Op]>,
    pub(crate) less_equal: Box<[Op]>,
}

/// Lists of actions inside lists that are compiled.
const MAX_NESTING: usize = 8;

/// Why a flow is not executed here. Displayed as `dump-flows` shows it after `punt: `.
#[derive(Clone, PartialEq, Eq, Debug, Hash)]
pub enum PuntReason {
    /// Connection tracking, as an action or a match on its state.
    Ct,
    /// `hash`: the datapath's hash is private to it.
    Hash,
    /// `meter`.
    Meter,
    /// Output to a port that is not ours.
    ForeignPort(String),
    /// `userspace`, or a sample of it.
    Userspace,
    /// `psample`.
    Psample,
    /// What has to do with tunnels.
    Tunnel(TunnelReason),
    /// An MPLS action or rewrite.
    Mpls,
    /// An NSH action or rewrite.
    Nsh,
    /// `push_eth` or `pop_eth`.
    Ethernet,
    /// `lb_output`.
    LbOutput,
    /// A match on this field, which the tables cannot evaluate.
    Match(&'static str),
    /// A `set` of this header in a flow that does not match the header's presence.
    SetWithoutMatch(&'static str),
    /// A `set` of a field that the header does not have.
    SetField(&'static str),
    /// A tag to be pushed whose TPID is not a VLAN's.
    PushVlan(u16),
    /// Copies nested deeper than is allowed.
    TooDeep,
    /// An action that is not understood.
    Opaque(String),
    /// What the host does beside flows; see [`FlowSpec::held`].
    Held(String),
}

impl fmt::Display for PuntReason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            PuntReason::Ct => f.write_str("ct"),
            PuntReason::Hash => f.write_str("hash"),
            PuntReason::Meter => f.write_str("meter"),
            PuntReason::ForeignPort(port) => write!(f, "foreign port {port}"),
            PuntReason::Userspace => f.write_str("userspace"),
            PuntReason::Psample => f.write_str("psample"),
            PuntReason::Tunnel(reason) => write!(f, "tunnel: {reason}"),
            PuntReason::Mpls => f.write_str("mpls"),
            PuntReason::Nsh => f.write_str("nsh"),
            PuntReason::Ethernet => f.write_str("push or pop of the Ethernet header"),
            PuntReason::LbOutput => f.write_str("lb_output"),
            PuntReason::Match(field) => write!(f, "match on {field}"),
            PuntReason::SetWithoutMatch(group) => write!(f, "set {group} without its match"),
            PuntReason::SetField(field) => write!(f, "set {field}"),
            PuntReason::PushVlan(tpid) => write!(f, "push_vlan with tpid {tpid:#06x}"),
            PuntReason::TooDeep => f.write_str("nested too deep"),
            PuntReason::Opaque(text) => write!(f, "unknown action {text}"),
            PuntReason::Held(why) => f.write_str(why),
        }
    }
}

/// [`compile_with`] where no port is a tunnel's.
///
/// # Errors
/// Why the flow is not executed here.
pub fn compile(spec: &FlowSpec) -> Result<Plan, PuntReason> {
    compile_with(spec, &NoWays)
}

/// Compiles a flow.
///
/// A branch of `check_pkt_len` and the exceptional actions of `dec_ttl` are chosen by the packet alone, so if one of
/// them cannot be compiled only the packets that go there are punted.
///
/// # Errors
/// Why the flow is not executed here.
pub fn compile_with(spec: &FlowSpec, ways: &dyn Ways) -> Result<Plan, PuntReason> {
    if let Some(why) = &spec.held {
        return Err(PuntReason::Held(why.clone()));
    }
    check_match(&spec.matches)?;
    let compiler = Compiler { matches: &spec.matches, ways };
    let endpoints = decapsulation(spec, ways);
    let ops = match &endpoints {
        Some(_) => [Op::Punt].into(),
        None => compiler.list(&spec.actions, Tunnelled::default(), 0)?,
    };
    let rewrite = Rewrite::of(&ops);
    let (outputs, recirculations) = (Box::default(), Box::default());
    let certain_up_to = match &*ops {
        [before @ .., Op::Through(way)] if before.iter().all(Op::keeps_length) => way.limit,
        _ => 0,
    };
    let tunnel = match &*ops {
        [Op::Push(outer), Op::Output(_)] | [Op::Through(Way { outer, .. })] => Some(outer.clone()),
        _ => None,
    };
    let mut plan =
        Plan { ops, certain: true, certain_up_to, rewrite, outputs, recirculations, endpoints, tunnel };
    let (mut outputs, mut recirculations) = (Vec::new(), Vec::new());
    visit(&plan.ops, &mut |op| match op {
        Op::Output(port) => outputs.push(*port),
        Op::Through(Way { to, limit, .. }) => {
            outputs.push(*to);
            plan.certain &= *limit == u32::MAX;
        }
        Op::Recirc(id) => {
            recirculations.push(*id);
            plan.certain = false;
        }
        Op::Punt => plan.certain = false,
        _ => {}
    });
    outputs.sort_unstable();
    outputs.dedup();
    recirculations.sort_unstable();
    recirculations.dedup();
    plan.outputs = outputs.into();
    plan.recirculations = recirculations.into();
    Ok(plan)
}

/// Refuses matches on what the switch's own packets never carry or the parser does not read. The words of the key that
/// are metadata are zero in every packet, but for mark, priority and, of packets that came by a tunnel, its header; a flow that
/// wants them zero is met by all.
fn check_match(matches: &Match) -> Result<(), PuntReason> {
    let TunnelOpts { geneve, other } = &matches.tunnel;
    if other.is_some() || !geneve.is_empty() && !matches.mask.has(Field::TunOptions) {
        return Err(PuntReason::Tunnel(TunnelReason::Match));
    }
    for &field in Field::ALL.iter().filter(|field| field.place().0 >= PACKET_WORDS) {
        let mask = matches.mask.get(field);
        let wants = matches.key.get(field) & mask;
        let name = field.name();
        match field {
            Field::SkbMark | Field::SkbPriority => {}
            // Not read from the packet, so zero says nothing.
            _ if mask != 0 && (name.starts_with("nsh.") || field == Field::Ipv6Exthdrs) => {
                return Err(PuntReason::Match(name));
            }
            _ if wants == 0 => {}
            Field::TunErspanIdx => return Err(PuntReason::Tunnel(TunnelReason::Match)),
            _ if name.starts_with("tunnel.") => {}
            _ if name.starts_with("ct_") => return Err(PuntReason::Ct),
            _ => return Err(PuntReason::Match(name)),
        }
    }
    Ok(())
}

struct Compiler<'a> {
    matches: &'a Match,
    ways: &'a dyn Ways,
}

impl Compiler<'_> {
    /// Compiles a list of actions that is `depth` lists deep.
    fn list(
        &self,
        actions: &[Action],
        mut tunnelled: Tunnelled,
        depth: usize,
    ) -> Result<Box<[Op]>, PuntReason> {
        if depth > MAX_NESTING {
            return Err(PuntReason::TooDeep);
        }
        let refuse = |reason| Err(PuntReason::Tunnel(reason));
        let mut ops = Vec::with_capacity(actions.len());
        for action in actions {
            let nested = |actions: &[Action]| self.list(actions, tunnelled.clone(), depth + 1);
            ops.push(match action {
                Action::Output(port) => {
                    let port = ours(port)?;
                    match std::mem::take(&mut tunnelled.cut) {
                        _ if !self.ways.is_tunnel(port) => Op::Output(port),
                        true => return refuse(TunnelReason::Trunc),
                        false if tunnelled.marked => return refuse(TunnelReason::Mark),
                        false => {
                            self.through(port, tunnelled.remote.as_deref()).map_err(PuntReason::Tunnel)?
                        }
                    }
                }
                Action::Drop(_) => break,
                Action::Set(SetGroup::SkbMark, sets) => {
                    let (value, mask) = metadata(sets, Field::SkbMark)?;
                    tunnelled.marked |= value != 0;
                    Op::SetMark { value, mask }
                }
                Action::Set(SetGroup::SkbPriority, sets) => {
                    let (value, mask) = metadata(sets, Field::SkbPriority)?;
                    tunnelled.marked |= value != 0;
                    Op::SetPriority { value, mask }
                }
                Action::Set(group, _) if tunnelled.pushed && *group != SetGroup::Eth => {
                    return refuse(TunnelReason::Edit); // the match is of the packet inside
                }
                Action::Set(group, sets) => match Edit::compile(*group, sets, self.matches)? {
                    Some(edit) => Op::Edit(edit),
                    None => continue,
                },
                Action::PushVlan { tpid, tci } => {
                    if ![ETH_P_8021Q, ETH_P_8021AD].contains(tpid) {
                        return Err(PuntReason::PushVlan(*tpid));
                    }
                    let ([a, b], [c, d]) = (tpid.to_be_bytes(), (tci & !VLAN_PRESENT).to_be_bytes());
                    Op::PushVlan([a, b, c, d])
                }
                Action::PopVlan => Op::PopVlan,
                Action::DecTtl(_) if tunnelled.pushed => return refuse(TunnelReason::Edit),
                Action::DecTtl(exception) => {
                    Op::DecTtl(nested(exception).unwrap_or_else(|_| [Op::Punt].into()))
                }
                Action::Trunc(len) => {
                    tunnelled.cut = true;
                    Op::Trunc(*len)
                }
                Action::Clone(actions) => Op::Clone(nested(actions)?),
                Action::Sample { probability, actions } => {
                    let ops = nested(actions)?;
                    match *probability {
                        0 => continue,
                        u32::MAX => Op::Clone(ops),
                        probability => Op::Sample { probability, ops },
                    }
                }
                Action::CheckPktLen { size, greater, less_equal } => {
                    let (greater, less_equal) = match (nested(greater), nested(less_equal)) {
                        (Err(reason), Err(_)) => return Err(reason),
                        (greater, less_equal) => (
                            greater.unwrap_or_else(|_| [Op::Punt].into()),
                            less_equal.unwrap_or_else(|_| [Op::Punt].into()),
                        ),
                    };
                    Op::CheckLen(Box::new(CheckLen { size: *size as u32, greater, less_equal }))
                }
                Action::Recirc(_) if tunnelled.remote.is_some() || tunnelled.pushed => {
                    return refuse(TunnelReason::Recirc);
                }
                Action::Recirc(id) => Op::Recirc(*id),
                Action::SetTunnel(sets, opts) => {
                    let remote = Remote::new(sets, opts).map_err(|what| TunnelReason::Header(what.into()));
                    tunnelled.remote = Some(Arc::new(remote.map_err(PuntReason::Tunnel)?));
                    continue;
                }
                // The packet inside would be cut, not the outer one.
                Action::TnlPush(_) if tunnelled.cut => return refuse(TunnelReason::Trunc),
                Action::TnlPush(header) => {
                    tunnelled.pushed = true;
                    Op::Push(pushed(header).map_err(|what| PuntReason::Tunnel(TunnelReason::Header(what)))?)
                }
                Action::TnlPop(_) => return refuse(TunnelReason::Pop),
                Action::CtClear => continue, // nothing here is ever tracked
                Action::Ct(_) => return Err(PuntReason::Ct),
                Action::Hash { .. } => return Err(PuntReason::Hash),
                Action::Meter(_) => return Err(PuntReason::Meter),
                Action::Userspace(_) => return Err(PuntReason::Userspace),
                Action::Psample(_) => return Err(PuntReason::Psample),
                Action::PushMpls { .. } | Action::PopMpls { .. } | Action::AddMpls { .. } => {
                    return Err(PuntReason::Mpls);
                }
                Action::PushEth { .. } | Action::PopEth => return Err(PuntReason::Ethernet),
                Action::PushNsh(..) | Action::PopNsh => return Err(PuntReason::Nsh),
                Action::LbOutput(_) => return Err(PuntReason::LbOutput),
                Action::Opaque(text) => return Err(PuntReason::Opaque(text.clone())),
            });
        }
        // What is done to a packet that then goes nowhere need not be done, and the last output is then the last op. In a
        // list inside another it stays: its failure would end that list too.
        while depth == 0 && ops.last().is_some_and(Op::changes_only_the_packet) {
            ops.pop();
        }
        Ok(ops.into())
    }

    /// Output of the packet to a tunnel's port.
    fn through(&self, port: PortId, remote: Option<&Remote>) -> Result<Op, TunnelReason> {
        let remote = remote.ok_or(TunnelReason::NotSet)?;
        self.ways.way(port, remote).map(Op::Through).map_err(TunnelReason::Way)
    }
}

fn ours(port: &PortRef) -> Result<PortId, PuntReason> {
    match port {
        PortRef::Ours(port) => Ok(*port),
        PortRef::Foreign(name) => Err(PuntReason::ForeignPort(name.clone())),
    }
}

/// The value and mask of a `set` of one 32-bit field.
fn metadata(sets: &[FieldSet], field: Field) -> Result<(u32, u32), PuntReason> {
    let (mut value, mut mask) = (0, 0);
    for set in sets {
        if set.field != field {
            return Err(PuntReason::SetField(set.field.name()));
        }
        let m = set.mask as u32;
        value = value & !m | set.value as u32 & m;
        mask |= m;
    }
    Ok((value, mask))
}

/// Calls `f` with every op of a list and of the lists in it.
fn visit<'p>(ops: &'p [Op], f: &mut impl FnMut(&'p Op)) {
    for op in ops {
        f(op);
        match op {
            Op::Clone(ops) | Op::Sample { ops, .. } | Op::DecTtl(ops) => visit(ops, f),
            Op::CheckLen(branch) => {
                visit(&branch.greater, f);
                visit(&branch.less_equal, f);
            }
            _ => {}
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::action::{Ct, GeneveOpt, Psample, Userspace};
    use crate::key::ETH_P_IP;

    fn port(slot: u32) -> PortId {
        PortId { slot, generation: 1 }
    }

    fn output(slot: u32) -> Action {
        Action::Output(PortRef::Ours(port(slot)))
    }

    fn spec(matches: Match, actions: Vec<Action>) -> FlowSpec {
        FlowSpec { matches, actions, ufid: None, held: None }
    }

    fn matching(fields: &[(Field, u128)]) -> Match {
        let mut matches = Match::default();
        for &(field, value) in fields {
            matches.key.set(field, value);
            matches.mask.set_exact(field);
        }
        matches
    }

    /// What is shown for a flow that matches any packet.
    fn punt(actions: Vec<Action>) -> String {
        compile(&spec(Match::default(), actions)).unwrap_err().to_string()
    }

    #[test]
    fn what_is_not_understood_is_punted_with_its_reason() {
        let userspace = || Action::Userspace(Userspace::default());
        assert_eq!(punt(vec![output(1), userspace()]), "userspace");
        assert_eq!(punt(vec![Action::Sample { probability: 1, actions: vec![userspace()] }]), "userspace");
        assert_eq!(punt(vec![Action::Clone(vec![Action::Ct(Ct::default())])]), "ct");
        assert_eq!(punt(vec![Action::Hash { algorithm: 0, basis: 0 }]), "hash");
        assert_eq!(punt(vec![Action::Meter(1)]), "meter");
        assert_eq!(punt(vec![Action::Psample(Psample::default())]), "psample");
        assert_eq!(punt(vec![Action::Output(PortRef::Foreign("br0".into()))]), "foreign port br0");
        let nowhere = Action::SetTunnel(vec![], TunnelOpts::default());
        assert_eq!(punt(vec![nowhere]), "tunnel: header with no single destination");
        assert_eq!(punt(vec![Action::PopMpls { ethertype: ETH_P_IP }]), "mpls");
        assert_eq!(punt(vec![Action::PopNsh]), "nsh");
        assert_eq!(punt(vec![Action::PopEth]), "push or pop of the Ethernet header");
        assert_eq!(punt(vec![Action::LbOutput(1)]), "lb_output");
        assert_eq!(punt(vec![Action::PushVlan { tpid: 0x9100, tci: 0x1001 }]), "push_vlan with tpid 0x9100");
        let both =
            Action::CheckPktLen { size: 1, greater: vec![userspace()], less_equal: vec![Action::Meter(1)] };
        assert_eq!(punt(vec![both]), "userspace");
        let nested = (0..9).fold(vec![output(1)], |actions, _| vec![Action::Clone(actions)]);
        assert_eq!(punt(nested), "nested too deep");
    }

    #[test]
    fn a_set_needs_its_match() {
        let ttl = |group| {
            let set = FieldSet { field: Field::IpTtl, value: 1, mask: 0xff };
            vec![Action::Set(group, vec![set]), output(1)]
        };
        assert_eq!(punt(ttl(SetGroup::Ipv4)), "set ipv4 without its match");
        assert_eq!(punt(ttl(SetGroup::Eth)), "set ip.ttl");
        let mut ip = matching(&[(Field::EthType, ETH_P_IP as u128)]);
        assert!(compile(&spec(ip.clone(), ttl(SetGroup::Ipv4))).is_ok());
        assert!(compile(&spec(ip.clone(), ttl(SetGroup::Ipv6))).is_err());
        ip.mask.set(Field::EthType, 0xff00);
        assert!(compile(&spec(ip, ttl(SetGroup::Ipv4))).is_err());
        // Protocol and fragment type may be named, not changed.
        let proto = |value| {
            let set = FieldSet { field: Field::IpProto, value, mask: 0xff };
            vec![Action::Set(SetGroup::Ipv4, vec![set]), output(1)]
        };
        let tcp = matching(&[(Field::EthType, ETH_P_IP as u128), (Field::IpProto, 6)]);
        assert_eq!(compile(&spec(tcp.clone(), proto(6))).unwrap().ops.len(), 1);
        assert_eq!(compile(&spec(tcp, proto(17))), Err(PuntReason::SetField("ip.proto")));
    }

    #[test]
    fn matches_that_the_tables_cannot_evaluate_are_punted() {
        let reason = |field, value| compile(&spec(matching(&[(field, value)]), vec![])).err();
        // Untracked packets, without tunnel or hash, meet these.
        for field in [Field::CtState, Field::CtLabel, Field::DpHash, Field::TunId, Field::PacketType] {
            assert_eq!(reason(field, 0), None);
        }
        for field in [Field::SkbMark, Field::RecircId, Field::Mpls0] {
            assert_eq!(reason(field, 5), None);
        }
        assert_eq!(reason(Field::CtState, 0x21), Some(PuntReason::Ct));
        assert_eq!(reason(Field::CtOrigTpSrc, 1), Some(PuntReason::Ct));
        assert_eq!(reason(Field::TunIpv4Src, 1), None);
        assert_eq!(reason(Field::TunErspanIdx, 1), Some(PuntReason::Tunnel(TunnelReason::Match)));
        assert_eq!(reason(Field::DpHash, 1), Some(PuntReason::Match("dp_hash")));
        assert_eq!(reason(Field::NshTtl, 0), Some(PuntReason::Match("nsh.ttl")));
        assert_eq!(reason(Field::Ipv6Exthdrs, 0), Some(PuntReason::Match("ipv6_exthdrs")));
        let mut options = Match::default();
        options.tunnel.geneve.push(GeneveOpt { class: (0, 0), kind: (0, 0), value: vec![], mask: vec![] });
        assert_eq!(compile(&spec(options, vec![])), Err(PuntReason::Tunnel(TunnelReason::Match)));
    }

    #[test]
    fn plans_know_where_they_lead() {
        let actions = vec![
            output(3),
            Action::Clone(vec![output(1), Action::Drop(0), output(9)]),
            Action::DecTtl(vec![output(2)]),
            output(3),
            Action::PopVlan,
            Action::Trunc(64),
        ];
        let plan = compile(&spec(Match::default(), actions)).unwrap();
        assert!(plan.is_certain());
        assert_eq!(plan.outputs(), [port(1), port(2), port(3)]);
        assert!(plan.recirculations().is_empty());
        assert!(matches!(plan.ops.last(), Some(Op::Output(_))), "what follows the last output is left out");
        let nothing = compile(&spec(Match::default(), vec![Action::CtClear])).unwrap();
        assert!(nothing.ops.is_empty() && nothing.outputs().is_empty());
    }
}
