//! A guest's receive ring that two workers fill: it sees whole entries, in order, and is called whenever it sleeps over some.

use std::rc::Rc;

use loom::cell::UnsafeCell;
use loom::thread;

use crate::atomic::{AtomicU16, Fault, Ordering, check};
use crate::event::Event;
use crate::handshake::then_look;
use crate::publication::{Books, Positions, Published, passed, show};
use crate::spin::SpinLock;

/// Positions of a split ring.
struct Split;

const SIZE: u16 = 4;
/// Where the ring is when it begins: the index is about to wrap.
const START: u16 = u16::MAX;

impl Positions for Split {
    fn size(&self) -> u16 {
        SIZE
    }

    fn advance(&self, at: u16, places: u16) -> u16 {
        at.wrapping_add(places)
    }

    fn retreat(&self, at: u16, places: u16) -> u16 {
        at.wrapping_sub(places)
    }

    fn places(&self, from: u16, to: u16) -> u16 {
        to.wrapping_sub(from)
    }
}

struct Shared {
    books: SpinLock<Books>,
    published: Published,
    /// In guest memory: entries (loom tells if one is read that is not written) and used index, which we write, and the index of which the guest wants to be told.
    entries: [UnsafeCell<()>; SIZE as usize],
    used: AtomicU16,
    event: AtomicU16,
    call: Event,
}

impl Shared {
    fn entry(&self, at: u16) -> &UnsafeCell<()> {
        &self.entries[usize::from(at % SIZE)]
    }

    /// What a worker does with a burst of so many frames (`virtio::filling`). One that is `hasty` does not wait for its turn.
    fn send(&self, frames: u16, is_hasty: bool) {
        let first = {
            let mut books = self.books.lock();
            let first = books.used();
            books.take(&Split, frames);
            first
        };
        if !is_hasty {
            self.published.await_turn(first);
        }
        for i in 0..frames {
            self.entry(first.wrapping_add(i)).with_mut(|_| ());
        }
        let after = Split.advance(first, frames);
        show(&self.used, after);
        self.published.pass_on(after);
        let published = self.books.lock().settle(&Split, &self.published);
        if published
            .is_some_and(|published| then_look(|| passed(self.event.load(Ordering::Relaxed), published)))
        {
            self.call.ring();
        }
    }

    /// A driver that takes so many frames, and sleeps meanwhile, as virtio 1.2, 2.7.10.1 has it. Its fence is its own.
    fn receive(&self, frames: u16) {
        let (mut at, end) = (START, START.wrapping_add(frames));
        while at != end {
            self.event.store(at, Ordering::Relaxed);
            loom::sync::atomic::fence(Ordering::SeqCst);
            let used = self.used.load(Ordering::Acquire);
            if used == at {
                self.call.wait();
            }
            while at != used {
                self.entry(at).with(|_| ());
                at = at.wrapping_add(1);
            }
        }
    }
}

fn a_guest_sees_whole_entries_in_order(fault: Fault, is_hasty: bool) {
    check(fault, move || {
        let shared = Rc::new(Shared {
            books: SpinLock::new(Books::new(START)),
            published: Published::new(START),
            entries: std::array::from_fn(|_| UnsafeCell::new(())),
            used: AtomicU16::new(START),
            event: AtomicU16::new(START),
            call: Event::default(),
        });
        let threads = [1, 2].map(|frames| {
            let shared = shared.clone();
            thread::spawn(move || shared.send(frames, is_hasty))
        });
        shared.receive(3);
        threads.into_iter().for_each(|thread| thread.join().unwrap());
    });
}

#[test]
fn a_guest_sees_what_two_workers_publish_and_never_sleeps_over_it() {
    a_guest_sees_whole_entries_in_order(Fault::None, false);
}

#[test]
#[should_panic(expected = "deadlock")]
fn without_fences_it_does() {
    a_guest_sees_whole_entries_in_order(Fault::Fences, false);
}

#[test]
#[should_panic(expected = "Causality violation")]
fn without_release_it_sees_half_an_entry() {
    a_guest_sees_whole_entries_in_order(Fault::Release, false);
}

#[test]
#[should_panic(expected = "Causality violation")]
fn without_acquire_a_worker_shows_what_another_has_not_written() {
    a_guest_sees_whole_entries_in_order(Fault::Acquire, false);
}

#[test]
#[should_panic]
fn a_worker_that_does_not_wait_for_its_turn_is_found_out() {
    a_guest_sees_whole_entries_in_order(Fault::None, true);
}

/// What the lock is for.
fn one_at_a_time(fault: Fault) {
    check(fault, || {
        let lock = Rc::new(SpinLock::new(UnsafeCell::new(())));
        let other = lock.clone();
        let thread = thread::spawn(move || other.lock().with_mut(|_| ()));
        lock.lock().with_mut(|_| ());
        thread.join().unwrap();
    });
}

#[test]
fn one_thread_at_a_time_has_the_lock() {
    one_at_a_time(Fault::None);
}

#[test]
#[should_panic(expected = "Causality violation")]
fn without_release_two_have_it() {
    one_at_a_time(Fault::Unlock);
}

#[test]
#[should_panic(expected = "Causality violation")]
fn without_acquire_two_have_it() {
    one_at_a_time(Fault::Lock);
}
