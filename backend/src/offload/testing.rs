//! Tables, a worker, a NIC and a clock for the manager's tests: every packet goes through the model of a SmartNIC, and what
//! the NIC leaves to the processor through a real switch.

use super::feed::Feed;
use super::manager::Core;
use super::policy::Millis;
use super::{Offloaded, Settings};
use crate::datapath::{Mark, WorkerFeed};
use crate::flows::{Flows, MAX_FLOWS};
use crate::host::FlowTable;
use crate::port_config::{Mode, Socket};
use crate::quiesce::{Quiescence, WorkerEpoch};
use crate::vhost::VhostUserPort;
use crate::worker::port::{NewPort, Steering, WorkerPort};
use crate::worker::rings::Rings;
use crate::worker::{Command, MAX_PORTS};
use nic::io::PacketIo;
use nic::model::{Bench, Config, ModelFlows, ModelPorts, smart_nic};
use nic::offload::{
    CounterKind, Counts, Event, FlowOffload, FlowRule, Occupancy, OffloadCaps, OpError, Plan, PortMap,
    Refusal, RuleId, Token,
};
use rtrb::Consumer;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::channel;
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::{Duration, Instant};
use switch_core::action::{Action, PortRef};
use switch_core::drop::DropReason;
use switch_core::flow::{FlowRef, FlowSpec, Match, Source};
use switch_core::hash::Hasher;
use switch_core::key::{Field, Key, Mask};
use switch_core::l1::L1Config;
use switch_core::packet::{Offload, Packet, PortId};
use switch_core::pipeline::{Egress, Found, Switch, SwitchConfig, Upcall};
use switch_core::slab::{FlowStats, Slots};

/// The NIC's ports: port `n` of the card is in slot `n - 1`.
pub const fn port(number: u32) -> PortId {
    PortId { slot: number - 1, generation: 1 }
}

/// A guest's port.
pub const GUEST: PortId = PortId { slot: 7, generation: 1 };
const MTU: u32 = 1500;

pub fn output(port: PortId) -> Action {
    Action::Output(PortRef::Ours(port))
}

/// A flow from a port to an address.
pub fn spec(from: PortId, to: u8, actions: Vec<Action>) -> FlowSpec {
    let (mut key, mut mask) = (Key::default(), Mask::EMPTY);
    key.set(Field::InPort, from.slot.into());
    mask.set_exact(Field::InPort);
    mask.set_exact(Field::RecircId);
    key.set(Field::EthDst, to.into());
    mask.set_exact(Field::EthDst);
    FlowSpec { matches: Match { key, mask, ..Match::default() }, actions, ufid: None, held: None }
}

/// A frame to an address, of an ethertype that nobody parses.
pub fn frame(to: u8) -> Vec<u8> {
    let mut frame = vec![0; 60];
    frame[5] = to;
    frame[11] = 0xaa;
    frame[12..14].copy_from_slice(&0x88b5u16.to_be_bytes());
    frame
}

pub const FRAME: u64 = 60;

/// A card that can do less than the model, or knows less.
pub struct Coarse {
    inner: ModelFlows,
    caps: OffloadCaps,
    /// Whether it does not see fragments.
    pub blind: bool,
    /// How long it takes to say what was counted.
    pub delay: Duration,
    /// What it has yet to say, and when.
    held: Vec<(Instant, Event)>,
}

impl Coarse {
    pub fn new(inner: ModelFlows, counters: CounterKind) -> Coarse {
        let caps = OffloadCaps { counters, ..inner.caps().clone() };
        Coarse { inner, caps, blind: false, delay: Duration::ZERO, held: Vec::new() }
    }
}

impl FlowOffload for Coarse {
    fn caps(&self) -> &OffloadCaps {
        &self.caps
    }

    fn compile(&self, rule: &FlowRule<'_>) -> Result<Plan, Refusal> {
        if !self.blind || !rule.matches.mask.has(Field::IpFrag) {
            return self.inner.compile(rule);
        }
        let mut matches = rule.matches.clone();
        matches.mask.set(Field::IpFrag, 0);
        matches.key = matches.key.masked(&matches.mask);
        let mut plan = self.inner.compile(&FlowRule { matches: &matches, ..*rule })?;
        plan.ignores_fragments = true;
        Ok(plan)
    }

    fn insert(&mut self, rule: RuleId, plan: Plan, token: Token) -> Result<(), OpError> {
        self.inner.insert(rule, plan, token)
    }

    fn replace(&mut self, rule: RuleId, plan: Plan, token: Token) -> Result<(), OpError> {
        self.inner.replace(rule, plan, token)
    }

    fn remove(&mut self, rule: RuleId, token: Token) -> Result<(), OpError> {
        self.inner.remove(rule, token)
    }

    fn sample(&mut self, rules: &[RuleId]) {
        if self.caps.counters != CounterKind::None {
            self.inner.sample(rules);
        }
    }

    fn kick(&mut self, now: Instant) {
        self.inner.kick(now);
    }

    fn poll(&mut self, now: Instant, events: &mut Vec<Event>) {
        self.inner.poll(now, events);
        let counts = |counts: &mut Counts, kind| match kind {
            CounterKind::Activity => *counts = Counts { packets: counts.packets.min(1), bytes: 0 },
            _ => counts.bytes = 0,
        };
        let counts_none = matches!(self.caps.counters, CounterKind::None | CounterKind::Activity);
        for event in &mut *events {
            match event {
                Event::Stats { delta, .. } => counts(delta, self.caps.counters),
                Event::Done { last, .. } if counts_none => *last = None,
                Event::Done { last: Some(last), .. } => counts(last, self.caps.counters),
                _ => {}
            }
        }
        if !self.delay.is_zero() {
            let stats = events.extract_if(.., |event| matches!(event, Event::Stats { .. }));
            self.held.extend(stats.map(|event| (now + self.delay, event)));
            events.extend(self.held.extract_if(.., |(at, _)| now >= *at).map(|(_, event)| event));
        }
    }

    fn occupancy(&self) -> Occupancy {
        self.inner.occupancy()
    }

    fn flush(&mut self, now: Instant) {
        self.inner.flush(now);
    }
}

/// What the switch does with packets.
#[derive(Default)]
struct Out {
    sent: Vec<(PortId, Vec<u8>)>,
    upcalls: Vec<Upcall>,
    drops: u64,
}

impl Egress for Out {
    fn more(&mut self, _: usize, _: &mut Packet) {}
    fn admit(&mut self, _: usize, _: &mut Packet, _: Found<'_>) -> Result<(), DropReason> {
        Ok(())
    }
    fn output(&mut self, _: usize, packet: &mut Packet, port: PortId, _: u32, _: bool) {
        self.sent.push((port, packet.head().to_vec()));
    }
    fn has_room(&mut self, _: &Packet) -> bool {
        true
    }
    fn upcall(&mut self, _: usize, _: &mut Packet, why: Upcall) {
        self.upcalls.push(why);
    }
    fn drop(&mut self, _: usize, _: &Packet, _: DropReason) {
        self.drops += 1;
    }
}

pub struct World {
    pub flows: Arc<Mutex<Flows>>,
    pub core: Core,
    pub bench: Bench,
    pub millis: Millis,
    /// Packets that came in, that the switch forwarded, and that went to the host, and why.
    pub injected: u64,
    pub by_software: u64,
    pub upcalls: Vec<Upcall>,
    pub dropped: u64,
    start: Instant,
    ports: ModelPorts,
    switch: Switch,
    commands: Consumer<Command>,
    applied: Arc<AtomicU64>,
    /// Part packets of traffic.
    parts: Vec<f64>,
    _epoch: WorkerEpoch,
}

impl World {
    /// A NIC of three ports, all of them ports of the switch, and a guest.
    pub fn new(config: Config, settings: Settings) -> World {
        World::with(config, settings, |flows| Box::new(flows))
    }

    pub fn with(
        config: Config,
        settings: Settings,
        card: impl FnOnce(ModelFlows) -> Box<dyn FlowOffload>,
    ) -> World {
        let switch = Switch::new(SwitchConfig {
            l1: L1Config {
                capacity: 1024,
                ports: MAX_PORTS,
                pending_ticks: 10,
                pending_misses: 8,
                age_ticks: 1000,
            },
            flows: MAX_FLOWS,
            seed: 7,
        });
        let epoch = Arc::new(Quiescence::new()).register("test").unwrap();
        let (feed, commands, applied) = WorkerFeed::played(switch.slots().clone(), epoch.waker());
        let flows = Arc::new(Mutex::new(Flows::new(vec![feed], 3)));
        let slots = Arc::new(Slots::new(MAX_FLOWS, Hasher::new(0)));
        let feed = Arc::new(Feed::new(slots.clone()).unwrap());
        assert!(flows.lock().unwrap().tell_offload(feed.clone(), slots));
        let (ports, card_flows, bench) = smart_nic(config);
        let mut world = World {
            core: Core::new(flows.clone(), feed),
            flows,
            bench,
            millis: 1000,
            injected: 0,
            by_software: 0,
            upcalls: Vec::new(),
            dropped: 0,
            start: Instant::now(),
            ports,
            switch,
            commands,
            applied,
            parts: vec![0.0; 256],
            _epoch: epoch,
        };
        for id in [port(1), port(2), port(3), GUEST] {
            world.add_port(id);
        }
        world.core.add_nic("nic0".into(), card(card_flows), settings, world.now());
        world.set_ports(PortMap::new((1..=3).map(|number| (port(number), number))));
        world
    }

    pub fn set_ports(&mut self, ports: PortMap) {
        let (done, is_done) = channel();
        let (now, millis) = (self.now(), self.millis);
        self.core.set_ports("nic0", ports, done, now, millis);
        for _ in 0..4 {
            self.round();
        }
        is_done.try_recv().expect("the ports are the NIC's");
    }

    fn add_port(&mut self, id: PortId) {
        let socket = Socket { mode: Mode::Client, ..Socket::new("/nowhere") };
        let vhost =
            VhostUserPort::new("p", 1, socket, None, Arc::new(Quiescence::new()), Box::new(|_| {})).unwrap();
        let new_port = |_| {
            Box::new(WorkerPort::new(NewPort {
                id,
                name: "p".into(),
                rings: Rings::Guest(vhost.shared().clone()),
                queues: 1,
                polled: vec![0],
                mtu: MTU,
                miss_rate: 1000,
                steering: Arc::new(Steering::default()),
                handover: Arc::default(),
            }))
        };
        self.tables().add_port(id, 64, 512, new_port).unwrap();
        self.work();
    }

    pub fn tables(&self) -> MutexGuard<'_, Flows> {
        self.flows.lock().unwrap()
    }

    pub fn put(&mut self, source: Source, spec: FlowSpec) -> FlowRef {
        let flow = self.tables().put(source, spec).unwrap();
        self.work();
        flow
    }

    pub fn delete(&mut self, flow: FlowRef) {
        self.tables().delete(flow);
        self.work();
    }

    pub fn now(&self) -> Instant {
        self.start + Duration::from_millis(self.millis)
    }

    /// The worker applies what it was sent.
    pub fn work(&mut self) {
        while let Ok(command) = self.commands.pop() {
            if let Command::Table(update) = command {
                drop(self.switch.apply(update));
            }
            self.applied.fetch_add(1, Ordering::Release);
        }
    }

    /// The manager looks at everything once.
    pub fn round(&mut self) -> Duration {
        let now = self.now();
        self.core.round(now, self.millis)
    }

    /// A frame comes in by the cable of a port.
    pub fn inject(&mut self, number: u32, frame: &[u8]) {
        self.injected += 1;
        self.bench.inject(number, frame, self.now());
        let mut left = Vec::new();
        self.ports
            .receive(64, &mut |received| {
                assert!(!received.forwarded);
                left.push((received.port, received.frame.to_vec()));
            })
            .unwrap();
        for (number, bytes) in left {
            let mut out = Out::default();
            let mut packets = [Packet::from_frame(port(number), &bytes)];
            self.switch.process(self.millis, &mut packets, &mut out);
            self.by_software += u64::from(!out.sent.is_empty());
            for (to, bytes) in out.sent.into_iter().filter(|(to, _)| *to != GUEST) {
                self.ports.send(to.slot + 1, &[&bytes], &Offload::default()).unwrap();
            }
            self.upcalls.append(&mut out.upcalls);
            self.dropped += out.drops;
        }
    }

    /// Lets time pass, with traffic into port 1: packets a second by address. `each` is called every 5 ms.
    pub fn pass(&mut self, millis: Millis, traffic: &[(u8, f64)], mut each: impl FnMut(&mut World)) {
        let end = self.millis + millis;
        while self.millis < end {
            self.millis += 5;
            for &(to, rate) in traffic {
                let due = self.parts[to as usize] + rate * 0.005;
                self.parts[to as usize] = due.fract();
                (0..due as u64).for_each(|_| self.inject(1, &frame(to)));
            }
            self.round();
            self.work();
            each(self);
        }
    }

    pub fn run(&mut self, millis: Millis, traffic: &[(u8, f64)]) {
        self.pass(millis, traffic, |_| {});
    }

    pub fn stats(&self, flow: FlowRef) -> FlowStats {
        self.tables().get(flow).unwrap().stats()
    }

    pub fn stands(&self, flow: FlowRef) -> Offloaded {
        self.core.flows_report().get(flow).0
    }

    pub fn estimated(&self, flow: FlowRef) -> bool {
        self.core.flows_report().get(flow).1
    }

    /// Where answers to `sync` and `del-flow` would wait for.
    pub fn marks(&self) -> Vec<Mark> {
        self.tables().marks()
    }

    /// How many frames have left by a port's cable since the last time.
    pub fn left_by(&self, number: u32) -> u64 {
        self.bench.take(number).len() as u64
    }
}
