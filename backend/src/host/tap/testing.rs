//! For tests with TAPs: network namespaces of their own, and packet sockets as OVS's userspace datapath has them.

#![allow(unsafe_code)] // packet sockets' addresses, and leaving a namespace, have no safe form

use crate::virtio::NetHeader;
use rustix::net::{
    AddressFamily, Protocol, RecvFlags, SendFlags, SocketFlags, SocketType, recv, send, socket_with,
};
use std::num::NonZeroU32;
use std::os::fd::{AsRawFd, OwnedFd};
use std::process::Command;
use std::time::{Duration, Instant};

/// How long anything may take.
pub const DEADLINE: Duration = Duration::from_secs(20);

/// Runs `test` on a thread in a network namespace of its own, which goes with it. It takes root.
pub fn in_namespace(test: impl FnOnce() + Send + 'static) {
    let thread = std::thread::spawn(move || {
        // SAFETY: it touches no memory; only this thread changes to a new network namespace.
        let result = unsafe { libc::unshare(libc::CLONE_NEWNET) };
        assert_eq!(result, 0, "a network namespace takes root: {}", std::io::Error::last_os_error());
        test();
    });
    if let Err(panic) = thread.join() {
        std::panic::resume_unwind(panic);
    }
}

/// Runs `ip` in the namespace of this thread.
pub fn ip(arguments: &str) -> String {
    let output = Command::new("ip").args(arguments.split(' ')).output().expect("iproute2 is installed");
    assert!(output.status.success(), "ip {arguments}: {}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).unwrap()
}

/// Waits until `done` gives something.
pub fn wait_for<T>(what: &str, mut done: impl FnMut() -> Option<T>) -> T {
    let start = Instant::now();
    loop {
        if let Some(result) = done() {
            return result;
        }
        assert!(start.elapsed() < DEADLINE, "{what}: never");
        std::thread::yield_now();
    }
}

/// A packet socket on one device: sees what the device receives, and sends by it. With virtio-net headers.
pub struct PacketSocket(OwnedFd);

impl PacketSocket {
    /// On the device with this index.
    pub fn new(index: u32) -> PacketSocket {
        let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
        let protocol = (libc::ETH_P_ALL as u16).to_be();
        let all = Protocol::from_raw(NonZeroU32::new(protocol.into()).unwrap());
        let socket = socket_with(AddressFamily::PACKET, SocketType::RAW, flags, Some(all)).unwrap();
        let one: libc::c_int = 1;
        // SAFETY: all zeroes is a valid `sockaddr_ll`; the calls read that and an `int`, for as long as they last.
        unsafe {
            let mut address: libc::sockaddr_ll = std::mem::zeroed();
            address.sll_family = libc::AF_PACKET as u16;
            address.sll_protocol = protocol;
            address.sll_ifindex = index as i32;
            let len = size_of_val(&address) as libc::socklen_t;
            assert_eq!(libc::bind(socket.as_raw_fd(), (&raw const address).cast(), len), 0);
            let len = size_of_val(&one) as libc::socklen_t;
            let fd = socket.as_raw_fd();
            for option in [libc::PACKET_VNET_HDR, libc::PACKET_IGNORE_OUTGOING] {
                assert_eq!(libc::setsockopt(fd, libc::SOL_PACKET, option, (&raw const one).cast(), len), 0);
            }
        }
        PacketSocket(socket)
    }

    /// Sends a frame by the device.
    pub fn send(&self, header: &NetHeader, frame: &[u8]) {
        let bytes = [&header.to_bytes()[..NetHeader::LEGACY_LEN], frame].concat();
        assert_eq!(send(&self.0, &bytes, SendFlags::empty()), Ok(bytes.len()));
    }

    /// The next frame that the device has received, if there is one.
    pub fn try_receive(&self) -> Option<(NetHeader, Vec<u8>)> {
        let mut bytes = vec![0; 70_000];
        let (_, len) = recv(&self.0, &mut bytes[..], RecvFlags::empty()).ok()?;
        let mut header = [0; NetHeader::LEN];
        header[..NetHeader::LEGACY_LEN].copy_from_slice(&bytes[..NetHeader::LEGACY_LEN]);
        Some((NetHeader::from_bytes(&header), bytes[NetHeader::LEGACY_LEN..len].to_vec()))
    }

    /// The next frame that the device receives.
    pub fn receive(&self) -> (NetHeader, Vec<u8>) {
        wait_for("a frame", || self.try_receive())
    }
}

/// A TCP segment over IPv4 whose checksum is still that of the pseudo-header, and the header that says so: to be cut into
/// pieces of `gso_size` unless that is 0.
pub fn tcp(payload: usize, gso_size: u16) -> (NetHeader, Vec<u8>) {
    let mut frame = vec![2, 0, 0, 0, 0, 1, 2, 0, 0, 0, 0, 2, 8, 0, 0x45, 0];
    frame.extend(((40 + payload) as u16).to_be_bytes());
    frame.extend([0, 0, 0x40, 0, 64, 6, 0, 0, 10, 9, 0, 1, 10, 9, 0, 2]);
    let sum = switch_core::checksum::checksum(&frame[14..34]);
    frame[24..26].copy_from_slice(&sum.to_be_bytes());
    frame.extend([0, 7, 0, 9, 0, 0, 0, 0, 0, 0, 0, 0, 0x50, 0x10, 1, 0, 0, 0, 0, 0]);
    let pseudo = switch_core::checksum::pseudo_v4(0x0a09_0001, 0x0a09_0002, 6, 20 + payload as u32);
    frame[50..52].copy_from_slice(&switch_core::checksum::fold(pseudo).to_be_bytes());
    frame.extend((0..payload).map(|i| (i / 7) as u8));
    let gso = if gso_size > 0 { NetHeader::GSO_TCPV4 } else { NetHeader::GSO_NONE };
    let (flags, hdr_len) = (NetHeader::NEEDS_CSUM, if gso_size > 0 { 54 } else { 0 });
    let header = NetHeader {
        flags,
        gso_type: gso,
        hdr_len,
        gso_size,
        csum_start: 34,
        csum_offset: 16,
        num_buffers: 0,
    };
    (header, frame)
}

/// Whether the TCP checksum of a frame made by [`tcp`], or of a piece of it, is right.
pub fn is_complete(frame: &[u8]) -> bool {
    let pseudo = switch_core::checksum::pseudo_v4(0x0a09_0001, 0x0a09_0002, 6, frame.len() as u32 - 34);
    switch_core::checksum::fold(switch_core::checksum::add(pseudo, &frame[34..])) == 0xffff
}
