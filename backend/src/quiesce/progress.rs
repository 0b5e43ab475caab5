//! How far a worker has come, and how others see it. Each number has one writer.
//!
//! Checked by models.

use crate::atomic::{AtomicU64, Ordering};
use crate::handshake::{AWAKE, Sleeper};

const ASLEEP: u8 = AWAKE + 1;

/// The version of what workers use.
pub(crate) struct Version(AtomicU64);

impl Version {
    /// The first one, which no worker has acted on.
    pub(crate) fn new() -> Version {
        Version(AtomicU64::new(1))
    }

    /// Another one, after what it says was changed; gives it. Sleepers are to be woken then.
    pub(crate) fn raise(&self) -> u64 {
        self.0.fetch_add(1, Ordering::Release) + 1
    }
}

/// What control threads see of a worker.
pub(crate) struct Progress {
    /// The newest version that the worker has acted on.
    acknowledged: AtomicU64,
    sleeper: Sleeper,
}

impl Progress {
    /// Of a worker that has not acted on any version.
    pub(crate) fn new() -> Progress {
        Progress { acknowledged: AtomicU64::new(0), sleeper: Sleeper::new() }
    }

    /// Whether the worker uses nothing that is older than `version`.
    pub(crate) fn has_passed(&self, version: u64) -> bool {
        // Acquire: what it has done before is to be seen by who goes on then.
        self.acknowledged.load(Ordering::Acquire) >= version
    }

    /// Whether it has to be woken to what was left for it.
    #[inline]
    pub(crate) fn sleeps(&self) -> bool {
        self.sleeper.why() != AWAKE
    }

    /// The worker has ended, and uses nothing any more.
    pub(crate) fn end(&self) {
        self.acknowledged.store(u64::MAX, Ordering::Release);
    }
}

/// The worker's own: the version that it has seen last.
pub(crate) struct Seen(u64);

impl Seen {
    /// None.
    pub(crate) fn none() -> Seen {
        Seen(0)
    }

    /// As [`WorkerEpoch::quiescent`](super::WorkerEpoch::quiescent).
    #[inline]
    pub(crate) fn quiescent(&self, progress: &Progress) {
        // Only we write it, so a plain compare saves the store, and the line stays shared.
        if progress.acknowledged.load(Ordering::Relaxed) != self.0 {
            progress.acknowledged.store(self.0, Ordering::Release);
        }
    }

    /// As [`WorkerEpoch::changed`](super::WorkerEpoch::changed).
    #[inline]
    pub(crate) fn changed(&mut self, version: &Version) -> bool {
        // Acquire: what has changed is read afterwards.
        let version = version.0.load(Ordering::Acquire);
        if version == self.0 {
            return false;
        }
        self.0 = version;
        true
    }

    /// As [`WorkerEpoch::sleep_begin`](super::WorkerEpoch::sleep_begin).
    pub(crate) fn sleep_begin(&self, progress: &Progress, version: &Version) -> bool {
        self.quiescent(progress);
        if progress.sleeper.doze(ASLEEP, || version.0.load(Ordering::Relaxed)) == self.0 {
            return true;
        }
        self.sleep_end(progress);
        false
    }

    /// As [`WorkerEpoch::sleep_end`](super::WorkerEpoch::sleep_end).
    pub(crate) fn sleep_end(&self, progress: &Progress) {
        progress.sleeper.awake();
    }
}

/// The worker has carried out so many commands more.
#[inline]
pub(crate) fn carried_out(applied: &AtomicU64, count: u64) {
    // Nobody else writes it. Release: after all that they have made it do.
    applied.store(applied.load(Ordering::Relaxed) + count, Ordering::Release);
}

/// Whether the worker has carried out so many commands in all.
pub(crate) fn has_carried_out(applied: &AtomicU64, count: u64) -> bool {
    applied.load(Ordering::Acquire) >= count
}
