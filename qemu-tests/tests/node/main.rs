//! `pointworkd` beside stock Open vSwitch on the kernel datapath, in a compute node that boots once for all of it.

mod bench;
mod disruptions;
mod events;
#[cfg(target_arch = "x86_64")]
mod nested;
mod numa;
mod overlay;
mod permissions;
mod policies;
mod service;
mod traffic;
mod two;
mod unknown;
mod wire;

use std::time::Instant;

use anyhow::Result;
use bench::Bench;

/// A check, and what it is called. Each finds the guests able to reach each other, and leaves them so.
type Check = (&'static str, fn(&Bench) -> Result<String>);

const CHECKS: &[Check] = &[
    ("packets between guests are forwarded here", traffic::between_guests),
    ("packets for the host go through its bridge", traffic::to_the_host),
    ("flows in use live on, others expire", traffic::keep_alive),
    ("a rule that drops stops traffic within a second", policies::drop_rule),
    ("VLANs are the bridge's", policies::vlans),
    ("ingress policing is not passed by", policies::policing),
    ("QoS is not passed by", policies::qos),
    ("tc and nftables are not passed by", policies::filters),
    ("a device of the bridge is a wire", wire::device_of_the_bridge),
    ("tunnels go through the bridge that has the wire", overlay::behind_the_bridge),
    ("the service runs under systemd", service::unit),
    ("memory on a far NUMA node is told of", numa::far_memory),
    ("flows that were flushed are forgotten", disruptions::flush),
    ("Open vSwitch restarts", disruptions::restart_of_ovs),
    ("pointworkd is killed", disruptions::pointworkd_killed),
    ("a representor is deleted", disruptions::representor_deleted),
    ("a port is deleted, and comes back under another number", disruptions::port_deleted),
    ("the bridge is made anew", disruptions::bridge_made_anew),
    ("hw-offload keeps all on the host path", disruptions::hw_offload),
    ("the kernel's module goes and comes", disruptions::module),
    ("lost events leave nothing behind", events::lost),
    ("frames that nobody knows pass", unknown::frames),
    // Where QEMU's firmware runs boot ROMs.
    #[cfg(target_arch = "x86_64")]
    ("a QEMU inside the node has a port", nested::guest),
    ("a user without permission is told what is missing", permissions::none),
];

#[test]
fn kernel_datapath() {
    let start = Instant::now();
    let bench = Bench::start().unwrap();
    println!("{:5.1} s up", start.elapsed().as_secs_f64());
    let mut wrong = Vec::new();
    for (name, check) in CHECKS {
        let begin = Instant::now();
        let outcome = bench.wait_fast().and_then(|()| check(&bench));
        let took = begin.elapsed().as_secs_f64();
        match outcome {
            Ok(seen) => println!("{took:5.1} s {name}: {seen}"),
            Err(error) => {
                println!("{took:5.1} s {name}: FAILED: {error:?}");
                wrong.push(*name);
            }
        }
        // A node that has gone wrong would have each further check wait for all that it can.
        if wrong.len() == 3 {
            break;
        }
    }
    if !wrong.is_empty() {
        let log = |path: &str| bench.node.sh(&format!("tail -n 40 {path}")).unwrap_or_default();
        panic!("{wrong:?}\n{}\n{}", log("/run/pointworkd.log"), log("/run/vm1.log"));
    }
    println!("{:5.1} s in all", start.elapsed().as_secs_f64());
    bench.node.shut_down().unwrap();
}
