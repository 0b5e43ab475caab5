//! Flow entries as a worker holds them, by index.
//!
//! Control prepares each entry and gives every worker one; indices and generations are the same in all workers, so a
//! [`FlowRef`] names a flow everywhere. The slab has room for as many as there may ever be, in memory that is used only as
//! far as indices go, which are dense: entries never move and the worker allocates nothing.

use crate::chain::Onward;
use crate::compile::{Plan, PuntReason, Rewrite};
use crate::flow::{FlowRef, Source};
use crate::hash::{prefetch_read, zeroed};
use crate::key::{Key, Mask};
use crate::packet::PortId;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::Relaxed};

/// What becomes of a flow's packets.
#[derive(Clone, Debug)]
pub enum Disposition {
    /// They are forwarded here.
    Fast(Arc<Plan>),
    /// They go to the host path, because of what cannot be executed here.
    Punt(Arc<PuntReason>),
}

/// Statistics of one flow on one worker: written by that worker alone, read by control at any time.
#[derive(Debug, Default)]
#[repr(align(64))]
pub struct FlowCounters {
    packets: AtomicU64,
    bytes: AtomicU64,
    tcp_flags: AtomicU64,
    last_used: AtomicU64,
    punted: AtomicU64,
    due: AtomicBool,
}

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

impl FlowCounters {
    /// Counts a packet. Only the owning worker may call this: it is a plain read and write, not an atomic addition.
    #[inline]
    pub fn credit(&self, bytes: u64, tcp_flags: u16, now: u64) {
        self.packets.store(self.packets.load(Relaxed) + 1, Relaxed);
        self.bytes.store(self.bytes.load(Relaxed) + bytes, Relaxed);
        if tcp_flags != 0 {
            self.tcp_flags.store(self.tcp_flags.load(Relaxed) | tcp_flags as u64, Relaxed);
        }
        self.last_used.store(now, Relaxed);
    }

    /// The present values. Each is consistent in itself; together they may be a packet apart.
    pub fn read(&self) -> FlowStats {
        FlowStats {
            packets: self.packets.load(Relaxed),
            bytes: self.bytes.load(Relaxed),
            tcp_flags: self.tcp_flags.load(Relaxed) as u16,
            last_used: self.last_used.load(Relaxed),
            punted: self.punted.load(Relaxed),
        }
    }

    /// Counts a credited packet as one that went to the host; as [`FlowCounters::credit`], by the owning worker only.
    pub(crate) fn credit_punt(&self) {
        self.punted.store(self.punted.load(Relaxed) + 1, Relaxed);
    }

    /// Asks the worker to send the flow's next packet to the host, so that the host sees the flow alive.
    pub fn set_due(&self) {
        self.due.store(true, Relaxed);
    }

    /// Whether a keep-alive is still asked for.
    pub fn is_due(&self) -> bool {
        self.due.load(Relaxed)
    }

    /// The keep-alive is given: for the owning worker.
    pub fn clear_due(&self) {
        self.due.store(false, Relaxed);
    }
}

/// A flow as one worker holds it.
#[derive(Debug)]
#[repr(C)]
pub struct FlowEntry {
    /// The values matched, zero outside the mask.
    pub key: Key,
    /// Its name.
    pub flow: FlowRef,
    /// Slot of the ingress port in whose table it is.
    pub port: u32,
    /// Subtable that holds it: unique over all ports.
    pub subtable: u32,
    /// Who gave it.
    pub source: Source,
    /// The bits that it looks at; shared by all flows of the subtable.
    pub mask: Arc<Mask>,
    /// What is done.
    pub disposition: Disposition,
    /// Where its packets go on, if that can be remembered.
    pub onward: Option<Onward>,
    /// This worker's statistics of it.
    pub counters: Arc<FlowCounters>,
}

/// One cache line: what the frequent packet needs of its flow, so that it costs this line, and that of the counters.
#[derive(Debug, Default)]
#[repr(align(64))]
pub(crate) struct Slot {
    generation: u32,
    way: Way,
    entry: Option<Box<FlowEntry>>,
    counters: Option<Arc<FlowCounters>>,
}

const _: () = assert!(size_of::<Slot>() == 64);

/// How much of a flow has to be looked at.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
#[repr(u32)] // told by one comparison
pub(crate) enum Way {
    /// Its packets may go on at a further stage, or to the host.
    #[default]
    Long,
    /// Its plan is all that there is to do.
    Straight,
    /// So it is, and it is one output.
    Output(PortId),
    /// So it is, and it comes to this.
    Rewrite(Rewrite),
}

impl Way {
    fn of(disposition: &Disposition) -> Way {
        match disposition {
            Disposition::Fast(plan) if plan.is_certain() => match (plan.sole_output(), plan.rewrite()) {
                (Some(port), _) => Way::Output(port),
                (None, Some(rewrite)) if !rewrite.more => Way::Rewrite(*rewrite),
                _ => Way::Straight,
            },
            _ => Way::Long,
        }
    }
}

impl Slot {
    /// How much of the flow has to be looked at.
    #[inline(always)]
    pub(crate) fn way(&self) -> &Way {
        &self.way
    }

    /// The flow.
    #[inline(always)]
    pub(crate) fn entry(&self) -> Option<&FlowEntry> {
        self.entry.as_deref()
    }

    /// Its counters.
    #[inline(always)]
    pub(crate) fn counters(&self) -> Option<&FlowCounters> {
        self.counters.as_deref()
    }
}

/// All flows of a worker.
#[derive(Debug)]
pub struct Slab {
    slots: Box<[Slot]>,
    len: usize,
}

impl Slab {
    /// A slab for flows of indices below `max_flows`.
    pub fn new(max_flows: usize) -> Slab {
        Slab { slots: zeroed(max_flows), len: 0 }
    }

    /// Number of flows.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether there is no flow.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    #[inline(always)]
    fn slot(&self, index: u32) -> Option<&Slot> {
        self.slots.get(index as usize)
    }

    /// The flow, if it lives still.
    #[inline(always)]
    pub fn get(&self, flow: FlowRef) -> Option<&FlowEntry> {
        let slot = self.slot(flow.index)?;
        if slot.generation == flow.generation { slot.entry.as_deref() } else { None }
    }

    /// The flow's slot, if it lives still.
    #[inline(always)]
    pub(crate) fn slot_of(&self, flow: FlowRef) -> Option<&Slot> {
        self.slot(flow.index).filter(|slot| slot.generation == flow.generation)
    }

    /// The flow at `index`, if there is one.
    #[inline(always)]
    pub fn at(&self, index: u32) -> Option<&FlowEntry> {
        self.slot(index)?.entry.as_deref()
    }

    /// [`Slab::get`], which asks for the line of the flow that is looked at with every packet.
    #[inline(always)]
    pub(crate) fn get_ahead(&self, flow: FlowRef) -> Option<&FlowEntry> {
        let entry = self.get(flow)?;
        prefetch_read(&entry.flow);
        Some(entry)
    }

    /// Asks for the line that says where the flow at `index` lies.
    #[inline(always)]
    pub fn prefetch_slot(&self, index: u32) {
        if let Some(slot) = self.slot(index) {
            prefetch_read(slot);
        }
    }

    /// Puts `entry` at its index; gives back what was there, or `entry` itself when the index is too high.
    pub fn put(&mut self, entry: Box<FlowEntry>) -> Result<Option<Box<FlowEntry>>, Box<FlowEntry>> {
        let flow = entry.flow;
        let Some(slot) = self.slots.get_mut(flow.index as usize) else { return Err(entry) };
        slot.generation = flow.generation;
        slot.way = Way::of(&entry.disposition);
        slot.counters = Some(entry.counters.clone());
        let old = slot.entry.replace(entry);
        self.len += old.is_none() as usize;
        Ok(old)
    }

    /// Takes the flow out, if it lives still.
    pub fn take(&mut self, flow: FlowRef) -> Option<Box<FlowEntry>> {
        let slot = self.slots.get_mut(flow.index as usize)?;
        if slot.generation != flow.generation {
            return None;
        }
        let entry = slot.entry.take();
        slot.counters = None; // which is not the last: the entry has them too
        self.len -= entry.is_some() as usize;
        entry
    }
}
