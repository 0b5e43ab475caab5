//! Netlink as far as the host's state needs it: requests with their answers, and notifications.
//!
//! Layouts: the kernel's `include/uapi/linux/netlink.h`; all numbers are in the machine's byte order unless said otherwise.

use netlink_sys::{Socket, SocketAddr};
use rustix::net::sockopt::{Timeout, set_socket_timeout};
use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::time::Duration;

/// A message or attribute that is shorter than it claims, or than its kind demands.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the kernel's netlink message is malformed")]
pub struct Malformed;

impl From<Malformed> for io::Error {
    fn from(malformed: Malformed) -> io::Error {
        io::Error::new(io::ErrorKind::InvalidData, malformed)
    }
}

/// One netlink message.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Message<'a> {
    /// `nlmsg_type`.
    pub kind: u16,
    /// `nlmsg_flags`.
    pub flags: u16,
    /// `nlmsg_seq`: that of the request which it answers.
    pub sequence: u32,
    /// What follows the header.
    pub body: &'a [u8],
}

/// The messages of a datagram. A malformed one is the last.
pub fn messages(mut bytes: &[u8]) -> impl Iterator<Item = Result<Message<'_>, Malformed>> {
    std::iter::from_fn(move || {
        if bytes.is_empty() {
            return None;
        }
        let message = (|| {
            let length = u32_at(bytes, 0)? as usize;
            let body = bytes.get(HEADER..length).ok_or(Malformed)?;
            Ok(Message {
                kind: u16_at(bytes, 4)?,
                flags: u16_at(bytes, 6)?,
                sequence: u32_at(bytes, 8)?,
                body,
            })
        })();
        let used = message.map_or(bytes.len(), |message| aligned(HEADER + message.body.len()));
        bytes = bytes.get(used..).unwrap_or_default();
        Some(message)
    })
}

/// The attributes in `bytes`, each with its type (without the flags for nesting and byte order). A malformed one is
/// the last.
pub fn attributes(mut bytes: &[u8]) -> impl Iterator<Item = Result<(u16, &[u8]), Malformed>> {
    std::iter::from_fn(move || {
        if bytes.is_empty() {
            return None;
        }
        let attribute = (|| {
            let length = usize::from(u16_at(bytes, 0)?);
            let value = bytes.get(ATTRIBUTE_HEADER..length).ok_or(Malformed)?;
            Ok((u16_at(bytes, 2)? & NLA_TYPE_MASK, value))
        })();
        let used = attribute.map_or(bytes.len(), |(_, value)| aligned(ATTRIBUTE_HEADER + value.len()));
        bytes = bytes.get(used..).unwrap_or_default();
        Some(attribute)
    })
}

/// The two bytes at `offset` as a number.
pub fn u16_at(bytes: &[u8], offset: usize) -> Result<u16, Malformed> {
    bytes.get(offset..).and_then(|rest| rest.first_chunk()).map(|b| u16::from_ne_bytes(*b)).ok_or(Malformed)
}

/// The four bytes at `offset` as a number.
pub fn u32_at(bytes: &[u8], offset: usize) -> Result<u32, Malformed> {
    bytes.get(offset..).and_then(|rest| rest.first_chunk()).map(|b| u32::from_ne_bytes(*b)).ok_or(Malformed)
}

/// The text of a string attribute, with or without its closing NUL.
pub fn text(value: &[u8]) -> String {
    let end = value.iter().position(|byte| *byte == 0).unwrap_or(value.len());
    String::from_utf8_lossy(value.get(..end).unwrap_or_default()).into_owned()
}

/// A request: its type, its flags (`NLM_F_REQUEST` comes by itself), and its body.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Request {
    kind: u16,
    flags: u16,
    body: Vec<u8>,
}

impl Request {
    /// A request for all objects of a kind; `header` is the fixed part of its body.
    pub fn dump(kind: u16, header: &[u8]) -> Request {
        Request { kind, flags: NLM_F_DUMP, body: header.to_vec() }
    }

    /// A request for one object; `header` is the fixed part of its body.
    pub fn get(kind: u16, header: &[u8]) -> Request {
        Request { kind, flags: NLM_F_ACK, body: header.to_vec() }
    }

    /// A request that makes an object, or changes it; `header` is the fixed part of its body.
    pub fn set(kind: u16, header: &[u8]) -> Request {
        Request { kind, flags: NLM_F_ACK | NLM_F_CREATE | NLM_F_REPLACE, body: header.to_vec() }
    }

    /// The request with one more attribute. A value that no attribute could hold (64 KiB) is cut.
    pub fn attribute(mut self, kind: u16, value: &[u8]) -> Request {
        let value = &value[..value.len().min(usize::from(u16::MAX) - ATTRIBUTE_HEADER)];
        self.body.extend(((ATTRIBUTE_HEADER + value.len()) as u16).to_ne_bytes());
        self.body.extend(kind.to_ne_bytes());
        self.body.extend(value);
        self.body.resize(aligned(self.body.len()), 0);
        self
    }

    /// The request as it is sent.
    pub fn encode(&self, sequence: u32) -> Vec<u8> {
        let mut bytes = Vec::with_capacity(HEADER + self.body.len());
        bytes.extend(((HEADER + self.body.len()) as u32).to_ne_bytes());
        bytes.extend(self.kind.to_ne_bytes());
        bytes.extend((NLM_F_REQUEST | self.flags).to_ne_bytes());
        bytes.extend(sequence.to_ne_bytes());
        bytes.extend(0u32.to_ne_bytes()); // the kernel fills in who asks
        bytes.extend(&self.body);
        bytes
    }
}

/// A socket for requests, in the network namespace of the thread that opened it.
pub struct Requests {
    socket: Socket,
    sequence: u32,
    buffer: Vec<u8>,
}

impl Requests {
    /// A socket of a netlink protocol, such as `netlink_sys::protocols::NETLINK_ROUTE`.
    ///
    /// # Errors
    /// The kernel does not have the protocol, or does not let us.
    pub fn open(protocol: isize) -> io::Result<Requests> {
        let mut socket = Socket::new(protocol)?;
        socket.bind(&SocketAddr::new(0, 0))?;
        socket.connect(&SocketAddr::new(0, 0))?;
        // The kernel answers at once; a lost answer must not hold up the thread for ever.
        set_socket_timeout(&socket, Timeout::Recv, Some(Duration::from_secs(5)))?;
        Ok(Requests { socket, sequence: 0, buffer: Vec::with_capacity(BUFFER) })
    }

    /// What the kernel answers, each message's body through `decode`, which may leave some out.
    ///
    /// # Errors
    /// The kernel's own (an errno); `InvalidData` if an answer is malformed; `ResourceBusy` if what is asked for keeps
    /// changing while it is read.
    pub fn ask<T>(
        &mut self,
        request: &Request,
        decode: impl Fn(&[u8]) -> Result<Option<T>, Malformed>,
    ) -> io::Result<Vec<T>> {
        for _ in 0..DUMP_ATTEMPTS {
            self.sequence = self.sequence.wrapping_add(1);
            self.socket.send(&request.encode(self.sequence), 0)?;
            if let Some(answers) = self.answers(&decode)? {
                return Ok(answers);
            }
        }
        Err(io::Error::new(io::ErrorKind::ResourceBusy, "it keeps changing while it is read"))
    }

    /// The answers to the last request; none if they are not of one moment.
    fn answers<T>(
        &mut self,
        decode: &impl Fn(&[u8]) -> Result<Option<T>, Malformed>,
    ) -> io::Result<Option<Vec<T>>> {
        let mut answers = Vec::new();
        let mut interrupted = false;
        loop {
            receive(&self.socket, &mut self.buffer)?;
            for message in messages(&self.buffer) {
                let message = message?;
                if message.sequence != self.sequence {
                    continue; // of an earlier request that was given up
                }
                interrupted |= message.flags & NLM_F_DUMP_INTR != 0;
                match message.kind {
                    NLMSG_NOOP | NLMSG_OVERRUN => {}
                    NLMSG_ERROR | NLMSG_DONE => {
                        return match u32_at(message.body, 0)? as i32 {
                            0 => Ok((!interrupted).then_some(answers)),
                            errno => Err(io::Error::from_raw_os_error(errno.saturating_neg())),
                        };
                    }
                    _ => answers.extend(decode(message.body)?),
                }
            }
        }
    }
}

/// A socket for notifications, in the network namespace of the thread that opened it.
pub struct Events {
    socket: Socket,
    buffer: Vec<u8>,
}

impl Events {
    /// A socket of a netlink protocol that hears `groups`.
    ///
    /// # Errors
    /// The kernel does not have the protocol or a group, or does not let us.
    pub fn open(protocol: isize, groups: &[u32]) -> io::Result<Events> {
        let mut socket = Socket::new(protocol)?;
        socket.bind(&SocketAddr::new(0, 0))?;
        socket.set_non_blocking(true)?;
        for group in groups {
            socket.add_membership(*group)?;
        }
        Ok(Events { socket, buffer: Vec::with_capacity(BUFFER) })
    }

    /// Takes in all that has come. Whether any of it is `relevant`, or has been lost, so that things are to be read again.
    pub fn drain(&mut self, relevant: impl Fn(&Message) -> bool) -> bool {
        let mut any = false;
        let is_lossy = self.each(|message| any |= relevant(message));
        any || is_lossy
    }

    /// Gives `each` what has come. Whether something has been lost: a queue has overflowed, a message cannot be read.
    pub fn each(&mut self, mut each: impl FnMut(&Message)) -> bool {
        let mut is_lossy = false;
        loop {
            match receive(&self.socket, &mut self.buffer) {
                Ok(()) => messages(&self.buffer).for_each(|message| match message {
                    Ok(message) => each(&message),
                    Err(Malformed) => is_lossy = true,
                }),
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return is_lossy,
                // ENOBUFS says it once and what is left can be read; after any other, reading again is safe too.
                Err(error) if error.raw_os_error() == Some(libc::ENOBUFS) => is_lossy = true,
                Err(_) => return true,
            }
        }
    }
}

impl AsRawFd for Events {
    fn as_raw_fd(&self) -> RawFd {
        self.socket.as_raw_fd()
    }
}

/// Receives one datagram into `buffer`.
fn receive(socket: &Socket, buffer: &mut Vec<u8>) -> io::Result<()> {
    loop {
        buffer.clear();
        match socket.recv(buffer, 0) {
            Ok(_) => return Ok(()),
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
}

fn aligned(length: usize) -> usize {
    length.next_multiple_of(4)
}

/// Room for a datagram. The kernel sends at most 32 KiB to a reader that asks for that much; a longer one would be cut,
/// and so be malformed.
const BUFFER: usize = 64 << 10;
/// How often a dump that was interrupted by a change is asked for again.
const DUMP_ATTEMPTS: u32 = 10;

const HEADER: usize = 16;
const ATTRIBUTE_HEADER: usize = 4;
const NLA_TYPE_MASK: u16 = 0x3fff;
const NLM_F_REQUEST: u16 = 0x1;
const NLM_F_ACK: u16 = 0x4;
const NLM_F_DUMP_INTR: u16 = 0x10;
const NLM_F_DUMP: u16 = 0x300;
const NLM_F_REPLACE: u16 = 0x100;
const NLM_F_CREATE: u16 = 0x400;
const NLMSG_NOOP: u16 = 1;
const NLMSG_ERROR: u16 = 2;
const NLMSG_DONE: u16 = 3;
const NLMSG_OVERRUN: u16 = 4;

#[cfg(test)]
mod tests {
    use super::super::tests::{in_namespace, run};
    use super::*;
    use netlink_sys::protocols::NETLINK_ROUTE;
    use std::io::Write;

    #[test]
    fn requests_are_laid_out_as_the_kernel_expects() {
        let request = Request::get(18, &[0xaa; 4]).attribute(3, b"t0\0").attribute(29, &[8, 0, 0, 0]);
        let mut expected = vec![36, 0, 0, 0, 18, 0, 5, 0, 7, 0, 0, 0, 0, 0, 0, 0, 0xaa, 0xaa, 0xaa, 0xaa];
        expected.extend([7, 0, 3, 0, b't', b'0', 0, 0]);
        expected.extend([8, 0, 29, 0, 8, 0, 0, 0]);
        assert_eq!(request.encode(7), expected);
        let message = Message { kind: 18, flags: 5, sequence: 7, body: &expected[16..] };
        assert_eq!(messages(&expected).collect::<Vec<_>>(), [Ok(message)]);
        let list = attributes(&message.body[4..]).collect::<Vec<_>>();
        assert_eq!(list, [Ok((3, &b"t0\0"[..])), Ok((29, &[8, 0, 0, 0][..]))]);
    }

    #[test]
    fn cut_messages_and_attributes_are_noticed() {
        let bytes = Request::dump(38, &[1, 2, 3, 4]).encode(1);
        let mut two = [&bytes[..], &bytes[..]].concat();
        two.pop();
        let list = messages(&two).map(|message| message.map(|message| message.body)).collect::<Vec<_>>();
        assert_eq!(list, [Ok(&[1, 2, 3, 4][..]), Err(Malformed)]);
        // Shorter than its own header, and longer than what there is.
        for broken in [&[3, 0, 1, 0][..], &[9, 0, 1, 0, 1, 2, 3, 4], &[8, 0, 1]] {
            assert_eq!(attributes(broken).collect::<Vec<_>>(), [Err(Malformed)]);
        }
    }

    #[test]
    fn errors_of_the_kernel_come_back() {
        let mut requests = Requests::open(NETLINK_ROUTE).unwrap();
        let request = Request::get(18, &[0; 16]).attribute(3, b"no-such-device\0");
        let error = requests.ask(&request, |_| Ok(Some(()))).unwrap_err();
        assert_eq!(error.raw_os_error(), Some(libc::ENODEV));
        // The socket is good for the next request, also after an answer that was not understood.
        let all = Request::dump(18, &[0; 16]);
        assert_eq!(
            requests.ask(&all, |_| Err::<Option<()>, _>(Malformed)).unwrap_err().kind(),
            io::ErrorKind::InvalidData
        );
        assert!(!requests.ask(&all, |body| Ok(Some(body.len()))).unwrap().is_empty());
    }

    #[test]
    fn lost_notifications_are_noticed() {
        in_namespace(|| {
            let mut events = Events::open(NETLINK_ROUTE, &[1]).unwrap();
            assert!(!events.drain(|_| true), "nothing has happened");
            run("ip link set lo up");
            assert!(!events.drain(|_| false), "nothing that matters");
            run("ip link set lo down");
            assert!(events.drain(|_| true), "something that matters");

            let mut batch = tempfile::NamedTempFile::new().unwrap();
            for mtu in 0..2000 {
                writeln!(batch, "link set lo mtu {}", 10_000 + mtu).unwrap();
            }
            run(&format!("ip -batch {}", batch.path().display()));
            assert!(events.drain(|_| false), "more than the queue holds");
            assert!(!events.drain(|_| true), "it is said once");
            run("ip link set lo up");
            assert!(events.drain(|_| true), "and then all is as before");
        });
    }
}
