//! PCI functions through the kernel's VFIO (linux/vfio.h): by container and group, or by iommufd where the kernel has it.
//!
//! The function must be bound to `vfio-pci`, with all others of its IOMMU group. IOVAs are numbers of our own, from the
//! ranges that the kernel reports; virtual addresses would not fit below the IOMMU's 39 or 48 bits.

mod kernel;

use std::io;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};

use rustix::fd::OwnedFd;
use rustix::io::Errno;
use rustix::process::{Resource, getrlimit};
use vfio_ioctls::{VfioContainer, VfioDevice, VfioError, VfioIommufd, VfioOps, VfioRegionInfoCap};

use super::memory::Mapping;
use super::{BadAccess, Bar, DmaMemory, PciError, PciFunction, Ranges, Registers, Width, config};

/// `VFIO_PCI_CONFIG_REGION_INDEX`.
const CONFIG_REGION: u32 = 7;
/// `VFIO_PCI_MSIX_IRQ_INDEX`.
const MSIX: u32 = 2;
/// `VFIO_REGION_INFO_FLAG_MMAP`.
const CAN_MAP: u32 = 1 << 2;
const PAGE: usize = 4096;
const HUGE_PAGE: usize = 2 << 20;
/// IOVAs are taken from here on if there is room: what lies lower is full of holes on real machines.
const FIRST_IOVA: u64 = 1 << 32;
/// The last IOVA that every IOMMU reaches (39 bits).
const LAST_IOVA: u64 = (1 << 39) - 1;
/// Capability CAP_IPC_LOCK: no limit of locked memory (capabilities(7)).
const CAP_IPC_LOCK: u32 = 14;

/// By which interface of the kernel.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub enum Interface {
    /// iommufd if the kernel has it for this function, else container and group.
    #[default]
    Auto,
    /// `/dev/vfio/vfio` and `/dev/vfio/GROUP`.
    Group,
    /// `/dev/iommu` and `/dev/vfio/devices/vfioN`.
    Iommufd,
}

/// How a function is opened.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Options {
    /// By which interface.
    pub interface: Interface,
    /// DMA memory of 2 MiB pages, which must have been reserved; else of plain pages.
    pub huge_pages: bool,
}

/// A function, for this process alone.
pub struct VfioFunction {
    // Before `address_space`: a device goes before the address space that it is in.
    device: Arc<VfioDevice>,
    address_space: Arc<AddressSpace>,
    /// In sysfs.
    path: PathBuf,
    options: Options,
    interrupts: bool,
}

/// Where DMA memory is mapped.
struct AddressSpace {
    ops: Arc<dyn VfioOps>,
    state: Mutex<Iovas>,
}

struct Iovas {
    ranges: Ranges,
    /// Bytes mapped, which count as locked.
    mapped: u64,
}

impl std::fmt::Debug for VfioFunction {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "VfioFunction({})", self.path.display())
    }
}

fn failed(what: &str) -> impl FnOnce(VfioError) -> PciError {
    move |cause| PciError::transport(what, io::Error::other(cause))
}

impl VfioFunction {
    /// Opens the function at a PCI address such as `0000:01:00.0`.
    pub fn open(address: &str, options: Options) -> Result<VfioFunction, PciError> {
        let path = Path::new("/sys/bus/pci/devices").join(address);
        // The address is part of a path: it is to be one name in that directory.
        if address.contains('/') || !path.is_dir() {
            let cause = io::Error::new(io::ErrorKind::NotFound, "there is no such PCI function");
            return Err(PciError::transport(address, cause));
        }
        let by_iommufd = match options.interface {
            Interface::Auto => Path::new("/dev/iommu").exists() && path.join("vfio-dev").is_dir(),
            interface => interface == Interface::Iommufd,
        };
        let (ops, device, reported) =
            if by_iommufd { open_by_iommufd(&path)? } else { open_by_group(&path)? };
        let state = Mutex::new(Iovas { ranges: Ranges::new(usable(reported)), mapped: 0 });
        let address_space = Arc::new(AddressSpace { ops, state });
        Ok(VfioFunction { device: Arc::new(device), address_space, path, options, interrupts: false })
    }

    fn disable_interrupts(&mut self) -> Result<(), PciError> {
        if std::mem::take(&mut self.interrupts) {
            self.device.disable_msix().map_err(failed("turning MSI-X off"))?;
        }
        Ok(())
    }
}

type Opened = (Arc<dyn VfioOps>, VfioDevice, Vec<(u64, u64)>);

fn open_by_group(path: &Path) -> Result<Opened, PciError> {
    let container = VfioContainer::new(None).map_err(failed("/dev/vfio/vfio"))?;
    let container = Arc::new(container);
    let device = VfioDevice::new(path, container.clone(), false);
    let device = device.map_err(failed(
        "the VFIO group (are all functions of the IOMMU group bound to vfio-pci, and is nobody else using them?)",
    ))?;
    let info = kernel::iommu_info(&container).map_err(|cause| PciError::transport("the IOMMU", cause))?;
    Ok((container, device, reported_ranges(&info)))
}

fn open_by_iommufd(path: &Path) -> Result<Opened, PciError> {
    let iommu = iommufd_ioctls::IommuFd::new()
        .map_err(|cause| PciError::transport("/dev/iommu", io::Error::other(cause.to_string())))?;
    let iommufd = VfioIommufd::new(Arc::new(iommu), None, None).map_err(failed("an I/O address space"))?;
    let iommufd = Arc::new(iommufd);
    let device = VfioDevice::new(path, iommufd.clone(), true);
    let device =
        device.map_err(failed("the VFIO device (is it bound to vfio-pci, and is nobody else using it?)"))?;
    // Only now do the ranges know what this device can reach.
    let ranges = kernel::ioas_ranges(&iommufd).map_err(|cause| PciError::transport("the IOMMU", cause))?;
    Ok((iommufd, device, ranges))
}

/// Where an access to a region lies in the device's file; `vfio-ioctls` would log what is wrong with it, and go on.
fn place(device: &VfioDevice, region: u32, offset: u64, width: Width) -> Result<u64, PciError> {
    let (size, bytes) = (device.get_region_size(region), width as u64);
    let fits = offset.checked_add(bytes).is_some_and(|end| end <= size) && offset.is_multiple_of(bytes);
    let place = device.get_region_offset(region).checked_add(offset).filter(|_| fits);
    let bad = BadAccess { offset: offset as usize, width: bytes as usize, len: size as usize };
    Ok(place.ok_or(bad)?)
}

/// Reads from a region by a system call.
fn region_read(device: &VfioDevice, region: u32, offset: u64, width: Width) -> Result<u64, PciError> {
    let place = place(device, region, offset, width)?;
    let mut bytes = [0; 8];
    let read = rustix::io::pread(kernel::borrow(device), &mut bytes[..width as usize], place);
    whole(read, width)
        .map_err(|cause| PciError::transport(format!("reading region {region} at {offset:#x}"), cause))?;
    Ok(u64::from_le_bytes(bytes))
}

/// Writes to a region by a system call.
fn region_write(
    device: &VfioDevice,
    region: u32,
    offset: u64,
    width: Width,
    value: u64,
) -> Result<(), PciError> {
    let place = place(device, region, offset, width)?;
    let written = rustix::io::pwrite(kernel::borrow(device), &value.to_le_bytes()[..width as usize], place);
    whole(written, width)
        .map_err(|cause| PciError::transport(format!("writing region {region} at {offset:#x}"), cause))
}

/// That an access was made whole.
fn whole(result: rustix::io::Result<usize>, width: Width) -> io::Result<()> {
    match result {
        Ok(bytes) if bytes == width as usize => Ok(()),
        Ok(_) => Err(io::ErrorKind::UnexpectedEof.into()),
        Err(error) => Err(error.into()),
    }
}

/// The IOVA ranges of `struct vfio_iommu_type1_info`, first and last address of each; none if it does not say.
fn reported_ranges(info: &[u8]) -> Vec<(u64, u64)> {
    /// `VFIO_IOMMU_INFO_CAPS`.
    const HAS_CAPABILITIES: u32 = 1 << 1;
    /// `VFIO_IOMMU_TYPE1_INFO_CAP_IOVA_RANGE`.
    const IOVA_RANGE: u32 = 1;
    let word = |at: usize| Some(u32::from_ne_bytes(info.get(at..at.checked_add(4)?)?.try_into().ok()?));
    let long = |at: usize| Some(u64::from_ne_bytes(info.get(at..at.checked_add(8)?)?.try_into().ok()?));
    let flags = word(4).unwrap_or(0);
    let mut at = word(16).unwrap_or(0) as usize;
    let mut ranges = Vec::new();
    // Each capability begins with id (16 bits), version (16 bits) and the offset of the next.
    for _ in 0..64 {
        if flags & HAS_CAPABILITIES == 0 || at == 0 {
            break;
        }
        let (Some(header), Some(next)) = (word(at), word(at + 4)) else { break };
        if header & 0xffff == IOVA_RANGE {
            let count = word(at + 8).unwrap_or(0) as usize;
            let pairs = (0..count).map_while(|index| {
                let pair = at + 16 + index * 16;
                Some((long(pair)?, long(pair + 8)?))
            });
            ranges.extend(pairs);
        }
        at = next as usize;
    }
    ranges
}

/// What of the reported ranges is used: above 4 GiB and below 39 bits if there is such a part, else all but the first
/// page. An old kernel that reports nothing is taken to reach 39 bits, but for the window of interrupts.
fn usable(reported: Vec<(u64, u64)>) -> Vec<(u64, u64)> {
    let cut = |from: u64, to: u64| -> Vec<_> {
        let cut = reported.iter().map(|&(first, last)| (first.max(from), last.min(to)));
        cut.filter(|(first, last)| first < last).collect()
    };
    if reported.is_empty() {
        return vec![(FIRST_IOVA, LAST_IOVA)];
    }
    let high = cut(FIRST_IOVA, LAST_IOVA);
    if high.is_empty() { cut(PAGE as u64, LAST_IOVA) } else { high }
}

/// Checks that `asked` more bytes may be locked. `limit` is `None` if there is no limit.
fn check_locked(asked: u64, held: u64, limit: Option<u64>) -> Result<(), PciError> {
    match limit {
        Some(limit) if held.saturating_add(asked) > limit => {
            Err(PciError::LockedMemory { asked, held, limit })
        }
        _ => Ok(()),
    }
}

/// The limit of locked memory, if this process has one.
pub(crate) fn locked_limit() -> Option<u64> {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    if has_capability(&status, CAP_IPC_LOCK) {
        return None;
    }
    getrlimit(Resource::Memlock).current
}

/// Whether the text of `/proc/PID/status` has an effective capability.
fn has_capability(status: &str, capability: u32) -> bool {
    let set = status.lines().find_map(|line| line.strip_prefix("CapEff:"));
    set.and_then(|set| u64::from_str_radix(set.trim(), 16).ok()).is_some_and(|set| set >> capability & 1 == 1)
}

impl PciFunction for VfioFunction {
    fn config_read(&mut self, offset: u16, width: Width) -> Result<u32, PciError> {
        Ok(region_read(&self.device, CONFIG_REGION, offset.into(), width)? as u32)
    }

    fn config_write(&mut self, offset: u16, width: Width, value: u32) -> Result<(), PciError> {
        region_write(&self.device, CONFIG_REGION, offset.into(), width, value.into())
    }

    fn bar(&mut self, index: u8) -> Result<Bar, PciError> {
        let region = u32::from(index);
        let size = if index < 6 { self.device.get_region_size(region) } else { 0 };
        if size == 0 {
            return Err(PciError::NoBar(index));
        }
        // A mapped BAR of a function that does not answer in memory space is a bus error.
        let command = self.config_read(config::COMMAND, Width::Two)?;
        self.config_write(config::COMMAND, Width::Two, command | config::COMMAND_MEMORY)?;
        let mut areas = Vec::new();
        if self.device.get_region_flags(region) & CAN_MAP != 0 {
            let sparse =
                self.device.get_region_caps(region).into_iter().find_map(|capability| match capability {
                    VfioRegionInfoCap::SparseMmap(sparse) => Some(sparse.areas),
                    _ => None,
                });
            let wanted = match sparse {
                Some(areas) => areas.iter().map(|area| (area.offset, area.size)).collect(),
                None => vec![(0, size)],
            };
            for (offset, len) in wanted {
                let at = self.device.get_region_offset(region) + offset;
                let len = usize::try_from(len).map_err(|_| PciError::NoBar(index))?;
                let mapping = Mapping::of_file(kernel::borrow(&*self.device), at, len)
                    .map_err(|cause| PciError::transport(format!("mapping BAR {index}"), cause))?;
                areas.push((offset, mapping));
            }
        }
        Ok(Bar::new(Arc::new(Window { device: self.device.clone(), region, size, areas })))
    }

    fn dma_alloc(&mut self, len: usize) -> Result<DmaMemory, PciError> {
        let page = if self.options.huge_pages { HUGE_PAGE } else { PAGE };
        let size = len.checked_next_multiple_of(page).filter(|&size| size > 0);
        let size = size.ok_or(PciError::NoDmaSpace(len))?;
        let space = &self.address_space;
        let mut state = space.state.lock().unwrap_or_else(PoisonError::into_inner);
        check_locked(size as u64, state.mapped, locked_limit())?;
        let memory = Mapping::anonymous(size, self.options.huge_pages).map_err(|cause| {
            let kind = if self.options.huge_pages { "2 MiB pages" } else { "plain pages" };
            PciError::transport(format!("{size} bytes of DMA memory in {kind}"), cause)
        })?;
        let iova = state.ranges.allocate(size as u64, page as u64).ok_or(PciError::NoDmaSpace(len))?;
        if let Err(cause) = kernel::map(&*space.ops, iova, &memory) {
            state.ranges.release(iova);
            return Err(failed("mapping DMA memory")(cause));
        }
        state.mapped += size as u64;
        drop(state);
        let space = space.clone();
        // The address space is torn down with its last device, so memory holds the device.
        let device = self.device.clone();
        let release = Box::new(move |iova| {
            let _held = &device;
            let mut state = space.state.lock().unwrap_or_else(PoisonError::into_inner);
            // If this fails the kernel keeps the pages for the device until the address space goes, and the address is not
            // used again.
            match space.ops.vfio_dma_unmap(iova, size) {
                Ok(()) => {
                    state.ranges.release(iova);
                    state.mapped -= size as u64;
                }
                Err(cause) => log::warn!("unmapping DMA memory at {iova:#x}: {cause}"),
            }
        });
        Ok(DmaMemory::new(Arc::new(memory), 0, len, iova, release))
    }

    fn interrupts(&mut self, vectors: u16) -> Result<Vec<OwnedFd>, PciError> {
        self.disable_interrupts()?;
        let available = self.device.get_irq_info(MSIX).map_or(0, |irq| irq.count);
        if u32::from(vectors) > available {
            return Err(PciError::Interrupts { asked: vectors, available: available as u16 });
        }
        let events = (0..vectors).map(|_| kernel::event()).collect::<io::Result<Vec<_>>>();
        let events = events.map_err(|cause| PciError::transport("eventfd", cause))?;
        let (theirs, ours): (Vec<_>, Vec<_>) = events.into_iter().unzip();
        self.device.enable_msix(theirs.iter().collect()).map_err(failed("turning MSI-X on"))?;
        self.interrupts = true;
        Ok(ours)
    }

    /// The kernel takes the best method that works for the function: its own, or a reset of a bus that it is alone on.
    fn reset(&mut self) -> Result<(), PciError> {
        match kernel::reset(&*self.device) {
            Ok(()) => {}
            // What the kernel says of a function for which no method has worked when it was opened, whatever sysfs has.
            Err(cause) if Errno::from_io_error(&cause) == Some(Errno::INVAL) => {
                return Err(PciError::NoReset);
            }
            Err(cause) => return Err(PciError::transport("resetting the function", cause)),
        }
        self.disable_interrupts()?;
        self.set_bus_master(false)
    }
}

impl Drop for VfioFunction {
    fn drop(&mut self) {
        // Rings may still be given to the device: without bus mastering it cannot use them.
        let _ = self.set_bus_master(false);
        let _ = self.disable_interrupts();
    }
}

/// A BAR: mapped where the kernel allows it, by system calls elsewhere.
struct Window {
    device: Arc<VfioDevice>,
    region: u32,
    size: u64,
    /// Offset in the BAR, and memory.
    areas: Vec<(u64, Mapping)>,
}

impl std::fmt::Debug for Window {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Window({})", self.region)
    }
}

impl Window {
    /// The mapped area with this access in it, and the offset there.
    #[inline]
    fn area(&self, offset: u64, width: Width) -> Result<Option<(&Mapping, usize)>, BadAccess> {
        let bytes = width as u64;
        let bad = BadAccess { offset: offset as usize, width: bytes as usize, len: self.size as usize };
        let end = offset.checked_add(bytes).filter(|&end| end <= self.size && offset.is_multiple_of(bytes));
        let end = end.ok_or(bad)?;
        Ok(self.areas.iter().find_map(|(start, mapping)| {
            let inside = offset >= *start && end - start <= mapping.len() as u64;
            inside.then(|| (mapping, (offset - start) as usize))
        }))
    }
}

impl Registers for Window {
    fn size(&self) -> u64 {
        self.size
    }

    #[inline]
    fn read(&self, offset: u64, width: Width) -> Result<u64, PciError> {
        if let Some((mapping, at)) = self.area(offset, width)? {
            return Ok(mapping.read_register(at, width)?);
        }
        region_read(&self.device, self.region, offset, width)
    }

    #[inline]
    fn write(&self, offset: u64, width: Width, value: u64) -> Result<(), PciError> {
        match self.area(offset, width)? {
            Some((mapping, at)) => Ok(mapping.write_register(at, width, value)?),
            None => region_write(&self.device, self.region, offset, width, value),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// `struct vfio_iommu_type1_info` with a migration capability and then these ranges.
    fn info(ranges: &[(u64, u64)]) -> Vec<u8> {
        let mut info = Vec::new();
        let words = [0u32, 0b11, 0x1000, 0, 24, 0];
        info.extend(words.iter().flat_map(|word| word.to_ne_bytes()));
        info.extend([2u16, 1].iter().flat_map(|half| half.to_ne_bytes()));
        info.extend([40u32, 0, 0].iter().flat_map(|word| word.to_ne_bytes()));
        info.extend([1u16, 1].iter().flat_map(|half| half.to_ne_bytes()));
        info.extend([0u32, ranges.len() as u32, 0].iter().flat_map(|word| word.to_ne_bytes()));
        info.extend(
            ranges.iter().flat_map(|(first, last)| [first.to_ne_bytes(), last.to_ne_bytes()]).flatten(),
        );
        info
    }

    #[test]
    fn ranges_are_read_wherever_they_are() {
        let ranges = [(0, 0xfedf_ffff), (0xfef0_0000, 0x7f_ffff_ffff)];
        assert_eq!(reported_ranges(&info(&ranges)), ranges);
        assert_eq!(reported_ranges(&[]), []);
        let whole = info(&ranges);
        for len in 0..whole.len() {
            assert!(reported_ranges(&whole[..len]).len() <= 2, "cut short");
        }
        let mut round = whole;
        round[44..48].copy_from_slice(&40u32.to_ne_bytes());
        assert_eq!(reported_ranges(&round).len(), 126, "a list that bites its tail ends");
    }

    #[test]
    fn iovas_lie_high_if_they_can() {
        let ranges = vec![(0, 0xfedf_ffff), (0xfef0_0000, 0xffff_ffff_ffff)];
        assert_eq!(usable(ranges), [(1 << 32, (1 << 39) - 1)]);
        assert_eq!(usable(vec![(0, 0xfedf_ffff)]), [(4096, 0xfedf_ffff)], "an IOMMU of 32 bits");
        assert_eq!(usable(vec![]), [(1 << 32, (1 << 39) - 1)]);
    }

    #[test]
    fn locked_memory_is_checked_with_a_message_to_act_on() {
        assert!(check_locked(1 << 20, 0, None).is_ok());
        assert!(check_locked(4096, 4096, Some(8192)).is_ok());
        let error = check_locked(4096, 8192, Some(8192)).unwrap_err().to_string();
        assert!(error.contains("RLIMIT_MEMLOCK") && error.contains("8192"), "{error}");
        assert!(check_locked(u64::MAX, 1, Some(u64::MAX - 1)).is_err());
        assert!(has_capability("Name:\tx\nCapEff:\t0000000000004000\n", CAP_IPC_LOCK));
        assert!(!has_capability("CapEff:\t0000000000003fff\n", CAP_IPC_LOCK));
        assert!(!has_capability("", CAP_IPC_LOCK));
    }

    #[test]
    fn functions_that_are_not_there_are_errors() {
        for address in ["ffff:ff:1f.7", "../../../../etc", ""] {
            assert!(VfioFunction::open(address, Options::default()).is_err());
        }
    }
}
