//! The packaged service: what `scripts/install` leaves, run by a systemd that is the first process of a namespace of a node.

use std::path::Path;
use std::process::{Command, Stdio};
use std::time::Duration;

use anyhow::{Context, Result, ensure};

use crate::agent::Job;
use crate::host::wait_for;
use crate::image::project;
use crate::node::Node;

/// Longer than anything here takes on a busy machine.
const DEADLINE: Duration = Duration::from_secs(30);
/// What is installed, in the directory of programs that the node sees.
const INSTALLED: &str = "installed";
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

/// Systemd while it runs, with the service on its unit. The node is as it was when it has ended.
#[derive(Debug)]
pub struct Service<'a> {
    node: &'a Node,
    systemd: Job<'a>,
}

impl<'a> Service<'a> {
    /// Starts systemd with nothing to do but what is installed; the daemon is to have the node's file `config` as its
    /// configuration.
    pub fn boot(node: &'a Node, config: &str) -> Result<Self> {
        let installed = node.program(INSTALLED);
        node.sh(&format!(
            "cp -r {installed}/etc/. /etc/ && mkdir -p /usr/local/bin {DROP_INS} && \
             ln -s {installed}/usr/local/bin/pointwork {installed}/usr/local/bin/pointworkd /usr/local/bin/ && \
             echo pointwork:x:900: >>/etc/group && cp {config} /etc/pointwork/pointwork.toml && \
             printf '[Service]\\nStandardError=append:/run/pointworkd.log\\n' >{DROP_INS}/log.conf"
        ))?;
        // As in a container, it leaves the machine as it is.
        let systemd = node.spawn(
            "env container=node unshare --pid --fork --mount --mount-proc /usr/lib/systemd/systemd --unit=basic.target \
             --log-target=console --show-status=no",
        )?;
        let service = Self { node, systemd };
        match wait_for("systemd", DEADLINE, || Ok(service.systemctl("is-active basic.target").ok())) {
            Ok(_) => Ok(service),
            Err(error) => {
                service.end()?;
                Err(error)
            }
        }
    }

    /// Runs a command where systemd sees who has started it.
    pub fn inside(&self, command: &str) -> Result<String> {
        self.node.run(&format!("nsenter -t {SYSTEMD} -p -m -- {command}"), DEADLINE * 3)?.success()
    }

    /// What `systemctl` with these arguments says.
    pub fn systemctl(&self, arguments: &str) -> Result<String> {
        Ok(self.inside(&format!("timeout 60 systemctl {arguments}"))?.trim().to_owned())
    }

    /// What systemd says of the service.
    pub fn property(&self, name: &str) -> Result<String> {
        self.systemctl(&format!("show --property={name} --value pointworkd"))
    }

    /// A line of what the kernel says of the daemon.
    pub fn status(&self, name: &str) -> Result<String> {
        let said = self.inside(&format!("cat /proc/{}/status", self.property("MainPID")?))?;
        let line = said.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(':'));
        Ok(line.with_context(|| format!("no {name}: {said}"))?.trim().to_owned())
    }

    /// What the daemon may do.
    pub fn capabilities(&self) -> Result<u64> {
        let sets = ["CapEff", "CapBnd", "CapPrm"].map(|set| self.status(set));
        let [effective, bounding, permitted] = sets;
        let effective = effective?;
        ensure!(effective == bounding? && effective == permitted?, "{effective}");
        Ok(u64::from_str_radix(&effective, 16)?)
    }

    /// Adds what a manual of `docs/` shows as its drop-in number `index`, once `change` has put in what it leaves to the reader.
    pub fn add(&self, manual: &str, index: usize, change: impl FnOnce(&str) -> String) -> Result<()> {
        let text = std::fs::read_to_string(project().join("docs").join(manual))?;
        let shown = text.split("```ini\n").nth(index + 1).and_then(|rest| rest.split("```").next());
        let added = change(shown.with_context(|| format!("{manual} shows no drop-in {index}"))?);
        let file = format!("{DROP_INS}/{}-{index}.conf", manual.trim_end_matches(".md"));
        self.node.sh(&format!("printf '{}' >{file}", added.replace('\n', "\\n")))?;
        self.systemctl("daemon-reload").map(drop)
    }

    /// What the daemon has logged.
    pub fn log(&self) -> Result<String> {
        self.node.sh("cat /run/pointworkd.log")
    }

    /// Ends systemd and all that it has started.
    pub fn end(self) -> Result<()> {
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
