//! The flow key: every header field and every piece of metadata that a flow may match, as 64-bit words.
//!
//! A key is an array of words, a mask is another of the same shape, and to match is `packet & mask == flow`. The
//! fields and their meaning are those of Linux's `openvswitch` module (`struct sw_flow_key`, `net/openvswitch/flow.h`):
//! a field that a packet does not have is zero, and a mask that looks at a field also holds the field's prerequisites
//! (ethertype, protocol), so that "zero" and "absent" are never mixed up.
//!
//! The first [`PACKET_WORDS`] words come from the packet's own bytes: the parser writes all of them for each packet. The
//! rest is metadata that is zero unless a tunnel, connection tracking or recirculation sets it.

use std::fmt;
use std::ops::{BitAnd, BitOrAssign};

/// Words of a key.
pub const WORDS: usize = 40;
/// The leading words, which the parser fills from the packet and its ingress.
pub const PACKET_WORDS: usize = 17;

/// What a packet is, or what a flow matches under its [`Mask`]: fields in host byte order, packed into words.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
#[repr(C, align(64))]
pub struct Key {
    /// The words; [`Field::place`] says where each field lies.
    pub words: [u64; WORDS],
}

/// The bits of a [`Key`] that count.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Default)]
#[repr(transparent)]
pub struct Mask(pub Key);

impl Default for Key {
    fn default() -> Self {
        Key { words: [0; WORDS] }
    }
}

macro_rules! fields {
    ($($(#[$doc:meta])* $name:ident = $word:literal, $shift:literal, $bits:literal, $text:literal;)*) => {
        /// A field of the key. Widths are in bits.
        #[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Debug)]
        #[repr(u8)]
        pub enum Field { $($(#[$doc])* $name),* }

        impl Field {
            /// Every field, in key order.
            pub const ALL: &'static [Field] = &[$(Field::$name),*];

            /// Where the field lies: word, lowest bit in that word, width in bits. A field of 128 bits starts at bit 0 of
            /// `word`, which holds its upper half; the next word holds the lower half.
            #[inline(always)]
            pub const fn place(self) -> (usize, u32, u32) {
                match self { $(Field::$name => ($word, $shift, $bits)),* }
            }

            /// The field's name in messages.
            pub const fn name(self) -> &'static str {
                match self { $(Field::$name => $text),* }
            }
        }
    };
}

fields! {
    /// Slot of the ingress port.
    InPort = 0, 32, 32, "in_port";
    /// Recirculation id: 0 for a packet that has just come in.
    RecircId = 0, 0, 32, "recirc_id";
    /// Destination MAC address.
    EthDst = 1, 16, 48, "eth.dst";
    /// Parse shape ([`shape`]): not matched by flows, but part of every exact-match key.
    Shape = 1, 0, 16, "shape";
    /// Source MAC address.
    EthSrc = 2, 16, 48, "eth.src";
    /// Ethertype after all VLAN tags; [`ETH_P_802_2`] for a frame with a length field and no SNAP header.
    EthType = 2, 0, 16, "eth_type";
    /// TPID of the outer VLAN tag, 0 if untagged.
    VlanTpid = 3, 48, 16, "vlan.tpid";
    /// TCI of the outer VLAN tag with [`VLAN_PRESENT`] set, 0 if untagged.
    VlanTci = 3, 32, 16, "vlan.tci";
    /// TPID of the inner VLAN tag (802.1ad), 0 if there is none.
    CvlanTpid = 3, 16, 16, "cvlan.tpid";
    /// TCI of the inner VLAN tag with [`VLAN_PRESENT`] set.
    CvlanTci = 3, 0, 16, "cvlan.tci";
    /// IP protocol, or the low 8 bits of the ARP opcode.
    IpProto = 4, 56, 8, "ip.proto";
    /// IPv4 TOS or IPv6 traffic class, DSCP and ECN.
    IpTos = 4, 48, 8, "ip.tos";
    /// TTL or hop limit.
    IpTtl = 4, 40, 8, "ip.ttl";
    /// Fragment type: [`FRAG_NONE`], [`FRAG_FIRST`] or [`FRAG_LATER`].
    IpFrag = 4, 32, 8, "ip.frag";
    /// IPv6 flow label, 20 bits.
    Ipv6Label = 4, 0, 32, "ipv6.label";
    /// IPv4 source, or ARP sender protocol address.
    Ipv4Src = 5, 32, 32, "ipv4.src";
    /// IPv4 destination, or ARP target protocol address.
    Ipv4Dst = 5, 0, 32, "ipv4.dst";
    /// TCP, UDP or SCTP source port; ICMP or ICMPv6 type.
    TpSrc = 6, 48, 16, "tp.src";
    /// TCP, UDP or SCTP destination port; ICMP or ICMPv6 code.
    TpDst = 6, 32, 16, "tp.dst";
    /// The 12 TCP flag bits.
    TcpFlags = 6, 16, 16, "tcp_flags";
    /// IPv6 source.
    Ipv6Src = 7, 0, 128, "ipv6.src";
    /// IPv6 destination.
    Ipv6Dst = 9, 0, 128, "ipv6.dst";
    /// ARP sender hardware address, or the source link-layer address option of neighbour discovery.
    ArpSha = 11, 16, 48, "arp.sha";
    /// ARP target hardware address, or the target link-layer address option of neighbour discovery.
    ArpTha = 12, 16, 48, "arp.tha";
    /// Neighbour discovery's target address.
    NdTarget = 13, 0, 128, "nd.target";
    /// Topmost MPLS label stack entry.
    Mpls0 = 15, 32, 32, "mpls.lse0";
    /// Second MPLS label stack entry.
    Mpls1 = 15, 0, 32, "mpls.lse1";
    /// Third MPLS label stack entry.
    Mpls2 = 16, 32, 32, "mpls.lse2";
    /// Number of MPLS label stack entries in the key (at most 3).
    MplsCount = 16, 0, 8, "mpls.count";
    /// Packet mark.
    SkbMark = 17, 32, 32, "skb_mark";
    /// The datapath's hash, 0 if not computed.
    DpHash = 17, 0, 32, "dp_hash";
    /// Packet priority.
    SkbPriority = 18, 32, 32, "skb_priority";
    /// Connection tracking state bits; 0 for an untracked packet.
    CtState = 18, 16, 16, "ct_state";
    /// Connection tracking zone.
    CtZone = 18, 0, 16, "ct_zone";
    /// Connection mark.
    CtMark = 19, 32, 32, "ct_mark";
    /// Packet type, namespace above type; 0 is Ethernet.
    PacketType = 19, 0, 32, "packet_type";
    /// Connection label.
    CtLabel = 20, 0, 128, "ct_label";
    /// Tunnel id (VNI or GRE key).
    TunId = 22, 0, 64, "tunnel.tun_id";
    /// Outer IPv4 source.
    TunIpv4Src = 23, 32, 32, "tunnel.src";
    /// Outer IPv4 destination.
    TunIpv4Dst = 23, 0, 32, "tunnel.dst";
    /// Outer IPv6 source.
    TunIpv6Src = 24, 0, 128, "tunnel.ipv6_src";
    /// Outer IPv6 destination.
    TunIpv6Dst = 26, 0, 128, "tunnel.ipv6_dst";
    /// Outer TOS.
    TunTos = 28, 56, 8, "tunnel.tos";
    /// Outer TTL.
    TunTtl = 28, 48, 8, "tunnel.ttl";
    /// Outer UDP source port.
    TunTpSrc = 28, 32, 16, "tunnel.tp_src";
    /// Outer UDP destination port.
    TunTpDst = 28, 16, 16, "tunnel.tp_dst";
    /// Tunnel flags: [`TUN_DF`], [`TUN_CSUM`], [`TUN_KEY`], [`TUN_OAM`].
    TunFlags = 28, 0, 16, "tunnel.flags";
    /// VXLAN group policy id.
    TunGbpId = 29, 48, 16, "tunnel.gbp.id";
    /// VXLAN group policy flags.
    TunGbpFlags = 29, 40, 8, "tunnel.gbp.flags";
    /// ERSPAN version 1 index.
    TunErspanIdx = 29, 0, 32, "tunnel.erspan.idx";
    /// Original direction's IPv4 source of a tracked connection.
    CtOrigIpv4Src = 30, 32, 32, "ct_tuple4.src";
    /// Original direction's IPv4 destination of a tracked connection.
    CtOrigIpv4Dst = 30, 0, 32, "ct_tuple4.dst";
    /// Original direction's IPv6 source of a tracked connection.
    CtOrigIpv6Src = 31, 0, 128, "ct_tuple6.src";
    /// Original direction's IPv6 destination of a tracked connection.
    CtOrigIpv6Dst = 33, 0, 128, "ct_tuple6.dst";
    /// Original direction's source port of a tracked connection.
    CtOrigTpSrc = 35, 48, 16, "ct_tuple.tp_src";
    /// Original direction's destination port of a tracked connection.
    CtOrigTpDst = 35, 32, 16, "ct_tuple.tp_dst";
    /// Original direction's protocol of a tracked connection.
    CtOrigProto = 35, 24, 8, "ct_tuple.proto";
    /// IPv6 extension header bits, as userspace OVS matches them.
    Ipv6Exthdrs = 35, 0, 16, "ipv6_exthdrs";
    /// NSH flags.
    NshFlags = 36, 56, 8, "nsh.flags";
    /// NSH metadata type.
    NshMdType = 36, 48, 8, "nsh.mdtype";
    /// NSH next protocol.
    NshNp = 36, 40, 8, "nsh.np";
    /// NSH TTL.
    NshTtl = 36, 32, 8, "nsh.ttl";
    /// NSH service path header: 24 bits of path id above 8 bits of index.
    NshPathHdr = 36, 0, 32, "nsh.path_hdr";
    /// NSH context header 1.
    NshC1 = 37, 32, 32, "nsh.c1";
    /// NSH context header 2.
    NshC2 = 37, 0, 32, "nsh.c2";
    /// NSH context header 3.
    NshC3 = 38, 32, 32, "nsh.c3";
    /// NSH context header 4.
    NshC4 = 38, 0, 32, "nsh.c4";
    /// GENEVE options as they stand in the packet, up to 8 bytes, filled up with zeros; 0 if there are none
    /// ([`crate::tunnel::match_options`]).
    TunOptions = 39, 0, 64, "tunnel.options";
}

/// Bit of a TCI that says "there is a tag" (the CFI bit's place, as in `OVS_KEY_ATTR_VLAN`).
pub const VLAN_PRESENT: u16 = 0x1000;
/// Not a fragment.
pub const FRAG_NONE: u8 = 0;
/// First fragment.
pub const FRAG_FIRST: u8 = 1;
/// Any later fragment: it has no transport header.
pub const FRAG_LATER: u8 = 2;
/// The ethertype that stands for an 802.2 frame without SNAP (`linux/if_ether.h`).
pub const ETH_P_802_2: u16 = 0x0004;
/// Ethertype of IPv4.
pub const ETH_P_IP: u16 = 0x0800;
/// Ethertype of ARP.
pub const ETH_P_ARP: u16 = 0x0806;
/// Ethertype of reverse ARP.
pub const ETH_P_RARP: u16 = 0x8035;
/// Ethertype of IPv6.
pub const ETH_P_IPV6: u16 = 0x86dd;
/// TPID of 802.1Q.
pub const ETH_P_8021Q: u16 = 0x8100;
/// TPID of 802.1ad.
pub const ETH_P_8021AD: u16 = 0x88a8;
/// Ethertype of MPLS unicast.
pub const ETH_P_MPLS_UC: u16 = 0x8847;
/// Ethertype of MPLS multicast.
pub const ETH_P_MPLS_MC: u16 = 0x8848;
/// Ethertype of NSH.
pub const ETH_P_NSH: u16 = 0x894f;
/// Protocol numbers (IANA).
pub mod ipproto {
    /// ICMP.
    pub const ICMP: u8 = 1;
    /// IGMP.
    pub const IGMP: u8 = 2;
    /// TCP.
    pub const TCP: u8 = 6;
    /// UDP.
    pub const UDP: u8 = 17;
    /// GRE.
    pub const GRE: u8 = 47;
    /// ICMPv6.
    pub const ICMPV6: u8 = 58;
    /// SCTP.
    pub const SCTP: u8 = 132;
}
/// Outer header has "don't fragment" (bit of [`Field::TunFlags`]).
pub const TUN_DF: u16 = 1;
/// Outer header has a checksum.
pub const TUN_CSUM: u16 = 2;
/// The tunnel has a key.
pub const TUN_KEY: u16 = 4;
/// Control packet of GENEVE or VXLAN-GPE.
pub const TUN_OAM: u16 = 8;

/// Parse shapes, kept in [`Field::Shape`]: how far the parser came. Two packets of different shape never share an
/// exact-match entry, so that an action which needs a header is not replayed on a packet that lacks it.
pub mod shape {
    /// Network header complete (for IP: lengths are sane).
    pub const L3: u16 = 1;
    /// Transport header complete.
    pub const L4: u16 = 2;
    /// IPv4 options or IPv6 extension headers present.
    pub const L3_OPTIONS: u16 = 4;
    /// The frame claims a network protocol whose header is cut short or lies.
    pub const L3_BAD: u16 = 8;
    /// More VLAN tags than the key holds.
    pub const VLAN_DEEP: u16 = 16;
}

/// Words of the key that have the fields of tunnels.
pub const TUNNEL_WORDS: usize = 9;

/// Whether a word of the key has fields of tunnels.
pub(crate) fn is_tunnel_word(word: usize) -> bool {
    let last = Field::TunErspanIdx.place().0;
    (Field::TunId.place().0..=last).contains(&word) || word == Field::TunOptions.place().0
}

impl Key {
    /// The value of `field`, zero-extended.
    #[inline(always)] // for a given field it is one instruction or two
    pub fn get(&self, field: Field) -> u128 {
        let (word, shift, bits) = field.place();
        match bits {
            128 => (self.words[word] as u128) << 64 | self.words[word + 1] as u128,
            64 => self.words[word] as u128,
            _ => (self.words[word] >> shift & ((1 << bits) - 1)) as u128,
        }
    }

    /// Sets `field`; bits of `value` above the field's width are ignored.
    pub fn set(&mut self, field: Field, value: u128) {
        let (word, shift, bits) = field.place();
        match bits {
            128 => {
                self.words[word] = (value >> 64) as u64;
                self.words[word + 1] = value as u64;
            }
            64 => self.words[word] = value as u64,
            _ => {
                let ones = ((1u64 << bits) - 1) << shift;
                self.words[word] = self.words[word] & !ones | (value as u64) << shift & ones;
            }
        }
    }

    /// The same key with other bits than the mask's cleared.
    pub fn masked(&self, mask: &Mask) -> Key {
        let mut key = *self;
        for (word, mask) in key.words.iter_mut().zip(&mask.0.words) {
            *word &= mask;
        }
        key
    }

    /// Whether the key equals `flow` in the bits of `mask`.
    pub fn matches(&self, flow: &Key, mask: &Mask) -> bool {
        (0..WORDS).all(|i| (self.words[i] ^ flow.words[i]) & mask.0.words[i] == 0)
    }

    /// Whether some packet could match both flows: they agree wherever both look.
    pub fn overlaps(&self, mask: &Mask, other: &Key, other_mask: &Mask) -> bool {
        (0..WORDS).all(|i| (self.words[i] ^ other.words[i]) & mask.0.words[i] & other_mask.0.words[i] == 0)
    }

    /// Ethertype.
    pub fn eth_type(&self) -> u16 {
        self.words[2] as u16
    }

    /// IP protocol.
    pub fn ip_proto(&self) -> u8 {
        (self.words[4] >> 56) as u8
    }

    /// Fragment type.
    pub fn ip_frag(&self) -> u8 {
        (self.words[4] >> 32) as u8
    }

    /// Recirculation id.
    pub fn recirc_id(&self) -> u32 {
        self.words[0] as u32
    }
}

impl Mask {
    /// The mask that looks at nothing.
    pub const EMPTY: Mask = Mask(Key { words: [0; WORDS] });

    /// All bits of `field`, or some of them.
    pub fn get(&self, field: Field) -> u128 {
        self.0.get(field)
    }

    /// Sets the mask of `field`.
    pub fn set(&mut self, field: Field, bits: u128) {
        self.0.set(field, bits);
    }

    /// Looks at the whole of `field`.
    pub fn set_exact(&mut self, field: Field) {
        self.0.set(field, u128::MAX);
    }

    /// Whether any bit of `field` counts.
    pub fn has(&self, field: Field) -> bool {
        self.0.get(field) != 0
    }

    /// Whether every bit of `field` counts.
    pub fn is_exact(&self, field: Field) -> bool {
        let bits = field.place().2;
        self.0.get(field) == if bits == 128 { u128::MAX } else { (1 << bits) - 1 }
    }

    /// Whether `self` looks at nothing that `other` does not look at.
    pub fn is_subset(&self, other: &Mask) -> bool {
        (0..WORDS).all(|i| self.0.words[i] & !other.0.words[i] == 0)
    }
}

impl BitOrAssign<&Mask> for Mask {
    fn bitor_assign(&mut self, other: &Mask) {
        for (word, other) in self.0.words.iter_mut().zip(&other.0.words) {
            *word |= other;
        }
    }
}

impl BitAnd<&Mask> for &Key {
    type Output = Key;
    fn bitand(self, mask: &Mask) -> Key {
        self.masked(mask)
    }
}

impl fmt::Debug for Key {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut map = f.debug_map();
        for &field in Field::ALL {
            let value = self.get(field);
            if value != 0 {
                map.entry(&format_args!("{}", field.name()), &format_args!("{value:#x}"));
            }
        }
        map.finish()
    }
}

impl fmt::Debug for Mask {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn fields_do_not_overlap_and_read_back() {
        let mut seen = Mask::EMPTY;
        for &field in Field::ALL {
            assert!(!seen.has(field), "{} overlaps an earlier field", field.name());
            seen.set_exact(field);
            assert!(seen.is_exact(field));
            let mut key = Key::default();
            key.set(field, u128::MAX);
            assert_eq!(Mask(key).get(field), seen.get(field));
        }
    }

    #[test]
    fn fields_of_tunnels_lie_in_words_of_their_own() {
        for field in Field::ALL {
            let (word, _, bits) = field.place();
            let is_tunnels = field.name().starts_with("tunnel.");
            assert_eq!(is_tunnel_word(word), is_tunnels, "{}", field.name());
            assert_eq!(is_tunnel_word(word + (bits == 128) as usize), is_tunnels);
        }
        assert_eq!((0..WORDS).filter(|&word| is_tunnel_word(word)).count(), TUNNEL_WORDS);
    }

    #[test]
    fn packet_fields_lie_in_the_packet_words() {
        assert!(Field::MplsCount.place().0 < PACKET_WORDS);
        assert!(Field::SkbMark.place().0 >= PACKET_WORDS);
    }

    #[test]
    fn overlap_is_agreement_where_both_look() {
        let (mut a, mut b) = (Key::default(), Key::default());
        let (mut ma, mut mb) = (Mask::EMPTY, Mask::EMPTY);
        a.set(Field::Ipv4Src, 0x0a000001);
        ma.set_exact(Field::Ipv4Src);
        b.set(Field::Ipv4Src, 0x0a000000);
        mb.set(Field::Ipv4Src, 0xffffff00);
        assert!(a.overlaps(&ma, &b, &mb));
        b.set(Field::Ipv4Src, 0x0b000000);
        assert!(!a.overlaps(&ma, &b, &mb));
    }
}
