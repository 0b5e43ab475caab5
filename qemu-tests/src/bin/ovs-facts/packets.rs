//! What becomes of packets: executed by hand, with offloads, and too long.

use anyhow::{Context, Result, ensure};
use qemu_tests::frontend::NetHeader;
use qemu_tests::host::wait_for;

use crate::bench::{Bench, QUIET, SOON, ipv4, sh, udp};
use crate::netlink::{Attrs, Message, action, errno, key};
use crate::tap::{Frame, Mode};

/// The metadata of a packet from `port`; the Ethernet field only says that it has such a header.
pub fn metadata(port: u32) -> Attrs {
    Attrs::default().with_u32(key::IN_PORT, port).with(key::ETHERNET, &[0; 12])
}

/// The action that looks the packet up again, in stage `id`.
pub fn recirc(id: u32) -> Attrs {
    Attrs::default().with_u32(action::RECIRC, id)
}

/// Waits until the flow has counted `packets`.
fn counted(bench: &mut Bench, flow: &Message, packets: u64) -> Result<(u64, u64)> {
    let ufid = flow.ufid().context("a flow of vswitchd has an identifier")?;
    let stats = wait_for("the flow to count", SOON, || {
        let now = bench.netlink.flow(ufid)?.context("the flow is gone")?.stats();
        Ok((now.0 >= packets).then_some(now))
    })?;
    ensure!(stats.0 == packets, "{stats:?} instead of {packets} packets");
    Ok(stats)
}

/// `OVS_PACKET_CMD_EXECUTE` with `recirc(0)` looks the packet up as if it had come in at the port that the key names: a miss
/// goes to vswitchd, which installs an ordinary flow; a hit is counted.
pub fn execute_recirc_zero() -> Result<String> {
    let mut bench = Bench::new("rz", &[Mode::Plain; 2], &["in_port=1,actions=output:2"])?;
    let (frame, port) = (udp(7), bench.ports[0]);
    bench.netlink.execute(&frame, &metadata(port), &recirc(0))?;
    let flow = bench.installed(0, 0)?;
    ensure!(flow.outputs() == [bench.ports[1]], "{flow:?}");
    ensure!(flow.key().u32(key::RECIRC_ID) == Some(0), "{flow:?}");
    ensure!(bench.taps[1].next()?.bytes == frame, "the missed packet arrives as it was");
    ensure!(
        counted(&mut bench, &flow, 0)? == (0, 0),
        "the missed packet is not counted by the flow it caused"
    );

    for packets in 1..=3 {
        bench.netlink.execute(&frame, &metadata(port), &recirc(0))?;
        ensure!(bench.taps[1].next()?.bytes == frame, "a packet that hits arrives");
        let stats = counted(&mut bench, &flow, packets)?;
        ensure!(stats.1 == packets * frame.len() as u64, "{stats:?}");
    }
    // The same flow serves packets that come by the TAP.
    bench.taps[0].send(&frame)?;
    counted(&mut bench, &flow, 4)?;
    bench.taps[1].next()?;
    ensure!(bench.taps[0].counter("rx_packets")? == 1, "executed packets are not the device's");
    Ok("a miss makes an upcall and an ordinary flow; hits are counted; the port's own counters are not touched".into())
}

/// With `recirc(X)` the packet enters stage X, whose context vswitchd knows; a stage that it does not know drops.
pub fn execute_recirc() -> Result<String> {
    let rules = [
        "table=0,in_port=1,udp,actions=ct(table=1)",
        "table=1,in_port=1,udp,tp_dst=7,actions=output:2",
        "table=1,in_port=1,udp,tp_dst=8,actions=output:3",
    ];
    let mut bench = Bench::new("rx", &[Mode::Plain; 3], &rules)?;
    let port = bench.ports[0];
    bench.taps[0].send(&udp(7))?;
    let first = bench.installed(0, 0)?;
    ensure!(first.actions().kinds() == [action::CT, action::RECIRC], "{first:?}");
    let stage = first.actions().u32(action::RECIRC).context("a stage")?;
    let second = bench.installed(0, stage)?;
    ensure!(second.outputs() == [bench.ports[1]], "{second:?}");
    bench.taps[1].next()?;

    // A hit in the second stage, without passing the first.
    let before = counted(&mut bench, &second, 0)?;
    bench.netlink.execute(&udp(7), &metadata(port), &recirc(stage))?;
    bench.taps[1].next()?;
    ensure!(counted(&mut bench, &second, 1)?.0 == before.0 + 1);
    ensure!(counted(&mut bench, &first, 0)?.0 == 0, "the first stage sees nothing of it");

    // A miss there reaches vswitchd with our key, and it goes on from that stage.
    bench.events.clear()?;
    bench.netlink.execute(&udp(8), &metadata(port), &recirc(stage))?;
    let third = bench.installed(0, stage)?;
    ensure!(third.outputs() == [bench.ports[2]], "{third:?}");
    bench.taps[2].next()?;

    // A stage that nobody has made.
    bench.events.clear()?;
    let unknown = 0x7fff_0000;
    bench.netlink.execute(&udp(7), &metadata(port), &recirc(unknown))?;
    let dead = bench.installed(0, unknown)?;
    ensure!(dead.actions().kinds().is_empty(), "{dead:?}");
    bench.taps[1].silent(QUIET)?;
    Ok(format!("hits and misses of stage {stage:#x} are served; an unknown stage gets a flow that drops"))
}

/// The key need name no more than the ingress port. With an Ethernet type and no Ethernet header in the key the kernel takes
/// the packet for one that begins with its network header (`metadata_from_nlattrs`).
pub fn execute_key() -> Result<String> {
    let mut bench = Bench::new("ek", &[Mode::Plain; 2], &["in_port=1,actions=output:2"])?;
    bench.taps[0].send(&udp(7))?;
    let flow = bench.installed(0, 0)?;
    bench.taps[1].next()?;
    let key = Attrs::default().with_u32(key::IN_PORT, bench.ports[0]);
    bench.netlink.execute(&udp(7), &key, &recirc(0))?;
    ensure!(bench.taps[1].next()?.bytes == udp(7));
    counted(&mut bench, &flow, 1)?;
    let outcome = bench.netlink.execute(&udp(7), &key.with(key::ETHERTYPE, &[8, 0]), &recirc(0));
    bench.taps[1].silent(QUIET)?;
    counted(&mut bench, &flow, 1)?;
    let said = outcome.map_err(|error| errno(&error));
    ensure!(said == Ok(()), "{said:?}");
    Ok("the port alone will do; with an Ethernet type as well the kernel says yes and nothing arrives".into())
}

/// A TCP super-frame: what a miss makes of it, what arrives at each kind of TAP, and how flows count it.
pub fn segmentation_offload() -> Result<String> {
    let modes = [Mode::Offloads, Mode::Offloads, Mode::Header, Mode::Plain];
    let mut bench = Bench::new("so", &modes, &["in_port=1,actions=output:2,output:3,output:4"])?;
    let payload = 60_000;
    let (header, frame) = ipv4().tcp(1000, 80).payload_len(payload).build_gso(1448);
    bench.taps[0].write(header, &frame)?;
    let flow = bench.installed(0, 0)?;
    let missed = bench.taps[1].gather(payload)?;
    let segments = payload.div_ceil(1448);
    ensure!(missed.len() == segments && missed.iter().all(plain), "a miss: {} frames", missed.len());
    bench.taps[2].gather(payload)?;
    bench.taps[3].gather(payload)?;
    // While the miss is on its way its segments may find the flow: what they count is over when all have come.
    let before = bench.netlink.flow(flow.ufid().context("ufid")?)?.context("gone")?.stats();

    bench.taps[0].write(header, &frame)?;
    let whole = bench.taps[1].next()?;
    ensure!(whole.check()?.payload.len() == payload, "{:?}", whole.header);
    ensure!(
        whole.header.gso_type == NetHeader::GSO_TCPV4
            && whole.header.gso_size == 1448
            && whole.header.flags == NetHeader::NEEDS_CSUM,
        "{:?}",
        whole.header
    );
    for tap in [2, 3] {
        let frames = bench.taps[tap].gather(payload)?;
        ensure!(frames.len() == segments && frames.iter().all(plain), "{}: {} frames", tap, frames.len());
    }
    let after = bench.netlink.flow(flow.ufid().context("ufid")?)?.context("gone")?.stats();
    let grown = (after.0 - before.0, after.1 - before.1);
    ensure!(
        grown == (1, frame.len() as u64),
        "one super-frame counts as {grown:?}, has {} bytes",
        frame.len()
    );
    Ok(format!(
        "a miss becomes {segments} upcalls; a hit arrives whole where TUNSETOFFLOAD allows, else as {segments} frames; \
         it counts as one packet of {} bytes (the flow had counted {before:?} from the miss)",
        frame.len()
    ))
}

/// Whether the frame needs nothing done to it.
fn plain(frame: &Frame) -> bool {
    frame.header.gso_type == NetHeader::GSO_NONE && frame.header.flags & NetHeader::NEEDS_CSUM == 0
}

/// `NEEDS_CSUM` passes to a TAP that can take it, and is completed for others and for a miss.
pub fn partial_checksums() -> Result<String> {
    let modes = [Mode::Offloads, Mode::Offloads, Mode::Header, Mode::Plain];
    let mut bench = Bench::new("pc", &modes, &["in_port=1,actions=output:2,output:3,output:4"])?;
    let (header, frame) = ipv4().udp(1000, 7).payload_len(500).build_partial();
    bench.taps[0].write(header, &frame)?;
    bench.flow(0)?;
    for tap in &bench.taps[1..] {
        let missed = tap.next()?;
        missed.check()?;
        ensure!(plain(&missed), "{}: {:?}", tap.name, missed.header);
    }
    bench.taps[0].write(header, &frame)?;
    let partial = bench.taps[1].next()?;
    partial.check()?;
    ensure!(
        partial.header.flags == NetHeader::NEEDS_CSUM
            && (partial.header.csum_start, partial.header.csum_offset) == (34, 6),
        "{:?}",
        partial.header
    );
    for tap in &bench.taps[2..] {
        let complete = tap.next()?;
        complete.check()?;
        ensure!(plain(&complete), "{}: {:?}", tap.name, complete.header);
    }
    Ok("passed on where TUNSETOFFLOAD allows; completed elsewhere and by a miss".into())
}

/// UDP segmentation offload (virtio's USO) at a TAP: kernels since 6.2 know it.
pub fn udp_segmentation() -> Result<String> {
    let mut bench = Bench::new("us", &[Mode::Offloads; 2], &["in_port=1,actions=output:2"])?;
    let release = sh("uname -r")?;
    let mut numbers = release.split(['.', '-']).map_while(|number| number.parse::<u32>().ok());
    let known = (numbers.next(), numbers.next()) >= (Some(6), Some(2));
    let asked = bench.taps[0].offload_udp();
    let answer = asked.as_ref().map_err(|error| error.raw_os_error());
    ensure!(answer == if known { Ok(&()) } else { Err(Some(libc::EINVAL)) }, "TUNSETOFFLOAD: {asked:?}");
    let (header, frame) = ipv4().udp(1000, 7).payload_len(6000).build_gso(1000);
    let written = bench.taps[0].write(header, &frame);
    match &written {
        Ok(()) => ensure!(known, "Linux {release} took it"),
        Err(error) => {
            ensure!(!known && error.raw_os_error() == Some(libc::EINVAL), "Linux {release}: {error}")
        }
    }
    if known {
        bench.flow(0)?;
        let frames = bench.taps[1].gather(6000)?;
        ensure!(frames.len() == 6, "{} frames", frames.len());
    }
    Ok(format!(
        "Linux {}: {}",
        release.trim(),
        written.map_or_else(|error| error.to_string(), |()| "taken".into())
    ))
}

/// The egress port's MTU: what is longer is counted by the flow, and dropped as an error of the port; super-frames are not
/// measured at all. The ingress port's MTU is nothing that its writer is held to.
pub fn mtu() -> Result<String> {
    let mut bench = Bench::new("mt", &[Mode::Offloads; 3], &["in_port=1,actions=output:2,output:3"])?;
    sh("ip link set mt3 mtu 9000")?;
    bench.taps[0].send(&udp(7))?;
    let flow = bench.installed(0, 0)?;
    bench.taps[1].next()?;
    bench.taps[2].next()?;

    let long = ipv4().udp(1000, 7).payload_len(3000).build();
    bench.taps[0].send(&long)?;
    ensure!(
        bench.taps[2].next()?.bytes == long,
        "a port of MTU 9000 takes it, though the ingress port has 1500"
    );
    bench.taps[1].silent(QUIET)?;
    counted(&mut bench, &flow, 1)?;
    let errors = (bench.taps[1].counter("tx_errors")?, bench.taps[1].counter("tx_dropped")?);
    ensure!(errors == (1, 0), "tx_errors, tx_dropped: {errors:?}");

    // The longest frame that passes; a tag comes on top.
    for (payload, passes) in [(1472, true), (1473, false)] {
        let frame = ipv4().udp(1000, 7).payload_len(payload).build();
        bench.taps[0].send(&frame)?;
        bench.taps[2].next()?;
        match passes {
            true => drop(bench.taps[1].next()?),
            false => bench.taps[1].silent(QUIET)?,
        }
    }
    let tagged = ipv4().vlan(5).udp(1000, 7);
    for payload in [100, 1472] {
        bench.taps[0].send(&tagged.clone().payload_len(payload).build())?;
        bench.taps[1].next()?;
        bench.taps[2].next()?;
    }

    let (header, frame) = ipv4().tcp(1000, 80).payload_len(20_000).build_gso(4000);
    bench.taps[0].write(header, &frame)?;
    let whole = bench.taps[1].next()?;
    ensure!(whole.bytes.len() == frame.len() && whole.header.gso_size == 4000, "{:?}", whole.header);
    Ok("1514 bytes pass an MTU of 1500, 1518 with a tag; longer ones are the egress port's tx_errors, after the flow has \
        counted them; a super-frame passes, even with segments of 4000 bytes"
        .into())
}
