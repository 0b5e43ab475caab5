//! Tunnels of the userspace datapath: a bridge for guests with a tunnel, and a bridge with an uplink whose own device has the
//! tunnel's address. Packets come in and go out by the fast path.

use std::time::Duration;

use anyhow::{Context, Result, ensure};
use qemu_tests::daemon::PortConfig;
use qemu_tests::frontend::packet::{Mac, Packet};
use qemu_tests::host::wait_for;
use qemu_tests::net::SOON;
use qemu_tests::ovs::BRIDGE;
use serde_json::Value;

use crate::{Bench, hello, text, wait_in_bridge, warnings};

/// The bridge of the uplink.
const UNDERLAY: &str = "br-phy";
/// Our end of the tunnels, and the other one.
const LOCAL: [u8; 4] = [192, 0, 2, 1];
const REMOTE: [u8; 4] = [192, 0, 2, 2];
const REMOTE_MAC: Mac = [2, 0, 0, 0, 0x99, 2];
/// A station behind the other end.
const STATION: Mac = [2, 0, 0, 0, 0x77, 7];
const STATION_IP: [u8; 4] = [10, 0, 0, 77];
/// VNI or GRE key.
const KEY: u8 = 100;

/// A kind of tunnel: what OVS calls it, its device in the datapath, and what stands between IP and the packet inside.
struct Kind {
    name: &'static str,
    device: &'static str,
    /// UDP port, if it goes over UDP.
    port: Option<u16>,
    /// The header, with the key in it.
    header: fn(u8) -> Vec<u8>,
}

const KINDS: [Kind; 3] = [
    // RFC 7348.
    Kind {
        name: "vxlan",
        device: "vxlan_sys_4789",
        port: Some(4789),
        header: |key| vec![8, 0, 0, 0, 0, 0, key, 0],
    },
    // RFC 8926.
    Kind {
        name: "geneve",
        device: "genev_sys_6081",
        port: Some(6081),
        header: |key| vec![0, 0, 0x65, 0x58, 0, 0, key, 0],
    },
    // RFC 2890.
    Kind {
        name: "gre",
        device: "gre_sys",
        port: None,
        header: |key| vec![0x20, 0, 0x65, 0x58, 0, 0, 0, key],
    },
];

impl Kind {
    /// `inner` as it comes from the other end.
    fn wrap(&self, to: Mac, key: u8, inner: &[u8]) -> Vec<u8> {
        let payload = [&(self.header)(key), inner].concat();
        let outer = Packet::eth(REMOTE_MAC, to).ipv4(REMOTE, LOCAL);
        match self.port {
            Some(port) => outer.udp(40_000, port).payload(&payload).build(),
            None => {
                let mut frame = outer.payload(&payload).build();
                // Another protocol, and the checksum that goes with it (RFC 1624).
                let (before, after) = (std::mem::replace(&mut frame[23], 47), 47);
                let sum =
                    !u16::from_be_bytes([frame[24], frame[25]]) as u32 + !(before as u16) as u32 + after;
                let sum = (sum & 0xffff) + (sum >> 16);
                let sum = !((sum & 0xffff) + (sum >> 16)) as u16;
                frame[24..26].copy_from_slice(&sum.to_be_bytes());
                frame
            }
        }
    }

    /// What is inside of a frame that goes to the other end.
    fn unwrap<'f>(&self, frame: &'f [u8]) -> Option<&'f [u8]> {
        let is_ours =
            frame.get(..6)? == REMOTE_MAC && frame.get(26..30)? == LOCAL && frame.get(30..34)? == REMOTE;
        let behind = match self.port {
            Some(port) => frame.get(36..38).filter(|dst| *dst == port.to_be_bytes()).and(frame.get(42..))?,
            None => (frame.get(23) == Some(&47)).then(|| frame.get(34..))??,
        };
        behind.strip_prefix(&(self.header)(KEY)[..]).filter(|_| is_ours)
    }
}

/// A guest on the bridge of guests, the uplink (guest 1), and a tunnel.
struct Rig {
    bench: Bench,
    kind: Kind,
    /// MAC address of the underlay's device.
    mac: Mac,
}

impl Rig {
    fn start(kind: Kind) -> Result<Rig> {
        let mut bench = Bench::start(1)?;
        let uplink = PortConfig::server("up", &bench.net.dir);
        let socket = format!("external_ids:pointwork-socket={}", text(&uplink.socket));
        let ovs = &bench.ovs;
        ovs.vsctl(&["add-br", UNDERLAY, "--", "set", "bridge", UNDERLAY, "datapath_type=netdev"])?;
        ovs.vsctl(&["add-port", UNDERLAY, "up", "--", "set", "interface", "up", &socket])?;
        ovs.namespace().ip(&["address", "add", "192.0.2.1/24", "dev", UNDERLAY])?;
        ovs.namespace().ip(&["link", "set", UNDERLAY, "up"])?;
        wait_for("the uplink's socket", SOON, || Ok(uplink.socket.exists().then_some(())))?;
        bench.net.join(&uplink)?;
        wait_in_bridge(&bench.ovs, "up", "up")?;
        wait_for("representors to be seen", SOON, || {
            Ok((!warnings(bench.daemon())?.contains("not seen yet")).then_some(()))
        })?;
        let shown = bench.ovs.vsctl(&["get", "interface", UNDERLAY, "mac_in_use"])?;
        let digits = shown.trim().trim_matches('"').split(':').map(|byte| u8::from_str_radix(byte, 16));
        let mac = digits.collect::<Result<Vec<u8>, _>>()?.try_into();
        let mac = mac.map_err(|_| anyhow::anyhow!("no MAC address: {shown}"))?;
        let rig = Rig { bench, kind, mac };
        rig.add_tunnel()?;
        Ok(rig)
    }

    fn add_tunnel(&self) -> Result<()> {
        let ovs = &self.bench.ovs;
        let kind = format!("type={}", self.kind.name);
        let (remote, key) = ("options:remote_ip=192.0.2.2", format!("options:key={KEY}"));
        ovs.vsctl(&["add-port", BRIDGE, "tun0", "--", "set", "interface", "tun0", &kind, remote, &key])?;
        wait_for("the tunnel's port", SOON, || Ok(self.tunnel()?.map(drop)))?;
        // As if it had answered.
        ovs.appctl(&["tnl/arp/set", UNDERLAY, "192.0.2.2", "02:00:00:00:99:02"]).map(drop)
    }

    /// What `show` says of the tunnel's port.
    fn tunnel(&self) -> Result<Option<Value>> {
        let show = self.bench.daemon().ctl(&["show"])?;
        let tunnels = show["tunnels"].as_array().cloned().unwrap_or_default();
        Ok(tunnels.into_iter().find(|tunnel| tunnel["name"] == self.kind.device))
    }

    fn forwarded(&self, port: &str) -> Result<u64> {
        Ok(self.bench.daemon().stats()?.ports[port].rx_forwarded)
    }

    /// Sends `inner` through the tunnel to the guest, until it comes: OVS learns addresses and routes in its own time.
    fn opens(&mut self, inner: &[u8]) -> Result<()> {
        let frame = self.kind.wrap(self.mac, KEY, inner);
        wait_for("a packet out of the tunnel", SOON, || {
            self.bench.net.guests[1].send(&frame)?;
            let came = self.bench.net.guests[0].receive(Duration::from_millis(100))?;
            Ok(came.filter(|(_, _, received)| received == inner).map(drop))
        })
        .with_context(|| format!("{:#}", self.bench.dump().unwrap_or_default()))?;
        // Those that were late.
        while self.bench.net.guests[0].receive(Duration::from_millis(100))?.is_some() {}
        self.bench.settle()
    }

    /// Sends `inner` through the tunnel until one is taken out here. Each must arrive as it is.
    fn comes_fast(&mut self, inner: &[u8]) -> Result<()> {
        let frame = self.kind.wrap(self.mac, KEY, inner);
        wait_for("decapsulation", SOON, || {
            let before = self.forwarded("up")?;
            self.bench.net.guests[1].send(&frame)?;
            self.bench.net.guests[0].expect(inner)?;
            Ok((self.forwarded("up")? > before).then_some(()))
        })
        .with_context(|| format!("{:#}", self.bench.dump().unwrap_or_default()))
    }

    /// Sends `inner` from the guest until one is put into the tunnel here. Each must arrive as it is.
    fn goes_fast(&mut self, inner: &[u8]) -> Result<()> {
        wait_for("encapsulation", SOON, || {
            let before = self.forwarded("p1")?;
            self.bench.net.guests[0].send(inner)?;
            wait_for("the packet in its tunnel", SOON, || {
                let came = self.bench.net.guests[1].receive(SOON)?;
                Ok(came.filter(|(_, _, frame)| self.kind.unwrap(frame) == Some(inner)).map(drop))
            })?;
            Ok((self.forwarded("p1")? > before).then_some(()))
        })
        .with_context(|| format!("{:#}", self.bench.dump().unwrap_or_default()))
    }

    /// How flows are handled whose match and actions contain these.
    fn handling(&self, matches: &str, actions: &str) -> Result<Vec<String>> {
        let dump = self.bench.dump()?;
        let has =
            |flow: &Value, key: &str, part: &str| flow[key].as_str().is_some_and(|text| text.contains(part));
        let flows = dump["flows"].as_array().into_iter().flatten();
        let some = flows.filter(|flow| has(flow, "flow", matches) && has(flow, "actions", actions));
        Ok(some.filter_map(|flow| Some(flow["handling"].as_str()?.to_owned())).collect())
    }
}

fn carries(kind: Kind) -> Result<()> {
    let mut it = Rig::start(kind)?;
    let (guest, ip) = (it.bench.net.guests[0].mac, it.bench.net.guests[0].ip);
    let shown = it.tunnel()?.context("no tunnel")?;
    ensure!(
        shown["kind"] == it.kind.name && shown["udp_port"].as_u64() == it.kind.port.map(u64::from),
        "{shown}"
    );
    // The bridge learns who is where.
    it.bench.net.guests[0].send(&hello(guest, ip))?;
    it.bench.settle()?;
    let inner = Packet::eth(STATION, guest).ipv4(STATION_IP, ip).udp(1, 2).payload_len(100).build();
    it.opens(&inner)?;
    it.comes_fast(&inner)?;
    let device = format!("in_port({})", it.kind.device);
    for (matches, actions) in [("in_port(up)", "tnl_pop"), (&*device, "p1")] {
        let handling = it.handling(matches, actions)?;
        ensure!(!handling.is_empty(), "no such flow: {:#}", it.bench.dump()?);
        ensure!(handling.iter().all(|how| how == "fast"), "{:#}", it.bench.dump()?);
    }
    let back = Packet::eth(guest, STATION).ipv4(ip, STATION_IP).tcp(3, 4).payload_len(200).build();
    it.goes_fast(&back)?;

    // Of another virtual network, and cut short: they are for OVS to drop.
    let frame = it.kind.wrap(it.mac, KEY + 1, &inner);
    it.bench.net.guests[1].send(&frame)?;
    let frame = it.kind.wrap(it.mac, KEY, &inner[..10]);
    it.bench.net.guests[1].send(&frame)?;
    it.bench.net.guests[0].expect_nothing()?;

    // It goes, and comes back.
    it.bench.ovs.vsctl(&["del-port", "tun0"])?;
    wait_for("the tunnel's port to go", SOON, || Ok(it.tunnel()?.is_none().then_some(())))?;
    let frame = it.kind.wrap(it.mac, KEY, &inner);
    it.bench.net.guests[1].send(&frame)?;
    it.bench.net.guests[0].expect_nothing()?;
    it.add_tunnel()?;
    it.bench.net.guests[0].send(&hello(guest, ip))?;
    it.opens(&inner)?;
    it.comes_fast(&inner)?;
    it.bench.finish().map(drop)
}

#[test]
fn vxlan() -> Result<()> {
    let [kind, ..] = KINDS;
    carries(kind)
}

#[test]
fn geneve() -> Result<()> {
    let [_, kind, _] = KINDS;
    carries(kind)
}

#[test]
fn gre() -> Result<()> {
    let [.., kind] = KINDS;
    carries(kind)
}
