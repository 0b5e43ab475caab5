//! Quiescence: how control threads change what workers use without a lock on the workers' path.
//!
//! There is one configuration version. A control thread changes something (behind a short lock that only matters when
//! versions differ), raises the version, and, where something old is to be freed or answered for, waits until every
//! worker has *acknowledged* that version. A worker looks at the version once per loop; when it moved, it fetches
//! everything anew, drops what it held, and acknowledges at its next loop boundary:
//! ```text
//! loop {
//!     epoch.quiescent();                       // all that changed() announced has been acted on
//!     if epoch.changed() { /* re-read the rings of all ports */ }
//!     … a burst of each queue …
//!     if idle && epoch.sleep_begin() { poll(kick fds, epoch.wake_fd()); epoch.sleep_end(); }
//! }
//! ```
//! A worker about to sleep says so and *then* looks at the version again; a control thread raises the
//! version and *then* looks whether it sleeps (`handshake`): either the worker does not go to sleep, or the control thread
//! wakes it. So a sleeper also acknowledges, at the cost of one wake-up, and nothing needs to be known about what it holds.
//!
//! The barrier is not what memory safety rests on: rings keep their guest's mapping alive by themselves. It is what
//! makes an answer true ("this ring is drained", "this memory is no longer written").

pub(crate) mod progress;

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, RawFd};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use progress::{Progress, Seen, Version};
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

/// How long a barrier waits for a worker.
const PATIENCE: Duration = Duration::from_secs(5);

/// What control threads see of a worker; on cache lines of its own.
#[repr(align(128))]
struct Slot {
    name: String,
    progress: Progress,
    wake: EventFd,
}

impl Slot {
    fn wake(&self) {
        if self.progress.sleeps() {
            // An error means that the counter is full: the worker is being woken already.
            let _ = self.wake.write(1);
        }
    }
}

/// The registry of workers and the version of what they use.
pub struct Quiescence {
    version: Version,
    workers: Mutex<Vec<Arc<Slot>>>,
    patience: Duration,
}

impl Default for Quiescence {
    fn default() -> Self {
        Self::new()
    }
}

impl Quiescence {
    /// A registry without workers.
    pub fn new() -> Self {
        Self::with_patience(PATIENCE)
    }

    fn with_patience(patience: Duration) -> Self {
        Quiescence { version: Version::new(), workers: Mutex::new(Vec::new()), patience }
    }

    fn workers(&self) -> Vec<Arc<Slot>> {
        self.workers.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Enters a worker, which from now on each barrier waits for. Its first [`changed`](WorkerEpoch::changed) is true.
    ///
    /// # Errors
    /// No event descriptor is to be had.
    pub fn register(self: &Arc<Self>, name: &str) -> io::Result<WorkerEpoch> {
        let slot = Arc::new(Slot {
            name: name.to_owned(),
            progress: Progress::new(),
            wake: EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC)?,
        });
        self.workers.lock().unwrap_or_else(PoisonError::into_inner).push(slot.clone());
        Ok(WorkerEpoch { registry: self.clone(), slot, seen: Seen::none() })
    }

    /// Raises the version and wakes sleepers; does not wait. Returns the new version.
    pub fn publish(&self) -> u64 {
        let version = self.version.raise();
        self.wake_all();
        version
    }

    /// Wakes every sleeping worker, for instance because a queue that it reads has something.
    pub fn wake_all(&self) {
        for slot in self.workers() {
            slot.wake();
        }
    }

    /// Raises the version and waits until every worker has acted on it. Not to be called by a worker, nor with a lock
    /// held that a worker may take. False, after a warning, if a worker does not answer within seconds.
    pub fn barrier(&self) -> bool {
        let version = self.publish();
        let deadline = Instant::now() + self.patience;
        let mut all = true;
        for slot in self.workers() {
            let mut rounds = 0;
            while !slot.progress.has_passed(version) {
                if Instant::now() > deadline {
                    log::warn!("worker {} did not take up a change within {:?}", slot.name, self.patience);
                    all = false;
                    break;
                }
                rounds += 1;
                if rounds < 100 {
                    thread::yield_now();
                } else {
                    thread::sleep(Duration::from_micros(50));
                }
            }
        }
        all
    }
}

/// A worker's side. Dropping it signs the worker off; drop what is held of ports first.
pub struct WorkerEpoch {
    registry: Arc<Quiescence>,
    slot: Arc<Slot>,
    /// The version last returned by `changed`.
    seen: Seen,
}

impl WorkerEpoch {
    /// A loop boundary: everything that the last [`changed`](Self::changed) announced has been taken up, and nothing
    /// older is held.
    #[inline]
    pub fn quiescent(&self) {
        self.seen.quiescent(&self.slot.progress);
    }

    /// Whether something has changed since the last call: re-read it all before the next
    /// [`quiescent`](Self::quiescent).
    #[inline]
    pub fn changed(&mut self) -> bool {
        self.seen.changed(&self.registry.version)
    }

    /// Announces sleep, which is a loop boundary too. False: something has changed, go on instead. After it has returned
    /// true, look once more at every queue whose producer wakes by [`Waker`], then wait on [`wake_fd`](Self::wake_fd),
    /// then call [`sleep_end`](Self::sleep_end).
    pub fn sleep_begin(&self) -> bool {
        self.seen.sleep_begin(&self.slot.progress, &self.registry.version)
    }

    /// Ends sleep, however it came to an end.
    pub fn sleep_end(&self) {
        self.seen.sleep_end(&self.slot.progress);
        // Nothing to read is the usual case: a kick has woken us.
        let _ = self.slot.wake.read();
    }

    /// What becomes readable when the worker is to wake up.
    pub fn wake_fd(&self) -> BorrowedFd<'_> {
        let fd: RawFd = self.slot.wake.as_raw_fd();
        // SAFETY: `slot` keeps the descriptor open for as long as `self` is borrowed.
        #[allow(unsafe_code)]
        unsafe {
            BorrowedFd::borrow_raw(fd)
        }
    }

    /// A handle by which a producer wakes this worker.
    pub fn waker(&self) -> Waker {
        Waker(self.slot.clone())
    }
}

impl Drop for WorkerEpoch {
    fn drop(&mut self) {
        // Whoever is waiting for us right now must not wait for ever.
        self.slot.progress.end();
        let mut workers = self.registry.workers.lock().unwrap_or_else(PoisonError::into_inner);
        workers.retain(|w| !Arc::ptr_eq(w, &self.slot));
    }
}

/// Wakes one worker, if it sleeps.
#[derive(Clone)]
pub struct Waker(Arc<Slot>);

impl Waker {
    /// Call it after the queue has been written. It costs a fence, and a system call only if the worker sleeps.
    pub fn wake(&self) {
        self.0.wake();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::atomic::{AtomicBool, Ordering};
    use std::sync::mpsc;

    /// Sleeps until something is written to the wake descriptor.
    fn sleep(epoch: &WorkerEpoch) {
        let mut fd = libc::pollfd { fd: epoch.wake_fd().as_raw_fd(), events: libc::POLLIN, revents: 0 };
        // SAFETY: one valid pollfd.
        #[allow(unsafe_code)]
        let n = unsafe { libc::poll(&mut fd, 1, 10_000) };
        assert_eq!(n, 1, "nobody woke the worker");
    }

    #[test]
    fn without_workers_a_barrier_is_free() {
        let q = Quiescence::with_patience(Duration::ZERO);
        assert!(q.barrier());
    }

    #[test]
    fn a_stuck_worker_is_given_up() {
        let q = Arc::new(Quiescence::with_patience(Duration::from_millis(20)));
        let mut epoch = q.register("stuck").unwrap();
        assert!(epoch.changed(), "a new worker must read everything");
        epoch.quiescent();
        assert!(!q.barrier());
        assert!(epoch.changed());
        epoch.quiescent();
        drop(epoch);
        assert!(q.barrier(), "signed off");
    }

    #[test]
    fn what_was_retired_is_no_longer_held() {
        // Workers hold a clone of an Arc and drop it when the version moves; after each barrier only the control side
        // may hold it. The workers sleep whenever they may, so wake-ups are tried all the time.
        let q = Arc::new(Quiescence::new());
        let shared = Arc::new(Mutex::new(Arc::new(0u32)));
        let stop = Arc::new(AtomicBool::new(false));
        let (ready, started) = mpsc::channel();
        let threads: Vec<_> = (0..3)
            .map(|i| {
                let (q, shared, stop, ready) = (q.clone(), shared.clone(), stop.clone(), ready.clone());
                thread::spawn(move || {
                    let mut epoch = q.register(&format!("w{i}")).unwrap();
                    let mut held = shared.lock().unwrap().clone();
                    ready.send(()).unwrap();
                    let mut loops = 0u32;
                    while !stop.load(Ordering::Relaxed) {
                        epoch.quiescent();
                        if epoch.changed() {
                            held = shared.lock().unwrap().clone();
                        }
                        loops = loops.wrapping_add(*held);
                        if epoch.sleep_begin() {
                            sleep(&epoch);
                            epoch.sleep_end();
                        }
                    }
                })
            })
            .collect();
        for _ in 0..3 {
            started.recv().unwrap();
        }
        for n in 1..300 {
            let old = std::mem::replace(&mut *shared.lock().unwrap(), Arc::new(n));
            assert!(q.barrier());
            assert_eq!(Arc::strong_count(&old), 1, "round {n}");
        }
        stop.store(true, Ordering::Relaxed);
        q.publish();
        for t in threads {
            t.join().unwrap();
        }
    }

    #[test]
    fn a_waker_only_writes_to_a_sleeper() {
        let q = Arc::new(Quiescence::new());
        let mut epoch = q.register("w").unwrap();
        let waker = epoch.waker();
        assert!(!epoch.sleep_begin(), "must read everything first");
        epoch.changed();
        waker.wake();
        assert!(epoch.slot.wake.read().is_err());
        assert!(epoch.sleep_begin());
        waker.wake();
        sleep(&epoch);
        epoch.sleep_end();
        assert!(epoch.slot.wake.read().is_err(), "sleep_end clears it");
    }
}
