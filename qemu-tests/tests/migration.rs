//! Guests that migrate between two QEMUs, each on a daemon of its own, while they are pinged and fed with a stream. Both daemons
//! have a wire into one network: a Linux bridge in a namespace.

use std::io::Write;
use std::net::{Ipv4Addr, SocketAddr, TcpStream, UdpSocket};
use std::process::{ChildStdin, Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, ensure};
use qemu_tests::daemon::{Daemon, DaemonConfig, PortConfig};
use qemu_tests::guest::{Guest, GuestConfig, Migration, Nic};
use qemu_tests::host::{WorkDir, wait_for};
use qemu_tests::netns::Namespace;
use qemu_tests::random::Random;
use rustix::net::{AddressFamily, SocketType, ipproto};
use serde_json::json;

/// Longer than anything here takes on a busy machine.
const DEADLINE: Duration = Duration::from_secs(60);
/// Between two pings.
const INTERVAL: Duration = Duration::from_millis(20);
const MAC: &str = "52:00:00:00:00:01";
const GUEST: Ipv4Addr = Ipv4Addr::new(10, 0, 0, 1);
const HOST: &str = "10.0.0.100/24";
/// What QEMU migrates with when it is not told, in bytes a second.
const QEMUS_BANDWIDTH: u64 = 128 << 20;
/// Where the guest takes the stream.
const PORT: u16 = 7000;

/// One of the two machines: a daemon with the port `vm` and the wire `eth1`, in a namespace of its own.
struct Machine {
    daemon: Daemon,
    port: PortConfig,
    packed: bool,
    /// The device of the bridge at the wire's other end.
    far_end: &'static str,
    dir: WorkDir,
    _namespace: Namespace,
}

impl Machine {
    fn new(network: &Namespace, far_end: &'static str, packed: bool) -> Result<Machine> {
        let namespace = Namespace::new()?;
        let peer = ["peer", "name", "eth1", "netns", namespace.name()];
        network.ip(&[&["link", "add", far_end, "type", "veth"][..], &peer].concat())?;
        namespace.ip(&["link", "set", "eth1", "up"])?;
        network.ip(&["link", "set", far_end, "master", "br0", "up"])?;
        // A veth passes on checksums that its sender left to the hardware, and there is none on this wire.
        run_in(network, "ethtool", &["-K", far_end, "tx", "off"])?;
        let dir = WorkDir::new()?;
        // Both ways to meet QEMU.
        let port = if packed { PortConfig::client("vm", &dir) } else { PortConfig::server("vm", &dir) };
        let config = DaemonConfig {
            namespace: Some(namespace.path()),
            more: "\n[[port]]\nname = \"eth1\"\nkind = \"xdp\"\n".into(),
            ..DaemonConfig::new([port.clone()])
        };
        let daemon = Daemon::start(&config, &dir)?;
        daemon.wait_link(&["eth1"], true, DEADLINE)?;
        Ok(Machine { daemon, port, packed, far_end, dir, _namespace: namespace })
    }

    /// QEMU with the guest, which boots or, if `incoming`, is to come.
    fn launch(&self, incoming: bool) -> Result<Guest> {
        let socket = &self.port.socket;
        let nic = if self.port.client { Nic::listen(socket) } else { Nic::connect(socket) };
        let packed = if self.packed { "on" } else { "off" };
        // Room for what comes in one go: an emulated guest is slow to take it.
        let nic = nic.mac(MAC).options(&format!("rx_queue_size=1024,packed={packed}"));
        Guest::launch(GuestConfig { incoming, ..GuestConfig::new("vm", nic) }, &self.dir)
    }

    /// All that the daemon has taken was delivered or dropped under a name, and it has no fault.
    fn check(&self) -> Result<()> {
        let stats = self.daemon.balanced_stats()?;
        println!("{}: drops {:?}", self.far_end, stats.drops());
        let shown = self.daemon.show()?;
        ensure!(shown.iter().all(|port| port.fault.is_none()), "{shown:?}");
        Ok(())
    }
}

/// Runs a program in a namespace; what it prints.
fn run_in(namespace: &Namespace, program: &str, arguments: &[&str]) -> Result<String> {
    namespace.run(|| {
        let output = Command::new(program).args(arguments).stdin(Stdio::null()).output();
        let output = output.with_context(|| program.to_owned())?;
        let said = String::from_utf8_lossy(&output.stderr);
        ensure!(output.status.success(), "{program} {}: {said}", arguments.join(" "));
        Ok(String::from_utf8_lossy(&output.stdout).into_owned())
    })
}

/// The device at which the bridge has last seen the guest's address.
fn seen_at(network: &Namespace) -> Result<Option<String>> {
    let entries = run_in(network, "bridge", &["fdb", "show", "br", "br0"])?;
    let entry = entries.lines().find(|line| line.starts_with(MAC));
    Ok(entry.and_then(|line| line.split_whitespace().nth(2)).map(str::to_owned))
}

/// A thread that goes on until it is told.
struct Running<T> {
    stop: Arc<AtomicBool>,
    thread: JoinHandle<Result<T>>,
}

impl<T: Send + 'static> Running<T> {
    fn start(work: impl FnOnce(&AtomicBool) -> Result<T> + Send + 'static) -> Running<T> {
        let stop = Arc::<AtomicBool>::default();
        let told = stop.clone();
        Running { stop, thread: std::thread::spawn(move || work(&told)) }
    }

    fn stop(self) -> Result<T> {
        self.stop.store(true, Ordering::Relaxed);
        self.thread.join().map_err(|_| anyhow!("a thread has panicked"))?
    }
}

/// Pings that are sent to the guest, one each [`INTERVAL`].
struct Pings {
    sent: Arc<AtomicU64>,
    running: Running<Vec<bool>>,
}

impl Pings {
    fn start(network: &Namespace) -> Result<Pings> {
        let socket = network.run(|| {
            // Who may have sockets that ping, by group.
            std::fs::write("/proc/sys/net/ipv4/ping_group_range", "0 2147483647")?;
            let icmp = Some(ipproto::ICMP);
            Ok(UdpSocket::from(rustix::net::socket(AddressFamily::INET, SocketType::DGRAM, icmp)?))
        })?;
        let sent = Arc::<AtomicU64>::default();
        let count = sent.clone();
        let running = Running::start(move |stop| {
            let mut answered = vec![];
            let start = Instant::now();
            while !stop.load(Ordering::Relaxed) {
                // An echo request; its checksum and identifier are the kernel's.
                let mut request = [0; 64];
                request[0] = 8;
                request[6..8].copy_from_slice(&(answered.len() as u16).to_be_bytes());
                socket.send_to(&request, (GUEST, 0))?;
                answered.push(false);
                count.store(answered.len() as u64, Ordering::Relaxed);
                let next = start + INTERVAL * answered.len() as u32;
                collect(&socket, &mut answered, next)?;
            }
            // The last answers.
            let end = Instant::now() + Duration::from_secs(2);
            while answered.contains(&false) && Instant::now() < end {
                collect(&socket, &mut answered, Instant::now() + INTERVAL)?;
            }
            Ok(answered)
        });
        Ok(Pings { sent, running })
    }

    fn sent(&self) -> usize {
        self.sent.load(Ordering::Relaxed) as usize
    }
}

/// Takes in answers until then.
fn collect(socket: &UdpSocket, answered: &mut [bool], until: Instant) -> Result<()> {
    loop {
        let left = until.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return Ok(());
        }
        socket.set_read_timeout(Some(left))?;
        let mut answer = [0; 128];
        // An error is the end of the time, or the network's: then the ping is lost.
        if let Ok(64) = socket.recv(&mut answer)
            && answer[0] == 0
        {
            let number = u16::from_be_bytes([answer[6], answer[7]]);
            if let Some(known) = answered.get_mut(usize::from(number)) {
                *known = true;
            }
        }
    }
}

/// Of these pings those without an answer, and the longest row of them.
fn lost(answered: &[bool]) -> (usize, usize) {
    let rows = answered.split(|&answered| answered);
    (answered.iter().filter(|&&answered| !answered).count(), rows.map(<[bool]>::len).max().unwrap_or(0))
}

/// A stream of random bytes that the guest reads at its end only, so that nearly all of it lies in its memory as we wrote it: its
/// kernel has verified it when it came, and copies it for the reader at the destination. Pages that are written after they were
/// copied are few here; that each is logged is shown by the test `every_page_that_is_written_is_in_the_log` of `ports`.
struct Stream {
    running: Running<(u64, String)>,
    sent: Arc<AtomicU64>,
}

impl Stream {
    fn start(network: &Namespace, guest: &Guest) -> Result<Stream> {
        guest.sh(
            "cd /proc/sys/net/ipv4; echo 99999 99999 99999 >tcp_mem; echo 4096 16777216 16777216 >tcp_rmem",
        )?;
        let reader = "while [ ! -e /run/all ]; do sleep 0.1; done; cat";
        guest.sh(&format!(
            "(nc -l -p {PORT} | ({reader}) | sha256sum >/run/sum) </dev/null >/dev/null 2>&1 &"
        ))?;
        let address = SocketAddr::from((GUEST, PORT));
        let connect = || {
            // What was sent is with the guest, but for little.
            std::fs::write("/proc/sys/net/ipv4/tcp_wmem", "4096 65536 65536")?;
            Ok(TcpStream::connect_timeout(&address, DEADLINE)?)
        };
        let mut stream = wait_for("the guest to listen", DEADLINE, || Ok(network.run(connect).ok()))?;
        stream.set_write_timeout(Some(DEADLINE))?;
        let sent = Arc::<AtomicU64>::default();
        let count = sent.clone();
        let running = Running::start(move |stop| {
            let mut sum = Command::new("sha256sum").stdin(Stdio::piped()).stdout(Stdio::piped()).spawn()?;
            let mut input: ChildStdin = sum.stdin.take().context("no input")?;
            let mut random = Random::new(1);
            let mut total = 0;
            while !stop.load(Ordering::Relaxed) {
                std::thread::sleep(INTERVAL);
                let bytes: Vec<u8> = (0..512).flat_map(|_| random.bits().to_ne_bytes()).collect();
                stream.write_all(&bytes).context("the stream")?;
                input.write_all(&bytes)?;
                total += bytes.len() as u64;
                count.store(total, Ordering::Relaxed);
            }
            stream.shutdown(std::net::Shutdown::Write)?;
            drop(input);
            let output = sum.wait_with_output()?;
            ensure!(output.status.success(), "sha256sum");
            Ok((total, String::from_utf8_lossy(&output.stdout).into_owned()))
        });
        Ok(Stream { running, sent })
    }

    fn sent(&self) -> u64 {
        self.sent.load(Ordering::Relaxed)
    }

    /// Waits until so much more was sent.
    fn go_on(&self, bytes: u64) -> Result<()> {
        let from = self.sent();
        wait_for("the stream to go on", DEADLINE, || Ok((self.sent() >= from + bytes).then_some(())))
    }

    /// Ends the stream; the guest must have got what was sent. How many bytes those were.
    fn finish(self, guest: &Guest) -> Result<u64> {
        guest.sh("touch /run/all")?;
        let (total, sum) = self.running.stop()?;
        let got = wait_for("the sum of the stream", DEADLINE, || {
            Ok(Some(guest.sh("cat /run/sum")?).filter(|sum| !sum.is_empty()))
        })?;
        ensure!(got == sum, "the guest got other bytes: {got} instead of {sum}");
        Ok(total)
    }
}

fn migrate(packed: bool) -> Result<()> {
    let network = Namespace::new()?;
    network.ip(&["link", "add", "br0", "type", "bridge", "forward_delay", "0"])?;
    network.ip(&["addr", "add", HOST, "dev", "br0"])?;
    network.ip(&["link", "set", "br0", "up"])?;
    let (here, there) = (Machine::new(&network, "here", packed)?, Machine::new(&network, "there", packed)?);
    let source = here.launch(false)?;
    let first = there.launch(true)?;
    source.wait_ready(DEADLINE)?;
    source.address("10.0.0.1/24")?;
    here.daemon.wait_link(&["vm"], true, DEADLINE)?;
    source.wait_reachable("10.0.0.100".parse()?, DEADLINE)?;
    ensure!(seen_at(&network)?.as_deref() == Some("here"), "the bridge has not seen the guest");
    let pings = Pings::start(&network)?;
    let stream = Stream::start(&network, &source)?;
    stream.go_on(1 << 20)?;

    let limit = |bytes: u64| source.qmp("migrate-set-parameters", json!({ "max-bandwidth": bytes }));
    // So slowly that it does not complete while the stream goes on.
    let begin = |to: &Guest, name: &str| {
        limit(4 << 20)?;
        source.migrate(to, &there.dir.path(name))?;
        wait_for("the migration to be under way", DEADLINE, || {
            Ok(Some(source.migration()?).filter(|now| now.status == "active" && now.transferred > 4 << 20))
        })?;
        stream.go_on(1 << 19)
    };
    let first_at = pings.sent();
    begin(&first, "first")?;
    source.qmp("migrate_cancel", json!({}))?;
    wait_for("the migration to be cancelled", DEADLINE, || {
        Ok((source.migration()?.status == "cancelled").then_some(()))
    })?;
    // QEMU ends when what is to come does not.
    drop(first);
    stream.go_on(1 << 18)?;
    ensure!(seen_at(&network)?.as_deref() == Some("here"), "the guest was never elsewhere");

    // The stream may have filled the ring, whoever migrates.
    let full = here.daemon.stats()?.ports["vm"].tx_drops.get("rx_ring_full").copied().unwrap_or_default();

    let destination = there.launch(true)?;
    let second_at = pings.sent();
    begin(&destination, "second")?;
    limit(QEMUS_BANDWIDTH)?;
    let Migration { downtime, total, .. } = source.migrated(&destination, DEADLINE)?;
    wait_for("the bridge to see the guest at its new place", DEADLINE, || {
        Ok((seen_at(&network)?.as_deref() == Some("there")).then_some(()))
    })?;
    there.daemon.wait_link(&["vm"], true, DEADLINE)?;
    drop(source);
    here.daemon.wait_link(&["vm"], false, DEADLINE)?;
    stream.go_on(1 << 20)?;
    let streamed = stream.finish(&destination)?;
    let answered = pings.running.stop()?;
    let (before, _) = lost(&answered[..first_at]);
    let (cancelled, _) = lost(&answered[first_at..second_at]);
    let (by_it, row) = lost(&answered[second_at..]);
    println!(
        "packed {packed}: complete in {total:?}, downtime {downtime:?} as QEMU says; {} pings, one each {INTERVAL:?}: {before} lost \
         before, {cancelled} with the attempt that was cancelled, {by_it} with the other, {row} in a row; {streamed} bytes",
        answered.len(),
    );
    ensure!(by_it <= 10, "{by_it} pings lost");
    let stayed = (before + cancelled) as u64;
    ensure!(
        stayed <= 2 + full,
        "{stayed} pings lost while the guest stayed, and {full} packets that found no room"
    );
    here.check()?;
    there.check()
}

#[test]
fn a_guest_migrates_with_split_rings() -> Result<()> {
    migrate(false)
}

#[test]
fn a_guest_migrates_with_packed_rings() -> Result<()> {
    migrate(true)
}
