//! JSON-RPC 1.0 as Open vSwitch speaks it (RFC 7047 §4, `lib/jsonrpc.c`): objects follow one another without framing, both
//! sides may ask, and `echo` tells whether the other side lives. Calls block, each with its own deadline.

use memchr::memchr2;
use rustix::io::Errno;
use rustix::net::sockopt::{Timeout, set_socket_timeout};
use rustix::net::{AddressFamily, RecvFlags, SendFlags, Shutdown, SocketAddrUnix, SocketFlags, SocketType};
use serde_json::{Map, Value, json};
use std::fmt;
use std::net::{IpAddr, SocketAddr};
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::str::FromStr;
use std::sync::Arc;
use std::time::{Duration, Instant};

/// Where OVS's daemons keep their sockets and PID files, unless they were told otherwise.
pub const DEFAULT_RUN_DIR: &str = "/run/openvswitch";
/// The port of `tcp:IP` without one (`OVSDB_PORT`).
const DEFAULT_TCP_PORT: u16 = 6640;
/// Bytes asked of the socket at once.
const CHUNK: usize = 64 << 10;
/// A buffer that a long message has left larger than this is given back.
const KEPT_CAPACITY: usize = 1 << 20;

/// How to reach a server, in OVS's syntax of active connection methods (`ovsdb(7)`).
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Remote {
    /// `unix:PATH`; a relative path begins at [`DEFAULT_RUN_DIR`].
    Unix(PathBuf),
    /// `tcp:IP[:PORT]`, an IPv6 address in brackets.
    Tcp(SocketAddr),
}

impl FromStr for Remote {
    type Err = String;

    fn from_str(text: &str) -> Result<Remote, String> {
        match text.split_once(':') {
            Some(("unix", path)) if !path.is_empty() => {
                Ok(Remote::Unix(Path::new(DEFAULT_RUN_DIR).join(path)))
            }
            Some(("tcp", address)) => parse_tcp(address)
                .map(Remote::Tcp)
                .ok_or_else(|| format!("'{text}': tcp:IP:PORT expected, an IPv6 address in brackets")),
            Some(("ssl", _)) => Err(format!("'{text}': TLS is not supported; use unix:PATH or tcp:IP:PORT")),
            _ => Err(format!("'{text}': unix:PATH or tcp:IP:PORT expected")),
        }
    }
}

fn parse_tcp(text: &str) -> Option<SocketAddr> {
    let bare = text.strip_prefix('[').and_then(|rest| rest.strip_suffix(']')).unwrap_or(text);
    text.parse().ok().or_else(|| Some(SocketAddr::new(bare.parse::<IpAddr>().ok()?, DEFAULT_TCP_PORT)))
}

impl fmt::Display for Remote {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Remote::Unix(path) => write!(f, "unix:{}", path.display()),
            Remote::Tcp(address) => write!(f, "tcp:{address}"),
        }
    }
}

/// Why there is no answer; the first field is the server.
#[derive(Debug, thiserror::Error)]
pub enum RpcError {
    /// Nobody listens, or it is not for us.
    #[error("{0}: cannot connect: {1}")]
    Connect(Remote, std::io::Error),
    /// The server ended the connection.
    #[error("{0}: the server closed the connection")]
    Closed(Remote),
    /// The server took too long.
    #[error("{0}: the server does not answer in time")]
    Timeout(Remote),
    /// The connection broke.
    #[error("{0}: {1}")]
    Io(Remote, std::io::Error),
    /// What came is not JSON-RPC, or not what was asked for.
    #[error("{0}: the server sent what is not understood: {1}")]
    Malformed(Remote, String),
    /// More bytes in one message than we take.
    #[error("{0}: the server sent a message of more than {1} bytes")]
    TooLarge(Remote, usize),
    /// The server's own error, on one line. Only after this one can the connection be used further.
    #[error("{0}: {1}")]
    Refused(Remote, String),
}

/// What the server tells without being asked.
#[derive(Clone, Debug, PartialEq)]
pub struct Notification {
    /// What it is about.
    pub method: String,
    /// Its parameters.
    pub params: Value,
}

/// A connection to a server. After an error other than [`RpcError::Refused`] it is to be dropped.
pub struct Connection {
    socket: Arc<OwnedFd>,
    remote: Remote,
    framer: Framer,
    chunk: Vec<u8>,
    limit: usize,
    next_id: u64,
}

/// Ends a connection from another thread: whoever waits on it gets [`RpcError::Closed`] at once.
pub struct Closer(Arc<OwnedFd>);

impl Closer {
    /// Ends the connection.
    pub fn close(&self) {
        // It fails only if the other side has gone already.
        let _ = rustix::net::shutdown(&*self.0, Shutdown::Both);
    }
}

/// A message that is for the caller.
enum Message {
    Notification(Notification),
    Reply { id: Value, result: Value, error: Value },
}

impl Connection {
    /// Connects within `timeout`. No message from the server may have more than `limit` bytes.
    pub fn connect(remote: &Remote, timeout: Duration, limit: usize) -> Result<Connection, RpcError> {
        let connect = || -> rustix::io::Result<OwnedFd> {
            let family = match remote {
                Remote::Unix(_) => AddressFamily::UNIX,
                Remote::Tcp(SocketAddr::V4(_)) => AddressFamily::INET,
                Remote::Tcp(SocketAddr::V6(_)) => AddressFamily::INET6,
            };
            let socket = rustix::net::socket_with(family, SocketType::STREAM, SocketFlags::CLOEXEC, None)?;
            // It bounds connect(2) too: a server that is stopped leaves its backlog full.
            set_socket_timeout(&socket, Timeout::Send, Some(timeout))?;
            match remote {
                Remote::Unix(path) => rustix::net::connect(&socket, &SocketAddrUnix::new(path)?)?,
                Remote::Tcp(address) => rustix::net::connect(&socket, address)?,
            }
            Ok(socket)
        };
        let socket = connect().map_err(|errno| match errno {
            Errno::AGAIN | Errno::INPROGRESS => RpcError::Timeout(remote.clone()),
            _ => RpcError::Connect(remote.clone(), errno.into()),
        })?;
        Ok(Connection {
            socket: Arc::new(socket),
            remote: remote.clone(),
            framer: Framer::default(),
            chunk: vec![0; CHUNK],
            limit,
            next_id: 0,
        })
    }

    /// A handle by which another thread can end the connection.
    pub fn closer(&self) -> Closer {
        Closer(self.socket.clone())
    }

    /// Asks, and waits for the result for at most `timeout`. Notifications that come meanwhile go to `notified`.
    pub fn call(
        &mut self,
        method: &str,
        params: Value,
        timeout: Duration,
        notified: &mut dyn FnMut(Notification),
    ) -> Result<Value, RpcError> {
        let deadline = Instant::now() + timeout;
        let wanted = json!(self.next_id);
        self.next_id += 1;
        self.send(&json!({"method": method, "params": params, "id": wanted}), deadline)?;
        loop {
            match self.receive(deadline)? {
                None => return Err(RpcError::Timeout(self.remote.clone())),
                Some(Message::Notification(notification)) => notified(notification),
                Some(Message::Reply { id, result, error }) if id == wanted => {
                    return match error {
                        Value::Null => Ok(result),
                        error => Err(RpcError::Refused(self.remote.clone(), describe_error(&error))),
                    };
                }
                Some(Message::Reply { id, .. }) => {
                    return Err(self.malformed(format!("an answer to question {id}, which was not asked")));
                }
            }
        }
    }

    /// Waits for a notification for at most `timeout`; none if there was none.
    pub fn notification(&mut self, timeout: Duration) -> Result<Option<Notification>, RpcError> {
        match self.receive(Instant::now() + timeout)? {
            None => Ok(None),
            Some(Message::Notification(notification)) => Ok(Some(notification)),
            Some(Message::Reply { id, .. }) => {
                Err(self.malformed(format!("an answer to question {id}, which was not asked")))
            }
        }
    }

    /// The error of a message that makes no sense, for `reason`.
    pub(super) fn malformed(&self, reason: impl Into<String>) -> RpcError {
        RpcError::Malformed(self.remote.clone(), reason.into())
    }

    /// The next message that is for the caller; none at the deadline. Answers what the server asks.
    fn receive(&mut self, deadline: Instant) -> Result<Option<Message>, RpcError> {
        loop {
            while let Some(mut message) = self.framer.next().map_err(|reason| self.malformed(reason))? {
                let mut take = |key: &str| message.remove(key).unwrap_or_default();
                let (method, params, id) = (take("method"), take("params"), take("id"));
                match (method, id) {
                    (Value::String(method), Value::Null) => {
                        return Ok(Some(Message::Notification(Notification { method, params })));
                    }
                    (Value::String(method), id) => {
                        let known = method == "echo";
                        let (result, error) = if known {
                            (params, Value::Null)
                        } else {
                            (Value::Null, json!("unknown method"))
                        };
                        let answer = json!({"id": id, "result": result, "error": error});
                        self.send(&answer, deadline)?;
                    }
                    (Value::Null, id) if !id.is_null() => {
                        let (result, error) = (take("result"), take("error"));
                        return Ok(Some(Message::Reply { id, result, error }));
                    }
                    _ => return Err(self.malformed("neither a question nor an answer")),
                }
            }
            if self.framer.pending() > self.limit {
                return Err(RpcError::TooLarge(self.remote.clone(), self.limit));
            }
            if !self.read(deadline)? {
                return Ok(None);
            }
        }
    }

    /// Reads what there is; `false` if nothing came until the deadline.
    fn read(&mut self, deadline: Instant) -> Result<bool, RpcError> {
        loop {
            let Some(left) = remaining(deadline) else { return Ok(false) };
            set_socket_timeout(&*self.socket, Timeout::Recv, Some(left)).map_err(|errno| self.io(errno))?;
            match rustix::net::recv(&*self.socket, &mut self.chunk[..], RecvFlags::empty()) {
                Ok((0, _)) => return Err(RpcError::Closed(self.remote.clone())),
                Ok((read, _)) => {
                    self.framer.push(self.chunk.get(..read).unwrap_or_default());
                    return Ok(true);
                }
                Err(Errno::AGAIN) => return Ok(false),
                Err(Errno::INTR) => {}
                Err(errno) => return Err(self.io(errno)),
            }
        }
    }

    fn send(&mut self, message: &Value, deadline: Instant) -> Result<(), RpcError> {
        let text = message.to_string();
        let mut rest = text.as_bytes();
        while !rest.is_empty() {
            let late = || RpcError::Timeout(self.remote.clone());
            let left = remaining(deadline).ok_or_else(late)?;
            set_socket_timeout(&*self.socket, Timeout::Send, Some(left)).map_err(|errno| self.io(errno))?;
            match rustix::net::send(&*self.socket, rest, SendFlags::NOSIGNAL) {
                Ok(sent) => rest = rest.get(sent..).unwrap_or_default(),
                Err(Errno::AGAIN) => return Err(late()),
                Err(Errno::INTR) => {}
                Err(Errno::PIPE) => return Err(RpcError::Closed(self.remote.clone())),
                Err(errno) => return Err(self.io(errno)),
            }
        }
        Ok(())
    }

    fn io(&self, errno: Errno) -> RpcError {
        match errno {
            Errno::CONNRESET => RpcError::Closed(self.remote.clone()),
            _ => RpcError::Io(self.remote.clone(), errno.into()),
        }
    }
}

/// The time until `deadline`, at least the millisecond that a socket's timeout needs; none when it has passed.
fn remaining(deadline: Instant) -> Option<Duration> {
    let left = deadline.saturating_duration_since(Instant::now());
    (!left.is_zero()).then(|| left.max(Duration::from_millis(1)))
}

/// An error as servers send it, on one line: a string (`lib/unixctl.c`), or an object of `error` and `details` (RFC 7047
/// §3.1).
pub(super) fn describe_error(error: &Value) -> String {
    let text = match error {
        Value::String(text) => text.clone(),
        Value::Object(parts) => {
            let part = |key| parts.get(key).and_then(Value::as_str);
            match (part("error"), part("details")) {
                (Some(error), Some(details)) => format!("{error}: {details}"),
                (Some(error), None) => error.to_owned(),
                _ => Value::Object(parts.clone()).to_string(),
            }
        }
        other => other.to_string(),
    };
    text.split(['\n', '\r']).map(str::trim).filter(|line| !line.is_empty()).collect::<Vec<_>>().join("; ")
}

/// Finds the end of each object in a stream of bytes. Each byte is looked at once, however it is fragmented.
#[derive(Default)]
pub(super) struct Framer {
    input: Vec<u8>,
    /// Bytes of `input` that have been looked at; what follows describes the place behind them.
    scanned: usize,
    depth: usize,
    in_string: bool,
    escaped: bool,
}

impl Framer {
    /// Adds what was received.
    pub fn push(&mut self, bytes: &[u8]) {
        self.input.extend_from_slice(bytes);
    }

    /// Bytes of the object that has begun.
    fn pending(&self) -> usize {
        self.input.len()
    }

    /// The next whole object.
    ///
    /// # Errors
    /// What the bytes are instead, in a few words. There is no way on from there.
    pub fn next(&mut self) -> Result<Option<Map<String, Value>>, String> {
        while let Some((&byte, rest)) = self.input.get(self.scanned..).and_then(<[u8]>::split_first) {
            let at = self.scanned;
            self.scanned += 1;
            match byte {
                _ if self.escaped => self.escaped = false,
                b'\\' if self.in_string => self.escaped = true,
                b'"' if self.in_string => self.in_string = false,
                // Dumps are long strings.
                _ if self.in_string => self.scanned += memchr2(b'"', b'\\', rest).unwrap_or(rest.len()),
                b'{' | b'[' => self.depth += 1,
                b'}' | b']' if self.depth == 1 => {
                    let (object, _) = self.input.split_at(at + 1);
                    let object = serde_json::from_slice(object).map_err(|error| error.to_string())?;
                    let mut input = std::mem::take(&mut self.input);
                    input.drain(..=at);
                    input.shrink_to(KEPT_CAPACITY);
                    *self = Framer { input, ..Framer::default() };
                    return Ok(Some(object));
                }
                b'}' | b']' if self.depth > 0 => self.depth -= 1,
                b'"' if self.depth > 0 => self.in_string = true,
                _ if self.depth > 0 || byte.is_ascii_whitespace() => {}
                _ => return Err(format!("byte {byte:#04x} where an object should begin")),
            }
        }
        Ok(None)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ovs::testing::{PATIENCE, serve};
    use std::io::Write;
    use std::os::unix::net::UnixListener;

    fn ignore(_: Notification) {}

    #[test]
    fn remotes_are_read_and_written() {
        for (text, written) in [
            ("unix:/a/db.sock", "unix:/a/db.sock"),
            ("unix:db.sock", "unix:/run/openvswitch/db.sock"),
            ("tcp:127.0.0.1:6641", "tcp:127.0.0.1:6641"),
            ("tcp:127.0.0.1", "tcp:127.0.0.1:6640"),
            ("tcp:[::1]:7000", "tcp:[::1]:7000"),
            ("tcp:[::1]", "tcp:[::1]:6640"),
        ] {
            assert_eq!(text.parse::<Remote>().unwrap().to_string(), written);
        }
        for text in ["", "unix:", "/a/db.sock", "tcp:", "tcp:host:1", "tcp:1.2.3.4:99999", "punix:/a"] {
            let error = text.parse::<Remote>().unwrap_err();
            assert!(error.contains("expected") && !error.contains('\n'), "{error}");
        }
        assert!("ssl:1.2.3.4:6640".parse::<Remote>().unwrap_err().contains("TLS is not supported"));
    }

    #[test]
    fn objects_are_found_however_they_are_cut() {
        let objects =
            [json!({}), json!({"a}\"]": ["{[\\\"", {"b": {}}], "ü": "\u{1}\\"}), json!({"c": [[]]})];
        let stream = format!(" {}\n{}{} ", objects[0], objects[1], objects[2]);
        for size in 1..=stream.len() {
            let mut framer = Framer::default();
            let mut found = Vec::new();
            for piece in stream.as_bytes().chunks(size) {
                framer.push(piece);
                while let Some(object) = framer.next().unwrap() {
                    found.push(Value::Object(object));
                }
            }
            assert_eq!(found, objects, "in pieces of {size}");
        }
        for wrong in ["x{}", "]", "\"{}\"", "[]", "{]", "{\"a\":1}}", "{\"a\":\"\u{1}\"}", "{'a':1}"] {
            let mut framer = Framer::default();
            framer.push(wrong.as_bytes());
            assert!(std::iter::from_fn(|| framer.next().transpose()).any(|next| next.is_err()), "{wrong}");
        }
    }

    #[test]
    fn an_answer_is_awaited_through_notifications_and_questions_of_the_server() {
        let dir = tempfile::tempdir().unwrap();
        let (remote, server) = serve(&dir.path().join("s"), |mut peer| {
            let (params, id) = peer.expect("ask");
            assert_eq!(params, json!([1, "two"]));
            peer.send(json!({"method": "update", "params": [7], "id": null}));
            peer.send(json!({"method": "echo", "params": ["x"], "id": "e"}));
            peer.send(json!({"method": "steal", "params": [], "id": 3}));
            let answer = json!({"id": id, "result": {"a": "}"}, "error": null}).to_string();
            for byte in answer.as_bytes() {
                peer.stream.write_all(&[*byte]).unwrap();
            }
            let echoed = Value::Object(peer.next().unwrap());
            let refused = Value::Object(peer.next().unwrap());
            let (_, id) = peer.expect("ask");
            peer.send(json!({"id": id, "result": null, "error": "no\nand\r\nnever\n"}));
            let (_, id) = peer.expect("ask");
            let error = json!({"error": "bad", "details": "very"});
            peer.send(json!({"id": id, "result": null, "error": error}));
            peer.send(json!({"method": "update", "params": [8]}));
            peer.next();
            (echoed, refused)
        });
        let mut connection = Connection::connect(&remote, PATIENCE, 1000).unwrap();
        let mut heard = Vec::new();
        let result = connection.call("ask", json!([1, "two"]), PATIENCE, &mut |news| heard.push(news.params));
        assert_eq!(result.unwrap(), json!({"a": "}"}));
        assert_eq!(heard, [json!([7])]);
        for reason in ["no; and; never", "bad: very"] {
            let error = connection.call("ask", json!([]), PATIENCE, &mut ignore).unwrap_err();
            assert!(matches!(&error, RpcError::Refused(_, why) if why == reason), "{error}");
        }
        let news = connection.notification(PATIENCE).unwrap().unwrap();
        assert_eq!((news.method.as_str(), news.params), ("update", json!([8])));
        assert_eq!(connection.notification(Duration::from_millis(5)).unwrap(), None);
        drop(connection);
        let (echoed, refused) = server.join().unwrap();
        assert_eq!(echoed, json!({"id": "e", "result": ["x"], "error": null}));
        assert_eq!(refused, json!({"id": 3, "result": null, "error": "unknown method"}));
    }

    /// What a call gives of a server that answers with `text` and leaves, or waits for the client to leave.
    fn call_of(text: String, leaves: bool) -> RpcError {
        let dir = tempfile::tempdir().unwrap();
        let (remote, server) = serve(&dir.path().join("s"), move |mut peer| {
            peer.expect("ask");
            let _ = peer.stream.write_all(text.as_bytes());
            if !leaves {
                peer.next();
            }
        });
        let mut connection = Connection::connect(&remote, PATIENCE, 100_000).unwrap();
        let patience = if leaves { PATIENCE } else { Duration::from_millis(200) };
        let error = connection.call("ask", json!([]), patience, &mut ignore).unwrap_err();
        drop(connection);
        server.join().unwrap();
        assert!(!error.to_string().contains('\n'), "{error}");
        error
    }

    #[test]
    fn bad_servers_are_told_apart() {
        let long = format!("{{\"id\": 0, \"result\": \"{}", "x".repeat(200_000));
        assert!(matches!(call_of(long, true), RpcError::TooLarge(_, 100_000)));
        assert!(matches!(call_of("{\"id\": 0, ".into(), true), RpcError::Closed(_)));
        assert!(matches!(call_of("{\"id\": 0, ".into(), false), RpcError::Timeout(_)));
        for wrong in ["hello", "{\"id\": 77, \"result\": 1}", "{}", "{\"method\": 3, \"id\": 0}"] {
            assert!(matches!(call_of(wrong.into(), true), RpcError::Malformed(..)), "{wrong}");
        }
        let deep = format!("{{\"id\": 0, \"result\": {}{}}}", "[".repeat(5000), "]".repeat(5000));
        assert!(matches!(call_of(deep, true), RpcError::Malformed(..)));
    }

    #[test]
    fn connecting_fails_in_time() {
        let dir = tempfile::tempdir().unwrap();
        let remote = Remote::Unix(dir.path().join("s"));
        let connect = |timeout| Connection::connect(&remote, timeout, 100).map(drop);
        assert!(matches!(connect(PATIENCE), Err(RpcError::Connect(..))));
        // Nobody accepts, so that the backlog fills up.
        let listener = UnixListener::bind(dir.path().join("s")).unwrap();
        rustix::net::listen(&listener, 0).unwrap();
        let _first = Connection::connect(&remote, PATIENCE, 100).unwrap();
        assert!(matches!(connect(Duration::from_millis(50)), Err(RpcError::Timeout(_))));
    }

    #[test]
    fn tcp_works_and_another_thread_can_end_it() {
        let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let remote = Remote::Tcp(listener.local_addr().unwrap());
        let mut connection = Connection::connect(&remote, PATIENCE, 100).unwrap();
        let (_accepted, _) = listener.accept().unwrap();
        let closer = connection.closer();
        let waiter = std::thread::spawn(move || connection.notification(PATIENCE).map(drop));
        closer.close();
        assert!(matches!(waiter.join().unwrap(), Err(RpcError::Closed(_))));
    }
}
