//! Intel 82576 (QEMU's `igb`) as one packet port: receive rings, a transmit ring, MSI-X, link, checksums, segmentation.
//!
//! All frames are received, whatever their address, unless [`Config::vlans`] says less. With more than one queue, frames
//! are [steered](Igb::steer) to them. The device takes the outer 802.1Q tag off a frame and puts it on; frames are handed over,
//! and taken, with their tags inside nevertheless: the driver copies around the place where the tag stands.
//! Reference: Intel 82576EB Gigabit Ethernet Controller Datasheet.

pub(crate) mod regs;
mod ring;
mod steering;
mod transmit;

use rustix::fd::{AsFd, BorrowedFd, OwnedFd};
use switch_core::packet::Offload;

use crate::io::{
    Link, NicError, PacketIo, Port, PortCounters, PortEvent, Received, SendCaps, SendError, Steering,
};
use crate::pci::{Bar, PciError, PciFunction};
use ring::{Ring, wait};
pub use steering::SteerError;
use steering::Tables;
use transmit::Transmit;

/// Vector of the rings, and of everything else.
const VECTORS: u32 = 0b11;
const MIN_FRAME: usize = 14;
/// Bytes of a frame's two addresses; behind them is its tag.
const ADDRESSES: usize = 12;
/// Bytes of a tag.
const TAG: usize = 4;

/// Settings of a port.
#[derive(Clone, Debug)]
pub struct Config {
    /// Slots of each ring: a power of two from 8 to 4096.
    pub ring: u32,
    /// The longest frame in bytes without FCS, from 64 to 9728.
    pub max_frame: u16,
    /// Receive queues, from 1 to 8. What is not [steered](Igb::steer) comes to the first one.
    pub queues: u8,
    /// The VLANs of the port: none for all, or up to 31 ids. Untagged frames belong to it always; those of other VLANs
    /// are dropped by the device. Only frames of these VLANs can be steered by their VLAN.
    pub vlans: Vec<u16>,
}

impl Default for Config {
    fn default() -> Config {
        Config { ring: 256, max_frame: 1522, queues: 1, vlans: Vec::new() }
    }
}

impl Config {
    fn check(&self) -> Result<(), NicError> {
        let wrong = |what: String| Err(NicError::Config(what));
        if !self.ring.is_power_of_two() || !(8..=4096).contains(&self.ring) {
            return wrong(format!("a ring of {} slots: not a power of two from 8 to 4096", self.ring));
        }
        if !(64..=9728).contains(&self.max_frame) {
            return wrong(format!("a longest frame of {} bytes", self.max_frame));
        }
        if !(1..=steering::QUEUES).contains(&self.queues) {
            return wrong(format!("{} queues: not from 1 to {}", self.queues, steering::QUEUES));
        }
        if self.vlans.len() > steering::VLANS {
            return wrong(format!("{} VLANs: more than {}", self.vlans.len(), steering::VLANS));
        }
        let mut vlans = self.vlans.clone();
        vlans.sort_unstable();
        vlans.dedup();
        if vlans.len() < self.vlans.len() || vlans.iter().any(|vid| !(1..4095).contains(vid)) {
            return wrong("a VLAN that is named twice, or has no id from 1 to 4094".into());
        }
        Ok(())
    }
}

/// A receive queue.
#[derive(Debug)]
struct Receive {
    ring: Ring,
    /// The rest of a frame that is longer than a buffer is being thrown away.
    skipping: bool,
}

impl Receive {
    /// Copies the frame in a slot, of `len` bytes with the tag that the device has taken off, which is put where it stood.
    fn copy(&self, slot: u32, len: usize, tag: Option<u16>, to: &mut Vec<u8>) -> Result<(), NicError> {
        to.clear();
        to.resize(len, 0);
        let Some((tci, rest)) = tag.and_then(|tci| Some((tci, to.get_mut(TAG..)?))) else {
            return Ok(self.ring.read(slot, to)?);
        };
        self.ring.read(slot, rest)?;
        // Words are copied to words; then the addresses make room.
        if let Some(head) = to.first_chunk_mut::<{ ADDRESSES + TAG }>() {
            let [high, low] = tci.to_be_bytes();
            head.copy_within(TAG.., 0);
            head[ADDRESSES..].copy_from_slice(&[0x81, 0x00, high, low]);
        }
        Ok(())
    }

    fn post(&mut self) -> Result<(), NicError> {
        Ok(self.ring.push(self.ring.address(self.ring.head()), 0)?)
    }

    /// The oldest slot that the device has filled, and the second word of its descriptor.
    fn next(&self) -> Result<Option<(u32, u64)>, NicError> {
        let Some(slot) = self.ring.tail() else { return Ok(None) };
        let word = self.ring.word(slot)?;
        Ok((word & 1 != 0).then_some((slot, word)))
    }
}

/// A port; see [`Igb::open`].
#[derive(Debug)]
pub struct Igb {
    function: Box<dyn PciFunction>,
    bar: Bar,
    config: Config,
    port: [Port; 1],
    receive: Vec<Receive>,
    /// The queue that is looked at first.
    next: usize,
    transmit: Transmit,
    rules: Vec<Steering>,
    interrupts: Vec<OwnedFd>,
    counters: PortCounters,
    frame: Vec<u8>,
    pending: Vec<PortEvent>,
    usable: bool,
}

impl Igb {
    /// Takes a port up: resets it, starts its rings and its link, which comes up later.
    pub fn open(mut function: Box<dyn PciFunction>, config: Config) -> Result<Igb, NicError> {
        config.check()?;
        let (vendor, device) = function.id()?;
        if vendor != regs::VENDOR || !regs::DEVICES.contains(&device) {
            return Err(PciError::Foreign { vendor, device }.into());
        }
        function.set_bus_master(true)?;
        let bar = function.bar(0)?;
        let max_frame = usize::from(config.max_frame);
        // The device knows receive buffers in KiB.
        let buffer = max_frame.next_multiple_of(1024);
        let receive = (0..config.queues).map(|queue| {
            let ring = Ring::new(&mut *function, regs::rdbal(queue), config.ring, buffer)?;
            Ok::<_, PciError>(Receive { ring, skipping: false })
        });
        let receive = receive.collect::<Result<_, _>>()?;
        let transmit = Transmit::new(&mut *function, config.ring, buffer, max_frame)?;
        let interrupts = function.interrupts(VECTORS.count_ones() as u16)?;
        let port = Port {
            number: 0,
            name: "igb".into(),
            mac: [0; 6],
            max_frame,
            send: SendCaps { checksum: true, tso: true, ecn: true, max_super: transmit.max_super() },
            tags: true,
            link: Link { up: false, speed: 1000 },
        };
        let mut igb = Igb {
            function,
            bar,
            port: [port],
            receive,
            next: 0,
            transmit,
            rules: Vec::new(),
            interrupts,
            counters: PortCounters::default(),
            frame: Vec::with_capacity(max_frame),
            pending: Vec::new(),
            usable: false,
            config,
        };
        igb.set_up()?;
        Ok(igb)
    }

    /// Sees to it that frames for an address, and in a VLAN if `vid` says so (0 is "untagged"), come to a queue, whose
    /// number is then their [`Received::mark`]. It replaces what was said of this address and VLAN before. Without an id
    /// it is about all VLANs of the port for which nothing else is said of the address.
    ///
    /// What is refused changes nothing. While rules change, frames may come to the first queue.
    pub fn steer(&mut self, mac: [u8; 6], vid: Option<u16>, queue: u8) -> Result<(), SteerError> {
        let mut rules = self.rules.clone();
        rules.retain(|rule| (rule.mac, rule.vid) != (mac, vid));
        rules.push(Steering { mac, vid, queue });
        self.set_rules(rules)
    }

    /// Takes a rule back. `false`: there was none.
    pub fn unsteer(&mut self, mac: [u8; 6], vid: Option<u16>) -> Result<bool, SteerError> {
        let mut rules = self.rules.clone();
        rules.retain(|rule| (rule.mac, rule.vid) != (mac, vid));
        let was_there = rules.len() < self.rules.len();
        if was_there {
            self.set_rules(rules)?;
        }
        Ok(was_there)
    }

    /// The rules that are there.
    pub fn steered(&self) -> &[Steering] {
        &self.rules
    }

    fn set_rules(&mut self, rules: Vec<Steering>) -> Result<(), SteerError> {
        let Config { vlans, queues, .. } = &self.config;
        let tables = steering::tables(&rules, self.port[0].mac, vlans, *queues)?;
        self.rules = rules;
        // After a reset they are set up with the rest.
        if self.usable && *queues > 1 {
            self.program(&tables)?;
        }
        Ok(())
    }

    fn tables(&self) -> Result<Tables, NicError> {
        let Config { vlans, queues, .. } = &self.config;
        let tables = steering::tables(&self.rules, self.port[0].mac, vlans, *queues);
        tables.map_err(|error| NicError::Config(error.to_string()))
    }

    /// Gives the device its receive addresses, each with its pools; the first one takes the first place. Those that stay are left
    /// where they are, and none is ever valid in two places: its frames would come to the pools of both.
    fn write_addresses(&self, macs: &[([u8; 6], u8)]) -> Result<(), NicError> {
        let bar = &self.bar;
        let mut missing = macs.to_vec();
        let (mut free, mut staying) = (Vec::new(), Vec::new());
        for index in 0..regs::ADDRESSES {
            let (low, high) = regs::address(index);
            let (lower, upper) = (bar.read32(low)?, bar.read32(high)?);
            let is_valid = upper & regs::RAH_VALID != 0;
            let ([a, b, c, d], [e, f, ..]) = (lower.to_le_bytes(), upper.to_le_bytes());
            let is_first = |mac| macs.first().is_some_and(|(first, _)| *first == mac);
            let known = missing.iter().position(|(mac, _)| {
                is_valid && *mac == [a, b, c, d, e, f] && is_first(*mac) == (index == 0)
            });
            if let Some(at) = known {
                staying.push((high, upper, missing.remove(at)));
                continue;
            }
            if is_valid {
                bar.write32(high, 0)?;
            }
            free.push((low, high));
        }
        let upper = |[_, _, _, _, e, f]: [u8; 6], pools: u8| {
            u32::from_le_bytes([e, f, 0, 0]) | u32::from(pools) << 18 | regs::RAH_VALID
        };
        for (high, was, (mac, pools)) in staying {
            if was != upper(mac, pools) {
                bar.write32(high, upper(mac, pools))?;
            }
        }
        // By half of a new one nothing comes.
        for ((low, high), (mac, pools)) in free.into_iter().zip(missing) {
            let [a, b, c, d, ..] = mac;
            bar.write32(low, u32::from_le_bytes([a, b, c, d]))?;
            bar.write32(high, upper(mac, pools))?;
        }
        Ok(())
    }

    /// Writes the tables of steering. No frame comes to two queues meanwhile: VLANs are narrowed to the pools that they keep
    /// before addresses change, and get their new ones after that.
    fn program(&self, tables: &Tables) -> Result<(), NicError> {
        let bar = &self.bar;
        let vlans = (0..).zip(&tables.vlans).map(|(index, (vid, pools))| {
            (regs::VLVF + 4 * index, u32::from(*vid) | u32::from(*pools) << 12 | regs::VLVF_VALID)
        });
        let options = (0..self.config.queues).map(|pool| {
            let mut options = regs::VMOLR_ON | (self.port[0].max_frame as u32 + 4);
            if tables.untagged >> pool & 1 != 0 {
                options |= regs::VMOLR_UNTAGGED;
            }
            // What is for many comes to the first one.
            if pool == 0 {
                options |= regs::VMOLR_GROUPS;
            }
            (regs::VMOLR + 4 * u64::from(pool), options)
        });
        let wanted: Vec<(u64, u32)> = vlans.chain(options).collect();
        for &(register, word) in &wanted {
            let is = bar.read32(register)?;
            if is & !word != 0 {
                bar.write32(register, is & word)?;
            }
        }
        self.write_addresses(&tables.macs)?;
        for (register, word) in wanted {
            if bar.read32(register)? != word {
                bar.write32(register, word)?;
            }
        }
        Ok(())
    }

    /// Sets up what is for several queues, and VLANs.
    fn set_up_pools(&self) -> Result<(), NicError> {
        let bar = &self.bar;
        let vlans = &self.config.vlans;
        if !vlans.is_empty() {
            // Frames with a priority and no VLAN are untagged ones.
            for vid in std::iter::once(&0).chain(vlans) {
                let word = regs::VFTA + 4 * u64::from(vid >> 5);
                bar.write32(word, bar.read32(word)? | 1 << (vid & 31))?;
            }
        }
        if self.config.queues == 1 {
            return Ok(bar.write32(regs::MRQC, 0)?);
        }
        for word in 0..regs::MTA_WORDS {
            bar.write32(regs::MTA + 4 * word, u32::MAX)?;
        }
        let all = (1 << self.config.queues) - 1;
        bar.write32(regs::VT_CTL, regs::VT_CTL_REPLICATE)?;
        bar.write32(regs::RPLOLR, regs::RPLOLR_STRIP)?;
        // A full queue drops, instead of keeping frames from the others.
        bar.write32(regs::QDE, all)?;
        self.program(&self.tables()?)?;
        bar.write32(regs::MRQC, regs::MRQC_POOLS)?;
        bar.write32(regs::VFTE, 1)?;
        Ok(bar.write32(regs::VFRE, all)?)
    }

    fn set_up(&mut self) -> Result<(), NicError> {
        self.usable = false;
        self.counters.sent += self.transmit.reap()?;
        self.counters.tx_reset += self.transmit.forget();
        self.function.set_bus_master(true)?;
        let bar = self.bar.clone();
        bar.write32(regs::EIMC, u32::MAX)?;
        bar.write32(regs::IMC, u32::MAX)?;
        bar.write32(regs::CTRL, bar.read32(regs::CTRL)? | regs::CTRL_RST)?;
        wait("does not come out of reset", || Ok(bar.read32(regs::CTRL)? & regs::CTRL_RST == 0))?;
        bar.write32(regs::EIMC, u32::MAX)?;
        bar.write32(regs::IMC, u32::MAX)?;
        let (low, high) = regs::address(0);
        let (low, high) = (bar.read32(low)?, bar.read32(high)?);
        let ([a, b, c, d], [e, f, ..]) = (low.to_le_bytes(), high.to_le_bytes());
        self.port[0].mac = [a, b, c, d, e, f];
        // Tags are the first ones of frames, whatever the card's memory or who had it before has set.
        let ext = bar.read32(regs::CTRL_EXT)? & !regs::CTRL_EXT_EXT_VLAN;
        bar.write32(regs::CTRL_EXT, ext | regs::CTRL_EXT_DRV_LOAD)?;
        bar.write32(regs::VET, regs::VET_8021Q)?;
        bar.write32(regs::CTRL, bar.read32(regs::CTRL)? | regs::CTRL_SLU | regs::CTRL_VME)?;
        bar.write32(regs::MDIC, regs::MDIC_AUTONEGOTIATE)?;
        wait("does not reach its PHY", || Ok(bar.read32(regs::MDIC)? & regs::MDIC_READY != 0))?;
        bar.write32(regs::GPIE, regs::GPIE_MSIX)?;
        bar.write32(regs::EIAC, VECTORS)?;
        bar.write32(regs::EIAM, VECTORS)?;
        // Valid, vector 0: receive queues. Valid, vector 1: other causes, in the second byte.
        for queue in 0..u64::from(self.config.queues) {
            bar.write32(regs::IVAR0 + 4 * queue, 0x80)?;
        }
        bar.write32(regs::IVAR_MISC, 0x81 << 8)?;
        bar.write32(regs::IMS, regs::CAUSE_LINK)?;
        bar.write32(regs::RXCSUM, regs::RXCSUM_ON)?;
        // The FCS counts too.
        bar.write32(regs::RLPML, self.port[0].max_frame as u32 + 4)?;
        self.set_up_pools()?;
        let several = if self.config.queues > 1 { regs::SRRCTL_DROP } else { 0 };
        for (queue, receive) in (0..).zip(&mut self.receive) {
            let buffers = (receive.ring.buffer() >> 10) as u32 | regs::SRRCTL_ONE_BUFFER | several;
            bar.write32(regs::rdbal(queue) + regs::QUEUE_BUFFERS, buffers)?;
            receive.skipping = false;
            receive.ring.start(&bar)?;
        }
        self.transmit.start(&bar)?;
        bar.write32(regs::TCTL, bar.read32(regs::TCTL)? | regs::TCTL_ON)?;
        let filter = if self.config.vlans.is_empty() { 0 } else { regs::RCTL_VLAN_FILTER };
        bar.write32(regs::RCTL, regs::RCTL_ON | filter)?;
        for receive in &mut self.receive {
            while receive.ring.free() > 0 {
                receive.post()?;
            }
            receive.ring.ring(&bar)?;
        }
        self.usable = true;
        Ok(())
    }

    /// Whether the device still has the rings.
    fn is_known(&self) -> Result<bool, PciError> {
        self.receive.first().map_or(Ok(false), |receive| receive.ring.is_known(&self.bar))
    }
}

impl PacketIo for Igb {
    fn ports(&self) -> &[Port] {
        &self.port
    }

    fn receive(&mut self, budget: usize, each: &mut dyn FnMut(Received<'_>)) -> Result<usize, NicError> {
        if !self.usable {
            return Ok(0);
        }
        let count = self.receive.len();
        let mut done = 0;
        for turn in 0..count {
            let index = (self.next + turn) % count;
            let Some(receive) = self.receive.get_mut(index) else { break };
            for _ in 0..receive.ring.size() {
                if done >= budget {
                    break;
                }
                let Some((slot, word)) = receive.next()? else { break };
                receive.ring.take(receive.ring.after(slot, 1));
                // The device has taken off the tag (bit 3) that is in the upper bits.
                let tag = (word & 1 << 3 != 0).then_some((word >> 48) as u16);
                let got = (word >> 32) as u16 as usize;
                let len = got + tag.map_or(0, |_| TAG);
                let (is_last, failed) = (word & 1 << 1 != 0, word & 1 << 31 != 0);
                let was_skipping = std::mem::replace(&mut receive.skipping, !is_last);
                if was_skipping {
                    // Counted when it began.
                } else if !is_last || len > self.port[0].max_frame {
                    self.counters.rx_too_long += 1;
                } else if failed || got < MIN_FRAME {
                    self.counters.rx_error += 1;
                } else {
                    receive.copy(slot, len, tag, &mut self.frame)?;
                    self.counters.received += 1;
                    done += 1;
                    // The device has looked at the transport checksum (bit 5) and has not found it wrong (bit 29).
                    let offload =
                        Offload { csum_valid: word & (1 << 5 | 1 << 29) == 1 << 5, ..Offload::default() };
                    let (frame, mark) = (&self.frame[..], index as u32);
                    each(Received { port: 0, frame, offload, forwarded: false, mark });
                }
                receive.post()?;
            }
            receive.ring.ring(&self.bar)?;
        }
        self.next = (self.next + 1) % count.max(1);
        Ok(done)
    }

    fn send(&mut self, port: u32, frame: &[&[u8]], offload: &Offload) -> Result<(), SendError> {
        if port != 0 {
            return Err(SendError::NoPort);
        }
        if !self.usable {
            return Err(SendError::Device);
        }
        if !self.port[0].link.up {
            return Err(SendError::LinkDown);
        }
        let len = frame.iter().map(|piece| piece.len()).fold(0, usize::saturating_add);
        if len < MIN_FRAME {
            return Err(SendError::TooShort);
        }
        self.transmit.send(frame, len, offload)
    }

    fn flush(&mut self) -> Result<(), NicError> {
        if self.usable {
            self.transmit.ring(&self.bar)?;
            self.counters.sent += self.transmit.reap()?;
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
        if !self.usable || !self.is_known()? {
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
        for receive in &self.receive {
            if receive.next()?.is_some() {
                return Ok(false);
            }
        }
        Ok(causes & regs::CAUSE_LINK == 0)
    }

    fn interrupts(&self) -> Vec<BorrowedFd<'_>> {
        self.interrupts.iter().map(AsFd::as_fd).collect()
    }

    fn counters(&self, port: u32) -> Option<PortCounters> {
        (port == 0).then_some(self.counters)
    }

    fn queues(&self) -> u8 {
        self.config.queues
    }

    fn set_steering(&mut self, port: u32, rules: &[Steering]) -> Result<usize, NicError> {
        if port != 0 {
            return Ok(0);
        }
        let Config { vlans, queues, .. } = &self.config;
        let mut taken = Vec::new();
        for &rule in rules {
            taken.push(rule);
            if steering::tables(&taken, self.port[0].mac, vlans, *queues).is_err() {
                taken.pop();
                break;
            }
        }
        let count = taken.len();
        match self.set_rules(taken) {
            Ok(()) => Ok(count),
            Err(SteerError::Device(error)) => Err(error),
            Err(error) => Err(NicError::Config(error.to_string())),
        }
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
