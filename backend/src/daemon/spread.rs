//! Queues on their way from worker to worker: what the user pins and what the balancer decides, one move at a time. The event
//! loop goes on with it whenever it has a turn, and is woken by a timer while there is something to go on with.

use super::Daemon;
use crate::clock;
use crate::control::protocol::{LastMove, SpreadShow};
use crate::counters::Count;
use crate::datapath::{DatapathPort, Moved, QueueMove};
use crate::port_config::PortConfig;
use crate::spread::{self, Balancer, Millis, QueueId, QueueSample, Sample};
use anyhow::{Context, Result, bail};
use event_manager::{EventOps, EventSet, Events, MutEventSubscriber};
use log::{debug, error, info, warn};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};
use switch_core::packet::PortId;
use vmm_sys_util::timerfd::TimerFd;

/// How often a move is looked after: it takes some 100 µs if the host has nothing of the port.
const LOOK: Duration = Duration::from_millis(1);
/// How soon a move that the user wants is tried again when the host took too long.
const RETRY: Millis = 1000;

/// Wakes the event loop, which then does all else.
pub struct Ticker(TimerFd);

impl MutEventSubscriber for Ticker {
    fn process(&mut self, _: Events, _: &mut EventOps) {
        // It is there to be read: that is why we are called.
        let _ = self.0.wait();
    }

    fn init(&mut self, ops: &mut EventOps) {
        if let Err(error) = ops.add(Events::new(&self.0, EventSet::IN)) {
            warn!("queues stay with their workers, a timer cannot be watched: {error:?}");
        }
    }
}

/// A move that is being carried out, of a port by its name.
struct Moving {
    port: String,
    step: QueueMove,
    pinned: bool,
}

/// What the daemon knows of moves.
pub struct Spread {
    balancer: Balancer,
    moving: Option<Moving>,
    /// A queue may be somewhere else than the user wants it, to be looked at from this time on.
    astray: Option<Millis>,
    /// The queue that its worker has kept last: others go first.
    kept: Option<QueueId>,
    moves: u64,
    last: Option<(LastMove, Instant)>,
    /// Who waits for a port's queues to be where the user wants them.
    waiting: Vec<(PortId, Arc<AtomicBool>)>,
    ticker: Arc<Mutex<Ticker>>,
}

impl Spread {
    /// Nothing has been measured, and nothing moves.
    pub fn new() -> Result<Spread> {
        Ok(Spread {
            balancer: Balancer::new(clock::cycles_per_micro() * 1000),
            moving: None,
            astray: None,
            kept: None,
            moves: 0,
            last: None,
            waiting: Vec::new(),
            ticker: Arc::new(Mutex::new(Ticker(TimerFd::new().context("cannot make a timer")?))),
        })
    }

    /// What wakes the event loop.
    pub fn ticker(&self) -> Arc<Mutex<Ticker>> {
        self.ticker.clone()
    }

    /// For `show`.
    pub fn show(&self, rebalance: bool) -> SpreadShow {
        let last = self
            .last
            .as_ref()
            .map(|(last, since)| LastMove { seconds: since.elapsed().as_secs_f64(), ..last.clone() });
        SpreadShow { rebalance, moves: self.moves, last }
    }
}

/// What a queue has cost, on all workers together.
fn cycles(port: &DatapathPort, queue: usize) -> u64 {
    port.counters.iter().filter_map(|counters| counters.queue_cycles.get(queue)).map(Count::get).sum()
}

impl Daemon {
    /// The workers for a port's queues: those that the user wants, else those that have least to do.
    pub(super) fn choose_workers(&self, config: &PortConfig) -> Vec<usize> {
        let (workers, queues) = (self.workers(), usize::from(config.queues()));
        let pinned: Option<Vec<usize>> = (0..queues).map(|queue| config.pinned_to(queue, workers)).collect();
        pinned.unwrap_or_else(|| self.spread.balancer.place(workers, &self.queue_samples(), queues))
    }

    pub(super) fn workers(&self) -> usize {
        self.config.datapath.workers()
    }

    fn queue_samples(&self) -> Vec<QueueSample> {
        let workers = self.workers();
        let of = |port: &super::Port| -> Vec<QueueSample> {
            let DatapathPort { id, polled_by, .. } = &port.datapath;
            let sample = |(queue, &worker): (usize, &usize)| QueueSample {
                id: QueueId { port: *id, queue },
                worker,
                pinned: port.config.pinned_to(queue, workers).is_some(),
                cycles: cycles(&port.datapath, queue),
            };
            polled_by.iter().enumerate().map(sample).collect()
        };
        self.ports.values().flat_map(of).collect()
    }

    /// `set-port`: pins a port's queues to these workers, or to none; the flag is set when they are there.
    pub(super) fn set_workers(&mut self, name: &str, workers: Vec<u16>) -> Result<Arc<AtomicBool>> {
        let workers = (!workers.is_empty()).then_some(workers);
        let config = PortConfig { workers, ..self.port(name)?.config.clone() };
        config.validate()?;
        config.check_workers(self.workers())?;
        match &mut self.ovs {
            Some(ovs) => {
                if !ovs.set_workers(name, config.workers.clone(), clock::millis())? {
                    bail!("Open vSwitch has no interface '{name}' yet");
                }
            }
            None => self.state.record_set_workers(name, config.workers.as_deref())?,
        }
        let done = Arc::new(AtomicBool::new(false));
        if let Some(port) = self.ports.get_mut(name) {
            port.config = config;
            self.spread.waiting.push((port.datapath.id, done.clone()));
        }
        self.spread_anew();
        Ok(done)
    }

    /// Has the event loop see to it that queues are where the user wants them.
    pub(super) fn spread_anew(&mut self) {
        self.spread.astray = Some(0);
    }

    /// Goes on with what there is to move.
    pub(super) fn follow_spread(&mut self) {
        let now = clock::millis();
        self.go_on(now);
        if self.spread.moving.is_none() && self.spread.astray.is_some_and(|when| now >= when) {
            self.spread.astray = None;
            self.bring_back();
        }
        if self.spread.moving.is_none() && self.workers() > 1 && self.spread.balancer.is_due(now) {
            let busy =
                self.datapath.worker_counters.iter().map(|counters| counters.busy_cycles.get()).collect();
            let sample = Sample { now, busy, queues: self.queue_samples() };
            let step = self.spread.balancer.look(sample).filter(|_| self.config.datapath.rebalance);
            if let Some(spread::Move { id, to, .. }) = step {
                let port = self.ports.iter().find(|(_, port)| port.datapath.id == id.port);
                if let Some(name) = port.map(|(name, _)| name.clone()) {
                    self.begin_move(name, id.queue, to, false);
                }
            }
        }
        self.tell_waiting();
        self.set_timer(now);
    }

    /// Begins to move the first queue that is not where the user wants it.
    fn bring_back(&mut self) {
        let workers = self.workers();
        let astray = self.ports.iter().flat_map(|(name, port)| {
            let queues = port.datapath.polled_by.iter().enumerate();
            queues.filter_map(move |(queue, &worker)| {
                let to = port.config.pinned_to(queue, workers).filter(|&to| to != worker)?;
                Some((QueueId { port: port.datapath.id, queue }, name, to))
            })
        });
        let first = astray.min_by_key(|(id, ..)| self.spread.kept == Some(*id));
        if let Some((id, name, to)) = first {
            self.begin_move(name.clone(), id.queue, to, true);
        }
    }

    fn begin_move(&mut self, port: String, queue: usize, to: usize, pinned: bool) {
        let Some(there) = self.ports.get(&port) else { return };
        let step = self.datapath.begin_move(&there.datapath, queue, to);
        self.spread.moving = Some(Moving { port, step, pinned });
    }

    /// Goes on with a move, and with the next one that the user wants when it is done.
    fn go_on(&mut self, now: Millis) {
        let Some(Moving { port: name, step, pinned }) = self.spread.moving.take() else { return };
        let port = self.ports.get_mut(&name).filter(|port| port.datapath.id == step.id);
        // With its port the move is gone.
        let Some(port) = port else { return self.spread_anew() };
        let QueueMove { id, queue, from, to } = step;
        match self.datapath.go_on(&mut port.datapath, step) {
            Moved::NotYet => self.spread.moving = Some(Moving { port: name, step, pinned }),
            Moved::Kept => {
                debug!("port {name}: queue {queue} stays with worker {from} for now, the host takes long");
                self.spread.astray = Some(now + RETRY);
                self.spread.kept = Some(QueueId { port: id, queue });
            }
            Moved::Done => {
                let why = if pinned { "pinned" } else { "rebalanced" };
                info!("port {name}: queue {queue} moved from worker {from} to {to}: {why}");
                self.spread.balancer.moved(QueueId { port: id, queue }, now);
                self.spread.moves += 1;
                let last = LastMove {
                    port: name,
                    queue: queue as u16,
                    from: from as u32,
                    to: to as u32,
                    pinned,
                    seconds: 0.0,
                };
                self.spread.last = Some((last, Instant::now()));
                self.spread_anew();
            }
        }
    }

    /// Tells those who wait for a port whose queues are where the user wants them, and are not to be fetched back because the
    /// database has yet to tell what the user wants; or which is gone.
    fn tell_waiting(&mut self) {
        let workers = self.workers();
        let (ports, moving, ovs) = (&self.ports, &self.spread.moving, &self.ovs);
        self.spread.waiting.retain(|(id, done)| {
            let port = ports.iter().find(|(_, port)| port.datapath.id == *id);
            let is_there = port.is_none_or(|(name, port)| {
                if ovs.as_ref().is_some_and(|ovs| ovs.is_pinning(name)) {
                    return false;
                }
                let mut queues = port.datapath.polled_by.iter().enumerate();
                queues.all(|(queue, worker)| {
                    port.config.pinned_to(queue, workers).is_none_or(|to| to == *worker)
                })
            });
            let is_done = is_there && moving.as_ref().is_none_or(|moving| moving.step.id != *id);
            if is_done {
                done.store(true, Ordering::Release);
            }
            !is_done
        });
    }

    /// Has the event loop woken when there is something to go on with.
    fn set_timer(&self, now: Millis) {
        let Spread { balancer, moving, astray, .. } = &self.spread;
        let window = (self.workers() > 1).then(|| balancer.due(now));
        let until = |when: Millis| Duration::from_millis(when.saturating_sub(now)).max(LOOK);
        let next = match moving {
            Some(_) => Some(LOOK),
            None => {
                let told = self.ovs.as_ref().and_then(|ovs| ovs.due());
                astray.iter().copied().chain(window).chain(told).min().map(until)
            }
        };
        if let Some(next) = next
            && let Err(error) = super::lock(&self.spread.ticker).0.reset(next, None)
        {
            error!("a timer cannot be set: {error}");
        }
    }
}
