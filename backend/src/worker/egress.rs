//! Where a burst's packets go: jobs for receive rings, sent in batches at the burst's end, and the host path.
//!
//! What the switch decides about a burst becomes a list of jobs. A job's bytes are the packet's head, rewritten in private
//! memory, and the tail that is still in the sender's memory: the copy into the receiver's buffers is the only one.
//! Jobs are sorted by ring, so that each ring is reserved, filled and published once a burst, and a flow's order is kept.

use super::io::Io;
use super::{BURST, MAX_PORTS};
use crate::counters::PortCounters;
use crate::frames::outgoing::{self, Batch, Outgoing, Tail};
use crate::frames::software;
use crate::host::path::Budget;
use crate::virtio::{Burst, NetHeader};
use switch_core::checksum;
use switch_core::drop::DropReason;
use switch_core::offload;
use switch_core::packet::{NONE, Packet, PortId};
use switch_core::pipeline::{Egress, Found, Upcall};

/// Outputs of one burst at most.
const MAX_JOBS: usize = BURST * (MAX_PORTS - 1);
/// Heads of one burst's packets that are kept at most.
const MAX_HEADS: usize = BURST * 32;

#[derive(Clone, Copy)]
struct Job {
    slot: u16,
    queue: u8,
    /// Index in the burst.
    packet: u8,
    /// [`PACKET`], or the index of a copy of its head.
    source: u16,
    /// Place in the list, once that is to be sorted.
    sequence: u16,
    /// Length as it leaves.
    len: u32,
}

/// What is sent is the burst's packet itself.
const PACKET: u16 = u16::MAX;

const _: () = assert!(MAX_HEADS < PACKET as usize && MAX_JOBS + BURST <= 1 << 16);

impl Job {
    #[inline(always)]
    fn ring(&self) -> (u16, u8) {
        (self.slot, self.queue)
    }
}

/// What is to be sent of one burst.
pub struct Jobs {
    list: Vec<Job>,
    /// Copies of heads; the first `used` belong to jobs.
    heads: Box<[Packet]>,
    used: usize,
    /// No output needs anything done, as in [`Batch::is_plain`].
    plain: bool,
    /// The ring of the first, if there is one.
    ring: Option<(u16, u8)>,
    /// They are for several rings.
    mixed: bool,
}

impl Default for Jobs {
    fn default() -> Self {
        Jobs {
            list: Vec::with_capacity(MAX_JOBS + BURST),
            heads: vec![Packet::default(); MAX_HEADS].into(),
            used: 0,
            plain: true,
            ring: None,
            mixed: false,
        }
    }
}

impl Jobs {
    /// Sends what the jobs say. `packets` are those of the burst.
    fn send(&mut self, io: &mut Io, packets: &[Packet], burst: &Burst) {
        let Jobs { list, heads, plain, .. } = self;
        let deliver = |jobs: &[Job], io: &mut Io| {
            if let [Job { slot, queue, .. }, ..] = *jobs {
                io.deliver(slot, queue, &Outputs { jobs, packets, heads, burst, plain: *plain });
            }
        };
        if self.mixed {
            list.iter_mut().enumerate().for_each(|(i, job)| job.sequence = i as u16);
            list.sort_unstable_by_key(|job| (job.ring(), job.sequence));
            list.chunk_by(|a, b| a.ring() == b.ring()).for_each(|jobs| deliver(jobs, io));
        } else {
            deliver(list, io);
        }
        self.list.clear();
        (self.used, self.ring, self.mixed) = (0, None, false);
    }
}

/// Jobs for one ring.
struct Outputs<'a> {
    jobs: &'a [Job],
    packets: &'a [Packet],
    heads: &'a [Packet],
    burst: &'a Burst,
    plain: bool,
}

impl Batch for Outputs<'_> {
    #[inline(always)]
    fn count(&self) -> usize {
        self.jobs.len()
    }

    #[inline(always)]
    fn outgoing(&self, i: usize) -> Outgoing<'_> {
        let job = &self.jobs[i];
        let i = job.packet as usize;
        let packet = match job.source {
            PACKET => &self.packets[i],
            copy => &self.heads[copy as usize],
        };
        Outgoing { packet, tail: Tail::Burst(self.burst, i), max_len: job.len }
    }

    #[inline(always)]
    fn len(&self, i: usize) -> u32 {
        self.jobs[i].len
    }

    #[inline(always)]
    fn is_plain(&self) -> bool {
        self.plain
    }
}

/// The switch's view of a burst's surroundings.
pub struct BurstEgress<'a> {
    io: &'a mut Io,
    jobs: &'a mut Jobs,
    burst: &'a Burst,
    slot: usize,
    queue: usize,
    /// Address of the burst's first packet: tells the packets themselves from copies that actions made.
    base: usize,
    /// Whether the guest has several receive queues, to which its flows are to be steered.
    steers: bool,
    /// Some packet's virtio header says something.
    offloads: bool,
    /// Packets that left by [`Egress::forward`].
    straight: u64,
    /// The last packet of which a copy was sent another way.
    last_forwarded: usize,
    /// Packets of which a copy was sent another way, and copies.
    forwarded: u64,
    copies: u64,
    /// The packet that the last head in `Jobs::heads` belongs to.
    copied: usize,
    /// Where the last output went, if that port has but one ring: most of a burst goes one way.
    last_way: Option<Way>,
}

/// A port with one ring.
#[derive(Clone, Copy)]
struct Way {
    port: PortId,
    mtu: u32,
    /// No frame up to this length exceeds the MTU.
    short: u32,
    ring: (u16, u8),
}

impl<'a> BurstEgress<'a> {
    /// For a burst from queue pair `queue` of the port in `slot`. `offloads`: some virtio header is not empty.
    pub fn new(
        io: &'a mut Io,
        jobs: &'a mut Jobs,
        burst: &'a Burst,
        packets: &[Packet],
        (slot, queue): (usize, usize),
        offloads: bool,
    ) -> Self {
        let base = packets.as_ptr() as usize;
        let steers = io.ports[slot].as_ref().is_some_and(|port| port.tx_active > 1);
        let (last_forwarded, copied) = (usize::MAX, usize::MAX);
        let (forwarded, copies) = (0, 0);
        let last_way = None;
        jobs.plain = !offloads;
        BurstEgress {
            io,
            jobs,
            burst,
            slot,
            queue,
            base,
            steers,
            offloads,
            straight: 0,
            last_forwarded,
            forwarded,
            copies,
            copied,
            last_way,
        }
    }

    /// Sends what has been decided.
    pub fn finish(self, packets: &[Packet]) {
        if let Some(counters) = self.counters() {
            counters.rx_forwarded.add(self.forwarded + self.straight);
            counters.fast_copies.add(self.copies + self.straight);
        }
        self.jobs.send(self.io, packets, self.burst);
    }

    fn counters(&self) -> Option<&PortCounters> {
        self.io.ports[self.slot].as_ref().map(|port| &*port.counters)
    }

    /// The ring for this packet, which is remembered for the next.
    #[inline(never)]
    fn route(&mut self, packet: &Packet, id: PortId, max_len: u32) -> Result<(u16, u8), DropReason> {
        let ring = self.io.route(packet, id, max_len)?;
        self.jobs.mixed |= *self.jobs.ring.get_or_insert(ring) != ring;
        let single = self.io.port(id).filter(|port| port.tx_active == 1);
        self.last_way =
            single.map(|port| Way { port: id, mtu: port.mtu, short: outgoing::fitting(port.mtu), ring });
        Ok(ring)
    }

    /// Adds a job. There is room for one of each packet beyond [`MAX_JOBS`].
    #[inline(always)]
    fn push(&mut self, i: usize, (slot, queue): (u16, u8), source: u16, len: u32) {
        self.jobs.list.push(Job { slot, queue, packet: i as u8, source, sequence: 0, len });
    }

    /// Counts a copy that could not be sent. (The ingress of what is inside a tunnel is none of a worker's ports.)
    #[cold]
    fn drop_copy(&mut self, to: PortId, reason: DropReason) {
        let from = self.io.ports[self.slot].as_ref().map_or(to, |port| port.id);
        self.io.drop_copy(to, from, reason);
    }

    /// Keeps the head of a packet that will change, or whose buffer will be reused, before it can be sent.
    fn keep(&mut self, i: usize, packet: &Packet) -> Option<u16> {
        let Jobs { heads, used, .. } = &mut *self.jobs;
        let same = self.copied == i
            && heads[..*used].last().is_some_and(|copy| {
                copy.len == packet.len && copy.offload == packet.offload && copy.head() == packet.head()
            });
        if !same {
            heads.get_mut(*used)?.copy_from(packet);
            *used += 1;
            self.copied = i;
        }
        Some((*used - 1) as u16)
    }
}

/// What a packet's header asks for becomes its offload state, if it is true.
#[inline(never)]
fn check(header: &NetHeader, packet: &mut Packet, found: Found<'_>) -> Result<(), DropReason> {
    let raw = software::raw_header(header);
    packet.offload = match found {
        Found::Key(key) => offload::check(&raw, packet, key)?,
        Found::Common(shape) => offload::check_common(&raw, packet, shape)?,
    };
    // A sender's word for its checksum is worth nothing to the receiver.
    packet.offload.csum_valid = false;
    Ok(())
}

impl Egress for BurstEgress<'_> {
    fn more(&mut self, i: usize, packet: &mut Packet) {
        let have = outgoing::tail_offset(self.burst, i, packet);
        self.burst.copy_range(i, have, packet.extend());
    }

    #[inline(always)]
    fn admit(&mut self, i: usize, packet: &mut Packet, found: Found<'_>) -> Result<(), DropReason> {
        if self.offloads {
            let header = &self.burst.frames()[i].header;
            if header.flags | header.gso_type != 0 {
                check(header, packet, found)?;
            }
        }
        if self.steers
            && let Some(port) = &self.io.ports[self.slot]
        {
            port.steering.note(packet.flow_hash(), self.queue);
        }
        Ok(())
    }

    /// The bytes may be changed after they were summed, as they could be on any wire.
    #[inline(never)]
    fn sum_tail(&mut self, i: usize, packet: &Packet, end: u32) -> Option<u16> {
        let (mut chunk, mut sum) = ([0; 2048], 0);
        let mut at = outgoing::tail_offset(self.burst, i, packet);
        while at < end {
            let chunk = &mut chunk[..((end - at) as usize).min(2048)];
            let copied = self.burst.copy_range(i, at, chunk);
            if copied != chunk.len() {
                return None; // the frame is not as long as it says
            }
            sum = checksum::add(sum, chunk);
            at += copied as u32;
        }
        Some(checksum::fold(sum))
    }

    #[inline(always)]
    fn forward(&mut self, i: usize, packet: &mut Packet, port: PortId) {
        match self.last_way {
            Some(way) if way.port == port && packet.len <= way.short => {
                self.straight += 1;
                self.push(i, way.ring, PACKET, packet.len);
            }
            _ => self.output(i, packet, port, u32::MAX, true),
        }
    }

    fn output(&mut self, i: usize, packet: &mut Packet, port: PortId, max_len: u32, last: bool) {
        self.copies += 1;
        self.forwarded += (self.last_forwarded != i) as u64;
        self.last_forwarded = i;
        let ring = match self.last_way {
            Some(way) if way.port == port && !outgoing::exceeds(packet, max_len, way.mtu) => way.ring,
            _ => match self.route(packet, port, max_len) {
                Ok(ring) => ring,
                Err(reason) => return self.drop_copy(port, reason),
            },
        };
        let own = std::ptr::from_ref(packet) as usize == self.base + i * size_of::<Packet>();
        let source = if last && own { Some(PACKET) } else { self.keep(i, packet) };
        match source {
            Some(source) if self.jobs.list.len() < MAX_JOBS => {
                // Beside the sender, only a header laid around the packet may leave a checksum open.
                self.jobs.plain &= packet.len <= max_len && !packet.offload.needs_csum;
                self.push(i, ring, source, packet.len.min(max_len));
            }
            _ => self.drop_copy(port, DropReason::NoBuffer),
        }
    }

    fn has_room(&mut self, packet: &Packet) -> bool {
        self.io.has_room(self.slot, packet.tail_len() as usize, Budget::KeepAlive)
    }

    fn upcall(&mut self, i: usize, packet: &mut Packet, why: Upcall) {
        let budget = match why {
            Upcall::Miss => Budget::Miss,
            Upcall::Punt(_) | Upcall::Unparsable => Budget::Punt,
            Upcall::KeepAlive(_) => Budget::KeepAlive,
        };
        let mut offload = packet.offload;
        if packet.layout.l3 == NONE {
            // It was not parsed, so nothing was checked either.
            match offload::check_unparsed(&software::raw_header(&self.burst.frames()[i].header), packet.len) {
                Ok(checked) => offload = checked,
                Err(reason) => return self.drop(i, packet, reason),
            }
        }
        self.io.send_up(packet, self.queue, offload, Tail::Burst(self.burst, i), budget);
    }

    fn drop(&mut self, _: usize, _: &Packet, reason: DropReason) {
        if let Some(counters) = self.counters() {
            counters.rx_drops.count(reason);
        }
    }
}
