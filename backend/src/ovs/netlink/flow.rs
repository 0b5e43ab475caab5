//! The kernel's messages about flows.

use super::ports::{Ports, Vports};
use super::wire::{Attrs, Malformed, u32_at};
use super::{OVS_HEADER, actions, key, layout};
use crate::ovs::source::{DatapathFlow, Sighting, Unreadable};
use std::collections::HashSet;
use std::hash::{BuildHasher, DefaultHasher, Hash, Hasher, RandomState};
use switch_core::flow::{FlowSpec, PortNames, Ufid};
use switch_core::key::Field;
use switch_core::packet::PortId;

/// `OVS_FLOW_ATTR_*`.
pub mod flow_attr {
    pub const KEY: u16 = 1;
    pub const ACTIONS: u16 = 2;
    pub const MASK: u16 = 7;
    pub const UFID: u16 = 9;
    pub const UFID_FLAGS: u16 = 10;
}
/// `OVS_UFID_F_OMIT_KEY | OVS_UFID_F_OMIT_MASK | OVS_UFID_F_OMIT_ACTIONS`.
pub const OMIT_ALL: u32 = 7;

/// How a flow is asked for.
pub enum Lookup {
    Ufid(Vec<u8>),
    /// The unmasked key's attributes.
    Key(Vec<u8>),
}

/// A flow for the mirror, or one that is none of its business.
pub enum Found {
    Flow(Box<DatapathFlow>),
    LeftOut(Ufid),
}

/// `enum ovs_flow_attr`, as far as it is used.
#[derive(Default)]
pub struct FlowMessage<'a> {
    pub ufid: Option<&'a [u8]>,
    pub key: Option<&'a [u8]>,
    pub mask: Option<&'a [u8]>,
    pub actions: Option<&'a [u8]>,
}

/// A flow of which all is there.
#[derive(Hash)]
pub struct Complete<'a> {
    id: Ufid,
    has_ufid: bool,
    key: &'a [u8],
    mask: Option<&'a [u8]>,
    actions: &'a [u8],
}

impl<'a> FlowMessage<'a> {
    pub fn decode(attrs: &'a [u8]) -> Result<FlowMessage<'a>, Malformed> {
        let mut message = FlowMessage::default();
        for attr in Attrs(attrs) {
            let attr = attr?;
            match attr.kind {
                flow_attr::KEY => message.key = Some(attr.data),
                flow_attr::ACTIONS => message.actions = Some(attr.data),
                flow_attr::MASK => message.mask = Some(attr.data),
                flow_attr::UFID => message.ufid = Some(attr.data),
                _ => {}
            }
        }
        Ok(message)
    }

    pub fn lookup(&self) -> Result<Lookup, Malformed> {
        match (self.ufid, self.key) {
            (Some(ufid), _) => Ok(Lookup::Ufid(ufid.to_vec())),
            (None, Some(key)) => Ok(Lookup::Key(key.to_vec())),
            (None, None) => Err(Malformed),
        }
    }

    /// The flow's UFID, or an identity made from its key, which then is the unmasked one.
    pub fn id(&self) -> Result<Ufid, Malformed> {
        match (self.ufid, self.key) {
            (Some(bytes), _) => ufid(bytes),
            (None, Some(key)) => key_identity(key),
            (None, None) => Err(Malformed),
        }
    }

    /// None if something is missing, or it has no identity.
    pub fn complete(&self) -> Option<Complete<'a>> {
        let (id, has_ufid) = (self.id().ok()?, self.ufid.is_some());
        Some(Complete { id, has_ufid, key: self.key?, mask: self.mask, actions: self.actions? })
    }

    /// The flow; none if it has no identity.
    pub fn to_flow(&self, ports: &Ports<'_>) -> Option<Found> {
        let complete = self.complete()?;
        let id = complete.id;
        Some(match complete.in_port(ports) {
            Some(port) => Found::Flow(Box::new(DatapathFlow { id, flow: complete.read(port, ports) })),
            None => Found::LeftOut(id),
        })
    }
}

impl Complete<'_> {
    /// The port of the caller's whose packets it matches.
    pub fn in_port(&self, ports: &Ports<'_>) -> Option<PortId> {
        key::in_port(self.key).and_then(|number| ports.ingress(number))
    }

    /// Match and actions.
    pub fn read(&self, port: PortId, ports: &Ports<'_>) -> Result<FlowSpec, Unreadable> {
        let mut decoded = key::decode(self.key, self.mask);
        decoded.matches.key.set(Field::InPort, port.slot as u128);
        decoded.matches.mask.set_exact(Field::InPort);
        match decoded.refused {
            None => Ok(FlowSpec {
                matches: decoded.matches,
                actions: actions::decode(self.actions, ports),
                ufid: self.has_ufid.then_some(self.id),
                held: None,
            }),
            Some(reason) => {
                let mut items = vec![switch_core::odp::format_flow(&decoded.matches, ports.names())];
                items.extend(decoded.unread);
                Err(Unreadable { text: items.join(","), reason })
            }
        }
    }
}

/// Takes the flows of a dump.
pub struct Reader<'a> {
    ports: Ports<'a>,
    /// Of the datapath's ports: a flow may stay the same bytes while a number becomes another port's.
    hasher: DefaultHasher,
    left_out: &'a mut HashSet<Ufid>,
    /// Flows whose actions did not fit into what was left of a datagram.
    pub(super) cut: Vec<Lookup>,
}

impl<'a> Reader<'a> {
    /// For a datapath with these ports, of which ours are those of `names`. Flows of others are added to `left_out`; `seed` keys
    /// [`Sighting::print`].
    pub fn new(
        vports: &'a Vports,
        names: &'a dyn PortNames,
        seed: &RandomState,
        left_out: &'a mut HashSet<Ufid>,
    ) -> Reader<'a> {
        let mut hasher = seed.build_hasher();
        vports.iter().for_each(|(number, vport)| (number, &vport.name).hash(&mut hasher));
        Reader { ports: Ports::new(vports, names), hasher, left_out, cut: Vec::new() }
    }

    /// Gives the flow of a message (its body is behind the generic netlink header) to `each`.
    ///
    /// # Errors
    /// The message breaks the rules of netlink.
    pub fn take(&mut self, body: &[u8], each: &mut dyn FnMut(Sighting<'_>)) -> Result<(), Malformed> {
        let message = FlowMessage::decode(body.get(OVS_HEADER..).ok_or(Malformed)?)?;
        if message.key.is_none() || message.actions.is_none() {
            self.cut.push(message.lookup()?);
        } else if let Some(flow) = message.complete() {
            match flow.in_port(&self.ports) {
                Some(port) => {
                    let mut hasher = self.hasher.clone();
                    flow.hash(&mut hasher);
                    let read = &|| flow.read(port, &self.ports);
                    each(Sighting { id: flow.id, print: Some(hasher.finish()), read });
                }
                None => drop(self.left_out.insert(flow.id)),
            }
        }
        Ok(())
    }

    /// The identity of a message's flow.
    ///
    /// # Errors
    /// As [`Reader::take`].
    pub fn id(body: &[u8]) -> Result<Ufid, Malformed> {
        FlowMessage::decode(body.get(OVS_HEADER..).ok_or(Malformed)?)?.id()
    }
}

/// OVS's UFIDs are four words in host order, which is how it prints them; shorter ones are somebody else's.
fn ufid(bytes: &[u8]) -> Result<Ufid, Malformed> {
    if bytes.is_empty() || bytes.len() > 16 {
        return Err(Malformed);
    }
    let mut padded = [0; 16];
    padded[..bytes.len()].copy_from_slice(bytes);
    let words = padded.chunks_exact(4).map(|word| u32_at(word, 0).unwrap_or_default());
    Ok(Ufid(words.fold(0, |ufid, word| ufid << 32 | word as u128)))
}

/// The same for the same key, as long as this process lives. Padding does not count: the kernel may leave anything there.
fn key_identity(key: &[u8]) -> Result<Ufid, Malformed> {
    let mut halves = [0u64, 1].map(|seed| {
        let mut hasher = DefaultHasher::new();
        hasher.write_u64(seed);
        hasher
    });
    for attr in Attrs(key) {
        let attr = attr?;
        let length = match attr.kind {
            layout::kind::CT_TUPLE4 => 13,
            layout::kind::CT_TUPLE6 => 37,
            _ => attr.data.len(),
        };
        for hasher in &mut halves {
            hasher.write_u16(attr.kind);
            hasher.write(attr.data.get(..length).unwrap_or(attr.data));
        }
    }
    Ok(Ufid((halves[0].finish() as u128) << 64 | halves[1].finish() as u128))
}
