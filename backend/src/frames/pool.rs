//! Buffers for packets that must leave their guest's memory: allocated once, handed around, never freed by a worker.

use crate::host::path::{Budget, HeldPacket};
use switch_core::packet::{MAX_FRAME, Packet};

/// Tail of a buffer for ordinary frames; with its head, one holds any frame of up to 3 KiB.
const SMALL_TAIL: usize = 2048;
/// Tail of a buffer for the largest frames.
const LARGE_TAIL: usize = MAX_FRAME as usize;
/// Buffers for ordinary frames.
const SMALL: usize = 1024;
/// Buffers for the largest frames.
pub const LARGE: usize = 64;

/// How many buffers a pool has in all: the capacity of every queue that they travel through.
pub const BUFFERS: usize = SMALL + LARGE;

/// Whether a tail of that length needs one of the few large buffers.
pub fn is_large(tail: usize) -> bool {
    tail > SMALL_TAIL
}

/// The free buffers of a worker, or of the host path.
#[expect(clippy::vec_box, reason = "buffers travel through queues as they are")]
pub struct Pool {
    small: Vec<Box<HeldPacket>>,
    large: Vec<Box<HeldPacket>>,
}

fn buffer(tail: usize) -> Box<HeldPacket> {
    Box::new(HeldPacket {
        packet: Packet::default(),
        // Written, so that the pages are there before a packet is.
        tail: vec![0xff; tail].into(),
        answer: None,
        budget: Budget::Miss,
        queue: 0,
    })
}

impl Default for Pool {
    fn default() -> Self {
        Pool {
            small: (0..SMALL).map(|_| buffer(SMALL_TAIL)).collect(),
            large: (0..LARGE).map(|_| buffer(LARGE_TAIL)).collect(),
        }
    }
}

impl Pool {
    /// A buffer whose tail holds `tail` bytes.
    pub fn take(&mut self, tail: usize) -> Option<Box<HeldPacket>> {
        match is_large(tail) {
            false => self.small.pop(),
            true if tail <= LARGE_TAIL => self.large.pop(),
            true => None,
        }
    }

    /// Whether [`Pool::take`] would give one.
    pub fn has(&self, tail: usize) -> bool {
        if is_large(tail) { tail <= LARGE_TAIL && !self.large.is_empty() } else { !self.small.is_empty() }
    }

    /// Whether there is a buffer for a frame of any length.
    pub fn has_any(&self) -> bool {
        !self.small.is_empty() && !self.large.is_empty()
    }

    /// Gives a buffer back. What it refers to is freed by whoever fills it next on the host's side, not here.
    pub fn put(&mut self, buffer: Box<HeldPacket>) {
        if is_large(buffer.tail.len()) { self.large.push(buffer) } else { self.small.push(buffer) }
    }

    /// Bytes of all buffers.
    pub fn bytes(&self) -> usize {
        BUFFERS * size_of::<HeldPacket>() + SMALL * SMALL_TAIL + LARGE * LARGE_TAIL
    }

    /// Buffers that are free now.
    pub fn free(&self) -> usize {
        self.small.len() + self.large.len()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn buffers_come_back_to_their_class() {
        let mut pool = Pool::default();
        let small = pool.take(100).unwrap();
        let large = pool.take(60_000).unwrap();
        assert!(pool.take(MAX_FRAME as usize + 1).is_none(), "no frame is that long");
        pool.put(large);
        pool.put(small);
        assert_eq!(pool.free(), BUFFERS, "none is lost");
        while pool.take(1).is_some() {}
        assert!(pool.take(SMALL_TAIL + 1).is_some(), "ordinary frames do not use up the large buffers");
    }
}
