//! QEMU without a guest: a machine whose processor halts at once, its devices driven through qtest, frames through
//! datagram sockets, and QEMU's monitor as the witness of what is in a device.
#![allow(dead_code, reason = "each test binary uses a part of it")]

pub mod switch;

use std::io::{BufRead, BufReader, ErrorKind, Read, Write};
use std::os::unix::net::{UnixDatagram, UnixListener, UnixStream};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use nic::pci::qtest::{Qtest, QtestFunction};
use nic::pci::{Mapping, PciFunction};
use serde_json::{Value, json};
use tempfile::TempDir;

/// How long anything may take before a test fails.
pub const PATIENCE: Duration = Duration::from_secs(30);
const MEMORY: usize = 64 << 20;

/// A machine. Dropped, it ends.
pub struct Machine {
    process: Child,
    qtest: Arc<Qtest>,
    qmp: BufReader<UnixStream>,
    /// The other ends of the devices' cables, in order.
    pub wires: Vec<Wire>,
    directory: TempDir,
}

/// The other end of a cable.
pub struct Wire {
    socket: UnixDatagram,
    to: std::path::PathBuf,
}

impl Machine {
    /// Starts QEMU with `nets` network back-ends, called `n0`, `n1` and so on, and these `-device` arguments.
    pub fn start(nets: usize, devices: &[Value]) -> Result<Machine> {
        Machine::run(Command::new("qemu-system-x86_64"), nets, devices)
    }

    /// Starts QEMU in a network namespace of its own, with two TAPs on one bridge as its back-ends `t0` and `t1`. They take
    /// offloads, as sockets do not.
    pub fn start_bridged(devices: &[Value]) -> Result<Machine> {
        const NETWORK: &str = "set -e
            ip link add br0 type bridge forward_delay 0
            for tap in t0 t1; do
                ip tuntap add $tap mode tap
                ip link set $tap master br0 up
            done
            ip link set br0 up
            exec qemu-system-x86_64 \"$@\"";
        let mut command = Command::new("unshare");
        command.args(["--map-root-user", "--net", "sh", "-c", NETWORK, "sh"]);
        for tap in ["t0", "t1"] {
            let netdev = format!("tap,id={tap},ifname={tap},script=no,downscript=no,vnet_hdr=on");
            command.args(["-netdev", &netdev]);
        }
        Machine::run(command, 0, devices)
    }

    fn run(mut command: Command, nets: usize, devices: &[Value]) -> Result<Machine> {
        let directory = tempfile::tempdir()?;
        let at = |name: &str| directory.path().join(name);
        // HLT for ever: the processor begins 16 bytes before the end.
        let mut rom = vec![0xf4; 65536];
        rom[0xfff0..0xfff4].copy_from_slice(&[0xfa, 0xf4, 0xeb, 0xfd]);
        std::fs::write(at("rom"), rom)?;
        let memory = std::fs::File::create_new(at("memory"))?;
        memory.set_len(MEMORY as u64)?;
        let memory = std::fs::OpenOptions::new().read(true).write(true).open(at("memory"))?;
        let (qtest, qmp) = (UnixListener::bind(at("qtest"))?, UnixListener::bind(at("qmp"))?);
        let path = |name: &str| at(name).display().to_string();
        command.args([
            "-machine",
            "q35,memory-backend=m",
            "-accel",
            "tcg",
            "-bios",
            &path("rom"),
            "-m",
            "64",
        ]);
        command.args(["-display", "none", "-nodefaults", "-no-user-config", "-qtest-log", "none"]);
        command.args([
            "-object",
            &format!("memory-backend-file,id=m,size=64M,mem-path={},share=on", path("memory")),
        ]);
        command.args(["-qtest", &format!("unix:{}", path("qtest"))]);
        command.args(["-chardev", &format!("socket,id=mon,path={}", path("qmp"))]);
        command.args(["-mon", "chardev=mon,mode=control"]);
        let mut wires = Vec::new();
        for net in 0..nets {
            let (ours, theirs) = (at(&format!("t{net}")), at(&format!("q{net}")));
            let socket = UnixDatagram::bind(&ours)?;
            socket.set_nonblocking(true)?;
            let (theirs_text, ours_text) = (theirs.display(), ours.display());
            command.args(["-netdev", &format!("dgram,id=n{net},local.type=unix,local.path={theirs_text},remote.type=unix,remote.path={ours_text}")]);
            wires.push(Wire { socket, to: theirs });
        }
        for device in devices {
            command.args(["-device", &device.to_string()]);
        }
        let mut process =
            command
                .stdin(Stdio::null())
                .stdout(Stdio::null())
                .stderr(Stdio::piped())
                .spawn()
                .context("qemu-system-x86_64 cannot be started; it must be in PATH (QEMU 8.2 or later)")?;
        let connected = (|| {
            let sockets = (accept(&qtest, &mut process)?, accept(&qmp, &mut process)?);
            anyhow::Ok(sockets)
        })();
        let (qtest, qmp) = match connected {
            Ok(sockets) => sockets,
            Err(error) => {
                let _ = process.kill();
                let _ = process.wait();
                return Err(error);
            }
        };
        let qtest = Qtest::new(qtest, Mapping::of_file(&memory, 0, MEMORY)?)?;
        qmp.set_read_timeout(Some(PATIENCE))?;
        let mut machine = Machine { process, qtest, qmp: BufReader::new(qmp), wires, directory };
        machine.answer()?;
        machine.qmp("qmp_capabilities", json!({}))?;
        Ok(machine)
    }

    /// The function in slot `device` of bus 0.
    pub fn function(&self, device: u8) -> Result<Box<dyn PciFunction>> {
        Ok(Box::new(QtestFunction::new(self.qtest.clone(), device, 0)?))
    }

    /// The machine's memory, as it is now.
    pub fn memory(&self) -> Result<Vec<u8>> {
        Ok(std::fs::read(self.directory.path().join("memory"))?)
    }

    /// The qtest connection.
    pub fn qtest(&self) -> &Arc<Qtest> {
        &self.qtest
    }

    /// Where a BAR of the function in slot `device` is.
    pub fn bar(&self, device: u8, index: u32) -> Result<u64> {
        let address = 1u32 << 31 | u32::from(device) << 11 | (0x10 + 4 * index);
        self.qtest.command(&format!("outl 0xcf8 {address:#x}"))?;
        let answer = self.qtest.command("inl 0xcfc")?;
        Ok(u64::from_str_radix(answer.trim_start_matches("0x"), 16)? & !0xf)
    }

    /// A command of QEMU's monitor.
    pub fn qmp(&mut self, command: &str, arguments: Value) -> Result<Value> {
        let request = json!({ "execute": command, "arguments": arguments });
        self.qmp.get_mut().write_all(format!("{request}\n").as_bytes())?;
        loop {
            let mut answer = self.answer()?;
            if let Some(error) = answer.get("error") {
                bail!("{command}: {error}");
            }
            if let Some(result) = answer.get_mut("return") {
                return Ok(result.take());
            }
        }
    }

    fn answer(&mut self) -> Result<Value> {
        let mut line = String::new();
        ensure!(self.qmp.read_line(&mut line).context("QEMU's monitor")? > 0, "QEMU closed its monitor");
        Ok(serde_json::from_str(&line)?)
    }

    /// Pulls or plugs cable `net`.
    pub fn set_link(&mut self, name: &str, up: bool) -> Result<()> {
        self.qmp("set_link", json!({ "name": name, "up": up })).map(drop)
    }

    /// Whether QEMU is still there.
    pub fn is_running(&mut self) -> Result<bool> {
        Ok(self.process.try_wait()?.is_none())
    }
}

fn accept(listener: &UnixListener, process: &mut Child) -> Result<UnixStream> {
    listener.set_nonblocking(true)?;
    let deadline = Instant::now() + PATIENCE;
    loop {
        match listener.accept() {
            Ok((stream, _)) => {
                stream.set_nonblocking(false)?;
                return Ok(stream);
            }
            Err(error) if error.kind() == ErrorKind::WouldBlock => {}
            Err(error) => return Err(error.into()),
        }
        if let Some(status) = process.try_wait()? {
            let mut text = String::new();
            process.stderr.take().map(|mut stderr| stderr.read_to_string(&mut text));
            bail!("QEMU ended ({status}): {text}");
        }
        ensure!(Instant::now() < deadline, "QEMU does not connect");
        std::thread::sleep(Duration::from_millis(1));
    }
}

impl Drop for Machine {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

impl Wire {
    /// Sends a frame to the device.
    pub fn send(&self, frame: &[u8]) -> Result<()> {
        until("room on the wire", || match self.socket.send_to(frame, Path::new(&self.to)) {
            Ok(_) => Ok(Some(())),
            Err(error) if error.kind() == ErrorKind::WouldBlock => Ok(None),
            Err(error) => Err(error.into()),
        })
    }

    /// The next frame that has come, if any.
    pub fn try_receive(&self) -> Result<Option<Vec<u8>>> {
        let mut frame = vec![0; 70_000];
        match self.socket.recv(&mut frame) {
            Ok(len) => {
                frame.truncate(len);
                Ok(Some(frame))
            }
            Err(error) if error.kind() == ErrorKind::WouldBlock => Ok(None),
            Err(error) => Err(error.into()),
        }
    }

    /// Waits for the next frame.
    pub fn receive(&self) -> Result<Vec<u8>> {
        until("a frame on the wire", || self.try_receive())
    }
}

/// Tries until there is a result, for as long as a test may take.
pub fn until<T>(what: &str, mut attempt: impl FnMut() -> Result<Option<T>>) -> Result<T> {
    let deadline = Instant::now() + PATIENCE;
    loop {
        if let Some(result) = attempt()? {
            return Ok(result);
        }
        ensure!(Instant::now() < deadline, "waited in vain for {what}");
        std::thread::sleep(Duration::from_micros(200));
    }
}

/// A frame: addresses, an optional tag, ethertype, and a payload of at least 64 bytes that begins with `payload`.
pub fn frame(dst: u64, src: u64, tci: Option<u16>, eth_type: u16, payload: &[u8]) -> Vec<u8> {
    let mut frame = Vec::new();
    frame.extend_from_slice(&dst.to_be_bytes()[2..]);
    frame.extend_from_slice(&src.to_be_bytes()[2..]);
    if let Some(tci) = tci {
        frame.extend_from_slice(&[0x81, 0x00]);
        frame.extend_from_slice(&tci.to_be_bytes());
    }
    frame.extend_from_slice(&eth_type.to_be_bytes());
    frame.extend_from_slice(payload);
    // Long enough that neither QEMU nor a popped tag makes it shorter than a frame may be.
    frame.resize(frame.len() + 64usize.saturating_sub(payload.len()), 0);
    frame
}
