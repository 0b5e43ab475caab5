//! A compute node with `pointworkd` under Open vSwitch on the kernel datapath, and two guests that are network namespaces.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use serde_json::Value;

use qemu_tests::agent::Job;
use qemu_tests::daemon::{Paths, Stats, binary};
use qemu_tests::host::{WorkDir, wait_for};
use qemu_tests::node::{Node, NodeConfig};
use qemu_tests::service;
use qemu_tests::tools::{Iperf, Ping};

/// Longer than anything here takes on a busy machine.
pub const DEADLINE: Duration = Duration::from_secs(30);
/// The addresses of the guests `vm1` and `vm2`, and of the host on the bridge.
pub const VM1: &str = "10.1.0.1";
pub const VM2: &str = "10.1.0.2";
pub const HOST: &str = "10.1.0.254";

const PROGRAMS: [&str; 4] = ["pointworkd", "pointwork", "netns-guest", "odd-frames"];
const CONFIG: &str = r#"control = "/run/pointwork/control.sock"\nstate = "/run/pointwork/state.json"\n[datapath]\nl1_entries = 65536\n[host]\nkind = "ovs"\nbridge = "br0"\n[[port]]\nname = "vm1"\nsocket = "/run/pointwork/vm1.sock"\n[[port]]\nname = "vm2"\nsocket = "/run/pointwork/vm2.sock"\n"#;

pub struct Bench {
    pub node: Node,
    /// Outlives the node.
    _dir: WorkDir,
}

impl Bench {
    /// Boots the node and waits until the guests reach each other.
    pub fn start() -> Result<Self> {
        let bench = Self::boot(|programs| {
            #[cfg(target_arch = "x86_64")]
            crate::nested::copy_qemu(&programs.join("qemu"))?;
            Ok(NodeConfig { nodes: 2, ..NodeConfig::new("node", programs) })
        })?;
        bench.vsctl("add-br br0")?;
        bench.address_bridge()?;
        bench
            .node
            .sh(&format!("mkdir -p /run/pointwork && printf '{CONFIG}' >/run/pointwork/pointwork.toml"))?;
        bench.start_pointworkd()?;
        for (guest, number) in [("vm1", 1), ("vm2", 2)] {
            bench.start_guest(guest, number, 1500)?;
        }
        bench.wait_reachable()?;
        bench.node.sh("ip netns exec vm2 iperf3 -s -D")?;
        Ok(bench)
    }

    /// Boots a node that has the tests' programs, and starts Open vSwitch in it.
    pub fn boot(config: impl FnOnce(PathBuf) -> Result<NodeConfig>) -> Result<Self> {
        let dir = WorkDir::new()?;
        let programs = dir.path("programs");
        std::fs::create_dir(&programs)?;
        for name in PROGRAMS {
            let from = match name {
                "netns-guest" => Path::new(env!("CARGO_BIN_EXE_netns-guest")).to_owned(),
                "odd-frames" => Path::new(env!("CARGO_BIN_EXE_odd-frames")).to_owned(),
                name => binary(name)?,
            };
            std::fs::copy(from, programs.join(name))?;
        }
        service::install(&programs)?;
        let node = Node::boot(config(programs)?, &dir)?;
        node.start_ovs()?;
        Ok(Self { node, _dir: dir })
    }

    /// Starts a guest that is a network namespace: 10.1.0.`number`, behind the port of its name.
    pub fn start_guest(&self, guest: &str, number: u8, mtu: u16) -> Result<()> {
        let program = self.node.program("netns-guest");
        let options = format!("--mac 02:00:00:00:00:0{number} --address 10.1.0.{number}/24 --mtu {mtu}");
        // Nothing but the tests' own packets.
        self.node
            .sh(&format!(
                "ip netns add {guest} && ip netns exec {guest} sh -c 'echo 1 >/proc/sys/net/ipv6/conf/default/disable_ipv6' && \
                 {{ setsid ip netns exec {guest} {program} /run/pointwork/{guest}.sock {options} >/run/{guest}.log 2>&1 & }}"
            ))
            .map(drop)
    }

    /// The host's address on the bridge, which a bridge that is made anew has not.
    pub fn address_bridge(&self) -> Result<()> {
        let quiet = "echo 1 >/proc/sys/net/ipv6/conf/br0/disable_ipv6";
        self.node
            .sh(&format!("{quiet} && ip address replace {HOST}/24 dev br0 && ip link set br0 up"))
            .map(drop)
    }

    /// Starts `pointworkd` and waits until it answers.
    pub fn start_pointworkd(&self) -> Result<()> {
        self.node.start_pointworkd()
    }

    /// Kills `pointworkd`, and waits until the kernel has taken back all that it had.
    pub fn stop_pointworkd(&self) -> Result<()> {
        self.node.kill_pointworkd()
    }

    /// What `pointwork --json` with these arguments says.
    pub fn pointwork(&self, arguments: &str) -> Result<Value> {
        self.node.pointwork(arguments)
    }

    pub fn vsctl(&self, arguments: &str) -> Result<String> {
        self.node.sh(&format!("ovs-vsctl --timeout=30 {arguments}"))
    }

    pub fn stats(&self) -> Result<Stats> {
        Ok(serde_json::from_value(self.pointwork("stats")?)?)
    }

    pub fn paths(&self) -> Result<Paths> {
        Ok(self.stats()?.paths)
    }

    /// The warnings of `pointwork show`, a line each.
    pub fn warnings(&self) -> Result<String> {
        let show = self.pointwork("show")?;
        let lines = show["warnings"].as_array().context("no warnings")?;
        Ok(lines.iter().filter_map(Value::as_str).map(|line| format!("{line}\n")).collect())
    }

    /// Waits until `show` warns of this, or no longer does.
    pub fn wait_warning(&self, text: &str, there: bool) -> Result<()> {
        wait_for(&format!("the warning '{text}' to be there: {there}"), DEADLINE, || {
            Ok((self.warnings()?.contains(text) == there).then_some(()))
        })
    }

    /// One line for each flow of the guests that we have: UFID, handling, match and actions.
    pub fn flows(&self) -> Result<Vec<(String, String, String)>> {
        let value = self.pointwork("dump-flows")?;
        let flows = value["flows"].as_array().context("no flows")?;
        let text = |value: &Value| value.as_str().unwrap_or_default().to_owned();
        Ok(flows
            .iter()
            .map(|flow| {
                (
                    text(&flow["ufid"]),
                    text(&flow["handling"]),
                    format!("{} {}", text(&flow["flow"]), text(&flow["actions"])),
                )
            })
            .collect())
    }

    /// How many flows of the guests' IPv4 packets to each other are forwarded here.
    pub fn fast_flows(&self) -> Result<usize> {
        let flows = self.flows()?;
        let counts = |(_, handling, text): &&(String, String, String)| {
            handling == "fast" && text.contains("eth_type(0x0800)")
        };
        Ok(flows.iter().filter(counts).count())
    }

    /// The UFIDs of our flows and of those that the kernel's datapath has of our ports.
    fn both(&self) -> Result<(BTreeSet<String>, BTreeSet<String>)> {
        let theirs = self.node.sh("ovs-dpctl dump-flows -m --names")?;
        let ufid = |line: &str| Some(line.strip_prefix("ufid:")?.split(',').next()?.to_owned());
        let theirs = theirs.lines().filter(|line| line.contains("in_port(vm")).filter_map(ufid).collect();
        Ok((self.flows()?.into_iter().map(|(ufid, ..)| ufid).collect(), theirs))
    }

    /// Waits until our flows and those of the kernel's datapath are the same, one for one. How many there are.
    pub fn wait_in_step(&self, deadline: Duration) -> Result<usize> {
        wait_for("the flows to be those of the kernel's datapath", deadline, || {
            let (ours, theirs) = self.both()?;
            Ok((ours == theirs).then_some(ours.len()))
        })
        .with_context(|| format!("{:#?}", self.both()))
    }

    /// Echo requests from `vm1`, ten a second.
    pub fn ping(&self, to: &str, count: u32) -> Result<Ping> {
        let output =
            self.node.run(&format!("ip netns exec vm1 ping -n -q -c {count} -i 0.1 -W 2 {to}"), DEADLINE)?;
        Ping::parse(&output.stdout).with_context(|| format!("{output:?}"))
    }

    /// Waits until `vm1` reaches `vm2` without a loss.
    pub fn wait_reachable(&self) -> Result<()> {
        // Before it has an address, ping has nothing to tell but an error.
        wait_for("vm1 to reach vm2", DEADLINE, || {
            Ok(self.ping(VM2, 2).is_ok_and(|ping| ping.lost() == 0).then_some(()))
        })
    }

    /// Waits until `vm1` and `vm2` reach each other by flows of ours.
    pub fn wait_fast(&self) -> Result<()> {
        self.wait_reachable()?;
        wait_for("fast flows both ways", DEADLINE, || {
            self.ping(VM2, 2)?;
            Ok((self.fast_flows()? >= 2).then_some(()))
        })
        .with_context(|| format!("{:#?}\n{}", self.flows(), self.warnings().unwrap_or_default()))
    }

    /// Echo requests from `vm1` to `vm2` in the background, twenty a second; [`lost`] ends them.
    pub fn traffic(&self) -> Result<Job<'_>> {
        let job = self.node.spawn(&format!("ip netns exec vm1 ping -n -q -i 0.05 {VM2}"))?;
        self.wait_reachable()?;
        Ok(job)
    }

    /// Runs iperf3 for two seconds from the namespace `from` against a server.
    pub fn iperf3(&self, from: &str, to: &str, options: &str) -> Result<Iperf> {
        let output =
            self.node.run(&format!("ip netns exec {from} iperf3 -J -c {to} -t 2 {options}"), DEADLINE)?;
        Iperf::parse(&output.stdout).with_context(|| format!("{output:?}"))
    }
}

/// Ends background traffic. How many requests were sent, and how many had no answer.
pub fn lost(job: Job<'_>) -> Result<(u32, u32)> {
    let output = job.interrupt(DEADLINE)?;
    let ping = Ping::parse(&output.stdout).with_context(|| format!("{output:?}"))?;
    ensure!(ping.sent > 10, "no traffic: {ping}");
    Ok((ping.sent, ping.lost()))
}
