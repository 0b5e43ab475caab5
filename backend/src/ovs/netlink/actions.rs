//! `OVS_FLOW_ATTR_ACTIONS`: what a flow does (`enum ovs_action_attr`).
//!
//! A list with anything in it that is not understood is one [`Action::Opaque`]: half a list must never be carried out.

use super::layout::{self, Layout, MPLS_SET, NSH_BASE, NSH_MD1, kind};
use super::ports::Ports;
use super::wire::{Attr, Attrs, u16_at, u32_at};
use super::{DecodeError, cookie, hex, tunnel};
use std::net::{Ipv4Addr, Ipv6Addr};
use switch_core::action::{Action, Ct, FieldSet, Psample, SetGroup, TunnelOpts, Userspace};
use switch_core::key::{Field, Key, Mask};

/// Deepest nesting that is read, as in OVS (`MAX_ODP_NESTED`).
const MAX_DEPTH: usize = 32;
/// Bytes of an attribute that an opaque list shows.
const SHOWN: usize = 64;

/// Reads a list of actions.
pub fn decode(actions: &[u8], ports: &Ports<'_>) -> Vec<Action> {
    match list(Attrs(actions), ports, 0) {
        Ok(actions) => actions,
        Err(error) => vec![Action::Opaque(format!("{}: {error}", raw(actions)))],
    }
}

/// The list's attributes by number.
fn raw(actions: &[u8]) -> String {
    let item = |attr: Attr<'_>| {
        let (shown, more) = attr.data.split_at(attr.data.len().min(SHOWN));
        let more = if more.is_empty() { "" } else { "…" };
        match shown.is_empty() {
            true => format!("action{}", attr.kind),
            false => format!("action{}(0x{}{more})", attr.kind, hex(shown)),
        }
    };
    Attrs(actions).map_while(Result::ok).map(item).collect::<Vec<_>>().join(",")
}

fn list(actions: Attrs<'_>, ports: &Ports<'_>, depth: usize) -> Result<Vec<Action>, DecodeError> {
    if depth > MAX_DEPTH {
        return Err(DecodeError::new(format!("nested more than {MAX_DEPTH} levels deep")));
    }
    actions.map(|attr| action(attr?, ports, depth)).collect()
}

fn action(attr: Attr<'_>, ports: &Ports<'_>, depth: usize) -> Result<Action, DecodeError> {
    let data = attr.data;
    let wrong_length = || DecodeError::length("action", attr);
    let of_length = |length: usize| if data.len() == length { Ok(data) } else { Err(wrong_length()) };
    let be16 = |at: usize| u16_at(data, at).map(u16::from_be).unwrap_or_default();
    let be32 = |at: usize| u32_at(data, at).map(u32::from_be).unwrap_or_default();
    let nested = |list_of: Attr<'_>| list(list_of.nested(), ports, depth + 1);
    Ok(match attr.kind {
        1 => Action::Output(ports.reference(attr.u32()?)),
        2 => userspace(attr.nested(), ports)?,
        3 => set(attr.nested(), false)?,
        4 => {
            of_length(4)?;
            Action::PushVlan { tpid: be16(0), tci: be16(2) }
        }
        5 => Action::PopVlan,
        6 => {
            let [probability, actions] = required(attr.nested(), [1, 2], "sample")?;
            Action::Sample { probability: probability.u32()?, actions: nested(actions)? }
        }
        7 => Action::Recirc(attr.u32()?),
        8 => {
            of_length(8)?;
            let number = |at| u32_at(data, at).unwrap_or_default();
            Action::Hash { algorithm: number(0), basis: number(4) }
        }
        9 => {
            of_length(8)?;
            Action::PushMpls { lse: be32(0), ethertype: be16(4) }
        }
        10 => Action::PopMpls { ethertype: attr.be16()? },
        11 => set(attr.nested(), true)?,
        12 => Action::Ct(ct(attr.nested())?),
        13 => Action::Trunc(attr.u32()?),
        14 => {
            let addresses = of_length(12)?;
            let mac = |bytes: &[u8]| bytes.iter().fold(0, |mac, &byte| mac << 8 | byte as u64);
            Action::PushEth { src: mac(&addresses[..6]), dst: mac(&addresses[6..]) }
        }
        15 => Action::PopEth,
        16 => Action::CtClear,
        // The header is one key attribute in it, as in a set.
        17 => match attr.nested().find(kind::NSH)? {
            Some(header) => push_nsh(header.nested())?,
            None => return Err(DecodeError::new("push_nsh without its header")),
        },
        18 => Action::PopNsh,
        19 => Action::Meter(attr.u32()?),
        20 => Action::Clone(nested(attr)?),
        21 => {
            let [size, greater, less_equal] = required(attr.nested(), [1, 2, 3], "check_pkt_len")?;
            let (greater, less_equal) = (nested(greater)?, nested(less_equal)?);
            Action::CheckPktLen { size: size.u16()?, greater, less_equal }
        }
        22 => {
            of_length(8)?;
            // The flags alone are in host order.
            Action::AddMpls { lse: be32(0), ethertype: be16(4), flags: u16_at(data, 6).unwrap_or_default() }
        }
        23 => {
            let [actions] = required(attr.nested(), [1], "dec_ttl")?;
            Action::DecTtl(nested(actions)?)
        }
        24 => Action::Drop(attr.u32()?),
        25 => psample(attr.nested())?,
        kind => return Err(DecodeError::new(format!("action attribute {kind}"))),
    })
}

/// Exactly these attributes.
fn required<'a, const N: usize>(
    attrs: Attrs<'a>,
    kinds: [u16; N],
    name: &str,
) -> Result<[Attr<'a>; N], DecodeError> {
    let mut found = [None; N];
    for attr in attrs {
        let attr = attr?;
        match kinds.iter().position(|&kind| kind == attr.kind) {
            Some(i) => found[i] = Some(attr),
            None => return Err(DecodeError::new(format!("{name} attribute {}", attr.kind))),
        }
    }
    let mut all = [Attr { kind: 0, data: &[] }; N];
    for (place, attr) in all.iter_mut().zip(found) {
        *place = attr.ok_or_else(|| DecodeError::new(format!("{name} lacks an attribute")))?;
    }
    Ok(all)
}

/// `enum ovs_userspace_attr`.
fn userspace(attrs: Attrs<'_>, ports: &Ports<'_>) -> Result<Action, DecodeError> {
    let mut userspace = Userspace::default();
    for attr in attrs {
        let attr = attr?;
        match attr.kind {
            1 => userspace.pid = attr.u32()?,
            2 => userspace.userdata = cookie::format(attr.data, ports),
            3 => userspace.tunnel_out_port = Some(ports.reference(attr.u32()?)),
            4 => userspace.actions = true,
            kind => return Err(DecodeError::new(format!("userspace attribute {kind}"))),
        }
    }
    Ok(Action::Userspace(userspace))
}

/// A key attribute; in a masked set, its value is followed by a mask of the same length.
fn set(mut attrs: Attrs<'_>, is_masked: bool) -> Result<Action, DecodeError> {
    let Some(attr) = attrs.next().transpose()? else { return Err(DecodeError::new("an empty set")) };
    let (mut key, mut mask) = (Key::default(), Mask::EMPTY);
    let group = match attr.kind {
        kind::TUNNEL if !is_masked => {
            let mut opts = TunnelOpts::default();
            tunnel::decode(attr.nested(), None, &mut key, &mut mask, &mut opts)?;
            return Ok(Action::SetTunnel(tunnel::to_sets(&key, &mask), opts));
        }
        kind::NSH => {
            for part in attr.nested() {
                let part = part?;
                match [&NSH_BASE, &NSH_MD1].into_iter().find(|layout| layout.kind == part.kind) {
                    Some(layout) => load(layout, part, is_masked, &mut key, &mut mask)?,
                    None => return Err(DecodeError::new(format!("set(nsh) attribute {}", part.kind))),
                }
            }
            let sets = [&NSH_BASE, &NSH_MD1].into_iter().flat_map(|layout| to_sets(layout, &key, &mask));
            return checked(SetGroup::Nsh, sets.collect());
        }
        kind::MPLS => Some(&MPLS_SET),
        kind => layout::find(kind),
    };
    let Some((layout, group)) = group.and_then(|layout| Some((layout, layout.set?))) else {
        return Err(DecodeError::new(format!("set of key attribute {}", attr.kind)));
    };
    load(layout, attr, is_masked, &mut key, &mut mask)?;
    checked(group, to_sets(layout, &key, &mask).collect())
}

fn checked(group: SetGroup, sets: Vec<FieldSet>) -> Result<Action, DecodeError> {
    if sets.is_empty() {
        Err(DecodeError::new("a set that changes nothing"))
    } else {
        Ok(Action::Set(group, sets))
    }
}

fn load(
    layout: &Layout,
    attr: Attr<'_>,
    is_masked: bool,
    key: &mut Key,
    mask: &mut Mask,
) -> Result<(), DecodeError> {
    let length = layout.length;
    if attr.data.len() != if is_masked { 2 * length } else { length } {
        return Err(DecodeError::length(layout.name, attr));
    }
    let (value, bits) = attr.data.split_at(length);
    match layout.load(value, is_masked.then_some(bits), key, mask) {
        Ok(_) => Ok(()),
        Err(layout::DoesNotFit) => Err(DecodeError::new(format!("set({}) has unknown bits", layout.name))),
    }
}

fn to_sets<'a>(layout: &'a Layout, key: &'a Key, mask: &'a Mask) -> impl Iterator<Item = FieldSet> + 'a {
    let changed = layout.parts.iter().map(|part| part.field).filter(|&field| mask.has(field));
    changed.map(|field| FieldSet { field, value: key.get(field), mask: mask.get(field) })
}

/// `enum ovs_ct_attr`.
fn ct(attrs: Attrs<'_>) -> Result<Ct, DecodeError> {
    let mut ct = Ct::default();
    for attr in attrs {
        let attr = attr?;
        match attr.kind {
            1 => ct.commit = true,
            2 => ct.zone = attr.u16()?,
            3 => {
                let (Some(value), Some(mask), 8) =
                    (u32_at(attr.data, 0), u32_at(attr.data, 4), attr.data.len())
                else {
                    return Err(DecodeError::length("ct mark", attr));
                };
                ct.mark = (mask != 0).then_some((value, mask));
            }
            4 => {
                let label = |bytes: Option<&[u8]>| bytes?.try_into().ok().map(u128::from_ne_bytes);
                let (Some(value), Some(mask), 32) =
                    (label(attr.data.get(..16)), label(attr.data.get(16..)), attr.data.len())
                else {
                    return Err(DecodeError::length("ct label", attr));
                };
                ct.label = (mask != 0).then_some((value, mask));
            }
            5 => ct.helper = Some(attr.text()?.to_owned()),
            6 => ct.nat = Some(nat(attr.nested())?),
            7 => ct.force = true,
            // Which events conntrack tells of the connection: nothing that packets show.
            8 => {}
            9 => ct.timeout = Some(attr.text()?.to_owned()),
            kind => return Err(DecodeError::new(format!("ct attribute {kind}"))),
        }
    }
    ct.commit |= ct.force;
    Ok(ct)
}

/// `enum ovs_nat_attr`, as ODP text.
fn nat(attrs: Attrs<'_>) -> Result<String, DecodeError> {
    let (mut side, mut flags) = (None, Vec::new());
    let mut addresses: [Option<Address>; 2] = [None, None];
    let mut ports: [Option<u16>; 2] = [None; 2];
    for attr in attrs {
        let attr = attr?;
        match attr.kind {
            1 | 2 if side.is_some() => return Err(DecodeError::new("nat with src and dst")),
            1 => side = Some("src"),
            2 => side = Some("dst"),
            3 | 4 => addresses[attr.kind as usize - 3] = Some(address(attr)?),
            5 | 6 => ports[attr.kind as usize - 5] = Some(attr.u16()?).filter(|&port| port != 0),
            7 => flags.push("persistent"),
            8 => flags.push("hash"),
            9 => flags.push("random"),
            kind => return Err(DecodeError::new(format!("nat attribute {kind}"))),
        }
    }
    let [first, last] = addresses;
    let Some(side) = side else {
        let empty = flags.is_empty() && first.is_none() && last.is_none() && ports == [None; 2];
        return if empty { Ok(String::new()) } else { Err(DecodeError::new("nat without src or dst")) };
    };
    let mut text = side.to_owned();
    if let Some((first, first_text)) = first {
        let brackets = |text: String| match ports[0] {
            Some(_) if text.contains(':') => format!("[{text}]"),
            _ => text,
        };
        text += &format!("={}", brackets(first_text));
        if let Some((last, last_text)) = last.filter(|&(last, _)| last != first && last != 0) {
            if last < first {
                return Err(DecodeError::new("nat range"));
            }
            text += &format!("-{}", brackets(last_text));
        }
        if let Some(first) = ports[0] {
            text += &format!(":{first}");
            if let Some(last) = ports[1].filter(|&last| last != first) {
                if last < first {
                    return Err(DecodeError::new("nat range"));
                }
                text += &format!("-{last}");
            }
        }
    } else if last.is_some() || ports != [None; 2] {
        return Err(DecodeError::new("nat range without its beginning"));
    }
    // Whatever their order on the wire.
    for flag in ["persistent", "hash", "random"].iter().filter(|flag| flags.contains(flag)) {
        text += &format!(",{flag}");
    }
    Ok(text)
}

/// An address as a number and as text.
type Address = (u128, String);

fn address(attr: Attr<'_>) -> Result<Address, DecodeError> {
    if let Ok(v4) = <[u8; 4]>::try_from(attr.data) {
        return Ok((u32::from_be_bytes(v4) as u128, Ipv4Addr::from(v4).to_string()));
    }
    match <[u8; 16]>::try_from(attr.data) {
        Ok(v6) => Ok((u128::from_be_bytes(v6), Ipv6Addr::from(v6).to_string())),
        Err(_) => Err(DecodeError::length("nat address", attr)),
    }
}

/// The header to push: all of its base fields, and one kind of metadata.
fn push_nsh(attrs: Attrs<'_>) -> Result<Action, DecodeError> {
    let (mut key, mut mask) = (Key::default(), Mask::EMPTY);
    let (mut metadata, mut has_base) = (Vec::new(), false);
    for attr in attrs {
        let attr = attr?;
        match [&NSH_BASE, &NSH_MD1].into_iter().find(|layout| layout.kind == attr.kind) {
            Some(layout) => load(layout, attr, false, &mut key, &mut mask)?,
            None if attr.kind == 3 => metadata = attr.data.to_vec(),
            None => return Err(DecodeError::new(format!("push_nsh attribute {}", attr.kind))),
        }
        has_base |= attr.kind == NSH_BASE.kind;
    }
    let layouts = match key.get(Field::NshMdType) {
        _ if !has_base => return Err(DecodeError::new("push_nsh without its base header")),
        1 if metadata.is_empty() && mask.has(Field::NshC1) => &[&NSH_BASE, &NSH_MD1][..],
        2 if !mask.has(Field::NshC1) => &[&NSH_BASE][..],
        _ => return Err(DecodeError::new("push_nsh with metadata of another type")),
    };
    let sets = layouts.iter().flat_map(|layout| to_sets(layout, &key, &mask)).collect();
    Ok(Action::PushNsh(sets, metadata))
}

/// `enum ovs_psample_attr`.
fn psample(attrs: Attrs<'_>) -> Result<Action, DecodeError> {
    let (mut group, mut cookie) = (None, Vec::new());
    for attr in attrs {
        let attr = attr?;
        match attr.kind {
            1 => group = Some(attr.u32()?),
            2 => cookie = attr.data.to_vec(),
            kind => return Err(DecodeError::new(format!("psample attribute {kind}"))),
        }
    }
    let Some(group) = group else { return Err(DecodeError::new("psample without a group")) };
    Ok(Action::Psample(Psample { group, cookie }))
}
