//! Classes of tagged packets and of ethertypes, and what cannot be told apart.

use std::collections::BTreeMap;

use anyhow::{Context, Result, ensure};
use qemu_tests::host::wait_for;
use qemu_tests::tools::Ping;

use super::{ASIDE, DEADLINE, DEVICE, HOST, VM1, VM2, Wire};

/// The addresses of VLAN 10: of `vm1`, of `vm2`, which is not in it, and of the far end.
const TAGGED: [&str; 3] = ["10.2.0.1", "10.2.0.2", "10.2.0.3"];
const VM1_MAC: &str = "02:00:00:00:00:01";
const VM2_MAC: &str = "02:00:00:00:00:02";

/// How the far end leaves tags, and how our end takes them.
pub fn set_tags(wire: &Wire, insert: &str, parse: &str) -> Result<()> {
    wire.0.node.sh(&format!(
        "ip netns exec far ethtool -K eth0 txvlan {insert} tx-vlan-stag-hw-insert {insert} && \
         ethtool -K {DEVICE} rxvlan {parse} rx-vlan-stag-hw-parse {parse}"
    ))?;
    Ok(())
}

/// `vm1` on an access port of VLAN 10, and the far end's device of that VLAN, which gives its packets a priority. `vm2` stays
/// untagged, as the far end's own device.
fn join_vlan(wire: &Wire) -> Result<()> {
    let [vm1, vm2, far] = TAGGED;
    let bench = wire.0;
    bench.vsctl("set port vm1 tag=10")?;
    bench.node.sh(&format!(
        "ip -n far link add link eth0 name eth0.10 type vlan id 10 egress-qos-map 0:5 && ip -n far link set eth0.10 up && \
         ip -n far address add {far}/24 dev eth0.10 && ip -n vm1 address add {vm1}/24 dev eth0 && \
         ip -n vm2 address add {vm2}/24 dev eth0 && \
         ip -n far neighbour replace {vm2} lladdr {VM2_MAC} dev eth0.10 && \
         ip -n far neighbour replace {VM1} lladdr {VM1_MAC} dev eth0"
    ))?;
    Ok(())
}

fn leave_vlan(wire: &Wire) -> Result<()> {
    let [vm1, vm2, _] = TAGGED;
    wire.0.vsctl("clear port vm1 tag")?;
    wire.0.node.sh(&format!(
        "ip -n far link delete eth0.10 && ip -n vm1 address delete {vm1}/24 dev eth0 && \
         ip -n vm2 address delete {vm2}/24 dev eth0 && ip -n far neighbour delete {VM1} dev eth0"
    ))?;
    Ok(())
}

/// While packets of both go: a tagged one to the untagged guest, and an untagged one to the guest of the VLAN, get nowhere.
fn apart(wire: &Wire) -> Result<()> {
    let [_, untagged, _] = TAGGED;
    let before = (wire.echoes()?, wire.echoes_at("vm2")?);
    for stranger in [VM1, untagged] {
        let ping = ping(wire, "far", stranger, 20)?;
        ensure!(ping.received == 0, "{ping}");
    }
    let after = (wire.echoes()?, wire.echoes_at("vm2")?);
    ensure!(before == after, "some have arrived in the other VLAN: {before:?}, {after:?}");
    Ok(())
}

fn ping(wire: &Wire, from: &str, to: &str, count: u32) -> Result<Ping> {
    let command = format!("ip netns exec {from} ping -n -q -c {count} -i 0.02 -W 1 {to}");
    let output = wire.0.node.run(&command, DEADLINE)?;
    Ping::parse(&output.stdout).with_context(|| format!("{output:?}"))
}

/// As it is in the beginning: what the other end leaves beside a packet nobody sees here, so that nothing is taken.
pub fn unseen(wire: &Wire) -> Result<String> {
    const WARNING: &str = "what it receives stays the kernel's, because VLAN tags are not seen";
    let [vm1, ..] = TAGGED;
    wire.0.wait_warning(WARNING, true)?;
    set_tags(wire, "on", "on")?;
    join_vlan(wire)?;
    wire.wait_reachable(VM2)?;
    wire.wait_reachable(vm1)?;
    let taken = wire.taken(|| {
        apart(wire)?;
        let pings = (wire.ping(vm1, 20)?, wire.ping(VM2, 20)?);
        ensure!(pings.0.lost() == 0 && pings.1.lost() == 0, "{pings:?}");
        Ok(())
    })?;
    ensure!(taken == 0 && wire.classes()? == Some(0), "{taken} taken, {:?}", wire.classes());
    let log = wire.0.node.sh("cat /run/pointworkd.log")?;
    ensure!(log.matches(WARNING).count() == 1, "{log}");
    leave_vlan(wire)?;
    set_tags(wire, "off", "off")?;
    wire.0.wait_warning(WARNING, false)?;
    Ok("nothing is taken while tags are not seen".into())
}

/// Tagged packets are carried here both ways, byte for byte, beside untagged ones.
pub fn tagged(wire: &Wire) -> Result<String> {
    const COUNT: u32 = 100;
    let [vm1, _, far] = TAGGED;
    let bench = wire.0;
    join_vlan(wire)?;
    wire.wait_reachable(VM2)?;
    wire.wait_reachable(vm1)?;
    // Of the VLAN's flows one comes from the device, and one goes to it.
    wait_for("fast flows of the VLAN", DEADLINE, || {
        wire.ping(vm1, 2)?;
        let flows = bench.flows()?;
        let fast = |from: &str, text: &str| {
            flows.iter().any(|(_, how, flow)| how == "fast" && flow.contains(from) && flow.contains(text))
        };
        let both = fast(&format!("in_port({DEVICE})"), "pop_vlan,vm1")
            && fast("in_port(vm1)", &format!("push_vlan(vid=10,pcp=0),{DEVICE}"));
        Ok(both.then_some(()))
    })?;
    let fast = || -> Result<(u64, u64, u64)> {
        let stats = bench.stats()?;
        let port = &stats.ports[DEVICE];
        Ok((port.fast_copies, stats.ports["vm1"].fast_copies, port.rx_to_host))
    };
    apart(wire)?;
    let before = fast()?;
    let captures = [("far", "eth0"), ("vm1", "eth0")].map(|(namespace, device)| {
        let command = format!(
            "ip netns exec {namespace} tcpdump -Z root -U --immediate-mode -n -i {device} -w /run/{namespace}.pcap 2>/run/{namespace}.tcpdump"
        );
        bench.node.spawn(&command).map(|job| (namespace, job))
    });
    let captures = captures.into_iter().collect::<Result<Vec<_>>>()?;
    for (namespace, _) in &captures {
        let listening = format!("grep -q 'listening on' /run/{namespace}.tcpdump");
        wait_for("tcpdump to listen", DEADLINE, || {
            Ok((bench.node.run(&listening, DEADLINE)?.status == 0).then_some(()))
        })?;
    }
    let ping = ping(wire, "vm1", far, COUNT)?;
    ensure!(ping.lost() == 0, "{ping}: {:#?}", wire.balanced()?.ports);
    let mut frames = Vec::new();
    for (namespace, job) in captures {
        frames.push(wait_for("all frames to be in the capture", DEADLINE, || {
            let file = bench.node.copy_out(&format!("/run/{namespace}.pcap"))?;
            Ok(Some(echoes(&std::fs::read(file)?)?).filter(|frames| frames.len() >= 2 * COUNT as usize))
        })?);
        job.interrupt(DEADLINE)?;
    }
    let [at_far, at_vm1] = &frames[..] else { anyhow::bail!("two captures") };
    let counts = (at_far.len(), at_vm1.len());
    ensure!(counts == (2 * COUNT as usize, 2 * COUNT as usize), "{counts:?} frames");
    for (message, at_vm1) in at_vm1 {
        let at_far = at_far.get(message).with_context(|| format!("not at the far end: {at_vm1:02x?}"))?;
        // What the guest sends gets the access port's tag; what the far end sends, with its priority, loses it.
        let is_from_vm1 = at_vm1[6..12] == [2, 0, 0, 0, 0, 1];
        let tag = if is_from_vm1 { [0x81, 0, 0, 10] } else { [0x81, 0, 0xa0, 10] };
        let expected = [&at_vm1[..12], &tag, &at_vm1[12..]].concat();
        ensure!(*at_far == expected, "{at_far:02x?} is not {expected:02x?}");
    }
    let after = fast()?;
    let (from, to, host) = (after.0 - before.0, after.1 - before.1, after.2 - before.2);
    ensure!(
        from >= COUNT as u64 * 9 / 10 && to >= COUNT as u64 * 9 / 10,
        "{from} and {to} fast, {host} by the host"
    );
    leave_vlan(wire)?;
    wire.wait_reachable(VM1)?;
    Ok(format!("{COUNT} tagged and back, {from} and {to} copies fast, {host} by the host"))
}

/// Why nothing is taken where tags may come beside their packets: with both settings of the receiving end, which does nothing
/// about them, a tagged packet is taken for an untagged one. Here the word of who has switched `rxvlan` off is false.
pub fn beside(wire: &Wire) -> Result<String> {
    let [_, untagged, _] = TAGGED;
    join_vlan(wire)?;
    set_tags(wire, "on", "off")?;
    wire.wait_reachable(VM2)?;
    wire.wait_classes("a class", |classes| classes > 0)?;
    let crossed = wait_for("packets to be in the other VLAN", DEADLINE, || {
        wire.ping(VM2, 1)?;
        let before = wire.echoes_at("vm2")?;
        ping(wire, "far", untagged, 5)?;
        let crossed = wire.echoes_at("vm2")? - before;
        Ok((crossed > 0).then_some(crossed))
    })?;
    set_tags(wire, "on", "on")?;
    wire.wait_classes("the classes to go", |classes| classes == 0)?;
    apart(wire)?;
    set_tags(wire, "off", "off")?;
    leave_vlan(wire)?;
    Ok(format!("{crossed} of 5 tags beside their packets unseen, none where they may be"))
}

/// The frames of a capture that are ICMP echo on IPv4, tagged or not, by their ICMP messages.
fn echoes(file: &[u8]) -> Result<BTreeMap<Vec<u8>, Vec<u8>>> {
    let word = |at: usize| Some(u32::from_le_bytes(file.get(at..at + 4)?.try_into().ok()?));
    ensure!(word(0) == Some(0xa1b2_c3d4), "no capture");
    let (mut at, mut frames) = (24, BTreeMap::new());
    while let Some(len) = word(at + 8) {
        let Some(frame) = file.get(at + 16..at + 16 + len as usize) else { break };
        at += 16 + frame.len();
        let ip = if frame[12..14] == [0x81, 0] { 18 } else { 14 };
        let is_echo = matches!(frame.get(ip + 20), Some(0 | 8)) && frame[ip + 9] == 1;
        if frame[ip - 2..].starts_with(&[8, 0, 0x45]) && is_echo {
            frames.insert(frame[ip + 20..].to_vec(), frame.to_vec());
        }
    }
    Ok(frames)
}

/// Where rules do not look at addresses the class is the ethertype; it is given back as long as some of it is the host's.
pub fn ethertype(wire: &Wire) -> Result<String> {
    // An address that no other class has.
    const STRANGER: &str = "10.1.0.77";
    let bench = wire.0;
    let rules = [
        format!("priority=200,ip,in_port={DEVICE},actions=output:vm1"),
        format!("priority=300,ip,in_port={DEVICE},nw_dst={HOST},actions=LOCAL"),
    ];
    let ofctl = |command: &str, rule: &str| bench.node.sh(&format!("ovs-ofctl {command} br0 '{rule}'"));
    bench.node.sh(&format!("ip -n far neighbour replace {STRANGER} lladdr 02:00:00:00:00:77 dev eth0"))?;
    let reached = || bench.stats().map(|stats| stats.ports["vm1"].tx_packets);
    let sends = || -> Result<(u64, u64)> {
        let before = reached()?;
        let taken = wire.taken(|| ping(wire, "far", STRANGER, 20).map(drop))?;
        Ok((taken, reached()? - before))
    };
    let (taken, _) = sends()?;
    ensure!(taken <= ASIDE, "{taken} of the stranger's 20 packets are taken from the beginning");
    ofctl("add-flow", &rules[0])?;
    wait_for("the ethertype to be taken", DEADLINE, || {
        let (taken, reached) = sends()?;
        Ok((taken >= 20 && reached >= 20).then_some(()))
    })?;
    ofctl("add-flow", &rules[1])?;
    let job = bench.node.spawn(&format!("ip netns exec far ping -n -q -i 0.05 {HOST}"))?;
    wait_for("the ethertype to be given back", DEADLINE, || {
        let (taken, reached) = sends()?;
        Ok((taken <= ASIDE && reached >= 20).then_some(()))
    })?;
    super::lost(job)?;
    ofctl("--strict del-flows", rules[1].split(",actions").next().unwrap_or_default())?;
    wait_for("the ethertype to be taken again", DEADLINE, || Ok((sends()?.0 >= 20).then_some(())))?;
    ofctl("--strict del-flows", rules[0].split(",actions").next().unwrap_or_default())?;
    bench.node.sh(&format!("ip -n far neighbour delete {STRANGER} dev eth0"))?;
    wire.wait_reachable(VM1)?;
    Ok("an ethertype taken, given back, and taken again".into())
}
