//! What the database and the kernel have told is done: ports, datapath and mirror follow, and `add-port` and `del-port` lead.

use super::{HW_OFFLOAD, PATIENCE, restriction};
use crate::clock;
use crate::daemon::ports::{Closing, Port, Side};
use crate::daemon::tunnels::Tunnel;
use crate::daemon::{Daemon, lock};
use crate::host::representors;
use crate::ovs::kernel::Kernel;
use crate::ovs::mirror::{Mirror, MirrorPort, PortKind, Restriction, Settings};
use crate::ovs::ovsdb::{Event, Snapshot};
use crate::ovs::ports::{self, OvsPort};
use crate::ovs::source::FlowSource;
use crate::ovs::tunnels;
use crate::ovs::unixctl::UnixctlSource;
use crate::port_config::PortConfig;
use crate::underlay::HostFlows;
use anyhow::{Result, bail};
use log::{debug, info, warn};
use std::collections::BTreeSet;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};
use switch_core::flow::Source;
use switch_core::packet::PortId;

/// How long a snapshot may still name a port that was deleted here.
const STALE: Duration = Duration::from_secs(2);

impl Daemon {
    /// Takes what the database has told.
    pub(in crate::daemon) fn follow_ovs(&mut self) {
        let Some(ovs) = &mut self.ovs else { return };
        let mut news = std::mem::take(&mut ovs.again);
        news |= ovs.pins.expire(clock::millis());
        let mut is_absent = false;
        for event in ovs.events.try_iter() {
            match event {
                Event::Snapshot(snapshot) => {
                    if ovs.lost.take().is_some() {
                        info!("Open vSwitch's database is back");
                    }
                    ovs.snapshot = Some(snapshot);
                    news = true;
                }
                Event::Lost(why) => {
                    warn!("Open vSwitch's database: {why}; ports stay as they are");
                    ovs.lost = Some(why);
                    is_absent = ovs.snapshot.is_none();
                }
            }
        }
        if news {
            self.apply_snapshot();
        } else if is_absent {
            self.open_known_ports();
        }
        self.follow_devices();
        if self.ovs.as_ref().is_some_and(|ovs| ovs.ways.swap(false, Ordering::Relaxed)) {
            self.reconsider_tunnels();
        }
    }

    /// Without the database, ports are as it had them last: guests can connect, and what OVS still has goes on. When it
    /// is read, it counts.
    fn open_known_ports(&mut self) {
        let run = self.state.ports();
        for config in self.state.ports_in_database().to_vec() {
            // The configuration may have got it since, and says how it is to be.
            if run.iter().any(|port| port.name == config.name) {
                continue;
            }
            self.pulse.beat();
            match self.adopt(&config) {
                Ok(()) => {
                    if let Some(ovs) = &mut self.ovs {
                        ovs.seen.insert(config.name);
                    }
                }
                Err(reason) => self.problem(&config.name, reason),
            }
        }
    }

    /// Takes what the kernel has told about representors: their MTU is in force, and what it does there is not passed by.
    fn follow_devices(&mut self) {
        let Some(ovs) = &mut self.ovs else { return };
        let devices = ovs.host_state.state();
        let wires = ovs.wires.swap(false, Ordering::Relaxed);
        let stack = ovs.host_state.stack();
        if Arc::ptr_eq(&devices, &ovs.devices) && stack == ovs.stack_seen && !wires {
            return;
        }
        (ovs.devices, ovs.stack_seen) = (devices.clone(), stack);
        let mut flows = lock(&self.datapath.flows);
        for (name, port) in &mut self.ports {
            // A wire's MTU is that of its device, and so is that of a port of a NIC.
            if let Some(device) = devices.get(name).filter(|_| port.config.socket().is_some())
                && device.mtu != port.mtu
            {
                info!("port {name}: MTU {}", device.mtu);
                port.mtu = device.mtu;
                flows.set_mtu(port.datapath.id, device.mtu);
            }
        }
        drop(flows);
        self.tell_mirror();
    }

    /// Brings ports and mirror in step with the database.
    fn apply_snapshot(&mut self) {
        let Some(snapshot) = self.ovs.as_ref().and_then(|ovs| ovs.snapshot.clone()) else { return };
        self.choose_datapath(&snapshot);
        self.follow_bridge(&snapshot);
        self.offer_ports(&snapshot);
        // What is no port with rings, and may have problems too.
        let mut others = self.host_ports_of(&snapshot);
        others.extend(
            [false, true].into_iter().flat_map(|which| tunnels::devices(&snapshot, which).into_keys()),
        );
        let Some(ovs) = &mut self.ovs else { return };
        ovs.ours = ports::ours(&snapshot);
        ovs.pins.correct(&mut ovs.ours);
        ovs.leaving.retain(|name, since| since.elapsed() < STALE && ovs.ours.contains_key(name));
        let ours = ovs.ours.clone();
        let own: BTreeSet<String> = self.state.ports().into_iter().map(|port| port.name).collect();
        ovs.problems.retain(|name, _| {
            *name == ovs.bridge || own.contains(name) || ours.contains_key(name) || others.contains(name)
        });
        ovs.seen.extend(ours.keys().cloned());

        let gone: Vec<String> = (self.ports.keys())
            .filter(|name| !ours.contains_key(*name) && ovs.seen.contains(*name))
            .cloned()
            .collect();
        for name in gone {
            if let Some(ovs) = &mut self.ovs {
                ovs.seen.remove(&name);
                ovs.offered.insert(name.clone());
            }
            info!("port {name}: deleted in Open vSwitch");
            self.take_port(&name, Closing::Deleted);
        }
        for (name, port) in &ours {
            self.pulse.beat();
            let is_leaving = self.ovs.as_ref().is_some_and(|ovs| ovs.leaving.contains_key(name));
            match &port.config {
                _ if is_leaving => {}
                Err(reason) => self.problem(name, reason.clone()),
                Ok(config) => {
                    let userspace = port.datapath_type == "netdev";
                    let result = match config.check_under_ovs(userspace) {
                        Ok(()) => self.adopt(config),
                        Err(invalid) => {
                            self.take_port(name, Closing::Deleted);
                            Err(invalid.reason)
                        }
                    };
                    match result {
                        Err(reason) => self.problem(name, reason),
                        Ok(()) if self.is_userspace().is_some_and(|ours| ours != userspace) => {
                            let OvsPort { bridge, datapath_type, .. } = port;
                            let reason = format!(
                                "port '{name}': its bridge '{bridge}' has the datapath '{datapath_type}', another than \
                                 that of the configured bridge: all its packets take the host path"
                            );
                            self.problem(name, reason);
                        }
                        Ok(()) => self.solved(name),
                    }
                }
            }
        }
        // What a wire may be is not known without the database.
        let guests =
            ours.into_values().filter_map(|port| port.config.ok()).filter(|port| port.device().is_none());
        if let Err(error) = self.state.record_ports_in_database(guests) {
            debug!("ports are not known to the next start: {error}");
        }
        if let Some(userspace) = self.is_userspace() {
            self.follow_tunnels(tunnels::devices(&snapshot, userspace), userspace);
            let hosts = if userspace || self.tunnels.is_empty() {
                BTreeSet::new()
            } else {
                self.host_ports_of(&snapshot)
            };
            self.follow_host_ports(hosts);
        }
        self.tell_mirror();
    }

    /// The ports that are devices of the host's of those bridges of the kernel's that have a wire of ours.
    fn host_ports_of(&self, snapshot: &Snapshot) -> BTreeSet<String> {
        let is_wire = |name: &String| self.ports.get(name).is_some_and(|port| port.config.is_own_device());
        let bridges = snapshot
            .bridges
            .values()
            .filter(|bridge| bridge.datapath_type != "netdev" && bridge.ports.keys().any(is_wire));
        let interfaces =
            bridges.flat_map(|bridge| bridge.ports.values()).flat_map(|port| port.interfaces.values());
        interfaces.filter(|interface| interface.kind == "internal").map(|own| own.name.clone()).collect()
    }

    /// Whether our bridge is of the userspace datapath, as far as that is known.
    fn is_userspace(&self) -> Option<bool> {
        let (userspace, _) = self.ovs.as_ref()?.mirror.as_ref()?;
        Some(*userspace)
    }

    /// Opens a port as the database has it, or gives one that is open its settings; or says why not.
    fn adopt(&mut self, config: &PortConfig) -> Result<(), String> {
        match self.ports.get_mut(&config.name) {
            Some(port) if ports::same_device(&port.config, config) => {
                let is_spread_anew = port.config.workers != config.workers;
                port.config = config.clone();
                if is_spread_anew {
                    self.spread_anew();
                }
                Ok(())
            }
            Some(_) => {
                info!("port {}: opened anew, its settings have changed", config.name);
                self.take_port(&config.name, Closing::Reopened);
                if let Some(ovs) = &mut self.ovs {
                    ovs.again = true;
                }
                Ok(())
            }
            None => {
                let others: Vec<PortConfig> = self.ports.values().map(|port| port.config.clone()).collect();
                match config.check_unique(&others) {
                    Ok(()) => self.check_control(config).map_err(|error| error.to_string()).and_then(|()| {
                        self.open_port(config).map_err(|error| format!("port '{}': {error:#}", config.name))
                    }),
                    Err(invalid) => Err(invalid.reason),
                }
            }
        }
    }

    pub(in crate::daemon) fn problem(&mut self, name: &str, reason: String) {
        let Some(ovs) = &mut self.ovs else { return };
        if ovs.problems.get(name) != Some(&reason) {
            warn!("{reason}");
            ovs.problems.insert(name.to_owned(), reason);
        }
    }

    pub(in crate::daemon) fn solved(&mut self, name: &str) {
        if let Some(ovs) = &mut self.ovs {
            ovs.problems.remove(name);
        }
    }

    /// Finds out which datapath the bridge has, and mirrors it.
    fn choose_datapath(&mut self, snapshot: &Snapshot) {
        let Some(ovs) = &mut self.ovs else { return };
        let Some(bridge) = snapshot.bridges.get(&ovs.bridge) else {
            let name = ovs.bridge.clone();
            let reason =
                format!("Open vSwitch has no bridge '{name}': make it with 'ovs-vsctl add-br {name}'");
            return self.problem(&name, reason);
        };
        if !["", "system", "netdev"].contains(&bridge.datapath_type.as_str()) {
            let (name, kind) = (ovs.bridge.clone(), &bridge.datapath_type);
            let reason = format!(
                "bridge '{name}' has datapath_type={kind}, which is neither 'system' nor 'netdev': correct it with \
                 'ovs-vsctl set bridge {name} datapath_type=…'"
            );
            return self.problem(&name, reason);
        }
        ovs.problems.remove(&ovs.bridge);
        let userspace = bridge.datapath_type == "netdev";
        let kind =
            representors::Settings { userspace, offloads: !userspace || snapshot.userspace_tso_enable() };
        let max_idle = snapshot.max_idle().as_millis() as u64;
        if ovs.datapath != Some(kind)
            && let Some(host) = &self.host
        {
            host.set_datapath(kind);
        }
        ovs.datapath = Some(kind);
        if ovs.mirror.as_ref().is_none_or(|(of_userspace, _)| *of_userspace != userspace) {
            // What the old one has put in goes with it.
            ovs.mirror = None;
            lock(&self.datapath.flows).clear(Source::Learned);
            let source: Box<dyn FlowSource> = match userspace {
                true => Box::new(UnixctlSource::new(ovs.unixctl.clone())),
                false => Box::new(Kernel::default()),
            };
            let settings = Settings { max_idle, ..Settings::default() };
            match Mirror::spawn(source, self.datapath.flows.clone(), settings, ovs.misses()) {
                Ok(mirror) => ovs.mirror = Some((userspace, mirror)),
                Err(error) => {
                    let name = ovs.bridge.clone();
                    return self.problem(&name, format!("the mirror cannot be started: {error}"));
                }
            }
        }
        if let Some(mirror) = ovs.mirror() {
            mirror.set(Settings { max_idle, ..Settings::default() });
            // Nobody waits: until it is done, packets take the way that they took.
            drop(mirror.start_slow(snapshot.hw_offload().then(|| HW_OFFLOAD.to_owned())));
        }
    }

    /// Our own ports were not deleted when their bridge was, or when another of its name took its place (`ovs-vsctl del-br br0
    /// -- add-br br0` is one transaction): they wait, and are put into the next.
    fn follow_bridge(&mut self, snapshot: &Snapshot) {
        let Some(ovs) = &mut self.ovs else { return };
        let uuid = snapshot.bridges.get(&ovs.bridge).map(|bridge| bridge.uuid.clone());
        if ovs.bridge_uuid == uuid {
            return;
        }
        ovs.bridge_uuid = uuid;
        ovs.offered.clear();
        for port in self.state.ports() {
            if snapshot.port(&port.name).is_none() {
                ovs.seen.remove(&port.name);
            }
        }
    }

    /// Puts the ports of the configuration file into the database, as far as it has not had them yet.
    fn offer_ports(&mut self, snapshot: &Snapshot) {
        let Some(ovs) = &mut self.ovs else { return };
        if !snapshot.bridges.contains_key(&ovs.bridge) {
            return;
        }
        let (database, bridge) = (ovs.database.clone(), ovs.bridge.clone());
        let missing: Vec<PortConfig> = self
            .state
            .ports()
            .into_iter()
            .filter(|port| !ovs.seen.contains(&port.name) && !ovs.offered.contains(&port.name))
            .collect();
        for port in missing {
            let userspace = self.is_userspace().unwrap_or_default();
            if let Err(invalid) = port.check_under_ovs(userspace) {
                self.problem(&port.name, invalid.reason);
                continue;
            }
            match database.add_port(&bridge, &ports::row(&port)) {
                // The snapshot that has it is on its way.
                Ok(()) => {
                    if let Some(ovs) = &mut self.ovs {
                        ovs.offered.insert(port.name);
                    }
                }
                Err(error) => self.problem(&port.name, format!("port '{}': {error}", port.name)),
            }
        }
    }

    /// Tells the mirror which ports there are and what they must not pass by; returns when it has deleted the flows of
    /// those that are gone.
    pub(in crate::daemon) fn tell_mirror(&self) {
        let Some(ovs) = &self.ovs else { return };
        let userspace = self.is_userspace() == Some(true);
        let is_less = self.tell_exits(userspace);
        let Some(mirror) = ovs.mirror() else { return };
        if is_less {
            // Done before it answers to what follows.
            mirror.reconsider();
        }
        let served = self.ports.iter().filter(|(_, port)| port.config.is_own_device());
        let served = served.map(|(name, _)| name.clone()).collect();
        // In the kernel's datapath a tunnel's device is one of the host's.
        let tunnels = self.tunnels.keys().filter(|_| !userspace);
        let names = self.ports.keys().chain(tunnels).chain(self.host_ports.keys());
        ovs.host_state.watch(names.cloned().collect(), served, !userspace && !self.tunnels.is_empty());
        let devices = ovs.host_state.state();
        let port = |(name, port): (&String, &Port)| {
            let mut restriction = restriction(ovs.ours.get(name), devices.get(name));
            let wire = match &port.side {
                Side::Wire(wire) => wire.selection().map(|selection| (wire, selection.clone())),
                Side::Guest(_) | Side::Nic(_) => None,
            };
            // OVS has the device all the same.
            if wire.as_ref().is_some_and(|(wire, _)| !wire.shared().link_up()) {
                restriction.egress.get_or_insert_with(|| format!("{name} is not open by AF_XDP, or down"));
            }
            let kind = wire.map_or(PortKind::Own, |(_, selection)| PortKind::Shared(selection));
            MirrorPort { name: name.clone(), id: port.datapath.id, restriction, kind }
        };
        let tunnel = |(name, tunnel): (&String, &Tunnel)| MirrorPort {
            name: name.clone(),
            id: tunnel.id,
            restriction: if userspace { Restriction::default() } else { ovs.restriction_of(name) },
            kind: PortKind::Tunnels((!userspace).then(|| self.ways.dont_fragment())),
        };
        // What restricts it is known to who looks for ways.
        let host = |(name, (id, flows)): (&String, &(PortId, Arc<HostFlows>))| MirrorPort {
            name: name.clone(),
            id: *id,
            restriction: Restriction::default(),
            kind: PortKind::Host(flows.clone()),
        };
        let ports = self.ports.iter().map(port).chain(self.tunnels.iter().map(tunnel));
        let ports = ports.chain(self.host_ports.iter().map(host)).collect();
        // A mirror that waits for ovs-vswitchd has no flows to add meanwhile.
        let _ = mirror.start_ports(ports).recv_timeout(PATIENCE);
        let is_userspace =
            |name: &String| ovs.ours.get(name).is_some_and(|port| port.datapath_type == "netdev");
        let indexes = devices.iter().filter(|(name, _)| self.ports.contains_key(*name) && is_userspace(name));
        ovs.takeup.watch(indexes.map(|(name, device)| (name.clone(), device.ifindex)).collect());
    }

    /// `add-port` where Open vSwitch is the host: the port, then its rows.
    pub(in crate::daemon) fn add_ovs_port(&mut self, config: &PortConfig) -> Result<()> {
        match self.is_userspace() {
            None if config.device().is_some() => bail!("which datapath Open vSwitch has is not known yet"),
            None => {}
            Some(userspace) => config.check_under_ovs(userspace)?,
        }
        self.open_usable(config)?;
        let Some(ovs) = &self.ovs else { return Ok(()) };
        if let Err(error) = ovs.database.add_port(&ovs.bridge, &ports::row(config)) {
            self.take_port(&config.name, Closing::Deleted);
            return Err(error.into());
        }
        // One of the configuration file that was deleted is no longer.
        if self.state.is_configured(&config.name) {
            self.state.record_add_port(config)?;
        }
        Ok(())
    }

    /// `del-port` where Open vSwitch is the host: its rows. A device that is itself the bridge's port stays there, without us.
    pub(in crate::daemon) fn del_ovs_port(&mut self, name: &str) -> Result<()> {
        let is_device = self.ports.get(name).is_some_and(|port| port.config.is_own_device());
        let Some(ovs) = &mut self.ovs else { return Ok(()) };
        match is_device {
            true => ovs.database.release_port(name, ports::PREFIX)?,
            false => ovs.database.del_port(name)?,
        };
        ovs.leaving.insert(name.to_owned(), Instant::now());
        ovs.seen.remove(name);
        Ok(())
    }
}
