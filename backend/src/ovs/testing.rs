//! Servers that tests make up, on Unix sockets in directories of their own.

use super::jsonrpc::{Framer, Remote};
use serde_json::{Map, Value, json};
use std::io::{Read, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::thread::JoinHandle;
use std::time::Duration;

/// How long anything may take, on a busy machine.
pub const PATIENCE: Duration = Duration::from_secs(20);

/// One connection, as the server sees it.
pub struct Peer {
    pub stream: UnixStream,
    framer: Framer,
}

impl Peer {
    /// The next message; none when the client has gone.
    pub fn next(&mut self) -> Option<Map<String, Value>> {
        loop {
            if let Some(message) = self.framer.next().unwrap() {
                return Some(message);
            }
            let mut chunk = [0; 4096];
            match self.stream.read(&mut chunk) {
                Ok(read) if read > 0 => self.framer.push(&chunk[..read]),
                _ => return None,
            }
        }
    }

    /// The next message, which must be a call of `method`: its parameters and its id.
    pub fn expect(&mut self, method: &str) -> (Value, Value) {
        let mut message = self.next().expect("the client has gone");
        assert_eq!(message["method"], method, "{message:?}");
        (message.remove("params").unwrap(), message.remove("id").unwrap())
    }

    /// Sends a message. That the client has gone is its business.
    pub fn send(&mut self, message: Value) {
        let _ = self.stream.write_all(message.to_string().as_bytes());
    }

    /// Answers the question `id`.
    pub fn answer(&mut self, id: Value, result: Value) {
        self.send(json!({"id": id, "result": result, "error": null}));
    }
}

/// Serves one connection at `path`, which is then removed, on a thread that is joined for its result.
pub fn serve<T: Send + 'static>(
    path: &Path,
    script: impl FnOnce(Peer) -> T + Send + 'static,
) -> (Remote, JoinHandle<T>) {
    let listener = UnixListener::bind(path).unwrap();
    let remote = Remote::Unix(path.to_owned());
    let path = path.to_owned();
    let server = std::thread::spawn(move || {
        let (stream, _) = listener.accept().unwrap();
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
        stream.set_write_timeout(Some(PATIENCE)).unwrap();
        std::fs::remove_file(path).unwrap();
        script(Peer { stream, framer: Framer::default() })
    });
    (remote, server)
}
