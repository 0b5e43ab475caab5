//! Settings of a port as they are written: one table with the keys of every kind.

use super::{FileMode, Invalid, Kind, Mode, NicPlace, PortConfig, Socket, XdpChoice, XdpDevice};
use super::{default_max_masks, default_miss_rate, default_queues};
use serde::{Deserialize, Serialize};
use std::path::PathBuf;

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
    /// [`NicPlace::nic`].
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub nic: Option<String>,
    /// [`NicPlace::port`].
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub nic_port: Option<u32>,
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
    /// [`PortConfig::workers`].
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub workers: Option<Vec<u16>>,
}

impl Default for PortTable {
    fn default() -> PortTable {
        PortTable {
            name: String::new(),
            socket: None,
            kind: None,
            device: None,
            xdp_mode: None,
            nic: None,
            nic_port: None,
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
            workers: None,
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
    /// [`Kind::Nic`].
    Nic,
}

impl KindName {
    fn text(self) -> &'static str {
        match self {
            KindName::VhostUser => "vhost-user",
            KindName::Xdp => "xdp",
            KindName::Nic => "nic",
        }
    }
}

impl TryFrom<PortTable> for PortConfig {
    type Error = Invalid;

    /// Refuses keys that are missing, or of another kind of port.
    fn try_from(table: PortTable) -> Result<PortConfig, Invalid> {
        use KindName::{Nic, VhostUser, Xdp};
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
            ("nic", Nic, table.nic.is_some()),
            ("nic_port", Nic, table.nic_port.is_some()),
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
            Nic => {
                let Some(nic) = table.nic else {
                    return bad("nic", "missing key 'nic', the name of a [[nic]]".into());
                };
                let Some(port) = table.nic_port else {
                    return bad("nic_port", "missing key 'nic_port', the NIC's number for the port".into());
                };
                Kind::Nic(NicPlace { nic, port })
            }
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
            workers: table.workers,
        })
    }
}

impl From<PortConfig> for PortTable {
    fn from(port: PortConfig) -> PortTable {
        let PortConfig { name, kind, queues, mtu, vlan, trunks, native_vlan, max_masks, miss_rate, workers } =
            port;
        let common = PortTable {
            name,
            queues,
            mtu,
            vlan,
            trunks,
            native_vlan,
            max_masks,
            miss_rate,
            workers,
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
            Kind::Nic(NicPlace { nic, port }) => {
                PortTable { kind: Some(KindName::Nic), nic: Some(nic), nic_port: Some(port), ..common }
            }
        }
    }
}
