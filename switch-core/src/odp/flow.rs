//! Flows: reading what a flow matches, and printing it.

use super::cursor::{Cursor, is_port_char};
use super::error::{OdpError, OdpErrorKind};
use super::groups::{GROUPS, Group, MPLS_PARTS, Part, Place, VLAN, find_group, format_parts};
use super::prerequisites::{Named, complete};
use super::tunnel::{format_tunnel, parse_tunnel};
use crate::flow::{Match, PortNames, Ufid};
use crate::key::{ETH_P_802_2, ETH_P_8021AD, ETH_P_8021Q, Field, Key, Mask, VLAN_PRESENT};
use crate::tunnel::match_options;

/// VLAN tags that the key holds, outer first: TPID and TCI.
const TAGS: [(Field, Field); 2] = [(Field::VlanTpid, Field::VlanTci), (Field::CvlanTpid, Field::CvlanTci)];
/// What userspace OVS calls a frame without an ethertype (`FLOW_DL_TYPE_NONE`).
const OVS_DL_TYPE_NONE: u16 = 0x05ff;
/// Below this, a type field is a length (IEEE 802.3 §3.2.6).
const ETH_TYPE_MIN: u16 = 0x0600;

fn is_vlan(tpid: u16) -> bool {
    tpid == ETH_P_8021Q || tpid == ETH_P_8021AD
}

/// A flow as far as it has been read.
pub(super) struct FlowParser<'n> {
    names: &'n dyn PortNames,
    matches: Match,
    named: Vec<Named>,
    /// Names seen, with the number of tags around those that may come once per tag.
    seen: Vec<(usize, &'static str)>,
}

/// What was read between two parentheses of `encap`, or outside of all.
#[derive(Default)]
struct Level {
    /// Value, mask, place in the text.
    eth_type: Option<(u16, u16, usize)>,
    /// Value and mask of the TCI, place in the text.
    vlan: Option<(u16, u16, usize)>,
    /// Place in the text; whether it holds nothing.
    encap: Option<(usize, bool)>,
    /// The first key of what a tag encapsulates.
    network: Option<(usize, &'static str)>,
}

impl<'n> FlowParser<'n> {
    pub fn new(names: &'n dyn PortNames) -> Self {
        FlowParser { names, matches: Match::default(), named: Vec::new(), seen: Vec::new() }
    }

    /// Reads to the end of the text, or to the statistics of a dumped flow.
    ///
    /// A flow that a datapath printed (`dumped`) without `eth()` is one of packets that begin with their network header,
    /// as a layer 3 tunnel delivers them.
    pub fn parse(mut self, c: &mut Cursor<'_>, dumped: bool) -> Result<(Match, Option<Ufid>), OdpError> {
        c.separators();
        let ufid = if c.eat("ufid:") { Some(parse_ufid(c)?) } else { None };
        let empty = self.level(c, 0)?;
        if c.sees(")") {
            return Err(c.error("')' without '('"));
        }
        if empty && ufid.is_none() {
            return Err(c.error("a flow expected, for example in_port(vm1),eth()"));
        }
        complete(c, &mut self.matches, &self.named)?;
        let Match { key, mask, .. } = &mut self.matches;
        let has_link = self.seen.iter().any(|&(_, name)| name == "eth" || name == "packet_type");
        if dumped && !has_link && mask.is_exact(Field::EthType) {
            key.set(Field::PacketType, 1 << 16 | key.eth_type() as u128);
            mask.set_exact(Field::PacketType);
        }
        Ok((self.matches, ufid))
    }

    /// Reads keys to the closing parenthesis (which stays) or the end, behind `tags` VLAN tags; tells whether there were
    /// none.
    fn level(&mut self, c: &mut Cursor<'_>, tags: usize) -> Result<bool, OdpError> {
        let mut level = Level::default();
        let mut empty = true;
        loop {
            c.separators();
            if c.is_end() || c.sees(")") || (tags == 0 && c.sees_metadata()) {
                break;
            }
            self.item(c, tags, &mut level)?;
            empty = false;
        }
        match level.vlan {
            Some(vlan) => self.settle_tag(c, tags, &level, vlan)?,
            None => self.settle_untagged(c, tags, &level)?,
        }
        Ok(empty)
    }

    /// Reads one key.
    fn item(&mut self, c: &mut Cursor<'_>, tags: usize, level: &mut Level) -> Result<(), OdpError> {
        let at = c.at();
        let word = c.word();
        if word.is_empty() {
            return Err(c.error("the name of a key expected"));
        }
        let own: &[&'static str] = &["eth_type", "vlan", "encap", "in_port", "tunnel", "nd_ext"];
        let group = find_group(word);
        let Some(name) = group.map(|g| g.name).or(own.iter().copied().find(|&known| known == word)) else {
            return Err(c.error_at(at, format!("no key is called '{word}'")));
        };
        let per_tag = matches!(name, "eth_type" | "vlan" | "encap");
        let place = if per_tag { tags } else { 0 };
        if self.seen.contains(&(place, name)) {
            return Err(c.error_at(at, format!("{name} given twice")));
        }
        self.seen.push((place, name));
        let outside =
            matches!(name, "in_port" | "tunnel") || group.is_some_and(|g| g.place != Place::Network);
        if outside && tags > 0 {
            return Err(c.error_at(at, format!("{name} does not belong inside encap(…)")));
        }
        c.expect("(")?;
        let Match { key, mask, tunnel } = &mut self.matches;
        match name {
            "in_port" => self.in_port(c)?,
            "tunnel" => {
                parse_tunnel(c, key, mask, tunnel)?;
                // If they do not fit, the flow is not for the tables.
                match_options(&mut self.matches);
            }
            "eth_type" => {
                let value = c.number(16)? as u16;
                let bits = if c.eat("/") { c.number(16)? as u16 } else { u16::MAX };
                c.expect(")")?;
                level.eth_type = Some((value & bits, bits, at));
            }
            "vlan" => {
                let (tci, bits) = parse_vlan(c)?;
                level.vlan = Some((tci, bits, at));
            }
            "encap" => {
                c.enter()?;
                if tags == TAGS.len() {
                    return Err(c.error_at(at, "more than two VLAN tags"));
                }
                let empty = self.level(c, tags + 1)?;
                c.leave();
                c.expect(")")?;
                level.encap = Some((at, empty));
            }
            "nd_ext" => parse_nd_ext(c, at)?,
            _ => {
                let Some(group) = group else { return Ok(()) };
                let asks = match name {
                    "mpls" => parse_mpls(c, group, key, mask)?,
                    _ => group.parse(c, key, mask)?,
                };
                self.named.push(Named { group, at, asks });
                if group.place == Place::Network {
                    level.network.get_or_insert((at, name));
                }
            }
        }
        Ok(())
    }

    /// `in_port(NAME)`: always exact, as the kernel has it.
    fn in_port(&mut self, c: &mut Cursor<'_>) -> Result<(), OdpError> {
        let at = c.at();
        let name = c.take_while(is_port_char);
        if name.is_empty() {
            return Err(c.error("the name of a port expected"));
        }
        let mask_at = c.at();
        if c.eat("/") && c.number(32)? != u32::MAX as u128 {
            return Err(c.error_at(mask_at, "in_port is always matched exactly"));
        }
        c.expect(")")?;
        let Some(port) = self.names.by_name(name) else {
            return Err(c.error_of(OdpErrorKind::UnknownPort, at, format!("no port is called '{name}'")));
        };
        self.matches.key.set(Field::InPort, port.slot as u128);
        self.matches.mask.set_exact(Field::InPort);
        Ok(())
    }

    /// The level has a tag: its ethertype is the tag's TPID.
    fn settle_tag(
        &mut self,
        c: &Cursor<'_>,
        tags: usize,
        level: &Level,
        (tci, tci_mask, at): (u16, u16, usize),
    ) -> Result<(), OdpError> {
        let Some(&(tpid_field, tci_field)) = TAGS.get(tags) else {
            return Err(c.error_at(at, "more than two VLAN tags"));
        };
        let (tpid, tpid_mask, type_at) = level.eth_type.unwrap_or((ETH_P_8021Q, u16::MAX, at));
        let refuse = |at, message| Err(c.error_of(OdpErrorKind::Prerequisite, at, message));
        if tpid_mask == u16::MAX && !is_vlan(tpid) {
            let message = format!("{tpid:#06x} is not a VLAN's; put eth_type({tpid:#06x}) inside encap(…)");
            return refuse(type_at, message);
        }
        if let Some((at, name)) = level.network {
            return refuse(at, format!("behind vlan(…), {name} belongs inside encap(…)"));
        }
        let (key, mask) = (&mut self.matches.key, &mut self.matches.mask);
        let untagged_from = |key: &mut Key, mask: &mut Mask, tags: usize| {
            for (_, tci) in &TAGS[tags..] {
                key.set(*tci, 0);
                mask.set_exact(*tci);
            }
        };
        if (tci, tci_mask, tpid_mask) == (0, u16::MAX, u16::MAX) {
            // A TPID and no TCI behind it: the frame ends inside the tag, and the TPID is all there is of an ethertype.
            if let Some((at, false)) = level.encap {
                return refuse(at, "a truncated VLAN tag encapsulates nothing".into());
            }
            untagged_from(key, mask, tags);
            key.set(Field::EthType, tpid as u128);
            mask.set_exact(Field::EthType);
            return Ok(());
        }
        key.set(tpid_field, tpid as u128);
        mask.set(tpid_field, tpid_mask as u128);
        key.set(tci_field, tci as u128);
        mask.set(tci_field, tci_mask as u128);
        if level.encap.is_none() {
            untagged_from(key, mask, tags + 1);
        }
        Ok(())
    }

    /// The level has no tag: absent means that there is none, not that any will do.
    fn settle_untagged(&mut self, c: &Cursor<'_>, tags: usize, level: &Level) -> Result<(), OdpError> {
        if let Some((at, _)) = level.encap {
            return Err(c.error_of(OdpErrorKind::Prerequisite, at, "encap needs vlan(…) before it"));
        }
        let (key, mask) = (&mut self.matches.key, &mut self.matches.mask);
        for (_, tci) in &TAGS[tags..] {
            mask.set_exact(*tci);
        }
        let Some((value, bits, at)) = level.eth_type else { return Ok(()) };
        let value = match value {
            0 | OVS_DL_TYPE_NONE if bits == u16::MAX => ETH_P_802_2,
            value => value,
        };
        if bits == u16::MAX && value < ETH_TYPE_MIN && value != ETH_P_802_2 {
            return Err(c.error_at(at, format!("{value:#06x} is a length, not an ethertype")));
        }
        if bits == u16::MAX && is_vlan(value) && tags == 0 {
            let message = "a VLAN's ethertype needs vlan(…): vlan() for any tag, or vlan(vid=N)";
            return Err(c.error_of(OdpErrorKind::Prerequisite, at, message));
        }
        if bits == u16::MAX
            && is_vlan(value)
            && let Some(&(tpid, tci)) = TAGS.get(tags)
        {
            // As far as OVS reads with its `vlan-limit`: there is another tag, whatever it and what is behind it may be.
            if let Some((at, name)) = level.network {
                let message = format!("behind a VLAN's ethertype, {name} needs vlan(…)");
                return Err(c.error_of(OdpErrorKind::Prerequisite, at, message));
            }
            key.set(tpid, value as u128);
            mask.set_exact(tpid);
            key.set(tci, VLAN_PRESENT as u128);
            mask.set(tci, VLAN_PRESENT as u128);
            return Ok(());
        }
        key.set(Field::EthType, value as u128);
        mask.set(Field::EthType, bits as u128);
        Ok(())
    }
}

/// `xxxxxxxx-xxxx-xxxx-xxxx-xxxxxxxxxxxx`.
fn parse_ufid(c: &mut Cursor<'_>) -> Result<Ufid, OdpError> {
    let at = c.at();
    let text = c.take_while(|next| next.is_ascii_alphanumeric() || next == '-');
    let shape = text.split('-').map(str::len).eq([8, 4, 4, 4, 12]);
    let digits = text.replace('-', "");
    match u128::from_str_radix(&digits, 16) {
        Ok(ufid) if shape && digits.bytes().all(|b| b.is_ascii_hexdigit()) => Ok(Ufid(ufid)),
        _ => Err(c.error_at(at, "a UFID expected, as 01234567-89ab-cdef-0123-456789abcdef")),
    }
}

/// The TCI of `vlan(…)`: a tag that is present, unless `cfi` or `tci` say otherwise.
fn parse_vlan(c: &mut Cursor<'_>) -> Result<(u16, u16), OdpError> {
    let (mut key, mut mask) = (Key::default(), Mask::EMPTY);
    key.set(Field::VlanTci, VLAN_PRESENT as u128);
    mask.set(Field::VlanTci, VLAN_PRESENT as u128);
    let mut seen = Vec::new();
    VLAN.parse_parts(c, |part, value, bits| {
        if seen.contains(&part.name) {
            return Err(format!("{} given twice", part.name));
        }
        if part.name == "tci" && !seen.is_empty() || seen.contains(&"tci") {
            return Err("tci is the whole tag: no other field may be given".into());
        }
        seen.push(part.name);
        part.store(&mut key, &mut mask, value, bits);
        Ok(())
    })?;
    Ok((key.get(Field::VlanTci) as u16, mask.get(Field::VlanTci) as u16))
}

/// Label stack entries, top first; a field that comes again begins the next.
///
/// Several entries also say that the stack is at least that deep (the key counts no more than it holds); the first one's
/// presence follows from the ethertype.
fn parse_mpls(c: &mut Cursor<'_>, group: &Group, key: &mut Key, mask: &mut Mask) -> Result<bool, OdpError> {
    let mut entry = 0;
    let mut seen: Vec<&str> = Vec::new();
    let mut asks = false;
    let empty = group.parse_parts(c, |part, value, bits| {
        if seen.contains(&part.name) {
            entry += 1;
            seen.clear();
        }
        seen.push(part.name);
        let Some(parts) = MPLS_PARTS.get(entry) else {
            return Err(format!("more than {} MPLS labels", MPLS_PARTS.len()));
        };
        asks |= bits != 0;
        parts.iter().filter(|own| own.name == part.name).for_each(|own| own.store(key, mask, value, bits));
        Ok(())
    })?;
    if entry > 0 {
        // 2 and 3 have the same upper bit; 3 is the most that is counted.
        let count = entry as u128 + 1;
        key.set(Field::MplsCount, count);
        mask.set(Field::MplsCount, count);
        asks = true;
    }
    Ok(asks || empty)
}

/// `nd_ext(…)`: the key has no place for it, so it may only be wildcards.
fn parse_nd_ext(c: &mut Cursor<'_>, at: usize) -> Result<(), OdpError> {
    if c.eat(")") {
        return Ok(());
    }
    loop {
        let field_at = c.at();
        if !matches!(c.word(), "nd_reserved" | "nd_options_type") {
            return Err(c.error_at(field_at, "'nd_reserved' or 'nd_options_type' expected"));
        }
        c.expect("=")?;
        c.number(32)?;
        if !c.eat("/") || c.number(32)? != 0 {
            return Err(c.error_at(at, "options of neighbour discovery cannot be matched"));
        }
        if c.list_ends()? {
            return Ok(());
        }
    }
}

/// The name of the port in `slot` if it can be read back, else its number.
pub(super) fn format_port(names: &dyn PortNames, slot: u32) -> String {
    let readable = |name: &String| {
        !name.is_empty()
            && name.chars().all(is_port_char)
            && !super::actions::is_keyword(name)
            && names.by_name(name).is_some_and(|port| port.slot == slot)
    };
    names.name(slot).filter(readable).unwrap_or_else(|| slot.to_string())
}

/// A flow's text; see [`super::format_flow`].
pub(super) fn format(m: &Match, names: &dyn PortNames) -> String {
    let Match { key, mask, tunnel } = m;
    let mut items = Vec::new();
    let mut network = Vec::new();
    for group in GROUPS {
        let is_shown = group_fits(group, m) || is_stray(group, m);
        let text = match group.name {
            _ if !is_shown => None,
            "mpls" => format_mpls(key, mask),
            _ => group.format(key, mask),
        };
        match group.place {
            Place::Network => network.extend(text),
            _ => items.extend(text),
        }
        match group.name {
            "skb_priority" => items.extend(format_tunnel(key, mask, tunnel)),
            "ct_tuple6" if mask.has(Field::InPort) => {
                items.push(format!("in_port({})", format_port(names, key.get(Field::InPort) as u32)));
            }
            _ => {}
        }
    }
    let links = format_links(m, network);
    if !links.is_empty() {
        items.push(links);
    }
    if items.is_empty() { "eth()".into() } else { items.join(",") }
}

/// Whether the flow has what the group's fields need.
fn group_fits(group: &Group, m: &Match) -> bool {
    let eth_type = group.ethertypes.is_empty()
        || m.mask.is_exact(Field::EthType) && group.ethertypes.contains(&m.key.eth_type());
    let exact_proto = m.mask.is_exact(Field::IpProto);
    eth_type && group.proto.is_none_or(|proto| exact_proto && m.key.ip_proto() == proto)
}

/// Whether the group is the first that could show a field which, for want of prerequisites, no group may: better a text
/// that is completed when read than one that hides what is matched.
fn is_stray(group: &Group, m: &Match) -> bool {
    group.fields().filter(|&field| m.mask.has(field)).any(|field| {
        let mut holders = GROUPS.iter().filter(|other| other.fields().any(|f| f == field));
        let first = holders.clone().next();
        !holders.any(|other| group_fits(other, m)) && first.is_some_and(|first| std::ptr::eq(first, group))
    })
}

/// VLAN tags, ethertype and what is behind it.
fn format_links(m: &Match, network: Vec<String>) -> String {
    let (key, mask) = (&m.key, &m.mask);
    let says_nothing =
        |&(tpid, tci): &(Field, Field)| !mask.has(tpid) && mask.is_exact(tci) && key.get(tci) == 0;
    let tags = TAGS.len() - TAGS.iter().rev().take_while(|tag| says_nothing(tag)).count();

    let mut items = Vec::new();
    let eth_type = key.eth_type();
    match mask.get(Field::EthType) as u16 {
        0 => {}
        u16::MAX if eth_type == ETH_P_802_2 => items.push("eth_type(0/0xffff)".into()),
        u16::MAX if is_vlan(eth_type) && tags < TAGS.len() => {
            items.push(format!("eth_type({eth_type:#06x}),vlan(vid=0,pcp=0,cfi=0),encap()"));
        }
        bits => items.push(format_eth_type(eth_type, bits)),
    }
    items.extend(network);
    let mut text = items.join(",");
    for &(tpid, tci) in TAGS[..tags].iter().rev() {
        let tpid = format_eth_type(key.get(tpid) as u16, mask.get(tpid) as u16);
        let vlan = format_vlan(key.get(tci) as u16, mask.get(tci) as u16);
        text = format!("{tpid},{vlan},encap({text})");
    }
    text
}

fn format_eth_type(value: u16, bits: u16) -> String {
    match bits {
        u16::MAX => format!("eth_type({value:#06x})"),
        0 => "eth_type(0/0)".into(),
        bits => format!("eth_type({value:#06x}/{bits:#06x})"),
    }
}

fn format_vlan(tci: u16, bits: u16) -> String {
    let (mut key, mut mask) = (Key::default(), Mask::EMPTY);
    key.set(Field::VlanTci, tci as u128);
    mask.set(Field::VlanTci, bits as u128);
    if tci & bits & VLAN_PRESENT != 0 {
        return format!("vlan({})", format_parts(&VLAN.parts[..2], &key, &mask));
    }
    match bits {
        u16::MAX => format!("vlan(tci={tci:#06x})"),
        bits => format!("vlan(tci={tci:#06x}/{bits:#06x})"),
    }
}

fn format_mpls(key: &Key, mask: &Mask) -> Option<String> {
    let looks = |parts: &[Part; 4]| parts.iter().any(|part| part.bits_of(mask) != 0);
    let counted = (key.get(Field::MplsCount) & mask.get(Field::MplsCount)) as usize;
    let matched = MPLS_PARTS.iter().rposition(looks).map_or(0, |last| last + 1);
    let entries = counted.max(matched).min(MPLS_PARTS.len());
    let text = |parts: &[Part; 4]| {
        let named = |part: &Part| format!("{}={}", part.name, part.format_value(key, mask));
        parts.iter().map(named).collect::<Vec<_>>().join(",")
    };
    let texts: Vec<String> = MPLS_PARTS[..entries].iter().map(text).collect();
    (entries > 0).then(|| format!("mpls({})", texts.join(",")))
}

/// Whether the flow says by which port its packets come in, as a flow that is added must.
///
/// # Errors
/// [`OdpErrorKind::Prerequisite`] at the start of `text`.
pub fn require_in_port(matches: &Match, text: &str) -> Result<(), OdpError> {
    if matches.mask.is_exact(Field::InPort) {
        return Ok(());
    }
    Err(OdpError::new(OdpErrorKind::Prerequisite, text, 0, "the flow needs in_port(…)".into()))
}
