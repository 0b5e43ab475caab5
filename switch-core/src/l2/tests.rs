//! Arrays against a map, growth under way, and the order of search.

use super::*;
use crate::compile::PuntReason;
use crate::slab::{Disposition, FlowEntry, Values};
use std::collections::HashMap;

#[test]
fn an_array_equals_a_map_however_full() {
    let mut array = Array::with_capacity(40, 1);
    let (mut model, mut state) = (HashMap::<u64, u32>::new(), 1);
    for step in 0..20_000u32 {
        let random = crate::hash::splitmix(&mut state);
        // Few homes and tags: long ways past full groups.
        let hash = (random & 0x0300_0000_0000_0003) | random >> 32 << 8 & 0xff00;
        let present = model.contains_key(&hash);
        match random >> 20 & 3 {
            0..2 if !present => {
                assert_eq!(
                    array.insert(hash, step, &[step.into()]),
                    model.len() < array.groups.len() * GROUP
                );
                if model.len() < array.groups.len() * GROUP {
                    model.insert(hash, step);
                }
            }
            2 if present => assert!(array.remove(hash, model.remove(&hash).unwrap())),
            _ => {
                let wanted = model.get(&hash);
                let found = array.find(hash, |values| wanted.is_some_and(|&index| values == [index.into()]));
                assert_eq!(found.as_ref(), wanted);
            }
        }
        assert_eq!(array.len, model.len());
    }
    for (hash, index) in model {
        assert!(array.remove(hash, index));
    }
    assert!(array.groups.iter().all(|group| group.0[..GROUP] == [0; GROUP]));
    // What did not stick came down to zero again.
    assert!(array.groups.iter().all(|group| [0, u8::MAX].contains(&group.overflow())));
}

/// The flow at `index` of one word, and its place.
fn flow(index: u32, source: Source, subtable: u32, word: u64, hasher: &Hasher) -> (Arc<FlowEntry>, Place) {
    let flow = FlowRef { index, generation: 1 };
    let values: Values = [word].into_iter().collect();
    let place = Place { hash: hasher.words(&values, 0), flow, subtable, port: 0, source };
    (Arc::new(FlowEntry::new(flow, values, Disposition::Punt(Arc::new(PuntReason::Ct)))), place)
}

fn word_mask(word: usize) -> Arc<Mask> {
    let mut mask = Mask::EMPTY;
    mask.0.words[word] = u64::MAX;
    Arc::new(mask)
}

#[test]
fn flows_are_found_while_their_array_is_exchanged() {
    let (hasher, mask) = (Hasher::new(3), word_mask(5));
    let mut slab = Slab::new(600, hasher.clone());
    let mut table = Masked::new(4);
    table.add_subtable(Source::Learned, Box::new(Subtable::new(1, mask.clone(), 1)));
    let (mut capacity, mut retired, mut steps) = (Array::capacity_for(1), 0, 0);
    for index in 0..600u32 {
        if index as usize == capacity {
            capacity *= 2;
            let array = Box::new(Array::with_capacity(capacity, 1));
            retired += table.grow(Source::Learned, 1, array, &hasher).is_some() as u32;
        }
        let (entry, place) = flow(index, Source::Learned, 1, u64::from(index) + 1, &hasher);
        assert!(table.insert(&place, &entry.values, &hasher));
        slab.put(place.flow, entry).unwrap();
        if index % 3 == 0 {
            retired += table.step(&hasher).is_some() as u32;
            steps += 1;
        }
        if index % 7 == 0 {
            // One that may lie in either array.
            let (_, place) = flow(index / 2, Source::Learned, 1, u64::from(index / 2) + 1, &hasher);
            if slab.take(place.flow).is_some() {
                let left = table.remove(&place);
                assert_eq!(left.is_some(), index == 0);
                if let Some(left) = left {
                    table.add_subtable(Source::Learned, left);
                }
            }
        }
        let mut key = Key::default();
        for old in 0..=index {
            key.words[5] = old as u64 + 1;
            let expected = slab.at(old).map(|entry| entry.flow);
            assert_eq!(table.peek(&hasher, &slab, &key), expected);
        }
    }
    while table.sources[1][0].1.old.is_some() {
        retired += table.step(&hasher).is_some() as u32;
    }
    assert_eq!(retired, 6, "each outgrown array comes back once");
    assert!(steps > 0 && table.sources[1][0].1.len() == slab.len());
}

/// A worker that puts in many flows between two bursts has few to move at once: most have been when an array has to grow again.
#[test]
fn an_array_is_moved_as_fast_as_the_next_one_fills() {
    let hasher = Hasher::new(4);
    let mut table = Masked::new(1);
    table.add_subtable(Source::Learned, Box::new(Subtable::new(1, word_mask(5), 1)));
    let mut capacity = Array::capacity_for(1);
    for index in 0..4000 {
        if index as usize == capacity {
            let moved = |table: &Masked| match &table.sources[1][0].1.old {
                Some((old, next)) => (old.len, *next == old.groups.len()),
                None => (0, true),
            };
            assert_eq!(moved(&table), (0, true), "{capacity} flows");
            capacity *= 2;
            table.grow(Source::Learned, 1, Box::new(Array::with_capacity(capacity, 1)), &hasher);
            assert_eq!(moved(&table).0, capacity / 2);
        }
        let (entry, place) = flow(index, Source::Learned, 1, index.into(), &hasher);
        assert!(table.insert(&place, &entry.values, &hasher));
    }
    assert_eq!(table.sources[1][0].1.len(), 4000);
}

#[test]
fn the_most_hit_subtable_comes_first_and_sources_keep_their_order() {
    let hasher = Hasher::new(3);
    let mut slab = Slab::new(10, hasher.clone());
    let mut table = Masked::new(4);
    let mut add = |table: &mut Masked, source: Source, id: u32, word: usize| {
        let mask = word_mask(word);
        table.add_subtable(source, Box::new(Subtable::new(id, mask.clone(), 1)));
        let (entry, place) = flow(id, source, id, 1, &hasher);
        assert!(table.insert(&place, &entry.values, &hasher));
        slab.put(place.flow, entry).unwrap();
    };
    add(&mut table, Source::Learned, 1, 1);
    add(&mut table, Source::Learned, 2, 2);
    add(&mut table, Source::Learned, 3, 3);
    add(&mut table, Source::Explicit, 4, 4);
    let mut keys = [Key::default(); 8];
    keys.iter_mut().for_each(|key| key.words[3] = 1);
    keys[7].words[4] = 1;
    keys[6].words[3] = 2;
    let (mut open, mut found) = (0xff, [FlowRef::default(); 8]);
    table.lookup_batch(&hasher, &slab, &keys, &mut open, &mut found);
    assert_eq!(open, 1 << 6);
    assert_eq!((found[0].index, found[7].index), (3, 4));
    assert!(table.step(&hasher).is_none());
    let order: Vec<_> = table.sources[1].iter().map(|(id, _)| *id).collect();
    assert_eq!(order, [3, 1, 2]);
    // A new favourite overtakes the old one, whose hits decay.
    let mut second = Key::default();
    second.words[2] = 1;
    (0..32).for_each(|_| assert!(table.step(&hasher).is_none()));
    (0..2).for_each(|_| assert!(table.lookup(&hasher, &slab, &second).is_some()));
    (0..2).for_each(|_| assert!(table.step(&hasher).is_none()));
    assert_eq!(table.sources[1][0].0, 2);
}
