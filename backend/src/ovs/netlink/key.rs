//! `OVS_FLOW_ATTR_KEY` and `OVS_FLOW_ATTR_MASK`: what a flow matches.
//!
//! The rules are those of the kernel's `flow_netlink.c`: the mask is laid out as the key is; without a mask all is exact; an
//! attribute that only the mask lacks is not matched. Both TCIs are always matched, as 0 if there is no tag. An ethertype
//! that only the mask has means an 802.2 frame. A key without a link header is that of a packet which begins with its
//! network header.

use super::layout::{self, MPLS_NEEDS, NSH_BASE, NSH_MD1, NSH_NEEDS, Needs, kind};
use super::wire::{Attr, Attrs};
use super::{DecodeError, tunnel};
use std::collections::BTreeSet;
use switch_core::flow::Match;
use switch_core::key::{
    ETH_P_802_2, ETH_P_8021AD, ETH_P_8021Q, ETH_P_IP, FRAG_LATER, FRAG_NONE, Field, Key, Mask, VLAN_PRESENT,
};
use switch_core::tunnel::match_options;

/// VLAN tags that the key holds, outer first: TPID and TCI.
const TAGS: [(Field, Field); 2] = [(Field::VlanTpid, Field::VlanTci), (Field::CvlanTpid, Field::CvlanTci)];
/// MPLS label stack entries that the key holds.
const LABELS: [Field; 3] = [Field::Mpls0, Field::Mpls1, Field::Mpls2];
/// Below this, a type field is a length (IEEE 802.3 §3.2.6).
const ETH_TYPE_MIN: u16 = 0x0600;
/// ICMPv6 types of neighbour solicitation and advertisement (RFC 4861 §4.3, §4.4).
const ND_TYPES: [u128; 2] = [135, 136];

/// What was understood of a key, and what was not.
pub struct Decoded {
    /// All that is understood; without the ingress port, which has a number of the datapath's.
    pub matches: Match,
    /// Attributes that are not understood, as text.
    pub unread: Vec<String>,
    /// Why `matches` is not what the flow matches, if it is not.
    pub refused: Option<String>,
}

/// Reads a key and its mask.
pub fn decode(key: &[u8], mask: Option<&[u8]>) -> Decoded {
    let mut decoder = Decoder {
        decoded: Decoded { matches: Match::default(), unread: Vec::new(), refused: None },
        asked: Vec::new(),
        has_link: false,
    };
    let result = decoder.level(Attrs(key), mask.map(Attrs), 0).and_then(|()| decoder.complete());
    let mut decoded = decoder.decoded;
    if let Err(error) = result {
        decoded.refused.get_or_insert(error.to_string());
    }
    let Match { key, mask, .. } = &mut decoded.matches;
    *key = key.masked(mask);
    decoded
}

/// The datapath's number of the ingress port; none if the flow is of packets without one.
pub fn in_port(key: &[u8]) -> Option<u32> {
    Attrs(key).find(kind::IN_PORT).ok().flatten()?.u32().ok()
}

/// How the bits of an attribute count.
#[derive(Clone, Copy)]
enum Bits<'a> {
    Exact,
    Given(&'a [u8]),
    Wild,
}

impl<'a> Bits<'a> {
    fn are_wild(self) -> bool {
        match self {
            Bits::Exact => false,
            Bits::Given(bits) => bits.iter().all(|&byte| byte == 0),
            Bits::Wild => true,
        }
    }

    /// The bits of a `be16`, or `absent`.
    fn be16(self, absent: u16) -> Result<u16, DecodeError> {
        match self {
            Bits::Exact => Ok(u16::MAX),
            Bits::Given(data) => Ok(Attr { kind: 0, data }.be16()?),
            Bits::Wild => Ok(absent),
        }
    }

    /// The masks of nested attributes; none if all is exact.
    fn nested(self) -> Option<Attrs<'a>> {
        match self {
            Bits::Exact => None,
            Bits::Given(bits) => Some(Attrs(bits)),
            Bits::Wild => Some(Attrs(&[])),
        }
    }
}

/// What is between two tags.
#[derive(Default)]
struct Level {
    /// Value and mask.
    eth_type: Option<(u16, u16)>,
    /// Value and mask.
    tci: Option<(u16, u16)>,
    /// Whether it holds anything.
    encap: Option<bool>,
    /// There is a header of what a tag encapsulates.
    has_network: bool,
}

struct Decoder {
    decoded: Decoded,
    /// Headers of which something is matched.
    asked: Vec<(&'static str, Needs)>,
    has_link: bool,
}

fn is_vlan(tpid: u16) -> bool {
    tpid == ETH_P_8021Q || tpid == ETH_P_8021AD
}

fn refuse<T>(reason: impl Into<String>) -> Result<T, DecodeError> {
    Err(DecodeError::new(reason))
}

impl Decoder {
    fn key(&mut self) -> (&mut Key, &mut Mask) {
        (&mut self.decoded.matches.key, &mut self.decoded.matches.mask)
    }

    /// Reads the attributes behind `tags` VLAN tags.
    fn level(&mut self, key: Attrs<'_>, masks: Option<Attrs<'_>>, tags: usize) -> Result<(), DecodeError> {
        let mut level = Level::default();
        let mut seen = BTreeSet::new();
        for attr in key {
            let attr = attr?;
            if !seen.insert(attr.kind) {
                return refuse(format!("key attribute {} given twice", attr.kind));
            }
            let bits = match masks {
                None => Bits::Exact,
                Some(masks) => masks.find(attr.kind)?.map_or(Bits::Wild, |bits| Bits::Given(bits.data)),
            };
            self.attribute(attr, bits, tags, &mut level)?;
        }
        if level.eth_type.is_none()
            && let Some(masks) = masks
            && let Some(bits) = masks.find(kind::ETHERTYPE)?
        {
            level.eth_type = Some((0, bits.be16()?));
        }
        match level.tci {
            Some(tci) => self.settle_tag(tags, &level, tci),
            None => self.settle_untagged(tags, &level),
        }
    }

    fn attribute(
        &mut self,
        attr: Attr<'_>,
        bits: Bits<'_>,
        tags: usize,
        level: &mut Level,
    ) -> Result<(), DecodeError> {
        match attr.kind {
            // Always exact; the caller knows the ports.
            kind::IN_PORT => Ok(()),
            kind::ENCAP if tags == TAGS.len() => refuse("more than two VLAN tags"),
            kind::ENCAP => {
                level.encap = Some(!attr.data.is_empty());
                self.level(attr.nested(), bits.nested(), tags + 1)
            }
            kind::ETHERTYPE => {
                let bits = bits.be16(0)?;
                level.eth_type = Some((attr.be16()? & bits, bits));
                Ok(())
            }
            kind::VLAN => {
                // It is matched whether the mask names it or not.
                let bits = bits.be16(u16::MAX)?;
                level.tci = Some((attr.be16()? & bits, bits));
                Ok(())
            }
            kind::TUNNEL => {
                let Match { key, mask, tunnel: opts } = &mut self.decoded.matches;
                match bits {
                    Bits::Wild => Ok(()),
                    bits => tunnel::decode(attr.nested(), bits.nested(), key, mask, opts),
                }?;
                // If they do not fit, the flow is not for the tables.
                match_options(&mut self.decoded.matches);
                Ok(())
            }
            kind::MPLS => {
                level.has_network = true;
                self.mpls(attr, bits)
            }
            kind::NSH => {
                level.has_network = true;
                self.nsh(attr, bits)
            }
            number => match layout::find(number) {
                Some(layout) => {
                    self.has_link |= matches!(number, kind::ETHERNET | kind::PACKET_TYPE);
                    level.has_network |= !layout.needs.ethertypes.is_empty()
                        && !matches!(number, kind::CT_TUPLE4 | kind::CT_TUPLE6);
                    self.fields(layout, attr, bits)
                }
                None => {
                    // What is not matched need not be understood.
                    if !bits.are_wild() {
                        self.unread(attr, bits);
                    }
                    Ok(())
                }
            },
        }
    }

    /// Notes an attribute that is not understood.
    fn unread(&mut self, attr: Attr<'_>, bits: Bits<'_>) {
        let bits = match bits {
            Bits::Given(bits) => format!("/0x{}", super::hex(bits)),
            _ => String::new(),
        };
        self.decoded.unread.push(format!("key{}(0x{}{bits})", attr.kind, super::hex(attr.data)));
        self.decoded.refused.get_or_insert(format!("key attribute {}", attr.kind));
    }

    /// A plain struct.
    fn fields(&mut self, layout: &layout::Layout, attr: Attr<'_>, bits: Bits<'_>) -> Result<(), DecodeError> {
        let bits = match bits {
            Bits::Wild => return Ok(()),
            Bits::Exact => None,
            Bits::Given(bits) => Some(bits),
        };
        if attr.data.len() != layout.length || bits.is_some_and(|bits| bits.len() != layout.length) {
            return Err(DecodeError::length(layout.name, attr));
        }
        let (key, mask) = self.key();
        match layout.load(attr.data, bits, key, mask) {
            Ok(true) => self.asked.push((layout.name, layout.needs)),
            Ok(false) => {}
            Err(layout::DoesNotFit) => return refuse(format!("{} has unknown bits", layout.name)),
        }
        Ok(())
    }

    /// Label stack entries, top first. Several also say that the stack is at least that deep.
    fn mpls(&mut self, attr: Attr<'_>, bits: Bits<'_>) -> Result<(), DecodeError> {
        let given = match bits {
            Bits::Given(bits) => Some(bits),
            _ => None,
        };
        let entries = attr.data.len() / 4;
        let sound = attr.data.len().is_multiple_of(4) && (1..=LABELS.len()).contains(&entries);
        if !sound || given.is_some_and(|bits| bits.len() != attr.data.len()) {
            return Err(DecodeError::length("mpls", attr));
        }
        let entry = |bytes: &[u8]| u32::from_be_bytes(bytes.try_into().unwrap_or_default()) as u128;
        let mut asks = entries > 1;
        let (key, mask) = self.key();
        for (i, (field, value)) in LABELS.into_iter().zip(attr.data.chunks_exact(4)).enumerate() {
            let bits = match bits {
                Bits::Exact => u32::MAX as u128,
                Bits::Given(bits) => entry(&bits[i * 4..i * 4 + 4]),
                Bits::Wild => 0,
            };
            asks |= bits != 0;
            key.set(field, entry(value) & bits);
            mask.set(field, bits);
        }
        if entries > 1 {
            // 2 and 3 have the same upper bit; 3 is the most that is counted.
            key.set(Field::MplsCount, entries as u128);
            mask.set(Field::MplsCount, entries as u128);
        }
        if asks {
            self.asked.push(("mpls", MPLS_NEEDS));
        }
        Ok(())
    }

    /// `enum ovs_nsh_key_attr`.
    fn nsh(&mut self, attr: Attr<'_>, bits: Bits<'_>) -> Result<(), DecodeError> {
        let masks = bits.nested();
        for part in attr.nested() {
            let part = part?;
            let bits = match masks {
                None => Bits::Exact,
                Some(masks) => masks.find(part.kind)?.map_or(Bits::Wild, |bits| Bits::Given(bits.data)),
            };
            match [&NSH_BASE, &NSH_MD1].into_iter().find(|layout| layout.kind == part.kind) {
                Some(layout) => self.fields(layout, part, bits)?,
                None if bits.are_wild() => {}
                None => return refuse(format!("nsh attribute {}", part.kind)),
            }
        }
        // Named at all, it asks for the header.
        self.asked.push(("nsh", NSH_NEEDS));
        Ok(())
    }

    /// The level has a tag: its ethertype is the tag's TPID.
    fn settle_tag(&mut self, tags: usize, level: &Level, (tci, bits): (u16, u16)) -> Result<(), DecodeError> {
        let Some(&(tpid_field, tci_field)) = TAGS.get(tags) else { return refuse("more than two VLAN tags") };
        let (tpid, tpid_bits) = match level.eth_type {
            // The kernel shows the mask of a TPID as all ones, whatever it is, and what is not matched as 0.
            Some((0, _)) => (0, 0),
            eth_type => eth_type.unwrap_or((ETH_P_8021Q, u16::MAX)),
        };
        if tpid_bits == u16::MAX && !is_vlan(tpid) {
            return refuse(format!("{tpid:#06x} is not a VLAN's"));
        }
        if level.has_network {
            return refuse("a network header before the end of the VLAN tags");
        }
        let (key, mask) = self.key();
        if (tci, bits, tpid_bits) == (0, u16::MAX, u16::MAX) {
            // A TPID and no TCI behind it: the frame ends inside the tag, and the TPID is all there is of an ethertype.
            if level.encap == Some(true) {
                return refuse("a truncated VLAN tag encapsulates nothing");
            }
            untagged_from(mask, key, tags);
            key.set(Field::EthType, tpid as u128);
            mask.set_exact(Field::EthType);
            return Ok(());
        }
        key.set(tpid_field, tpid as u128);
        mask.set(tpid_field, tpid_bits as u128);
        key.set(tci_field, tci as u128);
        mask.set(tci_field, bits as u128);
        if level.encap.is_none() {
            untagged_from(mask, key, tags + 1);
        }
        Ok(())
    }

    /// The level has no tag: absent means that there is none, not that any will do.
    fn settle_untagged(&mut self, tags: usize, level: &Level) -> Result<(), DecodeError> {
        if level.encap.is_some() {
            return refuse("encap without a VLAN tag");
        }
        let (key, mask) = self.key();
        untagged_from(mask, key, tags);
        let Some((value, bits)) = level.eth_type else { return Ok(()) };
        let value = if value == 0 && bits == u16::MAX { ETH_P_802_2 } else { value };
        if bits == u16::MAX && value < ETH_TYPE_MIN && value != ETH_P_802_2 {
            return refuse(format!("{value:#06x} is a length, not an ethertype"));
        }
        if bits == u16::MAX
            && is_vlan(value)
            && let Some(&(tpid, tci)) = TAGS.get(tags)
        {
            if tags == 0 || level.has_network {
                return refuse("a VLAN's ethertype without its tag");
            }
            // As OVS says it of the userspace datapath's flows: there is another tag, whatever it and what is behind it may be.
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

    /// A mask that looks at a header looks at all of what says that the header is there. The kernel sees to that for
    /// ethertypes and protocols, but not for the fragment type, nor for the code of neighbour discovery.
    fn complete(&mut self) -> Result<(), DecodeError> {
        let asked = std::mem::take(&mut self.asked);
        let (key, mask) = self.key();
        for &(name, needs) in asked.iter().filter(|(_, needs)| !needs.ethertypes.is_empty()) {
            let fits = |&eth_type: &u16| {
                (eth_type as u128 ^ key.get(Field::EthType)) & mask.get(Field::EthType) == 0
            };
            let mut candidates = needs.ethertypes.iter().copied().filter(fits);
            match (candidates.next(), candidates.next()) {
                (None, _) => return refuse(format!("{name} contradicts eth_type({:#06x})", key.eth_type())),
                (Some(ETH_P_IP), Some(_)) => return refuse(format!("{name} needs an ethertype")),
                (Some(eth_type), _) => {
                    key.set(Field::EthType, eth_type as u128);
                    mask.set_exact(Field::EthType);
                }
            }
        }
        for (name, proto) in asked.iter().filter_map(|(name, needs)| Some((name, needs.proto?))) {
            if (proto as u128 ^ key.get(Field::IpProto)) & mask.get(Field::IpProto) != 0 {
                return refuse(format!("{name} contradicts proto={}", key.ip_proto()));
            }
            key.set(Field::IpProto, proto as u128);
            mask.set_exact(Field::IpProto);
            if !mask.has(Field::IpFrag) {
                key.set(Field::IpFrag, FRAG_NONE as u128);
                mask.set_exact(Field::IpFrag);
            } else if key.ip_frag() == FRAG_LATER {
                return refuse(format!("a later fragment has no {name} header"));
            }
        }
        if asked.iter().any(|(name, _)| *name == "nd") {
            if !mask.is_exact(Field::TpSrc) || !ND_TYPES.contains(&key.get(Field::TpSrc)) {
                return refuse("nd needs its ICMPv6 type");
            }
            if key.get(Field::TpDst) != 0 {
                return refuse("nd has code 0");
            }
            mask.set_exact(Field::TpDst);
        }
        if !self.has_link {
            let (key, mask) = self.key();
            if mask.is_exact(Field::EthType) {
                key.set(Field::PacketType, 1 << 16 | key.eth_type() as u128);
                mask.set_exact(Field::PacketType);
            }
        }
        Ok(())
    }
}

/// No tag from this one on.
fn untagged_from(mask: &mut Mask, key: &mut Key, tags: usize) {
    for &(_, tci) in TAGS.get(tags..).unwrap_or_default() {
        key.set(tci, 0);
        mask.set_exact(tci);
    }
}
