//! A stock Open vSwitch of our own: `ovsdb-server` and `ovs-vswitchd` as the distribution ships them, in a network
//! namespace and a directory of their own, so that one that serves this machine is never touched.
//!
//! The bridges of the tests use its userspace datapath (`datapath_type=netdev`), which needs no kernel module.

use std::io::{ErrorKind, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use serde_json::{Value, json};

use crate::host::{Process, WorkDir, wait_for};
use crate::netns::Namespace;

/// The bridge that [`Ovs::start`] makes.
pub const BRIDGE: &str = "br0";

/// Longer than anything here takes on a busy machine.
const DEADLINE: Duration = Duration::from_secs(20);
const SCHEMA: &str = "/usr/share/openvswitch/vswitch.ovsschema";
/// The daemon as Debian ships it, and the one that is built with DPDK.
const VSWITCHD: &str = "ovs-vswitchd";
const VSWITCHD_DPDK: &str = "/usr/lib/openvswitch-switch-dpdk/ovs-vswitchd-dpdk";
/// An address that no packet has; see [`Ovs::revalidate`].
const NOBODY: &str = "02:00:00:ff:ff:ff";

/// A running Open vSwitch with the bridge [`BRIDGE`]. Everything of it ends on drop.
#[derive(Debug)]
pub struct Ovs {
    /// Dropped before the namespace, in this order.
    vswitchd: Option<Process>,
    server: Option<Process>,
    namespace: Namespace,
    dir: PathBuf,
    /// Of `ovs-vswitchd`, beside those that it needs.
    options: &'static [&'static str],
    /// `ovs-vswitchd`, or a path of one.
    program: &'static str,
}

impl Ovs {
    /// Starts both daemons with their files in `dir` and a new namespace, and makes the bridge. Several may run side by
    /// side, each in its directory.
    pub fn start(dir: &WorkDir) -> Result<Self> {
        Self::start_with(dir, &[], VSWITCHD, &[])
    }

    /// As [`Self::start`], but of the package `openvswitch-switch-dpdk`, with these `other_config` settings (`NAME=VALUE`)
    /// beside `dpdk-init`.
    pub fn start_dpdk(dir: &WorkDir, settings: &[&str]) -> Result<Self> {
        ensure!(Path::new(VSWITCHD_DPDK).exists(), "{VSWITCHD_DPDK} is missing (openvswitch-switch-dpdk)");
        let settings: Vec<String> = ["dpdk-init=true"]
            .iter()
            .chain(settings)
            .map(|setting| format!("other_config:{setting}"))
            .collect();
        Self::start_with(dir, &[], VSWITCHD_DPDK, &settings)
    }

    /// As [`Self::start`], and `ovs-vswitchd` takes the actions that Open vSwitch has for its own tests (`debug_recirc`).
    pub fn start_for_tests(dir: &WorkDir) -> Result<Self> {
        Self::start_with(dir, &["--enable-dummy"], VSWITCHD, &[])
    }

    fn start_with(
        dir: &WorkDir,
        options: &'static [&'static str],
        program: &'static str,
        settings: &[String],
    ) -> Result<Self> {
        let namespace = Namespace::new()?;
        let dir = dir.root().to_path_buf();
        let mut ovs = Self { vswitchd: None, server: None, namespace, dir, options, program };
        let database = ovs.dir.join("conf.db");
        let mut create = Command::new("ovsdb-tool");
        run(create.arg("create").arg(database).arg(SCHEMA))?;
        ovs.start_server()?;
        ovs.vsctl(&["--no-wait", "init"])?;
        if !settings.is_empty() {
            let settings: Vec<&str> = settings.iter().map(String::as_str).collect();
            ovs.vsctl(&[&["--no-wait", "set", "Open_vSwitch", "."], &settings[..]].concat())?;
        }
        ovs.start_vswitchd()?;
        // Ports of a bridge that fails secure are as its flows say, from the first packet on.
        ovs.vsctl(&[
            "add-br",
            BRIDGE,
            "--",
            "set",
            "bridge",
            BRIDGE,
            "datapath_type=netdev",
            "fail_mode=secure",
        ])?;
        ovs.namespace.ip(&["link", "set", BRIDGE, "up"])?;
        Ok(ovs)
    }

    /// The namespace that it runs in.
    pub fn namespace(&self) -> &Namespace {
        &self.namespace
    }

    /// The database's socket, as OVS's tools name it (`unix:PATH`).
    pub fn db(&self) -> String {
        format!("unix:{}", self.dir.join("db.sock").display())
    }

    /// Its OVS_RUNDIR: sockets and pid files, under the names that the tools expect.
    pub fn rundir(&self) -> &Path {
        &self.dir
    }

    /// Starts `ovsdb-server` if it does not run, and waits until it answers.
    pub fn start_server(&mut self) -> Result<()> {
        if self.server.is_none() {
            let remote = format!("--remote=p{}", self.db());
            self.server = Some(self.spawn("ovsdb-server", &["conf.db", &remote])?);
        }
        wait_for("ovsdb-server", DEADLINE, || {
            self.server.as_mut().context("it was stopped")?.check()?;
            Ok(UnixStream::connect(self.dir.join("db.sock")).ok())
        })?;
        Ok(())
    }

    /// Starts `ovs-vswitchd` if it does not run, and waits until the database's bridges are there.
    pub fn start_vswitchd(&mut self) -> Result<()> {
        if self.vswitchd.is_none() {
            self.vswitchd = Some(self.spawn(self.program, &[self.options, &[&self.db()]].concat())?);
        }
        wait_for("ovs-vswitchd", DEADLINE, || {
            self.vswitchd.as_mut().context("it was stopped")?.check()?;
            // Its pid file stays when it is killed: the socket's name says whether it is this one's.
            Ok(self.unixctl().ok())
        })?;
        // Of a bridge, the socket of its controllers comes last.
        for bridge in self.vsctl(&["--no-wait", "list-br"])?.lines() {
            wait_for(&format!("bridge {bridge}"), DEADLINE, || {
                Ok(UnixStream::connect(self.dir.join(format!("{bridge}.mgmt"))).ok())
            })?;
        }
        Ok(())
    }

    /// Ends both by SIGTERM, `ovs-vswitchd` first.
    pub fn stop(&mut self) -> Result<()> {
        for process in [&mut self.vswitchd, &mut self.server] {
            if let Some(mut process) = process.take() {
                process.terminate()?;
                process.wait(DEADLINE)?;
            }
        }
        Ok(())
    }

    /// Stops both and starts them again, as an update of the package does.
    pub fn restart(&mut self) -> Result<()> {
        self.stop()?;
        self.start_server()?;
        self.start_vswitchd()
    }

    /// The process id of `ovs-vswitchd`.
    pub fn pid(&self) -> Result<u32> {
        Ok(self.vswitchd.as_ref().context("ovs-vswitchd does not run")?.pid())
    }

    /// Halts `ovs-vswitchd`, with all its threads, or lets it go on.
    pub fn pause(&self, pause: bool) -> Result<()> {
        let signal = if pause { "STOP" } else { "CONT" };
        self.vswitchd.as_ref().context("ovs-vswitchd does not run")?.signal(signal)
    }

    /// SIGKILL to `ovs-vswitchd`.
    pub fn kill_vswitchd(&mut self) -> Result<()> {
        self.vswitchd.take().context("ovs-vswitchd does not run")?.kill()
    }

    /// SIGKILL to `ovsdb-server`.
    pub fn kill_server(&mut self) -> Result<()> {
        self.server.take().context("ovsdb-server does not run")?.kill()
    }

    /// `ovs-vsctl` with these arguments; returns when `ovs-vswitchd` has done it. What it printed.
    pub fn vsctl(&self, arguments: &[&str]) -> Result<String> {
        let mut command = Command::new("ovs-vsctl");
        command.arg(format!("--db={}", self.db()));
        self.tool(&mut command, arguments)
    }

    /// `ovs-ofctl`, in the newest OpenFlow, with these arguments. What it printed.
    pub fn ofctl(&self, arguments: &[&str]) -> Result<String> {
        let mut command = Command::new("ovs-ofctl");
        command.arg("--protocols=OpenFlow15");
        self.tool(&mut command, arguments)
    }

    fn tool(&self, command: &mut Command, arguments: &[&str]) -> Result<String> {
        run(command.arg(format!("--timeout={}", DEADLINE.as_secs())).args(arguments).envs(self.environment()))
    }

    /// What `ovs-appctl` with these arguments, a command of `ovs-vswitchd` and what belongs to it, would print.
    pub fn appctl(&self, arguments: &[&str]) -> Result<String> {
        let mut connection = self.unixctl()?;
        connection.send(arguments)?;
        connection.reply()
    }

    /// Waits until every flow in the datapath is what the tables of this moment say. Learning changes tables, and the
    /// flows that were made before follow only in the background.
    ///
    /// # Errors
    /// If it takes longer than a generous deadline.
    pub fn revalidate(&self) -> Result<()> {
        // `revalidator/wait` returns when the pass over the flows that is under way has ended, or up to half a second
        // later the next: a change of the MAC table starts one at once. The first may have begun before.
        for change in [&["fdb/add", BRIDGE, BRIDGE, "0", NOBODY][..], &["fdb/del", BRIDGE, "0", NOBODY]] {
            let mut waiting = self.unixctl()?;
            waiting.send(&["revalidator/wait"])?;
            self.appctl(change)?;
            // The answer goes out when the main loop comes round, which nothing but we makes it do.
            wait_for_reply(&mut waiting, || self.appctl(&["version"]).map(drop))?;
        }
        Ok(())
    }

    fn environment(&self) -> [(&'static str, &Path); 4] {
        ["OVS_RUNDIR", "OVS_LOGDIR", "OVS_DBDIR", "OVS_SYSCONFDIR"].map(|name| (name, self.dir.as_path()))
    }

    fn spawn(&self, name: &str, arguments: &[&str]) -> Result<Process> {
        let log = self.dir.join(format!("{}.log", base_name(name)));
        let net = format!("--net={}", self.namespace.path().display());
        let configure = |command: &mut Command| {
            command.arg(net).arg("--").arg(name).args(arguments).args([
                "--pidfile",
                "-vsyslog:off",
                "-vconsole:info",
            ]);
            command.envs(self.environment()).current_dir(&self.dir);
        };
        Process::spawn(name, Path::new("nsenter"), configure, &log)
    }

    fn unixctl(&self) -> Result<Unixctl> {
        Unixctl::connect(&self.dir.join(format!("{}.{}.ctl", base_name(self.program), self.pid()?)))
    }
}

/// A program's name without its directory, by which it names its files.
fn base_name(program: &str) -> &str {
    program.rsplit('/').next().unwrap_or(program)
}

/// Calls `poke` until the answer is there, and reads it.
fn wait_for_reply(connection: &mut Unixctl, mut poke: impl FnMut() -> Result<()>) -> Result<String> {
    let start = std::time::Instant::now();
    connection.0.set_nonblocking(true)?;
    let mut answer = Vec::new();
    loop {
        let mut buffer = [0; 4096];
        match connection.0.read(&mut buffer) {
            Ok(0) => bail!("ovs-vswitchd hung up"),
            Ok(len) => answer.extend_from_slice(&buffer[..len]),
            Err(error) if error.kind() == ErrorKind::WouldBlock => {}
            Err(error) => return Err(error.into()),
        }
        if let Ok(reply) = serde_json::from_slice(&answer) {
            return result(reply);
        }
        ensure!(start.elapsed() < DEADLINE, "ovs-vswitchd did not answer within {DEADLINE:?}");
        poke()?;
    }
}

/// A connection to a daemon of OVS: JSON-RPC, one request at a time (lib/unixctl.c).
#[derive(Debug)]
struct Unixctl(UnixStream);

impl Unixctl {
    fn connect(path: &Path) -> Result<Self> {
        let stream = UnixStream::connect(path).with_context(|| path.display().to_string())?;
        stream.set_read_timeout(Some(DEADLINE))?;
        Ok(Self(stream))
    }

    /// Sends a command with its arguments.
    fn send(&mut self, words: &[&str]) -> Result<()> {
        let (method, params) = words.split_first().context("no command")?;
        let request = json!({ "id": 0, "method": method, "params": params });
        Ok(self.0.write_all(request.to_string().as_bytes())?)
    }

    /// The answer to the last request.
    fn reply(&mut self) -> Result<String> {
        let mut replies = serde_json::Deserializer::from_reader(&self.0).into_iter::<Value>();
        result(replies.next().context("ovs-vswitchd hung up")??)
    }
}

fn result(reply: Value) -> Result<String> {
    match (&reply["result"], &reply["error"]) {
        (Value::String(text), _) => Ok(text.clone()),
        (_, Value::String(error)) => bail!("ovs-vswitchd: {}", error.trim_end()),
        _ => bail!("ovs-vswitchd answered {reply}"),
    }
}

fn run(command: &mut Command) -> Result<String> {
    let name = command.get_program().to_string_lossy().into_owned();
    let output = command.stdin(Stdio::null()).output().with_context(|| name.clone())?;
    let said = String::from_utf8_lossy(&output.stderr);
    ensure!(output.status.success(), "{name} ended with {}: {}", output.status, said.trim_end());
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::tap::Tap;

    /// The first frame that comes out of `tap`.
    fn received(tap: &mut Tap) -> Result<Vec<u8>> {
        wait_for("a frame", DEADLINE, || tap.receive())
    }

    #[test]
    fn two_run_side_by_side_and_forward_after_every_kind_of_end() {
        let dirs = [WorkDir::new().unwrap(), WorkDir::new().unwrap()];
        let mut both: Vec<Ovs> = dirs.iter().map(|dir| Ovs::start(dir).unwrap()).collect();
        for ovs in &mut both {
            let mut taps = ["p1", "p2"].map(|name| Tap::new(ovs.namespace(), name).unwrap());
            for name in ["p1", "p2"] {
                ovs.vsctl(&["add-port", BRIDGE, name]).unwrap();
            }
            let frame = [&[2u8, 0, 0, 0, 0, 2, 2, 0, 0, 0, 0, 1, 0x12, 0x34][..], &[7; 46]].concat();
            let mut forwards = |ovs: &Ovs| {
                ovs.ofctl(&["add-flow", BRIDGE, "in_port=p1,actions=output:p2"]).unwrap();
                taps[0].send(&frame).unwrap();
                assert_eq!(received(&mut taps[1]).unwrap(), frame);
            };
            forwards(ovs);
            ovs.restart().unwrap();
            forwards(ovs);
            ovs.kill_vswitchd().unwrap();
            ovs.start_vswitchd().unwrap();
            forwards(ovs);
            ovs.kill_server().unwrap();
            ovs.start_server().unwrap();
            forwards(ovs);
            assert!(ovs.appctl(&["dpctl/dump-flows", "--names"]).unwrap().contains("in_port(p1)"));
            assert!(ovs.appctl(&["no/such-command"]).is_err());
            assert!(ovs.vsctl(&["no-such-command"]).is_err());
        }
        both[0].stop().unwrap();
        assert!(both[0].appctl(&["version"]).is_err() && both[1].appctl(&["version"]).is_ok());
    }

    #[test]
    fn revalidation_follows_what_was_learnt() {
        let dir = WorkDir::new().unwrap();
        let ovs = Ovs::start(&dir).unwrap();
        let mut taps = ["p1", "p2", "p3"].map(|name| {
            let tap = Tap::new(ovs.namespace(), name).unwrap();
            ovs.vsctl(&["add-port", BRIDGE, name]).unwrap();
            tap
        });
        ovs.ofctl(&["add-flow", BRIDGE, "actions=NORMAL"]).unwrap();
        let frame =
            |from: u8, to: u8| [&[2, 0, 0, 0, 0, to, 2, 0, 0, 0, 0, from, 0x12, 0x34][..], &[0; 46]].concat();
        for round in 0..5 {
            ovs.appctl(&["fdb/flush", BRIDGE]).unwrap();
            // A packet that matches a flow teaches nothing until the flow's statistics are looked at.
            ovs.appctl(&["revalidator/purge"]).unwrap();
            taps[0].send(&frame(1, 2)).unwrap();
            assert_eq!(received(&mut taps[1]).unwrap(), frame(1, 2));
            assert_eq!(received(&mut taps[2]).unwrap(), frame(1, 2), "flooded, in round {round}");
            taps[1].send(&frame(2, 1)).unwrap();
            assert_eq!(received(&mut taps[0]).unwrap(), frame(2, 1));
            ovs.revalidate().unwrap();
            let flows = ovs.appctl(&["dpctl/dump-flows", "--names"]).unwrap();
            let to_two =
                flows.lines().find(|line| line.contains("dst=02:00:00:00:00:02")).unwrap_or_default();
            assert!(to_two.ends_with("actions:p2"), "in round {round}: {flows}");
        }
    }
}
