//! What is sent: flows, sizes, and how a received frame is told from what it should be.

use std::fmt;
use std::ops::Range;
use std::str::FromStr;

use crate::frontend::NetHeader;
use crate::frontend::packet::{Mac, Packet};
use crate::overlay::Envelope;

/// Offset of the ports in a frame, and of a tunnel's UDP ports in its outer one.
pub(super) const PORTS: usize = 34;
/// Of the IPv4 header's checksum.
const IPV4_CHECKSUM: Range<usize> = 24..26;
/// Payload of a TCP segment in a super-frame.
const MSS: u16 = 1448;
/// Segments in a super-frame.
const SEGMENTS: usize = 45;
/// Flows that differ in the source port only.
const SOURCE_PORTS: u32 = 1 << 16;
/// Destination ports start here; a class is 256 of them.
const DESTINATION: u32 = 0x2000;
/// The TTL that packets are sent with.
pub const TTL: u8 = 64;

/// In which order the flows are gone through.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Order {
    /// One after the other, round and round.
    Walk,
    /// At random.
    Random,
}

/// How long frames are, the frame check sequence not counted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Sizes {
    /// All of this length.
    Fixed(usize),
    /// 64, 570 and 1518 bytes, 7 to 4 to 1.
    Imix,
    /// TCP super-frames of almost 64 KiB, to be segmented by whoever cannot take them whole.
    Tso,
}

impl FromStr for Sizes {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text {
            "imix" => Ok(Self::Imix),
            "tso" => Ok(Self::Tso),
            _ => match text.parse() {
                Ok(len) if (64..=9000).contains(&len) => Ok(Self::Fixed(len)),
                _ => Err("64 to 9000 bytes, 'imix' or 'tso'".into()),
            },
        }
    }
}

impl fmt::Display for Sizes {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Fixed(len) => write!(f, "{len}"),
            Self::Imix => f.write_str("imix"),
            Self::Tso => f.write_str("tso"),
        }
    }
}

impl Sizes {
    /// The longest frame.
    pub fn longest(self) -> usize {
        match self {
            Self::Fixed(len) => len,
            Self::Imix => 1518,
            Self::Tso => 54 + SEGMENTS * usize::from(MSS),
        }
    }

    /// The length of the frames in a slot of a ring.
    fn of_slot(self, slot: u16) -> usize {
        /// 7 small, 4 middle and 1 large, well mixed.
        const IMIX: [usize; 12] = [64, 570, 64, 64, 570, 64, 1518, 64, 570, 64, 570, 64];
        match self {
            Self::Imix => IMIX[usize::from(slot) % IMIX.len()],
            fixed => fixed.longest(),
        }
    }

    /// Whether frames may have this length.
    #[inline(always)]
    pub(super) fn has(self, len: usize) -> bool {
        match self {
            Self::Imix => [64, 570, 1518].contains(&len),
            fixed => fixed.longest() == len,
        }
    }

    /// Where the payload starts.
    pub(super) fn payload_at(self) -> usize {
        if self == Self::Tso { 54 } else { 42 }
    }
}

/// The flows of one direction, and the sizes of their packets.
#[derive(Clone, Copy, Debug)]
pub struct Traffic {
    /// Number of flows, each with a 5-tuple of its own.
    pub flows: u32,
    /// In which order they send.
    pub order: Order,
    /// How long their packets are.
    pub sizes: Sizes,
    /// Flows are dealt out to so many classes, each with destination ports of its own, for rules to tell apart. 1 to 32.
    pub classes: u32,
}

/// A port's side of the traffic: who sends to whom.
#[derive(Clone, Copy, Debug)]
pub struct Ends {
    /// MAC addresses, of sender and receiver.
    pub macs: [Mac; 2],
    /// IPv4 addresses.
    pub ips: [[u8; 4]; 2],
}

impl Ends {
    /// Of the direction from port `from` to port `to`.
    pub fn between(from: u8, to: u8) -> Self {
        Self { macs: [mac(from), mac(to)], ips: [[10, 0, 0, from + 1], [10, 0, 0, to + 1]] }
    }

    /// With the MAC addresses that a router would give its packets: those of `routed_macs`.
    pub fn routed(self) -> Self {
        Self { macs: Self::routed_macs(self.macs), ..self }
    }

    fn routed_macs(macs: [Mac; 2]) -> [Mac; 2] {
        macs.map(|mut mac| {
            mac[4] = 0xaa;
            mac
        })
    }
}

/// The MAC address of a port.
fn mac(port: u8) -> Mac {
    [2, 0, 0, 0, 0, port + 1]
}

impl Traffic {
    /// The destination ports of a class: value and mask.
    pub fn class_ports(class: u32) -> (u16, u16) {
        ((DESTINATION + 256 * class) as u16, 0xff00)
    }

    /// The flow of packet `seq`.
    #[inline(always)]
    pub(super) fn flow(&self, seq: u64) -> u32 {
        match self.order {
            Order::Walk => (seq % u64::from(self.flows)) as u32,
            Order::Random => {
                // The finaliser of splitmix64: any packet's flow can be said without those before it.
                let mut z = seq.wrapping_mul(0x9e37_79b9_7f4a_7c15);
                z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
                z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
                (((z >> 32) * u64::from(self.flows)) >> 32) as u32
            }
        }
    }

    /// Source and destination port of a flow, as they stand in the packet.
    #[inline(always)]
    pub(super) fn ports(&self, flow: u32) -> [u8; 4] {
        let class = if self.classes == 1 { 0 } else { flow % self.classes };
        let source = flow % SOURCE_PORTS;
        let destination = DESTINATION + 256 * class + flow / SOURCE_PORTS;
        (source << 16 | destination).to_be_bytes()
    }

    /// A frame as it is sent in `slot` or, with `routed`, as it is to arrive; ports and stamps are left to be filled in.
    fn frame(&self, ends: &Ends, len: usize, ttl: u8) -> (NetHeader, Vec<u8>) {
        let [src, dst] = ends.macs;
        let packet = Packet::eth(src, dst).ipv4(ends.ips[0], ends.ips[1]).ttl(ttl);
        let payload: Vec<u8> = (0..len - self.sizes.payload_at()).map(|i| (i * 7 + i / 251) as u8).collect();
        if self.sizes == Sizes::Tso {
            return packet.tcp(0, 0).payload(&payload).build_gso(MSS);
        }
        let mut frame = packet.udp(0, 0).payload(&payload).build();
        // Ports change with every packet: UDP over IPv4 may do without a checksum.
        frame[40..42].fill(0);
        (NetHeader::default(), frame)
    }

    /// The frame in `slot` of a ring, with its header, in a tunnel if there is one.
    pub(super) fn sent(&self, ends: &Ends, slot: u16, tunnel: Option<&Envelope>) -> (NetHeader, Vec<u8>) {
        let (header, frame) = self.frame(ends, self.sizes.of_slot(slot), TTL);
        (header, tunnel.map_or_else(|| frame.clone(), |envelope| envelope.wrap(&frame, 0)))
    }
}

/// What identifies a packet: in its payload.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Stamp {
    /// Number in its direction.
    pub seq: u64,
    /// When it was sent, in cycles.
    pub sent: u64,
}

impl Stamp {
    pub const LEN: usize = 16;

    #[inline(always)]
    pub fn to_bytes(self) -> [u8; Self::LEN] {
        (u128::from(self.seq) | u128::from(self.sent) << 64).to_le_bytes()
    }

    pub fn from_bytes(bytes: [u8; Self::LEN]) -> Self {
        let both = u128::from_le_bytes(bytes);
        Self { seq: both as u64, sent: (both >> 64) as u64 }
    }
}

/// Knows what a direction's packets have to look like where they arrive, and in which order those of a flow come.
pub(super) struct Checker {
    traffic: Traffic,
    /// A frame of each length.
    expected: Vec<Vec<u8>>,
    /// The outer headers of each, if they come in a tunnel; all as long as each other.
    outer: Vec<Vec<u8>>,
    /// Per flow, the number of the packet that came last, plus one.
    last: Vec<u64>,
}

impl Checker {
    /// For packets that a router has rewritten, or that came as they were sent; and in a tunnel, if there is one.
    pub fn new(traffic: Traffic, ends: &Ends, routed: bool, tunnel: Option<&Envelope>) -> Self {
        let (ends, ttl) = if routed { (ends.routed(), TTL - 1) } else { (*ends, TTL) };
        let mut lengths: Vec<usize> = (0..12).map(|slot| traffic.sizes.of_slot(slot)).collect();
        lengths.sort_unstable();
        lengths.dedup();
        let expected: Vec<_> = lengths.iter().map(|&len| traffic.frame(&ends, len, ttl).1).collect();
        let outer = |envelope: &Envelope| {
            let wrapped = expected.iter().map(|inner| envelope.wrap(inner, 0));
            wrapped.map(|frame| frame[..envelope.overhead()].to_vec()).collect()
        };
        let outer = tunnel.map(outer).unwrap_or_default();
        Self { traffic, expected, outer, last: vec![0; traffic.flows as usize] }
    }

    /// Judges a frame of which `frame` is the start, or all, and `len` the whole length. Gives its stamp.
    pub fn check(&mut self, frame: &[u8], len: usize) -> Result<Stamp, Wrong> {
        let at = self.traffic.sizes.payload_at();
        let around = self.outer.first().map_or(0, Vec::len);
        let found = self.expected.iter().position(|expected| around + expected.len() == len);
        let (Some(found), Some((outer, frame))) = (found, frame.split_at_checked(around)) else {
            return Err(Wrong::Content(format!("a frame of {len} bytes")));
        };
        let expected = &self.expected[found];
        if let Some(headers) = self.outer.get(found) {
            // The sender's choice: identification and UDP source port. With the former, the checksum differs.
            let own = [18..20, IPV4_CHECKSUM, PORTS..PORTS + 2];
            let differs = |i: &usize| outer[*i] != headers[*i] && !own.iter().any(|range| range.contains(i));
            if let Some(i) = (0..around).find(differs) {
                let text = format!("byte {i} is {:#04x} around it, not {:#04x}", outer[i], headers[i]);
                return Err(Wrong::Content(text));
            }
            let words = outer[14..PORTS].chunks(2).map(|word| u32::from(word[0]) << 8 | u32::from(word[1]));
            let sum: u32 = words.sum();
            if (sum & 0xffff) + (sum >> 16) != 0xffff {
                return Err(Wrong::Content("a wrong IPv4 checksum around it".into()));
            }
        }
        let stamp = frame.get(at..at + Stamp::LEN).and_then(|bytes| bytes.try_into().ok());
        let Some(stamp) = stamp.map(Stamp::from_bytes) else {
            return Err(Wrong::Content(format!("{} of {len} bytes", frame.len())));
        };
        let flow = self.traffic.flow(stamp.seq);
        let ports = self.traffic.ports(flow);
        // What differs from packet to packet; and the checksum of a super-frame, which any switch on the way may complete.
        let own = [PORTS..PORTS + 4, at..at + Stamp::LEN, 50..if at == 54 { 52 } else { 50 }];
        let same = |(i, (a, b)): (usize, (&u8, &u8))| a == b || own.iter().any(|range| range.contains(&i));
        let differs = frame.iter().zip(expected).enumerate().position(|pair| !same(pair));
        if let Some(i) = differs {
            let text =
                format!("packet {}: byte {i} is {:#04x}, not {:#04x}", stamp.seq, frame[i], expected[i]);
            return Err(Wrong::Content(text));
        }
        if frame[PORTS..PORTS + 4] != ports {
            return Err(Wrong::Content(format!("packet {}: not the ports of flow {flow}", stamp.seq)));
        }
        let last = &mut self.last[flow as usize];
        if stamp.seq < *last {
            return Err(Wrong::Order(format!("flow {flow}: packet {} after {}", stamp.seq, *last - 1)));
        }
        *last = stamp.seq + 1;
        Ok(stamp)
    }
}

/// What is wrong with a received packet.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Wrong {
    /// It is not what was sent.
    Content(String),
    /// It came after, or again after, a later packet of its flow.
    Order(String),
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::HashSet;

    fn traffic(flows: u32, classes: u32, order: Order) -> Traffic {
        Traffic { flows, order, sizes: Sizes::Fixed(64), classes }
    }

    /// The frame of packet `seq` as it is to arrive.
    fn arriving(traffic: &Traffic, ends: &Ends, seq: u64) -> Vec<u8> {
        let mut frame = traffic.frame(&ends.routed(), 64, TTL - 1).1;
        frame[PORTS..PORTS + 4].copy_from_slice(&traffic.ports(traffic.flow(seq)));
        frame[42..58].copy_from_slice(&Stamp { seq, sent: 7 }.to_bytes());
        frame
    }

    #[test]
    fn every_flow_has_ports_of_its_own_and_the_ports_of_its_class() {
        for (flows, classes) in [(64, 1), (4096, 16), (65_536, 16), (1_000_000, 1), (1_000_000, 16)] {
            let traffic = traffic(flows, classes, Order::Walk);
            let all: HashSet<[u8; 4]> = (0..flows).map(|flow| traffic.ports(flow)).collect();
            assert_eq!(all.len(), flows as usize);
            for flow in [0, 1, flows / 2, flows - 1] {
                let [_, _, high, low] = traffic.ports(flow);
                let (value, mask) = Traffic::class_ports(flow % classes);
                assert_eq!(u16::from_be_bytes([high, low]) & mask, value);
            }
        }
    }

    #[test]
    fn random_order_reaches_all_flows_evenly() {
        let traffic = traffic(1000, 1, Order::Random);
        let mut seen = vec![0; 1000];
        (0..100_000).for_each(|seq| seen[traffic.flow(seq) as usize] += 1);
        assert!(seen.iter().all(|&count| (40..200).contains(&count)), "{seen:?}");
    }

    #[test]
    fn what_is_not_as_it_should_be_is_found() {
        let (traffic, ends) = (traffic(4, 1, Order::Walk), Ends::between(0, 1));
        let mut checker = Checker::new(traffic, &ends, true, None);
        let frame = |seq| arriving(&traffic, &ends, seq);
        assert_eq!(checker.check(&frame(5), 64), Ok(Stamp { seq: 5, sent: 7 }));
        assert!(checker.check(&frame(4), 64).is_ok(), "another flow's order is its own");
        assert!(matches!(checker.check(&frame(1), 64), Err(Wrong::Order(_))), "before packet 5 of its flow");
        assert!(matches!(checker.check(&frame(5), 64), Err(Wrong::Order(_))), "twice");
        for (at, what) in [(0, "address"), (22, "TTL"), (PORTS, "port"), (36, "port"), (60, "payload")] {
            let mut frame = frame(9);
            frame[at] ^= 1;
            assert!(matches!(checker.check(&frame, 64), Err(Wrong::Content(_))), "{what}");
        }
        assert!(matches!(checker.check(&frame(9), 65), Err(Wrong::Content(_))));
        assert!(checker.check(&frame(9), 64).is_ok());
    }

    #[test]
    fn what_is_wrong_with_a_tunnel_is_found() {
        use crate::overlay::{Kind, Site};
        let (traffic, ends) = (traffic(4, 1, Order::Walk), Ends::between(0, 1));
        for kind in Kind::ALL {
            let envelope = Envelope::between(kind, Site(1), Site(2));
            let mut checker = Checker::new(traffic, &ends, true, Some(&envelope));
            let frame = |seq| envelope.wrap(&arriving(&traffic, &ends, seq), 50_000 + seq as u16);
            let (len, around) = (64 + envelope.overhead(), envelope.overhead());
            assert_eq!(checker.check(&frame(5), len), Ok(Stamp { seq: 5, sent: 7 }), "{kind}");
            // Addresses, TTL, checksum, the last byte of the VNI or key, and the packet inside.
            let key = if kind == Kind::Gre { around - 1 } else { around - 2 };
            for at in [0, 22, 24, 33, key, around, around + 60] {
                let mut frame = frame(9);
                frame[at] ^= 1;
                assert!(matches!(checker.check(&frame, len), Err(Wrong::Content(_))), "{kind}: byte {at}");
            }
            assert!(checker.check(&arriving(&traffic, &ends, 9), 64).is_err(), "{kind}: none");
            assert!(checker.check(&frame(9), len).is_ok(), "{kind}");
        }
    }
}
