//! Which worker polls which queue: the rule for queues that nobody has pinned, and when one of them moves.
//!
//! A queue goes to the worker that has the least to do when its port is opened. While the daemon runs, what packets of each
//! queue cost is measured in cycles, over windows of [`WINDOW`]. At the end of a window one queue may move: from a worker
//! that is busy for [`BUSY`] of the time at least, to one that would be less busy with it than the first was before, by a
//! clear [`MARGIN`]. Under a load that stays as it is this comes to an end: each move lowers the sum of the squares of the
//! workers' loads by 2·`MARGIN`² at least. A load that changes with the moves, as that of a guest that wants more than it
//! gets, or from one window to the next, is what [`HOLD`] is for.
//!
//! Nothing here reads a clock or knows of threads.

use std::collections::{HashMap, HashSet};
use switch_core::packet::PortId;

/// Milliseconds of some clock that only goes forward.
pub type Millis = u64;

/// How long loads are measured before a queue may move, in milliseconds; so there is one move in this time at most.
pub const WINDOW: Millis = 5_000;
/// How long a queue that has moved stays where it is, in milliseconds.
pub const HOLD: Millis = 60_000;
/// Thousandths of its time that a worker is busy at least for a queue to leave it: below, there is no need.
pub const BUSY: u32 = 600;
/// By how many thousandths of a worker's time the busier of the two is less busy after a move, at least.
pub const MARGIN: u32 = 100;
/// What loads are rounded to, in thousandths, where a new queue is placed: less says little.
const STEP: u32 = 10;

/// A queue of a port.
#[derive(Clone, Copy, PartialEq, Eq, Debug, PartialOrd, Ord, Hash)]
pub struct QueueId {
    /// The port.
    pub port: PortId,
    /// Index of the queue pair.
    pub queue: usize,
}

/// What there is to know of a queue at some time.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct QueueSample {
    /// Which.
    pub id: QueueId,
    /// The worker that polls it.
    pub worker: usize,
    /// Whether it must stay there.
    pub pinned: bool,
    /// Cycles that its packets have cost so far, on all workers.
    pub cycles: u64,
}

/// What there is to know at some time.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Sample {
    /// When.
    pub now: Millis,
    /// Cycles in which each worker was busy so far, with queues and with all else.
    pub busy: Vec<u64>,
    /// All queues.
    pub queues: Vec<QueueSample>,
}

/// A queue that is to move.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Move {
    /// Which.
    pub id: QueueId,
    /// The worker that polls it.
    pub from: usize,
    /// The worker that is to poll it.
    pub to: usize,
}

/// What a queue costs, in thousandths of a worker's time.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct QueueLoad {
    /// Which.
    pub id: QueueId,
    /// The worker that polls it.
    pub worker: usize,
    /// Whether it must stay there.
    pub pinned: bool,
    /// Thousandths of the time.
    pub load: u32,
}

/// The loads of a window, in thousandths of the time.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Loads {
    /// How busy each worker was.
    pub workers: Vec<u32>,
    /// The queues that were there all the time.
    pub queues: Vec<QueueLoad>,
}

impl Loads {
    /// What happened from one sample to another, of so many cycles to a millisecond; `None` if no time has passed.
    fn between(then: &Sample, now: &Sample, cycles_per_milli: u64) -> Option<Loads> {
        let elapsed =
            now.now.checked_sub(then.now)?.checked_mul(cycles_per_milli).filter(|&cycles| cycles > 0)?;
        let share = |from: u64, to: u64| {
            let cycles = u128::from(to.saturating_sub(from)).min(elapsed.into());
            (cycles * 1000 / u128::from(elapsed)) as u32
        };
        let before: HashMap<QueueId, u64> =
            then.queues.iter().map(|queue| (queue.id, queue.cycles)).collect();
        let queue = |&QueueSample { id, worker, pinned, cycles }: &QueueSample| {
            Some(QueueLoad { id, worker, pinned, load: share(*before.get(&id)?, cycles) })
        };
        Some(Loads {
            workers: then.busy.iter().zip(&now.busy).map(|(&from, &to)| share(from, to)).collect(),
            queues: now.queues.iter().filter_map(queue).collect(),
        })
    }
}

/// The move that lowers the load of the busier of two workers most, if one is worth while.
pub fn best_move(loads: &Loads, may_move: impl Fn(QueueId) -> bool) -> Option<Move> {
    let movable = loads.queues.iter().filter(|queue| !queue.pinned && may_move(queue.id));
    let gains = movable.flat_map(|queue| {
        let from = loads.workers.get(queue.worker).copied().filter(|&load| load >= BUSY);
        let others = loads.workers.iter().enumerate().filter(|(to, _)| *to != queue.worker);
        others.filter_map(move |(to, &there)| {
            let rest = from?.checked_sub(there)?.checked_sub(queue.load)?;
            let gain = rest.min(queue.load);
            (gain >= MARGIN).then_some((gain, Move { id: queue.id, from: queue.worker, to }))
        })
    });
    // Of several that gain the same, the first: the answer does not depend on chance.
    gains.reduce(|best, next| if next.0 > best.0 { next } else { best }).map(|(_, best)| best)
}

/// Measures, and decides about one queue at a time.
#[derive(Default, Debug)]
pub struct Balancer {
    cycles_per_milli: u64,
    /// The beginning of the window.
    then: Option<Sample>,
    /// The loads of the last whole window.
    loads: Loads,
    /// Queues that have moved, and when.
    moved: Vec<(QueueId, Millis)>,
}

impl Balancer {
    /// Nothing is known yet. There are so many cycles to a millisecond.
    pub fn new(cycles_per_milli: u64) -> Balancer {
        Balancer { cycles_per_milli, ..Balancer::default() }
    }

    /// When the window ends that has begun, or begins at `now`.
    pub fn due(&self, now: Millis) -> Millis {
        self.then.as_ref().map_or(now, |then| then.now.saturating_add(WINDOW))
    }

    /// Whether there is reason to [`look`](Balancer::look).
    pub fn is_due(&self, now: Millis) -> bool {
        now >= self.due(now)
    }

    /// Takes what there is to know now; at the end of a window it gives the move that is worth while, if there is one. Who
    /// carries it out says so by [`Balancer::moved`].
    pub fn look(&mut self, sample: Sample) -> Option<Move> {
        let Some(then) = &self.then else {
            self.then = Some(sample);
            return None;
        };
        if !self.is_due(sample.now) {
            return None;
        }
        let now = sample.now;
        self.loads = Loads::between(then, &sample, self.cycles_per_milli).unwrap_or_default();
        self.then = Some(sample);
        self.moved.retain(|(_, when)| now.saturating_sub(*when) < HOLD);
        best_move(&self.loads, |id| self.moved.iter().all(|(moved, _)| *moved != id))
    }

    /// A queue has moved, for whatever reason: what was measured before says nothing about the workers now.
    pub fn moved(&mut self, id: QueueId, now: Millis) {
        self.moved.retain(|(moved, _)| *moved != id);
        self.moved.push((id, now));
        self.then = None;
    }

    /// The workers for so many new queues of a port, where there are these already. Where loads are known, the one that has
    /// least to do gets the next queue; one that is not measured yet counts as an average one. Of equals, the one with fewest
    /// queues gets it, of which those of higher index do not count as long as there are such: guests and devices use queues
    /// from the first on.
    pub fn place(&self, workers: usize, there: &[QueueSample], count: usize) -> Vec<usize> {
        let known = &self.loads.queues;
        let measured: HashSet<QueueId> = known.iter().map(|queue| queue.id).collect();
        let sum: u32 = known.iter().map(|queue| queue.load).sum();
        let average = if known.is_empty() { 0 } else { (sum / known.len() as u32).max(STEP) };
        let busy = |worker: usize| self.loads.workers.get(worker).map_or(0, |load| load / STEP * STEP);
        let mut has: Vec<(u32, Vec<usize>)> = (0..workers).map(|worker| (busy(worker), Vec::new())).collect();
        for QueueSample { id, worker, .. } in there {
            if let Some((load, queues)) = has.get_mut(*worker) {
                queues.push(id.queue);
                *load += if measured.contains(id) { 0 } else { average };
            }
        }
        let mut place = |queue: usize| {
            let rank = |(load, queues): &(u32, Vec<usize>)| {
                (*load, queues.iter().filter(|&&other| other <= queue).count(), queues.len())
            };
            let (worker, (load, queues)) = has.iter_mut().enumerate().min_by_key(|(_, has)| rank(has))?;
            *load += average;
            queues.push(queue);
            Some(worker)
        };
        (0..count).map(|queue| place(queue).unwrap_or(0)).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const PER_MILLI: u64 = 1_000;

    fn id(slot: usize) -> QueueId {
        QueueId { port: PortId { slot: slot as u32, generation: 1 }, queue: 0 }
    }

    /// Workers under a load that does not change by itself.
    #[derive(Clone, Debug)]
    struct World {
        /// What each queue wants, in thousandths of a worker; where it is polled; whether it is pinned.
        queues: Vec<(u32, usize, bool)>,
        /// What each worker does besides.
        other: Vec<u32>,
        busy: Vec<u64>,
        cycles: Vec<u64>,
        now: Millis,
    }

    impl World {
        fn new(queues: Vec<(u32, usize, bool)>, other: Vec<u32>) -> World {
            let (busy, cycles) = (vec![0; other.len()], vec![0; queues.len()]);
            World { queues, other, busy, cycles, now: 7 }
        }

        /// What each queue of a worker gets: what it wants, or an equal share of what is left where there is too little.
        fn shares(&self, worker: usize) -> Vec<(usize, u32)> {
            let mut here: Vec<(usize, u32)> =
                (0..).zip(&self.queues).filter(|(_, q)| q.1 == worker).map(|(i, q)| (i, q.0)).collect();
            here.sort_by_key(|&(_, wants)| wants);
            let (mut left, mut waiting) = (1000 - self.other[worker].min(1000), here.len() as u32);
            for (_, wants) in &mut here {
                *wants = (*wants).min(left / waiting);
                left -= *wants;
                waiting -= 1;
            }
            here
        }

        fn load(&self, worker: usize) -> u32 {
            self.other[worker].min(1000) + self.shares(worker).iter().map(|(_, share)| share).sum::<u32>()
        }

        fn pass(&mut self, millis: Millis) {
            self.now += millis;
            for worker in 0..self.other.len() {
                self.busy[worker] += u64::from(self.load(worker)) * millis * PER_MILLI / 1000;
                for (queue, share) in self.shares(worker) {
                    self.cycles[queue] += u64::from(share) * millis * PER_MILLI / 1000;
                }
            }
        }

        fn sample(&self) -> Sample {
            let queue =
                |(i, &(_, worker, pinned))| QueueSample { id: id(i), worker, pinned, cycles: self.cycles[i] };
            Sample {
                now: self.now,
                busy: self.busy.clone(),
                queues: (0..).zip(&self.queues).map(queue).collect(),
            }
        }

        /// Looks once a second, for so many windows, and does what is decided. Gives the moves and when they were.
        fn run(&mut self, balancer: &mut Balancer, windows: u64) -> Vec<(Millis, Move)> {
            let mut moves = Vec::new();
            for _ in 0..windows * WINDOW / 1000 {
                self.pass(1000);
                if let Some(step) = balancer.look(self.sample()) {
                    self.queues[step.id.port.slot as usize].1 = step.to;
                    balancer.moved(step.id, self.now);
                    moves.push((self.now, step));
                }
            }
            moves
        }
    }

    fn worlds(wants: std::ops::Range<u32>) -> impl Strategy<Value = World> {
        (2..6usize).prop_flat_map(move |workers| {
            let queue = (wants.clone(), 0..workers, prop::bool::weighted(0.2));
            (prop::collection::vec(queue, 1..20), prop::collection::vec(0..200u32, workers))
                .prop_map(|(queues, other)| World::new(queues, other))
        })
    }

    proptest! {
        #[test]
        fn a_steady_load_is_balanced_and_then_left_alone(mut world in worlds(0..150)) {
            // Nobody wants more than there is.
            prop_assume!((0..world.other.len()).all(|worker| {
                let wanted: u32 = world.queues.iter().filter(|q| q.1 == worker).map(|q| q.0).sum();
                wanted + world.other[worker] <= 1000
            }));
            let mut balancer = Balancer::new(PER_MILLI);
            let before = world.clone();
            let squares = |world: &World| (0..world.other.len()).map(|w| world.load(w).pow(2)).sum::<u32>();
            let worst = |world: &World| (0..world.other.len()).map(|w| world.load(w)).max();
            let moves = world.run(&mut balancer, 60);
            prop_assert!(worst(&world) <= worst(&before));
            prop_assert!(squares(&world) + 2 * MARGIN.pow(2) * moves.len() as u32 <= squares(&before));
            // No queue has come back, and no move is left that is worth while.
            let mut again = world.clone();
            prop_assert_eq!(again.run(&mut Balancer::new(PER_MILLI), 30), vec![]);
        }

        #[test]
        fn what_moves_may_move_and_not_too_often(mut world in worlds(0..3000)) {
            let before = world.clone();
            let moves = world.run(&mut Balancer::new(PER_MILLI), 100);
            for (i, (when, step)) in moves.iter().enumerate() {
                prop_assert!(!before.queues[step.id.port.slot as usize].2, "{step:?} is pinned");
                prop_assert!(step.from != step.to && step.to < before.other.len());
                for (later, other) in &moves[i + 1..] {
                    prop_assert!(later - when >= WINDOW);
                    prop_assert!(other.id != step.id || later - when >= HOLD);
                }
            }
        }

        #[test]
        fn guests_that_want_more_than_there_is_do_not_chase_each_other(mut world in worlds(0..3000)) {
            let (mut balancer, queues) = (Balancer::new(PER_MILLI), world.queues.len() as u64);
            world.run(&mut balancer, 100 + 50 * queues);
            let late = world.run(&mut balancer, 200);
            prop_assert_eq!(late, vec![]);
        }

        #[test]
        fn the_decision_is_the_best_for_the_busier_of_the_two(world in worlds(0..600)) {
            let worker = |i: usize| world.load(i);
            let queue = |(i, q): (usize, &(u32, usize, bool))| QueueLoad { id: id(i), worker: q.1, pinned: q.2, load: q.0 };
            let loads = Loads {
                workers: (0..world.other.len()).map(worker).collect(),
                queues: world.queues.iter().enumerate().map(queue).collect(),
            };
            let gain = |queue: &QueueLoad, to: usize| {
                let [from, to] = [queue.worker, to].map(|worker| i64::from(loads.workers[worker]));
                from - (from - i64::from(queue.load)).max(to + i64::from(queue.load))
            };
            let gains = loads.queues.iter().filter(|q| !q.pinned && loads.workers[q.worker] >= BUSY).flat_map(|q| {
                (0..loads.workers.len()).filter(|&to| to != q.worker).map(move |to| gain(q, to))
            });
            let best = gains.max().filter(|&gain| gain >= MARGIN.into());
            let chosen = best_move(&loads, |_| true).map(|step| {
                let queue = loads.queues.iter().find(|queue| queue.id == step.id).unwrap();
                gain(queue, step.to)
            });
            prop_assert_eq!(chosen, best);
        }
    }

    #[test]
    fn a_busy_worker_gives_a_queue_away_and_keeps_the_one_it_is_busy_with() {
        let mut world = World::new(vec![(700, 0, false), (200, 0, false), (50, 1, false)], vec![0, 0]);
        let moves = world.run(&mut Balancer::new(PER_MILLI), 50);
        let moves: Vec<Move> = moves.into_iter().map(|(_, step)| step).collect();
        assert_eq!(moves, [Move { id: id(1), from: 0, to: 1 }]);
        // One that nobody is short of time for stays, and so does what cannot be parted.
        for queues in [vec![(300, 0, false), (250, 0, false)], vec![(1000, 0, false), (90, 0, false)]] {
            assert_eq!(World::new(queues, vec![0, 0]).run(&mut Balancer::new(PER_MILLI), 50), []);
        }
    }

    #[test]
    fn a_move_by_hand_begins_a_new_window() {
        let mut world = World::new(vec![(500, 0, false), (400, 0, false)], vec![0, 0]);
        let mut balancer = Balancer::new(PER_MILLI);
        assert_eq!(balancer.look(world.sample()), None);
        world.pass(WINDOW - 1);
        balancer.moved(id(0), world.now);
        assert_eq!(balancer.look(world.sample()), None);
        world.pass(WINDOW - 1);
        assert_eq!(balancer.look(world.sample()), None);
        world.pass(1);
        // It has just been moved by hand, so the other one goes.
        assert_eq!(balancer.look(world.sample()), Some(Move { id: id(1), from: 0, to: 1 }));
    }

    #[test]
    fn a_new_queue_goes_where_there_is_least_to_do() {
        let there = |queues: &[(u32, usize, bool)]| World::new(queues.to_vec(), vec![0; 3]).sample().queues;
        let nothing = Balancer::new(PER_MILLI);
        assert_eq!(nothing.place(3, &[], 5), [0, 1, 2, 0, 1]);
        assert_eq!(nothing.place(3, &there(&[(0, 0, false), (0, 2, true)]), 3), [1, 0, 1]);
        assert_eq!(nothing.place(1, &there(&[(0, 0, false)]), 2), [0, 0]);
        // A device of which eight queues might be used, and one is.
        let device = nothing.place(2, &[], 8);
        assert_eq!(device, [0, 1, 0, 1, 0, 1, 0, 1]);
        let queue = |(queue, &worker): (usize, &usize)| QueueSample {
            id: QueueId { queue, ..id(0) },
            worker,
            pinned: false,
            cycles: 0,
        };
        let device: Vec<QueueSample> = device.iter().enumerate().map(queue).collect();
        assert_eq!(nothing.place(2, &device, 1), [1]);
        // Measured: many idle queues are less than a busy one.
        let mut world =
            World::new(vec![(500, 0, true), (4, 1, false), (0, 1, false), (0, 1, false)], vec![0, 0]);
        let mut balancer = Balancer::new(PER_MILLI);
        balancer.look(world.sample());
        world.pass(WINDOW);
        balancer.look(world.sample());
        let there = world.sample().queues;
        // Each new one counts as an average one, of 126 thousandths.
        assert_eq!(balancer.place(2, &there, 6), [1, 1, 1, 1, 0, 1]);
        // One that came after the measurement counts too.
        let later = [&there[..], &[QueueSample { id: id(9), worker: 1, pinned: false, cycles: 0 }]].concat();
        assert_eq!(balancer.place(2, &later, 4), [1, 1, 1, 0]);
    }
}
