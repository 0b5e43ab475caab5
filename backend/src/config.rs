//! The configuration file of `pointworkd`: TOML, every key checked, errors with file and line.

mod nics;

use crate::nic::NicConfig;
use crate::ovs::jsonrpc::Remote;
use crate::port_config::{Invalid, PortConfig, PortTable, check_socket_path};
use nics::NicTable;
use serde::Deserialize;
use std::collections::HashSet;
use std::ffi::OsStr;
use std::fmt;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use toml::de::{DeTable, DeValue};

/// Where the control socket is if the configuration does not say.
pub const DEFAULT_CONTROL: &str = "/run/pointwork/control.sock";
/// Where the state file is if neither the configuration nor systemd (`StateDirectory=`) says.
pub const DEFAULT_STATE: &str = "/var/lib/pointwork/state.json";

/// A configuration that shows every key, for `pointworkd --help` and the documentation.
pub const SAMPLE: &str = r#"# Where `pointwork` reaches the daemon, and the group that may use it.
control = "/run/pointwork/control.sock"
#control_group = "pointwork"
# What add-port, del-port and add-flow change at run time is kept here
# (default: state.json in systemd's StateDirectory=, else in /var/lib/pointwork).
state = "/var/lib/pointwork/state.json"

[datapath]
cpus = [1]                # one worker per entry, numbered from 0; default: one worker, not pinned
l1_entries = 1048576      # flows in the exact-match table of a worker
rebalance = true          # let queues that are not pinned move from a worker that is short of time; false: they stay

[host]                    # who decides about packets without a flow
kind = "bridge"           # the embedded learning switch
mac_ageing = 300          # seconds without a packet until a MAC address is forgotten
mac_table_size = 8192     # MAC addresses that are remembered
#kind = "ovs"             # stock Open vSwitch: each port has a TAP of its name in a bridge
#bridge = "br0"           # where ports of this file and of add-port go; made by ovs-vsctl add-br
#db = "unix:/run/openvswitch/db.sock"   # the default; tcp:IP:PORT works too

# Under OVS this is a port of the bridge too, with a TAP of its name: vlan, trunks and native_vlan
# are its tag, trunks and vlan_mode there, and mtu is its mtu_request.
[[port]]
name = "vm1"              # 15 characters at most
socket = "/run/pointwork/vm1.sock"
mode = "server"           # we listen and QEMU connects; "client": QEMU listens (server=on), we reconnect for ever
queues = 1                # queue pairs, 1 to 8
#mtu = 1500               # 68 to 9216; default: 1500 without telling the guest
#vlan = 10                # an access port; default: a trunk of every VLAN
#socket_group = "kvm"     # group of the socket file, in server mode
#socket_mode = "0660"     # its permissions, in server mode
#max_masks = 256          # masks that this port's flows may have
#miss_rate = 10000        # packets per second that may go to the host for a decision
#workers = [0]            # pins queue n to worker number n of the list, and on from its start; default: automatic

[[port]]
name = "vm2"
socket = "/run/pointwork/vm2.sock"
mode = "client"
queues = 4
trunks = [10, 20]         # tagged frames of these VLANs only
native_vlan = 1           # where a trunk's untagged frames belong

[[port]]
name = "wire1"
kind = "xdp"              # a network device; default: "vhost-user", a guest
device = "eth1"           # default: as the port
#xdp_mode = "auto"        # or "zero-copy", "copy", "generic"

# A NIC that the daemon drives itself, bound to vfio-pci; its ports can be ports of the switch.
[[nic]]
name = "nic1"
pci = "0000:01:00.0"      # its function
#queues = 1               # receive queues of each port, 1 to 8, if it can have several; see docs/nic.md
#offload = true           # flows may be put into it, if it has tables; false: it only carries packets
#ignore_fragments = false # flows that name the fragment type are taken for all fragments
#max_rules = 256          # rules that may be in it; default: what its driver allows

[[port]]
name = "uplink1"
kind = "nic"
nic = "nic1"
nic_port = 1              # the NIC's number for it, as `pointwork show` lists them
"#;

/// What `pointworkd` is to do.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Config {
    /// Path of the control socket.
    pub control: PathBuf,
    /// Group of the control socket: a name of `/etc/group` or a number.
    pub control_group: Option<String>,
    /// Path of the state file, if given; see [`Config::state_path`].
    pub state: Option<PathBuf>,
    /// Workers and tables.
    pub datapath: Datapath,
    /// Who decides about packets without a flow.
    pub host: Host,
    /// NICs that the daemon drives, each valid, with different names and addresses.
    pub nics: Vec<NicConfig>,
    /// Ports, each valid, with different names, sockets, devices and ports of NICs.
    pub ports: Vec<PortConfig>,
}

/// Workers and their tables.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields, default, expecting = "a table")]
pub struct Datapath {
    /// CPUs to pin workers to, one each; empty for one worker that is not pinned.
    pub cpus: Vec<usize>,
    /// Flows that a worker's exact-match table is sized for.
    pub l1_entries: usize,
    /// Whether queues that are not pinned may move to another worker while the daemon runs.
    pub rebalance: bool,
}

impl Datapath {
    /// How many workers there are.
    pub fn workers(&self) -> usize {
        self.cpus.len().max(1)
    }
}

impl Default for Datapath {
    fn default() -> Datapath {
        Datapath { cpus: Vec::new(), l1_entries: 1 << 20, rebalance: true }
    }
}

/// Who decides about packets without a flow.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Host {
    /// The embedded learning switch.
    Bridge {
        /// Seconds without a packet until a MAC address is forgotten.
        mac_ageing: u32,
        /// MAC addresses that are remembered.
        mac_table_size: usize,
    },
    /// Stock Open vSwitch.
    Ovs {
        /// Name of the bridge that gets the representors.
        bridge: String,
        /// Address of the database server, in OVS's syntax.
        db: String,
    },
}

impl fmt::Display for Host {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Host::Bridge { .. } => "bridge",
            Host::Ovs { .. } => "ovs",
        })
    }
}

/// Why a configuration is refused: one line with file, line and reason.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ConfigError {
    file: PathBuf,
    line: Option<usize>,
    reason: String,
}

impl fmt::Display for ConfigError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.line {
            Some(line) => write!(f, "{}:{line}: {}", self.file.display(), self.reason),
            None => write!(f, "{}: {}", self.file.display(), self.reason),
        }
    }
}

impl std::error::Error for ConfigError {}

impl Config {
    /// Reads and checks a configuration file.
    pub fn load(file: &Path) -> Result<Config, ConfigError> {
        let text = std::fs::read_to_string(file).map_err(|error| ConfigError {
            file: file.to_owned(),
            line: None,
            reason: format!("cannot be read: {error}"),
        })?;
        Config::parse(&text, file)
    }

    /// Checks a configuration; `file` is for messages only.
    pub fn parse(text: &str, file: &Path) -> Result<Config, ConfigError> {
        let at = |line, reason| ConfigError { file: file.to_owned(), line, reason };
        let document: Document = toml::from_str(text).map_err(|error| {
            let line = error.span().map(|span| line_number(text, span.start));
            at(line, plain(error.message(), line.and_then(|line| text.lines().nth(line - 1))))
        })?;
        document.check().map_err(|(place, reason)| at(find(text, place), reason))
    }

    /// Path of the state file: the configured one, or `state.json` in systemd's state directory, or [`DEFAULT_STATE`].
    pub fn state_path(&self) -> PathBuf {
        self.state_path_in(std::env::var_os("STATE_DIRECTORY").as_deref())
    }

    /// `state_directory` may be several directories with colons between them (systemd.exec(5)); the first one counts.
    fn state_path_in(&self, state_directory: Option<&OsStr>) -> PathBuf {
        if let Some(path) = &self.state {
            return path.clone();
        }
        let first = state_directory.and_then(|list| list.as_bytes().split(|&b| b == b':').next());
        match first {
            Some(directory) if !directory.is_empty() => {
                Path::new(OsStr::from_bytes(directory)).join("state.json")
            }
            _ => PathBuf::from(DEFAULT_STATE),
        }
    }
}

/// The file as it is written.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Document {
    control: Option<PathBuf>,
    control_group: Option<String>,
    state: Option<PathBuf>,
    #[serde(default)]
    datapath: Datapath,
    host: Option<HostTable>,
    #[serde(default, rename = "nic")]
    nics: Vec<NicTable>,
    #[serde(default, rename = "port")]
    ports: Vec<PortTable>,
}

/// `[host]` with the keys of every kind.
#[derive(Deserialize)]
#[serde(deny_unknown_fields, expecting = "a table")]
struct HostTable {
    kind: HostKind,
    mac_ageing: Option<u32>,
    mac_table_size: Option<usize>,
    bridge: Option<String>,
    db: Option<String>,
}

#[derive(Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
enum HostKind {
    Bridge,
    Ovs,
}

/// Where in the file something is wrong.
#[derive(Clone, Copy)]
enum Place {
    /// A key outside tables.
    Top(&'static str),
    /// A table and a key in it.
    Table(&'static str, &'static str),
    /// A table of an array of tables, counted from 0, and a key in it.
    Entry(&'static str, usize, &'static str),
}

impl Document {
    fn check(self) -> Result<Config, (Place, String)> {
        let control = self.control.unwrap_or_else(|| PathBuf::from(DEFAULT_CONTROL));
        check_socket_path(&control)
            .map_err(|reason| (Place::Top("control"), format!("control socket {reason}")))?;
        if let Some(state) = &self.state
            && (!state.is_absolute() || state.file_name().is_none())
        {
            let reason = format!("state = '{}': must be the absolute path of a file", state.display());
            return Err((Place::Top("state"), reason));
        }
        self.datapath.check().map_err(|bad| (Place::Table("datapath", bad.key), bad.reason))?;
        let host = HostTable::check(self.host).map_err(|bad| (Place::Table("host", bad.key), bad.reason))?;
        let nics = nics::check(self.nics)
            .map_err(|(index, bad)| (Place::Entry("nic", index, bad.key), bad.reason))?;
        let mut ports: Vec<PortConfig> = Vec::with_capacity(self.ports.len());
        for (index, table) in self.ports.into_iter().enumerate() {
            let at = |bad: Invalid| (Place::Entry("port", index, bad.key), bad.reason);
            let port = PortConfig::try_from(table).map_err(at)?;
            port.validate().and_then(|()| port.check_unique(&ports)).map_err(at)?;
            port.check_workers(self.datapath.workers()).map_err(at)?;
            port.check_nic(nics.iter().map(|nic| nic.name.as_str())).map_err(at)?;
            if port.socket().is_some_and(|socket| socket.path == control) {
                let reason = format!("port '{}': its socket is the control socket", port.name);
                return Err((Place::Entry("port", index, "socket"), reason));
            }
            ports.push(port);
        }
        Ok(Config {
            control,
            control_group: self.control_group,
            state: self.state,
            datapath: self.datapath,
            host,
            nics,
            ports,
        })
    }
}

impl Datapath {
    fn check(&self) -> Result<(), Invalid> {
        /// `CPU_SETSIZE` of `sched.h`.
        const CPUS: usize = 1024;
        let mut seen = HashSet::new();
        for &cpu in &self.cpus {
            if cpu >= CPUS {
                return Err(Invalid { key: "cpus", reason: format!("cpus: there is no CPU {cpu}") });
            }
            if !seen.insert(cpu) {
                let reason = format!("cpus: CPU {cpu} is there twice, a worker needs it for itself");
                return Err(Invalid { key: "cpus", reason });
            }
        }
        if !(1 << 10..=1 << 26).contains(&self.l1_entries) {
            let reason = format!("l1_entries = {}: must be 1024 to 67108864", self.l1_entries);
            return Err(Invalid { key: "l1_entries", reason });
        }
        Ok(())
    }
}

impl HostTable {
    fn check(table: Option<HostTable>) -> Result<Host, Invalid> {
        let bad = |key, reason: String| Err(Invalid { key, reason });
        let Some(table) = table else {
            return Ok(Host::Bridge { mac_ageing: 300, mac_table_size: 8192 });
        };
        let given = [
            ("mac_ageing", HostKind::Bridge, table.mac_ageing.is_some()),
            ("mac_table_size", HostKind::Bridge, table.mac_table_size.is_some()),
            ("bridge", HostKind::Ovs, table.bridge.is_some()),
            ("db", HostKind::Ovs, table.db.is_some()),
        ];
        if let Some((key, ..)) = given.into_iter().find(|&(_, kind, given)| given && kind != table.kind) {
            let (this, other) = match table.kind {
                HostKind::Bridge => ("bridge", "ovs"),
                HostKind::Ovs => ("ovs", "bridge"),
            };
            return bad(key, format!("key '{key}' is for kind = \"{other}\", not \"{this}\""));
        }
        if table.kind == HostKind::Ovs {
            let Some(bridge) = table.bridge.filter(|name| !name.is_empty()) else {
                return bad("bridge", "kind = \"ovs\" needs 'bridge', the name of OVS's bridge".into());
            };
            let db = table.db.unwrap_or_else(|| "unix:/run/openvswitch/db.sock".into());
            if let Err(reason) = db.parse::<Remote>() {
                return bad("db", format!("db: {reason}"));
            }
            return Ok(Host::Ovs { bridge, db });
        }
        let mac_ageing = table.mac_ageing.unwrap_or(300);
        if !(1..=86_400).contains(&mac_ageing) {
            return bad("mac_ageing", format!("mac_ageing = {mac_ageing}: must be 1 to 86400 seconds"));
        }
        let mac_table_size = table.mac_table_size.unwrap_or(8192);
        if !(1..=1 << 20).contains(&mac_table_size) {
            return bad("mac_table_size", format!("mac_table_size = {mac_table_size}: must be 1 to 1048576"));
        }
        Ok(Host::Bridge { mac_ageing, mac_table_size })
    }
}

/// Line of the byte at `offset`, from 1.
fn line_number(text: &str, offset: usize) -> usize {
    let before = &text.as_bytes()[..offset.min(text.len())];
    1 + before.iter().filter(|&&b| b == b'\n').count()
}

/// The line of `place`: of the key itself, or of its table if the key is not given.
fn find(text: &str, place: Place) -> Option<usize> {
    let document = DeTable::parse(text).ok()?;
    let mut table = document.get_ref();
    let mut offset = None;
    let key = match place {
        Place::Top(key) => key,
        Place::Table(name, key) => {
            let (header, value) = table.get_key_value(name)?;
            offset = Some(header.span().start);
            table = value.get_ref().as_table()?;
            key
        }
        Place::Entry(name, index, key) => {
            let value = table.get(name).and_then(|entries| match entries.get_ref() {
                DeValue::Array(entries) => entries.get(index),
                _ => None,
            })?;
            offset = Some(value.span().start);
            table = value.get_ref().as_table()?;
            key
        }
    };
    let offset = table.get_key_value(key).map(|(key, _)| key.span().start).or(offset)?;
    Some(line_number(text, offset))
}

/// Puts a message of the deserializer into the words of this file's reader; `line` is the text that it is about.
fn plain(message: &str, line: Option<&str>) -> String {
    let mut text = message
        .replace('\n', " ")
        .replace("unknown field", "unknown key")
        .replace("missing field", "missing key")
        .replace("unknown variant", "unknown value")
        .replace('`', "'");
    for (rust, words) in [
        ("expected u16", "expected a number from 0 to 65535"),
        ("expected u32", "expected a number from 0 to 4294967295"),
        ("expected usize", "expected a number from 0"),
    ] {
        text = text.replace(rust, words);
    }
    let about_value = text.starts_with("invalid ") || text.starts_with("unknown value");
    match line.and_then(|line| line.split_once('=')) {
        Some((key, _)) if about_value => format!("{}: {text}", key.trim()),
        _ => text,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::port_config::{Kind, Mode, Socket};

    fn parse(text: &str) -> Result<Config, ConfigError> {
        Config::parse(text, Path::new("pointwork.toml"))
    }

    #[test]
    fn the_sample_is_valid_and_shows_the_defaults() {
        let config = parse(SAMPLE).unwrap();
        assert_eq!(config.datapath, Datapath { cpus: vec![1], ..Datapath::default() });
        assert_eq!(config.host, Host::Bridge { mac_ageing: 300, mac_table_size: 8192 });
        assert_eq!(config.control, Path::new(DEFAULT_CONTROL));
        assert_eq!(config.state_path_in(None), Path::new(DEFAULT_STATE));
        assert_eq!(config.ports[0], PortConfig::new("vm1", "/run/pointwork/vm1.sock"));
        assert_eq!(config.ports[1].socket().unwrap().mode, Mode::Client);
        assert_eq!(config.ports[2], PortConfig::wire("wire1", "eth1"));
        assert_eq!(config.ports[3], PortConfig::nic("uplink1", "nic1", 1));
        assert_eq!(config.ports[1].vlan_mode().to_string(), "trunk 10,20 native 1");
    }

    #[test]
    fn the_keys_that_the_sample_comments_out_are_valid() {
        let mut text: String = SAMPLE
            .lines()
            .map(|line| match line.strip_prefix('#') {
                Some(rest) if rest.starts_with(|c: char| c.is_ascii_lowercase()) => format!("{rest}\n"),
                _ => format!("{line}\n"),
            })
            .collect();
        for bridge_only in ["kind = \"bridge\"", "mac_ageing", "mac_table_size"] {
            text = text.replace(bridge_only, &format!("#{bridge_only}"));
        }
        let config = parse(&text).unwrap();
        assert_eq!(
            config.host,
            Host::Ovs { bridge: "br0".into(), db: "unix:/run/openvswitch/db.sock".into() }
        );
        let socket = Socket {
            group: Some("kvm".into()),
            permissions: Some(crate::port_config::FileMode(0o660)),
            ..Socket::new("/run/pointwork/vm1.sock")
        };
        let expected = PortConfig {
            mtu: Some(1500),
            vlan: Some(10),
            workers: Some(vec![0]),
            ..PortConfig::of("vm1", Kind::VhostUser(socket))
        };
        assert_eq!(config.ports[0], expected);
        assert_eq!(config.control_group.as_deref(), Some("pointwork"));
    }

    #[test]
    fn an_empty_file_is_a_bridge_without_ports() {
        let config = parse("").unwrap();
        assert_eq!(config.datapath, Datapath::default());
        assert!(matches!(config.host, Host::Bridge { .. }));
        assert!(config.ports.is_empty());
    }

    #[test]
    fn the_state_file_follows_systemd() {
        let config = parse("").unwrap();
        let path = |env: Option<&str>| config.state_path_in(env.map(OsStr::new));
        assert_eq!(path(Some("/var/lib/pw")), Path::new("/var/lib/pw/state.json"));
        assert_eq!(path(Some("/a:/b")), Path::new("/a/state.json"));
        assert_eq!(path(Some("")), Path::new(DEFAULT_STATE));
        let config = parse("state = '/x/y'").unwrap();
        assert_eq!(config.state_path_in(Some(OsStr::new("/a"))), Path::new("/x/y"));
    }

    #[test]
    fn errors_are_one_line_with_file_line_and_reason() {
        const VM: &str = "[[port]]\nname = 'vm1'\nsocket = '/run/vm1'\n";
        let cases: &[(&str, usize, &str)] = &[
            ("control = '/c'\nports = 3\n", 2, "unknown key 'ports', expected one of 'control', "),
            (
                "[[port]]\nname = 'a'\n\nsokcet = '/x'\n",
                4,
                "unknown key 'sokcet', expected one of 'name', 'socket'",
            ),
            (
                "[datapath]\ncpu = [1]\n",
                2,
                "unknown key 'cpu', expected one of 'cpus', 'l1_entries', 'rebalance'",
            ),
            ("[datapath]\nrebalance = 1\n", 2, "rebalance: invalid type: integer '1', expected a boolean"),
            (
                &format!("[datapath]\ncpus = [3, 5]\n{VM}workers = [0, 2]\n"),
                6,
                "port 'vm1': workers: no worker 2, there are workers 0 to 1",
            ),
            (&format!("{VM}workers = [1]\n"), 4, "workers: no worker 1, only worker 0 is there"),
            (&format!("{VM}workers = []\n"), 4, "workers is empty"),
            ("[host]\nkind = 'bridge'\nageing = 1\n", 3, "unknown key 'ageing'"),
            ("[host]\nkind = 'linux'\n", 2, "kind: unknown value 'linux', expected 'bridge' or 'ovs'"),
            ("[host]\nmac_ageing = 10\n", 1, "missing key 'kind'"),
            ("[[port]]\nsocket = '/x'\n", 1, "missing key 'name'"),
            ("[[port]]\nname = 'a'\n", 1, "missing key 'socket'"),
            (
                "[[port]]\nname = 'a'\nkind = 'tap'\n",
                3,
                "kind: unknown value 'tap', expected one of 'vhost-user', 'xdp', 'nic'",
            ),
            (&format!("{VM}device = 'eth1'\n"), 4, "key 'device' is for kind = \"xdp\", not \"vhost-user\""),
            (
                "[[port]]\nname = 'a'\nkind = 'xdp'\nsocket = '/a'\n",
                4,
                "key 'socket' is for kind = \"vhost-user\", not \"xdp\"",
            ),
            ("[[port]]\nname = 'a'\nkind = 'xdp'\nmtu = 9000\n", 4, "key 'mtu' is for"),
            ("[[port]]\nname = 'a'\nkind = 'xdp'\ndevice = 'a b'\n", 4, "device 'a b'"),
            (
                "[[port]]\nname = 'a'\nkind = 'xdp'\nxdp_mode = 'best'\n",
                4,
                "xdp_mode: unknown value 'best', expected one of 'auto', 'zero-copy', 'copy', 'generic'",
            ),
            (
                "\n\n[[port]]\nname = 'a'\nsocket = '/x'\nqueues = 'two'\n",
                6,
                "queues: invalid type: string \"two\", expected a number from 0 to 65535",
            ),
            (
                "[[port]]\nname = 'a'\nsocket = '/x'\nqueues = -1\n",
                4,
                "queues: invalid value: integer '-1', expected a number",
            ),
            (
                "[[port]]\nname = 'a'\nsocket = '/x'\nqueues = 70000\n",
                4,
                "queues: invalid value: integer '70000'",
            ),
            ("[[port]]\nname = 7\nsocket = '/x'\n", 2, "name: invalid type: integer '7', expected a string"),
            (
                "[[port]]\nname = 'a'\nsocket = '/x'\nmode = 'serve'\n",
                4,
                "mode: unknown value 'serve', expected 'server' or 'client'",
            ),
            ("[[port]]\nname = 'a'\nsocket = '/x'\nsocket_mode = '999'\n", 4, "'999' is not a file mode"),
            ("[port]\nname = 'a'\n", 1, "invalid type: map, expected a sequence"),
            ("datapath = 3\n", 1, "datapath: invalid type: integer '3', expected a table"),
            ("control = '/c'\ncontrol = '/d'\n", 2, "duplicate key"),
            ("control = /c\n", 1, "control"),
            ("control = ''\n", 1, "control socket path is empty"),
            ("\ncontrol = 'c.sock'\n", 2, "control socket path c.sock must be absolute"),
            ("state = 'state.json'\n", 1, "must be the absolute path of a file"),
            ("[datapath]\n\ncpus = [1, 2, 1]\n", 3, "cpus: CPU 1 is there twice"),
            ("[datapath]\ncpus = [4096]\n", 2, "cpus: there is no CPU 4096"),
            ("[datapath]\nl1_entries = 7\n", 2, "l1_entries = 7: must be 1024 to"),
            ("[host]\nkind = 'bridge'\ndb = 'unix:x'\n", 3, "key 'db' is for kind = \"ovs\", not \"bridge\""),
            (
                "[host]\nkind = 'ovs'\nbridge = 'b'\nmac_ageing = 1\n",
                4,
                "key 'mac_ageing' is for kind = \"bridge\"",
            ),
            (
                "[host]\nkind = 'ovs'\nbridge = 'b'\ndb = 'db.sock'\n",
                4,
                "db: 'db.sock': unix:PATH or tcp:IP:PORT",
            ),
            ("control = '/c'\n[host]\nkind = 'ovs'\n", 2, "needs 'bridge'"),
            ("[host]\nkind = 'bridge'\nmac_ageing = 0\n", 3, "mac_ageing = 0: must be 1 to 86400"),
            ("[host]\nkind = 'bridge'\nmac_table_size = 0\n", 3, "mac_table_size = 0"),
            (&format!("{VM}queues = 0\n"), 4, "port 'vm1': queues = 0: must be 1 to 8"),
            (&format!("{VM}{VM}"), 5, "port 'vm1': there is a port of this name already"),
            (
                &format!("{VM}{}", VM.replace("name = 'vm1'", "name = 'vm2'")),
                6,
                "port 'vm2': socket /run/vm1 belongs to port 'vm1'",
            ),
            (&format!("control = '/run/vm1'\n{VM}"), 4, "port 'vm1': its socket is the control socket"),
            (
                &VM.replace("'vm1'", "'a-very-long-port-name'"),
                2,
                "port 'a-very-long-port-name': the name has 21 characters",
            ),
            ("[[nic]]\nname = 'n'\n", 1, "missing key 'pci'"),
            ("[[nic]]\nname = 'n'\npci = '01:00.0'\n", 3, "nic 'n': pci: '01:00.0' is not the address"),
            (
                "[[port]]\nname = 'a'\nkind = 'nic'\nnic = 'n'\nnic_port = 1\n",
                4,
                "port 'a': there is no NIC 'n' in the configuration file",
            ),
            (
                "port = [\n {name = 'a', socket = '/a'},\n {name = 'b', socket = '/b', queues = 9},\n]",
                3,
                "port 'b': queues = 9",
            ),
        ];
        for (text, line, reason) in cases {
            let error = parse(text).expect_err(text).to_string();
            let prefix = format!("pointwork.toml:{line}: ");
            assert!(error.starts_with(&prefix), "'{error}' does not start with '{prefix}'");
            if *reason != "control" {
                assert!(error.contains(reason), "'{error}' does not say '{reason}'");
            }
            assert!(!error.contains('\n'), "'{error}' is several lines");
        }
    }

    #[test]
    fn a_file_that_cannot_be_read_is_named() {
        let error = Config::load(Path::new("/nonexistent/pointwork.toml")).unwrap_err().to_string();
        assert!(error.starts_with("/nonexistent/pointwork.toml: cannot be read: No such file"), "{error}");
    }
}
