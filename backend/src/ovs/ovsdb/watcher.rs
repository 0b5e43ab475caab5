//! The thread that keeps a snapshot of the database up to date.

use super::rows::{Rows, monitor_requests};
use super::{DATABASE, MESSAGE_LIMIT, Snapshot};
use crate::ovs::jsonrpc::{Closer, Connection, Notification, Remote, RpcError};
use crate::wake::AbortOnPanic;
use serde_json::{Value, json};
use std::convert::Infallible;
use std::io;
use std::sync::{Arc, Condvar, Mutex, MutexGuard};
use std::thread::JoinHandle;
use std::time::Duration;

/// How long to connect, and to be given the schema and all rows.
const ANSWER: Duration = Duration::from_secs(5);
/// After so long a silence the server is asked whether it lives, and has [`PROBE`] to say so.
const SILENCE: Duration = Duration::from_secs(1);
/// See [`SILENCE`].
const PROBE: Duration = Duration::from_secs(3);
/// The pause after the first failure; each further one has twice the pause, up to [`LAST_PAUSE`].
const FIRST_PAUSE: Duration = Duration::from_millis(100);
/// See [`FIRST_PAUSE`].
const LAST_PAUSE: Duration = Duration::from_secs(2);

/// What has happened to the database.
#[derive(Clone, Debug, PartialEq)]
pub enum Event {
    /// What it says now.
    Snapshot(Arc<Snapshot>),
    /// It cannot be read, and why in one line. Told once; the next event is a snapshot.
    Lost(String),
}

/// A thread that follows the database, connecting again for as long as it must. It ends when this is dropped.
pub struct Watcher {
    shared: Arc<Shared>,
    thread: Option<JoinHandle<()>>,
}

/// How the thread is ended.
#[derive(Default)]
struct Shared {
    end: Mutex<End>,
    changed: Condvar,
}

#[derive(Default)]
struct End {
    wanted: bool,
    connection: Option<Closer>,
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, End> {
        self.end.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
    }
}

impl Watcher {
    /// Follows the database at `remote`. `tell` is called on the thread: with the first snapshot, with each that differs
    /// from the one before, and when the server is lost. It must not wait for whoever drops the watcher.
    ///
    /// # Errors
    /// The system gives no thread.
    pub fn spawn(remote: Remote, tell: Box<dyn Fn(Event) + Send>) -> io::Result<Watcher> {
        let shared = Arc::new(Shared::default());
        let run = {
            let shared = shared.clone();
            move || {
                let _abort = AbortOnPanic("the watcher of the database");
                follow(&remote, &shared, &tell);
            }
        };
        let thread = std::thread::Builder::new().name("ovsdb".into()).spawn(run)?;
        Ok(Watcher { shared, thread: Some(thread) })
    }
}

impl Drop for Watcher {
    fn drop(&mut self) {
        let mut end = self.shared.lock();
        end.wanted = true;
        if let Some(connection) = end.connection.take() {
            connection.close();
        }
        drop(end);
        self.shared.changed.notify_all();
        if let Some(thread) = self.thread.take() {
            // It has not panicked: that would have ended the process.
            let _ = thread.join();
        }
    }
}

/// Connects and follows, again and again, until the end is wanted.
fn follow(remote: &Remote, shared: &Shared, tell: &dyn Fn(Event)) {
    let mut pause = FIRST_PAUSE;
    let mut lost = false;
    loop {
        let mut connected = false;
        let Err(error) = session(remote, shared, &mut |snapshot| {
            connected = true;
            tell(Event::Snapshot(snapshot));
        });
        if connected {
            (lost, pause) = (false, FIRST_PAUSE);
        }
        if shared.lock().wanted {
            return;
        }
        if !lost {
            lost = true;
            tell(Event::Lost(error.to_string()));
        }
        let end = shared.lock();
        let waited = shared.changed.wait_timeout_while(end, pause, |end| !end.wanted);
        let (mut end, _) = waited.unwrap_or_else(|poisoned| poisoned.into_inner());
        if end.wanted {
            return;
        }
        end.connection = None;
        pause = (pause * 2).min(LAST_PAUSE);
    }
}

/// Follows one connection until it ends.
fn session(
    remote: &Remote,
    shared: &Shared,
    tell: &mut dyn FnMut(Arc<Snapshot>),
) -> Result<Infallible, RpcError> {
    let mut connection = Connection::connect(remote, ANSWER, MESSAGE_LIMIT)?;
    {
        let mut end = shared.lock();
        end.connection = Some(connection.closer());
        if end.wanted {
            return Err(RpcError::Closed(remote.clone()));
        }
    }
    // Updates come only after the answer to `monitor`.
    let mut early = |_| {};
    let schema = connection.call("get_schema", json!([DATABASE]), ANSWER, &mut early)?;
    let monitor = json!([DATABASE, null, monitor_requests(&schema)]);
    let initial = connection.call("monitor", monitor, ANSWER, &mut early)?;
    let mut rows = Rows::default();
    rows.apply(initial).map_err(|reason| connection.malformed(reason))?;
    let mut last = Arc::new(Snapshot::new(&rows));
    tell(last.clone());
    loop {
        let mut news: Vec<Notification> = connection.notification(SILENCE)?.into_iter().collect();
        if news.is_empty() {
            connection.call("echo", json!([]), PROBE, &mut |notification| news.push(notification))?;
        }
        // Changes that have come in one piece make one snapshot.
        while let Some(more) = connection.notification(Duration::ZERO)? {
            news.push(more);
        }
        for Notification { method, params } in news {
            if let ("update", Value::Array(mut params)) = (method.as_str(), params)
                && let Some(updates) = params.pop()
            {
                rows.apply(updates).map_err(|reason| connection.malformed(reason))?;
            }
        }
        let snapshot = Snapshot::new(&rows);
        if snapshot != *last {
            last = Arc::new(snapshot);
            tell(last.clone());
        }
    }
}
