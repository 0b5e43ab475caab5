//! What decides about packets that no flow matches: the embedded bridge, or OVS behind the representors.
//!
//! A host answers two ways: it puts flows into a [`FlowTable`], which carry the packets that follow, and it says what
//! becomes of the packet in hand. The table does not know who its flows come from beyond their [`Source`].

pub mod bridge;
pub mod path;
pub mod representors;
pub mod tap;
mod waiting;

use std::sync::Arc;
use switch_core::action::Action;
use switch_core::compile::Plan;
use switch_core::drop::DropReason;
use switch_core::flow::{FlowRef, FlowSpec, Source};
use switch_core::key::Key;
use switch_core::packet::{Packet, PortId};
use switch_core::planner::PlanError;

/// Milliseconds of the daemon's monotonic clock.
pub type Millis = u64;

/// What a source of flows does with the datapath: the bridge today, OVS's mirror in its place.
pub trait FlowTable {
    /// Adds a flow to every worker's tables. A flow of the same match is replaced: its index stays, its generation does
    /// not, unless the actions are the same too.
    fn put(&mut self, source: Source, spec: FlowSpec) -> Result<FlowRef, PlanError>;
    /// Takes a flow out again; one that is gone already is no error.
    fn delete(&mut self, flow: FlowRef);
    /// When a packet last matched the flow, in any worker, or when it was put in.
    fn last_used(&self, flow: FlowRef) -> Millis;
}

/// What becomes of a packet that came up.
pub enum Decision {
    /// These compiled actions, without another lookup.
    Execute(Arc<Plan>),
    /// Nothing more: somebody else has it now.
    Taken,
    /// Nothing.
    Drop(DropReason),
}

/// A port as hosts see it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct HostPort {
    /// Its identity.
    pub id: PortId,
    /// Its name.
    pub name: String,
    /// Its VLANs.
    pub vlans: bridge::Vlans,
    /// Longest packet towards its guest without the link header, in bytes.
    pub mtu: u32,
    /// Whether it is a wire whose device is itself the port of OVS's bridge.
    pub is_device: bool,
    /// Which worker polls which of its queue pairs; not empty.
    pub polled_by: Vec<usize>,
}

/// What there is to do for guests.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Served {
    /// Nothing.
    Idle,
    /// Something was done, and there may be more.
    Busy,
    /// There is something, but it has to wait for buffers that workers have.
    Short,
}

/// Why the host cannot have a port: one line that a person can act on.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub struct HostError(pub String);

/// The decider behind the fast path. Called on the host-path thread only.
pub trait Host: Send {
    /// A packet that no flow matched (or that flows cannot carry): its head, the rest of the frame, and its key. Of headers
    /// that the parser does not follow the key says nothing, and `packet.layout` is empty; the checksum is complete then.
    fn packet(
        &mut self,
        packet: &Packet,
        tail: &[u8],
        key: &Key,
        now: Millis,
        flows: &mut dyn FlowTable,
    ) -> Decision;
    /// A port has come.
    fn port_added(&mut self, port: HostPort, flows: &mut dyn FlowTable) -> Result<(), HostError>;
    /// A port goes: no flow may be made for it or to it any more. Packets that it has sent may still come. What stands for
    /// it at the host goes too, unless a port of the same name `returns` soon.
    fn port_removed(&mut self, id: PortId, returns: bool, flows: &mut dyn FlowTable);
    /// The guest's driver has come or gone.
    fn link_changed(&mut self, _id: PortId, _up: bool) {}
    /// The packet that was asked about last had no flow.
    fn missed(&mut self) {}
    /// OVS's datapath is of another kind now.
    fn set_datapath(&mut self, _settings: representors::Settings) {}
    /// What was watched under this token has become readable.
    fn readable(&mut self, _token: u32) {}
    /// Carries what the host has for guests, for a while.
    fn serve(&mut self) -> Served {
        Served::Idle
    }
    /// Whether [`Host::serve`], which was short of buffers, has got some back.
    fn has_buffers_back(&self) -> bool {
        false
    }
    /// Once a second: ageing.
    fn tick(&mut self, now: Millis, flows: &mut dyn FlowTable);
    /// Reads the source of flows in full.
    fn sync(&mut self, _now: Millis, _flows: &mut dyn FlowTable) {}
    /// What it would answer, were this a packet; nothing changes. None if only somebody else knows.
    fn explain(&self, _key: &Key, _in_port: PortId) -> Option<Vec<Action>> {
        None
    }
    /// Ports of which the last packet for the host was lost, and why.
    fn losing(&self) -> Vec<(PortId, String)> {
        Vec::new()
    }
    /// Number of MAC addresses known behind each port.
    fn macs(&self) -> Vec<(PortId, usize)> {
        Vec::new()
    }
}
