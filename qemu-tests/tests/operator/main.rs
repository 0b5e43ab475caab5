//! A running daemon as an operator meets it: changes that are kept, input that is refused, ports and flows that come and
//! go under traffic, limits, and what the commands say.

mod commands;
mod kept;
mod limits;
mod refused;
mod running;
mod spread;
mod traffic;

use std::path::Path;

use anyhow::{Result, ensure};
use qemu_tests::daemon::Daemon;
use qemu_tests::net::SOON;
use serde_json::{Value, json};

/// What an operator can have changed: everything that `show` and `dump-flows` say but for times, counters and memory.
fn settings(daemon: &Daemon) -> Result<Value> {
    let mut show = daemon.ctl(&["show"])?;
    for (table, key) in [("", "uptime"), ("/workers/0", "asleep"), ("/workers/1", "asleep")] {
        if let Some(Value::Object(fields)) = show.pointer_mut(table) {
            fields.remove(key);
        }
    }
    for port in show["ports"].as_array_mut().into_iter().flatten().filter_map(Value::as_object_mut) {
        port.remove("memory");
    }
    Ok(json!({ "show": show, "flows": flows(daemon, "explicit")? }))
}

/// Match, actions and handling of each flow of a source, in order.
fn flows(daemon: &Daemon, source: &str) -> Result<Vec<[String; 3]>> {
    let dump = daemon.ctl(&["dump-flows", "--source", source])?;
    let list = dump["flows"].as_array().cloned().unwrap_or_default();
    let text = |flow: &Value, key: &str| flow[key].as_str().unwrap_or_default().to_owned();
    let mut flows: Vec<[String; 3]> =
        list.iter().map(|flow| ["flow", "actions", "handling"].map(|key| text(flow, key))).collect();
    flows.sort();
    Ok(flows)
}

/// The warnings of `show`, a line each.
fn warnings(daemon: &Daemon) -> Result<String> {
    let show = daemon.ctl(&["show"])?;
    let lines = show["warnings"].as_array().into_iter().flatten().filter_map(Value::as_str);
    Ok(lines.collect::<Vec<_>>().join("\n"))
}

/// A text must say all of this.
fn says(text: &str, parts: &[&str]) -> Result<()> {
    for part in parts {
        ensure!(text.contains(part), "'{text}' does not say '{part}'");
    }
    Ok(())
}

/// A path as an argument.
fn text(path: &Path) -> String {
    path.display().to_string()
}

/// Ends the daemon by SIGTERM, which it has to obey within a second, with status 0 and without leaving sockets behind.
fn terminate(net: &mut qemu_tests::net::Net) -> Result<()> {
    net.daemon.terminate()?;
    let sockets = net.config.ports.iter().filter(|port| !port.client).map(|port| port.socket.as_path());
    for socket in sockets.chain([net.daemon.control()]) {
        ensure!(!socket.exists(), "{} is left behind", socket.display());
    }
    for guest in &net.guests {
        ensure!(guest.frontend.wait_disconnected(SOON), "a connection outlives the daemon");
    }
    Ok(())
}
