//! The `vhost-user-backend` crate's view of a ring: its own state, and every change of it passed on to the port.

use std::cell::RefCell;
use std::fs::File;
use std::io;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, MutexGuard};

use vhost_user_backend::{VringMutex, VringState, VringStateGuard, VringStateMutGuard, VringT};
use virtio_queue::Error as QueueError;
use vm_memory::{GuestMemoryAtomic, GuestMemoryMmap};

use super::shared::PortShared;
use crate::virtio::Kick;

/// Guest memory as the crate hands it around.
pub(super) type Memory = GuestMemoryAtomic<GuestMemoryMmap<()>>;

thread_local! {
    /// The port whose rings are being made on this thread, and the index of the next one. The crate makes rings, in
    /// order, by a constructor that cannot say for whom.
    static MAKING: RefCell<Option<(Arc<PortShared>, usize)>> = const { RefCell::new(None) };
}

/// Makes the crate's objects in `make`, with all rings made meanwhile belonging to `port`.
pub(super) fn with_rings_of<T>(port: &Arc<PortShared>, make: impl FnOnce() -> T) -> T {
    MAKING.set(Some((port.clone(), 0)));
    let made = make();
    MAKING.set(None);
    made
}

/// A ring of a port.
#[derive(Clone)]
pub(super) struct PortVring {
    inner: VringMutex<Memory>,
    port: Arc<PortShared>,
    index: usize,
    /// The crate has stopped the ring and is about to take its descriptors away.
    stopping: Arc<AtomicBool>,
}

impl<'a> VringStateGuard<'a, Memory> for PortVring {
    type G = MutexGuard<'a, VringState<Memory>>;
}

impl<'a> VringStateMutGuard<'a, Memory> for PortVring {
    type G = MutexGuard<'a, VringState<Memory>>;
}

impl VringT<Memory> for PortVring {
    fn new(mem: Memory, max_queue_size: u16) -> Result<Self, QueueError> {
        let (port, index) = MAKING
            .with_borrow_mut(|making| {
                let (port, next) = making.as_mut()?;
                *next += 1;
                Some((port.clone(), *next - 1))
            })
            .ok_or(QueueError::QueueNotReady)?;
        Ok(PortVring { inner: VringMutex::new(mem, max_queue_size)?, port, index, stopping: Arc::default() })
    }

    fn get_ref(&self) -> <Self as VringStateGuard<'_, Memory>>::G {
        self.inner.get_ref()
    }

    fn get_mut(&self) -> <Self as VringStateMutGuard<'_, Memory>>::G {
        self.inner.get_mut()
    }

    // The crate's own way of moving packets, which nobody takes: workers use the rings directly.

    fn add_used(&self, desc_index: u16, len: u32) -> Result<(), QueueError> {
        self.inner.add_used(desc_index, len)
    }

    fn signal_used_queue(&self) -> io::Result<()> {
        self.inner.signal_used_queue()
    }

    fn enable_notification(&self) -> Result<bool, QueueError> {
        self.inner.enable_notification()
    }

    fn disable_notification(&self) -> Result<(), QueueError> {
        self.inner.disable_notification()
    }

    fn needs_notification(&self) -> Result<bool, QueueError> {
        self.inner.needs_notification()
    }

    fn read_kick(&self) -> io::Result<bool> {
        self.inner.read_kick()
    }

    // What the front-end sets up.

    fn set_enabled(&self, enabled: bool) {
        self.inner.set_enabled(enabled);
        self.port.update_ring(self.index, |r| r.enabled = enabled);
    }

    fn set_queue_info(&self, desc: u64, avail: u64, used: u64) -> Result<(), QueueError> {
        self.inner.set_queue_info(desc, avail, used)?;
        self.port.update_ring(self.index, |r| r.addresses = Some((desc, avail, used)));
        Ok(())
    }

    fn queue_next_avail(&self) -> u16 {
        self.port.tell_base(self.index)
    }

    fn set_queue_next_avail(&self, base: u16) {
        self.inner.set_queue_next_avail(base);
        self.port.set_base(self.index, base);
    }

    fn set_queue_next_used(&self, _: u16) {
        // A ring reads the used index from guest memory when it starts. The front-end may also set addresses of a
        // ring that runs, and then this would rewind entries that a worker has not published yet.
    }

    fn queue_used_idx(&self) -> Result<u16, QueueError> {
        // Asked for when addresses are set, for nothing but `set_queue_next_used`. The crate reads no guest memory of its own accord:
        // it may not be there.
        Ok(0)
    }

    fn set_queue_size(&self, num: u16) {
        // Not for the crate's own ring, whose size nobody asks for: each one that is not a power of two, as a guest's packed ring
        // need not be, would be an error in the log. A split ring of such a size is refused when it is to start.
        self.port.update_ring(self.index, |r| r.size = num);
    }

    fn set_queue_event_idx(&self, enabled: bool) {
        // For the rings it is one of the negotiated features.
        self.inner.set_queue_event_idx(enabled);
    }

    fn set_queue_ready(&self, ready: bool) {
        self.inner.set_queue_ready(ready);
        self.stopping.store(!ready, Ordering::Relaxed);
        self.port.update_ring(self.index, |r| r.ready = ready);
    }

    fn set_kick(&self, file: Option<File>) {
        // Two descriptors: the crate starts a ring only if it has one itself. Without a usable one the ring is polled.
        let kick = file.as_ref().and_then(|f| f.try_clone().and_then(Kick::new).ok()).map(Arc::new);
        // Without one from the front-end we start it: unless the ring is being stopped, it is to be polled.
        let polled = file.is_none() && !self.stopping.swap(false, Ordering::Relaxed);
        self.inner.set_kick(file);
        if polled {
            self.inner.set_queue_ready(true);
        }
        self.port.update_ring(self.index, |r| {
            r.kick = kick;
            r.ready |= polled;
        });
    }

    fn set_call(&self, file: Option<File>) {
        let call = file.as_ref().and_then(|f| f.try_clone().ok());
        self.inner.set_call(file);
        // Not part of what makes a ring run: it is swapped under a running ring.
        self.port.update_ring(self.index, |r| r.call.set(call));
    }

    fn set_err(&self, file: Option<File>) {
        self.inner.set_err(file);
    }
}
