//! Encapsulation: an outer header, made ready once, is laid around packets.

use super::{
    ETH_P_TEB, GBP_FLAGS, GENEVE_CRITICAL, GENEVE_OAM, GRE_CHECKSUM_PRESENT, GRE_KEY_PRESENT, Gbp, Kind,
    MAX_VNI, VXLAN_GBP, VXLAN_VNI, ecn,
};
use crate::checksum;
use crate::drop::DropReason;
use crate::key::{ETH_P_8021AD, ETH_P_8021Q, ETH_P_IP, ETH_P_IPV6, VLAN_PRESENT, ipproto};
use crate::offload::{TCP_CHECKSUM, UDP_CHECKSUM, checksum_field};
use crate::packet::{Gso, HEADROOM, Inner, Layout, NONE, Packet, flow_v4};
use std::net::IpAddr;
use std::num::NonZeroU16;
use std::ops::RangeInclusive;

/// Bytes of the longest outer header. What is left of the headroom is for VLAN tags.
pub const MAX_OUTER: usize = HEADROOM - 16;
/// TTL where the packet inside has none to be inherited (`DEFAULT_TTL` of OVS).
const DEFAULT_TTL: u8 = 64;
/// Offset of GRE's checksum.
const GRE_CHECKSUM: u16 = 4;
/// Of IPv4, without options.
const IPV4_HEADER: usize = 20;
/// In [`Plain::inherits`].
const TTL: u16 = 0x100;
/// Bytes that a [`Plain`] header puts before a packet at once.
const PUSHED: usize = 64;
/// "Don't fragment", in IPv4's fragment field.
const IPV4_DF: u16 = 0x4000;

/// The link to the next hop.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub struct Link {
    /// MAC address of the next hop.
    pub dst: [u8; 6],
    /// MAC address of the device that it goes out by.
    pub src: [u8; 6],
    /// TPID and TCI of a VLAN tag.
    pub vlan: Option<(u16, u16)>,
}

/// Where a field of the outer header comes from.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum Origin {
    /// It is the same in all packets.
    Set(u8),
    /// It is that of the packet inside.
    Inner,
    /// As [`Origin::Set`], and of a TOS the two bits of congestion marks too: whoever says it has looked at the packet inside.
    Exact(u8),
}

/// UDP ports of the outer header.
#[derive(Clone, PartialEq, Eq, Hash, Debug)]
pub struct UdpPorts {
    /// Of these one is chosen by a hash of the packet inside, so that routers spread flows. On Linux they are
    /// `net.ipv4.ip_local_port_range`.
    pub src: RangeInclusive<u16>,
    /// Destination.
    pub dst: u16,
}

/// The header of the tunnel itself.
#[derive(Clone, PartialEq, Eq, Hash, Debug)]
pub enum Encapsulation {
    /// RFC 7348.
    Vxlan {
        /// VNI, 24 bits.
        vni: u32,
        /// Group policy, if there is one.
        gbp: Option<Gbp>,
        /// Ports.
        ports: UdpPorts,
    },
    /// RFC 8926.
    Geneve {
        /// VNI, 24 bits.
        vni: u32,
        /// A control packet.
        oam: bool,
        /// Options as they stand in the header: [`super::write_options`].
        options: Vec<u8>,
        /// Ports.
        ports: UdpPorts,
    },
    /// RFC 2784, 2890. With [`super::nvgre_key`] and no checksum it is NVGRE.
    Gre {
        /// Key.
        key: Option<u32>,
    },
}

impl Encapsulation {
    /// What kind of tunnel it is.
    pub fn kind(&self) -> Kind {
        match self {
            Encapsulation::Vxlan { .. } => Kind::Vxlan,
            Encapsulation::Geneve { .. } => Kind::Geneve,
            Encapsulation::Gre { .. } => Kind::Gre,
        }
    }

    fn ports(&self) -> Option<&UdpPorts> {
        match self {
            Encapsulation::Vxlan { ports, .. } | Encapsulation::Geneve { ports, .. } => Some(ports),
            Encapsulation::Gre { .. } => None,
        }
    }
}

/// All that an outer header says.
#[derive(Clone, PartialEq, Eq, Hash, Debug)]
pub struct OuterSpec {
    /// The link.
    pub link: Link,
    /// Our address.
    pub src: IpAddr,
    /// The other end's address.
    pub dst: IpAddr,
    /// TOS or traffic class. Its two bits of congestion marks come from the packet inside (`tunnel/ecn.rs`), unless it is exact.
    pub tos: Origin,
    /// TTL or hop limit.
    pub ttl: Origin,
    /// "Don't fragment"; IPv6 never fragments on the way.
    pub df: bool,
    /// Whether the UDP or GRE header has a checksum.
    pub checksum: bool,
    /// The tunnel's header.
    pub encapsulation: Encapsulation,
}

/// Why there can be no such outer header.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, thiserror::Error)]
pub enum OuterError {
    /// One address is IPv4, the other IPv6.
    #[error("addresses of different families")]
    Families,
    /// The VNI has more than 24 bits.
    #[error("a VNI of more than 24 bits")]
    Vni,
    /// A source port of 0, or none at all.
    #[error("no source ports")]
    Ports,
    /// It is longer than [`MAX_OUTER`].
    #[error("an outer header of {0} bytes")]
    TooLong(usize),
    /// Options that are no multiple of 4 bytes or, group policy, a flag that there is not.
    #[error("malformed options")]
    Options,
    /// The tag's TPID is not that of a VLAN.
    #[error("a tag with tpid {0:#06x}")]
    Tpid(u16),
}

/// An outer header made ready: all that is the same in all packets stands in a template, and in the sums of checksums.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Outer {
    template: [u8; MAX_OUTER],
    len: u8,
    l3: u8,
    l4: u8,
    ipv6: bool,
    kind: Kind,
    tos: Origin,
    ttl: Origin,
    checksum: bool,
    /// The first source port and how many there are.
    ports: (u16, u32),
    /// Sum of what stays the same in an IPv4 header.
    sum_l3: u64,
    /// Sum of what stays the same of the UDP or GRE header and the tunnel's.
    sum_l4: u64,
    /// Sum of the pseudo-header without its length; GRE has none.
    pseudo: u64,
    plain: Option<Plain>,
}

/// The most frequent kind of header, UDP over IPv4 without a checksum, made ready to be laid around a packet in a few words.
#[derive(Clone, PartialEq, Eq, Debug)]
struct Plain {
    /// The template, at the end: it is put before a packet as it is, whatever its length, since what lies before the header is nobody's.
    block: [u8; PUSHED],
    len: u8,
    /// Where the IP header begins in the block.
    at: u8,
    tos: Tos,
    /// Bits of the TOS of the packet inside at which it is looked; and [`TTL`], if the TTL is that of the packet inside.
    inherits: u16,
    /// Bytes that the outer IP packet has beside the frame inside.
    network_len: u8,
    /// As in [`Outer`].
    ports: (u16, u32),
    /// The first three words of the IP header and the UDP header, without what differs from packet to packet.
    ip: u64,
    rest: u32,
    udp: u64,
    /// Sum of what stays the same in the IP header, folded.
    sum: u16,
    layout: Layout,
}

/// TOS of the outer header, as parts of that of the packet inside: what is set, what stays, and which of its congestion marks go over.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
struct Tos {
    set: u8,
    keep: u8,
    marks: u8,
}

impl Outer {
    /// Makes a header ready.
    ///
    /// # Errors
    /// What the header cannot say.
    pub fn new(spec: &OuterSpec) -> Result<Outer, OuterError> {
        let OuterSpec { link, encapsulation, checksum, .. } = spec;
        let mut bytes = Vec::with_capacity(MAX_OUTER);
        bytes.extend(link.dst);
        bytes.extend(link.src);
        if let Some((tpid, tci)) = link.vlan {
            if ![ETH_P_8021Q, ETH_P_8021AD].contains(&tpid) {
                return Err(OuterError::Tpid(tpid));
            }
            bytes.extend(tpid.to_be_bytes());
            bytes.extend((tci & !VLAN_PRESENT).to_be_bytes());
        }
        let l3 = bytes.len() + 2;
        let proto = if encapsulation.ports().is_some() { ipproto::UDP } else { ipproto::GRE };
        let addresses = network(&mut bytes, spec, proto)?;
        let (l4, ipv6) = (bytes.len(), spec.dst.is_ipv6());
        let mut ports = (0, 0);
        if let Some(UdpPorts { src, dst }) = encapsulation.ports() {
            if src.is_empty() || *src.start() == 0 {
                return Err(OuterError::Ports);
            }
            ports = (*src.start(), (src.end() - src.start()) as u32 + 1);
            bytes.extend([0, 0]);
            bytes.extend(dst.to_be_bytes());
            bytes.extend([0; 4]);
        }
        tunnel(&mut bytes, encapsulation, *checksum)?;
        let pseudo = if proto == ipproto::UDP { addresses + proto as u64 } else { 0 };
        let (sum_l3, sum_l4) = (checksum::add(0, &bytes[l3..l4]), checksum::add(0, &bytes[l4..]));
        let mut template = [0; MAX_OUTER];
        let len = bytes.len();
        template.get_mut(..len).ok_or(OuterError::TooLong(len))?.copy_from_slice(&bytes);
        let is_plain = proto == ipproto::UDP && !ipv6 && !checksum;
        let plain = if is_plain { Plain::new(&bytes, l3, spec, ports, sum_l3) } else { None };
        Ok(Outer {
            template,
            len: len as u8,
            l3: l3 as u8,
            l4: l4 as u8,
            ipv6,
            kind: encapsulation.kind(),
            tos: spec.tos,
            ttl: spec.ttl,
            checksum: *checksum,
            ports,
            sum_l3,
            sum_l4,
            pseudo,
            plain,
        })
    }

    /// Bytes that it adds to a frame.
    pub fn header_len(&self) -> usize {
        self.len as usize
    }

    /// Bytes that it adds to what an MTU counts: all but the link header.
    pub fn network_overhead(&self) -> usize {
        (self.len - self.l3) as usize
    }

    /// Lays the header around a packet, whose layout must be true. `id` is the IPv4 identification, which should differ from
    /// packet to packet (RFC 6864) as far as segments: a packet to be segmented takes one for each.
    ///
    /// The layout is then that of the outer packet. What was left to do for the packet inside still is. If the tunnel has a
    /// checksum: where the inner checksum is one to be completed, or known to be right, the outer one is made from the headers alone, since
    /// what the inner one covers sums up to what its pseudo-header says; otherwise it becomes one to be completed itself.
    ///
    /// # Errors
    /// [`DropReason::Oversized`] if IP cannot say the length, [`DropReason::TooDeep`] if the headroom is used up or the packet
    /// inside a tunnel still has to be segmented and is to go into another, [`DropReason::BadOffload`] if the checksum to be completed is
    /// not in the head or, where an outer one is made from it, begins at an odd offset. Nothing has been changed then.
    #[inline]
    pub fn push(&self, packet: &mut Packet, id: u16) -> Result<(), DropReason> {
        if self.push_plain(packet, id) { Ok(()) } else { self.push_any(packet, id) }
    }

    /// [`Outer::push`] where that is most frequent: of UDP over IPv4 without a checksum, around TCP or UDP over IPv4 without a tag to which
    /// nothing is left to do. Elsewhere nothing is done, and it is false.
    #[inline(always)]
    pub(crate) fn push_plain(&self, packet: &mut Packet, id: u16) -> bool {
        self.plain.as_ref().is_some_and(|plain| plain.push::<14, 38>(packet, id))
    }

    /// [`Outer::push`] where [`Outer::push_plain`] does nothing.
    #[inline(never)] // the rarer way
    pub(crate) fn push_any(&self, packet: &mut Packet, id: u16) -> Result<(), DropReason> {
        // The same behind a tag.
        match &self.plain {
            Some(plain) if plain.push::<18, 42>(packet, id) => Ok(()),
            _ => self.push_long(packet, id),
        }
    }

    /// [`Outer::push`] of any kind.
    pub(super) fn push_long(&self, packet: &mut Packet, id: u16) -> Result<(), DropReason> {
        let (len, l3, l4) = (self.len as usize, self.l3 as usize, self.l4 as usize);
        let is_super = packet.offload.gso != Gso::None;
        let total = packet.len as usize + len - l3 - if self.ipv6 { 40 } else { 0 };
        if total > u16::MAX as usize && !is_super {
            return Err(DropReason::Oversized);
        }
        let inner = match is_super {
            false => None,
            true if packet.offload.inner.is_some() => return Err(DropReason::TooDeep),
            true => Some(inner(packet).ok_or(DropReason::BadOffload)?),
        };
        let known = if self.checksum { known_sum(packet)? } else { None };
        let (inner_tos, inner_ttl) = tos_and_ttl(packet).unwrap_or((0, DEFAULT_TTL));
        let hash = packet.flow_hash();

        packet.offload.inner = inner;
        if let Err(reason) = packet.insert(0, len) {
            packet.offload.inner = None;
            return Err(reason);
        }
        let tos = self.outer_tos(inner_tos);
        let (ttl, l4_len) = (self.ttl.or(inner_ttl), packet.len as usize - l4);
        // The lengths of a packet to be segmented are those of no packet on the wire.
        let length = |len: usize| (len.min(u16::MAX as usize) as u16).to_be_bytes();
        let head = packet.head_mut();
        head[..len].copy_from_slice(&self.template[..len]);
        let ip = &mut head[l3..l4];
        if self.ipv6 {
            ip[..2].copy_from_slice(&(0x6000 | (tos as u16) << 4).to_be_bytes());
            ip[4..6].copy_from_slice(&length(total));
            ip[7] = ttl;
        } else {
            ip[1] = tos;
            ip[2..4].copy_from_slice(&length(total));
            ip[4..6].copy_from_slice(&id.to_be_bytes());
            ip[8] = ttl;
            let changed = tos as u64 + total.min(u16::MAX as usize) as u64 + id as u64 + ((ttl as u64) << 8);
            ip[10..12].copy_from_slice(&(!checksum::fold(self.sum_l3 + changed)).to_be_bytes());
        }
        let (mut sum, mut pseudo, mut field) = (self.sum_l4, 0, GRE_CHECKSUM);
        if self.kind != Kind::Gre {
            let (first, count) = self.ports;
            let port = first + ((hash as u64 * count as u64) >> 32) as u16;
            head[l4..l4 + 2].copy_from_slice(&port.to_be_bytes());
            head[l4 + 4..l4 + 6].copy_from_slice(&length(l4_len));
            (pseudo, field) = (self.pseudo + l4_len as u64, UDP_CHECKSUM);
            sum += pseudo + port as u64 + l4_len as u64;
        }
        packet.layout = match self.kind {
            Kind::Gre => Layout { l3: l3 as u16, l4: NONE, payload: NONE },
            _ => Layout { l3: l3 as u16, l4: l4 as u16, payload: l4 as u16 + 8 },
        };
        packet.offload.csum_valid = false;
        if !self.checksum {
            return Ok(());
        }
        let at = l4 + field as usize;
        let check = match known {
            Some(known) => checksum_field(!checksum::fold(sum + known)),
            None => {
                (packet.offload.needs_csum, packet.offload.csum_start) = (true, l4 as u16);
                packet.offload.csum_offset = field;
                checksum::fold(pseudo)
            }
        };
        packet.head_mut()[at..at + 2].copy_from_slice(&check.to_be_bytes());
        Ok(())
    }

    /// TOS or traffic class, around a packet that has `inner`.
    #[inline(always)]
    fn outer_tos(&self, inner: u8) -> u8 {
        match self.tos {
            Origin::Exact(tos) => tos,
            tos => ecn::encapsulate(tos.or(inner), inner),
        }
    }
}

impl Plain {
    /// Of a header of these `bytes`, with the IP header at `l3`, of which `sum` is the sum. `None` if it is longer than the block.
    fn new(bytes: &[u8], l3: usize, spec: &OuterSpec, ports: (u16, u32), sum: u64) -> Option<Plain> {
        let before = PUSHED.checked_sub(bytes.len())?;
        let mut block = [0; PUSHED];
        block[before..].copy_from_slice(bytes);
        let word = |at: usize| Some(u64::from_be_bytes(*bytes.get(at..)?.first_chunk()?));
        let l4 = l3 + IPV4_HEADER;
        let tos = Tos::of(spec.tos);
        let ttl = spec.ttl.or(0);
        let sum = sum + u64::from(tos.set) + (u64::from(ttl) << 8);
        let layout = Layout { l3: l3 as u16, l4: l4 as u16, payload: l4 as u16 + 8 };
        Some(Plain {
            block,
            len: bytes.len() as u8,
            at: (before + l3) as u8,
            tos,
            inherits: u16::from(tos.keep | tos.marks) | if spec.ttl == Origin::Inner { TTL } else { 0 },
            network_len: (bytes.len() - l3) as u8,
            ports,
            ip: word(l3)? | u64::from(tos.set) << 48,
            rest: u32::from(ttl) << 24 | u32::from(ipproto::UDP) << 16,
            udp: word(l4)?,
            sum: checksum::fold(sum),
            layout,
        })
    }

    /// [`Outer::push_plain`] around a packet whose IPv4 header is at `L3`, and the end of its ports at `FIRST`.
    #[inline(always)]
    fn push<const L3: u16, const FIRST: usize>(&self, packet: &mut Packet, id: u16) -> bool {
        const { assert!(L3 as usize + IPV4_HEADER + 4 == FIRST) };
        let Packet { offload, layout, len, .. } = packet;
        let total = *len as usize + usize::from(self.network_len);
        if offload.needs_csum
            || offload.gso != Gso::None
            || layout.l3 != L3
            || layout.l4 != L3 + IPV4_HEADER as u16
            || total > u16::MAX as usize
        {
            return false;
        }
        let Some((block, first)) = packet.around::<PUSHED, FIRST>() else { return false };
        let Some((inner_tos, inner_ttl, hash)) = flow_v4(first) else { return false };
        let (total, id) = (total as u64, u64::from(id));
        let port = self.ports.0 + ((u64::from(hash) * u64::from(self.ports.1)) >> 32) as u16;
        let (mut ip, mut rest) = (self.ip | total << 32 | id << 16, self.rest);
        let mut sum = u32::from(self.sum) + (total + id) as u32;
        if (u16::from(inner_tos) | TTL) & self.inherits != 0 {
            let tos = self.tos.around(inner_tos) - self.tos.set;
            let ttl = if self.inherits & TTL != 0 { inner_ttl } else { 0 };
            ip |= u64::from(tos) << 48;
            rest |= u32::from(ttl) << 24;
            sum += u32::from(tos) + (u32::from(ttl) << 8);
        }
        // Of words so few that what goes over goes over once.
        let sum = (sum >> 16) + (sum & 0xffff);
        rest |= u32::from(!((sum >> 16) + sum) as u16);
        let udp = self.udp | u64::from(port) << 48 | (total - IPV4_HEADER as u64) << 16;
        *block = self.block;
        if let Some(header) = block.get_mut(self.at as usize..).and_then(<[u8]>::first_chunk_mut::<28>) {
            header[..8].copy_from_slice(&ip.to_be_bytes());
            header[8..12].copy_from_slice(&rest.to_be_bytes());
            header[20..].copy_from_slice(&udp.to_be_bytes());
        }
        packet.take_in(self.len);
        packet.layout = self.layout;
        (packet.offload.csum_valid, packet.offload.inner) = (false, None);
        true
    }
}

impl Tos {
    fn of(origin: Origin) -> Tos {
        match origin {
            Origin::Set(tos) => Tos { set: tos & !ecn::MASK, keep: 0, marks: ecn::MASK },
            Origin::Inner => Tos { set: 0, keep: !ecn::MASK, marks: ecn::MASK },
            Origin::Exact(tos) => Tos { set: tos, keep: 0, marks: 0 },
        }
    }

    /// Around a packet that has `inner`; of the same outcome as [`Outer::outer_tos`].
    #[inline(always)]
    fn around(self, inner: u8) -> u8 {
        // As `ecn::encapsulate` has it: 3 becomes 2.
        let mark = inner & !(inner >> 1 & 1);
        self.set | inner & self.keep | mark & self.marks
    }
}

impl Origin {
    fn or(self, inner: u8) -> u8 {
        match self {
            Origin::Set(value) | Origin::Exact(value) => value,
            Origin::Inner => inner,
        }
    }
}

/// Appends ethertype and IP header, without what differs from packet to packet. Gives the sum of the addresses.
fn network(bytes: &mut Vec<u8>, spec: &OuterSpec, proto: u8) -> Result<u64, OuterError> {
    match (spec.src, spec.dst) {
        (IpAddr::V4(src), IpAddr::V4(dst)) => {
            let fragment = if spec.df { IPV4_DF } else { 0 };
            bytes.extend(ETH_P_IP.to_be_bytes());
            bytes.extend([0x45, 0, 0, 0, 0, 0]);
            bytes.extend(fragment.to_be_bytes());
            bytes.extend([0, proto, 0, 0]);
            bytes.extend(src.octets());
            bytes.extend(dst.octets());
            Ok(checksum::add(checksum::add(0, &src.octets()), &dst.octets()))
        }
        (IpAddr::V6(src), IpAddr::V6(dst)) => {
            bytes.extend(ETH_P_IPV6.to_be_bytes());
            bytes.extend([0x60, 0, 0, 0, 0, 0, proto, 0]);
            bytes.extend(src.octets());
            bytes.extend(dst.octets());
            Ok(checksum::add(checksum::add(0, &src.octets()), &dst.octets()))
        }
        _ => Err(OuterError::Families),
    }
}

/// Appends the tunnel's header.
fn tunnel(bytes: &mut Vec<u8>, encapsulation: &Encapsulation, checksum: bool) -> Result<(), OuterError> {
    match encapsulation {
        Encapsulation::Vxlan { vni, gbp, .. } => {
            check_vni(*vni)?;
            match gbp {
                Some(Gbp { flags, .. }) if flags & !GBP_FLAGS != 0 => return Err(OuterError::Options),
                Some(Gbp { id, flags }) => {
                    bytes.extend([VXLAN_VNI | VXLAN_GBP, *flags]);
                    bytes.extend(id.to_be_bytes());
                }
                None => bytes.extend([VXLAN_VNI, 0, 0, 0]),
            }
            bytes.extend((vni << 8).to_be_bytes());
        }
        Encapsulation::Geneve { vni, oam, options, .. } => {
            check_vni(*vni)?;
            // Six bits of words of four bytes (RFC 8926 §3.4).
            if options.len() % 4 != 0 || options.len() > 252 {
                return Err(OuterError::Options);
            }
            let critical = has_critical(options).ok_or(OuterError::Options)?;
            let flags = if *oam { GENEVE_OAM } else { 0 } | if critical { GENEVE_CRITICAL } else { 0 };
            bytes.extend([(options.len() / 4) as u8, flags]);
            bytes.extend(ETH_P_TEB.to_be_bytes());
            bytes.extend((vni << 8).to_be_bytes());
            bytes.extend(options);
        }
        Encapsulation::Gre { key } => {
            let present = |flag, is: bool| if is { flag } else { 0 };
            let flags = present(GRE_CHECKSUM_PRESENT, checksum) | present(GRE_KEY_PRESENT, key.is_some());
            bytes.extend(flags.to_be_bytes());
            bytes.extend(ETH_P_TEB.to_be_bytes());
            if checksum {
                bytes.extend([0; 4]);
            }
            bytes.extend(key.iter().flat_map(|key| key.to_be_bytes()));
        }
    }
    Ok(())
}

fn check_vni(vni: u32) -> Result<(), OuterError> {
    if vni as u64 > MAX_VNI { Err(OuterError::Vni) } else { Ok(()) }
}

/// Whether some option is critical; `None` if they are malformed.
fn has_critical(mut options: &[u8]) -> Option<bool> {
    let mut critical = false;
    while let Some(&[_, _, kind, length]) = options.first_chunk() {
        critical |= kind & 0x80 != 0;
        options = options.get(4 + (length & 0x1f) as usize * 4..)?;
    }
    Some(critical)
}

/// Where the headers are of a packet that is to be segmented.
fn inner(packet: &Packet) -> Option<Inner> {
    let Layout { l3, l4, payload } = packet.layout;
    let is_found = payload != NONE && packet.is_partial() && l4 != NONE;
    let l3 = NonZeroU16::new(l3).filter(|_| is_found)?;
    Some(Inner { l3, payload })
}

fn be16(bytes: &[u8], at: usize) -> Option<u16> {
    Some(u16::from_be_bytes(*bytes.get(at..)?.first_chunk()?))
}

/// TOS and TTL of the packet, if it is IP.
fn tos_and_ttl(packet: &Packet) -> Option<(u8, u8)> {
    let (head, l3) = (packet.head(), packet.layout.l3 as usize);
    let ip = head.get(l3..)?;
    match be16(head, l3.checked_sub(2)?)? {
        ETH_P_IP => Some((*ip.get(1)?, *ip.get(8)?)),
        ETH_P_IPV6 => Some(((be16(ip, 0)? >> 4) as u8, *ip.get(7)?)),
        _ => None,
    }
}

/// The sum of the whole frame, if it can be told from its headers: what an inner checksum covers comes, with its pseudo-header,
/// to nothing.
fn known_sum(packet: &Packet) -> Result<Option<u64>, DropReason> {
    let (head, offload) = (packet.head(), &packet.offload);
    let (start, covered) = if offload.needs_csum {
        // When it is completed, it and what it covers sum up to the complement of what it is now.
        let field = offload.csum_start as usize + offload.csum_offset as usize;
        // Words begin at even offsets, in the checksum's reach as in the outer packet.
        let partial = be16(head, field).filter(|_| offload.csum_offset.is_multiple_of(2));
        (offload.csum_start as usize, !partial.ok_or(DropReason::BadOffload)?)
    } else if offload.csum_valid
        && let Some(pseudo) = pseudo_header(packet)
    {
        (packet.layout.l4 as usize, !checksum::fold(pseudo))
    } else {
        return Ok(None);
    };
    // The same goes for the frame.
    let headers = head.get(..start).filter(|_| start.is_multiple_of(2));
    match headers {
        Some(headers) => Ok(Some(checksum::add(covered as u64, headers))),
        None if offload.needs_csum => Err(DropReason::BadOffload),
        None => Ok(None),
    }
}

/// The sum of the pseudo-header of a TCP or UDP packet that has a checksum and goes on to the end of the frame.
fn pseudo_header(packet: &Packet) -> Option<u64> {
    let (head, Layout { l3, l4, .. }) = (packet.head(), packet.layout);
    let (l3, l4) = (l3 as usize, l4 as usize);
    let ip = head.get(l3..)?;
    let (proto, end, addresses) = match be16(head, l3.checked_sub(2)?)? {
        // A fragment's checksum covers more than is here.
        ETH_P_IP if be16(ip, 6)? & 0x3fff == 0 => (*ip.get(9)?, l3 + be16(ip, 2)? as usize, ip.get(12..20)?),
        // Extension headers may say fragment, or another destination.
        ETH_P_IPV6 if l4 == l3 + 40 => (*ip.get(6)?, l3 + 40 + be16(ip, 4)? as usize, ip.get(8..40)?),
        _ => return None,
    };
    let field = match proto {
        ipproto::TCP => TCP_CHECKSUM,
        ipproto::UDP => UDP_CHECKSUM,
        _ => return None,
    };
    let is_whole = end == packet.len as usize && be16(head, l4 + field as usize)? != 0;
    is_whole.then(|| checksum::add(proto as u64 + (end - l4) as u64, addresses))
}
