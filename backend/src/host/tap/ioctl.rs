//! The ioctls of `/dev/net/tun` (`linux/if_tun.h`).

#![allow(unsafe_code)] // ioctls have no safe form

use libc::{Ioctl, c_int, c_ulong, ifreq};
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};

/// How an ioctl takes its number.
#[derive(Clone, Copy)]
enum Passing {
    Value,
    Pointer,
}

/// A setting that is one number.
#[derive(Clone, Copy)]
pub struct Setting(Ioctl, Passing);

/// Length of the virtio-net header before each frame, in bytes.
pub const HEADER_LEN: Setting = Setting(libc::TUNSETVNETHDRSZ, Passing::Pointer);
/// Whether that header is little-endian whatever the machine is.
pub const LITTLE_ENDIAN: Setting = Setting(libc::TUNSETVNETLE, Passing::Pointer);
/// Whether the device stays when nobody has it open.
pub const PERSIST: Setting = Setting(libc::TUNSETPERSIST, Passing::Value);
/// Offloads: `TUN_F_*`.
pub const OFFLOAD: Setting = Setting(libc::TUNSETOFFLOAD, Passing::Value);
/// Whether it has a carrier (Linux 5.0).
pub const CARRIER: Setting = Setting(libc::TUNSETCARRIER, Passing::Pointer);

/// Attaches a file of `/dev/net/tun` to the device of this name, which is made if there is none. `flags`: `IFF_TAP` and so on.
/// The name must be one as [`crate::port_config`] allows: others may be templates to the kernel, or are cut.
pub fn attach(file: &OwnedFd, name: &str, flags: i16) -> io::Result<()> {
    // SAFETY: all zeroes is a valid `ifreq`: it is made of integers, arrays of them, and pointers that may be null.
    let mut request: ifreq = unsafe { std::mem::zeroed() };
    let room = request.ifr_name.len() - 1;
    if name.is_empty() || name.len() > room || name.contains(['%', '\0', '/']) {
        return Err(io::Error::new(io::ErrorKind::InvalidInput, "no name of a network interface"));
    }
    for (to, from) in request.ifr_name.iter_mut().zip(name.bytes()) {
        *to = from as _;
    }
    request.ifr_ifru.ifru_flags = flags;
    // SAFETY: TUNSETIFF reads and writes one `ifreq`, which lives until the call is over.
    let result = unsafe { libc::ioctl(file.as_raw_fd(), libc::TUNSETIFF, &mut request) };
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

/// Changes a setting of the attached device.
pub fn set(file: &OwnedFd, Setting(request, passing): Setting, value: i32) -> io::Result<()> {
    let value: c_int = value;
    let result = match passing {
        // SAFETY: these take their argument as a number, so no memory is touched.
        Passing::Value => unsafe { libc::ioctl(file.as_raw_fd(), request, value as c_ulong) },
        // SAFETY: these read one `int`, which lives until the call is over.
        Passing::Pointer => unsafe { libc::ioctl(file.as_raw_fd(), request, &value) },
    };
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}
