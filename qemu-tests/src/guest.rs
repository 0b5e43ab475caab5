//! A QEMU guest: how it is made, and what can be done to it.

use std::fmt::Write as _;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use serde_json::{Value, json};

use crate::agent::{Agent, Job, Output};
use crate::host::{Process, WorkDir, wait_for};
use crate::image::{Accelerator, Image, ImageKind, qemu, qemu_version};
use crate::qmp::Qmp;

/// The longest that a guest may take from start to its first command: seconds when the machine is idle.
const BOOT_DEADLINE: Duration = Duration::from_secs(120);

/// The longest that a plain command in a guest may take.
const COMMAND_DEADLINE: Duration = Duration::from_secs(60);

/// Properties of an interface that has no offload that a guest can do without.
pub const NO_OFFLOADS: &str = "csum=off,gso=off,host_tso4=off,host_tso6=off,host_ecn=off,host_ufo=off,guest_csum=off,\
                               guest_tso4=off,guest_tso6=off,guest_ecn=off,guest_ufo=off";

/// What to boot.
#[derive(Debug, Clone)]
pub struct GuestConfig {
    /// Name of the guest: its host name, and the stem of its files in the work directory.
    pub name: String,
    /// Memory in MiB, over all segments.
    pub memory: u32,
    /// In how many memory regions (NUMA nodes) it comes; each is a file descriptor of its own for a vhost-user backend.
    pub segments: u32,
    /// Whether it is made of 2 MiB pages, of which the host must have enough.
    pub hugepages: bool,
    /// Virtual processors.
    pub vcpus: u32,
    /// Network interfaces, `eth0` first.
    pub nics: Vec<Nic>,
    /// What runs it; by default the best that works here.
    pub accelerator: Option<Accelerator>,
    /// What it boots.
    pub image: ImageKind,
    /// Directories of this machine that it can mount.
    pub shares: Vec<Share>,
    /// Whether an IOMMU (Intel's, which remaps interrupts too) lies between its devices and its memory. The devices that the
    /// harness itself needs bypass it, as virtio devices do unless they are told otherwise.
    pub iommu: bool,
    /// More arguments of QEMU's command line, in pairs: devices of a test's own, and what is behind them.
    pub arguments: Vec<[String; 2]>,
    /// A script that starts QEMU with processors, memory and interfaces of its own, and variables of its environment. It is given
    /// the other arguments, the program as `QEMU`, and what accelerates it as `ACCEL`.
    pub script: Option<(PathBuf, Vec<(String, String)>)>,
    /// Whether it does not boot, but waits for one of the same configuration to migrate here ([`Guest::migrate`]).
    pub incoming: bool,
    /// The file of the network namespace that its TAPs are in; by default ours.
    pub namespace: Option<PathBuf>,
}

/// A directory of this machine that a guest can mount, by 9P over virtio.
#[derive(Debug, Clone)]
pub struct Share {
    /// What the guest calls it.
    pub tag: String,
    /// The directory.
    pub path: PathBuf,
    /// Whether the guest may write there.
    pub writable: bool,
}

impl Default for GuestConfig {
    fn default() -> Self {
        Self {
            name: "guest".into(),
            memory: 256,
            segments: 1,
            hugepages: false,
            vcpus: 1,
            nics: Vec::new(),
            accelerator: None,
            image: ImageKind::default(),
            shares: Vec::new(),
            iommu: false,
            arguments: Vec::new(),
            script: None,
            incoming: false,
            namespace: None,
        }
    }
}

impl GuestConfig {
    /// A guest of this name with one interface.
    pub fn new(name: &str, nic: Nic) -> Self {
        Self { name: name.into(), nics: vec![nic], ..Self::default() }
    }
}

/// A virtio network interface of a guest.
#[derive(Debug, Clone)]
pub struct Nic {
    /// What is behind it.
    pub backend: NicBackend,
    /// Its address; by default one made of the guest's name and the interface's number.
    pub mac: Option<String>,
    /// Queue pairs.
    pub queues: u16,
    /// More properties of QEMU's `virtio-net-pci`, such as `csum=off,mrg_rxbuf=off`.
    pub options: String,
}

/// What is behind a guest's interface.
#[derive(Debug, Clone)]
pub enum NicBackend {
    /// A vhost-user backend.
    VhostUser {
        /// The socket that both meet at.
        socket: PathBuf,
        /// Whether QEMU listens there (the backend is then in client mode); otherwise it connects, again and again.
        listen: bool,
    },
    /// Another QEMU, without a switch: one of the two listens.
    Stream {
        /// The socket that both meet at.
        socket: PathBuf,
        /// Whether this side listens.
        listen: bool,
    },
    /// A TAP of this name, which QEMU makes, down, and which is gone when it ends. Where the other end takes no offloads, the
    /// interface's options have to say so.
    Tap(String),
}

impl Nic {
    /// An interface with one queue pair on a backend that listens at `socket`.
    pub fn connect(socket: impl Into<PathBuf>) -> Self {
        Self::on(NicBackend::VhostUser { socket: socket.into(), listen: false })
    }

    /// An interface with one queue pair whose backend connects to `socket`.
    pub fn listen(socket: impl Into<PathBuf>) -> Self {
        Self::on(NicBackend::VhostUser { socket: socket.into(), listen: true })
    }

    /// An interface with one queue pair.
    pub fn on(backend: NicBackend) -> Self {
        Self { backend, mac: None, queues: 1, options: String::new() }
    }

    /// With this many queue pairs.
    pub fn queues(self, queues: u16) -> Self {
        Self { queues, ..self }
    }

    /// With these properties added.
    pub fn options(mut self, options: &str) -> Self {
        let comma = if self.options.is_empty() { "" } else { "," };
        let _ = write!(self.options, "{comma}{options}");
        self
    }

    /// With this address.
    pub fn mac(self, mac: &str) -> Self {
        Self { mac: Some(mac.into()), ..self }
    }

    /// QEMU's arguments for this interface, the `index`th of guest `name`.
    fn arguments(&self, name: &str, index: usize, version: (u32, u32)) -> Vec<String> {
        let mut arguments = Vec::new();
        let on = |flag: bool| if flag { "on" } else { "off" };
        match &self.backend {
            NicBackend::VhostUser { socket, listen } => {
                let role = match (listen, version >= (9, 2)) {
                    (true, _) => "server=on,wait=off",
                    (false, true) => "reconnect-ms=200",
                    (false, false) => "reconnect=1",
                };
                let socket = socket.display();
                arguments.extend(["-chardev".into(), format!("socket,id=nic{index},path={socket},{role}")]);
                let queues = self.queues;
                let netdev = format!("vhost-user,id=net{index},chardev=nic{index},queues={queues}");
                arguments.extend(["-netdev".into(), netdev]);
            }
            NicBackend::Stream { socket, listen } => {
                let (server, socket) = (on(*listen), socket.display());
                let netdev =
                    format!("stream,id=net{index},server={server},addr.type=unix,addr.path={socket}");
                arguments.extend(["-netdev".into(), netdev]);
            }
            NicBackend::Tap(name) => {
                let netdev = format!("tap,id=net{index},ifname={name},script=no,downscript=no");
                arguments.extend(["-netdev".into(), netdev]);
            }
        }
        let mac = self.mac.clone().unwrap_or_else(|| default_mac(name, index));
        // Without a boot ROM: QEMU need not have it, and the firmware need not run it.
        let mut device = format!("virtio-net-pci,id=eth{index},netdev=net{index},mac={mac},romfile=");
        if self.queues > 1 {
            // One vector for each virtqueue, one for the control queue, one for configuration changes.
            let _ = write!(device, ",mq=on,vectors={}", 2 * self.queues + 2);
        }
        if !self.options.is_empty() {
            let _ = write!(device, ",{}", self.options);
        }
        arguments.extend(["-device".into(), device]);
        arguments
    }
}

/// A locally administered address that differs between guests and between interfaces.
fn default_mac(name: &str, index: usize) -> String {
    // FNV-1a, so that a guest has the same address each time.
    let hash = name.bytes().fold(0xcbf2_9ce4_8422_2325_u64, |hash, byte| {
        (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3)
    });
    let [.., a, b, c, d] = hash.to_be_bytes();
    format!("52:{a:02x}:{b:02x}:{c:02x}:{d:02x}:{index:02x}")
}

/// What QEMU says of a migration.
#[derive(Debug, Clone)]
pub struct Migration {
    /// How far it is, in a word of QEMU's (`MigrationStatus`).
    pub status: String,
    /// Bytes of memory sent so far.
    pub transferred: u64,
    /// How long the guest stood still; known when it is complete.
    pub downtime: Duration,
    /// How long all of it has taken.
    pub total: Duration,
}

/// A running guest. Dropped, it is killed.
#[derive(Debug)]
pub struct Guest {
    name: String,
    process: Mutex<Process>,
    agent: Agent,
    qmp: Mutex<Qmp>,
    console: PathBuf,
}

impl Guest {
    /// Boots a guest and waits until it takes commands.
    pub fn start(config: GuestConfig, dir: &WorkDir) -> Result<Self> {
        let guest = Self::launch(config, dir)?;
        guest.wait_ready(BOOT_DEADLINE)?;
        Ok(guest)
    }

    /// Boots several guests at the same time.
    pub fn start_all<const N: usize>(configs: [GuestConfig; N], dir: &WorkDir) -> Result<[Self; N]> {
        let mut guests = Vec::with_capacity(N);
        for config in configs {
            guests.push(Self::launch(config, dir)?);
        }
        for guest in &guests {
            guest.wait_ready(BOOT_DEADLINE)?;
        }
        guests.try_into().ok().context("as many guests as were asked for")
    }

    /// Starts QEMU; the guest then boots. A vhost-user backend must be there already, or come.
    pub fn launch(config: GuestConfig, dir: &WorkDir) -> Result<Self> {
        let accelerator = match config.accelerator {
            Some(accelerator) => accelerator,
            None => Accelerator::best()?,
        };
        let name = config.name.clone();
        let file = |suffix: &str| dir.path(&format!("{name}{suffix}"));
        let (monitor, agent, console) = (file(".qmp"), file(".agent"), file(".console"));
        for stale in [&monitor, &agent, &console] {
            if stale.exists() {
                std::fs::remove_file(stale)?;
            }
        }
        // QEMU connects to us, so the channels are there from the guest's first moment.
        let (monitor_listener, agent_listener) = (UnixListener::bind(&monitor)?, UnixListener::bind(&agent)?);
        let arguments = arguments(&config, accelerator, &monitor, &agent, &console, &file(".serial.log"))?;
        let qemu = Path::new(qemu()?);
        let (program, environment) = match &config.script {
            Some((script, environment)) => (&**script, &**environment),
            None => (qemu, &[][..]),
        };
        // nsenter becomes what it starts.
        let outer = config.namespace.as_ref().map_or(program, |_| Path::new("nsenter"));
        let configure = |command: &mut Command| {
            if let Some(namespace) = &config.namespace {
                command.arg(format!("--net={}", namespace.display())).arg("--").arg(program);
            }
            let accelerator = if accelerator == Accelerator::Kvm { "kvm" } else { "tcg" };
            command.args(arguments).env("QEMU", qemu).env("ACCEL", accelerator);
            command.envs(environment.iter().cloned());
        };
        let mut process = Process::spawn(&format!("guest {name}"), outer, configure, &file(".qemu.log"))?;
        let monitor_stream = accept(&monitor_listener, &mut process)?;
        let agent_stream = accept(&agent_listener, &mut process)?;
        let qmp = Qmp::new(monitor_stream).map_err(|error| {
            // Most likely QEMU did not like what it was given: its own words say more.
            let _ = process.wait(Duration::from_secs(2));
            process.check().err().unwrap_or(error)
        })?;
        Ok(Self {
            name,
            process: Mutex::new(process),
            agent: Agent::new(agent_stream)?,
            qmp: Mutex::new(qmp),
            console,
        })
    }

    /// Waits until the guest takes commands for the first time.
    pub fn wait_ready(&self, deadline: Duration) -> Result<()> {
        self.wait_boot(0, deadline)
    }

    fn wait_boot(&self, before: u64, deadline: Duration) -> Result<()> {
        self.agent.wait_boot(before, deadline).with_context(|| {
            let log = self.console.with_extension("serial.log");
            format!("guest {}; the end of its console:\n{}", self.name, crate::host::tail(&log, 20))
        })
    }

    /// The guest's name.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// The socket of its serial console, with a shell for a person.
    pub fn console(&self) -> &Path {
        &self.console
    }

    /// QEMU's process id.
    pub fn pid(&self) -> u32 {
        self.process().pid()
    }

    /// Runs one line of shell in the guest to its end, whatever its status.
    pub fn run(&self, command: &str, deadline: Duration) -> Result<Output> {
        self.agent.run(command, deadline).with_context(|| format!("guest {}", self.name))
    }

    /// Runs one line of shell in the guest, which must succeed, and returns its standard output.
    pub fn sh(&self, command: &str) -> Result<String> {
        let output = self.run(command, COMMAND_DEADLINE)?;
        output.success().with_context(|| format!("guest {}: `{command}`", self.name))
    }

    /// Starts one line of shell in the guest.
    pub fn spawn(&self, command: &str) -> Result<Job<'_>> {
        self.agent.spawn(command).with_context(|| format!("guest {}", self.name))
    }

    /// Gives interface `eth0` an address, such as `10.0.0.1/24`, and brings it up.
    pub fn address(&self, cidr: &str) -> Result<()> {
        self.sh(&format!("ip addr replace {cidr} dev eth0 && ip link set eth0 up")).map(drop)
    }

    /// Reboots from inside, and waits until the guest takes commands again. Addresses are gone then.
    pub fn reboot(&self) -> Result<()> {
        let before = self.agent.boots();
        // It has no end to wait for.
        self.spawn("reboot -f")?;
        self.wait_boot(before, BOOT_DEADLINE)
    }

    /// Resets the machine as its button would, and waits until the guest takes commands again.
    pub fn reset(&self) -> Result<()> {
        let before = self.agent.boots();
        self.qmp("system_reset", json!({}))?;
        self.wait_boot(before, BOOT_DEADLINE)
    }

    /// Pulls (`false`) or plugs (`true`) the cable of interface `eth<index>`.
    pub fn set_link(&self, index: usize, up: bool) -> Result<()> {
        self.qmp("set_link", json!({ "name": format!("eth{index}"), "up": up })).map(drop)
    }

    /// Halts all virtual processors.
    pub fn stop(&self) -> Result<()> {
        self.qmp("stop", json!({})).map(drop)
    }

    /// Lets them go on.
    pub fn cont(&self) -> Result<()> {
        self.qmp("cont", json!({})).map(drop)
    }

    /// Has QEMU move the running guest to `to`, which was launched as `incoming`, by a new socket at `path`; `to` then takes
    /// commands when [`migrated`](Self::migrated) says that it is complete.
    pub fn migrate(&self, to: &Guest, path: &Path) -> Result<()> {
        let uri = json!({ "uri": format!("unix:{}", path.display()) });
        to.qmp("migrate-incoming", uri.clone())?;
        self.qmp("migrate", uri).map(drop)
    }

    /// How far the migration of this guest is.
    pub fn migration(&self) -> Result<Migration> {
        let answer = self.qmp("query-migrate", json!({}))?;
        let number = |value: &Value| value.as_u64().unwrap_or_default();
        Ok(Migration {
            status: answer["status"].as_str().unwrap_or("none").to_owned(),
            transferred: number(&answer["ram"]["transferred"]),
            downtime: Duration::from_millis(number(&answer["downtime"])),
            total: Duration::from_millis(number(&answer["total-time"])),
        })
    }

    /// Waits until the migration to `to` is complete and the guest runs there.
    pub fn migrated(&self, to: &Guest, deadline: Duration) -> Result<Migration> {
        let migration = wait_for("the migration to be complete", deadline, || {
            let migration = self.migration()?;
            ensure!(migration.status != "failed" && migration.status != "cancelled", "{migration:?}");
            Ok(Some(migration).filter(|migration| migration.status == "completed"))
        })?;
        wait_for("the guest to run at the destination", deadline, || {
            Ok((to.qmp("query-status", json!({}))?["running"] == true).then_some(()))
        })?;
        to.agent.go_on_from(&self.agent);
        Ok(migration)
    }

    /// Executes a command of QEMU's monitor.
    pub fn qmp(&self, command: &str, arguments: Value) -> Result<Value> {
        let mut qmp = self.qmp.lock().unwrap_or_else(PoisonError::into_inner);
        qmp.execute(command, arguments).with_context(|| format!("guest {}", self.name))
    }

    /// Kills QEMU with SIGKILL: the backend hears nothing but the end of the connection.
    pub fn kill(&self) -> Result<()> {
        self.process().kill()
    }

    /// Lets QEMU end by itself.
    pub fn quit(self) -> Result<()> {
        // The answer may be lost in the end.
        let _ = self.qmp("quit", json!({}));
        let status = self.process().wait(Duration::from_secs(10))?;
        ensure!(status.success(), "guest {} ended with {status}", self.name);
        Ok(())
    }

    fn process(&self) -> std::sync::MutexGuard<'_, Process> {
        self.process.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for Guest {
    fn drop(&mut self) {
        if std::thread::panicking() {
            let log = self.console.with_extension("serial.log");
            eprintln!("--- end of the console of guest {} ---\n{}", self.name, crate::host::tail(&log, 20));
        }
    }
}

/// The one connection that QEMU makes to `listener`.
fn accept(listener: &UnixListener, process: &mut Process) -> Result<UnixStream> {
    listener.set_nonblocking(true)?;
    let stream = wait_for("QEMU to connect", Duration::from_secs(30), || match listener.accept() {
        Ok((stream, _)) => Ok(Some(stream)),
        Err(error) if error.kind() == std::io::ErrorKind::WouldBlock => process.check().map(|()| None),
        Err(error) => Err(error.into()),
    })?;
    stream.set_nonblocking(false)?;
    Ok(stream)
}

/// QEMU's command line.
fn arguments(
    config: &GuestConfig,
    accelerator: Accelerator,
    monitor: &Path,
    agent: &Path,
    console: &Path,
    serial_log: &Path,
) -> Result<Vec<String>> {
    let version = qemu_version()?;
    let image = Image::get(config.image)?;
    let x86 = cfg!(target_arch = "x86_64");
    let (machine, tty) = if x86 { ("q35", "ttyS0") } else { ("virt", "ttyAMA0") };
    let (accel, cpu) = match accelerator {
        Accelerator::Kvm => ("kvm", "host"),
        Accelerator::Tcg => ("tcg,thread=multi", "max"),
    };
    let mut list: Vec<String> = Vec::new();
    let mut add = |option: &str, value: String| list.extend([option.to_owned(), value]);
    if config.script.is_none() {
        add("-name", config.name.clone());
        add("-accel", accel.into());
        add("-cpu", cpu.into());
        add("-smp", config.vcpus.to_string());
        add("-m", format!("{}M", config.memory));
        ensure!(config.segments >= 1, "a guest has at least one segment of memory");
        let huge = if config.hugepages { ",hugetlb=on,hugetlbsize=2M" } else { "" };
        for segment in 0..config.segments {
            let size = config.memory / config.segments;
            add("-object", format!("memory-backend-memfd,id=mem{segment},size={size}M,share=on{huge}"));
            if config.segments > 1 {
                add("-numa", format!("node,nodeid={segment},memdev=mem{segment}"));
            }
        }
        let memory = if config.segments == 1 { ",memory-backend=mem0" } else { "" };
        // Remapping of interrupts is QEMU's, so KVM must leave it the I/O APIC.
        let split = if config.iommu { ",kernel-irqchip=split" } else { "" };
        add("-machine", format!("{machine}{memory}{split}"));
    }
    add("-kernel", image.kernel().display().to_string());
    add("-initrd", image.initramfs().display().to_string());
    // The kernel's own self-tests would be a fifth of an emulated boot.
    let mut boot =
        format!("console={tty} quiet nokaslr cryptomgr.notests net.ifnames=0 hostname={}", config.name);
    if x86 {
        // The kernel tries the timer for ten ticks, and panics when a busy machine has not emulated them by then.
        boot.push_str(" no_timer_check");
    }
    if config.iommu {
        ensure!(x86, "guests have an IOMMU on x86 only");
        boot.push_str(" intel_iommu=on");
        // Before all other devices.
        add("-device", "intel-iommu,intremap=on,aw-bits=39".into());
    }
    add("-append", boot);
    add("-display", "none".into());
    add("-chardev", format!("socket,id=monitor,path={}", monitor.display()));
    add("-mon", "chardev=monitor,mode=control".into());
    let (console, log) = (console.display(), serial_log.display());
    let serial = format!("socket,id=console,path={console},server=on,wait=off,logfile={log},logappend=on");
    add("-chardev", serial);
    add("-serial", "chardev:console".into());
    add("-chardev", format!("socket,id=agent,path={}", agent.display()));
    // Interfaces first, so that they are numbered by their order alone.
    for (index, nic) in config.nics.iter().enumerate() {
        nic.arguments(&config.name, index, version).chunks(2).for_each(|pair| add(&pair[0], pair[1].clone()));
    }
    for [option, value] in &config.arguments {
        add(option, value.clone());
    }
    for (index, Share { tag, path, writable }) in config.shares.iter().enumerate() {
        let (path, readonly) = (path.display(), if *writable { "off" } else { "on" });
        add(
            "-fsdev",
            format!(
                "local,id=share{index},path={path},security_model=none,multidevs=remap,readonly={readonly}"
            ),
        );
        add("-device", format!("virtio-9p-pci,fsdev=share{index},mount_tag={tag}"));
    }
    add("-device", "virtio-serial-pci".into());
    add("-device", "virtserialport,chardev=agent,name=agent".into());
    if config.incoming {
        add("-incoming", "defer".into());
    }
    list.extend(["-no-user-config".into(), "-nodefaults".into()]);
    Ok(list)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_differ_and_stay() {
        assert_eq!(default_mac("vm1", 0), default_mac("vm1", 0));
        assert_ne!(default_mac("vm1", 0), default_mac("vm2", 0));
        assert_ne!(default_mac("vm1", 0), default_mac("vm1", 1));
    }

    #[test]
    fn an_interface_becomes_arguments() {
        let nic =
            Nic::listen("/tmp/s").queues(2).mac("02:00:00:00:00:01").options("csum=off").options("gso=off");
        let text = nic.arguments("vm1", 0, (10, 0)).join(" ");
        assert!(text.contains("socket,id=nic0,path=/tmp/s,server=on,wait=off"), "{text}");
        assert!(text.contains("vhost-user,id=net0,chardev=nic0,queues=2"), "{text}");
        assert!(text.ends_with("romfile=,mq=on,vectors=6,csum=off,gso=off"), "{text}");
        let old = Nic::connect("/tmp/s").arguments("vm1", 1, (8, 2)).join(" ");
        assert!(old.contains("path=/tmp/s,reconnect=1 "), "{old}");
    }
}
