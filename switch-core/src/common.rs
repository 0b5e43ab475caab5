//! The common shapes of packets, told without parsing: at most one 802.1Q tag, IPv4 without options or IPv6 without extension
//! headers, TCP or UDP, no fragment, and lengths that every datapath reads alike.
//!
//! What the parser ([`crate::parse`]) would find in such a frame lies at places that depend on the shape alone. So a packet's L1
//! key is its first bytes as they came, under the union mask of its port *spelled in bytes* ([`Window::of`]), and a packet whose
//! flow L1 knows is never parsed. What the shape itself says (ethertype, protocol, fragment type, TPID) is part of the key by
//! the shape's number. All other packets take the general way.

use crate::key::{ETH_P_8021Q, ETH_P_IP, ETH_P_IPV6, Field, Mask, ipproto};
use crate::packet::{Layout, Packet};

/// Bytes of a frame that a key is made of: as far as the TCP flags behind a tag and IPv6.
pub const WINDOW: usize = 80;
/// Words of those.
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

/// The frame's shape, if it is a common one; where its headers are is then in `packet.layout`.
#[inline(always)]
pub fn recognize(packet: &mut Packet) -> Option<Shape> {
    let head = packet.head();
    let (shape, end) = match head.first_chunk::<42>()?[12..16] {
        [0x08, 0x00, 0x45, _] => v4(head, Shape(0))?,
        [0x86, 0xdd, 0x60..=0x6f, _] => v6(head, Shape(Shape::V6), packet.len)?,
        [0x81, 0x00, ..] => match head[16..19] {
            [0x08, 0x00, 0x45] => v4(head, Shape(Shape::TAGGED))?,
            [0x86, 0xdd, 0x60..=0x6f] => v6(head, Shape(Shape::TAGGED | Shape::V6), packet.len)?,
            _ => return None,
        },
        _ => return None,
    };
    if end.network > packet.len as usize || end.transport > end.network || end.transport > head.len() {
        return None;
    }
    packet.layout = Layout { l3: shape.l3() as u16, l4: shape.l4() as u16, payload: end.transport as u16 };
    Some(shape)
}

/// Where headers say that things end, from the start of the frame.
struct End {
    /// The IP packet.
    network: usize,
    /// The transport header.
    transport: usize,
}

#[inline(always)]
fn v4(head: &[u8], shape: Shape) -> Option<(Shape, End)> {
    let l3 = shape.l3();
    let ip = head.get(l3..)?.first_chunk::<V4_LEN>()?;
    if u16::from_be_bytes([ip[6], ip[7]]) & 0x3fff != 0 {
        return None;
    }
    let network = l3 + u16::from_be_bytes([ip[2], ip[3]]) as usize;
    transport(head, shape, ip[9], network)
}

#[inline(always)]
fn v6(head: &[u8], shape: Shape, len: u32) -> Option<(Shape, End)> {
    let l3 = shape.l3();
    let ip = head.get(l3..)?.first_chunk::<V6_LEN>()?;
    let network = l3 + V6_LEN + u16::from_be_bytes([ip[4], ip[5]]) as usize;
    // The smallest frame has room for all of the smallest packet, so nobody pads.
    if network != len as usize {
        return None;
    }
    transport(head, shape, ip[6], network)
}

#[inline(always)]
fn transport(head: &[u8], shape: Shape, proto: u8, network: usize) -> Option<(Shape, End)> {
    let l4 = shape.l4();
    match proto {
        ipproto::UDP => Some((shape, End { network, transport: l4 + 8 })),
        ipproto::TCP => {
            let len = (*head.get(l4 + 12)? >> 4) as usize * 4;
            (len >= 20).then_some((Shape(shape.0 | Shape::TCP), End { network, transport: l4 + len }))
        }
        _ => None,
    }
}

/// The TCP flags of a packet of this shape, as in [`Field::TcpFlags`].
#[inline(always)]
pub fn tcp_flags(shape: Shape, packet: &Packet) -> u16 {
    match packet.head().get(shape.l4() + 12..) {
        Some(&[high, low, ..]) if shape.is_tcp() => u16::from_be_bytes([high, low]) & 0xfff,
        _ => 0,
    }
}

/// A mask over the first bytes of frames of one shape.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Window([u8; WINDOW]);

impl Window {
    /// What `union` looks at in frames of this shape, and their VLAN tag. Fields of the union that are not here are the same
    /// in all packets of the shape that have just come in.
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
        if shape.0 & Shape::TAGGED != 0 {
            // All of the TCI but the bit that the key has for "there is a tag".
            window.put(14 * 8, 16, 0xefff);
        }
        window
    }

    /// Sets the `bits` bits from bit `at` on, as they lie in a frame, to those of `mask`.
    fn put(&mut self, at: usize, bits: usize, mask: u128) {
        for i in (0..bits).filter(|i| mask >> (bits - 1 - i) & 1 != 0) {
            self.0[(at + i) / 8] |= 0x80 >> ((at + i) % 8);
        }
    }

    /// As words of a [`Packet::window`].
    pub fn words(&self) -> [u64; WINDOW_WORDS] {
        let (chunks, _) = self.0.as_chunks::<8>();
        std::array::from_fn(|i| u64::from_ne_bytes(chunks[i]))
    }
}

const _: () = assert!(ETH_P_8021Q == 0x8100 && ETH_P_IP == 0x0800 && ETH_P_IPV6 == 0x86dd);

#[cfg(test)]
mod tests;
