//! What a thread sleeps on.

use loom::sync::{Condvar, Mutex};

/// An eventfd: it remembers that it was rung. Who waits for one that nobody rings is deadlocked, which loom tells.
#[derive(Default)]
pub(crate) struct Event {
    rung: Mutex<bool>,
    changed: Condvar,
}

impl Event {
    pub(crate) fn ring(&self) {
        *self.rung.lock().unwrap() = true;
        self.changed.notify_one();
    }

    pub(crate) fn wait(&self) {
        let mut rung = self.rung.lock().unwrap();
        while !*rung {
            rung = self.changed.wait(rung).unwrap();
        }
        *rung = false;
    }
}
