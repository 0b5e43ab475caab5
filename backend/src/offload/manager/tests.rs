use super::*;
use crate::datapath::Mark;
use crate::offload::testing::{Coarse, World, frame, output, port, spec};
use nic::model::{Config, smart_nic};
use nic::offload::CounterKind;
use std::sync::mpsc::{Receiver, channel};
use switch_core::flow::{FlowRef, FlowSpec, Source};
use switch_core::key::Field;

/// A flow from port 1 to port 2 in a NIC that does nothing from now on.
fn stalled() -> (World, FlowRef) {
    let mut world = World::new(Config::default(), Settings::default());
    let flow = world.put(Source::Learned, spec(port(1), 1, vec![output(port(2))]));
    world.run(2000, &[(1, 1000.0)]);
    assert_eq!((world.stands(flow), world.bench.rules().len()), (Offloaded::Yes, 1));
    assert!(world.marks().iter().all(Mark::is_reached));
    world.bench.stall(true);
    (world, flow)
}

/// All that comes before the flow.
fn wide() -> FlowSpec {
    let mut wide = spec(port(1), 0, vec![output(port(3))]);
    wide.matches.mask.set(Field::EthDst, 0xf0);
    wide
}

/// Commands are carried out before changes are taken.
fn set_ports(world: &mut World, name: &str, ports: &[u32]) -> Receiver<()> {
    let (done, is_done) = channel();
    let (now, millis) = (world.now(), world.millis);
    let ports = PortMap::new(ports.iter().map(|&number| (port(number), number)));
    world.core.set_ports(name, ports, done, now, millis);
    is_done
}

/// Neither the change of the tables nor that of the ports is answered before the rule is out.
fn both_wait_for_the_rule(mut world: World, is_done: &Receiver<()>) {
    for _ in 0..10 {
        world.round();
        assert_eq!(world.bench.rules().len(), 1);
        assert!(!world.marks().iter().all(Mark::is_reached), "the rule is still in");
        assert!(is_done.try_recv().is_err(), "the rule is still in");
    }
    world.bench.stall(false);
    world.round();
    assert!(world.bench.rules().is_empty() && world.marks().iter().all(Mark::is_reached));
    assert!(is_done.try_recv().is_ok());
}

#[test]
fn a_deletion_that_a_command_has_found_is_answered_when_the_rule_is_out() {
    let (mut world, flow) = stalled();
    world.delete(flow);
    let is_done = set_ports(&mut world, "nic0", &[1, 2, 3]);
    both_wait_for_the_rule(world, &is_done);
}

#[test]
fn a_flow_in_the_way_that_a_command_has_found_is_answered_when_the_rule_is_out() {
    let (mut world, _) = stalled();
    world.put(Source::Explicit, wide());
    let is_done = set_ports(&mut world, "nic0", &[1, 2, 3]);
    both_wait_for_the_rule(world, &is_done);
}

#[test]
fn a_command_is_answered_when_rules_are_out_that_were_leaving_before() {
    let (mut world, flow) = stalled();
    world.delete(flow);
    world.round();
    let is_done = set_ports(&mut world, "nic0", &[2, 3]);
    both_wait_for_the_rule(world, &is_done);
}

#[test]
fn a_flow_in_the_way_that_another_nics_command_has_found_takes_the_rule_out() {
    let (mut world, _) = stalled();
    let (_ports, card, _bench) = smart_nic(Config::default());
    let now = world.now();
    world.core.add_nic("nic1".into(), Box::new(card), Settings::default(), now);
    world.put(Source::Explicit, wide());
    let is_done = set_ports(&mut world, "nic1", &[]);
    both_wait_for_the_rule(world, &is_done);
}

/// When the manager looks at its devices in one second, in milliseconds each after the last.
fn waits(delay: Duration) -> Vec<u64> {
    let mut world = World::with(Config::default(), Settings::default(), |flows| {
        let mut card = Coarse::new(flows, CounterKind::Activity);
        card.delay = delay;
        Box::new(card)
    });
    let flow = world.put(Source::Learned, spec(port(1), 1, vec![output(port(2))]));
    world.run(2000, &[(1, 1000.0)]);
    assert_eq!(world.stands(flow), Offloaded::Yes);
    let mut waits = Vec::new();
    world.millis = world.core.next_tick;
    let end = world.millis + 1000;
    while world.millis < end {
        let wait = world.round().as_millis() as u64;
        waits.push(wait);
        world.millis += wait;
        (0..wait).for_each(|_| world.inject(1, &frame(1)));
    }
    assert_eq!(world.stands(flow), Offloaded::Yes);
    waits
}

#[test]
fn a_device_that_finds_out_whether_rules_are_used_is_looked_at_until_it_knows() {
    assert_eq!(waits(Duration::ZERO), [TICK; 4]);
    assert_eq!(waits(Duration::from_millis(35)), [10, 10, 10, 10, 210].repeat(4));
    // One that does not say it.
    assert_eq!(waits(Duration::from_secs(100)), [10; 100]);
}
