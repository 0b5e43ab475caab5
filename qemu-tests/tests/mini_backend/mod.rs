//! A small vhost-user network device on rust-vmm's `vhost-user-backend` and `virtio-queue`: an independent device side
//! to prove the frontend library against. It sends frames back to where they came from, or across queue pairs.

use std::collections::VecDeque;
use std::io::{self, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, RwLock};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use qemu_tests::frontend::{Features, NetHeader};
use vhost::vhost_user::Listener;
use vhost::vhost_user::message::VhostUserProtocolFeatures;
use vhost_user_backend::{VhostUserBackendMut, VhostUserDaemon, VringMutex, VringState, VringT};
use virtio_queue::{DescriptorChain, QueueOwnedT, QueueT};
use vm_memory::{
    Bytes, GuestAddress, GuestAddressSpace, GuestMemoryAtomic, GuestMemoryBackend, GuestMemoryMmap,
    GuestMemoryRegion,
};
use vmm_sys_util::epoll::EventSet;
use vmm_sys_util::event::{EventConsumer, EventFlag, EventNotifier, new_event_consumer_and_notifier};

type Memory = GuestMemoryAtomic<GuestMemoryMmap>;

/// Where frames go.
#[derive(Clone, Copy)]
pub enum Wiring {
    /// Back on the queue pair they came from.
    Echo,
    /// To the queue pair opposite: the first to the last, and so on.
    Cross,
}

/// What a test can see of the device.
#[derive(Default)]
pub struct Observed {
    /// Frames taken from transmit rings.
    pub frames: AtomicU64,
    /// Frames that had no room in a single receive buffer.
    pub too_long: AtomicU64,
    /// Calls to the driver.
    pub calls: AtomicU64,
    /// Guest-physical start and length of each region in the memory table.
    pub regions: Mutex<Vec<(u64, u64)>>,
}

/// A device that serves one connection after the other until it is dropped.
pub struct MiniBackend {
    path: PathBuf,
    observed: Arc<Observed>,
    hang_up: HangUp,
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

/// Closes the connection at hand, if there is one.
type HangUp = Arc<Mutex<Option<Box<dyn Fn() + Send>>>>;

impl MiniBackend {
    /// Listens at `path`.
    pub fn serve(path: &Path, device: Device) -> Self {
        let mut listener = Listener::new(path, true).unwrap();
        Self::run(path, device, move |daemon| daemon.start(&mut listener).is_ok())
    }

    /// Connects to whoever listens at `path`, again and again.
    pub fn dial(path: &Path, device: Device) -> Self {
        let target = path.to_str().unwrap().to_owned();
        Self::run(path, device, move |daemon| {
            let connected = daemon.start_client(&target).is_ok();
            if !connected {
                thread::sleep(Duration::from_millis(5));
            }
            connected
        })
    }

    fn run(
        path: &Path,
        device: Device,
        mut start: impl FnMut(&mut VhostUserDaemon<Arc<RwLock<Device>>>) -> bool + Send + 'static,
    ) -> Self {
        let (hang_up, stop) = (HangUp::default(), Arc::new(AtomicBool::new(false)));
        let observed = device.observed.clone();
        let (their_hang_up, their_stop) = (hang_up.clone(), stop.clone());
        let thread = thread::spawn(move || {
            while !their_stop.load(Ordering::SeqCst) {
                let memory = Memory::new(GuestMemoryMmap::new());
                let fresh = Arc::new(RwLock::new(device.clone()));
                let mut daemon = VhostUserDaemon::new("mini".into(), fresh, memory).unwrap();
                if !start(&mut daemon) {
                    continue;
                }
                let handle = daemon.shutdown_handle().unwrap();
                *their_hang_up.lock().unwrap() = Some(Box::new(move || handle.shutdown()));
                // The error tells how the connection ended, which is for the other side to judge.
                let _ = daemon.wait();
                their_hang_up.lock().unwrap().take();
            }
        });
        Self { path: path.to_path_buf(), observed, hang_up, stop, thread: Some(thread) }
    }

    pub fn observed(&self) -> &Observed {
        &self.observed
    }

    /// Drops the connection at hand, as a backend that dies.
    pub fn hang_up(&self) {
        if let Some(shutdown) = self.hang_up.lock().unwrap().as_ref() {
            shutdown();
        }
    }
}

impl Drop for MiniBackend {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::SeqCst);
        self.hang_up();
        // Whoever waits in accept wakes up for this.
        drop(UnixStream::connect(&self.path));
        self.hang_up();
        let outcome = self.thread.take().unwrap().join();
        assert!(outcome.is_ok() || thread::panicking(), "the device panicked");
    }
}

/// The device itself, one per connection.
#[derive(Clone)]
pub struct Device {
    pairs: usize,
    offered: Features,
    wiring: Wiring,
    acked: Features,
    memory: Option<Memory>,
    /// Per queue pair: frames with their headers that wait for receive buffers.
    waiting: Vec<VecDeque<Vec<u8>>>,
    observed: Arc<Observed>,
}

impl Device {
    pub fn new(pairs: usize, wiring: Wiring) -> Self {
        Self {
            pairs,
            offered: Features::LINUX | Features::PROTOCOL_FEATURES,
            wiring,
            acked: Features::default(),
            memory: None,
            waiting: vec![VecDeque::new(); pairs],
            observed: Arc::default(),
        }
    }

    pub fn without(self, features: Features) -> Self {
        Self { offered: self.offered.without(features), ..self }
    }

    fn header_len(&self) -> usize {
        let long = self.acked.contains(Features::VERSION_1) || self.acked.contains(Features::MRG_RXBUF);
        if long { NetHeader::LEN } else { NetHeader::LEGACY_LEN }
    }

    /// Takes all frames off a transmit ring.
    fn drain(&mut self, pair: usize, vring: &VringMutex) {
        let Some(memory) = self.memory.clone() else { return };
        let to = match self.wiring {
            Wiring::Echo => pair,
            Wiring::Cross => self.pairs - 1 - pair,
        };
        let mut state = vring.get_mut();
        loop {
            state.disable_notification().unwrap();
            let before = state.get_queue().next_avail();
            while let Some(chain) = state.get_queue_mut().pop_descriptor_chain(memory.memory()) {
                let head = chain.head_index();
                let mut frame = Vec::new();
                chain.reader(&memory.memory()).unwrap().read_to_end(&mut frame).unwrap();
                self.waiting[to].push_back(frame);
                self.observed.frames.fetch_add(1, Ordering::Relaxed);
                let old = state.get_queue().next_used();
                self.publish(&mut state, old, &[(head, 0)]);
            }
            // A ring with an impossible index always claims to have more.
            if !state.enable_notification().unwrap() || state.get_queue().next_avail() == before {
                break;
            }
        }
    }

    /// Moves waiting frames into a receive ring.
    fn deliver(&mut self, pair: usize, vring: &VringMutex) {
        let Some(memory) = self.memory.clone() else { return };
        let mut state = vring.get_mut();
        if !state.get_queue().ready() || !state.is_enabled() {
            return;
        }
        while let Some(frame) = self.waiting[pair].front() {
            let Some(used) = self.scatter(&mut state, &memory, frame) else {
                // Not enough buffers: the next kick brings us back, unless they came in just now.
                if state.enable_notification().unwrap() {
                    continue;
                }
                return;
            };
            self.waiting[pair].pop_front();
            let old = state.get_queue().next_used();
            self.publish(&mut state, old, &used);
        }
    }

    /// Writes one frame into as many buffers as it takes, or puts them all back.
    fn scatter(
        &self,
        state: &mut VringState<Memory>,
        memory: &Memory,
        frame: &[u8],
    ) -> Option<Vec<(u16, u32)>> {
        let (mut chains, mut room): (Vec<DescriptorChain<_>>, usize) = (Vec::new(), 0);
        let mergeable = self.acked.contains(Features::MRG_RXBUF);
        while room < frame.len() && (mergeable || chains.is_empty()) {
            let Some(chain) = state.get_queue_mut().pop_descriptor_chain(memory.memory()) else {
                chains.iter().for_each(|_| state.get_queue_mut().go_to_previous_position());
                return None;
            };
            room += chain.clone().writable().map(|descriptor| descriptor.len() as usize).sum::<usize>();
            chains.push(chain);
        }
        if room < frame.len() {
            self.observed.too_long.fetch_add(1, Ordering::Relaxed);
            state.get_queue_mut().go_to_previous_position();
            return Some(Vec::new());
        }
        let mut frame = frame.to_vec();
        if self.header_len() == NetHeader::LEN {
            frame[10..12].copy_from_slice(&(chains.len() as u16).to_le_bytes());
        }
        let memory = memory.memory();
        let mut left = frame.as_slice();
        let mut used = Vec::new();
        for chain in chains {
            let head = chain.head_index();
            let mut writer = chain.writer(&memory).unwrap();
            let count = writer.available_bytes().min(left.len());
            writer.write_all(&left[..count]).unwrap();
            used.push((head, count as u32));
            left = &left[count..];
        }
        Some(used)
    }

    /// Shows used buffers to the driver all at once, as the buffers of one packet must be, and calls it if it wants that.
    /// `virtio-queue` can only show them one by one, and knows no `NO_INTERRUPT`.
    fn publish(&self, state: &mut VringState<Memory>, old: u16, used: &[(u16, u32)]) {
        if used.is_empty() {
            return;
        }
        let memory = self.memory.as_ref().unwrap().memory();
        let (ring, avail) = (state.get_queue().used_ring(), state.get_queue().avail_ring());
        let size = state.get_queue().size();
        let mut index = old;
        for &(head, len) in used {
            let entry = ring + 4 + 8 * u64::from(index % size);
            memory.write_obj(u32::from(head), GuestAddress(entry)).unwrap();
            memory.write_obj(len, GuestAddress(entry + 4)).unwrap();
            index = index.wrapping_add(1);
        }
        memory.store(index, GuestAddress(ring + 2), Ordering::Release).unwrap();
        state.get_queue_mut().set_next_used(index);
        std::sync::atomic::fence(Ordering::SeqCst);
        let load = |at: u64| memory.load::<u16>(GuestAddress(at), Ordering::Relaxed).unwrap();
        let wanted = if self.acked.contains(Features::EVENT_IDX) {
            let event = load(avail + 4 + 2 * u64::from(size));
            index.wrapping_sub(event).wrapping_sub(1) < index.wrapping_sub(old)
        } else {
            load(avail) & 1 == 0
        };
        if wanted {
            self.observed.calls.fetch_add(1, Ordering::Relaxed);
            state.signal_used_queue().unwrap();
        }
    }
}

impl VhostUserBackendMut for Device {
    type Bitmap = ();
    type Vring = VringMutex;

    fn num_queues(&self) -> usize {
        2 * self.pairs
    }

    fn max_queue_size(&self) -> usize {
        1024
    }

    fn features(&self) -> u64 {
        self.offered.0
    }

    fn acked_features(&mut self, features: u64) {
        self.acked = Features(features);
    }

    fn protocol_features(&self) -> VhostUserProtocolFeatures {
        VhostUserProtocolFeatures::MQ
            | VhostUserProtocolFeatures::REPLY_ACK
            | VhostUserProtocolFeatures::CONFIGURE_MEM_SLOTS
    }

    fn set_event_idx(&mut self, _enabled: bool) {}

    fn update_memory(&mut self, memory: Memory) -> io::Result<()> {
        *self.observed.regions.lock().unwrap() =
            memory.memory().iter().map(|region| (region.start_addr().0, region.len())).collect();
        self.memory = Some(memory);
        Ok(())
    }

    fn exit_event(&self, _thread_index: usize) -> Option<(EventConsumer, EventNotifier)> {
        new_event_consumer_and_notifier(EventFlag::NONBLOCK).ok()
    }

    fn handle_event(
        &mut self,
        queue: u16,
        _events: EventSet,
        vrings: &[VringMutex],
        _thread: usize,
    ) -> io::Result<()> {
        let pair = usize::from(queue / 2);
        if queue % 2 == 1 {
            self.drain(pair, &vrings[usize::from(queue)]);
        }
        for (pair, rings) in vrings.chunks(2).enumerate() {
            self.deliver(pair, &rings[0]);
        }
        Ok(())
    }
}
