//! What a sleeping worker waits for: kicks of its guests, packets of its wires, and its wake-up descriptor.

use crate::quiesce::WorkerEpoch;
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

    /// Waits for these kicks of a port too. Edge triggered: their count is of no interest and never read, and a worker
    /// looks at its rings before it sleeps.
    pub fn watch(&self, kick: &dyn AsFd, port: &str) {
        let interest = EpollEvent::new(EventSet::IN | EventSet::EDGE_TRIGGERED, 1);
        if let Err(error) = self.epoll.ctl(ControlOperation::Add, kick.as_fd().as_raw_fd(), interest) {
            warn!("port {port}: kicks cannot be watched, its packets may wait: {error}");
        }
    }

    /// No longer waits for these kicks.
    pub fn unwatch(&self, kick: &dyn AsFd) {
        // An error means that they were not watched, which has been said.
        let _ = self.epoll.ctl(ControlOperation::Delete, kick.as_fd().as_raw_fd(), EpollEvent::default());
    }

    /// Sleeps until any of them becomes readable, or at most so many milliseconds.
    pub fn wait(&self, timeout: Option<i32>) {
        let mut events = [EpollEvent::default(); 8];
        // An interrupted wait is a short sleep: the caller looks at its queues again.
        let _ = self.epoll.wait(timeout.unwrap_or(-1), &mut events);
    }
}
