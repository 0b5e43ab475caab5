//! Packets for tests: built with the right lengths and checksums, and checked for them.
//!
//! Deliberately independent of the switch's own parser, which they test.

use std::ops::Range;

use super::NetHeader;

/// An Ethernet address.
pub type Mac = [u8; 6];

/// The Ethernet broadcast address.
pub const BROADCAST: Mac = [0xff; 6];
/// Ethertype of IPv4.
pub const IPV4: u16 = 0x0800;
/// Ethertype of ARP.
pub const ARP: u16 = 0x0806;
/// Ethertype of IPv6.
pub const IPV6: u16 = 0x86dd;
/// Ethertype of an 802.1Q tag.
pub const DOT1Q: u16 = 0x8100;

const ICMP: u8 = 1;
const TCP: u8 = 6;
const UDP: u8 = 17;
const ICMPV6: u8 = 58;
/// For experiments (RFC 3692): what a packet without a transport header carries unless it is told.
const EXPERIMENTAL: u8 = 253;

/// A packet under construction: Ethernet, tags, a network and a transport header, and a payload.
#[derive(Clone, Debug)]
pub struct Packet {
    dst: Mac,
    src: Mac,
    tags: Vec<(u16, u16)>,
    network: Network,
    transport: Transport,
    payload: Vec<u8>,
}

#[derive(Clone, Copy, Debug)]
enum Network {
    Raw(u16),
    Arp { operation: u16, sender: [u8; 4], target_mac: Mac, target: [u8; 4] },
    V4 { src: [u8; 4], dst: [u8; 4], tos: u8, ttl: u8 },
    V6 { src: [u8; 16], dst: [u8; 16], class: u8, hop_limit: u8 },
}

#[derive(Clone, Copy, Debug)]
enum Transport {
    None { protocol: u8 },
    Tcp { src: u16, dst: u16, seq: u32, ack: u32, flags: u8 },
    Udp { src: u16, dst: u16 },
    Echo { reply: bool, id: u16, seq: u16 },
}

/// Bits of the TCP flags byte.
pub mod tcp {
    /// No more data from the sender.
    pub const FIN: u8 = 0x01;
    /// Synchronise sequence numbers.
    pub const SYN: u8 = 0x02;
    /// Reset the connection.
    pub const RST: u8 = 0x04;
    /// Push to the application.
    pub const PSH: u8 = 0x08;
    /// The acknowledgment field counts.
    pub const ACK: u8 = 0x10;
    /// Congestion window reduced.
    pub const CWR: u8 = 0x80;
}

impl Packet {
    /// A frame from `src` to `dst` (in the order in which one speaks, not in which they stand on the wire).
    pub fn eth(src: Mac, dst: Mac) -> Self {
        Self {
            dst,
            src,
            tags: Vec::new(),
            network: Network::Raw(0x88b5),
            transport: Transport::None { protocol: EXPERIMENTAL },
            payload: Vec::new(),
        }
    }

    /// Adds an 802.1Q tag inside those there are.
    pub fn vlan(self, tci: u16) -> Self {
        self.tag(DOT1Q, tci)
    }

    /// Adds a tag with any TPID.
    pub fn tag(mut self, tpid: u16, tci: u16) -> Self {
        self.tags.push((tpid, tci));
        self
    }

    /// Sets the ethertype of a frame that is neither ARP nor IP (default: 0x88b5, for local experiments).
    pub fn ethertype(self, ethertype: u16) -> Self {
        Self { network: Network::Raw(ethertype), ..self }
    }

    /// An ARP request (RFC 826) for `target`.
    pub fn arp_request(self, sender: [u8; 4], target: [u8; 4]) -> Self {
        Self { network: Network::Arp { operation: 1, sender, target_mac: [0; 6], target }, ..self }
    }

    /// An ARP reply to the frame's destination.
    pub fn arp_reply(self, sender: [u8; 4], target: [u8; 4]) -> Self {
        Self { network: Network::Arp { operation: 2, sender, target_mac: self.dst, target }, ..self }
    }

    /// IPv4 without options.
    pub fn ipv4(self, src: [u8; 4], dst: [u8; 4]) -> Self {
        Self { network: Network::V4 { src, dst, tos: 0, ttl: 64 }, ..self }
    }

    /// IPv6 without extension headers.
    pub fn ipv6(self, src: [u8; 16], dst: [u8; 16]) -> Self {
        Self { network: Network::V6 { src, dst, class: 0, hop_limit: 64 }, ..self }
    }

    /// Sets TTL or hop limit.
    pub fn ttl(mut self, value: u8) -> Self {
        match &mut self.network {
            Network::V4 { ttl, .. } => *ttl = value,
            Network::V6 { hop_limit, .. } => *hop_limit = value,
            _ => {}
        }
        self
    }

    /// Sets type of service or traffic class.
    pub fn tos(mut self, value: u8) -> Self {
        match &mut self.network {
            Network::V4 { tos, .. } => *tos = value,
            Network::V6 { class, .. } => *class = value,
            _ => {}
        }
        self
    }

    /// TCP without options, sequence and acknowledgment 1, ACK set.
    pub fn tcp(self, src: u16, dst: u16) -> Self {
        Self { transport: Transport::Tcp { src, dst, seq: 1, ack: 1, flags: tcp::ACK }, ..self }
    }

    /// TCP with everything given.
    pub fn tcp_segment(self, ports: (u16, u16), seq: u32, ack: u32, flags: u8) -> Self {
        Self { transport: Transport::Tcp { src: ports.0, dst: ports.1, seq, ack, flags }, ..self }
    }

    /// Another IP protocol, whose header is the start of the payload (default: 253, for experiments).
    pub fn protocol(self, protocol: u8) -> Self {
        Self { transport: Transport::None { protocol }, ..self }
    }

    /// UDP.
    pub fn udp(self, src: u16, dst: u16) -> Self {
        Self { transport: Transport::Udp { src, dst }, ..self }
    }

    /// An ICMP or ICMPv6 echo request.
    pub fn echo_request(self, id: u16, seq: u16) -> Self {
        Self { transport: Transport::Echo { reply: false, id, seq }, ..self }
    }

    /// An ICMP or ICMPv6 echo reply.
    pub fn echo_reply(self, id: u16, seq: u16) -> Self {
        Self { transport: Transport::Echo { reply: true, id, seq }, ..self }
    }

    /// What stands behind all headers.
    pub fn payload(self, payload: &[u8]) -> Self {
        Self { payload: payload.to_vec(), ..self }
    }

    /// A payload of `len` bytes that differ from their neighbours, so that a shift or a swap shows.
    pub fn payload_len(self, len: usize) -> Self {
        Self { payload: (0..len).map(|at| (at % 251) as u8).collect(), ..self }
    }

    /// The frame with all checksums complete.
    pub fn build(&self) -> Vec<u8> {
        self.assemble(false).0
    }

    /// The frame as a guest with checksum offload sends it: the transport checksum is left to the device, its field holds the
    /// sum of the pseudo-header, and the header says so (virtio 1.2, §5.1.6.2). Without TCP or UDP, the same as
    /// [`Self::build`] with an empty header.
    pub fn build_partial(&self) -> (NetHeader, Vec<u8>) {
        let (frame, transport_at) = self.assemble(true);
        let offset = match self.transport {
            Transport::Tcp { .. } => 16,
            Transport::Udp { .. } => 6,
            _ => return (NetHeader::default(), frame),
        };
        let header = NetHeader {
            flags: NetHeader::NEEDS_CSUM,
            csum_start: transport_at as u16,
            csum_offset: offset,
            ..NetHeader::default()
        };
        (header, frame)
    }

    /// The frame as a super-frame whose payload the device (or the receiver) cuts into pieces of `size` bytes: TSO for TCP,
    /// USO for UDP.
    ///
    /// # Panics
    /// If it is neither TCP nor UDP over IP.
    pub fn build_gso(&self, size: u16) -> (NetHeader, Vec<u8>) {
        let (header, frame) = self.build_partial();
        let gso_type = match (self.network, self.transport) {
            (Network::V4 { .. }, Transport::Tcp { .. }) => NetHeader::GSO_TCPV4,
            (Network::V6 { .. }, Transport::Tcp { .. }) => NetHeader::GSO_TCPV6,
            (Network::V4 { .. } | Network::V6 { .. }, Transport::Udp { .. }) => NetHeader::GSO_UDP_L4,
            _ => panic!("only TCP and UDP over IP can be segmented"),
        };
        let hdr_len = (frame.len() - self.payload.len()) as u16;
        (NetHeader { gso_type, gso_size: size, hdr_len, ..header }, frame)
    }

    /// The bytes, and where the transport header starts.
    fn assemble(&self, partial: bool) -> (Vec<u8>, usize) {
        let mut frame = Vec::with_capacity(64 + self.payload.len());
        frame.extend(self.dst);
        frame.extend(self.src);
        for (tpid, tci) in &self.tags {
            frame.extend(tpid.to_be_bytes());
            frame.extend(tci.to_be_bytes());
        }
        let transport = self.transport_header();
        let length = transport.len() + self.payload.len();
        let protocol = match (self.transport, self.network) {
            (Transport::Tcp { .. }, _) => TCP,
            (Transport::Udp { .. }, _) => UDP,
            (Transport::Echo { .. }, Network::V6 { .. }) => ICMPV6,
            (Transport::Echo { .. }, _) => ICMP,
            (Transport::None { protocol }, _) => protocol,
        };
        let mut pseudo = 0;
        match self.network {
            Network::Raw(ethertype) => frame.extend(ethertype.to_be_bytes()),
            Network::Arp { operation, sender, target_mac, target } => {
                frame.extend(ARP.to_be_bytes());
                frame.extend([0, 1, 8, 0, 6, 4]);
                frame.extend(operation.to_be_bytes());
                frame.extend(self.src);
                frame.extend(sender);
                frame.extend(target_mac);
                frame.extend(target);
            }
            Network::V4 { src, dst, tos, ttl } => {
                frame.extend(IPV4.to_be_bytes());
                let start = frame.len();
                frame.extend([0x45, tos]);
                frame.extend(((20 + length) as u16).to_be_bytes());
                frame.extend([0, 0, 0x40, 0, ttl, protocol, 0, 0]);
                frame.extend(src);
                frame.extend(dst);
                let checksum = !fold(sum(&frame[start..]));
                frame[start + 10..start + 12].copy_from_slice(&checksum.to_be_bytes());
                pseudo = sum(&src) + sum(&dst) + u64::from(protocol) + length as u64;
            }
            Network::V6 { src, dst, class, hop_limit } => {
                frame.extend(IPV6.to_be_bytes());
                frame.extend([0x60 | class >> 4, class << 4, 0, 0]);
                frame.extend((length as u16).to_be_bytes());
                frame.extend([protocol, hop_limit]);
                frame.extend(src);
                frame.extend(dst);
                pseudo = sum(&src) + sum(&dst) + u64::from(protocol) + length as u64;
            }
        }
        let start = frame.len();
        frame.extend(&transport);
        frame.extend(&self.payload);
        let at = match self.transport {
            Transport::Tcp { .. } => start + 16,
            Transport::Udp { .. } => start + 6,
            Transport::Echo { .. } => start + 2,
            Transport::None { .. } => return (frame, start),
        };
        let checksum = if partial && matches!(protocol, TCP | UDP) {
            fold(pseudo)
        } else {
            // ICMP, unlike all others, sums no pseudo-header.
            let pseudo = if protocol == ICMP { 0 } else { pseudo };
            let complete = !fold(sum(&frame[start..]) + pseudo);
            // RFC 768: a computed 0 is sent as all ones, for 0 means "no checksum".
            if complete == 0 && protocol == UDP { 0xffff } else { complete }
        };
        frame[at..at + 2].copy_from_slice(&checksum.to_be_bytes());
        (frame, start)
    }

    fn transport_header(&self) -> Vec<u8> {
        let mut header = Vec::with_capacity(20);
        match self.transport {
            Transport::None { .. } => {}
            Transport::Tcp { src, dst, seq, ack, flags } => {
                header.extend(src.to_be_bytes());
                header.extend(dst.to_be_bytes());
                header.extend(seq.to_be_bytes());
                header.extend(ack.to_be_bytes());
                header.extend([0x50, flags, 0xff, 0xff, 0, 0, 0, 0]);
            }
            Transport::Udp { src, dst } => {
                header.extend(src.to_be_bytes());
                header.extend(dst.to_be_bytes());
                header.extend(((8 + self.payload.len()) as u16).to_be_bytes());
                header.extend([0, 0]);
            }
            Transport::Echo { reply, id, seq } => {
                let kind = match (self.network, reply) {
                    (Network::V6 { .. }, false) => 128,
                    (Network::V6 { .. }, true) => 129,
                    (_, false) => 8,
                    (_, true) => 0,
                };
                header.extend([kind, 0, 0, 0]);
                header.extend(id.to_be_bytes());
                header.extend(seq.to_be_bytes());
            }
        }
        header
    }
}

/// What [`check`] found in a frame that is in order.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Checked {
    /// Destination address.
    pub dst: Mac,
    /// Source address.
    pub src: Mac,
    /// TPID and TCI of each tag, outermost first.
    pub tags: Vec<(u16, u16)>,
    /// The ethertype behind the tags.
    pub ethertype: u16,
    /// IP protocol, 0 if it is not IP.
    pub protocol: u8,
    /// Where the network header starts.
    pub network: usize,
    /// Where the transport header starts.
    pub transport: usize,
    /// Source and destination port of TCP and UDP.
    pub ports: (u16, u16),
    /// TCP sequence number.
    pub seq: u32,
    /// TCP flags.
    pub flags: u8,
    /// What stands behind all headers; Ethernet padding is not part of it.
    pub payload: Range<usize>,
}

/// Takes a received frame apart and verifies every length and checksum. A checksum that the header leaves to us
/// (`NEEDS_CSUM`) must be the transport's, with the right pseudo-header sum in its field.
///
/// # Errors
/// What is wrong with it.
pub fn check(header: &NetHeader, frame: &[u8]) -> Result<Checked, String> {
    let word = |at: usize| {
        frame
            .get(at..at + 2)
            .map(|b| u16::from_be_bytes([b[0], b[1]]))
            .ok_or(format!("ends before byte {at}"))
    };
    let mut checked = Checked {
        dst: frame.get(..6).and_then(|mac| mac.try_into().ok()).ok_or("shorter than an address")?,
        src: frame.get(6..12).and_then(|mac| mac.try_into().ok()).ok_or("shorter than two addresses")?,
        tags: Vec::new(),
        ethertype: 0,
        protocol: 0,
        network: 12,
        transport: 0,
        ports: (0, 0),
        seq: 0,
        flags: 0,
        payload: 0..0,
    };
    while matches!(word(checked.network)?, DOT1Q | 0x88a8) {
        checked.tags.push((word(checked.network)?, word(checked.network + 2)?));
        checked.network += 4;
    }
    checked.ethertype = word(checked.network)?;
    checked.network += 2;
    let at = checked.network;
    let (end, pseudo) = match checked.ethertype {
        IPV4 => {
            let header_len = usize::from(frame.get(at).ok_or("no IPv4 header")? & 15) * 4;
            let ip = frame.get(at..at + header_len.max(20)).ok_or("truncated IPv4 header")?;
            if fold(sum(ip)) != 0xffff {
                return Err("bad IPv4 header checksum".into());
            }
            checked.protocol = ip[9];
            checked.transport = at + header_len;
            (at + usize::from(word(at + 2)?), sum(&ip[12..20]))
        }
        IPV6 => {
            let ip = frame.get(at..at + 40).ok_or("truncated IPv6 header")?;
            checked.protocol = ip[6];
            checked.transport = at + 40;
            (at + 40 + usize::from(word(at + 4)?), sum(&ip[8..40]))
        }
        _ => {
            checked.transport = at;
            checked.payload = at..frame.len();
            (frame.len(), 0)
        }
    };
    if checked.protocol == 0 {
        return if header.flags & NetHeader::NEEDS_CSUM != 0 {
            Err("checksum left to us of something that is not IP".into())
        } else {
            Ok(checked)
        };
    }
    let start = checked.transport;
    let body = frame.get(start..end).ok_or(format!("IP length says {end}, frame has {}", frame.len()))?;
    let (headers, checksum_at) = match checked.protocol {
        TCP => (20.max(usize::from(body.get(12).ok_or("truncated TCP header")? >> 4) * 4), 16),
        UDP => (8, 6),
        ICMP | ICMPV6 => (8, 2),
        _ => (0, usize::MAX),
    };
    if body.len() < headers {
        return Err("truncated transport header".into());
    }
    checked.payload = start + headers..end;
    if checksum_at == usize::MAX {
        return Ok(checked);
    }
    if matches!(checked.protocol, TCP | UDP) {
        checked.ports = (word(start)?, word(start + 2)?);
    }
    if checked.protocol == TCP {
        checked.seq = u32::from(word(start + 4)?) << 16 | u32::from(word(start + 6)?);
        checked.flags = body[13];
    }
    if checked.protocol == UDP && usize::from(word(start + 4)?) != body.len() {
        return Err(format!("UDP length {} is not {}", word(start + 4)?, body.len()));
    }
    let pseudo =
        if checked.protocol == ICMP { 0 } else { pseudo + u64::from(checked.protocol) + body.len() as u64 };
    if header.flags & NetHeader::NEEDS_CSUM != 0 {
        let (wanted, has) = ((start, checksum_at), (header.csum_start.into(), header.csum_offset.into()));
        if wanted != has {
            return Err(format!("checksum start and offset are {has:?}, should be {wanted:?}"));
        }
        if word(start + checksum_at)? != fold(pseudo) {
            return Err("checksum field does not hold the pseudo-header's sum".into());
        }
    } else if fold(sum(body) + pseudo) != 0xffff {
        return Err(format!("bad checksum of protocol {}", checked.protocol));
    }
    Ok(checked)
}

/// Sum of the big-endian 16-bit words (RFC 1071), not folded; an odd last byte counts as if followed by 0.
fn sum(bytes: &[u8]) -> u64 {
    bytes.chunks(2).map(|word| u64::from(word[0]) << 8 | u64::from(word.get(1).copied().unwrap_or(0))).sum()
}

fn fold(mut sum: u64) -> u16 {
    while sum > 0xffff {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    sum as u16
}

#[cfg(test)]
mod tests {
    use super::*;

    const A: Mac = [2, 0, 0, 0, 0, 1];
    const B: Mac = [2, 0, 0, 0, 0, 2];

    fn v4() -> Packet {
        Packet::eth(A, B).ipv4([192, 168, 0, 1], [192, 168, 0, 199])
    }

    #[test]
    fn ipv4_header_is_that_of_a_known_packet() {
        // The worked example of RFC 1071's arithmetic found in many texts: 4500 0073 0000 4000 4011 b861 …
        let frame = Packet::eth(A, B)
            .ipv4([192, 168, 0, 1], [192, 168, 0, 199])
            .udp(1, 2)
            .payload_len(0x73 - 28)
            .build();
        assert_eq!(frame[14..26], [0x45, 0, 0, 0x73, 0, 0, 0x40, 0, 0x40, 0x11, 0xb8, 0x61]);
        assert_eq!(frame[..14], [2, 0, 0, 0, 0, 2, 2, 0, 0, 0, 0, 1, 8, 0]);
    }

    #[test]
    fn everything_built_checks_and_every_flipped_bit_is_found() {
        let v6 = Packet::eth(A, B).ipv6([0xfd; 16], [0xfc; 16]);
        let packets = [
            v4().tcp(1000, 2000).payload_len(101),
            v4().udp(1000, 2000).payload_len(100),
            v4().echo_request(1, 2).payload_len(7),
            v6.clone().tcp(1, 2).payload_len(33),
            v6.clone().vlan(5).udp(1, 2).payload_len(33),
            v6.tag(0x88a8, 9).vlan(5).echo_reply(1, 2).payload_len(33),
        ];
        for packet in packets {
            let frame = packet.build();
            let checked = check(&NetHeader::default(), &frame).unwrap();
            assert_eq!(frame[checked.payload.clone()], packet.payload);
            assert_eq!((checked.src, checked.dst, checked.tags.len()), (A, B, packet.tags.len()));
            for at in checked.transport..frame.len() {
                let mut broken = frame.clone();
                broken[at] ^= 0x10;
                assert!(check(&NetHeader::default(), &broken).is_err(), "{packet:?}: byte {at}");
            }
        }
    }

    #[test]
    fn partial_checksums_complete_to_the_right_ones() {
        for packet in [v4().vlan(7).tcp(1, 2).payload_len(11), v4().udp(1, 2).payload_len(10)] {
            let (header, mut frame) = packet.build_partial();
            check(&header, &frame).unwrap();
            check(&NetHeader::default(), &frame).unwrap_err();
            // What a device does: sum from csum_start on, complement, store.
            let start = usize::from(header.csum_start);
            let at = start + usize::from(header.csum_offset);
            let complete = !fold(sum(&frame[start..]));
            frame[at..at + 2].copy_from_slice(&complete.to_be_bytes());
            assert_eq!(frame, packet.build());

            let elsewhere = NetHeader { csum_start: header.csum_start + 2, ..header };
            assert!(check(&elsewhere, &packet.build_partial().1).is_err());
        }
    }

    #[test]
    fn arp_and_gso_frames_have_their_fields() {
        let arp = Packet::eth(A, BROADCAST).arp_request([10, 0, 0, 1], [10, 0, 0, 2]).build();
        assert_eq!(arp[12..22], [8, 6, 0, 1, 8, 0, 6, 4, 0, 1]);
        assert_eq!(arp[22..42], [A.as_slice(), &[10, 0, 0, 1], &[0; 6], &[10, 0, 0, 2]].concat());

        let (header, frame) = v4().vlan(3).tcp(1, 2).payload_len(40_000).build_gso(1448);
        assert_eq!((header.gso_type, header.gso_size, header.hdr_len), (NetHeader::GSO_TCPV4, 1448, 58));
        assert_eq!((header.csum_start, header.csum_offset), (38, 16));
        assert_eq!(check(&header, &frame).unwrap().payload.len(), 40_000);
        assert_eq!(v4().udp(1, 2).payload_len(9).build_gso(4).0.gso_type, NetHeader::GSO_UDP_L4);
    }
}
