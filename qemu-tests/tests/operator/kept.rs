//! What is changed at run time outlives the daemon, however it ends.

use anyhow::{Result, ensure};
use qemu_tests::daemon::{DaemonConfig, PortConfig};
use qemu_tests::frontend::packet::Packet;
use qemu_tests::host::WorkDir;
use qemu_tests::net::Net;

use crate::{flows, says, settings, terminate, text, warnings};

/// To nobody's address, so that only explicit flows know where it goes.
fn addressed(net: &Net, from: usize, dst: [u8; 4]) -> Packet {
    let guest = &net.guests[from];
    Packet::eth(guest.mac, [2, 0, 0, 0, 9, 9]).ipv4(guest.ip, dst).udp(1, 2).payload_len(40)
}

#[test]
fn ports_and_flows_come_back_after_sigkill_and_sigterm() -> Result<()> {
    let mut net = Net::plain(3)?;
    let p4 = PortConfig::server("p4", &net.dir).queues(2);
    net.daemon.ctl(&["add-port", "p4", "--socket", &text(&p4.socket), "--queues", "2", "--mtu", "9000"])?;
    let fourth = net.join(&p4)?;
    net.greet()?;
    let gone = net.guests.remove(2);
    net.daemon.ctl(&["del-port", "p3"])?;
    ensure!(
        gone.frontend.wait_disconnected(qemu_tests::net::SOON),
        "the guest of a deleted port stays connected"
    );
    let fourth = fourth - 1;

    let [one, two, three] =
        [1, 2, 3].map(|host| format!("in_port(p1),eth_type(0x0800),ipv4(dst=10.9.0.{host})"));
    net.daemon.ctl(&["add-flow", &one, "p4"])?;
    net.daemon.ctl(&["add-flow", &two, "drop"])?;
    net.daemon.ctl(&["add-flow", &three, "p2"])?;
    net.daemon.ctl(&["del-flow", &three])?;
    let before = settings(&net.daemon)?;
    ensure!(flows(&net.daemon, "explicit")?.iter().all(|[.., handling]| handling == "fast"), "{before:#}");

    for end in ["kill", "terminate", "kill"] {
        let check = |net: &mut Net| -> Result<()> {
            let packet = addressed(net, 0, [10, 9, 0, 1]);
            net.reaches(0, &packet, &[fourth])?;
            let packet = addressed(net, 0, [10, 9, 0, 2]);
            net.reaches(0, &packet, &[])?;
            // Without the deleted flow, it is the bridge's, which does not know the address.
            let packet = addressed(net, 0, [10, 9, 0, 3]);
            net.reaches(0, &packet, &[1, fourth])?;
            net.greet()?;
            let packet = net.packet(1, fourth).udp(1, 2).payload_len(2000);
            net.reaches(1, &packet, &[fourth])?;
            net.daemon.balanced_stats()?;
            Ok(())
        };
        check(&mut net)?;
        match end {
            "kill" => net.daemon.kill()?,
            _ => terminate(&mut net)?,
        }
        net.restart()?;
        check(&mut net)?;
        let after = settings(&net.daemon)?;
        for port in ["/show/ports/0", "/show/ports/1", "/show/ports/2"] {
            let of = |settings: &serde_json::Value| {
                let port = settings.pointer(port).cloned().unwrap_or_default();
                ["name", "socket", "mode", "queues", "mtu", "vlan"].map(|key| port[key].clone())
            };
            ensure!(of(&before) == of(&after), "after {end}: {after:#}");
        }
        ensure!(after["show"]["ports"].as_array().map(Vec::len) == Some(3), "{after:#}");
        ensure!(before["flows"] == after["flows"], "after {end}: {after:#}");
        says(
            &warnings(&net.daemon)?,
            &["port 'p3': is in the configuration file but was deleted at run time"],
        )?;
    }

    // A configured port that is added as it was configured is no change any more.
    let p3 = net.config.ports[2].clone();
    net.daemon.ctl(&["add-port", "p3", "--socket", &text(&p3.socket)])?;
    net.daemon.ctl(&["del-port", "p4"])?;
    net.daemon.ctl(&["del-flow", "--all"])?;
    net.guests.truncate(2);
    net.daemon.kill()?;
    net.restart()?;
    net.join(&p3)?;
    net.greet()?;
    ensure!(warnings(&net.daemon)?.is_empty(), "{}", warnings(&net.daemon)?);
    let names: Vec<String> = net.daemon.show()?.into_iter().map(|port| port.name).collect();
    ensure!(names == ["p1", "p2", "p3"], "{names:?}");
    ensure!(flows(&net.daemon, "explicit")?.is_empty());
    Ok(())
}

#[test]
fn flows_wait_for_their_port() -> Result<()> {
    let mut net = Net::plain(3)?;
    net.greet()?;
    let from = "in_port(p3),eth_type(0x0800),ipv4(dst=10.9.0.1)";
    let to = "in_port(p1),eth_type(0x0800),ipv4(dst=10.9.0.1)";
    let doomed = "in_port(p3),eth_type(0x0806)";
    net.daemon.ctl(&["add-flow", from, "p2"])?;
    net.daemon.ctl(&["add-flow", to, "p3"])?;
    net.daemon.ctl(&["add-flow", doomed, "drop"])?;
    let before = flows(&net.daemon, "explicit")?;
    let working = |net: &mut Net| -> Result<()> {
        let packet = addressed(net, 2, [10, 9, 0, 1]);
        net.reaches(2, &packet, &[1])?;
        let packet = addressed(net, 0, [10, 9, 0, 1]);
        net.reaches(0, &packet, &[2])?;
        Ok(())
    };
    working(&mut net)?;

    let p3 = net.config.ports[2].clone();
    let waiting = |net: &Net| -> Result<()> {
        let now = flows(&net.daemon, "explicit")?;
        for [flow, actions, handling] in &before {
            let same = now.iter().find(|other| other[0] == *flow);
            let Some([_, now_actions, now_handling]) = same else {
                // The one that was deleted while it waited.
                ensure!(flow.contains("0x0806"), "{flow} is lost: {now:#?}");
                continue;
            };
            ensure!(actions == now_actions && handling == "fast", "{now:#?}");
            if flow.contains("in_port(p3)") {
                says(now_handling, &["waits: ", "p3"])?;
                says(&warnings(&net.daemon)?, &[flow, "waits: "])?;
            } else {
                says(now_handling, &["punt: ", "p3"])?;
            }
        }
        Ok(())
    };
    net.daemon.ctl(&["del-port", "p3"])?;
    waiting(&net)?;
    // A flow that waits is deleted as it is shown.
    let shown = before.iter().map(|[flow, ..]| flow).find(|flow| flow.contains("0x0806")).cloned();
    net.daemon.ctl(&["del-flow", &shown.unwrap_or_default()])?;
    net.guests.truncate(2);
    net.daemon.kill()?;
    net.restart()?;
    ensure!(flows(&net.daemon, "explicit")?.len() == 2);
    waiting(&net)?;
    // What goes to a port that is gone is the bridge's, as are packets that no flow knows.
    let packet = addressed(&net, 0, [10, 9, 0, 1]);
    net.reaches(0, &packet, &[1])?;

    net.daemon.ctl(&["add-port", "p3", "--socket", &text(&p3.socket)])?;
    net.join(&p3)?;
    net.greet()?;
    working(&mut net)?;
    let now = flows(&net.daemon, "explicit")?;
    ensure!(now.len() == 2 && now.iter().all(|flow| before.contains(flow)), "{now:#?}");
    ensure!(warnings(&net.daemon)?.is_empty(), "{}", warnings(&net.daemon)?);
    net.daemon.balanced_stats()?;
    Ok(())
}

#[test]
fn the_configuration_counts_where_both_name_a_port() -> Result<()> {
    let mut net = Net::plain(1)?;
    let other = net.dir.path("other.sock");
    net.daemon.ctl(&["add-port", "p2", "--socket", &text(&other), "--queues", "4"])?;
    net.guests.clear();
    net.daemon.kill()?;
    net.config.ports.push(PortConfig::server("p2", &net.dir));
    net.restart()?;
    let show = net.daemon.show()?;
    ensure!(
        show.iter().any(|port| port.name == "p2" && port.queues == 1 && port.socket != other),
        "{show:?}"
    );
    says(&warnings(&net.daemon)?, &["port 'p2'", "the configuration file counts"])
}

#[test]
fn a_state_that_cannot_be_written_is_a_warning_and_refuses_changes() -> Result<()> {
    let dir = WorkDir::new()?;
    // Nobody makes files there, root neither.
    let config = DaemonConfig {
        state: Some("/proc/pointwork/state.json".into()),
        ..DaemonConfig::new([PortConfig::server("p1", &dir)])
    };
    let net = Net::start(dir, config, |_, builder| builder)?;
    says(&warnings(&net.daemon)?, &["state.json", "changes at run time are refused"])?;
    let before = settings(&net.daemon)?;
    let socket = text(&net.dir.path("p2.sock"));
    for change in [
        &["add-port", "p2", "--socket", &socket][..],
        &["del-port", "p1"],
        &["add-flow", "in_port(p1)", "drop"],
    ] {
        says(&net.daemon.refusal(change)?, &["state.json", "cannot be saved"])?;
    }
    // The port that was not added is closed by the time of the next turn of the event loop.
    qemu_tests::host::wait_for("nothing to have changed", qemu_tests::net::SOON, || {
        let same = settings(&net.daemon)? == before && !net.dir.path("p2.sock").exists();
        Ok(same.then_some(()))
    })
}
