//! Which devices of tunnels OVS has in a datapath. They follow from the tunnels of its bridges: OVS makes one for all of a kind
//! and UDP port (`netdev_vport_get_dpif_port` in `lib/netdev-vport.c`), of the same name in the kernel's datapath and in the
//! userspace one.

use super::ovsdb::{Interface, Snapshot};
use crate::underlay::TunnelDevice;
use std::collections::BTreeMap;
use switch_core::tunnel::{GENEVE_PORT, Kind, VXLAN_PORT};

/// The devices in the userspace datapath, or in the kernel's, by name.
pub fn devices(snapshot: &Snapshot, userspace: bool) -> BTreeMap<String, TunnelDevice> {
    let mut devices = BTreeMap::<String, TunnelDevice>::new();
    let bridges = snapshot.bridges.values().filter(|bridge| (bridge.datapath_type == "netdev") == userspace);
    let ports = bridges.flat_map(|bridge| bridge.ports.values());
    for (name, device) in ports.flat_map(|port| port.interfaces.values()).filter_map(device) {
        devices.entry(name).and_modify(|known| known.gbp |= device.gbp).or_insert(device);
    }
    devices
}

/// The device of a tunnel; none of what is no tunnel, or none that is carried here.
fn device(interface: &Interface) -> Option<(String, TunnelDevice)> {
    let udp_port = |default| match interface.options.get("dst_port") {
        None => Some(default),
        Some(text) => text.parse().ok().filter(|&port| port != 0),
    };
    let mut extensions = interface.options.get("exts").into_iter().flat_map(|exts| exts.split(','));
    let udp = |name: &str, kind, port, gbp| {
        (format!("{name}_{port}"), TunnelDevice { kind, udp_port: Some(port), gbp })
    };
    let gre = |name: &str| (name.to_owned(), TunnelDevice { kind: Kind::Gre, udp_port: None, gbp: false });
    match interface.kind.as_str() {
        // Of VXLAN-GPE the packets inside are others.
        "vxlan" if extensions.clone().any(|extension| extension == "gpe") => None,
        "vxlan" => {
            let gbp = extensions.any(|extension| extension == "gbp");
            Some(udp("vxlan_sys", Kind::Vxlan, udp_port(VXLAN_PORT)?, gbp))
        }
        "geneve" => Some(udp("genev_sys", Kind::Geneve, udp_port(GENEVE_PORT)?, false)),
        "gre" => Some(gre("gre_sys")),
        "ip6gre" => Some(gre("ip6gre_sys")),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ovs::ovsdb::{Bridge, Port};

    type Options<'a> = &'a [(&'a str, &'a str)];

    /// A snapshot with a tunnel on a bridge of its own for each kind, options and datapath type.
    fn snapshot(tunnels: &[(&str, Options, &str)]) -> Snapshot {
        let mut snapshot = Snapshot::default();
        for (at, (kind, options, datapath_type)) in tunnels.iter().enumerate() {
            let name = format!("t{at}");
            let interface = Interface {
                name: name.clone(),
                kind: (*kind).into(),
                options: options.iter().map(|&(key, value)| (key.into(), value.into())).collect(),
                external_ids: BTreeMap::new(),
                ofport: None,
                error: None,
                ingress_policing_rate: 0,
                ingress_policing_kpkts_rate: 0,
                mtu: None,
                mtu_request: None,
                ifindex: None,
            };
            let port = Port {
                name: name.clone(),
                tag: None,
                trunks: Vec::new(),
                vlan_mode: None,
                qos: None,
                interfaces: [(name.clone(), interface)].into(),
            };
            let bridge = Bridge {
                name: name.clone(),
                uuid: name.clone(),
                datapath_type: (*datapath_type).into(),
                mirrors: false,
                sflow: false,
                ipfix: false,
                netflow: false,
                ports: [(name.clone(), port)].into(),
            };
            snapshot.bridges.insert(name, bridge);
        }
        snapshot
    }

    #[test]
    fn tunnels_of_a_kind_and_port_have_one_device() {
        let remote = ("remote_ip", "192.0.2.2");
        let snapshot = snapshot(&[
            ("vxlan", &[remote], "netdev"),
            ("vxlan", &[("remote_ip", "flow"), ("exts", "gbp")], "netdev"),
            ("vxlan", &[remote, ("dst_port", "4790")], "netdev"),
            ("vxlan", &[remote, ("dst_port", "4791"), ("exts", "gpe")], "netdev"),
            ("vxlan", &[remote, ("dst_port", "x")], "netdev"),
            ("geneve", &[remote], "netdev"),
            ("gre", &[remote], "netdev"),
            ("erspan", &[remote], "netdev"),
            ("internal", &[], "netdev"),
            ("", &[], "netdev"),
            ("geneve", &[remote, ("dst_port", "7000")], "system"),
            ("ip6gre", &[remote], "system"),
        ]);
        let all = |userspace| -> Vec<(String, String, bool)> {
            let devices = devices(&snapshot, userspace).into_iter();
            devices.map(|(name, device)| (name, device.to_string(), device.gbp)).collect()
        };
        let one = |name: &str, device: &str, gbp| (name.to_owned(), device.to_owned(), gbp);
        assert_eq!(
            all(true),
            [
                one("genev_sys_6081", "geneve 6081", false),
                one("gre_sys", "gre", false),
                one("vxlan_sys_4789", "vxlan 4789", true),
                one("vxlan_sys_4790", "vxlan 4790", false),
            ]
        );
        assert_eq!(
            all(false),
            [one("genev_sys_7000", "geneve 7000", false), one("ip6gre_sys", "gre", false)]
        );
    }
}
