//! Hot flows in a NIC's tables, with everything but threads and guests.

use super::eligible::Reason;
use super::testing::*;
use super::{Manager, Offloaded, Settings};
use crate::datapath::{Datapath, Mark, PortSettings};
use crate::host::FlowTable;
use crate::ovs::mirror::Settings as AliveSettings;
use crate::ovs::mirror::keepalive::{Ends, KeepAlive};
use crate::port_config::{Mode, Socket};
use crate::quiesce::Quiescence;
use crate::vhost::VhostUserPort;
use crate::worker::rings::Rings;
use nic::model::{Config, smart_nic};
use nic::offload::{CounterKind, OpError, PortMap, Refusal};
use proptest::prelude::*;
use std::sync::Arc;
use std::time::{Duration, Instant};
use switch_core::action::Action;
use switch_core::flow::{FlowRef, FlowSpec, Source};
use switch_core::key::{ETH_P_IP, FRAG_FIRST, FRAG_LATER, FRAG_NONE, Field};
use switch_core::pipeline::Upcall;

fn small(max_rules: u32) -> Config {
    Config { max_rules, timeout: Duration::from_millis(300), ..Config::default() }
}

fn world(max_rules: u32) -> World {
    World::new(small(max_rules), Settings::default())
}

/// A flow from port 1 to an address behind port 2.
fn learned(world: &mut World, to: u8) -> FlowRef {
    world.put(Source::Learned, spec(port(1), to, vec![output(port(2))]))
}

fn is_done(world: &World) -> bool {
    world.marks().iter().all(Mark::is_reached)
}

#[test]
fn a_hot_flow_goes_in_and_is_counted_exactly() {
    let mut world = world(100);
    let (hot, cold) = (learned(&mut world, 1), learned(&mut world, 2));
    world.round();
    assert_eq!(world.stands(hot), Offloaded::No(Reason::Cold));
    world.run(3000, &[(1, 1000.0), (2, 10.0)]);
    assert_eq!((world.bench.rules().len(), world.stands(hot)), (1, Offloaded::Yes));
    assert_eq!(world.stands(cold), Offloaded::No(Reason::Cold));
    // The NIC alone forwards it.
    let by_software = world.by_software;
    world.run(2000, &[(1, 1000.0)]);
    assert_eq!(world.by_software, by_software);
    world.run(300, &[]);
    let (stats, other) = (world.stats(hot), world.stats(cold));
    assert_eq!((stats.packets, stats.bytes), (5000, 5000 * FRAME));
    assert_eq!((other.packets, world.injected), (30, 5030));
    assert!(world.millis - stats.last_used <= 600);
    assert!(!world.estimated(hot));
    // Each frame left once.
    assert_eq!((world.left_by(2), world.left_by(3)), (5030, 0));
    assert!(world.upcalls.is_empty());
    let report = &world.core.report()[0];
    assert_eq!((report.rules, report.max_rules, report.carried.packets), (1, 100, 5030 - world.by_software));
    assert_eq!(report.reasons, [("few packets".to_owned(), 1)].into());
}

#[test]
fn what_is_deleted_or_changed_leaves_before_that_is_answered() {
    let mut world = world(100);
    let flow = learned(&mut world, 1);
    world.run(2000, &[(1, 1000.0)]);
    assert_eq!(world.stands(flow), Offloaded::Yes);
    assert!(is_done(&world));
    // The worker has it, the NIC has not.
    world.bench.stall(true);
    world.delete(flow);
    assert!(world.marks().iter().filter(|mark| mark.is_worker()).all(Mark::is_reached));
    for _ in 0..10 {
        world.round();
        assert!(!is_done(&world), "the rule is still in");
    }
    assert_eq!(world.bench.rules().len(), 1);
    world.bench.stall(false);
    world.round();
    assert!(is_done(&world) && world.bench.rules().is_empty());
    // Other actions: the old ones leave, the new ones go in when the flow has shown itself again. Not a packet is lost.
    let flow = learned(&mut world, 1);
    world.run(2000, &[(1, 1000.0)]);
    assert_eq!(world.stands(flow), Offloaded::Yes);
    world.left_by(2);
    (0..100).for_each(|_| world.inject(1, &frame(1)));
    let changed = world.put(Source::Learned, spec(port(1), 1, vec![output(port(3))]));
    assert!(changed.index == flow.index && !is_done(&world));
    world.round();
    assert!(is_done(&world) && world.bench.rules().is_empty());
    assert_eq!(world.left_by(2), 100);
    world.run(3000, &[(1, 1000.0)]);
    assert_eq!((world.stands(changed), world.left_by(3)), (Offloaded::Yes, 3000));
    world.run(300, &[]);
    assert_eq!(world.stats(changed).packets, 2000 + 100 + 3000, "statistics go on");
    // With its port all goes.
    world.tables().remove_port(port(1));
    world.work();
    world.round();
    assert!(is_done(&world) && world.bench.rules().is_empty());
}

#[test]
fn a_device_that_does_not_let_go_is_reset_within_a_second() {
    let mut world =
        World::new(Config { timeout: Duration::from_secs(100), ..small(100) }, Settings::default());
    let (flow, other) = (learned(&mut world, 1), learned(&mut world, 2));
    world.run(2000, &[(1, 1000.0), (2, 500.0)]);
    world.bench.stall(true);
    world.delete(flow);
    world.run(800, &[]);
    assert!(!is_done(&world));
    world.run(200, &[]);
    assert!(is_done(&world) && world.bench.rules().is_empty());
    assert_eq!(world.core.report()[0].resets, 1);
    world.bench.stall(false);
    world.run(1000, &[(2, 500.0)]);
    assert_eq!(world.stands(other), Offloaded::Yes);
}

#[test]
fn a_full_table_gives_up_the_coldest() {
    let mut world = world(3);
    let flows: Vec<FlowRef> = (0..6).map(|to| learned(&mut world, to)).collect();
    let traffic: Vec<(u8, f64)> = (0..6).map(|to| (to, 400.0 + 200.0 * f64::from(to))).collect();
    world.pass(6000, &traffic, |world| assert!(world.bench.rules().len() <= 3));
    let stands: Vec<Offloaded> = flows.iter().map(|&flow| world.stands(flow)).collect();
    use Offloaded::{Waiting, Yes};
    assert_eq!(stands, [Waiting, Waiting, Waiting, Yes, Yes, Yes]);
    assert_eq!(world.core.report()[0].waiting, 3);
    // The coldest of all is now the hottest.
    let traffic: Vec<(u8, f64)> =
        (0..6).map(|to| (to, if to == 0 { 4000.0 } else { traffic[to as usize].1 })).collect();
    world.pass(6000, &traffic, |world| assert!(world.bench.rules().len() <= 3));
    let stands: Vec<Offloaded> = flows.iter().map(|&flow| world.stands(flow)).collect();
    assert_eq!(stands, [Yes, Waiting, Waiting, Waiting, Yes, Yes]);
    world.run(300, &[]);
    let packets: u64 = flows.iter().map(|&flow| world.stats(flow).packets).sum();
    assert_eq!((packets, world.left_by(2)), (world.injected, world.injected));
}

#[test]
fn a_flow_for_whose_mask_there_is_no_room_waits() {
    let mut world = World::new(Config { max_masks: 1, ..small(100) }, Settings::default());
    let narrow = learned(&mut world, 1);
    world.run(2000, &[(1, 1000.0)]);
    let mut wide = spec(port(1), 0x20, vec![output(port(3))]);
    wide.matches.mask.set(Field::EthDst, 0xf0);
    let wide = world.put(Source::Learned, wide);
    // There is room for rules, but not for another mask: it waits, and the one that is in stays.
    world.run(6000, &[(1, 500.0), (0x21, 600.0)]);
    assert_eq!((world.stands(narrow), world.stands(wide)), (Offloaded::Yes, Offloaded::Waiting));
    assert_eq!((world.left_by(2), world.left_by(3)), (5000, 3600));
    world.delete(narrow);
    world.run(20_000, &[(0x21, 600.0)]);
    assert_eq!((world.stands(wide), world.left_by(3)), (Offloaded::Yes, 12_000));
    world.run(300, &[]);
    assert_eq!(world.stats(wide).packets, world.injected - 5000);
}

#[test]
fn faults_leave_flows_to_software_and_are_overcome() {
    let mut world = world(100);
    let flow = learned(&mut world, 1);
    let traffic = [(1, 1000.0)];
    // Refusals of all kinds, then it is in.
    for error in [OpError::Busy, OpError::NoSpace, OpError::Rejected(22)] {
        world.bench.refuse(error);
    }
    let mut was_rejected = false;
    world.pass(6000, &traffic, |world| {
        was_rejected |= world.stands(flow) == Offloaded::No(Reason::Rejected(22));
    });
    assert!(was_rejected);
    assert_eq!(world.stands(flow), Offloaded::Yes);
    // A reset: software at once, and in again soon.
    world.bench.reset();
    world.round();
    assert_eq!((world.stands(flow), world.core.report()[0].resets), (Offloaded::Waiting, 1));
    let by_software = world.by_software;
    world.run(500, &traffic);
    assert!(world.by_software > by_software && world.stands(flow) == Offloaded::Yes);
    // A lost answer to a removal: the device is reset, and what asked for the removal is answered.
    let other = learned(&mut world, 2);
    world.bench.lose_answers(1);
    world.delete(flow);
    world.run(200, &[(2, 1000.0)]);
    assert!(!is_done(&world));
    world.run(400, &[(2, 1000.0)]);
    assert!(is_done(&world) && world.core.report()[0].resets == 2);
    // A lost answer to an insertion.
    world.bench.reset();
    world.bench.lose_answers(1);
    world.run(5000, &[(2, 1000.0)]);
    assert_eq!((world.stands(other), world.core.report()[0].resets), (Offloaded::Yes, 4));
    // Nothing was lost, and nothing came twice.
    assert_eq!(world.left_by(2), world.injected);
    // A removal that is refused is tried again.
    world.bench.refuse(OpError::Rejected(5));
    world.delete(other);
    world.run(20, &[]);
    assert!(is_done(&world) && world.bench.rules().is_empty() && world.core.report()[0].resets == 4);
}

#[test]
fn why_not_is_said() {
    let mut world = world(100);
    let put = |world: &mut World, spec| {
        let flow = world.put(Source::Learned, spec);
        world.round();
        (world.stands(flow), flow)
    };
    let device = |refusal| Offloaded::No(Reason::Device(refusal));
    let to = |to, actions| spec(port(1), to, actions);
    assert_eq!(put(&mut world, to(1, vec![output(GUEST)])).0, device(Refusal::Port));
    assert_eq!(put(&mut world, to(2, vec![output(port(2)), output(GUEST)])).0, device(Refusal::Port));
    assert_eq!(put(&mut world, spec(GUEST, 2, vec![output(port(2))])).0, device(Refusal::Port));
    assert_eq!(put(&mut world, to(3, vec![Action::Recirc(5)])).0, device(Refusal::Action("recirc")));
    let mut stage = to(4, vec![output(port(2))]);
    stage.matches.key.set(Field::RecircId, 5);
    assert_eq!(put(&mut world, stage).0, Offloaded::No(Reason::Recirculated));
    assert_eq!(put(&mut world, to(5, vec![Action::Meter(1)])).0, Offloaded::No(Reason::Punt));
    let held = FlowSpec { held: Some("policing".into()), ..to(6, vec![output(port(2))]) };
    assert_eq!(put(&mut world, held).0, Offloaded::No(Reason::Punt));
    assert_eq!(
        put(&mut world, to(7, vec![Action::Trunc(20), output(port(2))])).0,
        device(Refusal::Action("trunc"))
    );
    let reasons = world.core.report().remove(0).reasons;
    assert_eq!((reasons["port of another device"], reasons["action recirc"], reasons["punt"]), (2, 1, 2));
    // However hot: they stay where they are.
    let traffic: Vec<(u8, f64)> = (1..=7).map(|to| (to, 200.0)).collect();
    world.run(3000, &traffic);
    assert!(world.bench.rules().is_empty());
    // A smaller MTU at the output, now or later.
    let (stands, flow) = put(&mut world, to(8, vec![output(port(2))]));
    assert_eq!(stands, Offloaded::No(Reason::Cold));
    world.run(2000, &[(8, 1000.0)]);
    assert_eq!(world.stands(flow), Offloaded::Yes);
    world.tables().set_mtu(port(2), 1400);
    world.work();
    world.round();
    assert_eq!((world.stands(flow), world.bench.rules().len()), (Offloaded::No(Reason::Mtu), 0));
    assert!(is_done(&world));
    world.tables().set_mtu(port(2), 9000);
    world.run(2000, &[(8, 1000.0)]);
    assert_eq!(world.stands(flow), Offloaded::Yes);
    // A port that is the NIC's no longer.
    world.set_ports(PortMap::new([(port(1), 1), (port(3), 3)]));
    assert_eq!((world.stands(flow), world.bench.rules().len()), (device(Refusal::Port), 0));
    world.set_ports(PortMap::new([(port(1), 1), (port(2), 2), (port(3), 3)]));
    world.run(2000, &[(8, 1000.0)]);
    assert_eq!(world.stands(flow), Offloaded::Yes);
    let now = world.now();
    world.core.remove_nic("nic0", now);
    assert!(world.bench.rules().is_empty() && is_done(&world));
    world.delete(flow);
    assert!(is_done(&world), "nobody is to follow");
}

#[test]
fn no_flow_is_in_that_an_explicit_one_comes_before() {
    let mut world = world(100);
    let flow = learned(&mut world, 1);
    let traffic = [(1, 1000.0)];
    world.run(2000, &traffic);
    assert_eq!(world.stands(flow), Offloaded::Yes);
    // A wider one, which the device could carry out; the learned one would be hit beside it.
    let mut wide = spec(port(1), 0, vec![output(port(3))]);
    wide.matches.mask.set(Field::EthDst, 0xf0);
    let explicit = world.put(Source::Explicit, wide);
    world.round();
    assert!(is_done(&world) && world.bench.rules().is_empty());
    assert_eq!(world.stands(flow), Offloaded::No(Reason::Overlap));
    world.left_by(2);
    world.run(3000, &traffic);
    assert_eq!((world.stands(explicit), world.left_by(3), world.left_by(2)), (Offloaded::Yes, 3000, 0));
    // It goes, and the other one is what is left.
    world.delete(explicit);
    world.round();
    assert!(is_done(&world) && world.bench.rules().is_empty());
    world.run(3000, &traffic);
    assert_eq!((world.stands(flow), world.left_by(3), world.left_by(2)), (Offloaded::Yes, 0, 3000));
    // One that the host carries out comes before it all the same.
    let punt = world.put(Source::Explicit, spec(port(1), 1, vec![Action::Meter(1)]));
    world.round();
    assert_eq!(
        (world.stands(flow), world.stands(punt)),
        (Offloaded::No(Reason::Overlap), Offloaded::No(Reason::Punt))
    );
    assert!(is_done(&world) && world.bench.rules().is_empty());
    // Of another address: nothing is in the way of it.
    world.delete(punt);
    world.put(Source::Explicit, spec(port(1), 2, vec![output(port(3))]));
    world.run(3000, &traffic);
    assert_eq!(world.stands(flow), Offloaded::Yes);
}

/// An IP flow of a fragment type.
fn ip(to: u8, fragments: u8, out: u32) -> FlowSpec {
    let mut spec = spec(port(1), to, vec![output(port(out))]);
    spec.matches.key.set(Field::EthType, ETH_P_IP.into());
    spec.matches.mask.set_exact(Field::EthType);
    spec.matches.key.set(Field::IpFrag, fragments.into());
    spec.matches.mask.set_exact(Field::IpFrag);
    spec
}

#[test]
fn fragments_are_ignored_only_where_that_is_set_and_harmless() {
    let blind = |settings| {
        World::with(small(100), settings, |flows| {
            let mut card = Coarse::new(flows, CounterKind::PacketsAndBytes);
            card.blind = true;
            Box::new(card)
        })
    };
    let mut strict = blind(Settings::default());
    let flow = strict.put(Source::Learned, ip(1, FRAG_NONE, 2));
    strict.round();
    assert_eq!(strict.stands(flow), Offloaded::No(Reason::Fragments));
    let mut world = blind(Settings { ignore_fragments: true, ..Settings::default() });
    let mut packet = frame(1);
    packet[12..14].copy_from_slice(&ETH_P_IP.to_be_bytes());
    packet[14] = 0x45;
    packet[16..18].copy_from_slice(&46u16.to_be_bytes());
    packet[23] = 0xfd;
    let heat = |world: &mut World, millis| {
        world.pass(millis, &[], |world| (0..5).for_each(|_| world.inject(1, &packet)));
    };
    let flow = world.put(Source::Learned, ip(1, FRAG_NONE, 2));
    heat(&mut world, 2000);
    assert_eq!(world.stands(flow), Offloaded::Yes);
    // Fragments that go the same way do no harm, others do.
    world.put(Source::Learned, ip(1, FRAG_FIRST, 2));
    world.put(Source::Learned, ip(2, FRAG_LATER, 3));
    world.round();
    assert_eq!(world.stands(flow), Offloaded::Yes);
    let other = world.put(Source::Learned, ip(1, FRAG_LATER, 3));
    world.round();
    assert!(is_done(&world) && world.bench.rules().is_empty());
    assert_eq!(world.stands(flow), Offloaded::No(Reason::OtherFragments));
    heat(&mut world, 2000);
    assert!(world.bench.rules().is_empty());
    world.delete(other);
    heat(&mut world, 2000);
    assert_eq!(world.stands(flow), Offloaded::Yes);
    // A flow that reads more of the packet is not one of those.
    let mut reader = ip(3, FRAG_NONE, 2);
    reader.matches.mask.set_exact(Field::IpTos);
    let reader = world.put(Source::Learned, reader);
    world.round();
    assert_eq!(world.stands(reader), Offloaded::No(Reason::Fragments));
}

/// The mirror's keep-alive beside the manager. Gives when packets went to the host, in order.
fn with_keepalive(
    world: &mut World,
    flow: FlowRef,
    max_idle: u64,
    millis: u64,
    traffic: &[(u8, f64)],
) -> Vec<u64> {
    let mut alive = KeepAlive::new(AliveSettings { max_idle, ..AliveSettings::default() });
    let (ends, counters) = {
        let tables = world.tables();
        let record = tables.get(flow).unwrap();
        (Ends::of(&record.spec), record.counters.clone())
    };
    alive.add(flow, ends, &counters, world.millis);
    let (mut seen, mut times) = (world.upcalls.len(), Vec::new());
    world.pass(millis, traffic, |world| {
        if world.millis.is_multiple_of(10) {
            alive.turn(world.millis);
        }
        for why in &world.upcalls[seen..] {
            assert_eq!(*why, Upcall::KeepAlive(flow));
            times.push(world.millis);
        }
        seen = world.upcalls.len();
    });
    times
}

#[test]
fn a_flow_in_hardware_is_seen_alive_once_in_a_third_of_max_idle() {
    let mut world = world(100);
    let flow = learned(&mut world, 1);
    world.run(2000, &[(1, 1000.0)]);
    let (before, injected) = (world.by_software, world.injected);
    let times = with_keepalive(&mut world, flow, 3000, 30_000, &[(1, 1000.0)]);
    // A third is a second; the first look finds the packets of before.
    assert!((27..=31).contains(&times.len()), "{}: {times:?}", times.len());
    assert!(times.windows(2).all(|pair| (700..=1600).contains(&(pair[1] - pair[0]))), "{times:?}");
    assert_eq!(world.stands(flow), Offloaded::Yes);
    // All but a few hundredths went by the NIC, each packet left once or was the keep-alive.
    let software = world.by_software - before;
    assert!(software < (world.injected - injected) / 50, "{software} by software");
    world.run(300, &[]);
    let kept = times.len() as u64;
    assert_eq!(world.stats(flow).packets, world.injected);
    assert_eq!(world.left_by(2), world.injected - kept);
}

#[test]
fn an_idle_flow_stays_out_after_its_detour_and_is_seen_when_it_comes_back() {
    let mut world = world(100);
    let flow = learned(&mut world, 1);
    world.run(2000, &[(1, 1000.0)]);
    let mark = |world: &World| world.tables().get(flow).unwrap().counters.last().unwrap().clone();
    assert!(mark(&world).set_due());
    world.run(1000, &[]);
    assert_eq!((world.stands(flow), world.bench.rules().len()), (Offloaded::Yes, 0), "a detour");
    world.run(2000, &[]);
    assert_eq!(world.stands(flow), Offloaded::No(Reason::Cold));
    assert!(mark(&world).is_due());
    world.inject(1, &frame(1));
    assert_eq!(world.upcalls, [Upcall::KeepAlive(flow)]);
    world.run(500, &[]);
    assert!(!mark(&world).is_due());
    // And hot again.
    world.run(3000, &[(1, 1000.0)]);
    assert_eq!((world.stands(flow), world.upcalls.len()), (Offloaded::Yes, 1));
}

#[test]
fn a_device_that_does_not_count_is_believed_for_a_lease() {
    let mut world =
        World::with(small(100), Settings::default(), |flows| Box::new(Coarse::new(flows, CounterKind::None)));
    let flow = learned(&mut world, 1);
    world.run(2000, &[(1, 1000.0)]);
    assert_eq!((world.stands(flow), world.estimated(flow)), (Offloaded::Yes, true));
    world.run(6000, &[(1, 1000.0)]);
    let packets = world.stats(flow).packets as f64;
    assert!((packets - world.injected as f64).abs() < world.injected as f64 * 0.1, "{packets}");
    let report = &world.core.report()[0];
    assert!(report.estimated && report.carried.packets > 0);
    // The lease ends; it comes back hot, or it does not.
    let mut was_out = false;
    world.pass(5000, &[(1, 1000.0)], |world| was_out |= world.bench.rules().is_empty());
    assert!(was_out && world.stands(flow) == Offloaded::Yes);
    world.run(11_000, &[]);
    assert!(world.bench.rules().is_empty());
    assert_eq!(world.stands(flow), Offloaded::No(Reason::Cold));
    // Under Open vSwitch each keep-alive shows that it is used.
    world.run(3000, &[(1, 1000.0)]);
    assert_eq!(world.stands(flow), Offloaded::Yes);
    let times = with_keepalive(&mut world, flow, 10_000, 25_000, &[(1, 1000.0)]);
    assert!((6..=9).contains(&times.len()), "{times:?}");
}

#[test]
fn a_device_that_does_not_count_is_believed_what_detours_show() {
    let mut world =
        World::with(small(100), Settings::default(), |flows| Box::new(Coarse::new(flows, CounterKind::None)));
    let flow = learned(&mut world, 1);
    world.run(2000, &[(1, 100.0)]);
    assert_eq!(world.stands(flow), Offloaded::Yes);
    // It goes in before it is what it will be, and changes again.
    for rate in [1000.0, 200.0, 600.0] {
        with_keepalive(&mut world, flow, 3000, 10_000, &[(1, rate)]);
        let (before, injected) = (world.stats(flow).packets, world.injected);
        with_keepalive(&mut world, flow, 3000, 10_000, &[(1, rate)]);
        let (believed, came) =
            ((world.stats(flow).packets - before) as f64, (world.injected - injected) as f64);
        assert!((believed / came - 1.0).abs() < 0.1, "{believed} of {came} at {rate} a second");
        assert_eq!((world.stands(flow), world.estimated(flow)), (Offloaded::Yes, true));
    }
}

#[test]
fn a_device_that_tells_use_alone_needs_no_lease() {
    let mut world = World::with(small(100), Settings::default(), |flows| {
        Box::new(Coarse::new(flows, CounterKind::Activity))
    });
    let flow = learned(&mut world, 1);
    world.run(2000, &[(1, 1000.0)]);
    let mut was_out = false;
    world.pass(25_000, &[(1, 1000.0)], |world| was_out |= world.bench.rules().is_empty());
    assert!(!was_out && world.estimated(flow));
    // Idle: nothing is made up any more.
    world.run(600, &[]);
    let idle = world.stats(flow).packets;
    world.run(20_000, &[]);
    assert_eq!(world.stats(flow).packets, idle);
    let error = (idle as f64 - world.injected as f64).abs() / world.injected as f64;
    assert!(error < 0.1, "{idle} of {}", world.injected);
}

#[test]
fn rules_that_age_in_the_device_are_counted_to_the_end() {
    let ageing = Some(Duration::from_secs(3));
    let mut world = World::new(Config { ageing, ..small(100) }, Settings::default());
    let flow = learned(&mut world, 1);
    world.run(2000, &[(1, 1000.0)]);
    assert_eq!(world.bench.rules().len(), 1);
    world.run(4000, &[]);
    assert_eq!((world.bench.rules().len(), world.stats(flow).packets), (0, 2000));
    assert_eq!(world.stands(flow), Offloaded::No(Reason::Cold));
}

#[test]
fn a_device_that_counts_packets_alone_has_exact_packets() {
    let mut world = World::with(small(100), Settings::default(), |flows| {
        Box::new(Coarse::new(flows, CounterKind::Packets))
    });
    let flow = learned(&mut world, 1);
    world.run(4000, &[(1, 1000.0)]);
    world.run(300, &[]);
    let stats = world.stats(flow);
    assert_eq!((stats.packets, world.estimated(flow)), (4000, true));
    assert!(stats.bytes.abs_diff(4000 * FRAME) <= 16 * FRAME, "{}", stats.bytes);
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(24))]

    /// Flows come, change and go, explicit ones over learned ones, while the device fails in every way: each packet leaves exactly
    /// once, and by the port that the tables say.
    #[test]
    fn whatever_happens_the_tables_are_obeyed(
        steps in prop::collection::vec((0..12u8, 0..4u8, 2..4u32), 20..60),
        max_rules in 1..4u32,
    ) {
        let mut world = World::new(small(max_rules), Settings::default());
        // What address goes where: by the explicit flow, else by the learned one.
        let mut known: [[Option<(FlowRef, u32)>; 2]; 4] = Default::default();
        let traffic: Vec<(u8, f64)> = (0..4).map(|to| (to, 400.0)).collect();
        for (what, to, out) in steps {
            let put = |world: &mut World, source, known: &mut Option<(FlowRef, u32)>| {
                let flow = world.put(source, spec(port(1), to, vec![output(port(out))]));
                *known = Some((flow, out));
            };
            let [explicit, learned] = &mut known[to as usize];
            match what {
                0..=2 => put(&mut world, Source::Learned, learned),
                3 => put(&mut world, Source::Explicit, explicit),
                4 | 5 => [explicit, learned].into_iter().skip(what as usize - 4).take(1).for_each(|known| {
                    known.take().into_iter().for_each(|(flow, _)| world.delete(flow));
                }),
                6 => world.bench.reset(),
                7 => world.bench.lose_answers(1),
                8 => world.bench.refuse(OpError::NoSpace),
                9 => world.bench.refuse(OpError::Rejected(9)),
                _ => {}
            }
            // As whoever made the change waits.
            let mut rounds = 0;
            while !is_done(&world) {
                world.millis += 5;
                world.round();
                rounds += 1;
                prop_assert!(rounds < 300, "it takes longer than a second and a half");
            }
            for to in 0..4u8 {
                for number in 1..=3 {
                    world.left_by(number);
                }
                (0..3).for_each(|_| world.inject(1, &frame(to)));
                let [explicit, learned] = &known[to as usize];
                let wanted = explicit.or(*learned).map(|(_, out)| out);
                for number in 1..=3 {
                    let count = if wanted == Some(number) { 3 } else { 0 };
                    prop_assert_eq!(world.left_by(number), count, "address {} by port {}", to, number);
                }
            }
            world.run(600, &traffic);
            prop_assert!(world.bench.rules().len() <= max_rules as usize);
        }
    }
}

#[test]
fn the_thread_follows_and_leaves_nothing_behind() {
    let (mut datapath, _ends) = Datapath::start(&[], 1024, 8).unwrap();
    let manager = Manager::start(datapath.flows.clone()).unwrap();
    assert!(Manager::start(datapath.flows.clone()).is_ok(), "as long as there are no flows");
    drop(manager);
    let manager = Manager::start(datapath.flows.clone()).unwrap();
    let socket = Socket { mode: Mode::Client, ..Socket::new("/nowhere") };
    let vhost =
        VhostUserPort::new("p", 1, socket, None, Arc::new(Quiescence::new()), Box::new(|_| {})).unwrap();
    let rings = Rings::Guest(vhost.shared().clone());
    let ids: Vec<_> = (0..2).map(|_| datapath.reserve_slot().unwrap()).collect();
    for &id in &ids {
        let settings = PortSettings { name: "p", polled_by: &[0], mtu: 1500, max_masks: 16, miss_rate: 100 };
        datapath.add_port(id, &rings, settings).unwrap();
    }
    let (_ports, card, bench) = smart_nic(small(10));
    manager.add_nic("nic0", Box::new(card), Settings::default());
    let answer = manager.set_ports("nic0", PortMap::new([(ids[0], 1), (ids[1], 2)]));
    answer.recv_timeout(Duration::from_secs(20)).unwrap();
    let lock = || datapath.flows.lock().unwrap();
    let mut matches = spec(port(1), 1, Vec::new());
    matches.matches.key.set(Field::InPort, ids[0].slot.into());
    let flow = lock().put(Source::Learned, FlowSpec { actions: vec![output(ids[1])], ..matches }).unwrap();
    // A worker counts, until it is in.
    let counters = lock().get(flow).unwrap().counters.clone();
    wait("the flow to go in", || {
        counters[0].slot().into_iter().for_each(|slot| slot.add(50, 3000, 1));
        !bench.rules().is_empty()
    });
    wait("the manager to know", || manager.flows().get(flow).0 == Offloaded::Yes);
    let before = lock().get(flow).unwrap().stats().packets;
    (0..10).for_each(|_| bench.inject(1, &frame(1), Instant::now()));
    wait("the counters", || lock().get(flow).unwrap().stats().packets == before + 10);
    assert_eq!(manager.nics()[0].carried.packets, 10);
    assert!(Manager::start(datapath.flows.clone()).is_err());
    // Who deletes it is answered when it is out.
    bench.stall(true);
    lock().delete(flow);
    let marks = lock().marks();
    assert_eq!(marks.len(), 2);
    wait("the worker", || marks[0].is_reached());
    assert!(!marks[1].is_reached() && !bench.rules().is_empty());
    bench.stall(false);
    wait("the NIC", || marks[1].is_reached());
    assert!(bench.rules().is_empty());
    // With the manager all goes.
    let mut matches = spec(port(1), 2, Vec::new());
    matches.matches.key.set(Field::InPort, ids[0].slot.into());
    let flow = lock().put(Source::Learned, FlowSpec { actions: vec![output(ids[1])], ..matches }).unwrap();
    let counters = lock().get(flow).unwrap().counters.clone();
    wait("the flow to go in", || {
        counters[0].slot().into_iter().for_each(|slot| slot.add(50, 3000, 1));
        !bench.rules().is_empty()
    });
    drop(manager);
    assert!(bench.rules().is_empty());
    lock().delete(flow);
    assert!(lock().marks()[1].is_reached());
    datapath.stop();
}

/// Whoever opens NICs may tell it from any thread.
const _: fn() = || {
    fn shared<T: Send + Sync>() {}
    shared::<Manager>();
};

/// Waits for a condition, for as long as a busy machine may take.
fn wait(what: &str, is_so: impl Fn() -> bool) {
    let start = Instant::now();
    while !is_so() {
        assert!(start.elapsed() < Duration::from_secs(30), "{what} took too long");
        std::thread::sleep(Duration::from_millis(5));
    }
}
