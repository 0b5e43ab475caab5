//! The datapath's ports (vports): what its numbers mean.

use super::wire::{Attrs, Malformed};
use std::collections::{BTreeMap, HashMap};
use switch_core::action::PortRef;
use switch_core::flow::PortNames;
use switch_core::packet::PortId;

/// A port of the kernel's datapath.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Vport {
    /// Its number in the datapath.
    pub number: u32,
    /// Its name, which is its network device's.
    pub name: String,
    /// Index of its network device; 0 if the kernel does not say.
    pub ifindex: u32,
    /// Id of the device's network namespace, if it is not the datapath's.
    pub netns: Option<i32>,
}

impl Vport {
    /// Reads `enum ovs_vport_attr`; none if number or name is missing.
    pub fn decode(attrs: Attrs<'_>) -> Result<Option<Vport>, Malformed> {
        let (mut number, mut name, mut ifindex, mut netns) = (None, None, 0, None);
        for attr in attrs {
            let attr = attr?;
            match attr.kind {
                1 => number = Some(attr.u32()?),
                3 => name = Some(attr.text()?.to_owned()),
                8 => ifindex = attr.u32()?,
                9 => netns = Some(attr.u32()? as i32),
                _ => {}
            }
        }
        Ok(number.zip(name).map(|(number, name)| Vport { number, name, ifindex, netns }))
    }
}

/// All ports of a datapath by number.
pub type Vports = BTreeMap<u32, Vport>;

/// What the datapath's numbers mean here. Each number is looked up once in `names`: most flows name the same few.
pub struct Ports<'a> {
    vports: &'a Vports,
    names: &'a dyn PortNames,
    known: std::cell::RefCell<HashMap<u32, Option<PortId>>>,
}

impl<'a> Ports<'a> {
    /// Looks up `vports` in `names`.
    pub fn new(vports: &'a Vports, names: &'a dyn PortNames) -> Ports<'a> {
        Ports { vports, names, known: Default::default() }
    }

    /// Our port behind this number, if it is one.
    pub fn ours(&self, number: u32) -> Option<PortId> {
        *self.known.borrow_mut().entry(number).or_insert_with(|| {
            let name = &self.vports.get(&number)?.name;
            // A device may be called by a number, which to `by_name` is a slot.
            self.names.by_name(name).filter(|port| self.names.name(port.slot).as_ref() == Some(name))
        })
    }

    /// The port behind this number whose flows are read.
    pub fn ingress(&self, number: u32) -> Option<PortId> {
        self.ours(number).or_else(|| {
            let name = &self.vports.get(&number)?.name;
            self.names.ingress(name).filter(|port| self.names.name(port.slot).as_ref() == Some(name))
        })
    }

    /// Our port behind this number, or its name in the datapath.
    pub fn reference(&self, number: u32) -> PortRef {
        self.ours(number).map_or_else(|| PortRef::Foreign(self.name(number)), PortRef::Ours)
    }

    /// The name of the port with this number, or the number if there is none.
    pub fn name(&self, number: u32) -> String {
        self.vports.get(&number).map_or_else(|| number.to_string(), |vport| vport.name.clone())
    }

    /// The names that it looks in.
    pub fn names(&self) -> &'a dyn PortNames {
        self.names
    }
}
