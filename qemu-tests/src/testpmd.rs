//! `dpdk-testpmd`, DPDK's program that forwards packets from port to port.

use std::fs::File;
use std::io::Write as _;
use std::path::Path;

use anyhow::{Result, bail};
use rustix::fs::{CWD, FileType, Mode};
use rustix::thread::{CpuSet, sched_getaffinity};

use crate::host::{Process, WorkDir};

/// A running `dpdk-testpmd`, which is told what to do by lines on its standard input. Dropped, it is killed.
pub struct Testpmd {
    process: Process,
    commands: File,
}

impl Testpmd {
    /// Whether it is installed.
    pub fn is_available() -> bool {
        let paths = std::env::var_os("PATH").unwrap_or_default();
        std::env::split_paths(&paths).any(|dir| dir.join("dpdk-testpmd").exists())
    }

    /// Starts it with these options of DPDK's environment, and these of its own. Its log in `dir` begins anew.
    ///
    /// # Errors
    /// When it cannot be started.
    pub fn start(environment: &[String], own: &[String], dir: &WorkDir) -> Result<Self> {
        let (pipe, log) = (dir.path("testpmd.commands"), dir.path("testpmd.log"));
        for stale in [&pipe, &log] {
            if stale.exists() {
                std::fs::remove_file(stale)?;
            }
        }
        rustix::fs::mknodat(CWD, &pipe, FileType::Fifo, Mode::RUSR | Mode::WUSR, 0)?;
        // For reading too: opening must not wait for the other end, nor the other end see an end of file.
        let commands = File::options().read(true).write(true).open(&pipe)?;
        let configure = |command: &mut std::process::Command| {
            command.args(["-c", "exec stdbuf -oL dpdk-testpmd \"$@\" <\"$0\""]).arg(&pipe);
            command.args(environment).args(["--no-pci", "--no-telemetry", "--", "-i"]).args(own);
        };
        let process = Process::spawn("dpdk-testpmd", Path::new("sh"), configure, &log)?;
        Ok(Self { process, commands })
    }

    /// Its process id.
    pub fn pid(&self) -> u32 {
        self.process.pid()
    }

    /// Types a line at its prompt.
    ///
    /// # Errors
    /// When it does not read.
    pub fn command(&mut self, line: &str) -> Result<()> {
        Ok(self.commands.write_all(format!("{line}\n").as_bytes())?)
    }

    /// An error, with its last words, if it has ended.
    ///
    /// # Errors
    /// That.
    pub fn check(&mut self) -> Result<()> {
        self.process.check()
    }

    /// Ends it with SIGKILL: the other side hears nothing but the end of the connection.
    ///
    /// # Errors
    /// The system's.
    pub fn kill(&mut self) -> Result<()> {
        self.process.kill()
    }

    /// The last lines of what it said.
    pub fn log_tail(&self, lines: usize) -> String {
        self.process.log_tail(lines)
    }
}

/// Processors for two of its threads, as its option `--lcores` has it: both may run on all that we may use.
///
/// # Errors
/// When there is none.
pub fn any_cores() -> Result<String> {
    let set = sched_getaffinity(None)?;
    let cpus: Vec<String> =
        (0..CpuSet::MAX_CPU).filter(|&cpu| set.is_set(cpu)).map(|cpu| cpu.to_string()).collect();
    if cpus.is_empty() {
        bail!("no processor");
    }
    let any = cpus.join(",");
    Ok(format!("--lcores=0@({any}),1@({any})"))
}
