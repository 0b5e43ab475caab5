use super::*;
use crate::key::Field::{self, *};
use crate::packet::{PortId, SNAPSHOT};

mod random;

const PORT: PortId = PortId { slot: 3, generation: 1 };

/// Hexadecimal digits, with spaces for the eye.
fn hex(text: &str) -> Vec<u8> {
    let digits: Vec<u32> = text.chars().filter_map(|c| c.to_digit(16)).collect();
    digits.chunks(2).map(|pair| (pair[0] << 4 | pair[1]) as u8).collect()
}

const MACS: &str = "0200000000bb 0200000000aa";
const IP4: &str = "4500 0028 1234 4000 40 06 0000 0a000001 0a000002";
const TCP: &str = "0400 0050 00000001 00000002 5f12 2000 0000 0000";
const UDP: &str = "0400 0035 000c 0000 01020304";
const ADDRS: &str = "20010db8000000000000000000000001 20010db8000000000000000000000002";
const SOLICIT: &str = "8700 0000 00000000 fe800000000000000000000000000001";

const MAC_AA: u128 = 0x0200_0000_00aa;
const V6_SRC: u128 = 0x2001_0db8 << 96 | 1;
const V6_DST: u128 = 0x2001_0db8 << 96 | 2;

struct Golden {
    name: &'static str,
    frame: Vec<u8>,
    fields: Vec<(Field, u128)>,
    layout: Layout,
}

/// A frame after the MAC addresses, the fields that it has besides those and the port, and its layout.
fn golden(name: &'static str, rest: &[&str], fields: &[&[(Field, u128)]], layout: [u16; 3]) -> Golden {
    let [l3, l4, payload] = layout;
    let frame = hex(&format!("{MACS}{}", rest.concat()));
    Golden { name, frame, fields: fields.concat(), layout: Layout { l3, l4, payload } }
}

const TCP_FIELDS: &[(Field, u128)] = &[(TpSrc, 1024), (TpDst, 80), (TcpFlags, 0xf12)];
const UDP_FIELDS: &[(Field, u128)] = &[(TpSrc, 1024), (TpDst, 53)];

fn v4(shape: u16, proto: u8, frag: u8) -> Vec<(Field, u128)> {
    vec![
        (EthType, 0x800),
        (Shape, shape as u128),
        (Ipv4Src, 0x0a000001),
        (Ipv4Dst, 0x0a000002),
        (IpProto, proto as u128),
        (IpTtl, 64),
        (IpFrag, frag as u128),
    ]
}

fn v6(shape: u16, proto: u8, frag: u8) -> Vec<(Field, u128)> {
    vec![
        (EthType, 0x86dd),
        (Shape, shape as u128),
        (Ipv6Src, V6_SRC),
        (Ipv6Dst, V6_DST),
        (Ipv6Label, 0xabcde),
        (IpTos, 0xb8),
        (IpProto, proto as u128),
        (IpTtl, 255),
        (IpFrag, frag as u128),
    ]
}

/// An IPv6 header with `len` bytes of payload and what follows it.
fn ip6(next: u8, len: usize, rest: &str) -> String {
    format!("86dd 6b8abcde {len:04x} {next:02x} ff {ADDRS} {rest}")
}

fn goldens() -> Vec<Golden> {
    use shape::*;
    let whole = L3 | L4;
    let ip4 =
        |flags: &str, proto: &str| format!("0800 4500 0028 1234 {flags} 40 {proto} 0000 0a000001 0a000002");
    vec![
        golden("TCP", &["0800", IP4, TCP], &[&v4(whole, 6, 0), TCP_FIELDS], [14, 34, 54]),
        golden(
            "TCP with options, DSCP and ECN",
            &[
                "0800 4503 002c 1234 4000 40 06 0000 0a000001 0a000002 0400 0050 00000001 00000002 6002 2000 0000 0000 020405b4",
            ],
            &[&v4(whole, 6, 0), &[(IpTos, 3), (TpSrc, 1024), (TpDst, 80), (TcpFlags, 2)]],
            [14, 34, 58],
        ),
        golden(
            "TCP whose data offset is too small",
            &["0800", IP4, "0400 0050 00000001 00000002 4012 2000 0000 0000"],
            &[&v4(L3, 6, 0)],
            [14, NONE, NONE],
        ),
        golden(
            "TCP whose data offset goes past the frame",
            &["0800", IP4, "0400 0050 00000001 00000002 6012 2000 0000 0000"],
            &[&v4(L3, 6, 0)],
            [14, NONE, NONE],
        ),
        golden(
            "UDP, padded",
            &["0800 4500 0020 1234 4000 40 11 0000 0a000001 0a000002", UDP, "000000000000"],
            &[&v4(whole, 17, 0), UDP_FIELDS],
            [14, 34, 42],
        ),
        golden(
            "SCTP",
            &[&ip4("4000", "84"), "0400 0050 11223344 55667788", "00000000 00000000"],
            &[&v4(whole, 132, 0), &[(TpSrc, 1024), (TpDst, 80)]],
            [14, 34, 46],
        ),
        golden(
            "ICMP",
            &[&ip4("0000", "01"), "0304 0000 00000000 000000000000000000000000"],
            &[&v4(whole, 1, 0), &[(TpSrc, 3), (TpDst, 4)]],
            [14, 34, 42],
        ),
        golden(
            "ICMPv6 over IPv4 is only a protocol",
            &[&ip4("0000", "3a"), TCP],
            &[&v4(L3, 58, 0)],
            [14, NONE, NONE],
        ),
        golden("GRE", &[&ip4("0000", "2f"), TCP], &[&v4(L3, 47, 0)], [14, NONE, NONE]),
        golden(
            "IPv4 options",
            &["0800 4600 002c 1234 4000 40 06 0000 0a000001 0a000002 94040000", TCP],
            &[&v4(whole | L3_OPTIONS, 6, 0), TCP_FIELDS],
            [14, 38, 58],
        ),
        golden("first fragment", &[&ip4("2000", "06"), TCP], &[&v4(whole, 6, 1), TCP_FIELDS], [14, 34, 54]),
        golden("middle fragment", &[&ip4("2001", "06"), TCP], &[&v4(L3, 6, 2)], [14, NONE, NONE]),
        golden("last fragment", &[&ip4("0001", "06"), TCP], &[&v4(L3, 6, 2)], [14, NONE, NONE]),
        golden(
            "total length beyond the frame",
            &["0800 4500 0400 1234 4000 40 06 0000 0a000001 0a000002", TCP],
            &[&v4(L3_BAD | L4, 6, 0), TCP_FIELDS],
            [14, 34, 54],
        ),
        golden(
            "total length shorter than its header",
            &["0800 4500 0010 1234 4000 40 06 0000 0a000001 0a000002", TCP],
            &[&v4(L3_BAD | L4, 6, 0), TCP_FIELDS],
            [14, 34, 54],
        ),
        golden(
            "wrong version",
            &["0800 6500 0028 1234 4000 40 06 0000 0a000001 0a000002", TCP],
            &[&v4(L3_BAD | L4, 6, 0), TCP_FIELDS],
            [14, 34, 54],
        ),
        golden(
            "header length too small",
            &["0800 4400 0028 1234 4000 40 06 0000 0a000001 0a000002", TCP],
            &[&[(EthType, 0x800), (Shape, L3_BAD as u128)]],
            [NONE, NONE, NONE],
        ),
        golden(
            "header length beyond the frame",
            &["0800 4f00 0028 1234 4000 40 06 0000 0a000001 0a000002", TCP],
            &[&[(EthType, 0x800), (Shape, L3_BAD as u128)]],
            [NONE, NONE, NONE],
        ),
        golden(
            "802.1Q",
            &["8100 a123 0800", IP4, TCP],
            &[&v4(whole, 6, 0), TCP_FIELDS, &[(VlanTpid, 0x8100), (VlanTci, 0xb123)]],
            [18, 38, 58],
        ),
        golden(
            "QinQ",
            &["88a8 0064 8100 0065 0800", IP4, TCP],
            &[
                &v4(whole, 6, 0),
                TCP_FIELDS,
                &[(VlanTpid, 0x88a8), (VlanTci, 0x1064), (CvlanTpid, 0x8100), (CvlanTci, 0x1065)],
            ],
            [22, 42, 62],
        ),
        golden(
            "three tags",
            &["8100 0001 8100 0002 8100 0003 0800", IP4, TCP],
            &[&[
                (EthType, 0x8100),
                (Shape, VLAN_DEEP as u128),
                (VlanTpid, 0x8100),
                (VlanTci, 0x1001),
                (CvlanTpid, 0x8100),
                (CvlanTci, 0x1002),
            ]],
            [22, NONE, NONE],
        ),
        golden(
            "tag without an ethertype",
            &["8100 0001"],
            &[&[(EthType, 0x8100), (Shape, L3_BAD as u128)]],
            [14, NONE, NONE],
        ),
        golden(
            "inner tag without an ethertype",
            &["88a8 0064 8100 0001"],
            &[&[(EthType, 0x8100), (Shape, L3_BAD as u128), (VlanTpid, 0x88a8), (VlanTci, 0x1064)]],
            [18, NONE, NONE],
        ),
        golden("802.2", &["0026 424203 000000000000"], &[&[(EthType, 4)]], [14, NONE, NONE]),
        golden("802.2 too short for SNAP", &["0007 aaaa03000000 08"], &[&[(EthType, 4)]], [14, NONE, NONE]),
        golden(
            "SNAP of another organisation",
            &["0030 aaaa03 00000c 2000 0000"],
            &[&[(EthType, 4)]],
            [14, NONE, NONE],
        ),
        golden("SNAP", &["0030 aaaa03 000000 0800", IP4, TCP], &[&v4(whole, 6, 0), TCP_FIELDS], [22, 42, 62]),
        golden(
            "SNAP with a length",
            &["0030 aaaa03 000000 0100 00000000"],
            &[&[(EthType, 4)]],
            [22, NONE, NONE],
        ),
        golden("the smallest ethertype", &["0600 00000000"], &[&[(EthType, 0x600)]], [14, NONE, NONE]),
        golden("the largest length", &["05ff 00000000"], &[&[(EthType, 4)]], [14, NONE, NONE]),
        golden(
            "SNAP with the smallest ethertype",
            &["0030 aaaa03 000000 0600 00000000"],
            &[&[(EthType, 0x600)]],
            [22, NONE, NONE],
        ),
        golden(
            "ARP",
            &["0806 0001 0800 06 04 0001 0200000000aa 0a000001 000000000000 0a000002"],
            &[&[
                (EthType, 0x806),
                (Shape, L3 as u128),
                (IpProto, 1),
                (Ipv4Src, 0x0a000001),
                (Ipv4Dst, 0x0a000002),
                (ArpSha, MAC_AA),
            ]],
            [14, NONE, NONE],
        ),
        golden(
            "RARP",
            &["8035 0001 0800 06 04 0003 0200000000aa 00000000 0200000000aa 00000000"],
            &[&[(EthType, 0x8035), (Shape, L3 as u128), (IpProto, 3), (ArpSha, MAC_AA), (ArpTha, MAC_AA)]],
            [14, NONE, NONE],
        ),
        golden(
            "ARP opcode of more than 8 bits",
            &["0806 0001 0800 06 04 0101 0200000000aa 0a000001 000000000000 0a000002"],
            &[&[
                (EthType, 0x806),
                (Shape, L3 as u128),
                (Ipv4Src, 0x0a000001),
                (Ipv4Dst, 0x0a000002),
                (ArpSha, MAC_AA),
            ]],
            [14, NONE, NONE],
        ),
        golden(
            "ARP for other hardware",
            &["0806 0006 0800 06 04 0001 0200000000aa 0a000001 000000000000 0a000002"],
            &[&[(EthType, 0x806)]],
            [14, NONE, NONE],
        ),
        golden("IPv6 TCP", &[&ip6(6, 20, TCP)], &[&v6(whole, 6, 0), TCP_FIELDS], [14, 54, 74]),
        golden(
            "IPv6 length beyond the frame",
            &[&ip6(17, 99, UDP)],
            &[&v6(L3_BAD | L4, 17, 0), UDP_FIELDS],
            [14, 54, 62],
        ),
        golden(
            "hop-by-hop, routing, destination, authentication",
            &[
                &ip6(
                    0,
                    68,
                    "2b00 000000000000 3c00 040000000000 3301 000000000000 0000000000000000 1104 0000 00000001 00000002 000000000000000000000000",
                ),
                UDP,
            ],
            &[&v6(whole | L3_OPTIONS, 17, 0), UDP_FIELDS],
            [14, 110, 118],
        ),
        golden(
            "IPv6 first fragment",
            &[&ip6(44, 20, "1100 0001 00000007"), UDP],
            &[&v6(whole | L3_OPTIONS, 17, 1), UDP_FIELDS],
            [14, 62, 70],
        ),
        golden(
            "IPv6 atomic fragment",
            &[&ip6(44, 20, "1100 0000 00000007"), UDP],
            &[&v6(whole | L3_OPTIONS, 17, 1), UDP_FIELDS],
            [14, 62, 70],
        ),
        golden(
            "IPv6 later fragment",
            &[&ip6(44, 20, "1100 0008 00000007"), UDP],
            &[&v6(L3 | L3_OPTIONS, 44, 2)],
            [14, NONE, NONE],
        ),
        golden(
            "IPv6 later fragment that goes on with an extension header",
            &[&ip6(44, 20, "3c00 0008 00000007"), UDP],
            &[&v6(L3_BAD | L3_OPTIONS, 59, 1)],
            [14, NONE, NONE],
        ),
        golden(
            "extension header cut short",
            &[&ip6(0, 9, "3c00 000000000000 11")],
            &[&v6(L3_BAD | L3_OPTIONS, 59, 0)],
            [14, NONE, NONE],
        ),
        golden(
            "fragment header cut short",
            &[&ip6(44, 3, "1100 00")],
            &[&v6(L3_BAD | L3_OPTIONS, 59, 1)],
            [14, NONE, NONE],
        ),
        golden("no next header", &[&ip6(59, 4, "00000000")], &[&v6(L3, 59, 0)], [14, NONE, NONE]),
        golden("ESP", &[&ip6(50, 20, TCP)], &[&v6(L3, 50, 0)], [14, NONE, NONE]),
        golden("ICMP over IPv6 is only a protocol", &[&ip6(1, 20, TCP)], &[&v6(L3, 1, 0)], [14, NONE, NONE]),
        golden(
            "ICMPv6 echo",
            &[&ip6(58, 8, "8000 0000 00010001")],
            &[&v6(whole, 58, 0), &[(TpSrc, 128)]],
            [14, 54, 62],
        ),
        golden(
            "neighbour solicitation",
            &[&ip6(58, 32, SOLICIT), "0101 0200000000aa"],
            &[&v6(whole, 58, 0), &[(TpSrc, 135), (NdTarget, 0xfe80 << 112 | 1), (ArpSha, MAC_AA)]],
            [14, 54, 62],
        ),
        golden(
            "neighbour advertisement, other options first, padded",
            &[
                &ip6(58, 56, "8800 0000 60000000 fe800000000000000000000000000001"),
                "0e02 0102030405060708090a0b0c0d0e 0102 0200000000bb0000000000000000 0201 0200000000aa 000000000000",
            ],
            &[&v6(whole, 58, 0), &[(TpSrc, 136), (NdTarget, 0xfe80 << 112 | 1), (ArpTha, MAC_AA)]],
            [14, 54, 62],
        ),
        golden(
            "neighbour solicitation with the option twice",
            &[&ip6(58, 40, SOLICIT), "0101 0200000000aa 0101 0200000000aa"],
            &[&v6(whole, 58, 0), &[(TpSrc, 135)]],
            [14, 54, 62],
        ),
        golden(
            "neighbour solicitation with an empty option, then another",
            &[&ip6(58, 40, SOLICIT), "0100 0200000000aa 0101 0200000000aa"],
            &[&v6(whole, 58, 0), &[(TpSrc, 135), (NdTarget, 0xfe80 << 112 | 1)]],
            [14, 54, 62],
        ),
        golden(
            "neighbour solicitation with an option beyond the frame",
            &[&ip6(58, 40, SOLICIT), "0101 0200000000aa 0102 0200000000aa"],
            &[&v6(whole, 58, 0), &[(TpSrc, 135), (NdTarget, 0xfe80 << 112 | 1), (ArpSha, MAC_AA)]],
            [14, 54, 62],
        ),
        golden(
            "redirect is no solicitation",
            &[&ip6(58, 32, "8900 0000 00000000 fe800000000000000000000000000001"), "0101 0200000000aa"],
            &[&v6(whole, 58, 0), &[(TpSrc, 137)]],
            [14, 54, 62],
        ),
        golden(
            "MPLS, one label",
            &["8847 0001013f", IP4, TCP],
            &[&[(EthType, 0x8847), (Shape, L3 as u128), (Mpls0, 0x0001013f), (MplsCount, 1)]],
            [14, NONE, NONE],
        ),
        golden(
            "MPLS, four labels",
            &["8848 0001003f 0002003f 0003003f 0004013f", IP4],
            &[&[
                (EthType, 0x8848),
                (Shape, L3 as u128),
                (Mpls0, 0x0001003f),
                (Mpls1, 0x0002003f),
                (Mpls2, 0x0003003f),
                (MplsCount, 3),
            ]],
            [14, NONE, NONE],
        ),
        golden(
            "MPLS without a bottom",
            &["8847 0001003f 0002003f 0003"],
            &[&[(EthType, 0x8847), (Shape, L3_BAD as u128), (Mpls0, 0x0001003f), (Mpls1, 0x0002003f)]],
            [14, NONE, NONE],
        ),
        golden("NSH", &["894f 0fc60103 00000102"], &[&[(EthType, 0x894f)]], [14, NONE, NONE]),
        golden("LLDP", &["88cc 0207"], &[&[(EthType, 0x88cc)]], [14, NONE, NONE]),
    ]
}

/// What the parser makes of the whole frame, or of as much of it as fits the snapshot.
fn parse(frame: &[u8]) -> (Extracted, Key, Layout) {
    let mut packet = Packet::from_frame(PORT, frame);
    let mut key = Key::default();
    let extracted = extract(&mut packet, &mut key);
    (extracted, key, packet.layout)
}

/// Parses with a head of `want` bytes at first and extends it when asked to.
fn parse_piecewise(frame: &[u8], want: usize) -> (Extracted, Key, Layout) {
    let mut packet = Packet::default();
    let head = packet.reset(PORT, frame.len() as u32, want);
    let mut filled = head.len();
    head.copy_from_slice(&frame[..filled]);
    let mut key = Key::default();
    let mut extracted = extract(&mut packet, &mut key);
    if extracted == Extracted::NeedMore {
        assert!(filled < frame.len() && filled < MAX_SNAPSHOT);
        assert_eq!(packet.layout, Layout::default());
        let more = packet.extend();
        more.copy_from_slice(&frame[filled..filled + more.len()]);
        filled += more.len();
        assert_eq!(filled, frame.len().min(MAX_SNAPSHOT));
        extracted = extract(&mut packet, &mut key);
        assert_ne!(extracted, Extracted::NeedMore);
    }
    (extracted, key, packet.layout)
}

/// Holds the parser against its twin and against itself with a shorter head.
fn check_frame(frame: &[u8], want: usize) {
    let (extracted, key, layout) = parse(frame);
    if frame.len() < 14 {
        assert_eq!(extracted, Extracted::Runt);
        return;
    }
    let (again, again_key, again_layout) = parse_piecewise(frame, want);
    assert_eq!(extracted, again, "{want} bytes at first");
    if extracted == Extracted::Done {
        assert_eq!((key, layout), (again_key, again_layout), "{want} bytes at first");
    }
    match plain::extract(PORT, frame) {
        Some((plain_key, plain_layout)) if extracted == Extracted::Done => {
            assert_eq!(key, plain_key);
            assert_eq!(layout, plain_layout);
        }
        Some(_) => assert!(frame.len() > MAX_SNAPSHOT, "{extracted:?}"),
        None => assert_eq!(extracted, Extracted::TooLong),
    }
}

#[test]
fn golden_packets_give_their_keys() {
    for Golden { name, frame, fields, layout } in goldens() {
        let mut expected = Key::default();
        expected.set(InPort, PORT.slot as u128);
        expected.set(EthDst, 0x0200_0000_00bb);
        expected.set(EthSrc, MAC_AA);
        for (field, value) in fields {
            expected.set(field, value);
        }
        assert_eq!(parse(&frame), (Extracted::Done, expected, layout), "{name}");
        assert_eq!(plain::extract(PORT, &frame), Some((expected, layout)), "{name}, the twin");
    }
}

#[test]
fn golden_packets_cut_anywhere_agree_with_the_twin() {
    for Golden { frame, .. } in goldens() {
        for len in 0..=frame.len() {
            for want in [0, 14, 20, 34, 40, 54, 60, len.saturating_sub(1)] {
                check_frame(&frame[..len], want);
            }
        }
    }
}

/// The combinations that Open vSwitch generates for its own flow extraction test, put together anew.
#[test]
fn every_combination_of_link_layer_options_fragments_and_transport() {
    let transports: [(u8, &str, u128, u128, u128, u16); 5] = [
        (6, "1a0b 270e 0531668f 2a75f360 5012 16bf 49eb 325d 7061796c6f6164", 6667, 9998, 0x012, 20),
        (6, "1a0b 270e 0531668f 2a75f360 6012 16bf 49eb 325d 020407b7 7061796c6f6164", 6667, 9998, 0x012, 24),
        (17, "0458 08af 000f 0000 0f0f0f0f0f0f0f", 1112, 2223, 0, 8),
        (1, "0800 0000 02e0 03a3", 8, 0, 0, 8),
        (42, "6f7468657220686561646572", 0, 0, 0, 0),
    ];
    let mut seen = 0;
    for snap in [false, true] {
        for tci in [None, Some(0u16), Some(0x123)] {
            for options in ["", "820b6bc5abcd123401020300"] {
                for (fragment, frag) in [(0u16, 0u8), (0x2000, 1), (0x2111, 2), (0x0222, 2)] {
                    for (proto, l4, src, dst, flags, l4_len) in transports {
                        let mut text = MACS.to_string();
                        let mut expected = Key::default();
                        if let Some(tci) = tci {
                            text += &format!("8100{tci:04x}");
                            expected.set(VlanTpid, 0x8100);
                            expected.set(VlanTci, tci as u128 | 0x1000);
                        }
                        text += if snap { "0050 aaaa03000000" } else { "" };
                        let (options_len, l4_bytes) = (options.len() / 2, hex(l4).len());
                        let l4 = if frag == 2 { "" } else { l4 };
                        let total = 20 + options_len + if frag == 2 { 0 } else { l4_bytes };
                        let ihl = 5 + options_len / 4;
                        text += "0800";
                        let l3 = hex(&text).len() as u16;
                        text += &format!("4{ihl:x}2c{total:04x}ff98{fragment:04x}40{proto:02x}0000");
                        text += &format!("0a00020fc0a80114{options}{l4}");
                        for (field, value) in [
                            (InPort, PORT.slot as u128),
                            (EthDst, 0x0200_0000_00bb),
                            (EthSrc, MAC_AA),
                            (EthType, 0x800),
                            (IpTos, 44),
                            (IpTtl, 64),
                            (IpProto, proto as u128),
                            (IpFrag, frag as u128),
                            (Ipv4Src, 0x0a00020f),
                            (Ipv4Dst, 0xc0a80114),
                        ] {
                            expected.set(field, value);
                        }
                        let mut shape =
                            if options.is_empty() { shape::L3 } else { shape::L3 | shape::L3_OPTIONS };
                        let mut layout = Layout { l3, ..Layout::default() };
                        if frag != 2 && l4_len > 0 {
                            expected.set(TpSrc, src);
                            expected.set(TpDst, dst);
                            expected.set(TcpFlags, flags);
                            shape |= shape::L4;
                            layout.l4 = l3 + ihl as u16 * 4;
                            layout.payload = layout.l4 + l4_len;
                        }
                        expected.set(Shape, shape as u128);
                        assert_eq!(parse(&hex(&text)), (Extracted::Done, expected, layout), "{text}");
                        seen += 1;
                    }
                }
            }
        }
    }
    assert_eq!(seen, 240);
}

#[test]
fn long_header_chains_go_to_the_host() {
    // Twelve destination options headers are followed, thirteen are not.
    let chain = |n: usize| {
        let mut text = ip6(60, 8 * n + 12, "");
        for i in 0..n {
            text += if i + 1 == n { "1100 000000000000" } else { "3c00 000000000000" };
        }
        hex(&format!("{MACS}{text}{UDP}"))
    };
    assert_eq!(parse(&chain(12)).0, Extracted::Done);
    assert_eq!(parse(&chain(13)).0, Extracted::TooLong);
    assert_eq!(plain::extract(PORT, &chain(13)), None);
    // A header that goes past the end of the frame.
    let over = hex(&format!("{MACS}{}", ip6(60, 20, &format!("1103 000000000000 {UDP}"))));
    assert_eq!(parse(&over).0, Extracted::TooLong);
    // Headers that go past the longest snapshot in a frame that goes on.
    let mut labels = hex(&format!("{MACS} 8847"));
    labels.extend([0, 1, 0, 63].repeat(300));
    assert_eq!(parse_piecewise(&labels, SNAPSHOT).0, Extracted::TooLong);
    assert_eq!(parse(&labels[..1000]).0, Extracted::Done);
}

#[test]
fn recirculation_keeps_metadata() {
    let frame = goldens().swap_remove(0).frame;
    let mut packet = Packet::from_frame(PORT, &frame);
    let mut key = Key::default();
    assert_eq!(extract(&mut packet, &mut key), Extracted::Done);
    key.set(CtMark, 7);
    key.set(TunId, 42);
    let before = key;
    key.set(TpDst, 1);
    key.set(NdTarget, 1);
    assert_eq!(extract_recirculated(&mut packet, &mut key, 99), Extracted::Done);
    assert_eq!(key.recirc_id(), 99);
    key.set(RecircId, 0);
    assert_eq!(key, before);
}

/// Whoever segments it, or completes its checksum, needs it.
#[test]
fn recirculation_keeps_the_layout_behind_tags_that_are_not_read() {
    let frame = hex(&format!("{MACS} 8100 000a 8100 0014 0800 {IP4} {TCP}"));
    let mut packet = Packet::from_frame(PORT, &frame);
    let mut key = Key::default();
    assert_eq!(extract(&mut packet, &mut key), Extracted::Done);
    let Layout { l3, l4, payload } = packet.layout;
    packet.insert(12, 4).unwrap();
    packet.head_mut()[12..16].copy_from_slice(&[0x81, 0, 0, 30]);
    assert_eq!(extract_recirculated(&mut packet, &mut key, 99), Extracted::Done);
    assert_eq!(key.eth_type(), ETH_P_8021Q);
    assert_eq!(packet.layout, Layout { l3: l3 + 4, l4: l4 + 4, payload: payload + 4 });
    // With another it is as long as a SNAP header makes it.
    packet.insert(12, 4).unwrap();
    packet.head_mut()[12..16].copy_from_slice(&[0x81, 0, 0, 31]);
    assert_eq!(extract_recirculated(&mut packet, &mut key, 99), Extracted::Done);
    assert!(is_settled(&packet, &key));
    // One that comes in like this has none.
    let frame = packet.head().to_vec();
    assert_eq!(extract(&mut Packet::from_frame(PORT, &frame), &mut key), Extracted::Done);
    assert_eq!(extract(&mut packet, &mut key), Extracted::Done);
    assert_eq!((packet.layout.l4, packet.layout.payload), (NONE, NONE));
}

#[test]
fn options_of_tcp_are_wanted_in_the_head() {
    let mut frame = hex(&format!("{MACS} 0800 {IP4} {TCP}"));
    frame[46] = 0xf0;
    frame.resize(34 + 60 + 100, 0);
    let mut packet = Packet::default();
    for (want, expected) in [(93, Extracted::NeedMore), (94, Extracted::Done)] {
        packet.reset(PORT, frame.len() as u32, want).copy_from_slice(&frame[..want]);
        assert_eq!(extract(&mut packet, &mut Key::default()), expected, "{want} bytes");
    }
    assert_eq!(packet.layout.payload, 94);
}
