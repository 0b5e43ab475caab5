//! A wire: a network device as a plain port, through AF_XDP. All of its packets are the switch's, or, of a device that is
//! Open vSwitch's own, those of the classes that somebody selects.
//!
//! [`WireShared`] is to a wire what `vhost::PortShared` is to a guest's port: what its control side and the workers share.
//! The control side is one thread for each wire: it opens the device, follows its carrier and MTU, lets go of it when it
//! vanishes, and opens it again when it is back.

use crate::port_config::XdpDevice;
use crate::quiesce::Quiescence;
use crate::wake::AbortOnPanic;
use crate::xdp::{Link, LinkNews, Selection, XdpConfig, XdpError, XdpLosses, XdpMode, XdpPort, XdpRx, XdpTx};
use log::{info, warn};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use std::io::{self, PipeReader, PipeWriter};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use switch_core::drop::DropReason;

/// How often a device is looked at without news of it: who holds it may let go of it without a word, and a socket may end
/// though its device stays.
const LOOK: Timespec = Timespec { tv_sec: 1, tv_nsec: 0 };

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // A panic elsewhere must not take the wire with it.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// A queue as the workers find it.
struct Queue {
    id: u64,
    /// Until its worker has taken it.
    rx: Option<XdpRx>,
    tx: Arc<XdpTx>,
}

#[derive(Default)]
struct Live {
    queues: Vec<Queue>,
    /// Whether packets can leave.
    up: bool,
    /// Queues that are being closed.
    closing: Vec<Queue>,
    /// What workers have given back of those; there is room for all.
    returned: Vec<XdpRx>,
    /// Of queues that are closed.
    past: WireLosses,
}

/// What a wire has lost that no worker can count.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct WireLosses {
    /// Packets that the kernel had no frame for, or no place in the ring.
    pub overrun: u64,
    /// Packets that were received, and not taken before their queue was closed.
    pub closed: u64,
    /// Packets that the device's driver has refused, or that it had not taken yet when their queue was closed. They were
    /// counted as sent before.
    pub unsent: u64,
}

impl WireLosses {
    /// Those of a packet that the device has received, by their reasons.
    pub fn received(&self) -> [(DropReason, u64); 2] {
        [(DropReason::RxOverrun, self.overrun), (DropReason::DeviceClosed, self.closed)]
    }

    fn overran(&mut self, losses: &XdpLosses) {
        // What had no frame is among those that were dropped.
        self.overrun += losses.dropped + losses.ring_full;
    }
}

/// What the control side of a wire and the workers share.
pub struct WireShared {
    quiescence: Arc<Quiescence>,
    /// Held for an assignment: what workers look into when the version has moved.
    live: Mutex<Live>,
}

impl WireShared {
    /// For the worker that owns `queue`, when the version has moved: leaves in `slot` what packets come by from now on. What
    /// they came by until then is taken back.
    pub fn take_rx(&self, queue: usize, slot: &mut Option<XdpRx>) {
        let Live { queues, returned, .. } = &mut *lock(&self.live);
        let current = queues.get_mut(queue);
        if slot.is_some() && slot.as_ref().map(XdpRx::id) == current.as_ref().map(|queue| queue.id) {
            return;
        }
        returned.extend(slot.take());
        *slot = current.and_then(|queue| queue.rx.take());
    }

    /// For the worker that owned `queue`: leaves what its packets come by for the worker that owns it from now on.
    pub fn give_back_rx(&self, queue: usize, ring: XdpRx) {
        let Live { queues, returned, .. } = &mut *lock(&self.live);
        match queues.get_mut(queue) {
            Some(current) if current.id == ring.id() => current.rx = Some(ring),
            // The queue was closed meanwhile.
            _ => returned.push(ring),
        }
    }

    /// What packets of `queue` leave by, if they can. To be fetched anew when the version has moved.
    pub fn tx(&self, queue: usize) -> Option<Arc<XdpTx>> {
        let live = lock(&self.live);
        live.queues.get(queue).filter(|_| live.up).map(|queue| queue.tx.clone())
    }

    /// Queues that are open.
    pub fn queues(&self) -> usize {
        lock(&self.live).queues.len()
    }

    /// Bytes of the frames that the device and we share.
    pub fn memory(&self) -> u64 {
        lock(&self.live).queues.iter().map(|queue| queue.tx.memory()).sum()
    }

    /// Whether packets can go.
    pub fn link_up(&self) -> bool {
        let live = lock(&self.live);
        live.up && !live.queues.is_empty()
    }

    /// Whether a socket has ended.
    fn is_stopped(&self) -> bool {
        lock(&self.live).queues.iter().any(|queue| queue.tx.is_stopped())
    }

    /// What was lost so far.
    pub fn losses(&self) -> WireLosses {
        let Live { queues, closing, past, .. } = &*lock(&self.live);
        let mut losses = *past;
        for Queue { tx, .. } in queues.iter().chain(closing) {
            losses.overran(&tx.losses());
            losses.unsent += tx.lost();
        }
        losses
    }

    /// Lets workers have the queues.
    fn start(&self, port: &mut XdpPort) {
        let queue = |queue| {
            let (rx, tx) = (port.take_rx(queue)?, port.tx(queue)?);
            Some(Queue { id: rx.id(), rx: Some(rx), tx })
        };
        let queues: Vec<Queue> = (0..).map_while(queue).collect();
        let mut live = lock(&self.live);
        live.returned.reserve(queues.len());
        live.queues = queues;
        drop(live);
        self.quiescence.publish();
    }

    /// Takes the queues from the workers; none uses them any more when this returns.
    fn stop(&self) {
        {
            let Live { queues, up, closing, .. } = &mut *lock(&self.live);
            *up = false;
            closing.append(queues);
        }
        self.quiescence.barrier();
    }

    /// Lets go of the queues that were taken from the workers, to which nothing comes any more, and counts what is in them.
    fn bury(&self) {
        let gone = {
            let Live { closing, returned, past, .. } = &mut *lock(&self.live);
            for ring in returned.iter().chain(closing.iter().filter_map(|queue| queue.rx.as_ref())) {
                past.closed += ring.left();
                past.overrun += ring.malformed();
            }
            for Queue { tx, .. } in closing.iter() {
                past.overran(&tx.losses());
                past.unsent += tx.lost() + tx.left();
            }
            (std::mem::take(closing), std::mem::take(returned))
        };
        drop(gone); // to close sockets takes time, in which no worker is to wait for the lock
    }

    /// Whether packets can leave has changed, or not. Gives whether it has.
    fn set_up(&self, up: bool) -> bool {
        let changed = std::mem::replace(&mut lock(&self.live).up, up) != up;
        if changed {
            self.quiescence.publish();
        }
        changed
    }
}

/// What happens to a wire, told to the daemon by a callback.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum WireEvent {
    /// Packets can go from now on, or cannot.
    Link(bool),
    /// The device has this MTU, in bytes.
    Mtu(u32),
}

/// The callback; called by who [starts](Wire::start) the wire, and by its thread.
pub type OnEvent = Box<dyn Fn(WireEvent) + Send>;

/// How a wire stands.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct WireStatus {
    /// Why its device is not open.
    pub fault: Option<String>,
    /// Whether that is because there is no such device.
    pub absent: bool,
    /// How the device is used, in short words.
    pub features: Vec<String>,
    /// What a person should know of the device, a line each.
    pub warnings: Vec<String>,
    /// MTU of the device when it was open last, or made known to us; in bytes.
    pub mtu: u32,
}

/// A wire. Its device is open from [`start`](Self::start) on, as far as it can be; it is let go of when this is dropped.
pub struct Wire {
    shared: Arc<WireShared>,
    selection: Option<Arc<Selection>>,
    status: Arc<Mutex<WireStatus>>,
    /// The thread ends when this is closed.
    stop: Option<PipeWriter>,
    /// Until it is started.
    control: Option<Box<Control>>,
    thread: Option<JoinHandle<()>>,
}

impl Wire {
    /// A wire called `name`: `queues` queues of the device, or all that it has but at most eight; and all of its packets, or
    /// those of the `selection`.
    ///
    /// # Errors
    /// The system refuses a pipe or a netlink socket.
    pub fn new(
        name: &str,
        device: &XdpDevice,
        queues: Option<u16>,
        selection: Option<Arc<Selection>>,
        quiescence: Arc<Quiescence>,
        on_event: OnEvent,
    ) -> io::Result<Wire> {
        let shared = Arc::new(WireShared { quiescence, live: Mutex::default() });
        let mtu = Link::look(&device.name).map_or(crate::port_config::DEFAULT_MTU.into(), |link| link.mtu);
        let status = Arc::new(Mutex::new(WireStatus { mtu, ..WireStatus::default() }));
        let (stopped, stop) = io::pipe()?;
        let config = XdpConfig {
            mode: device.mode.mode(),
            queues: queues.map(u32::from),
            selective: selection.is_some(),
            ..XdpConfig::new(&device.name)
        };
        let control = Box::new(Control {
            name: name.to_owned(),
            config,
            shared: shared.clone(),
            selection: selection.clone(),
            status: status.clone(),
            on_event,
            news: LinkNews::new()?,
            stopped,
            port: None,
        });
        Ok(Wire { shared, selection, status, stop: Some(stop), control: Some(control), thread: None })
    }

    /// What the workers need of the wire.
    pub fn shared(&self) -> &Arc<WireShared> {
        &self.shared
    }

    /// Which of the device's packets are wanted, if not all.
    pub fn selection(&self) -> Option<&Arc<Selection>> {
        self.selection.as_ref()
    }

    /// How it stands.
    pub fn status(&self) -> WireStatus {
        let mut status = lock(&self.status).clone();
        if let Some(selection) = self.selection.as_ref().filter(|_| status.fault.is_none()) {
            status.features.push(format!("classes={}", selection.in_force()));
            status.warnings.extend(selection.warning());
        }
        let unsent = self.shared.losses().unsent;
        if unsent > 0 {
            status.warnings.push(format!(
                "{unsent} packets that are counted as sent were refused by the device's driver, or not taken before the device was closed"
            ));
        }
        status
    }

    /// Opens the device, if that is possible now, and starts the thread that follows it.
    ///
    /// # Errors
    /// The system refuses a thread.
    pub fn start(&mut self) -> io::Result<()> {
        let Some(mut control) = self.control.take() else { return Ok(()) };
        control.look();
        let name = format!("wire-{}", control.name);
        self.thread = Some(std::thread::Builder::new().name(name).spawn(move || {
            let _alarm = AbortOnPanic("a wire");
            control.run();
        })?);
        Ok(())
    }

    /// Lets go of the device; no worker uses it when this returns.
    pub fn shutdown(&mut self) {
        self.stop = None;
        if let Some(thread) = self.thread.take() {
            // It cannot have panicked: that ends the process.
            let _ = thread.join();
        }
    }
}

impl Drop for Wire {
    fn drop(&mut self) {
        self.shutdown();
    }
}

/// The control side.
struct Control {
    name: String,
    config: XdpConfig,
    shared: Arc<WireShared>,
    selection: Option<Arc<Selection>>,
    status: Arc<Mutex<WireStatus>>,
    on_event: OnEvent,
    news: LinkNews,
    stopped: PipeReader,
    port: Option<XdpPort>,
}

impl Control {
    fn run(mut self) {
        while !self.wait() {
            self.look();
        }
        self.close();
    }

    /// Waits until there is reason to look at the device; whether it is to be let go of for good.
    fn wait(&self) -> bool {
        let ready = {
            let mut fds = [PollFd::new(&self.news, PollFlags::IN), PollFd::new(&self.stopped, PollFlags::IN)];
            // An interrupted wait is a short one.
            let _ = poll(&mut fds, Some(&LOOK));
            fds.map(|fd| !fd.revents().is_empty())
        };
        if ready[0] {
            self.news.clear();
        }
        ready[1]
    }

    /// Brings what is open in step with the device as it is.
    fn look(&mut self) {
        let link = Link::look(&self.config.device);
        if let Some(port) = &self.port
            && (self.shared.is_stopped()
                || !link.as_ref().is_ok_and(|link| link.index == port.index() && link.mtu == port.mtu()))
        {
            match &link {
                Err(error) => warn!("port {}: {error}", self.name),
                // Frames and their limits are made for one MTU.
                Ok(_) => info!("port {}: {} has changed and is opened anew", self.name, self.config.device),
            }
            self.close();
        }
        if self.port.is_none() {
            match link.and_then(|_| self.open()) {
                Ok(()) => {}
                Err(error) => self.failed(&error),
            }
        }
        self.review();
        if self.port.is_some() {
            let up = Link::look(&self.config.device).is_ok_and(|link| link.up);
            self.set_up(up);
        }
    }

    fn open(&mut self) -> Result<(), XdpError> {
        let mut port = XdpPort::open(&self.config)?;
        self.select(&port)?;
        info!("port {}: {}", self.name, port.describe());
        for warning in port.warnings() {
            warn!("port {}: {warning}", self.name);
        }
        let mode = match port.mode() {
            XdpMode::ZeroCopy => "xdp-zero-copy",
            XdpMode::Copy => "xdp-copy",
            XdpMode::Generic => "xdp-generic",
        };
        let buffers = if port.multi_buffer() { "multi-buffer" } else { "single-buffer" };
        *lock(&self.status) = WireStatus {
            features: [mode, buffers].map(str::to_owned).to_vec(),
            warnings: port.warnings().to_vec(),
            mtu: port.mtu(),
            ..WireStatus::default()
        };
        (self.on_event)(WireEvent::Mtu(port.mtu()));
        self.shared.start(&mut port);
        self.port = Some(port);
        Ok(())
    }

    /// Takes what is wanted of an open device. Where its tags are not seen, packets of one VLAN could be taken for another's:
    /// none are taken then.
    fn select(&self, port: &XdpPort) -> Result<(), XdpError> {
        let classes = port.shared_classes();
        match &self.selection {
            None => lock(&classes).set_everything(true),
            Some(selection) if port.hides_tags() => selection.close(),
            Some(selection) => selection.open(classes),
        }
    }

    /// Follows the settings of an open device.
    fn review(&mut self) {
        let Some(port) = &mut self.port else { return };
        let before = port.warnings().to_vec();
        let result = port.review();
        let Some(port) = &self.port else { return };
        match result.and_then(|changed| if changed { self.select(port).map(|()| true) } else { Ok(false) }) {
            Ok(false) => {}
            Ok(true) => {
                for warning in port.warnings().iter().filter(|warning| !before.contains(warning)) {
                    warn!("port {}: {warning}", self.name);
                }
                lock(&self.status).warnings = port.warnings().to_vec();
            }
            Err(error) => {
                self.close();
                self.failed(&error);
            }
        }
    }

    /// Says why the device is not open, once.
    fn failed(&self, error: &XdpError) {
        let text = error.to_string();
        let mut status = lock(&self.status);
        if status.fault.as_ref() != Some(&text) {
            warn!("port {}: {text}; trying on", self.name);
        }
        let absent = matches!(error, XdpError::NoDevice(_));
        *status = WireStatus { fault: Some(text), absent, mtu: status.mtu, ..WireStatus::default() };
    }

    fn close(&mut self) {
        let Some(mut port) = self.port.take() else { return };
        self.set_up(false);
        port.leave();
        if let Some(selection) = &self.selection {
            // Whatever the map still has goes with the program.
            let _ = selection.close();
        }
        self.shared.stop();
        // What came until the program was gone is in the rings.
        drop(port);
        self.shared.bury();
    }

    fn set_up(&self, up: bool) {
        if self.shared.set_up(up) {
            info!("port {}: link {}", self.name, if up { "up" } else { "down" });
            (self.on_event)(WireEvent::Link(up));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_missing_device_is_named_and_waited_for() {
        let events = Arc::new(Mutex::new(Vec::new()));
        let heard = events.clone();
        let device = XdpDevice { name: "no-such-device".into(), mode: Default::default() };
        let on_event = Box::new(move |event| lock(&heard).push(event));
        let mut wire = Wire::new("w", &device, None, None, Arc::new(Quiescence::new()), on_event).unwrap();
        wire.start().unwrap();
        let status = wire.status();
        assert_eq!(status.fault.as_deref(), Some("no network device 'no-such-device'"));
        assert!(status.absent && !wire.shared().link_up() && wire.shared().tx(0).is_none());
        wire.shutdown();
        assert_eq!(*lock(&events), []);
    }
}
