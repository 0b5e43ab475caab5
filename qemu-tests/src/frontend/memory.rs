//! Guest memory: memfds, mapped here and handed to the backend, with an allocator on top.

use std::collections::BTreeMap;
use std::ffi::CStr;
use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, FromRawFd};
use std::ptr::{self, NonNull};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError, RwLock};

use vhost::VhostUserMemoryRegionInfo;

use super::{Error, Result};

/// Where a region of guest memory lies.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RegionSpec {
    /// Guest-physical address of its first byte.
    pub gpa: u64,
    /// Size in bytes, a multiple of the page size.
    pub len: usize,
}

impl RegionSpec {
    /// A region of `mib` MiB at guest-physical address `gpa`.
    pub fn mib(gpa: u64, mib: usize) -> Self {
        Self { gpa, len: mib << 20 }
    }
}

/// One mapped region. It stays mapped for as long as a [`Buffer`] in it lives.
pub struct Region {
    spec: RegionSpec,
    file: Arc<File>,
    file_offset: u64,
    base: NonNull<u8>,
    /// Free extents: offset to length. Neighbours are always merged.
    free: Mutex<BTreeMap<usize, usize>>,
}

// SAFETY: `base` points to a mapping that is not bound to a thread and lives until the region is dropped. Access goes
// through `Buffer`s, each of which owns a part of the region that the allocator gave to it alone; the backend, another
// process, may write there at any time from any thread whatever we do, which is why no references into it are made.
unsafe impl Send for Region {}
// SAFETY: as for Send; the allocator's state is behind a mutex.
unsafe impl Sync for Region {}

impl Region {
    fn map(spec: RegionSpec, file: Arc<File>, file_offset: u64) -> Result<Self> {
        // SAFETY: a fresh shared mapping at an address of the kernel's choice touches no existing memory; the result
        // is checked before use.
        let base = unsafe {
            libc::mmap(
                ptr::null_mut(),
                spec.len,
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_SHARED | libc::MAP_NORESERVE,
                file.as_raw_fd(),
                file_offset as libc::off_t,
            )
        };
        let base = if base == libc::MAP_FAILED { None } else { NonNull::new(base.cast()) };
        // As in a real guest, nothing lies at address 0, which some devices take for "not set".
        let unused = if spec.gpa == 0 { 4096 } else { 0 };
        let free = BTreeMap::from([(unused, spec.len - unused)]);
        let base = base.ok_or_else(|| Error::io("map guest memory")(io::Error::last_os_error()))?;
        Ok(Self { spec, file, file_offset, base, free: Mutex::new(free) })
    }

    /// Where it lies.
    pub fn spec(&self) -> RegionSpec {
        self.spec
    }

    /// The memfd behind it. Truncating it is how a test takes memory away from the backend; whoever touches the
    /// missing part afterwards, this process included, gets SIGBUS.
    pub fn file(&self) -> &File {
        &self.file
    }

    /// What the backend must know to map it. The "user address" of vhost-user is the address in this process.
    pub fn info(&self) -> VhostUserMemoryRegionInfo {
        VhostUserMemoryRegionInfo {
            guest_phys_addr: self.spec.gpa,
            memory_size: self.spec.len as u64,
            userspace_addr: self.base.as_ptr() as u64,
            mmap_offset: self.file_offset,
            mmap_handle: self.file.as_raw_fd(),
        }
    }

    fn take(&self, len: usize, align: usize) -> Option<usize> {
        let mut free = self.free.lock().unwrap_or_else(PoisonError::into_inner);
        let (start, size, at) = free.iter().find_map(|(&start, &size)| {
            let at = start.next_multiple_of(align);
            (at + len <= start + size).then_some((start, size, at))
        })?;
        free.remove(&start);
        if at > start {
            free.insert(start, at - start);
        }
        if at + len < start + size {
            free.insert(at + len, start + size - at - len);
        }
        Some(at)
    }

    fn give_back(&self, mut at: usize, mut len: usize) {
        let mut free = self.free.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some((&before, &size)) = free.range(..at).next_back()
            && before + size == at
        {
            free.remove(&before);
            (at, len) = (before, size + len);
        }
        if let Some(size) = free.remove(&(at + len)) {
            len += size;
        }
        free.insert(at, len);
    }
}

impl Drop for Region {
    fn drop(&mut self) {
        // SAFETY: `base` and `len` are those of the mapping that `map` made; buffers hold an `Arc` of the region, so
        // none is left that points into it.
        unsafe { libc::munmap(self.base.as_ptr().cast(), self.spec.len) };
    }
}

/// A piece of guest memory that the allocator gave out; dropping it gives it back.
///
/// There are no slices of it: the backend may write to it at any moment, so everything is copied in and out.
pub struct Buffer {
    region: Arc<Region>,
    offset: usize,
    len: usize,
}

impl Buffer {
    /// Guest-physical address of the first byte.
    pub fn gpa(&self) -> u64 {
        self.region.spec.gpa + self.offset as u64
    }

    /// Address of the first byte in this process, which is what vhost-user calls the user address.
    pub fn user_addr(&self) -> u64 {
        self.as_ptr() as u64
    }

    /// Size in bytes.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether it has no bytes.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    pub(super) fn as_ptr(&self) -> *mut u8 {
        // SAFETY: the allocator made sure that offset..offset + len lies in the mapping.
        unsafe { self.region.base.as_ptr().add(self.offset) }
    }

    /// Copies `bytes` to offset `at`.
    ///
    /// # Panics
    /// If they do not fit.
    pub fn write(&self, at: usize, bytes: &[u8]) {
        assert!(at.checked_add(bytes.len()).is_some_and(|end| end <= self.len), "write beyond the buffer");
        // SAFETY: the destination lies in this buffer, as just checked; `bytes` is memory of our own, so they cannot
        // overlap. The bytes of guest memory have no type and no references point to them.
        unsafe { ptr::copy_nonoverlapping(bytes.as_ptr(), self.as_ptr().add(at), bytes.len()) };
    }

    /// Fills `bytes` from offset `at`.
    ///
    /// # Panics
    /// If the buffer ends before.
    pub fn read(&self, at: usize, bytes: &mut [u8]) {
        assert!(at.checked_add(bytes.len()).is_some_and(|end| end <= self.len), "read beyond the buffer");
        // SAFETY: as in `write`, the other way round.
        unsafe { ptr::copy_nonoverlapping(self.as_ptr().add(at), bytes.as_mut_ptr(), bytes.len()) };
    }

    /// Copies `len` bytes from offset `from_at` of another buffer to offset `at`.
    ///
    /// # Panics
    /// If either buffer ends before, or both are the same.
    pub fn copy_from(&self, at: usize, from: &Buffer, from_at: usize, len: usize) {
        let inside = |at: usize, buffer: &Buffer| at.checked_add(len).is_some_and(|end| end <= buffer.len);
        assert!(inside(at, self) && inside(from_at, from) && !ptr::eq(self, from), "copy beyond the buffer");
        // SAFETY: both ranges lie in their buffers, as just checked. Buffers that are not the same do not overlap: the
        // allocator gave each its own part. The bytes have no type and no references point to them.
        unsafe { ptr::copy_nonoverlapping(from.as_ptr().add(from_at), self.as_ptr().add(at), len) };
    }

    /// Sets every byte to `value`.
    pub fn fill(&self, value: u8) {
        // SAFETY: the whole buffer and nothing else is written.
        unsafe { ptr::write_bytes(self.as_ptr(), value, self.len) };
    }
}

impl Drop for Buffer {
    fn drop(&mut self) {
        if self.len > 0 {
            self.region.give_back(self.offset, self.len);
        }
    }
}

/// The memory of one guest. Clones share it.
#[derive(Clone)]
pub struct GuestMemory {
    shared: Arc<Shared>,
}

struct Shared {
    regions: RwLock<Vec<Arc<Region>>>,
    /// Which region the next allocation tries first.
    turn: AtomicUsize,
    hugepages: bool,
}

impl GuestMemory {
    /// Maps `specs` as slices of one memfd, one after the other, as QEMU does with RAM below and above 4 GiB.
    ///
    /// # Errors
    /// If regions overlap, are not multiples of the page size, or the kernel refuses (no hugepages left).
    pub fn new(specs: &[RegionSpec], hugepages: bool) -> Result<Self> {
        if specs.is_empty() {
            return Err(Error::Config("guest memory needs at least one region".into()));
        }
        let memory = Self {
            shared: Arc::new(Shared {
                regions: RwLock::new(Vec::new()),
                turn: AtomicUsize::new(0),
                hugepages,
            }),
        };
        let file = Arc::new(memfd(specs.iter().map(|spec| spec.len as u64).sum(), hugepages)?);
        let mut offset = 0;
        for &spec in specs {
            memory.insert(spec, file.clone(), offset)?;
            offset += spec.len as u64;
        }
        Ok(memory)
    }

    /// Adds a region with a memfd of its own, as QEMU does for hotplugged memory.
    ///
    /// # Errors
    /// As for [`Self::new`].
    pub fn add(&self, spec: RegionSpec) -> Result<Arc<Region>> {
        let file = Arc::new(memfd(spec.len as u64, self.shared.hugepages)?);
        self.insert(spec, file, 0)
    }

    fn insert(&self, spec: RegionSpec, file: Arc<File>, offset: u64) -> Result<Arc<Region>> {
        let page = if self.shared.hugepages { 2 << 20 } else { 4096 };
        let end = spec.gpa.checked_add(spec.len as u64);
        if spec.len == 0 || !spec.len.is_multiple_of(page) || !spec.gpa.is_multiple_of(4096) || end.is_none()
        {
            return Err(Error::Config(format!("{spec:x?} is not made of pages of {page} bytes")));
        }
        let mut regions = self.shared.regions.write().unwrap_or_else(PoisonError::into_inner);
        let clashes = |old: &Arc<Region>| {
            spec.gpa < old.spec.gpa + old.spec.len as u64 && old.spec.gpa < spec.gpa + spec.len as u64
        };
        if let Some(old) = regions.iter().find(|old| clashes(old)) {
            return Err(Error::Config(format!("{spec:x?} overlaps {:x?}", old.spec)));
        }
        let region = Arc::new(Region::map(spec, file, offset)?);
        // In order of address, as QEMU lists them; some backends insist on it.
        let position = regions.partition_point(|old| old.spec.gpa < spec.gpa);
        regions.insert(position, region.clone());
        Ok(region)
    }

    /// Takes the region at `gpa` out of the guest's memory. Buffers in it stay valid here, not for the backend.
    ///
    /// # Errors
    /// If there is none.
    pub fn remove(&self, gpa: u64) -> Result<Arc<Region>> {
        let mut regions = self.shared.regions.write().unwrap_or_else(PoisonError::into_inner);
        match regions.iter().position(|region| region.spec.gpa == gpa) {
            Some(index) => Ok(regions.remove(index)),
            None => Err(Error::Config(format!("no memory region at {gpa:#x}"))),
        }
    }

    /// The regions of the moment.
    pub fn regions(&self) -> Vec<Arc<Region>> {
        self.shared.regions.read().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Allocates `len` bytes. Successive allocations go round the regions, so that what belongs together (rings,
    /// pieces of a frame) is spread over the guest's memory.
    ///
    /// # Errors
    /// If no region has room.
    pub fn alloc(&self, len: usize, align: usize) -> Result<Buffer> {
        let regions = self.shared.regions.read().unwrap_or_else(PoisonError::into_inner);
        let first = self.shared.turn.fetch_add(1, Ordering::Relaxed);
        for step in 0..regions.len() {
            let region = &regions[(first.wrapping_add(step)) % regions.len()];
            if let Some(offset) = region.take(len, align) {
                return Ok(Buffer { region: region.clone(), offset, len });
            }
        }
        Err(Error::OutOfMemory(len))
    }

    /// Allocates from the region at `gpa` only.
    ///
    /// # Errors
    /// If there is no such region, or it has no room.
    pub fn alloc_at(&self, gpa: u64, len: usize, align: usize) -> Result<Buffer> {
        let regions = self.shared.regions.read().unwrap_or_else(PoisonError::into_inner);
        let region = regions.iter().find(|region| region.spec.gpa == gpa).ok_or(Error::OutOfMemory(len))?;
        let offset = region.take(len, align).ok_or(Error::OutOfMemory(len))?;
        Ok(Buffer { region: region.clone(), offset, len })
    }
}

pub(super) fn memfd(len: u64, hugepages: bool) -> Result<File> {
    const NAME: &CStr = c"guest-ram";
    let flags = libc::MFD_CLOEXEC | if hugepages { libc::MFD_HUGETLB } else { 0 };
    // SAFETY: the name is a NUL-terminated string that outlives the call.
    let fd = unsafe { libc::memfd_create(NAME.as_ptr(), flags) };
    if fd < 0 {
        return Err(Error::io("create guest memory")(io::Error::last_os_error()));
    }
    // SAFETY: the descriptor is fresh and owned by nobody else.
    let file = unsafe { File::from_raw_fd(fd) };
    file.set_len(len).map_err(Error::io("size guest memory"))?;
    Ok(file)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn allocations_are_disjoint_aligned_and_come_back() {
        let memory = GuestMemory::new(&[RegionSpec::mib(1 << 20, 1)], false).unwrap();
        let buffers: Vec<Buffer> = (1..200).map(|len| memory.alloc(len, 1 << (len % 7)).unwrap()).collect();
        for (index, buffer) in buffers.iter().enumerate() {
            assert_eq!(buffer.gpa() % (1 << ((index + 1) % 7)), 0);
            buffer.fill(index as u8);
        }
        for (index, buffer) in buffers.iter().enumerate() {
            let mut bytes = vec![0; buffer.len()];
            buffer.read(0, &mut bytes);
            assert!(bytes.iter().all(|&byte| byte == index as u8), "buffer {index} was overwritten");
        }
        assert!(memory.alloc(1 << 20, 1).is_err());
        drop(buffers);
        assert_eq!(memory.alloc(1 << 20, 4096).unwrap().gpa(), 1 << 20, "all extents merged again");
    }

    #[test]
    fn regions_are_used_in_turn_and_checked_for_overlap() {
        let specs = [RegionSpec::mib(0, 1), RegionSpec::mib(1 << 32, 1)];
        let memory = GuestMemory::new(&specs, false).unwrap();
        let (a, b) = (memory.alloc(64, 64).unwrap(), memory.alloc(64, 64).unwrap());
        assert_ne!(a.gpa() >> 32, b.gpa() >> 32);
        assert!(matches!(memory.add(RegionSpec::mib((1 << 32) + 4096, 1)), Err(Error::Config(_))));
        assert!(matches!(memory.add(RegionSpec { gpa: 1 << 33, len: 100 }), Err(Error::Config(_))));

        let added = memory.add(RegionSpec::mib(1 << 33, 1)).unwrap();
        assert_eq!(added.info().mmap_offset, 0);
        assert_eq!(memory.regions()[1].info().mmap_offset, 1 << 20, "the first ones share a memfd");
        let kept = memory.alloc_at(1 << 33, 8, 8).unwrap();
        memory.remove(1 << 33).unwrap();
        kept.write(0, &[1; 8]);
        assert!(memory.alloc_at(1 << 33, 8, 8).is_err());
    }

    #[test]
    fn bytes_go_from_one_guest_to_another() {
        let [a, b] = [0, 1]
            .map(|_| GuestMemory::new(&[RegionSpec::mib(0, 1)], false).unwrap().alloc(100, 64).unwrap());
        a.write(10, &[1, 2, 3, 4]);
        b.fill(9);
        b.copy_from(96, &a, 11, 3);
        let mut end = [0; 5];
        b.read(95, &mut end);
        assert_eq!(end, [9, 2, 3, 4, 9]);
        for (at, from_at, len) in [(98, 0, 3), (0, 98, 3), (usize::MAX, 0, 1), (0, 0, usize::MAX)] {
            let copy = std::panic::AssertUnwindSafe(|| b.copy_from(at, &a, from_at, len));
            assert!(std::panic::catch_unwind(copy).is_err(), "{len} bytes from {from_at} to {at}");
        }
    }

    #[test]
    #[should_panic(expected = "beyond the buffer")]
    fn a_buffer_has_an_end() {
        let memory = GuestMemory::new(&[RegionSpec::mib(0, 1)], false).unwrap();
        memory.alloc(8, 8).unwrap().write(1, &[0; 8]);
    }
}
