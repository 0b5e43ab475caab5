use super::*;
use crate::offload::PortMap;
use switch_core::action::FieldSet;

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
