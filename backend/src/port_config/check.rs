//! What is acceptable as settings of a port: by itself, beside other ports, and under Open vSwitch.

use super::{Kind, MAX_NAME, MAX_QUEUES, MAX_SOCKET_PATH, Mode, PortConfig};
use std::fmt;
use std::path::Path;

/// Actions that are written as a bare word: a port of that name could not be told from them in a flow.
const ACTION_WORDS: [&str; 7] = ["drop", "ct", "ct_clear", "pop_vlan", "pop_eth", "pop_nsh", "dec_ttl"];

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

impl PortConfig {
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
            Kind::Nic(place) => {
                if let Err(reason) = check_name(&place.nic) {
                    return bad("nic", format!("nic: {reason}"));
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
        if let Some(workers) = &self.workers
            && !(1..=MAX_QUEUES as usize).contains(&workers.len())
        {
            let reason = match workers.len() {
                0 => "workers is empty: leave it out for workers to be chosen automatically".to_owned(),
                n => format!("workers has {n} entries: one for each of {MAX_QUEUES} queues is enough"),
            };
            return bad("workers", reason);
        }
        Ok(())
    }

    /// Refuses to pin queues to a worker that is not there, where there are so many.
    pub fn check_workers(&self, there: usize) -> Result<(), Invalid> {
        let Some(worker) = self.workers.iter().flatten().find(|&&worker| usize::from(worker) >= there) else {
            return Ok(());
        };
        let which = match there {
            1 => "only worker 0 is there".to_owned(),
            _ => format!("there are workers 0 to {}", there.saturating_sub(1)),
        };
        let reason = format!(
            "port '{}': workers: no worker {worker}, {which} (one for each of [datapath] cpus)",
            self.name
        );
        Err(Invalid { key: "workers", reason })
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
                (Kind::Nic(ours), Kind::Nic(theirs)) if ours == theirs => {
                    ("nic_port", format!("NIC port {ours}"))
                }
                _ => continue,
            };
            let reason = format!("port '{}': {what} belongs to port '{}' already", self.name, other.name);
            return Err(Invalid { key, reason });
        }
        Ok(())
    }

    /// Refuses a port of a NIC that is not among those of these names.
    pub fn check_nic<'a>(&self, there: impl IntoIterator<Item = &'a str>) -> Result<(), Invalid> {
        let Kind::Nic(place) = &self.kind else { return Ok(()) };
        if there.into_iter().any(|name| name == place.nic) {
            return Ok(());
        }
        let reason = format!("port '{}': {}", self.name, crate::nic::no_such_nic(&place.nic));
        Err(Invalid { key: "nic", reason })
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
pub(crate) fn check_name(name: &str) -> Result<(), String> {
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
