//! From bytes to a [`Key`]: what Linux's `openvswitch` module finds in a frame (`net/openvswitch/flow.c`,
//! `key_extract`), so that a flow matches here exactly when it matches there.
//!
//! The kernel looks at the frame's real length and hardly believes the lengths that headers claim: a lying IPv4 total
//! length or wrong version changes nothing in the key (the [`shape`] tells such packets apart), and Ethernet padding is
//! read as a header if the headers before it say so. A network header that is cut short gives zero fields under its
//! ethertype; a transport header that is cut short gives zero ports. Fields that the kernel leaves undefined because no
//! flow can match them are zero.
//!
//! Where this parser differs, on purpose:
//! * The kernel drops a frame without a whole Ethernet header: [`Extracted::Runt`]. (A tagged frame of less than 20 bytes
//!   it drops before the switch sees it, in `skb_vlan_untag`; here that is a frame like others.)
//! * It is not agreed among kernel versions how an IPv6 header chain ends that has more than [`MAX_EXTENSIONS`] headers or
//!   an extension header that goes past the end of the frame: [`Extracted::TooLong`], so the host decides.
//! * NSH headers are not read, so a malformed one is an ordinary frame, which the kernel drops. IPv6 extension header bits
//!   are not collected. A flow that matches either is not for the tables.
//! * Legacy UDP fragmentation offload, whose packets the kernel calls first fragments, is never offered to a guest.

use crate::edit::ipv6_transport;
use crate::key::{
    ETH_P_802_2, ETH_P_8021AD, ETH_P_8021Q, ETH_P_ARP, ETH_P_IP, ETH_P_IPV6, ETH_P_MPLS_MC, ETH_P_MPLS_UC,
    ETH_P_RARP, FRAG_FIRST, FRAG_LATER, FRAG_NONE, Field, Key, PACKET_WORDS, VLAN_PRESENT, ipproto, shape,
};
use crate::packet::{Layout, MAX_SNAPSHOT, NONE, Packet};

#[cfg(test)]
mod plain;
#[cfg(test)]
mod tests;

/// IPv6 extension headers that are followed (`IP6_MAX_EXT_HDRS_CNT` of newer kernels).
pub const MAX_EXTENSIONS: usize = 12;

/// Length of an Ethernet header; shorter frames are runts.
const ETH_LEN: usize = 14;
/// The smallest ethertype; what is less is the length of an 802.3 frame.
const ETH_P_802_3_MIN: u16 = 0x0600;

/// IPv6 next header values of extension headers, and "no next header".
mod nexthdr {
    pub const HOP: u8 = 0;
    pub const ROUTING: u8 = 43;
    pub const FRAGMENT: u8 = 44;
    pub const AUTH: u8 = 51;
    pub const NONE: u8 = 59;
    pub const DEST: u8 = 60;
}

/// How far [`extract`] came. Unless it is `Done`, the key's packet words are unspecified and the layout is empty.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Extracted {
    /// The key and the layout are complete.
    Done,
    /// The headers go on past the head while the frame is longer: call [`Packet::extend`], fill what it gives, and extract
    /// again. Not returned once the head is [`MAX_SNAPSHOT`] bytes or the whole frame. (A packet that was edited cannot be
    /// extended; its caller punts.)
    NeedMore,
    /// There are more headers than are followed: past [`MAX_SNAPSHOT`], or an IPv6 chain that kernels do not agree about.
    /// The packet is for the host.
    TooLong,
    /// Shorter than an Ethernet header: [`crate::drop::DropReason::Runt`].
    Runt,
}

/// Writes all [`PACKET_WORDS`] of `key` and the packet's layout, for a packet that has just come in: recirculation id 0.
/// The metadata words after them are left alone.
#[inline]
pub fn extract(packet: &mut Packet, key: &mut Key) -> Extracted {
    extract_recirculated(packet, key, 0)
}

/// [`extract`] for a packet that goes round again as `recirc_id` after its headers were edited; the metadata that it has
/// collected is kept, and so is the layout of one that has got more tags than are read.
#[inline]
pub fn extract_recirculated(packet: &mut Packet, key: &mut Key, recirc_id: u32) -> Extracted {
    let frame = Frame { head: packet.head(), len: packet.len as usize };
    key.words[..PACKET_WORDS].fill(0);
    key.words[0] = (packet.in_port.slot as u64) << 32 | recirc_id as u64;
    match ethernet(frame, key) {
        // Behind a third tag nothing is found again, but what was known of a packet before tags were pushed is still true.
        Ok(_) if recirc_id != 0 && key.words[1] as u16 & shape::VLAN_DEEP != 0 => Extracted::Done,
        Ok(layout) => {
            packet.layout = layout;
            Extracted::Done
        }
        Err(stop) => {
            let more = frame.head.len() < frame.len.min(MAX_SNAPSHOT);
            packet.layout = Layout::default();
            match stop {
                Stop::Cut if more => Extracted::NeedMore,
                Stop::Cut | Stop::Unsettled => Extracted::TooLong,
                Stop::Runt => Extracted::Runt,
            }
        }
    }
}

/// Whether both datapaths of Open vSwitch find the same in a frame as [`extract`] did: the kernel's hardly looks at the
/// lengths in IP headers, the userspace one (`miniflow_extract` in `lib/flow.c`) reads no further than they say, and nothing
/// of a header whose length cannot be; nor does it look at the length of a TCP header. A packet that they do not agree about
/// is for the host: a flow made for what the one reads may not be for what the other does. The same goes for SNAP frames
/// that are not unnumbered information: only the kernel believes their ethertype. And for IPv6 packets with segments left
/// in a routing header: when their source is rewritten, only the kernel adjusts the transport's checksum
/// (`packet_rh_present` in `lib/packets.c` goes no further).
#[inline(always)]
pub fn is_settled(packet: &Packet, key: &Key) -> bool {
    if key.words[1] as u16 & shape::L3_BAD != 0 {
        return false;
    }
    let Layout { l3, payload, .. } = packet.layout;
    let (l3, payload) = (l3 as usize, payload as usize);
    if l3 != ETH_LEN && is_odd_snap(packet, key, l3) {
        return false;
    }
    let end = match key.eth_type() {
        ETH_P_IP => l3 + be16(packet.head(), l3 + 2) as usize,
        // The smallest frame has room for all of the smallest packet, so nobody pads.
        ETH_P_IPV6 if l3 + 40 + be16(packet.head(), l3 + 4) as usize == packet.len as usize => {
            if key.words[1] as u16 & shape::L3_OPTIONS != 0 && is_routed(packet, l3) {
                return false;
            }
            usize::MAX
        }
        ETH_P_IPV6 => return false,
        _ => return true,
    };
    if payload != NONE as usize {
        payload <= end
    } else {
        key.ip_proto() != ipproto::TCP || key.ip_frag() == FRAG_LATER
    }
}

/// Whether an IPv6 packet has segments left in a routing header.
#[cold]
fn is_routed(packet: &Packet, l3: usize) -> bool {
    let transport = ipv6_transport(packet.head(), l3, packet.layout.l4 as usize);
    transport.is_some_and(|(_, routed)| routed)
}

/// Whether the ethertype of a packet with the network header at `l3` is from a SNAP header whose control field is not 3.
fn is_odd_snap(packet: &Packet, key: &Key, l3: usize) -> bool {
    /// Of the 802.2 and SNAP headers.
    const SNAP: usize = 8;
    let tags = [Field::VlanTpid, Field::CvlanTpid].into_iter().filter(|&tpid| key.get(tpid) != 0).count();
    // Behind more tags than are read, it is what the packet was before they were pushed that has been judged.
    let is_deep = key.words[1] as u16 & shape::VLAN_DEEP != 0;
    !is_deep
        && l3 == ETH_LEN + 4 * tags + SNAP
        && packet.head().get(l3 - SNAP + 2).is_some_and(|&control| control != 3)
}

/// Why a frame was not parsed to its end.
enum Stop {
    /// A header goes on in the frame where the head ends.
    Cut,
    /// What the kernel makes of it depends on its version.
    Unsettled,
    /// No Ethernet header.
    Runt,
}

/// A frame of `len` bytes of which the first ones are at hand.
#[derive(Clone, Copy)]
struct Frame<'a> {
    head: &'a [u8],
    len: usize,
}

impl<'a> Frame<'a> {
    /// The `N` bytes at `at`: `None` if the frame ends before.
    #[inline(always)]
    fn header<const N: usize>(self, at: usize) -> Result<Option<&'a [u8; N]>, Stop> {
        match self.head.get(at..).and_then(<[u8]>::first_chunk) {
            Some(bytes) => Ok(Some(bytes)),
            None if at + N > self.len => Ok(None),
            None => Err(Stop::Cut),
        }
    }
}

/// The big-endian number at `at`. Callers stay inside a header of known length, so that this is one load; outside it is 0.
#[inline(always)]
fn be16(bytes: &[u8], at: usize) -> u16 {
    bytes.get(at..).and_then(<[u8]>::first_chunk).map_or(0, |b| u16::from_be_bytes(*b))
}

/// As [`be16`], 32 bits.
#[inline(always)]
fn be32(bytes: &[u8], at: usize) -> u32 {
    bytes.get(at..).and_then(<[u8]>::first_chunk).map_or(0, |b| u32::from_be_bytes(*b))
}

/// As [`be16`], 64 bits.
#[inline(always)]
fn be64(bytes: &[u8], at: usize) -> u64 {
    bytes.get(at..).and_then(<[u8]>::first_chunk).map_or(0, |b| u64::from_be_bytes(*b))
}

/// The frame's layers from the outside in. Ethernet, at most one VLAN tag, IPv4 without options, TCP or UDP: that is the
/// straight way through.
#[inline(always)]
fn ethernet(frame: Frame<'_>, key: &mut Key) -> Result<Layout, Stop> {
    let Some(header) = frame.header::<ETH_LEN>(0)? else { return Err(Stop::Runt) };
    let mut link = Link { eth_type: be16(header, 12), l3: ETH_LEN, vlans: 0, shape: 0 };
    if is_vlan(link.eth_type) {
        tags(frame, &mut link)?;
    }
    if link.eth_type < ETH_P_802_3_MIN {
        llc(frame, &mut link)?;
    }
    key.words[2] = be64(header, 6) & !0xffff | link.eth_type as u64;
    key.words[3] = link.vlans;
    let (shape, layout) = match link.eth_type {
        ETH_P_IP => ipv4(frame, link.l3, key)?,
        ETH_P_IPV6 => ipv6(frame, link.l3, key)?,
        ETH_P_ARP | ETH_P_RARP => arp(frame, link.l3, key)?,
        ETH_P_MPLS_UC | ETH_P_MPLS_MC => mpls(frame, link.l3, key)?,
        _ => (0, Layout { l3: link.l3 as u16, ..Layout::default() }),
    };
    key.words[1] = be64(header, 0) & !0xffff | (link.shape | shape) as u64;
    Ok(layout)
}

/// What the link layer says: the ethertype, where its payload begins, the word of VLAN tags, shape bits.
struct Link {
    eth_type: u16,
    l3: usize,
    vlans: u64,
    shape: u16,
}

#[inline(always)]
fn is_vlan(eth_type: u16) -> bool {
    eth_type == ETH_P_8021Q || eth_type == ETH_P_8021AD
}

/// Takes off up to two VLAN tags. A tag counts only if an ethertype follows it; otherwise, and when there are more than
/// two, the TPID is left as the ethertype.
#[inline]
fn tags(frame: Frame<'_>, link: &mut Link) -> Result<(), Stop> {
    for shift in [32, 0] {
        let Some(tag) = frame.header::<6>(link.l3 - 2)? else {
            link.shape |= shape::L3_BAD;
            return Ok(());
        };
        link.vlans |= ((be32(tag, 0) | VLAN_PRESENT as u32) as u64) << shift;
        link.eth_type = be16(tag, 4);
        link.l3 += 4;
        if !is_vlan(link.eth_type) {
            return Ok(());
        }
    }
    link.shape |= shape::VLAN_DEEP;
    Ok(())
}

/// An 802.3 frame: its ethertype is in the SNAP header, if it has one with the OUI of Ethernet.
#[cold]
fn llc(frame: Frame<'_>, link: &mut Link) -> Result<(), Stop> {
    link.eth_type = ETH_P_802_2;
    if let Some([0xaa, 0xaa, _control, 0, 0, 0, high, low]) = frame.header::<8>(link.l3)? {
        link.l3 += 8;
        let eth_type = u16::from_be_bytes([*high, *low]);
        if eth_type >= ETH_P_802_3_MIN {
            link.eth_type = eth_type;
        }
    }
    Ok(())
}

#[inline(always)]
fn ipv4(frame: Frame<'_>, l3: usize, key: &mut Key) -> Result<(u16, Layout), Stop> {
    let Some(ip) = frame.header::<20>(l3)? else { return Ok((shape::L3_BAD, Layout::default())) };
    let header_len = (ip[0] & 15) as usize * 4;
    let l4 = l3 + header_len;
    if header_len < 20 || l4 > frame.len {
        return Ok((shape::L3_BAD, Layout::default()));
    }
    let total_len = be16(ip, 2) as usize;
    let sane = ip[0] >> 4 == 4 && total_len >= header_len && l3 + total_len <= frame.len;
    let mut shape = if sane { shape::L3 } else { shape::L3_BAD };
    if header_len > 20 {
        shape |= shape::L3_OPTIONS;
    }
    let frag = match be16(ip, 6) & 0x3fff {
        0 => FRAG_NONE,
        0x2000 => FRAG_FIRST,
        _ => FRAG_LATER,
    };
    let proto = ip[9];
    key.words[4] = (proto as u64) << 56 | (ip[1] as u64) << 48 | (ip[8] as u64) << 40 | (frag as u64) << 32;
    key.words[5] = be64(ip, 12);
    let end = match (frag, proto) {
        (FRAG_LATER, _) => None,
        (_, ipproto::ICMP) => icmp(frame, l4, key)?,
        _ => transport(frame, proto, l4, key)?,
    };
    Ok(layers(shape, l3, l4, end))
}

fn ipv6(frame: Frame<'_>, l3: usize, key: &mut Key) -> Result<(u16, Layout), Stop> {
    let Some(ip) = frame.header::<40>(l3)? else { return Ok((shape::L3_BAD, Layout::default())) };
    let first = be32(ip, 0);
    let sane = first >> 28 == 6 && l3 + 40 + be16(ip, 4) as usize <= frame.len;
    let mut shape = if sane { shape::L3 } else { shape::L3_BAD };
    let mut chain = Chain { proto: ip[6], frag: FRAG_NONE, l4: Some(l3 + 40) };
    if is_extension(ip[6]) {
        chain = extensions(frame, l3 + 40, ip[6])?;
        shape |= shape::L3_OPTIONS;
        if chain.l4.is_none() && chain.frag != FRAG_LATER {
            shape = shape & !shape::L3 | shape::L3_BAD;
        }
    }
    let (tos, label) = ((first >> 20) as u8, first & 0xf_ffff);
    key.words[4] = (chain.proto as u64) << 56
        | (tos as u64) << 48
        | (ip[7] as u64) << 40
        | (chain.frag as u64) << 32
        | label as u64;
    key.words[7] = be64(ip, 8);
    key.words[8] = be64(ip, 16);
    key.words[9] = be64(ip, 24);
    key.words[10] = be64(ip, 32);
    let Some(l4) = chain.l4 else { return Ok((shape, Layout { l3: l3 as u16, ..Layout::default() })) };
    let end = match chain.proto {
        ipproto::ICMPV6 => icmpv6(frame, l4, key)?,
        proto => transport(frame, proto, l4, key)?,
    };
    Ok(layers(shape, l3, l4, end))
}

/// The end of an IPv6 header chain: the protocol as the key has it, the fragment type, and where the transport header
/// begins. The chain of a later fragment ends at its fragment header (protocol 44); one that is cut short has "no next
/// header" for protocol.
struct Chain {
    proto: u8,
    frag: u8,
    l4: Option<usize>,
}

fn is_extension(next: u8) -> bool {
    matches!(next, nexthdr::HOP | nexthdr::ROUTING | nexthdr::FRAGMENT | nexthdr::AUTH | nexthdr::DEST)
}

/// Follows extension headers, the first of which has type `next` and lies at `at` (`ipv6_find_hdr` of the kernel).
#[cold]
fn extensions(frame: Frame<'_>, mut at: usize, mut next: u8) -> Result<Chain, Stop> {
    let mut frag = FRAG_NONE;
    for _ in 0..MAX_EXTENSIONS {
        let broken = |frag| Ok(Chain { proto: nexthdr::NONE, frag, l4: None });
        let Some(&[following, units]) = frame.header::<2>(at)? else { return broken(frag) };
        if next == nexthdr::FRAGMENT {
            frag = FRAG_FIRST;
        }
        if matches!(next, nexthdr::FRAGMENT | nexthdr::ROUTING) && frame.header::<4>(at)?.is_none() {
            return broken(frag);
        }
        let len = match next {
            nexthdr::FRAGMENT => {
                // A later fragment that says it goes on with an extension header is no such thing to the kernel.
                let later = frame.header::<4>(at)?.is_some_and(|header| be16(header, 2) & !7 != 0);
                match later {
                    true if is_extension(following) => return broken(frag),
                    true => return Ok(Chain { proto: nexthdr::FRAGMENT, frag: FRAG_LATER, l4: None }),
                    false => 8,
                }
            }
            nexthdr::AUTH => (units as usize + 2) * 4,
            _ => (units as usize + 1) * 8,
        };
        at += len;
        if at > frame.len {
            return Err(Stop::Unsettled);
        }
        if !is_extension(following) {
            return Ok(Chain { proto: following, frag, l4: Some(at) });
        }
        next = following;
    }
    Err(Stop::Unsettled)
}

/// Shape and layout of an IP packet whose transport header begins at `l4` and, if it is wholly there, ends at `end`.
#[inline(always)]
fn layers(shape: u16, l3: usize, l4: usize, end: Option<usize>) -> (u16, Layout) {
    match end {
        Some(end) => (shape | shape::L4, Layout { l3: l3 as u16, l4: l4 as u16, payload: end as u16 }),
        None => (shape, Layout { l3: l3 as u16, l4: NONE, payload: NONE }),
    }
}

/// Ports and TCP flags. Returns where the transport header ends, if it is wholly there and of a known protocol.
#[inline(always)]
fn transport(frame: Frame<'_>, proto: u8, l4: usize, key: &mut Key) -> Result<Option<usize>, Stop> {
    let (ports, end) = match proto {
        ipproto::TCP => {
            let Some(tcp) = frame.header::<20>(l4)? else { return Ok(None) };
            let end = l4 + (tcp[12] >> 4) as usize * 4;
            if end < l4 + 20 || end > frame.len {
                return Ok(None);
            }
            // Whoever segments the packet or splits its headers off needs the options too.
            if end > frame.head.len() {
                return Err(Stop::Cut);
            }
            key.words[6] = ((be16(tcp, 12) & 0xfff) as u64) << 16;
            (be32(tcp, 0), end)
        }
        ipproto::UDP => match frame.header::<8>(l4)? {
            Some(udp) => (be32(udp, 0), l4 + 8),
            None => return Ok(None),
        },
        ipproto::SCTP => match frame.header::<12>(l4)? {
            Some(sctp) => (be32(sctp, 0), l4 + 12),
            None => return Ok(None),
        },
        _ => return Ok(None),
    };
    key.words[6] |= (ports as u64) << 32;
    Ok(Some(end))
}

/// Type and code of ICMP and ICMPv6, which have the places of the ports.
fn icmp(frame: Frame<'_>, l4: usize, key: &mut Key) -> Result<Option<usize>, Stop> {
    let Some(icmp) = frame.header::<8>(l4)? else { return Ok(None) };
    key.words[6] = (icmp[0] as u64) << 48 | (icmp[1] as u64) << 32;
    Ok(Some(l4 + 8))
}

fn icmpv6(frame: Frame<'_>, l4: usize, key: &mut Key) -> Result<Option<usize>, Stop> {
    const SOLICITATION: u8 = 135;
    const ADVERTISEMENT: u8 = 136;
    let Some(header) = frame.header::<8>(l4)? else { return Ok(None) };
    if matches!(header[..2], [SOLICITATION | ADVERTISEMENT, 0]) {
        neighbour(frame, l4, key)?;
    }
    icmp(frame, l4, key)
}

/// Target and link-layer addresses of neighbour discovery (RFC 4861 §4.3, 4.4). The options end at the first that cannot
/// be right; if one comes twice, target and addresses are all zero.
#[cold]
fn neighbour(frame: Frame<'_>, l4: usize, key: &mut Key) -> Result<(), Stop> {
    let Some(message) = frame.header::<24>(l4)? else { return Ok(()) };
    key.words[13] = be64(message, 8);
    key.words[14] = be64(message, 16);
    let mut at = l4 + 24;
    while let Some(option) = frame.header::<8>(at)? {
        let len = option[1] as usize * 8;
        // One that goes past the frame's end is the last in any case; one of 8 bytes is at hand.
        if len == 0 {
            break;
        }
        // Source address to the place of ARP's sender, target address to that of its target.
        if let ([kind @ (1 | 2), _, ..], 8) = (option, len) {
            let word = &mut key.words[10 + *kind as usize];
            if *word != 0 {
                key.words[11..15].fill(0);
                break;
            }
            *word = be64(option, 0) << 16;
        }
        at += len;
    }
    Ok(())
}

fn arp(frame: Frame<'_>, l3: usize, key: &mut Key) -> Result<(u16, Layout), Stop> {
    let Some(arp) = frame.header::<28>(l3)? else { return Ok((shape::L3_BAD, Layout::default())) };
    let layout = Layout { l3: l3 as u16, ..Layout::default() };
    // Hardware Ethernet, protocol IPv4, with addresses of that length.
    if be64(arp, 0) >> 16 != 0x0001_0800_0604 {
        return Ok((0, layout));
    }
    let op = be16(arp, 6);
    key.words[4] = if op <= 0xff { (op as u64) << 56 } else { 0 };
    key.words[5] = (be32(arp, 14) as u64) << 32 | be32(arp, 24) as u64;
    key.words[11] = be64(arp, 8) & !0xffff;
    key.words[12] = be64(arp, 18) & !0xffff;
    Ok((shape::L3, layout))
}

/// The label stack. All labels down to the bottom must be there for any of them to be counted; three are kept.
#[cold]
fn mpls(frame: Frame<'_>, l3: usize, key: &mut Key) -> Result<(u16, Layout), Stop> {
    let mut depth = 0;
    loop {
        let Some(entry) = frame.header::<4>(l3 + depth * 4)? else {
            let l3 = if depth == 0 { NONE } else { l3 as u16 };
            return Ok((shape::L3_BAD, Layout { l3, ..Layout::default() }));
        };
        let entry = u32::from_be_bytes(*entry) as u64;
        match depth {
            0 => key.words[15] = entry << 32,
            1 => key.words[15] |= entry,
            2 => key.words[16] = entry << 32,
            _ => {}
        }
        depth += 1;
        if entry & 0x100 != 0 {
            key.words[16] |= depth.min(3) as u64;
            return Ok((shape::L3, Layout { l3: l3 as u16, ..Layout::default() }));
        }
    }
}
