//! An encoder of matches and actions as the kernel sends them, for round trips. It goes by the kernel's headers and not by
//! the decoder's tables.

use super::put_attr;
use switch_core::action::{Action, FieldSet, PortRef, SetGroup};
use switch_core::flow::Match;
use switch_core::key::{ETH_P_802_2, Field, Key, Mask, VLAN_PRESENT};

/// Key and mask attributes of a match.
pub fn key(matches: &Match, in_port: u32) -> (Vec<u8>, Vec<u8>) {
    let (key, mask) = (&matches.key, &matches.mask);
    (one_side(key, key, mask, in_port), one_side(key, &mask.0, mask, u32::MAX))
}

fn be(key: &Key, field: Field, bytes: usize) -> Vec<u8> {
    key.get(field).to_be_bytes()[16 - bytes..].to_vec()
}

fn join(key: &Key, fields: &[(Field, usize)]) -> Vec<u8> {
    fields.iter().flat_map(|&(field, bytes)| be(key, field, bytes)).collect()
}

/// `values` is the key or the mask; which attributes there are is the key's to say.
fn one_side(key: &Key, values: &Key, mask: &Mask, in_port: u32) -> Vec<u8> {
    let mut out = Vec::new();
    let host32 = |field| (values.get(field) as u32).to_ne_bytes();
    put_attr(&mut out, 20, &host32(Field::RecircId));
    put_attr(&mut out, 19, &host32(Field::DpHash));
    put_attr(&mut out, 2, &host32(Field::SkbPriority));
    put_attr(&mut out, 3, &in_port.to_ne_bytes());
    put_attr(&mut out, 15, &host32(Field::SkbMark));
    put_attr(&mut out, 22, &host32(Field::CtState));
    put_attr(&mut out, 23, &(values.get(Field::CtZone) as u16).to_ne_bytes());
    put_attr(&mut out, 24, &host32(Field::CtMark));
    put_attr(&mut out, 25, &values.get(Field::CtLabel).to_ne_bytes());
    let has_link = !mask.has(Field::PacketType);
    if has_link {
        put_attr(&mut out, 4, &join(values, &[(Field::EthSrc, 6), (Field::EthDst, 6)]));
    }
    let tagged = |tci| key.get(tci) as u16 & VLAN_PRESENT != 0;
    let mut inner = network(key, values, mask);
    for (tpid, tci) in [(Field::CvlanTpid, Field::CvlanTci), (Field::VlanTpid, Field::VlanTci)] {
        if tagged(tci) {
            let mut outer = Vec::new();
            put_attr(&mut outer, 6, &be(values, tpid, 2));
            put_attr(&mut outer, 5, &be(values, tci, 2));
            put_attr(&mut outer, 0x8000 | 1, &inner);
            inner = outer;
        }
    }
    out.extend(inner);
    out
}

fn network(key: &Key, values: &Key, mask: &Mask) -> Vec<u8> {
    let mut out = Vec::new();
    let is_mask = !std::ptr::eq(key, values);
    let exact_type = mask.is_exact(Field::EthType);
    if key.eth_type() != ETH_P_802_2 || is_mask {
        put_attr(&mut out, 6, &be(values, Field::EthType, 2));
    }
    if !exact_type {
        return out;
    }
    use Field::*;
    let transport = match key.eth_type() {
        0x0800 => {
            let fields = [(Ipv4Src, 4), (Ipv4Dst, 4), (IpProto, 1), (IpTos, 1), (IpTtl, 1), (IpFrag, 1)];
            put_attr(&mut out, 7, &join(values, &fields));
            [11, 1]
        }
        0x86dd => {
            let fields = [
                (Ipv6Src, 16),
                (Ipv6Dst, 16),
                (Ipv6Label, 4),
                (IpProto, 1),
                (IpTos, 1),
                (IpTtl, 1),
                (IpFrag, 1),
            ];
            put_attr(&mut out, 8, &join(values, &fields));
            put_attr(&mut out, 32, &(values.get(Ipv6Exthdrs) as u16).to_ne_bytes());
            [12, 58]
        }
        0x0806 | 0x8035 => {
            let mut arp = join(values, &[(Ipv4Src, 4), (Ipv4Dst, 4), (IpProto, 2), (ArpSha, 6), (ArpTha, 6)]);
            arp.resize(24, 0);
            put_attr(&mut out, 13, &arp);
            return out;
        }
        0x8847 => {
            put_attr(&mut out, 21, &be(values, Mpls0, 4));
            return out;
        }
        0x894f => {
            let base = [(NshFlags, 1), (NshTtl, 1), (NshMdType, 1), (NshNp, 1), (NshPathHdr, 4)];
            let mut nsh = Vec::new();
            put_attr(&mut nsh, 1, &join(values, &base));
            put_attr(&mut nsh, 2, &join(values, &[(NshC1, 4), (NshC2, 4), (NshC3, 4), (NshC4, 4)]));
            put_attr(&mut out, 28, &nsh);
            return out;
        }
        _ => return out,
    };
    if !mask.is_exact(IpProto) || key.ip_frag() == 2 {
        return out;
    }
    let ports = join(values, &[(TpSrc, 2), (TpDst, 2)]);
    match key.ip_proto() {
        6 => {
            put_attr(&mut out, 9, &ports);
            put_attr(&mut out, 18, &be(values, TcpFlags, 2));
        }
        17 => put_attr(&mut out, 10, &ports),
        132 => put_attr(&mut out, 17, &ports),
        proto if proto as u16 == transport[1] => {
            put_attr(&mut out, transport[0], &join(values, &[(TpSrc, 1), (TpDst, 1)]));
            let is_nd = matches!(key.get(TpSrc), 135 | 136) && proto == 58 && mask.is_exact(TpSrc);
            if is_nd && mask.has(NdTarget) {
                put_attr(&mut out, 14, &join(values, &[(NdTarget, 16), (ArpSha, 6), (ArpTha, 6)]));
            }
        }
        _ => {}
    }
    out
}

/// Actions; our port in slot 11 has number 1.
pub fn actions(actions: &[Action]) -> Vec<u8> {
    let mut out = Vec::new();
    for action in actions {
        let (kind, data) = one_action(action);
        put_attr(&mut out, kind, &data);
    }
    out
}

fn list(attrs: &[(u16, Vec<u8>)]) -> Vec<u8> {
    let mut out = Vec::new();
    for (kind, data) in attrs {
        put_attr(&mut out, *kind, data);
    }
    out
}

fn host(value: u32) -> Vec<u8> {
    value.to_ne_bytes().to_vec()
}

fn port(port: &PortRef) -> Vec<u8> {
    match port {
        PortRef::Ours(id) => host(id.slot - 10),
        PortRef::Foreign(name) => host(name.parse().unwrap()),
    }
}

fn one_action(action: &Action) -> (u16, Vec<u8>) {
    match action {
        Action::Output(target) => (1, port(target)),
        Action::Userspace(userspace) => {
            let mut attrs = vec![(1, host(userspace.pid))];
            if let Some(digits) = userspace.userdata.strip_prefix("userdata(") {
                attrs.push((2, super::unhex(digits.trim_end_matches(')'))));
            }
            attrs.extend(userspace.tunnel_out_port.as_ref().map(|target| (3, port(target))));
            if userspace.actions {
                attrs.push((4, vec![]));
            }
            (2, list(&attrs))
        }
        Action::Set(group, sets) => (11, list(&[set(*group, sets)])),
        Action::PushVlan { tpid, tci } => (4, [tpid.to_be_bytes(), tci.to_be_bytes()].concat()),
        Action::PopVlan => (5, vec![]),
        Action::Sample { probability, actions: inner } => {
            (6, list(&[(1, host(*probability)), (2, actions(inner))]))
        }
        Action::Recirc(id) => (7, host(*id)),
        Action::Hash { algorithm, basis } => (8, [host(*algorithm), host(*basis)].concat()),
        Action::PushMpls { lse, ethertype } => {
            (9, [&lse.to_be_bytes()[..], &ethertype.to_be_bytes(), &[0, 0]].concat())
        }
        Action::PopMpls { ethertype } => (10, ethertype.to_be_bytes().to_vec()),
        Action::Ct(ct) => {
            let mut attrs = vec![(2, ct.zone.to_ne_bytes().to_vec()), (8, host(0x10))];
            if ct.force {
                attrs.push((7, vec![]));
            } else if ct.commit {
                attrs.push((1, vec![]));
            }
            attrs.extend(ct.mark.map(|(value, mask)| (3, [host(value), host(mask)].concat())));
            let label = |(value, mask): (u128, u128)| (4, [value.to_ne_bytes(), mask.to_ne_bytes()].concat());
            attrs.extend(ct.label.map(label));
            let name = |name: &String| [name.as_bytes(), &[0]].concat();
            attrs.extend(ct.helper.as_ref().map(|text| (5, name(text))));
            attrs.extend(ct.timeout.as_ref().map(|text| (9, name(text))));
            if let Some(nat) = &ct.nat {
                assert!(nat.is_empty(), "only plain nat is encoded");
                attrs.push((6, vec![]));
            }
            (12, list(&attrs))
        }
        Action::Trunc(length) => (13, host(*length)),
        Action::PushEth { src, dst } => (14, [&src.to_be_bytes()[2..], &dst.to_be_bytes()[2..]].concat()),
        Action::PopEth => (15, vec![]),
        Action::CtClear => (16, vec![]),
        Action::PopNsh => (18, vec![]),
        Action::Meter(id) => (19, host(*id)),
        Action::Clone(inner) => (20, actions(inner)),
        Action::CheckPktLen { size, greater, less_equal } => {
            let size = size.to_ne_bytes().to_vec();
            (21, list(&[(1, size), (2, actions(greater)), (3, actions(less_equal))]))
        }
        Action::AddMpls { lse, ethertype, flags } => {
            (22, [&lse.to_be_bytes()[..], &ethertype.to_be_bytes(), &flags.to_ne_bytes()].concat())
        }
        Action::DecTtl(inner) => (23, list(&[(1, actions(inner))])),
        Action::Drop(reason) => (24, host(*reason)),
        Action::Psample(psample) => (25, list(&[(1, host(psample.group)), (2, psample.cookie.clone())])),
        other => panic!("{other:?} is not encoded"),
    }
}

/// A masked set: value and mask behind one another.
fn set(group: SetGroup, sets: &[FieldSet]) -> (u16, Vec<u8>) {
    let (mut key, mut mask) = (Key::default(), Key::default());
    for set in sets {
        key.set(set.field, set.value);
        mask.set(set.field, set.mask);
    }
    use Field::*;
    let (kind, fields): (u16, &[(Field, usize)]) = match group {
        SetGroup::Eth => (4, &[(EthSrc, 6), (EthDst, 6)]),
        SetGroup::Ipv4 => {
            (7, &[(Ipv4Src, 4), (Ipv4Dst, 4), (IpProto, 1), (IpTos, 1), (IpTtl, 1), (IpFrag, 1)])
        }
        SetGroup::Tcp => (9, &[(TpSrc, 2), (TpDst, 2)]),
        SetGroup::Udp => (10, &[(TpSrc, 2), (TpDst, 2)]),
        SetGroup::Sctp => (17, &[(TpSrc, 2), (TpDst, 2)]),
        SetGroup::Mpls => (21, &[(Mpls0, 4)]),
        other => panic!("{other:?} is not encoded"),
    };
    (kind, [join(&key, fields), join(&mask, fields)].concat())
}
