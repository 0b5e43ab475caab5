//! The two eventfds of a ring: *kick* (guest to us) and *call* (us to guest).

use std::fs::File;
use std::io::{self, Read, Write};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::sync::{Mutex, PoisonError};

use super::RingBase;

/// Makes reads and writes of `file` return at once, whatever the front-end has handed us.
fn set_nonblocking(file: &File) -> io::Result<()> {
    let fd = file.as_raw_fd();
    // SAFETY: F_GETFL reads flags of a descriptor that `file` keeps open.
    let flags = unsafe { libc::fcntl(fd, libc::F_GETFL) };
    // SAFETY: F_SETFL takes an int and touches no memory of ours.
    if flags < 0 || unsafe { libc::fcntl(fd, libc::F_SETFL, flags | libc::O_NONBLOCK) } < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(())
}

/// The eventfd by which a guest says that a ring has something for us.
#[derive(Debug)]
pub struct Kick(File);

impl Kick {
    /// Takes the descriptor and makes it non-blocking.
    ///
    /// # Errors
    /// The descriptor does not allow it.
    pub fn new(file: File) -> io::Result<Self> {
        set_nonblocking(&file)?;
        Ok(Kick(file))
    }

    /// Takes back what was signalled, so that the descriptor is no longer readable.
    pub fn clear(&self) {
        // Nothing to read is as good: somebody else has cleared it.
        let _ = (&self.0).read(&mut [0; 8]);
    }
}

impl AsFd for Kick {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

/// The eventfd by which we interrupt a guest. The front-end swaps it at run time, to mask the interrupt or not.
#[derive(Debug, Default)]
pub struct Call(Mutex<Option<File>>);

impl Call {
    /// Replaces the descriptor, and signals the new one. `None`, or one that cannot be used: the guest polls.
    ///
    /// What was published while there was no descriptor, or by a daemon that died before it could interrupt, would else
    /// be waited for in vain: with an event index no later entry passes the event again.
    pub fn set(&self, file: Option<File>) {
        let file = file.filter(|f| set_nonblocking(f).is_ok());
        *self.0.lock().unwrap_or_else(PoisonError::into_inner) = file;
        self.signal();
    }

    /// For a ring that has just been started at `base`: what another left unfinished may have been given back by that, and as with
    /// a new descriptor, the guest's event may be among it.
    pub(super) fn signal_finished(&self, base: &RingBase) {
        if base.record().is_some() {
            self.signal();
        }
    }

    /// Interrupts the guest. The lock is only ever held for this write or a swap.
    pub(super) fn signal(&self) {
        if let Some(file) = &*self.0.lock().unwrap_or_else(PoisonError::into_inner) {
            // EAGAIN means that the counter is full, so the guest is being interrupted already.
            let _ = (&*file).write(&1u64.to_ne_bytes());
        }
    }
}
