//! The service manager's watchdog: it is told that the daemon lives for as long as the event loop turns and every worker
//! passes through its loop. Who hangs is killed and started again by the manager (`WatchdogSec=` of the unit). A turn of the
//! event loop in which a thousand ports come or go may take longer than the manager waits: it is told between two of them.

use super::lock;
use crate::counters::WorkerCounters;
use crate::quiesce::Quiescence;
use anyhow::{Context, Result};
use event_manager::{EventOps, EventSet, Events, MutEventSubscriber};
use log::{info, warn};
use sd_notify::NotifyState;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};
use vmm_sys_util::timerfd::TimerFd;

/// Looks in the time after which the manager gives up. A worker that goes to sleep just as it is woken is seen one look later.
const LOOKS: u32 = 4;

/// Whether workers pass through their loops.
struct Loops {
    workers: Vec<Arc<WorkerCounters>>,
    /// By worker, when all had last moved.
    passed: Vec<u64>,
}

impl Loops {
    fn new(workers: Vec<Arc<WorkerCounters>>) -> Loops {
        let passed = workers.iter().map(|worker| worker.loops.get()).collect();
        Loops { workers, passed }
    }

    /// The workers that have not completed a loop since this found none last.
    fn standing(&mut self) -> Vec<usize> {
        let now: Vec<u64> = self.workers.iter().map(|worker| worker.loops.get()).collect();
        let standing: Vec<usize> =
            (0..now.len()).filter(|&worker| now[worker] == self.passed[worker]).collect();
        if standing.is_empty() {
            self.passed = now;
        }
        standing
    }
}

/// What the manager is told, and when.
struct Look {
    quiescence: Arc<Quiescence>,
    loops: Loops,
    /// From one look to the next.
    every: Duration,
    last: Instant,
    /// How often nothing could be told in a row.
    silent: u32,
}

impl Look {
    /// Whether it is time to look, and all workers have passed through their loops since the last time.
    fn is_alive(&mut self, now: Instant) -> bool {
        // Half of it, for a timer is not on the dot.
        if now.saturating_duration_since(self.last) < self.every / 2 {
            return false;
        }
        self.last = now;
        let standing = self.loops.standing();
        if standing.is_empty() {
            if self.silent > 1 {
                info!("all workers pass through their loops again");
            }
            self.silent = 0;
        } else {
            self.silent += 1;
            if self.silent == 2 {
                warn!(
                    "worker {} does not pass through its loop: systemd's watchdog is not told that we live",
                    standing[0]
                );
            }
        }
        // Who sleeps has to show by the next look that it can be woken.
        self.quiescence.wake_all();
        standing.is_empty()
    }
}

/// Tells the manager that the daemon lives, if that is so; of no effect where no manager wants to know.
#[derive(Clone)]
pub struct Pulse(Option<Arc<Mutex<Look>>>);

impl Pulse {
    /// For the manager that set a limit in `WATCHDOG_USEC` (sd_watchdog_enabled(3)).
    pub fn new(workers: Vec<Arc<WorkerCounters>>, quiescence: Arc<Quiescence>) -> Pulse {
        let limit = sd_notify::watchdog_enabled().filter(|limit| *limit > Duration::ZERO);
        Pulse(limit.map(|limit| {
            let (loops, every, last) = (Loops::new(workers), limit / LOOKS, Instant::now());
            Arc::new(Mutex::new(Look { quiescence, loops, every, last, silent: 0 }))
        }))
    }

    /// To be called by the event loop as often as it likes: between two steps of what may take long.
    pub fn beat(&self) {
        if let Some(look) = &self.0
            && lock(look).is_alive(Instant::now())
            && let Err(error) = sd_notify::notify(&[NotifyState::Watchdog])
        {
            warn!("systemd's watchdog cannot be told that the daemon lives: {error}");
        }
    }
}

/// Beats as long as the event loop turns.
pub struct Watchdog {
    timer: TimerFd,
    pulse: Pulse,
}

impl Watchdog {
    /// What the event loop is to have, if a manager wants to know.
    ///
    /// # Errors
    /// Of its timer.
    pub fn new(pulse: &Pulse) -> Result<Option<Watchdog>> {
        let Some(look) = &pulse.0 else { return Ok(None) };
        let every = lock(look).every;
        let mut timer = TimerFd::new().context("cannot make a timer")?;
        timer.reset(every, Some(every)).context("cannot set a timer")?;
        Ok(Some(Watchdog { timer, pulse: pulse.clone() }))
    }
}

impl MutEventSubscriber for Watchdog {
    fn process(&mut self, _: Events, _: &mut EventOps) {
        // It is there to be read: that is why we are called.
        let _ = self.timer.wait();
        self.pulse.beat();
    }

    fn init(&mut self, ops: &mut EventOps) {
        if let Err(error) = ops.add(Events::new(&self.timer, EventSet::IN)) {
            warn!("systemd's watchdog will end the daemon, its timer cannot be watched: {error:?}");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_worker_that_stands_still_is_named_until_it_moves() {
        let workers: Vec<Arc<WorkerCounters>> = (0..3).map(|_| Arc::default()).collect();
        workers[1].loops.add(7);
        let mut loops = Loops::new(workers.clone());
        assert_eq!(loops.standing(), [0, 1, 2]);
        workers.iter().for_each(|worker| worker.loops.add(1));
        assert!(loops.standing().is_empty());
        workers[0].loops.add(1);
        workers[2].loops.add(1);
        assert_eq!(loops.standing(), [1]);
        // The others need not move again meanwhile.
        assert_eq!(loops.standing(), [1]);
        workers[1].loops.add(1);
        assert!(loops.standing().is_empty());
        assert_eq!(loops.standing(), [0, 1, 2]);
    }

    #[test]
    fn a_long_turn_tells_now_and_then_as_long_as_no_worker_stands() {
        let worker: Arc<WorkerCounters> = Arc::default();
        let (start, every) = (Instant::now(), Duration::from_secs(6));
        let loops = Loops::new(vec![worker.clone()]);
        let mut look = Look { quiescence: Arc::new(Quiescence::new()), loops, every, last: start, silent: 0 };
        // A minute in which something is done each second, and then one with a worker that stands.
        let mut told = [0, 0];
        for second in 1..=120_u64 {
            let is_standing = second > 60;
            worker.loops.add(u64::from(!is_standing));
            told[usize::from(is_standing)] += u32::from(look.is_alive(start + Duration::from_secs(second)));
        }
        assert_eq!(told, [20, 0]);
        assert_eq!(look.silent, 20);
    }
}
