//! Many flows: all are here, and it costs little to follow them.

use std::collections::BTreeSet;
use std::fmt::Write;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use qemu_tests::host::wait_for;
use qemu_tests::ovs::BRIDGE;

use crate::{Bench, LATE};

const FLOWS: usize = 20_000;
/// Reads of the datapath over which their cost is looked at.
const READS: usize = 4;
/// Between two looks.
const BETWEEN: Duration = Duration::from_millis(500);
/// The mirror aims at a twentieth of a processor.
const SHARE: f64 = 0.1;

/// What the daemon's thread of that name has had of a processor, in seconds.
fn cpu_time(it: &Bench, thread: &str) -> Result<f64> {
    let dir = format!("/proc/{}/task", it.daemon().pid());
    for task in std::fs::read_dir(&dir).context(dir)? {
        let stat = std::fs::read_to_string(task?.path().join("stat"))?;
        let (name, rest) = stat.rsplit_once(") ").context("stat")?;
        if name.ends_with(&format!("({thread}")) {
            // Fields 14 and 15, in ticks of 10 ms.
            let ticks = rest.split_whitespace().skip(11).take(2).map(str::parse::<f64>);
            return Ok(ticks.sum::<Result<f64, _>>()? / 100.0);
        }
    }
    anyhow::bail!("no thread '{thread}'")
}

/// Seconds since the last read of the datapath, if the mirror has the time to say.
fn read_seconds(it: &Bench) -> Result<Option<f64>> {
    Ok(it.daemon().ctl(&["show"])?["ovs"]["read_seconds"].as_f64())
}

/// Puts flows from p1 to p2 into OVS's datapath, each of one address.
fn fill(it: &Bench) -> Result<()> {
    // OVS keeps a flow that it did not make as long as it does what the tables say, and there is room and time.
    it.ovs.vsctl(&[
        "set",
        "open",
        ".",
        "other_config:max-idle=3600000",
        "other_config:flow-limit=200000",
        "other_config:min-revalidate-pps=0",
    ])?;
    it.ovs.appctl(&["upcall/set-flow-limit", "200000"])?;
    let ports = it.ovs.appctl(&["dpctl/show", "netdev@ovs-netdev"])?;
    let number = ports.lines().find_map(|line| {
        let (number, name) = line.trim().strip_prefix("port ")?.split_once(": ")?;
        (name.split(' ').next() == Some("p2")).then(|| number.to_owned())
    });
    let number = number.context(ports)?;
    let mut text = String::new();
    for flow in 0..FLOWS {
        writeln!(
            text,
            "in_port(p1),packet_type(ns=0,id=0),eth(src=02:00:00:00:00:01,dst=02:00:00:00:00:02),eth_type(0x0800),\
             ipv4(src=10.1.{}.{},dst=10.0.0.2,proto=17,tos=0/0,ttl=64/0,frag=no),udp(src={flow},dst=53) {number}",
            flow / 256,
            flow % 256
        )?;
    }
    let file = it.ovs.rundir().join("flows");
    std::fs::write(&file, text)?;
    it.ovs.appctl(&["dpctl/add-flows", "netdev@ovs-netdev", &crate::text(&file)]).map(drop)
}

#[test]
fn many_flows_cost_little() -> Result<()> {
    let mut it = Bench::secure(2, |port| port)?;
    it.ovs.ofctl(&["add-flow", BRIDGE, "in_port=p1,actions=output:p2"])?;
    it.ovs.ofctl(&["add-flow", BRIDGE, "in_port=p2,actions=output:p1"])?;
    fill(&it)?;
    it.daemon().ctl(&["sync"])?;
    let dump = it.dump()?;
    let ours: BTreeSet<&str> = dump["flows"]
        .as_array()
        .context("no flows")?
        .iter()
        .filter(|flow| flow["handling"] == "fast" && flow["actions"] == "p2")
        .filter_map(|flow| flow["flow"].as_str()?.split_once("ipv4(src=10.1.")?.1.split(',').next())
        .collect();
    ensure!(ours.len() == FLOWS, "{} flows", ours.len());

    let (start, before) = (Instant::now(), cpu_time(&it, "mirror")?);
    let (mut reads, mut last) = (0, f64::INFINITY);
    wait_for("some reads", 6 * LATE, || {
        // To ask costs the mirror something too.
        std::thread::sleep(BETWEEN);
        let Some(now) = read_seconds(&it)? else { return Ok(None) };
        reads += (now < last) as usize;
        last = now;
        Ok((reads > READS).then_some(()))
    })?;
    let share = (cpu_time(&it, "mirror")? - before) / start.elapsed().as_secs_f64();
    println!("mirror: {:.2} % of a processor", share * 100.0);
    ensure!(share < SHARE, "the mirror takes {:.1} % of a processor", share * 100.0);

    // What is new is noticed among them, and none of them has gone.
    let packet = it.net.packet(1, 0).udp(7, 9).payload_len(64);
    let frame = packet.build();
    wait_for("the fast path", LATE, || {
        let before = it.net.daemon.stats()?.ports["p2"].rx_forwarded;
        it.net.guests[1].send(&frame)?;
        it.net.guests[0].expect(&frame)?;
        Ok((it.net.daemon.stats()?.ports["p2"].rx_forwarded > before).then_some(()))
    })?;
    ensure!(it.daemon().flows()? > FLOWS, "{} flows", it.daemon().flows()?);
    it.finish().map(drop)
}
