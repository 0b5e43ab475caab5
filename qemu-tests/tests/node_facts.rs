//! What the kernel's Open vSwitch and stock `ovs-vswitchd` do, as far as the design rests on it (docs/ovs-facts.md).

use std::path::Path;
use std::time::{Duration, Instant};

use qemu_tests::host::WorkDir;
use qemu_tests::node::{Node, NodeConfig};

#[test]
fn facts() {
    let dir = WorkDir::new().unwrap();
    let start = Instant::now();
    let programs = Path::new(env!("CARGO_BIN_EXE_ovs-facts")).parent().unwrap();
    let node = Node::boot(NodeConfig::new("node", programs), &dir).unwrap();
    println!("up after {:.1} s", start.elapsed().as_secs_f64());
    node.start_ovs().unwrap();
    println!("Open vSwitch up after {:.1} s", start.elapsed().as_secs_f64());
    // So that the datapath stays while bridges come and go.
    node.sh("ovs-vsctl --timeout=30 add-br idle").unwrap();
    let program = node.program("ovs-facts");
    let names = node.sh(&program).unwrap();
    let mut wrong = Vec::new();
    for name in names.lines() {
        let start = Instant::now();
        let output = node.run(&format!("{program} {name}"), Duration::from_secs(90)).unwrap();
        println!("{:5.1} s {}{}", start.elapsed().as_secs_f64(), output.stdout, output.stderr);
        if output.status != 0 {
            wrong.push(name);
        }
    }
    if !wrong.is_empty() {
        let log = node.copy_out("/var/log/openvswitch/ovs-vswitchd.log").unwrap();
        panic!("not as assumed: {wrong:?}\n{}", qemu_tests::host::tail(&log, 60));
    }
    service(&node);
    node.shut_down().unwrap();
}

/// What the harness itself promises: Open vSwitch stops and starts, keeps its configuration, and files come out.
fn service(node: &Node) {
    let running = "pid=$(cat /run/openvswitch/ovs-vswitchd.pid 2>/dev/null) && kill -0 $pid";
    assert_eq!(node.run(running, Duration::from_secs(10)).unwrap().status, 0);
    node.stop_vswitchd().unwrap();
    assert_ne!(node.run(running, Duration::from_secs(10)).unwrap().status, 0);
    node.start_vswitchd().unwrap();
    assert_eq!(node.run(running, Duration::from_secs(10)).unwrap().status, 0);
    assert_eq!(node.sh("ovs-vsctl --timeout=30 list-br").unwrap(), "idle\n");
    node.sh("echo inside >/tmp/file").unwrap();
    assert_eq!(std::fs::read_to_string(node.copy_out("/tmp/file").unwrap()).unwrap(), "inside\n");
    assert!(node.copy_out("/tmp/missing").is_err());
}
