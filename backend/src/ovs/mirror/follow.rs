//! When the datapath is read and what follows from it: sweeps, lost events, lost connections, and keep-alives in between.

use super::keepalive::KeepAlive;
use super::ports::{MirrorPort, Ports};
use super::state::State;
use super::{MirrorReport, MirrorTable, Settings};
use crate::host::Millis;
use crate::ovs::source::{Change, FlowSource, SourceError};
use crate::wake::Waker;
use log::{debug, info, warn};
use std::sync::mpsc::Sender;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

/// First and longest pause before the source is tried again.
const BACK_OFF: (Millis, Millis) = (100, 1000);
/// A source that has been there for so long is not one that comes and goes.
const STEADY: Millis = 5000;
/// Pause before a flow that a read has missed is looked for again.
const CONFIRM: Millis = 50;
/// Pause after events were lost.
const RESYNC: Millis = 100;
/// Changes under one lock of the tables.
const BATCH: usize = 256;
/// Time between two locks, in which the host path has its turn: a mutex alone would give it none.
const BREATH: Duration = Duration::from_micros(50);
/// How long workers may take to have new flows before packets are sent their way all the same.
const SETTLE: Duration = Duration::from_millis(100);
/// Events that are taken at a time, about.
const EVENTS: usize = 16_384;
/// Least pause before a source is asked again because of packets that missed.
const EXPECT: Millis = 20;
/// What following may cost, by the pauses between reads: so many times what the thread has had of a processor for the last
/// one and since the one before, keep-alives included, and so many times what the read waited for, which is OVS's work.
struct Share(u32, u32);
/// As long as all is as it should be: a twentieth, of which a fifth is left to what is not counted here.
const ROUTINE: Share = Share(24, 2);
/// So many times what the last read took is left to whoever answers it in any case, up to so long.
const POLITE: (Millis, Millis) = (19, 400);
/// When packets have missed.
const HURRIED: Share = Share(9, 9);
/// Refused flows that are tried again at a time, and how often.
const RETRIES: (usize, Millis) = (1024, 500);

/// Milliseconds, from whoever runs it.
pub type Clock = Box<dyn Fn() -> Millis + Send>;
/// What the thread has had of a processor, from whoever runs it.
pub type CpuTime = Box<dyn Fn() -> Duration + Send>;

/// Someone who waits for the tables to be in step.
struct Sync {
    answer: Sender<Result<usize, String>>,
    /// Whether a full read has begun since.
    is_covered: bool,
}

/// Follows a source with the tables.
pub struct Follower {
    source: Box<dyn FlowSource>,
    flows: Arc<Mutex<dyn MirrorTable + Send>>,
    clock: Clock,
    cpu: CpuTime,
    state: State,
    alive: KeepAlive,
    next_read: Millis,
    /// How long the last read took.
    took: Millis,
    /// How much of it on a processor.
    cost: Duration,
    /// What the thread had had of a processor at its end.
    spent: Duration,
    /// How much of that was between it and the read before.
    between: Duration,
    /// When it ended.
    read_at: Millis,
    /// Whether the next read is of everything.
    is_full: bool,
    /// Whether the last read left nothing open.
    is_settled: bool,
    next_retry: Millis,
    /// Why the source cannot be read, if so.
    lost: Option<String>,
    back_off: Millis,
    /// When the source came back last.
    found: Millis,
    last_full: Option<Millis>,
    syncs: Vec<Sync>,
    changes: Vec<Change>,
    full_reads: u64,
    resyncs: u64,
    lost_events: u64,
}

impl Follower {
    /// A follower without ports.
    pub fn new(
        source: Box<dyn FlowSource>,
        flows: Arc<Mutex<dyn MirrorTable + Send>>,
        settings: Settings,
        clock: Clock,
        cpu: CpuTime,
    ) -> Follower {
        Follower {
            source,
            flows,
            clock,
            cpu,
            state: State::new(),
            alive: KeepAlive::new(settings),
            next_read: 0,
            took: 0,
            cost: Duration::ZERO,
            spent: Duration::ZERO,
            between: Duration::ZERO,
            read_at: 0,
            is_full: true,
            is_settled: false,
            next_retry: 0,
            lost: None,
            back_off: BACK_OFF.0,
            found: 0,
            last_full: None,
            syncs: Vec::new(),
            changes: Vec::new(),
            full_reads: 0,
            resyncs: 0,
            lost_events: 0,
        }
    }

    /// Other ports or restrictions. When it returns the tables have no flow of a port that is gone, and what is restricted
    /// goes by the host. All is to be read again: what was a foreign port may be ours now.
    pub fn set_ports(&mut self, ports: Vec<MirrorPort>) {
        let ports = self.state.ports().with_ports(ports);
        self.change_ports(ports);
        self.read_all(0);
    }

    /// Nothing is forwarded here any more, for that reason, or all that can be. When it returns the tables say so.
    pub fn set_slow(&mut self, slow: Option<String>) {
        let ports = self.state.ports().with_slow(slow);
        self.change_ports(ports);
    }

    /// Flows of tunnels are put again: the tables know whether that changes anything.
    pub fn reconsider(&mut self) {
        self.state.reconsider();
        self.apply();
    }

    fn change_ports(&mut self, ports: Ports) {
        self.state.set_ports(ports);
        self.apply();
    }

    /// Packets have missed: a source that tells of no flows by itself is asked soon, and not in more than a tenth of the
    /// time.
    pub fn expect_flows(&mut self) {
        if self.lost.is_none() && self.source.is_exact() {
            let soon = self.read_at + EXPECT.max(self.pause(HURRIED));
            self.next_read = self.next_read.min(soon);
        }
    }

    /// How long to leave off after the last read.
    fn pause(&self, Share(own, others): Share) -> Millis {
        let waited = Duration::from_millis(self.took).saturating_sub(self.cost);
        // Only what reads cost becomes less by rarer ones: they stop at half as often.
        let cost = self.cost + self.between.min(self.cost);
        (cost * own).max(waited * others).as_millis() as Millis
    }

    /// Other settings.
    pub fn set(&mut self, settings: Settings) {
        self.alive.set(settings, (self.clock)());
    }

    /// Reads all in the next round, and answers when the tables are in step with it, or cannot be.
    pub fn sync(&mut self, answer: Sender<Result<usize, String>>) {
        self.syncs.push(Sync { answer, is_covered: false });
        self.read_all(0);
    }

    /// Does all that is to be done by now. Gives the time after which there is more.
    pub fn round(&mut self, waker: &Waker) -> Millis {
        let now = (self.clock)();
        if now >= self.next_read {
            self.read(waker);
        }
        if now >= self.next_retry {
            self.next_retry = now + RETRIES.1;
            self.state.retry(RETRIES.0, false);
        }
        self.apply();
        if self.is_settled {
            self.answer();
        }
        let mut next = self.next_read;
        // Without OVS there is nobody who would see a flow alive, and nobody to forward the packet.
        if self.lost.is_none() {
            self.alive.turn((self.clock)());
            if let Some(tick) = self.alive.tick() {
                next = next.min(now + tick);
            }
        }
        next.saturating_sub((self.clock)())
    }

    /// Waits for events, or until the waker is rung, at most `timeout`.
    pub fn wait(&mut self, waker: &Waker, timeout: Millis) {
        if self.lost.is_some() {
            return waker.sleep(timeout, || false);
        }
        let result =
            self.source.wait(self.state.ports(), waker, Duration::from_millis(timeout), &mut self.changes);
        self.absorb();
        if let Err(error) = result {
            self.lose(error);
        }
    }

    /// Takes the events that are there.
    fn drain(&mut self, waker: &Waker) -> Result<(), SourceError> {
        loop {
            let before = self.changes.len();
            let result = self.source.wait(self.state.ports(), waker, Duration::ZERO, &mut self.changes);
            if result.is_err() || self.changes.len() == before || self.changes.len() > EVENTS {
                self.absorb();
                return result;
            }
        }
    }

    fn absorb(&mut self) {
        let (mut is_whole, mut is_lossy) = (true, false);
        for change in self.changes.drain(..) {
            is_lossy |= change == Change::Lost;
            is_whole &= self.state.absorb(change);
        }
        if is_lossy {
            debug!("events of {} were lost", self.source.describe());
            self.lost_events += 1;
        }
        if !is_whole {
            self.resyncs += 1;
            // Reading takes half of the time at most, however often events are lost.
            self.read_all((self.clock)() + RESYNC.max(self.took));
        }
    }

    /// Has everything read, at `when` at the latest.
    fn read_all(&mut self, when: Millis) {
        self.is_settled = false;
        self.is_full = true;
        // A source that is lost is tried when its time comes, unless somebody asks.
        if self.lost.is_none() || when == 0 {
            self.next_read = self.next_read.min(when);
        }
    }

    fn read(&mut self, waker: &Waker) {
        let (start, spent) = ((self.clock)(), (self.cpu)());
        match self.try_read(waker) {
            Ok(()) => {
                let end = (self.clock)();
                self.took = end.saturating_sub(start);
                self.between = spent.saturating_sub(self.spent);
                self.spent = (self.cpu)();
                self.cost = self.spent.saturating_sub(spent);
                self.read_at = end;
                let pause = match (self.is_settled, self.state.has_unknown()) {
                    // What the terse read does not explain is read at once.
                    (false, true) if !self.is_full => 0,
                    (false, _) if self.is_full => RESYNC,
                    (false, _) => CONFIRM,
                    (true, _) => {
                        let interval = self.source.sweep_interval().as_millis() as Millis;
                        let polite = (self.took * POLITE.0).min(POLITE.1);
                        interval.saturating_sub(self.took).max(polite).max(self.pause(ROUTINE))
                    }
                };
                self.is_full |= self.state.has_unknown();
                self.next_read = end + pause.max(self.took);
                self.state.retry(RETRIES.0, true);
                self.find();
            }
            Err(error) => self.lose(error),
        }
    }

    /// Reads everything, or which flows there are. Events that are older are taken before it, those that came meanwhile
    /// after it.
    fn try_read(&mut self, waker: &Waker) -> Result<(), SourceError> {
        let drained = self.drain(waker);
        if self.lost.is_none() {
            drained?;
        } // otherwise the read connects again
        let is_full = std::mem::take(&mut self.is_full) || !self.try_read_ids()?;
        if is_full {
            self.syncs.iter_mut().for_each(|sync| sync.is_covered = true);
            self.full_reads += 1;
            self.state.begin();
            let Follower { source, state, .. } = self;
            let ports = state.ports().clone();
            source.dump(&ports, &mut |sighting| state.saw(sighting))?;
            self.last_full = Some((self.clock)());
        }
        self.drain(waker)?;
        let is_open = self.state.finish(self.source.is_exact());
        self.is_settled = !is_open && !self.is_full && (is_full || !self.state.has_unknown());
        Ok(())
    }

    fn try_read_ids(&mut self) -> Result<bool, SourceError> {
        self.state.begin();
        let Follower { source, state, .. } = self;
        source.dump_ids(&mut |id| state.saw_id(id))
    }

    fn lose(&mut self, SourceError(error): SourceError) {
        let now = (self.clock)();
        for sync in self.syncs.drain(..) {
            // Who no longer waits is no error.
            let _ = sync.answer.send(Err(error.clone()));
        }
        if self.lost.is_none() {
            warn!("{} cannot be read: {error}; the flows known from it stay", self.source.describe());
            if now.saturating_sub(self.found) >= STEADY {
                self.back_off = BACK_OFF.0;
            }
        }
        self.lost = Some(error);
        self.is_settled = false;
        self.is_full = true;
        self.next_read = now + self.back_off;
        self.back_off = (self.back_off * 2).min(BACK_OFF.1);
    }

    fn find(&mut self) {
        if self.lost.take().is_some() {
            self.found = (self.clock)();
            info!("{} can be read again", self.source.describe());
        }
    }

    fn answer(&mut self) {
        let flows = if self.syncs.is_empty() { 0 } else { self.state.len() };
        self.syncs.retain(|sync| {
            if sync.is_covered {
                let _ = sync.answer.send(Ok(flows));
            }
            !sync.is_covered
        });
    }

    /// Brings the tables in step with what is known.
    fn apply(&mut self) {
        let now = (self.clock)();
        let Follower { flows, state, alive, .. } = self;
        in_batches(flows, |table| state.apply(now, table, alive, BATCH));
        state.select(|| {
            let marks = lock(flows).marks();
            let deadline = Instant::now() + SETTLE;
            while marks.iter().any(|mark| !mark.is_reached()) && Instant::now() < deadline {
                std::thread::sleep(BREATH);
            }
        });
    }

    /// How it stands.
    pub fn report(&self) -> MirrorReport {
        let mut report = MirrorReport {
            source: self.source.describe(),
            error: self.lost.clone(),
            since_full: self.last_full.map(|then| Duration::from_millis((self.clock)().saturating_sub(then))),
            full_reads: self.full_reads,
            resyncs: self.resyncs,
            lost_events: self.lost_events,
            keepalive: self.alive.rates(),
            given_up: self.alive.given_up(),
            ..MirrorReport::default()
        };
        self.state.report(&mut report);
        report
    }
}

/// Calls `work` with the tables as long as there is more to do.
fn in_batches(
    flows: &Mutex<dyn MirrorTable + Send>,
    mut work: impl FnMut(&mut (dyn MirrorTable + Send)) -> bool,
) {
    while work(&mut *lock(flows)) {
        std::thread::sleep(BREATH);
    }
}

fn lock<T: ?Sized>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
