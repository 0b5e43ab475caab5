//! What plans have to do with tunnels: the way to their other ends, and why there is none.

use crate::action::{Action, PortRef};
use crate::exec::segment_len;
use crate::flow::FlowSpec;
use crate::odp;
use crate::packet::{Packet, PortId};
use crate::tunnel::{Endpoint, Outer, Remote, Vlan};
use std::fmt;
use std::ops::RangeInclusive;
use std::sync::Arc;

/// UDP source ports of what `tnl_push` makes: the `tnl/egress_port_range` that OVS begins with.
const PUSH_PORTS: RangeInclusive<u16> = 32768..=61000;

/// The way of packets that go into a tunnel.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Way {
    /// The header that is laid around them, link header included.
    pub outer: Arc<Outer>,
    /// The port by which they leave.
    pub to: PortId,
    /// Length of the longest frame inside, or segment of one, that goes this way, [`u32::MAX`] if there is none: what becomes of longer ones
    /// (they are answered, or the outer packet is cut) is the host's.
    pub limit: u32,
}

impl Way {
    /// Whether the packet is longer than goes this way.
    #[inline]
    pub(crate) fn is_exceeded_by(&self, packet: &Packet) -> bool {
        self.limit != u32::MAX && segment_len(packet) > self.limit
    }
}

/// The network that tunnels go over, as the host has it: its routes, neighbours and devices. A plan holds what it was told when it
/// was compiled, so flows are compiled anew when the way to their other end changes.
pub trait Ways {
    /// Whether the port is a tunnel's.
    fn is_tunnel(&self, port: PortId) -> bool;
    /// The way of packets that are output to the tunnel's port for this other end.
    ///
    /// # Errors
    /// Why there is none, or none yet.
    fn way(&self, port: PortId, remote: &Remote) -> Result<Way, String>;
    /// What is decapsulated of packets that are given to this port: for `tnl_pop`, that tunnel, whose packets the flow has chosen; for an
    /// output to a port of the host's that is not ours, the tunnels that end behind it. `None` if nothing is.
    fn endpoints(&self, port: &PortRef) -> Option<Arc<[Endpoint]>>;
}

/// No port is a tunnel's.
pub struct NoWays;

impl Ways for NoWays {
    fn is_tunnel(&self, _: PortId) -> bool {
        false
    }

    fn way(&self, _: PortId, _: &Remote) -> Result<Way, String> {
        Err("no tunnels".into())
    }

    fn endpoints(&self, _: &PortRef) -> Option<Arc<[Endpoint]>> {
        None
    }
}

/// What is decapsulated of a flow's packets, if that is all that it does: to give them to a tunnel, or to the port of the host's
/// behind which tunnels end, after it has taken a VLAN tag off at most. Only ends count that packets of this match can be for.
pub(super) fn decapsulation(spec: &FlowSpec, ways: &dyn Ways) -> Option<Arc<[Endpoint]>> {
    let (last, before) = spec.actions.split_last()?;
    let port = match last {
        Action::TnlPop(port) | Action::Output(port @ PortRef::Foreign(_)) => port,
        _ => return None,
    };
    let is_untagged = match before {
        [] => false,
        [Action::PopVlan] => true,
        _ => return None,
    };
    let mut ends = ways.endpoints(port)?.to_vec();
    ends.retain(|end| end.is_met_by(&spec.matches));
    if is_untagged {
        // The flow has matched the tag that it takes off, and without it packets are untagged.
        ends.retain(|end| !matches!(end.vlan, Vlan::Id(_)));
        ends.iter_mut().for_each(|end| end.vlan = Vlan::Any);
    }
    (!ends.is_empty()).then(|| ends.into())
}

/// Why a flow of tunnels is not executed here.
#[derive(Clone, PartialEq, Eq, Debug, Hash)]
pub enum TunnelReason {
    /// A match on options that have no place in the key.
    Match,
    /// `set(tunnel(...))` or `tnl_push(...)` of a header that is not made here.
    Header(String),
    /// No way is known to the other end, or there is none.
    Way(String),
    /// Output to a tunnel without `set(tunnel(...))` in the same flow.
    NotSet,
    /// `recirc` after `set(tunnel(...))` or `tnl_push(...)`.
    Recirc,
    /// `trunc` of a packet that goes into a tunnel.
    Trunc,
    /// Output to a tunnel of a packet with a mark or priority, by which the host may choose another way.
    Mark,
    /// A `set` of the network or transport header after `tnl_push`.
    Edit,
    /// `tnl_pop` of a tunnel that is not known, or beside other actions.
    Pop,
}

impl fmt::Display for TunnelReason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            TunnelReason::Match => f.write_str("match on options"),
            TunnelReason::Header(what) => write!(f, "header with {what}"),
            TunnelReason::Way(why) => f.write_str(why),
            TunnelReason::NotSet => f.write_str("output without set"),
            TunnelReason::Recirc => f.write_str("recirc after set or tnl_push"),
            TunnelReason::Trunc => f.write_str("trunc"),
            TunnelReason::Mark => f.write_str("output with a mark or priority"),
            TunnelReason::Edit => f.write_str("set after tnl_push"),
            TunnelReason::Pop => f.write_str("tnl_pop"),
        }
    }
}

/// What the actions before an action, of its list and the lists around it, have said of tunnels.
#[derive(Clone, Default)]
pub(super) struct Tunnelled {
    /// `set(tunnel(…))`.
    pub remote: Option<Arc<Remote>>,
    /// The packet is inside a header of `tnl_push`.
    pub pushed: bool,
    /// The next output is cut.
    pub cut: bool,
    /// It has a mark or priority.
    pub marked: bool,
}

/// The header of `tnl_push`.
pub(super) fn pushed(text: &str) -> Result<Arc<Outer>, String> {
    let spec = odp::parse_header(text, PUSH_PORTS).map_err(|error| error.message)?;
    Outer::new(&spec).map(Arc::new).map_err(|error| error.to_string())
}
