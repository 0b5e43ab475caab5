//! Ports come from the database, whoever puts them there.

use std::path::PathBuf;

use anyhow::{Context, Result, ensure};
use qemu_tests::daemon::{Daemon, DaemonConfig, PortConfig};
use qemu_tests::frontend::{Frontend, RegionSpec};
use qemu_tests::host::{WorkDir, wait_for};
use qemu_tests::net::SOON;
use qemu_tests::ovs::{BRIDGE, Ovs};
use serde_json::Value;

use crate::{inside, text, wait_in_bridge, wait_warning, warnings};

/// A daemon without ports of its own.
struct Empty {
    daemon: Daemon,
    ovs: Ovs,
    config: DaemonConfig,
    dir: WorkDir,
}

impl Empty {
    fn start() -> Result<Empty> {
        Empty::start_with(|_| ())
    }

    fn start_with(change: impl FnOnce(&mut DaemonConfig)) -> Result<Empty> {
        let dir = WorkDir::new()?;
        let ovs = Ovs::start(&dir)?;
        let mut config = DaemonConfig::under(&ovs, []);
        change(&mut config);
        let daemon = Daemon::start(&config, &dir)?;
        Ok(Empty { daemon, ovs, config, dir })
    }

    /// `ovs-vsctl add-port` with these columns of its interface besides the socket, which is returned.
    fn add(&self, name: &str, columns: &[&str]) -> Result<PathBuf> {
        let socket = self.dir.path(&format!("{name}.sock"));
        let ours = format!("external_ids:pointwork-socket={}", text(&socket));
        let command = [&["add-port", BRIDGE, name, "--", "set", "interface", name, &ours][..], columns];
        self.ovs.vsctl(&command.concat())?;
        Ok(socket)
    }

    /// What `show` says of a port.
    fn port(&self, name: &str) -> Result<Option<Value>> {
        let show = self.daemon.ctl(&["show"])?;
        let ports = show["ports"].as_array().cloned().unwrap_or_default();
        Ok(ports.into_iter().find(|port| port["name"] == name))
    }

    fn wait_port(&self, name: &str) -> Result<Value> {
        wait_for(&format!("port {name}"), SOON, || self.port(name))
    }

    fn wait_no_port(&self, name: &str) -> Result<()> {
        wait_for(&format!("port {name} to go"), SOON, || Ok(self.port(name)?.is_none().then_some(())))
    }

    fn has_device(&self, name: &str) -> Result<bool> {
        Ok(inside(&self.ovs, "ip", &["-o", "link"])?.contains(&format!(" {name}: ")))
    }

    fn finish(mut self) -> Result<()> {
        self.daemon.balanced_stats()?;
        self.daemon.terminate()
    }
}

fn guest(socket: &PathBuf) -> qemu_tests::frontend::Builder {
    Frontend::builder(socket).memory(&[RegionSpec::mib(0, 16)])
}

#[test]
fn a_port_is_what_the_database_says() -> Result<()> {
    let mut it = Empty::start()?;
    let socket = it.add("vm1", &[])?;
    it.wait_port("vm1")?;
    ensure!(socket.exists(), "no socket");
    wait_in_bridge(&it.ovs, "vm1", "down")?;
    // The link of the port is that of its guest.
    let mut frontend = guest(&socket).start()?;
    wait_in_bridge(&it.ovs, "vm1", "up")?;
    frontend.disconnect()?;
    wait_in_bridge(&it.ovs, "vm1", "down")?;

    // Other settings open it anew, without a new device.
    let index = |it: &Empty| -> Result<String> {
        let shown = inside(&it.ovs, "ip", &["-o", "link", "show", "vm1"])?;
        Ok(shown.split(':').next().unwrap_or_default().to_owned())
    };
    let before = index(&it)?;
    it.ovs.vsctl(&["set", "interface", "vm1", "external_ids:pointwork-queues=4"])?;
    wait_for("four queues", SOON, || Ok(it.port("vm1")?.filter(|port| port["queues"] == 4).map(drop)))?;
    ensure!(index(&it)? == before, "another device");
    let mut frontend = guest(&socket).queue_pairs(4).start()?;
    wait_in_bridge(&it.ovs, "vm1", "up")?;
    frontend.disconnect()?;
    // In client mode somebody else listens.
    it.ovs.vsctl(&["set", "interface", "vm1", "external_ids:pointwork-mode=client"])?;
    wait_for("client mode", SOON, || Ok(it.port("vm1")?.filter(|port| port["mode"] == "client").map(drop)))?;
    ensure!(!socket.exists(), "a socket in client mode");
    let mut frontend = guest(&socket).queue_pairs(4).listen().start()?;
    wait_in_bridge(&it.ovs, "vm1", "up")?;
    frontend.disconnect()?;

    let other = it.dir.path("other.sock");
    let setting = format!("external_ids:pointwork-socket={}", text(&other));
    let back = ["remove", "interface", "vm1", "external_ids", "pointwork-mode"];
    it.ovs.vsctl(&[&["set", "interface", "vm1", &setting, "--"][..], &back].concat())?;
    wait_for("the other socket", SOON, || Ok(other.exists().then_some(())))?;

    it.ovs.vsctl(&["del-port", "vm1"])?;
    it.wait_no_port("vm1")?;
    wait_for("socket and TAP to go", SOON, || Ok((!other.exists() && !it.has_device("vm1")?).then_some(())))?;
    // A TAP of OVS's own is none of ours, and nor is an interface without our settings.
    it.ovs.vsctl(&["add-port", BRIDGE, "int1", "--", "set", "interface", "int1", "type=internal"])?;
    it.daemon.ctl(&["sync"])?;
    ensure!(it.port("int1")?.is_none() && it.has_device("int1")?, "an internal port was touched");
    it.daemon.check()?;
    it.finish()
}

#[test]
fn workers_are_set_in_the_database_by_whoever_sets_them() -> Result<()> {
    let mut it = Empty::start_with(|config| config.cpus = vec![0, 1])?;
    it.add("vm1", &["external_ids:pointwork-queues=2", "external_ids:pointwork-workers=1,0"])?;
    it.wait_port("vm1")?;
    let polls = |it: &Empty, wanted: &[&str]| {
        wait_for(&format!("{wanted:?}"), SOON, || Ok((it.daemon.polls()? == wanted).then_some(())))
    };
    let key = |it: &Empty| {
        it.ovs.vsctl(&["--if-exists", "get", "interface", "vm1", "external_ids:pointwork-workers"])
    };
    polls(&it, &["vm1.0@1!", "vm1.1@0!"])?;
    // The port stays open: its guest keeps its link.
    let mut frontend = guest(&it.dir.path("vm1.sock")).queue_pairs(2).start()?;
    wait_in_bridge(&it.ovs, "vm1", "up")?;
    it.ovs.vsctl(&["set", "interface", "vm1", "external_ids:pointwork-workers=0"])?;
    polls(&it, &["vm1.0@0!", "vm1.1@0!"])?;
    it.daemon.ctl(&["set-port", "vm1", "--workers", "0,1"])?;
    ensure!(it.daemon.polls()? == ["vm1.0@0!", "vm1.1@1!"] && key(&it)?.contains("\"0,1\""), "{}", key(&it)?);
    it.daemon.ctl(&["set-port", "vm1", "--workers", "auto"])?;
    ensure!(key(&it)?.trim().is_empty(), "{}", key(&it)?);
    polls(&it, &["vm1.0@0", "vm1.1@1"])?;
    ensure!(it.daemon.refusal(&["set-port", "vm1", "--workers", "2"])?.contains("no worker 2"));
    // What is wrong in the database is said; the guest is served all the same.
    it.ovs.vsctl(&["set", "interface", "vm1", "external_ids:pointwork-workers=5"])?;
    wait_warning(&it.daemon, &["port 'vm1': workers: no worker 5, there are workers 0 to 1"])?;
    polls(&it, &["vm1.0@0", "vm1.1@1"])?;
    ensure!(it.port("vm1")?.is_some_and(|port| port["link"] == true), "its link went down");
    frontend.disconnect()?;
    // The next daemon finds it there.
    it.daemon.ctl(&["set-port", "vm1", "--workers", "1"])?;
    it.daemon.terminate()?;
    it.daemon = Daemon::start(&it.config, &it.dir)?;
    polls(&it, &["vm1.0@1!", "vm1.1@1!"])?;
    it.finish()
}

#[test]
fn a_bad_setting_is_a_warning_and_no_more() -> Result<()> {
    let it = Empty::start()?;
    let good = it.add("good", &[])?;
    it.wait_port("good")?;
    let mut frontend = guest(&good).start()?;
    wait_in_bridge(&it.ovs, "good", "up")?;
    let cases: [(&str, &[&str], &[&str]); 5] = [
        ("bad1", &["external_ids:pointwork-sokcet=x"], &["pointwork-sokcet", "no such setting"]),
        ("bad2", &["external_ids:pointwork-mode=passive"], &["pointwork-mode=passive", "server or client"]),
        ("bad3", &["external_ids:pointwork-queues=many"], &["pointwork-queues=many"]),
        ("bad4", &["external_ids:pointwork-socket=no/absolute/path"], &["bad4", "socket"]),
        ("bad5", &["type=internal"], &["type internal"]),
    ];
    for (name, columns, says) in cases {
        it.add(name, columns)?;
        // Whose port it is has to be said, too.
        wait_warning(&it.daemon, &[&[name][..], says].concat())?;
        ensure!(it.port(name)?.is_none(), "{name} was opened");
        let all = warnings(&it.daemon)?;
        ensure!(all.lines().filter(|line| line.contains(name)).count() == 1, "{all}");
    }
    // One whose only setting is misspelt is none of ours, which is said too.
    let lost = "set interface lost external_ids:pointwork-scoket=/tmp/never";
    let command =
        [&["--no-wait", "add-port", BRIDGE, "lost", "--"][..], &lost.split(' ').collect::<Vec<_>>()];
    it.ovs.vsctl(&command.concat())?;
    wait_warning(&it.daemon, &["'lost'", "pointwork-scoket", "no port of ours"])?;
    // Open vSwitch itself has no device of such a name.
    let slash = "set interface a/b external_ids:pointwork-socket=/tmp/never";
    let command =
        [&["--no-wait", "add-port", BRIDGE, "a/b", "--"][..], &slash.split(' ').collect::<Vec<_>>()];
    it.ovs.vsctl(&command.concat())?;
    wait_warning(&it.daemon, &["a/b"])?;
    // The socket of another port.
    let taken = format!("external_ids:pointwork-socket={}", text(&good));
    it.add("twin", &[&taken])?;
    wait_warning(&it.daemon, &["twin", "good"])?;
    ensure!(it.port("twin")?.is_none() && good.exists(), "two ports share a socket");

    // What is corrected works, and what is deleted is forgotten.
    it.ovs.vsctl(&["remove", "interface", "bad1", "external_ids", "pointwork-sokcet"])?;
    it.wait_port("bad1")?;
    for name in ["bad1", "bad2", "bad3", "bad4", "bad5", "lost", "a/b", "twin"] {
        it.ovs.vsctl(&["--no-wait", "del-port", name])?;
    }
    it.wait_no_port("bad1")?;
    wait_for("no warnings", SOON, || Ok(warnings(&it.daemon)?.is_empty().then_some(())))
        .with_context(|| warnings(&it.daemon).unwrap_or_default())?;
    ensure!(frontend.is_connected(), "the good port was harmed");
    wait_in_bridge(&it.ovs, "good", "up")?;
    frontend.disconnect()?;
    it.finish()
}

#[test]
fn the_commands_and_the_file_put_ports_into_the_database() -> Result<()> {
    let dir = WorkDir::new()?;
    let ovs = Ovs::start(&dir)?;
    let first = PortConfig::server("vm1", &dir).with("vlan = 7");
    let config = DaemonConfig::under(&ovs, [first.clone()]);
    let mut daemon = Daemon::start(&config, &dir)?;
    wait_in_bridge(&ovs, "vm1", "down")?;
    ensure!(ovs.vsctl(&["get", "port", "vm1", "tag"])?.trim() == "7");

    let second = dir.path("vm2.sock");
    let add = |name: &str, socket: &str, more: &[&'static str]| -> Vec<String> {
        let fixed = ["add-port", name, "--socket", socket].map(str::to_owned);
        fixed.into_iter().chain(more.iter().map(|&word| word.to_owned())).collect()
    };
    let run = |daemon: &Daemon, words: Vec<String>| {
        daemon.ctl(&words.iter().map(String::as_str).collect::<Vec<_>>())
    };
    run(&daemon, add("vm2", &text(&second), &["--trunks", "10,20", "--queues", "2"]))?;
    wait_in_bridge(&ovs, "vm2", "down")?;
    ensure!(ovs.vsctl(&["list-ports", BRIDGE])?.split_whitespace().eq(["vm1", "vm2"]));
    ensure!(ovs.vsctl(&["get", "port", "vm2", "trunks"])?.trim() == "[10, 20]");
    let ids = ovs.vsctl(&["get", "interface", "vm2", "external_ids"])?;
    ensure!(ids.contains("pointwork-queues=\"2\"") && ids.contains(&text(&second)), "{ids}");
    // Neither name nor socket may be used twice.
    let twin = add("vm3", &text(&second), &[]);
    let refused = daemon.refusal(&twin.iter().map(String::as_str).collect::<Vec<_>>())?;
    ensure!(refused.contains("vm2"), "{refused}");
    ensure!(!ovs.vsctl(&["list-ports", BRIDGE])?.contains("vm3"));

    daemon.ctl(&["del-port", "vm2"])?;
    ensure!(!second.exists() && !ovs.vsctl(&["list-ports", BRIDGE])?.contains("vm2"));
    // At once again, under the same name.
    run(&daemon, add("vm2", &text(&second), &[]))?;
    wait_in_bridge(&ovs, "vm2", "down")?;
    daemon.ctl(&["sync"])?;
    ensure!(second.exists(), "a port that was added again is gone");

    // A bridge that is made anew gets the ports of the configuration again, and those alone.
    let mut frontend = guest(&first.socket).start()?;
    wait_in_bridge(&ovs, "vm1", "up")?;
    ovs.vsctl(&["del-br", BRIDGE])?;
    wait_warning(&daemon, &["no bridge 'br0'", "add-br"])?;
    wait_for("vm2 to go", SOON, || Ok((!second.exists()).then_some(())))?;
    ensure!(frontend.is_connected(), "a port of the configuration was closed");
    ovs.vsctl(&["add-br", BRIDGE, "--", "set", "bridge", BRIDGE, "datapath_type=netdev"])?;
    wait_in_bridge(&ovs, "vm1", "up")?;
    ensure!(frontend.is_connected(), "a port of the configuration was closed");
    wait_for("no warnings", SOON, || Ok(warnings(&daemon)?.is_empty().then_some(())))
        .with_context(|| warnings(&daemon).unwrap_or_default())?;
    frontend.disconnect()?;

    // One that is in the database outlives the daemon, its TAP included.
    run(&daemon, add("vm4", &text(&dir.path("vm4.sock")), &[]))?;
    wait_in_bridge(&ovs, "vm4", "down")?;
    daemon.terminate()?;
    ensure!(inside(&ovs, "ip", &["-o", "link"])?.contains(" vm4: "), "the TAP has gone");
    daemon = Daemon::start(&config, &dir)?;
    wait_for("vm4's socket", SOON, || Ok(dir.path("vm4.sock").exists().then_some(())))?;
    daemon.ctl(&["del-port", "vm4"])?;
    daemon.ctl(&["del-port", "vm1"])?;
    ensure!(ovs.vsctl(&["list-ports", BRIDGE])?.is_empty());
    daemon.balanced_stats()?;
    daemon.terminate()
}
