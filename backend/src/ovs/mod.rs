//! Stock Open vSwitch as the decider: its datapath's flows are mirrored into the tables, its database says which ports
//! there are, and every packet that the tables cannot carry goes to it over a representor TAP.
//!
//! The datapath's flows come from a [`source`]: the kernel's by netlink ([`kernel`]), or those of OVS's userspace datapath
//! by the daemon's own control socket ([`unixctl`]). The [`mirror`] keeps the tables in step with either. OVS's
//! configuration is read and changed by the database ([`ovsdb`]); what concerns our [`ports`], and which [`tunnels`] there are, is told from it.
//! Representors that OVS has lost sight of are put before it again ([`takeup`]).

pub mod jsonrpc;
pub mod kernel;
pub mod mirror;
pub mod netlink;
pub mod ovsdb;
pub mod ports;
pub mod source;
pub mod takeup;
#[cfg(test)]
mod testing;
pub mod tunnels;
pub mod unixctl;
