//! `pointworkd` with the node's NICs, beside stock Open vSwitch on the kernel datapath: flows between the switch's cables move
//! into it, and a guest talks by the igb.

use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use qemu_tests::daemon::Stats;
use qemu_tests::frontend::NetHeader;
use qemu_tests::frontend::packet::{ARP, IPV4, Mac, Packet, check};
use qemu_tests::host::wait_for;
use qemu_tests::nics::{self, Cable};
use qemu_tests::node;
use qemu_tests::tools::Ping;
use qemu_tests::traffic::{Stream, Traffic};

use crate::bench::{Bench, DEADLINE, IGB, LOOSE, PORTS};
use crate::nic::line_of_the_unit;

/// A station at the switch's first cable, and whom it talks to at the second.
const NEAR: Mac = [2, 0, 0, 0, 2, 1];
const FAR: Mac = [2, 0, 0, 0, 2, 2];
/// The same at the switch that the kernel cannot reset.
const LOOSE_NEAR: Mac = [2, 0, 0, 0, 3, 1];
const LOOSE_FAR: Mac = [2, 0, 0, 0, 3, 2];
/// Packets a second: some times what it takes to be hot, and little enough for a daemon without optimization in an emulated machine.
const RATE: u32 = 200;
/// So many packets make a young flow hot (docs/offload.md).
const HOT: usize = 33;
/// Ports of NICs.
const ALL: usize = PORTS + 3;
/// What is at the other end of the igb's cable, and the guest.
const PEER: Mac = [2, 0, 0, 0, 4, 2];
const PEER_IP: [u8; 4] = [10, 4, 0, 2];
/// The guest's VLAN, while it has one.
const VLAN: u16 = 7;
const GUEST: &str = "--mac 02:00:00:00:04:01 --address 10.4.0.1/24";
const SOCKET: &str = "/run/pointwork/vm1.sock";
/// Longer than a packet is on its way.
const GRACE: Duration = Duration::from_secs(3);

/// All is started, and stays for what follows.
pub fn under_ovs(bench: &Bench) -> Result<String> {
    bench.bind(&[&bench.igb, &bench.loose])?;
    let more = nics::nic("igb", &bench.igb, "", "wan", 0..=0)
        + &nics::nic("loose", &bench.loose, "ignore_fragments = true\n", "loose", 1..=2)
        + &format!("[[port]]\nname = \"vm1\"\nsocket = \"{SOCKET}\"\n");
    bench.start_switch(&more)?;
    let program = bench.node.program("netns-guest");
    // Nothing but the test's own packets.
    bench.node.sh(&format!(
        "ip netns add vm1 && ip netns exec vm1 sh -c 'echo 1 >/proc/sys/net/ipv6/conf/default/disable_ipv6' && \
         {{ setsid ip netns exec vm1 {program} {SOCKET} {GUEST} >/run/vm1.log 2>&1 & }}"
    ))?;
    let show = bench.node.pointwork("show")?;
    let nics = show["nics"].as_array().context("no NICs")?;
    let text = |value: &serde_json::Value| value.as_str().unwrap_or_default().to_owned();
    let seen: Vec<_> = nics.iter().map(|nic| (text(&nic["name"]), text(&nic["driver"]))).collect();
    let expected = [("igb", "igb"), ("loose", "rocker"), ("sw", "rocker")];
    ensure!(seen == expected.map(|(name, driver)| (name.into(), driver.into())), "{nics:#?}");
    Ok(format!("{} NICs", seen.len()))
}

fn stats(bench: &Bench) -> Result<Stats> {
    Ok(serde_json::from_value(bench.node.pointwork("stats")?)?)
}

/// Counters that stand still while no worker sees a packet of the first cable: what came in there, and how workers found actions.
fn seen_by_workers(bench: &Bench) -> Result<[u64; 5]> {
    let Stats { ports, paths, .. } = stats(bench)?;
    let up1 = ports.get("up1").context("no port up1")?;
    Ok([up1.rx_packets, paths.l1, paths.l2, paths.miss + paths.punt, paths.keepalive])
}

/// Packets from the first cable to the second, by a bridge that knows both stations.
fn stream(bench: &Bench, near: Mac) -> Result<Stream> {
    bench.cables.iter().try_for_each(|cable| cable.drain())?;
    bench.learn(1, FAR)?;
    Ok(Stream::start(Traffic::new(&bench.cables[..PORTS], 0, near, FAR), RATE))
}

/// Waits until a switch has a rule from its first port to this one, by which it has forwarded something. Its hits so far.
fn wait_rule(bench: &Bench, switch: &str, to: u64) -> Result<u64> {
    wait_for("a rule to be in use", DEADLINE, || {
        let rules = bench.rules(switch)?;
        Ok(rules
            .iter()
            .find(|rule| (rule.from, rule.to) == (1, Some(to)) && rule.hits > 0)
            .map(|rule| rule.hits))
    })
    .with_context(|| flows(bench))
}

/// What `pointwork` knows of flows, for a person.
fn flows(bench: &Bench) -> String {
    let program = bench.node.program("pointwork");
    bench
        .node
        .sh(&format!("{program} dump-flows; {program} show"))
        .unwrap_or_else(|error| format!("{error:#}"))
}

/// Waits until the NIC forwards the stream. How long after it was hot that was, and when.
fn climb(bench: &Bench, stream: &Stream) -> Result<(Duration, Instant)> {
    wait_rule(bench, "sw", 2)?;
    let moved = Instant::now();
    // The stream's thread may find later than the switch what has come.
    wait_for(
        "packets that make it hot",
        DEADLINE,
        || Ok((stream.traffic().came.len() >= HOT).then_some(())),
    )?;
    let hot = stream.traffic().came.get(HOT - 1).context("it moved before it was hot")?.at;
    Ok((moved.saturating_duration_since(hot), moved))
}

/// The NIC forwards the flow soon after it is hot, and the workers see nothing of it.
pub fn hot(bench: &Bench) -> Result<String> {
    // A stall of the machine may hold up one: the best of three counts, each of a station of its own.
    let mut late = Vec::new();
    let (stream, took, moved) = loop {
        let mut near = NEAR;
        near[4] += late.len() as u8 * 0x10;
        let stream = stream(bench, near)?;
        let (took, moved) = climb(bench, &stream)?;
        if took <= Duration::from_secs(3) {
            break (stream, took, moved);
        }
        late.push(took);
        ensure!(late.len() < 3, "{late:?} after they were hot");
        stream.stop(GRACE)?.lost()?;
        wait_for("an idle flow to go", DEADLINE, || {
            Ok((!bench.rules("sw")?.iter().any(|rule| rule.from == 1)).then_some(()))
        })?;
    };
    let listed = bench.node.pointwork("dump-flows")?;
    let listed = listed["flows"].as_array().context("no flows")?;
    ensure!(listed.iter().any(|flow| flow["offloaded"] == "yes"), "{listed:#?}");
    // Now and then a packet is shown to Open vSwitch; between two such the counters of workers stand still.
    let more = RATE as usize;
    let hits = wait_for("workers to see nothing", DEADLINE, || {
        let workers = seen_by_workers(bench)?;
        let before = wait_rule(bench, "sw", 2)?;
        stream.wait_more(1, more, DEADLINE)?;
        let after = wait_rule(bench, "sw", 2)?;
        let is_still = workers == seen_by_workers(bench)?;
        Ok((is_still && after > before).then(|| after - before))
    })?;
    // Those that were on their way when it was begun to count are the difference.
    ensure!(hits as usize * 10 >= more * 9, "{hits} hits for {more} packets");
    let traffic = stream.stop(GRACE)?;
    let lost = traffic.lost()?;
    let workers = stats(bench)?.ports["up2"].tx_packets;
    ensure!(traffic.count(1) + lost == traffic.sent.len(), "packets came out elsewhere");
    ensure!(lost * 50 <= traffic.sent.len(), "{lost} of {} were lost", traffic.sent.len());
    ensure!(bench.faults()?.is_empty(), "{}", bench.faults()?);
    Ok(format!(
        "{:.2} s after it was hot (too late before: {late:?}), {:.2} s after its first packet; then {hits} hits and nothing for workers; of {} packets \
         {workers} by workers, {lost} lost",
        took.as_secs_f64(),
        moved.saturating_duration_since(traffic.sent[0]).as_secs_f64(),
        traffic.sent.len(),
    ))
}

/// Has Open vSwitch change what becomes of the stream, from one port of the switch to another. In words, when the old rule was
/// gone, and when the last packet came by the old way; and how long the later of the two came after the answer.
fn redirect(bench: &Bench, stream: &Stream, command: &str, old: u64, new: u64) -> Result<(Duration, String)> {
    wait_rule(bench, "sw", old)?;
    let begun = Instant::now();
    bench.node.sh(&format!("ovs-ofctl {command}"))?;
    let answered = Instant::now();
    wait_for("the old rule to go", DEADLINE, || {
        Ok((!bench.rules("sw")?.iter().any(|rule| rule.to == Some(old))).then_some(()))
    })?;
    let gone = answered.elapsed();
    wait_rule(bench, "sw", new)?;
    stream.wait_more(new as usize - 1, 2 * RATE as usize, DEADLINE)?;
    let traffic = stream.traffic();
    let came = traffic.came.iter().filter(|came| came.cable == old as usize - 1).map(|came| came.at);
    let last = came.max().context("nothing came by the old way")?;
    let took = gone.max(last.saturating_duration_since(answered));
    let millis = |at: Instant| at.saturating_duration_since(begun).as_millis();
    let said = format!(
        "answered after {} ms, rule gone after {} ms, last packet after {} ms",
        millis(answered),
        millis(answered + gone),
        millis(last)
    );
    Ok((took, said))
}

/// Within a second of a change in Open vSwitch no packet takes the old way, and the new one goes into the switch too.
pub fn policy(bench: &Bench) -> Result<String> {
    let stream = stream(bench, NEAR)?;
    let rule = "priority=100,in_port=up1,dl_src=02:00:00:00:02:01";
    // A stall of the machine may hold up one: the best of three counts.
    let (mut best, mut all) = (Duration::MAX, Vec::new());
    while best > Duration::from_secs(1) {
        let add = format!("add-flow br0 {rule},actions=output:up3");
        let (there, went) = redirect(bench, &stream, &add, 2, 3)?;
        let (back, came) = redirect(bench, &stream, &format!("--strict del-flows br0 {rule}"), 3, 2)?;
        best = best.min(there.max(back));
        all.push(format!("{went}; back: {came}"));
        ensure!(best <= Duration::from_secs(1) || all.len() < 3, "too late three times: {all:#?}");
    }
    let traffic = stream.stop(GRACE)?;
    let lost = traffic.lost()?;
    ensure!(lost * 50 <= traffic.sent.len(), "{lost} of {} were lost", traffic.sent.len());
    Ok(format!("{}; of {} packets {lost} lost", all.join("; again: "), traffic.sent.len()))
}

/// Echo requests from the guest to what is at the igb's cable.
fn ping(bench: &Bench, options: &str) -> Result<Ping> {
    let [a, b, c, d] = PEER_IP;
    let output = bench.run(&format!("ip netns exec vm1 ping -n -q -i 0.1 -W 2 {options} {a}.{b}.{c}.{d}"))?;
    Ping::parse(&output.stdout).with_context(|| format!("{output:?}"))
}

/// Answers ARP and echo requests on a cable, of a VLAN or untagged, until it is over. How many echo requests there were.
fn answer(cable: &Cable, vlan: Option<u16>, over: &AtomicBool) -> Result<usize> {
    let mut answered = 0;
    let to = |station| match vlan {
        Some(vid) => Packet::eth(PEER, station).vlan(vid),
        None => Packet::eth(PEER, station),
    };
    while !over.load(Ordering::Relaxed) {
        let Some(mut frame) = cable.try_receive()? else {
            thread::sleep(Duration::from_millis(1));
            continue;
        };
        let is_tagged = frame.get(12..14) == Some(&[0x81, 0x00]);
        let tag: Option<Vec<u8>> = is_tagged.then(|| frame.drain(12..16).collect());
        if tag.map(|tag| u16::from_be_bytes([tag[2], tag[3]])) != vlan {
            continue; // nobody else is here
        }
        let checked = check(&NetHeader::default(), &frame).map_err(anyhow::Error::msg)?;
        let asks_for = |at: usize| frame.get(at..at + 4) == Some(&PEER_IP);
        let sender = |at: usize| frame.get(at..at + 4).and_then(|ip| ip.first_chunk().copied());
        if checked.ethertype == ARP && frame.get(20..22) == Some(&[0, 1]) && asks_for(38) {
            let asker = sender(28).context("a short request")?;
            let mut reply = to(checked.src).arp_reply(PEER_IP, asker).build();
            reply.resize(60, 0);
            cable.send(&reply)?;
        } else if checked.ethertype == IPV4 && checked.dst == PEER && asks_for(30) {
            let at = checked.transport;
            ensure!(frame[at] == 8, "something else than an echo request: {frame:02x?}");
            let number = |at: usize| u16::from_be_bytes([frame[at], frame[at + 1]]);
            let asker = sender(26).context("a short packet")?;
            let reply = to(checked.src)
                .ipv4(PEER_IP, asker)
                .echo_reply(number(at + 4), number(at + 6))
                .payload(&frame[checked.payload]);
            cable.send(&reply.build())?;
            answered += 1;
        }
    }
    Ok(answered)
}

/// Does something while the far end of the igb's cable, in a VLAN or in none, answers, and gives how many echo requests that has answered too.
///
/// # Errors
/// That of the far end before that of the work, which fails for want of answers then.
fn with_peer<T>(bench: &Bench, vlan: Option<u16>, work: impl FnOnce() -> Result<T>) -> Result<(T, usize)> {
    let (cable, over) = (&bench.cables[IGB], AtomicBool::new(false));
    cable.drain()?;
    thread::scope(|scope| {
        let peer = scope.spawn(|| answer(cable, vlan, &over));
        let outcome = {
            let _end = AtEnd(&over);
            work()
        };
        let answered = peer.join().map_err(|_| anyhow::anyhow!("the far end has panicked"))?;
        let answered = answered.context("the far end")?;
        Ok((outcome?, answered))
    })
}

/// Says that it is over when it is dropped, by a panic too.
struct AtEnd<'a>(&'a AtomicBool);

impl Drop for AtEnd<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

/// Waits until the guest and the far end of the igb's cable reach each other.
fn wait_reachable(bench: &Bench) -> Result<()> {
    wait_for("the guest to reach the wire", DEADLINE, || {
        Ok(ping(bench, "-c 2").is_ok_and(|ping| ping.lost() == 0).then_some(()))
    })
    .with_context(|| bench.node.sh("tail -n 10 /run/vm1.log").unwrap_or_default())
}

/// What the guest sends goes out by the igb, and answers come back, by flows of the workers.
pub fn guest(bench: &Bench) -> Result<String> {
    reaches(bench, None)
}

/// The same where Open vSwitch puts the guest into a VLAN: on the wire its frames, and those for it, have the tag, which the igb puts
/// on and takes off.
pub fn guest_in_a_vlan(bench: &Bench) -> Result<String> {
    bench.node.sh(&format!("ovs-vsctl --timeout=30 set port vm1 tag={VLAN}"))?;
    let said = reaches(bench, Some(VLAN))?;
    bench.node.sh("ovs-vsctl --timeout=30 clear port vm1 tag")?;
    Ok(said)
}

fn reaches(bench: &Bench, vlan: Option<u16>) -> Result<String> {
    let ((ping, before), answered) = with_peer(bench, vlan, || {
        wait_reachable(bench)?;
        let before = stats(bench)?;
        Ok((ping(bench, "-c 30 -s 1400")?, before))
    })?;
    let after = stats(bench)?;
    ensure!(ping.lost() == 0 && answered >= 30, "{ping}, {answered} answered");
    for (from, to) in [("vm1", "wan1"), ("wan1", "vm1")] {
        let fast = after.ports[from].fast_copies - before.ports[from].fast_copies;
        let sent = after.ports[to].tx_packets - before.ports[to].tx_packets;
        ensure!(fast >= 20 && sent >= 30, "from {from} to {to}: {fast} of {sent} by workers");
    }
    ensure!(bench.faults()?.is_empty(), "{}", bench.faults()?);
    Ok(ping.to_string())
}

/// Nothing is left of a daemon that is killed while flows are in two switches: the kernel resets one when it is closed, the
/// service the other. The next daemon takes all NICs again.
pub fn killed(bench: &Bench) -> Result<String> {
    let stream = stream(bench, NEAR)?;
    bench.learn(LOOSE + 1, LOOSE_FAR)?;
    let loose = Traffic::new(&bench.cables[LOOSE..LOOSE + 2], 0, LOOSE_NEAR, LOOSE_FAR);
    let loose = Stream::start(loose, RATE / 2);
    wait_rule(bench, "sw", 2)?;
    wait_rule(bench, "loose", 2)?;
    for function in [&bench.rocker, &bench.igb, &bench.loose] {
        ensure!(bench.masters(function)?, "{function} does not master the bus");
    }
    bench.node.kill_pointworkd()?;
    wait_for("all functions to be given back", DEADLINE, || {
        for function in [&bench.rocker, &bench.igb, &bench.loose] {
            if bench.masters(function)? {
                return Ok(None);
            }
        }
        Ok(Some(()))
    })?;
    ensure!(bench.entries("sw")? == 0, "{} entries are left", bench.entries("sw")?);
    // Packets go on coming, and go nowhere.
    let is_still = |stream: &Stream, cable: usize| -> Result<bool> {
        let (before, sent) = {
            let traffic = stream.traffic();
            (traffic.count(cable), traffic.sent.len())
        };
        wait_for("packets to be sent", DEADLINE, || {
            Ok((stream.traffic().sent.len() >= sent + RATE as usize / 2).then_some(()))
        })?;
        Ok(stream.traffic().count(cable) == before)
    };
    stream.traffic().look()?;
    ensure!(is_still(&stream, 1)?, "a dead daemon's switch forwards");
    // The other has rules of which nobody knows.
    ensure!(!is_still(&loose, 1)?, "the kernel has reset the switch that it cannot reset");
    let said = bench
        .node
        .sh(&format!("export SERVICE_RESULT=signal; {}", line_of_the_unit(bench, node::CONFIG)?))?;
    let expected = format!(
        "{} reset by the kernel\n{} reset by the kernel\n{} reset by a register of its own\n",
        bench.rocker, bench.igb, bench.loose
    );
    ensure!(said == expected, "{said}");
    ensure!(bench.entries("loose")? == 0, "{} entries are left", bench.entries("loose")?);
    loose.traffic().look()?;
    ensure!(is_still(&loose, 1)?, "it forwards after its reset");
    ensure!(bench.faults()?.is_empty(), "{}", bench.faults()?);

    let begin = Instant::now();
    bench.node.start_pointworkd()?;
    bench.wait_links(ALL)?;
    wait_rule(bench, "sw", 2)?;
    wait_rule(bench, "loose", 2)?;
    let back = begin.elapsed();
    stream.wait_more(1, HOT, DEADLINE)?;
    loose.wait_more(1, HOT, DEADLINE)?;
    stream.stop(GRACE)?.lost()?;
    loose.stop(GRACE)?.lost()?;
    with_peer(bench, None, || wait_reachable(bench))?;
    ensure!(bench.faults()?.is_empty(), "{}", bench.faults()?);
    Ok(format!(
        "reset by the kernel and by the unit's line; flows are in again {:.1} s after a start",
        back.as_secs_f64()
    ))
}
