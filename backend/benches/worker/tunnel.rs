//! Rows of an overlay: packets of 64 flows that leave in VXLAN, and that come in it.

use crate::matches::{exact, five_tuple, from};
use crate::meter::Meter;
use crate::rig::{self, Rig, Setup, TUNNEL};
use crate::{ROWS, output, setup};
use switch_core::action::{Action, PortRef};
use switch_core::key::{ETH_P_IP, Field, ipproto};

const FLOWS: usize = 64;

/// What stands before each frame in VXLAN 42 with one of `len` bytes.
fn outer(len: u64) -> Vec<u8> {
    let (ip, udp) = (((len + 36) as u16).to_be_bytes(), ((len + 16) as u16).to_be_bytes());
    let mut header = vec![2, 0, 0, 0, 0, 9, 2, 0, 0, 0, 0, 8, 8, 0];
    header.extend([0x45, 0, ip[0], ip[1], 0, 0, 0x40, 0, 64, ipproto::UDP, 0, 0, 192, 0, 2, 1, 192, 0, 2, 2]);
    let sum = switch_core::checksum::checksum(&header[14..]);
    header[24..26].copy_from_slice(&sum.to_be_bytes());
    header.extend([0x9c, 0x40, 0x12, 0xb5, udp[0], udp[1], 0, 0]);
    header.extend([8, 0, 0, 0, 0, 0, 42, 0]);
    header
}

/// Inner packets of `len` bytes come in, outer ones leave.
fn encapsulation(len: u64) -> Setup {
    let push = "tnl_port(4),header(size=50,type=4,eth(dst=02:00:00:00:00:09,src=02:00:00:00:00:08,dl_type=0x0800),\
        ipv4(src=192.0.2.1,dst=192.0.2.2,proto=17,tos=0,ttl=64,frag=0x4000),udp(src=0,dst=4789,csum=0x0),\
        vxlan(flags=0x8000000,vni=0x2a)),out_port(1)";
    let actions = vec![Action::TnlPush(push.into()), output(1)];
    let rules = (0..FLOWS as u32).map(|i| (0, five_tuple(0, i, 0x0a01_0001), actions.clone())).collect();
    Setup { len, flows: FLOWS, rules, pushed: 50, ..setup(&ROWS[0]) }
}

/// Outer packets come in, inner ones of `len` bytes leave.
fn decapsulation(len: u64) -> Setup {
    let fields = [
        (Field::EthType, ETH_P_IP as u128),
        (Field::IpProto, ipproto::UDP as u128),
        (Field::IpFrag, 0),
        (Field::Ipv4Dst, 0xc000_0202),
        (Field::TpDst, 4789),
    ];
    let outer_flow = exact(&[&from(0)[..], &fields].concat());
    let mut rules = vec![(0, outer_flow, vec![Action::TnlPop(PortRef::Ours(rig::port(TUNNEL)))])];
    rules.extend((0..FLOWS as u32).map(|i| {
        let mut matches = five_tuple(TUNNEL, i, 0x0a01_0001);
        for (field, value) in
            [(Field::TunId, 42), (Field::TunIpv4Src, 0xc000_0201), (Field::TunIpv4Dst, 0xc000_0202)]
        {
            matches.key.set(field, value);
            matches.mask.set_exact(field);
        }
        (TUNNEL, matches, vec![output(1)])
    }));
    Setup { ports: TUNNEL + 1, len, flows: FLOWS, rules, outer: outer(len), ..setup(&ROWS[0]) }
}

/// All rows.
pub fn all(meter: &Meter) {
    for (name, len, is_in) in
        [("64B", 64, false), ("64B", 64, true), ("1450B", 1450, false), ("1450B", 1450, true)]
    {
        let way = if is_in { "decap" } else { "encap" };
        meter.row(&format!("worker/{name}-vxlan-{way}"), FLOWS.div_ceil(usize::from(rig::BURST)), || {
            let setup = if is_in { decapsulation(len) } else { encapsulation(len) };
            let mut rig = Rig::new(&setup);
            rig.expect_bytes(if is_in { len } else { len + 50 });
            move |watch| rig.step(watch)
        });
    }
}
