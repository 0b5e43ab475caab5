//! From the representors down to the workers: buffers of the host path, and the queues that they travel through.
//!
//! As on the way up nothing is allocated: a frame goes to a worker in a buffer of the host path's pool, and the worker gives
//! the buffer back. A port may have only so many on their way; beyond, its frames stay in its TAP's queue, and what finds
//! no room there the kernel drops and counts.

use crate::frames::pool::{BUFFERS, LARGE, Pool, is_large};
use crate::host::path::HeldPacket;
use crate::quiesce;
use crate::worker::MAX_PORTS;
use log::error;
use rtrb::{Consumer, Producer};

/// Buffers for ordinary frames that one port may have on their way.
const PORT_SMALL: u32 = 256;
/// Buffers for the largest frames that one port may have on their way.
const PORT_LARGE: u32 = LARGE as u32 / 4;

/// The host path's ends of the queues to and from one worker.
pub struct DownLink {
    deliver: Producer<Box<HeldPacket>>,
    returned: Consumer<Box<HeldPacket>>,
    worker: quiesce::Waker,
    /// Something was sent since the worker was woken last.
    due: bool,
}

impl DownLink {
    /// Queues of [`BUFFERS`] places each, so that neither can be full, and what wakes the worker.
    pub fn new(
        deliver: Producer<Box<HeldPacket>>,
        returned: Consumer<Box<HeldPacket>>,
        worker: quiesce::Waker,
    ) -> DownLink {
        debug_assert!(deliver.buffer().capacity() >= BUFFERS);
        DownLink { deliver, returned, worker, due: false }
    }
}

/// What a port has on its way.
#[derive(Clone, Copy, Default)]
struct OnTheWay {
    small: u32,
    large: u32,
}

/// All workers' queues, and the free buffers.
pub struct Down {
    links: Vec<DownLink>,
    pool: Pool,
    /// By slot of the port.
    ports: Box<[OnTheWay]>,
}

impl Down {
    /// Around queues to all workers, in their order.
    pub fn new(links: Vec<DownLink>) -> Down {
        Down { links, pool: Pool::default(), ports: vec![OnTheWay::default(); MAX_PORTS].into() }
    }

    /// Takes back the buffers that workers have given back.
    pub fn reclaim(&mut self) {
        for link in &mut self.links {
            while let Ok(held) = link.returned.pop() {
                if let Some(port) = self.ports.get_mut(held.packet.in_port.slot as usize) {
                    let count = if is_large(held.tail.len()) { &mut port.large } else { &mut port.small };
                    *count = count.saturating_sub(1);
                }
                self.pool.put(held);
            }
        }
    }

    /// Whether workers have given buffers back.
    pub fn has_returned(&self) -> bool {
        self.links.iter().any(|link| !link.returned.is_empty())
    }

    /// Whether there is a buffer for one more frame for the port in `slot`, whatever its length.
    pub fn has_room(&self, slot: u32) -> bool {
        let room = |port: &OnTheWay| port.small < PORT_SMALL && port.large < PORT_LARGE;
        self.pool.has_any() && self.ports.get(slot as usize).is_some_and(room)
    }

    /// A buffer whose tail holds `tail_len` bytes.
    pub fn take(&mut self, tail_len: usize) -> Option<Box<HeldPacket>> {
        self.pool.take(tail_len)
    }

    /// Sends a buffer to a worker; `in_port` of its packet is the port that it is for.
    pub fn send(&mut self, worker: usize, held: Box<HeldPacket>) {
        let slot = held.packet.in_port.slot as usize;
        let (Some(link), Some(port)) = (self.links.get_mut(worker), self.ports.get_mut(slot)) else {
            error!("host path: there is no worker {worker} or no port {slot}");
            return self.pool.put(held);
        };
        let large = is_large(held.tail.len());
        match link.deliver.push(held) {
            Ok(()) => {
                *(if large { &mut port.large } else { &mut port.small }) += 1;
                link.due = true;
            }
            Err(rtrb::PushError::Full(held)) => {
                error!("host path: a queue is full that cannot be; a frame is lost");
                self.pool.put(held);
            }
        }
    }

    /// Wakes the workers that something was sent to.
    pub fn flush(&mut self) {
        for link in &mut self.links {
            if std::mem::take(&mut link.due) {
                link.worker.wake();
            }
        }
    }
}
