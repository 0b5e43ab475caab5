//! What the database says at one moment, typed.

use super::rows::{self, Row, Rows};
use std::collections::BTreeMap;
use std::time::Duration;

/// The configuration of Open vSwitch at one moment, as far as it matters here.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Snapshot {
    /// The version of Open vSwitch, where its start script has put it there.
    pub ovs_version: Option<String>,
    /// `other_config` of the table Open_vSwitch.
    pub other_config: BTreeMap<String, String>,
    /// Bridges by name.
    pub bridges: BTreeMap<String, Bridge>,
}

/// A row of the table Bridge.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Bridge {
    /// Its name, also that of its local port.
    pub name: String,
    /// Its row, which tells it from another that had the name before.
    pub uuid: String,
    /// `system` for the kernel's datapath (also where the database says nothing), `netdev` for the userspace datapath.
    pub datapath_type: String,
    /// Whether it has mirrors.
    pub mirrors: bool,
    /// Whether it samples for sFlow.
    pub sflow: bool,
    /// Whether it samples for IPFIX.
    pub ipfix: bool,
    /// Whether it exports NetFlow.
    pub netflow: bool,
    /// Ports by name.
    pub ports: BTreeMap<String, Port>,
}

/// A row of the table Port.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Port {
    /// Its name.
    pub name: String,
    /// Its access VLAN, or native VLAN.
    pub tag: Option<u16>,
    /// VLANs that it trunks, ascending; empty for all.
    pub trunks: Vec<u16>,
    /// `access`, `trunk`, `native-tagged`, `native-untagged` or `dot1q-tunnel`; none where it follows from the rest.
    pub vlan_mode: Option<String>,
    /// The type of its QoS, such as `linux-htb`.
    pub qos: Option<String>,
    /// Its interfaces by name: one, or those of a bond.
    pub interfaces: BTreeMap<String, Interface>,
}

/// A row of the table Interface.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Interface {
    /// Its name.
    pub name: String,
    /// `internal`, `vxlan` and the like; empty for a device of the system.
    pub kind: String,
    /// What a device of its kind is to be like: `dst_port`, `remote_ip` and so on of a tunnel.
    pub options: BTreeMap<String, String>,
    /// Pairs that others have put there, such as `iface-id`.
    pub external_ids: BTreeMap<String, String>,
    /// Its OpenFlow port; none until ovs-vswitchd has opened the device, or if it cannot.
    pub ofport: Option<u32>,
    /// Why ovs-vswitchd cannot open it.
    pub error: Option<String>,
    /// Ingress policing in kbit/s; 0 is off.
    pub ingress_policing_rate: u64,
    /// Ingress policing in 1000 packets/s; 0 is off.
    pub ingress_policing_kpkts_rate: u64,
    /// The device's MTU in bytes, as ovs-vswitchd has seen it.
    pub mtu: Option<u32>,
    /// The MTU in bytes that ovs-vswitchd is to set.
    pub mtu_request: Option<u32>,
    /// The device's index, 0 if ovs-vswitchd sees none.
    pub ifindex: Option<u32>,
}

impl Snapshot {
    /// The snapshot of `rows`. References to rows that are not there are left out.
    pub(super) fn new(rows: &Rows) -> Snapshot {
        // The table has one row, or none in a fresh database.
        let Some(root) = rows.all("Open_vSwitch").next() else { return Snapshot::default() };
        Snapshot {
            ovs_version: rows::string(root, "ovs_version"),
            other_config: rows::map(root, "other_config"),
            bridges: rows
                .referred("Bridge", root, "bridges")
                .filter_map(|row| Bridge::read(rows, row))
                .collect(),
        }
    }

    /// The port called `name`, and its bridge: the names of ports are unique.
    pub fn port(&self, name: &str) -> Option<(&Bridge, &Port)> {
        self.bridges.values().find_map(|bridge| Some((bridge, bridge.ports.get(name)?)))
    }

    /// `hw-offload`: whether OVS offloads flows (to TC, or to DPDK devices).
    pub fn hw_offload(&self) -> bool {
        self.flag("hw-offload")
    }

    /// `userspace-tso-enable`: whether the userspace datapath takes packets that are to be segmented.
    pub fn userspace_tso_enable(&self) -> bool {
        self.flag("userspace-tso-enable")
    }

    /// `max-idle`: how long a datapath flow may stay unused.
    pub fn max_idle(&self) -> Duration {
        Duration::from_millis(self.number("max-idle", 10_000).into())
    }

    /// `flow-limit`: how many datapath flows there may be.
    pub fn flow_limit(&self) -> u32 {
        self.number("flow-limit", 200_000)
    }

    /// `min-revalidate-pps`: packets per second below which a flow is deleted rather than revalidated, when OVS is busy. 0
    /// is 1 (`ofproto_set_min_revalidate_pps`).
    pub fn min_revalidate_pps(&self) -> u32 {
        self.number("min-revalidate-pps", 5).max(1)
    }

    /// A flag that is off by default (`smap_get_bool`).
    fn flag(&self, key: &str) -> bool {
        self.other_config.get(key).is_some_and(|value| value.eq_ignore_ascii_case("true"))
    }

    /// A number; what is not one counts as not given (`smap_get_uint`).
    fn number(&self, key: &str, default: u32) -> u32 {
        self.other_config.get(key).and_then(|value| value.parse().ok()).unwrap_or(default)
    }
}

impl Bridge {
    /// A row with its name.
    fn read(rows: &Rows, row: &Row) -> Option<(String, Bridge)> {
        let name = rows::string(row, "name")?;
        let has = |column| rows::atoms(row, column).next().is_some();
        let bridge = Bridge {
            name: name.clone(),
            uuid: rows::uuids(row, "_uuid").next()?.to_owned(),
            datapath_type: rows::string(row, "datapath_type").unwrap_or_else(|| "system".to_owned()),
            mirrors: has("mirrors"),
            sflow: has("sflow"),
            ipfix: has("ipfix"),
            netflow: has("netflow"),
            ports: rows.referred("Port", row, "ports").filter_map(|row| Port::read(rows, row)).collect(),
        };
        Some((name, bridge))
    }
}

impl Port {
    /// A row with its name.
    fn read(rows: &Rows, row: &Row) -> Option<(String, Port)> {
        let name = rows::string(row, "name")?;
        let mut trunks: Vec<u16> =
            rows::atoms(row, "trunks").filter_map(|vid| vid.as_u64()?.try_into().ok()).collect();
        trunks.sort_unstable();
        let port = Port {
            name: name.clone(),
            tag: rows::number(row, "tag"),
            trunks,
            vlan_mode: rows::string(row, "vlan_mode"),
            qos: rows.referred("QoS", row, "qos").next().and_then(|qos| rows::string(qos, "type")),
            interfaces: rows.referred("Interface", row, "interfaces").filter_map(Interface::read).collect(),
        };
        Some((name, port))
    }
}

impl Interface {
    /// A row with its name.
    fn read(row: &Row) -> Option<(String, Interface)> {
        let name = rows::string(row, "name")?;
        let interface = Interface {
            name: name.clone(),
            kind: rows::string(row, "type").unwrap_or_default(),
            options: rows::map(row, "options"),
            external_ids: rows::map(row, "external_ids"),
            // -1 stands for a device that cannot be opened.
            ofport: rows::number(row, "ofport"),
            error: rows::string(row, "error"),
            ingress_policing_rate: rows::number(row, "ingress_policing_rate").unwrap_or(0),
            ingress_policing_kpkts_rate: rows::number(row, "ingress_policing_kpkts_rate").unwrap_or(0),
            mtu: rows::number(row, "mtu"),
            mtu_request: rows::number(row, "mtu_request"),
            ifindex: rows::number(row, "ifindex"),
        };
        Some((name, interface))
    }
}
