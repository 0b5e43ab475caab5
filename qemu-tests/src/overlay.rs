//! Overlay networks: what a node's stock Open vSwitch (userspace datapath) is told to have a tunnel, two nodes on a virtual wire,
//! and packets in tunnels for tests.
//!
//! A node has two bridges: [`BRIDGE`] with guests and the tunnel's port, and [`UNDERLAY`] with the node's address on the bridge's
//! own port, and the wire to the other nodes.

use std::fmt;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::process::{Command, Stdio};

use anyhow::{Context, Result, ensure};

use crate::frontend::packet::{Mac, Packet};
use crate::host::WorkDir;
use crate::netns::Namespace;
use crate::ovs::{BRIDGE, Ovs};

/// The bridge with the node's address.
pub const UNDERLAY: &str = "br-phy";
/// The tunnel's port on [`BRIDGE`].
pub const TUNNEL: &str = "tun0";
/// The network device at each end of the wire.
pub const DEVICE: &str = "eth1";
/// The name of node 1's wire under pointworkd, which under the userspace datapath is not that of its device.
pub const WIRE: &str = "wire1";
/// The virtual network of all tunnels.
pub const VNI: u32 = 42;

/// How packets are encapsulated.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// RFC 7348.
    Vxlan,
    /// RFC 8926.
    Geneve,
    /// RFC 2784 and 2890, with Ethernet inside.
    Gre,
}

impl Kind {
    /// All of them.
    pub const ALL: [Self; 3] = [Self::Vxlan, Self::Geneve, Self::Gre];

    /// The UDP port of such packets, if they are UDP.
    pub fn udp_port(self) -> Option<u16> {
        match self {
            Self::Vxlan => Some(4789),
            Self::Geneve => Some(6081),
            Self::Gre => None,
        }
    }

    /// The tunnel's own header, without options.
    pub fn header(self, vni: u32) -> Vec<u8> {
        let [_, a, b, c] = vni.to_be_bytes();
        match self {
            Self::Vxlan => vec![0x08, 0, 0, 0, a, b, c, 0],
            Self::Geneve => vec![0, 0, 0x65, 0x58, a, b, c, 0],
            Self::Gre => [&[0x20, 0, 0x65, 0x58][..], &vni.to_be_bytes()].concat(),
        }
    }

    /// Bytes that it adds to a packet: its outer Ethernet header included and a VLAN tag not. As the packet inside has an Ethernet
    /// header too, by so many the MTU inside is smaller than that of the underlay.
    pub fn overhead(self, six: bool) -> u16 {
        let network = if six { 40 } else { 20 };
        let udp = if self.udp_port().is_some() { 8 } else { 0 };
        14 + network + udp + 8
    }
}

impl fmt::Display for Kind {
    /// As Open vSwitch's `type` has it.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Self::Vxlan => "vxlan",
            Self::Geneve => "geneve",
            Self::Gre => "gre",
        })
    }
}

/// A node's place in the underlay.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Site(
    /// Its number, from 1.
    pub u8,
);

impl Site {
    /// The MAC address of its [`UNDERLAY`].
    pub fn mac(self) -> Mac {
        [2, 0, 0, 0, 0xf0, self.0]
    }

    /// Its IPv4 address (RFC 5737).
    pub fn v4(self) -> Ipv4Addr {
        Ipv4Addr::new(192, 0, 2, self.0)
    }

    /// Its IPv6 address.
    pub fn v6(self) -> Ipv6Addr {
        Ipv6Addr::new(0xfd00, 2, 0, 0, 0, 0, 0, self.0.into())
    }

    /// One of them.
    pub fn address(self, six: bool) -> IpAddr {
        if six { self.v6().into() } else { self.v4().into() }
    }
}

/// A MAC address in text.
pub fn text(mac: Mac) -> String {
    mac.map(|byte| format!("{byte:02x}")).join(":")
}

/// Gives a node its underlay, without a wire: the bridge and its addresses.
///
/// # Errors
/// If Open vSwitch or the kernel refuses.
pub fn add_underlay(ovs: &Ovs, site: Site, mtu: u16) -> Result<()> {
    let (address, mtu) = (format!("other-config:hwaddr={}", text(site.mac())), format!("mtu_request={mtu}"));
    let bridge = ["add-br", UNDERLAY, "--", "set", "bridge", UNDERLAY, "datapath_type=netdev"];
    let more = ["fail_mode=secure", &address, "--", "set", "interface", UNDERLAY, &mtu];
    ovs.vsctl(&[&bridge[..], &more].concat())?;
    ovs.ofctl(&["add-flow", UNDERLAY, "priority=0,actions=NORMAL"])?;
    let namespace = ovs.namespace();
    // Namespaces have no IPv6 unless somebody asks for it.
    namespace.run(|| {
        let file = format!("/proc/sys/net/ipv6/conf/{UNDERLAY}/disable_ipv6");
        std::fs::write(&file, "0").context(file)
    })?;
    namespace.ip(&["link", "set", UNDERLAY, "up"])?;
    namespace.ip(&["addr", "add", &format!("{}/24", site.v4()), "dev", UNDERLAY])?;
    namespace.ip(&["addr", "add", &format!("{}/64", site.v6()), "dev", UNDERLAY, "nodad"])
}

/// Adds the port [`TUNNEL`] to another node, or replaces it; `options` are further words of `ovs-vsctl set interface`.
///
/// # Errors
/// If Open vSwitch refuses.
pub fn set_tunnel(ovs: &Ovs, kind: Kind, remote: IpAddr, options: &[&str]) -> Result<()> {
    let set = [format!("type={kind}"), format!("options:remote_ip={remote}"), format!("options:key={VNI}")];
    let mut words = vec!["--if-exists", "del-port", BRIDGE, TUNNEL, "--", "add-port", BRIDGE, TUNNEL, "--"];
    words.extend(["set", "interface", TUNNEL]);
    words.extend(set.iter().map(String::as_str));
    words.extend(options);
    ovs.vsctl(&words)?;
    let error = ovs.vsctl(&["get", "interface", TUNNEL, "error"])?;
    ensure!(error.trim() == "[]", "{TUNNEL}: {error}");
    Ok(())
}

/// Joins two nodes by a veth pair, [`DEVICE`] at both ends, with as many queues.
///
/// # Errors
/// If the kernel refuses.
pub fn join(one: &Namespace, other: &Namespace, mtu: u16) -> Result<()> {
    let peer = ["type", "veth", "peer", "name", DEVICE, "netns", other.name()];
    one.ip(&[&["link", "add", DEVICE][..], &peer].concat())?;
    for end in [one, other] {
        end.ip(&["link", "set", DEVICE, "mtu", &mtu.to_string(), "up"])?;
        leave_nothing(end, DEVICE)?;
    }
    Ok(())
}

/// Has the kernel complete the checksums and insert the tags of what it sends on a device: a veth passes on what its sender left
/// to hardware, and nobody behind it does it.
///
/// # Errors
/// If it refuses.
pub fn leave_nothing(namespace: &Namespace, device: &str) -> Result<()> {
    let tags =
        ["txvlan", "off", "tx-vlan-stag-hw-insert", "off", "rxvlan", "off", "rx-vlan-stag-hw-parse", "off"];
    namespace.run(|| {
        let mut command = Command::new("ethtool");
        let output = command.args(["-K", device, "tx", "off"]).args(tags).stdin(Stdio::null()).output();
        let output = output.context("ethtool")?;
        let said = String::from_utf8_lossy(&output.stderr).into_owned();
        ensure!(output.status.success(), "ethtool: {said}");
        Ok(())
    })
}

/// Sends a frame out of a port of [`UNDERLAY`], past all flows.
///
/// # Errors
/// If Open vSwitch refuses.
pub fn send_raw(ovs: &Ovs, port: &str, frame: &[u8]) -> Result<()> {
    let hex: String = frame.iter().map(|byte| format!("{byte:02x}")).collect();
    ovs.ofctl(&["packet-out", UNDERLAY, &format!("in_port=LOCAL,packet={hex},actions=output:{port}")])
        .map(drop)
}

/// Two nodes on a virtual wire, in a network namespace each.
#[derive(Debug)]
pub struct Nodes {
    /// Their Open vSwitches, which end before their directories do.
    pub ovs: [Ovs; 2],
    _dirs: [WorkDir; 2],
}

impl Nodes {
    /// The second node's end of the wire is a port of its underlay; the first one's is left to [`Self::plug`] and
    /// [`Self::plug_plain`].
    ///
    /// # Errors
    /// If Open vSwitch or the kernel refuses.
    pub fn start(mtu: u16) -> Result<Self> {
        let dirs = [WorkDir::new()?, WorkDir::new()?];
        let ovs = [Ovs::start(&dirs[0])?, Ovs::start(&dirs[1])?];
        join(ovs[0].namespace(), ovs[1].namespace(), mtu)?;
        for (ovs, number) in ovs.iter().zip(1..) {
            add_underlay(ovs, Site(number), mtu)?;
            ovs.ofctl(&["add-flow", BRIDGE, "priority=0,actions=NORMAL"])?;
        }
        ovs[1].vsctl(&["add-port", UNDERLAY, DEVICE])?;
        Ok(Self { ovs, _dirs: dirs })
    }

    /// Has pointworkd serve the first node's end of the wire, as [`WIRE`].
    ///
    /// # Errors
    /// If Open vSwitch refuses.
    pub fn plug(&self, mtu: u16) -> Result<()> {
        let (ids, mtu) = (format!("external_ids:pointwork-device={DEVICE}"), format!("mtu_request={mtu}"));
        // The port is a TAP that pointworkd is still to make: that it is not there yet is said, and is no failure.
        self.ovs[0].vsctl(&["add-port", UNDERLAY, WIRE, "--", "set", "interface", WIRE, &ids, &mtu]).map(drop)
    }

    /// Gives the first node's end of the wire to its Open vSwitch instead.
    ///
    /// # Errors
    /// If Open vSwitch refuses.
    pub fn plug_plain(&self) -> Result<()> {
        let replace = ["--if-exists", "del-port", UNDERLAY, WIRE, "--", "add-port", UNDERLAY, DEVICE];
        self.ovs[0].vsctl(&replace).map(drop)
    }

    /// Has the two reach each other by this kind of tunnel, in place of any before.
    ///
    /// # Errors
    /// If Open vSwitch refuses.
    pub fn tunnel(&self, kind: Kind, six: bool) -> Result<()> {
        for (ovs, other) in self.ovs.iter().zip([2, 1]) {
            set_tunnel(ovs, kind, Site(other).address(six), &[])?;
        }
        Ok(())
    }
}

/// The outer headers of a tunnel over IPv4, as Open vSwitch makes them unless it is told otherwise: TTL 64, DF, no UDP checksum.
#[derive(Clone, Copy, Debug)]
pub struct Envelope {
    /// What kind of tunnel.
    pub kind: Kind,
    /// MAC addresses of sender and receiver.
    pub macs: [Mac; 2],
    /// Their IPv4 addresses.
    pub ips: [[u8; 4]; 2],
    /// The virtual network.
    pub vni: u32,
}

impl Envelope {
    /// Between two nodes.
    pub fn between(kind: Kind, from: Site, to: Site) -> Self {
        let ips = [from, to].map(|site| site.v4().octets());
        Self { kind, macs: [from.mac(), to.mac()], ips, vni: VNI }
    }

    /// Bytes before the packet inside.
    pub fn overhead(&self) -> usize {
        self.kind.overhead(false).into()
    }

    /// The packet in the envelope. `source` is the UDP source port.
    pub fn wrap(&self, inner: &[u8], source: u16) -> Vec<u8> {
        self.wrap_as(&self.kind.header(self.vni), inner, source)
    }

    /// As [`Self::wrap`], with another header of the tunnel.
    pub fn wrap_as(&self, header: &[u8], inner: &[u8], source: u16) -> Vec<u8> {
        let [src, dst] = self.macs;
        let packet = Packet::eth(src, dst).ipv4(self.ips[0], self.ips[1]);
        let payload = [header, inner].concat();
        match self.kind.udp_port() {
            Some(port) => {
                let mut frame = packet.udp(source, port).payload(&payload).build();
                frame[40..42].fill(0);
                frame
            }
            None => packet.protocol(47).payload(&payload).build(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::frontend::NetHeader;
    use crate::frontend::packet::check;

    #[test]
    fn an_envelope_is_as_long_as_it_says_and_has_the_packet_behind_it() {
        let inner =
            Packet::eth([2; 6], [4; 6]).ipv4([10, 0, 0, 1], [10, 0, 0, 2]).udp(1, 2).payload_len(30).build();
        for kind in Kind::ALL {
            let envelope = Envelope::between(kind, Site(1), Site(2));
            let frame = envelope.wrap(&inner, 50_000);
            assert_eq!(frame[envelope.overhead()..], inner, "{kind}");
            assert_eq!(frame[..6], Site(2).mac());
            let ip = &frame[14..34];
            let sum: u32 = ip.chunks(2).map(|word| u32::from(word[0]) << 8 | u32::from(word[1])).sum();
            assert_eq!((sum & 0xffff) + (sum >> 16), 0xffff, "{kind}");
            assert_eq!(usize::from(ip[2]) << 8 | usize::from(ip[3]), frame.len() - 14);
            check(&NetHeader::default(), &frame[envelope.overhead()..]).unwrap();
        }
    }
}
