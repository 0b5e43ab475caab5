//! A TAP interface whose other end is this process (Documentation/networking/tuntap.rst).

use std::fs::File;
use std::io::{ErrorKind, Read, Write};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};

use anyhow::{Context, Result, ensure};

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

#[allow(unsafe_code, reason = "a TAP is attached by an ioctl")]
fn open(name: &str) -> Result<File> {
    let file = File::options().read(true).write(true).open("/dev/net/tun")?;
    // struct ifreq of linux/if.h: the name, then (here) the flags; 40 bytes.
    let mut request = [0u8; 40];
    ensure!(name.len() < libc::IFNAMSIZ && !name.is_empty(), "a name has 1 to 15 bytes");
    request[..name.len()].copy_from_slice(name.as_bytes());
    let flags = (libc::IFF_TAP | libc::IFF_NO_PI) as i16;
    request[16..18].copy_from_slice(&flags.to_ne_bytes());
    // SAFETY: TUNSETIFF reads and writes one struct ifreq, which `request` is large enough for and outlives the call.
    let result = unsafe { libc::ioctl(file.as_raw_fd(), libc::TUNSETIFF as _, request.as_mut_ptr()) };
    ensure!(result == 0, "TUNSETIFF: {}", std::io::Error::last_os_error());
    rustix::io::ioctl_fionbio(&file, true)?;
    Ok(file)
}
