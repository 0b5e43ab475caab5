//! The host path: the thread that answers what the workers cannot, and the packets that travel to it and back.
//!
//! A packet goes up in a buffer of its worker's pool and comes back in the same buffer with the
//! host's answer, over a pair of SPSC queues for each worker. So nothing is allocated on the way, a queue can never be
//! full (there are no more buffers than places), and the budget of a port is simply how many of its buffers are out.

use super::representors::{self, down::DownLink};
use super::waiting::Waiting;
use super::{Decision, FlowTable, Host, HostError, HostPort, Millis, Served};
use crate::wake::{AbortOnPanic, Waker};
use crate::{clock, quiesce};
use log::error;
use rtrb::{Consumer, Producer};
use std::sync::mpsc::{Receiver, Sender, TryRecvError, channel};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use switch_core::action::Action;
use switch_core::drop::DropReason;
use switch_core::flow::{FlowRef, FlowSpec, Source};
use switch_core::key::Key;
use switch_core::packet::{Offload, Packet, PortId};
use switch_core::parse::{Extracted, extract};
use switch_core::planner::PlanError;
use switch_core::{checksum, offload};

/// A packet outside its guest's memory: on its way to the host and back, or waiting for room in a receive ring.
pub struct HeldPacket {
    /// The head, as received if it goes to the host.
    pub packet: Packet,
    /// Room for the rest of the frame.
    pub tail: Box<[u8]>,
    /// The host's answer; `None` on the way up.
    pub answer: Option<Decision>,
    /// Which budget of the port it counts against.
    pub budget: Budget,
    /// The queue pair that it came by, on the way up: what the answer costs is counted there.
    pub queue: u8,
}

impl HeldPacket {
    /// Completes a partial checksum; does nothing unless `packet.offload` asks for it. Fails if it is not inside the frame.
    pub fn finish_checksum(&mut self) -> Result<(), DropReason> {
        let asked = self.packet.offload;
        if !asked.needs_csum {
            return Ok(());
        }
        let (start, end) = (asked.csum_start as usize, self.packet.len as usize);
        let tail_len = self.packet.tail_len() as usize;
        let tail = self.tail.get_mut(..tail_len).ok_or(DropReason::BadOffload)?;
        let head = self.packet.head_mut();
        let split = head.len();
        let field = start + asked.csum_offset as usize;
        if field + 2 > end {
            return Err(DropReason::BadOffload);
        }
        let first = head.get(start..).unwrap_or_default();
        let rest = &tail[start.saturating_sub(split).min(tail_len)..];
        let rest_sum = checksum::fold(checksum::add(0, rest));
        // Behind an odd number of bytes the others have changed places (RFC 1071 §2(B)).
        let rest_sum = if first.len() % 2 == 1 { rest_sum.swap_bytes() } else { rest_sum };
        let sum = offload::checksum_field(!checksum::fold(checksum::add(rest_sum.into(), first)));
        for (at, byte) in (field..).zip(sum.to_be_bytes()) {
            match head.get_mut(at) {
                Some(place) => *place = byte,
                None => tail[at - split] = byte,
            }
        }
        self.packet.offload = Offload::default();
        Ok(())
    }
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
    /// Something went back since it was woken last.
    pub due: bool,
}

/// What the host path needs of the workers.
pub struct HostEnds {
    /// For packets that come up and go back with an answer.
    pub links: Vec<HostLink>,
    /// For what representors have for guests; by worker, too.
    pub down: Vec<DownLink>,
    /// What the workers ring when they have sent something.
    pub waker: Arc<Waker>,
}

enum Command {
    PortAdded(HostPort, Sender<Result<(), HostError>>),
    PortRemoved(PortId, bool, Sender<()>),
    LinkChanged(PortId, bool),
    Datapath(representors::Settings),
    Sync(Sender<()>),
    Macs(Sender<Vec<(PortId, usize)>>),
    Losing(Sender<Vec<(PortId, String)>>),
    Explain(Box<Key>, PortId, Sender<Option<Vec<Action>>>),
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
        let mut path =
            Loop { links, waiting: Waiting::default(), flows, requests, next_tick: clock::millis() + TICK };
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
    pub fn port_added(&self, port: HostPort) -> Result<(), HostError> {
        let gone = || Err(HostError("the host path has ended".into()));
        self.ask(|done| Command::PortAdded(port, done)).unwrap_or_else(gone)
    }

    /// Gives what tells the host when the link of this port's guest comes up or goes down, on any thread.
    pub fn link_teller(&self, id: PortId) -> impl Fn(bool) + Send + Sync + use<> {
        let (commands, waker) = (self.commands.clone(), self.waker.clone());
        move |up| {
            let _ = commands.send(Command::LinkChanged(id, up));
            waker.ring();
        }
    }

    /// Tells the host of which kind OVS's datapath is.
    pub fn set_datapath(&self, settings: representors::Settings) {
        let _ = self.commands.send(Command::Datapath(settings));
        self.waker.ring();
    }

    /// Tells the host that a port is gone; returns when it has forgotten it. See [`Host::port_removed`].
    pub fn port_removed(&self, id: PortId, returns: bool) {
        self.ask(|done| Command::PortRemoved(id, returns, done));
    }

    /// Has the host read its source of flows in full; the receiver is told when it has.
    pub fn start_sync(&self) -> Receiver<()> {
        self.start(Command::Sync)
    }

    /// Asks what the host would answer to a packet with this key.
    pub fn start_explain(&self, key: Key, in_port: PortId) -> Receiver<Option<Vec<Action>>> {
        self.start(|answer| Command::Explain(Box::new(key), in_port, answer))
    }

    /// Ports of which the last packet for the host was lost, and why.
    pub fn losing(&self) -> Vec<(PortId, String)> {
        self.ask(Command::Losing).unwrap_or_default()
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
/// Packets answered in one round.
const BATCH: usize = 64;

/// The flows, locked for each call alone: what a host does besides is not to hold up others.
struct Unlocked<'a>(&'a Mutex<dyn FlowTable + Send>);

impl FlowTable for Unlocked<'_> {
    fn put(&mut self, source: Source, spec: FlowSpec) -> Result<FlowRef, PlanError> {
        lock(self.0).put(source, spec)
    }

    fn delete(&mut self, flow: FlowRef) {
        lock(self.0).delete(flow);
    }

    fn last_used(&self, flow: FlowRef) -> Millis {
        lock(self.0).last_used(flow)
    }
}

struct Loop {
    links: Vec<HostLink>,
    waiting: Waiting,
    flows: Arc<Mutex<dyn FlowTable + Send>>,
    requests: Receiver<Command>,
    next_tick: Millis,
}

impl Loop {
    /// One round over everything; `false` ends the thread.
    fn round(&mut self, host: &mut dyn Host, waker: &Waker) -> bool {
        let now = clock::millis();
        waker.poll().into_iter().for_each(|token| host.readable(token));
        let mut busy = self.answer(host, now);
        let served = host.serve();
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
            host.tick(now, &mut Unlocked(&*self.flows));
        }
        if !busy && served != Served::Busy {
            let short = served == Served::Short;
            let ready = waker.sleep_watching(self.next_tick.saturating_sub(now), short, || {
                self.links.iter().any(|l| !l.from_worker.is_empty()) || short && host.has_buffers_back()
            });
            ready.into_iter().for_each(|token| host.readable(token));
        }
        true
    }

    /// Answers a batch of packets; whether there were any.
    fn answer(&mut self, host: &mut dyn Host, now: Millis) -> bool {
        for (from, link) in self.links.iter_mut().enumerate() {
            while let Ok(held) = link.from_worker.pop() {
                self.waiting.push(from, held);
            }
        }
        let busy = !self.waiting.is_empty();
        for _ in 0..BATCH {
            let Some((from, mut held)) = self.waiting.pop() else { break };
            held.answer = Some(decide(&mut held, host, now, &mut Unlocked(&*self.flows)));
            let link = &mut self.links[from];
            link.due = true;
            if link.to_worker.push(held).is_err() {
                error!("host path: a queue is full that cannot be; a packet is lost");
            }
        }
        for link in &mut self.links {
            if std::mem::take(&mut link.due) {
                link.worker.wake();
            }
        }
        busy
    }

    fn execute(&mut self, command: Command, host: &mut dyn Host, now: Millis) {
        let flows = &mut Unlocked(&*self.flows);
        // A requester that no longer waits is no error.
        match command {
            Command::PortAdded(port, done) => {
                let _ = done.send(host.port_added(port, flows));
            }
            Command::PortRemoved(id, returns, done) => {
                host.port_removed(id, returns, flows);
                let _ = done.send(());
            }
            Command::LinkChanged(id, up) => host.link_changed(id, up),
            Command::Datapath(settings) => host.set_datapath(settings),
            Command::Sync(done) => {
                host.sync(now, flows);
                let _ = done.send(());
            }
            Command::Losing(answer) => {
                let _ = answer.send(host.losing());
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

/// Asks the host about a packet.
fn decide(held: &mut HeldPacket, host: &mut dyn Host, now: Millis, flows: &mut dyn FlowTable) -> Decision {
    let mut key = Key::default();
    if extract(&mut held.packet, &mut key) != Extracted::Done && held.packet.offload.needs_csum {
        // Whatever its sender means by these offsets, the host goes by what receivers will see.
        if let Err(reason) = held.finish_checksum() {
            return Decision::Drop(reason);
        }
        // Headers longer than the snapshot leave a key without them, which is all that the host goes by.
        let _ = extract(&mut held.packet, &mut key);
    }
    let tail = &held.tail[..held.packet.tail_len() as usize];
    let decision = host.packet(&held.packet, tail, &key, now, flows);
    if held.budget == Budget::Miss {
        host.missed();
    }
    decision
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::time::{Duration, Instant};

    proptest! {
        #[test]
        fn a_checksum_is_completed_wherever_it_lies(
            frame in proptest::collection::vec(any::<u8>(), 14..1200),
            head in 14usize..1024,
            csum_start in 14u16..1200,
            csum_offset in 0u16..1200,
        ) {
            let mut packet = Packet::default();
            let head = packet.reset(PortId { slot: 0, generation: 1 }, frame.len() as u32, head);
            let n = head.len();
            head.copy_from_slice(&frame[..n]);
            packet.offload = Offload { needs_csum: true, csum_start, csum_offset, ..Offload::default() };
            let mut expected = frame.clone();
            let done = offload::finish_checksum(&mut expected, &packet.offload);
            let tail = frame[n..].into();
            let mut held = HeldPacket { packet, tail, answer: None, budget: Budget::Punt, queue: 0 };
            prop_assert_eq!(held.finish_checksum().is_ok(), done.is_ok());
            prop_assert_eq!([held.packet.head(), &held.tail[..]].concat(), expected);
            prop_assert_eq!(held.packet.offload.needs_csum, done.is_err());
        }
    }

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
