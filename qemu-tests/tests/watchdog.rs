//! The service manager's watchdog, played by a test: it is told that the daemon lives while the workers do.

use std::os::unix::net::UnixDatagram;
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use nix::sys::ptrace;
use nix::sys::wait::{WaitPidFlag, waitpid};
use nix::unistd::Pid;
use qemu_tests::daemon::{DaemonConfig, PortConfig, binary};
use qemu_tests::host::{Process, WorkDir, wait_for};

const DEADLINE: Duration = Duration::from_secs(20);
/// What the daemon is told that the manager's patience is, in microseconds; it tells four times in that time.
const LIMIT: u64 = 1_000_000;

/// How often the manager was told since the last call.
fn told(manager: &UnixDatagram, what: &str) -> Result<usize> {
    let (mut message, mut count) = ([0; 4096], 0);
    loop {
        match manager.recv(&mut message) {
            Ok(len) => {
                let text = std::str::from_utf8(&message[..len])?;
                count += text.lines().filter(|line| *line == what).count();
            }
            Err(error) if error.kind() == std::io::ErrorKind::WouldBlock => return Ok(count),
            Err(error) => return Err(error.into()),
        }
    }
}

fn wait_told(manager: &UnixDatagram, what: &str, times: usize) -> Result<()> {
    let mut count = 0;
    wait_for(&format!("{times} times {what}"), DEADLINE, || {
        count += told(manager, what)?;
        Ok((count >= times).then_some(()))
    })
}

/// The thread of that name.
fn thread(process: u32, name: &str) -> Result<Pid> {
    for task in std::fs::read_dir(format!("/proc/{process}/task"))? {
        let path = task?.path();
        if std::fs::read_to_string(path.join("comm"))?.trim() == name {
            let id = path.file_name().and_then(|id| id.to_str()).context("no number")?;
            return Ok(Pid::from_raw(id.parse()?));
        }
    }
    anyhow::bail!("there is no thread {name}")
}

#[test]
fn a_worker_that_hangs_is_not_covered_up() {
    run().unwrap();
}

fn run() -> Result<()> {
    let dir = WorkDir::new()?;
    let file = dir.path("pointwork.toml");
    let allowed = rustix::thread::sched_getaffinity(None)?;
    let cpus: Vec<usize> = (0..1024).filter(|&cpu| allowed.is_set(cpu)).take(2).collect();
    ensure!(cpus.len() == 2, "two workers need two processors: {cpus:?}");
    let config = DaemonConfig { cpus, ..DaemonConfig::new([PortConfig::server("vm1", &dir)]) };
    std::fs::write(&file, config.to_toml(&dir))?;
    let manager = UnixDatagram::bind(dir.path("notify"))?;
    manager.set_nonblocking(true)?;
    let log = dir.path("log");
    let configure = |command: &mut std::process::Command| {
        command.arg("--config").arg(&file);
        command.env("NOTIFY_SOCKET", dir.path("notify")).env("WATCHDOG_USEC", LIMIT.to_string());
    };
    let daemon = Process::spawn("pointworkd", &binary("pointworkd")?, configure, &log)?;
    wait_told(&manager, "READY=1", 1)?;
    // Idle workers, which sleep.
    wait_told(&manager, "WATCHDOG=1", 4)?;

    let worker = thread(daemon.pid(), "worker-1")?;
    ptrace::seize(worker, ptrace::Options::empty()).context("a thread cannot be stopped")?;
    ptrace::interrupt(worker)?;
    waitpid(worker, Some(WaitPidFlag::__WALL))?;
    let says = |text: &str| -> Result<Option<()>> {
        Ok(std::fs::read_to_string(&log)?.contains(text).then_some(()))
    };
    wait_for("the worker to be named", DEADLINE, || says("worker 1 does not pass through its loop"))?;
    told(&manager, "WATCHDOG=1")?;
    // The daemon does all else meanwhile.
    let (begin, mut answers) = (Instant::now(), 0);
    while begin.elapsed() < Duration::from_micros(LIMIT) {
        let output = std::process::Command::new(binary("pointwork")?)
            .arg("--control")
            .arg(dir.path("control.sock"))
            .arg("show")
            .output()?;
        ensure!(output.status.success(), "{output:?}");
        answers += 1;
    }
    ensure!(told(&manager, "WATCHDOG=1")? == 0, "the manager was told that all is well");

    ptrace::detach(worker, None)?;
    wait_told(&manager, "WATCHDOG=1", 2)?;
    says("all workers pass through their loops again")?.context("not said")?;
    ensure!(Path::new(&format!("/proc/{}", daemon.pid())).exists() && answers > 0);
    Ok(())
}
