//! The syntax by examples: what is read, how it is printed, what is completed, what is refused and where.

use super::*;
use crate::action::{FieldSet, PortRef, SetGroup, Userspace};
use crate::flow::Ufid;
use crate::key::{self, Field, VLAN_PRESENT};
use crate::packet::PortId;
use std::time::Duration;

/// Ports `vm1`, `vm2` and `eth0` in slots 1, 2 and 3, and one whose name is an action's.
pub(super) struct Ports;

const NAMES: [(u32, &str); 4] = [(1, "vm1"), (2, "vm2"), (3, "eth0"), (4, "drop")];

pub(super) fn port(slot: u32) -> PortId {
    PortId { slot, generation: 7 }
}

impl PortNames for Ports {
    fn by_name(&self, name: &str) -> Option<PortId> {
        let slot = NAMES.iter().find(|(slot, own)| *own == name || slot.to_string() == name);
        slot.map(|&(slot, _)| port(slot))
    }

    fn name(&self, slot: u32) -> Option<String> {
        NAMES.iter().find(|(own, _)| *own == slot).map(|(_, name)| name.to_string())
    }
}

#[track_caller]
fn flow(text: &str) -> Match {
    parse_flow(text, &Ports).unwrap_or_else(|error| panic!("{error}")).0
}

#[track_caller]
fn actions(text: &str) -> Vec<Action> {
    parse_actions(text, &Ports).unwrap_or_else(|error| panic!("{error}"))
}

/// Reads `text`, prints it as `canonical`, and reads that as the same value.
#[track_caller]
fn flow_prints(text: &str, canonical: &str) {
    let read = flow(text);
    assert_eq!(format_flow(&read, &Ports), canonical);
    assert_eq!(flow(canonical), read);
    assert_eq!(read.key, read.key.masked(&read.mask), "values outside the mask");
}

#[track_caller]
fn actions_print(text: &str, canonical: &str) {
    let read = actions(text);
    assert_eq!(format_actions(&read, &Ports), canonical);
    assert_eq!(actions(canonical), read);
}

/// Flows whose text is canonical already.
const FLOWS: &[&str] = &[
    "eth()",
    "in_port(vm1)",
    "recirc_id(0),in_port(vm1),eth(src=02:00:00:00:00:01,dst=02:00:00:00:00:02),eth_type(0x1234)",
    "recirc_id(0x2a),dp_hash(0x5/0xff),skb_priority(0x7),skb_mark(0x1230/0xfff0),in_port(vm2),packet_type(ns=0,id=0)",
    "in_port(vm1),eth(src=00:01:02:03:04:00/ff:ff:ff:ff:ff:00),eth_type(0x1200/0xff00)",
    "in_port(vm1),eth_type(0/0xffff)",
    "in_port(eth0),eth_type(0x0800),ipv4(src=35.8.2.41,dst=172.16.0.0/255.255.0.0,proto=5,tos=0x80,ttl=128,frag=no)",
    "eth_type(0x0800),ipv4(tos=0/0x3,ttl=0/0x80,frag=first)",
    "eth_type(0x0800),ipv4(dst=10.0.0.1,frag=later)",
    "eth_type(0x0800),ipv4(proto=6,frag=no),tcp(src=80,dst=0/0xfff0),tcp_flags(+syn-ack)",
    "eth_type(0x0800),ipv4(proto=6,frag=first),tcp_flags(syn|ack)",
    "eth_type(0x86dd),ipv6(proto=6,frag=no),tcp_flags(0)",
    "eth_type(0x0800),ipv4(proto=17,frag=no),udp(dst=6632)",
    "eth_type(0x86dd),ipv6(proto=132,frag=no),sctp(src=100/0xff64)",
    "eth_type(0x0800),ipv4(proto=1,frag=no),icmp(type=8,code=0)",
    "eth_type(0x0800),ipv4(proto=1,frag=no),icmp(type=8/0xf8)",
    "eth_type(0x86dd),ipv6(src=fe80::1,dst=fe80::/ffff::,label=0x12345,proto=10,tclass=0x70,hlimit=255,frag=no)",
    "eth_type(0x86dd),ipv6(label=0x12300/0xfff00,hlimit=0/0x1),ipv6_exthdrs(0x40/0x60)",
    "eth_type(0x86dd),ipv6(proto=58,frag=no),icmpv6(type=135,code=0),nd(target=fe80::2,sll=02:00:00:00:00:01)",
    "eth_type(0x86dd),ipv6(proto=58,frag=no),icmpv6(type=136,code=0),nd(tll=02:00:00:00:00:00/ff:00:00:00:00:00)",
    "eth_type(0x0806),arp(sip=1.2.3.4,tip=5.6.7.8,op=1,sha=00:0f:10:11:12:13,tha=00:14:15:16:17:18)",
    "eth_type(0x8035),arp(op=3)",
    "eth_type(0x0806),arp(op=0/0x2)",
    "eth_type(0x8847),mpls(label=100,tc=3,ttl=64,bos=1)",
    "eth_type(0x8848),mpls(label=100/0xfff,tc=0/0,ttl=0/0,bos=1)",
    "eth_type(0x8847),mpls(label=1,tc=0,ttl=64,bos=0,label=2,tc=0/0,ttl=0/0,bos=0/0)",
    "eth_type(0x8847),mpls(label=0/0,tc=0/0,ttl=0/0,bos=0,label=0/0,tc=0/0,ttl=0/0,bos=0,label=9,tc=1,ttl=2,bos=1)",
    "eth_type(0x894f),nsh(flags=1,ttl=63,mdtype=1,np=3,spi=0x123456,si=254,c1=0x1,c2=0x2/0xff,c3=0,c4=0xffffffff)",
    "eth_type(0x8100),vlan(vid=10,pcp=3),encap(eth_type(0x0800),ipv4(frag=no))",
    "eth_type(0x8100),vlan(vid=10),encap()",
    "eth_type(0x8100),vlan(vid=8/0xff8,pcp=2/0x6),encap(eth_type(0x86dd))",
    "eth_type(0x8100),vlan(),encap(eth_type(0/0xffff))",
    "eth_type(0x88a8),vlan(vid=99,pcp=7),encap(eth_type(0x8100),vlan(vid=5,pcp=0),encap(eth_type(0x0806),arp(op=2)))",
    "eth_type(0x88a8),vlan(vid=1),encap(eth_type(0x8100),vlan(vid=2),encap(eth_type(0x8100)))",
    "eth_type(0/0),vlan(tci=0x0000/0x0000),encap(eth_type(0x0800),ipv4(ttl=1))",
    "eth_type(0/0),vlan(vid=10),encap(eth_type(0/0),vlan(tci=0x0000/0x0fff),encap())",
    "eth_type(0x8100),vlan(vid=0,pcp=0,cfi=0),encap()",
    "eth_type(0x88a8),vlan(vid=3),encap(eth_type(0x8100),vlan(vid=0,pcp=0,cfi=0),encap())",
    "ct_state(+new-est+trk),ct_zone(0x5/0xff),ct_mark(0x10305070/0xf0f0f0f0),ct_label(0x1234567890abcdef/0xffffffffffffffff)",
    "ct_state(est|trk),ct_zone(0x5),ct_mark(0),ct_label(0x1234567890abcdef1234567890abcdef),in_port(vm1)",
    "ct_tuple4(src=10.10.10.10,dst=20.20.0.0/255.255.0.0,proto=17,tp_src=1,tp_dst=2),eth_type(0x0800)",
    "ct_tuple6(src=fe80::1,proto=6,tp_src=0/0xff00),in_port(vm1),eth_type(0x86dd)",
    "skb_priority(0),tunnel(tun_id=0x7f10354,src=10.10.10.10,dst=20.20.20.0/255.255.255.0,tos=0x8,ttl=64,tp_src=5,tp_dst=4789,flags(csum|key)),skb_mark(0),in_port(vm1)",
    "tunnel(tun_id=0x34/0xff,ipv6_src=fe80::1,ipv6_dst=fe80::/ffff::,flags(-df+csum+key)),in_port(vm1)",
    "tunnel(ttl=64,vxlan(gbp(id=10,flags=0xb)),flags(csum|key|oam)),in_port(vm1)",
    "tunnel(vxlan(gbp(id=10/0xff)),flags(0)),in_port(vm1)",
    "tunnel(tun_id=0x1,geneve({class=0x102,type=0x80,len=4,0xa/0xff}{class=0xffff,type=0x1,len=8,0x10203ffffffff}{len=0}),flags(key)),in_port(vm1)",
    "tunnel(geneve({class=0/0xff00,type=0,len=4}),flags(key)),in_port(vm1)",
    "tunnel(erspan(ver=1,idx=0x7/0xf),flags(df|key)),in_port(vm1)",
    "tunnel(erspan(ver=2,dir=1,hwid=0x7/0xf),flags(df|key)),in_port(vm1)",
    "tunnel(gtpu(flags=0x30,msgtype=255)),in_port(vm1)",
];

#[test]
fn canonical_flows_round_trip() {
    for text in FLOWS {
        let read = flow(text);
        assert_eq!(&format_flow(&read, &Ports), text);
        assert_eq!(read.key, read.key.masked(&read.mask), "{text}: values outside the mask");
    }
}

#[test]
fn other_spellings_are_read() {
    for (text, canonical) in [
        // Order and separators are free, and metadata may stand anywhere.
        (" eth() ,, in_port(1)\trecirc_id(0)\n", "recirc_id(0),in_port(vm1)"),
        ("priority(5),in_port(4)", "skb_priority(0x5),in_port(4)"),
        ("in_port(vm1/0xffffffff)", "in_port(vm1)"),
        ("ipv4(src=10.1.2.3/8)", "eth_type(0x0800),ipv4(src=10.0.0.0/255.0.0.0)"),
        ("ipv4(src=10.1.2.3/0,dst=10.1.2.3/32)", "eth_type(0x0800),ipv4(dst=10.1.2.3)"),
        ("ipv6(src=2001:db8::1/32)", "eth_type(0x86dd),ipv6(src=2001:db8::/ffff:ffff::)"),
        ("ipv6(src=::1/::255,dst=::1/::)", "eth_type(0x86dd),ipv6(src=::1/::255)"),
        (
            "eth_type(0x0800),ipv4(proto=0x6,frag=no),tcp_flags(0x2/0x2)",
            "eth_type(0x0800),ipv4(proto=6,frag=no),tcp_flags(+syn)",
        ),
        ("ipv4(proto=6,frag=no),tcp_flags(2/0xfff)", "eth_type(0x0800),ipv4(proto=6,frag=no),tcp_flags(syn)"),
        (
            "ipv4(proto=6,frag=no),tcp_flags(syn|0x10|[800])",
            "eth_type(0x0800),ipv4(proto=6,frag=no),tcp_flags(syn|ack|[800])",
        ),
        ("ct_state(0x21/0x25)", "ct_state(+new-rel+trk)"),
        ("ct_state(-new+est)", "ct_state(-new+est)"),
        ("ct_state(0x21)", "ct_state(new|trk)"),
        ("ct_state(0/0),ct_mark(0/0),ct_label(0/0),ct_zone(0/0)", "eth()"),
        ("eth_type(0x5ff)", "eth_type(0/0xffff)"),
        ("eth_type(0)", "eth_type(0/0xffff)"),
        ("eth_type(0x0800/0)", "eth()"),
        ("vlan(vid=10,pcp=0,cfi=1)", "eth_type(0x8100),vlan(vid=10,pcp=0),encap()"),
        ("vlan(vid=10/0xfff,pcp=0/0,cfi=1/1)", "eth_type(0x8100),vlan(vid=10),encap()"),
        ("eth_type(0x8100),vlan(tci=0x100a/0x1fff)", "eth_type(0x8100),vlan(vid=10),encap()"),
        (
            "eth_type(0x8100),vlan(vid=0/0,pcp=0/0,cfi=0/0)",
            "eth_type(0x8100),vlan(tci=0x0000/0x0000),encap()",
        ),
        ("eth_type(0x8100),vlan(tci=0x0000),encap()", "eth_type(0x8100),vlan(vid=0,pcp=0,cfi=0),encap()"),
        ("encap(arp()),vlan(vid=1)", "eth_type(0x8100),vlan(vid=1),encap(eth_type(0x0806))"),
        (
            "eth_type(0x8847),mpls(label=100/0xff,tc=7/7,ttl=64/0xff,bos=1/1)",
            "eth_type(0x8847),mpls(label=100/0xff,tc=7,ttl=64,bos=1)",
        ),
        (
            "ct_tuple6(src=::1,src_port=5,dst_port=6),eth()",
            "ct_tuple6(src=::1,tp_src=5,tp_dst=6),eth_type(0x86dd)",
        ),
        ("tunnel(),nsh()", "eth_type(0x894f)"),
        ("tunnel(vxlan(),geneve(),flags(0/0))", "eth()"),
        (
            "tunnel(geneve({class=0x102,type=0x80,len=4/0xff,0}))",
            "tunnel(geneve({class=0x102,type=0x80,len=4,0}))",
        ),
        ("tunnel(erspan(ver=1/0,idx=0x7/0xf))", "tunnel(erspan(ver=1/0,idx=0x7/0xf))"),
        ("eth_type(0x86dd),nd_ext(nd_reserved=0/0,nd_options_type=0/0)", "eth_type(0x86dd)"),
        ("ufid:0123abcd-4567-89ab-cdef-0123456789ab, in_port(vm1)", "in_port(vm1)"),
    ] {
        flow_prints(text, canonical);
    }
}

#[test]
fn wildcards_and_untagged_frames_become_masks() {
    let m =
        flow("in_port(vm2),eth(dst=02:00:00:00:00:02),eth_type(0x0800),ipv4(src=1.2.3.4/0.0.0.0,frag=no)");
    assert!(m.mask.is_exact(Field::VlanTci) && m.mask.is_exact(Field::CvlanTci));
    assert_eq!((m.key.get(Field::VlanTci), m.key.get(Field::CvlanTci)), (0, 0));
    assert!(!m.mask.has(Field::VlanTpid) && !m.mask.has(Field::EthSrc) && !m.mask.has(Field::Ipv4Src));
    assert!(m.mask.is_exact(Field::IpFrag) && m.mask.is_exact(Field::EthType));
    assert_eq!(m.key.get(Field::InPort), 2);
    assert!(!m.mask.has(Field::RecircId) && !m.mask.has(Field::PacketType));

    let m = flow(
        "eth_type(0x88a8),vlan(vid=7,pcp=1),encap(eth_type(0x8100),vlan(vid=9),encap(eth_type(0x0800)))",
    );
    assert_eq!(m.key.get(Field::VlanTpid), key::ETH_P_8021AD as u128);
    assert_eq!(m.key.get(Field::VlanTci), (1 << 13 | VLAN_PRESENT | 7) as u128);
    assert_eq!(m.key.get(Field::CvlanTpid), key::ETH_P_8021Q as u128);
    assert_eq!(m.key.get(Field::CvlanTci), (VLAN_PRESENT | 9) as u128);
    assert_eq!(m.mask.get(Field::CvlanTci), 0x1fff);
    assert_eq!(m.key.eth_type(), key::ETH_P_IP);

    let m = flow("eth_type(0x8100),vlan(vid=0,pcp=0,cfi=0),encap()");
    assert_eq!((m.key.eth_type(), m.mask.get(Field::VlanTpid)), (key::ETH_P_8021Q, 0));
    assert_eq!(flow("eth_type(0/0xffff)").key.eth_type(), key::ETH_P_802_2);

    let m = flow("eth_type(0x8847),mpls(label=1,label=2)");
    assert_eq!((m.key.get(Field::MplsCount), m.mask.get(Field::MplsCount)), (2, 2));
    assert_eq!(m.key.get(Field::Mpls1), 2 << 12);
}

#[test]
fn prerequisites_are_completed() {
    for (text, canonical) in [
        ("ipv4()", "eth_type(0x0800)"),
        ("ipv6()", "eth_type(0x86dd)"),
        ("eth_type(0x0800),tcp(dst=80)", "eth_type(0x0800),ipv4(proto=6,frag=no),tcp(dst=80)"),
        ("ipv4(src=1.2.3.4/0),tcp(dst=80)", "eth_type(0x0800),ipv4(proto=6,frag=no),tcp(dst=80)"),
        ("ipv6(frag=first),udp()", "eth_type(0x86dd),ipv6(proto=17,frag=first)"),
        ("eth_type(0x0800/0xff00),tcp()", "eth_type(0x0800),ipv4(proto=6,frag=no)"),
        ("icmp(type=8)", "eth_type(0x0800),ipv4(proto=1,frag=no),icmp(type=8)"),
        (
            "icmpv6(type=135),nd(target=::1)",
            "eth_type(0x86dd),ipv6(proto=58,frag=no),icmpv6(type=135,code=0),nd(target=::1)",
        ),
        ("arp(op=1)", "eth_type(0x0806),arp(op=1)"),
        ("mpls(label=5)", "eth_type(0x8847),mpls(label=5,tc=0/0,ttl=0/0,bos=0/0)"),
        ("nsh(spi=0x1)", "eth_type(0x894f),nsh(spi=0x1)"),
        ("ct_tuple4(proto=6)", "ct_tuple4(proto=6),eth_type(0x0800)"),
        (
            "vlan(vid=1),encap(ipv4(frag=no))",
            "eth_type(0x8100),vlan(vid=1),encap(eth_type(0x0800),ipv4(frag=no))",
        ),
        // As OVS prints what it has not read, with a `vlan-limit` of 1.
        (
            "eth_type(0x88a8),vlan(vid=1),encap(eth_type(0x8100))",
            "eth_type(0x88a8),vlan(vid=1),encap(eth_type(0x8100),vlan(),encap())",
        ),
        // All wildcards, as OVS prints what it does not match: nothing is asked for.
        (
            "eth_type(0x0800),ipv4(proto=6/0,frag=no),tcp(src=5/0,dst=80/0),tcp_flags(0/0)",
            "eth_type(0x0800),ipv4(frag=no)",
        ),
        (
            "eth_type(0x0800),ipv4(proto=17,frag=later),udp(src=0/0)",
            "eth_type(0x0800),ipv4(proto=17,frag=later)",
        ),
        ("ct_tuple4(src=0.0.0.0/0.0.0.0,dst=0.0.0.0/0.0.0.0,proto=0/0),eth_type(0x0806)", "eth_type(0x0806)"),
    ] {
        flow_prints(text, canonical);
    }
}

#[test]
fn contradictions_are_refused() {
    for (text, at, message) in [
        ("tcp(dst=80)", 0, "tcp needs eth_type(0x0800) or eth_type(0x86dd)"),
        ("eth_type(0x0806),ipv4(src=1.2.3.4)", 17, "ipv4 contradicts eth_type(0x0806)"),
        ("eth_type(0x0800/0x00ff),arp(op=1)", 24, "arp contradicts"),
        ("ipv4(ttl=1),ipv6(hlimit=1)", 12, "ipv6 contradicts ipv4"),
        ("ipv4(proto=17),tcp(dst=80)", 15, "tcp contradicts proto=17"),
        ("ipv4(),tcp(dst=80),udp(src=1)", 19, "udp contradicts tcp"),
        ("ipv6(),icmp(type=8)", 7, "icmp contradicts ipv6"),
        ("ipv4(frag=later),tcp(dst=80)", 17, "a later fragment has no tcp header"),
        ("nd(target=::1)", 0, "nd needs icmpv6(type=135) or icmpv6(type=136)"),
        ("icmpv6(type=136,code=1),nd(target=::1)", 24, "nd contradicts code=1"),
        ("ct_tuple6(proto=6),ipv4(ttl=5)", 19, "ipv4 contradicts ct_tuple6"),
        ("eth_type(0x8100)", 0, "needs vlan(…)"),
        ("eth_type(0x0800),vlan(vid=1),encap()", 0, "0x0800 is not a VLAN's"),
        ("vlan(vid=1),ipv4(ttl=1)", 12, "ipv4 belongs inside encap(…)"),
        ("encap(ipv4())", 0, "encap needs vlan(…)"),
        ("vlan(vid=1),encap(eth_type(0x8100),ipv4())", 35, "ipv4 needs vlan(…)"),
        ("eth_type(0x8100),vlan(vid=0,pcp=0,cfi=0),encap(ipv4())", 41, "encapsulates nothing"),
    ] {
        let error = parse_flow(text, &Ports).expect_err(text);
        assert_eq!((error.at, error.kind), (at, OdpErrorKind::Prerequisite), "{error}");
        assert!(error.message.contains(message), "{error}");
    }
    assert!(require_in_port(&flow("in_port(vm1)"), "in_port(vm1)").is_ok());
    assert!(require_in_port(&flow("eth()"), "eth()").is_err());
}

#[test]
fn mistakes_in_flows_are_pointed_at() {
    for (text, at, message) in [
        ("", 0, "a flow expected"),
        ("in_port(vm9)", 8, "no port is called 'vm9'"),
        ("in_port(vm1", 11, "')' expected"),
        ("in_port()", 8, "the name of a port"),
        ("in_port(1/0xff)", 9, "always matched exactly"),
        ("inport(1)", 0, "no key is called 'inport'"),
        ("in_port(1),eth_type 0x800", 19, "'(' expected"),
        ("in_port(1))", 10, "')' without '('"),
        ("in_port(1),in_port(2)", 11, "in_port given twice"),
        ("ipv4(src=1.2.3)", 9, "an IPv4 address expected"),
        ("ipv4(src=1.2.3.4/33)", 17, "at most 32"),
        ("ipv4(sport=1)", 5, "no field of ipv4 is called 'sport'"),
        ("ipv4(ttl=1,ttl=2)", 11, "ttl given twice"),
        ("ipv4(ttl=256)", 9, "does not fit in 8 bits"),
        ("ipv4(ttl=010)", 9, "must not begin with 0"),
        ("ipv4(ttl=1;tos=2)", 10, "',' or ')' expected"),
        ("ipv4(frag=maybe)", 10, "'no', 'first' or 'later'"),
        ("ipv6(src=::g)", 9, "an IPv6 address expected"),
        ("ipv6(label=0x100000)", 11, "20 bits"),
        ("eth(src=00:01:02:03:04)", 8, "a MAC address expected"),
        ("eth(src=00:01:02:03:04:05:06)", 8, "a MAC address expected"),
        ("eth_type(0x12345)", 9, "16 bits"),
        ("eth_type(0x0100)", 0, "is a length"),
        ("ct_state(+new+bad)", 14, "one of the flags"),
        ("ct_state(+new-new)", 14, "new given twice"),
        ("tcp_flags(0x1000)", 10, "12 bits"),
        ("arp(op=256)", 7, "at most 255"),
        ("vlan(vid=4096)", 9, "12 bits"),
        ("vlan(vid=1,tci=5)", 11, "tci is the whole tag"),
        ("vlan(),encap(in_port(vm1))", 13, "does not belong inside encap"),
        ("vlan(),encap(vlan(),encap(vlan()))", 26, "more than two VLAN tags"),
        ("tunnel(tun_id=1,bad=2)", 16, "no field of tunnel"),
        ("tunnel(geneve({class=1,type=2,len=3}))", 34, "a multiple of 4"),
        ("tunnel(geneve({len=4,0x1ffffffff}))", 21, "does not fit in 4 bytes"),
        ("mpls(label=1,label=2,label=3,label=4)", 29, "more than 3 MPLS labels"),
        ("nd_ext(nd_options_type=2)", 0, "cannot be matched"),
        ("ufid:12-34,eth()", 5, "a UFID expected"),
        ("☃(1)", 0, "the name of a key"),
        ("eth(),☃(1)", 6, "the name of a key"),
    ] {
        let error = parse_flow(text, &Ports).expect_err(text);
        assert_eq!(error.at, at, "{error}");
        assert!(error.message.contains(message), "{error}");
    }
    assert_eq!(parse_flow("in_port(vm9)", &Ports).unwrap_err().kind, OdpErrorKind::UnknownPort);
}

#[test]
fn an_error_shows_the_text_and_a_caret() {
    let error = parse_flow("in_port(vm1),\teth(src=x)", &Ports).unwrap_err();
    assert_eq!(
        error.to_string(),
        "a MAC address expected (at character 22)\nin_port(vm1), eth(src=x)\n                      ^"
    );
    let long = format!("eth_type(0),{}bad()", " ".repeat(200));
    let shown = parse_flow(&long, &Ports).unwrap_err().to_string();
    let lines: Vec<&str> = shown.lines().collect();
    assert_eq!(lines[1].chars().nth(lines[2].chars().count() - 1), Some('b'));
    assert!(lines[1].starts_with('…') && lines[1].chars().count() < 130);
}

/// Actions whose text is canonical already.
const ACTIONS: &[&str] = &[
    "drop",
    "drop(3)",
    "vm1,vm2,eth0",
    "vm1,drop(0)",
    "br-int,99,patch@x.y",
    "userspace(pid=6633,sFlow(vid=9,pcp=7,output=10),actions)",
    "userspace(pid=6633,sFlow(vid=9,pcp=7,output=10),actions,tunnel_out_port=vm2)",
    "userspace(pid=9765,slow_path(cfm,action),tunnel_out_port=genev_sys_6081)",
    "userspace(pid=1234567,userdata(0102030405060708090a0b0c0d0e0f),actions)",
    "userspace(pid=6633,flow_sample(probability=123,collector_set_id=1234,obs_domain_id=2345,obs_point_id=3456,output_port=10,egress))",
    "userspace(pid=6633,ipfix(output_port=10))",
    "userspace(pid=4294967295,controller(reason=1,dont_send=0,continuation=1,recirc_id=4444,rule_cookie=0x5555,controller_id=0,max_len=65535))",
    "userspace(pid=0)",
    "set(eth(src=00:01:02:03:04:05,dst=10:11:12:00:00:00/ff:ff:ff:00:00:00))",
    "set(ipv4(src=35.8.2.0/255.255.255.0,dst=172.16.0.20,tos=0x80/0xfc,ttl=63))",
    "set(ipv6(src=::1,dst=::2,label=0,tclass=0x70/0x70,hlimit=128))",
    "set(tcp(src=80/0xff,dst=8080)),set(udp(src=81)),set(sctp(dst=6632))",
    "set(icmp(type=1,code=2)),set(icmpv6(type=0/0xf))",
    "set(arp(sip=1.2.3.4,op=2,tha=02:00:00:00:00:01)),set(nd(target=::1,tll=02:00:00:00:00:01))",
    "set(mpls(label=5,ttl=63)),set(nsh(ttl=62,spi=0x5,si=3,c1=0x1/0xf))",
    "set(skb_mark(0x1/0xff)),set(skb_priority(0x7))",
    "set(tunnel(tun_id=0xabcdef1234567890,src=1.1.1.1,dst=2.2.2.2,ttl=64,flags(df|csum|key))),vxlan_sys_4789",
    "set(tunnel(tun_id=0x1,ipv6_dst=fe80::1,tp_dst=6081,geneve({class=0x102,type=0x80,len=4,0x10002}),flags(key)))",
    "set(tunnel(dst=1.1.1.1,erspan(ver=2,dir=1,hwid=0x1),flags(df|key)))",
    "push_vlan(vid=12,pcp=0),push_vlan(vid=13,pcp=5,cfi=0),push_vlan(tpid=0x88a8,vid=0,pcp=7),pop_vlan",
    "sample(sample=50.0%,actions(vm1,set(ipv4(ttl=1)),drop(1)))",
    "sample(sample=0.00000002%,actions(userspace(pid=42,userdata(01)),psample(group=12)))",
    "sample(sample=100.0%,actions(drop))",
    "recirc(0x1),recirc(0)",
    "hash(l4(0)),hash(sym_l4(5)),hash(2(7))",
    "push_mpls(label=200,tc=7,ttl=64,bos=1,eth_type=0x8847),pop_mpls(eth_type=0x0800)",
    "add_mpls(label=200,tc=0,ttl=64,bos=0,eth_type=0x8848),add_mpls(label=1,tc=0,ttl=1,bos=1,eth_type=0x8847,tun_flags=0x1)",
    "ct,ct(commit),ct(force_commit,zone=5),ct_clear",
    "ct(commit,zone=65535,mark=0xa0a0a0a0/0xfefefefe,label=0x1234567890abcdef1234567890abcdef/0xf1f2f3f4f5f6f7f8f9f0fafbfcfdfeff,helper=ftp,timeout=ovs_tp_1_tcp4,nat(src=10.0.0.240-10.0.0.254:32768-65535,persistent,random))",
    "ct(mark=0/0x1,label=0x5)",
    "ct(nat),ct(commit,nat(src)),ct(commit,nat(dst=10.0.0.128:80,hash)),ct(commit,nat(src=fe80::1-fe80::2))",
    "ct(commit,nat(dst=[fe80::1]-[fe80::2]:255-4096,random))",
    "trunc(100),meter(7),lb_output(1)",
    "push_eth(src=00:01:02:03:04:05,dst=10:11:12:13:14:15),pop_eth",
    "push_nsh(flags=0,ttl=63,mdtype=1,np=3,spi=0x123,si=255,c1=0x1,c2=0,c3=0,c4=0xffffffff),pop_nsh()",
    "push_nsh(flags=0,ttl=63,mdtype=2,np=4,spi=0,si=1,md2=0x0001020304050600)",
    "clone(vm1),clone(clone(push_vlan(vid=12,pcp=0),vm2),drop(0))",
    "check_pkt_len(size=200,gt(vm1),le(drop)),check_pkt_len(size=65535,gt(ct(nat)),le(set(tcp(src=1)),vm2))",
    "dec_ttl(le_1(userspace(pid=5))),dec_ttl(le_1(drop)),vm1",
    "psample(group=12,cookie=0x01020304),psample(group=4294967295)",
    "tnl_pop(vm2),tnl_pop(gre_sys)",
    "tnl_push(tnl_port(4),header(size=42,type=3,eth(dst=f8:bc:12:44:34:b6,src=f8:bc:12:46:58:e0,dl_type=0x0800),gre((flags=0x2000,proto=0x6558),key=0x1e241)),out_port(1))",
];

#[test]
fn canonical_actions_round_trip() {
    for text in ACTIONS {
        actions_print(text, text);
    }
}

#[test]
fn other_spellings_of_actions_are_read() {
    for (text, canonical) in [
        ("drop()", "drop"),
        ("1, 2 ,3", "vm1,vm2,eth0"),
        ("vm1,drop", "vm1,drop(0)"),
        ("clone(),clone(drop)", "clone(drop),clone(drop)"),
        ("hash(hash_l4(0))", "hash(l4(0))"),
        ("pop_nsh,pop_vlan()", "pop_nsh(),pop_vlan"),
        ("recirc(17)", "recirc(0x11)"),
        ("set(ipv4(dst=2.2.2.2,src=1.1.1.1,tos=0/0))", "set(ipv4(src=1.1.1.1,dst=2.2.2.2))"),
        ("set(ipv4(src=10.1.2.3/8))", "set(ipv4(src=10.0.0.0/255.0.0.0))"),
        ("set(priority(5))", "set(skb_priority(0x5))"),
        ("push_vlan(pcp=1,vid=0xa)", "push_vlan(vid=10,pcp=1)"),
        ("push_vlan(tpid=0x8100,vid=1)", "push_vlan(vid=1,pcp=0)"),
        (
            "push_eth(src=0:1:2:3:4:5,dst=10:11:12:13:14:15,type=0x800)",
            "push_eth(src=00:01:02:03:04:05,dst=10:11:12:13:14:15)",
        ),
        ("push_nsh(spi=0x1)", "push_nsh(flags=0,ttl=63,mdtype=1,np=3,spi=0x1,si=255,c1=0,c2=0,c3=0,c4=0)"),
        ("push_nsh(mdtype=2,md2=0x1)", "push_nsh(flags=0,ttl=63,mdtype=2,np=3,spi=0,si=255,md2=0x01000000)"),
        ("ct(zone=0,mark=0x5,label=0x1/0)", "ct(mark=0x5/0xffffffff)"),
        ("ct(),ct(nat())", "ct,ct(nat)"),
        ("psample(cookie=0xabc,group=1)", "psample(group=1,cookie=0x0abc)"),
        ("sample(sample=9.7%,actions(vm1))", "sample(sample=9.7%,actions(vm1))"),
        ("4", "4"),
    ] {
        actions_print(text, canonical);
    }
}

#[test]
fn actions_have_their_meaning() {
    let foreign = |name: &str| PortRef::Foreign(name.into());
    assert_eq!(actions("drop"), []);
    assert_eq!(
        actions("vm1,br0,77"),
        [PortRef::Ours(port(1)), foreign("br0"), foreign("77")].map(Action::Output)
    );
    assert_eq!(actions("drop,vm2"), [Action::Drop(0), Action::Output(PortRef::Ours(port(2)))]);
    assert_eq!(actions("push_vlan(vid=5,pcp=3)"), [Action::PushVlan { tpid: 0x8100, tci: 0x7005 }]);
    assert_eq!(
        actions("set(tcp(dst=80/0xff))"),
        [Action::Set(SetGroup::Tcp, vec![FieldSet { field: Field::TpDst, value: 80, mask: 0xff }])]
    );
    assert_eq!(
        actions("set(icmp(type=3))"),
        [Action::Set(SetGroup::Icmp, vec![FieldSet { field: Field::TpSrc, value: 3, mask: 0xffff }])]
    );
    assert_eq!(
        actions("userspace(pid=5,slow_path(0),actions,tunnel_out_port=vm2)"),
        [Action::Userspace(Userspace {
            pid: 5,
            userdata: "slow_path(0)".into(),
            actions: true,
            tunnel_out_port: Some(PortRef::Ours(port(2))),
        })]
    );
    let Action::Ct(ct) = &actions("ct(force_commit,nat(src=1.2.3.4))")[0] else { panic!("no ct") };
    assert_eq!((ct.commit, ct.force, ct.nat.as_deref()), (true, true, Some("src=1.2.3.4")));
    let Action::Sample { probability, .. } = &actions("sample(sample=100%,actions(vm1))")[0] else {
        panic!("no sample")
    };
    assert_eq!(*probability, u32::MAX);
}

#[test]
fn mistakes_in_actions_are_pointed_at() {
    for (text, at, message) in [
        ("", 0, "actions expected"),
        (" , ", 3, "actions expected"),
        ("vm1,output(2)", 4, "no action is called 'output'"),
        ("vm1)", 3, "')' without '('"),
        ("clone(vm1", 9, "')' expected"),
        ("set(ipv4(ttl=1)", 15, "')' expected"),
        ("set(in_port(1))", 4, "'in_port' cannot be set"),
        ("set(ipv4())", 4, "changes nothing"),
        ("set(ipv4(ttl=300))", 13, "8 bits"),
        ("push_vlan(pcp=1)", 10, "vid= is missing"),
        ("push_vlan(vid=4096,pcp=0)", 14, "12 bits"),
        ("push_vlan(vid=1,prio=0)", 16, "'prio' is not known here"),
        ("push_vlan(vid=1,vid=2)", 16, "vid given twice"),
        ("sample(sample=101%,actions(1))", 14, "a percentage expected"),
        ("sample(sample=50%,act(1))", 16, "'%,actions(' expected"),
        ("userspace(sFlow())", 10, "'pid=' expected"),
        ("userspace(pid=1,userdata(0))", 25, "pairs of hexadecimal digits"),
        ("userspace(pid=1,slow_path(", 26, "')' expected"),
        ("ct(commit,force_commit)", 3, "either commit or force_commit"),
        ("ct(commit,nat(src,dst))", 18, "one 'src' or 'dst'"),
        ("ct(commit,nat(src,hash,random))", 23, "random contradicts hash"),
        ("ct(commit,nat(src=10.0.0.9-10.0.0.1))", 18, "a range of addresses"),
        ("ct(commit,nat(random))", 14, "'src' or 'dst' expected first"),
        ("ct(zone=65536)", 8, "16 bits"),
        ("ct(helper=)", 10, "a name"),
        ("ct(label)", 8, "'=' expected"),
        ("check_pkt_len(size=1,gt(1))", 26, "',le(' expected"),
        ("hash(md5(0))", 5, "'l4' or 'sym_l4'"),
        ("psample(cookie=0x01)", 8, "group= is missing"),
        ("psample(group=1,cookie=0x0102030405060708090a0b0c0d0e0f1011)", 23, "at most 16 bytes"),
        ("psample(group=1,cookie=wrong)", 23, "'0x' expected"),
        ("push_nsh(mdtype=3)", 16, "metadata type 1 or 2"),
        ("push_nsh(mdtype=2,c1=0x1)", 21, "does not go with this mdtype"),
        ("pop_mpls(label=1)", 9, "'label' is not known here"),
        ("push_eth(src=00:00:00:00:00:01)", 9, "both needed"),
        ("encap_nsh@:{@", 11, "an action expected"),
        ("trunc(-1)", 6, "a number expected"),
        ("(", 0, "an action expected"),
    ] {
        let error = parse_actions(text, &Ports).expect_err(text);
        assert_eq!(error.at, at, "{error}");
        assert!(error.message.contains(message), "{error}");
    }
}

#[test]
fn deep_nesting_is_refused() {
    for text in ["clone(", "sample(sample=1%,actions(", "check_pkt_len(size=1,gt(", "dec_ttl(le_1("] {
        let error = parse_actions(&text.repeat(100_000), &Ports).unwrap_err();
        assert!(error.message.contains("nested more than"), "{error}");
    }
    let error = parse_flow(&"vlan(),encap(".repeat(100_000), &Ports).unwrap_err();
    assert!(error.message.contains("more than two VLAN tags"), "{error}");
    assert!(parse_actions(&format!("tnl_push({}", "(".repeat(1_000_000)), &Ports).is_err());
    let deep = format!("{}vm1{}", "clone(".repeat(32), ")".repeat(32));
    actions_print(&deep, &deep);
}

#[test]
fn dumped_flows_are_read() {
    let line = "ufid:0123abcd-4567-89ab-cdef-0123456789ab, skb_priority(0/0),skb_mark(0/0),ct_state(0/0),ct_zone(0/0),\
        ct_mark(0/0),ct_label(0/0),recirc_id(0),dp_hash(0/0),in_port(vm1),packet_type(ns=0,id=0),\
        eth(src=02:00:00:00:00:01,dst=02:00:00:00:00:02),eth_type(0x0800),\
        ipv4(src=10.0.0.1/0.0.0.0,dst=10.0.0.2/0.0.0.0,proto=6/0,tos=0/0,ttl=64/0,frag=no),tcp(src=5/0,dst=80/0),\
        tcp_flags(0/0), packets:3, bytes:294, used:0.500s, flags:SP., offloaded:partial, dp:ovs, \
        actions:set(eth(dst=02:00:00:00:00:03)),vm2,br-ex, dp-extra-info:miniflow_bits(4,1), new_thing, also:x";
    let dumped = parse_dump_line(line, &Ports).unwrap_or_else(|error| panic!("{error}"));
    assert_eq!(dumped.spec.ufid, Some(Ufid(0x0123abcd_4567_89ab_cdef_0123456789ab)));
    assert_eq!(
        format_flow(&dumped.spec.matches, &Ports),
        "recirc_id(0),in_port(vm1),packet_type(ns=0,id=0),eth(src=02:00:00:00:00:01,dst=02:00:00:00:00:02),\
         eth_type(0x0800),ipv4(frag=no)"
    );
    assert_eq!(format_actions(&dumped.spec.actions, &Ports), "set(eth(dst=02:00:00:00:00:03)),vm2,br-ex");
    assert_eq!((dumped.packets, dumped.bytes), (3, 294));
    assert_eq!(dumped.used, Some(Duration::from_millis(500)));
    assert_eq!(dumped.tcp_flags, 0x002 | 0x008 | 0x010);
    let extra: Vec<(&str, &str)> = dumped.extra.iter().map(|(n, v)| (n.as_str(), v.as_str())).collect();
    let expected = [
        ("offloaded", "partial"),
        ("dp", "ovs"),
        ("dp-extra-info", "miniflow_bits(4,1)"),
        ("new_thing", ""),
        ("also", "x"),
    ];
    assert_eq!(extra, expected);

    let line =
        "recirc_id(0x1),in_port(2),eth(),eth_type(0/0xffff), packets:0, bytes:0, used:never, actions:drop";
    let dumped = parse_dump_line(line, &Ports).unwrap();
    assert_eq!((dumped.used, dumped.spec.actions.len(), dumped.spec.ufid), (None, 0, None));
    assert!(!dumped.spec.matches.mask.has(Field::PacketType));

    // A layer 3 flow must not match Ethernet frames.
    let line =
        "recirc_id(0),in_port(3),eth_type(0x0800),ipv4(frag=no), packets:0, bytes:0, used:never, actions:1";
    let matches = parse_dump_line(line, &Ports).unwrap().spec.matches;
    assert_eq!(matches.key.get(Field::PacketType), 0x1_0800);

    let line = "in_port(1),eth(), packets:0, actions:1,shiny(2)";
    let actions = parse_dump_line(line, &Ports).unwrap().spec.actions;
    assert_eq!(
        actions,
        [Action::Opaque("1,shiny(2)".into())],
        "an action of the future is kept as it stands"
    );

    for (line, at, message) in [
        ("in_port(tap7),eth(), packets:0, actions:1", 8, "no port is called 'tap7'"),
        ("in_port(1),eth(), packets:x, actions:1", 26, "a number expected"),
        ("in_port(1),eth(), packets:1, used:soon, actions:1", 34, "'never' or seconds"),
        ("in_port(1),eth(), packets:1", 27, "actions:… is missing"),
        ("in_port(1),eth(), packets:1, flags:SQ, actions:1", 36, "TCP flags expected"),
        ("in_port(1),eth(), actions:", 26, "actions expected"),
        ("in_port(1),eth(), actions:, dp:ovs", 26, "actions expected"),
        ("flow-dump from the main thread:", 0, "no key is called 'flow'"),
        ("", 0, "a flow expected"),
    ] {
        let error = parse_dump_line(line, &Ports).expect_err(line);
        assert_eq!(error.at, at, "{error}");
        assert!(error.message.contains(message), "{error}");
    }
}

#[test]
fn a_match_without_prerequisites_still_shows_what_it_matches() {
    let mut m = Match::default();
    m.mask.set_exact(Field::TpDst);
    m.mask.set_exact(Field::Ipv4Src);
    let text = format_flow(&m, &Ports);
    assert_eq!(
        text,
        "eth_type(0/0),vlan(tci=0x0000/0x0000),encap(eth_type(0/0),vlan(tci=0x0000/0x0000),encap(ipv4(src=0.0.0.0),tcp(dst=0)))"
    );
}
