//! Ports against the `vhost` crate's front-end, over real sockets, with a small worker that forwards between two ports.
#![allow(unsafe_code)]

mod relay;

use std::fs;
use std::os::fd::AsRawFd;
use std::os::unix::fs::{FileTypeExt, PermissionsExt};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Mutex};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use event_manager::{EventManager, SubscriberOps};
use tempfile::TempDir;
use vhost::vhost_user::message::{VhostUserHeaderFlag, VhostUserProtocolFeatures};
use vhost::vhost_user::{Frontend, VhostUserFrontend};
use vhost::{VhostBackend, VhostUserMemoryRegionInfo, VringConfigData};
use vm_memory::{FileOffset, GuestAddress, GuestMemoryBackend, GuestMemoryMmap, GuestMemoryRegion};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use super::*;
use crate::port_config::{Mode, Socket};
use crate::quiesce::{Quiescence, WorkerEpoch};
use crate::socket_file::ListenError;
use crate::virtio::testing::{Driver, MODERN, REGIONS, WRITE, signals};
use crate::virtio::{Burst, Frame, GuestRx, GuestTx, NetHeader, RingError};

/// Where guest-physical address 0 is in the front-end's address space.
const FRONTEND: u64 = 0x7f00_0000_0000;
const PROTOCOL_FEATURES: u64 = 1 << 30;
const PATIENCE: Duration = Duration::from_secs(20);

/// Two ports, the event loop that drives them, and a worker that forwards each port's frames to the other.
struct Bed {
    dir: TempDir,
    quiescence: Arc<Quiescence>,
    ports: Vec<Arc<Mutex<VhostUserPort>>>,
    events: Vec<Receiver<PortEvent>>,
    stop: Arc<AtomicBool>,
    threads: Vec<JoinHandle<()>>,
}

impl Bed {
    fn new(mode: Mode) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let quiescence = Arc::new(Quiescence::new());
        let (mut ports, mut events) = (vec![], vec![]);
        for name in ["a", "b"] {
            let (tx, rx) = channel();
            ports.push(Arc::new(Mutex::new(port(&quiescence, dir.path(), name, mode, tx).unwrap())));
            events.push(rx);
        }
        let stop = Arc::new(AtomicBool::new(false));
        let subscribers = ports.clone();
        let stopped = stop.clone();
        let event_loop = thread::spawn(move || {
            let mut manager = EventManager::new().unwrap();
            for port in subscribers {
                manager.add_subscriber(port);
            }
            while !stopped.load(Ordering::Relaxed) {
                manager.run_with_timeout(20).unwrap();
            }
        });
        let shared: Vec<_> = ports.iter().map(|p| p.lock().unwrap().shared().clone()).collect();
        let (stopped, registry) = (stop.clone(), quiescence.clone());
        let worker = thread::spawn(move || work(&registry, &shared, &stopped));
        Bed { dir, quiescence, ports, events, stop, threads: vec![event_loop, worker] }
    }

    fn socket(&self, i: usize) -> std::path::PathBuf {
        self.dir.path().join(["a", "b"][i])
    }

    fn shared(&self, i: usize) -> Arc<PortShared> {
        self.ports[i].lock().unwrap().shared().clone()
    }

    fn connect(&self, i: usize) -> Guest {
        Guest::new(UnixStream::connect(self.socket(i)).unwrap(), MODERN)
    }

    /// Two running guests.
    fn guests(&self) -> [Guest; 2] {
        [0, 1].map(|i| {
            let mut guest = self.connect(i);
            guest.start();
            assert_eq!(self.event(i), PortEvent::LinkUp { queues: 1 });
            guest
        })
    }

    fn event(&self, i: usize) -> PortEvent {
        self.events[i].recv_timeout(PATIENCE).expect("no event")
    }
}

impl Drop for Bed {
    fn drop(&mut self) {
        for port in &self.ports {
            port.lock().unwrap().shutdown();
        }
        self.stop.store(true, Ordering::Relaxed);
        self.quiescence.publish();
        for t in self.threads.drain(..) {
            t.join().unwrap();
        }
    }
}

fn port(
    quiescence: &Arc<Quiescence>,
    dir: &Path,
    name: &str,
    mode: Mode,
    events: Sender<PortEvent>,
) -> Result<VhostUserPort, PortError> {
    let socket = Socket { mode, ..Socket::new(dir.join(name)) };
    let events = Mutex::new(events);
    let on_event = move |e| {
        // A test that no longer listens is over.
        let _ = events.lock().unwrap().send(e);
    };
    VhostUserPort::new(name, 1, socket, None, quiescence.clone(), Box::new(on_event))
}

/// What the worker holds of two ports.
#[derive(Default)]
struct Held {
    tx: [Option<GuestTx>; 2],
    rx: [Option<Arc<GuestRx>>; 2],
}

impl Held {
    fn refresh(&mut self, epoch: &mut WorkerEpoch, ports: &[Arc<PortShared>]) {
        epoch.quiescent();
        if epoch.changed() {
            for (i, port) in ports.iter().enumerate() {
                port.take_tx(0, &mut self.tx[i]);
                self.rx[i] = port.rx(0);
            }
        }
    }
}

/// Forwards between two ports, losing nothing: one frame at a time, which waits for its receiver. Sleeps whenever there
/// is nothing to do.
fn work(quiescence: &Arc<Quiescence>, ports: &[Arc<PortShared>], stop: &AtomicBool) {
    let mut epoch = quiescence.register("worker").unwrap();
    let mut held = Held::default();
    let mut burst = Burst::new();
    while !stop.load(Ordering::Relaxed) {
        held.refresh(&mut epoch, ports);
        let mut idle = true;
        for i in 0..2 {
            if held.rx[1 - i].is_none() {
                // Frames for a guest that is not there stay where they are.
                continue;
            }
            let Some(tx) = &mut held.tx[i] else { continue };
            match tx.receive(&mut burst, 1) {
                Ok(0) => continue,
                Ok(_) => idle = false,
                Err(e) => {
                    ports[i].fault(tx_ring(0), e);
                    continue;
                }
            }
            let id = tx.id();
            let (header, len) = (NetHeader::default(), burst.frames()[0].len);
            let frame = Frame { header, head: &[], body: &[], tail: burst.segments(0), tail_offset: 0, len };
            // Until it is sent, or its ring is restarted, which offers it again.
            while held.tx[i].as_ref().is_some_and(|tx| tx.id() == id) && !stop.load(Ordering::Relaxed) {
                if let Some(rx) = &held.rx[1 - i]
                    && rx.send(&[frame]).sent == 1
                {
                    rx.notify();
                    break;
                }
                held.refresh(&mut epoch, ports);
                thread::yield_now();
            }
            if let Some(tx) = &mut held.tx[i] {
                tx.complete(&mut burst);
            }
        }
        if idle && epoch.sleep_begin() {
            let armed = held.tx.iter_mut().flatten().map(GuestTx::arm).fold(true, |all, one| all & one);
            let kicks = held.tx.iter().flatten().filter_map(|t| t.kick_fd());
            let fds: Vec<_> = kicks.chain([epoch.wake_fd()]).map(|f| f.as_raw_fd()).collect();
            // A frame for an absent guest keeps its ring from being armed.
            wait_readable(&fds, if armed { 10_000 } else { 1 });
            epoch.sleep_end();
            for tx in held.tx.iter_mut().flatten() {
                tx.disarm();
                tx.clear_kick();
            }
        }
    }
}

fn wait_readable(fds: &[i32], ms: i32) {
    let mut fds: Vec<_> =
        fds.iter().map(|&fd| libc::pollfd { fd, events: libc::POLLIN, revents: 0 }).collect();
    // SAFETY: `fds` is an array of that many pollfds.
    unsafe { libc::poll(fds.as_mut_ptr(), fds.len() as u64, ms) };
}

/// A guest with one queue pair: its front-end, memory, and drivers of both rings.
struct Guest {
    frontend: Frontend,
    /// The same connection, for what the front-end library does otherwise than QEMU.
    stream: UnixStream,
    mem: Arc<GuestMemoryMmap<()>>,
    rx: Driver,
    tx: Driver,
    sent: u32,
    received: u32,
}

const SIZE: u16 = 64;
const BUF: u64 = 0x2_0000;

impl Guest {
    fn new(stream: UnixStream, features: u64) -> Self {
        let ranges = REGIONS.map(|(at, len)| {
            let file = tempfile::tempfile().unwrap();
            file.set_len(len as u64).unwrap();
            (GuestAddress(at), len, Some(FileOffset::new(file, 0)))
        });
        let mem = Arc::new(GuestMemoryMmap::from_ranges_with_files(ranges).unwrap());
        let rx = Driver::at(mem.clone(), 0x1000, SIZE, features);
        let tx = Driver::at(mem.clone(), 0x8000, SIZE, features);
        let frontend = Frontend::from_stream(stream.try_clone().unwrap(), 2);
        Guest { frontend, stream, mem, rx, tx, sent: 0, received: 0 }
    }

    fn regions(&self) -> Vec<VhostUserMemoryRegionInfo> {
        self.mem
            .iter()
            .map(|r| VhostUserMemoryRegionInfo {
                guest_phys_addr: r.start_addr().0,
                memory_size: r.len(),
                userspace_addr: FRONTEND + r.start_addr().0,
                mmap_offset: 0,
                mmap_handle: r.file_offset().unwrap().file().as_raw_fd(),
            })
            .collect()
    }

    /// What QEMU does when a driver comes up.
    fn start(&mut self) {
        self.negotiate();
        self.frontend.set_mem_table(&self.regions()).unwrap();
        self.start_ring(0);
        self.start_ring(1);
        for head in 0..SIZE {
            self.rx.chain(head, &[(0x40_0000 + 0x800 * u64::from(head), 0x800)], WRITE);
            self.rx.offer(head);
        }
    }

    fn negotiate(&mut self) {
        let f = &mut self.frontend;
        f.set_owner().unwrap();
        let offered = f.get_features().unwrap();
        assert_eq!(offered & MODERN, MODERN);
        assert_eq!(offered & (1 << 26 | 1 << 33), 1 << 26, "dirty pages are logged; there is no IOMMU");
        assert_eq!(offered >> 34 & 3, 3, "packed, in order");
        let protocol = f.get_protocol_features().unwrap();
        let wanted = VhostUserProtocolFeatures::MQ
            | VhostUserProtocolFeatures::REPLY_ACK
            | VhostUserProtocolFeatures::LOG_SHMFD
            | VhostUserProtocolFeatures::CONFIGURE_MEM_SLOTS;
        assert_eq!(protocol, wanted);
        f.set_protocol_features(wanted).unwrap();
        f.set_hdr_flags(VhostUserHeaderFlag::NEED_REPLY);
        f.set_features(MODERN | PROTOCOL_FEATURES).unwrap();
    }

    fn ring_config(&self, i: usize) -> VringConfigData {
        let c = self.driver(i).config;
        VringConfigData {
            queue_max_size: c.size,
            queue_size: c.size,
            flags: 0,
            desc_table_addr: FRONTEND + c.desc,
            used_ring_addr: FRONTEND + c.used,
            avail_ring_addr: FRONTEND + c.avail,
            log_addr: None,
        }
    }

    fn driver(&self, i: usize) -> &Driver {
        if i == 0 { &self.rx } else { &self.tx }
    }

    fn start_ring(&mut self, i: usize) {
        let f = &mut self.frontend;
        f.set_vring_num(i, SIZE).unwrap();
        let config = self.ring_config(i);
        let d = self.driver(i);
        self.frontend.set_vring_base(i, d.base.get()).unwrap();
        self.frontend.set_vring_addr(i, &config).unwrap();
        self.frontend.set_vring_call(i, &d.called).unwrap();
        self.frontend.set_vring_kick(i, &d.kick).unwrap();
        self.frontend.set_vring_enable(i, true).unwrap();
    }

    /// What QEMU does when a driver goes away.
    fn stop_ring(&mut self, i: usize) -> u16 {
        let base = self.frontend.get_vring_base(i).unwrap() as u16;
        self.driver(i).base.set(base);
        base
    }

    /// Transmits the next numbered frame, if the ring has room, and kicks.
    fn send(&mut self) -> bool {
        while self.tx.take_used().is_some() {}
        if self.tx.avail_idx.wrapping_sub(self.tx.used_seen) == SIZE {
            return false;
        }
        let head = self.tx.avail_idx % SIZE;
        let at = BUF + 0x100 * u64::from(head);
        let mut data = [0u8; 12 + 100];
        data[12..16].copy_from_slice(&self.sent.to_le_bytes());
        self.tx.write(at, &data);
        self.tx.desc(head, at, data.len() as u32, 0, 0);
        self.tx.offer(head);
        self.sent += 1;
        self.tx.kick.write(1).unwrap();
        true
    }

    /// Takes all frames that have arrived, which must be the next ones, and offers their buffers again.
    fn receive(&mut self) {
        while let Some((id, len)) = self.rx.take_used() {
            assert_eq!(len, 112);
            let data = self.rx.read(0x40_0000 + 0x800 * u64::from(id) + 12, 4);
            assert_eq!(
                u32::from_le_bytes(data.try_into().unwrap()),
                self.received,
                "lost, doubled or reordered"
            );
            self.received += 1;
            self.rx.offer(id as u16);
        }
    }
}

/// Has `from` send `n` frames, and waits until `to` has them.
fn exchange(from: &mut Guest, to: &mut Guest, n: u32) {
    let until = from.sent + n;
    let deadline = Instant::now() + PATIENCE;
    while to.received < until {
        if from.sent < until {
            from.send();
        }
        to.receive();
        assert!(Instant::now() < deadline, "{} of {until} frames arrived", to.received);
        thread::yield_now();
    }
}

#[test]
fn packets_go_both_ways_and_rings_stop_and_go_on() {
    let bed = Bed::new(Mode::Server);
    let [mut a, mut b] = bed.guests();
    let shared = bed.shared(0);
    assert!(shared.link_up());
    assert_eq!((shared.queues(), shared.max_queues(), shared.features() & MODERN), (1, 1, MODERN));
    exchange(&mut a, &mut b, 500);
    exchange(&mut b, &mut a, 300);
    assert!(signals(&b.rx.called) > 0, "the receiver is interrupted");
    // Let the worker fall asleep; a kick must wake it.
    thread::sleep(Duration::from_millis(50));
    exchange(&mut a, &mut b, 1);

    // Addresses set again on a running ring, as QEMU does when it toggles dirty logging: nothing is rewound.
    b.frontend.set_vring_addr(0, &b.ring_config(0)).unwrap();
    exchange(&mut a, &mut b, 100);
    // The call descriptor is swapped under a running ring.
    let masked = EventFd::new(EFD_NONBLOCK).unwrap();
    b.frontend.set_vring_call(0, &masked).unwrap();
    assert_eq!(signals(&masked), 1, "what may have been missed while there was none");
    signals(&b.rx.called);
    // With the event index at the next frame, it must interrupt.
    b.rx.set_used_event(b.rx.used_idx());
    exchange(&mut a, &mut b, 1);
    wait_readable(&[masked.as_raw_fd()], 10_000);
    assert_eq!((signals(&masked), signals(&b.rx.called)), (1, 0));

    assert_eq!(a.stop_ring(1), 602);
    assert_eq!(bed.event(0), PortEvent::LinkDown);
    assert!(!shared.link_up());
    assert_eq!(a.stop_ring(0), 300);
    assert_eq!(b.stop_ring(0), 602);
    assert_eq!(bed.event(1), PortEvent::LinkDown);
    // What is sent meanwhile is waiting in the ring.
    assert!(a.send());
    a.start_ring(0);
    a.start_ring(1);
    b.start_ring(0);
    exchange(&mut a, &mut b, 100);
    exchange(&mut b, &mut a, 100);
    // Disabled and enabled again, without a stop.
    a.frontend.set_vring_enable(1, false).unwrap();
    assert!(a.send());
    thread::sleep(Duration::from_millis(20));
    b.receive();
    assert_eq!(b.received, a.sent - 1, "a disabled ring is left alone");
    a.frontend.set_vring_enable(1, true).unwrap();
    exchange(&mut a, &mut b, 5);
}

#[test]
fn a_ring_without_a_kick_is_polled() {
    use std::io::Write;
    let bed = Bed::new(Mode::Server);
    let [mut a, mut b] = bed.guests();
    for _ in 0..2 {
        let base = a.stop_ring(1);
        assert_eq!(bed.event(0), PortEvent::LinkDown);
        assert!(!bed.shared(0).link_up());
        a.frontend.set_vring_base(1, base).unwrap();
        // SET_VRING_KICK of ring 1 with the flag that says that no descriptor comes with it.
        let message = [12u32, 1, 8, 1 | 1 << 8, 0].map(u32::to_ne_bytes).concat();
        a.stream.write_all(&message).unwrap();
        assert_eq!(bed.event(0), PortEvent::LinkUp { queues: 1 });
        exchange(&mut a, &mut b, 100);
        // The worker has nothing to do, and nobody wakes it.
        thread::sleep(Duration::from_millis(20));
        exchange(&mut a, &mut b, 1);
    }
}

#[test]
fn a_guest_that_vanishes_comes_back() {
    let bed = Bed::new(Mode::Server);
    let [a, mut b] = bed.guests();
    drop(a);
    assert_eq!(bed.event(0), PortEvent::LinkDown);
    assert_eq!(bed.shared(0).features(), 0);
    b.send();
    let mut a = bed.connect(0);
    a.start();
    assert_eq!(bed.event(0), PortEvent::LinkUp { queues: 1 });
    exchange(&mut b, &mut a, 50);
    b.received = 0;
    exchange(&mut a, &mut b, 50);
    // One that connects meanwhile waits its turn; garbage ends its connection and nothing else.
    use std::io::{Read, Write};
    let mut garbage = UnixStream::connect(bed.socket(0)).unwrap();
    garbage.write_all(&[0xff; 64]).unwrap();
    drop(a);
    assert_eq!(bed.event(0), PortEvent::LinkDown);
    garbage.set_read_timeout(Some(PATIENCE)).unwrap();
    // Reset, or end of file.
    assert!(matches!(garbage.read(&mut [0; 64]), Ok(0) | Err(_)));
    let mut a = bed.connect(0);
    a.start();
    assert_eq!(bed.event(0), PortEvent::LinkUp { queues: 1 });
    b.received = 0;
    exchange(&mut a, &mut b, 50);
}

/// Ends a companion thread, also when its test fails.
struct SetOnDrop<'a>(&'a AtomicBool);

impl Drop for SetOnDrop<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

#[test]
fn memory_changes_under_traffic() {
    let bed = Bed::new(Mode::Server);
    let [mut a, mut b] = bed.guests();
    let stop = AtomicBool::new(false);
    let (fa, mut fb) = (a.frontend.clone(), b.frontend.clone());
    let (ra, rb) = (a.regions(), b.regions());
    let extra = tempfile::tempfile().unwrap();
    extra.set_len(0x1_0000).unwrap();
    let extra_region = VhostUserMemoryRegionInfo {
        guest_phys_addr: 0x80_0000,
        memory_size: 0x1_0000,
        userspace_addr: FRONTEND + 0x80_0000,
        mmap_offset: 0,
        mmap_handle: extra.as_raw_fd(),
    };
    thread::scope(|s| {
        let done = SetOnDrop(&stop);
        let changes = s.spawn(|| {
            let mut n = 0;
            while !stop.load(Ordering::Relaxed) {
                fa.set_mem_table(&ra).unwrap();
                fb.add_mem_region(&extra_region).unwrap();
                fb.remove_mem_region(&extra_region).unwrap();
                fb.set_mem_table(&rb).unwrap();
                n += 4;
            }
            n
        });
        for _ in 0..20 {
            exchange(&mut a, &mut b, 200);
            exchange(&mut b, &mut a, 200);
        }
        drop(done);
        assert!(changes.join().unwrap() > 20, "memory hardly changed");
    });
    assert_eq!(a.stop_ring(1), 4000);
    assert_eq!(b.stop_ring(0), 4000);
    // Without the memory that holds it, a ring cannot run; the connection and the port live on.
    b.start_ring(0);
    assert_eq!((bed.event(0), bed.event(1)), (PortEvent::LinkDown, PortEvent::LinkDown));
    assert_eq!(bed.event(1), PortEvent::LinkUp { queues: 1 });
    b.frontend.set_mem_table(&rb[2..]).unwrap();
    // Told by two threads, in either order.
    let mut told = vec![];
    while !told.contains(&PortEvent::LinkDown) || told.len() < 2 {
        told.push(bed.event(1));
    }
    let outside =
        |e: &PortEvent| matches!(e, PortEvent::Fault(text) if text.contains("outside of guest memory"));
    assert!(told.iter().any(outside), "{told:?}");
    b.frontend.set_mem_table(&rb).unwrap();
    // Both rings had the fault, which may be told once or twice.
    let next = std::iter::repeat_with(|| bed.event(1)).find(|e| !matches!(e, PortEvent::Fault(_)));
    assert_eq!(next, Some(PortEvent::LinkUp { queues: 1 }));
}

#[test]
fn a_malformed_ring_stops_until_its_driver_resets_it() {
    let bed = Bed::new(Mode::Server);
    let [mut a, mut b] = bed.guests();
    exchange(&mut a, &mut b, 10);
    a.tx.desc(20, 1 << 50, 100, 0, 0);
    a.tx.offer(20);
    a.tx.kick.write(1).unwrap();
    let error = RingError::Address { addr: 1 << 50, len: 100 };
    assert_eq!(bed.event(0), PortEvent::Fault(format!("transmit ring of queue 0 stopped: {error}")));
    assert_eq!(bed.shared(0).faults(), 1);
    // The other direction is not concerned.
    exchange(&mut b, &mut a, 10);
    // The driver resets: a new ring.
    assert_eq!(a.stop_ring(1), 10);
    a.tx.start_at(0);
    a.start_ring(1);
    exchange(&mut a, &mut b, 10);
}

#[test]
fn a_client_connects_when_there_is_somebody() {
    let bed = Bed::new(Mode::Client);
    // Attempts fail at first.
    thread::sleep(Duration::from_millis(100));
    let listeners = [0, 1].map(|i| UnixListener::bind(bed.socket(i)).unwrap());
    let accept = |i: usize| {
        let mut guest = Guest::new(listeners[i].accept().unwrap().0, MODERN);
        guest.start();
        assert_eq!(bed.event(i), PortEvent::LinkUp { queues: 1 });
        guest
    };
    let (mut a, mut b) = (accept(0), accept(1));
    exchange(&mut a, &mut b, 100);
    drop(b);
    assert_eq!(bed.event(1), PortEvent::LinkDown);
    let mut b = accept(1);
    b.received = a.sent;
    exchange(&mut a, &mut b, 100);
}

#[test]
fn a_front_end_without_protocol_features_starts_rings_at_once() {
    let bed = Bed::new(Mode::Server);
    let a = bed.connect(0);
    a.frontend.set_owner().unwrap();
    a.frontend.get_features().unwrap();
    a.frontend.set_features(MODERN).unwrap();
    a.frontend.set_mem_table(&a.regions()).unwrap();
    for i in [0, 1] {
        a.frontend.set_vring_num(i, SIZE).unwrap();
        a.frontend.set_vring_addr(i, &a.ring_config(i)).unwrap();
        a.frontend.set_vring_base(i, 0).unwrap();
        a.frontend.set_vring_kick(i, &a.driver(i).kick).unwrap();
    }
    assert_eq!(bed.event(0), PortEvent::LinkUp { queues: 1 });
}

#[test]
fn sockets_are_not_stolen() {
    let dir = tempfile::tempdir().unwrap();
    let q = Arc::new(Quiescence::new());
    let make = |name: &str| port(&q, dir.path(), name, Mode::Server, channel().0);
    let path = dir.path().join("p");
    let first = make("p").unwrap();
    let mode = fs::metadata(&path).unwrap().permissions().mode();
    assert_eq!(mode & 0o777, 0o660);
    assert!(matches!(make("p"), Err(PortError::Socket(ListenError::Live(p))) if p == path));
    drop(first);
    assert!(!path.exists(), "removed at the end");
    // Stale: bound once, nobody listens.
    drop(UnixListener::bind(&path).unwrap());
    assert!(fs::metadata(&path).unwrap().file_type().is_socket());
    let second = make("p").unwrap();
    // Replaced behind our back: not ours to remove.
    fs::remove_file(&path).unwrap();
    let _other = UnixListener::bind(&path).unwrap();
    drop(second);
    assert!(path.exists());
    fs::write(dir.path().join("file"), "").unwrap();
    assert!(matches!(make("file"), Err(PortError::Socket(ListenError::NotASocket(_)))));
    assert!(matches!(make("no/such/dir"), Err(PortError::Socket(ListenError::Io(..)))));
}

#[test]
fn queue_pairs_come_and_go() {
    let (events, told) = channel();
    let events = Mutex::new(events);
    let on_event = Box::new(move |e| events.lock().unwrap().send(e).unwrap());
    let port = PortShared::new("mq", 2, None, Arc::new(Quiescence::new()), on_event).unwrap();
    let ranges = REGIONS.map(|(a, n)| (GuestAddress(a), n));
    let mem = Arc::new(GuestMemoryMmap::from_ranges(&ranges).unwrap());
    let rings: Vec<_> = (0..4).map(|i| Driver::at(mem.clone(), 0x1000 * (i + 1), 16, MODERN)).collect();
    let run = |ring: usize, on: bool| {
        let c = rings[ring].config;
        port.update_ring(ring, |r| {
            (r.size, r.addresses) = (c.size, Some((c.desc, c.avail, c.used)));
            (r.ready, r.enabled) = (on, true);
        });
    };
    port.update(|setup| (setup.memory, setup.features) = (Some(rings[0].regions()), MODERN));
    run(rx_ring(1), true);
    run(tx_ring(1), true);
    run(tx_ring(0), true);
    assert!(!port.link_up() && told.try_recv().is_err(), "the first pair decides");
    run(rx_ring(0), true);
    assert_eq!(told.try_recv(), Ok(PortEvent::LinkUp { queues: 2 }));
    assert_eq!((port.queues(), port.max_queues()), (2, 2));

    let mut slots = [None, None];
    for (queue, slot) in slots.iter_mut().enumerate() {
        port.take_tx(queue, slot);
        assert!(slot.is_some() && port.rx(queue).is_some());
        let (id, mut other) = (slot.as_ref().map(GuestTx::id), None);
        port.take_tx(queue, slot);
        assert_eq!(slot.as_ref().map(GuestTx::id), id, "kept while it runs");
        port.take_tx(queue, &mut other);
        assert!(other.is_none(), "a ring has one owner");
        // Another worker takes it as it stands when the first has given it back.
        port.give_back_tx(queue, slot.take().unwrap());
        port.take_tx(queue, slot);
        assert_eq!(slot.as_ref().map(GuestTx::id), id, "the same ring");
    }
    // One that was stopped meanwhile is not for another.
    let mut other = None;
    port.give_back_tx(0, rings[2].tx());
    port.take_tx(0, &mut other);
    assert!(other.is_none());
    let rx = port.rx(1).unwrap();
    run(rx_ring(1), false);
    assert!(rx.is_stopped());
    run(tx_ring(1), false);
    assert_eq!(told.try_recv(), Ok(PortEvent::LinkUp { queues: 1 }));
    for (queue, slot) in slots.iter_mut().enumerate() {
        port.take_tx(queue, slot);
        assert_eq!((slot.is_some(), port.rx(queue).is_some()), (queue == 0, queue == 0));
    }
    port.disconnect();
    assert_eq!(told.try_recv(), Ok(PortEvent::LinkDown));
    let mut none = None;
    port.take_tx(7, &mut none);
    assert!(none.is_none() && port.rx(7).is_none(), "no such queue");
}
