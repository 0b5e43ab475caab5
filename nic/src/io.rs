//! Packet I/O: what a driver offers to whoever polls its ports.
//!
//! All of it is for one thread, allocates nothing per packet, and never waits.

use rustix::fd::BorrowedFd;
use switch_core::packet::{Gso, Offload};

use crate::layers::Head;
use crate::pci::{BadAccess, PciError};

/// Why a NIC cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum NicError {
    /// The way to the function.
    #[error(transparent)]
    Pci(#[from] PciError),
    /// The device does not do what it should.
    #[error("the device {0}")]
    Device(String),
    /// A setting that this device cannot have.
    #[error("{0}")]
    Config(String),
}

impl From<BadAccess> for NicError {
    fn from(bad: BadAccess) -> NicError {
        NicError::Pci(bad.into())
    }
}

/// State of a link.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Link {
    /// Whether frames can pass.
    pub up: bool,
    /// Speed in Mbit/s; 0 if it is unknown.
    pub speed: u32,
}

/// What a port can do for a frame that is to be sent.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct SendCaps {
    /// Completes a TCP or UDP checksum ([`Offload::needs_csum`]).
    pub checksum: bool,
    /// Segments TCP over IPv4 and IPv6; this needs `checksum`.
    pub tso: bool,
    /// Segments TCP that carries congestion marks ([`Offload::ecn`]).
    pub ecn: bool,
    /// The longest frame to be segmented, in bytes without FCS.
    pub max_super: usize,
}

/// A port of a NIC.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Port {
    /// Its number, by which frames and flows name it.
    pub number: u32,
    /// Its name, as the device gives it.
    pub name: String,
    /// Its own MAC address.
    pub mac: [u8; 6],
    /// The longest frame in bytes, without FCS, that can be received, or sent unsegmented.
    pub max_frame: usize,
    /// What it can do for a frame.
    pub send: SendCaps,
    /// Whether the device takes the outer tag of 802.1Q off a frame that comes in, and puts it on one that leaves. Frames are
    /// handed over, and taken, with their tags inside all the same: it is for the driver to copy around them.
    pub tags: bool,
    /// Its link.
    pub link: Link,
}

impl Port {
    /// Whether the port does what `offload` asks for a frame of `len` bytes, whose first bytes, 192 if it has as many, are in
    /// these pieces. Of such a frame [`PacketIo::send`] does not say [`SendError::Offload`].
    pub fn does(&self, offload: &Offload, frame: &[&[u8]], len: usize) -> bool {
        if !offload.needs_csum {
            return offload.gso == Gso::None;
        }
        let SendCaps { checksum, tso, ecn, max_super } = self.send;
        let may = match offload.gso {
            Gso::None => checksum,
            _ => checksum && tso && (ecn || !offload.ecn) && len <= max_super,
        };
        let fits = |payload: usize| match offload.gso {
            Gso::None => true,
            _ => payload + usize::from(offload.gso_size) <= self.max_frame,
        };
        may && Head::new(frame).layers(len, offload).is_some_and(|layers| fits(layers.payload))
    }
}

/// A frame that has come in. The bytes are private memory: the device cannot change them any more.
#[derive(Clone, Copy, Debug)]
pub struct Received<'f> {
    /// Number of the port that it came in by.
    pub port: u32,
    /// All bytes, without FCS.
    pub frame: &'f [u8],
    /// Checksum state. Nothing is left to be completed or segmented.
    pub offload: Offload,
    /// The device has forwarded the frame already; this is a copy.
    pub forwarded: bool,
    /// What steering put the frame into: the queue, or the mark of a rule.
    pub mark: u32,
}

/// Why a frame was not taken. The frame is the caller's still, to be counted or tried again.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, thiserror::Error)]
pub enum SendError {
    /// No room; try again after [`PacketIo::flush`].
    #[error("the transmit ring is full")]
    Full,
    /// Longer than the port sends.
    #[error("the frame is too long")]
    TooLong,
    /// Shorter than an Ethernet header.
    #[error("the frame is too short")]
    TooShort,
    /// It needs an offload that the port lacks, or one whose description makes no sense.
    #[error("the frame needs an offload that the port does not have")]
    Offload,
    /// There is no such port.
    #[error("no such port")]
    NoPort,
    /// The link is down.
    #[error("the link is down")]
    LinkDown,
    /// The device is being reset, or gone.
    #[error("the device is not usable")]
    Device,
}

/// A rule of steering: frames for a station come to a queue.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub struct Steering {
    /// Destination address, of one station.
    pub mac: [u8; 6],
    /// VLAN id; 0 is "untagged". `None`: those for which there is no rule with an id.
    pub vid: Option<u16>,
    /// The queue, counted from 0.
    pub queue: u8,
}

/// Something that happened to a port.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum PortEvent {
    /// The link of port `number` has changed.
    Link {
        /// The port.
        number: u32,
        /// Its link now.
        link: Link,
    },
    /// The device was reset: what was in its rings is lost.
    Reset,
}

/// What has passed a port since it was opened. Each frame that the device gave or took is counted once.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct PortCounters {
    /// Frames handed to the receiver.
    pub received: u64,
    /// Frames that the device has sent.
    pub sent: u64,
    /// Drop: received frames longer than a buffer.
    pub rx_too_long: u64,
    /// Drop: completions of the device that make no sense, or that say that receiving failed.
    pub rx_error: u64,
    /// Drop: frames that the device could not send.
    pub tx_error: u64,
    /// Drop: frames that were in a transmit ring when the device was reset.
    pub tx_reset: u64,
}

/// A NIC's ports, for one thread.
pub trait PacketIo: Send {
    /// The ports; they do not come and go.
    fn ports(&self) -> &[Port];

    /// Gives up to `budget` frames to `each`, from all ports in turn, and returns how many.
    fn receive(&mut self, budget: usize, each: &mut dyn FnMut(Received<'_>)) -> Result<usize, NicError>;

    /// Takes one frame, given in pieces, to be sent by a port. It may lie in the ring until [`PacketIo::flush`].
    fn send(&mut self, port: u32, frame: &[&[u8]], offload: &Offload) -> Result<(), SendError>;

    /// Lets the device send what it was given, and takes up what it has finished.
    fn flush(&mut self) -> Result<(), NicError>;

    /// Appends what happened to the ports. To be called now and then, and when an interrupt came.
    fn poll_events(&mut self, events: &mut Vec<PortEvent>) -> Result<(), NicError>;

    /// Asks for an interrupt when something happens. `false`: something has happened already, poll on.
    ///
    /// An interrupt may be lost, so a sleeper looks again after a while even without one.
    fn arm(&mut self) -> Result<bool, NicError>;

    /// The eventfds to wait for after [`PacketIo::arm`]. Each is to be read once it is readable.
    fn interrupts(&self) -> Vec<BorrowedFd<'_>>;

    /// What has passed the port.
    fn counters(&self, port: u32) -> Option<PortCounters>;

    /// Receive queues of each port: more than one if the device can be [told](Self::set_steering) what comes to which, and was
    /// opened so. The queue is [`Received::mark`].
    fn queues(&self) -> u8 {
        1
    }

    /// Has frames for stations come to queues of a port, by these rules and no others. It takes as many as there is room for, the
    /// first ones first, and gives their number. All else comes to the first queue, and while rules change, so may these.
    fn set_steering(&mut self, port: u32, rules: &[Steering]) -> Result<usize, NicError> {
        let _ = (port, rules);
        Ok(0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_port_does_what_its_device_can() {
        let send = SendCaps { checksum: true, tso: true, ecn: false, max_super: 3000 };
        let link = Link::default();
        let port =
            Port { number: 1, name: String::new(), mac: [0; 6], max_frame: 1522, send, tags: false, link };
        let mut frame = vec![2; 12];
        frame.extend([0x08, 0x00, 0x45, 0, 0, 60, 0, 0, 0x40, 0, 64, 6, 0, 0, 10, 0, 0, 1, 10, 0, 0, 2]);
        frame.extend([0; 40]);
        frame[46] = 0x50;
        let does =
            |port: &Port, offload: &Offload, len| port.does(offload, &[&frame[..20], &frame[20..]], len);
        let sum = Offload { needs_csum: true, csum_start: 34, csum_offset: 16, ..Offload::default() };
        let cut = Offload { gso: Gso::Tcp4, gso_size: 1400, ..sum };
        assert!(does(&port, &Offload::default(), 74) && does(&port, &sum, 74));
        assert!(does(&port, &cut, 3000) && !does(&port, &cut, 3001), "as long as it may be");
        let longest = 1522 - 54;
        assert!(
            does(&port, &Offload { gso_size: longest, ..cut }, 3000),
            "segments as long as frames may be"
        );
        for lie in [
            Offload { gso_size: longest + 1, ..cut },
            Offload { ecn: true, ..cut },
            Offload { gso: Gso::Tcp6, ..cut },
            Offload { gso: Gso::UdpL4, ..cut },
            Offload { needs_csum: false, ..cut },
            Offload { csum_start: 35, ..sum },
        ] {
            assert!(!does(&port, &lie, 3000), "{lie:?}");
        }
        let of = |send| Port { send, ..port.clone() };
        assert!(does(&of(SendCaps { ecn: true, ..send }), &Offload { ecn: true, ..cut }, 3000));
        assert!(!does(&of(SendCaps { tso: false, ..send }), &cut, 3000));
        let none = of(SendCaps::default());
        assert!(!does(&none, &sum, 74) && !does(&none, &cut, 3000) && does(&none, &Offload::default(), 74));
    }
}
