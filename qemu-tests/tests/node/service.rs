//! The packaged service in a node with Open vSwitch.

use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use qemu_tests::host::wait_for;
use qemu_tests::service::Service;

use crate::bench::Bench;
use crate::wire::Wire;

/// Longer than systemd waits for a daemon that hangs, for its end, and for what comes after that, on a busy machine.
const WATCHDOG: Duration = Duration::from_secs(240);
/// What the unit lets the daemon have (linux/capability.h): CAP_CHOWN, CAP_DAC_OVERRIDE, CAP_NET_ADMIN; for wires
/// CAP_NET_RAW, CAP_PERFMON and CAP_BPF too.
const CAPABILITIES: u64 = 1 | 1 << 1 | 1 << 12;
const OF_WIRES: u64 = CAPABILITIES | 1 << 13 | 1 << 38 | 1 << 39;

/// The daemon does under its unit what it does without, is started again when it dies, and stops when it is told to.
pub fn unit(bench: &Bench) -> Result<String> {
    let node = &bench.node;
    bench.stop_pointworkd()?;
    let config = "/run/pointwork/service.toml";
    node.sh(&format!("sed '/^state/d' /run/pointwork/pointwork.toml >{config}"))?;
    let outcome = Service::boot(node, config).and_then(|service| {
        let outcome = run(bench, &service);
        let said = outcome.is_err().then(|| service.systemctl("status pointworkd"));
        let ended = service.end();
        let outcome = outcome.with_context(|| format!("{said:?}"))?;
        ended.map(|()| outcome)
    });
    bench.start_pointworkd()?; // whatever came of it: other checks follow
    outcome
}

fn run(bench: &Bench, service: &Service) -> Result<String> {
    service.systemctl("enable --now pointworkd")?;
    ensure!(service.property("StatusErrno")? == "0" && service.property("ActiveState")? == "active");
    bench.wait_fast()?;
    ensure!(service.capabilities()? == CAPABILITIES, "{:x}", service.capabilities()?);
    let held = [service.status("NoNewPrivs")?, service.status("Seccomp")?];
    ensure!(held == ["1", "2"], "{held:?}");
    // Its own memory and where it came from, none of the guests'.
    let dumped = service.inside(&format!("cat /proc/{}/coredump_filter", service.property("MainPID")?))?;
    ensure!(dumped.trim() == "00000011", "{dumped}");
    let kept = bench.node.sh("stat -c '%a %g' /run/pointwork /var/lib/pointwork /run/pointwork/vm1.sock")?;
    ensure!(kept == "770 900\n750 900\n660 900\n", "{kept}");

    // The unit lets it look at what its guests use, and map that.
    wait_for("a guest's memory to be looked at", WATCHDOG, || {
        let show = bench.pointwork("show")?;
        let ports = show["ports"].as_array().context("no ports")?;
        let vm1 = ports.iter().find(|port| port["name"] == "vm1").context("no vm1")?;
        Ok(vm1["memory"]["used"].as_u64().is_some_and(|used| used > 0).then_some(()))
    })?;

    // It dies, and its guests find it again; it hangs, and the watchdog sees to that.
    started_again(service, "KILL", WATCHDOG)?;
    bench.wait_fast()?;
    let hung = started_again(service, "STOP", WATCHDOG)?;
    bench.wait_fast()?;

    // A wire is more than the unit allows; what the manual adds is what it needs.
    let wire = Wire::lay_open(bench)?;
    let outcome = with_the_manuals_rights(service, &wire);
    let taken_up = wire.take_up();
    let classes = outcome?;
    taken_up?;
    bench.wait_fast()?;

    let begin = Instant::now();
    service.systemctl("stop pointworkd")?;
    let ended =
        [service.property("ActiveState")?, service.property("Result")?, service.property("ExecMainStatus")?];
    ensure!(ended == ["inactive", "success", "0"], "{ended:?}");
    Ok(format!(
        "ended by the watchdog after {:.0} s; {classes} classes of a wire with what the manual adds; stopped in {:.1} s",
        hung.as_secs_f64(),
        begin.elapsed().as_secs_f64()
    ))
}

/// Sends the daemon a signal, and waits until systemd has started another one. How long that took.
fn started_again(service: &Service, signal: &str, deadline: Duration) -> Result<Duration> {
    let (before, restarts) = (service.property("MainPID")?, service.property("NRestarts")?);
    let begin = Instant::now();
    service.systemctl(&format!("kill --signal={signal} --kill-whom=main pointworkd"))?;
    wait_for("the service to be started again", deadline, || {
        let state = (service.property("ActiveState")?, service.property("MainPID")?);
        Ok((state.0 == "active" && state.1 != before && state.1 != "0").then_some(()))
    })?;
    let count = service.property("NRestarts")?;
    ensure!(count != restarts, "still {count} restarts: somebody else has started it");
    Ok(begin.elapsed())
}

/// Adds to the unit what the manual says, and gives the number of classes that the wire then takes.
fn with_the_manuals_rights(service: &Service, wire: &Wire) -> Result<usize> {
    let shown = wire.wait_fault()?;
    ensure!(shown.contains("AF_XDP needs the capabilities"), "{shown}");
    service.add("wire.md", 0, str::to_owned)?;
    service.systemctl("restart pointworkd")?;
    let classes = wire.wait_taking()?;
    ensure!(service.capabilities()? == OF_WIRES, "{:x}", service.capabilities()?);
    Ok(classes)
}
