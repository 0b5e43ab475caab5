//! Frames of every kind that a switch takes apart, made at random, together with what they hold.
//!
//! Values come from small sets, so that independently made frames and flows meet.

use crate::random::Random;

/// Ethertype that no frame made here has (IEEE 802, local experiments).
pub const EXPERIMENTAL: u16 = 0x88b5;

/// How far inside a field is: a flow that matches it must name this much (ovs-fields(7), prerequisites).
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Layer {
    /// Ethernet and tags.
    Link,
    /// IP, ARP or MPLS.
    Network,
    /// TCP, UDP, SCTP or ICMP.
    Transport,
    /// Neighbour discovery.
    Discovery,
}

/// How a field is written in a flow.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Format {
    /// Hexadecimal; maskable if true.
    Number(bool),
    /// MAC address, maskable.
    Mac,
    /// IPv4 address, maskable.
    Ipv4,
    /// IPv6 address, maskable.
    Ipv6,
    /// `ip_frag`: `no`, `first` or `later`.
    Fragment,
}

/// A field of a frame.
#[derive(Clone, Copy, Debug)]
pub struct Field {
    /// Its name in ovs-fields(7).
    pub name: &'static str,
    /// Its width in bits.
    pub bits: u32,
    /// Its value.
    pub value: u128,
    /// How it is written.
    pub format: Format,
    /// How far inside it is.
    pub layer: Layer,
}

impl Field {
    /// `name=value`, or `name=value/mask` unless the mask has all bits or the field cannot be masked.
    pub fn matching(&self, mask: u128) -> String {
        let all = if self.bits == 128 { u128::MAX } else { (1 << self.bits) - 1 };
        let mask = mask & all;
        if mask == all || matches!(self.format, Format::Number(false) | Format::Fragment) {
            format!("{}={}", self.name, self.write(self.value))
        } else {
            format!("{}={}/{}", self.name, self.write(self.value & mask), self.write(mask))
        }
    }

    fn write(&self, value: u128) -> String {
        match self.format {
            Format::Number(_) => format!("{value:#x}"),
            Format::Mac => mac_text(value),
            Format::Ipv4 => std::net::Ipv4Addr::from(value as u32).to_string(),
            Format::Ipv6 => std::net::Ipv6Addr::from(value).to_string(),
            Format::Fragment => ["no", "first", "later"][value as usize % 3].into(),
        }
    }
}

/// A MAC address as OVS writes it.
pub fn mac_text(value: u128) -> String {
    let bytes = value.to_be_bytes();
    bytes[10..].iter().map(|byte| format!("{byte:02x}")).collect::<Vec<_>>().join(":")
}

/// A frame and what it was made from.
#[derive(Clone, Debug)]
pub struct Frame {
    /// Its bytes, without a frame check sequence.
    pub bytes: Vec<u8>,
    /// The word for its network protocol in a flow, such as `ip` or `dl_type=0x1234`.
    pub network: String,
    /// The word for its transport protocol, such as `tcp6`, if flows have one.
    pub transport: Option<&'static str>,
    /// Its fields. Of a frame that was damaged, those that it had before.
    pub fields: Vec<Field>,
}

impl Frame {
    /// A frame as the station behind `port` (counted from 0) of `ports` may send it.
    pub fn random(random: &mut Random, port: usize, ports: usize) -> Self {
        let mut maker =
            Maker { random, bytes: Vec::new(), network: String::new(), transport: None, fields: Vec::new() };
        maker.link(port, ports);
        let Maker { mut bytes, network, transport, fields, .. } = maker;
        if random.chance(30) && bytes.len() < 60 {
            bytes.resize(60, 0);
        }
        Self { bytes, network, transport, fields }
    }

    /// Changes a bit or two of its headers, behind the Ethernet header: often of the same flow still.
    pub fn vary(&mut self, random: &mut Random) {
        for _ in 0..random.between(1, 2) {
            let headers = self.bytes.len().min(90);
            let at = random.between(14, headers.max(15) - 1);
            if let Some(byte) = self.bytes.get_mut(at) {
                *byte ^= 1 << random.below(8);
            }
        }
    }

    /// Cuts the frame, or changes a byte after the addresses. At least 20 bytes stay: Linux drops shorter tagged frames
    /// before anybody sees them (`skb_vlan_untag`).
    pub fn damage(&mut self, random: &mut Random) {
        if random.chance(40) {
            let len = random.between(20, self.bytes.len().max(20));
            self.bytes.truncate(len);
        } else {
            let headers = self.bytes.len().min(90);
            let at = random.between(12, headers - 1);
            self.bytes[at] = random.bits() as u8;
        }
        // Whoever has no length of 20 is not damaged but completed.
        self.bytes.resize(self.bytes.len().max(20), 0);
    }
}

/// The address of station `which` (1 or 2) behind `port`, counted from 0.
pub fn station(port: usize, which: usize) -> u128 {
    0x0200_0000_0000 | (port as u128 + 1) << 8 | which as u128
}

/// IPv4 addresses that are used.
pub const IPV4: [u32; 6] = [0x0a00_0001, 0x0a00_0002, 0x0a00_0103, 0x0a01_0004, 0xc0a8_0105, 0xe000_0005];
/// IPv6 addresses that are used.
pub const IPV6: [u128; 5] = [
    0x2001_0db8_0000_0000_0000_0000_0000_0001,
    0x2001_0db8_0000_0000_0000_0000_0000_0002,
    0x2001_0db8_0001_0000_0000_0000_0000_0003,
    0xfe80_0000_0000_0000_0000_0000_0000_0004,
    0xff02_0000_0000_0000_0000_0000_0000_0001,
];
/// Port numbers that are used.
pub const PORTS: [u16; 8] = [53, 80, 443, 1024, 1025, 4789, 5001, 65_535];
/// VLANs that are used.
pub const VLANS: [u16; 6] = [0, 1, 10, 20, 30, 4095];

mod proto {
    pub const ICMP: u8 = 1;
    pub const IGMP: u8 = 2;
    pub const TCP: u8 = 6;
    pub const UDP: u8 = 17;
    pub const GRE: u8 = 47;
    pub const ICMPV6: u8 = 58;
    pub const NONE: u8 = 59;
    pub const SCTP: u8 = 132;
}

struct Maker<'a> {
    random: &'a mut Random,
    bytes: Vec<u8>,
    network: String,
    transport: Option<&'static str>,
    fields: Vec<Field>,
}

impl Maker<'_> {
    fn field(&mut self, layer: Layer, name: &'static str, bits: u32, format: Format, value: u128) {
        self.fields.push(Field { name, bits, value, format, layer });
    }

    fn put16(&mut self, value: u16) {
        self.bytes.extend(value.to_be_bytes());
    }

    fn link(&mut self, port: usize, ports: usize) {
        let which = self.random.between(1, 2);
        let source = station(port, which);
        let other = station(self.random.below(ports), self.random.between(1, 2));
        let target = match self.random.below(20) {
            0..=13 => other,
            14..=15 => 0xffff_ffff_ffff,
            16 => 0x0100_5e00_0005,
            17 => 0x3333_0000_0001,
            18 => 0x0180_c200_000e,
            _ => 0x0200_0000_0f01,
        };
        for (name, mac) in [("dl_dst", target), ("dl_src", source)] {
            self.bytes.extend(&mac.to_be_bytes()[10..]);
            self.field(Layer::Link, name, 48, Format::Mac, mac);
        }
        let tags = self.random.pick(&[0, 0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 3]);
        let mut tci = 0;
        for tag in 0..tags {
            let tpid = if tags > 1 && tag == 0 && self.random.chance(70) { 0x88a8 } else { 0x8100 };
            let value = self.random.pick(&VLANS) | (self.random.pick(&[0u16, 0, 3, 7]) << 13);
            let drop_eligible = if self.random.chance(5) { 0x1000 } else { 0 };
            self.put16(tpid);
            self.put16(value | drop_eligible);
            if tag == 0 {
                // OVS shows "there is a tag" in place of the drop eligible indicator.
                tci = value | 0x1000;
            }
        }
        self.field(Layer::Link, "vlan_tci", 16, Format::Number(true), tci.into());
        match self.random.below(25) {
            0 => {
                // 802.2 without SNAP: a spanning tree's SAP.
                self.put16(35);
                self.bytes.extend([0x42, 0x42, 3]);
                self.raw(35);
                self.network = "dl_type=0x05ff".into();
                return;
            }
            1 => {
                self.put16(100);
                self.bytes.extend([0xaa, 0xaa, 3, 0, 0, 0]);
            }
            _ => {}
        }
        match self.random.below(20) {
            0..=9 => self.ipv4(),
            10..=14 => self.ipv6(),
            15..=16 => self.arp(),
            17..=18 => self.mpls(),
            _ => {
                let ethertype = self.random.pick(&[0x1234, 0x88cc, 0x8906, 0x0600]);
                self.put16(ethertype);
                self.raw(40);
                self.network = format!("dl_type={ethertype:#06x}");
            }
        }
    }

    /// Up to `limit` bytes that mean nothing.
    fn raw(&mut self, limit: usize) {
        let count = self.random.below(limit + 1);
        let bytes = self.random.bytes(count);
        self.bytes.extend(bytes);
    }

    fn arp(&mut self) {
        let (ethertype, word) = self.random.pick(&[(0x0806, "arp"), (0x0806, "arp"), (0x8035, "rarp")]);
        let operation = self.random.pick(&[1u16, 2, 3, 0x101]);
        let (sha, tha) = (station(self.random.below(3), 1), self.random.pick(&[0, station(1, 2)]));
        let (spa, tpa) = (self.random.pick(&IPV4), self.random.pick(&IPV4));
        self.put16(ethertype);
        self.bytes.extend([0, 1, 8, 0, 6, 4]);
        self.put16(operation);
        self.bytes.extend(&sha.to_be_bytes()[10..]);
        self.bytes.extend(spa.to_be_bytes());
        self.bytes.extend(&tha.to_be_bytes()[10..]);
        self.bytes.extend(tpa.to_be_bytes());
        self.network = word.into();
        let shown = if operation > 0xff { 0 } else { operation };
        self.field(Layer::Network, "arp_op", 16, Format::Number(false), shown.into());
        self.field(Layer::Network, "arp_spa", 32, Format::Ipv4, spa.into());
        self.field(Layer::Network, "arp_tpa", 32, Format::Ipv4, tpa.into());
        self.field(Layer::Network, "arp_sha", 48, Format::Mac, sha);
        self.field(Layer::Network, "arp_tha", 48, Format::Mac, tha);
    }

    fn mpls(&mut self) {
        let (ethertype, word) = self.random.pick(&[(0x8847, "mpls"), (0x8847, "mpls"), (0x8848, "mplsm")]);
        self.put16(ethertype);
        let count = self.random.between(1, 4);
        for index in 0..count {
            let label = self.random.pick(&[16u32, 17, 100, 0xfffff]);
            let class = self.random.pick(&[0u32, 5]);
            let bottom = u32::from(index + 1 == count);
            let ttl = self.random.pick(&[1u32, 2, 64, 255]);
            self.bytes.extend((label << 12 | class << 9 | bottom << 8 | ttl).to_be_bytes());
            if index == 0 {
                self.field(Layer::Network, "mpls_label", 20, Format::Number(false), label.into());
                self.field(Layer::Network, "mpls_tc", 3, Format::Number(false), class.into());
                self.field(Layer::Network, "mpls_bos", 1, Format::Number(false), bottom.into());
            }
        }
        // What is below is IPv4, so that a label that is popped uncovers something.
        let fields = self.fields.len();
        self.ipv4_header();
        self.fields.truncate(fields);
        self.network = word.into();
        self.transport = None;
    }

    fn ipv4(&mut self) {
        self.put16(0x0800);
        self.ipv4_header();
    }

    fn ipv4_header(&mut self) {
        let (source, target) = (self.random.pick(&IPV4), self.random.pick(&IPV4));
        let tos = self.random.pick(&[0u8, 0, 0x10, 0xb8, 0x03, 0xb9]);
        let ttl = self.random.pick(&[0u8, 1, 2, 64, 64, 64, 255]);
        let options = self.random.pick(&[0usize, 0, 0, 0, 0, 4, 40]);
        let fragment = self.random.pick(&[0u16, 0, 0, 0, 0x4000, 0x4000, 0x2000, 0x2005, 0x0100]);
        let proto = self.random.pick(&[
            proto::TCP,
            proto::TCP,
            proto::UDP,
            proto::UDP,
            proto::ICMP,
            proto::SCTP,
            proto::IGMP,
            proto::GRE,
            proto::ICMPV6,
        ]);
        let kind = if fragment & 0x1fff != 0 { 2 } else { u8::from(fragment & 0x2000 != 0) };
        self.network = "ip".into();
        self.field(Layer::Network, "nw_src", 32, Format::Ipv4, source.into());
        self.field(Layer::Network, "nw_dst", 32, Format::Ipv4, target.into());
        self.ip_fields(tos, ttl, proto, kind);
        let mut pseudo = [source.to_be_bytes(), target.to_be_bytes()].concat();
        pseudo.extend([0, proto]);
        let transport = self.transport(proto, &pseudo, kind == 2);
        let mut header = vec![0x45 + (options / 4) as u8, tos];
        header.extend((20 + options as u16 + transport.len() as u16).to_be_bytes());
        header.extend([0x12, self.random.bits() as u8]);
        header.extend(fragment.to_be_bytes());
        header.extend([ttl, proto, 0, 0]);
        header.extend(source.to_be_bytes());
        header.extend(target.to_be_bytes());
        // No-operation options (RFC 791).
        header.extend(vec![1; options]);
        let sum = checksum(&[&header]);
        header[10..12].copy_from_slice(&sum.to_be_bytes());
        self.bytes.extend(header);
        self.bytes.extend(transport);
    }

    fn ip_fields(&mut self, tos: u8, ttl: u8, proto: u8, fragment: u8) {
        self.field(Layer::Network, "nw_tos", 8, Format::Number(false), (tos & 0xfc).into());
        self.field(Layer::Network, "nw_ecn", 2, Format::Number(false), (tos & 3).into());
        self.field(Layer::Network, "nw_ttl", 8, Format::Number(false), ttl.into());
        self.field(Layer::Network, "nw_proto", 8, Format::Number(false), proto.into());
        self.field(Layer::Network, "ip_frag", 2, Format::Fragment, fragment.into());
    }

    fn ipv6(&mut self) {
        let (source, target) = (self.random.pick(&IPV6), self.random.pick(&IPV6));
        let class = self.random.pick(&[0u8, 0, 0xb8, 0x03]);
        let label = self.random.pick(&[0u32, 0, 0x12345, 0xfffff]);
        let hops = self.random.pick(&[0u8, 1, 2, 64, 255, 255]);
        let proto = self.random.pick(&[
            proto::TCP,
            proto::TCP,
            proto::UDP,
            proto::UDP,
            proto::ICMPV6,
            proto::ICMPV6,
            proto::SCTP,
            proto::NONE,
            proto::ICMP,
        ]);
        let mut chain: Vec<u8> = Vec::new();
        if self.random.chance(25) {
            chain.push(self.random.pick(&[0, 43, 60, 51]));
            if self.random.chance(30) {
                chain.push(60);
            }
        }
        let fragment = if self.random.chance(20) { self.random.between(1, 2) as u8 } else { 0 };
        if fragment != 0 {
            chain.push(44);
        }
        self.network = "ipv6".into();
        self.field(Layer::Network, "ipv6_src", 128, Format::Ipv6, source);
        self.field(Layer::Network, "ipv6_dst", 128, Format::Ipv6, target);
        self.field(Layer::Network, "ipv6_label", 20, Format::Number(true), label.into());
        self.ip_fields(class, hops, proto, fragment);
        let mut pseudo = [source.to_be_bytes(), target.to_be_bytes()].concat();
        pseudo.extend([0, proto]);
        let transport = self.transport(proto, &pseudo, fragment == 2);
        let mut payload = Vec::new();
        for (index, kind) in chain.iter().enumerate() {
            let next = chain.get(index + 1).copied().unwrap_or(proto);
            match kind {
                44 => {
                    let offset: u16 = if fragment == 2 { 0x0101 } else { 1 };
                    payload.extend([next, 0]);
                    payload.extend(offset.to_be_bytes());
                    payload.extend([0, 0, 0, 9]);
                }
                // An authentication header counts in units of 4, less 2 (RFC 4302).
                51 => payload.extend([&[next, 1, 0, 0, 0, 0, 0, 7, 0, 0, 0, 1][..]].concat()),
                // One option that pads (RFC 8200).
                _ => payload.extend([next, 0, 1, 4, 0, 0, 0, 0]),
            }
        }
        payload.extend(transport);
        let first = 6 << 28 | u32::from(class) << 20 | label;
        self.put16(0x86dd);
        self.bytes.extend(first.to_be_bytes());
        self.put16(payload.len() as u16);
        self.bytes.extend([chain.first().copied().unwrap_or(proto), hops]);
        self.bytes.extend(source.to_be_bytes());
        self.bytes.extend(target.to_be_bytes());
        self.bytes.extend(payload);
    }

    /// A transport header with payload; `pseudo` is the pseudo-header without the length.
    fn transport(&mut self, proto: u8, pseudo: &[u8], later: bool) -> Vec<u8> {
        let limit = self.random.pick(&[0, 8, 40, 200, 200, 1300]);
        let payload = self.random.below(limit + 1);
        let payload = self.random.bytes(payload);
        if later {
            return payload;
        }
        let v6 = pseudo.len() > 30;
        let (source, target) = (self.random.pick(&PORTS), self.random.pick(&PORTS));
        let mut header = [source.to_be_bytes(), target.to_be_bytes()].concat();
        let (word, source_name, target_name, check) = match (proto, v6) {
            (proto::TCP, _) => {
                let flags = self.random.pick(&[0x002u16, 0x010, 0x012, 0x018, 0x004, 0x1ff, 0xfff]);
                let options = self.random.pick(&[0usize, 0, 0, 12, 40]);
                header.extend(self.random.bytes(8));
                header.extend(((5 + options as u16 / 4) << 12 | flags).to_be_bytes());
                header.extend([0xff, 0, 0, 0, 0, 0]);
                header.extend(vec![1; options]);
                self.field(Layer::Transport, "tcp_flags", 12, Format::Number(true), flags.into());
                (if v6 { "tcp6" } else { "tcp" }, "tcp_src", "tcp_dst", 16)
            }
            (proto::UDP, _) => {
                header.extend((8 + payload.len() as u16).to_be_bytes());
                header.extend([0, 0]);
                (if v6 { "udp6" } else { "udp" }, "udp_src", "udp_dst", 6)
            }
            (proto::SCTP, _) => {
                header.extend(self.random.bytes(8));
                (if v6 { "sctp6" } else { "sctp" }, "sctp_src", "sctp_dst", 0)
            }
            (proto::ICMP, false) => return self.icmp(&payload),
            (proto::ICMPV6, true) => return self.icmpv6(pseudo, &payload),
            _ => return payload,
        };
        self.transport = Some(word);
        self.field(Layer::Transport, source_name, 16, Format::Number(true), source.into());
        self.field(Layer::Transport, target_name, 16, Format::Number(true), target.into());
        header.extend(payload);
        // SCTP's sum is a CRC, which rewriting changes by difference: any value does.
        if check > 0 && !(proto == proto::UDP && !v6 && self.random.chance(15)) {
            let sum = checksum(&[pseudo, &(header.len() as u32).to_be_bytes(), &header]);
            let sum = if sum == 0 && proto == proto::UDP { 0xffff } else { sum };
            header[check..check + 2].copy_from_slice(&sum.to_be_bytes());
        }
        header
    }

    fn icmp(&mut self, payload: &[u8]) -> Vec<u8> {
        let (kind, code) = self.random.pick(&[(8u8, 0u8), (0, 0), (3, 1), (3, 4), (11, 0)]);
        self.transport = Some("icmp");
        self.field(Layer::Transport, "icmp_type", 8, Format::Number(false), kind.into());
        self.field(Layer::Transport, "icmp_code", 8, Format::Number(false), code.into());
        let mut message = vec![kind, code, 0, 0, 0, 1, 0, 2];
        message.extend(payload);
        let sum = checksum(&[&message]);
        message[2..4].copy_from_slice(&sum.to_be_bytes());
        message
    }

    fn icmpv6(&mut self, pseudo: &[u8], payload: &[u8]) -> Vec<u8> {
        let (kind, code) = self.random.pick(&[
            (128u8, 0u8),
            (129, 0),
            (135, 0),
            (135, 0),
            (136, 0),
            (136, 1),
            (133, 0),
            (1, 4),
        ]);
        self.transport = Some("icmp6");
        self.field(Layer::Transport, "icmp_type", 8, Format::Number(false), kind.into());
        self.field(Layer::Transport, "icmp_code", 8, Format::Number(false), code.into());
        let mut message = vec![kind, code, 0, 0, 0, 0, 0, 0];
        if matches!(kind, 135 | 136) {
            let target = self.random.pick(&IPV6);
            message.extend(target.to_be_bytes());
            let mut link = [0, 0];
            for option in 0..self.random.below(4) {
                // Source or target link-layer address (RFC 4861), or an option that is neither.
                let kind = self.random.pick(&[1u8, 2, 2, 14]);
                let address = station(option, 1);
                message.extend([kind, 1]);
                message.extend(&address.to_be_bytes()[10..]);
                if let Some(link) = link.get_mut(usize::from(kind) - 1) {
                    *link = address;
                }
            }
            if code == 0 {
                self.field(Layer::Discovery, "nd_target", 128, Format::Ipv6, target);
                let (name, link) = if kind == 135 { ("nd_sll", link[0]) } else { ("nd_tll", link[1]) };
                self.field(Layer::Discovery, name, 48, Format::Mac, link);
            }
        } else {
            message.extend(payload);
        }
        let sum = checksum(&[pseudo, &(message.len() as u32).to_be_bytes(), &message]);
        message[2..4].copy_from_slice(&sum.to_be_bytes());
        message
    }
}

/// The Internet checksum (RFC 1071) over all parts, each but the last of an even length.
fn checksum(parts: &[&[u8]]) -> u16 {
    let words = parts.iter().flat_map(|part| part.chunks(2));
    let mut sum: u64 =
        words.map(|word| u64::from(word[0]) << 8 | u64::from(*word.get(1).unwrap_or(&0))).sum();
    while sum > 0xffff {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    !(sum as u16)
}

/// The combinations that Open vSwitch generates for its own test of flow extraction (`tests/flowgen.py`), put together
/// anew: Ethernet and SNAP; no tag, priority tag and tag; IPv4 without and with options; whole, first, middle and last
/// fragment; TCP, TCP with options, UDP, ICMP and a protocol without ports.
pub fn combinations() -> Vec<Vec<u8>> {
    const TRANSPORTS: [(u8, &str); 5] = [
        (6, "1a0b270e0531668f2a75f360501216bf49eb325d7061796c6f6164"),
        (6, "1a0b270e0531668f2a75f360601216bf49eb325d020407b77061796c6f6164"),
        (17, "045808af000f00000f0f0f0f0f0f0f"),
        (1, "0800000002e003a3"),
        (42, "6f7468657220686561646572"),
    ];
    let mut frames = Vec::new();
    for snap in [false, true] {
        for tag in [None, Some(0u16), Some(0x123)] {
            for options in ["", "820b6bc5abcd123401020300"] {
                for fragment in [0u16, 0x2000, 0x2111, 0x0222] {
                    for (proto, transport) in TRANSPORTS {
                        let (options, transport) = (unhex(options), unhex(transport));
                        let body = if fragment & 0x1fff == 0 { &transport[..] } else { &[] };
                        let total = 20 + options.len() + body.len();
                        let mut frame = unhex("0200000000bb0200000000aa");
                        if let Some(tci) = tag {
                            frame.extend([[0x81, 0], tci.to_be_bytes()].concat());
                        }
                        if snap {
                            frame.extend((total as u16 + 8).to_be_bytes());
                            frame.extend([0xaa, 0xaa, 3, 0, 0, 0]);
                        }
                        frame.extend([8, 0, 0x45 + options.len() as u8 / 4, 44]);
                        frame.extend((total as u16).to_be_bytes());
                        frame.extend([0xff, 0x98]);
                        frame.extend(fragment.to_be_bytes());
                        frame.extend([64, proto, 0, 0, 10, 0, 2, 15, 192, 168, 1, 20]);
                        frames.push([&frame, &options[..], body].concat());
                    }
                }
            }
        }
    }
    frames
}

/// Bytes written as hexadecimal digits; anything else is passed over.
pub fn unhex(text: &str) -> Vec<u8> {
    let digits: Vec<u8> =
        text.chars().filter_map(|digit| digit.to_digit(16)).map(|digit| digit as u8).collect();
    digits.chunks(2).map(|pair| pair[0] << 4 | pair.get(1).unwrap_or(&0)).collect()
}

/// Bytes as hexadecimal digits.
pub fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn frames_are_whole_and_short_enough_for_an_mtu_of_1500() {
        let mut random = Random::new(1);
        for _ in 0..5000 {
            let mut frame = Frame::random(&mut random, 1, 4);
            assert!((14..1514).contains(&frame.bytes.len()), "{frame:?}");
            assert!(!frame.network.is_empty() && !frame.bytes.windows(2).take(13).any(|w| w == [0x88, 0xb5]));
            frame.damage(&mut random);
            assert!(frame.bytes.len() >= 20);
        }
    }

    #[test]
    fn there_are_as_many_combinations_as_open_vswitch_has() {
        let frames = combinations();
        assert_eq!(frames.len(), 240);
        assert_eq!(unhex(&hex(&frames[7])), frames[7]);
    }

    #[test]
    fn fields_are_written_as_flows_have_them() {
        let field = |format, bits, value| Field { name: "f", bits, value, format, layer: Layer::Link };
        assert_eq!(field(Format::Mac, 48, 0x0200_0000_0102).matching(u128::MAX), "f=02:00:00:00:01:02");
        assert_eq!(field(Format::Ipv4, 32, 0x0a00_0001).matching(0xffff_ff00), "f=10.0.0.0/255.255.255.0");
        assert_eq!(field(Format::Number(true), 16, 80).matching(0xfff0), "f=0x50/0xfff0");
        assert_eq!(field(Format::Number(false), 8, 6).matching(1), "f=0x6");
        assert_eq!(field(Format::Fragment, 2, 2).matching(0), "f=later");
    }
}
