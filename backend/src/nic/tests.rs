//! NICs and their ports against the software NIC of package `nic`, with a worker played by the test.

use super::*;
use crate::frames::outgoing::{Outgoing, Tail};
use crate::frames::software;
use crate::port_config::MAX_QUEUES;
use crate::virtio::{Blocked, Burst, Frame, NetHeader};
use nic::io::{PacketIo, PortCounters, PortEvent, Received, SendCaps, SendError, Steering};
use nic::model::{Bench, Config, smart_nic};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fd::BorrowedFd;
use std::os::fd::AsFd;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};
use switch_core::checksum;
use switch_core::key::Key;
use switch_core::packet::{Gso, Offload, Packet};
use switch_core::parse::{self, Extracted};

/// What can be wrong with a NIC beyond what the model can.
#[derive(Default)]
struct Faults {
    /// It does not answer any more.
    gone: AtomicBool,
    /// It forwards what it gives to us.
    forwards: AtomicBool,
    /// How often it is flushed before it says what it has sent.
    late: AtomicU64,
    /// How often it was flushed.
    flushes: AtomicU64,
}

/// The model's ports with faults.
struct Faulty {
    io: Box<dyn PacketIo>,
    faults: Arc<Faults>,
}

impl Faulty {
    fn check(&self) -> Result<(), NicError> {
        match self.faults.gone.load(Ordering::Relaxed) {
            true => Err(NicError::Device("is gone".into())),
            false => Ok(()),
        }
    }
}

impl PacketIo for Faulty {
    fn ports(&self) -> &[Port] {
        self.io.ports()
    }

    fn receive(&mut self, budget: usize, each: &mut dyn FnMut(Received<'_>)) -> Result<usize, NicError> {
        self.check()?;
        let forwarded = self.faults.forwards.load(Ordering::Relaxed);
        self.io.receive(budget, &mut |received| each(Received { forwarded, ..received }))
    }

    fn send(&mut self, port: u32, frame: &[&[u8]], offload: &Offload) -> Result<(), SendError> {
        self.check().map_err(|_| SendError::Device)?;
        self.io.send(port, frame, offload)
    }

    fn flush(&mut self) -> Result<(), NicError> {
        self.faults.flushes.fetch_add(1, Ordering::Relaxed);
        self.check()?;
        let _ =
            self.faults.late.fetch_update(Ordering::Relaxed, Ordering::Relaxed, |left| left.checked_sub(1));
        self.io.flush()
    }

    fn poll_events(&mut self, events: &mut Vec<PortEvent>) -> Result<(), NicError> {
        self.check()?;
        self.io.poll_events(events)
    }

    fn arm(&mut self) -> Result<bool, NicError> {
        self.check()?;
        self.io.arm()
    }

    fn interrupts(&self) -> Vec<BorrowedFd<'_>> {
        self.io.interrupts()
    }

    fn counters(&self, port: u32) -> Option<PortCounters> {
        let counters = self.io.counters(port)?;
        let is_late = self.faults.late.load(Ordering::Relaxed) > 0;
        Some(PortCounters { sent: if is_late { 0 } else { counters.sent }, ..counters })
    }

    fn queues(&self) -> u8 {
        self.io.queues()
    }

    fn set_steering(&mut self, port: u32, rules: &[Steering]) -> Result<usize, NicError> {
        self.check()?;
        self.io.set_steering(port, rules)
    }
}

/// A NIC on a bench, and what its ports and tables have told.
struct Rig {
    nic: Nic,
    /// Of the NIC as it was opened last.
    bench: Arc<Mutex<Option<Bench>>>,
    faults: Arc<Faults>,
    told: Arc<Mutex<Vec<(String, WireEvent)>>>,
    calls: Arc<Calls>,
}

/// What the owner of the tables was told.
#[derive(Default)]
struct Calls {
    said: Mutex<Vec<String>>,
    tables: Mutex<Option<Box<dyn FlowOffload>>>,
}

fn slots(ports: &PortMap) -> Vec<(u32, u32)> {
    (0..16).filter_map(|slot| Some((slot, ports.by_slot(slot)?))).collect()
}

impl FlowTables for Calls {
    fn opened(&self, nic: &str, tables: Box<dyn FlowOffload>, settings: &FlowSettings, ports: PortMap) {
        *lock(&self.tables) = Some(tables);
        lock(&self.said).push(format!("opened {nic} {:?} {:?}", settings.max_rules, slots(&ports)));
    }

    fn set_ports(&self, nic: &str, ports: PortMap) {
        lock(&self.said).push(format!("ports {nic} {:?}", slots(&ports)));
    }

    fn closed(&self, nic: &str) {
        *lock(&self.tables) = None;
        lock(&self.said).push(format!("closed {nic}"));
    }
}

fn rig() -> Rig {
    rig_with(Config::default())
}

fn rig_with(card: Config) -> Rig {
    let (bench, faults, calls) =
        (Arc::<Mutex<_>>::default(), Arc::<Faults>::default(), Arc::<Calls>::default());
    let (to, with) = (bench.clone(), faults.clone());
    let open = Box::new(move || {
        let (io, flows, bench) = smart_nic(card.clone());
        *lock(&to) = Some(bench);
        let io = Faulty { io: Box::new(io), faults: with.clone() };
        io.check()?;
        let offload: Box<dyn FlowOffload> = Box::new(flows);
        Ok(Opened { driver: "model", io: Box::new(io), offload: Some(offload) })
    });
    let flows = FlowSettings { ignore_fragments: false, max_rules: Some(7) };
    let pci = "0000:01:00.0".parse().unwrap();
    let config = NicConfig { name: "n".into(), pci, queues: 1, offload: true, flows };
    let nic = Nic::start_with(config, Arc::new(Quiescence::new()), Some(calls.clone()), open).unwrap();
    Rig { nic, bench, faults, told: Arc::default(), calls }
}

impl Rig {
    fn bench(&self) -> Bench {
        lock(&self.bench).clone().unwrap()
    }

    /// A started port of the switch in slot `number`, for the NIC's port of that number.
    fn port(&self, number: u32) -> NicPort {
        let (told, name) = (self.told.clone(), format!("p{number}"));
        let tell = name.clone();
        let on_event = Arc::new(move |event| lock(&told).push((tell.clone(), event)));
        let id = PortId { slot: number, generation: 1 };
        let mut port = self.nic.port(id, &name, number, MAX_QUEUES.into(), on_event);
        port.start();
        port
    }

    fn inject(&self, port: u32, frames: impl IntoIterator<Item = Vec<u8>>) {
        for frame in frames {
            self.bench().inject(port, &frame, Instant::now());
        }
    }
}

fn rx(port: &NicPort) -> NicRx {
    let mut slot = None;
    port.shared().take_rx(0, &mut slot);
    slot.expect("the port's queue")
}

fn frame(tag: u16, len: usize) -> Vec<u8> {
    let mut frame = vec![tag as u8; len];
    frame[..2].copy_from_slice(&tag.to_be_bytes());
    frame
}

fn out(head: &[u8]) -> Frame<'_> {
    Frame { header: NetHeader::EMPTY, head, body: &[], tail: &[], tail_offset: 0, len: head.len() as u32 }
}

/// All frames that can be received now.
fn receive(rx: &mut NicRx) -> Vec<Vec<u8>> {
    let mut burst = Burst::new();
    let mut all = Vec::new();
    while rx.receive(&mut burst, 64) > 0 {
        for (i, frame) in burst.frames().iter().enumerate() {
            let mut bytes = vec![0; frame.len as usize];
            assert_eq!(burst.copy_range(i, 0, &mut bytes), bytes.len());
            all.push(bytes);
        }
        rx.complete(&mut burst);
    }
    all
}

fn until(what: &str, mut done: impl FnMut() -> bool) {
    let deadline = Instant::now() + Duration::from_secs(10);
    while !done() {
        assert!(Instant::now() < deadline, "waited in vain until {what}");
        std::thread::sleep(Duration::from_millis(1));
    }
}

fn is_readable(fd: &impl AsFd) -> bool {
    let mut fds = [PollFd::new(fd, PollFlags::IN)];
    poll(&mut fds, Some(&Timespec { tv_sec: 0, tv_nsec: 0 })).unwrap() > 0
}

#[test]
fn frames_are_dealt_to_the_queues_of_their_ports_in_order() {
    let rig = rig();
    let (one, three) = (rig.port(1), rig.port(3));
    let (mut first, mut third) = (rx(&one), rx(&three));
    let all: Vec<_> = (0..100).map(|tag| frame(tag, 60 + usize::from(tag))).collect();
    for (tag, bytes) in all.iter().enumerate() {
        rig.inject([1, 2, 3][tag % 3], [bytes.clone()]);
    }
    let of = |port: usize| all.iter().skip(port).step_by(3).cloned().collect::<Vec<_>>();
    assert_eq!(receive(&mut third), of(2), "whoever asks first receives for all");
    assert_eq!(receive(&mut first), of(0));
    assert_eq!(rig.nic.status().unclaimed, of(1).len() as u64);
    // Longest frames, several times round the buffers.
    for tag in 0..1000 {
        let bytes = frame(tag, 9216);
        rig.inject(1, [bytes.clone()]);
        assert_eq!(receive(&mut first), [bytes]);
    }
    assert_eq!(one.shared().losses(), NicLosses::default());
}

#[test]
fn a_queue_that_is_not_emptied_loses_what_has_no_room() {
    let rig = rig();
    let (one, two) = (rig.port(1), rig.port(2));
    let (mut first, mut second) = (rx(&one), rx(&two));
    rig.inject(1, (0..300).map(|tag| frame(tag, 60)));
    rig.inject(2, [frame(9, 60)]);
    assert_eq!(receive(&mut second).len(), 0, "64 at a time");
    until("all were dealt", || !receive(&mut second).is_empty());
    let lost = one.shared().losses();
    assert_eq!(lost, NicLosses { overrun: 300 - queue::FRAMES as u64, ..NicLosses::default() });
    let kept: Vec<_> = (0..queue::FRAMES as u16).map(|tag| frame(tag, 60)).collect();
    assert_eq!(receive(&mut first), kept);
}

#[test]
fn what_the_nic_has_forwarded_is_counted_and_goes_no_further() {
    let rig = rig();
    let one = rig.port(1);
    let mut first = rx(&one);
    rig.faults.forwards.store(true, Ordering::Relaxed);
    rig.inject(1, [frame(1, 60), frame(2, 60)]);
    assert!(receive(&mut first).is_empty());
    rig.faults.forwards.store(false, Ordering::Relaxed);
    rig.inject(1, [frame(3, 60)]);
    assert_eq!(receive(&mut first), [frame(3, 60)]);
    assert_eq!(rig.nic.status().forwarded, 2);
}

#[test]
fn frames_leave_padded_and_what_cannot_leave_is_said() {
    let rig = rig();
    let one = rig.port(1);
    let tx = one.shared().tx(0).unwrap();
    assert!(one.shared().tx(1).is_none(), "there is one queue");
    let (short, long, longer) = (frame(1, 14), frame(2, 9216), frame(3, 9217));
    let result = tx.send(&[out(&short), out(&long), out(&longer), out(&short)]);
    assert_eq!((result.sent, result.blocked), (2, Some(Blocked::TooBig)));
    assert!(!tx.notify());
    let mut padded = short.clone();
    padded.resize(60, 0);
    assert_eq!(rig.bench().take(1), [padded, long]);
    rig.bench().set_link(1, false);
    until("the link is down", || one.shared().tx(0).is_none());
    assert_eq!(tx.send(&[out(&short)]).blocked, Some(Blocked::Stopped), "who has the ring still");
    assert_eq!(one.shared().losses(), NicLosses::default());
}

#[test]
fn sleepers_are_woken_by_whoever_receives_for_them() {
    let rig = rig();
    let (one, two) = (rig.port(1), rig.port(2));
    let (mut first, mut second) = (rx(&one), rx(&two));
    until("there is nothing left to do", || first.arm());
    assert!(!is_readable(&**first.kick()));
    rig.inject(1, [frame(1, 60)]);
    until("the other worker wakes it", || {
        assert!(!second.has_pending(), "it is not for this one");
        // Not while control has the NIC to itself for a moment.
        is_readable(&**first.kick())
    });
    assert!(!first.arm(), "there is something");
    first.disarm();
    assert_eq!(receive(&mut first).len(), 1);
    // Nobody receives, and the NIC does not interrupt: control looks now and then.
    until("there is nothing left to do", || second.arm());
    rig.inject(2, [frame(2, 60)]);
    until("the sleeper is woken", || is_readable(&**second.kick()));
    assert_eq!(receive(&mut second).len(), 1);
}

#[test]
fn links_and_resets_are_told() {
    let rig = rig();
    let one = rig.port(1);
    assert!(one.shared().link_up());
    rig.bench().set_link(1, false);
    until("the link is down", || !one.shared().link_up());
    rig.bench().set_link(1, true);
    until("the link is up", || one.shared().link_up());
    let told = [WireEvent::Mtu(9194), WireEvent::Link(true), WireEvent::Link(false), WireEvent::Link(true)];
    until("all was told", || lock(&rig.told).len() >= told.len());
    assert_eq!(*lock(&rig.told), told.map(|event| ("p1".to_owned(), event)));
    let mut first = rx(&one);
    rig.bench().reset();
    until("the reset is noticed", || rig.nic.status().resets == 1);
    rig.inject(1, [frame(1, 60)]);
    assert_eq!(receive(&mut first).len(), 1, "ports go on");
}

#[test]
fn a_nic_that_vanishes_is_closed_and_comes_back() {
    let rig = rig();
    let one = rig.port(1);
    let mut slot = Some(rx(&one));
    rig.inject(1, [frame(1, 60), frame(2, 60)]);
    let tx = one.shared().tx(0).unwrap();
    assert_eq!(tx.send(&[out(&frame(3, 60))]).sent, 1);
    assert!(slot.as_ref().unwrap().has_pending());
    rig.faults.gone.store(true, Ordering::Relaxed);
    assert!(tx.notify() || tx.is_stopped(), "the worker notices it itself");
    until("the NIC is closed", || one.status().fault.is_some());
    assert_eq!(one.status().fault.as_deref(), Some("NIC n: the device is gone"));
    assert_eq!(rig.nic.status().fault.as_deref(), Some("the device is gone"));
    assert!(!one.shared().link_up() && one.shared().tx(0).is_none());
    one.shared().take_rx(0, &mut slot);
    assert!(slot.is_none());
    rig.faults.gone.store(false, Ordering::Relaxed);
    until("the NIC is open again", || one.shared().link_up());
    one.shared().take_rx(0, &mut slot);
    rig.inject(1, [frame(4, 60)]);
    assert_eq!(receive(slot.as_mut().unwrap()), [frame(4, 60)]);
    assert_eq!((one.status().fault, one.status().mtu), (None, 9194));
}

#[test]
fn what_is_in_a_queue_that_is_closed_is_counted() {
    let rig = rig();
    let mut one = rig.port(1);
    rig.inject(1, [frame(1, 60), frame(2, 60)]);
    // The worker has given its ring back, as it does when the version has moved.
    let ring = rx(&one);
    assert!(ring.has_pending());
    one.shared().give_back_rx(ring);
    one.shutdown();
    assert_eq!(one.shared().losses(), NicLosses { closed: 2, ..NicLosses::default() });
    let one = rig.port(1);
    rig.inject(1, [frame(3, 60)]);
    assert_eq!(receive(&mut rx(&one)), [frame(3, 60)], "another port may have the number");
}

#[test]
fn what_is_sent_last_is_waited_for_when_a_port_is_closed() {
    let rig = rig();
    for (late, unsent) in [(4, 0), (u64::MAX, 1)] {
        let mut one = rig.port(1);
        rig.faults.late.store(late, Ordering::Relaxed);
        assert_eq!(one.shared().tx(0).unwrap().send(&[out(&frame(1, 60))]).sent, 1);
        one.shutdown();
        assert_eq!(one.shared().losses(), NicLosses { unsent, ..NicLosses::default() });
    }
    // A device that is gone is not waited for.
    let mut one = rig.port(1);
    assert_eq!(one.shared().tx(0).unwrap().send(&[out(&frame(1, 60))]).sent, 1);
    rig.faults.gone.store(true, Ordering::Relaxed);
    let before = rig.faults.flushes.load(Ordering::Relaxed);
    one.shutdown();
    let flushes = rig.faults.flushes.load(Ordering::Relaxed) - before;
    assert_eq!((one.shared().losses().unsent, flushes), (1, 1));
}

#[test]
fn a_number_may_pass_to_another_port_before_the_first_is_closed() {
    let rig = rig();
    let mut before = rig.port(1);
    rig.inject(1, [frame(1, 60)]);
    let ring = rx(&before);
    assert!(ring.has_pending());
    before.shared().give_back_rx(ring);
    let mut after = rig.port(1);
    assert_eq!(before.shared().losses().closed, 1, "what it had not taken is counted");
    rig.inject(1, [frame(2, 60)]);
    assert_eq!(receive(&mut rx(&after)), [frame(2, 60)]);
    before.shutdown();
    rig.inject(1, [frame(3, 60)]);
    assert_eq!(after.shared().queues(), 1);
    let Rig { calls, .. } = &rig;
    assert_eq!(lock(&calls.said).last().unwrap(), "ports n [(1, 1)]", "the first one's end is no news");
    after.shutdown();
}

#[test]
fn the_owner_of_the_tables_follows_the_ports() {
    let rig = rig();
    let mut one = rig.port(1);
    let two = rig.port(2);
    one.shutdown();
    rig.faults.gone.store(true, Ordering::Relaxed);
    until("the tables are gone", || lock(&rig.calls.tables).is_none());
    rig.faults.gone.store(false, Ordering::Relaxed);
    until("they are back", || lock(&rig.calls.tables).is_some());
    let Rig { nic, calls, .. } = rig;
    drop(two);
    drop(nic);
    let said = [
        "opened n Some(7) []",
        "ports n [(1, 1)]",
        "ports n [(1, 1), (2, 2)]",
        "ports n [(2, 2)]",
        "closed n",
        "opened n Some(7) [(2, 2)]",
        "ports n []",
        "closed n",
    ];
    assert_eq!(*lock(&calls.said), said);
}

#[test]
fn ports_that_the_nic_does_not_have_say_so() {
    let rig = rig();
    let nine = rig.port(9);
    assert_eq!(nine.status().fault.as_deref(), Some("NIC n: it has no port 9"));
    assert!(!nine.status().absent && nine.shared().queues() == 0);
    let id = PortId { slot: 1, generation: 1 };
    let none = NicPort::without_nic("m", &Arc::new(Quiescence::new()), id, 1);
    assert_eq!(none.status().fault.as_deref(), Some("there is no NIC 'm' in the configuration file"));
}

/// A TCP packet of so many bytes behind its headers, whose checksum is left to be completed.
fn tcp(payload: usize) -> (Packet, Vec<u8>) {
    let mut frame = vec![2; 12];
    frame.extend([0x08, 0x00, 0x45, 0]);
    frame.extend((40 + payload as u16).to_be_bytes());
    frame.extend([0, 1, 0x40, 0, 64, 6, 0, 0, 10, 0, 0, 1, 10, 0, 0, 2]);
    let sum = checksum::checksum(&frame[14..34]);
    frame[24..26].copy_from_slice(&sum.to_be_bytes());
    frame.extend([0, 1, 0, 2, 0, 0, 0, 9, 0, 0, 0, 0, 0x50, 0x10, 1, 0]);
    frame.extend(checksum::fold(pseudo(20 + payload)).to_be_bytes());
    frame.resize(54 + payload, 7);
    let mut packet = Packet::from_frame(PortId { slot: 9, generation: 1 }, &frame);
    assert_eq!(parse::extract(&mut packet, &mut Key::default()), Extracted::Done);
    packet.offload = Offload { needs_csum: true, csum_start: 34, csum_offset: 16, ..Offload::default() };
    (packet, frame)
}

fn pseudo(len: usize) -> u64 {
    checksum::pseudo_v4(0x0a00_0001, 0x0a00_0002, 6, len as u32)
}

fn is_complete(frame: &[u8]) -> bool {
    checksum::fold(checksum::add(pseudo(frame.len() - 34), &frame[34..])) == 0xffff
}

#[test]
fn the_device_is_left_what_it_does_and_software_does_the_rest() {
    let send = SendCaps { checksum: true, tso: true, ecn: false, max_super: 30_000 };
    let rig = rig_with(Config { send, ..Config::default() });
    let one = rig.port(1);
    let tx = one.shared().tx(0).unwrap();
    let takes = |packet: &Packet, frame: &[u8]| {
        let outgoing =
            Outgoing { packet, tail: Tail::Private(&frame[packet.head().len()..]), max_len: u32::MAX };
        software::is_accepted(&outgoing, tx.features()) && tx.does(&outgoing)
    };
    let sent = |packet: &Packet, frame: &[u8]| {
        let outgoing =
            Outgoing { packet, tail: Tail::Private(&frame[packet.head().len()..]), max_len: u32::MAX };
        let result = tx.send(&[outgoing.frame(tx.features())]);
        assert_eq!((result.sent, result.blocked), (1, None));
        rig.bench().take(1)
    };
    let (packet, bytes) = tcp(1000);
    assert!(takes(&packet, &bytes));
    let came = sent(&packet, &bytes);
    assert!(came.len() == 1 && came[0].len() == bytes.len() && is_complete(&came[0]));
    let (mut packet, bytes) = tcp(20_000);
    packet.offload = Offload { gso: Gso::Tcp4, gso_size: 1400, ..packet.offload };
    assert!(takes(&packet, &bytes));
    let came = sent(&packet, &bytes);
    assert_eq!(came.len(), 15);
    assert!(came.iter().all(|segment| segment.len() <= 1454 && is_complete(segment)));
    assert_eq!(came.iter().map(|segment| segment.len() - 54).sum::<usize>(), 20_000);
    // What is not in its power: marks, another protocol, more than it takes, segments that are too long, other headers.
    let (small, csum) = (tcp(1000).0, packet.offload);
    for offload in [
        Offload { ecn: true, ..csum },
        Offload { gso: Gso::UdpL4, ..csum },
        Offload { gso_size: 9300, ..csum },
        Offload { csum_start: 35, ..small.offload },
    ] {
        packet.offload = offload;
        assert!(!takes(&packet, &bytes), "{offload:?}");
    }
    let (mut packet, bytes) = tcp(30_000);
    packet.offload = csum;
    assert!(!takes(&packet, &bytes), "longer than it takes");
    // A device that does nothing is told so by its features.
    let rig = self::rig();
    assert_eq!(rig.port(1).shared().tx(0).unwrap().features(), 0);
}

#[test]
fn frames_come_to_the_queue_of_the_worker_that_sends_for_their_station() {
    let rig = rig_with(Config { queues: 2, stations: 1, ..Config::default() });
    let one = rig.port(1);
    let shared = one.shared();
    assert_eq!((shared.queues(), rig.nic.config().queues), (2, 1), "as many as the device has");
    let mut first = rx(&one);
    let tx = shared.tx(0).unwrap();
    // The stations' frames have their own addresses as source and destination.
    let (hot, cold, here) = (frame(0x0202, 60), frame(0x0404, 60), frame(0x0606, 60));
    let send =
        |bytes: &[u8], count: usize| (0..count).for_each(|_| assert_eq!(tx.send(&[out(bytes)]).sent, 1));
    let second = std::thread::scope(|scope| {
        let worker = scope.spawn(|| {
            let mut slot = None;
            shared.take_rx(1, &mut slot);
            send(&hot, 9);
            send(&cold, 2);
            slot.expect("the second queue")
        });
        worker.join().unwrap()
    });
    let mut second = second;
    send(&here, 20);
    until("the hottest has its queue", || {
        rig.inject(1, [hot.clone()]);
        receive(&mut first);
        receive(&mut second) == [hot.clone()]
    });
    rig.inject(1, [cold.clone(), hot.clone(), here.clone(), frame(0x0808, 60)]);
    assert_eq!(receive(&mut second), std::slice::from_ref(&hot));
    assert_eq!(receive(&mut first), [cold.clone(), here, frame(0x0808, 60)], "there is no room for two");
    // Its guest's rings have moved to the other worker, and that one has the second queue now, beside its own.
    shared.give_back_rx(second);
    let mut slot = None;
    shared.take_rx(1, &mut slot);
    let mut second = slot.unwrap();
    until("its frames have followed", || {
        send(&hot, 9);
        rig.inject(1, [hot.clone()]);
        receive(&mut second);
        receive(&mut first) == [hot.clone()]
    });
    assert_eq!(shared.losses(), NicLosses::default());
}
