//! PCI functions as the machine has them: which there are, who has them, and what keeps a driver of ours from one. Read from sysfs
//! and procfs, below a root that tests make up.

mod binding;
mod obstacle;
mod reset;
#[cfg(test)]
mod tests;

use std::collections::BTreeMap;
use std::fmt;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::str::FromStr;

pub use binding::{Bound, Unbound};
pub use obstacle::{Companion, Obstacle};
pub use reset::ResetBy;

use crate::pci::PciError;

/// The kernel's driver that gives functions to programs.
pub const VFIO: &str = "vfio-pci";

/// Class of network functions, and of bridges.
const NETWORK: u8 = 0x02;
const BRIDGE: u8 = 0x06;

/// Why something cannot be done to a function, in one line that says what helps.
#[derive(Debug, thiserror::Error)]
pub enum HostError {
    /// Not an address.
    #[error("'{0}' is no PCI address, such as 0000:01:00.0")]
    Address(String),
    /// There is no such function.
    #[error("there is no PCI function {0}: 'pointwork nic list --all' shows those that there are")]
    NoFunction(PciAddress),
    /// It is a bridge.
    #[error("{0} is a bridge, which has no driver of ours")]
    Bridge(PciAddress),
    /// It is none for networks.
    #[error("{address} is no network function (class {class:06x}): --force takes it nevertheless")]
    NotNetwork {
        /// The function.
        address: PciAddress,
        /// Its class.
        class: u32,
    },
    /// The host uses it.
    #[error("{address} is in use by this host: {uses}; --force takes it away")]
    InUse {
        /// The function.
        address: PciAddress,
        /// How it is used.
        uses: String,
    },
    /// A program has it.
    #[error("{address} is in use by {holder}: end that first")]
    Held {
        /// The function.
        address: PciAddress,
        /// The program.
        holder: Holder,
    },
    /// What stands in the way.
    #[error("{address}: {obstacle}: {}", obstacle.remedy(*address))]
    Obstacle {
        /// The function.
        address: PciAddress,
        /// What it is.
        obstacle: Obstacle,
    },
    /// It is not bound to `vfio-pci`.
    #[error("{0} is not bound to vfio-pci: nothing of ours can have used it")]
    NotBound(PciAddress),
    /// The kernel did not do what it was told.
    #[error("{address}: {driver} does not take the function; 'dmesg' may say why")]
    NotTaken {
        /// The function.
        address: PciAddress,
        /// The driver that should have taken it.
        driver: String,
    },
    /// It cannot be reset.
    #[error(
        "{0} can neither be reset from outside nor by its own registers: its DMA is off, but its rules are as they were"
    )]
    NoReset(PciAddress),
    /// A file of the kernel.
    #[error("{}: {cause}{}", path.display(), if cause.kind() == io::ErrorKind::PermissionDenied { " (this needs root)" } else { "" })]
    Io {
        /// The file.
        path: PathBuf,
        /// What it said.
        cause: io::Error,
    },
    /// The way to the function.
    #[error("{address}: {cause}")]
    Pci {
        /// The function.
        address: PciAddress,
        /// What is wrong.
        cause: PciError,
    },
}

/// Domain, bus, device and function.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct PciAddress {
    domain: u32,
    bus: u8,
    device: u8,
    function: u8,
}

impl fmt::Display for PciAddress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:04x}:{:02x}:{:02x}.{:x}", self.domain, self.bus, self.device, self.function)
    }
}

impl FromStr for PciAddress {
    type Err = HostError;

    /// `0000:01:00.0`, or `01:00.0` for one in the first domain.
    fn from_str(text: &str) -> Result<Self, HostError> {
        let number = |text: &str, digits: usize, most: u32| {
            let hex = (1..=digits).contains(&text.len()) && text.bytes().all(|byte| byte.is_ascii_hexdigit());
            u32::from_str_radix(text, 16).ok().filter(|&number| hex && number <= most)
        };
        let read = || {
            let (rest, function) = text.rsplit_once('.')?;
            let (rest, device) = rest.rsplit_once(':')?;
            let (domain, bus) = rest.split_once(':').unwrap_or(("0", rest));
            Some(PciAddress {
                domain: number(domain, 8, u32::MAX)?,
                bus: number(bus, 2, 0xff)? as u8,
                device: number(device, 2, 0x1f)? as u8,
                function: number(function, 1, 7)? as u8,
            })
        };
        read().ok_or_else(|| HostError::Address(text.to_owned()))
    }
}

/// A NIC that a driver of ours knows.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Model {
    /// What it is.
    pub name: &'static str,
    /// The driver.
    pub driver: &'static str,
}

/// The NIC with these ids, if it is known.
pub fn model(vendor: u16, device: u16) -> Option<Model> {
    use crate::{igb, rocker, virtio_net};
    match (vendor, device) {
        (rocker::regs::VENDOR, rocker::regs::DEVICE) => Some(Model { name: "QEMU rocker", driver: "rocker" }),
        (igb::regs::VENDOR, device) if igb::regs::DEVICES.contains(&device) => {
            Some(Model { name: "Intel 82576", driver: "igb" })
        }
        (virtio_net::regs::VENDOR, virtio_net::regs::DEVICE) => {
            Some(Model { name: "virtio-net", driver: "virtio-net" })
        }
        _ => None,
    }
}

/// A network interface that the kernel's driver has made of a function.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Interface {
    /// Its name.
    pub name: String,
    /// Whether it is up.
    pub up: bool,
    /// What is on top of it: a bridge, a bond, Open vSwitch (`ovs-system`), VLANs.
    pub uppers: Vec<String>,
    /// Whether it has addresses or routes.
    pub addressed: bool,
}

impl Interface {
    /// How the host uses it, if it does.
    pub fn uses(&self) -> Option<String> {
        let mut uses: Vec<String> =
            self.uppers.iter().map(|upper| format!("{} belongs to {upper}", self.name)).collect();
        match (self.up, self.addressed) {
            (true, true) => uses.push(format!("{} is up and has addresses or routes", self.name)),
            (true, false) => uses.push(format!("{} is up", self.name)),
            (false, true) => uses.push(format!("{} has addresses", self.name)),
            (false, false) => {}
        }
        (!uses.is_empty()).then(|| uses.join(", "))
    }
}

/// A program that has a function open.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Holder {
    /// Its process id; `None` if this user cannot see it.
    pub pid: Option<u32>,
    /// Its name.
    pub name: String,
}

impl fmt::Display for Holder {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.pid {
            Some(pid) => write!(f, "{} (process {pid})", self.name),
            None => f.write_str("another process"),
        }
    }
}

/// A function.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Function {
    /// Where it is.
    pub address: PciAddress,
    /// Vendor id.
    pub vendor: u16,
    /// Device id.
    pub device: u16,
    /// Class, subclass and programming interface.
    pub class: u32,
    /// What it is, if a driver of ours knows it.
    pub model: Option<Model>,
    /// The kernel's driver.
    pub driver: Option<String>,
    /// Its IOMMU group.
    pub group: Option<u32>,
    /// Who else is in the group, with their drivers; bridges are left out.
    pub companions: Vec<Companion>,
    /// How it can be reset from outside, in the kernel's words.
    pub reset_methods: Vec<String>,
    /// Its interfaces.
    pub interfaces: Vec<Interface>,
    /// The function that this one is a virtual function of.
    pub physical: Option<PciAddress>,
    /// How many virtual functions it has.
    pub virtual_functions: u32,
    /// Whether the IOMMU remaps interrupts, as far as is known.
    pub remaps_interrupts: Option<bool>,
    /// Who has it by VFIO.
    pub holder: Option<Holder>,
}

impl Function {
    /// Whether it is for networks.
    pub fn is_network(&self) -> bool {
        self.base_class() == NETWORK
    }

    fn base_class(&self) -> u8 {
        (self.class >> 16) as u8
    }

    /// Whether `vfio-pci` has it.
    pub fn is_bound(&self) -> bool {
        self.driver.as_deref() == Some(VFIO)
    }

    /// How the host uses it, if it does.
    pub fn uses(&self) -> Option<String> {
        let mut uses: Vec<String> = self.interfaces.iter().filter_map(Interface::uses).collect();
        if self.virtual_functions > 0 {
            uses.push(format!("its {} virtual functions would go with its driver", self.virtual_functions));
        }
        (!uses.is_empty()).then(|| uses.join(", "))
    }
}

/// The machine, or what stands for it in a test.
#[derive(Debug)]
pub struct Host {
    root: PathBuf,
    /// Writes to an attribute of sysfs, which a test answers as the kernel would.
    write: fn(&Path, &str) -> io::Result<()>,
}

impl Default for Host {
    fn default() -> Host {
        Host {
            root: PathBuf::from("/"),
            write: |path, text| {
                fs::OpenOptions::new()
                    .write(true)
                    .open(path)
                    .and_then(|mut file| io::Write::write_all(&mut file, text.as_bytes()))
            },
        }
    }
}

impl Host {
    fn path(&self, path: &str) -> PathBuf {
        self.root.join(path)
    }

    fn of(&self, address: PciAddress) -> PathBuf {
        self.path("sys/bus/pci/devices").join(address.to_string())
    }

    fn tell(&self, path: &Path, text: &str) -> Result<(), HostError> {
        (self.write)(path, text).map_err(|cause| HostError::Io { path: path.to_owned(), cause })
    }

    /// All functions, by address.
    pub fn functions(&self) -> Result<Vec<Function>, HostError> {
        let path = self.path("sys/bus/pci/devices");
        let names = match names(&path) {
            Ok(names) => names,
            // A machine without PCI.
            Err(cause) if cause.kind() == io::ErrorKind::NotFound => Vec::new(),
            Err(cause) => return Err(HostError::Io { path, cause }),
        };
        let mut addresses: Vec<PciAddress> = names.iter().filter_map(|name| name.parse().ok()).collect();
        addresses.sort_unstable();
        let (interfaces, holders) = (self.interfaces(), self.holders());
        // One may go while the others are looked at.
        Ok(addresses.into_iter().filter_map(|address| self.read(address, &interfaces, &holders)).collect())
    }

    /// One function.
    pub fn function(&self, address: PciAddress) -> Result<Function, HostError> {
        self.read(address, &self.interfaces(), &self.holders()).ok_or(HostError::NoFunction(address))
    }

    /// Whether `vfio-pci` has this function; not if there is none. It costs no look at all processes, as [`function`](Self::function)
    /// does.
    pub fn is_bound(&self, address: PciAddress) -> bool {
        target(&self.of(address).join("driver")).as_deref() == Some(VFIO)
    }

    fn read(
        &self,
        address: PciAddress,
        interfaces: &[(PathBuf, Interface)],
        holders: &BTreeMap<PathBuf, Holder>,
    ) -> Option<Function> {
        let path = self.of(address);
        let (vendor, device) = (hex(&path.join("vendor"))? as u16, hex(&path.join("device"))? as u16);
        let place = fs::canonicalize(&path).ok()?;
        let group: Option<u32> = target(&path.join("iommu_group")).and_then(|name| name.parse().ok());
        let numbered = |prefix: &str, name: &str| {
            name.strip_prefix(prefix).is_some_and(|number| number.bytes().all(|byte| byte.is_ascii_digit()))
        };
        let entries = names(&path).unwrap_or_default();
        let cdevs = names(&path.join("vfio-dev")).unwrap_or_default();
        let group_file = group.map(|group| self.path("dev/vfio").join(group.to_string()));
        let files = cdevs.iter().map(|name| self.path("dev/vfio/devices").join(name)).chain(group_file);
        let methods = text(&path.join("reset_method")).unwrap_or_default();
        Some(Function {
            address,
            vendor,
            device,
            class: hex(&path.join("class")).unwrap_or(0),
            model: model(vendor, device),
            driver: target(&path.join("driver")),
            group,
            companions: group.map_or_else(Vec::new, |group| self.companions(group, address)),
            reset_methods: methods.split_whitespace().map(str::to_owned).collect(),
            interfaces: interfaces
                .iter()
                .filter(|(device, _)| device.starts_with(&place))
                .map(|(_, interface)| interface.clone())
                .collect(),
            physical: target(&path.join("physfn")).and_then(|name| name.parse().ok()),
            virtual_functions: entries.iter().filter(|name| numbered("virtfn", name)).count() as u32,
            remaps_interrupts: remaps_interrupts(&path.join("iommu")),
            holder: files.filter_map(|file| holders.get(&file).cloned()).next(),
        })
    }

    /// The others of a group. A bridge stays with its driver whoever has what is behind it.
    fn companions(&self, group: u32, but: PciAddress) -> Vec<Companion> {
        let members = names(&self.path("sys/kernel/iommu_groups").join(group.to_string()).join("devices"));
        let addresses = members.unwrap_or_default().into_iter().filter_map(|name| name.parse().ok());
        let mut companions: Vec<Companion> = addresses
            .filter(|&address| address != but)
            .filter(|&address| {
                hex(&self.of(address).join("class")).is_none_or(|class| (class >> 16) as u8 != BRIDGE)
            })
            .map(|address| Companion { address, driver: target(&self.of(address).join("driver")) })
            .collect();
        companions.sort_unstable_by_key(|companion| companion.address);
        companions
    }

    /// All interfaces that a device has made, and where in sysfs that device is.
    fn interfaces(&self) -> Vec<(PathBuf, Interface)> {
        let path = self.path("sys/class/net");
        let routes = text(&self.path("proc/net/route")).unwrap_or_default();
        let routes: Vec<&str> = routes.lines().filter_map(|line| line.split_whitespace().next()).collect();
        let six = text(&self.path("proc/net/if_inet6")).unwrap_or_default();
        // Address, index, prefix length, scope, flags, name. Each interface that is up has one of the link's own scope.
        let of_link = |words: &[&str]| words.get(3) == Some(&"20");
        let lines = six.lines().map(|line| line.split_whitespace().collect::<Vec<_>>());
        let six: Vec<&str> =
            lines.filter(|words| !of_link(words)).filter_map(|words| words.get(5).copied()).collect();
        let mut found = Vec::new();
        for name in names(&path).unwrap_or_default() {
            let path = path.join(&name);
            let Ok(device) = fs::canonicalize(path.join("device")) else { continue };
            let mut uppers: Vec<String> = names(&path)
                .unwrap_or_default()
                .iter()
                .filter_map(|entry| entry.strip_prefix("upper_").map(str::to_owned))
                .collect();
            uppers.sort_unstable();
            let addressed = routes.contains(&name.as_str()) || six.contains(&name.as_str());
            let up = hex(&path.join("flags")).unwrap_or(0) & 1 == 1;
            found.push((device, Interface { name, up, uppers, addressed }));
        }
        found.sort_unstable_by(|(_, a), (_, b)| a.name.cmp(&b.name));
        found
    }

    /// Who has which file of VFIO open, as far as this user can see.
    fn holders(&self) -> BTreeMap<PathBuf, Holder> {
        let (processes, files) = (self.path("proc"), self.path("dev/vfio"));
        let mut holders = BTreeMap::new();
        for pid in names(&processes).unwrap_or_default().iter().filter_map(|name| name.parse::<u32>().ok()) {
            let process = processes.join(pid.to_string());
            let descriptors = process.join("fd");
            for descriptor in names(&descriptors).unwrap_or_default() {
                let Ok(file) = fs::read_link(descriptors.join(descriptor)) else { continue };
                if file.starts_with(&files) {
                    let name = text(&process.join("comm")).unwrap_or_default().trim().to_owned();
                    holders.insert(file, Holder { pid: Some(pid), name });
                }
            }
        }
        holders
    }
}

/// Names in a directory.
fn names(path: &Path) -> io::Result<Vec<String>> {
    let entries = fs::read_dir(path)?;
    Ok(entries.filter_map(|entry| entry.ok()?.file_name().into_string().ok()).collect())
}

fn text(path: &Path) -> Option<String> {
    fs::read_to_string(path).ok()
}

/// The number in a file: hexadecimal, with or without 0x.
fn hex(path: &Path) -> Option<u32> {
    let text = text(path)?;
    let digits = text.trim();
    u32::from_str_radix(digits.strip_prefix("0x").unwrap_or(digits), 16).ok()
}

/// The name of what a link leads to.
fn target(link: &Path) -> Option<String> {
    fs::read_link(link).ok()?.file_name()?.to_str().map(str::to_owned)
}

/// Whether an IOMMU remaps interrupts: Intel's say so in bit 3 of their extended capabilities.
fn remaps_interrupts(iommu: &Path) -> Option<bool> {
    let text = text(&iommu.join("intel-iommu/ecap"))?;
    let capabilities = u64::from_str_radix(text.trim(), 16).ok()?;
    Some(capabilities & 1 << 3 != 0)
}
