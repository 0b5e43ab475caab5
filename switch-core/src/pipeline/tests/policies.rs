//! The pipeline's policies, one by one.

use super::*;

fn recirc_bench() -> Bench {
    let mut bench = Bench::plain();
    let eth = |dst: u128| (Field::EthDst, 0x0200_0000_0000 | dst, None);
    let actions = vec![
        set(SetGroup::Eth, Field::EthDst, 0x0200_0000_0003, u128::MAX >> 80),
        Action::PushVlan { tpid: ETH_P_8021Q, tci: 5 | VLAN_PRESENT },
        Action::Recirc(1),
    ];
    bench.add(PORT, Source::Learned, spec(matches(PORT, 0, &[eth(1)]), actions)).unwrap();
    let vlan = [
        (Field::VlanTpid, ETH_P_8021Q as u128, None),
        (Field::VlanTci, (5 | VLAN_PRESENT) as u128, None),
        eth(3),
    ];
    bench.add(PORT, Source::Learned, spec(matches(PORT, 1, &vlan), vec![output(OUT)])).unwrap();
    bench
}

fn l1_flows(bench: &Bench, packet: &Packet) -> (usize, bool) {
    match bench.switches[0].trace(packet).l1 {
        L1Trace::Hit { flows, whole, .. } => (flows.len(), whole),
        other => panic!("{other:?}"),
    }
}

#[test]
fn a_determined_chain_is_remembered_whole() {
    let mut bench = recirc_bench();
    let packet = FRAME.packet(PORT);
    bench.burst(std::slice::from_ref(&packet));
    assert_eq!(l1_flows(&bench, &packet), (2, true));
    bench.burst(&[packet.clone(), packet.clone()]);
    assert_eq!(bench.paths[&0][0].read().l1_hits, 2);
    // Two tags and one more: the third hides what is below.
    let tagged = FrameSpec { tags: vec![(ETH_P_8021AD, 5), (ETH_P_8021Q, 6)], ..FRAME }.packet(PORT);
    bench.burst(&[tagged]);
    // When the second stage goes, the whole entry is worth nothing.
    let second = bench.twin.flows[1].flow;
    bench.remove(second);
    assert_eq!(bench.burst(&[packet]), [Fate::Upcall(Upcall::Miss)]);
    bench.finish(&[PORT]);
}

#[test]
fn a_chain_that_counts_down_an_unseen_ttl_is_cut() {
    let mut bench = Bench::plain();
    let first = spec(matches(PORT, 0, &[]), vec![Action::DecTtl(Vec::new()), Action::Recirc(1)]);
    bench.add(PORT, Source::Learned, first).unwrap();
    let ip = (Field::EthType, ETH_P_IP as u128, None);
    for (bit, target) in [(0u128, OUT), (1, PORT)] {
        let m = matches(PORT, 1, &[ip, (Field::IpTtl, bit, Some(1))]);
        bench.add(PORT, Source::Learned, spec(m, vec![output(target)])).unwrap();
    }
    // 64 and 66 are one L1 key; so are 65 and 67. What becomes of the bit is not decided by the bit alone for all TTLs.
    for ttl in [64, 66, 65, 67, 1, 64] {
        bench.burst(&[FrameSpec { ttl, ..FRAME }.packet(PORT)]);
    }
    assert_eq!(l1_flows(&bench, &FRAME.packet(PORT)), (1, false));
    bench.finish(&[PORT]);
}

#[test]
fn a_flow_of_a_higher_source_takes_over_at_once() {
    let mut bench = Bench::plain();
    let all = |target| spec(matches(PORT, 0, &[]), vec![output(target)]);
    let packet = FRAME.packet(PORT);
    bench.add(PORT, Source::Learned, all(OUT)).unwrap();
    bench.burst(&[packet.clone(), packet.clone()]);
    let explicit = bench.add(PORT, Source::Explicit, all(PORT)).unwrap();
    bench.burst(&[packet.clone(), packet.clone()]);
    let replaced = bench.replace(explicit, vec![Action::Userspace(Userspace::default())]);
    assert_eq!(bench.burst(std::slice::from_ref(&packet)), [Fate::Upcall(Upcall::Punt(replaced))]);
    bench.remove(replaced);
    assert!(matches!(bench.burst(&[packet])[0], Fate::Sent(_)));
    bench.finish(&[PORT]);
}

#[test]
fn few_packets_of_a_flow_miss_while_it_is_decided_about() {
    let mut bench = Bench::plain();
    let packets = vec![FRAME.packet(PORT); 20];
    let upcalls = |fates: Vec<Fate>| fates.iter().filter(|f| **f == Fate::Upcall(Upcall::Miss)).count();
    assert_eq!(upcalls(bench.burst(&packets)), 8);
    assert_eq!(upcalls(bench.burst(&packets)), 0);
    bench.now += 100;
    assert_eq!(upcalls(bench.burst(&packets)), 8);
    // The flow comes: no packet waits for the time to pass.
    bench.add(PORT, Source::Learned, spec(matches(PORT, 0, &[]), vec![output(OUT)])).unwrap();
    assert!(bench.burst(&packets).iter().all(|fate| matches!(fate, Fate::Sent(_))));
    let paths = bench.finish(&[PORT]);
    assert_eq!((paths.misses, paths.pending, paths.l1_hits + paths.l2_hits), (16, 44, 20));
}

#[test]
fn the_last_packet_of_a_burst_keeps_a_due_flow_alive() {
    let mut bench = recirc_bench();
    let packets = vec![FRAME.packet(PORT); 3];
    bench.burst(&packets);
    let second = bench.twin.flows[1].flow;
    bench.planner.get(second).unwrap().set_due();
    let fates = run_beside(&mut bench.switches[0], 1, &packets, true);
    assert!(fates.iter().all(|fate| matches!(fate, Fate::Sent(_))), "no packet is lost to a full host");
    let fates = run(&mut bench.switches[0], 1, &packets);
    assert!(matches!(fates[..2], [Fate::Sent(_), Fate::Sent(_)]));
    assert_eq!(fates[2], Fate::Upcall(Upcall::KeepAlive(second)));
    assert!(matches!(run(&mut bench.switches[0], 1, &packets)[2], Fate::Sent(_)));
    assert_eq!(bench.paths[&0][0].read().keepalives, 1);
    assert_eq!(bench.planner.get(second).unwrap().stats().packets, 4 * 3);
}

#[test]
fn a_keep_alive_is_given_by_a_burst_that_is_shorter_than_those_before() {
    let mut bench = Bench::plain();
    let flow = bench.add(PORT, Source::Learned, spec(matches(PORT, 0, &[]), vec![output(OUT)])).unwrap();
    bench.burst(&vec![FRAME.packet(PORT); BURST]);
    bench.planner.get(flow).unwrap().set_due();
    assert_eq!(
        run(&mut bench.switches[0], 1, &[FRAME.packet(PORT)]),
        [Fate::Upcall(Upcall::KeepAlive(flow))]
    );
}

/// When a flow that is due has been replaced, its packets may know it by both names.
#[test]
fn the_last_packet_keeps_a_flow_alive_that_was_replaced() {
    let mut bench = Bench::plain();
    let old = bench.add(PORT, Source::Learned, spec(matches(PORT, 0, &[]), vec![output(OUT)])).unwrap();
    let packets = vec![FRAME.packet(PORT); 4];
    bench.burst(&packets);
    let new = bench.replace(old, vec![output(PORT)]);
    bench.planner.get(new).unwrap().set_due();
    let fates = run(&mut bench.switches[0], 1, &packets);
    assert!(fates[..3].iter().all(|fate| matches!(fate, Fate::Sent(_))), "{fates:?}");
    assert_eq!(fates[3], Fate::Upcall(Upcall::KeepAlive(new)));
}

#[test]
fn long_keys_are_looked_up_in_l2_each_time() {
    let mut bench = Bench::plain();
    let fields =
        [Field::EthDst, Field::EthSrc, Field::EthType, Field::Ipv6Src, Field::Ipv6Dst, Field::IpProto];
    let mut m = matches(PORT, 0, &[]);
    let packet = FrameSpec { eth_type: ETH_P_IPV6, tags: vec![(ETH_P_8021Q, 5)], ..FRAME }.packet(PORT);
    let mut key = Key::default();
    extract(&mut packet.clone(), &mut key);
    for field in fields.into_iter().chain([Field::TpSrc, Field::TpDst]) {
        m.key.set(field, key.get(field));
        m.mask.set_exact(field);
    }
    bench.add(PORT, Source::Learned, spec(m.clone(), vec![output(OUT)])).unwrap();
    bench.burst(&[packet.clone(), packet.clone()]);
    assert_eq!(l1_flows(&bench, &packet), (1, true), "ten words fit");
    let solicitation = {
        let mut frame = packet.head().to_vec();
        frame[4 + 20] = ipproto::ICMPV6;
        frame[4 + 14 + 4..][..2].copy_from_slice(&24u16.to_be_bytes());
        frame.truncate(4 + 54);
        frame.extend([135, 0, 0, 0, 0, 0, 0, 0]);
        frame.extend([0xfe; 16]);
        Packet::from_frame(PORT, &frame)
    };
    let mut nd = matches(PORT, 0, &[]);
    let mut key = Key::default();
    extract(&mut solicitation.clone(), &mut key);
    for field in fields.into_iter().chain([Field::TpSrc, Field::NdTarget]) {
        nd.key.set(field, key.get(field));
        nd.mask.set_exact(field);
    }
    assert_ne!(key.get(Field::NdTarget), 0);
    bench.add(PORT, Source::Learned, spec(nd, vec![output(OUT)])).unwrap();
    bench.burst(&[solicitation.clone(), solicitation.clone()]);
    assert_eq!(bench.switches[0].trace(&solicitation).l1, L1Trace::TooLong);
    assert_eq!(bench.finish(&[PORT]).l2_hits, 4, "only the first flow's second packet could be cached");
}

#[test]
fn what_is_refused_is_counted() {
    let mut bench = Bench::plain();
    bench.add(PORT, Source::Learned, spec(matches(PORT, 0, &[]), Vec::new())).unwrap();
    let runt = Packet::from_frame(PORT, &[1; 13]);
    let mut liar = FRAME.packet(PORT);
    liar.offload.gso_size = 666;
    let fates = run(&mut bench.switches[0], 1, &[runt, liar, FRAME.packet(PORT)]);
    let expected = [DropReason::Runt, DropReason::BadOffload, DropReason::FlowDrop];
    assert_eq!(fates, expected.map(Fate::Dropped));
    let paths = bench.paths[&0][0].read();
    assert_eq!((paths.refused, paths.l2_hits), (2, 1));
}

#[test]
fn what_datapaths_read_differently_goes_to_the_host() {
    let mut bench = Bench::plain();
    bench.add(PORT, Source::Learned, spec(matches(PORT, 0, &[]), vec![output(OUT)])).unwrap();
    let frame = FRAME.bytes();
    let mut fate = |frame: &[u8]| {
        let packet = Packet::from_frame(PORT, frame);
        let outcome = bench.switches[0].trace(&packet).outcome;
        let fate = run(&mut bench.switches[0], 1, &[packet]).remove(0);
        let at_host = fate == Fate::Upcall(Upcall::Unparsable);
        assert_eq!(outcome == Outcome::Upcall(Upcall::Unparsable), at_host);
        at_host
    };
    // With one tag the total length of IPv4 is at `l3 + 2`.
    let l3 = frame.windows(2).position(|pair| pair == ETH_P_IP.to_be_bytes()).unwrap() + 2;
    let with = |change: &dyn Fn(&mut Vec<u8>)| {
        let mut other = frame.clone();
        change(&mut other);
        other
    };
    let total = (frame.len() - l3) as u16;
    let put = |total: u16| with(&|frame| frame[l3 + 2..l3 + 4].copy_from_slice(&total.to_be_bytes()));
    assert!(!fate(&frame));
    assert!(!fate(&with(&|frame| frame.extend([0; 9]))), "padding");
    assert!(fate(&put(total + 1)), "longer than the frame");
    assert!(fate(&put(19)), "shorter than its header");
    assert!(fate(&put(27)), "ends inside the transport header");
    assert!(!fate(&put(28)));
    let tcp = with(&|frame| {
        frame[l3 + 9] = 6;
        frame.truncate(l3 + 20);
        frame.extend([[0; 12], [0x40; 12]].concat());
        frame[l3 + 2..l3 + 4].copy_from_slice(&44u16.to_be_bytes());
    });
    assert!(fate(&tcp), "a TCP header that says it is shorter than one");
    let v6 = |payload: u16, padding: usize| {
        let mut frame = frame[..12].to_vec();
        frame.extend([0x86, 0xdd, 0x60, 0, 0, 0]);
        frame.extend(payload.to_be_bytes());
        frame.extend([59, 64]);
        frame.extend(vec![0x20; 32 + 20 + padding]);
        frame
    };
    let snap = |control: u8| {
        let mut frame = frame[..12].to_vec();
        frame.extend([0, 8, 0xaa, 0xaa, control, 0, 0, 0, 0x12, 0x34]);
        frame.extend([0; 40]);
        frame
    };
    assert!(!fate(&snap(3)) && fate(&snap(0x13)), "SNAP that is no unnumbered information");
    let routed = |segments_left: u8| {
        let headers = [&[0x60, 0, 0, 0, 0, 16, 43, 64][..], &[1; 32], &[17, 0, 4, segments_left, 0, 0, 0, 0]];
        let udp = [0, 1, 0, 2, 0, 8, 0, 0];
        [&frame[..12], &ETH_P_IPV6.to_be_bytes(), &headers.concat(), &udp].concat()
    };
    assert!(!fate(&routed(0)) && fate(&routed(1)), "segments left in a routing header");
    assert!(!fate(&v6(20, 0)) && fate(&v6(20, 1)) && fate(&v6(21, 0)));
}

#[test]
fn headers_behind_the_snapshot_are_asked_for() {
    let mut bench = Bench::plain();
    bench.add(PORT, Source::Learned, spec(matches(PORT, 0, &[]), vec![output(OUT)])).unwrap();
    let frame = FRAME.bytes();
    let mut packet = Packet::default();
    packet.reset(PORT, frame.len() as u32, 20).copy_from_slice(&frame[..20]);
    let mut sink = Sink { received: vec![frame.clone()], ..Sink::default() };
    bench.switches[0].process(1, &mut [packet], &mut sink);
    assert_eq!(sink.sent[&0][0].head, frame);
}

#[test]
fn a_packet_dropped_on_its_way_to_a_punt_is_dropped() {
    let mut bench = Bench::plain();
    let first = spec(matches(PORT, 0, &[]), vec![Action::DecTtl(Vec::new()), Action::Recirc(1)]);
    bench.add(PORT, Source::Learned, first).unwrap();
    let punt = spec(matches(PORT, 1, &[]), vec![Action::Userspace(Userspace::default())]);
    let punt = bench.add(PORT, Source::Learned, punt).unwrap();
    let old = FrameSpec { ttl: 1, ..FRAME }.packet(PORT);
    assert_eq!(bench.burst(&[FRAME.packet(PORT)]), [Fate::Upcall(Upcall::Punt(punt))]);
    assert_eq!(l1_flows(&bench, &old), (2, true), "one L1 key");
    assert_eq!(bench.burst(&[old]), [Fate::Dropped(DropReason::TtlExpired)]);
    bench.finish(&[PORT]);
}

#[test]
fn what_a_popped_tag_hid_is_seen_at_the_next_stage() {
    let mut bench = Bench::plain();
    bench
        .add(PORT, Source::Learned, spec(matches(PORT, 0, &[]), vec![Action::PopVlan, Action::Recirc(1)]))
        .unwrap();
    let ip = matches(PORT, 1, &[(Field::EthType, ETH_P_IP as u128, None)]);
    let actions = vec![set(SetGroup::Ipv4, Field::Ipv4Dst, 0x0a00_0807, 0xffff_ffff), output(OUT)];
    bench.add(PORT, Source::Learned, spec(ip, actions)).unwrap();
    let tags = vec![(ETH_P_8021AD, 5), (ETH_P_8021Q, 6), (ETH_P_8021Q, 7)];
    let deep = FrameSpec { tags, ..FRAME }.packet(PORT);
    for _ in 0..2 {
        let Fate::Sent(sent) = &bench.burst(std::slice::from_ref(&deep))[0] else { panic!("not sent") };
        assert_eq!(sent[0].head[22 + 16..][..4], [10, 0, 8, 7]);
    }
    assert_eq!(l1_flows(&bench, &deep), (1, false));
    bench.finish(&[PORT]);
}

#[test]
fn a_way_that_forks_is_resolved_before_anything_leaves() {
    let copied = vec![Action::Recirc(1), Action::Clone(vec![Action::Recirc(2)]), Action::Recirc(3)];
    for fork in [copied, (1..=3).map(Action::Recirc).collect()] {
        let mut bench = Bench::plain();
        bench.add(PORT, Source::Learned, spec(matches(PORT, 0, &[]), fork)).unwrap();
        let packets = vec![FRAME.packet(PORT); 2];
        for stage in 1..=3 {
            assert_eq!(bench.burst(&packets), [Fate::Upcall(Upcall::Miss), Fate::Upcall(Upcall::Miss)]);
            let flow = spec(matches(PORT, stage, &[]), vec![output(port(stage, 1))]);
            bench.add(PORT, Source::Learned, flow).unwrap();
        }
        for _ in 0..2 {
            for fate in bench.burst(&packets) {
                let Fate::Sent(sent) = fate else { panic!("{fate:?}") };
                assert_eq!(sent.iter().map(|s| s.port.slot).collect::<Vec<_>>(), [1, 2, 3]);
            }
        }
        bench.finish(&[PORT]);
    }
}

#[test]
fn keys_hold_what_actions_may_depend_on_and_nothing_else() {
    let mut bench = Bench::plain();
    bench.add(PORT, Source::Learned, spec(matches(PORT, 0, &[]), vec![output(OUT)])).unwrap();
    // No flow looks at these.
    let alike = [FRAME, FrameSpec { dst: 3, ip: 9, ttl: 7, tp_dst: 99, ..FRAME }];
    bench.burst(&alike.map(|frame| frame.packet(PORT)));
    assert_eq!(bench.switches[0].l1().used(0), 1);
    let mut cut = FRAME.bytes();
    cut.truncate(14 + 20 + 4);
    cut[17] = 24;
    let one_tag = |tpid, tci| FrameSpec { tags: vec![(tpid, tci)], ..FRAME }.packet(PORT);
    let different = [
        Packet::from_frame(PORT, &cut), // half a UDP header
        FrameSpec { proto: ipproto::TCP, ..FRAME }.packet(PORT),
        FrameSpec { eth_type: ETH_P_IPV6, ..FRAME }.packet(PORT),
        FrameSpec { frag: 0x2000, ..FRAME }.packet(PORT),
        one_tag(ETH_P_8021Q, 5),
        one_tag(ETH_P_8021Q, 6),
        one_tag(ETH_P_8021AD, 5),
        FrameSpec { tags: vec![(ETH_P_8021Q, 5); 2], ..FRAME }.packet(PORT),
    ];
    bench.burst(&different);
    assert_eq!(bench.switches[0].l1().used(0), 1 + different.len() as u32);
    bench.finish(&[PORT]);
}
