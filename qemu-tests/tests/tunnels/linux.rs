//! The tunnels of Linux: the node's uplink is a port with a QEMU guest, whose kernel is the other end.

use std::net::IpAddr;
use std::path::Path;
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use qemu_tests::daemon::{Daemon, DaemonConfig, PortConfig};
use qemu_tests::guest::{Guest, GuestConfig, Nic};
use qemu_tests::host::{Process, WorkDir};
use qemu_tests::image::ImageKind;
use qemu_tests::netns::Namespace;
use qemu_tests::overlay::{Kind, Site, UNDERLAY, VNI, add_underlay, set_tunnel, text};
use qemu_tests::ovs::{BRIDGE, Ovs};
use qemu_tests::tools::IperfOptions;

use crate::bed::{FAST, LATE, MTU, give_addresses, ip, join_guest, mac, share};

/// The uplink.
const UPLINK: &str = "up";

/// What makes the guest's device `t0`.
fn device(kind: Kind, six: bool) -> String {
    let (remote, local) = (Site(1).address(six), Site(2).address(six));
    match kind {
        Kind::Vxlan => {
            format!("vxlan id {VNI} dstport 4789 remote {remote} local {local}")
        }
        Kind::Geneve => format!("geneve id {VNI} remote {remote}"),
        Kind::Gre if six => format!("ip6gretap key {VNI} remote {remote} local {local} encaplimit none"),
        Kind::Gre => format!("gretap key {VNI} remote {remote} local {local}"),
    }
}

#[test]
fn linux_is_at_the_other_end() -> Result<()> {
    let dir = WorkDir::new()?;
    let ovs = Ovs::start(&dir)?;
    add_underlay(&ovs, Site(1), MTU)?;
    ovs.ofctl(&["add-flow", BRIDGE, "priority=0,actions=NORMAL"])?;
    let ports = ["p1", UPLINK].map(|name| PortConfig::server(name, &dir));
    let mut daemon = Daemon::start(&DaemonConfig::under(&ovs, [ports[0].clone()]), &dir)?;
    let socket = format!("external_ids:pointwork-socket={}", ports[1].socket.display());
    ovs.vsctl(&["add-port", UNDERLAY, UPLINK, "--", "set", "interface", UPLINK, &socket])?;
    let near = Namespace::new()?;
    let _near = join_guest(&near, 0, &ports[0].socket, &dir)?;
    let config = GuestConfig {
        image: ImageKind::Node,
        memory: 512,
        ..GuestConfig::new("linux", Nic::connect(&ports[1].socket).mac(&text(Site(2).mac())))
    };
    let guest = Guest::start(config, &dir)?;
    give_addresses(&near, 0)?;
    guest.sh(&format!("ip addr add {}/24 dev eth0 && ip link set eth0 up", Site(2).v4()))?;
    guest.sh(&format!("ip addr add {}/64 dev eth0 nodad", Site(2).v6()))?;
    guest.sh("modprobe -a vxlan geneve ip_gre ip6_gre")?;
    daemon.wait_link(&["p1", UPLINK], true, LATE)?;
    let server = |command: &mut Command| {
        command.arg(format!("--net={}", near.path().display())).args(["--", "iperf3", "-s"]);
    };
    let mut server = Process::spawn("iperf3", Path::new("nsenter"), server, &dir.path("iperf3.log"))?;

    for (kind, six) in [
        (Kind::Vxlan, false),
        (Kind::Vxlan, true),
        (Kind::Geneve, false),
        (Kind::Geneve, true),
        (Kind::Gre, false),
        (Kind::Gre, true),
    ] {
        let what = format!("{kind} over IPv{}", if six { 6 } else { 4 });
        set_tunnel(&ovs, kind, Site(2).address(six), &[])?;
        let mtu = MTU - kind.overhead(six);
        near.ip(&["link", "set", "eth0", "mtu", &mtu.to_string()])?;
        guest.run("ip link del t0", Duration::from_secs(5))?;
        guest.sh(&format!("ip link add t0 address {} type {}", text(mac(1)), device(kind, six)))?;
        guest.sh(&format!("ip link set t0 mtu {mtu} up && ip addr add {}/24 dev t0", ip(1, false)))?;
        guest.sh(&format!("ip addr add {}/64 dev t0 nodad", ip(1, true)))?;
        for inner_six in [false, true] {
            let there: IpAddr = ip(0, inner_six);
            guest.wait_reachable(there, LATE).with_context(|| what.clone())?;
            let ping = guest.ping(there, 20, Duration::from_millis(20))?;
            ensure!(ping.lost() == 0, "{what}: {ping}");
        }
        for reverse in [false, true] {
            server.check()?;
            let options = IperfOptions { reverse, seconds: 2, ..Default::default() };
            // Flows are known from the first transfer on.
            guest.iperf3(ip(0, false), &IperfOptions { seconds: 1, ..options.clone() })?;
            let mut rate = 0.0;
            let mut out = (0.0, 0);
            let into = share(&daemon, "p1", || {
                out = share(&daemon, UPLINK, || {
                    rate = guest.iperf3(ip(0, false), &options)?.megabits();
                    Ok(())
                })?;
                Ok(())
            })?;
            println!(
                "{what}, {} Linux: {rate:.0} Mbit/s, by workers {:.2} % of {} into the tunnel, {:.2} % of {} out of it",
                if reverse { "to" } else { "from" },
                100.0 * into.0,
                into.1,
                100.0 * out.0,
                out.1
            );
            ensure!(
                rate > 5.0 && into.0 >= FAST && out.0 >= FAST,
                "{what}: {rate} Mbit/s, {into:?}, {out:?}"
            );
        }
        let counters =
            guest.sh("ip -s link show t0; nstat -az 2>/dev/null | grep -i csum || cat /proc/net/snmp")?;
        ensure!(guest.sh("cat /sys/class/net/t0/statistics/rx_errors")?.trim() == "0", "{what}: {counters}");
    }
    let snmp = guest.sh("awk '/^Udp:/ || /^Tcp:/ { print $NF }' /proc/net/snmp")?;
    println!("{}", snmp.replace('\n', " "));
    let stats = daemon.balanced_stats()?;
    println!("{:?}; drops {:?}", stats.paths, stats.drops());
    daemon.terminate()
}
