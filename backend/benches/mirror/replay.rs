//! A dump of the kernel's datapath without a kernel.

use backend::ovs::netlink::{Malformed, Reader, Vport, Vports};
use backend::ovs::source::{FlowSource, Sighting, SourceError};
use std::collections::HashSet;
use std::hash::RandomState;
use std::time::Duration;
use switch_core::flow::{PortNames, Ufid};

/// As that of the kernel's datapath.
pub const SWEEP: Duration = Duration::from_millis(1500);

/// A datapath of two ports and UDP flows from the first to the second, in the messages that the kernel answers with. What the
/// kernel itself takes to make them is left out.
pub struct Replay {
    vports: Vports,
    /// The answers to a full and to a terse dump.
    full: Messages,
    ids: Messages,
    left_out: HashSet<Ufid>,
    seed: RandomState,
    /// [`FlowSource::sweep_interval`].
    pub interval: Duration,
}

/// Messages behind their generic netlink headers: all in one, and where each ends.
#[derive(Default)]
struct Messages {
    bytes: Vec<u8>,
    ends: Vec<usize>,
}

impl Messages {
    /// A message of these attributes, of datapath 0.
    fn push(&mut self, attrs: &[(u16, &[u8])]) {
        self.bytes.extend([0; 4]);
        attrs.iter().for_each(|&(kind, data)| put_attr(&mut self.bytes, kind, data));
        self.ends.push(self.bytes.len());
    }

    fn each(&self, mut each: impl FnMut(&[u8]) -> Result<(), Malformed>) -> Result<(), SourceError> {
        let mut start = 0;
        for &end in &self.ends {
            each(&self.bytes[start..end]).map_err(|error| SourceError(error.to_string()))?;
            start = end;
        }
        Ok(())
    }
}

impl Replay {
    /// That many flows, each of one source address, between ports of these names.
    pub fn new(names: [&str; 2], flows: u32) -> Replay {
        let vport = |number, name: &str| Vport { number, name: name.to_owned(), ifindex: 0, netns: None };
        let vports = (1..).zip(names).map(|(number, name)| (number, vport(number, name))).collect();
        let (mut full, mut ids) = (Messages::default(), Messages::default());
        let mut actions = Vec::new();
        put_attr(&mut actions, 1, &2u32.to_ne_bytes());
        for flow in 0..flows {
            let ufid: Vec<u8> = (0..4u32).flat_map(|word| (flow ^ word << 28).to_ne_bytes()).collect();
            // `OVS_FLOW_ATTR_UFID`, `_KEY`, `_MASK` and `_ACTIONS`.
            ids.push(&[(9, &ufid)]);
            full.push(&[(9, &ufid), (1, &key(1, flow)), (7, &key(u32::MAX, u32::MAX)), (2, &actions)]);
        }
        Replay { vports, full, ids, left_out: HashSet::new(), seed: RandomState::new(), interval: SWEEP }
    }
}

/// Appends an attribute.
fn put_attr(bytes: &mut Vec<u8>, kind: u16, data: &[u8]) {
    bytes.extend((4 + data.len() as u16).to_ne_bytes());
    bytes.extend(kind.to_ne_bytes());
    bytes.extend(data);
    bytes.resize(bytes.len().next_multiple_of(4), 0);
}

/// Key of a flow, or mask if all bits are set: metadata, Ethernet, IPv4 and UDP, as `ovs_nla_put_key` writes them.
fn key(port: u32, source: u32) -> Vec<u8> {
    let ones = source == u32::MAX;
    let fill = |value: u8| if ones { 0xff } else { value };
    let mut bytes = Vec::new();
    for (kind, value) in [(20, 0u32), (19, 0), (2, 0), (3, port), (15, 0)] {
        let value = if ones && kind == 20 { u32::MAX } else { value };
        put_attr(&mut bytes, kind, &value.to_ne_bytes());
    }
    put_attr(&mut bytes, 4, &[fill(2); 12]);
    put_attr(&mut bytes, 6, &[fill(8), fill(0)]);
    let mut ip = [fill(10); 12];
    ip[..4].copy_from_slice(&source.to_be_bytes());
    ip[8..].copy_from_slice(&[fill(17), 0, 0, fill(0)]);
    put_attr(&mut bytes, 7, &ip);
    put_attr(&mut bytes, 10, &[fill(0), fill(53), fill(0), fill(53)]);
    bytes
}

impl FlowSource for Replay {
    fn describe(&self) -> String {
        "a recorded datapath".into()
    }

    fn dump(&mut self, names: &dyn PortNames, each: &mut dyn FnMut(Sighting<'_>)) -> Result<(), SourceError> {
        let mut reader = Reader::new(&self.vports, names, &self.seed, &mut self.left_out);
        self.full.each(|body| reader.take(body, each))
    }

    fn dump_ids(&mut self, each: &mut dyn FnMut(Ufid)) -> Result<bool, SourceError> {
        self.ids.each(|body| {
            each(Reader::id(body)?);
            Ok(())
        })?;
        Ok(true)
    }

    fn sweep_interval(&self) -> Duration {
        self.interval
    }
}
