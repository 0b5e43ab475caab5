//! Flow entries as a worker holds them, by index.
//!
//! Control prepares each entry, which all workers share; indices and generations are the same in all workers, so a
//! [`FlowRef`] names a flow everywhere. The slab has room for as many as there may ever be, in memory that is used only as
//! far as indices go, which are dense: entries never move and the worker allocates nothing.
//!
//! What the frequent packet needs of its flow, and what is counted of it, is one cache line, its [`Slot`], which control reads
//! too: through [`FlowCounters`].

use crate::chain::Onward;
use crate::compile::{Plan, PuntReason, Ttl};
use crate::edit::LinkPatch;
use crate::exec::segment_len;
use crate::flow::FlowRef;
use crate::hash::{Hasher, Zeroed, prefetch_read, prefetch_write};
use crate::packet::{Packet, PortId};
use std::ops::{Deref, Range};
use std::sync::Arc;
use std::sync::atomic::Ordering::{Acquire, Relaxed, Release};
use std::sync::atomic::{AtomicBool, AtomicU16, AtomicU32, AtomicU64, fence};

/// What becomes of a flow's packets.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Disposition {
    /// They are forwarded here.
    Fast(Arc<Plan>),
    /// They go to the host path, because of what cannot be executed here.
    Punt(Arc<PuntReason>),
}

/// Words that lie with the flow. A 5-tuple of IPv4 has five, of IPv6 eight.
const FEW: usize = 8;

/// The words of a flow's key that its mask looks at, in order. Few lie with the flow, so that they come with its lines.
#[derive(Clone, Debug)]
pub enum Values {
    /// So many of these.
    Few(u8, [u64; FEW]),
    /// More.
    Many(Box<[u64]>),
}

impl Default for Values {
    fn default() -> Values {
        Values::Few(0, [0; FEW])
    }
}

impl Deref for Values {
    type Target = [u64];

    #[inline]
    fn deref(&self) -> &[u64] {
        match self {
            Values::Few(n, words) => &words[..usize::from(*n).min(FEW)],
            Values::Many(words) => words,
        }
    }
}

impl FromIterator<u64> for Values {
    fn from_iter<I: IntoIterator<Item = u64>>(words: I) -> Values {
        let mut words = words.into_iter();
        let (mut few, mut n) = ([0; FEW], 0);
        while let Some(word) = words.next() {
            if n == FEW {
                return Values::Many(few.into_iter().chain([word]).chain(words).collect());
            }
            few[n] = word;
            n += 1;
        }
        Values::Few(n as u8, few)
    }
}

/// A flow as the workers hold it, all of them the same one: once made it does not change. What is needed to put it into a
/// worker's tables comes first, what its packets need, if that is more than their [`Slot`] says, last.
#[derive(Debug)]
#[repr(C)]
pub struct FlowEntry {
    brief: Brief,
    /// The values matched: of each word that the mask looks at, in order.
    pub values: Values,
    /// Its name.
    pub flow: FlowRef,
    /// What is done.
    pub disposition: Disposition,
    /// Where its packets go on, if that can be remembered.
    pub onward: Option<Onward>,
}

// With the counts of an `Arc` and what the allocator adds, two and a half lines.
const _: () = assert!(size_of::<FlowEntry>() == 128);

impl FlowEntry {
    /// The flow of that name and of these values.
    pub fn new(flow: FlowRef, values: Values, disposition: Disposition) -> FlowEntry {
        let onward = match &disposition {
            Disposition::Fast(plan) => Onward::of(plan),
            Disposition::Punt(_) => None,
        };
        FlowEntry { brief: Brief::of(&disposition), values, flow, disposition, onward }
    }

    /// Asks for what is read of it when it is put into tables, unless its key is a long one.
    #[inline]
    pub(crate) fn prefetch(&self) {
        let start: *const u8 = (&raw const *self).cast();
        prefetch_read(start);
        prefetch_read(start.wrapping_add(64));
    }
}

/// What a [`Slot`] says of its flow. Control makes it of the plan, so that a worker need not look at that.
#[derive(Clone, Copy, Debug, Default)]
struct Brief {
    way: u32,
    macs_end: u32,
    macs: u64,
    to: u64,
}

impl Brief {
    fn of(disposition: &Disposition) -> Brief {
        let mut brief = Brief::default();
        let Disposition::Fast(plan) = disposition else { return brief };
        if let (Some(_), &[to]) = (plan.tunnel(), plan.outputs()) {
            brief.way = Way::STRAIGHT | Way::TUNNEL;
            brief.macs = plan.certain_up_to().into();
            brief.set_to(to);
        }
        if !plan.is_certain() {
            return brief;
        }
        brief.way |= Way::STRAIGHT;
        let mut to = plan.sole_output();
        if let Some(rewrite) = plan.rewrite().filter(|rewrite| !rewrite.more && to.is_none())
            && let Some((dst, src, macs)) = rewrite.link.as_whole()
        {
            to = Some(rewrite.to);
            brief.way |= Way::REWRITE;
            brief.way |= if dst { Way::DST } else { 0 } | if src { Way::SRC } else { 0 };
            brief.way |= match rewrite.ttl {
                Ttl::Keep => 0,
                Ttl::Decrement => Way::DECREMENT,
                Ttl::Set4(ttl) => Way::SET_4 | u32::from(ttl) << Way::TTL_SHIFT,
                Ttl::Set6(ttl) => Way::SET_6 | u32::from(ttl) << Way::TTL_SHIFT,
            };
            (brief.macs, brief.macs_end) = macs;
        }
        if let Some(to) = to {
            brief.way |= Way::SHORT;
            brief.set_to(to);
        }
        brief
    }

    fn set_to(&mut self, PortId { slot, generation }: PortId) {
        self.to = slot as u64 | (generation as u64) << 32;
    }
}

/// How much of a flow has to be looked at: bits, all 0 in memory that was never touched.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct Way(u32);

impl Way {
    /// Its plan is all that there is to do.
    const STRAIGHT: u32 = 1;
    /// So it is, and it is one output, after no more than a rewrite of MAC addresses and TTL.
    const SHORT: u32 = 2;
    /// There is such a rewrite, of these.
    const REWRITE: u32 = 4;
    const DST: u32 = 8;
    const SRC: u32 = 16;
    /// The TTL is decremented, or set: that of IPv4, or IPv6, to the value above.
    const DECREMENT: u32 = 32;
    const SET_4: u32 = 64;
    const SET_6: u32 = 128;
    /// Its plan lays a header around the packet and sends it to one port, if it is not too long.
    const TUNNEL: u32 = 256;
    const TTL_SHIFT: u32 = 24;

    /// Packets may go on at a further stage, or to the host.
    #[inline(always)]
    pub(crate) fn is_long(self) -> bool {
        self.0 == 0
    }

    /// There is one output, after no more than a rewrite.
    #[inline(always)]
    pub(crate) fn is_short(self) -> bool {
        self.0 & Way::SHORT != 0
    }

    /// A header is laid around the packet, which goes to one port.
    #[inline(always)]
    pub(crate) fn is_tunnel(self) -> bool {
        self.0 & Way::TUNNEL != 0
    }

    /// There is a rewrite before that.
    #[inline(always)]
    pub(crate) fn is_rewrite(self) -> bool {
        self.0 & Way::REWRITE != 0
    }
}

/// One cache line: what the frequent packet needs of its flow, and its statistics. Written by the worker that owns it alone, but
/// for the wish for a keep-alive; read by control at any time. So its fields are atomic, which costs nothing if one reads and
/// writes them no stricter than plain ones.
#[derive(Debug, Default)]
#[repr(C, align(64))]
pub struct Slot {
    generation: AtomicU32,
    way: AtomicU32,
    /// The port of the one output: slot, and above it generation.
    to: AtomicU64,
    /// The MAC addresses of the rewrite, as they lie in the frame; of a way into a tunnel, how long packets may be.
    macs: AtomicU64,
    macs_end: AtomicU32,
    tcp_flags: AtomicU16,
    due: AtomicBool,
    packets: AtomicU64,
    bytes: AtomicU64,
    last_used: AtomicU64,
    punted: AtomicU64,
}

const _: () = assert!(size_of::<Slot>() == 64);

/// A reading of [`FlowCounters`].
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct FlowStats {
    /// Packets.
    pub packets: u64,
    /// Bytes of their frames.
    pub bytes: u64,
    /// Union of the TCP flags seen.
    pub tcp_flags: u16,
    /// Ticks of the last packet, 0 if there was none.
    pub last_used: u64,
    /// Of the packets: those that went to the host because the flow, or this way through it, is not executed here.
    pub punted: u64,
}

impl Slot {
    /// How much of the flow has to be looked at.
    #[inline(always)]
    pub(crate) fn way(&self) -> Way {
        Way(self.way.load(Relaxed))
    }

    /// Where its packets go, of a short way or one into a tunnel.
    #[inline(always)]
    pub(crate) fn to(&self) -> PortId {
        let to = self.to.load(Relaxed);
        PortId { slot: to as u32, generation: (to >> 32) as u32 }
    }

    /// Of a way into a tunnel: whether the packet is longer than goes it.
    #[inline(always)]
    pub(crate) fn is_exceeded_by(&self, packet: &Packet) -> bool {
        let limit = self.macs.load(Relaxed);
        limit != u32::MAX.into() && u64::from(segment_len(packet)) > limit
    }

    /// What becomes of the MAC addresses, and of the TTL.
    #[inline(always)]
    pub(crate) fn rewrite(&self, Way(way): Way) -> (LinkPatch, Ttl) {
        let macs = (self.macs.load(Relaxed), self.macs_end.load(Relaxed));
        let link = LinkPatch::whole(way & Way::DST != 0, way & Way::SRC != 0, macs);
        let value = (way >> Way::TTL_SHIFT) as u8;
        let ttl = match way & (Way::DECREMENT | Way::SET_4 | Way::SET_6) {
            0 => Ttl::Keep,
            Way::DECREMENT => Ttl::Decrement,
            Way::SET_4 => Ttl::Set4(value),
            _ => Ttl::Set6(value),
        };
        (link, ttl)
    }

    fn set(&self, brief: &Brief) {
        let Brief { way, macs_end, macs, to } = *brief;
        self.macs.store(macs, Relaxed);
        self.macs_end.store(macs_end, Relaxed);
        self.to.store(to, Relaxed);
        self.way.store(way, Relaxed);
    }

    fn forget(&self) {
        let Slot { tcp_flags, due, packets, bytes, last_used, punted, .. } = self;
        tcp_flags.store(0, Relaxed);
        due.store(false, Relaxed);
        [packets, bytes, last_used, punted].iter().for_each(|counter| counter.store(0, Relaxed));
    }

    /// Counts a packet. Only the owning worker may call this: it is a plain read and write, not an atomic addition.
    #[inline(always)]
    pub fn credit(&self, bytes: u64, tcp_flags: u16, now: u64) {
        self.packets.store(self.packets.load(Relaxed) + 1, Relaxed);
        self.bytes.store(self.bytes.load(Relaxed) + bytes, Relaxed);
        if tcp_flags != 0 {
            self.tcp_flags.store(self.tcp_flags.load(Relaxed) | tcp_flags, Relaxed);
        }
        self.last_used.store(now, Relaxed);
    }

    /// Counts packets that somebody else has counted, such as a device; as [`Slot::credit`], by the slot's owner only.
    pub fn add(&self, packets: u64, bytes: u64, now: u64) {
        self.packets.store(self.packets.load(Relaxed).wrapping_add(packets), Relaxed);
        self.bytes.store(self.bytes.load(Relaxed).wrapping_add(bytes), Relaxed);
        self.last_used.store(now, Relaxed);
    }

    /// Counts a credited packet as one that went to the host; as [`Slot::credit`], by the owning worker only.
    pub(crate) fn credit_punt(&self) {
        self.punted.store(self.punted.load(Relaxed) + 1, Relaxed);
    }

    /// Whether a keep-alive is asked for.
    #[inline(always)]
    pub fn is_due(&self) -> bool {
        self.due.load(Relaxed)
    }

    /// The keep-alive is given: for the owning worker.
    pub fn clear_due(&self) {
        self.due.store(false, Relaxed);
    }
}

/// What control has to know of one worker's slab: its slots, which both share, and how the worker hashes.
pub struct Slots {
    slots: Zeroed<Slot>,
    hasher: Hasher,
}

impl std::fmt::Debug for Slots {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{} slots", self.slots.len())
    }
}

impl Slots {
    /// Slots for flows of indices below `max_flows`, of a worker that hashes so in its L2.
    pub fn new(max_flows: usize, hasher: Hasher) -> Slots {
        Slots { slots: Zeroed::new(max_flows), hasher }
    }

    /// The hash of a flow's [values](FlowEntry::values) in this worker's L2.
    pub fn hash(&self, values: &[u64]) -> u64 {
        self.hasher.words(values, 0)
    }

    /// The flow's slot, if it lives still.
    #[inline(always)]
    pub(crate) fn slot(&self, flow: FlowRef) -> Option<&Slot> {
        let slot = self.slots.get(flow.index as usize)?;
        if slot.generation.load(Relaxed) == flow.generation { Some(slot) } else { None }
    }

    /// Asks for the slot at `index`.
    #[inline(always)]
    pub(crate) fn prefetch(&self, index: u32) {
        if let Some(slot) = self.slots.get(index as usize) {
            prefetch_write(slot);
        }
    }

    /// Begins to count for a flow, where there is no [`Slab`] to do so: for slots that are no worker's, by their one owner.
    /// Statistics go on if it has counted for the same flow under another generation, else they begin at zero.
    pub fn begin(&self, flow: FlowRef, goes_on: bool) {
        let Some(slot) = self.slots.get(flow.index as usize) else { return };
        if !goes_on {
            slot.generation.store(0, Relaxed);
            // Release: whoever reads any of this sees that the last flow's generation is gone.
            fence(Release);
            slot.forget();
        }
        slot.generation.store(flow.generation, Release);
    }

    /// Ends what [`Slots::begin`] began, if the flow is still the one that the slot counts for.
    pub fn end(&self, flow: FlowRef) {
        if let Some(slot) = self.slot(flow) {
            slot.generation.store(0, Relaxed);
        }
    }

    /// Where its memory lies, for advice to the system: start and length in bytes.
    pub fn memory(&self) -> (*const u8, usize) {
        self.memory_of(0..self.slots.len())
    }

    /// As [`Slots::memory`], for the flows of these indices, as far as there are such.
    pub fn memory_of(&self, flows: Range<usize>) -> (*const u8, usize) {
        let end = flows.end.min(self.slots.len());
        let slots = &self.slots[flows.start.min(end)..end];
        (slots.as_ptr().cast(), size_of_val(slots))
    }
}

/// The statistics of one flow on one worker, for control.
#[derive(Clone, Debug)]
pub struct FlowCounters {
    slots: Arc<Slots>,
    index: u32,
    /// The flow's generations, from the first to the present one: in the slot may be another flow's still, or already.
    generations: (u32, u32),
}

impl Default for FlowCounters {
    /// Of a flow of no worker, for what is to be tried without one.
    fn default() -> FlowCounters {
        let slots = Slots::new(1, Hasher::new(0));
        slots.slots[0].generation.store(1, Relaxed);
        FlowCounters { slots: Arc::new(slots), index: 0, generations: (1, 1) }
    }
}

impl FlowCounters {
    pub(crate) fn new(slots: &Arc<Slots>, flow: FlowRef) -> FlowCounters {
        FlowCounters {
            slots: slots.clone(),
            index: flow.index,
            generations: (flow.generation, flow.generation),
        }
    }

    /// The flow has a new generation, in which its statistics go on.
    pub(crate) fn renew(&mut self, generation: u32) {
        self.generations.1 = generation;
    }

    /// The slot, if the flow is in it.
    pub fn slot(&self) -> Option<&Slot> {
        let slot = self.slots.slots.get(self.index as usize)?;
        let (first, last) = self.generations;
        // Acquire: the statistics are those of this generation, or of later ones.
        let age = slot.generation.load(Acquire).wrapping_sub(first);
        (age <= last.wrapping_sub(first)).then_some(slot)
    }

    /// The present values; none while the worker has not taken the flow up, or when it has another in its place. Each is
    /// consistent in itself; together they may be a packet apart.
    pub fn read(&self) -> FlowStats {
        let stats = self.slot().map_or(FlowStats::default(), |slot| FlowStats {
            packets: slot.packets.load(Relaxed),
            bytes: slot.bytes.load(Relaxed),
            tcp_flags: slot.tcp_flags.load(Relaxed),
            last_used: slot.last_used.load(Relaxed),
            punted: slot.punted.load(Relaxed),
        });
        // Acquire: if any of it is another flow's, or forgotten, the generation is no longer there.
        fence(Acquire);
        if self.slot().is_some() { stats } else { FlowStats::default() }
    }

    /// Asks the worker to send the flow's next packet to the host, so that the host sees the flow alive. False if the worker has
    /// not taken the flow up, and so is not asked.
    pub fn set_due(&self) -> bool {
        let slot = self.slot();
        slot.inspect(|slot| slot.due.store(true, Relaxed)).is_some()
    }

    /// Whether a keep-alive is still asked for.
    pub fn is_due(&self) -> bool {
        self.slot().is_some_and(Slot::is_due)
    }

    /// Asks for the memory of [`FlowCounters::read`].
    pub fn prefetch(&self) {
        if let Some(slot) = self.slots.slots.get(self.index as usize) {
            prefetch_read(slot);
        }
    }
}

/// All flows of a worker.
#[derive(Debug)]
pub struct Slab {
    slots: Arc<Slots>,
    /// As long as the highest index was; there is room for all.
    entries: Vec<Option<Arc<FlowEntry>>>,
    len: usize,
}

impl Slab {
    /// A slab for flows of indices below `max_flows`, of a worker that hashes so in its L2.
    pub fn new(max_flows: usize, hasher: Hasher) -> Slab {
        Slab {
            slots: Arc::new(Slots::new(max_flows, hasher)),
            entries: Vec::with_capacity(max_flows),
            len: 0,
        }
    }

    /// What control reads of it.
    pub fn slots(&self) -> &Arc<Slots> {
        &self.slots
    }

    /// Where its entries lie, all that there may be, for advice to the system: start and length in bytes.
    pub fn memory(&self) -> (*const u8, usize) {
        (self.entries.as_ptr().cast(), self.entries.capacity() * size_of::<Option<Arc<FlowEntry>>>())
    }

    /// Number of flows.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether there is no flow.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// The flow's slot, if it lives still.
    #[inline(always)]
    pub fn slot(&self, flow: FlowRef) -> Option<&Slot> {
        self.slots.slot(flow)
    }

    /// The flow, if it lives still.
    #[inline(always)]
    pub fn get(&self, flow: FlowRef) -> Option<&FlowEntry> {
        self.slot(flow)?;
        self.at(flow.index)
    }

    /// The flow at `index`, if there is one.
    #[inline(always)]
    pub fn at(&self, index: u32) -> Option<&FlowEntry> {
        self.entries.get(index as usize)?.as_deref()
    }

    /// The name of the flow at `index`.
    #[inline(always)]
    pub(crate) fn flow(&self, index: u32) -> FlowRef {
        let generation = self.slots.slots.get(index as usize).map_or(0, |slot| slot.generation.load(Relaxed));
        FlowRef { index, generation }
    }

    /// Asks for what the execution of a flow reads, if that is more than its slot.
    #[inline(always)]
    pub(crate) fn prefetch(&self, flow: FlowRef) {
        if self.slot(flow).is_some_and(|slot| !slot.way().is_short())
            && let Some(Disposition::Fast(plan)) = self.get(flow).map(|entry| &entry.disposition)
        {
            prefetch_read(&**plan);
        }
    }

    /// [`Slab::get`], which asks for the line of the flow that is looked at with every packet.
    #[inline(always)]
    pub(crate) fn get_ahead(&self, flow: FlowRef) -> Option<&FlowEntry> {
        let entry = self.get(flow)?;
        prefetch_read(&entry.disposition);
        Some(entry)
    }

    /// Asks for what says where the flow at `index` lies.
    #[inline(always)]
    pub fn prefetch_slot(&self, index: u32) {
        self.slots.prefetch(index);
        if let Some(entry) = self.entries.get(index as usize) {
            prefetch_read(entry);
        }
    }

    /// Puts `entry` at its index; gives back what was there, whose statistics then go on, or `entry` itself when the index is too
    /// high. Neither what was there nor, of `entry`, what its packets need is looked at.
    pub fn put(
        &mut self,
        flow: FlowRef,
        entry: Arc<FlowEntry>,
    ) -> Result<Option<Arc<FlowEntry>>, Arc<FlowEntry>> {
        let FlowRef { index, generation } = flow;
        let Some(slot) = self.slots.slots.get(index as usize) else { return Err(entry) };
        if self.entries.len() <= index as usize {
            self.entries.resize_with(index as usize + 1, || None);
        }
        let place = &mut self.entries[index as usize];
        if place.is_none() {
            // Release: whoever reads any of this sees that the last flow's generation is gone.
            fence(Release);
            slot.forget();
        }
        slot.set(&entry.brief);
        // Release: whoever sees the generation sees that the last flow's statistics are forgotten.
        slot.generation.store(generation, Release);
        let old = place.replace(entry);
        self.len += old.is_none() as usize;
        Ok(old)
    }

    /// Takes the flow out, if it lives still.
    pub fn take(&mut self, flow: FlowRef) -> Option<Arc<FlowEntry>> {
        self.slot(flow)?.generation.store(0, Relaxed);
        let entry = self.entries.get_mut(flow.index as usize)?.take();
        self.len -= entry.is_some() as usize;
        entry
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::atomic::AtomicU32;

    fn put(slab: &mut Slab, index: u32, generation: u32) -> Result<bool, Arc<FlowEntry>> {
        let flow = FlowRef { index, generation };
        let entry =
            FlowEntry::new(flow, [].into_iter().collect(), Disposition::Punt(Arc::new(PuntReason::Ct)));
        slab.put(flow, Arc::new(entry)).map(|old| old.is_some())
    }

    #[test]
    fn few_words_lie_with_their_flow_and_many_are_kept_too() {
        for n in 0..2 * FEW as u64 {
            let values: Values = (0..n).collect();
            assert_eq!(*values, *(0..n).collect::<Vec<_>>());
            assert_eq!(matches!(values, Values::Few(..)), n <= FEW as u64);
        }
    }

    #[test]
    fn statistics_are_those_of_the_flow_and_go_on_when_it_is_replaced() {
        let mut slab = Slab::new(4, Hasher::new(1));
        let first = FlowRef { index: 2, generation: 7 };
        let mut counters = FlowCounters::new(slab.slots(), first);
        assert_eq!(counters.read(), FlowStats::default(), "the worker has not taken it up");
        assert!(!counters.set_due());
        assert!(!put(&mut slab, 2, 7).unwrap());
        slab.slot(first).unwrap().credit(100, 2, 5);
        assert!(counters.set_due() && counters.is_due());
        let stats = FlowStats { packets: 1, bytes: 100, tcp_flags: 2, last_used: 5, punted: 0 };
        assert_eq!(counters.read(), stats);
        // Control knows of the new generation before the worker does, and the other way round is the same to it.
        counters.renew(8);
        assert_eq!(counters.read(), stats);
        assert!(put(&mut slab, 2, 8).unwrap() && slab.slot(first).is_none());
        assert_eq!(counters.read(), stats);
        assert!(counters.is_due(), "what was asked for is still asked for");
        // Another flow in its place.
        assert!(slab.take(FlowRef { index: 2, generation: 8 }).is_some());
        assert_eq!((counters.read(), slab.len()), (FlowStats::default(), 0));
        let next = FlowRef { index: 2, generation: 9 };
        assert!(!put(&mut slab, 2, 9).unwrap());
        assert_eq!(FlowCounters::new(slab.slots(), next).read(), FlowStats::default());
        slab.slot(next).unwrap().credit(1, 0, 1);
        assert_eq!(counters.read(), FlowStats::default());
        assert!(!counters.set_due() && !FlowCounters::new(slab.slots(), next).is_due());
        assert!(put(&mut slab, 4, 1).is_err(), "there are four slots");
    }

    #[test]
    fn slots_without_a_slab_count_for_one_flow_at_a_time() {
        let slots = Arc::new(Slots::new(2, Hasher::new(0)));
        let first = FlowRef { index: 1, generation: 3 };
        let mut counters = FlowCounters::new(&slots, first);
        assert!(counters.slot().is_none());
        slots.begin(first, false);
        counters.slot().unwrap().add(5, 300, 9);
        let stats = FlowStats { packets: 5, bytes: 300, last_used: 9, ..FlowStats::default() };
        assert_eq!(counters.read(), stats);
        // A new generation goes on, another flow begins anew.
        counters.renew(4);
        slots.begin(FlowRef { generation: 4, ..first }, true);
        assert_eq!(counters.read(), stats);
        slots.end(first);
        assert_eq!(counters.read(), stats, "it has another name now");
        let next = FlowRef { generation: 7, ..first };
        slots.begin(next, false);
        assert_eq!(counters.read(), FlowStats::default());
        assert_eq!(FlowCounters::new(&slots, next).read(), FlowStats::default());
        slots.end(next);
        assert!(FlowCounters::new(&slots, next).slot().is_none());
        slots.begin(FlowRef { index: 2, generation: 1 }, false); // out of range: nothing
    }

    /// A reader never sees what another flow has counted, while flows come and go in the same slot.
    #[test]
    fn flows_in_one_slot_are_told_apart_while_they_come_and_go() {
        const DONE: u32 = u32::MAX;
        let mut slab = Slab::new(1, Hasher::new(1));
        let (slots, now, seen) = (slab.slots().clone(), AtomicU32::new(1), AtomicU32::new(0));
        std::thread::scope(|scope| {
            scope.spawn(|| {
                loop {
                    let generation = now.load(Relaxed);
                    if generation == DONE {
                        return;
                    }
                    let stats = FlowCounters::new(&slots, FlowRef { index: 0, generation }).read();
                    // Each flow counts packets of as many bytes as its generation says.
                    let is_own = stats.bytes.is_multiple_of(generation.into())
                        && [0, generation.into()].contains(&stats.last_used);
                    seen.fetch_add(u32::from(stats.packets > 0), Relaxed);
                    if !is_own {
                        now.store(DONE, Relaxed);
                        panic!("{generation}: {stats:?}");
                    }
                }
            });
            let mut generation = 0;
            while seen.load(Relaxed) < 1000 || generation < 20_000 {
                generation += 1;
                if now.swap(generation, Relaxed) == DONE {
                    break; // the reader has failed
                }
                put(&mut slab, 0, generation).unwrap();
                let flow = FlowRef { index: 0, generation };
                let slot = slab.slot(flow).unwrap();
                (0..100).for_each(|_| slot.credit(generation.into(), 0, generation.into()));
                slab.take(flow).unwrap();
            }
            now.store(DONE, Relaxed);
        });
    }
}
