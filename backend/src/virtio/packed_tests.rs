//! Packed rings against drivers, well-behaved and hostile.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;

use proptest::prelude::*;
use virtio_bindings::virtio_config::VIRTIO_F_IN_ORDER;
use virtio_bindings::virtio_net::{VIRTIO_NET_F_CSUM, VIRTIO_NET_F_MRG_RXBUF};
use virtio_bindings::virtio_ring::{VIRTIO_RING_F_EVENT_IDX, VIRTIO_RING_F_INDIRECT_DESC};

use super::testing::{INDIRECT, MODERN, NEXT, PackedDriver, WRAP, WRITE, signals};
use super::tests::{BUF, bytes, content, frame};
use super::*;

const IN_ORDER: u64 = 1 << VIRTIO_F_IN_ORDER;
/// Values of the flags of an event area.
const ENABLE: u16 = 0;
const DISABLE: u16 = 1;
const DESC: u16 = 2;

/// Header and frame in descriptors that are cut at `cuts`; gives them.
fn pieces(d: &PackedDriver, at: u64, data: &[u8], header: &NetHeader, cuts: &[usize]) -> Vec<(u64, u32)> {
    let whole = [&header.to_bytes()[..], data].concat();
    let (mut at, mut from, mut chain) = (at, 0, vec![]);
    for to in cuts.iter().copied().filter(|&cut| cut < whole.len()).chain([whole.len()]) {
        if to > from {
            d.at.write(at, &whole[from..to]);
            chain.push((at, (to - from) as u32));
            (at, from) = (at + (to - from) as u64 + 16, to);
        }
    }
    chain
}

/// The same in a table at `table`; gives its descriptor.
fn table(d: &PackedDriver, table: u64, chain: &[(u64, u32)], flags: u16) -> (u64, u32) {
    for (i, &(addr, len)) in (0..).zip(chain) {
        // What is not said to mean anything there must not.
        d.at.desc_at(table, i, addr, len, 0xbeef, flags | NEXT | 1 << 7);
    }
    (table, 16 * chain.len() as u32)
}

#[test]
fn frames_in_every_layout() {
    let mut d = PackedDriver::new(7, MODERN | 1 << VIRTIO_NET_F_CSUM);
    let header = NetHeader { flags: 1, csum_start: 34, csum_offset: 6, ..NetHeader::EMPTY };
    let data = bytes(100, 7);
    let (mut tx, mut b) = (d.at.tx(), Burst::new());
    let layouts: [&[usize]; 5] = [&[], &[12], &[5, 12, 13], &[6, 66], &[112]];
    for round in 0..20 {
        for (i, cuts) in layouts.iter().enumerate() {
            let mut chain = pieces(&d, BUF, &data, &header, cuts);
            let mut flags = 0;
            if (i + round) % 3 == 0 {
                (chain, flags) = (vec![table(&d, BUF + 0x1003, &chain, 0)], INDIRECT);
            }
            d.offer(round as u16 * 10 + i as u16, &chain, flags);
            assert!(tx.has_pending());
            assert_eq!(tx.receive(&mut b, 64), Ok(1), "{round} {i}");
            assert_eq!((b.frames()[0].header, b.frames()[0].len), (header, 100));
            assert_eq!(content(&b, 0), data);
            tx.complete(&mut b);
            assert_eq!(d.take_used(), Some((round as u16 * 10 + i as u16, 0, 1)));
            assert!(!tx.has_pending());
        }
    }
    // Across two regions, and a chain that ends with a table.
    let seam = 0x10_0000 - 40;
    let chain = pieces(&d, seam, &data, &header, &[]);
    d.offer(1, &chain, 0);
    let rest = pieces(&d, BUF + 0x800, &data, &header, &[20]);
    let (addr, len) = table(&d, BUF + 0x1000, &rest[1..], 0);
    let next = d.after(d.next, 1);
    d.filled(next, addr, len, 2, INDIRECT);
    d.filled(d.next, rest[0].0, rest[0].1, 0, NEXT);
    assert_eq!(tx.receive(&mut b, 64), Ok(2));
    assert_eq!((content(&b, 0), content(&b, 1)), (data.clone(), data));
}

#[test]
fn used_descriptors_of_one_burst_are_seen_together() {
    for (features, ids) in [(0, vec![(5, 1), (4, 1), (3, 1)]), (IN_ORDER, vec![(3, 3)])] {
        let mut d = PackedDriver::new(4, MODERN | features);
        d.start_at(2 | WRAP);
        for id in [5, 4, 3] {
            d.offer(id, &[(BUF, 64)], 0);
        }
        let (mut tx, mut b) = (d.at.tx(), Burst::new());
        assert_eq!(tx.receive(&mut b, 64), Ok(3));
        assert_eq!(d.take_used(), None);
        tx.complete(&mut b);
        for (id, n) in ids {
            assert_eq!(d.take_used(), Some((id, 0, n)));
        }
        assert_eq!((d.take_used(), d.used), (None, 1));
    }
}

#[test]
fn a_drop_hands_back_what_was_not_completed() {
    let mut d = PackedDriver::new(6, MODERN);
    d.start_at(4);
    d.offer(1, &[(BUF, 60)], 0);
    d.offer(2, &[(BUF, 30), (BUF, 30)], 0);
    d.offer(3, &[(BUF, 70)], 0);
    let (mut tx, mut b) = (d.at.tx(), Burst::new());
    assert_eq!(tx.receive(&mut b, 1), Ok(1));
    tx.complete(&mut b);
    assert_eq!(tx.receive(&mut b, 64), Ok(2));
    drop(tx);
    assert_eq!(d.at.base.get(), 5);
    let mut tx = d.at.tx();
    tx.complete(&mut b);
    assert_eq!(d.reap(), 1, "a burst from before the restart is not given back by the new ring");
    assert_eq!(tx.receive(&mut b, 64), Ok(2));
    assert_eq!(b.frames().iter().map(|f| f.len).collect::<Vec<_>>(), [48, 58]);
    tx.complete(&mut b);
    drop(tx);
    assert_eq!((d.reap(), d.at.base.get()), (2, WRAP | 2));
}

#[test]
fn a_position_that_the_ring_has_left_is_refused() {
    let start = |d: &PackedDriver, base| {
        d.at.base.set(base);
        (d.at.try_tx().err(), d.at.try_rx().err())
    };
    let refused = |base| (Some(RingError::Base(base)), Some(RingError::Base(base)));
    let mut d = PackedDriver::new(4, MODERN);
    assert_eq!(start(&d, WRAP), (None, None));
    assert_eq!(start(&d, WRAP | 4), refused(WRAP | 4), "no such place");
    assert_eq!(start(&d, 0x7fff), refused(0x7fff));
    // The daemon dies after a frame: the front-end knows no better than to begin again where it has begun.
    d.at.base.set(WRAP);
    d.offer(0, &[(BUF, 60)], 0);
    let (mut tx, mut b) = (d.at.tx(), Burst::new());
    tx.receive(&mut b, 64).unwrap();
    tx.complete(&mut b);
    drop(tx);
    assert_eq!(start(&d, WRAP | 1), (None, None));
    assert_eq!(start(&d, WRAP), refused(WRAP));
    // All positions but the true one, whatever is in flight there.
    for (true_one, in_flight) in [(2, 0), (WRAP | 3, 1), (1, 2), (WRAP | 1, 3)] {
        d.reset();
        d.start_at(true_one);
        for _ in 0..in_flight {
            d.offer(0, &[(BUF, 60)], WRITE);
        }
        for base in [0, 1, 2, 3, WRAP, WRAP | 1, WRAP | 2, WRAP | 3] {
            let result = start(&d, base);
            let behind = (1..=in_flight).any(|n| d.after(true_one, n) == base);
            if base == true_one {
                assert_eq!(result, (None, None));
            } else if !behind {
                assert_eq!(
                    result,
                    refused(base),
                    "{base:#x} instead of {true_one:#x}, {in_flight} in flight"
                );
            }
        }
    }
    // A receive ring that is all available, begun anew.
    d.reset();
    d.start_at(2);
    for _ in 0..4 {
        d.offer(0, &[(BUF, 60)], WRITE);
    }
    assert_eq!(start(&d, WRAP).1, Some(RingError::Base(WRAP)));
}

#[test]
fn events_are_honoured() {
    let mut d = PackedDriver::new(4, MODERN);
    d.start_at(2);
    let (mut tx, mut b) = (d.at.tx(), Burst::new());
    assert_eq!(d.event().1, DISABLE);
    assert!(tx.arm());
    assert_eq!(d.event(), (2, DESC));
    tx.disarm();
    assert_eq!(d.event().1, DISABLE);
    // Used goes 2, 3, then, in the next lap, 0, 1.
    d.set_event(WRAP, DESC);
    for i in 0..4 {
        d.offer(0, &[(BUF, 64)], 0);
        assert_eq!(tx.receive(&mut b, 64), Ok(1));
        tx.complete(&mut b);
        assert_eq!(signals(&d.at.called), u64::from(i == 2), "frame {i}");
        assert!(d.take_used().is_some());
    }
    assert!(tx.arm());
    d.offer(0, &[(BUF, 64)], 0);
    assert!(!tx.arm(), "something is there");
    assert_eq!(d.event().1, DISABLE);
    for (flags, calls) in [(DISABLE, 0), (ENABLE, 1)] {
        d.set_event(0, flags);
        assert_eq!(tx.receive(&mut b, 64), Ok(1));
        tx.complete(&mut b);
        assert_eq!(signals(&d.at.called), calls);
        d.offer(0, &[(BUF, 64)], 0);
    }

    let d = PackedDriver::new(4, MODERN & !(1 << VIRTIO_RING_F_EVENT_IDX));
    assert!(d.at.tx().arm());
    assert_eq!(d.event().1, ENABLE, "there is no other way to ask");

    let mut d = PackedDriver::new(8, MODERN);
    (0..8).for_each(|id| d.offer(id, &[(BUF, 256)], WRITE));
    d.set_event(WRAP | 2, DESC);
    let rx = d.at.rx();
    assert_eq!(d.event().1, DISABLE, "no kicks for a receive ring");
    for (n, calls) in [(1, 0), (1, 0), (1, 1), (1, 0)] {
        rx.send(&vec![frame(b"x"); n][..]);
        rx.notify();
        assert_eq!(signals(&d.at.called), calls);
    }
    d.set_event(WRAP | 4, DESC);
    rx.send(&[frame(b"x"), frame(b"y")]);
    rx.notify();
    assert_eq!(signals(&d.at.called), 1, "passed within a burst");
    rx.notify();
    assert_eq!(signals(&d.at.called), 0, "nothing new");
}

/// Positions repeat after two laps, and a busy guest may go round more often between two notifications.
#[test]
fn a_guest_that_went_round_twice_is_notified() {
    for laps in [2, 3, 4] {
        let mut d = PackedDriver::new(8, MODERN);
        let rx = d.at.rx();
        for lap in 1..=laps {
            (0..8).for_each(|id| d.offer(id, &[(BUF, 256)], WRITE));
            if lap == laps {
                // Nothing is left of the lap before, so it waits for something in this one.
                d.set_event(d.used & WRAP | 4, DESC);
            } else {
                d.set_event(0, DISABLE);
            }
            rx.send(&vec![frame(b"x"); 8][..]);
            assert_eq!(std::iter::from_fn(|| d.take_used()).count(), 8);
        }
        rx.notify();
        assert_eq!(signals(&d.at.called), 1, "{laps} laps");
        rx.notify();
        assert_eq!(signals(&d.at.called), 0, "nothing new");
    }
}

/// A receive buffer may have many descriptors, but not as many as it takes to hold others up.
#[test]
fn a_buffer_that_goes_on_for_ever_is_refused() {
    let mut d = PackedDriver::new(1024, MODERN);
    let chain = |n: usize| vec![(BUF, 256); n];
    d.offer(1, &chain(200), WRITE);
    d.offer(2, &chain(600), WRITE);
    let rx = d.at.rx();
    assert_eq!(rx.send(&[frame(b"x")]).sent, 1);
    assert_eq!(rx.send(&[frame(b"x")]).blocked, Some(Blocked::Fault(RingError::TooLong)));
}

/// What a hostile transmit ring must give, and nothing after it.
fn rejects(features: u64, expected: RingError, break_it: impl FnOnce(&mut PackedDriver)) {
    let mut d = PackedDriver::new(8, features);
    break_it(&mut d);
    let (mut tx, mut b) = (d.at.tx(), Burst::new());
    assert_eq!(tx.receive(&mut b, 64), Err(expected));
    assert!(b.frames().is_empty());
    assert_eq!(tx.receive(&mut b, 64), Ok(0), "said once");
    assert!(!tx.has_pending());
    assert!(tx.arm());
    assert_eq!(d.take_used(), None);
}

#[test]
fn hostile_descriptors() {
    use RingError::*;
    let bad = |addr, len, flags| move |d: &mut PackedDriver| d.filled(WRAP, addr, len, 0, flags);
    rejects(MODERN, Direction, bad(BUF, 10, WRITE));
    rejects(MODERN, ZeroLength, bad(BUF, 0, 0));
    for (addr, len) in
        [(0x20_0000, 1), (0x1f_fff0, 0x11), (u64::MAX, 1), (u64::MAX - 3, u32::MAX), (0, u32::MAX)]
    {
        rejects(MODERN, Address { addr, len }, bad(addr, len, 0));
    }
    rejects(MODERN, Loop, |d| (0..8).for_each(|i| d.filled(WRAP | i, BUF, 10, 0, NEXT)));
    let no_tables = MODERN & !(1 << VIRTIO_RING_F_INDIRECT_DESC);
    rejects(no_tables, Indirect, bad(BUF, 16, INDIRECT));
    for (len, flags) in [(0, 0), (15, 0), (24, 0), (16, NEXT)] {
        rejects(MODERN, Indirect, bad(BUF, len, INDIRECT | flags));
    }
    rejects(MODERN, Address { addr: 0x10_0000 - 16, len: 32 }, bad(0x10_0000 - 16, 32, INDIRECT));
    let in_table = |addr, len, flags| {
        move |d: &mut PackedDriver| {
            d.at.desc_at(BUF, 0, addr, len, 0, flags);
            d.filled(WRAP, BUF, 32, 0, INDIRECT);
        }
    };
    rejects(MODERN, Indirect, in_table(BUF, 16, INDIRECT));
    rejects(MODERN, Direction, in_table(BUF, 16, WRITE));
    rejects(MODERN, ZeroLength, in_table(BUF, 0, 0));
    rejects(MODERN, TooLong, |d| {
        (0..2049).for_each(|i| d.at.desc_at(BUF, i, BUF, 1, 0, 0));
        d.filled(WRAP, BUF, 2049 * 16, 0, INDIRECT);
    });
}

#[test]
fn frames_before_a_malformed_one_are_delivered() {
    let mut d = PackedDriver::new(8, MODERN);
    d.offer(0, &[(BUF, 64)], 0);
    d.offer(1, &[(BUF, 30), (BUF, 30)], 0);
    d.filled(d.next, BUF, 0, 2, 0);
    let (mut tx, mut b) = (d.at.tx(), Burst::new());
    assert_eq!(tx.receive(&mut b, 64), Ok(2));
    tx.complete(&mut b);
    assert_eq!(d.reap(), 2);
    assert_eq!(tx.receive(&mut b, 64), Err(RingError::ZeroLength));
}

#[test]
fn what_is_in_flight_is_not_taken_again() {
    // The guest writes over what we have, as if it had it back.
    let mut d = PackedDriver::new(4, MODERN);
    (0..4).for_each(|id| d.offer(id, &[(BUF, 64)], 0));
    let (mut tx, mut b) = (d.at.tx(), Burst::new());
    assert_eq!(tx.receive(&mut b, 64), Ok(4));
    (0..4).for_each(|i| d.filled(i, BUF, 64, i, NEXT));
    let mut other = Burst::new();
    assert_eq!(tx.receive(&mut other, 64), Ok(0));
    tx.complete(&mut b);
    assert_eq!(d.reap(), 4);
}

#[test]
fn ring_layout_is_checked() {
    let good = PackedDriver::new(8, MODERN).at.config;
    let result = |change: fn(&mut RingConfig)| {
        let mut d = PackedDriver::new(8, MODERN);
        d.at.config = good;
        change(&mut d.at.config);
        d.at.try_tx().err()
    };
    assert_eq!(result(|_| ()), None);
    assert_eq!(result(|c| c.size = 7), None);
    assert_eq!(result(|c| c.size = 0), Some(RingError::Size(0)));
    assert_eq!(result(|c| c.size = 32769), Some(RingError::Size(32769)));
    let layout = |part, addr| Some(RingError::Layout { part, addr });
    assert_eq!(result(|c| c.desc = 8), layout("descriptor ring", 8));
    assert_eq!(result(|c| c.desc = 0x10_0000 - 64), layout("descriptor ring", 0x10_0000 - 64));
    assert_eq!(result(|c| c.avail = 0x8002), layout("driver event area", 0x8002));
    assert_eq!(result(|c| c.used = 0x4f_fffe), layout("device event area", 0x4f_fffe));
    assert_eq!(result(|c| c.used = 0x50_0000), layout("device event area", 0x50_0000));
}

// ---- a guest receives ----

#[test]
fn mergeable_frames_span_buffers() {
    let mut d = PackedDriver::new(9, MODERN);
    d.start_at(6);
    for id in 0..8u16 {
        d.offer(id, &[(BUF + 0x1000 * u64::from(id), 100)], WRITE);
    }
    let rx = d.at.rx();
    let (small, large) = (bytes(88, 1), bytes(250, 2));
    assert_eq!(rx.send(&[frame(&small), frame(&large)]), SendResult { sent: 2, blocked: None });
    let used: Vec<_> = std::iter::from_fn(|| d.take_used()).collect();
    assert_eq!(used, [(0, 100, 1), (1, 100, 1), (2, 100, 1), (3, 62, 1)]);
    assert_eq!(d.at.read(BUF + 12, 88), small);
    assert_eq!((d.at.read(BUF + 10, 2), d.at.read(BUF + 0x1000 + 10, 2)), (vec![1, 0], vec![3, 0]));
    let got =
        [d.at.read(BUF + 0x100c, 88), d.at.read(BUF + 0x2000, 100), d.at.read(BUF + 0x3000, 62)].concat();
    assert_eq!(got, large);
    let huge = bytes(389, 3);
    assert_eq!(rx.send(&[frame(&huge)]), SendResult { sent: 0, blocked: Some(Blocked::Full) });
    let sent = rx.send(&[frame(&huge[..388]), frame(&small)]);
    assert_eq!(sent, SendResult { sent: 1, blocked: Some(Blocked::Full) });
    assert_eq!(d.reap(), 4);
}

#[test]
fn a_frame_larger_than_the_whole_ring_is_too_big() {
    let mut d = PackedDriver::new(4, MODERN);
    d.offer(0, &[(BUF, 100), (BUF, 100)], WRITE);
    (1..3).for_each(|id| d.offer(id, &[(BUF, 100)], WRITE));
    let data = bytes(400, 0);
    let rx = d.at.rx();
    assert_eq!(rx.send(&[frame(&data)]), SendResult { sent: 0, blocked: Some(Blocked::TooBig) });
    assert_eq!(rx.send(&[frame(&data[..300])]), SendResult { sent: 1, blocked: None });
    assert_eq!(
        std::iter::from_fn(|| d.take_used()).collect::<Vec<_>>(),
        [(0, 200, 1), (1, 100, 1), (2, 12, 1)]
    );
}

#[test]
fn without_mergeable_buffers_one_chain_must_do() {
    let mut d = PackedDriver::new(16, MODERN & !(1 << VIRTIO_NET_F_MRG_RXBUF));
    d.offer(7, &[(BUF, 12), (BUF + 0x1000, 1500)], WRITE);
    let chain = table(&d, BUF + 0x2000, &[(BUF + 0x3000, 12), (BUF + 0x4000, 1500)], WRITE);
    d.offer(9, &[chain], INDIRECT);
    let rx = d.at.rx();
    let (a, too_big, b) = (bytes(60, 1), bytes(1501, 2), bytes(1500, 3));
    let frames = [frame(&a), frame(&too_big), frame(&b)];
    assert_eq!(rx.send(&frames), SendResult { sent: 1, blocked: Some(Blocked::TooBig) });
    assert_eq!(rx.send(&frames[2..]), SendResult { sent: 1, blocked: None });
    assert_eq!((d.take_used(), d.take_used()), (Some((7, 72, 1)), Some((9, 1512, 1))));
    assert_eq!((d.at.read(BUF + 0x1000, 60), d.at.read(BUF + 0x4000, 1500)), (a, b));
}

#[test]
fn chains_go_round() {
    // Of more places than are left before the end of what was known to be available.
    let mut d = PackedDriver::new(8, MODERN & !(1 << VIRTIO_NET_F_MRG_RXBUF));
    let buffers = [(BUF, 12), (BUF + 0x100, 50), (BUF + 0x200, 50)];
    (0..2).for_each(|id| d.offer(id, &buffers, WRITE));
    let rx = d.at.rx();
    for round in 0..50 {
        let data = bytes(90, round);
        assert_eq!(rx.send(&[frame(&data)]), SendResult { sent: 1, blocked: None }, "{round}");
        let (id, len, _) = d.take_used().unwrap();
        assert_eq!(
            (len, d.at.read(BUF + 0x100, 50), d.at.read(BUF + 0x200, 40)),
            (102, data[..50].into(), data[50..].into())
        );
        d.offer(id, &buffers, WRITE);
    }
}

#[test]
fn hostile_receive_rings() {
    use RingError::*;
    let blocked_by = |addr, len, flags| {
        let mut d = PackedDriver::new(8, MODERN);
        d.offer(0, &[(BUF, 256)], WRITE);
        d.filled(d.next, addr, len, 1, flags);
        let rx = d.at.rx();
        let r = rx.send(&[frame(b"good"), frame(b"bad")]);
        let again = rx.send(&[frame(b"bad")]);
        assert_eq!(again, SendResult { sent: 0, blocked: Some(Blocked::Stopped) }, "said once");
        assert!(rx.is_stopped());
        assert_eq!(d.reap(), 1);
        let Some(Blocked::Fault(e)) = r.blocked else { panic!("{r:?}") };
        assert_eq!(r.sent, 1);
        e
    };
    assert_eq!(blocked_by(BUF, 100, 0), Direction);
    assert_eq!(blocked_by(BUF, 0, WRITE), ZeroLength);
    assert_eq!(blocked_by(1 << 40, 99, WRITE), Address { addr: 1 << 40, len: 99 });
    assert_eq!(blocked_by(BUF, 24, INDIRECT), Indirect);
    let mut d = PackedDriver::new(4, MODERN);
    (0..4).for_each(|i| d.filled(WRAP | i, BUF, 1, 0, WRITE | NEXT));
    let loops = SendResult { sent: 0, blocked: Some(Blocked::Fault(Loop)) };
    assert_eq!(d.at.rx().send(&[frame(b"x")]), loops);
    d.reset();
}

#[test]
fn a_stopped_ring_takes_nothing_and_keeps_its_place() {
    let mut d = PackedDriver::new(5, MODERN);
    d.start_at(2);
    for id in 0..2 {
        d.offer(id, &[(BUF, 200), (BUF + 200, 200)], WRITE);
    }
    let rx = d.at.rx();
    assert_eq!(rx.send(&[frame(b"a")]).sent, 1);
    assert!(rx.stop());
    assert_eq!(rx.send(&[frame(b"c")]), SendResult { sent: 0, blocked: Some(Blocked::Stopped) });
    assert_eq!(d.at.base.get(), 4);
    let rx = d.at.rx();
    assert_eq!(rx.send(&[frame(b"c")]).sent, 1);
    assert_eq!((d.take_used(), d.take_used()), (Some((0, 13, 1)), Some((1, 13, 1))));
}

#[test]
fn workers_publish_in_the_order_of_reservation() {
    // As with a split ring: two workers, numbered frames of one to three buffers, a driver that offers them again.
    const EACH: u32 = 20_000;
    const SIZE: u16 = 60;
    let mut d = PackedDriver::new(SIZE, MODERN);
    let buffer = |id: u16| BUF + 0x1000 * u64::from(id);
    (0..SIZE).for_each(|id| d.offer(id, &[(buffer(id), 400)], WRITE));
    let rx = Arc::new(d.at.rx());
    let gave_up = Arc::new(AtomicBool::new(false));
    let workers: Vec<_> = (0..2u8)
        .map(|w| {
            let (rx, gave_up) = (rx.clone(), gave_up.clone());
            thread::spawn(move || {
                let mut n = 0;
                while n < EACH && !gave_up.load(Ordering::Relaxed) {
                    let burst: Vec<_> = (n..EACH.min(n + 1 + n % 7))
                        .map(|i| {
                            let mut f = vec![w; if i % 5 == 0 { 900 } else { 80 }];
                            f[1..5].copy_from_slice(&i.to_le_bytes());
                            f
                        })
                        .collect();
                    let frames: Vec<_> = burst.iter().map(|f| frame(f)).collect();
                    let result = rx.send(&frames[..]);
                    assert!(matches!(result.blocked, None | Some(Blocked::Full)), "{result:?}");
                    n += result.sent as u32;
                    rx.notify();
                }
            })
        })
        .collect();
    let (mut next, mut seen) = ([0u32; 2], 0);
    let patience = std::time::Instant::now() + std::time::Duration::from_secs(60);
    while seen < 2 * EACH {
        let Some((id, len, 1)) = d.take_used() else {
            if std::time::Instant::now() > patience {
                gave_up.store(true, Ordering::Relaxed);
                panic!("nothing comes any more after {seen} frames");
            }
            thread::yield_now();
            continue;
        };
        let mut ids = vec![id];
        let mut data = d.at.read(buffer(id), len as usize);
        for _ in 1..u16::from_le_bytes([data[10], data[11]]) {
            // All buffers of a frame are published at once.
            let (id, len, _) = d.take_used().unwrap();
            data.extend(d.at.read(buffer(id), len as usize));
            ids.push(id);
        }
        let f = &data[12..];
        let w = usize::from(f[0]);
        let i = u32::from_le_bytes(f[1..5].try_into().unwrap());
        assert_eq!((i, f.len()), (next[w], if i % 5 == 0 { 900 } else { 80 }), "worker {w}");
        assert!(f[5..].iter().all(|&b| usize::from(b) == w));
        next[w] += 1;
        for id in ids {
            d.offer(id, &[(buffer(id), 400)], WRITE);
        }
        seen += 1;
    }
    for w in workers {
        w.join().unwrap();
    }
    assert!(rx.stop());
}

// ---- against a plain model ----

/// What happens to a ring next. Numbers are taken modulo what is possible.
#[derive(Debug, Clone)]
enum Step {
    /// The driver offers a buffer: of so many pieces, in a table or not, of so many bytes.
    Offer(u16, bool, usize),
    /// Up to so many frames are taken and given back; sent, if it is a receive ring, each of so many bytes.
    Move(usize, usize),
    /// As many are taken, but not given back before the ring is started anew.
    Restart(usize),
    /// The driver takes back what was used.
    Reap,
}

fn steps() -> impl Strategy<Value = Vec<Step>> {
    let step = prop_oneof![
        5 => (1..4u16, any::<bool>(), 1..300usize).prop_map(|(n, table, len)| Step::Offer(n, table, len)),
        3 => (1..8usize, 1..500usize).prop_map(|(n, len)| Step::Move(n, len)),
        1 => (0..4usize).prop_map(Step::Restart),
        2 => Just(Step::Reap),
    ];
    prop::collection::vec(step, 1..120)
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn a_transmit_ring_is_a_queue(size in 1..12u16, at in any::<u16>(), in_order in any::<bool>(), steps in steps()) {
        let mut d = PackedDriver::new(size, MODERN | if in_order { IN_ORDER } else { 0 });
        d.start_at((at & WRAP) | ((at & !WRAP) % size));
        let (mut tx, mut b) = (d.at.tx(), Burst::new());
        // What the driver has offered and the device has not given back, and how much it has.
        let mut queue = std::collections::VecDeque::new();
        let (mut number, mut given, mut reaped) = (0u16, 0usize, 0usize);
        for step in steps {
            match step {
                Step::Offer(pieces, in_table, _) if d.free() < if in_table { 1 } else { pieces } => {}
                Step::Offer(pieces_wanted, in_table, len) => {
                    let room = BUF + 0x1000 * u64::from(number % size);
                    let data = bytes(len, number as u8);
                    let cuts: Vec<_> = (1..usize::from(pieces_wanted)).map(|i| i * 20).collect();
                    let mut chain = pieces(&d, room, &data, &NetHeader::EMPTY, &cuts);
                    if in_table {
                        chain = vec![table(&d, room + 0x800, &chain, 0)];
                    }
                    d.offer(number, &chain, if in_table { INDIRECT } else { 0 });
                    queue.push_back(data);
                    number = number.wrapping_add(1);
                }
                Step::Move(n, _) => {
                    prop_assert_eq!(tx.receive(&mut b, n), Ok(n.min(queue.len())));
                    for i in 0..b.frames().len() {
                        prop_assert_eq!(&content(&b, i), &queue.pop_front().unwrap());
                    }
                    given += b.frames().len();
                    tx.complete(&mut b);
                }
                Step::Restart(n) => {
                    prop_assert_eq!(tx.receive(&mut b, n), Ok(n.min(queue.len())));
                    drop(tx);
                    // Chains leave descriptors of earlier laps behind, but nothing that contradicts the position.
                    tx = d.at.try_tx().unwrap();
                }
                Step::Reap => {
                    reaped += d.reap();
                    prop_assert_eq!(reaped, given);
                }
            }
        }
    }

    #[test]
    fn a_receive_ring_is_a_queue(size in 1..12u16, at in any::<u16>(), merge in any::<bool>(), steps in steps()) {
        let features = if merge { MODERN } else { MODERN & !(1 << VIRTIO_NET_F_MRG_RXBUF) };
        let mut d = PackedDriver::new(size, features);
        // Not just where a new ring begins: there, what chains leave behind is taken for another lap's.
        d.start_at((at & WRAP) | ((at & !WRAP) % size));
        let mut rx = d.at.rx();
        let mut number = 0u16;
        // By id: where its bytes are.
        let mut buffers = std::collections::HashMap::new();
        let mut sent = std::collections::VecDeque::new();
        for step in steps {
            match step {
                Step::Offer(pieces, in_table, _) if d.free() < if in_table { 1 } else { pieces } => {}
                Step::Offer(pieces, in_table, len) => {
                    let room = BUF + 0x1000 * u64::from(number % size);
                    let part = |i: u16| (room + 400 * u64::from(i), len as u32 + 12);
                    let list: Vec<_> = (0..pieces).map(part).collect();
                    let chain = if in_table { vec![table(&d, room + 0x800, &list, WRITE)] } else { list.clone() };
                    d.offer(number, &chain, if in_table { INDIRECT } else { WRITE });
                    buffers.insert(number, list);
                    number = number.wrapping_add(1);
                }
                Step::Move(n, len) => {
                    let frames: Vec<_> = (0..n).map(|i| bytes(len + i, (len + 3 * i) as u8)).collect();
                    let views: Vec<_> = frames.iter().map(|f| frame(f)).collect();
                    let result = rx.send(&views[..]);
                    prop_assert!(matches!(result.blocked, None | Some(Blocked::Full | Blocked::TooBig)), "{:?}", result);
                    sent.extend(frames.into_iter().take(result.sent));
                }
                Step::Restart(_) => {
                    prop_assert!(rx.stop());
                    if d.at.base.get() != WRAP {
                        rx = d.at.try_rx().unwrap();
                    } else {
                        rx = d.at.try_rx().unwrap_or(rx);
                        if rx.is_stopped() {
                            return Ok(());
                        }
                    }
                }
                Step::Reap => {
                    let mut used: std::collections::VecDeque<_> = std::iter::from_fn(|| d.take_used()).collect();
                    while let Some(expected) = sent.pop_front() {
                        let mut got = vec![];
                        let mut left = 1;
                        while left > 0 {
                            let (id, len, _) = used.pop_front().expect("a buffer");
                            let all: Vec<u8> =
                                buffers[&id].iter().flat_map(|&(addr, len)| d.at.read(addr, len as usize)).collect();
                            if got.is_empty() {
                                left = u16::from_le_bytes([all[10], all[11]]);
                            }
                            got.extend_from_slice(&all[..len as usize]);
                            left -= 1;
                        }
                        prop_assert_eq!(&got[12..], &expected[..]);
                    }
                    prop_assert!(used.is_empty());
                }
            }
        }
    }
}
