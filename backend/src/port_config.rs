//! Settings of one port: a `[[port]]` of the configuration file, an `add-port` request, a line of the state file.

mod check;
mod table;
#[cfg(test)]
mod tests;

use crate::xdp::XdpMode;
use serde::{Deserialize, Deserializer, Serialize, Serializer, de};
use std::fmt;
use std::path::PathBuf;

pub use check::Invalid;
pub(crate) use check::{check_name, check_socket_path};
pub use table::{KindName, PortTable};

/// Longest name of a network interface (`IFNAMSIZ` of `linux/if.h` without the zero byte).
pub const MAX_NAME: usize = 15;
/// Longest path of a Unix socket (`sun_path` of `unix(7)` without the zero byte).
pub const MAX_SOCKET_PATH: usize = 107;
/// Queue pairs that a port may have.
pub const MAX_QUEUES: u16 = 8;
/// MTU of a port that does not say otherwise.
pub const DEFAULT_MTU: u16 = 1500;
/// Permissions of a port's socket file: its owner and its group may connect.
pub const DEFAULT_SOCKET_MODE: FileMode = FileMode(0o660);

/// Which side of a port's socket listens.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, clap::ValueEnum)]
#[serde(rename_all = "lowercase")]
pub enum Mode {
    /// The daemon listens and QEMU connects.
    #[default]
    Server,
    /// QEMU listens (`server=on`) and the daemon connects, again and again for ever.
    Client,
}

impl fmt::Display for Mode {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Mode::Server => "server",
            Mode::Client => "client",
        })
    }
}

/// Permission bits of a file, written as text in octal: `"0660"`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FileMode(pub u32);

impl std::str::FromStr for FileMode {
    type Err = String;

    fn from_str(text: &str) -> Result<FileMode, String> {
        match u32::from_str_radix(text, 8) {
            Ok(bits) if bits <= 0o777 && !text.starts_with('+') => Ok(FileMode(bits)),
            _ => Err(format!("'{text}' is not a file mode in octal such as \"0660\"")),
        }
    }
}

impl fmt::Display for FileMode {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:04o}", self.0)
    }
}

impl Serialize for FileMode {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for FileMode {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<FileMode, D::Error> {
        String::deserialize(deserializer)?.parse().map_err(de::Error::custom)
    }
}

/// What the embedded bridge does with VLAN tags of a port.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum VlanMode {
    /// In this VLAN, without tags on the wire.
    Access(u16),
    /// Tagged frames of several VLANs.
    Trunk {
        /// The VLANs; `None` means every VLAN.
        vlans: Option<Vec<u16>>,
        /// The VLAN of untagged frames; 0 is the switch's own untagged VLAN.
        native: u16,
    },
}

impl fmt::Display for VlanMode {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            VlanMode::Access(vlan) => write!(f, "access {vlan}"),
            VlanMode::Trunk { vlans, native } => {
                match vlans {
                    None => f.write_str("trunk all")?,
                    Some(vlans) => {
                        let list: Vec<String> = vlans.iter().map(u16::to_string).collect();
                        write!(f, "trunk {}", list.join(","))?;
                    }
                }
                if *native != 0 { write!(f, " native {native}") } else { Ok(()) }
            }
        }
    }
}

/// How packets are to get from a device to us.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, clap::ValueEnum)]
#[serde(rename_all = "kebab-case")]
pub enum XdpChoice {
    /// In the best way that works.
    #[default]
    Auto,
    /// As [`XdpMode::ZeroCopy`].
    ZeroCopy,
    /// As [`XdpMode::Copy`].
    Copy,
    /// As [`XdpMode::Generic`].
    Generic,
}

impl XdpChoice {
    /// The one way that is wanted; `None`: the best that works.
    pub fn mode(self) -> Option<XdpMode> {
        match self {
            XdpChoice::Auto => None,
            XdpChoice::ZeroCopy => Some(XdpMode::ZeroCopy),
            XdpChoice::Copy => Some(XdpMode::Copy),
            XdpChoice::Generic => Some(XdpMode::Generic),
        }
    }
}

impl fmt::Display for XdpChoice {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.mode() {
            None => f.write_str("auto"),
            Some(mode) => mode.fmt(f),
        }
    }
}

/// A vhost-user socket.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Socket {
    /// Absolute path.
    pub path: PathBuf,
    /// Which side listens.
    pub mode: Mode,
    /// Group of the file: a name of `/etc/group` or a number. Server mode only.
    pub group: Option<String>,
    /// Permissions of the file, [`DEFAULT_SOCKET_MODE`] if not given. Server mode only.
    pub permissions: Option<FileMode>,
}

impl Socket {
    /// With default settings.
    pub fn new(path: impl Into<PathBuf>) -> Socket {
        Socket { path: path.into(), mode: Mode::default(), group: None, permissions: None }
    }

    /// Permissions of the file.
    pub fn permissions(&self) -> FileMode {
        self.permissions.unwrap_or(DEFAULT_SOCKET_MODE)
    }
}

/// A network device that is a port through AF_XDP.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct XdpDevice {
    /// Name of the device.
    pub name: String,
    /// How packets get to us.
    pub mode: XdpChoice,
}

/// A port of a NIC that the daemon drives itself. Written `NIC/PORT`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NicPlace {
    /// Name of the NIC in the configuration file.
    pub nic: String,
    /// The NIC's number for the port.
    pub port: u32,
}

impl std::str::FromStr for NicPlace {
    type Err = String;

    fn from_str(text: &str) -> Result<NicPlace, String> {
        let wrong = || format!("'{}' is not NIC/PORT, such as nic1/1", text.escape_debug());
        let (nic, port) = text.split_once('/').ok_or_else(wrong)?;
        let digits = !port.is_empty() && port.bytes().all(|b| b.is_ascii_digit());
        let port = port.parse().ok().filter(|_| digits && !nic.is_empty()).ok_or_else(wrong)?;
        Ok(NicPlace { nic: nic.to_owned(), port })
    }
}

impl fmt::Display for NicPlace {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.nic, self.port)
    }
}

/// What a port's packets come from and go to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Kind {
    /// A guest.
    VhostUser(Socket),
    /// A network device.
    Xdp(XdpDevice),
    /// A port of a NIC.
    Nic(NicPlace),
}

/// One port.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "PortTable", into = "PortTable")]
pub struct PortConfig {
    /// Name, also of its representor: a network interface name of at most [`MAX_NAME`] characters.
    pub name: String,
    /// What is behind it.
    pub kind: Kind,
    /// Queue pairs, 1 to [`MAX_QUEUES`]; `None`: those that the device has. See [`PortConfig::queues`].
    pub queues: Option<u16>,
    /// Longest packet towards the guest without Ethernet header and VLAN tag, in bytes; see [`PortConfig::mtu`]. Of a
    /// device or NIC, its own counts.
    pub mtu: Option<u16>,
    /// Makes an access port of this VLAN.
    pub vlan: Option<u16>,
    /// Makes a trunk of these VLANs; a port with neither `vlan` nor `trunks` carries every VLAN.
    pub trunks: Option<Vec<u16>>,
    /// VLAN of a trunk's untagged frames.
    pub native_vlan: Option<u16>,
    /// Subtables (masks) of the port's own table: a guest that needs more is slowed alone.
    pub max_masks: u32,
    /// Packets per second of this port that may miss and go to the host.
    pub miss_rate: u32,
    /// The workers that its queue pairs are pinned to: queue n to entry n, and from the first again if there are fewer. `None`:
    /// each to the worker that has the least to do.
    pub workers: Option<Vec<u16>>,
}

fn default_queues(kind: &Kind) -> Option<u16> {
    match kind {
        Kind::VhostUser(_) | Kind::Nic(_) => Some(1),
        Kind::Xdp(_) => None,
    }
}

fn default_max_masks() -> u32 {
    256
}

fn default_miss_rate() -> u32 {
    10_000
}

impl PortConfig {
    /// A guest's port with default settings.
    pub fn new(name: impl Into<String>, socket: impl Into<PathBuf>) -> PortConfig {
        PortConfig::of(name, Kind::VhostUser(Socket::new(socket)))
    }

    /// A device as a port, with default settings.
    pub fn wire(name: impl Into<String>, device: impl Into<String>) -> PortConfig {
        PortConfig::of(name, Kind::Xdp(XdpDevice { name: device.into(), mode: XdpChoice::Auto }))
    }

    /// A port of a NIC, with default settings.
    pub fn nic(name: impl Into<String>, nic: impl Into<String>, port: u32) -> PortConfig {
        PortConfig::of(name, Kind::Nic(NicPlace { nic: nic.into(), port }))
    }

    /// A port of this kind with default settings.
    pub fn of(name: impl Into<String>, kind: Kind) -> PortConfig {
        PortConfig {
            name: name.into(),
            queues: default_queues(&kind),
            kind,
            mtu: None,
            vlan: None,
            trunks: None,
            native_vlan: None,
            max_masks: default_max_masks(),
            miss_rate: default_miss_rate(),
            workers: None,
        }
    }

    /// Its vhost-user socket, if it is a guest's port.
    pub fn socket(&self) -> Option<&Socket> {
        match &self.kind {
            Kind::VhostUser(socket) => Some(socket),
            Kind::Xdp(_) | Kind::Nic(_) => None,
        }
    }

    /// Its device, if it is a wire.
    pub fn device(&self) -> Option<&XdpDevice> {
        match &self.kind {
            Kind::VhostUser(_) | Kind::Nic(_) => None,
            Kind::Xdp(device) => Some(device),
        }
    }

    /// Queue pairs that there can be. A device uses those of them that it has.
    pub fn queues(&self) -> u16 {
        self.queues.unwrap_or(MAX_QUEUES)
    }

    /// The worker that a queue pair is pinned to, where the user has pinned it to one of `workers`. Where one of them is not
    /// there, none counts; see [`PortConfig::check_workers`].
    pub fn pinned_to(&self, queue: usize, workers: usize) -> Option<usize> {
        let pins =
            self.workers.as_ref().filter(|pins| !pins.is_empty() && self.check_workers(workers).is_ok())?;
        Some(pins[queue % pins.len()].into())
    }

    /// The MTU that is enforced on the way to the guest, in bytes: `mtu`, or [`DEFAULT_MTU`].
    ///
    /// Only an `mtu` that was given is offered to the guest (`VIRTIO_NET_F_MTU`, virtio 1.2 §5.1.3): a guest that was told
    /// nothing uses 1500 itself, and one that is told 1500 could no longer choose to receive more later.
    pub fn mtu(&self) -> u16 {
        self.mtu.unwrap_or(DEFAULT_MTU)
    }

    /// What the embedded bridge does with VLAN tags.
    pub fn vlan_mode(&self) -> VlanMode {
        match self.vlan {
            Some(vlan) => VlanMode::Access(vlan),
            None => VlanMode::Trunk { vlans: self.trunks.clone(), native: self.native_vlan.unwrap_or(0) },
        }
    }

    /// Whether it is a wire that has the name of its device.
    pub fn is_own_device(&self) -> bool {
        self.device().is_some_and(|device| device.name == self.name)
    }
}
