//! Sleeping and being woken, for a thread that polls its queues while there is work.

use crate::handshake::{AWAKE, Sleeper};
use arrayvec::ArrayVec;
use std::io;
use std::os::fd::{AsFd, AsRawFd, RawFd};
use std::sync::atomic::{AtomicBool, Ordering};
use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

/// Lets one thread sleep until another, or a descriptor, has something for it.
///
/// The sleeper announces itself, then looks once more for work; the waker leaves its work, then looks whether anybody
/// sleeps (`handshake`).
pub struct Waker {
    /// [`ASLEEP`] or [`SHORT`], if not awake.
    sleeper: Sleeper,
    /// Whether there is anything watched but the own descriptor.
    watching: AtomicBool,
    event: EventFd,
    epoll: Epoll,
}

const ASLEEP: u8 = AWAKE + 1;
/// Asleep, with work that waits for buffers.
const SHORT: u8 = AWAKE + 2;

/// Descriptors told of at a time; the others are told of next time.
const READY: usize = 32;
/// The tokens of what has become readable.
pub type Ready = ArrayVec<u32, READY>;

/// The token of the waker's own descriptor.
const OWN: u64 = u64::MAX;

impl Waker {
    /// A waker for a thread that is awake.
    pub fn new() -> io::Result<Waker> {
        let event = EventFd::new(EFD_NONBLOCK)?;
        let epoll = Epoll::new()?;
        // Edge triggered: the counter need never be read.
        let interest = EpollEvent::new(EventSet::IN | EventSet::EDGE_TRIGGERED, OWN);
        epoll.ctl(ControlOperation::Add, event.as_raw_fd(), interest)?;
        Ok(Waker { sleeper: Sleeper::new(), watching: AtomicBool::new(false), event, epoll })
    }

    /// Ends the sleep, too, when `fd` becomes readable, and tells it by `token`. It is told once for all that there is to
    /// read by then (edge triggered): whoever is told reads until there is no more, now or later.
    pub fn watch(&self, fd: impl AsFd, token: u32) -> io::Result<()> {
        let interest = EpollEvent::new(EventSet::IN | EventSet::EDGE_TRIGGERED, token.into());
        self.watching.store(true, Ordering::Relaxed);
        self.epoll.ctl(ControlOperation::Add, fd.as_fd().as_raw_fd(), interest)
    }

    /// Ends the other thread's sleep, if it sleeps. Call it after leaving the work.
    #[inline]
    pub fn wake(&self) {
        if self.sleeper.why() != AWAKE {
            self.ring();
        }
    }

    /// Ends the other thread's sleep, if it sleeps for want of buffers. Call it after giving some back.
    #[inline]
    pub fn wake_if_short(&self) {
        if self.sleeper.why() == SHORT {
            self.ring();
        }
    }

    /// Ends the other thread's sleep, or its next one.
    pub fn ring(&self) {
        // It fails only when the counter is full, and then the sleeper wakes anyway.
        let _ = self.event.write(1);
    }

    /// Sleeps until woken, or for `millis`; not at all if there is `work`. For a thread that watches no descriptors.
    pub fn sleep(&self, millis: u64, work: impl FnOnce() -> bool) {
        self.sleep_watching(millis, false, work);
    }

    /// Sleeps until woken, or until something watched is readable, or for `millis`; not at all if there is `work`. `short`:
    /// for want of buffers, so that those who give some back wake it too. Gives the tokens of what is readable.
    pub fn sleep_watching(&self, millis: u64, short: bool, work: impl FnOnce() -> bool) -> Ready {
        let has_work = self.sleeper.doze(if short { SHORT } else { ASLEEP }, work);
        let ready = self.wait(Some(if has_work { 0 } else { millis.min(60_000) as i32 }));
        self.sleeper.awake();
        ready
    }

    /// Sleeps until woken, or until `fd` is readable, or for `millis`; tells whether `fd` is readable. The descriptor must
    /// stay open meanwhile. For a thread that watches no others.
    pub fn sleep_on(&self, fd: RawFd, millis: u64) -> bool {
        if self.epoll.ctl(ControlOperation::Add, fd, EpollEvent::new(EventSet::IN, 0)).is_err() {
            // Without it this is a sleep like any other; the caller looks at it again anyway.
            self.sleep(millis, || false);
            return false;
        }
        let ready = self.sleep_watching(millis, false, || false);
        let _ = self.epoll.ctl(ControlOperation::Delete, fd, EpollEvent::default());
        !ready.is_empty()
    }

    /// The tokens of what has become readable, without waiting. Look for work after this, not before: it takes back the
    /// rings of [`Waker::ring`].
    pub fn poll(&self) -> Ready {
        self.wait(self.watching.load(Ordering::Relaxed).then_some(0))
    }

    fn wait(&self, millis: Option<i32>) -> Ready {
        let mut events = [EpollEvent::default(); READY];
        // An interrupted or failed wait is a short sleep: the caller looks at its queues again.
        let count = millis.map_or(0, |millis| self.epoll.wait(millis, &mut events).unwrap_or(0));
        let told = events.into_iter().take(count).map(|event| event.data());
        told.filter(|&token| token != OWN).map(|token| token as u32).collect()
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
