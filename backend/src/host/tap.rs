//! A representor: the TAP in OVS's bridge that stands for a port's guest.
//!
//! What is written to it OVS handles as if the guest had sent it; what OVS outputs on it is read here. It is made once and
//! persists: it is adopted again after a restart, with its place in OVS's bridge, and goes with `del-port` only. It is a
//! wire and no more: no addresses, no ARP, no IPv6 and no multicast of its own.

mod ioctl;
mod rtnetlink;
#[cfg(test)]
pub(super) mod testing;
#[cfg(test)]
mod tests;

use crate::virtio::NetHeader;
use libc::{
    IFF_MULTICAST, IFF_NO_CARRIER, IFF_NO_PI, IFF_NOARP, IFF_TAP, IFF_UP, IFF_VNET_HDR, TUN_F_CSUM,
    TUN_F_TSO_ECN, TUN_F_TSO4, TUN_F_TSO6, TUN_F_USO4, TUN_F_USO6,
};
use log::warn;
use rtnetlink::Rtnetlink;
use rustix::fs::{Mode, OFlags};
use rustix::io::Errno;
use rustix::net::{AddressFamily, SocketFlags, SocketType, netdevice, socket_with};
use std::io::{self, IoSlice, IoSliceMut};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::time::Duration;
use virtio_bindings::virtio_net as net;

/// Where TAPs are made.
const DEVICE: &str = "/dev/net/tun";
/// How often, and with what pause, a TAP is tried that somebody else has.
const BUSY_TRIES: u32 = 25;
/// See [`BUSY_TRIES`].
const BUSY_PAUSE: Duration = Duration::from_millis(10);

/// What is wrong with a TAP: one line that a person can act on.
#[derive(Debug, thiserror::Error)]
pub enum TapError {
    /// There is no driver.
    #[error("there is no {DEVICE}: load the kernel module 'tun' (modprobe tun)")]
    NoDriver,
    /// It takes CAP_NET_ADMIN.
    #[error("no permission for TAP '{0}': pointworkd needs CAP_NET_ADMIN and access to {DEVICE}")]
    Permission(String),
    /// The name is taken by something else.
    #[error(
        "'{0}' is a network device already and no TAP with one queue: rename the port or delete that device"
    )]
    OtherDevice(String),
    /// Another process has it.
    #[error("TAP '{0}' is in use by another process")]
    Busy(String),
    /// Something else.
    #[error("TAP '{name}': cannot {what}: {error}")]
    Failed {
        /// The TAP.
        name: String,
        /// What was being done.
        what: &'static str,
        /// What the kernel said.
        error: io::Error,
    },
}

/// The flags of a TAP, of those that we set or clear.
const FLAGS: u32 = (IFF_UP | IFF_NOARP) as u32;
const CHANGED: u32 = (IFF_UP | IFF_NOARP | IFF_MULTICAST) as u32;

/// What a TAP is to be like.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct TapConfig {
    /// Segments of up to 64 KiB and partial checksums pass, both ways. If not, frames are whole, and the kernel completes
    /// and cuts what it has for us.
    pub offloads: bool,
    /// The host's own network stack sees nothing of what is written; packet sockets do.
    pub silenced: bool,
    /// Longest packet without the link header, in bytes.
    pub mtu: u32,
}

/// A TAP that is attached to this process, not blocking. Dropping it leaves the device as it is.
#[derive(Debug)]
pub struct Tap {
    file: OwnedFd,
    name: String,
    index: u32,
    features: u64,
}

/// Makes the file the TAP's. The process that had it last may just be ending, so a busy one is tried for a moment.
fn attach(file: &OwnedFd, name: &str) -> io::Result<()> {
    // An older kernel than 6.2 does not know the last flag, and shows a carrier until it is taken away.
    let flags = (IFF_TAP | IFF_NO_PI | IFF_VNET_HDR | IFF_NO_CARRIER) as i16;
    for _ in 0..BUSY_TRIES {
        match ioctl::attach(file, name, flags) {
            Err(error) if error.raw_os_error() == Some(libc::EBUSY) => std::thread::sleep(BUSY_PAUSE),
            result => return result,
        }
    }
    ioctl::attach(file, name, flags)
}

impl Tap {
    /// Makes the TAP of this name, or adopts the one that there is, and makes it as it is to be: up, without a carrier.
    pub fn open(name: &str, config: TapConfig) -> Result<Tap, TapError> {
        let failed = |what| {
            move |error: io::Error| match error.raw_os_error() {
                Some(libc::EPERM | libc::EACCES) => TapError::Permission(name.into()),
                _ => TapError::Failed { name: name.into(), what, error },
            }
        };
        let flags = OFlags::RDWR | OFlags::NONBLOCK | OFlags::CLOEXEC;
        let file = rustix::fs::open(DEVICE, flags, Mode::empty()).map_err(|error| match error {
            Errno::NOENT | Errno::NODEV | Errno::NXIO => TapError::NoDriver,
            error => failed("open /dev/net/tun")(error.into()),
        })?;
        attach(&file, name).map_err(|error| match error.raw_os_error() {
            Some(libc::EBUSY) => TapError::Busy(name.into()),
            Some(libc::EINVAL) => TapError::OtherDevice(name.into()),
            _ => failed("be made")(error),
        })?;
        ioctl::set(&file, ioctl::HEADER_LEN, NetHeader::LEN as i32)
            .map_err(failed("set the header's length"))?;
        ioctl::set(&file, ioctl::LITTLE_ENDIAN, 1).map_err(failed("set the byte order"))?;
        let features = set_offloads(&file, config.offloads).map_err(failed("set its offloads"))?;
        let index = index_of(name).map_err(failed("read its index"))?;
        let tap = Tap { file, name: name.into(), index, features };
        tap.set_carrier(false).map_err(failed("take its carrier away"))?;
        let mut route = Rtnetlink::new().map_err(failed("open a netlink socket"))?;
        keep_ipv6_away(name, index, &mut route).map_err(failed("turn its IPv6 off"))?;
        if config.silenced {
            route.drop_ingress(index).map_err(failed("add its ingress filter (cls_bpf)"))?;
        } else {
            route.pass_ingress(index).map_err(failed("remove its ingress filter"))?;
        }
        route.set_link(index, FLAGS, CHANGED, Some(config.mtu)).map_err(failed("set its flags and MTU"))?;
        // Last: what fails before leaves no new device behind.
        ioctl::set(&tap.file, ioctl::PERSIST, 1).map_err(failed("be made to persist"))?;
        Ok(tap)
    }

    /// The device goes when this process no longer has it open, which is at once.
    pub fn remove(self) -> Result<(), TapError> {
        ioctl::set(&self.file, ioctl::PERSIST, 0).map_err(|error| TapError::Failed {
            name: self.name.clone(),
            what: "be removed",
            error,
        })
    }

    /// Its name.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Interface index.
    pub fn index(&self) -> u32 {
        self.index
    }

    /// What may be written to it and is read from it, in the bits of a guest's receive offloads (`VIRTIO_NET_F_GUEST_*`):
    /// none, or all that the kernel has.
    pub fn features(&self) -> u64 {
        self.features
    }

    /// Turns the carrier on or off: OVS sees whether there is a guest.
    pub fn set_carrier(&self, on: bool) -> io::Result<()> {
        ioctl::set(&self.file, ioctl::CARRIER, on.into())
    }

    /// Longest packet without the link header, in bytes.
    pub fn mtu(&self) -> io::Result<u32> {
        Ok(Rtnetlink::new()?.link(self.index)?.mtu)
    }

    /// Sets [`Tap::mtu`].
    pub fn set_mtu(&self, mtu: u32) -> io::Result<()> {
        Rtnetlink::new()?.set_link(self.index, 0, 0, Some(mtu))
    }

    /// Brings it up again if it is down; gives whether it was.
    pub fn raise(&self) -> io::Result<bool> {
        let mut route = Rtnetlink::new()?;
        let down = route.link(self.index)?.flags & CHANGED != FLAGS;
        if down {
            route.set_link(self.index, FLAGS, CHANGED, None)?;
        }
        Ok(down)
    }

    /// Writes one frame in two parts. [`Errno::AGAIN`]: its queue is full; [`Errno::IO`]: it is down; [`Errno::BADFD`]: the
    /// device is gone; [`Errno::INVAL`]: the kernel does not believe the header.
    pub fn write(&self, header: &NetHeader, head: &[u8], tail: &[u8]) -> Result<(), Errno> {
        let header = header.to_bytes();
        let parts = [IoSlice::new(&header), IoSlice::new(head), IoSlice::new(tail)];
        let used = if tail.is_empty() { &parts[..2] } else { &parts };
        rustix::io::retry_on_intr(|| rustix::io::writev(&self.file, used)).map(|_| ())
    }

    /// Reads one frame into `frame` and gives its header and length. `None`: there is none now. A frame that does not fit
    /// is cut without a word.
    pub fn read(&self, frame: &mut [u8]) -> Result<Option<(NetHeader, usize)>, Errno> {
        let mut header = [0; NetHeader::LEN];
        let read = {
            let mut parts = [IoSliceMut::new(&mut header), IoSliceMut::new(frame)];
            rustix::io::retry_on_intr(|| rustix::io::readv(&self.file, &mut parts))
        };
        match read {
            Ok(n) => Ok(Some((NetHeader::from_bytes(&header), n.saturating_sub(NetHeader::LEN)))),
            Err(Errno::AGAIN) => Ok(None),
            Err(error) => Err(error),
        }
    }
}

impl AsFd for Tap {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }
}

/// Turns the offloads on, as far as the kernel has them, or off. Gives them as [`Tap::features`].
fn set_offloads(file: &OwnedFd, on: bool) -> io::Result<u64> {
    const USO: u32 = TUN_F_USO4 | TUN_F_USO6;
    const TSO: u32 = TUN_F_CSUM | TUN_F_TSO4 | TUN_F_TSO6 | TUN_F_TSO_ECN;
    let bits = |bits: &[u32]| bits.iter().fold(0, |sum, bit| sum | 1u64 << bit);
    if !on {
        ioctl::set(file, ioctl::OFFLOAD, 0)?;
        return Ok(0);
    }
    let tso = bits(&[
        net::VIRTIO_NET_F_GUEST_CSUM,
        net::VIRTIO_NET_F_GUEST_TSO4,
        net::VIRTIO_NET_F_GUEST_TSO6,
        net::VIRTIO_NET_F_GUEST_ECN,
    ]);
    // Linux has USO for TAPs since 6.2.
    if ioctl::set(file, ioctl::OFFLOAD, (TSO | USO) as i32).is_ok() {
        return Ok(tso | bits(&[net::VIRTIO_NET_F_GUEST_USO4, net::VIRTIO_NET_F_GUEST_USO6]));
    }
    ioctl::set(file, ioctl::OFFLOAD, TSO as i32)?;
    Ok(tso)
}

/// Has the kernel tell everybody of a device as if something about it had changed.
pub fn announce(index: u32) -> io::Result<()> {
    Rtnetlink::new()?.announce(index)
}

fn index_of(name: &str) -> io::Result<u32> {
    let socket = socket_with(AddressFamily::UNIX, SocketType::DGRAM, SocketFlags::CLOEXEC, None)?;
    Ok(netdevice::name_to_index(socket, name)?)
}

/// Turns IPv6 off for the device; it has to be done before it is up, or the kernel gives it an address. A daemon that may
/// not write to /proc/sys keeps it from making addresses, which leaves it without any as long as nobody adds one.
fn keep_ipv6_away(name: &str, index: u32, route: &mut Rtnetlink) -> io::Result<()> {
    let path = format!("/proc/sys/net/ipv6/conf/{name}/disable_ipv6");
    match std::fs::read_to_string(&path) {
        // This kernel has no IPv6.
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        Ok(value) if value.trim() == "1" => return Ok(()),
        _ => {}
    }
    if let Err(error) = std::fs::write(&path, "1") {
        warn!("{path}: {error}: TAP '{name}' keeps IPv6, without addresses of its own");
        route.make_no_addresses(index)?;
    }
    Ok(())
}
