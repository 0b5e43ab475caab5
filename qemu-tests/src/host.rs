//! What happens on the host: a working directory, processes that never outlive us, waiting, and signals.

use std::fs::File;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitCode, ExitStatus, Stdio};
use std::sync::OnceLock;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{self, Sender};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};

/// A temporary directory for sockets, logs and configuration; gone when dropped.
#[derive(Debug)]
pub struct WorkDir(tempfile::TempDir);

impl WorkDir {
    /// Makes one, with a name short enough for the 108 bytes of `sun_path` (unix(7)).
    pub fn new() -> Result<Self> {
        let base = std::env::temp_dir();
        let base = if base.as_os_str().len() > 40 { Path::new("/tmp") } else { &base };
        let dir = tempfile::Builder::new().prefix("pointwork-").tempdir_in(base)?;
        Ok(Self(dir))
    }

    /// The directory itself.
    pub fn root(&self) -> &Path {
        self.0.path()
    }

    /// The path of `name` inside.
    pub fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }
}

/// Calls `attempt` until it gives a value, fails, or `deadline` has passed; the error then says what was waited for.
pub fn wait_for<T>(
    what: &str,
    deadline: Duration,
    mut attempt: impl FnMut() -> Result<Option<T>>,
) -> Result<T> {
    let start = Instant::now();
    loop {
        check_interrupt()?;
        if let Some(value) = attempt().with_context(|| format!("waiting for {what}"))? {
            return Ok(value);
        }
        ensure!(start.elapsed() < deadline, "waited {} s in vain for {what}", deadline.as_secs_f32());
        thread::sleep(Duration::from_millis(10));
    }
}

static INTERRUPTED: AtomicBool = AtomicBool::new(false);

/// From now on SIGINT, SIGTERM and SIGHUP no longer end this process: each wait of the harness fails instead, so that
/// the caller returns and what it started is ended on the way out.
pub fn catch_signals() -> Result<()> {
    extern "C" fn note(_: libc::c_int, _: *mut libc::siginfo_t, _: *mut libc::c_void) {
        INTERRUPTED.store(true, Ordering::Relaxed);
    }
    for signal in [libc::SIGINT, libc::SIGTERM, libc::SIGHUP] {
        vmm_sys_util::signal::register_signal_handler(signal, note).context("signal handler")?;
    }
    Ok(())
}

/// Whether one of the signals of [`catch_signals`] has come.
pub fn interrupted() -> bool {
    INTERRUPTED.load(Ordering::Relaxed)
}

/// Runs a program that starts others, with [`catch_signals`]: says why it failed, if it did, and gives its exit status.
pub fn run_to_end(run: impl FnOnce() -> Result<()>) -> ExitCode {
    match catch_signals().and_then(|()| run()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(_) if interrupted() => {
            eprintln!("\ninterrupted; all that was started is ended");
            ExitCode::from(130)
        }
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}

/// An error once [`interrupted`].
pub fn check_interrupt() -> Result<()> {
    ensure!(!interrupted(), "interrupted");
    Ok(())
}

/// A child in a process group of its own. It is killed and reaped on drop, and the kernel kills it if we die first.
#[derive(Debug)]
pub struct Process {
    name: String,
    child: Child,
    log: PathBuf,
}

impl Process {
    /// Runs `program` with what is written to its output going to `log` (appended to).
    ///
    /// # Errors
    /// When it cannot be started; a program that is missing is noticed only by its exit (status 127).
    pub fn spawn(
        name: &str,
        program: &Path,
        configure: impl FnOnce(&mut Command),
        log: &Path,
    ) -> Result<Self> {
        let output = File::options().create(true).append(true).open(log)?;
        // setpriv becomes the program, so the pid is the program's.
        let mut command = Command::new("setpriv");
        command.args(["--pdeathsig", "KILL", "--"]).arg(program);
        configure(&mut command);
        command.process_group(0).stdin(Stdio::null()).stdout(output.try_clone()?).stderr(output);
        let child = spawn_for_life(command).with_context(|| format!("starting {name}"))?;
        Ok(Self { name: name.into(), child, log: log.into() })
    }

    /// Its process id, valid as long as `self` lives.
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// How it ended, if it has.
    pub fn exited(&mut self) -> Result<Option<ExitStatus>> {
        Ok(self.child.try_wait()?)
    }

    /// An error, with the last lines of its log, if it has ended.
    pub fn check(&mut self) -> Result<()> {
        if let Some(status) = self.exited()? {
            bail!("{} ended with {status}:\n{}", self.name, self.log_tail(20));
        }
        Ok(())
    }

    /// Waits for its end.
    pub fn wait(&mut self, deadline: Duration) -> Result<ExitStatus> {
        let what = format!("the end of {}", self.name);
        wait_for(&what, deadline, || self.exited())
    }

    /// Sends SIGTERM.
    pub fn terminate(&mut self) -> Result<()> {
        if self.exited()?.is_none() {
            self.signal("TERM")?;
        }
        Ok(())
    }

    /// Sends the signal of this name, to a process that must be there.
    pub fn signal(&self, name: &str) -> Result<()> {
        let pid = self.pid().to_string();
        let status = Command::new("sh").args(["-c", "kill -\"$1\" \"$2\"", "sh", name, &pid]).status()?;
        ensure!(status.success(), "SIG{name} to {} failed", self.name);
        Ok(())
    }

    /// Sends SIGKILL and reaps.
    pub fn kill(&mut self) -> Result<()> {
        if self.exited()?.is_none() {
            self.child.kill()?;
            self.child.wait()?;
        }
        Ok(())
    }

    /// The last `lines` lines of its log.
    pub fn log_tail(&self, lines: usize) -> String {
        tail(&self.log, lines)
    }

    /// CPU time used so far, user and system (proc_pid_stat(5), fields 14 and 15; in units of 10 ms).
    pub fn cpu_time(&self) -> Result<Duration> {
        let stat = std::fs::read_to_string(format!("/proc/{}/stat", self.pid()))?;
        // The command's name may hold anything, parentheses too: fields are counted after the last one.
        let (_, fields) = stat.rsplit_once(')').context("unreadable /proc/PID/stat")?;
        let ticks = |field: usize| -> Result<u64> {
            let text = fields.split_whitespace().nth(field - 3).context("short /proc/PID/stat")?;
            Ok(text.parse()?)
        };
        // USER_HZ is 100 on every architecture that Debian's guests and hosts run on.
        Ok(Duration::from_millis(10 * (ticks(14)? + ticks(15)?)))
    }

    /// The share of one core used over `interval`.
    pub fn cpu_usage(&self, interval: Duration) -> Result<f64> {
        let (start, before) = (Instant::now(), self.cpu_time()?);
        thread::sleep(interval);
        Ok((self.cpu_time()? - before).as_secs_f64() / start.elapsed().as_secs_f64())
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        if let Err(error) = self.kill() {
            eprintln!("{} may be left behind: {error:#}", self.name);
        }
        if thread::panicking() {
            eprintln!("--- last lines of {} ---\n{}", self.log.display(), self.log_tail(40));
        }
    }
}

/// Processor time that the present threads of a process have had, to the nanosecond (proc(5), `schedstat`): ticks of 10 ms miss
/// who runs between them.
pub fn run_time(process: u32) -> Result<Duration> {
    let mut nanos = 0;
    for task in std::fs::read_dir(format!("/proc/{process}/task"))? {
        // A thread may have ended meanwhile.
        let Ok(text) = std::fs::read_to_string(task?.path().join("schedstat")) else { continue };
        nanos += text.split(' ').next().context("empty schedstat")?.parse::<u64>()?;
    }
    Ok(Duration::from_nanos(nanos))
}

/// The last `lines` lines of a text file, or why it cannot be read.
pub fn tail(path: &Path, lines: usize) -> String {
    match std::fs::read(path) {
        Ok(bytes) => {
            let text = String::from_utf8_lossy(&bytes);
            let all: Vec<&str> = text.lines().collect();
            all[all.len().saturating_sub(lines)..].join("\n")
        }
        Err(error) => format!("({}: {error})", path.display()),
    }
}

/// Spawns on a thread that lives as long as this process: the parent-death signal follows the *thread* that forked, and
/// a test's thread ends before the values it made are all dropped.
fn spawn_for_life(command: Command) -> Result<Child> {
    type Request = (Command, Sender<std::io::Result<Child>>);
    static SPAWNER: OnceLock<Sender<Request>> = OnceLock::new();
    let spawner = SPAWNER.get_or_init(|| {
        let (sender, requests) = mpsc::channel::<Request>();
        thread::spawn(move || {
            for (mut command, answer) in requests {
                // A requester that is gone has no use for the child: it dies with the answer's value.
                if let Err(mpsc::SendError(Ok(mut orphan))) = answer.send(command.spawn()) {
                    let _ = orphan.kill();
                    let _ = orphan.wait();
                }
            }
        });
        sender
    });
    let (answer, child) = mpsc::channel();
    spawner.send((command, answer)).ok().context("the spawning thread is gone")?;
    Ok(child.recv().context("the spawning thread is gone")??)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_dropped_process_is_gone() {
        let dir = WorkDir::new().unwrap();
        let log = dir.path("log");
        let sleep = |c: &mut Command| {
            c.arg("600");
        };
        let process = Process::spawn("sleep", Path::new("sleep"), sleep, &log).unwrap();
        let proc = PathBuf::from(format!("/proc/{}", process.pid()));
        assert!(proc.exists());
        drop(process);
        assert!(!proc.exists());
    }

    #[test]
    fn an_early_end_shows_the_log() {
        let dir = WorkDir::new().unwrap();
        let log = dir.path("log");
        let script = |c: &mut Command| {
            c.args(["-c", "echo no such luck >&2; exit 3"]);
        };
        let mut process = Process::spawn("sh", Path::new("sh"), script, &log).unwrap();
        assert_eq!(process.wait(Duration::from_secs(5)).unwrap().code(), Some(3));
        let error = process.check().unwrap_err().to_string();
        assert!(error.contains("no such luck"), "{error}");
    }

    #[test]
    fn terminate_ends_and_cpu_time_is_read() {
        let dir = WorkDir::new().unwrap();
        let spin = |c: &mut Command| {
            c.args(["-c", "while :; do :; done"]);
        };
        let mut process = Process::spawn("spin", Path::new("sh"), spin, &dir.path("log")).unwrap();
        assert!(process.cpu_usage(Duration::from_millis(500)).unwrap() > 0.02);
        assert!(run_time(process.pid()).unwrap() > Duration::from_millis(10));
        process.terminate().unwrap();
        assert!(!process.wait(Duration::from_secs(5)).unwrap().success());
    }

    #[test]
    fn waiting_ends_in_an_error_that_says_for_what() {
        let error = wait_for("Godot", Duration::from_millis(30), || Ok(None::<()>)).unwrap_err();
        assert!(error.to_string().contains("Godot"));
    }
}
