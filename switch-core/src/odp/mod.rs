//! Flows and actions as text, in the syntax of OVS's datapath interface (ODP): what `ovs-dpctl` prints and reads.
//!
//! ```text
//! in_port(vm1),eth(dst=52:54:00:00:00:02),eth_type(0x0800),ipv4(dst=10.0.0.0/255.255.255.0,frag=no)  vm2
//! ```
//!
//! The syntax is that of OVS's `lib/odp-util.c`, and every text that OVS prints is read. What differs, and why:
//!
//! * **VLANs.** No `vlan(…)` means "untagged", not "any": both TCIs are matched as 0, as the kernel does. `vlan()` is any
//!   tag. What OVS cannot say is written by the whole TCI, `vlan(tci=VALUE/MASK)`, and by a masked TPID: any frame, tagged or
//!   not, is `eth_type(0/0),vlan(tci=0x0000/0x0000)`. A second tag that OVS does not read, because its `vlan-limit` is 1, it
//!   prints as `encap(eth_type(0x8100))`; that is the same as `encap(eth_type(0x8100),vlan(),encap())`.
//! * **802.2** frames are `eth_type(0/0xffff)`, as OVS prints them: an absent ethertype under a full mask. On input 0, and
//!   0x5ff as userspace OVS has it, mean the same. A frame that ends in a VLAN tag is
//!   `eth_type(0x8100),vlan(vid=0,pcp=0,cfi=0),encap()`.
//! * **Masks.** Bits of a value outside its mask are ignored. Addresses take prefix lengths too. A mask of all the bits
//!   that a header has is an exact match of the key's field, which may be wider (ICMP type, TCP flags).
//! * **Prerequisites** are completed or refused (see [`OdpErrorKind::Prerequisite`]). A header named with an empty list,
//!   as in `tcp()`, is asked for; one whose fields are all wildcards, as in `tcp(src=0/0,dst=0/0)`, is not.
//! * **Drops.** `drop` alone is the empty list; an explicit drop with a reason is `drop(REASON)`, since OVS prints `drop`
//!   for both.
//! * Numbers may not begin with a 0 (OVS reads octal), and `in_port` has no mask. `ipv6_exthdrs(BITS)` and `tun_flags` of
//!   `add_mpls` are ours; `nd_ext(…)` is understood only as wildcards.

mod actions;
mod cursor;
mod dump;
mod error;
mod flow;
mod groups;
mod header;
mod nat;
mod prerequisites;
mod print;
#[cfg(test)]
mod proptests;
#[cfg(test)]
mod tests;
mod tunnel;

pub use dump::DumpedFlow;
pub use error::{OdpError, OdpErrorKind};
pub use flow::require_in_port;

use crate::action::Action;
use crate::flow::{Match, PortNames, Ufid};
use crate::tunnel::OuterSpec;
use std::ops::RangeInclusive;

/// Reads what a flow matches, and its UFID if it begins with one (`ufid:…`). The result has its prerequisites; its values
/// are zero outside the mask. `in_port` may be absent ([`require_in_port`]).
///
/// # Errors
/// The first character at which the text is wrong, and why; an ingress port that `names` does not know is
/// [`OdpErrorKind::UnknownPort`].
pub fn parse_flow(text: &str, names: &dyn PortNames) -> Result<(Match, Option<Ufid>), OdpError> {
    let mut c = cursor::Cursor::new(text);
    let flow = flow::FlowParser::new(names).parse(&mut c, false)?;
    if c.is_end() { Ok(flow) } else { Err(c.error("the end of the flow expected")) }
}

/// Reads actions. A port that `names` does not know becomes [`crate::action::PortRef::Foreign`].
///
/// # Errors
/// The first character at which the text is wrong, and why.
pub fn parse_actions(text: &str, names: &dyn PortNames) -> Result<Vec<Action>, OdpError> {
    let mut c = cursor::Cursor::new(text);
    c.separators();
    if c.is_end() {
        return Err(c.error("actions expected; to drop is 'drop'"));
    }
    let actions = actions::parse_list(&mut c, names, false)?;
    if c.is_end() { Ok(actions) } else { Err(c.error("')' without '('")) }
}

/// Reads the arguments of `tnl_push`. Its packets get UDP source ports of that range.
///
/// # Errors
/// The first character at which the text is wrong, and why, or is of a header that is not made here.
pub fn parse_header(text: &str, src_ports: RangeInclusive<u16>) -> Result<OuterSpec, OdpError> {
    let mut c = cursor::Cursor::new(text);
    let spec = header::parse(&mut c, src_ports)?;
    if c.is_end() { Ok(spec) } else { Err(c.error("the end of the header expected")) }
}

/// Reads a line of `ovs-dpctl dump-flows` or `ovs-appctl dpctl/dump-flows`, with or without `-m`, with port names. A flow
/// without `eth(…)` and `packet_type(…)` is one of packets without a link header, and gets the packet type that says so.
///
/// # Errors
/// The first character at which the line is wrong, and why; see [`parse_flow`] for the ingress port. Headings, such as
/// `flow-dump from the main thread:`, are not flows.
pub fn parse_dump_line(text: &str, names: &dyn PortNames) -> Result<DumpedFlow, OdpError> {
    dump::parse(text, names)
}

/// The canonical text of what a flow matches, fields in OVS's order: [`parse_flow`] reads it back as the same value, if
/// the flow has its prerequisites and a packet can match it. Values that are not matched are left out.
pub fn format_flow(matches: &Match, names: &dyn PortNames) -> String {
    flow::format(matches, names)
}

/// The canonical text of actions, which [`parse_actions`] reads back as the same value.
pub fn format_actions(actions: &[Action], names: &dyn PortNames) -> String {
    print::format_list(actions, names)
}
