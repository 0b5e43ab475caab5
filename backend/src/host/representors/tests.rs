//! Representors with the worker's and OVS's parts played by the test.

use super::*;
use crate::datapath::Datapath;
use crate::frames::pool::BUFFERS;
use crate::host::bridge::Vlans;
use crate::host::path::{Budget, HeldPacket, HostLink, HostPath};
use crate::host::tap::testing::{PacketSocket, in_namespace, ip, is_complete, tcp, wait_for};
use crate::ovs::mirror::Misses;
use crate::port_config::VlanMode;
use crate::quiesce::{Quiescence, WorkerEpoch};
use rtrb::{Consumer, Producer, RingBuffer};
use std::sync::Mutex;
use switch_core::flow::{FlowRef, FlowSpec, Source};
use switch_core::planner::PlanError;

const A: PortId = PortId { slot: 0, generation: 1 };
const B: PortId = PortId { slot: 1, generation: 4 };
const KERNEL: Settings = Settings { userspace: false, offloads: true };
const USERSPACE: Settings = Settings { userspace: true, offloads: false };
/// Bytes of [`tcp`]'s headers.
const HEADERS: usize = 54;

struct NoFlows;

impl FlowTable for NoFlows {
    fn put(&mut self, _: Source, _: FlowSpec) -> Result<FlowRef, PlanError> {
        Ok(FlowRef::default())
    }

    fn delete(&mut self, _: FlowRef) {}

    fn last_used(&self, _: FlowRef) -> Millis {
        0
    }
}

fn host_port(id: PortId, name: &str) -> HostPort {
    let vlans = Vlans::from(&VlanMode::Access(7));
    HostPort { id, name: name.into(), vlans, mtu: 1500, is_device: false, polled_by: vec![0] }
}

/// The worker's ends of all queues.
struct FakeWorker {
    up: Producer<Box<HeldPacket>>,
    answers: Consumer<Box<HeldPacket>>,
    deliveries: Consumer<Box<HeldPacket>>,
    delivered: Producer<Box<HeldPacket>>,
    waker: Arc<Waker>,
    /// Signs off with it.
    _epoch: WorkerEpoch,
}

impl FakeWorker {
    fn new() -> (FakeWorker, HostLink, DownLink) {
        let epoch = Arc::new(Quiescence::new()).register("fake").unwrap();
        let (up, from_worker) = RingBuffer::new(BUFFERS);
        let (to_worker, answers) = RingBuffer::new(BUFFERS);
        let (deliver, deliveries) = RingBuffer::new(BUFFERS);
        let (delivered, returned) = RingBuffer::new(BUFFERS);
        let link = HostLink { from_worker, to_worker, worker: epoch.waker(), due: false };
        let down = DownLink::new(deliver, returned, epoch.waker());
        let waker = Arc::new(Waker::new().unwrap());
        (FakeWorker { up, answers, deliveries, delivered, waker, _epoch: epoch }, link, down)
    }

    /// Asks the host about a packet and waits for the answer.
    fn ask(&mut self, held: Box<HeldPacket>) -> Decision {
        self.up.push(held).unwrap();
        self.waker.wake();
        wait_for("an answer", || self.answers.pop().ok()).answer.unwrap()
    }

    fn receive(&mut self) -> Box<HeldPacket> {
        wait_for("a delivery", || self.deliveries.pop().ok())
    }

    fn give_back(&mut self, held: Box<HeldPacket>) {
        self.delivered.push(held).unwrap();
        self.waker.wake_if_short();
    }
}

/// Representors of ports A and B, with guests, and what sees A's TAP as OVS does.
struct Bed {
    host: Representors,
    worker: FakeWorker,
    ovs: PacketSocket,
}

impl Bed {
    fn new(settings: Settings) -> Bed {
        let (worker, _, down) = FakeWorker::new();
        let mut host =
            Representors::new(settings, vec![down], worker.waker.clone(), Arc::new(Misses::new().unwrap()));
        for (id, name) in [(A, "vm-a"), (B, "vm-b")] {
            host.port_added(host_port(id, name), &mut NoFlows).unwrap();
            host.link_changed(id, true);
        }
        let ovs = PacketSocket::new(host.port(A).unwrap().tap.as_ref().unwrap().index());
        Bed { host, worker, ovs }
    }

    /// Sends up a packet of port A.
    fn up(&mut self, frame: &(NetHeader, Vec<u8>)) -> Decision {
        let (packet, key) = checked(A, frame);
        self.host.packet(&packet, &frame.1[packet.head().len()..], &key, 0, &mut NoFlows)
    }

    /// Serves until a worker has got something.
    fn down(&mut self) -> Box<HeldPacket> {
        wait_for("a delivery", || {
            self.worker.waker.poll().into_iter().for_each(|token| self.host.readable(token));
            self.host.serve();
            self.worker.deliveries.pop().ok()
        })
    }
}

fn checked(id: PortId, (header, frame): &(NetHeader, Vec<u8>)) -> (Packet, Key) {
    let mut packet = Packet::from_frame(id, frame);
    let mut key = Key::default();
    assert_eq!(extract(&mut packet, &mut key), Extracted::Done);
    packet.offload = offload::check(&software::raw_header(header), &packet, &key).unwrap();
    (packet, key)
}

fn held(packet: Packet, frame: &[u8], budget: Budget) -> Box<HeldPacket> {
    let tail = frame[packet.head().len()..].into();
    Box::new(HeldPacket { packet, tail, answer: None, budget, queue: 0 })
}

fn bytes(held: &HeldPacket) -> Vec<u8> {
    [held.packet.head(), &held.tail[..held.packet.tail_len() as usize]].concat()
}

#[test]
fn the_kernel_gets_packets_as_they_are() {
    in_namespace(|| {
        let mut bed = Bed::new(KERNEL);
        for (payload, size) in [(60_000, 1400), (1400, 0), (0, 0)] {
            let sent = tcp(payload, size);
            assert!(matches!(bed.up(&sent), Decision::Taken));
            let (header, frame) = bed.ovs.receive();
            assert_eq!((header.flags, header.gso_type, header.gso_size), (1, sent.0.gso_type, size));
            assert_eq!(frame, sent.1);
        }
        assert!(bed.ovs.try_receive().is_none());
    });
}

#[test]
fn a_device_of_the_bridge_has_no_tap_and_what_cannot_go_back_is_a_named_drop() {
    in_namespace(|| {
        let mut bed = Bed::new(KERNEL);
        let (id, other) = (PortId { slot: 2, generation: 1 }, PortId { slot: 3, generation: 1 });
        for (id, name) in [(id, "eth1"), (other, "eth2")] {
            let port = HostPort { is_device: true, ..host_port(id, name) };
            bed.host.port_added(port, &mut NoFlows).unwrap();
            bed.host.link_changed(id, true);
        }
        assert_eq!(bed.host.losing(), []);
        let frame = tcp(9, 0);
        let (packet, key) = checked(id, &frame);
        for now in 0..2 {
            let tail = &frame.1[packet.head().len()..];
            let decision = bed.host.packet(&packet, tail, &key, now, &mut NoFlows);
            assert!(matches!(decision, Decision::Drop(DropReason::HostExecute)), "there is no such device");
            // Each device has its own troubles.
            let [(losing, why)] = &bed.host.losing()[..] else { panic!("{:?}", bed.host.losing()) };
            assert!(*losing == id && why.starts_with("packets cannot go back to Open vSwitch: "), "{why}");
        }
        let (packet, key) = checked(other, &frame);
        bed.host.packet(&packet, &frame.1[packet.head().len()..], &key, 2, &mut NoFlows);
        assert_eq!(bed.host.losing().iter().map(|(id, _)| *id).collect::<Vec<_>>(), [id, other]);
        bed.host.set_datapath(USERSPACE);
        bed.host.tick(2, &mut NoFlows);
        assert!(bed.host.port(id).unwrap().tap.is_none());
        bed.host.port_removed(id, false, &mut NoFlows);
        assert!(bed.host.port(id).is_none());
        assert_eq!(bed.host.losing().len(), 1);
    });
}

#[test]
fn the_userspace_datapath_gets_complete_frames() {
    in_namespace(|| {
        let mut bed = Bed::new(USERSPACE);
        for (payload, size, pieces) in [(3000, 1400, vec![1400, 1400, 200]), (900, 0, vec![900])] {
            assert!(matches!(bed.up(&tcp(payload, size)), Decision::Taken));
            for piece in pieces {
                let (header, frame) = bed.ovs.receive();
                assert_eq!((header.flags & NetHeader::NEEDS_CSUM, header.gso_type), (0, 0));
                assert_eq!(frame.len(), HEADERS + piece);
                assert!(is_complete(&frame));
            }
        }
        assert!(bed.ovs.try_receive().is_none());
    });
}

#[test]
fn what_ovs_undoes_when_it_takes_up_a_new_tap_is_done_again() {
    in_namespace(|| {
        let mut bed = Bed::new(KERNEL);
        ip("link set dev vm-a down arp on");
        assert!(matches!(bed.up(&tcp(9, 0)), Decision::Taken), "no packet waits for it");
        ip("link set dev vm-b down arp on");
        bed.host.tick(0, &mut NoFlows);
        for name in ["vm-a", "vm-b"] {
            let shown = ip(&format!("-o link show dev {name}"));
            assert!(shown.contains("NOARP") && shown.contains(",UP"), "{shown}");
        }
    });
}

#[test]
fn what_a_tap_does_not_take_is_a_named_drop() {
    in_namespace(|| {
        let mut bed = Bed::new(KERNEL);
        let reason = |decision| match decision {
            Decision::Drop(reason) => reason,
            _ => panic!("it was taken"),
        };
        (0..SETTLING).for_each(|_| bed.host.tick(0, &mut NoFlows));
        ip("link set dev vm-a down");
        assert_eq!(reason(bed.up(&tcp(9, 0))), DropReason::HostTapDown);
        ip("link set dev vm-a up");
        assert!(matches!(bed.up(&tcp(9, 0)), Decision::Taken));
        ip("link delete dev vm-a");
        assert_eq!(reason(bed.up(&tcp(9, 0))), DropReason::HostTapDown);
        assert!(bed.host.port(A).unwrap().tap.is_none());
        bed.host.tick(0, &mut NoFlows);
        assert!(matches!(bed.up(&tcp(9, 0)), Decision::Taken), "it is made again");
        assert!(ip("link show dev vm-a").contains("LOWER_UP"), "with the carrier that it had");
        bed.host.port_removed(A, false, &mut NoFlows);
        assert_eq!(reason(bed.up(&tcp(9, 0))), DropReason::HostTapDown);
        assert!(!ip("-o link").contains("vm-a") && ip("-o link").contains("vm-b"));
    });
}

#[test]
fn what_ovs_outputs_comes_down_checked() {
    in_namespace(|| {
        let mut bed = Bed::new(KERNEL);
        for (payload, size) in [(60_000, 1400), (1400, 0), (0, 0)] {
            let sent = tcp(payload, size);
            bed.ovs.send(&sent.0, &sent.1);
            let held = bed.down();
            assert_eq!(bytes(&held), sent.1);
            assert!(held.answer.is_none());
            assert_eq!(held.packet.in_port, A);
            assert_eq!(held.packet.offload, checked(A, &sent).0.offload);
            assert_eq!(held.packet.layout.l4, 34);
        }
        // The checksum of what is inside a tunnel is none that a guest's driver would complete.
        let (header, inner) = tcp(100, 0);
        let mut outer = inner[..14].to_vec();
        outer.extend([
            0x45,
            0,
            0,
            (36 + inner.len()) as u8,
            0,
            0,
            0,
            0,
            64,
            17,
            0,
            0,
            10,
            0,
            0,
            1,
            10,
            0,
            0,
            2,
        ]);
        outer.extend([0, 1, 0x12, 0xb5, 0, (16 + inner.len()) as u8, 0, 0, 8, 0, 0, 0, 0, 0, 1, 0]);
        let header = NetHeader { csum_start: header.csum_start + outer.len() as u16, ..header };
        bed.ovs.send(&header, &[&outer[..], &inner].concat());
        let held = bed.down();
        assert!(held.answer.is_none());
        assert_eq!(held.packet.offload, Offload::default());
        assert!(is_complete(&bytes(&held)[outer.len()..]));
        // Segments of such there can be none.
        let gso = NetHeader { gso_type: NetHeader::GSO_TCPV4, gso_size: 50, ..header };
        let mut frame = [&outer[..], &inner].concat();
        let id = host_port(A, "vm-a");
        descend(&mut bed.host.down, &id, &gso, &mut frame);
        let held = bed.down();
        assert!(matches!(held.answer, Some(Decision::Drop(DropReason::BadOffload))));
    });
}

/// An IPv6 packet whose TCP header lies behind more options than the parser follows.
fn unparsable() -> (NetHeader, Vec<u8>) {
    let (_, segment) = tcp(100, 0);
    let mut frame = segment[..12].to_vec();
    frame.extend([0x86, 0xdd, 0x60, 0, 0, 0]);
    frame.extend((1608 + 120u16).to_be_bytes());
    frame.extend([0, 64]);
    frame.extend([0; 32]);
    // One byte of padding (type 0) after another.
    frame.extend([6, 200]);
    frame.extend([0; 1606]);
    frame.extend(&segment[34..]);
    let flags = NetHeader::NEEDS_CSUM;
    (NetHeader { flags, csum_start: 54 + 1608, csum_offset: 16, ..NetHeader::default() }, frame)
}

#[test]
fn the_thread_wakes_for_packets_taps_links_and_buffers() {
    in_namespace(|| {
        let (mut worker, link, down) = FakeWorker::new();
        let host =
            Representors::new(KERNEL, vec![down], worker.waker.clone(), Arc::new(Misses::new().unwrap()));
        let flows = Arc::new(Mutex::new(NoFlows));
        let path = HostPath::spawn(Box::new(host), vec![link], flows, worker.waker.clone()).unwrap();
        path.port_added(host_port(A, "vm-a")).unwrap();
        path.port_added(host_port(B, "vm-b")).unwrap();
        let refused = path.port_added(host_port(PortId { slot: 2, generation: 1 }, "lo")).unwrap_err();
        assert!(refused.to_string().starts_with("'lo' is a network device already"), "{refused}");
        let has_carrier = |name: &str| ip(&format!("link show dev {name}")).contains("LOWER_UP");
        assert!(!has_carrier("vm-a"));
        for (id, name) in [(A, "vm-a"), (B, "vm-b")] {
            path.link_teller(id)(true);
            wait_for("the carrier", || has_carrier(name).then_some(()));
        }
        let index = |name| {
            let line = ip(&format!("-o link show dev {name}"));
            line.split(':').next().unwrap().parse().unwrap()
        };
        let (a, b) = (PacketSocket::new(index("vm-a")), PacketSocket::new(index("vm-b")));

        // Up, through the queues: parsed, and what nobody can parse with its checksum complete.
        let sent = tcp(500, 0);
        assert!(matches!(worker.ask(held(checked(B, &sent).0, &sent.1, Budget::Miss)), Decision::Taken));
        assert_eq!(b.receive().1, sent.1);
        let (header, frame) = unparsable();
        let mut packet = Packet::from_frame(A, &frame);
        packet.offload = offload::check_unparsed(&software::raw_header(&header), packet.len).unwrap();
        assert!(matches!(worker.ask(held(packet, &frame, Budget::Punt)), Decision::Taken));
        let (seen, bytes_seen) = a.receive();
        assert_eq!(seen.flags & NetHeader::NEEDS_CSUM, 0);
        assert!(is_complete(&[&tcp(0, 0).1[..34], &bytes_seen[54 + 1608..]].concat()));

        // Down, one by one: the thread sleeps between them, and the deadline is longer than the tick.
        let start = std::time::Instant::now();
        for n in 0..200 {
            a.send(&NetHeader::default(), &tcp(n, 0).1);
            let held = worker.receive();
            assert_eq!((held.packet.in_port, held.packet.len), (A, (HEADERS + n) as u32));
            worker.give_back(held);
        }
        assert!(start.elapsed() < std::time::Duration::from_secs(100), "it wakes by the tick only");

        let start = std::time::Instant::now();
        // A worker that gives nothing back: so many of one port, and no more; another port's still come.
        let total = 300;
        for _ in 0..total {
            a.send(&NetHeader::default(), &tcp(1, 0).1);
        }
        let mut kept: Vec<_> = (0..256).map(|_| worker.receive()).collect();
        b.send(&NetHeader::default(), &tcp(2, 0).1);
        let other = worker.receive();
        assert_eq!(other.packet.in_port, B);
        assert!(worker.deliveries.is_empty());
        for got in 256..total {
            worker.give_back(kept.pop().unwrap());
            let held = worker.receive();
            assert_eq!(held.packet.in_port, A, "{got}");
            kept.push(held);
        }
        assert!(start.elapsed() < std::time::Duration::from_secs(20), "it wakes by the tick only");
        path.port_removed(A, false);
        assert!(!ip("-o link").contains("vm-a"));
    });
}

#[test]
fn a_sleeping_worker_takes_deliveries_and_gives_buffers_back() {
    let (mut datapath, ends) = Datapath::start(&[], 1024, 8).unwrap();
    let mut down = Down::new(ends.down);
    let start = std::time::Instant::now();
    for round in 1..=200 {
        // It sleeps by now, or is about to.
        wait_for("a sleep", || (datapath.worker_counters[0].sleeps.get() >= round).then_some(()));
        // For a port that is gone.
        let mut held = down.take(100).unwrap();
        held.packet = Packet::from_frame(A, &[0; 100]);
        down.send(0, held);
        down.flush();
        while !down.has_returned() {
            ends.waker.sleep_watching(1000, true, || down.has_returned());
            assert!(start.elapsed() < std::time::Duration::from_secs(50), "somebody was not woken");
        }
        down.reclaim();
    }
    datapath.stop();
}
