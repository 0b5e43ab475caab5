//! Random matches and actions, encoded and decoded again.

use super::*;
use proptest::sample::select;
use switch_core::action::{Ct, FieldSet, Psample, SetGroup, Userspace};
use switch_core::flow::Match;
use switch_core::key::{ETH_P_802_2, ETH_P_8021AD, ETH_P_8021Q, VLAN_PRESENT};

/// Fields that any packet may be matched by.
const METADATA: [Field; 8] = [
    Field::RecircId,
    Field::DpHash,
    Field::SkbPriority,
    Field::SkbMark,
    Field::CtZone,
    Field::CtMark,
    Field::CtLabel,
    Field::CtState,
];

fn fields_of(eth_type: u16, proto: u8, is_later: bool) -> Vec<Field> {
    use Field::*;
    let mut fields = match eth_type {
        0x0800 => vec![Ipv4Src, Ipv4Dst, IpTos, IpTtl],
        0x86dd => vec![Ipv6Src, Ipv6Dst, Ipv6Label, IpTos, IpTtl, Ipv6Exthdrs],
        0x0806 | 0x8035 => return vec![Ipv4Src, Ipv4Dst, IpProto, ArpSha, ArpTha],
        0x8847 => return vec![Mpls0],
        0x894f => return vec![NshFlags, NshTtl, NshMdType, NshNp, NshPathHdr, NshC1, NshC2, NshC3, NshC4],
        _ => return vec![],
    };
    if !is_later {
        match proto {
            6 => fields.extend([TpSrc, TpDst, TcpFlags]),
            17 | 132 => fields.extend([TpSrc, TpDst]),
            1 if eth_type == 0x0800 => fields.extend([TpSrc, TpDst]),
            58 if eth_type == 0x86dd => fields.extend([TpSrc, TpDst]),
            _ => {}
        }
    }
    fields
}

/// Bits of the header, where the key's field is wider.
fn header_bits(field: Field, proto: u8) -> u128 {
    match field {
        Field::CtState => 0xff,
        Field::TcpFlags => 0xfff,
        Field::Ipv6Label => 0xf_ffff,
        Field::TpSrc | Field::TpDst if matches!(proto, 1 | 58) => 0xff,
        field => u128::MAX >> (128 - field.place().2),
    }
}

prop_compose! {
    fn matches()(
        eth_type in select(vec![0x0800u16, 0x86dd, 0x0806, 0x8035, 0x8847, 0x894f, 0x88cc, ETH_P_802_2]),
        proto in select(vec![1u8, 6, 17, 58, 132, 47]),
        frag in 0u8..3,
        tags in prop::collection::vec((select(vec![ETH_P_8021Q, ETH_P_8021AD]), any::<u16>(), any::<u16>()), 0..3),
        has_link in any::<bool>(),
        values in prop::collection::vec((any::<u128>(), prop_oneof![Just(0u128), Just(u128::MAX), any::<u128>()]), 32),
    ) -> Match {
        let mut m = Match::default();
        let Match { key, mask, .. } = &mut m;
        key.set(Field::InPort, 11);
        mask.set_exact(Field::InPort);
        key.set(Field::EthType, eth_type as u128);
        mask.set_exact(Field::EthType);
        if matches!(eth_type, 0x0800 | 0x86dd) {
            key.set(Field::IpProto, proto as u128);
            mask.set_exact(Field::IpProto);
            key.set(Field::IpFrag, frag as u128);
            mask.set_exact(Field::IpFrag);
        }
        let mut fields = fields_of(eth_type, proto, frag == 2);
        fields.extend(METADATA);
        // 802.2 and tags are of frames with a link header.
        let has_link = has_link || eth_type == ETH_P_802_2 || !tags.is_empty();
        if has_link {
            fields.extend([Field::EthSrc, Field::EthDst]);
        } else {
            key.set(Field::PacketType, 1 << 16 | eth_type as u128);
            mask.set_exact(Field::PacketType);
        }
        for (field, (value, bits)) in fields.into_iter().zip(values) {
            let ones = header_bits(field, proto);
            let bits = bits & ones;
            if field == Field::IpProto || bits != 0 {
                key.set(field, value & bits);
                mask.set(field, if bits == ones { u128::MAX } else { bits });
            }
        }
        let places = [(Field::VlanTpid, Field::VlanTci), (Field::CvlanTpid, Field::CvlanTci)];
        for (i, (tpid_field, tci_field)) in places.into_iter().enumerate() {
            match tags.get(i) {
                Some(&(tpid, tci, bits)) => {
                    key.set(tpid_field, tpid as u128);
                    mask.set_exact(tpid_field);
                    let bits = bits | VLAN_PRESENT;
                    key.set(tci_field, ((tci | VLAN_PRESENT) & bits) as u128);
                    mask.set(tci_field, bits as u128);
                }
                None => mask.set_exact(tci_field),
            }
        }
        m
    }
}

fn port() -> impl Strategy<Value = PortRef> {
    prop_oneof![
        (11u32..14).prop_map(|slot| PortRef::Ours(PortId { slot, generation: 1 })),
        (1000u32..2000).prop_map(|number| PortRef::Foreign(number.to_string())),
    ]
}

/// A masked set of some of these fields.
fn set(group: SetGroup, fields: &'static [Field]) -> impl Strategy<Value = Action> {
    prop::collection::vec((any::<u128>(), any::<u128>()), fields.len()).prop_filter_map(
        "empty",
        move |values| {
            let sets = fields.iter().zip(values).map(|(&field, (value, mask))| {
                let mask = mask & (u128::MAX >> (128 - field.place().2));
                FieldSet { field, value: value & mask, mask }
            });
            let sets: Vec<FieldSet> = sets.filter(|set| set.mask != 0).collect();
            (!sets.is_empty()).then_some(Action::Set(group, sets))
        },
    )
}

fn plain_action() -> impl Strategy<Value = Action> {
    use Field::*;
    let ct = (any::<[bool; 4]>(), any::<u16>(), any::<(u32, u32)>(), any::<(u128, u128)>()).prop_map(
        |([commit, force, has_more, nat], zone, mark, label)| {
            Action::Ct(Ct {
                commit: commit || force,
                force,
                zone,
                mark: (has_more && mark.1 != 0).then_some(mark),
                label: (has_more && label.1 != 0).then_some(label),
                helper: has_more.then(|| "ftp".to_owned()),
                timeout: has_more.then(|| "slow".to_owned()),
                nat: nat.then(String::new),
            })
        },
    );
    let userspace = (any::<u32>(), prop::collection::vec(any::<u8>(), 1..32), any::<bool>(), port())
        .prop_map(|(pid, data, more, port)| {
            Action::Userspace(Userspace {
                pid,
                userdata: if more { format!("userdata({})", hex(&data)) } else { String::new() },
                actions: more,
                tunnel_out_port: (!more).then_some(port),
            })
        });
    prop_oneof![
        port().prop_map(Action::Output),
        any::<u32>().prop_map(Action::Drop),
        any::<u32>().prop_map(Action::Recirc),
        any::<u32>().prop_map(Action::Trunc),
        any::<u32>().prop_map(Action::Meter),
        any::<(u16, u16)>().prop_map(|(tpid, tci)| Action::PushVlan { tpid, tci }),
        any::<(u32, u32)>().prop_map(|(algorithm, basis)| Action::Hash { algorithm, basis }),
        any::<(u32, u16)>().prop_map(|(lse, ethertype)| Action::PushMpls { lse, ethertype }),
        any::<(u32, u16, u16)>().prop_map(|(lse, ethertype, flags)| Action::AddMpls {
            lse,
            ethertype,
            flags
        }),
        any::<u16>().prop_map(|ethertype| Action::PopMpls { ethertype }),
        (0..1u64 << 48, 0..1u64 << 48).prop_map(|(src, dst)| Action::PushEth { src, dst }),
        select(vec![Action::PopVlan, Action::PopEth, Action::PopNsh, Action::CtClear]),
        (any::<u32>(), prop::collection::vec(any::<u8>(), 0..16))
            .prop_map(|(group, cookie)| Action::Psample(Psample { group, cookie })),
        set(SetGroup::Eth, &[EthSrc, EthDst]),
        set(SetGroup::Ipv4, &[Ipv4Src, Ipv4Dst, IpTos, IpTtl]),
        set(SetGroup::Tcp, &[TpSrc, TpDst]),
        set(SetGroup::Udp, &[TpSrc, TpDst]),
        set(SetGroup::Sctp, &[TpSrc, TpDst]),
        set(SetGroup::Mpls, &[Mpls0]),
        ct,
        userspace,
    ]
}

fn action_list() -> impl Strategy<Value = Vec<Action>> {
    let action = plain_action().prop_recursive(3, 24, 4, |inner| {
        let list = || prop::collection::vec(inner.clone(), 0..4);
        prop_oneof![
            list().prop_map(Action::Clone),
            list().prop_map(Action::DecTtl),
            (any::<u32>(), list()).prop_map(|(probability, actions)| Action::Sample { probability, actions }),
            (any::<u16>(), list(), list()).prop_map(|(size, greater, less_equal)| Action::CheckPktLen {
                size,
                greater,
                less_equal
            }),
        ]
    });
    prop::collection::vec(action, 0..6)
}

proptest! {
    #[test]
    fn a_flow_is_read_as_it_was_encoded(matches in matches(), actions in action_list()) {
        let (key, mask) = encode::key(&matches, 1);
        let spec = spec(flow_of(&key, Some(&mask), &encode::actions(&actions)));
        let spec = spec.unwrap_or_else(|error| panic!("{error:?} {}", format_flow(&matches, &Names)));
        prop_assert_eq!(&spec.matches, &matches);
        prop_assert_eq!(&spec.actions, &actions);
    }

    #[test]
    fn mangled_attributes_do_no_harm(
        matches in matches(),
        actions in action_list(),
        mangled in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..6),
        cut in any::<prop::sample::Index>(),
    ) {
        let (mut key, mut mask) = encode::key(&matches, 1);
        let mut actions = encode::actions(&actions);
        for (at, value) in mangled {
            for bytes in [&mut key, &mut mask, &mut actions] {
                if !bytes.is_empty() {
                    let at = at.index(bytes.len());
                    bytes[at] = value;
                }
            }
        }
        flow_of(&key, Some(&mask), &actions);
        flow_of(&key, None, &actions[..cut.index(actions.len() + 1)]);
        flow_of(&key[..cut.index(key.len())], Some(&mask), &[]);
    }
}
