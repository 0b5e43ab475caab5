//! A running `pointworkd` and what `pointwork` says about it. All that the tests assume of its JSON is here.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::os::unix::net::UnixDatagram;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::sync::OnceLock;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use serde::Deserialize;
use serde::de::DeserializeOwned;
use serde_json::Value;

use crate::host::{Process, WorkDir, wait_for};
use crate::image::project;
use crate::ovs::{BRIDGE, Ovs};

/// What `pointworkd` is configured with.
#[derive(Debug, Clone, Default)]
pub struct DaemonConfig {
    /// One worker for each processor named; by default one worker that runs anywhere.
    pub cpus: Vec<usize>,
    /// Its ports.
    pub ports: Vec<PortConfig>,
    /// Its state file; by default one in its directory.
    pub state: Option<PathBuf>,
    /// What decides about packets without a flow; by default the bridge of its own.
    pub host: Host,
    /// The file of the network namespace that it runs in; by default ours.
    pub namespace: Option<PathBuf>,
    /// Entries of the exact-match table; by default few, so that a test's daemon is small.
    pub l1_entries: Option<usize>,
    /// More TOML at the end, such as ports without a guest.
    pub more: String,
}

/// The `[host]` of the configuration.
#[derive(Debug, Clone, Default)]
pub enum Host {
    /// The embedded bridge.
    #[default]
    Bridge,
    /// A bridge of Open vSwitch.
    Ovs {
        /// The bridge's name.
        bridge: String,
        /// The database's socket, as OVS's tools name it.
        db: String,
    },
}

/// A `[[port]]` of the configuration.
#[derive(Debug, Clone)]
pub struct PortConfig {
    /// The port's name.
    pub name: String,
    /// The socket that it shares with QEMU.
    pub socket: PathBuf,
    /// Whether the port connects (QEMU listens) instead of listening.
    pub client: bool,
    /// Queue pairs.
    pub queues: u16,
    /// More lines of TOML, such as `vlan = 10`.
    pub more: String,
}

impl PortConfig {
    /// A listening port with one queue pair, whose socket in `dir` has the port's name.
    pub fn server(name: &str, dir: &WorkDir) -> Self {
        let socket = dir.path(&format!("{name}.sock"));
        Self { name: name.into(), socket, client: false, queues: 1, more: String::new() }
    }

    /// As [`Self::server`], but QEMU is to listen.
    pub fn client(name: &str, dir: &WorkDir) -> Self {
        Self { client: true, ..Self::server(name, dir) }
    }

    /// With this many queue pairs.
    pub fn queues(self, queues: u16) -> Self {
        Self { queues, ..self }
    }

    /// With this line of TOML added.
    pub fn with(mut self, line: &str) -> Self {
        self.more.push_str(line);
        self.more.push('\n');
        self
    }
}

impl DaemonConfig {
    /// These ports, and one worker that runs anywhere.
    pub fn new(ports: impl Into<Vec<PortConfig>>) -> Self {
        Self { ports: ports.into(), ..Self::default() }
    }

    /// As [`Self::new`], under this Open vSwitch and in its namespace.
    pub fn under(ovs: &Ovs, ports: impl Into<Vec<PortConfig>>) -> Self {
        let host = Host::Ovs { bridge: BRIDGE.into(), db: ovs.db() };
        Self { host, namespace: Some(ovs.namespace().path()), ..Self::new(ports) }
    }

    /// The configuration file's text (design: "What users and tests rely on").
    pub fn to_toml(&self, dir: &WorkDir) -> String {
        // A path or a name of ours needs no escape beyond what Debug and TOML share.
        let mut text = format!(
            "control = {:?}\nstate = {:?}\n\n[datapath]\ncpus = {:?}\nl1_entries = {}\n\n[host]\n",
            dir.path("control.sock"),
            self.state.clone().unwrap_or_else(|| dir.path("state.json")),
            self.cpus,
            self.l1_entries.unwrap_or(65_536)
        );
        let _ = match &self.host {
            Host::Bridge => writeln!(text, "kind = \"bridge\""),
            Host::Ovs { bridge, db } => writeln!(text, "kind = \"ovs\"\nbridge = {bridge:?}\ndb = {db:?}"),
        };
        for PortConfig { name, socket, client, queues, more } in &self.ports {
            let mode = if *client { "client" } else { "server" };
            let _ = write!(
                text,
                "\n[[port]]\nname = {name:?}\nsocket = {socket:?}\nmode = {mode:?}\nqueues = {queues}\n{more}"
            );
        }
        text + &self.more
    }
}

/// A `pointworkd` that is ready. Dropped, it is killed.
#[derive(Debug)]
pub struct Daemon {
    process: Process,
    control: PathBuf,
    log: PathBuf,
}

impl Daemon {
    /// Starts one with its files in `dir`, and waits until it says that it is ready.
    pub fn start(config: &DaemonConfig, dir: &WorkDir) -> Result<Self> {
        let (file, notify, log) =
            (dir.path("pointwork.toml"), dir.path("notify"), dir.path("pointworkd.log"));
        std::fs::write(&file, config.to_toml(dir))?;
        if notify.exists() {
            std::fs::remove_file(&notify)?;
        }
        let notifications = UnixDatagram::bind(&notify)?;
        notifications.set_nonblocking(true)?;
        let program = binary("pointworkd")?;
        // nsenter becomes the daemon, as setpriv does.
        let outer = config.namespace.as_ref().map_or(&*program, |_| Path::new("nsenter"));
        let configure = |command: &mut Command| {
            if let Some(namespace) = &config.namespace {
                command.arg(format!("--net={}", namespace.display())).arg("--").arg(&program);
            }
            command.arg("--config").arg(&file).env("NOTIFY_SOCKET", &notify);
        };
        let mut process = Process::spawn("pointworkd", outer, configure, &log)?;
        wait_for("pointworkd to be ready", Duration::from_secs(20), || {
            process.check()?;
            let mut message = [0; 4096];
            match notifications.recv(&mut message) {
                Ok(bytes) => {
                    let text = String::from_utf8_lossy(&message[..bytes]);
                    Ok(text.lines().any(|line| line == "READY=1").then_some(()))
                }
                Err(error) if error.kind() == std::io::ErrorKind::WouldBlock => Ok(None),
                Err(error) => Err(error.into()),
            }
        })?;
        Ok(Self { process, control: dir.path("control.sock"), log })
    }

    /// Its process id.
    pub fn pid(&self) -> u32 {
        self.process.pid()
    }

    /// The file of its log.
    pub fn log(&self) -> &Path {
        &self.log
    }

    /// Its control socket.
    pub fn control(&self) -> &Path {
        &self.control
    }

    /// The share of one core that it uses over `interval`.
    pub fn cpu_usage(&self, interval: Duration) -> Result<f64> {
        self.process.cpu_usage(interval)
    }

    /// Runs `pointwork --json` with these arguments and returns what it prints.
    pub fn ctl(&self, arguments: &[&str]) -> Result<Value> {
        let output = self.command(arguments)?;
        let said = String::from_utf8_lossy(&output.stderr);
        ensure!(output.status.success(), "pointwork {}: {}: {said}", arguments.join(" "), output.status);
        let text = String::from_utf8_lossy(&output.stdout);
        if text.trim().is_empty() {
            return Ok(Value::Null);
        }
        serde_json::from_str(&text).with_context(|| format!("pointwork {}: {text:.500}", arguments.join(" ")))
    }

    /// Runs `pointwork --json` with arguments that it has to refuse: status 1 and one line, which is returned.
    pub fn refusal(&self, arguments: &[&str]) -> Result<String> {
        let output = self.command(arguments)?;
        refusal(&format!("pointwork {}", arguments.join(" ")), &output)
    }

    fn command(&self, arguments: &[&str]) -> Result<Output> {
        let mut command = Command::new("timeout");
        command.arg("30").arg(binary("pointwork")?).arg("--control").arg(&self.control).arg("--json");
        Ok(command.args(arguments).stdin(Stdio::null()).output()?)
    }

    fn typed<T: DeserializeOwned>(&self, command: &str) -> Result<T> {
        let value = self.ctl(&[command])?;
        serde_json::from_value(value.clone()).with_context(|| format!("pointwork {command}: {value}"))
    }

    /// What `pointwork show` says of the ports.
    pub fn show(&self) -> Result<Vec<PortShow>> {
        #[derive(Deserialize)]
        struct Show {
            ports: Vec<PortShow>,
        }
        Ok(self.typed::<Show>("show")?.ports)
    }

    /// Who polls which queue, in the order of the ports, as `p1.0@1` (queue 0 of p1, worker 1), with `!` if it is pinned.
    pub fn polls(&self) -> Result<Vec<String>> {
        #[derive(Deserialize)]
        struct Show {
            workers: Vec<Worker>,
        }
        #[derive(Deserialize)]
        struct Worker {
            id: u32,
            queues: Vec<Polled>,
        }
        #[derive(Deserialize)]
        struct Polled {
            port: String,
            queue: u16,
            pinned: bool,
        }
        let workers = self.typed::<Show>("show")?.workers;
        let of = |worker: Worker| {
            let text = move |Polled { port, queue, pinned }: Polled| {
                format!("{port}.{queue}@{}{}", worker.id, if pinned { "!" } else { "" })
            };
            worker.queues.into_iter().map(text)
        };
        let mut polls: Vec<String> = workers.into_iter().flat_map(of).collect();
        polls.sort();
        Ok(polls)
    }

    /// What `pointwork stats` says.
    pub fn stats(&self) -> Result<Stats> {
        self.typed("stats")
    }

    /// How many flows `pointwork dump-flows` lists.
    pub fn flows(&self) -> Result<usize> {
        let value = self.ctl(&["dump-flows"])?;
        Ok(value["flows"].as_array().with_context(|| format!("pointwork dump-flows: {value}"))?.len())
    }

    /// Waits until each of these ports has its link up or, for `false`, down.
    pub fn wait_link(&self, ports: &[&str], up: bool, deadline: Duration) -> Result<()> {
        wait_for(&format!("link of {ports:?} to be {up}"), deadline, || {
            let shown = self.show()?;
            let settled = |name: &&str| shown.iter().any(|port| port.name == **name && port.link == up);
            Ok(ports.iter().all(settled).then_some(()))
        })
    }

    /// The counters, once they balance: packets on their way are counted on one side only, for a moment.
    pub fn balanced_stats(&self) -> Result<Stats> {
        let deadline = Instant::now() + Duration::from_secs(3);
        loop {
            let stats = self.stats()?;
            match stats.imbalance() {
                None => return Ok(stats),
                Some(why) if Instant::now() > deadline => {
                    bail!("the counters do not balance: {why}\n{stats:#?}")
                }
                Some(_) => std::thread::sleep(Duration::from_millis(50)),
            }
        }
    }

    /// SIGTERM: it has to end within a second and with status 0.
    pub fn terminate(&mut self) -> Result<()> {
        let start = Instant::now();
        self.process.terminate()?;
        let status = self.process.wait(Duration::from_secs(10))?;
        let took = start.elapsed();
        let log = self.process.log_tail(20);
        ensure!(status.success(), "pointworkd ended with {status} on SIGTERM:\n{log}");
        ensure!(took <= Duration::from_secs(1), "pointworkd took {took:?} to end on SIGTERM:\n{log}");
        Ok(())
    }

    /// SIGKILL.
    pub fn kill(&mut self) -> Result<()> {
        self.process.kill()
    }

    /// An error, with its last words, if it has ended.
    pub fn check(&mut self) -> Result<()> {
        self.process.check()
    }

    /// The last lines of its log.
    pub fn log_tail(&self, lines: usize) -> String {
        self.process.log_tail(lines)
    }
}

/// A port in `pointwork show`.
#[derive(Debug, Clone, Deserialize)]
pub struct PortShow {
    /// Its name.
    pub name: String,
    /// What it is doing, in a word.
    pub state: String,
    /// Whether a guest's driver is there, or a device with a carrier.
    pub link: bool,
    /// Queue pairs in use.
    pub active_queues: u16,
    /// What was negotiated, or how a device is used.
    pub features: Vec<String>,
    /// MTU that is enforced.
    pub mtu: u32,
    /// What is wrong with it.
    pub fault: Option<String>,
    /// Its socket.
    pub socket: PathBuf,
    /// `server` or `client`.
    pub mode: String,
    /// Queue pairs.
    pub queues: u16,
}

/// `pointwork stats`.
#[derive(Debug, Clone, Deserialize)]
pub struct Stats {
    /// Each port's counters.
    pub ports: BTreeMap<String, PortStats>,
    /// What deleted ports had counted; not there for a single port.
    pub deleted: Option<PortStats>,
    /// How packets found their actions.
    pub paths: Paths,
    /// What workers did with their time.
    pub workers: Vec<WorkerStats>,
}

/// A worker's counters.
#[derive(Debug, Clone, Default, Deserialize)]
pub struct WorkerStats {
    /// Cycles in rounds that moved packets.
    pub busy_cycles: u64,
    /// Cycles in rounds that found none.
    pub idle_cycles: u64,
    /// Packets.
    pub packets: u64,
    /// Bursts that had packets.
    pub bursts: u64,
    /// Of them, those of 1, of 2 or 3, of 4 to 7 packets, and so on.
    pub burst_sizes: Vec<u64>,
    /// Polls that found nothing.
    pub empty_polls: u64,
    /// Flows in the exact-match table.
    pub l1_entries: u64,
    /// What its queues have cost.
    #[serde(default)]
    pub queues: Vec<QueueStats>,
}

/// What a queue has cost a worker.
#[derive(Debug, Clone, Default, Deserialize)]
pub struct QueueStats {
    /// Its port.
    pub port: String,
    /// Its queue pair.
    pub queue: u16,
    /// Whether the worker polls it now.
    pub polled: bool,
    /// Cycles.
    pub busy_cycles: u64,
}

/// A port's counters. Receiving is from the guest, transmitting is to it.
#[derive(Debug, Clone, Deserialize)]
pub struct PortStats {
    /// Packets taken from the guest.
    pub rx_packets: u64,
    /// Their bytes.
    pub rx_bytes: u64,
    /// Packets given to the guest.
    pub tx_packets: u64,
    /// Their bytes.
    pub tx_bytes: u64,
    /// Packets from the guest whose actions were executed here.
    pub rx_forwarded: u64,
    /// Packets from the guest handed to the host path.
    pub rx_to_host: u64,
    /// Packets from the guest that were dropped, by reason.
    pub rx_drops: BTreeMap<String, u64>,
    /// Packets to the guest that were dropped, by reason.
    pub tx_drops: BTreeMap<String, u64>,
    /// Copies that workers made of packets from this port for the ports that they went to.
    pub fast_copies: u64,
    /// Copies that the host path sent to this port.
    pub host_copies: u64,
}

/// How packets found their actions.
#[derive(Debug, Clone, Copy, Default, Deserialize)]
pub struct Paths {
    /// By exact match.
    pub l1: u64,
    /// By masked match.
    pub l2: u64,
    /// By asking the source of flows.
    pub miss: u64,
    /// Not at all: the host path takes them by rule.
    pub punt: u64,
    /// By the host path, so that their flows are seen alive.
    #[serde(default)]
    pub keepalive: u64,
}

impl Stats {
    /// The first sum that does not come out, in words.
    pub fn imbalance(&self) -> Option<String> {
        let (mut copies, mut ends) = (0, 0);
        let deleted = self.deleted.iter().map(|port| ("deleted ports", port));
        for (name, port) in self.ports.iter().map(|(name, port)| (name.as_str(), port)).chain(deleted) {
            let drops: u64 = port.rx_drops.values().sum();
            let parts = port.rx_forwarded + port.rx_to_host + drops;
            if port.rx_packets != parts {
                return Some(format!(
                    "{name}: rx_packets {} != forwarded + to host + drops {parts}",
                    port.rx_packets
                ));
            }
            copies += port.fast_copies + port.host_copies;
            ends += port.tx_packets + port.tx_drops.values().sum::<u64>();
        }
        (copies != ends).then(|| format!("copies {copies} != tx_packets + tx_drops {ends}"))
    }

    /// All drops, by port, direction and reason.
    pub fn drops(&self) -> BTreeMap<String, u64> {
        let of = |(name, port): (&String, &PortStats)| {
            let named = |way: &str, drops: &BTreeMap<String, u64>| -> Vec<(String, u64)> {
                drops
                    .iter()
                    .filter(|(_, n)| **n > 0)
                    .map(|(why, n)| (format!("{name} {way} {why}"), *n))
                    .collect()
            };
            [named("rx", &port.rx_drops), named("tx", &port.tx_drops)].concat()
        };
        self.ports.iter().flat_map(of).collect()
    }
}

/// What a program said that refused: it must have ended with status 1, printed nothing, and said one line.
pub fn refusal(what: &str, output: &Output) -> Result<String> {
    let said = String::from_utf8_lossy(&output.stderr);
    ensure!(output.status.code() == Some(1), "{what} ended with {}: {said}", output.status);
    ensure!(output.stdout.is_empty(), "{what} printed {}", String::from_utf8_lossy(&output.stdout));
    let line = said.strip_suffix('\n').filter(|line| !line.contains('\n') && !line.is_empty());
    Ok(line.with_context(|| format!("{what} did not say one line but {said:?}"))?.to_owned())
}

/// The path of one of the project's programs: in `POINTWORK_BIN_DIR`, or beside this program, or (for a test) built now,
/// so that no stale one is tested.
pub fn binary(name: &str) -> Result<PathBuf> {
    static DIR: OnceLock<Result<PathBuf, String>> = OnceLock::new();
    let dir = DIR.get_or_init(|| binary_dir().map_err(|error| format!("{error:#}")));
    let dir = dir.as_ref().map_err(|error| anyhow::anyhow!("{error}"))?;
    let path = dir.join(name);
    ensure!(path.exists(), "{} is missing", path.display());
    Ok(path)
}

fn binary_dir() -> Result<PathBuf> {
    if let Some(dir) = std::env::var_os("POINTWORK_BIN_DIR") {
        return Ok(PathBuf::from(dir));
    }
    let program = std::env::current_exe()?;
    let beside = program.parent().context("this program is in no directory")?;
    if beside.file_name().is_none_or(|name| name != "deps") {
        return Ok(beside.into());
    }
    // target/<profile>/deps/<test>
    let dir = beside.parent().context("no profile's directory")?;
    let profile = match dir.file_name().and_then(|name| name.to_str()) {
        Some("debug") | None => "dev",
        Some(other) => other,
    };
    let cargo = std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into());
    let status = Command::new(cargo)
        .args(["build", "--quiet", "--package", "backend", "--bins", "--profile", profile])
        .current_dir(project())
        .stdin(Stdio::null())
        .status()
        .context("cargo")?;
    ensure!(status.success(), "pointworkd could not be built");
    Ok(dir.into())
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn port(rx: u64, tx: u64) -> Value {
        json!({ "rx_packets": rx, "rx_bytes": 60 * rx, "tx_packets": tx, "tx_bytes": 60 * tx, "rx_forwarded": rx,
                "rx_to_host": 0, "rx_drops": {}, "tx_drops": {}, "fast_copies": rx, "host_copies": 0 })
    }

    #[test]
    fn an_imbalance_is_named() {
        let stats = |change: fn(&mut Value)| {
            let mut value = json!({ "workers": [], "ports": { "vm1": port(5, 7), "vm2": port(7, 5) },
                                    "paths": { "l1": 10, "l2": 1, "miss": 1, "punt": 0 } });
            change(&mut value["ports"]["vm1"]);
            serde_json::from_value::<Stats>(value).unwrap()
        };
        assert_eq!(stats(|_| ()).imbalance(), None);
        let lost = stats(|vm1| vm1["rx_packets"] = json!(6)).imbalance().unwrap();
        assert!(lost.contains("vm1: rx_packets 6"), "{lost}");
        let doubled = stats(|vm1| vm1["tx_packets"] = json!(8)).imbalance().unwrap();
        assert!(doubled.contains("copies 12 != tx_packets + tx_drops 13"), "{doubled}");
        let dropped = stats(|vm1| {
            vm1["tx_packets"] = json!(6);
            vm1["tx_drops"] = json!({ "rx_ring_full": 1, "other": 0 });
        });
        assert_eq!(dropped.imbalance(), None);
        assert_eq!(dropped.drops(), BTreeMap::from([("vm1 tx rx_ring_full".to_owned(), 1)]));
    }

    #[test]
    fn the_configuration_is_written_as_the_contract_says() {
        let dir = WorkDir::new().unwrap();
        let port = PortConfig::client("vm1", &dir).queues(2).with("vlan = 10");
        let text = DaemonConfig { cpus: vec![1], ..DaemonConfig::new([port]) }.to_toml(&dir);
        assert!(text.contains("cpus = [1]"), "{text}");
        assert!(text.contains("mode = \"client\"\nqueues = 2\nvlan = 10\n"), "{text}");
        assert!(text.contains("[host]\nkind = \"bridge\"\n\n[[port]]"), "{text}");
        let host = Host::Ovs { bridge: "br7".into(), db: "unix:/x".into() };
        let text = DaemonConfig { host, ..DaemonConfig::default() }.to_toml(&dir);
        assert!(text.contains("[host]\nkind = \"ovs\"\nbridge = \"br7\"\ndb = \"unix:/x\"\n"), "{text}");
    }
}
