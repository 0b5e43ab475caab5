//! The node that the checks share, and what they ask of it.

use std::ops::Deref;
use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use serde_json::Value;

use qemu_tests::agent::Job;
use qemu_tests::daemon::binary;
use qemu_tests::host::wait_for;
use qemu_tests::nics::NicNode;
pub use qemu_tests::nics::{IGB, LOOSE, PORTS, VIRTIO};

/// Longer than anything here takes on a busy machine.
pub const DEADLINE: Duration = Duration::from_secs(60);
/// What a server has said.
const LOG: &str = "/run/vfio-nic.log";

pub struct Bench(NicNode);

impl Deref for Bench {
    type Target = NicNode;

    fn deref(&self) -> &NicNode {
        &self.0
    }
}

impl Bench {
    /// Boots the node. Nothing is bound to `vfio-pci`, and no module of VFIO is loaded.
    pub fn start() -> Result<Self> {
        let ours = [env!("CARGO_BIN_EXE_vfio-nic"), env!("CARGO_BIN_EXE_netns-guest")].map(PathBuf::from);
        let mut programs = ours.to_vec();
        for name in ["pointwork", "pointworkd"] {
            programs.push(binary(name)?);
        }
        NicNode::boot(&programs).map(Self)
    }

    /// Shuts the node down.
    pub fn end(self) -> Result<()> {
        self.0.node.shut_down()
    }

    /// Runs a command in the node, whatever its status.
    pub fn run(&self, command: &str) -> Result<qemu_tests::agent::Output> {
        self.node.run(command, DEADLINE)
    }

    /// `pointwork --json nic` with these arguments.
    pub fn nic(&self, arguments: &str) -> Result<Value> {
        let said = self.node.sh(&format!("{} --json nic {arguments}", self.node.program("pointwork")))?;
        serde_json::from_str(&said).with_context(|| format!("pointwork nic {arguments}: {said:.300}"))
    }

    /// What `pointwork nic` with these arguments says when it fails, in its one line.
    pub fn refused(&self, arguments: &str) -> Result<String> {
        let output = self.run(&format!("{} nic {arguments}", self.node.program("pointwork")))?;
        ensure!(output.status == 1 && output.stdout.is_empty(), "{arguments}: {output:?}");
        ensure!(output.stderr.lines().count() == 1, "{output:?}");
        Ok(output.stderr)
    }

    /// Starts a server on a function, and waits until its ports are up.
    pub fn serve(&self, arguments: &str, ports: usize) -> Result<Job<'_>> {
        let program = self.node.program("vfio-nic");
        // What the last one said must not be taken for this one's.
        self.node.sh(&format!("rm -f {LOG}"))?;
        let server = self.node.spawn(&format!("exec {program} serve {arguments} >{LOG} 2>&1"))?;
        wait_for("links", DEADLINE, || {
            let said = self.log()?;
            ensure!(server.running(), "the server has ended: {said}");
            Ok((said.matches(" up\n").count() >= ports).then_some(()))
        })
        .with_context(|| self.log().unwrap_or_default())?;
        Ok(server)
    }

    /// What the server has said so far.
    pub fn log(&self) -> Result<String> {
        self.node.sh(&format!("cat {LOG} 2>/dev/null; true"))
    }

    /// The driver that a function is bound to, or nothing.
    pub fn driver(&self, address: &str) -> Result<String> {
        let link = format!("/sys/bus/pci/devices/{address}/driver");
        let said = self.node.sh(&format!("if [ -e {link} ]; then basename $(readlink {link}); fi"))?;
        Ok(said.trim().to_owned())
    }
}

/// A frame to `dst` from `src` with the experimental ethertype, whose payload of at least 64 bytes begins with `payload`.
pub fn frame(dst: u64, src: u64, payload: &[u8]) -> Vec<u8> {
    let mut frame = [&dst.to_be_bytes()[2..], &src.to_be_bytes()[2..], &[0x88, 0xb5], payload].concat();
    frame.resize(frame.len().max(14 + 64), 0);
    frame
}
