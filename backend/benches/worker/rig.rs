//! Workers with guests whose drivers are played by the same thread.

use crate::meter::Watch;
use backend::counters::WorkerCounters;
use backend::flows::MAX_FLOWS;
use backend::frames::pool::BUFFERS as HELD;
use backend::host::Decision;
use backend::host::path::HeldPacket;
use backend::port_config::{Mode, Socket};
use backend::quiesce::Quiescence;
use backend::vhost::VhostUserPort;
use backend::virtio::{Call, GuestRegions, GuestRx, GuestTx, RingBase, RingConfig};
use backend::wake::Waker;
use backend::worker::io::Io;
use backend::worker::kicks::Kicks;
use backend::worker::port::{NewPort, Steering, WorkerPort};
use backend::worker::rings::{Rings, RxRing, TxRing};
use backend::worker::{Command, Links, Waste, Worker};
use rtrb::{Consumer, Producer, RingBuffer};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64};
use switch_core::action::{Action, PortRef};
use switch_core::compile::{Plan, Way, Ways};
use switch_core::flow::{FlowSpec, Match, Source};
use switch_core::key::ipproto;
use switch_core::l1::L1Config;
use switch_core::packet::PortId;
use switch_core::pipeline::{Switch, SwitchConfig};
use switch_core::planner::{IfExists, Planner, PlannerConfig};
use switch_core::tunnel::{self, Endpoint, Remote, Vlan};
use virtio_bindings::virtio_config::{VIRTIO_F_RING_PACKED, VIRTIO_F_VERSION_1};
use virtio_bindings::virtio_net::VIRTIO_NET_F_MRG_RXBUF;
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};

/// Packets that a guest sends at a time.
pub const BURST: u16 = 32;
const FEATURES: u64 = 1 << VIRTIO_F_VERSION_1 | 1 << VIRTIO_NET_F_MRG_RXBUF;
const HEADER: u64 = 12;
const RING: u16 = 256;
const BUFFERS: u64 = 0x1_0000;

/// The port in a slot.
pub fn port(slot: usize) -> PortId {
    PortId { slot: slot as u32, generation: 1 }
}

/// The wrap counter in a position of a packed ring, and the flags of its descriptors that say who has them.
const WRAP: u16 = 1 << 15;
const AVAIL: u16 = 1 << 7;
const USED: u16 = 1 << 15;

/// Which layout rings have.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// Split.
    Split,
    /// Packed.
    Packed,
}

/// One ring and its driver. Descriptor `i` is buffer `i`, for ever.
pub struct Driver {
    memory: Arc<GuestMemoryMmap<()>>,
    config: RingConfig,
    kind: Kind,
    buffer: u64,
    flags: u16,
    index: u16,
}

impl Driver {
    /// Of a ring that brings frames of `len` bytes.
    pub fn sending(kind: Kind, len: u64) -> Driver {
        Driver::new(kind, HEADER + len, 0)
    }

    /// Of a ring that takes frames of up to `len` bytes into one buffer each.
    pub fn receiving(kind: Kind, len: u64) -> Driver {
        let mut driver = Driver::new(kind, HEADER + len, 2);
        driver.offer(RING);
        driver
    }

    fn new(kind: Kind, buffer: u64, flags: u16) -> Driver {
        let size = BUFFERS + u64::from(RING) * buffer;
        let range = (GuestAddress(0), size.next_multiple_of(0x1000) as usize);
        let memory = Arc::new(GuestMemoryMmap::from_ranges(&[range]).expect("memory"));
        let features = FEATURES | if kind == Kind::Packed { 1 << VIRTIO_F_RING_PACKED } else { 0 };
        let config = RingConfig { size: RING, desc: 0x1000, avail: 0x8000, used: 0xc000, features };
        let driver = Driver { memory, config, kind, buffer, flags, index: 0 };
        for i in 0..RING {
            let at = GuestAddress(config.desc + 16 * u64::from(i));
            let words = [driver.place(i), buffer | u64::from(flags) << 32];
            if kind == Kind::Packed {
                driver.memory.write_obj([words[0], 0], at).expect("inside");
                continue;
            }
            driver.memory.write_obj(words, at).expect("inside");
            driver.memory.write_obj(i, GuestAddress(config.avail + 4 + 2 * u64::from(i))).expect("inside");
        }
        driver
    }

    fn place(&self, i: u16) -> u64 {
        BUFFERS + u64::from(i) * self.buffer
    }

    /// Where it begins.
    fn base(&self) -> Arc<RingBase> {
        let base = RingBase::default();
        base.set(if self.kind == Kind::Packed { WRAP } else { 0 });
        Arc::new(base)
    }

    /// Where the length, id and flags of descriptor `i` of a packed ring are.
    fn word(&self, i: u16) -> GuestAddress {
        GuestAddress(self.config.desc + 16 * u64::from(i % RING) + 8)
    }

    /// The ring, as who receives from its guest has it.
    pub fn transmit(&self) -> GuestTx {
        let (call, base) = (Arc::new(Call::default()), self.base());
        let regions = Arc::new(GuestRegions::new(self.memory.clone()));
        GuestTx::new(regions, &self.config, None, call, base).expect("a ring")
    }

    /// The ring, as who sends to its guest has it.
    pub fn receive(&self) -> GuestRx {
        let (call, base) = (Arc::new(Call::default()), self.base());
        let regions = Arc::new(GuestRegions::new(self.memory.clone()));
        GuestRx::new(regions, &self.config, call, base).expect("a ring")
    }

    /// Writes the frame that is `ahead` of those offered.
    pub fn write(&self, ahead: u16, frame: &[u8]) {
        let at = self.place(self.index.wrapping_add(ahead) % RING) + HEADER;
        self.memory.write_slice(frame, GuestAddress(at)).expect("inside");
    }

    /// Makes so many more buffers available.
    pub fn offer(&mut self, n: u16) {
        let first = self.index;
        self.index = self.index.wrapping_add(n);
        if self.kind == Kind::Packed {
            for i in (0..n).map(|i| first.wrapping_add(i)) {
                let lap = if (i / RING).is_multiple_of(2) { AVAIL } else { USED };
                let word = self.buffer | u64::from(i % RING) << 32 | u64::from(self.flags | lap) << 48;
                self.memory.write_obj(word, self.word(i)).expect("inside");
            }
            return;
        }
        self.memory.write_obj(self.index, GuestAddress(self.config.avail + 2)).expect("inside");
    }

    /// Buffers that are with the ring's other side.
    pub fn out(&self) -> u16 {
        if self.kind == Kind::Packed {
            let is_out = |i: &u16| {
                let word: u64 = self.memory.read_obj(self.word(*i)).expect("inside");
                let flags = (word >> 48) as u16;
                (flags & AVAIL != 0) != (flags & USED != 0)
            };
            return (0..RING).filter(is_out).count() as u16;
        }
        let used: u16 = self.memory.read_obj(GuestAddress(self.config.used + 2)).expect("inside");
        self.index.wrapping_sub(used)
    }

    /// Bytes of the frame that the other side has used last, of a split ring.
    fn last_len(&self) -> u64 {
        let used: u16 = self.memory.read_obj(GuestAddress(self.config.used + 2)).expect("inside");
        let entry = self.config.used + 4 + 8 * u64::from(used.wrapping_sub(1) % RING);
        let len: u32 = self.memory.read_obj(GuestAddress(entry + 4)).expect("inside");
        u64::from(len) - HEADER
    }

    /// Offers what came back again; gives its number.
    pub fn refill(&mut self) -> u16 {
        let back = RING - self.out();
        self.offer(back);
        back
    }
}

/// What a guest sends: packets that differ in source address and port, and go to `ways` addresses in turn.
pub struct Load {
    frame: Vec<u8>,
    /// Bytes of outer headers.
    outer: usize,
    flows: usize,
    ways: usize,
    next: usize,
}

impl Load {
    /// UDP packets of `len` bytes.
    pub fn new(len: u64, flows: usize, ways: usize) -> Load {
        Load::inside(&[], len, flows, ways)
    }

    /// The same, of a tunnel whose headers stand before them.
    pub fn inside(outer: &[u8], len: u64, flows: usize, ways: usize) -> Load {
        let mut whole = outer.to_vec();
        whole.resize(outer.len() + len as usize, 0);
        let frame = &mut whole[outer.len()..];
        let (ip, udp) = (((len - 14) as u16).to_be_bytes(), ((len - 34) as u16).to_be_bytes());
        frame[..14].copy_from_slice(&[2, 0, 0, 0, 0, 1, 2, 0, 0, 0, 0, 2, 8, 0]);
        frame[14..24].copy_from_slice(&[0x45, 0, ip[0], ip[1], 0, 0, 0, 0, 64, ipproto::UDP]);
        frame[26..34].copy_from_slice(&[10, 0, 0, 0, 10, 1, 0, 1]);
        frame[34..40].copy_from_slice(&[0, 0, 0, 53, udp[0], udp[1]]);
        Load { frame: whole, outer: outer.len(), flows, ways, next: 0 }
    }

    /// The next packet. The order is scattered, in the first round over all flows otherwise than in the later ones: not those
    /// that were first come first.
    pub fn next(&mut self) -> &[u8] {
        let factor = if self.next < self.flows { 40_503 } else { 2_654_435_761 };
        let flow = self.next * factor % self.flows;
        self.next += 1;
        let frame = &mut self.frame[self.outer..];
        frame[27..30].copy_from_slice(&(flow as u32).to_be_bytes()[1..]);
        frame[33] = 1 + (flow % self.ways) as u8;
        frame[34..36].copy_from_slice(&(flow as u16).to_be_bytes());
        &self.frame
    }
}

/// What a rig is made of.
pub struct Setup {
    /// Ports, all of them known to every worker. Worker `i` of `n` polls each `n`th, from the `i`th on.
    pub ports: usize,
    /// Workers.
    pub workers: usize,
    /// The ports that send.
    pub senders: Vec<usize>,
    /// Bytes of a frame, without the frame check sequence.
    pub len: u64,
    /// Different packets of each sender; a power of two.
    pub flows: usize,
    /// Addresses that they go to.
    pub ways: usize,
    /// Of all rings.
    pub kind: Kind,
    /// The flows in the tables, by port.
    pub rules: Vec<(usize, Match, Vec<Action>)>,
    /// What stands before each frame: the headers of a tunnel.
    pub outer: Vec<u8>,
    /// Bytes that flows put before each frame.
    pub pushed: u64,
}

/// Slot of the port of VXLAN's tunnels, where there is one.
pub const TUNNEL: usize = 2;

/// A host at which VXLAN ends.
struct Host;

impl Ways for Host {
    fn is_tunnel(&self, _: PortId) -> bool {
        false // headers are pushed by flows
    }

    fn way(&self, _: PortId, _: &Remote) -> Result<Way, String> {
        Err("no route".into())
    }

    fn endpoints(&self, to: &PortRef) -> Option<Arc<[Endpoint]>> {
        let end = Endpoint {
            mac: None,
            vlan: Vlan::Untagged,
            local: None,
            kind: tunnel::Kind::Vxlan,
            port: tunnel::VXLAN_PORT,
            gbp: false,
            df: false,
            as_linux: false,
            in_port: port(TUNNEL),
        };
        (*to == PortRef::Ours(port(TUNNEL))).then(|| [end].into())
    }
}

/// Control's ends of the queues to and from a worker.
#[allow(dead_code, reason = "the benchmark of updates uses them")]
pub struct Control {
    /// What it is to do.
    pub commands: Producer<Command>,
    /// What it gives back.
    pub waste: Consumer<Waste>,
    /// Commands that it has carried out.
    pub applied: Arc<AtomicU64>,
}

/// Commands that may wait for a worker, as in the daemon.
const COMMANDS: usize = 8192;

struct Polling {
    worker: Worker,
    control: Option<Control>,
    /// The host's ends.
    up: Consumer<Box<HeldPacket>>,
    answers: Producer<Box<HeldPacket>>,
}

/// Workers and their guests.
pub struct Rig {
    workers: Vec<Polling>,
    /// The guests that send.
    senders: Vec<(Driver, Load)>,
    /// The others' transmit rings, which stay empty.
    _idle: Vec<Driver>,
    receivers: Vec<Driver>,
    planner: Option<Planner>,
}

impl Rig {
    /// Everything running, nothing sent.
    pub fn new(setup: &Setup) -> Rig {
        let &Setup { ports, len, flows, ways, .. } = setup;
        let sent = len + setup.outer.len() as u64;
        let received = len + setup.pushed;
        let receivers: Vec<_> = (0..ports).map(|_| Driver::receiving(setup.kind, received)).collect();
        let rings: Vec<_> = receivers.iter().map(|driver| Arc::new(driver.receive())).collect();
        let shared: Vec<_> = (0..ports)
            .map(|_| {
                let socket = Socket { mode: Mode::Client, ..Socket::new("/nowhere") };
                let port =
                    VhostUserPort::new("p", 1, socket, None, Arc::new(Quiescence::new()), Box::new(|_| {}));
                Rings::Guest(port.expect("a port").shared().clone())
            })
            .collect();
        let transmitters: Vec<_> = (0..ports).map(|_| Driver::sending(setup.kind, sent)).collect();
        let quiescence = Arc::new(Quiescence::new());
        let (planner, switches) = switches(setup);
        let polling = |(index, switch)| {
            let mut epoch = quiescence.register("bench").expect("an eventfd");
            epoch.changed(); // or the worker would take the rings of connections that there are not
            let (to_host, up) = RingBuffer::new(HELD);
            let (answers, from_host) = RingBuffer::new(HELD);
            let (commands, commands_in) = RingBuffer::new(COMMANDS);
            let (waste_out, waste) = RingBuffer::new(2 * COMMANDS);
            let control = Control { commands, waste, applied: Arc::<AtomicU64>::default() };
            let kicks = Kicks::new(&epoch).expect("an epoll set");
            let mut io = Io::new(1 << 40, to_host, Arc::new(Waker::new().expect("an eventfd")), kicks);
            for slot in 0..ports {
                let is_ours = slot % setup.workers == index;
                assert!(io.add_port(Box::new(worker_port(slot, &shared[slot], is_ours))).is_none());
                let port = io.port(port(slot)).expect("added");
                port.tx[0].ring = Some(TxRing::Guest(rings[slot].clone()));
                port.tx_active = 1;
                if is_ours {
                    port.rx[0].ring = Some(RxRing::Guest(transmitters[slot].transmit()));
                }
            }
            let links = Links {
                commands: commands_in,
                waste: waste_out,
                from_host,
                deliveries: RingBuffer::new(1).1,
                delivered: RingBuffer::new(1).0,
                epoch,
                applied: control.applied.clone(),
                stop: Arc::<AtomicBool>::default(),
                counters: Arc::<WorkerCounters>::default(),
            };
            // So many cycles a microsecond that no burst is found too expensive, be it emulated.
            Polling { worker: Worker::new(switch, io, links, 1 << 30), control: Some(control), up, answers }
        };
        let workers = switches.into_iter().enumerate().map(polling).collect();
        let (sending, idle): (Vec<_>, Vec<_>) =
            transmitters.into_iter().enumerate().partition(|(slot, _)| setup.senders.contains(slot));
        let load = || Load::inside(&setup.outer, len, flows, ways);
        let senders = sending.into_iter().map(|(_, driver)| (driver, load())).collect();
        let _idle = idle.into_iter().map(|(_, driver)| driver).collect();
        Rig { workers, senders, _idle, receivers, planner: Some(planner) }
    }

    /// Who makes flows for the workers, and the way to the first of them.
    #[allow(dead_code, reason = "the benchmark of updates uses it")]
    pub fn take_control(&mut self) -> Option<(Planner, Control)> {
        Some((self.planner.take()?, self.workers.first_mut()?.control.take()?))
    }

    fn send(&mut self) {
        for (driver, load) in &mut self.senders {
            (0..BURST).for_each(|i| driver.write(i, load.next()));
            driver.offer(BURST);
        }
    }

    fn rounds(&mut self, watch: &mut Watch) {
        for polling in &mut self.workers {
            watch.measure(|| polling.worker.round());
        }
    }

    /// Packets that have arrived; all that were sent must have been taken.
    fn arrived(&mut self) -> usize {
        assert!(self.senders.iter().all(|(driver, _)| driver.out() == 0), "not all was taken");
        self.receivers.iter_mut().map(|driver| usize::from(driver.refill())).sum()
    }

    /// Has a burst of every sender carried. Gives the number of packets.
    pub fn step(&mut self, watch: &mut Watch) -> usize {
        self.step_by(|worker| {
            watch.measure(|| worker.round());
        })
    }

    /// The same, with `round` to let a worker do its round.
    pub fn step_by(&mut self, round: impl FnMut(&mut Worker)) -> usize {
        let sent = self.senders.len() * usize::from(BURST);
        self.send();
        self.workers.iter_mut().map(|polling| &mut polling.worker).for_each(round);
        assert_eq!(self.arrived(), sent, "not all was sent");
        sent
    }

    /// Has a burst carried, of which frames of so many bytes must arrive at the port in slot 1.
    #[allow(dead_code, reason = "rows of tunnels use it")]
    pub fn expect_bytes(&mut self, len: u64) {
        self.step_by(|worker| {
            worker.round();
        });
        assert_eq!(self.receivers[1].last_len(), len);
    }

    /// The same if no flow matches: all goes up, and the host has it executed so.
    pub fn step_by_host(&mut self, watch: &mut Watch, plan: &Arc<Plan>) -> usize {
        let sent = self.senders.len() * usize::from(BURST);
        self.send();
        self.rounds(watch);
        for polling in &mut self.workers {
            while let Ok(mut held) = polling.up.pop() {
                held.answer = Some(Decision::Execute(plan.clone()));
                assert!(polling.answers.push(held).is_ok(), "there are as many places as buffers");
            }
        }
        assert_eq!(self.arrived(), 0, "there is a flow");
        self.rounds(watch);
        assert_eq!(self.arrived(), sent, "not all was sent");
        sent
    }
}

fn worker_port(slot: usize, rings: &Rings, is_ours: bool) -> WorkerPort {
    WorkerPort::new(NewPort {
        id: port(slot),
        name: "p".into(),
        rings: rings.clone(),
        queues: 1,
        polled: if is_ours { vec![0] } else { vec![] },
        mtu: 1500,
        miss_rate: u32::MAX,
        steering: Arc::new(Steering::default()),
        handover: Arc::default(),
    })
}

/// The tables of each worker, and who fills them.
fn switches(setup: &Setup) -> (Planner, Vec<Switch>) {
    let Setup { ports, workers, senders, flows, rules, .. } = setup;
    let (ports, workers) = (*ports, *workers);
    let capacity = (2 * flows * senders.len() / workers).clamp(1 << 17, 1 << 21);
    let l1 = L1Config { capacity, ports, pending_ticks: 10, pending_misses: 4, age_ticks: 1000 };
    let config = PlannerConfig { ports, flows: MAX_FLOWS, masks: 64, seed: 1 };
    let mut switches: Vec<_> =
        (0..workers).map(|_| Switch::new(SwitchConfig { l1, flows: MAX_FLOWS, seed: 1 })).collect();
    let mut planner = Planner::new(config, switches.iter().map(|switch| switch.slots().clone()).collect());
    planner.set_ways(Arc::new(Host));
    let mut updates = vec![];
    for slot in 0..ports {
        updates.extend(planner.add_port(port(slot), u32::MAX).expect("the slot is free").0);
    }
    for (slot, matches, actions) in rules {
        let spec = FlowSpec { matches: matches.clone(), actions: actions.clone(), ufid: None, held: None };
        let added = planner.add(port(*slot), Source::Explicit, spec, IfExists::Refuse);
        updates.extend(added.expect("a new flow").1);
    }
    // There is one for each worker, in turn.
    for (i, update) in updates.into_iter().enumerate() {
        let switch = &mut switches[i % workers];
        drop(switch.apply(update));
        drop(switch.step());
    }
    (planner, switches)
}
