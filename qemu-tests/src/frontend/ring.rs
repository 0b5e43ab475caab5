//! The driver's side of a virtqueue, split or packed (virtio 1.2, §2.7 and §2.8).
//!
//! Nothing that stands in guest memory is believed without a check: the device side under test may be broken.

use std::fmt;
use std::os::fd::{AsRawFd, BorrowedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicU16, AtomicU64, Ordering, fence};
use std::time::{Duration, Instant};

use virtio_bindings::virtio_ring as bindings;
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use super::{Buffer, Descriptor, Error, Features, GuestMemory, RawRing, Result};

#[cfg(target_endian = "big")]
compile_error!("ring fields are little-endian and accessed in native order");

/// `VRING_AVAIL_F_NO_INTERRUPT`.
pub(super) const NO_INTERRUPT: u16 = bindings::VRING_AVAIL_F_NO_INTERRUPT as u16;
/// `VRING_USED_F_NO_NOTIFY`.
pub(super) const NO_NOTIFY: u16 = bindings::VRING_USED_F_NO_NOTIFY as u16;
/// In a position of a packed ring, as vhost-user has it, the wrap counter; below it is the number of a descriptor.
pub(super) const WRAP: u16 = 1 << 15;
/// Flags of a packed ring's descriptor.
pub(super) const AVAIL: u16 = 1 << bindings::VRING_PACKED_DESC_F_AVAIL;
pub(super) const USED: u16 = 1 << bindings::VRING_PACKED_DESC_F_USED;
/// Flags of its event areas.
const EVENT_ENABLE: u16 = bindings::VRING_PACKED_EVENT_FLAG_ENABLE as u16;
pub(super) const EVENT_DISABLE: u16 = bindings::VRING_PACKED_EVENT_FLAG_DISABLE as u16;
const EVENT_DESC: u16 = bindings::VRING_PACKED_EVENT_FLAG_DESC as u16;

/// The flags that make a descriptor available in the lap of a position.
pub(super) fn avail_flags(position: u16) -> u16 {
    if position & WRAP != 0 { AVAIL } else { USED }
}

/// The flags that say that it is used in that lap.
pub(super) fn used_flags(position: u16) -> u16 {
    if position & WRAP != 0 { AVAIL | USED } else { 0 }
}

/// How the driver learns that the device has used buffers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Notify {
    /// By the call eventfd, armed only while waiting.
    Event,
    /// By looking; the device is told not to call.
    Poll,
}

/// What a device can do wrong on a ring.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RingFault {
    /// The used index went further than there are buffers in flight: its old and its new value.
    UsedIndex(u16, u16),
    /// A used entry names a descriptor that is not the head of a chain in flight.
    UsedId(u32),
    /// The device claims to have written more into a chain than fits, or less than a header.
    UsedLength(u32),
    /// A packed ring was stopped with buffers taken and not used: the state that the device gave.
    Base(u32),
    /// `num_buffers` is 0, or more buffers than were used together.
    NumBuffers(u16),
}

impl fmt::Display for RingFault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::UsedIndex(old, new) => write!(f, "used index went from {old} to {new}"),
            Self::UsedId(id) => write!(f, "used entry names descriptor {id}, which is not in flight"),
            Self::UsedLength(len) => write!(f, "used length {len} is impossible"),
            Self::Base(state) => write!(f, "stopped in state {state:#x}, with buffers in flight"),
            Self::NumBuffers(count) => write!(f, "num_buffers is {count}, against the buffers used"),
        }
    }
}

/// What the ring shares with the session, and both with the backend. A packed ring has descriptors only; its event areas lie
/// where a split one's other parts begin.
pub(super) struct RingShared {
    pub index: usize,
    pub size: u16,
    pub descriptors: Buffer,
    pub avail: Buffer,
    pub used: Buffer,
    pub kick: EventFd,
    pub call: EventFd,
}

impl RingShared {
    /// The index up to which the device has used buffers, as the device left it.
    pub fn used_index(&self) -> u16 {
        self.used_index_cell().load(Ordering::Acquire)
    }

    fn used_index_cell(&self) -> &AtomicU16 {
        cell(&self.used, 2)
    }

    /// Length, id and flags of a descriptor of a packed ring, as one word.
    pub fn packed_word(&self, slot: usize) -> &AtomicU64 {
        assert!(slot < usize::from(self.size), "no descriptor of the ring");
        // SAFETY: the descriptor is in the page-aligned buffer, as just checked, and the reference lives no longer than that.
        unsafe { AtomicU64::from_ptr(self.descriptors.as_ptr().add(slot * Descriptor::SIZE + 8).cast()) }
    }

    /// The position of a packed ring `places` after another; no more than its size.
    pub fn after(&self, position: u16, places: u16) -> u16 {
        let to = u32::from(position & !WRAP) + u32::from(places);
        match to.checked_sub(self.size.into()) {
            None => position + places,
            Some(over) => (position & WRAP ^ WRAP) | over as u16,
        }
    }

    /// Places of a packed ring between two positions.
    fn places(&self, from: u16, to: u16) -> u32 {
        let linear = |p: u16| u32::from(p & !WRAP) + if p & WRAP != 0 { 0 } else { u32::from(self.size) };
        (linear(to) + 2 * u32::from(self.size) - linear(from)) % (2 * u32::from(self.size))
    }
}

/// The aligned 16-bit word at offset `at` of guest memory, which both sides access atomically.
pub(super) fn cell(buffer: &Buffer, at: usize) -> &AtomicU16 {
    let address = buffer.as_ptr() as usize + at;
    assert!(address.is_multiple_of(2) && at + 2 <= buffer.len(), "no aligned word of the ring");
    // SAFETY: an aligned word within the buffer, as just checked, and the reference lives no longer than the buffer.
    // Both sides access the words of rings by atomic loads and stores.
    unsafe { AtomicU16::from_ptr(buffer.as_ptr().add(at).cast()) }
}

/// A ring and the driver's own books about it. Indices are positions if it is packed.
pub struct Ring {
    shared: Arc<RingShared>,
    memory: GuestMemory,
    packed: bool,
    /// Of a packed ring: the flags of the first descriptor that is posted and not published.
    held: u16,
    event_idx: bool,
    notify: Notify,
    /// Free descriptors, a stack.
    free: Vec<u16>,
    /// Per descriptor: the next of its chain.
    next: Vec<u16>,
    /// Per descriptor: the length of the chain that it heads, 0 if it heads none.
    chain: Vec<u16>,
    in_flight: u16,
    next_avail: u16,
    published: u16,
    last_used: u16,
    /// What `used_event` was last set to.
    used_event: u16,
    kicks: u64,
}

impl Ring {
    pub(super) fn new(memory: &GuestMemory, index: usize, size: u16) -> Result<Self> {
        let eventfd = || EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC).map_err(Error::io("create an eventfd"));
        let entries = usize::from(size);
        let shared = RingShared {
            index,
            size,
            descriptors: memory.alloc(entries * Descriptor::SIZE, 4096)?,
            avail: memory.alloc(6 + 2 * entries, 64)?,
            used: memory.alloc(6 + 8 * entries, 64)?,
            kick: eventfd()?,
            call: eventfd()?,
        };
        let mut ring = Self {
            shared: Arc::new(shared),
            memory: memory.clone(),
            packed: false,
            held: 0,
            event_idx: false,
            notify: Notify::Event,
            free: Vec::with_capacity(entries),
            next: vec![0; entries],
            chain: vec![0; entries],
            in_flight: 0,
            next_avail: 0,
            published: 0,
            last_used: 0,
            used_event: 0,
            kicks: 0,
        };
        ring.reset(Features::default(), Notify::Event, 0);
        Ok(ring)
    }

    /// Empties the ring as a driver does that takes the device over, with all indices at `first`. Gives what the backend is to
    /// be told of where it begins.
    pub(super) fn reset(&mut self, features: Features, notify: Notify, first: u16) -> u16 {
        self.packed = features.contains(Features::RING_PACKED);
        let first = if self.packed { WRAP | (first % self.shared.size) } else { first };
        self.event_idx = features.contains(Features::EVENT_IDX);
        self.notify = notify;
        self.free.clear();
        // Taken from the end: the first posted chain gets descriptor 0.
        self.free.extend((0..self.shared.size).rev());
        self.chain.fill(0);
        self.in_flight = 0;
        (self.next_avail, self.published, self.last_used) = (first, first, first);
        for part in [&self.shared.descriptors, &self.shared.avail, &self.shared.used] {
            part.fill(0);
        }
        if self.packed {
            // As if those before had been used.
            for slot in 0..usize::from(first & !WRAP) {
                self.shared.packed_word(slot).store(u64::from(used_flags(first)) << 48, Ordering::Relaxed);
            }
            self.avail_word(2).store(EVENT_DISABLE, Ordering::Relaxed);
            while self.shared.call.read().is_ok() {}
            fence(Ordering::SeqCst);
            return first;
        }
        self.avail_word(2).store(first, Ordering::Relaxed);
        self.shared.used_index_cell().store(first, Ordering::Relaxed);
        let polling = notify == Notify::Poll;
        self.avail_word(0).store(if polling { NO_INTERRUPT } else { 0 }, Ordering::Relaxed);
        // "After the entry before the first one" comes round only after 65535 entries: do not call.
        self.set_used_event(first.wrapping_sub(1));
        while self.shared.call.read().is_ok() {}
        fence(Ordering::SeqCst);
        first
    }

    pub(super) fn shared(&self) -> &Arc<RingShared> {
        &self.shared
    }

    /// Index of the vring: 2 × queue pair, plus one for transmit.
    pub fn index(&self) -> usize {
        self.shared.index
    }

    /// Number of descriptors.
    pub fn size(&self) -> u16 {
        self.shared.size
    }

    /// Whether it is packed.
    pub fn is_packed(&self) -> bool {
        self.packed
    }

    /// Descriptors that are free to be posted.
    pub fn free(&self) -> usize {
        self.free.len()
    }

    /// Chains posted and not yet taken back.
    pub fn in_flight(&self) -> usize {
        usize::from(self.in_flight)
    }

    /// How often the device was kicked, suppressed kicks not counted.
    pub fn kicks(&self) -> u64 {
        self.kicks
    }

    /// The eventfd by which the device calls us, for use in a poll set; [`Self::arm`] first.
    pub fn call_fd(&self) -> BorrowedFd<'_> {
        // SAFETY: the eventfd is open for as long as `self` is borrowed.
        unsafe { BorrowedFd::borrow_raw(self.shared.call.as_raw_fd()) }
    }

    /// Drains the call eventfd and says how many calls came since it was last drained.
    pub fn calls(&self) -> u64 {
        self.shared.call.read().unwrap_or(0)
    }

    /// Guest memory of this ring.
    pub fn memory(&self) -> &GuestMemory {
        &self.memory
    }

    /// The ring bare, for playing a driver that does not keep the rules.
    pub fn raw(&mut self) -> RawRing<'_> {
        RawRing::new(&self.shared)
    }

    /// Kicks the device whether it wants it or not.
    ///
    /// # Errors
    /// If the eventfd cannot be written.
    pub fn kick(&mut self) -> Result<()> {
        self.kicks += 1;
        self.shared.kick.write(1).map_err(Error::io("kick the device"))
    }

    /// Puts a chain into the ring, to be shown to the device by the next [`Self::publish`]. Returns its head, or nothing
    /// if descriptors are short.
    pub(super) fn post(&mut self, descriptors: &[Descriptor]) -> Option<u16> {
        if descriptors.is_empty() || self.free.len() < descriptors.len() {
            return None;
        }
        if self.packed {
            return self.post_packed(descriptors);
        }
        let head = self.free.pop()?;
        let mut id = head;
        let last = descriptors.len() - 1;
        for (index, &descriptor) in descriptors.iter().enumerate() {
            let next = if index == last { 0 } else { self.free.pop()? };
            self.next[usize::from(id)] = next;
            self.write_descriptor(id, Descriptor { next, ..descriptor });
            id = next;
        }
        self.chain[usize::from(head)] = descriptors.len() as u16;
        self.in_flight += 1;
        let slot = self.next_avail & (self.shared.size - 1);
        self.avail_word(4 + 2 * usize::from(slot)).store(head, Ordering::Relaxed);
        self.next_avail = self.next_avail.wrapping_add(1);
        Some(head)
    }

    /// The same in a packed ring. Of what is not published, the first descriptor's flags are held back, and the device looks at
    /// nothing behind it.
    fn post_packed(&mut self, descriptors: &[Descriptor]) -> Option<u16> {
        let places = descriptors.len() as u16;
        // One id of as many as there are descriptors, so that as many are free as there are places.
        let head = self.free.pop()?;
        let mut id = head;
        for _ in 1..places {
            let next = self.free.pop()?;
            self.next[usize::from(id)] = next;
            id = next;
        }
        for (i, &Descriptor { addr, len, flags, .. }) in (0..places).zip(descriptors).rev() {
            let at = self.shared.after(self.next_avail, i);
            let slot = usize::from(at & !WRAP);
            let flags = flags | avail_flags(at);
            self.shared.descriptors.write(slot * Descriptor::SIZE, &addr.to_le_bytes());
            let mut word = u64::from(len) | u64::from(head) << 32;
            let cell = self.shared.packed_word(slot);
            if i == 0 && self.published == self.next_avail {
                self.held = flags;
                word |= cell.load(Ordering::Relaxed) >> 48 << 48;
            } else {
                word |= u64::from(flags) << 48;
            }
            cell.store(word, Ordering::Release);
        }
        self.chain[usize::from(head)] = places;
        self.in_flight += 1;
        self.next_avail = self.shared.after(self.next_avail, places);
        Some(head)
    }

    fn publish_packed(&mut self) -> Result<()> {
        let (old, new) = (self.published, self.next_avail);
        cell(&self.shared.descriptors, usize::from(old & !WRAP) * Descriptor::SIZE + 14)
            .store(self.held, Ordering::Release);
        self.published = new;
        // It must be visible before we read whether a kick is wanted.
        fence(Ordering::SeqCst);
        let event = self.used_word(0).load(Ordering::Relaxed);
        let wanted = match self.used_word(2).load(Ordering::Relaxed) & 3 {
            EVENT_DISABLE => false,
            // A whole ring goes from a position to the same in the next lap.
            EVENT_DESC if self.event_idx => self.shared.places(old, event) < self.shared.places(old, new),
            _ => true,
        };
        if wanted { self.kick() } else { Ok(()) }
    }

    /// Shows everything posted to the device with one store of the index, and kicks it if it asked for that.
    pub(super) fn publish(&mut self) -> Result<()> {
        let (old, new) = (self.published, self.next_avail);
        if old == new {
            return Ok(());
        }
        if self.packed {
            return self.publish_packed();
        }
        self.avail_word(2).store(new, Ordering::Release);
        self.published = new;
        // The index must be visible before we read whether a kick is wanted (virtio 1.2, §2.7.13.4).
        fence(Ordering::SeqCst);
        let wanted = if self.event_idx {
            let avail_event = self.used_word(4 + 8 * usize::from(self.shared.size)).load(Ordering::Relaxed);
            passes(avail_event, old, new)
        } else {
            self.used_word(0).load(Ordering::Relaxed) & NO_NOTIFY == 0
        };
        if wanted { self.kick() } else { Ok(()) }
    }

    /// How many used entries the device has published that were not taken yet.
    pub(super) fn used_pending(&mut self) -> Result<u16> {
        if self.packed {
            let (mut at, mut pending) = (self.last_used, 0);
            while pending < self.in_flight
                && let Some(word) = self.used_at(at)
            {
                pending += 1;
                // One that names none is a fault when it is taken.
                let places = self.chain.get(usize::from((word >> 32) as u16)).copied().unwrap_or_default();
                if places == 0 {
                    break;
                }
                at = self.shared.after(at, places);
            }
            return Ok(pending);
        }
        let index = self.shared.used_index();
        let pending = index.wrapping_sub(self.last_used);
        if pending > self.in_flight {
            return Err(self.fault(RingFault::UsedIndex(self.last_used, index)));
        }
        Ok(pending)
    }

    /// Takes the next of the used entries that [`Self::used_pending`] counted: head and length of a chain whose
    /// descriptors are free again.
    pub(super) fn take_used(&mut self) -> Result<(u16, u32)> {
        if self.packed {
            let word = self.used_at(self.last_used).unwrap_or_default();
            let (id, len) = ((word >> 32) as u16, word as u32);
            let places = self.release(id.into())?;
            self.last_used = self.shared.after(self.last_used, places);
            return Ok((id, len));
        }
        let slot = usize::from(self.last_used & (self.shared.size - 1));
        // SAFETY: slot < size, so the 8 bytes lie in the used ring, 4-aligned. The device may write at any time, so
        // they are read once, by volatile access, and checked below.
        let (id, len) = unsafe {
            let entry = self.shared.used.as_ptr().add(4 + 8 * slot).cast::<u32>();
            (entry.read_volatile(), entry.add(1).read_volatile())
        };
        self.release(id)?;
        self.last_used = self.last_used.wrapping_add(1);
        if self.notify == Notify::Poll && self.last_used.wrapping_sub(self.used_event) > 0x4000 {
            // Keep the index at which the device would call us far away.
            self.set_used_event(self.last_used.wrapping_sub(1));
        }
        Ok((id as u16, len))
    }

    /// What the device wrote into the descriptor at a position of a packed ring, if it is used.
    fn used_at(&self, position: u16) -> Option<u64> {
        let word = self.shared.packed_word(usize::from(position & !WRAP)).load(Ordering::Acquire);
        ((word >> 48) as u16 & (AVAIL | USED) == used_flags(position)).then_some(word)
    }

    /// The chain that `id` names, as the device says, is free again. Gives its length.
    fn release(&mut self, id: u32) -> Result<u16> {
        let head = match u16::try_from(id) {
            Ok(head) if self.chain.get(usize::from(head)).is_some_and(|&length| length > 0) => head,
            _ => return Err(self.fault(RingFault::UsedId(id))),
        };
        let mut id = head;
        for _ in 0..self.chain[usize::from(head)] {
            self.free.push(id);
            id = self.next[usize::from(id)];
        }
        self.in_flight -= 1;
        Ok(std::mem::take(&mut self.chain[usize::from(head)]))
    }

    /// Whether the device has used something.
    pub fn has_used(&self) -> bool {
        if self.packed {
            return self.in_flight > 0 && self.used_at(self.last_used).is_some();
        }
        self.shared.used_index() != self.last_used
    }

    /// Asks the device to call when it next uses a buffer. Look at [`Self::has_used`] afterwards: what was used just
    /// before brings no call.
    pub fn arm(&mut self) {
        if self.packed {
            self.avail_word(0).store(self.last_used, Ordering::Relaxed);
            let flags = if self.event_idx { EVENT_DESC } else { EVENT_ENABLE };
            self.avail_word(2).store(flags, Ordering::Release);
            fence(Ordering::SeqCst);
            return;
        }
        self.avail_word(0).store(0, Ordering::Relaxed);
        self.set_used_event(self.last_used);
        fence(Ordering::SeqCst);
    }

    /// Waits until the device has used something, `timeout` at most: on the eventfd, or spinning under
    /// [`Notify::Poll`]. Returns whether it has.
    ///
    /// # Errors
    /// If polling the eventfd fails.
    pub fn wait(&mut self, timeout: Duration) -> Result<bool> {
        let deadline = Instant::now() + timeout;
        loop {
            if self.has_used() {
                return Ok(true);
            }
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Ok(false);
            }
            if self.notify == Notify::Poll {
                std::thread::yield_now();
                continue;
            }
            self.arm();
            if !self.has_used() {
                wait_readable(self.call_fd(), left).map_err(Error::io("wait for a call"))?;
                self.calls();
            }
        }
    }

    pub(super) fn fault(&self, fault: RingFault) -> Error {
        Error::Fault { ring: self.shared.index, fault }
    }

    fn write_descriptor(&mut self, id: u16, descriptor: Descriptor) {
        debug_assert!(id < self.shared.size);
        // SAFETY: ids come from `free`, which holds numbers below the size only, so this is an entry of the table;
        // `Descriptor` has the table's layout (repr(C), little-endian), and the table is page-aligned.
        unsafe {
            self.shared.descriptors.as_ptr().cast::<Descriptor>().add(usize::from(id)).write(descriptor);
        }
    }

    fn set_used_event(&mut self, index: u16) {
        self.used_event = index;
        self.avail_word(4 + 2 * usize::from(self.shared.size)).store(index, Ordering::Relaxed);
    }

    fn avail_word(&self, at: usize) -> &AtomicU16 {
        cell(&self.shared.avail, at)
    }

    fn used_word(&self, at: usize) -> &AtomicU16 {
        cell(&self.shared.used, at)
    }
}

/// Whether an index that went from `old` to `new` went past `event` (virtio 1.2, §2.7.7.2).
fn passes(event: u16, old: u16, new: u16) -> bool {
    new.wrapping_sub(event).wrapping_sub(1) < new.wrapping_sub(old)
}

/// Waits until `fd` is readable or hung up, `timeout` at most.
pub(super) fn wait_readable(fd: BorrowedFd<'_>, timeout: Duration) -> std::io::Result<bool> {
    let mut poll = libc::pollfd { fd: fd.as_raw_fd(), events: libc::POLLIN | libc::POLLRDHUP, revents: 0 };
    // Rounded up: a wait of 0 ms for the last microseconds would be a busy loop.
    let millis = timeout.as_nanos().div_ceil(1_000_000).min(i32::MAX as u128) as i32;
    // SAFETY: one pollfd, as the count says, which lives through the call.
    match unsafe { libc::poll(&mut poll, 1, millis) } {
        0 => Ok(false),
        count if count > 0 => Ok(true),
        _ => match std::io::Error::last_os_error() {
            interrupted if interrupted.kind() == std::io::ErrorKind::Interrupted => Ok(false),
            error => Err(error),
        },
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::frontend::RegionSpec;

    fn ring(size: u16) -> Ring {
        Ring::new(&GuestMemory::new(&[RegionSpec::mib(0, 1)], false).unwrap(), 0, size).unwrap()
    }

    fn descriptor(addr: u64) -> Descriptor {
        Descriptor { addr, len: 8, flags: 0, next: 0 }
    }

    /// Plays the device: uses `head` with `len` and publishes.
    fn use_buffer(ring: &mut Ring, head: u32, len: u32) {
        let index = ring.shared.used_index();
        let mut raw = ring.raw();
        raw.set_used_entry(index, head, len);
        raw.set_used_index(index.wrapping_add(1));
    }

    #[test]
    fn chains_are_linked_and_come_back_out_of_order() {
        let mut ring = ring(8);
        let chain = [0x10, 0x20, 0x30].map(|addr| Descriptor { flags: Descriptor::NEXT, ..descriptor(addr) });
        assert_eq!(ring.post(&chain), Some(0));
        assert_eq!(ring.post(&[descriptor(0x40)]), Some(3));
        assert_eq!(ring.post(&[descriptor(0); 5]), None, "only four are left");
        ring.publish().unwrap();
        assert_eq!((ring.kicks(), ring.free(), ring.in_flight()), (1, 4, 2));
        let raw = ring.raw();
        assert_eq!((raw.descriptor(0).next, raw.descriptor(1).next, raw.descriptor(2).addr), (1, 2, 0x30));
        assert_eq!((raw.avail_entry(0), raw.avail_entry(1), raw.avail_index()), (0, 3, 2));

        use_buffer(&mut ring, 3, 0);
        use_buffer(&mut ring, 0, 7);
        assert_eq!(ring.used_pending().unwrap(), 2);
        assert_eq!(ring.take_used().unwrap(), (3, 0));
        assert_eq!(ring.take_used().unwrap(), (0, 7));
        assert_eq!((ring.free(), ring.in_flight()), (8, 0));
    }

    #[test]
    fn impossible_used_entries_are_faults() {
        let mut ring = ring(4);
        ring.post(&[descriptor(0)]);
        ring.publish().unwrap();
        use_buffer(&mut ring, 1, 0);
        assert!(matches!(ring.take_used(), Err(Error::Fault { fault: RingFault::UsedId(1), .. })));
        ring.raw().set_used_entry(0, 4, 0);
        assert!(matches!(ring.take_used(), Err(Error::Fault { fault: RingFault::UsedId(4), .. })));
        ring.raw().set_used_entry(0, 0x1_0000, 0);
        assert!(matches!(ring.take_used(), Err(Error::Fault { fault: RingFault::UsedId(0x1_0000), .. })));
        ring.raw().set_used_index(2);
        assert!(matches!(ring.used_pending(), Err(Error::Fault { fault: RingFault::UsedIndex(0, 2), .. })));
    }

    #[test]
    fn kicks_follow_the_flag_and_the_event_index() {
        let mut ring = ring(8);
        ring.raw().set_used_flags(NO_NOTIFY);
        ring.post(&[descriptor(0)]);
        ring.publish().unwrap();
        assert_eq!(ring.kicks(), 0);

        ring.reset(Features::EVENT_IDX, Notify::Event, 65534);
        ring.raw().set_avail_event(65535);
        for (kicks, what) in [(0, "before the event"), (1, "passing the event"), (1, "after the event")] {
            ring.post(&[descriptor(0)]);
            ring.publish().unwrap();
            assert_eq!(ring.kicks(), kicks, "{what}");
        }
    }

    #[test]
    fn the_device_is_armed_only_while_waiting() {
        let mut ring = ring(8);
        ring.reset(Features::EVENT_IDX, Notify::Poll, 10);
        assert_eq!(ring.raw().avail_flags(), NO_INTERRUPT);
        assert_eq!(ring.raw().used_event(), 9);
        assert!(!ring.wait(Duration::from_millis(1)).unwrap());
        for round in 0..40_000_u32 {
            ring.post(&[descriptor(0)]);
            ring.publish().unwrap();
            use_buffer(&mut ring, 0, 0);
            ring.take_used().unwrap();
            let ahead = ring.raw().used_event().wrapping_sub(ring.last_used);
            assert!(ahead > 8, "round {round}: the device would call {ahead} entries from here");
        }
        ring.reset(Features::EVENT_IDX, Notify::Event, 0);
        assert!(!ring.wait(Duration::from_millis(1)).unwrap());
        assert_eq!((ring.raw().avail_flags(), ring.raw().used_event()), (0, 0));
        ring.shared.call.write(1).unwrap();
        ring.post(&[descriptor(0)]);
        use_buffer(&mut ring, 0, 0);
        assert!(ring.wait(Duration::ZERO).unwrap());
    }
}
