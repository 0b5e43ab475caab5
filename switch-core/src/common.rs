//! The common shapes of packets, told without parsing: at most one 802.1Q tag, IPv4 without options or IPv6 without extension
//! headers, TCP or UDP, no fragment, and lengths that every datapath reads alike.
//!
//! What the parser ([`crate::parse`]) would find in such a frame lies at places that depend on the shape alone. So a packet's L1
//! key is its first bytes as they came, under the union mask of its port *spelled in bytes* ([`Window::of`]), and a packet whose
//! flow L1 knows is never parsed. What tells the shape (ethertype, protocol, TPID) is part of every key. All other packets take
//! the general way.

use crate::key::{ETH_P_8021Q, ETH_P_IP, ETH_P_IPV6, Field, Mask, ipproto};
use crate::packet::{Layout, Packet};

/// Bytes of a frame that a key is made of: as far as the TCP flags behind a tag and IPv6.
pub const WINDOW: usize = 80;
/// Words of those. Nothing is ever looked at in the last.
pub const WINDOW_WORDS: usize = WINDOW / 8;

const V4_LEN: usize = 20;
const V6_LEN: usize = 40;
const TAG_LEN: usize = 4;

/// One of the common shapes.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Shape(u8);

impl Shape {
    /// Number of shapes.
    pub const COUNT: usize = 8;
    const TAGGED: u8 = 1;
    const V6: u8 = 2;
    const TCP: u8 = 4;

    /// Every shape.
    pub fn all() -> impl Iterator<Item = Shape> {
        (0..Shape::COUNT as u8).map(Shape)
    }

    /// Its number, below [`Shape::COUNT`].
    #[inline(always)]
    pub fn index(self) -> usize {
        self.0 as usize % Shape::COUNT
    }

    /// Whether the transport protocol is TCP.
    #[inline(always)]
    pub fn is_tcp(self) -> bool {
        self.0 & Shape::TCP != 0
    }

    /// Whether the network protocol is IPv6.
    #[inline(always)]
    pub fn is_v6(self) -> bool {
        self.0 & Shape::V6 != 0
    }

    /// Ethertype behind the tag.
    pub fn eth_type(self) -> u16 {
        if self.is_v6() { ETH_P_IPV6 } else { ETH_P_IP }
    }

    /// IP protocol.
    pub fn ip_proto(self) -> u8 {
        if self.is_tcp() { ipproto::TCP } else { ipproto::UDP }
    }

    #[inline(always)]
    fn l3(self) -> usize {
        14 + if self.0 & Shape::TAGGED != 0 { TAG_LEN } else { 0 }
    }

    #[inline(always)]
    fn l4(self) -> usize {
        self.l3() + if self.is_v6() { V6_LEN } else { V4_LEN }
    }
}

/// What is found in a packet of a common shape without parsing it.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Recognized {
    /// Its shape.
    pub shape: Shape,
    /// As in [`Field::TcpFlags`].
    pub tcp_flags: u16,
}

/// The shape of a packet that was not edited, or only taken out of a tunnel, if it is a common one; where its headers are is
/// then in `packet.layout`.
#[inline(always)]
pub fn recognize<const TUNNELLED: bool>(packet: &mut Packet) -> Option<Recognized> {
    // What is read may lie behind the head and mean nothing. But if what it says were true, the transport header would end
    // behind all that is read, so in the end it is compared with the head.
    let window = packet.window::<TUNNELLED>();
    if is(window, 12, ETH_P_IP, 0x45, 0xff) {
        return v4::<TUNNELLED, 14>(packet, Shape(0));
    }
    if is(window, 12, ETH_P_IPV6, 0x60, 0xf0) {
        return v6::<TUNNELLED, 14>(packet, Shape(Shape::V6));
    }
    if u16_at(window, 12) != ETH_P_8021Q {
        return None;
    }
    if is(window, 16, ETH_P_IP, 0x45, 0xff) {
        return v4::<TUNNELLED, 18>(packet, Shape(Shape::TAGGED));
    }
    if is(window, 16, ETH_P_IPV6, 0x60, 0xf0) {
        return v6::<TUNNELLED, 18>(packet, Shape(Shape::TAGGED | Shape::V6));
    }
    None
}

/// Whether there is this ethertype, and behind it a byte that is `first` under `mask`: one comparison of words as they lie.
#[inline(always)]
fn is(window: &[u8; WINDOW], at: usize, eth_type: u16, first: u8, mask: u8) -> bool {
    let ([a, b], word) = (eth_type.to_be_bytes(), u32_at(window, at));
    word & u32::from_ne_bytes([0xff, 0xff, mask, 0]) == u32::from_ne_bytes([a, b, first, 0])
}

#[inline(always)]
fn u16_at(window: &[u8; WINDOW], at: usize) -> u16 {
    window[at..].first_chunk().map_or(0, |bytes| u16::from_be_bytes(*bytes))
}

#[inline(always)]
fn u32_at(window: &[u8; WINDOW], at: usize) -> u32 {
    window[at..].first_chunk().map_or(0, |bytes| u32::from_ne_bytes(*bytes))
}

/// With an IPv4 header at `L3`.
#[inline(always)]
fn v4<const TUNNELLED: bool, const L3: usize>(packet: &mut Packet, shape: Shape) -> Option<Recognized> {
    let window = packet.window::<TUNNELLED>();
    let (fragment, proto) = (u16::from_ne_bytes([window[L3 + 6], window[L3 + 7]]), window[L3 + 9]);
    let end = L3 as u32 + u16_at(window, L3 + 2) as u32;
    // Behind the end may be padding.
    if fragment & u16::from_be(0x3fff) == 0 && end <= packet.len {
        transport::<TUNNELLED>(packet, shape, proto, L3, L3 + V4_LEN, end)
    } else {
        None
    }
}

/// With an IPv6 header at `L3`.
#[inline(always)]
fn v6<const TUNNELLED: bool, const L3: usize>(packet: &mut Packet, shape: Shape) -> Option<Recognized> {
    let window = packet.window::<TUNNELLED>();
    let (end, proto) = ((L3 + V6_LEN) as u32 + u16_at(window, L3 + 4) as u32, window[L3 + 6]);
    // The smallest frame has room for all of the smallest IPv6 packet, so nobody pads that.
    if end == packet.len { transport::<TUNNELLED>(packet, shape, proto, L3, L3 + V6_LEN, end) } else { None }
}

/// With a transport header at `l4` in an IP packet that ends at `end`.
#[inline(always)]
fn transport<const TUNNELLED: bool>(
    packet: &mut Packet,
    shape: Shape,
    proto: u8,
    l3: usize,
    l4: usize,
    end: u32,
) -> Option<Recognized> {
    let (found, len) = match proto {
        ipproto::UDP => (Recognized { shape, tcp_flags: 0 }, 8),
        ipproto::TCP => {
            let word = u16_at(packet.window::<TUNNELLED>(), l4 + 12);
            let shape = Shape(shape.0 | Shape::TCP);
            (Recognized { shape, tcp_flags: word & 0xfff }, (word >> 12) as usize * 4)
        }
        _ => return None,
    };
    let payload = l4 + len;
    if proto == ipproto::TCP && len < 20 || payload > packet.head_len() || payload as u32 > end {
        return None;
    }
    packet.layout = Layout { l3: l3 as u16, l4: l4 as u16, payload: payload as u16 };
    Some(found)
}

/// A mask over the first bytes of frames of one shape.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Window([u8; WINDOW]);

impl Window {
    /// What `union` looks at in frames of this shape, their VLAN tag, and what tells the shape. Fields of the union that are not
    /// here are the same in all packets of the shape that have just come in.
    pub fn of(shape: Shape, union: &Mask) -> Window {
        let mut window = Window([0; WINDOW]);
        let (l3, l4) = (shape.l3(), shape.l4());
        let mut put = |field: Field, at: usize, skip: usize, bits: usize| {
            window.put(at * 8 + skip, bits, union.get(field));
        };
        put(Field::EthDst, 0, 0, 48);
        put(Field::EthSrc, 6, 0, 48);
        if shape.is_v6() {
            put(Field::IpTos, l3, 4, 8);
            put(Field::Ipv6Label, l3, 12, 20);
            put(Field::IpTtl, l3 + 7, 0, 8);
            put(Field::Ipv6Src, l3 + 8, 0, 128);
            put(Field::Ipv6Dst, l3 + 24, 0, 128);
        } else {
            put(Field::IpTos, l3 + 1, 0, 8);
            put(Field::IpTtl, l3 + 8, 0, 8);
            put(Field::Ipv4Src, l3 + 12, 0, 32);
            put(Field::Ipv4Dst, l3 + 16, 0, 32);
        }
        put(Field::TpSrc, l4, 0, 16);
        put(Field::TpDst, l4 + 2, 0, 16);
        if shape.is_tcp() {
            put(Field::TcpFlags, l4 + 12, 4, 12);
        }
        window.put(12 * 8, 16, 0xffff);
        if shape.0 & Shape::TAGGED != 0 {
            // All of the TCI but the bit that the key has for "there is a tag".
            window.put(14 * 8, 16, 0xefff);
            window.put(16 * 8, 16, 0xffff);
        }
        window.put((l3 + if shape.is_v6() { 6 } else { 9 }) * 8, 8, 0xff);
        window
    }

    /// Sets the `bits` bits from bit `at` on, as they lie in a frame, to those of `mask`.
    fn put(&mut self, at: usize, bits: usize, mask: u128) {
        for i in (0..bits).filter(|i| mask >> (bits - 1 - i) & 1 != 0) {
            self.0[(at + i) / 8] |= 0x80 >> ((at + i) % 8);
        }
    }

    /// As words of a `Packet::window`.
    pub fn words(&self) -> [u64; WINDOW_WORDS] {
        let (chunks, _) = self.0.as_chunks::<8>();
        std::array::from_fn(|i| u64::from_ne_bytes(chunks[i]))
    }
}

#[cfg(test)]
mod tests;
