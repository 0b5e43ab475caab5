//! Changes of OVS's policy take effect here.

use std::time::{Duration, Instant};

use anyhow::{Result, bail, ensure};
use qemu_tests::ovs::BRIDGE;

use crate::stream::Stream;
use crate::{Bench, LATE};

/// How long a change of policy may take, from the command.
const LIMIT: Duration = Duration::from_secs(1);
/// How often it may take longer, because others use the machine.
const RETRIES: usize = 3;

#[test]
fn a_rule_that_drops_stops_a_stream_within_a_second() -> Result<()> {
    let mut it = Bench::start(2)?;
    it.greet()?;
    let packet = it.net.packet(0, 1).udp(1, 2).payload_len(100);
    it.becomes_fast(0, 1, &packet)?;
    let stream = Stream::start(&mut it.net, 0, 1, &packet, 1000)?;
    let mut took = Vec::new();
    loop {
        stream.flows(500)?;
        let before = it.daemon().stats()?;
        stream.flows(200)?;
        let after = it.daemon().stats()?;
        ensure!(after.ports["p1"].rx_forwarded >= before.ports["p1"].rx_forwarded + 100, "{after:?}");
        let start = Instant::now();
        it.ovs.ofctl(&["add-flow", BRIDGE, "priority=100,in_port=p1,actions=drop"])?;
        // From the command to the last packet.
        let mut last = (stream.received(), Duration::ZERO);
        while start.elapsed() < last.1 + LIMIT {
            ensure!(last.1 < LATE, "the rule has no effect: {:#}", it.dump()?);
            std::thread::sleep(Duration::from_millis(5));
            let now = stream.received();
            if now != last.0 {
                last = (now, start.elapsed());
            }
        }
        stream.stands_still()?;
        println!("stopped after {:?}", last.1);
        took.push(last.1);
        it.ovs.ofctl(&["del-flows", "--strict", BRIDGE, "priority=100,in_port=p1"])?;
        stream.flows(500)?;
        if took.iter().any(|took| *took <= LIMIT) {
            break;
        }
        if took.len() > RETRIES {
            bail!("a rule took effect after {took:?}");
        }
    }
    stream.stop(&mut it.net, 0, 1)?;
    let stats = it.finish()?;
    println!("{:?}; drops {:?}", stats.paths, stats.drops());
    Ok(())
}
