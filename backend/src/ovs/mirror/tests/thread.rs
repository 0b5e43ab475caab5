//! The mirror's thread with the tables of a real switch.

use crate::datapath::{Datapath as Workers, PortSettings};
use crate::host::FlowTable;
use crate::ovs::mirror::ports::{MirrorPort, Ports};
use crate::ovs::mirror::testing::*;
use crate::ovs::mirror::{Mirror, MirrorTable, Misses, Settings};
use crate::port_config::{Mode, Socket};
use crate::vhost::VhostUserPort;
use crate::worker::rings::Rings;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};
use switch_core::flow::Source;
use switch_core::packet::PortId;

/// A port of a switch with one worker.
fn real_port(workers: &mut Workers, name: &str) -> PortId {
    let id = workers.reserve_slot().unwrap();
    let socket = Socket { mode: Mode::Client, ..Socket::new("/nowhere") };
    let vhost =
        VhostUserPort::new(name, 1, socket, None, workers.quiescence.clone(), Box::new(|_| {})).unwrap();
    let settings = PortSettings { name, polled_by: &[0], mtu: 1500, max_masks: 4, miss_rate: 1000 };
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
    let misses = Arc::new(Misses::new().unwrap());
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
        counters.slot().expect("the worker has it").credit(60, 0, 1);
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
fn the_tables_tell_nothing_of_flows_that_are_gone() {
    let (mut workers, _ends) = Workers::start(&[], 4096, 8).unwrap();
    let a = real_port(&mut workers, "a");
    let all = Ports::default().with_ports(vec![MirrorPort { id: a, ..port("a", 0) }]);
    let mut flows = workers.flows.lock().unwrap();
    let flow = flows.put(Source::Learned, dp("a", 1, "a").spec(&all).unwrap()).unwrap();
    assert_eq!((flows.counters(flow).len(), flows.punted(flow)), (1, None));
    flows.delete(flow);
    assert_eq!((flows.counters(flow).len(), flows.punted(flow)), (0, None));
}
