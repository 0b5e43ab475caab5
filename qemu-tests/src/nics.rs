//! A compute node with an IOMMU, PCI NICs of its own behind root ports, and the other ends of the NICs' cables.

use std::io::ErrorKind;
use std::ops::{Deref, Range, RangeInclusive};
use std::os::unix::net::UnixDatagram;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use serde_json::{Value, json};

use crate::frontend::packet::{BROADCAST, Mac, Packet};
use crate::host::{WorkDir, wait_for};
use crate::node::{self, Node, NodeConfig};
use crate::service;

/// Longer than anything here takes on a busy machine.
const DEADLINE: Duration = Duration::from_secs(60);
/// Ports of the switch.
pub const PORTS: usize = 3;
/// The cables: those of the switch, then that of the igb.
pub const IGB: usize = PORTS;
/// That of the virtio NIC.
pub const VIRTIO: usize = PORTS + 1;
/// The first of the two of the other switch.
pub const LOOSE: usize = PORTS + 2;
const CABLES: usize = PORTS + 4;

/// The end of a NIC's cable.
#[derive(Debug)]
pub struct Cable {
    socket: UnixDatagram,
    /// QEMU's end.
    to: PathBuf,
}

impl Cable {
    /// Our end, and the argument of QEMU's `-netdev` that is the other.
    fn new(dir: &WorkDir, number: usize) -> Result<(Self, String)> {
        let (ours, theirs) = (dir.path(&format!("t{number}")), dir.path(&format!("q{number}")));
        let socket = UnixDatagram::bind(&ours)?;
        socket.set_nonblocking(true)?;
        let (local, remote) = (theirs.display(), ours.display());
        let ends = format!("local.type=unix,local.path={local},remote.type=unix,remote.path={remote}");
        Ok((Self { socket, to: theirs }, format!("dgram,id=n{number},{ends}")))
    }

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

/// A rule of a switch, as QEMU shows it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct SwitchRule {
    /// Ingress port.
    pub from: u64,
    /// The port that it leads to, if it is one, and frames are not changed.
    pub to: Option<u64>,
    /// Frames that it has taken.
    pub hits: u64,
}

/// The node. All that can be done to a [`Node`] can be done to it.
#[derive(Debug)]
pub struct NicNode {
    /// The machine.
    pub node: Node,
    /// The far ends, [`PORTS`] of the switch first.
    pub cables: Vec<Arc<Cable>>,
    /// PCI address of the switch, `sw` to QEMU, which the kernel can reset.
    pub rocker: String,
    /// Of the igb.
    pub igb: String,
    /// Of the virtio NIC.
    pub virtio: String,
    /// Of a switch that shares its IOMMU group with another virtio NIC.
    pub shared: String,
    /// Of that one.
    pub neighbour: String,
    /// Of a switch, `loose` to QEMU, that the kernel cannot reset, since it is not alone on its bus.
    pub loose: String,
    /// Outlives the node.
    _dir: WorkDir,
}

impl NicNode {
    /// Boots the node, which can run these programs. Nothing is bound to `vfio-pci`, and no module of VFIO is loaded.
    pub fn boot(programs: &[PathBuf]) -> Result<Self> {
        let dir = WorkDir::new()?;
        let place = dir.path("programs");
        std::fs::create_dir(&place)?;
        for program in programs {
            let name = program.file_name().context("a program without a name")?;
            std::fs::copy(program, place.join(name)).with_context(|| program.display().to_string())?;
        }
        service::install(&place)?;
        let mut arguments: Vec<[String; 2]> = Vec::new();
        let mut add = |option: &str, value: String| arguments.push([option.into(), value]);
        let mut cables = Vec::new();
        for number in 0..CABLES {
            let (cable, netdev) = Cable::new(&dir, number)?;
            add("-netdev", netdev);
            cables.push(Arc::new(cable));
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
        let node = Node::boot(NodeConfig { iommu: true, arguments, ..NodeConfig::new("node", place) }, &dir)?;
        let mut booted = Self {
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
        booted.find_devices()?;
        Ok(booted)
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

    /// Loads VFIO, and gives these functions to it.
    pub fn bind(&self, functions: &[&str]) -> Result<()> {
        self.node.sh("modprobe vfio-pci && modprobe vfio_iommu_type1")?;
        let command = format!("{} nic bind", self.node.program("pointwork"));
        functions.iter().try_for_each(|function| self.node.sh(&format!("{command} {function}")).map(drop))
    }

    /// Starts Open vSwitch on the kernel's datapath, with bridge `br0`, and `pointworkd` under it with the switch, whose ports
    /// are `up1` and on, and what `more` adds to the configuration; waits until the ports are the bridge's, and have a link.
    pub fn start_switch(&self, more: &str) -> Result<()> {
        self.node.start_ovs()?;
        self.node
            .sh("ovs-vsctl --timeout=30 add-br br0 && echo 1 >/proc/sys/net/ipv6/conf/br0/disable_ipv6")?;
        self.bind(&[&self.rocker])?;
        let mut config = String::from(
            "control = \"/run/pointwork/control.sock\"\nstate = \"/run/pointwork/state.json\"\n\
             [datapath]\nl1_entries = 65536\n[host]\nkind = \"ovs\"\nbridge = \"br0\"\n",
        );
        config += &nic("sw", &self.rocker, "ignore_fragments = true\n", "up", 1..=PORTS);
        config += more;
        self.node.configure_pointworkd(&config)?;
        self.node.start_pointworkd()?;
        self.wait_links(config.matches("kind = \"nic\"").count())
    }

    /// Waits until so many ports of `pointworkd` are a NIC's, and have a link and a place in the bridge.
    pub fn wait_links(&self, count: usize) -> Result<()> {
        let names = wait_for("the ports of NICs to be up", DEADLINE, || {
            let show = self.node.pointwork("show")?;
            let ports = show["ports"].as_array().context("no ports")?;
            let up = ports.iter().filter(|port| port["kind"] == "nic" && port["link"] == true);
            let names: Vec<String> = up.filter_map(|port| port["name"].as_str()).map(str::to_owned).collect();
            Ok((names.len() == count).then_some(names))
        })
        .with_context(|| self.node.sh(&format!("tail -n 20 {}", node::LOG)).unwrap_or_default())?;
        let has_place = |name| format!("ovs-vsctl --timeout=30 wait-until Interface {name} 'ofport>0'");
        names.into_iter().try_for_each(|name| self.node.sh(&has_place(name)).map(drop))
    }

    /// Makes the bridge know that a station is at a cable.
    pub fn learn(&self, cable: usize, station: Mac) -> Result<()> {
        let mut hello = Packet::eth(station, BROADCAST).arp_request([0; 4], [0; 4]).build();
        hello.resize(60, 0);
        let text = station.map(|byte| format!("{byte:02x}")).join(":");
        wait_for("the bridge to know a station", DEADLINE, || {
            self.cables[cable].send(&hello)?;
            Ok(self.node.sh("ovs-appctl --timeout=30 fdb/show br0")?.contains(&text).then_some(()))
        })
    }

    /// Whether a function may master the bus.
    pub fn masters(&self, address: &str) -> Result<bool> {
        let said = self.node.sh(&format!("od -An -tu2 -j4 -N2 /sys/bus/pci/devices/{address}/config"))?;
        Ok(said.trim().parse::<u16>()? & 1 << 2 != 0)
    }

    /// Rules of a switch's ACL table that are not the driver's own.
    pub fn rules(&self, switch: &str) -> Result<Vec<SwitchRule>> {
        let flows = self.node.qmp("query-rocker-of-dpa-flows", json!({ "name": switch, "tbl-id": 60 }))?;
        let flows = flows.as_array().context("flows")?;
        let number = |value: &Value| value.as_u64().unwrap_or(0);
        let rules = flows.iter().filter(|flow| number(&flow["key"]["priority"]) > 1);
        let rule = |flow: &Value| SwitchRule {
            from: number(&flow["key"]["in-pport"]),
            // An id has its kind in the upper four bits; 0 leads to the port in the lower 16.
            to: flow["action"]["group-id"].as_u64().filter(|id| id >> 28 == 0).map(|id| id & 0xffff),
            hits: number(&flow["hits"]),
        };
        Ok(rules.map(rule).collect())
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

/// The configuration of a NIC and of its ports, named with this prefix: the first has number 1, whatever the NIC calls it.
pub fn nic(
    name: &str,
    function: &str,
    settings: &str,
    prefix: &str,
    numbers: RangeInclusive<usize>,
) -> String {
    let mut config = format!("[[nic]]\nname = \"{name}\"\npci = \"{function}\"\n{settings}");
    for (index, number) in (1..).zip(numbers) {
        config += &format!(
            "[[port]]\nname = \"{prefix}{index}\"\nkind = \"nic\"\nnic = \"{name}\"\nnic_port = {number}\n"
        );
    }
    config
}

impl Deref for NicNode {
    type Target = Node;

    fn deref(&self) -> &Node {
        &self.node
    }
}
