//! Which flows are to be seen alive by OVS, when, and by which worker's packets.
//!
//! OVS drops a flow whose packets it has not seen for its `max-idle`. So every third of that time each flow that has had
//! packets of ours is marked *due*: the worker sends the flow's next packet by the host path. A hand goes round all flows
//! once in that time, in an order that visits neighbours far apart, so that the marks are spread evenly however the busy
//! flows lie. Each round counts how many flows need to be seen, by how many packets they had; where that is more than the
//! budget, the next round leaves the coldest out.
//!
//! A flow that OVS has changed is marked at once, and so are the flows *from* the station that it leads to: OVS has changed its
//! mind about where that is, and what they carry may teach it better. A MAC table that was flushed is full again before
//! floods have lasted long, and a station that moves back by flows that are still there is found at once. That has a
//! budget of its own, so that it takes nothing from what keeps flows alive.

use super::Settings;
use crate::host::Millis;
use std::collections::HashSet;
use switch_core::flow::{FlowRef, FlowSpec};
use switch_core::hash::prefetch_read;
use switch_core::key::Field;
use switch_core::slab::FlowCounters;

/// Shortest and longest time between a flow's keep-alives.
const PERIOD: (Millis, Millis) = (50, 5000);
/// Flows that are looked at in a second: beyond it the hand goes round more slowly, as long as OVS does not miss it.
const LOOKS: u64 = 20_000;
/// Flows that are looked at in a second at most, whatever OVS misses.
const MAX_LOOKS: u64 = 100_000;
/// So many steps before a flow is looked at, what is kept of it is asked for, and then its counters: each is a cache miss,
/// and they are all that a look costs.
const AHEAD: (u64, u64) = (16, 8);
/// Beyond the 64th, workers are left out: their flows are asked for of the others.
const MAX_WORKERS: usize = u64::BITS as usize;
/// Classes of packets since the last look: powers of two.
const HEATS: usize = 32;
/// 2^64 by the golden ratio: its multiples lie evenly.
const GOLDEN: u64 = 0x9e37_79b9_7f4a_7c15;
/// Part of the budget that there is, besides, for flows that OVS has changed.
const EARLY: u64 = 4;
/// Another odd number without pattern.
const ODD: u64 = 0xd1b5_4a32_d192_ed03;

/// Where a flow is from and where it leads to, as far as it matches that exactly.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Ends {
    /// Slot of its ingress port, whose budget its keep-alives use.
    pub port: u32,
    /// The station that sends.
    pub from: Option<u64>,
    /// The station that it is for; none for a group.
    pub to: Option<u64>,
}

impl Ends {
    /// Those of a flow.
    pub fn of(spec: &FlowSpec) -> Ends {
        let address = |field| {
            let exact = spec.matches.mask.is_exact(field);
            exact.then(|| spec.matches.key.get(field) as u64)
        };
        let is_group = |address: &u64| address >> 40 & 1 != 0;
        Ends {
            port: spec.matches.key.get(Field::InPort) as u32,
            from: address(Field::EthSrc),
            to: address(Field::EthDst).filter(|address| !is_group(address)),
        }
    }
}

/// What is kept of a flow.
struct Pulse {
    generation: u32,
    /// Slot of its ingress port, whose budget it uses.
    port: u32,
    /// The station that it is from.
    from: Option<u64>,
    /// The workers, as bits, that were asked for a keep-alive and had not given it at the last look.
    asked: u64,
    /// When the last keep-alive was asked for, or the flow came.
    kept: Millis,
    /// Whether it has not been asked for since it came: the packet that it came for counts as one of its own.
    is_new: bool,
    given_up: bool,
}

/// What is kept of a flow and a worker.
#[derive(Default)]
struct Watched {
    counters: Option<FlowCounters>,
    /// Packets at the last look.
    seen: u64,
}

impl Watched {
    /// Packets in all.
    fn packets(&self) -> u64 {
        self.counters.as_ref().map_or(0, |counters| counters.read().packets)
    }

    /// Whether the worker has yet to give the keep-alive that it was asked for.
    fn is_due(&self) -> bool {
        self.counters.as_ref().is_some_and(|counters| counters.is_due())
    }

    /// Asks the worker for a keep-alive; false if it has not taken the flow up yet.
    fn set_due(&self) -> bool {
        self.counters.as_ref().is_some_and(|counters| counters.set_due())
    }
}

/// Which of the flows that need a keep-alive get one.
#[derive(Clone, Copy)]
struct Quota {
    /// Hotter flows do, colder ones do not.
    floor: usize,
    /// How many of 2^32 do of those just as hot.
    share: u64,
}

const ALL: Quota = Quota { floor: 0, share: 1 << 32 };

impl Quota {
    /// The hottest `allowance` of the flows counted in `heat`.
    fn of(heat: &[u64; HEATS], allowance: u64) -> Quota {
        let mut hotter = 0;
        for floor in (0..HEATS).rev() {
            if hotter + heat[floor] > allowance {
                return Quota { floor, share: ((allowance - hotter) << 32) / heat[floor] };
            }
            hotter += heat[floor];
        }
        ALL
    }

    /// The same flows of a heat in every round: `index` decides, without pattern.
    fn admits(self, heat: usize, index: u32) -> bool {
        heat > self.floor || heat == self.floor && (index as u64).wrapping_mul(ODD) >> 32 < self.share
    }

    /// How many of `count` flows of that heat it admits.
    fn part(self, heat: usize, count: u64) -> u64 {
        match heat.cmp(&self.floor) {
            std::cmp::Ordering::Greater => count,
            std::cmp::Ordering::Equal => (count * self.share) >> 32,
            std::cmp::Ordering::Less => 0,
        }
    }
}

/// A budget in this round.
struct Budget {
    quota: Quota,
    /// Flows that need a keep-alive, by heat.
    heat: [u64; HEATS],
    used: u64,
    /// Keep-alives of flows that OVS has changed.
    early: u64,
}

impl Default for Budget {
    fn default() -> Self {
        Budget { quota: ALL, heat: [0; HEATS], used: 0, early: 0 }
    }
}

impl Budget {
    /// Whether it lasts, spent no faster than the round goes, but for a sixteenth.
    fn lasts(&self, allowance: u64, done: u64, size: u64) -> bool {
        self.used < (allowance * done / size + allowance / 16).min(allowance).max(1)
    }
}

/// Rates of the last round.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Rates {
    /// Keep-alives asked for, a second.
    pub asked: u64,
    /// Keep-alives that would have been needed, a second.
    pub needed: u64,
}

/// All flows that need to be kept alive.
pub struct KeepAlive {
    settings: Settings,
    /// By flow index.
    slots: Vec<Option<Pulse>>,
    /// By flow index and worker.
    watched: Vec<Watched>,
    workers: usize,
    live: usize,
    /// Steps of a round: a power of two, no less than there are slots.
    size: u64,
    /// Steps done of this round.
    done: u64,
    started: Millis,
    last_turn: Millis,
    /// By port slot.
    ports: Vec<Budget>,
    total: Budget,
    given_up: usize,
    asked: u64,
    rates: Rates,
    /// Indexes of flows that OVS is to see at once.
    early: Vec<u32>,
    /// Stations whose flows it is to see at once.
    stations: HashSet<u64>,
}

impl KeepAlive {
    /// No flows.
    pub fn new(settings: Settings) -> KeepAlive {
        KeepAlive {
            settings,
            slots: Vec::new(),
            watched: Vec::new(),
            workers: 0,
            live: 0,
            size: 1,
            done: 0,
            started: 0,
            last_turn: 0,
            ports: Vec::new(),
            total: Budget::default(),
            given_up: 0,
            asked: 0,
            rates: Rates::default(),
            early: Vec::new(),
            stations: HashSet::new(),
        }
    }

    /// Other settings, from now on.
    pub fn set(&mut self, settings: Settings, now: Millis) {
        self.settings = settings;
        // The hand stays where it is.
        self.started = now.saturating_sub(self.done * self.round() / self.size);
        self.last_turn = now;
    }

    /// Time between two keep-alives of a flow, as far as its packets allow.
    pub fn period(&self) -> Millis {
        (self.settings.max_idle / 3).clamp(PERIOD.0, PERIOD.1)
    }

    /// Time in which the hand goes round.
    fn round(&self) -> Millis {
        // A look is some cache misses in a row. A flow that is busy is seen soon after its mark.
        let late = self.settings.max_idle * 3 / 5;
        let lazy = (self.size * 1000 / LOOKS).min(late);
        self.period().max(lazy).max(self.size * 1000 / MAX_LOOKS)
    }

    /// Time from one [`KeepAlive::turn`] to the next; none if there are no flows.
    pub fn tick(&self) -> Option<Millis> {
        (self.live != 0).then(|| (self.round() / 64).clamp(10, 50))
    }

    /// Flows that need a keep-alive and get none.
    pub fn given_up(&self) -> usize {
        self.given_up
    }

    /// What the last round came to.
    pub fn rates(&self) -> Rates {
        self.rates
    }

    /// A flow is in the tables, or has a new generation there, in which case its statistics went on. It has counters of each
    /// worker, as all flows have.
    pub fn add(&mut self, flow: FlowRef, ends: Ends, counters: &[FlowCounters], now: Millis) {
        let Ends { port, from, to } = ends;
        let index = flow.index as usize;
        if index >= self.slots.len() {
            if self.slots.is_empty() {
                self.workers = counters.len().min(MAX_WORKERS);
            }
            self.slots.resize_with(index + 1, || None);
            self.watched.resize_with(self.slots.len() * self.workers, Watched::default);
            while self.size < self.slots.len() as u64 {
                self.size *= 2;
                self.done *= 2;
            }
        }
        let mut is_known = false;
        match &mut self.slots[index] {
            Some(pulse) if pulse.port == port => {
                is_known = true;
                if pulse.generation != flow.generation {
                    self.early.push(flow.index);
                    self.stations.extend(to);
                }
                (pulse.generation, pulse.from) = (flow.generation, from);
            }
            slot => {
                let old = slot.replace(Pulse {
                    generation: flow.generation,
                    port,
                    from,
                    asked: 0,
                    kept: now,
                    is_new: true,
                    given_up: false,
                });
                self.live += old.is_none() as usize;
                self.given_up -= old.is_some_and(|pulse| pulse.given_up) as usize;
            }
        }
        let places = places(index, self.workers);
        for (watched, counters) in self.watched[places].iter_mut().zip(counters) {
            let seen = if is_known { watched.seen } else { 0 };
            *watched = Watched { counters: Some(counters.clone()), seen };
        }
    }

    /// The flow is no longer in the tables, or not forwarded here.
    pub fn remove(&mut self, index: u32) {
        let index = index as usize;
        if let Some(pulse) = self.slots.get_mut(index).and_then(Option::take) {
            self.live -= 1;
            self.given_up -= pulse.given_up as usize;
            self.watched[places(index, self.workers)].fill_with(Watched::default);
        }
    }

    /// Moves the hand to where it should be at `now`.
    pub fn turn(&mut self, now: Millis) {
        let Some(tick) = self.tick() else {
            (self.started, self.last_turn, self.done) = (now, now, 0);
            self.early.clear();
            self.stations.clear();
            return;
        };
        self.turn_early(now);
        // When the thread was kept from here the round takes longer: to catch up would mark many at once.
        self.started += now.saturating_sub(self.last_turn).saturating_sub(2 * tick);
        self.last_turn = now;
        let round = self.round();
        let target = (now.saturating_sub(self.started) * self.size / round).min(self.size);
        while self.done < target {
            self.prefetch();
            let index = self.visited(self.done);
            self.done += 1;
            if let Some(mut pulse) = self.slots.get_mut(index).and_then(Option::take) {
                self.look(index, &mut pulse, now, round);
                self.slots[index] = Some(pulse);
            }
        }
        if self.done >= self.size {
            self.close(now, round);
        }
    }

    /// Asks for the memory that the next looks need.
    fn prefetch(&self) {
        let far = self.visited(self.done + AHEAD.0);
        if let Some(slot) = self.slots.get(far) {
            prefetch_read(slot);
            self.watched[places(far, self.workers)].iter().for_each(|watched| prefetch_read(watched));
        }
        let near = self.visited(self.done + AHEAD.1);
        if near < self.slots.len() {
            let counters =
                self.watched[places(near, self.workers)].iter().flat_map(|watched| &watched.counters);
            counters.for_each(FlowCounters::prefetch);
        }
    }

    /// Marks flows that OVS has changed.
    fn turn_early(&mut self, now: Millis) {
        let stations = std::mem::take(&mut self.stations);
        if !stations.is_empty() {
            let is_from = |pulse: &Pulse| pulse.from.is_some_and(|from| stations.contains(&from));
            let pulses = (0..).zip(&self.slots);
            let of_them =
                pulses.filter(|(_, slot)| slot.as_ref().is_some_and(is_from)).map(|(index, _)| index);
            self.early.extend(of_them);
        }
        for index in std::mem::take(&mut self.early) {
            let index = index as usize;
            if let Some(mut pulse) = self.slots.get_mut(index).and_then(Option::take) {
                self.mark_early(index, &mut pulse, now);
                self.slots[index] = Some(pulse);
            }
        }
    }

    /// Asks for the flow's next packet of the workers that have had any, or of all, as far as the budget lasts.
    fn mark_early(&mut self, index: usize, pulse: &mut Pulse, now: Millis) {
        let watched = &self.watched[places(index, self.workers)];
        let had = bits(watched, |_, watched| watched.packets() > 0);
        let due = bits(watched, |worker, watched| pulse.asked >> worker & 1 != 0 && watched.is_due());
        let wanted = if had == 0 { bits(watched, |_, _| true) } else { had } & !due;
        let round = self.round();
        let allowance = |rate: u32| (rate as u64 * round / 1000 / EARLY).max(1);
        let Settings { port_rate, total_rate, .. } = self.settings;
        let port = budget_of(&mut self.ports, pulse.port);
        if wanted == 0 || port.early >= allowance(port_rate) || self.total.early >= allowance(total_rate) {
            return;
        }
        port.early += 1;
        self.total.early += 1;
        self.ask(index, pulse, wanted, now);
    }

    /// Has these workers, as bits, send the flow's next packet by the host path.
    fn ask(&mut self, index: usize, pulse: &mut Pulse, wanted: u64, now: Millis) {
        let watched = &self.watched[places(index, self.workers)];
        let asked = bits(watched, |worker, watched| wanted >> worker & 1 != 0 && watched.set_due());
        if asked != 0 {
            pulse.asked |= asked;
            pulse.kept = now;
            self.asked += 1;
        }
    }

    /// The flow index at which the hand is after so many steps: each once in a round, and any run of indices at even
    /// distances.
    fn visited(&self, done: u64) -> usize {
        let factor = match self.size.trailing_zeros() {
            0 => 1,
            bits => GOLDEN >> (64 - bits) | 1,
        };
        (done.wrapping_mul(factor) & (self.size - 1)) as usize
    }

    fn look(&mut self, index: usize, pulse: &mut Pulse, now: Millis, round: Millis) {
        let (mut hottest, mut packets) = ((0, 0), 0);
        let watched = &mut self.watched[places(index, self.workers)];
        let due = bits(watched, |worker, watched| pulse.asked >> worker & 1 != 0 && watched.is_due());
        for (worker, watched) in watched.iter_mut().enumerate() {
            let count = watched.packets();
            let new = count.saturating_sub(std::mem::replace(&mut watched.seen, count));
            packets += new;
            hottest = hottest.max((new, worker));
        }
        // The packet that was the keep-alive is not among those counted.
        let kept = pulse.asked & !due;
        pulse.asked = due;
        let is_time = now.saturating_sub(pulse.kept) >= self.period() / 2;
        let mut admitted = true;
        if packets > 0 || kept != 0 || pulse.is_new {
            let heat = (packets.max(1).ilog2() as usize).min(HEATS - 1);
            admitted = self.admit(index, pulse.port, heat, round);
            let busy = match (packets, kept) {
                (0, 0) => bits(&self.watched[places(index, self.workers)], |_, _| true), // whoever sees the first packet
                (0, _) => kept,
                _ => 1 << hottest.1,
            };
            if admitted && is_time && busy & !due != 0 {
                self.ask(index, pulse, busy & !due, now);
                self.total.used += 1;
                self.ports[pulse.port as usize].used += 1;
            }
        }
        pulse.is_new &= !is_time;
        self.given_up += !admitted as usize;
        self.given_up -= pulse.given_up as usize;
        pulse.given_up = !admitted;
    }

    /// Counts a flow that needs a keep-alive; whether it may have one.
    fn admit(&mut self, index: usize, port: u32, heat: usize, round: Millis) -> bool {
        let allowance = |rate: u32| rate as u64 * round / 1000;
        let Settings { port_rate, total_rate, .. } = self.settings;
        let port = budget_of(&mut self.ports, port);
        let budgets = [(port, allowance(port_rate)), (&mut self.total, allowance(total_rate))];
        let mut admitted = true;
        for (budget, allowance) in budgets {
            budget.heat[heat] += 1;
            admitted &=
                budget.quota.admits(heat, index as u32) && budget.lasts(allowance, self.done, self.size);
        }
        admitted
    }

    /// Ends a round: what it has counted decides about the next.
    fn close(&mut self, now: Millis, round: Millis) {
        let needed: u64 = self.total.heat.iter().sum();
        self.rates = Rates { asked: self.asked * 1000 / round, needed: needed * 1000 / round };
        self.asked = 0;
        while matches!(self.slots.last(), Some(None)) {
            self.slots.pop();
        }
        self.watched.truncate(self.slots.len() * self.workers);
        self.size = (self.slots.len() as u64).next_power_of_two();
        let next = self.round();
        let allowance = |rate: u32| rate as u64 * next / 1000;
        // What the ports' budgets leave of the flows shares the budget of all.
        let mut left = [0; HEATS];
        for port in &mut self.ports {
            let quota = Quota::of(&port.heat, allowance(self.settings.port_rate));
            for (heat, &count) in port.heat.iter().enumerate() {
                left[heat] += quota.part(heat, count);
            }
            *port = Budget { quota, ..Budget::default() };
        }
        let quota = Quota::of(&left, allowance(self.settings.total_rate));
        self.total = Budget { quota, ..Budget::default() };
        (self.done, self.started) = (0, (self.started + round).clamp(now.saturating_sub(next / 16), now));
    }
}

/// Where a flow's [`Watched`] are.
fn places(index: usize, workers: usize) -> std::ops::Range<usize> {
    index * workers..(index + 1) * workers
}

/// The workers, as bits, of which it is so.
fn bits(watched: &[Watched], is_so: impl Fn(usize, &Watched) -> bool) -> u64 {
    let is_so = |(worker, watched)| (is_so(worker, watched) as u64) << worker;
    watched.iter().enumerate().map(is_so).fold(0, |bits, bit| bits | bit)
}

/// The budget of the port in this slot.
fn budget_of(ports: &mut Vec<Budget>, slot: u32) -> &mut Budget {
    let slot = slot as usize;
    if slot >= ports.len() {
        ports.resize_with(slot + 1, Budget::default);
    }
    &mut ports[slot]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_more_flows_the_slower_the_hand_but_in_time() {
        for (flows, max_idle, round) in [
            (100, 10_000, 3333),
            (60_000, 10_000, 3333),
            (100_000, 10_000, 6000),
            (1 << 20, 10_000, 10_485),
            (100_000, 60_000, 6553),
        ] {
            let mut alive = KeepAlive::new(Settings { max_idle, ..Settings::default() });
            let flow = FlowRef { index: flows - 1, generation: 1 };
            alive.add(flow, Ends { port: 0, from: None, to: None }, &[], 0);
            assert_eq!(alive.round(), round, "{flows} flows");
        }
    }
}
