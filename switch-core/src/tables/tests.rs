//! What does not fit, and whose memory comes back.

use super::*;
use crate::action::{Action, PortRef};
use crate::flow::FlowSpec;
use crate::l1::L1Config;
use crate::planner::{IfExists, Planner, PlannerConfig};

const PORT: PortId = PortId { slot: 1, generation: 1 };

fn tables(seed: u64) -> (Tables, L1) {
    let l1 = L1Config { capacity: 64, ports: 2, pending_ticks: 10, pending_misses: 4, age_ticks: 1000 };
    (Tables::new(2, 64, Hasher::new(seed)), L1::new(l1, Hasher::new(seed + 1)))
}

fn spec(dst: u128, to: u32) -> FlowSpec {
    let mut matches = crate::flow::Match::default();
    let fields = [(Field::InPort, PORT.slot.into()), (Field::RecircId, 0), (Field::EthDst, dst)];
    for (field, value) in fields {
        matches.key.set(field, value);
        matches.mask.set_exact(field);
    }
    let actions = vec![Action::Output(PortRef::Ours(PortId { slot: to, generation: 1 }))];
    FlowSpec { matches, actions, ufid: None, held: None }
}

fn key(dst: u128) -> Key {
    spec(dst, 0).matches.key
}

/// Control, and two workers that hash differently.
struct Bench {
    planner: Planner,
    workers: [(Tables, L1); 2],
}

impl Bench {
    fn new() -> Bench {
        let workers = [1, 5].map(tables);
        let slots = workers.iter().map(|(tables, _)| tables.slab.slots().clone()).collect();
        let planner = Planner::new(PlannerConfig { ports: 2, flows: 64, masks: 8, seed: 3 }, slots);
        let mut bench = Bench { planner, workers };
        let (updates, _) = bench.planner.add_port(PORT, 64).unwrap();
        assert!(bench.apply(updates).iter().all(Retired::is_empty));
        bench
    }

    fn apply(&mut self, updates: Vec<Update>) -> Vec<Retired> {
        let each = self.workers.iter_mut().zip(updates);
        each.map(|((tables, l1), update)| {
            // To ask changes nothing, whether or not the update fits.
            tables.ask(&update);
            tables.ask_more(&update);
            tables.apply(update, l1)
        })
        .collect()
    }

    fn add(&mut self, dst: u128) -> (FlowRef, Vec<Update>) {
        self.planner.add(PORT, Source::Learned, spec(dst, 0), IfExists::Refuse).unwrap()
    }

    fn found(&self, dst: u128) -> [Option<FlowRef>; 2] {
        self.workers.each_ref().map(|(tables, _)| tables.peek(PORT, &key(dst)))
    }
}

#[test]
fn workers_share_a_flow_and_each_gives_it_back() {
    let mut bench = Bench::new();
    let (first, updates) = bench.add(1);
    let left = bench.apply(updates);
    let is_shell = |left: &Retired| matches!(left, Retired::Room(room) if room.flow.is_none() && room.subtable.is_none() && room.array.is_none());
    assert!(left.iter().all(is_shell), "{left:?}");
    let (second, updates) = bench.add(2);
    assert!(bench.apply(updates).iter().all(Retired::is_empty));
    assert_eq!((bench.found(1), bench.found(2)), ([Some(first); 2], [Some(second); 2]));
    let [a, b] = bench.workers.each_ref().map(|(tables, _)| tables.slab.get(first).unwrap());
    assert!(std::ptr::eq(a, b));

    let (replaced, updates) = bench.planner.replace(second, spec(2, 1)).unwrap();
    let left = bench.apply(updates);
    assert!(left.iter().all(|left| matches!(left, Retired::Flow(entry) if entry.flow == second)), "{left:?}");
    assert_eq!(bench.found(2), [Some(replaced); 2]);

    let (_, updates) = bench.planner.remove(first).unwrap();
    let left = bench.apply(updates);
    assert!(left.iter().all(|left| matches!(left, Retired::Flow(entry) if entry.flow == first)), "{left:?}");
    assert_eq!((bench.found(1), bench.found(2)), ([None; 2], [Some(replaced); 2]));
    let (_, updates) = bench.planner.remove(replaced).unwrap();
    let left = bench.apply(updates);
    assert!(left.iter().all(
        |left| matches!(left, Retired::LastFlow(entry, table) if entry.flow == replaced && table.is_empty())
    ));
    let (tables, _) = &bench.workers[0];
    assert!(tables.slab.is_empty() && tables.port(PORT).unwrap().masked().masks() == 0);
}

#[test]
fn what_does_not_fit_changes_nothing_and_comes_back_whole() {
    let mut bench = Bench::new();
    let (first, updates) = bench.add(1);
    bench.apply(updates);
    // Updates that never arrive: what comes after them does not fit.
    let (second, lost) = bench.add(2);
    drop(lost);
    let (third, updates) = bench.planner.replace(second, spec(2, 1)).unwrap();
    let left = bench.apply(updates);
    assert!(left.iter().all(|left| matches!(left, Retired::Flow(entry) if entry.flow == third)), "{left:?}");
    let (_, updates) = bench.planner.remove(third).unwrap();
    assert!(bench.apply(updates).iter().all(Retired::is_empty));
    // The subtable of another mask never came; nor has a port of that slot, or a flow of that index.
    let mut wide = spec(3, 0);
    wide.matches.mask.set_exact(Field::EthSrc);
    let (wider, lost) = bench.planner.add(PORT, Source::Explicit, wide.clone(), IfExists::Refuse).unwrap();
    drop(lost);
    wide.matches.key.set(Field::EthSrc, 1);
    let (another, updates) = bench.planner.add(PORT, Source::Explicit, wide, IfExists::Refuse).unwrap();
    let left = bench.apply(updates);
    assert!(
        left.iter().all(|left| matches!(left, Retired::Flow(entry) if entry.flow == another)),
        "{left:?}"
    );
    let (_, updates) = bench.add(4);
    let bad = |change: fn(&mut Place)| -> Vec<Update> {
        let bad = updates.iter().map(|update| {
            let Update::AddFlow(entry, place) = update else { panic!("{update:?}") };
            let mut place = *place;
            change(&mut place);
            Update::AddFlow(entry.clone(), place)
        });
        bad.collect()
    };
    for updates in
        [bad(|place| place.port = 0), bad(|place| place.port = 9), bad(|place| place.flow.index = 64)]
    {
        let left = bench.apply(updates);
        assert!(left.iter().all(|left| matches!(left, Retired::Flow(_))), "{left:?}");
    }
    for (tables, _) in &bench.workers {
        assert_eq!((tables.slab.len(), tables.port(PORT).unwrap().masked().masks()), (1, 1));
        assert!(tables.slab.get(wider).is_none() && tables.slab.get(another).is_none());
    }
    assert_eq!((bench.found(1), bench.found(2)), ([Some(first); 2], [None; 2]));
}
