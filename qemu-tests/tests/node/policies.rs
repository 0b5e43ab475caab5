//! What an administrator configures in Open vSwitch and in the kernel holds for the packets that pass neither.

use std::time::Duration;

use anyhow::{Result, ensure};
use qemu_tests::host::wait_for;

use crate::bench::{Bench, DEADLINE, VM1, VM2};

/// A rule that drops what iperf3 sends, while it sends.
pub fn drop_rule(bench: &Bench) -> Result<String> {
    let iperf = bench.node.spawn(&format!("ip netns exec vm1 iperf3 -c {VM2} -t 60"))?;
    let received = || Ok::<_, anyhow::Error>(bench.stats()?.ports["vm2"].tx_packets);
    let moves = |least: u64| {
        let before = received()?;
        wait_for("traffic", DEADLINE, || Ok((received()? >= before + least).then_some(())))
    };
    moves(200)?;
    let rule = format!("ip,nw_src={VM1},nw_dst={VM2}");
    bench.node.sh(&format!("ovs-ofctl add-flow br0 priority=100,{rule},actions=drop"))?;
    std::thread::sleep(Duration::from_secs(1));
    let before = received()?;
    std::thread::sleep(Duration::from_secs(1));
    let leaked = received()? - before;
    // An ARP request may come.
    ensure!(leaked <= 2, "{leaked} packets after a second");
    bench.node.sh(&format!("ovs-ofctl --strict del-flows br0 priority=100,{rule}"))?;
    moves(200)?;
    iperf.kill()?;
    bench.wait_in_step(DEADLINE)?;
    Ok("stopped and went on".into())
}

/// Access ports of the same and of different VLANs, and a trunk.
pub fn vlans(bench: &Bench) -> Result<String> {
    let reaches = |to: &str, wanted: bool| {
        wait_for(&format!("{to} to be reachable: {wanted}"), DEADLINE, || {
            let ping = bench.ping(to, 2)?;
            Ok((if wanted { ping.lost() == 0 } else { ping.received == 0 }).then_some(()))
        })
    };
    bench.vsctl("set port vm1 tag=10")?;
    reaches(VM2, false)?;
    bench.vsctl("set port vm2 tag=10")?;
    reaches(VM2, true)?;
    bench.vsctl("clear port vm2 tag -- set port vm2 trunks=10,20")?;
    reaches(VM2, false)?;
    // In a subnet of its own, or answers would take the way of the untagged one.
    bench.node.sh(
        "ip -n vm2 link add link eth0 name eth0.10 type vlan id 10 && ip -n vm2 link set eth0.10 up && \
         ip -n vm2 address add 10.2.0.2/24 dev eth0.10 && ip -n vm1 address add 10.2.0.1/24 dev eth0",
    )?;
    reaches("10.2.0.2", true)?;
    // The first flow may flood, until OVS looks again.
    let carried = wait_for("tags to be pushed and popped here", DEADLINE, || {
        bench.ping("10.2.0.2", 2)?;
        let flows = bench.flows()?;
        let fast = |text: &str| flows.iter().any(|(_, how, flow)| how == "fast" && flow.contains(text));
        Ok((fast("push_vlan(vid=10,pcp=0)") && fast("pop_vlan")).then_some(()))
    });
    bench.node.sh("ip -n vm2 link delete eth0.10 && ip -n vm1 address delete 10.2.0.1/24 dev eth0")?;
    bench.vsctl("clear port vm1 tag -- clear port vm2 trunks")?;
    reaches(VM2, true)?;
    carried?;
    Ok("access and trunk".into())
}

/// `warns` while it is configured, with less than `limit` Mbit/s from `vm1` to `vm2`; then fast again.
fn limited(bench: &Bench, on: &str, off: &str, warns: &str, limit: f64) -> Result<String> {
    bench.vsctl(on)?;
    bench.wait_warning(warns, true)?;
    let iperf = bench.iperf3("vm1", VM2, "")?;
    ensure!(iperf.megabits() < limit, "{:.1} Mbit/s", iperf.megabits());
    let flows = bench.flows()?;
    let is_why = |handling: &str| handling.strip_prefix("punt: ").is_some_and(|why| warns.contains(why));
    ensure!(flows.iter().any(|(_, handling, _)| is_why(handling)), "{flows:#?}");
    bench.vsctl(off)?;
    bench.wait_warning("takes the host path", false)?;
    bench.wait_fast()?;
    Ok(format!("{:.1} of {limit} Mbit/s", iperf.megabits()))
}

/// 8 Mbit/s for what `vm1` sends.
pub fn policing(bench: &Bench) -> Result<String> {
    limited(
        bench,
        "set interface vm1 ingress_policing_rate=8000 ingress_policing_burst=800",
        "set interface vm1 ingress_policing_rate=0 ingress_policing_burst=0",
        "port 'vm1': ingress policing: what its guest sends takes the host path",
        12.0,
    )
}

/// 5 Mbit/s for what `vm2` gets.
pub fn qos(bench: &Bench) -> Result<String> {
    limited(
        bench,
        "set port vm2 qos=@q -- --id=@q create qos type=linux-htb other-config:max-rate=5000000",
        "clear port vm2 qos -- --all destroy qos",
        "port 'vm2': QoS linux-htb: what its guest gets takes the host path",
        8.0,
    )
}

/// Drops at a representor, which Open vSwitch knows nothing of.
pub fn filters(bench: &Bench) -> Result<String> {
    let chain = "'add chain netdev t c { type filter hook ingress device vm1 priority 0; }'";
    let (nft_on, nft_off) = (
        format!("nft add table netdev t && nft {chain} && nft add rule netdev t c drop"),
        "nft delete table netdev t",
    );
    let tc_on = "tc qdisc add dev vm2 clsact && tc filter add dev vm2 egress matchall action drop";
    for (on, off, warning) in [
        (&*nft_on, nft_off, "port 'vm1': nftables ingress chain"),
        (tc_on, "tc qdisc del dev vm2 clsact", "port 'vm2': tc egress filter matchall"),
    ] {
        bench.node.sh(on)?;
        bench.wait_warning(warning, true)?;
        wait_for(
            "packets to be dropped",
            DEADLINE,
            || Ok((bench.ping(VM2, 2)?.received == 0).then_some(())),
        )?;
        bench.node.sh(off)?;
        bench.wait_warning("takes the host path", false)?;
        bench.wait_fast()?;
    }
    Ok("dropped while they were there".into())
}
