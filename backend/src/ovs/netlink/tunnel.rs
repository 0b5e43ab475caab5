//! `OVS_KEY_ATTR_TUNNEL`: the outer header in a match or a `set`.

use super::DecodeError;
use super::wire::{Attr, Attrs, u32_at};
use std::collections::BTreeSet;
use switch_core::action::{FieldSet, GeneveOpt, TunnelOpts};
use switch_core::key::{Field, Key, Mask, TUN_CSUM, TUN_DF, TUN_KEY, TUN_OAM};

/// Numbers of `enum ovs_tunnel_key_attr` that are not one field.
mod kind {
    pub const ID: u16 = 0;
    pub const DONT_FRAGMENT: u16 = 5;
    pub const CSUM: u16 = 6;
    pub const OAM: u16 = 7;
    pub const GENEVE_OPTS: u16 = 8;
    pub const VXLAN_OPTS: u16 = 11;
    pub const PAD: u16 = 14;
    pub const ERSPAN_OPTS: u16 = 15;
}

/// Attributes that are one field in network order.
const FIELDS: [(u16, Field); 9] = [
    (kind::ID, Field::TunId),
    (1, Field::TunIpv4Src),
    (2, Field::TunIpv4Dst),
    (12, Field::TunIpv6Src),
    (13, Field::TunIpv6Dst),
    (3, Field::TunTos),
    (4, Field::TunTtl),
    (9, Field::TunTpSrc),
    (10, Field::TunTpDst),
];

/// Attributes that are there or not.
const FLAGS: [(u16, u16); 3] = [(kind::DONT_FRAGMENT, TUN_DF), (kind::CSUM, TUN_CSUM), (kind::OAM, TUN_OAM)];
const ALL_FLAGS: u16 = TUN_DF | TUN_CSUM | TUN_KEY | TUN_OAM;
/// `OVS_VXLAN_EXT_GBP`.
const VXLAN_GBP: u16 = 1;
/// `struct geneve_opt` without its value.
const GENEVE_HEADER: usize = 4;
/// `struct erspan_metadata`.
const ERSPAN_LENGTH: usize = 12;

/// Reads the outer header into `key`, `mask` and `opts`; without a mask, all that is given is exact.
pub fn decode(
    tunnel: Attrs<'_>,
    masks: Option<Attrs<'_>>,
    key: &mut Key,
    mask: &mut Mask,
    opts: &mut TunnelOpts,
) -> Result<(), DecodeError> {
    let (mut flags, mut flag_bits) = (0, if masks.is_some() { 0 } else { ALL_FLAGS });
    let mut seen = BTreeSet::new();
    for attr in tunnel {
        let attr = attr?;
        if !seen.insert(attr.kind) {
            return Err(DecodeError::new(format!("tunnel attribute {} given twice", attr.kind)));
        }
        let zeros = vec![0; attr.data.len()];
        // None is exact; an attribute that the mask lacks is not matched.
        let bits = match masks {
            None => None,
            Some(masks) => Some(masks.find(attr.kind)?.map_or(&zeros[..], |bits| bits.data)),
        };
        if bits.is_some_and(|bits| bits.len() != attr.data.len()) {
            return Err(DecodeError::new(format!(
                "mask of tunnel attribute {} has another length",
                attr.kind
            )));
        }
        if let Some(&(kind, field)) = FIELDS.iter().find(|(kind, _)| *kind == attr.kind) {
            let bytes = field.place().2 as usize / 8;
            if attr.data.len() != bytes {
                return Err(DecodeError::length("tunnel", attr));
            }
            let bits = bits.map_or(u128::MAX >> (128 - field.place().2), number);
            key.set(field, number(attr.data) & bits);
            mask.set(field, bits);
            if kind == kind::ID {
                flags |= TUN_KEY;
                flag_bits |= TUN_KEY;
            }
            continue;
        }
        if let Some((_, flag)) = FLAGS.iter().find(|(kind, _)| *kind == attr.kind) {
            flags |= flag;
            continue;
        }
        match attr.kind {
            kind::PAD => {}
            kind::GENEVE_OPTS => opts.geneve = geneve(attr, bits)?,
            kind::VXLAN_OPTS => vxlan(attr, bits, key, mask)?,
            kind::ERSPAN_OPTS => erspan(attr, bits, key, mask, opts)?,
            _ => return Err(DecodeError::new(format!("tunnel attribute {}", attr.kind))),
        }
    }
    // A flag's mask is there even if the flag is not.
    for bits in masks.into_iter().flatten() {
        let bits = bits?;
        flag_bits |= FLAGS.iter().filter(|(kind, _)| *kind == bits.kind).map(|(_, flag)| flag).sum::<u16>();
    }
    if flag_bits != 0 {
        key.set(Field::TunFlags, (flags & flag_bits) as u128);
        mask.set(Field::TunFlags, if flag_bits == ALL_FLAGS { u128::MAX } else { flag_bits as u128 });
    }
    Ok(())
}

/// The fields that `set(tunnel(…))` gives, in the order of ODP text.
pub fn to_sets(key: &Key, mask: &Mask) -> Vec<FieldSet> {
    let options = [Field::TunGbpId, Field::TunGbpFlags, Field::TunErspanIdx, Field::TunFlags];
    let fields = FIELDS.iter().map(|&(_, field)| field).chain(options);
    let given = fields.filter(|&field| mask.has(field));
    given.map(|field| FieldSet { field, value: key.get(field), mask: mask.get(field) }).collect()
}

/// At most 16 bytes in network order.
fn number(bytes: &[u8]) -> u128 {
    bytes.iter().fold(0, |number, &byte| number << 8 | byte as u128)
}

/// Options as on the wire (RFC 8926 §3.5).
fn geneve(attr: Attr<'_>, bits: Option<&[u8]>) -> Result<Vec<GeneveOpt>, DecodeError> {
    let mut options = Vec::new();
    let ones = vec![0xff; attr.data.len()];
    let (mut data, mut bits) = (attr.data, bits.unwrap_or(&ones));
    while !data.is_empty() {
        let length = data.get(3).map_or(usize::MAX, |&length| GENEVE_HEADER + (length & 0x1f) as usize * 4);
        let (Some(option), Some(option_bits)) = (data.get(..length), bits.get(..length)) else {
            return Err(DecodeError::length("geneve", attr));
        };
        let masked: Vec<u8> = option.iter().zip(option_bits).map(|(value, bits)| value & bits).collect();
        options.push(GeneveOpt {
            class: (number(&masked[0..2]) as u16, number(&option_bits[0..2]) as u16),
            kind: (masked[2], option_bits[2]),
            value: masked[GENEVE_HEADER..].to_vec(),
            mask: option_bits[GENEVE_HEADER..].to_vec(),
        });
        (data, bits) = (&data[length..], &bits[length..]);
    }
    Ok(options)
}

/// The group policy extension: 16 bits of id below 8 bits of flags.
fn vxlan(attr: Attr<'_>, bits: Option<&[u8]>, key: &mut Key, mask: &mut Mask) -> Result<(), DecodeError> {
    for option in attr.nested() {
        let option = option?;
        if option.kind != VXLAN_GBP {
            return Err(DecodeError::new(format!("vxlan attribute {}", option.kind)));
        }
        let value = option.u32()?;
        let bits = match bits {
            None => u32::MAX,
            Some(bits) if bits.iter().all(|&byte| byte == 0) => 0,
            Some(bits) => match Attrs(bits).find(VXLAN_GBP)? {
                Some(bits) => bits.u32()?,
                None => 0,
            },
        };
        for (field, shift, ones) in [(Field::TunGbpId, 0, 0xffff), (Field::TunGbpFlags, 16, 0xff)] {
            let bits = bits >> shift & ones;
            key.set(field, (value >> shift & bits) as u128);
            mask.set(field, bits as u128);
        }
    }
    Ok(())
}

/// The index of version 1 has its place in the key; the rest is carried as text, as OVS prints it.
fn erspan(
    attr: Attr<'_>,
    bits: Option<&[u8]>,
    key: &mut Key,
    mask: &mut Mask,
    opts: &mut TunnelOpts,
) -> Result<(), DecodeError> {
    let ones = [0xff; ERSPAN_LENGTH];
    let is_masked = bits.is_some();
    let bits = bits.unwrap_or(&ones);
    if attr.data.len() != ERSPAN_LENGTH || bits.len() != ERSPAN_LENGTH {
        return Err(DecodeError::length("erspan", attr));
    }
    let version = u32_at(attr.data, 0).unwrap_or_default() as u8;
    let version_bits = u32_at(bits, 0).unwrap_or_default() as u8;
    let item = |name: &str, value: String, bits: u8| match bits {
        u8::MAX => format!("{name}={value}"),
        bits => format!("{name}={value}/{}", hex(bits as u32)),
    };
    let mut items = vec![item("ver", version.to_string(), version_bits)];
    match version {
        1 => {
            let (index, index_bits) = (number(&attr.data[4..8]), number(&bits[4..8]));
            if version_bits == u8::MAX && index_bits != 0 {
                key.set(Field::TunErspanIdx, index & index_bits);
                mask.set(Field::TunErspanIdx, index_bits);
                return Ok(());
            }
            let bits = if is_masked { format!("/{}", hex(index_bits as u32)) } else { String::new() };
            items.push(format!("idx={}{bits}", hex(index as u32)));
        }
        2 => {
            // Bits of the last byte, lowest first: o:1, gra:2, dir:1, hwid:4 (struct erspan_md2).
            let (value, bits) = (attr.data[11], bits[11]);
            let ones = |part: u8| if is_masked { part } else { u8::MAX };
            items.push(item("dir", (value >> 3 & 1).to_string(), ones(bits >> 3 & 1)));
            items.push(item("hwid", hex((value >> 4) as u32), ones(bits >> 4)));
        }
        _ => {}
    }
    opts.other = Some(format!("erspan({})", items.join(",")));
    Ok(())
}

/// A number as C's `%#x` prints it.
fn hex(value: u32) -> String {
    if value == 0 { "0".into() } else { format!("{value:#x}") }
}
