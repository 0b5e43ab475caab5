//! Sending and the way to the host, on rings of drivers that the test plays itself.

mod commands;
mod tunnels;

use super::egress::{BurstEgress, Jobs};
use super::handover::Stage;
use super::io::Io;
use super::kicks::Kicks;
use super::port::{MAX_PARKED, NewPort, Steering, WorkerPort};
use super::rings::{Rings, RxRing, TxRing};
use crate::frames::pool::{BUFFERS, LARGE};
use crate::frames::software;
use crate::host::Decision;
use crate::host::path::{Budget, HeldPacket};
use crate::port_config::{Mode, Socket};
use crate::quiesce::{Quiescence, WorkerEpoch};
use crate::vhost::VhostUserPort;
use crate::virtio::testing::{Driver, MODERN, WRITE};
use crate::virtio::{Burst, GuestTx, NetHeader};
use crate::wake::Waker;
use rtrb::{Consumer, RingBuffer};
use std::sync::Arc;
use switch_core::compile::{Plan, compile};
use switch_core::drop::DropReason;
use switch_core::exec::Scratch;
use switch_core::flow::FlowSpec;
use switch_core::key::Key;
use switch_core::packet::{Gso, MAX_FRAME, MAX_SNAPSHOT, Packet, PortId, SNAPSHOT};
use switch_core::pipeline::{Egress, Found, Upcall};
use virtio_bindings::virtio_net::{
    VIRTIO_NET_F_CSUM, VIRTIO_NET_F_GUEST_CSUM, VIRTIO_NET_F_GUEST_TSO4, VIRTIO_NET_F_HOST_TSO4,
};

const A: PortId = PortId { slot: 0, generation: 1 };
const B: PortId = PortId { slot: 1, generation: 1 };
const C: PortId = PortId { slot: 2, generation: 1 };
const PATIENCE: u64 = 1000;
/// Where drivers have their buffers.
const BUFFERS_AT: u64 = 0x2_0000;
const HEADER: usize = NetHeader::LEN;
/// What a driver without receive offloads negotiates.
const PLAIN: u64 = MODERN;
const OFFLOADS: u64 = MODERN
    | 1 << VIRTIO_NET_F_CSUM
    | 1 << VIRTIO_NET_F_HOST_TSO4
    | 1 << VIRTIO_NET_F_GUEST_CSUM
    | 1 << VIRTIO_NET_F_GUEST_TSO4;

/// Frames that port A has sent, taken from its ring as one burst.
fn sent(frames: &[(NetHeader, Vec<u8>)]) -> (GuestTx, Burst, Vec<Packet>) {
    let mut sender = Driver::new(256, OFFLOADS);
    let mut ring = sender.tx();
    let mut at = BUFFERS_AT;
    for (i, (header, frame)) in (0..).zip(frames) {
        sender.write(at, &header.to_bytes());
        sender.write(at + HEADER as u64, frame);
        sender.desc(i, at, (HEADER + frame.len()) as u32, 0, 0);
        sender.offer(i);
        at += (HEADER + frame.len()) as u64;
    }
    let mut burst = Burst::new();
    assert_eq!(ring.receive(&mut burst, frames.len()), Ok(frames.len()));
    let mut packets = vec![Packet::default(); frames.len()];
    for (i, packet) in packets.iter_mut().enumerate() {
        burst.copy_head(&burst.frames()[i], packet.reset(A, burst.frames()[i].len, SNAPSHOT));
    }
    (ring, burst, packets)
}

/// Buffers for up to 128 KiB that a driver has offered.
struct Guest {
    driver: Driver,
    offered: u16,
}

impl Guest {
    const BUFFER: u32 = 2048;

    fn new(features: u64) -> Guest {
        Guest { driver: Driver::new(256, features), offered: 0 }
    }

    fn place(i: u16) -> u64 {
        BUFFERS_AT + u64::from(i) * u64::from(Self::BUFFER)
    }

    /// Offers `n` more receive buffers.
    fn offer(&mut self, n: u16) {
        for i in self.offered..self.offered + n {
            self.driver.desc(i, Self::place(i), Self::BUFFER, WRITE, 0);
            self.driver.offer(i);
        }
        self.offered += n;
    }

    /// The frames received since the last look, with their headers.
    fn received(&mut self) -> Vec<(NetHeader, Vec<u8>)> {
        let mut frames = Vec::new();
        while let Some((head, len)) = self.driver.take_used() {
            let mut bytes = self.driver.read(Self::place(head as u16), len as usize);
            let header = NetHeader::from_bytes(bytes[..HEADER].try_into().unwrap());
            for _ in 1..header.num_buffers {
                let (head, len) = self.driver.take_used().unwrap();
                bytes.extend(self.driver.read(Self::place(head as u16), len as usize));
            }
            frames.push((header, bytes[HEADER..].to_vec()));
        }
        frames
    }
}

struct Bench {
    io: Io,
    jobs: Jobs,
    up: Consumer<Box<HeldPacket>>,
    /// Signs off with the bench.
    _epoch: WorkerEpoch,
}

impl Bench {
    fn new() -> Bench {
        let epoch = Arc::new(Quiescence::new()).register("bench").unwrap();
        let (to_host, up) = RingBuffer::new(BUFFERS);
        let kicks = Kicks::new(&epoch).unwrap();
        let io = Io::new(PATIENCE, to_host, Arc::new(Waker::new().unwrap()), kicks);
        Bench { io, jobs: Jobs::default(), up, _epoch: epoch }
    }

    /// A port; with a guest, its receive ring runs.
    fn port(&mut self, id: PortId, guest: Option<&Guest>) {
        let socket = Socket { mode: Mode::Client, ..Socket::new("/nowhere") };
        let vhost =
            VhostUserPort::new("p", 1, socket, None, Arc::new(Quiescence::new()), Box::new(|_| {})).unwrap();
        let port = WorkerPort::new(NewPort {
            id,
            name: "p".into(),
            rings: Rings::Guest(vhost.shared().clone()),
            queues: 1,
            polled: vec![0],
            mtu: 1500,
            miss_rate: 1_000_000,
            steering: Arc::new(Steering::default()),
            handover: Arc::default(),
        });
        assert!(self.io.add_port(Box::new(port)).is_none());
        if let Some(guest) = guest {
            let port = self.io.port(id).unwrap();
            port.tx[0].ring = Some(TxRing::Guest(Arc::new(guest.driver.rx())));
            port.tx_active = 1;
        }
    }

    /// Has port A send these frames to `to` as one burst.
    fn send(&mut self, frames: &[(NetHeader, Vec<u8>)], to: &[PortId]) {
        let (mut ring, mut burst, mut packets) = sent(frames);
        let place = packets.as_ptr();
        let mut egress = BurstEgress::new(&mut self.io, &mut self.jobs, &burst, &packets, (0, 0), true);
        let mut key = Key::default();
        for (i, packet) in packets.iter_mut().enumerate() {
            let _ = switch_core::parse::extract(packet, &mut key);
            egress.admit(i, packet, Found::Key(&key)).unwrap();
            for (n, &port) in to.iter().enumerate() {
                egress.output(i, packet, port, u32::MAX, n + 1 == to.len());
            }
        }
        assert_eq!(place, packets.as_ptr());
        egress.finish(&packets);
        ring.complete(&mut burst);
    }

    /// `(packets sent, packets dropped for this reason)` of a port.
    fn sent(&mut self, id: PortId, reason: DropReason) -> (u64, u64) {
        let counters = self.io.port(id).unwrap().counters.clone();
        let mut drops = [0; DropReason::COUNT];
        counters.tx_drops.sum_into(&mut drops);
        (counters.tx_packets.get(), drops[reason as usize])
    }

    /// Copies made of any port's packets are sent or dropped, and no buffer is lost.
    fn check(&mut self) {
        assert_eq!(self.io.parked, 0);
        let (mut copies, mut ends) = (0, 0);
        for port in self.io.ports.iter().flatten() {
            let mut drops = [0; DropReason::COUNT];
            port.counters.tx_drops.sum_into(&mut drops);
            copies += port.counters.fast_copies.get() + port.counters.host_copies.get();
            ends += port.counters.tx_packets.get() + drops.iter().sum::<u64>();
        }
        assert_eq!(copies, ends);
        assert_eq!(self.io.pool.free() + self.up.slots(), BUFFERS);
    }
}

/// A UDP packet over IPv4 without a checksum, with `n` in its payload.
fn udp(n: u8) -> (NetHeader, Vec<u8>) {
    let mut frame = vec![2, 0, 0, 0, 0, 1, 2, 0, 0, 0, 0, 2, 8, 0, 0x45, 0, 0, 38];
    frame.extend([0, 0, 0, 0, 64, 17, 0, 0, 10, 0, 0, 1, 10, 0, 0, 2, 0, 7, 0, 9, 0, 18, 0, 0]);
    frame.extend([n; 10]);
    (NetHeader::default(), frame)
}

/// A TCP packet to be cut into segments of 1000 bytes; its payload counts up.
fn tso(payload: usize) -> (NetHeader, Vec<u8>) {
    let mut frame = vec![2, 0, 0, 0, 0, 1, 2, 0, 0, 0, 0, 2, 8, 0, 0x45, 0];
    frame.extend(((40 + payload) as u16).to_be_bytes());
    frame.extend([0, 0, 0, 0, 64, 6, 0, 0, 10, 0, 0, 1, 10, 0, 0, 2]);
    frame.extend([0, 7, 0, 9, 0, 0, 0, 0, 0, 0, 0, 0, 0x50, 0x10, 1, 0, 0, 0, 0, 0]);
    frame.extend((0..payload).map(|i| (i / 1000) as u8));
    let header = NetHeader {
        flags: NetHeader::NEEDS_CSUM,
        gso_type: NetHeader::GSO_TCPV4,
        gso_size: 1000,
        csum_start: 34,
        csum_offset: 16,
        ..NetHeader::default()
    };
    (header, frame)
}

fn numbers(frames: &[(NetHeader, Vec<u8>)]) -> Vec<u8> {
    frames.iter().map(|(_, frame)| *frame.last().unwrap()).collect()
}

#[test]
fn packets_wait_for_room_in_order_and_not_for_ever() {
    let (mut bench, mut guest) = (Bench::new(), Guest::new(OFFLOADS));
    bench.port(A, None);
    bench.port(B, Some(&guest));
    guest.offer(2);
    bench.send(&(0..4).map(udp).collect::<Vec<_>>(), &[B]);
    assert_eq!(numbers(&guest.received()), [0, 1]);
    assert!(bench.io.is_waiting() && !bench.io.retry_parked());
    guest.offer(1);
    // There is room again, but nothing overtakes what waits.
    bench.send(&[udp(4)], &[B]);
    assert!(guest.received().is_empty());
    bench.io.now_cycles += PATIENCE - 1;
    assert!(bench.io.retry_parked());
    assert_eq!(numbers(&guest.received()), [2]);
    bench.io.now_cycles += 1;
    assert!(bench.io.retry_parked());
    assert_eq!(bench.sent(B, DropReason::RxRingFull), (3, 2));
    bench.check();
}

#[test]
fn a_crowd_waits_only_up_to_a_limit() {
    let (mut bench, guest) = (Bench::new(), Guest::new(OFFLOADS));
    bench.port(A, None);
    bench.port(B, Some(&guest));
    for _ in 0..5 {
        bench.send(&(0..32).map(udp).collect::<Vec<_>>(), &[B]);
    }
    assert_eq!(bench.sent(B, DropReason::RxRingFull), (0, 160 - MAX_PARKED as u64));
    bench.io.now_cycles += PATIENCE;
    bench.io.retry_parked();
    assert_eq!(bench.sent(B, DropReason::RxRingFull), (0, 160));
    bench.check();
}

#[test]
fn a_full_ring_does_not_give_a_guest_what_it_cannot_take() {
    let (mut bench, mut guest) = (Bench::new(), Guest::new(PLAIN));
    bench.port(A, None);
    bench.port(B, Some(&guest));
    // The ring is full in the middle of the first packet; the second finds it so.
    guest.offer(2);
    bench.send(&[tso(2500), udp(9), tso(1500)], &[B]);
    guest.offer(8);
    bench.io.retry_parked();
    let frames = guest.received();
    assert_eq!(numbers(&frames), [0, 1, 2, 9, 0, 1]);
    for (header, frame) in &frames {
        assert_eq!(NetHeader { num_buffers: 0, ..*header }, NetHeader::default());
        assert!(frame.len() <= 1054);
    }
    assert_eq!(bench.sent(B, DropReason::RxRingFull), (3, 0));
    let bytes: u64 = frames.iter().map(|(_, frame)| frame.len() as u64).sum();
    assert_eq!(bench.io.port(B).unwrap().counters.tx_bytes.get(), bytes, "segments that waited count too");
    bench.check();
}

#[test]
fn a_ring_that_is_started_anew_gets_nothing_old() {
    let (mut bench, mut guest) = (Bench::new(), Guest::new(OFFLOADS));
    bench.port(A, None);
    bench.port(B, Some(&guest));
    bench.send(&[udp(1), udp(2)], &[B]);
    // The port knows of no ring: to the worker it was stopped.
    bench.io.refresh();
    assert_eq!(bench.sent(B, DropReason::LinkDown), (0, 2));
    bench.send(&[udp(3)], &[B]);
    assert_eq!(bench.sent(B, DropReason::LinkDown), (0, 3));
    assert!(guest.received().is_empty());
    bench.check();
}

#[test]
fn a_flood_keeps_one_head_a_packet() {
    let (mut bench, mut b, mut c) = (Bench::new(), Guest::new(OFFLOADS), Guest::new(PLAIN));
    bench.port(A, None);
    bench.port(B, Some(&b));
    bench.port(C, Some(&c));
    b.offer(70);
    c.offer(70);
    let free = bench.io.pool.free();
    bench.send(&[udp(1), tso(2500), udp(3)], &[B, C, B]);
    assert_eq!(bench.io.pool.free(), free, "the fast path needs none of the buffers that the host path uses");
    assert_eq!(numbers(&b.received()), [1, 1, 2, 2, 3, 3]);
    assert_eq!(numbers(&c.received()), [1, 0, 1, 2, 3]);
    let origin = bench.io.port(A).unwrap().counters.clone();
    assert_eq!((origin.rx_forwarded.get(), origin.fast_copies.get()), (3, 9));
    bench.check();
}

#[test]
fn a_port_that_goes_takes_what_waits_with_it() {
    let (mut bench, guest) = (Bench::new(), Guest::new(OFFLOADS));
    bench.port(A, None);
    bench.port(B, Some(&guest));
    bench.send(&[udp(1)], &[B]);
    assert!(bench.io.remove_port(PortId { generation: 2, ..B }).is_none(), "another port");
    let gone = bench.io.remove_port(B).unwrap();
    let mut drops = [0; DropReason::COUNT];
    gone.counters.tx_drops.sum_into(&mut drops);
    assert_eq!(drops[DropReason::LinkDown as usize], 1);
    assert!(!bench.io.is_waiting());
    bench.send(&[udp(1)], &[B]);
    assert_eq!(bench.sent(A, DropReason::NoPort), (0, 1));
}

fn plan(outputs: &[PortId]) -> Arc<Plan> {
    use switch_core::action::{Action, PortRef};
    let actions = outputs.iter().map(|&id| Action::Output(PortRef::Ours(id))).collect();
    Arc::new(compile(&FlowSpec { matches: Default::default(), actions, ufid: None, held: None }).unwrap())
}

impl Bench {
    /// Sends port A's packet of this length up.
    fn up(&mut self, len: usize) {
        self.up_by(0, len);
    }

    /// The same, by that queue pair.
    fn up_by(&mut self, queue: usize, len: usize) {
        let mut sender = Driver::new(4, OFFLOADS);
        let mut ring = sender.tx();
        sender.write(BUFFERS_AT + HEADER as u64, &udp(5).1);
        sender.desc(0, BUFFERS_AT, (HEADER + len) as u32, 0, 0);
        sender.offer(0);
        let mut burst = Burst::new();
        ring.receive(&mut burst, 1).unwrap();
        let mut packet = Packet::default();
        burst.copy_head(&burst.frames()[0], packet.reset(A, len as u32, SNAPSHOT));
        let mut packets = [packet];
        let mut egress = BurstEgress::new(&mut self.io, &mut self.jobs, &burst, &packets, (0, queue), true);
        egress.upcall(0, &mut packets[0], Upcall::Miss);
        egress.finish(&packets);
    }
}

#[test]
fn the_hosts_answers_are_carried_out_and_counted() {
    let (mut bench, mut guest) = (Bench::new(), Guest::new(OFFLOADS));
    bench.port(A, None);
    bench.port(B, Some(&guest));
    guest.offer(8);
    let mut scratch = Scratch::default();
    for answer in [
        Decision::Execute(plan(&[B, B])),
        Decision::Execute(plan(&[C])),
        Decision::Drop(DropReason::HostDrop),
        Decision::Taken,
    ] {
        bench.up_by(3, 1400);
        let mut held = bench.up.pop().unwrap();
        held.answer = Some(answer);
        assert_eq!(bench.io.host_answer(held, &mut scratch), (A, 3), "who is to pay for it");
    }
    assert_eq!(guest.received().len(), 2);
    let counters = bench.io.port(A).unwrap().counters.clone();
    assert_eq!((counters.rx_to_host.get(), counters.host_copies.get()), (4, 3));
    assert_eq!(bench.io.port(A).unwrap().at_host[Budget::Miss as usize], 0);
    bench.check();
    // An answer to a port that has gone, and another has its slot.
    bench.up(100);
    let mut held = bench.up.pop().unwrap();
    held.answer = Some(Decision::Execute(plan(&[B])));
    bench.io.remove_port(A);
    bench.port(PortId { generation: 2, ..A }, None);
    bench.io.host_answer(held, &mut scratch);
    assert_eq!(guest.received().len(), 0);
    assert_eq!(bench.io.pool.free(), BUFFERS);
    assert_eq!(bench.sent(B, DropReason::NoPort), (2, 0));
}

#[test]
fn what_representors_have_is_delivered_and_counted() {
    let (mut bench, mut guest) = (Bench::new(), Guest::new(PLAIN));
    bench.port(A, None);
    bench.port(B, Some(&guest));
    guest.offer(8);
    let mut pool = crate::frames::pool::Pool::default();
    let mut down = |to, (header, frame): &(NetHeader, Vec<u8>), answer| {
        let mut held = pool.take(frame.len()).unwrap();
        let mut packet = Packet::from_frame(to, frame);
        let mut key = Key::default();
        let _ = switch_core::parse::extract(&mut packet, &mut key);
        packet.offload = switch_core::offload::check(&software::raw_header(header), &packet, &key).unwrap();
        let rest = &frame[packet.head().len()..];
        held.tail[..rest.len()].copy_from_slice(rest);
        (held.packet, held.answer) = (packet, answer);
        bench.io.deliver_down(&held);
    };
    down(B, &udp(1), None);
    down(B, &tso(2500), None);
    down(A, &udp(2), None);
    down(B, &udp(3), Some(Decision::Drop(DropReason::BadOffload)));
    down(PortId { generation: 2, ..B }, &udp(4), None);
    bench.io.notify_guests();
    let frames = guest.received();
    assert_eq!(frames[0].1, udp(1).1);
    assert_eq!(frames[1..].iter().map(|(_, frame)| frame.len() - 54).collect::<Vec<_>>(), [1000, 1000, 500]);
    assert_eq!(bench.sent(B, DropReason::BadOffload), (2, 1));
    assert_eq!(bench.sent(A, DropReason::LinkDown), (0, 1));
    assert_eq!(bench.io.port(B).unwrap().counters.host_copies.get(), 3);
    bench.check();
}

#[test]
fn an_unparsed_checksum_goes_up_and_unparsed_segments_do_not() {
    let mut bench = Bench::new();
    bench.port(A, None);
    // An IPv4 header that goes on after the snapshot's end is what the parser says it does not follow.
    let up = |bench: &mut Bench, header: NetHeader| {
        let mut sender = Driver::new(256, OFFLOADS);
        let mut ring = sender.tx();
        sender.write(BUFFERS_AT, &header.to_bytes());
        sender.write(BUFFERS_AT + HEADER as u64, &[7; 300]);
        sender.desc(0, BUFFERS_AT, HEADER as u32 + 300, 0, 0);
        sender.offer(0);
        let mut burst = Burst::new();
        ring.receive(&mut burst, 1).unwrap();
        let mut packet = Packet::default();
        burst.copy_head(&burst.frames()[0], packet.reset(A, 300, SNAPSHOT));
        let mut packets = [packet];
        let mut egress = BurstEgress::new(&mut bench.io, &mut bench.jobs, &burst, &packets, (0, 0), true);
        egress.upcall(0, &mut packets[0], Upcall::Unparsable);
        egress.finish(&packets);
        ring.complete(&mut burst);
        bench.up.pop().ok().map(|held| held.packet.offload)
    };
    let csum =
        NetHeader { flags: NetHeader::NEEDS_CSUM, csum_start: 280, csum_offset: 18, ..NetHeader::default() };
    let offload = up(&mut bench, csum).unwrap();
    assert!(offload.needs_csum && (offload.csum_start, offload.csum_offset) == (280, 18));
    assert_eq!(up(&mut bench, NetHeader { csum_offset: 19, ..csum }), None, "outside the frame");
    assert_eq!(up(&mut bench, NetHeader { csum_start: 13, ..csum }), None, "in the Ethernet header");
    let gso = NetHeader { gso_type: NetHeader::GSO_TCPV4, gso_size: 100, ..csum };
    assert_eq!(up(&mut bench, gso), None);
    assert_eq!(up(&mut bench, NetHeader::default()).map(|offload| offload.needs_csum), Some(false));
    let mut drops = [0; DropReason::COUNT];
    bench.io.port(A).unwrap().counters.rx_drops.sum_into(&mut drops);
    assert_eq!(drops[DropReason::BadOffload as usize], 3);
}

#[test]
fn one_port_cannot_take_all_large_buffers() {
    let mut bench = Bench::new();
    bench.port(A, None);
    for _ in 0..LARGE {
        bench.up(9000);
    }
    assert_eq!(bench.up.slots(), LARGE / 4);
    bench.up(1400);
    assert_eq!(bench.up.slots(), LARGE / 4 + 1, "its small packets still go");
    let mut scratch = Scratch::default();
    while let Ok(mut held) = bench.up.pop() {
        held.answer = Some(Decision::Drop(DropReason::HostDrop));
        bench.io.host_answer(held, &mut scratch);
    }
    let port = bench.io.port(A).unwrap();
    assert_eq!((port.at_host, port.large_at_host), ([0; 3], 0));
}

#[test]
fn the_longest_frame_with_what_was_pushed_is_whole_in_software() {
    use crate::frames::outgoing::{Outgoing, Tail};
    let (header, frame) = tso(65_000);
    let mut long = frame;
    long.resize(MAX_FRAME as usize, 7);
    let mut packet = Packet::from_frame(A, &long);
    let mut key = Key::default();
    let _ = switch_core::parse::extract(&mut packet, &mut key);
    packet.offload = switch_core::offload::check(&software::raw_header(&header), &packet, &key).unwrap();
    assert_eq!(packet.offload.gso, Gso::Tcp4);
    packet.insert(12, 4).unwrap();
    packet.head_mut()[12..16].copy_from_slice(&[0x81, 0, 0, 5]);
    let outgoing =
        Outgoing { packet: &packet, tail: Tail::Private(&long[MAX_SNAPSHOT..]), max_len: u32::MAX };
    let mut payload = 0;
    software::Software::default().send(&outgoing, |frame, _| payload += frame.len() - 58).unwrap();
    assert_eq!(payload, MAX_FRAME as usize - 54);
}

#[test]
fn what_is_cut_is_finished_before() {
    use crate::frames::outgoing::{Outgoing, Tail};
    let (header, frame) = tso(2500);
    let partial = NetHeader { gso_type: NetHeader::GSO_NONE, gso_size: 0, ..header };
    for (header, count) in [(header, 3), (partial, 1)] {
        let mut packet = Packet::from_frame(A, &frame);
        let mut key = Key::default();
        let _ = switch_core::parse::extract(&mut packet, &mut key);
        packet.offload = switch_core::offload::check(&software::raw_header(&header), &packet, &key).unwrap();
        let tail = Tail::Private(&frame[MAX_SNAPSHOT.min(frame.len())..]);
        let made = |max_len: u32| {
            let outgoing = Outgoing { packet: &packet, tail, max_len };
            assert_eq!(software::is_accepted(&outgoing, u64::MAX), max_len == u32::MAX);
            let mut frames = Vec::new();
            software::Software::default().send(&outgoing, |frame, _| frames.push(frame.to_vec())).unwrap();
            frames
        };
        let (whole, cut) = (made(u32::MAX), made(60));
        assert_eq!(whole.len(), count);
        assert_eq!(cut, whole.iter().map(|frame| frame[..60].to_vec()).collect::<Vec<_>>());
    }
}

#[test]
fn a_port_pays_what_it_owes() {
    const QUANTUM: i64 = 1000;
    let mut sender = Driver::new(8, MODERN);
    let mut bench = Bench::new();
    bench.port(A, None);
    let port = bench.io.port(A).unwrap();
    port.rx[0].ring = Some(RxRing::Guest(sender.tx()));
    assert!(!port.begin_round(1, QUANTUM));
    assert_eq!(port.deficit, 0, "nothing is saved up");
    sender.chain(0, &[(BUFFERS_AT, 100)], 0);
    sender.offer(0);
    assert!(port.begin_round(2, QUANTUM) && port.deficit > 0);
    port.charge(0, 3500, QUANTUM);
    assert_eq!(port.counters.queue_cycles[0].get(), 3500, "it is counted where it is paid for");
    let mut burst = Burst::new();
    let ring = port.rx[0].ring.as_mut().unwrap();
    ring.receive(&mut burst, 1).unwrap();
    ring.complete(&mut burst);
    assert!(!port.begin_round(3, QUANTUM));
    sender.offer(0);
    assert!(port.begin_round(4, QUANTUM) && port.deficit <= 0, "being empty meanwhile settles nothing");
    assert!(port.begin_round(5, QUANTUM) && port.deficit > 0);
    port.charge(0, u64::MAX / 2, QUANTUM);
    let rounds = (6..1000).take_while(|&round| port.begin_round(round, QUANTUM) && port.deficit <= 0).count();
    assert!(rounds <= 100, "{rounds}");
    port.charge(0, 3500, QUANTUM);
    assert!(port.begin_round(1003, QUANTUM) && port.deficit > 0, "rounds in which nobody looked count too");
}

#[test]
fn expensive_packets_are_taken_one_by_one() {
    let mut bench = Bench::new();
    bench.port(A, None);
    let queue = &mut bench.io.port(A).unwrap().rx[0];
    assert_eq!(queue.batch, super::BURST);
    (0..10).for_each(|_| queue.adapt(1001, 1000));
    assert_eq!(queue.batch, 1);
    (0..10).for_each(|_| queue.adapt(499, 1000));
    assert_eq!(queue.batch, super::BURST);
}

/// A receive queue of port A on a ring of its own, as a worker polls it.
fn polled(bench: &mut Bench, driver: &mut Driver) -> u64 {
    let ring = RxRing::Guest(driver.tx());
    let id = ring.id();
    bench.io.port(A).unwrap().rx[0].ring = Some(ring);
    id
}

impl Bench {
    /// What the worker does once a round about a queue that it is to hand over, this many cycles later.
    fn round(&mut self, cycles: u64) -> Stage {
        self.io.now_cycles += cycles;
        self.io.retry_parked();
        self.io.let_go();
        self.io.port(A).unwrap().handover.stage()
    }

    fn ask_for(&mut self, queue: usize) {
        self.io.port(A).unwrap().handover.begin();
        self.io.release_queue(A, queue);
    }
}

#[test]
fn a_queue_is_handed_over_when_nothing_of_it_is_on_its_way() {
    let (mut bench, mut sender) = (Bench::new(), Driver::new(256, OFFLOADS));
    let guest = Guest::new(OFFLOADS);
    bench.port(A, None);
    bench.port(B, Some(&guest));
    polled(&mut bench, &mut sender);
    bench.up(100);
    bench.send(&[udp(1)], &[B]);
    assert_eq!(bench.io.parked, 1);
    bench.ask_for(0);
    let port = bench.io.port(A).unwrap();
    assert!(port.rx.is_empty() && !port.begin_round(1, 100), "it rests");
    assert!(bench.io.is_waiting(), "the worker does not sleep");
    assert_eq!(bench.round(PATIENCE - 1), Stage::Asked);
    // What was parked is given up, but there is a packet at the host.
    assert_eq!((bench.round(1), bench.io.parked), (Stage::Asked, 0));
    // Its answer has to wait for room, and is waited for.
    let mut held = bench.up.pop().unwrap();
    held.answer = Some(Decision::Execute(plan(&[B])));
    bench.io.now_cycles += 1;
    bench.io.host_answer(held, &mut Scratch::default());
    assert_eq!((bench.round(0), bench.io.parked), (Stage::Asked, 1));
    bench.io.port(A).unwrap().deficit = -500;
    assert_eq!((bench.round(PATIENCE - 1), bench.io.parked), (Stage::Asked, 1));
    assert_eq!((bench.round(1), bench.io.parked), (Stage::Free, 0));
    let port = bench.io.port(A).unwrap();
    assert!(port.rx.is_empty() && port.resting.is_empty());
    // What it owes goes with its last queue.
    assert_eq!((port.deficit, port.handover.end(), port.handover.stage()), (0, -500, Stage::Idle));
    bench.io.take_queue(A, 0, -500);
    let port = bench.io.port(A).unwrap();
    assert_eq!((port.rx.len(), port.rx[0].index, port.deficit), (1, 0, -500));
    bench.check();
}

#[test]
fn a_queue_stays_when_the_host_takes_too_long() {
    let (mut bench, mut sender) = (Bench::new(), Driver::new(256, OFFLOADS));
    bench.port(A, None);
    let ring = polled(&mut bench, &mut sender);
    bench.ask_for(3);
    assert_eq!(bench.round(0), Stage::Kept, "it does not have that one");
    bench.up(100);
    bench.ask_for(0);
    assert_eq!(bench.round(PATIENCE * 399), Stage::Asked);
    assert_eq!(bench.round(PATIENCE), Stage::Kept);
    let port = bench.io.port(A).unwrap();
    assert_eq!(port.rx[0].ring.as_ref().map(RxRing::id), Some(ring), "as it was");
    assert!(!bench.io.is_waiting());
    // Neither does a port that goes meanwhile leave anything behind.
    bench.ask_for(0);
    assert!(bench.io.remove_port(A).is_some() && !bench.io.is_waiting() && !bench.io.let_go());
    let held = bench.up.pop().unwrap();
    bench.io.host_answer(held, &mut Scratch::default());
    bench.check();
}

#[test]
fn a_checksum_that_a_header_leaves_open_is_not_forgotten() {
    use switch_core::tunnel::{Encapsulation, Link, Origin, Outer, OuterSpec};
    let (mut bench, mut b, mut c) = (Bench::new(), Guest::new(OFFLOADS), Guest::new(PLAIN));
    bench.port(A, None);
    bench.port(B, Some(&b));
    bench.port(C, Some(&c));
    b.offer(4);
    c.offer(4);
    let outer = Outer::new(&OuterSpec {
        link: Link { dst: [2; 6], src: [4; 6], vlan: None },
        src: [192, 0, 2, 1].into(),
        dst: [192, 0, 2, 2].into(),
        tos: Origin::Set(0),
        ttl: Origin::Set(64),
        df: false,
        checksum: true,
        encapsulation: Encapsulation::Gre { key: None },
    })
    .unwrap();
    // The sender's header is empty: the burst has nothing left to do.
    let (header, frame) = udp(7);
    let mut sender = Driver::new(4, OFFLOADS);
    let mut ring = sender.tx();
    sender.write(BUFFERS_AT, &header.to_bytes());
    sender.write(BUFFERS_AT + HEADER as u64, &frame);
    sender.desc(0, BUFFERS_AT, (HEADER + frame.len()) as u32, 0, 0);
    sender.offer(0);
    let mut burst = Burst::new();
    assert_eq!(ring.receive(&mut burst, 1), Ok(1));
    let mut packets = [Packet::default()];
    burst.copy_head(&burst.frames()[0], packets[0].reset(A, frame.len() as u32, SNAPSHOT));
    let mut egress = BurstEgress::new(&mut bench.io, &mut bench.jobs, &burst, &packets, (0, 0), false);
    let _ = switch_core::parse::extract(&mut packets[0], &mut Key::default());
    outer.push(&mut packets[0], 1).unwrap();
    egress.output(0, &mut packets[0], B, u32::MAX, false);
    egress.output(0, &mut packets[0], C, u32::MAX, true);
    egress.finish(&packets);
    ring.complete(&mut burst);
    let [(header, _)] = b.received()[..] else { panic!("one frame") };
    assert_eq!((header.flags, header.csum_start, header.csum_offset), (NetHeader::NEEDS_CSUM, 34, 4));
    let [(header, ref frame)] = c.received()[..] else { panic!("one frame") };
    assert_eq!(header.flags, 0);
    assert_eq!(switch_core::checksum::checksum(&frame[34..]), 0, "it was completed");
    bench.check();
}
