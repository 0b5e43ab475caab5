//! Plans against their plain twin on generated packets, and each action on known bytes.

use super::*;
use crate::action::{Action, FieldSet, PortRef, SetGroup};
use crate::compile::{Rewrite, compile};
use crate::flow::{FlowSpec, Match};
use crate::key::ipproto;
use crate::packet::{Layout, NONE, Offload, SNAPSHOT};
use crate::parse::{self, Extracted};
use crate::reference::actions::{self as reference, Frame, Outcome, Sent};
use proptest::prelude::*;
use std::collections::HashMap;

mod known;

const IN_PORT: PortId = PortId { slot: 0, generation: 1 };

fn port(slot: u32) -> PortId {
    PortId { slot, generation: 1 }
}

fn output(slot: u32) -> Action {
    Action::Output(PortRef::Ours(port(slot)))
}

fn set(group: SetGroup, field: Field, value: u128, mask: u128) -> Action {
    Action::Set(group, vec![FieldSet { field, value: value & mask, mask }])
}

/// A plain `set` of a whole field.
fn set_all(group: SetGroup, field: Field, value: u128) -> Action {
    let bits = field.place().2;
    set(group, field, value, if bits == 128 { u128::MAX } else { (1 << bits) - 1 })
}

/// What a packet is, as far as flows have to match it for their actions.
#[derive(Clone, Copy, Debug, PartialEq)]
struct Kind {
    eth_type: u16,
    proto: u8,
    /// Neighbour discovery type, or 0.
    nd: u8,
}

impl Kind {
    fn matches(self) -> Match {
        let mut matches = Match::default();
        let mut exact = |field, value| {
            matches.key.set(field, value);
            matches.mask.set_exact(field);
        };
        exact(Field::EthType, self.eth_type as u128);
        exact(Field::IpProto, self.proto as u128);
        if self.nd != 0 {
            exact(Field::TpSrc, self.nd as u128);
            exact(Field::TpDst, 0);
        }
        matches
    }

    fn plan(self, actions: &[Action]) -> Plan {
        let spec = FlowSpec { matches: self.matches(), actions: actions.to_vec(), ufid: None, held: None };
        compile(&spec).expect("the actions can be compiled")
    }
}

/// The parsed packet of a frame, of which most of a long one is left outside; `None` if it is one for the host.
fn packet(bytes: &[u8], offload: Offload) -> Option<Packet> {
    let mut packet = Packet::default();
    let head = packet.reset(IN_PORT, bytes.len() as u32, SNAPSHOT);
    let n = head.len();
    head.copy_from_slice(&bytes[..n]);
    packet.offload = offload;
    let mut key = Key::default();
    if parse::extract(&mut packet, &mut key) == Extracted::NeedMore {
        let more = packet.extend();
        let end = n + more.len();
        more.copy_from_slice(&bytes[n..end]);
    }
    (parse::extract(&mut packet, &mut key) == Extracted::Done).then_some(packet)
}

fn layout(bytes: &[u8]) -> Layout {
    packet(bytes, Offload::default()).map(|packet| packet.layout).unwrap_or_default()
}

struct World {
    stages: HashMap<u32, Plan>,
    dice: Vec<u32>,
}

/// Records what leaves as whole frames.
struct Recorder<'p> {
    stages: &'p HashMap<u32, Plan>,
    dice: Vec<u32>,
    /// The part of the frame that the packet's head does not have.
    tail: Vec<u8>,
    sent: Vec<Sent>,
    metadata: Vec<Metadata>,
    /// Overwrite the packets that are nobody's any more.
    scribble: bool,
}

impl<'p> Env<'p> for Recorder<'p> {
    fn output(&mut self, packet: &mut Packet, port: PortId, max_len: u32, last: bool) {
        assert_eq!(packet.tail_len() as usize, self.tail.len());
        let mut bytes = [packet.head(), &self.tail].concat();
        bytes.truncate(max_len as usize);
        self.sent.push(Sent { port, bytes, offload: packet.offload });
        if last && self.scribble {
            packet.head_mut().fill(0xee);
        }
    }

    fn recirculate(&mut self, packet: &mut Packet, metadata: &Metadata) -> Option<&'p Plan> {
        let (mut again, mut key) = (packet.clone(), Key::default());
        let extracted = parse::extract_recirculated(&mut again, &mut key, metadata.recirc_id);
        if extracted == Extracted::Done {
            assert_eq!(packet.layout, again.layout, "the layout is kept true");
        }
        self.metadata.push(*metadata);
        self.stages.get(&metadata.recirc_id)
    }

    fn random(&mut self) -> u32 {
        let next = self.dice.remove(0);
        self.dice.push(next);
        next
    }
}

fn run(plan: &Plan, world: &World, bytes: &[u8], offload: Offload) -> Fast {
    let original = packet(bytes, offload).expect("a packet that can be parsed");
    let recorder = || Recorder {
        stages: &world.stages,
        dice: world.dice.clone(),
        tail: bytes[original.head().len()..].to_vec(),
        sent: Vec::new(),
        metadata: Vec::new(),
        scribble: true,
    };
    let mut env = recorder();
    let verdict = execute(plan, &mut original.clone(), &mut Scratch::default(), &mut env);
    if let Some(edits) = plan.rewrite() {
        let by_ops: fn(&Rewrite, &Plan, &mut Packet) -> _ = |_, plan, packet| rewrite_by_ops(plan, packet);
        let at_once: fn(&Rewrite, &Plan, &mut Packet) -> _ =
            |edits, _, packet| rewrite(&edits.link, edits.ttl, packet);
        for way in std::iter::once(by_ops).chain((!edits.more).then_some(at_once)) {
            let (mut packet, mut short) = (original.clone(), recorder());
            let expected = match way(edits, plan, &mut packet) {
                Ok(()) => {
                    short.output(&mut packet, edits.to, u32::MAX, true);
                    Verdict::Done
                }
                Err(reason) => Verdict::Dropped(reason),
            };
            assert_eq!((expected, &short.sent), (verdict, &env.sent), "the short way comes to the same");
        }
    }
    (verdict, env.sent, env.metadata)
}

/// Executes actions on a frame without offloads or further stages.
fn simple(kind: Kind, bytes: &[u8], actions: &[Action]) -> (Verdict, Vec<Sent>) {
    let world = World { stages: HashMap::new(), dice: vec![0] };
    let (verdict, sent, _) = run(&kind.plan(actions), &world, bytes, Offload::default());
    (verdict, sent)
}

/// The one frame that leaves.
fn edited(kind: Kind, bytes: &[u8], actions: &[Action]) -> Vec<u8> {
    let actions = [actions, &[output(1)]].concat();
    let (verdict, mut sent) = simple(kind, bytes, &actions);
    assert_eq!((verdict, sent.len()), (Verdict::Done, 1));
    sent.remove(0).bytes
}

/// A generated packet before its bytes are put together.
#[derive(Clone, Debug)]
struct Draft {
    tags: Vec<(bool, u16)>,
    network: u8,
    transport: u8,
    fragment: u8,
    ttl: u8,
    extensions: Vec<(u8, u8)>,
    options: Vec<(u8, u8)>,
    noise: Vec<u8>,
    payload: usize,
    padding: usize,
    partial: bool,
    gso: bool,
    no_udp_checksum: bool,
}

fn drafts() -> impl Strategy<Value = Draft> {
    let tags = prop::collection::vec((any::<bool>(), any::<u16>()), 0..=2);
    let ttl = prop_oneof![Just(0u8), Just(1), Just(2), any::<u8>()];
    let extensions = prop::collection::vec((0u8..5, 0u8..2), 0..3);
    let options = prop::collection::vec((0u8..4, 0u8..3), 0..3);
    let payload = prop_oneof![0usize..60, 0usize..60, 300usize..400];
    let offload = (any::<bool>(), any::<bool>(), prop::bool::weighted(0.2));
    (
        (tags, 0u8..9, 0u8..6, 0u8..4, ttl, extensions, options),
        prop::collection::vec(any::<u8>(), 512),
        (payload, 0usize..8, offload),
    )
        .prop_map(|((tags, network, transport, fragment, ttl, extensions, options), noise, rest)| {
            let (payload, padding, (partial, gso, no_udp_checksum)) = rest;
            Draft {
                tags,
                network,
                transport,
                fragment,
                ttl,
                extensions,
                options,
                noise,
                payload,
                padding,
                partial,
                gso,
                no_udp_checksum,
            }
        })
}

impl Draft {
    /// The transport header and payload: protocol, neighbour discovery type, bytes.
    fn transport(&self, v6: bool, noise: &mut impl FnMut(usize) -> Vec<u8>) -> (u8, u8, Vec<u8>) {
        let payload = noise(self.payload);
        let mut header;
        match self.transport {
            0 => {
                let options = self.options.len() * 4;
                header = noise(20 + options);
                header[12] = (20 + options) as u8 / 4 * 16;
                (ipproto::TCP, 0, [header, payload].concat())
            }
            1 => {
                header = noise(8);
                let len = (8 + payload.len()) as u16;
                header[4..6].copy_from_slice(&len.to_be_bytes());
                (ipproto::UDP, 0, [header, payload].concat())
            }
            2 => (ipproto::SCTP, 0, [noise(12), payload].concat()),
            3 if v6 => (ipproto::ICMPV6, 0, [vec![128, 0], noise(6), payload].concat()),
            3 => (ipproto::ICMP, 0, [vec![8, 0], noise(6), payload].concat()),
            4 if v6 => {
                let kind = 135 + self.payload as u8 % 2;
                let mut message = [vec![kind, 0], noise(22)].concat();
                for &(kind, units) in &self.options {
                    message.extend([kind, units]);
                    message.extend(noise((units as usize * 8).max(8) - 2));
                }
                (ipproto::ICMPV6, kind, message)
            }
            _ => (47, 0, payload),
        }
    }

    fn build(&self) -> (Kind, Frame) {
        let mut at = 0;
        let mut noise = |n: usize| {
            at += n;
            self.noise.iter().copied().cycle().skip(at - n).take(n).collect::<Vec<u8>>()
        };
        let mut bytes = noise(12);
        for (qinq, tci) in &self.tags {
            bytes.extend(if *qinq { [0x88, 0xa8] } else { [0x81, 0x00] });
            bytes.extend(tci.to_be_bytes());
        }
        let mut kind = Kind { eth_type: 0x88b5, proto: 0, nd: 0 };
        let mut fragment = 0;
        match self.network {
            0..4 => {
                let (proto, _, body) = self.transport(false, &mut noise);
                let options = self.options.len() * 4;
                fragment = self.fragment;
                let mut header = noise(20 + options);
                header[0] = 0x40 | (5 + self.options.len() as u8);
                header[2..4].copy_from_slice(&((20 + options + body.len()) as u16).to_be_bytes());
                header[6..8].copy_from_slice(match fragment {
                    1 => &[0x20, 0x00],
                    2 => &[0x00, 0x07],
                    _ => &[0x40, 0x00],
                });
                header[8] = self.ttl;
                header[9] = proto;
                kind = Kind { eth_type: key::ETH_P_IP, proto, nd: 0 };
                bytes.extend([vec![0x08, 0x00], header, body].concat());
            }
            4..7 => {
                let (proto, nd, body) = self.transport(true, &mut noise);
                kind = Kind { eth_type: key::ETH_P_IPV6, proto, nd };
                let mut next = proto;
                let mut chain = body;
                let broken = self.fragment == 2 && !self.extensions.is_empty();
                for &(what, units) in &self.extensions {
                    let (number, header) = match what {
                        0 => (0, [vec![next, units], noise(units as usize * 8 + 6)].concat()),
                        1 => (60, [vec![next, units], noise(units as usize * 8 + 6)].concat()),
                        2 => (
                            43,
                            [vec![next, units, 4, self.payload as u8 % 2], noise(units as usize * 8 + 4)]
                                .concat(),
                        ),
                        3 => (51, [vec![next, units + 1], noise(units as usize * 4 + 10)].concat()),
                        _ if broken && kind.proto != 44 && chain.len() >= 8 && next == proto => {
                            kind = Kind { proto: 44, nd: 0, ..kind };
                            fragment = 2;
                            (44, [vec![next, 0, 0x01, 0x01], noise(4)].concat())
                        }
                        _ => (44, [vec![next, 0, 0x00, 0x01], noise(4)].concat()),
                    };
                    fragment = fragment.max((number == 44) as u8);
                    chain = [header, chain].concat();
                    next = number;
                }
                let mut header = noise(40);
                header[0] = 0x60 | header[0] & 0x0f;
                header[4..6].copy_from_slice(&(chain.len() as u16).to_be_bytes());
                header[6] = next;
                header[7] = self.ttl;
                bytes.extend([vec![0x86, 0xdd], header, chain].concat());
            }
            7 => {
                kind = Kind { eth_type: key::ETH_P_ARP, proto: 1, nd: 0 };
                bytes.extend([vec![0x08, 0x06, 0, 1, 8, 0, 6, 4, 0, 1], noise(20)].concat());
            }
            _ => bytes.extend([vec![0x88, 0xb5], noise(self.payload)].concat()),
        }
        bytes.extend(noise(self.padding));
        let mut frame = Frame::new(bytes, Offload::default());
        self.offload(kind, fragment, &mut frame);
        (kind, frame)
    }

    /// Offload state and right checksums.
    fn offload(&self, kind: Kind, fragment: u8, frame: &mut Frame) {
        let Layout { l4, payload, .. } = layout(&frame.bytes);
        let offset = match kind.proto {
            ipproto::TCP => 16,
            ipproto::UDP => 6,
            ipproto::ICMPV6 => 2,
            _ => 0,
        };
        let ip = matches!(kind.eth_type, key::ETH_P_IP | key::ETH_P_IPV6);
        if self.partial && ip && offset != 0 && l4 != NONE && (fragment == 0 || fragment == 3) {
            let rest = frame.bytes.len() - payload as usize;
            let gso = match (kind.eth_type, kind.proto) {
                _ if !self.gso || rest == 0 => Gso::None,
                (_, ipproto::UDP) => Gso::UdpL4,
                (key::ETH_P_IP, ipproto::TCP) => Gso::Tcp4,
                (_, ipproto::TCP) => Gso::Tcp6,
                _ => Gso::None,
            };
            frame.offload = Offload {
                needs_csum: true,
                csum_start: l4,
                csum_offset: offset,
                gso,
                gso_size: if gso == Gso::None { 0 } else { (rest as u16).min(40) },
                ..Offload::default()
            };
        }
        if self.no_udp_checksum && kind.proto == ipproto::UDP && ip && l4 != NONE && !frame.offload.needs_csum
        {
            frame.bytes[l4 as usize + 6..l4 as usize + 8].fill(0);
            let keep = frame.clone();
            reference::complete_checksums(frame);
            frame.bytes[l4 as usize..].copy_from_slice(&keep.bytes[l4 as usize..]);
        } else {
            reference::complete_checksums(frame);
        }
    }
}

/// Headers of a kind of packet, and their fields that can be set.
fn settable(kind: Kind) -> Vec<(SetGroup, Vec<Field>)> {
    use Field::*;
    let mut groups = vec![(SetGroup::Eth, vec![EthSrc, EthDst])];
    match kind.eth_type {
        key::ETH_P_IP => groups.push((SetGroup::Ipv4, vec![Ipv4Src, Ipv4Dst, IpTos, IpTtl])),
        key::ETH_P_IPV6 => groups.push((SetGroup::Ipv6, vec![Ipv6Src, Ipv6Dst, IpTos, IpTtl, Ipv6Label])),
        key::ETH_P_ARP => {
            groups.push((SetGroup::Arp, vec![IpProto, ArpSha, ArpTha, Ipv4Src, Ipv4Dst]));
            return groups;
        }
        _ => return groups,
    }
    let ports = vec![TpSrc, TpDst];
    groups.push(match kind.proto {
        ipproto::TCP => (SetGroup::Tcp, ports),
        ipproto::UDP => (SetGroup::Udp, ports),
        ipproto::SCTP => (SetGroup::Sctp, ports),
        ipproto::ICMP => (SetGroup::Icmp, ports),
        ipproto::ICMPV6 if kind.nd != 0 => (SetGroup::Nd, vec![NdTarget, ArpSha, ArpTha]),
        ipproto::ICMPV6 => (SetGroup::Icmpv6, ports),
        _ => return groups,
    });
    groups
}

fn any_set(kind: Kind) -> impl Strategy<Value = Action> + Clone {
    let value = prop_oneof![Just(0), Just(u128::MAX), any::<u128>()];
    let mask = prop_oneof![Just(u128::MAX), Just(u128::MAX), any::<u128>()];
    prop::sample::select(settable(kind)).prop_flat_map(move |(group, fields)| {
        let set = (prop::sample::select(fields), value.clone(), mask.clone()).prop_map(
            move |(field, value, mask)| {
                let icmp = matches!(group, SetGroup::Icmp | SetGroup::Icmpv6);
                let bits = if icmp { 8 } else { field.place().2 };
                let mask = if bits == 128 { mask } else { mask & ((1 << bits) - 1) };
                let mask = mask.max(1); // what changes nothing is not tried, and cannot fail
                FieldSet { field, value: value & mask, mask }
            },
        );
        prop::collection::vec(set, 1..4).prop_map(move |sets| Action::Set(group, sets))
    })
}

fn any_actions(kind: Kind, stage: u32, depth: u32) -> impl Strategy<Value = Vec<Action>> + Clone {
    let tpid = prop_oneof![Just(key::ETH_P_8021Q), Just(key::ETH_P_8021AD)];
    let leaf = prop_oneof![
        4 => (1u32..4).prop_map(output),
        4 => any_set(kind),
        1 => (tpid, any::<u16>()).prop_map(|(tpid, tci)| Action::PushVlan { tpid, tci: tci | 0x1000 }),
        1 => Just(Action::PopVlan),
        1 => (14u32..300).prop_map(Action::Trunc),
        1 => Just(Action::CtClear),
        1 => (any::<u32>(), any::<u32>())
            .prop_map(|(v, m)| set(SetGroup::SkbMark, Field::SkbMark, v as u128, m as u128)),
        1 => (stage + 1..=4).prop_map(move |id| if id == 4 { Action::CtClear } else { Action::Recirc(id) }),
    ];
    let action = leaf.prop_recursive(depth, 24, 5, |inner| {
        let list = prop::collection::vec(inner, 0..5);
        let probability = prop_oneof![Just(0), Just(u32::MAX), Just(u32::MAX / 2)];
        prop_oneof![
            list.clone().prop_map(Action::Clone),
            list.clone().prop_map(Action::DecTtl),
            (probability, list.clone())
                .prop_map(|(probability, actions)| Action::Sample { probability, actions }),
            (14u16..300, list.clone(), list).prop_map(|(size, greater, less_equal)| {
                Action::CheckPktLen { size, greater, less_equal }
            }),
        ]
    });
    prop::collection::vec(action, 0..7)
}

/// A frame, its actions, and those of the stages 1 to 3, of which some are missing.
type Case = (Kind, Frame, Vec<Action>, Vec<Option<Vec<Action>>>, Vec<u32>);

fn cases() -> impl Strategy<Value = Case> {
    drafts().prop_flat_map(|draft| {
        let (kind, frame) = draft.build();
        let stage = move |n| prop::option::weighted(0.9, any_actions(kind, n, 1));
        let stages = (stage(1), stage(2), stage(3)).prop_map(|(a, b, c)| vec![a, b, c]);
        (Just(kind), Just(frame), any_actions(kind, 0, 2), stages, prop::collection::vec(any::<u32>(), 5))
    })
}

/// What a plan's execution gave: also the metadata of each recirculation.
type Fast = (Verdict, Vec<Sent>, Vec<Metadata>);
/// What its twin's gave.
type Plain = (Outcome, Vec<Metadata>);

/// Both executions of a case.
fn both((kind, frame, actions, stages, dice): &Case) -> (Fast, Plain) {
    let stage = |(i, actions): (usize, &Option<Vec<Action>>)| {
        actions.as_ref().map(|actions| (i as u32 + 1, kind.plan(actions)))
    };
    let world = World { stages: stages.iter().enumerate().filter_map(stage).collect(), dice: dice.clone() };
    let fast = run(&kind.plan(actions), &world, &frame.bytes, frame.offload);
    let mut metadata = Vec::new();
    let mut rolls = dice.iter().copied().cycle();
    let outcome = reference::execute(
        actions,
        frame.clone(),
        &mut reference::World {
            recirculate: &mut |frame| {
                metadata.push(frame.metadata);
                stages[frame.metadata.recirc_id as usize - 1].clone()
            },
            random: &mut || rolls.next().unwrap_or_default(),
        },
    );
    (fast, (outcome, metadata))
}

fn agree(fast: Fast, twin: Plain) {
    let (verdict, sent, metadata) = fast;
    assert_eq!(metadata, twin.1);
    match twin.0 {
        Outcome::Sent(expected) => {
            assert_eq!(verdict, Verdict::Done);
            assert_eq!(sent, expected);
        }
        // What would fail at the end of a flow's list is not even tried.
        Outcome::Dropped(DropReason::TruncatedHeader)
            if verdict == Verdict::Dropped(DropReason::FlowDrop) => {}
        Outcome::Dropped(reason) => assert_eq!(verdict, Verdict::Dropped(reason)),
        Outcome::Unresolved => assert_eq!(verdict, Verdict::Unresolved),
    }
}

/// Where the Internet checksum lies in the transport header, if there is one.
fn checksum_offset(kind: Kind) -> usize {
    match kind.proto {
        ipproto::TCP => 16,
        ipproto::UDP => 6,
        _ => 2,
    }
}

/// Makes one of the two representations that zero has as a sum: a wrong checksum may come to either.
fn normalise(kind: Kind, sent: &mut [Sent]) {
    for Sent { bytes, .. } in sent {
        let Layout { l3, l4, .. } = layout(bytes);
        for at in [l3 as usize + 10, l4 as usize + checksum_offset(kind)] {
            if bytes.get(at..at + 2) == Some(&[0xff, 0xff]) {
                bytes[at..at + 2].fill(0);
            }
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(1000))]

    #[test]
    fn plans_do_what_their_twin_does(case in cases()) {
        let (fast, twin) = both(&case);
        agree(fast, twin);
    }

    /// What Open vSwitch makes of routing: both MAC addresses, and the TTL that the flow has matched, less one.
    #[test]
    fn what_a_router_does_is_done_at_once(case in cases(), dst: u64, src: u64, which in 1u8..4, ttl: u8) {
        let (kind, frame, _, stages, dice) = case;
        let mut sets = vec![];
        for (bit, field, value) in [(1, Field::EthDst, dst), (2, Field::EthSrc, src)] {
            if which & bit != 0 {
                sets.push(FieldSet { field, value: value as u128 & ((1 << 48) - 1), mask: (1 << 48) - 1 });
            }
        }
        let mut actions = vec![Action::Set(SetGroup::Eth, sets)];
        match kind.eth_type {
            key::ETH_P_IP => actions.push(set_all(SetGroup::Ipv4, Field::IpTtl, ttl.into())),
            key::ETH_P_IPV6 => actions.push(set_all(SetGroup::Ipv6, Field::IpTtl, ttl.into())),
            _ => {}
        }
        actions.push(output(1));
        let plan = kind.plan(&actions);
        let rewrite = plan.rewrite().expect("a rewrite");
        prop_assert!(!rewrite.more && rewrite.link.as_whole().is_some());
        let (fast, twin) = both(&(kind, frame, actions, stages, dice));
        agree(fast, twin);
    }

    #[test]
    fn a_frame_cut_short_is_edited_like_its_twin_or_dropped(case in cases(), at: prop::sample::Index) {
        let (kind, mut frame, actions, stages, dice) = case;
        frame.offload = Offload::default();
        frame.bytes.truncate(14 + at.index(frame.bytes.len() - 13));
        prop_assume!(packet(&frame.bytes, frame.offload).is_some());
        // Without all of what it covers a checksum is a wrong one.
        let (mut fast, mut twin) = both(&(kind, frame, actions, stages, dice));
        normalise(kind, &mut fast.1);
        if let Outcome::Sent(sent) = &mut twin.0 {
            normalise(kind, sent);
        }
        agree(fast, twin);
    }

    #[test]
    fn a_wrong_checksum_stays_wrong_by_as_much(case in cases(), wrong: [u8; 4]) {
        let (kind, mut frame, actions, stages, dice) = case;
        let Layout { l3, l4, .. } = layout(&frame.bytes);
        if kind.eth_type == key::ETH_P_IP {
            frame.bytes[l3 as usize + 10..l3 as usize + 12].copy_from_slice(&wrong[..2]);
        }
        if l4 != NONE && kind.proto != ipproto::SCTP {
            let at = l4 as usize + checksum_offset(kind);
            frame.bytes[at..at + 2].copy_from_slice(&wrong[2..]);
        }
        let (mut fast, mut twin) = both(&(kind, frame, actions, stages, dice));
        normalise(kind, &mut fast.1);
        if let Outcome::Sent(sent) = &mut twin.0 {
            normalise(kind, sent);
        }
        agree(fast, twin);
    }

    #[test]
    fn a_dry_run_takes_the_same_way(case in cases()) {
        let (kind, frame, actions, stages, dice) = case;
        let plan = kind.plan(&actions);
        let stage = |(i, actions): (usize, &Option<Vec<Action>>)| {
            actions.as_ref().map(|actions| (i as u32 + 1, kind.plan(actions)))
        };
        let world = World { stages: stages.iter().enumerate().filter_map(stage).collect(), dice };
        let first = run(&plan, &world, &frame.bytes, frame.offload);
        prop_assert_eq!(&first, &run(&plan, &world, &frame.bytes, frame.offload));
        let (verdict, sent, metadata) = first;
        for Sent { port, .. } in &sent {
            let mut plans = std::iter::once(&plan).chain(world.stages.values());
            prop_assert!(plans.any(|plan| plan.outputs().contains(port)));
        }
        if plan.is_certain() {
            prop_assert!(verdict != Verdict::Unresolved && metadata.is_empty());
        }
    }
}
