//! The packaged service: what `scripts/install` leaves, run by a systemd that is the first process of a namespace of the node.

use std::path::Path;
use std::process::{Command, Stdio};

use anyhow::{Context, Result, ensure};
use qemu_tests::agent::Job;
use qemu_tests::host::wait_for;
use qemu_tests::image::project;
use qemu_tests::node::Node;

use crate::bench::{Bench, DEADLINE};
use crate::wire::Wire;

/// What is installed, in the directory of programs that the node sees.
const INSTALLED: &str = "installed";
/// What the unit lets the daemon have (linux/capability.h): CAP_CHOWN, CAP_DAC_OVERRIDE, CAP_NET_ADMIN; for wires
/// CAP_NET_RAW, CAP_PERFMON and CAP_BPF too.
const CAPABILITIES: u64 = 1 | 1 << 1 | 1 << 12;
const OF_WIRES: u64 = CAPABILITIES | 1 << 13 | 1 << 38 | 1 << 39;
/// The number of systemd in the node: the children that it forks bear its name for a moment.
const SYSTEMD: &str = "$(pidof systemd | tr ' ' '\\n' | sort -n | head -n 1)";
/// The directory of what is added to the unit.
const DROP_INS: &str = "/etc/systemd/system/pointworkd.service.d";

/// Installs into `programs`, from where the node takes it.
pub fn install(programs: &Path) -> Result<()> {
    let output = Command::new(project().join("scripts/install"))
        .env("DESTDIR", programs.join(INSTALLED))
        .env("POINTWORK_BIN_DIR", programs)
        .stdin(Stdio::null())
        .output()?;
    ensure!(output.status.success(), "{output:?}");
    Ok(())
}

/// Systemd while it runs, with the service on its unit.
struct Service<'a> {
    node: &'a Node,
    systemd: Job<'a>,
}

impl<'a> Service<'a> {
    /// Starts systemd with nothing to do but what is installed.
    fn boot(node: &'a Node) -> Result<Self> {
        let installed = node.program(INSTALLED);
        node.sh(&format!(
            "cp -r {installed}/etc/. /etc/ && mkdir -p /usr/local/bin {DROP_INS} && \
             ln -s {installed}/usr/local/bin/pointwork {installed}/usr/local/bin/pointworkd /usr/local/bin/ && \
             echo pointwork:x:900: >>/etc/group && \
             sed '/^state/d' /run/pointwork/pointwork.toml >/etc/pointwork/pointwork.toml && \
             printf '[Service]\\nStandardError=append:/run/pointworkd.log\\n' >{DROP_INS}/log.conf"
        ))?;
        // As in a container, it leaves the machine as it is.
        let systemd = node.spawn(
            "env container=node unshare --pid --fork --mount --mount-proc /usr/lib/systemd/systemd --unit=basic.target \
             --log-target=console --show-status=no",
        )?;
        Ok(Self { node, systemd })
    }

    /// Runs a command where systemd sees who has started it.
    fn inside(&self, command: &str) -> Result<String> {
        self.node.run(&format!("nsenter -t {SYSTEMD} -p -m -- {command}"), DEADLINE * 3)?.success()
    }

    fn systemctl(&self, arguments: &str) -> Result<String> {
        Ok(self.inside(&format!("timeout 60 systemctl {arguments}"))?.trim().to_owned())
    }

    fn property(&self, name: &str) -> Result<String> {
        self.systemctl(&format!("show --property={name} --value pointworkd"))
    }

    /// A line of what the kernel says of the daemon.
    fn status(&self, name: &str) -> Result<String> {
        let said = self.inside(&format!("cat /proc/{}/status", self.property("MainPID")?))?;
        let line = said.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(':'));
        Ok(line.with_context(|| format!("no {name}: {said}"))?.trim().to_owned())
    }

    /// What the daemon may do.
    fn capabilities(&self) -> Result<u64> {
        let sets = ["CapEff", "CapBnd", "CapPrm"].map(|set| self.status(set));
        let [effective, bounding, permitted] = sets;
        let effective = effective?;
        ensure!(effective == bounding? && effective == permitted?, "{effective}");
        Ok(u64::from_str_radix(&effective, 16)?)
    }

    fn end(self) -> Result<()> {
        // Whatever is in the namespace ends with its first process.
        let killed = self.node.sh(&format!("kill -KILL {SYSTEMD}"));
        let ended = self.systemd.wait(DEADLINE);
        let left =
            "/etc/pointwork /etc/systemd /etc/machine-id /etc/group /usr/local/bin/pointwork* /run/systemd";
        self.node.sh(&format!("rm -rf {left}"))?;
        killed?;
        ended.map(drop)
    }
}

/// The daemon does under its unit what it does without, is started again when it dies, and stops when it is told to.
pub fn unit(bench: &Bench) -> Result<String> {
    let node = &bench.node;
    bench.stop_pointworkd()?;
    let outcome = Service::boot(node).and_then(|service| {
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
    wait_for("systemd", DEADLINE, || Ok(service.systemctl("is-active basic.target").ok()))?;
    service.systemctl("enable --now pointworkd")?;
    ensure!(service.property("StatusErrno")? == "0" && service.property("ActiveState")? == "active");
    bench.wait_fast()?;
    ensure!(service.capabilities()? == CAPABILITIES, "{:x}", service.capabilities()?);
    let held = [service.status("NoNewPrivs")?, service.status("Seccomp")?];
    ensure!(held == ["1", "2"], "{held:?}");
    let kept = bench.node.sh("stat -c '%a %g' /run/pointwork /var/lib/pointwork /run/pointwork/vm1.sock")?;
    ensure!(kept == "770 900\n750 900\n660 900\n", "{kept}");

    // It dies, and its guests find it again.
    let before = service.property("MainPID")?;
    service.systemctl("kill --signal=KILL --kill-whom=main pointworkd")?;
    wait_for("the service to be started again", DEADLINE, || {
        let state = (service.property("ActiveState")?, service.property("MainPID")?);
        Ok((state.0 == "active" && state.1 != before && state.1 != "0").then_some(()))
    })?;
    bench.wait_fast()?;

    // A wire is more than the unit allows; what the manual adds is what it needs.
    let wire = Wire::lay_open(bench)?;
    let outcome = with_the_manuals_rights(bench, service, &wire);
    let taken_up = wire.take_up();
    let classes = outcome?;
    taken_up?;
    bench.wait_fast()?;

    let begin = std::time::Instant::now();
    service.systemctl("stop pointworkd")?;
    let ended =
        [service.property("ActiveState")?, service.property("Result")?, service.property("ExecMainStatus")?];
    ensure!(ended == ["inactive", "success", "0"], "{ended:?}");
    Ok(format!(
        "{classes} classes of a wire with what the manual adds; stopped in {:.1} s",
        begin.elapsed().as_secs_f64()
    ))
}

/// Adds to the unit what the manual says, and gives the number of classes that the wire then takes.
fn with_the_manuals_rights(bench: &Bench, service: &Service, wire: &Wire) -> Result<usize> {
    let shown = wire.wait_fault()?;
    ensure!(shown.contains("AF_XDP needs the capabilities"), "{shown}");
    let manual = std::fs::read_to_string(project().join("docs/wire.md"))?;
    let added =
        manual.split("```ini\n").nth(1).and_then(|rest| rest.split("```").next()).context("no drop-in")?;
    bench.node.sh(&format!("printf '{}' >{DROP_INS}/override.conf", added.replace('\n', "\\n")))?;
    service.systemctl("daemon-reload")?;
    service.systemctl("restart pointworkd")?;
    let classes = wire.wait_taking()?;
    ensure!(service.capabilities()? == OF_WIRES, "{:x}", service.capabilities()?);
    Ok(classes)
}
