//! The tables are in step with the datapath, whatever is heard of it and whatever is not.

mod early;
mod keepalive;
mod random;
mod thread;

use super::Settings;
use super::packed::Packed;
use super::ports::{MirrorPort, PortKind, Ports, Restriction};
use super::testing::*;
use crate::ovs::source::SourceError;
use crate::underlay::Tunnels;
use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex};
use std::time::Duration;
use switch_core::action::Action;
use switch_core::flow::{FlowSpec, PortNames, Ufid};

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
        [(10, 10, 600), (100, 100, 240), (1000, 1000, 24), (1000, 100, 176), (3000, 300, 58)]
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
fn reads_leave_room_for_what_else_following_costs() {
    // What is spent between two looks of 500 ms, and how many of the reads of ten minutes that leaves.
    let reads = |between: u64| {
        let mut rig = Rig::new();
        rig.is_like(false, true);
        rig.datapath().flows.insert(Ufid(1), dp("a", 1, "b"));
        effort(&rig, 200, 200);
        let (start, before, spent) = (rig.now(), rig.datapath().dumps, rig.spent.load(Ordering::Relaxed));
        while rig.now() < start + 600_000 {
            rig.spent.fetch_add(between, Ordering::Relaxed);
            rig.run(500);
        }
        let share = (rig.spent.load(Ordering::Relaxed) - spent) as f64 / (rig.now() - start) as f64;
        (rig.datapath().dumps - before, share)
    };
    let (alone, share) = reads(0);
    assert!((118..=121).contains(&alone) && share < 0.041, "{alone} {share}");
    let (fewer, share) = reads(5);
    assert!((80..=100).contains(&fewer) && share < 0.042, "{fewer} {share}");
    // However much that is, reads are at least half as frequent.
    let (half, _) = reads(100);
    assert!((59..=62).contains(&half), "{half}");
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
fn flows_of_the_hosts_devices_are_told_of_and_in_no_table() {
    let mut rig = Rig::new();
    let host = Tunnels::new().unwrap().host_flows().unwrap();
    let told = || format!("{host:?}");
    let device = || MirrorPort { kind: PortKind::Host(host.clone()), ..port("c", 3) };
    rig.follower.set_ports(vec![port("a", 1), port("b", 2), device()]);
    rig.datapath().put(1, dp("c", 1, "a"));
    rig.datapath().put(2, dp("a", 1, "c"));
    rig.run(1);
    assert_eq!((told(), rig.table().flows.len()), ("1 flows".to_owned(), 1));
    // It is no port of ours to which anything is output.
    assert_eq!(rig.report().punts, [("foreign port c".to_string(), 1)].into());
    rig.datapath().put(3, dp("c", 2, "a"));
    rig.datapath().put(1, dp("c", 1, "b"));
    rig.run(1);
    assert_eq!(told(), "2 flows");
    // Flushed in silence.
    rig.datapath().flows.remove(&Ufid(3));
    rig.run(5000);
    assert_eq!(told(), "1 flows");
    rig.datapath().put(1, dp("c", 5, "b")); // another match
    rig.run(1);
    assert_eq!(told(), "1 flows");
    rig.datapath().delete(1);
    rig.run(1);
    assert_eq!(told(), "0 flows");
    rig.datapath().put(1, dp("c", 1, "a"));
    rig.run(1);
    assert_eq!(told(), "1 flows");
    rig.follower.set_ports(vec![port("a", 1), port("b", 2)]);
    assert_eq!(told(), "0 flows");
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
    let asked = rig.table().flows[&0].asked();
    rig.datapath().error = Some("away".into());
    for _ in 0..100 {
        rig.run(100);
        rig.table().traffic(0, 0, 10);
    }
    assert_eq!(rig.table().flows[&0].asked(), asked);
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
