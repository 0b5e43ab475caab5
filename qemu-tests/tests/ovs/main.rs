//! Pointwork under a stock Open vSwitch with its userspace datapath, which needs no kernel module: each test has an Open
//! vSwitch and a network namespace of its own.

mod alive;
mod configured;
mod fallback;
mod flows;
mod guests;
mod policy;
mod ports;
mod repairs;
mod restarts;
mod scale;
mod stream;
mod tunnels;

use std::path::Path;
use std::process::{Command, Stdio};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use qemu_tests::daemon::{Daemon, DaemonConfig, PortConfig, Stats};
use qemu_tests::frontend::packet::{BROADCAST, Packet};
use qemu_tests::host::{WorkDir, wait_for};
use qemu_tests::net::{Net, SOON};
use qemu_tests::ovs::{BRIDGE, Ovs};
use serde_json::Value;

/// Longer than anything takes that waits for several processes on a busy machine.
const LATE: Duration = Duration::from_secs(20);

/// An Open vSwitch and a daemon under it, with a guest on each port.
struct Bench {
    /// Dropped first.
    net: Net,
    ovs: Ovs,
}

impl Bench {
    /// Ports p1 and on, on a bridge whose only rule is `actions=NORMAL`.
    fn start(ports: usize) -> Result<Bench> {
        let bench = Bench::secure(ports, |port| port)?;
        bench.ovs.ofctl(&["add-flow", BRIDGE, "priority=0,actions=NORMAL"])?;
        Ok(bench)
    }

    /// As [`Bench::start`], with ports as `shape` makes them, and without any rule.
    fn secure(ports: usize, shape: impl Fn(PortConfig) -> PortConfig) -> Result<Bench> {
        let dir = WorkDir::new()?;
        let ovs = Ovs::start(&dir)?;
        let ports: Vec<PortConfig> =
            (1..=ports).map(|number| shape(PortConfig::server(&format!("p{number}"), &dir))).collect();
        let config = DaemonConfig::under(&ovs, ports);
        let net = Net::start(dir, config, |_, builder| builder)?;
        let bench = Bench { net, ovs };
        bench.wait_ready()?;
        Ok(bench)
    }

    fn daemon(&self) -> &Daemon {
        &self.net.daemon
    }

    /// Names of the ports with a guest.
    fn names(&self) -> Vec<&str> {
        self.net.config.ports.iter().map(|port| port.name.as_str()).collect()
    }

    /// Waits until OVS has all ports, their links are up, and nothing keeps them from the fast path.
    fn wait_ready(&self) -> Result<()> {
        self.daemon().wait_link(&self.names(), true, SOON)?;
        for name in self.names() {
            wait_in_bridge(&self.ovs, name, "up")?;
        }
        wait_for("representors to be seen", SOON, || {
            Ok((!warnings(self.daemon())?.contains("not seen yet")).then_some(()))
        })
    }

    /// Lets OVS learn all guests, and the daemon read what flows are there then.
    fn greet(&mut self) -> Result<()> {
        self.net.greet()?;
        self.settle()
    }

    /// OVS revises its flows, and then the daemon reads them.
    fn settle(&self) -> Result<()> {
        self.ovs.revalidate()?;
        self.daemon().ctl(&["sync"]).map(drop)
    }

    /// Sends `packet` until one is forwarded without OVS. Each of them must arrive, unchanged.
    fn becomes_fast(&mut self, from: usize, to: usize, packet: &Packet) -> Result<()> {
        let frame = packet.build();
        let name = self.names()[from].to_owned();
        wait_for("the fast path", SOON, || {
            let before = self.net.daemon.stats()?.ports[&name].rx_forwarded;
            self.net.guests[from].send(&frame)?;
            self.net.guests[to].expect(&frame)?;
            let fast = self.net.daemon.stats()?.ports[&name].rx_forwarded > before;
            Ok(fast.then_some(()))
        })
        .with_context(|| format!("from {name}: {:#}", self.dump().unwrap_or_default()))
    }

    /// Sends `packet` a few times: each must arrive, unchanged, and by OVS.
    fn stays_slow(&mut self, from: usize, to: usize, packet: &Packet) -> Result<()> {
        let frame = packet.build();
        let name = self.names()[from].to_owned();
        for _ in 0..3 {
            let before = self.net.daemon.stats()?.ports[&name].clone();
            self.net.guests[from].send(&frame)?;
            self.net.guests[to].expect(&frame)?;
            let after = self.net.daemon.stats()?.ports[&name].clone();
            ensure!(after.rx_forwarded == before.rx_forwarded, "it was forwarded here: {after:?}");
            ensure!(after.rx_to_host > before.rx_to_host, "OVS did not get it: {after:?}");
            self.settle()?;
        }
        Ok(())
    }

    fn dump(&self) -> Result<Value> {
        self.daemon().ctl(&["dump-flows"])
    }

    /// The handling of the flows whose match contains `part`.
    fn handling(&self, part: &str) -> Result<Vec<String>> {
        let dump = self.dump()?;
        let flows = dump["flows"].as_array().context("no flows")?.clone();
        let text = |flow: &Value, key: &str| flow[key].as_str().unwrap_or_default().to_owned();
        let some = flows.iter().filter(|flow| text(flow, "flow").contains(part));
        Ok(some.map(|flow| text(flow, "handling")).collect())
    }

    /// Waits until `show` warns of all of this.
    fn wait_warning(&self, parts: &[&str]) -> Result<()> {
        wait_warning(self.daemon(), parts)
    }

    /// Waits until `show` no longer warns of this.
    fn wait_no_warning(&self, part: &str) -> Result<()> {
        wait_for(&format!("no warning of '{part}'"), SOON, || {
            Ok((!warnings(self.daemon())?.contains(part)).then_some(()))
        })
    }

    /// Runs a program in the namespace.
    fn inside(&self, program: &str, arguments: &[&str]) -> Result<String> {
        inside(&self.ovs, program, arguments)
    }

    /// Ends a scenario: nothing is uncounted, and the daemon goes when it is told to.
    fn finish(mut self) -> Result<Stats> {
        let stats = self.daemon().balanced_stats()?;
        self.net.daemon.terminate()?;
        Ok(stats)
    }
}

/// Runs a program in the namespace of that Open vSwitch.
fn inside(ovs: &Ovs, program: &str, arguments: &[&str]) -> Result<String> {
    let net = format!("--net={}", ovs.namespace().path().display());
    let mut command = Command::new("nsenter");
    command.arg(net).arg("--").arg(program).args(arguments).stdin(Stdio::null());
    let output = command.output().context("nsenter")?;
    let said = String::from_utf8_lossy(&output.stderr);
    ensure!(output.status.success(), "{program} {}: {said}", arguments.join(" "));
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}

/// Waits until OVS has a port with the link in this state; gives its OpenFlow number.
fn wait_in_bridge(ovs: &Ovs, name: &str, link: &str) -> Result<u32> {
    wait_for(&format!("port {name} of the bridge, {link}"), SOON, || {
        let Ok(shown) = ovs.vsctl(&["get", "interface", name, "ofport", "link_state"]) else {
            return Ok(None);
        };
        let mut words = shown.split_whitespace();
        let (ofport, state) = (words.next().unwrap_or_default(), words.next().unwrap_or_default());
        Ok(ofport.parse().ok().filter(|_| state == link))
    })
    .with_context(|| {
        let interface = ovs.vsctl(&["list", "interface", name]).unwrap_or_default();
        format!("{interface}\n{}", inside(ovs, "ip", &["-d", "link"]).unwrap_or_default())
    })
}

/// The warnings of `show`, a line each.
fn warnings(daemon: &Daemon) -> Result<String> {
    let show = daemon.ctl(&["show"])?;
    let lines = show["warnings"].as_array().into_iter().flatten().filter_map(Value::as_str);
    Ok(lines.collect::<Vec<_>>().join("\n"))
}

/// Waits for one line of the warnings that says all of this.
fn wait_warning(daemon: &Daemon, parts: &[&str]) -> Result<()> {
    wait_for(&format!("a warning of {parts:?}"), SOON, || {
        let warnings = warnings(daemon)?;
        let says = |line: &str| parts.iter().all(|part| line.contains(part));
        Ok(warnings.lines().any(says).then_some(()))
    })
    .with_context(|| format!("warnings are: {}", warnings(daemon).unwrap_or_default()))
}

/// A path as an argument.
fn text(path: &Path) -> String {
    path.display().to_string()
}

/// An ARP request of a guest, to all.
fn hello(mac: [u8; 6], ip: [u8; 4]) -> Vec<u8> {
    Packet::eth(mac, BROADCAST).arp_request(ip, ip).build()
}
