//! Netlink sockets: requests with their replies, and the kernel's events.

use super::wire::{self, Attrs, Malformed, Message, Request};
use netlink_sys::protocols::NETLINK_GENERIC;
use netlink_sys::{Socket, SocketAddr};
use rustix::net::sockopt;
use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::time::Duration;

/// Longest datagram that is taken: a flow's attributes are at most a few times 64 KiB.
const DATAGRAM: usize = 256 << 10;
/// The kernel answers before `send` returns; this is for when it does not at all.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(10);
/// `GENL_ID_CTRL`.
const CONTROL_FAMILY: u16 = 16;
/// `CTRL_CMD_GETFAMILY`.
const GET_FAMILY: u8 = 3;

/// Why a request failed.
#[derive(Debug, thiserror::Error)]
pub enum NetlinkError {
    /// The socket failed.
    #[error(transparent)]
    Io(#[from] io::Error),
    /// The kernel refused.
    #[error("{}", io::Error::from_raw_os_error(*.0))]
    Refused(i32),
    /// The kernel's answer is not understood.
    #[error(transparent)]
    Malformed(#[from] Malformed),
}

impl NetlinkError {
    /// The error number, if the kernel gave one.
    pub fn errno(&self) -> Option<i32> {
        match self {
            NetlinkError::Io(error) => error.raw_os_error(),
            NetlinkError::Refused(errno) => Some(*errno),
            NetlinkError::Malformed(_) => None,
        }
    }
}

fn open() -> io::Result<Socket> {
    let mut socket = Socket::new(NETLINK_GENERIC)?;
    socket.bind_auto()?;
    Ok(socket)
}

/// Takes a datagram into `buffer`. One that does not fit is `EMSGSIZE`.
fn receive(socket: &Socket, buffer: &mut Vec<u8>) -> io::Result<()> {
    buffer.clear();
    buffer.reserve(DATAGRAM);
    let length = socket.recv(buffer, libc::MSG_TRUNC)?;
    if length > buffer.len() { Err(io::Error::from_raw_os_error(libc::EMSGSIZE)) } else { Ok(()) }
}

/// Takes a reply's command and body.
pub type Reply<'a> = dyn FnMut(u8, &[u8]) -> Result<(), Malformed> + 'a;

/// A socket for requests.
pub struct Requests {
    socket: Socket,
    sequence: u32,
    buffer: Vec<u8>,
}

impl Requests {
    /// A new socket.
    pub fn open() -> io::Result<Requests> {
        let socket = open()?;
        socket.connect(&SocketAddr::new(0, 0))?;
        sockopt::set_socket_timeout(&socket, sockopt::Timeout::Recv, Some(ANSWER_TIMEOUT))?;
        Ok(Requests { socket, sequence: 0, buffer: Vec::new() })
    }

    /// Sends a request, which asks for an acknowledgement or a dump, and gives every reply's command and body to `each`.
    /// Tells whether a dump is consistent.
    pub fn call(&mut self, request: Request, each: &mut Reply<'_>) -> Result<bool, NetlinkError> {
        self.sequence = self.sequence.wrapping_add(1).max(1);
        self.socket.send(&request.finish(self.sequence), 0)?;
        let mut consistent = true;
        loop {
            match receive(&self.socket, &mut self.buffer) {
                Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                result => result?,
            }
            let mut datagram = &self.buffer[..];
            while let Some(message) = Message::take(&mut datagram) {
                let message = message?;
                // What an earlier request that failed has left behind.
                if message.sequence != self.sequence {
                    continue;
                }
                consistent &= message.flags & wire::F_DUMP_INTERRUPTED == 0;
                match message.kind {
                    wire::NOOP => {}
                    wire::ERROR | wire::DONE => match message.error()? {
                        0 => return Ok(consistent),
                        error => return Err(NetlinkError::Refused(error)),
                    },
                    _ => {
                        let (command, body) = message.generic()?;
                        each(command, body)?;
                    }
                }
            }
        }
    }

    /// Looks up a generic netlink family.
    pub fn family(&mut self, name: &str) -> Result<Family, NetlinkError> {
        let mut name_and_nul = name.as_bytes().to_vec();
        name_and_nul.push(0);
        let request = Request::new(CONTROL_FAMILY, GET_FAMILY, 1, wire::F_ACK).attr(2, &name_and_nul);
        let mut family = Family::default();
        self.call(request, &mut |_, body| {
            for attr in Attrs(body) {
                let attr = attr?;
                match attr.kind {
                    1 => family.id = attr.u16()?,
                    3 => family.version = attr.u32()?,
                    7 => {
                        for group in attr.nested() {
                            let group = group?.nested();
                            if let (Some(group_name), Some(id)) = (group.find(1)?, group.find(2)?)
                                && group_name.text()? == name
                            {
                                family.group = id.u32()?;
                            }
                        }
                    }
                    _ => {}
                }
            }
            Ok(())
        })?;
        Ok(family)
    }
}

/// A generic netlink family, and its multicast group of the same name (0 if there is none).
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Family {
    /// Message type of its messages.
    pub id: u16,
    /// Version of its messages.
    pub version: u32,
    /// The group's number.
    pub group: u32,
}

/// A socket for events, which never waits.
pub struct Events {
    socket: Socket,
    buffer: Vec<u8>,
}

impl Events {
    /// A member of these groups, with room for `receive_buffer` bytes of events.
    ///
    /// # Errors
    /// `EPERM` without `CAP_NET_ADMIN`, which a buffer beyond the system's limit needs.
    pub fn open(groups: &[u32], receive_buffer: usize) -> io::Result<Events> {
        let socket = open()?;
        socket.set_non_blocking(true)?;
        sockopt::set_socket_recv_buffer_size_force(&socket, receive_buffer)?;
        for &group in groups {
            socket.add_membership(group)?;
        }
        Ok(Events { socket, buffer: Vec::new() })
    }

    /// For `epoll`.
    pub fn as_raw_fd(&self) -> RawFd {
        self.socket.as_raw_fd()
    }

    /// Takes a datagram.
    ///
    /// # Errors
    /// `WouldBlock` if there is none, `ENOBUFS` if some were lost, `EMSGSIZE` if this one was too long.
    pub fn receive(&mut self) -> io::Result<&[u8]> {
        receive(&self.socket, &mut self.buffer)?;
        Ok(&self.buffer)
    }
}
