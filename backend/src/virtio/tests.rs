//! Rings against drivers, well-behaved and hostile.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;

use virtio_bindings::virtio_config::VIRTIO_F_VERSION_1;
use virtio_bindings::virtio_net::{VIRTIO_NET_F_CSUM, VIRTIO_NET_F_MRG_RXBUF};
use virtio_bindings::virtio_ring::{VIRTIO_RING_F_EVENT_IDX, VIRTIO_RING_F_INDIRECT_DESC};

use super::testing::{Driver, INDIRECT, MODERN, NEXT, WRITE, signals};
use super::*;

pub(super) const BUF: u64 = 0x2_0000;

pub(super) fn bytes(n: usize, seed: u8) -> Vec<u8> {
    (0..n).map(|i| (i as u8).wrapping_mul(31).wrapping_add(seed)).collect()
}

pub(super) fn frame(data: &[u8]) -> Frame<'_> {
    Frame {
        header: NetHeader::default(),
        head: data,
        body: &[],
        tail: &[],
        tail_offset: 0,
        len: data.len() as u32,
    }
}

pub(super) fn content(b: &Burst, i: usize) -> Vec<u8> {
    let mut out = vec![0; b.frames()[i].len as usize];
    assert_eq!(b.copy_head(i, &mut out), out.len());
    out
}

// ---- a guest transmits ----

#[test]
fn frames_in_every_layout() {
    let mut d = Driver::new(16, MODERN | 1 << VIRTIO_NET_F_CSUM);
    let header = NetHeader { flags: 1, csum_start: 34, csum_offset: 6, ..NetHeader::default() };
    let data = bytes(100, 7);
    let whole = [&header.to_bytes()[..], &data].concat();
    // One descriptor; header apart; header split; many pieces; across two adjacent regions; an indirect table, aligned
    // and not; a chain that ends with an indirect table.
    let layouts: [&[usize]; 4] = [&[112], &[12, 100], &[5, 7, 1, 99], &[6, 60, 46]];
    let mut offered = 0;
    for cuts in layouts {
        let (mut at, mut from, mut chain) = (BUF + 0x1000 * offered, 0, vec![]);
        for &n in cuts {
            d.write(at, &whole[from..from + n]);
            chain.push((at, n as u32));
            (at, from) = (at + n as u64 + 64, from + n);
        }
        let head = 4 * (offered as u16 % 2);
        d.chain(head, &chain, 0);
        d.offer(head);
        offered += 1;
        if offered % 2 == 0 {
            check(&mut d, 2, &header, &data);
        }
    }
    let seam = 0x10_0000 - 40;
    d.write(seam, &whole);
    d.desc(0, seam, 112, 0, 0);
    d.offer(0);
    for (head, table) in [(1, BUF), (2, BUF + 0x1003)] {
        d.write(BUF + 0x2000, &whole);
        d.desc_at(table, 0, BUF + 0x2000, 50, NEXT, 2);
        d.desc_at(table, 2, BUF + 0x2000 + 50, 62, 0, 9999);
        d.desc(head, table, 48, INDIRECT, 0);
        d.offer(head);
    }
    d.desc(3, BUF + 0x2000, 20, NEXT, 4);
    d.desc(4, BUF + 0x3000, 16, INDIRECT | WRITE, 0);
    d.desc_at(BUF + 0x3000, 0, BUF + 0x2000 + 20, 92, 0, 0);
    d.offer(3);
    check(&mut d, 4, &header, &data);

    fn check(d: &mut Driver, n: usize, header: &NetHeader, data: &[u8]) {
        let mut tx = d.tx();
        let mut b = Burst::new();
        assert_eq!(tx.receive(&mut b, 64), Ok(n));
        for i in 0..n {
            assert_eq!((b.frames()[i].header, b.frames()[i].len), (*header, 100), "frame {i}");
            assert_eq!(content(&b, i), data);
            let mut part = [0; 10];
            assert_eq!(b.copy_range(i, 95, &mut part), 5);
            assert_eq!(&part[..5], &data[95..]);
        }
        tx.complete(&mut b);
        assert!(b.frames().is_empty());
        for _ in 0..n {
            assert_eq!(d.take_used().unwrap().1, 0);
        }
        assert_eq!(d.take_used(), None);
    }
}

#[test]
fn legacy_header_has_ten_bytes() {
    let mut d = Driver::new(4, 1 << VIRTIO_NET_F_CSUM);
    let header = NetHeader { flags: 1, csum_start: 20, csum_offset: 16, ..NetHeader::default() };
    d.write(BUF, &header.to_bytes()[..10]);
    d.write(BUF + 10, b"legacy");
    d.desc(0, BUF, 16, 0, 0);
    d.offer(0);
    let (mut tx, mut b) = (d.tx(), Burst::new());
    assert_eq!(tx.receive(&mut b, 1), Ok(1));
    assert_eq!(b.frames()[0].header, header);
    assert_eq!(content(&b, 0), b"legacy");

    let mut d = Driver::new(4, 0);
    d.chain(0, &[(BUF, 64)], WRITE);
    d.offer(0);
    assert_eq!(d.rx().send(&[frame(b"legacy")]), SendResult { sent: 1, blocked: None });
    assert_eq!(d.take_used(), Some((0, 16)));
    assert_eq!(d.read(BUF + 10, 6), b"legacy");
}

#[test]
fn header_is_not_read_without_offloads() {
    let mut d = Driver::new(4, MODERN);
    d.write(BUF, &[0xff; 40]);
    d.desc(0, BUF, 40, 0, 0);
    d.offer(0);
    let (mut tx, mut b) = (d.tx(), Burst::new());
    assert_eq!(tx.receive(&mut b, 1), Ok(1));
    assert_eq!((b.frames()[0].header, b.frames()[0].len), (NetHeader::default(), 28));
}

#[test]
fn runts_are_delivered_with_their_length() {
    let mut d = Driver::new(4, MODERN | 1 << VIRTIO_NET_F_CSUM);
    for (head, len) in [(0, 1), (1, 12), (2, 13)] {
        d.desc(head, BUF, len, 0, 0);
        d.offer(head);
    }
    let (mut tx, mut b) = (d.tx(), Burst::new());
    assert_eq!(tx.receive(&mut b, 64), Ok(3));
    assert_eq!(b.frames().iter().map(|f| f.len).collect::<Vec<_>>(), [0, 0, 1]);
    assert!(b.segments(0).is_empty() && b.segments(1).is_empty() && b.segments(9).is_empty());
    tx.complete(&mut b);
    assert_eq!(d.used_idx(), 3);
}

#[test]
fn a_drop_hands_back_what_was_not_completed() {
    let mut d = Driver::new(8, MODERN);
    for head in 0..6 {
        d.desc(head, BUF, 100, 0, 0);
        d.offer(head);
    }
    let (mut tx, mut b) = (d.tx(), Burst::new());
    assert_eq!(tx.receive(&mut b, 4), Ok(4));
    assert!(tx.has_pending());
    tx.complete(&mut b);
    assert_eq!(tx.receive(&mut b, 64), Ok(2));
    drop(tx);
    assert_eq!(d.base.get(), 4);
    let mut tx = d.tx();
    tx.complete(&mut b);
    assert_eq!(d.used_idx(), 4, "a burst from before the restart is not given back by the new ring");
    assert_eq!(tx.receive(&mut b, 64), Ok(2));
    tx.complete(&mut b);
    assert_eq!(d.used_idx(), 6);
}

#[test]
fn indices_wrap_and_events_are_honoured() {
    let mut d = Driver::new(4, MODERN);
    d.start_at(0xfffe);
    d.set_used_event(0xffff);
    let (mut tx, mut b) = (d.tx(), Burst::new());
    assert!(tx.arm());
    assert_eq!(d.avail_event(), 0xfffe);
    for i in 0..6u16 {
        d.desc(i % 4, BUF, 64, 0, 0);
        d.offer(i % 4);
        assert_eq!(tx.receive(&mut b, 64), Ok(1));
        tx.complete(&mut b);
        // Used goes fffe → ffff, then passes event ffff when it becomes 0.
        assert_eq!(signals(&d.called), u64::from(i == 1), "frame {i}");
        assert!(d.take_used().is_some());
    }
    assert!(tx.arm());
    assert_eq!(d.avail_event(), 4);
    d.offer(0);
    assert!(!tx.arm(), "something is there");
}

#[test]
fn without_event_index_flags_are_honoured() {
    let mut d = Driver::new(4, 1 << VIRTIO_F_VERSION_1);
    let (mut tx, mut b) = (d.tx(), Burst::new());
    let no_notify = |d: &Driver| d.word(d.config.used);
    assert_eq!(no_notify(&d), 1);
    assert!(tx.arm());
    assert_eq!(no_notify(&d), 0);
    tx.disarm();
    assert_eq!(no_notify(&d), 1);
    for no_interrupt in [0u16, 1] {
        d.set_word(d.config.avail, no_interrupt);
        d.desc(0, BUF, 64, 0, 0);
        d.offer(0);
        assert_eq!(tx.receive(&mut b, 64), Ok(1));
        tx.complete(&mut b);
        assert_eq!(signals(&d.called), u64::from(no_interrupt == 0));
    }
    d.call.set(None);
    d.set_word(d.config.avail, 0);
    d.offer(0);
    assert_eq!(tx.receive(&mut b, 64), Ok(1));
    tx.complete(&mut b);
    assert_eq!(signals(&d.called), 0, "the call descriptor was taken away");
}

#[test]
fn a_guest_that_does_not_kick_is_not_slept_on() {
    let d = Driver::new(4, MODERN);
    let mut tx = GuestTx::new(d.regions(), &d.config, None, d.call.clone(), d.base.clone()).unwrap();
    assert!(!tx.arm());
    assert!(d.tx().arm());
}

#[test]
fn a_kick_is_seen_and_cleared() {
    use std::os::fd::AsRawFd;
    let d = Driver::new(4, MODERN);
    let tx = d.tx();
    let readable = || {
        let mut fd = libc::pollfd { fd: tx.kick_fd().unwrap().as_raw_fd(), events: libc::POLLIN, revents: 0 };
        // SAFETY: one valid pollfd.
        unsafe { libc::poll(&mut fd, 1, 0) == 1 }
    };
    assert!(!readable());
    d.kick.write(1).unwrap();
    assert!(readable());
    tx.clear_kick();
    assert!(!readable());
    tx.clear_kick();
}

/// What a hostile transmit ring must give, and nothing after it.
fn rejects(features: u64, expected: RingError, break_it: impl FnOnce(&mut Driver)) {
    let mut d = Driver::new(8, features);
    break_it(&mut d);
    let (mut tx, mut b) = (d.tx(), Burst::new());
    assert_eq!(tx.receive(&mut b, 64), Err(expected));
    assert!(b.frames().is_empty());
    assert_eq!(tx.receive(&mut b, 64), Ok(0), "said once");
    assert!(!tx.has_pending());
    assert!(tx.arm());
    assert_eq!(d.used_idx(), 0);
}

/// A chain of one bad descriptor.
fn bad_desc(addr: u64, len: u32, flags: u16, next: u16) -> impl FnOnce(&mut Driver) {
    move |d| {
        d.desc(0, addr, len, flags, next);
        d.offer(0);
    }
}

#[test]
fn hostile_descriptors() {
    use RingError::*;
    rejects(MODERN, AvailIndex { index: 9, next: 0 }, |d| d.set_avail_idx(9));
    rejects(MODERN, DescIndex { index: 8, size: 8 }, |d| d.offer(8));
    rejects(MODERN, DescIndex { index: 0xffff, size: 8 }, |d| d.offer(0xffff));
    rejects(MODERN, DescIndex { index: 8, size: 8 }, bad_desc(BUF, 10, NEXT, 8));
    rejects(MODERN, Loop, bad_desc(BUF, 10, NEXT, 0));
    rejects(MODERN, Direction, bad_desc(BUF, 10, WRITE, 0));
    rejects(MODERN, ZeroLength, bad_desc(BUF, 0, 0, 0));
    for (addr, len) in [
        (0x20_0000, 1),
        (0x1f_fff0, 0x11),
        (0x3f_fff0, 0x20),
        (u64::MAX, 1),
        (u64::MAX - 3, u32::MAX),
        (0, u32::MAX),
    ] {
        rejects(MODERN, Address { addr, len }, bad_desc(addr, len, 0, 0));
    }
    rejects(MODERN, TooLong, |d| {
        // 2 GiB thrice is not possible in this memory, but pieces without end are: a table that points at itself a lot.
        for i in 0..2049 {
            d.desc_at(BUF, i, BUF, 1, if i == 2048 { 0 } else { NEXT }, i + 1);
        }
        d.desc(0, BUF, 2049 * 16, INDIRECT, 0);
        d.offer(0);
    });
}

#[test]
fn hostile_indirect_tables() {
    use RingError::*;
    let plain = MODERN & !(1 << VIRTIO_RING_F_INDIRECT_DESC);
    rejects(plain, Indirect, bad_desc(BUF, 16, INDIRECT, 0));
    rejects(MODERN, Indirect, bad_desc(BUF, 0, INDIRECT, 0));
    rejects(MODERN, Indirect, bad_desc(BUF, 15, INDIRECT, 0));
    rejects(MODERN, Indirect, bad_desc(BUF, 24, INDIRECT, 0));
    rejects(MODERN, Indirect, bad_desc(BUF, 16, INDIRECT | NEXT, 1));
    // Adjacent regions are two mappings: a table must be in one.
    rejects(MODERN, Address { addr: 0x10_0000 - 16, len: 32 }, bad_desc(0x10_0000 - 16, 32, INDIRECT, 0));
    let in_table = |addr, len, flags, next| {
        move |d: &mut Driver| {
            d.desc_at(BUF, 0, addr, len, flags, next);
            d.desc(0, BUF, 32, INDIRECT, 0);
            d.offer(0);
        }
    };
    rejects(MODERN, Indirect, in_table(BUF, 16, INDIRECT, 0));
    rejects(MODERN, DescIndex { index: 2, size: 2 }, in_table(BUF, 16, NEXT, 2));
    rejects(MODERN, Loop, in_table(BUF, 16, NEXT, 0));
    rejects(MODERN, Direction, in_table(BUF, 16, WRITE, 0));
}

#[test]
fn frames_before_a_malformed_chain_are_delivered() {
    let mut d = Driver::new(8, MODERN);
    d.desc(0, BUF, 64, 0, 0);
    d.desc(1, BUF, 0, 0, 0);
    d.desc(2, BUF, 64, 0, 0);
    for head in [0, 2, 1, 2] {
        d.offer(head);
    }
    let (mut tx, mut b) = (d.tx(), Burst::new());
    assert_eq!(tx.receive(&mut b, 64), Ok(2));
    tx.complete(&mut b);
    assert_eq!(d.used_idx(), 2);
    assert_eq!(tx.receive(&mut b, 64), Err(RingError::ZeroLength));
}

#[test]
fn an_arena_full_of_pieces_ends_the_burst_early() {
    // Four frames of 900 pieces each do not fit into one burst; the plain one behind them is resolved first.
    let mut d = Driver::new(8, MODERN);
    for i in 0..900 {
        d.desc_at(BUF, i, BUF, 1, if i == 899 { 0 } else { NEXT }, i + 1);
    }
    for head in 0..4 {
        d.desc(head, BUF, 900 * 16, INDIRECT, 0);
        d.offer(head);
    }
    d.desc(4, BUF, 50, 0, 0);
    d.offer(4);
    let (mut tx, mut b) = (d.tx(), Burst::new());
    let mut lens = vec![];
    for _ in 0..5 {
        tx.receive(&mut b, 64).unwrap();
        lens.extend(b.frames().iter().map(|f| f.len));
        tx.complete(&mut b);
    }
    assert_eq!(lens, [888, 888, 888, 888, 38]);
    // The arena has as many pieces as the longest chain; a frame in one piece needs none.
    let mut d = Driver::new(8, MODERN);
    for i in 0..2048 {
        d.desc_at(BUF, i, BUF, 1, if i == 2047 { 0 } else { NEXT }, i + 1);
    }
    d.desc(0, BUF, 2048 * 16, INDIRECT, 0);
    d.desc(1, BUF, 50, 0, 0);
    d.offer(0);
    d.offer(1);
    let mut tx = d.tx();
    assert_eq!(tx.receive(&mut b, 64), Ok(2));
    assert_eq!((b.frames()[0].len, b.frames()[1].len), (2036, 38));
    tx.complete(&mut b);
}

#[test]
fn ring_layout_is_checked() {
    let good = Driver::new(8, MODERN).config;
    let result = |change: fn(&mut RingConfig)| {
        let mut d = Driver::new(8, MODERN);
        d.config = good;
        change(&mut d.config);
        d.try_tx().err()
    };
    assert_eq!(result(|_| ()), None);
    assert_eq!(result(|c| c.size = 0), Some(RingError::Size(0)));
    assert_eq!(result(|c| c.size = 12), Some(RingError::Size(12)));
    let layout = |part, addr| Some(RingError::Layout { part, addr });
    assert_eq!(result(|c| c.desc = 8), layout("descriptor table", 8));
    assert_eq!(result(|c| c.desc = 0x10_0000 - 64), layout("descriptor table", 0x10_0000 - 64));
    assert_eq!(result(|c| c.avail = 3), layout("available ring", 3));
    assert_eq!(result(|c| c.avail = u64::MAX - 1), layout("available ring", u64::MAX - 1));
    assert_eq!(result(|c| c.used = 2), layout("used ring", 2));
    assert_eq!(result(|c| c.used = 0x50_0000 - 4 * 17), layout("used ring", 0x50_0000 - 4 * 17));
}

// ---- a guest receives ----

#[test]
fn mergeable_frames_span_chains() {
    let mut d = Driver::new(16, MODERN);
    for head in 0..8 {
        d.chain(head, &[(BUF + 0x1000 * u64::from(head), 100)], WRITE);
        d.offer(head);
    }
    let rx = d.rx();
    let (small, large) = (bytes(88, 1), bytes(250, 2));
    assert_eq!(rx.send(&[frame(&small), frame(&large)]), SendResult { sent: 2, blocked: None });
    assert_eq!(d.take_used(), Some((0, 100)));
    assert_eq!(d.read(BUF + 12, 88), small);
    assert_eq!(d.read(BUF + 10, 2), [1, 0], "num_buffers");
    assert_eq!(d.take_used(), Some((1, 100)));
    assert_eq!(d.take_used(), Some((2, 100)));
    assert_eq!(d.take_used(), Some((3, 62)));
    assert_eq!(d.read(BUF + 0x1000 + 10, 2), [3, 0]);
    let got = [d.read(BUF + 0x1000 + 12, 88), d.read(BUF + 0x2000, 100), d.read(BUF + 0x3000, 62)].concat();
    assert_eq!(got, large);
    // Four chains are left: 400 bytes. A frame that wants more waits, and what fits goes.
    let huge = bytes(389, 3);
    assert_eq!(rx.send(&[frame(&huge)]), SendResult { sent: 0, blocked: Some(Blocked::Full) });
    assert_eq!(
        rx.send(&[frame(&huge[..388]), frame(&small)]),
        SendResult { sent: 1, blocked: Some(Blocked::Full) }
    );
    assert_eq!(d.used_idx(), 8);
}

#[test]
fn a_frame_larger_than_the_whole_ring_is_too_big() {
    let mut d = Driver::new(4, MODERN);
    for head in 0..4 {
        d.chain(head, &[(BUF, 100)], WRITE);
        d.offer(head);
    }
    let data = bytes(400, 0);
    let rx = d.rx();
    assert_eq!(rx.send(&[frame(&data)]), SendResult { sent: 0, blocked: Some(Blocked::TooBig) });
    assert_eq!(rx.send(&[frame(&data[..300])]), SendResult { sent: 1, blocked: None });
}

#[test]
fn without_mergeable_buffers_one_chain_must_do() {
    let mut d = Driver::new(16, MODERN & !(1 << VIRTIO_NET_F_MRG_RXBUF));
    // Plain chains of 12 + 1500 bytes, then the same in an indirect table.
    d.chain(0, &[(BUF, 12), (BUF + 0x1000, 1500)], WRITE);
    d.offer(0);
    d.desc_at(BUF + 0x2000, 0, BUF + 0x3000, 12, WRITE | NEXT, 1);
    d.desc_at(BUF + 0x2000, 1, BUF + 0x4000, 1500, WRITE, 0);
    d.desc(2, BUF + 0x2000, 32, INDIRECT, 0);
    d.offer(2);
    let rx = d.rx();
    let (a, too_big, b) = (bytes(60, 1), bytes(1501, 2), bytes(1500, 3));
    let frames = [frame(&a), frame(&too_big), frame(&b)];
    assert_eq!(rx.send(&frames), SendResult { sent: 1, blocked: Some(Blocked::TooBig) });
    assert_eq!(rx.send(&frames[2..]), SendResult { sent: 1, blocked: None });
    assert_eq!(d.take_used(), Some((0, 72)));
    assert_eq!(d.take_used(), Some((2, 1512)));
    assert_eq!(d.read(BUF + 0x1000, 60), a);
    assert_eq!(d.read(BUF + 0x4000, 1500), b);
    assert_eq!(d.read(BUF + 0x3000 + 10, 2), [1, 0]);
}

#[test]
fn one_copy_from_guest_to_guest() {
    let mut a = Driver::new(8, MODERN);
    let mut b = Driver::new(8, MODERN);
    let data = bytes(3000, 9);
    a.write(BUF + 12, &data);
    a.chain(0, &[(BUF, 500), (BUF + 500, 2512)], 0);
    a.offer(0);
    for head in 0..3 {
        b.chain(head, &[(BUF + 0x1000 * u64::from(head), 1536)], WRITE);
        b.offer(head);
    }
    let (mut tx, rx, mut burst) = (a.tx(), b.rx(), Burst::new());
    assert_eq!(tx.receive(&mut burst, 64), Ok(1));
    // Headers rewritten and four bytes longer; the last ten bytes cut off.
    let head = bytes(68, 100);
    let f = Frame {
        header: NetHeader { flags: 1, ..NetHeader::default() },
        head: &head,
        body: &[],
        tail: burst.segments(0),
        tail_offset: 64,
        len: 68 + 3000 - 64 - 10,
    };
    let len = f.len;
    assert_eq!(rx.send(&[f]), SendResult { sent: 1, blocked: None });
    tx.complete(&mut burst);
    let got = [b.read(BUF, 1536), b.read(BUF + 0x1000, 1536)].concat();
    assert_eq!(got[..12], [1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 2, 0]);
    assert_eq!(got[12..80], head);
    assert_eq!(got[80..12 + len as usize], data[64..2990]);
    assert_eq!((b.take_used(), b.take_used()), (Some((0, 1536)), Some((1, 12 + len - 1536))));
}

#[test]
fn more_frames_than_one_reservation() {
    let mut d = Driver::new(1024, MODERN);
    for head in 0..1024 {
        d.chain(head, &[(0x4_0000 + 0x100 * u64::from(head), 0x100)], WRITE);
        d.offer(head);
    }
    let rx = d.rx();
    let data: Vec<_> = (0..300u32).map(|i| bytes(if i % 3 == 0 { 600 } else { 60 }, i as u8)).collect();
    let frames: Vec<_> = data.iter().map(|d| frame(d)).collect();
    assert_eq!(rx.send(&frames[..]), SendResult { sent: 300, blocked: None });
    let mut at = 0x4_0000;
    for f in &data {
        let chains = (f.len() + 12).div_ceil(256);
        assert_eq!(d.read(at + 12, f.len()), *f);
        at += 256 * chains as u64;
    }
    // 64 KiB in buffers of 256 bytes: one chain more than a reservation has.
    let huge = bytes(256 * 256 - 12, 0);
    let too = bytes(256 * 256 - 11, 0);
    assert_eq!(
        rx.send(&[frame(&data[1]), frame(&too)]),
        SendResult { sent: 1, blocked: Some(Blocked::TooBig) }
    );
    assert_eq!(rx.send(&[frame(&huge)]), SendResult { sent: 1, blocked: None });
}

#[test]
fn receive_notifications() {
    let mut d = Driver::new(8, MODERN);
    d.start_at(0xfffd);
    for head in 0..8 {
        d.chain(head, &[(BUF, 256)], WRITE);
        d.offer(head);
    }
    d.set_used_event(0xffff);
    let rx = d.rx();
    assert_eq!(d.avail_event(), 0xfffc, "no kicks for a receive ring");
    for (n, calls) in [(1, 0), (1, 0), (1, 1), (1, 0)] {
        rx.send(&vec![frame(b"x"); n][..]);
        rx.notify();
        assert_eq!(signals(&d.called), calls);
    }
    d.set_used_event(2);
    rx.send(&[frame(b"x"), frame(b"y")]);
    rx.notify();
    assert_eq!(signals(&d.called), 1, "passed within a burst");
    rx.notify();
    assert_eq!(signals(&d.called), 0, "nothing new");

    let mut d = Driver::new(8, MODERN & !(1 << VIRTIO_RING_F_EVENT_IDX));
    d.chain(0, &[(BUF, 256)], WRITE);
    d.offer(0);
    d.offer(0);
    d.set_word(d.config.avail, 1);
    let rx = d.rx();
    rx.send(&[frame(b"x")]);
    rx.notify();
    assert_eq!(signals(&d.called), 0);
    d.set_word(d.config.avail, 0);
    rx.send(&[frame(b"x")]);
    rx.notify();
    assert_eq!(signals(&d.called), 1);
}

#[test]
fn hostile_receive_rings() {
    use RingError::*;
    let blocked_by = |break_it: &dyn Fn(&mut Driver)| {
        let mut d = Driver::new(8, MODERN);
        d.chain(0, &[(BUF, 256)], WRITE);
        d.offer(0);
        break_it(&mut d);
        let rx = d.rx();
        let r = rx.send(&[frame(b"good"), frame(b"bad")]);
        let again = rx.send(&[frame(b"bad")]);
        assert_eq!(again, SendResult { sent: 0, blocked: Some(Blocked::Stopped) }, "said once");
        assert!(rx.is_stopped());
        assert_eq!(d.used_idx(), r.sent as u16);
        let Some(Blocked::Fault(e)) = r.blocked else { panic!("{r:?}") };
        (r.sent, e)
    };
    let second = |addr, len, flags, next| {
        move |d: &mut Driver| {
            d.desc(1, addr, len, flags, next);
            d.offer(1);
        }
    };
    assert_eq!(blocked_by(&second(BUF, 100, 0, 0)), (1, Direction));
    assert_eq!(blocked_by(&second(BUF, 0, WRITE, 0)), (1, ZeroLength));
    assert_eq!(blocked_by(&second(BUF, 1, WRITE | NEXT, 1)), (1, Loop));
    assert_eq!(blocked_by(&second(BUF, 4, WRITE | NEXT, 77)), (1, DescIndex { index: 77, size: 8 }));
    assert_eq!(blocked_by(&second(1 << 40, 99, WRITE, 0)), (1, Address { addr: 1 << 40, len: 99 }));
    assert_eq!(blocked_by(&second(BUF, 24, INDIRECT, 0)), (1, Indirect));
    assert_eq!(blocked_by(&|d: &mut Driver| d.offer(9)), (1, DescIndex { index: 9, size: 8 }));
    assert_eq!(blocked_by(&|d: &mut Driver| d.set_avail_idx(100)), (0, AvailIndex { index: 100, next: 0 }));
}

#[test]
fn a_stopped_ring_takes_nothing_and_keeps_its_place() {
    let mut d = Driver::new(8, MODERN);
    for head in 0..4 {
        d.chain(head, &[(BUF, 256)], WRITE);
        d.offer(head);
    }
    let rx = d.rx();
    assert_eq!(rx.send(&[frame(b"a"), frame(b"b")]).sent, 2);
    assert!(rx.stop());
    assert_eq!(rx.send(&[frame(b"c")]), SendResult { sent: 0, blocked: Some(Blocked::Stopped) });
    assert_eq!(d.base.get(), 2);
    let rx = d.rx();
    assert_eq!(rx.send(&[frame(b"c")]).sent, 1);
    assert_eq!(d.used_idx(), 3);
    assert_eq!((d.take_used(), d.take_used(), d.take_used()), (Some((0, 13)), Some((1, 13)), Some((2, 13))));
}

#[test]
fn workers_publish_in_the_order_of_reservation() {
    // Two workers send numbered frames into one ring while its driver takes them and offers the buffers again. Each
    // used entry must be of the buffer offered next, whole, and each worker's frames in order.
    const EACH: u32 = 20_000;
    let mut d = Driver::new(64, MODERN);
    for head in 0..64 {
        d.chain(head, &[(BUF + 0x1000 * u64::from(head), 400)], WRITE);
        d.offer(head);
    }
    let rx = Arc::new(d.rx());
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
                    n += rx.send(&frames[..]).sent as u32;
                    rx.notify();
                }
            })
        })
        .collect();
    let (mut next, mut head, mut seen) = ([0u32; 2], 0u32, 0);
    let patience = std::time::Instant::now() + std::time::Duration::from_secs(60);
    while seen < 2 * EACH {
        let Some((id, len)) = d.take_used() else {
            if std::time::Instant::now() > patience {
                gave_up.store(true, Ordering::Relaxed);
                panic!("nothing comes any more after {seen} frames");
            }
            thread::yield_now();
            continue;
        };
        let mut ids = vec![id];
        let mut data = d.read(BUF + 0x1000 * u64::from(id), len as usize);
        let buffers = u16::from_le_bytes([data[10], data[11]]);
        for _ in 1..buffers {
            // All chains of a frame are published at once.
            let (id, len) = d.take_used().unwrap();
            data.extend(d.read(BUF + 0x1000 * u64::from(id), len as usize));
            ids.push(id);
        }
        let f = &data[12..];
        let w = usize::from(f[0]);
        let i = u32::from_le_bytes(f[1..5].try_into().unwrap());
        assert_eq!(i, next[w], "worker {w}");
        assert_eq!(f.len(), if i % 5 == 0 { 900 } else { 80 });
        assert!(f[5..].iter().all(|&b| usize::from(b) == w));
        next[w] += 1;
        for id in ids {
            assert_eq!(id, head);
            head = (head + 1) % 64;
            d.offer(id as u16);
        }
        seen += 1;
    }
    for w in workers {
        w.join().unwrap();
    }
    assert!(rx.stop());
}
