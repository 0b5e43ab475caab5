//! A vhost-user *frontend*: the side that QEMU plays. It owns guest memory, drives rings, split or packed, as a guest's virtio-net
//! driver would, and talks vhost-user to a backend.
//!
//! One library serves the in-process tests, the guests in network namespaces and the load generator, so it has a
//! comfortable face ([`TxRing::tx`], [`RxRing::rx_poll`]), a fast one that allocates nothing per packet
//! ([`TxRing::tx_batch`], [`RxRing::rx_batch`]), one that hardly costs anything ([`lean`]), and a malicious one
//! ([`Ring::raw`]).
//!
//! ```no_run
//! use qemu_tests::frontend::{Frontend, packet::Packet};
//! # fn main() -> Result<(), qemu_tests::frontend::Error> {
//! let mut guest = Frontend::builder("/run/pointwork/vm1.sock").queue_pairs(2).start()?;
//! let queue = guest.queue(0);
//! queue.rx.rx_fill(2048, 128)?;
//! let frame = Packet::eth([2, 0, 0, 0, 0, 1], [2, 0, 0, 0, 0, 2]).ipv4([10, 0, 0, 1], [10, 0, 0, 2]).udp(1, 2);
//! let (header, bytes) = frame.payload(b"hello").build_partial();
//! queue.tx.tx(&bytes, &header)?;
//! while let Some((header, frame)) = queue.rx.rx_poll()? {
//!     println!("{header:?}: {} bytes", frame.len());
//! }
//! # Ok(()) }
//! ```
//!
//! From bottom to top: [`memory`], [`layout`], [`ring`], [`tx`] and [`rx`], [`session`]; beside them [`packet`] and [`features`].

pub mod features;
pub mod header;
pub mod layout;
#[allow(unsafe_code, reason = "a driver that costs the least accesses rings and frames by raw pointers")]
pub mod lean;
#[allow(unsafe_code, reason = "guest memory is mapped and shared with another process")]
pub mod memory;
pub mod packet;
pub mod raw;
#[allow(unsafe_code, reason = "rings are accessed by raw pointers into guest memory")]
pub mod ring;
pub mod rx;
pub mod session;
pub mod tx;
pub mod wire;

use std::io;

pub use features::Features;
pub use header::NetHeader;
pub use layout::{Descriptor, Layout};
pub use memory::{Buffer, GuestMemory, RegionSpec};
pub use raw::RawRing;
pub use ring::{Notify, Ring, RingFault};
pub use rx::{RxFrame, RxRing};
pub use session::{Builder, Frontend, QueuePair};
pub use tx::{Prepared, TxRing};

/// What can go wrong between a frontend and its backend.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A system call failed.
    #[error("{what}: {source}")]
    Io {
        /// What was being done.
        what: &'static str,
        /// The system's answer.
        source: io::Error,
    },
    /// A vhost-user request was refused, or the connection broke during it.
    #[error("vhost-user {request}: {source}")]
    Request {
        /// Name of the request as in the vhost-user specification.
        request: &'static str,
        /// What the `vhost` crate made of it.
        source: vhost::Error,
    },
    /// The backend wrote something into a ring that no device may write.
    #[error("device error on ring {ring}: {fault}")]
    Fault {
        /// Index of the vring.
        ring: usize,
        /// What was wrong.
        fault: RingFault,
    },
    /// No free descriptors for what was to be posted.
    #[error("ring {0} is full")]
    RingFull(usize),
    /// No region has this much contiguous free guest memory.
    #[error("guest memory is exhausted: {0} bytes wanted")]
    OutOfMemory(usize),
    /// The backend offers fewer queues, memory slots or features than this frontend is set up for.
    #[error("the backend lacks {0}")]
    Lacks(String),
    /// The call needs a connection, or one that is started.
    #[error("not connected to a backend")]
    NotConnected,
    /// The builder was given something that cannot be.
    #[error("invalid configuration: {0}")]
    Config(String),
}

impl Error {
    fn io(what: &'static str) -> impl Fn(io::Error) -> Error {
        move |source| Error::Io { what, source }
    }
}

/// Result of the frontend's operations.
pub type Result<T> = std::result::Result<T, Error>;
