//! Packets both ways: pieces, queues, large ones, full rings, sleep, and very many.

use super::net::*;
use crate::virtio::{Blocked, Burst, Frame};
use crate::xdp::{XdpConfig, XdpMode, XdpPort, XdpRx, XdpTx};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fd::AsRawFd;
use std::net::UdpSocket;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};

/// Ports at both ends that take everything.
fn ports(wire: &Wire, config: impl Fn(&str) -> XdpConfig) -> (XdpPort, XdpPort) {
    let mut ports = (wire.near.open(&config("near")), wire.far.open(&config("far")));
    ports.0.classes().set_everything(true).unwrap();
    ports.1.classes().set_everything(true).unwrap();
    ports
}

/// Whether its descriptor is readable now.
fn readable(rx: &XdpRx) -> bool {
    let timeout = Timespec { tv_sec: 0, tv_nsec: 0 };
    poll(&mut [PollFd::from_borrowed_fd(rx.kick_fd(), PollFlags::IN)], Some(&timeout)).unwrap() > 0
}

/// All frames are where they were in the beginning.
fn balanced(rx: &XdpRx, tx: &XdpTx, rx_frames: u32, tx_frames: usize) {
    assert_eq!(rx.in_flight(), 0);
    wait_for("all frames", || {
        tx.notify();
        rx.free_frames() == rx_frames && tx.free_frames() == tx_frames
    });
    assert_eq!(rx.losses(), Default::default());
    assert_eq!(tx.lost(), 0);
}

#[test]
fn the_kernel_at_the_other_end_gets_what_is_sent() {
    let wire = Wire::new(1, 1500);
    let near = wire.near.open(&small("near", None));
    let tx = near.tx(0).unwrap();
    let socket = wire.far.run(|| UdpSocket::bind("10.9.0.2:4000").unwrap());
    socket.set_read_timeout(Some(DEADLINE)).unwrap();
    // Private head and body; the IPv4 header's checksum is right, UDP's is left out.
    let head = [&FAR_MAC[..], &NEAR_MAC, &[8, 0]].concat();
    let body = [
        &[0x45, 0, 0, 33, 0, 1, 0, 0, 64, 17, 0x66, 0xb7, 10, 9, 0, 1, 10, 9, 0, 2][..],
        &[0, 9, 0x0f, 0xa0, 0, 13, 0, 0],
        b"hello",
    ]
    .concat();
    let len = (head.len() + body.len()) as u32;
    let result = tx.send(&[Frame { body: &body, len, ..frame(&head) }]);
    assert_eq!((result.sent, result.blocked), (1, None));
    assert!(tx.is_waiting());
    tx.notify();
    let mut buffer = [0; 16];
    let n = socket.recv(&mut buffer).unwrap();
    assert_eq!(&buffer[..n], b"hello");
    assert!(!tx.is_waiting());
    wait_for("the frame", || tx.free_frames() == 128);
}

#[test]
fn a_packet_is_sent_on_from_where_it_was_received() {
    let wire = Wire::new(1, 1500);
    let (mut near, mut far) = ports(&wire, |name| small(name, None));
    let ((mut rx, tx), (mut far_rx, far_tx)) = (sides(&mut near), sides(&mut far));
    let packets: Vec<_> =
        (0..20u8).map(|i| ethernet(NEAR_MAC, 0x88b5, &vec![i; 46 + 70 * usize::from(i)])).collect();
    send_all(&far_tx, &packets);
    let mut burst = Burst::new();
    wait_for("all in one burst", || rx.pending() == 20);
    assert_eq!(rx.receive(&mut burst, 64), 20);
    assert_eq!(rx.in_flight(), 20);
    let head = [&FAR_MAC[..], &NEAR_MAC].concat();
    let frames: Vec<_> = (0..20)
        .map(|i| Frame {
            tail: burst.segments(i),
            tail_offset: 12,
            len: burst.frames()[i].len,
            ..frame(&head)
        })
        .collect();
    assert_eq!(tx.send(&frames[..]).sent, 20);
    tx.notify();
    rx.complete(&mut burst);
    for (got, was) in expect(&mut far_rx, 20).iter().zip(&packets) {
        assert_eq!(got[..12], head[..]);
        assert_eq!(got[12..], was[12..]);
    }
    balanced(&rx, &tx, 256, 128);
    balanced(&far_rx, &far_tx, 256, 128);
}

#[test]
fn bytes_that_a_frame_lacks_are_zero_and_not_another_packets() {
    let wire = Wire::new(1, 1500);
    let (mut near, mut far) = ports(&wire, |name| XdpConfig { tx_frames: 64, ..small(name, None) });
    let ((mut rx, _), (_, tx)) = (sides(&mut near), sides(&mut far));
    let secret = vec![ethernet(NEAR_MAC, 0x88b5, &[0x55; 400]); 64];
    send_all(&tx, &secret);
    expect(&mut rx, 64);
    wait_for("the frames", || tx.free_frames() == 64);
    let short = ethernet(NEAR_MAC, 0x88b5, &[1; 20]);
    assert_eq!(tx.send(&[Frame { len: 300, ..frame(&short) }, frame(&short[..3])]).sent, 2);
    tx.notify();
    let got = expect(&mut rx, 2);
    assert_eq!(got[0], [&short[..], &[0; 266]].concat());
    assert_eq!(got[1], [&short[..3], &[0; 11]].concat(), "what is no Ethernet frame is made one");
}

#[test]
fn each_queue_has_its_own_packets() {
    let wire = Wire::new(4, 1500);
    let (mut near, far) = ports(&wire, |name| small(name, None));
    assert_eq!((near.queues(), far.queues()), (4, 4));
    let mut rxs: Vec<_> = (0..4).map(|q| near.take_rx(q).unwrap()).collect();
    for q in 0..4u8 {
        let tx = far.tx(q.into()).unwrap();
        assert_eq!(tx.queue(), u32::from(q));
        let packets: Vec<_> = (0..50).map(|i| ethernet(NEAR_MAC, 0x88b5, &[[q, i]; 30].concat())).collect();
        send_all(&tx, &packets);
        // A veth's queues are joined one to one.
        assert_eq!(rxs[usize::from(q)].queue(), u32::from(q));
        assert_eq!(expect(&mut rxs[usize::from(q)], 50), packets);
        assert!(rxs.iter().all(|rx| rx.pending() == 0));
    }
}

#[test]
fn jumbo_frames_come_and_go_in_pieces() {
    for mode in [XdpMode::Copy, XdpMode::Generic] {
        let wire = Wire::new(1, 9000);
        let (mut near, mut far) = ports(&wire, |name| small(name, Some(mode)));
        assert!(near.multi_buffer() && near.describe().contains("4096-byte frames, multi-buffer"));
        let ((mut rx, tx), (mut far_rx, far_tx)) = (sides(&mut near), sides(&mut far));
        let lengths = [9000, 46, 3826, 3827, 4082, 4083, 8178, 8179, 8999, 1500];
        let packets: Vec<_> = (0..8)
            .flat_map(|_| lengths)
            .map(|len: usize| {
                ethernet(NEAR_MAC, 0x88b5, &(0..len).map(|i| (i % 251) as u8).collect::<Vec<_>>())
            })
            .collect();
        let mut got = vec![];
        for some in packets.chunks(10) {
            send_all(&far_tx, some);
            got.extend(expect(&mut rx, 10));
        }
        assert_eq!(got.len(), packets.len());
        for (got, was) in got.iter().zip(&packets) {
            assert!(got == was, "{mode}: {} bytes came, {} were sent", got.len(), was.len());
        }
        // Back again from pieces.
        send_all(&far_tx, &packets[..1]);
        let mut burst = Burst::new();
        wait_for("a packet", || rx.receive(&mut burst, 1) == 1);
        assert!(burst.segments(0).len() > 1);
        let tail = burst.segments(0);
        assert_eq!(tx.send(&[Frame { tail, len: 9014, ..frame(&[]) }]).sent, 1);
        tx.notify();
        rx.complete(&mut burst);
        assert_eq!(expect(&mut far_rx, 1), packets[..1]);
        balanced(&rx, &tx, 256, 128);
        balanced(&far_rx, &far_tx, 256, 128);
    }
}

#[test]
fn a_full_send_ring_says_so_and_a_frame_too_long_is_passed_over() {
    let wire = Wire::new(1, 1500);
    let (mut near, far) = ports(&wire, |name| small(name, None));
    let (mut rx, tx) = (near.take_rx(0).unwrap(), far.tx(0).unwrap());
    let packet = ethernet(NEAR_MAC, 0x88b5, &[7; 100]);
    let many = vec![frame(&packet); 200];
    let result = tx.send(&many[..]);
    assert_eq!((result.sent, result.blocked), (128, Some(Blocked::Full)));
    let result = tx.send(&many[..]);
    assert_eq!((result.sent, result.blocked), (0, Some(Blocked::Full)));
    assert_eq!(rx.pending(), 0, "nothing leaves before it is notified");
    tx.notify();
    expect(&mut rx, 128);
    wait_for("frames", || tx.free_frames() == 128);
    let (long, longest) = (vec![1; 1523], vec![1; 1522]);
    let result = tx.send(&[frame(&packet), frame(&long), frame(&longest)]);
    assert_eq!((result.sent, result.blocked), (1, Some(Blocked::TooBig)));
    assert_eq!(tx.send(&[frame(&packet)]).sent, 1);
    tx.notify();
    expect(&mut rx, 2);
}

#[test]
fn a_receiver_that_is_too_slow_loses_packets_by_number_but_no_frames() {
    let wire = Wire::new(1, 1500);
    let (mut near, far) = ports(&wire, |name| small(name, None));
    let (mut rx, tx) = (near.take_rx(0).unwrap(), far.tx(0).unwrap());
    let packets: Vec<_> =
        (0..400u32).map(|i| ethernet(NEAR_MAC, 0x88b5, &[i.to_be_bytes(); 15].concat())).collect();
    for round in 1..4 {
        send_all(&tx, &packets);
        wait_for("all but what there is no room for", || {
            let losses = rx.losses();
            losses.dropped.max(losses.ring_full).max(losses.no_frame) >= round * 144
        });
        assert_eq!(expect(&mut rx, 256), packets[..256]);
        assert_eq!((rx.free_frames(), rx.in_flight()), (256, 0));
    }
}

#[test]
fn a_sleeper_is_woken() {
    let wire = Wire::new(1, 1500);
    let (mut near, far) = ports(&wire, |name| small(name, None));
    let (mut rx, tx) = (near.take_rx(0).unwrap(), far.tx(0).unwrap());
    let packet = ethernet(NEAR_MAC, 0x88b5, &[7; 100]);
    let asleep = AtomicBool::new(false);
    // As workers wait: edge triggered.
    let epoll = Epoll::new().unwrap();
    let interest = EpollEvent::new(EventSet::IN | EventSet::EDGE_TRIGGERED, 0);
    epoll.ctl(ControlOperation::Add, rx.kick_fd().as_raw_fd(), interest).unwrap();
    for _ in 0..20 {
        std::thread::scope(|scope| {
            scope.spawn(|| {
                wait_for("sleep", || asleep.load(Ordering::Acquire));
                send_all(&tx, std::slice::from_ref(&packet));
            });
            assert!(rx.arm());
            assert!(!readable(&rx));
            asleep.store(true, Ordering::Release);
            while rx.arm() {
                let woken = epoll.wait(DEADLINE.as_millis() as i32, &mut [EpollEvent::default()]).unwrap();
                assert!(woken > 0, "nobody woke us");
            }
            assert!(readable(&rx));
        });
        rx.disarm();
        assert_eq!(expect(&mut rx, 1), std::slice::from_ref(&packet));
        asleep.store(false, Ordering::Release);
    }
}

/// A packet of sender `sender` with number `number`, of a length that varies.
fn numbered(dst: [u8; 6], sender: u8, number: u32) -> Vec<u8> {
    let number = number.to_be_bytes();
    let len = 46 + usize::from(number[3]) * 5 + usize::from(number[2]) % 100;
    let mut payload = vec![sender; len];
    payload[1..5].copy_from_slice(&number);
    ethernet(dst, 0x88b5, &payload)
}

/// Takes what has come, and checks that it is what `next` of each sender should be.
fn check(rx: &mut XdpRx, burst: &mut Burst, dst: [u8; 6], next: &mut [u32]) {
    while rx.receive(burst, 64) > 0 {
        for i in 0..burst.frames().len() {
            let packet = bytes(burst, i);
            let expected = &mut next[usize::from(packet[14])];
            let right = packet == numbered(dst, packet[14], *expected);
            assert!(right, "{:?} came instead of {expected:#x}", &packet[..20]);
            *expected += 1;
        }
        rx.complete(burst);
    }
}

#[test]
fn a_hundred_thousand_packets_each_way() {
    const COUNT: u32 = 100_000;
    let wire = Wire::new(1, 1500);
    let (mut near, mut far) = ports(&wire, |name| small(name, None));
    let (mut near, mut far) = (sides(&mut near), sides(&mut far));
    let (mut at_near, mut at_far, mut burst) = ([0], [0], Burst::new());
    let (mut from_near, mut from_far) = (0, 0);
    wait_for("all packets", || {
        for (tx, dst, sent, arrived) in
            [(&near.1, FAR_MAC, &mut from_near, at_far[0]), (&far.1, NEAR_MAC, &mut from_far, at_near[0])]
        {
            // No more under way than the receiver has frames for.
            let room = (COUNT - *sent).min(200 - (*sent - arrived)).min(32);
            let packets: Vec<_> = (*sent..*sent + room).map(|n| numbered(dst, 0, n)).collect();
            let frames: Vec<_> = packets.iter().map(|bytes| frame(bytes)).collect();
            *sent += tx.send(&frames[..]).sent as u32;
            tx.notify();
        }
        check(&mut near.0, &mut burst, NEAR_MAC, &mut at_near);
        check(&mut far.0, &mut burst, FAR_MAC, &mut at_far);
        (at_near, at_far) == ([COUNT], [COUNT])
    });
    balanced(&near.0, &near.1, 256, 128);
    balanced(&far.0, &far.1, 256, 128);
}

#[test]
fn workers_share_a_send_side_and_each_keeps_its_order() {
    const COUNT: u32 = 10_000;
    let wire = Wire::new(1, 1500);
    let (mut near, far) = ports(&wire, |name| XdpConfig { rx_frames: 4096, ..small(name, None) });
    let (mut rx, tx) = (near.take_rx(0).unwrap(), far.tx(0).unwrap());
    let (mut next, mut burst) = ([0; 3], Burst::new());
    let arrived = [const { AtomicU32::new(0) }; 3];
    std::thread::scope(|scope| {
        for sender in 0..3u8 {
            let (tx, arrived) = (&tx, &arrived[usize::from(sender)]);
            scope.spawn(move || {
                let mut sent = 0;
                wait_for("room", || {
                    // No more under way than the receiver has frames for.
                    let until = (sent + 16).min(arrived.load(Ordering::Acquire) + 1000).min(COUNT);
                    let packets: Vec<_> = (sent..until).map(|n| numbered(NEAR_MAC, sender, n)).collect();
                    let frames: Vec<_> = packets.iter().map(|bytes| frame(bytes)).collect();
                    sent += tx.send(&frames[..]).sent as u32;
                    tx.notify();
                    sent == COUNT
                });
            });
        }
        wait_for("all packets", || {
            check(&mut rx, &mut burst, NEAR_MAC, &mut next);
            arrived.iter().zip(next).for_each(|(arrived, next)| arrived.store(next, Ordering::Release));
            next == [COUNT; 3]
        });
    });
    balanced(&rx, &tx, 4096, 128);
}
