//! What the control side of a port and the workers share.
//!
//! The control side describes the rings as the front-end set them up (`Setup`); `PortShared::update` compares what
//! is wanted with what runs, stops what differs, waits for the workers, and starts what is new. Every message of the
//! front-end is such an update, and so is the end of a connection.

use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use virtio_bindings::virtio_config::{VIRTIO_F_IN_ORDER, VIRTIO_F_RING_PACKED};
use virtio_bindings::virtio_net as net;
use virtio_bindings::virtio_ring::{VIRTIO_RING_F_EVENT_IDX, VIRTIO_RING_F_INDIRECT_DESC};
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use super::control::{ActivePairs, Device, Server};
use crate::log_limit::PortLog;
use crate::quiesce::Quiescence;
use crate::virtio::{
    Call, ControlRing, DirtyLog, GuestRegions, GuestRx, GuestTx, Kick, Pages, Placement, RingBase,
    RingConfig, RingError, RingRecords, has_feature,
};

/// `VHOST_F_LOG_ALL`: the front-end wants to know which pages we write (linux/vhost_types.h).
pub(super) const VHOST_F_LOG_ALL: u32 = 26;

/// What happens to a port, told to the daemon by a callback.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum PortEvent {
    /// The guest's driver runs this many queue pairs; said again when their number changes.
    LinkUp {
        /// Queue pairs.
        queues: usize,
    },
    /// The guest's driver, or the guest, is gone.
    LinkDown,
    /// A ring was malformed and is stopped until its driver resets it.
    Fault(String),
}

/// The callback; called on control threads only.
pub type OnEvent = Box<dyn Fn(PortEvent) + Send + Sync>;

/// The index, in vhost-user messages, of the ring that the guest receives by.
pub const fn rx_ring(queue: usize) -> usize {
    2 * queue
}

/// The index, in vhost-user messages, of the ring that the guest transmits by.
pub const fn tx_ring(queue: usize) -> usize {
    2 * queue + 1
}

/// A ring as the front-end has set it up so far.
#[derive(Default)]
pub(super) struct RingSetup {
    pub size: u16,
    /// Guest-physical addresses of descriptor table, available ring and used ring; of a packed ring those of descriptors, driver
    /// event area and device event area.
    pub addresses: Option<(u64, u64, u64)>,
    pub ready: bool,
    pub enabled: bool,
    pub kick: Option<Arc<Kick>>,
    pub call: Arc<Call>,
    pub base: Arc<RingBase>,
}

/// A port as the front-end has set it up so far.
#[derive(Default)]
pub(super) struct Setup {
    pub memory: Option<Arc<GuestRegions>>,
    /// That some of it is lost was said.
    pub loss_told: bool,
    /// Where the front-end wants to read what we write in it, while it migrates the guest.
    pub log: Option<Arc<DirtyLog>>,
    pub features: u64,
    pub rings: Vec<RingSetup>,
}

/// All that makes a running ring what it is: if any of it changes, the ring is started anew.
#[derive(Clone)]
struct Running {
    memory: Arc<GuestRegions>,
    config: RingConfig,
    kick: Option<Arc<Kick>>,
}

impl PartialEq for Running {
    fn eq(&self, other: &Self) -> bool {
        let kick = |r: &Self| r.kick.as_ref().map(Arc::as_ptr);
        Arc::ptr_eq(&self.memory, &other.memory) && self.config == other.config && kick(self) == kick(other)
    }
}

impl Setup {
    fn new(rings: usize, records: Option<&RingRecords>) -> Self {
        let ring = |ring| {
            let record = records.and_then(|records| records.ring(ring));
            RingSetup { base: Arc::new(RingBase::recorded(record)), ..RingSetup::default() }
        };
        Setup { rings: (0..rings).map(ring).collect(), ..Setup::default() }
    }

    fn device(&self) -> Device {
        // A control queue is beside the pairs.
        Device { features: self.features, pairs: self.rings.len() / 2 }
    }

    /// Makes the memory log what is written there, or not, as is wanted now.
    fn settle(&mut self) {
        let log = self.log.as_ref().filter(|_| has_feature(self.features, VHOST_F_LOG_ALL));
        if let Some(memory) = &mut self.memory
            && memory.log().map(Arc::as_ptr) != log.map(Arc::as_ptr)
        {
            *memory = Arc::new(memory.with_log(log.cloned()));
        }
    }

    /// How ring `i` is to run, if it is.
    fn wanted(&self, i: usize) -> Option<Running> {
        let (ring, device) = (&self.rings[i], self.device());
        if i >= 2 * device.pairs && device.control_ring() != Some(i) {
            return None;
        }
        let (desc, avail, used) = ring.addresses.filter(|_| ring.ready && ring.enabled)?;
        Some(Running {
            // What is lost is kept, so that whoever maps the same once more is known, but not used.
            memory: self.memory.clone().filter(|memory| !memory.is_lost())?,
            config: RingConfig { size: ring.size, desc, avail, used, features: self.features },
            kick: ring.kick.clone(),
        })
    }
}

struct Control {
    setup: Setup,
    /// By ring. A ring that could not be started counts as running: it is tried again when its setup changes.
    running: Vec<Option<Running>>,
}

/// A ring as the workers find it.
enum Live {
    Stopped,
    Rx(Arc<GuestRx>),
    /// The ring itself until its worker has taken it, its id from then on.
    Tx(u64, Option<GuestTx>),
    /// None of theirs.
    Control(#[expect(dead_code, reason = "held until it is to end")] Server),
}

/// Rings that were found malformed.
struct Faults {
    /// Since the port exists.
    count: AtomicU64,
    /// The last one that is not yet told, and what tells the port's event loop of it.
    untold: Mutex<Option<(usize, RingError)>>,
    event: EventFd,
}

impl Faults {
    fn add(&self, ring: usize, error: RingError) {
        self.count.fetch_add(1, Ordering::Relaxed);
        *lock(&self.untold) = Some((ring, error));
        // An error means that the counter is full: the event loop is being told already.
        let _ = self.event.write(1);
    }
}

/// What the control side of a port and the workers share.
pub struct PortShared {
    log: PortLog,
    connected: AtomicBool,
    quiescence: Arc<Quiescence>,
    on_event: OnEvent,
    /// What outlives us of the rings.
    records: Option<RingRecords>,
    /// Held over whole updates, barrier included: never taken by a worker.
    control: Mutex<Control>,
    /// Held for an assignment: what workers look into when the version has moved.
    live: Mutex<Vec<Live>>,
    /// Queue pairs that run; 0: link down.
    queues: AtomicUsize,
    features: AtomicU64,
    /// As its driver says by a control queue that we serve.
    active: ActivePairs,
    /// Of the guest's memory.
    pages: Mutex<Option<Arc<Pages>>>,
    faults: Arc<Faults>,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // A panic elsewhere must not take the port's control path with it.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl PortShared {
    pub(super) fn new(
        name: &str,
        pairs: usize,
        records: Option<RingRecords>,
        quiescence: Arc<Quiescence>,
        on_event: OnEvent,
    ) -> std::io::Result<Self> {
        let rings = 2 * pairs + 1;
        let setup = Setup::new(rings, records.as_ref());
        Ok(PortShared {
            log: PortLog::new(name)?,
            connected: AtomicBool::new(false),
            active: ActivePairs::all(quiescence.clone()),
            quiescence,
            on_event,
            control: Mutex::new(Control { setup, running: vec![None; rings] }),
            records,
            live: Mutex::new((0..rings).map(|_| Live::Stopped).collect()),
            queues: AtomicUsize::new(0),
            features: AtomicU64::new(0),
            pages: Mutex::new(None),
            faults: Arc::new(Faults {
                count: AtomicU64::new(0),
                untold: Mutex::new(None),
                event: EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC)?,
            }),
        })
    }

    /// The port's name.
    pub fn name(&self) -> &str {
        self.log.name()
    }

    /// Where to write what is to be logged about the port.
    pub(super) fn log(&self) -> &PortLog {
        &self.log
    }

    /// The queue pairs that the port may have.
    pub fn max_queues(&self) -> usize {
        lock(&self.live).len() / 2
    }

    /// The queue pairs that run now and that the driver wants to receive by.
    pub fn queues(&self) -> usize {
        self.queues.load(Ordering::Acquire).min(self.active.count())
    }

    /// Whether at least queue pair 0 runs.
    pub fn link_up(&self) -> bool {
        self.queues() > 0
    }

    /// The virtio features that the driver has accepted; 0 without a connection.
    pub fn features(&self) -> u64 {
        self.features.load(Ordering::Acquire)
    }

    /// Where the guest's memory is; `None` while it shares none.
    pub fn placement(&self) -> Option<Placement> {
        lock(&self.pages).as_ref().map(|pages| pages.placement())
    }

    /// Whether a front-end is connected, be its guest's driver running or not.
    pub fn is_connected(&self) -> bool {
        self.connected.load(Ordering::Acquire)
    }

    /// A front-end has connected.
    pub(super) fn connected(&self) {
        self.connected.store(true, Ordering::Release);
    }

    /// Rings that were found malformed, since the port exists.
    pub fn faults(&self) -> u64 {
        self.faults.count.load(Ordering::Relaxed)
    }

    /// For the worker that owns `queue`, when the version has moved: leaves in `slot` the ring that is to be consumed
    /// from now on. A ring that was stopped or started again is dropped, which hands back its position; clear bursts
    /// of it first.
    pub fn take_tx(&self, queue: usize, slot: &mut Option<GuestTx>) {
        let mut live = lock(&self.live);
        match live.get_mut(tx_ring(queue)) {
            Some(Live::Tx(id, start)) => {
                if slot.as_ref().is_none_or(|tx| tx.id() != *id) {
                    *slot = start.take();
                }
            }
            _ => *slot = None,
        }
    }

    /// For the worker that owned `queue`: leaves the ring, as it stands, for the worker that owns it from now on. One that
    /// was stopped meanwhile is dropped, which hands back its position; no burst of it may be held.
    pub fn give_back_tx(&self, queue: usize, ring: GuestTx) {
        let mut live = lock(&self.live);
        match live.get_mut(tx_ring(queue)) {
            Some(Live::Tx(id, place)) if *id == ring.id() => *place = Some(ring),
            _ => {
                drop(live); // it may be the last to hold the guest's memory
                drop(ring);
            }
        }
    }

    /// The ring by which the guest receives on `queue`, if it runs and is to be used. To be fetched anew when the version has moved.
    pub fn rx(&self, queue: usize) -> Option<Arc<GuestRx>> {
        if queue >= self.active.count() {
            return None;
        }
        match lock(&self.live).get(rx_ring(queue)) {
            Some(Live::Rx(rx)) => Some(rx.clone()),
            _ => None,
        }
    }

    /// To be called once by a worker that found `ring` ([`rx_ring`] or [`tx_ring`] of its queue) malformed. The port's
    /// event loop logs it.
    pub fn fault(&self, ring: usize, error: RingError) {
        self.faults.add(ring, error);
    }

    /// Memory of some guest was lost: if it was this one's, the port is stopped, until the front-end shares other memory. Whether it
    /// was.
    pub fn check_memory(&self) -> bool {
        let is_news =
            |setup: &Setup| !setup.loss_told && setup.memory.as_ref().is_some_and(|memory| memory.is_lost());
        if !is_news(&lock(&self.control).setup) {
            return false;
        }
        self.update(|setup| setup.loss_told = true);
        // A ring of zeroes may have been found malformed meanwhile: that is no other fault.
        if lock(&self.faults.untold).take().is_none() {
            self.faults.count.fetch_add(1, Ordering::Relaxed);
        }
        self.tell(
            "stopped: memory of the guest is gone; its file was truncated, or huge pages ran out".to_owned(),
        );
        true
    }

    fn tell(&self, fault: String) {
        self.log.warn(&fault);
        (self.on_event)(PortEvent::Fault(fault));
    }

    pub(super) fn fault_event(&self) -> &EventFd {
        &self.faults.event
    }

    /// Logs and passes on the last fault.
    pub(super) fn tell_fault(&self) {
        let _ = self.faults.event.read();
        if self.check_memory() {
            return;
        }
        let untold = lock(&self.faults.untold).take();
        if let Some((ring, error)) = untold {
            let device = Device { features: self.features(), pairs: self.max_queues() };
            let what = match ring.is_multiple_of(2) {
                _ if device.control_ring() == Some(ring) => "control queue".to_owned(),
                true => format!("receive ring of queue {}", ring / 2),
                false => format!("transmit ring of queue {}", ring / 2),
            };
            self.tell(format!("{what} stopped: {error}"));
        }
    }

    /// Tells the front-end the position at which `ring`, which is stopped, goes on. From now on it knows better than the ring's
    /// record.
    pub(super) fn tell_base(&self, ring: usize) -> u16 {
        let control = lock(&self.control);
        let Some(setup) = control.setup.rings.get(ring) else { return 0 };
        if let (Some(record), Some(None)) = (setup.base.record(), control.running.get(ring)) {
            record.forget();
        }
        let base = setup.base.get();
        setup.base.name(base);
        base
    }

    /// The port is no more, and nobody will ask about its rings.
    pub fn forget_records(&self) {
        if let Some(records) = &self.records {
            records.remove();
        }
    }

    /// Sets the position at which `ring` starts; ignored while it runs.
    pub(super) fn set_base(&self, ring: usize, base: u16) {
        let control = lock(&self.control);
        if let (Some(setup), Some(None)) = (control.setup.rings.get(ring), control.running.get(ring)) {
            setup.base.name(base);
        }
    }

    /// Changes one ring's setup.
    pub(super) fn update_ring(&self, ring: usize, change: impl FnOnce(&mut RingSetup)) {
        self.update(|setup| {
            if let Some(ring) = setup.rings.get_mut(ring) {
                change(ring);
            }
        });
    }

    /// A driver has accepted these features; or the front-end logs what we write, or no longer, while the rings run.
    pub(super) fn set_features(&self, features: u64) {
        if !lock(&self.live).iter().any(|ring| matches!(ring, Live::Control(_))) {
            self.active.negotiated();
        }
        self.update(|setup| setup.features = features);
    }

    /// The end of a connection: stops all rings and lets go of the guest's memory.
    pub(super) fn disconnect(&self) {
        self.connected.store(false, Ordering::Release);
        self.update(|setup| *setup = Setup::new(setup.rings.len(), self.records.as_ref()));
        self.active.forget(); // nobody serves the control queue any more
    }

    /// Changes the setup, and makes what runs agree with it. When this returns, no worker uses a ring or memory that
    /// the setup no longer has, and the positions of stopped rings are final.
    pub(super) fn update(&self, change: impl FnOnce(&mut Setup)) {
        let mut guard = lock(&self.control);
        let control = &mut *guard;
        // Kept to the end, so that it is us who unmap what is replaced, not a worker.
        let old_memory = control.setup.memory.clone();
        change(&mut control.setup);
        control.setup.settle();
        let wanted: Vec<_> = (0..control.running.len()).map(|i| control.setup.wanted(i)).collect();

        let mut stopped = Vec::new();
        for (i, running) in control.running.iter_mut().enumerate() {
            if running.is_some() && *running != wanted[i] {
                *running = None;
                stopped.push(std::mem::replace(&mut lock(&self.live)[i], Live::Stopped));
            }
        }
        if !stopped.is_empty() {
            self.stop(stopped);
        }
        let device = control.setup.device();
        let mut started = false;
        for (i, wanted) in wanted.into_iter().enumerate() {
            if let (None, Some(wanted)) = (&control.running[i], wanted) {
                started |= self.start(i, &wanted, &control.setup.rings[i], device);
                control.running[i] = Some(wanted);
            }
        }
        self.features.store(control.setup.features, Ordering::Release);
        // What was there before goes with the old memory below.
        *lock(&self.pages) = control.setup.memory.as_ref().map(|memory| memory.pages().clone());
        let (before, now) = self.count_queues();
        if started || before != now {
            self.quiescence.publish();
        }
        drop(guard);
        drop(old_memory);
        self.tell_link(before, now);
    }

    /// Ends the use of rings that workers no longer find in `live`.
    fn stop(&self, rings: Vec<Live>) {
        for ring in &rings {
            if let Live::Rx(rx) = ring
                && !rx.stop()
            {
                self.log.warn("a receive ring was stopped while a worker was still filling it");
            }
        }
        // The workers drop what they hold of them; a transmit ring's position is written as it is dropped.
        self.quiescence.barrier();
    }

    /// Makes a ring that workers will find. False if it is impossible.
    fn start(&self, i: usize, running: &Running, setup: &RingSetup, device: Device) -> bool {
        let (memory, call, base) = (running.memory.clone(), setup.call.clone(), setup.base.clone());
        let live = if device.control_ring() == Some(i) {
            match ControlRing::new(memory, &running.config, running.kick.clone(), call, base) {
                Ok(ring) => {
                    let faults = self.faults.clone();
                    let on_fault = move |error| faults.add(i, error);
                    match Server::start(self.name(), ring, device, self.active.clone(), on_fault) {
                        Ok(server) => Ok(Live::Control(server)),
                        Err(e) => {
                            self.log.warn(format_args!("its control queue cannot be served: {e}"));
                            return false;
                        }
                    }
                }
                Err(e) => Err(e),
            }
        } else if i.is_multiple_of(2) {
            GuestRx::new(memory, &running.config, call, base).map(|rx| Live::Rx(Arc::new(rx)))
        } else {
            GuestTx::new(memory, &running.config, running.kick.clone(), call, base)
                .map(|tx| Live::Tx(tx.id(), Some(tx)))
        };
        match live {
            Ok(ring) => {
                lock(&self.live)[i] = ring;
                true
            }
            Err(e) => {
                self.fault(i, e);
                false
            }
        }
    }

    /// Queue pairs that ran and that run.
    fn count_queues(&self) -> (usize, usize) {
        let live = lock(&self.live);
        // What is beside the pairs is no queue of packets, nor is a control queue in the place of one.
        let runs = |pair: &[Live]| pair.iter().all(|ring| matches!(ring, Live::Rx(_) | Live::Tx(..)));
        let now = live.chunks_exact(2).take_while(|pair| runs(pair)).count();
        (self.queues.swap(now, Ordering::AcqRel), now)
    }

    fn tell_link(&self, before: usize, now: usize) {
        match (before, now) {
            (a, b) if a == b => {}
            (_, 0) => {
                self.log.info("link down");
                (self.on_event)(PortEvent::LinkDown);
            }
            _ => {
                let features = feature_names(self.features()).join(", ");
                self.log.info(format_args!("link up, queues {now}, {features}"));
                (self.on_event)(PortEvent::LinkUp { queues: now });
            }
        }
    }
}

/// The features of interest among `features`, in short words.
pub fn feature_names(features: u64) -> Vec<String> {
    const NAMES: [(u32, &str); 11] = [
        (net::VIRTIO_NET_F_MRG_RXBUF, "mergeable"),
        (net::VIRTIO_NET_F_CSUM, "csum"),
        (net::VIRTIO_NET_F_GUEST_CSUM, "guest-csum"),
        (net::VIRTIO_NET_F_HOST_TSO4, "tso"),
        (net::VIRTIO_NET_F_GUEST_TSO4, "guest-tso"),
        (net::VIRTIO_NET_F_HOST_USO, "uso"),
        (net::VIRTIO_NET_F_GUEST_USO4, "guest-uso"),
        (VIRTIO_RING_F_INDIRECT_DESC, "indirect"),
        (VIRTIO_RING_F_EVENT_IDX, "event-idx"),
        (VIRTIO_F_RING_PACKED, "packed"),
        (VIRTIO_F_IN_ORDER, "in-order"),
    ];
    NAMES.iter().filter(|(bit, _)| has_feature(features, *bit)).map(|(_, name)| (*name).to_owned()).collect()
}
