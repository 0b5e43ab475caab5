//! `pointwork nic` on the real sysfs: what it lists, what it refuses, binding both ways, and the reset of what a dead process left.

use anyhow::{Context, Result, ensure};
use qemu_tests::host::wait_for;
use qemu_tests::image::project;
use qemu_tests::nics::SwitchRule;
use serde_json::Value;

use crate::bench::{Bench, DEADLINE, LOOSE, frame};

const A: u64 = 0x0200_0000_000a;
/// Where the switch forwards to, if it does.
const B: u64 = 0x0200_0000_000b;

/// What `nic list` says of a function.
fn listed(bench: &Bench, address: &str) -> Result<Value> {
    let all = bench.nic("list --all")?;
    let nics = all["nics"].as_array().context("no list")?;
    let found = nics.iter().find(|nic| nic["address"] == address);
    Ok(found.with_context(|| format!("{address} is not in {all:#}"))?.clone())
}

/// That it is not ready, for this reason alone or among others.
fn waits_for(bench: &Bench, address: &str, reason: &str) -> Result<()> {
    let nic = listed(bench, address)?;
    let obstacles = nic["obstacles"].as_array().context("no obstacles")?;
    let what = |obstacle: &Value| obstacle["what"].as_str().is_some_and(|what| what.contains(reason));
    ensure!(nic["ready"] == false && obstacles.iter().any(what), "not '{reason}': {nic:#}");
    ensure!(obstacles.iter().all(|one| one["remedy"].as_str().is_some_and(|text| !text.is_empty())));
    Ok(())
}

fn refused(bench: &Bench, arguments: &str, reason: &str) -> Result<()> {
    let said = bench.refused(arguments)?;
    ensure!(said.starts_with("pointwork: ") && said.contains(reason), "not '{reason}': {said}");
    Ok(())
}

/// Before anything of VFIO is loaded.
pub fn without_modules(bench: &Bench) -> Result<String> {
    for address in [&bench.rocker, &bench.igb, &bench.virtio, &bench.shared, &bench.loose] {
        waits_for(bench, address, "module vfio-pci is not loaded")?;
    }
    refused(bench, &format!("bind {}", bench.rocker), "modprobe vfio-pci")?;
    let known = bench.nic("list")?;
    let known = known["nics"].as_array().context("no list")?;
    ensure!(known.len() == 6 && known.iter().all(|nic| nic["driver"].is_string()), "{known:#?}");
    bench.node.sh("modprobe vfio-pci && modprobe vfio_iommu_type1")?;
    waits_for(bench, &bench.rocker, "not bound to vfio-pci")?;
    Ok(format!("{} NICs", known.len()))
}

/// Functions go from the kernel's driver to `vfio-pci` and back, but for those that the host uses.
pub fn binding(bench: &Bench) -> Result<String> {
    let igb = &bench.igb;
    bench.node.sh("modprobe igb")?;
    let interface = wait_for("an interface", DEADLINE, || {
        Ok(listed(bench, igb)?["interfaces"][0]["name"].as_str().map(str::to_owned))
    })?;
    let in_use = |command: &str, reason: &str| -> Result<()> {
        bench.node.sh(command)?;
        refused(bench, &format!("bind {igb}"), reason)?;
        ensure!(bench.driver(igb)? == "igb", "it was taken");
        Ok(())
    };
    in_use(&format!("ip link set {interface} up"), &format!("{interface} is up"))?;
    in_use(&format!("ip address add 10.9.9.1/24 dev {interface}"), &format!("{interface} is up"))?;
    let bridged = format!(
        "ip link set {interface} down && ip link add br9 type bridge && ip link set {interface} master br9"
    );
    in_use(&bridged, &format!("{interface} belongs to br9"))?;
    bench.node.sh("ip link delete br9")?;
    in_use(&format!("ip link add link {interface} name tagged type vlan id 5"), "belongs to tagged")?;
    bench.node.sh("ip link delete tagged")?;
    let bound = bench.nic(&format!("bind {igb}"))?;
    ensure!(
        bound["from"] == "igb" && bound["already"] == false && bench.driver(igb)? == "vfio-pci",
        "{bound}"
    );
    ensure!(bench.nic(&format!("bind {igb}"))?["already"] == true);
    ensure!(listed(bench, igb)?["ready"] == true, "{:#}", listed(bench, igb)?);
    ensure!(bench.nic(&format!("unbind {igb}"))?["driver"] == "igb" && bench.driver(igb)? == "igb");
    ensure!(bench.nic(&format!("unbind {igb}"))?["already"] == true);
    // By force, from under an interface that is up.
    let name = listed(bench, igb)?["interfaces"][0]["name"].as_str().context("no interface")?.to_owned();
    in_use(&format!("ip link set {name} up"), "--force takes it away")?;
    bench.nic(&format!("bind {igb} --force"))?;
    ensure!(listed(bench, igb)?["interfaces"] == serde_json::json!([]) && bench.driver(igb)? == "vfio-pci");

    for address in [&bench.rocker, &bench.loose, &bench.virtio] {
        ensure!(bench.nic(&format!("bind {address}"))?["obstacles"] == serde_json::json!([]), "{address}");
    }
    // One of a group is not enough.
    let (shared, neighbour) = (&bench.shared, &bench.neighbour);
    let reason = format!("is shared with {neighbour} (virtio-pci)");
    let left = bench.nic(&format!("bind {shared}"))?;
    ensure!(left["obstacles"][0]["what"].as_str().is_some_and(|what| what.contains(&reason)), "{left}");
    waits_for(bench, shared, &reason)?;
    refused(bench, &format!("reset {shared}"), &reason)?;
    bench.nic(&format!("bind {neighbour}"))?;
    ensure!(listed(bench, shared)?["ready"] == true, "{:#}", listed(bench, shared)?);
    // It is not alone on its bus, which sysfs does not know of all buses.
    ensure!(bench.nic(&format!("reset {shared}"))?["reset"][0]["by"] == "by a register of its own");

    for (arguments, reason) in [
        ("bind 0000:7f:00.0", "there is no PCI function"),
        ("bind nonsense", "is no PCI address"),
        ("bind 0000:00:1f.2", "no network function (class 010601)"),
        ("bind 0000:00:00.0 --force", "is a bridge"),
        ("reset 0000:00:1f.2", "not bound to vfio-pci"),
        ("reset --config /nowhere.toml", "/nowhere.toml: No such file"),
    ] {
        refused(bench, arguments, reason)?;
    }
    let shown = bench.node.sh(&format!("{} nic list", bench.node.program("pointwork")))?;
    ensure!(shown.lines().next().is_some_and(|line| line.starts_with("ADDRESS")), "{shown}");
    ensure!(shown.matches(" ready\n").count() == 6, "{shown}");
    Ok(format!("{interface} taken and given back"))
}

/// What a process has is left alone.
pub fn held(bench: &Bench) -> Result<String> {
    let server = bench.serve(&bench.rocker, 3)?;
    let by = listed(bench, &bench.rocker)?["in_use_by"].as_str().context("nobody has it")?.to_owned();
    ensure!(by.starts_with("vfio-nic (process "), "{by}");
    for command in ["unbind", "reset"] {
        refused(bench, &format!("{command} {}", bench.rocker), &by)?;
    }
    bench.cables[0].send(&frame(B, A, b"stop"))?;
    ensure!(server.wait(DEADLINE)?.status == 0, "{}", bench.log()?);
    bench.cables[0].receive()?;
    let said = bench.nic(&format!("reset {}", bench.rocker))?;
    ensure!(said["reset"][0]["by"] == "by the kernel", "{said}");
    Ok(by)
}

/// The command by which the service resets the NICs of this configuration when the daemon has ended.
pub fn line_of_the_unit(bench: &Bench, config: &str) -> Result<String> {
    let unit = std::fs::read_to_string(project().join("scripts/pointworkd.service"))?;
    let line = unit.lines().find_map(|line| line.strip_prefix("ExecStopPost=-")).context("no such line")?;
    Ok(line
        .replace("$$", "$")
        .replace("@PREFIX@/bin/pointwork", &bench.node.program("pointwork"))
        .replace("/etc/pointwork/pointwork.toml", config))
}

/// A switch that the kernel cannot reset goes on forwarding when its process is killed, until it is reset as the service does it.
pub fn reset(bench: &Bench) -> Result<String> {
    let (from, to) = (&bench.cables[LOOSE], &bench.cables[LOOSE + 1]);
    let server = bench.serve(&format!("{} --forward 1:2", bench.loose), 2)?;
    let sent = frame(B, A, &[5; 80]);
    from.send(&sent)?;
    ensure!(to.receive()? == sent);
    server.kill()?;
    server.wait(DEADLINE)?;
    wait_for(
        "the function to be given back",
        DEADLINE,
        || Ok((!bench.masters(&bench.loose)?).then_some(())),
    )?;
    // It has no ring any more, but its rules.
    from.send(&sent)?;
    ensure!(to.receive()? == sent, "it has been reset already");
    ensure!(
        bench.rules("loose")? == [SwitchRule { from: 1, to: Some(2), hits: 2 }],
        "{:?}",
        bench.rules("loose")?
    );

    let config = "/run/nics.toml";
    let command = line_of_the_unit(bench, config)?;
    bench.node.sh(&format!("printf '[[nic]]\\nname = \"a\"\\npci = \"{}\"\\n' >{config}", bench.loose))?;
    // A daemon that has ended by itself has seen to its NICs.
    let said = bench.node.sh(&format!("export SERVICE_RESULT=success; {command}"))?;
    ensure!(said.is_empty() && bench.rules("loose")?.len() == 1, "{said}");
    let said = bench.node.sh(&format!("export SERVICE_RESULT=signal; {command}"))?;
    ensure!(said == format!("{} reset by a register of its own\n", bench.loose), "{said}");
    ensure!(bench.entries("loose")? == 0, "{} entries are left", bench.entries("loose")?);
    from.send(&sent)?;
    bench.nic(&format!("unbind {}", bench.loose))?;
    ensure!(to.try_receive()?.is_none(), "it still forwards");
    // Those that are not bound have nothing to be reset.
    let said = bench.node.sh(&format!("export SERVICE_RESULT=signal; {command}"))?;
    ensure!(said.is_empty(), "{said}");
    ensure!(bench.faults()?.is_empty(), "{}", bench.faults()?);
    Ok("by the unit's line".into())
}
