//! The logical ports of tunnels: ports without rings, which exist while the datapath of Open vSwitch has such a device. Packets
//! come there by decapsulation, and flows of what was inside have them as their ingress.

use super::ovs::Ovs;
use super::ports::{Port, Side};
use super::{Daemon, lock};
use crate::control::protocol::{PortStats, TunnelShow};
use crate::flows::{self, Flows};
use crate::underlay::{TunnelDevice, kind_name};
use log::{info, warn};
use std::collections::BTreeMap;
use switch_core::packet::PortId;

/// Masks that the flows of a tunnel's port may have: all tunnels of a kind share the port.
const MAX_MASKS: usize = flows::MAX_MASKS;

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
                warn!("tunnel {name}: there are {} ports already", crate::worker::MAX_PORTS);
                continue;
            };
            if let Err(error) = self.datapath.add_tunnel(id, MAX_MASKS) {
                warn!("tunnel {name}: {error}");
                self.datapath.release_slot(id);
                continue;
            }
            self.ways.add(id, device, userspace);
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

    /// Devices of the host's whose packets leave by a port of ours: those of wires that Open vSwitch does not have. What the kernel's
    /// datapath puts into tunnels goes through the host's own network, with its rules, and is left to it.
    pub(super) fn tell_exits(&self, userspace: bool) {
        let wire = |port: &Port| match (&port.side, port.config.device()) {
            (Side::Wire(_), Some(device)) if !port.config.is_own_device() => {
                Some((device.name.clone(), port.datapath.id))
            }
            _ => None,
        };
        let wires = self.ports.values().filter(|_| userspace).filter_map(wire);
        self.ways.set_exits(wires.collect());
    }

    /// What `show` says of tunnels; `count` gives the number of flows by ingress.
    pub(super) fn show_tunnels(&self, flows: &Flows, count: impl Fn(PortId) -> u64) -> Vec<TunnelShow> {
        let show = |(name, Tunnel { device, id, .. }): (&String, &Tunnel)| TunnelShow {
            name: name.clone(),
            slot: id.slot,
            kind: kind_name(device.kind).into(),
            udp_port: device.udp_port,
            flows: count(*id),
            masks: flows.masks(*id) as u32,
        };
        self.tunnels.iter().map(show).collect()
    }
}
