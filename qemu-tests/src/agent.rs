//! The channel into a guest: commands by number, answered in any order (`scripts/guest-init` is the other end).

use std::collections::HashMap;
use std::io::{BufRead, BufReader, Read, Write};
use std::os::unix::net::UnixStream;
use std::sync::mpsc::{self, Receiver, RecvTimeoutError, Sender};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};

use crate::host::check_interrupt;

/// The longest that a guest may take to take in a command.
const SEND_DEADLINE: Duration = Duration::from_secs(30);

/// What a command in a guest left.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Output {
    /// Exit status, 128 + the signal's number if one ended it.
    pub status: i32,
    /// Standard output.
    pub stdout: String,
    /// Standard error.
    pub stderr: String,
}

impl Output {
    /// Standard output if the command succeeded, else an error with all that it said.
    pub fn success(self) -> Result<String> {
        ensure!(self.status == 0, "status {}: {}{}", self.status, self.stderr, self.stdout);
        Ok(self.stdout)
    }
}

/// The harness's end of the channel. It outlives reboots of the guest.
#[derive(Debug)]
pub struct Agent {
    shared: Arc<Shared>,
    stream: Mutex<UnixStream>,
}

#[derive(Debug, Default)]
struct Shared {
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Debug, Default)]
struct State {
    /// How often the guest's agent has said that it is ready.
    boots: u64,
    next: u64,
    waiting: HashMap<u64, Sender<Output>>,
    closed: bool,
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, State> {
        // The state is consistent between any two statements.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Agent {
    /// Takes over the connection that QEMU made for the guest's port.
    pub fn new(stream: UnixStream) -> Result<Self> {
        // A guest that no longer reads must not hold up who has a deadline.
        stream.set_write_timeout(Some(SEND_DEADLINE))?;
        let shared = Arc::new(Shared::default());
        let (reader, listener) = (BufReader::new(stream.try_clone()?), Arc::clone(&shared));
        thread::spawn(move || {
            // The end of the stream is the end of QEMU, however it came.
            let _ = listen(reader, &listener);
            let mut state = listener.lock();
            state.closed = true;
            state.waiting.clear();
            listener.changed.notify_all();
        });
        Ok(Self { shared, stream: Mutex::new(stream) })
    }

    /// How often the guest has come up so far.
    pub fn boots(&self) -> u64 {
        self.shared.lock().boots
    }

    /// Waits until the guest has come up more than `before` times.
    pub fn wait_boot(&self, before: u64, deadline: Duration) -> Result<()> {
        let start = Instant::now();
        let mut state = self.shared.lock();
        while state.boots <= before {
            check_interrupt()?;
            ensure!(!state.closed, "QEMU has ended");
            ensure!(start.elapsed() < deadline, "the guest was not up within {} s", deadline.as_secs());
            let step = Duration::from_millis(50);
            state = self.shared.changed.wait_timeout(state, step).unwrap_or_else(PoisonError::into_inner).0;
        }
        Ok(())
    }

    /// The guest has come here from where it was `from`'s, and was up there. What ran there is not heard of.
    pub fn go_on_from(&self, from: &Agent) {
        let (boots, next) = {
            let state = from.shared.lock();
            (state.boots, state.next)
        };
        let mut state = self.shared.lock();
        (state.boots, state.next) = (boots, next);
    }

    /// Starts `command`, one line for the guest's shell.
    pub fn spawn(&self, command: &str) -> Result<Job<'_>> {
        ensure!(!command.contains('\n'), "a command is one line");
        let (sender, output) = mpsc::channel();
        let id = {
            let mut state = self.shared.lock();
            ensure!(!state.closed, "QEMU has ended");
            ensure!(state.boots > 0, "the guest is not up");
            state.next += 1;
            let id = state.next;
            state.waiting.insert(id, sender);
            id
        };
        self.send(&format!("run {id} {command}\n"))?;
        Ok(Job { agent: self, id, command: command.into(), output })
    }

    /// Runs `command` to its end; one that has not ended within `deadline` is killed, and an error.
    pub fn run(&self, command: &str, deadline: Duration) -> Result<Output> {
        self.spawn(command)?.wait(deadline)
    }

    fn send(&self, line: &str) -> Result<()> {
        let mut stream = self.stream.lock().unwrap_or_else(PoisonError::into_inner);
        stream.write_all(line.as_bytes()).context("the channel into the guest")
    }
}

/// A command that runs in a guest.
#[derive(Debug)]
pub struct Job<'a> {
    agent: &'a Agent,
    id: u64,
    command: String,
    output: Receiver<Output>,
}

impl Job<'_> {
    /// Waits for the end of the command; after `deadline` it is killed, and an error.
    pub fn wait(self, deadline: Duration) -> Result<Output> {
        let start = Instant::now();
        loop {
            match self.output.recv_timeout(Duration::from_millis(100)) {
                Ok(output) => return Ok(output),
                Err(RecvTimeoutError::Disconnected) => bail!("the guest went away during `{}`", self.command),
                Err(RecvTimeoutError::Timeout) => check_interrupt()?,
            }
            if start.elapsed() >= deadline {
                self.kill()?;
                bail!("`{}` had not ended after {} s", self.command, deadline.as_secs_f32());
            }
        }
    }

    /// Whether the command still runs.
    pub fn running(&self) -> bool {
        self.agent.shared.lock().waiting.contains_key(&self.id)
    }

    /// Kills the command with all its children.
    pub fn kill(&self) -> Result<()> {
        self.agent.send(&format!("kill {}\n", self.id))
    }

    /// Asks the command to end with SIGINT (`ping` then prints its summary) and waits for that.
    pub fn interrupt(self, deadline: Duration) -> Result<Output> {
        self.agent.send(&format!("stop {}\n", self.id))?;
        self.wait(deadline)
    }
}

/// Hands answers to those who wait for them, until the stream ends.
fn listen(mut reader: BufReader<UnixStream>, shared: &Shared) -> Result<()> {
    let mut line = Vec::new();
    loop {
        line.clear();
        if reader.read_until(b'\n', &mut line)? == 0 {
            return Ok(());
        }
        let text = String::from_utf8_lossy(&line);
        let words: Vec<&str> = text.split_whitespace().collect();
        match words[..] {
            ["ready", _boot_id] => {
                let mut state = shared.lock();
                state.boots += 1;
                // What ran before the reboot has no end to report.
                state.waiting.clear();
                shared.changed.notify_all();
            }
            ["done", id, status, out, err] => {
                let stdout = read_text(&mut reader, out.parse()?)?;
                let stderr = read_text(&mut reader, err.parse()?)?;
                if let Some(sender) = shared.lock().waiting.remove(&id.parse()?) {
                    // Nobody may be waiting any more.
                    let _ = sender.send(Output { status: status.parse()?, stdout, stderr });
                }
            }
            // What a reset cut off.
            _ => {}
        }
    }
}

fn read_text(reader: &mut impl Read, bytes: usize) -> Result<String> {
    let mut buffer = vec![0; bytes];
    reader.read_exact(&mut buffer)?;
    Ok(String::from_utf8_lossy(&buffer).into_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pair() -> (Agent, BufReader<UnixStream>) {
        let (ours, theirs) = UnixStream::pair().unwrap();
        let agent = Agent::new(ours).unwrap();
        (&theirs).write_all(b"garbage\nready 1\n").unwrap();
        agent.wait_boot(0, Duration::from_secs(5)).unwrap();
        (agent, BufReader::new(theirs))
    }

    #[test]
    fn answers_come_in_any_order() {
        let (agent, mut guest) = pair();
        let (first, second) = (agent.spawn("one").unwrap(), agent.spawn("two").unwrap());
        let mut lines = [String::new(), String::new()];
        for line in &mut lines {
            guest.read_line(line).unwrap();
        }
        assert_eq!(lines, ["run 1 one\n", "run 2 two\n"]);
        guest.get_mut().write_all(b"done 2 0 3 0\na\nbdone 1 4 0 4\noops").unwrap();
        let failed = first.wait(Duration::from_secs(5)).unwrap();
        assert_eq!(failed, Output { status: 4, stdout: String::new(), stderr: "oops".into() });
        assert!(failed.success().unwrap_err().to_string().contains("oops"));
        assert_eq!(second.wait(Duration::from_secs(5)).unwrap().success().unwrap(), "a\nb");
    }

    #[test]
    fn a_deadline_kills_and_a_reboot_fails_what_runs() {
        let (agent, mut guest) = pair();
        let error = agent.run("sleep", Duration::from_millis(10)).unwrap_err();
        assert!(error.to_string().contains("`sleep` had not ended"), "{error}");
        let mut line = String::new();
        guest.read_line(&mut line).unwrap();
        line.clear();
        guest.read_line(&mut line).unwrap();
        assert_eq!(line, "kill 1\n");
        let job = agent.spawn("iperf3").unwrap();
        guest.get_mut().write_all(b"\nready 2\n").unwrap();
        assert!(job.wait(Duration::from_secs(5)).unwrap_err().to_string().contains("went away"));
        assert_eq!(agent.boots(), 2);
    }
}
