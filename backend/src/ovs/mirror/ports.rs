//! Our ports as the mirror knows them, and which flows the host must carry out because of them.

use super::packed::Packed;
use crate::underlay::{DontFragment, HostFlows};
use crate::xdp::Selection;
use std::collections::HashMap;
use std::sync::Arc;
use switch_core::action::{Action, PortRef};
use switch_core::flow::PortNames;
use switch_core::packet::PortId;

/// A port of ours whose representor may be in OVS's datapath.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct MirrorPort {
    /// Its name, which is that of its TAP.
    pub name: String,
    /// Its identity in the tables.
    pub id: PortId,
    /// What its packets must not pass by.
    pub restriction: Restriction,
    /// What stands behind it.
    pub kind: PortKind,
}

/// What stands behind a port.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum PortKind {
    /// A guest, or a device that is ours alone.
    Own,
    /// A device that is OVS's own port: these packets are taken from it.
    Shared(Arc<Selection>),
    /// Tunnels; those of the kernel's datapath tell this of the flows from there.
    Tunnels(Option<Arc<DontFragment>>),
    /// A device of the host's, which is no port of ours: its flows are in no table, and this is told of them.
    Host(Arc<HostFlows>),
}

/// Why packets of a port must take the host path: something at its TAP (policing, QoS, …) that only the host does.
#[derive(Clone, Debug, PartialEq, Eq, Default)]
pub struct Restriction {
    /// For packets that come in at the port.
    pub ingress: Option<String>,
    /// For packets that leave by the port.
    pub egress: Option<String>,
}

/// The ports, and whether anything may be forwarded here at all.
#[derive(Clone, Debug, PartialEq, Eq, Default)]
pub struct Ports {
    by_name: HashMap<String, MirrorPort>,
    /// Names, by slot.
    by_slot: HashMap<u32, String>,
    /// Why every flow is the host's, if so.
    slow: Option<String>,
}

impl Ports {
    /// These ports; the answer to whether all is slow stays.
    pub fn with_ports(&self, ports: Vec<MirrorPort>) -> Ports {
        Ports {
            by_slot: ports.iter().map(|port| (port.id.slot, port.name.clone())).collect(),
            by_name: ports.into_iter().map(|port| (port.name.clone(), port)).collect(),
            slow: self.slow.clone(),
        }
    }

    /// The same ports, with nothing forwarded here for that reason.
    pub fn with_slow(&self, slow: Option<String>) -> Ports {
        Ports { slow, ..self.clone() }
    }

    /// The ports of `self` that are not in `other` under the same name.
    pub fn without(&self, other: &Ports) -> Vec<PortId> {
        let is_gone = |port: &&MirrorPort| other.ingress(&port.name) != Some(port.id);
        self.by_name.values().filter(is_gone).map(|port| port.id).collect()
    }

    fn at(&self, slot: u32) -> Option<&MirrorPort> {
        self.by_name.get(self.by_slot.get(&slot)?)
    }

    /// Which packets are taken from the device in `slot`, if not all.
    pub fn selection(&self, slot: u32) -> Option<&Arc<Selection>> {
        match self.kind(slot)? {
            PortKind::Shared(selection) => Some(selection),
            _ => None,
        }
    }

    /// What stands behind the port in `slot`.
    pub fn kind(&self, slot: u32) -> Option<&PortKind> {
        self.at(slot).map(|port| &port.kind)
    }

    /// Why the host must carry the flow out whatever its actions are, if it must.
    pub fn held(&self, flow: &Packed) -> Option<&str> {
        if let Some(why) = &self.slow {
            return Some(why);
        }
        let ingress = self.at(flow.in_port()).and_then(|port| port.restriction.ingress.as_deref());
        let egress = || {
            find_output(flow.actions(), &mut |port| {
                let PortRef::Ours(id) = port else { return None };
                self.at(id.slot).filter(|port| port.id == *id)?.restriction.egress.as_deref()
            })
        };
        ingress.or_else(egress)
    }
}

/// Whether the flow has to do with one of these ports: as its ingress, or as an output.
pub fn concerns(flow: &Packed, ports: &[PortId]) -> bool {
    ports.iter().any(|port| port.slot == flow.in_port())
        || find_output(flow.actions(), &mut |port| match port {
            PortRef::Ours(id) => ports.contains(id).then_some(()),
            PortRef::Foreign(_) => None,
        })
        .is_some()
}

/// Whether the actions have to do with tunnels: packets are put into one, or taken out, or given to a port of the host's, behind which
/// some may end.
pub fn goes_by_tunnel(actions: &[Action]) -> bool {
    actions.iter().any(|action| match action {
        Action::SetTunnel(..) | Action::TnlPop(_) | Action::Output(PortRef::Foreign(_)) => true,
        Action::Sample { actions, .. } | Action::Clone(actions) | Action::DecTtl(actions) => {
            goes_by_tunnel(actions)
        }
        Action::CheckPktLen { greater, less_equal, .. } => {
            goes_by_tunnel(greater) || goes_by_tunnel(less_equal)
        }
        _ => false,
    })
}

/// The first that `f` finds in the ports that the actions name, nested ones included.
pub fn find_output<T>(actions: &[Action], f: &mut impl FnMut(&PortRef) -> Option<T>) -> Option<T> {
    actions.iter().find_map(|action| match action {
        Action::Output(port) | Action::TnlPop(port) => f(port),
        Action::Userspace(to) => to.tunnel_out_port.as_ref().and_then(&mut *f),
        Action::Sample { actions, .. } | Action::Clone(actions) | Action::DecTtl(actions) => {
            find_output(actions, f)
        }
        Action::CheckPktLen { greater, less_equal, .. } => {
            find_output(greater, f).or_else(|| find_output(less_equal, f))
        }
        _ => None,
    })
}

impl PortNames for Ports {
    /// The port of exactly that name: a number is the datapath's own, never a slot of ours.
    fn by_name(&self, name: &str) -> Option<PortId> {
        self.by_name.get(name).filter(|port| !matches!(port.kind, PortKind::Host(_))).map(|port| port.id)
    }

    fn ingress(&self, name: &str) -> Option<PortId> {
        self.by_name.get(name).map(|port| port.id)
    }

    fn name(&self, slot: u32) -> Option<String> {
        self.by_slot.get(&slot).cloned()
    }
}
