//! Packed rings of a backend that is killed with any part of what it was writing written, and of the one after it.

use std::fs::File;
use std::path::Path;
use std::sync::Arc;

use switch_core::hash::splitmix;
use virtio_bindings::virtio_config::VIRTIO_F_IN_ORDER;
use virtio_bindings::virtio_ring::VIRTIO_RING_F_EVENT_IDX;
use vm_memory::{FileOffset, GuestAddress, GuestMemoryMmap};

use super::testing::{AVAIL, Driver, MODERN, NEXT, PackedDriver, USED, WRAP, WRITE, signals};
use super::{Burst, Frame, GuestRx, GuestTx, NetHeader, RingBase, RingError, RingRecords};

const BUF: u64 = 0x8000;
const SIZE: u16 = 12;

/// Guest memory of a file.
fn memory() -> Arc<GuestMemoryMmap<()>> {
    let fd = rustix::fs::memfd_create("guest", rustix::fs::MemfdFlags::CLOEXEC).unwrap();
    let file = File::from(fd);
    file.set_len(0x10_0000).unwrap();
    let range = (GuestAddress(0), 0x10_0000, Some(FileOffset::new(file, 0)));
    Arc::new(GuestMemoryMmap::from_ranges_with_files([range]).unwrap())
}

/// As a backend that has just started, and is told `named` by the front-end.
fn revive(d: &mut PackedDriver, path: &Path, named: u16) {
    let records = RingRecords::open(path, 1).unwrap();
    d.at.base = Arc::new(RingBase::recorded(records.ring(0)));
    d.at.base.name(named);
}

/// Whether the ring could be started, either way.
fn start(d: &PackedDriver) -> (Option<RingError>, Option<RingError>) {
    (d.at.try_tx().err(), d.at.try_rx().err())
}

fn frame() -> Frame<'static> {
    Frame { header: NetHeader::EMPTY, head: &[7; 60], body: &[], tail: &[], tail_offset: 0, len: 60 }
}

/// A ring in use, either way.
enum Ring {
    Tx(GuestTx, Box<Burst>),
    Rx(GuestRx),
}

impl Ring {
    fn start(d: &PackedDriver, receives: bool) -> Ring {
        if receives { Ring::Rx(d.at.rx()) } else { Ring::Tx(d.at.tx(), Box::default()) }
    }

    /// Uses up to `n` buffers, all at once, and gives how many.
    fn go(&mut self, n: usize) -> usize {
        match self {
            Ring::Tx(tx, burst) => {
                let n = tx.receive(burst, n).unwrap();
                tx.complete(burst);
                n
            }
            Ring::Rx(rx) => rx.send(&vec![frame(); n][..]).sent,
        }
    }
}

/// Makes up to `n` buffers available, of one descriptor or of two.
fn offer(d: &mut PackedDriver, n: usize, receives: bool, random: &mut u64, id: &mut u16) {
    let flags = if receives { WRITE } else { 0 };
    for _ in 0..n {
        let places = if splitmix(random).is_multiple_of(3) { 2 } else { 1 };
        if d.free() < places {
            break;
        }
        let one = [(BUF, 100)];
        let two = [(BUF, 50), (BUF + 50, 60)];
        *id = (*id + 1) % 1000;
        d.offer(*id, if places == 1 { &one } else { &two }, flags);
    }
}

#[test]
fn who_comes_after_goes_on_wherever_it_ended() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("p");
    let mut random = 3;
    let (mut interrupted, mut finished) = (0, 0);
    for round in 0..600u64 {
        let receives = round % 2 == 0;
        let in_order = if round % 3 == 0 { 1 << VIRTIO_F_IN_ORDER } else { 0 };
        let event_idx = if round % 5 == 0 { 1 << VIRTIO_RING_F_EVENT_IDX } else { 0 };
        let features = MODERN & !(1 << VIRTIO_RING_F_EVENT_IDX) | in_order | event_idx;
        let mut d = PackedDriver::of(Driver::at(memory(), 0x1000, SIZE, features));
        revive(&mut d, &path, WRAP);
        let mut id = 0;
        let mut ring = Ring::start(&d, receives);
        for _ in 0..splitmix(&mut random) % 12 {
            let n = (splitmix(&mut random) % 9) as usize;
            offer(&mut d, n, receives, &mut random, &mut id);
            ring.go((splitmix(&mut random) % 7) as usize);
            if let (Ring::Tx(tx, _), 0) = (&mut ring, splitmix(&mut random) % 3)
                && tx.arm()
            {
                tx.disarm();
            }
            if !splitmix(&mut random).is_multiple_of(4) {
                d.reap();
            }
        }
        d.reap();
        // The last thing it does is interrupted: of what it would have written, some is there.
        offer(&mut d, 5, receives, &mut random, &mut id);
        let config = d.at.config;
        let (desc, bytes) = (config.desc, 16 * usize::from(SIZE));
        let before = (d.at.read(desc, bytes), std::fs::read(&path).unwrap());
        let out = d.out.len();
        let first = usize::from(d.used & !WRAP);
        let used = ring.go(1 + (splitmix(&mut random) % 5) as usize);
        let after = (d.at.read(desc, bytes), std::fs::read(&path).unwrap());
        let after_page = after.1.clone();
        let noted = !splitmix(&mut random).is_multiple_of(4);
        let shown = noted && splitmix(&mut random).is_multiple_of(4);
        let mut table = if shown { after.0.clone() } else { before.0 };
        for place in (0..usize::from(SIZE)).filter(|&place| place != first) {
            if noted && splitmix(&mut random).is_multiple_of(2) {
                table[16 * place..16 * (place + 1)].copy_from_slice(&after.0[16 * place..16 * (place + 1)]);
            }
        }
        std::mem::forget(ring); // killed
        d.at.write(desc, &table);
        let mut page = if noted { after.1 } else { before.1.clone() };
        if !noted && splitmix(&mut random).is_multiple_of(2) {
            // In the midst of writing it down: entries and places, but not yet where they are.
            page[96..].copy_from_slice(&after_page[96..]);
        }
        std::fs::write(&path, page).unwrap();

        revive(&mut d, &path, WRAP);
        let mut ring = Ring::start(&d, receives);
        let back = d.reap();
        if noted && used > 0 {
            assert_eq!(back, used, "round {round}: what was written down is given back");
            finished += 1;
        } else {
            assert_eq!(back, 0, "round {round}: nothing is given back that was not written down");
            interrupted += 1;
        }
        assert_eq!(d.out.len(), out - back);
        // Three laps more: ids come back in order, or `reap` fails.
        let mut taken = 0;
        for _ in 0..60 {
            offer(&mut d, 4, receives, &mut random, &mut id);
            let used = ring.go(3);
            assert_eq!(d.reap(), used);
            taken += used;
        }
        assert!(taken > 60, "round {round}: {taken}");
    }
    assert!(interrupted > 50 && finished > 300, "{interrupted} {finished}");
}

#[test]
fn only_the_ring_that_it_was_written_for_goes_on_there() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("p");
    let mem = memory();
    let make = |mem: &Arc<GuestMemoryMmap<()>>| PackedDriver::of(Driver::at(mem.clone(), 0x1000, 4, MODERN));
    let mut d = make(&mem);
    let run = |d: &mut PackedDriver| {
        revive(d, &path, WRAP);
        let mut ring = Ring::start(d, false);
        d.offer(1, &[(BUF, 60)], 0);
        d.offer(2, &[(BUF, 60)], 0);
        assert_eq!((ring.go(1), ring.go(1), d.reap()), (1, 1, 2));
        std::mem::forget(ring);
    };
    let refused = (Some(RingError::Base(WRAP)), Some(RingError::Base(WRAP)));
    run(&mut d);
    revive(&mut d, &path, WRAP);
    assert_eq!(start(&d), (None, None));
    // Another position than it was started at, to which the front-end cannot have come by giving buffers back.
    revive(&mut d, &path, 0);
    assert_eq!(start(&d).0, Some(RingError::Base(0)));
    // The record is gone.
    std::fs::remove_file(&path).unwrap();
    revive(&mut d, &path, WRAP);
    assert_eq!(start(&d), refused);
    // The front-end has been told of the position, and forgets it.
    d.reset();
    run(&mut d);
    RingRecords::open(&path, 1).unwrap().ring(0).unwrap().forget();
    revive(&mut d, &path, WRAP);
    assert_eq!(start(&d), refused);
    // While it was away the guest has begun anew, in the same place.
    d.reset();
    run(&mut d);
    d.reset();
    d.offer(3, &[(BUF, 60)], 0);
    revive(&mut d, &path, WRAP);
    let mut ring = Ring::start(&d, false);
    assert_eq!((ring.go(5), d.reap()), (1, 1), "from the beginning");
    drop(ring);
    // Another guest, in other memory, where the ring has moved just as far.
    let mut other = make(&memory());
    other.offer(1, &[(BUF, 60)], 0);
    let mut ring = Ring::start(&other, false);
    assert_eq!(ring.go(1), 1);
    drop(ring);
    revive(&mut other, &path, WRAP);
    assert_eq!(start(&other), refused);
    // A record that makes no sense.
    d.reset();
    run(&mut d);
    let bytes = std::fs::read(&path).unwrap();
    for (place, wrong) in [(88, [0xff; 2]), (88, [0x05, 0x80]), (90, [0x05, 0x80]), (90, [0x04, 0x00])] {
        let mut bytes = bytes.clone();
        bytes[place..place + 2].copy_from_slice(&wrong);
        std::fs::write(&path, &bytes).unwrap();
        revive(&mut d, &path, WRAP);
        assert_eq!(start(&d), refused, "{wrong:?}");
    }
    // Places that would never end, of entries that are still to be written.
    d.reset();
    revive(&mut d, &path, WRAP);
    let ring = Ring::start(&d, false);
    d.offer(1, &[(BUF, 60)], 0);
    let record = RingRecords::open(&path, 1).unwrap().ring(0).unwrap();
    record.note(WRAP, WRAP, &[0; 256], &[0; 256]);
    std::mem::forget(ring);
    revive(&mut d, &path, WRAP);
    assert_eq!(start(&d), refused);
}

/// What QEMU does to a guest's transmit ring while there is no back-end and so no link: from the position on that it knows, it
/// gives back what looks available there, or the first of it: 10.0 counts what it has in hand wrongly, and then stops. Gives the
/// position behind, which it names from then on.
fn drop_all(d: &PackedDriver, named: u16, most: u16) -> u16 {
    let (desc, mut at) = (d.at.config.desc, named);
    for _ in 0..most {
        let flags = |at: u16| d.at.word(desc + 16 * u64::from(at & !WRAP) + 14);
        let (filled, used) = if at & WRAP != 0 { (AVAIL, AVAIL | USED) } else { (USED, 0) };
        if flags(at) & (AVAIL | USED) != filled {
            break;
        }
        let mut last = at;
        while flags(last) & NEXT != 0 {
            last = d.after(last, 1);
        }
        // Linux writes a chain's id to all of its descriptors.
        let id = d.at.word(desc + 16 * u64::from(last & !WRAP) + 12);
        d.desc(at, 0, 0, id, used);
        at = d.after(last, 1);
    }
    at
}

#[test]
fn what_a_front_end_drops_meanwhile_is_passed() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("p");
    let mut random = 11;
    let (mut ahead, mut twice, mut unfinished) = (0, 0, 0);
    for round in 0..2000u64 {
        let in_order = if round % 3 == 0 { 1 << VIRTIO_F_IN_ORDER } else { 0 };
        let mut d = PackedDriver::of(Driver::at(memory(), 0x1000, SIZE, MODERN | in_order));
        let (mut named, mut id) = (WRAP, 0);
        let mut dropped = 0;
        for life in 0..3 {
            revive(&mut d, &path, named);
            let mut ring = Ring::start(&d, false);
            let used = d.reap();
            // Not each of them gets to do anything.
            for _ in 0..splitmix(&mut random) % 8 * u64::from(life != 1 || round % 2 == 0) {
                offer(&mut d, (splitmix(&mut random) % 13) as usize, false, &mut random, &mut id);
                ring.go((splitmix(&mut random) % 9) as usize);
                d.reap();
            }
            assert!(life > 0 || used == 0);
            offer(&mut d, (splitmix(&mut random) % 13) as usize, false, &mut random, &mut id);
            if round % 5 == 0 {
                // It ends when the last entries are written down, but not in the ring.
                let ring_before = d.at.read(d.at.config.desc, 16 * usize::from(SIZE));
                unfinished += ring.go(4);
                // Behind a gap it goes on only after they are.
                if std::fs::read(&path).unwrap()[92..94] != [0; 2] {
                    d.at.write(d.at.config.desc, &ring_before);
                }
            }
            std::mem::forget(ring); // killed
            let before = named;
            named = drop_all(&d, named, if round % 7 == 0 { 1 } else { SIZE });
            dropped += usize::from(named != before);
            ahead += usize::from(named != before && before != d.used);
        }
        twice += usize::from(dropped > 1);
        revive(&mut d, &path, named);
        let mut ring = Ring::start(&d, false);
        d.reap();
        // Whatever was dropped and whatever was not comes back in order, and the ring goes on.
        while ring.go(3) > 0 {
            d.reap();
        }
        d.reap();
        assert!(d.out.is_empty(), "round {round}: {:?}", d.out);
        for _ in 0..20 {
            offer(&mut d, 4, false, &mut random, &mut id);
            while ring.go(3) > 0 {}
            d.reap();
            assert!(d.out.is_empty(), "round {round}: {:?}", d.out);
        }
    }
    assert!(ahead > 100 && twice > 100 && unfinished > 100, "{ahead} {twice} {unfinished}");
}

/// A ring of which the daemon that had used `used` places of the first lap was killed with three buffers left; QEMU named
/// the position `stale`, of the lap before, and has dropped what it found there. Gives what it names now.
fn dropped(path: &Path, buffers: [&[(u64, u32)]; 3], stale: u16) -> (PackedDriver, u16) {
    let mut d = PackedDriver::of(Driver::at(memory(), 0x1000, 8, MODERN));
    revive(&mut d, path, WRAP);
    let mut ring = Ring::start(&d, false);
    // Two laps, after which positions are the same again.
    for id in 0..16 {
        d.offer(id, &[(BUF, 60)], 0);
        assert_eq!((ring.go(1), d.reap()), (1, 1));
    }
    std::mem::forget(ring);
    // As if it had been started there.
    let page = RingRecords::open(path, 1).unwrap().ring(0).unwrap();
    page.rename(stale);
    for (id, buffer) in (20..).zip(buffers) {
        d.offer(id, buffer, 0);
    }
    let named = drop_all(&d, stale, SIZE);
    assert_ne!(named, stale);
    signals(&d.at.called);
    (d, named)
}

const ONE: &[(u64, u32)] = &[(BUF, 60)];

#[test]
fn a_guest_whose_event_is_among_what_is_passed_is_notified() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("p");
    let (mut d, named) = dropped(&path, [ONE; 3], WRAP | 1);
    assert_eq!(named, WRAP | 3);
    // It waits for the second one.
    d.set_event(WRAP | 1, 2);
    revive(&mut d, &path, named);
    let mut ring = Ring::start(&d, false);
    assert_eq!((signals(&d.at.called), d.reap()), (1, 0), "as at any start");
    assert_eq!((ring.go(4), signals(&d.at.called), d.reap()), (1, 1, 3));
    assert_eq!((ring.go(4), signals(&d.at.called)), (0, 0));
}

#[test]
fn a_guest_hears_of_what_is_given_back_at_the_start() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("p");
    for receives in [false, true] {
        let mut d = PackedDriver::of(Driver::at(memory(), 0x1000, 8, MODERN));
        revive(&mut d, &path, WRAP);
        let mut ring = Ring::start(&d, receives);
        d.offer(1, &[(BUF, 100)], if receives { WRITE } else { 0 });
        let table = d.at.read(d.at.config.desc, 16 * 8);
        d.set_event(WRAP, 2);
        assert_eq!(ring.go(1), 1);
        d.at.write(d.at.config.desc, &table);
        std::mem::forget(ring);
        // The descriptor to interrupt it is there before the ring is started.
        signals(&d.at.called);
        revive(&mut d, &path, WRAP);
        let _ring = Ring::start(&d, receives);
        assert_eq!((d.reap(), signals(&d.at.called)), (1, 1));
    }
}

#[test]
fn who_ends_while_it_completes_what_was_dropped_is_followed() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("p");
    // The second one is a chain, and QEMU's position is in the midst of it.
    let (mut d, named) = dropped(&path, [ONE, &[(BUF, 50), (BUF, 60)], ONE], WRAP | 2);
    let desc = d.at.config.desc;
    d.at.set_word(desc + 16 * 2 + 12, 21); // as Linux has it in all of a chain
    let before = (d.at.read(desc, 16 * 8), std::fs::read(&path).unwrap());
    let mut whole = 0;
    for (ring_is_old, page_is_old) in [(true, true), (true, false), (false, false)] {
        d.at.write(desc, &before.0);
        std::fs::write(&path, &before.1).unwrap();
        revive(&mut d, &path, named);
        std::mem::forget(Ring::start(&d, false));
        let table = d.at.read(desc, 16 * 8);
        whole += usize::from(table != before.0);
        if ring_is_old {
            d.at.write(desc, &before.0);
        }
        if page_is_old {
            std::fs::write(&path, &before.1).unwrap();
        }
        revive(&mut d, &path, named);
        let mut ring = Ring::start(&d, false);
        assert_eq!((ring.go(4), ring.go(4)), (1, 0));
        assert_eq!(d.at.read(desc + 16, 16), table[16..32], "the chain is given back");
    }
    assert_eq!((whole, d.reap()), (3, 3));
}

#[test]
fn a_ring_that_is_stopped_before_a_gap_passes_it_later() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("p");
    for told in [false, true] {
        let (mut d, named) = dropped(&path, [ONE; 3], WRAP | 1);
        revive(&mut d, &path, named);
        drop(Ring::start(&d, false));
        let at = d.at.base.get();
        assert_eq!(at, WRAP);
        if told {
            // The front-end is told, and says it again.
            d.at.base.record().unwrap().forget();
            d.at.base.name(at);
            d.at.base.name(at);
        }
        let mut ring = Ring::start(&d, false);
        assert_eq!((ring.go(4), ring.go(4), d.reap()), (1, 0, 3));
        d.offer(9, ONE, 0);
        assert_eq!((ring.go(4), d.reap()), (1, 1));
    }
    // Another size, under which the gap makes no sense, or means other places.
    for size in [1, 2, 3, 4, 7] {
        let (mut d, named) = dropped(&path, [ONE, ONE, ONE], WRAP | 1);
        revive(&mut d, &path, named);
        drop(Ring::start(&d, false));
        d.at.config.size = size;
        start(&d);
    }
}

#[test]
fn a_gap_behind_of_which_nothing_is_left_does_not_matter() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("p");
    let mut d = PackedDriver::of(Driver::at(memory(), 0x1000, 8, MODERN));
    revive(&mut d, &path, WRAP);
    let mut ring = Ring::start(&d, false);
    for id in 0..16 {
        d.offer(id, ONE, 0);
        assert_eq!((ring.go(1), d.reap()), (1, 1));
    }
    d.offer(20, &[(BUF, 30), (BUF, 30), (BUF, 30)], 0);
    d.offer(21, ONE, 0);
    assert_eq!((ring.go(2), d.reap()), (2, 2));
    std::mem::forget(ring);
    RingRecords::open(&path, 1).unwrap().ring(0).unwrap().rename(WRAP | 1);
    let named = drop_all(&d, WRAP | 1, SIZE);
    assert_eq!(named, WRAP | 3, "the rest of a chain that is back");
    for id in 30..38 {
        d.offer(id, ONE, 0);
    }
    revive(&mut d, &path, named);
    let mut ring = Ring::start(&d, false);
    assert_eq!((ring.go(9), d.reap()), (8, 8));
}

#[test]
fn a_front_end_that_asks_for_kicks_does_not_look_like_a_new_driver() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("p");
    let mut d = PackedDriver::of(Driver::at(memory(), 0x1000, 8, MODERN & !(1 << VIRTIO_RING_F_EVENT_IDX)));
    revive(&mut d, &path, WRAP);
    let mut ring = Ring::start(&d, false);
    d.offer(1, ONE, 0);
    assert_eq!((ring.go(1), d.reap()), (1, 1));
    std::mem::forget(ring);
    // Only the flags: without an event index there is no position.
    d.at.set_word(d.at.config.used + 2, 0);
    revive(&mut d, &path, WRAP);
    assert_eq!(start(&d).0, None);
}
