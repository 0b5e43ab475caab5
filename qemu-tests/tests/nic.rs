//! NICs of the daemon: ports of QEMU's device models as ports of the switch, between guests and the cables' other ends.
//!
//! A QEMU without a guest has the device; the daemon drives it by qtest, where on a host it would by VFIO.

use std::io::ErrorKind;
use std::os::unix::net::{UnixDatagram, UnixStream};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use qemu_tests::daemon::{DaemonConfig, PortConfig, PortShow};
use qemu_tests::frontend::NetHeader;
use qemu_tests::frontend::packet::{BROADCAST, Mac, Packet, check};
use qemu_tests::host::{Process, WorkDir, tail, wait_for};
use qemu_tests::net::{Net, QUIET, SOON};
use qemu_tests::ovs::{BRIDGE, Ovs};
use qemu_tests::qmp::Qmp;
use serde_json::{Value, json};

/// How long a NIC that was lost may take to be found lost, and to be open again.
const LATER: Duration = Duration::from_secs(20);
const MEMORY: u64 = 64 << 20;

/// What is at the other end of the first cable.
const FAR_MAC: Mac = [2, 0, 0, 0, 1, 1];
const FAR_IP: [u8; 4] = [10, 0, 0, 101];

/// QEMU with a device, and no guest.
struct Machine {
    process: Process,
    qmp: Qmp,
}

impl Machine {
    /// Starts it in `dir`, with `device` in slot 5 and network back-ends `n0` and so on, which are cables.
    fn start(dir: &WorkDir, device: &Value, cables: usize) -> Result<Machine> {
        // HLT for ever: the processor begins 16 bytes before the end.
        let mut rom = vec![0xf4; 65536];
        rom[0xfff0..0xfff4].copy_from_slice(&[0xfa, 0xf4, 0xeb, 0xfd]);
        std::fs::write(dir.path("rom"), rom)?;
        std::fs::File::create(dir.path("memory"))?.set_len(MEMORY)?;
        let path = |name: &str| dir.path(name).display().to_string();
        for name in ["qtest", "qmp"] {
            remove(&dir.path(name))?;
        }
        let mut arguments: Vec<String> = [
            "-machine",
            "q35,memory-backend=m",
            "-accel",
            "tcg",
            "-m",
            "64",
            "-display",
            "none",
            "-nodefaults",
            "-no-user-config",
            "-qtest-log",
            "none",
        ]
        .map(str::to_owned)
        .to_vec();
        let mut add = |key: &str, value: String| arguments.extend([key.to_owned(), value]);
        add("-bios", path("rom"));
        add("-object", format!("memory-backend-file,id=m,size=64M,mem-path={},share=on", path("memory")));
        add("-qtest", format!("unix:{},server=on,wait=off", path("qtest")));
        add("-chardev", format!("socket,id=mon,path={},server=on,wait=off", path("qmp")));
        add("-mon", "chardev=mon,mode=control".into());
        for cable in 0..cables {
            let (ours, theirs) = (path(&format!("far{cable}")), path(&format!("near{cable}")));
            remove(Path::new(&theirs))?;
            add(
                "-netdev",
                format!(
                    "dgram,id=n{cable},local.type=unix,local.path={theirs},remote.type=unix,remote.path={ours}"
                ),
            );
        }
        add("-device", device.to_string());
        let configure = |command: &mut std::process::Command| {
            command.args(&arguments);
        };
        let mut process =
            Process::spawn("QEMU", Path::new("qemu-system-x86_64"), configure, &dir.path("qemu.log"))?;
        let qmp = wait_for("QEMU's monitor", LATER, || {
            process.check()?;
            Ok(UnixStream::connect(dir.path("qmp")).ok())
        })?;
        wait_for("QEMU's qtest", LATER, || Ok(dir.path("qtest").exists().then_some(())))?;
        Ok(Machine { process, qmp: Qmp::new(qmp)? })
    }

    fn set_link(&mut self, name: &str, up: bool) -> Result<()> {
        self.qmp.execute("set_link", json!({ "name": name, "up": up })).map(drop)
    }
}

fn remove(path: &Path) -> Result<()> {
    match std::fs::remove_file(path) {
        Err(error) if error.kind() != ErrorKind::NotFound => Err(error.into()),
        _ => Ok(()),
    }
}

/// The far end of a cable.
struct Cable {
    socket: UnixDatagram,
    to: PathBuf,
}

impl Cable {
    fn new(dir: &WorkDir, number: usize) -> Result<Cable> {
        let socket = UnixDatagram::bind(dir.path(&format!("far{number}")))?;
        socket.set_nonblocking(true)?;
        Ok(Cable { socket, to: dir.path(&format!("near{number}")) })
    }

    fn send(&self, frame: &[u8]) -> Result<()> {
        wait_for("room on the cable", SOON, || match self.socket.send_to(frame, &self.to) {
            Ok(_) => Ok(Some(())),
            Err(error) if error.kind() == ErrorKind::WouldBlock => Ok(None),
            Err(error) => Err(error.into()),
        })
    }

    /// The next frame, but for announcements of the switch itself (RARP).
    fn try_receive(&self) -> Result<Option<Vec<u8>>> {
        let mut frame = vec![0; 70_000];
        loop {
            match self.socket.recv(&mut frame) {
                Ok(len) if frame[..len].get(12..14) == Some(&[0x80, 0x35]) => {}
                Ok(len) => return Ok(Some(frame[..len].to_vec())),
                Err(error) if error.kind() == ErrorKind::WouldBlock => return Ok(None),
                Err(error) => return Err(error.into()),
            }
        }
    }

    /// The next frame must come soon and be this one, or padded.
    fn expect(&self, frame: &[u8]) -> Result<()> {
        let came = wait_for("a frame on the cable", SOON, || self.try_receive())?;
        ensure!(came.starts_with(frame), "another frame came: {came:02x?}, not {frame:02x?}");
        ensure!(came[frame.len()..].iter().all(|&byte| byte == 0), "{came:02x?} is padded with something");
        Ok(())
    }

    /// Whether this frame comes, whatever comes before it.
    fn has_come(&self, frame: &[u8]) -> Result<bool> {
        let deadline = Instant::now() + QUIET;
        while Instant::now() < deadline {
            match self.try_receive()? {
                Some(came) if came.starts_with(frame) => return Ok(true),
                Some(_) => {}
                None => std::thread::sleep(Duration::from_millis(1)),
            }
        }
        Ok(false)
    }

    /// Nothing must come.
    fn expect_nothing(&self) -> Result<()> {
        std::thread::sleep(QUIET);
        match self.try_receive()? {
            None => Ok(()),
            Some(frame) => anyhow::bail!("a frame came: {frame:02x?}"),
        }
    }
}

/// An 82576.
fn igb() -> Value {
    json!({ "driver": "igb", "id": "nic", "addr": "05.0", "netdev": "n0" })
}

/// Two guests, and a NIC whose ports are the ports up1 and on of the switch.
struct Bed {
    net: Net,
    cables: Vec<Cable>,
    machine: Machine,
    device: Value,
}

impl Bed {
    /// With QEMU's switch, which has ports 1 and 2.
    fn rocker() -> Result<Bed> {
        let device = json!({ "driver": "rocker", "name": "sw", "addr": "05.0", "ports": ["n0", "n1"] });
        Bed::new(WorkDir::new()?, device, &[1, 2], 1, DaemonConfig::new)
    }

    /// With an 82576, whose port has number 0.
    fn igb() -> Result<Bed> {
        Bed::new(WorkDir::new()?, igb(), &[0], 1, DaemonConfig::new)
    }

    /// With a virtio-net device, whose port has number 0.
    fn virtio_net() -> Result<Bed> {
        let device = json!({
            "driver": "virtio-net-pci", "id": "nic", "addr": "05.0", "netdev": "n0", "disable-legacy": "on"
        });
        Bed::new(WorkDir::new()?, device, &[0], 1, DaemonConfig::new)
    }

    /// With this device in slot 5, the numbers of its ports, the queues of each, and the configuration that guests' ports make.
    fn new(
        dir: WorkDir,
        device: Value,
        numbers: &[u32],
        queues: usize,
        config: impl FnOnce([PortConfig; 2]) -> DaemonConfig,
    ) -> Result<Bed> {
        let cables = (0..numbers.len()).map(|number| Cable::new(&dir, number)).collect::<Result<_>>()?;
        let machine = Machine::start(&dir, &device, numbers.len())?;
        let pci = format!("qtest:{}@05.0", dir.root().display());
        let mut more = format!("\n[[nic]]\nname = \"n\"\npci = {pci:?}\nqueues = {queues}\n");
        // Each queue at the worker of its number.
        let workers: Vec<usize> = (0..queues).collect();
        for (index, number) in numbers.iter().enumerate() {
            let name = format!("up{}", index + 1);
            more +=
                &format!("\n[[port]]\nname = {name:?}\nkind = \"nic\"\nnic = \"n\"\nnic_port = {number}\n");
            more += &format!("queues = {queues}\nworkers = {workers:?}\n");
        }
        let ports = ["p1", "p2"].map(|name| PortConfig::server(name, &dir));
        let config = DaemonConfig { more, ..config(ports) };
        let net = Net::start(dir, config, |_, builder| builder)?;
        let bed = Bed { net, cables, machine, device };
        let names: Vec<String> = (1..=numbers.len()).map(|number| format!("up{number}")).collect();
        let mut names: Vec<&str> = names.iter().map(String::as_str).collect();
        names.extend(["p1", "p2"]);
        bed.net.daemon.wait_link(&names, true, LATER)?;
        Ok(bed)
    }

    /// Starts QEMU again that was killed.
    fn restart(&mut self) -> Result<()> {
        self.machine = Machine::start(&self.net.dir, &self.device, self.cables.len())?;
        Ok(())
    }

    fn show(&self, name: &str) -> Result<PortShow> {
        let shown = self.net.daemon.show()?.into_iter().find(|port| port.name == name);
        shown.with_context(|| format!("no port {name}"))
    }

    /// What `show` says of the NIC.
    fn nic(&self) -> Result<Value> {
        Ok(self.net.daemon.ctl(&["show"])?["nics"][0].clone())
    }

    /// Guest 0 asks by ARP who has the far end's address, and everybody hears it; the far end answers, and guest 0 pings it.
    fn ping(&mut self) -> Result<()> {
        self.try_ping().with_context(|| match self.net.daemon.stats() {
            Ok(stats) => format!("drops: {:?}", stats.drops()),
            Err(error) => format!("the daemon does not answer: {error:#}"),
        })
    }

    fn try_ping(&mut self) -> Result<()> {
        let (mac, ip) = (self.net.guests[0].mac, self.net.guests[0].ip);
        let ask = Packet::eth(mac, BROADCAST).arp_request(ip, FAR_IP).build();
        self.net.guests[0].send(&ask)?;
        for cable in &self.cables {
            cable.expect(&ask).context("ARP")?;
        }
        self.net.guests[1].expect(&ask)?;
        let answer = padded(Packet::eth(FAR_MAC, mac).arp_reply(FAR_IP, ip).build());
        self.cables[0].send(&answer)?;
        self.net.guests[0].expect(&answer)?;
        for seq in 1..=20 {
            let ping =
                Packet::eth(mac, FAR_MAC).ipv4(ip, FAR_IP).echo_request(7, seq).payload_len(56).build();
            self.net.guests[0].send(&ping)?;
            self.cables[0].expect(&ping).with_context(|| format!("ping {seq}"))?;
            let pong = Packet::eth(FAR_MAC, mac).ipv4(FAR_IP, ip).echo_reply(7, seq).payload_len(56).build();
            self.cables[0].send(&pong)?;
            self.net.guests[0].expect(&pong).with_context(|| format!("answer to ping {seq}"))?;
        }
        Ok(())
    }
}

/// As the shortest frame of Ethernet.
fn padded(mut frame: Vec<u8>) -> Vec<u8> {
    frame.resize(frame.len().max(60), 0);
    frame
}

/// A TCP super-frame leaves as segments, and a packet complete whose sender left its checksum open; whether the device has done
/// it, or software.
fn finishes_tcp(bed: &mut Bed, in_device: bool) -> Result<()> {
    const SEGMENT: usize = 1448;
    const HEADERS: usize = 14 + 20 + 20;
    let bytes = |bed: &Bed| Ok::<_, anyhow::Error>(bed.net.daemon.balanced_stats()?.ports["up1"].tx_bytes);
    let receive = |bed: &Bed| {
        let came = wait_for("a segment", SOON, || bed.cables[0].try_receive())?;
        check(&NetHeader::default(), &came).map_err(anyhow::Error::msg)?;
        Ok::<_, anyhow::Error>(came)
    };
    let packet = Packet::eth(bed.net.guests[0].mac, FAR_MAC).ipv4(bed.net.guests[0].ip, FAR_IP).tcp(1000, 9);
    let (header, frame) = packet.clone().payload_len(60_000).build_gso(SEGMENT as u16);
    let before = bytes(bed)?;
    bed.net.guests[0].send_with(&header, &frame)?;
    let mut segments = 0;
    for payload in frame[HEADERS..].chunks(SEGMENT) {
        let came = receive(bed).with_context(|| format!("segment {segments}"))?;
        ensure!(came[HEADERS..] == *payload, "segment {segments} has {} bytes", came.len());
        segments += 1;
    }
    // What the device cuts was sent to it whole.
    let software = frame.len() + (segments - 1) * HEADERS;
    let wanted = if in_device { frame.len() } else { software } as u64;
    wait_for("the bytes to be counted", SOON, || Ok((bytes(bed)? - before == wanted).then_some(())))
        .with_context(|| format!("not {wanted} bytes, but {}", bytes(bed).unwrap_or(0) - before))?;
    let (header, frame) = packet.payload_len(1400).build_partial();
    bed.net.guests[0].send_with(&header, &frame)?;
    ensure!(receive(bed)?[HEADERS..] == frame[HEADERS..]);
    Ok(())
}

/// A guest pings through, super-frames are cut and completed, and each frame is counted once.
fn talks(mut bed: Bed) -> Result<Bed> {
    bed.ping()?;
    let in_device = bed.device["driver"] == "igb";
    finishes_tcp(&mut bed, in_device)?;
    let (mac, ip) = (bed.net.guests[0].mac, bed.net.guests[0].ip);
    let packet = Packet::eth(mac, FAR_MAC).ipv4(ip, FAR_IP).udp(1000, 9);
    let (header, frame) = packet.clone().payload_len(10_000).build_gso(1000);
    bed.net.guests[0].send_with(&header, &frame)?;
    for segment in 0..10 {
        let came = wait_for("a segment", SOON, || bed.cables[0].try_receive())?;
        ensure!(came.len() == 14 + 20 + 8 + 1000, "segment {segment} has {} bytes", came.len());
        check(&NetHeader::default(), &came).map_err(anyhow::Error::msg)?;
    }
    // A burst, more than the NIC's rings hold: what has no room is a drop with a name.
    let short = packet.payload_len(18).build();
    for _ in 0..300 {
        bed.net.guests[0].send(&short)?;
    }
    let stats = wait_for("all to be sent or dropped", SOON, || {
        let stats = bed.net.daemon.balanced_stats()?;
        Ok((stats.ports["p1"].rx_packets >= 324).then_some(stats))
    })?;
    let up = &stats.ports["up1"];
    let dropped = up.tx_drops.values().sum::<u64>();
    ensure!(up.tx_drops.keys().all(|why| why == "rx_ring_full" || up.tx_drops[why] == 0), "{stats:#?}");
    for _ in dropped..300 {
        bed.cables[0].expect(&short)?;
    }
    bed.cables[0].expect_nothing()?;
    ensure!(up.rx_packets == 21 && up.rx_drops.values().all(|&drops| drops == 0), "{stats:#?}");
    Ok(bed)
}

#[test]
fn guests_talk_through_the_ports_of_a_switch() -> Result<()> {
    let mut bed = talks(Bed::rocker()?)?;
    let (first, second) = (&bed.cables[0], &bed.cables[1]);
    // From cable to cable, known on both.
    let other = Packet::eth([2, 0, 0, 0, 1, 2], BROADCAST).arp_request([10, 0, 0, 102], FAR_IP);
    let hello = padded(other.build());
    second.send(&hello)?;
    first.expect(&hello)?;
    for guest in &mut bed.net.guests {
        guest.expect(&hello)?;
    }
    let frame =
        Packet::eth(FAR_MAC, [2, 0, 0, 0, 1, 2]).ipv4(FAR_IP, [10, 0, 0, 102]).udp(1, 2).payload_len(1400);
    for _ in 0..50 {
        first.send(&frame.build())?;
        second.expect(&frame.build())?;
    }
    second.expect_nothing()?;
    let nic = bed.nic()?;
    ensure!(nic["driver"] == "rocker" && nic["fault"] == Value::Null && nic["tables"] == true, "{nic}");
    ensure!(nic["ports"][1]["number"] == 2 && nic["ports"][1]["port"] == "up2", "{nic}");
    ensure!(nic["ports"][1]["link"] == true && nic["unclaimed"] == 0 && nic["forwarded"] == 0, "{nic}");
    let shown = bed.show("up1")?;
    ensure!(shown.state == "connected" && shown.mtu == 9194 && shown.active_queues == 1, "{shown:?}");
    // What the NIC has of a port that is deleted is nobody's, until it is added again.
    bed.net.daemon.ctl(&["del-port", "up2"])?;
    bed.cables[1].send(&hello)?;
    wait_for("the frame to be counted", SOON, || Ok((bed.nic()?["unclaimed"] == 1).then_some(())))?;
    let refused = bed.net.daemon.refusal(&["add-port", "up3", "--nic", "n/3"])?;
    ensure!(refused.contains("NIC n: it has no port 3"), "{refused}");
    let refused = bed.net.daemon.refusal(&["add-port", "up3", "--nic", "m/1"])?;
    ensure!(refused.contains("there is no NIC 'm' in the configuration file"), "{refused}");
    bed.net.daemon.ctl(&["add-port", "up2", "--nic", "n/2"])?;
    bed.net.daemon.wait_link(&["up2"], true, SOON)?;
    bed.cables[1].send(&hello)?;
    bed.cables[0].expect(&hello)?;
    bed.net.daemon.balanced_stats()?;
    bed.net.daemon.terminate()
}

#[test]
fn guests_talk_through_an_82576() -> Result<()> {
    let mut bed = talks(Bed::igb()?)?;
    let nic = bed.nic()?;
    ensure!(nic["driver"] == "igb" && nic["tables"] == false && nic["ports"][0]["number"] == 0, "{nic}");
    ensure!(bed.show("up1")?.mtu == 1500);
    bed.net.daemon.terminate()
}

/// The frames of a guest in a VLAN leave with its tag, those of super-frames too, and come in with it, whether the device puts it on
/// and takes it off or software.
#[test]
fn the_vlan_of_a_guest_is_a_tag_on_the_cable() -> Result<()> {
    const VLAN: u16 = 7;
    let virtio = json!({
        "driver": "virtio-net-pci", "id": "nic", "addr": "05.0", "netdev": "n0", "disable-legacy": "on"
    });
    for (device, does) in [(igb(), json!(["checksum", "tso", "vlan"])), (virtio, json!([]))] {
        let tagged = |mut ports: [PortConfig; 2]| {
            ports[0].more = format!("vlan = {VLAN}\n");
            DaemonConfig::new(ports)
        };
        let mut bed = Bed::new(WorkDir::new()?, device, &[0], 1, tagged)?;
        ensure!(bed.nic()?["ports"][0]["does"] == does, "{}", bed.nic()?);
        let (mac, ip) = (bed.net.guests[0].mac, bed.net.guests[0].ip);
        let ask = |packet: Packet| packet.arp_request(ip, FAR_IP).build();
        bed.net.guests[0].send(&ask(Packet::eth(mac, BROADCAST)))?;
        bed.cables[0].expect(&ask(Packet::eth(mac, BROADCAST).vlan(VLAN)))?;
        for seq in 1..=20 {
            let ping = |packet: Packet| packet.ipv4(ip, FAR_IP).echo_request(7, seq).payload_len(56).build();
            bed.net.guests[0].send(&ping(Packet::eth(mac, FAR_MAC)))?;
            bed.cables[0].expect(&ping(Packet::eth(mac, FAR_MAC).vlan(VLAN)))?;
            let pong = |packet: Packet| packet.ipv4(FAR_IP, ip).echo_reply(7, seq).payload_len(56).build();
            // What is in another VLAN, or in none, is not for it. A priority is not its business.
            for packet in [Packet::eth(FAR_MAC, mac).vlan(VLAN + 1), Packet::eth(FAR_MAC, mac)] {
                bed.cables[0].send(&pong(packet))?;
            }
            bed.cables[0].send(&pong(Packet::eth(FAR_MAC, mac).vlan((seq % 8) << 13 | VLAN)))?;
            bed.net.guests[0].expect(&pong(Packet::eth(FAR_MAC, mac)))?;
        }
        let packet = Packet::eth(mac, FAR_MAC).ipv4(ip, FAR_IP).tcp(1000, 9);
        let sent =
            [packet.clone().payload_len(20_000).build_gso(1400), packet.payload_len(900).build_partial()];
        for (header, frame) in sent {
            bed.net.guests[0].send_with(&header, &frame)?;
            for payload in frame[54..].chunks(1400) {
                let came = wait_for("a segment", SOON, || bed.cables[0].try_receive())?;
                check(&NetHeader::default(), &came).map_err(anyhow::Error::msg)?;
                ensure!(came[..16] == [&frame[..12], &[0x81, 0, 0, VLAN as u8]].concat(), "{came:02x?}");
                ensure!(came[58..] == *payload, "{} bytes", came.len());
            }
        }
        bed.cables[0].expect_nothing()?;
        bed.net.daemon.balanced_stats()?;
        bed.net.daemon.terminate()?;
    }
    Ok(())
}

/// Each guest's frames come to the queue of the worker that has its rings; those for many, and for nobody who is known, to the first.
#[test]
fn frames_for_a_guest_come_to_its_worker() -> Result<()> {
    let pin = |mut ports: [PortConfig; 2]| {
        for (worker, port) in ports.iter_mut().enumerate() {
            port.more = format!("workers = [{worker}]\n");
        }
        DaemonConfig { cpus: vec![0, 1], ..DaemonConfig::new(ports) }
    };
    let mut bed = Bed::new(WorkDir::new()?, igb(), &[0], 2, pin)?;
    ensure!(bed.show("up1")?.active_queues == 2);
    bed.ping()?;
    comes_to(&mut bed, 0, 0)?;
    comes_to(&mut bed, 1, 1)?;
    // The guest's rings go to the other worker, and its frames with them.
    bed.net.daemon.ctl(&["set-port", "p2", "--workers", "0"])?;
    comes_to(&mut bed, 1, 0)?;
    bed.net.daemon.ctl(&["set-port", "p2", "--workers", "1"])?;
    comes_to(&mut bed, 1, 1)?;
    let hello = padded(Packet::eth(FAR_MAC, BROADCAST).arp_request(FAR_IP, [10, 0, 0, 77]).build());
    let before = packets(&bed)?;
    for _ in 0..5 {
        bed.cables[0].send(&hello)?;
        for guest in &mut bed.net.guests {
            guest.expect(&hello)?;
        }
    }
    wait_for("the first worker to have them", SOON, || {
        let after = packets(&bed)?;
        Ok((after[0] - before[0] == 5 && after[1] == before[1]).then_some(()))
    })?;
    bed.net.daemon.balanced_stats()?;
    bed.net.daemon.terminate()
}

/// Packets of each worker.
fn packets(bed: &Bed) -> Result<Vec<u64>> {
    Ok(bed.net.daemon.balanced_stats()?.workers.iter().map(|worker| worker.packets).collect())
}

/// Waits until all frames for a guest that sends come to this worker.
fn comes_to(bed: &mut Bed, guest: usize, worker: usize) -> Result<()> {
    const COUNT: u64 = 10;
    let (mac, ip) = (bed.net.guests[guest].mac, bed.net.guests[guest].ip);
    let ask = Packet::eth(mac, FAR_MAC).ipv4(ip, FAR_IP).udp(7, 9).payload_len(100).build();
    let answer = Packet::eth(FAR_MAC, mac).ipv4(FAR_IP, ip).udp(9, 7).payload_len(100).build();
    wait_for("frames to come to the worker of their guest", LATER, || {
        for _ in 0..COUNT {
            bed.net.guests[guest].send(&ask)?;
            bed.cables[0].expect(&ask)?;
        }
        let before = wait_for("all to be counted", SOON, || {
            let before = packets(bed)?;
            Ok((packets(bed)? == before).then_some(before))
        })?;
        for _ in 0..COUNT {
            bed.cables[0].send(&answer)?;
            bed.net.guests[guest].expect(&answer)?;
        }
        let came = wait_for("the frames to be counted", SOON, || {
            let came: Vec<u64> =
                packets(bed)?.iter().zip(&before).map(|(after, before)| after - before).collect();
            Ok((came.iter().sum::<u64>() >= COUNT).then_some(came))
        })?;
        Ok((came[worker] == COUNT && came.iter().sum::<u64>() == COUNT).then_some(()))
    })
    .with_context(|| format!("guest {guest}, worker {worker}"))
}

#[test]
fn guests_talk_through_virtio_net() -> Result<()> {
    let mut bed = talks(Bed::virtio_net()?)?;
    let nic = bed.nic()?;
    ensure!(nic["driver"] == "virtio-net" && nic["tables"] == false, "{nic}");
    bed.net.daemon.terminate()
}

#[test]
fn links_are_followed() -> Result<()> {
    let beds =
        [(Bed::rocker()?, "sw.2", "up2"), (Bed::igb()?, "nic", "up1"), (Bed::virtio_net()?, "nic", "up1")];
    for (bed, link, up) in beds {
        follows_link(bed, link, up).with_context(|| link.to_owned())?;
    }
    Ok(())
}

fn follows_link(mut bed: Bed, link: &str, up: &str) -> Result<()> {
    bed.ping()?;
    let hello =
        Packet::eth(bed.net.guests[0].mac, BROADCAST).arp_request([10, 0, 0, 1], [10, 0, 0, 1]).build();
    let cable = bed.cables.len() - 1;
    for round in 1..=2 {
        // By the name of the device's port, or of the back-end, as QEMU's version wants it.
        let backend = format!("n{cable}");
        bed.machine.set_link(link, false).or_else(|_| bed.machine.set_link(&backend, false))?;
        bed.net.daemon.wait_link(&[up], false, LATER)?;
        bed.net.guests[0].send(&hello)?;
        bed.net.guests[1].expect(&hello)?;
        bed.cables[cable].expect_nothing()?;
        if cable > 0 {
            bed.cables[0].expect(&hello).context("the other port's link is up")?;
        }
        let stats = bed.net.daemon.balanced_stats()?;
        ensure!(stats.ports[up].tx_drops.get("link_down") == Some(&round), "{stats:#?}");
        bed.machine.set_link(link, true).or_else(|_| bed.machine.set_link(&backend, true))?;
        bed.net.daemon.wait_link(&[up], true, LATER)?;
    }
    bed.ping()?;
    bed.net.daemon.balanced_stats()?;
    Ok(())
}

#[test]
fn ports_go_on_after_a_reset() -> Result<()> {
    for mut bed in [Bed::rocker()?, Bed::igb()?, Bed::virtio_net()?] {
        bed.ping()?;
        // The device loses all, its place in memory included.
        bed.machine.qmp.execute("system_reset", json!({}))?;
        // It is set up again where it is, or closed and opened again.
        let said = ["was reset", "it is closed"];
        wait_for("the reset to be noticed", LATER, || {
            let log = tail(bed.net.daemon.log(), usize::MAX);
            Ok(said.iter().any(|said| log.contains(said)).then_some(()))
        })
        .with_context(|| tail(bed.net.daemon.log(), 12))?;
        bed.net.daemon.wait_link(&["up1"], true, LATER)?;
        bed.ping().context("after the reset")?;
        bed.net.daemon.balanced_stats()?;
        bed.net.daemon.check()?;
    }
    Ok(())
}

#[test]
fn a_nic_that_vanishes_takes_its_ports_down_and_comes_back() -> Result<()> {
    for mut bed in [Bed::rocker()?, Bed::igb()?, Bed::virtio_net()?] {
        bed.ping()?;
        bed.machine.process.kill()?;
        bed.net.daemon.wait_link(&["up1"], false, LATER)?;
        let shown =
            wait_for("the fault", SOON, || Ok(Some(bed.show("up1")?).filter(|port| port.fault.is_some())))?;
        ensure!(shown.state == "waiting", "{shown:?}");
        ensure!(shown.fault.as_deref().is_some_and(|fault| fault.starts_with("NIC n: ")), "{shown:?}");
        ensure!(bed.nic()?["fault"] != Value::Null);
        // The guests have each other still.
        let hello =
            Packet::eth(bed.net.guests[0].mac, BROADCAST).arp_request([10, 0, 0, 1], [10, 0, 0, 1]).build();
        bed.net.guests[0].send(&hello)?;
        bed.net.guests[1].expect(&hello)?;
        bed.net.daemon.balanced_stats()?;
        bed.restart()?;
        bed.net.daemon.wait_link(&["up1"], true, LATER)?;
        bed.ping().context("after it came back")?;
        bed.net.daemon.balanced_stats()?;
        bed.net.daemon.terminate()?;
    }
    Ok(())
}

#[test]
fn a_port_of_a_nic_is_a_port_of_open_vswitchs_bridge() -> Result<()> {
    let ovs_dir = WorkDir::new()?;
    let ovs = Ovs::start(&ovs_dir)?;
    let mut bed = Bed::new(WorkDir::new()?, igb(), &[0], 1, |ports| DaemonConfig::under(&ovs, ports))?;
    wait_for("the ports in the bridge", LATER, || {
        let list = ovs.ofctl(&["show", BRIDGE])?;
        Ok(["(p1)", "(p2)", "(up1)"].iter().all(|port| list.contains(port)).then_some(()))
    })?;
    let ids = ovs.vsctl(&["get", "interface", "up1", "external_ids"])?;
    ensure!(ids.contains("pointwork-nic=\"n/0\""), "{ids}");
    ovs.ofctl(&["add-flow", BRIDGE, "actions=NORMAL"])?;
    let (mac, ip) = (bed.net.guests[0].mac, bed.net.guests[0].ip);
    let hello = Packet::eth(mac, BROADCAST).arp_request(ip, FAR_IP).build();
    // What comes while OVS is taking up the devices is lost.
    wait_for("the bridge to forward", LATER, || {
        bed.net.guests[0].send(&hello)?;
        Ok(bed.cables[0].has_come(&hello)?.then_some(()))
    })?;
    let answer = padded(Packet::eth(FAR_MAC, mac).arp_reply(FAR_IP, ip).build());
    bed.cables[0].send(&answer)?;
    bed.net.guests[0].expect_among_others(&answer)?;
    // Both directions are carried here as soon as OVS's flows are known.
    let mut sequence = 0;
    wait_for("packets to take the fast way both ways", LATER, || {
        sequence += 1;
        let ping =
            Packet::eth(mac, FAR_MAC).ipv4(ip, FAR_IP).echo_request(7, sequence).payload_len(56).build();
        bed.net.guests[0].send(&ping)?;
        ensure!(bed.cables[0].has_come(&ping)?, "ping {sequence} is lost");
        let pong = Packet::eth(FAR_MAC, mac).ipv4(FAR_IP, ip).echo_reply(7, sequence).payload_len(56).build();
        bed.cables[0].send(&pong)?;
        bed.net.guests[0].expect_among_others(&pong)?;
        let stats = bed.net.daemon.stats()?;
        Ok((stats.ports["p1"].fast_copies > 3 && stats.ports["up1"].fast_copies > 3).then_some(()))
    })?;
    bed.net.daemon.balanced_stats()?;
    // The database deletes and adds it.
    ovs.vsctl(&["del-port", BRIDGE, "up1"])?;
    wait_for("the port to go", LATER, || Ok(bed.show("up1").is_err().then_some(())))?;
    let id = "external_ids:pointwork-nic=n/0";
    ovs.vsctl(&["--no-wait", "add-port", BRIDGE, "far1", "--", "set", "interface", "far1", id])?;
    wait_for("the port to come", LATER, || Ok(bed.show("far1").ok().filter(|port| port.link)))?;
    wait_for("the bridge to forward again", LATER, || {
        bed.net.guests[0].send(&hello)?;
        Ok(bed.cables[0].has_come(&hello)?.then_some(()))
    })?;
    bed.net.daemon.balanced_stats()?;
    bed.net.daemon.terminate()
}

/// The flow between two ports of the NIC becomes hot, and the NIC forwards its packets alone, until the flow goes.
#[test]
fn a_hot_flow_moves_into_the_nic_and_leaves_it_with_its_rule() -> Result<()> {
    let mut bed = Bed::rocker()?;
    let stream =
        Packet::eth(FAR_MAC, [2, 0, 0, 0, 9, 9]).payload(b"0123456789012345678901234567890123456789").build();
    let flow = "in_port(up1),eth(src=02:00:00:00:01:01,dst=02:00:00:00:09:09),eth_type(0x88b5)";
    let mut frame = stream.clone();
    frame[12..14].copy_from_slice(&[0x88, 0xb5]);
    bed.net.daemon.ctl(&["add-flow", flow, "up2"])?;
    let state = |bed: &Bed| -> Result<Value> {
        let flows = bed.net.daemon.ctl(&["dump-flows"])?;
        let flows = flows["flows"].as_array().context("no flows")?;
        let flow =
            flows.iter().find(|flow| flow["flow"].as_str().is_some_and(|text| text.contains("0x88b5")));
        Ok(flow.context("the flow is not listed")?["offloaded"].clone())
    };
    let round = |bed: &Bed| -> Result<()> {
        for _ in 0..20 {
            bed.cables[0].send(&frame)?;
            bed.cables[1].expect(&frame)?;
        }
        Ok(())
    };
    wait_for("the flow to be in the NIC", LATER, || {
        round(&bed)?;
        Ok((state(&bed)? == "yes").then_some(()))
    })
    .with_context(|| format!("{:?}", state(&bed)))?;
    let before = bed.net.daemon.balanced_stats()?.ports["up1"].rx_packets;
    for _ in 0..20 {
        round(&bed)?;
    }
    let after = bed.net.daemon.balanced_stats()?.ports["up1"].rx_packets;
    // A look at whether it is used may cost some.
    ensure!(after - before <= 100, "{} of 400 packets came to a worker", after - before);
    let shown = bed.net.daemon.ctl(&["show"])?;
    ensure!(shown["offload"][0]["rules"].as_u64().is_some_and(|rules| rules > 0), "{}", shown["offload"]);
    // When the command has answered, no packet is forwarded by the rule any more.
    bed.net.daemon.ctl(&["del-flow", flow])?;
    bed.net.daemon.ctl(&["add-flow", flow, "drop"])?;
    bed.cables[0].send(&frame)?;
    bed.cables[1].expect_nothing()?;
    bed.net.daemon.check()?;
    bed.net.daemon.terminate()
}
