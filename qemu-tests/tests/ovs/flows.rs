//! The flows of OVS are all here, each compiled or left to OVS under a reason.

use std::collections::BTreeMap;

use anyhow::{Context, Result, ensure};
use qemu_tests::daemon::PortConfig;
use qemu_tests::frontend::packet::{BROADCAST, Packet};
use qemu_tests::host::wait_for;
use qemu_tests::net::SOON;
use qemu_tests::ovs::BRIDGE;
use serde_json::Value;

use crate::Bench;

/// Match and actions as both print them, made comparable: OVS says of a packet that it has an Ethernet header, and names
/// a port by its name. A flow of ours is one with `in_port(pN)`.
fn of_ovs(it: &Bench) -> Result<BTreeMap<String, String>> {
    let dump = it.ovs.appctl(&["dpctl/dump-flows", "--names"])?;
    let mut flows = BTreeMap::new();
    for line in dump.lines().filter(|line| line.contains("in_port(p")) {
        let (matches, rest) = line.split_once(", packets:").context(line.to_owned())?;
        let (_, actions) = rest.split_once("actions:").context(line.to_owned())?;
        flows.insert(plain(matches), actions.to_owned());
    }
    Ok(flows)
}

/// Without what is understood: the kind of packet, and fields that are not matched.
fn plain(matches: &str) -> String {
    matches.replace("packet_type(ns=0,id=0),", "").replace(" ", "")
}

fn of_ours(it: &Bench) -> Result<BTreeMap<String, (String, Value)>> {
    let dump = it.dump()?;
    let text = |flow: &Value, key: &str| flow[key].as_str().unwrap_or_default().to_owned();
    let flows = dump["flows"].as_array().cloned().unwrap_or_default();
    Ok(flows.into_iter().map(|flow| (plain(&text(&flow, "flow")), (text(&flow, "actions"), flow))).collect())
}

#[test]
fn each_flow_is_listed_with_what_becomes_of_it() -> Result<()> {
    let mut it = Bench::start(3)?;
    it.greet()?;
    it.ovs.ofctl(&["add-flow", BRIDGE, "priority=100,udp,tp_dst=99,actions=drop"])?;
    it.ovs.ofctl(&["add-flow", BRIDGE, "priority=100,udp,tp_dst=98,actions=p3,p2"])?;
    it.ovs.ofctl(&["add-flow", BRIDGE, "priority=100,udp,tp_dst=97,actions=controller"])?;
    it.ovs.ofctl(&["add-flow", BRIDGE, "priority=100,udp,tp_dst=96,actions=mod_nw_ttl:9,p2,local"])?;
    for round in 0..4_u8 {
        for (port, to) in [(99, &[][..]), (98, &[1, 2]), (97, &[]), (96, &[1]), (512, &[1])] {
            let packet = it.net.packet(0, 1).udp(7, port).payload(&[round; 60]);
            it.net.guests[0].send(&packet.build())?;
            for &guest in to {
                let (_, _, checked) = it.net.guests[guest].expect_checked()?;
                ensure!(checked.ports == (7, port), "{checked:?}");
            }
        }
        let (back, all) =
            (it.net.packet(1, 0).tcp(1, 2).build(), crate::hello([2, 0, 0, 0, 0, 3], [10, 0, 0, 3]));
        it.net.guests[1].send(&back)?;
        it.net.guests[0].expect(&back)?;
        it.net.guests[2].send(&all)?;
        it.net.guests[0].expect(&all)?;
        it.net.guests[1].expect(&all)?;
        it.settle()?;
    }
    // All flows are younger than their idle time, so they stay while both are read.
    wait_for("the same flows here and there", SOON, || {
        it.daemon().ctl(&["sync"])?;
        let (theirs, ours) = (of_ovs(&it)?, of_ours(&it)?);
        let same = ours.len() == theirs.len()
            && ours.iter().all(|(key, (actions, _))| theirs.get(key).is_some_and(|theirs| theirs == actions));
        Ok(same.then_some(()))
    })
    .with_context(|| format!("{:#?}\n{:#?}", of_ovs(&it), of_ours(&it)))?;

    let ours = of_ours(&it)?;
    let one = |part: &str| -> Result<&Value> {
        let mut found = ours.iter().filter(|(key, _)| key.contains(part));
        let (_, (_, flow)) = found.next().with_context(|| format!("no flow with {part}: {ours:#?}"))?;
        Ok(flow)
    };
    let number = |flow: &Value, key: &str| flow[key].as_f64().unwrap_or(-1.0);
    for (part, handling) in [
        ("dst=99)", "fast"),
        ("dst=98)", "fast"),
        ("dst=97)", "punt: userspace"),
        ("dst=96)", "punt: foreign port br0"),
        ("dst=512/", "fast"),
    ] {
        let flow = one(part)?;
        ensure!(flow["handling"].as_str().unwrap_or_default().starts_with(handling), "{flow:#}");
        // The first of four packets has no flow; OVS carries out those of a punt, we count them.
        let packets = number(flow, "packets");
        ensure!((1.0..=3.0).contains(&packets), "{flow:#}");
        ensure!(number(flow, "bytes") == packets * 102.0, "{flow:#}");
        ensure!((0.0..30.0).contains(&number(flow, "used_seconds")), "{flow:#}");
    }
    let show = it.daemon().ctl(&["show"])?;
    ensure!(show["flows"]["learned"].as_u64() == Some(ours.len() as u64), "{show:#}");
    let punts = show["punts"].as_array().cloned().unwrap_or_default();
    let sum = |ours: &BTreeMap<String, (String, Value)>, reason: &str| {
        let mine = |flow: &&(String, Value)| {
            flow.1["handling"].as_str().is_some_and(|how| how == format!("punt: {reason}"))
        };
        ours.values().filter(mine).count() as u64
    };
    ensure!(punts.len() >= 2, "{show:#}");
    for punt in punts {
        let reason = punt["reason"].as_str().unwrap_or_default();
        ensure!(punt["flows"].as_u64() == Some(sum(&ours, reason)), "{punt} but {ours:#?}");
    }
    it.finish().map(drop)
}

#[test]
fn tcp_flags_and_bytes_are_counted() -> Result<()> {
    let mut it = Bench::start(2)?;
    it.greet()?;
    let packet = it.net.packet(0, 1).tcp_segment((1, 2), 1, 0, 0x12).payload_len(500);
    it.becomes_fast(0, 1, &packet)?;
    let used = || -> Result<f64> {
        let flows = of_ours(&it)?;
        let flow = flows.values().find(|(_, flow)| flow["tcp_flags"] == 0x12);
        let (_, flow) = flow.with_context(|| format!("{flows:#?}"))?;
        flow["used_seconds"].as_f64().context("never used")
    };
    let first = used()?;
    wait_for("time to pass", SOON, || Ok((used()? > first + 0.3).then_some(())))?;
    it.finish().map(drop)
}

#[test]
fn groups_keep_flows_in_their_buckets() -> Result<()> {
    let mut it = Bench::secure(4, |port: PortConfig| port)?;
    it.ovs.ofctl(&[
        "add-group",
        BRIDGE,
        "group_id=1,type=select,selection_method=hash,fields(ip_src,udp_src),\
         bucket=weight=1,output:p2,bucket=weight=1,output:p3,bucket=weight=1,output:p4",
    ])?;
    it.ovs.ofctl(&["add-flow", BRIDGE, "in_port=p1,actions=group:1"])?;
    let packet = |it: &Bench, source: u16| {
        let guest = &it.net.guests[0];
        Packet::eth(guest.mac, BROADCAST).ipv4(guest.ip, [10, 0, 9, 9]).udp(source, 7).payload_len(40)
    };
    let reached = |it: &mut Bench, frame: &[u8]| -> Result<usize> {
        it.net.guests[0].send(frame)?;
        let mut found = None;
        wait_for("one of the buckets", SOON, || {
            for guest in 1..4 {
                if let Some((_, _, received)) =
                    it.net.guests[guest].receive(std::time::Duration::from_millis(2))?
                {
                    ensure!(received == frame && found.is_none(), "twice, or another frame");
                    found = Some(guest);
                }
            }
            Ok(found)
        })
    };
    let sources = 100..130_u16;
    let mut buckets = BTreeMap::new();
    for round in 0..3 {
        for source in sources.clone() {
            let frame = packet(&it, source).build();
            let guest = reached(&mut it, &frame)?;
            let first = *buckets.entry(source).or_insert(guest);
            ensure!(first == guest, "flow {source} moved from {first} to {guest} in round {round}");
        }
        it.settle()?;
    }
    ensure!((1..4).all(|guest| buckets.values().any(|&reached| reached == guest)), "{buckets:?}");
    ensure!(it.handling("in_port(p1)")?.iter().any(|how| how == "fast"), "{:#}", it.dump()?);

    // By the datapath's own hash only the datapath can choose.
    it.ovs.ofctl(&[
        "mod-group",
        BRIDGE,
        "group_id=1,type=select,selection_method=dp_hash,\
         bucket=weight=1,output:p2,bucket=weight=1,output:p3,bucket=weight=1,output:p4",
    ])?;
    it.settle()?;
    let mut buckets = BTreeMap::new();
    let before = it.daemon().stats()?;
    for round in 0..3 {
        for source in sources.clone() {
            let frame = packet(&it, source).build();
            let guest = reached(&mut it, &frame)?;
            let first = *buckets.entry(source).or_insert(guest);
            ensure!(first == guest, "dp_hash: flow {source} moved from {first} to {guest} in round {round}");
        }
        it.settle()?;
    }
    let after = it.daemon().stats()?;
    ensure!(after.ports["p1"].rx_forwarded == before.ports["p1"].rx_forwarded, "{after:?}");
    let handling = it.handling("recirc_id(0),in_port(p1)")?;
    ensure!(handling.iter().any(|how| how.starts_with("punt") && how.contains("hash")), "{:#}", it.dump()?);
    it.finish().map(drop)
}
