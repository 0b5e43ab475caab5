//! Nobody sleeps over work that was left for him (`wake::Waker`, and what all other handshakes are made of).

use std::rc::Rc;

use loom::sync::atomic::{AtomicU32, Ordering::Relaxed};
use loom::thread;

use crate::atomic::{Fault, check};
use crate::event::Event;
use crate::handshake::{AWAKE, Sleeper};

struct Shared {
    sleeper: Sleeper,
    event: Event,
    /// Pieces of work that were left.
    left: AtomicU32,
}

fn no_wake_up_is_lost(fault: Fault) {
    check(fault, || {
        let shared =
            Rc::new(Shared { sleeper: Sleeper::new(), event: Event::default(), left: AtomicU32::new(0) });
        let other = shared.clone();
        let worker = thread::spawn(move || {
            let mut done = 0;
            while done < 2 {
                if other.sleeper.doze(AWAKE + 1, || other.left.load(Relaxed) == done) {
                    other.event.wait();
                }
                other.sleeper.awake();
                done = other.left.load(Relaxed);
            }
        });
        for _ in 0..2 {
            shared.left.fetch_add(1, Relaxed);
            if shared.sleeper.why() != AWAKE {
                shared.event.ring();
            }
        }
        worker.join().unwrap();
    });
}

#[test]
fn nobody_sleeps_over_work() {
    no_wake_up_is_lost(Fault::None);
}

#[test]
#[should_panic(expected = "deadlock")]
fn without_fences_somebody_does() {
    no_wake_up_is_lost(Fault::Fences);
}
