//! What the files are made of whose orderings models check. The package `models` takes those files as they are, and has by these
//! names what tries every interleaving.

pub(crate) use std::hint::spin_loop;
pub(crate) use std::sync::atomic::{AtomicBool, AtomicU8, AtomicU16, AtomicU64, Ordering, fence};
pub(crate) use std::thread::yield_now;
