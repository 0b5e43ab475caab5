//! More changes than are taken in time.

use std::time::Duration;

use anyhow::{Context, Result, ensure};
use qemu_tests::host::wait_for;

use crate::bench::{Bench, DEADLINE, VM2};

/// The daemon's room for events is 64 MiB by the kernel's count; it takes most of a minute to fill it from a shell.
const FLOOD: Duration = Duration::from_secs(240);
/// In step within so long: two sweeps, and the looks themselves.
const SOON: Duration = Duration::from_secs(10);
/// Flows that come while the room is full.
const LATE: usize = 200;
const DAEMON: &str = "$(cat /run/pointworkd.pid)";
const VSWITCHD: &str = "$(cat /run/openvswitch/ovs-vswitchd.pid)";

/// While the daemon stands still, so many changes come that the kernel drops what it tells of some. Afterwards flows that went
/// meanwhile are gone here, those that came are here, and the loss is counted.
pub fn lost(bench: &Bench) -> Result<String> {
    let known = bench.flows()?;
    let (gone, ..) = known.iter().find(|(_, handling, _)| handling == "fast").context("no flow")?;
    let before = counts(bench)?;
    // So that nobody but this test changes flows.
    bench.node.sh(&format!("kill -STOP {DAEMON} {VSWITCHD}"))?;
    let late = overflow(bench, gone);
    // Whatever happened, all goes on.
    bench.node.sh(&format!("kill -CONT {DAEMON}"))?;
    let outcome = late.and_then(|()| {
        wait_for("the loss to be counted", DEADLINE, || Ok((counts(bench)?.0 > before.0).then_some(())))?;
        bench.wait_in_step(SOON)
    });
    let ours = bench.flows();
    let after = counts(bench);
    // What is not Open vSwitch's own it must not find.
    bench.node.sh(&format!("ovs-dpctl del-flows; kill -CONT {VSWITCHD}"))?;
    let (flows, ours, after) = (outcome?, ours?, after?);
    ensure!(!ours.iter().any(|(ufid, ..)| ufid == gone), "a flow that was deleted is still here: {gone}");
    let fresh =
        ours.iter().filter(|(_, how, text)| how == "fast" && text.contains("eth_type(0x88b5)")).count();
    ensure!(fresh == LATE, "{fresh} of {LATE} flows: {:#?}", bench.warnings());
    ensure!(after.1 > before.1, "no resync: {before:?}, {after:?}");
    let show = bench.node.sh(&format!("{} show", bench.node.program("pointwork")))?;
    ensure!(show.contains("for lost events)"), "{show}");
    bench.node.sh("ovs-appctl --timeout=10 revalidator/purge")?;
    let ping = bench.ping(VM2, 2)?;
    Ok(format!("{} losses, {flows} flows in step; {ping}", after.0 - before.0))
}

/// How often events were lost, and all flows were read anew.
fn counts(bench: &Bench) -> Result<(u64, u64)> {
    let show = bench.pointwork("show")?;
    let count = |name: &str| show["ovs"][name].as_u64().with_context(|| format!("no {name}: {show}"));
    Ok((count("lost_events")?, count("resyncs")?))
}

/// Changes flows until the kernel has dropped an event, then deletes the flow `gone` and adds [`LATE`] others.
fn overflow(bench: &Bench, gone: &str) -> Result<()> {
    let number = |name: &str| -> Result<String> {
        let shown = bench.node.sh("ovs-dpctl show")?;
        let line = shown.lines().find_map(|line| line.trim().strip_suffix(&format!(": {name}")));
        Ok(line.and_then(|line| line.strip_prefix("port ")).with_context(|| shown.clone())?.to_owned())
    };
    let (one, other) = (number("vm1")?, number("vm2")?);
    // What is told of a flow grows with its actions: two flows with as much as an action holds, changed again and again.
    let flood = |worker: u32| {
        let flow = format!("recirc_id(0),in_port({one}),eth(src=02:00:00:00:0b:0{worker}),eth_type(0x88b6)");
        let file = format!("/run/flood{worker}");
        format!(
            "line=\"{flow} userspace(pid=1,userdata($(head -c 56000 /dev/zero | tr '\\0' a)))\" && \
             ovs-dpctl add-flow $line && yes \"$line\" | head -n 50 >{file} && \
             until awk '$2 == 16 && $9 > 0 {{ lost = 1 }} END {{ exit !lost }}' /proc/net/netlink; do \
             ovs-dpctl mod-flows {file} || exit 1; done; rm {file}; ovs-dpctl del-flow '{flow}'"
        )
    };
    // Only the losses of this time count: the kernel forgets them with the socket, which this daemon has had from its start.
    let dropped = bench.node.sh("awk '$2 == 16 { sum += $9 } END { print sum + 0 }' /proc/net/netlink")?;
    ensure!(dropped.trim() == "0", "{} events were lost before", dropped.trim());
    let workers = [bench.node.spawn(&flood(1))?, bench.node.spawn(&flood(2))?];
    for worker in workers {
        worker.wait(FLOOD)?.success()?;
    }
    bench.node.sh(&format!("ovs-dpctl del-flow ufid:{gone}"))?;
    bench.node.sh(&format!(
        "for i in $(seq 100 {}); do \
         echo \"ufid:00000000-0000-0000-0000-000000000$i,recirc_id(0),in_port({one}),\
         eth(src=02:00:00:00:0a:01,dst=02:00:00:0a:0$((i / 100)):$((i % 100))),eth_type(0x88b5) {other}\"; \
         done >/run/late && ovs-dpctl add-flows /run/late && rm /run/late",
        99 + LATE
    ))?;
    Ok(())
}
