//! A device played by the test, for what QEMU's does not do: to lie, to keep silent, and to take offloads.

use std::collections::HashMap;
use std::sync::{Arc, Mutex};

use proptest::prelude::*;
use switch_core::checksum::checksum;

use super::regs::{NO_VECTOR, cap, common};
use super::*;
use crate::pci::fake::{Fake, Memory};

/// Where the device has its structures.
const AT_DEVICE: u64 = 0x1000;
const AT_NOTIFY: u64 = 0x2000;
const GOOD: u64 = feature::VERSION_1 | feature::ACCESS_PLATFORM | feature::STATUS | feature::MAC;
const OFFLOADS: u64 = feature::CSUM | feature::GUEST_CSUM | feature::HOST_TSO4 | feature::HOST_TSO6;

/// A queue as the device knows it.
#[derive(Clone, Copy, Default)]
struct Queue {
    size: u64,
    /// Addresses: descriptors, available ring, used ring.
    places: [u64; 3],
    seen: u16,
    done: u16,
}

impl Queue {
    /// The next available chain: its head, and address and length of each piece.
    fn next(&mut self, memory: &Memory) -> Option<(u16, Vec<(usize, usize)>)> {
        let [descriptors, available, _] = self.places.map(|at| at as usize);
        if available == 0 || memory.0.load_u16(available + 2).unwrap() == self.seen {
            return None;
        }
        let slot = u64::from(self.seen) % self.size;
        let head = memory.0.load_u16(available + 4 + 2 * slot as usize).unwrap();
        self.seen = self.seen.wrapping_add(1);
        let (mut pieces, mut at) = (Vec::new(), head);
        loop {
            let descriptor = descriptors + 16 * usize::from(at);
            let address = memory.0.load_u64(descriptor).unwrap() as usize;
            pieces.push((address, memory.0.load_u32(descriptor + 8).unwrap() as usize));
            if memory.0.load_u16(descriptor + 12).unwrap() & 1 == 0 {
                return Some((head, pieces));
            }
            at = memory.0.load_u16(descriptor + 14).unwrap();
        }
    }

    /// Says that a chain was used.
    fn used(&mut self, memory: &Memory, id: u32, len: u32) {
        let used = self.places[2] as usize;
        let at = used + 4 + 8 * (u64::from(self.done) % self.size) as usize;
        memory.0.store_u32(at, id).unwrap();
        memory.0.store_u32(at + 4, len).unwrap();
        self.done = self.done.wrapping_add(1);
        memory.0.store_u16(used + 2, self.done).unwrap();
    }

    /// Asks to be told of the next chain.
    fn want(&self, memory: &Memory) {
        memory.0.store_u16((self.places[2] + 4 + 8 * self.size) as usize, self.seen).unwrap();
    }
}

/// The device.
struct Device {
    features: u64,
    taken: u64,
    queues: [Queue; 2],
    selected: usize,
    most: u64,
    /// Frames that were sent, with their headers.
    sent: Vec<Vec<u8>>,
    /// It keeps what it is to send.
    keeps: bool,
    /// Queues whose doorbells were rung.
    rung: [usize; 2],
    wants: bool,
    mtu: u64,
    deaf: bool,
    stubborn: bool,
    vectors: bool,
    doorbell: u64,
}

impl Default for Device {
    fn default() -> Device {
        Device {
            features: GOOD,
            taken: 0,
            queues: [Queue::default(); 2],
            selected: 0,
            most: 64,
            sent: Vec::new(),
            keeps: false,
            rung: [0; 2],
            wants: true,
            mtu: 1500,
            deaf: false,
            stubborn: false,
            vectors: true,
            doorbell: 1,
        }
    }
}

impl Device {
    fn write(&mut self, registers: &mut HashMap<u64, u64>, memory: &Memory, offset: u64, value: u64) {
        match offset {
            common::STATUS if value == 0 => {
                registers.insert(offset, if self.deaf { 0x40 } else { 0 });
                self.queues = Default::default();
            }
            common::STATUS if self.stubborn => drop(registers.insert(offset, value & !8)),
            common::DEVICE_FEATURE_SELECT => {
                registers.insert(common::DEVICE_FEATURE, self.features >> (32 * (value & 1)) & 0xffff_ffff);
            }
            common::DRIVER_FEATURE => {
                let half = registers[&common::DRIVER_FEATURE_SELECT] & 1;
                self.taken = self.taken & !(0xffff_ffff << (32 * half)) | value << (32 * half);
            }
            common::QUEUE_SELECT => {
                self.selected = value as usize & 1;
                registers.insert(common::QUEUE_SIZE, self.most);
                registers.insert(common::QUEUE_NOTIFY, self.selected as u64 * self.doorbell);
            }
            common::CONFIG_VECTOR | common::QUEUE_VECTOR if !self.vectors => {
                registers.insert(offset, NO_VECTOR.into());
            }
            common::QUEUE_ENABLE => {
                let place = |at| registers[&at] | registers[&(at + 4)] << 32;
                let places = [common::QUEUE_DESCRIPTORS, common::QUEUE_AVAILABLE, common::QUEUE_USED];
                self.queues[self.selected] = Queue {
                    size: registers[&common::QUEUE_SIZE],
                    places: places.map(place),
                    ..Queue::default()
                };
            }
            AT_NOTIFY.. => {
                let index = value as usize & 1;
                assert_eq!(offset, AT_NOTIFY + 4 * index as u64, "its own doorbell");
                self.rung[index] += 1;
                if index == 1 {
                    self.transmit(memory);
                }
                if self.wants {
                    self.queues[index].want(memory);
                }
            }
            _ => {}
        }
    }

    fn transmit(&mut self, memory: &Memory) {
        let mut heads = Vec::new();
        while let Some((head, pieces)) = self.queues[1].next(memory) {
            let mut frame = Vec::new();
            for (at, len) in pieces {
                let mut piece = vec![0; len];
                memory.0.read(at, &mut piece).unwrap();
                frame.extend(piece);
            }
            self.sent.push(frame);
            heads.push(head);
        }
        // The last first: order is the device's choice.
        for &head in heads.iter().rev().filter(|_| !self.keeps) {
            self.queues[1].used(memory, head.into(), 0);
        }
    }

    /// Fills the next receive buffer and says that it is of this length.
    fn inject(&mut self, memory: &Memory, header: &[u8], frame: &[u8], len: usize) {
        let (head, pieces) = self.queues[0].next(memory).unwrap();
        memory.0.write(pieces[0].0, header).unwrap();
        memory.0.write(pieces[0].0 + HEADER, frame).unwrap();
        self.queues[0].used(memory, head.into(), len as u32);
    }
}

type Shared = Arc<Mutex<Device>>;

/// A capability of virtio: type, BAR, offset and length in it, and what follows.
fn capability(next: u8, kind: u8, bar: u8, place: (u32, u32), more: u32) -> Vec<u8> {
    let mut bytes = vec![0x09, next, 20, kind, bar, 0, 0, 0];
    for word in [place.0, place.1, more] {
        bytes.extend_from_slice(&word.to_le_bytes());
    }
    bytes
}

fn fake(device: &Shared) -> Fake {
    let mtu = device.lock().unwrap().mtu;
    let registers = HashMap::from([
        (common::QUEUES, 2),
        (AT_DEVICE, 0x02),
        (AT_DEVICE + 5, 0x07),
        (AT_DEVICE + net::STATUS, 1),
        (AT_DEVICE + net::MTU, mtu),
        (AT_DEVICE + net::SPEED, 25_000),
    ]);
    let device = device.clone();
    let hook = move |registers: &mut HashMap<u64, u64>, memory: &Memory, offset: u64, value: u64| {
        device.lock().unwrap().write(registers, memory, offset, value);
    };
    Fake::new(0x1041_1af4, 0x4000, registers, Box::new(hook))
        .with_config(6, &[0x10])
        .with_config(0x34, &[0x40])
        // Configuration through configuration space, and a structure beyond its BAR: passed over.
        .with_config(0x40, &capability(0x58, 5, 0, (0, 0), 0))
        .with_config(0x58, &capability(0x70, cap::COMMON, 0, (0x3ff0, 0x38), 0))
        .with_config(0x70, &capability(0x88, cap::COMMON, 0, (0, 0x38), 0))
        .with_config(0x88, &capability(0xa0, cap::NOTIFY, 0, (AT_NOTIFY as u32, 8), 4))
        .with_config(0xa0, &capability(0, cap::DEVICE, 0, (AT_DEVICE as u32, 0x40), 0))
}

fn config() -> Config {
    Config { ring: 16, ..Config::default() }
}

/// A device as `change` makes it, and its port.
fn open(change: impl FnOnce(&mut Device)) -> (Shared, Memory, Result<VirtioNet, NicError>) {
    let mut device = Device::default();
    change(&mut device);
    let device = Arc::new(Mutex::new(device));
    let fake = fake(&device);
    let memory = fake.memory();
    (device, memory, VirtioNet::open(Box::new(fake), config()))
}

fn started(features: u64) -> (Shared, Memory, VirtioNet) {
    let (device, memory, port) = open(|device| device.features |= features);
    (device, memory, port.unwrap())
}

/// All frames that are there, and whether their checksums are known to be right.
fn received(port: &mut VirtioNet) -> Vec<(Vec<u8>, bool)> {
    let mut frames = Vec::new();
    port.receive(100, &mut |got| {
        assert!(!got.offload.needs_csum && got.offload.gso == Gso::None && !got.forwarded);
        frames.push((got.frame.to_vec(), got.offload.csum_valid));
    })
    .unwrap();
    frames
}

/// Polls until the port says that it was reset.
fn until_reset(port: &mut VirtioNet) {
    let deadline = Instant::now() + Duration::from_secs(10);
    let mut events = Vec::new();
    while !events.contains(&PortEvent::Reset) {
        assert!(Instant::now() < deadline, "no reset");
        port.poll_events(&mut events).unwrap();
        std::thread::sleep(Duration::from_millis(1));
    }
}

/// A TCP frame with this many bytes of payload, and an offload for it.
fn tcp(ipv4: bool, payload: usize) -> (Vec<u8>, Offload) {
    let mut frame = vec![2; 12];
    let len = (20 + payload) as u16;
    if ipv4 {
        frame.extend([0x08, 0x00, 0x45, 0]);
        frame.extend((20 + len).to_be_bytes());
        frame.extend([0, 0, 0x40, 0, 64, 6, 0, 0, 10, 0, 0, 1, 10, 0, 0, 2]);
    } else {
        frame.extend([0x86, 0xdd, 0x60, 0, 0, 0]);
        frame.extend(len.to_be_bytes());
        frame.extend([6, 64]);
        frame.extend([5; 32]);
    }
    let csum_start = frame.len() as u16;
    frame.extend([0, 1, 0, 2, 0, 0, 0, 9, 0, 0, 0, 0, 0x50, 0x10, 1, 0, 0x12, 0x34, 0, 0]);
    frame.extend((0..payload).map(|at| at as u8));
    let offload = Offload { needs_csum: true, csum_start, csum_offset: 16, ..Offload::default() };
    (frame, offload)
}

#[test]
fn a_device_that_cannot_be_driven_is_an_error() {
    let fails = |change: fn(&mut Device)| matches!(open(change).2, Err(NicError::Device(_)));
    assert!(!fails(|_| {}));
    assert!(fails(|device| device.features &= !feature::VERSION_1));
    assert!(fails(|device| device.features &= !feature::ACCESS_PLATFORM));
    assert!(fails(|device| device.deaf = true), "it does not come out of reset");
    assert!(fails(|device| device.stubborn = true), "it does not agree to its own features");
    assert!(fails(|device| device.vectors = false));
    assert!(fails(|device| device.most = 0), "there is no queue");
    assert!(fails(|device| device.most = 4));
    assert!(fails(|device| {
        device.features |= feature::MTU;
        device.mtu = 67;
    }));
    assert!(matches!(open(|device| device.doorbell = 1 << 15).2, Err(NicError::Pci(_))), "a doorbell beyond");
    let untranslated = Config { untranslated: true, ..config() };
    let device = Shared::default();
    device.lock().unwrap().features &= !feature::ACCESS_PLATFORM;
    assert!(VirtioNet::open(Box::new(fake(&device)), untranslated).is_ok());
    device.lock().unwrap().features = GOOD;
    let restless = fake(&device).with_restless(common::GENERATION);
    assert!(matches!(VirtioNet::open(Box::new(restless), config()), Err(NicError::Device(_))));
    // Capabilities: none, one missing, one too short.
    let none = fake(&device).with_config(6, &[0]);
    assert!(matches!(VirtioNet::open(Box::new(none), config()), Err(NicError::Device(_))));
    for kind in [0x73, 0x8b, 0xa3] {
        let missing = fake(&device).with_config(kind, &[9]);
        assert!(matches!(VirtioNet::open(Box::new(missing), config()), Err(NicError::Device(_))));
        let short = fake(&device).with_config(kind - 1, &[8]);
        assert!(matches!(VirtioNet::open(Box::new(short), config()), Err(NicError::Device(_))));
    }
    let endless = fake(&device).with_config(0x89, &[0x40]);
    assert!(matches!(VirtioNet::open(Box::new(endless), config()), Err(NicError::Device(_))));
    let other = Fake::new(0x1000_1af4, 0x4000, HashMap::new(), Box::new(|_, _, _, _| {}));
    assert!(matches!(
        VirtioNet::open(Box::new(other), config()),
        Err(NicError::Pci(PciError::Foreign { .. }))
    ));
    let wrong = |config| {
        matches!(VirtioNet::open(Box::new(fake(&Shared::default())), config), Err(NicError::Config(_)))
    };
    assert!(wrong(Config { ring: 9, ..config() }) && wrong(Config { max_frame: 63, ..config() }));
}

#[test]
fn frames_pass_both_ways_round_and_round() {
    for features in [0, feature::EVENT_IDX, feature::SPEED_DUPLEX | feature::ORDER_PLATFORM] {
        let (device, memory, mut port) = started(features);
        assert_eq!(device.lock().unwrap().taken, GOOD | features);
        assert_eq!(port.ports()[0].mac, [2, 0, 0, 0, 0, 7]);
        assert_eq!(port.ports()[0].send, SendCaps::default());
        assert!(port.ports()[0].link.up);
        for round in 0..40u8 {
            for index in 0..3 {
                let frame = vec![round ^ index; 60 + usize::from(round)];
                device.lock().unwrap().inject(&memory, &[0; HEADER], &frame, HEADER + frame.len());
                port.send(0, &[&frame[..5], &[], &frame[5..]], &Offload::default()).unwrap();
            }
            let frames = received(&mut port);
            assert_eq!(frames.len(), 3);
            port.flush().unwrap();
            let sent = std::mem::take(&mut device.lock().unwrap().sent);
            for ((received, valid), sent) in frames.into_iter().zip(sent) {
                assert_eq!(sent, [&[0; HEADER], &received[..]].concat());
                assert!(!valid);
            }
        }
        let counters = port.counters(0).unwrap();
        assert_eq!((counters.received, counters.sent), (120, 120));
        assert_eq!(
            port.ports()[0].link.speed,
            if features & feature::SPEED_DUPLEX != 0 { 25_000 } else { 0 }
        );
    }
}

#[test]
fn notifications_are_left_out_where_they_are_not_wanted() {
    for features in [0, feature::EVENT_IDX] {
        let (device, memory, mut port) = started(features);
        let send = |port: &mut VirtioNet| {
            port.send(0, &[&[3; 60]], &Offload::default()).unwrap();
            port.flush().unwrap();
        };
        send(&mut port);
        assert_eq!(device.lock().unwrap().rung[1], 1);
        device.lock().unwrap().wants = false;
        let used = device.lock().unwrap().queues[1].places[2] as usize;
        memory.0.store_u16(used, (features == 0).into()).unwrap();
        send(&mut port);
        let before = device.lock().unwrap().rung[1];
        send(&mut port);
        send(&mut port);
        assert_eq!(device.lock().unwrap().rung[1], before, "nobody asked");
        // Interrupts: asked for by arming alone.
        let available = device.lock().unwrap().queues[0].places[1] as usize;
        let event = available + 4 + 2 * 16;
        device.lock().unwrap().inject(&memory, &[0; HEADER], &[1; 60], 72);
        assert!(!port.arm().unwrap(), "there is a frame");
        assert_eq!(received(&mut port).len(), 1);
        if features == 0 {
            assert_eq!(memory.0.load_u16(available).unwrap(), QUIET_FLAG);
        }
        assert!(port.arm().unwrap());
        assert_eq!(memory.0.load_u16(available).unwrap(), 0);
        assert_eq!(memory.0.load_u16(event).unwrap(), u16::from(features != 0), "after the first frame");
    }
}

const QUIET_FLAG: u16 = 1;

#[test]
fn offloads_are_asked_for_as_the_frame_is() {
    let (device, _memory, mut port) = started(OFFLOADS | feature::EVENT_IDX);
    let max_super = 16 * 1536 - HEADER;
    assert_eq!(port.ports()[0].send, SendCaps { checksum: true, tso: true, ecn: false, max_super });
    let last = |port: &mut VirtioNet| {
        port.flush().unwrap();
        device.lock().unwrap().sent.pop().unwrap()
    };
    let (frame, offload) = tcp(true, 100);
    port.send(0, &[&frame], &offload).unwrap();
    let header = [1, 0, 0, 0, 0, 0, 34, 0, 16, 0, 0, 0];
    assert_eq!(last(&mut port), [&header[..], &frame].concat());
    // Segmentation: over several slots, and then the slots are free again.
    for ipv4 in [true, false] {
        for round in 0..20 {
            let (frame, offload) = tcp(ipv4, 20_000 - round);
            let gso = if ipv4 { Gso::Tcp4 } else { Gso::Tcp6 };
            let offload = Offload { gso, gso_size: 1400, ..offload };
            port.send(0, &[&frame[..30], &frame[30..9000], &frame[9000..]], &offload).unwrap();
            let start = offload.csum_start as u8;
            let kind = if ipv4 { 1 } else { 4 };
            let header = [1, kind, start + 20, 0, 0x78, 0x05, start, 0, 16, 0, 0, 0];
            assert_eq!(last(&mut port), [&header[..], &frame].concat());
        }
    }
    let segmented = Offload { gso: Gso::Tcp4, gso_size: 1400, ..tcp(true, 0).1 };
    let (long, _) = tcp(true, 16 * 1600);
    assert_eq!(port.send(0, &[&long], &segmented), Err(SendError::TooLong), "longer than the ring");
    let frame = &tcp(true, 3000).0;
    for lie in [
        Offload { gso: Gso::Tcp6, ..segmented },
        Offload { gso: Gso::UdpL4, ..segmented },
        Offload { gso_size: 0, ..segmented },
        Offload { gso_size: 9000, ..segmented },
        Offload { needs_csum: false, ..segmented },
        Offload { csum_start: 33, ..segmented },
        Offload { ecn: true, ..segmented },
    ] {
        assert_eq!(port.send(0, &[frame], &lie), Err(SendError::Offload), "{lie:?}");
    }
    let (frame, offload) = tcp(true, 100);
    for (csum_start, csum_offset) in [(13, 16), (140, 14), (u16::MAX, 16), (34, u16::MAX)] {
        let lie = Offload { csum_start, csum_offset, ..offload };
        assert_eq!(port.send(0, &[&frame], &lie), Err(SendError::Offload));
    }
    // Congestion marks need a feature of their own, and none is of use without checksums.
    let (device, _memory, mut port) = started(OFFLOADS | feature::HOST_ECN);
    let marked = Offload { ecn: true, ..segmented };
    port.send(0, &[&tcp(true, 3000).0], &marked).unwrap();
    port.flush().unwrap();
    assert_eq!(device.lock().unwrap().sent[0][1], 0x81);
    let (device, _memory, mut port) = started(OFFLOADS & !feature::CSUM);
    assert_eq!(port.ports()[0].send, SendCaps::default());
    assert_eq!(device.lock().unwrap().taken & OFFLOADS, feature::GUEST_CSUM);
    assert_eq!(port.send(0, &[&frame], &offload), Err(SendError::Offload));
}

#[test]
fn checksums_of_received_frames_are_completed_or_believed() {
    let (device, memory, mut port) = started(OFFLOADS);
    let (mut frame, offload) = tcp(true, 101);
    let inject = |header: [u8; HEADER], frame: &[u8]| {
        device.lock().unwrap().inject(&memory, &header, frame, HEADER + frame.len());
    };
    let with = |flags, gso, start: u16, field: u16| {
        let ([a, b], [c, d]) = (start.to_le_bytes(), field.to_le_bytes());
        [flags, gso, 0, 0, 0, 0, a, b, c, d, 1, 0]
    };
    inject(with(2, 0, 0, 0), &frame);
    assert_eq!(received(&mut port), [(frame.clone(), true)]);
    inject(with(1, 0, offload.csum_start, 16), &frame);
    let sum = checksum(&frame[34..]);
    frame[50..52].copy_from_slice(&sum.to_be_bytes());
    assert_eq!(received(&mut port), [(frame.clone(), false)]);
    for lie in [with(1, 0, 34, 200), with(1, 0, 2, 16), with(1, 0, 0xffff, 16), with(0, 1, 0, 0)] {
        inject(lie, &frame);
        assert_eq!(received(&mut port), []);
    }
    assert_eq!(port.counters(0).unwrap().rx_error, 4);
    // Nothing of it was agreed upon.
    let (device, memory, mut port) = started(0);
    device.lock().unwrap().inject(&memory, &with(2, 0, 0, 0), &frame, HEADER + frame.len());
    assert_eq!(received(&mut port), [(frame.clone(), false)]);
    device.lock().unwrap().inject(&memory, &with(1, 0, 34, 16), &frame, HEADER + frame.len());
    assert_eq!(received(&mut port), []);
}

#[test]
fn lengths_are_those_of_the_port() {
    let (device, memory, mut port) = started(0);
    for (len, error, long) in [(0, 1, 0), (HEADER + 13, 2, 0), (HEADER + 1523, 2, 1), (usize::MAX, 2, 2)] {
        device.lock().unwrap().inject(&memory, &[0; HEADER], &[4; 60], len);
        assert_eq!(received(&mut port), []);
        let counters = port.counters(0).unwrap();
        assert_eq!((counters.rx_error, counters.rx_too_long), (error, long), "{len}");
    }
    assert_eq!(port.send(0, &[&[0; 13]], &Offload::default()), Err(SendError::TooShort));
    assert_eq!(port.send(0, &[&[0; 1523]], &Offload::default()), Err(SendError::TooLong));
    assert_eq!(port.send(1, &[&[0; 60]], &Offload::default()), Err(SendError::NoPort));
    // An MTU counts from behind the tags. One that needs longer buffers than there are is not taken.
    let (device, _memory, port) = open(|device| {
        device.features |= feature::MTU;
        device.mtu = 1000;
    });
    let mut port = port.unwrap();
    assert_eq!((port.ports()[0].max_frame, device.lock().unwrap().taken), (1022, GOOD | feature::MTU));
    let mut frame = vec![0; 1014];
    port.send(0, &[&frame], &Offload::default()).unwrap();
    frame.extend([0; 4]);
    assert_eq!(port.send(0, &[&frame], &Offload::default()), Err(SendError::TooLong));
    frame[12..14].copy_from_slice(&[0x81, 0x00]);
    port.send(0, &[&frame], &Offload::default()).unwrap();
    let (device, _memory, port) = open(|device| {
        device.features |= feature::MTU;
        device.mtu = 9000;
    });
    assert_eq!((port.unwrap().ports()[0].max_frame, device.lock().unwrap().taken), (1522, GOOD));
}

#[test]
fn lost_completions_are_back_pressure_until_a_reset_counts_them() {
    let (device, _memory, mut port) = started(0);
    device.lock().unwrap().keeps = true;
    for _ in 0..16 {
        port.send(0, &[&[0; 60]], &Offload::default()).unwrap();
        port.flush().unwrap();
    }
    assert_eq!(port.send(0, &[&[0; 60]], &Offload::default()), Err(SendError::Full));
    port.transport.add_status(status::NEEDS_RESET).unwrap();
    until_reset(&mut port);
    let counters = port.counters(0).unwrap();
    assert_eq!((counters.sent, counters.tx_reset), (0, 16));
    device.lock().unwrap().keeps = false;
    port.send(0, &[&[0; 60]], &Offload::default()).unwrap();
    port.flush().unwrap();
    assert_eq!(port.counters(0).unwrap().sent, 1);
}

#[test]
fn a_device_that_goes_or_falters_is_told_of() {
    let (device, memory, mut port) = started(0);
    // All ones are a device that is not there.
    port.transport.add_status(0xff).unwrap();
    assert!(port.poll_events(&mut Vec::new()).is_err());
    assert_eq!(port.send(0, &[&[0; 60]], &Offload::default()), Err(SendError::Device));
    // It comes back, but does not come out of reset.
    port.transport.reset().unwrap();
    device.lock().unwrap().deaf = true;
    let deadline = Instant::now() + Duration::from_secs(10);
    while port.poll_events(&mut Vec::new()).is_ok() {
        assert!(Instant::now() < deadline);
    }
    assert_eq!(port.receive(9, &mut |_| panic!()).unwrap(), 0);
    device.lock().unwrap().deaf = false;
    until_reset(&mut port);
    device.lock().unwrap().inject(&memory, &[0; HEADER], &[1; 60], 72);
    assert_eq!(received(&mut port).len(), 1);
    // Who sends was told what it does: if it does something else after a reset, it is of no use as it is.
    device.lock().unwrap().features |= OFFLOADS;
    port.transport.add_status(status::NEEDS_RESET).unwrap();
    let deadline = Instant::now() + Duration::from_secs(10);
    let error = loop {
        match port.poll_events(&mut Vec::new()) {
            Err(error) => break error,
            Ok(()) => assert!(Instant::now() < deadline),
        }
    };
    assert_eq!(error.to_string(), "the device offers something else than before its reset");
    assert_eq!(port.send(0, &[&[0; 60]], &Offload::default()), Err(SendError::Device));
}

proptest! {
    /// Whatever a device says to have used, there are only sane frames, and the port can be set up again.
    #[test]
    fn wild_used_rings_do_no_harm(
        entries in prop::collection::vec((prop_oneof![0u32..20, any::<u32>()], prop_oneof![0u32..2000, any::<u32>()]), 1..30),
        jump in prop_oneof![Just(0u16), any::<u16>()],
        queue in 0usize..2,
    ) {
        let (device, memory, mut port) = started(0);
        device.lock().unwrap().keeps = true;
        for _ in 0..5 {
            port.send(0, &[&[0; 60]], &Offload::default()).unwrap();
        }
        port.flush().unwrap();
        for (id, len) in entries {
            let mut device = device.lock().unwrap();
            device.queues[queue].used(&memory, id, len);
        }
        {
            let mut device = device.lock().unwrap();
            let done = device.queues[queue].done.wrapping_add(jump);
            let used = device.queues[queue].places[2] as usize;
            memory.0.store_u16(used + 2, done).unwrap();
            device.queues[queue].done = done;
        }
        for _ in 0..20 {
            let got = port.receive(5, &mut |received| assert!((14..=1522).contains(&received.frame.len()))).unwrap();
            prop_assert!(got <= 5);
            port.flush().unwrap();
        }
        let counters = port.counters(0).unwrap();
        prop_assert!(counters.sent <= 5);
        port.tried = Instant::now() - RETRY;
        port.transport.add_status(status::NEEDS_RESET).unwrap();
        until_reset(&mut port);
        let after = port.counters(0).unwrap();
        prop_assert_eq!(after.sent + after.tx_reset, 5, "each frame is counted once");
        device.lock().unwrap().keeps = false;
        device.lock().unwrap().inject(&memory, &[0; HEADER], &[1; 60], 72);
        prop_assert_eq!(received(&mut port).len(), 1);
    }
}
