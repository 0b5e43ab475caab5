//! A control server on a thread with a handler of the test.

use backend::control::protocol::Request;
use backend::control::server::{ControlServer, Limits, Reply};
use event_manager::{EventManager, SubscriberOps};
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::JoinHandle;

/// Serves until dropped.
pub struct FakeDaemon {
    pub path: PathBuf,
    /// Events that its loop has seen.
    #[allow(dead_code, reason = "each test program uses its part of this module")]
    pub events: Arc<AtomicU64>,
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
    _dir: tempfile::TempDir,
}

impl FakeDaemon {
    pub fn start(limits: Limits, handler: impl FnMut(Request) -> Reply + Send + 'static) -> FakeDaemon {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("control.sock");
        let server = ControlServer::bind(&path, None, limits, handler).unwrap();
        let (stop, events) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicU64::new(0)));
        let (stopped, count) = (stop.clone(), events.clone());
        let thread = std::thread::spawn(move || {
            let mut manager = EventManager::new().unwrap();
            manager.add_subscriber(server);
            while !stopped.load(Ordering::Relaxed) {
                let seen = manager.run_with_timeout(20).unwrap();
                count.fetch_add(seen as u64, Ordering::Relaxed);
            }
        });
        FakeDaemon { path, events, stop, thread: Some(thread), _dir: dir }
    }
}

impl Drop for FakeDaemon {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        let ended = self.thread.take().unwrap().join();
        if !std::thread::panicking() {
            ended.unwrap();
        }
    }
}
