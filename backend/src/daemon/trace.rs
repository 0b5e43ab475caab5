//! `trace`: what would happen to a packet, layer by layer.
//!
//! The worker that polls the port describes it, for only it knows what its exact-match table holds; if the packet would
//! go to the host, the host says what it would answer.

use super::explicit::{Names, misread};
use super::{Daemon, lock};
use crate::control::protocol::{Response, Trace, TraceStep};
use crate::control::server::{Answer, Reply};
use crate::flows::Flows;
use anyhow::{Context, Result, anyhow, bail};
use std::sync::mpsc::{Receiver, TryRecvError, channel};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};
use switch_core::action::Action;
use switch_core::compose::compose;
use switch_core::flow::{FlowRef, Match, PortNames};
use switch_core::key::{Field, Key, Mask, PACKET_WORDS};
use switch_core::odp;
use switch_core::packet::{MAX_SNAPSHOT, Packet};
use switch_core::pipeline::Upcall;
use switch_core::pipeline::trace::{L1Trace, Outcome, Trace as Described};
use switch_core::slab::Disposition;

/// How long the worker and the host may take.
const PATIENCE: Duration = Duration::from_secs(5);

impl Daemon {
    /// Has the port's worker describe the way of a packet, given as hex or as a flow.
    pub(super) fn trace(&self, port: &str, packet: &str) -> Result<Reply> {
        let id = self.port(port)?.datapath.id;
        let worker = self.port(port)?.datapath.polled_by.first().copied().unwrap_or(0);
        let names = self.names();
        let frame = match hex(packet) {
            Some(bytes) => bytes?,
            None => {
                let whole = if packet.contains("in_port(") {
                    packet.into()
                } else {
                    format!("in_port({port}),{packet}")
                };
                let (matches, _) =
                    odp::parse_flow(&whole, &names).map_err(|error| misread("packet", &whole, &error))?;
                compose(&matches.key)
            }
        };
        if frame.len() > MAX_SNAPSHOT {
            bail!("packet: {} bytes are more than the {MAX_SNAPSHOT} that can be traced", frame.len());
        }
        let packet = Packet::from_frame(id, &frame);
        let mut key = Key::default();
        let _ = switch_core::parse::extract(&mut packet.clone(), &mut key);
        let (send, described) = channel();
        lock(&self.datapath.flows).trace(worker, Box::new(packet), send);
        let explained = self.host.as_ref().context("the daemon is stopping")?.start_explain(key, id);
        let mut waiting =
            Waiting { described, explained, trace: None, flows: self.datapath.flows.clone(), names };
        let deadline = Instant::now() + PATIENCE;
        Ok(Reply::Later(Box::new(move |now| waiting.poll(now > deadline))))
    }
}

struct Waiting {
    described: Receiver<Described>,
    explained: Receiver<Option<Vec<Action>>>,
    trace: Option<Described>,
    flows: Arc<Mutex<Flows>>,
    names: Names,
}

impl Waiting {
    fn poll(&mut self, late: bool) -> Option<Answer> {
        let gone = || Some(Err("the daemon is stopping".to_owned()));
        if self.trace.is_none() {
            match self.described.try_recv() {
                Ok(trace) => self.trace = Some(trace),
                Err(TryRecvError::Disconnected) => return gone(),
                Err(TryRecvError::Empty) => {}
            }
        }
        if self.trace.is_some() {
            match self.explained.try_recv() {
                Ok(actions) => {
                    let trace = self.trace.take()?;
                    return Some(Ok(Response::Trace(self.render(&trace, actions.as_deref()))));
                }
                Err(TryRecvError::Disconnected) => return gone(),
                Err(TryRecvError::Empty) => {}
            }
        }
        late.then(|| Err("the worker or the host does not answer".to_owned()))
    }

    fn render(&self, trace: &Described, host: Option<&[Action]>) -> Trace {
        let mut steps = Vec::new();
        let mut step = |layer: &str, text: String| steps.push(TraceStep { layer: layer.into(), text });
        if let Some(first) = trace.stages.first() {
            step("parse", self.key(&first.key));
        }
        step("L1", self.l1(&trace.l1));
        for (i, stage) in trace.stages.iter().enumerate() {
            if i == 1
                && let Some(l1) = &trace.inside
            {
                step("decapsulation", self.key(&stage.key));
                step("L1", self.l1(l1));
            }
            let layer = match stage.key.recirc_id() {
                0 => "L2".to_owned(),
                id => format!("L2, recirculation {id:#x}"),
            };
            step(&layer, stage.flow.map_or_else(|| "no flow".into(), |flow| self.flow(flow)));
        }
        for output in &trace.outputs {
            let len = output.len.min(output.max_len);
            let hex: Vec<String> =
                output.head.iter().take(len as usize).map(|byte| format!("{byte:02x}")).collect();
            step("output", format!("{}, {len} bytes: {}", self.port(output.port.slot), hex.join("")));
        }
        let outcome = match trace.outcome {
            Outcome::Sent => {
                let ports: Vec<String> =
                    trace.outputs.iter().map(|output| self.port(output.port.slot)).collect();
                format!("sent to {}", ports.join(", "))
            }
            Outcome::Dropped(reason) => format!("dropped: {}", reason.name()),
            Outcome::Upcall(why) => {
                step(
                    "host",
                    match host {
                        Some(actions) => {
                            format!("the bridge would answer: {}", odp::format_actions(actions, &self.names))
                        }
                        None => "Open vSwitch decides (see ovs-appctl ofproto/trace)".into(),
                    },
                );
                match why {
                    Upcall::Miss => "to the host: no flow".into(),
                    Upcall::Punt(_) => "to the host: the flow cannot be carried out here".into(),
                    Upcall::KeepAlive(_) => "to the host: its flow is due to be seen there".into(),
                    Upcall::Unparsable => "to the host: the headers cannot be parsed".into(),
                }
            }
        };
        Trace { steps, outcome }
    }

    fn port(&self, slot: u32) -> String {
        self.names.name(slot).unwrap_or_else(|| format!("slot {slot}"))
    }

    /// A packet's key: every field that is not zero.
    fn key(&self, key: &Key) -> String {
        let mut matches = Match { key: *key, ..Match::default() };
        let is_shown = |field: &Field| field.place().0 < PACKET_WORDS || field.name().starts_with("tunnel.");
        for &field in Field::ALL.iter().filter(|&field| *field != Field::Shape && is_shown(field)) {
            let shown = matches!(field, Field::EthType | Field::VlanTci | Field::CvlanTci);
            if key.get(field) != 0 || shown {
                matches.mask.set_exact(field);
            }
        }
        matches.mask.0.set(Field::Shape, 0);
        matches.key = matches.key.masked(&Mask(matches.mask.0));
        odp::format_flow(&matches, &self.names)
    }

    fn l1(&self, l1: &L1Trace) -> String {
        match l1 {
            L1Trace::NotAsked => "not asked".into(),
            L1Trace::TooLong => {
                "not asked: the flows of this port look at more words than an entry holds".into()
            }
            L1Trace::Miss => "no entry".into(),
            L1Trace::Pending => "the host has been asked about this flow and has not answered".into(),
            L1Trace::Hit { flows, live: false, .. } => {
                format!("an entry of {} flows, of which one is gone", flows.len())
            }
            L1Trace::Hit { flows, whole, .. } => {
                let rest = if *whole { "" } else { "; later ones are looked up each time" };
                format!("hit: {} flow{}{rest}", flows.len(), if flows.len() == 1 { "" } else { "s" })
            }
        }
    }

    fn flow(&self, flow: FlowRef) -> String {
        let flows = lock(&self.flows);
        let Some(flow) = flows.get(flow) else { return "a flow that has just gone".into() };
        let matches = odp::format_flow(&flow.spec.matches, &self.names);
        let actions = odp::format_actions(&flow.spec.actions, &self.names);
        match &flow.disposition {
            Disposition::Fast(_) => format!("{matches}, actions:{actions}"),
            Disposition::Punt(reason) => format!("{matches}, actions:{actions}, punt: {reason}"),
        }
    }
}

/// Bytes in hex, with white space, colons or dots between them; `None` if it is no hex at all.
fn hex(text: &str) -> Option<Result<Vec<u8>>> {
    let digits: Vec<u32> = text
        .chars()
        .filter(|c| !c.is_whitespace() && !matches!(c, ':' | '.'))
        .map(|c| c.to_digit(16))
        .collect::<Option<_>>()?;
    if digits.is_empty() || digits.len() % 2 == 1 {
        return Some(Err(anyhow!("packet: {} hex digits are no whole number of bytes", digits.len())));
    }
    Some(Ok(digits.chunks(2).map(|pair| (pair[0] << 4 | pair[1]) as u8).collect()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn packets_are_told_from_flows() {
        assert_eq!(hex("02:00 0a.ff").unwrap().unwrap(), [2, 0, 10, 255]);
        assert!(hex("eth(src=02:00:00:00:00:01)").is_none());
        assert!(hex("123").unwrap().is_err());
        assert!(hex("").unwrap().is_err());
    }
}
