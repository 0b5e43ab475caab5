//! Settings of one port: a `[[port]]` of the configuration file, an `add-port` request, a line of the state file.

use crate::xdp::XdpMode;
use serde::{Deserialize, Deserializer, Serialize, Serializer, de};
use std::fmt;
use std::path::{Path, PathBuf};

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

/// Actions that are written as a bare word: a port of that name could not be told from them in a flow.
const ACTION_WORDS: [&str; 7] = ["drop", "ct", "ct_clear", "pop_vlan", "pop_eth", "pop_nsh", "dec_ttl"];

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

/// A setting that is not acceptable.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Invalid {
    /// The key in the configuration file.
    pub key: &'static str,
    /// What is wrong, in one line that names the port and the key.
    pub reason: String,
}

impl fmt::Display for Invalid {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.reason)
    }
}

impl std::error::Error for Invalid {}

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

/// What a port's packets come from and go to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Kind {
    /// A guest.
    VhostUser(Socket),
    /// A network device.
    Xdp(XdpDevice),
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
    /// device, its own counts.
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
}

/// A port as it is written, with the keys of every kind.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields, expecting = "a table of port settings")]
pub struct PortTable {
    /// [`PortConfig::name`].
    pub name: String,
    /// Of a guest: [`Socket::path`].
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub socket: Option<PathBuf>,
    /// What is behind it; a guest if not given.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub kind: Option<KindName>,
    /// [`XdpDevice::name`]; the name of the port if not given.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub device: Option<String>,
    /// [`XdpDevice::mode`].
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub xdp_mode: Option<XdpChoice>,
    /// [`Socket::mode`].
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub mode: Option<Mode>,
    /// [`PortConfig::queues`].
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub queues: Option<u16>,
    /// [`PortConfig::mtu`], of a guest.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub mtu: Option<u16>,
    /// [`PortConfig::vlan`].
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub vlan: Option<u16>,
    /// [`PortConfig::trunks`].
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub trunks: Option<Vec<u16>>,
    /// [`PortConfig::native_vlan`].
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub native_vlan: Option<u16>,
    /// [`Socket::group`].
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub socket_group: Option<String>,
    /// [`Socket::permissions`].
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub socket_mode: Option<FileMode>,
    /// [`PortConfig::max_masks`].
    #[serde(default = "default_max_masks")]
    pub max_masks: u32,
    /// [`PortConfig::miss_rate`].
    #[serde(default = "default_miss_rate")]
    pub miss_rate: u32,
}

impl Default for PortTable {
    fn default() -> PortTable {
        PortTable {
            name: String::new(),
            socket: None,
            kind: None,
            device: None,
            xdp_mode: None,
            mode: None,
            queues: None,
            mtu: None,
            vlan: None,
            trunks: None,
            native_vlan: None,
            socket_group: None,
            socket_mode: None,
            max_masks: default_max_masks(),
            miss_rate: default_miss_rate(),
        }
    }
}

/// The kinds by name.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, clap::ValueEnum)]
#[serde(rename_all = "kebab-case")]
pub enum KindName {
    /// [`Kind::VhostUser`].
    #[default]
    VhostUser,
    /// [`Kind::Xdp`].
    Xdp,
}

impl KindName {
    fn text(self) -> &'static str {
        match self {
            KindName::VhostUser => "vhost-user",
            KindName::Xdp => "xdp",
        }
    }
}

impl TryFrom<PortTable> for PortConfig {
    type Error = Invalid;

    /// Refuses keys that are missing, or of another kind of port.
    fn try_from(table: PortTable) -> Result<PortConfig, Invalid> {
        use KindName::{VhostUser, Xdp};
        let bad = |key: &'static str, reason: String| {
            Err(Invalid { key, reason: format!("port '{}': {reason}", table.name.escape_debug()) })
        };
        let kind = table.kind.unwrap_or_default();
        let given = [
            ("socket", VhostUser, table.socket.is_some()),
            ("mode", VhostUser, table.mode.is_some()),
            ("mtu", VhostUser, table.mtu.is_some()),
            ("socket_group", VhostUser, table.socket_group.is_some()),
            ("socket_mode", VhostUser, table.socket_mode.is_some()),
            ("device", Xdp, table.device.is_some()),
            ("xdp_mode", Xdp, table.xdp_mode.is_some()),
        ];
        if let Some((key, of, _)) = given.into_iter().find(|&(_, of, given)| given && of != kind) {
            let (of, kind) = (of.text(), kind.text());
            return bad(key, format!("key '{key}' is for kind = \"{of}\", not \"{kind}\""));
        }
        let kind = match kind {
            VhostUser => {
                let Some(path) = table.socket else {
                    return bad("socket", "missing key 'socket', the path of its vhost-user socket".into());
                };
                let mode = table.mode.unwrap_or_default();
                Kind::VhostUser(Socket {
                    path,
                    mode,
                    group: table.socket_group,
                    permissions: table.socket_mode,
                })
            }
            Xdp => Kind::Xdp(XdpDevice {
                name: table.device.unwrap_or_else(|| table.name.clone()),
                mode: table.xdp_mode.unwrap_or_default(),
            }),
        };
        Ok(PortConfig {
            name: table.name,
            queues: table.queues.or(default_queues(&kind)),
            kind,
            mtu: table.mtu,
            vlan: table.vlan,
            trunks: table.trunks,
            native_vlan: table.native_vlan,
            max_masks: table.max_masks,
            miss_rate: table.miss_rate,
        })
    }
}

impl From<PortConfig> for PortTable {
    fn from(port: PortConfig) -> PortTable {
        let PortConfig { name, kind, queues, mtu, vlan, trunks, native_vlan, max_masks, miss_rate } = port;
        let common = PortTable {
            name,
            queues,
            mtu,
            vlan,
            trunks,
            native_vlan,
            max_masks,
            miss_rate,
            ..PortTable::default()
        };
        match kind {
            Kind::VhostUser(Socket { path, mode, group, permissions }) => PortTable {
                socket: Some(path),
                mode: Some(mode),
                socket_group: group,
                socket_mode: permissions,
                ..common
            },
            Kind::Xdp(XdpDevice { name, mode }) => {
                PortTable { kind: Some(KindName::Xdp), device: Some(name), xdp_mode: Some(mode), ..common }
            }
        }
    }
}

fn default_queues(kind: &Kind) -> Option<u16> {
    match kind {
        Kind::VhostUser(_) => Some(1),
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
        }
    }

    /// Its vhost-user socket, if it is a guest's port.
    pub fn socket(&self) -> Option<&Socket> {
        match &self.kind {
            Kind::VhostUser(socket) => Some(socket),
            Kind::Xdp(_) => None,
        }
    }

    /// Its device, if it is a wire.
    pub fn device(&self) -> Option<&XdpDevice> {
        match &self.kind {
            Kind::VhostUser(_) => None,
            Kind::Xdp(device) => Some(device),
        }
    }

    /// Queue pairs that there can be. A device uses those of them that it has.
    pub fn queues(&self) -> u16 {
        self.queues.unwrap_or(MAX_QUEUES)
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

    /// Checks everything that one port's settings can have wrong by themselves.
    pub fn validate(&self) -> Result<(), Invalid> {
        let bad = |key: &'static str, reason: String| {
            Err(Invalid { key, reason: format!("port '{}': {reason}", self.name.escape_debug()) })
        };
        if let Err(reason) = check_name(&self.name) {
            return bad("name", reason);
        }
        match &self.kind {
            Kind::VhostUser(socket) => {
                if let Err(reason) = check_socket_path(&socket.path) {
                    return bad("socket", format!("socket {reason}"));
                }
                for (key, given) in
                    [("socket_group", socket.group.is_some()), ("socket_mode", socket.permissions.is_some())]
                {
                    if given && socket.mode == Mode::Client {
                        return bad(key, format!("{key}: in client mode the socket file is QEMU's"));
                    }
                }
            }
            Kind::Xdp(device) => {
                if let Err(reason) = check_device(&device.name) {
                    return bad("device", reason);
                }
            }
        }
        if let Some(queues) = self.queues
            && !(1..=MAX_QUEUES).contains(&queues)
        {
            return bad("queues", format!("queues = {queues}: must be 1 to {MAX_QUEUES}"));
        }
        if let Some(mtu) = self.mtu
            && !(68..=9216).contains(&mtu)
        {
            return bad("mtu", format!("mtu = {mtu}: must be 68 to 9216"));
        }
        if self.vlan.is_some() && self.trunks.is_some() {
            return bad(
                "trunks",
                "vlan and trunks exclude each other: is it an access port or a trunk?".into(),
            );
        }
        if self.vlan.is_some() && self.native_vlan.is_some() {
            return bad("native_vlan", "native_vlan is for trunks, vlan makes an access port".into());
        }
        if let Some(trunks) = &self.trunks
            && trunks.is_empty()
        {
            return bad("trunks", "trunks is empty: leave it out for a trunk of every VLAN".into());
        }
        let vlans = [("vlan", self.vlan), ("native_vlan", self.native_vlan)]
            .into_iter()
            .filter_map(|(key, vlan)| Some((key, vlan?)))
            .chain(self.trunks.iter().flatten().map(|&vlan| ("trunks", vlan)));
        for (key, vlan) in vlans {
            if !(1..=4094).contains(&vlan) {
                return bad(key, format!("{key}: VLAN {vlan} does not exist, 1 to 4094 do"));
            }
        }
        if !(1..=4096).contains(&self.max_masks) {
            return bad("max_masks", format!("max_masks = {}: must be 1 to 4096", self.max_masks));
        }
        if !(1..=10_000_000).contains(&self.miss_rate) {
            return bad("miss_rate", format!("miss_rate = {}: must be 1 to 10000000", self.miss_rate));
        }
        Ok(())
    }

    /// Refuses a port whose name or socket one of `others` has.
    pub fn check_unique<'a>(&self, others: impl IntoIterator<Item = &'a PortConfig>) -> Result<(), Invalid> {
        for other in others {
            if other.name == self.name {
                let reason = format!("port '{}': there is a port of this name already", self.name);
                return Err(Invalid { key: "name", reason });
            }
            let (key, what) = match (&self.kind, &other.kind) {
                (Kind::VhostUser(ours), Kind::VhostUser(theirs)) if ours.path == theirs.path => {
                    ("socket", format!("socket {}", ours.path.display()))
                }
                (Kind::Xdp(ours), Kind::Xdp(theirs)) if ours.name == theirs.name => {
                    ("device", format!("device {}", ours.name))
                }
                _ => continue,
            };
            let reason = format!("port '{}': {what} belongs to port '{}' already", self.name, other.name);
            return Err(Invalid { key, reason });
        }
        Ok(())
    }

    /// Whether it is a wire that has the name of its device.
    pub fn is_own_device(&self) -> bool {
        self.device().is_some_and(|device| device.name == self.name)
    }

    /// Refuses what cannot be under Open vSwitch. A wire under the userspace datapath has a representor of the port's name,
    /// which is not free if it is the device's; under the kernel's the device itself is the port.
    pub fn check_under_ovs(&self, userspace: bool) -> Result<(), Invalid> {
        let Some(device) = self.device().filter(|_| self.is_own_device() == userspace) else { return Ok(()) };
        let (name, device) = (&self.name, &device.name);
        let reason = match userspace {
            true => format!(
                "port '{name}': under Open vSwitch's userspace datapath a wire needs a name of its own for its representor, other than its device's: name = \"wire1\", device = \"{device}\""
            ),
            false => format!(
                "port '{name}': under Open vSwitch's kernel datapath a wire has the name of its device, which itself is the port of the bridge: name = \"{device}\" (another name needs datapath_type=netdev)"
            ),
        };
        Err(Invalid { key: "name", reason })
    }
}

/// Refuses what is no name of a network interface (`dev_valid_name()`, `net/core/dev.c`).
fn check_device(name: &str) -> Result<(), String> {
    let forbidden = |c: char| c == '/' || c == ':' || c.is_whitespace() || c.is_control();
    if name.is_empty() || name == "." || name == ".." || name.len() > MAX_NAME || name.contains(forbidden) {
        let shown = name.escape_debug();
        return Err(format!("device '{shown}': a network device has a name of 1 to {MAX_NAME} characters"));
    }
    Ok(())
}

/// Refuses what is no name of a network interface (`dev_valid_name()`, `net/core/dev.c`) or is ambiguous in a flow.
fn check_name(name: &str) -> Result<(), String> {
    let ordinary = |c: char| c.is_ascii_alphanumeric() || matches!(c, '_' | '-' | '.');
    if name.is_empty() {
        return Err("the name is empty".into());
    }
    if name.len() > MAX_NAME {
        return Err(format!("the name has {} characters, {MAX_NAME} are allowed", name.len()));
    }
    if let Some(c) = name.chars().find(|&c| !ordinary(c)) {
        return Err(format!("{c:?} in the name: use letters, digits, '_', '-' and '.'"));
    }
    if name.starts_with('-') {
        return Err("the name starts with '-'".into());
    }
    if !name.contains(|c: char| c.is_ascii_alphabetic()) {
        return Err("the name needs a letter: in flows, a number means a port's slot".into());
    }
    if ACTION_WORDS.contains(&name) {
        return Err("the name is the word for an action in flows".into());
    }
    Ok(())
}

/// Refuses what cannot be a socket's address.
pub(crate) fn check_socket_path(path: &Path) -> Result<(), String> {
    let Some(text) = path.to_str() else {
        return Err(format!("path {} is not UTF-8", path.display()));
    };
    if text.is_empty() {
        return Err("path is empty".into());
    }
    if text.contains('\0') {
        return Err("path has a zero byte".into());
    }
    if !path.is_absolute() {
        return Err(format!("path {text} must be absolute"));
    }
    if text.len() > MAX_SOCKET_PATH {
        return Err(format!("path has {} bytes, {MAX_SOCKET_PATH} are allowed: {text}", text.len()));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn socket(port: &mut PortConfig) -> &mut Socket {
        match &mut port.kind {
            Kind::VhostUser(socket) => socket,
            Kind::Xdp(_) => unreachable!("it is a guest's"),
        }
    }

    fn port(change: impl FnOnce(&mut PortConfig)) -> PortConfig {
        let mut port = PortConfig::new("vm1", "/run/vm1.sock");
        change(&mut port);
        port
    }

    #[test]
    fn refuses_bad_settings_by_port_and_key() {
        type Case = (fn(&mut PortConfig), &'static str, &'static str);
        let cases: &[Case] = &[
            (|p| p.name = "".into(), "name", "port '': the name is empty"),
            (|p| p.name = "sixteen-letters-".into(), "name", "16 characters, 15 are allowed"),
            (|p| p.name = "a b".into(), "name", "' ' in the name"),
            (|p| p.name = "a/b".into(), "name", "'/' in the name"),
            (|p| p.name = "a\nb".into(), "name", r"'\n' in the name"),
            (|p| p.name = "-x".into(), "name", "starts with '-'"),
            (|p| p.name = "..".into(), "name", "needs a letter"),
            (|p| p.name = "12".into(), "name", "needs a letter"),
            (|p| p.name = "drop".into(), "name", "the word for an action"),
            (|p| socket(p).path = "".into(), "socket", "port 'vm1': socket path is empty"),
            (|p| socket(p).path = "vm1.sock".into(), "socket", "must be absolute"),
            (|p| socket(p).path = "/a\0b".into(), "socket", "zero byte"),
            (
                |p| socket(p).path = format!("/{}", "x".repeat(107)).into(),
                "socket",
                "108 bytes, 107 are allowed",
            ),
            (|p| p.queues = Some(0), "queues", "port 'vm1': queues = 0: must be 1 to 8"),
            (|p| p.queues = Some(9), "queues", "queues = 9"),
            (|p| p.mtu = Some(67), "mtu", "mtu = 67: must be 68 to 9216"),
            (|p| p.mtu = Some(9217), "mtu", "mtu = 9217"),
            (|p| p.vlan = Some(0), "vlan", "VLAN 0 does not exist"),
            (|p| p.vlan = Some(4095), "vlan", "VLAN 4095"),
            (|p| p.trunks = Some(vec![10, 4095]), "trunks", "VLAN 4095"),
            (|p| p.trunks = Some(vec![]), "trunks", "leave it out"),
            (|p| p.native_vlan = Some(5000), "native_vlan", "VLAN 5000"),
            (|p| (p.vlan, p.trunks) = (Some(1), Some(vec![2])), "trunks", "exclude each other"),
            (|p| (p.vlan, p.native_vlan) = (Some(1), Some(2)), "native_vlan", "is for trunks"),
            (
                |p| {
                    (socket(p).mode, socket(p).permissions) = (Mode::Client, Some(FileMode(0o600)));
                },
                "socket_mode",
                "file is QEMU's",
            ),
            (
                |p| {
                    (socket(p).mode, socket(p).group) = (Mode::Client, Some("kvm".into()));
                },
                "socket_group",
                "file is QEMU's",
            ),
            (|p| p.max_masks = 0, "max_masks", "max_masks = 0"),
            (|p| p.miss_rate = 0, "miss_rate", "miss_rate = 0"),
        ];
        for (change, key, reason) in cases {
            let invalid = port(change).validate().expect_err(reason);
            assert_eq!(invalid.key, *key);
            assert!(invalid.reason.contains(reason), "'{}' does not say '{reason}'", invalid.reason);
            assert!(!invalid.reason.contains('\n'));
        }
    }

    #[test]
    fn accepts_the_limits() {
        let cases: &[fn(&mut PortConfig)] = &[
            |p| p.name = "fifteen-letters".into(),
            |p| p.name = "vhost0.1_a".into(),
            |p| socket(p).path = format!("/{}", "x".repeat(106)).into(),
            |p| p.queues = Some(8),
            |p| p.mtu = Some(68),
            |p| p.mtu = Some(9216),
            |p| p.vlan = Some(4094),
            |p| (p.trunks, p.native_vlan) = (Some(vec![1, 4094]), Some(7)),
        ];
        for change in cases {
            assert_eq!(port(change).validate(), Ok(()));
        }
    }

    #[test]
    fn names_and_sockets_are_unique() {
        let (a, b) = (PortConfig::new("a", "/a"), PortConfig::new("b", "/b"));
        assert_eq!(a.check_unique([&b]), Ok(()));
        let same_name = PortConfig::new("a", "/c").check_unique([&b, &a]).unwrap_err();
        assert_eq!(
            (same_name.key, &*same_name.reason),
            ("name", "port 'a': there is a port of this name already")
        );
        let same_socket = PortConfig::new("c", "/b").check_unique([&a, &b]).unwrap_err();
        assert_eq!(
            (same_socket.key, &*same_socket.reason),
            ("socket", "port 'c': socket /b belongs to port 'b' already")
        );
    }

    #[test]
    fn vlan_modes() {
        assert_eq!(port(|p| p.vlan = Some(7)).vlan_mode().to_string(), "access 7");
        assert_eq!(port(|_| ()).vlan_mode(), VlanMode::Trunk { vlans: None, native: 0 });
        assert_eq!(port(|p| p.native_vlan = Some(3)).vlan_mode().to_string(), "trunk all native 3");
        assert_eq!(port(|p| p.trunks = Some(vec![10, 20])).vlan_mode().to_string(), "trunk 10,20");
    }

    #[test]
    fn file_modes_are_octal_text() {
        assert_eq!("0660".parse(), Ok(FileMode(0o660)));
        assert_eq!(FileMode(0o600).to_string(), "0600");
        for text in ["", "0888", "1777", "+60", "-1", "rw"] {
            text.parse::<FileMode>().expect_err(text);
        }
        let json = serde_json::to_string(&port(|p| socket(p).permissions = Some(FileMode(0o666)))).unwrap();
        assert!(json.contains(r#""socket_mode":"0666""#));
        let read = serde_json::from_str::<PortConfig>(&json).unwrap();
        assert_eq!(read.socket().unwrap().permissions(), FileMode(0o666));
    }

    #[test]
    fn a_wire_has_a_device_and_no_socket() {
        let read = |json: &str| serde_json::from_str::<PortConfig>(json).map_err(|error| error.to_string());
        let wire = read(r#"{"name":"eth1","kind":"xdp"}"#).unwrap();
        assert_eq!(wire, PortConfig::wire("eth1", "eth1"));
        assert_eq!((wire.queues(), wire.validate()), (MAX_QUEUES, Ok(())));
        let again = serde_json::to_string(&wire).unwrap();
        assert_eq!(read(&again).unwrap(), wire);
        for (json, reason) in [
            (r#"{"name":"a"}"#, "port 'a': missing key 'socket'"),
            (
                r#"{"name":"a","socket":"/a","device":"b"}"#,
                r#"'device' is for kind = "xdp", not "vhost-user""#,
            ),
            (
                r#"{"name":"a","kind":"xdp","socket":"/a"}"#,
                r#"'socket' is for kind = "vhost-user", not "xdp""#,
            ),
            (r#"{"name":"a","kind":"xdp","mtu":9000}"#, "'mtu' is for"),
            (r#"{"name":"a","kind":"xdp","xdp_mode":"best"}"#, "unknown variant `best`"),
            (r#"{"name":"a","kind":"tap"}"#, "unknown variant `tap`"),
        ] {
            let error = read(json).unwrap_err();
            assert!(error.contains(reason), "{error}");
        }
        for device in ["", "sixteen-letters-", "a b", "a/b", ".."] {
            assert_eq!(PortConfig::wire("w", device).validate().unwrap_err().key, "device", "{device:?}");
        }
        let twice = PortConfig::wire("w", "eth1").check_unique([&PortConfig::wire("v", "eth1")]).unwrap_err();
        assert_eq!(
            (twice.key, &*twice.reason),
            ("device", "port 'w': device eth1 belongs to port 'v' already")
        );
        let other = PortConfig::wire("w", "eth1");
        assert!(other.check_under_ovs(true).is_ok() && wire.check_under_ovs(false).is_ok());
        let refused =
            [wire.check_under_ovs(true), other.check_under_ovs(false)].map(|check| check.unwrap_err());
        assert!(
            refused[0].reason.contains("a name of its own")
                && refused[1].reason.contains("the name of its device")
        );
    }
}
