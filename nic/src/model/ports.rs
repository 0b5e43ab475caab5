//! The card's ports.

use std::sync::{Arc, Mutex};

use rustix::fd::BorrowedFd;
use switch_core::key::Key;
use switch_core::offload::finish_checksum;
use switch_core::packet::{Gso, Offload, Packet, PortId};
use switch_core::parse::{self, Extracted};
use switch_core::segment::segment;

use super::{Card, Config, lock};
use crate::io::{NicError, PacketIo, Port, PortCounters, PortEvent, Received, SendError, Steering};

/// The card's ports.
#[derive(Debug)]
pub struct ModelPorts {
    pub(super) card: Arc<Mutex<Card>>,
    pub(super) ports: Vec<Port>,
    pub(super) resets: u32,
}

impl PacketIo for ModelPorts {
    fn ports(&self) -> &[Port] {
        &self.ports
    }

    fn receive(&mut self, budget: usize, each: &mut dyn FnMut(Received<'_>)) -> Result<usize, NicError> {
        let mut done = 0;
        while done < budget {
            let Some((port, queue, frame)) = lock(&self.card).cpu.pop_front() else { break };
            if let Some(counters) = lock(&self.card).counters.get_mut(Card::index(port)) {
                counters.received += 1;
            }
            done += 1;
            let (offload, mark) = (Offload::default(), queue.into());
            each(Received { port, frame: &frame, offload, forwarded: false, mark });
        }
        Ok(done)
    }

    fn send(&mut self, number: u32, frame: &[&[u8]], offload: &Offload) -> Result<(), SendError> {
        let mut card = lock(&self.card);
        let index = Card::index(number);
        let port = self.ports.get(index).ok_or(SendError::NoPort)?;
        let up = *card.links.get(index).ok_or(SendError::NoPort)?;
        let bytes = frame.concat();
        let longest = if offload.gso == Gso::None { port.max_frame } else { port.send.max_super };
        match bytes.len() {
            ..14 => return Err(SendError::TooShort),
            len if !port.does(offload, frame, len) => return Err(SendError::Offload),
            len if len > longest => return Err(SendError::TooLong),
            _ if !up => return Err(SendError::LinkDown),
            _ => {}
        }
        let frames = finish(bytes, offload).ok_or(SendError::Offload)?;
        if let Some(wire) = card.wires.get_mut(index) {
            wire.extend(frames);
        }
        if let Some(counters) = card.counters.get_mut(index) {
            counters.sent += 1;
        }
        Ok(())
    }

    fn flush(&mut self) -> Result<(), NicError> {
        Ok(())
    }

    fn poll_events(&mut self, events: &mut Vec<PortEvent>) -> Result<(), NicError> {
        let card = lock(&self.card);
        if std::mem::replace(&mut self.resets, card.resets) != card.resets {
            events.push(PortEvent::Reset);
        }
        for (port, up) in self.ports.iter_mut().zip(&card.links) {
            if std::mem::replace(&mut port.link.up, *up) != *up {
                events.push(PortEvent::Link { number: port.number, link: port.link });
            }
        }
        Ok(())
    }

    fn arm(&mut self) -> Result<bool, NicError> {
        Ok(lock(&self.card).cpu.is_empty())
    }

    /// The model is polled: it has none.
    fn interrupts(&self) -> Vec<BorrowedFd<'_>> {
        Vec::new()
    }

    fn counters(&self, port: u32) -> Option<PortCounters> {
        lock(&self.card).counters.get(Card::index(port)).copied()
    }

    fn queues(&self) -> u8 {
        lock(&self.card).config.queues
    }

    fn set_steering(&mut self, port: u32, rules: &[Steering]) -> Result<usize, NicError> {
        let mut card = lock(&self.card);
        let Config { queues, stations, .. } = card.config;
        let taken: Vec<Steering> =
            rules.iter().take(stations).take_while(|rule| rule.queue < queues).copied().collect();
        let count = taken.len();
        if let Some(place) = card.steering.get_mut(Card::index(port)) {
            *place = taken;
        }
        Ok(count)
    }
}

/// The frames that leave for one that is sent: its checksum completed, or its segments.
fn finish(mut frame: Vec<u8>, offload: &Offload) -> Option<Vec<Vec<u8>>> {
    if offload.gso == Gso::None {
        finish_checksum(&mut frame, offload).ok()?;
        return Some(vec![frame]);
    }
    let mut packet = Packet::from_frame(PortId { slot: 0, generation: 0 }, &frame);
    if parse::extract(&mut packet, &mut Key::default()) != Extracted::Done {
        return None;
    }
    let (mut room, mut frames) = (vec![0; frame.len()], Vec::new());
    segment(&frame, &packet.layout, offload, &mut room, |segment| frames.push(segment.to_vec())).ok()?;
    Some(frames)
}
