//! A frame made from a key: what `trace` sends when a packet is given as a flow.

use crate::checksum;
use crate::key::{
    ETH_P_802_2, ETH_P_ARP, ETH_P_IP, ETH_P_IPV6, ETH_P_MPLS_MC, ETH_P_MPLS_UC, ETH_P_RARP, FRAG_FIRST,
    FRAG_LATER, Field, Key, VLAN_PRESENT, ipproto,
};

/// TTL of a packet whose key does not say one.
const DEFAULT_TTL: u8 = 64;

/// The smallest frame that has this key, with valid lengths and checksums. A TTL of 0 becomes 64, which is what is meant
/// by a flow that does not name one; other fields are as the key has them, 0 where it says nothing.
pub fn compose(key: &Key) -> Vec<u8> {
    let get = |field: Field| key.get(field) as u64;
    let mut frame = Vec::with_capacity(128);
    frame.extend_from_slice(&get(Field::EthDst).to_be_bytes()[2..]);
    frame.extend_from_slice(&get(Field::EthSrc).to_be_bytes()[2..]);
    for (tpid, tci) in [(Field::VlanTpid, Field::VlanTci), (Field::CvlanTpid, Field::CvlanTci)] {
        let tci = get(tci) as u16;
        if tci & VLAN_PRESENT != 0 {
            frame.extend_from_slice(&(get(tpid) as u16).to_be_bytes());
            frame.extend_from_slice(&(tci & !VLAN_PRESENT).to_be_bytes());
        }
    }
    let payload = match key.eth_type() {
        ETH_P_IP => ipv4(key),
        ETH_P_IPV6 => ipv6(key),
        ETH_P_ARP | ETH_P_RARP => arp(key),
        ETH_P_MPLS_UC | ETH_P_MPLS_MC => mpls(key),
        _ => Vec::new(),
    };
    match key.eth_type() {
        // An LLC header that is not SNAP's: unnumbered information to the null SAP.
        ETH_P_802_2 => frame.extend_from_slice(&[0, 3, 0, 0, 3]),
        eth_type => frame.extend_from_slice(&eth_type.to_be_bytes()),
    }
    frame.extend_from_slice(&payload);
    frame
}

fn ttl(key: &Key) -> u8 {
    match key.get(Field::IpTtl) as u8 {
        0 => DEFAULT_TTL,
        ttl => ttl,
    }
}

fn ipv4(key: &Key) -> Vec<u8> {
    let fragment: u16 = match key.ip_frag() {
        FRAG_FIRST => 0x2000,
        FRAG_LATER => 1,
        _ => 0,
    };
    let src = key.get(Field::Ipv4Src) as u32;
    let dst = key.get(Field::Ipv4Dst) as u32;
    let transport = transport(key, |proto, len| checksum::pseudo_v4(src, dst, proto, len));
    let mut packet = vec![0x45, key.get(Field::IpTos) as u8];
    packet.extend_from_slice(&(20 + transport.len() as u16).to_be_bytes());
    packet.extend_from_slice(&[0, 0]);
    packet.extend_from_slice(&fragment.to_be_bytes());
    packet.extend_from_slice(&[ttl(key), key.ip_proto(), 0, 0]);
    packet.extend_from_slice(&src.to_be_bytes());
    packet.extend_from_slice(&dst.to_be_bytes());
    let sum = checksum::checksum(&packet);
    packet[10..12].copy_from_slice(&sum.to_be_bytes());
    packet.extend_from_slice(&transport);
    packet
}

fn ipv6(key: &Key) -> Vec<u8> {
    let src = key.get(Field::Ipv6Src).to_be_bytes();
    let dst = key.get(Field::Ipv6Dst).to_be_bytes();
    let mut transport = transport(key, |proto, len| checksum::pseudo_v6(&src, &dst, proto, len));
    let mut next = key.ip_proto();
    if key.ip_frag() != 0 {
        let offset: u16 = if key.ip_frag() == FRAG_LATER { 8 } else { 1 };
        let mut header = vec![next, 0];
        header.extend_from_slice(&offset.to_be_bytes());
        header.extend_from_slice(&[0; 4]);
        header.append(&mut transport);
        transport = header;
        next = 44;
    }
    let first = 6 << 28 | (key.get(Field::IpTos) as u32) << 20 | key.get(Field::Ipv6Label) as u32 & 0xf_ffff;
    let mut packet = first.to_be_bytes().to_vec();
    packet.extend_from_slice(&(transport.len() as u16).to_be_bytes());
    packet.extend_from_slice(&[next, ttl(key)]);
    packet.extend_from_slice(&src);
    packet.extend_from_slice(&dst);
    packet.extend_from_slice(&transport);
    packet
}

/// The transport header; `pseudo` gives the sum of the pseudo-header for a protocol and length.
fn transport(key: &Key, pseudo: impl Fn(u8, u32) -> u64) -> Vec<u8> {
    if key.ip_frag() == FRAG_LATER {
        return vec![0; 8];
    }
    let proto = key.ip_proto();
    let (src, dst) = (key.get(Field::TpSrc) as u16, key.get(Field::TpDst) as u16);
    let mut ports = src.to_be_bytes().to_vec();
    ports.extend_from_slice(&dst.to_be_bytes());
    let (mut header, check) = match (key.eth_type(), proto) {
        (_, ipproto::TCP) => {
            let flags = 5 << 12 | key.get(Field::TcpFlags) as u16 & 0xfff;
            let mut header = ports;
            header.extend_from_slice(&[0; 8]);
            header.extend_from_slice(&flags.to_be_bytes());
            header.extend_from_slice(&[0xff, 0xff, 0, 0, 0, 0]);
            (header, 16)
        }
        (_, ipproto::UDP) => {
            let mut header = ports;
            header.extend_from_slice(&[0, 8, 0, 0]);
            (header, 6)
        }
        (_, ipproto::SCTP) => {
            let mut header = ports;
            header.extend_from_slice(&[0; 8]);
            let sum = crate::crc32c::crc32c(&header);
            header[8..12].copy_from_slice(&sum.to_le_bytes());
            return header;
        }
        (ETH_P_IP, ipproto::ICMP) => {
            let mut header = vec![src as u8, dst as u8, 0, 0, 0, 0, 0, 0];
            let sum = checksum::checksum(&header);
            header[2..4].copy_from_slice(&sum.to_be_bytes());
            return header;
        }
        (ETH_P_IPV6, ipproto::ICMPV6) => {
            let mut header = vec![src as u8, dst as u8, 0, 0, 0, 0, 0, 0];
            if matches!(src, 135 | 136) {
                header.extend_from_slice(&key.get(Field::NdTarget).to_be_bytes());
                for (kind, field) in [(1, Field::ArpSha), (2, Field::ArpTha)] {
                    let mac = key.get(field) as u64;
                    if mac != 0 {
                        header.extend_from_slice(&[kind, 1]);
                        header.extend_from_slice(&mac.to_be_bytes()[2..]);
                    }
                }
            }
            (header, 2)
        }
        _ => return Vec::new(),
    };
    let sum = !checksum::fold(checksum::add(pseudo(proto, header.len() as u32), &header));
    // Over UDP a sum of zero says that there is none (RFC 768).
    let sum = if sum == 0 && proto == ipproto::UDP { 0xffff } else { sum };
    header[check..check + 2].copy_from_slice(&sum.to_be_bytes());
    header
}

fn arp(key: &Key) -> Vec<u8> {
    let mut packet = vec![0, 1, 8, 0, 6, 4, 0, key.ip_proto()];
    packet.extend_from_slice(&(key.get(Field::ArpSha) as u64).to_be_bytes()[2..]);
    packet.extend_from_slice(&(key.get(Field::Ipv4Src) as u32).to_be_bytes());
    packet.extend_from_slice(&(key.get(Field::ArpTha) as u64).to_be_bytes()[2..]);
    packet.extend_from_slice(&(key.get(Field::Ipv4Dst) as u32).to_be_bytes());
    packet
}

fn mpls(key: &Key) -> Vec<u8> {
    /// Bottom-of-stack bit.
    const BOTTOM: u32 = 0x100;
    let count = (key.get(Field::MplsCount) as usize).clamp(1, 3);
    let mut packet = Vec::new();
    for (i, field) in [Field::Mpls0, Field::Mpls1, Field::Mpls2].into_iter().enumerate().take(count) {
        let lse = key.get(field) as u32;
        let lse = if i + 1 == count { lse | BOTTOM } else { lse & !BOTTOM };
        packet.extend_from_slice(&lse.to_be_bytes());
    }
    packet
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::key::{ETH_P_8021Q, Mask};
    use crate::packet::{Packet, PortId};
    use crate::parse::{Extracted, extract};

    fn key(fields: &[(Field, u128)]) -> Key {
        let mut key = Key::default();
        fields.iter().for_each(|&(field, value)| key.set(field, value));
        key
    }

    #[test]
    fn the_parser_finds_what_was_asked_for() {
        let macs = [(Field::EthDst, 0x0200_0000_0002), (Field::EthSrc, 0x0200_0000_0001)];
        let ip =
            [(Field::EthType, ETH_P_IP as u128), (Field::Ipv4Src, 0x0a000001), (Field::Ipv4Dst, 0x0a000002)];
        let v6 = [
            (Field::EthType, ETH_P_IPV6 as u128),
            (Field::Ipv6Src, 1 << 100 | 1),
            (Field::Ipv6Dst, 1 << 100 | 2),
        ];
        let ports = [(Field::TpSrc, 1234), (Field::TpDst, 80)];
        let vlan = [
            (Field::VlanTpid, ETH_P_8021Q as u128),
            (Field::VlanTci, 0x700a | VLAN_PRESENT as u128),
            (Field::CvlanTpid, ETH_P_8021Q as u128),
            (Field::CvlanTci, 0x14 | VLAN_PRESENT as u128),
        ];
        let proto = |p: u8| [(Field::IpProto, p as u128), (Field::IpTtl, 64)];
        let cases: Vec<Vec<(Field, u128)>> = vec![
            [&ip[..], &proto(ipproto::TCP), &ports, &[(Field::TcpFlags, 0x12), (Field::IpTos, 0x48)]]
                .concat(),
            [&ip[..], &proto(ipproto::UDP), &ports, &vlan].concat(),
            [&ip[..], &proto(ipproto::SCTP), &ports].concat(),
            [&ip[..], &proto(ipproto::ICMP), &[(Field::TpSrc, 8)]].concat(),
            [&ip[..], &proto(ipproto::UDP), &[(Field::IpFrag, FRAG_LATER as u128)]].concat(),
            [&ip[..], &proto(ipproto::UDP), &ports, &[(Field::IpFrag, FRAG_FIRST as u128)]].concat(),
            [&v6[..], &proto(ipproto::TCP), &ports, &[(Field::Ipv6Label, 0x12345)]].concat(),
            [&v6[..], &proto(ipproto::UDP), &ports, &[(Field::IpFrag, FRAG_FIRST as u128)]].concat(),
            [
                &v6[..],
                &proto(ipproto::ICMPV6),
                &[(Field::TpSrc, 135), (Field::NdTarget, 77), (Field::ArpSha, 0x0200_0000_0001)],
            ]
            .concat(),
            vec![
                (Field::EthType, ETH_P_ARP as u128),
                (Field::IpProto, 1),
                (Field::Ipv4Src, 7),
                (Field::Ipv4Dst, 9),
                (Field::ArpSha, 0x0200_0000_0001),
            ],
            vec![(Field::EthType, ETH_P_802_2 as u128)],
            vec![(Field::EthType, 0x1234)],
        ];
        for fields in cases {
            let key = key(&[&macs[..], &fields].concat());
            let frame = compose(&key);
            let mut packet = Packet::from_frame(PortId { slot: 0, generation: 1 }, &frame);
            let mut found = Key::default();
            assert_eq!(extract(&mut packet, &mut found), Extracted::Done);
            found.set(Field::Shape, 0);
            assert_eq!(found, key, "{frame:02x?}");
        }
    }

    #[test]
    fn any_key_gives_some_frame() {
        for &field in Field::ALL {
            for eth_type in [ETH_P_IP, ETH_P_IPV6, ETH_P_ARP, ETH_P_MPLS_UC, 0] {
                for proto in [0, 1, 6, 17, 58, 132, 255] {
                    let mut mask = Mask::EMPTY;
                    mask.set_exact(field);
                    let mut key = mask.0;
                    key.set(Field::EthType, eth_type as u128);
                    key.set(Field::IpProto, proto);
                    assert!(compose(&key).len() >= 14);
                }
            }
        }
    }
}
