//! PCI NICs through the kernel's VFIO, with QEMU's IOMMU between them and the memory of a node that boots once for all of it.
#![cfg(target_arch = "x86_64")]

mod bench;
mod drivers;
mod nic;
mod ovs;
mod service;

use std::time::Instant;

use anyhow::Result;
use bench::Bench;
use qemu_tests::node::LOG;

/// A check, and what it is called.
type Check = (&'static str, fn(&Bench) -> Result<String>);

/// In this order: the first two find the node as it has booted, and bind what the others use; from `under_ovs` on `pointworkd` has
/// the NICs.
const CHECKS: &[Check] = &[
    ("NICs are listed with what they wait for", nic::without_modules),
    ("functions are bound and given back", nic::binding),
    ("what a process has is left alone", nic::held),
    ("a switch that the kernel cannot reset is reset", nic::reset),
    ("the transport does all that it promises", drivers::transport),
    ("frames pass a switch both ways", drivers::rocker),
    ("a switch forwards by itself until its process is killed", drivers::killed),
    ("frames pass an igb both ways", drivers::igb),
    ("a killed process leaves no DMA of an igb", drivers::igb_killed),
    ("the service carries frames from NIC to NIC", service::nics),
    ("pointworkd has NICs under Open vSwitch", ovs::under_ovs),
    ("a hot flow moves into the switch", ovs::hot),
    ("a policy takes it out, and what it says goes in", ovs::policy),
    ("a guest reaches the wire by an igb", ovs::guest),
    ("so does a guest in a VLAN, with its tag on the wire", ovs::guest_in_a_vlan),
    ("a killed pointworkd leaves no DMA and no rule", ovs::killed),
];

#[test]
fn node_with_an_iommu() {
    let start = Instant::now();
    let bench = Bench::start().unwrap();
    println!("{:5.1} s up", start.elapsed().as_secs_f64());
    let mut wrong = Vec::new();
    for (name, check) in CHECKS {
        let begin = Instant::now();
        let outcome = check(&bench);
        let took = begin.elapsed().as_secs_f64();
        match outcome {
            Ok(seen) => println!("{took:5.1} s {name}: {seen}"),
            Err(error) => {
                let logs = [bench.log(), bench.node.sh(&format!("tail -n 20 {LOG} 2>/dev/null; true"))];
                let log = logs.map(Result::unwrap_or_default).concat();
                println!("{took:5.1} s {name}: FAILED: {error:?}\n{log}");
                wrong.push(*name);
            }
        }
    }
    if !wrong.is_empty() {
        let said = bench.node.sh("dmesg | tail -n 40").unwrap_or_default();
        panic!("{wrong:?}\n{said}");
    }
    println!("{:5.1} s in all", start.elapsed().as_secs_f64());
    bench.end().unwrap();
}
