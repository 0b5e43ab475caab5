//! Rewriting of headers, as Linux's `net/openvswitch/actions.c` does it (and, for ICMP, ARP and neighbour discovery, which
//! the kernel leaves to userspace, as OVS's `lib/odp-execute.c`).
//!
//! Checksums are updated by what changed (RFC 1624), so a wrong one stays wrong by as much. With
//! [`Offload::needs_csum`](crate::packet::Offload::needs_csum) the transport checksum holds the pseudo-header's sum: addresses change it, ports do
//! not. A later fragment has no transport header and none is edited in it.

use crate::action::{FieldSet, SetGroup};
use crate::checksum;
use crate::compile::PuntReason;
use crate::compile::Ttl;
use crate::crc32c;
use crate::drop::DropReason;
use crate::flow::Match;
use crate::key::{self, Field, ipproto};
use crate::packet::{self, Packet};

/// Bytes of a header that are replaced: `bytes & !mask | value`.
#[derive(Debug, PartialEq, Eq, Clone, Copy)]
pub(crate) struct Patch<const N: usize> {
    value: [u8; N],
    mask: [u8; N],
}

impl<const N: usize> Patch<N> {
    pub(crate) const NOTHING: Self = Patch { value: [0; N], mask: [0; N] };

    /// Adds the low `len` bytes of a value and its mask at offset `at`.
    fn put(&mut self, at: usize, len: usize, value: u128, mask: u128) {
        let (value, mask) = (value.to_be_bytes(), mask.to_be_bytes());
        for i in 0..len {
            let m = mask[16 - len + i];
            self.value[at + i] = self.value[at + i] & !m | value[16 - len + i] & m;
            self.mask[at + i] |= m;
        }
    }

    /// Makes this the patch that comes to the same as this one and then `next`.
    pub(crate) fn then(&mut self, next: &Patch<N>) {
        next.apply(&mut self.value);
        self.mask.iter_mut().zip(next.mask).for_each(|(mask, more)| *mask |= more);
    }

    fn is_nothing(&self) -> bool {
        self.mask == [0; N]
    }

    #[inline(always)]
    pub(crate) fn apply(&self, bytes: &mut [u8; N]) {
        for (byte, (value, mask)) in bytes.iter_mut().zip(self.value.iter().zip(&self.mask)) {
            *byte = *byte & !mask | value;
        }
    }
}

/// A patch of both MAC addresses, applied word by word.
#[derive(Debug, PartialEq, Eq, Clone, Copy)]
pub(crate) struct LinkPatch {
    keep: (u64, u32),
    value: (u64, u32),
}

impl From<Patch<12>> for LinkPatch {
    fn from(patch: Patch<12>) -> LinkPatch {
        let Patch { value, mask } = patch;
        LinkPatch { keep: words(&mask.map(|byte| !byte)), value: words(&value) }
    }
}

/// The bytes that stay when the destination, the source, or both are replaced: by 1 and 2 as bits.
const KEPT: [(u64, u32); 4] = {
    const ALL: u8 = 0xff;
    const DST: [u8; 12] = [ALL, ALL, ALL, ALL, ALL, ALL, 0, 0, 0, 0, 0, 0];
    const SRC: [u8; 12] = [0, 0, 0, 0, 0, 0, ALL, ALL, ALL, ALL, ALL, ALL];
    [words(&[ALL; 12]), words(&SRC), words(&DST), (0, 0)]
};

impl LinkPatch {
    /// Replaces whole addresses by those of `macs`, which are 0 where they are not to be replaced.
    #[inline(always)]
    pub(crate) fn whole(dst: bool, src: bool, macs: (u64, u32)) -> LinkPatch {
        LinkPatch { keep: KEPT[dst as usize | (src as usize) << 1], value: macs }
    }

    /// What makes it by [`LinkPatch::whole`], if it does no more.
    pub(crate) fn as_whole(&self) -> Option<(bool, bool, (u64, u32))> {
        let which = KEPT.iter().position(|kept| *kept == self.keep)?;
        Some((which & 1 != 0, which & 2 != 0, self.value))
    }

    #[inline(always)]
    pub(crate) fn apply(&self, bytes: &mut [u8; 12]) {
        let (old, LinkPatch { keep, value }) = (words(bytes), *self);
        bytes[..8].copy_from_slice(&(old.0 & keep.0 | value.0).to_ne_bytes());
        bytes[8..].copy_from_slice(&(old.1 & keep.1 | value.1).to_ne_bytes());
    }
}

#[inline(always)]
const fn words(&[a, b, c, d, e, f, g, h, i, j, k, l]: &[u8; 12]) -> (u64, u32) {
    (u64::from_ne_bytes([a, b, c, d, e, f, g, h]), u32::from_ne_bytes([i, j, k, l]))
}

/// The fields of an IPv4 header that can be set.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Ipv4Edit {
    tos: Patch<1>,
    ttl: Patch<1>,
    addresses: Patch<8>,
}

/// The fields of a neighbour discovery message that can be set.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct NdEdit {
    target: Patch<16>,
    sll: Patch<6>,
    tll: Patch<6>,
}

/// A rewrite of one header.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Edit {
    /// Both MAC addresses.
    Eth(Patch<12>),
    Ipv4(Ipv4Edit),
    /// The whole fixed header.
    Ipv6(Box<Patch<40>>),
    /// Both ports.
    Tcp(Patch<4>),
    Udp(Patch<4>),
    Sctp(Patch<4>),
    /// Type and code of ICMP or ICMPv6.
    Icmp(Patch<2>),
    /// From the opcode to the end of an Ethernet/IPv4 ARP message.
    Arp(Box<Patch<22>>),
    Nd(Box<NdEdit>),
}

const ARP_BODY: usize = 6;
const ND_HEADER: usize = 24;
const ND_OPT_SLL: u8 = 1;
const ND_OPT_TLL: u8 = 2;

impl Edit {
    /// Compiles `set(...)` of a header for a flow, or `None` if it changes nothing. The flow has to match the header's
    /// presence. Protocol and fragment type may be named (a plain `set` names all of a header) but not changed.
    pub(crate) fn compile(
        group: SetGroup,
        sets: &[FieldSet],
        matches: &Match,
    ) -> Result<Option<Edit>, PuntReason> {
        let sets = || {
            sets.iter().filter(|set| {
                let constant = matches!(set.field, Field::IpProto | Field::IpFrag) && group != SetGroup::Arp;
                let (value, seen) = (matches.key.get(set.field), matches.mask.get(set.field));
                set.mask != 0 && !(constant && set.mask & !seen == 0 && (set.value ^ value) & set.mask == 0)
            })
        };
        let unknown = |set: &FieldSet| Err(PuntReason::SetField(set.field.name()));
        let name = group_name(group);
        if !is_present(group, matches) {
            return Err(PuntReason::SetWithoutMatch(name));
        }
        let edit = match group {
            SetGroup::Eth => {
                let mut patch = Patch::NOTHING;
                for set in sets() {
                    match set.field {
                        Field::EthDst => patch.put(0, 6, set.value, set.mask),
                        Field::EthSrc => patch.put(6, 6, set.value, set.mask),
                        _ => return unknown(set),
                    }
                }
                (!patch.is_nothing()).then_some(Edit::Eth(patch))
            }
            SetGroup::Ipv4 => {
                let mut edit =
                    Ipv4Edit { tos: Patch::NOTHING, ttl: Patch::NOTHING, addresses: Patch::NOTHING };
                for set in sets() {
                    match set.field {
                        Field::IpTos => edit.tos.put(0, 1, set.value, set.mask),
                        Field::IpTtl => edit.ttl.put(0, 1, set.value, set.mask),
                        Field::Ipv4Src => edit.addresses.put(0, 4, set.value, set.mask),
                        Field::Ipv4Dst => edit.addresses.put(4, 4, set.value, set.mask),
                        _ => return unknown(set),
                    }
                }
                let nothing = edit.tos.is_nothing() && edit.ttl.is_nothing() && edit.addresses.is_nothing();
                (!nothing).then_some(Edit::Ipv4(edit))
            }
            SetGroup::Ipv6 => {
                let mut patch = Patch::NOTHING;
                for set in sets() {
                    match set.field {
                        // The first word is 4 bits of version, 8 of traffic class, 20 of flow label.
                        Field::IpTos => patch.put(0, 4, set.value << 20, set.mask << 20),
                        Field::Ipv6Label => patch.put(0, 4, set.value & 0xfffff, set.mask & 0xfffff),
                        Field::IpTtl => patch.put(7, 1, set.value, set.mask),
                        Field::Ipv6Src => patch.put(8, 16, set.value, set.mask),
                        Field::Ipv6Dst => patch.put(24, 16, set.value, set.mask),
                        _ => return unknown(set),
                    }
                }
                (!patch.is_nothing()).then(|| Edit::Ipv6(Box::new(patch)))
            }
            SetGroup::Tcp | SetGroup::Udp | SetGroup::Sctp => {
                let mut patch = Patch::NOTHING;
                for set in sets() {
                    match set.field {
                        Field::TpSrc => patch.put(0, 2, set.value, set.mask),
                        Field::TpDst => patch.put(2, 2, set.value, set.mask),
                        _ => return unknown(set),
                    }
                }
                let edit = match group {
                    SetGroup::Tcp => Edit::Tcp,
                    SetGroup::Udp => Edit::Udp,
                    _ => Edit::Sctp,
                };
                (!patch.is_nothing()).then_some(edit(patch))
            }
            SetGroup::Icmp | SetGroup::Icmpv6 => {
                let mut patch = Patch::NOTHING;
                for set in sets() {
                    match set.field {
                        Field::TpSrc => patch.put(0, 1, set.value, set.mask),
                        Field::TpDst => patch.put(1, 1, set.value, set.mask),
                        _ => return unknown(set),
                    }
                }
                (!patch.is_nothing()).then_some(Edit::Icmp(patch))
            }
            SetGroup::Arp => {
                let mut patch = Patch::NOTHING;
                for set in sets() {
                    match set.field {
                        // The key has 8 of the opcode's 16 bits; a whole opcode has no others.
                        Field::IpProto if set.mask == 0xff => patch.put(0, 2, set.value & 0xff, 0xffff),
                        Field::IpProto => patch.put(0, 2, set.value, set.mask),
                        Field::ArpSha => patch.put(2, 6, set.value, set.mask),
                        Field::Ipv4Src => patch.put(8, 4, set.value, set.mask),
                        Field::ArpTha => patch.put(12, 6, set.value, set.mask),
                        Field::Ipv4Dst => patch.put(18, 4, set.value, set.mask),
                        _ => return unknown(set),
                    }
                }
                (!patch.is_nothing()).then(|| Edit::Arp(Box::new(patch)))
            }
            SetGroup::Nd => {
                let mut edit = NdEdit { target: Patch::NOTHING, sll: Patch::NOTHING, tll: Patch::NOTHING };
                for set in sets() {
                    match set.field {
                        Field::NdTarget => edit.target.put(0, 16, set.value, set.mask),
                        Field::ArpSha => edit.sll.put(0, 6, set.value, set.mask),
                        Field::ArpTha => edit.tll.put(0, 6, set.value, set.mask),
                        _ => return unknown(set),
                    }
                }
                let nothing = edit.target.is_nothing() && edit.sll.is_nothing() && edit.tll.is_nothing();
                (!nothing).then(|| Edit::Nd(Box::new(edit)))
            }
            SetGroup::Mpls => return Err(PuntReason::Mpls),
            SetGroup::Nsh => return Err(PuntReason::Nsh),
            // Metadata is not a header.
            SetGroup::SkbMark | SetGroup::SkbPriority => return Err(PuntReason::SetField(name)),
        };
        Ok(edit)
    }

    /// The whole TTL, or hop limit, if that is all that it sets.
    pub(crate) fn sets_ttl(&self) -> Option<Ttl> {
        match self {
            Edit::Ipv4(Ipv4Edit { tos, ttl: Patch { value: [ttl], mask: [0xff] }, addresses })
                if tos.is_nothing() && addresses.is_nothing() =>
            {
                Some(Ttl::Set4(*ttl))
            }
            Edit::Ipv6(patch) => {
                let mut whole = [0; 40];
                whole[7] = 0xff;
                (patch.mask == whole).then_some(Ttl::Set6(patch.value[7]))
            }
            _ => None,
        }
    }

    /// Rewrites the packet. A header that is not there in full is [`DropReason::TruncatedHeader`].
    pub(crate) fn apply(&self, packet: &mut Packet) -> Result<(), DropReason> {
        match self {
            Edit::Eth(patch) => {
                patch.apply(window(packet.head_mut(), 0)?);
                Ok(())
            }
            Edit::Ipv4(edit) => edit.apply(packet),
            Edit::Ipv6(patch) => set_ipv6(patch, packet),
            Edit::Tcp(patch) => set_ports(patch, packet, 16, false),
            Edit::Udp(patch) => set_ports(patch, packet, 6, true),
            Edit::Sctp(patch) => set_sctp(patch, packet),
            Edit::Icmp(patch) => set_icmp(patch, packet),
            Edit::Arp(patch) => {
                let l3 = packet.layout.l3 as usize;
                patch.apply(window(packet.head_mut(), l3 + ARP_BODY)?);
                Ok(())
            }
            Edit::Nd(edit) => edit.apply(packet),
        }
    }
}

/// The header's name in actions.
fn group_name(group: SetGroup) -> &'static str {
    match group {
        SetGroup::Eth => "eth",
        SetGroup::Ipv4 => "ipv4",
        SetGroup::Ipv6 => "ipv6",
        SetGroup::Tcp => "tcp",
        SetGroup::Udp => "udp",
        SetGroup::Sctp => "sctp",
        SetGroup::Icmp => "icmp",
        SetGroup::Icmpv6 => "icmpv6",
        SetGroup::Arp => "arp",
        SetGroup::Nd => "nd",
        SetGroup::Mpls => "mpls",
        SetGroup::Nsh => "nsh",
        SetGroup::SkbMark => "skb_mark",
        SetGroup::SkbPriority => "skb_priority",
    }
}

/// Whether every packet that the flow matches claims to have the header.
fn is_present(group: SetGroup, matches: &Match) -> bool {
    let is =
        |field, values: &[u128]| matches.mask.is_exact(field) && values.contains(&matches.key.get(field));
    let eth_type = |values: &[u16]| {
        matches.mask.is_exact(Field::EthType) && values.contains(&(matches.key.get(Field::EthType) as u16))
    };
    let proto = |proto: u8| is(Field::IpProto, &[proto as u128]);
    match group {
        SetGroup::Ipv4 => eth_type(&[key::ETH_P_IP]),
        SetGroup::Ipv6 => eth_type(&[key::ETH_P_IPV6]),
        SetGroup::Tcp => eth_type(&[key::ETH_P_IP, key::ETH_P_IPV6]) && proto(ipproto::TCP),
        SetGroup::Udp => eth_type(&[key::ETH_P_IP, key::ETH_P_IPV6]) && proto(ipproto::UDP),
        SetGroup::Sctp => eth_type(&[key::ETH_P_IP, key::ETH_P_IPV6]) && proto(ipproto::SCTP),
        SetGroup::Icmp => eth_type(&[key::ETH_P_IP]) && proto(ipproto::ICMP),
        SetGroup::Icmpv6 => eth_type(&[key::ETH_P_IPV6]) && proto(ipproto::ICMPV6),
        SetGroup::Nd => {
            is_present(SetGroup::Icmpv6, matches) && is(Field::TpSrc, &[135, 136]) && is(Field::TpDst, &[0])
        }
        SetGroup::Arp => eth_type(&[key::ETH_P_ARP, key::ETH_P_RARP]),
        // These have no prerequisite, or no edit.
        SetGroup::Eth | SetGroup::Mpls | SetGroup::Nsh | SetGroup::SkbMark | SetGroup::SkbPriority => true,
    }
}

/// The `N` bytes at offset `at`. The offset of an absent header lies outside every head.
fn window<const N: usize>(head: &mut [u8], at: usize) -> Result<&mut [u8; N], DropReason> {
    head.get_mut(at..).and_then(|bytes| bytes.first_chunk_mut()).ok_or(DropReason::TruncatedHeader)
}

/// Updates the checksum at offset `at` for bytes that it covers.
fn update_checksum(packet: &mut Packet, at: usize, old: &[u8], new: &[u8]) -> Result<(), DropReason> {
    let field = window::<2>(packet.head_mut(), at)?;
    *field = checksum::update(u16::from_be_bytes(*field), old, new).to_be_bytes();
    Ok(())
}

/// Updates the transport checksum for a change of addresses. Where there is no transport header that the pseudo-header
/// belongs to, there is nothing to do.
fn update_pseudo_header(packet: &mut Packet, proto: u8, old: &[u8], new: &[u8]) {
    let offset = match proto {
        ipproto::TCP => 16,
        ipproto::UDP => 6,
        ipproto::ICMPV6 => 2,
        _ => return,
    };
    let (l4, partial) = (packet.layout.l4 as usize, packet.is_partial());
    let Ok(field) = window::<2>(packet.head_mut(), l4 + offset) else { return };
    let check = u16::from_be_bytes(*field);
    if proto == ipproto::UDP && check == 0 && !partial {
        return; // RFC 768: no checksum was made
    }
    let update = if partial { checksum::update_partial } else { checksum::update };
    *field = match update(check, old, new) {
        0 if proto == ipproto::UDP => [0xff; 2],
        check => check.to_be_bytes(),
    };
}

impl Ipv4Edit {
    fn apply(&self, packet: &mut Packet) -> Result<(), DropReason> {
        let l3 = packet.layout.l3 as usize;
        let header = window::<20>(packet.head_mut(), l3)?;
        let old = *header;
        self.tos.apply(window(header, 1)?);
        self.ttl.apply(window(header, 8)?);
        self.addresses.apply(window(header, 12)?);
        let new = *header;
        if new == old {
            return Ok(());
        }
        // The checksum itself stands in both and cancels out.
        update_checksum(packet, l3 + 10, &old, &new)?;
        // ICMP has no pseudo-header in IPv4, and number 58 is not ICMPv6 there.
        if old[12..] != new[12..] && old[9] != ipproto::ICMPV6 {
            update_pseudo_header(packet, old[9], &old[12..], &new[12..]);
        }
        Ok(())
    }
}

fn set_ipv6(patch: &Patch<40>, packet: &mut Packet) -> Result<(), DropReason> {
    let l3 = packet.layout.l3 as usize;
    let header = window::<40>(packet.head_mut(), l3)?;
    let old = *header;
    patch.apply(header);
    let new = *header;
    if old[8..] != new[8..]
        && let Some((proto, routed)) = ipv6_transport(packet.head(), l3, packet.layout.l4 as usize)
    {
        let end = if routed { 24 } else { 40 };
        update_pseudo_header(packet, proto, &old[8..end], &new[8..end]);
    }
    Ok(())
}

/// The protocol of the header at `l4`, and whether a routing header with segments left comes before it: then the
/// destination in the IPv6 header is not the one in the pseudo-header (RFC 8200 §8.1). `None` if the chain of extension
/// headers does not lead there.
pub(crate) fn ipv6_transport(head: &[u8], l3: usize, l4: usize) -> Option<(u8, bool)> {
    let mut proto = *head.get(l3 + 6)?;
    let mut at = l3 + 40;
    let mut routed = false;
    while at < l4 {
        let &[next, len, _, segments_left] = head.get(at..)?.first_chunk()?;
        at += match proto {
            // Hop-by-hop and destination options, routing.
            0 | 60 => (len as usize + 1) * 8,
            43 => {
                routed |= segments_left != 0;
                (len as usize + 1) * 8
            }
            44 => 8,                      // fragment
            51 => (len as usize + 2) * 4, // authentication
            _ => return None,
        };
        proto = next;
    }
    (at == l4).then_some((proto, routed))
}

/// Where the transport header to be edited begins; `None` in a later IPv4 fragment, which has none. (The key of a later
/// IPv6 fragment names no transport protocol, so no flow that edits one matches it.)
fn transport(packet: &Packet) -> Result<Option<usize>, DropReason> {
    if packet.layout.l4 != packet::NONE {
        return Ok(Some(packet.layout.l4 as usize));
    }
    let l3 = packet.layout.l3 as usize;
    match packet.head().get(l3..).and_then(|header| header.first_chunk::<20>()) {
        Some(header) if header[0] >> 4 == 4 && (header[6] & 0x1f, header[7]) != (0, 0) => Ok(None),
        _ => Err(DropReason::TruncatedHeader),
    }
}

/// Sets TCP or UDP ports; the checksum is at `check` in the header, and zero may mean "none".
fn set_ports(
    patch: &Patch<4>,
    packet: &mut Packet,
    check: usize,
    zero_is_none: bool,
) -> Result<(), DropReason> {
    let Some(l4) = transport(packet)? else { return Ok(()) };
    let partial = packet.is_partial();
    let &mut field = window::<2>(packet.head_mut(), l4 + check)?;
    let ports = window::<4>(packet.head_mut(), l4)?;
    let old = *ports;
    patch.apply(ports);
    let new = *ports;
    if partial || old == new || zero_is_none && field == [0; 2] {
        return Ok(());
    }
    update_checksum(packet, l4 + check, &old, &new)?;
    let field = window::<2>(packet.head_mut(), l4 + check)?;
    if zero_is_none && *field == [0; 2] {
        *field = [0xff; 2];
    }
    Ok(())
}

fn set_sctp(patch: &Patch<4>, packet: &mut Packet) -> Result<(), DropReason> {
    let Some(l4) = transport(packet)? else { return Ok(()) };
    let end = ip_end(packet, l4 + 12);
    let partial = packet.is_partial();
    let header = window::<12>(packet.head_mut(), l4)?;
    let ports = window::<4>(header, 0)?;
    let old = *ports;
    patch.apply(ports);
    let new = *ports;
    if !partial {
        let sum = window::<4>(header, 8)?;
        let change = crc32c::change(old, new, end - l4 as u32 - 4);
        *sum = (u32::from_le_bytes(*sum) ^ change).to_le_bytes();
    }
    Ok(())
}

/// The end of the IP packet in the frame, which may have padding behind it; the frame's end if the header's length is no
/// sensible one, in particular if it ends before `least`.
fn ip_end(packet: &Packet, least: usize) -> u32 {
    let l3 = packet.layout.l3 as usize;
    let end = match packet.head().get(l3..).and_then(|header| header.first_chunk::<20>()) {
        Some(ip) if ip[0] >> 4 == 4 => l3 as u32 + u16::from_be_bytes([ip[2], ip[3]]) as u32,
        Some(ip) => l3 as u32 + 40 + u16::from_be_bytes([ip[4], ip[5]]) as u32,
        None => packet.len,
    };
    if (least as u32..=packet.len).contains(&end) { end } else { packet.len }
}

fn set_icmp(patch: &Patch<2>, packet: &mut Packet) -> Result<(), DropReason> {
    let Some(l4) = transport(packet)? else { return Ok(()) };
    let partial = packet.is_partial();
    let fields = window::<2>(packet.head_mut(), l4)?;
    let old = *fields;
    patch.apply(fields);
    let new = *fields;
    if partial || old == new { Ok(()) } else { update_checksum(packet, l4 + 2, &old, &new) }
}

impl NdEdit {
    /// A packet has one link-layer address option of either kind; the first is the one that is set.
    fn apply(&self, packet: &mut Packet) -> Result<(), DropReason> {
        let Some(l4) = transport(packet)? else { return Ok(()) };
        let end = packet.len as usize;
        if l4 + ND_HEADER > end {
            return Ok(()); // as OVS does: too short to have a target
        }
        patch_covered(&self.target, packet, l4, l4 + 8)?;
        let mut at = l4 + ND_HEADER;
        while at + 8 <= end {
            let &mut [kind, len] = window::<2>(packet.head_mut(), at)?;
            match (kind, len) {
                (_, 0) => break,
                (ND_OPT_SLL, 1) => return patch_covered(&self.sll, packet, l4, at + 2),
                (ND_OPT_TLL, 1) => return patch_covered(&self.tll, packet, l4, at + 2),
                _ => at += len as usize * 8,
            }
        }
        Ok(())
    }
}

/// Patches bytes at `at` of an ICMPv6 message that begins at `l4`, and updates its checksum.
fn patch_covered<const N: usize>(
    patch: &Patch<N>,
    packet: &mut Packet,
    l4: usize,
    at: usize,
) -> Result<(), DropReason> {
    let partial = packet.is_partial();
    let bytes = window::<N>(packet.head_mut(), at)?;
    let old = *bytes;
    patch.apply(bytes);
    let new = *bytes;
    if partial || old == new { Ok(()) } else { update_checksum(packet, l4 + 2, &old, &new) }
}
