//! A virtio network device (1af4:1041) as one packet port: QEMU's, or that of a card. Reference: virtio 1.2, §4.1 and §5.1.
//!
//! One pair of queues: a port is polled by one thread, which further pairs would not relieve. Buffers are not merged
//! (`MRG_RXBUF`), since each holds a frame; a longer frame is dropped by the device. The device may complete and segment
//! what it is to send; of what it hands over incomplete (`GUEST_CSUM`) the driver completes the checksum itself.

pub(crate) mod regs;
mod ring;
mod transport;

use std::hash::{BuildHasher, Hasher, RandomState};
use std::time::{Duration, Instant};

use rustix::fd::{AsFd, BorrowedFd, OwnedFd};
use switch_core::offload::{
    F_DATA_VALID, F_NEEDS_CSUM, GSO_ECN, GSO_NONE, GSO_TCPV4, GSO_TCPV6, finish_checksum,
};
use switch_core::packet::{Gso, Offload};

use crate::io::{Link, NicError, PacketIo, Port, PortCounters, PortEvent, Received, SendCaps, SendError};
use crate::layers::Head;
use crate::pci::{PciError, PciFunction};
use regs::{feature, net, status};
use ring::{Ring, Taken};
use transport::Transport;

/// Bytes of the header before each frame.
const HEADER: usize = 12;
const MIN_FRAME: usize = 14;
/// An Ethernet header with two tags, which an MTU does not count.
const LINK_HEADER: usize = 22;
/// The longest frame to be segmented: what IP can have, and its link header.
const MAX_SUPER: usize = 65_535 + LINK_HEADER;
/// Features that are taken, if the device offers them; see [`VirtioNet::negotiate`] for those with conditions.
const WANTED: u64 = feature::CSUM
    | feature::GUEST_CSUM
    | feature::MTU
    | feature::MAC
    | feature::HOST_TSO4
    | feature::HOST_TSO6
    | feature::HOST_ECN
    | feature::STATUS
    | feature::EVENT_IDX
    | feature::VERSION_1
    | feature::ACCESS_PLATFORM
    | feature::ORDER_PLATFORM
    | feature::SPEED_DUPLEX;
const RECEIVE: u16 = 0;
const TRANSMIT: u16 = 1;
/// Interrupt vectors: of the configuration, of the receive queue, of the transmit queue.
const VECTORS: u16 = 3;
/// How long a device that has failed is left alone.
const RETRY: Duration = Duration::from_millis(100);

/// Settings of a port.
#[derive(Clone, Debug)]
pub struct Config {
    /// Slots of each ring, if the device has as many: a power of two from 8 to 4096.
    pub ring: u16,
    /// The longest frame in bytes without FCS, from 64 to 9728.
    pub max_frame: u16,
    /// Take a device that does not offer `VIRTIO_F_ACCESS_PLATFORM`. It uses addresses as they are, past any IOMMU: right
    /// only if the transport has none, and a danger to all memory behind VFIO.
    pub untranslated: bool,
}

impl Default for Config {
    fn default() -> Config {
        Config { ring: 256, max_frame: 1522, untranslated: false }
    }
}

/// A port; see [`VirtioNet::open`].
#[derive(Debug)]
pub struct VirtioNet {
    function: Box<dyn PciFunction>,
    transport: Transport,
    config: Config,
    features: u64,
    /// The longest packet behind the link header, if the device says so.
    mtu: Option<usize>,
    port: [Port; 1],
    receive: Ring,
    transmit: Ring,
    interrupts: Vec<OwnedFd>,
    counters: PortCounters,
    frame: Vec<u8>,
    pending: Vec<PortEvent>,
    usable: bool,
    /// When the device was set up last, or that was tried.
    tried: Instant,
}

impl VirtioNet {
    /// Takes a port up: resets it, agrees on features, and starts its queues.
    pub fn open(mut function: Box<dyn PciFunction>, config: Config) -> Result<VirtioNet, NicError> {
        if !config.ring.is_power_of_two() || !(8..=4096).contains(&config.ring) {
            let what = format!("a ring of {} slots: not a power of two from 8 to 4096", config.ring);
            return Err(NicError::Config(what));
        }
        if !(64..=9728).contains(&config.max_frame) {
            return Err(NicError::Config(format!("a longest frame of {} bytes", config.max_frame)));
        }
        let (vendor, device) = function.id()?;
        if (vendor, device) != (regs::VENDOR, regs::DEVICE) {
            return Err(PciError::Foreign { vendor, device }.into());
        }
        function.set_bus_master(true)?;
        let transport = Transport::find(&mut *function)?;
        transport.reset()?;
        let buffer = (HEADER + usize::from(config.max_frame)).next_multiple_of(64);
        let mut ring = |index| {
            let most = transport.queue_size(index)?;
            // The device's size is a power of two too (virtio 1.2 §2.7), but that is its word.
            let size = if most == 0 { 0 } else { config.ring.min(1 << most.ilog2()) };
            if size < 8 {
                return Err(NicError::Device(format!("has {most} slots in queue {index}")));
            }
            Ok(Ring::new(&mut *function, size, buffer)?)
        };
        let (receive, transmit) = (ring(RECEIVE)?, ring(TRANSMIT)?);
        let interrupts = function.interrupts(VECTORS)?;
        let mac = RandomState::new().build_hasher().finish().to_le_bytes();
        let port = Port {
            number: 0,
            name: "virtio-net".into(),
            // Of a device that has none: random, for this host alone.
            mac: [2, mac[1], mac[2], mac[3], mac[4], mac[5]],
            max_frame: config.max_frame.into(),
            send: SendCaps::default(),
            tags: false,
            link: Link::default(),
        };
        let mut this = VirtioNet {
            function,
            transport,
            features: 0,
            mtu: None,
            port: [port],
            receive,
            transmit,
            interrupts,
            counters: PortCounters::default(),
            frame: Vec::with_capacity(config.max_frame.into()),
            pending: Vec::new(),
            usable: false,
            tried: Instant::now(),
            config,
        };
        this.set_up()?;
        this.pending.clear();
        Ok(this)
    }

    fn set_up(&mut self) -> Result<(), NicError> {
        // What was sent before counts as sent.
        self.reap()?;
        self.usable = false;
        self.tried = Instant::now();
        self.function.set_bus_master(true)?;
        self.transport.reset()?;
        self.transport.add_status(status::ACKNOWLEDGE)?;
        self.transport.add_status(status::DRIVER)?;
        self.negotiate()?;
        self.counters.tx_reset += u64::from(self.transmit.outstanding());
        let by_index = self.has(feature::EVENT_IDX);
        self.receive.start(by_index)?;
        self.transmit.start(by_index)?;
        self.transport.set_config_vector(0)?;
        self.transport.enable(RECEIVE, &mut self.receive, 1 + RECEIVE)?;
        self.transport.enable(TRANSMIT, &mut self.transmit, 1 + TRANSMIT)?;
        self.transport.add_status(status::DRIVER_OK)?;
        while self.receive.post()? {}
        self.receive.flush()?;
        self.usable = true;
        self.read_link()
    }

    fn has(&self, feature: u64) -> bool {
        self.features & feature == feature
    }

    /// Agrees on features and takes what follows from them.
    fn negotiate(&mut self) -> Result<(), NicError> {
        let offered = self.transport.offered()?;
        if offered & feature::VERSION_1 == 0 {
            return Err(NicError::Device("is not one of virtio 1.0 or later".into()));
        }
        if offered & feature::ACCESS_PLATFORM == 0 && !self.config.untranslated {
            let what = "does not offer VIRTIO_F_ACCESS_PLATFORM and would bypass the IOMMU (QEMU: iommu_platform=on)";
            return Err(NicError::Device(what.into()));
        }
        let mut features = offered & WANTED;
        let most = usize::from(self.config.max_frame);
        self.mtu = None;
        if offered & feature::MTU != 0 {
            let mtu = self.transport.configuration(|net| net.read16(net::MTU))?;
            if mtu < net::MIN_MTU {
                return Err(NicError::Device(format!("claims to have an MTU of {mtu}")));
            }
            // Who takes an MTU has room for all frames of it.
            if usize::from(mtu) + LINK_HEADER <= most {
                self.mtu = Some(mtu.into());
            } else {
                features &= !feature::MTU;
            }
        }
        if features & feature::CSUM == 0 {
            features &= !(feature::HOST_TSO4 | feature::HOST_TSO6 | feature::HOST_ECN);
        }
        self.transport.accept(features)?;
        self.features = features;
        let port = &mut self.port[0];
        port.max_frame = self.mtu.map_or(most, |mtu| mtu + LINK_HEADER);
        let tso = feature::HOST_TSO4 | feature::HOST_TSO6;
        port.send = SendCaps {
            checksum: features & feature::CSUM != 0,
            tso: features & tso == tso,
            ecn: features & feature::HOST_ECN != 0,
            max_super: if features & tso == tso { max_super(&self.transmit) } else { 0 },
        };
        if features & feature::MAC != 0 {
            port.mac = self.transport.configuration(|device| {
                let mut mac = [0; 6];
                for (at, byte) in (net::MAC..).zip(&mut mac) {
                    *byte = device.read8(at)?;
                }
                Ok(mac)
            })?;
        }
        Ok(())
    }

    fn read_link(&mut self) -> Result<(), NicError> {
        let (knows_state, knows_speed) = (self.has(feature::STATUS), self.has(feature::SPEED_DUPLEX));
        let link = self.transport.configuration(|device| {
            let up = !knows_state || device.read16(net::STATUS)? & net::LINK_UP != 0;
            // Speeds above what fits into 31 bits stand for "unknown".
            let speed = if knows_speed { device.read32(net::SPEED)? } else { 0 };
            Ok(Link { up, speed: if speed > i32::MAX as u32 { 0 } else { speed } })
        })?;
        if link != self.port[0].link {
            self.port[0].link = link;
            self.pending.push(PortEvent::Link { number: 0, link });
        }
        Ok(())
    }

    /// Takes up what the device has sent.
    fn reap(&mut self) -> Result<(), NicError> {
        self.transmit.disarm()?;
        for _ in 0..self.transmit.size() {
            match self.transmit.take()? {
                Taken::Nothing => break,
                Taken::Chain(head, _) => {
                    self.transmit.release(head);
                    self.counters.sent += 1;
                }
                Taken::Nonsense => {
                    self.usable = false;
                    break;
                }
            }
        }
        Ok(())
    }

    /// Takes one used receive buffer to `self.frame`.
    fn accept(&mut self, slot: u16, len: u32) -> Result<Result<Offload, Loss>, NicError> {
        let len = (len as usize).checked_sub(HEADER).filter(|&len| len >= MIN_FRAME);
        let Some(len) = len else { return Ok(Err(Loss::Error)) };
        if len > self.port[0].max_frame {
            return Ok(Err(Loss::TooLong));
        }
        let mut header = [0; HEADER];
        self.receive.read(slot, 0, &mut header)?;
        self.frame.clear();
        self.frame.resize(len, 0);
        self.receive.read(slot, HEADER, &mut self.frame)?;
        let may_lack = self.has(feature::GUEST_CSUM);
        Ok(complete(&header, &mut self.frame, may_lack))
    }

    /// The header for a frame, from its first bytes; `None` if the device cannot do what it asks for.
    fn header(&self, frame: &[&[u8]], len: usize, offload: &Offload) -> Option<[u8; HEADER]> {
        let mut header = [0; HEADER];
        if !offload.needs_csum {
            return (offload.gso == Gso::None).then_some(header);
        }
        let (start, field) = (offload.csum_start, offload.csum_offset);
        let inside = usize::from(start) >= MIN_FRAME && usize::from(start) + usize::from(field) + 2 <= len;
        if !self.port[0].send.checksum || !inside {
            return None;
        }
        header[0] = F_NEEDS_CSUM;
        header[6..8].copy_from_slice(&start.to_le_bytes());
        header[8..10].copy_from_slice(&field.to_le_bytes());
        if offload.gso != Gso::None {
            let layers = Head::new(frame).layers(len, offload)?;
            let segment = layers.payload + usize::from(offload.gso_size);
            let marked = offload.ecn && !self.has(feature::HOST_ECN);
            if !self.port[0].send.tso || segment > self.port[0].max_frame || marked {
                return None;
            }
            let kind = if layers.ipv4 { GSO_TCPV4 } else { GSO_TCPV6 };
            header[1] = kind | if offload.ecn { GSO_ECN } else { 0 };
            header[2..4].copy_from_slice(&(layers.payload as u16).to_le_bytes());
            header[4..6].copy_from_slice(&offload.gso_size.to_le_bytes());
        }
        Some(header)
    }

    /// The longest frame like this one: with an MTU, it depends on the tags.
    fn longest(&self, frame: &[&[u8]], offload: &Offload) -> usize {
        match (offload.gso, self.mtu) {
            (Gso::None, Some(mtu)) => Head::new(frame).network().map_or(0, |network| network + mtu),
            (Gso::None, None) => self.port[0].max_frame,
            _ => max_super(&self.transmit),
        }
    }
}

/// The longest frame to be segmented that fits into the ring.
fn max_super(transmit: &Ring) -> usize {
    MAX_SUPER.min(transmit.capacity() - HEADER)
}

/// Why a received frame is not handed over.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Loss {
    TooLong,
    Error,
}

/// Does what a received frame's header leaves to be done.
fn complete(header: &[u8; HEADER], frame: &mut [u8], may_lack: bool) -> Result<Offload, Loss> {
    let [flags, gso_type, _, _, _, _, a, b, c, d, ..] = *header;
    // No segmentation was agreed upon, nor anything at all without GUEST_CSUM.
    if gso_type != GSO_NONE || flags & F_NEEDS_CSUM != 0 && !may_lack {
        return Err(Loss::Error);
    }
    if flags & F_NEEDS_CSUM == 0 {
        return Ok(Offload { csum_valid: may_lack && flags & F_DATA_VALID != 0, ..Offload::default() });
    }
    let (csum_start, csum_offset) = (u16::from_le_bytes([a, b]), u16::from_le_bytes([c, d]));
    let partial = Offload { needs_csum: true, csum_start, csum_offset, ..Offload::default() };
    if usize::from(csum_start) < MIN_FRAME || finish_checksum(frame, &partial).is_err() {
        return Err(Loss::Error);
    }
    Ok(Offload::default())
}

impl PacketIo for VirtioNet {
    fn ports(&self) -> &[Port] {
        &self.port
    }

    fn receive(&mut self, budget: usize, each: &mut dyn FnMut(Received<'_>)) -> Result<usize, NicError> {
        if !self.usable {
            return Ok(0);
        }
        self.receive.disarm()?;
        let mut done = 0;
        for _ in 0..self.receive.size() {
            if done >= budget {
                break;
            }
            let (slot, len) = match self.receive.take()? {
                Taken::Nothing => break,
                Taken::Chain(slot, len) => (slot, len),
                Taken::Nonsense => {
                    self.counters.rx_error += 1;
                    self.usable = false;
                    break;
                }
            };
            match self.accept(slot, len)? {
                Ok(offload) => {
                    self.counters.received += 1;
                    done += 1;
                    each(Received { port: 0, frame: &self.frame, offload, forwarded: false, mark: 0 });
                }
                Err(Loss::TooLong) => self.counters.rx_too_long += 1,
                Err(Loss::Error) => self.counters.rx_error += 1,
            }
            self.receive.release(slot);
            self.receive.post()?;
        }
        if self.usable {
            self.receive.flush()?;
        }
        Ok(done)
    }

    fn send(&mut self, port: u32, frame: &[&[u8]], offload: &Offload) -> Result<(), SendError> {
        if port != 0 {
            return Err(SendError::NoPort);
        }
        if !self.usable {
            return Err(SendError::Device);
        }
        let len = frame.iter().map(|piece| piece.len()).fold(0, usize::saturating_add);
        match len {
            ..MIN_FRAME => return Err(SendError::TooShort),
            _ if len > self.longest(frame, offload) => return Err(SendError::TooLong),
            _ => {}
        }
        let header = self.header(frame, len, offload).ok_or(SendError::Offload)?;
        if !self.port[0].link.up {
            return Err(SendError::LinkDown);
        }
        let pieces = std::iter::once(&header[..]).chain(frame.iter().copied());
        match self.transmit.send(pieces, HEADER + len) {
            Ok(true) => Ok(()),
            Ok(false) => Err(SendError::Full),
            Err(_) => Err(SendError::Device),
        }
    }

    fn flush(&mut self) -> Result<(), NicError> {
        if self.usable {
            self.transmit.flush()?;
            self.reap()?;
        }
        Ok(())
    }

    fn poll_events(&mut self, events: &mut Vec<PortEvent>) -> Result<(), NicError> {
        let now = self.transport.status()?;
        if now == status::GONE {
            self.usable = false;
            return Err(NicError::Device("is gone".into()));
        }
        // Somebody else's reset takes DRIVER_OK away.
        self.usable &= now & (status::NEEDS_RESET | status::DRIVER_OK) == status::DRIVER_OK;
        if self.usable {
            self.read_link()?;
        } else if self.tried.elapsed() >= RETRY {
            let before = (self.port[0].send, self.port[0].max_frame);
            self.set_up()?;
            if (self.port[0].send, self.port[0].max_frame) != before {
                // Those who send go by what they were told when it was opened.
                self.usable = false;
                return Err(NicError::Device("offers something else than before its reset".into()));
            }
            self.pending.push(PortEvent::Reset);
        }
        events.append(&mut self.pending);
        Ok(())
    }

    fn arm(&mut self) -> Result<bool, NicError> {
        if !self.usable {
            return Ok(true);
        }
        let quiet = self.receive.arm()?;
        // Room is worth waking up for only where it has become rare.
        let crowded = self.transmit.free() < usize::from(self.transmit.size()) / 2;
        Ok(quiet & (!crowded || self.transmit.arm()?))
    }

    fn interrupts(&self) -> Vec<BorrowedFd<'_>> {
        self.interrupts.iter().map(AsFd::as_fd).collect()
    }

    fn counters(&self, port: u32) -> Option<PortCounters> {
        (port == 0).then_some(self.counters)
    }
}

impl Drop for VirtioNet {
    fn drop(&mut self) {
        // The device may be gone.
        let _ = self.transport.reset();
        let _ = self.function.set_bus_master(false);
    }
}

#[cfg(test)]
mod tests;
