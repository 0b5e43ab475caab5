//! The packaged service with NICs: what the manual adds to the unit is what it needs of VFIO and of locked memory.

use anyhow::{Context, Result, ensure};
use qemu_tests::host::wait_for;
use qemu_tests::service::Service;

use crate::bench::{Bench, DEADLINE, IGB, VIRTIO, frame};

const A: u64 = 0x0200_0000_000a;
const B: u64 = 0x0200_0000_000b;
const CONFIG: &str = "/run/service.toml";

/// Frames pass between two NICs of the service, one of which its unit binds as the manual says.
pub fn nics(bench: &Bench) -> Result<String> {
    // What is started by its own path on other machines.
    bench.node.sh("mkdir -p /sbin && { [ -e /sbin/modprobe ] || ln -s /bin/modprobe /sbin/modprobe; }")?;
    bench.nic(&format!("unbind {}", bench.igb))?;
    bench.nic(&format!("bind {}", bench.virtio))?;
    let nic = |name: &str, address: &str| {
        format!(
            "[[nic]]\\nname = \"{name}\"\\npci = \"{address}\"\\n[[port]]\\nname = \"{name}-0\"\\nkind = \"nic\"\\nnic = \"{name}\"\\nnic_port = 0\\n"
        )
    };
    let text =
        format!("[datapath]\\nl1_entries = 65536\\n{}{}", nic("a", &bench.igb), nic("b", &bench.virtio));
    bench.node.sh(&format!("printf '{text}' >{CONFIG}"))?;
    let service = Service::boot(&bench.node, CONFIG)?;
    let outcome = run(bench, &service);
    let said = outcome.is_err().then(|| (service.systemctl("status pointworkd"), service.log()));
    service.end()?;
    outcome.with_context(|| format!("{said:?}"))
}

fn run(bench: &Bench, service: &Service) -> Result<String> {
    // As it is shipped, it has no device of VFIO.
    service.systemctl("start pointworkd")?;
    let shown = wait_for("a fault", DEADLINE, || {
        let said = service.inside("/usr/local/bin/pointwork show")?;
        Ok(said.contains("warning: NIC 'b': ").then_some(said))
    })?;
    ensure!(!shown.contains("virtio-net  none"), "{shown}");

    service.add("nic.md", 0, str::to_owned)?;
    service.add("nic.md", 1, |text| text.replace("0000:02:00.0", &bench.igb))?;
    service.systemctl("restart pointworkd")?;
    wait_for("both links", DEADLINE, || {
        let said = service.inside("/usr/local/bin/pointwork --json show")?;
        let show: serde_json::Value = serde_json::from_str(&said)?;
        let ports = show["ports"].as_array().context("no ports")?;
        Ok((ports.len() == 2 && ports.iter().all(|port| port["link"] == true)).then_some(()))
    })
    .with_context(|| service.inside("/usr/local/bin/pointwork show").unwrap_or_default())?;
    for cable in [IGB, VIRTIO] {
        bench.cables[cable].drain()?; // of what the kernel's drivers have sent
    }
    for (from, to, dst, src) in [(IGB, VIRTIO, B, A), (VIRTIO, IGB, A, B)] {
        let sent = frame(dst, src, &[7; 80]);
        bench.cables[from].send(&sent)?;
        ensure!(bench.cables[to].receive()? == sent, "another frame");
    }
    let limits = service.inside(&format!("cat /proc/{}/limits", service.property("MainPID")?))?;
    let limit = limits.lines().find(|line| line.starts_with("Max locked memory")).context("no limit")?;
    ensure!(limit.matches("unlimited").count() == 2, "{limit}");
    let locked: u64 = service.status("VmLck")?.trim_end_matches(" kB").parse()?;
    ensure!(locked > 0, "nothing is locked for the devices");
    ensure!(bench.faults()?.is_empty(), "{}", bench.faults()?);
    service.systemctl("stop pointworkd")?;
    let result = service.property("Result")?;
    ensure!(result == "success", "{result}");
    Ok(format!("{locked} KiB locked"))
}
