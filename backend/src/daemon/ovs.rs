//! The daemon beside stock Open vSwitch: the database says which ports there are and what else is configured there, and the
//! mirror keeps the tables in step with the datapath of the bridge.
//!
//! The database is the truth about ports. Those of the configuration file and of `add-port` are put there, and from then
//! on they are like any other interface with our `external_ids`.

mod follow;
mod pins;

use crate::control::protocol::OvsShow;
use crate::host::representors;
use crate::host_state::{self, Device, HostState};
use crate::ovs::jsonrpc::Remote;
use crate::ovs::mirror::{Mirror, MirrorReport, Misses, Restriction};
use crate::ovs::ovsdb::{Database, Event, Snapshot, Watcher};
use crate::ovs::ports::{self, OvsPort};
use crate::ovs::takeup::Takeup;
use crate::ovs::unixctl::{FlowUsage, Unixctl, run_dir};
use crate::spread::Millis;
use crate::underlay::{Tunnels, Underlay};
use anyhow::{Result, anyhow};
use event_manager::{EventOps, EventSet, Events, MutEventSubscriber};
use log::warn;
use pins::Pins;
use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, channel};
use std::time::{Duration, Instant};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

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
    /// What it said last of the host's network.
    stack_seen: host_state::Stack,
    /// Sees to it that the userspace datapath reads the representors that there are.
    takeup: Takeup,
    ours: BTreeMap<String, OvsPort>,
    /// Ports that the database has had: one that it no longer has was deleted there.
    seen: BTreeSet<String>,
    /// Our own ports that were put into the bridge, or that somebody has deleted from it: they are not put there again.
    offered: BTreeSet<String>,
    /// Ports deleted here, which an older snapshot may still name.
    leaving: BTreeMap<String, Instant>,
    /// Workers that were written here, of which an older snapshot does not know.
    pins: Pins,
    /// What is wrong with a port, or with the bridge under its own name.
    problems: BTreeMap<String, String>,
    /// Rung when there are events.
    news: EventFd,
    /// A device that OVS has too was opened or closed, or its carrier has changed.
    wires: Arc<AtomicBool>,
    /// Ways of tunnels have changed.
    ways: Arc<AtomicBool>,
    _underlay: Underlay,
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
    /// Begins to follow the database at `address`, and the network that `tunnels` go over.
    pub fn start(bridge: String, address: String, tunnels: Arc<Tunnels>) -> Result<Ovs> {
        let remote = address.parse::<Remote>().map_err(|reason| anyhow!("[host] db: {reason}"))?;
        let news = EventFd::new(EFD_NONBLOCK)?;
        let bell = news.try_clone()?;
        let host_state = HostState::spawn(Box::new({
            let bell = news.try_clone()?;
            move || drop(bell.write(1))
        }))?;
        let ways = Arc::<AtomicBool>::default();
        let underlay = Underlay::spawn(
            tunnels,
            Box::new({
                let (ways, bell) = (ways.clone(), news.try_clone()?);
                move || {
                    ways.store(true, Ordering::Relaxed);
                    // It only fails when it has been rung often enough.
                    let _ = bell.write(1);
                }
            }),
        )?;
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
            stack_seen: host_state.stack(),
            host_state,
            ours: BTreeMap::new(),
            seen: BTreeSet::new(),
            offered: BTreeSet::new(),
            leaving: BTreeMap::new(),
            pins: Pins::default(),
            problems: BTreeMap::new(),
            again: false,
            news,
            wires: Arc::default(),
            ways,
            _underlay: underlay,
        })
    }

    /// What the kernel does at a device that packets must not pass by.
    pub fn restriction_of(&self, name: &str) -> Restriction {
        restriction(self.ours.get(name), self.devices.get(name))
    }

    /// What the host's network does with packets, beside sending them where routes lead.
    pub fn stack(&self) -> Restriction {
        let host_state::Stack { ingress, egress } = self.host_state.stack();
        Restriction { ingress, egress }
    }

    /// Writes the workers of a port; whether the database has the port.
    pub fn set_workers(&mut self, name: &str, workers: Option<Vec<u16>>, now: Millis) -> Result<bool> {
        let text = workers.as_deref().map(ports::workers_text);
        let is_there = self.database.set_external_id(name, ports::WORKERS, text.as_deref())?;
        if is_there {
            self.pins.written(name, workers, self.ours.get(name), now);
        }
        Ok(is_there)
    }

    /// Whether a port's workers have been written, and the database has not told of it yet.
    pub fn is_pinning(&self, name: &str) -> bool {
        self.pins.is_open(name)
    }

    /// When there is something to be done even if the database tells nothing.
    pub fn due(&self) -> Option<Millis> {
        self.pins.due()
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
            warnings.extend(ports::strays(snapshot));
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
