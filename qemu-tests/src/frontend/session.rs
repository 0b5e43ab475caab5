//! The vhost-user session: negotiation, memory table, ring set-up, and all the ways a guest can come and go.
//!
//! The order of messages is QEMU's (`vhost_dev_init`, `vhost_dev_start`, `vhost_dev_stop`).

use std::fs::File;
use std::io::ErrorKind;
use std::os::fd::{AsFd, AsRawFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use vhost::vhost_user::message::{FrontendReq, VhostUserHeaderFlag, VhostUserProtocolFeatures};
use vhost::vhost_user::{Frontend as Endpoint, VhostUserFrontend};
use vhost::{VhostBackend, VhostUserDirtyLogRegion, VringConfigData};

use super::ring::{RingShared, wait_readable};
use super::wire;
use super::{
    Buffer, Descriptor, Error, Features, GuestMemory, Notify, RegionSpec, Result, Ring, RingFault, RxRing,
    TxRing,
};

/// The most queue pairs whose rings vhost-user can name in its eight bits.
const MAX_QUEUE_PAIRS: usize = 128;

/// How to set up a [`Frontend`].
#[derive(Clone, Debug)]
pub struct Builder {
    path: PathBuf,
    listen: bool,
    queue_pairs: usize,
    ring_size: u16,
    wanted: Features,
    regions: Vec<RegionSpec>,
    hugepages: bool,
    memory_slots: bool,
    reply_ack: bool,
    kicks: bool,
    control_queue: bool,
    notify: Notify,
    first_index: u16,
    timeout: Duration,
}

impl Builder {
    /// We listen and the backend connects, instead of the other way round.
    pub fn listen(self) -> Self {
        Self { listen: true, ..self }
    }

    /// Number of queue pairs (default 1).
    pub fn queue_pairs(self, queue_pairs: usize) -> Self {
        Self { queue_pairs, ..self }
    }

    /// Descriptors of each ring, a power of two (default 256).
    pub fn ring_size(self, ring_size: u16) -> Self {
        Self { ring_size, ..self }
    }

    /// Features to take if they are offered (default [`Features::LINUX`]).
    pub fn features(self, wanted: Features) -> Self {
        Self { wanted, ..self }
    }

    /// Packed rings, if they are offered.
    pub fn packed(self) -> Self {
        Self { wanted: self.wanted | Features::RING_PACKED, ..self }
    }

    /// Features not to take, and with them those that depend on them.
    pub fn without(self, features: Features) -> Self {
        Self { wanted: self.wanted.without(features), ..self }
    }

    /// Guest memory (default: 64 MiB at 0). The regions may lie anywhere and are used in turn.
    pub fn memory(self, regions: &[RegionSpec]) -> Self {
        Self { regions: regions.to_vec(), ..self }
    }

    /// Memory in pages of 2 MiB.
    pub fn hugepages(self) -> Self {
        Self { hugepages: true, ..self }
    }

    /// Tell the backend of each region by `ADD_MEM_REG` (protocol feature `CONFIGURE_MEM_SLOTS`) instead of by one
    /// `SET_MEM_TABLE`.
    pub fn memory_slots(self) -> Self {
        Self { memory_slots: true, ..self }
    }

    /// Do not ask for a reply to requests that need none: errors then show as a lost connection only.
    pub fn without_reply_ack(self) -> Self {
        Self { reply_ack: false, ..self }
    }

    /// Never kick, and say so: rings have no kick descriptor, so the backend is to poll them.
    pub fn without_kicks(self) -> Self {
        Self { kicks: false, ..self }
    }

    /// Hand the control queue over to the backend, with all commands that it takes, instead of serving it as QEMU does.
    pub fn control_queue(self) -> Self {
        Self { control_queue: true, wanted: self.wanted | Features::CTRL_FILTERS, ..self }
    }

    /// How to learn of used buffers (default [`Notify::Event`]).
    pub fn notify(self, notify: Notify) -> Self {
        Self { notify, ..self }
    }

    /// Where ring indices start (default 0): near 65535, they soon wrap.
    pub fn first_index(self, first_index: u16) -> Self {
        Self { first_index, ..self }
    }

    /// How long to wait for the backend to connect, be there, or reply (default 5 s).
    pub fn timeout(self, timeout: Duration) -> Self {
        Self { timeout, ..self }
    }

    /// Makes memory and rings, and the socket if we listen; does not connect.
    ///
    /// # Errors
    /// [`Error::Config`] for what cannot be, or if memory or socket cannot be had.
    pub fn build(self) -> Result<Frontend> {
        if !(1..=MAX_QUEUE_PAIRS).contains(&self.queue_pairs) {
            return Err(Error::Config(format!("{} queue pairs", self.queue_pairs)));
        }
        if !self.ring_size.is_power_of_two() || self.ring_size > 32768 {
            return Err(Error::Config(format!("{} descriptors a ring", self.ring_size)));
        }
        let memory = GuestMemory::new(&self.regions, self.hugepages)?;
        let mut queues = Vec::new();
        for pair in 0..self.queue_pairs {
            let rx = RxRing::new(Ring::new(&memory, 2 * pair, self.ring_size)?);
            let tx = TxRing::new(Ring::new(&memory, 2 * pair + 1, self.ring_size)?);
            queues.push(QueuePair { rx, tx });
        }
        let mut rings: Vec<_> =
            queues.iter().flat_map(|pair| [pair.rx.shared().clone(), pair.tx.shared().clone()]).collect();
        let mut control = None;
        if self.control_queue {
            let ring = Ring::new(&memory, rings.len(), 64)?;
            rings.push(ring.shared().clone());
            control = Some(ring);
        }
        let listener = if self.listen { Some(bind(&self.path)?) } else { None };
        let states = vec![RingState::Stopped(self.first_index); rings.len()];
        Ok(Frontend {
            config: self,
            memory,
            queues,
            control,
            rings,
            states,
            listener,
            features: None,
            link: None,
        })
    }

    /// Builds, connects and starts with empty rings.
    ///
    /// # Errors
    /// As for [`Self::build`], [`Frontend::connect`] and [`Frontend::start`].
    pub fn start(self) -> Result<Frontend> {
        let mut frontend = self.build()?;
        frontend.start()?;
        Ok(frontend)
    }
}

/// The receive and the transmit ring of one queue pair.
pub struct QueuePair {
    /// From the device to us.
    pub rx: RxRing,
    /// From us to the device.
    pub tx: TxRing,
}

/// A guest, as far as a vhost-user backend can see one.
///
/// Dropping it is like killing QEMU: the connection closes without a word.
pub struct Frontend {
    config: Builder,
    memory: GuestMemory,
    /// Empty while lent out by [`Self::take_queues`].
    queues: Vec<QueuePair>,
    /// If it is handed over.
    control: Option<Ring>,
    /// Of all these.
    rings: Vec<Arc<RingShared>>,
    states: Vec<RingState>,
    listener: Option<UnixListener>,
    /// What the driver agreed to at its last fresh start. A reconnection must offer it again.
    features: Option<Features>,
    link: Option<Link>,
}

/// What the backend does with a ring, as far as we know.
#[derive(Clone, Copy)]
enum RingState {
    /// It was started on the connection at hand, there.
    Running(u16),
    /// It was stopped with every buffer before this index used.
    Stopped(u16),
    /// The connection broke while it ran, which it had begun there. How far the backend came, only the ring itself says, if it
    /// is split.
    Lost(u16),
}

/// One connection to a backend.
struct Link {
    endpoint: Endpoint,
    /// A second handle, as the endpoint does not show its own.
    socket: UnixStream,
    offered: Features,
    /// Memory slots are filled once per connection; a memory table replaces the one before.
    has_memory: bool,
    /// Whether requests are answered that need no answer.
    acked: bool,
    kicks: bool,
}

impl Frontend {
    /// Describes a frontend whose backend is behind the socket at `path`.
    pub fn builder(path: impl AsRef<Path>) -> Builder {
        Builder {
            path: path.as_ref().to_path_buf(),
            listen: false,
            queue_pairs: 1,
            ring_size: 256,
            wanted: Features::LINUX,
            regions: vec![RegionSpec::mib(0, 64)],
            hugepages: false,
            memory_slots: false,
            reply_ack: true,
            kicks: true,
            control_queue: false,
            notify: Notify::Event,
            first_index: 0,
            timeout: Duration::from_secs(5),
        }
    }

    /// Connects (or waits for the backend to connect) and negotiates protocol features. Does nothing if
    /// connected.
    ///
    /// # Errors
    /// If no backend turns up in time, or it lacks queues, features or memory slots that we need.
    pub fn connect(&mut self) -> Result<()> {
        if self.link.is_some() {
            if self.is_connected() {
                return Ok(());
            }
            self.abandon();
        }
        let socket = match &self.listener {
            Some(listener) => accept(listener, self.config.timeout)?,
            None => dial(&self.config.path, self.config.timeout)?,
        };
        // Inherited by all handles of the socket: no reply may be waited for longer than this.
        socket.set_read_timeout(Some(self.config.timeout)).map_err(Error::io("set a timeout"))?;
        self.link = Some(Link::negotiate(socket, &self.config)?);
        Ok(())
    }

    /// Starts as a driver does that has just been loaded: connects if need be, stops the rings if they run, negotiates
    /// features, and starts all rings empty. Receive buffers are to be posted afterwards.
    ///
    /// # Errors
    /// As for [`Self::connect`], and if a request is refused or the queues are lent out.
    pub fn start(&mut self) -> Result<()> {
        if self.queues.is_empty() {
            return Err(Error::Config("queues are lent out".into()));
        }
        self.connect()?;
        self.stop()?;
        let link = self.link.as_ref().ok_or(Error::NotConnected)?;
        let mut wanted = self.config.wanted;
        if self.config.queue_pairs == 1 {
            wanted = wanted.without(Features::MQ);
        } else if !link.offered.contains(Features::MQ) {
            return Err(Error::Lacks("the feature MQ".into()));
        }
        let wanted = wanted | Features::PROTOCOL_FEATURES;
        let features = (wanted & link.offered).with_prerequisites();
        self.features = Some(features);
        let (notify, first) = (self.config.notify, self.config.first_index);
        for (pair, states) in self.queues.iter_mut().zip(self.states.chunks_mut(2)) {
            states.copy_from_slice(&[
                RingState::Stopped(pair.rx.reset(features, notify, first)),
                RingState::Stopped(pair.tx.reset(features, notify, first)),
            ]);
        }
        if let (Some(control), Some(state)) = (&mut self.control, self.states.last_mut()) {
            *state = RingState::Stopped(control.reset(features, Notify::Event, 0));
        }
        self.set_up()
    }

    /// Starts the rings with the contents they have: after [`Self::stop`] from where the backend stopped, else, as QEMU does when
    /// the backend went away, from the used index, or from where a packed ring was started. Connects if need be, and takes the features agreed before.
    ///
    /// # Errors
    /// As for [`Self::start`]; also if the backend no longer offers what the driver relies on.
    pub fn resume(&mut self) -> Result<()> {
        let features = self.features.ok_or(Error::NotConnected)?;
        self.connect()?;
        let link = self.link.as_ref().ok_or(Error::NotConnected)?;
        if !link.offered.contains(features) {
            return Err(Error::Lacks(format!("{:?} agreed before", features.without(link.offered))));
        }
        self.set_up()
    }

    /// Stops all rings that run; the connection stays. Returns, per ring, where the backend stopped.
    ///
    /// # Errors
    /// If a request fails.
    pub fn stop(&mut self) -> Result<Vec<u16>> {
        (0..self.rings.len()).map(|index| self.stop_ring(index)).collect()
    }

    /// Stops all rings and closes the connection, as a guest that is shut down.
    ///
    /// # Errors
    /// If stopping fails; the connection is closed all the same.
    pub fn disconnect(&mut self) -> Result<()> {
        let stopped = self.stop();
        self.abandon();
        stopped.map(drop)
    }

    /// Closes the connection without stopping anything, as QEMU does on SIGKILL. Rings and memory are kept for
    /// [`Self::resume`].
    pub fn abandon(&mut self) {
        self.link = None;
        for state in &mut self.states {
            if let RingState::Running(base) = *state {
                *state = RingState::Lost(base);
            }
        }
    }

    /// Stops one ring (`GET_VRING_BASE`) and returns where the backend stopped; does nothing if it was stopped.
    ///
    /// # Errors
    /// If the request fails.
    pub fn stop_ring(&mut self, index: usize) -> Result<u16> {
        let base = match (self.states[index], &self.link) {
            (RingState::Stopped(base), _) => return Ok(base),
            (RingState::Running(_), Some(link)) => {
                let state = request("GET_VRING_BASE", link.endpoint.get_vring_base(index))?;
                // A packed ring's has two halves, which are the same if nothing is with the backend any more. DPDK tells
                // one only.
                if self.is_packed() && state >> 16 != 0 && state >> 16 != state & 0xffff {
                    return Err(Error::Fault { ring: index, fault: RingFault::Base(state) });
                }
                state as u16
            }
            (RingState::Running(base) | RingState::Lost(base), _) => self.lost_base(index, base),
        };
        self.states[index] = RingState::Stopped(base);
        Ok(base)
    }

    fn is_packed(&self) -> bool {
        self.features().contains(Features::RING_PACKED)
    }

    /// From where a ring goes on that was begun at `base` and not stopped.
    fn lost_base(&self, index: usize, base: u16) -> u16 {
        if self.is_packed() { base } else { self.rings[index].used_index() }
    }

    /// Starts one ring again with the contents it has, stopping it first if it runs.
    ///
    /// # Errors
    /// If a request fails.
    pub fn start_ring(&mut self, index: usize) -> Result<()> {
        let base = self.stop_ring(index)?;
        let link = self.link.as_mut().ok_or(Error::NotConnected)?;
        link.start_ring(&self.rings[index], base)?;
        self.states[index] = RingState::Running(base);
        link.enable_ring(index, true)
    }

    /// Stops one ring if it runs, empties it, and starts it: a driver's reset of a single queue.
    ///
    /// # Errors
    /// If a request fails or the queues are lent out.
    pub fn start_ring_fresh(&mut self, index: usize) -> Result<()> {
        self.stop_ring(index)?;
        let features = self.features.ok_or(Error::NotConnected)?;
        let (notify, first) = (self.config.notify, self.config.first_index);
        let Some(pair) = self.queues.get_mut(index / 2) else {
            return Err(Error::Config("queues are lent out".into()));
        };
        let base = if index.is_multiple_of(2) {
            pair.rx.reset(features, notify, first)
        } else {
            pair.tx.reset(features, notify, first)
        };
        self.states[index] = RingState::Stopped(base);
        self.start_ring(index)
    }

    /// Enables or disables one ring (`SET_VRING_ENABLE`).
    ///
    /// # Errors
    /// If the request fails, or `PROTOCOL_FEATURES` was not negotiated.
    pub fn enable_ring(&mut self, index: usize, enable: bool) -> Result<()> {
        self.link.as_mut().ok_or(Error::NotConnected)?.enable_ring(index, enable)
    }

    /// Takes the descriptor away by which the backend calls us for a ring, or gives it back (`SET_VRING_CALL`), as a front-end
    /// does whose driver masks an interrupt.
    ///
    /// # Errors
    /// If the request fails.
    pub fn set_call(&mut self, index: usize, on: bool) -> Result<()> {
        self.link.as_ref().ok_or(Error::NotConnected)?.set_call(&self.rings[index], on)
    }

    /// Enables the first `count` queue pairs and disables the others, as QEMU does on `ethtool -L combined`.
    ///
    /// # Errors
    /// As for [`Self::enable_ring`].
    pub fn enable_queue_pairs(&mut self, count: usize) -> Result<()> {
        (0..2 * self.config.queue_pairs).try_for_each(|index| self.enable_ring(index, index / 2 < count))
    }

    /// Sends the memory table again.
    ///
    /// # Errors
    /// If the request fails.
    pub fn set_mem_table(&mut self) -> Result<()> {
        let link = self.link.as_ref().ok_or(Error::NotConnected)?;
        let regions: Vec<_> = self.memory.regions().iter().map(|region| region.info()).collect();
        request("SET_MEM_TABLE", link.endpoint.set_mem_table(&regions)).map(drop)
    }

    /// Hotplugs memory while the rings run; without a connection, the next one gets it.
    ///
    /// # Errors
    /// If the region cannot be made or the request fails.
    pub fn add_region(&mut self, spec: RegionSpec) -> Result<()> {
        let region = self.memory.add(spec)?;
        let by_slot = self.config.memory_slots;
        match self.link.as_mut() {
            Some(link) if by_slot => {
                request("ADD_MEM_REG", link.endpoint.add_mem_region(&region.info())).map(drop)
            }
            Some(_) => self.set_mem_table(),
            None => Ok(()),
        }
    }

    /// Unplugs the region at `gpa` while the rings run. Nothing prevents posted buffers from lying there.
    ///
    /// # Errors
    /// If there is no such region or the request fails.
    pub fn remove_region(&mut self, gpa: u64) -> Result<()> {
        let region = self.memory.remove(gpa)?;
        let by_slot = self.config.memory_slots;
        match self.link.as_mut() {
            Some(link) if by_slot => {
                request("REM_MEM_REG", link.endpoint.remove_mem_region(&region.info())).map(drop)
            }
            Some(_) => self.set_mem_table(),
            None => Ok(()),
        }
    }

    /// Has the backend log what it writes, as QEMU does while it migrates the guest: a bit for each page of 4096 bytes, in the
    /// file that is returned. The rings run on.
    ///
    /// # Errors
    /// If the backend cannot, or a request fails.
    pub fn start_logging(&mut self) -> Result<File> {
        let end =
            self.memory.regions().iter().map(|region| region.spec().gpa + region.spec().len as u64).max();
        let size = end.unwrap_or_default().div_ceil(4096 * 8).next_multiple_of(4096);
        let log = super::memory::memfd(size, false)?;
        let link = self.link.as_ref().ok_or(Error::NotConnected)?;
        let region =
            VhostUserDirtyLogRegion { mmap_size: size, mmap_offset: 0, mmap_handle: log.as_raw_fd() };
        request("SET_LOG_BASE", link.endpoint.set_log_base(0, Some(region)))?;
        self.set_logging(true)?;
        Ok(log)
    }

    /// Ends, or begins again, what [`Self::start_logging`] began. As QEMU does, it tells the addresses of running rings again.
    ///
    /// # Errors
    /// If a request fails.
    pub fn set_logging(&mut self, on: bool) -> Result<()> {
        let features = self.features.ok_or(Error::NotConnected)?;
        let link = self.link.as_mut().ok_or(Error::NotConnected)?;
        let log_all = if on { Features::LOG_ALL } else { Features::default() };
        request("SET_FEATURES", link.endpoint.set_features((features | log_all).0))?;
        self.rings.iter().try_for_each(|ring| link.set_addresses(ring, on))
    }

    /// Queue pair `index`.
    ///
    /// # Panics
    /// If there is none, or it is lent out.
    pub fn queue(&mut self, index: usize) -> &mut QueuePair {
        &mut self.queues[index]
    }

    /// Has the device execute a command (class, number, data) of the control queue that was handed over to it; its answer, 0 if it
    /// has (virtio 1.2, §5.1.6.5).
    ///
    /// # Errors
    /// If the queue is not handed over, or there is no answer in time.
    pub fn control(&mut self, command: &[u8]) -> Result<u8> {
        Ok(self.controls(&[command])?[0])
    }

    /// [`Self::control`] for commands that the device is shown all at once; as many as the queue has room for, at two descriptors
    /// each.
    ///
    /// # Errors
    /// As for [`Self::control`], and if there are more.
    pub fn controls(&mut self, commands: &[&[u8]]) -> Result<Vec<u8>> {
        let timeout = self.config.timeout;
        let ring = self.control_ring()?;
        let piece = |buffer: &Buffer, flags| Descriptor {
            addr: buffer.gpa(),
            len: buffer.len() as u32,
            flags,
            next: 0,
        };
        let mut buffers = Vec::new();
        for command in commands {
            let (sent, answer) = (ring.memory().alloc(command.len(), 1)?, ring.memory().alloc(1, 1)?);
            sent.write(0, command);
            let chain = [piece(&sent, Descriptor::NEXT), piece(&answer, Descriptor::WRITE)];
            ring.post(&chain).ok_or(Error::RingFull(ring.index()))?;
            buffers.push((sent, answer));
        }
        ring.publish()?;
        for _ in commands {
            if !ring.wait(timeout)? {
                return Err(Error::io("wait for the answer to a command")(ErrorKind::TimedOut.into()));
            }
            ring.take_used()?;
        }
        let byte = |answer: &Buffer| {
            let mut byte = [0];
            answer.read(0, &mut byte);
            byte[0]
        };
        Ok(buffers.iter().map(|(_, answer)| byte(answer)).collect())
    }

    /// The control queue that was handed over.
    ///
    /// # Errors
    /// If it was not.
    pub fn control_ring(&mut self) -> Result<&mut Ring> {
        self.control.as_mut().ok_or_else(|| Error::Config("the control queue is not handed over".into()))
    }

    /// Number of queue pairs.
    pub fn queue_pairs(&self) -> usize {
        self.config.queue_pairs
    }

    /// Lends the queue pairs out, to be driven by other threads while this object keeps the session.
    pub fn take_queues(&mut self) -> Vec<QueuePair> {
        std::mem::take(&mut self.queues)
    }

    /// Takes back what [`Self::take_queues`] lent out, in any order.
    pub fn return_queues(&mut self, mut queues: Vec<QueuePair>) {
        self.queues.append(&mut queues);
        self.queues.sort_by_key(|pair| pair.rx.index());
    }

    /// The features that driver and device agreed on; none before the first start.
    pub fn features(&self) -> Features {
        self.features.unwrap_or_default()
    }

    /// The features that the backend at hand offers.
    pub fn offered(&self) -> Features {
        self.link.as_ref().map(|link| link.offered).unwrap_or_default()
    }

    /// The guest's memory.
    pub fn memory(&self) -> &GuestMemory {
        &self.memory
    }

    /// The socket, to send what no decent frontend sends.
    pub fn socket(&self) -> Option<&UnixStream> {
        self.link.as_ref().map(|link| &link.socket)
    }

    /// Whether the backend is still at the other end of the connection.
    pub fn is_connected(&self) -> bool {
        !self.wait_disconnected(Duration::ZERO)
    }

    /// Waits until the backend has closed the connection, `timeout` at most; true if it has.
    pub fn wait_disconnected(&self, timeout: Duration) -> bool {
        match &self.link {
            // Backends send nothing but replies, so readable means closed.
            Some(link) => wait_readable(link.socket.as_fd(), timeout).unwrap_or(true),
            None => true,
        }
    }

    /// From `SET_FEATURES` to enabled rings. Rings that run are left alone.
    fn set_up(&mut self) -> Result<()> {
        let features = self.features.ok_or(Error::NotConnected)?;
        let link = self.link.as_mut().ok_or(Error::NotConnected)?;
        request("SET_FEATURES", link.endpoint.set_features(features.0))?;
        if self.config.memory_slots && !link.has_memory {
            for region in self.memory.regions() {
                request("ADD_MEM_REG", link.endpoint.add_mem_region(&region.info()))?;
            }
            link.has_memory = true;
        } else if !self.config.memory_slots {
            self.set_mem_table()?;
        }
        let link = self.link.as_mut().ok_or(Error::NotConnected)?;
        for (ring, state) in self.rings.iter().zip(&mut self.states) {
            let base = match *state {
                RingState::Running(_) => continue,
                RingState::Lost(_) if !features.contains(Features::RING_PACKED) => ring.used_index(),
                RingState::Stopped(base) | RingState::Lost(base) => base,
            };
            link.start_ring(ring, base)?;
            *state = RingState::Running(base);
        }
        if features.contains(Features::PROTOCOL_FEATURES) {
            for ring in &self.rings {
                link.enable_ring(ring.index, true)?;
            }
        }
        Ok(())
    }
}

impl Drop for Frontend {
    fn drop(&mut self) {
        if self.listener.is_some() {
            // Somebody may have removed it before us.
            let _ = std::fs::remove_file(&self.config.path);
        }
    }
}

impl Link {
    fn negotiate(socket: UnixStream, config: &Builder) -> Result<Self> {
        let clone = socket.try_clone().map_err(Error::io("duplicate the socket"))?;
        let rings = 2 * config.queue_pairs as u64 + u64::from(config.control_queue);
        let mut endpoint = Endpoint::from_stream(clone, rings);
        let offered = Features(request("GET_FEATURES", endpoint.get_features())?);
        let mut protocol = VhostUserProtocolFeatures::empty();
        if offered.contains(Features::PROTOCOL_FEATURES) {
            let mut wanted = VhostUserProtocolFeatures::MQ | VhostUserProtocolFeatures::LOG_SHMFD;
            if config.reply_ack {
                wanted |= VhostUserProtocolFeatures::REPLY_ACK;
            }
            if config.memory_slots {
                wanted |= VhostUserProtocolFeatures::CONFIGURE_MEM_SLOTS;
            }
            protocol = wanted & request("GET_PROTOCOL_FEATURES", endpoint.get_protocol_features())?;
            request("SET_PROTOCOL_FEATURES", endpoint.set_protocol_features(protocol))?;
        }
        if protocol.contains(VhostUserProtocolFeatures::REPLY_ACK) {
            endpoint.set_hdr_flags(VhostUserHeaderFlag::NEED_REPLY);
        }
        if protocol.contains(VhostUserProtocolFeatures::MQ) {
            let (has, want) = (wire::max_queue_pairs(&socket)?, config.queue_pairs);
            if has < want as u64 {
                return Err(Error::Lacks(format!("queues: it has {has} pairs, we want {want}")));
            }
        } else if config.queue_pairs > 1 {
            return Err(Error::Lacks("the protocol feature MQ".into()));
        }
        if config.memory_slots {
            let slots = request("GET_MAX_MEM_SLOTS", endpoint.get_max_mem_slots())?;
            if (slots as usize) < config.regions.len() {
                return Err(Error::Lacks(format!("memory slots: it has {slots}")));
            }
        }
        request("SET_OWNER", endpoint.set_owner())?;
        let (acked, kicks) = (protocol.contains(VhostUserProtocolFeatures::REPLY_ACK), config.kicks);
        Ok(Self { endpoint, socket, offered, has_memory: false, acked, kicks })
    }

    fn start_ring(&mut self, ring: &RingShared, base: u16) -> Result<()> {
        let endpoint = &self.endpoint;
        request("SET_VRING_NUM", endpoint.set_vring_num(ring.index, ring.size))?;
        request("SET_VRING_BASE", endpoint.set_vring_base(ring.index, base))?;
        self.set_addresses(ring, false)?;
        match self.kicks {
            true => request("SET_VRING_KICK", endpoint.set_vring_kick(ring.index, &ring.kick))?,
            false => {
                wire::take_descriptor(&self.socket, FrontendReq::SET_VRING_KICK, ring.index, self.acked)?
            }
        }
        self.set_call(ring, true)?;
        // As QEMU does when it hands a queue over: there may be buffers in it of which the backend does not know.
        ring.kick.write(1).map_err(Error::io("kick the device"))
    }

    fn set_call(&self, ring: &RingShared, on: bool) -> Result<()> {
        if on {
            return request("SET_VRING_CALL", self.endpoint.set_vring_call(ring.index, &ring.call));
        }
        wire::take_descriptor(&self.socket, FrontendReq::SET_VRING_CALL, ring.index, self.acked)
    }

    fn set_addresses(&self, ring: &RingShared, log: bool) -> Result<()> {
        let addresses = VringConfigData {
            queue_max_size: ring.size,
            queue_size: ring.size,
            flags: u32::from(log), // VHOST_VRING_F_LOG
            desc_table_addr: ring.descriptors.user_addr(),
            used_ring_addr: ring.used.user_addr(),
            avail_ring_addr: ring.avail.user_addr(),
            log_addr: log.then(|| ring.used.gpa()),
        };
        request("SET_VRING_ADDR", self.endpoint.set_vring_addr(ring.index, &addresses))
    }

    fn enable_ring(&mut self, index: usize, enable: bool) -> Result<()> {
        request("SET_VRING_ENABLE", self.endpoint.set_vring_enable(index, enable))
    }
}

fn request<T>(request: &'static str, outcome: vhost::Result<T>) -> Result<T> {
    outcome.map_err(|source| Error::Request { request, source })
}

fn bind(path: &Path) -> Result<UnixListener> {
    match std::fs::remove_file(path) {
        Err(error) if error.kind() != ErrorKind::NotFound => Err(Error::io("replace the socket")(error)),
        _ => UnixListener::bind(path).map_err(Error::io("listen")),
    }
}

fn accept(listener: &UnixListener, timeout: Duration) -> Result<UnixStream> {
    if !wait_readable(listener.as_fd(), timeout).map_err(Error::io("wait for the backend"))? {
        return Err(Error::io("wait for the backend")(ErrorKind::TimedOut.into()));
    }
    listener.accept().map(|(socket, _)| socket).map_err(Error::io("accept the backend"))
}

fn dial(path: &Path, timeout: Duration) -> Result<UnixStream> {
    let deadline = Instant::now() + timeout;
    loop {
        match UnixStream::connect(path) {
            // Being started, or restarted.
            Err(error)
                if matches!(error.kind(), ErrorKind::NotFound | ErrorKind::ConnectionRefused)
                    && Instant::now() < deadline =>
            {
                std::thread::sleep(Duration::from_millis(5));
            }
            outcome => return outcome.map_err(Error::io("connect to the backend")),
        }
    }
}
