//! What a sleeping worker waits for: kicks of its guests, and its wake-up descriptor.

use crate::quiesce::WorkerEpoch;
use crate::virtio::Kick;
use log::warn;
use std::io;
use std::os::fd::{AsFd, AsRawFd};
use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};

/// The descriptors that end a worker's sleep.
pub struct Kicks {
    epoll: Epoll,
}

impl Kicks {
    /// Waits for the worker's own wake-up descriptor, to begin with.
    pub fn new(epoch: &WorkerEpoch) -> io::Result<Kicks> {
        let epoll = Epoll::new()?;
        let interest = EpollEvent::new(EventSet::IN, 0);
        epoll.ctl(ControlOperation::Add, epoch.wake_fd().as_raw_fd(), interest)?;
        Ok(Kicks { epoll })
    }

    /// Waits for these kicks of a port too. Edge triggered: their count is of no interest and never read.
    pub fn watch(&self, kick: &Kick, port: &str) {
        let interest = EpollEvent::new(EventSet::IN | EventSet::EDGE_TRIGGERED, 1);
        if let Err(error) = self.epoll.ctl(ControlOperation::Add, kick.as_fd().as_raw_fd(), interest) {
            warn!("port {port}: kicks cannot be watched, its packets may wait: {error}");
        }
    }

    /// No longer waits for these kicks.
    pub fn unwatch(&self, kick: &Kick) {
        // An error means that they were not watched, which has been said.
        let _ = self.epoll.ctl(ControlOperation::Delete, kick.as_fd().as_raw_fd(), EpollEvent::default());
    }

    /// Sleeps until any of them becomes readable.
    pub fn wait(&self) {
        let mut events = [EpollEvent::default(); 8];
        // An interrupted wait is a short sleep: the caller looks at its queues again.
        let _ = self.epoll.wait(-1, &mut events);
    }
}
