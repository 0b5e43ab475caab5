//! What the host's kernel has configured on the representor TAPs: their MTU, and what there is that packets would miss if
//! they went around them.
//!
//! Most packets of a guest never pass its TAP. Whatever drops or changes packets there (tc qdiscs and filters, nftables
//! chains of the netdev hooks, XDP programs) would be bypassed, so a port with any of it must send its packets
//! through the TAP. One thread follows rtnetlink and nfnetlink for a set of devices, and tells when the answer has changed. It sleeps
//! while nothing changes.
//!
//! Not seen: programs attached by BPF links of the kind tcx, which netlink does not show.

pub(crate) mod netlink;
mod nftables;
mod packet;
mod rtnetlink;
mod stack;
#[cfg(test)]
pub(crate) mod tests;

pub use packet::read_by_calls;
pub use rtnetlink::OUR_FILTER;
pub use stack::Stack;

use crate::wake::AbortOnPanic;
use netlink::{Events, Requests};
use netlink_sys::protocols::NETLINK_ROUTE;
use nftables::Nftables;
use rtnetlink::Reasons;
use stack::Xfrm;
use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};
use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

/// What the kernel has configured on a device.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Device {
    /// Its index in the network namespace. A device that was deleted and made anew has another.
    pub ifindex: u32,
    /// Its MTU in bytes, as `ip link` shows it: of what follows the Ethernet header.
    pub mtu: u32,
    /// Why packets that come in at the device (that is, those that its guest sends) must not go around it, in a few
    /// words; none if nothing but defaults is there.
    pub ingress: Option<String>,
    /// Why packets that leave by the device (those for its guest) must not go around it.
    pub egress: Option<String>,
}

/// Follows the state of devices in one network namespace. Dropped, it stops.
pub struct HostState {
    shared: Arc<Shared>,
    thread: Option<JoinHandle<()>>,
}

struct Shared {
    orders: Mutex<Orders>,
    answer: Mutex<Answer>,
    wake: EventFd,
}

#[derive(Default)]
struct Orders {
    names: BTreeSet<String>,
    /// Those of them whose XDP program is our own.
    served: BTreeSet<String>,
    /// Whether the host's network is followed.
    stack: bool,
    changed: bool,
    stop: bool,
}

#[derive(Default)]
struct Answer {
    devices: Arc<BTreeMap<String, Device>>,
    /// None if it is not followed, or was not read yet.
    stack: Option<Stack>,
    warnings: Vec<String>,
    /// How often everything was read, for tests.
    reads: u64,
}

impl HostState {
    /// Starts the thread, which follows devices of the caller's network namespace; none until [`HostState::watch`]. It
    /// calls `tell` when [`HostState::state`] or [`HostState::warnings`] has changed. `tell` must not wait for whoever drops
    /// this, because dropping waits for the thread.
    ///
    /// # Errors
    /// The kernel gives no rtnetlink socket, or no thread. Without nfnetlink it starts with a warning.
    pub fn spawn(tell: Box<dyn Fn() + Send>) -> io::Result<HostState> {
        HostState::start(tell, SWEEP_INTERVAL)
    }

    fn start(tell: Box<dyn Fn() + Send>, sweep: Duration) -> io::Result<HostState> {
        let wake = EventFd::new(EFD_NONBLOCK)?;
        let shared = Arc::new(Shared { orders: Mutex::default(), answer: Mutex::default(), wake });
        let follower = Follower::new(shared.clone(), tell, sweep)?;
        let thread = std::thread::Builder::new().name("host-state".into()).spawn(move || {
            let _alarm = AbortOnPanic("the follower of the host's state");
            follower.run();
        })?;
        Ok(HostState { shared, thread: Some(thread) })
    }

    /// Sets which devices are followed, which of them are served by an XDP program of ours, and whether the host's network is followed.
    /// Their state is there when `tell` has been called.
    pub fn watch(&self, names: BTreeSet<String>, served: BTreeSet<String>, stack: bool) {
        let mut orders = lock(&self.shared.orders);
        if (&orders.names, &orders.served, orders.stack) != (&names, &served, stack) {
            (orders.names, orders.served, orders.stack) = (names, served, stack);
            orders.changed = true;
            self.shared.ring();
        }
    }

    /// The devices as they were read last, by name. One that does not exist, has not been read yet, or cannot be read is
    /// not among them.
    pub fn state(&self) -> Arc<BTreeMap<String, Device>> {
        lock(&self.shared.answer).devices.clone()
    }

    /// What the host's network was seen to do last. Until it is followed, and has been read, that it is not known.
    pub fn stack(&self) -> Stack {
        let stack = lock(&self.shared.answer).stack.clone();
        stack.unwrap_or_else(|| Stack::both("the host's network was not seen yet"))
    }

    /// What cannot be seen, one line for each: what it means for the devices is not known. Each is logged once when it
    /// appears.
    pub fn warnings(&self) -> Vec<String> {
        lock(&self.shared.answer).warnings.clone()
    }
}

impl Drop for HostState {
    fn drop(&mut self) {
        lock(&self.shared.orders).stop = true;
        self.shared.ring();
        if let Some(thread) = self.thread.take() {
            // A panic of it has ended the process.
            let _ = thread.join();
        }
    }
}

impl Shared {
    fn ring(&self) {
        // It fails only when the counter is full, and then the thread wakes anyway.
        let _ = self.wake.write(1);
    }
}

/// The thread's own.
struct Follower {
    shared: Arc<Shared>,
    tell: Box<dyn Fn() + Send>,
    /// After what time everything is read without a notification.
    sweep: Duration,
    names: BTreeSet<String>,
    served: BTreeSet<String>,
    /// The indexes of those that were there at the last reading.
    indexes: BTreeSet<u32>,
    requests: Requests,
    events: Events,
    /// Or why there is none, as a warning.
    nftables: Result<Nftables, String>,
    /// Or why it cannot be read.
    xfrm: Result<Option<Xfrm>, String>,
    /// Whether the host's network is followed.
    stack: bool,
    epoll: Epoll,
}

impl Follower {
    fn new(shared: Arc<Shared>, tell: Box<dyn Fn() + Send>, sweep: Duration) -> io::Result<Follower> {
        let events = Events::open(NETLINK_ROUTE, &rtnetlink::GROUPS)?;
        let requests = Requests::open(NETLINK_ROUTE)?;
        let nftables = Nftables::open().map_err(|error| no_nftables(&error));
        let epoll = Epoll::new()?;
        let interest = |fd: RawFd| epoll.ctl(ControlOperation::Add, fd, EpollEvent::new(EventSet::IN, 0));
        interest(shared.wake.as_raw_fd())?;
        interest(events.as_raw_fd())?;
        if let Ok(nftables) = &nftables {
            interest(nftables.events.as_raw_fd())?;
        }
        lock(&shared.answer)
            .warnings
            .extend(nftables.as_ref().err().inspect(|warning| log::warn!("{warning}")).cloned());
        let (names, served, indexes, stack) = Default::default();
        Ok(Follower {
            shared,
            tell,
            sweep,
            names,
            served,
            indexes,
            requests,
            events,
            nftables,
            xfrm: Ok(None),
            stack,
            epoll,
        })
    }

    fn run(mut self) {
        let mut last_read: Option<Instant> = None;
        let mut next_read: Option<Instant> = None;
        loop {
            self.wait(next_read);
            let now = Instant::now();
            let Some(ordered) = self.take_orders() else { return };
            let (events, nft_events) = (self.drain_rtnetlink(), self.drain_nftables() | self.drain_xfrm());
            if ordered || (events || nft_events) && !self.names.is_empty() {
                let soonest = last_read.map_or(now, |last| now.max(last + LEAST_INTERVAL));
                next_read = Some(next_read.map_or(soonest, |next| next.min(soonest)));
            }
            if next_read.is_some_and(|next| next <= now) {
                self.read_and_publish();
                let now = Instant::now();
                last_read = Some(now);
                let sweep = if self.stack { self.sweep.min(STACK_SWEEP) } else { self.sweep };
                next_read = (!self.names.is_empty()).then(|| now + sweep);
            }
        }
    }

    /// Sleeps until there is an event, an order, or it is `until`.
    fn wait(&self, until: Option<Instant>) {
        // Rounded up, so that it is not too early when the time is over.
        let millis = until.map_or(-1, |until| {
            let left = until.saturating_duration_since(Instant::now());
            left.as_micros().div_ceil(1000).try_into().unwrap_or(i32::MAX)
        });
        let mut events = [EpollEvent::default(); 4];
        // An interrupted wait is a short one: the caller looks at everything anyway.
        let _ = self.epoll.wait(millis, &mut events);
        let _ = self.shared.wake.read();
    }

    /// Takes new names over and says whether there were any; nothing if it is to stop.
    fn take_orders(&mut self) -> Option<bool> {
        let mut orders = lock(&self.shared.orders);
        if orders.stop {
            return None;
        }
        let changed = std::mem::take(&mut orders.changed);
        if changed {
            self.names.clone_from(&orders.names);
            self.served.clone_from(&orders.served);
            self.stack = orders.stack;
            drop(orders);
            // Not before it is needed: the kernel loads a module for it.
            if self.stack && matches!(self.xfrm, Ok(None)) {
                self.xfrm = self.open_xfrm().map_err(|error| error.to_string());
            }
        }
        Some(changed)
    }

    fn open_xfrm(&self) -> io::Result<Option<Xfrm>> {
        let xfrm = Xfrm::open()?;
        if let Some(xfrm) = &xfrm {
            let events = EpollEvent::new(EventSet::IN, 0);
            self.epoll.ctl(ControlOperation::Add, xfrm.events.as_raw_fd(), events)?;
        }
        Ok(xfrm)
    }

    fn drain_rtnetlink(&mut self) -> bool {
        let (names, indexes) = (&self.names, &self.indexes);
        self.events.drain(|message| rtnetlink::concerns(message, names, indexes))
    }

    fn drain_nftables(&mut self) -> bool {
        let concerns = if self.stack { nftables::concerns_with_rules } else { nftables::concerns };
        self.nftables.as_mut().is_ok_and(|nftables| nftables.events.drain(concerns))
    }

    fn drain_xfrm(&mut self) -> bool {
        let is_told = |xfrm: &mut Option<Xfrm>| xfrm.as_mut().is_some_and(|xfrm| xfrm.events.drain(|_| true));
        self.xfrm.as_mut().is_ok_and(is_told) && self.stack
    }

    fn read_and_publish(&mut self) {
        let (devices, warnings) = self.read();
        let stack = self.stack.then(|| stack::read(&mut self.nftables, &mut self.xfrm));
        self.indexes = devices.values().map(|device| device.ifindex).collect();
        let changed = {
            let mut answer = lock(&self.shared.answer);
            answer.reads += 1;
            for warning in warnings.iter().filter(|warning| !answer.warnings.contains(warning)) {
                log::warn!("{warning}");
            }
            let changed = *answer.devices != devices || answer.stack != stack || answer.warnings != warnings;
            answer.stack = stack;
            if changed {
                (answer.devices, answer.warnings) = (Arc::new(devices), warnings);
            }
            changed
        };
        if changed {
            (self.tell)();
        }
    }

    /// Reads everything about the devices. What cannot be read is taken for a reason and said in a warning, except where
    /// the kernel has no nftables for us: then there is the warning alone.
    fn read(&mut self) -> (BTreeMap<String, Device>, Vec<String>) {
        let mut devices = BTreeMap::new();
        let mut warnings = Vec::from_iter(self.nftables.as_ref().err().cloned());
        if self.names.is_empty() {
            return (devices, warnings);
        }
        // The devices first: what is done to one that comes afterwards is not missed, because it is not there yet.
        let mut links = Vec::new();
        for name in &self.names {
            match rtnetlink::link(&mut self.requests, name) {
                Ok(link) => links.extend(link),
                Err(error) => warnings.push(format!("device {name} cannot be read: {error}")),
            }
        }
        let qdiscs = rtnetlink::qdiscs(&mut self.requests).map_err(|error| error.to_string());
        let (mut chains, mut unknown_chains) = (Vec::new(), None);
        match self.nftables.as_mut().map_or(Ok(Vec::new()), Nftables::chains) {
            Ok(all) => chains = all,
            Err(error) => {
                warnings.push(no_nftables(&error));
                unknown_chains =
                    (!nftables::is_unavailable(&error)).then(|| format!("nftables unknown: {error}"));
            }
        }
        for link in links {
            let traffic_control = qdiscs.as_ref().map_err(String::clone).and_then(|qdiscs| {
                let qdiscs = qdiscs.get(&link.ifindex).map_or(&[][..], Vec::as_slice);
                rtnetlink::reasons(&mut self.requests, link.ifindex, qdiscs)
                    .map_err(|error| error.to_string())
            });
            let mut reasons = traffic_control.unwrap_or_else(|error| {
                warnings.push(format!("traffic control of {} cannot be read: {error}", link.name));
                let unknown = Some(format!("tc unknown: {error}"));
                Reasons { ingress: unknown.clone(), egress: unknown }
            });
            if link.xdp && !self.served.contains(&link.name) {
                reasons.ingress = Some("XDP program".into());
            }
            for chain in chains.iter().filter(|chain| chain.hooks(&link.name)) {
                let reason = if chain.egress { &mut reasons.egress } else { &mut reasons.ingress };
                reason.get_or_insert_with(|| chain.reason());
            }
            for reason in [&mut reasons.ingress, &mut reasons.egress] {
                *reason = reason.take().or_else(|| unknown_chains.clone());
            }
            let Reasons { ingress, egress } = reasons;
            devices.insert(link.name, Device { ifindex: link.ifindex, mtu: link.mtu, ingress, egress });
        }
        (devices, warnings)
    }
}

fn no_nftables(error: &io::Error) -> String {
    format!("nftables cannot be read, so its chains at representors are not noticed: {error}")
}

/// Whatever panicked with the lock held has ended the process or left whole values.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// How far two readings are apart at least: ten a second, however fast things change.
const LEAST_INTERVAL: Duration = Duration::from_millis(100);
/// After what time everything is read without a notification, for what the kernel does not tell.
const SWEEP_INTERVAL: Duration = Duration::from_secs(10);
/// The same where the host's network is followed: the kernel does not tell of tables of iptables.
const STACK_SWEEP: Duration = Duration::from_secs(1);
