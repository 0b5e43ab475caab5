//! Decapsulation: which packets are for a tunnel of ours, what a flow can match of their outer headers, and the packet inside.

use super::{
    ETH_P_TEB, GBP_FLAGS, GENEVE_OAM, GRE_CHECKSUM_PRESENT, GRE_KEY_PRESENT, Gbp, Kind, VXLAN_GBP, VXLAN_VNI,
    ecn, geneve,
};
use crate::checksum;
use crate::flow::Match;
use crate::key::{
    ETH_P_8021AD, ETH_P_8021Q, ETH_P_IP, ETH_P_IPV6, Field, Key, TUN_CSUM, TUN_DF, TUN_KEY, TUNNEL_WORDS,
    ipproto,
};
use crate::packet::{Gso, Layout, Offload, Packet, PortId};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

/// The VLAN in which packets of a tunnel come.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum Vlan {
    /// None: they have no tag.
    Untagged,
    /// This one (802.1Q).
    Id(u16),
    /// Any, or none.
    Any,
}

/// An end of tunnels, for packets that come by one device, or of one flow.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub struct Endpoint {
    /// MAC address to which its packets are sent; any, if a flow has chosen them.
    pub mac: Option<[u8; 6]>,
    /// VLAN in which they come.
    pub vlan: Vlan,
    /// Our address; any, if a flow has chosen them.
    pub local: Option<IpAddr>,
    /// What kind of tunnel.
    pub kind: Kind,
    /// UDP destination port; of no meaning to GRE.
    pub port: u16,
    /// VXLAN: a group policy is read. Without, a packet that has one is not ours (RFC 7348 with no extension).
    pub gbp: bool,
    /// Whether flows tell packets apart by the outer header's "don't fragment": Linux does so since 6.17, and in kernels to which
    /// that was brought back; userspace OVS does not.
    pub df: bool,
    /// Whether it is done as by Linux, where the outer header's congestion marks go over to the packet inside (RFC 6040), and what stands
    /// behind the outer packet is cut off. Userspace OVS leaves the former to flows, which match marks, and the latter on the packet inside.
    pub as_linux: bool,
    /// The logical port by which the packets inside come in.
    pub in_port: PortId,
}

impl Endpoint {
    /// Whether a packet for it can be one of this match. Fields of the outer header that a flow leaves open say nothing.
    pub(crate) fn is_met_by(&self, matches: &Match) -> bool {
        let can_be = |field, value: u128| (matches.key.get(field) ^ value) & matches.mask.get(field) == 0;
        let is_network = match self.local {
            Some(IpAddr::V4(local)) => {
                can_be(Field::EthType, ETH_P_IP.into()) && can_be(Field::Ipv4Dst, local.to_bits().into())
            }
            Some(IpAddr::V6(local)) => {
                can_be(Field::EthType, ETH_P_IPV6.into()) && can_be(Field::Ipv6Dst, local.to_bits())
            }
            None => can_be(Field::EthType, ETH_P_IP.into()) || can_be(Field::EthType, ETH_P_IPV6.into()),
        };
        let is_transport = match self.kind {
            Kind::Gre => can_be(Field::IpProto, ipproto::GRE.into()),
            Kind::Vxlan | Kind::Geneve => {
                can_be(Field::IpProto, ipproto::UDP.into()) && can_be(Field::TpDst, self.port.into())
            }
        };
        let mac = |[a, b, c, d, e, f]: [u8; 6]| u64::from_be_bytes([0, 0, a, b, c, d, e, f]).into();
        is_network && is_transport && self.mac.is_none_or(|own| can_be(Field::EthDst, mac(own)))
    }

    /// Whether packets to this MAC address and address, in that VLAN, are for it, whatever their tunnel.
    #[inline]
    fn takes(&self, mac: [u8; 6], vlan: Option<u16>, local: IpAddr) -> bool {
        let is_vlan = match self.vlan {
            Vlan::Untagged => vlan.is_none(),
            Vlan::Id(id) => vlan == Some(id),
            Vlan::Any => true,
        };
        is_vlan && self.mac.is_none_or(|own| own == mac) && self.local.is_none_or(|own| own == local)
    }
}

/// What flows can match of an outer header: the fields `tunnel.*` of the key.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub struct TunnelKey {
    /// VNI or GRE key; 0 if there is none.
    pub id: u64,
    /// The other end.
    pub src: IpAddr,
    /// Our end.
    pub dst: IpAddr,
    /// TOS or traffic class.
    pub tos: u8,
    /// TTL or hop limit.
    pub ttl: u8,
    /// UDP ports, 0 of GRE.
    pub ports: (u16, u16),
    /// [`TUN_KEY`], [`TUN_CSUM`], [`TUN_DF`].
    pub flags: u16,
    /// Group policy.
    pub gbp: Gbp,
    /// As in [`Field::TunOptions`].
    pub options: u64,
}

impl Default for TunnelKey {
    fn default() -> TunnelKey {
        let (src, dst) = (IpAddr::V4(Ipv4Addr::UNSPECIFIED), IpAddr::V4(Ipv4Addr::UNSPECIFIED));
        let gbp = Gbp::default();
        TunnelKey { id: 0, src, dst, tos: 0, ttl: 0, ports: (0, 0), flags: 0, gbp, options: 0 }
    }
}

impl TunnelKey {
    /// Writes all fields of tunnels into a key, those that the header does not have as 0.
    #[inline]
    pub fn write_to(&self, key: &mut Key) {
        let halves = |bits: u128| [(bits >> 64) as u64, bits as u64];
        let (mut v4, mut src6, mut dst6) = (0, [0; 2], [0; 2]);
        match (self.src, self.dst) {
            (IpAddr::V4(src), IpAddr::V4(dst)) => {
                v4 = at(Field::TunIpv4Src, src.to_bits()) | at(Field::TunIpv4Dst, dst.to_bits());
            }
            (IpAddr::V6(src), IpAddr::V6(dst)) => {
                (src6, dst6) = (halves(src.to_bits()), halves(dst.to_bits()))
            }
            _ => {} // no packet has such addresses
        }
        // Whole words, since nothing else is in them.
        let header = at(Field::TunTos, self.tos)
            | at(Field::TunTtl, self.ttl)
            | at(Field::TunTpSrc, self.ports.0)
            | at(Field::TunTpDst, self.ports.1)
            | at(Field::TunFlags, self.flags);
        let policy = at(Field::TunGbpId, self.gbp.id) | at(Field::TunGbpFlags, self.gbp.flags);
        let words = [self.id, v4, src6[0], src6[1], dst6[0], dst6[1], header, policy];
        const FIRST: usize = Field::TunId.place().0;
        const { assert!(FIRST + 7 == Field::TunErspanIdx.place().0 && TUNNEL_WORDS == 9) };
        key.words[FIRST..FIRST + 8].copy_from_slice(&words);
        key.words[Field::TunOptions.place().0] = self.options;
    }
}

/// A value where its field is in its word.
#[inline(always)]
fn at(field: Field, value: impl Into<u64>) -> u64 {
    value.into() << field.place().1
}

/// A packet for a tunnel of ours.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Decap {
    /// The outer header.
    pub tunnel: TunnelKey,
    /// The logical port by which the packet inside comes in.
    pub in_port: PortId,
    /// Where the packet inside begins and ends, from the start of the frame.
    pub inner: (u16, u32),
    /// Offset of the inner network header and the TOS or traffic class that it gets, if the outer header says so.
    pub(super) mark: Option<(u16, u8)>,
}

impl Decap {
    /// Takes the outer headers off. The packet has then just come in by the logical port, and is to be parsed. Gives what
    /// [`Taken::put_back`] needs.
    pub fn pop(&self, packet: &mut Packet) -> Taken {
        let (start, end) = self.inner;
        let &mut Packet { layout, offload, in_port, len, .. } = packet;
        let header = self.mark.map(|(l3, tos)| (l3, set_tos(packet, l3 as usize, tos)));
        let padding = len.saturating_sub(end) as u16; // all of it in the head
        packet.truncate(end);
        // What was said of the outer checksum says nothing of the inner one.
        packet.offload = Offload::default();
        if packet.remove(0, start as usize).is_err() {
            packet.truncate(0); // of another packet than was recognized: a runt is left
        }
        packet.layout = Layout::default();
        packet.in_port = self.in_port;
        Taken { outer: start, padding, header, layout, offload, in_port, len }
    }
}

/// What [`Decap::pop`] has taken off a packet, as far as it does not stand in front of it and behind it still.
#[derive(Clone, Copy, Debug)]
pub struct Taken {
    /// Bytes of the outer headers.
    outer: u16,
    /// Bytes behind the end of the outer packet.
    padding: u16,
    /// What stood in the inner network header, and where that is, if its TOS was changed.
    header: Option<(u16, [u8; 4])>,
    layout: Layout,
    offload: Offload,
    in_port: PortId,
    len: u32,
}

impl Taken {
    /// Of a packet whose first bytes are taken off, and nothing else, and to which nothing was left to do.
    pub(crate) fn plain(outer: u16, layout: Layout, in_port: PortId, len: u32) -> Taken {
        Taken { outer, padding: 0, header: None, layout, offload: Offload::default(), in_port, len }
    }

    /// Length of the packet as it came in.
    pub fn frame_len(&self) -> u32 {
        self.len
    }

    /// Makes the packet, which was not edited since, what it was before; but for its head, if that was lengthened.
    pub fn put_back(&self, packet: &mut Packet) {
        packet.restore(self.outer as usize, self.padding as usize);
        if let Some((l3, [a, b, c, d])) = self.header
            && let Some(ip) =
                packet.head_mut().get_mut(l3 as usize..).and_then(|ip| ip.first_chunk_mut::<20>())
        {
            (ip[0], ip[1], ip[10], ip[11]) = (a, b, c, d);
        }
        (packet.layout, packet.offload, packet.in_port) = (self.layout, self.offload, self.in_port);
    }
}

/// Where the IP payload is, and what the IP header says.
struct Network {
    src: IpAddr,
    dst: IpAddr,
    tos: u8,
    ttl: u8,
    df: bool,
    proto: u8,
    start: usize,
    end: usize,
}

pub(super) fn be16(bytes: &[u8], at: usize) -> Option<u16> {
    Some(u16::from_be_bytes(*bytes.get(at..)?.first_chunk()?))
}

/// Finds the packet that came by a tunnel to one of our endpoints, in one that has just come in. `None` is an ordinary packet: of no
/// endpoint, a fragment, with IP options or extension headers, with lengths or a checksum that are wrong, with flags or options that
/// are not known, or one that must be dropped for its congestion marks; the host says what becomes of those.
///
/// `sum_tail` gives the folded sum of the frame's bytes from the end of the head to an offset from the frame's start, as if they began a word;
/// or `None`, and the packet is an ordinary one. It is asked only if the packet has a checksum that was not verified yet and goes on behind its head.
pub fn recognize(
    packet: &Packet,
    endpoints: &[Endpoint],
    sum_tail: impl FnOnce(u32) -> Option<u16>,
) -> Option<Decap> {
    let head = packet.head();
    // Several tunnelled packets in one, which only a guest can send.
    if packet.offload.gso != Gso::None {
        return None;
    }
    let (mut eth_type, mut l3, mut vlan) = (be16(head, 12)?, 14, None);
    if eth_type == ETH_P_8021Q {
        vlan = Some(be16(head, 14)? & 0xfff);
        (eth_type, l3) = (be16(head, 16)?, 18);
    }
    let ip = network(packet, eth_type, l3)?;
    let (start, end) = (ip.start, ip.end);
    // Only the smallest frames are padded; of others the end stays where it is, outside of the head.
    let is_padded = end < packet.len as usize;
    if is_padded && !packet.is_whole() {
        return None;
    }
    let mac: [u8; 6] = *head.first_chunk()?;
    let l4 = head.get(start..)?;
    let is_ours = |endpoint: &&Endpoint| endpoint.takes(mac, vlan, ip.dst);
    let mut ours = endpoints.iter().filter(is_ours);
    let (endpoint, header, mut flags, ports) = match ip.proto {
        ipproto::UDP => {
            let [a, b, c, d, _, _, sum @ ..]: [u8; 8] = *l4.first_chunk()?;
            let ports = (u16::from_be_bytes([a, b]), u16::from_be_bytes([c, d]));
            let endpoint = ours.find(|endpoint| endpoint.kind != Kind::Gre && endpoint.port == ports.1)?;
            if be16(l4, 4)? as usize != end - start {
                return None;
            }
            (endpoint, 8, if sum == [0; 2] { 0 } else { TUN_CSUM }, ports)
        }
        ipproto::GRE => {
            let endpoint = ours.find(|endpoint| endpoint.kind == Kind::Gre)?;
            let csum = be16(l4, 0)? & GRE_CHECKSUM_PRESENT != 0;
            (endpoint, 0, if csum { TUN_CSUM } else { 0 }, (0, 0))
        }
        _ => return None,
    };
    if is_padded && !endpoint.as_linux {
        return None;
    }
    let tunnel = tunnel(endpoint, l4.get(header..)?)?;
    let inner = start + header + tunnel.len;
    // An Ethernet header, at least.
    if inner + 14 > end.min(head.len()) {
        return None;
    }
    let Offload { needs_csum, csum_start, csum_valid, .. } = packet.offload;
    // A checksum inside that is to be completed would be lost.
    if needs_csum && csum_start as usize != start {
        return None;
    }
    let is_verified = needs_csum || csum_valid && ip.proto == ipproto::UDP;
    if flags & TUN_CSUM != 0 && !is_verified {
        let pseudo = if ip.proto == ipproto::UDP { pseudo_header(&ip) } else { 0 };
        if checksum::fold(pseudo + covered(packet, start, end, sum_tail)?) != 0xffff {
            return None;
        }
    }
    flags |= tunnel.flags | if ip.df && endpoint.df { TUN_DF } else { 0 };
    let mut mark = None;
    if endpoint.as_linux
        && let Some((l3, old)) = inner_tos(&head[..end.min(head.len())], inner)
    {
        let new = ecn::decapsulate(ip.tos, old)?;
        mark = (new != old).then_some((l3 as u16, new));
    }
    let Network { src, dst, tos, ttl, .. } = ip;
    let Header { id, gbp, options, .. } = tunnel;
    Some(Decap {
        tunnel: TunnelKey { id, src, dst, tos, ttl, ports, flags, gbp, options },
        in_port: endpoint.in_port,
        inner: (inner as u16, end as u32),
        mark,
    })
}

/// Reads an IP header as the host's stack would before it looks for a tunnel.
fn network(packet: &Packet, eth_type: u16, l3: usize) -> Option<Network> {
    let head = packet.head();
    let network = match eth_type {
        ETH_P_IP => {
            let ip: &[u8; 20] = head.get(l3..)?.first_chunk()?;
            let [_, tos, _, _, _, _, f, g, ttl, proto, ..] = *ip;
            let (total, fragment) = (be16(ip, 2)? as usize, u16::from_be_bytes([f, g]));
            // Options are for the host, and so is what is to be put together.
            if ip[0] != 0x45 || fragment & 0x3fff != 0 || checksum::checksum(ip) != 0 {
                return None;
            }
            let address = |at: usize| Some(IpAddr::V4(Ipv4Addr::from(*ip.get(at..)?.first_chunk::<4>()?)));
            let (src, dst, df) = (address(12)?, address(16)?, fragment & 0x4000 != 0);
            Network { src, dst, tos, ttl, df, proto, start: l3 + 20, end: l3 + total }
        }
        ETH_P_IPV6 => {
            let ip: &[u8; 40] = head.get(l3..)?.first_chunk()?;
            if ip[0] >> 4 != 6 {
                return None;
            }
            let address = |at: usize| Some(IpAddr::V6(Ipv6Addr::from(*ip.get(at..)?.first_chunk::<16>()?)));
            let (src, dst, tos) = (address(8)?, address(24)?, (be16(ip, 0)? >> 4) as u8);
            let end = l3 + 40 + be16(ip, 4)? as usize;
            Network { src, dst, tos, ttl: ip[7], df: false, proto: ip[6], start: l3 + 40, end }
        }
        _ => return None,
    };
    let Network { src, dst, start, end, .. } = network;
    let is_broadcast = matches!(src, IpAddr::V4(src) if src.is_broadcast());
    // Nobody sends from such an address, not even we.
    let martian =
        src.is_unspecified() || src.is_multicast() || src.is_loopback() || is_broadcast || src == dst;
    (!martian && start <= end && end <= packet.len as usize).then_some(network)
}

/// What the tunnel's own header says.
#[derive(Default)]
struct Header {
    len: usize,
    id: u64,
    flags: u16,
    gbp: Gbp,
    options: u64,
}

/// Reads the tunnel's header; for GRE from its first byte on, else what is behind UDP.
fn tunnel(endpoint: &Endpoint, bytes: &[u8]) -> Option<Header> {
    match endpoint.kind {
        Kind::Vxlan => {
            let [flags, policy, c, d, vni @ .., reserved]: [u8; 8] = *bytes.first_chunk()?;
            let gbp = match flags {
                VXLAN_VNI if [policy, c, d] == [0; 3] => Gbp::default(),
                _ if endpoint.gbp && flags == VXLAN_VNI | VXLAN_GBP && policy & !GBP_FLAGS == 0 => {
                    Gbp { id: u16::from_be_bytes([c, d]), flags: policy }
                }
                _ => return None,
            };
            let id = number(&vni);
            (reserved == 0).then_some(Header { len: 8, id, flags: TUN_KEY, gbp, options: 0 })
        }
        Kind::Geneve => {
            let [length, flags, p, q, vni @ .., reserved]: [u8; 8] = *bytes.first_chunk()?;
            // Version 0; a control packet is none of ours. Whether some option is critical is told by the options.
            let is_known = length >> 6 == 0
                && flags & (GENEVE_OAM | 0x3f) == 0
                && u16::from_be_bytes([p, q]) == ETH_P_TEB
                && reserved == 0;
            let len = 8 + length as usize * 4;
            let options = geneve::read_options(bytes.get(8..len).filter(|_| is_known)?)?;
            Some(Header { len, id: number(&vni), flags: TUN_KEY, options, ..Header::default() })
        }
        Kind::Gre => {
            let [flags, proto] = [be16(bytes, 0)?, be16(bytes, 2)?];
            // Neither sequence numbers nor routing, and version 0.
            if flags & !(GRE_CHECKSUM_PRESENT | GRE_KEY_PRESENT) != 0 || proto != ETH_P_TEB {
                return None;
            }
            let at = if flags & GRE_CHECKSUM_PRESENT != 0 { 8 } else { 4 };
            match flags & GRE_KEY_PRESENT != 0 {
                true => {
                    let id = number(bytes.get(at..at + 4)?);
                    Some(Header { len: at + 4, id, flags: TUN_KEY, ..Header::default() })
                }
                false => Some(Header { len: at, ..Header::default() }),
            }
        }
    }
}

fn number(bytes: &[u8]) -> u64 {
    bytes.iter().fold(0, |number, &byte| number << 8 | byte as u64)
}

/// The sum of UDP's pseudo-header.
fn pseudo_header(ip: &Network) -> u64 {
    let len = (ip.end - ip.start) as u32;
    match (ip.src, ip.dst) {
        (IpAddr::V4(src), IpAddr::V4(dst)) => {
            checksum::pseudo_v4(src.to_bits(), dst.to_bits(), ip.proto, len)
        }
        (IpAddr::V6(src), IpAddr::V6(dst)) => {
            checksum::pseudo_v6(&src.octets(), &dst.octets(), ip.proto, len)
        }
        _ => 0, // of one family, as one header has them
    }
}

/// The sum of the frame's bytes from `start` to `end`.
fn covered(
    packet: &Packet,
    start: usize,
    end: usize,
    sum_tail: impl FnOnce(u32) -> Option<u16>,
) -> Option<u64> {
    let head = packet.head();
    let sum = checksum::add(0, head.get(start..end.min(head.len()))?);
    if end <= head.len() {
        return Some(sum);
    }
    let tail = sum_tail(end as u32)?;
    // Behind an odd number of bytes the words' halves change places.
    Some(sum + if (head.len() - start).is_multiple_of(2) { tail } else { tail.swap_bytes() } as u64)
}

/// Offset of the network header, and TOS, of the packet inside that begins at `at`; `None` if it is not IP, or not to be seen.
fn inner_tos(head: &[u8], at: usize) -> Option<(usize, u8)> {
    let mut l3 = at + 14;
    for _ in 0..2 {
        if [ETH_P_8021Q, ETH_P_8021AD].contains(&be16(head, l3 - 2)?) {
            l3 += 4;
        }
    }
    match (be16(head, l3 - 2)?, head.get(l3)? >> 4) {
        (ETH_P_IP, 4) => Some((l3, *head.get(l3..l3 + 20)?.get(1)?)),
        (ETH_P_IPV6, 6) => Some((l3, (be16(head, l3)? >> 4) as u8)),
        _ => None,
    }
}

/// Sets TOS or traffic class of the IP header at `l3`. Gives the bytes of it that it may have changed, as they were: the first two,
/// and those where IPv4 has its checksum.
fn set_tos(packet: &mut Packet, l3: usize, tos: u8) -> [u8; 4] {
    let ip = packet.head_mut().get_mut(l3..).and_then(|ip| ip.first_chunk_mut::<20>());
    let Some(ip) = ip else { return [0; 4] };
    let old = [ip[0], ip[1], ip[10], ip[11]];
    if ip[0] >> 4 == 6 {
        (ip[0], ip[1]) = (ip[0] & 0xf0 | tos >> 4, tos << 4 | ip[1] & 0x0f);
        return old;
    }
    let word = |tos| u16::from_be_bytes([ip[0], tos]);
    let check = u16::from_be_bytes([ip[10], ip[11]]);
    let check = checksum::update_word(check, word(ip[1]), word(tos));
    ip[1] = tos;
    ip[10..12].copy_from_slice(&check.to_be_bytes());
    old
}
