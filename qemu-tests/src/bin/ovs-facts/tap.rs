//! TAP devices by hand (Linux, include/uapi/linux/if_tun.h; Documentation/networking/tuntap.rst).

use std::fs::File;
use std::io::{ErrorKind, Read, Write};
use std::os::fd::AsRawFd;
use std::os::unix::fs::OpenOptionsExt;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use qemu_tests::frontend::NetHeader;
use qemu_tests::frontend::packet::{Checked, check};
use qemu_tests::host::wait_for;

const TUNSETIFF: libc::c_ulong = 0x4004_54ca;
const TUNSETOFFLOAD: libc::c_ulong = 0x4004_54d0;
const TUNSETVNETHDRSZ: libc::c_ulong = 0x4004_54d8;
const IFF_TAP: u16 = 2;
const IFF_NO_PI: u16 = 0x1000;
const IFF_VNET_HDR: u16 = 0x4000;
/// `TUN_F_CSUM`, `TUN_F_TSO4`, `TUN_F_TSO6`.
const OFFLOADS: libc::c_ulong = 1 | 2 | 4;
/// `TUN_F_USO4`, `TUN_F_USO6`.
const OFFLOADS_UDP: libc::c_ulong = 0x20 | 0x40;

/// What a TAP's reader says that it can take.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Mode {
    /// With a virtio-net header, and with `TUNSETOFFLOAD` for checksums and TSO.
    Offloads,
    /// With a virtio-net header, without `TUNSETOFFLOAD`.
    Header,
    /// Frames alone.
    Plain,
}

/// A TAP that is up; it goes when dropped.
pub struct Tap {
    file: File,
    mode: Mode,
    /// The interface's name.
    pub name: String,
}

impl Tap {
    /// Makes one.
    pub fn new(name: &str, mode: Mode) -> Result<Self> {
        let file = File::options()
            .read(true)
            .write(true)
            .custom_flags(libc::O_NONBLOCK)
            .open("/dev/net/tun")
            .context("/dev/net/tun")?;
        let header = if mode == Mode::Plain { 0 } else { IFF_VNET_HDR };
        // struct ifreq: the name, then a union of 24 bytes that begins with the flags.
        let mut request = [0_u8; 40];
        ensure!(name.len() < 16, "{name} is too long");
        request[..name.len()].copy_from_slice(name.as_bytes());
        request[16..18].copy_from_slice(&(IFF_TAP | IFF_NO_PI | header).to_ne_bytes());
        control(&file, TUNSETIFF, request.as_mut_ptr() as libc::c_ulong)
            .with_context(|| format!("TAP {name}"))?;
        if mode != Mode::Plain {
            let mut size = NetHeader::LEN as libc::c_int;
            control(&file, TUNSETVNETHDRSZ, &raw mut size as libc::c_ulong)?;
        }
        if mode == Mode::Offloads {
            control(&file, TUNSETOFFLOAD, OFFLOADS)?;
        }
        // Nothing but what the facts send: no IPv6 autoconfiguration.
        crate::bench::sh(&format!(
            "echo 1 >/proc/sys/net/ipv6/conf/{name}/disable_ipv6 && ip link set {name} up"
        ))?;
        Ok(Self { file, mode, name: name.into() })
    }

    /// Says that its reader can take super-frames of UDP too, if the kernel knows of such.
    pub fn offload_udp(&self) -> std::io::Result<()> {
        control(&self.file, TUNSETOFFLOAD, OFFLOADS | OFFLOADS_UDP)
    }

    /// Sends one frame into the host, as a guest behind this TAP would.
    pub fn write(&self, header: NetHeader, frame: &[u8]) -> std::io::Result<()> {
        let mut bytes = Vec::new();
        if self.mode != Mode::Plain {
            bytes.extend(header.to_bytes());
        }
        bytes.extend(frame);
        (&self.file).write_all(&bytes)
    }

    /// Sends a frame that needs nothing done to it.
    pub fn send(&self, frame: &[u8]) -> Result<()> {
        Ok(self.write(NetHeader::default(), frame)?)
    }

    /// What the host has sent out here, if something has come.
    pub fn read(&self) -> Result<Option<Frame>> {
        let mut buffer = vec![0; 70_000];
        let bytes = match (&self.file).read(&mut buffer) {
            Ok(bytes) => bytes,
            Err(error) if error.kind() == ErrorKind::WouldBlock => return Ok(None),
            Err(error) => return Err(error.into()),
        };
        let at = if self.mode == Mode::Plain { 0 } else { NetHeader::LEN };
        let header = match buffer.first_chunk() {
            Some(bytes) if at > 0 => NetHeader::from_bytes(*bytes),
            _ => NetHeader::default(),
        };
        Ok(Some(Frame { header, bytes: buffer[at..bytes].to_vec() }))
    }

    /// The next frame.
    pub fn next(&self) -> Result<Frame> {
        wait_for(&format!("a frame at {}", self.name), Duration::from_secs(10), || self.read())
    }

    /// Frames until `payload` bytes behind their headers have come.
    pub fn gather(&self, payload: usize) -> Result<Vec<Frame>> {
        let (mut frames, mut have) = (Vec::new(), 0);
        while have < payload {
            let frame = self.next()?;
            have += frame.check()?.payload.len();
            frames.push(frame);
        }
        Ok(frames)
    }

    /// An error if anything comes within `time`.
    pub fn silent(&self, time: Duration) -> Result<()> {
        let end = Instant::now() + time;
        while Instant::now() < end {
            let frame = self.read()?;
            ensure!(frame.is_none(), "{} got {frame:?}", self.name);
            std::thread::sleep(Duration::from_millis(5));
        }
        Ok(())
    }

    /// One of the interface's counters, such as `tx_errors`.
    pub fn counter(&self, name: &str) -> Result<u64> {
        let path = format!("/sys/class/net/{}/statistics/{name}", self.name);
        Ok(std::fs::read_to_string(&path).context(path)?.trim().parse()?)
    }
}

/// A frame with the virtio-net header that it came with.
#[derive(Debug, Clone)]
pub struct Frame {
    /// Empty if the TAP has none.
    pub header: NetHeader,
    /// From the Ethernet header on.
    pub bytes: Vec<u8>,
}

impl Frame {
    /// Takes it apart; all lengths and checksums must be right.
    pub fn check(&self) -> Result<Checked> {
        check(&self.header, &self.bytes).map_err(anyhow::Error::msg)
    }
}

#[allow(unsafe_code, reason = "no crate in use wraps the ioctls of TAPs")]
fn control(file: &File, request: libc::c_ulong, argument: libc::c_ulong) -> std::io::Result<()> {
    // SAFETY: `file` is /dev/net/tun; each request of this module reads its argument as the number that it is, or reads and
    // writes no more than the `struct ifreq` or `int` that the caller owns and points it to.
    match unsafe { libc::ioctl(file.as_raw_fd(), request, argument) } {
        0 => Ok(()),
        _ => Err(std::io::Error::last_os_error()),
    }
}
