//! Two nodes with a guest each, who are the kernels of two more namespaces.

use std::io::{Read, Write};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, TcpListener, TcpStream};
use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use qemu_tests::daemon::{Daemon, DaemonConfig, PortConfig, Stats};
use qemu_tests::frontend::packet::Mac;
use qemu_tests::host::{Process, WorkDir, wait_for};
use qemu_tests::net::SOON;
use qemu_tests::netns::Namespace;
use qemu_tests::overlay::{Kind, Nodes, WIRE, leave_nothing, text};
use qemu_tests::ovs::BRIDGE;
use serde_json::Value;

/// Longer than anything takes that waits for several processes on a busy machine.
pub const LATE: Duration = Duration::from_secs(20);
/// The first node's port with a guest, and the second's.
pub const PORTS: [&str; 2] = ["p1", "g2"];
/// The underlay's ordinary MTU.
pub const MTU: u16 = 1500;
/// What a transfer carries unless it is told.
pub const BULK: usize = 4 << 20;

/// The share of packets that workers have to carry.
pub const FAST: f64 = 0.95;

/// A guest's MAC address.
pub fn mac(guest: usize) -> Mac {
    [2, 0, 0, 0, 0, guest as u8 + 1]
}

/// A guest's address.
pub fn ip(guest: usize, six: bool) -> IpAddr {
    let number = guest as u8 + 1;
    match six {
        true => Ipv6Addr::new(0xfd00, 1, 0, 0, 0, 0, 0, number.into()).into(),
        false => Ipv4Addr::new(10, 1, 0, number).into(),
    }
}

/// A front-end on the port of pointworkd at `socket`, for the kernel of a namespace, with the MAC address of guest `number`.
pub fn join_guest(guest: &Namespace, number: usize, socket: &Path, dir: &WorkDir) -> Result<Process> {
    let program = env!("CARGO_BIN_EXE_netns-guest");
    let configure = |command: &mut Command| {
        command.arg(format!("--net={}", guest.path().display())).arg("--").arg(program).arg(socket);
        command.args(["--mac", &text(mac(number))]);
    };
    Process::spawn("netns-guest", Path::new("nsenter"), configure, &dir.path("guest.log"))
}

/// Gives guest `number` its addresses, once it has a device.
pub fn give_addresses(guest: &Namespace, number: usize) -> Result<()> {
    wait_for("a guest's device", SOON, || {
        Ok(guest.ip(&["addr", "add", &format!("{}/24", ip(number, false)), "dev", "eth0"]).ok())
    })?;
    guest.run(|| Ok(std::fs::write("/proc/sys/net/ipv6/conf/eth0/disable_ipv6", "0")?))?;
    guest.ip(&["addr", "add", &format!("{}/64", ip(number, true)), "dev", "eth0", "nodad"])
}

/// The share of a port's packets that workers have forwarded while `work` was done, and how many there were.
pub fn share(daemon: &Daemon, port: &str, work: impl FnOnce() -> Result<()>) -> Result<(f64, u64)> {
    let count = |stats: &Stats| {
        let port = stats.ports.get(port).with_context(|| format!("no port {port}"))?;
        Ok::<_, anyhow::Error>((port.rx_forwarded, port.rx_packets))
    };
    let before = count(&daemon.balanced_stats()?)?;
    work()?;
    let after = count(&daemon.balanced_stats()?)?;
    let all = after.1 - before.1;
    Ok(((after.0 - before.0) as f64 / all.max(1) as f64, all))
}

/// Sends so many bytes by TCP from one guest to another, which has this address; they must arrive as they were. Gives Mbit/s.
pub fn bulk(from: &Namespace, to: &Namespace, address: SocketAddr, len: usize) -> Result<f64> {
    let listener = to.run(|| Ok(TcpListener::bind(address)?))?;
    let connect = || TcpStream::connect_timeout(&address, SOON).context("no connection");
    let mut stream = from.run(connect)?;
    stream.set_write_timeout(Some(LATE))?;
    let (mut accepted, _) = listener.accept()?;
    accepted.set_read_timeout(Some(LATE))?;
    let bytes: Vec<u8> = (0..len).map(|at| (at % 251) as u8).collect();
    let start = Instant::now();
    std::thread::scope(|scope| -> Result<()> {
        let sender = scope.spawn(|| -> Result<()> {
            stream.write_all(&bytes)?;
            Ok(stream.shutdown(std::net::Shutdown::Write)?)
        });
        let mut got = Vec::with_capacity(len);
        let read = accepted.read_to_end(&mut got);
        sender.join().map_err(|_| anyhow::anyhow!("the sender panicked"))??;
        read?;
        ensure!(got == bytes, "other bytes than were sent, {} of {len}", got.len());
        Ok(())
    })?;
    Ok(len as f64 * 8e-6 / start.elapsed().as_secs_f64())
}

/// What both switches know, for whoever looks into a failure.
pub fn state(nodes: &Nodes, daemon: &Daemon) -> String {
    let flows = |number: usize| {
        nodes.ovs[number].appctl(&["dpctl/dump-flows", "--names"]).unwrap_or_else(|error| error.to_string())
    };
    let ours = daemon.ctl(&["dump-flows"]).unwrap_or_default();
    let line = |flow: &Value| format!("{}, {}: {}\n", flow["flow"], flow["handling"], flow["actions"]);
    let ours: String = ours["flows"].as_array().into_iter().flatten().map(line).collect();
    format!("node 1:\n{}\npointwork:\n{ours}\nnode 2:\n{}", flows(0), flows(1))
}

/// Both nodes: the first has pointworkd, the second has none. Guest 0 is the first node's.
pub struct Bed {
    /// Ends before the namespaces that they are in.
    _guest: Process,
    pub daemon: Daemon,
    pub guests: [Namespace; 2],
    pub nodes: Nodes,
    mtu: u16,
    _dir: WorkDir,
}

impl Bed {
    /// Without a tunnel; `mtu` is that of the underlay.
    pub fn new(mtu: u16) -> Result<Self> {
        let dir = WorkDir::new()?;
        let nodes = Nodes::start(mtu)?;
        let guests = [Namespace::new()?, Namespace::new()?];
        let port = PortConfig::server(PORTS[0], &dir);
        let daemon = Daemon::start(&DaemonConfig::under(&nodes.ovs[0], [port.clone()]), &dir)?;
        nodes.plug(mtu)?;
        nodes.ovs[0].vsctl(&["set", "interface", PORTS[0], &format!("mtu_request={mtu}")])?;

        let [near, far] = &guests;
        let guest = join_guest(near, 0, &port.socket, &dir)?;
        let there = nodes.ovs[1].namespace();
        let peer = ["type", "veth", "peer", "name", "eth0", "netns", far.name()];
        there.ip(&[&["link", "add", PORTS[1]][..], &peer].concat())?;
        there.ip(&["link", "set", PORTS[1], "mtu", &mtu.to_string(), "up"])?;
        far.ip(&["link", "set", "eth0", "address", &text(mac(1)), "up"])?;
        leave_nothing(far, "eth0")?;
        nodes.ovs[1].vsctl(&["add-port", BRIDGE, PORTS[1]])?;

        daemon.wait_link(&[PORTS[0], WIRE], true, LATE)?;
        for (number, guest) in guests.iter().enumerate() {
            give_addresses(guest, number)?;
        }
        Ok(Self { _guest: guest, daemon, guests, nodes, mtu, _dir: dir })
    }

    /// With a tunnel of this kind, over IPv4 or IPv6, by which the guests reach each other. Their packets fill the underlay's MTU.
    pub fn tunnel(&self, kind: Kind, six: bool) -> Result<()> {
        self.nodes.tunnel(kind, six)?;
        self.guest_mtu(self.mtu - kind.overhead(six))?;
        self.reach(false).with_context(|| format!("{kind}, IPv6 outside: {six}"))
    }

    pub fn guest_mtu(&self, mtu: u16) -> Result<()> {
        self.guests.iter().try_for_each(|guest| guest.ip(&["link", "set", "eth0", "mtu", &mtu.to_string()]))
    }

    /// Waits until each guest reaches the other, by IPv4 or IPv6 inside.
    pub fn reach(&self, six: bool) -> Result<()> {
        for (from, to) in [(0, 1), (1, 0)] {
            let address = SocketAddr::new(ip(to, six), 7);
            let _listener = self.guests[to].run(|| Ok(TcpListener::bind(address)?))?;
            wait_for(&format!("guest {from} to reach {address}"), LATE, || {
                let connect = || Ok(TcpStream::connect_timeout(&address, Duration::from_millis(500)).ok());
                Ok(self.guests[from].run(connect)?.map(drop))
            })
            .with_context(|| self.state())?;
        }
        Ok(())
    }

    /// Sends so many bytes from one guest to the other by TCP, which must arrive as they were; gives Mbit/s.
    pub fn bulk(&self, from: usize, six: bool, len: usize) -> Result<f64> {
        let to = 1 - from;
        bulk(&self.guests[from], &self.guests[to], SocketAddr::new(ip(to, six), 80), len)
            .with_context(|| self.state())
    }

    /// The share of a port's packets that workers have forwarded while `work` was done, and how many there were.
    pub fn share(&self, port: &str, work: impl FnOnce() -> Result<()>) -> Result<(f64, u64)> {
        share(&self.daemon, port, work)
    }

    /// Lets guests talk both ways, by IPv4 and IPv6, until workers carry their packets; then what they send is to be carried so, into
    /// the tunnel and out of it.
    pub fn talk(&self, what: &str) -> Result<()> {
        self.reach(true)?;
        let transfer = |from: usize, six: bool, len: usize| {
            let (mut rate, mut decapsulated) = (0.0, (0.0, 0));
            let encapsulated = self.share(PORTS[0], || {
                decapsulated = self.share(WIRE, || {
                    rate = self.bulk(from, six, len)?;
                    Ok(())
                })?;
                Ok(())
            })?;
            Ok::<_, anyhow::Error>((rate, encapsulated, decapsulated))
        };
        let fast =
            |(_, (into, _), (out_of, _)): &(f64, (f64, u64), (f64, u64))| *into >= FAST && *out_of >= FAST;
        for six in [false, true] {
            for from in [0, 1] {
                wait_for("workers to carry it", LATE, || {
                    Ok(fast(&transfer(from, six, BULK / 16)?).then_some(()))
                })
                .with_context(|| format!("{what}: {}", self.state()))?;
                let measured = transfer(from, six, BULK)?;
                let (rate, (into, sent), (out_of, received)) = measured;
                println!(
                    "{what}, IPv{} inside, guest {} sends: {rate:.0} Mbit/s, by workers {:.2} % of {sent} into the tunnel, \
                     {:.2} % of {received} out of it",
                    if six { 6 } else { 4 },
                    from + 1,
                    100.0 * into,
                    100.0 * out_of
                );
                ensure!(fast(&measured), "{what}: {measured:?}: {}", self.state());
            }
        }
        Ok(())
    }

    /// What both switches know, for whoever looks into a failure.
    pub fn state(&self) -> String {
        state(&self.nodes, &self.daemon)
    }

    /// Ends a scenario: nothing is uncounted, and the daemon goes when it is told to.
    pub fn finish(mut self) -> Result<()> {
        let stats = self.daemon.balanced_stats()?;
        println!("{:?}; drops {:?}", stats.paths, stats.drops());
        self.daemon.terminate()
    }
}
