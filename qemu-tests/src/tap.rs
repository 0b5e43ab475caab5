//! A TAP interface whose other end is this process (Documentation/networking/tuntap.rst).

use std::fs::File;
use std::io::{ErrorKind, Read, Write};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};

use anyhow::{Context, Result, ensure};

use crate::frontend::NetHeader;
use crate::netns::Namespace;

/// The largest frame that is read; larger ones are cut.
const MAX_FRAME: usize = 65_536;

/// One TAP. The interface is gone when it is dropped.
#[derive(Debug)]
pub struct Tap {
    name: String,
    file: File,
}

impl Tap {
    /// Makes the interface `name` in `namespace` and sets it up.
    pub fn new(namespace: &Namespace, name: &str) -> Result<Self> {
        let file = namespace.run(|| open(name).with_context(|| format!("TAP {name}")))?;
        namespace.ip(&["link", "set", name, "up"])?;
        Ok(Self { name: name.into(), file })
    }

    /// The interface sees this frame arrive.
    pub fn send(&mut self, frame: &[u8]) -> Result<()> {
        let written = self.file.write(frame).with_context(|| format!("writing to TAP {}", self.name))?;
        ensure!(written == frame.len(), "TAP {} took {written} bytes of {}", self.name, frame.len());
        Ok(())
    }

    /// The next frame that was sent on the interface, if there is one.
    pub fn receive(&mut self) -> Result<Option<Vec<u8>>> {
        let mut frame = vec![0; MAX_FRAME];
        match self.file.read(&mut frame) {
            Ok(len) => {
                frame.truncate(len);
                Ok(Some(frame))
            }
            Err(error) if error.kind() == ErrorKind::WouldBlock => Ok(None),
            Err(error) => Err(error).with_context(|| format!("reading from TAP {}", self.name)),
        }
    }
}

impl AsFd for Tap {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }
}

/// A TAP of the calling thread's network namespace whose frames come and go behind a virtio-net header, so that checksums and
/// segmentation are left to whoever is at the other end, both ways. The interface is gone when it is dropped.
#[derive(Debug)]
pub struct OffloadTap {
    file: File,
    /// Whether UDP segments pass whole (USO), as since Linux 6.2.
    pub udp_segmentation: bool,
}

impl OffloadTap {
    /// Makes the interface `name`, which is down.
    pub fn new(name: &str) -> Result<Self> {
        const TCP: libc::c_uint =
            libc::TUN_F_CSUM | libc::TUN_F_TSO4 | libc::TUN_F_TSO6 | libc::TUN_F_TSO_ECN;
        const UDP: libc::c_uint = libc::TUN_F_USO4 | libc::TUN_F_USO6;
        let file = attach(name, libc::IFF_VNET_HDR)?;
        let header = NetHeader::LEN as libc::c_int;
        control(&file, libc::TUNSETVNETHDRSZ, &raw const header as libc::c_ulong)
            .context("TUNSETVNETHDRSZ")?;
        let udp_segmentation = control(&file, libc::TUNSETOFFLOAD, (TCP | UDP).into()).is_ok();
        if !udp_segmentation {
            control(&file, libc::TUNSETOFFLOAD, TCP.into()).context("TUNSETOFFLOAD")?;
        }
        Ok(Self { file, udp_segmentation })
    }

    /// The interface sees this frame arrive, the virtio-net header first.
    pub fn write(&self, bytes: &[u8]) -> std::io::Result<()> {
        (&self.file).write(bytes).map(drop)
    }

    /// The next frame that was sent on the interface with its header, and the length of both; none if there is no frame.
    pub fn read(&self, bytes: &mut [u8]) -> std::io::Result<Option<usize>> {
        match (&self.file).read(bytes) {
            Ok(len) => Ok(Some(len)),
            Err(error) if error.kind() == ErrorKind::WouldBlock => Ok(None),
            Err(error) => Err(error),
        }
    }
}

impl AsFd for OffloadTap {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }
}

fn open(name: &str) -> Result<File> {
    attach(name, 0)
}

/// A file of `/dev/net/tun`, not blocking, on the TAP `name` with these flags besides.
fn attach(name: &str, more_flags: libc::c_int) -> Result<File> {
    let file = File::options().read(true).write(true).open("/dev/net/tun")?;
    // struct ifreq of linux/if.h: the name, then (here) the flags; 40 bytes.
    let mut request = [0u8; 40];
    ensure!(name.len() < libc::IFNAMSIZ && !name.is_empty(), "a name has 1 to 15 bytes");
    request[..name.len()].copy_from_slice(name.as_bytes());
    let flags = (libc::IFF_TAP | libc::IFF_NO_PI | more_flags) as i16;
    request[16..18].copy_from_slice(&flags.to_ne_bytes());
    control(&file, libc::TUNSETIFF, request.as_mut_ptr() as libc::c_ulong).context("TUNSETIFF")?;
    rustix::io::ioctl_fionbio(&file, true)?;
    Ok(file)
}

#[allow(unsafe_code, reason = "no crate in use wraps the ioctls of TAPs")]
fn control(file: &File, request: libc::Ioctl, argument: libc::c_ulong) -> std::io::Result<()> {
    // SAFETY: `file` is /dev/net/tun. Each request of this module takes its argument as the number that it is, or reads and
    // writes no more than the `struct ifreq` or reads the `int` that the caller owns and points it to.
    match unsafe { libc::ioctl(file.as_raw_fd(), request, argument) } {
        0 => Ok(()),
        _ => Err(std::io::Error::last_os_error()),
    }
}
