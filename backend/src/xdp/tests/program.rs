//! Which packets come to us, and which stay with the kernel.

use super::net::*;
use crate::virtio::Burst;
use crate::xdp::{Class, XdpMode};
use std::net::UdpSocket;

const OURS: [u8; 6] = [2, 0, 0, 0, 0, 0x99];

#[test]
fn a_class_comes_to_us_and_the_rest_stays_with_the_kernel() {
    for mode in [XdpMode::Copy, XdpMode::Generic] {
        let wire = Wire::new(1, 1500);
        wire.far.ip("neigh add 10.9.0.99 lladdr 02:00:00:00:00:99 dev far");
        let stranger = wire.far.run(|| UdpSocket::bind("10.9.0.2:0").unwrap());
        let mut near = wire.near.open(&small("near", Some(mode)));
        assert_eq!(near.mode(), mode);
        let mut rx = near.take_rx(0).unwrap();
        wire.kernels_talk();
        near.classes().insert(Class::Mac { mac: OURS, vlan: None }).unwrap();
        stranger.send_to(b"for the port", "10.9.0.99:1234").unwrap();
        wire.kernels_talk();
        let packet = expect(&mut rx, 1).remove(0);
        assert!(packet.starts_with(&OURS) && packet.ends_with(b"for the port"), "{mode}: {packet:?}");
        // Given back to the kernel: it comes to us no more.
        assert!(near.classes().remove(Class::Mac { mac: OURS, vlan: None }).unwrap());
        stranger.send_to(b"not any more", "10.9.0.99:1234").unwrap();
        wire.kernels_talk();
        assert_eq!((rx.pending(), rx.receive(&mut Burst::new(), 64)), (0, 0));
        assert_eq!(rx.free_frames(), 256);
    }
}

fn udp(port: u16) -> Vec<u8> {
    [&[0x12, 0x34][..], &port.to_be_bytes(), &[0, 12, 0, 0], b"data"].concat()
}

fn ipv4(version_ihl: u8, fragment: u16, dst: [u8; 4], payload: &[u8]) -> Vec<u8> {
    let options = vec![1; usize::from(version_ihl & 15) * 4 - 20];
    let fixed =
        [version_ihl, 0, 0, 40, 0, 1, (fragment >> 8) as u8, fragment as u8, 64, 17, 0, 0, 10, 9, 0, 2];
    [&fixed[..], &dst, &options, payload].concat()
}

fn ipv6(next: u8, dst: [u8; 16], payload: &[u8]) -> Vec<u8> {
    [&[0x60, 0, 0, 0, 0, 12, next, 64][..], &[0xfd; 16], &dst, payload].concat()
}

fn tagged(dst: [u8; 6], tpid: u16, tci: u16, ethertype: u16, payload: &[u8]) -> Vec<u8> {
    ethernet(dst, tpid, &[&tci.to_be_bytes()[..], &ethertype.to_be_bytes(), payload].concat())
}

#[test]
fn each_kind_of_class_takes_just_its_packets() {
    let wire = Wire::new(1, 1500);
    let (mut near, mut far) = (wire.near.open(&small("near", None)), wire.far.open(&small("far", None)));
    let (mut rx, (_, tx)) = (near.take_rx(0).unwrap(), sides(&mut far));
    let (v4, v6) = ([192, 0, 2, 1], [0xfc; 16]);
    let mac = |vlan| Class::Mac { mac: OURS, vlan };
    let tunnel = |address, vlan| Class::Tunnel { address, port: 4789, vlan };
    let frames: Vec<(&str, Vec<u8>)> = vec![
        ("mac", ethernet(OURS, 0x1234, &[1; 50])),
        ("mac, VLAN 5", tagged(OURS, 0x8100, 0xe005, 0x1234, &[2; 50])),
        ("mac, service VLAN 5", tagged(OURS, 0x88a8, 5, 0x1234, &[3; 50])),
        ("mac, priority tag", tagged(OURS, 0x8100, 0xe000, 0x1234, &[4; 50])),
        ("other mac", ethernet(NEAR_MAC, 0x1234, &[5; 50])),
        ("LLDP", ethernet(NEAR_MAC, 0x88cc, &[6; 50])),
        ("LLDP, VLAN 5", tagged(NEAR_MAC, 0x8100, 5, 0x88cc, &[7; 50])),
        ("v4", ethernet(NEAR_MAC, 0x0800, &ipv4(0x45, 0x4000, v4, &udp(4789)))),
        ("v4, VLAN 5", tagged(NEAR_MAC, 0x8100, 5, 0x0800, &ipv4(0x45, 0, v4, &udp(4789)))),
        ("v4, other port", ethernet(NEAR_MAC, 0x0800, &ipv4(0x45, 0, v4, &udp(4790)))),
        ("v4, other host", ethernet(NEAR_MAC, 0x0800, &ipv4(0x45, 0, [192, 0, 2, 2], &udp(4789)))),
        ("v4, first fragment", ethernet(NEAR_MAC, 0x0800, &ipv4(0x45, 0x2000, v4, &udp(4789)))),
        ("v4, later fragment", ethernet(NEAR_MAC, 0x0800, &ipv4(0x45, 0x0001, v4, &udp(4789)))),
        ("v4, options", ethernet(NEAR_MAC, 0x0800, &ipv4(0x46, 0, v4, &udp(4789)))),
        ("v4, cut short", ethernet(NEAR_MAC, 0x0800, &ipv4(0x45, 0, v4, &udp(4789)[..7]))),
        ("v6", ethernet(NEAR_MAC, 0x86dd, &ipv6(17, v6, &udp(4789)))),
        ("v6, other host", ethernet(NEAR_MAC, 0x86dd, &ipv6(17, [0xfb; 16], &udp(4789)))),
        ("v6, extension", ethernet(NEAR_MAC, 0x86dd, &ipv6(0, v6, &udp(4789)))),
        ("bare header", ethernet(NEAR_MAC, 0x1235, &[])),
        ("cut in the tag", ethernet(NEAR_MAC, 0x8100, &[0, 5])),
    ];
    let last = Class::Ethertype { ethertype: 0xfffe, vlan: None };
    near.classes().insert(last).unwrap();
    let cases: [(Class, &[&str]); 7] = [
        (mac(None), &["mac"]),
        (mac(Some(5)), &["mac, VLAN 5", "mac, service VLAN 5"]),
        (mac(Some(0)), &["mac, priority tag"]),
        (Class::Ethertype { ethertype: 0x88cc, vlan: None }, &["LLDP"]),
        (Class::Ethertype { ethertype: 0x88cc, vlan: Some(5) }, &["LLDP, VLAN 5"]),
        (tunnel(v4.into(), None), &["v4"]),
        (tunnel(v6.into(), None), &["v6"]),
    ];
    let mut everything: Vec<_> = frames.iter().map(|(_, frame)| frame.clone()).collect();
    everything.push(ethernet(NEAR_MAC, 0xfffe, &[0; 50]));
    for (class, expected) in cases {
        near.classes().insert(class).unwrap();
        near.classes().insert(class).unwrap();
        assert_eq!(near.classes().list().unwrap(), {
            let mut both = vec![class, last];
            both.sort();
            both
        });
        send_all(&tx, &everything);
        let got = expect(&mut rx, expected.len() + 1);
        for (packet, name) in got.iter().zip(expected) {
            let frame = &frames.iter().find(|(n, _)| n == name).unwrap().1;
            assert_eq!(packet, frame, "{class:?}: {name}");
        }
        assert!(near.classes().remove(class).unwrap());
        assert!(!near.classes().remove(class).unwrap());
    }
    near.classes().set_everything(true).unwrap();
    assert!(near.classes().everything().unwrap());
    send_all(&tx, &everything);
    assert_eq!(expect(&mut rx, everything.len()), everything);
}

#[test]
fn a_vlan_that_cannot_be_is_refused() {
    let wire = Wire::new(1, 1500);
    let mut near = wire.near.open(&small("near", None));
    let error = near.classes().insert(Class::Ethertype { ethertype: 1, vlan: Some(4096) }).unwrap_err();
    assert_eq!(error.to_string(), "VLAN 4096: it must be at most 4095");
}
