//! Workers: the threads that carry packets.
//!
//! A worker owns the transmit rings of guests (and receive queues of wires) that it polls, its tables, and its buffers; it
//! shares with others only the rings that packets leave by. Between bursts it applies what control has sent. It makes no system call but to notify a guest or the
//! host path and to sleep; it neither allocates nor logs per packet.

pub mod egress;
pub mod handover;
pub mod io;
pub mod kicks;
pub mod port;
pub mod rings;
#[cfg(test)]
mod tests;
pub mod transmit;
pub mod upcall;

use crate::clock;
use crate::counters::{BURST_SIZES, WorkerCounters};
use crate::host::path::HeldPacket;
use crate::hugepages;
use crate::quiesce::WorkerEpoch;
use crate::quiesce::progress::carried_out;
use crate::vhost::tx_ring;
use crate::virtio::Burst;
use crate::wake::AbortOnPanic;
use egress::{BurstEgress, Jobs};
use io::Io;
use log::{error, info};
use port::WorkerPort;
use rtrb::{Consumer, Producer};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::mpsc::Sender;
use switch_core::exec::Scratch;
use switch_core::packet::{Packet, PortId, SNAPSHOT};
use switch_core::pipeline::Switch;
use switch_core::pipeline::trace::Trace;
use switch_core::tables::{Retired, Update};

/// Packets taken from a queue at a time.
const BURST: usize = 64;
/// Commands of a round at most.
const COMMANDS: usize = 64;
/// Ports that are kept an eye on together.
const GROUP: usize = u32::BITS as usize;
/// How long a port that had nothing is not looked at, at most, in microseconds. To look at 1024 takes some ten.
const LOOK_MICROS: u64 = 200;
/// Cycles' worth of time that a port gets in each round, in microseconds.
const QUANTUM_MICROS: u64 = 20;
/// How long a worker without work looks for some before it sleeps, at least.
const SPIN_MICROS: u64 = 30;
/// It may look for longer by this part of what it has worked, and by so much at most, once: one that has much to do would wake
/// late if it slept whenever a guest is kept from its processor for a moment, and one that has little may not spend more on
/// waiting than on work.
const WAITING_PART: u64 = 4;
const WAITING_MICROS: u64 = 1000;
/// How long the milliseconds are believed before they are read again, in microseconds.
const TICK_MICROS: u64 = 250;
/// How long a packet waits for room in a receive ring.
pub const PATIENCE_MICROS: u64 = 50;
/// Ports at most.
pub const MAX_PORTS: usize = 1024;

/// What control tells a worker. Everything brings the memory that it needs.
pub enum Command {
    /// A new port: its queues, and its table.
    AddPort(Box<WorkerPort>),
    /// Forget a port. Its table is removed after it, so no packet comes in that has no table.
    RemovePort(PortId),
    /// Another MTU for a port's guest.
    SetMtu(PortId, u32),
    /// Hand over a queue of a port, by its index; see [`handover`].
    ReleaseQueue(PortId, usize),
    /// Poll a queue of a port, by its index, that another worker has handed over with a debt, in cycles and negative.
    TakeQueue(PortId, usize, i64),
    /// A change of the tables.
    Table(Update),
    /// Describe what would happen to a packet. The one command that allocates: somebody asked for it by hand.
    Trace(Box<Packet>, Sender<Trace>),
}

// Two to a cache line, as they wait for a worker.
const _: () = assert!(size_of::<Command>() <= 32);

/// What a worker gives back for control to free.
pub enum Waste {
    /// A port.
    Port(Box<WorkerPort>),
    /// What was in the tables.
    Table(Retired),
}

const _: () = assert!(size_of::<Waste>() <= 24);

/// A worker's ends of the queues to the rest of the daemon.
pub struct Links {
    /// Changes to apply.
    pub commands: Consumer<Command>,
    /// What is to be freed.
    pub waste: Producer<Waste>,
    /// The host's answers.
    pub from_host: Consumer<Box<HeldPacket>>,
    /// What representors have for guests, in buffers of the host path: `in_port` is the port that it is for.
    pub deliveries: Consumer<Box<HeldPacket>>,
    /// Those buffers on their way back.
    pub delivered: Producer<Box<HeldPacket>>,
    /// The worker's place in the quiescence protocol.
    pub epoch: WorkerEpoch,
    /// Commands applied so far; control waits on it.
    pub applied: Arc<AtomicU64>,
    /// Ends the thread.
    pub stop: Arc<AtomicBool>,
    /// What it does with its time.
    pub counters: Arc<WorkerCounters>,
}

/// A worker's state.
pub struct Worker {
    switch: Switch,
    io: Io,
    links: Links,
    packets: Box<[Packet]>,
    burst: Burst,
    jobs: Jobs,
    /// For the host's answers.
    scratch: Scratch,
    /// Commands that this round is to carry out.
    commands: usize,
    /// Ports, by slot, that had something when they were looked at last.
    busy: [u32; MAX_PORTS / GROUP],
    /// Which group of ports is looked at in any case.
    look: usize,
    /// When all were looked at last, in cycles.
    last_look: u64,
    /// Whether some port had something in the last round.
    worked: bool,
    rounds: u64,
    last_work: u64,
    /// Cycles that it may look for work for beyond the usual time.
    waiting: u64,
    /// When the milliseconds were read last, in cycles.
    last_tick: u64,
    per_micro: u64,
}

impl Worker {
    /// A worker around its tables and its ports' input and output, with so many cycles to a microsecond.
    pub fn new(switch: Switch, io: Io, links: Links, cycles_per_micro: u64) -> Worker {
        switch.l1().memory().into_iter().for_each(hugepages::advise);
        hugepages::advise(switch.slots().memory());
        Worker {
            switch,
            io,
            links,
            packets: vec![Packet::default(); BURST].into(),
            burst: Burst::new(),
            jobs: Jobs::default(),
            scratch: Scratch::default(),
            commands: 0,
            busy: [0; MAX_PORTS / GROUP],
            look: 0,
            last_look: 0,
            worked: false,
            rounds: 0,
            last_work: clock::cycles(),
            waiting: 0,
            last_tick: 0,
            per_micro: cycles_per_micro,
        }
    }

    /// Has the memory there that any packet may need: no packet waits for it later, and it is on the calling thread's NUMA node.
    /// What flows need beyond their places in the list is control's to see to.
    pub fn prefault(&self) {
        let memory = self.switch.l1().memory().into_iter().chain([self.switch.flow_list()]);
        memory.for_each(|memory| hugepages::prefault(memory, None));
    }

    /// Bytes that the worker has for all ports: its exact-match table, its buffers, and lines of flows.
    pub fn bytes(&self) -> u64 {
        let l1: usize = self.switch.l1().memory().into_iter().map(|(_, len)| len).sum();
        let flows = self.switch.slots().memory().1 + self.switch.flow_list().1;
        (l1 + flows + self.switch.bytes() + self.io.pool.bytes()) as u64
    }

    /// Runs until told to stop.
    pub fn run(mut self) {
        let mut before = clock::cycles();
        while !self.links.stop.load(Ordering::Relaxed) {
            let worked = self.round();
            let after = clock::cycles();
            let counters = &self.links.counters;
            counters.loops.add(1);
            if worked {
                let spent = after.wrapping_sub(before);
                counters.busy_cycles.add(spent);
                self.last_work = after;
                self.waiting = (self.waiting + spent / WAITING_PART).min(WAITING_MICROS * self.per_micro);
            } else {
                counters.empty_polls.add(1);
                counters.idle_cycles.add(after.wrapping_sub(before));
                if after.wrapping_sub(self.last_work) > SPIN_MICROS * self.per_micro {
                    match self.waiting.checked_sub(after.wrapping_sub(before)) {
                        Some(left) => self.waiting = left,
                        None => {
                            self.sleep();
                            self.last_work = clock::cycles();
                        }
                    }
                }
            }
            before = clock::cycles().max(after);
        }
        // Rings must be free of us before control takes the ports apart.
        self.io.release_rings();
        self.links.epoch.quiescent();
    }

    /// One round over everything; whether there was anything to do.
    pub fn round(&mut self) -> bool {
        self.links.epoch.quiescent();
        self.io.now_cycles = clock::cycles();
        if self.io.now_cycles.wrapping_sub(self.last_tick) > TICK_MICROS * self.per_micro {
            self.last_tick = self.io.now_cycles;
            self.io.now = clock::millis();
            self.count_l1();
        }
        if self.links.epoch.changed() {
            self.io.refresh();
        }
        let mut worked = self.look_ahead();
        let retired = self.switch.step();
        worked |= self.discard(retired);
        worked |= self.carry_out_answers();
        worked |= self.deliver_down();
        worked |= self.io.retry_parked();
        worked |= self.io.let_go();
        self.look_further();
        worked |= self.serve_ports();
        self.apply();
        self.io.notify_guests();
        self.io.wake_host();
        worked
    }

    /// Says how many flows are in the exact-match table.
    fn count_l1(&self) {
        let used = (0..self.io.used_slots).map(|slot| u64::from(self.switch.l1().used(slot as u32))).sum();
        self.links.counters.l1_entries.set(used);
    }

    /// Looks at what control has sent and asks for the memory that it needs. All of it comes from another processor, or from far
    /// away; it does while packets are carried. What is not a change of the tables is rare, and is carried out at once, with
    /// what came before it.
    fn look_ahead(&mut self) -> bool {
        let Links { commands, waste, .. } = &mut self.links;
        let waiting = commands.slots().min(COMMANDS);
        // Each leaves one thing behind at most, and so does upkeep.
        self.commands = if waiting > 0 { waiting.min(waste.slots().saturating_sub(1)) } else { 0 };
        let any = self.commands > 0;
        // A worker that had no packets has no reason to let new ones miss what is here already.
        if !self.updates(Switch::ask) || !self.worked {
            self.apply();
        }
        any
    }

    /// Asks for what could not be found before the rest was there.
    fn look_further(&mut self) {
        self.updates(Switch::ask_more);
    }

    /// Goes over this round's commands as long as they are updates; whether all are.
    fn updates(&mut self, look: impl Fn(&Switch, &Update)) -> bool {
        if self.commands > 0
            && let Ok(chunk) = self.links.commands.read_chunk(self.commands)
        {
            let (first, rest) = chunk.as_slices();
            for command in first.iter().chain(rest) {
                let Command::Table(update) = command else { return false };
                look(&self.switch, update);
            }
        }
        true
    }

    /// Carries out this round's commands, if that has not been done.
    #[inline(never)] // or it takes registers from the way of packets
    fn apply(&mut self) {
        let count = std::mem::take(&mut self.commands);
        if count == 0 {
            return;
        }
        for _ in 0..count {
            let Ok(command) = self.links.commands.pop() else { break };
            let waste = match command {
                Command::Table(update) => {
                    let retired = self.switch.apply(update);
                    self.discard(retired);
                    None
                }
                Command::AddPort(port) => self.io.add_port(port).map(Waste::Port),
                Command::RemovePort(id) => self.io.remove_port(id).map(Waste::Port),
                Command::SetMtu(id, mtu) => {
                    if let Some(port) = self.io.port(id) {
                        port.mtu = mtu;
                    }
                    None
                }
                Command::ReleaseQueue(id, queue) => {
                    self.io.release_queue(id, queue);
                    None
                }
                Command::TakeQueue(id, queue, debt) => {
                    self.io.take_queue(id, queue, debt);
                    None
                }
                Command::Trace(packet, answer) => {
                    // Who has asked may have gone.
                    let _ = answer.send(self.switch.trace(&packet));
                    None
                }
            };
            if let Some(waste) = waste {
                self.give_back(waste);
            }
        }
        carried_out(&self.links.applied, count as u64);
    }

    /// Gives memory back to control, which has room for it.
    fn give_back(&mut self, waste: Waste) {
        if self.links.waste.push(waste).is_err() {
            error!("a queue is full that was not: memory is freed by a worker");
        }
    }

    fn discard(&mut self, retired: Retired) -> bool {
        let any = !retired.is_empty();
        if any {
            self.give_back(Waste::Table(retired));
        }
        any
    }

    /// Carries out the host's answers, at the expense of the ports that have asked.
    fn carry_out_answers(&mut self) -> bool {
        let quantum = self.quantum();
        let mut start = clock::cycles();
        for count in 0..BURST {
            let Ok(held) = self.links.from_host.pop() else { return count > 0 };
            let (id, queue) = self.io.host_answer(held, &mut self.scratch);
            let end = clock::cycles();
            if let Some(port) = self.io.port(id) {
                port.charge(queue, end.wrapping_sub(start), quantum);
            }
            start = end;
        }
        true
    }

    /// Delivers what representors have for guests, for a port's share of time: together they are as one more port.
    fn deliver_down(&mut self) -> bool {
        let (start, quantum) = (clock::cycles(), self.quantum() as u64);
        let mut count = 0;
        while (count == 0 || clock::cycles().wrapping_sub(start) < quantum)
            && let Ok(held) = self.links.deliveries.pop()
        {
            count += 1;
            self.io.deliver_down(&held);
            self.io.host_buffers_due = true;
            if self.links.delivered.push(held).is_err() {
                error!("a queue is full that cannot be: a buffer of the host path is lost");
            }
        }
        count > 0
    }

    /// A port's share of a round, in cycles.
    fn quantum(&self) -> i64 {
        (QUANTUM_MICROS * self.per_micro) as i64
    }

    /// Serves the ports that have something, in turn, and carries out commands behind the first of them. All are looked at, but while there is work those that had nothing
    /// lately only 32 at a time, so that many idle ports do not slow a few busy ones down; after a while all the same.
    fn serve_ports(&mut self) -> bool {
        let (used, quantum, now) = (self.io.used_slots, self.quantum(), self.io.now_cycles);
        self.rounds += 1;
        self.look = (self.look + 1) % used.div_ceil(GROUP).max(1);
        let late = now.wrapping_sub(self.last_look) > LOOK_MICROS * self.per_micro;
        let all = late || !self.worked;
        if all {
            self.last_look = now;
        }
        self.worked = false;
        for first in (0..used).step_by(GROUP) {
            let group = first / GROUP;
            let there = u32::MAX >> (GROUP - (used - first).min(GROUP));
            let slots = if all || group == self.look { there } else { self.busy[group] };
            let busy = if slots == 0 { 0 } else { self.with_work(group, slots, quantum) };
            let mut left = busy;
            while left != 0 {
                self.serve_queues(first + left.trailing_zeros() as usize, quantum);
                left &= left - 1;
                if self.commands > 0 {
                    // Later, what was asked for may have been driven out again.
                    self.apply();
                }
            }
            self.busy[group] = busy;
            self.worked |= busy != 0;
        }
        self.worked
    }

    /// Those of some ports of a group that have something.
    #[inline(never)] // with registers of its own
    fn with_work(&mut self, group: usize, mut slots: u32, quantum: i64) -> u32 {
        let Some(ports) = self.io.ports.as_chunks_mut::<GROUP>().0.get_mut(group) else { return 0 };
        let mut busy = 0;
        while slots != 0 {
            let slot = slots.trailing_zeros();
            if let Some(port) = &mut ports[slot as usize % GROUP]
                && port.begin_round(self.rounds, quantum)
            {
                busy |= 1 << slot;
            }
            slots &= slots - 1;
        }
        busy
    }

    /// Serves a port's queues in turn, for its share of time, unless it pays for earlier rounds first.
    fn serve_queues(&mut self, slot: usize, quantum: i64) {
        let (mut start, mut emptied) = (clock::cycles(), 0);
        while let Some(port) = &mut self.io.ports[slot]
            && port.deficit > 0
            && emptied < port.rx.len()
        {
            let queue = port.turn;
            port.turn = (queue + 1) % port.rx.len();
            let (wanted, taken) = self.burst(slot, queue);
            emptied = if taken < wanted { emptied + 1 } else { 0 };
            let end = clock::cycles();
            // What is parked from here on waits from now on.
            self.io.now_cycles = end;
            let cost = end.wrapping_sub(start);
            if let Some(port) = &mut self.io.ports[slot] {
                let rx = &mut port.rx[queue];
                rx.adapt(cost, quantum);
                let index = rx.index;
                port.charge(index, cost, quantum);
            }
            start = end;
        }
    }

    /// Takes a burst from a queue and sends it on its way. Gives the numbers of packets wanted and taken.
    fn burst(&mut self, slot: usize, queue: usize) -> (usize, usize) {
        let Some(port) = &mut self.io.ports[slot] else { return (1, 0) };
        let id = port.id;
        let rx = &mut port.rx[queue];
        let (index, wanted) = (rx.index, rx.batch);
        let Some(ring) = &mut rx.ring else { return (wanted, 0) };
        let taken = match ring.receive(&mut self.burst, wanted) {
            Ok(taken) => taken,
            Err(fault) => {
                port.counters.ring_faults.add(1);
                port.rings.fault(tx_ring(index), fault);
                0
            }
        };
        if taken == 0 {
            return (wanted, 0);
        }
        let (mut bytes, mut offloads) = (0, 0);
        for (packet, frame) in self.packets[..taken].iter_mut().zip(self.burst.frames()) {
            bytes += frame.len as u64;
            offloads |= frame.header.flags | frame.header.gso_type;
            self.burst.copy_head(frame, packet.reset(id, frame.len, SNAPSHOT));
        }
        port.counters.rx_packets.add(taken as u64);
        port.counters.rx_bytes.add(bytes);
        let counters = &self.links.counters;
        counters.bursts.add(1);
        counters.burst_sizes[(taken.ilog2() as usize).min(BURST_SIZES - 1)].add(1);
        counters.packets.add(taken as u64);

        let now = self.io.now;
        let packets = &mut self.packets[..taken];
        let place = (slot, index);
        let mut egress =
            BurstEgress::new(&mut self.io, &mut self.jobs, &self.burst, packets, place, offloads != 0);
        self.switch.process(now, packets, &mut egress);
        egress.finish(packets);
        if let Some(port) = &mut self.io.ports[slot]
            && let Some(ring) = &mut port.rx[queue].ring
        {
            ring.complete(&mut self.burst);
        }
        (wanted, taken)
    }

    /// Sleeps until a guest, control or the host has something, if nobody has now.
    fn sleep(&mut self) {
        if self.io.is_waiting() {
            return;
        }
        if self.io.arm() && self.links.epoch.sleep_begin() {
            let links = &self.links;
            let idle = links.commands.is_empty() && links.from_host.is_empty() && links.deliveries.is_empty();
            if idle && !links.stop.load(Ordering::Relaxed) {
                links.counters.sleeps.add(1);
                self.count_l1();
                self.io.kicks.wait(self.io.wake_after());
            }
            links.epoch.sleep_end();
        }
        self.io.disarm();
    }
}

/// Starts a worker's thread, on processor `cpu` if one is given.
pub fn start(
    index: usize,
    cpu: Option<usize>,
    worker: Worker,
) -> std::io::Result<std::thread::JoinHandle<()>> {
    std::thread::Builder::new().name(format!("worker-{index}")).spawn(move || {
        let _alarm = AbortOnPanic("a worker");
        match cpu.map(crate::affinity::pin) {
            None => {}
            Some(Ok(())) => info!("worker {index} runs on processor {}", cpu.unwrap_or_default()),
            Some(Err(error)) => error!("worker {index}: processor {}: {error}", cpu.unwrap_or_default()),
        }
        worker.prefault();
        worker.run();
    })
}
