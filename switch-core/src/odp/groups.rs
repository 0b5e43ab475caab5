//! The parts of a flow that are lists of fields, such as `ipv4(src=…,dst=…)`: one table says how each is named, read and
//! printed, where it lies in the key, and what it needs. Matches and `set` actions both go by it.

use super::cursor::{Cursor, ones};
use super::error::OdpError;
use crate::action::FieldSet;
use crate::key::{self, Field, Key, Mask, ipproto};
use std::net::{Ipv4Addr, Ipv6Addr};

/// How a value is written.
#[derive(Clone, Copy)]
pub(super) enum Format {
    Dec,
    Hex,
    Mac,
    Ipv4,
    Ipv6,
    /// `no`, `first` or `later`.
    Frag,
    /// 16 bits on the wire, of which the key holds the low 8.
    ArpOp,
    /// Names of bits, lowest first.
    Flags(&'static [&'static str]),
}

/// A field, or a slice of one, as the text names it.
pub(super) struct Part {
    pub name: &'static str,
    pub field: Field,
    pub shift: u32,
    pub bits: u32,
    pub format: Format,
    /// The header has fewer bits than the key's field: all of them together are an exact match of the field, so that
    /// "exact" has one representation.
    widen: bool,
}

/// Where in the packet a group's fields belong.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Place {
    Metadata,
    Link,
    Network,
}

/// A key of the ODP syntax and its fields.
pub(super) struct Group {
    pub name: &'static str,
    pub place: Place,
    /// The ethertypes that its fields exist with; any if empty. With several, the first is the default, except for IP.
    pub ethertypes: &'static [u16],
    /// The IP protocol that its fields exist with.
    pub proto: Option<u8>,
    /// Its fields; a single one without a name is the group's value itself.
    pub parts: &'static [Part],
}

/// A whole field.
pub(super) const fn part(name: &'static str, field: Field, format: Format) -> Part {
    Part { name, field, shift: 0, bits: field.place().2, format, widen: false }
}

/// A field of which the header has only the lowest bits.
const fn narrow(name: &'static str, field: Field, bits: u32, format: Format) -> Part {
    Part { name, field, shift: 0, bits, format, widen: true }
}

/// Some bits of a field.
const fn slice(name: &'static str, field: Field, shift: u32, bits: u32, format: Format) -> Part {
    Part { name, field, shift, bits, format, widen: false }
}

const fn metadata(name: &'static str, parts: &'static [Part]) -> Group {
    Group { name, place: Place::Metadata, ethertypes: &[], proto: None, parts }
}

const fn network(
    name: &'static str,
    ethertypes: &'static [u16],
    proto: Option<u8>,
    parts: &'static [Part],
) -> Group {
    Group { name, place: Place::Network, ethertypes, proto, parts }
}

/// `OVS_CS_F_*`.
const CT_STATES: &[&str] = &["new", "est", "rel", "rpl", "inv", "trk", "snat", "dnat"];
const TCP_FLAGS: &[&str] =
    &["fin", "syn", "rst", "psh", "ack", "urg", "ece", "cwr", "ns", "[200]", "[400]", "[800]"];
/// Bits of [`Field::TunFlags`].
pub(super) const TUN_FLAGS: Part =
    narrow("flags", Field::TunFlags, 4, Format::Flags(&["df", "csum", "key", "oam"]));

const IP: &[u16] = &[key::ETH_P_IP, key::ETH_P_IPV6];
const V4: &[u16] = &[key::ETH_P_IP];
const V6: &[u16] = &[key::ETH_P_IPV6];
const ARP: &[u16] = &[key::ETH_P_ARP, key::ETH_P_RARP];
const MPLS: &[u16] = &[key::ETH_P_MPLS_UC, key::ETH_P_MPLS_MC];

const PORTS: &[Part] = &[part("src", Field::TpSrc, Format::Dec), part("dst", Field::TpDst, Format::Dec)];
const ICMP: &[Part] =
    &[narrow("type", Field::TpSrc, 8, Format::Dec), narrow("code", Field::TpDst, 8, Format::Dec)];

/// Every group in the order in which a flow is printed. `tunnel`, `in_port`, `eth_type`, `vlan` and `encap` are not here.
pub(super) static GROUPS: &[Group] = &[
    metadata("recirc_id", &[part("", Field::RecircId, Format::Hex)]),
    metadata("dp_hash", &[part("", Field::DpHash, Format::Hex)]),
    metadata("skb_priority", &[part("", Field::SkbPriority, Format::Hex)]),
    metadata("skb_mark", &[part("", Field::SkbMark, Format::Hex)]),
    metadata("ct_state", &[narrow("", Field::CtState, 8, Format::Flags(CT_STATES))]),
    metadata("ct_zone", &[part("", Field::CtZone, Format::Hex)]),
    metadata("ct_mark", &[part("", Field::CtMark, Format::Hex)]),
    metadata("ct_label", &[part("", Field::CtLabel, Format::Hex)]),
    Group {
        name: "ct_tuple4",
        place: Place::Metadata,
        ethertypes: V4,
        proto: None,
        parts: &[
            part("src", Field::CtOrigIpv4Src, Format::Ipv4),
            part("dst", Field::CtOrigIpv4Dst, Format::Ipv4),
            part("proto", Field::CtOrigProto, Format::Dec),
            part("tp_src", Field::CtOrigTpSrc, Format::Dec),
            part("tp_dst", Field::CtOrigTpDst, Format::Dec),
        ],
    },
    Group {
        name: "ct_tuple6",
        place: Place::Metadata,
        ethertypes: V6,
        proto: None,
        parts: &[
            part("src", Field::CtOrigIpv6Src, Format::Ipv6),
            part("dst", Field::CtOrigIpv6Dst, Format::Ipv6),
            part("proto", Field::CtOrigProto, Format::Dec),
            part("tp_src", Field::CtOrigTpSrc, Format::Dec),
            part("tp_dst", Field::CtOrigTpDst, Format::Dec),
        ],
    },
    Group {
        name: "packet_type",
        place: Place::Link,
        ethertypes: &[],
        proto: None,
        parts: &[
            slice("ns", Field::PacketType, 16, 16, Format::Dec),
            slice("id", Field::PacketType, 0, 16, Format::Hex),
        ],
    },
    Group {
        name: "eth",
        place: Place::Link,
        ethertypes: &[],
        proto: None,
        parts: &[part("src", Field::EthSrc, Format::Mac), part("dst", Field::EthDst, Format::Mac)],
    },
    network("mpls", MPLS, None, &MPLS_PARTS[0]),
    network(
        "ipv4",
        V4,
        None,
        &[
            part("src", Field::Ipv4Src, Format::Ipv4),
            part("dst", Field::Ipv4Dst, Format::Ipv4),
            part("proto", Field::IpProto, Format::Dec),
            part("tos", Field::IpTos, Format::Hex),
            part("ttl", Field::IpTtl, Format::Dec),
            part("frag", Field::IpFrag, Format::Frag),
        ],
    ),
    network(
        "ipv6",
        V6,
        None,
        &[
            part("src", Field::Ipv6Src, Format::Ipv6),
            part("dst", Field::Ipv6Dst, Format::Ipv6),
            narrow("label", Field::Ipv6Label, 20, Format::Hex),
            part("proto", Field::IpProto, Format::Dec),
            part("tclass", Field::IpTos, Format::Hex),
            part("hlimit", Field::IpTtl, Format::Dec),
            part("frag", Field::IpFrag, Format::Frag),
        ],
    ),
    network("ipv6_exthdrs", V6, None, &[part("", Field::Ipv6Exthdrs, Format::Hex)]),
    network("tcp", IP, Some(ipproto::TCP), PORTS),
    network("udp", IP, Some(ipproto::UDP), PORTS),
    network("sctp", IP, Some(ipproto::SCTP), PORTS),
    network(
        "tcp_flags",
        IP,
        Some(ipproto::TCP),
        &[narrow("", Field::TcpFlags, 12, Format::Flags(TCP_FLAGS))],
    ),
    network("icmp", V4, Some(ipproto::ICMP), ICMP),
    network("icmpv6", V6, Some(ipproto::ICMPV6), ICMP),
    network(
        "arp",
        ARP,
        None,
        &[
            part("sip", Field::Ipv4Src, Format::Ipv4),
            part("tip", Field::Ipv4Dst, Format::Ipv4),
            part("op", Field::IpProto, Format::ArpOp),
            part("sha", Field::ArpSha, Format::Mac),
            part("tha", Field::ArpTha, Format::Mac),
        ],
    ),
    network(
        "nd",
        V6,
        Some(ipproto::ICMPV6),
        &[
            part("target", Field::NdTarget, Format::Ipv6),
            part("sll", Field::ArpSha, Format::Mac),
            part("tll", Field::ArpTha, Format::Mac),
        ],
    ),
    network(
        "nsh",
        &[key::ETH_P_NSH],
        None,
        &[
            part("flags", Field::NshFlags, Format::Dec),
            part("ttl", Field::NshTtl, Format::Dec),
            part("mdtype", Field::NshMdType, Format::Dec),
            part("np", Field::NshNp, Format::Dec),
            slice("spi", Field::NshPathHdr, 8, 24, Format::Hex),
            slice("si", Field::NshPathHdr, 0, 8, Format::Dec),
            part("c1", Field::NshC1, Format::Hex),
            part("c2", Field::NshC2, Format::Hex),
            part("c3", Field::NshC3, Format::Hex),
            part("c4", Field::NshC4, Format::Hex),
        ],
    ),
];

const fn label_parts(field: Field) -> [Part; 4] {
    [
        slice("label", field, 12, 20, Format::Dec),
        slice("tc", field, 9, 3, Format::Dec),
        slice("ttl", field, 0, 8, Format::Dec),
        slice("bos", field, 8, 1, Format::Dec),
    ]
}

/// The parts of each MPLS label stack entry that the key holds.
pub(super) static MPLS_PARTS: [[Part; 4]; 3] =
    [label_parts(Field::Mpls0), label_parts(Field::Mpls1), label_parts(Field::Mpls2)];

/// The tag of either level, as parts of the outer one's TCI.
pub(super) static VLAN: Group = Group {
    name: "vlan",
    place: Place::Link,
    ethertypes: &[],
    proto: None,
    parts: &[
        slice("vid", Field::VlanTci, 0, 12, Format::Dec),
        slice("pcp", Field::VlanTci, 13, 3, Format::Dec),
        slice("cfi", Field::VlanTci, 12, 1, Format::Dec),
        slice("tci", Field::VlanTci, 0, 16, Format::Hex),
    ],
};

/// The fields of `tunnel(…)` that are plain lists.
pub(super) static TUNNEL: Group = metadata(
    "tunnel",
    &[
        part("tun_id", Field::TunId, Format::Hex),
        part("src", Field::TunIpv4Src, Format::Ipv4),
        part("dst", Field::TunIpv4Dst, Format::Ipv4),
        part("ipv6_src", Field::TunIpv6Src, Format::Ipv6),
        part("ipv6_dst", Field::TunIpv6Dst, Format::Ipv6),
        part("tos", Field::TunTos, Format::Hex),
        part("ttl", Field::TunTtl, Format::Dec),
        part("tp_src", Field::TunTpSrc, Format::Dec),
        part("tp_dst", Field::TunTpDst, Format::Dec),
    ],
);

/// The group called `name`, also by its names in other versions.
pub(super) fn find_group(name: &str) -> Option<&'static Group> {
    let name = if name == "priority" { "skb_priority" } else { name };
    GROUPS.iter().find(|group| group.name == name)
}

impl Group {
    /// Whether it is a value rather than a list of named fields.
    pub fn is_bare(&self) -> bool {
        self.parts[0].name.is_empty()
    }

    /// The fields of the key that it names, in order, each once.
    pub fn fields(&self) -> impl Iterator<Item = Field> {
        let parts = self.parts;
        let new = move |i: usize| !parts[..i].iter().any(|earlier| earlier.field == parts[i].field);
        (0..parts.len()).filter(move |&i| new(i)).map(move |i| parts[i].field)
    }

    /// The part called `name`, also as OVS misprints it.
    pub fn part(&self, name: &str) -> Option<&'static Part> {
        let name = match name {
            "src_port" => "tp_src",
            "dst_port" => "tp_dst",
            name => name,
        };
        self.parts.iter().find(|part| part.name == name)
    }

    /// Reads the group from behind its opening to its closing parenthesis. Tells whether it asks for anything: fields
    /// that are all wildcards do not, but an empty list asks for the header as such.
    pub fn parse(&self, c: &mut Cursor<'_>, key: &mut Key, mask: &mut Mask) -> Result<bool, OdpError> {
        let mut asks = false;
        let mut seen = Vec::new();
        let empty = self.parse_parts(c, |part, value, bits| {
            if seen.contains(&part.name) {
                return Err(format!("{} given twice", part.name));
            }
            seen.push(part.name);
            asks |= bits != 0;
            // What is not matched must not wipe out what another group said about a shared field.
            if bits != 0 {
                part.store(key, mask, value, bits);
            }
            Ok(())
        })?;
        Ok(asks || empty)
    }

    /// Reads the group as [`Group::parse`] does and hands each part, value and mask to `each`, which may refuse it. Tells
    /// whether the list was empty.
    pub fn parse_parts(
        &self,
        c: &mut Cursor<'_>,
        mut each: impl FnMut(&'static Part, u128, u128) -> Result<(), String>,
    ) -> Result<bool, OdpError> {
        if self.is_bare() {
            let at = c.at();
            let (value, bits) = self.parts[0].parse(c)?;
            each(&self.parts[0], value, bits).map_err(|message| c.error_at(at, message))?;
            c.expect(")")?;
            return Ok(false);
        }
        if c.eat(")") {
            return Ok(true);
        }
        loop {
            let at = c.at();
            let name = c.word();
            let Some(part) = self.part(name) else {
                return Err(c.error_at(at, format!("no field of {} is called '{name}'", self.name)));
            };
            c.expect("=")?;
            let (value, bits) = part.parse(c)?;
            each(part, value, bits).map_err(|message| c.error_at(at, message))?;
            if c.list_ends()? {
                return Ok(false);
            }
        }
    }

    /// `name(…)` with the parts that `mask` looks at, or nothing if it looks at none.
    pub fn format(&self, key: &Key, mask: &Mask) -> Option<String> {
        let parts = format_parts(self.parts, key, mask);
        (!parts.is_empty()).then(|| format!("{}({parts})", self.name))
    }

    /// What a `set` of this group changes.
    pub fn to_sets(&self, key: &Key, mask: &Mask) -> Vec<FieldSet> {
        let changed = self.fields().filter(|&field| mask.has(field));
        changed.map(|field| FieldSet { field, value: key.get(field), mask: mask.get(field) }).collect()
    }
}

/// The values and masks of a `set` as a key and a mask.
pub(super) fn from_sets(sets: &[FieldSet]) -> (Key, Mask) {
    let (mut key, mut mask) = (Key::default(), Mask::EMPTY);
    for set in sets {
        key.set(set.field, set.value);
        mask.set(set.field, set.mask);
    }
    (key, mask)
}

/// `name=value,…` of those `parts` that `mask` looks at.
pub(super) fn format_parts(parts: &[Part], key: &Key, mask: &Mask) -> String {
    let shown = parts.iter().filter(|part| part.bits_of(mask) != 0);
    shown.map(|part| part.format_named(key, mask)).collect::<Vec<_>>().join(",")
}

impl Part {
    /// The part's bits in the mask.
    pub fn bits_of(&self, mask: &Mask) -> u128 {
        self.get(&mask.0)
    }

    fn get(&self, key: &Key) -> u128 {
        key.get(self.field) >> self.shift & ones(self.bits)
    }

    /// Makes the part match `value` under `bits`.
    pub fn store(&self, key: &mut Key, mask: &mut Mask, value: u128, bits: u128) {
        let place = ones(self.bits) << self.shift;
        key.set(self.field, key.get(self.field) & !place | (value & bits) << self.shift);
        if self.widen && bits == ones(self.bits) {
            mask.set_exact(self.field);
        } else {
            mask.set(self.field, mask.get(self.field) & !place | bits << self.shift);
        }
    }

    /// Reads `value` or `value/mask`.
    pub fn parse(&self, c: &mut Cursor<'_>) -> Result<(u128, u128), OdpError> {
        let at = c.at();
        let value = match self.format {
            Format::Dec | Format::Hex => c.number(self.bits)?,
            Format::Mac => c.mac()?,
            Format::Ipv4 => c.ipv4()?,
            Format::Ipv6 => c.ipv6()?,
            Format::Flags(names) => return parse_flags(c, names, self.bits),
            Format::Frag => {
                let value = match c.word() {
                    "no" => key::FRAG_NONE,
                    "first" => key::FRAG_FIRST,
                    "later" => key::FRAG_LATER,
                    _ => return Err(c.error_at(at, "'no', 'first' or 'later' expected")),
                };
                return Ok((value as u128, ones(self.bits)));
            }
            Format::ArpOp => match c.number(16)? {
                value if value <= 0xff => value,
                _ => return Err(c.error_at(at, "an ARP operation of at most 255 expected")),
            },
        };
        if !c.eat("/") {
            return Ok((value, ones(self.bits)));
        }
        let bits = match self.format {
            Format::Mac => c.mac()?,
            Format::Ipv4 => c.address_mask(32, '.')?,
            Format::Ipv6 => c.address_mask(128, ':')?,
            Format::ArpOp => c.number(16)? & 0xff,
            _ => c.number(self.bits)?,
        };
        Ok((value, bits))
    }

    fn format_named(&self, key: &Key, mask: &Mask) -> String {
        let equals = if self.name.is_empty() { "" } else { "=" };
        format!("{}{equals}{}", self.name, self.format_value(key, mask))
    }

    /// `value`, or `value/mask` if the mask does not have all of the part's bits.
    pub fn format_value(&self, key: &Key, mask: &Mask) -> String {
        let (value, bits) = (self.get(key), self.bits_of(mask));
        let exact = bits == ones(self.bits);
        let text = |value: u128| match self.format {
            Format::Mac => format_mac(value as u64),
            Format::Ipv4 => Ipv4Addr::from(value as u32).to_string(),
            Format::Ipv6 => Ipv6Addr::from(value).to_string(),
            _ => format_hex(value),
        };
        match self.format {
            Format::Flags(names) => format_flags(names, value, bits, exact),
            Format::Frag => match value as u8 {
                key::FRAG_NONE => "no".into(),
                key::FRAG_FIRST => "first".into(),
                key::FRAG_LATER => "later".into(),
                _ => value.to_string(),
            },
            Format::Dec | Format::ArpOp if exact => value.to_string(),
            Format::Dec | Format::ArpOp => format!("{value}/{}", text(bits)),
            _ if exact => text(value),
            _ => format!("{}/{}", text(value), text(bits)),
        }
    }
}

/// A number as C's `%#x` prints it.
pub(super) fn format_hex(value: u128) -> String {
    if value == 0 { "0".into() } else { format!("{value:#x}") }
}

/// A MAC address.
pub(super) fn format_mac(mac: u64) -> String {
    let octets: Vec<String> = mac.to_be_bytes()[2..].iter().map(|octet| format!("{octet:02x}")).collect();
    octets.join(":")
}

/// Flags and their mask: `0x21/0x25`, `+new-est` or `new|trk` (all other flags clear).
fn parse_flags(c: &mut Cursor<'_>, names: &[&str], bits: u32) -> Result<(u128, u128), OdpError> {
    let (mut value, mut mask) = (0, 0);
    if c.sees("+") || c.sees("-") {
        loop {
            let set = if c.eat("+") {
                1
            } else if c.eat("-") {
                0
            } else {
                return Ok((value, mask));
            };
            let at = c.at();
            let bit = parse_flag(c, names)?;
            if mask >> bit & 1 != 0 {
                return Err(c.error_at(at, format!("{} given twice", names[bit])));
            }
            mask |= 1 << bit;
            value |= set << bit;
        }
    }
    loop {
        if c.rest().starts_with(|next: char| next.is_ascii_digit()) {
            value |= c.number(bits)?;
            if c.eat("/") {
                return Ok((value, c.number(bits)?));
            }
        } else {
            value |= 1 << parse_flag(c, names)?;
        }
        if !c.eat("|") {
            return Ok((value, ones(bits)));
        }
    }
}

fn parse_flag(c: &mut Cursor<'_>, names: &[&str]) -> Result<usize, OdpError> {
    let at = c.at();
    let name = c.take_while(|next| next.is_ascii_alphanumeric() || next == '[' || next == ']');
    let found = names.iter().position(|&known| known == name);
    found.ok_or_else(|| c.error_at(at, format!("one of the flags {} expected", names.join(", "))))
}

fn format_flags(names: &[&str], value: u128, mask: u128, exact: bool) -> String {
    let named = names.iter().enumerate().filter(|(bit, _)| mask >> bit & 1 != 0);
    if exact {
        let set: Vec<&str> = named.filter(|(bit, _)| value >> bit & 1 != 0).map(|(_, &name)| name).collect();
        return if set.is_empty() { "0".into() } else { set.join("|") };
    }
    named.map(|(bit, name)| format!("{}{name}", if value >> bit & 1 != 0 { '+' } else { '-' })).collect()
}
