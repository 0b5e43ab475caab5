//! Our ports as the database of Open vSwitch has them: which interfaces are ours, with what settings, and what else is
//! configured there that the fast path would bypass.
//!
//! An interface is ours if its `external_ids` have `pointwork-socket`, or `pointwork-device` for a wire, or `pointwork-nic` for a
//! port of a NIC. The other settings of a port have the names that they have in the configuration file, behind `pointwork-` and
//! with dashes.

use super::ovsdb::{Interface, Port, PortRow, Snapshot};
use crate::port_config::{Kind, Mode, PortConfig, Socket, XdpChoice, XdpDevice};
use std::collections::BTreeMap;
use std::str::FromStr;

/// What all our keys of `external_ids` begin with; nobody else has such.
pub const PREFIX: &str = "pointwork-";

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

/// What makes an interface ours, if anything does.
fn kind(interface: &Interface) -> Option<Result<Kind, String>> {
    let ids = &interface.external_ids;
    match (ids.get("pointwork-socket"), ids.get("pointwork-device"), ids.get("pointwork-nic")) {
        (Some(socket), ..) => Some(Ok(Kind::VhostUser(Socket::new(socket)))),
        (None, Some(device), _) => {
            Some(Ok(Kind::Xdp(XdpDevice { name: device.clone(), mode: XdpChoice::default() })))
        }
        (None, None, Some(place)) => {
            let place = place.parse().map(Kind::Nic);
            Some(place.map_err(|reason| format!("external_ids:{PREFIX}nic: {reason}")))
        }
        (None, None, None) => None,
    }
}

/// What is wrong with interfaces that are none of ours and have settings of ours: the one that matters may be misspelt, or
/// have been removed alone.
pub fn strays(snapshot: &Snapshot) -> Vec<String> {
    let ports = snapshot.bridges.values().flat_map(|bridge| bridge.ports.values());
    let foreign = ports.flat_map(|port| port.interfaces.values()).filter(|one| kind(one).is_none());
    let stray = |interface: &Interface| {
        let keys = interface.external_ids.keys().filter(|key| key.starts_with(PREFIX));
        let keys: Vec<String> = keys.map(|key| key.escape_debug().to_string()).collect();
        (!keys.is_empty()).then(|| {
            format!(
                "interface '{}': external_ids:{} without {PREFIX}socket, {PREFIX}device or {PREFIX}nic: it is no port of ours",
                interface.name.escape_debug(),
                keys.join(" and ")
            )
        })
    };
    foreign.filter_map(stray).collect()
}

/// The interfaces of ours, by name.
pub fn ours(snapshot: &Snapshot) -> BTreeMap<String, OvsPort> {
    let mut ours = BTreeMap::new();
    for bridge in snapshot.bridges.values() {
        for port in bridge.ports.values() {
            for interface in port.interfaces.values() {
                let Some(kind) = kind(interface) else { continue };
                let policed =
                    interface.ingress_policing_rate > 0 || interface.ingress_policing_kpkts_rate > 0;
                let config = kind
                    .and_then(|kind| config(kind, interface, port))
                    .map_err(|reason| format!("port '{}': {reason}", interface.name.escape_debug()))
                    .and_then(|config| match config.validate() {
                        Ok(()) => Ok(config),
                        Err(invalid) => Err(invalid.reason),
                    });
                let ours_now = OvsPort {
                    config,
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

/// The settings of an interface of this kind, not yet checked as a whole.
fn config(kind: Kind, interface: &Interface, port: &Port) -> Result<PortConfig, String> {
    if !interface.kind.is_empty() && interface.kind != "system" {
        return Err(format!(
            "type {}: leave the interface's type empty, the port makes its device itself",
            interface.kind
        ));
    }
    let mut config = PortConfig::of(&interface.name, kind);
    for (key, value) in &interface.external_ids {
        let Some(key) = key.strip_prefix(PREFIX) else { continue };
        match (key, &mut config.kind) {
            ("socket", Kind::VhostUser(_)) | ("device", Kind::Xdp(_)) | ("nic", Kind::Nic(_)) => {}
            ("mode", Kind::VhostUser(socket)) => socket.mode = word(key, value)?,
            ("socket-group", Kind::VhostUser(socket)) => socket.group = Some(value.clone()),
            ("socket-mode", Kind::VhostUser(socket)) => socket.permissions = Some(number(key, value)?),
            ("xdp-mode", Kind::Xdp(device)) => device.mode = word(key, value)?,
            ("queues", _) => config.queues = Some(number(key, value)?),
            ("max-masks", _) => config.max_masks = number(key, value)?,
            ("miss-rate", _) => config.miss_rate = number(key, value)?,
            ("workers", _) => config.workers = Some(numbers(key, value)?),
            _ => return Err(format!("external_ids:{PREFIX}{key}: there is no such setting")),
        }
    }
    if config.socket().is_some() {
        config.mtu = interface.mtu_request.map(|mtu| u16::try_from(mtu).unwrap_or(u16::MAX));
    }
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

fn word<T: clap::ValueEnum>(key: &str, value: &str) -> Result<T, String> {
    T::from_str(value, false).map_err(|_| {
        let words = T::value_variants().iter().filter_map(T::to_possible_value);
        let words: Vec<String> = words.map(|word| word.get_name().to_owned()).collect();
        format!("external_ids:{PREFIX}{key}={value}: {} expected", words.join(" or "))
    })
}

fn number<T: FromStr>(key: &str, value: &str) -> Result<T, String> {
    value.parse().map_err(|_| format!("external_ids:{PREFIX}{key}={value}: not a value that it can have"))
}

fn numbers(key: &str, value: &str) -> Result<Vec<u16>, String> {
    value.split(',').map(|number| number.trim().parse().ok()).collect::<Option<_>>().ok_or_else(|| {
        format!("external_ids:{PREFIX}{key}={value}: numbers expected, with commas between them")
    })
}

/// The key of a port's workers, and its value.
pub const WORKERS: &str = "pointwork-workers";

/// Workers as the database has them.
pub fn workers_text(workers: &[u16]) -> String {
    workers.iter().map(u16::to_string).collect::<Vec<_>>().join(",")
}

/// The rows that make a port with these settings.
pub fn row(config: &PortConfig) -> PortRow {
    let default = PortConfig::of(&config.name, config.kind.clone());
    let mut ids = BTreeMap::new();
    let mut set = |key: &str, value: String| ids.insert(format!("{PREFIX}{key}"), value);
    match &config.kind {
        Kind::VhostUser(socket) => {
            set("socket", socket.path.display().to_string());
            if socket.mode != Mode::default() {
                set("mode", socket.mode.to_string());
            }
            if let Some(group) = &socket.group {
                set("socket-group", group.clone());
            }
            if let Some(mode) = socket.permissions {
                set("socket-mode", mode.to_string());
            }
        }
        Kind::Xdp(device) => {
            set("device", device.name.clone());
            if device.mode != XdpChoice::default() {
                set("xdp-mode", device.mode.to_string());
            }
        }
        Kind::Nic(place) => {
            set("nic", place.to_string());
        }
    }
    if let Some(queues) = config.queues.filter(|_| config.queues != default.queues) {
        set("queues", queues.to_string());
    }
    if config.max_masks != default.max_masks {
        set("max-masks", config.max_masks.to_string());
    }
    if config.miss_rate != default.miss_rate {
        set("miss-rate", config.miss_rate.to_string());
    }
    if let Some(workers) = &config.workers {
        ids.insert(WORKERS.to_owned(), workers_text(workers));
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

/// Whether a port need not be opened anew to have these settings: only what the bridge does with it differs, or its workers, or
/// the MTU, which its representor tells, and which a guest can be offered only when it connects.
pub fn same_device(a: &PortConfig, b: &PortConfig) -> bool {
    let bare = |config: &PortConfig| PortConfig {
        vlan: None,
        trunks: None,
        native_vlan: None,
        mtu: None,
        workers: None,
        ..config.clone()
    };
    bare(a) == bare(b)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ovs::ovsdb::Bridge;

    /// What [`ours`] makes of an interface with these `external_ids`, and of whether it is one of ours.
    fn read(
        kind: &str,
        ids: &[(&str, &str)],
        mtu_request: Option<u32>,
    ) -> Option<Result<PortConfig, String>> {
        ours(&snapshot(kind, ids, mtu_request)).remove("vm1").map(|port| port.config)
    }

    fn snapshot(kind: &str, ids: &[(&str, &str)], mtu_request: Option<u32>) -> Snapshot {
        let interface = Interface {
            name: "vm1".into(),
            kind: kind.into(),
            options: BTreeMap::new(),
            external_ids: ids.iter().map(|&(key, value)| (key.into(), value.into())).collect(),
            ofport: None,
            error: None,
            ingress_policing_rate: 0,
            ingress_policing_kpkts_rate: 0,
            mtu: None,
            mtu_request,
            ifindex: None,
        };
        let port = Port {
            name: "vm1".into(),
            tag: Some(5),
            trunks: vec![10, 20],
            vlan_mode: Some("native-untagged".into()),
            qos: None,
            interfaces: BTreeMap::from([("vm1".into(), interface)]),
        };
        let bridge = Bridge {
            name: "br0".into(),
            uuid: "u".into(),
            datapath_type: "netdev".into(),
            mirrors: false,
            sflow: false,
            ipfix: false,
            netflow: false,
            ports: BTreeMap::from([("vm1".into(), port)]),
        };
        let bridges = BTreeMap::from([("br0".into(), bridge)]);
        Snapshot { bridges, ..Snapshot::default() }
    }

    #[test]
    fn settings_of_no_port_are_told() {
        let strays = |ids| strays(&snapshot("", ids, None));
        assert_eq!(
            strays(&[("iface-id", "x"), ("pointwork-queues", "2"), ("pointwork-sokcet", "/a")]),
            [
                "interface 'vm1': external_ids:pointwork-queues and pointwork-sokcet without pointwork-socket, \
              pointwork-device or pointwork-nic: it is no port of ours"
            ]
        );
        assert!(strays(&[("iface-id", "x")]).is_empty());
        assert!(strays(&[("pointwork-socket", "/a"), ("pointwork-queue", "2")]).is_empty(), "it is ours");
    }

    #[test]
    fn every_key_is_read_and_comes_back_in_the_rows() {
        let ids = [
            ("other", "x"),
            ("pointwork-max-masks", "7"),
            ("pointwork-miss-rate", "8"),
            ("pointwork-mode", "server"),
            ("pointwork-queues", "2"),
            ("pointwork-socket", "/run/vm1.sock"),
            ("pointwork-socket-group", "kvm"),
            ("pointwork-socket-mode", "0600"),
            ("pointwork-workers", "0,3,1"),
        ];
        let config = read("", &ids, Some(1400)).unwrap().unwrap();
        let expected = PortConfig {
            kind: Kind::VhostUser(Socket {
                group: Some("kvm".into()),
                permissions: Some("0600".parse().unwrap()),
                ..Socket::new("/run/vm1.sock")
            }),
            queues: Some(2),
            mtu: Some(1400),
            trunks: Some(vec![10, 20]),
            native_vlan: Some(5),
            max_masks: 7,
            miss_rate: 8,
            workers: Some(vec![0, 3, 1]),
            ..PortConfig::new("vm1", "/run/vm1.sock")
        };
        assert_eq!(config, expected);
        let row = row(&config);
        let without_defaults = |(key, _): &&(&str, &str)| !["other", "pointwork-mode"].contains(key);
        let written =
            ids.iter().filter(without_defaults).map(|&(key, value)| (key.to_owned(), value.to_owned()));
        assert_eq!(row.external_ids, written.collect());
        assert_eq!((row.tag, row.trunks, row.mtu_request), (Some(5), vec![10, 20], Some(1400)));
        assert_eq!(row.vlan_mode.as_deref(), Some("native-untagged"));
    }

    #[test]
    fn a_port_of_a_nic_is_read_and_comes_back_in_the_rows() {
        let config = read("", &[("pointwork-nic", "n1/2")], Some(1400)).unwrap().unwrap();
        let expected = PortConfig {
            trunks: Some(vec![10, 20]),
            native_vlan: Some(5),
            ..PortConfig::nic("vm1", "n1", 2)
        };
        assert_eq!(config, expected);
        let written = BTreeMap::from([("pointwork-nic".to_owned(), "n1/2".to_owned())]);
        assert_eq!((row(&config).external_ids, row(&config).mtu_request), (written, None));
    }

    #[test]
    fn every_complaint_names_the_port_once() {
        let socket = ("pointwork-socket", "/run/vm1.sock");
        let cases = [
            (
                read("", &[socket, ("pointwork-queue", "2")], None),
                "external_ids:pointwork-queue: there is no such",
            ),
            (
                read("", &[socket, ("pointwork-queues", "x")], None),
                "external_ids:pointwork-queues=x: not a value",
            ),
            (read("", &[socket, ("pointwork-queues", "99")], None), "queues = 99: must be"),
            (
                read("", &[socket, ("pointwork-mode", "both")], None),
                "external_ids:pointwork-mode=both: server or",
            ),
            (
                read("", &[socket, ("pointwork-workers", "0;1")], None),
                "external_ids:pointwork-workers=0;1: numbers expected",
            ),
            (read("internal", &[socket], None), "type internal: leave"),
            (read("", &[("pointwork-nic", "n")], None), "external_ids:pointwork-nic: 'n' is not NIC/PORT"),
            (
                read("", &[("pointwork-nic", "n/1"), ("pointwork-mode", "client")], None),
                "external_ids:pointwork-mode: there is no such",
            ),
            (read("", &[("pointwork-socket", "vm1.sock")], None), "socket path vm1.sock must be absolute"),
            (read("", &[socket], Some(9)), "mtu = 9: must be"),
        ];
        for (read, reason) in cases {
            let said = read.unwrap().unwrap_err();
            assert!(said.starts_with(&format!("port 'vm1': {reason}")), "{said}");
        }
        assert!(read("", &[("pointwork-queues", "2")], None).is_none(), "not ours");
    }
}
