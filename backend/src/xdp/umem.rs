//! UMEM: the memory whose frames an AF_XDP socket and its driver fill and send (Documentation/networking/af_xdp.rst).
//!
//! Frames are named by the offset of their first byte. Who owns a frame at a time is a matter of the rings; here is
//! only where its bytes are.
#![allow(unsafe_code)]

use crate::virtio::{Mapping, Seg};
use rustix::mm::{MapFlags, ProtFlags, mmap_anonymous, munmap};
use std::ffi::c_void;
use std::io;
use std::ptr;

/// Memory in frames of equal size, mapped for as long as anything may point into it.
#[derive(Debug)]
pub(super) struct Umem {
    base: *mut c_void,
    /// Bytes.
    len: usize,
    /// Bytes; a power of two.
    frame_size: u32,
}

// SAFETY: the pointer is an address of a mapping that lives as long as the `Umem`; the mapping holds no Rust objects and
// is only accessed by raw copies through `Seg`s.
unsafe impl Send for Umem {}
// SAFETY: as above; nothing here changes after `new`.
unsafe impl Sync for Umem {}

impl Mapping for Umem {}

impl Umem {
    /// Maps `frames` frames of `frame_size` bytes, a power of two.
    ///
    /// # Errors
    /// There is too little memory.
    pub(super) fn new(frames: u32, frame_size: u32) -> io::Result<Umem> {
        if !frame_size.is_power_of_two() || frames == 0 {
            return Err(io::ErrorKind::InvalidInput.into());
        }
        let len = frames as usize * frame_size as usize;
        // SAFETY: a new private mapping at an address of the kernel's choice touches nothing that exists.
        let base = unsafe {
            mmap_anonymous(
                ptr::null_mut(),
                len,
                ProtFlags::READ | ProtFlags::WRITE,
                MapFlags::PRIVATE | MapFlags::POPULATE,
            )
        }?;
        Ok(Umem { base, len, frame_size })
    }

    /// Where the mapping begins, for the kernel.
    pub(super) fn addr(&self) -> u64 {
        self.base.addr() as u64
    }

    /// Bytes.
    pub(super) fn len(&self) -> u64 {
        self.len as u64
    }

    /// Bytes of a frame.
    pub(super) fn frame_size(&self) -> u32 {
        self.frame_size
    }

    /// The name of frame number `index`.
    pub(super) fn frame(&self, index: u32) -> u64 {
        u64::from(index) * u64::from(self.frame_size)
    }

    /// The name of the frame that has the byte at offset `addr`.
    pub(super) fn frame_at(&self, addr: u64) -> u64 {
        addr & !(u64::from(self.frame_size) - 1)
    }

    /// The `len` bytes at offset `addr`, if there are any and they are in one frame. The caller keeps the `Umem` for as
    /// long as it keeps the piece: in a [`Burst`](crate::virtio::Burst) that it owns, or in the same function.
    pub(super) fn seg(&self, addr: u64, len: u32) -> Option<Seg> {
        let end = addr.checked_add(u64::from(len))?;
        if len == 0 || end > self.len as u64 || end > self.frame_at(addr) + u64::from(self.frame_size) {
            return None;
        }
        let start = self.base.cast::<u8>().wrapping_add(addr as usize);
        // SAFETY: `addr + len` is at most the length of the mapping, which is readable and writable, holds no Rust
        // objects, and lives as long as `self`, which the callers keep.
        Some(unsafe { Seg::new(start, len) })
    }

    /// The name of the frame that `seg`, a piece of this memory, is in. `None` for other memory.
    pub(super) fn frame_of(&self, seg: &Seg) -> Option<u64> {
        let offset = seg.ptr().addr().checked_sub(self.base.addr())?;
        (offset < self.len).then(|| self.frame_at(offset as u64))
    }
}

impl Drop for Umem {
    fn drop(&mut self) {
        // SAFETY: the mapping is ours, and nothing of ours points into it any more. The kernel has its own hold on the
        // pages as long as a socket uses them.
        let _ = unsafe { munmap(self.base, self.len) };
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pieces_lie_in_one_frame() {
        let umem = Umem::new(4, 2048).unwrap();
        assert_eq!((umem.len(), umem.frame(3), umem.frame_at(4095)), (8192, 6144, 2048));
        assert!(umem.seg(0, 0).is_none());
        assert!(umem.seg(256, 1792).is_some());
        assert!(umem.seg(256, 1793).is_none(), "goes on in the next frame");
        assert!(umem.seg(6144, 2048).is_some());
        assert!(umem.seg(8192, 1).is_none());
        assert!(umem.seg(u64::MAX, 2).is_none());
        let seg = umem.seg(4096 + 300, 5).unwrap();
        assert_eq!(umem.frame_of(&seg), Some(4096));
        assert_eq!(Umem::new(4, 2048).unwrap().frame_of(&seg), None, "of another memory");
        assert!(Umem::new(4, 3000).is_err());
    }
}
