use super::keepalive::{Ends, KeepAlive};
use super::packed::Packed;
use super::ports::{MirrorPort, Ports, Restriction};
use super::testing::*;
use super::{Mirror, MirrorTable, Settings};
use crate::datapath::{Datapath as Workers, PortSettings};
use crate::host::FlowTable;
use crate::ovs::source::SourceError;
use crate::port_config::{Mode, Socket};
use crate::vhost::VhostUserPort;
use crate::worker::rings::Rings;
use proptest::prelude::*;
use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};
use switch_core::action::Action;
use switch_core::flow::{FlowSpec, PortNames, Source, Ufid};
use switch_core::packet::PortId;

fn names() -> Ports {
    Ports::default().with_ports(vec![port("a", 1), port("b", 2)])
}

fn assert_in_step(rig: &Rig) {
    assert_eq!(rig.table().content(), rig.wanted(&names()));
}

#[test]
fn flows_come_change_and_go_by_events() {
    let mut rig = Rig::new();
    rig.datapath().put(1, dp("a", 1, "b"));
    rig.datapath().put(2, dp("b", 1, "a"));
    rig.run(1);
    assert_in_step(&rig);
    let dumps = rig.datapath().dumps;
    rig.datapath().put(1, dp("a", 1, "x")); // other actions
    rig.datapath().put(2, dp("b", 2, "a")); // another match
    rig.run(1);
    assert_in_step(&rig);
    assert_eq!(rig.report().punts, [("foreign port x".to_string(), 1)].into());
    assert_eq!((rig.report().flows, rig.report().fast), (2, 1));
    rig.datapath().delete(1);
    rig.run(1);
    assert_in_step(&rig);
    assert_eq!(rig.table().flows.len(), 1);
    assert_eq!(rig.datapath().dumps, dumps, "events are enough");
}

#[test]
fn a_read_that_tells_nothing_new_changes_nothing() {
    let mut rig = Rig::new();
    rig.datapath().put(1, dp("a", 1, "b"));
    rig.run(1);
    let before = rig.changes();
    assert_eq!(rig.sync(), Ok(1));
    rig.run(5000);
    assert_eq!(rig.changes(), before);
    assert!(rig.datapath().id_dumps >= 5);
}

#[test]
fn flows_that_stay_as_they_are_are_taken_apart_once() {
    let mut rig = Rig::new();
    rig.is_like(false, true);
    let taken_apart = |rig: &Rig| std::mem::take(&mut rig.datapath().taken_apart);
    (1..=3).for_each(|id| drop(rig.datapath().flows.insert(Ufid(id), dp("a", id as u64, "c"))));
    rig.run(5000);
    assert_eq!((taken_apart(&rig), rig.report().fast), (3, 0));
    rig.datapath().flows.insert(Ufid(2), dp("a", 2, "b"));
    rig.run(5000);
    assert_eq!((taken_apart(&rig), rig.report().fast), (1, 1));
    // What an event has told is read once more.
    rig.datapath().put(3, dp("a", 3, "b"));
    rig.run(5000);
    assert_eq!((taken_apart(&rig), rig.report().fast), (1, 2));
    // The same bytes mean something else where a port is ours that was not.
    rig.follower.set_ports(vec![port("a", 1), port("b", 2), port("c", 3)]);
    rig.run(5000);
    assert_eq!((taken_apart(&rig), rig.report().fast), (3, 3));
    rig.datapath().flows.remove(&Ufid(1));
    rig.run(1001);
    rig.datapath().flows.insert(Ufid(1), dp("a", 1, "c"));
    rig.run(5000);
    assert_eq!((taken_apart(&rig), rig.report().fast), (1, 3));
}

/// A read takes `wall` milliseconds, of which `own` on a processor.
fn effort(rig: &Rig, wall: u64, own: u64) {
    let (time, spent) = (rig.time.clone(), rig.spent.clone());
    rig.datapath().effort = Some(Box::new(move || {
        time.fetch_add(wall, Ordering::Relaxed);
        spent.fetch_add(own, Ordering::Relaxed);
    }));
}

#[test]
fn reads_are_as_rare_as_they_are_dear() {
    // Out of ten minutes: what a read takes, of it on a processor; reads that are allowed.
    for (wall, own, most) in
        [(10, 10, 600), (100, 100, 300), (1000, 1000, 30), (1000, 100, 213), (3000, 300, 69)]
    {
        for hurry in [false, true] {
            let mut rig = Rig::new();
            rig.is_like(false, true);
            rig.datapath().flows.insert(Ufid(1), dp("a", 1, "b"));
            effort(&rig, wall, own);
            let (start, before) = (rig.now(), rig.datapath().dumps);
            while rig.now() < start + 600_000 {
                if hurry {
                    rig.follower.expect_flows();
                }
                rig.run(500);
            }
            let reads = rig.datapath().dumps - before;
            let hurried = 600_000 / (wall + (9 * own).max(9 * (wall - own)).max(20)) as usize;
            let allowed = if hurry { most.max(hurried) } else { most };
            assert!(reads <= allowed + 2, "{wall} {own}: {reads}");
            assert!(reads >= most * 9 / 10, "{wall} {own}: {reads}");
            assert_in_step(&rig);
        }
    }
}

#[test]
fn what_is_deleted_during_a_read_does_not_return_by_it() {
    for has_ids in [true, false] {
        let mut rig = Rig::new();
        rig.datapath().has_ids = has_ids;
        rig.datapath().put(1, dp("a", 1, "b"));
        rig.datapath().put(2, dp("a", 2, "b"));
        rig.run(1);
        let puts = rig.table().puts;
        rig.datapath().meanwhile = Some(Box::new(|datapath| {
            datapath.delete(1);
            datapath.delete(2);
            datapath.put(3, wide("a", "b")); // overlaps both
        }));
        assert_eq!(rig.sync(), Ok(1));
        assert_in_step(&rig);
        assert_eq!(rig.table().puts, puts + 1, "the old ones were put again");
        // A flow that only the read has seen, gone before its end.
        rig.datapath().events.clear();
        rig.datapath().flows.insert(Ufid(4), dp("b", 4, "a"));
        rig.datapath().meanwhile = Some(Box::new(|datapath| datapath.delete(4)));
        assert_eq!(rig.sync(), Ok(1));
        assert_in_step(&rig);
        assert_eq!(rig.table().puts, puts + 1);
    }
}

#[test]
fn one_absence_is_none_where_reads_skip_flows() {
    let mut rig = Rig::new();
    rig.datapath().put(1, dp("a", 1, "b"));
    rig.datapath().put(2, dp("a", 2, "b"));
    rig.run(1);
    for read in 0..3 {
        rig.datapath().skips = [[Ufid(1)].into()].into();
        if read == 2 {
            assert_eq!(rig.sync(), Ok(2))
        } else {
            rig.run(1500)
        }
        assert!(rig.datapath().skips.is_empty());
    }
    assert_eq!(rig.table().deletes, 0);
    assert_in_step(&rig);
    // Absent twice in a row is gone.
    rig.datapath().skips = [[Ufid(1)].into(), [Ufid(1)].into()].into();
    rig.run(1200);
    assert_eq!(rig.table().deletes, 1);
    // It was not, and the next sweep finds it.
    rig.run(1500);
    assert_in_step(&rig);
}

#[test]
fn one_absence_is_enough_where_reads_are_exact() {
    let mut rig = Rig::new();
    rig.is_like(false, true);
    rig.datapath().flows.insert(Ufid(1), dp("a", 1, "b"));
    rig.run(1001);
    assert_in_step(&rig);
    rig.datapath().flows = [(Ufid(2), wide("a", "b"))].into();
    let dumps = rig.datapath().dumps;
    rig.run(1001);
    assert_in_step(&rig);
    assert_eq!(rig.datapath().dumps, dumps + 1, "one read of a source without events");
}

#[test]
fn a_silent_flush_is_noticed() {
    let mut rig = Rig::new();
    (1..100).for_each(|id| rig.datapath().put(id, dp("a", id as u64, "b")));
    rig.run(1);
    assert_eq!(rig.table().flows.len(), 99);
    let dumps = rig.datapath().dumps;
    rig.datapath().flows.clear();
    rig.run(1200);
    assert_in_step(&rig);
    assert_eq!(rig.datapath().dumps, dumps, "terse reads are enough");
    // A flow that came in silence.
    rig.datapath().flows.insert(Ufid(7), dp("b", 7, "a"));
    rig.run(1200);
    assert_in_step(&rig);
}

#[test]
fn lost_events_make_it_read_again() {
    let mut rig = Rig::new();
    rig.datapath().put(1, dp("a", 1, "b"));
    rig.run(1);
    let lose = |rig: &mut Rig| {
        let mut datapath = rig.datapath();
        datapath.flows = [(Ufid(1), dp("a", 1, "x")), (Ufid(2), wide("b", "a"))].into();
        datapath.events.push_back(Event::Lost);
    };
    lose(&mut rig);
    rig.run(200);
    assert_in_step(&rig);
    assert_eq!((rig.report().lost_events, rig.report().resyncs), (1, 1));
    // However often: reads do not follow one another without pause.
    let dumps = rig.datapath().dumps;
    for _ in 0..100 {
        lose(&mut rig);
        rig.run(10);
    }
    assert!((5..=12).contains(&(rig.datapath().dumps - dumps)), "{}", rig.datapath().dumps - dumps);
}

fn restricted(name: &str, slot: u32, ingress: Option<&str>, egress: Option<&str>) -> MirrorPort {
    let restriction =
        Restriction { ingress: ingress.map(str::to_string), egress: egress.map(str::to_string) };
    MirrorPort { restriction, ..port(name, slot) }
}

#[test]
fn restricted_ports_are_the_hosts() {
    let mut rig = Rig::new();
    rig.datapath().put(1, dp("a", 1, "b"));
    rig.datapath().put(2, dp("b", 1, "a"));
    rig.run(1);
    assert_eq!(rig.report().fast, 2);
    // In force on return, even if OVS is away.
    rig.datapath().error = Some("away".into());
    rig.follower.set_ports(vec![restricted("a", 1, Some("policing"), None), port("b", 2)]);
    assert_eq!((rig.report().fast, rig.report().punts), (1, [("policing".to_string(), 1)].into()));
    rig.follower.set_ports(vec![restricted("a", 1, None, Some("QoS")), port("b", 2)]);
    assert_eq!((rig.report().fast, rig.report().punts), (1, [("QoS".to_string(), 1)].into()));
    rig.follower.set_slow(Some("hw-offload".into()));
    assert_eq!((rig.report().fast, rig.report().punts), (0, [("hw-offload".to_string(), 2)].into()));
    rig.datapath().error = None;
    rig.datapath().put(3, dp("b", 3, "b"));
    rig.run(2000);
    assert_eq!((rig.report().fast, rig.report().flows), (0, 3));
    rig.follower.set_slow(None);
    rig.follower.set_ports(vec![port("a", 1), port("b", 2)]);
    assert_eq!((rig.report().fast, rig.report().flows), (3, 3));
    assert_in_step(&rig);
}

#[test]
fn outputs_are_found_in_nested_actions() {
    let ports = Ports::default().with_ports(vec![port("a", 1), restricted("b", 2, None, Some("QoS"))]);
    let spec = |actions| Packed::new(FlowSpec { actions, ..dp("a", 1, "a").spec(&ports).unwrap() });
    let out = || dp("a", 1, "b").spec(&ports).unwrap().actions;
    let less = Action::CheckPktLen { size: 9, greater: vec![], less_equal: vec![Action::Clone(out())] };
    let held = [
        Action::Sample { probability: 1, actions: out() },
        Action::CheckPktLen { size: 9, greater: out(), less_equal: vec![] },
        Action::DecTtl(out()),
        less,
    ];
    for action in held {
        assert_eq!(ports.held(&spec(vec![Action::PopVlan, action])), Some("QoS"));
    }
    assert_eq!(ports.held(&spec(vec![Action::Clone(vec![Action::PopVlan])])), None);
}

#[test]
fn flows_of_ports_that_go_are_gone_at_once() {
    let mut rig = Rig::new();
    rig.follower.set_ports(vec![port("a", 1), port("b", 2), port("c", 3)]);
    rig.datapath().put(1, dp("a", 1, "b"));
    rig.datapath().put(2, dp("b", 1, "a"));
    rig.datapath().put(3, dp("a", 3, "c"));
    rig.datapath().put(4, dp("c", 3, "a"));
    rig.run(1);
    assert_eq!(rig.table().flows.len(), 4);
    rig.datapath().error = Some("away".into());
    rig.follower.set_ports(vec![port("a", 1), port("b", 2)]);
    assert_eq!(rig.table().flows.len(), 2, "those from and to it are gone");
    rig.datapath().error = None;
    rig.run(2000);
    assert_in_step(&rig); // a's flow to it is one to a foreign port
    assert_eq!(rig.report().punts, [("foreign port c".to_string(), 1)].into());
    // Another port in the same slot has none of its flows; the flow to c is ours again.
    rig.follower.set_ports(vec![port("c", 2), port("a", 1)]);
    rig.run(1000);
    let names = Ports::default().with_ports(vec![port("c", 2), port("a", 1)]);
    assert_eq!(rig.table().content(), rig.wanted(&names));
    assert_eq!(rig.report().fast, 2);
}

#[test]
fn overlapping_flows_wait_for_each_other() {
    let mut rig = Rig::new();
    rig.datapath().put(1, wide("a", "b"));
    rig.datapath().put(2, dp("a", 2, "x"));
    rig.datapath().put(3, dp("a", 3, "b"));
    rig.run(1);
    assert_eq!((rig.report().flows, rig.report().refused), (1, 2));
    assert!(rig.report().refused_flows[0].reason.contains("overlaps the flow"));
    rig.run(5000);
    assert_eq!(rig.table().puts, 3, "they are not tried in vain");
    rig.datapath().put(3, dp("a", 3, "x")); // changed while it waits
    rig.datapath().delete(1);
    rig.run(1);
    assert_in_step(&rig);
    assert_eq!(rig.report().refused, 0);
}

#[test]
fn of_flows_with_the_same_match_the_newer_counts() {
    let mut rig = Rig::new();
    rig.datapath().put(1, dp("a", 1, "b"));
    rig.run(1);
    // The new one's event overtakes the deletion of the old one.
    for out in ["b", "x"] {
        rig.datapath().events.push_back(Event::Put(Ufid(2), dp("a", 1, out)));
        rig.run(1);
        assert_eq!(rig.table().flows.len(), 1);
    }
    rig.datapath().delete(1);
    rig.datapath().flows.insert(Ufid(2), dp("a", 1, "x"));
    rig.run(1);
    assert_in_step(&rig);
    rig.datapath().delete(2);
    rig.run(1);
    assert_in_step(&rig);
    // If the other one goes, the first is there still.
    rig.datapath().put(1, dp("a", 1, "b"));
    rig.datapath().events.push_back(Event::Put(Ufid(2), dp("a", 1, "b")));
    rig.datapath().events.push_back(Event::Delete(Ufid(2)));
    rig.run(1);
    assert_in_step(&rig);
}

#[test]
fn full_tables_take_flows_when_there_is_room() {
    let mut rig = Rig::new();
    rig.table().max = Some(2);
    (1..=4).for_each(|id| rig.datapath().put(id, dp("a", id as u64, "b")));
    rig.run(1);
    assert_eq!((rig.report().flows, rig.report().refused), (2, 2));
    assert!(rig.report().refused_flows[0].reason.contains("have 2 flows"));
    rig.datapath().delete(1);
    rig.datapath().delete(2);
    rig.run(1100);
    assert_in_step(&rig);
}

#[test]
fn unreadable_flows_are_told() {
    let mut rig = Rig::new();
    rig.datapath().put(1, dp("a", 1, "b"));
    rig.run(1);
    rig.datapath().put(1, DpFlow { readable: false, ..dp("a", 1, "b") });
    rig.run(1);
    assert!(rig.table().flows.is_empty());
    let report = rig.report();
    assert_eq!((report.unreadable, report.unreadable_flows[0].reason.as_str()), (1, "a strange field"));
    rig.datapath().put(1, dp("a", 1, "b"));
    rig.run(1);
    assert_in_step(&rig);
}

#[test]
fn flows_stay_while_the_source_is_away() {
    let mut rig = Rig::new();
    rig.datapath().put(1, dp("a", 1, "b"));
    rig.run(1);
    rig.datapath().error = Some("no such file".into());
    rig.datapath().flows.clear();
    assert_eq!(rig.sync(), Err("no such file".into()));
    rig.run(60_000);
    assert_eq!(rig.table().flows.len(), 1);
    assert_eq!(rig.report().error.as_deref(), Some("no such file"));
    let dumps = rig.datapath().dumps;
    rig.run(10_000);
    assert_eq!(rig.datapath().dumps, dumps + 10, "one try a second");
    rig.datapath().flows.insert(Ufid(2), wide("a", "b"));
    rig.datapath().error = None;
    rig.run(5000);
    assert_in_step(&rig);
    assert_eq!(rig.report().error, None);
    assert!(rig.report().since_full.unwrap() <= Duration::from_secs(5));
    // Nobody is asked to show flows to an OVS that is away.
    let asked = rig.table().flows[&0].asked;
    rig.datapath().error = Some("away".into());
    for _ in 0..100 {
        rig.run(100);
        rig.table().traffic(0, 0, 10);
    }
    assert_eq!(rig.table().flows[&0].asked, asked);
}

#[test]
fn a_datapath_that_is_gone_takes_its_flows_with_it() {
    let mut rig = Rig::new();
    rig.datapath().put(1, dp("a", 1, "b"));
    rig.run(1);
    let mut datapath = rig.datapath();
    datapath.flows.clear();
    datapath.events.push_back(Event::Lost); // its deletion is an event, that of its flows is not
    drop(datapath);
    rig.run(300);
    assert!(rig.table().flows.is_empty());
}

#[test]
fn an_error_in_the_middle_of_events_loses_nothing() {
    struct Dies(FakeSource);
    impl crate::ovs::source::FlowSource for Dies {
        fn describe(&self) -> String {
            self.0.describe()
        }
        fn dump(
            &mut self,
            names: &dyn PortNames,
            each: &mut dyn FnMut(crate::ovs::source::Sighting<'_>),
        ) -> Result<(), SourceError> {
            let mut n = 0;
            self.0.dump(names, &mut |flow| {
                n += 1;
                if n <= 2 {
                    each(flow);
                }
            })?;
            Err(SourceError("cut short".into()))
        }
        fn dump_ids(&mut self, _: &mut dyn FnMut(Ufid)) -> Result<bool, SourceError> {
            Ok(false)
        }
        fn sweep_interval(&self) -> Duration {
            Duration::from_secs(1)
        }
        fn wait(
            &mut self,
            _: &dyn PortNames,
            _: &crate::wake::Waker,
            _: Duration,
            _: &mut Vec<crate::ovs::source::Change>,
        ) -> Result<(), SourceError> {
            Ok(())
        }
    }
    let datapath = Arc::new(Mutex::new(Datapath::default()));
    (0..4).for_each(|id| datapath.lock().unwrap().put(id, dp("a", id as u64, "b")));
    let table = Arc::new(Mutex::new(FakeTable::default()));
    let source = Dies(FakeSource::new(datapath));
    let mut follower = super::follow::Follower::new(
        Box::new(source),
        table.clone(),
        Settings::default(),
        Box::new(|| 1),
        Box::new(Duration::default),
    );
    follower.set_ports(vec![port("a", 1), port("b", 2)]);
    follower.round(&crate::wake::Waker::new().unwrap());
    // What a broken read did tell is true, and what it did not tell is not gone.
    assert_eq!(table.lock().unwrap().flows.len(), 2);
    assert_eq!(follower.report().error.as_deref(), Some("cut short"));
}

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

/// Tables with `count` flows of each port, in turns, that are to be kept alive.
fn alive(settings: Settings, count: u64, ports: &[&'static str]) -> (FakeTable, KeepAlive) {
    let all = Ports::default().with_ports(vec![port("a", 1), port("b", 2)]);
    let (mut table, mut alive) = (FakeTable::default(), KeepAlive::new(settings));
    for to in 0..count {
        for from in ports {
            let spec = dp(from, to, "b").spec(&all).unwrap();
            let ends = Ends::of(&spec);
            alive.add(table.insert(spec), ends, 0);
        }
    }
    (table, alive)
}

/// Lets time pass to `end`, with traffic every 50 ms. Gives the most keep-alives that were asked for in any 100 ms.
fn pass(
    table: &mut FakeTable,
    alive: &mut KeepAlive,
    from: u64,
    end: u64,
    mut traffic: impl FnMut(&mut FakeTable, u64),
) -> u64 {
    let (mut most, mut before) = (0, 0);
    for now in (from..end).step_by(10) {
        if now % 50 == 0 {
            traffic(table, now);
        }
        while alive.turn(now, table, 64) {}
        if now % 100 == 0 {
            let asked: u64 = table.flows.values().map(|flow| flow.asked).sum();
            if now != from {
                most = most.max(asked - before);
            }
            before = asked;
        }
    }
    most
}

#[test]
fn busy_flows_are_kept_alive_evenly() {
    let (mut table, mut alive) = alive(Settings::default(), 1000, &["a"]);
    // All but every tenth are busy, on the second worker.
    let most = pass(&mut table, &mut alive, 0, 60_000, |table, _| {
        (0..1000).filter(|i| i % 10 != 0).for_each(|i| table.traffic(i, 1, 3));
    });
    for (index, flow) in &table.flows {
        match index % 10 {
            0 => assert_eq!(flow.asked, WORKERS as u64), // for the packet that it came for
            // Every 3.3 s: 18 in a minute.
            _ => assert!((17..=19).contains(&flow.kept) && !flow.due[0], "{index}: {}", flow.kept),
        }
    }
    assert!(most <= 900 / 33 * 2, "{most} in 100 ms: they come in lumps");
    assert!((250..=290).contains(&alive.rates().needed), "{:?}", alive.rates());
    assert_eq!((alive.given_up(), alive.rates().asked), (0, alive.rates().needed));
}

#[test]
fn a_flow_is_never_unseen_for_long() {
    // Whenever flows come and go, and whatever their rate.
    let (mut table, mut alive) = alive(Settings::default(), 300, &["a", "b"]);
    let mut last = vec![(0, 0); 600];
    let mut longest = 0;
    pass(&mut table, &mut alive, 0, 120_000, |table, now| {
        for i in 0..600u32 {
            // A packet every 50 ms to 6 s.
            if ((now + i as u64 * 37) / 50).is_multiple_of(1 + i as u64 % 120) {
                table.traffic(i, i as usize % 2, 1);
            }
            let kept = table.flows[&i].kept;
            if kept != last[i as usize].0 {
                longest = longest.max(now - last[i as usize].1);
                last[i as usize] = (kept, now);
            }
        }
    });
    assert!(longest < 10_000, "a flow was not seen for {longest} ms");
    assert!(last.iter().all(|(kept, at)| *kept > 0 && *at > 108_000));
}

#[test]
fn the_mark_follows_the_traffic_to_another_worker() {
    let (mut table, mut alive) = alive(Settings::default(), 1, &["a"]);
    pass(&mut table, &mut alive, 0, 5000, |table, _| table.traffic(0, 0, 9));
    // It is asked of the first once more, and then goes on by the second, which has had far fewer packets.
    while !table.flows[&0].due[0] {
        table.traffic(0, 0, 1);
        let flow = table.flows[&0].flow;
        table.set_due(flow, 0);
    }
    let kept = table.flows[&0].kept;
    pass(&mut table, &mut alive, 5000, 15_000, |table, _| table.traffic(0, 1, 1));
    assert!(table.flows[&0].kept >= kept + 2);
}

#[test]
fn beyond_the_budget_the_coldest_are_given_up_and_taken_back() {
    // Room for 100 a second of a port: 333 in a period. 200 hot flows and 400 cold ones of port a, 100 of port b.
    let settings = Settings { port_rate: 100, total_rate: 1000, ..Settings::default() };
    let (mut table, mut alive) = alive(settings, 600, &["a"]);
    let all = Ports::default().with_ports(vec![port("a", 1), port("b", 2)]);
    for to in 0..100 {
        let spec = dp("b", to, "a").spec(&all).unwrap();
        let ends = Ends::of(&spec);
        alive.add(table.insert(spec), ends, 0);
    }
    let busy = |table: &mut FakeTable, cold: bool| {
        (0..700).filter(|i| cold || *i >= 600 || i % 3 == 0).for_each(|i| {
            let packets = if i >= 600 || i % 3 != 0 { 2 } else { 100 };
            table.traffic(i, 0, packets);
        });
    };
    pass(&mut table, &mut alive, 0, 20_000, |table, _| busy(table, true));
    let before: Vec<u64> = table.flows.values().map(|flow| flow.kept).collect();
    let most = pass(&mut table, &mut alive, 20_000, 60_000, |table, _| busy(table, true));
    let kept: Vec<u64> = table.flows.values().zip(before).map(|(flow, before)| flow.kept - before).collect();
    for (i, &kept) in kept.iter().enumerate() {
        // The hot ones, and those of the other port, lack nothing: 12 in 40 seconds.
        assert!((i < 600 && i % 3 != 0) || (11..=13).contains(&kept), "{i}: {kept}");
    }
    let cold = || (0..600).filter(|i| i % 3 != 0).map(|i| kept[i]);
    // Of the cold ones a third are kept, always the same; the rest is left alone.
    let (served, left) =
        (cold().filter(|kept| *kept >= 10).count(), cold().filter(|kept| *kept <= 2).count());
    assert!((100..=150).contains(&served) && served + left >= 360, "{served} {left}");
    assert!((240..=300).contains(&alive.given_up()), "{}", alive.given_up());
    assert!(most <= 40, "{most} in 100 ms");
    assert!((190..=220).contains(&alive.rates().needed) && alive.rates().asked <= 135, "{:?}", alive.rates());
    // With the cold ones idle nothing is given up; with a budget, they are taken back.
    pass(&mut table, &mut alive, 60_000, 80_000, |table, _| busy(table, false));
    assert_eq!(alive.given_up(), 0);
    alive.set(Settings { port_rate: 2000, ..settings }, 80_000);
    pass(&mut table, &mut alive, 80_000, 100_000, |table, _| busy(table, true));
    assert_eq!(alive.given_up(), 0);
    // The budget of all holds too, over both ports.
    alive.set(Settings { port_rate: 2000, total_rate: 60, ..settings }, 100_000);
    pass(&mut table, &mut alive, 100_000, 120_000, |table, _| busy(table, true));
    assert!((450..=550).contains(&alive.given_up()), "{}", alive.given_up());
    assert!(alive.rates().asked <= 66, "{:?}", alive.rates());
    // What goes is given up no longer.
    (0..700).for_each(|index| alive.remove(index));
    assert_eq!((alive.given_up(), alive.tick()), (0, None));
}

#[test]
fn the_first_round_keeps_to_the_budget_too() {
    let settings = Settings { port_rate: 100, ..Settings::default() };
    let (mut table, mut alive) = alive(settings, 5000, &["a"]);
    pass(&mut table, &mut alive, 0, 6700, |table, _| (0..5000).for_each(|i| table.traffic(i, 0, 1)));
    let asked: u64 = table.flows.values().map(|flow| flow.asked).sum();
    assert!((100..=670).contains(&asked), "{asked}");
}

#[test]
fn a_stall_of_the_thread_makes_no_lump() {
    let (mut table, mut alive) = alive(Settings::default(), 1000, &["a"]);
    let busy = |table: &mut FakeTable, _| (0..1000).for_each(|i| table.traffic(i, 0, 1));
    pass(&mut table, &mut alive, 0, 10_000, busy);
    let most = pass(&mut table, &mut alive, 13_000, 20_000, busy);
    assert!(most <= 70, "{most} in 100 ms");
}

#[test]
fn short_idle_times_and_few_flows() {
    let settings = Settings { max_idle: 500, ..Settings::default() };
    let (mut table, mut alive) = alive(settings, 1, &["a"]);
    assert_eq!(alive.period(), 166);
    pass(&mut table, &mut alive, 0, 5000, |table, _| table.traffic(0, 0, 1));
    assert!((20..=31).contains(&table.flows[&0].kept), "{}", table.flows[&0].kept);
    alive.set(Settings { max_idle: 1, ..settings }, 5000);
    assert_eq!(alive.period(), 50);
    alive.set(Settings { max_idle: 1 << 40, ..settings }, 5000);
    assert_eq!(alive.period(), 5000);
}

/// A port of a switch with one worker.
fn real_port(workers: &mut Workers, name: &str) -> PortId {
    let id = workers.reserve_slot().unwrap();
    let socket = Socket { mode: Mode::Client, ..Socket::new("/nowhere") };
    let vhost = VhostUserPort::new(name, 1, socket, workers.quiescence.clone(), Box::new(|_| {})).unwrap();
    let settings = PortSettings { name, queues: 1, mtu: 1500, max_masks: 4, miss_rate: 1000 };
    workers.add_port(id, &Rings::Guest(vhost.shared().clone()), settings).unwrap();
    id
}

fn until(what: &str, mut is_so: impl FnMut() -> bool) {
    let deadline = Instant::now() + Duration::from_secs(20);
    while !is_so() {
        assert!(Instant::now() < deadline, "{what}");
        std::thread::sleep(Duration::from_millis(2));
    }
}

#[test]
fn the_thread_keeps_the_real_tables_in_step() {
    let (mut workers, _ends) = Workers::start(&[], 4096, 8).unwrap();
    let [a, b] = ["a", "b"].map(|name| real_port(&mut workers, name));
    let flows = workers.flows.clone();
    let datapath = Arc::new(Mutex::new(Datapath { has_ids: true, ..Datapath::default() }));
    let settings = Settings { max_idle: 150, ..Settings::default() };
    let misses = Arc::new(crate::ovs::mirror::Misses::new().unwrap());
    let mirror =
        Mirror::spawn(Box::new(FakeSource::new(datapath.clone())), flows.clone(), settings, misses).unwrap();
    let ports = |ports: &[(&str, PortId)]| {
        let ports = ports.iter().map(|(name, id)| MirrorPort { id: *id, ..port(name, 0) }).collect();
        mirror.start_ports(ports).recv().unwrap();
    };
    let sync = || mirror.start_sync().recv().unwrap();
    {
        let mut datapath = datapath.lock().unwrap();
        (0..1000).for_each(|id| datapath.put(id, dp("a", id as u64, "b")));
        datapath.put(5000, dp("b", 1, "x"));
        datapath.put(5001, wide("b", "a"));
    }
    ports(&[("a", a), ("b", b)]);
    assert_eq!(sync(), Ok(1001));
    let report = mirror.start_report().recv().unwrap();
    assert_eq!((report.flows, report.fast + report.punts.values().sum::<usize>()), (1001, 1001));
    assert_eq!((report.refused, flows.lock().unwrap().iter().count()), (1, 1001));
    // A busy flow is asked for, again and again.
    let counters = {
        let flows = flows.lock().unwrap();
        let flow = flows.iter().find(|flow| flow.port == a).unwrap();
        flow.counters[0].clone()
    };
    until("no keep-alive", || {
        counters.credit(60, 0, 1);
        counters.is_due()
    });
    datapath.lock().unwrap().delete(7);
    mirror.set(Settings::default());
    assert_eq!(sync(), Ok(1000));
    // What blocked the other is gone.
    let first = if report.refused_flows[0].spec.actions.is_empty() { 5000 } else { 5001 };
    datapath.lock().unwrap().delete(first);
    sync().unwrap();
    mirror.start_slow(Some("hw-offload".into())).recv().unwrap();
    assert_eq!(mirror.start_report().recv().unwrap().fast, 0);
    mirror.start_slow(None).recv().unwrap();
    assert_ne!(mirror.start_report().recv().unwrap().fast, 0);
    // A port goes: none of its flows is there when the mirror says so, and none returns.
    ports(&[("b", b)]);
    assert!(flows.lock().unwrap().iter().all(|flow| flow.port == b));
    flows.lock().unwrap().remove_port(a);
    workers.release_slot(a);
    sync().unwrap();
    assert!(flows.lock().unwrap().iter().all(|flow| flow.port == b));
    drop(mirror);
    assert_eq!(Arc::strong_count(&flows), 2, "the thread has let go of the tables");
}

#[test]
fn the_tables_may_lose_a_flow_to_nobody() {
    // The trait's calls about flows that are gone.
    let (mut workers, _ends) = Workers::start(&[], 4096, 8).unwrap();
    let a = real_port(&mut workers, "a");
    let all = Ports::default().with_ports(vec![MirrorPort { id: a, ..port("a", 0) }]);
    let mut flows = workers.flows.lock().unwrap();
    let flow = flows.put(Source::Learned, dp("a", 1, "a").spec(&all).unwrap()).unwrap();
    let mut packets = Vec::new();
    assert!(flows.packets(flow, &mut packets) && packets == [0]);
    flows.set_due(flow, 0);
    flows.set_due(flow, 9);
    assert!(flows.is_due(flow, 0) && !flows.is_due(flow, 9) && flows.punted(flow).is_none());
    flows.delete(flow);
    assert!(!flows.packets(flow, &mut packets) && !flows.is_due(flow, 0));
    flows.set_due(flow, 0);
}
