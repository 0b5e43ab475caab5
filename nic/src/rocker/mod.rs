//! Rocker, QEMU's switch (1b36:0006): a complete match-action device, here a bundle of ports whose flows may pass
//! without the CPU. Reference: QEMU, docs/specs/rocker.rst and hw/net/rocker.
//!
//! [`open`] gives two halves, for two threads: [`RockerPorts`] moves packets, [`RockerFlows`] owns the function and the
//! tables. When the device is reset, by whomever, [`RockerFlows`] sets it up again and raises an epoch; [`RockerPorts`]
//! notices that and gives its rings to the device anew. The other way round, copies of frames that the device has
//! forwarded, which it makes when [`RockerFlows`] wants to know whether a rule is used, go by a queue from one to the other.
//!
//! What would bring the emulated device down is never sent: a port number beyond the device's ports, and an entry that
//! lets untagged frames pass the VLAN table without an id (see `pipeline`).

mod copies;
mod flows;
mod group;
mod pipeline;
mod ports;
pub(crate) mod regs;
mod ring;
mod rule;
mod tlv;

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::time::{Duration, Instant};

pub use flows::RockerFlows;
pub use ports::RockerPorts;

use crate::io::{Link, NicError, Port, SendCaps};
use crate::pci::{Bar, PciError, PciFunction};
use regs::{command, settings};
use ring::Ring;
use tlv::{Malformed, Message, Writer};

/// Slots of the command ring.
const COMMANDS: u32 = 256;
/// Bytes of a command: the longest is a group of 64 members.
const COMMAND_BUFFER: u16 = 2048;
/// The longest name that a port may have.
const MAX_NAME: usize = 64;

/// Settings of a switch.
#[derive(Clone, Debug)]
pub struct Config {
    /// The most rules to be in the device. It has no limit of its own, but compares with each rule in turn.
    pub max_rules: u32,
    /// Take flows that name the fragment type of IP packets, and nothing else of layer 3 or above, for all fragments.
    pub ignore_fragments: bool,
    /// Slots of each transmit and receive ring: a power of two.
    pub ring: u32,
    /// The longest frame in bytes, at most 65535.
    pub max_frame: u16,
    /// How long a command may take before the device is reset.
    pub timeout: Duration,
    /// How long a rule copies to the CPU, at most, when it is asked for whether it is used.
    pub probe: Duration,
}

impl Default for Config {
    fn default() -> Config {
        Config {
            max_rules: 256,
            ignore_fragments: false,
            ring: 128,
            max_frame: 9216,
            timeout: Duration::from_secs(1),
            probe: Duration::from_millis(10),
        }
    }
}

impl Config {
    fn check(&self) -> Result<(), NicError> {
        if !self.ring.is_power_of_two() || !(2..=4096).contains(&self.ring) {
            return Err(NicError::Config(format!(
                "a ring of {} slots: not a power of two from 2 to 4096",
                self.ring
            )));
        }
        if self.max_frame < 64 {
            return Err(NicError::Config(format!("a longest frame of {} bytes", self.max_frame)));
        }
        Ok(())
    }
}

/// What the halves share.
#[derive(Debug, Default)]
struct Shared {
    /// Odd while the device is usable; each setup ends with the next odd number.
    epoch: AtomicU32,
    /// Probes that have begun.
    probes: AtomicU32,
    /// There was no room for a copy.
    lost: AtomicBool,
}

impl Shared {
    /// The epoch, if the device is usable.
    fn usable(&self) -> Option<u32> {
        Some(self.epoch.load(Ordering::Acquire)).filter(|epoch| epoch & 1 == 1)
    }

    fn raise(&self, usable: bool) {
        let epoch = self.epoch.load(Ordering::Relaxed);
        if (epoch & 1 == 1) != usable {
            self.epoch.store(epoch.wrapping_add(1), Ordering::Release);
        }
    }
}

/// Takes a switch up: resets it, sets its tables up so that every frame goes to the CPU, and enables its ports.
pub fn open(
    mut function: Box<dyn PciFunction>,
    config: Config,
) -> Result<(RockerPorts, RockerFlows), NicError> {
    config.check()?;
    let (vendor, device) = function.id()?;
    if (vendor, device) != (regs::VENDOR, regs::DEVICE) {
        return Err(PciError::Foreign { vendor, device }.into());
    }
    function.set_bus_master(true)?;
    let bar = function.bar(0)?;
    bar.write32(regs::TEST_REG, 0x1234_5678)?;
    if bar.read32(regs::TEST_REG)? != 0x2468_acf0 {
        return Err(NicError::Device("does not pass its register test".into()));
    }
    let count = bar.read32(regs::PORT_COUNT)?;
    if !(1..=regs::MAX_PORTS).contains(&count) {
        return Err(NicError::Device(format!("claims to have {count} ports")));
    }
    let mut control = Control {
        ring: Ring::new(&mut *function, &bar, regs::RING_COMMAND, COMMANDS, COMMAND_BUFFER)?,
        bar,
        ports: count,
        timeout: config.timeout,
        message: Vec::new(),
    };
    control.set_up()?;
    let ports = (1..=count).map(|number| control.port(number, &config)).collect::<Result<_, _>>()?;
    let shared = Arc::new(Shared::default());
    shared.raise(true);
    let (reporter, copies) = copies::queue();
    let ports = RockerPorts::new(&mut *function, &control.bar, ports, &config, shared.clone(), reporter)?;
    Ok((ports, RockerFlows::new(function, control, config, shared, copies)))
}

/// The command ring.
#[derive(Debug)]
struct Control {
    bar: Bar,
    ring: Ring,
    ports: u32,
    timeout: Duration,
    /// The device's last answer.
    message: Vec<u8>,
}

impl Control {
    /// Resets the switch and fills its tables, waiting for it. Its ports stay disabled.
    fn set_up(&mut self) -> Result<(), NicError> {
        self.bar.write32(regs::CONTROL, regs::CONTROL_RESET)?;
        self.ring.start()?;
        for number in 1..=self.ports {
            let mut to = Writer::default();
            // It would report each packet's addresses as events.
            to.nest(command::INFO, |info| {
                info.u32(settings::PORT, number).u8(settings::MODE, 0).u8(settings::LEARNING, 0);
            });
            to.u16(command::TYPE, command::SET_PORT_SETTINGS);
            self.execute(&to.finish())?;
        }
        for message in pipeline::commands(self.ports) {
            self.execute(&message)?;
        }
        Ok(())
    }

    /// Carries out one command while no other is under way, and waits for it.
    fn execute(&mut self, message: &[u8]) -> Result<(), NicError> {
        let deadline = Instant::now() + self.timeout;
        if !self.ring.push(message)? {
            return Err(NicError::Device("takes no commands".into()));
        }
        self.ring.ring()?;
        let completion = loop {
            if let Some(completion) = self.ring.take()? {
                break completion;
            }
            if Instant::now() >= deadline {
                return Err(NicError::Device("does not answer a command".into()));
            }
            std::thread::yield_now();
        };
        self.ring.return_credits()?;
        self.ring.message(&completion, &mut self.message)?;
        match completion.error {
            0 => Ok(()),
            error => Err(NicError::Device(format!("refuses a command with error {error}"))),
        }
    }

    /// Asks for a port's settings.
    fn port(&mut self, number: u32, config: &Config) -> Result<Port, NicError> {
        let mut to = Writer::default();
        to.u16(command::TYPE, command::GET_PORT_SETTINGS).nest(command::INFO, |info| {
            info.u32(settings::PORT, number);
        });
        self.execute(&to.finish())?;
        let nonsense =
            |Malformed| NicError::Device(format!("gives settings of port {number} that make no sense"));
        let info = Message(&self.message).nested(command::INFO).map_err(nonsense)?;
        let speed = info.get(settings::SPEED).and_then(|value| value.u32()).map_err(nonsense)?;
        let mac = info.get(settings::MAC).and_then(|value| value.mac()).map_err(nonsense)?;
        let name = info.find(settings::NAME).map_err(nonsense)?.map_or(&[][..], |value| value.0);
        let name = String::from_utf8_lossy(name.get(..MAX_NAME).unwrap_or(name));
        Ok(Port {
            number,
            name: name.trim_end_matches('\0').to_owned(),
            mac,
            max_frame: config.max_frame.into(),
            send: SendCaps::default(),
            tags: false,
            link: Link { up: false, speed },
        })
    }
}

#[cfg(test)]
mod tests;
