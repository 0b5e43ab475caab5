use super::*;
use crate::offload::PortMap;
use proptest::prelude::*;
use switch_core::key::{Key, PACKET_WORDS};
use switch_core::packet::{Offload, Packet, PortId};
use switch_core::parse::{self, Extracted};
use switch_core::reference::actions::{self as reference, Frame, Outcome, World};

const PORTS: u32 = 3;

fn port(number: u32) -> PortId {
    PortId { slot: number + 40, generation: 1 }
}

fn map() -> PortMap {
    PortMap::new((1..=PORTS).map(|number| (port(number), number)))
}

fn output(number: u32) -> Action {
    Action::Output(PortRef::Ours(port(number)))
}

fn push(tci: u16) -> Action {
    Action::PushVlan { tpid: ETH_P_8021Q, tci: tci | VLAN_PRESENT }
}

fn set(field: Field, value: u128, mask: u128) -> Action {
    Action::Set(SetGroup::Eth, vec![FieldSet { field, value, mask }])
}

/// A flow as Open vSwitch makes it, with these fields beside.
fn flow(eth_type: u16, tci: Option<u16>, more: &[(Field, u128, u128)]) -> Match {
    let mut matches = Match::default();
    let mut add = |field, value: u128, mask: u128| {
        matches.mask.set(field, mask);
        matches.key.set(field, value & mask);
    };
    add(Field::InPort, port(1).slot.into(), u128::MAX);
    add(Field::RecircId, 0, u128::MAX);
    add(Field::EthType, eth_type.into(), u128::MAX);
    add(Field::VlanTpid, if tci.is_some() { 0x8100 } else { 0 }, u128::MAX);
    add(Field::VlanTci, tci.map_or(0, |tci| tci | VLAN_PRESENT).into(), u128::MAX);
    for &(field, value, mask) in more {
        add(field, value, mask);
    }
    matches
}

fn compiled(matches: &Match, actions: &[Action], ignore_fragments: bool) -> Result<Rule, Refusal> {
    compile(&FlowRule { matches, actions, ports: &map() }, PORTS, ignore_fragments)
}

fn refusal(more: &[(Field, u128, u128)]) -> Option<Refusal> {
    compiled(&flow(0x0806, None, more), &[output(2)], false).err()
}

#[test]
fn each_refusal_has_its_reason() {
    let all = u128::MAX;
    assert_eq!(refusal(&[]), None);
    assert_eq!(refusal(&[(Field::EthDst, 5, 0xff), (Field::EthSrc, 6, all)]), None);
    assert_eq!(refusal(&[(Field::CtState, 0, all), (Field::TunId, 0, all), (Field::CvlanTci, 0, all)]), None);
    assert_eq!(refusal(&[(Field::IpFrag, 0, all)]), None, "not an IP packet, so not a fragment");
    assert_eq!(refusal(&[(Field::Ipv4Src, 0, all)]), Some(Refusal::Field(Field::Ipv4Src)));
    assert_eq!(refusal(&[(Field::RecircId, 1, all)]), Some(Refusal::Field(Field::RecircId)));
    assert_eq!(refusal(&[(Field::CtState, 1, all)]), Some(Refusal::Field(Field::CtState)));
    assert_eq!(refusal(&[(Field::Ipv6Exthdrs, 0, all)]), Some(Refusal::Field(Field::Ipv6Exthdrs)));
    assert_eq!(refusal(&[(Field::NshTtl, 0, all)]), Some(Refusal::Field(Field::NshTtl)));
    assert_eq!(refusal(&[(Field::CvlanTci, 1, all)]), Some(Refusal::Field(Field::CvlanTci)));
    assert_eq!(refusal(&[(Field::EthType, 0x0800, 0xff00)]), Some(Refusal::Mask(Field::EthType)));
    assert_eq!(refusal(&[(Field::EthType, 0, 0)]), Some(Refusal::Wildcard(Field::EthType)));
    assert_eq!(refusal(&[(Field::VlanTci, 0, 0)]), Some(Refusal::Wildcard(Field::VlanTci)));
    assert_eq!(refusal(&[(Field::VlanTci, 0, 0xfff)]), Some(Refusal::Mask(Field::VlanTci)));
    assert_eq!(refusal(&[(Field::InPort, 0, 0)]), Some(Refusal::Wildcard(Field::InPort)));
    assert_eq!(refusal(&[(Field::InPort, 7, all)]), Some(Refusal::Port));
    for lying in [0x0004, 0x05ff, 0x8100, 0x88a8] {
        assert_eq!(refusal(&[(Field::EthType, lying, all)]), Some(Refusal::Value(Field::EthType)));
    }
    let tagged = |tci: u128, mask: u128| {
        let mut matches = flow(0x0806, Some(0), &[]);
        matches.key.set(Field::VlanTci, (tci | 0x1000) & mask);
        matches.mask.set(Field::VlanTci, mask);
        compiled(&matches, &[output(2)], false).map(|rule| (rule.tci, rule.tci_mask))
    };
    assert_eq!(tagged(0x6005, 0xffff), Ok((0x6005, 0xefff)));
    assert_eq!(tagged(0x0005, 0x1fff), Ok((5, 0x0fff)));
    assert_eq!(tagged(0x0005, 0x10ff), Err(Refusal::Mask(Field::VlanTci)));
    assert_eq!(tagged(0x1000, 0xffff), Err(Refusal::Value(Field::VlanTci)));
    assert_eq!(tagged(0x0fff, 0xffff), Err(Refusal::Value(Field::VlanTci)));
    let tpid = flow(0x0806, Some(7), &[(Field::VlanTpid, 0x88a8, u128::MAX)]);
    assert_eq!(compiled(&tpid, &[], false), Err(Refusal::Value(Field::VlanTpid)));
}

#[test]
fn fragments_are_ignored_only_on_request_and_alone() {
    let ip = |more: &[(Field, u128, u128)]| {
        let matches = flow(0x0800, None, &[&[(Field::IpFrag, 0, u128::MAX)], more].concat());
        [false, true]
            .map(|ignore| compiled(&matches, &[output(2)], ignore).map(|rule| rule.ignores_fragments))
    };
    assert_eq!(ip(&[]), [Err(Refusal::Fragments), Ok(true)]);
    let [_, with_protocol] = ip(&[(Field::IpProto, 6, u128::MAX)]);
    assert_eq!(with_protocol, Err(Refusal::Field(Field::IpProto)));
    let later = flow(0x0800, None, &[(Field::IpFrag, 2, u128::MAX)]);
    assert_eq!(compiled(&later, &[], true), Err(Refusal::Fragments), "a flow of later fragments alone");
    let open = compiled(&flow(0x0800, None, &[]), &[], true).unwrap();
    assert!(!open.ignores_fragments, "the flow itself does not look");
}

#[test]
fn actions_are_refused_by_name() {
    let untagged = |actions: &[Action]| compiled(&flow(0x0806, None, &[]), actions, false).map(drop);
    let tagged = |actions: &[Action]| compiled(&flow(0x0806, Some(0x2005), &[]), actions, false).map(drop);
    assert_eq!(untagged(&[output(1)]), Err(Refusal::ToIngress));
    let foreign = Action::Output(PortRef::Foreign("br0".into()));
    assert_eq!(untagged(&[foreign]), Err(Refusal::Port));
    let gone = Action::Output(PortRef::Ours(PortId { generation: 9, ..port(2) }));
    assert_eq!(untagged(&[gone]), Err(Refusal::Port), "a port that had the slot before");
    assert_eq!(untagged(&[Action::Meter(1)]), Err(Refusal::Action("meter")));
    assert_eq!(untagged(&[Action::Trunc(64), output(2)]), Err(Refusal::Action("trunc")));
    assert_eq!(untagged(&[Action::PopVlan]), Err(Refusal::Combination));
    assert_eq!(untagged(&[push(5), push(6)]), Err(Refusal::Combination));
    assert_eq!(untagged(&[push(0)]), Err(Refusal::Action("push_vlan")));
    assert_eq!(untagged(&[push(5), Action::PopVlan, output(2)]), Ok(()));
    assert_eq!(tagged(&[Action::PopVlan, push(6), output(2)]), Err(Refusal::Combination), "another id");
    assert_eq!(tagged(&[Action::PopVlan, push(0x2005), output(2)]), Ok(()));
    assert_eq!(tagged(&[push(6)]), Err(Refusal::Combination));
    assert_eq!(untagged(&[set(Field::EthSrc, 0, u128::MAX)]), Err(Refusal::Set(Field::EthSrc)));
    assert_eq!(
        untagged(&[set(Field::EthSrc, 1, 0xff)]),
        Err(Refusal::Set(Field::EthSrc)),
        "other bits unknown"
    );
    let known = flow(0x0806, None, &[(Field::EthSrc, 0x0200_0000_0000, u128::MAX)]);
    let rule = compiled(&known, &[set(Field::EthSrc, 1, 0xff), output(2)], false).unwrap();
    let expected =
        Group::Rewrite { vlan: UNTAGGED, port: 2, tci: None, src: Some(0x0200_0000_0001), dst: None };
    assert_eq!(rule.output, Some(expected));
    assert_eq!(untagged(&vec![output(2); 65]), Err(Refusal::TooManyOutputs));
}

/// What the switch does with a frame, by its tables' rules (QEMU, hw/net/rocker/rocker_of_dpa.c); `None` if the rule is
/// not hit.
fn switch(rule: &Rule, in_port: u32, frame: &[u8]) -> Option<Vec<(u32, Vec<u8>)>> {
    let be16 = |at: usize| frame.get(at..at + 2).map(|bytes| u16::from_be_bytes([bytes[0], bytes[1]]));
    let mac = |at: usize| frame[at..at + 6].iter().fold(0u64, |mac, &byte| mac << 8 | u64::from(byte));
    let tagged = be16(12)? == 0x8100;
    let (tci, eth_type) = if tagged { (be16(14)?, be16(16)?) } else { (UNTAGGED, be16(12)?) };
    // The VLAN table.
    if tagged && tci & 0xfff != 0 && !pipeline::tagged().any(|(value, mask)| tci & mask == value) {
        return None;
    }
    let hit = in_port == rule.in_port
        && eth_type == rule.eth_type
        && tci & rule.tci_mask == rule.tci & rule.tci_mask
        && mac(6) & rule.src.1 == rule.src.0
        && mac(0) & rule.dst.1 == rule.dst.0;
    if !hit {
        return None;
    }
    let out = |group: &Group| {
        let (vlan, port, new, src, dst) = match *group {
            Group::Interface { vlan, port } => (vlan, port, None, None, None),
            Group::Rewrite { vlan, port, tci, src, dst } => (vlan, port, tci, src, dst),
            Group::Flood { .. } => panic!("a list in a list"),
        };
        let (dst, src) = (dst.unwrap_or(mac(0)), src.unwrap_or(mac(6)));
        let mut sent = [&dst.to_be_bytes()[2..], &src.to_be_bytes()[2..]].concat();
        if vlan != UNTAGGED {
            assert!(new.is_none() || !tagged, "what the device does wrong");
            sent.extend([0x81, 0x00]);
            sent.extend(new.unwrap_or(tci).to_be_bytes());
        }
        sent.extend(eth_type.to_be_bytes());
        sent.extend(&frame[if tagged { 18 } else { 14 }..]);
        (port, sent)
    };
    Some(match &rule.output {
        None => vec![],
        Some(Group::Flood { vlan, members }) => {
            for member in members {
                assert!(!matches!(member, Group::Interface { vlan: other, .. } if other != vlan));
            }
            members.iter().map(out).collect()
        }
        Some(group) => vec![out(group)],
    })
}

/// What the flow does with a frame; `None` if it does not match.
fn software(matches: &Match, actions: &[Action], in_port: u32, frame: &[u8]) -> Option<Vec<(u32, Vec<u8>)>> {
    let mut packet = Packet::from_frame(port(in_port), frame);
    let mut key = Key::default();
    assert_eq!(parse::extract(&mut packet, &mut key), Extracted::Done);
    assert!(key.words[PACKET_WORDS..].iter().all(|&word| word == 0));
    if !key.matches(&matches.key, &matches.mask) {
        return None;
    }
    let (mut recirculate, mut random) = (|_: &Frame| None, || 0);
    let mut world = World { recirculate: &mut recirculate, random: &mut random };
    Some(match reference::execute(actions, Frame::new(frame.to_vec(), Offload::default()), &mut world) {
        Outcome::Sent(sent) => sent.into_iter().map(|sent| (sent.port.slot - 40, sent.bytes)).collect(),
        Outcome::Dropped(_) => vec![],
        Outcome::Unresolved => panic!("nothing here recirculates"),
    })
}

fn small_mac() -> impl Strategy<Value = u64> {
    (0u64..2, 0u64..2).prop_map(|(a, b)| 0x0200_0000_0000 | a << 24 | b)
}

fn small_tci() -> impl Strategy<Value = u16> {
    (prop::sample::select(vec![0u16, 0, 0xe000]), prop::sample::select(vec![5u16, 5, 5, 5, 0, 1, 4095]))
        .prop_map(|(priority, id)| priority | id)
}

fn some_frame() -> impl Strategy<Value = (u32, Vec<u8>)> {
    let tags = prop_oneof![
        2 => Just(vec![]),
        3 => prop::collection::vec((prop::sample::select(vec![0x8100u16, 0x8100, 0x8100, 0x88a8]), small_tci()), 1..3),
    ];
    let eth_type = prop::sample::select(vec![0x0806u16, 0x0806, 0x0800, 0x0800, 0x86dd, 0x0004, 40]);
    // Version, and the byte that is IPv4's fragment flags and offset, or the next header of IPv6 (44: a fragment header).
    let ip = (
        prop::sample::select(vec![0x45u8, 0x60, 0x00]),
        prop::sample::select(vec![0x40u8, 0x20, 0x01, 44]),
        any::<u8>(),
    );
    (1..=2u32, small_mac(), small_mac(), tags, eth_type, ip).prop_map(
        |(port, dst, src, tags, eth_type, ip)| {
            let mut frame = [&dst.to_be_bytes()[2..], &src.to_be_bytes()[2..]].concat();
            for (tpid, tci) in tags {
                frame.extend(tpid.to_be_bytes());
                frame.extend(tci.to_be_bytes());
            }
            frame.extend(eth_type.to_be_bytes());
            let at = frame.len();
            frame.resize(at + 60, 17);
            (frame[at], frame[at + 6], frame[at + 7]) = (ip.0, ip.1, ip.2 & 1);
            (port, frame)
        },
    )
}

fn some_match() -> impl Strategy<Value = Match> {
    let any_mask = prop::sample::select(vec![0u128, 0, 0xffff_ffff_ffff, 0xffff_ff00_0000, 0x3]);
    let tci_mask = prop::sample::select(vec![0xffffu16, 0xffff, 0x1fff, 0x1000, 0x0fff, 0]);
    let extra = prop::sample::select(vec![
        None,
        None,
        None,
        None,
        None,
        Some((Field::IpFrag, 0)),
        Some((Field::IpProto, 17)),
        Some((Field::CvlanTci, 0)),
        Some((Field::CvlanTci, 0x1005)),
        Some((Field::CtState, 0)),
        Some((Field::IpTos, 17)),
    ]);
    let eth_type =
        (prop::sample::select(vec![0x0806u16, 0x0806, 0x0800, 0x0800, 0x86dd, 0x0004]), any::<bool>());
    let tpid = (prop::sample::select(vec![0x8100u16, 0x8100, 0x8100, 0x88a8]), prop::bool::weighted(0.7));
    let tag = (prop::option::of(small_tci()), tci_mask, tpid);
    let macs = (small_mac(), any_mask.clone(), small_mac(), any_mask);
    (1..=2u32, eth_type, tag, macs, extra).prop_map(
        |(in_port, (eth_type, any_type), (tci, tci_mask, tpid), macs, extra)| {
            let mut fields = vec![
                (Field::InPort, port(in_port).slot.into(), u128::MAX),
                (Field::EthDst, macs.0.into(), macs.1),
                (Field::EthSrc, macs.2.into(), macs.3),
                (Field::VlanTci, tci.map_or(0, |tci| tci | VLAN_PRESENT).into(), tci_mask.into()),
                (Field::VlanTpid, tpid.0.into(), if tpid.1 { 0 } else { u128::MAX }),
                (Field::EthType, eth_type.into(), if any_type && eth_type == 4 { 0 } else { u128::MAX }),
            ];
            if !tpid.1 && tci.is_none() {
                fields.push((Field::VlanTpid, 0, u128::MAX));
            }
            fields.extend(extra.map(|(field, value)| (field, value, u128::MAX)));
            flow(eth_type, None, &fields)
        },
    )
}

fn some_actions() -> impl Strategy<Value = Vec<Action>> {
    let address = prop::sample::select(vec![Field::EthSrc, Field::EthDst]);
    let one = prop_oneof![
        6 => (2..=PORTS).prop_map(output),
        1 => small_tci().prop_map(push),
        1 => Just(Action::PopVlan),
        2 => (address, small_mac(), prop::sample::select(vec![u128::MAX, 0xff]))
            .prop_map(|(field, value, mask)| set(field, u128::from(value) & mask, mask & ((1 << 48) - 1))),
        1 => Just(Action::CtClear),
        1 => Just(Action::Drop(0)),
    ];
    prop::collection::vec(one, 0..5)
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 60_000, ..ProptestConfig::default() })]

    /// A frame that hits a compiled rule is one that the flow matches, and leaves as the flow says.
    #[test]
    fn rules_do_what_their_flows_do((in_port, frame) in some_frame(), matches in some_match(), actions in some_actions()) {
        if let Ok(rule) = compiled(&matches, &actions, false)
            && let Some(sent) = switch(&rule, in_port, &frame)
        {
            prop_assert_eq!(Some(sent), software(&matches, &actions, in_port, &frame), "{:?}", rule);
        }
    }

    /// With fragments ignored, what is not a fragment is still treated exactly so.
    #[test]
    fn ignoring_fragments_changes_nothing_else((in_port, frame) in some_frame(), mut matches in some_match()) {
        matches.mask.set_exact(Field::IpFrag);
        let actions = [output(3)];
        if let Ok(rule) = compiled(&matches, &actions, true)
            && let Some(sent) = switch(&rule, in_port, &frame)
        {
            matches.mask.set(Field::IpFrag, if rule.ignores_fragments { 0 } else { 0xff });
            prop_assert_eq!(Some(sent), software(&matches, &actions, in_port, &frame));
        }
    }
}

/// The strategies above are of use only if flows compile and frames hit.
#[test]
fn the_strategies_meet() {
    use proptest::strategy::ValueTree;
    let mut runner = proptest::test_runner::TestRunner::deterministic();
    let mut hits = 0;
    for _ in 0..20_000 {
        let mut draw =
            || (some_frame(), some_match(), some_actions()).new_tree(&mut runner).unwrap().current();
        let ((in_port, frame), matches, actions) = draw();
        hits += u32::from(
            compiled(&matches, &actions, false).is_ok_and(|rule| switch(&rule, in_port, &frame).is_some()),
        );
    }
    assert!(hits > 40, "only {hits} of 20000");
}
