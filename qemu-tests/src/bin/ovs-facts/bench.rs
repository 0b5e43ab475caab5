//! What the facts stand on: a bridge with TAPs, and the commands of Open vSwitch.

use std::process::{Command, Stdio};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use qemu_tests::frontend::packet::{Mac, Packet};
use qemu_tests::host::wait_for;

use crate::netlink::{Listener, Message, Netlink, cmd};
use crate::tap::{Mode, Tap};

/// How long anything may take that happens at once.
pub const SOON: Duration = Duration::from_secs(15);
/// How long nothing has to happen for us to believe that it will not.
pub const QUIET: Duration = Duration::from_millis(700);

/// Runs a line of shell, which must succeed, and returns what it prints.
pub fn sh(line: &str) -> Result<String> {
    let output = Command::new("sh").args(["-c", line]).stdin(Stdio::null()).output()?;
    let (out, err) = (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    ensure!(output.status.success(), "`{line}`: {}: {err}{out}", output.status);
    Ok(out.into_owned())
}

/// Runs `ovs-vsctl`.
pub fn vsctl(arguments: &str) -> Result<String> {
    sh(&format!("ovs-vsctl --timeout=20 {arguments}"))
}

/// A bridge whose ports are TAPs; gone when dropped.
pub struct Bench {
    name: String,
    /// Its ports, in the order in which they were named.
    pub taps: Vec<Tap>,
    /// Their numbers in the datapath.
    pub ports: Vec<u32>,
    /// For requests.
    pub netlink: Netlink,
    /// Hears all events from the bridge's beginning on.
    pub events: Listener,
}

impl Bench {
    /// Makes the bridge `name` with the TAPs `NAME1`, `NAME2`, … and the OpenFlow rules `rules`, in which `{1}`, `{2}`, … stand
    /// for the ports.
    pub fn new(name: &str, modes: &[Mode], rules: &[&str]) -> Result<Self> {
        let mut taps = Vec::new();
        for (mode, number) in modes.iter().zip(1..) {
            taps.push(Tap::new(&format!("{name}{number}"), *mode)?);
        }
        let mut line = format!("add-br {name}");
        for (tap, number) in taps.iter().zip(1..) {
            let tap = &tap.name;
            line += &format!(" -- add-port {name} {tap} -- set interface {tap} ofport_request={number}");
        }
        vsctl(&line)?;
        let mut netlink = Netlink::new()?;
        let mut ports = Vec::new();
        for tap in &taps {
            let port = wait_for("the port", SOON, || netlink.port(&tap.name))?;
            ports.push(port);
        }
        let events = Listener::new(&netlink)?;
        let bench = Self { name: name.into(), taps, ports, netlink, events };
        bench.rules(rules)?;
        Ok(bench)
    }

    /// Replaces all OpenFlow rules; ports are numbered from 1 in the order of the TAPs.
    pub fn rules(&self, rules: &[&str]) -> Result<()> {
        let name = &self.name;
        sh(&format!("printf '%s\\n' {} >/run/{name}.rules", quoted(rules)))?;
        sh(&format!("ovs-ofctl -O OpenFlow14 --bundle replace-flows {name} /run/{name}.rules")).map(drop)
    }

    /// All flows of the datapath that begin at port `index`.
    pub fn flows(&mut self, index: usize) -> Result<Vec<Message>> {
        let port = Some(self.ports[index]);
        let flows = self.netlink.dump_flows()?;
        Ok(flows.into_iter().filter(|flow| flow.key().u32(crate::netlink::key::IN_PORT) == port).collect())
    }

    /// The one flow of the datapath that begins at port `index`, as soon as it is there.
    pub fn flow(&mut self, index: usize) -> Result<Message> {
        let mut flows = wait_for("a flow", SOON, || {
            let flows = self.flows(index)?;
            Ok((!flows.is_empty()).then_some(flows))
        })?;
        ensure!(flows.len() == 1, "more than one flow: {flows:#?}");
        flows.pop().context("one")
    }

    /// Waits for the event that a flow from port `index` in that stage was installed.
    pub fn installed(&mut self, index: usize, recirc_id: u32) -> Result<Message> {
        let (family, from) = (self.netlink.flows.id, (Some(self.ports[index]), recirc_id));
        self.events.wait("a flow to be installed", SOON, |event| {
            event.family == family && event.cmd == cmd::NEW && event.ingress() == from
        })
    }
}

impl Drop for Bench {
    fn drop(&mut self) {
        if let Err(error) = vsctl(&format!("del-br {}", self.name)) {
            eprintln!("{error:#}");
        }
    }
}

fn quoted(words: &[&str]) -> String {
    words.iter().map(|word| format!("'{word}'")).collect::<Vec<_>>().join(" ")
}

/// Addresses of whom the frames are from and to.
pub const SOURCE: Mac = [2, 0, 0, 0, 0, 1];
/// See [`SOURCE`].
pub const TARGET: Mac = [2, 0, 0, 0, 0, 2];

/// An IPv4 packet to go on with.
pub fn ipv4() -> Packet {
    Packet::eth(SOURCE, TARGET).ipv4([10, 1, 0, 1], [10, 1, 0, 2])
}

/// A UDP datagram of 100 bytes to that port.
pub fn udp(port: u16) -> Vec<u8> {
    ipv4().udp(1000, port).payload_len(100).build()
}
