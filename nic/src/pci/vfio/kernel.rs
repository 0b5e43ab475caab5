//! What `vfio-ioctls` leaves to its user: mapping memory for a device, the IOVA ranges, a reset that says whether it was one,
//! and borrowed descriptors.
#![allow(unsafe_code)]

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, IntoRawFd, OwnedFd};

use vfio_ioctls::{VfioContainer, VfioError, VfioIommufd, VfioOps};
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};
use vmm_sys_util::ioctl::{ioctl, ioctl_with_mut_ref};

use super::super::memory::Mapping;

/// `VFIO_DEVICE_RESET` (linux/vfio.h).
const RESET: u64 = 0x3b6f;
/// `VFIO_IOMMU_GET_INFO` (linux/vfio.h).
const GET_INFO: u64 = 0x3b70;
/// `IOMMU_IOAS_IOVA_RANGES` (linux/iommufd.h).
const IOVA_RANGES: u64 = 0x3b84;
/// Ranges that are asked for at most.
const MAX_RANGES: usize = 256;

/// Maps `memory` for the devices of `ops` at `iova`.
///
/// It must be undone ([`VfioOps::vfio_dma_unmap`]) before `memory` is dropped.
pub(super) fn map(ops: &dyn VfioOps, iova: u64, memory: &Mapping) -> Result<(), VfioError> {
    // SAFETY: the memory is only accessed by the volatile and atomic accesses of `Mapping`, no reference to it exists, and
    // the one caller undoes the mapping before the memory goes.
    unsafe { ops.vfio_dma_map(iova, memory.len(), memory.address()) }
}

/// Borrows the descriptor of a device for a call.
pub(super) fn borrow(device: &impl AsRawFd) -> BorrowedFd<'_> {
    // SAFETY: the descriptor belongs to `device` and stays open for as long as that is borrowed, which the lifetime says.
    unsafe { BorrowedFd::borrow_raw(device.as_raw_fd()) }
}

/// Resets a device by the best method that the kernel has for it.
pub(super) fn reset(device: &impl AsRawFd) -> io::Result<()> {
    // SAFETY: the request has no argument, so the kernel accesses no memory of ours.
    if unsafe { ioctl(device, RESET) } < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(())
}

/// An eventfd for the kernel, and another descriptor of it to wait on.
pub(super) fn event() -> io::Result<(EventFd, OwnedFd)> {
    let event = EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC)?;
    let copy = event.try_clone()?.into_raw_fd();
    // SAFETY: the descriptor was just made and nobody else has it.
    Ok((event, unsafe { OwnedFd::from_raw_fd(copy) }))
}

/// What the kernel says of a container's IOMMU: `struct vfio_iommu_type1_info` and its capabilities.
pub(super) fn iommu_info(container: &VfioContainer) -> io::Result<Vec<u8>> {
    let mut info = [0u64; 1024];
    info[0] = size_of_val(&info) as u64;
    // SAFETY: the kernel writes at most the `argsz` bytes that the first word gives, which are all of `info`.
    if unsafe { ioctl_with_mut_ref(container, GET_INFO, &mut info) } < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(info.iter().flat_map(|word| word.to_ne_bytes()).collect())
}

/// The ranges of addresses that devices of an I/O address space can use, first and last of each.
pub(super) fn ioas_ranges(iommufd: &VfioIommufd) -> io::Result<Vec<(u64, u64)>> {
    /// `struct iommu_ioas_iova_ranges`.
    #[repr(C)]
    struct Request {
        size: u32,
        ioas: u32,
        count: u32,
        reserved: u32,
        ranges: u64,
        alignment: u64,
    }
    let mut ranges = [[0u64; 2]; MAX_RANGES];
    let mut request = Request {
        size: size_of::<Request>() as u32,
        ioas: iommufd.ioas().id(),
        count: MAX_RANGES as u32,
        reserved: 0,
        ranges: ranges.as_mut_ptr() as u64,
        alignment: 0,
    };
    // SAFETY: the kernel writes the request, whose size it is told, and at most `count` pairs of 64-bit words to `ranges`,
    // which has room for them and is not otherwise used during the call.
    if unsafe { ioctl_with_mut_ref(&**iommufd.iommufd(), IOVA_RANGES, &mut request) } < 0 {
        return Err(io::Error::last_os_error());
    }
    let count = (request.count as usize).min(MAX_RANGES);
    Ok(ranges.iter().take(count).map(|&[first, last]| (first, last)).collect())
}
