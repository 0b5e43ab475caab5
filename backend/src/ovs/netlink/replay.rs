//! A dump of the kernel's datapath without a kernel, to measure what it costs to follow one.

use super::flow::{FlowMessage, Reader, flow_attr};
use super::ports::{Vport, Vports};
use super::wire::{F_DUMP, Malformed, Message, Request, put_attr};
use super::{NEW, OVS_HEADER, SWEEP};
use crate::ovs::source::{Change, FlowSource, Sighting, SourceError};
use crate::wake::Waker;
use std::collections::HashSet;
use std::hash::RandomState;
use std::time::Duration;
use switch_core::flow::{PortNames, Ufid};

/// A datapath of two ports and UDP flows from the first to the second, in the messages that the kernel answers with. What the
/// kernel itself takes to make them is left out.
pub struct Replay {
    vports: Vports,
    /// The answers to a full and to a terse dump.
    full: Vec<u8>,
    ids: Vec<u8>,
    left_out: HashSet<Ufid>,
    seed: RandomState,
    /// [`FlowSource::sweep_interval`].
    pub interval: Duration,
}

impl Replay {
    /// That many flows, each of one source address, between ports of these names.
    pub fn new(names: [&str; 2], flows: u32) -> Replay {
        let vport = |number, name: &str| Vport { number, name: name.to_owned(), ifindex: 0, netns: None };
        let vports = (1..).zip(names).map(|(number, name)| (number, vport(number, name))).collect();
        let (mut full, mut ids) = (Vec::new(), Vec::new());
        for flow in 0..flows {
            let ufid: Vec<u8> = (0..4u32).flat_map(|word| (flow ^ word << 28).to_ne_bytes()).collect();
            let message =
                || Request::new(30, NEW, 1, F_DUMP).raw(&[0; OVS_HEADER]).attr(flow_attr::UFID, &ufid);
            ids.extend(message().finish(1));
            let mut actions = Vec::new();
            put_attr(&mut actions, 1, &2u32.to_ne_bytes());
            let message =
                message().attr(flow_attr::KEY, &key(1, flow)).attr(flow_attr::MASK, &key(u32::MAX, u32::MAX));
            full.extend(message.attr(flow_attr::ACTIONS, &actions).finish(1));
        }
        Replay { vports, full, ids, left_out: HashSet::new(), seed: RandomState::new(), interval: SWEEP }
    }
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

/// Gives the body of each message to `each`.
fn messages(
    mut bytes: &[u8],
    mut each: impl FnMut(&[u8]) -> Result<(), Malformed>,
) -> Result<(), SourceError> {
    let mut all = || -> Result<(), Malformed> {
        while let Some(message) = Message::take(&mut bytes) {
            each(message?.generic()?.1)?;
        }
        Ok(())
    };
    all().map_err(|error| SourceError(error.to_string()))
}

impl FlowSource for Replay {
    fn describe(&self) -> String {
        "a recorded datapath".into()
    }

    fn dump(&mut self, names: &dyn PortNames, each: &mut dyn FnMut(Sighting<'_>)) -> Result<(), SourceError> {
        let mut reader = Reader::new(&self.vports, names, &self.seed, &mut self.left_out);
        messages(&self.full, |body| reader.take(body, each))
    }

    fn dump_ids(&mut self, each: &mut dyn FnMut(Ufid)) -> Result<bool, SourceError> {
        messages(&self.ids, |body| {
            each(FlowMessage::decode(body.get(OVS_HEADER..).ok_or(Malformed)?)?.id()?);
            Ok(())
        })?;
        Ok(true)
    }

    fn sweep_interval(&self) -> Duration {
        self.interval
    }

    fn wait(
        &mut self,
        _: &dyn PortNames,
        waker: &Waker,
        timeout: Duration,
        _: &mut Vec<Change>,
    ) -> Result<(), SourceError> {
        waker.sleep(timeout.as_micros().div_ceil(1000) as u64, || false);
        Ok(())
    }
}
