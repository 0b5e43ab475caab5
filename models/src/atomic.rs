//! By the names that the daemon's files use: loom's atomics, and faults in them.

use std::cell::Cell;

pub(crate) use loom::sync::atomic::Ordering;
pub(crate) use loom::thread::yield_now;

/// What the daemon's files are done without.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Fault {
    /// Nothing.
    None,
    /// Fences.
    Fences,
    /// Release, where something is written.
    Release,
    /// Acquire, where something is read.
    Acquire,
    /// Release of locks.
    Unlock,
    /// Acquire of locks.
    Lock,
}

thread_local! {
    /// loom runs all threads of a model in the one that it was called by; hence also they share by `Rc`.
    static FAULT: Cell<Fault> = const { Cell::new(Fault::None) };
}

/// Tries every interleaving of a model with three preemptions at most.
pub(crate) fn check(fault: Fault, model: impl Fn() + Send + Sync + 'static) {
    check_bounded(fault, 3, model);
}

/// As [`check`], with so many preemptions at most.
pub(crate) fn check_bounded(fault: Fault, preemptions: usize, model: impl Fn() + Send + Sync + 'static) {
    FAULT.set(fault);
    let mut builder = loom::model::Builder::new();
    builder.preemption_bound = Some(preemptions);
    builder.check(model);
}

/// The ordering that an access really has. Locks are apart, or what they fail to order would hide what others do.
fn faulty(order: Ordering, is_lock: bool) -> Ordering {
    match (FAULT.get(), order, is_lock) {
        (Fault::Release, Ordering::Release, false)
        | (Fault::Acquire, Ordering::Acquire, false)
        | (Fault::Unlock, Ordering::Release, true)
        | (Fault::Lock, Ordering::Acquire, true) => Ordering::Relaxed,
        _ => order,
    }
}

pub(crate) fn fence(order: Ordering) {
    if FAULT.get() != Fault::Fences {
        loom::sync::atomic::fence(order);
    }
}

pub(crate) fn spin_loop() {
    yield_now();
}

macro_rules! atomics {
    ($($name:ident of $value:ty, lock: $is_lock:literal);*) => { $(
        pub(crate) struct $name(loom::sync::atomic::$name);

        impl $name {
            pub(crate) fn new(value: $value) -> $name {
                $name(loom::sync::atomic::$name::new(value))
            }

            pub(crate) fn load(&self, order: Ordering) -> $value {
                self.0.load(faulty(order, $is_lock))
            }

            pub(crate) fn store(&self, value: $value, order: Ordering) {
                self.0.store(value, faulty(order, $is_lock));
            }
        }
    )* };
}

atomics!(
    AtomicBool of bool, lock: true;
    AtomicU8 of u8, lock: false;
    AtomicU16 of u16, lock: false;
    AtomicU64 of u64, lock: false
);

impl AtomicBool {
    pub(crate) fn compare_exchange_weak(
        &self,
        current: bool,
        new: bool,
        success: Ordering,
        failure: Ordering,
    ) -> Result<bool, bool> {
        self.0.compare_exchange_weak(current, new, faulty(success, true), faulty(failure, true))
    }
}

impl AtomicU64 {
    pub(crate) fn fetch_add(&self, value: u64, order: Ordering) -> u64 {
        self.0.fetch_add(value, faulty(order, false))
    }
}
