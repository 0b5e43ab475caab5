//! Devices that fail, lie, or keep silent.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::sync::{Arc, Mutex};

use proptest::prelude::*;
use switch_core::packet::Gso;

use super::*;
use crate::pci::fake::{Fake, Memory};

/// A device that answers as the driver needs at the start, and fills receive descriptors with `word`.
fn fake(word: Option<u64>, answers: bool) -> Box<Fake> {
    device(word, None, answers)
}

/// The same, which fills transmit descriptors with words in turn.
fn device(word: Option<u64>, sent: Option<Vec<u64>>, answers: bool) -> Box<Fake> {
    let mut tails: HashMap<u64, u64> = HashMap::new();
    let registers = HashMap::from([(regs::STATUS, u64::from(regs::STATUS_LU))]);
    let mut sent = sent.map(|words| words.into_iter().cycle());
    let hook = move |registers: &mut HashMap<u64, u64>, memory: &Memory, offset: u64, value: u64| {
        if !answers {
            return;
        }
        start(registers, offset, value);
        let rings = [regs::rdbal(0), regs::rdbal(1), regs::TDBAL];
        // The driver begins a ring with both of its indices.
        if let Some(base) = rings.iter().find(|base| offset == *base + regs::QUEUE_HEAD) {
            tails.insert(base + regs::QUEUE_TAIL, value);
        }
        let Some(base) = rings.into_iter().find(|base| offset == base + regs::QUEUE_TAIL) else { return };
        let mut next = || if base == regs::TDBAL { sent.as_mut()?.next() } else { word };
        let at = registers.get(&base).copied().unwrap_or(0);
        let slots = registers.get(&(base + regs::QUEUE_LEN)).copied().unwrap_or(0) / 16;
        let tail = tails.entry(offset).or_default();
        while slots > 0 && *tail != value {
            if let Some(word) = next() {
                memory.0.store_u64((at + *tail * 16 + 8) as usize, word).unwrap();
            }
            *tail = (*tail + 1) % slots;
        }
    };
    Box::new(Fake::new(0x10c9_8086, 0x2_0000, registers, Box::new(hook)))
}

/// What a device does that is being started.
fn start(registers: &mut HashMap<u64, u64>, offset: u64, value: u64) {
    match offset {
        regs::CTRL => drop(registers.insert(offset, value & !u64::from(regs::CTRL_RST))),
        regs::MDIC => drop(registers.insert(offset, u64::from(regs::MDIC_READY))),
        _ => {}
    }
}

/// Receive addresses that are valid, by place, with their pools.
type Addresses = BTreeMap<u32, ([u8; 6], u8)>;

/// The same of a device, and the places that were written since it was asked last.
#[derive(Default)]
struct Seen {
    addresses: Addresses,
    written: BTreeSet<u32>,
    /// The pools of VLANs, and of untagged frames.
    vlans: BTreeMap<u16, u8>,
    untagged: u8,
    /// Where frames came to at each moment since it was asked last.
    moments: Vec<Places>,
}

/// The pools that frames come to, by their address and VLAN (`None`: untagged).
type Places = BTreeMap<(u8, Option<u16>), u8>;

impl Seen {
    /// Where frames come to now for the stations whose address ends in these numbers.
    fn places(&self, stations: std::ops::RangeInclusive<u8>) -> Places {
        let of = |station| self.addresses.values().find(|(mac, _)| mac[5] == station);
        let vlans = || {
            let tagged = self.vlans.iter().map(|(&vid, &pools)| (Some(vid), pools));
            tagged.chain([(None, self.untagged)])
        };
        let places = stations.flat_map(|station| {
            let pools = of(station).map_or(0, |(_, pools)| *pools);
            // What is for no pool comes to the first one.
            vlans().map(move |(vid, of_vlan)| {
                (
                    (station, vid),
                    match pools & of_vlan {
                        0 => 1,
                        pools => pools,
                    },
                )
            })
        });
        places.collect()
    }
}

/// A device whose own address is `own`, and what it sees of its receive addresses. It wants none to be valid twice, ever.
fn addressed(own: [u8; 6]) -> (Box<Fake>, Arc<Mutex<Seen>>) {
    let [a, b, c, d, e, f] = own.map(u64::from);
    let (low, high) = regs::address(0);
    let registers = HashMap::from([
        (low, a | b << 8 | c << 16 | d << 24),
        (high, e | f << 8 | u64::from(regs::RAH_VALID)),
    ]);
    let seen: Arc<Mutex<Seen>> = Arc::default();
    let theirs = seen.clone();
    let hook = move |registers: &mut HashMap<u64, u64>, _: &Memory, offset: u64, value: u64| {
        start(registers, offset, value);
        let read = |offset| registers.get(&offset).map_or(0, |value| *value as u32);
        let mut seen = theirs.lock().unwrap();
        for index in 0..regs::ADDRESSES {
            let (low, high) = regs::address(index);
            if offset == low || offset == high {
                seen.written.insert(index);
            }
            let ([a, b, c, d], [e, f, ..]) = (read(low).to_le_bytes(), read(high).to_le_bytes());
            match read(high) & regs::RAH_VALID {
                0 => drop(seen.addresses.remove(&index)),
                _ => drop(seen.addresses.insert(index, ([a, b, c, d, e, f], (read(high) >> 18) as u8))),
            }
        }
        for index in 0..32 {
            let word = read(regs::VLVF + 4 * index);
            if word & regs::VLVF_VALID != 0 {
                seen.vlans.insert(word as u16 & 0xfff, (word >> 12) as u8);
            }
        }
        let takes_untagged = |pool: &u64| read(regs::VMOLR + 4 * pool) & regs::VMOLR_UNTAGGED != 0;
        seen.untagged = (0..8).filter(takes_untagged).fold(0, |pools, pool| pools | 1 << pool);
        let places = seen.places(1..=5);
        seen.moments.push(places);
        let macs: BTreeSet<_> = seen.addresses.values().map(|(mac, _)| mac).collect();
        assert_eq!(macs.len(), seen.addresses.len(), "one is there twice: {:x?}", seen.addresses);
    };
    (Box::new(Fake::new(0x10c9_8086, 0x2_0000, registers, Box::new(hook))), seen)
}

fn config() -> Config {
    Config { ring: 8, ..Config::default() }
}

#[test]
fn a_silent_or_foreign_device_is_an_error() {
    assert!(matches!(Igb::open(fake(None, false), config()), Err(NicError::Device(_))));
    let other = Fake::new(0x1533_8086, 0x2_0000, HashMap::new(), Box::new(|_, _, _, _| {}));
    assert!(matches!(Igb::open(Box::new(other), config()), Err(NicError::Pci(PciError::Foreign { .. }))));
    let wrong = |config| matches!(Igb::open(fake(None, true), config), Err(NicError::Config(_)));
    assert!(wrong(Config { ring: 9, ..config() }) && wrong(Config { max_frame: 9729, ..config() }));
    assert!(wrong(Config { queues: 0, ..config() }) && wrong(Config { queues: 9, ..config() }));
    for vlans in [(1..33).collect(), vec![0], vec![4095], vec![7, 7]] {
        assert!(wrong(Config { vlans, ..config() }));
    }
}

#[test]
fn completions_that_never_come_end_in_back_pressure() {
    let mut igb = Igb::open(fake(None, true), config()).unwrap();
    igb.poll_events(&mut Vec::new()).unwrap();
    for _ in 0..7 {
        igb.send(0, &[&[0; 60]], &Offload::default()).unwrap();
        igb.flush().unwrap();
    }
    assert_eq!(igb.send(0, &[&[0; 60]], &Offload::default()), Err(SendError::Full));
    assert_eq!(igb.counters(0).unwrap().sent, 0);
    // A reset gives them up, and each counts once, a failed setup included.
    let bar = igb.bar.clone();
    bar.write32(regs::rdbal(0) + regs::QUEUE_LEN, 0).unwrap();
    let mut events = Vec::new();
    igb.poll_events(&mut events).unwrap();
    assert!(events.contains(&PortEvent::Reset));
    assert_eq!(igb.counters(0).unwrap().tx_reset, 7);
    igb.send(0, &[&[0; 60]], &Offload::default()).unwrap();
    bar.write32(regs::STATUS, u32::MAX).unwrap();
    assert!(igb.poll_events(&mut events).is_err(), "it is gone");
    assert_eq!(igb.send(0, &[&[0; 60]], &Offload::default()), Err(SendError::Device));
    bar.write32(regs::STATUS, regs::STATUS_LU).unwrap();
    events.clear();
    igb.poll_events(&mut events).unwrap();
    assert!(events.contains(&PortEvent::Reset));
    assert_eq!(igb.counters(0).unwrap().tx_reset, 8);
}

proptest! {
    /// Whatever the device writes into receive descriptors, there is no more than a budget of sane frames.
    #[test]
    fn wild_receive_descriptors_do_no_harm(word in prop_oneof![any::<u64>(), (0u64..4, 0u64..2000).prop_map(|(bits, len)| len << 32 | bits)]) {
        let mut igb = Igb::open(fake(Some(word), true), Config { queues: 2, ..config() }).unwrap();
        for _ in 0..20 {
            let got = igb.receive(5, &mut |received| {
                assert!((14..=1522).contains(&received.frame.len()) && received.mark < 2);
                // A tag that was taken off is where it was.
                let tag = [0x81, 0, (word >> 56) as u8, (word >> 48) as u8];
                assert!(word & 8 == 0 || received.frame[12..16] == tag && received.frame.len() >= 18);
            }).unwrap();
            prop_assert!(got <= 5);
        }
        let counters = igb.counters(0).unwrap();
        let seen = counters.received + counters.rx_error + counters.rx_too_long;
        prop_assert_eq!(seen > 0, word & 1 == 1);
    }

    /// Whatever rules follow each other, no address is ever valid twice, and those that stay are not written.
    #[test]
    fn addresses_that_stay_are_left_alone(
        turns in prop::collection::vec(prop::collection::btree_map(1u8..40, 0u8..4, 0..=23), 1..8),
    ) {
        let own = [2, 0, 0, 0, 0, 1];
        let (fake, seen) = addressed(own);
        let mut igb = Igb::open(fake, Config { queues: 4, ..config() }).unwrap();
        for rules in turns {
            // The order of the rules says nothing of their places.
            let rules: Vec<_> =
                rules.iter().rev().map(|(&mac, &queue)| Steering { mac: [2, 0, 0, 0, 0, mac], vid: None, queue }).collect();
            let before = {
                let mut seen = seen.lock().unwrap();
                seen.written.clear();
                seen.addresses.clone()
            };
            prop_assert_eq!(igb.set_steering(0, &rules).unwrap(), rules.len());
            let seen = seen.lock().unwrap();
            let mut wanted = BTreeMap::from([(own, 1)]);
            wanted.extend(rules.iter().map(|rule| (rule.mac, 1 << rule.queue)));
            let got: BTreeMap<_, _> = seen.addresses.values().copied().collect();
            prop_assert_eq!(&got, &wanted);
            prop_assert_eq!(seen.addresses[&0].0, own);
            for (index, (mac, pools)) in &before {
                if let Some(now) = wanted.get(mac) {
                    prop_assert_eq!(seen.addresses.get(index), Some(&(*mac, *now)), "it has moved");
                    prop_assert_eq!(seen.written.contains(index), now != pools);
                }
            }
        }
    }

    /// Whatever rules with VLANs follow each other, no frame comes to two queues on the way, nor to one that no rule names, and
    /// one whose queue stays is never elsewhere.
    #[test]
    fn no_frame_comes_to_two_queues_while_rules_change(
        turns in prop::collection::vec(
            prop::collection::btree_map((2u8..6, prop::option::of(prop::sample::select(vec![0u16, 10, 20]))), 0u8..4, 0..6),
            2..8,
        ),
    ) {
        let (fake, seen) = addressed([2, 0, 0, 0, 0, 1]);
        let mut igb = Igb::open(fake, Config { queues: 4, vlans: vec![10, 20], ..config() }).unwrap();
        for rules in turns {
            let rules: Vec<_> =
                rules.iter().map(|(&(mac, vid), &queue)| Steering { mac: [2, 0, 0, 0, 0, mac], vid, queue }).collect();
            let before = {
                let mut seen = seen.lock().unwrap();
                seen.moments.clear();
                seen.places(1..=5)
            };
            igb.set_steering(0, &rules).unwrap();
            let seen = seen.lock().unwrap();
            let after = seen.places(1..=5);
            for moment in &seen.moments {
                for (frame, pools) in moment {
                    let allowed = match (before[frame], after[frame]) {
                        (was, is) if was == is => [was; 3],
                        (was, is) => [was, is, 1],
                    };
                    prop_assert!(pools.is_power_of_two() && allowed.contains(pools), "{frame:?}: {pools:b} of {allowed:?}");
                }
            }
        }
    }

    /// Whatever the device writes into transmit descriptors, each frame is counted once at most, in order.
    #[test]
    fn wild_transmit_descriptors_do_no_harm(words in prop::collection::vec(any::<u64>(), 1..12)) {
        let mut igb = Igb::open(device(None, Some(words), true), config()).unwrap();
        igb.poll_events(&mut Vec::new()).unwrap();
        let mut head = vec![2; 12];
        head.extend([0x08, 0x00, 0x45, 0, 0x13, 0x88, 0, 0, 0x40, 0, 64, 6, 0, 0, 10, 0, 0, 1, 10, 0, 0, 2]);
        head.extend([0, 1, 0, 2, 0, 0, 0, 9, 0, 0, 0, 0, 0x50, 0x10, 1, 0, 0x12, 0x34, 0, 0]);
        let segmented = Offload {
            needs_csum: true, csum_start: 34, csum_offset: 16, gso: Gso::Tcp4, gso_size: 1400, ..Offload::default()
        };
        let mut taken = 0;
        for round in 0..20 {
            let sent = match round % 3 {
                0 => igb.send(0, &[&head, &[7; 4960]], &segmented),
                _ => igb.send(0, &[&[0; 60]], &Offload::default()),
            };
            prop_assert!(matches!(sent, Ok(()) | Err(SendError::Full)));
            taken += u64::from(sent.is_ok());
            igb.flush().unwrap();
            prop_assert!(igb.counters(0).unwrap().sent <= taken);
        }
        igb.bar.write32(regs::rdbal(0) + regs::QUEUE_LEN, 0).unwrap();
        igb.poll_events(&mut Vec::new()).unwrap();
        let counters = igb.counters(0).unwrap();
        prop_assert_eq!(counters.sent + counters.tx_reset, taken);
    }
}
