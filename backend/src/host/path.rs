//! The host path: the thread that answers what the workers cannot, and the packets that travel to it and back.
//!
//! A packet goes up in a buffer of its worker's pool and comes back in the same buffer with the
//! host's answer, over a pair of SPSC queues for each worker. So nothing is allocated on the way, a queue can never be
//! full (there are no more buffers than places), and the budget of a port is simply how many of its buffers are out.

use super::{Decision, FlowTable, Host, HostPort, Millis};
use crate::wake::{AbortOnPanic, Waker};
use crate::{clock, quiesce};
use log::error;
use rtrb::{Consumer, Producer};
use std::sync::mpsc::{Receiver, Sender, TryRecvError, channel};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use switch_core::action::Action;
use switch_core::compile::Plan;
use switch_core::drop::DropReason;
use switch_core::key::Key;
use switch_core::packet::{Packet, PortId};
use switch_core::parse::extract;

/// A packet outside its guest's memory: on its way to the host and back, or waiting for room in a receive ring.
pub struct HeldPacket {
    /// The head, as received if it goes to the host.
    pub packet: Packet,
    /// Room for the rest of the frame.
    pub tail: Box<[u8]>,
    /// The host's answer; `None` on the way up.
    pub answer: Option<Result<Arc<Plan>, DropReason>>,
    /// Which budget of the port it counts against.
    pub budget: Budget,
}

/// What a port may have on its way to the host at a time, by kind.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[repr(u8)]
pub enum Budget {
    /// Packets without a flow; limited in rate too.
    Miss,
    /// Packets whose flow the host must carry out.
    Punt,
    /// Packets that keep their flow alive.
    KeepAlive,
}

impl Budget {
    /// Packets of one port on their way at a time.
    pub const fn limit(self) -> u32 {
        match self {
            Budget::Miss => 64,
            Budget::Punt => 128,
            Budget::KeepAlive => 16,
        }
    }
}

/// The host thread's ends of the queues to and from one worker.
pub struct HostLink {
    /// What comes up.
    pub from_worker: Consumer<Box<HeldPacket>>,
    /// What goes back.
    pub to_worker: Producer<Box<HeldPacket>>,
    /// Wakes that worker.
    pub worker: quiesce::Waker,
}

enum Command {
    PortAdded(HostPort, Sender<()>),
    PortRemoved(PortId, Sender<()>),
    Sync(Sender<()>),
    Macs(Sender<Vec<(PortId, usize)>>),
    Explain(Box<Key>, PortId, Sender<Vec<Action>>),
    Stop,
}

/// Control's handle to the host-path thread.
pub struct HostPath {
    commands: Sender<Command>,
    waker: Arc<Waker>,
    thread: Option<std::thread::JoinHandle<()>>,
}

impl HostPath {
    /// Starts the thread. `waker` is what the workers ring when they have sent something up.
    pub fn spawn(
        mut host: Box<dyn Host>,
        links: Vec<HostLink>,
        flows: Arc<Mutex<dyn FlowTable + Send>>,
        waker: Arc<Waker>,
    ) -> std::io::Result<HostPath> {
        let (commands, requests) = channel();
        let mut path = Loop { links, flows, requests, next_tick: clock::millis() + TICK };
        let sleeper = waker.clone();
        let thread = std::thread::Builder::new().name("host-path".into()).spawn(move || {
            let _alarm = AbortOnPanic("the host path");
            while path.round(&mut *host, &sleeper) {}
        })?;
        Ok(HostPath { commands, waker, thread: Some(thread) })
    }

    /// Sends a command; the receiver gets its answer. A thread that is gone drops the sender, which the receiver sees.
    fn start<T>(&self, command: impl FnOnce(Sender<T>) -> Command) -> Receiver<T> {
        let (answer, wait) = channel();
        let _ = self.commands.send(command(answer));
        // Before it sleeps the thread looks only at the packets' queues once more, hence not just `wake`.
        self.waker.ring();
        wait
    }

    fn ask<T>(&self, command: impl FnOnce(Sender<T>) -> Command) -> Option<T> {
        self.start(command).recv().ok()
    }

    /// Tells the host of a new port; returns when it knows.
    pub fn port_added(&self, port: HostPort) {
        self.ask(|done| Command::PortAdded(port, done));
    }

    /// Tells the host that a port is gone; returns when it has forgotten it.
    pub fn port_removed(&self, id: PortId) {
        self.ask(|done| Command::PortRemoved(id, done));
    }

    /// Has the host read its source of flows in full; the receiver is told when it has.
    pub fn start_sync(&self) -> Receiver<()> {
        self.start(Command::Sync)
    }

    /// Asks what the host would answer to a packet with this key.
    pub fn start_explain(&self, key: Key, in_port: PortId) -> Receiver<Vec<Action>> {
        self.start(|answer| Command::Explain(Box::new(key), in_port, answer))
    }

    /// MAC addresses known behind each port.
    pub fn macs(&self) -> Vec<(PortId, usize)> {
        self.ask(Command::Macs).unwrap_or_default()
    }
}

impl Drop for HostPath {
    fn drop(&mut self) {
        let _ = self.commands.send(Command::Stop);
        self.waker.ring();
        if let Some(thread) = self.thread.take() {
            // It cannot have panicked: that ends the process.
            let _ = thread.join();
        }
    }
}

fn lock<T: ?Sized>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

const TICK: Millis = 1000;
const BATCH: usize = 64;

struct Loop {
    links: Vec<HostLink>,
    flows: Arc<Mutex<dyn FlowTable + Send>>,
    requests: Receiver<Command>,
    next_tick: Millis,
}

impl Loop {
    /// One round over everything; `false` ends the thread.
    fn round(&mut self, host: &mut dyn Host, waker: &Waker) -> bool {
        let now = clock::millis();
        let mut busy = false;
        for link in &mut self.links {
            busy |= answer(link, host, &self.flows, now);
        }
        match self.requests.try_recv() {
            Ok(Command::Stop) | Err(TryRecvError::Disconnected) => return false,
            Ok(command) => {
                busy = true;
                self.execute(command, host, now);
            }
            Err(TryRecvError::Empty) => {}
        }
        if now >= self.next_tick {
            self.next_tick = now + TICK;
            host.tick(now, &mut *lock(&self.flows));
        }
        if !busy {
            waker.sleep(self.next_tick.saturating_sub(now), || {
                self.links.iter().any(|l| !l.from_worker.is_empty())
            });
        }
        true
    }

    fn execute(&mut self, command: Command, host: &mut dyn Host, now: Millis) {
        let mut flows = lock(&self.flows);
        // A requester that no longer waits is no error.
        match command {
            Command::PortAdded(port, done) => {
                host.port_added(port, &mut *flows);
                let _ = done.send(());
            }
            Command::PortRemoved(id, done) => {
                host.port_removed(id, &mut *flows);
                let _ = done.send(());
            }
            Command::Sync(done) => {
                host.sync(now, &mut *flows);
                let _ = done.send(());
            }
            Command::Macs(answer) => {
                let _ = answer.send(host.macs());
            }
            Command::Explain(key, in_port, answer) => {
                let _ = answer.send(host.explain(&key, in_port));
            }
            Command::Stop => {}
        }
    }
}

/// Answers a batch of one worker's packets; whether there were any.
fn answer(
    link: &mut HostLink,
    host: &mut dyn Host,
    flows: &Mutex<dyn FlowTable + Send>,
    now: Millis,
) -> bool {
    if link.from_worker.is_empty() {
        return false;
    }
    let mut flows = lock(flows);
    for _ in 0..BATCH {
        let Ok(mut held) = link.from_worker.pop() else { break };
        let mut key = Key::default();
        // Headers longer than the snapshot leave a key without them, which is all that the host goes by.
        let _ = extract(&mut held.packet, &mut key);
        held.answer = Some(match host.packet(&key, held.packet.in_port, now, &mut *flows) {
            Decision::Execute(plan) => Ok(plan),
            Decision::Drop(reason) => Err(reason),
        });
        if link.to_worker.push(held).is_err() {
            error!("host path: a queue is full that cannot be; a packet is lost");
        }
    }
    drop(flows);
    link.worker.wake();
    true
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::{Duration, Instant};
    use switch_core::flow::{FlowRef, FlowSpec, Source};
    use switch_core::planner::PlanError;

    struct Nothing;

    impl FlowTable for Nothing {
        fn put(&mut self, _: Source, _: FlowSpec) -> Result<FlowRef, PlanError> {
            Ok(FlowRef::default())
        }

        fn delete(&mut self, _: FlowRef) {}

        fn last_used(&self, _: FlowRef) -> Millis {
            0
        }
    }

    #[test]
    fn no_question_waits_for_the_next_tick() {
        let bridge = Box::new(crate::host::bridge::Bridge::new(1000, 10));
        let waker = Arc::new(Waker::new().unwrap());
        let host = HostPath::spawn(bridge, Vec::new(), Arc::new(Mutex::new(Nothing)), waker).unwrap();
        let mut slowest = Duration::ZERO;
        for i in 0..10_000 {
            let asked = Instant::now();
            let answer = host.start_sync();
            while answer.try_recv().is_err() {
                std::hint::spin_loop();
            }
            slowest = slowest.max(asked.elapsed());
            // The next question comes at some moment of the thread's way to sleep.
            (0..i % 1000).for_each(|_| std::hint::spin_loop());
        }
        assert!(slowest < Duration::from_millis(400), "{slowest:?}: a wake-up was lost");
    }
}
