//! NICs that the daemon drives itself: PCI functions, whose front-panel ports are ports of the switch.
//!
//! A [`Nic`] opens its function and takes it up again when it has vanished and come back, on a thread of its own. A [`NicPort`] is
//! to a port of the switch what `wire::Wire` is to a network device. What workers need of it is [`NicPortShared`]: while the NIC
//! is open, the port's queue of received frames, [`NicRx`], and its send side, [`NicTx`]. All ports of a NIC share its packet I/O,
//! by a lock that is held for a burst (see `card`).
//!
//! The NIC's thread sees to events (links, resets, interrupts) and never to frames.
//!
//! A NIC's tables, if it has such, are given to a [`FlowTables`] when the NIC is opened, and what is known of its ports with them.
//! Where there is none the NIC keeps its tables: they are empty, so that everything comes to the switch.

mod card;
mod control;
mod open;
mod queue;
mod shared;
mod stations;
#[cfg(test)]
mod tests;

pub use card::NicTx;
pub use open::{FlowSettings, Opened, PciAddress};
pub use queue::NicRx;
pub use shared::{NicLosses, NicPortShared};

use crate::port_config::DEFAULT_MTU;
use crate::quiesce::Quiescence;
use crate::wake::AbortOnPanic;
use crate::wire::WireEvent;
use card::Card;
use control::Control;
use nic::io::{NicError, Port};
use nic::offload::{FlowOffload, PortMap};
use rustix::event::{EventfdFlags, eventfd};
use rustix::fd::OwnedFd;
use shared::SETTLING;
use std::collections::BTreeMap;
use std::io::{self, PipeWriter};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::Instant;
use switch_core::packet::PortId;

/// What a frame has beside the bytes that the MTU counts: the Ethernet header and two VLAN tags.
const LINK_HEADER: usize = 22;

fn lock<T: ?Sized>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // A panic elsewhere must not take the NIC with it.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Who puts flows into NICs. It is called with a lock of the NIC held, one call after another for each NIC: it may wait for a
/// thread of its own, but not for the daemon's event loop.
pub trait FlowTables: Send + Sync {
    /// NIC `nic` was opened, with empty tables, and these of its ports are ports of the switch. It is to be polled from now on, or
    /// its resets are not noticed.
    fn opened(&self, nic: &str, tables: Box<dyn FlowOffload>, settings: &FlowSettings, ports: PortMap);

    /// From now on these are the NIC's ports that are ports of the switch.
    fn set_ports(&self, nic: &str, ports: PortMap);

    /// The NIC is gone, or is to be let go of: its tables have been dropped when this returns.
    fn closed(&self, nic: &str);
}

/// Settings of a NIC.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NicConfig {
    /// Its name, by which ports name it.
    pub name: String,
    /// Where it is.
    pub pci: PciAddress,
    /// Receive queues of each port, if it can have several: 1 to [`MAX_QUEUES`](crate::port_config::MAX_QUEUES).
    pub queues: u8,
    /// Whether flows may be put into it.
    pub offload: bool,
    /// How.
    pub flows: FlowSettings,
}

/// How a NIC stands.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct NicStatus {
    /// Name of its driver; empty while it is not open.
    pub driver: &'static str,
    /// Why it is not open.
    pub fault: Option<String>,
    /// Whether that is because it is not there.
    pub absent: bool,
    /// Whether it has tables for flows.
    pub has_tables: bool,
    /// Its ports, and their links.
    pub ports: Vec<Port>,
    /// How often it was found to have been reset.
    pub resets: u64,
    /// Frames that it has forwarded itself, and of which it gave a copy. They went no further.
    pub forwarded: u64,
    /// Frames of its ports that are no ports of the switch.
    pub unclaimed: u64,
}

/// What a NIC's port tells the daemon.
pub type OnEvent = Arc<dyn Fn(WireEvent) + Send + Sync>;

/// A port of the NIC that is a port of the switch.
struct Attached {
    id: PortId,
    name: String,
    shared: Arc<NicPortShared>,
    status: Arc<Mutex<NicPortStatus>>,
    on_event: OnEvent,
}

#[derive(Default)]
struct Ports {
    attached: BTreeMap<u32, Attached>,
    /// While it is open.
    card: Option<Arc<Card>>,
}

impl Ports {
    fn map(&self) -> PortMap {
        PortMap::new(self.attached.iter().map(|(&number, port)| (port.id, number)))
    }
}

/// What the daemon, the NIC's ports and its thread share. Locks are taken in this order: ports, status, then those of workers.
struct Shared {
    name: String,
    quiescence: Arc<Quiescence>,
    ports: Mutex<Ports>,
    status: Mutex<NicStatus>,
    /// Who has the tables of the NIC while it is open.
    tables: Option<Arc<dyn FlowTables>>,
    /// Wakes the thread.
    wake: Arc<OwnedFd>,
}

impl Shared {
    /// Takes the queues of a port away, which no worker uses when this returns.
    fn detach(&self, ports: &Ports, port: &NicPortShared) {
        port.stop();
        self.quiescence.barrier();
        if let Some(card) = &ports.card {
            card.close_queues(port.number());
        }
        // Ports that stay are not to wait for this one: the lock is taken for each look alone.
        let deadline = Instant::now() + SETTLING;
        port.bury(deadline, || ports.card.as_ref()?.lock().as_mut()?.stock(port.number()));
    }

    /// Lets workers have a port, if the NIC is open and has such a port. Gives the port's MTU then.
    fn start(&self, card: Option<&Arc<Card>>, attached: &Attached) -> Option<u32> {
        let Attached { name, shared, status, .. } = attached;
        let number = shared.number();
        let (fault, absent) = {
            let status = lock(&self.status);
            (status.fault.clone(), status.absent)
        };
        let not_open = |fault| Err((fault, absent));
        let port = match card {
            None => not_open(fault.unwrap_or_else(|| "it is not open yet".into())),
            Some(card) => {
                let port = card
                    .lock()
                    .as_ref()
                    .and_then(|inner| inner.io.ports().iter().find(|port| port.number == number).cloned());
                match port {
                    None => Err((format!("it has no port {number}"), false)),
                    Some(port) => match shared.start(card, &port) {
                        Ok(()) => Ok(port),
                        Err(error) => Err((format!("no memory for its frames: {error}"), false)),
                    },
                }
            }
        };
        match port {
            Ok(port) => {
                let mtu = mtu(&port);
                *lock(status) = NicPortStatus { fault: None, absent: false, mtu };
                if port.link.up && shared.set_up(true) {
                    log::info!("port {name}: link up");
                }
                Some(mtu)
            }
            Err((fault, absent)) => {
                let status = &mut *lock(status);
                *status =
                    NicPortStatus { fault: Some(format!("NIC {}: {fault}", self.name)), absent, ..*status };
                None
            }
        }
    }
}

/// Tells the owner of a port whether its link is up. Not to be called with a lock for which the event loop could wait.
fn tell_link(shared: &NicPortShared, on_event: &OnEvent) {
    loop {
        let up = shared.link_up();
        on_event(WireEvent::Link(up));
        // Another thread may have told the opposite meanwhile: whoever is last tells how it is.
        if shared.link_up() == up {
            return;
        }
    }
}

/// Tells the owner of a port that its queue is open.
fn tell_opened(shared: &NicPortShared, on_event: &OnEvent, mtu: u32) {
    on_event(WireEvent::Mtu(mtu));
    if shared.link_up() {
        tell_link(shared, on_event);
    }
}

/// The MTU of a port, in bytes.
fn mtu(port: &Port) -> u32 {
    u32::try_from(port.max_frame.saturating_sub(LINK_HEADER)).unwrap_or(u32::MAX)
}

/// A NIC. It is open from [`start`](Self::start) on, as far as it can be, and let go of when this is dropped.
pub struct Nic {
    config: NicConfig,
    shared: Arc<Shared>,
    /// The thread ends when this is closed.
    stop: Option<PipeWriter>,
    thread: Option<JoinHandle<()>>,
}

/// What opens a NIC.
type Open = Box<dyn FnMut() -> Result<Opened, NicError> + Send>;

impl Nic {
    /// Opens a NIC, if that is possible now, and starts the thread that follows it. `tables` gets its tables, if it has such and
    /// they may be used.
    ///
    /// # Errors
    /// The system refuses a pipe, an event descriptor or a thread.
    pub fn start(
        config: NicConfig,
        quiescence: Arc<Quiescence>,
        tables: Option<Arc<dyn FlowTables>>,
    ) -> io::Result<Nic> {
        let (address, queues, flows) = (config.pci.clone(), config.queues, config.flows.clone());
        Nic::start_with(config, quiescence, tables, Box::new(move || open::open(&address, queues, &flows)))
    }

    fn start_with(
        config: NicConfig,
        quiescence: Arc<Quiescence>,
        tables: Option<Arc<dyn FlowTables>>,
        open: Open,
    ) -> io::Result<Nic> {
        let (stopped, stop) = io::pipe()?;
        let shared = Arc::new(Shared {
            name: config.name.clone(),
            quiescence,
            ports: Mutex::default(),
            status: Mutex::default(),
            tables: tables.filter(|_| config.offload),
            wake: Arc::new(eventfd(0, EventfdFlags::NONBLOCK | EventfdFlags::CLOEXEC)?),
        });
        let mut control = Control::new(shared.clone(), open, config.flows.clone(), stopped);
        control.look(false);
        let thread = std::thread::Builder::new().name(format!("nic-{}", config.name)).spawn(move || {
            let _alarm = AbortOnPanic("a NIC");
            control.run();
        })?;
        Ok(Nic { config, shared, stop: Some(stop), thread: Some(thread) })
    }

    /// Its settings.
    pub fn config(&self) -> &NicConfig {
        &self.config
    }

    /// How it stands. Not to be called by who holds the lock of the flows.
    pub fn status(&self) -> NicStatus {
        let card = lock(&self.shared.ports).card.clone();
        let mut status = lock(&self.shared.status).clone();
        if let Some(inner) =
            card.as_ref().and_then(|card| card.lock().as_ref().map(|i| (i.forwarded, i.unclaimed)))
        {
            status.forwarded += inner.0;
            status.unclaimed += inner.1;
        }
        status
    }

    /// A port of the NIC, to be a port of the switch called `name` when it is [started](NicPort::start), with at most so many
    /// queues.
    pub fn port(&self, id: PortId, name: &str, number: u32, queues: usize, on_event: OnEvent) -> NicPort {
        let shared = NicPortShared::new(number, queues, self.shared.quiescence.clone());
        NicPort::new(Some(&self.shared), shared, id, name, on_event)
    }
}

impl Drop for Nic {
    fn drop(&mut self) {
        self.stop = None;
        if let Some(thread) = self.thread.take() {
            // It cannot have panicked: that ends the process.
            let _ = thread.join();
        }
    }
}

/// How a port of a NIC stands.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NicPortStatus {
    /// Why no frames can go.
    pub fault: Option<String>,
    /// Whether that is because its NIC is not there.
    pub absent: bool,
    /// MTU of the port when it was open last, in bytes.
    pub mtu: u32,
}

/// A port of a NIC as a port of the switch.
pub struct NicPort {
    nic: Option<Arc<Shared>>,
    shared: Arc<NicPortShared>,
    status: Arc<Mutex<NicPortStatus>>,
    /// Until it is started.
    waiting: Option<Attached>,
}

impl NicPort {
    fn new(
        nic: Option<&Arc<Shared>>,
        shared: NicPortShared,
        id: PortId,
        name: &str,
        on_event: OnEvent,
    ) -> NicPort {
        let (number, shared) = (shared.number(), Arc::new(shared));
        let open = nic.and_then(|nic| {
            let status = lock(&nic.status);
            status.ports.iter().find(|port| port.number == number).map(mtu)
        });
        let mtu = open.unwrap_or(DEFAULT_MTU.into());
        let status = Arc::new(Mutex::new(NicPortStatus { fault: None, absent: false, mtu }));
        let name = name.to_owned();
        let waiting = Attached { id, name, shared: shared.clone(), status: status.clone(), on_event };
        NicPort { nic: nic.cloned(), shared, status, waiting: Some(waiting) }
    }

    /// A port of NIC `nic`, which is not among those that are configured.
    pub fn without_nic(nic: &str, quiescence: &Arc<Quiescence>, id: PortId, number: u32) -> NicPort {
        let shared = NicPortShared::new(number, 1, quiescence.clone());
        let port = NicPort::new(None, shared, id, "", Arc::new(|_| {}));
        lock(&port.status).fault = Some(no_such_nic(nic));
        port
    }

    /// What the workers need of the port.
    pub fn shared(&self) -> &Arc<NicPortShared> {
        &self.shared
    }

    /// How it stands.
    pub fn status(&self) -> NicPortStatus {
        lock(&self.status).clone()
    }

    /// Makes it a port of the switch: frames come and go as far as the NIC is open.
    pub fn start(&mut self) {
        let (Some(nic), Some(attached)) = (&self.nic, self.waiting.take()) else { return };
        let on_event = attached.on_event.clone();
        let mtu = {
            let mut ports = lock(&nic.ports);
            // Somebody who has had the number until now, and is about to be closed.
            if let Some(before) = ports.attached.remove(&self.shared.number()) {
                nic.detach(&ports, &before.shared);
            }
            let mtu = nic.start(ports.card.clone().as_ref(), &attached);
            ports.attached.insert(self.shared.number(), attached);
            if let Some(tables) = &nic.tables {
                tables.set_ports(&nic.name, ports.map());
            }
            mtu
        };
        if let Some(mtu) = mtu {
            tell_opened(&self.shared, &on_event, mtu);
        }
    }

    /// Takes it from the switch; no worker uses it when this returns.
    pub fn shutdown(&mut self) {
        let (Some(nic), None) = (&self.nic, &self.waiting) else { return };
        let mut ports = lock(&nic.ports);
        let number = self.shared.number();
        // Another port of the switch may have taken the number meanwhile.
        let is_ours = |port: &Attached| Arc::ptr_eq(&port.shared, &self.shared);
        if !ports.attached.get(&number).is_some_and(is_ours) {
            return;
        }
        ports.attached.remove(&number);
        if let Some(tables) = &nic.tables {
            tables.set_ports(&nic.name, ports.map());
        }
        nic.detach(&ports, &self.shared);
    }
}

impl Drop for NicPort {
    fn drop(&mut self) {
        self.shutdown();
    }
}

/// What is said of a port whose NIC is not in the configuration file.
pub fn no_such_nic(nic: &str) -> String {
    format!("there is no NIC '{}' in the configuration file", nic.escape_debug())
}
