use super::*;
use crate::ovs::source::Unreadable;
use proptest::prelude::*;
use std::sync::LazyLock;
use switch_core::action::{Action, PortRef};
use switch_core::flow::FlowSpec;
use switch_core::key::Field;
use switch_core::odp::{DumpedFlow, format_flow, parse_dump_line};
use switch_core::packet::PortId;
use wire::put_attr;

mod encode;
mod events;
mod random;

/// Messages of a kernel (Debian's 6.1.192) about a datapath, and what `ovs-dpctl dump-flows -m --names` (3.1.0) says about
/// the same flows. Lines: `vport HEX`, `flow HEX TEXT`, separated by tabs.
const GOLDEN: &str = include_str!("tests/golden.tsv");

/// These ports are ours, in slots from 11 on.
const OURS: [&str; 5] = ["p1", "p2", "p3", "vxlan_sys_4789", "genev_sys_6081"];

struct Names;

impl PortNames for Names {
    fn by_name(&self, name: &str) -> Option<PortId> {
        let ours = OURS.iter().position(|&port| port == name).map(|i| i as u32 + 11);
        let slot = ours.or_else(|| name.parse().ok())?;
        Some(PortId { slot, generation: 1 })
    }

    fn name(&self, slot: u32) -> Option<String> {
        OURS.get(slot.checked_sub(11)? as usize).map(|&name| name.to_owned())
    }
}

fn unhex(text: &str) -> Vec<u8> {
    let pairs = text.as_bytes().chunks_exact(2);
    pairs.map(|pair| u8::from_str_radix(std::str::from_utf8(pair).unwrap(), 16).unwrap()).collect()
}

/// A flow's message and its text.
type GoldenFlow = (Vec<u8>, &'static str);

/// The golden datapath's ports, and its flows with their text.
static GOLDEN_DATA: LazyLock<(Vports, Vec<GoldenFlow>)> = LazyLock::new(|| {
    let (mut vports, mut flows) = (Vports::new(), Vec::new());
    for line in GOLDEN.lines() {
        let fields: Vec<&str> = line.split('\t').collect();
        match fields[..] {
            ["vport", bytes] => {
                let bytes = unhex(bytes);
                let vport = Vport::decode(Attrs(&bytes[OVS_HEADER..])).unwrap().unwrap();
                vports.insert(vport.number, vport);
            }
            ["flow", bytes, text] => flows.push((unhex(bytes), text)),
            _ => panic!("{line}"),
        }
    }
    (vports, flows)
});

fn decode_flow(message: &[u8], vports: &Vports) -> Option<Found> {
    FlowMessage::decode(&message[OVS_HEADER..]).unwrap().to_flow(&Ports::new(vports, &Names))
}

/// The text knows a port by its name alone, and an unknown one by a number that could be a slot.
fn with_foreign_numbers(actions: &mut [Action]) {
    for action in actions {
        match action {
            Action::Output(port) => foreign(port),
            Action::Userspace(userspace) => {
                if let Some(port) = &mut userspace.tunnel_out_port {
                    foreign(port);
                }
            }
            Action::Sample { actions, .. } | Action::Clone(actions) | Action::DecTtl(actions) => {
                with_foreign_numbers(actions);
            }
            Action::CheckPktLen { greater, less_equal, .. } => {
                with_foreign_numbers(greater);
                with_foreign_numbers(less_equal);
            }
            _ => {}
        }
    }
}

fn foreign(port: &mut PortRef) {
    if let PortRef::Ours(id) = port
        && Names.name(id.slot).is_none()
    {
        *port = PortRef::Foreign(id.slot.to_string());
    }
}

#[test]
fn the_kernels_flows_are_what_ovs_prints_of_them() {
    let (vports, flows) = &*GOLDEN_DATA;
    assert!(flows.len() > 100, "{}", flows.len());
    let (mut compared, mut left_out) = (0, 0);
    for (message, text) in flows {
        // OVS 3.1 does not know OVS_KEY_ATTR_IPV6_EXTHDRS, which newer kernels have with every IPv6 key.
        let text = text.replace(",key32(00 00/00 00)", "");
        let mut expected = parse_dump_line(&text, &Names);
        match decode_flow(message, vports).unwrap() {
            Found::LeftOut(_) => {
                // The text's number of a port that has no name reads as a slot.
                let is_ours = |flow: DumpedFlow| Names.name(flow.spec.matches.key.get(Field::InPort) as u32);
                assert!(expected.is_err() || expected.ok().and_then(is_ours).is_none(), "{text}");
                left_out += 1;
            }
            Found::Flow(flow) => {
                let expected = expected.as_mut().unwrap_or_else(|error| panic!("{error}"));
                with_foreign_numbers(&mut expected.spec.actions);
                assert_eq!(flow.flow.as_ref(), Ok(&expected.spec), "{text}");
                assert_eq!(expected.spec.ufid.unwrap_or(flow.id), flow.id);
                compared += 1;
            }
        }
    }
    assert!(compared > 80 && left_out > 0, "{compared} {left_out}");
}

#[test]
fn identities_without_ufid_differ_and_stay() {
    let (_, flows) = &*GOLDEN_DATA;
    let id = |message: &[u8]| FlowMessage::decode(&message[OVS_HEADER..]).unwrap().id().unwrap();
    for (message, text) in flows {
        assert_eq!(id(message), id(message));
        for (other, other_text) in flows {
            let key = |m: &[u8]| Attrs(&m[OVS_HEADER..]).find(1).unwrap().unwrap().data.to_vec();
            if !text.starts_with("ufid") && !other_text.starts_with("ufid") {
                assert_eq!(id(message) == id(other), key(message) == key(other), "{text}\n{other_text}");
            }
        }
    }
}

/// A flow of what a test has encoded.
fn flow_of(key: &[u8], mask: Option<&[u8]>, actions: &[u8]) -> Option<Found> {
    let (vports, _) = &*GOLDEN_DATA;
    let mut message = vec![0; OVS_HEADER];
    put_attr(&mut message, flow_attr::KEY, key);
    if let Some(mask) = mask {
        put_attr(&mut message, flow_attr::MASK, mask);
    }
    put_attr(&mut message, flow_attr::ACTIONS, actions);
    decode_flow(&message, vports)
}

fn attrs(list: &[(u16, &[u8])]) -> Vec<u8> {
    let mut bytes = Vec::new();
    for (kind, data) in list {
        put_attr(&mut bytes, *kind, data);
    }
    bytes
}

fn spec(found: Option<Found>) -> Result<FlowSpec, Unreadable> {
    match found {
        Some(Found::Flow(flow)) => flow.flow,
        _ => panic!("left out"),
    }
}

#[test]
fn what_is_not_matched_need_not_be_understood_and_what_is_must() {
    let port = 1u32.to_ne_bytes();
    let key = attrs(&[(3, &port), (4, &[0; 12]), (6, &[8, 0]), (77, &[1, 2])]);
    let wild = attrs(&[(3, &[0xff; 4]), (6, &[0xff; 2]), (77, &[0, 0])]);
    assert!(spec(flow_of(&key, Some(&wild), &[])).is_ok());
    let absent = attrs(&[(3, &[0xff; 4]), (6, &[0xff; 2])]);
    assert!(spec(flow_of(&key, Some(&absent), &[])).is_ok());
    let exact = attrs(&[(3, &[0xff; 4]), (6, &[0xff; 2]), (77, &[0xff, 0])]);
    let refused = spec(flow_of(&key, Some(&exact), &[])).unwrap_err();
    assert_eq!(refused.text, "in_port(p1),eth_type(0x0800),key77(0x0102/0xff00)");
    assert_eq!(refused.reason, "key attribute 77");
    assert!(spec(flow_of(&key, None, &[])).is_err());
}

#[test]
fn without_a_mask_all_is_exact_and_untagged_is_matched() {
    let port = 2u32.to_ne_bytes();
    let ip = [10, 0, 0, 1, 10, 0, 0, 2, 17, 0, 64, 0];
    let key = attrs(&[(3, &port), (4, &[2; 12]), (6, &[8, 0]), (7, &ip), (10, &[0, 53, 0, 54])]);
    let spec = spec(flow_of(&key, None, &attrs(&[(1, &1u32.to_ne_bytes())]))).unwrap();
    let text = "in_port(p2),eth(src=02:02:02:02:02:02,dst=02:02:02:02:02:02),eth_type(0x0800),\
                ipv4(src=10.0.0.1,dst=10.0.0.2,proto=17,tos=0,ttl=64,frag=no),udp(src=53,dst=54)";
    assert_eq!(spec.matches, switch_core::odp::parse_flow(text, &Names).unwrap().0);
    assert!(spec.matches.mask.is_exact(Field::VlanTci) && spec.matches.mask.is_exact(Field::CvlanTci));
    assert_eq!(spec.actions, [Action::Output(PortRef::Ours(PortId { slot: 11, generation: 1 }))]);
}

/// OVS with its `vlan-limit` of 1 looks no further than the second TPID. The kernel itself reads two tags: what it shows of such
/// a flow (docs/ovs-facts.md, `second-tag`) has both, the second without its TPID.
#[test]
fn a_second_tag_that_ovs_does_not_read() {
    let port = 1u32.to_ne_bytes();
    let start = |bits: bool| attrs(&[(3, if bits { &[0xff; 4] } else { &port }), (4, &[0; 12])]);
    let key = [
        start(false),
        unhex(
            "0600060081000000060005001000000030000100060006000000000006000500101400001c00010006000600\
         0800000010000700000000000000000000000000",
        ),
    ];
    let mask = [
        start(true),
        unhex(
            "06000600ffff000006000500101400003000010006000600ffff000006000500ffff00001c00010006000600\
         ffff000010000700000000000000000000000000",
        ),
    ];
    let found = spec(flow_of(&key.concat(), Some(&mask.concat()), &[])).unwrap();
    let text = "in_port(p1),eth_type(0x8100),vlan(tci=0x1000/0x1014),encap(eth_type(0/0),\
                vlan(tci=0x1014),encap(eth_type(0x0800)))";
    assert_eq!(found.matches, switch_core::odp::parse_flow(text, &Names).unwrap().0);
    // And as OVS says it of the userspace datapath.
    let encap = |inner: &[u8]| {
        [start(false), attrs(&[(6, &[0x81, 0]), (5, &[0x10, 10]), (0x8000 | 1, inner)])].concat()
    };
    let exact = attrs(&[(6, &[0xff; 2])]);
    let mask = [start(true), attrs(&[(6, &[0xff; 2]), (5, &[0xff; 2]), (0x8000 | 1, &exact)])].concat();
    let mask = mask.as_slice();
    let found = spec(flow_of(&encap(&attrs(&[(6, &[0x88, 0xa8])])), Some(mask), &[])).unwrap();
    let text = "in_port(p1),eth_type(0x8100),vlan(vid=10,pcp=0),encap(eth_type(0x88a8))";
    assert_eq!(found.matches, switch_core::odp::parse_flow(text, &Names).unwrap().0);
    // No tag, or more than its TPID.
    let ip = attrs(&[(6, &[0x81, 0]), (7, &[0; 12])]);
    for key in [encap(&ip), attrs(&[(3, &port), (4, &[0; 12]), (6, &[0x81, 0])])] {
        let refused = spec(flow_of(&key, None, &[])).unwrap_err();
        assert_eq!(refused.reason, "a VLAN's ethertype without its tag is not understood");
    }
}

#[test]
fn an_unknown_action_makes_the_whole_list_opaque() {
    let port = 1u32.to_ne_bytes();
    let key = attrs(&[(3, &port), (4, &[0; 12]), (6, &[8, 0])]);
    for (unknown, name) in [
        (attrs(&[(1, &port), (26, &[1, 2, 3, 4])]), "action attribute 26 is not understood"),
        (attrs(&[(1, &port), (20, &attrs(&[(40, &[])]))]), "action attribute 40 is not understood"),
        (attrs(&[(6, &attrs(&[(1, &port), (2, &[]), (3, &[])]))]), "sample attribute 3 is not understood"),
        (attrs(&[(12, &attrs(&[(10, &[])]))]), "ct attribute 10 is not understood"),
        (attrs(&[(1, &[0; 5])]), "malformed netlink message"),
    ] {
        let spec = spec(flow_of(&key, None, &unknown)).unwrap();
        let [Action::Opaque(text)] = &spec.actions[..] else { panic!("{:?}", spec.actions) };
        assert!(text.starts_with("action") && text.ends_with(name), "{text}");
    }
    let mut deep = Vec::new();
    for _ in 0..200 {
        deep = attrs(&[(20, &deep)]);
    }
    assert!(matches!(spec(flow_of(&key, None, &deep)).unwrap().actions[..], [Action::Opaque(_)]));
}

#[test]
fn a_device_called_by_a_number_is_no_slot() {
    let mut vports = Vports::new();
    for (number, name) in [(1, "p1"), (2, "12")] {
        vports.insert(number, Vport { number, name: name.into(), ifindex: 0, netns: None });
    }
    let ports = Ports::new(&vports, &Names);
    assert_eq!(ports.reference(1), PortRef::Ours(PortId { slot: 11, generation: 1 }));
    assert_eq!(ports.reference(2), PortRef::Foreign("12".into()));
    assert_eq!(ports.reference(11), PortRef::Foreign("11".into()));
}

#[test]
fn the_kernel_is_asked_for_its_families() {
    let mut requests = Requests::open().unwrap();
    let family = requests.family("nlctrl").unwrap();
    assert_eq!(family.id, 16);
    assert_eq!(requests.family("no_such_family").unwrap_err().errno(), Some(libc::ENOENT));
    // Whether this kernel has the module or not, there is an answer that a person can act on.
    match KernelSource::open(Some("no-such-datapath")) {
        Ok(source) => assert!(source.datapath_ports().is_empty()),
        Err(SourceError(text)) => {
            assert!(text.contains("modprobe openvswitch") || text.contains("CAP_NET_ADMIN"), "{text}");
        }
    }
}
