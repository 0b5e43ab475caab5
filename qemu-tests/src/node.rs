//! A compute node in QEMU: Debian's kernel with its `openvswitch` module, stock Open vSwitch, and the project's programs.

use std::ops::Deref;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result};
use serde_json::Value;

use crate::guest::{Guest, GuestConfig, Nic, Share};
use crate::host::{WorkDir, wait_for};
use crate::image::ImageKind;

/// Where the node sees [`NodeConfig::programs`].
const PROGRAMS: &str = "/mnt/programs";
/// Where the node leaves what [`Node::copy_out`] takes.
const OUT: &str = "/mnt/out";
/// The configuration file of `pointworkd`.
pub const CONFIG: &str = "/run/pointwork/pointwork.toml";
/// What `pointworkd` has said.
pub const LOG: &str = "/run/pointworkd.log";
const PID: &str = "/run/pointworkd.pid";
/// Longer than `pointworkd` takes to start on a busy machine.
const START_DEADLINE: Duration = Duration::from_secs(30);

/// What to boot.
#[derive(Debug, Clone)]
pub struct NodeConfig {
    /// Name of the node: its host name, and the stem of its files in the work directory.
    pub name: String,
    /// Memory in MiB.
    pub memory: u32,
    /// NUMA nodes that have this memory in equal parts; the processors are all on the first.
    pub nodes: u32,
    /// Virtual processors.
    pub vcpus: u32,
    /// Network interfaces, `eth0` first.
    pub nics: Vec<Nic>,
    /// A directory of this machine with programs that the node is to run, which [`Node::program`] names.
    pub programs: PathBuf,
    /// Whether it has an IOMMU, as VFIO needs.
    pub iommu: bool,
    /// More arguments of QEMU: devices of a test's own, and what is behind them.
    pub arguments: Vec<[String; 2]>,
}

impl NodeConfig {
    /// A node of 1 GiB and two processors that can run what is in the directory `programs`.
    pub fn new(name: &str, programs: impl Into<PathBuf>) -> Self {
        Self {
            name: name.into(),
            memory: 1024,
            nodes: 1,
            vcpus: 2,
            nics: Vec::new(),
            programs: programs.into(),
            iommu: false,
            arguments: Vec::new(),
        }
    }
}

/// A running node; all that can be done to a [`Guest`] can be done to it. Dropped, it is killed.
#[derive(Debug)]
pub struct Node {
    guest: Guest,
    out: PathBuf,
}

impl Node {
    /// Boots a node and waits until it takes commands. Open vSwitch is there, but not started.
    pub fn boot(config: NodeConfig, dir: &WorkDir) -> Result<Self> {
        let out = dir.path(&format!("{}.out", config.name));
        std::fs::create_dir(&out)?;
        let share = |tag: &str, path: &Path, writable| Share { tag: tag.into(), path: path.into(), writable };
        let shares = vec![share("programs", &config.programs, false), share("out", &out, true)];
        let guest = Guest::start(
            GuestConfig {
                name: config.name,
                memory: config.memory,
                segments: config.nodes,
                vcpus: config.vcpus,
                nics: config.nics,
                image: ImageKind::Node,
                shares,
                iommu: config.iommu,
                arguments: config.arguments,
                ..GuestConfig::default()
            },
            dir,
        )?;
        for (tag, place, cache) in [("programs", PROGRAMS, "loose"), ("out", OUT, "none")] {
            let options = format!("trans=virtio,version=9p2000.L,msize=262144,cache={cache}");
            guest.sh(&format!("mkdir -p {place} && mount -t 9p -o {options} {tag} {place}"))?;
        }
        Ok(Self { guest, out })
    }

    /// The path inside the node of the program `name`.
    pub fn program(&self, name: &str) -> String {
        format!("{PROGRAMS}/{name}")
    }

    /// Copies a file out of the node, and returns its path on this machine; it lasts as long as the work directory.
    pub fn copy_out(&self, path: &str) -> Result<PathBuf> {
        let name = Path::new(path).file_name().with_context(|| format!("{path} names no file"))?;
        self.sh(&format!("cp {path} {OUT}/"))?;
        Ok(self.out.join(name))
    }

    /// Starts `ovsdb-server` with an empty database and `ovs-vswitchd`, and waits until both take commands.
    pub fn start_ovs(&self) -> Result<()> {
        self.sh("mkdir -p /etc/openvswitch /run/openvswitch /var/log/openvswitch && ln -sfn /run /var/run")?;
        self.sh("modprobe openvswitch")?;
        self.sh("ovsdb-tool create /etc/openvswitch/conf.db /usr/share/openvswitch/vswitch.ovsschema")?;
        self.sh("ovsdb-server --detach --no-chdir --pidfile --log-file \
             --remote=punix:/run/openvswitch/db.sock /etc/openvswitch/conf.db")?;
        self.sh("ovs-vsctl --timeout=30 --no-wait init")?;
        self.start_vswitchd()
    }

    /// Starts `ovs-vswitchd` on the database that is there, and waits until it has read it.
    pub fn start_vswitchd(&self) -> Result<()> {
        // Started sooner after boot, OVS 3.1 counts no processors ("Overriding n-handler-threads to 0" in its log) and serves
        // no upcalls.
        self.sh("while [ $(cut -d . -f 1 /proc/uptime) -le 10 ]; do sleep 0.1; done")?;
        // It detaches when it is ready to serve; the change of configuration is answered when it has been applied.
        self.sh("/usr/lib/openvswitch-switch/ovs-vswitchd --detach --no-chdir --pidfile --log-file")?;
        self.sh("ovs-vsctl --timeout=30 set Open_vSwitch . external-ids:started=true").map(drop)
    }

    /// Ends `ovs-vswitchd` as its service does; the kernel keeps its datapath and flows.
    pub fn stop_vswitchd(&self) -> Result<()> {
        self.sh("pid=$(cat /run/openvswitch/ovs-vswitchd.pid) && ovs-appctl --timeout=10 exit && \
             while kill -0 $pid 2>/dev/null; do sleep 0.05; done")
            .map(drop)
    }

    /// Writes the configuration of `pointworkd`.
    pub fn configure_pointworkd(&self, toml: &str) -> Result<()> {
        let text = toml.replace('\n', "\\n");
        self.sh(&format!("mkdir -p $(dirname {CONFIG}) && printf '{text}' >{CONFIG}")).map(drop)
    }

    /// Starts `pointworkd`, which must be one of the programs, and waits until it answers.
    pub fn start_pointworkd(&self) -> Result<()> {
        let program = self.program("pointworkd");
        self.sh(&format!("{{ setsid {program} --config {CONFIG} >>{LOG} 2>&1 & echo $! >{PID}; }}"))?;
        wait_for("pointworkd to answer", START_DEADLINE, || Ok(self.pointwork("show").ok())).map(drop)
    }

    /// Kills `pointworkd`, and waits until the kernel has taken back all that it had.
    pub fn kill_pointworkd(&self) -> Result<()> {
        let gone = "while kill -0 $pid 2>/dev/null; do sleep 0.05; done";
        self.sh(&format!("pid=$(cat {PID}) && kill -KILL $pid && {gone}")).map(drop)
    }

    /// What `pointwork --json` with these arguments says.
    pub fn pointwork(&self, arguments: &str) -> Result<Value> {
        let said = self.sh(&format!("{} --json {arguments}", self.program("pointwork")))?;
        serde_json::from_str(&said).with_context(|| format!("pointwork {arguments}: {said:.300}"))
    }

    /// Shuts the node down and waits for its end.
    pub fn shut_down(self) -> Result<()> {
        self.guest.quit()
    }
}

impl Deref for Node {
    type Target = Guest;

    fn deref(&self) -> &Guest {
        &self.guest
    }
}
