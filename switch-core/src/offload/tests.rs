use super::*;
use crate::packet::{Layout, PortId};
use crate::parse::{Extracted, extract};
use proptest::prelude::*;

const PORT: PortId = PortId { slot: 1, generation: 1 };

fn parsed(frame: &[u8]) -> (Packet, Key) {
    let mut packet = Packet::from_frame(PORT, frame);
    let mut key = Key::default();
    assert_eq!(extract(&mut packet, &mut key), Extracted::Done);
    (packet, key)
}

/// An IPv4 frame with protocol `proto`, fragment field `fragment`, and `l4` behind the header.
fn ipv4(proto: u8, fragment: u16, l4: &[u8]) -> Vec<u8> {
    let mut frame = vec![2; 12];
    frame.extend([8, 0, 0x45, 0]);
    frame.extend((20 + l4.len() as u16).to_be_bytes());
    frame.extend([0, 1]);
    frame.extend(fragment.to_be_bytes());
    frame.extend([64, proto, 0, 0, 10, 0, 0, 1, 10, 0, 0, 2]);
    frame.extend(l4);
    frame
}

fn ipv6(proto: u8, l4: &[u8]) -> Vec<u8> {
    let mut frame = vec![2; 12];
    frame.extend([0x86, 0xdd, 0x60, 0, 0, 0]);
    frame.extend((l4.len() as u16).to_be_bytes());
    frame.extend([proto, 64]);
    frame.extend([0x20; 32]);
    frame.extend(l4);
    frame
}

/// A TCP header of 20 bytes and `payload` bytes after it.
fn tcp(payload: usize) -> Vec<u8> {
    let mut bytes = vec![0; 20 + payload];
    bytes[12] = 0x50;
    bytes
}

fn needs_csum(csum_start: u16, csum_offset: u16) -> RawHeader {
    RawHeader { flags: F_NEEDS_CSUM, csum_start, csum_offset, ..RawHeader::default() }
}

fn gso(gso_type: u8, gso_size: u16, raw: RawHeader) -> RawHeader {
    RawHeader { gso_type, gso_size, ..raw }
}

fn verdict(raw: &RawHeader, frame: &[u8]) -> Result<Offload, DropReason> {
    let (packet, key) = parsed(frame);
    check(raw, &packet, &key)
}

const LIE: Result<Offload, DropReason> = Err(DropReason::BadOffload);

#[test]
fn no_offload_is_no_offload() {
    let frame = ipv4(6, 0, &tcp(10));
    assert_eq!(verdict(&RawHeader::default(), &frame), Ok(Offload::default()));
    // Without flags and type the other fields mean nothing; unknown flags are ignored.
    let noise =
        RawHeader { flags: 0xfc, gso_size: 9, csum_start: 9, csum_offset: 9, hdr_len: 9, gso_type: 0 };
    assert_eq!(verdict(&noise, &frame), Ok(Offload::default()));
    let valid = verdict(&RawHeader { flags: F_DATA_VALID, ..RawHeader::default() }, &frame).unwrap();
    assert_eq!(valid, Offload { csum_valid: true, ..Offload::default() });
}

#[test]
fn checksum_offsets_must_be_those_of_the_transport_header() {
    let partial = |csum_start, csum_offset| {
        Ok(Offload { needs_csum: true, csum_start, csum_offset, ..Offload::default() })
    };
    assert_eq!(verdict(&needs_csum(34, 16), &ipv4(6, 0, &tcp(0))), partial(34, 16));
    assert_eq!(verdict(&needs_csum(34, 6), &ipv4(17, 0, &[0; 8])), partial(34, 6));
    assert_eq!(verdict(&needs_csum(54, 16), &ipv6(6, &tcp(0))), partial(54, 16));
    for (start, offset) in [(34, 6), (33, 16), (34, 17), (14, 10), (0, 0), (0xffff, 0xffff)] {
        assert_eq!(verdict(&needs_csum(start, offset), &ipv4(6, 0, &tcp(40))), LIE, "{start}+{offset}");
    }
    assert_eq!(verdict(&needs_csum(34, 16), &ipv4(17, 0, &[0; 40])), LIE);
    // Both flags: the checksum is still to be completed.
    let both = RawHeader { flags: F_NEEDS_CSUM | F_DATA_VALID, ..needs_csum(34, 16) };
    assert_eq!(verdict(&both, &ipv4(6, 0, &tcp(0))), partial(34, 16));
}

#[test]
fn fragments_and_other_protocols_have_no_checksum_to_complete() {
    for fragment in [0x2000, 0x2001, 0x0001] {
        assert_eq!(verdict(&needs_csum(34, 16), &ipv4(6, fragment, &tcp(0))), LIE, "{fragment:#x}");
    }
    for proto in [1, 132] {
        for offset in [2, 6, 8, 16] {
            assert_eq!(verdict(&needs_csum(34, offset), &ipv4(proto, 0, &[0; 40])), LIE, "{proto}");
        }
    }
    assert_eq!(verdict(&needs_csum(54, 2), &ipv6(58, &[0; 40])), LIE);
}

#[test]
fn behind_unknown_headers_a_checksum_must_lie_in_the_head() {
    let gre = ipv4(47, 0, &[0; 60]);
    let len = gre.len() as u16;
    assert!(verdict(&needs_csum(58, 16), &gre).is_ok());
    assert!(verdict(&needs_csum(len - 18, 16), &gre).is_ok());
    assert_eq!(verdict(&needs_csum(len - 17, 16), &gre), LIE);
    assert_eq!(verdict(&needs_csum(0xffff, 0xffff), &gre), LIE);
    assert_eq!(verdict(&needs_csum(13, 16), &gre), LIE);
    assert_eq!(verdict(&gso(GSO_TCPV4, 9, needs_csum(58, 16)), &gre), LIE);
    // A TCP header that is cut short is not an unknown one.
    assert_eq!(verdict(&needs_csum(34, 16), &ipv4(6, 0, &[0; 19])), LIE);
    assert_eq!(verdict(&needs_csum(34, 16), &ipv4(6, 0, &[0; 40])), LIE);
}

#[test]
fn a_checksum_overwrites_nothing_that_was_matched() {
    let gre = ipv4(47, 0, &[0; 60]);
    // The source address, as the checksum of a header that begins at the IP header; the checksum, the protocol.
    for (start, offset) in [(14, 12), (14, 10), (14, 8), (33, 1), (32, 0)] {
        assert_eq!(verdict(&needs_csum(start, offset), &gre), LIE, "{start}+{offset}");
    }
    let mut options = gre.clone();
    options[14] = 0x46;
    assert_eq!(verdict(&needs_csum(34, 4), &options), LIE);
    assert!(verdict(&needs_csum(38, 0), &options).is_ok());
    let gre6 = ipv6(47, &[0; 60]);
    assert_eq!(verdict(&needs_csum(14, 8), &gre6), LIE);
    assert_eq!(verdict(&needs_csum(53, 1), &gre6), LIE);
    assert!(verdict(&needs_csum(54, 16), &gre6).is_ok());
    // Behind extension headers that end nobody knows where.
    let dest = ipv6(60, &[[47, 0, 1, 4, 0, 0, 0, 0].as_slice(), &[0; 60]].concat());
    assert_eq!(verdict(&needs_csum(54, 0), &dest), LIE);

    let ether = |eth_type: u16, rest: &[u8]| [&[2; 12], &eth_type.to_be_bytes()[..], rest].concat();
    let mut arp = vec![0, 1, 8, 0, 6, 4, 0, 1];
    arp.extend([9; 52]);
    assert_eq!(verdict(&needs_csum(14, 14), &ether(0x0806, &arp)), LIE);
    let mut mpls = vec![0; 60];
    mpls[6] = 1;
    assert_eq!(verdict(&needs_csum(14, 0), &ether(0x8847, &mpls)), LIE);
    assert_eq!(verdict(&needs_csum(18, 2), &ether(0x8847, &mpls)), LIE);
    assert!(verdict(&needs_csum(22, 0), &ether(0x8847, &mpls)).is_ok());
    assert_eq!(verdict(&needs_csum(22, 0), &ether(0x8847, &[0; 60])), LIE, "a stack without a bottom");
    // A VLAN tag before an IP header that is cut short.
    let tagged = ether(0x8100, &[0, 5, 8, 0, 0x45, 0, 0, 0, 0, 0, 0, 0]);
    assert_eq!(verdict(&needs_csum(14, 0), &tagged), LIE);
    assert!(verdict(&needs_csum(14, 0), &ether(0x1234, &[0; 60])).is_ok());
    assert_eq!(verdict(&needs_csum(12, 0), &ether(0x1234, &[0; 60])), LIE);
}

#[test]
fn segmentation_must_fit_the_packet() {
    let (tcp4, tcp6) = (ipv4(6, 0, &tcp(3000)), ipv6(6, &tcp(3000)));
    let (udp4, udp6) = (ipv4(17, 0, &[0; 3008]), ipv6(17, &[0; 3008]));
    let (t4, t6) = (needs_csum(34, 16), needs_csum(54, 16));
    let (u4, u6) = (needs_csum(34, 6), needs_csum(54, 6));
    let kinds = [
        (GSO_TCPV4, t4, &tcp4, Gso::Tcp4),
        (GSO_TCPV6, t6, &tcp6, Gso::Tcp6),
        (GSO_UDP_L4, u4, &udp4, Gso::UdpL4),
        (GSO_UDP_L4, u6, &udp6, Gso::UdpL4),
    ];
    for (kind, raw, frame, expected) in kinds {
        let offload = verdict(&gso(kind, 1000, raw), frame).unwrap();
        assert_eq!((offload.gso, offload.gso_size, offload.ecn), (expected, 1000, false));
        assert!(offload.needs_csum);
        // A lie without NEEDS_CSUM, with no size, or with a segment of more than 64 KiB.
        assert_eq!(verdict(&gso(kind, 1000, RawHeader::default()), frame), LIE);
        assert_eq!(verdict(&gso(kind, 1000, RawHeader { flags: F_DATA_VALID, ..raw }), frame), LIE);
        assert_eq!(verdict(&gso(kind, 0, raw), frame), LIE);
        assert_eq!(verdict(&gso(kind, 0xffff, raw), frame), LIE);
        // Every other type than its own.
        for other in (0..=255).filter(|other| other & !GSO_ECN != kind && *other != GSO_NONE) {
            assert_eq!(verdict(&gso(other, 1000, raw), frame), LIE, "type {other}");
        }
        // One segment needs no segmentation.
        let small = verdict(&gso(kind, 3000, raw), frame).unwrap();
        assert_eq!((small.gso, small.gso_size, small.needs_csum), (Gso::None, 0, true));
        assert_eq!(verdict(&gso(kind, 2999, raw), frame).unwrap().gso, expected);
    }
    assert!(verdict(&gso(GSO_TCPV4 | GSO_ECN, 1000, t4), &tcp4).unwrap().ecn);
    assert_eq!(verdict(&gso(GSO_UDP_L4 | GSO_ECN, 1000, u4), &udp4), LIE);
    assert_eq!(verdict(&gso(GSO_TCPV4, 7, t4), &tcp4), LIE);
    assert!(verdict(&gso(GSO_TCPV4, 8, t4), &tcp4).is_ok());
    assert_eq!(verdict(&gso(GSO_UDP_L4, 23, u4), &udp4), LIE, "131 datagrams");
    assert!(verdict(&gso(GSO_UDP_L4, 24, u4), &udp4).is_ok(), "125 datagrams");
    assert_eq!(verdict(&gso(GSO_TCPV4, 1000, t4), &ipv4(6, 0x2000, &tcp(3000))), LIE);
}

#[test]
fn the_header_is_written_anew_with_moved_offsets() {
    let mut raw = gso(GSO_TCPV4 | GSO_ECN, 1000, needs_csum(34, 16));
    let (mut packet, key) = parsed(&ipv4(6, 0, &tcp(3000)));
    packet.offload = check(&RawHeader { hdr_len: 0x5555, ..raw }, &packet, &key).unwrap();
    raw.hdr_len = 54;
    assert_eq!(to_raw(&packet), raw);
    packet.insert(12, 4).unwrap();
    assert_eq!(to_raw(&packet), RawHeader { csum_start: 38, hdr_len: 58, ..raw });
    packet.layout = Layout::default();
    assert_eq!(to_raw(&packet).hdr_len, 58);
    packet.offload = Offload::default();
    assert_eq!(to_raw(&packet), RawHeader::default());
    packet.offload.csum_valid = true;
    assert_eq!(to_raw(&packet).flags, F_DATA_VALID);
}

/// Sums 16-bit words one by one.
fn plain_sum(bytes: &[u8]) -> u16 {
    let words = bytes.chunks(2).map(|pair| (pair[0] as u32) << 8 | *pair.get(1).unwrap_or(&0) as u32);
    words.fold(0, |sum, word| (sum + word) % 0xffff) as u16
}

#[test]
fn a_udp_sum_of_zero_is_written_as_all_ones() {
    let mut frame = ipv4(17, 0, &[0, 0, 0, 0, 0, 8, 0xff, 0xf7]);
    let offload = verdict(&needs_csum(34, 6), &frame).unwrap();
    finish_checksum(&mut frame, &offload).unwrap();
    assert_eq!(frame[40..], [0xff, 0xff]);
}

#[test]
fn a_checksum_outside_the_frame_is_not_written() {
    let mut frame = ipv4(47, 0, &[7; 20]);
    let before = frame.clone();
    for (csum_start, csum_offset) in [(55, 0), (54, 0), (53, 0), (34, 19), (0xffff, 0xffff)] {
        let offload = Offload { needs_csum: true, csum_start, csum_offset, ..Offload::default() };
        assert_eq!(finish_checksum(&mut frame, &offload), Err(DropReason::BadOffload));
        assert_eq!(frame, before);
    }
    finish_checksum(&mut frame, &Offload::default()).unwrap();
    assert_eq!(frame, before);
}

#[test]
fn unparsed_frames_may_only_ask_for_a_checksum_inside() {
    let csum = |start, offset| check_unparsed(&needs_csum(start, offset), 100).ok();
    let inside = csum(80, 18).unwrap();
    assert_eq!((inside.needs_csum, inside.csum_start, inside.csum_offset), (true, 80, 18));
    assert_eq!(csum(80, 19), None);
    assert_eq!(csum(13, 6), None);
    assert_eq!(csum(u16::MAX, u16::MAX), None);
    assert_eq!(check_unparsed(&RawHeader::default(), 100), Ok(Offload::default()));
    let gso = RawHeader { gso_type: GSO_TCPV4, gso_size: 10, ..needs_csum(34, 16) };
    assert_eq!(check_unparsed(&gso, 100), Err(DropReason::BadOffload));
}

proptest! {
    #[test]
    fn finished_checksums_verify(payload in proptest::collection::vec(any::<u8>(), 0..100), v6: bool, udp: bool) {
        let mut l4 = if udp { vec![0; 8] } else { tcp(0) };
        let field = if udp { 6 } else { 16 };
        l4.extend(&payload);
        let proto = if udp { 17 } else { 6 };
        let len = l4.len() as u16;
        let addresses = if v6 { vec![0x20; 32] } else { vec![10, 0, 0, 1, 10, 0, 0, 2] };
        let pseudo = [&addresses[..], &[0, proto], &len.to_be_bytes()].concat();
        l4[field..field + 2].copy_from_slice(&plain_sum(&pseudo).to_be_bytes());
        let mut frame = if v6 { ipv6(proto, &l4) } else { ipv4(proto, 0, &l4) };
        let start = frame.len() - l4.len();
        let offload = verdict(&needs_csum(start as u16, field as u16), &frame).unwrap();
        finish_checksum(&mut frame, &offload).unwrap();
        let covered = [&pseudo[..], &frame[start..]].concat();
        prop_assert_eq!(plain_sum(&covered), 0); // modulo 0xffff: a valid sum is all ones
        prop_assert_ne!(&frame[start + field..start + field + 2], &[0, 0]);
    }

    #[test]
    fn no_header_does_harm(
        flags: u8, kind in prop::sample::select(vec![0u8, 1, 3, 4, 5, 0x81, 0x84, 0x85, 0x80]),
        gso_size: u16, csum_start: u16, near in 0u16..70, close: bool, csum_offset in prop::sample::select(vec![6u16, 16, 8, 0xffff]),
        frame in prop::sample::select(vec![
            ipv4(6, 0, &tcp(3000)), ipv4(17, 0, &[0; 3000]), ipv4(6, 0x2000, &tcp(9)), ipv4(47, 0, &[0; 20]), ipv6(6, &tcp(70)),
            ipv6(17, &[0; 8]), ipv6(58, &[0; 8]), vec![2; 14], vec![2; 60],
        ]),
    ) {
        let csum_start = if close { near } else { csum_start };
        let raw = RawHeader { flags, gso_type: kind, hdr_len: 0, gso_size, csum_start, csum_offset };
        let (mut packet, key) = parsed(&frame);
        if let Ok(offload) = check(&raw, &packet, &key) {
            packet.offload = offload;
            // What was accepted is accepted again as we write it, and can be completed.
            prop_assert_eq!(check(&to_raw(&packet), &packet, &key), Ok(offload));
            prop_assert!(finish_checksum(&mut frame.clone(), &offload).is_ok());
            let mut buffer = vec![0; 4096];
            let segments = crate::segment::segment(&frame, &packet.layout, &offload, &mut buffer, |_| {});
            prop_assert_eq!(segments.is_ok(), offload.gso != Gso::None);
        } else {
            prop_assert!(flags & 3 != 0 || kind != 0);
        }
    }
}
