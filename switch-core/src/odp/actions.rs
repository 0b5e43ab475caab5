//! Actions: reading them.

use super::cursor::{Cursor, is_port_char};
use super::error::OdpError;
use super::groups::{GROUPS, Group, Part, find_group};
use super::nat;
use super::tunnel::{parse_tunnel, tunnel_fields};
use crate::action::{Action, Ct, FieldSet, PortRef, Psample, SetGroup, TunnelOpts, Userspace};
use crate::flow::PortNames;
use crate::key::{ETH_P_8021Q, Field, Key, Mask, VLAN_PRESENT};

/// The groups that `set` may name.
pub(super) const SET_GROUPS: [(SetGroup, &str); 14] = [
    (SetGroup::Eth, "eth"),
    (SetGroup::Ipv4, "ipv4"),
    (SetGroup::Ipv6, "ipv6"),
    (SetGroup::Tcp, "tcp"),
    (SetGroup::Udp, "udp"),
    (SetGroup::Sctp, "sctp"),
    (SetGroup::Icmp, "icmp"),
    (SetGroup::Icmpv6, "icmpv6"),
    (SetGroup::Arp, "arp"),
    (SetGroup::Nd, "nd"),
    (SetGroup::Mpls, "mpls"),
    (SetGroup::Nsh, "nsh"),
    (SetGroup::SkbMark, "skb_mark"),
    (SetGroup::SkbPriority, "skb_priority"),
];

/// Longest cookie of psample (`OVS_PSAMPLE_COOKIE_MAX_SIZE`).
const MAX_COOKIE: usize = 16;
/// Longest metadata of an NSH header (RFC 8300 §2.2: 63 words less the two of the base header's).
const MAX_NSH_METADATA: usize = 244;
/// NSH metadata types (RFC 8300 §2.2).
pub(super) const NSH_MD_TYPES: [u128; 2] = [1, 2];

/// Whether `word` is an action when it stands alone, so that no port can be named by it.
pub(super) fn is_keyword(word: &str) -> bool {
    matches!(word, "drop" | "ct" | "ct_clear" | "pop_vlan" | "pop_eth" | "pop_nsh")
}

/// The probability that a percentage stands for, in 2^32nds; `u32::MAX` is always.
pub(super) fn probability(percent: f64) -> u32 {
    (u32::MAX as f64 * (percent / 100.0) + 0.5).floor() as u32
}

/// Reads actions to the closing parenthesis (which stays) or the end; in a dumped flow (`dumped`), also to metadata that
/// follows the actions. `drop` alone is the empty list.
pub(super) fn parse_list(
    c: &mut Cursor<'_>,
    names: &dyn PortNames,
    dumped: bool,
) -> Result<Vec<Action>, OdpError> {
    let mut actions = Vec::new();
    let mut only_drop = true;
    loop {
        let spaced = c.separators();
        if c.is_end() || c.sees(")") || (dumped && spaced && c.sees_metadata()) {
            break;
        }
        let (action, bare_drop) = parse_action(c, names)?;
        only_drop &= bare_drop && actions.is_empty();
        actions.push(action);
    }
    if only_drop {
        actions.clear();
    }
    Ok(actions)
}

/// Reads a list that begins behind a parenthesis and takes the one that closes it.
fn parse_nested(c: &mut Cursor<'_>, names: &dyn PortNames) -> Result<Vec<Action>, OdpError> {
    c.enter()?;
    let actions = parse_list(c, names, false)?;
    c.leave();
    c.expect(")")?;
    Ok(actions)
}

/// Reads one action; tells whether it is the word `drop`.
fn parse_action(c: &mut Cursor<'_>, names: &dyn PortNames) -> Result<(Action, bool), OdpError> {
    let at = c.at();
    let word = c.take_while(is_port_char);
    if word.is_empty() {
        return Err(c.error("an action expected"));
    }
    if is_keyword(word) && !c.sees("(") || c.eat("()") {
        let action = match word {
            "drop" => Action::Drop(0),
            "ct" => Action::Ct(Ct::default()),
            "ct_clear" => Action::CtClear,
            "pop_vlan" => Action::PopVlan,
            "pop_eth" => Action::PopEth,
            "pop_nsh" => Action::PopNsh,
            "clone" => Action::Clone(Vec::new()),
            _ => return Err(c.error_at(at, format!("'{word}' is no action, or needs arguments"))),
        };
        return Ok((action, word == "drop"));
    }
    if !c.eat("(") {
        return Ok((Action::Output(port_ref(names, word)), false));
    }
    let action = match word {
        "drop" => Action::Drop(single(c, 32)? as u32),
        "recirc" => Action::Recirc(single(c, 32)? as u32),
        "trunc" => Action::Trunc(single(c, 32)? as u32),
        "meter" => Action::Meter(single(c, 32)? as u32),
        "lb_output" => Action::LbOutput(single(c, 32)? as u32),
        "tnl_pop" => Action::TnlPop(parse_port(c, names).and_then(|port| c.expect(")").map(|()| port))?),
        "tnl_push" => Action::TnlPush(c.balanced()?.to_owned()),
        "userspace" => parse_userspace(c, names)?,
        "set" => parse_set(c)?,
        "push_vlan" => parse_push_vlan(c)?,
        "push_eth" => parse_push_eth(c)?,
        "push_mpls" | "add_mpls" | "pop_mpls" => parse_mpls(c, word)?,
        "push_nsh" => parse_push_nsh(c)?,
        "hash" => parse_hash(c)?,
        "ct" => parse_ct(c)?,
        "psample" => parse_psample(c)?,
        "clone" => Action::Clone(parse_nested(c, names)?),
        "sample" => parse_sample(c, names)?,
        "check_pkt_len" => {
            c.expect("size=")?;
            let size = c.number(16)? as u16;
            c.expect(",gt(")?;
            let greater = parse_nested(c, names)?;
            c.expect(",le(")?;
            let less_equal = parse_nested(c, names)?;
            c.expect(")")?;
            Action::CheckPktLen { size, greater, less_equal }
        }
        "dec_ttl" => {
            c.expect("le_1(")?;
            let actions = parse_nested(c, names)?;
            c.expect(")")?;
            Action::DecTtl(actions)
        }
        _ => return Err(c.error_at(at, format!("no action is called '{word}'"))),
    };
    Ok((action, false))
}

/// A number of `bits` bits and the closing parenthesis.
fn single(c: &mut Cursor<'_>, bits: u32) -> Result<u128, OdpError> {
    let value = c.number(bits)?;
    c.expect(")")?;
    Ok(value)
}

fn port_ref(names: &dyn PortNames, name: &str) -> PortRef {
    names.by_name(name).map_or_else(|| PortRef::Foreign(name.to_owned()), PortRef::Ours)
}

fn parse_port(c: &mut Cursor<'_>, names: &dyn PortNames) -> Result<PortRef, OdpError> {
    match c.take_while(is_port_char) {
        "" => Err(c.error("the name of a port expected")),
        name => Ok(port_ref(names, name)),
    }
}

/// Fields to the closing parenthesis: `name=value`, or a bare name from `flags`. Each is given to `field`, which reads
/// what follows the name, or says no to the name.
fn parse_fields<'a>(
    c: &mut Cursor<'a>,
    flags: &[&str],
    mut field: impl FnMut(&mut Cursor<'a>, &'a str) -> Result<bool, OdpError>,
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
        if !flags.contains(&name) {
            c.expect("=")?;
        }
        if !field(c, name)? {
            return Err(c.error_at(at, format!("'{name}' is not known here")));
        }
        if c.list_ends()? {
            return Ok(());
        }
    }
}

/// `userspace(pid=N[,COOKIE][,actions][,tunnel_out_port=PORT])`.
fn parse_userspace(c: &mut Cursor<'_>, names: &dyn PortNames) -> Result<Action, OdpError> {
    c.expect("pid=")?;
    let mut userspace = Userspace { pid: c.number(32)? as u32, ..Userspace::default() };
    while !c.list_ends()? {
        let at = c.at();
        let word = c.word();
        match word {
            "actions" => userspace.actions = true,
            "tunnel_out_port" => {
                c.expect("=")?;
                userspace.tunnel_out_port = Some(parse_port(c, names)?);
            }
            "sFlow" | "slow_path" | "flow_sample" | "ipfix" | "controller" | "userdata" => {
                c.expect("(")?;
                let body_at = c.at();
                let body = c.balanced()?;
                let is_hex = body.len() % 2 == 0 && body.bytes().all(|b| b.is_ascii_hexdigit());
                if word == "userdata" && !is_hex {
                    return Err(c.error_at(body_at, "pairs of hexadecimal digits expected"));
                }
                if !userspace.userdata.is_empty() {
                    return Err(c.error_at(at, "more than one cookie"));
                }
                userspace.userdata = format!("{word}({body})");
            }
            _ => return Err(c.error_at(at, format!("'{word}' is not known here"))),
        }
    }
    Ok(Action::Userspace(userspace))
}

/// `set(GROUP(…))` and `set(tunnel(…))`.
fn parse_set(c: &mut Cursor<'_>) -> Result<Action, OdpError> {
    let at = c.at();
    let name = c.word();
    let (mut key, mut mask) = (Key::default(), Mask::EMPTY);
    let action = if name == "tunnel" {
        c.expect("(")?;
        let mut opts = TunnelOpts::default();
        parse_tunnel(c, &mut key, &mut mask, &mut opts)?;
        let changed = tunnel_fields().filter(|&field| mask.has(field));
        let set = |field| FieldSet { field, value: key.get(field), mask: mask.get(field) };
        Action::SetTunnel(changed.map(set).collect(), opts)
    } else {
        let group = find_group(name);
        let known = SET_GROUPS.iter().find(|(_, known)| group.is_some_and(|group| group.name == *known));
        let (Some(group), Some(&(set_group, _))) = (group, known) else {
            return Err(c.error_at(at, format!("'{name}' cannot be set")));
        };
        c.expect("(")?;
        group.parse(c, &mut key, &mut mask)?;
        Action::Set(set_group, group.to_sets(&key, &mask))
    };
    match &action {
        Action::Set(_, sets) if sets.is_empty() => Err(c.error_at(at, "changes nothing")),
        _ => c.expect(")").map(|()| action),
    }
}

/// `push_vlan([tpid=0x8100,]vid=N,pcp=N[,cfi=N])`.
fn parse_push_vlan(c: &mut Cursor<'_>) -> Result<Action, OdpError> {
    let (mut tpid, mut vid, mut pcp, mut cfi) = (ETH_P_8021Q, None, 0, VLAN_PRESENT);
    let at = c.at();
    parse_fields(c, &[], |c, name| {
        match name {
            "tpid" => tpid = c.number(16)? as u16,
            "vid" => vid = Some(c.number(12)? as u16),
            "pcp" => pcp = c.number(3)? as u16,
            "cfi" => cfi = c.number(1)? as u16 * VLAN_PRESENT,
            _ => return Ok(false),
        }
        Ok(true)
    })?;
    let Some(vid) = vid else { return Err(c.error_at(at, "vid= is missing")) };
    Ok(Action::PushVlan { tpid, tci: pcp << 13 | cfi | vid })
}

/// `push_eth(src=MAC,dst=MAC)`; a `type` as older versions print it is ignored, as they do.
fn parse_push_eth(c: &mut Cursor<'_>) -> Result<Action, OdpError> {
    let (mut src, mut dst) = (None, None);
    let at = c.at();
    parse_fields(c, &[], |c, name| {
        match name {
            "src" => src = Some(c.mac()? as u64),
            "dst" => dst = Some(c.mac()? as u64),
            "type" => drop(c.number(16)?),
            _ => return Ok(false),
        }
        Ok(true)
    })?;
    let (Some(src), Some(dst)) = (src, dst) else {
        return Err(c.error_at(at, "src= and dst= are both needed"));
    };
    Ok(Action::PushEth { src, dst })
}

/// `push_mpls(…)`, `add_mpls(…)` and `pop_mpls(eth_type=N)`.
fn parse_mpls(c: &mut Cursor<'_>, word: &str) -> Result<Action, OdpError> {
    let (mut lse, mut ethertype, mut flags) = (0, None, 0);
    let at = c.at();
    parse_fields(c, &[], |c, name| {
        match name {
            "eth_type" => ethertype = Some(c.number(16)? as u16),
            "label" if word != "pop_mpls" => lse |= (c.number(20)? as u32) << 12,
            "tc" if word != "pop_mpls" => lse |= (c.number(3)? as u32) << 9,
            "bos" if word != "pop_mpls" => lse |= (c.number(1)? as u32) << 8,
            "ttl" if word != "pop_mpls" => lse |= c.number(8)? as u32,
            "tun_flags" if word == "add_mpls" => flags = c.number(16)? as u16,
            _ => return Ok(false),
        }
        Ok(true)
    })?;
    let Some(ethertype) = ethertype else { return Err(c.error_at(at, "eth_type= is missing")) };
    Ok(match word {
        "push_mpls" => Action::PushMpls { lse, ethertype },
        "add_mpls" => Action::AddMpls { lse, ethertype, flags },
        _ => Action::PopMpls { ethertype },
    })
}

/// The fields of an NSH header.
pub(super) fn nsh() -> impl Iterator<Item = &'static Part> {
    GROUPS.iter().filter(|group| group.name == "nsh").flat_map(|group: &Group| group.parts)
}

/// Whether a field of NSH is one of the context headers that only metadata type 1 has.
pub(super) fn is_context(part: &Part) -> bool {
    part.name.starts_with('c')
}

/// `push_nsh(…)`, with OVS's defaults for what is not given.
fn parse_push_nsh(c: &mut Cursor<'_>) -> Result<Action, OdpError> {
    let (mut key, mut mask) = (Key::default(), Mask::EMPTY);
    for part in nsh() {
        let default = match part.name {
            "ttl" => 63,
            "mdtype" => 1,
            "np" => 3,
            "si" => 255,
            _ => 0,
        };
        part.store(&mut key, &mut mask, default, u128::MAX >> (128 - part.bits));
    }
    let mut metadata = Vec::new();
    let (mut context_at, mut metadata_at) = (None, None);
    parse_fields(c, &[], |c, name| {
        let at = c.at();
        if name == "md2" {
            metadata = c.hex_bytes()?;
            metadata.resize(metadata.len().next_multiple_of(4), 0);
            if metadata.len() > MAX_NSH_METADATA {
                return Err(c.error_at(at, format!("more than {MAX_NSH_METADATA} bytes of metadata")));
            }
            metadata_at = Some(at);
            return Ok(true);
        }
        let Some(part) = nsh().find(|part| part.name == name) else { return Ok(false) };
        let value = c.number(part.bits)?;
        if name == "mdtype" && !NSH_MD_TYPES.contains(&value) {
            return Err(c.error_at(at, "metadata type 1 or 2 expected"));
        }
        if is_context(part) {
            context_at = Some(at);
        }
        part.store(&mut key, &mut mask, value, u128::MAX >> (128 - part.bits));
        Ok(true)
    })?;
    let is_type_1 = key.get(Field::NshMdType) == NSH_MD_TYPES[0];
    if let Some(at) = if is_type_1 { metadata_at } else { context_at } {
        return Err(c.error_at(at, "does not go with this mdtype"));
    }
    let mut sets: Vec<FieldSet> = Vec::new();
    for part in nsh().filter(|part| is_type_1 || !is_context(part)) {
        let field = part.field;
        if sets.last().is_none_or(|last| last.field != field) {
            sets.push(FieldSet { field, value: key.get(field), mask: mask.get(field) });
        }
    }
    Ok(Action::PushNsh(sets, metadata))
}

/// `hash(l4(BASIS))` and `hash(sym_l4(BASIS))`; older versions say `hash_l4`.
fn parse_hash(c: &mut Cursor<'_>) -> Result<Action, OdpError> {
    let at = c.at();
    let algorithm = match c.word() {
        "l4" | "hash_l4" => 0,
        "sym_l4" => 1,
        number => number.parse().map_err(|_| c.error_at(at, "'l4' or 'sym_l4' expected"))?,
    };
    c.expect("(")?;
    let basis = single(c, 32)? as u32;
    c.expect(")")?;
    Ok(Action::Hash { algorithm, basis })
}

/// `ct(…)`.
fn parse_ct(c: &mut Cursor<'_>) -> Result<Action, OdpError> {
    let mut ct = Ct::default();
    let at = c.at();
    parse_fields(c, &["commit", "force_commit", "nat"], |c, name| {
        match name {
            "commit" => ct.commit = true,
            "force_commit" => ct.force = true,
            "zone" => ct.zone = c.number(16)? as u16,
            "mark" => {
                let value = c.number(32)? as u32;
                let mask = if c.eat("/") { c.number(32)? as u32 } else { u32::MAX };
                ct.mark = (mask != 0).then_some((value, mask));
            }
            "label" => {
                let value = c.number(128)?;
                let mask = if c.eat("/") { c.number(128)? } else { u128::MAX };
                ct.label = (mask != 0).then_some((value, mask));
            }
            "helper" => ct.helper = Some(parse_name(c, 15)?),
            "timeout" => ct.timeout = Some(parse_name(c, 31)?),
            "nat" => ct.nat = Some(if c.eat("(") { nat::parse(c)? } else { String::new() }),
            _ => return Ok(false),
        }
        Ok(true)
    })?;
    if ct.commit && ct.force {
        return Err(c.error_at(at, "either commit or force_commit"));
    }
    ct.commit |= ct.force;
    Ok(Action::Ct(ct))
}

/// The name of an ALG or timeout policy, of at most `most` characters.
fn parse_name(c: &mut Cursor<'_>, most: usize) -> Result<String, OdpError> {
    let at = c.at();
    let name = c.take_while(is_port_char);
    if name.is_empty() || name.len() > most {
        return Err(c.error_at(at, format!("a name of at most {most} characters expected")));
    }
    Ok(name.to_owned())
}

/// `psample(group=N[,cookie=0x…])`.
fn parse_psample(c: &mut Cursor<'_>) -> Result<Action, OdpError> {
    let (mut group, mut cookie) = (None, Vec::new());
    let at = c.at();
    parse_fields(c, &[], |c, name| {
        let at = c.at();
        match name {
            "group" => group = Some(c.number(32)? as u32),
            "cookie" => {
                cookie = c.hex_bytes()?;
                if cookie.len() > MAX_COOKIE {
                    return Err(c.error_at(at, format!("at most {MAX_COOKIE} bytes expected")));
                }
            }
            _ => return Ok(false),
        }
        Ok(true)
    })?;
    let Some(group) = group else { return Err(c.error_at(at, "group= is missing")) };
    Ok(Action::Psample(Psample { group, cookie }))
}

/// `sample(sample=N.N%,actions(…))`.
fn parse_sample(c: &mut Cursor<'_>, names: &dyn PortNames) -> Result<Action, OdpError> {
    c.expect("sample=")?;
    let at = c.at();
    let percent = c.take_while(|next| next.is_ascii_digit() || next == '.').parse::<f64>();
    let Some(percent) = percent.ok().filter(|percent| (0.0..=100.0).contains(percent)) else {
        return Err(c.error_at(at, "a percentage expected"));
    };
    c.expect("%,actions(")?;
    let actions = parse_nested(c, names)?;
    c.expect(")")?;
    Ok(Action::Sample { probability: probability(percent), actions })
}
