//! Guests that write whatever they like into their memory, against everything that a worker does with it: their rings,
//! the switch, the receivers' rings, the host's answers. Nothing may panic, no byte outside of guest memory may be touched
//! (it lies between pages without access), and the counters balance.
#![allow(unsafe_code)]

use crate::frames::pool::BUFFERS;
use crate::host::Decision;
use crate::host::path::HeldPacket;
use crate::port_config::{Mode, Socket};
use crate::quiesce::{Quiescence, WorkerEpoch};
use crate::vhost::VhostUserPort;
use crate::virtio::testing::{Driver, INDIRECT, MODERN, NEXT, PackedDriver, WRITE};
use crate::virtio::{Burst, GuestRx, GuestTx, NetHeader, RingConfig};
use crate::wake::Waker;
use crate::worker::egress::{BurstEgress, Jobs};
use crate::worker::io::Io;
use crate::worker::kicks::Kicks;
use crate::worker::port::{NewPort, Steering, WorkerPort};
use crate::worker::rings::{Rings, TxRing};
use proptest::prelude::*;
use rtrb::{Consumer, RingBuffer};
use std::ptr;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use switch_core::action::{Action, PortRef};
use switch_core::compile::compile;
use switch_core::compose::compose;
use switch_core::drop::DropReason;
use switch_core::exec::Scratch;
use switch_core::flow::{FlowSpec, Match, Source};
use switch_core::hash::splitmix;
use switch_core::key::{ETH_P_IP, ETH_P_IPV6, Field, Key, VLAN_PRESENT};
use switch_core::l1::L1Config;
use switch_core::packet::{Packet, PortId, SNAPSHOT};
use switch_core::pipeline::{Switch, SwitchConfig};
use switch_core::planner::{IfExists, Planner, PlannerConfig};
use virtio_bindings::virtio_net::*;
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap, GuestRegionMmap, MmapRegion};

const PORTS: [PortId; 3] = [port(0), port(1), port(2)];

const fn port(slot: u32) -> PortId {
    PortId { slot, generation: 1 }
}

/// The switch's bursts.
const BURST: usize = 32;
const PAGE: usize = 4096;
/// Guest-physical address and size: two regions that adjoin, a gap, and a small one. Each has memory of its own.
const REGIONS: [(u64, usize); 3] = [(0, 0x2_0000), (0x2_0000, 0x1_0000), (0x8_0000, 0x1000)];
/// Where a guest's transmit and receive rings are.
const TX_AT: u64 = 0x1000;
const RX_AT: u64 = 0x3000;
const END: u64 = 0x8_1000;

/// Memory between two pages that cannot be accessed.
struct Guarded {
    at: *mut libc::c_void,
    len: usize,
}

impl Guarded {
    fn new(size: usize) -> Self {
        let len = size + 2 * PAGE;
        let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS;
        // SAFETY: a new mapping, and a part of it made accessible.
        unsafe {
            let at = libc::mmap(ptr::null_mut(), len, libc::PROT_NONE, flags, -1, 0);
            assert_ne!(at, libc::MAP_FAILED);
            assert_eq!(libc::mprotect(at.byte_add(PAGE), size, libc::PROT_READ | libc::PROT_WRITE), 0);
            Guarded { at, len }
        }
    }

    fn region(&self, start: u64) -> GuestRegionMmap<()> {
        let access = libc::PROT_READ | libc::PROT_WRITE;
        // SAFETY: the accessible part; it is unmapped after the regions are gone, see `Guest`.
        let region = unsafe {
            MmapRegion::build_raw(
                self.at.byte_add(PAGE).cast(),
                self.len - 2 * PAGE,
                access,
                libc::MAP_PRIVATE,
            )
        };
        GuestRegionMmap::new(region.unwrap(), GuestAddress(start)).unwrap()
    }
}

impl Drop for Guarded {
    fn drop(&mut self) {
        // SAFETY: our own mapping.
        unsafe { libc::munmap(self.at, self.len) };
    }
}

#[derive(Clone)]
struct Dice(u64);

impl Dice {
    fn below(&mut self, n: u64) -> u64 {
        splitmix(&mut self.0) % n
    }

    fn one_in(&mut self, n: u64) -> bool {
        self.below(n) == 0
    }

    fn of<T: Copy>(&mut self, these: &[T]) -> T {
        these[self.below(these.len() as u64) as usize]
    }
}

/// A ring of either layout.
enum Ring {
    Split(Driver),
    Packed(PackedDriver),
}

impl Ring {
    /// What the device is told of it.
    fn device(&self) -> &Driver {
        match self {
            Ring::Split(driver) => driver,
            Ring::Packed(driver) => &driver.at,
        }
    }

    /// What the driver does after a fault: starts over, a split ring where it is.
    fn reset(&mut self) {
        match self {
            Ring::Split(driver) => driver.start_at(driver.avail_idx),
            Ring::Packed(driver) => driver.reset(),
        }
    }
}

/// A guest's driver. Fields are dropped in order: the memory goes last.
struct Guest {
    packed: bool,
    tx: Ring,
    rx: Ring,
    mem: Arc<GuestMemoryMmap<()>>,
    _memory: [Guarded; 3],
}

impl Guest {
    fn new(dice: &mut Dice) -> Self {
        let memory = REGIONS.map(|(_, size)| Guarded::new(size));
        let regions = REGIONS.iter().zip(&memory).map(|(&(start, _), memory)| memory.region(start)).collect();
        let mem = Arc::new(GuestMemoryMmap::from_regions(regions).unwrap());
        let optional = [
            VIRTIO_NET_F_CSUM,
            VIRTIO_NET_F_GUEST_CSUM,
            VIRTIO_NET_F_GUEST_TSO4,
            VIRTIO_NET_F_GUEST_TSO6,
            VIRTIO_NET_F_GUEST_USO4,
            VIRTIO_NET_F_GUEST_USO6,
        ];
        let features = dice.of(&[MODERN, MODERN, MODERN & !(1 << VIRTIO_NET_F_MRG_RXBUF), 0])
            | optional.iter().filter(|_| !dice.one_in(3)).fold(0, |all, bit| all | 1 << bit);
        let packed = dice.one_in(2);
        let size = if packed { 1 + dice.below(128) as u16 } else { 1 << dice.below(8) };
        let index = dice.of(&[0, 0xffff, 0xfff0, 0x7fff]);
        let [tx, rx] = [TX_AT, RX_AT].map(|at| {
            let mut driver = Driver::at(mem.clone(), at, size, features);
            if packed {
                return Ring::Packed(PackedDriver::of(driver));
            }
            driver.start_at(index);
            Ring::Split(driver)
        });
        Guest { packed, tx, rx, mem, _memory: memory }
    }

    fn put(&self, at: u64, bytes: &[u8]) {
        // What is outside of its memory cannot even be written by the guest.
        let _ = self.mem.write(bytes, GuestAddress(at));
    }

    fn address(dice: &mut Dice) -> u64 {
        let edge = dice.of(&[0, 0x2_0000, 0x3_0000, 0x8_0000, END, u64::MAX]);
        match dice.below(16) {
            0 => edge.wrapping_sub(dice.below(64)),
            1 => edge.wrapping_add(dice.below(64)),
            2 => splitmix(&mut dice.0),
            // In the rings themselves.
            3 => TX_AT + dice.below(0x4000),
            _ => 0x8000 + dice.below(0x2_0000),
        }
    }

    fn len(dice: &mut Dice) -> u32 {
        match dice.below(40) {
            0 => dice.of(&[0, 1, 0x1000, 0x1_0000, 0x7fff_ffff, u32::MAX]),
            1..10 => 1 + dice.below(16) as u32,
            10..35 => 60 + dice.below(1600) as u32,
            _ => dice.below(70_000) as u32,
        }
    }

    /// Address, length and flags of the descriptor of some place, which may be indirect.
    fn descriptor(&self, dice: &mut Dice, i: u16, write: u16) -> (u64, u32, u16) {
        let mut flags = write;
        if dice.one_in(3) {
            flags |= NEXT;
        }
        if dice.one_in(150) {
            flags = dice.below(8) as u16;
        }
        let (mut addr, mut len) = (Self::address(dice), Self::len(dice));
        if dice.one_in(8) {
            flags = flags & !NEXT | INDIRECT;
            len = dice.of(&[16, 32, 64, 64, 1600, 17, 0x1_0000]);
            for j in 0..4 {
                self.descriptor_at(dice, addr, j, 4, write);
            }
        } else if write == 0 && !dice.one_in(6) {
            addr = 0x8000 + 0x400 * u64::from(i);
            len = self.frame(dice, addr, len);
        }
        (addr, len, flags)
    }

    /// One of an indirect table.
    fn descriptor_at(&self, dice: &mut Dice, table: u64, i: u16, size: u16, write: u16) {
        let flags = if i + 1 < size { write | NEXT } else { write };
        let flags = if dice.one_in(40) { dice.below(8) as u16 } else { flags };
        let next = if dice.one_in(60) { dice.below(200) as u16 } else { i + 1 };
        self.raw(table, i, Self::address(dice), Self::len(dice), flags, next);
    }

    /// `next` is an id in a packed ring, and stands before the flags.
    fn raw(&self, table: u64, i: u16, addr: u64, len: u32, flags: u16, next: u16) {
        let (flags, next) = if self.packed { (next, flags) } else { (flags, next) };
        let words = [&addr.to_le_bytes()[..], &len.to_le_bytes(), &flags.to_le_bytes(), &next.to_le_bytes()];
        self.put(table.wrapping_add(16 * u64::from(i)), &words.concat());
    }

    /// Something like a frame, behind something like a header. Gives a length that might be theirs.
    fn frame(&self, dice: &mut Dice, at: u64, len: u32) -> u32 {
        let mut key = Key::default();
        key.set(Field::EthSrc, 0x0200_0000_0001);
        key.set(Field::EthType, u128::from(dice.of(&[ETH_P_IP, ETH_P_IP, ETH_P_IPV6, 0x0806, 0x8847])));
        key.set(Field::IpProto, dice.of(&[6, 6, 17, 17, 1, 58, 132, 47, 44]));
        key.set(Field::IpFrag, dice.of(&[0, 0, 0, 0, 1, 3]));
        if dice.one_in(4) {
            key.set(Field::VlanTpid, 0x8100);
            key.set(Field::VlanTci, u128::from(VLAN_PRESENT) | 5);
        }
        let mut frame = compose(&key);
        let l4 = (frame.len() as u16).saturating_sub(dice.of(&[20, 20, 8, 8, 0]));
        for _ in 0..dice.of(&[0, 0, 0, 1, 4]) {
            let i = dice.below(frame.len() as u64) as usize;
            let any = splitmix(&mut dice.0) as u8;
            frame[i] = dice.of(&[0, 0xff, 0x60, 0x45, 44, 51, any]);
        }
        let header = NetHeader {
            flags: dice.of(&[0, 1, 1, 1, 2, 0xff]),
            gso_type: dice.of(&[0, 0, 1, 4, 5, 0x81, 3, 0xff]),
            hdr_len: splitmix(&mut dice.0) as u16,
            gso_size: dice.of(&[0, 1, 8, 100, 1400, 0xffff]),
            csum_start: if dice.one_in(8) { splitmix(&mut dice.0) as u16 } else { l4 },
            csum_offset: dice.of(&[16, 16, 6, 6, 0, 12, 0xffff]),
            num_buffers: splitmix(&mut dice.0) as u16,
        };
        self.put(at, &header.to_bytes());
        self.put(at + NetHeader::LEN as u64, &frame);
        if dice.one_in(3) { len } else { (NetHeader::LEN + frame.len()) as u32 + dice.below(1500) as u32 }
    }

    /// Writes into a ring and makes some of it available.
    fn play(&mut self, dice: &mut Dice, receive: bool) {
        let driver = match if receive { &self.rx } else { &self.tx } {
            Ring::Split(driver) => driver,
            Ring::Packed(_) => return self.play_packed(dice, receive),
        };
        let RingConfig { size, desc, avail, .. } = driver.config;
        let (mut index, used) = (driver.avail_idx, driver.used_idx());
        for _ in 0..dice.below(u64::from(size) + 1) {
            let i = dice.below(u64::from(size)) as u16;
            let (addr, len, flags) = self.descriptor(dice, i, if receive { WRITE } else { 0 });
            let next = if dice.one_in(60) { splitmix(&mut dice.0) as u16 } else { (i + 1) % size };
            self.raw(desc, i, addr, len, flags, next);
            let head = if dice.one_in(400) { splitmix(&mut dice.0) as u16 } else { i };
            self.put(avail + 4 + 2 * u64::from(index % size), &head.to_le_bytes());
            if index.wrapping_sub(used) < size || dice.one_in(200) {
                index = index.wrapping_add(1);
            }
        }
        if dice.one_in(100) {
            index = splitmix(&mut dice.0) as u16;
        }
        if dice.one_in(100) {
            index = used.wrapping_add(size);
        }
        // Flags and event index too.
        self.put(avail, &(splitmix(&mut dice.0) as u16).to_le_bytes());
        self.put(avail + 4 + 2 * u64::from(size), &used.wrapping_add(dice.below(3) as u16).to_le_bytes());
        if let Ring::Split(driver) = if receive { &mut self.rx } else { &mut self.tx } {
            driver.set_avail_idx(index);
        }
    }

    /// The same with a packed ring: chains that mostly end, where there is room, and mostly in the right lap.
    fn play_packed(&mut self, dice: &mut Dice, receive: bool) {
        let Ring::Packed(driver) = (if receive { &mut self.rx } else { &mut self.tx }) else { return };
        driver.forget_used();
        let Ring::Packed(driver) = (if receive { &self.rx } else { &self.tx }) else { return };
        let RingConfig { size, desc, avail, .. } = driver.at.config;
        let (mut next, mut free, mut out) = (driver.next, driver.free(), vec![]);
        let (mut places, mut left) = (0, dice.below(u64::from(size) + 1));
        while free > 0 && (left > 0 || places > 0) {
            let at = next;
            let (addr, len, flags) = self.descriptor(dice, at & 0x7fff, if receive { WRITE } else { 0 });
            let lap = if dice.one_in(300) { at ^ 0x8000 } else { at };
            driver.filled(lap, addr, len, splitmix(&mut dice.0) as u16, flags);
            (next, free, places, left) =
                (driver.after(next, 1), free - 1, places + 1, left.saturating_sub(1));
            if flags & NEXT == 0 {
                out.push((0, places));
                places = 0;
            }
        }
        if places > 0 {
            out.push((0, places));
        }
        if dice.one_in(100) {
            let noise = splitmix(&mut dice.0).to_le_bytes();
            self.put(desc + 16 * dice.below(u64::from(size)) + 8, &noise);
        }
        // When to be notified.
        self.put(avail, &(splitmix(&mut dice.0) as u32).to_le_bytes());
        if let Ring::Packed(driver) = if receive { &mut self.rx } else { &mut self.tx } {
            driver.next = next;
            driver.out.extend(out);
        }
    }

    /// A packed ring may have been written over already so that it cannot be started.
    fn start_tx(&mut self) -> GuestTx {
        loop {
            match self.tx.device().try_tx() {
                Ok(ring) => return ring,
                Err(error) => assert!(self.packed, "{error}"),
            }
            self.tx.reset();
        }
    }

    fn start_rx(&mut self) -> Arc<GuestRx> {
        loop {
            match self.rx.device().try_rx() {
                Ok(ring) => return Arc::new(ring),
                Err(error) => assert!(self.packed, "{error}"),
            }
            self.rx.reset();
        }
    }
}

/// A worker's parts and its three ports: what port 0 sends is for port 1, or for ports 1 and 2, or not known.
struct Bench {
    io: Io,
    jobs: Jobs,
    switch: Switch,
    up: Consumer<Box<HeldPacket>>,
    burst: Burst,
    packets: Vec<Packet>,
    scratch: Scratch,
    taken: u64,
    /// Signs off with the bench.
    _epoch: WorkerEpoch,
}

fn output(port: PortId) -> Action {
    Action::Output(PortRef::Ours(port))
}

impl Bench {
    fn new() -> Bench {
        let epoch = Arc::new(Quiescence::new()).register("bench").unwrap();
        let (to_host, up) = RingBuffer::new(BUFFERS);
        let kicks = Kicks::new(&epoch).unwrap();
        let mut io = Io::new(1, to_host, Arc::new(Waker::new().unwrap()), kicks);
        for id in PORTS {
            let socket = Socket { mode: Mode::Client, ..Socket::new("/nowhere") };
            let vhost =
                VhostUserPort::new("p", 1, socket, None, Arc::new(Quiescence::new()), Box::new(|_| {}))
                    .unwrap();
            let port = WorkerPort::new(NewPort {
                id,
                name: "p".into(),
                rings: Rings::Guest(vhost.shared().clone()),
                queues: 1,
                polled: vec![0],
                mtu: 1500,
                miss_rate: 1_000_000,
                steering: Arc::new(Steering::default()),
                handover: Arc::default(),
            });
            assert!(io.add_port(Box::new(port)).is_none());
        }
        let l1 = L1Config { capacity: 256, ports: 8, pending_ticks: 1, pending_misses: 16, age_ticks: 100 };
        let (flows, seed) = (100, 7);
        let mut switch = Switch::new(SwitchConfig { l1, flows, seed });
        let config = PlannerConfig { ports: 8, flows, masks: 8, seed };
        let mut planner = Planner::new(config, vec![switch.slots().clone()]);
        let mut apply = |updates: Vec<_>| updates.into_iter().for_each(|update| drop(switch.apply(update)));
        apply(planner.add_port(PORTS[0], 100).unwrap().0);
        let (one, two) = (output(PORTS[1]), output(PORTS[2]));
        let push = Action::PushVlan { tpid: 0x8100, tci: VLAN_PRESENT | 9 };
        let flow_actions = [
            (ETH_P_IP, 6, vec![one.clone()]),
            (ETH_P_IP, 17, vec![one.clone(), push, two.clone()]),
            (ETH_P_IPV6, 6, vec![Action::PopVlan, two.clone()]),
            (ETH_P_IPV6, 17, vec![Action::Trunc(100), one, two]),
        ];
        for (eth_type, proto, actions) in flow_actions {
            let mut matches = Match::default();
            let fields = [(Field::InPort, 0), (Field::RecircId, 0), (Field::EthType, eth_type.into())];
            for (field, value) in fields.into_iter().chain([(Field::IpProto, proto), (Field::IpFrag, 0)]) {
                matches.key.set(field, value);
                matches.mask.set_exact(field);
            }
            let spec = FlowSpec { matches, actions, ufid: None, held: None };
            apply(planner.add(PORTS[0], Source::Explicit, spec, IfExists::Refuse).unwrap().1);
        }
        Bench {
            io,
            jobs: Jobs::default(),
            switch,
            up,
            burst: Burst::new(),
            packets: vec![Packet::default(); BURST],
            scratch: Scratch::default(),
            taken: 0,
            _epoch: epoch,
        }
    }

    fn set_rx(&mut self, id: PortId, ring: Option<Arc<GuestRx>>) {
        // Gives up what waits for the ring that was there.
        self.io.refresh();
        let port = self.io.port(id).unwrap();
        port.tx_active = usize::from(ring.is_some());
        port.tx[0].ring = ring.map(TxRing::Guest);
    }

    /// Takes a burst from `ring` and sends it on its way. `meanwhile` runs when it has been received.
    fn forward(&mut self, ring: &mut GuestTx, meanwhile: impl FnOnce()) -> bool {
        let Ok(taken) = ring.receive(&mut self.burst, BURST) else { return false };
        meanwhile();
        let packets = &mut self.packets[..taken];
        for (i, packet) in packets.iter_mut().enumerate() {
            let head = packet.reset(PORTS[0], self.burst.frames()[i].len, SNAPSHOT);
            assert_eq!(self.burst.copy_head(&self.burst.frames()[i], head), head.len());
        }
        self.taken += taken as u64;
        let now = self.io.now;
        let mut egress = BurstEgress::new(&mut self.io, &mut self.jobs, &self.burst, packets, (0, 0), true);
        self.switch.process(now, packets, &mut egress);
        egress.finish(packets);
        ring.complete(&mut self.burst);
        true
    }

    fn answer(&mut self, dice: &mut Dice) {
        let plan = |actions| {
            Arc::new(
                compile(&FlowSpec { matches: Match::default(), actions, ufid: None, held: None }).unwrap(),
            )
        };
        let plan = plan(vec![output(PORTS[1]), output(PORTS[2])]);
        while let Ok(mut held) = self.up.pop() {
            held.answer = Some(if dice.one_in(2) {
                Decision::Execute(plan.clone())
            } else {
                Decision::Drop(DropReason::HostDrop)
            });
            self.io.host_answer(held, &mut self.scratch);
        }
    }

    /// Every packet has come to one end, every copy to one, and every buffer is back.
    fn check(&mut self) {
        self.io.now_cycles += 10;
        self.io.retry_parked();
        assert!(!self.io.is_waiting());
        assert_eq!(self.io.pool.free(), BUFFERS);
        let (mut copies, mut ends) = (0, 0);
        for port in self.io.ports.iter().flatten() {
            let (mut tx_drops, mut rx_drops) = ([0; DropReason::COUNT], [0; DropReason::COUNT]);
            let counters = &port.counters;
            counters.tx_drops.sum_into(&mut tx_drops);
            counters.rx_drops.sum_into(&mut rx_drops);
            copies += counters.fast_copies.get() + counters.host_copies.get();
            ends += counters.tx_packets.get() + tx_drops.iter().sum::<u64>();
            if port.id == PORTS[0] {
                let sum =
                    counters.rx_forwarded.get() + counters.rx_to_host.get() + rx_drops.iter().sum::<u64>();
                assert_eq!(self.taken, sum, "packets");
            }
        }
        assert_eq!(copies, ends, "copies");
    }
}

/// What all runs together must have seen, or else the guests are too hostile to reach anything.
#[derive(Default)]
struct Seen {
    /// In split rings, and in packed ones.
    faults: [u64; 2],
    delivered: [u64; 2],
    /// By port: what the counters of the bench have so far.
    counted: [u64; 3],
}

fn run(bench: &mut Bench, seed: u64, rounds: u32, seen: &mut Seen) {
    let mut dice = Dice(seed);
    let mut guests = [0; 3].map(|_| Guest::new(&mut dice));
    let mut tx = guests[0].start_tx();
    for (id, guest) in PORTS.iter().zip(&mut guests).skip(1) {
        bench.set_rx(*id, Some(guest.start_rx()));
    }
    for _ in 0..rounds {
        guests[0].play(&mut dice, false);
        for guest in &mut guests[1..] {
            guest.play(&mut dice, true);
        }
        bench.io.now += 1;
        bench.io.now_cycles += 1;
        let sender = &guests[0];
        let mut later = dice.clone();
        let received = bench.forward(&mut tx, || {
            for _ in 0..later.below(8) {
                let noise = splitmix(&mut later.0).to_le_bytes();
                sender.put(Guest::address(&mut later), &noise);
            }
        });
        bench.answer(&mut dice);
        bench.io.retry_parked();
        bench.io.notify_guests();
        if !received {
            seen.faults[usize::from(guests[0].packed)] += 1;
            drop(tx);
            guests[0].tx.reset();
            tx = guests[0].start_tx();
        }
        for (id, guest) in PORTS.iter().zip(&mut guests).skip(1) {
            let ring = bench.io.port(*id).unwrap().tx[0].ring.clone();
            if ring.is_none_or(|ring| ring.is_stopped()) {
                seen.faults[usize::from(guest.packed)] += 1;
                bench.set_rx(*id, None);
                guest.rx.reset();
                bench.set_rx(*id, Some(guest.start_rx()));
            }
        }
    }
    bench.check();
    for (id, guest) in PORTS.iter().zip(&guests).skip(1) {
        let all = bench.io.port(*id).unwrap().counters.tx_packets.get();
        let known = std::mem::replace(&mut seen.counted[id.slot as usize], all);
        seen.delivered[usize::from(guest.packed)] += all - known;
        bench.set_rx(*id, None);
    }
}

/// Rounds with the same guests; each is a case: what three guests have written, and what becomes of it.
const ROUNDS: u32 = 40;

/// How many cases are tried: as `scripts/test --hostile CASES` says, or 10,000.
fn cases() -> u32 {
    const DEFAULT_CASES: u32 = 10_000;
    let asked = std::env::var("POINTWORK_HOSTILE_CASES").ok();
    asked.map_or(DEFAULT_CASES, |asked| asked.parse().expect("POINTWORK_HOSTILE_CASES is a number"))
}

#[test]
fn whatever_guests_write_harms_only_themselves() {
    let (mut bench, mut seen) = (Bench::new(), Seen::default());
    let runs = cases().div_ceil(ROUNDS);
    let config = ProptestConfig { cases: runs, failure_persistence: None, ..ProptestConfig::default() };
    let mut runner = proptest::test_runner::TestRunner::new(config);
    let (bench, seen) = (std::cell::RefCell::new(&mut bench), std::cell::RefCell::new(&mut seen));
    let result = runner.run(&any::<u64>().no_shrink(), |seed| {
        run(&mut bench.borrow_mut(), seed, ROUNDS, &mut seen.borrow_mut());
        Ok(())
    });
    result.unwrap();
    let seen = seen.borrow();
    let (faults, frames) = (u64::from(runs) / 4, u64::from(runs) / 2);
    println!(
        "{} cases: {:?} faults, {:?} frames delivered (split, packed)",
        runs * ROUNDS,
        seen.faults,
        seen.delivered
    );
    let enough = |all: [u64; 2], least| all.iter().all(|&n| n > least);
    assert!(
        enough(seen.faults, faults) && enough(seen.delivered, frames),
        "{:?} faults, {:?} frames",
        seen.faults,
        seen.delivered
    );
}

struct SetOnDrop<'a>(&'a AtomicBool);

impl Drop for SetOnDrop<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

#[test]
fn a_guest_that_never_stops_writing_harms_only_itself() {
    [false, true].into_iter().for_each(never_stops_writing);
}

fn never_stops_writing(packed: bool) {
    let mut dice = Dice(3);
    let mut guest =
        || std::iter::repeat_with(|| Guest::new(&mut dice)).find(|guest| guest.packed == packed).unwrap();
    let (mut bench, mut guests) = (Bench::new(), [guest(), guest()]);
    let (mem, other) = (guests[0].mem.clone(), guests[1].mem.clone());
    let stop = AtomicBool::new(false);
    let mut faults = 0;
    std::thread::scope(|scope| {
        scope.spawn(|| {
            let mut dice = Dice(4);
            while !stop.load(Ordering::Relaxed) {
                // Anywhere, and often where it hurts: descriptor tables and available rings.
                let at = if dice.one_in(2) { TX_AT + dice.below(0x4000) } else { Guest::address(&mut dice) };
                let noise = dice.below(0x300).to_le_bytes();
                let _ = dice.of(&[&mem, &other]).write(&noise[..dice.of(&[1, 2, 4, 8])], GuestAddress(at));
            }
        });
        // Also when this panics.
        let _stop = SetOnDrop(&stop);
        let [sender, receiver] = &mut guests;
        let mut tx = sender.start_tx();
        bench.set_rx(PORTS[1], Some(receiver.start_rx()));
        for _ in 0..2000 {
            sender.play(&mut dice, false);
            receiver.play(&mut dice, true);
            bench.io.now_cycles += 1;
            if !bench.forward(&mut tx, || {}) {
                faults += 1;
                drop(tx);
                sender.tx.reset();
                tx = sender.start_tx();
            }
            bench.answer(&mut dice);
            bench.io.retry_parked();
            bench.io.notify_guests();
            if bench.io.port(PORTS[1]).unwrap().tx[0].ring.as_ref().is_some_and(|ring| ring.is_stopped()) {
                bench.set_rx(PORTS[1], None);
                receiver.rx.reset();
                bench.set_rx(PORTS[1], Some(receiver.start_rx()));
            }
        }
    });
    bench.check();
    assert!(faults > 0);
}
