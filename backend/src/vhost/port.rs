//! A vhost-user port: its socket, its connections, and what it offers to the front-end.
//!
//! A port is a subscriber of an [`event_manager::EventManager`], and never blocks in it. Each connection is a *session*,
//! a thread of its own: it makes a new daemon object (the crate's cannot be used twice), relays between it and the
//! front-end until either ends, and then takes everything down; the port is told and starts over.

use std::io;
use std::net::Shutdown;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::sync::Arc;
use std::thread::{self, JoinHandle};
use std::time::Duration;

use event_manager::{EventOps, Events, MutEventSubscriber};
use vhost::vhost_user::Error as VhostError;
use vhost::vhost_user::message::VhostUserProtocolFeatures;
use vhost_user_backend::{Error as DaemonError, VhostUserBackend, VhostUserDaemon};
use virtio_bindings::virtio_config::{
    VIRTIO_F_ANY_LAYOUT, VIRTIO_F_IN_ORDER, VIRTIO_F_RING_PACKED, VIRTIO_F_VERSION_1,
};
use virtio_bindings::virtio_net::*;
use virtio_bindings::virtio_ring::{VIRTIO_RING_F_EVENT_IDX, VIRTIO_RING_F_INDIRECT_DESC};
use vm_memory::{GuestAddressSpace, GuestMemoryAtomic, GuestMemoryMmap};
use vmm_sys_util::epoll::EventSet;
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};
use vmm_sys_util::timerfd::TimerFd;

use super::relay::{self, F_PROTOCOL_FEATURES};
use super::shared::{OnEvent, PortShared, VHOST_F_LOG_ALL};
use super::vring::{Memory, PortVring, with_rings_of};
use crate::port_config::{Mode, Socket};
use crate::quiesce::Quiescence;
use crate::socket_file::{self, ListenError, SocketFile};
use crate::virtio::{GuestRegions, RingRecords, split};

/// How often a client tries to connect, and how soon a server goes on that could not accept.
const RETRY: Duration = Duration::from_millis(500);

/// What is offered to a driver. Device-wide features that the front-end serves (MAC, status) are among them, since it takes the
/// intersection; it mostly serves the control queue, too, else we do. Not among them: IOTLB (`ACCESS_PLATFORM`) and UFO, which no current guest has.
const FEATURES: &[u32] = &[
    VIRTIO_F_VERSION_1,
    VIRTIO_F_ANY_LAYOUT,
    VIRTIO_F_RING_PACKED,
    VIRTIO_F_IN_ORDER,
    VIRTIO_RING_F_INDIRECT_DESC,
    VIRTIO_RING_F_EVENT_IDX,
    VHOST_F_LOG_ALL,
    F_PROTOCOL_FEATURES,
    VIRTIO_NET_F_MRG_RXBUF,
    VIRTIO_NET_F_CSUM,
    VIRTIO_NET_F_GUEST_CSUM,
    VIRTIO_NET_F_HOST_TSO4,
    VIRTIO_NET_F_HOST_TSO6,
    VIRTIO_NET_F_HOST_ECN,
    VIRTIO_NET_F_HOST_USO,
    VIRTIO_NET_F_GUEST_TSO4,
    VIRTIO_NET_F_GUEST_TSO6,
    VIRTIO_NET_F_GUEST_ECN,
    VIRTIO_NET_F_GUEST_USO4,
    VIRTIO_NET_F_GUEST_USO6,
    VIRTIO_NET_F_CTRL_VQ,
    VIRTIO_NET_F_CTRL_RX,
    VIRTIO_NET_F_CTRL_RX_EXTRA,
    VIRTIO_NET_F_CTRL_VLAN,
    VIRTIO_NET_F_CTRL_MAC_ADDR,
    VIRTIO_NET_F_STATUS,
    VIRTIO_NET_F_GUEST_ANNOUNCE,
    VIRTIO_NET_F_MTU,
];

/// Why a port cannot be made.
#[derive(Debug, thiserror::Error)]
pub enum PortError {
    /// Its socket cannot be had.
    #[error(transparent)]
    Socket(#[from] ListenError),
    /// The system refuses an event descriptor.
    #[error("cannot create an event descriptor: {0}")]
    Events(#[from] io::Error),
}

/// The port as the `vhost-user-backend` crate sees it.
#[derive(Clone)]
struct Backend(Arc<PortShared>);

impl VhostUserBackend for Backend {
    type Bitmap = ();
    type Vring = PortVring;

    fn num_queues(&self) -> usize {
        // And the control queue's.
        2 * self.0.max_queues() + 1
    }

    fn max_queue_size(&self) -> usize {
        split::MAX_SIZE.into()
    }

    fn features(&self) -> u64 {
        let mq = if self.0.max_queues() > 1 { 1 << VIRTIO_NET_F_MQ } else { 0 };
        FEATURES.iter().fold(mq, |all, bit| all | 1 << bit)
    }

    fn acked_features(&self, features: u64) {
        self.0.set_features(features);
    }

    fn protocol_features(&self) -> VhostUserProtocolFeatures {
        relay::DAEMON_FEATURES
    }

    fn set_event_idx(&self, _: bool) {
        // It is among the features.
    }

    fn update_memory(&self, memory: Memory) -> io::Result<()> {
        // The answer to the front-end, after which it may take memory away, is sent when this returns.
        let regions = Arc::new(GuestRegions::new(memory.memory().into_inner()));
        let pages = regions.pages().clone();
        self.0.update(|setup| (setup.memory, setup.loss_told) = (Some(regions), false));
        pages.keep();
        Ok(())
    }

    fn queues_per_thread(&self) -> Vec<u64> {
        Vec::new()
    }

    fn handle_event(&self, _: u16, _: EventSet, _: &[PortVring], _: usize) -> io::Result<()> {
        Ok(())
    }
}

/// One connection.
struct Session {
    thread: JoinHandle<io::Result<()>>,
    frontend: Arc<UnixStream>,
}

/// Tells the event loop, when it goes, that a session has ended.
struct Ended(Arc<EventFd>);

impl Drop for Ended {
    fn drop(&mut self) {
        // An error means that the counter is full: the event loop is being told already.
        let _ = self.0.write(1);
    }
}

/// A vhost-user port. Add it to an event manager (`Arc<Mutex<VhostUserPort>>`); remove it there before
/// [`shutdown`](Self::shutdown).
pub struct VhostUserPort {
    config: Socket,
    shared: Arc<PortShared>,
    /// In server mode.
    socket: Option<(UnixListener, SocketFile)>,
    /// The next attempt, if one has failed.
    retry: TimerFd,
    /// Written when a session has ended.
    ended: Arc<EventFd>,
    session: Option<Session>,
    /// Whether the current row of failed attempts was logged.
    failure_told: bool,
}

/// What an event is about.
const ON_CONNECTION: u32 = 0;
const ON_RETRY: u32 = 1;
const ON_ENDED: u32 = 2;
const ON_FAULT: u32 = 3;
const ON_LOG: u32 = 4;

impl VhostUserPort {
    /// Makes port `name` with up to so many queue pairs; in server mode the socket exists when this returns. Nothing connects
    /// before the port is added to an event manager. `record`: a file that says where we are in packed rings, to who comes after
    /// us. `on_event` is called on control threads and must not call back into this object.
    ///
    /// # Errors
    /// See [`PortError`].
    pub fn new(
        name: &str,
        queues: usize,
        config: Socket,
        record: Option<&Path>,
        quiescence: Arc<Quiescence>,
        on_event: OnEvent,
    ) -> Result<Self, PortError> {
        let socket = match config.mode {
            Mode::Server => {
                let group = config.group.as_deref();
                let socket = socket_file::listen(&config.path, config.permissions().0, group)?;
                // Who was there when we were told may be gone when we accept.
                socket.0.set_nonblocking(true)?;
                Some(socket)
            }
            Mode::Client => None,
        };
        let records = record.and_then(|path| {
            RingRecords::open(path, 2 * queues + 1)
                .inspect_err(|e| {
                    let path = path.display();
                    log::warn!(
                        "port {name}: {path}: {e}; guests with packed rings lose their link if we are killed"
                    );
                })
                .ok()
        });
        let shared = PortShared::new(name, queues, records, quiescence, on_event)?;
        Ok(VhostUserPort {
            config,
            shared: Arc::new(shared),
            socket,
            retry: TimerFd::new().map_err(|e| PortError::Events(e.into()))?,
            ended: Arc::new(EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC)?),
            session: None,
            failure_told: false,
        })
    }

    /// What the workers need of the port.
    pub fn shared(&self) -> &Arc<PortShared> {
        &self.shared
    }

    /// Ends the connection, if there is one, and waits until nothing of it is left.
    pub fn shutdown(&mut self) {
        let Some(session) = self.session.take() else { return };
        // An error means that the front-end has done so.
        let _ = session.frontend.shutdown(Shutdown::Both);
        if session.thread.join().is_err() {
            log::error!("port {}: its connection thread panicked", self.shared.name());
        }
    }

    /// The next front-end; `WouldBlock` in server mode if there is none.
    fn next_frontend(&self) -> io::Result<UnixStream> {
        match &self.socket {
            // Blocking, whatever the listener is.
            Some((listener, _)) => listener.accept().map(|(stream, _)| stream),
            None => relay::connect(&self.config.path),
        }
    }

    fn start_session(&mut self, frontend: UnixStream) -> io::Result<()> {
        let frontend = Arc::new(frontend);
        let path = self.config.path.display().to_string();
        let (shared, stream) = (self.shared.clone(), frontend.clone());
        let ended = Ended(self.ended.clone());
        let thread = thread::Builder::new().name(format!("vu-{}", self.shared.name())).spawn(move || {
            // Also if it panics: the port must not wait for ever for a session that is no more.
            let _ended = ended;
            run_session(&shared, &stream, &path)
        })?;
        self.session = Some(Session { thread, frontend });
        Ok(())
    }

    /// Starts a session, or tries again when there may be someone to serve.
    fn open(&mut self, ops: &mut EventOps) {
        let started = match self.next_frontend() {
            Err(e) if self.socket.is_some() && e.kind() == io::ErrorKind::WouldBlock => {
                return self.listen(ops);
            }
            frontend => frontend.and_then(|frontend| self.start_session(frontend)),
        };
        if let Err(e) = started {
            self.failed(&e);
            self.try_later();
        }
    }

    /// Logs the first failure of a row.
    fn failed(&mut self, error: &io::Error) {
        if !self.failure_told {
            let path = self.config.path.display();
            self.shared.log().warn(format_args!("no connection on {path}: {error}; trying on"));
            self.failure_told = true;
        }
    }

    fn try_later(&mut self) {
        if let Err(e) = self.retry.reset(RETRY, None) {
            log::error!("port {}: cannot set a timer: {e}", self.shared.name());
        }
    }

    /// Takes the next connection when there is one.
    fn listen(&mut self, ops: &mut EventOps) {
        if let Some((listener, _)) = &self.socket {
            watch(ops, Events::with_data(listener, ON_CONNECTION, EventSet::IN));
        }
    }

    fn session_ended(&mut self, ops: &mut EventOps) {
        let _ = self.ended.read();
        let Some(session) = self.session.take() else { return };
        // Writing the event was its last act.
        let ended = session.thread.join().unwrap_or_else(|_| Err(io::Error::other("a thread panicked")));
        match ended {
            Ok(()) => self.failure_told = false,
            Err(ref e) => self.failed(e),
        }
        // Not at once after a failure: QEMU that is refused, be it for too many queues, returns without a pause.
        if ended.is_ok() && self.config.mode == Mode::Server {
            self.listen(ops);
        } else {
            self.try_later();
        }
    }
}

impl Drop for VhostUserPort {
    fn drop(&mut self) {
        self.shutdown();
    }
}

fn watch(ops: &mut EventOps, events: Events) {
    if let Err(e) = ops.add(events) {
        log::error!("cannot watch a descriptor: {e}");
    }
}

impl MutEventSubscriber for VhostUserPort {
    fn init(&mut self, ops: &mut EventOps) {
        watch(ops, Events::with_data(&*self.ended, ON_ENDED, EventSet::IN));
        watch(ops, Events::with_data(&self.retry, ON_RETRY, EventSet::IN));
        watch(ops, Events::with_data(self.shared.fault_event(), ON_FAULT, EventSet::IN));
        watch(ops, Events::with_data_raw(self.shared.log().timer(), ON_LOG, EventSet::IN));
        match self.config.mode {
            Mode::Server => self.listen(ops),
            Mode::Client => self.open(ops),
        }
    }

    fn process(&mut self, events: Events, ops: &mut EventOps) {
        match events.data() {
            ON_CONNECTION => {
                // One at a time: who comes meanwhile waits in the socket's queue.
                let _ = ops.remove(events);
                self.open(ops);
            }
            ON_RETRY => {
                let _ = self.retry.wait();
                self.open(ops);
            }
            ON_ENDED => self.session_ended(ops),
            ON_FAULT => self.shared.tell_fault(),
            ON_LOG => self.shared.log().tick(),
            _ => {}
        }
    }
}

/// One connection from its beginning to its end, on a thread of its own. `Err`: it did not come about.
fn run_session(shared: &Arc<PortShared>, frontend: &UnixStream, path: &str) -> io::Result<()> {
    let name = shared.name();
    let memory = GuestMemoryAtomic::new(GuestMemoryMmap::new());
    let made = with_rings_of(shared, || {
        VhostUserDaemon::new(format!("vu-{name}-ctl"), Backend(shared.clone()), memory)
    });
    let other = |e: DaemonError| io::Error::other(e.to_string());
    let mut daemon = made.map_err(other)?;
    let (private, mut listener) = relay::private_connection()?;
    daemon.start(&mut listener).map_err(other)?;
    drop(listener);
    shared.connected();
    let mut device = false;
    let on_device = || {
        shared.log().info(format_args!("connected on {path}"));
        device = true;
    };
    let on_log = |log| shared.update(|setup| setup.log = Some(Arc::new(log)));
    let (last, relayed) = relay::relay(name, frontend, &private, on_device, on_log);
    let served = daemon.wait();
    // The crate tells the backend nothing of the end, and the workers still use the guest's memory.
    shared.disconnect();
    drop(daemon);
    let reason = match (relayed, served) {
        (Err(e), _) => Some(e.to_string()),
        // The end of the private connection is not the daemon's doing.
        (Ok(()), Ok(()) | Err(DaemonError::HandleRequest(VhostError::Disconnected))) => None,
        (Ok(()), Err(e)) => Some(e.to_string()),
    };
    let said = last.map(|request| format!(" (last message: {request})")).unwrap_or_default();
    match reason {
        Some(reason) if !device => return Err(io::Error::other(reason + &said)),
        Some(reason) => shared.log().warn(format_args!("disconnected: {reason}{said}")),
        None if device => shared.log().info("disconnected"),
        // Only looked whether somebody listens.
        None if said.is_empty() => {}
        None => return Err(io::Error::other(format!("the front-end has left again{said}"))),
    }
    Ok(())
}
