//! Frames written down byte by byte from the RFCs' figures.

use super::*;

/// An ARP request.
const INNER: &str =
    "ffffffffffff5254000000010806 0001080006040001 525400000001 0a000001 000000000000 0a000002";

fn bytes(hex: &str) -> Vec<u8> {
    let digits: Vec<u32> = hex.chars().filter_map(|digit| digit.to_digit(16)).collect();
    digits.chunks(2).map(|pair| (pair[0] << 4 | pair[1]) as u8).collect()
}

pub(super) fn vxlan() -> OuterSpec {
    let ports = UdpPorts { src: 50000..=50000, dst: VXLAN_PORT };
    OuterSpec {
        link: LINK,
        src: "192.0.2.1".parse().unwrap(),
        dst: "192.0.2.2".parse().unwrap(),
        tos: Origin::Set(0),
        ttl: Origin::Set(64),
        df: true,
        checksum: false,
        encapsulation: Encapsulation::Vxlan { vni: 42, gbp: None, ports },
    }
}

/// Lays the header around the packet, compares, and takes it off again.
fn check(spec: &OuterSpec, expected: &[&str]) -> TunnelKey {
    let (inner, expected) = (bytes(INNER), bytes(&expected.concat()));
    let mut packet = parsed(&inner, &RawHeader::default());
    Outer::new(spec).unwrap().push(&mut packet, 0x1234).unwrap();
    let mut sent = packet.head().to_vec();
    offload::finish_checksum(&mut sent, &packet.offload).unwrap();
    assert!(sent == expected, "\n{sent:02x?}\n{expected:02x?}");
    let mut received = parsed(&expected, &RawHeader::default());
    let found = recognize(&received, &[endpoint(spec)], |_| None).unwrap();
    found.pop(&mut received);
    assert_eq!(received.head(), inner);
    found.tunnel
}

#[test]
fn vxlan_over_ipv4() {
    let tunnel = check(
        &vxlan(),
        &[
            "020000000002 020000000001 0800",
            "45 00 004e 1234 4000 40 11 a467 c0000201 c0000202",
            "c350 12b5 003a 0000",
            "08 000000 00002a 00", // RFC 7348 §5
            INNER,
        ],
    );
    assert_eq!((tunnel.id, tunnel.flags, tunnel.ports), (42, TUN_KEY | TUN_DF, (50000, 4789)));
}

#[test]
fn vxlan_with_a_group_policy() {
    let ports = UdpPorts { src: 50000..=50000, dst: VXLAN_PORT };
    let gbp = Gbp { id: 0x1234, flags: 0x48 };
    let spec =
        OuterSpec { encapsulation: Encapsulation::Vxlan { vni: 42, gbp: Some(gbp), ports }, ..vxlan() };
    let frame = [
        "020000000002 020000000001 0800",
        "45 00 004e 1234 4000 40 11 a467 c0000201 c0000202",
        "c350 12b5 003a 0000",
        "88 48 1234 00002a 00", // draft-smith-vxlan-group-policy §2.1
        INNER,
    ];
    assert_eq!(check(&spec, &frame).gbp, gbp);
    // Who does not know of policies must not take it.
    let received = parsed(&bytes(&frame.concat()), &RawHeader::default());
    assert_eq!(recognize(&received, &[Endpoint { gbp: false, ..endpoint(&spec) }], |_| None), None);
}

#[test]
fn geneve_with_ovns_option_over_ipv6() {
    let option = GeneveOpt {
        class: (0x102, 0xffff),
        kind: (0x80, 0xff),
        value: vec![0, 1, 0, 2],
        mask: vec![0xff; 4],
    };
    let spec = OuterSpec {
        src: "2001:db8::1".parse().unwrap(),
        dst: "2001:db8::2".parse().unwrap(),
        df: false,
        checksum: true,
        encapsulation: Encapsulation::Geneve {
            vni: 42,
            oam: false,
            options: write_options(&[option]).unwrap(),
            ports: UdpPorts { src: 50000..=50000, dst: GENEVE_PORT },
        },
        ..vxlan()
    };
    let tunnel = check(
        &spec,
        &[
            "020000000002 020000000001 86dd",
            "60000000 0042 11 40 20010db8000000000000000000000001 20010db8000000000000000000000002",
            "c350 17c1 0042 e78a",
            "02 40 6558 00002a 00 0102 80 01 00010002", // RFC 8926 §3.4, §3.5
            INNER,
        ],
    );
    assert_eq!((tunnel.options, tunnel.flags), (0x0102_8001_0001_0002, TUN_KEY | TUN_CSUM));
}

#[test]
fn nvgre() {
    let spec = OuterSpec { encapsulation: Encapsulation::Gre { key: Some(nvgre_key(42, 7)) }, ..vxlan() };
    let tunnel = check(
        &spec,
        &[
            "020000000002 020000000001 0800",
            "45 00 0046 1234 4000 40 2f a451 c0000201 c0000202",
            "2000 6558 00002a 07", // RFC 7637 §3.2
            INNER,
        ],
    );
    assert_eq!((tunnel.id, tunnel.ports), (42 << 8 | 7, (0, 0)));
}

#[test]
fn gre_with_key_and_checksum() {
    let encapsulation = Encapsulation::Gre { key: Some(123_457) };
    let tunnel = check(
        &OuterSpec { encapsulation, checksum: true, df: false, ..vxlan() },
        &[
            "020000000002 020000000001 0800",
            "45 00 004a 1234 0000 40 2f e44d c0000201 c0000202",
            "a000 6558 49aa 0000 0001e241", // RFC 2784 §2.1, RFC 2890 §2
            INNER,
        ],
    );
    assert_eq!((tunnel.id, tunnel.flags), (123_457, TUN_KEY | TUN_CSUM));
}
