//! Tunnels: VXLAN (RFC 7348, with the group policy extension that Linux has), GENEVE (RFC 8926) and GRE with an optional key
//! (RFC 2784, 2890), which with the right key is NVGRE (RFC 7637); Ethernet inside, IPv4 or IPv6 outside.
//!
//! [`Outer`] is an outer header made ready, which is laid around packets; [`recognize`] finds the packet in one that came by a
//! tunnel to one of our [`Endpoint`]s, and what a flow may match of the header. A packet that is to be segmented gets its
//! header once, and [`crate::segment`] puts it on each segment.
//!
//! Whatever is not exactly as one of these says it is an ordinary packet, for the host to make sense of.

mod decap;
mod ecn;
mod geneve;
mod imprint;
mod outer;
mod remote;

pub use decap::{Decap, Endpoint, Taken, TunnelKey, Vlan, recognize};
pub use geneve::{KNOWN_CRITICAL, MAX_MATCHED_OPTIONS, match_options, write_options};
pub use imprint::{Imprint, Varying};
pub use outer::{Encapsulation, Link, MAX_OUTER, Origin, Outer, OuterError, OuterSpec, UdpPorts};
pub use remote::{Remote, Underlay};

/// What kind of tunnel it is.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum Kind {
    /// RFC 7348.
    Vxlan,
    /// RFC 8926.
    Geneve,
    /// RFC 2784 and 2890, with Ethernet inside.
    Gre,
}

/// UDP port of VXLAN (IANA).
pub const VXLAN_PORT: u16 = 4789;
/// UDP port of GENEVE (IANA).
pub const GENEVE_PORT: u16 = 6081;
/// The ethertype that says that there is an Ethernet frame inside (RFC 1701, "transparent Ethernet bridging").
pub const ETH_P_TEB: u16 = 0x6558;
/// GRE has a checksum (RFC 2784 §2.1).
pub const GRE_CHECKSUM_PRESENT: u16 = 0x8000;
/// GRE has a key (RFC 2890 §2).
pub const GRE_KEY_PRESENT: u16 = 0x2000;

/// The largest VNI, of 24 bits.
const MAX_VNI: u64 = 0xff_ffff;
/// In the first byte of VXLAN: there is a VNI.
const VXLAN_VNI: u8 = 0x08;
/// In the first byte of VXLAN: there is a group policy id (draft-smith-vxlan-group-policy).
const VXLAN_GBP: u8 = 0x80;
/// Flags of a group policy, in the second byte of VXLAN: don't learn, policy applied.
const GBP_FLAGS: u8 = 0x48;
/// In the second byte of GENEVE: a control packet.
const GENEVE_OAM: u8 = 0x80;
/// In the second byte of GENEVE: some option is critical.
const GENEVE_CRITICAL: u8 = 0x40;

/// Group policy of VXLAN.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, Default)]
pub struct Gbp {
    /// Group of the sender.
    pub id: u16,
    /// Don't learn (0x40), policy applied (0x08).
    pub flags: u8,
}

/// The GRE key of an NVGRE packet (RFC 7637 §3.2): 24 bits of virtual subnet above 8 bits that tell flows apart.
pub const fn nvgre_key(subnet: u32, flow: u8) -> u32 {
    subnet << 8 | flow as u32
}

#[cfg(test)]
mod tests;
