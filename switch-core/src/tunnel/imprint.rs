//! What the outer headers of packets of one tunnel have in common, so that those that follow a first are recognized by comparing words.
//!
//! This is for UDP without a checksum, in packets of a common shape ([`crate::common`]). All others [`recognize`](super::recognize) finds,
//! of which this is a shorter way to the same.

use super::Kind;
use super::decap::{Decap, Endpoint, Header, TunnelKey, be16, tunnel};
use crate::checksum;
use crate::common::{Shape, WINDOW_WORDS};
use crate::key::TUN_CSUM;
use crate::packet::{Gso, Layout, Packet};

/// As far as the tunnel's header, behind a tag and IPv6.
const BYTES: usize = 8 * WORDS;
/// Words that are compared.
const WORDS: usize = 8;
/// Of a UDP header.
const UDP_LEN: usize = 8;

/// The headers in front of a tunnel's own header, but for lengths, checksum, identification, flow label and source port, of which only
/// what `looked_at` has is the same.
#[derive(Clone, Copy)]
pub struct Imprint {
    words: [u64; WORDS],
    mask: [u64; WORDS],
    /// Shape of the outer packet.
    pub shape: Shape,
    /// Where its headers are.
    pub layout: Layout,
    /// Sum of what is compared of an IPv4 header.
    sum: u64,
    endpoint: Endpoint,
    tunnel: TunnelKey,
}

impl Imprint {
    /// What a packet, which was recognized, has in common with others of its tunnel and L1 key, of the words `looked_at`. `None` if they
    /// are to be looked at one by one.
    pub fn of(
        packet: &Packet,
        shape: Shape,
        looked_at: &[u64; WINDOW_WORDS],
        decap: &Decap,
        endpoints: &[Endpoint],
    ) -> Option<Imprint> {
        let Layout { l3, l4, .. } = packet.layout;
        let (l3, l4) = (l3 as usize, l4 as usize);
        let tunnel = decap.tunnel;
        let is_its = |end: &&Endpoint| {
            (end.in_port, end.port) == (decap.in_port, tunnel.ports.1) && end.kind != Kind::Gre
        };
        let mut its = endpoints.iter().filter(is_its);
        let endpoint = *its.next()?;
        // If there are more, they must not differ in anything but addresses.
        let read = |end: &Endpoint| (end.kind, end.gbp, end.as_linux);
        if its.any(|end| read(end) != read(&endpoint)) {
            return None;
        }
        // Marks that go over to the packet inside are that packet's affair.
        let is_marking = endpoint.as_linux && tunnel.tos & 3 != 0;
        if shape.is_tcp() || tunnel.flags & TUN_CSUM != 0 || is_marking || l4 + UDP_LEN > BYTES {
            return None;
        }
        let mut mask = [0u8; BYTES];
        mask[..l4 + UDP_LEN].fill(0xff);
        // Length and identification, or label and length.
        mask[l3 + 2..l3 + 6].fill(0);
        match shape.is_v6() {
            false => mask[l3 + 10..l3 + 12].fill(0),
            true => mask[l3 + 1] = 0xf0, // with the lower half of the traffic class
        }
        mask[l4..l4 + 2].fill(0);
        mask[l4 + 4..l4 + 6].fill(0);
        let mut imprint = Imprint {
            words: [0; WORDS],
            mask: std::array::from_fn(|i| u64::from_ne_bytes(mask.as_chunks().0[i]) | looked_at[i]),
            shape,
            layout: packet.layout,
            sum: 0,
            endpoint,
            tunnel,
        };
        let window = packet.window::<false>().as_chunks::<8>().0;
        imprint.words = std::array::from_fn(|i| u64::from_ne_bytes(window[i]) & imprint.mask[i]);
        if !shape.is_v6() {
            let header: [u8; 20] = *packet.head().get(l3..)?.first_chunk()?;
            let differing = [2, 4, 10].map(|at| be16(&header, at));
            let differing: u64 = differing.into_iter().flatten().map(u64::from).sum();
            imprint.sum = checksum::add(0, &header) - differing;
        }
        Some(imprint)
    }

    /// What tells tunnels with one of our endpoints apart, for a table of them: of the other end's address, and over IPv4 the TOS, which
    /// differs between the packets of a connection if the sender copies what is inside.
    #[inline(always)]
    pub fn peer(packet: &Packet) -> u32 {
        let window = packet.window::<false>();
        let (at, tos) = match [window[12], window[13]] {
            [0x08, 0x00] => (26, window[15]),
            [0x81, 0x00] => (30, window[19]),
            _ => (34, 0),
        };
        window[at..].first_chunk().map_or(0, |bytes| u32::from_be_bytes(*bytes)) ^ u32::from(tos) << 16
    }

    /// The packet inside one that has just come in, if it has the same headers as the first and all else is as it should be; but for what its
    /// sender has said of it, see [`Imprint::is_plain`].
    #[inline(always)]
    pub fn recognize(&self, packet: &Packet) -> Option<Decap> {
        let window = packet.window::<false>().as_chunks::<8>().0;
        let differ =
            (0..WORDS).fold(0, |sum, i| sum | u64::from_ne_bytes(window[i]) & self.mask[i] ^ self.words[i]);
        if differ != 0 {
            return None;
        }
        let head = packet.head();
        let (l3, l4) = (self.layout.l3 as usize, self.layout.l4 as usize);
        let ip: &[u8; 20] = head.get(l3..)?.first_chunk()?;
        let word = |at: usize| u16::from_be_bytes([ip[at], ip[at + 1]]);
        let end = match self.shape.is_v6() {
            true => l3 + 40 + word(4) as usize,
            false => {
                let differing = word(2) as u64 + word(4) as u64 + word(10) as u64;
                if checksum::fold(self.sum + differing) != 0xffff {
                    return None;
                }
                l3 + word(2) as usize
            }
        };
        let udp: &[u8; UDP_LEN] = head.get(l4..)?.first_chunk()?;
        if end != packet.len as usize || l4 + u16::from_be_bytes([udp[4], udp[5]]) as usize != end {
            return None;
        }
        let start = l4 + UDP_LEN;
        let Header { len, id, flags, gbp, options } = tunnel(&self.endpoint, head.get(start..)?)?;
        let inner = start + len;
        if inner + 14 > head.len() {
            return None;
        }
        let mut decap = Decap {
            tunnel: self.tunnel,
            in_port: self.endpoint.in_port,
            inner: (inner as u16, end as u32),
            mark: None,
        };
        let key = &mut decap.tunnel;
        (key.id, key.gbp, key.options) = (id, gbp, options);
        debug_assert_eq!(key.flags & flags, flags); // VXLAN and GENEVE always have a key
        key.ports.0 = u16::from_be_bytes([udp[0], udp[1]]);
        Some(decap)
    }

    /// Whether nothing is left to do to the packet.
    #[inline(always)]
    pub fn is_plain(packet: &Packet) -> bool {
        packet.offload.gso == Gso::None && !packet.offload.needs_csum
    }
}
