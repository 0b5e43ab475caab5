//! Between a front-end and the `vhost-user-backend` crate's daemon: the places where QEMU and the crate disagree.
//!
//! We hold the front-end's connection; the daemon has a private one, and messages are passed on between the two, each
//! whole and with its descriptors. Changed are only:
//!
//! * `SET_VRING_ENABLE` before the first `SET_FEATURES`: QEMU sends it when its device is made, the crate takes it as
//!   proof that `VHOST_USER_F_PROTOCOL_FEATURES` was not negotiated, and ends the connection. QEMU has negotiated it
//!   by then, in that it has set protocol features; the crate is told so, by a `SET_FEATURES` with that bit alone. DPDK's
//!   virtio-user, when its backend has come back, first of all disables and stops the rings that it had enabled there.
//! * `GET_QUEUE_NUM`: the crate says how many rings it has, the control queue's among them, and QEMU understands pairs of them.
//! * `SET_PROTOCOL_FEATURES` with features that were not offered ends the connection; the crate would believe them.
//! * `SET_VRING_NUM` with a size that no ring has ends it, too; the crate would do so with a line of its own in the log, which no
//!   limit holds for.
//! * `SET_LOG_BASE` does not reach the crate, whose logging is of memory that it writes itself; the protocol feature for it is
//!   added and taken away on the way.
//! * The answer to `GET_VRING_BASE`: the crate has 16 bits for it. Of a packed ring they are the position up to which buffers
//!   were taken; the upper half is that up to which they were used, and the same in a ring that is stopped.

use std::fmt;
use std::io::{self, IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::net::Shutdown;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;

use rustix::cmsg_space;
use rustix::io::Errno;
use rustix::net::addr::SocketAddrArg;
use rustix::net::{
    AddressFamily, RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, ReturnFlags, SendAncillaryBuffer,
    SendAncillaryMessage, SendFlags, SocketAddrUnix, SocketFlags, SocketType,
};
use vhost::vhost_user::Listener;
use vhost::vhost_user::message::{
    FrontendReq, MAX_ATTACHED_FD_ENTRIES, MAX_MSG_SIZE, VhostUserProtocolFeatures,
};
use virtio_bindings::virtio_config::VIRTIO_F_RING_PACKED;

use crate::virtio::{DirtyLog, has_feature, split};

/// `VHOST_USER_F_PROTOCOL_FEATURES`, the one feature bit of vhost-user itself.
pub(super) const F_PROTOCOL_FEATURES: u32 = 30;

/// Request, flags and size of the payload: 32 bits each, in the byte order of the host.
const HEADER: usize = 12;
/// Flags of a header: the version of the protocol, which is 1, and whether it is a reply.
const VERSION_MASK: u32 = 3;
const VERSION: u32 = 1;
const REPLY: u32 = 1 << 2;
/// `VHOST_USER_PROTOCOL_F_LOG_SHMFD`.
const LOG_SHMFD: u64 = VhostUserProtocolFeatures::LOG_SHMFD.bits();
/// The protocol features that the daemon offers; front-ends are offered [`LOG_SHMFD`], too.
pub(super) const DAEMON_FEATURES: VhostUserProtocolFeatures = VhostUserProtocolFeatures::MQ
    .union(VhostUserProtocolFeatures::REPLY_ACK)
    .union(VhostUserProtocolFeatures::CONFIGURE_MEM_SLOTS);
/// What the daemon takes with one message: 32, for the regions of `SET_MEM_TABLE`.
const MAX_FDS: usize = MAX_ATTACHED_FD_ENTRIES;

/// Why a connection cannot go on.
#[derive(Debug, thiserror::Error)]
pub(super) enum RelayError {
    /// Not a message of this protocol.
    #[error("not a vhost-user message: request {request}, flags {flags:#x}, {size} bytes")]
    Header { request: u32, flags: u32, size: u32 },
    /// The front-end wants what it was not offered.
    #[error("the front-end sets protocol features that were not offered: {0:#x}")]
    NotOffered(u64),
    /// No ring is of this size.
    #[error("ring {ring} is to have {size} descriptors, which is not 1 to {max}", max = split::MAX_SIZE)]
    RingSize { ring: u32, size: u32 },
    /// More descriptors than any message has, or than we may have open.
    #[error("more than {MAX_FDS} descriptors with a message, or none free to receive them")]
    Descriptors,
    /// The connection ended before the message did.
    #[error("connection closed in the middle of a message")]
    Truncated,
    /// A guest that is to migrate cannot.
    #[error("the log of dirty pages cannot be used: {0}")]
    Log(io::Error),
    /// The system refused.
    #[error(transparent)]
    Io(#[from] io::Error),
}

impl From<Errno> for RelayError {
    fn from(error: Errno) -> Self {
        RelayError::Io(error.into())
    }
}

/// A request as people know it.
#[derive(Clone, Copy)]
pub(super) struct Request(u32);

impl fmt::Display for Request {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match FrontendReq::try_from(self.0) {
            Ok(known) => write!(f, "{known:?}"),
            Err(_) => write!(f, "request {}", self.0),
        }
    }
}

/// A message: header and payload in one piece, and its descriptors, which are closed if it goes no further.
struct Message {
    bytes: Box<[u8; HEADER + MAX_MSG_SIZE]>,
    len: usize,
    fds: Vec<OwnedFd>,
}

impl Message {
    fn new() -> Self {
        Message { bytes: Box::new([0; HEADER + MAX_MSG_SIZE]), len: 0, fds: Vec::new() }
    }

    /// The message that acknowledges feature `bit` and no other; no reply is wanted.
    fn set_feature(bit: u32) -> Self {
        let mut message = Self::new();
        for (word, value) in
            message.bytes.chunks_exact_mut(4).zip([u32::from(FrontendReq::SET_FEATURES), VERSION, 8])
        {
            word.copy_from_slice(&value.to_ne_bytes());
        }
        message.len = HEADER + 8;
        message.set_u64(1 << bit);
        message
    }

    /// Word `i`, of which the first three are the header.
    fn word(&self, i: usize) -> u32 {
        let mut word = [0; 4];
        word.copy_from_slice(&self.bytes[4 * i..4 * i + 4]);
        u32::from_ne_bytes(word)
    }

    fn is(&self, request: FrontendReq) -> bool {
        self.word(0) == u32::from(request)
    }

    /// The payload, if it is a 64-bit number.
    fn u64(&self) -> Option<u64> {
        Some(u64::from_ne_bytes(self.bytes[HEADER..self.len].try_into().ok()?))
    }

    /// Whether it is a `SET_VRING_ENABLE` that disables a ring.
    fn disables_ring(&self) -> bool {
        self.is(FrontendReq::SET_VRING_ENABLE)
            && self.u64().is_some_and(|ring_and_enable| ring_and_enable >> 32 == 0)
    }

    /// The ring and its size, if it is a `SET_VRING_NUM`.
    fn ring_size(&self) -> Option<[u32; 2]> {
        let is_whole = self.is(FrontendReq::SET_VRING_NUM) && self.len == HEADER + 8;
        is_whole.then(|| [self.word(3), self.word(4)])
    }

    /// The log of dirty pages that a `SET_LOG_BASE` describes.
    fn log(&self) -> Result<DirtyLog, RelayError> {
        let word = |i: usize| {
            let bytes = self.bytes[..self.len].get(HEADER + 8 * i..)?.first_chunk()?;
            Some(u64::from_ne_bytes(*bytes))
        };
        let (Some(size), Some(offset), [fd]) = (word(0), word(1), &self.fds[..]) else {
            return Err(RelayError::Log(io::ErrorKind::InvalidInput.into()));
        };
        let file = fd.try_clone().map_err(RelayError::Log)?.into();
        DirtyLog::map(&file, size, offset).map_err(RelayError::Log)
    }

    /// Makes it the answer to itself, with the same payload: QEMU takes any, and rust-vmm's front-end that.
    fn answer(&mut self) {
        self.fds.clear();
        self.bytes[4..8].copy_from_slice(&(VERSION | REPLY).to_ne_bytes());
    }

    /// Makes the upper half of a ring's state what the lower is.
    fn double_base(&mut self) {
        if self.len == HEADER + 8 {
            self.bytes.copy_within(HEADER + 4..HEADER + 6, HEADER + 6);
        }
    }

    fn set_u64(&mut self, value: u64) {
        self.bytes[HEADER..HEADER + 8].copy_from_slice(&value.to_ne_bytes());
    }

    /// Waits for the next message; false if there is none any more.
    fn receive(&mut self, from: &UnixStream, replies: bool) -> Result<bool, RelayError> {
        self.len = 0;
        self.fds.clear();
        if !self.fill(from, HEADER)? {
            return Ok(false);
        }
        let [request, flags, size] = [0, 1, 2].map(|i| self.word(i));
        let well_formed = flags & VERSION_MASK == VERSION
            && (flags & REPLY != 0) == replies
            && size as usize <= MAX_MSG_SIZE;
        if !well_formed {
            return Err(RelayError::Header { request, flags, size });
        }
        self.fill(from, HEADER + size as usize)
    }

    /// Receives until `end`, be it in many pieces; false if the connection ended before the first byte.
    fn fill(&mut self, from: &UnixStream, end: usize) -> Result<bool, RelayError> {
        while self.len < end {
            let mut space = [MaybeUninit::uninit(); cmsg_space!(ScmRights(MAX_FDS))];
            let mut control = RecvAncillaryBuffer::new(&mut space);
            let mut piece = [IoSliceMut::new(&mut self.bytes[self.len..end])];
            let received = match rustix::net::recvmsg(from, &mut piece, &mut control, RecvFlags::CMSG_CLOEXEC)
            {
                Err(Errno::INTR) => continue,
                // How a peer that has not read everything closes.
                Err(Errno::CONNRESET) => None,
                other => Some(other?),
            };
            for ancillary in control.drain() {
                if let RecvAncillaryMessage::ScmRights(fds) = ancillary {
                    self.fds.extend(fds);
                }
            }
            match received {
                Some(r) if r.flags.contains(ReturnFlags::CTRUNC) || self.fds.len() > MAX_FDS => {
                    return Err(RelayError::Descriptors);
                }
                Some(r) if r.bytes > 0 => self.len += r.bytes,
                _ if self.len == 0 => return Ok(false),
                _ => return Err(RelayError::Truncated),
            }
        }
        Ok(true)
    }

    /// Sends it, in one piece if possible: the crate does not wait for the rest of a payload. False if nobody is there
    /// any more.
    fn send(&mut self, to: &UnixStream) -> Result<bool, RelayError> {
        // Ours are closed when this returns.
        let owned = std::mem::take(&mut self.fds);
        let fds: Vec<BorrowedFd<'_>> = owned.iter().map(AsFd::as_fd).collect();
        let mut sent = 0;
        while sent < self.len {
            let mut space = [MaybeUninit::uninit(); cmsg_space!(ScmRights(MAX_FDS))];
            let mut control = SendAncillaryBuffer::new(&mut space);
            // With the first byte; there is room for all that `fill` lets through.
            if sent == 0 && !fds.is_empty() && !control.push(SendAncillaryMessage::ScmRights(&fds)) {
                return Err(RelayError::Descriptors);
            }
            let rest = [IoSlice::new(&self.bytes[sent..self.len])];
            match rustix::net::sendmsg(to, &rest, &mut control, SendFlags::NOSIGNAL) {
                Err(Errno::INTR) => {}
                Err(Errno::PIPE | Errno::CONNRESET) => return Ok(false),
                other => sent += other?,
            }
        }
        Ok(true)
    }
}

/// A connection for the daemon: our end of it, and the listener that has the other end waiting to be accepted.
///
/// The daemon takes a listener and nothing else. This one is at an abstract address that the kernel chooses. Its
/// backlog has room for one connection, so if ours is in, no one else's is; and if someone was faster, ours is refused.
pub(super) fn private_connection() -> io::Result<(UnixStream, Listener)> {
    let listener = unix_socket(SocketFlags::CLOEXEC)?;
    rustix::net::bind(&listener, &SocketAddrUnix::new_unnamed())?;
    rustix::net::listen(&listener, 0)?;
    let ours = connect_to(&rustix::net::getsockname(&listener)?)?;
    Ok((ours, Listener::from(UnixListener::from(listener))))
}

/// Connects to a front-end that listens at `path`, or fails at once.
pub(super) fn connect(path: &Path) -> io::Result<UnixStream> {
    connect_to(&SocketAddrUnix::new(path)?)
}

fn unix_socket(flags: SocketFlags) -> io::Result<OwnedFd> {
    Ok(rustix::net::socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None)?)
}

/// A blocking connection, made without waiting for room in a backlog.
fn connect_to(address: &impl SocketAddrArg) -> io::Result<UnixStream> {
    let socket = unix_socket(SocketFlags::CLOEXEC | SocketFlags::NONBLOCK)?;
    rustix::net::connect(&socket, address)?;
    let stream = UnixStream::from(socket);
    stream.set_nonblocking(false)?;
    Ok(stream)
}

/// Passes messages both ways until either side, or a shutdown of either stream, ends the connection; both streams are
/// shut down then. `on_device` is called once the front-end has a device for the port: QEMU comes and goes without one
/// when it finds that the port does not suit it. `on_log` gets each log of dirty pages that it wants.
///
/// Returns the last request, and why it was the last if the front-end or the system is to blame.
pub(super) fn relay(
    name: &str,
    frontend: &UnixStream,
    daemon: &UnixStream,
    on_device: impl FnOnce(),
    on_log: impl Fn(DirtyLog),
) -> (Option<Request>, Result<(), RelayError>) {
    let end = || {
        for stream in [frontend, daemon] {
            // An error means that it is not connected any more.
            let _ = stream.shutdown(Shutdown::Both);
        }
    };
    let (mut last, packed) = (None, AtomicBool::new(false));
    let result = thread::scope(|scope| {
        let replies = thread::Builder::new().name(format!("vu-{name}-re")).spawn_scoped(scope, || {
            let result = pass_replies(daemon, frontend, &packed);
            end();
            result
        });
        let requests = match &replies {
            Ok(_) => pass_requests(name, frontend, daemon, (on_device, on_log), (&mut last, &packed)),
            Err(_) => Ok(()),
        };
        end();
        // It cannot panic.
        requests.and(replies?.join().unwrap_or(Ok(())))
    });
    (last, result)
}

fn pass_requests(
    name: &str,
    frontend: &UnixStream,
    daemon: &UnixStream,
    (on_device, on_log): (impl FnOnce(), impl Fn(DirtyLog)),
    (last, packed): (&mut Option<Request>, &AtomicBool),
) -> Result<(), RelayError> {
    let mut on_device = Some(on_device);
    let (mut protocol_features_set, mut features_set) = (false, false);
    let mut message = Message::new();
    while message.receive(frontend, false)? {
        let request = Request(message.word(0));
        log::trace!(
            "port {name}: {request}, {} bytes, {} descriptors: {:x?}",
            message.len - HEADER,
            message.fds.len(),
            &message.bytes[HEADER..message.len.min(HEADER + 40)]
        );
        *last = Some(request);
        let is_device = message.is(FrontendReq::SET_FEATURES) || message.is(FrontendReq::SET_VRING_ENABLE);
        if let Some(tell) = on_device.take_if(|_| is_device) {
            tell();
        }
        if message.is(FrontendReq::SET_LOG_BASE) {
            on_log(message.log()?);
            message.answer();
            if message.send(frontend)? {
                continue;
            }
            break;
        }
        if message.is(FrontendReq::SET_PROTOCOL_FEATURES) {
            protocol_features_set = true;
            let features = message.u64().unwrap_or_default();
            let strange = features & !(DAEMON_FEATURES.bits() | LOG_SHMFD);
            if strange != 0 {
                return Err(RelayError::NotOffered(strange));
            }
            if message.len == HEADER + 8 {
                message.set_u64(features & !LOG_SHMFD);
            }
        } else if let Some([ring, size]) = message.ring_size()
            && !(1..=u32::from(split::MAX_SIZE)).contains(&size)
        {
            return Err(RelayError::RingSize { ring, size });
        } else if message.is(FrontendReq::SET_FEATURES) {
            features_set = true;
            let features = message.u64().unwrap_or_default();
            packed.store(has_feature(features, VIRTIO_F_RING_PACKED), Ordering::Release);
        } else if message.is(FrontendReq::SET_VRING_ENABLE)
            && (protocol_features_set || message.disables_ring())
            && !features_set
        {
            features_set = true;
            Message::set_feature(F_PROTOCOL_FEATURES).send(daemon)?;
        }
        if !message.send(daemon)? {
            // It has ended the connection, and knows why.
            break;
        }
    }
    Ok(())
}

fn pass_replies(daemon: &UnixStream, frontend: &UnixStream, packed: &AtomicBool) -> Result<(), RelayError> {
    let mut message = Message::new();
    while message.receive(daemon, true)? {
        if message.is(FrontendReq::GET_PROTOCOL_FEATURES)
            && let Some(features) = message.u64()
        {
            message.set_u64(features | LOG_SHMFD);
        } else if message.is(FrontendReq::GET_QUEUE_NUM)
            && let Some(rings) = message.u64()
        {
            message.set_u64(rings / 2);
        } else if message.is(FrontendReq::GET_VRING_BASE) && packed.load(Ordering::Acquire) {
            message.double_base();
        }
        if !message.send(frontend)? {
            break;
        }
    }
    Ok(())
}
