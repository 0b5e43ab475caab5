//! The command's side of the control socket.

use super::protocol::Request;
use crate::socket_file::group_name;
use serde::de::DeserializeOwned;
use serde_json::Value;
use std::io::{self, BufRead, BufReader, ErrorKind, Write};
use std::os::unix::fs::MetadataExt;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::Duration;

/// Why there is no answer: one line that says what to do.
#[derive(Debug, thiserror::Error)]
pub enum ClientError {
    /// Nobody listens.
    #[error("no daemon answers at {}: is pointworkd running? (systemctl status pointworkd)", .0.display())]
    NoDaemon(PathBuf),
    /// The socket is not ours to use.
    #[error("no permission to use {}: it needs root or membership in group '{}'", .0.display(), .1)]
    Permission(PathBuf, String),
    /// No answer in time.
    #[error("the daemon at {} gave no answer in {} seconds", .0.display(), .1.as_secs())]
    Timeout(PathBuf, Duration),
    /// The connection broke, or something else is at the path.
    #[error("{}: {}", .0.display(), .1)]
    Io(PathBuf, io::Error),
    /// The answer makes no sense.
    #[error("the daemon at {} answered what this pointwork does not understand ({}): are both of the same version?", .0.display(), .1)]
    Malformed(PathBuf, String),
    /// The daemon refuses.
    #[error("{0}")]
    Refused(String),
}

/// Asks the daemon at `path` and returns its answer, the wire's object. `timeout` is for each wait, not for the whole.
pub fn ask(path: &Path, request: &Request, timeout: Duration) -> Result<Value, ClientError> {
    let failed = |error: io::Error| match error.kind() {
        ErrorKind::NotFound | ErrorKind::ConnectionRefused => ClientError::NoDaemon(path.to_owned()),
        ErrorKind::PermissionDenied => ClientError::Permission(path.to_owned(), group_needed(path)),
        ErrorKind::WouldBlock | ErrorKind::TimedOut => ClientError::Timeout(path.to_owned(), timeout),
        _ => ClientError::Io(path.to_owned(), error),
    };
    let malformed = |reason: String| ClientError::Malformed(path.to_owned(), reason);
    let line = request.to_line().map_err(|error| malformed(error.to_string()))?;
    let mut stream = UnixStream::connect(path).map_err(failed)?;
    stream.set_read_timeout(Some(timeout)).map_err(failed)?;
    stream.set_write_timeout(Some(timeout)).map_err(failed)?;
    // A daemon that turns us away may have closed already and left its reason to be read.
    let sent = stream.write_all(line.as_bytes());
    let mut answer = Vec::new();
    let read = BufReader::new(&stream).read_until(b'\n', &mut answer);
    if answer.last() != Some(&b'\n') {
        sent.and(read.map(drop)).map_err(failed)?;
        let early =
            io::Error::new(ErrorKind::UnexpectedEof, "the daemon closed the connection without an answer");
        return Err(ClientError::Io(path.to_owned(), early));
    }
    let value: Value = serde_json::from_slice(&answer).map_err(|error| malformed(error.to_string()))?;
    match value.get("error") {
        Some(Value::String(reason)) => Err(ClientError::Refused(reason.clone())),
        Some(other) => Err(malformed(other.to_string())),
        None => Ok(value),
    }
}

/// [`ask`] with the answer as its type of [`super::protocol`].
pub fn call<T: DeserializeOwned>(
    path: &Path,
    request: &Request,
    timeout: Duration,
) -> Result<T, ClientError> {
    let value = ask(path, request, timeout)?;
    serde_json::from_value(value).map_err(|error| ClientError::Malformed(path.to_owned(), error.to_string()))
}

/// The group of the socket, or of the nearest directory above it that can be looked at.
fn group_needed(path: &Path) -> String {
    let group = path.ancestors().find_map(|place| std::fs::metadata(place).ok()).map(|found| found.gid());
    group.map_or_else(|| "?".to_owned(), group_name)
}
