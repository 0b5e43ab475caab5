//! Messages of a front-end to a port: whatever comes, with descriptors or without, the connection ends and the port takes the next one.
#![no_main]

use std::fs::File;
use std::io::{IoSlice, Read};
use std::mem::MaybeUninit;
use std::net::Shutdown;
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, OnceLock};
use std::time::Duration;

use backend::port_config::Socket;
use backend::quiesce::Quiescence;
use backend::vhost::VhostUserPort;
use backend::virtio::survive_loss;
use event_manager::{EventManager, MutEventSubscriber, SubscriberOps};
use libfuzzer_sys::fuzz_target;
use rustix::cmsg_space;
use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags};

/// A port that has refused somebody takes a rest, so they take turns.
const PORTS: usize = 256;

struct Bed {
    dir: PathBuf,
    /// A file to pass, of a size that may be guest memory.
    memory: File,
    turn: AtomicUsize,
}

impl Bed {
    fn new() -> Bed {
        // As in the daemon: guest memory need not be there.
        survive_loss().expect("a handler of SIGBUS");
        let dir = tempfile::tempdir().expect("a directory").keep();
        let memory = rustix::fs::memfd_create("guest", rustix::fs::MemfdFlags::CLOEXEC).expect("a memfd");
        let memory = File::from(memory);
        memory.set_len(1 << 20).expect("its size");
        let bed = Bed { dir, memory, turn: AtomicUsize::new(0) };
        let mut events: EventManager<Arc<Mutex<dyn MutEventSubscriber + Send>>> =
            EventManager::new().expect("an event loop");
        for index in 0..PORTS {
            let (socket, quiescence) = (Socket::new(bed.socket(index)), Arc::new(Quiescence::new()));
            let port = VhostUserPort::new("p", 2, socket, None, quiescence, Box::new(|_| {}));
            events.add_subscriber(Arc::new(Mutex::new(port.expect("a port"))));
        }
        std::thread::spawn(move || {
            loop {
                events.run().expect("events");
            }
        });
        bed
    }

    fn socket(&self, index: usize) -> PathBuf {
        self.dir.join(index.to_string())
    }
}

fuzz_target!(|data: &[u8]| {
    static BED: OnceLock<Bed> = OnceLock::new();
    let bed = BED.get_or_init(Bed::new);
    let turn = bed.turn.fetch_add(1, Ordering::Relaxed) % PORTS;
    let mut stream = UnixStream::connect(bed.socket(turn)).expect("the port listens");
    stream.set_read_timeout(Some(Duration::from_secs(10))).expect("a timeout");
    // Messages of given lengths, each with descriptors or without. A header's version is always right.
    let mut rest = data;
    while let Some((&[request, flags, len, fds], more)) = rest.split_first_chunk() {
        let (payload, more) = more.split_at(more.len().min(len.into()));
        rest = more;
        let words = [u32::from(request % 48), 1 | u32::from(flags & 0xc), payload.len() as u32];
        let bytes = [words.map(u32::to_ne_bytes).as_flattened(), payload].concat();
        let fds = vec![bed.memory.as_fd(); usize::from(fds % 4)];
        let mut space = [MaybeUninit::uninit(); cmsg_space!(ScmRights(4))];
        let mut control = SendAncillaryBuffer::new(&mut space);
        if !fds.is_empty() {
            control.push(SendAncillaryMessage::ScmRights(&fds));
        }
        if rustix::net::sendmsg(&stream, &[IoSlice::new(&bytes)], &mut control, SendFlags::NOSIGNAL).is_err()
        {
            break;
        }
    }
    let _ = stream.shutdown(Shutdown::Write);
    let mut answers = Vec::new();
    if let Err(e) = stream.read_to_end(&mut answers) {
        assert_eq!(e.kind(), std::io::ErrorKind::ConnectionReset, "the port hangs");
    }
});
