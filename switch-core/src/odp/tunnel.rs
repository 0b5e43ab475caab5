//! `tunnel(…)`: the outer header's fields, its flags and the options of the encapsulation.

use super::cursor::{Cursor, ones};
use super::error::OdpError;
use super::groups::{Format, Group, Part, Place, TUN_FLAGS, TUNNEL, format_hex, format_parts, part};
use crate::action::{GeneveOpt, TunnelOpts};
use crate::key::{Field, Key, Mask};

/// Most bytes of a GENEVE option's value (RFC 8926 §3.5: five bits of 4-byte words).
const MAX_GENEVE_VALUE: u128 = 124;

static GBP: Group = Group {
    name: "gbp",
    place: Place::Metadata,
    ethertypes: &[],
    proto: None,
    parts: &[part("id", Field::TunGbpId, Format::Dec), part("flags", Field::TunGbpFlags, Format::Hex)],
};

static ERSPAN_INDEX: Part = part("idx", Field::TunErspanIdx, Format::Hex);

/// Every field that a tunnel's text can name, in the order of a printed list.
pub(super) fn tunnel_fields() -> impl Iterator<Item = Field> {
    TUNNEL.fields().chain(GBP.fields()).chain([Field::TunErspanIdx, Field::TunFlags])
}

/// Reads from behind `tunnel(` to its closing parenthesis.
pub(super) fn parse_tunnel(
    c: &mut Cursor<'_>,
    key: &mut Key,
    mask: &mut Mask,
    opts: &mut TunnelOpts,
) -> Result<(), OdpError> {
    if c.eat(")") {
        return Ok(());
    }
    let mut seen = Vec::new();
    loop {
        let at = c.at();
        let name = c.word();
        if seen.contains(&name) {
            return Err(c.error_at(at, format!("{name} given twice")));
        }
        seen.push(name);
        if let Some(part) = TUNNEL.part(name) {
            c.expect("=")?;
            let (value, bits) = part.parse(c)?;
            part.store(key, mask, value, bits);
        } else {
            let known = ["flags", "vxlan", "geneve", "erspan", "gtpu"];
            if !known.contains(&name) {
                return Err(c.error_at(at, format!("no field of tunnel is called '{name}'")));
            }
            c.expect("(")?;
            match name {
                "flags" => {
                    let (value, bits) = TUN_FLAGS.parse(c)?;
                    TUN_FLAGS.store(key, mask, value, bits);
                    c.expect(")")?;
                }
                "vxlan" => {
                    if !c.eat(")") {
                        c.expect("gbp(")?;
                        GBP.parse(c, key, mask)?;
                        c.expect(")")?;
                    }
                }
                "geneve" => {
                    while c.sees("{") {
                        opts.geneve.push(parse_geneve_opt(c)?);
                    }
                    c.expect(")")?;
                }
                _ => parse_carried(c, name, key, mask, opts)?,
            }
        }
        if c.list_ends()? {
            return Ok(());
        }
    }
}

/// `{class=0x102,type=0x80,len=4,0x1/0xff}`.
pub(super) fn parse_geneve_opt(c: &mut Cursor<'_>) -> Result<GeneveOpt, OdpError> {
    c.expect("{")?;
    let (mut class, mut kind, mut length) = ((0, 0), (0, 0), None);
    let (mut value, mut mask) = (None, None);
    while !c.eat("}") {
        let at = c.at();
        if c.eat("class=") {
            class = number_and_mask(c, 16)?;
        } else if c.eat("type=") {
            kind = number_and_mask(c, 8)?;
        } else if c.eat("len=") {
            let at = c.at();
            let (len, _) = number_and_mask(c, 8)?;
            if len > MAX_GENEVE_VALUE || len % 4 != 0 {
                return Err(c.error_at(at, format!("a multiple of 4 up to {MAX_GENEVE_VALUE} expected")));
            }
            length = Some(len as usize);
        } else if c.rest().starts_with(|next: char| next.is_ascii_digit()) {
            let Some(length) = length else {
                return Err(c.error("len must come before the value"));
            };
            value = Some(geneve_bytes(c, length)?);
            mask = if c.eat("/") { Some(geneve_bytes(c, length)?) } else { Some(vec![0xff; length]) };
        } else {
            return Err(c.error_at(at, "class=, type=, len= or a value expected"));
        }
        if !c.eat(",") && !c.sees("}") {
            return Err(c.error("',' or '}' expected"));
        }
    }
    let length = length.unwrap_or(0);
    let mask = mask.unwrap_or(vec![0; length]);
    let mut value = value.unwrap_or(vec![0; length]);
    value.iter_mut().zip(&mask).for_each(|(byte, mask)| *byte &= mask);
    Ok(GeneveOpt {
        class: ((class.0 & class.1) as u16, class.1 as u16),
        kind: ((kind.0 & kind.1) as u8, kind.1 as u8),
        value,
        mask,
    })
}

fn number_and_mask(c: &mut Cursor<'_>, bits: u32) -> Result<(u128, u128), OdpError> {
    let value = c.number(bits)?;
    Ok((value, if c.eat("/") { c.number(bits)? } else { ones(bits) }))
}

/// A number as `length` bytes, leading zeros left out as OVS does.
fn geneve_bytes(c: &mut Cursor<'_>, length: usize) -> Result<Vec<u8>, OdpError> {
    let at = c.at();
    let bytes = if c.sees("0x") { c.hex_bytes()? } else { c.number(128)?.to_be_bytes().to_vec() };
    let first = bytes.iter().position(|&byte| byte != 0).unwrap_or(bytes.len());
    let bytes = &bytes[first..];
    if bytes.len() > length {
        return Err(c.error_at(at, format!("does not fit in {length} bytes")));
    }
    let mut padded = vec![0; length - bytes.len()];
    padded.extend_from_slice(bytes);
    Ok(padded)
}

/// `erspan(…)` and `gtpu(…)`. The index of ERSPAN version 1 has its place in the key; the rest is checked and carried as
/// text.
fn parse_carried(
    c: &mut Cursor<'_>,
    name: &str,
    key: &mut Key,
    mask: &mut Mask,
    opts: &mut TunnelOpts,
) -> Result<(), OdpError> {
    let known: &[(&str, u32)] = match name {
        "erspan" => &[("ver", 8), ("idx", 32), ("dir", 8), ("hwid", 8)],
        _ => &[("flags", 8), ("msgtype", 8)],
    };
    let start = c.rest();
    let mut given = Vec::new();
    if !c.sees(")") {
        loop {
            let at = c.at();
            let word = c.word();
            let Some(&(word, bits)) = known.iter().find(|(known, _)| *known == word) else {
                return Err(c.error_at(at, format!("no field of {name} is called '{word}'")));
            };
            c.expect("=")?;
            let (value, bits_of) = number_and_mask(c, bits)?;
            given.push((word, value, bits_of));
            if !c.eat(",") {
                break;
            }
        }
    }
    let text = &start[..start.len() - c.rest().len()];
    c.expect(")")?;
    match given[..] {
        [("ver", 1, 0xff), ("idx", value, bits)] if bits != 0 => ERSPAN_INDEX.store(key, mask, value, bits),
        _ => {
            let text = format!("{name}({text})");
            opts.other = Some(match opts.other.take() {
                Some(earlier) => format!("{earlier},{text}"),
                None => text,
            });
        }
    }
    Ok(())
}

/// `tunnel(…)`, or nothing if nothing of it is matched.
pub(super) fn format_tunnel(key: &Key, mask: &Mask, opts: &TunnelOpts) -> Option<String> {
    let mut items = Vec::new();
    let fields = format_parts(TUNNEL.parts, key, mask);
    if !fields.is_empty() {
        items.push(fields);
    }
    if let Some(gbp) = GBP.format(key, mask) {
        items.push(format!("vxlan({gbp})"));
    }
    if !opts.geneve.is_empty() {
        items.push(format!("geneve({})", opts.geneve.iter().map(format_geneve_opt).collect::<String>()));
    }
    if ERSPAN_INDEX.bits_of(mask) != 0 {
        items.push(format!("erspan(ver=1,idx={})", ERSPAN_INDEX.format_value(key, mask)));
    }
    items.extend(opts.other.clone());
    if TUN_FLAGS.bits_of(mask) != 0 {
        items.push(format!("flags({})", TUN_FLAGS.format_value(key, mask)));
    }
    (!items.is_empty()).then(|| format!("tunnel({})", items.join(",")))
}

fn format_geneve_opt(opt: &GeneveOpt) -> String {
    let mut items = Vec::new();
    for (name, value, mask, all) in [
        ("class", opt.class.0, opt.class.1, u16::MAX),
        ("type", opt.kind.0 as u16, opt.kind.1 as u16, u8::MAX as u16),
    ] {
        if mask != 0 {
            let mask = if mask == all { String::new() } else { format!("/{}", format_hex(mask as u128)) };
            items.push(format!("{name}={}{mask}", format_hex(value as u128)));
        }
    }
    items.push(format!("len={}", opt.value.len()));
    if opt.mask.iter().any(|&byte| byte != 0) {
        let exact = opt.mask.iter().all(|&byte| byte == 0xff);
        let mask = if exact { String::new() } else { format!("/{}", format_bytes(&opt.mask)) };
        items.push(format!("{}{mask}", format_bytes(&opt.value)));
    }
    format!("{{{}}}", items.join(","))
}

/// Bytes as one hexadecimal number without leading zeros.
fn format_bytes(bytes: &[u8]) -> String {
    let digits: String = bytes.iter().map(|byte| format!("{byte:02x}")).collect();
    let digits = digits.trim_start_matches('0');
    if digits.is_empty() { "0".into() } else { format!("0x{digits}") }
}
