//! Wires under a stock Open vSwitch with its userspace datapath, and what is refused under the kernel's (where they work is
//! tested in the compute node, `node/wire.rs`).

use anyhow::{Result, ensure};
use qemu_tests::daemon::{DaemonConfig, PortConfig};
use qemu_tests::frontend::packet::Packet;
use qemu_tests::host::{WorkDir, wait_for};
use qemu_tests::net::{Net, SOON};
use qemu_tests::netns::Namespace;
use qemu_tests::ovs::{BRIDGE, Ovs};

use crate::bed::{HOST_IP, HOST_MAC, ORDINARY, echo, greet, join, port, settle, until, wire};

#[test]
fn a_wire_is_a_port_of_the_bridge() -> Result<()> {
    let dir = WorkDir::new()?;
    let ovs_dir = WorkDir::new()?;
    let ovs = Ovs::start(&ovs_dir)?;
    let far = Namespace::new()?;
    join(ovs.namespace(), &far, ORDINARY)?;
    let ports = [PortConfig::server("p1", &dir)];
    let config =
        DaemonConfig { more: wire("wire1", "device = \"eth1\""), ..DaemonConfig::under(&ovs, ports) };
    let mut net = Net::start(dir, config, |_, builder| builder)?;
    net.daemon.wait_link(&["p1", "wire1"], true, SOON * 2)?;
    wait_for("the ports in the bridge", SOON * 2, || {
        let list = ovs.ofctl(&["show", BRIDGE])?;
        Ok((list.contains("(p1)") && list.contains("(wire1)")).then_some(()))
    })?;
    let ids = ovs.vsctl(&["get", "interface", "wire1", "external_ids"])?;
    ensure!(ids.contains("pointwork-device=eth1"), "{ids}");
    ovs.ofctl(&["add-flow", BRIDGE, "actions=NORMAL"])?;

    settle(&far)?;
    // What comes while OVS is taking up the devices is lost.
    wait_for("the bridge to forward", SOON * 4, || Ok(greet(&mut net.guests[0]).ok()))?;
    let socket = far.run(|| {
        let socket = std::net::UdpSocket::bind((std::net::Ipv4Addr::from(HOST_IP), 9))?;
        socket.set_read_timeout(Some(SOON))?;
        Ok(socket)
    })?;
    let packet = Packet::eth(net.guests[0].mac, HOST_MAC)
        .ipv4(net.guests[0].ip, HOST_IP)
        .udp(1000, 9)
        .payload_len(900);
    // Both directions are carried here as soon as OVS's flows are known.
    wait_for("packets to take the fast way both ways", SOON * 4, || {
        echo(&mut net.guests[0], &socket, &packet, 900)?;
        let stats = net.daemon.stats()?;
        Ok((stats.ports["p1"].fast_copies > 3 && stats.ports["wire1"].fast_copies > 3).then_some(()))
    })?;
    let stats = net.daemon.balanced_stats()?;
    ensure!(stats.drops().is_empty(), "{:?}", stats.drops());

    // The device goes, and comes back under the same port of the bridge.
    ovs.namespace().ip(&["link", "del", "eth1"])?;
    until(&net, "wire1", "gone", |port| port.fault.is_some())?;
    join(ovs.namespace(), &far, ORDINARY)?;
    until(&net, "wire1", "back", |port| port.link)?;
    wait_for("the bridge to forward again", SOON * 4, || Ok(greet(&mut net.guests[0]).ok()))?;

    // It is deleted in the database, and the device is the host's own again.
    ovs.vsctl(&["del-port", BRIDGE, "wire1"])?;
    wait_for("the port to go", SOON * 2, || Ok(port(&net, "wire1").is_err().then_some(())))?;
    let refused = net.daemon.refusal(&["add-port", "eth1", "--kind", "xdp"])?;
    ensure!(refused.contains("a wire needs a name of its own"), "{refused}");
    net.daemon.ctl(&["add-port", "wire2", "--kind", "xdp", "--device", "eth1"])?;
    until(&net, "wire2", "up", |port| port.link)?;

    // Under the kernel's datapath the device itself is the port, under its own name.
    ovs.vsctl(&["--no-wait", "set", "bridge", BRIDGE, "datapath_type=system"])?;
    wait_for("the wire to be let go of", SOON * 2, || {
        let show = net.daemon.ctl(&["show"])?;
        let said = show["warnings"].to_string();
        let gone = port(&net, "wire2").is_err();
        Ok((gone && said.contains("port 'wire2'") && said.contains("datapath_type=netdev")).then_some(()))
    })?;
    let refused = net.daemon.refusal(&["add-port", "wire3", "--kind", "xdp", "--device", "eth1"])?;
    ensure!(refused.contains("has the name of its device"), "{refused}");
    Ok(())
}
