//! What comes by the wire is anybody's: packets that are almost right, against a twin that reads whole frames plainly.

use super::*;
use crate::common::{self, WINDOW_WORDS};

/// What [`recognize`] and [`Decap::pop`] do, of a frame that is wholly at hand: the tunnel's key, and the frame inside. The
/// switch sees `head` bytes of it at first.
fn plain_recognize(frame: &[u8], endpoint: &Endpoint, head: usize) -> Option<(TunnelKey, Vec<u8>)> {
    let at16 = |bytes: &[u8], at: usize| Some((*bytes.get(at)? as u16) << 8 | *bytes.get(at + 1)? as u16);
    let (mut l3, mut vlan) = (14, None);
    if at16(frame, 12)? == 0x8100 {
        (l3, vlan) = (18, Some(at16(frame, 14)? & 0xfff));
    }
    let eth_type = at16(frame, l3 - 2)?;
    let packet = frame.get(l3..)?;
    let first = *packet.first()?;
    let (src, dst, tos, ttl, df, proto, l4): (IpAddr, IpAddr, u8, u8, bool, u8, &[u8]) = match eth_type {
        0x0800 => {
            let header = packet.get(..20)?;
            let sound = first == 0x45 && plain_sum(header) == 0xffff && at16(header, 6)? & 0x3fff == 0;
            let l4 = packet.get(20..at16(header, 2)? as usize).filter(|_| sound)?;
            let address = |at: usize| IpAddr::from(<[u8; 4]>::try_from(&header[at..at + 4]).unwrap());
            (address(12), address(16), header[1], header[8], header[6] & 0x40 != 0, header[9], l4)
        }
        0x86dd => {
            let header = packet.get(..40)?;
            let l4 = packet.get(40..40 + at16(header, 4)? as usize).filter(|_| first >> 4 == 6)?;
            let address = |at: usize| IpAddr::from(<[u8; 16]>::try_from(&header[at..at + 16]).unwrap());
            let tos = first << 4 | header[1] >> 4;
            (address(8), address(24), tos, header[7], false, header[6], l4)
        }
        _ => return None,
    };
    let padded = if eth_type == 0x0800 { 20 } else { 40 } + l4.len() < packet.len();
    if padded && frame.len() > head {
        return None;
    }
    let broadcast = src == "255.255.255.255".parse::<IpAddr>().unwrap();
    if src.is_multicast() || src.is_loopback() || src.is_unspecified() || broadcast || src == dst {
        return None;
    }
    let own = match endpoint.vlan {
        Vlan::Any => vlan,
        Vlan::Untagged => None,
        Vlan::Id(id) => Some(id),
    };
    let is_others = endpoint.mac.is_some_and(|mac| frame[..6] != mac) || vlan != own;
    if is_others || endpoint.local.is_some_and(|local| dst != local) {
        return None;
    }
    let mut flags = if df && endpoint.df { TUN_DF } else { 0 };
    let (mut id, mut ports, mut gbp, mut word) = (0, (0, 0), Gbp::default(), [0; 8]);
    let number = |bytes: &[u8]| bytes.iter().fold(0u64, |number, &byte| number * 256 + byte as u64);
    let inner = if endpoint.kind == Kind::Gre {
        let bits = at16(l4, 0).filter(|_| proto == 47)?;
        if bits & 0x5fff != 0 || at16(l4, 2)? != 0x6558 {
            return None;
        }
        let mut at = 4;
        if bits & 0x8000 != 0 {
            flags |= TUN_CSUM;
            at += 4;
            if plain_sum(l4) != 0xffff {
                return None;
            }
        }
        if bits & 0x2000 != 0 {
            flags |= TUN_KEY;
            id = number(l4.get(at..at + 4)?);
            at += 4;
        }
        l4.get(at..)?
    } else {
        let header = l4.get(..8).filter(|_| proto == 17)?;
        ports = (at16(header, 0)?, at16(header, 2)?);
        if ports.1 != endpoint.port || at16(header, 4)? as usize != l4.len() {
            return None;
        }
        if header[6..] != [0, 0] {
            flags |= TUN_CSUM;
            if plain_sum(&[pseudo(src, dst, 17, l4.len()), l4.to_vec()].concat()) != 0xffff {
                return None;
            }
        }
        let tunnel = l4.get(8..16)?;
        (id, flags) = (number(&tunnel[4..7]), flags | TUN_KEY);
        if tunnel[7] != 0 {
            return None;
        }
        if endpoint.kind == Kind::Vxlan {
            match tunnel[0] {
                8 if tunnel[1..4] == [0, 0, 0] => {}
                0x88 if endpoint.gbp && tunnel[1] & 0xb7 == 0 => {
                    gbp = Gbp { id: at16(tunnel, 2)?, flags: tunnel[1] };
                }
                _ => return None,
            }
            &l4[16..]
        } else {
            let len = tunnel[0] as usize * 4;
            if tunnel[0] > 0x3f || tunnel[1] & 0xbf != 0 || at16(tunnel, 2)? != 0x6558 || len > 8 {
                return None;
            }
            let options = l4.get(16..16 + len)?;
            word[..len].copy_from_slice(options);
            let mut at = 0;
            while at < len {
                let ovn = options[at..at + 3] == [1, 2, 0x80];
                if options[at..at + 4] == [0; 4] || options[at + 2] > 0x7f && !ovn {
                    return None;
                }
                word[at + 3] &= 31;
                at += 4 + word[at + 3] as usize * 4;
            }
            if at != len {
                return None;
            }
            &l4[16 + len..]
        }
    };
    let mut inner = inner.to_vec();
    if inner.len() < 14 {
        return None;
    }
    mark(&mut inner, tos)?;
    let options = number(&word);
    Some((TunnelKey { id, src, dst, tos, ttl, ports, flags, gbp, options }, inner))
}

/// Combines the congestion marks; `None` if the packet is to be dropped.
fn mark(inner: &mut [u8], outer: u8) -> Option<()> {
    let mut l3 = 14;
    while l3 < 22 && inner.len() >= l3 && [[0x81, 0], [0x88, 0xa8]].contains(&[inner[l3 - 2], inner[l3 - 1]])
    {
        l3 += 4;
    }
    let Some(&first) = inner.get(l3) else { return Some(()) };
    let version = match (inner[l3 - 2], inner[l3 - 1], first >> 4) {
        (8, 0, 4) if inner.len() >= l3 + 20 => 4,
        (0x86, 0xdd, 6) if inner.len() >= l3 + 20 => 6,
        _ => return Some(()),
    };
    let tos = if version == 4 { inner[l3 + 1] } else { first << 4 | inner[l3 + 1] >> 4 };
    let marked = match (outer % 4, tos % 4) {
        (3, 0) => return None,
        (3, _) => tos | 3,
        (1, 2) => tos & 0xfc | 1,
        _ => return Some(()),
    };
    if version == 6 {
        (inner[l3], inner[l3 + 1]) = (0x60 | marked >> 4, marked << 4 | inner[l3 + 1] & 15);
        return Some(());
    }
    // A checksum that was wrong stays wrong by as much, as `!` of the sum of what changes.
    let check = (inner[l3 + 10] as u32) << 8 | inner[l3 + 11] as u32;
    let sum = (!check & 0xffff) + (!(tos as u32) & 0xffff) + marked as u32;
    let sum = (sum >> 16) + (sum & 0xffff);
    let sum = !((sum >> 16) + (sum & 0xffff)) as u16;
    inner[l3 + 1] = marked;
    inner[l3 + 10..l3 + 12].copy_from_slice(&sum.to_be_bytes());
    Some(())
}

/// What the switch makes of it.
fn recognized(frame: &[u8], endpoint: &Endpoint, head: usize) -> Option<(TunnelKey, Vec<u8>)> {
    let mut packet = Packet::default();
    let taken = packet.reset(WIRE, frame.len() as u32, head);
    let n = taken.len();
    taken.copy_from_slice(&frame[..n]);
    let sum = |end: u32| Some(crate::checksum::fold(crate::checksum::add(0, &frame[n..end as usize])));
    let found = recognize(&packet, std::slice::from_ref(endpoint), sum)?;
    let end = found.inner.1 as usize;
    let before = packet.clone();
    let taken = found.pop(&mut packet);
    let inner = [packet.head(), &frame[n.min(end)..end]].concat();
    taken.put_back(&mut packet);
    assert_eq!((packet.head(), packet.len), (before.head(), before.len), "as it came");
    assert_eq!((packet.layout, packet.offload, packet.in_port), (before.layout, before.offload, WIRE));
    Some((found.tunnel, inner))
}

/// What the imprint of a `first` packet makes of another, if there is one, is what is made of that one anyway.
fn check_imprint(
    [first, frame]: [&[u8]; 2],
    looked_at: &[u64; WINDOW_WORDS],
    endpoint: &Endpoint,
    head: usize,
) -> Option<Decap> {
    let endpoints = std::slice::from_ref(endpoint);
    let packet = |frame: &[u8]| {
        let mut packet = Packet::default();
        let taken = packet.reset(WIRE, frame.len() as u32, head);
        let n = taken.len();
        taken.copy_from_slice(&frame[..n]);
        packet
    };
    let (mut first, mut other) = (packet(first), packet(frame));
    let shape = common::recognize::<false>(&mut first)?.shape;
    let decap = recognize(&first, endpoints, |_| None)?;
    let imprint = Imprint::of(&first, shape, looked_at, &decap, endpoints)?;
    assert_eq!(imprint.recognize(&first), Some(decap), "its own");
    let found = imprint.recognize(&other)?;
    assert_eq!(Some(found), recognize(&other, endpoints, |_| None));
    assert_eq!(Imprint::peer(&first), Imprint::peer(&other), "where it is looked for");
    let seen = |packet: &Packet| {
        let words = packet.window::<false>().as_chunks::<8>().0;
        std::array::from_fn::<_, 8, _>(|i| u64::from_ne_bytes(words[i]) & looked_at[i])
    };
    assert_eq!(seen(&first), seen(&other), "they have one key in L1");
    assert_eq!(common::recognize::<false>(&mut other).map(|found| found.shape), Some(shape));
    assert_eq!((other.layout, shape), (imprint.layout, imprint.shape));
    Some(found)
}

/// Makes the checksums of a frame right again, that more of what was changed in it is seen.
fn repair(frame: &mut [u8], l3: usize, udp: bool, checksum: bool) {
    let v4 = frame[l3 - 2] == 8;
    let l4 = l3 + if v4 { 20 } else { 40 };
    if checksum {
        let proto = if udp { 17 } else { 47 };
        let field = l4 + if udp { 6 } else { 4 };
        frame[field..field + 2].copy_from_slice(&[0, 0]);
        let addresses = if v4 { l3 + 12..l3 + 20 } else { l3 + 8..l3 + 40 };
        let mut covered = frame[l4..].to_vec();
        if udp {
            let len = (covered.len() as u32).to_be_bytes();
            covered = [&frame[addresses], &[0, proto], &len, &covered].concat();
        }
        let sum = !plain_sum(&covered);
        frame[field..field + 2].copy_from_slice(&if sum == 0 { 0xffff } else { sum }.to_be_bytes());
    }
    if v4 {
        frame[l3 + 10..l3 + 12].copy_from_slice(&[0, 0]);
        let sum = !plain_sum(&frame[l3..l3 + 20]);
        frame[l3 + 10..l3 + 12].copy_from_slice(&sum.to_be_bytes());
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(4000))]

    #[test]
    fn almost_right_packets_are_taken_as_the_twin_takes_them(
        plain in plain(),
        spec in spec(),
        changes in proptest::collection::vec((0usize..110, any::<u8>(), any::<bool>()), 0..4),
        length in prop_oneof![3 => Just(None), 1 => (0usize..200).prop_map(Some)],
        padding in prop_oneof![3 => Just(0usize), 1 => 1usize..30],
        repaired in any::<bool>(),
        (gbp, df) in any::<(bool, bool)>(),
        head in prop_oneof![Just(256usize), Just(255), Just(1024)],
        id in any::<u16>(),
        looked_at in prop_oneof![Just([0; WINDOW_WORDS]), any::<[u64; WINDOW_WORDS]>()],
    ) {
        let inner = plain.frame(false);
        let mut frame = encapsulated(&spec, &inner, plain.tos, plain.ttl, id, 40000);
        let first = frame.clone();
        let l3 = if spec.link.vlan.is_some() { 18 } else { 14 };
        for (at, value, flip) in changes {
            if let Some(byte) = frame.get_mut(at) {
                *byte = if flip { *byte ^ 1 << (value & 7) } else { value };
            }
        }
        let l4 = l3 + if spec.dst.is_ipv6() { 40 } else { 20 };
        let udp = spec.encapsulation.kind() != Kind::Gre;
        if repaired && (frame[l3 - 2] == 8) == spec.dst.is_ipv4() && frame.len() >= l4 + 8 {
            repair(&mut frame, l3, udp, spec.checksum);
        }
        frame.extend(vec![0; padding]);
        frame.truncate(length.unwrap_or(usize::MAX));
        let endpoint = Endpoint { gbp, df, ..endpoint(&spec) };
        let (found, twin) = (recognized(&frame, &endpoint, head), plain_recognize(&frame, &endpoint, head));
        prop_assert!(found == twin, "{frame:02x?}\n{found:02x?}\n{twin:02x?}");
        check_imprint([&first, &frame], &looked_at, &endpoint, head);
    }

    #[test]
    fn noise_is_no_tunnel(frame in proptest::collection::vec(any::<u8>(), 0..300), spec in spec()) {
        prop_assert_eq!(recognized(&frame, &endpoint(&spec), 256), None);
    }
}

#[test]
fn each_refusal_has_its_reason() {
    let spec = known::vxlan();
    let plain = Plain { v6: false, udp: true, tags: 0, tos: 2, ttl: 64, payload: vec![5; 40] };
    let good = encapsulated(&spec, &plain.frame(false), 2, 64, 1, 50000);
    let is_taken = |change: &dyn Fn(&mut Vec<u8>)| {
        let mut frame = good.clone();
        change(&mut frame);
        repair(&mut frame, 14, true, false);
        recognized(&frame, &endpoint(&spec), 256).is_some()
    };
    assert!(is_taken(&|_| ()));
    assert!(is_taken(&|frame| frame.extend([0; 7])), "padding");
    assert!(is_taken(&|frame| frame[15] |= 3), "congestion that the inner packet can say");
    type Change<'a> = &'a dyn Fn(&mut Vec<u8>);
    let refused: [(&str, Change<'_>); 14] = [
        ("another station's", &|frame| frame[5] = 9),
        ("another address", &|frame| frame[33] = 9),
        ("from ourselves", &|frame| frame[29] = 2),
        ("from a group", &|frame| frame[26] = 224),
        ("more fragments", &|frame| frame[20] |= 0x20),
        ("a later fragment", &|frame| frame[21] = 1),
        ("IP options", &|frame| frame[14] = 0x46),
        ("another port", &|frame| frame[37] = 0),
        ("UDP says less", &|frame| frame[39] -= 1),
        ("no VNI", &|frame| frame[42] = 0),
        ("a reserved bit", &|frame| frame[42] |= 1),
        ("a reserved byte", &|frame| frame[49] = 1),
        ("cut short", &|frame| frame.truncate(good.len() - 1)),
        ("congestion that the inner packet cannot say", &|frame| {
            frame[15] |= 3;
            frame[65] = 0;
        }),
    ];
    for (why, change) in refused {
        assert!(!is_taken(change), "{why}");
    }
    // A wrong checksum of the outer IP header, or of UDP.
    let mut frame = good.clone();
    frame[24] ^= 1;
    assert_eq!(recognized(&frame, &endpoint(&spec), 256), None);
    let mut frame = good.clone();
    frame[41] = 1;
    assert_eq!(recognized(&frame, &endpoint(&spec), 256), None);
    // What an offload has left to do inside would be lost, and what is several packets is not looked into.
    let mut packet = parsed(&good, &RawHeader::default());
    let mine = [endpoint(&spec)];
    assert!(recognize(&packet, &mine, |_| None).is_some());
    packet.offload = Offload { needs_csum: true, csum_start: 84, csum_offset: 6, ..Offload::default() };
    assert_eq!(recognize(&packet, &mine, |_| None), None);
    packet.offload.csum_start = 34;
    assert!(recognize(&packet, &mine, |_| None).is_some());
    packet.offload.gso = Gso::UdpL4;
    assert_eq!(recognize(&packet, &mine, |_| None), None);
}

#[test]
fn a_checksum_behind_the_head_must_be_known() {
    let spec = OuterSpec { checksum: true, ..known::vxlan() };
    let plain = Plain { v6: false, udp: true, tags: 0, tos: 0, ttl: 64, payload: vec![5; 1000] };
    let frame = encapsulated(&spec, &plain.frame(false), 0, 64, 1, 50000);
    let mine = [endpoint(&spec)];
    let packet = parsed(&frame, &RawHeader::default());
    assert_eq!(recognize(&packet, &mine, |_| None), None);
    let verified = parsed(&frame, &RawHeader { flags: offload::F_DATA_VALID, ..RawHeader::default() });
    assert!(recognize(&verified, &mine, |_| panic!("it was verified")).is_some());
}
