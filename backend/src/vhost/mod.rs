//! The control plane of vhost-user ports, on the `vhost-user-backend` crate; packets do not come this way.
//!
//! * [`shared`]: what a port's control side and the workers share: the rings as they are to be used right now.
//! * `vring`: the crate's view of a ring, which tells `shared` of every change.
//! * `control`: serves the control queue of a front-end that hands it over.
//! * `relay`: what real front-ends do and the crate does not take.
//! * [`port`]: sockets, connections, and what a port says about itself.

mod control;
pub mod port;
mod relay;
pub mod shared;
mod vring;

#[cfg(test)]
mod tests;

pub use port::{PortError, VhostUserPort};
pub use shared::{PortEvent, PortShared, feature_names, rx_ring, tx_ring};
