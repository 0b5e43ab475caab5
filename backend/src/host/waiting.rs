//! Packets that wait for the host's answer, and whose turn it is.
//!
//! Workers' queues are first come, first served. They are emptied into this, so that a port with many packets on their
//! way (within its budgets) delays its own, not those of others.

use super::path::{Budget, HeldPacket};
use std::collections::VecDeque;

/// A packet and the index of the worker that has sent it.
pub type FromWorker = (usize, Box<HeldPacket>);

/// Packets by port: those that keep flows alive go first (they are few, and OVS forgets a flow if they come late), then one
/// of each port in turn.
#[derive(Default)]
pub struct Waiting {
    keep_alives: VecDeque<FromWorker>,
    /// By slot.
    ports: Vec<VecDeque<FromWorker>>,
    /// Slots that have packets; the first is next.
    turn: VecDeque<usize>,
}

impl Waiting {
    /// Whether nothing waits.
    pub fn is_empty(&self) -> bool {
        self.keep_alives.is_empty() && self.turn.is_empty()
    }

    /// Takes in a packet of worker `from`.
    pub fn push(&mut self, from: usize, held: Box<HeldPacket>) {
        if held.budget == Budget::KeepAlive {
            return self.keep_alives.push_back((from, held));
        }
        let slot = held.packet.in_port.slot as usize;
        if slot >= self.ports.len() {
            self.ports.resize_with(slot + 1, VecDeque::new);
        }
        let port = &mut self.ports[slot];
        if port.is_empty() {
            self.turn.push_back(slot);
        }
        port.push_back((from, held));
    }

    /// The packet whose turn it is.
    pub fn pop(&mut self) -> Option<FromWorker> {
        if let Some(first) = self.keep_alives.pop_front() {
            return Some(first);
        }
        let slot = self.turn.pop_front()?;
        let port = self.ports.get_mut(slot)?;
        let next = port.pop_front();
        if !port.is_empty() {
            self.turn.push_back(slot);
        }
        next
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use switch_core::packet::{Packet, PortId};

    #[test]
    fn ports_take_turns_and_keep_alives_go_first() {
        let mut waiting = Waiting::default();
        let mut push = |slot, len, budget| {
            let packet = Packet::from_frame(PortId { slot, generation: 1 }, &vec![0; len]);
            waiting.push(
                slot as usize % 2,
                Box::new(HeldPacket { packet, tail: [].into(), answer: None, budget, queue: 0 }),
            );
        };
        (1..=3).for_each(|len| push(4, len, Budget::Punt));
        push(7, 10, Budget::Miss);
        push(0, 20, Budget::Miss);
        push(7, 11, Budget::KeepAlive);
        push(4, 4, Budget::Miss);
        let mut order = Vec::new();
        while let Some((from, held)) = waiting.pop() {
            assert_eq!(from, held.packet.in_port.slot as usize % 2);
            order.push((held.packet.in_port.slot, held.packet.len));
        }
        assert_eq!(order, [(7, 11), (4, 1), (7, 10), (0, 20), (4, 2), (4, 3), (4, 4)]);
        assert!(waiting.is_empty());
    }
}
