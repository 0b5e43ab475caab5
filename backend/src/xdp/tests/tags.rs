//! VLAN tags: where they are seen, and where nobody can see them.

use super::net::*;
use crate::xdp::{Class, XdpConfig, XdpMode, XdpPort};

fn selective(device: &str, mode: XdpMode) -> XdpConfig {
    XdpConfig { selective: true, ..small(device, Some(mode)) }
}

/// A tag among the bytes is seen by the driver's program, and by the kernel's, before it is taken off. (What happens to one
/// beside them is seen in the compute node, whose kernel has VLAN devices.)
#[test]
fn a_tagged_packet_is_of_the_classes_of_its_vlan_only() {
    for mode in [XdpMode::Copy, XdpMode::Generic] {
        let wire = Wire::new(1, 1500);
        let mut near = wire.near.open(&selective("near", mode));
        let (mut rx, mut far) = (near.take_rx(0).unwrap(), wire.far.open(&small("far", None)));
        let (_, tx) = sides(&mut far);
        let tagged = |tag: &[u8]| {
            let mut frame = ethernet(NEAR_MAC, 0x88b5, &[7; 50]);
            frame.splice(12..12, tag.iter().copied());
            frame
        };
        let all = [
            tagged(&[]),
            tagged(&[0x81, 0, 0xb0, 10]),
            tagged(&[0x88, 0xa8, 0, 11]),
            tagged(&[0x81, 0, 0xa0, 0]),
        ];
        let end = ethernet([2; 6], 0x88b6, &[7; 50]);
        near.classes().insert(Class::Mac { mac: [2; 6], vlan: None }).unwrap();
        let vlans = [None, Some(10), Some(11), Some(0)];
        for (vlan, ours) in vlans.into_iter().zip(&all) {
            for class in [Class::Mac { mac: NEAR_MAC, vlan }, Class::Ethertype { ethertype: 0x88b5, vlan }] {
                near.classes().insert(class).unwrap();
                send_all(&tx, &all);
                // What comes last has passed the others.
                send_all(&tx, std::slice::from_ref(&end));
                assert_eq!(expect(&mut rx, 2), [ours.clone(), end.clone()], "{mode}, {class:?}");
                assert!(near.classes().remove(class).unwrap());
            }
        }
    }
}

/// The two ends of a veth in one namespace, so that each is seen from the other.
#[test]
fn the_other_end_of_a_veth_is_looked_at_where_it_can_be() {
    let wire = Wire::new(1, 1500);
    wire.near.ip("link add one type veth peer name other");
    let mut port = wire.near.open(&selective("one", XdpMode::Copy));
    let said = |port: &XdpPort| port.warnings().join("\n");
    assert!(
        port.hides_tags()
            && said(&port).contains("'ethtool -K DEVICE txvlan off tx-vlan-stag-hw-insert off' there")
    );
    assert!(!wire.near.run(|| port.review().unwrap()), "nothing has changed");
    // It alone counts.
    wire.near.features("one rxvlan off rx-vlan-stag-hw-parse off");
    wire.near.run(|| port.review().unwrap());
    assert!(port.hides_tags());
    wire.near.features("other txvlan off tx-vlan-stag-hw-insert off");
    assert!(wire.near.run(|| port.review().unwrap()));
    assert!(!port.hides_tags() && !said(&port).contains("tags"), "{}", said(&port));
    wire.near.features("other tx-vlan-stag-hw-insert on");
    assert!(wire.near.run(|| port.review().unwrap()) && port.hides_tags());
}
