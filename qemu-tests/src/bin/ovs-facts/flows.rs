//! How flows look, come and go on netlink.

use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use qemu_tests::host::wait_for;

use crate::bench::{Bench, QUIET, SOON, SOURCE, TARGET, ipv4, sh, udp, vsctl};
use crate::netlink::{Attrs, Message, cmd, flow, key};
use crate::packets::{metadata, recirc};
use crate::tap::Mode;

const FORWARD: &str = "in_port=1,actions=output:2";

/// Sends a datagram from the first TAP to the second, and waits for the flow that it causes.
fn learn(bench: &mut Bench, frame: &[u8]) -> Result<Message> {
    bench.taps[0].send(frame)?;
    let flow = bench.installed(0, 0)?;
    bench.taps[1].next()?;
    Ok(flow)
}

/// Events about flows that are not probes of vswitchd's own.
fn of_flow<'a>(bench: &'a Bench, ufid: &[u8]) -> Vec<&'a Message> {
    bench.events.events.iter().filter(|event| event.ufid() == Some(ufid)).collect()
}

/// An installation and a modification come complete, a deletion with identifier and statistics alone.
pub fn events() -> Result<String> {
    let mut bench = Bench::new("ev", &[Mode::Plain; 3], &[FORWARD])?;
    let new = learn(&mut bench, &udp(7))?;
    let ufid = new.ufid().context("no identifier")?.to_vec();
    ensure!(ufid.len() == 16, "{new:?}");
    for kind in [flow::KEY, flow::MASK, flow::ACTIONS] {
        ensure!(new.attrs.get(kind).is_some(), "{new:?}");
    }
    ensure!(new.attrs.get(flow::STATS).is_none() && new.attrs.get(flow::USED).is_none(), "{new:?}");
    bench.taps[0].send(&udp(7))?;
    bench.taps[1].next()?;

    bench.events.clear()?;
    let start = Instant::now();
    bench.rules(&["in_port=1,actions=output:3"])?;
    let flows = bench.netlink.flows.id;
    let ours = |event: &Message| event.family == flows && event.ufid() == Some(&ufid[..]);
    let set = bench.events.wait("the modification", SOON, ours)?;
    let modified = start.elapsed();
    ensure!(set.cmd == cmd::SET && set.outputs() == [bench.ports[2]], "{set:?}");
    ensure!(set.key() == new.key() && set.mask() == new.mask() && set.stats().0 == 1, "{set:?}");

    bench.events.clear()?;
    let start = Instant::now();
    bench.rules(&["in_port=1,udp,tp_dst=9,actions=output:2"])?;
    let del = bench.events.wait("the deletion", SOON, ours)?;
    let deleted = start.elapsed();
    ensure!(del.cmd == cmd::DEL, "{del:?}");
    for kind in [flow::KEY, flow::MASK, flow::ACTIONS] {
        ensure!(del.attrs.get(kind).is_none(), "a deletion that says more than it must: {del:?}");
    }
    ensure!(del.stats() == (1, udp(7).len() as u64), "{del:?}");
    Ok(format!(
        "NEW {:?} and SET {:?} are complete, DEL has {:?}; a change of rules shows after {} and {} ms",
        new.attrs.kinds(),
        set.attrs.kinds(),
        del.attrs.kinds(),
        modified.as_millis(),
        deleted.as_millis()
    ))
}

/// A flow of untagged packets has no VLAN attribute in key or mask, and yet no tagged packet hits it.
pub fn vlan() -> Result<String> {
    let mut bench = Bench::new("vl", &[Mode::Plain; 2], &[FORWARD])?;
    let untagged = learn(&mut bench, &udp(7))?;
    for attrs in [untagged.key(), untagged.mask()] {
        ensure!(attrs.get(key::VLAN).is_none() && attrs.get(key::ENCAP).is_none(), "{untagged:#?}");
    }
    let tagged = |vlan| ipv4().vlan(vlan).udp(1000, 7).payload_len(100).build();
    bench.events.clear()?;
    let ten = learn(&mut bench, &tagged(10))?;
    let still = bench.netlink.flow(untagged.ufid().context("ufid")?)?.context("gone")?;
    ensure!(still.stats().0 == 0, "a tagged packet hit the flow of untagged ones: {still:?}");
    let tci = |flow: &Message| {
        let number = |attrs: Attrs| Some(u16::from_be_bytes(*attrs.get(key::VLAN)?.first_chunk()?));
        Some((number(flow.key())?, number(flow.mask())?))
    };
    let (value, mask) = tci(&ten).context("no VLAN in key or mask")?;
    ensure!(value == 0x100a, "{value:#x}");
    ensure!(mask & 0x1000 != 0, "the mask {mask:#x} does not tell tagged from untagged");
    // Each other VLAN hits the flow if the mask says so, and only then.
    let mut seen = vec![(value, mask)];
    for vlan in [15, 20] {
        bench.events.clear()?;
        bench.taps[0].send(&tagged(vlan))?;
        bench.taps[1].next()?;
        if seen.iter().all(|(value, mask)| (0x1000 | vlan) & mask != value & mask) {
            seen.push(tci(&bench.installed(0, 0)?).context("no VLAN")?);
        } else {
            bench.events.read_for(QUIET)?;
            ensure!(
                bench.events.events.iter().all(|event| event.cmd != cmd::NEW),
                "{:#?}",
                bench.events.events
            );
        }
    }
    ensure!(seen == [(0x100a, 0x100a), (0x1014, 0x1014)], "other values and masks: {seen:04x?}");
    Ok(format!("no attribute for untagged; for the VLANs 10, 15 and 20 these values and masks: {seen:04x?}"))
}

/// With its default `vlan-limit` of 1 vswitchd does not read a second tag, and asks for its ethertype only. The kernel reads
/// it all the same: it shows both tags, takes what is behind them for the ethertype, and matches the whole second TCI, but
/// not its TPID, which it shows as 0 under a mask of ones.
pub fn second_tag() -> Result<String> {
    let mut bench = Bench::new("st", &[Mode::Plain; 2], &[FORWARD])?;
    let tagged = |inner: u8| {
        let mut frame = ipv4().vlan(10).udp(1000, 7).payload_len(100).build();
        frame.splice(16..16, [0x81, 0x00, 0x00, inner]);
        frame
    };
    let mut seen = Vec::new();
    for inner in [20, 21] {
        bench.events.clear()?;
        let flow = learn(&mut bench, &tagged(inner))?;
        let (values, masks) = (flow.key().nested(key::ENCAP), flow.mask().nested(key::ENCAP));
        let (values, masks) =
            (values.context("no ENCAP in the key")?, masks.context("no ENCAP in the mask")?);
        ensure!(values.get(key::ETHERTYPE) == Some(&[0; 2]), "{flow:#?}");
        ensure!(masks.get(key::ETHERTYPE) == Some(&[0xff; 2]), "{flow:#?}");
        ensure!(values.get(key::VLAN) == Some(&[0x10, inner]), "{flow:#?}");
        ensure!(masks.get(key::VLAN) == Some(&[0xff; 2]), "{flow:#?}");
        let (values, masks) = (values.nested(key::ENCAP), masks.nested(key::ENCAP));
        let (values, masks) =
            (values.context("one ENCAP in the key")?, masks.context("one ENCAP in the mask")?);
        ensure!(values.get(key::ETHERTYPE) == Some(&[8, 0]), "{flow:#?}");
        ensure!(masks.get(key::ETHERTYPE) == Some(&[0xff; 2]), "{flow:#?}");
        seen.push(flow.ufid().context("ufid")?.to_vec());
    }
    ensure!(seen[0] != seen[1], "one flow for both");
    Ok("both tags in key and mask, the second exact but for its TPID, with the ethertype behind them".into())
}

/// A frame of IEEE 802.2 has a length where the Ethernet type would be: none in the key, all ones in the mask.
pub fn no_ethertype() -> Result<String> {
    let mut bench = Bench::new("ne", &[Mode::Plain; 2], &[FORWARD])?;
    // LLC of the spanning tree protocol, to an address that OVS does not reserve.
    let mut frame = [&TARGET[..], &SOURCE[..], &[0, 38, 0x42, 0x42, 0x03]].concat();
    frame.resize(60, 0);
    let flow = learn(&mut bench, &frame)?;
    ensure!(flow.key().get(key::ETHERTYPE).is_none(), "{flow:#?}");
    ensure!(flow.mask().get(key::ETHERTYPE) == Some(&[0xff, 0xff]), "{flow:#?}");
    Ok("no ETHERTYPE in the key, ffff in the mask".into())
}

/// A port that goes takes no flows with it: the kernel says so once, and vswitchd deletes the flows later.
pub fn port_goes() -> Result<String> {
    let mut bench =
        Bench::new("pg", &[Mode::Plain; 3], &["in_port=1,actions=output:2", "in_port=2,actions=output:1"])?;
    let into = learn(&mut bench, &udp(7))?;
    bench.taps[1].send(&udp(8))?;
    let from = bench.installed(1, 0)?;
    bench.taps[0].next()?;

    let pid = sh("cat /run/openvswitch/ovs-vswitchd.pid")?;
    sh(&format!("kill -STOP {pid}"))?;
    let resume = Resume(pid);
    bench.events.clear()?;
    drop(bench.taps.remove(1));
    let vports = bench.netlink.vports.id;
    let gone =
        bench.events.wait("the port's end", SOON, |event| event.family == vports && event.cmd == cmd::DEL)?;
    bench.events.read_for(QUIET)?;
    for flow in [&into, &from] {
        let ufid = flow.ufid().context("ufid")?;
        ensure!(of_flow(&bench, ufid).is_empty(), "an event for a flow of the port");
        ensure!(bench.netlink.flow(ufid)?.is_some(), "the flow went with the port");
    }
    // What the port's flows do now: nothing arrives, nothing goes wrong.
    bench.taps[0].send(&udp(7))?;
    bench.taps[1].silent(QUIET)?;

    drop(resume);
    let start = Instant::now();
    let mut said = Vec::new();
    for flow in [&from, &into] {
        let ufid = flow.ufid().context("ufid")?.to_vec();
        let event = bench.events.wait("vswitchd to notice", SOON, |event| event.ufid() == Some(&ufid[..]))?;
        said.push((event, start.elapsed().as_millis()));
    }
    let [(from, deleted), (into, changed)] = &said[..] else { anyhow::bail!("two") };
    ensure!(from.cmd == cmd::DEL, "{from:?}");
    ensure!(into.cmd == cmd::SET && into.actions().kinds().is_empty(), "{into:?}");
    Ok(format!(
        "one DEL of the port ({:?}) and none of its flows; vswitchd deletes those that come from it ({deleted} ms), and \
         those to it then drop ({changed} ms)",
        gone.attrs.kinds()
    ))
}

/// Lets vswitchd go on.
struct Resume(String);

impl Drop for Resume {
    fn drop(&mut self) {
        if let Err(error) = sh(&format!("kill -CONT {}", self.0)) {
            eprintln!("{error:#}");
        }
    }
}

/// Flushes are silent, whoever makes them; a flow that comes back has the same identifier.
pub fn flush() -> Result<String> {
    let mut bench = Bench::new("fl", &[Mode::Plain; 2], &[FORWARD])?;
    let first = learn(&mut bench, &udp(7))?;
    let ufid = first.ufid().context("ufid")?.to_vec();
    let mut seen = Vec::new();
    for by in ["dpctl/del-flows", "netlink"] {
        bench.events.clear()?;
        match by {
            "netlink" => drop(bench.netlink.request(bench.netlink.flows, cmd::DEL, &Attrs::default())?),
            command => drop(sh(&format!("ovs-appctl --timeout=10 {command}"))?),
        }
        ensure!(bench.netlink.flow(&ufid)?.is_none(), "the flow outlived {by}");
        bench.events.read_for(2 * QUIET)?;
        ensure!(of_flow(&bench, &ufid).is_empty(), "an event of {by}: {:#?}", bench.events.events);
        let hints = summary(&bench);
        // Before its commit 180ab2fd635e (2024, stale ukeys) vswitchd believes for ever that it has the flow, and serves its packets by
        // upcalls until its own table is purged.
        let back = |bench: &mut Bench, deadline| {
            let start = Instant::now();
            let event = wait_for("the flow to come back", deadline, || {
                bench.taps[0].send(&udp(7))?;
                bench.taps[1].next()?;
                bench.events.read_for(Duration::from_millis(100))?;
                Ok(of_flow(bench, &ufid).first().map(|event| event.cmd))
            });
            event.map(|cmd| (cmd, start.elapsed()))
        };
        let (alone, (again, after)) = match back(&mut bench, Duration::from_secs(4)) {
            Ok(event) => ("by itself", event),
            Err(_) => {
                sh("ovs-appctl --timeout=10 revalidator/purge")?;
                ("after revalidator/purge alone", back(&mut bench, SOON)?)
            }
        };
        ensure!(again == cmd::NEW, "{again}");
        let stale = sh("ovs-vsctl --version")?.contains("(Open vSwitch) 3.1.");
        ensure!(!stale || alone != "by itself", "{by}: the flow came back {alone}");
        seen.push(format!("{by}: {hints}, back {alone} ({} ms)", after.as_millis()));
    }
    Ok(seen.join("; "))
}

/// Commands that only look leave a trace: whoever opens the datapath sets its features again.
pub fn looking() -> Result<String> {
    let mut bench = Bench::new("lo", &[Mode::Plain; 2], &[FORWARD])?;
    learn(&mut bench, &udp(7))?;
    let opens = ["ovs-dpctl show", "ovs-dpctl dump-flows", "ovs-appctl --timeout=10 dpctl/dump-flows"];
    for (command, expected) in
        opens.map(|command| (command, 1)).into_iter().chain([("ovs-ofctl dump-ports lo", 0)])
    {
        bench.events.clear()?;
        sh(command)?;
        bench.events.read_for(QUIET)?;
        let datapaths = bench.netlink.datapaths.id;
        let events = &bench.events.events;
        let sets = events.iter().filter(|event| (event.family, event.cmd) == (datapaths, cmd::SET)).count();
        ensure!((sets, events.len()) == (expected, expected), "{command}: {events:#?}");
    }
    Ok("each ovs-dpctl or dpctl/ command sends one SET of the datapath, ovs-ofctl sends nothing".into())
}

/// While vswitchd is down the kernel's flows go on; its start flushes them silently, but not without a trace.
pub fn restart() -> Result<String> {
    let mut bench = Bench::new("rs", &[Mode::Plain; 2], &[FORWARD])?;
    let flow = learn(&mut bench, &udp(7))?;
    let ufid = flow.ufid().context("ufid")?.to_vec();
    bench.events.clear()?;
    let pid = sh("cat /run/openvswitch/ovs-vswitchd.pid")?;
    sh("ovs-appctl --timeout=10 exit")?;
    wait_for("vswitchd to end", SOON, || {
        Ok((!std::path::Path::new(&format!("/proc/{}", pid.trim())).exists()).then_some(()))
    })?;
    bench.events.read_for(QUIET)?;
    let kept = bench.netlink.flow(&ufid)?.is_some();
    let on_exit = summary(&bench);
    ensure!(kept, "the flow ended with vswitchd: {on_exit}");
    bench.taps[0].send(&udp(7))?;
    bench.taps[1].next()?;

    bench.events.clear()?;
    let start = Instant::now();
    sh("/usr/lib/openvswitch-switch/ovs-vswitchd --detach --no-chdir --pidfile --log-file")?;
    wait_for("the flow to be flushed", SOON, || Ok(bench.netlink.flow(&ufid)?.is_none().then_some(())))?;
    let flushed = start.elapsed();
    // OpenFlow rules are not kept: vswitchd forwards by the bridge's default until it has new ones.
    vsctl("set Open_vSwitch . external-ids:restarted=true")?;
    bench.events.read()?;
    ensure!(of_flow(&bench, &ufid).is_empty(), "an event of the flush: {:#?}", bench.events.events);
    let on_start = summary(&bench);
    let (datapaths, flows) = (bench.netlink.datapaths.id, bench.netlink.flows.id);
    let has =
        |family, cmd| bench.events.events.iter().any(|event| event.family == family && event.cmd == cmd);
    ensure!(has(datapaths, cmd::SET) || has(datapaths, cmd::NEW), "no event of the datapath: {on_start}");
    ensure!(has(flows, cmd::NEW) && has(flows, cmd::DEL), "no probes: {on_start}");
    let probes = bench.events.events.iter().filter(|event| (event.family, event.cmd) == (flows, cmd::NEW));
    let named = probes.filter(|event| event.ufid().is_some()).count();
    bench.rules(&[FORWARD])?;
    learn(&mut bench, &udp(9))?;
    Ok(format!(
        "exit: {on_exit}; start: {on_start} ({named} of the new flows with an identifier), the flow was gone {} ms after the command",
        flushed.as_millis()
    ))
}

/// How many events of which sort there are, such as "datapath SET 1".
fn summary(bench: &Bench) -> String {
    let families = [
        (bench.netlink.datapaths.id, "datapath"),
        (bench.netlink.vports.id, "port"),
        (bench.netlink.flows.id, "flow"),
    ];
    let mut parts = Vec::new();
    for (family, name) in families {
        for (number, verb) in [(cmd::NEW, "NEW"), (cmd::DEL, "DEL"), (cmd::SET, "SET")] {
            let count = bench
                .events
                .events
                .iter()
                .filter(|event| (event.family, event.cmd) == (family, number))
                .count();
            if count > 0 {
                parts.push(format!("{name} {verb} {count}"));
            }
        }
    }
    if parts.is_empty() { "no events".into() } else { parts.join(", ") }
}

/// A flow lives as long as a packet comes every 3 s, and dies about 10 s after the last one.
pub fn expiry() -> Result<String> {
    let rules = ["in_port=1,udp,tp_dst=7,actions=output:2", "in_port=1,udp,tp_dst=8,actions=output:2"];
    let mut bench = Bench::new("ex", &[Mode::Plain; 2], &rules)?;
    let kept = learn(&mut bench, &udp(7))?.ufid().context("ufid")?.to_vec();
    bench.events.clear()?;
    let left = learn(&mut bench, &udp(8))?.ufid().context("ufid")?.to_vec();
    bench.taps[0].send(&udp(8))?;
    bench.taps[1].next()?;
    ensure!(kept != left);
    let dies = |bench: &mut Bench, ufid: &[u8]| {
        bench.events.wait("the flow to expire", Duration::from_secs(30), |event| {
            event.cmd == cmd::DEL && event.ufid() == Some(ufid)
        })
    };
    let start = Instant::now();
    let mut last = start;
    // Five packets, 3 s apart: longer than the 10 s after which an idle flow goes.
    for at in 0..=4 {
        let until = start + Duration::from_secs(3 * at);
        bench.events.read_for(until.saturating_duration_since(Instant::now()))?;
        // In turn as a guest's packet, and executed by hand.
        match at % 2 {
            0 => bench.taps[0].send(&udp(7))?,
            _ => bench.netlink.execute(&udp(7), &metadata(bench.ports[0]), &recirc(0))?,
        }
        bench.taps[1].next()?;
        last = Instant::now();
    }
    let idle = dies(&mut bench, &left)?;
    ensure!(idle.attrs.get(flow::KEY).is_none(), "{idle:?}");
    ensure!(bench.netlink.flow(&kept)?.is_some(), "the flow that was used is gone");
    let first = idle.at - start;
    let second = dies(&mut bench, &kept)?.at - last;
    for age in [first, second] {
        ensure!(age.as_secs_f64() >= 9.0, "{age:?}");
    }
    ensure!(bench.flows(0)?.is_empty());
    Ok(format!(
        "idle flows went {:.1} and {:.1} s after their last packets; one packet every 3 s keeps a flow, also one that is executed",
        first.as_secs_f64(),
        second.as_secs_f64()
    ))
}
