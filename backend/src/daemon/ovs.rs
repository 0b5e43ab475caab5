//! The daemon beside stock Open vSwitch: the database says which ports there are and what else is configured there, and the
//! mirror keeps the tables in step with the datapath of the bridge.
//!
//! The database is the truth about ports. Those of the configuration file and of `add-port` are put there, and from then
//! on they are like any other interface with our `external_ids`.

use super::Daemon;
use super::lock;
use super::ports::{Closing, Port, Side};
use crate::control::protocol::OvsShow;
use crate::host::representors;
use crate::host_state::{Device, HostState};
use crate::ovs::jsonrpc::Remote;
use crate::ovs::kernel::Kernel;
use crate::ovs::mirror::{Mirror, MirrorPort, MirrorReport, Misses, Restriction, Settings};
use crate::ovs::ovsdb::{Database, Event, Snapshot, Watcher};
use crate::ovs::ports::{self, OvsPort};
use crate::ovs::source::FlowSource;
use crate::ovs::takeup::Takeup;
use crate::ovs::unixctl::{FlowUsage, Unixctl, UnixctlSource, run_dir};
use crate::port_config::PortConfig;
use anyhow::{Result, anyhow, bail};
use event_manager::{EventOps, EventSet, Events, MutEventSubscriber};
use log::{debug, info, warn};
use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, channel};
use std::time::{Duration, Instant};
use switch_core::flow::Source;
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

/// How long a snapshot may still name a port that was deleted here.
const STALE: Duration = Duration::from_secs(2);

/// How long the mirror may take to answer.
const PATIENCE: Duration = Duration::from_secs(1);

/// What the daemon knows of Open vSwitch.
pub struct Ovs {
    bridge: String,
    /// The row of the bridge in the last snapshot.
    bridge_uuid: Option<String>,
    address: String,
    database: Database,
    unixctl: Unixctl,
    events: Receiver<Event>,
    _watcher: Watcher,
    snapshot: Option<Arc<Snapshot>>,
    lost: Option<String>,
    /// The datapath that representors are open for.
    datapath: Option<representors::Settings>,
    /// The mirror, and whether it is of the userspace datapath.
    mirror: Option<(bool, Mirror)>,
    misses: Arc<Misses>,
    /// What the kernel does at the representors.
    host_state: HostState,
    /// What it said last.
    devices: Arc<BTreeMap<String, Device>>,
    /// Sees to it that the userspace datapath reads the representors that there are.
    takeup: Takeup,
    ours: BTreeMap<String, OvsPort>,
    /// Ports that the database has had: one that it no longer has was deleted there.
    seen: BTreeSet<String>,
    /// Our own ports that were put into the bridge, or that somebody has deleted from it: they are not put there again.
    offered: BTreeSet<String>,
    /// Ports deleted here, which an older snapshot may still name.
    leaving: BTreeMap<String, Instant>,
    /// What is wrong with a port, or with the bridge under its own name.
    problems: BTreeMap<String, String>,
    /// Rung when there are events.
    news: EventFd,
    /// A device that OVS has too was opened or closed, or its carrier has changed.
    wires: Arc<AtomicBool>,
    /// The snapshot is to be looked at again, because a port that is to be opened anew has to close first.
    again: bool,
}

/// Wakes the event loop when the database has news; the loop takes them itself.
pub struct News(EventFd);

impl MutEventSubscriber for News {
    fn process(&mut self, _: Events, _: &mut EventOps) {
        // It only fails when somebody else has read it.
        let _ = self.0.read();
    }

    fn init(&mut self, ops: &mut EventOps) {
        if let Err(error) = ops.add(Events::new(&self.0, EventSet::IN)) {
            warn!("the database of Open vSwitch cannot be followed: {error:?}");
        }
    }
}

impl Ovs {
    /// Begins to follow the database at `address`.
    pub fn start(bridge: String, address: String) -> Result<Ovs> {
        let remote = address.parse::<Remote>().map_err(|reason| anyhow!("[host] db: {reason}"))?;
        let news = EventFd::new(EFD_NONBLOCK)?;
        let bell = news.try_clone()?;
        let host_state = HostState::spawn(Box::new({
            let bell = news.try_clone()?;
            move || drop(bell.write(1))
        }))?;
        let unixctl = Unixctl::new(run_dir(&remote));
        let (sender, events) = channel();
        let tell = Box::new(move |event| {
            // Nobody listens any more when the daemon ends.
            let _ = sender.send(event);
            let _ = bell.write(1);
        });
        Ok(Ovs {
            bridge,
            bridge_uuid: None,
            address,
            database: Database::new(remote.clone()),
            takeup: Takeup::spawn(unixctl.clone())?,
            unixctl,
            events,
            _watcher: Watcher::spawn(remote, tell)?,
            snapshot: None,
            lost: None,
            datapath: None,
            mirror: None,
            misses: Arc::new(Misses::new()?),
            devices: host_state.state(),
            host_state,
            ours: BTreeMap::new(),
            seen: BTreeSet::new(),
            offered: BTreeSet::new(),
            leaving: BTreeMap::new(),
            problems: BTreeMap::new(),
            again: false,
            news,
            wires: Arc::default(),
        })
    }

    /// For the event loop, which is woken by it.
    pub fn news(&self) -> Result<News> {
        Ok(News(self.news.try_clone()?))
    }

    /// Gives what tells that a device that OVS has too was opened or closed, or that its carrier has changed.
    pub fn wire_teller(&self) -> Result<impl Fn() + Send + use<>> {
        let (wires, bell) = (self.wires.clone(), self.news.try_clone()?);
        Ok(move || {
            wires.store(true, Ordering::Relaxed);
            // It only fails when it has been rung often enough.
            let _ = bell.write(1);
        })
    }

    /// Which datapath it is, before the database has said so: the kernel's, if the kernel has one.
    pub fn guess(&self) -> representors::Settings {
        let kernel = std::path::Path::new("/sys/module/openvswitch").exists();
        representors::Settings { userspace: !kernel, offloads: kernel }
    }

    /// What the host path tells the mirror.
    pub fn misses(&self) -> Arc<Misses> {
        self.misses.clone()
    }

    /// The mirror, once the bridge's datapath is known.
    pub fn mirror(&self) -> Option<&Mirror> {
        self.mirror.as_ref().map(|(_, mirror)| mirror)
    }

    /// What keeps it from mirroring, if the mirror itself is not there to say.
    pub fn waiting_for(&self) -> String {
        match &self.lost {
            Some(why) => why.clone(),
            None => self
                .problems
                .get(&self.bridge)
                .cloned()
                .unwrap_or_else(|| "the database is not read yet".into()),
        }
    }

    /// For `show`.
    pub fn show(&self) -> OvsShow {
        let report = self.report();
        OvsShow {
            bridge: self.bridge.clone(),
            version: self.snapshot.as_ref().and_then(|snapshot| snapshot.ovs_version.clone()),
            database: self.address.clone(),
            database_error: self.lost.clone(),
            datapath: self.mirror.is_some().then(|| report.source.clone()),
            datapath_error: report
                .error
                .clone()
                .or_else(|| self.mirror.is_none().then(|| self.waiting_for())),
            read_seconds: report.since_full.map(|ago| ago.as_secs_f64()),
            resyncs: report.resyncs,
            lost_events: report.lost_events,
            keepalives_per_second: report.keepalive.needed as f64,
            given_up: report.given_up as u64,
        }
    }

    /// What the mirror has to tell.
    pub fn report(&self) -> MirrorReport {
        let Some(mirror) = self.mirror() else { return MirrorReport::default() };
        // It may wait for an answer of ovs-vswitchd.
        mirror.start_report().recv_timeout(PATIENCE).unwrap_or_else(|_| MirrorReport {
            error: Some("Open vSwitch takes long to answer".into()),
            ..MirrorReport::default()
        })
    }

    /// What ovs-vswitchd says about its flows; nothing if it does not say so soon.
    fn flow_usage(&self) -> Vec<FlowUsage> {
        let (answer, wait) = channel();
        let unixctl = self.unixctl.clone();
        // A thread of its own: ovs-vswitchd may take its time, and nobody else is to wait for it.
        let asked = std::thread::Builder::new().name("upcall-show".into()).spawn(move || {
            let _ = answer.send(unixctl.flow_usage().unwrap_or_default());
        });
        asked.ok().and_then(|_| wait.recv_timeout(PATIENCE).ok()).unwrap_or_default()
    }

    /// What an administrator should know.
    pub fn warnings(&self) -> Vec<String> {
        let mut warnings: Vec<String> = self.problems.values().cloned().collect();
        if let Some(snapshot) = &self.snapshot {
            if snapshot.hw_offload() {
                warnings.push(format!(
                    "{HW_OFFLOAD} (ovs-vsctl set Open_vSwitch . other_config:hw-offload=false, then restart it)"
                ));
            }
            // One that cannot be opened has no representor: that is said already.
            for (name, port) in self.ours.iter().filter(|(name, _)| !self.problems.contains_key(*name)) {
                if let Some(error) = &port.error {
                    warnings.push(format!("port '{name}': Open vSwitch says: {error}"));
                }
                let restriction = restriction(Some(port), self.devices.get(name));
                let (sent, got) = match &port.config {
                    Ok(config) if config.is_own_device() => {
                        ("what it receives stays the kernel's", "what leaves by it takes the host path")
                    }
                    _ => (
                        "what its guest sends takes the host path",
                        "what its guest gets takes the host path",
                    ),
                };
                warnings.extend(restriction.ingress.map(|why| format!("port '{name}': {why}: {sent}")));
                warnings.extend(restriction.egress.map(|why| format!("port '{name}': {why}: {got}")));
            }
            warnings.extend(self.host_state.warnings());
            let crowded = self.flow_usage().into_iter().filter(|usage| usage.current > usage.limit);
            warnings.extend(crowded.map(|FlowUsage { datapath, current, limit }| {
                format!(
                    "Open vSwitch has {current} flows in {datapath}, more than the {limit} that it can look after now: it \
                     removes those that are idle for 100 ms"
                )
            }));
        }
        warnings
    }
}

/// Why nothing is forwarded here while OVS offloads flows itself: they are not in the datapath's table then.
const HW_OFFLOAD: &str = "hw-offload is on in Open vSwitch";

/// What packets of a port must not pass by: what OVS has configured there, and what the kernel has.
fn restriction(port: Option<&OvsPort>, device: Option<&Device>) -> Restriction {
    let unseen = || device.is_none().then(|| "representor not seen yet".to_owned());
    let why = |ovs: Option<String>, kernel: Option<String>| ovs.or(kernel).or_else(unseen);
    Restriction {
        ingress: why(
            port.and_then(|port| port.ingress.clone()),
            device.and_then(|device| device.ingress.clone()),
        ),
        egress: why(
            port.and_then(|port| port.egress.clone()),
            device.and_then(|device| device.egress.clone()),
        ),
    }
}

impl Daemon {
    /// Takes what the database has told.
    pub(super) fn follow_ovs(&mut self) {
        let Some(ovs) = &mut self.ovs else { return };
        let mut news = std::mem::take(&mut ovs.again);
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
        if Arc::ptr_eq(&devices, &ovs.devices) && !wires {
            return;
        }
        ovs.devices = devices.clone();
        let mut flows = lock(&self.datapath.flows);
        for (name, port) in &mut self.ports {
            // A wire's MTU is that of its device.
            if let Some(device) = devices.get(name).filter(|_| port.config.device().is_none())
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
        let Some(ovs) = &mut self.ovs else { return };
        ovs.ours = ports::ours(&snapshot);
        ovs.leaving.retain(|name, since| since.elapsed() < STALE && ovs.ours.contains_key(name));
        let ours = ovs.ours.clone();
        let own: BTreeSet<String> = self.state.ports().into_iter().map(|port| port.name).collect();
        ovs.problems.retain(|name, _| *name == ovs.bridge || own.contains(name) || ours.contains_key(name));
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
        self.tell_mirror();
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
                port.config = config.clone();
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

    fn problem(&mut self, name: &str, reason: String) {
        let Some(ovs) = &mut self.ovs else { return };
        if ovs.problems.get(name) != Some(&reason) {
            warn!("{reason}");
            ovs.problems.insert(name.to_owned(), reason);
        }
    }

    fn solved(&mut self, name: &str) {
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
    pub(super) fn tell_mirror(&self) {
        let Some(ovs) = &self.ovs else { return };
        let Some(mirror) = ovs.mirror() else { return };
        let served = self.ports.iter().filter(|(_, port)| port.config.is_own_device());
        ovs.host_state
            .watch(self.ports.keys().cloned().collect(), served.map(|(name, _)| name.clone()).collect());
        let devices = ovs.host_state.state();
        let port = |(name, port): (&String, &Port)| {
            let mut restriction = restriction(ovs.ours.get(name), devices.get(name));
            let wire = match &port.side {
                Side::Wire(wire) => wire.selection().map(|selection| (wire, selection.clone())),
                Side::Guest(_) => None,
            };
            // OVS has the device all the same.
            if wire.as_ref().is_some_and(|(wire, _)| !wire.shared().link_up()) {
                restriction.egress.get_or_insert_with(|| format!("{name} is not open by AF_XDP, or down"));
            }
            let classes = wire.map(|(_, selection)| selection);
            MirrorPort { name: name.clone(), id: port.datapath.id, restriction, classes }
        };
        // A mirror that waits for ovs-vswitchd has no flows to add meanwhile.
        let _ = mirror.start_ports(self.ports.iter().map(port).collect()).recv_timeout(PATIENCE);
        let is_userspace =
            |name: &String| ovs.ours.get(name).is_some_and(|port| port.datapath_type == "netdev");
        let indexes = devices.iter().filter(|(name, _)| self.ports.contains_key(*name) && is_userspace(name));
        ovs.takeup.watch(indexes.map(|(name, device)| (name.clone(), device.ifindex)).collect());
    }

    /// `add-port` where Open vSwitch is the host: the port, then its rows.
    pub(super) fn add_ovs_port(&mut self, config: &PortConfig) -> Result<()> {
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
    pub(super) fn del_ovs_port(&mut self, name: &str) -> Result<()> {
        let is_device = self.ports.get(name).is_some_and(|port| port.config.is_own_device());
        let Some(ovs) = &mut self.ovs else { return Ok(()) };
        match is_device {
            true => ovs.database.release_port(name, &ports::keys())?,
            false => ovs.database.del_port(name)?,
        };
        ovs.leaving.insert(name.to_owned(), Instant::now());
        ovs.seen.remove(name);
        Ok(())
    }
}
