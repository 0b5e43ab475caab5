//! What ports cost in memory, and that no packet waits for it.

use std::path::{Path, PathBuf};

use anyhow::{Context, Result, ensure};
use qemu_tests::daemon::{DaemonConfig, PortConfig};
use qemu_tests::frontend::packet::Packet;
use qemu_tests::host::{WorkDir, wait_for};
use qemu_tests::net::{Net, SOON};
use serde_json::Value;

/// Stations that are there before the worker is watched: more than any queue of it has places.
const WARM: u32 = 2000;
/// Those that come then.
const NEW: u32 = 4000;

/// The directory of the daemon's only worker below `/proc`.
fn worker(net: &Net) -> Result<PathBuf> {
    for task in std::fs::read_dir(format!("/proc/{}/task", net.daemon.pid()))? {
        let path = task?.path();
        if std::fs::read_to_string(path.join("comm"))?.trim() == "worker-0" {
            return Ok(path);
        }
    }
    anyhow::bail!("no worker")
}

/// Page faults of a thread so far, minor and major (proc_pid_stat(5), fields 10 and 12).
fn faults(thread: &Path) -> Result<u64> {
    let stat = std::fs::read_to_string(thread.join("stat"))?;
    let fields: Vec<&str> = stat.rsplit_once(')').context("no name")?.1.split_whitespace().collect();
    Ok(fields[10 - 3].parse::<u64>()? + fields[12 - 3].parse::<u64>()?)
}

/// Each of these stations behind the first port speaks to the second guest, twice: once without a flow, once with one.
fn speak(net: &mut Net, stations: std::ops::Range<u32>) -> Result<()> {
    for station in stations {
        let [.., a, b] = station.to_be_bytes();
        let packet = Packet::eth([2, 0, 0, 7, a, b], net.guests[1].mac);
        let frame = packet.ipv4([10, 7, a, b], [10, 0, 0, 2]).udp(7, 7).payload_len(100).build();
        for _ in 0..2 {
            net.guests[0].send(&frame)?;
            net.guests[1].expect(&frame)?;
        }
    }
    Ok(())
}

#[test]
fn a_worker_waits_for_no_page_while_flows_come() -> Result<()> {
    let dir = WorkDir::new()?;
    let ports = ["p1", "p2"].map(|name| PortConfig::server(name, &dir).with("miss_rate = 1000000"));
    let mut net = Net::start(dir, DaemonConfig::new(ports), |_, builder| builder)?;
    net.greet()?;
    let worker = worker(&net)?;
    speak(&mut net, 0..WARM)?;
    let before = faults(&worker)?;
    speak(&mut net, WARM..WARM + NEW)?;
    let waited = faults(&worker)? - before;
    let stats = net.daemon.stats()?;
    let known: u64 = stats.workers.iter().map(|worker| worker.l1_entries).sum();
    ensure!(known >= u64::from(WARM + NEW), "{known} flows in the exact-match table");
    println!("{waited} page faults of the worker while {NEW} flows came, {before} before");
    ensure!(waited == 0, "{waited} page faults");
    Ok(())
}

#[test]
fn what_a_port_costs_is_shown() -> Result<()> {
    let mut net = Net::plain(2)?;
    net.greet()?;
    let memory = |net: &Net, port: &str| -> Result<Value> {
        let show = net.daemon.ctl(&["show"])?;
        let ports = show["ports"].as_array().context("no ports")?;
        let port = ports.iter().find(|shown| shown["name"] == port).context("no such port")?;
        Ok(port["memory"].clone())
    };
    let number = |memory: &Value, key: &str| memory[key].as_u64().with_context(|| format!("{key}: {memory}"));
    // A guest uses some of its memory, and has not touched the rest.
    let seen = wait_for("memory to be looked at", SOON, || {
        let memory = memory(&net, "p1")?;
        Ok((number(&memory, "used")? > 0).then_some(memory))
    })?;
    let regions = net.guests[0].frontend.memory().regions();
    let shared: u64 = regions.iter().map(|region| region.spec().len as u64).sum();
    ensure!(number(&seen, "guest")? == shared && number(&seen, "used")? < shared, "{seen} of {shared}");
    ensure!(number(&seen, "page")? == 4096, "{seen}");
    if Path::new("/proc/self/numa_maps").exists() {
        wait_for("its nodes", SOON, || {
            let memory = memory(&net, "p1")?;
            let nodes = memory["nodes"].as_object().context("no nodes")?;
            Ok(nodes.values().filter_map(Value::as_u64).any(|bytes| bytes > 0).then_some(()))
        })?;
    }
    // Flows cost something, but nothing of what others have.
    let (tables, others) = (number(&seen, "tables")?, number(&memory(&net, "p2")?, "tables")?);
    speak(&mut net, 0..100)?;
    let now = number(&memory(&net, "p1")?, "tables")?;
    ensure!(now > tables + 100 * 64, "{now} bytes after {tables}");
    let same = number(&memory(&net, "p2")?, "tables")?;
    ensure!(same <= others + 4096, "{same} bytes after {others}");
    Ok(())
}
