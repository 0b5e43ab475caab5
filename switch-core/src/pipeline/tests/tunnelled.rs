//! Packets that came by a tunnel: flows match the outer header too, in L2 as in L1.

use super::popped::LOOKOUT;
use super::*;
use crate::checksum;
use crate::compile::Way;
use crate::key::{TUN_CSUM, TUN_KEY};
use crate::odp;
use crate::tunnel::{Endpoint, Gbp, Kind, Link, Outer, Remote, TunnelKey, Underlay, Vlan};

struct Names;

impl crate::flow::PortNames for Names {
    fn by_name(&self, name: &str) -> Option<PortId> {
        match name {
            "geneve" => Some(PORT),
            "inside" => Some(INSIDE),
            _ => None,
        }
    }

    fn name(&self, slot: u32) -> Option<String> {
        (slot == PORT.slot).then(|| "geneve".into())
    }
}

const OVN: u64 = 0x0102_8001_0000_0000;

fn tunnel(id: u64, option: u64) -> TunnelKey {
    TunnelKey {
        id,
        src: "192.0.2.1".parse().unwrap(),
        dst: "192.0.2.2".parse().unwrap(),
        tos: 0,
        ttl: 64,
        ports: (50000, 6081),
        flags: TUN_KEY | TUN_CSUM,
        gbp: Gbp::default(),
        options: option,
    }
}

/// The port by which each packet leaves, if it does.
fn run_tunnelled(switch: &mut Switch, packets: &[Packet], tunnels: &[TunnelKey]) -> Vec<Option<u32>> {
    let received = packets.iter().map(|p| p.head().to_vec()).collect();
    let mut sink = Sink { received, ..Sink::default() };
    let mut popped = Popped::default();
    for (i, &tunnel) in tunnels.iter().enumerate() {
        popped.put(i, tunnel);
    }
    switch.process_inside(1, PORT, u64::MAX, &mut packets.to_vec(), &mut popped, &mut sink);
    let slot = |i| match (sink.sent.get(&i), sink.ended.get(&i)) {
        (Some(sent), None) => Some(sent[0].port.slot),
        (None, Some(Fate::Upcall(Upcall::Miss))) => None,
        other => panic!("packet {i}: {other:?}"),
    };
    (0..packets.len()).map(slot).collect()
}

#[test]
fn flows_match_the_outer_header() {
    let mut bench = Bench::plain();
    let base = "recirc_id(0),in_port(geneve),eth(dst=02:00:00:00:00:01),eth_type(0x0800),ipv4(frag=no)";
    let outer = "src=192.0.2.1,dst=192.0.2.2,ttl=64/0,tp_src=0/0,tp_dst=6081";
    let flows = [
        (
            format!(
                "tunnel(tun_id=0x1,{outer},geneve({{class=0x102,type=0x80,len=4,0x10002/0x7fffffff}}),flags(-df+csum+key))"
            ),
            2,
        ),
        (
            format!(
                "tunnel(tun_id=0x1,{outer},geneve({{class=0x102,type=0x80,len=4,0x10003/0x7fffffff}}),flags(-df+csum+key))"
            ),
            3,
        ),
        (
            format!(
                "tunnel(tun_id=0x2,{outer},geneve({{class=0x102,type=0x80,len=4,0x10002/0x7fffffff}}),flags(-df+csum+key))"
            ),
            4,
        ),
        (format!("tunnel(tun_id=0x3,{outer},flags(-df+csum+key))"), 5),
    ];
    for (text, out) in flows {
        let (matches, _) = odp::parse_flow(&format!("{text},{base}"), &Names).unwrap();
        let (_, updates) = bench
            .planner
            .add(PORT, Source::Learned, spec(matches, vec![output(port(out, 1))]), IfExists::Refuse)
            .unwrap();
        bench.apply(updates);
    }
    let cases = [
        (tunnel(1, OVN | 0x10002), Some(2)),
        (tunnel(1, OVN | 0x8001_0002), Some(2)),
        (tunnel(1, OVN | 0x10003), Some(3)),
        (tunnel(2, OVN | 0x10002), Some(4)),
        (tunnel(2, OVN | 0x10003), None),
        (tunnel(1, 0), None),
        (tunnel(3, 0), Some(5)),
        (tunnel(3, OVN), Some(5)),
        (TunnelKey { flags: TUN_KEY, ..tunnel(3, 0) }, None),
        (TunnelKey { src: "192.0.2.9".parse().unwrap(), ..tunnel(3, 0) }, None),
        (TunnelKey { src: "::9".parse().unwrap(), dst: "::8".parse().unwrap(), ..tunnel(3, 0) }, None),
        (TunnelKey { ports: (1, 6082), ..tunnel(3, 0) }, None),
        (TunnelKey { ports: (1, 6081), ttl: 3, ..tunnel(3, 0) }, Some(5)),
    ];
    let (tunnels, expected): (Vec<_>, Vec<_>) = cases.into_iter().unzip();
    let packets = vec![FRAME.packet(PORT); tunnels.len()];
    let sent = expected.iter().flatten().count() as u64;
    let stats = |bench: &Bench| bench.paths[&PORT.slot][0].read();
    assert_eq!(run_tunnelled(&mut bench.switches[0], &packets, &tunnels), expected);
    assert_eq!((stats(&bench).l2_hits + stats(&bench).l1_hits, stats(&bench).misses), (sent, 6));
    let before = stats(&bench).l1_hits;
    assert_eq!(run_tunnelled(&mut bench.switches[0], &packets, &tunnels), expected);
    assert_eq!(stats(&bench).l1_hits - before, sent, "L1 tells them apart");
    // What its sender said was about the outer headers, so nothing is refused for it.
    let mut refusable = FRAME.packet(PORT);
    refusable.offload.gso_size = 666;
    assert_eq!(run_tunnelled(&mut bench.switches[0], &[refusable], &[tunnel(3, 0)]), [Some(5)]);
    // Who came by no tunnel has nothing of those before.
    let rest = FrameSpec { tags: vec![(ETH_P_8021Q, 5)], ..FRAME };
    let plain = [FRAME.packet(PORT), rest.packet(PORT), FRAME.packet(PORT)];
    assert_eq!(run(&mut bench.switches[0], 1, &plain), vec![Fate::Upcall(Upcall::Miss); 3]);
}

/// The tunnels' port.
const INSIDE: PortId = PortId { slot: 3, generation: 1 };

/// Ends of VXLAN, GENEVE and GRE at [`INSIDE`], for whatever flows choose; and of VXLAN behind the host's `br-ex`.
struct Ends;

impl Ways for Ends {
    fn is_tunnel(&self, port: PortId) -> bool {
        port == INSIDE
    }

    fn way(&self, _: PortId, _: &Remote) -> Result<Way, String> {
        Err("nowhere".into())
    }

    fn endpoints(&self, port: &PortRef) -> Option<Arc<[Endpoint]>> {
        let end = |kind, port, as_linux| Endpoint {
            mac: None,
            vlan: Vlan::Untagged,
            local: None,
            kind,
            port,
            gbp: false,
            df: false,
            as_linux,
            in_port: INSIDE,
        };
        match port {
            PortRef::Ours(INSIDE) => Some(
                [end(Kind::Vxlan, 4789, false), end(Kind::Geneve, 6081, true), end(Kind::Gre, 0, true)]
                    .into(),
            ),
            PortRef::Foreign(name) if name == "br-ex" => {
                let behind = end(Kind::Vxlan, 4789, true);
                Some([Endpoint { mac: Some(MAC), local: Some([192, 0, 2, 2].into()), ..behind }].into())
            }
            _ => None,
        }
    }
}

/// To which outer frames are sent.
const MAC: [u8; 6] = [2, 0, 0, 0, 0, 0xaa];

/// What an inner frame comes in.
#[derive(Clone)]
struct OuterFrame {
    kind: Kind,
    tag: Option<u16>,
    /// Last byte of the other end's address.
    src: u8,
    tos: u8,
    sport: u16,
    dport: u16,
    id: u32,
    /// Of GENEVE: OVN's, of this value.
    option: Option<u32>,
    v6: bool,
    padding: usize,
}

const OUTER: OuterFrame = OuterFrame {
    kind: Kind::Vxlan,
    tag: None,
    src: 1,
    tos: 0,
    sport: 40000,
    dport: 4789,
    id: 1,
    option: None,
    v6: false,
    padding: 0,
};

impl OuterFrame {
    fn around(&self, inner: &[u8]) -> Vec<u8> {
        let tunnel = match self.kind {
            Kind::Vxlan => [[8, 0, 0, 0], (self.id << 8).to_be_bytes()].concat(),
            Kind::Geneve => match self.option.map(u32::to_be_bytes) {
                None => [[0, 0, 0x65, 0x58], (self.id << 8).to_be_bytes()].concat(),
                Some(value) => {
                    [[2, 0x40, 0x65, 0x58], (self.id << 8).to_be_bytes(), [1, 2, 0x80, 1], value].concat()
                }
            },
            Kind::Gre => [[0x20, 0, 0x65, 0x58], self.id.to_be_bytes()].concat(),
        };
        let payload = [&tunnel, inner].concat();
        let (proto, l4) = match self.kind {
            Kind::Gre => (ipproto::GRE, payload),
            _ => {
                let len = (payload.len() as u16 + 8).to_be_bytes();
                let ports = [self.sport.to_be_bytes(), self.dport.to_be_bytes()].concat();
                (ipproto::UDP, [&ports[..], &len, &[0; 2], &payload].concat())
            }
        };
        let mut frame = [MAC, [2, 0, 0, 0, 0, self.src]].concat();
        if let Some(tci) = self.tag {
            frame.extend([ETH_P_8021Q.to_be_bytes(), tci.to_be_bytes()].concat());
        }
        if self.v6 {
            frame.extend(ETH_P_IPV6.to_be_bytes());
            frame.extend([0x60 | self.tos >> 4, self.tos << 4, 0, 0]);
            frame.extend((l4.len() as u16).to_be_bytes());
            frame.extend([proto, 64]);
            for last in [self.src, 0xaa] {
                frame.extend([0xfd; 15]);
                frame.push(last);
            }
        } else {
            let mut ip = vec![0x45, self.tos];
            ip.extend((20 + l4.len() as u16).to_be_bytes());
            ip.extend([0, 9, 0, 0, 64, proto, 0, 0, 192, 0, 2, 100 + self.src, 192, 0, 2, 2]);
            let sum = checksum::checksum(&ip);
            ip[10..12].copy_from_slice(&sum.to_be_bytes());
            frame.extend(ETH_P_IP.to_be_bytes());
            frame.extend(ip);
        }
        frame.extend(l4);
        frame.extend(vec![0; self.padding]);
        frame
    }

    fn packet(&self, port: PortId, inner: &FrameSpec) -> Packet {
        Packet::from_frame(port, &self.around(&inner.bytes()))
    }
}

fn udp_to(port: u16) -> Vec<(Field, u128, Option<u128>)> {
    vec![
        (Field::EthType, ETH_P_IP as u128, None),
        (Field::IpFrag, 0, None),
        (Field::IpProto, ipproto::UDP as u128, None),
        (Field::TpDst, port as u128, None),
    ]
}

fn pop() -> Vec<Action> {
    vec![Action::TnlPop(PortRef::Ours(INSIDE))]
}

/// An uplink, [`PORT`], whose VXLAN is decapsulated; what is inside leaves by [`OUT`] if it is of tunnel 1 and for station 1.
fn overlay() -> (Bench, FlowRef, FlowRef) {
    let mut bench = Bench::plain();
    bench.ways = Arc::new(Ends);
    bench.planner.set_ways(bench.ways.clone());
    bench.add_port(INSIDE, 1024);
    let outer = bench.add(PORT, Source::Learned, spec(matches(PORT, 0, &udp_to(4789)), pop())).unwrap();
    let fields = [(Field::TunId, 1, None), (Field::EthDst, 0x0200_0000_0001, None)];
    let m = matches(INSIDE, 0, &fields);
    let inner = bench.add(INSIDE, Source::Learned, spec(m, vec![output(OUT)])).unwrap();
    (bench, outer, inner)
}

fn paths(bench: &Bench, id: PortId) -> PathStats {
    bench.paths[&id.slot][0].read()
}

#[test]
fn a_packet_out_of_a_tunnel_takes_one_lookup_in_l1() {
    let (mut bench, ..) = overlay();
    let packet = OUTER.packet(PORT, &FRAME);
    for round in 0..3 {
        // Outer headers differ where no flow looks.
        let other = OuterFrame { sport: 50000 + round, src: 2, ..OUTER }.packet(PORT, &FRAME);
        let fates = bench.burst(&[packet.clone(), other, FRAME.packet(PORT)]);
        for fate in &fates[..2] {
            let Fate::Sent(sent) = fate else { panic!("{fate:?}") };
            assert_eq!((sent[0].port, &sent[0].head), (OUT, &FRAME.bytes()));
        }
        assert_eq!(fates[2], Fate::Upcall(Upcall::Miss));
    }
    // They are counted once. The first of all was not found in L1, the other one of its burst was not either.
    assert_eq!((paths(&bench, PORT).l2_hits, paths(&bench, PORT).l1_hits), (0, 0));
    assert_eq!((paths(&bench, INSIDE).l2_hits, paths(&bench, INSIDE).l1_hits), (2, 4));
    let port = |bench: &Bench| bench.switches[0].tables.port(PORT).unwrap().lookout;
    assert_eq!(port(&bench), LOOKOUT);
    // After a while without such packets the port is as any other.
    for _ in 0..LOOKOUT {
        run(&mut bench.switches[0], 1, &[FRAME.packet(OUT)]);
        run(&mut bench.switches[0], 1, &[FRAME.packet(PORT)]);
    }
    assert_eq!(port(&bench), 0);
}

#[test]
fn the_imprint_of_a_flow_that_is_replaced_is_that_of_the_new_one() {
    let (mut bench, outer, _) = overlay();
    let packet = OUTER.packet(PORT, &FRAME);
    let sent = |bench: &mut Bench| matches!(bench.burst(&[packet.clone(), packet.clone()])[1], Fate::Sent(_));
    let printed = |bench: &Bench| bench.switches[0].popped.as_ref().unwrap().printed();
    assert!((0..3).all(|_| sent(&mut bench)));
    assert_eq!(printed(&bench), [outer]);
    let new = bench.replace(outer, pop());
    assert!((0..3).all(|_| sent(&mut bench)));
    assert_eq!(printed(&bench), [new]);
}

#[test]
fn what_goes_to_the_host_goes_as_it_was_received() {
    let (mut bench, outer, inner) = overlay();
    let miss = Fate::Upcall(Upcall::Miss);
    // Another tunnel; padding; and congestion marks that have gone over to the packet inside.
    let other = OuterFrame { id: 2, ..OUTER };
    let geneve = OuterFrame { kind: Kind::Geneve, dport: 6081, tos: 3, ..OUTER };
    let padded = OuterFrame { id: 2, tos: 0, padding: 9, ..geneve.clone() };
    bench.add(PORT, Source::Learned, spec(matches(PORT, 0, &udp_to(6081)), pop())).unwrap();
    let mut ect = FRAME.bytes();
    ect[15] = 2;
    let unknown = FrameSpec { dst: 2, ..FRAME };
    for _ in 0..2 {
        let mut marked = ect.clone();
        marked[5] = 2;
        let packets = [
            other.packet(PORT, &FRAME),
            padded.packet(PORT, &FRAME),
            OUTER.packet(PORT, &unknown),
            Packet::from_frame(PORT, &geneve.around(&marked)),
        ];
        assert_eq!(bench.burst(&packets), vec![miss.clone(); 4]);
    }
    // Where it is known, the mark is inside.
    let fates = bench.burst(&[Packet::from_frame(PORT, &geneve.around(&ect))]);
    let [Fate::Sent(sent)] = &fates[..] else { panic!("{fates:?}") };
    assert_eq!(sent[0].head[15], 3);
    // What is inside and cannot be parsed, or is no frame at all.
    let mut deep = FRAME.bytes();
    deep[14] = 0x4f;
    for inner in [&deep[..40], &deep[..13]] {
        let packet = Packet::from_frame(PORT, &OUTER.around(inner));
        bench.burst(&[packet.clone(), packet]);
    }
    // A packet for none of the endpoints, a punt inside, and a tunnel in a tunnel.
    let wrong = OuterFrame { tag: Some(5), ..OUTER }.packet(PORT, &FRAME);
    assert_eq!(bench.burst(&[wrong]), [Fate::Upcall(Upcall::Punt(outer))], "the tag is not taken off");
    let mut broken = OUTER.around(&FRAME.bytes());
    broken[42] = 0;
    let broken = Packet::from_frame(PORT, &broken);
    let punt = Fate::Upcall(Upcall::Punt(outer));
    assert_eq!(bench.burst(&[broken.clone(), broken]), [punt.clone(), punt]);
    let inner = bench.replace(inner, pop());
    let nested = OUTER.around(&OUTER.around(&FRAME.bytes()));
    let mut nested = nested;
    nested[50..56].copy_from_slice(&[2, 0, 0, 0, 0, 1]);
    let punt = Fate::Upcall(Upcall::Punt(inner));
    let nested = Packet::from_frame(PORT, &nested);
    assert_eq!(bench.burst(&[nested.clone(), nested]), [punt.clone(), punt]);
    bench.finish(&[PORT, INSIDE]);
}

#[test]
fn the_host_sees_outer_and_inner_flows_alive() {
    let (mut bench, outer, inner) = overlay();
    let packet = OUTER.packet(PORT, &FRAME);
    bench.burst(std::slice::from_ref(&packet));
    let is_due = |bench: &Bench, flow: FlowRef| bench.planner.get(flow).unwrap().counters[0].is_due();
    let packets = |bench: &Bench, flow| bench.planner.get(flow).unwrap().stats().packets;
    for flow in [outer, inner] {
        let before = (packets(&bench, outer), packets(&bench, inner));
        assert!(bench.planner.get(flow).unwrap().counters[0].set_due());
        let burst = vec![packet.clone(); 3];
        let fates = run(&mut bench.switches[0], 2, &burst);
        assert!(matches!(fates[..2], [Fate::Sent(_), Fate::Sent(_)]), "{fates:?}");
        assert_eq!(fates[2], Fate::Upcall(Upcall::KeepAlive(flow)), "the last of its burst");
        assert!(!is_due(&bench, flow));
        // What shows the outer flow alone is not looked at inside.
        let inside = if flow == outer { 2 } else { 3 };
        assert_eq!((packets(&bench, outer), packets(&bench, inner)), (before.0 + 3, before.1 + inside));
        // A host without room is asked again.
        assert!(bench.planner.get(flow).unwrap().counters[0].set_due());
        let fates = run_beside(&mut bench.switches[0], 2, &burst, true);
        assert!(fates.iter().all(|fate| matches!(fate, Fate::Sent(_))) && is_due(&bench, flow));
        run(&mut bench.switches[0], 2, &burst);
    }
    // Both at once: the outer one first, then the other.
    for flow in [outer, inner] {
        bench.planner.get(flow).unwrap().counters[0].set_due();
    }
    for flow in [outer, inner] {
        let fates = run(&mut bench.switches[0], 2, std::slice::from_ref(&packet));
        assert_eq!(fates, [Fate::Upcall(Upcall::KeepAlive(flow))]);
    }
    assert!(!is_due(&bench, outer) && !is_due(&bench, inner));
}

#[test]
fn what_comes_out_of_a_tunnel_keeps_its_header_through_all_stages() {
    let (mut bench, _, inner) = overlay();
    bench.replace(inner, vec![Action::DecTtl(vec![]), Action::Recirc(1)]);
    let of = |id: u128| matches(INSIDE, 1, &[(Field::TunId, id, None)]);
    bench.add(INSIDE, Source::Learned, spec(of(1), vec![output(OUT)])).unwrap();
    bench.add(INSIDE, Source::Learned, spec(of(2), vec![output(PORT)])).unwrap();
    let packet = OUTER.packet(PORT, &FRAME);
    for _ in 0..3 {
        let fates = bench.burst(std::slice::from_ref(&packet));
        assert!(matches!(&fates[..], [Fate::Sent(sent)] if sent[0].port == OUT), "{fates:?}");
    }
    let trace = bench.switches[0].trace(&packet);
    let slots: Vec<_> = trace.stages.iter().map(|stage| stage.key.get(Field::InPort)).collect();
    assert_eq!(slots, [0, 3, 3]);
    assert!(trace.stages[1..].iter().all(|stage| stage.key.get(Field::TunId) == 1));
    assert!(matches!(trace.inside, Some(L1Trace::Hit { live: true, .. })), "{trace:?}");
    bench.finish(&[PORT, INSIDE]);
}

#[test]
fn what_came_by_one_tunnel_may_leave_by_another() {
    let (mut bench, _, inner) = overlay();
    let push = "tnl_port(4),header(size=50,type=4,eth(dst=02:00:00:00:00:02,src=02:00:00:00:00:01,dl_type=0x0800),\
        ipv4(src=192.0.2.2,dst=192.0.2.77,proto=17,tos=0,ttl=64,frag=0x4000),udp(src=0,dst=4789,csum=0x0),\
        vxlan(flags=0x8000000,vni=0x9)),out_port(1)";
    bench.replace(inner, vec![Action::TnlPush(push.into()), output(OUT)]);
    let packet = OUTER.packet(PORT, &FRAME);
    for _ in 0..2 {
        let fates = bench.burst(std::slice::from_ref(&packet));
        let [Fate::Sent(sent)] = &fates[..] else { panic!("{fates:?}") };
        let (outer, inside) = sent[0].head.split_at(50);
        assert_eq!(
            (&outer[30..34], &outer[46..49], inside),
            (&[192, 0, 2, 77][..], &[0, 0, 9][..], &FRAME.bytes()[..])
        );
    }
    bench.finish(&[PORT, INSIDE]);
}

/// One way into tunnels of [`INSIDE`], by [`OUT`], for frames of at most so many bytes.
struct Narrow(u32);

impl Ways for Narrow {
    fn is_tunnel(&self, port: PortId) -> bool {
        port == INSIDE
    }

    fn way(&self, _: PortId, remote: &Remote) -> Result<Way, String> {
        let underlay = Underlay {
            kind: Kind::Vxlan,
            link: Link { dst: [2; 6], src: [4; 6], vlan: None },
            src: "192.0.2.2".parse().unwrap(),
            ttl: 64,
            port: 4789,
            src_ports: 40000..=40099,
        };
        let outer = Outer::new(&remote.outer(&underlay)?).map_err(|error| error.to_string())?;
        Ok(Way { outer: Arc::new(outer), to: OUT, limit: self.0 })
    }

    fn endpoints(&self, _: &PortRef) -> Option<Arc<[Endpoint]>> {
        None
    }
}

#[test]
fn what_is_too_long_for_a_way_into_a_tunnel_is_the_hosts() {
    let room = FRAME.bytes().len() as u32;
    // The short way is that of a plan that does nothing else.
    for before in ["", "set(eth(src=02:00:00:00:00:09)),"] {
        for (limit, fits) in [(room, true), (room - 1, false), (u32::MAX, true)] {
            let mut bench = Bench::plain();
            bench.ways = Arc::new(Narrow(limit));
            bench.planner.set_ways(bench.ways.clone());
            bench.add_port(INSIDE, 1024);
            let text = format!("{before}set(tunnel(tun_id=0x1,dst=192.0.2.77,ttl=64,flags(df|key))),inside");
            let actions = odp::parse_actions(&text, &Names).unwrap();
            let flow = bench.add(PORT, Source::Learned, spec(matches(PORT, 0, &[]), actions)).unwrap();
            for round in 0..3 {
                let fates = bench.burst(&[FRAME.packet(PORT), FRAME.packet(PORT)]);
                for fate in fates {
                    match fate {
                        Fate::Sent(sent) => assert!(fits && sent[0].head.len() == 50 + room as usize),
                        fate => {
                            assert!(!fits && fate == Fate::Upcall(Upcall::Punt(flow)), "{fate:?}, {round}")
                        }
                    }
                }
            }
            let hits = paths(&bench, PORT);
            assert_eq!((hits.l1_hits + hits.l2_hits, hits.punts), if fits { (6, 0) } else { (0, 6) });
            bench.finish(&[PORT, INSIDE]);
        }
    }
}

#[test]
fn keys_of_ipv6_in_ipv6_fit_in_l1() {
    let (mut bench, ..) = overlay();
    let v6 = (Field::EthType, ETH_P_IPV6 as u128, None);
    let address = |last: u8| u128::from_be_bytes([0xfd; 16]) & !0xff | last as u128;
    let mut outer = udp_to(4789);
    outer[0] = v6;
    bench.add(PORT, Source::Learned, spec(matches(PORT, 0, &outer), pop())).unwrap();
    let fields = [
        (Field::TunId, 5, None),
        (Field::TunIpv6Src, address(1), None),
        (Field::TunIpv6Dst, address(0xaa), None),
        (Field::TunFlags, TUN_KEY as u128, None),
        (Field::EthSrc, 0x0200_0000_0063, None),
        (Field::EthDst, 0x0200_0000_0001, None),
        v6,
        (Field::IpFrag, 0, None),
        (Field::IpProto, ipproto::UDP as u128, None),
        (Field::Ipv6Src, address(9), None),
        (Field::Ipv6Dst, address(1), None),
        (Field::TpDst, 53, None),
    ];
    bench.add(INSIDE, Source::Learned, spec(matches(INSIDE, 0, &fields), vec![output(OUT)])).unwrap();
    let inner = FrameSpec { eth_type: ETH_P_IPV6, ..FRAME };
    let outer = OuterFrame { id: 5, v6: true, ..OUTER };
    for _ in 0..3 {
        let fates = bench.burst(&[outer.packet(PORT, &inner)]);
        assert!(matches!(fates[..], [Fate::Sent(_)]), "{fates:?}");
    }
    assert_eq!((paths(&bench, INSIDE).l2_hits, paths(&bench, INSIDE).l1_hits), (1, 2));
    // The other end is another one to L1 too.
    let other = OuterFrame { src: 2, ..outer };
    assert_eq!(bench.burst(&[other.packet(PORT, &inner)]), [Fate::Upcall(Upcall::Miss)]);
    bench.finish(&[PORT, INSIDE]);
}

/// What differs between the packets of one tunnel, in the order in which each is new and known again.
#[test]
fn what_one_tunnels_packets_differ_in_is_seen_by_flows() {
    let mut bench = Bench::plain();
    bench.ways = Arc::new(Ends);
    bench.planner.set_ways(bench.ways.clone());
    bench.add_port(INSIDE, 1024);
    bench.add(PORT, Source::Learned, spec(matches(PORT, 0, &udp_to(6081)), pop())).unwrap();
    let outer = OuterFrame { kind: Kind::Geneve, dport: 6081, option: Some(0x10002), ..OUTER };
    let cases = [
        (outer.clone(), [1, 0x10002, 40000], 22),
        (OuterFrame { sport: 40001, ..outer.clone() }, [1, 0x10002, 40001], 24),
        (OuterFrame { option: Some(0x10003), ..outer.clone() }, [1, 0x10003, 40000], 23),
        (OuterFrame { id: 2, ..outer.clone() }, [2, 0x10002, 40000], 25),
        (OuterFrame { option: None, ..outer.clone() }, [1, 0, 40000], 26),
    ];
    let sent = |fates: &[Fate]| -> Vec<u32> {
        let slot = |fate: &Fate| match fate {
            Fate::Sent(sent) => sent[0].port.slot,
            other => panic!("{other:?}"),
        };
        fates.iter().map(slot).collect()
    };
    for sees_port in [false, true] {
        let of = if sees_port { cases.to_vec() } else { vec![cases[0].clone(), cases[2].clone()] };
        for (_, [id, option, sport], to) in &of {
            let options = if *option == 0 { 0 } else { OVN | option };
            let mut fields =
                vec![(Field::TunId, u128::from(*id), None), (Field::TunOptions, options.into(), None)];
            if sees_port {
                fields.push((Field::TunTpSrc, u128::from(*sport), None));
            }
            // Those that see more are asked first.
            let source = if sees_port { Source::Explicit } else { Source::Learned };
            bench.add(INSIDE, source, spec(matches(INSIDE, 0, &fields), vec![output(port(*to, 1))])).unwrap();
        }
        let (packets, expected): (Vec<_>, Vec<_>) =
            of.iter().map(|(outer, _, to)| (outer.packet(PORT, &FRAME), *to)).unzip();
        for (packet, to) in packets.iter().zip(&expected) {
            assert_eq!(sent(&bench.burst(std::slice::from_ref(packet))), [*to]);
        }
        for round in 0..6 {
            let fates = bench.burst(&packets);
            assert_eq!(sent(&fates), expected, "round {round}, source port seen: {sees_port}");
            let all: Vec<_> = packets.iter().zip(&expected).collect();
            for (one, other) in all.iter().flat_map(|one| all.iter().map(move |other| (one, other))) {
                let turns = [one, other, one, other];
                let fates = bench.burst(&turns.map(|(packet, _)| (*packet).clone()));
                assert_eq!(sent(&fates), turns.map(|(_, to)| **to));
            }
        }
        if !sees_port {
            // Another source port is nothing to these flows: L1 knows the packet.
            let before = paths(&bench, INSIDE).l1_hits;
            let other = OuterFrame { sport: 50000, ..outer.clone() }.packet(PORT, &FRAME);
            assert_eq!(sent(&bench.burst(&[packets[0].clone(), other])), [22, 22]);
            assert_eq!(paths(&bench, INSIDE).l1_hits, before + 2);
        }
    }
    bench.finish(&[PORT, INSIDE]);
}

/// Outer frames, most of them right.
fn outer_frame(random: &mut Gen, inner: &[u8]) -> Vec<u8> {
    let kind = random.pick(&[Kind::Vxlan, Kind::Vxlan, Kind::Geneve, Kind::Gre]);
    let outer = OuterFrame {
        kind,
        tag: random.pick(&[None, None, Some(5)]),
        src: random.pick(&[1, 2]),
        tos: random.pick(&[0, 0, 1, 3]),
        sport: random.pick(&[40000, 40001]),
        dport: if kind == Kind::Vxlan { 4789 } else { 6081 },
        id: random.pick(&[1, 2, 3]),
        option: random.pick(&[None, Some(0x10002), Some(0x10003)]),
        v6: random.chance(25),
        padding: random.pick(&[0, 0, 0, 5]),
    };
    let mut frame = outer.around(inner);
    for _ in 0..random.pick(&[0, 0, 0, 1, 2]) {
        let at = random.below(frame.len().min(90) as u32) as usize;
        frame[at] ^= 1 << random.below(8);
    }
    if random.chance(5) {
        frame.truncate(random.below(frame.len() as u32) as usize + 1);
    }
    frame
}

/// One history of a bench with tunnels.
fn tunnelled_history(seed: u64, steps: usize) -> (PathStats, u64) {
    let mut random = Gen(Dice::new(seed));
    let mut bench = Bench::new(2, seed, L1Config { pending_misses: 3, ..l1_config(1024) });
    bench.ways = Arc::new(Ends);
    bench.planner.set_ways(bench.ways.clone());
    let inner: Vec<_> = (0..6).map(|_| random.frame()).collect();
    let ports = [port(0, 1), port(1, 1), INSIDE];
    ports.iter().for_each(|&id| bench.add_port(id, 1024));
    let mut frames: Vec<_> = (0..4).map(|i| inner[i].bytes()).collect();
    for _ in 0..30 {
        let mut inside = inner[random.below(6) as usize].bytes();
        inside[15] |= random.pick(&[0, 0, 1, 2]);
        if random.chance(10) {
            inside = outer_frame(&mut random, &inside);
        }
        frames.push(outer_frame(&mut random, &inside));
    }
    let mut packets_in = 0;
    for _ in 0..steps {
        bench.now += random.below(40) as u64;
        let id = random.pick(&ports);
        match random.below(100) {
            0..15 if id != INSIDE => {
                let mut fields = vec![(Field::IpFrag, 0, None)];
                let v6 = random.chance(25);
                fields.push((Field::EthType, if v6 { ETH_P_IPV6 } else { ETH_P_IP } as u128, None));
                if random.chance(70) {
                    let proto = random.pick(&[ipproto::UDP, ipproto::UDP, ipproto::GRE]);
                    fields.push((Field::IpProto, proto as u128, None));
                    if proto == ipproto::UDP && random.chance(70) {
                        fields.push((Field::TpDst, random.pick(&[4789, 6081]), None));
                    }
                }
                if random.chance(40) {
                    let tag = random.chance(50);
                    fields.push((Field::VlanTpid, if tag { ETH_P_8021Q as u128 } else { 0 }, None));
                    fields.push((Field::VlanTci, if tag { (VLAN_PRESENT | 5) as u128 } else { 0 }, None));
                }
                if random.chance(30) {
                    fields.push((Field::EthSrc, 0x0200_0000_0000 + random.pick(&[1u128, 2]), None));
                }
                if random.chance(20) {
                    fields.push((Field::IpTos, random.pick(&[0, 3]), None));
                }
                let mut actions = match random.below(10) {
                    0 => vec![Action::Output(PortRef::Foreign("br-ex".into()))],
                    1 => vec![output(port(random.below(2), 1))],
                    2 => vec![Action::TnlPop(PortRef::Ours(INSIDE)), output(port(1, 1))],
                    _ => pop(),
                };
                if random.chance(30) {
                    actions.insert(0, Action::PopVlan);
                }
                let source = random.pick(&[Source::Explicit, Source::Learned, Source::Learned]);
                let _ = bench.add(id, source, spec(matches(id, 0, &fields), actions));
            }
            0..35 => {
                let mut m = random.matches(INSIDE, &inner);
                if random.chance(60) {
                    m.key.set(Field::TunId, random.pick(&[1, 2]));
                    m.mask.set_exact(Field::TunId);
                }
                if random.chance(30) {
                    m.key.set(Field::TunIpv4Src, random.pick(&[0, 0xc000_0265]));
                    m.mask.set_exact(Field::TunIpv4Src);
                }
                if random.chance(10) {
                    m.key.set(Field::TunTos, random.pick(&[0, 3]));
                    m.mask.set_exact(Field::TunTos);
                }
                if random.chance(8) {
                    m.key.set(Field::TunTpSrc, random.pick(&[40000, 40001]));
                    m.mask.set_exact(Field::TunTpSrc);
                }
                if random.chance(8) {
                    let options = random.pick(&[0, OVN | 0x10002, OVN | 0x10003]);
                    m.key.set(Field::TunOptions, options.into());
                    m.mask.set_exact(Field::TunOptions);
                }
                let actions = if random.chance(5) { pop() } else { random.actions(&m, 0) };
                let _ = bench.add(INSIDE, Source::Learned, spec(m, actions));
            }
            35..40 if !bench.twin.flows.is_empty() => {
                let at = random.below(bench.twin.flows.len() as u32) as usize;
                bench.remove(bench.twin.flows[at].flow);
            }
            40..44 if !bench.twin.flows.is_empty() => {
                let at = random.below(bench.twin.flows.len() as u32) as usize;
                let old = &bench.twin.flows[at];
                let (flow, port) = (old.flow, old.port);
                let actions = if port == INSIDE { random.actions(&old.spec.matches, 0) } else { pop() };
                bench.replace(flow, actions);
            }
            44 => {
                let updates = bench.planner.shrink_union(id).unwrap();
                bench.apply(updates);
            }
            45..50 => bench.switches.iter_mut().for_each(|switch| drop(switch.step())),
            _ => {
                let id = random.pick(&ports[..2]);
                let n = 1 + random.below(BURST as u32);
                let packets: Vec<_> = (0..n)
                    .map(|_| Packet::from_frame(id, &frames[random.below(frames.len() as u32) as usize]))
                    .collect();
                bench.burst(&packets);
                packets_in += packets.len() as u64;
            }
        }
    }
    let popped = bench.popped;
    let total = bench.finish(&ports);
    assert_eq!(super::packets(&total), packets_in, "every packet is counted once");
    (total, popped)
}

#[test]
fn histories_of_tunnels_take_every_path() {
    let totals: Vec<_> = (0..8).map(|seed| tunnelled_history(seed, 400)).collect();
    assert!(totals.iter().map(|(_, popped)| popped).sum::<u64>() > 5000, "{totals:?}");
    let sum = |of: fn(&PathStats) -> u64| totals.iter().map(|(total, _)| of(total)).sum::<u64>();
    let counts = [sum(|t| t.l1_hits), sum(|t| t.l2_hits), sum(|t| t.misses), sum(|t| t.punts)];
    assert!(counts.iter().all(|&count| count > 300), "{totals:?}");
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 48, ..ProptestConfig::default() })]

    #[test]
    fn equals_the_plain_twin_with_tunnels(seed: u64) {
        tunnelled_history(seed, 250);
    }
}
