//! A tunnel of the kernel's datapath whose outer packets go through a second bridge, as OpenStack and OVN have it: `br0` with guests and the
//! tunnel's port, `br-ex` with the node's address and the wire.

use std::time::Duration;

use anyhow::{Context, Result, ensure};
use qemu_tests::daemon::PortStats;
use qemu_tests::host::wait_for;
use qemu_tests::tools::Ping;

use crate::bench::{Bench, DEADLINE};

/// The wire's device.
const DEVICE: &str = "eth1";
/// The ends of the tunnel, and who is at the far one.
const NODE: &str = "192.0.2.1";
const PEER: &str = "192.0.2.2";
const FAR: &str = "10.1.0.3";
/// Drops what the node sends into tunnels, and what it gets.
const OUT: &str = "add rule inet overlay output udp dport 4789 drop";
const IN: &str = "add rule inet overlay input udp dport 4789 drop";

struct Overlay<'a>(&'a Bench);

impl Overlay<'_> {
    /// The far end is Linux's own tunnel device, in a namespace that leaves nothing to the hardware.
    fn lay(&self) -> Result<()> {
        let far = "ip netns exec far";
        self.0.node.sh(&format!(
            "ip netns add far && ip link add {DEVICE} type veth peer name eth0 netns far && \
             {far} sh -c 'echo 1 >/proc/sys/net/ipv6/conf/default/disable_ipv6; echo 1 >/proc/sys/net/ipv6/conf/eth0/disable_ipv6' && \
             echo 1 >/proc/sys/net/ipv6/conf/{DEVICE}/disable_ipv6 && ip link set {DEVICE} up && \
             {far} ethtool -K eth0 tx off gso off txvlan off tx-vlan-stag-hw-insert off && \
             ethtool -K {DEVICE} rxvlan off rx-vlan-stag-hw-parse off && \
             ip -n far address add {PEER}/24 dev eth0 && ip -n far link set eth0 up && \
             ip -n far link add vxlan42 type vxlan id 42 local {PEER} remote {NODE} dstport 4789 dev eth0 && \
             {far} ethtool -K vxlan42 tx off gso off && \
             ip -n far address add {FAR}/24 dev vxlan42 && ip -n far link set vxlan42 up && \
             {far} iperf3 -s -D -I /run/far.pid"
        ))?;
        self.0.vsctl(&format!(
            "add-br br-ex -- add-port br-ex {DEVICE} -- set interface {DEVICE} external_ids:pointwork-device={DEVICE} -- \
             add-port br0 tun0 -- set interface tun0 type=vxlan options:remote_ip={PEER} options:key=42"
        ))?;
        self.0.node.sh(&format!(
            "echo 1 >/proc/sys/net/ipv6/conf/br-ex/disable_ipv6 && ip address add {NODE}/24 dev br-ex && ip link set br-ex up"
        ))?;
        Ok(())
    }

    fn take_up(&self) -> Result<()> {
        self.0.vsctl(&format!("del-port br0 tun0 -- del-port br-ex {DEVICE} -- del-br br-ex"))?;
        self.0.node.sh("kill $(cat /run/far.pid) && ip netns delete far").map(drop)
    }

    fn ping(&self, count: u32) -> Result<Ping> {
        self.0.ping(FAR, count)
    }

    fn wait_reachable(&self, is: bool) -> Result<()> {
        wait_for(&format!("vm1 to reach the far end: {is}"), DEADLINE, || {
            let ping =
                self.0.node.run(&format!("ip netns exec vm1 ping -n -q -c 3 -i 0.1 -W 1 {FAR}"), DEADLINE)?;
            let lost = Ping::parse(&ping.stdout).map(|ping| ping.lost());
            Ok(lost.is_ok_and(|lost| lost == if is { 0 } else { 3 }).then_some(()))
        })
        .with_context(|| self.told())
    }

    fn told(&self) -> String {
        let dump = self.0.node.sh("ovs-dpctl dump-flows -m --names");
        format!("{:#?}\n{}\n{dump:?}", self.0.flows(), self.0.warnings().unwrap_or_default())
    }

    /// How such flows of IPv4 are handled, each of them.
    fn handling(&self, texts: &[&str]) -> Result<Vec<String>> {
        let flows = self.0.flows()?.into_iter();
        let such = flows.filter(|(.., text)| {
            text.contains("eth_type(0x0800)") && texts.iter().all(|part| text.contains(part))
        });
        Ok(such.map(|(_, handling, _)| handling).collect())
    }

    /// Waits until packets go by flows of ours into the tunnel, out of it, and inside.
    fn wait_fast(&self) -> Result<()> {
        let flows: [&[&str]; 3] = [
            &["in_port(vm1)", "set(tunnel("],
            &["in_port(eth1)", "br-ex"],
            &["in_port(vxlan_sys_4789)", "vm1"],
        ];
        wait_for("fast flows of the tunnel", DEADLINE, || {
            self.ping(2)?;
            for texts in flows {
                let handling = self.handling(texts)?;
                if !handling.iter().any(|handling| handling == "fast") {
                    return Ok(None);
                }
            }
            // And the device gives us such packets.
            let before = self.wire()?.rx_packets;
            self.ping(5)?;
            Ok((self.wire()?.rx_packets >= before + 5).then_some(()))
        })
        .with_context(|| self.told())
    }

    /// Waits until `show` gives this reason, and no other, why the tunnel is the host's.
    fn wait_named(&self, why: &str, into: bool) -> Result<()> {
        let mut shown = None;
        wait_for(&format!("'show' to say {why}"), DEADLINE, || {
            let show = self.0.node.pointwork("show")?;
            let reasons = show["tunnels"][0]["host_path"].as_array().context("no such field")?;
            let what = if into { "encapsulate" } else { "decapsulate" };
            let is_it = reasons.len() == 1 && reasons[0]["what"] == what && reasons[0]["why"] == why;
            shown = Some(show["tunnels"].clone());
            Ok(is_it.then_some(()))
        })
        .with_context(|| format!("{shown:?}"))
    }

    fn wire(&self) -> Result<PortStats> {
        self.0.stats()?.ports.remove(DEVICE).context("no such port")
    }

    fn nft(&self, command: &str) -> Result<()> {
        self.0.node.sh(&format!("nft '{command}'")).map(drop)
    }
}

/// The check: packets in both directions pass neither the kernel's datapath nor its network, but if that does something to them.
pub fn behind_the_bridge(bench: &Bench) -> Result<String> {
    let overlay = Overlay(bench);
    overlay.lay()?;
    overlay.wait_reachable(true)?;
    overlay.wait_fast()?;

    let before = overlay.wire()?;
    let ping = overlay.ping(40)?;
    let after = overlay.wire()?;
    let (taken, sent) = (after.rx_packets - before.rx_packets, after.tx_packets - before.tx_packets);
    let host = after.rx_to_host - before.rx_to_host;
    // Some are shown to Open vSwitch, so that its flows live.
    ensure!(ping.lost() == 0 && taken >= 40 && sent >= 30 && host <= 10, "{ping}: {taken}, {sent}, {host}");
    let there = bench.iperf3("vm1", FAR, "-M 1300")?;
    let back = bench.iperf3("vm1", FAR, "-M 1300 -R")?;
    let fast = overlay.wire()?;
    ensure!(fast.tx_packets > after.tx_packets + 500, "{fast:?}");
    ensure!(fast.fast_copies > after.fast_copies + 500, "{fast:?}");

    // Rules of the host's hold for its tunnels.
    overlay.nft("add table inet overlay")?;
    overlay.nft("add chain inet overlay output { type filter hook output priority 0; }")?;
    overlay.nft("add chain inet overlay input { type filter hook input priority 0; }")?;
    overlay.wait_fast()?;
    for (rule, chain) in [(OUT, "output"), (IN, "input")] {
        overlay.nft(rule)?;
        overlay.wait_reachable(false)?;
        overlay.wait_named(&format!("nftables chain 'inet overlay {chain}'"), chain == "output")?;
        std::thread::sleep(Duration::from_secs(1));
        let ping = overlay.ping(10)?;
        ensure!(ping.received == 0, "{chain}: {ping}");
        overlay.nft(&format!("flush chain inet overlay {chain}"))?;
        overlay.wait_reachable(true)?;
        overlay.wait_fast()?;
    }
    overlay.nft("delete table inet overlay")?;
    let shown = bench.node.pointwork("show")?["tunnels"][0]["host_path"].clone();
    ensure!(shown.as_array().is_some_and(Vec::is_empty), "{shown}");
    // So do rules of the bridge with the wire.
    bench.node.sh("ovs-ofctl add-flow br-ex priority=100,in_port=LOCAL,udp,tp_dst=4789,actions=drop")?;
    overlay.wait_reachable(false)?;
    bench.node.sh("ovs-ofctl --strict del-flows br-ex priority=100,in_port=LOCAL,udp,tp_dst=4789")?;
    overlay.wait_reachable(true)?;
    overlay.wait_fast()?;
    overlay.take_up()?;
    wait_for("the counters to balance", DEADLINE, || Ok(bench.stats()?.imbalance().is_none().then_some(())))?;
    Ok(format!(
        "{sent} packets into the tunnel and {taken} out of it, {host} by the host; {:.0} and {:.0} Mbit/s",
        there.megabits(),
        back.megabits()
    ))
}
