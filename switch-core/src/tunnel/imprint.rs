//! What the outer headers of packets of one tunnel have in common, so that those that follow a first are recognized by comparing words.
//!
//! This is for UDP without a checksum, in packets of a common shape ([`crate::common`]). All others [`recognize`](super::recognize) finds,
//! of which this is a shorter way to the same.

use super::decap::{Decap, Endpoint, Taken, TunnelKey, be16};
use super::{Kind, geneve};
use crate::checksum;
use crate::common::{Shape, WINDOW_WORDS};
use crate::key::TUN_CSUM;
use crate::packet::{Gso, Layout, Packet, PortId};

/// As far as the tunnel's header, without options, behind a tag and IPv6.
const BYTES: usize = 8 * WINDOW_WORDS;
/// Words that are compared of any packet: as far as there may be something behind IPv4.
const WORDS: usize = 8;
/// Of a UDP header, and of the tunnel's without options.
const UDP_LEN: usize = 8;
const TUNNEL_LEN: usize = 8;
/// Of the options of most packets that have some: OVN's.
const OPTIONS_LEN: usize = 8;

/// All headers in front of the packet inside, but for lengths, checksum, identification, flow label, source port and options, of which
/// only what `looked_at` has is the same.
#[derive(Clone, Copy)]
pub struct Imprint {
    words: [u64; WINDOW_WORDS],
    mask: [u64; WINDOW_WORDS],
    /// Shape of the outer packet.
    pub shape: Shape,
    /// Where its headers are.
    pub layout: Layout,
    /// The logical port by which packets inside come in.
    pub in_port: PortId,
    /// Where the packet inside begins.
    start: u16,
    /// Options as they stand in the first packet, if there are so many.
    options: Option<[u8; OPTIONS_LEN]>,
    /// Sum of what is compared of an IPv4 header, folded, of words as they lie in memory.
    sum: u32,
    /// As in the first packet.
    pub tunnel: TunnelKey,
}

/// What an [`Imprint`] leaves open.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Varying {
    /// Source port.
    pub port: u16,
    /// As in [`TunnelKey`].
    pub options: u64,
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
        let (header, start) = (l4 + UDP_LEN, decap.inner.0);
        if shape.is_tcp() || tunnel.flags & TUN_CSUM != 0 || is_marking || header + TUNNEL_LEN > BYTES {
            return None;
        }
        let mut mask = [0u8; BYTES];
        mask[..header + TUNNEL_LEN].fill(0xff);
        // Length and identification, or label and length.
        mask[l3 + 2..l3 + 6].fill(0);
        match shape.is_v6() {
            false => mask[l3 + 10..l3 + 12].fill(0),
            true => mask[l3 + 1] = 0xf0, // with the lower half of the traffic class
        }
        mask[l4..l4 + 2].fill(0);
        mask[l4 + 4..l4 + 6].fill(0);
        let options = packet.head().get(header + TUNNEL_LEN..start as usize)?;
        let mut imprint = Imprint {
            words: [0; WINDOW_WORDS],
            mask: std::array::from_fn(|i| u64::from_ne_bytes(mask.as_chunks().0[i]) | looked_at[i]),
            shape,
            layout: packet.layout,
            in_port: decap.in_port,
            start,
            options: options.try_into().ok(),
            sum: 0,
            tunnel,
        };
        let window = packet.window::<false>().as_chunks::<8>().0;
        imprint.words = std::array::from_fn(|i| u64::from_ne_bytes(window[i]) & imprint.mask[i]);
        if !shape.is_v6() {
            let header: [u8; 20] = *packet.head().get(l3..)?.first_chunk()?;
            let differing = [2, 4, 10].map(|at| be16(&header, at));
            let differing: u64 = differing.into_iter().flatten().map(u64::from).sum();
            let sum = checksum::fold(checksum::add(0, &header) - differing);
            imprint.sum = u16::from_ne_bytes(sum.to_be_bytes()).into();
        }
        Some(imprint)
    }

    /// What tells tunnels with one of our endpoints apart, for a table of them: of the other end's address, the network inside, and over
    /// IPv4 the TOS, which differs between the packets of a connection if the sender copies what is inside.
    #[inline(always)]
    pub fn peer(packet: &Packet) -> u32 {
        let window = packet.window::<false>();
        let (at, network, tos) = match [window[12], window[13]] {
            [0x08, 0x00] => (26, 46, window[15]),
            [0x81, 0x00] if window[16] == 0x08 => (30, 50, window[19]),
            [0x81, 0x00] => (38, 70, 0),
            _ => (34, 66, 0),
        };
        let word = |at: usize| window[at..].first_chunk().map_or(0, |bytes| u32::from_be_bytes(*bytes));
        word(at) ^ word(network).rotate_left(13) ^ u32::from(tos) << 16
    }

    /// What is left open of one that has just come in, if it has the same headers as the first and all else is as it should be; but for what
    /// its sender has said of it, see [`Imprint::is_plain`].
    #[inline(always)]
    pub fn find(&self, packet: &Packet) -> Option<Varying> {
        let window = packet.window::<false>();
        let differ = |sum: u64, i: usize| {
            sum | u64::from_ne_bytes(window.as_chunks::<8>().0[i]) & self.mask[i] ^ self.words[i]
        };
        // Behind the head's end the window means nothing; but all of the headers is in the head if there is an Ethernet header behind
        // them.
        if (0..WORDS).fold(0, differ) != 0 || self.start as usize + 14 > packet.head_len() {
            return None;
        }
        let (l3, v6) = (self.layout.l3, self.shape.is_v6());
        // The frequent case is spelled out, of the same outcome.
        let (end, l4, port, len) = match (l3, v6) {
            (14, false) => {
                let (end, port, len) = self.v4::<14>(window)?;
                (end, 34, port, len)
            }
            (_, false) => {
                let (end, port, len) = self.v4::<18>(window)?;
                (end, 38, port, len)
            }
            (_, true) => {
                if (WORDS..WINDOW_WORDS).fold(0, differ) != 0 {
                    return None;
                }
                let (head, l4) = (packet.head(), self.layout.l4 as usize);
                (l4 + be16(head, l4 - 36)? as usize, l4, be16(head, l4)?, be16(head, l4 + 4)?)
            }
        };
        if end != packet.len as usize || l4 + len as usize != end {
            return None;
        }
        let mut options = 0;
        let first = l4 + UDP_LEN + TUNNEL_LEN;
        if self.start as usize != first {
            let bytes = packet.head().get(first..self.start as usize)?;
            options = match self.options {
                Some(options) if options == *bytes => self.tunnel.options,
                _ => geneve::read_options(bytes)?,
            };
        }
        Some(Varying { port, options })
    }

    /// Where the IPv4 packet at `L3` ends, if its checksum is right, and source port and length of UDP.
    #[inline(always)]
    fn v4<const L3: usize>(&self, window: &[u8; BYTES]) -> Option<(usize, u16, u16)> {
        let word = |at: usize| [window[L3 + at], window[L3 + at + 1]];
        // A sum of 16-bit words may be made of swapped ones (RFC 1071 §2); of so few, what goes over goes over once.
        let sum =
            [2, 4, 10].into_iter().fold(self.sum, |sum, at| sum + u32::from(u16::from_ne_bytes(word(at))));
        if (sum >> 16) + (sum & 0xffff) != 0xffff {
            return None;
        }
        let [total, port, len] = [2, 20, 24].map(|at| u16::from_be_bytes(word(at)));
        Some((L3 + total as usize, port, len))
    }

    /// What flows match of the outer headers of a packet.
    #[inline(always)]
    pub fn tunnel_of(&self, found: Varying) -> TunnelKey {
        let ports = (found.port, self.tunnel.ports.1);
        TunnelKey { ports, options: found.options, ..self.tunnel }
    }

    /// What [`recognize`](super::recognize) would make of it.
    #[cfg(test)]
    pub fn recognize(&self, packet: &Packet) -> Option<Decap> {
        let tunnel = self.tunnel_of(self.find(packet)?);
        Some(Decap { tunnel, in_port: self.in_port, inner: (self.start, packet.len), mark: None })
    }

    /// Takes the outer headers off a packet that is [plain](Imprint::is_plain), as [`Decap::pop`] does.
    #[inline(always)]
    pub fn pop(&self, packet: &mut Packet) {
        packet.strip(self.start.into());
        packet.in_port = self.in_port;
    }

    /// What [`Imprint::pop`] has taken off a packet of this length that came by `in_port`.
    pub fn taken(&self, in_port: PortId, len: u32) -> Taken {
        Taken::plain(self.start, self.layout, in_port, len)
    }

    /// Whether nothing is left to do to the packet.
    #[inline(always)]
    pub fn is_plain(packet: &Packet) -> bool {
        packet.offload.gso == Gso::None && !packet.offload.needs_csum
    }
}
