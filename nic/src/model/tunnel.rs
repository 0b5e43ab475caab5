//! Tunnels of the card: VXLAN (RFC 7348) and GENEVE (RFC 8926), over IPv4.
//!
//! A tunnel is a port without a cable. What a rule outputs there leaves in the outer headers that `set(tunnel(…))` before it
//! has said, by the cable behind which their destination is. What comes by a cable in such headers, for an address of the card's,
//! comes in by the tunnel: rules match its inner frame and the fields of its outer headers. Where no rule does, the CPU has the
//! frame as it came.

use std::net::Ipv4Addr;

use switch_core::action::{FieldSet, TunnelOpts};
use switch_core::checksum;
use switch_core::key::{ETH_P_IP, ETH_P_IPV6, Field, Key, Mask, TUN_CSUM, TUN_DF, TUN_KEY, ipproto};
use switch_core::packet::{Packet, PortId};
use switch_core::parse::{self, Extracted};

use crate::offload::Refusal;

/// Ethernet, IPv4 without options, and UDP.
const OUTER: usize = 14 + 20 + 8;
/// VXLAN and GENEVE alike, without options.
const TUNNEL_HEADER: usize = 8;
/// VXLAN flags: there is a network identifier, and nothing else.
const VXLAN_FLAGS: u8 = 0x08;
/// GENEVE protocol: an Ethernet frame.
const ETHERNET: [u8; 2] = [0x65, 0x58];
/// GENEVE flags: a control packet.
const GENEVE_CONTROL: u8 = 0x80;
/// GENEVE flags: an option must be understood.
const GENEVE_CRITICAL: u8 = 0x40;
/// A bit of an option's type: it must be understood.
const OPTION_CRITICAL: u8 = 0x80;
/// Fields of a frame that has come by a tunnel, which rules may match.
pub(super) const FIELDS: [Field; 8] = [
    Field::TunId,
    Field::TunIpv4Src,
    Field::TunIpv4Dst,
    Field::TunTos,
    Field::TunTtl,
    Field::TunTpSrc,
    Field::TunTpDst,
    Field::TunFlags,
];

/// What a tunnel's outer headers are.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Kind {
    /// VXLAN, UDP port 4789.
    Vxlan,
    /// GENEVE, UDP port 6081.
    Geneve,
}

impl Kind {
    fn udp_port(self) -> u16 {
        match self {
            Kind::Vxlan => 4789,
            Kind::Geneve => 6081,
        }
    }
}

/// Where outer frames for an address go.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Neighbour {
    /// The address.
    pub address: Ipv4Addr,
    /// The cable.
    pub port: u32,
    /// Destination MAC address.
    pub dst: [u8; 6],
    /// Source MAC address.
    pub src: [u8; 6],
}

/// What the card knows of its tunnels.
#[derive(Clone, Debug, Default)]
pub struct Underlay {
    /// Tunnels, by the numbers of their ports, which no cable has.
    pub tunnels: Vec<(u32, Kind)>,
    /// Its own addresses.
    pub addresses: Vec<Ipv4Addr>,
    /// Who else there is.
    pub neighbours: Vec<Neighbour>,
}

impl Underlay {
    /// What the tunnel of this number is, if it is one.
    pub(super) fn kind(&self, number: u32) -> Option<Kind> {
        self.tunnels.iter().find(|(tunnel, _)| *tunnel == number).map(|(_, kind)| *kind)
    }
}

/// The outer headers that `set(tunnel(…))` asks for.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(super) struct Outer {
    id: u32,
    src: Ipv4Addr,
    dst: Ipv4Addr,
    tos: u8,
    ttl: u8,
    flags: u16,
    /// The UDP port, if it is said.
    port: Option<u16>,
    /// GENEVE options as they are in the header, and whether one of them must be understood.
    options: Vec<u8>,
    critical: bool,
}

impl Outer {
    /// Reads an action, or says what the card cannot write.
    pub fn new(sets: &[FieldSet], more: &TunnelOpts) -> Result<Outer, Refusal> {
        if more.other.is_some() {
            return Err(Refusal::TunnelOptions);
        }
        let mut key = Key::default();
        for set in sets {
            let mut mask = Mask::EMPTY;
            mask.set(set.field, set.mask);
            let known = FIELDS.contains(&set.field) && set.field != Field::TunTpSrc;
            if !mask.is_exact(set.field) || !known && set.value != 0 {
                return Err(Refusal::Set(set.field));
            }
            key.set(set.field, set.value);
        }
        let get = |field| key.get(field);
        let outer = Outer {
            id: u32::try_from(get(Field::TunId)).unwrap_or(u32::MAX),
            src: Ipv4Addr::from(get(Field::TunIpv4Src) as u32),
            dst: Ipv4Addr::from(get(Field::TunIpv4Dst) as u32),
            tos: get(Field::TunTos) as u8,
            ttl: get(Field::TunTtl) as u8,
            flags: get(Field::TunFlags) as u16,
            port: Some(get(Field::TunTpDst) as u16).filter(|&port| port != 0),
            options: options(more)?,
            critical: more.geneve.iter().any(|option| option.kind.0 & OPTION_CRITICAL != 0),
        };
        let wrong = [
            (outer.id >= 1 << 24, Field::TunId),
            (outer.src.is_unspecified(), Field::TunIpv4Src),
            (outer.dst.is_unspecified() || outer.dst.is_multicast(), Field::TunIpv4Dst),
            (outer.ttl == 0, Field::TunTtl),
            (outer.flags & !(TUN_DF | TUN_CSUM | TUN_KEY) != 0, Field::TunFlags),
        ];
        match wrong.iter().find(|(wrong, _)| *wrong) {
            Some(&(_, field)) => Err(Refusal::Set(field)),
            None => Ok(outer),
        }
    }

    /// Whether a tunnel of this kind can have these headers.
    pub fn check(&self, kind: Kind) -> Result<(), Refusal> {
        match kind {
            Kind::Vxlan if !self.options.is_empty() => Err(Refusal::TunnelOptions),
            _ if self.port.is_some_and(|port| port != kind.udp_port()) => Err(Refusal::Set(Field::TunTpDst)),
            _ => Ok(()),
        }
    }

    /// The frame in its outer headers, and the cable that it leaves by. `None`: nobody has the destination's address, or it would be
    /// longer than IP can say.
    pub fn wrap(&self, kind: Kind, underlay: &Underlay, inner: &[u8]) -> Option<(u32, Vec<u8>)> {
        let neighbour = underlay.neighbours.iter().find(|neighbour| neighbour.address == self.dst)?;
        let udp_len = 8 + TUNNEL_HEADER + self.options.len() + inner.len();
        let ip_len = u16::try_from(20 + udp_len).ok()?;
        let mut frame = Vec::with_capacity(14 + usize::from(ip_len));
        frame.extend(neighbour.dst);
        frame.extend(neighbour.src);
        frame.extend(ETH_P_IP.to_be_bytes());
        let fragments: u16 = if self.flags & TUN_DF != 0 { 0x4000 } else { 0 };
        frame.extend([0x45, outer_tos(self.tos, inner)]);
        frame.extend(ip_len.to_be_bytes());
        frame.extend([0, 0]);
        frame.extend(fragments.to_be_bytes());
        frame.extend([self.ttl, ipproto::UDP, 0, 0]);
        frame.extend(self.src.octets());
        frame.extend(self.dst.octets());
        let sum = checksum::checksum(frame.get(14..34)?);
        frame.get_mut(24..26)?.copy_from_slice(&sum.to_be_bytes());
        frame.extend(source_port(inner).to_be_bytes());
        frame.extend(kind.udp_port().to_be_bytes());
        frame.extend((udp_len as u16).to_be_bytes());
        frame.extend([0, 0]);
        match kind {
            Kind::Vxlan => frame.extend([VXLAN_FLAGS, 0, 0, 0]),
            Kind::Geneve => {
                let flags = if self.critical { GENEVE_CRITICAL } else { 0 };
                frame.extend([(self.options.len() / 4) as u8, flags]);
                frame.extend(ETHERNET);
            }
        }
        frame.extend((self.id << 8).to_be_bytes());
        frame.extend(&self.options);
        frame.extend(inner);
        if self.flags & TUN_CSUM != 0 {
            let pseudo = checksum::pseudo_v4(self.src.into(), self.dst.into(), ipproto::UDP, udp_len as u32);
            let sum = !checksum::fold(checksum::add(pseudo, frame.get(34..)?));
            let sum = if sum == 0 { u16::MAX } else { sum };
            frame.get_mut(40..42)?.copy_from_slice(&sum.to_be_bytes());
        }
        Some((neighbour.port, frame))
    }
}

/// The options of a GENEVE header.
fn options(more: &TunnelOpts) -> Result<Vec<u8>, Refusal> {
    let mut bytes = Vec::new();
    for option in &more.geneve {
        let words = option.value.len() / 4;
        if !option.value.len().is_multiple_of(4) || words > 31 {
            return Err(Refusal::TunnelOptions);
        }
        bytes.extend(option.class.0.to_be_bytes());
        bytes.extend([option.kind.0, words as u8]);
        bytes.extend(&option.value);
    }
    // The header has six bits for their length, in words.
    if bytes.len() > 63 * 4 { Err(Refusal::TunnelOptions) } else { Ok(bytes) }
}

/// The type of service of outer headers: the congestion bits are those of the inner packet (RFC 6040, compatibility mode).
fn outer_tos(tos: u8, inner: &[u8]) -> u8 {
    let mut packet = Packet::from_frame(PortId { slot: 0, generation: 0 }, inner);
    let mut key = Key::default();
    let is_known = parse::extract(&mut packet, &mut key) == Extracted::Done;
    let is_ip = is_known && [ETH_P_IP, ETH_P_IPV6].contains(&key.eth_type());
    let congestion = match key.get(Field::IpTos) as u8 & 3 {
        _ if !is_ip => 0,
        // What has met congestion inside may meet it again outside, which says so with the other mark.
        3 => 2,
        mark => mark,
    };
    tos & !3 | congestion
}

/// The source port: the same for all packets of an inner flow, and another one for others.
fn source_port(inner: &[u8]) -> u16 {
    let flow = inner.get(..12).into_iter().chain(inner.get(26..38)).flatten();
    let hash = flow.fold(0u16, |hash, &byte| hash.wrapping_mul(31).wrapping_add(byte.into()));
    0xc000 | hash
}

/// A frame that has come by a tunnel.
pub(super) struct Inner<'f> {
    /// Number of the tunnel's port.
    pub port: u32,
    /// The frame.
    pub frame: &'f [u8],
    key: Key,
}

impl Inner<'_> {
    /// Puts the outer fields into the inner frame's key.
    pub fn write(&self, key: &mut Key) {
        FIELDS.iter().for_each(|&field| key.set(field, self.key.get(field)));
    }
}

/// Finds the frame in outer headers that are for the card. Everything unusual is left alone: options, fragments, a wrong
/// checksum, congestion marks (which the inner packet would have to get), control packets, options that must be understood.
pub(super) fn unwrap<'f>(underlay: &Underlay, frame: &'f [u8]) -> Option<Inner<'f>> {
    let (outer, rest) = frame.split_at_checked(OUTER)?;
    let byte = |at: usize| outer.get(at).copied();
    let word = |at: usize| Some(u16::from_be_bytes([byte(at)?, byte(at + 1)?]));
    let address = |at: usize| Some(Ipv4Addr::from([byte(at)?, byte(at + 1)?, byte(at + 2)?, byte(at + 3)?]));
    let (ip_len, udp_len) = (usize::from(word(16)?), usize::from(word(38)?));
    let (src, dst) = (address(26)?, address(30)?);
    let is_plain = word(12)? == ETH_P_IP
        && byte(14)? == 0x45
        && byte(15)? & 3 == 0
        && word(20)? & 0x3fff == 0
        && byte(23)? == ipproto::UDP
        && checksum::checksum(outer.get(14..34)?) == 0
        && ip_len == udp_len + 20
        && ip_len >= OUTER - 14 + TUNNEL_HEADER
        && underlay.addresses.contains(&dst);
    let is_tunnel = |&&(_, kind): &&(u32, Kind)| word(36) == Some(kind.udp_port());
    let &(port, kind) = underlay.tunnels.iter().find(is_tunnel).filter(|_| is_plain)?;
    // What is behind is padding.
    let rest = rest.get(..ip_len - (OUTER - 14))?;
    let has_sum = word(40)? != 0;
    if has_sum {
        let pseudo = checksum::pseudo_v4(src.into(), dst.into(), ipproto::UDP, udp_len as u32);
        if checksum::fold(checksum::add(checksum::add(pseudo, outer.get(34..)?), rest)) != u16::MAX {
            return None;
        }
    }
    let (header, rest) = rest.split_at_checked(TUNNEL_HEADER)?;
    let &[first, flags, a, b, x, y, z, last] = header else { return None };
    let options = match kind {
        Kind::Vxlan if [first, flags, a, b, last] == [VXLAN_FLAGS, 0, 0, 0, 0] => 0,
        Kind::Geneve
            if first >> 6 == 0 && flags & (GENEVE_CONTROL | GENEVE_CRITICAL) == 0 && [a, b] == ETHERNET =>
        {
            usize::from(first & 63) * 4
        }
        _ => return None,
    };
    let inner = rest.get(options..).filter(|inner| inner.len() >= 14)?;
    let mut key = Key::default();
    key.set(Field::TunId, u32::from_be_bytes([0, x, y, z]).into());
    key.set(Field::TunIpv4Src, u32::from(src).into());
    key.set(Field::TunIpv4Dst, u32::from(dst).into());
    key.set(Field::TunTos, byte(15)?.into());
    key.set(Field::TunTtl, byte(22)?.into());
    key.set(Field::TunTpSrc, word(34)?.into());
    key.set(Field::TunTpDst, kind.udp_port().into());
    key.set(Field::TunFlags, (TUN_KEY | if has_sum { TUN_CSUM } else { 0 }).into());
    Some(Inner { port, frame: inner, key })
}
