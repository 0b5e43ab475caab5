//! What a packet costs a worker with its rings, both drivers played by the same thread: `cargo bench -p backend`.
//!
//! Nothing crosses from one processor to another, so this is what the worker's own work costs, and what waiting for a guest's
//! cache lines comes on top of. For instructions see `docs/performance.md`: callgrind toggles its collection at `measured`.

use backend::clock;
use backend::counters::WorkerCounters;
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
use backend::worker::{Links, Worker};
use rtrb::{Consumer, RingBuffer};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64};
use switch_core::action::{Action, FieldSet, PortRef, SetGroup};
use switch_core::flow::{FlowSpec, Match, Source};
use switch_core::key::{ETH_P_IP, Field, Key, Mask, ipproto};
use switch_core::l1::L1Config;
use switch_core::packet::PortId;
use switch_core::pipeline::{Switch, SwitchConfig};
use switch_core::planner::{IfExists, Planner, PlannerConfig};
use virtio_bindings::virtio_config::VIRTIO_F_VERSION_1;
use virtio_bindings::virtio_net::VIRTIO_NET_F_MRG_RXBUF;
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};

const A: PortId = PortId { slot: 0, generation: 1 };
const B: PortId = PortId { slot: 1, generation: 1 };
const FEATURES: u64 = 1 << VIRTIO_F_VERSION_1 | 1 << VIRTIO_NET_F_MRG_RXBUF;
const HEADER: u64 = 12;
const RING: u16 = 256;
const BUFFER: u64 = 2048;
const BUFFERS: u64 = 0x10_0000;
/// Packets given to the worker at a time.
const BURST: u16 = 32;
const ROUNDS: usize = 15;

/// A row of the table.
struct Row {
    name: &'static str,
    /// Bytes of the frame.
    len: u64,
    flows: usize,
    /// Whether flows look at the addresses and ports, or at the ingress port only.
    exact: bool,
    /// Whether MAC addresses and TTL are rewritten.
    rewrite: bool,
}

const ROWS: [Row; 5] = [
    Row { name: "64B-io", len: 64, flows: 1, exact: false, rewrite: false },
    Row { name: "64B-64-flows", len: 64, flows: 64, exact: true, rewrite: false },
    Row { name: "64B-4096-flows", len: 64, flows: 4096, exact: true, rewrite: false },
    Row { name: "64B-64-rewritten", len: 64, flows: 64, exact: true, rewrite: true },
    Row { name: "1518B-64-flows", len: 1514, flows: 64, exact: true, rewrite: false },
];

/// One ring and its driver.
struct Driver {
    memory: Arc<GuestMemoryMmap<()>>,
    config: RingConfig,
    index: u16,
}

impl Driver {
    fn new() -> Driver {
        let memory =
            Arc::new(GuestMemoryMmap::from_ranges(&[(GuestAddress(0), 0x100_0000)]).expect("memory"));
        let config = RingConfig { size: RING, desc: 0x1000, avail: 0x8000, used: 0xc000, features: FEATURES };
        Driver { memory, config, index: 0 }
    }

    fn regions(&self) -> Arc<GuestRegions> {
        Arc::new(GuestRegions::new(self.memory.clone()))
    }

    fn place(i: u16) -> u64 {
        BUFFERS + u64::from(i) * BUFFER
    }

    /// Descriptor `i` is buffer `i`, for ever.
    fn describe(&self, i: u16, len: u64, flags: u16) {
        let at = GuestAddress(self.config.desc + 16 * u64::from(i));
        let words = [Self::place(i), len | u64::from(flags) << 32];
        self.memory.write_obj(words, at).expect("inside");
        self.memory.write_obj(i, GuestAddress(self.config.avail + 4 + 2 * u64::from(i))).expect("inside");
    }

    fn offer(&mut self, n: u16) {
        self.index = self.index.wrapping_add(n);
        self.memory.write_obj(self.index, GuestAddress(self.config.avail + 2)).expect("inside");
    }

    fn used(&self) -> u16 {
        self.memory.read_obj(GuestAddress(self.config.used + 2)).expect("inside")
    }
}

fn frame(i: usize, len: u64) -> Vec<u8> {
    let mut frame = vec![0; len as usize];
    let (ip, udp) = (((len - 14) as u16).to_be_bytes(), ((len - 34) as u16).to_be_bytes());
    frame[..14].copy_from_slice(&[2, 0, 0, 0, 0, 1, 2, 0, 0, 0, 0, 2, 8, 0]);
    frame[14..24].copy_from_slice(&[0x45, 0, ip[0], ip[1], 0, 0, 0, 0, 64, ipproto::UDP]);
    frame[26..34].copy_from_slice(&[10, 0, (i >> 8) as u8, i as u8, 10, 1, 0, 1]);
    frame[34..40].copy_from_slice(&[(i >> 8) as u8, i as u8, 0, 53, udp[0], udp[1]]);
    frame
}

/// A worker with a guest that sends on port A and one that receives on port B.
struct Bench {
    worker: Worker,
    sender: Driver,
    receiver: Driver,
    frames: Vec<Vec<u8>>,
    next: usize,
    /// Kept open.
    _up: Consumer<Box<HeldPacket>>,
}

impl Bench {
    fn new(row: &Row) -> Bench {
        let (mut sender, mut receiver) = (Driver::new(), Driver::new());
        for i in 0..RING {
            sender.describe(i, HEADER + row.len, 0);
            receiver.describe(i, BUFFER, 2);
        }
        receiver.offer(RING);
        sender.index = 0;
        let mut epoch = Arc::new(Quiescence::new()).register("bench").expect("an eventfd");
        epoch.changed(); // or the worker would take the rings of connections that there are not
        let (to_host, up) = RingBuffer::new(64);
        let kicks = Kicks::new(&epoch).expect("an epoll set");
        let mut io = Io::new(1 << 40, to_host, Arc::new(Waker::new().expect("an eventfd")), kicks);
        for id in [A, B] {
            let socket = Socket { mode: Mode::Client, ..Socket::new("/nowhere") };
            let vhost = VhostUserPort::new("p", 1, socket, Arc::new(Quiescence::new()), Box::new(|_| {}));
            let port = WorkerPort::new(NewPort {
                id,
                name: "p".into(),
                rings: Rings::Guest(vhost.expect("a port").shared().clone()),
                queues: 1,
                polled: vec![0],
                mtu: 1500,
                miss_rate: 1,
                steering: Arc::new(Steering::default()),
            });
            assert!(io.add_port(Box::new(port)).is_none());
        }
        let call = Arc::new(Call::default());
        let tx =
            GuestTx::new(sender.regions(), &sender.config, None, call.clone(), Arc::<RingBase>::default());
        let rx = GuestRx::new(receiver.regions(), &receiver.config, call, Arc::<RingBase>::default());
        io.port(A).expect("added").rx[0].ring = Some(RxRing::Guest(tx.expect("a ring")));
        let port = io.port(B).expect("added");
        port.tx[0].ring = Some(TxRing::Guest(Arc::new(rx.expect("a ring"))));
        port.tx_active = 1;
        let links = Links {
            commands: RingBuffer::new(1).1,
            waste: RingBuffer::new(4).0,
            from_host: RingBuffer::new(1).1,
            deliveries: RingBuffer::new(1).1,
            delivered: RingBuffer::new(1).0,
            epoch,
            applied: Arc::<AtomicU64>::default(),
            stop: Arc::<AtomicBool>::default(),
            counters: Arc::<WorkerCounters>::default(),
        };
        // So many cycles a microsecond that no burst is found too expensive, be it emulated.
        let worker = Worker::new(switch(row), io, links, 1 << 30);
        let frames = (0..row.flows).map(|i| frame(i * 7 % row.flows, row.len)).collect();
        Bench { worker, sender, receiver, frames, next: 0, _up: up }
    }

    /// Has a burst carried; gives the cycles that the worker took.
    fn step(&mut self) -> u64 {
        for i in 0..BURST {
            let at = Driver::place(self.sender.index.wrapping_add(i) % RING) + HEADER;
            self.sender.memory.write_slice(&self.frames[self.next], GuestAddress(at)).expect("inside");
            self.next = (self.next + 1) % self.frames.len();
        }
        self.sender.offer(BURST);
        let start = clock::cycles();
        measured(&mut self.worker);
        let cycles = clock::cycles().wrapping_sub(start);
        assert_eq!(self.sender.used(), self.sender.index, "not all was taken");
        assert_eq!(self.receiver.used(), self.sender.index, "not all was sent");
        self.receiver.offer(BURST);
        cycles
    }
}

#[inline(never)]
fn measured(worker: &mut Worker) {
    worker.round();
}

fn exact(fields: &[(Field, u128)]) -> Match {
    let mut matches = Match { key: Key::default(), mask: Mask::EMPTY, ..Match::default() };
    for &(field, value) in fields {
        matches.key.set(field, value);
        matches.mask.set_exact(field);
    }
    matches
}

fn switch(row: &Row) -> Switch {
    let flows = row.flows + 64;
    let config = PlannerConfig { workers: 1, ports: 2, flows, masks: 64, seed: 1 };
    let l1 = L1Config { capacity: 1 << 17, ports: 2, pending_ticks: 10, pending_misses: 4, age_ticks: 1000 };
    let mut planner = Planner::new(config);
    let mut switch = Switch::new(SwitchConfig { l1, flows, seed: 1 });
    for id in [A, B] {
        for update in planner.add_port(id, u32::MAX).expect("the slot is free").0 {
            drop(switch.apply(update));
        }
    }
    let mut actions = vec![];
    if row.rewrite {
        let set = |field, value| FieldSet { field, value, mask: (1 << 48) - 1 };
        let sets = vec![set(Field::EthSrc, 0x0200_0000_0009), set(Field::EthDst, 0x0200_0000_000a)];
        actions.push(Action::Set(SetGroup::Eth, sets));
        actions.push(Action::DecTtl(vec![]));
    }
    actions.push(Action::Output(PortRef::Ours(B)));
    let mut matches = vec![exact(&[(Field::RecircId, 0), (Field::InPort, 0)])];
    if row.exact {
        let flow = |i: usize| {
            let source = u128::from(10u32 << 24 | i as u32);
            let common = [(Field::RecircId, 0), (Field::InPort, 0), (Field::EthType, ETH_P_IP as u128)];
            let fields = [
                (Field::IpProto, ipproto::UDP as u128),
                (Field::IpFrag, 0),
                (Field::Ipv4Src, source),
                (Field::Ipv4Dst, 0x0a01_0001),
                (Field::TpSrc, i as u128),
                (Field::TpDst, 53),
            ];
            exact(&[&common[..], &fields].concat())
        };
        matches = (0..row.flows).map(flow).collect();
    }
    for matches in matches {
        let spec = FlowSpec { matches, actions: actions.clone(), ufid: None, held: None };
        let (_, updates) = planner.add(A, Source::Explicit, spec, IfExists::Refuse).expect("a new flow");
        for update in updates {
            drop(switch.apply(update));
            drop(switch.step());
        }
    }
    switch
}

fn main() {
    let arguments: Vec<String> =
        std::env::args().skip(1).filter(|argument| !argument.starts_with("--")).collect();
    let wanted = arguments.first();
    let bursts: usize = arguments.get(1).and_then(|n| n.parse().ok()).unwrap_or(20_000);
    println!("{:18} {:>12} {:>12}  cycles a packet", "", "best", "median");
    for row in ROWS.iter().filter(|row| wanted.is_none_or(|name| row.name == name)) {
        let mut bench = Bench::new(row);
        let rounds = if wanted.is_some() && arguments.len() > 1 { 1 } else { ROUNDS };
        let mut results: Vec<f64> = (0..rounds)
            .map(|_| (0..bursts).map(|_| bench.step()).sum::<u64>() as f64 / (bursts * BURST as usize) as f64)
            .collect();
        results.sort_by(f64::total_cmp);
        println!("{:18} {:12.1} {:12.1}", row.name, results[0], results[results.len() / 2]);
    }
}
