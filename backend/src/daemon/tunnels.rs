//! The logical ports of tunnels: ports without rings, which exist while the datapath of Open vSwitch has such a device. Packets
//! come there by decapsulation, and flows of what was inside have them as their ingress.

use super::ovs::Ovs;
use super::ports::{Port, Side};
use super::{Daemon, lock};
use crate::control::protocol::{HostPathShow, PortStats, TunnelShow};
use crate::flows::{self, Flows};
use crate::ovs::mirror::Restriction;
use crate::underlay::{Exits, HostFlows, HostPort, TunnelDevice, Wire, kind_name};
use log::info;
use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use switch_core::packet::PortId;

/// Masks that the flows of a tunnel's port may have: all tunnels of a kind share the port.
const MAX_MASKS: usize = flows::MAX_MASKS;

/// In [`HostPathShow::what`].
const ENCAPSULATE: &str = "encapsulate";
const DECAPSULATE: &str = "decapsulate";
/// Places that a reason names.
const PLACES: usize = 4;

/// The logical port of a device of tunnels.
pub struct Tunnel {
    /// What it is.
    pub device: TunnelDevice,
    /// Whether it is of the userspace datapath, which takes packets out in another way than the kernel.
    userspace: bool,
    /// Identity of its table.
    pub id: PortId,
}

impl Daemon {
    /// Has a logical port for each of these devices of the userspace datapath, or the kernel's, and no others.
    pub(super) fn follow_tunnels(&mut self, devices: BTreeMap<String, TunnelDevice>, userspace: bool) {
        let is_gone = |(name, tunnel): &(&String, &Tunnel)| {
            devices.get(*name) != Some(&tunnel.device) || tunnel.userspace != userspace
        };
        let gone: Vec<String> = self.tunnels.iter().filter(is_gone).map(|(name, _)| name.clone()).collect();
        let gone: Vec<(String, Tunnel)> =
            gone.into_iter().filter_map(|name| self.tunnels.remove_entry(&name)).collect();
        if !gone.is_empty() {
            // No flow leads there any more when the ways and the table go.
            self.tell_mirror();
            gone.iter().for_each(|(_, tunnel)| self.ways.remove(tunnel.id));
        }
        for (name, Tunnel { device, id, .. }) in gone {
            let paths = lock(&self.datapath.flows).path_counters(id);
            self.leave_datapath(id);
            self.gone.add(&PortStats::default(), &flows::sum_paths(&paths));
            info!("tunnel {name}: {device}, gone");
            self.reapply_flows(&name);
        }
        for (name, device) in devices {
            if self.tunnels.contains_key(&name) || self.ports.contains_key(&name) {
                continue;
            }
            let Some(id) = self.datapath.reserve_slot() else {
                self.problem(
                    &name,
                    format!("tunnel {name}: there are {} ports already", crate::worker::MAX_PORTS),
                );
                continue;
            };
            if let Err(error) = self.datapath.add_tunnel(id, MAX_MASKS) {
                self.problem(&name, format!("tunnel {name}: {error}"));
                self.datapath.release_slot(id);
                continue;
            }
            self.solved(&name);
            self.ways.add(id, &name, device, userspace);
            info!("tunnel {name}: {device}");
            self.tunnels.insert(name.clone(), Tunnel { device, userspace, id });
            self.reapply_flows(&name);
        }
    }

    /// The ways of tunnels have changed: flows that go by them are compiled anew.
    pub(super) fn reconsider_tunnels(&mut self) {
        if let Some(mirror) = self.ovs.as_ref().and_then(Ovs::mirror) {
            mirror.reconsider();
        }
        let names: Vec<String> = self.tunnels.keys().cloned().collect();
        names.iter().for_each(|name| self.reapply_flows(name));
    }

    /// Has a slot for each of these ports of the kernel's bridges that are devices of the host's, and for no others.
    pub(super) fn follow_host_ports(&mut self, names: BTreeSet<String>) {
        let gone: Vec<String> =
            self.host_ports.keys().filter(|name| !names.contains(*name)).cloned().collect();
        let gone: Vec<(PortId, Arc<HostFlows>)> =
            gone.iter().filter_map(|name| self.host_ports.remove(name)).collect();
        if !gone.is_empty() {
            // The mirror has no flow of theirs any more when the slots can be another's.
            self.tell_mirror();
            gone.iter().for_each(|(id, _)| self.datapath.release_slot(*id));
        }
        for name in names {
            if self.host_ports.contains_key(&name) || self.ports.contains_key(&name) {
                continue;
            }
            match (self.ways.host_flows(), self.datapath.reserve_slot()) {
                (Ok(flows), Some(id)) => {
                    self.solved(&name);
                    self.host_ports.insert(name, (id, flows));
                }
                (Err(error), Some(id)) => {
                    self.problem(&name, format!("port {name} of the host's: {error}"));
                    self.datapath.release_slot(id);
                }
                (_, None) => {
                    let ports = crate::worker::MAX_PORTS;
                    self.problem(
                        &name,
                        format!("port {name} of the host's: there are {ports} ports already"),
                    );
                }
            }
        }
    }

    /// Where the host's network and ours meet. What the userspace datapath puts into tunnels leaves by wires that Open vSwitch does not
    /// have; what the kernel's does goes through the host's own network, and leaves by devices that a bridge has: by itself, or by the
    /// flows of a bridge's port that is the host's device.
    ///
    /// Whether flows of tunnels are to be compiled anew, as what they lead by is there no more.
    #[must_use]
    pub(super) fn tell_exits(&self, userspace: bool) -> bool {
        let Some(ovs) = &self.ovs else { return false };
        let wire = |(name, port): (&String, &Port)| {
            let device = port.config.device()?;
            let Side::Wire(wire) = &port.side else { return None };
            // Userspace OVS sends by devices of its own.
            if port.config.is_own_device() == userspace {
                return None;
            }
            let down = || (!wire.shared().link_up()).then(|| "the link is down".into());
            let shut = if userspace { None } else { ovs.restriction_of(name).egress.or_else(down) };
            Some((device.name.clone(), Wire { id: port.datapath.id, shut }))
        };
        let host = |(name, (id, flows)): (&String, &(PortId, Arc<HostFlows>))| {
            let restriction = ovs.restriction_of(name);
            (name.clone(), HostPort { id: *id, flows: flows.clone(), restriction })
        };
        self.ways.set_exits(Exits {
            wires: self.ports.iter().filter_map(wire).collect(),
            hosts: self.host_ports.iter().map(host).collect(),
            stack: if userspace { Restriction::default() } else { ovs.stack() },
        })
    }

    /// What `show` says of tunnels; `count` gives the number of flows by ingress.
    pub(super) fn show_tunnels(&self, flows: &Flows, count: impl Fn(PortId) -> u64) -> Vec<TunnelShow> {
        let show = |(name, tunnel): (&String, &Tunnel)| TunnelShow {
            name: name.clone(),
            slot: tunnel.id.slot,
            kind: kind_name(tunnel.device.kind).into(),
            udp_port: tunnel.device.udp_port,
            flows: count(tunnel.id),
            masks: flows.masks(tunnel.id) as u32,
            host_path: self.host_path(name, tunnel),
        };
        self.tunnels.iter().map(show).collect()
    }

    /// Why packets of a tunnel take the host path, whatever their flows do.
    fn host_path(&self, name: &str, tunnel: &Tunnel) -> Vec<HostPathShow> {
        let Some(ovs) = &self.ovs else { return Vec::new() };
        // By what is done to them and the reason: where it is so, everywhere if nowhere.
        let mut reasons: BTreeMap<(&str, String), BTreeSet<String>> = BTreeMap::new();
        for (why, remotes) in self.ways.held(tunnel.id) {
            let remotes = remotes.into_iter().map(|remote| remote.to_string());
            reasons.entry((ENCAPSULATE, why)).or_default().extend(remotes);
        }
        if !tunnel.userspace {
            let Restriction { ingress, egress } = ovs.stack();
            let at_tunnel = ovs.restriction_of(name);
            let at = |why: String| format!("{name}: {why}");
            for why in egress.into_iter().chain(at_tunnel.egress.map(at)) {
                reasons.entry((ENCAPSULATE, why)).or_default().clear();
            }
            for why in ingress.into_iter().chain(at_tunnel.ingress.map(at)) {
                reasons.insert((DECAPSULATE, why), BTreeSet::new());
            }
            let wires = self.ports.iter().filter(|(_, port)| port.config.is_own_device());
            for device in self.host_ports.keys().chain(wires.map(|(name, _)| name)) {
                if let Some(why) = ovs.restriction_of(device).ingress {
                    reasons.entry((DECAPSULATE, why)).or_default().insert(device.clone());
                }
            }
        }
        let shown = reasons.into_iter().map(|((what, why), places)| HostPathShow {
            what: what.into(),
            places: places.len() as u64,
            first: places.into_iter().take(PLACES).collect(),
            why,
        });
        shown.collect()
    }
}
