//! Sleeping and being woken, for a thread that polls its queues while there is work.

use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::sync::atomic::{AtomicBool, Ordering, fence};
use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

/// Lets one thread sleep until another has something for it.
///
/// The sleeper announces itself, then looks once more for work; the waker leaves its work, then looks whether anybody
/// sleeps. With a full fence between the two steps on both sides, at least one of them sees the other.
pub struct Waker {
    asleep: AtomicBool,
    event: EventFd,
    epoll: Epoll,
}

impl Waker {
    /// A waker for a thread that is awake.
    pub fn new() -> io::Result<Waker> {
        let event = EventFd::new(EFD_NONBLOCK)?;
        let epoll = Epoll::new()?;
        // Edge triggered: the counter need never be read.
        let interest = EpollEvent::new(EventSet::IN | EventSet::EDGE_TRIGGERED, 0);
        epoll.ctl(ControlOperation::Add, event.as_raw_fd(), interest)?;
        Ok(Waker { asleep: AtomicBool::new(false), event, epoll })
    }

    /// Ends the other thread's sleep, if it sleeps. Call it after leaving the work.
    #[inline]
    pub fn wake(&self) {
        fence(Ordering::SeqCst);
        if self.asleep.load(Ordering::Relaxed) {
            self.ring();
        }
    }

    /// Ends the other thread's sleep, or its next one.
    pub fn ring(&self) {
        // It fails only when the counter is full, and then the sleeper wakes anyway.
        let _ = self.event.write(1);
    }

    /// Sleeps until woken, or for `millis`; not at all if there is `work`.
    pub fn sleep(&self, millis: u64, work: impl FnOnce() -> bool) {
        self.asleep.store(true, Ordering::Relaxed);
        fence(Ordering::SeqCst);
        if !work() {
            let mut events = [EpollEvent::default(); 1];
            // An interrupted or failed wait is a short sleep: the caller looks at its queues again.
            let _ = self.epoll.wait(millis.min(60_000) as i32, &mut events);
        }
        self.asleep.store(false, Ordering::Relaxed);
    }

    /// Sleeps until woken, or until `fd` is readable, or for `millis`; tells whether `fd` is readable. The descriptor must
    /// stay open meanwhile.
    pub fn sleep_on(&self, fd: RawFd, millis: u64) -> bool {
        const READABLE: u64 = 1;
        if self.epoll.ctl(ControlOperation::Add, fd, EpollEvent::new(EventSet::IN, READABLE)).is_err() {
            // Without it this is a sleep like any other; the caller looks at it again anyway.
            self.sleep(millis, || false);
            return false;
        }
        let mut events = [EpollEvent::default(); 2];
        self.asleep.store(true, Ordering::Relaxed);
        fence(Ordering::SeqCst);
        let ready = self.epoll.wait(millis.min(60_000) as i32, &mut events).unwrap_or(0);
        self.asleep.store(false, Ordering::Relaxed);
        let _ = self.epoll.ctl(ControlOperation::Delete, fd, EpollEvent::default());
        events[..ready].iter().any(|event| event.data() == READABLE)
    }
}

/// Ends the process if the thread that holds it panics. A thread that carries packets would leave its ports dead and
/// everybody who waits for it waiting, whereas a service manager starts the daemon again.
pub struct AbortOnPanic(pub &'static str);

impl Drop for AbortOnPanic {
    fn drop(&mut self) {
        if std::thread::panicking() {
            log::error!("{} has panicked: the daemon ends", self.0);
            std::process::abort();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::Arc;
    use std::sync::atomic::AtomicU32;
    use std::time::{Duration, Instant};

    #[test]
    fn a_readable_descriptor_or_a_ring_ends_the_sleep() {
        let waker = Waker::new().unwrap();
        let event = EventFd::new(EFD_NONBLOCK).unwrap();
        let start = Instant::now();
        assert!(!waker.sleep_on(event.as_raw_fd(), 1));
        event.write(1).unwrap();
        assert!(waker.sleep_on(event.as_raw_fd(), 60_000));
        event.read().unwrap();
        waker.ring();
        assert!(!waker.sleep_on(event.as_raw_fd(), 60_000));
        assert!(start.elapsed() < Duration::from_secs(30));
    }

    #[test]
    fn no_wake_up_is_lost() {
        let waker = Arc::new(Waker::new().unwrap());
        let work = Arc::new(AtomicU32::new(0));
        let sleeper = std::thread::spawn({
            let (waker, work) = (waker.clone(), work.clone());
            move || {
                let mut done = 0;
                while done < 20_000 {
                    let start = Instant::now();
                    waker.sleep(10_000, || work.load(Ordering::Relaxed) > done);
                    assert!(start.elapsed() < Duration::from_secs(5), "a wake-up was lost");
                    done = work.load(Ordering::Relaxed);
                }
            }
        });
        for _ in 0..20_000 {
            work.fetch_add(1, Ordering::Relaxed);
            waker.wake();
        }
        sleeper.join().unwrap();
    }
}
