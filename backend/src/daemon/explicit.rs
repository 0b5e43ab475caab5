//! Explicit flows: kept as text, so that they outlive the ports they name; in the tables while their ingress is there.

use super::{Daemon, lock};
use crate::host::FlowTable;
use anyhow::{Context, Result, anyhow, bail};
use log::warn;
use std::collections::HashMap;
use switch_core::flow::{FlowRef, FlowSpec, PortNames, Source};
use switch_core::key::Field;
use switch_core::odp::{self, OdpError};
use switch_core::packet::PortId;
use switch_core::planner::PlanError;

/// A flow of `add-flow`. Its canonical match is its key in the daemon's map.
pub struct Explicit {
    /// The actions' canonical text.
    pub actions: String,
    /// The flow in the tables, or why it is not there.
    pub installed: Result<FlowRef, String>,
}

/// The names of the ports that are there.
pub struct Names {
    by_name: HashMap<String, PortId>,
    by_slot: HashMap<u32, String>,
}

impl PortNames for Names {
    fn by_name(&self, name: &str) -> Option<PortId> {
        let slot = || self.by_slot.get(&name.parse().ok()?);
        self.by_name.get(name).or_else(|| self.by_name.get(slot()?)).copied()
    }

    fn name(&self, slot: u32) -> Option<String> {
        self.by_slot.get(&slot).cloned()
    }
}

impl Daemon {
    /// The names of the ports that are there, tunnels' included.
    pub(super) fn names(&self) -> Names {
        let tunnels = || self.tunnels.iter().map(|(name, tunnel)| (name, tunnel.id));
        let ports = || self.ports.iter().map(|(name, port)| (name, port.datapath.id)).chain(tunnels());
        Names {
            by_name: ports().map(|(name, id)| (name.clone(), id)).collect(),
            by_slot: ports().map(|(name, id)| (id.slot, name.clone())).collect(),
        }
    }

    /// Reads a flow; gives it with its canonical match and actions.
    fn read_flow(&self, flow: &str, actions: &str) -> Result<(FlowSpec, String, String)> {
        let names = self.names();
        let (mut matches, ufid) =
            odp::parse_flow(flow, &names).map_err(|error| misread("flow", flow, &error))?;
        // A flow is about packets as they come in unless it says otherwise.
        if !matches.mask.has(Field::RecircId) {
            matches.mask.set_exact(Field::RecircId);
        }
        odp::require_in_port(&matches, flow).map_err(|error| misread("flow", flow, &error))?;
        let actions =
            odp::parse_actions(actions, &names).map_err(|error| misread("actions", actions, &error))?;
        let text = odp::format_flow(&matches, &names);
        let actions_text = odp::format_actions(&actions, &names);
        Ok((FlowSpec { matches, actions, ufid, held: None }, text, actions_text))
    }

    /// Puts a flow into the tables.
    fn install(&self, spec: FlowSpec) -> Result<FlowRef> {
        let mut flows = lock(&self.datapath.flows);
        match flows.put(Source::Explicit, spec) {
            Ok(flow) => Ok(flow),
            Err(PlanError::Overlaps(other)) => {
                let other = flows.get(other).map(|flow| odp::format_flow(&flow.spec.matches, &self.names()));
                bail!(
                    "the flow overlaps this one, and none may win over another: {}",
                    other.unwrap_or_default()
                )
            }
            Err(error) => Err(error.into()),
        }
    }

    /// `add-flow`: gives the flow's name and its canonical match.
    pub(super) fn add_flow(&mut self, flow: &str, actions: &str) -> Result<(FlowRef, String)> {
        let (spec, text, actions) = self.read_flow(flow, actions)?;
        if let Some(known) = self.explicit.get(&text) {
            bail!(
                "the flow overlaps itself: it is there already, with actions {}; delete it first: {text}",
                known.actions
            );
        }
        let installed = self.install(spec)?;
        if let Err(error) = self.state.record_add_flow(&text, &actions) {
            lock(&self.datapath.flows).delete(installed);
            return Err(error.into());
        }
        self.explicit.insert(text.clone(), Explicit { actions, installed: Ok(installed) });
        Ok((installed, text))
    }

    /// A flow of the state file.
    pub(super) fn restore_flow(&mut self, flow: String, actions: String) {
        let installed = self.try_flow(&flow, &actions);
        if let Err(reason) = &installed {
            warn!("explicit flow {flow} waits: {reason}");
        }
        self.explicit.insert(flow, Explicit { actions, installed });
    }

    fn try_flow(&self, flow: &str, actions: &str) -> Result<FlowRef, String> {
        let result = self.read_flow(flow, actions).and_then(|(spec, ..)| self.install(spec));
        // The errors of the text syntax show the place on lines of their own; here one line is wanted.
        result.map_err(|error| format!("{error:#}").lines().next().unwrap_or_default().to_owned())
    }

    /// A port has come or gone: flows that name it are read again.
    pub(super) fn reapply_flows(&mut self, port: &str) {
        let concerned: Vec<String> = self
            .explicit
            .iter()
            .filter(|(flow, explicit)| names_port(flow, port) || names_port(&explicit.actions, port))
            .map(|(flow, _)| flow.clone())
            .collect();
        for flow in concerned {
            let Some(actions) = self.explicit.get(&flow).map(|explicit| explicit.actions.clone()) else {
                continue;
            };
            let installed = self.try_flow(&flow, &actions);
            if let Some(explicit) = self.explicit.get_mut(&flow) {
                if let (Ok(old), Err(_)) = (&explicit.installed, &installed) {
                    lock(&self.datapath.flows).delete(*old);
                }
                explicit.installed = installed;
            }
        }
    }

    /// `del-flow` of one match.
    pub(super) fn del_flow(&mut self, flow: &str) -> Result<()> {
        // The canonical text of a flow whose port is gone cannot be made anew: it may be given as it is shown.
        let text = match self.explicit.contains_key(flow) {
            true => flow.to_owned(),
            false => self.read_flow(flow, "drop")?.1,
        };
        self.forget_flows(vec![text])
    }

    /// `del-flow` by name, as `dump-flows` shows it.
    pub(super) fn del_flow_by_id(&mut self, id: &str) -> Result<()> {
        let found =
            self.explicit.iter().find(|(_, e)| e.installed.as_ref().is_ok_and(|flow| flow_id(*flow) == id));
        let text = found.map(|(text, _)| text.clone());
        self.forget_flows(vec![text.with_context(|| format!("there is no explicit flow {id}"))?])
    }

    /// `del-flow --all`: gives their number.
    pub(super) fn del_all_flows(&mut self) -> Result<usize> {
        let all: Vec<String> = self.explicit.keys().cloned().collect();
        let count = all.len();
        self.forget_flows(all)?;
        Ok(count)
    }

    fn forget_flows(&mut self, texts: Vec<String>) -> Result<()> {
        if let Some(unknown) = texts.iter().find(|text| !self.explicit.contains_key(*text)) {
            bail!("there is no explicit flow {unknown}");
        }
        self.state.record_del_flows(texts.iter().map(String::as_str))?;
        let mut flows = lock(&self.datapath.flows);
        for text in &texts {
            if let Some(Explicit { installed: Ok(flow), .. }) = self.explicit.remove(text) {
                flows.delete(flow);
            }
        }
        Ok(())
    }
}

/// An error of the text syntax in one line: what is wrong, and the text with a mark at the place.
pub fn misread(what: &str, text: &str, error: &OdpError) -> anyhow::Error {
    let (before, after) = match text.char_indices().nth(error.at) {
        Some((at, _)) => text.split_at(at),
        None => (text, ""),
    };
    anyhow!("{what}: {} at character {}: {before} --> {after}", error.message, error.at + 1)
}

/// How a flow is called in `dump-flows` and by `del-flow`.
pub fn flow_id(flow: FlowRef) -> String {
    format!("{}.{}", flow.index, flow.generation)
}

/// Whether a flow's text has the port's name as a word.
fn names_port(text: &str, port: &str) -> bool {
    text.split(['(', ')', ',']).any(|word| word == port)
}
