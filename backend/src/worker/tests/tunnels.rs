//! Packets that come by a tunnel, on rings.

use super::*;
use switch_core::action::{Action, PortRef};
use switch_core::checksum;
use switch_core::compile::{Way, Ways};
use switch_core::flow::{Match, Source};
use switch_core::key::{ETH_P_IP, Field, ipproto};
use switch_core::l1::L1Config;
use switch_core::pipeline::{Switch, SwitchConfig};
use switch_core::planner::{IfExists, Planner, PlannerConfig};
use switch_core::tunnel::{Endpoint, Kind, Remote, Vlan};

/// The tunnel's port, which has no rings.
const INSIDE: PortId = PortId { slot: 3, generation: 1 };
/// Where the UDP header of the tests' packets begins.
const UDP: usize = 34;

struct Vxlan;

impl Ways for Vxlan {
    fn is_tunnel(&self, port: PortId) -> bool {
        port == INSIDE
    }

    fn way(&self, _: PortId, _: &Remote) -> Result<Way, String> {
        Err("nowhere".into())
    }

    fn endpoints(&self, port: &PortRef) -> Option<Arc<[Endpoint]>> {
        let end = Endpoint {
            mac: None,
            vlan: Vlan::Untagged,
            local: None,
            kind: Kind::Vxlan,
            port: 4789,
            gbp: false,
            df: false,
            as_linux: true,
            in_port: INSIDE,
        };
        (*port == PortRef::Ours(INSIDE)).then(|| [end].into())
    }
}

/// A switch in which A is an uplink: packets out of VXLAN 1 leave by B.
fn overlay() -> Switch {
    let l1 = L1Config { capacity: 64, ports: 4, pending_ticks: 10, pending_misses: 64, age_ticks: 10 };
    let mut switch = Switch::new(SwitchConfig { l1, flows: 8, seed: 1 });
    let config = PlannerConfig { ports: 4, flows: 8, masks: 4, seed: 1 };
    let mut planner = Planner::new(config, vec![switch.slots().clone()]);
    planner.set_ways(Arc::new(Vxlan));
    let outer = [
        (Field::EthType, ETH_P_IP.into()),
        (Field::IpProto, ipproto::UDP.into()),
        (Field::IpFrag, 0),
        (Field::TpDst, 4789),
    ];
    let inner = [(Field::TunId, 1)];
    let flows: [(_, &[(Field, u128)], _); 2] = [
        (A, &outer, Action::TnlPop(PortRef::Ours(INSIDE))),
        (INSIDE, &inner, Action::Output(PortRef::Ours(B))),
    ];
    for (port, fields, action) in flows {
        let mut matches = Match::default();
        for &(field, value) in fields.iter().chain(&[(Field::InPort, port.slot.into()), (Field::RecircId, 0)])
        {
            matches.key.set(field, value);
            matches.mask.set_exact(field);
        }
        let spec = FlowSpec { matches, actions: vec![action], ufid: None, held: None };
        let (updates, _) = planner.add_port(port, 64).unwrap();
        updates.into_iter().for_each(|update| drop(switch.apply(update)));
        let (_, updates) = planner.add(port, Source::Learned, spec, IfExists::Refuse).unwrap();
        updates.into_iter().for_each(|update| drop(switch.apply(update)));
    }
    switch
}

/// An inner frame inside VXLAN `vni`; with `summed` UDP has a checksum.
fn vxlan(inner: &[u8], vni: u32, summed: bool) -> Vec<u8> {
    let len = (16 + inner.len()) as u16;
    let mut frame = vec![2, 0, 0, 0, 0, 9, 2, 0, 0, 0, 0, 8, 8, 0, 0x45, 0];
    frame.extend((20 + len).to_be_bytes());
    frame.extend([0, 1, 0, 0, 64, 17, 0, 0, 192, 0, 2, 1, 192, 0, 2, 2]);
    let sum = checksum::checksum(&frame[14..]);
    frame[24..26].copy_from_slice(&sum.to_be_bytes());
    frame.extend([[0x9c, 0x40], 4789u16.to_be_bytes(), len.to_be_bytes(), [0; 2]].concat());
    frame.extend([[8, 0, 0, 0], (vni << 8).to_be_bytes()].concat());
    frame.extend(inner);
    if summed {
        let pseudo = checksum::add(u64::from(ipproto::UDP) + u64::from(len), &frame[26..34]);
        let sum = !checksum::fold(checksum::add(pseudo, &frame[UDP..]));
        frame[UDP + 6..UDP + 8].copy_from_slice(&sum.to_be_bytes());
    }
    frame
}

/// An inner frame with so long a payload, which counts up.
fn inner(len: usize) -> Vec<u8> {
    let (_, mut frame) = udp(0);
    frame.truncate(42);
    frame.extend((0..len).map(|i| i as u8));
    frame[16..18].copy_from_slice(&(28 + len as u16).to_be_bytes());
    frame[38..40].copy_from_slice(&(8 + len as u16).to_be_bytes());
    frame
}

impl Bench {
    /// Has A send these frames as one burst through the switch.
    fn carry(&mut self, switch: &mut Switch, frames: &[(NetHeader, Vec<u8>)]) {
        let (mut ring, mut burst, mut packets) = sent(frames);
        let mut egress = BurstEgress::new(&mut self.io, &mut self.jobs, &burst, &packets, (0, 0), true);
        switch.process(1, &mut packets, &mut egress);
        egress.finish(&packets);
        ring.complete(&mut burst);
        self.io.notify_guests();
    }

    /// What has gone to the host: offload state, and the frame.
    fn at_host(&mut self) -> Vec<(Budget, bool, Vec<u8>)> {
        let mut frames = Vec::new();
        while let Ok(mut held) = self.up.pop() {
            let packet = &held.packet;
            assert_eq!(packet.in_port, A, "the port that it came by");
            let frame = [packet.head(), &held.tail[..packet.tail_len() as usize]].concat();
            frames.push((held.budget, packet.offload.needs_csum, frame));
            held.answer = Some(Decision::Taken);
            self.io.host_answer(held, &mut Scratch::default());
        }
        frames
    }

    /// Packets of A that were forwarded, went to the host, and were dropped.
    fn of_a(&mut self) -> (u64, u64, u64) {
        let counters = self.io.port(A).unwrap().counters.clone();
        let mut drops = [0; DropReason::COUNT];
        counters.rx_drops.sum_into(&mut drops);
        (counters.rx_forwarded.get(), counters.rx_to_host.get(), drops.iter().sum())
    }
}

fn bare(frame: Vec<u8>) -> (NetHeader, Vec<u8>) {
    (NetHeader::default(), frame)
}

#[test]
fn what_was_inside_a_tunnel_leaves_by_its_port() {
    let (mut bench, mut guest, mut switch) = (Bench::new(), Guest::new(PLAIN), overlay());
    bench.port(A, None);
    bench.port(B, Some(&guest));
    guest.offer(64);
    // Whole in the head or not, with a checksum or not.
    let sent: Vec<_> = [20, 100, 140, 141, 600, 1400].map(inner).into();
    for round in 1..4 {
        let frames: Vec<_> =
            sent.iter().flat_map(|inner| [false, true].map(|summed| bare(vxlan(inner, 1, summed)))).collect();
        bench.carry(&mut switch, &frames);
        let received: Vec<_> = guest.received().into_iter().map(|(_, frame)| frame).collect();
        let expected: Vec<_> = sent.iter().flat_map(|inner| [inner.clone(), inner.clone()]).collect();
        assert_eq!(received, expected);
        assert_eq!(bench.of_a(), (12 * round, 0, 0));
    }
    // Padding of the outer frame is none of the inner one's.
    let mut padded = vxlan(&inner(20), 1, true);
    padded.extend([0xee; 7]);
    bench.carry(&mut switch, &[bare(padded)]);
    assert_eq!(guest.received()[0].1, inner(20));
    // A checksum that is still to be completed is that of the outer header, and worth nothing inside.
    let mut open = vxlan(&inner(300), 1, false);
    open[UDP + 6] = 1;
    let header = NetHeader {
        flags: NetHeader::NEEDS_CSUM,
        csum_start: UDP as u16,
        csum_offset: 6,
        ..NetHeader::default()
    };
    bench.carry(&mut switch, &[(header, open)]);
    let [(header, frame)] = &guest.received()[..] else { panic!("one frame") };
    assert_eq!((header.flags, frame), (0, &inner(300)));
    bench.check();
}

#[test]
fn the_host_gets_the_outer_packet_byte_for_byte() {
    let (mut bench, mut guest, mut switch) = (Bench::new(), Guest::new(PLAIN), overlay());
    bench.port(A, None);
    bench.port(B, Some(&guest));
    guest.offer(8);
    // So that the port is looked at.
    bench.carry(&mut switch, &[bare(vxlan(&inner(20), 1, false))]);
    assert_eq!(guest.received().len(), 1);
    // Another tunnel, whatever the length; and padding.
    let mut frames: Vec<_> = [20, 141, 1400].map(|len| vxlan(&inner(len), 2, len > 100)).into();
    let mut padded = vxlan(&inner(20), 2, false);
    padded.extend([0xee; 7]);
    frames.push(padded);
    bench.carry(&mut switch, &frames.iter().cloned().map(bare).collect::<Vec<_>>());
    let expected: Vec<_> = frames.iter().map(|frame| (Budget::Miss, false, frame.clone())).collect();
    assert_eq!(bench.at_host(), expected);
    // A wrong checksum, in the head or behind it: the flow is not carried out for such a packet.
    let wrong: Vec<_> = [20, 1400]
        .map(|len| {
            let mut frame = vxlan(&inner(len), 1, true);
            *frame.last_mut().unwrap() ^= 1;
            frame
        })
        .into();
    bench.carry(&mut switch, &wrong.iter().cloned().map(bare).collect::<Vec<_>>());
    let expected: Vec<_> = wrong.iter().map(|frame| (Budget::Punt, false, frame.clone())).collect();
    assert_eq!(bench.at_host(), expected);
    // What was left to do for the outer packet is still to be done.
    let header = NetHeader {
        flags: NetHeader::NEEDS_CSUM,
        csum_start: UDP as u16,
        csum_offset: 6,
        ..NetHeader::default()
    };
    let mut open = vxlan(&inner(20), 2, false);
    open[UDP + 7] = 9;
    bench.carry(&mut switch, &[(header, open.clone())]);
    assert_eq!(bench.at_host(), [(Budget::Miss, true, open)]);
    assert_eq!(bench.of_a(), (1, 7, 0));
    assert!(guest.received().is_empty());
    bench.check();
}

#[test]
fn what_cannot_leave_is_counted_where_it_came_in() {
    let (mut bench, mut switch) = (Bench::new(), overlay());
    bench.port(A, None);
    let frame = || bare(vxlan(&inner(20), 1, false));
    // There is no port B. And then there is one without a guest.
    bench.carry(&mut switch, &[frame(), frame()]);
    assert_eq!(bench.sent(A, DropReason::NoPort), (0, 2));
    bench.port(B, None);
    bench.carry(&mut switch, &[frame(), frame()]);
    assert_eq!(bench.sent(B, DropReason::LinkDown), (0, 2));
    // What is inside is no frame.
    bench.carry(&mut switch, &[bare(vxlan(&inner(20)[..14], 1, false))]);
    assert_eq!(bench.of_a(), (4, 1, 0));
    assert_eq!(bench.at_host().len(), 1);
    bench.check();
}
