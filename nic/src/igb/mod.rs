//! Intel 82576 (QEMU's `igb`) as one packet port: a receive and a transmit ring, MSI-X, link, checksums.
//!
//! All frames are received, whatever their address. Reference: Intel 82576EB Gigabit Ethernet Controller Datasheet.

pub(crate) mod regs;

use std::time::{Duration, Instant};

use rustix::fd::{AsFd, BorrowedFd, OwnedFd};
use switch_core::packet::{Gso, Offload};

use crate::io::{Link, NicError, PacketIo, Port, PortCounters, PortEvent, Received, SendCaps, SendError};
use crate::pci::{Bar, DmaMemory, PciError, PciFunction};

/// Bytes of a descriptor: two words of 64 bits.
const DESCRIPTOR: usize = 16;
/// Vector of the rings, and of everything else.
const VECTORS: u32 = 0b11;
const MIN_FRAME: usize = 14;
/// How long the device may take for what it does at the start.
const PATIENCE: Duration = Duration::from_secs(1);

/// Settings of a port.
#[derive(Clone, Debug)]
pub struct Config {
    /// Slots of each ring: a power of two from 8 to 4096.
    pub ring: u32,
    /// The longest frame in bytes without FCS, from 64 to 9728.
    pub max_frame: u16,
}

impl Default for Config {
    fn default() -> Config {
        Config { ring: 256, max_frame: 1522 }
    }
}

/// A ring and a buffer for each of its slots. Slots from `tail` up to `head` are the device's.
#[derive(Debug)]
struct Ring {
    descriptors: DmaMemory,
    buffers: DmaMemory,
    buffer: usize,
    mask: u32,
    head: u32,
    tail: u32,
    rung: u32,
    /// First register.
    base: u64,
}

impl Ring {
    fn new(function: &mut dyn PciFunction, base: u64, size: u32, buffer: usize) -> Result<Ring, PciError> {
        let descriptors = function.dma_alloc(size as usize * DESCRIPTOR)?;
        let buffers = function.dma_alloc(size as usize * buffer)?;
        Ok(Ring { descriptors, buffers, buffer, mask: size - 1, head: 0, tail: 0, rung: 0, base })
    }

    /// Gives the empty ring to the device and waits until it has it.
    fn start(&mut self, bar: &Bar) -> Result<(), NicError> {
        (self.head, self.tail, self.rung) = (0, 0, 0);
        self.descriptors.clear()?;
        let iova = self.descriptors.iova();
        bar.write32(self.base, iova as u32)?;
        bar.write32(self.base + regs::QUEUE_HIGH, (iova >> 32) as u32)?;
        bar.write32(self.base + regs::QUEUE_LEN, self.descriptors.len() as u32)?;
        bar.write32(self.base + regs::QUEUE_HEAD, 0)?;
        bar.write32(self.base + regs::QUEUE_TAIL, 0)?;
        let control = self.base + regs::QUEUE_CONTROL;
        bar.write32(control, bar.read32(control)? | regs::QUEUE_ENABLE)?;
        wait("does not enable a queue", || Ok(bar.read32(control)? & regs::QUEUE_ENABLE != 0))
    }

    /// Whether the device still has the ring.
    fn is_known(&self, bar: &Bar) -> Result<bool, PciError> {
        let len = bar.read32(self.base + regs::QUEUE_LEN)?;
        Ok(bar.read32(self.base)? == self.descriptors.iova() as u32 && len as usize == self.descriptors.len())
    }

    fn outstanding(&self) -> u32 {
        self.head.wrapping_sub(self.tail) & self.mask
    }

    /// Free slots; one is always left, as a full ring would look empty.
    fn free(&self) -> u32 {
        self.mask - self.outstanding()
    }

    fn at(&self, slot: u32) -> usize {
        slot as usize * self.buffer
    }

    /// Fills the next slot's descriptor; there must be a free one.
    fn push(&mut self, low: u64, high: u64) -> Result<(), NicError> {
        let at = self.head as usize * DESCRIPTOR;
        self.descriptors.store_u64(at, low)?;
        self.descriptors.store_u64(at + 8, high)?;
        self.head = (self.head + 1) & self.mask;
        Ok(())
    }

    fn ring(&mut self, bar: &Bar) -> Result<(), NicError> {
        if self.rung != self.head {
            bar.write32(self.base + regs::QUEUE_TAIL, self.head)?;
            self.rung = self.head;
        }
        Ok(())
    }

    /// The second word of the oldest slot that the device has.
    fn oldest(&self) -> Result<Option<u64>, NicError> {
        if self.tail == self.rung {
            return Ok(None);
        }
        Ok(Some(self.descriptors.load_u64(self.tail as usize * DESCRIPTOR + 8)?))
    }
}

fn wait(what: &str, mut done: impl FnMut() -> Result<bool, NicError>) -> Result<(), NicError> {
    let deadline = Instant::now() + PATIENCE;
    while !done()? {
        if Instant::now() >= deadline {
            return Err(NicError::Device(what.into()));
        }
        std::thread::yield_now();
    }
    Ok(())
}

/// A port; see [`Igb::open`].
#[derive(Debug)]
pub struct Igb {
    function: Box<dyn PciFunction>,
    bar: Bar,
    port: [Port; 1],
    receive: Ring,
    transmit: Ring,
    /// Which transmit slots are contexts: the device may write over what says so.
    contexts: Vec<bool>,
    interrupts: Vec<OwnedFd>,
    counters: PortCounters,
    frame: Vec<u8>,
    /// The rest of a frame that is longer than a buffer is being thrown away.
    skipping: bool,
    pending: Vec<PortEvent>,
    usable: bool,
}

impl Igb {
    /// Takes a port up: resets it, starts its rings and its link, which comes up later.
    pub fn open(mut function: Box<dyn PciFunction>, config: Config) -> Result<Igb, NicError> {
        if !config.ring.is_power_of_two() || !(8..=4096).contains(&config.ring) {
            let what = format!("a ring of {} slots: not a power of two from 8 to 4096", config.ring);
            return Err(NicError::Config(what));
        }
        if !(64..=9728).contains(&config.max_frame) {
            return Err(NicError::Config(format!("a longest frame of {} bytes", config.max_frame)));
        }
        let (vendor, device) = function.id()?;
        if vendor != regs::VENDOR || !regs::DEVICES.contains(&device) {
            return Err(PciError::Foreign { vendor, device }.into());
        }
        function.set_bus_master(true)?;
        let bar = function.bar(0)?;
        // The device knows receive buffers in KiB.
        let buffer = usize::from(config.max_frame).next_multiple_of(1024);
        let receive = Ring::new(&mut *function, regs::RDBAL, config.ring, buffer)?;
        let transmit = Ring::new(&mut *function, regs::TDBAL, config.ring, buffer)?;
        let interrupts = function.interrupts(VECTORS.count_ones() as u16)?;
        let port = Port {
            number: 0,
            name: "igb".into(),
            mac: [0; 6],
            max_frame: config.max_frame.into(),
            send: SendCaps { checksum: true, tso: false },
            link: Link { up: false, speed: 1000 },
        };
        let mut igb = Igb {
            function,
            bar,
            port: [port],
            receive,
            transmit,
            contexts: vec![false; config.ring as usize],
            interrupts,
            counters: PortCounters::default(),
            frame: Vec::with_capacity(config.max_frame.into()),
            skipping: false,
            pending: Vec::new(),
            usable: false,
        };
        igb.set_up()?;
        Ok(igb)
    }

    fn set_up(&mut self) -> Result<(), NicError> {
        self.usable = false;
        self.skipping = false;
        self.counters.tx_reset += u64::from(self.transmit.outstanding());
        self.function.set_bus_master(true)?;
        let bar = self.bar.clone();
        bar.write32(regs::EIMC, u32::MAX)?;
        bar.write32(regs::IMC, u32::MAX)?;
        bar.write32(regs::CTRL, bar.read32(regs::CTRL)? | regs::CTRL_RST)?;
        wait("does not come out of reset", || Ok(bar.read32(regs::CTRL)? & regs::CTRL_RST == 0))?;
        bar.write32(regs::EIMC, u32::MAX)?;
        bar.write32(regs::IMC, u32::MAX)?;
        let (low, high) = (bar.read32(regs::RAL0)?, bar.read32(regs::RAH0)?);
        let ([a, b, c, d], [e, f, ..]) = (low.to_le_bytes(), high.to_le_bytes());
        self.port[0].mac = [a, b, c, d, e, f];
        bar.write32(regs::CTRL_EXT, bar.read32(regs::CTRL_EXT)? | regs::CTRL_EXT_DRV_LOAD)?;
        bar.write32(regs::CTRL, bar.read32(regs::CTRL)? | regs::CTRL_SLU)?;
        bar.write32(regs::MDIC, regs::MDIC_AUTONEGOTIATE)?;
        wait("does not reach its PHY", || Ok(bar.read32(regs::MDIC)? & regs::MDIC_READY != 0))?;
        bar.write32(regs::GPIE, regs::GPIE_MSIX)?;
        bar.write32(regs::EIAC, VECTORS)?;
        bar.write32(regs::EIAM, VECTORS)?;
        // Valid, vector 0: receive queue 0. Valid, vector 1: other causes, in the second byte.
        bar.write32(regs::IVAR0, 0x80)?;
        bar.write32(regs::IVAR_MISC, 0x81 << 8)?;
        bar.write32(regs::IMS, regs::CAUSE_LINK)?;
        bar.write32(regs::MRQC, 0)?;
        bar.write32(regs::RXCSUM, regs::RXCSUM_ON)?;
        // A tag or two and the FCS count too.
        bar.write32(regs::RLPML, self.port[0].max_frame as u32 + 4)?;
        bar.write32(regs::SRRCTL, (self.receive.buffer >> 10) as u32 | regs::SRRCTL_ONE_BUFFER)?;
        self.receive.start(&bar)?;
        self.transmit.start(&bar)?;
        bar.write32(regs::TCTL, bar.read32(regs::TCTL)? | regs::TCTL_ON)?;
        bar.write32(regs::RCTL, regs::RCTL_ON)?;
        while self.receive.free() > 0 {
            self.post()?;
        }
        self.receive.ring(&bar)?;
        self.usable = true;
        Ok(())
    }

    fn post(&mut self) -> Result<(), NicError> {
        let slot = self.receive.head;
        let address = self.receive.buffers.iova() + self.receive.at(slot) as u64;
        self.receive.push(address, 0)
    }

    /// Notes what the next transmit slot holds.
    fn mark(&mut self, context: bool) {
        if let Some(mark) = self.contexts.get_mut(self.transmit.head as usize) {
            *mark = context;
        }
    }

    /// Takes up what the device has sent.
    fn reap(&mut self) -> Result<(), NicError> {
        /// Descriptor done; the device writes it over the upper word of data descriptors, and of no others.
        const DONE: u64 = 1 << 32;
        loop {
            let Some(word) = self.transmit.oldest()? else { return Ok(()) };
            let slot = self.transmit.tail;
            if self.contexts.get(slot as usize).copied().unwrap_or(false) {
                // It is done when the frame behind it is.
                let next = (slot + 1) & self.transmit.mask;
                if next == self.transmit.rung {
                    return Ok(());
                }
                let data = self.transmit.descriptors.load_u64(next as usize * DESCRIPTOR + 8)?;
                if data & DONE == 0 {
                    return Ok(());
                }
                self.transmit.tail = next;
            } else if word & DONE == 0 {
                return Ok(());
            }
            self.transmit.tail = (self.transmit.tail + 1) & self.transmit.mask;
            self.counters.sent += 1;
        }
    }
}

/// Descriptor extension, in command words.
const DEXT: u64 = 1 << 29;
/// A context descriptor.
const CONTEXT_MARK: u64 = DEXT | 2 << 20;
/// A data descriptor: FCS inserted, end of packet, to be reported when done.
const DATA: u64 = DEXT | 3 << 20 | 1 << 25 | 1 << 24 | 1 << 27;
/// Data descriptor: insert the checksum that the context before it describes.
const INSERT_CHECKSUM: u64 = 1 << (32 + 9) | 1 << (32 + 7);

/// The two words of the context for a frame's checksum, from its first bytes; `None` if the device cannot do it.
fn context(head: &[u8], offload: &Offload) -> Option<(u64, u64)> {
    let at16 = |at: usize| Some(u16::from_be_bytes([*head.get(at)?, *head.get(at + 1)?]));
    let mut network = 12;
    while [0x8100, 0x88a8].contains(&at16(network)?) {
        network += 4;
    }
    let ipv4 = match at16(network)? {
        0x0800 => 1 << 10,
        0x86dd => 0,
        _ => return None,
    };
    network += 2;
    // The device finds the checksum's place by protocol.
    let protocol = match offload.csum_offset {
        16 => 1 << 11,
        6 => 0,
        _ => return None,
    };
    let header =
        usize::from(offload.csum_start).checked_sub(network).filter(|len| (20..512).contains(len))?;
    Some(((network as u64) << 9 | header as u64, CONTEXT_MARK | ipv4 | protocol))
}

impl PacketIo for Igb {
    fn ports(&self) -> &[Port] {
        &self.port
    }

    fn receive(&mut self, budget: usize, each: &mut dyn FnMut(Received<'_>)) -> Result<usize, NicError> {
        if !self.usable {
            return Ok(0);
        }
        let mut done = 0;
        for _ in 0..=self.receive.mask {
            if done >= budget {
                break;
            }
            let Some(word) = self.receive.oldest()?.filter(|word| word & 1 != 0) else { break };
            let slot = self.receive.tail;
            self.receive.tail = (slot + 1) & self.receive.mask;
            let len = (word >> 32) as u16 as usize;
            let (is_last, failed) = (word & 1 << 1 != 0, word & 1 << 31 != 0);
            let was_skipping = std::mem::replace(&mut self.skipping, !is_last);
            if was_skipping {
                // Counted when it began.
            } else if !is_last || len > self.port[0].max_frame {
                self.counters.rx_too_long += 1;
            } else if failed || len < MIN_FRAME {
                self.counters.rx_error += 1;
            } else {
                self.frame.clear();
                self.frame.resize(len, 0);
                self.receive.buffers.read(self.receive.at(slot), &mut self.frame)?;
                self.counters.received += 1;
                done += 1;
                // The device has looked at the transport checksum (bit 5) and has not found it wrong (bit 29).
                let offload =
                    Offload { csum_valid: word & (1 << 5 | 1 << 29) == 1 << 5, ..Offload::default() };
                each(Received { port: 0, frame: &self.frame, offload, forwarded: false, mark: 0 });
            }
            self.post()?;
        }
        self.receive.ring(&self.bar)?;
        Ok(done)
    }

    fn send(&mut self, port: u32, frame: &[&[u8]], offload: &Offload) -> Result<(), SendError> {
        if port != 0 {
            return Err(SendError::NoPort);
        }
        if !self.usable {
            return Err(SendError::Device);
        }
        if offload.gso != Gso::None {
            return Err(SendError::Offload);
        }
        if !self.port[0].link.up {
            return Err(SendError::LinkDown);
        }
        let len = frame.iter().map(|piece| piece.len()).fold(0, usize::saturating_add);
        match len {
            ..MIN_FRAME => return Err(SendError::TooShort),
            _ if len > self.port[0].max_frame => return Err(SendError::TooLong),
            _ => {}
        }
        let context = if offload.needs_csum {
            let mut head = [0; 32];
            for (to, from) in head.iter_mut().zip(frame.iter().flat_map(|piece| piece.iter())) {
                *to = *from;
            }
            let head = head.get(..len.min(32)).unwrap_or_default();
            let fits = usize::from(offload.csum_start) + usize::from(offload.csum_offset) + 2 <= len;
            Some(context(head, offload).filter(|_| fits).ok_or(SendError::Offload)?)
        } else {
            None
        };
        if self.transmit.free() < 1 + u32::from(context.is_some()) {
            return Err(SendError::Full);
        }
        let broken = |_| SendError::Device;
        let mut flags = 0;
        if let Some((low, high)) = context {
            self.mark(true);
            self.transmit.push(low, high).map_err(broken)?;
            flags = INSERT_CHECKSUM;
        }
        let mut at = self.transmit.at(self.transmit.head);
        let address = self.transmit.buffers.iova() + at as u64;
        for piece in frame {
            self.transmit.buffers.write(at, piece).map_err(|_| SendError::Device)?;
            at += piece.len();
        }
        self.mark(false);
        let high = (len as u64) << (32 + 14) | flags | DATA | len as u64;
        self.transmit.push(address, high).map_err(broken)
    }

    fn flush(&mut self) -> Result<(), NicError> {
        if self.usable {
            self.transmit.ring(&self.bar)?;
            self.reap()?;
        }
        Ok(())
    }

    fn poll_events(&mut self, events: &mut Vec<PortEvent>) -> Result<(), NicError> {
        // All ones are a device that is gone.
        if self.bar.read32(regs::STATUS)? == u32::MAX {
            self.usable = false;
            return Err(NicError::Device("is gone".into()));
        }
        // A reset by somebody else makes the device forget its rings.
        if !self.usable || !self.receive.is_known(&self.bar)? {
            self.set_up()?;
            self.pending.push(PortEvent::Reset);
        }
        let status = self.bar.read32(regs::STATUS)?;
        let link = Link { up: status & regs::STATUS_LU != 0, ..self.port[0].link };
        if link != self.port[0].link {
            self.port[0].link = link;
            self.pending.push(PortEvent::Link { number: 0, link });
        }
        events.append(&mut self.pending);
        Ok(())
    }

    fn arm(&mut self) -> Result<bool, NicError> {
        // Reading takes the cause away, so that the next one is seen.
        let causes = self.bar.read32(regs::ICR)?;
        self.bar.write32(regs::EIMS, VECTORS)?;
        let waiting = self.receive.oldest()?.is_some_and(|word| word & 1 != 0);
        Ok(!waiting && causes & regs::CAUSE_LINK == 0)
    }

    fn interrupts(&self) -> Vec<BorrowedFd<'_>> {
        self.interrupts.iter().map(AsFd::as_fd).collect()
    }

    fn counters(&self, port: u32) -> Option<PortCounters> {
        (port == 0).then_some(self.counters)
    }
}

impl Drop for Igb {
    fn drop(&mut self) {
        // The device may be gone.
        let _ = self.bar.write32(regs::EIMC, u32::MAX);
        let _ = self.bar.write32(regs::CTRL, regs::CTRL_RST);
        let _ = self.function.set_bus_master(false);
    }
}

#[cfg(test)]
mod tests;
