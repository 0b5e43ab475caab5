//! Two sides of which each leaves something for the other, and then looks what the other has left: one goes to sleep, the other has
//! work. A processor may look before it is to be seen what it has left; so may both, and one sleeps over the other's
//! work. With a full fence in between on both sides, at least one of them sees the other.
//!
//! Checked by models.

use crate::atomic::{AtomicU8, Ordering, fence};

/// Leaves something for the other side, then looks.
#[inline(always)]
pub(crate) fn leave_then_look<T>(leave: impl FnOnce(), look: impl FnOnce() -> T) -> T {
    leave();
    then_look(look)
}

/// Looks, after something was left for the other side.
#[inline(always)]
pub(crate) fn then_look<T>(look: impl FnOnce() -> T) -> T {
    fence(Ordering::SeqCst);
    look()
}

/// The state of a thread that does not sleep.
pub(crate) const AWAKE: u8 = 0;

/// Whether a thread sleeps, for those who leave work for it: each thread has reasons of its own to, in numbers above [`AWAKE`].
pub(crate) struct Sleeper(AtomicU8);

impl Sleeper {
    /// Of a thread that is awake.
    pub(crate) fn new() -> Sleeper {
        Sleeper(AtomicU8::new(AWAKE))
    }

    /// The thread announces that it goes to sleep, and looks once more.
    #[inline]
    pub(crate) fn doze<T>(&self, why: u8, look: impl FnOnce() -> T) -> T {
        leave_then_look(|| self.0.store(why, Ordering::Relaxed), look)
    }

    /// The thread sleeps no more.
    #[inline]
    pub(crate) fn awake(&self) {
        self.0.store(AWAKE, Ordering::Relaxed);
    }

    /// Why it sleeps, or [`AWAKE`]; for who has left work for it, and wakes it then.
    #[inline]
    pub(crate) fn why(&self) -> u8 {
        then_look(|| self.0.load(Ordering::Relaxed))
    }
}
