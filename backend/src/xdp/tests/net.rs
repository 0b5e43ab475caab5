//! Two hosts on a wire: network namespaces joined by a veth pair, which vanish with whoever holds them.

use crate::virtio::{Burst, Frame, NetHeader};
use crate::xdp::{XdpConfig, XdpMode, XdpPort, XdpRx, XdpTx};
use rustix::fd::{AsFd, OwnedFd};
use rustix::thread::{LinkNameSpaceType, move_into_link_name_space};
use std::fs::File;
use std::io::Read;
use std::net::UdpSocket;
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};

/// How long anything may take.
pub const DEADLINE: Duration = Duration::from_secs(60);

/// A network namespace.
pub struct Host(OwnedFd);

impl Host {
    /// A new namespace, and the process that it is made by.
    fn new() -> (Host, Child) {
        let script = "echo; exec cat >/dev/null";
        let mut child = Command::new("unshare")
            .args(["--net", "sh", "-c", script])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        child.stdout.take().unwrap().read_exact(&mut [0]).expect("namespaces need root");
        let file = File::open(format!("/proc/{}/ns/net", child.id())).unwrap();
        (Host(file.into()), child)
    }

    /// Runs `f` on a thread in the namespace.
    pub fn run<T: Send>(&self, f: impl FnOnce() -> T + Send) -> T {
        std::thread::scope(|scope| {
            let inside = scope.spawn(|| {
                move_into_link_name_space(self.0.as_fd(), Some(LinkNameSpaceType::Network)).unwrap();
                f()
            });
            inside.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
        })
    }

    /// Runs `ip` with arguments separated by spaces.
    pub fn ip(&self, arguments: &str) {
        self.tool("ip", arguments);
    }

    /// Runs `ethtool -K` with arguments separated by spaces.
    pub fn features(&self, arguments: &str) {
        self.tool("ethtool", &format!("-K {arguments}"));
    }

    fn tool(&self, program: &str, arguments: &str) {
        let run = || Command::new(program).args(arguments.split(' ')).output().unwrap();
        let output = self.run(run);
        let said = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "{program} {arguments}: {said}");
    }

    /// Opens a port in the namespace.
    pub fn open(&self, config: &XdpConfig) -> XdpPort {
        self.run(|| XdpPort::open(config).unwrap())
    }
}

/// Two hosts, `near` and `far`, with devices of these names. Addresses 10.9.0.1 and 10.9.0.2, 02:00:00:00:00:01 and :02.
pub struct Wire {
    pub near: Host,
    pub far: Host,
}

pub const NEAR_MAC: [u8; 6] = [2, 0, 0, 0, 0, 1];
pub const FAR_MAC: [u8; 6] = [2, 0, 0, 0, 0, 2];

impl Wire {
    pub fn new(queues: u32, mtu: u32) -> Wire {
        let ((near, mut a), (far, mut b)) = (Host::new(), Host::new());
        let q = format!("numrxqueues {queues} numtxqueues {queues}");
        near.ip(&format!("link add near {q} type veth peer name far {q} netns {}", b.id()));
        for (host, name, n) in [(&near, "near", 1), (&far, "far", 2)] {
            host.ip(&format!("link set {name} addrgenmode none address 02:00:00:00:00:0{n} mtu {mtu}"));
            host.ip(&format!("addr add 10.9.0.{n}/24 dev {name}"));
            host.ip(&format!("link set {name} up"));
        }
        for child in [&mut a, &mut b] {
            drop(child.stdin.take());
            child.wait().unwrap();
        }
        let wire = Wire { near, far };
        // So that no test has to reckon with ARP.
        wire.near.ip("neigh add 10.9.0.2 lladdr 02:00:00:00:00:02 dev near");
        wire.far.ip("neigh add 10.9.0.1 lladdr 02:00:00:00:00:01 dev far");
        wire
    }

    /// The kernels at both ends can talk; what was sent from far before has arrived then, with one queue.
    pub fn kernels_talk(&self) {
        let near = self.near.run(|| UdpSocket::bind("10.9.0.1:7").unwrap());
        let far = self.far.run(|| UdpSocket::bind("10.9.0.2:0").unwrap());
        for socket in [&near, &far] {
            socket.set_read_timeout(Some(DEADLINE)).unwrap();
        }
        far.send_to(b"there", "10.9.0.1:7").unwrap();
        let mut buffer = [0; 16];
        let (n, from) = near.recv_from(&mut buffer).unwrap();
        assert_eq!(&buffer[..n], b"there");
        near.send_to(b"back", from).unwrap();
        let n = far.recv(&mut buffer).unwrap();
        assert_eq!(&buffer[..n], b"back");
    }
}

/// Few frames, so that their end is reached.
pub fn small(device: &str, mode: Option<XdpMode>) -> XdpConfig {
    XdpConfig { mode, rx_frames: 256, tx_frames: 128, ..XdpConfig::new(device) }
}

/// A frame of private bytes.
pub fn frame(bytes: &[u8]) -> Frame<'_> {
    let header = NetHeader::default();
    Frame { header, head: bytes, body: &[], tail: &[], tail_offset: 0, len: bytes.len() as u32 }
}

/// An Ethernet frame.
pub fn ethernet(dst: [u8; 6], ethertype: u16, payload: &[u8]) -> Vec<u8> {
    [&dst[..], &FAR_MAC, &ethertype.to_be_bytes(), payload].concat()
}

/// Sends all frames and has them leave.
pub fn send_all(tx: &XdpTx, frames: &[Vec<u8>]) {
    let frames: Vec<_> = frames.iter().map(|bytes| frame(bytes)).collect();
    let (mut sent, deadline) = (0, Instant::now() + DEADLINE);
    while sent < frames.len() {
        sent += tx.send(&frames[sent..]).sent;
        tx.notify();
        assert!(Instant::now() < deadline, "{sent} of {} were sent", frames.len());
    }
}

/// Waits until `done` is.
pub fn wait_for(what: &str, mut done: impl FnMut() -> bool) {
    let deadline = Instant::now() + DEADLINE;
    while !done() {
        assert!(Instant::now() < deadline, "waited in vain for {what}");
        std::thread::yield_now();
    }
}

/// All bytes of frame `i`.
pub fn bytes(burst: &Burst, i: usize) -> Vec<u8> {
    let mut bytes = vec![0; burst.frames()[i].len as usize];
    assert_eq!(burst.copy_head(&burst.frames()[i], &mut bytes), bytes.len());
    bytes
}

/// What has arrived so far.
pub fn drain(rx: &mut XdpRx, burst: &mut Burst) -> Vec<Vec<u8>> {
    let mut all = vec![];
    while rx.receive(burst, 64) > 0 {
        all.extend((0..burst.frames().len()).map(|i| bytes(burst, i)));
        rx.complete(burst);
    }
    all
}

/// Waits for `count` packets.
pub fn expect(rx: &mut XdpRx, count: usize) -> Vec<Vec<u8>> {
    let (mut all, mut burst) = (vec![], Burst::new());
    wait_for(&format!("{count} packets"), || {
        all.extend(drain(rx, &mut burst));
        all.len() >= count
    });
    assert_eq!(all.len(), count);
    all
}

/// The sides of queue 0.
pub fn sides(port: &mut XdpPort) -> (XdpRx, Arc<XdpTx>) {
    (port.take_rx(0).unwrap(), port.tx(0).unwrap())
}
