//! The daemon's side of the control socket, driven by its event loop.
//!
//! Nothing here blocks. A client is reading, waiting or writing: it sends a line, waits for its answer, and takes the answer
//! before its next line is looked at. What a client does wrong costs that client its connection: a line that is too long
//! or no request gets an error and the end; one that sends no full line or does not take its answer in time is closed.

use super::protocol::{Request, Response};
use crate::socket_file::{self, ListenError, SocketFile};
use event_manager::{EventOps, EventSet, Events, MutEventSubscriber};
use serde::Serialize;
use std::collections::HashMap;
use std::io::{self, ErrorKind, Read, Write};
use std::os::fd::{AsRawFd, RawFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::time::{Duration, Instant};
use vmm_sys_util::timerfd::TimerFd;

/// How long the server lets a moment pass before it asks a [`Reply::Later`] again.
const POLL: Duration = Duration::from_millis(2);
/// How long no clients are accepted after the system refused one, for want of file descriptors.
const ACCEPT_PAUSE: Duration = Duration::from_millis(500);

/// An answer, or why there is none in one line.
pub type Answer = Result<Response, String>;

/// What a handler returns.
pub enum Reply {
    /// The answer.
    Now(Answer),
    /// Asked every few milliseconds, with the time, until it has the answer. It must not block, has to give up by itself
    /// when it takes too long, and is asked to its end even if the client has gone.
    Later(Later),
}

/// An answer that is not there yet.
pub type Later = Box<dyn FnMut(Instant) -> Option<Answer> + Send>;

impl Reply {
    /// An answer that is there.
    pub fn ok(response: Response) -> Reply {
        Reply::Now(Ok(response))
    }

    /// A refusal in one line.
    pub fn error(reason: impl ToString) -> Reply {
        Reply::Now(Err(reason.to_string()))
    }
}

/// Answers requests; called on the event loop's thread, so it may not take long.
pub trait ControlHandler {
    /// Carries out a request.
    fn handle(&mut self, request: Request) -> Reply;
}

impl<F: FnMut(Request) -> Reply> ControlHandler for F {
    fn handle(&mut self, request: Request) -> Reply {
        self(request)
    }
}

/// What a client may take from the daemon.
#[derive(Clone, Copy, Debug)]
pub struct Limits {
    /// Bytes of a request, newline included.
    pub request: usize,
    /// Bytes of an answer.
    pub response: usize,
    /// Connections, and answers that are still being waited for.
    pub clients: usize,
    /// Time for a client to send a full line, and time to take an answer.
    pub patience: Duration,
}

impl Default for Limits {
    fn default() -> Limits {
        Limits { request: 64 << 10, response: 64 << 20, clients: 32, patience: Duration::from_secs(10) }
    }
}

/// The control socket as a subscriber of the daemon's event manager. Dropped, it removes the socket file.
pub struct ControlServer<H> {
    handler: H,
    listener: UnixListener,
    _file: SocketFile,
    timer: TimerFd,
    limits: Limits,
    clients: HashMap<RawFd, Client>,
    /// Answers whose clients have gone.
    orphans: Vec<Later>,
    /// Until when no clients are accepted.
    paused: Option<Instant>,
    /// When the timer will fire.
    armed: Option<Instant>,
}

struct Client {
    stream: UnixStream,
    phase: Phase,
    /// What was read and not answered.
    input: Vec<u8>,
    /// How much of `input` is known to have no newline.
    scanned: usize,
    /// The peer sends no more.
    eof: bool,
    deadline: Instant,
    interest: EventSet,
}

enum Phase {
    Reading,
    Waiting(Later),
    Writing { answer: Vec<u8>, sent: usize, close: bool },
}

impl<H: ControlHandler> ControlServer<H> {
    /// Listens at `path` with mode 0660 for `handler`; `group` is a name of `/etc/group` or a number.
    pub fn bind(path: &Path, group: Option<&str>, limits: Limits, handler: H) -> Result<Self, ListenError> {
        let failed = |what, error| ListenError::Io(path.to_owned(), what, error);
        let (listener, file) = socket_file::listen(path, 0o660, group)?;
        listener.set_nonblocking(true).map_err(|error| failed("making it non-blocking", error))?;
        let timer = TimerFd::new().map_err(|error| failed("timerfd", error.into()))?;
        Ok(ControlServer {
            handler,
            listener,
            _file: file,
            timer,
            limits,
            clients: HashMap::new(),
            orphans: Vec::new(),
            paused: None,
            armed: None,
        })
    }

    fn accept(&mut self, now: Instant, ops: &mut EventOps) {
        // The listener stays readable while more wait, so others get their turn in between.
        for _ in 0..self.limits.clients {
            let stream = match self.listener.accept() {
                Ok((stream, _)) => stream,
                Err(error) if error.kind() == ErrorKind::WouldBlock => return,
                Err(error)
                    if matches!(error.kind(), ErrorKind::Interrupted | ErrorKind::ConnectionAborted) =>
                {
                    continue;
                }
                Err(error) => {
                    log::warn!("control socket: accept failed: {error}");
                    // The connection stays in the queue: without a pause the loop would spin on it.
                    let _ = ops.modify(Events::new(&self.listener, EventSet::empty()));
                    self.paused = Some(now + ACCEPT_PAUSE);
                    return;
                }
            };
            if stream.set_nonblocking(true).is_err() {
                continue;
            }
            if self.is_full() {
                // Some may have gone and their events wait behind this one.
                self.drive_readers(now, ops);
            }
            if self.is_full() {
                log::info!("control socket: a client is turned away, {} are connected", self.clients.len());
                let answer = error_line("too many clients are connected, try again later");
                let _ = (&stream).write_all(&answer);
                continue;
            }
            let interest = EventSet::IN;
            if let Err(error) = ops.add(Events::new(&stream, interest)) {
                log::warn!("control socket: a client cannot be watched: {error}");
                continue;
            }
            let client = Client {
                phase: Phase::Reading,
                input: Vec::new(),
                scanned: 0,
                eof: false,
                deadline: now + self.limits.patience,
                interest,
                stream,
            };
            self.clients.insert(client.stream.as_raw_fd(), client);
        }
    }

    fn is_full(&self) -> bool {
        self.clients.len() + self.orphans.len() >= self.limits.clients
    }

    /// Looks at each client that may send, without waiting for its event.
    fn drive_readers(&mut self, now: Instant, ops: &mut EventOps) {
        let reads = |client: &Client| matches!(client.phase, Phase::Reading);
        let fds: Vec<RawFd> =
            self.clients.iter().filter(|(_, client)| reads(client)).map(|(&fd, _)| fd).collect();
        for fd in fds {
            if let Some(mut client) = self.clients.remove(&fd) {
                let keep = self.drive(&mut client, EventSet::IN, now);
                self.settle(client, keep, ops);
            }
        }
    }

    /// Lets a client do its next step; false if it is over.
    fn drive(&mut self, client: &mut Client, ready: EventSet, now: Instant) -> bool {
        let gone = ready.intersects(EventSet::HANG_UP | EventSet::ERROR);
        match &client.phase {
            Phase::Reading => {
                // One request at each event, so that a client with many does not hold up the others.
                if !client.has_line() && !client.read(self.limits.request) {
                    return false;
                }
                match client.take_line(self.limits.request) {
                    Line::None => !client.eof,
                    Line::TooLong => {
                        log::info!("control socket: a client is closed, its request is too long");
                        let reason = format!("the request is longer than {} bytes", self.limits.request);
                        client.answer(Err(reason), true, now, &self.limits)
                    }
                    Line::Full(line) => match Request::parse(&line) {
                        Err(reason) => {
                            log::info!("control socket: a client is closed, its request is malformed");
                            client.answer(
                                Err(format!("malformed request: {reason}")),
                                true,
                                now,
                                &self.limits,
                            )
                        }
                        Ok(request) => match self.handler.handle(request) {
                            Reply::Now(answer) => client.answer(answer, false, now, &self.limits),
                            Reply::Later(later) => {
                                client.phase = Phase::Waiting(later);
                                true
                            }
                        },
                    },
                }
            }
            Phase::Waiting(_) => !gone,
            Phase::Writing { .. } => !gone && client.write(now, &self.limits),
        }
    }

    /// Puts a client back after it was driven, or ends it.
    fn settle(&mut self, mut client: Client, keep: bool, ops: &mut EventOps) {
        let wanted = match &client.phase {
            // The next line is here already, and so no event would tell of it: a writable socket does.
            Phase::Reading if client.has_line() => EventSet::OUT,
            Phase::Reading => EventSet::IN,
            Phase::Waiting(_) => EventSet::empty(),
            Phase::Writing { .. } => EventSet::OUT,
        };
        let mut keep = keep;
        if keep && wanted != client.interest {
            keep = ops.modify(Events::new(&client.stream, wanted)).is_ok();
            client.interest = wanted;
        }
        if keep {
            self.clients.insert(client.stream.as_raw_fd(), client);
            return;
        }
        let _ = ops.remove(Events::empty(&client.stream));
        if let Phase::Waiting(later) = client.phase {
            self.orphans.push(later);
        }
    }

    /// The timer fired: asks for answers, closes who is too slow, accepts again after a pause.
    fn tick(&mut self, now: Instant, ops: &mut EventOps) {
        self.armed = None;
        self.orphans.retain_mut(|later| later(now).is_none());
        let fds: Vec<RawFd> = self.clients.keys().copied().collect();
        for fd in fds {
            let Some(mut client) = self.clients.remove(&fd) else { continue };
            let keep = match &mut client.phase {
                Phase::Waiting(later) => match later(now) {
                    Some(answer) => client.answer(answer, false, now, &self.limits),
                    None => true,
                },
                Phase::Reading | Phase::Writing { .. } => {
                    let slow = now >= client.deadline;
                    if slow {
                        log::info!("control socket: a client is closed, it is too slow");
                    }
                    !slow
                }
            };
            self.settle(client, keep, ops);
        }
        if self.paused.is_some_and(|until| now >= until) {
            self.paused = None;
            let _ = ops.modify(Events::new(&self.listener, EventSet::IN));
        }
    }

    /// Sets the timer to what comes next.
    fn arm(&mut self, now: Instant) {
        let of_client = |client: &Client| match client.phase {
            Phase::Waiting(_) => now + POLL,
            Phase::Reading | Phase::Writing { .. } => client.deadline,
        };
        let orphan = (!self.orphans.is_empty()).then_some(now + POLL);
        let next = self.clients.values().map(of_client).chain(orphan).chain(self.paused).min();
        let set = match next {
            // An earlier time than needed does no harm: the tick sets the timer again.
            Some(at) if self.armed.is_some_and(|armed| armed <= at) => return,
            Some(at) => {
                let delay = at.saturating_duration_since(now).max(Duration::from_millis(1));
                self.timer.reset(delay, None)
            }
            None => self.timer.clear(),
        };
        match set {
            Ok(()) => self.armed = next,
            Err(error) => log::warn!("control socket: the timer cannot be set: {error}"),
        }
    }
}

impl<H: ControlHandler> MutEventSubscriber for ControlServer<H> {
    fn init(&mut self, ops: &mut EventOps) {
        for (what, fd) in [("listener", self.listener.as_raw_fd()), ("timer", self.timer.as_raw_fd())] {
            if let Err(error) = ops.add(Events::new_raw(fd, EventSet::IN)) {
                log::error!("control socket: its {what} cannot be watched: {error}");
            }
        }
    }

    fn process(&mut self, events: Events, ops: &mut EventOps) {
        let (fd, now) = (events.fd(), Instant::now());
        if fd == self.timer.as_raw_fd() {
            // The timer is never read, which could block: setting it again or clearing it takes its event away.
            self.tick(now, ops);
        } else if fd == self.listener.as_raw_fd() {
            self.accept(now, ops);
        } else if let Some(mut client) = self.clients.remove(&fd) {
            let keep = self.drive(&mut client, events.event_set(), now);
            self.settle(client, keep, ops);
        }
        self.arm(now);
    }
}

/// What [`Client::take_line`] finds.
enum Line {
    None,
    Full(Vec<u8>),
    TooLong,
}

impl Client {
    fn has_line(&self) -> bool {
        self.input.get(self.scanned) == Some(&b'\n')
    }

    /// Reads until there is a line, too much, or nothing more; false if the connection broke.
    fn read(&mut self, limit: usize) -> bool {
        let mut chunk = [0; 4096];
        while !self.has_line() && self.input.len() <= limit {
            match self.stream.read(&mut chunk) {
                Ok(0) => {
                    self.eof = true;
                    return true;
                }
                Ok(n) => {
                    self.input.extend_from_slice(&chunk[..n]);
                    self.scan();
                }
                Err(error) if error.kind() == ErrorKind::WouldBlock => return true,
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(_) => return false,
            }
        }
        true
    }

    /// Moves `scanned` to the next newline, or to the end.
    fn scan(&mut self) {
        let rest = &self.input[self.scanned..];
        self.scanned += rest.iter().position(|&b| b == b'\n').unwrap_or(rest.len());
    }

    fn take_line(&mut self, limit: usize) -> Line {
        if self.scanned >= limit {
            return Line::TooLong;
        }
        if !self.has_line() {
            return Line::None;
        }
        let rest = self.input.split_off(self.scanned + 1);
        let line = std::mem::replace(&mut self.input, rest);
        self.scanned = 0;
        self.scan();
        Line::Full(line)
    }

    /// Starts to write an answer; `close` ends the connection after it. False if the connection is over.
    fn answer(&mut self, answer: Answer, close: bool, now: Instant, limits: &Limits) -> bool {
        self.phase = Phase::Writing { answer: to_line(answer, limits.response), sent: 0, close };
        self.deadline = now + limits.patience;
        self.write(now, limits)
    }

    /// Writes what the socket takes; false if the connection is over.
    fn write(&mut self, now: Instant, limits: &Limits) -> bool {
        let Phase::Writing { answer, sent, close } = &mut self.phase else { return true };
        while *sent < answer.len() {
            match self.stream.write(&answer[*sent..]) {
                Ok(0) => return false,
                Ok(n) => *sent += n,
                Err(error) if error.kind() == ErrorKind::WouldBlock => return true,
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(_) => return false,
            }
        }
        if *close || (self.eof && !self.has_line()) {
            return false;
        }
        self.phase = Phase::Reading;
        self.deadline = now + limits.patience;
        true
    }
}

/// An answer as a line of at most `limit` bytes.
fn to_line(answer: Answer, limit: usize) -> Vec<u8> {
    let response = match answer {
        Ok(response) => response,
        Err(reason) => return error_line(&reason),
    };
    let mut line = Bounded { bytes: Vec::new(), limit };
    match serde_json::to_writer(&mut line, &response)
        .map_err(io::Error::from)
        .and_then(|()| line.write_all(b"\n"))
    {
        Ok(()) => line.bytes,
        Err(error) if error.kind() == ErrorKind::FileTooLarge => error_line(&format!(
            "the answer is longer than {limit} bytes: ask for less, a single port for example"
        )),
        Err(error) => error_line(&format!("the answer cannot be written: {error}")),
    }
}

fn error_line(reason: &str) -> Vec<u8> {
    #[derive(Serialize)]
    struct Refusal {
        error: String,
    }
    let refusal = Refusal { error: reason.replace(['\n', '\r'], " ") };
    // A struct of one string has no way to fail.
    let mut line = serde_json::to_vec(&refusal).unwrap_or_default();
    line.push(b'\n');
    line
}

/// A buffer that refuses to grow beyond its limit.
struct Bounded {
    bytes: Vec<u8>,
    limit: usize,
}

impl Write for Bounded {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        if bytes.len() > self.limit - self.bytes.len() {
            return Err(ErrorKind::FileTooLarge.into());
        }
        self.bytes.extend_from_slice(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}
