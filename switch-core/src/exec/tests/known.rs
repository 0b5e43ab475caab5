//! Each action on frames whose bytes were made, checksums included, by other means.

use super::*;
use crate::action::Userspace;

const TCP: &str = "02000000000202000000000108004500002a12340000400654980a0000010a00000203e8005000000001\
    00000002501802002d2400006869";
const TCP_PORTS: &str = "02000000000202000000000108004500002a12340000400654980a0000010a00000207d01f9000000001\
    000000025018020009fc00006869";
const TCP_NAT: &str = "020000000002020000000001080045b8002a123400003f069d2fc0a801090a00000203e8005000000001\
    0000000250180200757300006869";
const UDP: &str = "02000000000202000000000108004500001e12340000401154990a0000010a00000203e80035000a7f51\
    6869";
const UDP_PORTS: &str = "02000000000202000000000108004500001e12340000401154990a0000010a0000020fa014e9000a5ee5\
    6869";
const SCTP: &str = "020000000002020000000001080045000029123400004084541b0a0000010a00000203e80b5900000007\
    7dae9bef6368756e6b64617461";
const SCTP_PORTS: &str = "020000000002020000000001080045000029123400004084541b0a0000010a00000203e90b5a00000007\
    bd5f63c96368756e6b64617461";
const ICMP: &str = "02000000000202000000000108004500002012340000400154a70a0000010a000002080006fa12340001\
    70696e67";
const ICMP_REPLY: &str = "02000000000202000000000108004500002012340000400154a70a0000010a00000200000efa12340001\
    70696e67";
const TCP6: &str = "02000000000202000000000186dd6000000000160640fd000000000000000000000000000001fd000000\
    00000000000000000000000203e80050000000010000000250180200472200006869";
const TCP6_SET: &str = "02000000000202000000000186dd6b8abcde0016060920010db800000000000000000000000520010db8\
    00000000000000000000000603e80050000000010000000250180200e5a900006869";
const ROUTED: &str = "02000000000202000000000186dd60000000002e2b40fd000000000000000000000000000001fd000000\
    0000000000000000000000020602040100000000fd00000000000000000000000000009903e800500000\
    00010000000250180200468b00006869";
const ROUTED_SET: &str = "02000000000202000000000186dd60000000002e2b40fd000000000000000000000000000001fd000000\
    0000000000000000000000770602040100000000fd00000000000000000000000000009903e800500000\
    00010000000250180200468b00006869";
const ROUTED_DONE: &str = "02000000000202000000000186dd60000000002e2b40fd000000000000000000000000000001fd000000\
    0000000000000000000000020602040000000000fd00000000000000000000000000009903e800500000\
    00010000000250180200472200006869";
const ROUTED_DONE_SET: &str = "02000000000202000000000186dd60000000002e2b40fd000000000000000000000000000001fd000000\
    0000000000000000000000770602040000000000fd00000000000000000000000000009903e800500000\
    0001000000025018020046ad00006869";
const ND: &str = "02000000000202000000000186dd6000000000283afffd000000000000000000000000000001fd000000\
    00000000000000000000000287002e9e00000000fd0000000000000000000000000000020e016e6f6e63\
    65210101020000000001";
const ND_SET: &str = "02000000000202000000000186dd6000000000283afffd000000000000000000000000000001fd000000\
    000000000000000000000002870029c400000000fd0000000000000000000000000000330e016e6f6e63\
    652101010600000000aa";
const ARP: &str = "020000000002020000000001080600010800060400010200000000010a0000010000000000000a000002";
const ARP_REPLY: &str =
    "020000000002020000000001080600010800060400020200000000020a0000020200000000010a000001";
const UDP_BEFORE_ZERO: &str = "02000000000202000000000108004500001e12340000401154990a0000010a00000203e80035000a07d0\
    dfea";
const UDP_ZERO: &str = "02000000000202000000000108004500001e12340000401154990a0000010a0000020bb80035000affff\
    dfea";

fn bytes(hex: &str) -> Vec<u8> {
    hex.as_bytes()
        .chunks(2)
        .map(|c| u8::from_str_radix(std::str::from_utf8(c).unwrap(), 16).unwrap())
        .collect()
}

fn kind(eth_type: u16, proto: u8) -> Kind {
    Kind { eth_type, proto, nd: 0 }
}

const V4_TCP: Kind = Kind { eth_type: key::ETH_P_IP, proto: ipproto::TCP, nd: 0 };
const V6_TCP: Kind = Kind { eth_type: key::ETH_P_IPV6, proto: ipproto::TCP, nd: 0 };
const V4_UDP: Kind = Kind { eth_type: key::ETH_P_IP, proto: ipproto::UDP, nd: 0 };

fn ports(group: SetGroup, src: u128, dst: u128) -> Action {
    let field = |field, value| FieldSet { field, value, mask: 0xffff };
    Action::Set(group, vec![field(Field::TpSrc, src), field(Field::TpDst, dst)])
}

fn ip6(text: &str) -> u128 {
    text.parse::<std::net::Ipv6Addr>().unwrap().into()
}

#[test]
fn mac_addresses() {
    let mut expected = bytes(TCP);
    expected[..6].copy_from_slice(&[2, 0xaa, 0xbb, 0xcc, 0xdd, 0xee]);
    expected[11] = 0xf1;
    let actions = [
        set_all(SetGroup::Eth, Field::EthDst, 0x02aa_bbcc_ddee),
        set(SetGroup::Eth, Field::EthSrc, 0xffff, 0x00f0),
    ];
    assert_eq!(edited(V4_TCP, &bytes(TCP), &actions), expected);
}

#[test]
fn ipv4_header_and_the_checksums_over_it() {
    let actions = [Action::Set(
        SetGroup::Ipv4,
        vec![
            FieldSet { field: Field::Ipv4Src, value: 0xc0a8_0109, mask: 0xffff_ffff },
            FieldSet { field: Field::IpTtl, value: 63, mask: 0xff },
            // DSCP without the ECN bits.
            FieldSet { field: Field::IpTos, value: 0xb8, mask: 0xfc },
            // A plain set names what cannot change, too.
            FieldSet { field: Field::IpProto, value: 6, mask: 0xff },
        ],
    )];
    assert_eq!(edited(V4_TCP, &bytes(TCP), &actions), bytes(TCP_NAT));
}

#[test]
fn ecn_bits_outside_the_mask_stay() {
    let mut frame = Frame::new(bytes(TCP), Offload::default());
    frame.bytes[15] = 0x03;
    reference::complete_checksums(&mut frame);
    let sent = edited(V4_TCP, &frame.bytes, &[set(SetGroup::Ipv4, Field::IpTos, 0xb8, 0xfc)]);
    assert_eq!(sent[15], 0xbb);
}

#[test]
fn ports_of_tcp_udp_and_sctp() {
    let sent = edited(V4_TCP, &bytes(TCP), &[ports(SetGroup::Tcp, 2000, 8080)]);
    assert_eq!(sent, bytes(TCP_PORTS));
    let sent = edited(V4_UDP, &bytes(UDP), &[ports(SetGroup::Udp, 4000, 5353)]);
    assert_eq!(sent, bytes(UDP_PORTS));
    let sctp = kind(key::ETH_P_IP, ipproto::SCTP);
    let sent = edited(sctp, &bytes(SCTP), &[ports(SetGroup::Sctp, 1001, 2906)]);
    assert_eq!(sent, bytes(SCTP_PORTS));
    // Ethernet padding is not under the checksum.
    let padded = |hex| [bytes(hex), vec![0x55; 5]].concat();
    let sent = edited(sctp, &padded(SCTP), &[ports(SetGroup::Sctp, 1001, 2906)]);
    assert_eq!(sent, padded(SCTP_PORTS));
}

#[test]
fn udp_checksum_zero_means_none() {
    let mut none = bytes(UDP);
    none[40..42].fill(0);
    let sent = edited(V4_UDP, &none, &[ports(SetGroup::Udp, 4000, 5353)]);
    assert_eq!(sent[40..42], [0, 0]);
    let sent = edited(V4_UDP, &none, &[set_all(SetGroup::Ipv4, Field::Ipv4Src, 1)]);
    assert_eq!(sent[40..42], [0, 0]);
    // A sum that comes out as zero is sent as all ones.
    let sent = edited(V4_UDP, &bytes(UDP_BEFORE_ZERO), &[set_all(SetGroup::Udp, Field::TpSrc, 3000)]);
    assert_eq!(sent, bytes(UDP_ZERO));
    assert_eq!(sent[40..42], [0xff, 0xff]);
    // 10.0.0.1 grows by as much as the port did.
    let actions = [set_all(SetGroup::Ipv4, Field::Ipv4Src, 0x0a00_0001 + 2000)];
    let sent = edited(V4_UDP, &bytes(UDP_BEFORE_ZERO), &actions);
    assert_eq!(sent[40..42], [0xff, 0xff]);
}

#[test]
fn partial_checksums_hold_the_pseudo_header_only() {
    let mut frame = bytes(TCP);
    let offload = Offload { needs_csum: true, csum_start: 34, csum_offset: 16, ..Offload::default() };
    // 10.0.0.1 + 10.0.0.2 + 6 + 22: the sum, not its complement.
    frame[50..52].copy_from_slice(&[0x14, 0x1f]);
    let actions = [
        ports(SetGroup::Tcp, 2000, 8080),
        set_all(SetGroup::Ipv4, Field::Ipv4Dst, 0x0a00_0003),
        Action::PushVlan { tpid: 0x8100, tci: 0x1064 },
        output(1),
    ];
    let world = World { stages: HashMap::new(), dice: vec![] };
    let (_, sent, _) = run(&V4_TCP.plan(&actions), &world, &frame, offload);
    assert_eq!(sent[0].bytes[54..56], [0x14, 0x20]);
    assert_eq!(sent[0].offload, Offload { csum_start: 38, ..offload });
}

#[test]
fn ipv6_header_and_the_checksums_over_it() {
    let field = |field, value, mask| FieldSet { field, value, mask };
    let actions = [Action::Set(
        SetGroup::Ipv6,
        vec![
            field(Field::Ipv6Src, ip6("2001:db8::5"), u128::MAX),
            field(Field::Ipv6Dst, ip6("2001:db8::6"), u128::MAX),
            field(Field::IpTtl, 9, 0xff),
            field(Field::IpTos, 0xb8, 0xff),
            field(Field::Ipv6Label, 0xabcde, 0xfffff),
        ],
    )];
    assert_eq!(edited(V6_TCP, &bytes(TCP6), &actions), bytes(TCP6_SET));
}

#[test]
fn a_routing_header_with_segments_left_hides_the_destination_from_the_checksum() {
    let actions = [set_all(SetGroup::Ipv6, Field::Ipv6Dst, ip6("fd00::77"))];
    assert_eq!(edited(V6_TCP, &bytes(ROUTED), &actions), bytes(ROUTED_SET));
    assert_eq!(edited(V6_TCP, &bytes(ROUTED_DONE), &actions), bytes(ROUTED_DONE_SET));
}

#[test]
fn icmp_type() {
    let actions = [set_all(SetGroup::Icmp, Field::TpSrc, 0)];
    assert_eq!(edited(kind(key::ETH_P_IP, ipproto::ICMP), &bytes(ICMP), &actions), bytes(ICMP_REPLY));
}

#[test]
fn neighbour_discovery_skips_other_options() {
    let nd = Kind { eth_type: key::ETH_P_IPV6, proto: ipproto::ICMPV6, nd: 135 };
    let actions = [
        set_all(SetGroup::Nd, Field::NdTarget, ip6("fd00::33")),
        set_all(SetGroup::Nd, Field::ArpSha, 0x0600_0000_00aa),
        set_all(SetGroup::Nd, Field::ArpTha, 0x0e0e_0e0e_0e0e), // there is no such option
    ];
    assert_eq!(edited(nd, &bytes(ND), &actions), bytes(ND_SET));
}

#[test]
fn arp_request_becomes_reply() {
    let field = |field: Field, value| FieldSet { field, value, mask: (1 << field.place().2) - 1 };
    let actions = [Action::Set(
        SetGroup::Arp,
        vec![
            field(Field::IpProto, 2),
            field(Field::ArpSha, 0x0200_0000_0002),
            field(Field::Ipv4Src, 0x0a00_0002),
            field(Field::ArpTha, 0x0200_0000_0001),
            field(Field::Ipv4Dst, 0x0a00_0001),
        ],
    )];
    assert_eq!(edited(kind(key::ETH_P_ARP, 1), &bytes(ARP), &actions), bytes(ARP_REPLY));
}

/// The TCP frame with tags.
fn tagged(tags: &[[u8; 4]]) -> Vec<u8> {
    let mut frame = bytes(TCP);
    frame.splice(12..12, tags.concat());
    frame
}

#[test]
fn vlan_tags_stack() {
    let (outer, inner) = ([0x88, 0xa8, 0x00, 0x0a], [0x81, 0x00, 0x60, 0x64]);
    let push = |tag: [u8; 4]| Action::PushVlan {
        tpid: u16::from_be_bytes([tag[0], tag[1]]),
        tci: u16::from_be_bytes([tag[2], tag[3]]) | 0x1000,
    };
    assert_eq!(edited(V4_TCP, &bytes(TCP), &[push(inner)]), tagged(&[inner]));
    assert_eq!(edited(V4_TCP, &tagged(&[inner]), &[push(outer)]), tagged(&[outer, inner]));
    assert_eq!(edited(V4_TCP, &tagged(&[outer, inner]), &[Action::PopVlan]), tagged(&[inner]));
    assert_eq!(edited(V4_TCP, &tagged(&[inner]), &[Action::PopVlan]), bytes(TCP));
    assert_eq!(edited(V4_TCP, &bytes(TCP), &[Action::PopVlan]), bytes(TCP));
    let mut cut = tagged(&[inner]);
    cut.truncate(17);
    let none = kind(key::ETH_P_8021Q, 0);
    let dropped = Verdict::Dropped(DropReason::TruncatedHeader);
    assert_eq!(simple(none, &cut, &[Action::PopVlan, output(1)]), (dropped, vec![]));
}

#[test]
fn later_fragments_have_no_ports() {
    let mut frame = Frame::new(bytes(UDP), Offload::default());
    frame.bytes[20..22].copy_from_slice(&[0x20, 0x01]);
    reference::complete_checksums(&mut frame);
    let sent = edited(V4_UDP, &frame.bytes, &[ports(SetGroup::Udp, 4000, 5353)]);
    assert_eq!(sent, frame.bytes);
    let sent = edited(V4_UDP, &frame.bytes, &[set_all(SetGroup::Ipv4, Field::Ipv4Src, 1)]);
    assert_eq!(sent[34..], frame.bytes[34..]);
}

#[test]
fn a_header_cut_short_drops_what_is_around_up_to_the_recirculation() {
    let mut frame = bytes(UDP);
    frame.truncate(34 + 7);
    let dropped = Verdict::Dropped(DropReason::TruncatedHeader);
    let edit = ports(SetGroup::Udp, 1, 2);
    assert_eq!(simple(V4_UDP, &frame, &[edit.clone(), output(1)]), (dropped, vec![]));
    let (verdict, sent) =
        simple(V4_UDP, &frame, &[output(1), Action::Clone(vec![edit.clone(), output(2)]), output(3)]);
    assert_eq!((verdict, sent.len()), (Verdict::Done, 1));
    let stages = HashMap::from([(5, V4_UDP.plan(&[edit, output(2)]))]);
    let plan = V4_UDP.plan(&[Action::Recirc(5), output(3)]);
    let (verdict, sent, _) = run(&plan, &World { stages, dice: vec![] }, &frame, Offload::default());
    assert_eq!((verdict, sent.len(), sent[0].port), (Verdict::Done, 1, port(3)));
}

#[test]
fn outputs_send_the_packet_as_it_is_at_that_moment() {
    let ttl = |ttl| set_all(SetGroup::Ipv4, Field::IpTtl, ttl);
    let actions = [
        output(1),
        ttl(9),
        Action::Clone(vec![ttl(8), output(2)]),
        output(3),
        Action::Clone(vec![ttl(7), output(1)]),
    ];
    let (verdict, sent) = simple(V4_TCP, &bytes(TCP), &actions);
    assert_eq!(verdict, Verdict::Done);
    let seen: Vec<_> = sent.iter().map(|sent| (sent.port.slot, sent.bytes[22])).collect();
    assert_eq!(seen, [(1, 64), (2, 8), (3, 9), (1, 7)]);
}

#[test]
fn trunc_cuts_the_next_output_only_and_not_the_outer_tag() {
    let lengths = |frame: &[u8], actions: &[Action]| -> Vec<usize> {
        simple(V4_TCP, frame, actions).1.iter().map(|sent| sent.bytes.len()).collect()
    };
    let actions = [Action::Trunc(20), output(1), output(2)];
    assert_eq!(lengths(&bytes(TCP), &actions), [20, 56]);
    assert_eq!(lengths(&tagged(&[[0x81, 0, 0, 1]]), &actions), [24, 60]);
    assert_eq!(lengths(&bytes(TCP), &[Action::Trunc(1000), output(1)]), [56]);
    let inherited = [Action::Trunc(20), Action::Clone(vec![output(1), output(2)]), output(3)];
    assert_eq!(lengths(&bytes(TCP), &inherited), [20, 56, 20]);
}

#[test]
fn dec_ttl_and_its_exception() {
    let actions = [Action::DecTtl(vec![output(9)]), output(1)];
    let (_, sent) = simple(V4_TCP, &bytes(TCP), &actions);
    let ttl63 = edited(V4_TCP, &bytes(TCP), &[set_all(SetGroup::Ipv4, Field::IpTtl, 63)]);
    assert_eq!((sent[0].port, &sent[0].bytes), (port(1), &ttl63));
    let ttl1 = edited(V4_TCP, &bytes(TCP), &[set_all(SetGroup::Ipv4, Field::IpTtl, 1)]);
    let (_, sent) = simple(V4_TCP, &ttl1, &actions);
    assert_eq!((sent.len(), sent[0].port, &sent[0].bytes), (1, port(9), &ttl1));
    let expired = Verdict::Dropped(DropReason::TtlExpired);
    assert_eq!(simple(V4_TCP, &ttl1, &[Action::DecTtl(vec![]), output(1)]), (expired, vec![]));
    let (_, sent) = simple(V6_TCP, &bytes(TCP6), &actions);
    assert_eq!(sent[0].bytes[21], 63);
    // Not IP: nothing to do. Behind two tags the kernel does not look.
    assert_eq!(edited(kind(key::ETH_P_ARP, 1), &bytes(ARP), &actions[..1]), bytes(ARP));
    let double = tagged(&[[0x88, 0xa8, 0, 1], [0x81, 0, 0, 2]]);
    assert_eq!(edited(V4_TCP, &double, &actions[..1]), double);
    assert_eq!(edited(V4_TCP, &tagged(&[[0x81, 0, 0, 2]]), &actions[..1])[26], 63);
    // Behind a SNAP header it does.
    let mut snap = bytes(TCP);
    snap.splice(12..14, [0, 50, 0xaa, 0xaa, 3, 0, 0, 0, 8, 0]);
    assert_eq!(edited(V4_TCP, &snap, &actions[..1])[30], 63);
}

#[test]
fn check_pkt_len_judges_segments() {
    let longer = |frame: &[u8], size, offload| {
        let actions = [Action::CheckPktLen { size, greater: vec![output(1)], less_equal: vec![output(2)] }];
        let world = World { stages: HashMap::new(), dice: vec![] };
        let (_, sent, _) = run(&V4_TCP.plan(&actions), &world, frame, offload);
        sent[0].port == port(1)
    };
    assert!(longer(&bytes(TCP), 55, Offload::default()));
    assert!(!longer(&bytes(TCP), 56, Offload::default()));
    assert!(!longer(&tagged(&[[0x81, 0, 0, 1]]), 56, Offload::default()));
    let mut big = bytes(TCP);
    big.resize(54 + 3000, 7);
    let gso = Offload {
        needs_csum: true,
        csum_start: 34,
        csum_offset: 16,
        gso: Gso::Tcp4,
        gso_size: 1000,
        ..Offload::default()
    };
    assert!(longer(&big, 1053, gso));
    assert!(!longer(&big, 1054, gso));
    assert!(longer(&big, 1054, Offload::default()));
}

#[test]
fn sample_rolls_the_dice_of_its_environment() {
    let sample = |probability| [Action::Sample { probability, actions: vec![output(1)] }];
    let hits = |probability, die| {
        let world = World { stages: HashMap::new(), dice: vec![die] };
        run(&V4_TCP.plan(&sample(probability)), &world, &bytes(TCP), Offload::default()).1.len()
    };
    assert_eq!((hits(1000, 1000), hits(1000, 1001)), (1, 0));
    assert_eq!((hits(0, 0), hits(u32::MAX, u32::MAX)), (0, 1));
}

#[test]
fn recirculation_carries_the_metadata() {
    let stages = HashMap::from([(7, V4_TCP.plan(&[output(2)]))]);
    let mark = set(SetGroup::SkbMark, Field::SkbMark, 0xabcd_1234, 0xffff_0000);
    let priority = set_all(SetGroup::SkbPriority, Field::SkbPriority, 3);
    let plan = V4_TCP.plan(&[mark, priority, Action::Recirc(7), output(1)]);
    let world = World { stages, dice: vec![] };
    let (verdict, sent, metadata) = run(&plan, &world, &bytes(TCP), Offload::default());
    assert_eq!(verdict, Verdict::Done);
    assert_eq!(sent.iter().map(|sent| sent.port.slot).collect::<Vec<_>>(), [2, 1]);
    assert_eq!(metadata, [Metadata { recirc_id: 7, skb_mark: 0xabcd_0000, skb_priority: 3 }]);
    let mut key = Key::default();
    metadata[0].write_to(&mut key);
    assert_eq!((key.recirc_id(), key.get(Field::SkbMark)), (7, 0xabcd_0000));
    assert!(!plan.is_certain());
    assert_eq!((plan.outputs(), plan.recirculations()), (&[port(1)][..], &[7][..]));
    let missing = World { stages: HashMap::new(), dice: vec![] };
    assert_eq!(run(&plan, &missing, &bytes(TCP), Offload::default()).0, Verdict::Unresolved);
}

#[test]
fn loops_end() {
    let stages = HashMap::from([(1, V4_TCP.plan(&[Action::Recirc(1)]))]);
    let world = World { stages, dice: vec![] };
    let (verdict, _, stages) =
        run(&V4_TCP.plan(&[Action::Recirc(1)]), &world, &bytes(TCP), Offload::default());
    assert_eq!(verdict, Verdict::Dropped(DropReason::TooDeep));
    assert_eq!(stages.len(), MAX_RECIRCULATIONS as usize);
    // With a copy at each stage the copies run out first, and every stage still does what comes after.
    let stages = HashMap::from([(1, V4_TCP.plan(&[Action::Recirc(1), output(1)]))]);
    let plan = V4_TCP.plan(&[Action::Recirc(1), output(1)]);
    let (verdict, sent, _) = run(&plan, &World { stages, dice: vec![] }, &bytes(TCP), Offload::default());
    assert_eq!((verdict, sent.len()), (Verdict::Done, MAX_COPIES + 1));
}

#[test]
fn only_the_branch_that_cannot_be_executed_punts() {
    let userspace = Action::Userspace(Userspace::default());
    let plan = V4_TCP.plan(&[Action::CheckPktLen {
        size: 56,
        greater: vec![userspace.clone()],
        less_equal: vec![output(1)],
    }]);
    assert!(!plan.is_certain());
    let world = World { stages: HashMap::new(), dice: vec![] };
    assert_eq!(run(&plan, &world, &bytes(TCP), Offload::default()).0, Verdict::Done);
    let long = [bytes(TCP), vec![0; 1]].concat();
    assert_eq!(run(&plan, &world, &long, Offload::default()).0, Verdict::Unresolved);
    let plan = V4_TCP.plan(&[Action::DecTtl(vec![userspace]), output(1)]);
    assert_eq!(run(&plan, &world, &bytes(TCP), Offload::default()).0, Verdict::Done);
    let ttl1 = edited(V4_TCP, &bytes(TCP), &[set_all(SetGroup::Ipv4, Field::IpTtl, 1)]);
    assert_eq!(run(&plan, &world, &ttl1, Offload::default()).0, Verdict::Unresolved);
}
