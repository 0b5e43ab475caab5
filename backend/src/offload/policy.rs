//! Which flows are worth a place in a NIC's tables, and when one goes in or out.
//!
//! Packets of each flow are counted at times, which gives a rate that forgets within about a second. The hottest flows go in
//! as long as there is room; the fuller the tables, the hotter a flow must be. When they are full, a flow takes the place of the
//! coldest one if it is hotter by a quarter, so that flows alike do not change places; and one that is in stays for a while. A
//! device that has refused for want of room is left alone for longer and longer.
//!
//! Nothing here reads a clock or knows of devices: samples and times in, decisions out.

use std::collections::{HashMap, HashSet};

/// Milliseconds of some clock that only goes forward.
pub type Millis = u64;
/// A flow, by a number that no other has at the time.
pub type Id = u32;

/// What a rate forgets in, in milliseconds: after that, it has come up or down by two thirds.
pub const MEMORY: Millis = 1000;
/// How old a flow is at least when it goes in, unless it has had [`EARLY`] packets.
pub const AGE: Millis = 1000;
/// So many packets make up for a flow's youth.
pub const EARLY: u64 = 32;
/// By how much a flow must be hotter than the one whose place it takes: 25 %.
pub const MARGIN: f64 = 1.25;
/// How long a flow stays in at least.
pub const RESIDENCE: Millis = 2000;
/// Full tables take flows of so many times the rate that empty ones take.
pub const STEEP: f64 = 4.0;
/// First and longest pause after a device, or one flow, had no room.
const NO_SPACE: (Millis, Millis) = (500, 30_000);
/// First and longest pause after a device was busy or not there.
const BUSY: (Millis, Millis) = (250, 2000);

/// What a policy may do.
#[derive(Clone, Copy, PartialEq, Debug)]
pub struct Limits {
    /// Rules in the device at most.
    pub max_rules: u32,
    /// Packets a second that a flow must have to go into empty tables.
    pub min_rate: f64,
    /// Flows that go in or out at one [`Policy::tick`], at most.
    pub churn: usize,
}

/// Where a flow is.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Place {
    /// Not in the device.
    Out,
    /// On its way in.
    Entering,
    /// In the device.
    Inside,
    /// On its way out.
    Leaving,
}

/// Why a flow did not get in.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Failure {
    /// There is no room.
    NoSpace,
    /// Not now: too much is under way, or the device is being set up.
    Busy,
    /// The device did not take this one.
    Rejected,
}

/// A pause that doubles each time.
#[derive(Clone, Copy, Debug, Default)]
struct Pause {
    until: Millis,
    last: Millis,
}

impl Pause {
    fn longer(&mut self, now: Millis, (first, longest): (Millis, Millis)) {
        self.last = (self.last * 2).clamp(first, longest);
        self.until = now + self.last;
    }
}

#[derive(Debug)]
struct Tracked {
    id: Id,
    /// Rules that it takes.
    cost: u32,
    place: Place,
    /// When it came to be where it is.
    since: Millis,
    born: Millis,
    /// Packets when it came, and at the last sample.
    first: u64,
    seen: u64,
    sampled: Millis,
    rate: f64,
    /// How much of the rate's memory is filled, 0 to 1: a young flow's rate is that of its short life.
    trust: f64,
    pause: Pause,
}

impl Tracked {
    /// Whether it has shown that it is worth a place, rate apart.
    fn is_ripe(&self, now: Millis) -> bool {
        now.saturating_sub(self.born) >= AGE || self.seen.saturating_sub(self.first) > EARLY
    }
}

/// What is to be done.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Decision {
    /// Flows that go in, the hottest first.
    pub insert: Vec<Id>,
    /// Flows that go out, the coldest first.
    pub remove: Vec<Id>,
}

/// The flows of one device.
#[derive(Debug)]
pub struct Policy {
    limits: Limits,
    flows: Vec<Tracked>,
    at: HashMap<Id, usize>,
    /// Flows that are out and have the rate for empty tables.
    hot: HashSet<Id>,
    /// Flows that are not out.
    inside: HashSet<Id>,
    /// Rules of flows that are not out, and of flows that are no more.
    used: u32,
    leaving: usize,
    /// After the device had no room: how many rules it had, and until when that counts.
    full: (u32, Pause),
    busy: Pause,
    /// Where the next round of samples begins.
    hand: usize,
}

impl Policy {
    /// No flows.
    pub fn new(limits: Limits) -> Policy {
        Policy {
            limits,
            flows: Vec::new(),
            at: HashMap::new(),
            hot: HashSet::new(),
            inside: HashSet::new(),
            used: 0,
            leaving: 0,
            full: (0, Pause::default()),
            busy: Pause::default(),
            hand: 0,
        }
    }

    /// What it may do.
    pub fn limits(&self) -> Limits {
        self.limits
    }

    fn get(&self, id: Id) -> Option<&Tracked> {
        self.flows.get(*self.at.get(&id)?)
    }

    fn get_mut(&mut self, id: Id) -> Option<&mut Tracked> {
        self.flows.get_mut(*self.at.get(&id)?)
    }

    /// A flow that the device could carry out, and how many packets it has had so far.
    pub fn add(&mut self, id: Id, cost: u32, packets: u64, now: Millis) {
        self.remove(id);
        self.at.insert(id, self.flows.len());
        self.flows.push(Tracked {
            id,
            cost,
            place: Place::Out,
            since: now,
            born: now,
            first: packets,
            seen: packets,
            sampled: now,
            rate: 0.0,
            trust: 0.0,
            pause: Pause::default(),
        });
    }

    /// The flow is no more. If it was not out, the rules that it has in the device, which are given, count until
    /// [`Policy::vanished`].
    pub fn remove(&mut self, id: Id) -> u32 {
        let Some(at) = self.at.remove(&id) else { return 0 };
        let gone = self.flows.swap_remove(at);
        if let Some(moved) = self.flows.get(at) {
            self.at.insert(moved.id, at);
        }
        self.leaving -= usize::from(gone.place == Place::Leaving);
        self.hot.remove(&id);
        self.inside.remove(&id);
        if gone.place == Place::Out { 0 } else { gone.cost }
    }

    /// Rules of a flow that is no more are gone from the device.
    pub fn vanished(&mut self, cost: u32) {
        self.used = self.used.saturating_sub(cost);
    }

    /// The flows to be sampled now: all that are in, and `count` of the others in turn.
    pub fn next_samples(&mut self, count: usize) -> Vec<Id> {
        let mut ids: Vec<Id> = self.inside.iter().copied().collect();
        for _ in 0..count.min(self.flows.len()) {
            self.hand = if self.hand + 1 < self.flows.len() { self.hand + 1 } else { 0 };
            if let Some(flow) = self.flows.get(self.hand).filter(|flow| flow.place == Place::Out) {
                ids.push(flow.id);
            }
        }
        ids
    }

    /// A flow has had so many packets so far.
    pub fn sample(&mut self, id: Id, packets: u64, now: Millis) {
        let min_rate = self.limits.min_rate;
        let Some(flow) = self.get_mut(id) else { return };
        let elapsed = now.saturating_sub(flow.sampled);
        if elapsed == 0 {
            return;
        }
        let new = packets.saturating_sub(flow.seen);
        let rate = new as f64 * 1000.0 / elapsed as f64;
        let weight = 1.0 - (-(elapsed as f64) / MEMORY as f64).exp();
        flow.trust += (1.0 - flow.trust) * weight;
        flow.rate += (rate - flow.rate) * weight / flow.trust;
        (flow.seen, flow.sampled) = (packets, now);
        let is_hot = flow.place == Place::Out && flow.rate >= min_rate;
        match is_hot {
            true => self.hot.insert(id),
            false => self.hot.remove(&id),
        };
    }

    /// A flow's packets a second.
    pub fn rate(&self, id: Id) -> f64 {
        self.get(id).map_or(0.0, |flow| flow.rate)
    }

    /// Where a flow is.
    pub fn place(&self, id: Id) -> Place {
        self.get(id).map_or(Place::Out, |flow| flow.place)
    }

    /// Whether a flow is out and would be in if there was room for all.
    pub fn is_waiting(&self, id: Id) -> bool {
        self.hot.contains(&id)
    }

    /// Whether the flow is one of these.
    pub fn knows(&self, id: Id) -> bool {
        self.at.contains_key(&id)
    }

    fn move_to(&mut self, id: Id, place: Place, now: Millis) -> Option<Place> {
        let min_rate = self.limits.min_rate;
        let flow = self.get_mut(id)?;
        let before = std::mem::replace(&mut flow.place, place);
        if before == place {
            return Some(before);
        }
        flow.since = now;
        let (cost, rate) = (flow.cost, flow.rate);
        self.leaving =
            self.leaving + usize::from(place == Place::Leaving) - usize::from(before == Place::Leaving);
        if before == Place::Out {
            self.used += cost;
            self.hot.remove(&id);
            self.inside.insert(id);
        }
        if place == Place::Out {
            self.used = self.used.saturating_sub(cost);
            self.inside.remove(&id);
            if rate >= min_rate {
                self.hot.insert(id);
            }
        }
        Some(before)
    }

    /// The flow is on its way in.
    pub fn entering(&mut self, id: Id, now: Millis) {
        self.move_to(id, Place::Entering, now);
    }

    /// The flow is in.
    pub fn entered(&mut self, id: Id, now: Millis) {
        self.move_to(id, Place::Inside, now);
        self.full.1.last = 0;
        self.busy = Pause::default();
        if let Some(flow) = self.get_mut(id) {
            flow.pause = Pause::default();
        }
    }

    /// The flow is on its way out.
    pub fn leaving(&mut self, id: Id, now: Millis) {
        self.move_to(id, Place::Leaving, now);
    }

    /// The flow is out.
    pub fn left(&mut self, id: Id, now: Millis) {
        self.move_to(id, Place::Out, now);
    }

    /// The flow's rate is to be found out anew: what it was inside is not known.
    pub fn restart(&mut self, id: Id, packets: u64, now: Millis) {
        if let Some(flow) = self.get_mut(id) {
            (flow.rate, flow.trust, flow.seen, flow.sampled) = (0.0, 0.0, packets, now);
        }
        self.hot.remove(&id);
    }

    /// The flow did not get in.
    pub fn failed(&mut self, id: Id, failure: Failure, now: Millis) {
        self.move_to(id, Place::Out, now);
        match failure {
            Failure::NoSpace => {
                self.full.0 = self.used;
                self.full.1.longer(now, NO_SPACE);
            }
            Failure::Busy => self.busy.longer(now, BUSY),
            Failure::Rejected => {}
        }
        if failure != Failure::Busy
            && let Some(flow) = self.get_mut(id)
        {
            flow.pause.longer(now, NO_SPACE);
        }
    }

    /// Packets a second that a flow must have to go in, as full as the tables are.
    pub fn threshold(&self) -> f64 {
        let fill = f64::from(self.used) / f64::from(self.limits.max_rules.max(1));
        // As it is up to half, then steeper.
        self.limits.min_rate * (1.0 + (STEEP - 1.0) * (fill * 2.0 - 1.0).clamp(0.0, 1.0))
    }

    /// What is to be done now. The owner tells what it has done of it.
    pub fn tick(&mut self, now: Millis) -> Decision {
        let mut decision = Decision::default();
        if now < self.busy.until || self.limits.max_rules == 0 {
            return decision;
        }
        let threshold = self.threshold();
        let is_candidate = |flow: &&Tracked| {
            flow.rate >= threshold && flow.pause.until <= now && flow.is_ripe(now) && flow.cost > 0
        };
        let hot = self.hot.iter().filter_map(|&id| self.get(id));
        let mut candidates: Vec<&Tracked> = hot.filter(is_candidate).collect();
        candidates.sort_unstable_by(|a, b| b.rate.total_cmp(&a.rate).then(a.id.cmp(&b.id)));
        let capacity = match now < self.full.1.until {
            true => self.full.0.min(self.limits.max_rules),
            false => self.limits.max_rules,
        };
        let mut room = capacity.saturating_sub(self.used);
        let mut budget = self.limits.churn;
        let mut rest = candidates.iter();
        while budget > 0
            && let Some(flow) = rest.as_slice().first().filter(|flow| flow.cost <= room)
        {
            decision.insert.push(flow.id);
            room -= flow.cost;
            budget -= 1;
            rest.next();
        }
        if budget == 0 || rest.len() <= self.leaving {
            return decision;
        }
        let inside = self.inside.iter().filter_map(|&id| self.get(id));
        let may_go =
            |flow: &&Tracked| flow.place == Place::Inside && now.saturating_sub(flow.since) >= RESIDENCE;
        let mut victims: Vec<&Tracked> = inside.filter(may_go).collect();
        victims.sort_unstable_by(|a, b| a.rate.total_cmp(&b.rate).then(a.id.cmp(&b.id)));
        // Those that leave already make room for as many.
        for (flow, victim) in rest.skip(self.leaving).zip(victims).take(budget) {
            if flow.rate <= victim.rate * MARGIN {
                break;
            }
            decision.remove.push(victim.id);
        }
        decision
    }
}

#[cfg(test)]
mod tests;
