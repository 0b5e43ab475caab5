//! The few things that a TAP needs of rtnetlink (RFC 3549; `linux/rtnetlink.h`, `linux/pkt_sched.h`, `linux/pkt_cls.h`):
//! flags and MTU, and a filter at its ingress.

use libc::{
    AF_INET6, NLM_F_ACK, NLM_F_CREATE, NLM_F_EXCL, NLM_F_REPLACE, NLM_F_REQUEST, NLMSG_ERROR, RTM_DELQDISC,
    RTM_DELTFILTER, RTM_GETLINK, RTM_NEWLINK, RTM_NEWQDISC, RTM_NEWTFILTER, TCA_KIND, TCA_OPTIONS,
};
use rustix::net::{AddressFamily, RecvFlags, SendFlags, SocketFlags, SocketType, recv, send, socket_with};
use std::io;
use std::os::fd::OwnedFd;

const IFLA_MTU: u16 = 4;
const IFLA_AF_SPEC: u16 = 26;
const IFLA_GROUP: u16 = 27;
const IFLA_INET6_ADDR_GEN_MODE: u16 = 8;
const IN6_ADDR_GEN_MODE_NONE: u8 = 1;
/// `TC_H_CLSACT`.
const CLSACT: u32 = 0xffff_fff1;
/// The handle of a clsact qdisc.
const CLSACT_HANDLE: u32 = 0xffff_0000;
/// `TC_H_MAKE(TC_H_CLSACT, TC_H_MIN_INGRESS)`.
const INGRESS: u32 = 0xffff_fff2;
const TCA_BPF_OPS_LEN: u16 = 4;
const TCA_BPF_OPS: u16 = 5;
const TCA_BPF_FLAGS: u16 = 8;
const TCA_BPF_FLAG_ACT_DIRECT: u32 = 1;
/// Before all other filters.
const PRIORITY: u32 = 1;
/// Tells our filter from others.
const FILTER_HANDLE: u32 = 0x5057;
/// One instruction of classic BPF (`struct sock_filter`): return `TC_ACT_SHOT`.
const DROP: [u8; 8] = {
    let code = (libc::BPF_RET | libc::BPF_K) as u16;
    let (code, k) = (code.to_ne_bytes(), 2u32.to_ne_bytes());
    [code[0], code[1], 0, 0, k[0], k[1], k[2], k[3]]
};
/// Set in the type of attributes that contain others.
const NESTED: u16 = 0x8000;
/// Bytes of `struct nlmsghdr`.
const HEADER: usize = 16;

/// A link as the kernel has it.
#[derive(Debug, PartialEq, Eq)]
pub struct Link {
    /// `IFF_*`.
    pub flags: u32,
    /// Longest packet without the link header, in bytes.
    pub mtu: u32,
    /// Its group, which is 0 unless somebody has set it.
    pub group: u32,
}

/// A request under construction.
struct Message(Vec<u8>);

impl Message {
    fn new(kind: u16, flags: i32) -> Message {
        let mut bytes = vec![0; HEADER];
        bytes[4..6].copy_from_slice(&kind.to_ne_bytes());
        bytes[6..8].copy_from_slice(&((flags | NLM_F_REQUEST) as u16).to_ne_bytes());
        Message(bytes)
    }

    /// With a `struct ifinfomsg`.
    fn link(kind: u16, flags: i32, index: u32, link_flags: u32, change: u32) -> Message {
        let mut message = Message::new(kind, flags);
        for word in [0, index, link_flags, change] {
            message.0.extend(word.to_ne_bytes());
        }
        message
    }

    /// With a `struct tcmsg`.
    fn traffic(kind: u16, flags: i32, index: u32, handle: u32, parent: u32, info: u32) -> Message {
        let mut message = Message::new(kind, flags);
        for word in [0, index, handle, parent, info] {
            message.0.extend(word.to_ne_bytes());
        }
        message
    }

    fn attribute(mut self, kind: u16, value: &[u8]) -> Message {
        self.0.extend((4 + value.len() as u16).to_ne_bytes());
        self.0.extend(kind.to_ne_bytes());
        self.0.extend(value);
        self.0.resize(self.0.len().next_multiple_of(4), 0);
        self
    }

    fn nest(mut self, kind: u16, inner: impl FnOnce(Message) -> Message) -> Message {
        let start = self.0.len();
        self = inner(self.attribute(kind | NESTED, &[]));
        let len = (self.0.len() - start) as u16;
        self.0[start..start + 2].copy_from_slice(&len.to_ne_bytes());
        self
    }
}

/// A socket for requests to the network namespace of the thread that opened it.
pub struct Rtnetlink {
    socket: OwnedFd,
    sequence: u32,
}

impl Rtnetlink {
    /// Opens it.
    pub fn new() -> io::Result<Rtnetlink> {
        // Protocol 0 is NETLINK_ROUTE.
        let socket = socket_with(AddressFamily::NETLINK, SocketType::RAW, SocketFlags::CLOEXEC, None)?;
        Ok(Rtnetlink { socket, sequence: 0 })
    }

    /// Sets the link flags that are in `change`, and the MTU if there is one.
    pub fn set_link(&mut self, index: u32, flags: u32, change: u32, mtu: Option<u32>) -> io::Result<()> {
        let message = Message::link(RTM_NEWLINK, NLM_F_ACK, index, flags, change);
        self.request(match mtu {
            Some(mtu) => message.attribute(IFLA_MTU, &mtu.to_ne_bytes()),
            None => message,
        })
    }

    /// Has the kernel tell everybody who listens of the link, which stays as it is: it does so whenever a group is set.
    pub fn announce(&mut self, index: u32) -> io::Result<()> {
        let group = self.link(index)?.group;
        let message = Message::link(RTM_NEWLINK, NLM_F_ACK, index, 0, 0);
        self.request(message.attribute(IFLA_GROUP, &group.to_ne_bytes()))
    }

    /// Flags, MTU and group of a link.
    pub fn link(&mut self, index: u32) -> io::Result<Link> {
        let reply = self.exchange(Message::link(RTM_GETLINK, 0, index, 0, 0))?;
        let word = |at: usize| reply.get(at..).and_then(|b| b.first_chunk()).map(|b| u32::from_ne_bytes(*b));
        let flags = word(8);
        let (mut mtu, mut group) = (None, 0);
        let mut rest = reply.get(16..).unwrap_or_default();
        while let Some(&[a, b, c, d]) = rest.first_chunk() {
            let len = u16::from_ne_bytes([a, b]) as usize;
            let Some(value) = rest.get(4..len) else { break };
            let number = value.first_chunk().map(|b| u32::from_ne_bytes(*b));
            match u16::from_ne_bytes([c, d]) {
                IFLA_MTU => mtu = number,
                IFLA_GROUP => group = number.unwrap_or_default(),
                _ => {}
            }
            rest = rest.get(len.next_multiple_of(4)..).unwrap_or_default();
        }
        match (flags, mtu) {
            (Some(flags), Some(mtu)) => Ok(Link { flags, mtu, group }),
            _ => Err(io::Error::new(io::ErrorKind::InvalidData, "an answer of rtnetlink is cut short")),
        }
    }

    /// Keeps the kernel from giving the link IPv6 addresses.
    pub fn make_no_addresses(&mut self, index: u32) -> io::Result<()> {
        let message = Message::link(RTM_NEWLINK, NLM_F_ACK, index, 0, 0);
        self.request(message.nest(IFLA_AF_SPEC, |message| {
            message.nest(AF_INET6 as u16, |message| {
                message.attribute(IFLA_INET6_ADDR_GEN_MODE, &[IN6_ADDR_GEN_MODE_NONE])
            })
        }))
    }

    /// Drops all that the link receives, behind the packet sockets and before the network stack. As
    /// `tc qdisc add dev X clsact; tc filter add dev X ingress protocol all bpf da bytecode '1,6 0 0 2'`.
    pub fn drop_ingress(&mut self, index: u32) -> io::Result<()> {
        let create = NLM_F_ACK | NLM_F_CREATE | NLM_F_EXCL;
        let qdisc = Message::traffic(RTM_NEWQDISC, create, index, CLSACT_HANDLE, CLSACT, 0);
        match self.request(qdisc.attribute(TCA_KIND, b"clsact\0")) {
            Err(error) if error.kind() != io::ErrorKind::AlreadyExists => return Err(error),
            _ => {}
        }
        let replace = NLM_F_ACK | NLM_F_CREATE | NLM_F_REPLACE;
        let filter = Self::filter(RTM_NEWTFILTER, replace, index);
        self.request(filter.nest(TCA_OPTIONS, |message| {
            message
                .attribute(TCA_BPF_OPS_LEN, &1u16.to_ne_bytes())
                .attribute(TCA_BPF_OPS, &DROP)
                .attribute(TCA_BPF_FLAGS, &TCA_BPF_FLAG_ACT_DIRECT.to_ne_bytes())
        }))
    }

    /// Undoes [`Rtnetlink::drop_ingress`]; does nothing where it was not done.
    pub fn pass_ingress(&mut self, index: u32) -> io::Result<()> {
        // Without the filter, or without any such qdisc, the kernel says so in one of several ways.
        if self.request(Self::filter(RTM_DELTFILTER, NLM_F_ACK, index)).is_err() {
            return Ok(());
        }
        let qdisc = Message::traffic(RTM_DELQDISC, NLM_F_ACK, index, CLSACT_HANDLE, CLSACT, 0);
        self.request(qdisc.attribute(TCA_KIND, b"clsact\0"))
    }

    fn filter(kind: u16, flags: i32, index: u32) -> Message {
        let info = PRIORITY << 16 | u32::from((libc::ETH_P_ALL as u16).to_be());
        Message::traffic(kind, flags, index, FILTER_HANDLE, INGRESS, info).attribute(TCA_KIND, b"bpf\0")
    }

    fn request(&mut self, message: Message) -> io::Result<()> {
        self.exchange(message).map(|_| ())
    }

    /// Sends a request and gives the body of its answer, which is empty if it is an acknowledgement.
    fn exchange(&mut self, Message(mut bytes): Message) -> io::Result<Vec<u8>> {
        self.sequence += 1;
        let len = bytes.len() as u32;
        bytes[..4].copy_from_slice(&len.to_ne_bytes());
        bytes[8..12].copy_from_slice(&self.sequence.to_ne_bytes());
        send(&self.socket, &bytes, SendFlags::empty())?;
        let mut buffer = vec![0; 32 << 10];
        loop {
            let (_, len) = recv(&self.socket, &mut buffer[..], RecvFlags::empty())?;
            let reply = &buffer[..len.min(buffer.len())];
            let Some((header, body)) = reply.split_first_chunk::<HEADER>() else {
                return Err(io::Error::new(
                    io::ErrorKind::InvalidData,
                    "an answer of rtnetlink is cut short",
                ));
            };
            if header[8..12] != self.sequence.to_ne_bytes() {
                continue;
            }
            if i32::from(u16::from_ne_bytes([header[4], header[5]])) != NLMSG_ERROR {
                return Ok(body.to_vec());
            }
            return match body.first_chunk().map(|bytes| i32::from_ne_bytes(*bytes)) {
                Some(0) => Ok(Vec::new()),
                Some(error) => Err(io::Error::from_raw_os_error(error.saturating_neg())),
                None => {
                    Err(io::Error::new(io::ErrorKind::InvalidData, "an answer of rtnetlink is cut short"))
                }
            };
        }
    }
}
