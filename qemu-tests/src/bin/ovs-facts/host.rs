//! What else on the host decides about a port's packets, and devices that come late.

use std::time::Instant;

use anyhow::{Result, ensure};
use netlink_sys::Socket;
use netlink_sys::constants::NETLINK_ROUTE;
use qemu_tests::host::wait_for;

use crate::bench::{Bench, QUIET, SOON, sh, udp, vsctl};
use crate::netlink::{cmd, receive};
use crate::tap::{Mode, Tap};

const FORWARD: &str = "in_port=1,actions=output:2";

/// Policing and QoS of Open vSwitch are the kernel's traffic control on the port's device.
pub fn policing() -> Result<String> {
    let bench = Bench::new("po", &[Mode::Plain; 2], &[FORWARD])?;
    let before = sh("tc qdisc show dev po1")?;
    ensure!(!before.contains("ingress") && !before.contains("clsact"), "{before}");
    vsctl("set interface po1 ingress_policing_rate=100 ingress_policing_burst=100")?;
    let qdisc = sh("tc qdisc show dev po1")?;
    let filter = sh("tc filter show dev po1 parent ffff:")?;
    ensure!(qdisc.contains("qdisc ingress ffff: parent ffff:fff1"), "{qdisc}");
    ensure!(filter.contains("police"), "{filter}");
    // 64 frames of 1400 bytes at once are more than 100 kbit of burst.
    let frame = crate::bench::ipv4().udp(1000, 7).payload_len(1400).build();
    for _ in 0..64 {
        bench.taps[0].send(&frame)?;
    }
    bench.taps[1].next()?;
    let mut arrived = 1;
    let mut last = Instant::now();
    while last.elapsed() < QUIET {
        if bench.taps[1].read()?.is_some() {
            (arrived, last) = (arrived + 1, Instant::now());
        }
    }
    ensure!(arrived < 40, "{arrived} of 64 frames passed");
    vsctl("set interface po1 ingress_policing_rate=0 ingress_policing_burst=0")?;
    let after = sh("tc qdisc show dev po1")?;
    ensure!(!after.contains("ingress"), "{after}");

    vsctl("set port po2 qos=@q -- --id=@q create qos type=linux-htb other-config:max-rate=1000000")?;
    let shaped = wait_for("the shaper", SOON, || {
        let shown = sh("tc qdisc show dev po2")?;
        Ok(shown.contains("htb").then_some(shown))
    })?;
    vsctl("clear port po2 qos -- --all destroy qos")?;
    Ok(format!("{}; {}; {}; {arrived} of 64 frames passed", qdisc.trim(), filter.trim(), shaped.trim()))
}

/// Types of rtnetlink's messages (include/uapi/linux/rtnetlink.h).
const RTM_NEWQDISC: u16 = 36;
const RTM_DELQDISC: u16 = 37;
const RTM_NEWTFILTER: u16 = 44;
/// The multicast group of what happens to traffic control.
const RTNLGRP_TC: u32 = 4;

/// A drop at tc ingress is before Open vSwitch, one at tc egress behind it; both send events of their own.
pub fn traffic_control() -> Result<String> {
    let mut bench = Bench::new("tc", &[Mode::Plain; 2], &[FORWARD])?;
    bench.taps[0].send(&udp(7))?;
    let flow = bench.installed(0, 0)?;
    bench.taps[1].next()?;
    let ufid = flow.ufid().unwrap_or_default().to_vec();
    let count = |bench: &mut Bench| -> Result<u64> {
        Ok(bench.netlink.flow(&ufid)?.map_or(0, |flow| flow.stats().0))
    };
    let mut socket = Socket::new(NETLINK_ROUTE)?;
    socket.bind_auto()?;
    socket.set_non_blocking(true)?;
    socket.add_membership(RTNLGRP_TC)?;
    sh("tc qdisc add dev tc1 clsact && tc filter add dev tc1 ingress matchall action drop")?;
    bench.taps[0].send(&udp(7))?;
    bench.taps[1].silent(QUIET)?;
    ensure!(count(&mut bench)? == 0, "a packet dropped at tc ingress was counted");
    sh(
        "tc qdisc del dev tc1 clsact && tc qdisc add dev tc2 clsact && tc filter add dev tc2 egress matchall action drop",
    )?;
    bench.taps[0].send(&udp(7))?;
    bench.taps[1].silent(QUIET)?;
    ensure!(count(&mut bench)? == 1, "a packet dropped at tc egress was not counted");
    let dropped = bench.taps[1].counter("tx_dropped")?;
    sh("tc qdisc del dev tc2 clsact")?;
    let mut wanted = vec![RTM_NEWQDISC, RTM_NEWTFILTER, RTM_DELQDISC];
    wait_for("rtnetlink's events", SOON, || {
        let kinds: Vec<u16> = receive(&socket)?.iter().map(|(header, _)| header.kind).collect();
        wanted.retain(|kind| !kinds.contains(kind));
        Ok(wanted.is_empty().then_some(()))
    })?;
    sh(
        "nft 'add table netdev facts; add chain netdev facts in { type filter hook ingress device \"tc1\" priority 0; }; add rule netdev facts in drop'",
    )?;
    bench.taps[0].send(&udp(7))?;
    bench.taps[1].silent(QUIET)?;
    ensure!(count(&mut bench)? == 1, "a packet dropped by nftables at ingress was counted");
    sh("nft delete table netdev facts")?;
    bench.taps[0].send(&udp(7))?;
    bench.taps[1].next()?;
    ensure!(count(&mut bench)? == 2);
    Ok(format!(
        "ingress drops of tc and nftables come before the flow, egress drops of tc after it (tx_dropped {dropped}); \
         RTNLGRP_TC tells of each change"
    ))
}

/// A port of the database whose device comes later, goes, and comes again is taken up without being told.
pub fn late_device() -> Result<String> {
    let mut bench = Bench::new("la", &[Mode::Plain; 1], &["in_port=1,actions=output:9"])?;
    sh("ovs-vsctl --timeout=20 --no-wait add-port la late -- set interface late ofport_request=9")?;
    let error = wait_for("the error", SOON, || {
        let shown = vsctl("get interface late error")?;
        Ok((shown.trim() != "[]").then_some(shown))
    })?;
    let mut times = Vec::new();
    let mut numbers = Vec::new();
    let vports = bench.netlink.vports.id;
    for _ in 0..2 {
        bench.events.clear()?;
        let start = Instant::now();
        let late = Tap::new("late", Mode::Plain)?;
        bench.events.wait("the port", SOON, |event| event.family == vports && event.cmd == cmd::NEW)?;
        times.push(start.elapsed().as_millis());
        numbers.push(bench.netlink.port("late")?);
        let ofport = wait_for("the OpenFlow port", SOON, || {
            let shown = vsctl("get interface late ofport")?;
            Ok((shown.trim() == "9").then_some(shown))
        });
        ensure!(ofport.is_ok(), "OpenFlow port {:?}", vsctl("get interface late ofport"));
        bench.taps[0].send(&udp(7))?;
        late.next()?;
        drop(late);
        bench.events.wait("the port's end", SOON, |event| event.family == vports && event.cmd == cmd::DEL)?;
    }
    Ok(format!("{}; taken up after {times:?} ms, as port {numbers:?} of the datapath", error.trim()))
}
