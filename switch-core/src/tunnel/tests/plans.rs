//! Flows of tunnels from text to packets.

use super::*;
use crate::action::PortRef;
use crate::compile::{NoWays, Plan, PuntReason, TunnelReason, Way, Ways, compile_with};
use crate::drop::DropReason;
use crate::exec::{Env, Metadata, Scratch, Verdict, execute};
use crate::flow::{FlowSpec, Match, PortNames};
use crate::odp;
use std::sync::Arc;

const UPLINK: PortId = PortId { slot: 3, generation: 1 };

const PUSH: &str = "tnl_push(tnl_port(4),header(size=50,type=4,eth(dst=02:00:00:00:00:02,src=02:00:00:00:00:01,\
    dl_type=0x0800),ipv4(src=192.0.2.1,dst=192.0.2.2,proto=17,tos=0,ttl=64,frag=0x4000),\
    udp(src=0,dst=4789,csum=0x0),vxlan(flags=0x8000000,vni=0x2a)),out_port(3))";

struct Names;

impl PortNames for Names {
    fn by_name(&self, name: &str) -> Option<PortId> {
        match name {
            "wire" => Some(WIRE),
            "tunnel" => Some(LOGICAL),
            _ => None,
        }
    }

    fn name(&self, _: u32) -> Option<String> {
        None
    }
}

/// Frames of at most this length go into tunnels of TOS 0x60.
const LIMIT: u32 = 200;

/// One tunnel's port, of this kind, and one next hop for everybody but 192.0.2.99.
struct Host(Kind);

impl Ways for Host {
    fn is_tunnel(&self, port: PortId) -> bool {
        port == LOGICAL
    }

    fn way(&self, port: PortId, remote: &Remote) -> Result<Way, String> {
        assert_eq!(port, LOGICAL);
        if remote.dst == "192.0.2.99".parse::<IpAddr>().unwrap() {
            return Err("no neighbour".into());
        }
        let underlay = Underlay {
            kind: self.0,
            link: LINK,
            src: "192.0.2.1".parse().unwrap(),
            ttl: 61,
            port: 4789,
            src_ports: 40000..=40099,
        };
        let outer = Outer::new(&remote.outer(&underlay)?).map_err(|error| error.to_string())?;
        let limit = if remote.tos == 0x60 { LIMIT } else { u32::MAX };
        Ok(Way { outer: Arc::new(outer), to: UPLINK, limit })
    }

    fn endpoints(&self, port: &PortRef) -> Option<Arc<[Endpoint]>> {
        let ends = match port {
            PortRef::Ours(LOGICAL) => vec![end(None, Vlan::Untagged)],
            PortRef::Foreign(name) if name == "br-ex" => {
                vec![end(Some(LINK.dst), Vlan::Untagged), end(Some([6; 6]), Vlan::Id(7))]
            }
            _ => return None,
        };
        Some(ends.into())
    }
}

/// An end of VXLAN.
fn end(mac: Option<[u8; 6]>, vlan: Vlan) -> Endpoint {
    Endpoint {
        mac,
        vlan,
        local: None,
        kind: Kind::Vxlan,
        port: 4789,
        gbp: false,
        df: false,
        as_linux: false,
        in_port: LOGICAL,
    }
}

fn compiled(ways: &dyn Ways, actions: &str) -> Result<Plan, PuntReason> {
    let mut matches = Match::default();
    matches.key.set(Field::EthType, ETH_P_IP as u128);
    matches.mask.set_exact(Field::EthType);
    let actions = odp::parse_actions(actions, &Names).unwrap();
    compile_with(&FlowSpec { matches, actions, ufid: None, held: None }, ways)
}

#[derive(Default)]
struct Sent(Vec<(PortId, Vec<u8>)>);

impl<'p> Env<'p> for Sent {
    fn output(&mut self, packet: &mut Packet, port: PortId, max_len: u32, _: bool) {
        assert_eq!(max_len, u32::MAX);
        self.0.push((port, packet.head().to_vec()));
    }

    fn recirculate(&mut self, _: &mut Packet, _: &Metadata) -> Option<&'p Plan> {
        None
    }

    fn random(&mut self) -> u32 {
        0xffff_1234
    }
}

fn small() -> Plain {
    Plain { v6: false, udp: true, tags: 0, tos: 0, ttl: 64, payload: vec![7; 20] }
}

fn execution(plan: &Plan) -> Vec<(PortId, Vec<u8>)> {
    let mut sent = Sent::default();
    let mut packet = parsed(&small().frame(false), &RawHeader::default());
    assert_eq!(execute(plan, &mut packet, &mut Scratch::default(), &mut sent), Verdict::Done);
    sent.0
}

#[test]
fn set_and_output_lay_the_header_around_a_copy() {
    let set = |port| format!("set(tunnel(tun_id=0x2a,dst=192.0.2.2,ttl=64,{port}flags(df|key)))");
    let plan = compiled(&Host(Kind::Vxlan), &format!("{},tunnel,wire", set("tp_dst=4789,"))).unwrap();
    assert_eq!(plan.outputs(), [WIRE, UPLINK]);
    assert!(plan.is_certain());
    let [(first, outer), (second, bare)] = &execution(&plan)[..] else { panic!("two outputs") };
    assert_eq!((*first, *second), (UPLINK, WIRE));
    let inner = small().frame(false);
    let port = u16::from_be_bytes([outer[34], outer[35]]);
    assert!((40000..=40099).contains(&port));
    assert_eq!(*outer, encapsulated(&known::vxlan(), &inner, 0, 64, 0x1234, port));
    assert_eq!(*bare, inner);
    // The other way round, and with the host's port.
    let plan = compiled(&Host(Kind::Vxlan), &format!("{},wire,tunnel", set(""))).unwrap();
    assert_eq!(execution(&plan), [(WIRE, inner), (UPLINK, outer.clone())]);
}

#[test]
fn each_output_has_what_was_set_last() {
    let set = |id: u32, dst: &str| format!("set(tunnel(tun_id={id},dst={dst},ttl=0,flags(key)))");
    let actions = format!("{},tunnel,clone({},tunnel),tunnel", set(1, "192.0.2.2"), set(2, "192.0.2.3"));
    let sent = execution(&compiled(&Host(Kind::Gre), &actions).unwrap());
    let seen: Vec<_> = sent.iter().map(|(_, frame)| (frame[33], frame[22], frame[41])).collect();
    // Address, the host's TTL, key.
    assert_eq!(seen, [(2, 61, 1), (3, 61, 2), (2, 61, 1)]);
}

#[test]
fn ovns_option_goes_along() {
    let actions = "set(tunnel(tun_id=0x3,dst=192.0.2.2,ttl=64,tp_dst=6081,\
        geneve({class=0x102,type=0x80,len=4,0x10002}),flags(df|csum|key))),tunnel";
    let sent = execution(&compiled(&Host(Kind::Geneve), actions).unwrap());
    let frame = &sent[0].1;
    let packet = parsed(frame, &RawHeader::default());
    let endpoint = Endpoint {
        mac: Some(LINK.dst),
        vlan: Vlan::Untagged,
        local: Some("192.0.2.2".parse().unwrap()),
        kind: Kind::Geneve,
        port: 6081,
        gbp: false,
        df: true,
        as_linux: true,
        in_port: LOGICAL,
    };
    // The checksum of this packet is still to be completed, and nobody has looked at it.
    assert_eq!(recognize(&packet, &[endpoint], |_| None), None);
    let mut whole = frame.clone();
    let offload = Offload { needs_csum: true, csum_start: 34, csum_offset: 6, ..Offload::default() };
    offload::finish_checksum(&mut whole, &offload).unwrap();
    let found = recognize(&parsed(&whole, &RawHeader::default()), &[endpoint], |_| None).unwrap();
    assert_eq!((found.tunnel.id, found.tunnel.options), (3, 0x0102_8001_0001_0002));
    assert_eq!(found.tunnel.flags, TUN_KEY | TUN_CSUM | TUN_DF);
}

#[test]
fn tnl_push_makes_the_same() {
    let plan = compiled(&NoWays, &format!("clone({PUSH},push_vlan(vid=9,pcp=0),wire),wire")).unwrap();
    let [(_, outer), (_, bare)] = &execution(&plan)[..] else { panic!("two outputs") };
    let inner = small().frame(false);
    assert_eq!(*bare, inner);
    let port = u16::from_be_bytes([outer[38], outer[39]]);
    assert!((32768..=61000).contains(&port));
    let mut expected = encapsulated(&known::vxlan(), &inner, 0, 64, 0x1234, port);
    expected.splice(12..12, [0x81, 0, 0, 9]);
    assert_eq!(*outer, expected);
    // What comes after is done to the outer packet, of which the flow has matched nothing.
    let edits = format!("{PUSH},set(eth(dst=02:00:00:00:00:07)),wire");
    assert_eq!(execution(&compiled(&NoWays, &edits).unwrap())[0].1[..6], [2, 0, 0, 0, 0, 7]);
    let edits = format!("{PUSH},set(ipv4(ttl=9)),wire");
    assert_eq!(compiled(&NoWays, &edits), Err(PuntReason::Tunnel(TunnelReason::Edit)));
}

#[test]
fn what_is_not_done_is_refused_with_a_reason() {
    let set = "set(tunnel(tun_id=0x2a,dst=192.0.2.2,ttl=64,flags(key)))";
    let vxlan = Host(Kind::Vxlan);
    let reason = |ways: &dyn Ways, actions: &str| match compiled(ways, actions) {
        Err(reason) => reason.to_string(),
        Ok(plan) => panic!("{actions}: {plan:?}"),
    };
    assert_eq!(reason(&vxlan, "tunnel"), "tunnel: output without set");
    assert_eq!(reason(&vxlan, &format!("clone({set}),tunnel")), "tunnel: output without set");
    let again = "tunnel: recirc after set or tnl_push";
    assert_eq!(reason(&vxlan, &format!("{set},recirc(5)")), again);
    assert_eq!(reason(&vxlan, &format!("{PUSH},clone(recirc(5))")), again);
    assert!(compiled(&vxlan, &format!("clone({PUSH},wire),recirc(5)")).is_ok(), "of the packet inside");
    assert_eq!(reason(&vxlan, &format!("{set},trunc(100),tunnel")), "tunnel: trunc");
    assert_eq!(reason(&vxlan, &format!("{set},trunc(100),clone(tunnel)")), "tunnel: trunc");
    let marked = "tunnel: output with a mark or priority";
    assert_eq!(reason(&vxlan, &format!("{set},set(skb_mark(1)),tunnel")), marked);
    assert_eq!(reason(&vxlan, &format!("set(skb_priority(5)),{set},clone(tunnel)")), marked);
    assert!(compiled(&vxlan, &format!("clone(set(skb_mark(1)),wire),{set},tunnel")).is_ok());
    assert_eq!(reason(&NoWays, "tnl_pop(tunnel)"), "tunnel: tnl_pop");
    assert_eq!(reason(&vxlan, "tnl_pop(wire)"), "tunnel: tnl_pop");
    assert_eq!(reason(&vxlan, "tnl_pop(tunnel),wire"), "tunnel: tnl_pop");
    assert_eq!(reason(&vxlan, "clone(tnl_pop(tunnel))"), "tunnel: tnl_pop");
    assert_eq!(reason(&vxlan, "br-ex,wire"), "foreign port br-ex");
    assert_eq!(reason(&vxlan, "set(eth(dst=02:00:00:00:00:07)),br-ex"), "foreign port br-ex");
    assert_eq!(reason(&vxlan, "br-int"), "foreign port br-int");
    assert_eq!(reason(&vxlan, "tnl_push(gre()),wire"), "tunnel: header with 'tnl_port(' expected");
    assert_eq!(
        reason(&vxlan, &set.replace(".2,", ".99,").replace(")))", "))),tunnel")),
        "tunnel: no neighbour"
    );
    assert_eq!(
        reason(&vxlan, "set(tunnel(tun_id=1,ttl=3,flags(key))),tunnel"),
        "tunnel: header with no single destination"
    );
    let erspan = "set(tunnel(dst=1.1.1.1,erspan(ver=2,dir=1,hwid=0x1),flags(df|key))),tunnel";
    assert_eq!(reason(&vxlan, erspan), "tunnel: header with erspan or gtpu");
    let wide = set.replace("0x2a", "0x1000000") + ",tunnel";
    assert_eq!(reason(&vxlan, &wide), "tunnel: a VNI of more than 24 bits");
    let option = set.replace("flags", "geneve({class=1,type=2,len=4,0x1}),flags") + ",tunnel";
    assert_eq!(reason(&vxlan, &option), "tunnel: options of another kind of tunnel");
    let v6 = set.replace("dst=192.0.2.2", "ipv6_dst=2001:db8::1") + ",tunnel";
    assert_eq!(reason(&vxlan, &v6), "tunnel: addresses of different families");
    // The length that the next output of another port is cut to is of no concern.
    assert!(compiled(&vxlan, &format!("{set},trunc(100),wire,tunnel")).is_ok());
}

#[test]
fn a_packet_that_is_too_long_is_dropped_by_name() {
    let plan = compiled(&Host(Kind::Vxlan), "set(tunnel(tun_id=1,dst=192.0.2.2,flags(key))),tunnel").unwrap();
    let long = Plain { payload: vec![1; 65_480], ..small() };
    let mut packet = parsed(&long.frame(false), &RawHeader::default());
    let verdict = execute(&plan, &mut packet, &mut Scratch::default(), &mut Sent::default());
    assert_eq!(verdict, Verdict::Dropped(DropReason::Oversized));
    // What comes after is done all the same.
    let actions = "set(tunnel(tun_id=1,dst=192.0.2.2,flags(key))),tunnel,wire";
    let mut packet = parsed(&long.frame(false), &RawHeader::default());
    let mut sent = Sent::default();
    let plan = compiled(&Host(Kind::Vxlan), actions).unwrap();
    assert_eq!(execute(&plan, &mut packet, &mut Scratch::default(), &mut sent), Verdict::Done);
    assert_eq!(sent.0[0].0, WIRE);
}

#[test]
fn what_is_too_long_for_its_way_is_the_hosts() {
    let vxlan = Host(Kind::Vxlan);
    let plan =
        compiled(&vxlan, "set(tunnel(tun_id=1,dst=192.0.2.2,tos=0x60,flags(key))),tunnel,wire").unwrap();
    assert!(!plan.is_certain(), "it is run dry before anything leaves");
    assert!(compiled(&vxlan, "set(tunnel(tun_id=1,dst=192.0.2.2,flags(key))),tunnel").unwrap().is_certain());
    // Where nothing else can go wrong, that it is not too long is all that there is to be seen before.
    let ops = "set(tunnel(tun_id=1,dst=192.0.2.2,tos=0x60,flags(key))),tunnel";
    let sole = compiled(&vxlan, &format!("set(eth(dst=02:00:00:00:00:07)),{ops}")).unwrap();
    let tagged = compiled(&vxlan, &format!("push_vlan(vid=1,pcp=0),{ops}")).unwrap();
    let headers = small().frame(false).len() - small().payload.len();
    for (len, fits) in [(LIMIT as usize, true), (LIMIT as usize + 1, false)] {
        let frame = Plain { payload: vec![1; len - headers], ..small() }.frame(false);
        assert_eq!(frame.len(), len);
        let (mut packet, mut sent) = (parsed(&frame, &RawHeader::default()), Sent::default());
        assert_eq!((sole.is_certain_for(&packet), tagged.is_certain_for(&packet)), (fits, false));
        let verdict = execute(&plan, &mut packet, &mut Scratch::default(), &mut sent);
        assert_eq!((verdict, sent.0.len()), if fits { (Verdict::Done, 2) } else { (Verdict::Unresolved, 0) });
    }
}

#[test]
fn a_header_that_cannot_be_pushed_ends_its_clone_only() {
    let plan = compiled(&NoWays, &format!("clone({PUSH},wire),wire")).unwrap();
    let long = Plain { payload: vec![1; 65_480], ..small() };
    let mut packet = parsed(&long.frame(false), &RawHeader::default());
    let mut sent = Sent::default();
    assert_eq!(execute(&plan, &mut packet, &mut Scratch::default(), &mut sent), Verdict::Done);
    assert_eq!(sent.0.len(), 1, "the bare one");
}

#[test]
fn flows_that_give_packets_to_a_tunnel_or_to_the_host_before_it_say_what_is_decapsulated() {
    let plan = |actions: &str| compiled(&Host(Kind::Vxlan), actions).unwrap();
    let pop = plan("tnl_pop(tunnel)");
    assert_eq!(pop.endpoints(), Some(&[end(None, Vlan::Untagged)][..]));
    assert!(!pop.is_certain() && pop.outputs().is_empty() && pop.sole_output().is_none());
    assert_eq!(plan("br-ex").endpoints().map(<[_]>::len), Some(2));
    // The tag that the flow takes off is the one that it has matched; behind another tag is nothing of ours.
    let own = plan("pop_vlan,br-ex");
    assert_eq!(own.endpoints(), Some(&[end(Some(LINK.dst), Vlan::Any)][..]));
    assert_eq!(plan("pop_vlan,tnl_pop(tunnel)").endpoints(), Some(&[end(None, Vlan::Any)][..]));
    assert_eq!(plan("wire").endpoints(), None);
    // Whoever executes it in another way has a packet for the host.
    let mut packet = parsed(&small().frame(false), &RawHeader::default());
    let verdict = execute(&pop, &mut packet, &mut Scratch::default(), &mut Sent::default());
    assert_eq!(verdict, Verdict::Unresolved);
}

#[test]
fn an_endpoint_may_leave_open_what_a_flow_has_matched() {
    let spec = known::vxlan();
    let plain = Plain { tos: 2, ..small() };
    let frame = |tag: &[u8]| {
        let mut frame = encapsulated(&spec, &plain.frame(false), 2, 64, 1, 50000);
        frame.splice(12..12, tag.iter().copied());
        frame
    };
    let (bare, tagged) = (frame(&[]), frame(&[0x81, 0, 0x20, 7]));
    let takes = |frame: &[u8], end: Endpoint| {
        recognize(&parsed(frame, &RawHeader::default()), &[end], |_| None).is_some()
    };
    for (vlan, expected) in [
        (Vlan::Untagged, (true, false)),
        (Vlan::Id(7), (false, true)),
        (Vlan::Id(8), (false, false)),
        (Vlan::Any, (true, true)),
    ] {
        assert_eq!((takes(&bare, end(None, vlan)), takes(&tagged, end(None, vlan))), expected, "{vlan:?}");
    }
    assert!(takes(&bare, end(Some(LINK.dst), Vlan::Any)) && !takes(&bare, end(Some([9; 6]), Vlan::Any)));
    let at = |address: &str| Endpoint { local: Some(address.parse().unwrap()), ..end(None, Vlan::Any) };
    assert!(takes(&bare, at("192.0.2.2")) && !takes(&bare, at("192.0.2.3")));
    // Congestion marks go over to the packet inside, or are left to flows.
    let mut marked = bare;
    marked[15] |= 3;
    marked[24..26].fill(0);
    let sum = crate::checksum::checksum(&marked[14..34]);
    marked[24..26].copy_from_slice(&sum.to_be_bytes());
    for (as_linux, tos) in [(true, 3), (false, 2)] {
        let mut packet = parsed(&marked, &RawHeader::default());
        let end = Endpoint { as_linux, ..end(None, Vlan::Any) };
        let found = recognize(&packet, &[end], |_| None).unwrap();
        let taken = found.pop(&mut packet);
        assert_eq!((packet.head()[15], found.tunnel.tos & 3, packet.in_port), (tos, 3, LOGICAL));
        taken.put_back(&mut packet);
        assert_eq!((packet.head(), packet.len, packet.in_port), (&marked[..], taken.frame_len(), WIRE));
        // What stands behind is cut off, or would have to be left on.
        let padded = [&marked[..], &[0; 3]].concat();
        assert_eq!(recognize(&parsed(&padded, &RawHeader::default()), &[end], |_| None).is_some(), as_linux);
    }
}

/// Goes on at one plan, whatever the stage.
struct Again<'p>(&'p Plan);

impl<'p> Env<'p> for Again<'p> {
    fn output(&mut self, _: &mut Packet, _: PortId, _: u32, _: bool) {}

    fn recirculate(&mut self, _: &mut Packet, _: &Metadata) -> Option<&'p Plan> {
        Some(self.0)
    }

    fn random(&mut self) -> u32 {
        0
    }
}

#[test]
fn a_cut_of_an_earlier_stage_is_for_the_host_when_a_header_is_pushed() {
    let verdict = |first: &str, next: &str| {
        let (first, next) = (compiled(&NoWays, first).unwrap(), compiled(&NoWays, next).unwrap());
        let mut packet = parsed(&small().frame(false), &RawHeader::default());
        let verdict = execute(&first, &mut packet, &mut Scratch::default(), &mut Again(&next));
        (verdict, crate::chain::Onward::of(&first).is_some())
    };
    let push = format!("{PUSH},wire");
    assert_eq!(verdict("trunc(40),recirc(5)", &push), (Verdict::Unresolved, false), "it is run dry");
    assert_eq!(verdict("trunc(40),recirc(5)", &format!("wire,{push}")), (Verdict::Done, false));
    assert_eq!(verdict("trunc(40),wire,recirc(5)", &push), (Verdict::Done, true));
}
