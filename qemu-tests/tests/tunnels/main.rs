//! Two nodes on a virtual wire, with a guest each and a tunnel between them: the first has pointworkd under a stock Open vSwitch
//! with its userspace datapath, the second has plain Open vSwitch.

mod bed;
mod changes;
mod dissect;
mod linux;
mod ovn;
mod wrong;

use anyhow::Result;
use bed::{Bed, MTU, PORTS};
use qemu_tests::overlay::{Kind, UNDERLAY};

#[test]
fn every_kind_over_ipv4_and_ipv6() -> Result<()> {
    let bed = Bed::new(MTU)?;
    for kind in Kind::ALL {
        for six in [false, true] {
            bed.tunnel(kind, six)?;
            bed.talk(&format!("{kind} over IPv{}", if six { 6 } else { 4 }))?;
        }
    }
    bed.finish()
}

#[test]
fn tags_inside_and_outside() -> Result<()> {
    let bed = Bed::new(MTU)?;
    bed.tunnel(Kind::Vxlan, false)?;
    // Both guests in VLAN 10: tags are inside, and take their four bytes of the underlay's MTU.
    bed.guest_mtu(MTU - Kind::Vxlan.overhead(false) - 4)?;
    for (ovs, port) in bed.nodes.ovs.iter().zip(PORTS) {
        ovs.vsctl(&["set", "port", port, "tag=10"])?;
    }
    bed.reach(false)?;
    bed.talk("VLAN inside")?;
    // Both nodes in VLAN 100 of the wire: tags are outside too.
    for ovs in &bed.nodes.ovs {
        ovs.vsctl(&["set", "port", UNDERLAY, "tag=100"])?;
    }
    bed.reach(false)?;
    bed.talk("VLAN inside and outside")?;
    bed.finish()
}

#[test]
fn jumbo_packets() -> Result<()> {
    let bed = Bed::new(9000)?;
    for kind in Kind::ALL {
        bed.tunnel(kind, false)?;
        bed.talk(&format!("{kind}, jumbo"))?;
    }
    bed.finish()
}
