//! UMEM: the memory whose frames an AF_XDP socket and its driver fill and send (Documentation/networking/af_xdp.rst).
//!
//! Frames are named by the offset of their first byte. Who owns a frame at a time is a matter of the rings; here is
//! only where its bytes are. Frames that a PCI NIC has received are in such memory too ([`crate::nic`]).
#![allow(unsafe_code)]

use super::tx::MAX_PIECES;
use crate::virtio::{Burst, Frame, Mapping, Scatter, Seg};
use arrayvec::ArrayVec;
use rustix::mm::{MapFlags, ProtFlags, mmap_anonymous, munmap};
use std::ffi::c_void;
use std::io;
use std::ptr;
use std::sync::Arc;

/// Memory in frames of equal size, mapped for as long as anything may point into it.
#[derive(Debug)]
pub(crate) struct Umem {
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
    pub(crate) fn new(frames: u32, frame_size: u32) -> io::Result<Umem> {
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
    pub(crate) fn addr(&self) -> u64 {
        self.base.addr() as u64
    }

    /// Bytes.
    pub(crate) fn len(&self) -> u64 {
        self.len as u64
    }

    /// Bytes of a frame.
    pub(crate) fn frame_size(&self) -> u32 {
        self.frame_size
    }

    /// The name of frame number `index`.
    pub(crate) fn frame(&self, index: u32) -> u64 {
        u64::from(index) * u64::from(self.frame_size)
    }

    /// The name of the frame that has the byte at offset `addr`.
    pub(crate) fn frame_at(&self, addr: u64) -> u64 {
        addr & !(u64::from(self.frame_size) - 1)
    }

    /// Where the `len` bytes at offset `addr` are, if there are any and they are in one frame.
    fn find(&self, addr: u64, len: u32) -> Option<*mut u8> {
        let end = addr.checked_add(u64::from(len))?;
        let inside = end <= self.len as u64 && end <= self.frame_at(addr) + u64::from(self.frame_size);
        (len > 0 && inside).then(|| self.base.cast::<u8>().wrapping_add(addr as usize))
    }

    /// Whether there are `len` bytes at offset `addr` of one frame.
    pub(crate) fn contains(&self, addr: u64, len: u32) -> bool {
        self.find(addr, len).is_some()
    }

    /// Adds a packet to `burst`, which was [begun](Burst::begin) with this memory: of pieces that it
    /// [contains](Self::contains), others being left out. False if there is no room, and then nothing is added.
    pub(crate) fn push(&self, burst: &mut Burst, pieces: impl Iterator<Item = (u64, u32)>) -> bool {
        if !burst.owner().is_some_and(|owner| ptr::addr_eq(Arc::as_ptr(owner), self)) {
            return false;
        }
        let seg = |(addr, len)| {
            // SAFETY: `find` has found the bytes in the mapping, which is readable and writable, holds no Rust objects,
            // and lives as long as `self`. The burst that the `Seg` goes to owns `self`, and has an owner for as long as
            // it has pieces.
            self.find(addr, len).map(|start| unsafe { Seg::new(start, len) })
        };
        burst.push(pieces.filter_map(seg))
    }

    /// Writes `frame` into pieces that the memory [contains](Self::contains), and zeroes into what is left of them:
    /// padding, or what the frame's length promises but the frame has not, lest another's bytes leave with it.
    pub(crate) fn write(&self, frame: &Frame<'_>, pieces: impl Iterator<Item = (u64, u32)>) {
        let seg = |(addr, len)| {
            // SAFETY: as in `push`; and the `Seg` does not outlive this function, and so not `self`.
            self.find(addr, len).map(|start| unsafe { Seg::new(start, len) })
        };
        let segs: ArrayVec<Seg, { MAX_PIECES as usize }> =
            pieces.filter_map(seg).take(MAX_PIECES as usize).collect();
        let mut out = Scatter::new(&segs);
        frame.put(&mut out);
        while !out.is_full() {
            out.put_bytes(&[0; 64]);
        }
    }

    /// The name of the frame that `seg`, a piece of this memory, is in. `None` for other memory.
    pub(crate) fn frame_of(&self, seg: &Seg) -> Option<u64> {
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
        assert!(!umem.contains(0, 0));
        assert!(umem.contains(256, 1792));
        assert!(!umem.contains(256, 1793), "goes on in the next frame");
        assert!(umem.contains(6144, 2048));
        assert!(!umem.contains(8192, 1));
        assert!(!umem.contains(u64::MAX, 2));
        assert!(Umem::new(4, 3000).is_err());
    }

    #[test]
    fn a_burst_has_pieces_of_its_owner_only() {
        let (umem, other) = (Arc::new(Umem::new(4, 2048).unwrap()), Umem::new(4, 2048).unwrap());
        let mut burst = Burst::new();
        let piece = || [(4096 + 300, 5)].into_iter();
        assert!(!umem.push(&mut burst, piece()), "not begun");
        burst.begin(1, umem.clone());
        assert!(umem.push(&mut burst, piece()));
        assert!(!other.push(&mut burst, piece()));
        let seg = &burst.segments(0)[0];
        assert_eq!((umem.frame_of(seg), other.frame_of(seg)), (Some(4096), None));
        let room = (1..).take_while(|_| umem.push(&mut burst, piece())).count();
        assert_eq!(room, crate::virtio::MAX_BURST - 1);
        drop(umem);
        assert_eq!(burst.copy_head(&burst.frames()[0], &mut [1; 9]), 5, "the burst keeps the memory");
    }
}
