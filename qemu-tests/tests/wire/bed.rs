//! Guests, a daemon with a wire, and a host at the wire's other end, in network namespaces.

use std::net::UdpSocket;
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use qemu_tests::daemon::{DaemonConfig, PortConfig, PortShow};
use qemu_tests::frontend::packet::{Mac, Packet};
use qemu_tests::host::{WorkDir, wait_for};
use qemu_tests::net::{Guest, Net, SOON};
use qemu_tests::netns::Namespace;
use qemu_tests::tap::Tap;

/// The host's addresses.
pub const HOST_MAC: Mac = [2, 0, 0, 0, 1, 0];
pub const HOST_IP: [u8; 4] = [10, 0, 0, 100];

/// What the veth is like.
#[derive(Clone, Copy)]
pub struct Veth {
    pub queues: u32,
    pub mtu: u32,
}

pub const ORDINARY: Veth = Veth { queues: 1, mtu: 1500 };

/// Joins `near` and `far` by a veth pair: `eth1` is the daemon's, `host0` has the host's addresses. Its kernel completes
/// checksums and knows the addresses of two guests.
pub fn join(near: &Namespace, far: &Namespace, Veth { queues, mtu }: Veth) -> Result<()> {
    let (queues, mtu) = (&*queues.to_string(), &*mtu.to_string());
    let kind = ["numrxqueues", queues, "numtxqueues", queues, "type", "veth", "peer", "name", "eth1"];
    let there = ["numrxqueues", queues, "numtxqueues", queues, "netns", near.name()];
    far.ip(&[&["link", "add", "host0"][..], &kind, &there].concat())?;
    near.ip(&["link", "set", "eth1", "mtu", mtu, "up"])?;
    far.ip(&["link", "set", "host0", "address", &text(HOST_MAC), "mtu", mtu])?;
    far.ip(&["addr", "add", "10.0.0.100/24", "dev", "host0"])?;
    far.ip(&["link", "set", "host0", "up"])?;
    // A veth passes on checksums that its sender left to the hardware, and there is none on this wire.
    far.run(|| {
        let mut command = Command::new("ethtool");
        let output = command.args(["-K", "host0", "tx", "off"]).stdin(Stdio::null()).output();
        let output = output.context("ethtool")?;
        let said = String::from_utf8_lossy(&output.stderr).into_owned();
        ensure!(output.status.success(), "ethtool: {said}");
        Ok(())
    })?;
    for guest in [1u8, 2] {
        let (ip, mac) = (format!("10.0.0.{guest}"), text([2, 0, 0, 0, 0, guest]));
        far.ip(&["neigh", "replace", &ip, "lladdr", &mac, "dev", "host0"])?;
    }
    Ok(())
}

/// Waits until the host's device sends: its queue is shut until the kernel's background work has seen the carrier.
pub fn settle(far: &Namespace) -> Result<()> {
    wait_for("host0 to be up", SOON * 2, || {
        let show =
            || Ok(Command::new("ip").args(["-o", "link", "show", "host0"]).stdin(Stdio::null()).output()?);
        let output = far.run(show)?;
        Ok(String::from_utf8_lossy(&output.stdout).contains("state UP").then_some(()))
    })?;
    // That work holds the kernel's lock of network devices, which this takes too.
    far.ip(&["link", "set", "host0", "up"])
}

pub fn text(mac: Mac) -> String {
    mac.map(|byte| format!("{byte:02x}")).join(":")
}

/// A wire's section of the configuration; `more` are further lines.
pub fn wire(name: &str, more: &str) -> String {
    format!("\n[[port]]\nname = {name:?}\nkind = \"xdp\"\n{more}\n")
}

/// Two guests, the daemon, and the host.
pub struct Bed {
    pub net: Net,
    pub near: Namespace,
    pub far: Namespace,
}

impl Bed {
    /// With the embedded bridge, and the wire `eth1`; `more` are further lines of its configuration.
    pub fn new(veth: Veth, more: &str) -> Result<Bed> {
        let (near, far) = (Namespace::new()?, Namespace::new()?);
        join(&near, &far, veth)?;
        let dir = WorkDir::new()?;
        let jumbo = format!("mtu = {}", veth.mtu);
        let ports = ["p1", "p2"].map(|name| PortConfig::server(name, &dir).with(&jumbo));
        let config = DaemonConfig {
            namespace: Some(near.path()),
            more: wire("eth1", more),
            cpus: if veth.queues > 1 { vec![0, 1] } else { Vec::new() },
            ..DaemonConfig::new(ports)
        };
        let net = Net::start(dir, config, |_, builder| builder)?;
        net.daemon.wait_link(&["p1", "p2", "eth1"], true, SOON)?;
        Ok(Bed { net, near, far })
    }

    pub fn show(&self, name: &str) -> Result<PortShow> {
        port(&self.net, name)
    }

    /// A packet from guest 0 to the host, its transport header still to be chosen.
    pub fn packet(&self) -> Packet {
        Packet::eth(self.net.guests[0].mac, HOST_MAC).ipv4(self.net.guests[0].ip, HOST_IP)
    }

    /// A socket of the host.
    pub fn socket(&self, port: u16) -> Result<UdpSocket> {
        self.far.run(|| {
            let socket = UdpSocket::bind((std::net::Ipv4Addr::from(HOST_IP), port))?;
            socket.set_read_timeout(Some(SOON))?;
            Ok(socket)
        })
    }

    /// Guest 0 and the host find each other by ARP, and the host answers a ping.
    pub fn greet(&mut self) -> Result<()> {
        settle(&self.far)?;
        greet(&mut self.net.guests[0])
    }

    /// Guest 0 sends `len` bytes to the host and gets as many back.
    pub fn echo(&mut self, socket: &UdpSocket, len: usize) -> Result<()> {
        let packet = self.packet().udp(1000, socket.local_addr()?.port()).payload_len(len);
        echo(&mut self.net.guests[0], socket, &packet, len)
    }
}

pub fn port(net: &Net, name: &str) -> Result<PortShow> {
    let shown = net.daemon.show()?;
    shown.into_iter().find(|port| port.name == name).with_context(|| format!("no port {name}"))
}

/// A guest and the host find each other by ARP, and the host answers a ping.
pub fn greet(guest: &mut Guest) -> Result<()> {
    let (mac, ip) = (guest.mac, guest.ip);
    let ask = Packet::eth(mac, [0xff; 6]).arp_request(ip, HOST_IP).build();
    let answer = Packet::eth(HOST_MAC, mac).arp_reply(HOST_IP, ip).build();
    guest.send(&ask)?;
    expect_start(guest, &answer).context("no answer to ARP")?;
    let ping = Packet::eth(mac, HOST_MAC).ipv4(ip, HOST_IP).echo_request(7, 1).payload_len(56);
    guest.send(&ping.build())?;
    let (_, frame, checked) = guest.expect_checked().context("no answer to a ping")?;
    ensure!((checked.protocol, checked.src, frame[checked.transport]) == (1, HOST_MAC, 0), "{checked:?}");
    Ok(())
}

/// The next frame but for what the host asks by itself must begin so: a device may have padded it.
fn expect_start(guest: &mut Guest, start: &[u8]) -> Result<()> {
    let (_, _, frame) = guest.receive(SOON)?.context("nothing came")?;
    ensure!(frame.starts_with(start), "another frame came: {frame:02x?}, not {start:02x?}");
    Ok(())
}

/// The guest sends a packet with `len` bytes of payload to the host's socket and gets them back.
pub fn echo(guest: &mut Guest, socket: &UdpSocket, packet: &Packet, len: usize) -> Result<()> {
    // The sum is left to the device; the host's kernel looks at it.
    let (header, frame) = packet.build_partial();
    guest.send_with(&header, &frame)?;
    let mut buffer = vec![0; 1 << 16];
    let (got, from) = socket.recv_from(&mut buffer).context("nothing came to the host")?;
    ensure!(got == len, "{got} of {len} bytes");
    socket.send_to(&buffer[..got], from)?;
    let (header, frame, checked) = guest.expect_checked()?;
    ensure!(header.flags == 0 && header.gso_type == 0, "{header:?}");
    ensure!(frame[checked.payload] == buffer[..got], "other bytes came back");
    Ok(())
}

/// A guest whose device is a TAP in a namespace, so that a kernel speaks for it.
pub struct Joined {
    pub namespace: Namespace,
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<Result<()>>>,
}

impl Joined {
    /// Has the kernel of a namespace of its own, with the guest's addresses, speak for `guest`.
    pub fn new(mut guest: Guest) -> Result<Joined> {
        let namespace = Namespace::new()?;
        let mut tap = Tap::new(&namespace, "eth0")?;
        namespace.ip(&["link", "set", "eth0", "address", &text(guest.mac)])?;
        let address = guest.ip.map(|byte| byte.to_string()).join(".");
        namespace.ip(&["addr", "add", &format!("{address}/24"), "dev", "eth0"])?;
        let stop = Arc::<AtomicBool>::default();
        let told = stop.clone();
        let thread = std::thread::spawn(move || {
            while !told.load(Ordering::Relaxed) {
                while let Some(frame) = tap.receive()? {
                    guest.frontend.queue(0).tx.tx_reap()?;
                    guest.send(&frame)?;
                }
                if let Some((_, _, frame)) = guest.receive(Duration::from_millis(1))? {
                    tap.send(&frame)?;
                }
            }
            Ok(())
        });
        Ok(Joined { namespace, stop, thread: Some(thread) })
    }

    /// Ends it; what went wrong meanwhile.
    pub fn stop(mut self) -> Result<()> {
        self.stop.store(true, Ordering::Relaxed);
        match self.thread.take().map(JoinHandle::join) {
            Some(Ok(result)) => result,
            _ => anyhow::bail!("the guest's thread panicked"),
        }
    }
}

impl Drop for Joined {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
    }
}

/// Waits until `what` holds of a port.
pub fn until(net: &Net, name: &str, what: &str, holds: impl Fn(&PortShow) -> bool) -> Result<PortShow> {
    wait_for(&format!("port {name}: {what}"), SOON * 2, || {
        Ok(Some(port(net, name)?).filter(|shown| holds(shown)))
    })
}
