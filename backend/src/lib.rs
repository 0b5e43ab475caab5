//! The vhost-user daemon `pointworkd` and its command `pointwork`.
//!
//! [`daemon`] runs the control side: configuration, the control socket, and ports, whose vhost-user side is [`vhost`].
//! [`worker`]s carry packets between the rings of guests ([`virtio`]) through the switch of package `switch-core`; what
//! they cannot decide goes to the host path in [`host`], which puts flows into the tables ([`flows`]).

pub mod affinity;
mod atomic;
pub mod cli;
pub mod clock;
pub mod config;
pub mod control;
pub mod counters;
pub mod daemon;
pub mod datapath;
pub mod flows;
pub mod frames;
mod handshake;
pub mod host;
pub mod host_state;
#[cfg(test)]
mod hostile;
pub mod hugepages;
pub mod log_limit;
pub mod nic;
pub mod numa;
pub mod offload;
pub mod ovs;
pub mod port_config;
pub mod quiesce;
pub mod socket_file;
pub mod spread;
pub mod state;
pub mod underlay;
pub mod vhost;
pub mod virtio;
pub mod wake;
pub mod wire;
pub mod worker;
pub mod xdp;
