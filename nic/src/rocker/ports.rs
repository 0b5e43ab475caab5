//! Packet I/O: a transmit and a receive ring per port, and the ring of events.

use std::sync::Arc;

use rustix::fd::{AsFd, BorrowedFd, OwnedFd};
use switch_core::packet::{Gso, Offload};

use crate::io::{Link, NicError, PacketIo, Port, PortCounters, PortEvent, Received, SendError};
use crate::pci::{Bar, DmaMemory, PciError, PciFunction};

use super::copies::Reporter;
use super::regs::{self, errno, receive, transmit};
use super::ring::{Completion, Ring};
use super::tlv::{Malformed, Message};
use super::{Config, Shared};

/// Bytes of a transmit descriptor's message.
const TRANSMIT_BUFFER: u16 = 64;
/// Bytes of an event: the longest is 56 (QEMU wants room for 72).
const EVENT_BUFFER: u16 = 128;
const EVENTS: u32 = 64;
/// An Ethernet header.
const MIN_FRAME: usize = 14;

/// Rings with a frame for each slot.
#[derive(Debug)]
struct Queue {
    ring: Ring,
    frames: DmaMemory,
    frame: usize,
}

impl Queue {
    fn new(
        function: &mut dyn PciFunction,
        bar: &Bar,
        number: u32,
        buffer: u16,
        config: &Config,
    ) -> Result<Queue, PciError> {
        let frame = usize::from(config.max_frame).next_multiple_of(64);
        let ring = Ring::new(function, bar, number, config.ring, buffer)?;
        let frames = function.dma_alloc(frame * config.ring as usize)?;
        Ok(Queue { ring, frames, frame })
    }

    fn at(&self, slot: u32) -> usize {
        slot as usize * self.frame
    }

    fn iova(&self, slot: u32) -> u64 {
        self.frames.iova() + self.at(slot) as u64
    }
}

#[derive(Debug)]
struct PortRings {
    receive: Queue,
    transmit: Queue,
    counters: PortCounters,
}

/// The ports of a switch; see [`super::open`].
#[derive(Debug)]
pub struct RockerPorts {
    bar: Bar,
    shared: Arc<Shared>,
    copies: Reporter,
    /// Of the setup that the rings belong to; 0 before the first.
    epoch: u32,
    ports: Vec<Port>,
    rings: Vec<PortRings>,
    events: Ring,
    interrupts: Vec<OwnedFd>,
    max_frame: u16,
    /// The port that is looked at first.
    next: usize,
    message: Vec<u8>,
    frame: Vec<u8>,
    /// Events that nobody has asked for yet.
    pending: Vec<PortEvent>,
}

impl Drop for RockerPorts {
    /// The rings' memory goes: nothing of the device may use it any more, whoever of the two halves is dropped first. Errors
    /// mean that the function is gone.
    fn drop(&mut self) {
        let _ = self.bar.write64(regs::PORT_ENABLE, 0);
        for PortRings { transmit, receive, .. } in &mut self.rings {
            let _ = (transmit.ring.stop(), receive.ring.stop());
        }
        let _ = self.events.stop();
    }
}

impl RockerPorts {
    pub(super) fn new(
        function: &mut dyn PciFunction,
        bar: &Bar,
        ports: Vec<Port>,
        config: &Config,
        shared: Arc<Shared>,
        copies: Reporter,
    ) -> Result<RockerPorts, NicError> {
        let mut rings = Vec::new();
        let mut vectors = vec![regs::VECTOR_EVENT];
        for index in 0..ports.len() as u32 {
            let receive = Queue::new(function, bar, regs::ring_receive(index), receive::BUFFER, config)?;
            let transmit = Queue::new(function, bar, regs::ring_transmit(index), TRANSMIT_BUFFER, config)?;
            rings.push(PortRings { receive, transmit, counters: PortCounters::default() });
            vectors.push(regs::vector_receive(index));
        }
        let all = function.interrupts(4 + 2 * ports.len() as u16)?;
        let interrupts = all.into_iter().enumerate().filter(|(vector, _)| vectors.contains(vector));
        let mut this = RockerPorts {
            bar: bar.clone(),
            shared,
            copies,
            epoch: 0,
            events: Ring::new(function, bar, regs::RING_EVENT, EVENTS, EVENT_BUFFER)?,
            interrupts: interrupts.map(|(_, event)| event).collect(),
            ports,
            rings,
            max_frame: config.max_frame,
            next: 0,
            message: Vec::new(),
            frame: Vec::with_capacity(config.max_frame.into()),
            pending: Vec::new(),
        };
        this.is_usable()?;
        this.pending.clear();
        Ok(this)
    }

    /// Whether the device is usable. Gives it the rings if it was set up anew.
    fn is_usable(&mut self) -> Result<bool, NicError> {
        let Some(epoch) = self.shared.usable() else { return Ok(false) };
        if epoch != self.epoch {
            self.start()?;
            self.epoch = epoch;
            self.pending.push(PortEvent::Reset);
        }
        Ok(true)
    }

    fn start(&mut self) -> Result<(), NicError> {
        self.events.start()?;
        while self.events.push(&[])? {}
        self.events.ring()?;
        let mut enable = 0;
        for (port, rings) in self.ports.iter().zip(&mut self.rings) {
            rings.counters.tx_reset += u64::from(rings.transmit.ring.outstanding());
            rings.transmit.ring.start()?;
            rings.receive.ring.start()?;
            while post(&mut rings.receive, self.max_frame)? {}
            rings.receive.ring.ring()?;
            enable |= 1 << port.number;
        }
        self.bar.write64(regs::PORT_ENABLE, enable)?;
        self.read_links()
    }

    fn read_links(&mut self) -> Result<(), NicError> {
        let up = self.bar.read64(regs::LINK_STATUS)?;
        for port in &mut self.ports {
            let link = Link { up: up & 1 << port.number != 0, ..port.link };
            if link != port.link {
                port.link = link;
                self.pending.push(PortEvent::Link { number: port.number, link });
            }
        }
        Ok(())
    }

    /// Takes up what a transmit ring has finished.
    fn reap(rings: &mut PortRings) -> Result<(), NicError> {
        while let Some(completion) = rings.transmit.ring.take()? {
            match completion.error {
                0 => rings.counters.sent += 1,
                _ => rings.counters.tx_error += 1,
            }
        }
        Ok(())
    }
}

/// Posts the next free slot of a receive ring. `false`: there is none.
fn post(queue: &mut Queue, max_frame: u16) -> Result<bool, PciError> {
    let Some(slot) = queue.ring.next() else { return Ok(false) };
    let mut message = [0; 32];
    put(&mut message, 0, receive::ADDRESS, &queue.iova(slot).to_le_bytes());
    put(&mut message, 16, receive::MAX_LEN, &max_frame.to_le_bytes());
    queue.ring.push(&message)
}

/// Writes a value of at most 8 bytes into a message on the stack, where `Writer` would allocate.
fn put(message: &mut [u8], at: usize, kind: u32, value: &[u8]) {
    let Some(to) = message.get_mut(at..at + 16) else { return };
    to[..4].copy_from_slice(&kind.to_le_bytes());
    to[4..6].copy_from_slice(&(8 + value.len() as u16).to_le_bytes());
    to[8..8 + value.len()].copy_from_slice(value);
}

/// The message of a transmit descriptor with one fragment.
fn fragment(address: u64, len: u16) -> [u8; 48] {
    let mut message = [0; 48];
    // Two nested headers, 8 bytes each, around two values of 16 bytes.
    message[..4].copy_from_slice(&transmit::FRAGMENTS.to_le_bytes());
    message[4..6].copy_from_slice(&48u16.to_le_bytes());
    message[8..12].copy_from_slice(&transmit::FRAGMENT.to_le_bytes());
    message[12..14].copy_from_slice(&40u16.to_le_bytes());
    put(&mut message, 16, transmit::ADDRESS, &address.to_le_bytes());
    put(&mut message, 32, transmit::LEN, &len.to_le_bytes());
    message
}

/// What a receive completion says: whether it is a copy, and how long the frame is.
fn received(message: &[u8], completion: &Completion, max: u16) -> Result<(bool, usize), Malformed> {
    if completion.len.is_none() {
        return Err(Malformed);
    }
    let message = Message(message);
    let flags = message.find(receive::FLAGS)?.map_or(Ok(0), |value| value.u16())?;
    let len = message.get(receive::LEN)?.u16()?;
    if len > max || usize::from(len) < MIN_FRAME {
        return Err(Malformed);
    }
    Ok((flags & receive::FLAG_FORWARDED != 0, len.into()))
}

impl PacketIo for RockerPorts {
    fn ports(&self) -> &[Port] {
        &self.ports
    }

    fn receive(&mut self, budget: usize, each: &mut dyn FnMut(Received<'_>)) -> Result<usize, NicError> {
        if !self.is_usable()? {
            return Ok(0);
        }
        let count = self.rings.len();
        let mut done = 0;
        for turn in 0..count {
            let index = (self.next + turn) % count;
            let (Some(rings), Some(port)) = (self.rings.get_mut(index), self.ports.get(index)) else { break };
            let mut looked = 0;
            while done < budget && looked < rings.receive.ring.size() {
                let Some(completion) = rings.receive.ring.take()? else { break };
                looked += 1;
                rings.receive.ring.message(&completion, &mut self.message)?;
                match (completion.error, received(&self.message, &completion, self.max_frame)) {
                    (0, Ok((forwarded, len))) => {
                        self.frame.clear();
                        self.frame.resize(len, 0);
                        rings.receive.frames.read(rings.receive.at(completion.slot), &mut self.frame)?;
                        rings.counters.received += 1;
                        done += 1;
                        if forwarded {
                            self.copies.report(&self.frame, port.number, self.epoch, &self.shared);
                        }
                        let (frame, offload) = (&self.frame[..], Offload::default());
                        each(Received { port: port.number, frame, offload, forwarded, mark: 0 });
                    }
                    (errno::EMSGSIZE, _) => rings.counters.rx_too_long += 1,
                    _ => rings.counters.rx_error += 1,
                }
                post(&mut rings.receive, self.max_frame)?;
            }
            rings.receive.ring.ring()?;
        }
        self.next = (self.next + 1) % count.max(1);
        Ok(done)
    }

    fn send(&mut self, port: u32, frame: &[&[u8]], offload: &Offload) -> Result<(), SendError> {
        let index = (port as usize).checked_sub(1).ok_or(SendError::NoPort)?;
        let link = self.ports.get(index).ok_or(SendError::NoPort)?.link;
        if !self.is_usable().map_err(|_| SendError::Device)? {
            return Err(SendError::Device);
        }
        if offload.needs_csum || offload.gso != Gso::None {
            return Err(SendError::Offload);
        }
        if !link.up {
            return Err(SendError::LinkDown);
        }
        let len = frame.iter().map(|piece| piece.len()).fold(0, usize::saturating_add);
        match len {
            ..MIN_FRAME => return Err(SendError::TooShort),
            _ if len > usize::from(self.max_frame) => return Err(SendError::TooLong),
            _ => {}
        }
        let rings = self.rings.get_mut(index).ok_or(SendError::NoPort)?;
        let queue = &mut rings.transmit;
        let slot = queue.ring.next().ok_or(SendError::Full)?;
        let mut at = queue.at(slot);
        for piece in frame {
            queue.frames.write(at, piece).map_err(|_| SendError::Device)?;
            at += piece.len();
        }
        let message = fragment(queue.iova(slot), len as u16);
        match queue.ring.push(&message) {
            Ok(true) => Ok(()),
            Ok(false) => Err(SendError::Full),
            Err(_) => Err(SendError::Device),
        }
    }

    fn flush(&mut self) -> Result<(), NicError> {
        if self.is_usable()? {
            for rings in &mut self.rings {
                rings.transmit.ring.ring()?;
                Self::reap(rings)?;
            }
        }
        Ok(())
    }

    fn poll_events(&mut self, events: &mut Vec<PortEvent>) -> Result<(), NicError> {
        if self.is_usable()? {
            // What an event says is not looked at: the links are read anew, which no lost or made-up event can spoil.
            for _ in 0..EVENTS {
                if self.events.take()?.is_none() {
                    break;
                }
                self.events.push(&[])?;
            }
            self.events.ring()?;
            self.read_links()?;
        } else {
            for port in &mut self.ports {
                if std::mem::take(&mut port.link.up) {
                    self.pending.push(PortEvent::Link { number: port.number, link: port.link });
                }
            }
        }
        events.append(&mut self.pending);
        Ok(())
    }

    fn arm(&mut self) -> Result<bool, NicError> {
        if !self.is_usable()? {
            return Ok(true);
        }
        self.events.return_credits()?;
        let mut quiet = self.pending.is_empty() && !self.events.is_ready()?;
        for rings in &mut self.rings {
            rings.receive.ring.return_credits()?;
            quiet &= !rings.receive.ring.is_ready()?;
        }
        Ok(quiet)
    }

    fn interrupts(&self) -> Vec<BorrowedFd<'_>> {
        self.interrupts.iter().map(AsFd::as_fd).collect()
    }

    fn counters(&self, port: u32) -> Option<PortCounters> {
        Some(self.rings.get((port as usize).checked_sub(1)?)?.counters)
    }
}

#[cfg(test)]
mod tests {
    use super::super::tlv::Writer;
    use super::*;

    #[test]
    fn messages_on_the_stack_are_those_of_the_writer() {
        let mut writer = Writer::default();
        writer.nest(transmit::FRAGMENTS, |list| {
            list.nest(transmit::FRAGMENT, |one| {
                one.u64(transmit::ADDRESS, 0x1_2345_6789).u16(transmit::LEN, 1514);
            });
        });
        assert_eq!(writer.finish(), fragment(0x1_2345_6789, 1514));
    }

    #[test]
    fn completions_that_make_no_sense_are_refused() {
        let message = |len: u16| {
            let mut writer = Writer::default();
            writer.u16(receive::FLAGS, receive::FLAG_FORWARDED).u16(receive::LEN, len);
            writer.finish()
        };
        let completion = |len| Completion { slot: 0, error: 0, len };
        assert_eq!(received(&message(60), &completion(Some(32)), 1514), Ok((true, 60)));
        assert_eq!(
            received(&message(1515), &completion(Some(32)), 1514),
            Err(Malformed),
            "longer than the buffer"
        );
        assert_eq!(received(&message(13), &completion(Some(32)), 1514), Err(Malformed), "a runt");
        assert_eq!(
            received(&message(60), &completion(None), 1514),
            Err(Malformed),
            "longer than the message's buffer"
        );
        assert_eq!(received(&[], &completion(Some(0)), 1514), Err(Malformed));
    }
}
