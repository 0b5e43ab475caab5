//! A guest whose memory is on another NUMA node than the worker that polls it.

use anyhow::{Context, Result, ensure};

use crate::bench::Bench;

const CGROUPS: &str = "/run/cgroups";
const GUEST: &str = "vm3";
const WARNING: &str = "port 'vm3': its guest's memory is on NUMA node 1, worker 0, which polls it, on node 0";

/// `show` tells of it, and where the memory is.
pub fn far_memory(bench: &Bench) -> Result<String> {
    let node = &bench.node;
    // The node's processors are all on its node 0.
    node.sh(&format!(
        "sed -i 's/^\\[datapath\\]$/&\\ncpus = [0]/' /run/pointwork/pointwork.toml && \
         mkdir -p {CGROUPS} && mount -t cgroup2 none {CGROUPS} && echo +cpuset >{CGROUPS}/cgroup.subtree_control && \
         mkdir {CGROUPS}/far && echo 1 >{CGROUPS}/far/cpuset.mems"
    ))?;
    bench.stop_pointworkd()?;
    bench.start_pointworkd()?;
    let outcome = guest(bench);
    let left = node.sh(&format!(
        "kill -KILL $(cat {CGROUPS}/far/cgroup.procs); ip netns delete {GUEST}; \
         while ! rmdir {CGROUPS}/far; do sleep 0.1; done; umount {CGROUPS} && rmdir {CGROUPS} && \
         sed -i '/^cpus = /d' /run/pointwork/pointwork.toml"
    ));
    let deleted = bench.pointwork(&format!("del-port {GUEST}"));
    bench.stop_pointworkd()?;
    bench.start_pointworkd()?;
    let said = outcome?;
    left?;
    deleted?;
    Ok(said)
}

fn guest(bench: &Bench) -> Result<String> {
    bench.pointwork(&format!("add-port {GUEST} --socket /run/pointwork/{GUEST}.sock"))?;
    let program = bench.node.program("netns-guest");
    bench.node.sh(&format!(
        "ip netns add {GUEST} && {{ setsid sh -c 'echo $$ >{CGROUPS}/far/cgroup.procs && exec ip netns exec {GUEST} {program} \
         /run/pointwork/{GUEST}.sock --mac 02:00:00:00:00:03 --address 10.1.0.9/24' >/run/{GUEST}.log 2>&1 & }}"
    ))?;
    bench.wait_warning(WARNING, true)?;
    let memory = bench.pointwork("show")?["ports"]
        .as_array()
        .and_then(|ports| ports.iter().find(|port| port["name"] == GUEST))
        .map(|port| port["memory"].clone())
        .context("no such port")?;
    let on = |node: &str| memory["nodes"][node].as_u64().unwrap_or(0);
    ensure!(on("1") > on("0"), "{memory}");
    Ok(format!("{} KiB on node 1", on("1") / 1024))
}
