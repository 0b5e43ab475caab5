//! Flows: a match, actions, and who said so.

use crate::action::{Action, TunnelOpts};
use crate::key::{Key, Mask};
use crate::packet::PortId;
use std::fmt;

/// What a flow matches: `key` under `mask`, both with prerequisites, and options that have no fixed place.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Match {
    /// The values; zero outside the mask.
    pub key: Key,
    /// The bits that count.
    pub mask: Mask,
    /// Tunnel options. Those of GENEVE that fit are in key and mask too ([`crate::tunnel::match_options`]); a flow that has
    /// others is punted.
    pub tunnel: TunnelOpts,
}

/// Unique flow identifier of OVS (`OVS_FLOW_ATTR_UFID`).
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Ufid(pub u128);

impl fmt::Display for Ufid {
    /// `ufid:xxxxxxxx-xxxx-xxxx-xxxx-xxxxxxxxxxxx` without the word, as OVS prints it.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let v = self.0;
        write!(
            f,
            "{:08x}-{:04x}-{:04x}-{:04x}-{:012x}",
            v >> 96,
            v >> 80 & 0xffff,
            v >> 64 & 0xffff,
            v >> 48 & 0xffff,
            v & 0xffff_ffff_ffff
        )
    }
}

impl fmt::Debug for Ufid {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

/// Who gave a flow. Sources are searched in this order; within one, flows are disjoint.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, PartialOrd, Ord)]
#[repr(u8)]
pub enum Source {
    /// `pointwork add-flow`.
    Explicit,
    /// The embedded bridge, or the mirror of OVS's datapath.
    Learned,
}

impl Source {
    /// Number of sources.
    pub const COUNT: usize = 2;
}

/// A flow in text or from a source, before it is compiled.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct FlowSpec {
    /// What it matches.
    pub matches: Match,
    /// What is done.
    pub actions: Vec<Action>,
    /// Its identifier, if the source has one.
    pub ufid: Option<Ufid>,
    /// Why the host must carry it out, whatever its actions are: something that the host does beside flows.
    pub held: Option<String>,
}

/// A flow's place in every worker's slab; the generation tells a flow from its predecessors at the same index.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, PartialOrd, Ord, Default)]
pub struct FlowRef {
    /// Index in the slab.
    pub index: u32,
    /// Generation of the index; 0 is never a live flow.
    pub generation: u32,
}

/// Names of ports, as the text syntax needs them.
pub trait PortNames {
    /// The port called `name`; a decimal number means the port in that slot.
    fn by_name(&self, name: &str) -> Option<PortId>;
    /// The port of that name if it is to be the ingress of flows: beside the others there may be ports whose flows are of interest although
    /// nothing is output to them here.
    fn ingress(&self, name: &str) -> Option<PortId> {
        self.by_name(name)
    }
    /// The name of the port in `slot`.
    fn name(&self, slot: u32) -> Option<String>;
}
