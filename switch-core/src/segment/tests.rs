use super::*;
use crate::key::Key;
use crate::offload::{self, RawHeader};
use crate::packet::{Packet, PortId};
use crate::parse::{Extracted, extract};
use proptest::prelude::*;

const SRC4: [u8; 4] = [10, 0, 0, 1];
const DST4: [u8; 4] = [10, 0, 0, 2];
const SRC6: [u8; 16] = [0x20; 16];
const DST6: [u8; 16] = [0x30; 16];

/// A frame to be segmented, described so that a naive reference can build the segments from nothing.
#[derive(Clone, Debug)]
struct Case {
    v6: bool,
    udp: bool,
    tags: usize,
    /// IPv4 options, or a destination options header.
    l3_options: bool,
    /// Units of 4 bytes.
    tcp_options: usize,
    flags: u8,
    id: u16,
    sequence: u32,
    size: usize,
    payload: Vec<u8>,
}

fn plain_sum(bytes: &[u8]) -> u16 {
    let words = bytes.chunks(2).map(|pair| (pair[0] as u32) << 8 | *pair.get(1).unwrap_or(&0) as u32);
    let sum = words.fold(0, |sum, word| (sum + word) % 0xffff) as u16;
    // The representative of zero that a sum of anything but zeroes has.
    if sum == 0 { 0xffff } else { sum }
}

impl Case {
    fn proto(&self) -> u8 {
        if self.udp { 17 } else { 6 }
    }

    fn pseudo(&self, l4_len: usize) -> Vec<u8> {
        let addresses = if self.v6 { [SRC6, DST6].concat() } else { [SRC4, DST4].concat() };
        [&addresses[..], &[0, self.proto()], &(l4_len as u16).to_be_bytes()].concat()
    }

    fn l2(&self) -> Vec<u8> {
        let mut bytes = vec![2; 12];
        for tag in 0..self.tags {
            bytes.extend([0x81, 0, 0, tag as u8]);
        }
        bytes.extend(if self.v6 { [0x86, 0xdd] } else { [8, 0] });
        bytes
    }

    /// A whole frame of these values; `checksum` gives the transport checksum of pseudo-header and transport bytes.
    fn frame(
        &self,
        id: u16,
        sequence: u32,
        flags: u8,
        payload: &[u8],
        checksum: impl Fn(&[u8], &[u8]) -> u16,
    ) -> Vec<u8> {
        let mut l4 = vec![0x12, 0x34, 0x56, 0x78];
        let field = if self.udp { 6 } else { 16 };
        if self.udp {
            l4.extend((8 + payload.len() as u16).to_be_bytes());
            l4.extend([0, 0]);
        } else {
            l4.extend(sequence.to_be_bytes());
            l4.extend([1, 2, 3, 4, (5 + self.tcp_options as u8) << 4, flags, 0x20, 0, 0, 0, 0, 0]);
            l4.extend([1].repeat(4 * self.tcp_options));
        }
        l4.extend(payload);
        let sum = checksum(&self.pseudo(l4.len()), &l4);
        l4[field..field + 2].copy_from_slice(&sum.to_be_bytes());
        let mut frame = self.l2();
        let options = match (self.l3_options, self.v6) {
            (false, _) => vec![],
            (true, false) => vec![0x94, 4, 0, 0],
            (true, true) => vec![self.proto(), 0, 1, 4, 0, 0, 0, 0],
        };
        let l3_payload = (options.len() + l4.len()) as u16;
        if self.v6 {
            frame.extend([0x60, 1, 2, 3]);
            frame.extend(l3_payload.to_be_bytes());
            frame.extend([if self.l3_options { 60 } else { self.proto() }, 64]);
            frame.extend([SRC6, DST6].concat());
            frame.extend(options);
        } else {
            let mut ip = vec![0x45 + (options.len() / 4) as u8, 0x03];
            ip.extend((20 + l3_payload).to_be_bytes());
            ip.extend(id.to_be_bytes());
            ip.extend([0x40, 0, 64, self.proto(), 0, 0]);
            ip.extend([SRC4, DST4].concat());
            ip.extend(options);
            let sum = !plain_sum(&ip);
            ip[10..12].copy_from_slice(&sum.to_be_bytes());
            frame.extend(ip);
        }
        frame.extend(l4);
        frame
    }

    /// The frame as a guest hands it over: the checksum field holds the sum of the pseudo-header.
    fn whole(&self) -> Vec<u8> {
        self.frame(self.id, self.sequence, self.flags, &self.payload, |pseudo, _| plain_sum(pseudo))
    }

    /// The segments, each built from nothing.
    fn reference(&self) -> Vec<Vec<u8>> {
        let chunks: Vec<&[u8]> = self.payload.chunks(self.size).collect();
        let build = |(index, chunk): (usize, &&[u8])| {
            let mut flags = self.flags;
            if index > 0 {
                flags &= 0x7f;
            }
            if index + 1 < chunks.len() {
                flags &= 0xf6;
            }
            let id = (self.id as usize + index) as u16;
            let sequence = (self.sequence as usize + index * self.size) as u32;
            self.frame(id, sequence, flags, chunk, |pseudo, l4| {
                let sum = !plain_sum(&[pseudo, l4].concat());
                if self.udp && sum == 0 { 0xffff } else { sum }
            })
        };
        chunks.iter().enumerate().map(build).collect()
    }

    /// Layout and offload as the parser and the check find them.
    fn parsed(&self) -> (Layout, Offload) {
        let frame = self.whole();
        let mut packet = Packet::from_frame(PortId { slot: 1, generation: 1 }, &frame);
        let mut key = Key::default();
        assert_eq!(extract(&mut packet, &mut key), Extracted::Done);
        let raw = RawHeader {
            flags: offload::F_NEEDS_CSUM,
            gso_type: match (self.udp, self.v6) {
                (true, _) => offload::GSO_UDP_L4,
                (false, false) => offload::GSO_TCPV4,
                (false, true) => offload::GSO_TCPV6,
            },
            hdr_len: 0,
            gso_size: self.size as u16,
            csum_start: packet.layout.l4,
            csum_offset: if self.udp { 6 } else { 16 },
        };
        (packet.layout, offload::check(&raw, &packet, &key).unwrap())
    }

    fn segments(&self) -> Vec<Vec<u8>> {
        let (layout, offload) = self.parsed();
        let frame = self.whole();
        let mut buffer = vec![0xee; layout.payload as usize + self.size];
        let mut segments = Vec::new();
        let n = segment(&frame, &layout, &offload, &mut buffer, |s| segments.push(s.to_vec())).unwrap();
        assert_eq!(n, segments.len());
        assert_eq!(n, count(frame.len(), &layout, &offload));
        segments
    }
}

fn case() -> impl Strategy<Value = Case> {
    let shape = (any::<bool>(), any::<bool>(), 0usize..3, any::<bool>(), 0usize..=10);
    let values = (any::<u8>(), any::<u16>(), any::<u32>(), 24usize..1500, 0usize..40_000, any::<u8>());
    (shape, values).prop_map(|((v6, udp, tags, l3_options, tcp_options), values)| {
        let (flags, id, sequence, size, len, seed) = values;
        // More than one segment, and no more datagrams than are allowed.
        let len = (size + 1 + len).min(size * 128);
        let payload = (0..len).map(|i| (i as u8).wrapping_mul(31) ^ (i >> 8) as u8 ^ seed).collect();
        Case { v6, udp, tags, l3_options, tcp_options, flags, id, sequence, size, payload }
    })
}

fn plain_case() -> Case {
    Case {
        v6: false,
        udp: false,
        tags: 0,
        l3_options: false,
        tcp_options: 0,
        flags: 0x99,
        id: 0xffff,
        sequence: u32::MAX,
        size: 1000,
        payload: vec![7; 2500],
    }
}

#[test]
fn counters_wrap_and_flags_stay_where_they_belong() {
    let segments = plain_case().segments();
    let fields = |s: &Vec<u8>| {
        (u16::from_be_bytes([s[18], s[19]]), u32::from_be_bytes([s[38], s[39], s[40], s[41]]), s[47], s.len())
    };
    // CWR, ACK, PSH and FIN were set.
    let expected = [(0xffff, u32::MAX, 0x90, 1054), (0, 999, 0x10, 1054), (1, 1999, 0x19, 554)];
    assert_eq!(segments.iter().map(fields).collect::<Vec<_>>(), expected);
}

#[test]
fn a_routing_header_keeps_the_final_destination_in_the_sum() {
    // The pseudo-header has the final destination (RFC 8200 §8.1); only the sender's partial sum knows it.
    let case = Case { v6: true, l3_options: true, ..plain_case() };
    let (layout, offload) = case.parsed();
    let mut frame = case.whole();
    let field = layout.l4 as usize + 16;
    let other = u16::from_be_bytes([frame[field], frame[field + 1]]) ^ 0x0101;
    frame[field..field + 2].copy_from_slice(&other.to_be_bytes());
    let mut buffer = vec![0; 2048];
    let mut plain = case.segments().into_iter();
    segment(&frame, &layout, &offload, &mut buffer, |segment| {
        let plain = plain.next().unwrap();
        let sums = [segment, &plain].map(|s| u16::from_be_bytes([s[field], s[field + 1]]) as u32 % 0xffff);
        let moved = (plain_field(&case, field) as u32 + 0xffff - other as u32) % 0xffff;
        assert_eq!(sums[0], (sums[1] + moved) % 0xffff);
    })
    .unwrap();
    assert!(plain.next().is_none());
}

fn plain_field(case: &Case, field: usize) -> u16 {
    let frame = case.whole();
    u16::from_be_bytes([frame[field], frame[field + 1]])
}

#[test]
fn what_cannot_be_segmented_is_refused_before_anything_is_emitted() {
    let case = plain_case();
    let (layout, offload) = case.parsed();
    let frame = case.whole();
    let mut buffer = vec![0; 2048];
    let mut refused = |frame: &[u8], layout: Layout, offload: Offload, room: usize| {
        segment(frame, &layout, &offload, &mut buffer[..room], |_| panic!("emitted")).unwrap_err()
    };
    assert_eq!(refused(&frame, layout, offload, 1053), DropReason::NoBuffer);
    let bad = [
        (Layout::default(), offload),
        (Layout { l3: 0, ..layout }, offload),
        (Layout { l3: 30, ..layout }, offload),
        (Layout { payload: 34, ..layout }, offload),
        (Layout { payload: frame.len() as u16, ..layout }, offload),
        (Layout { l4: 33, ..layout }, offload),
        (layout, Offload::default()),
        (layout, Offload { needs_csum: false, ..offload }),
        (layout, Offload { gso: Gso::Tcp6, ..offload }),
        (layout, Offload { gso: Gso::UdpL4, ..offload }),
        (layout, Offload { gso_size: 0, ..offload }),
        (layout, Offload { csum_start: 33, ..offload }),
        (layout, Offload { csum_offset: 6, ..offload }),
    ];
    for (layout, offload) in bad {
        assert_eq!(refused(&frame, layout, offload, 2048), DropReason::BadOffload, "{layout:?} {offload:?}");
    }
    for len in 0..=layout.payload as usize {
        assert_eq!(refused(&frame[..len], layout, offload, 2048), DropReason::BadOffload);
    }
}

#[test]
fn a_udp_sum_of_zero_is_written_as_all_ones() {
    let mut case = Case { udp: true, payload: vec![0; 2000], ..plain_case() };
    // What the checksum was goes into the payload, and nothing is left of it.
    let sum = [case.segments()[0][40], case.segments()[0][41]];
    case.payload[..2].copy_from_slice(&sum);
    assert_eq!(case.segments()[0][40..42], [0xff, 0xff]);
    assert_eq!(case.segments(), case.reference());
}

#[test]
fn one_segment_counts_as_one() {
    let (layout, offload) = plain_case().parsed();
    assert_eq!(count(2554, &layout, &offload), 3);
    assert_eq!(count(3054, &layout, &offload), 3);
    assert_eq!(count(3055, &layout, &offload), 4);
    assert_eq!(count(2554, &layout, &Offload::default()), 1);
    assert_eq!(count(0, &layout, &offload), 1);
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(300))]

    #[test]
    fn equals_the_reference(case in case()) {
        let (segments, reference) = (case.segments(), case.reference());
        prop_assert_eq!(segments.len(), reference.len());
        for (index, (segment, reference)) in segments.iter().zip(&reference).enumerate() {
            prop_assert!(segment == reference, "segment {index}:\n{segment:x?}\n{reference:x?}");
        }
    }

    #[test]
    fn segments_are_valid_packets_that_make_up_the_payload(case in case()) {
        let (layout, _) = case.parsed();
        let (l3, l4, payload) = (layout.l3 as usize, layout.l4 as usize, layout.payload as usize);
        let mut collected = Vec::new();
        for segment in case.segments() {
            prop_assert!(segment.len() <= payload + case.size);
            let mut packet = Packet::from_frame(PortId { slot: 1, generation: 1 }, &segment);
            let mut key = Key::default();
            prop_assert_eq!(extract(&mut packet, &mut key), Extracted::Done);
            prop_assert_eq!(packet.layout, layout);
            prop_assert!(key.words[1] as u16 & crate::key::shape::L3 != 0, "lengths are right");
            let covered = [&case.pseudo(segment.len() - l4)[..], &segment[l4..]].concat();
            prop_assert_eq!(plain_sum(&covered), 0xffff);
            if !case.v6 {
                prop_assert_eq!(plain_sum(&segment[l3..l3 + (segment[l3] & 15) as usize * 4]), 0xffff);
            }
            if case.udp {
                prop_assert_eq!(segment[l4 + 4..l4 + 6].to_vec(), ((segment.len() - l4) as u16).to_be_bytes().to_vec());
            }
            collected.extend_from_slice(&segment[payload..]);
        }
        prop_assert!(collected == case.payload);
    }
}
