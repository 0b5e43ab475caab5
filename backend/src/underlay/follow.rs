//! The thread that keeps the ways of tunnels in step with the host's network. It sleeps while nothing changes.

use super::model::{Model, Target};
use super::rtnetlink;
use super::{Defaults, Tunnels};
use crate::host_state::netlink::{Events, Requests};
use crate::wake::AbortOnPanic;
use log::{debug, warn};
use netlink_sys::protocols::NETLINK_ROUTE;
use std::collections::{HashMap, HashSet};
use std::io;
use std::net::IpAddr;
use std::os::fd::{AsRawFd, RawFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};
use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};

/// Least time between two looks at all ways, however fast things change.
const LEAST_INTERVAL: Duration = Duration::from_millis(50);
/// How often the kernel is told that a neighbour is in use that does not answer, or has not been asked for long.
const ASK: Duration = Duration::from_secs(1);

/// After what time everything is looked at without an event, for what the kernel does not tell (`net.ipv4.ip_default_ttl` …).
const SWEEP: Duration = Duration::from_secs(60);

/// How often the kernel is asked for routes again that it tells of no change of: what it has learned of a path's MTU, redirects, settings.
const ROUTES: Duration = Duration::from_secs(5);

/// Follows the network of one network namespace for tunnels. Dropped, it stops.
pub struct Underlay {
    tunnels: Arc<Tunnels>,
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl Underlay {
    /// Starts the thread, in the caller's network namespace. It calls `tell` when flows of tunnels are to be compiled anew. `tell`
    /// must not wait for whoever drops this.
    ///
    /// # Errors
    /// The kernel gives no rtnetlink socket, or no thread.
    pub fn spawn(tunnels: Arc<Tunnels>, tell: Box<dyn Fn() + Send>) -> io::Result<Underlay> {
        let stop = Arc::new(AtomicBool::new(false));
        let follower = Follower::new(tunnels.clone(), stop.clone(), tell)?;
        let thread = std::thread::Builder::new().name("underlay".into()).spawn(move || {
            let _alarm = AbortOnPanic("the follower of the tunnels' network");
            follower.run();
        })?;
        Ok(Underlay { tunnels, stop, thread: Some(thread) })
    }
}

impl Drop for Underlay {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        self.tunnels.ring();
        if let Some(thread) = self.thread.take() {
            // A panic of it has ended the process.
            let _ = thread.join();
        }
    }
}

/// The thread's own.
struct Follower {
    tunnels: Arc<Tunnels>,
    stop: Arc<AtomicBool>,
    tell: Box<dyn Fn() + Send>,
    requests: Requests,
    events: Events,
    epoll: Epoll,
    model: Model,
    /// Whether the model is to be read anew.
    is_lost: bool,
    /// When routes were all asked for anew.
    looked: Instant,
    /// When the kernel was told last that a neighbour is in use.
    asked: HashMap<(u32, IpAddr), Instant>,
}

impl Follower {
    fn new(tunnels: Arc<Tunnels>, stop: Arc<AtomicBool>, tell: Box<dyn Fn() + Send>) -> io::Result<Follower> {
        let events = Events::open(NETLINK_ROUTE, &rtnetlink::GROUPS)?;
        let requests = Requests::open(NETLINK_ROUTE)?;
        let epoll = Epoll::new()?;
        let interest = |fd: RawFd| epoll.ctl(ControlOperation::Add, fd, EpollEvent::new(EventSet::IN, 0));
        interest(tunnels.bell().as_raw_fd())?;
        interest(events.as_raw_fd())?;
        let (model, asked) = Default::default();
        let looked = Instant::now();
        Ok(Follower { tunnels, stop, tell, requests, events, epoll, model, is_lost: true, looked, asked })
    }

    fn run(mut self) {
        let mut timeout = Duration::ZERO;
        loop {
            let mut events = [EpollEvent::default(); 2];
            // An interrupted wait is a short one: everything is looked at anyway.
            let _ = self.epoll.wait(timeout.as_millis() as i32 + 1, &mut events);
            let _ = self.tunnels.bell().read();
            if self.stop.load(Ordering::Relaxed) {
                return;
            }
            if self.tunnels.has_none() {
                // Without tunnels nothing is followed: all is read when there are some.
                self.events.each(|_| {});
                (self.is_lost, timeout) = (true, SWEEP);
                std::thread::sleep(LEAST_INTERVAL);
                continue;
            }
            let start = Instant::now();
            self.follow();
            if self.look() {
                (self.tell)();
            }
            timeout = match self.model.has_routes() {
                // It is tried again soon, what could not be read and who has not answered.
                _ if self.is_lost || !self.asked.is_empty() => ASK,
                true => ROUTES,
                false => SWEEP,
            };
            std::thread::sleep(LEAST_INTERVAL.saturating_sub(start.elapsed()));
        }
    }

    /// Takes events in, or all anew if some were lost.
    fn follow(&mut self) {
        let Follower { events, model, is_lost, .. } = self;
        let mut is_malformed = false;
        *is_lost |= events.each(|message| match rtnetlink::event(message) {
            Ok(event) => event.into_iter().for_each(|event| model.apply(event)),
            Err(_) => is_malformed = true,
        });
        self.is_lost |= is_malformed;
        if !self.is_lost {
            return;
        }
        // What happens while it is read comes on top of it afterwards.
        match rtnetlink::read(&mut self.requests) {
            Ok(all) => {
                self.model = Model::default();
                all.into_iter().for_each(|event| self.model.apply(event));
                self.is_lost = false;
            }
            Err(error) => warn!("the host's network cannot be read: {error}"),
        }
    }

    /// Finds all ways anew that flows ask for. Whether any has changed.
    fn look(&mut self) -> bool {
        let targets: HashSet<Target> = self.tunnels.targets().into_iter().collect();
        if self.looked.elapsed() >= ROUTES {
            self.model.forget_routes();
            self.looked = Instant::now();
        }
        for &target in targets.iter().filter(|target| self.model.is_unasked(target)).collect::<Vec<_>>() {
            let route = rtnetlink::route(&mut self.requests, &target);
            self.model.answer(target, route.map_err(|error| error.to_string()));
        }
        self.use_neighbours(&targets);
        self.tunnels.refresh(&self.model, &Defaults::read(), Instant::now())
    }

    /// Has the kernel resolve the next hops, and ask those again from time to time that are in use.
    fn use_neighbours(&mut self, targets: &HashSet<Target>) {
        let now = Instant::now();
        self.asked.retain(|_, then| now.duration_since(*then) < ASK);
        let due: HashSet<_> = targets.iter().filter_map(|target| self.model.to_be_asked(target)).collect();
        for (device, address) in due {
            if self.asked.contains_key(&(device, address)) {
                continue;
            }
            if let Err(error) = rtnetlink::use_neighbour(&mut self.requests, device, address) {
                debug!("the neighbour {address} cannot be asked for: {error}");
            }
            self.asked.insert((device, address), now);
        }
    }
}
