//! Queues that move from worker to worker while packets flow: every packet arrives or is counted, and those of a flow arrive
//! in the order in which they were sent. Workers, host path and ports are real and in this process; guests are played by the
//! frontend library.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use backend::counters::PortCounters;
use backend::datapath::{Datapath, DatapathPort, Moved, PortSettings};
use backend::host::bridge::{Bridge, Vlans};
use backend::host::path::HostPath;
use backend::host::{FlowTable, HostPort};
use backend::port_config::{Socket, VlanMode};
use backend::vhost::VhostUserPort;
use backend::worker::rings::Rings;
use event_manager::{EventManager, MutEventSubscriber, SubscriberOps};
use qemu_tests::frontend::packet::Packet;
use qemu_tests::frontend::{Frontend, Layout, NetHeader, Prepared, QueuePair};
use switch_core::action::{Action, PortRef};
use switch_core::drop::DropReason;
use switch_core::flow::{FlowSpec, Match, Source};
use switch_core::key::{Field, Key, Mask};
use tempfile::TempDir;

/// Longer than anything here takes on a busy machine.
const DEADLINE: Duration = Duration::from_secs(60);
const WORKERS: usize = 2;
/// Queue pairs of each port.
const QUEUES: usize = 2;
/// Flows; each is sent on one queue. Every other one is the host's to carry out.
const FLOWS: usize = 16;
/// Moves that a test waits for.
const MOVES: u64 = 500;
/// Packets that a test waits for.
const PACKETS: u64 = 100_000;
/// Where a test's own bytes are in a packet: behind Ethernet, IPv4 and UDP.
const PAYLOAD: usize = 42;

fn lock<T: ?Sized>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Two workers and two ports, "a" and "b".
struct Bed {
    datapath: Datapath,
    host: Option<HostPath>,
    ports: Vec<DatapathPort>,
    vhosts: Vec<Arc<Mutex<VhostUserPort>>>,
    stop: Arc<AtomicBool>,
    events: Option<JoinHandle<()>>,
    dir: TempDir,
}

impl Bed {
    fn new() -> Bed {
        let dir = tempfile::tempdir().unwrap();
        let (mut datapath, ends) = Datapath::start(&[0, 1], 1 << 14, 64).unwrap();
        let bridge = Box::new(Bridge::new(300_000, 64));
        let host = HostPath::spawn(bridge, ends.links, datapath.flows.clone(), ends.waker).unwrap();
        let (mut ports, mut vhosts) = (Vec::new(), Vec::new());
        for name in ["a", "b"] {
            let id = datapath.reserve_slot().unwrap();
            let quiescence = datapath.quiescence.clone();
            let socket = Socket::new(dir.path().join(name));
            let vhost = VhostUserPort::new(name, QUEUES, socket, None, quiescence, Box::new(|_| {})).unwrap();
            let rings = Rings::Guest(vhost.shared().clone());
            let settings =
                PortSettings { name, polled_by: &[0, 1], mtu: 1500, max_masks: 64, miss_rate: 10_000_000 };
            let port = datapath.add_port(id, &rings, settings).unwrap();
            let vlans = Vlans::from(&VlanMode::Trunk { vlans: None, native: 0 });
            let (name, polled_by) = (name.to_owned(), port.polled_by.clone());
            host.port_added(HostPort { id, name, vlans, mtu: 1500, is_device: false, polled_by }).unwrap();
            ports.push(port);
            vhosts.push(Arc::new(Mutex::new(vhost)));
        }
        let stop = Arc::new(AtomicBool::new(false));
        let (stopped, subscribers) = (stop.clone(), vhosts.clone());
        let events = thread::spawn(move || {
            let mut manager = EventManager::<Arc<Mutex<dyn MutEventSubscriber + Send>>>::new().unwrap();
            for port in subscribers {
                manager.add_subscriber(port);
            }
            while !stopped.load(Ordering::Relaxed) {
                manager.run_with_timeout(20).unwrap();
            }
        });
        Bed { datapath, host: Some(host), ports, vhosts, stop, events: Some(events), dir }
    }

    fn guest(&self, name: &str) -> Frontend {
        let builder = Frontend::builder(self.dir.path().join(name)).queue_pairs(QUEUES);
        builder.start().unwrap()
    }

    /// Flows from "a" to "b": each a flow of its own, by its source port. Every other one has the host carry it out.
    fn add_flows(&self) {
        let mut flows = lock(&self.datapath.flows);
        for flow in 0..FLOWS {
            let mut matches = Match { key: Key::default(), mask: Mask::EMPTY, ..Match::default() };
            for (field, value) in [
                (Field::InPort, self.ports[0].id.slot.into()),
                (Field::RecircId, 0),
                (Field::EthType, 0x0800),
                (Field::IpProto, 17),
                (Field::TpSrc, port_of(flow).into()),
            ] {
                matches.key.set(field, value);
                matches.mask.set_exact(field);
            }
            let actions = vec![Action::Output(PortRef::Ours(self.ports[1].id))];
            let held = (flow % 2 == 1).then(|| "the test".to_owned());
            flows.put(Source::Explicit, FlowSpec { matches, actions, ufid: None, held }).unwrap();
        }
        // What misses before is overtaken by what does not.
        let (marks, start) = (flows.marks(), Instant::now());
        while !marks.iter().all(|mark| mark.is_reached()) {
            assert!(start.elapsed() < DEADLINE, "the workers do not take the flows");
            thread::yield_now();
        }
    }

    /// Moves queues of both ports to the other worker, in turn, until this is so; gives how often it did.
    fn move_about(&mut self, enough: impl Fn(u64) -> bool) -> u64 {
        let (mut moves, mut turn, start) = (0, 0, Instant::now());
        while !enough(moves) {
            assert!(start.elapsed() < DEADLINE, "only {moves} moves");
            turn += 1;
            // Three of four are of the port that sends.
            let (port, queue) = (usize::from(turn % 4 == 0), turn % QUEUES);
            let to = (self.ports[port].polled_by[queue] + 1) % WORKERS;
            let step = self.datapath.begin_move(&self.ports[port], queue, to);
            loop {
                match self.datapath.go_on(&mut self.ports[port], step) {
                    Moved::NotYet => thread::yield_now(),
                    Moved::Kept => break,
                    Moved::Done => {
                        assert_eq!(self.ports[port].polled_by[queue], to);
                        moves += 1;
                        break;
                    }
                }
                assert!(start.elapsed() < DEADLINE, "a move does not end, after {moves}");
            }
            thread::yield_now();
        }
        moves
    }

    fn sum(&self, port: usize, count: impl Fn(&PortCounters) -> u64) -> u64 {
        self.ports[port].counters.iter().map(|counters| count(counters)).sum()
    }

    /// Packets taken from "a", copies that "b" was given, and all drops; and whether the sums balance.
    fn books(&self) -> (u64, u64, u64, bool) {
        let drops = |drops: &backend::counters::Drops| {
            let mut totals = [0; DropReason::COUNT];
            drops.sum_into(&mut totals);
            totals.iter().sum::<u64>()
        };
        let [rx, forwarded, up, rx_drops] = [
            self.sum(0, |c| c.rx_packets.get()),
            self.sum(0, |c| c.rx_forwarded.get()),
            self.sum(0, |c| c.rx_to_host.get()),
            self.sum(0, |c| drops(&c.rx_drops)),
        ];
        let copies: u64 =
            [0, 1].map(|port| self.sum(port, |c| c.fast_copies.get() + c.host_copies.get())).iter().sum();
        let ends: u64 =
            [0, 1].map(|port| self.sum(port, |c| c.tx_packets.get() + drops(&c.tx_drops))).iter().sum();
        let host_drops = self.sum(0, |c| drops(&c.host_drops));
        let lost = rx_drops
            + host_drops
            + [0, 1].map(|port| self.sum(port, |c| drops(&c.tx_drops))).iter().sum::<u64>();
        let balanced =
            rx == forwarded + up + rx_drops && copies == ends && rx == rx_drops + host_drops + copies;
        (rx, self.sum(1, |c| c.tx_packets.get()), lost, balanced)
    }
}

impl Drop for Bed {
    fn drop(&mut self) {
        self.vhosts.iter().for_each(|vhost| lock(vhost).shutdown());
        self.stop.store(true, Ordering::Relaxed);
        let _ = self.events.take().map(JoinHandle::join);
        self.host = None;
        self.datapath.stop();
    }
}

fn port_of(flow: usize) -> u16 {
    1000 + flow as u16
}

/// The queue on which a flow is sent: each has both kinds.
fn queue_of(flow: usize) -> usize {
    flow / 2 % QUEUES
}

/// What sender, receiver and the test tell each other.
#[derive(Default)]
struct Progress {
    sent: AtomicU64,
    received: AtomicU64,
    /// The sender is to end.
    sent_all: AtomicBool,
    /// The receiver is to end when there is nothing more.
    received_all: AtomicBool,
}

/// Sends numbered packets of all flows; with a `window`, no more than so many that have not arrived yet.
fn send(mut queues: Vec<QueuePair>, progress: &Progress, window: Option<u64>) -> Vec<QueuePair> {
    let packet = |flow: usize| {
        let eth = Packet::eth([2, 0, 0, 0, 0, 1], [2, 0, 0, 0, 0, 2]).ipv4([10, 0, 0, 1], [10, 0, 0, 2]);
        eth.udp(port_of(flow), 9).payload(&[0; 16]).build()
    };
    // At least as many frames as a ring has descriptors: one that is used again has been sent.
    let prepare = |(queue, pair): (usize, &QueuePair)| -> Vec<Prepared> {
        let flows: Vec<usize> = (0..FLOWS).filter(|&flow| queue_of(flow) == queue).collect();
        let frames = flows.iter().cycle().take(usize::from(pair.tx.size()).next_multiple_of(flows.len()));
        let (header, layout) = (NetHeader::default(), Layout::single());
        frames.map(|&flow| pair.tx.prepare(&packet(flow), &header, &layout).unwrap()).collect()
    };
    let frames: Vec<Vec<Prepared>> = queues.iter().enumerate().map(prepare).collect();
    let mut next = [0u64; QUEUES];
    while !progress.sent_all.load(Ordering::Relaxed) {
        for ((pair, frames), next) in queues.iter_mut().zip(&frames).zip(&mut next) {
            let on_the_way =
                progress.sent.load(Ordering::Relaxed) - progress.received.load(Ordering::Acquire);
            pair.tx.tx_reap().unwrap();
            let room = window.map_or(u64::MAX, |window| window.saturating_sub(on_the_way));
            let room = room.min(pair.tx.free() as u64).min(16);
            let frame = |number: u64| &frames[(number % frames.len() as u64) as usize];
            // The numbers of a queue: those of each of its flows go up.
            (*next..*next + room).for_each(|number| frame(number).patch(PAYLOAD, &number.to_be_bytes()));
            let sent = pair.tx.tx_batch((*next..*next + room).map(frame)).unwrap() as u64;
            *next += sent;
            progress.sent.fetch_add(sent, Ordering::Relaxed);
        }
        thread::yield_now();
    }
    queues
}

/// Takes packets, with a `pause` after each look, and gives what was out of order.
fn receive(mut queues: Vec<QueuePair>, progress: &Progress, pause: Duration) -> Vec<String> {
    let (mut last, mut faults) = ([None; FLOWS], Vec::new());
    loop {
        let is_all = progress.received_all.load(Ordering::Acquire);
        let mut count = 0;
        for pair in &mut queues {
            let taken = pair.rx.rx_batch(64, |frame| {
                let (mut port, mut number) = ([0; 2], [0; 8]);
                frame.read(34, &mut port);
                frame.read(PAYLOAD, &mut number);
                let (flow, number) =
                    (usize::from(u16::from_be_bytes(port) - port_of(0)), u64::from_be_bytes(number));
                if last[flow].is_some_and(|last| number <= last) {
                    faults.push(format!("flow {flow}: {number} after {:?}", last[flow]));
                }
                last[flow] = Some(number);
            });
            count += taken.unwrap();
        }
        progress.received.fetch_add(count as u64, Ordering::Release);
        if is_all && count == 0 {
            return faults;
        }
        if pause.is_zero() { thread::yield_now() } else { thread::sleep(pause) }
    }
}

/// Sends flows while queues move, and accounts for every packet. Gives how many were sent and how many of them were dropped.
fn flows_while_queues_move(window: Option<u64>, pause: Duration, buffers: usize) -> (u64, u64) {
    let mut bed = Bed::new();
    let (mut a, mut b) = (bed.guest("a"), bed.guest("b"));
    (0..QUEUES).for_each(|queue| b.queue(queue).rx.rx_fill(2048, buffers).unwrap());
    bed.add_flows();
    let progress = Arc::new(Progress::default());
    let (queues, shared) = (a.take_queues(), progress.clone());
    let sender = thread::spawn(move || send(queues, &shared, window));
    let (queues, shared) = (b.take_queues(), progress.clone());
    let receiver = thread::spawn(move || receive(queues, &shared, pause));
    let received = || progress.received.load(Ordering::Relaxed);
    let moves = bed.move_about(|moves| moves >= MOVES && received() >= PACKETS);
    progress.sent_all.store(true, Ordering::Relaxed);
    let _queues = sender.join().unwrap();
    let sent = progress.sent.load(Ordering::Relaxed);
    let start = Instant::now();
    let lost = loop {
        let (taken, given, lost, balanced) = bed.books();
        if balanced && taken == sent && received() == given {
            assert_eq!(taken, given + lost);
            break lost;
        }
        let received = received();
        let late = start.elapsed() > DEADLINE;
        assert!(!late, "{sent} sent, {taken} taken, {given} given, {received} received, {lost} dropped");
        thread::sleep(Duration::from_millis(1));
    };
    progress.received_all.store(true, Ordering::Release);
    let faults = receiver.join().unwrap();
    let first = faults.iter().take(5).collect::<Vec<_>>();
    assert!(faults.is_empty(), "{} of {sent} out of order in {moves} moves: {first:?}", faults.len());
    // Both workers have carried what each queue has sent.
    for (worker, counters) in bed.ports[0].counters.iter().enumerate() {
        assert!(
            (0..QUEUES).all(|queue| counters.queue_cycles[queue].get() > 0),
            "worker {worker} had nothing"
        );
    }
    (sent, lost)
}

#[test]
fn a_guest_that_is_served_in_time_loses_nothing() {
    // There is room at the host and in the receiver's rings for all that is on its way.
    let (sent, lost) = flows_while_queues_move(Some(100), Duration::ZERO, 256);
    assert_eq!(lost, 0, "of {sent}");
}

#[test]
fn what_finds_no_room_is_counted_and_the_rest_stays_in_order() {
    let (sent, lost) = flows_while_queues_move(None, Duration::from_micros(200), 32);
    assert!(lost > 0, "{sent} packets found room: nothing was parked, nothing refused by the host");
}

#[test]
fn rings_that_stop_and_guests_that_leave_meanwhile_take_their_queues_with_them() {
    let mut bed = Bed::new();
    let stop = Arc::new(AtomicBool::new(false));
    let mut guest = bed.guest("a");
    let (asked, moving) = (stop.clone(), Arc::new(AtomicU64::new(0)));
    let moved = moving.clone();
    let driver = thread::spawn(move || {
        let mut rounds = 0;
        let packet = Packet::eth([2, 0, 0, 0, 0, 1], [2, 0, 0, 0, 0, 2]).ipv4([10, 0, 0, 1], [10, 0, 0, 2]);
        while !asked.load(Ordering::Relaxed) {
            for queue in 0..QUEUES {
                let tx = &mut guest.queue(queue).tx;
                for _ in 0..8 {
                    tx.tx(&packet.clone().udp(1, 2).build(), &NetHeader::default()).unwrap();
                }
                // The position that is answered is behind what was taken: it goes on there, once for each packet.
                let ring = 2 * queue + 1;
                guest.stop_ring(ring).unwrap();
                guest.start_ring(ring).unwrap();
                let (tx, start) = (&mut guest.queue(queue).tx, Instant::now());
                while usize::from(tx.size()) > tx.free() {
                    tx.tx_reap().unwrap();
                    assert!(
                        start.elapsed() < DEADLINE,
                        "a ring is forgotten: {} of {}",
                        tx.free(),
                        tx.size()
                    );
                    thread::yield_now();
                }
                rounds += 1;
            }
            if rounds % 16 == 0 {
                guest.disconnect().unwrap();
                guest.start().unwrap();
            }
            moved.store(rounds, Ordering::Relaxed);
        }
        rounds * 8
    });
    let moves = bed.move_about(|moves| moves >= MOVES && moving.load(Ordering::Relaxed) >= 64);
    stop.store(true, Ordering::Relaxed);
    let sent = driver.join().unwrap();
    let start = Instant::now();
    while bed.books().0 != sent {
        assert!(start.elapsed() < DEADLINE, "{sent} sent, {} taken, {moves} moves", bed.books().0);
        thread::sleep(Duration::from_millis(1));
    }
}
