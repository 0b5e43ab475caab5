//! What goes, comes back, and changes under traffic.

use std::time::Duration;

use anyhow::{Context, Result, ensure};
use qemu_tests::host::wait_for;

use crate::bench::{Bench, DEADLINE, VM2, lost};

/// In step within so long after Open vSwitch is back.
const SOON: Duration = Duration::from_secs(5);

/// The kernel tells nobody of a flush. Open vSwitch 3.1 does not install the flows again by itself.
pub fn flush(bench: &Bench) -> Result<String> {
    let mut seen = Vec::new();
    for flush in ["ovs-appctl --timeout=10 dpctl/del-flows", "ovs-dpctl del-flows"] {
        bench.wait_fast()?;
        let traffic = bench.traffic()?;
        bench.node.sh(flush)?;
        bench.wait_in_step(SOON)?;
        bench.node.sh("ovs-appctl --timeout=10 revalidator/purge")?;
        bench.wait_fast()?;
        let (sent, unanswered) = lost(traffic)?;
        ensure!(unanswered <= sent / 20, "{flush}: {unanswered} of {sent} lost");
        seen.push(format!("{unanswered} of {sent} lost"));
    }
    Ok(seen.join(", "))
}

/// Known flows go on without Open vSwitch, and soon after its start all is in step.
pub fn restart_of_ovs(bench: &Bench) -> Result<String> {
    let traffic = bench.traffic()?;
    bench.node.stop_vswitchd()?;
    let ping = bench.ping(VM2, 10)?;
    ensure!(ping.lost() == 0, "without Open vSwitch: {ping}");
    bench.node.start_vswitchd()?;
    bench.wait_in_step(SOON)?;
    bench.wait_fast()?;
    let (sent, unanswered) = lost(traffic)?;
    ensure!(unanswered <= sent / 10, "{unanswered} of {sent} lost");
    Ok(format!("{unanswered} of {sent} lost"))
}

/// Representors stay in the bridge without `pointworkd`; it adopts them, and guests go on.
pub fn pointworkd_killed(bench: &Bench) -> Result<String> {
    let indexes = || bench.node.sh("cat /sys/class/net/vm1/ifindex /sys/class/net/vm2/ifindex");
    let before = indexes()?;
    let traffic = bench.traffic()?;
    bench.node.sh("kill -KILL $(cat /run/pointworkd.pid)")?;
    ensure!(indexes()? == before, "the representors have gone");
    bench.start_pointworkd()?;
    bench.wait_fast()?;
    ensure!(indexes()? == before, "the representors were made anew");
    bench.wait_in_step(SOON)?;
    let (sent, unanswered) = lost(traffic)?;
    Ok(format!("{unanswered} of {sent} lost"))
}

/// Somebody deletes the TAP under us: it is made again, and Open vSwitch takes it up.
pub fn representor_deleted(bench: &Bench) -> Result<String> {
    let traffic = bench.traffic()?;
    let index = || bench.node.sh("cat /sys/class/net/vm2/ifindex").ok();
    let before = index().context("no representor")?;
    bench.node.sh("ip link delete vm2")?;
    wait_for("the representor to be made again", DEADLINE, || Ok(index().filter(|now| *now != before)))?;
    bench.wait_fast()?;
    bench.wait_in_step(SOON)?;
    let (sent, unanswered) = lost(traffic)?;
    Ok(format!("{unanswered} of {sent} lost"))
}

/// A port that is deleted in Open vSwitch goes with its flows and stays away; added again it has another number in the datapath,
/// and flows are read with it.
pub fn port_deleted(bench: &Bench) -> Result<String> {
    let number = || -> Result<String> {
        let shown = bench.node.sh("ovs-dpctl show")?;
        let line =
            shown.lines().find(|line| line.ends_with(": vm2")).context("vm2 is not in the datapath")?;
        Ok(line.trim().to_owned())
    };
    let before = number()?;
    let traffic = bench.traffic()?;
    bench.vsctl("del-port vm2")?;
    let has_port = || -> Result<bool> {
        let show = bench.pointwork("show")?;
        Ok(show["ports"].as_array().context("no ports")?.iter().any(|port| port["name"] == "vm2"))
    };
    wait_for("the port to go", DEADLINE, || Ok((!has_port()?).then_some(())))?;
    wait_for("its flows to go", DEADLINE, || Ok((bench.fast_flows()? == 0).then_some(())))?;
    let output = bench.node.run("ip link show vm2", DEADLINE)?;
    ensure!(output.status != 0, "its representor has stayed: {}", output.stdout);
    // Another device gets its number; and whatever else changes, the port does not come back by itself.
    bench.node.sh("ip link add filler type dummy && ip link set filler up")?;
    bench.vsctl("add-port br0 filler")?;
    wait_for("the other port", DEADLINE, || {
        Ok(bench.node.sh("ovs-dpctl show")?.contains("filler").then_some(()))
    })?;
    ensure!(
        !has_port()? && !bench.vsctl("list-ports br0")?.contains("vm2"),
        "the port has come back by itself"
    );
    bench.pointwork("add-port vm2 --socket /run/pointwork/vm2.sock")?;
    bench.wait_fast()?;
    bench.wait_in_step(SOON)?;
    let after = number()?;
    ensure!(after != before, "still {after}");
    bench.vsctl("del-port filler")?;
    bench.node.sh("ip link delete filler")?;
    let (sent, unanswered) = lost(traffic)?;
    Ok(format!("{before}, then {after}; {unanswered} of {sent} lost"))
}

/// Our own ports are put into a bridge that takes the place of the one that had them.
pub fn bridge_made_anew(bench: &Bench) -> Result<String> {
    let traffic = bench.traffic()?;
    bench.vsctl("del-br br0")?;
    bench.wait_warning("Open vSwitch has no bridge 'br0'", true)?;
    bench.vsctl("add-br br0")?;
    bench.address_bridge()?;
    bench.wait_fast()?;
    bench.wait_in_step(SOON)?;
    let (sent, unanswered) = lost(traffic)?;
    let traffic = bench.traffic()?;
    bench.vsctl("del-br br0 -- add-br br0")?;
    bench.address_bridge()?;
    bench.wait_fast()?;
    bench.wait_in_step(SOON)?;
    let (sent_then, unanswered_then) = lost(traffic)?;
    Ok(format!("{unanswered} of {sent} lost, in one transaction {unanswered_then} of {sent_then}"))
}

/// While Open vSwitch gives flows to tc nothing is forwarded here.
pub fn hw_offload(bench: &Bench) -> Result<String> {
    bench.vsctl("set Open_vSwitch . other_config:hw-offload=true")?;
    bench.wait_warning("hw-offload is on in Open vSwitch", true)?;
    wait_for("no fast flows", DEADLINE, || Ok((bench.fast_flows()? == 0).then_some(())))?;
    let fast = |paths: qemu_tests::daemon::Paths| paths.l1 + paths.l2;
    let show = bench.stats()?.ports["vm1"].fast_copies;
    let before = bench.paths()?;
    let iperf = bench.iperf3("vm1", VM2, "")?;
    let after = bench.paths()?;
    ensure!(
        fast(after) == fast(before) && bench.stats()?.ports["vm1"].fast_copies == show,
        "{before:?} {after:?}"
    );
    // It goes on offloading until it is restarted.
    bench.vsctl("set Open_vSwitch . other_config:hw-offload=false")?;
    bench.wait_warning("hw-offload is on in Open vSwitch", false)?;
    bench.wait_reachable()?;
    bench.node.stop_vswitchd()?;
    bench.node.start_vswitchd()?;
    bench.wait_warning("takes the host path", false)?;
    bench.wait_fast()?;
    Ok(format!("{:.0} Mbit/s by the host path", iperf.megabits()))
}

/// Without the module there is one line that says so, and with it all is as before.
pub fn module(bench: &Bench) -> Result<String> {
    bench.node.stop_vswitchd()?;
    // Asked for a family that it does not have, the kernel would load the module by itself.
    let loader =
        bench.node.sh("cat /proc/sys/kernel/modprobe && echo /bin/false >/proc/sys/kernel/modprobe")?;
    bench.node.sh("ovs-dpctl del-dp ovs-system && rmmod openvswitch")?;
    let error = wait_for("the missing module to be noticed", DEADLINE, || {
        let show = bench.pointwork("show")?;
        Ok(show["ovs"]["datapath_error"].as_str().map(str::to_owned))
    })?;
    ensure!(error.contains("modprobe openvswitch") && !error.contains('\n'), "{error}");
    bench.node.sh(&format!("echo {} >/proc/sys/kernel/modprobe && modprobe openvswitch", loader.trim()))?;
    bench.node.start_vswitchd()?;
    bench.address_bridge()?;
    bench.wait_fast()?;
    bench.wait_in_step(SOON)?;
    Ok(error)
}
