//! The daemon: configuration, ports, explicit flows, and the event loop that everything on the control side runs on.

mod explicit;
mod ovs;
mod ports;
mod report;
mod requests;
mod spread;
mod trace;
mod tunnels;
mod watchdog;

use crate::config::{Config, Host as HostConfig};
use crate::control::server::{ControlServer, Limits};
use crate::datapath::Datapath;
use crate::host::Host;
use crate::host::bridge::Bridge;
use crate::host::path::HostPath;
use crate::host::representors::Representors;
use crate::nic::{FlowTables, Nic};
use crate::offload::Manager;
use crate::state::State;
use crate::underlay::{HostFlows, Tunnels};
use crate::vhost::VhostUserPort;
use crate::virtio::survive_loss;
use anyhow::{Context, Result};
use event_manager::{EventManager, MutEventSubscriber, SubscriberId, SubscriberOps};
use explicit::Explicit;
use log::{info, warn};
use ovs::Ovs;
use ports::{Closing, Port, Side};
use requests::Handler;
use signal_hook::consts::{SIGINT, SIGTERM};
use std::collections::BTreeMap;
use std::io::Read;
use std::os::unix::net::UnixStream;
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::Instant;
use switch_core::packet::PortId;
use tunnels::Tunnel;
use vmm_sys_util::eventfd::EventFd;
use watchdog::{Pulse, Watchdog};

type Subscriber = Arc<Mutex<dyn MutEventSubscriber + Send>>;

/// Everything that control changes; one object, used by the event loop's thread. Dropped in this order: what uses the
/// workers goes before them.
pub struct Daemon {
    config: Config,
    state: State,
    /// Open vSwitch, where it is the host.
    ovs: Option<Ovs>,
    ports: BTreeMap<String, Port>,
    /// Logical ports of tunnels, by their device in Open vSwitch's datapath.
    tunnels: BTreeMap<String, Tunnel>,
    /// Ports of the kernel's bridges that are devices of the host's, as far as tunnels may go by them: slots and flows.
    host_ports: BTreeMap<String, (PortId, Arc<HostFlows>)>,
    /// What their flows are compiled with.
    ways: Arc<Tunnels>,
    /// By name.
    nics: BTreeMap<String, Nic>,
    /// Puts flows into NICs, where there are any.
    offload: Option<Arc<Manager>>,
    host: Option<HostPath>,
    datapath: Datapath,
    explicit: BTreeMap<String, Explicit>,
    /// What is to be done with the event loop once it is not inside a callback.
    pending: Vec<Pending>,
    pulse: Pulse,
    spread: spread::Spread,
    load: report::Load,
    gone: report::Gone,
    started: Instant,
}

/// Changes of the event loop's subscribers.
enum Pending {
    Watch(String, Arc<Mutex<VhostUserPort>>),
    Close(Box<Port>, Closing, Arc<std::sync::atomic::AtomicBool>),
}

fn lock<T: ?Sized>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
}

impl Daemon {
    /// Starts the datapath and the ports of the configuration and of the state file.
    fn new(config: Config, state: State) -> Result<Daemon> {
        for warning in state.warnings() {
            warn!("{warning}");
        }
        // The bridge answers at once. From OVS the flow takes some time, in which it forwards packets itself.
        let misses = match config.host {
            HostConfig::Bridge { .. } => 8,
            HostConfig::Ovs { .. } => 64,
        };
        let (datapath, ends) = Datapath::start(&config.datapath.cpus, config.datapath.l1_entries, misses)
            .context("cannot start the workers")?;
        let ways = Arc::new(Tunnels::new()?);
        lock(&datapath.flows).set_ways(ways.clone());
        // Before there are flows, which it counts.
        let offload =
            config.nics.iter().any(|nic| nic.offload).then(|| Manager::start(datapath.flows.clone()));
        let offload = offload.transpose().context("cannot start what puts flows into NICs")?.map(Arc::new);
        let (host, ovs): (Box<dyn Host>, _) = match config.host.clone() {
            HostConfig::Bridge { mac_ageing, mac_table_size } => {
                (Box::new(Bridge::new(mac_ageing as u64 * 1000, mac_table_size)), None)
            }
            HostConfig::Ovs { bridge, db } => {
                let ovs = Ovs::start(bridge, db, ways.clone())?;
                let host = Representors::new(ovs.guess(), ends.down, ends.waker.clone(), ovs.misses());
                (Box::new(host), Some(ovs))
            }
        };
        let host = HostPath::spawn(host, ends.links, datapath.flows.clone(), ends.waker)
            .context("cannot start the host path")?;
        let mut nics = BTreeMap::new();
        for nic in &config.nics {
            let tables = offload.clone().map(|manager| manager as Arc<dyn FlowTables>);
            let started = Nic::start(nic.clone(), datapath.quiescence.clone(), tables);
            let started = started.with_context(|| format!("NIC '{}'", nic.name))?;
            nics.insert(nic.name.clone(), started);
        }
        let pulse = Pulse::new(datapath.worker_counters.clone(), datapath.quiescence.clone());
        let mut daemon = Daemon {
            config,
            state,
            ovs,
            ports: BTreeMap::new(),
            tunnels: BTreeMap::new(),
            host_ports: BTreeMap::new(),
            ways,
            nics,
            offload,
            host: Some(host),
            datapath,
            explicit: BTreeMap::new(),
            pending: Vec::new(),
            pulse,
            spread: spread::Spread::new()?,
            load: report::Load::default(),
            gone: report::Gone::default(),
            started: Instant::now(),
        };
        // What a wire may be is only known when OVS has told which datapath it has: those are opened then.
        let is_ovs = daemon.ovs.is_some();
        for port in daemon.state.ports().into_iter().filter(|port| !is_ovs || port.device().is_none()) {
            daemon.open_port(&port).with_context(|| format!("port '{}'", port.name))?;
        }
        let flows: Vec<(String, String)> =
            daemon.state.flows().map(|(flow, actions)| (flow.to_owned(), actions.to_owned())).collect();
        for (flow, actions) in flows {
            daemon.restore_flow(flow, actions);
        }
        Ok(daemon)
    }

    /// Carries out what had to wait until the event loop was not inside a callback.
    fn settle(daemon: &Mutex<Daemon>, events: &mut EventManager<Subscriber>) {
        lock(daemon).follow_ovs();
        lock(daemon).follow_spread();
        let pending = std::mem::take(&mut lock(daemon).pending);
        for change in pending {
            lock(daemon).pulse.beat();
            match change {
                Pending::Watch(name, vhost) => {
                    // It may have been deleted meanwhile.
                    if let Some(port) = lock(daemon).ports.get_mut(&name)
                        && let Side::Guest(there) = &port.side
                        && Arc::ptr_eq(there, &vhost)
                    {
                        port.subscriber = Some(events.add_subscriber(vhost));
                    }
                }
                Pending::Close(port, closing, done) => {
                    if let Some(subscriber) = port.subscriber {
                        // It fails only for one that is not there.
                        let _ = events.remove_subscriber(subscriber);
                    }
                    lock(daemon).close_port(*port, closing);
                    done.store(true, std::sync::atomic::Ordering::Release);
                }
            }
        }
    }

    /// Closes every port and ends all threads.
    fn shut_down(&mut self, events: &mut EventManager<Subscriber>) {
        let subscribers: Vec<SubscriberId> = self.ports.values().filter_map(|port| port.subscriber).collect();
        for subscriber in subscribers {
            let _ = events.remove_subscriber(subscriber);
        }
        for port in self.ports.values_mut() {
            port.side.shutdown();
        }
        self.ports.clear();
        self.nics.clear();
        self.offload = None;
        self.ovs = None;
        self.host = None;
        self.datapath.stop();
    }
}

/// Runs the daemon until SIGTERM or SIGINT. `ready` is called once, when it can be used.
pub fn run(config: Config, ready: impl FnOnce()) -> Result<()> {
    // This may wait, and a signal ends that.
    let state = State::open(&config.state_path(), &config.ports)?;
    let (mut signals, signalled) = UnixStream::pair()?;
    signals.set_nonblocking(true)?;
    for signal in [SIGTERM, SIGINT] {
        signal_hook::low_level::pipe::register(signal, signalled.try_clone()?)?;
    }
    let mut events: EventManager<Subscriber> =
        EventManager::new().map_err(|error| anyhow::anyhow!("cannot make an event loop: {error:?}"))?;
    let control = config.control.clone();
    let group = config.control_group.clone();
    let daemon = Arc::new(Mutex::new(Daemon::new(config, state)?));
    if let Some(ovs) = &lock(&daemon).ovs {
        events.add_subscriber(Arc::new(Mutex::new(ovs.news()?)));
    }
    events.add_subscriber(lock(&daemon).spread.ticker());
    if let Some(watchdog) = Watchdog::new(&lock(&daemon).pulse)? {
        events.add_subscriber(Arc::new(Mutex::new(watchdog)));
    }
    let server = ControlServer::bind(&control, group.as_deref(), Limits::default(), Handler(daemon.clone()))?;
    events.add_subscriber(Arc::new(Mutex::new(server)));
    events.add_subscriber(Arc::new(Mutex::new(Signals(signals.try_clone()?))));
    let lost_memory = survive_loss().context("cannot handle SIGBUS")?;
    events.add_subscriber(Arc::new(Mutex::new(LostMemory(daemon.clone(), lost_memory))));
    Daemon::settle(&daemon, &mut events);
    info!("ready: control socket {}", control.display());
    ready();
    loop {
        events.run().map_err(|error| anyhow::anyhow!("the event loop failed: {error:?}"))?;
        Daemon::settle(&daemon, &mut events);
        let mut byte = [0];
        if matches!(signals.read(&mut byte), Ok(1)) {
            break;
        }
    }
    info!("stopping");
    lock(&daemon).shut_down(&mut events);
    Ok(())
}

/// Guests whose memory was taken away, and what says that there are any.
struct LostMemory(Arc<Mutex<Daemon>>, &'static EventFd);

impl MutEventSubscriber for LostMemory {
    fn process(&mut self, _: event_manager::Events, _: &mut event_manager::EventOps) {
        let _ = self.1.read();
        for port in lock(&self.0).ports.values() {
            if let Side::Guest(vhost) = &port.side {
                lock(vhost).shared().check_memory();
            }
        }
    }

    fn init(&mut self, ops: &mut event_manager::EventOps) {
        if let Err(error) = ops.add(event_manager::Events::new(self.1, event_manager::EventSet::IN)) {
            warn!("guests whose memory is taken away cannot be noticed: {error:?}");
        }
    }
}

/// Wakes the event loop when a signal has come; the loop reads it itself.
struct Signals(UnixStream);

impl MutEventSubscriber for Signals {
    fn process(&mut self, _: event_manager::Events, _: &mut event_manager::EventOps) {}

    fn init(&mut self, ops: &mut event_manager::EventOps) {
        let events = event_manager::Events::new(&self.0, event_manager::EventSet::IN);
        if let Err(error) = ops.add(events) {
            warn!("signals cannot be watched, end the daemon with SIGKILL: {error:?}");
        }
    }
}
