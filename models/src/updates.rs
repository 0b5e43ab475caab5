//! A worker's queue of commands: none is slept over, what one has replaced comes back before it counts as carried out, and nobody
//! uses what has come back.

use std::rc::Rc;

use loom::cell::UnsafeCell;
use loom::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use loom::thread;

use crate::atomic::{AtomicU64, Fault, check};
use crate::event::Event;
use crate::progress::{Progress, Seen, Version, carried_out, has_carried_out};

/// Commands that are sent.
const COMMANDS: usize = 2;

/// What `rtrb` does for one writer and one reader: the numbers of blocks, in order.
#[derive(Default)]
struct Queue {
    written: AtomicUsize,
    read: AtomicUsize,
    places: [(UnsafeCell<()>, AtomicUsize); COMMANDS],
}

impl Queue {
    fn push(&self, block: usize) {
        let at = self.written.load(Ordering::Relaxed);
        self.places[at].0.with_mut(|_| ());
        self.places[at].1.store(block, Ordering::Relaxed);
        self.written.store(at + 1, Ordering::Release);
    }

    fn is_empty(&self) -> bool {
        self.written.load(Ordering::Acquire) == self.read.load(Ordering::Relaxed)
    }

    fn pop(&self) -> Option<usize> {
        if self.is_empty() {
            return None;
        }
        let at = self.read.load(Ordering::Relaxed);
        self.places[at].0.with(|_| ());
        self.read.store(at + 1, Ordering::Relaxed);
        Some(self.places[at].1.load(Ordering::Relaxed))
    }
}

struct Shared {
    version: Version,
    progress: Progress,
    event: Event,
    stop: AtomicBool,
    commands: Queue,
    waste: Queue,
    applied: AtomicU64,
    /// Each command replaces the one before. loom tells if one is freed while the worker reads it.
    blocks: [UnsafeCell<()>; COMMANDS + 1],
}

impl Shared {
    /// A worker's loop. One that is `hasty` counts before it has done it.
    fn work(&self, is_hasty: bool) {
        let (mut seen, mut held) = (Seen::none(), 0);
        while !self.stop.load(Ordering::Relaxed) {
            seen.quiescent(&self.progress);
            seen.changed(&self.version);
            self.blocks[held].with(|_| ());
            while let Some(block) = self.commands.pop() {
                if is_hasty {
                    carried_out(&self.applied, 1);
                }
                self.waste.push(std::mem::replace(&mut held, block));
                if !is_hasty {
                    carried_out(&self.applied, 1);
                }
            }
            if seen.sleep_begin(&self.progress, &self.version) {
                if self.commands.is_empty() && !self.stop.load(Ordering::Relaxed) {
                    self.event.wait();
                }
                seen.sleep_end(&self.progress);
            }
        }
    }

    fn wake(&self) {
        if self.progress.sleeps() {
            self.event.ring();
        }
    }
}

fn what_is_replaced_comes_back(fault: Fault, is_hasty: bool) {
    check(fault, move || {
        let shared = Rc::new(Shared {
            version: Version::new(),
            progress: Progress::new(),
            event: Event::default(),
            stop: AtomicBool::new(false),
            commands: Queue::default(),
            waste: Queue::default(),
            applied: AtomicU64::new(0),
            blocks: std::array::from_fn(|_| UnsafeCell::new(())),
        });
        let other = shared.clone();
        let worker = thread::spawn(move || other.work(is_hasty));
        for number in 1..=COMMANDS {
            shared.blocks[number].with_mut(|_| ());
            shared.commands.push(number);
            shared.wake();
        }
        while !has_carried_out(&shared.applied, COMMANDS as u64) {
            thread::yield_now();
        }
        for number in 0..COMMANDS {
            assert_eq!(shared.waste.pop(), Some(number), "it is not back");
            shared.blocks[number].with_mut(|_| ());
        }
        shared.stop.store(true, Ordering::Relaxed);
        shared.version.raise();
        shared.wake();
        worker.join().unwrap();
    });
}

#[test]
fn no_command_is_slept_over_and_all_that_was_replaced_is_back_and_unused() {
    what_is_replaced_comes_back(Fault::None, false);
}

#[test]
#[should_panic(expected = "exceeded maximum number of branches")] // that is: control waits for ever
fn without_fences_a_command_is_slept_over() {
    what_is_replaced_comes_back(Fault::Fences, false);
}

#[test]
#[should_panic(expected = "it is not back")]
fn without_release_a_command_counts_too_early() {
    what_is_replaced_comes_back(Fault::Release, false);
}

#[test]
#[should_panic(expected = "it is not back")]
fn a_worker_that_counts_first_is_found_out() {
    what_is_replaced_comes_back(Fault::None, true);
}
