//! The samples of `docs/samples`: domains of libvirt are valid, scripts for QEMU work as they are.
#![cfg(target_arch = "x86_64")]

use std::net::{IpAddr, Ipv4Addr};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use qemu_tests::daemon::{Daemon, DaemonConfig};
use qemu_tests::guest::{Guest, GuestConfig};
use qemu_tests::host::{WorkDir, wait_for};
use qemu_tests::image::project;

const DEADLINE: Duration = Duration::from_secs(30);
/// Memory of each guest in MiB.
const MEMORY: u64 = 192;

/// The samples whose names begin and end like this, in order.
fn samples(begin: &str, end: &str) -> Result<Vec<PathBuf>> {
    let is_one = |path: &PathBuf| {
        let name = path.file_name().and_then(|name| name.to_str()).unwrap_or_default();
        name.starts_with(begin) && name.ends_with(end)
    };
    let files = std::fs::read_dir(project().join("docs/samples"))?;
    let mut samples: Vec<PathBuf> = files.filter_map(|file| Some(file.ok()?.path())).filter(is_one).collect();
    samples.sort();
    ensure!(samples.len() == 5, "{samples:?}");
    Ok(samples)
}

#[test]
fn domains_are_valid() -> Result<()> {
    for sample in samples("libvirt-", ".xml")? {
        let output =
            Command::new("virt-xml-validate").arg(&sample).arg("domain").stdin(Stdio::null()).output()?;
        let said = String::from_utf8_lossy(&output.stderr);
        ensure!(output.status.success(), "{}: {said}", sample.display());
        // What the schema does not know of is what the port has to be like.
        let text = std::fs::read_to_string(&sample)?;
        let script = sample.to_string_lossy().replace("libvirt-", "qemu-").replace(".xml", ".sh");
        let port = port(Path::new(&script))?;
        let is_client = port.contains("mode = \"client\"");
        ensure!(text.contains(if is_client { "mode='server'/>" } else { "mode='client'>" }), "{text}");
        let socket = port.lines().find_map(|line| line.strip_prefix("socket = ")).context("no socket")?;
        ensure!(text.contains(&socket.replace('"', "'")), "{text}");
    }
    Ok(())
}

/// What a script says that the port is like.
fn port(script: &Path) -> Result<String> {
    let text = std::fs::read_to_string(script)?;
    let lines = text.lines().skip_while(|line| *line != "#   [[port]]");
    Ok(lines.map_while(|line| line.strip_prefix("#   ")).map(|line| format!("{line}\n")).collect())
}

/// Huge pages of 2 MiB that are set aside beside those that others have, until this is dropped: how many of them came.
struct HugePages(u64);

const HUGE_PAGES: &str = "/sys/kernel/mm/hugepages/hugepages-2048kB/nr_hugepages";

impl HugePages {
    fn count() -> Result<u64> {
        Ok(std::fs::read_to_string(HUGE_PAGES)?.trim().parse()?)
    }

    fn add(more: u64) -> Result<Self> {
        let mut kept = Self(0);
        wait_for("huge pages to be set aside", DEADLINE, || {
            // Those that the kernel can give depend on how its free memory is scattered.
            std::fs::write("/proc/sys/vm/compact_memory", "1").context("memory cannot be compacted")?;
            let before = Self::count()?;
            std::fs::write(HUGE_PAGES, (before + more.saturating_sub(kept.0)).to_string())
                .context("huge pages cannot be set aside")?;
            kept.0 += Self::count()?.saturating_sub(before);
            Ok((kept.0 >= more).then_some(()))
        })?;
        Ok(kept)
    }
}

impl Drop for HugePages {
    fn drop(&mut self) {
        if let Ok(there) = Self::count() {
            let _ = std::fs::write(HUGE_PAGES, there.saturating_sub(self.0).to_string());
        }
    }
}

fn guest(script: &Path, dir: &WorkDir) -> Result<Guest> {
    let name = script.file_stem().and_then(|name| name.to_str()).context("no name")?;
    let set = |name: &str, value: String| (name.to_owned(), value);
    let environment = vec![
        set("RUN", dir.root().display().to_string()),
        set("MEMORY", format!("{MEMORY}M")),
        set("CPUS", "2".to_owned()),
    ];
    let config = GuestConfig {
        name: name.into(),
        script: Some((script.into(), environment)),
        // QEMU need not have a boot ROM here, and the firmware need not run it.
        arguments: vec![["-global".into(), "virtio-net-pci.romfile=".into()]],
        ..GuestConfig::default()
    };
    Guest::start(config, dir)
}

/// Each guest reaches the first, over the port that its script describes.
#[test]
fn scripts_start_guests_that_reach_each_other() -> Result<()> {
    let dir = WorkDir::new()?;
    let mut scripts = samples("qemu-", ".sh")?;
    let ports = scripts.iter().map(|script| port(script)).collect::<Result<Vec<String>>>()?;
    let run = dir.root().display().to_string();
    let more: String = ports.iter().map(|port| port.replace("/run/pointwork", &run)).collect();
    let daemon = Daemon::start(&DaemonConfig { more, ..DaemonConfig::default() }, &dir)?;
    let first = scripts.pop().context("no script")?;
    ensure!(first.ends_with("qemu-server.sh"), "{first:?}");
    let address = IpAddr::V4(Ipv4Addr::new(10, 0, 0, 1));
    let server = guest(&first, &dir)?;
    server.address("10.0.0.1/24")?;
    for (script, number) in scripts.iter().zip(2..) {
        let huge = script.ends_with("qemu-hugepages.sh").then(|| HugePages::add(MEMORY / 2)).transpose()?;
        let guest = guest(script, &dir)?;
        guest.address(&format!("10.0.0.{number}/24"))?;
        guest.wait_reachable(address, DEADLINE)?;
        let socket = std::fs::read_to_string(script)?;
        let shown = daemon.show()?;
        let port = shown
            .iter()
            .find(|port| port.link && port.name != "vm1" && socket.contains(&format!("/{}.sock", port.name)))
            .with_context(|| format!("{shown:?}"))?;
        let has = |feature: &str| port.features.iter().any(|one| one == feature);
        match script.file_stem().and_then(|name| name.to_str()) {
            Some("qemu-client") => {
                ensure!(
                    guest.sh("cat /sys/class/net/eth0/mtu")?.trim() == "9000" && port.mtu == 9000,
                    "{port:?}"
                );
            }
            Some("qemu-queues") => ensure!(port.queues == 4 && port.active_queues == 2, "{port:?}"),
            Some("qemu-packed") => ensure!(has("packed"), "{port:?}"),
            Some("qemu-hugepages") => {
                let show = daemon.ctl(&["show"])?;
                let ports = show["ports"].as_array().context("no ports")?;
                let memory =
                    &ports.iter().find(|one| one["name"] == *port.name).context("no port")?["memory"];
                ensure!(memory["page"] == 2 << 20 && memory["guest"] == MEMORY << 20, "{memory}");
            }
            other => anyhow::bail!("{other:?} is not looked at"),
        }
        guest.quit()?;
        drop(huge);
    }
    daemon.balanced_stats()?;
    server.quit()
}
