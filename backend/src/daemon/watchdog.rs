//! The service manager's watchdog: it is told that the daemon lives for as long as the event loop turns and every worker
//! passes through its loop. Who hangs is killed and started again by the manager (`WatchdogSec=` of the unit).

use super::Daemon;
use crate::counters::WorkerCounters;
use crate::quiesce::Quiescence;
use anyhow::{Context, Result};
use event_manager::{EventOps, EventSet, Events, MutEventSubscriber};
use log::{info, warn};
use sd_notify::NotifyState;
use std::sync::Arc;
use std::time::Duration;
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

/// Tells the manager, from the event loop.
pub struct Watchdog {
    timer: TimerFd,
    quiescence: Arc<Quiescence>,
    loops: Loops,
    /// How often nothing could be told in a row.
    silent: u32,
}

impl Watchdog {
    /// What tells the manager that set a limit in `WATCHDOG_USEC` (sd_watchdog_enabled(3)); `None` if there is no such.
    pub fn new(daemon: &Daemon) -> Result<Option<Watchdog>> {
        let Some(limit) = sd_notify::watchdog_enabled().filter(|limit| *limit > Duration::ZERO) else {
            return Ok(None);
        };
        let mut timer = TimerFd::new().context("cannot make a timer")?;
        timer.reset(limit / LOOKS, Some(limit / LOOKS)).context("cannot set a timer")?;
        let datapath = &daemon.datapath;
        let loops = Loops::new(datapath.worker_counters.clone());
        Ok(Some(Watchdog { timer, quiescence: datapath.quiescence.clone(), loops, silent: 0 }))
    }

    fn look(&mut self) {
        let standing = self.loops.standing();
        if standing.is_empty() {
            if self.silent > 1 {
                info!("all workers pass through their loops again");
            }
            self.silent = 0;
            if let Err(error) = sd_notify::notify(&[NotifyState::Watchdog]) {
                warn!("systemd's watchdog cannot be told that the daemon lives: {error}");
            }
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
    }
}

impl MutEventSubscriber for Watchdog {
    fn process(&mut self, _: Events, _: &mut EventOps) {
        // It is there to be read: that is why we are called.
        let _ = self.timer.wait();
        self.look();
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
}
