//! Flows whose packets OVS no longer sees stay in its table as long as there are any.

use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use qemu_tests::host::wait_for;

use crate::stream::Stream;
use crate::{Bench, LATE};

/// UFID and packets of OVS's flow of UDP from p1.
fn flow(it: &Bench) -> Result<Option<(String, u64)>> {
    let dump = it.ovs.appctl(&["dpctl/dump-flows", "-m", "--names"])?;
    let line = dump.lines().find(|line| line.contains("in_port(p1)") && line.contains("eth_type(0x0800)"));
    let Some(line) = line else { return Ok(None) };
    let ufid = line.split(',').next().context("no UFID")?.trim().to_owned();
    let (_, rest) = line.split_once("packets:").context("no packets")?;
    let packets = rest.split(',').next().unwrap_or_default().parse()?;
    Ok(Some((ufid, packets)))
}

/// A stream for so long; OVS's flow has to be the same all the time. Gives packets sent, what OVS saw of them, and the
/// share of the fast path.
fn stream_lives(it: &mut Bench, per_second: u64, time: Duration) -> Result<(u64, u64, f64)> {
    let packet = it.net.packet(0, 1).udp(1, 2).payload_len(100);
    it.becomes_fast(0, 1, &packet)?;
    it.settle()?;
    let (ufid, before) = flow(it)?.context("no flow")?;
    let first = it.daemon().stats()?;
    let stream = Stream::start(&mut it.net, 0, 1, &packet, per_second)?;
    let start = Instant::now();
    let mut seen = before;
    while start.elapsed() < time {
        let (now, packets) = flow(it)?.context("OVS has dropped the flow of a stream")?;
        ensure!(now == ufid, "the flow was made anew after {:?}", start.elapsed());
        ensure!(packets >= seen, "its packets were {seen} and are {packets}");
        seen = packets;
        std::thread::sleep(Duration::from_millis(100));
    }
    let sent = stream.sent();
    stream.stop(&mut it.net, 0, 1)?;
    let last = it.daemon().balanced_stats()?;
    let of =
        |stats: &qemu_tests::daemon::Stats| (stats.ports["p1"].rx_forwarded, stats.ports["p1"].rx_packets);
    let ((fast, all), (fast_before, all_before)) = (of(&last), of(&first));
    Ok((sent, seen - before, (fast - fast_before) as f64 / (all - all_before) as f64))
}

#[test]
fn a_streams_flow_stays_and_goes_with_it() -> Result<()> {
    let mut it = Bench::start(2)?;
    it.ovs.vsctl(&["set", "Open_vSwitch", ".", "other_config:max-idle=1500"])?;
    it.greet()?;
    let (sent, seen, fast) = stream_lives(&mut it, 1000, Duration::from_secs(11))?;
    println!("{sent} packets, {seen} seen by OVS, {:.2} % fast", fast * 100.0);
    ensure!(sent > 2000, "{sent} packets in 11 s");
    // One each half second or so.
    ensure!((5..100).contains(&seen), "OVS saw {seen} of {sent} packets");
    ensure!(fast > 0.99, "{fast}");
    wait_for("the flow to go", LATE, || Ok(flow(&it)?.is_none().then_some(())))?;
    it.daemon().ctl(&["sync"])?;
    ensure!(it.handling("in_port(p1)")?.is_empty(), "{:#}", it.dump()?);
    it.finish().map(drop)
}

/// At ten thousand packets a second, with OVS's own idle time.
#[test]
fn for_two_minutes() -> Result<()> {
    let mut it = Bench::start(2)?;
    it.greet()?;
    let (sent, seen, fast) = stream_lives(&mut it, 10_000, Duration::from_secs(120))?;
    println!("{sent} packets, {seen} seen by OVS, {:.3} % fast", fast * 100.0);
    ensure!((12..600).contains(&seen), "OVS saw {seen} of {sent} packets");
    ensure!(fast > 0.99, "{fast}");
    it.finish().map(drop)
}
