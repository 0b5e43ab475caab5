//! A barrier returns when all workers have passed it, also those that sleep; what was replaced before it may be freed after it.

use std::rc::Rc;

use loom::cell::UnsafeCell;
use loom::sync::Mutex;
use loom::sync::atomic::{AtomicBool, Ordering::Relaxed};
use loom::thread;

use crate::atomic::{Fault, check_bounded};
use crate::event::Event;
use crate::progress::{Progress, Seen, Version};

struct Shared<const WORKERS: usize> {
    version: Version,
    stop: AtomicBool,
    /// Which of the two blocks is in use, behind a lock as rings are.
    current: Mutex<usize>,
    /// loom tells if one is freed while somebody reads it.
    blocks: [UnsafeCell<()>; 2],
    workers: [(Progress, Event); WORKERS],
}

impl<const WORKERS: usize> Shared<WORKERS> {
    fn wake_all(&self) {
        for (progress, event) in &self.workers {
            if progress.sleeps() {
                event.ring();
            }
        }
    }

    /// A worker's loop.
    fn work(&self, index: usize, is_hasty: bool) {
        let (progress, event) = &self.workers[index];
        let (mut seen, mut held) = (Seen::none(), 0);
        while !self.stop.load(Relaxed) {
            seen.quiescent(progress);
            let is_busy = seen.changed(&self.version);
            if is_busy {
                if is_hasty {
                    seen.quiescent(progress);
                    self.blocks[held].with(|_| ());
                }
                held = *self.current.lock().unwrap();
            }
            self.blocks[held].with(|_| ());
            // Who has had something to do goes on, without the fence of one that is about to sleep.
            if !is_busy && seen.sleep_begin(progress, &self.version) {
                if !self.stop.load(Relaxed) {
                    event.wait();
                }
                seen.sleep_end(progress);
            }
        }
        progress.end();
    }
}

fn what_was_replaced_may_be_freed<const WORKERS: usize>(fault: Fault, is_hasty: bool) {
    // With two workers, three preemptions would take half a minute.
    check_bounded(fault, 4 - WORKERS, move || {
        let shared = Rc::new(Shared {
            version: Version::new(),
            stop: AtomicBool::new(false),
            current: Mutex::new(0),
            blocks: std::array::from_fn(|_| UnsafeCell::new(())),
            workers: std::array::from_fn::<_, WORKERS, _>(|_| (Progress::new(), Event::default())),
        });
        let workers: Vec<_> = (0..WORKERS)
            .map(|index| {
                let shared = shared.clone();
                thread::spawn(move || shared.work(index, is_hasty))
            })
            .collect();
        *shared.current.lock().unwrap() = 1;
        let version = shared.version.raise();
        shared.wake_all();
        for (progress, _) in &shared.workers {
            while !progress.has_passed(version) {
                thread::yield_now();
            }
        }
        shared.blocks[0].with_mut(|_| ());
        shared.stop.store(true, Relaxed);
        shared.version.raise();
        shared.wake_all();
        for worker in workers {
            worker.join().unwrap();
        }
    });
}

#[test]
fn nobody_uses_what_was_replaced_before_the_barrier() {
    what_was_replaced_may_be_freed::<1>(Fault::None, false);
}

#[test]
fn two_workers_are_waited_for() {
    what_was_replaced_may_be_freed::<2>(Fault::None, false);
}

#[test]
#[should_panic(expected = "exceeded maximum number of branches")] // that is: it waits for ever
fn without_fences_a_sleeper_is_waited_for_in_vain() {
    what_was_replaced_may_be_freed::<1>(Fault::Fences, false);
}

#[test]
#[should_panic(expected = "Causality violation")]
fn without_release_a_barrier_returns_early() {
    what_was_replaced_may_be_freed::<1>(Fault::Release, false);
}

#[test]
#[should_panic(expected = "Causality violation")]
fn without_acquire_a_barrier_returns_early() {
    what_was_replaced_may_be_freed::<1>(Fault::Acquire, false);
}

#[test]
#[should_panic(expected = "Causality violation")]
fn a_worker_that_acknowledges_first_is_found_out() {
    what_was_replaced_may_be_freed::<1>(Fault::None, true);
}
