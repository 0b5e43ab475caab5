//! Stock Open vSwitch as the decider: its datapath's flows are mirrored into the tables, its database says which ports
//! there are, and every packet that the tables cannot carry goes to it over a representor TAP.
//!
//! The datapath's flows come from a [`source`]: the kernel's by netlink, or those of OVS's userspace datapath by the
//! daemon's own control socket.

pub mod netlink;
pub mod source;
