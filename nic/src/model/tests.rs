use super::*;
use crate::io::{PacketIo, PortEvent, SendError};
use crate::offload::PortMap;
use std::net::Ipv4Addr;
use switch_core::action::{FieldSet, GeneveOpt, TunnelOpts};
use switch_core::checksum;
use switch_core::key;
use switch_core::packet::Gso;

const NOISE: u16 = 0x88b5;

fn port(number: u32) -> PortId {
    PortId { slot: number + 10, generation: 2 }
}

fn map() -> PortMap {
    PortMap::new((1..=4).map(|number| (port(number), number)))
}

fn output(number: u32) -> Action {
    Action::Output(PortRef::Ours(port(number)))
}

fn matches(in_port: u32, more: &[(Field, u128, u128)]) -> Match {
    let mut matches = Match::default();
    let in_port = (Field::InPort, u128::from(port(in_port).slot), u128::MAX);
    for &(field, value, mask) in [in_port].iter().chain(more) {
        matches.mask.set(field, mask);
        matches.key.set(field, value & mask);
    }
    matches
}

fn dst(low: u128) -> [(Field, u128, u128); 1] {
    [(Field::EthDst, low, u128::MAX)]
}

fn frame(dst: u8) -> Vec<u8> {
    let mut frame = vec![0; 60];
    frame[5] = dst;
    frame[12..14].copy_from_slice(&NOISE.to_be_bytes());
    frame
}

fn insert(flows: &mut ModelFlows, rule: u64, matches: &Match, actions: &[Action]) -> Result<(), OpError> {
    let plan = flows.compile(&FlowRule { matches, actions, ports: &map() }).unwrap();
    flows.insert(RuleId(rule), plan, Token(rule))
}

fn poll(flows: &mut ModelFlows, now: Instant) -> Vec<Event> {
    let mut events = Vec::new();
    flows.kick(now);
    flows.poll(now, &mut events);
    events
}

fn done(rule: u64, result: Result<(), OpError>) -> Event {
    Event::Done { token: Token(rule), rule: RuleId(rule), result, last: None }
}

#[test]
fn rules_forward_count_and_give_their_last_counts() {
    let (mut ports, mut flows, bench) = smart_nic(Config::default());
    let now = Instant::now();
    bench.inject(1, &frame(7), now);
    let mut seen = Vec::new();
    ports.receive(8, &mut |received| seen.push((received.port, received.frame.to_vec()))).unwrap();
    assert_eq!(seen, [(1, frame(7))], "without a rule the CPU has it");
    let push = Action::PushVlan { tpid: 0x8100, tci: 0x1005 };
    insert(&mut flows, 1, &matches(1, &dst(7)), &[output(2), push, output(3)]).unwrap();
    assert_eq!(poll(&mut flows, now), [done(1, Ok(()))]);
    for _ in 0..3 {
        bench.inject(1, &frame(7), now);
    }
    bench.inject(1, &frame(8), now);
    assert_eq!(bench.take(2), vec![frame(7); 3]);
    assert_eq!(bench.take(3).len(), 3);
    assert_eq!(ports.receive(8, &mut |_| {}).unwrap(), 1, "another address");
    flows.sample(&[RuleId(1), RuleId(9)]);
    let delta = Counts { packets: 3, bytes: 180 };
    assert_eq!(poll(&mut flows, now), [Event::Stats { rule: RuleId(1), delta }]);
    bench.inject(1, &frame(7), now);
    flows.remove(RuleId(1), Token(1)).unwrap();
    let last = Some(Counts { packets: 1, bytes: 60 });
    assert_eq!(
        poll(&mut flows, now),
        [Event::Done { token: Token(1), rule: RuleId(1), result: Ok(()), last }]
    );
    assert!(bench.rules().is_empty());
}

#[test]
fn masks_and_rules_have_limits_and_replacing_needs_no_room() {
    let (_, mut flows, bench) = smart_nic(Config { max_rules: 3, max_masks: 2, ..Config::default() });
    let now = Instant::now();
    let coarse = |low| matches(1, &[(Field::EthDst, low, 0xf0)]);
    insert(&mut flows, 1, &matches(1, &dst(1)), &[output(2)]).unwrap();
    insert(&mut flows, 2, &coarse(0x20), &[output(3)]).unwrap();
    insert(&mut flows, 3, &matches(1, &[]), &[]).unwrap();
    assert_eq!(poll(&mut flows, now), [done(1, Ok(())), done(2, Ok(())), done(3, Err(OpError::NoSpace))]);
    insert(&mut flows, 4, &coarse(0x30), &[output(3)]).unwrap();
    insert(&mut flows, 5, &coarse(0x40), &[output(3)]).unwrap();
    assert_eq!(poll(&mut flows, now), [done(4, Ok(())), done(5, Err(OpError::NoSpace))]);
    assert_eq!(flows.occupancy().rules, 3);
    let moved = coarse(0x20);
    let plan = flows.compile(&FlowRule { matches: &moved, actions: &[output(4)], ports: &map() }).unwrap();
    flows.replace(RuleId(2), plan, Token(2)).unwrap();
    assert_eq!(flows.remove(RuleId(2), Token(9)), Err(OpError::NoRule), "it is being changed");
    assert_eq!(poll(&mut flows, now), [done(2, Ok(()))]);
    bench.inject(1, &frame(0x2f), now);
    assert_eq!((bench.take(3).len(), bench.take(4).len()), (0, 1));
    assert_eq!(insert(&mut flows, 2, &coarse(0x20), &[]), Err(OpError::Exists));
}

#[test]
fn idle_rules_go_by_themselves() {
    let ageing = Some(Duration::from_secs(10));
    let (_, mut flows, bench) = smart_nic(Config { ageing, ..Config::default() });
    let start = Instant::now();
    insert(&mut flows, 1, &matches(1, &dst(1)), &[output(2)]).unwrap();
    insert(&mut flows, 2, &matches(1, &dst(2)), &[output(2)]).unwrap();
    assert_eq!(poll(&mut flows, start).len(), 2);
    bench.inject(1, &frame(1), start + Duration::from_secs(6));
    let aged =
        |rule, packets| Event::Aged { rule: RuleId(rule), last: Counts { packets, bytes: packets * 60 } };
    assert_eq!(poll(&mut flows, start + Duration::from_secs(11)), [aged(2, 0)]);
    assert_eq!(flows.remove(RuleId(2), Token(2)), Err(OpError::NoRule));
    assert_eq!(poll(&mut flows, start + Duration::from_secs(17)), [aged(1, 1)]);
}

#[test]
fn faults_end_operations_once() {
    let (mut ports, mut flows, bench) = smart_nic(Config::default());
    let now = Instant::now();
    bench.refuse(OpError::Rejected(5));
    insert(&mut flows, 1, &matches(1, &dst(1)), &[output(2)]).unwrap();
    insert(&mut flows, 2, &matches(1, &dst(2)), &[output(2)]).unwrap();
    assert_eq!(poll(&mut flows, now), [done(1, Err(OpError::Rejected(5))), done(2, Ok(()))]);
    bench.refuse(OpError::NoSpace);
    let other = matches(1, &dst(2));
    let plan = flows.compile(&FlowRule { matches: &other, actions: &[output(3)], ports: &map() }).unwrap();
    flows.replace(RuleId(2), plan, Token(2)).unwrap();
    assert_eq!(poll(&mut flows, now), [done(2, Err(OpError::NoSpace))]);
    bench.inject(1, &frame(2), now);
    assert_eq!((bench.take(2).len(), bench.take(3).len()), (1, 0), "the old form stays");
    bench.refuse(OpError::Rejected(1));
    flows.remove(RuleId(2), Token(2)).unwrap();
    assert_eq!(poll(&mut flows, now), [done(2, Err(OpError::Rejected(1)))]);
    assert_eq!(flows.occupancy().rules, 1);
    bench.lose_answers(1);
    insert(&mut flows, 3, &matches(1, &dst(3)), &[output(2)]).unwrap();
    assert_eq!(poll(&mut flows, now), []);
    assert_eq!(bench.rules(), [RuleId(2), RuleId(3)], "the card has done it");
    let late = now + Duration::from_secs(2);
    assert_eq!(poll(&mut flows, late), [done(3, Err(OpError::Unknown)), Event::Reset]);
    assert!(bench.rules().is_empty() && flows.occupancy().rules == 0);
    bench.stall(true);
    insert(&mut flows, 4, &matches(1, &dst(4)), &[output(2)]).unwrap();
    assert_eq!(poll(&mut flows, late), []);
    bench.reset();
    assert_eq!(poll(&mut flows, late), [done(4, Err(OpError::Reset)), Event::Reset]);
    bench.stall(false);
    assert_eq!(poll(&mut flows, late), []);
    bench.set_link(2, false);
    let mut events = Vec::new();
    ports.poll_events(&mut events).unwrap();
    let link = Link { up: false, speed: 100_000 };
    assert_eq!(events, [PortEvent::Reset, PortEvent::Link { number: 2, link }]);
    assert_eq!(ports.send(2, &[&frame(1)], &Offload::default()), Err(SendError::LinkDown));
}

#[test]
fn what_it_cannot_do_is_refused() {
    let (_, flows, _) = smart_nic(Config::default());
    let refused = |more: &[(Field, u128, u128)], actions: &[Action]| {
        let matches = matches(1, more);
        flows.compile(&FlowRule { matches: &matches, actions, ports: &map() }).err()
    };
    assert_eq!(refused(&[(Field::CtState, 0, 0xffff), (Field::RecircId, 0, u128::MAX)], &[]), None);
    assert_eq!(refused(&[(Field::RecircId, 3, u128::MAX)], &[]), Some(Refusal::Field(Field::RecircId)));
    assert_eq!(refused(&[(Field::TunId, 3, u128::MAX)], &[]), Some(Refusal::Field(Field::TunId)));
    assert_eq!(refused(&[(Field::InPort, 0, 0)], &[]), Some(Refusal::Wildcard(Field::InPort)));
    assert_eq!(refused(&[], &[Action::Recirc(1)]), Some(Refusal::Action("recirc")));
    assert_eq!(refused(&[], &[output(7)]), Some(Refusal::Port));
    let ttl = Action::Set(SetGroup::Ipv4, vec![FieldSet { field: Field::IpTtl, value: 9, mask: 0xff }]);
    assert_eq!(refused(&[], &[ttl.clone(), output(2)]), Some(Refusal::Combination), "not known to be IPv4");
    assert_eq!(refused(&[(Field::EthType, 0x0800, u128::MAX)], &[ttl, output(2)]), None);
}

#[test]
fn ports_finish_what_they_are_left() {
    let send = SendCaps { checksum: true, tso: true, ecn: true, max_super: 65_000 };
    let (mut ports, _, bench) = smart_nic(Config { send, ..Config::default() });
    let mut frame = vec![2; 12];
    frame.extend([0x08, 0x00, 0x45, 0, 0x0f, 0xc8, 0, 1, 0x40, 0, 64, 6, 0, 0, 10, 0, 0, 1, 10, 0, 0, 2]);
    let sum = checksum::checksum(&frame[14..34]);
    frame[24..26].copy_from_slice(&sum.to_be_bytes());
    frame.extend([0, 1, 0, 2, 0, 0, 0, 9, 0, 0, 0, 0, 0x50, 0x10, 1, 0]);
    let pseudo = |len| checksum::pseudo_v4(0x0a00_0001, 0x0a00_0002, 6, len);
    frame.extend(checksum::fold(pseudo(4020)).to_be_bytes());
    frame.resize(14 + 20 + 20 + 4000, 7);
    let offload = Offload { needs_csum: true, csum_start: 34, csum_offset: 16, ..Offload::default() };
    ports.send(1, &[&frame[..40], &frame[40..]], &offload).unwrap();
    let [whole] = &bench.take(1)[..] else { panic!("one frame") };
    assert_eq!(checksum::fold(checksum::add(pseudo(4020), &whole[34..])), 0xffff);
    let cut = Offload { gso: Gso::Tcp4, gso_size: 1500, ..offload };
    ports.send(1, &[&frame], &cut).unwrap();
    let segments = bench.take(1);
    assert_eq!(segments.iter().map(Vec::len).collect::<Vec<_>>(), [1554, 1554, 1054]);
    for segment in &segments {
        let len = segment.len() as u32 - 34;
        assert_eq!(checksum::fold(checksum::add(pseudo(len), &segment[34..])), 0xffff);
    }
    assert_eq!(ports.counters(1).unwrap().sent, 2);
    let lie = Offload { csum_start: 30, ..offload };
    assert_eq!(ports.send(1, &[&frame], &lie), Err(SendError::Offload));
}

const VXLAN: u32 = 100;
const GENEVE: u32 = 101;
const OURS: Ipv4Addr = Ipv4Addr::new(192, 0, 2, 1);
const PEER: Ipv4Addr = Ipv4Addr::new(192, 0, 2, 2);

/// A card with two tunnels whose peer is behind cable 2.
fn tunnelled() -> Config {
    let neighbour =
        Neighbour { address: PEER, port: 2, dst: [2, 0, 0, 0, 0, 0x22], src: [2, 0, 0, 0, 0, 0x11] };
    let underlay = Underlay {
        tunnels: vec![(VXLAN, TunnelKind::Vxlan), (GENEVE, TunnelKind::Geneve)],
        addresses: vec![OURS],
        neighbours: vec![neighbour],
    };
    Config { underlay, ..Config::default() }
}

fn tunnel_map() -> PortMap {
    PortMap::new((1..=4).chain([VXLAN, GENEVE]).map(|number| (port(number), number)))
}

/// `set(tunnel(tun_id=ID,src=OURS,dst=PEER,ttl=64,flags(FLAGS)))` with more.
fn set_tunnel(id: u128, flags: u16, more: &[(Field, u128)], options: TunnelOpts) -> Action {
    let fields = [
        (Field::TunId, id),
        (Field::TunIpv4Src, u32::from(OURS).into()),
        (Field::TunIpv4Dst, u32::from(PEER).into()),
        (Field::TunTtl, 64),
        (Field::TunFlags, flags.into()),
    ];
    let full = |field| {
        let mut mask = Mask::EMPTY;
        mask.set_exact(field);
        mask.get(field)
    };
    let set = |&(field, value): &(Field, u128)| FieldSet { field, value, mask: full(field) };
    Action::SetTunnel(fields.iter().chain(more).map(set).collect(), options)
}

fn insert_tunnel(flows: &mut ModelFlows, rule: u64, matches: &Match, actions: &[Action]) {
    let plan = flows.compile(&FlowRule { matches, actions, ports: &tunnel_map() }).unwrap();
    flows.insert(RuleId(rule), plan, Token(rule)).unwrap();
    assert_eq!(poll(flows, Instant::now()), [done(rule, Ok(()))]);
}

#[test]
fn rules_put_frames_into_tunnels() {
    let (_, mut flows, bench) = smart_nic(tunnelled());
    let tag = Action::PushVlan { tpid: 0x8100, tci: 0x1007 };
    let actions = [
        output(3),
        set_tunnel(0x123456, key::TUN_DF | key::TUN_KEY, &[], TunnelOpts::default()),
        tag,
        output(VXLAN),
    ];
    insert_tunnel(&mut flows, 1, &matches(1, &dst(7)), &actions);
    bench.inject(1, &frame(7), Instant::now());
    assert_eq!(bench.take(3), [frame(7)], "what is output before is as it was");
    let [outer] = &bench.take(2)[..] else { panic!("one frame") };
    let mut inner = frame(7);
    inner.splice(12..12, [0x81, 0x00, 0x00, 0x07]);
    // Ethernet, IPv4, UDP and VXLAN (RFC 7348, figure 1), as somebody else would write them.
    assert_eq!(outer[..14], [2, 0, 0, 0, 0, 0x22, 2, 0, 0, 0, 0, 0x11, 0x08, 0x00]);
    assert_eq!(outer[14..24], [0x45, 0, 0, 20 + 8 + 8 + 64, 0, 0, 0x40, 0, 64, 17]);
    assert_eq!((checksum::checksum(&outer[14..34]), &outer[26..34]), (0, &[192, 0, 2, 1, 192, 0, 2, 2][..]));
    assert!(outer[34] >= 0xc0);
    assert_eq!(outer[36..42], [0x12, 0xb5, 0, 8 + 8 + 64, 0, 0]);
    assert_eq!(outer[42..50], [0x08, 0, 0, 0, 0x12, 0x34, 0x56, 0]);
    assert_eq!(outer[50..], inner);
    // GENEVE with an option and a checksum.
    let option = GeneveOpt {
        class: (0x0102, 0xffff),
        kind: (0x80, 0xff),
        value: vec![0, 1, 0, 2],
        mask: vec![0xff; 4],
    };
    let options = TunnelOpts { geneve: vec![option], other: None };
    let set = set_tunnel(9, key::TUN_CSUM | key::TUN_KEY, &[(Field::TunTos, 0x20)], options);
    insert_tunnel(&mut flows, 2, &matches(1, &dst(8)), &[set, output(GENEVE)]);
    bench.inject(1, &frame(8), Instant::now());
    let [outer] = &bench.take(2)[..] else { panic!("one frame") };
    assert_eq!((outer[15], &outer[20..22], &outer[36..38]), (0x20, &[0, 0][..], &[0x17, 0xc1][..]));
    let udp = checksum::pseudo_v4(OURS.into(), PEER.into(), 17, outer.len() as u32 - 34);
    assert_eq!(checksum::fold(checksum::add(udp, &outer[34..])), 0xffff);
    assert_eq!(outer[42..58], [2, 0x40, 0x65, 0x58, 0, 0, 9, 0, 0x01, 0x02, 0x80, 1, 0, 1, 0, 2]);
    assert_eq!(outer[58..], frame(8));
    flows.sample(&[RuleId(1), RuleId(2)]);
    let delta = Counts { packets: 1, bytes: 60 };
    assert_eq!(
        poll(&mut flows, Instant::now()),
        [1, 2].map(|rule| Event::Stats { rule: RuleId(rule), delta }),
        "as the frame came in"
    );
}

#[test]
fn congestion_marks_are_seen_outside() {
    let (_, mut flows, bench) = smart_nic(tunnelled());
    let set = set_tunnel(1, key::TUN_KEY, &[(Field::TunTos, 0xb8 | 1)], TunnelOpts::default());
    insert_tunnel(&mut flows, 1, &matches(1, &[]), &[set, output(VXLAN)]);
    for (inside, outside) in [(0, 0), (1, 1), (2, 2), (3, 2)] {
        let mut packet = frame(1);
        packet[12..14].copy_from_slice(&[0x08, 0x00]);
        packet[14..24].copy_from_slice(&[0x45, inside, 0, 46, 0, 0, 0, 0, 64, 0xfd]);
        bench.inject(1, &packet, Instant::now());
        assert_eq!(bench.take(2)[0][15], 0xb8 | outside, "{inside}");
    }
    bench.inject(1, &frame(1), Instant::now());
    assert_eq!(bench.take(2)[0][15], 0xb8, "no IP packet has no marks");
}

#[test]
fn rules_take_frames_out_of_tunnels() {
    let (mut ports, mut flows, bench) = smart_nic(tunnelled());
    let from = |tunnel, id| {
        let peer = (Field::TunIpv4Src, u128::from(u32::from(PEER)), u128::MAX);
        matches(
            tunnel,
            &[(Field::TunId, id, u128::MAX), peer, (Field::TunTtl, 0, 0), (Field::EthDst, 7, u128::MAX)],
        )
    };
    insert_tunnel(&mut flows, 1, &from(VXLAN, 0x123456), &[output(1)]);
    insert_tunnel(&mut flows, 2, &from(GENEVE, 9), &[output(3), output(4)]);
    // Another card puts them in, with the addresses the other way round.
    let wrap = |id, flags, options, tunnel| {
        let mut config = tunnelled();
        config.underlay.neighbours[0].address = OURS;
        let (_, mut flows, bench) = smart_nic(config);
        let Action::SetTunnel(mut sets, options) = set_tunnel(id, flags, &[], options) else {
            unreachable!()
        };
        (sets[1].value, sets[2].value) = (sets[2].value, sets[1].value);
        insert_tunnel(&mut flows, 1, &matches(1, &[]), &[Action::SetTunnel(sets, options), output(tunnel)]);
        bench.inject(1, &frame(7), Instant::now());
        bench.take(2).remove(0)
    };
    let option =
        |kind| GeneveOpt { class: (1, 0xffff), kind: (kind, 0xff), value: vec![1; 8], mask: vec![0xff; 8] };
    let options = |kind| TunnelOpts { geneve: vec![option(kind)], other: None };
    let vxlan = wrap(0x123456, 0, TunnelOpts::default(), VXLAN);
    let geneve = wrap(9, key::TUN_CSUM, options(5), GENEVE);
    bench.inject(2, &vxlan, Instant::now());
    assert_eq!(bench.take(1), [frame(7)]);
    let mut padded = geneve.clone();
    padded.extend([9; 3]);
    bench.inject(4, &padded, Instant::now());
    assert_eq!((bench.take(3), bench.take(4)), (vec![frame(7)], vec![frame(7)]), "by whichever cable");
    assert_eq!(ports.receive(8, &mut |_| {}).unwrap(), 0);
    // What no rule has, and whatever is unusual, the CPU gets as it came.
    let changed = |outer: &[u8], at: usize, value: u8| {
        let mut outer = outer.to_vec();
        outer[at] = value;
        let sum = [outer[24], outer[25]];
        outer[24..26].fill(0);
        let right = checksum::checksum(&outer[14..34]).to_be_bytes();
        outer[24..26].copy_from_slice(if at == 24 { &sum } else { &right });
        outer
    };
    let left = [
        wrap(0x123457, 0, TunnelOpts::default(), VXLAN),
        wrap(9, 0, options(0x85), GENEVE),
        changed(&vxlan, 15, 3),
        changed(&vxlan, 20, 0x20),
        changed(&vxlan, 24, vxlan[24] ^ 1),
        changed(&vxlan, 33, 9),
        changed(&vxlan, 36, 0x13),
        changed(&vxlan, 39, vxlan[39] - 1),
        changed(&vxlan, 40, 1),
        changed(&vxlan, 42, 0x88),
        changed(&vxlan, 29, 3),
        changed(&geneve, 43, 0x40),
        changed(&geneve, 43, 0x80),
        changed(&geneve, 44, 0x08),
        changed(&geneve, 57, 9),
        vxlan[..60].to_vec(),
    ];
    for (case, outer) in left.iter().enumerate() {
        bench.inject(2, outer, Instant::now());
        let mut seen = Vec::new();
        ports.receive(8, &mut |received| seen.push((received.port, received.frame.to_vec()))).unwrap();
        assert_eq!(seen, [(2, outer.clone())], "case {case}");
    }
    assert!((1..=4).all(|number| bench.take(number).is_empty()));
}

#[test]
fn tunnels_that_the_card_does_not_have_are_refused() {
    let (_, flows, _) = smart_nic(tunnelled());
    let refused = |actions: &[Action]| {
        let rule = FlowRule { matches: &matches(1, &[]), actions, ports: &tunnel_map() };
        flows.compile(&rule).err()
    };
    let plain = |flags, more: &[(Field, u128)]| set_tunnel(1, flags, more, TunnelOpts::default());
    assert_eq!(refused(&[plain(key::TUN_KEY, &[(Field::TunTpDst, 4789)]), output(VXLAN)]), None);
    assert_eq!(refused(&[output(VXLAN)]), Some(Refusal::Combination), "no outer headers");
    assert_eq!(
        refused(&[plain(0, &[]), output(VXLAN), plain(0, &[]), output(VXLAN)]),
        Some(Refusal::Combination)
    );
    for (field, value) in [
        (Field::TunTpDst, 4790),
        (Field::TunFlags, key::TUN_OAM.into()),
        (Field::TunId, 1 << 24),
        (Field::TunTtl, 0),
        (Field::TunIpv4Dst, 0xe000_0001),
        (Field::TunIpv6Dst, 1),
        (Field::TunGbpId, 1),
        (Field::TunTpSrc, 9),
    ] {
        assert_eq!(refused(&[plain(0, &[(field, value)]), output(VXLAN)]), Some(Refusal::Set(field)));
    }
    let option = GeneveOpt { class: (1, 0xffff), kind: (1, 0xff), value: vec![0; 4], mask: vec![0xff; 4] };
    let geneve = TunnelOpts { geneve: vec![option], other: None };
    let erspan = TunnelOpts { other: Some("erspan(ver=1)".into()), ..TunnelOpts::default() };
    for (options, tunnel, refusal) in [
        (geneve.clone(), GENEVE, None),
        (geneve, VXLAN, Some(Refusal::TunnelOptions)),
        (erspan, GENEVE, Some(Refusal::TunnelOptions)),
    ] {
        assert_eq!(refused(&[set_tunnel(1, 0, &[], options), output(tunnel)]), refusal);
    }
    // Fields of a tunnel are those of frames that have come by one.
    let cable = matches(1, &[(Field::TunId, 3, u128::MAX)]);
    let rule = FlowRule { matches: &cable, actions: &[], ports: &tunnel_map() };
    assert_eq!(flows.compile(&rule).err(), Some(Refusal::Field(Field::TunId)));
}
