//! Whatever happens to the datapath and to what is heard of it, a read puts the tables in step.

use super::names;
use crate::ovs::mirror::testing::*;
use proptest::prelude::*;
use switch_core::flow::Ufid;

#[derive(Clone, Debug)]
enum Step {
    Put(u128, &'static str),
    Wide(&'static str, &'static str),
    Delete(u128),
    Flush,
    Lose,
    LoseInSilence,
    Swap,
    Skip(u128),
    Meanwhile(u128),
    Away(bool),
    Run(u64),
}

fn steps() -> impl Strategy<Value = Vec<Step>> {
    let out = prop::sample::select(vec!["a", "b", "x"]);
    let from = prop::sample::select(vec!["a", "b"]);
    let step = prop_oneof![
        8 => (0..16u128, out.clone()).prop_map(|(id, out)| Step::Put(id, out)),
        2 => (from, out).prop_map(|(from, out)| Step::Wide(from, out)),
        4 => (0..16u128).prop_map(Step::Delete),
        1 => Just(Step::Flush),
        1 => Just(Step::Lose),
        1 => Just(Step::LoseInSilence),
        3 => Just(Step::Swap),
        1 => (0..16u128).prop_map(Step::Skip),
        1 => (0..16u128).prop_map(Step::Meanwhile),
        1 => any::<bool>().prop_map(Step::Away),
        4 => (0..1500u64).prop_map(Step::Run),
    ];
    prop::collection::vec(step, 0..60)
}

/// Puts a flow as OVS does: what overlaps it goes first. Two ids at a time have the same match.
fn put_disjoint(datapath: &mut Datapath, id: u128, flow: DpFlow) {
    let overlapping = datapath.flows.iter().filter(|(other, old)| {
        let overlaps = old.to.is_none() || flow.to.is_none() || old.to == flow.to;
        other.0 != id && old.from == flow.from && overlaps
    });
    let others: Vec<_> = overlapping.map(|(other, _)| other.0).collect();
    others.into_iter().for_each(|other| datapath.delete(other));
    datapath.put(id, flow);
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 400, ..ProptestConfig::default() })]
    #[test]
    fn whatever_happens_one_read_puts_it_right(steps in steps(), exact: bool, ids: bool) {
        let mut rig = Rig::new();
        rig.is_like(ids, exact);
        let of = |id: u128| if id < 8 { "a" } else { "b" };
        for step in steps {
            let mut datapath = rig.datapath.lock().unwrap();
            match step {
                Step::Put(id, out) => put_disjoint(&mut datapath, id, dp(of(id), id as u64 / 2, out)),
                Step::Wide(from, out) => {
                    let id = if from == "a" { 100 } else { 101 };
                    put_disjoint(&mut datapath, id, wide(from, out));
                }
                Step::Delete(id) => datapath.delete(id),
                Step::Flush => datapath.flows.clear(),
                Step::Lose => {
                    datapath.events.clear();
                    datapath.events.push_back(Event::Lost);
                }
                Step::LoseInSilence => datapath.events.clear(),
                Step::Swap => {
                    let n = datapath.events.len();
                    if n >= 2 {
                        datapath.events.swap(n - 1, n - 2);
                    }
                }
                // An exact source skips nothing.
                Step::Skip(id) if !exact => datapath.skips.push_back([Ufid(id)].into()),
                Step::Skip(_) => {}
                Step::Meanwhile(id) => {
                    datapath.meanwhile = Some(Box::new(move |datapath: &mut Datapath| datapath.delete(id)));
                }
                Step::Away(yes) => datapath.error = yes.then(|| "away".into()),
                Step::Run(millis) => {
                    drop(datapath);
                    rig.run(millis);
                }
            }
        }
        rig.calm();
        let flows = rig.sync();
        prop_assert_eq!(rig.table().content(), rig.wanted(&names()));
        prop_assert_eq!(flows, Ok(rig.table().flows.len()));
        let stale = rig.table().flows.len();
        rig.run(5000);
        prop_assert_eq!(rig.table().content(), rig.wanted(&names()));
        prop_assert_eq!(stale, rig.report().flows);
    }
}
