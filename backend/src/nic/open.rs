//! Which NIC, and how it is opened: its PCI address, and the driver that knows it by its id.

use nic::igb::{self, Igb};
use nic::io::{NicError, PacketIo};
use nic::offload::FlowOffload;
use nic::pci::qtest::{Qtest, QtestFunction};
use nic::pci::vfio::{Options, VfioFunction};
use nic::pci::{Mapping, PciError, PciFunction};
use nic::rocker;
use nic::virtio_net::{self, VirtioNet};
use std::fmt;
use std::fs::OpenOptions;
use std::io;
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::str::FromStr;

/// Where a NIC is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum PciAddress {
    /// A function of this host, bound to `vfio-pci`: domain, bus, device and function as the kernel writes them.
    Vfio(String),
    /// A device model of a QEMU without a guest, for tests: see `docs/nic.md`.
    Qtest {
        /// Where QEMU listens for qtest (`qtest`), and the machine's memory is (`memory`).
        directory: PathBuf,
        /// Device on bus 0.
        device: u8,
        /// Its function.
        function: u8,
    },
}

impl FromStr for PciAddress {
    type Err = String;

    fn from_str(text: &str) -> Result<PciAddress, String> {
        let wrong = || {
            let shown = text.escape_debug();
            format!("'{shown}' is not the address of a PCI function such as 0000:01:00.0")
        };
        if let Some(rest) = text.strip_prefix("qtest:") {
            let (directory, slot) = rest.rsplit_once('@').ok_or_else(wrong)?;
            let (device, function) = slot_and_function(slot).ok_or_else(wrong)?;
            let directory = PathBuf::from(directory);
            if !directory.is_absolute() {
                return Err(wrong());
            }
            return Ok(PciAddress::Qtest { directory, device, function });
        }
        let mut parts = text.splitn(3, ':');
        let (Some(domain), Some(bus), Some(slot)) = (parts.next(), parts.next(), parts.next()) else {
            return Err(wrong());
        };
        let valid = is_hex(domain, 4) && is_hex(bus, 2) && slot_and_function(slot).is_some();
        if valid { Ok(PciAddress::Vfio(text.to_owned())) } else { Err(wrong()) }
    }
}

/// Whether it is a number in lower-case hexadecimal of so many digits, as the kernel writes it.
fn is_hex(text: &str, digits: usize) -> bool {
    text.len() == digits && text.bytes().all(|b| b.is_ascii_digit() || (b'a'..=b'f').contains(&b))
}

/// The numbers of `01.0`.
fn slot_and_function(text: &str) -> Option<(u8, u8)> {
    let (device, function) = text.split_once('.')?;
    let parse = |text: &str, digits, end| {
        let number = is_hex(text, digits).then(|| u8::from_str_radix(text, 16).ok()).flatten()?;
        (number < end).then_some(number)
    };
    Some((parse(device, 2, 32)?, parse(function, 1, 8)?))
}

impl fmt::Display for PciAddress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            PciAddress::Vfio(address) => f.write_str(address),
            PciAddress::Qtest { directory, device, function } => {
                write!(f, "qtest:{}@{device:02x}.{function}", directory.display())
            }
        }
    }
}

/// What may be set for the tables of a NIC.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct FlowSettings {
    /// Flows that name the fragment type of IP packets, and nothing else of layer 3 or above, are taken for all fragments.
    pub ignore_fragments: bool,
    /// The most rules that may be in the NIC; `None`: what its driver allows.
    pub max_rules: Option<u32>,
}

/// A NIC that was just opened.
pub struct Opened {
    /// Name of its driver.
    pub driver: &'static str,
    /// Its ports.
    pub io: Box<dyn PacketIo>,
    /// Its tables, if it has such.
    pub offload: Option<Box<dyn FlowOffload>>,
}

/// Reaches the function at an address.
fn reach(address: &PciAddress) -> Result<Box<dyn PciFunction>, PciError> {
    Ok(match address {
        PciAddress::Vfio(address) => Box::new(VfioFunction::open(address, Options::default())?),
        PciAddress::Qtest { directory, device, function } => {
            let failed = |what: PathBuf| {
                move |cause: io::Error| PciError::Transport { what: what.display().to_string(), cause }
            };
            let memory = directory.join("memory");
            let open = || {
                let file = OpenOptions::new().read(true).write(true).open(&memory)?;
                let len = file.metadata()?.len();
                Mapping::of_file(&file, 0, usize::try_from(len).map_err(io::Error::other)?)
            };
            let memory = open().map_err(failed(memory.clone()))?;
            let socket = directory.join("qtest");
            let socket = UnixStream::connect(&socket).map_err(failed(socket))?;
            Box::new(QtestFunction::new(Qtest::new(socket, memory)?, *device, *function)?)
        }
    })
}

/// Opens a NIC by the driver that knows it, with so many receive queues if it can have several.
pub(super) fn open(address: &PciAddress, queues: u8, settings: &FlowSettings) -> Result<Opened, NicError> {
    let mut function = reach(address)?;
    let (vendor, device) = function.id()?;
    match (vendor, device) {
        (0x1b36, 0x0006) => {
            let mut config =
                rocker::Config { ignore_fragments: settings.ignore_fragments, ..Default::default() };
            if let Some(max) = settings.max_rules {
                config.max_rules = max;
            }
            let (io, flows) = rocker::open(function, config)?;
            Ok(Opened { driver: "rocker", io: Box::new(io), offload: Some(Box::new(flows)) })
        }
        // The driver knows which of Intel's are its own.
        (0x8086, _) => {
            let io = Igb::open(function, igb::Config { queues, ..Default::default() })?;
            Ok(Opened { driver: "igb", io: Box::new(io), offload: None })
        }
        (0x1af4, 0x1041) => {
            // Without an IOMMU in between there is nothing that it could go past.
            let untranslated = matches!(address, PciAddress::Qtest { .. });
            let io = VirtioNet::open(function, virtio_net::Config { untranslated, ..Default::default() })?;
            Ok(Opened { driver: "virtio-net", io: Box::new(io), offload: None })
        }
        _ => Err(NicError::Config(format!("there is no driver for device {vendor:04x}:{device:04x}"))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_are_read_and_written() {
        for text in ["0000:01:00.0", "0001:af:1f.7", "qtest:/tmp/a@b@05.0"] {
            assert_eq!(text.parse::<PciAddress>().unwrap().to_string(), text);
        }
        for text in [
            "",
            "01:00.0",
            "0000:01:00",
            "0000:01:20.0",
            "0000:01:00.8",
            "0000:1:00.0",
            "0000:AF:00.0",
            "../../0000:01:00.0",
            "0000:01:00.0\n",
            "qtest:a@05.0",
            "qtest:/a",
            "qtest:/a@5.0",
        ] {
            assert!(text.parse::<PciAddress>().unwrap_err().contains("such as 0000:01:00.0"), "{text}");
        }
    }

    #[test]
    fn a_function_that_is_not_there_is_named() {
        let settings = FlowSettings { ignore_fragments: false, max_rules: None };
        let open = |address: &str| open(&address.parse().unwrap(), 1, &settings).err().unwrap().to_string();
        assert_eq!(open("ffff:01:00.0"), "ffff:01:00.0: there is no such PCI function");
        assert!(open("qtest:/nonexistent@05.0").starts_with("/nonexistent/memory: No such file"));
    }
}
