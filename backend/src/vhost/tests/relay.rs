//! What the relay changes and refuses, byte by byte, against ports over real sockets.

use std::fs::{self, File};
use std::io::{ErrorKind, Read, Write};
use std::os::fd::AsRawFd;
use std::os::unix::net::{UnixListener, UnixStream};
use std::thread;
use std::time::{Duration, Instant};

use vhost::vhost_user::message::FrontendReq;
use vhost::{VhostBackend, VhostUserMemoryRegionInfo};
use vmm_sys_util::sock_ctrl_msg::ScmSocket;

use super::super::relay::private_connection;
use super::*;

/// The version of the protocol, and with the wish for a reply.
const PLAIN: u32 = 1;
const NEED_REPLY: u32 = 1 | 8;
const IS_REPLY: u32 = 1 | 4;

fn message(request: FrontendReq, flags: u32, payload: &[u8]) -> Vec<u8> {
    let header = [u32::from(request), flags, payload.len() as u32].map(u32::to_ne_bytes);
    [header.as_flattened(), payload].concat()
}

/// The payload of `SET_VRING_ENABLE`.
fn enable(ring: u32) -> [u8; 8] {
    (u64::from(ring) | 1 << 32).to_ne_bytes()
}

/// The next message of the port: its request, flags and payload, which is a 64-bit number.
fn reply(mut stream: &UnixStream) -> (FrontendReq, u32, u64) {
    stream.set_read_timeout(Some(PATIENCE)).unwrap();
    let mut bytes = [0; 20];
    stream.read_exact(&mut bytes).unwrap();
    let word = |i: usize| u32::from_ne_bytes(bytes[4 * i..4 * i + 4].try_into().unwrap());
    assert_eq!(word(2), 8);
    let request = FrontendReq::try_from(word(0)).unwrap();
    (request, word(1), u64::from_ne_bytes(bytes[12..].try_into().unwrap()))
}

fn ask(mut stream: &UnixStream, request: FrontendReq, flags: u32, payload: &[u8]) -> u64 {
    stream.write_all(&message(request, flags, payload)).unwrap();
    let (replied, flags, value) = reply(stream);
    assert_eq!((replied, flags), (request, IS_REPLY));
    value
}

/// Waits until the port has closed the connection.
fn assert_closed(mut stream: &UnixStream) {
    stream.set_read_timeout(Some(PATIENCE)).unwrap();
    let mut rest = vec![];
    match stream.read_to_end(&mut rest) {
        Ok(_) => {}
        Err(e) => assert_eq!(e.kind(), ErrorKind::ConnectionReset, "{e}"),
    }
}

/// What QEMU says before it knows of any driver.
fn introduce(stream: &UnixStream) {
    use FrontendReq::*;
    let mut w = stream;
    assert_ne!(ask(stream, GET_FEATURES, PLAIN, &[]) & PROTOCOL_FEATURES, 0);
    let protocol = ask(stream, GET_PROTOCOL_FEATURES, PLAIN, &[]);
    w.write_all(&message(SET_PROTOCOL_FEATURES, PLAIN, &protocol.to_ne_bytes())).unwrap();
    assert_eq!(ask(stream, GET_QUEUE_NUM, PLAIN, &[]), 1, "pairs, not rings");
    w.write_all(&message(SET_OWNER, PLAIN, &[])).unwrap();
}

/// What QEMU says until a driver comes: its device exists.
fn make_device(stream: &UnixStream) {
    introduce(stream);
    assert_eq!(ask(stream, FrontendReq::SET_VRING_ENABLE, NEED_REPLY, &enable(0)), 0);
}

#[test]
fn rings_may_be_enabled_before_features_are_set() {
    let bed = Bed::new(Mode::Server);
    let stream = UnixStream::connect(bed.socket(0)).unwrap();
    introduce(&stream);
    // Both ways of QEMU: with and without a reply. Replies come in the order of the requests.
    for (ring, flags) in [(0, PLAIN), (1, NEED_REPLY)] {
        (&stream).write_all(&message(FrontendReq::SET_VRING_ENABLE, flags, &enable(ring))).unwrap();
    }
    let features = (MODERN | PROTOCOL_FEATURES).to_ne_bytes();
    (&stream).write_all(&message(FrontendReq::SET_FEATURES, NEED_REPLY, &features)).unwrap();
    (&stream).write_all(&message(FrontendReq::SET_VRING_ENABLE, NEED_REPLY, &enable(1))).unwrap();
    for request in [FrontendReq::SET_VRING_ENABLE, FrontendReq::SET_FEATURES, FrontendReq::SET_VRING_ENABLE] {
        assert_eq!(reply(&stream), (request, IS_REPLY, 0));
    }
    // The rest as always, but for enabling: they are.
    stream.set_read_timeout(None).unwrap();
    let guest = Guest::new(stream, MODERN);
    guest.frontend.set_mem_table(&guest.regions()).unwrap();
    for i in [0, 1] {
        guest.frontend.set_vring_num(i, SIZE).unwrap();
        guest.frontend.set_vring_base(i, 0).unwrap();
        guest.frontend.set_vring_addr(i, &guest.ring_config(i)).unwrap();
        guest.frontend.set_vring_kick(i, &guest.driver(i).kick).unwrap();
    }
    assert_eq!(bed.event(0), PortEvent::LinkUp { queues: 1 });
    assert_eq!(bed.shared(0).features() & MODERN, MODERN, "what was set, not what the relay said");
}

#[test]
fn enabling_needs_protocol_features() {
    let bed = Bed::new(Mode::Server);
    let stream = UnixStream::connect(bed.socket(0)).unwrap();
    ask(&stream, FrontendReq::GET_FEATURES, PLAIN, &[]);
    (&stream).write_all(&message(FrontendReq::SET_VRING_ENABLE, PLAIN, &enable(0))).unwrap();
    assert_closed(&stream);
}

#[test]
fn messages_may_come_in_pieces() {
    let bed = Bed::new(Mode::Server);
    let mut stream = UnixStream::connect(bed.socket(0)).unwrap();
    introduce(&stream);
    let features = (MODERN | PROTOCOL_FEATURES).to_ne_bytes();
    for byte in message(FrontendReq::SET_FEATURES, NEED_REPLY, &features) {
        stream.write_all(&[byte]).unwrap();
        thread::sleep(Duration::from_millis(1));
    }
    assert_eq!(reply(&stream), (FrontendReq::SET_FEATURES, IS_REPLY, 0));
    assert_eq!(bed.shared(0).features() & MODERN, MODERN);
}

#[test]
fn memory_of_32_regions() {
    let bed = Bed::new(Mode::Server);
    let [mut a, mut b] = bed.guests();
    let extra = tempfile::tempfile().unwrap();
    extra.set_len(32 << 16).unwrap();
    let mut regions = a.regions();
    for i in regions.len() as u64..32 {
        regions.push(VhostUserMemoryRegionInfo {
            guest_phys_addr: 0x1000_0000 + (i << 16),
            memory_size: 0x1_0000,
            userspace_addr: FRONTEND + 0x1000_0000 + (i << 16),
            mmap_offset: i << 16,
            mmap_handle: extra.as_raw_fd(),
        });
    }
    // Answered, since all of this wants replies.
    a.frontend.set_mem_table(&regions).unwrap();
    exchange(&mut a, &mut b, 50);
    exchange(&mut b, &mut a, 50);
}

/// How often `file` is open in this process.
fn open_count(file: &Path) -> usize {
    let open = fs::read_dir("/proc/self/fd").unwrap();
    open.filter(|fd| fs::read_link(fd.as_ref().unwrap().path()).is_ok_and(|to| to == file)).count()
}

#[test]
fn broken_front_ends_lose_their_connection_and_no_descriptor_stays() {
    use FrontendReq::*;
    let bed = Bed::new(Mode::Server);
    let path = bed.dir.path().join("passed");
    let file = File::create_new(&path).unwrap();
    let [header, size] = [12, 4096];
    let raw = |words: [u32; 3]| words.map(u32::to_ne_bytes).as_flattened().to_vec();
    let kick = message(SET_VRING_KICK, PLAIN, &0u64.to_ne_bytes());
    let table = message(SET_MEM_TABLE, PLAIN, &vec![0; size]);
    // What is sent, with how many descriptors, and whether the port closes without our closing.
    let cases: [(Vec<u8>, usize, bool); 21] = [
        (vec![0xff; 64], 0, true),
        (vec![0; 4096], 1, true),
        (raw([1, 0, 0]), 0, true),
        (raw([1, 2, 0]), 1, true),
        (raw([1, IS_REPLY, 0]), 0, true),
        (raw([200, PLAIN, 0]), 1, true),
        (raw([5, PLAIN, size as u32 + 1]), 32, true),
        (raw([5, PLAIN, u32::MAX]), 0, true),
        (message(GET_FEATURES, PLAIN, &[]), 1, true),
        (kick.clone(), 0, true),
        (kick.clone(), 2, true),
        (table.clone(), 32, true),
        (table.clone(), 33, true),
        (table.clone(), 34, true),
        (table.clone(), 253, true),
        (message(SET_LOG_BASE, PLAIN, &[4096u64, 0].map(u64::to_ne_bytes).concat()), 1, true), // the file is shorter
        (message(SET_LOG_BASE, PLAIN, &[u64::MAX; 2].map(u64::to_ne_bytes).concat()), 1, true),
        (message(SET_LOG_BASE, PLAIN, &[1; 8]), 1, true),
        (message(SET_LOG_BASE, PLAIN, &[1; 16]), 2, true),
        (kick[..5].to_vec(), 1, false),
        (table[..header + 100].to_vec(), 32, false),
    ];
    for (i, (bytes, fds, closes)) in cases.iter().enumerate() {
        let stream = UnixStream::connect(bed.socket(0)).unwrap();
        make_device(&stream);
        let sent = stream.send_with_fds(&[&bytes[..]], &vec![file.as_raw_fd(); *fds]).unwrap();
        assert_eq!(sent, bytes.len());
        if !closes {
            stream.shutdown(std::net::Shutdown::Write).unwrap();
        }
        assert_closed(&stream);
        let deadline = Instant::now() + PATIENCE;
        while open_count(&path) > 1 {
            assert!(Instant::now() < deadline, "case {i}: {} descriptors stay", open_count(&path) - 1);
            thread::sleep(Duration::from_millis(1));
        }
    }
    // The port lives on.
    let mut a = bed.connect(0);
    a.start();
    assert_eq!(bed.event(0), PortEvent::LinkUp { queues: 1 });
}

#[test]
fn shutdown_waits_for_nobody() {
    let bed = Bed::new(Mode::Server);
    // One is connected and idle; the other asks for ever and reads no answer, until everything is full.
    let [idle, busy] = bed.guests();
    busy.stream.set_write_timeout(Some(Duration::from_millis(200))).unwrap();
    let question = message(FrontendReq::GET_FEATURES, PLAIN, &[]);
    while (&busy.stream).write_all(&question).is_ok() {}
    for port in &bed.ports {
        let begin = Instant::now();
        port.lock().unwrap().shutdown();
        assert!(begin.elapsed() < Duration::from_secs(2), "{:?}", begin.elapsed());
    }
    for i in 0..2 {
        assert_eq!(bed.event(i), PortEvent::LinkDown);
        assert!(!bed.shared(i).is_connected());
    }
    assert_closed(&idle.stream);
    assert_closed(&busy.stream);
}

#[test]
fn shutdown_waits_for_no_client() {
    let bed = Bed::new(Mode::Client);
    let listener = UnixListener::bind(bed.socket(0)).unwrap();
    let (stream, _) = listener.accept().unwrap();
    introduce(&stream);
    for port in &bed.ports {
        let begin = Instant::now();
        port.lock().unwrap().shutdown();
        assert!(begin.elapsed() < Duration::from_secs(2), "{:?}", begin.elapsed());
    }
    assert_closed(&stream);
}

#[test]
fn connections_leave_nothing_open() {
    const TIMES: usize = 400;
    let open = || fs::read_dir("/proc/self/fd").unwrap().count();
    let bed = Bed::new(Mode::Server);
    let before = open();
    for _ in 0..TIMES {
        let stream = UnixStream::connect(bed.socket(0)).unwrap();
        make_device(&stream);
    }
    // Other tests have descriptors, too, but fewer by far than one for each connection.
    let grown = open().saturating_sub(before);
    assert!(grown < TIMES / 2, "{grown} descriptors after {TIMES} connections");
}

#[test]
fn who_leaves_without_a_device_is_not_served_again_at_once() {
    let bed = Bed::new(Mode::Server);
    let begin = Instant::now();
    for _ in 0..3 {
        // As QEMU does that wants more queues than there are.
        introduce(&UnixStream::connect(bed.socket(0)).unwrap());
    }
    // Twice the pause, less what the clocks may differ.
    assert!(begin.elapsed() > Duration::from_millis(900), "{:?}", begin.elapsed());
    let mut a = bed.connect(0);
    a.start();
    assert_eq!(bed.event(0), PortEvent::LinkUp { queues: 1 });
}

#[test]
fn the_private_connection_is_ours_alone() {
    let (mut ours, listener) = private_connection().unwrap();
    let address = rustix::net::getsockname(listener_fd(&listener)).unwrap();
    let other = rustix::net::socket_with(
        rustix::net::AddressFamily::UNIX,
        rustix::net::SocketType::STREAM,
        rustix::net::SocketFlags::NONBLOCK,
        None,
    )
    .unwrap();
    // Nobody fits in beside us.
    assert_eq!(rustix::net::connect(&other, &address), Err(rustix::io::Errno::AGAIN));
    let mut accepted = listener.accept().unwrap().unwrap();
    ours.write_all(b"us").unwrap();
    let mut read = [0; 2];
    accepted.read_exact(&mut read).unwrap();
    assert_eq!(&read, b"us");
    drop(listener);
    assert_eq!(rustix::net::connect(&other, &address), Err(rustix::io::Errno::CONNREFUSED));
}

fn listener_fd(listener: &vhost::vhost_user::Listener) -> std::os::fd::BorrowedFd<'_> {
    // SAFETY: the listener has it open as long as it is borrowed.
    unsafe { std::os::fd::BorrowedFd::borrow_raw(listener.as_raw_fd()) }
}
