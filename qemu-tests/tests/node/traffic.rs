//! What packets do while nothing is changed.

use std::time::Duration;

use anyhow::{Result, ensure};
use qemu_tests::host::wait_for;

use crate::bench::{Bench, DEADLINE, HOST, VM2, lost};

/// iperf3 both ways: by flows of ours, with segments whole; and the flows are those of the kernel's datapath.
pub fn between_guests(bench: &Bench) -> Result<String> {
    // A guest whose segments came cut to the MTU would see none of this length.
    let whole = bench
        .node
        .spawn("ip netns exec vm2 timeout 20 tcpdump -Z root -n -i eth0 -c 1 'inbound and greater 15000'")?;
    let before = bench.stats()?;
    let there = bench.iperf3("vm1", VM2, "")?;
    let back = bench.iperf3("vm1", VM2, "-R")?;
    let after = bench.stats()?;
    let fast = |paths: qemu_tests::daemon::Paths| paths.l1 + paths.l2;
    let host = |paths: qemu_tests::daemon::Paths| paths.miss + paths.punt;
    let (fast, host) = (fast(after.paths) - fast(before.paths), host(after.paths) - host(before.paths));
    ensure!(fast > 100 && fast > 99 * host, "{fast} packets fast, {host} by the host");
    let whole = whole.wait(DEADLINE)?;
    ensure!(whole.status == 0, "no segment came whole: {whole:?}");
    let flows = bench.wait_in_step(DEADLINE)?;
    ensure!(flows >= 2, "{flows} flows");

    // The same by the kernel alone, in the same boot: virtual Ethernet pairs instead of our ports.
    for (namespace, device, number) in [("va", "veth1", 11), ("vb", "veth2", 12)] {
        bench.node.sh(&format!(
            "ip netns add {namespace} && ip link add {device} type veth peer name eth0 netns {namespace} && \
             ip link set {device} up && ip -n {namespace} address add 10.1.0.{number}/24 dev eth0 && \
             ip -n {namespace} link set eth0 up"
        ))?;
        bench.vsctl(&format!("add-port br0 {device}"))?;
    }
    bench.node.sh("ip netns exec vb iperf3 -s -D -I /run/veth.pid")?;
    let kernel = bench.iperf3("va", "10.1.0.12", "")?;
    bench.vsctl("del-port veth1 -- del-port veth2")?;
    bench.node.sh("kill $(cat /run/veth.pid) && ip netns delete va && ip netns delete vb")?;
    Ok(format!(
        "{:.0} and {:.0} Mbit/s, {fast} packets fast, {host} by the host, {flows} flows; \
         veth pairs on the kernel's datapath alone: {:.0} Mbit/s",
        there.megabits(),
        back.megabits(),
        kernel.megabits()
    ))
}

/// The bridge's own port is not ours: Open vSwitch carries packets to it and from it.
pub fn to_the_host(bench: &Bench) -> Result<String> {
    let ping = bench.ping(HOST, 10)?;
    ensure!(ping.lost() == 0, "{ping}");
    bench.node.sh("iperf3 -s -D -I /run/host.pid")?;
    let there = bench.iperf3("vm1", HOST, "")?;
    let back = bench.iperf3("vm1", HOST, "-R")?;
    bench.node.sh("kill $(cat /run/host.pid)")?;
    ensure!(there.bits_per_second > 0.0 && back.bits_per_second > 0.0, "{there:?} {back:?}");
    let flows = bench.flows()?;
    let foreign = flows.iter().filter(|(_, handling, _)| handling == "punt: foreign port br0").count();
    ensure!(foreign > 0, "{flows:#?}");
    bench.wait_in_step(DEADLINE)?;
    Ok(format!("{:.0} and {:.0} Mbit/s; {ping}", there.megabits(), back.megabits()))
}

/// Open vSwitch, which expires flows after ten idle seconds, keeps one whose packets it does not see; and no longer when there
/// are none.
pub fn keep_alive(bench: &Bench) -> Result<String> {
    let traffic = bench.traffic()?;
    let before = bench.paths()?;
    std::thread::sleep(Duration::from_secs(32));
    let after = bench.paths()?;
    let (sent, unanswered) = lost(traffic)?;
    let (kept, missed) = (after.keepalive - before.keepalive, after.miss - before.miss);
    // A few for ARP, whose flows come and go; a flow that had expired would have missed in each direction.
    ensure!(unanswered == 0, "{unanswered} of {sent} lost");
    ensure!(bench.fast_flows()? >= 2, "the flows are gone: {:#?}", bench.flows());
    wait_for("idle flows to expire", DEADLINE, || Ok((bench.fast_flows()? == 0).then_some(())))?;
    bench.wait_in_step(DEADLINE)?;
    ensure!(kept >= 6, "{kept} keep-alives in 32 s");
    Ok(format!("{kept} keep-alives and {missed} misses for {sent} packets in 32 s"))
}
