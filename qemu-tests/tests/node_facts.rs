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
    println!("{}", node.sh("uname -r; ovs-vswitchd --version; ovs-vsctl show; free -m; ps").unwrap());
    println!("{:?}", node.run(&format!("{} x", node.program("ovs-facts")), Duration::from_secs(60)));
    node.shut_down().unwrap();
}
