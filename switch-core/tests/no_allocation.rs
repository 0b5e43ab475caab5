//! A worker allocates nothing and frees nothing: neither for packets nor for updates.
#![allow(unsafe_code)] // a counting allocator

use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::Cell;
use std::sync::Arc;
use switch_core::action::{Action, PortRef};
use switch_core::compile::{Way, Ways};
use switch_core::drop::DropReason;
use switch_core::flow::{FlowSpec, Match, Source};
use switch_core::key::Field;
use switch_core::l1::L1Config;
use switch_core::packet::{Packet, PortId};
use switch_core::pipeline::{Egress, Found, Switch, SwitchConfig, Upcall};
use switch_core::planner::{IfExists, Planner, PlannerConfig};
use switch_core::tables::{Retired, Update};
use switch_core::tunnel::{Endpoint, Kind, Remote, Vlan};

thread_local! {
    static CALLS: Cell<u64> = const { Cell::new(0) };
}

struct Counting;

// SAFETY: every call is handed on to the system's allocator unchanged.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        CALLS.set(CALLS.get() + 1);
        // SAFETY: the caller keeps `alloc`'s contract.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, memory: *mut u8, layout: Layout) {
        CALLS.set(CALLS.get() + 1);
        // SAFETY: the caller keeps `dealloc`'s contract.
        unsafe { System.dealloc(memory, layout) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

/// The number of calls to the allocator during `f`.
fn calls<T>(f: impl FnOnce() -> T) -> (T, u64) {
    let before = CALLS.get();
    let result = f();
    (result, CALLS.get() - before)
}

#[derive(Default)]
struct Count {
    sent: usize,
    upcalls: usize,
    dropped: usize,
}

impl Egress for Count {
    fn more(&mut self, _: usize, packet: &mut Packet) {
        packet.extend().fill(0);
    }
    fn admit(&mut self, _: usize, _: &mut Packet, _: Found<'_>) -> Result<(), DropReason> {
        Ok(())
    }
    fn output(&mut self, _: usize, _: &mut Packet, _: PortId, _: u32, _: bool) {
        self.sent += 1;
    }
    fn has_room(&mut self, _: &Packet) -> bool {
        true
    }
    fn upcall(&mut self, _: usize, _: &mut Packet, _: Upcall) {
        self.upcalls += 1;
    }
    fn drop(&mut self, _: usize, _: &Packet, _: DropReason) {
        self.dropped += 1;
    }
}

const PORT: PortId = PortId { slot: 0, generation: 1 };

fn flow(recirc: u32, dst: Option<u128>, actions: Vec<Action>) -> FlowSpec {
    let mut matches = Match::default();
    matches.mask.set_exact(Field::InPort);
    matches.key.set(Field::RecircId, recirc as u128);
    matches.mask.set_exact(Field::RecircId);
    if let Some(dst) = dst {
        matches.key.set(Field::EthDst, dst);
        matches.mask.set_exact(Field::EthDst);
    }
    FlowSpec { matches, actions, ufid: None, held: None }
}

#[test]
fn packets_and_updates_need_no_allocator() {
    let config = PlannerConfig { ports: 4, flows: 2000, masks: 16, seed: 1 };
    let l1 = L1Config { capacity: 256, ports: 4, pending_ticks: 10, pending_misses: 4, age_ticks: 10 };
    let mut switch = Switch::new(SwitchConfig { l1, flows: 2000, seed: 1 });
    let mut planner = Planner::new(config, vec![switch.slots().clone()]);
    let mut retired: Vec<Retired> = Vec::with_capacity(10_000);
    let mut apply = |switch: &mut Switch, updates: Vec<Update>| {
        for update in updates {
            let (left, calls) = calls(|| switch.apply(update));
            assert_eq!(calls, 0, "an update allocates");
            retired.push(left);
            let (left, calls) = self::calls(|| switch.step());
            assert_eq!(calls, 0, "upkeep allocates");
            retired.push(left);
        }
    };
    apply(&mut switch, planner.add_port(PORT, 200).unwrap().0);
    let out = Action::Output(PortRef::Ours(PORT));
    let mut count = Count::default();
    let mut flows = Vec::new();
    for i in 0..1500u64 {
        // Straight, through a second stage, or in a way that is not remembered.
        let actions = match i % 3 {
            0 => vec![out.clone()],
            1 => vec![Action::PopVlan, Action::Recirc(1)],
            _ => vec![Action::Clone(vec![Action::Recirc(1)]), out.clone()],
        };
        let spec = flow(0, Some(i as u128), actions);
        let (added, updates) = planner.add(PORT, Source::Learned, spec, IfExists::Refuse).unwrap();
        apply(&mut switch, updates);
        flows.push(added);
        if i == 100 {
            let spec = flow(1, None, vec![out.clone()]);
            apply(&mut switch, planner.add(PORT, Source::Learned, spec, IfExists::Refuse).unwrap().1);
        }
        let mut packets: Vec<_> = (0..32)
            .map(|j| {
                let mut frame = [0u8; 60];
                frame[..6].copy_from_slice(&((i + 1).saturating_sub(j % 8 * 16)).to_be_bytes()[2..]);
                frame[12] = 0x88;
                Packet::from_frame(PORT, &frame)
            })
            .collect();
        let ((), calls) = calls(|| switch.process(i, &mut packets, &mut count));
        assert_eq!(calls, 0, "a burst allocates");
        if i % 5 == 4 {
            let oldest = flows.remove(0);
            apply(&mut switch, planner.remove(oldest).unwrap().1);
        }
    }
    for updates in planner.remove_port(PORT).unwrap() {
        apply(&mut switch, updates);
    }
    assert!(switch.tables().slab().is_empty());
    assert!(count.sent > 10_000 && count.upcalls > 100 && count.dropped > 100);
}

/// The port of a tunnel.
const INSIDE: PortId = PortId { slot: 1, generation: 1 };

struct Gre;

impl Ways for Gre {
    fn is_tunnel(&self, port: PortId) -> bool {
        port == INSIDE
    }
    fn way(&self, _: PortId, _: &Remote) -> Result<Way, String> {
        Err("nowhere".into())
    }
    fn endpoints(&self, _: &PortRef) -> Option<Arc<[Endpoint]>> {
        let (mac, local, kind, vlan) = (None, None, Kind::Gre, Vlan::Untagged);
        let end = Endpoint {
            mac,
            vlan,
            local,
            kind,
            port: 0,
            gbp: false,
            df: false,
            as_linux: true,
            in_port: INSIDE,
        };
        Some([end].into())
    }
}

#[test]
fn packets_out_of_tunnels_need_no_allocator() {
    let config = PlannerConfig { ports: 4, flows: 16, masks: 16, seed: 1 };
    let l1 = L1Config { capacity: 256, ports: 4, pending_ticks: 10, pending_misses: 4, age_ticks: 10 };
    let mut switch = Switch::new(SwitchConfig { l1, flows: 16, seed: 1 });
    let mut planner = Planner::new(config, vec![switch.slots().clone()]);
    planner.set_ways(Arc::new(Gre));
    let out = Action::Output(PortRef::Ours(PORT));
    for (id, dst, action) in [(PORT, None, Action::TnlPop(PortRef::Ours(INSIDE))), (INSIDE, Some(1), out)] {
        let mut spec = flow(0, dst, vec![action]);
        spec.matches.key.set(Field::InPort, id.slot as u128);
        let mut updates = planner.add_port(id, 200).unwrap().0;
        updates.extend(planner.add(id, Source::Learned, spec, IfExists::Refuse).unwrap().1);
        updates.into_iter().for_each(|update| drop(switch.apply(update)));
    }
    // Every fourth inner packet is for another station.
    let mut packets: Vec<_> = (0..32u8)
        .map(|i| {
            let mut frame =
                vec![2, 0, 0, 0, 0, 9, 2, 0, 0, 0, 0, 8, 8, 0, 0x45, 0, 0, 88, 0, 0, 0, 0, 64, 47, 0, 0];
            frame.extend([192, 0, 2, 1, 192, 0, 2, 2, 0x20, 0, 0x65, 0x58, 0, 0, 0, i % 3]);
            frame.extend([0, 0, 0, 0, 0, if i % 4 == 0 { 2 } else { 1 }]);
            frame.resize(102, 0x88);
            let sum = switch_core::checksum::checksum(&frame[14..34]);
            frame[24..26].copy_from_slice(&sum.to_be_bytes());
            Packet::from_frame(PORT, &frame)
        })
        .collect();
    let mut count = Count::default();
    for round in 1..4 {
        let mut burst = packets.clone();
        let ((), calls) = calls(|| switch.process(1, &mut burst, &mut count));
        assert_eq!(calls, 0, "decapsulation allocates");
        assert_eq!((count.sent, count.upcalls + count.dropped), (24 * round, 8 * round));
    }
    // Nor do those that are none.
    packets.iter_mut().for_each(|packet| packet.head_mut()[34] = 0xff);
    let ((), calls) = calls(|| switch.process(1, &mut packets, &mut count));
    assert_eq!((calls, count.sent), (0, 72));
}
