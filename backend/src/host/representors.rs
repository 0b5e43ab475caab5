//! Open vSwitch as the host: each port has a representor in OVS's bridge, and packets are written to and read from those.
//!
//! Up, a packet goes to the TAP of its ingress port; OVS decides about it as if the guest sat there. Down, what OVS outputs
//! on a port's TAP goes to that port's guest without another lookup. What flows OVS makes of it all comes another way.
//!
//! The kernel datapath takes segments of 64 KiB and partial checksums whole. The userspace datapath reads TAPs by packet
//! sockets and takes whole frames only, and nothing there keeps the host's own stack from answering, so that gets nothing.
//!
//! A wire whose device is OVS's own port has no TAP: up, its packets are handed to the kernel's datapath by netlink, and what
//! OVS outputs on the device the kernel sends.

mod back;
pub mod down;
#[cfg(test)]
mod tests;

use super::tap::{Tap, TapConfig};
use super::{Decision, FlowTable, Host, HostError, HostPort, Millis, Served};
use crate::frames::outgoing::{Outgoing, Tail};
use crate::frames::software::{self, Software};
use crate::ovs::mirror::Misses;
use crate::virtio::NetHeader;
use crate::wake::Waker;
use crate::worker::MAX_PORTS;
use back::Back;
use down::{Down, DownLink};
use log::{info, warn};
use rustix::io::Errno;
use std::collections::VecDeque;
use std::sync::Arc;
use switch_core::drop::DropReason;
use switch_core::key::Key;
use switch_core::offload;
use switch_core::packet::{MAX_FRAME, MAX_SNAPSHOT, Offload, Packet, PortId};
use switch_core::parse::{Extracted, extract};

/// Frames read from one TAP before it is another's turn.
const READS: usize = 16;

/// Which of OVS's datapaths the representors are for.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Settings {
    /// OVS's userspace datapath (`datapath_type=netdev`), and not the kernel's.
    pub userspace: bool,
    /// Whether it takes segments of 64 KiB and partial checksums: the kernel's does, the userspace one with
    /// `userspace-tso-enable` only.
    pub offloads: bool,
}

/// Ticks during which a new TAP that goes down is brought up again. OVS, when it takes up a device, reads its flags and writes
/// them back a moment later with one more (`SIOCSIFFLAGS`), which undoes what we set in between. Later it is a person who does it.
const SETTLING: u8 = 10;

/// A port's representor.
struct Representor {
    port: HostPort,
    /// `None` from when the device was found to be gone until it is made again, and for a port that is a device itself.
    tap: Option<Tap>,
    /// Ticks until its flags are left alone.
    settling: u8,
    /// Whether its guest is there.
    up: bool,
    /// Whether it is among those to be read.
    listed: bool,
    /// Why the last packet of a device was lost on its way back, if it was.
    lost: Option<String>,
}

/// The host that asks Open vSwitch.
pub struct Representors {
    settings: Settings,
    waker: Arc<Waker>,
    misses: Arc<Misses>,
    down: Down,
    /// By slot.
    ports: Vec<Option<Representor>>,
    /// Slots whose TAP may have frames, in turn.
    readable: VecDeque<u32>,
    software: Software,
    back: Back,
    /// Where frames are read to.
    frame: Box<[u8]>,
}

impl Representor {
    /// Brings a new TAP up again that OVS has taken down by chance; gives whether it had.
    fn raise(&self) -> bool {
        let Some(tap) = self.tap.as_ref().filter(|_| self.settling > 0) else { return false };
        tap.raise().unwrap_or_else(|error| {
            warn!("TAP '{}' cannot be brought up: {error}", tap.name());
            false
        })
    }
}

/// How far a TAP was read.
enum Read {
    Empty,
    More,
    Short,
}

impl Representors {
    /// Without ports. `down` are the queues to the workers, `waker` is what the host-path thread sleeps on.
    /// `misses` hears of packets that missed.
    pub fn new(
        settings: Settings,
        down: Vec<DownLink>,
        waker: Arc<Waker>,
        misses: Arc<Misses>,
    ) -> Representors {
        Representors {
            settings,
            waker,
            misses,
            down: Down::new(down),
            ports: (0..MAX_PORTS).map(|_| None).collect(),
            readable: VecDeque::with_capacity(MAX_PORTS),
            software: Software::default(),
            back: Back::default(),
            // One byte more than is valid, to see that a frame was longer.
            frame: vec![0; MAX_FRAME as usize + 1].into(),
        }
    }

    fn port(&mut self, id: PortId) -> Option<&mut Representor> {
        self.ports.get_mut(id.slot as usize)?.as_mut().filter(|representor| representor.port.id == id)
    }

    fn open(&self, port: &HostPort) -> Result<Tap, HostError> {
        let Settings { userspace, offloads } = self.settings;
        let config = TapConfig { offloads, silenced: userspace, mtu: port.mtu };
        let tap = Tap::open(&port.name, config).map_err(|error| HostError(error.to_string()))?;
        let watched = self.waker.watch(&tap, port.id.slot);
        watched.map_err(|error| HostError(format!("TAP '{}' cannot be watched: {error}", port.name)))?;
        Ok(tap)
    }

    /// Makes the TAPs again that somebody has deleted; OVS takes up a port whose device comes back.
    fn reopen(&mut self) {
        for slot in 0..self.ports.len() {
            let Some(Representor { port, tap: None, up, .. }) = &self.ports[slot] else { continue };
            if port.is_device {
                continue;
            }
            let up = *up;
            let Ok(tap) = self.open(port) else { continue };
            info!("TAP '{}' is opened again", tap.name());
            set_carrier(&tap, up);
            if let Some(representor) = &mut self.ports[slot] {
                representor.tap = Some(tap);
                representor.settling = SETTLING;
            }
        }
    }

    /// Reads a few frames from the TAP in `slot` and sends them to the port's workers.
    fn read(&mut self, slot: u32) -> Read {
        let Some(Some(Representor { port, tap: Some(tap), .. })) = self.ports.get(slot as usize) else {
            return Read::Empty;
        };
        for _ in 0..READS {
            if !self.down.has_room(slot) {
                return Read::Short;
            }
            match tap.read(&mut self.frame) {
                Ok(Some((header, len))) => {
                    descend(&mut self.down, port, &header, &mut self.frame[..len]);
                }
                Ok(None) | Err(Errno::IO) => return Read::Empty,
                Err(error) => {
                    lose(&mut self.ports[slot as usize], error);
                    return Read::Empty;
                }
            }
        }
        Read::More
    }
}

/// Forgets a TAP that no longer works, until it is made again.
fn lose(representor: &mut Option<Representor>, error: Errno) {
    if let Some(Representor { port, tap, .. }) = representor
        && tap.take().is_some()
    {
        warn!("TAP '{}' is gone ({error}); trying to make it again", port.name);
    }
}

fn set_carrier(tap: &Tap, up: bool) {
    if let Err(error) = tap.set_carrier(up) {
        warn!("TAP '{}': OVS is not told whether its guest is there: {error}", tap.name());
    }
}

/// Sends a frame from a TAP to a worker of its port. One that cannot be delivered goes to the worker too, which counts it.
fn descend(down: &mut Down, port: &HostPort, header: &NetHeader, frame: &mut [u8]) {
    let tail_len = frame.len().saturating_sub(MAX_SNAPSHOT);
    let too_long = frame.len() > MAX_FRAME as usize;
    let Some(mut held) = down.take(if too_long { 0 } else { tail_len }) else { return };
    let frame = if too_long { &mut frame[..0] } else { frame };
    fill(&mut held.packet, port.id, frame);
    let mut key = Key::default();
    let parsed = extract(&mut held.packet, &mut key);
    let raw = software::raw_header(header);
    let checked = match parsed {
        Extracted::Done => offload::check(&raw, &held.packet, &key),
        _ => Err(DropReason::BadOffload),
    };
    held.answer = None;
    match checked {
        _ if too_long => held.answer = Some(Decision::Drop(DropReason::Oversized)),
        _ if parsed == Extracted::Runt => held.answer = Some(Decision::Drop(DropReason::Runt)),
        Ok(offload) => held.packet.offload = offload,
        // The kernel knows headers that we do not; a checksum anywhere can be completed here.
        Err(_) => match complete(&raw, frame) {
            Ok(()) => {
                let layout = held.packet.layout;
                fill(&mut held.packet, port.id, frame);
                held.packet.layout = layout;
            }
            Err(reason) => held.answer = Some(Decision::Drop(reason)),
        },
    }
    let rest = frame.get(MAX_SNAPSHOT..).unwrap_or_default();
    held.tail[..rest.len()].copy_from_slice(rest);
    let turn = held.packet.flow_hash() as usize % port.polled_by.len().max(1);
    down.send(port.polled_by.get(turn).copied().unwrap_or_default(), held);
}

fn fill(packet: &mut Packet, id: PortId, frame: &[u8]) {
    let head = packet.reset(id, frame.len() as u32, MAX_SNAPSHOT);
    let n = head.len();
    head.copy_from_slice(&frame[..n]);
}

/// Completes the checksum of a frame that is not parsed as far as that.
fn complete(raw: &offload::RawHeader, frame: &mut [u8]) -> Result<(), DropReason> {
    let offload: Offload = offload::check_unparsed(raw, frame.len() as u32)?;
    offload::finish_checksum(frame, &offload)
}

/// Writes a packet to a TAP: as it is if the TAP takes it so, else in the frames that it becomes.
fn ascend(tap: &Tap, packet: &Packet, tail: &[u8], software: &mut Software) -> Result<(), Failure> {
    let outgoing = Outgoing { packet, tail: Tail::Private(tail), max_len: u32::MAX };
    if software::is_accepted(&outgoing, tap.features()) {
        let header = software::net_header(&outgoing, tap.features());
        return tap.write(&header, packet.head(), tail).map_err(Failure::Write);
    }
    let mut result = Ok(());
    let sent = software.send(&outgoing, |frame, _| {
        if result.is_ok() {
            result = tap.write(&NetHeader::default(), frame, &[]);
        }
    });
    sent.map_err(Failure::Refused)?;
    result.map_err(Failure::Write)
}

/// Why a packet did not get into a TAP.
enum Failure {
    /// It cannot be made whole.
    Refused(DropReason),
    /// The kernel did not take it.
    Write(Errno),
}

impl Host for Representors {
    fn packet(
        &mut self,
        packet: &Packet,
        tail: &[u8],
        _: &Key,
        now: Millis,
        _: &mut dyn FlowTable,
    ) -> Decision {
        let slot = packet.in_port.slot as usize;
        let Some(Some(representor)) = self.ports.get_mut(slot) else {
            return Decision::Drop(DropReason::HostTapDown);
        };
        if representor.port.id != packet.in_port {
            return Decision::Drop(DropReason::HostTapDown);
        }
        if representor.port.is_device {
            let Representor { port, lost, .. } = representor;
            return self.back.give(&port.name, lost, packet, tail, now);
        }
        let Some(tap) = &representor.tap else {
            return Decision::Drop(DropReason::HostTapDown);
        };
        let mut written = ascend(tap, packet, tail, &mut self.software);
        if matches!(written, Err(Failure::Write(Errno::IO))) && representor.raise() {
            written = ascend(tap, packet, tail, &mut self.software);
        }
        match written {
            Ok(()) => Decision::Taken,
            Err(Failure::Refused(reason)) => Decision::Drop(reason),
            Err(Failure::Write(Errno::AGAIN | Errno::NOBUFS | Errno::NOMEM)) => {
                Decision::Drop(DropReason::HostTapFull)
            }
            Err(Failure::Write(Errno::INVAL)) => Decision::Drop(DropReason::BadOffload),
            Err(Failure::Write(Errno::IO)) => Decision::Drop(DropReason::HostTapDown),
            Err(Failure::Write(error)) => {
                lose(&mut self.ports[slot], error);
                Decision::Drop(DropReason::HostTapDown)
            }
        }
    }

    fn port_added(&mut self, port: HostPort, _: &mut dyn FlowTable) -> Result<(), HostError> {
        let tap = if port.is_device { None } else { Some(self.open(&port)?) };
        let slot = port.id.slot as usize;
        let Some(place) = self.ports.get_mut(slot) else {
            return Err(HostError(format!("port '{}': there are no more places", port.name)));
        };
        let settling = SETTLING;
        *place = Some(Representor { port, tap, settling, up: false, listed: false, lost: None });
        Ok(())
    }

    fn port_removed(&mut self, id: PortId, returns: bool, _: &mut dyn FlowTable) {
        if self.port(id).is_none() {
            return;
        }
        let gone = self.ports[id.slot as usize].take();
        self.readable.retain(|&slot| slot != id.slot);
        if let Some(tap) = gone.and_then(|representor| representor.tap)
            && !returns
            && let Err(error) = tap.remove()
        {
            warn!("{error}");
        }
    }

    fn link_changed(&mut self, id: PortId, up: bool) {
        let Some(representor) = self.port(id) else { return };
        if representor.up != up {
            representor.up = up;
            if let Some(tap) = &representor.tap {
                set_carrier(tap, up);
            }
        }
    }

    fn missed(&mut self) {
        self.misses.tell();
    }

    fn set_datapath(&mut self, settings: Settings) {
        if self.settings != settings {
            self.settings = settings;
            // They are opened anew as the other datapath needs them.
            self.ports.iter_mut().flatten().for_each(|representor| representor.tap = None);
            self.reopen();
        }
    }

    fn readable(&mut self, slot: u32) {
        if let Some(Some(representor)) = self.ports.get_mut(slot as usize)
            && !representor.listed
        {
            representor.listed = true;
            self.readable.push_back(slot);
        }
    }

    fn serve(&mut self) -> Served {
        self.down.reclaim();
        let mut served = Served::Idle;
        for _ in 0..self.readable.len() {
            let Some(slot) = self.readable.pop_front() else { break };
            match self.read(slot) {
                Read::Empty => {
                    if let Some(Some(representor)) = self.ports.get_mut(slot as usize) {
                        representor.listed = false;
                    }
                    continue;
                }
                Read::More => served = Served::Busy,
                Read::Short if served == Served::Idle => served = Served::Short,
                Read::Short => {}
            }
            self.readable.push_back(slot);
        }
        self.down.flush();
        served
    }

    fn losing(&self) -> Vec<(PortId, String)> {
        let ports = self.ports.iter().flatten();
        ports.filter_map(|representor| Some((representor.port.id, representor.lost.clone()?))).collect()
    }

    fn has_buffers_back(&self) -> bool {
        self.down.has_returned()
    }

    fn tick(&mut self, _: Millis, _: &mut dyn FlowTable) {
        self.reopen();
        for representor in self.ports.iter_mut().flatten().filter(|representor| representor.settling > 0) {
            representor.raise();
            representor.settling -= 1;
        }
    }
}
