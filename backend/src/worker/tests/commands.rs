//! What control tells a worker: in order, and no more in a round than it can give back.

use super::*;
use crate::counters::WorkerCounters;
use crate::worker::{COMMANDS, Command, Links, Waste, Worker};
use rtrb::Producer;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use switch_core::action::{Action, PortRef};
use switch_core::flow::{FlowRef, Match, Source};
use switch_core::key::Field;
use switch_core::l1::L1Config;
use switch_core::pipeline::{Switch, SwitchConfig};
use switch_core::planner::{IfExists, Planner, PlannerConfig};
use switch_core::tables::{Retired, Update};

/// Places of the queue of what is given back.
const ROOM: usize = 4;

struct Control {
    worker: Worker,
    planner: Planner,
    commands: Producer<Command>,
    waste: Consumer<Waste>,
    applied: Arc<AtomicU64>,
}

impl Control {
    fn new() -> Control {
        let mut epoch = Arc::new(Quiescence::new()).register("commands").unwrap();
        epoch.changed();
        let kicks = Kicks::new(&epoch).unwrap();
        let io = Io::new(PATIENCE, RingBuffer::new(1).0, Arc::new(Waker::new().unwrap()), kicks);
        let l1 = L1Config { capacity: 64, ports: 2, pending_ticks: 10, pending_misses: 4, age_ticks: 1000 };
        let switch = Switch::new(SwitchConfig { l1, flows: 1024, seed: 1 });
        let config = PlannerConfig { ports: 2, flows: 1024, masks: 4, seed: 2 };
        let planner = Planner::new(config, vec![switch.slots().clone()]);
        let (commands, commands_in) = RingBuffer::new(1024);
        let (waste_out, waste) = RingBuffer::new(ROOM);
        let applied = Arc::<AtomicU64>::default();
        let links = Links {
            commands: commands_in,
            waste: waste_out,
            from_host: RingBuffer::new(1).1,
            deliveries: RingBuffer::new(1).1,
            delivered: RingBuffer::new(1).0,
            epoch,
            applied: applied.clone(),
            stop: Arc::<AtomicBool>::default(),
            counters: Arc::<WorkerCounters>::default(),
        };
        let worker = Worker::new(switch, io, links, 1000);
        let mut control = Control { worker, planner, commands, waste, applied };
        let updates = control.planner.add_port(A, 64).unwrap().0;
        control.send(updates);
        control
    }

    fn send(&mut self, updates: Vec<Update>) {
        for update in updates {
            assert!(self.commands.push(Command::Table(update)).is_ok());
        }
    }

    fn spec(dst: u128, to: PortId) -> FlowSpec {
        let mut matches = Match::default();
        for (field, value) in [(Field::InPort, A.slot.into()), (Field::RecircId, 0), (Field::EthDst, dst)] {
            matches.key.set(field, value);
            matches.mask.set_exact(field);
        }
        let actions = vec![Action::Output(PortRef::Ours(to))];
        FlowSpec { matches, actions, ufid: None, held: None }
    }

    fn add(&mut self, dst: u128) -> FlowRef {
        let spec = Control::spec(dst, B);
        let (flow, updates) = self.planner.add(A, Source::Learned, spec, IfExists::Refuse).unwrap();
        self.send(updates);
        flow
    }

    /// A round of the worker. Gives how many commands it has carried out.
    fn round(&mut self) -> u64 {
        let before = self.applied.load(Ordering::Acquire);
        let worked = self.worker.round();
        let done = self.applied.load(Ordering::Acquire) - before;
        assert!(worked || done == 0);
        done
    }

    fn found(&self, dst: u128) -> Option<FlowRef> {
        self.worker.switch.tables().peek(A, &Control::spec(dst, B).matches.key)
    }
}

#[test]
fn what_a_worker_takes_is_counted() {
    let Worker { switch, io, .. } = &Control::new().worker;
    let l1: usize = switch.l1().memory().into_iter().map(|(_, len)| len).sum();
    let parts = [l1, switch.slots().memory().1, switch.flow_list().1, switch.bytes(), io.pool.bytes()];
    assert!(parts.iter().all(|&part| part > 0), "{parts:?}");
    assert_eq!(Control::new().worker.bytes(), parts.iter().sum::<usize>() as u64);
}

#[test]
fn a_round_carries_out_what_was_there_when_it_began() {
    let mut control = Control::new();
    let flows: Vec<_> = (0..10).map(|dst| control.add(dst)).collect();
    // Others among them are in order, too.
    control.commands.push(Command::SetMtu(A, 1400)).ok().unwrap();
    let (_, updates) = control.planner.remove(flows[3]).unwrap();
    control.send(updates);
    assert_eq!(control.round(), 3, "the port, and two flows: any of them may leave something behind");
    while control.round() > 0 {
        while control.waste.pop().is_ok() {}
    }
    for (dst, flow) in flows.iter().enumerate() {
        assert_eq!(control.found(dst as u128), (dst != 3).then_some(*flow));
    }
}

#[test]
fn no_more_is_taken_than_can_be_given_back() {
    let mut control = Control::new();
    let mut flows: Vec<_> = (0..100).map(|dst| control.add(dst)).collect();
    while control.round() > 0 {
        while control.waste.pop().is_ok() {}
    }
    while control.waste.pop().is_ok() {}
    for (dst, flow) in flows.iter_mut().enumerate() {
        let (next, updates) = control.planner.replace(*flow, Control::spec(dst as u128, C)).unwrap();
        *flow = next;
        control.send(updates);
    }
    // Each leaves its predecessor behind, and one place is kept for upkeep.
    assert_eq!((control.round(), control.round()), (ROOM as u64 - 1, 0));
    assert_eq!((control.found(2), control.found(3) == Some(flows[3])), (Some(flows[2]), false));
    let mut back = 0;
    loop {
        while let Ok(waste) = control.waste.pop() {
            back += matches!(waste, Waste::Table(Retired::Flow(_))) as usize;
        }
        if control.round() == 0 {
            break;
        }
    }
    assert_eq!(back, 100);
    assert!((0..100).all(|dst| control.found(dst) == Some(flows[dst as usize])));
    const { assert!(COMMANDS > ROOM) };
}
