//! The mirror: keeps the tables in step with OVS's datapath.
//!
//! `state` knows what the datapath has and what the tables have of it; `keepalive` decides which flows OVS is to see
//! alive; `follow` reads the source, takes its events, and outlives its absence. None of them has a thread or a clock of
//! its own: those are here. OVS owns the flows: none is made here, none aged, none kept that OVS has deleted.

mod classes;
mod follow;
pub(crate) mod keepalive;
mod packed;
mod ports;
mod state;
#[cfg(test)]
mod testing;
#[cfg(test)]
mod tests;

use super::source::{FlowSource, Unreadable};
use crate::clock;
use crate::datapath::Mark;
use crate::flows::Flows;
use crate::host::{FlowTable, Millis};
use crate::wake::{AbortOnPanic, Waker};
use follow::Follower;
pub use keepalive::Rates;
pub use ports::{MirrorPort, PortKind, Restriction};
use rustix::time::{ClockId, clock_gettime};
use std::collections::BTreeMap;
use std::io;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, Sender, TryRecvError, channel};
use std::sync::{Arc, Mutex};
use std::time::Duration;
use switch_core::flow::{FlowRef, FlowSpec};
use switch_core::slab::{Disposition, FlowCounters};
use switch_core::tunnel::Endpoint;

/// What the mirror needs of the tables.
pub trait MirrorTable: FlowTable {
    /// Why the host carries out the flow's packets, if it does.
    fn punted(&self, flow: FlowRef) -> Option<String>;
    /// What is decapsulated of the flow's packets.
    fn endpoints(&self, _: FlowRef) -> &[Endpoint] {
        &[]
    }
    /// The flow's statistics, by worker, by which also a keep-alive is asked for; none if it is gone.
    fn counters(&self, flow: FlowRef) -> &[FlowCounters];
    /// Where the workers will be when they have all that was put and deleted so far.
    fn marks(&self) -> Vec<Mark>;
}

impl MirrorTable for Flows {
    fn punted(&self, flow: FlowRef) -> Option<String> {
        match &self.get(flow)?.disposition {
            Disposition::Fast(_) => None,
            Disposition::Punt(reason) => Some(reason.to_string()),
        }
    }

    fn endpoints(&self, flow: FlowRef) -> &[Endpoint] {
        match self.get(flow).map(|flow| &flow.disposition) {
            Some(Disposition::Fast(plan)) => plan.endpoints().unwrap_or_default(),
            _ => &[],
        }
    }

    fn counters(&self, flow: FlowRef) -> &[FlowCounters] {
        self.get(flow).map_or(&[], |flow| &flow.counters)
    }

    fn marks(&self) -> Vec<Mark> {
        Flows::marks(self)
    }
}

/// How flows are kept alive.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Settings {
    /// OVS's `other_config:max-idle`: milliseconds without a packet after which it drops a flow.
    pub max_idle: Millis,
    /// Keep-alives a second, of one port at most.
    pub port_rate: u32,
    /// Keep-alives a second, of all ports at most.
    pub total_rate: u32,
}

impl Default for Settings {
    fn default() -> Self {
        Settings { max_idle: 10_000, port_rate: 2000, total_rate: 10_000 }
    }
}

/// Word from the host path that packets have missed: there will be flows to be read. A source that tells of them by itself
/// needs none, one that must be asked is asked soon.
pub struct Misses {
    told: AtomicBool,
    waker: Arc<Waker>,
}

impl Misses {
    /// For a mirror, and for who sends packets up.
    pub fn new() -> io::Result<Misses> {
        Ok(Misses { told: AtomicBool::new(false), waker: Arc::new(Waker::new()?) })
    }

    /// A packet has missed and is on its way to OVS.
    pub fn tell(&self) {
        if !self.told.swap(true, Ordering::Relaxed) {
            self.waker.ring();
        }
    }

    /// Whether packets have missed since the last call.
    fn take(&self) -> bool {
        self.told.swap(false, Ordering::Relaxed)
    }
}

/// Flows of a kind that a report lists; it counts all.
const MAX_LISTED: usize = 1000;

/// A flow of the datapath that the tables do not have.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Refused {
    /// The flow.
    pub spec: FlowSpec,
    /// Why not.
    pub reason: String,
}

/// How the mirror stands.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct MirrorReport {
    /// What it reads, for people.
    pub source: String,
    /// Why it cannot read it at present.
    pub error: Option<String>,
    /// How long ago everything was read; none if it never was.
    pub since_full: Option<Duration>,
    /// Reads of everything.
    pub full_reads: u64,
    /// How often the source asked to be read again, lost events included.
    pub resyncs: u64,
    /// How often events were lost because they came faster than they were taken.
    pub lost_events: u64,
    /// Flows in the tables.
    pub flows: usize,
    /// Those of them that are forwarded here.
    pub fast: usize,
    /// Those that the host carries out, by reason.
    pub punts: BTreeMap<String, usize>,
    /// Flows whose match is not understood.
    pub unreadable: usize,
    /// The first thousand of them.
    pub unreadable_flows: Vec<Unreadable>,
    /// Flows that the tables refuse.
    pub refused: usize,
    /// The first thousand of them.
    pub refused_flows: Vec<Refused>,
    /// Keep-alives, in the last third of `max-idle`.
    pub keepalive: Rates,
    /// Flows whose keep-alives are beyond the budget.
    pub given_up: usize,
}

enum Command {
    Ports(Vec<MirrorPort>, Sender<()>),
    Slow(Option<String>, Sender<()>),
    Sync(Sender<Result<usize, String>>),
    Report(Sender<MirrorReport>),
    Settings(Settings),
    Reconsider,
    Stop,
}

/// Control's handle to the mirror's thread, which ends with it.
///
/// The thread locks the tables to carry out a command: who waits for an answer must not hold them. A receiver whose thread
/// is gone gives an error.
pub struct Mirror {
    commands: Sender<Command>,
    waker: Arc<Waker>,
    /// See [`FlowSource::ender`].
    ender: Option<Box<dyn Fn() + Send>>,
    thread: Option<std::thread::JoinHandle<()>>,
}

impl Mirror {
    /// Starts the thread. There are no flows before [`Mirror::start_ports`].
    pub fn spawn(
        source: Box<dyn FlowSource>,
        flows: Arc<Mutex<Flows>>,
        settings: Settings,
        misses: Arc<Misses>,
    ) -> io::Result<Mirror> {
        let waker = misses.waker.clone();
        let ender = source.ender();
        let (commands, requests) = channel();
        let mut follower =
            Follower::new(source, flows, settings, Box::new(clock::millis), Box::new(cpu_time));
        let sleeper = waker.clone();
        let thread = std::thread::Builder::new().name("mirror".into()).spawn(move || {
            let _alarm = AbortOnPanic("the mirror");
            while execute(&requests, &mut follower) {
                if misses.take() {
                    follower.expect_flows();
                }
                let timeout = follower.round(&sleeper);
                follower.wait(&sleeper, timeout);
            }
        })?;
        Ok(Mirror { commands, waker, ender, thread: Some(thread) })
    }

    fn send(&self, command: Command) {
        let _ = self.commands.send(command);
        self.waker.ring();
    }

    fn start<T>(&self, command: impl FnOnce(Sender<T>) -> Command) -> Receiver<T> {
        let (answer, wait) = channel();
        self.send(command(answer));
        wait
    }

    /// Tells it all ports that there are and what restricts them. When it answers, the tables have no flow from or to a port
    /// that is not among them, and restrictions are in force. Flows of new ports follow.
    pub fn start_ports(&self, ports: Vec<MirrorPort>) -> Receiver<()> {
        self.start(|done| Command::Ports(ports, done))
    }

    /// Has every flow carried out by the host for that reason, or ends that. It answers when the tables say so.
    pub fn start_slow(&self, reason: Option<String>) -> Receiver<()> {
        self.start(|done| Command::Slow(reason, done))
    }

    /// Reads everything anew. It answers when the tables are in step with the datapath as it was at the call or later, by
    /// the number of flows in them; or why it could not be read.
    pub fn start_sync(&self) -> Receiver<Result<usize, String>> {
        self.start(Command::Sync)
    }

    /// Asks how it stands.
    pub fn start_report(&self) -> Receiver<MirrorReport> {
        self.start(Command::Report)
    }

    /// Has the flows compiled anew that have to do with tunnels: their ways have changed.
    pub fn reconsider(&self) {
        self.send(Command::Reconsider);
    }

    /// Has flows kept alive in another way from now on.
    pub fn set(&self, settings: Settings) {
        self.send(Command::Settings(settings));
    }
}

impl Drop for Mirror {
    fn drop(&mut self) {
        self.send(Command::Stop);
        // An ovs-vswitchd that hangs must not hold up whoever ends this.
        if let Some(end) = &self.ender {
            end();
        }
        if let Some(thread) = self.thread.take() {
            // It cannot have panicked: that ends the process.
            let _ = thread.join();
        }
    }
}

/// What this thread has had of a processor.
fn cpu_time() -> Duration {
    let time = clock_gettime(ClockId::ThreadCPUTime);
    Duration::new(time.tv_sec as u64, time.tv_nsec as u32)
}

/// Carries out the commands that are there; `false` ends the thread.
fn execute(requests: &Receiver<Command>, follower: &mut Follower) -> bool {
    loop {
        // A requester that no longer waits is no error.
        match requests.try_recv() {
            Ok(Command::Ports(ports, done)) => {
                follower.set_ports(ports);
                let _ = done.send(());
            }
            Ok(Command::Slow(reason, done)) => {
                follower.set_slow(reason);
                let _ = done.send(());
            }
            Ok(Command::Sync(answer)) => follower.sync(answer),
            Ok(Command::Report(answer)) => {
                let _ = answer.send(follower.report());
            }
            Ok(Command::Settings(settings)) => follower.set(settings),
            Ok(Command::Reconsider) => follower.reconsider(),
            Ok(Command::Stop) | Err(TryRecvError::Disconnected) => return false,
            Err(TryRecvError::Empty) => return true,
        }
    }
}
