//! Guest memory: the checked table of regions, pieces of it, and the one function that copies.

use std::fs::File;
use std::ptr;
use std::sync::{Arc, Once};

use vm_memory::{
    Address, GuestAddress, GuestMemoryBackend, GuestMemoryMmap, GuestMemoryRegion, MemoryRegionAddress,
};

use super::RingError;
use super::dirty::DirtyLog;
use super::pages::Pages;
use super::sigbus::Watched;

/// The bytes of a cache line, as far as prefetching is concerned.
const LINE: usize = 64;

/// Cache lines of a frame's beginning that are asked for ahead: the virtio header and the usual headers.
pub(super) const HEAD_LINES: usize = 2;

/// What keeps the memory mapped that [`Seg`]s point into.
pub trait Mapping: Send + Sync + std::fmt::Debug {}

impl Mapping for GuestRegions {}

/// A piece of memory that a guest, or the kernel's AF_XDP, shares with us.
///
/// The other side may change its bytes at any time: they are copied, once, and never referenced. A `Seg` cannot be
/// copied, nor be built but by who vouches for its memory, so that it cannot outlive the [`Burst`](super::Burst) it was
/// borrowed from, which keeps the mapping alive.
#[derive(Debug)]
pub struct Seg {
    ptr: *mut u8,
    len: u32,
}

// SAFETY: a `Seg` is an address and a length. What it points to is shared memory, only ever accessed by raw copies.
unsafe impl Send for Seg {}
// SAFETY: as above; there is nothing to race on but guest memory, which races with the guest anyway.
unsafe impl Sync for Seg {}

impl Seg {
    /// A piece of `len` bytes at `ptr`.
    ///
    /// # Safety
    /// All of it must be mapped for reading and writing, hold no Rust objects, and stay mapped for as long as the `Seg`
    /// exists: in a burst, because the burst's [`Mapping`] keeps it so. `len` is not 0.
    pub(crate) unsafe fn new(ptr: *mut u8, len: u32) -> Seg {
        debug_assert!(len > 0);
        Seg { ptr, len }
    }

    /// The length in bytes.
    #[expect(clippy::len_without_is_empty, reason = "a segment is never empty")]
    pub fn len(&self) -> u32 {
        self.len
    }

    /// Where the bytes are in our address space.
    pub(crate) fn ptr(&self) -> *mut u8 {
        self.ptr
    }

    /// The same piece without its first `skip` bytes (at most its length).
    pub(super) fn skip(&self, skip: u32) -> Seg {
        debug_assert!(skip <= self.len);
        Seg { ptr: self.ptr.wrapping_add(skip as usize), len: self.len - skip }
    }

    /// Writes two private slices one after the other, if there is room for both.
    #[inline(always)]
    pub(super) fn put_both<const N: usize>(&self, first: &[u8; N], second: &[u8]) -> bool {
        let fit = self.len as usize >= N && self.len as usize - N >= second.len();
        if fit {
            // SAFETY: both fit into the segment, all of it mapped and shared for writing; private memory overlaps no
            // mapping.
            unsafe {
                ptr::copy_nonoverlapping(first.as_ptr(), self.ptr, N);
                copy_short(second.as_ptr(), self.ptr.wrapping_add(N), second.len());
            }
        }
        fit
    }

    /// Writes two private slices one after the other, and behind them `tail` without its first `offset` bytes, if there is room.
    #[inline(always)]
    pub(super) fn put_long<const N: usize>(
        &self,
        first: &[u8; N],
        head: &[u8],
        tail: &Seg,
        offset: u32,
    ) -> bool {
        let Some(rest) = tail.len.checked_sub(offset) else { return false };
        let (begin, rest) = (N + head.len(), rest as usize);
        let fit = self.len as usize >= begin && self.len as usize - begin >= rest;
        if fit {
            // SAFETY: all fit into this segment, and `offset` is inside of `tail`; both are mapped, and private memory overlaps
            // no mapping.
            unsafe {
                ptr::copy_nonoverlapping(first.as_ptr(), self.ptr, N);
                copy_short(head.as_ptr(), self.ptr.wrapping_add(N), head.len());
                copy_shared(tail.ptr.wrapping_add(offset as usize), self.ptr.wrapping_add(begin), rest);
            }
        }
        fit
    }

    /// Asks for the lines of a frame's usual headers at its beginning, to be read. Beyond its end is not worth a branch.
    #[inline(always)]
    pub(super) fn prefetch_head(&self) {
        (0..HEAD_LINES).for_each(|i| prefetch_read(self.ptr.wrapping_add(i * LINE)));
    }

    /// As [`prefetch_head`](Self::prefetch_head), to be written.
    #[inline(always)]
    pub(super) fn prefetch_head_for_write(&self) {
        (0..HEAD_LINES).for_each(|i| prefetch_write(self.ptr.wrapping_add(i * LINE)));
    }

    /// Asks for up to `lines` cache lines of this piece, to be read.
    #[inline]
    pub(super) fn prefetch_read(&self, lines: usize) {
        prefetch_lines(self.ptr, self.len as usize, lines, prefetch_read);
    }

    /// Asks for up to `lines` cache lines of this piece, to be written.
    #[inline]
    pub(super) fn prefetch_write(&self, lines: usize) {
        prefetch_lines(self.ptr, self.len as usize, lines, prefetch_write);
    }
}

#[inline]
fn prefetch_lines(ptr: *const u8, len: usize, lines: usize, prefetch: impl Fn(*const u8)) {
    prefetch(ptr);
    for i in 1..lines.min(len.div_ceil(LINE)) {
        prefetch(ptr.wrapping_add(i * LINE));
    }
}

/// Asks for the cache line at `p`. Any address is allowed: a prefetch never faults.
#[inline]
pub(super) fn prefetch_read(p: *const u8) {
    #[cfg(target_arch = "x86_64")]
    // SAFETY: PREFETCHT0 is a hint, part of SSE, which x86_64 always has; it does not access memory architecturally.
    unsafe {
        std::arch::x86_64::_mm_prefetch::<{ std::arch::x86_64::_MM_HINT_T0 }>(p.cast());
    }
    #[cfg(not(target_arch = "x86_64"))]
    let _ = p;
}

/// Asks for the cache line at `p` with ownership. Any address is allowed.
#[inline]
pub(super) fn prefetch_write(p: *const u8) {
    #[cfg(target_arch = "x86_64")]
    // SAFETY: PREFETCHW is a hint; processors without it execute it as a no-op. It does not access memory
    // architecturally.
    unsafe {
        std::arch::asm!("prefetchw [{}]", in(reg) p, options(nostack, preserves_flags, readonly));
    }
    #[cfg(not(target_arch = "x86_64"))]
    let _ = p;
}

#[derive(Debug, Clone, Copy)]
struct Region {
    /// First guest-physical address.
    start: u64,
    /// Bytes; `start + size` does not overflow.
    size: u64,
    /// Where the region begins in our address space.
    host: *mut u8,
}

/// An immutable table of a guest's memory regions, checked once. It keeps the mapping alive.
#[derive(Debug)]
pub struct GuestRegions {
    /// Sorted by `start`, disjoint.
    regions: Vec<Region>,
    /// Of the same regions, in any order. Before the mapping, which they do not outlive.
    watched: Arc<Vec<Watched>>,
    mapping: Arc<GuestMemoryMmap<()>>,
    /// Of the same mapping.
    pages: Arc<Pages>,
    /// Where is noted what we write, if anybody wants to know.
    log: Option<Arc<DirtyLog>>,
}

// SAFETY: the pointers are only addresses of a mapping that `mapping` keeps; the table itself never changes.
unsafe impl Send for GuestRegions {}
// SAFETY: as above.
unsafe impl Sync for GuestRegions {}

impl GuestRegions {
    /// Builds the table of a guest's mapped memory. Regions that cannot be addressed are left out, which makes each
    /// access to them an invalid address.
    pub fn new(mapping: Arc<GuestMemoryMmap<()>>) -> Self {
        let mut regions: Vec<Region> = mapping
            .iter()
            .filter_map(|r| {
                let (start, size) = (r.start_addr().raw_value(), r.len());
                start.checked_add(size)?;
                let host = r.get_host_address(MemoryRegionAddress(0)).ok()?;
                Some(Region { start, size, host })
            })
            .collect();
        regions.sort_by_key(|r| r.start);
        let watch = |region: &Region| Watched::new(region.host, region.size as usize);
        let watched: Vec<Watched> = regions.iter().filter_map(watch).collect();
        if watched.len() < regions.len() {
            // Once: a front-end may bring regions as often as it likes.
            static TOLD: Once = Once::new();
            TOLD.call_once(|| {
                log::warn!("there are too many regions of guests' memory to survive the loss of all of them");
            });
        }
        let watched = Arc::new(watched);
        let pages = Arc::new(Pages::new(mapping.clone()));
        GuestRegions { regions, watched, mapping, pages, log: None }
    }

    /// The same memory, with or without a log of what is written there.
    pub fn with_log(&self, log: Option<Arc<DirtyLog>>) -> Self {
        let GuestRegions { regions, watched, mapping, pages, .. } = self;
        let (watched, mapping, pages) = (watched.clone(), mapping.clone(), pages.clone());
        GuestRegions { regions: regions.clone(), watched, mapping, pages, log }
    }

    /// Where its pages are.
    pub fn pages(&self) -> &Arc<Pages> {
        &self.pages
    }

    /// Where is noted what we write, if anybody wants to know.
    #[inline(always)]
    pub fn log(&self) -> Option<&Arc<DirtyLog>> {
        self.log.as_ref()
    }

    /// Notes that the first `len` bytes of a piece were written.
    #[inline(never)] // while a guest migrates
    pub(super) fn wrote(&self, log: &DirtyLog, seg: &Seg, len: u32) {
        let at = seg.ptr.addr();
        let region = self.regions.iter().find(|region| {
            at.checked_sub(region.host.addr()).is_some_and(|offset| (offset as u64) < region.size)
        });
        if let Some(region) = region {
            log.mark(region.start + (at - region.host.addr()) as u64, len.min(seg.len));
        }
    }

    /// Whether memory was taken away, and replaced by memory that no guest has; or its log was.
    pub fn is_lost(&self) -> bool {
        self.watched.iter().any(Watched::is_lost) || self.log.as_ref().is_some_and(|log| log.is_lost())
    }

    /// What keeps it mapped.
    #[cfg(test)]
    pub(super) fn mapping(&self) -> &Arc<GuestMemoryMmap<()>> {
        &self.mapping
    }

    /// The number of regions.
    pub fn len(&self) -> usize {
        self.regions.len()
    }

    /// Whether the guest shares no memory at all.
    pub fn is_empty(&self) -> bool {
        self.regions.is_empty()
    }

    /// The file that the memory at `gpa` is of, and where in it that is, if it is of a file.
    pub(super) fn file_at(&self, gpa: u64) -> Option<(&File, u64)> {
        let region = self.mapping.find_region(GuestAddress(gpa))?;
        let file = region.file_offset()?;
        let offset = file.start().checked_add(gpa.checked_sub(region.start_addr().raw_value())?)?;
        Some((file.file(), offset))
    }

    /// The piece `[gpa, gpa + len)`, if it lies in one region and `len > 0`.
    pub(super) fn translate(&self, gpa: u64, len: u32) -> Option<Seg> {
        self.translate_hinted(gpa, len, &mut 0)
    }

    /// As [`translate`](Self::translate); `hint` is the index of the region that was hit last.
    #[inline]
    pub(super) fn translate_hinted(&self, gpa: u64, len: u32, hint: &mut usize) -> Option<Seg> {
        let (host, left) = self.find(gpa, hint)?;
        (len > 0 && u64::from(len) <= left).then_some(Seg { ptr: host, len })
    }

    /// The host address of `len` bytes that a ring has in guest memory: in one region, and aligned in our address space as
    /// well as in the guest's, since an atomic access needs it, and a region may be mapped at any offset.
    ///
    /// # Errors
    /// [`RingError::Layout`].
    pub(super) fn ring_part(
        &self,
        part: &'static str,
        addr: u64,
        len: u32,
        align: usize,
    ) -> Result<*mut u8, RingError> {
        self.translate(addr, len)
            .map(|seg| seg.ptr())
            .filter(|p| (*p as usize).is_multiple_of(align))
            .ok_or(RingError::Layout { part, addr })
    }

    /// For many translations, most of them in the region that was hit last.
    #[inline(always)]
    pub(super) fn translator(&self, hint: usize) -> Translator<'_> {
        let none = Region { start: 0, size: 0, host: ptr::null_mut() };
        Translator { regions: self, region: self.regions.get(hint).copied().unwrap_or(none), hint }
    }

    /// Hands the pieces of `[gpa, gpa + len)` to `sink` in order; there are several when the range goes on from one
    /// region into an adjacent one.
    ///
    /// # Errors
    /// A range that is not wholly guest memory; and whatever `sink` returns.
    #[inline]
    pub(super) fn pieces(
        &self,
        gpa: u64,
        len: u32,
        hint: &mut usize,
        mut sink: impl FnMut(Seg) -> Result<(), RingError>,
    ) -> Result<(), RingError> {
        let error = RingError::Address { addr: gpa, len };
        let (mut at, mut rest) = (gpa, len);
        while rest > 0 {
            let (ptr, left) = self.find(at, hint).ok_or(error)?;
            let part = u64::from(rest).min(left) as u32;
            sink(Seg { ptr, len: part })?;
            rest -= part;
            // Cannot overflow: `at + part` is at most the end of a region.
            at += u64::from(part);
        }
        Ok(())
    }

    /// The host address of `gpa` and the bytes from there to the end of its region (at least one).
    #[inline]
    fn find(&self, gpa: u64, hint: &mut usize) -> Option<(*mut u8, u64)> {
        if let Some(r) = self.regions.get(*hint) {
            let offset = gpa.wrapping_sub(r.start);
            if offset < r.size {
                return Some((r.host.wrapping_add(offset as usize), r.size - offset));
            }
        }
        self.find_other(gpa, hint)
    }

    #[cold]
    fn find_other(&self, gpa: u64, hint: &mut usize) -> Option<(*mut u8, u64)> {
        let i = self.regions.partition_point(|r| r.start <= gpa).checked_sub(1)?;
        let r = &self.regions[i];
        let offset = gpa - r.start;
        if offset >= r.size {
            return None;
        }
        *hint = i;
        Some((r.host.wrapping_add(offset as usize), r.size - offset))
    }
}

/// [`GuestRegions::translate`] for many addresses: the region that was hit last is at hand.
pub(super) struct Translator<'a> {
    regions: &'a GuestRegions,
    region: Region,
    /// Which region that is, for the next time.
    pub(super) hint: usize,
}

impl Translator<'_> {
    /// As [`GuestRegions::translate`]; that `len` is not 0 is for the caller to know.
    #[inline(always)]
    pub(super) fn translate_some(&mut self, gpa: u64, len: u32) -> Option<Seg> {
        debug_assert!(len > 0);
        let Region { start, size, host } = self.region;
        let offset = gpa.wrapping_sub(start);
        if offset < size && u64::from(len) <= size - offset {
            return Some(Seg { ptr: host.wrapping_add(offset as usize), len });
        }
        self.translate_anew(gpa, len)
    }

    #[cold]
    fn translate_anew(&mut self, gpa: u64, len: u32) -> Option<Seg> {
        let seg = self.regions.translate_hinted(gpa, len, &mut self.hint);
        if let Some(region) = self.regions.regions.get(self.hint) {
            self.region = *region;
        }
        seg
    }
}

/// Copies `n` bytes; what headers are long takes straight code instead of a call, in two parts that may overlap.
///
/// # Safety
/// `n` bytes must be readable at `src` and writable at `dst`, and the two must not overlap.
#[inline(always)]
unsafe fn copy_short(src: *const u8, dst: *mut u8, n: usize) {
    /// The first and the last `N` bytes.
    ///
    /// # Safety
    /// As [`copy_short`]; `N <= n <= 2 * N`.
    #[inline(always)]
    unsafe fn ends<const N: usize>(src: *const u8, dst: *mut u8, n: usize) {
        // SAFETY: both ends are inside of the `n` bytes, as `N <= n`.
        unsafe {
            ptr::copy_nonoverlapping(src, dst, N);
            ptr::copy_nonoverlapping(src.add(n - N), dst.add(n - N), N);
        }
    }
    // SAFETY: the caller's promise, and the bounds of each arm.
    unsafe {
        match n {
            32..=64 => ends::<32>(src, dst, n),
            65..=128 => ends::<64>(src, dst, n),
            17..=31 => ends::<16>(src, dst, n),
            8..=16 => ends::<8>(src, dst, n),
            256 => ends::<128>(src, dst, n),
            _ => ptr::copy_nonoverlapping(src, dst, n),
        }
    }
}

/// From so many bytes on the processor's own copy is no slower than a loop, whatever cache they are in, and much faster where
/// they are in none: it writes whole lines without reading them before.
const OWN_COPY: usize = 2048;

/// Copies `n` bytes into memory that is shared. Both may be the same memory: a guest may name it as source and as destination (a
/// ring of its own, or memory that two guests share); then the guest gets some mix of the bytes.
///
/// # Safety
/// `n` bytes at `src` are readable, and at `dst` writable. Neither holds Rust objects if they overlap, so that any bytes are
/// fine, whatever a guest writes meanwhile.
#[inline(always)]
unsafe fn copy_shared(src: *const u8, dst: *mut u8, n: usize) {
    #[cfg(target_arch = "x86_64")]
    if n >= OWN_COPY && is_x86_feature_detected!("ermsb") {
        // SAFETY: the caller's promise; the direction flag is clear, as everywhere in Rust.
        unsafe {
            std::arch::asm!(
                "rep movsb",
                inout("rcx") n => _,
                inout("rsi") src => _,
                inout("rdi") dst => _,
                options(nostack, preserves_flags)
            );
        }
        return;
    }
    // SAFETY: the caller's promise.
    unsafe { ptr::copy(src, dst, n) };
}

/// Copies from `src`, leaving out its first `offset` bytes, into `dst`. Returns the number of bytes copied: all of
/// `dst`, or less when `src` ends.
#[inline(always)]
pub(super) fn gather(src: &[Seg], offset: u32, dst: &mut [u8]) -> usize {
    if let [seg] = src
        && offset == 0
        && seg.len as usize >= dst.len()
    {
        // SAFETY: as below, with one segment that has all of it.
        unsafe { copy_short(seg.ptr, dst.as_mut_ptr(), dst.len()) };
        return dst.len();
    }
    gather_pieces(src, offset, dst)
}

fn gather_pieces(src: &[Seg], offset: u32, dst: &mut [u8]) -> usize {
    let mut skip = offset as usize;
    let mut done = 0;
    for seg in src {
        let len = seg.len as usize;
        if skip >= len {
            skip -= len;
            continue;
        }
        let n = (len - skip).min(dst.len() - done);
        // SAFETY: `skip + n <= len`, and a segment is `len` bytes of mapped memory; `done + n <= dst.len()`. `dst` is
        // private, so it overlaps no mapping. The guest may write the source meanwhile: the bytes are then any mix,
        // and nothing has been derived from them before this copy.
        unsafe { ptr::copy_nonoverlapping(seg.ptr.wrapping_add(skip), dst.as_mut_ptr().add(done), n) };
        skip = 0;
        done += n;
        if done == dst.len() {
            break;
        }
    }
    done
}

/// Writes a sequence of sources into shared segments, from the first byte on: the one place where packet bytes enter
/// shared memory.
pub(crate) struct Scatter<'a> {
    dst: &'a [Seg],
    /// Bytes already written of `dst[0]`.
    used: usize,
}

impl<'a> Scatter<'a> {
    pub(crate) fn new(dst: &'a [Seg]) -> Self {
        Scatter { dst, used: 0 }
    }

    /// Appends private bytes. What does not fit is left out.
    #[inline(always)]
    pub(crate) fn put_bytes(&mut self, src: &[u8]) {
        if let Some(seg) = self.dst.first()
            && seg.len as usize - self.used > src.len()
        {
            // SAFETY: they fit into what is left of the segment, all of it mapped and shared for writing; private memory
            // overlaps no mapping.
            unsafe { copy_short(src.as_ptr(), seg.ptr.wrapping_add(self.used), src.len()) };
            self.used += src.len();
            return;
        }
        self.put(src.as_ptr(), src.len());
    }

    /// Appends `len` bytes of `src`, leaving out its first `offset`. What is not there, or does not fit, is left out.
    pub(super) fn put_segs(&mut self, src: &[Seg], offset: u32, len: u32) {
        let (mut skip, mut rest) = (offset as usize, len as usize);
        for seg in src {
            if rest == 0 {
                break;
            }
            let have = seg.len as usize;
            if skip >= have {
                skip -= have;
                continue;
            }
            let n = (have - skip).min(rest);
            self.put(seg.ptr.wrapping_add(skip), n);
            skip = 0;
            rest -= n;
        }
    }

    /// Whether every byte of the segments is written.
    pub(crate) fn is_full(&self) -> bool {
        self.dst.is_empty()
    }

    fn put(&mut self, mut src: *const u8, mut len: usize) {
        while len > 0 {
            let Some(seg) = self.dst.first() else { return };
            let n = (seg.len as usize - self.used).min(len);
            // SAFETY: the callers pass `len` readable bytes at `src`; `used + n <= seg.len`, all of it mapped and
            // shared for writing.
            unsafe { copy_shared(src, seg.ptr.wrapping_add(self.used), n) };
            src = src.wrapping_add(n);
            len -= n;
            self.used += n;
            if self.used == seg.len as usize {
                self.dst = &self.dst[1..];
                self.used = 0;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use vm_memory::GuestAddress;

    fn regions(ranges: &[(u64, usize)]) -> GuestRegions {
        let ranges: Vec<_> = ranges.iter().map(|&(a, n)| (GuestAddress(a), n)).collect();
        GuestRegions::new(Arc::new(GuestMemoryMmap::from_ranges(&ranges).unwrap()))
    }

    fn lens(r: &GuestRegions, gpa: u64, len: u32) -> Result<Vec<u32>, RingError> {
        let mut out = vec![];
        r.pieces(gpa, len, &mut 0, |s| {
            out.push(s.len());
            Ok(())
        })?;
        Ok(out)
    }

    #[test]
    fn translation_stays_in_one_region() {
        let r = regions(&[(0x1000, 0x1000), (0x2000, 0x1000), (0x8000, 0x1000)]);
        assert_eq!(r.len(), 3);
        assert!(r.translate(0x1000, 0x1000).is_some());
        assert!(r.translate(0x1000, 0x1001).is_none(), "straddles");
        assert!(r.translate(0x0fff, 1).is_none());
        assert!(r.translate(0x3000, 1).is_none());
        assert!(r.translate(0x8fff, 1).is_some());
        assert!(r.translate(0x9000, 1).is_none());
        assert!(r.translate(0x8000, 0).is_none());
        assert!(r.translate(u64::MAX, u32::MAX).is_none());
        let base = r.translate(0x1000, 1).unwrap().ptr();
        assert_eq!(r.translate(0x1234, 1).unwrap().ptr(), base.wrapping_add(0x234));
    }

    #[test]
    fn pieces_split_at_adjacent_regions_only() {
        let r = regions(&[(0x1000, 0x1000), (0x2000, 0x1000), (0x8000, 0x1000)]);
        assert_eq!(lens(&r, 0x1ff0, 0x20), Ok(vec![0x10, 0x10]));
        assert_eq!(lens(&r, 0x1800, 0x100), Ok(vec![0x100]));
        assert_eq!(lens(&r, 0x2ff0, 0x20), Err(RingError::Address { addr: 0x2ff0, len: 0x20 }));
        let high = u64::MAX - 8;
        assert_eq!(lens(&r, high, 0x20), Err(RingError::Address { addr: high, len: 0x20 }));
    }

    #[test]
    fn gather_and_scatter_cross_segments() {
        let r = regions(&[(0, 0x1000)]);
        let dst =
            [r.translate(0x10, 3).unwrap(), r.translate(0x100, 5).unwrap(), r.translate(0x200, 9).unwrap()];
        let mut w = Scatter::new(&dst);
        w.put_bytes(b"abcd");
        w.put_bytes(b"efghij");
        let mut out = [0; 10];
        assert_eq!(gather(&dst, 0, &mut out), 10);
        assert_eq!(&out, b"abcdefghij");
        // Guest to guest, from an offset that skips the first segment.
        let copy = [r.translate(0x300, 2).unwrap(), r.translate(0x400, 40).unwrap()];
        Scatter::new(&copy).put_segs(&dst, 4, 6);
        let mut out = [0; 6];
        assert_eq!(gather(&copy, 0, &mut out), 6);
        assert_eq!(&out, b"efghij");
        let mut rest = [0; 64];
        assert_eq!(gather(&dst, 12, &mut rest), 5, "the source ends");
        // More than fits is cut, not written elsewhere.
        let mut w = Scatter::new(&copy[..1]);
        w.put_bytes(b"xyz");
        let mut out = [0; 3];
        assert_eq!(gather(&copy, 0, &mut out), 3);
        assert_eq!(&out, b"xyg");
    }

    #[test]
    fn long_copies_of_any_length_and_place() {
        let r = regions(&[(0, 0x20000)]);
        let seg = |at: u64, len| r.translate(at, len).unwrap();
        let bytes: Vec<u8> = (0..0x8000u32).map(|i| (i * 7 + i / 251) as u8).collect();
        Scatter::new(&[seg(0x8000, 0x8000)]).put_bytes(&bytes);
        for len in [1, 2047, 2048, 2049, 4096, 0x5001_u32] {
            for (from, to) in [(0x8000, 0x10000), (0x8003, 0x1000d)] {
                Scatter::new(&[seg(to, len + 1)]).put_bytes(&vec![0xee; len as usize + 1]);
                Scatter::new(&[seg(to, len + 1)]).put_segs(&[seg(from, len)], 0, len);
                let mut out = vec![0; len as usize + 1];
                gather(&[seg(to, len + 1)], 0, &mut out);
                let at = from as usize - 0x8000;
                assert_eq!(out[..len as usize], bytes[at..][..len as usize], "{len} bytes");
                assert_eq!(out[len as usize], 0xee, "not one more");
            }
        }
        // A guest may name the same memory as source and destination; all that counts is what lies around it.
        Scatter::new(&[seg(0x8010, 0x4000)]).put_segs(&[seg(0x8000, 0x4000)], 0, 0x4000);
        let mut out = vec![0; 0x4030];
        gather(&[seg(0x8000, 0x4030)], 0, &mut out);
        assert_eq!(out[..16], bytes[..16]);
        assert_eq!(out[0x4010..], bytes[0x4010..0x4030]);
    }

    #[test]
    fn a_long_frame_goes_where_there_is_room_for_all_of_it() {
        let r = regions(&[(0, 0x8000)]);
        let tail = r.translate(0x1000, 3000).unwrap();
        let (head, bytes) = ([1; 256], [2; 3000]);
        Scatter::new(std::slice::from_ref(&tail)).put_bytes(&bytes);
        let whole = |room, offset| {
            let buffer = r.translate(0x4000, room).unwrap();
            let put = buffer.put_long(&[9; 12], &head, &tail, offset);
            let mut out = vec![0; room as usize];
            gather(&[buffer], 0, &mut out);
            (put, out)
        };
        assert_eq!(whole(3267, 0), (false, vec![0; 3267]), "a byte too few, and nothing is written");
        let (put, out) = whole(3268, 0);
        assert!(put && out == [&[9; 12][..], &head, &bytes].concat());
        let (put, out) = whole(3268, 2999);
        assert!(put && out[..12] == [9; 12] && out[268] == 2);
        assert!(whole(3268, 3000).0, "a tail of nothing");
        assert!(!whole(3268, 3001).0, "a tail that begins behind its end");
    }
}
