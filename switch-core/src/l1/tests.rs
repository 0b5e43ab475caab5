//! L1 against a map, and its policies one by one.

use super::room::IDLE;
use super::*;
use std::collections::HashMap;

fn table(capacity: usize) -> L1 {
    let config = L1Config { capacity, ports: 3, pending_ticks: 10, pending_misses: 2, age_ticks: 1 };
    let mut l1 = L1::new(config, Hasher::new(9));
    (0..3).for_each(|port| l1.renew(port));
    l1
}

fn key(l1: &L1, port: u16, value: u64) -> L1Key {
    let mut key = Key::default();
    key.words[5] = value;
    l1.key(port, &[Term { word: 4, bits: 7 }, Term { word: 5, bits: u64::MAX }], &key).unwrap()
}

fn chain(index: u32) -> Chain {
    let mut chain = Chain::default();
    chain.push(FlowRef { index, generation: 1 });
    chain
}

fn get(l1: &L1, key: &L1Key) -> Option<Cached> {
    l1.find(key).map(|place| l1.get(place))
}

/// The bookkeeping agrees with what is in the buckets.
fn check(l1: &L1) {
    let (mut used, mut seen) = (HashMap::<u16, u32>::new(), HashMap::new());
    let mut spilled = vec![0; l1.buckets.len()];
    for (at, bucket) in l1.buckets.iter().enumerate() {
        for slot in (0..SLOTS).filter(|&slot| bucket.tags[slot] != 0) {
            let number = bucket.entries[slot];
            assert!(seen.insert(number, at).is_none(), "an entry in two slots");
            let entry = l1.entries.at(number);
            *used.entry(entry.port()).or_default() += l1.is_current(entry) as u32;
            let home = l1.homes(l1.hash_of(number)).0;
            if home != at {
                spilled[home] += 1;
                assert_ne!(l1.buckets[home].filter & filter_bit(bucket.tags[slot]), 0);
            }
        }
    }
    for (at, bucket) in l1.buckets.iter().enumerate() {
        assert_eq!(bucket.spilled, spilled[at]);
    }
    for port in 0..3 {
        let used = used.get(&port).copied().unwrap_or_default();
        assert_eq!(l1.used(port as u32), used);
        let (hand, mut at, mut ring) = (l1.owners[port as usize].hand, NIL, 0);
        while hand != NIL && at != hand {
            let from = if at == NIL { hand } else { at };
            at = l1.links[from as usize][1];
            assert_eq!(l1.links[at as usize][0], from);
            ring += 1;
        }
        assert_eq!(ring, used, "the ring holds a port's entries");
    }
    let mut free = 0;
    let mut at = l1.free;
    while at != NIL {
        assert!(!seen.contains_key(&at));
        free += 1;
        at = l1.links[at as usize][0];
    }
    assert_eq!(seen.len() + free, l1.fresh as usize);
}

#[test]
fn random_use_keeps_the_books() {
    for (seed, capacity) in [(1, 3), (2, 40), (3, 400)] {
        let mut l1 = table(capacity);
        l1.set_quota(1, capacity as u32 / 3 + 1);
        let (mut state, mut model, mut found) = (seed, HashMap::new(), 0);
        for step in 0..4000u64 {
            let random = crate::hash::splitmix(&mut state);
            l1.set_time(step / 64);
            let port = (random % 3) as u16;
            let key = key(&l1, port, 1 + (random >> 8) % (capacity as u64 * 2));
            match random >> 60 {
                0 if random >> 56 & 15 == 0 => {
                    l1.renew(port as u32);
                    model.retain(|&(p, _), _| p != port);
                }
                0..8 => {
                    let value = (random >> 8) % (capacity as u64 * 2);
                    l1.store(&key, &chain(random as u32));
                    model.insert((port, value), random as u32);
                }
                _ => {
                    let value = (random >> 8) % (capacity as u64 * 2);
                    if let Some(cached) = get(&l1, &key) {
                        let Some(&index) = model.get(&(port, value)) else { panic!("from nowhere") };
                        assert_eq!(cached, Cached::Chain(chain(index)));
                        found += 1;
                    }
                }
            }
            if step % 50 == 0 {
                check(&l1);
            }
            assert!(l1.used(1) <= capacity as u32 / 3 + 1, "over quota");
        }
        check(&l1);
        assert!(found > 100, "{found} found of {capacity}");
    }
}

#[test]
fn a_full_table_holds_nearly_all_of_its_capacity() {
    let mut l1 = table(6000);
    let keys: Vec<_> = (1..=6000).map(|i| key(&l1, 0, i)).collect();
    keys.iter().for_each(|key| l1.store(key, &chain(1)));
    let held = keys.iter().filter(|key| get(&l1, key).is_some()).count();
    assert!(held > 5900, "{held} of 6000 entries at 75 % load");
    let first =
        keys.iter().filter(|key| l1.find_in(l1.homes(key.hash).0, key, l1.generation(key.port)).is_some());
    assert!(first.count() > 4200, "most lookups end in the first bucket");
}

#[test]
fn a_port_over_its_quota_gives_up_its_own_oldest_entry() {
    let mut l1 = table(1000);
    l1.set_quota(0, 3);
    let others: Vec<_> = (1..500).map(|i| key(&l1, 1, i)).collect();
    others.iter().for_each(|key| l1.store(key, &chain(2)));
    let keys: Vec<_> = (1..5).map(|i| key(&l1, 0, i)).collect();
    for (now, key) in keys[..3].iter().enumerate() {
        l1.set_time(now as u64);
        l1.store(key, &chain(1));
    }
    l1.set_time(7);
    let place = l1.find(&keys[0]).unwrap();
    l1.touch(place);
    l1.store(&keys[3], &chain(1));
    let held: Vec<_> = keys.iter().map(|key| get(&l1, key).is_some()).collect();
    assert_eq!(held, [true, false, true, true], "the first was used lately, the second was not");
    assert_eq!(l1.used(0), 3);
    assert!(others.iter().all(|key| get(&l1, key).is_some()), "no other port paid for it");
    l1.set_quota(2, 0);
    let none = key(&l1, 2, 1);
    l1.store(&none, &chain(1));
    assert_eq!(get(&l1, &none), None);
    assert!(l1.may_miss(&none, 0), "without a place to count, the port's budget of misses is the limit");
}

#[test]
fn flows_in_use_are_not_driven_out_by_passing_ones() {
    let mut l1 = table(600);
    let used: Vec<_> = (1..=300).map(|i| key(&l1, 0, i)).collect();
    used.iter().for_each(|key| l1.store(key, &chain(1)));
    for i in 0..6000 {
        let passing = key(&l1, 0, 1000 + i);
        l1.store(&passing, &chain(2));
    }
    let held = |l1: &L1| used.iter().filter(|key| get(l1, key).is_some()).count();
    assert!(held(&l1) > 150, "{} of 300 were left", held(&l1));
    l1.set_time(IDLE.into());
    for i in 0..6000 {
        let passing = key(&l1, 0, 10_000 + i);
        l1.store(&passing, &chain(2));
    }
    assert!(held(&l1) < 30, "{} of 300 are kept that nobody uses", held(&l1));
    check(&l1);
}

#[test]
fn stale_entries_make_room_first() {
    let mut l1 = table(6); // one bucket
    let keys: Vec<_> = (1..8).map(|i| key(&l1, 0, i)).collect();
    keys[..3].iter().for_each(|key| l1.store(key, &chain(1)));
    l1.renew(0);
    assert!(keys.iter().all(|key| get(&l1, key).is_none()));
    keys[3..6].iter().for_each(|key| l1.store(key, &chain(1)));
    let late: Vec<_> = (8..11).map(|i| key(&l1, 1, i)).collect();
    l1.set_time(3);
    late.iter().for_each(|key| l1.store(key, &chain(1)));
    assert!(keys[3..6].iter().chain(&late).all(|key| get(&l1, key).is_some()));
    check(&l1);
}

#[test]
fn stale_entries_do_not_stand_before_those_of_the_same_key() {
    let mut l1 = table(600);
    let keys: Vec<_> = (1..=60).map(|i| key(&l1, 0, i)).collect();
    for round in 0..20 {
        keys.iter().for_each(|key| l1.store(key, &chain(round)));
        let first =
            keys.iter().filter(|key| Some(l1.prefetch_entry(l1.home_of(key))) == l1.find(key)).count();
        assert_eq!(first, keys.len(), "round {round}");
        check(&l1);
        l1.renew(0);
    }
}

#[test]
fn pending_is_bounded_in_count_and_time() {
    let mut l1 = table(100);
    let key = key(&l1, 0, 5);
    let misses = |l1: &mut L1, now| (0..4).map(|_| l1.may_miss(&key, now)).collect::<Vec<_>>();
    assert_eq!(misses(&mut l1, 100), [true, true, false, false]);
    assert_eq!(get(&l1, &key), Some(Cached::Pending));
    assert_eq!(misses(&mut l1, 109), [false; 4]);
    assert_eq!(misses(&mut l1, 110), [true, true, false, false]);
    l1.store(&key, &chain(3));
    assert_eq!(get(&l1, &key), Some(Cached::Chain(chain(3))));
    assert_eq!(misses(&mut l1, 111), [true, true, false, false], "a flow that went makes a new first packet");
}

#[test]
fn keys_tell_ports_words_and_places_apart() {
    let l1 = table(10);
    let terms: Vec<_> = (1..20).map(|word| Term { word, bits: u64::MAX }).collect();
    let make = |port, words: &[(usize, u64)]| {
        let mut key = Key::default();
        words.iter().for_each(|&(word, value)| key.words[word] = value);
        l1.key(port, &terms, &key)
    };
    let (a, b) = (make(0, &[(1, 7)]).unwrap(), make(0, &[(2, 7)]).unwrap());
    assert_eq!(a.words, b.words);
    assert!(a.present != b.present && a.hash != b.hash);
    assert_ne!(a.hash, make(1, &[(1, 7)]).unwrap().hash);
    let words: Vec<_> = (1..12).map(|word| (word, 1)).collect();
    assert!(make(0, &words[..KEY_WORDS]).is_some());
    assert!(make(0, &words).is_none());
}

#[test]
fn entries_of_every_kind_take_turns_in_the_same_memory() {
    let mut l1 = table(24);
    let masks =
        [6, KEY_WORDS].map(|looked_at| std::array::from_fn(|i| if i < looked_at { u64::MAX } else { 0 }));
    let common = masks.map(|mask| CommonTerms::new(&mask, false));
    let terms: Vec<_> = (1..=KEY_WORDS).map(|word| Term { word, bits: u64::MAX }).collect();
    let (mut state, mut model, mut found) = (7, HashMap::new(), [0; 4]);
    for step in 0..20_000u64 {
        let random = crate::hash::splitmix(&mut state);
        l1.set_time(step / 16);
        // Four kinds, of each of which a key differs from others in its last word only.
        let (kind, value) = ((random % 4) as usize, 1 + (random >> 8) % 12);
        let words = [6, KEY_WORDS][kind % 2];
        let mut window = [0; WINDOW];
        window[0] = 9;
        window[(words - 1) * 8] = value as u8;
        let mut key = Key::default();
        (key.words[1], key.words[words]) = (9, value);
        if kind == 3 {
            (2..words).for_each(|word| key.words[word] = 1);
        }
        let key = match kind {
            0 | 1 => l1.common_key(kind as u16, &common[kind], &window, 0),
            // Another port, so that shapes and generic keys do not meet.
            _ => l1.key(2, &terms, &key).unwrap(),
        };
        match random >> 61 {
            0 => {
                let mut chain = Chain::default();
                (0..random >> 50 & 3).for_each(|i| {
                    chain.push(FlowRef { index: (random >> 20) as u32 ^ i as u32, generation: step as u32 });
                });
                chain.push(FlowRef { index: 5, generation: step as u32 });
                l1.store(&key, &chain);
                model.insert((kind, value), Cached::Chain(chain));
            }
            1 => {
                let before = get(&l1, &key);
                let may = l1.may_miss(&key, step);
                assert!(before != Some(Cached::Pending) || get(&l1, &key) == before);
                assert!(may || before == Some(Cached::Pending));
                model.insert((kind, value), Cached::Pending);
            }
            _ => {
                let cached = get(&l1, &key);
                let home = match kind {
                    0 | 1 => l1.common_home(kind as u16, &common[kind], &window, 0),
                    _ => l1.home_of(&key),
                };
                let likely = l1.prefetch_entry(home);
                assert_eq!(l1.find_near(&key, likely).map(|place| l1.get(place)), cached);
                if let (0 | 1, Some(Cached::Chain(chain))) = (kind, cached) {
                    let sole = l1.sole(kind as u16);
                    let sole = l1.sole_flow(likely, sole, &common[kind], &window, 0);
                    let only = Some(chain.flows()).filter(|flows| flows.len() == 1).map(|flows| flows[0]);
                    assert!(sole.is_none() || sole == only);
                }
                if let Some(cached) = cached {
                    assert_eq!(model.get(&(kind, value)), Some(&cached));
                    found[kind] += 1;
                }
            }
        }
        if step % 100 == 0 {
            check(&l1);
        }
    }
    assert!(found.iter().all(|&found| found > 500), "{found:?}");
}
