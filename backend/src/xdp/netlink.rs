//! As much netlink as it takes to ask the kernel about one device: requests, answers, attributes
//! (Documentation/userspace-api/netlink/intro.rst).

use rustix::fd::{AsFd, BorrowedFd, OwnedFd};
use rustix::io::Errno;
use rustix::net::netlink::SocketAddrNetlink;
use rustix::net::sockopt::{Timeout, set_socket_timeout};
use rustix::net::{
    AddressFamily, Protocol, RecvFlags, SendFlags, SocketFlags, SocketType, bind, netlink, recv, sendto,
    socket_with,
};
use std::io;
use std::time::Duration;

const NLMSG_ERROR: u16 = 2;
const NLMSG_DONE: u16 = 3;
const NLM_F_REQUEST: u16 = 1;
const NLM_F_ACK: u16 = 4;
/// Bytes of `struct nlmsghdr`.
const HEADER: usize = 16;
/// Bytes of `struct genlmsghdr`, which begins what a generic netlink family sends.
pub(super) const GENERIC_HEADER: usize = 4;

const GENL_ID_CTRL: u16 = 16;
const CTRL_CMD_GETFAMILY: u8 = 3;
const CTRL_ATTR_FAMILY_ID: u16 = 1;
const CTRL_ATTR_FAMILY_NAME: u16 = 2;

/// The group that hears of changes of network devices (`RTMGRP_LINK`, linux/rtnetlink.h).
const LINK_GROUP: u32 = 1;

/// Becomes readable when any network device of the namespace has changed.
pub struct LinkNews(OwnedFd);

impl LinkNews {
    /// Listens, in the thread's network namespace.
    ///
    /// # Errors
    /// The system has no rtnetlink.
    pub fn new() -> io::Result<LinkNews> {
        let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
        let fd = socket_with(AddressFamily::NETLINK, SocketType::RAW, flags, None)?;
        bind(&fd, &SocketAddrNetlink::new(0, LINK_GROUP))?;
        Ok(LinkNews(fd))
    }

    /// Forgets what has come: whoever hears of a change looks at the device itself. News that were lost are news too.
    pub fn clear(&self) {
        loop {
            match recv(&self.0, &mut [0u8; 64][..], RecvFlags::TRUNC) {
                Ok(_) | Err(Errno::NOBUFS | Errno::INTR) => {}
                Err(_) => return,
            }
        }
    }
}

impl AsFd for LinkNews {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

/// A netlink socket in the thread's network namespace.
pub(super) struct Netlink {
    fd: OwnedFd,
    sequence: u32,
}

impl Netlink {
    /// A socket to the kernel's rtnetlink.
    ///
    /// # Errors
    /// The system has none.
    pub(super) fn route() -> io::Result<Netlink> {
        // Protocol 0, which is rustix' `None`.
        Self::open(None)
    }

    /// A socket to the kernel's generic netlink families.
    ///
    /// # Errors
    /// The system has none.
    pub(super) fn generic() -> io::Result<Netlink> {
        Self::open(Some(netlink::GENERIC))
    }

    fn open(protocol: Option<Protocol>) -> io::Result<Netlink> {
        let fd = socket_with(AddressFamily::NETLINK, SocketType::RAW, SocketFlags::CLOEXEC, protocol)?;
        // The kernel answers before the request returns; this is so that nothing can ever hang.
        set_socket_timeout(&fd, Timeout::Recv, Some(Duration::from_secs(5)))?;
        Ok(Netlink { fd, sequence: 0 })
    }

    /// Sends a request of type `kind`, and gives what the kernel answers, without headers.
    ///
    /// # Errors
    /// What the kernel has against the request.
    pub(super) fn ask(&mut self, kind: u16, payload: &[u8]) -> io::Result<Vec<Vec<u8>>> {
        self.sequence += 1;
        let mut message = Vec::with_capacity(HEADER + payload.len());
        message.extend(((HEADER + payload.len()) as u32).to_ne_bytes());
        message.extend(kind.to_ne_bytes());
        message.extend((NLM_F_REQUEST | NLM_F_ACK).to_ne_bytes());
        message.extend(self.sequence.to_ne_bytes());
        message.extend(0u32.to_ne_bytes());
        message.extend(payload);
        sendto(&self.fd, &message, SendFlags::empty(), &SocketAddrNetlink::new(0, 0))?;
        let (mut answers, mut buffer) = (vec![], vec![0; 1 << 16]);
        loop {
            let (got, _) = recv(&self.fd, &mut buffer[..], RecvFlags::empty())?;
            let mut rest = &buffer[..got];
            while let Some((kind, sequence, body, next)) = split_message(rest) {
                rest = next;
                match kind {
                    _ if sequence != self.sequence => {}
                    NLMSG_DONE => return Ok(answers),
                    NLMSG_ERROR => {
                        let code = word(body).unwrap_or_default() as i32;
                        return match code {
                            0 => Ok(answers),
                            _ => Err(io::Error::from_raw_os_error(code.wrapping_neg())),
                        };
                    }
                    _ => answers.push(body.to_vec()),
                }
            }
        }
    }

    /// Asks command `command` of generic family `family`, and gives the attributes of the first answer.
    ///
    /// # Errors
    /// There is no such family, or what the kernel has against the request.
    pub(super) fn ask_family(&mut self, family: &str, command: u8, attributes: &[u8]) -> io::Result<Vec<u8>> {
        let mut name = family.as_bytes().to_vec();
        name.push(0);
        let mut request = vec![CTRL_CMD_GETFAMILY, 1, 0, 0];
        put(&mut request, CTRL_ATTR_FAMILY_NAME, &name);
        let answers = self.ask(GENL_ID_CTRL, &request)?;
        let id = answers
            .first()
            .and_then(|a| find(a.get(GENERIC_HEADER..)?, CTRL_ATTR_FAMILY_ID)?.first_chunk::<2>())
            .map(|id| u16::from_ne_bytes(*id))
            .ok_or(io::ErrorKind::NotFound)?;
        let mut request = vec![command, 1, 0, 0];
        request.extend(attributes);
        let answer = self.ask(id, &request)?.into_iter().next().ok_or(io::ErrorKind::NotFound)?;
        Ok(answer.get(GENERIC_HEADER..).unwrap_or_default().to_vec())
    }
}

/// Takes the first message off `bytes`: its type, sequence number and body, and the bytes after it.
fn split_message(bytes: &[u8]) -> Option<(u16, u32, &[u8], &[u8])> {
    let len = word(bytes)? as usize;
    let body = bytes.get(HEADER..len)?;
    let kind = u16::from_ne_bytes(*bytes.get(4..)?.first_chunk()?);
    let sequence = word(bytes.get(8..)?)?;
    Some((kind, sequence, body, bytes.get(len.next_multiple_of(4)..).unwrap_or_default()))
}

/// Appends an attribute.
pub(super) fn put(to: &mut Vec<u8>, kind: u16, value: &[u8]) {
    to.extend(((4 + value.len()) as u16).to_ne_bytes());
    to.extend(kind.to_ne_bytes());
    to.extend(value);
    to.resize(to.len().next_multiple_of(4), 0);
}

/// The attributes in `bytes`: type, without the bits for nesting and byte order, and value. Ends at a malformed one.
pub(super) fn attributes(mut bytes: &[u8]) -> impl Iterator<Item = (u16, &[u8])> {
    std::iter::from_fn(move || {
        let len = u16::from_ne_bytes(*bytes.first_chunk()?) as usize;
        let kind = u16::from_ne_bytes(*bytes.get(2..)?.first_chunk()?) & 0x3fff;
        let value = bytes.get(4..len)?;
        bytes = bytes.get(len.next_multiple_of(4)..).unwrap_or_default();
        Some((kind, value))
    })
}

/// The value of the first attribute of type `kind`.
pub(super) fn find(bytes: &[u8], kind: u16) -> Option<&[u8]> {
    attributes(bytes).find(|&(k, _)| k == kind).map(|(_, value)| value)
}

/// The 32-bit word that `bytes` begin with.
pub(super) fn word(bytes: &[u8]) -> Option<u32> {
    Some(u32::from_ne_bytes(*bytes.first_chunk()?))
}

/// Text up to its terminating zero.
pub(super) fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes.split(|&b| b == 0).next().unwrap_or_default()).into_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn attributes_are_padded_and_malformed_ones_end_it() {
        let mut bytes = vec![];
        put(&mut bytes, 1, &[7]);
        put(&mut bytes, 0x8002, b"abcd");
        assert_eq!(bytes.len(), 16);
        assert_eq!(attributes(&bytes).collect::<Vec<_>>(), [(1, &[7][..]), (2, &b"abcd"[..])]);
        for cut in 0..bytes.len() {
            assert!(attributes(&bytes[..cut]).count() <= 1);
        }
        assert_eq!(attributes(&[3, 0, 1, 0]).count(), 0, "shorter than its header");
        assert_eq!(attributes(&[0; 8]).count(), 0);
    }

    #[test]
    fn messages_are_split_and_malformed_ones_end_it() {
        assert!(split_message(&[0; 64]).is_none());
        let mut bytes = 17u32.to_ne_bytes().to_vec();
        bytes.resize(20, 9);
        let (_, _, body, rest) = split_message(&bytes).unwrap();
        assert_eq!((body, rest.len()), (&[9][..], 0));
        assert!(split_message(&bytes[..16]).is_none());
    }
}
