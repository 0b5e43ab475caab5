//! Tunnels against plain twins, which build and read whole frames byte by byte, and against frames that are known.

use super::*;
use crate::action::GeneveOpt;
use crate::key::{ETH_P_IP, ETH_P_IPV6, Field, Key, TUN_CSUM, TUN_DF, TUN_KEY};
use crate::offload::{self, RawHeader};
use crate::packet::{Gso, Offload, Packet, PortId};
use crate::parse::{Extracted, extract};
use proptest::prelude::*;
use std::net::IpAddr;

mod hostile;
mod known;
mod plans;

const WIRE: PortId = PortId { slot: 1, generation: 1 };
const LOGICAL: PortId = PortId { slot: 2, generation: 1 };
const LINK: Link = Link { dst: [2, 0, 0, 0, 0, 2], src: [2, 0, 0, 0, 0, 1], vlan: None };

fn plain_sum(bytes: &[u8]) -> u16 {
    let words = bytes.chunks(2).map(|pair| (pair[0] as u32) << 8 | *pair.get(1).unwrap_or(&0) as u32);
    let sum = words.fold(0, |sum, word| (sum + word) % 0xffff) as u16;
    if sum == 0 { 0xffff } else { sum }
}

/// Addresses, protocol and length, as every checksum with a pseudo-header begins.
fn pseudo(src: IpAddr, dst: IpAddr, proto: u8, len: usize) -> Vec<u8> {
    let octets = |address: IpAddr| match address {
        IpAddr::V4(address) => address.octets().to_vec(),
        IpAddr::V6(address) => address.octets().to_vec(),
    };
    [octets(src), octets(dst), vec![0, proto], (len as u32).to_be_bytes().to_vec()].concat()
}

/// An IP header in front of a payload: protocol, TOS and TTL.
fn ip(
    (src, dst): (IpAddr, IpAddr),
    (proto, tos, ttl): (u8, u8, u8),
    id: u16,
    df: bool,
    payload: &[u8],
) -> Vec<u8> {
    let mut bytes = Vec::new();
    match (src, dst) {
        (IpAddr::V4(src), IpAddr::V4(dst)) => {
            bytes.extend([0x45, tos]);
            bytes.extend((20 + payload.len() as u16).to_be_bytes());
            bytes.extend(id.to_be_bytes());
            bytes.extend([if df { 0x40 } else { 0 }, 0, ttl, proto, 0, 0]);
            bytes.extend(src.octets());
            bytes.extend(dst.octets());
            let sum = !plain_sum(&bytes);
            bytes[10..12].copy_from_slice(&sum.to_be_bytes());
        }
        (IpAddr::V6(src), IpAddr::V6(dst)) => {
            bytes.extend((6 << 28 | (tos as u32) << 20).to_be_bytes());
            bytes.extend((payload.len() as u16).to_be_bytes());
            bytes.extend([proto, ttl]);
            bytes.extend(src.octets());
            bytes.extend(dst.octets());
        }
        _ => panic!("families"),
    }
    bytes.extend(payload);
    bytes
}

/// A packet for the inside of a tunnel.
#[derive(Clone, Debug)]
struct Plain {
    v6: bool,
    udp: bool,
    tags: usize,
    tos: u8,
    ttl: u8,
    payload: Vec<u8>,
}

impl Plain {
    fn addresses(&self) -> (IpAddr, IpAddr) {
        match self.v6 {
            true => ("fd00::1".parse().unwrap(), "fd00::2".parse().unwrap()),
            false => ("10.0.0.1".parse().unwrap(), "10.0.0.2".parse().unwrap()),
        }
    }

    /// The frame; `partial` leaves the sum of the pseudo-header in the transport checksum.
    fn frame(&self, partial: bool) -> Vec<u8> {
        let (src, dst) = self.addresses();
        let mut l4 = vec![0x12, 0x34, 0, 80];
        let (proto, field) = if self.udp { (17, 6) } else { (6, 16) };
        match self.udp {
            true => l4.extend([(8 + self.payload.len() as u16).to_be_bytes(), [0; 2]].concat()),
            false => l4.extend([0, 0, 0, 1, 0, 0, 0, 2, 0x50, 0x10, 0x20, 0, 0, 0, 0, 0]),
        }
        l4.extend(&self.payload);
        let pseudo = pseudo(src, dst, proto, l4.len());
        let sum = match partial {
            true => plain_sum(&pseudo),
            false => !plain_sum(&[&pseudo[..], &l4].concat()),
        };
        let sum = if sum == 0 { 0xffff } else { sum };
        l4[field..field + 2].copy_from_slice(&sum.to_be_bytes());
        let mut frame = vec![0x52, 0x54, 0, 0, 0, 2, 0x52, 0x54, 0, 0, 0, 1];
        (0..self.tags).for_each(|tag| frame.extend([0x81, 0, 0, tag as u8]));
        frame.extend(if self.v6 { ETH_P_IPV6 } else { ETH_P_IP }.to_be_bytes());
        frame.extend(ip((src, dst), (proto, self.tos, self.ttl), 7, true, &l4));
        frame
    }

    fn header(&self, gso_size: u16) -> RawHeader {
        let l4 = 14 + 4 * self.tags as u16 + if self.v6 { 40 } else { 20 };
        RawHeader {
            flags: offload::F_NEEDS_CSUM,
            gso_type: match (gso_size, self.udp, self.v6) {
                (0, ..) => offload::GSO_NONE,
                (_, true, _) => offload::GSO_UDP_L4,
                (_, false, false) => offload::GSO_TCPV4,
                (_, false, true) => offload::GSO_TCPV6,
            },
            hdr_len: 0,
            gso_size,
            csum_start: l4,
            csum_offset: if self.udp { 6 } else { 16 },
        }
    }
}

/// A parsed packet of which as much is in the head as the switch takes.
fn parsed(frame: &[u8], header: &RawHeader) -> Packet {
    let mut packet = Packet::default();
    let head = packet.reset(WIRE, frame.len() as u32, crate::packet::SNAPSHOT);
    let n = head.len();
    head.copy_from_slice(&frame[..n]);
    let mut key = Key::default();
    assert_eq!(extract(&mut packet, &mut key), Extracted::Done);
    packet.offload = offload::check(header, &packet, &key).unwrap();
    packet
}

/// Head and tail together.
fn whole(packet: &Packet, frame: &[u8]) -> Vec<u8> {
    [packet.head(), &frame[frame.len() - packet.tail_len() as usize..]].concat()
}

/// What a header is around an inner frame that is complete.
fn encapsulated(spec: &OuterSpec, inner: &[u8], tos: u8, ttl: u8, id: u16, port: u16) -> Vec<u8> {
    let origin = |origin: Origin, inner: u8| match origin {
        Origin::Set(value) | Origin::Exact(value) => value,
        Origin::Inner => inner,
    };
    let mut tunnel = Vec::new();
    let mut dst = None;
    match &spec.encapsulation {
        Encapsulation::Vxlan { vni, gbp, ports } => {
            dst = Some(ports.dst);
            tunnel.extend(match gbp {
                Some(gbp) => [0x88, gbp.flags, (gbp.id >> 8) as u8, gbp.id as u8],
                None => [8, 0, 0, 0],
            });
            tunnel.extend([(vni >> 16) as u8, (vni >> 8) as u8, *vni as u8, 0]);
        }
        Encapsulation::Geneve { vni, oam, options, ports } => {
            dst = Some(ports.dst);
            let critical = options.get(2).is_some_and(|kind| kind & 0x80 != 0);
            tunnel.extend([(options.len() / 4) as u8, (*oam as u8) << 7 | (critical as u8) << 6, 0x65, 0x58]);
            tunnel.extend([(vni >> 16) as u8, (vni >> 8) as u8, *vni as u8, 0]);
            tunnel.extend(options);
        }
        Encapsulation::Gre { key } => {
            tunnel.extend([(spec.checksum as u8) << 7 | (key.is_some() as u8) << 5, 0, 0x65, 0x58]);
            if spec.checksum {
                tunnel.extend([0; 4]);
            }
            key.iter().for_each(|key| tunnel.extend(key.to_be_bytes()));
        }
    }
    tunnel.extend(inner);
    let proto = if dst.is_some() { 17 } else { 47 };
    if let Some(dst) = dst {
        let len = (8 + tunnel.len() as u16).to_be_bytes();
        tunnel = [&port.to_be_bytes()[..], &dst.to_be_bytes(), &len, &[0; 2], &tunnel].concat();
        if spec.checksum {
            let pseudo = pseudo(spec.src, spec.dst, proto, tunnel.len());
            let sum = !plain_sum(&[&pseudo[..], &tunnel].concat());
            tunnel[6..8].copy_from_slice(&if sum == 0 { 0xffff } else { sum }.to_be_bytes());
        }
    } else if spec.checksum {
        let sum = !plain_sum(&tunnel);
        tunnel[4..6].copy_from_slice(&if sum == 0 { 0xffff } else { sum }.to_be_bytes());
    }
    let mark = if tos & 3 == 3 { 2 } else { tos & 3 };
    let outer_tos = match spec.tos {
        Origin::Exact(tos) => tos,
        spec => origin(spec, tos) & 0xfc | mark,
    };
    let mut frame = [spec.link.dst, spec.link.src].concat();
    if let Some((tpid, tci)) = spec.link.vlan {
        frame.extend([tpid.to_be_bytes(), tci.to_be_bytes()].concat());
    }
    frame.extend(if spec.dst.is_ipv6() { ETH_P_IPV6 } else { ETH_P_IP }.to_be_bytes());
    frame.extend(ip((spec.src, spec.dst), (proto, outer_tos, origin(spec.ttl, ttl)), id, spec.df, &tunnel));
    frame
}

fn plain() -> impl Strategy<Value = Plain> {
    let fields =
        (any::<bool>(), any::<bool>(), 0usize..3, any::<u8>(), any::<u8>(), 0usize..1500, any::<u8>());
    fields.prop_map(|(v6, udp, tags, tos, ttl, len, seed)| {
        let payload = (0..len).map(|i| (i as u8).wrapping_mul(29) ^ (i >> 8) as u8 ^ seed).collect();
        Plain { v6, udp, tags, tos, ttl, payload }
    })
}

fn origin() -> impl Strategy<Value = Origin> {
    prop_oneof![any::<u8>().prop_map(Origin::Set), any::<u8>().prop_map(Origin::Exact), Just(Origin::Inner)]
}

fn encapsulation() -> impl Strategy<Value = Encapsulation> {
    let ports = |dst| UdpPorts { src: 32768..=60999, dst };
    let option = || {
        any::<(u32, bool)>().prop_map(|(value, ovn)| GeneveOpt {
            class: (if ovn { 0x102 } else { 0x7777 }, 0xffff),
            kind: (if ovn { 0x80 } else { 0x11 }, 0xff),
            value: value.to_be_bytes().into(),
            mask: vec![0xff; 4],
        })
    };
    let options = proptest::collection::vec(option(), 0..2).prop_map(|list| write_options(&list).unwrap());
    let gbp =
        proptest::option::of(any::<(u16, u8)>().prop_map(|(id, flags)| Gbp { id, flags: flags & 0x48 }));
    prop_oneof![
        (0u32..1 << 24, gbp).prop_map(move |(vni, gbp)| Encapsulation::Vxlan {
            vni,
            gbp,
            ports: ports(4789)
        }),
        (0u32..1 << 24, options).prop_map(move |(vni, options)| Encapsulation::Geneve {
            vni,
            oam: false,
            options,
            ports: ports(6081)
        }),
        proptest::option::of(any::<u32>()).prop_map(|key| Encapsulation::Gre { key }),
    ]
}

fn spec() -> impl Strategy<Value = OuterSpec> {
    let vlan = proptest::option::of((0u16..4096).prop_map(|vid| (0x8100, vid | 0x2000)));
    let flags = (any::<bool>(), any::<bool>(), any::<bool>());
    (encapsulation(), origin(), origin(), vlan, flags).prop_map(
        |(encapsulation, tos, ttl, vlan, (v6, df, checksum))| {
            let (src, dst) = if v6 { ("2001:db8::1", "2001:db8::2") } else { ("192.0.2.1", "192.0.2.2") };
            let (src, dst) = (src.parse().unwrap(), dst.parse().unwrap());
            OuterSpec {
                link: Link { vlan, ..LINK },
                src,
                dst,
                tos,
                ttl,
                df: df && !v6,
                checksum,
                encapsulation,
            }
        },
    )
}

/// The endpoint that gets what `spec` sends.
fn endpoint(spec: &OuterSpec) -> Endpoint {
    let port = match &spec.encapsulation {
        Encapsulation::Vxlan { ports, .. } | Encapsulation::Geneve { ports, .. } => ports.dst,
        Encapsulation::Gre { .. } => 0,
    };
    Endpoint {
        mac: Some(spec.link.dst),
        vlan: spec.link.vlan.map_or(Vlan::Untagged, |(_, tci)| Vlan::Id(tci & 0xfff)),
        local: Some(spec.dst),
        kind: spec.encapsulation.kind(),
        port,
        gbp: true,
        df: true,
        as_linux: true,
        in_port: LOGICAL,
    }
}

/// What the receiver's flows see of it.
fn tunnel_key(spec: &OuterSpec, frame: &[u8]) -> TunnelKey {
    let at = if spec.link.vlan.is_some() { 18 } else { 14 };
    let (tos, ttl, l4) = match spec.dst.is_ipv6() {
        true => (frame[at] << 4 | frame[at + 1] >> 4, frame[at + 7], at + 40),
        false => (frame[at + 1], frame[at + 8], at + 20),
    };
    let sent = u16::from_be_bytes([frame[l4], frame[l4 + 1]]);
    let (id, keyed, ports, gbp, options) = match &spec.encapsulation {
        Encapsulation::Vxlan { vni, gbp, ports } => {
            (*vni as u64, true, (sent, ports.dst), gbp.unwrap_or_default(), &[][..])
        }
        Encapsulation::Geneve { vni, options, ports, .. } => {
            (*vni as u64, true, (sent, ports.dst), Gbp::default(), &options[..])
        }
        Encapsulation::Gre { key } => {
            (key.unwrap_or(0) as u64, key.is_some(), (0, 0), Gbp::default(), &[][..])
        }
    };
    let mut word = [0; 8];
    word[..options.len()].copy_from_slice(options);
    let flag = |flag, is: bool| if is { flag } else { 0 };
    TunnelKey {
        id,
        src: spec.src,
        dst: spec.dst,
        tos,
        ttl,
        ports,
        flags: flag(TUN_KEY, keyed) | flag(TUN_CSUM, spec.checksum) | flag(TUN_DF, spec.df),
        gbp,
        options: u64::from_be_bytes(word),
    }
}

/// What was left to be done for a packet.
#[derive(Clone, Copy, Debug)]
enum Left {
    Nothing,
    Checksum,
    Verified,
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(600))]

    /// The short way comes to the same as the long one, also around a packet that has headers pushed before it already.
    #[test]
    fn a_header_is_laid_around_as_the_long_way_has_it(
        v6 in prop_oneof![4 => Just(false), 1 => Just(true)],
        tags in prop_oneof![3 => Just(0usize), 2 => Just(1)],
        udp in any::<bool>(),
        (tos, ttl, len) in (any::<u8>(), any::<u8>(), 0usize..300),
        changes in proptest::collection::vec((12usize..38, any::<u8>()), 0..3),
        specs in proptest::collection::vec((spec(), any::<u16>()), 1..3),
        before in proptest::collection::vec(any::<u8>(), 0..80),
    ) {
        let plain = Plain { v6, udp, tags, tos, ttl, payload: vec![7; len] };
        let mut short = parsed(&plain.frame(false), &RawHeader::default());
        // Of a packet that was edited since it was parsed, anything may be true.
        for (at, byte) in changes {
            short.head_mut()[at] = byte;
        }
        if short.insert(0, before.len()).is_ok() {
            short.head_mut()[..before.len()].copy_from_slice(&before);
            short.remove(0, before.len()).unwrap();
        }
        let mut long = short.clone();
        for (mut spec, id) in specs {
            spec.checksum &= v6;
            let outer = Outer::new(&spec).unwrap();
            let outcome = outer.push(&mut short, id);
            prop_assert_eq!(outer.push_long(&mut long, id), outcome);
            prop_assert_eq!(short.head(), long.head());
            prop_assert_eq!((short.len, short.layout, short.offload), (long.len, long.layout, long.offload));
        }
    }

    /// What is laid around a packet, once all that was left to do is done, is what the plain twin builds; and it is found again.
    #[test]
    fn a_packet_goes_in_and_comes_out(
        plain in plain(),
        mut spec in spec(),
        left in prop_oneof![Just(Left::Nothing), Just(Left::Checksum), Just(Left::Verified)],
        id in any::<u16>(),
    ) {
        if let Origin::Exact(tos) = &mut spec.tos {
            // Congestion that is met on the way is taken over.
            *tos &= 0xfc;
        }
        let (complete, partial) = (plain.frame(false), plain.frame(true));
        let (frame, header) = match left {
            Left::Nothing => (&complete, RawHeader::default()),
            Left::Verified => (&complete, RawHeader { flags: offload::F_DATA_VALID, ..RawHeader::default() }),
            Left::Checksum => (&partial, plain.header(0)),
        };
        let outer = Outer::new(&spec).unwrap();
        let mut packet = parsed(frame, &header);
        outer.push(&mut packet, id).unwrap();
        prop_assert_eq!(packet.len as usize, frame.len() + outer.header_len());
        let mut sent = whole(&packet, frame);
        // Where the inner checksum is known nothing is left to do for the outer one.
        let l4 = packet.offload.csum_start as usize;
        match left {
            Left::Checksum => prop_assert!(packet.offload.needs_csum && l4 > outer.header_len()),
            Left::Verified => prop_assert!(!packet.offload.needs_csum),
            Left::Nothing => prop_assert!(packet.offload.needs_csum == spec.checksum && l4 < outer.header_len()),
        }
        offload::finish_checksum(&mut sent, &packet.offload).unwrap();
        let key = tunnel_key(&spec, &sent);
        let expected = encapsulated(&spec, &complete, plain.tos, plain.ttl, id, key.ports.0);
        prop_assert!(sent == expected, "\n{sent:02x?}\n{expected:02x?}");
        if key.ports.1 != 0 {
            prop_assert!((32768..=60999).contains(&key.ports.0));
        }
        // The layout is that which the parser finds.
        let received = parsed(&sent, &RawHeader::default());
        prop_assert_eq!(received.layout, packet.layout);

        let mut received = received;
        let tail = &sent[received.head().len()..];
        let before = sent.len() - tail.len();
        let sum = |end: u32| Some(crate::checksum::fold(crate::checksum::add(0, &tail[..end as usize - before])));
        let found = recognize(&received, &[endpoint(&spec)], sum).expect("it is for us");
        prop_assert_eq!(found.tunnel, key);
        found.pop(&mut received);
        prop_assert_eq!(received.in_port, LOGICAL);
        prop_assert!(whole(&received, &sent) == complete);
    }

    /// Cut after a header was laid around it, a packet becomes what its segments become when each gets the header.
    #[test]
    fn segments_get_the_header_each(
        plain in plain(),
        spec in spec(),
        size in 8u16..1400,
        more in 1usize..20_000,
        id in any::<u16>(),
    ) {
        let size = size.max(8);
        let len = (size as usize + more).min(size as usize * 100);
        let plain = Plain { payload: (0..len).map(|i| (i * 7 + (i >> 8)) as u8).collect(), ..plain };
        let frame = plain.frame(true);
        let mut packet = parsed(&frame, &plain.header(size));
        prop_assert!(packet.offload.gso != Gso::None);
        let mut buffer = vec![0; 70_000];
        let mut inner = Vec::new();
        crate::segment::segment(&frame, &packet.layout, &packet.offload, &mut buffer, |s| inner.push(s.to_vec())).unwrap();

        Outer::new(&spec).unwrap().push(&mut packet, id).unwrap();
        let sent = whole(&packet, &frame);
        prop_assert_eq!(crate::segment::count(sent.len(), &packet.layout, &packet.offload), inner.len());
        let port = tunnel_key(&spec, &sent).ports.0;
        let mut segments = Vec::new();
        crate::segment::segment(&sent, &packet.layout, &packet.offload, &mut buffer, |s| segments.push(s.to_vec())).unwrap();
        prop_assert_eq!(segments.len(), inner.len());
        for (i, (segment, inner)) in segments.iter().zip(&inner).enumerate() {
            let expected = encapsulated(&spec, inner, plain.tos, plain.ttl, id.wrapping_add(i as u16), port);
            prop_assert!(*segment == expected, "segment {i}\n{segment:02x?}\n{expected:02x?}");
        }
    }
}

#[test]
fn a_tag_may_still_be_pushed_before_it_is_cut() {
    let plain = Plain { v6: false, udp: false, tags: 0, tos: 0, ttl: 64, payload: vec![1; 3000] };
    let frame = plain.frame(true);
    let mut packet = parsed(&frame, &plain.header(1000));
    let spec = known::vxlan();
    Outer::new(&spec).unwrap().push(&mut packet, 0).unwrap();
    packet.insert(12, 4).unwrap();
    packet.head_mut()[12..16].copy_from_slice(&[0x81, 0, 0, 9]);
    let sent = whole(&packet, &frame);
    let mut lengths = Vec::new();
    let mut buffer = vec![0; 2000];
    let cut = crate::segment::segment(&sent, &packet.layout, &packet.offload, &mut buffer, |segment| {
        assert_eq!(segment[12..18], [0x81, 0, 0, 9, 8, 0]);
        lengths.push((segment.len(), u16::from_be_bytes([segment[20], segment[21]])));
    });
    assert_eq!(cut, Ok(3));
    // Two Ethernet headers, a tag, IP, UDP, VXLAN, IP, TCP.
    assert_eq!(lengths, [(14 + 4 + 50 - 14 + 14 + 40 + 1000, 1090); 3]);
}

#[test]
fn what_cannot_be_laid_around_changes_nothing() {
    let spec = known::vxlan();
    let outer = Outer::new(&spec).unwrap();
    let plain = Plain { v6: false, udp: false, tags: 0, tos: 0, ttl: 64, payload: vec![1; 65_000] };
    let frame = plain.frame(false);
    let long = Plain { payload: vec![1; 65_480], ..plain.clone() };
    let refused = |mut packet: Packet, why| {
        let before = packet.clone();
        assert_eq!(outer.push(&mut packet, 0), Err(why));
        assert_eq!(
            (packet.head(), packet.layout, packet.offload),
            (before.head(), before.layout, before.offload)
        );
    };
    refused(parsed(&long.frame(false), &RawHeader::default()), crate::drop::DropReason::Oversized);
    // In a tunnel already, and to be cut.
    let mut packet = parsed(&plain.frame(true), &plain.header(1000));
    outer.push(&mut packet, 0).unwrap();
    refused(packet, crate::drop::DropReason::TooDeep);
    // No room.
    let mut packet = parsed(&frame, &RawHeader::default());
    packet.insert(0, crate::packet::HEADROOM - outer.header_len() + 1).unwrap();
    refused(packet, crate::drop::DropReason::TooDeep);
    // A checksum that begins in the middle of a word, where the outer one is made from it.
    let mut packet = parsed(&frame, &RawHeader::default());
    packet.offload = Offload { needs_csum: true, csum_start: 34, csum_offset: 7, ..Offload::default() };
    let summed = Outer::new(&OuterSpec { checksum: true, ..known::vxlan() }).unwrap();
    assert_eq!(summed.push(&mut packet, 0), Err(crate::drop::DropReason::BadOffload));
    // One that is not to be cut goes into two.
    let small = Plain { payload: vec![1; 100], ..plain };
    let mut packet = parsed(&small.frame(true), &small.header(0));
    outer.push(&mut packet, 0).unwrap();
    outer.push(&mut packet, 0).unwrap();
    assert_eq!(
        packet.offload,
        Offload {
            csum_start: packet.offload.csum_start,
            ..parsed(&small.frame(true), &small.header(0)).offload
        }
    );
    assert_eq!(packet.offload.csum_start, 2 * 50 + 34);
}

#[test]
fn headers_that_cannot_be_are_refused() {
    let with = |change: &dyn Fn(&mut OuterSpec)| {
        let mut spec = known::vxlan();
        change(&mut spec);
        Outer::new(&spec).err()
    };
    let vxlan = |vni, gbp, src| Encapsulation::Vxlan { vni, gbp, ports: UdpPorts { src, dst: 4789 } };
    let geneve = |options: Vec<u8>| Encapsulation::Geneve {
        vni: 1,
        oam: false,
        options,
        ports: UdpPorts { src: 1..=2, dst: 6081 },
    };
    assert_eq!(with(&|spec| spec.dst = "::1".parse().unwrap()), Some(OuterError::Families));
    assert_eq!(with(&|spec| spec.encapsulation = vxlan(1 << 24, None, 1..=2)), Some(OuterError::Vni));
    assert_eq!(with(&|spec| spec.encapsulation = vxlan(1, None, 0..=2)), Some(OuterError::Ports));
    #[allow(clippy::reversed_empty_ranges)]
    let nobody = 2..=1;
    assert_eq!(with(&|spec| spec.encapsulation = vxlan(1, None, nobody.clone())), Some(OuterError::Ports));
    let gbp = Some(Gbp { id: 1, flags: 1 });
    assert_eq!(with(&|spec| spec.encapsulation = vxlan(1, gbp, 1..=2)), Some(OuterError::Options));
    assert_eq!(with(&|spec| spec.encapsulation = geneve(vec![0; 3])), Some(OuterError::Options));
    assert_eq!(with(&|spec| spec.encapsulation = geneve(vec![0, 0, 0, 1])), Some(OuterError::Options));
    assert_eq!(
        with(&|spec| spec.encapsulation = geneve([0, 0, 0, 0].repeat(20))),
        Some(OuterError::TooLong(130))
    );
    assert_eq!(with(&|spec| spec.link.vlan = Some((0x9100, 1))), Some(OuterError::Tpid(0x9100)));
    assert_eq!(with(&|_| ()), None);
}

#[test]
fn flows_are_spread_over_the_ports() {
    let ports = UdpPorts { src: 32768..=60999, dst: VXLAN_PORT };
    let encapsulation = Encapsulation::Vxlan { vni: 42, gbp: None, ports };
    let outer = Outer::new(&OuterSpec { encapsulation, ..known::vxlan() }).unwrap();
    let port_of = |last: u8| {
        let mut frame =
            Plain { v6: false, udp: true, tags: 0, tos: 0, ttl: 64, payload: vec![] }.frame(false);
        frame[34] = last;
        let mut packet = parsed(&frame, &RawHeader::default());
        outer.push(&mut packet, 0).unwrap();
        u16::from_be_bytes([packet.head()[34], packet.head()[35]])
    };
    let ports: std::collections::BTreeSet<u16> = (0..200).map(port_of).collect();
    assert!(ports.len() > 190, "{}", ports.len());
    assert_eq!(port_of(7), port_of(7));
}

#[test]
fn every_field_of_a_tunnel_is_written() {
    let mut key = Key::default();
    for &field in Field::ALL.iter().filter(|field| field.name().starts_with("tunnel.")) {
        key.set(field, u128::MAX);
    }
    let spec = known::vxlan();
    let tunnel = TunnelKey {
        id: 5,
        src: spec.src,
        dst: spec.dst,
        tos: 1,
        ttl: 2,
        ports: (3, 4),
        flags: TUN_KEY,
        gbp: Gbp { id: 6, flags: 8 },
        options: 9,
    };
    tunnel.write_to(&mut key);
    let given = [
        (Field::TunId, 5),
        (Field::TunIpv4Src, 0xc0000201),
        (Field::TunIpv4Dst, 0xc0000202),
        (Field::TunTos, 1),
        (Field::TunTtl, 2),
        (Field::TunTpSrc, 3),
        (Field::TunTpDst, 4),
        (Field::TunFlags, TUN_KEY as u128),
        (Field::TunGbpId, 6),
        (Field::TunGbpFlags, 8),
        (Field::TunOptions, 9),
    ];
    let mut expected = Key::default();
    given.iter().for_each(|&(field, value)| expected.set(field, value));
    assert_eq!(key, expected);
}
