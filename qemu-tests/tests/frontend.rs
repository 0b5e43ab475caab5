//! The frontend library against rust-vmm's own device side.

mod mini_backend;

use std::sync::atomic::Ordering;
use std::time::Duration;

use mini_backend::{Device, MiniBackend, Wiring};
use qemu_tests::frontend::packet::{Packet, check};
use qemu_tests::frontend::{
    Builder, Descriptor, Error, Features, Frontend, Layout, NetHeader, Notify, QueuePair, RegionSpec,
};
use tempfile::TempDir;

const SOON: Duration = Duration::from_secs(5);
const QUIET: Duration = Duration::from_millis(50);

/// A listening device and a builder for a frontend that connects to it.
fn echo(pairs: usize, wiring: Wiring) -> (TempDir, MiniBackend, Builder) {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("port.sock");
    let backend = MiniBackend::serve(&path, Device::new(pairs, wiring));
    (directory, backend, Frontend::builder(path).queue_pairs(pairs))
}

/// A frame of `len` bytes that differs from others by `tag`.
fn frame(len: usize, tag: usize) -> Vec<u8> {
    (0..len).map(|at| (at * 7 + at / 256 + tag * 13) as u8).collect()
}

/// Sends a frame as given and takes the echo.
fn round_trip(queue: &mut QueuePair, bytes: &[u8], layout: &Layout) -> NetHeader {
    queue.tx.tx_with(bytes, &NetHeader::default(), layout).unwrap();
    let (header, back) = queue.rx.rx_wait(SOON).unwrap().expect("an echo");
    assert!(back == bytes, "{} bytes sent as {layout:?}, {} came back differently", bytes.len(), back.len());
    queue.tx.tx_reap().unwrap();
    header
}

#[test]
fn every_layout_carries_every_size() {
    let (_directory, _backend, builder) = echo(1, Wiring::Echo);
    let specs = [RegionSpec::mib(0, 8), RegionSpec::mib(3 << 30, 8), RegionSpec::mib(1 << 40, 8)];
    let mut guest = builder.memory(&specs).start().unwrap();
    assert!(guest.features().contains(Features::MRG_RXBUF | Features::INDIRECT_DESC));
    guest.queue(0).rx.rx_fill(2048, 128).unwrap();
    let layouts = [
        Layout::single(),
        Layout::split_header(),
        Layout::chain(2),
        Layout::chain(17),
        Layout::pieces(&[1, 10, 1, 14, 40]),
        Layout::single().indirect(),
        Layout::split_header().indirect(),
        Layout::chain(40).indirect(),
    ];
    for (tag, layout) in layouts.iter().enumerate() {
        for len in [14, 60, 1514, 2036, 2037, 9014, 65_549] {
            round_trip(guest.queue(0), &frame(len, tag), layout);
        }
    }
    assert_eq!(guest.queue(0).tx.free(), 256, "all transmit descriptors came back");
    assert_eq!(guest.queue(0).rx.in_flight(), 128, "all receive buffers are posted again");
}

#[test]
fn mergeable_buffers_are_put_together_by_their_count() {
    let (_directory, _backend, builder) = echo(1, Wiring::Echo);
    let mut guest = builder.start().unwrap();
    guest.queue(0).rx.rx_fill(300, 100).unwrap();
    guest.queue(0).rx.rx_fill_with(301, 10, &Layout::chain(4)).unwrap();
    guest.queue(0).rx.rx_fill_with(999, 10, &Layout::split_header().indirect()).unwrap();
    let mut most = 0;
    for len in (14..30_000).step_by(611) {
        most = most.max(round_trip(guest.queue(0), &frame(len, len), &Layout::chain(3)).num_buffers);
    }
    assert!(most > 30, "the longest frame took {most} buffers");
}

#[test]
fn without_mergeable_buffers_a_chain_takes_a_whole_frame() {
    for (left_out, header_len) in
        [(Features::MRG_RXBUF, 12), (Features::MRG_RXBUF | Features::VERSION_1 | Features::EVENT_IDX, 10)]
    {
        let (_directory, backend, builder) = echo(1, Wiring::Echo);
        let mut guest = builder.without(left_out).start().unwrap();
        assert_eq!((guest.features() & left_out).0, 0);
        let pages = Layout::pieces(&[header_len; 1]);
        guest.queue(0).rx.rx_fill_with(65_562, 4, &pages).unwrap();
        guest.queue(0).rx.rx_fill_with(65_562, 4, &Layout::chain(17)).unwrap();
        for len in [14, 1514, 65_549] {
            round_trip(guest.queue(0), &frame(len, len), &Layout::split_header());
        }
        guest.queue(0).tx.tx(&frame(65_562 - header_len + 1, 0), &NetHeader::default()).unwrap();
        assert!(guest.queue(0).rx.rx_wait(QUIET).unwrap().is_none());
        assert_eq!(backend.observed().too_long.load(Ordering::Relaxed), 1);
    }
}

#[test]
fn offload_headers_and_checksums_arrive_as_sent() {
    let (_directory, _backend, builder) = echo(1, Wiring::Echo);
    let mut guest = builder.start().unwrap();
    guest.queue(0).rx.rx_fill(4096, 32).unwrap();
    let packet = Packet::eth([2; 6], [4; 6]).ipv4([10, 0, 0, 1], [10, 0, 0, 2]).tcp(1, 2).payload_len(60_000);
    let (header, bytes) = packet.build_gso(1448);
    guest.queue(0).tx.tx_with(&bytes, &header, &Layout::chain(5)).unwrap();
    let (received, back) = guest.queue(0).rx.rx_wait(SOON).unwrap().expect("an echo");
    assert_eq!(NetHeader { num_buffers: 0, ..received }, header);
    assert_eq!(received.num_buffers, 15);
    assert_eq!(check(&received, &back).unwrap().payload.len(), 60_000);
}

/// Sends `total` numbered frames as fast as the rings take them, and checks that each comes back once and in order.
fn stream(queue: &mut QueuePair, total: u32, batch: u32) {
    let prepared: Vec<_> = (0..queue.tx.size() * 2)
        .map(|tag| {
            let layout = if tag % 3 == 0 { Layout::single().indirect() } else { Layout::single() };
            queue.tx.prepare(&frame(64, usize::from(tag)), &NetHeader::default(), &layout).unwrap()
        })
        .collect();
    let (mut sent, mut received) = (0_u32, 0_u32);
    while received < total {
        // A frame's number may be changed only once its last sending was reaped: twice the ring is far enough.
        let room = batch.min(total - sent).min(queue.tx.free() as u32);
        let numbered = (sent..sent + room).map(|number| {
            let frame = &prepared[number as usize % prepared.len()];
            frame.patch(14, &number.to_le_bytes());
            frame
        });
        sent += queue.tx.tx_batch(numbered).unwrap() as u32;
        let count = queue.rx.rx_batch(usize::MAX, |frame| {
            let mut number = [0; 4];
            frame.read(14, &mut number);
            assert_eq!(u32::from_le_bytes(number), received);
            assert_eq!((frame.frame_len(), frame.buffers()), (64, 1));
            received += 1;
        });
        queue.tx.tx_reap().unwrap();
        if count.unwrap() == 0 {
            assert!(queue.rx.wait(SOON).unwrap(), "{received} of {total} frames came back");
        }
    }
}

#[test]
fn indices_wrap_in_every_notification_mode() {
    for (notify, left_out) in [
        (Notify::Event, Features::default()),
        (Notify::Poll, Features::default()),
        (Notify::Event, Features::EVENT_IDX),
        (Notify::Poll, Features::EVENT_IDX),
    ] {
        let (_directory, backend, builder) = echo(1, Wiring::Echo);
        let mut guest = builder.without(left_out).notify(notify).ring_size(128).start().unwrap();
        guest.queue(0).rx.rx_fill(128, 128).unwrap();
        stream(guest.queue(0), 70_000, 32);
        let calls = backend.observed().calls.load(Ordering::Relaxed);
        match notify {
            Notify::Poll => assert_eq!(calls, 0, "a polling driver was called"),
            Notify::Event => assert!(calls > 0),
        }
        assert!(guest.queue(0).tx.kicks() < 70_000 / 2, "kicks are batched: {}", guest.queue(0).tx.kicks());
    }
    // The same close to the wrap from the start, on the smallest and the largest ring.
    for size in [2, 1024] {
        let (_directory, _backend, builder) = echo(1, Wiring::Echo);
        let mut guest = builder.ring_size(size).first_index(65_530).start().unwrap();
        guest.queue(0).rx.rx_fill(128, size.into()).unwrap();
        stream(guest.queue(0), 3000, 7);
    }
}

#[test]
fn an_armed_driver_is_called_once_for_what_it_waits_for() {
    let (_directory, backend, builder) = echo(1, Wiring::Echo);
    let mut guest = builder.start().unwrap();
    let queue = guest.queue(0);
    queue.rx.rx_fill(256, 64).unwrap();
    let observed = backend.observed();
    for round in 1..=3 {
        queue.rx.arm();
        for tag in 0..10 {
            queue.tx.tx(&frame(60, tag), &NetHeader::default()).unwrap();
        }
        let mut count = 0;
        while count < 10 {
            assert!(queue.rx.rx_wait(SOON).unwrap().is_some());
            count += 1;
            if count == 1 {
                // Let the rest arrive while the driver is not armed.
                while observed.frames.load(Ordering::Relaxed) < round * 10 {
                    std::thread::yield_now();
                }
            }
        }
    }
    assert!(observed.calls.load(Ordering::Relaxed) <= 30, "at most one per frame");
    assert!(observed.calls.load(Ordering::Relaxed) >= 3, "at least one per round");
}

#[test]
fn queue_pairs_run_on_threads_of_their_own() {
    let (_directory, _backend, builder) = echo(4, Wiring::Cross);
    let mut guest = builder.start().unwrap();
    for pair in 0..4 {
        guest.queue(pair).rx.rx_fill(512, 64).unwrap();
    }
    for pair in 0..4 {
        guest.queue(pair).tx.tx(&frame(100, pair), &NetHeader::default()).unwrap();
        let (_, back) = guest.queue(3 - pair).rx.rx_wait(SOON).unwrap().expect("from the pair opposite");
        assert_eq!(back, frame(100, pair));
    }
    let threads: Vec<_> = guest
        .take_queues()
        .into_iter()
        .enumerate()
        .map(|(pair, mut queue)| {
            std::thread::spawn(move || {
                for tag in 0..500 {
                    queue.tx.tx(&frame(200, tag * 4 + pair), &NetHeader::default()).unwrap();
                    let (_, back) = queue.rx.rx_wait(SOON).unwrap().expect("what the other thread sent");
                    assert_eq!(back, frame(200, tag * 4 + 3 - pair));
                }
                queue
            })
        })
        .collect();
    assert!(matches!(guest.start(), Err(Error::Config(_))), "no restart while the queues are away");
    let mut queues: Vec<_> = threads.into_iter().map(|thread| thread.join().unwrap()).collect();
    queues.reverse();
    guest.return_queues(queues);
    assert_eq!(guest.queue(2).tx.index(), 5);
    guest.disconnect().unwrap();
}

#[test]
fn memory_comes_and_goes_while_rings_run() {
    for slots in [false, true] {
        let (_directory, backend, builder) = echo(1, Wiring::Echo);
        let builder = if slots { builder.memory_slots() } else { builder };
        let mut guest =
            builder.memory(&[RegionSpec::mib(0, 2), RegionSpec::mib(4 << 30, 2)]).start().unwrap();
        guest.queue(0).rx.rx_fill(2048, 64).unwrap();
        round_trip(guest.queue(0), &frame(5000, 1), &Layout::chain(3));
        let regions = || backend.observed().regions.lock().unwrap().clone();
        assert_eq!(regions(), [(0, 2 << 20), (4 << 30, 2 << 20)], "slots: {slots}");

        guest.add_region(RegionSpec::mib(1 << 30, 1)).unwrap();
        assert_eq!(regions().len(), 3);
        // One of three pieces lies in the new region.
        round_trip(guest.queue(0), &frame(5000, 2), &Layout::chain(3));
        guest.remove_region(1 << 30).unwrap();
        assert_eq!(regions(), [(0, 2 << 20), (4 << 30, 2 << 20)]);
        round_trip(guest.queue(0), &frame(5000, 3), &Layout::chain(3));
        if !slots {
            guest.set_mem_table().unwrap();
            round_trip(guest.queue(0), &frame(5000, 4), &Layout::chain(3));
        }
        assert!(guest.remove_region(1 << 30).is_err());
    }
}

#[test]
fn a_backend_that_dies_finds_the_rings_as_it_left_them() {
    for listen in [false, true] {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("port.sock");
        let device = || Device::new(1, Wiring::Echo);
        let mut guest = Frontend::builder(&path);
        if listen {
            guest = guest.listen();
        }
        let mut guest = guest.build().unwrap();
        let backend =
            if listen { MiniBackend::dial(&path, device()) } else { MiniBackend::serve(&path, device()) };
        guest.start().unwrap();
        guest.queue(0).rx.rx_fill(2048, 32).unwrap();
        for round in 0..5 {
            round_trip(guest.queue(0), &frame(3000, round), &Layout::chain(2));
            backend.hang_up();
            assert!(guest.wait_disconnected(SOON) && !guest.is_connected());
            // Sent into the void: the next backend finds it in the ring.
            let late = frame(700, round);
            guest.queue(0).tx.tx(&late, &NetHeader::default()).unwrap();
            guest.resume().unwrap();
            let (_, back) = guest.queue(0).rx.rx_wait(SOON).unwrap().expect("what was left in the ring");
            assert_eq!(back, late, "listening: {listen}");
        }
    }
}

#[test]
fn a_frontend_that_vanishes_may_come_back_or_be_replaced() {
    let (directory, _backend, builder) = echo(1, Wiring::Echo);
    let mut guest = builder.start().unwrap();
    guest.queue(0).rx.rx_fill(2048, 32).unwrap();
    round_trip(guest.queue(0), &frame(100, 1), &Layout::single());
    guest.abandon();
    guest.resume().unwrap();
    round_trip(guest.queue(0), &frame(100, 2), &Layout::single());
    drop(guest);

    let mut other = Frontend::builder(directory.path().join("port.sock")).first_index(7).start().unwrap();
    other.queue(0).rx.rx_fill(2048, 32).unwrap();
    round_trip(other.queue(0), &frame(100, 3), &Layout::single());
    other.disconnect().unwrap();
    other.resume().unwrap();
    round_trip(other.queue(0), &frame(100, 4), &Layout::single());
    // A driver that is loaded again begins with empty rings on the same connection.
    other.start().unwrap();
    assert_eq!(other.queue(0).rx.in_flight(), 0);
    other.queue(0).rx.rx_fill(2048, 32).unwrap();
    round_trip(other.queue(0), &frame(100, 5), &Layout::single());
}

#[test]
fn single_rings_stop_resume_and_start_afresh() {
    let (_directory, _backend, builder) = echo(2, Wiring::Echo);
    let mut guest = builder.start().unwrap();
    for pair in 0..2 {
        guest.queue(pair).rx.rx_fill(2048, 32).unwrap();
        round_trip(guest.queue(pair), &frame(100, pair), &Layout::single());
    }
    assert_eq!(guest.stop_ring(1).unwrap(), 1, "the backend took one frame");
    guest.queue(0).tx.tx(&frame(60, 9), &NetHeader::default()).unwrap();
    assert!(guest.queue(0).rx.rx_wait(QUIET).unwrap().is_none(), "the ring is stopped");
    round_trip(guest.queue(1), &frame(100, 2), &Layout::single());
    guest.start_ring(1).unwrap();
    assert_eq!(guest.queue(0).rx.rx_wait(SOON).unwrap().expect("sent while stopped").1, frame(60, 9));

    guest.enable_queue_pairs(1).unwrap();
    guest.queue(1).tx.tx(&frame(60, 10), &NetHeader::default()).unwrap();
    assert!(guest.queue(1).rx.rx_wait(QUIET).unwrap().is_none(), "the pair is disabled");
    guest.enable_queue_pairs(2).unwrap();
    assert_eq!(guest.queue(1).rx.rx_wait(SOON).unwrap().expect("sent while disabled").1, frame(60, 10));

    guest.start_ring_fresh(3).unwrap();
    assert_eq!((guest.queue(1).tx.free(), guest.queue(1).tx.in_flight()), (256, 0));
    round_trip(guest.queue(1), &frame(100, 11), &Layout::chain(3));
    let bases = guest.stop().unwrap();
    assert_eq!(bases[3], 1, "counted from the fresh start");
    guest.resume().unwrap();
    round_trip(guest.queue(1), &frame(100, 12), &Layout::chain(3));
}

#[test]
fn a_ring_can_be_driven_by_hand() {
    let (_directory, backend, builder) = echo(1, Wiring::Echo);
    let mut guest = builder.start().unwrap();
    let memory = guest.memory().clone();
    let queue = guest.queue(0);
    queue.rx.rx_fill(2048, 8).unwrap();
    let payload = memory.alloc(12 + 60, 1).unwrap();
    payload.fill(0);
    payload.write(12, &frame(60, 1));
    let table = memory.alloc(2 * Descriptor::SIZE, 16).unwrap();
    let tail = Descriptor { addr: payload.gpa() + 12, len: 60, flags: 0, next: 0 };
    let start = Descriptor { addr: payload.gpa(), len: 12, flags: Descriptor::NEXT, next: 1 };
    table.write(0, &start.to_bytes());
    table.write(Descriptor::SIZE, &tail.to_bytes());
    let mut raw = queue.tx.raw();
    let indirect = Descriptor { addr: table.gpa(), len: 32, flags: Descriptor::INDIRECT, next: 0 };
    raw.set_descriptor(200, indirect);
    raw.offer(200);
    queue.tx.kick().unwrap();
    assert_eq!(queue.rx.rx_wait(SOON).unwrap().expect("an echo").1, frame(60, 1));
    let raw = queue.tx.raw();
    assert_eq!((raw.used_index(), raw.used_entry(0)), (1, (200, 0)));
    // The books know of no such chain: to them the device has gone mad.
    assert!(matches!(queue.tx.tx_reap(), Err(Error::Fault { ring: 1, .. })));

    // An available index beyond the ring stops the device's queue until it is set up anew.
    queue.tx.raw().set_avail_index(1000);
    queue.tx.kick().unwrap();
    assert!(queue.rx.rx_wait(QUIET).unwrap().is_none());
    assert_eq!(backend.observed().frames.load(Ordering::Relaxed), 1);
    guest.start_ring_fresh(1).unwrap();
    round_trip(guest.queue(0), &frame(60, 2), &Layout::single());
}

#[test]
fn a_ring_may_run_dry() {
    let (_directory, _backend, builder) = echo(1, Wiring::Echo);
    let mut guest = builder.start().unwrap();
    let queue = guest.queue(0);
    queue.rx.set_repost(false);
    queue.rx.rx_fill(256, 3).unwrap();
    for tag in 0..5 {
        queue.tx.tx(&frame(60, tag), &NetHeader::default()).unwrap();
    }
    for tag in 0..3 {
        assert_eq!(queue.rx.rx_wait(SOON).unwrap().expect("room for three").1, frame(60, tag));
    }
    assert!(queue.rx.rx_wait(QUIET).unwrap().is_none());
    assert_eq!(queue.rx.rx_repost(2).unwrap(), 2);
    for tag in 3..5 {
        assert_eq!(queue.rx.rx_wait(SOON).unwrap().expect("room again").1, frame(60, tag));
    }
    assert_eq!(queue.rx.rx_repost(9).unwrap(), 3, "one was never given back, two were used again");
    assert!(matches!(queue.rx.rx_fill(256, 300), Err(Error::RingFull(0))));
}

#[test]
fn what_a_backend_lacks_is_named() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("port.sock");
    let _backend = MiniBackend::serve(&path, Device::new(2, Wiring::Echo).without(Features::EVENT_IDX));
    let guest = Frontend::builder(&path).start().unwrap();
    assert!(!guest.features().contains(Features::EVENT_IDX), "only what is offered is taken");
    assert!(!guest.features().contains(Features::MQ), "one pair needs no MQ");
    drop(guest);
    // The small backend says how many rings it has, not pairs, as its library does.
    let error = Frontend::builder(&path).queue_pairs(5).start().err().unwrap().to_string();
    assert_eq!(error, "the backend lacks queues: it has 4 pairs, we want 5");
    assert!(matches!(Frontend::builder(&path).ring_size(100).build(), Err(Error::Config(_))));
    assert!(matches!(Frontend::builder(&path).queue_pairs(0).build(), Err(Error::Config(_))));
    let nobody = Frontend::builder(directory.path().join("none")).timeout(QUIET).start();
    assert!(matches!(nobody, Err(Error::Io { .. })));
    let nobody = Frontend::builder(directory.path().join("none")).listen().timeout(QUIET).start();
    assert!(matches!(nobody, Err(Error::Io { .. })));
    // The largest ring that the device takes is 1024: a refused request shows, by the reply that was asked for.
    let refused = Frontend::builder(&path).ring_size(2048).start();
    assert!(matches!(refused, Err(Error::Request { request: "SET_VRING_NUM", .. })));
}
