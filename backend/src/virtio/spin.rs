//! A lock that is held for well under a microsecond. Checked by models.

use std::cell::UnsafeCell;
use std::ops::{Deref, DerefMut};

use crate::atomic::{AtomicBool, Ordering, spin_loop, yield_now};

/// Waiting for another worker's few instructions: spins, and lets it run if it lost its processor.
#[derive(Default)]
pub(super) struct Spins(u32);

impl Spins {
    #[inline]
    pub(super) fn wait(&mut self) {
        self.0 += 1;
        if self.0.is_multiple_of(128) {
            yield_now();
        } else {
            spin_loop();
        }
    }
}

/// A lock that is held for well under a microsecond.
pub(crate) struct SpinLock<T> {
    locked: AtomicBool,
    value: UnsafeCell<T>,
}

// SAFETY: `value` is only reached through a guard, of which there is one at a time.
unsafe impl<T: Send> Sync for SpinLock<T> {}

impl<T> SpinLock<T> {
    pub(crate) fn new(value: T) -> Self {
        SpinLock { locked: AtomicBool::new(false), value: UnsafeCell::new(value) }
    }

    #[inline]
    pub(crate) fn lock(&self) -> SpinGuard<'_, T> {
        let mut spins = Spins::default();
        while self.locked.compare_exchange_weak(false, true, Ordering::Acquire, Ordering::Relaxed).is_err() {
            while self.locked.load(Ordering::Relaxed) {
                spins.wait();
            }
        }
        SpinGuard(self)
    }
}

pub(crate) struct SpinGuard<'a, T>(&'a SpinLock<T>);

impl<T> Deref for SpinGuard<'_, T> {
    type Target = T;
    fn deref(&self) -> &T {
        // SAFETY: the guard exists only while it alone holds the lock.
        unsafe { &*self.0.value.get() }
    }
}

impl<T> DerefMut for SpinGuard<'_, T> {
    fn deref_mut(&mut self) -> &mut T {
        // SAFETY: as above.
        unsafe { &mut *self.0.value.get() }
    }
}

impl<T> Drop for SpinGuard<'_, T> {
    fn drop(&mut self) {
        self.0.locked.store(false, Ordering::Release);
    }
}
