//! Our ports as the database of Open vSwitch has them: which interfaces are ours, with what settings, and what else is
//! configured there that the fast path would bypass.
//!
//! An interface is ours if its `external_ids` have `pointwork-socket`. The other settings of a port have the names that
//! they have in the configuration file, behind `pointwork-` and with dashes.

use super::ovsdb::{Interface, Port, PortRow, Snapshot};
use crate::port_config::PortConfig;
use std::collections::BTreeMap;
use std::path::PathBuf;
use std::str::FromStr;

/// What all our keys of `external_ids` begin with.
const PREFIX: &str = "pointwork-";

/// An interface of ours.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct OvsPort {
    /// Its settings, or why they are not acceptable.
    pub config: Result<PortConfig, String>,
    /// The bridge that it is on.
    pub bridge: String,
    /// The datapath type of that bridge.
    pub datapath_type: String,
    /// Why its guest's packets must take the host path.
    pub ingress: Option<String>,
    /// Why packets to its guest must take the host path.
    pub egress: Option<String>,
    /// Why OVS cannot use its representor.
    pub error: Option<String>,
}

/// The interfaces of ours, by name.
pub fn ours(snapshot: &Snapshot) -> BTreeMap<String, OvsPort> {
    let mut ours = BTreeMap::new();
    for bridge in snapshot.bridges.values() {
        for port in bridge.ports.values() {
            for interface in port.interfaces.values() {
                let Some(socket) = interface.external_ids.get("pointwork-socket") else { continue };
                let policed =
                    interface.ingress_policing_rate > 0 || interface.ingress_policing_kpkts_rate > 0;
                let ours_now = OvsPort {
                    config: config(socket, interface, port),
                    bridge: bridge.name.clone(),
                    datapath_type: bridge.datapath_type.clone(),
                    ingress: policed.then(|| "ingress policing".to_owned()),
                    egress: port.qos.as_ref().map(|kind| format!("QoS {kind}")),
                    error: interface.error.clone(),
                };
                ours.insert(interface.name.clone(), ours_now);
            }
        }
    }
    ours
}

/// The settings of an interface with this socket, or one line that names the port and says what is wrong.
fn config(socket: &str, interface: &Interface, port: &Port) -> Result<PortConfig, String> {
    let config = settings(socket, interface, port)
        .map_err(|reason| format!("port '{}': {reason}", interface.name.escape_debug()))?;
    config.validate().map_err(|error| error.reason)?;
    Ok(config)
}

fn settings(socket: &str, interface: &Interface, port: &Port) -> Result<PortConfig, String> {
    if !interface.kind.is_empty() && interface.kind != "system" {
        return Err(format!(
            "type {}: leave the interface's type empty, the port makes its device itself",
            interface.kind
        ));
    }
    let mut config = PortConfig::new(&interface.name, PathBuf::from(socket));
    for (key, value) in &interface.external_ids {
        let Some(key) = key.strip_prefix(PREFIX) else { continue };
        match key {
            "socket" => {}
            "mode" => {
                config.mode = match value.as_str() {
                    "server" => crate::port_config::Mode::Server,
                    "client" => crate::port_config::Mode::Client,
                    _ => {
                        return Err(format!("external_ids:{PREFIX}{key}={value}: server or client expected"));
                    }
                }
            }
            "queues" => config.queues = number(key, value)?,
            "socket-group" => config.socket_group = Some(value.clone()),
            "socket-mode" => config.socket_mode = Some(number(key, value)?),
            "max-masks" => config.max_masks = number(key, value)?,
            "miss-rate" => config.miss_rate = number(key, value)?,
            _ => return Err(format!("external_ids:{PREFIX}{key}: there is no such setting")),
        }
    }
    config.mtu = interface.mtu_request.map(|mtu| u16::try_from(mtu).unwrap_or(u16::MAX));
    // Only shown: VLANs are the bridge's business.
    match port.vlan_mode.as_deref() {
        None | Some("access") if port.tag.is_some_and(|tag| tag > 0) => config.vlan = port.tag,
        _ => {
            config.trunks = (!port.trunks.is_empty()).then(|| port.trunks.clone());
            config.native_vlan = port.tag.filter(|&tag| tag > 0);
        }
    }
    Ok(config)
}

fn number<T: FromStr>(key: &str, value: &str) -> Result<T, String> {
    value.parse().map_err(|_| format!("external_ids:{PREFIX}{key}={value}: not a value that it can have"))
}

/// The rows that make a port with these settings.
pub fn row(config: &PortConfig) -> PortRow {
    let default = PortConfig::new(&config.name, &config.socket);
    let mut ids = BTreeMap::new();
    let mut set = |key: &str, value: String| ids.insert(format!("{PREFIX}{key}"), value);
    set("socket", config.socket.display().to_string());
    if config.mode != default.mode {
        set("mode", config.mode.to_string());
    }
    if config.queues != default.queues {
        set("queues", config.queues.to_string());
    }
    if let Some(group) = &config.socket_group {
        set("socket-group", group.clone());
    }
    if let Some(mode) = config.socket_mode {
        set("socket-mode", mode.to_string());
    }
    if config.max_masks != default.max_masks {
        set("max-masks", config.max_masks.to_string());
    }
    if config.miss_rate != default.miss_rate {
        set("miss-rate", config.miss_rate.to_string());
    }
    let native = config.native_vlan.is_some();
    PortRow {
        name: config.name.clone(),
        external_ids: ids,
        tag: config.vlan.or(config.native_vlan),
        trunks: config.trunks.clone().unwrap_or_default(),
        vlan_mode: native.then(|| "native-untagged".to_owned()),
        mtu_request: config.mtu.map(u32::from),
    }
}

/// Whether a port need not be opened anew to have these settings: only what the bridge does with it differs.
pub fn same_device(a: &PortConfig, b: &PortConfig) -> bool {
    let bare =
        |config: &PortConfig| PortConfig { vlan: None, trunks: None, native_vlan: None, ..config.clone() };
    bare(a) == bare(b)
}
