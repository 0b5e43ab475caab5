//! What is wrong is refused in one line that says what and where, and changes nothing.

use std::fs;
use std::os::unix::net::UnixListener;
use std::path::Path;
use std::process::{Command, Stdio};

use anyhow::{Context, Result, ensure};
use qemu_tests::daemon::{Daemon, DaemonConfig, PortConfig, binary, refusal};
use qemu_tests::host::WorkDir;
use qemu_tests::net::Net;

use crate::{flows, says, settings, text};

/// What a daemon says that does not start with the configuration in `file`.
fn refused_start(file: &Path) -> Result<String> {
    let mut command = Command::new("timeout");
    command.arg("20").arg(binary("pointworkd")?).args(["--log", "error", "--config"]).arg(file);
    let output = command.stdin(Stdio::null()).output()?;
    refusal(&format!("pointworkd with {}", fs::read_to_string(file).unwrap_or_default()), &output)
}

/// The same for a configuration that is given.
fn refused_config(config: &DaemonConfig, dir: &WorkDir) -> Result<String> {
    let file = dir.path("refused.toml");
    fs::write(&file, config.to_toml(dir))?;
    refused_start(&file)
}

#[test]
fn a_configuration_that_is_wrong_is_refused_with_file_and_line() -> Result<()> {
    let dir = WorkDir::new()?;
    let file = dir.path("pointwork.toml");
    let good =
        DaemonConfig::new([PortConfig::server("p1", &dir), PortConfig::server("p2", &dir)]).to_toml(&dir);
    let (p1, p2) = ("name = \"p1\"", "name = \"p2\"");
    // What is replaced by what, where the fault is then, and what is to be said about it.
    let cases: &[(&str, &str, &str, &[&str])] = &[
        ("l1_entries = 65536", "l1_entry = 65536", "l1_entry =", &["l1_entry", "unknown"]),
        ("cpus = []", "cpus = \"all\"", "cpus =", &["string \"all\"", "sequence"]),
        (p2, "name = \"p2\"\nqueue = 2", "queue = 2", &["queue", "unknown"]),
        (p2, "name = \"p2\"\nmtu = \"big\"", "mtu =", &["string \"big\"", "number"]),
        (p2, p1, "", &["port 'p1'", "there is a port of this name already"]),
        (p2, "name = \"a-very-long-name\"", "a-very-long-name", &["a-very-long-name", "15"]),
        (p2, "name = \"\"", "name = \"\"", &["name"]),
        (p2, "name = \"p 2\"", "name = \"p 2\"", &["p 2"]),
        ("mode = \"server\"", "mode = \"listen\"", "mode = \"listen\"", &["listen", "server", "client"]),
        (p2, "name = \"p2\"\nvlan = 4095", "vlan = 4095", &["p2", "4095"]),
        (p2, "name = \"p2\"\nvlan = 1\ntrunks = [2]", "trunks =", &["p2", "exclude each other"]),
        ("p2.sock", "p1.sock", "", &["port 'p2'", "p1.sock", "port 'p1'"]),
        ("p2.sock", "control.sock", "", &["port 'p2'", "control socket"]),
        ("kind = \"bridge\"", "kind = \"switch\"", "kind =", &["switch", "bridge", "ovs"]),
        ("kind = \"bridge\"", "kind = \"ovs\"", "[host]", &["ovs", "bridge"]),
        ("kind = \"bridge\"", "kind = \"bridge\"\ndb = \"x\"", "db =", &["db", "ovs"]),
        ("[datapath]", "[datapath", "[datapath", &[]),
    ];
    for (from, to, place, parts) in cases {
        // The last of its kind, so that the place is not the file's first line by chance.
        let at = good.rfind(from).with_context(|| format!("{from} is not in {good}"))?;
        let bad = format!("{}{to}{}", &good[..at], &good[at + from.len()..]);
        fs::write(&file, &bad)?;
        let line = refused_start(&file)?;
        let found = match *place {
            "" => bad[at..].find(to).map(|offset| at + offset),
            place => bad.rfind(place),
        };
        let number = bad[..found.unwrap_or(0)].lines().count().max(1);
        // `lines` does not count a line that has just begun.
        let number = if bad[..found.unwrap_or(0)].ends_with('\n') { number + 1 } else { number };
        let prefix = format!("pointworkd: {}:{number}: ", file.display());
        ensure!(line.starts_with(&prefix), "{to}: '{line}' does not start with '{prefix}'");
        says(&line, parts)?;
    }
    let zero = PortConfig::server("p1", &dir).queues(0);
    says(&refused_config(&DaemonConfig::new([zero]), &dir)?, &["refused.toml:", "port 'p1'", "queues = 0"])?;

    fs::write(&file, good.replace("kind = \"bridge\"", "kind = \"ovs\"\nbridge = \"br0\"\ndb = \"ssl:x\""))?;
    says(&refused_start(&file)?, &[":", "db", "ssl"])?;
    let missing = dir.path("missing.toml");
    says(&refused_start(&missing)?, &[&text(&missing), "cannot be read"])?;
    fs::write(&file, b"name = \"\xff\"")?;
    says(&refused_start(&file)?, &[&text(&file)])?;
    ensure!(!dir.path("state.json").exists(), "a daemon that did not start has left a state");
    Ok(())
}

#[test]
fn what_another_daemon_has_is_not_taken() -> Result<()> {
    let mut net = Net::plain(2)?;
    net.greet()?;
    net.daemon.ctl(&["add-flow", "in_port(p1),eth_type(0x0806)", "p2"])?;
    // What the bridge has learned is forgotten meanwhile: to find the state taken takes a refused daemon 5 seconds.
    let before = flows(&net.daemon, "explicit")?;
    let dir = WorkDir::new()?;
    let mut own = DaemonConfig::new([PortConfig::server("q1", &dir)]);

    // Its port's socket, at start and at run time.
    let mut thief = own.clone();
    thief
        .ports
        .push(PortConfig { socket: net.config.ports[0].socket.clone(), ..PortConfig::server("q2", &dir) });
    let taken = text(&net.config.ports[0].socket);
    says(&refused_config(&thief, &dir)?, &["port 'q2'", &taken, "another process listens there"])?;
    // The first port of the refused daemon has left nothing, nor has the daemon.
    ensure!(!own.ports[0].socket.exists() && !dir.path("control.sock").exists());
    let mut second = Daemon::start(&own, &dir)?;
    let line = second.refusal(&["add-port", "q2", "--socket", &taken])?;
    says(&line, &["port 'q2'", &taken, "another process listens there"])?;
    // Its control socket.
    let line = refused_config(&own, &dir)?;
    says(&line, &[&text(&dir.path("state.json")), "another pointworkd keeps its state there"])?;
    let elsewhere =
        DaemonConfig { state: Some(dir.path("elsewhere.json")), ports: Vec::new(), ..own.clone() };
    let line = refused_config(&elsewhere, &dir)?;
    says(&line, &[&text(second.control()), "another process listens there"])?;
    // Its state.
    let third = WorkDir::new()?;
    own.state = Some(dir.path("state.json"));
    own.ports.clear();
    says(&refused_config(&own, &third)?, &[&text(&dir.path("state.json")), "another pointworkd"])?;

    // Both go on.
    ensure!(second.show()?.len() == 1, "{:?}", second.show()?);
    second.terminate()?;
    let after = flows(&net.daemon, "explicit")?;
    ensure!(after == before && before.len() == 1, "{before:?} has become {after:?}");
    ensure!(net.daemon.show()?.len() == 2, "{:?}", net.daemon.show()?);
    let packet = net.packet(0, 1).udp(1, 2).payload_len(30);
    net.reaches(0, &packet, &[1])?;
    net.guests[1].frontend.disconnect()?;
    net.guests[1].frontend.resume()?;
    net.reaches(0, &packet, &[1])?;
    Ok(())
}

#[test]
fn a_stale_socket_is_replaced_and_nothing_else() -> Result<()> {
    let dir = WorkDir::new()?;
    let port = PortConfig::server("p1", &dir);
    fs::write(&port.socket, "precious")?;
    let config = DaemonConfig::new([port.clone()]);
    says(&refused_config(&config, &dir)?, &["port 'p1'", &text(&port.socket), "not a socket"])?;
    ensure!(fs::read(&port.socket)? == b"precious");
    fs::remove_file(&port.socket)?;

    // Nobody listens any more, as after a SIGKILL.
    for path in [&port.socket, &dir.path("control.sock"), &dir.path("p2.sock")] {
        drop(UnixListener::bind(path)?);
        ensure!(path.exists());
    }
    let mut net = Net::start(dir, config, |_, builder| builder)?;
    let p2 = PortConfig::server("p2", &net.dir);
    net.daemon.ctl(&["add-port", "p2", "--socket", &text(&p2.socket)])?;
    net.join(&p2)?;
    net.greet()
}

#[test]
fn a_socket_that_cannot_be_made_is_refused_with_its_port() -> Result<()> {
    let dir = WorkDir::new()?;
    fs::write(dir.path("file"), "")?;
    let net = Net::plain(1)?;
    let before = settings(&net.daemon)?;
    // No such directory; a file in its place; where nobody makes sockets, root neither.
    for socket in [dir.path("missing/q1.sock"), dir.path("file/q1.sock"), "/proc/q1.sock".into()] {
        let port = PortConfig { socket: socket.clone(), ..PortConfig::server("q1", &dir) };
        says(&refused_config(&DaemonConfig::new([port]), &dir)?, &["port 'q1'", &text(&socket)])?;
        let line = net.daemon.refusal(&["add-port", "q1", "--socket", &text(&socket)])?;
        says(&line, &["port 'q1'", &text(&socket)])?;
    }
    ensure!(settings(&net.daemon)? == before);
    Ok(())
}

#[test]
fn a_damaged_state_names_the_way_out() -> Result<()> {
    let dir = WorkDir::new()?;
    let config = DaemonConfig::new([PortConfig::server("p1", &dir)]);
    let mut daemon = Daemon::start(&config, &dir)?;
    daemon.ctl(&["add-flow", "in_port(p1)", "drop"])?;
    daemon.terminate()?;
    let state = dir.path("state.json");
    let whole = fs::read_to_string(&state)?;
    let later = whole.replace("\"version\": 3", "\"version\": 7");
    for bad in ["", "{", "[]", "{\"version\": 1}", "\0\0\0", &whole[..whole.len() / 2], &later] {
        fs::write(&state, bad)?;
        let line = refused_config(&config, &dir)?;
        says(&line, &[&text(&state)])?;
        ensure!(fs::read_to_string(&state)? == bad, "the damaged file was touched");
        if bad == later {
            says(&line, &["layout 7", &format!("mv {0} {0}.later", state.display())])?;
        } else {
            says(&line, &["damaged", &format!("mv {0} {0}.damaged", state.display())])?;
        }
    }
    fs::write(&state, "{")?;
    let line = refused_config(&config, &dir)?;
    let (_, command) = line.split_once("after: ").context("no command")?;
    ensure!(Command::new("sh").args(["-c", command]).status()?.success(), "{command}");
    let daemon = Daemon::start(&config, &dir)?;
    ensure!(daemon.show()?.len() == 1 && daemon.flows()? == 0);
    ensure!(dir.path("state.json.damaged").exists());
    Ok(())
}

#[test]
fn commands_that_are_wrong_change_nothing() -> Result<()> {
    let net = Net::plain(2)?;
    let tcp = "in_port(p1),eth_type(0x0800),ipv4(proto=6),tcp(dst=80)";
    net.daemon.ctl(&["add-flow", tcp, "p2"])?;
    let before = settings(&net.daemon)?;
    let kept = fs::read(net.dir.path("state.json"))?;
    let free = text(&net.dir.path("p3.sock"));
    let (used, control) = (text(&net.config.ports[1].socket), text(net.daemon.control()));
    let add_port = |name, socket| vec!["add-port", name, "--socket", socket];
    let cases: Vec<(Vec<&str>, &[&str])> = vec![
        (add_port("p1", &free), &["port 'p1'", "there is a port of this name already"]),
        (add_port("a-very-long-name", &free), &["a-very-long-name", "15"]),
        (add_port("p/3", &free), &["p/3"]),
        (add_port("p3", &used), &["port 'p3'", "p2.sock", "'p2'"]),
        (add_port("p3", &control), &["port 'p3'", "control socket"]),
        ([&add_port("p3", &free)[..], &["--queues", "0"]].concat(), &["port 'p3'", "queues = 0"]),
        ([&add_port("p3", &free)[..], &["--queues", "9"]].concat(), &["port 'p3'", "queues = 9"]),
        ([&add_port("p3", &free)[..], &["--vlan", "0"]].concat(), &["port 'p3'", "VLAN 0"]),
        ([&add_port("p3", &free)[..], &["--mode", "tap"]].concat(), &["tap", "server", "client"]),
        ([&add_port("p3", &free)[..], &["--socket-group", "no-such-group"]].concat(), &["no-such-group"]),
        (vec!["add-port", "p3"], &["--socket"]),
        (vec!["del-port", "p9"], &["port 'p9'"]),
        (vec!["add-flow", "in_port(p1),eth_type(0x800", "drop"], &["flow: ", "at character "]),
        (
            vec!["add-flow", "in_port(p1),eth_typo(0x800)", "drop"],
            &["eth_typo", "character 13: in_port(p1), -->"],
        ),
        (
            vec!["add-flow", "in_port(p2)", "p1,frobnicate(3)"],
            &["actions: ", "character 4: p1, --> frobnicate"],
        ),
        (vec!["add-flow", "", "drop"], &["flow: "]),
        (vec!["add-flow", "eth_type(0x0800)", "drop"], &["flow: ", "in_port"]),
        (vec!["add-flow", "in_port(p9),eth_type(0x0800)", "drop"], &["p9", "character 9"]),
        (vec!["add-flow", "in_port(p1),tcp(dst=80)", "drop"], &["tcp", "character "]),
        (vec!["add-flow", tcp, "drop"], &["overlaps itself", "tcp(dst=80)", "actions p2"]),
        (
            vec!["add-flow", "in_port(p1),eth_type(0x0800),ipv4(proto=6),tcp(src=5)", "drop"],
            &["overlaps", "in_port(p1)", "tcp(dst=80)"],
        ),
        (
            vec!["del-flow", "in_port(p1),eth_type(0x0806)"],
            &["there is no explicit flow", "eth_type(0x0806)"],
        ),
        (vec!["del-flow", "in_port(p1"], &["flow: ", "character "]),
        (vec!["del-flow", "77.1"], &["77.1"]),
        (vec!["del-flow"], &["FLOW"]),
        (vec!["stats", "p9"], &["p9"]),
        (vec!["dump-flows", "p9"], &["p9"]),
        (vec!["trace", "p9", "eth()"], &["p9"]),
        (vec!["trace", "p1", "eth(src="], &["packet: ", "character "]),
        (vec!["trace", "p1", "123"], &["packet: ", "3 hex digits"]),
        (vec!["sync", "--timeout", "4000"], &["4000", "3600"]),
        (vec!["frobnicate"], &["frobnicate"]),
    ];
    for (words, parts) in &cases {
        let line = net.daemon.refusal(words)?;
        ensure!(line.starts_with("pointwork: "), "{words:?}: {line}");
        says(&line, parts).with_context(|| format!("{words:?}"))?;
    }
    ensure!(settings(&net.daemon)? == before, "{before:#} has become {:#}", settings(&net.daemon)?);
    ensure!(fs::read(net.dir.path("state.json"))? == kept, "the state file has changed");
    ensure!(!net.dir.path("p3.sock").exists());
    Ok(())
}
