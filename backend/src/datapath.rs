//! The datapath as control sees it: its workers, what they are told, and when they have done it.

use crate::counters::{PortCounters, WorkerCounters};
use crate::flows::{Flows, MAX_FLOWS};
use crate::frames::pool::BUFFERS;
use crate::host::path::{HeldPacket, HostEnds, HostLink};
use crate::host::representors::down::DownLink;
use crate::quiesce::progress::has_carried_out;
use crate::quiesce::{Quiescence, Waker as WorkerWaker};
use crate::wake::Waker;
use crate::worker::handover::{Handover, Stage};
use crate::worker::io::Io;
use crate::worker::kicks::Kicks;
use crate::worker::port::{NewPort, Steering, WorkerPort};
use crate::worker::rings::Rings;
use crate::worker::{Command, Links, MAX_PORTS, PATIENCE_MICROS, Waste, Worker};
use crate::{clock, numa, worker};
use rtrb::{Consumer, Producer, RingBuffer};
use std::io;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use switch_core::l1::L1Config;
use switch_core::packet::PortId;
use switch_core::pipeline::{Switch, SwitchConfig};
use switch_core::planner::PlanError;
use switch_core::slab::Slots;
use switch_core::tables::Retired;

/// How long a packet's L1 entry says that the host has been asked. The host answers within a millisecond; where it has
/// no room for a flow, this lets some hundred packets a second of each through.
const PENDING_MILLIS: u64 = 10;
/// A step of an L1 entry's age.
const L1_AGE_MILLIS: u64 = 1000;

/// Changes that may wait for a worker.
const COMMANDS: usize = 8192;

/// Control's ends of the queues to one worker. What a worker gives back is freed here.
pub struct WorkerFeed {
    /// What is to be read of the worker's flows.
    pub(crate) slots: Arc<Slots>,
    /// NUMA node of its processor, where there are several nodes.
    pub(crate) node: Option<u32>,
    commands: Producer<Command>,
    waste: Consumer<Waste>,
    sent: u64,
    applied: Arc<AtomicU64>,
    waker: WorkerWaker,
}

impl WorkerFeed {
    /// A feed to a worker that a test plays: what it takes, and where it says how much it has applied.
    #[cfg(test)]
    pub fn played(slots: Arc<Slots>, waker: WorkerWaker) -> (WorkerFeed, Consumer<Command>, Arc<AtomicU64>) {
        let (commands, taken) = RingBuffer::new(COMMANDS);
        let (_, waste) = RingBuffer::new(1);
        let applied = Arc::new(AtomicU64::new(0));
        let feed =
            WorkerFeed { slots, node: None, commands, waste, sent: 0, applied: applied.clone(), waker };
        (feed, taken, applied)
    }

    /// Sends a change; waits for room if the worker is that far behind. To one that has ended it goes nowhere.
    pub fn send(&mut self, command: Command) {
        let mut command = command;
        loop {
            while self.waste.pop().is_ok() {}
            if self.commands.is_abandoned() {
                return;
            }
            match self.commands.push(command) {
                Ok(()) => break,
                Err(rtrb::PushError::Full(back)) => command = back,
            }
            self.waker.wake();
            std::thread::yield_now();
        }
        self.sent += 1;
    }

    /// Wakes the worker to what was sent.
    pub fn flush(&mut self) {
        while self.waste.pop().is_ok() {}
        self.waker.wake();
    }

    /// Where the worker will be when it has applied all that was sent.
    pub fn mark(&self) -> Mark {
        Mark { target: self.sent, applied: self.applied.clone(), is_worker: true }
    }
}

/// A point in the changes sent to one worker, or to NICs.
pub struct Mark {
    target: u64,
    applied: Arc<AtomicU64>,
    is_worker: bool,
}

impl Mark {
    /// The point at which NICs have followed `target` changes.
    pub fn of_nics(target: u64, applied: Arc<AtomicU64>) -> Mark {
        Mark { target, applied, is_worker: false }
    }

    /// Whether it is a worker that is to come so far.
    pub fn is_worker(&self) -> bool {
        self.is_worker
    }

    /// Whether the worker has come that far.
    pub fn is_reached(&self) -> bool {
        has_carried_out(&self.applied, self.target)
    }
}

/// A worker's thread.
struct Thread {
    handle: JoinHandle<()>,
    waker: WorkerWaker,
}

/// The workers and what belongs to all of them.
pub struct Datapath {
    /// Flow tables, and the feeds to the workers.
    pub flows: Arc<Mutex<Flows>>,
    /// Workers' processors, by worker.
    pub cpus: Vec<Option<usize>>,
    /// What the workers do with their time.
    pub worker_counters: Vec<Arc<WorkerCounters>>,
    /// Memory of each worker that no port has alone, in bytes.
    pub worker_bytes: Vec<u64>,
    /// For ports to register their ring changes with.
    pub quiescence: Arc<Quiescence>,
    /// L1 entries that one port may have in each worker: all but a quarter, so that no port shuts all others out.
    l1_quota: u32,
    threads: Vec<Thread>,
    stop: Arc<AtomicBool>,
    /// By slot: the generation of the port that has it, or had it last, and whether it is taken.
    slots: Vec<(u32, bool)>,
}

/// What control keeps of a port in the datapath.
pub struct DatapathPort {
    /// Identity.
    pub id: PortId,
    /// Counters, one for each worker.
    pub counters: Vec<Arc<PortCounters>>,
    /// Which worker polls which of its queue pairs.
    pub polled_by: Vec<usize>,
    handover: Arc<Handover>,
}

impl Datapath {
    /// Starts one worker for each entry of `cpus`, or one that is not pinned. Gives also what the host path needs.
    /// `misses` packets of a flow without an answer yet go to the host in each 10 ms.
    pub fn start(cpus: &[usize], l1_entries: usize, misses: u32) -> io::Result<(Datapath, HostEnds)> {
        let cpus: Vec<Option<usize>> =
            if cpus.is_empty() { vec![None] } else { cpus.iter().copied().map(Some).collect() };
        let host = Arc::new(Waker::new()?);
        let quiescence = Arc::new(Quiescence::new());
        let stop = Arc::new(AtomicBool::new(false));
        clock::cycles_per_micro();
        let (mut feeds, mut threads, mut links, mut down, mut counters, mut bytes) =
            (Vec::new(), Vec::new(), Vec::new(), Vec::new(), Vec::new(), Vec::new());
        for (index, &cpu) in cpus.iter().enumerate() {
            let epoch = quiescence.register(&index.to_string())?;
            let waker = epoch.waker();
            let (commands, commands_in) = RingBuffer::new(COMMANDS);
            // A command leaves at most one thing behind, and a step of growth one more.
            let (waste_out, waste) = touched(2 * COMMANDS, || Waste::Table(Retired::default()));
            let (to_host, from_worker) = RingBuffer::<Box<HeldPacket>>::new(BUFFERS);
            let (to_worker, from_host) = RingBuffer::new(BUFFERS);
            let (deliver, deliveries) = RingBuffer::new(BUFFERS);
            let (delivered, returned) = RingBuffer::new(BUFFERS);
            let applied = Arc::new(AtomicU64::new(0));
            let worker_counters = Arc::new(WorkerCounters::default());
            let io = Io::new(
                PATIENCE_MICROS * clock::cycles_per_micro(),
                to_host,
                host.clone(),
                Kicks::new(&epoch)?,
            );
            let switch = Switch::new(SwitchConfig {
                l1: L1Config {
                    capacity: l1_entries,
                    ports: MAX_PORTS,
                    pending_ticks: PENDING_MILLIS,
                    pending_misses: misses,
                    age_ticks: L1_AGE_MILLIS,
                },
                flows: MAX_FLOWS,
                seed: seed(),
            });
            let slots = switch.slots().clone();
            let worker = Worker::new(
                switch,
                io,
                Links {
                    commands: commands_in,
                    waste: waste_out,
                    from_host,
                    deliveries,
                    delivered,
                    epoch,
                    applied: applied.clone(),
                    stop: stop.clone(),
                    counters: worker_counters.clone(),
                },
                clock::cycles_per_micro(),
            );
            let node = cpu.filter(|_| numa::has_several()).and_then(numa::node_of);
            bytes.push(worker.bytes());
            feeds.push(WorkerFeed { slots, node, commands, waste, sent: 0, applied, waker: waker.clone() });
            links.push(HostLink { from_worker, to_worker, worker: waker.clone(), due: false });
            down.push(DownLink::new(deliver, returned, waker.clone()));
            counters.push(worker_counters);
            threads.push(Thread { handle: worker::start(index, cpu, worker)?, waker });
        }
        let datapath = Datapath {
            flows: Arc::new(Mutex::new(Flows::new(feeds, seed()))),
            cpus,
            worker_counters: counters,
            worker_bytes: bytes,
            quiescence,
            l1_quota: (l1_entries / 4 * 3) as u32,
            threads,
            stop,
            slots: vec![(0, false); MAX_PORTS],
        };
        Ok((datapath, HostEnds { links, down, waker: host }))
    }

    /// Takes a slot for a new port. `None`: there are [`MAX_PORTS`] ports already.
    pub fn reserve_slot(&mut self) -> Option<PortId> {
        let slot = self.slots.iter().position(|(_, taken)| !taken)?;
        let (generation, taken) = &mut self.slots[slot];
        *generation += 1;
        *taken = true;
        Some(PortId { slot: slot as u32, generation: *generation })
    }

    /// Gives a slot back whose port no worker has any more.
    pub fn release_slot(&mut self, id: PortId) {
        if let Some((generation, taken)) = self.slots.get_mut(id.slot as usize)
            && *generation == id.generation
        {
            *taken = false;
        }
    }

    /// Gives a port to the workers.
    pub fn add_port(
        &mut self,
        id: PortId,
        rings: &Rings,
        settings: PortSettings,
    ) -> Result<DatapathPort, PlanError> {
        let PortSettings { polled_by, .. } = settings;
        let (steering, handover) = (Arc::new(Steering::default()), Arc::new(Handover::default()));
        let mut flows = self.flows.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
        let counters = flows.add_port(id, settings.max_masks, self.l1_quota, |index| {
            Box::new(WorkerPort::new(NewPort {
                id,
                name: settings.name.into(),
                rings: rings.clone(),
                queues: polled_by.len(),
                polled: (0..polled_by.len()).filter(|&q| polled_by[q] == index).collect(),
                mtu: settings.mtu,
                miss_rate: settings.miss_rate,
                steering: steering.clone(),
                handover: handover.clone(),
            }))
        })?;
        Ok(DatapathPort { id, counters, polled_by: polled_by.to_vec(), handover })
    }

    /// Gives the workers the table of a tunnel's logical port.
    pub fn add_tunnel(&mut self, id: PortId, max_masks: usize) -> Result<(), PlanError> {
        let mut flows = self.flows.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
        flows.add_tunnel(id, max_masks, self.l1_quota)
    }

    /// Begins to move a queue pair to another worker. [`Datapath::go_on`] is to be called until it is done; a port has one
    /// move at a time.
    pub fn begin_move(&self, port: &DatapathPort, queue: usize, to: usize) -> QueueMove {
        let (id, from) = (port.id, port.polled_by.get(queue).copied().unwrap_or_default());
        port.handover.begin();
        let mut flows = self.flows.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
        flows.command(from, Command::ReleaseQueue(id, queue));
        QueueMove { id, queue, from, to }
    }

    /// Goes on with a move; never waits.
    pub fn go_on(&self, port: &mut DatapathPort, step: QueueMove) -> Moved {
        match port.handover.stage() {
            Stage::Asked => Moved::NotYet,
            Stage::Kept | Stage::Idle => {
                port.handover.end();
                Moved::Kept
            }
            Stage::Free => {
                let debt = port.handover.end();
                // Behind all that the first worker has applied: whoever sends it holds the lock over all workers.
                let mut flows = self.flows.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
                flows.command(step.to, Command::TakeQueue(step.id, step.queue, debt));
                if let Some(worker) = port.polled_by.get_mut(step.queue) {
                    *worker = step.to;
                }
                Moved::Done
            }
        }
    }

    /// Ends the workers; their memory is freed here.
    pub fn stop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        self.quiescence.publish();
        for Thread { handle, waker } in self.threads.drain(..) {
            waker.wake();
            // It cannot have panicked: that ends the process.
            let _ = handle.join();
        }
    }
}

impl Drop for Datapath {
    fn drop(&mut self) {
        self.stop();
    }
}

/// A queue pair on its way from one worker to another.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct QueueMove {
    /// The port.
    pub id: PortId,
    /// Index of the queue pair.
    pub queue: usize,
    /// The worker that polls it.
    pub from: usize,
    /// The worker that is to poll it.
    pub to: usize,
}

/// How a move stands.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Moved {
    /// Packets that were taken before are still on their way.
    NotYet,
    /// They took too long: the queue stays where it was.
    Kept,
    /// The other worker has been told to take it.
    Done,
}

/// What a port is like, for the workers.
pub struct PortSettings<'a> {
    /// Name.
    pub name: &'a str,
    /// Which worker is to poll which of its queue pairs.
    pub polled_by: &'a [usize],
    /// MTU for the guest.
    pub mtu: u32,
    /// Masks that its flows may have.
    pub max_masks: usize,
    /// Misses a second.
    pub miss_rate: u32,
}

/// A queue of that capacity whose memory was used once, so that its producer, a worker, waits for no page of it.
fn touched<T>(capacity: usize, value: impl Fn() -> T) -> (Producer<T>, Consumer<T>) {
    let (mut producer, mut consumer) = RingBuffer::new(capacity);
    while producer.push(value()).is_ok() {}
    while consumer.pop().is_ok() {}
    (producer, consumer)
}

/// A hash seed that guests cannot know: the standard library's per-process random keys, read through a hasher.
fn seed() -> u64 {
    use std::hash::{BuildHasher, RandomState};
    RandomState::new().hash_one(0)
}
