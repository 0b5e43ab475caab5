use super::*;
use proptest::prelude::*;
use std::collections::BTreeSet;

const TICK: Millis = 250;

/// A device that does what it is told by the next tick, and traffic.
struct World {
    policy: Policy,
    now: Millis,
    rates: Vec<f64>,
    packets: Vec<f64>,
    inside: BTreeSet<Id>,
    /// Flows that went in or out.
    changes: usize,
    since: HashMap<Id, Millis>,
}

fn limits(max_rules: u32) -> Limits {
    Limits { max_rules, min_rate: 10.0, churn: 4 }
}

impl World {
    fn new(limits: Limits, rates: Vec<f64>) -> World {
        let mut policy = Policy::new(limits);
        (0..rates.len() as Id).for_each(|id| policy.add(id, 1, 0, 0));
        let packets = vec![0.0; rates.len()];
        World { policy, now: 0, rates, packets, inside: BTreeSet::new(), changes: 0, since: HashMap::new() }
    }

    /// One tick, after which the device has done all. Gives what was decided.
    fn tick(&mut self) -> Decision {
        self.now += TICK;
        for (packets, rate) in self.packets.iter_mut().zip(&self.rates) {
            *packets += rate * TICK as f64 / 1000.0;
        }
        for id in self.policy.next_samples(self.rates.len()) {
            self.policy.sample(id, self.packets[id as usize] as u64, self.now);
        }
        let decision = self.policy.tick(self.now);
        for &id in &decision.remove {
            assert!(self.inside.remove(&id));
            assert!(self.now - self.since[&id] >= RESIDENCE, "it has only just come");
            self.policy.leaving(id, self.now);
        }
        for &id in &decision.insert {
            assert!(self.inside.insert(id));
            self.since.insert(id, self.now);
            self.policy.entering(id, self.now);
        }
        decision.remove.iter().for_each(|&id| self.policy.left(id, self.now));
        decision.insert.iter().for_each(|&id| self.policy.entered(id, self.now));
        let Limits { max_rules, churn, .. } = self.policy.limits();
        assert!(self.inside.len() <= max_rules as usize);
        let changes = decision.insert.len() + decision.remove.len();
        assert!(changes <= churn, "{decision:?}");
        self.changes += changes;
        decision
    }

    fn run(&mut self, ticks: usize) {
        (0..ticks).for_each(|_| drop(self.tick()));
    }
}

proptest! {
    /// Whatever the rates, and however they change: never more rules or changes than allowed, and when rates stay as they are,
    /// the hottest are in and nothing changes any more.
    #[test]
    fn the_hottest_are_in_and_then_it_is_quiet(
        first in prop::collection::vec(0.0..1000.0f64, 1..40),
        second in prop::collection::vec(0.0..1000.0f64, 40),
        max_rules in 0..30u32,
    ) {
        let count = first.len();
        let mut world = World::new(limits(max_rules), first);
        for _ in 0..2 {
            world.run(240);
            world.changes = 0;
            world.run(80);
            prop_assert_eq!(world.changes, 0, "it goes on for ever");
            let threshold = world.policy.threshold();
            let out: Vec<f64> = (0..count)
                .filter(|id| !world.inside.contains(&(*id as Id)))
                .map(|id| world.rates[id])
                .collect();
            let coldest = world.inside.iter().map(|&id| world.rates[id as usize]).fold(f64::MAX, f64::min);
            let has_room = world.inside.len() < max_rules as usize;
            for rate in out {
                let may_be_out = match has_room {
                    true => rate < threshold * 1.05,
                    false => rate < threshold * 1.05 || rate <= coldest * MARGIN * 1.05,
                };
                prop_assert!(may_be_out, "{} is out, {} in, threshold {}", rate, coldest, threshold);
            }
            world.rates = second[..count].to_vec();
        }
    }

    /// Flows come and go, and devices fail: what is counted as used is what is in.
    #[test]
    fn room_is_accounted_for(steps in prop::collection::vec((0..6u8, 0..8u32), 1..200)) {
        let mut policy = Policy::new(limits(5));
        let (mut now, mut ghosts) = (0, 0);
        for (what, id) in steps {
            now += 10;
            let place = policy.place(id);
            match (what, place) {
                (0, Place::Out) => policy.add(id, 1 + id % 2, 0, now),
                (1, Place::Out) => policy.entering(id, now),
                (2, Place::Entering) => policy.entered(id, now),
                (2, Place::Inside) => policy.leaving(id, now),
                (3, Place::Entering) => policy.failed(id, Failure::NoSpace, now),
                (3, Place::Leaving) => policy.left(id, now),
                (4, _) => ghosts += policy.remove(id),
                (5, _) => policy.vanished(std::mem::take(&mut ghosts)),
                _ => {}
            }
            let held = policy.flows.iter().filter(|flow| flow.place != Place::Out);
            prop_assert_eq!(policy.used, held.map(|flow| flow.cost).sum::<u32>() + ghosts);
            let leaving = policy.flows.iter().filter(|flow| flow.place == Place::Leaving).count();
            prop_assert_eq!(policy.leaving, leaving);
        }
    }
}

#[test]
fn equal_rates_do_not_change_places() {
    // Of 20 flows, 5 are in; rates differ by less than the margin, and by turns.
    let mut world = World::new(limits(5), vec![100.0; 20]);
    world.run(20);
    let inside = world.inside.clone();
    assert_eq!(inside.len(), 5);
    world.changes = 0;
    for round in 0..200 {
        world.rates = (0..20).map(|id| if (id + round) % 2 == 0 { 95.0 } else { 110.0 }).collect();
        world.tick();
    }
    assert_eq!((world.changes, &world.inside), (0, &inside));
}

#[test]
fn a_hotter_flow_takes_the_place_of_the_coldest() {
    let mut world = World::new(limits(2), vec![100.0, 200.0, 0.0]);
    world.run(20);
    assert_eq!(world.inside, [0, 1].into());
    world.rates[2] = 120.0;
    world.run(40);
    assert_eq!(world.inside, [0, 1].into(), "a fifth is not enough");
    world.rates[2] = 150.0;
    world.run(40);
    assert_eq!(world.inside, [1, 2].into());
}

#[test]
fn young_flows_wait_unless_they_have_had_many_packets() {
    let mut policy = Policy::new(limits(4));
    policy.add(1, 1, 1000, 0); // packets of before do not count
    policy.add(2, 1, 0, 0);
    policy.sample(1, 1000 + EARLY, 250);
    policy.sample(2, EARLY + 1, 250);
    assert_eq!(policy.tick(250).insert, [2]);
    policy.sample(1, 1000 + EARLY, 900);
    assert_eq!(policy.tick(999).insert, [2], "it was not told that it is in");
    policy.entering(2, 999);
    assert_eq!(policy.tick(1000).insert, [1]);
    assert!(policy.is_waiting(1) && !policy.is_waiting(2));
}

#[test]
fn full_tables_want_hotter_flows_than_empty_ones() {
    let mut policy = Policy::new(Limits { max_rules: 10, min_rate: 10.0, churn: 99 });
    for id in 0..10 {
        policy.add(id, 1, 0, 0);
        if id < 9 {
            policy.entering(id, 0);
            policy.entered(id, 0);
        }
    }
    assert!((policy.threshold() - 34.0).abs() < 0.1, "{}", policy.threshold());
    // 20 packets a second.
    (1..=20).for_each(|i| policy.sample(9, i * 20, i * 1000));
    assert!(policy.is_waiting(9) && policy.tick(20_000).insert.is_empty());
    (0..9).for_each(|id| policy.left(id, 20_000));
    assert_eq!(policy.tick(20_000).insert, [9]);
}

#[test]
fn want_of_room_is_waited_for_longer_and_longer() {
    let mut policy = Policy::new(limits(100));
    policy.add(1, 1, 0, 0);
    policy.add(2, 1, 0, 0);
    let mut tried = Vec::new();
    for now in (250..60_000).step_by(250) {
        policy.sample(1, now, now);
        policy.sample(2, now / 2, now);
        for id in policy.tick(now).insert {
            policy.entering(id, now);
            policy.failed(id, Failure::NoSpace, now);
            tried.push((id, now));
        }
    }
    // Both, until the device has refused; then in pauses that double.
    assert!((8..=20).contains(&tried.len()), "{tried:?}");
    let (last, before) = (tried[tried.len() - 1].1, tried[tried.len() - 3].1);
    assert!(last - before >= 8000, "{tried:?}");
    // While that lasts there is room for what was in.
    assert_eq!(policy.used, 0);
    // A busy device is left alone for a moment, as a whole.
    let mut policy = Policy::new(limits(100));
    policy.add(1, 1, 0, 0);
    policy.sample(1, 100, 250);
    policy.entering(1, 250);
    policy.failed(1, Failure::Busy, 250);
    assert!(policy.tick(499).insert.is_empty());
    assert_eq!(policy.tick(500).insert, [1]);
}

#[test]
fn what_leaves_already_makes_room_for_as_many() {
    let mut policy = Policy::new(limits(2));
    (0..4).for_each(|id| policy.add(id, 1, 0, 0));
    for id in 0..2 {
        policy.entering(id, 0);
        policy.entered(id, 0);
    }
    let sample = |policy: &mut Policy, now: Millis| {
        [10, 20, 100, 200].iter().zip(0..).for_each(|(rate, id)| policy.sample(id, rate * now / 1000, now));
    };
    (1..=4).for_each(|second| sample(&mut policy, second * 1000));
    assert_eq!(policy.tick(4000).remove, [0, 1]);
    policy.leaving(0, 4000);
    assert_eq!(policy.tick(4000).remove, [1], "one place is on its way already");
    policy.leaving(1, 4000);
    assert_eq!(policy.tick(4250), Decision::default());
    policy.left(0, 4250);
    assert_eq!(policy.tick(4250).insert, [3]);
}
