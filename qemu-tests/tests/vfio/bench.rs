//! A compute node with an IOMMU, PCI NICs of its own behind root ports, and the other ends of the NICs' cables.

use std::io::ErrorKind;
use std::ops::Range;
use std::os::unix::net::UnixDatagram;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use serde_json::{Value, json};

use qemu_tests::agent::Job;
use qemu_tests::daemon::binary;
use qemu_tests::host::{WorkDir, wait_for};
use qemu_tests::node::{Node, NodeConfig};
use qemu_tests::service;

/// Longer than anything here takes on a busy machine.
pub const DEADLINE: Duration = Duration::from_secs(60);
/// Of the switch.
pub const PORTS: usize = 3;
/// The cables: those of the switch, then these.
pub const IGB: usize = PORTS;
pub const VIRTIO: usize = PORTS + 1;
/// The first of the two of the other switch.
pub const LOOSE: usize = PORTS + 2;
const CABLES: usize = PORTS + 4;
/// What a server has said.
const LOG: &str = "/run/vfio-nic.log";

/// The end of a NIC's cable.
pub struct Cable {
    socket: UnixDatagram,
    /// QEMU's end.
    to: PathBuf,
}

impl Cable {
    /// Sends a frame to the NIC.
    pub fn send(&self, frame: &[u8]) -> Result<()> {
        wait_for("room on the cable", DEADLINE, || match self.socket.send_to(frame, &self.to) {
            Ok(_) => Ok(Some(())),
            Err(error) if error.kind() == ErrorKind::WouldBlock => Ok(None),
            Err(error) => Err(error.into()),
        })
    }

    /// The next frame that has come, if any.
    pub fn try_receive(&self) -> Result<Option<Vec<u8>>> {
        let mut frame = vec![0; 70_000];
        match self.socket.recv(&mut frame) {
            Ok(len) => {
                frame.truncate(len);
                Ok(Some(frame))
            }
            Err(error) if error.kind() == ErrorKind::WouldBlock => Ok(None),
            Err(error) => Err(error.into()),
        }
    }

    /// Waits for the next frame.
    pub fn receive(&self) -> Result<Vec<u8>> {
        wait_for("a frame on the cable", DEADLINE, || self.try_receive())
    }

    /// Throws away what has come.
    pub fn drain(&self) -> Result<()> {
        while self.try_receive()?.is_some() {}
        Ok(())
    }
}

pub struct Bench {
    pub node: Node,
    pub cables: Vec<Cable>,
    /// PCI addresses: the switch, the igb, the virtio NIC; a switch that shares its IOMMU group with another virtio NIC; and one
    /// that the kernel cannot reset, since it is not alone on its bus.
    pub rocker: String,
    pub igb: String,
    pub virtio: String,
    pub shared: String,
    pub neighbour: String,
    pub loose: String,
    /// Outlives the node.
    _dir: WorkDir,
}

impl Bench {
    /// Boots the node. Nothing is bound to `vfio-pci`, and no module of VFIO is loaded.
    pub fn start() -> Result<Self> {
        let dir = WorkDir::new()?;
        let programs = dir.path("programs");
        std::fs::create_dir(&programs)?;
        std::fs::copy(Path::new(env!("CARGO_BIN_EXE_vfio-nic")), programs.join("vfio-nic"))?;
        for name in ["pointwork", "pointworkd"] {
            std::fs::copy(binary(name)?, programs.join(name))?;
        }
        service::install(&programs)?;
        let mut arguments: Vec<[String; 2]> = Vec::new();
        let mut add = |option: &str, value: String| arguments.push([option.into(), value]);
        let mut cables = Vec::new();
        for cable in 0..CABLES {
            let (ours, theirs) = (dir.path(&format!("t{cable}")), dir.path(&format!("q{cable}")));
            let socket = UnixDatagram::bind(&ours)?;
            socket.set_nonblocking(true)?;
            let (local, remote) = (theirs.display(), ours.display());
            let ends = format!("local.type=unix,local.path={local},remote.type=unix,remote.path={remote}");
            add("-netdev", format!("dgram,id=n{cable},{ends}"));
            cables.push(Cable { socket, to: theirs });
        }
        for port in 1..=4 {
            add("-device", format!("pcie-root-port,id=rp{port},chassis={port},slot={port}"));
        }
        add("-device", "pcie-pci-bridge,id=bridge,bus=rp4".into());
        let nets =
            |cables: Range<usize>| -> Vec<String> { cables.map(|cable| format!("n{cable}")).collect() };
        let (nets, loose) = (nets(0..PORTS), nets(LOOSE..LOOSE + 2));
        for device in [
            json!({ "driver": "rocker", "id": "sw", "name": "sw", "bus": "rp1", "ports": nets }),
            json!({ "driver": "igb", "id": "igb", "bus": "rp2", "netdev": format!("n{IGB}"), "mac": "02:00:00:00:00:11", "romfile": "" }),
            json!({ "driver": "virtio-net-pci", "id": "virtio", "bus": "rp3", "netdev": format!("n{VIRTIO}"), "mac": "02:00:00:00:00:12",
                "disable-legacy": "on", "iommu_platform": true, "romfile": "" }),
            json!({ "driver": "rocker", "id": "other", "name": "other", "bus": "bridge", "addr": "01.0", "ports": [] }),
            json!({ "driver": "rocker", "id": "loose", "name": "loose", "ports": loose }),
            json!({ "driver": "virtio-net-pci", "id": "neighbour", "bus": "bridge", "addr": "02.0", "mac": "02:00:00:00:00:13",
                "disable-legacy": "on", "iommu_platform": true, "romfile": "" }),
        ] {
            add("-device", device.to_string());
        }
        let node =
            Node::boot(NodeConfig { iommu: true, arguments, ..NodeConfig::new("node", programs) }, &dir)?;
        let mut bench = Self {
            node,
            cables,
            rocker: String::new(),
            igb: String::new(),
            virtio: String::new(),
            shared: String::new(),
            neighbour: String::new(),
            loose: String::new(),
            _dir: dir,
        };
        bench.find_devices()?;
        Ok(bench)
    }

    fn find_devices(&mut self) -> Result<()> {
        let said = self.node.sh(
            "cd /sys/bus/pci/devices && for d in *; do echo $d $(cat $d/vendor $d/device) $(readlink -f $d); done",
        )?;
        for line in said.lines() {
            let words: Vec<&str> = line.split_whitespace().collect();
            let [address, vendor, device, path] = words[..] else { continue };
            // Bridges above it: none, a root port, or a root port, a bridge and that one's bus.
            let place = match (vendor, device, path.matches("/0000:").count()) {
                ("0x1b36", "0x0006", 1) => &mut self.loose,
                ("0x1b36", "0x0006", 2) => &mut self.rocker,
                ("0x8086", "0x10c9", 2) => &mut self.igb,
                ("0x1af4", "0x1041", 2) => &mut self.virtio,
                ("0x1b36", "0x0006", _) => &mut self.shared,
                ("0x1af4", "0x1041", 3) => &mut self.neighbour,
                _ => continue,
            };
            *place = address.to_owned();
        }
        let all = [&self.rocker, &self.igb, &self.virtio, &self.shared, &self.neighbour, &self.loose];
        ensure!(all.iter().all(|address| !address.is_empty()), "{all:?}:\n{said}");
        Ok(())
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

    /// Whether a function may master the bus.
    pub fn masters(&self, address: &str) -> Result<bool> {
        let said = self.node.sh(&format!("od -An -tu2 -j4 -N2 /sys/bus/pci/devices/{address}/config"))?;
        Ok(said.trim().parse::<u16>()? & 1 << 2 != 0)
    }

    /// Rules of a switch's ACL table that are not the driver's own: ingress port and hits of each.
    pub fn rules(&self, switch: &str) -> Result<Vec<(u64, u64)>> {
        let flows = self.node.qmp("query-rocker-of-dpa-flows", json!({ "name": switch, "tbl-id": 60 }))?;
        let flows = flows.as_array().context("flows")?;
        let number = |value: &Value| value.as_u64().unwrap_or(0);
        let rules = flows.iter().filter(|flow| number(&flow["key"]["priority"]) > 1);
        Ok(rules.map(|flow| (number(&flow["key"]["in-pport"]), number(&flow["hits"]))).collect())
    }

    /// How many entries all tables of a switch have together.
    pub fn entries(&self, switch: &str) -> Result<usize> {
        let mut entries = 0;
        for table in [0, 10, 20, 30, 40, 50, 60] {
            let flows =
                self.node.qmp("query-rocker-of-dpa-flows", json!({ "name": switch, "tbl-id": table }))?;
            entries += flows.as_array().context("flows")?.len();
        }
        Ok(entries)
    }

    /// Faults of DMA that the IOMMU has reported.
    pub fn faults(&self) -> Result<String> {
        self.node.sh("dmesg | grep -i 'DMAR:.*fault' ; true")
    }

    /// Pulls or plugs a cable.
    pub fn set_link(&self, cable: usize, up: bool) -> Result<()> {
        self.node.qmp("set_link", json!({ "name": format!("n{cable}"), "up": up })).map(drop)
    }
}

/// A frame to `dst` from `src` with the experimental ethertype, whose payload of at least 64 bytes begins with `payload`.
pub fn frame(dst: u64, src: u64, payload: &[u8]) -> Vec<u8> {
    let mut frame = [&dst.to_be_bytes()[2..], &src.to_be_bytes()[2..], &[0x88, 0xb5], payload].concat();
    frame.resize(frame.len().max(14 + 64), 0);
    frame
}
