//! A load generator: a thread that plays the guests of two or more ports of any vhost-user switch, sends prebuilt packets in
//! pairs of ports both ways, and looks at what arrives.
//!
//! One packet costs it as little as a polling driver can do ([`crate::frontend::lean`]), because every line of memory that
//! goes from one processor to the other and back costs the generator as much as the switch. Where it is the slower of the
//! two all the same, its busy share says so, and the switch is to be judged by its own busy cycles.
//!
//! ```no_run
//! use qemu_tests::load::{Load, LoadConfig, Order, Sizes, Socket, Traffic};
//! # fn main() -> anyhow::Result<()> {
//! let traffic = Traffic { flows: 64, order: Order::Walk, sizes: Sizes::Fixed(64), classes: 1 };
//! let sockets = ["/run/pointwork/vm1.sock", "/run/pointwork/vm2.sock"].map(Socket::connect);
//! let load = Load::start(LoadConfig::new(sockets, traffic))?;
//! let before = load.sample();
//! std::thread::sleep(std::time::Duration::from_secs(1));
//! println!("{:.0} packets a second", load.sample().since(&before).packets_per_second());
//! println!("{:?}", load.finish()?);
//! # Ok(()) }
//! ```

mod copy;
mod direction;
mod histogram;
mod rules;
mod traffic;

use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::Relaxed};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use serde::Serialize;

pub use copy::copy_frames;
pub use histogram::Histogram;
pub use rules::Rules;
pub use traffic::{Ends, Order, Sizes, TTL, Traffic};

use crate::frontend::lean::cycles;
use crate::frontend::{Features, Frontend, Notify, RegionSpec};
use crate::host;
use crate::overlay::Envelope;
use direction::Direction;

/// What a DPDK guest negotiates: no offloads.
const PLAIN: Features = Features(Features::VERSION_1.0 | Features::STATUS.0);
/// What super-frames need, at both ends.
const OFFLOADS: Features = Features(
    Features::CSUM.0
        | Features::GUEST_CSUM.0
        | Features::HOST_TSO4.0
        | Features::HOST_TSO6.0
        | Features::GUEST_TSO4.0
        | Features::GUEST_TSO6.0,
);
/// What a receive buffer holds of a frame if frames may span several.
const MERGEABLE_ROOM: usize = 2048;
/// How long a packet may be on its way before it counts as lost: longer than a switch that shares its processor is kept off it.
const PATIENCE: Duration = Duration::from_secs(1);

/// A port of the switch under load.
#[derive(Clone, Debug)]
pub struct Socket {
    /// Its path.
    pub path: PathBuf,
    /// Whether we listen and the switch connects.
    pub listen: bool,
}

impl Socket {
    /// The switch listens.
    pub fn connect(path: impl Into<PathBuf>) -> Self {
        Self { path: path.into(), listen: false }
    }

    /// We listen.
    pub fn listen(path: impl Into<PathBuf>) -> Self {
        Self { path: path.into(), listen: true }
    }
}

/// What is to be sent, where, and how.
#[derive(Clone, Debug)]
pub struct LoadConfig {
    /// Ports, of which the first and the second are a pair, the third and the fourth, and so on.
    pub sockets: Vec<Socket>,
    /// What each port sends to the other of its pair.
    pub traffic: Traffic,
    /// Only the first of each pair sends.
    pub one_way: bool,
    /// Packets arrive as a router sends them on: with the MAC addresses of [`Ends::routed`], and a TTL that is one less.
    pub routed: bool,
    /// Descriptors of each ring.
    pub ring: u16,
    /// Receive buffers may be merged. Otherwise each is large enough for any frame.
    pub mergeable: bool,
    /// Checksum and segmentation offloads are negotiated; super-frames need it.
    pub offloads: bool,
    /// Rings are packed.
    pub packed: bool,
    /// Packets are in a tunnel on one side of the switch; one way only.
    pub tunnel: Option<Tunnel>,
    /// Packets are sent in bursts of so many.
    pub burst: u16,
    /// Packets of one direction that are on their way at most; by default as many as the receive ring takes. With that, a
    /// switch has no reason to lose any.
    pub window: Option<u32>,
    /// Packets a second in all; by default as many as go.
    pub rate: Option<f64>,
    /// Frames of other lengths come in too, another guest's broadcasts say: they are taken, and not counted.
    pub strangers: bool,
    /// One of so many received packets is checked.
    pub check_every: u32,
    /// One of so many of these is checked to its last byte.
    pub check_whole: u32,
    /// The processor that the thread is bound to.
    pub cpu: Option<usize>,
    /// How long to wait for the switch to be there and to forward.
    pub timeout: Duration,
}

impl LoadConfig {
    /// Full load between these ports, a DPDK guest on each.
    pub fn new(sockets: impl Into<Vec<Socket>>, traffic: Traffic) -> Self {
        Self {
            sockets: sockets.into(),
            offloads: traffic.sizes == Sizes::Tso,
            packed: false,
            tunnel: None,
            traffic,
            one_way: false,
            routed: false,
            ring: 1024,
            mergeable: true,
            burst: 32,
            window: None,
            rate: None,
            strangers: false,
            check_every: 32,
            check_whole: 64,
            cpu: None,
            timeout: Duration::from_secs(20),
        }
    }
}

/// On which side of the switch packets are in a tunnel.
#[derive(Clone, Copy, Debug)]
pub enum Tunnel {
    /// They are sent in it, each flow with a UDP source port of its own, and arrive without.
    Sent(Envelope),
    /// They are sent without, and arrive in it. UDP source ports are the switch's choice.
    Received(Envelope),
}

impl LoadConfig {
    /// The tunnel that packets are sent in, and the one that they arrive in.
    fn envelopes(&self) -> [Option<Envelope>; 2] {
        match self.tunnel {
            None => [None; 2],
            Some(Tunnel::Sent(envelope)) => [Some(envelope), None],
            Some(Tunnel::Received(envelope)) => [None, Some(envelope)],
        }
    }

    /// The longest frame, its tunnel included.
    fn longest(&self) -> usize {
        let outer = self.envelopes().into_iter().flatten().map(|envelope| envelope.overhead());
        self.traffic.sizes.longest() + outer.sum::<usize>()
    }
}

/// Written by the generator after each round, read by whoever wants to know.
#[derive(Default)]
struct Shared {
    /// Set when the generator is to send no more.
    stop: AtomicBool,
    /// Set once packets have come through in every direction.
    running: AtomicBool,
    /// Raised to have latencies forgotten.
    epoch: AtomicU64,
    /// Those that were forgotten, and when: the epoch that began then.
    forgotten: Mutex<(u64, Histogram)>,
    sent: AtomicU64,
    received: AtomicU64,
    bytes: AtomicU64,
    refused: AtomicU64,
    busy: AtomicU64,
    idle: AtomicU64,
}

impl Shared {
    fn forgotten(&self) -> MutexGuard<'_, (u64, Histogram)> {
        self.forgotten.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The generator's counters at a moment, or between two.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Sample {
    /// Seconds since some moment.
    pub seconds: f64,
    /// Packets sent.
    pub sent: u64,
    /// Packets received.
    pub received: u64,
    /// Their bytes.
    pub bytes: u64,
    /// At a given rate: packets that were due while the generator ran, and not sent for want of room.
    pub refused: u64,
    /// Cycles of rounds in which a packet was sent or received.
    pub busy_cycles: u64,
    /// Cycles of the other rounds.
    pub idle_cycles: u64,
}

impl Sample {
    /// What happened between `before` and this.
    pub fn since(&self, before: &Self) -> Self {
        Self {
            seconds: self.seconds - before.seconds,
            sent: self.sent - before.sent,
            received: self.received - before.received,
            bytes: self.bytes - before.bytes,
            refused: self.refused - before.refused,
            busy_cycles: self.busy_cycles - before.busy_cycles,
            idle_cycles: self.idle_cycles - before.idle_cycles,
        }
    }

    /// Received packets, in all directions.
    pub fn packets_per_second(&self) -> f64 {
        self.received as f64 / self.seconds
    }

    /// Received bits, in all directions.
    pub fn bits_per_second(&self) -> f64 {
        8.0 * self.bytes as f64 / self.seconds
    }

    /// The share of the generator's time in which it had something to do.
    pub fn busy(&self) -> f64 {
        self.busy_cycles as f64 / (self.busy_cycles + self.idle_cycles).max(1) as f64
    }
}

/// What became of all that was sent.
#[derive(Clone, Debug, Default, Serialize)]
pub struct Outcome {
    /// Packets sent since the switch has begun to forward.
    pub sent: u64,
    /// Of them received.
    pub received: u64,
    /// Of them not.
    pub lost: i64,
    /// Received packets that were looked at.
    pub checked: u64,
    /// Of them not what was sent.
    pub wrong: u64,
    /// Of them after a later one of their flow, or again.
    pub disordered: u64,
    /// The first that was wrong or late, in words.
    pub first_wrong: Option<String>,
    /// Times that checked packets were on their way.
    pub latency: Latency,
}

/// Percentiles, in microseconds.
#[derive(Clone, Copy, Debug, Default, Serialize)]
pub struct Latency {
    /// Packets.
    pub count: u64,
    /// Half of them were faster.
    pub median: f64,
    /// 90 %.
    pub p90: f64,
    /// 99 %.
    pub p99: f64,
    /// 99.9 %.
    pub p999: f64,
    /// The slowest.
    pub max: f64,
}

impl Latency {
    fn of(times: &Histogram) -> Self {
        let per_micro = cycles_per_second() / 1e6;
        let at = |share| times.percentile(share) as f64 / per_micro;
        Self {
            count: times.count(),
            median: at(0.5),
            p90: at(0.9),
            p99: at(0.99),
            p999: at(0.999),
            max: times.greatest() as f64 / per_micro,
        }
    }
}

/// Rate of [`cycles`], measured once.
pub fn cycles_per_second() -> f64 {
    static RATE: std::sync::OnceLock<f64> = std::sync::OnceLock::new();
    *RATE.get_or_init(|| {
        let (start, first) = (Instant::now(), cycles());
        while start.elapsed() < Duration::from_millis(20) {
            std::hint::spin_loop();
        }
        (cycles() - first) as f64 / start.elapsed().as_secs_f64()
    })
}

/// A generator at work. Dropped, it stops.
pub struct Load {
    shared: Arc<Shared>,
    thread: Option<JoinHandle<Result<Outcome>>>,
    /// Hold the connections.
    frontends: Vec<Frontend>,
    start: Instant,
}

impl Load {
    /// Connects to all ports, waits until packets come through both ways, and goes on to full load.
    ///
    /// # Errors
    /// If the configuration is none, a port cannot be had, or nothing comes through in time.
    pub fn start(config: LoadConfig) -> Result<Self> {
        Self::start_beside(config, || Ok(()))
    }

    /// As [`Self::start`]. Once a round the generator's thread also does what another guest does meanwhile, `beside` it.
    ///
    /// # Errors
    /// As for [`Self::start`].
    pub fn start_beside(
        config: LoadConfig,
        beside: impl FnMut() -> Result<()> + Send + 'static,
    ) -> Result<Self> {
        let ports = config.sockets.len();
        ensure!(ports >= 2 && ports.is_multiple_of(2) && ports <= 64, "{ports} ports are not 1 to 32 pairs");
        let Traffic { flows, classes, sizes, .. } = config.traffic;
        ensure!((1..=1 << 20).contains(&flows), "{flows} flows: must be 1 to 1048576");
        ensure!((1..=32).contains(&classes), "{classes} classes: must be 1 to 32");
        ensure!(config.offloads || sizes != Sizes::Tso, "super-frames need offloads");
        ensure!(config.tunnel.is_none() || config.one_way, "through tunnels one way only");
        ensure!(config.tunnel.is_none() || sizes != Sizes::Tso, "no super-frames through tunnels");
        ensure!(config.burst > 0 && config.check_every > 0 && config.check_whole > 0, "a count of 0");
        let mut frontends = connect(&config)?;
        let directions = directions(&config, &mut frontends)?;
        cycles_per_second();
        let shared = Arc::new(Shared::default());
        let generator = Generator { config, directions, shared: shared.clone(), beside: Box::new(beside) };
        let thread = std::thread::Builder::new().name("load".into()).spawn(|| generator.run())?;
        let mut load = Self { shared, thread: Some(thread), frontends, start: Instant::now() };
        while !load.shared.running.load(Relaxed) {
            if load.thread.as_ref().is_some_and(JoinHandle::is_finished) {
                load.join()?;
                bail!("the generator ended before it began");
            }
            host::check_interrupt()?;
            std::thread::sleep(Duration::from_millis(5));
        }
        Ok(load)
    }

    /// The counters of the moment.
    pub fn sample(&self) -> Sample {
        let shared = &*self.shared;
        Sample {
            seconds: self.start.elapsed().as_secs_f64(),
            sent: shared.sent.load(Relaxed),
            received: shared.received.load(Relaxed),
            bytes: shared.bytes.load(Relaxed),
            refused: shared.refused.load(Relaxed),
            busy_cycles: shared.busy.load(Relaxed),
            idle_cycles: shared.idle.load(Relaxed),
        }
    }

    /// Forgets the latencies so far.
    pub fn forget_latencies(&self) {
        self.shared.epoch.fetch_add(1, Relaxed);
    }

    /// Gives the latencies since they were last forgotten, and forgets them.
    ///
    /// # Errors
    /// What has ended the generator, or an interruption.
    pub fn take_latencies(&mut self) -> Result<Latency> {
        let epoch = self.shared.epoch.fetch_add(1, Relaxed) + 1;
        loop {
            let forgotten = self.shared.forgotten();
            if forgotten.0 == epoch {
                return Ok(Latency::of(&forgotten.1));
            }
            drop(forgotten);
            self.run_for(Duration::from_millis(1))?;
        }
    }

    /// Lets the thread work for `time`, or fails as soon as it has failed.
    ///
    /// # Errors
    /// What has ended the generator, or an interruption.
    pub fn run_for(&mut self, time: Duration) -> Result<()> {
        let end = Instant::now() + time;
        loop {
            host::check_interrupt()?;
            if self.thread.as_ref().is_some_and(JoinHandle::is_finished) {
                self.join()?;
                bail!("the generator ended early");
            }
            let left = end.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Ok(());
            }
            std::thread::sleep(left.min(Duration::from_millis(50)));
        }
    }

    /// Sends no more, receives what is on its way, stops the rings and disconnects.
    ///
    /// # Errors
    /// If the switch broke a ring or is gone.
    pub fn finish(mut self) -> Result<Outcome> {
        self.shared.stop.store(true, Relaxed);
        let outcome = self.join()?;
        for frontend in &mut self.frontends {
            frontend.disconnect()?;
        }
        Ok(outcome)
    }

    fn join(&mut self) -> Result<Outcome> {
        let thread = self.thread.take().context("the generator has ended")?;
        thread.join().map_err(|_| anyhow::anyhow!("the generator panicked"))?
    }
}

impl Drop for Load {
    fn drop(&mut self) {
        self.shared.stop.store(true, Relaxed);
        // It ends by itself, and must have before the connections do.
        let _ = self.join();
    }
}

/// What the free pages of 2 MiB allow: hugepages if there are enough for memory of this size.
fn hugepages(bytes: usize) -> bool {
    let free = std::fs::read_to_string("/sys/kernel/mm/hugepages/hugepages-2048kB/free_hugepages");
    free.ok().and_then(|text| text.trim().parse::<usize>().ok()).is_some_and(|free| free << 21 >= bytes)
}

fn connect(config: &LoadConfig) -> Result<Vec<Frontend>> {
    let bytes = guest_memory(config);
    let mut wanted = PLAIN;
    if config.mergeable {
        wanted = wanted | Features::MRG_RXBUF;
    }
    if config.offloads {
        wanted = wanted | OFFLOADS;
    }
    if config.packed {
        wanted = wanted | Features::RING_PACKED;
    }
    let hugepages = hugepages(bytes * config.sockets.len());
    let build = |socket: &Socket| {
        let builder = Frontend::builder(&socket.path)
            .features(wanted)
            .ring_size(config.ring)
            .memory(&[RegionSpec { gpa: 0, len: bytes }])
            .notify(Notify::Poll)
            .timeout(config.timeout);
        let builder = if socket.listen { builder.listen() } else { builder };
        let builder = if hugepages { builder.hugepages() } else { builder };
        builder.build().with_context(|| socket.path.display().to_string())
    };
    // All sockets first: a switch that connects may look for one after the other.
    let mut frontends = config.sockets.iter().map(build).collect::<Result<Vec<_>>>()?;
    for (frontend, socket) in frontends.iter_mut().zip(&config.sockets) {
        frontend.start().with_context(|| socket.path.display().to_string())?;
        let lacks = wanted.without(frontend.features()).without(Features::STATUS);
        ensure!(lacks.0 == 0, "{}: the switch does not offer {lacks:?}", socket.path.display());
    }
    Ok(frontends)
}

/// Bytes of a guest's memory: rings, buffers, and room for what alignment takes.
fn guest_memory(config: &LoadConfig) -> usize {
    let buffer = config.longest() + receive_room(config) + 512;
    (usize::from(config.ring) * buffer + (1 << 20)).next_multiple_of(2 << 20)
}

/// What a receive buffer has to hold of a frame.
fn receive_room(config: &LoadConfig) -> usize {
    let longest = config.longest();
    if config.mergeable { MERGEABLE_ROOM } else { longest.max(MERGEABLE_ROOM) }
}

fn directions(config: &LoadConfig, frontends: &mut [Frontend]) -> Result<Vec<Direction>> {
    let mut queues: Vec<_> = frontends
        .iter_mut()
        .map(|frontend| {
            let features = frontend.features();
            frontend.take_queues().pop().map(|pair| (Some(pair.rx), Some(pair.tx), features))
        })
        .collect::<Option<_>>()
        .context("a port without queues")?;
    let mut directions = Vec::new();
    for first in (0..queues.len()).step_by(2) {
        let ways: &[(usize, usize)] = &[(first, first + 1), (first + 1, first)];
        for &(from, to) in &ways[..if config.one_way { 1 } else { 2 }] {
            let (tx, rx) = (queues[from].1.take(), queues[to].0.take());
            let (tx, rx) = tx.zip(rx).context("a queue is taken")?;
            let features = [queues[from].2, queues[to].2];
            let ends = Ends::between(from as u8, to as u8);
            directions.push(Direction::new(config, ends, tx, rx, features, receive_room(config))?);
        }
    }
    Ok(directions)
}

/// Keeps this thread on one processor.
///
/// # Errors
/// If there is none of this number.
pub fn bind(cpu: usize) -> Result<()> {
    let mut set = rustix::thread::CpuSet::new();
    set.set(cpu);
    rustix::thread::sched_setaffinity(None, &set).with_context(|| format!("processor {cpu}"))
}

/// The thread's state.
struct Generator {
    config: LoadConfig,
    directions: Vec<Direction>,
    shared: Arc<Shared>,
    beside: Box<dyn FnMut() -> Result<()> + Send>,
}

impl Generator {
    fn run(mut self) -> Result<Outcome> {
        self.config.cpu.map_or(Ok(()), bind)?;
        self.probe()?;
        self.shared.running.store(true, Relaxed);
        self.load()?;
        self.drain()?;
        let mut outcome = Outcome::default();
        let mut times = Histogram::default();
        for direction in &self.directions {
            direction.report(&mut outcome);
            times.merge(direction.latencies());
        }
        outcome.latency = Latency::of(&times);
        Ok(outcome)
    }

    /// Sends a packet now and then, until one has come through in each direction: a switch may take its time between
    /// accepting a guest and forwarding for it.
    fn probe(&mut self) -> Result<()> {
        let deadline = Instant::now() + self.config.timeout;
        loop {
            for direction in &mut self.directions {
                direction.send(cycles(), 1)?;
            }
            self.settle(Duration::from_millis(20))?;
            if self.directions.iter().all(|direction| direction.received() > 0) {
                break;
            }
            ensure!(Instant::now() < deadline, "{}", self.silence());
            if self.shared.stop.load(Relaxed) {
                break;
            }
        }
        // What was kept on the way comes first, and is not counted.
        self.drain()?;
        self.directions.iter_mut().for_each(Direction::start_over);
        Ok(())
    }

    fn silence(&self) -> String {
        let silent = self.directions.iter().filter(|direction| direction.received() == 0).count();
        format!("nothing comes through in {silent} of {} directions", self.directions.len())
    }

    /// Receives until nothing has come for `quiet`.
    fn settle(&mut self, quiet: Duration) -> Result<()> {
        let mut last = Instant::now();
        while last.elapsed() < quiet {
            let mut received = 0;
            for direction in &mut self.directions {
                // Kicks, where the switch sleeps, come with looking.
                direction.reap()?;
                received += direction.receive(cycles())?;
            }
            if received > 0 {
                last = Instant::now();
            } else {
                std::thread::yield_now();
            }
        }
        Ok(())
    }

    fn load(&mut self) -> Result<()> {
        let hz = cycles_per_second();
        let patience = (hz * PATIENCE.as_secs_f64()) as u64;
        // Cycles between packets of one direction.
        let pace = self.config.rate.map(|rate| hz * self.directions.len() as f64 / rate);
        let burst = u32::from(self.config.burst);
        let (mut busy, mut idle, mut epoch) = (0, 0, 0);
        let mut before = cycles();
        self.directions.iter_mut().for_each(|direction| direction.set_pace(before, pace));
        while !self.shared.stop.load(Relaxed) {
            let (mut moved, mut sent, mut received, mut bytes, mut refused) = (0, 0, 0, 0, 0);
            let wanted_epoch = self.shared.epoch.load(Relaxed);
            if wanted_epoch != epoch {
                epoch = wanted_epoch;
                self.forget_latencies(epoch);
            }
            for direction in &mut self.directions {
                moved += direction.receive(before)?;
                moved += direction.send_more(before, burst)?;
                direction.write_off(before, patience);
                sent += direction.sent();
                received += direction.received();
                bytes += direction.bytes();
                refused += direction.refused();
            }
            (self.beside)()?;
            let shared = &*self.shared;
            shared.sent.store(sent, Relaxed);
            shared.received.store(received, Relaxed);
            shared.bytes.store(bytes, Relaxed);
            shared.refused.store(refused, Relaxed);
            let now = cycles();
            if moved > 0 {
                busy += now - before;
                shared.busy.store(busy, Relaxed);
            } else {
                idle += now - before;
                shared.idle.store(idle, Relaxed);
            }
            before = now;
        }
        Ok(())
    }

    #[inline(never)]
    fn forget_latencies(&mut self, epoch: u64) {
        let mut times = Histogram::default();
        for direction in &mut self.directions {
            times.merge(direction.latencies());
            direction.forget_latencies();
        }
        *self.shared.forgotten() = (epoch, times);
    }

    /// Receives what is on its way.
    fn drain(&mut self) -> Result<()> {
        let mut last = Instant::now();
        while last.elapsed() < PATIENCE && self.directions.iter().any(|direction| direction.missing() > 0) {
            for direction in &mut self.directions {
                direction.reap()?;
                if direction.receive(cycles())? > 0 {
                    last = Instant::now();
                }
            }
        }
        // What came once too often would come now.
        self.settle(Duration::from_millis(20))
    }
}
