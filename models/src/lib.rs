//! Models of what the daemon's threads rely on. The files of the daemon that carry an ordering are taken as they are, with atomics
//! by which [loom](https://docs.rs/loom) tries every interleaving of a few threads (but those with more than three preemptions)
//! and every value that a load may give by the memory model of C11. Around them is as little as shows what they are for: a guest, a
//! queue, an eventfd.
//!
//! A model that cannot fail shows nothing: each is tried again with a [`Fault`](atomic::Fault), fences left out or orderings
//! relaxed, and has to fail.
//!
//! Not in here: a packed ring's words (they are published as a split ring's index is, by a store with release of what the guest
//! looks at first; its handshake is the same function), and the queue of commands itself, which is `rtrb`'s.
#![cfg(test)]

mod atomic;
mod event;
mod publishing;
mod quiescence;
mod sleeping;
mod updates;

#[path = "../../backend/src/handshake.rs"]
mod handshake;
#[path = "../../backend/src/quiesce/progress.rs"]
mod progress;
#[path = "../../backend/src/virtio/publication.rs"]
mod publication;
#[allow(unsafe_code, reason = "the daemon's own, with its arguments")]
#[path = "../../backend/src/virtio/spin.rs"]
mod spin;
