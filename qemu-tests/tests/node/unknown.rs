//! What nobody knows passes all the same.

use std::time::Duration;

use anyhow::{Context, Result, ensure};
use qemu_tests::host::wait_for;

use crate::bench::{Bench, DEADLINE};

/// Frames with unknown Ethernet types and protocols, and with headers that are not read, arrive as they were sent, both ways.
/// Those whose headers are not read are each decided by Open vSwitch.
pub fn frames(bench: &Bench) -> Result<String> {
    const PORTS: [&str; 2] = ["vm3", "vm4"];
    for port in PORTS {
        let socket = format!("/run/pointwork/{port}.sock");
        bench.vsctl(&format!(
            "add-port br0 {port} -- set Interface {port} external_ids:pointwork-socket={socket}"
        ))?;
        wait_for(&format!("the socket of {port}"), DEADLINE, || {
            Ok((bench.node.run(&format!("test -S {socket}"), DEADLINE)?.status == 0).then_some(()))
        })?;
    }
    let program = bench.node.program("odd-frames");
    let sockets = "/run/pointwork/vm3.sock /run/pointwork/vm4.sock";
    let said = bench.node.run(&format!("{program} {sockets}"), Duration::from_secs(90))?.success()?;
    let (sent, for_host) = said.trim().split_once(' ').with_context(|| said.clone())?;
    let (sent, for_host): (u64, u64) = (sent.parse()?, for_host.parse()?);
    let stats = bench.stats()?;
    let ports: Vec<_> = PORTS.iter().filter_map(|port| stats.ports.get(*port)).collect();
    let received: u64 = ports.iter().map(|port| port.rx_packets).sum();
    let to_host: u64 = ports.iter().map(|port| port.rx_to_host).sum();
    let forwarded: u64 = ports.iter().map(|port| port.rx_forwarded).sum();
    ensure!(received == sent && to_host + forwarded == sent, "of {sent}: {ports:#?}");
    ensure!(to_host >= for_host, "{to_host} of {for_host} by the host: {ports:#?}");
    for port in PORTS {
        bench.vsctl(&format!("del-port {port}"))?;
    }
    bench.wait_in_step(DEADLINE)?;
    Ok(format!("{sent} frames, {for_host} of them with headers that are not read; {to_host} by the host"))
}
