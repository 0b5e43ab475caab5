//! The key attributes that are plain structs: where each field lies in them (`enum ovs_key_attr` and the structs behind
//! it, `linux/openvswitch.h`). Matches and `set` actions both go by it.

use switch_core::action::SetGroup;
use switch_core::key::{
    ETH_P_ARP, ETH_P_IP, ETH_P_IPV6, ETH_P_MPLS_MC, ETH_P_MPLS_UC, ETH_P_NSH, ETH_P_RARP, Field, Key, Mask,
    ipproto,
};

/// Numbers of `enum ovs_key_attr` that need more than a table.
pub mod kind {
    /// Attributes behind a VLAN tag.
    pub const ENCAP: u16 = 1;
    /// `u32` port number.
    pub const IN_PORT: u16 = 3;
    /// `struct ovs_key_ethernet`: there is a link header.
    pub const ETHERNET: u16 = 4;
    /// `be16` TCI.
    pub const VLAN: u16 = 5;
    /// `be16` ethertype, or TPID before a tag.
    pub const ETHERTYPE: u16 = 6;
    /// `struct ovs_key_nd`.
    pub const ND: u16 = 14;
    /// Nested `enum ovs_tunnel_key_attr`.
    pub const TUNNEL: u16 = 16;
    /// Array of `be32` label stack entries.
    pub const MPLS: u16 = 21;
    /// `struct ovs_key_ct_tuple_ipv4`, which ends in padding.
    pub const CT_TUPLE4: u16 = 26;
    /// `struct ovs_key_ct_tuple_ipv6`, which ends in padding.
    pub const CT_TUPLE6: u16 = 27;
    /// Nested `enum ovs_nsh_key_attr`.
    pub const NSH: u16 = 28;
    /// `be32` packet type, of userspace only.
    pub const PACKET_TYPE: u16 = 29;
}

/// Byte order of a field on the wire.
#[derive(Clone, Copy)]
enum Order {
    Network,
    Host,
}

/// A field in a struct.
pub struct Part {
    at: usize,
    length: usize,
    /// Where it lies in the key.
    pub field: Field,
    /// Bits that the header has; all of them together are an exact match of the field, which may be wider.
    bits: u32,
    order: Order,
}

/// An attribute that is a struct.
pub struct Layout {
    /// Its number.
    pub kind: u16,
    /// Its name in ODP text.
    pub name: &'static str,
    /// Its length, padding included.
    pub length: usize,
    /// Its fields, in the order of ODP text.
    pub parts: &'static [Part],
    /// What a packet needs to have them.
    pub needs: Needs,
    /// How a `set` action calls it, if one may.
    pub set: Option<SetGroup>,
}

/// The ethertypes (any if empty) and the protocol that a header comes with.
#[derive(Clone, Copy)]
pub struct Needs {
    /// One of these.
    pub ethertypes: &'static [u16],
    /// IP protocol.
    pub proto: Option<u8>,
}

/// A value that does not fit what the key holds: bits that no packet has.
#[derive(Debug)]
pub struct DoesNotFit;

const fn net(at: usize, length: usize, field: Field) -> Part {
    Part { at, length, field, bits: field.place().2, order: Order::Network }
}

const fn host(length: usize, field: Field) -> Part {
    Part { at: 0, length, field, bits: field.place().2, order: Order::Host }
}

/// With fewer bits in the header than in the key.
const fn narrow(part: Part, bits: u32) -> Part {
    Part { bits, ..part }
}

const fn needs(ethertypes: &'static [u16], proto: Option<u8>) -> Needs {
    Needs { ethertypes, proto }
}

const NOTHING: Needs = needs(&[], None);
const IP: &[u16] = &[ETH_P_IP, ETH_P_IPV6];
const V4: &[u16] = &[ETH_P_IP];
const V6: &[u16] = &[ETH_P_IPV6];

/// What MPLS label stack entries need.
pub const MPLS_NEEDS: Needs = needs(&[ETH_P_MPLS_UC, ETH_P_MPLS_MC], None);
/// What an NSH header needs.
pub const NSH_NEEDS: Needs = needs(&[ETH_P_NSH], None);

const PORTS: &[Part] = &[net(0, 2, Field::TpSrc), net(2, 2, Field::TpDst)];
const ICMP: &[Part] = &[narrow(net(0, 1, Field::TpSrc), 8), narrow(net(1, 1, Field::TpDst), 8)];

const fn layout(
    kind: u16,
    name: &'static str,
    length: usize,
    parts: &'static [Part],
    needs: Needs,
) -> Layout {
    Layout { kind, name, length, parts, needs, set: None }
}

const fn settable(layout: Layout, set: SetGroup) -> Layout {
    Layout { set: Some(set), ..layout }
}

static LAYOUTS: &[Layout] = &[
    settable(layout(2, "skb_priority", 4, &[host(4, Field::SkbPriority)], NOTHING), SetGroup::SkbPriority),
    settable(
        layout(kind::ETHERNET, "eth", 12, &[net(0, 6, Field::EthSrc), net(6, 6, Field::EthDst)], NOTHING),
        SetGroup::Eth,
    ),
    settable(
        layout(
            7,
            "ipv4",
            12,
            &[
                net(0, 4, Field::Ipv4Src),
                net(4, 4, Field::Ipv4Dst),
                net(8, 1, Field::IpProto),
                net(9, 1, Field::IpTos),
                net(10, 1, Field::IpTtl),
                net(11, 1, Field::IpFrag),
            ],
            needs(V4, None),
        ),
        SetGroup::Ipv4,
    ),
    settable(
        layout(
            8,
            "ipv6",
            40,
            &[
                net(0, 16, Field::Ipv6Src),
                net(16, 16, Field::Ipv6Dst),
                narrow(net(32, 4, Field::Ipv6Label), 20),
                net(36, 1, Field::IpProto),
                net(37, 1, Field::IpTos),
                net(38, 1, Field::IpTtl),
                net(39, 1, Field::IpFrag),
            ],
            needs(V6, None),
        ),
        SetGroup::Ipv6,
    ),
    settable(layout(9, "tcp", 4, PORTS, needs(IP, Some(ipproto::TCP))), SetGroup::Tcp),
    settable(layout(10, "udp", 4, PORTS, needs(IP, Some(ipproto::UDP))), SetGroup::Udp),
    settable(layout(11, "icmp", 2, ICMP, needs(V4, Some(ipproto::ICMP))), SetGroup::Icmp),
    settable(layout(12, "icmpv6", 2, ICMP, needs(V6, Some(ipproto::ICMPV6))), SetGroup::Icmpv6),
    settable(
        layout(
            13,
            "arp",
            24,
            &[
                net(0, 4, Field::Ipv4Src),
                net(4, 4, Field::Ipv4Dst),
                // 16 bits, of which the key holds the low 8.
                net(8, 2, Field::IpProto),
                net(10, 6, Field::ArpSha),
                net(16, 6, Field::ArpTha),
            ],
            needs(&[ETH_P_ARP, ETH_P_RARP], None),
        ),
        SetGroup::Arp,
    ),
    settable(
        layout(
            kind::ND,
            "nd",
            28,
            &[net(0, 16, Field::NdTarget), net(16, 6, Field::ArpSha), net(22, 6, Field::ArpTha)],
            needs(V6, Some(ipproto::ICMPV6)),
        ),
        SetGroup::Nd,
    ),
    settable(layout(15, "skb_mark", 4, &[host(4, Field::SkbMark)], NOTHING), SetGroup::SkbMark),
    settable(layout(17, "sctp", 4, PORTS, needs(IP, Some(ipproto::SCTP))), SetGroup::Sctp),
    layout(18, "tcp_flags", 2, &[narrow(net(0, 2, Field::TcpFlags), 12)], needs(IP, Some(ipproto::TCP))),
    layout(19, "dp_hash", 4, &[host(4, Field::DpHash)], NOTHING),
    layout(20, "recirc_id", 4, &[host(4, Field::RecircId)], NOTHING),
    // OVS_CS_F_*, of which there are 8.
    layout(22, "ct_state", 4, &[narrow(host(4, Field::CtState), 8)], NOTHING),
    layout(23, "ct_zone", 2, &[host(2, Field::CtZone)], NOTHING),
    layout(24, "ct_mark", 4, &[host(4, Field::CtMark)], NOTHING),
    layout(25, "ct_label", 16, &[host(16, Field::CtLabel)], NOTHING),
    layout(
        kind::CT_TUPLE4,
        "ct_tuple4",
        16,
        &[
            net(0, 4, Field::CtOrigIpv4Src),
            net(4, 4, Field::CtOrigIpv4Dst),
            net(12, 1, Field::CtOrigProto),
            net(8, 2, Field::CtOrigTpSrc),
            net(10, 2, Field::CtOrigTpDst),
        ],
        needs(V4, None),
    ),
    layout(
        kind::CT_TUPLE6,
        "ct_tuple6",
        40,
        &[
            net(0, 16, Field::CtOrigIpv6Src),
            net(16, 16, Field::CtOrigIpv6Dst),
            net(36, 1, Field::CtOrigProto),
            net(32, 2, Field::CtOrigTpSrc),
            net(34, 2, Field::CtOrigTpDst),
        ],
        needs(V6, None),
    ),
    layout(kind::PACKET_TYPE, "packet_type", 4, &[net(0, 4, Field::PacketType)], NOTHING),
    layout(32, "ipv6_exthdrs", 2, &[host(2, Field::Ipv6Exthdrs)], needs(V6, None)),
];

/// `set(mpls(…))`: the topmost entry.
pub static MPLS_SET: Layout =
    settable(layout(kind::MPLS, "mpls", 4, &[net(0, 4, Field::Mpls0)], MPLS_NEEDS), SetGroup::Mpls);

/// `struct ovs_nsh_key_base`.
pub static NSH_BASE: Layout = layout(
    1,
    "nsh",
    8,
    &[
        net(0, 1, Field::NshFlags),
        net(1, 1, Field::NshTtl),
        net(2, 1, Field::NshMdType),
        net(3, 1, Field::NshNp),
        net(4, 4, Field::NshPathHdr),
    ],
    NSH_NEEDS,
);

/// `struct ovs_nsh_key_md1`.
pub static NSH_MD1: Layout = layout(
    2,
    "nsh",
    16,
    &[net(0, 4, Field::NshC1), net(4, 4, Field::NshC2), net(8, 4, Field::NshC3), net(12, 4, Field::NshC4)],
    NSH_NEEDS,
);

/// The layout of this attribute of a key, if it is a plain struct.
pub fn find(kind: u16) -> Option<&'static Layout> {
    LAYOUTS.iter().find(|layout| layout.kind == kind)
}

impl Part {
    fn read(&self, bytes: &[u8]) -> u128 {
        let mut number = [0; 16];
        let bytes = bytes.get(self.at..self.at + self.length).unwrap_or_default();
        match self.order {
            Order::Network => {
                number[16 - bytes.len()..].copy_from_slice(bytes);
                u128::from_be_bytes(number)
            }
            Order::Host if cfg!(target_endian = "big") => {
                number[16 - bytes.len()..].copy_from_slice(bytes);
                u128::from_be_bytes(number)
            }
            Order::Host => {
                number[..bytes.len()].copy_from_slice(bytes);
                u128::from_le_bytes(number)
            }
        }
    }
}

impl Layout {
    /// Adds the struct's fields to `key` and `mask`; no `bits` means that all count. Both are of the layout's length.
    /// Tells whether any bit counts.
    ///
    /// # Errors
    /// A value has bits beyond those that a packet's key can have.
    pub fn load(
        &self,
        value: &[u8],
        bits: Option<&[u8]>,
        key: &mut Key,
        mask: &mut Mask,
    ) -> Result<bool, DoesNotFit> {
        let mut asks = false;
        for part in self.parts {
            let ones = |bits: u32| u128::MAX >> (128 - bits);
            let bits = bits.map_or(u128::MAX, |bits| part.read(bits));
            let value = part.read(value) & bits;
            if value & !ones(part.bits) != 0 {
                return Err(DoesNotFit);
            }
            let bits = bits & ones(part.bits);
            // What is not matched must not wipe out what another attribute said about a shared field.
            if bits == 0 {
                continue;
            }
            asks = true;
            key.set(part.field, value);
            mask.set(part.field, if bits == ones(part.bits) { u128::MAX } else { bits });
        }
        Ok(asks)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_part_lies_within_its_struct() {
        for layout in LAYOUTS.iter().chain([&MPLS_SET, &NSH_BASE, &NSH_MD1]) {
            let mut covered = vec![false; layout.length];
            for part in layout.parts {
                for byte in &mut covered[part.at..part.at + part.length] {
                    assert!(!std::mem::replace(byte, true), "{} overlaps itself", layout.name);
                }
            }
        }
    }

    #[test]
    fn a_narrow_field_is_exact_with_all_of_its_headers_bits() {
        let (mut key, mut mask) = (Key::default(), Mask::EMPTY);
        let icmp = find(11).unwrap();
        assert!(icmp.load(&[8, 0], Some(&[0xff, 0x0f]), &mut key, &mut mask).unwrap());
        assert!(mask.is_exact(Field::TpSrc));
        assert_eq!(mask.get(Field::TpDst), 0x0f);
        let state = find(22).unwrap();
        assert!(state.load(&0x100u32.to_ne_bytes(), None, &mut key, &mut mask).is_err());
        assert!(state.load(&0x21u32.to_ne_bytes(), None, &mut key, &mut mask).unwrap());
        assert!(mask.is_exact(Field::CtState));
    }
}
