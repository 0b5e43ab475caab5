//! Which queue of a NIC's port the frames for a station are to come to: that of the worker that sends what comes from it, since it
//! has the rings of its guest. So nobody has to say which address a guest has, and when a guest's rings move to another
//! worker its frames follow.
//!
//! A device has room for some stations. Those that send most have a place; one that has it keeps it until another sends a quarter
//! more. Frames for all others come to the first queue.

use crate::port_config::MAX_QUEUES;
use nic::io::Steering;
use std::cmp::Reverse;
use std::collections::HashMap;
use std::time::{Duration, Instant};

/// Stations that are counted at most. If so many are known, the next decision makes room: who invents addresses may keep others
/// from being noted until then, and no longer.
const MAX_STATIONS: usize = 256;
/// Time between two decisions.
const INTERVAL: Duration = Duration::from_millis(500);
/// Decisions after which a station is forgotten that has sent nothing.
const IDLE: u32 = 20;

#[derive(Default)]
struct Station {
    /// Frames that the worker of each queue has sent, halved at each decision.
    sent: [u32; MAX_QUEUES as usize],
    /// Where its frames are to come to.
    queue: Option<u8>,
    /// The device was told so.
    placed: bool,
    /// Decisions since it has sent something.
    idle: u32,
}

impl Station {
    /// Decides anew where its frames are to come to, and gives that and how much it sends.
    fn decide(&mut self) -> (u8, u64) {
        let sent = |queue: u8| self.sent.get(usize::from(queue)).copied().unwrap_or(0);
        let best = (0..MAX_QUEUES as u8).max_by_key(|&queue| (sent(queue), Reverse(queue))).unwrap_or(0);
        // A guest with queues at several workers stays where it is, unless another one sends more than twice as much.
        let queue = self.queue.filter(|&queue| sent(best) / 2 <= sent(queue)).unwrap_or(best);
        self.queue = Some(queue);
        (queue, self.total())
    }

    /// Frames that all workers have sent.
    fn total(&self) -> u64 {
        self.sent.iter().copied().map(u64::from).sum()
    }
}

/// The stations behind the switch, of one port of a NIC.
#[derive(Default)]
pub(super) struct Stations {
    known: HashMap<[u8; 6], Station>,
    /// What the device was told last, by address.
    rules: Vec<Steering>,
    /// How many it has room for, once that is known.
    room: Option<usize>,
    next: Option<Instant>,
}

impl Stations {
    /// A frame with this source address was sent by the worker of `queue`.
    pub(super) fn note(&mut self, mac: [u8; 6], queue: u8) {
        if mac[0] & 1 != 0 || mac == [0; 6] {
            return; // not one station's
        }
        if self.known.len() >= MAX_STATIONS && !self.known.contains_key(&mac) {
            return;
        }
        if let Some(sent) = self.known.entry(mac).or_default().sent.get_mut(usize::from(queue)) {
            *sent = sent.saturating_add(1);
        }
    }

    /// What the device is to be told, those first that need it most; `None` if it knows that already, or it is too soon.
    pub(super) fn decide(&mut self, now: Instant) -> Option<Vec<Steering>> {
        if self.next.is_some_and(|next| now < next) {
            return None;
        }
        self.next = Some(now + INTERVAL);
        self.make_room();
        let mut wanted = Vec::new();
        self.known.retain(|&mac, station| {
            let (queue, sent) = station.decide();
            station.idle = if sent == 0 { station.idle + 1 } else { 0 };
            station.sent.iter_mut().for_each(|sent| *sent /= 2);
            let weight = sent * if station.placed { 5 } else { 4 };
            // The first queue is where all others come to.
            if queue > 0 {
                wanted.push((Reverse(weight), Steering { mac, vid: None, queue }));
            }
            station.idle < IDLE
        });
        wanted.retain(|(_, rule)| self.known.contains_key(&rule.mac));
        wanted.sort_unstable_by_key(|(weight, rule)| (*weight, rule.mac));
        wanted.truncate(self.room.unwrap_or(usize::MAX));
        let wanted: Vec<Steering> = wanted.into_iter().map(|(_, rule)| rule).collect();
        let mut rules = wanted.clone();
        rules.sort_unstable_by_key(|rule| rule.mac);
        if rules == self.rules {
            return None;
        }
        self.rules = rules;
        Some(wanted)
    }

    /// If there is no room for new stations, forgets half of those without a place in the device: those that send least. It is not
    /// done for each new one, which would cost its packet, and with it other guests, a look at all of them.
    fn make_room(&mut self) {
        if self.known.len() < MAX_STATIONS {
            return;
        }
        let unplaced = self.known.iter().filter(|(_, station)| !station.placed);
        let mut unplaced: Vec<_> = unplaced.map(|(&mac, station)| (station.total(), mac)).collect();
        unplaced.sort_unstable();
        unplaced.truncate(unplaced.len().div_ceil(2));
        for (_, mac) in unplaced {
            self.known.remove(&mac);
        }
    }

    /// The device has taken the first `taken` of the rules, and has no room for more.
    pub(super) fn taken(&mut self, wanted: &[Steering], taken: usize) {
        if taken < wanted.len() {
            self.room = Some(taken);
        }
        self.known.values_mut().for_each(|station| station.placed = false);
        for rule in wanted.iter().take(taken) {
            if let Some(station) = self.known.get_mut(&rule.mac) {
                station.placed = true;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn mac(last: u8) -> [u8; 6] {
        [2, 0, 0, 0, 0, last]
    }

    struct World {
        stations: Stations,
        now: Instant,
        room: usize,
        device: Vec<(u8, u8)>,
    }

    impl World {
        fn new(room: usize) -> World {
            World { stations: Stations::default(), now: Instant::now(), room, device: Vec::new() }
        }

        /// So many frames of stations by queues, and then a decision; whether the device was told anything.
        fn round(&mut self, frames: &[(u8, u8, u32)]) -> bool {
            for &(last, queue, count) in frames {
                (0..count).for_each(|_| self.stations.note(mac(last), queue));
            }
            self.now += INTERVAL;
            let Some(wanted) = self.stations.decide(self.now) else { return false };
            let taken = wanted.len().min(self.room);
            self.stations.taken(&wanted, taken);
            self.device = wanted[..taken].iter().map(|rule| (rule.mac[5], rule.queue)).collect();
            self.device.sort_unstable();
            true
        }
    }

    #[test]
    fn frames_follow_the_worker_that_sends() {
        let mut world = World::new(9);
        assert!(!world.round(&[(1, 0, 50)]), "the first queue is where frames come to anyway");
        assert!(world.round(&[(1, 0, 50), (2, 1, 1)]));
        assert_eq!(world.device, [(2, 1)]);
        assert!(!world.round(&[(1, 0, 50), (2, 1, 90)]));
        // The guest's rings have moved.
        while world.device == [(2, 1)] {
            world.round(&[(2, 3, 100)]);
        }
        assert_eq!(world.device, [(2, 3)]);
        // One that sends by two workers alike stays.
        for _ in 0..9 {
            assert!(!world.round(&[(2, 3, 60), (2, 1, 100)]));
        }
        // No station's address; and what is soon is not decided.
        (0..99).for_each(|_| world.stations.note([1, 0, 0, 0, 0, 9], 2));
        world.stations.note(mac(7), 2);
        assert_eq!(world.stations.decide(world.now), None);
        assert!(world.round(&[]));
        assert_eq!(world.device, [(2, 3), (7, 2)]);
        // It stays for a while though it sends nothing, and is forgotten then.
        let rounds = (0..100).take_while(|_| !world.round(&[(2, 3, 10)])).count() as u32;
        assert!((IDLE - 2..IDLE + 2).contains(&rounds), "{rounds}");
        assert_eq!(world.device, [(2, 3)]);
    }

    #[test]
    fn a_full_device_has_those_that_send_most() {
        let mut world = World::new(2);
        let steady = [(1, 1, 100), (2, 2, 200), (3, 3, 300)];
        world.round(&steady);
        assert_eq!(world.device, [(2, 2), (3, 3)]);
        for _ in 0..9 {
            assert!(!world.round(&steady) || world.device == [(2, 2), (3, 3)]);
        }
        // A little more is not enough.
        for _ in 0..9 {
            world.round(&[(1, 1, 210), (2, 2, 200), (3, 3, 300)]);
            assert_eq!(world.device, [(2, 2), (3, 3)]);
        }
        for _ in 0..9 {
            world.round(&[(1, 1, 400), (2, 2, 200), (3, 3, 300)]);
        }
        assert_eq!(world.device, [(1, 1), (3, 3)]);
        // Who invents addresses fills no place of others, and is forgotten.
        let mut scan: Vec<(u8, u8, u32)> = (10..=255).map(|last| (last, 5, 1)).collect();
        scan.extend([(1, 1, 400), (3, 3, 300)]);
        for _ in 0..3 {
            world.round(&scan);
            assert_eq!(world.device, [(1, 1), (3, 3)]);
        }
        for _ in 0..2 * IDLE {
            world.round(&[(1, 1, 400), (3, 3, 300)]);
        }
        assert_eq!(world.stations.known.len(), 2);
    }

    #[test]
    fn addresses_that_are_kept_alive_keep_nobody_out() {
        let invented = |number: u16| [2, 1, 0, 0, (number >> 8) as u8, number as u8];
        let mut world = World::new(2);
        // One frame in nine seconds of each.
        for turn in 0..36 {
            (0..600).filter(|number| number % 18 == turn % 18).for_each(|number| {
                world.stations.note(invented(number), 5);
            });
            world.round(&[]);
        }
        assert!(world.stations.known.len() > MAX_STATIONS / 2);
        for turn in 0..3 {
            (0..600).filter(|number| number % 18 == turn).for_each(|number| {
                world.stations.note(invented(number), 5);
            });
            world.round(&[(1, 1, 50)]);
        }
        assert!(world.device.contains(&(1, 1)), "{:?}", world.device);
        // Nor do new ones all the time, between which others send little.
        for turn in 0..4 {
            for number in 0..4000 {
                world.stations.note(invented(4000 * turn + number), 5);
                if number % 50 == 49 {
                    world.stations.note(mac(2), 2);
                }
            }
            world.round(&[(1, 1, 50)]);
            assert!(world.stations.known.len() <= MAX_STATIONS);
        }
        assert_eq!(world.device, [(1, 1), (2, 2)]);
    }
}
