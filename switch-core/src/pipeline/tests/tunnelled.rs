//! Packets that came by a tunnel: flows match the outer header too, in L2 as in L1.

use super::*;
use crate::key::{TUN_CSUM, TUN_KEY};
use crate::odp;
use crate::tunnel::{Gbp, TunnelKey};

struct Names;

impl crate::flow::PortNames for Names {
    fn by_name(&self, name: &str) -> Option<PortId> {
        (name == "geneve").then_some(PORT)
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
    switch.process_tunnelled(1, &mut packets.to_vec(), tunnels, &mut sink);
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
