//! The offload manager: the hottest flows go into NICs' tables.
//!
//! `policy` decides which flows are worth it, `eligible` which may; `manager` carries that out with the tables of
//! `device`s. None of them has a thread or a clock of its own: those are here. What becomes of flows, the tables say through
//! `feed`: a flow that is deleted or changed leaves the NIC at once, after the workers were told, and answers to `sync` and
//! `del-flow` wait for both.
//!
//! Lock order: the tables (`Flows`), then the feed's queue. The manager's thread holds neither while it talks to a device or
//! waits, so who holds the tables may tell it things but must not wait for its answers.

mod device;
mod eligible;
pub mod feed;
mod manager;
pub mod policy;
#[cfg(test)]
mod testing;
#[cfg(test)]
mod tests;

use crate::clock;
use crate::flows::{Flows, MAX_FLOWS};
use crate::nic::{FlowSettings, FlowTables};
use crate::wake::AbortOnPanic;
pub use eligible::Reason;
use feed::Feed;
use manager::Core;
use nic::offload::{Counts, FlowOffload, PortMap, Refusal};
use std::collections::{BTreeMap, HashMap};
use std::fmt;
use std::io;
use std::sync::mpsc::{Receiver, Sender, TryRecvError, channel};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};
use switch_core::flow::FlowRef;
use switch_core::hash::Hasher;
use switch_core::slab::Slots;

/// Packets a second from which a flow is worth a place in empty tables.
pub const MIN_RATE: f64 = 50.0;

/// How long a report may take.
const PATIENCE: Duration = Duration::from_secs(2);

/// How a NIC is to be used.
#[derive(Clone, Copy, PartialEq, Debug)]
pub struct Settings {
    /// Rules at most; the device may take fewer.
    pub max_rules: Option<u32>,
    /// Whether a flow may go in although the device treats fragments like all else, if no flow of the port treats them
    /// otherwise. The only way in which a device may differ from the tables.
    pub ignore_fragments: bool,
    /// Packets a second that a flow must have to go into empty tables.
    pub min_rate: f64,
}

impl Default for Settings {
    fn default() -> Self {
        Settings { max_rules: None, ignore_fragments: false, min_rate: MIN_RATE }
    }
}

/// Whether a NIC carries out a flow.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Offloaded {
    /// It does.
    Yes,
    /// It will when there is room.
    Waiting,
    /// It does not.
    No(Reason),
}

impl fmt::Display for Offloaded {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Offloaded::Yes => f.write_str("yes"),
            Offloaded::Waiting => f.write_str("waiting"),
            Offloaded::No(reason) => write!(f, "no ({reason})"),
        }
    }
}

/// How flows stand with NICs.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct FlowsReport {
    /// Flows whose ingress is a port of a NIC, and whether some of what is counted of them was extrapolated.
    pub flows: HashMap<FlowRef, (Offloaded, bool)>,
}

impl FlowsReport {
    /// How a flow stands, and whether its figures are estimates.
    pub fn get(&self, flow: FlowRef) -> (Offloaded, bool) {
        let elsewhere = || (Offloaded::No(Reason::Device(Refusal::Port)), false);
        self.flows.get(&flow).cloned().unwrap_or_else(elsewhere)
    }
}

/// How a NIC stands.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct NicReport {
    /// Its name.
    pub name: String,
    /// Rules in it.
    pub rules: u32,
    /// Rules at most.
    pub max_rules: u32,
    /// Groups in it.
    pub groups: u32,
    /// Operations under way.
    pub operations: u32,
    /// Times that its tables were reset.
    pub resets: u64,
    /// What it has forwarded or dropped by its rules.
    pub carried: Counts,
    /// Whether that was extrapolated.
    pub estimated: bool,
    /// Flows of its ports that wait for room.
    pub waiting: u64,
    /// Flows of its ports that are not in it, by reason.
    pub reasons: BTreeMap<String, u64>,
}

enum Command {
    Add(String, Box<dyn FlowOffload>, Settings),
    Ports(String, PortMap, Sender<()>),
    Remove(String, Sender<()>),
    Report(Sender<Vec<NicReport>>),
    Flows(Sender<FlowsReport>),
    Stop,
}

/// Control's handle to the manager's thread, which ends with it; all rules leave the NICs then.
///
/// The thread locks the tables to carry out a command: who waits for an answer must not hold them. A receiver whose thread
/// is gone gives an error.
pub struct Manager {
    commands: Sender<Command>,
    feed: Arc<Feed>,
    thread: Option<std::thread::JoinHandle<()>>,
}

impl Manager {
    /// Starts the thread, without NICs. To be called before there are flows.
    pub fn start(flows: Arc<Mutex<Flows>>) -> io::Result<Manager> {
        // There is no L2 to hash for.
        let slots = Arc::new(Slots::new(MAX_FLOWS, Hasher::new(0)));
        let feed = Arc::new(Feed::new(slots.clone())?);
        if !flows.lock().unwrap_or_else(PoisonError::into_inner).tell_offload(feed.clone(), slots) {
            return Err(io::Error::other("there are flows already: they would not be counted"));
        }
        let (commands, requests) = channel();
        let mut core = Core::new(flows, feed.clone());
        let followed = feed.clone();
        let thread = std::thread::Builder::new().name("offload".into()).spawn(move || {
            let _alarm = AbortOnPanic("flow offload");
            while execute(&requests, &mut core) {
                let wait = core.round(Instant::now(), clock::millis());
                // At the end of a wait it looks at everything again, so nothing is lost but time if a command comes just now:
                // that rings.
                followed.waker().sleep(wait.as_millis() as u64, || !followed.is_empty());
            }
            core.close(Instant::now());
        })?;
        Ok(Manager { commands, feed, thread: Some(thread) })
    }

    fn send(&self, command: Command) {
        let _ = self.commands.send(command);
        self.feed.waker().ring();
    }

    fn ask<T>(&self, command: impl FnOnce(Sender<T>) -> Command) -> Receiver<T> {
        let (answer, wait) = channel();
        self.send(command(answer));
        wait
    }

    /// A NIC has come; one of the same name goes. Flows go in when it has ports.
    pub fn add_nic(&self, name: &str, device: Box<dyn FlowOffload>, settings: Settings) {
        self.send(Command::Add(name.to_owned(), device, settings));
    }

    /// Which ports of the switch are the NIC's now. It answers when no rule concerns a port that is not among them. Flows of
    /// ports that are already there are looked at anew.
    pub fn set_ports(&self, name: &str, ports: PortMap) -> Receiver<()> {
        self.ask(|done| Command::Ports(name.to_owned(), ports, done))
    }

    /// A NIC goes: it answers when its tables are empty and the device is given up.
    pub fn remove_nic(&self, name: &str) -> Receiver<()> {
        self.ask(|done| Command::Remove(name.to_owned(), done))
    }

    /// How NICs stand; nothing if it does not say so soon.
    pub fn nics(&self) -> Vec<NicReport> {
        self.ask(Command::Report).recv_timeout(PATIENCE).unwrap_or_default()
    }

    /// How flows stand; nothing if it does not say so soon.
    pub fn flows(&self) -> FlowsReport {
        self.ask(Command::Flows).recv_timeout(PATIENCE).unwrap_or_default()
    }
}

// Each waits for the manager's thread only, which takes no lock of a NIC's.
impl FlowTables for Manager {
    fn opened(&self, nic: &str, tables: Box<dyn FlowOffload>, settings: &FlowSettings, ports: PortMap) {
        let &FlowSettings { ignore_fragments, max_rules } = settings;
        self.add_nic(nic, tables, Settings { max_rules, ignore_fragments, ..Settings::default() });
        FlowTables::set_ports(self, nic, ports);
    }

    fn set_ports(&self, nic: &str, ports: PortMap) {
        // An error means that the thread is gone, and the tables with it.
        let _ = self.set_ports(nic, ports).recv();
    }

    fn closed(&self, nic: &str) {
        let _ = self.remove_nic(nic).recv();
    }
}

impl Drop for Manager {
    fn drop(&mut self) {
        self.send(Command::Stop);
        if let Some(thread) = self.thread.take() {
            // It cannot have panicked: that ends the process.
            let _ = thread.join();
        }
    }
}

/// Carries out the commands that are there; `false` ends the thread.
fn execute(requests: &Receiver<Command>, core: &mut Core) -> bool {
    loop {
        let (now, millis) = (Instant::now(), clock::millis());
        // A requester that no longer waits is no error.
        match requests.try_recv() {
            Ok(Command::Add(name, device, settings)) => core.add_nic(name, device, settings, now),
            Ok(Command::Ports(name, ports, done)) => core.set_ports(&name, ports, done, now, millis),
            Ok(Command::Remove(name, done)) => {
                core.remove_nic(&name, now);
                let _ = done.send(());
            }
            Ok(Command::Report(answer)) => {
                let _ = answer.send(core.report());
            }
            Ok(Command::Flows(answer)) => {
                let _ = answer.send(core.flows_report());
            }
            Ok(Command::Stop) | Err(TryRecvError::Disconnected) => return false,
            Err(TryRecvError::Empty) => return true,
        }
    }
}
