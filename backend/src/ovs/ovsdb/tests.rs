use super::*;
use crate::ovs::jsonrpc::Remote;
use crate::ovs::testing::{PATIENCE, Peer, serve};
use serde_json::{Value, json};
use std::path::Path;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, channel};
use std::time::{Duration, Instant};

/// What ovsdb-server 3.1 sent: the answer to `monitor`, then an update for each of: `set Interface tap0
/// external_ids:owner=y`, `clear Bridge br0 mirrors`, `del-port nonesuch`, `set Open_vSwitch . other_config:flow-limit=5000`.
const RECORDED: &str = include_str!("../testdata/ovs-3.1-monitor.jsonl");

fn recorded() -> Vec<Value> {
    RECORDED.lines().map(|line| serde_json::from_str(line).unwrap()).collect()
}

/// A schema with all columns that the recording has.
fn schema() -> Value {
    let mut tables = json!({});
    for (table, rows) in recorded()[0]["result"].as_object().unwrap() {
        tables[table] = json!({"columns": rows.as_object().unwrap().values().next().unwrap()["new"]});
    }
    json!({"name": "Open_vSwitch", "tables": tables})
}

/// Answers what a watcher asks at first; returns what it asked to monitor.
fn greet(peer: &mut Peer, schema: Value, initial: Value) -> Value {
    let (params, id) = peer.expect("get_schema");
    assert_eq!(params, json!(["Open_vSwitch"]));
    peer.answer(id, schema);
    let (params, id) = peer.expect("monitor");
    peer.answer(id, initial);
    params[2].clone()
}

/// Answers probes until the client goes.
fn idle(peer: &mut Peer) {
    while let Some(message) = peer.next() {
        assert_eq!(message["method"], "echo");
        peer.answer(message["id"].clone(), message["params"].clone());
    }
}

fn watch(remote: Remote) -> (Watcher, Receiver<Event>) {
    let (sender, events) = channel();
    let tell = move |event| drop(sender.send(event));
    (Watcher::spawn(remote, Box::new(tell)).unwrap(), events)
}

fn snapshot(events: &Receiver<Event>) -> Arc<Snapshot> {
    match events.recv_timeout(PATIENCE).unwrap() {
        Event::Snapshot(snapshot) => snapshot,
        Event::Lost(reason) => panic!("lost: {reason}"),
    }
}

fn lost(events: &Receiver<Event>) -> String {
    match events.recv_timeout(PATIENCE).unwrap() {
        Event::Lost(reason) => reason,
        Event::Snapshot(snapshot) => panic!("not lost: {snapshot:?}"),
    }
}

/// A database with one bridge of that name.
fn one_bridge(name: &str) -> Value {
    json!({
        "Open_vSwitch": {"r": {"new": {"bridges": ["uuid", "b"], "other_config": ["map", []]}}},
        "Bridge": {"b": {"new": {"name": name, "ports": ["set", []]}}},
    })
}

#[test]
fn a_real_database_is_followed() {
    let dir = tempfile::tempdir().unwrap();
    let (go, next) = channel();
    let (remote, server) = serve(&dir.path().join("db.sock"), move |mut peer| {
        let mut messages = recorded().into_iter();
        let asked = greet(&mut peer, schema(), messages.next().unwrap()["result"].take());
        for update in messages {
            next.recv_timeout(PATIENCE).unwrap();
            peer.send(update);
        }
        idle(&mut peer);
        asked
    });
    let (watcher, events) = watch(remote);
    let first = snapshot(&events);
    assert_eq!(first.ovs_version.as_deref(), Some("3.1.0"));
    assert_eq!((first.hw_offload(), first.userspace_tso_enable()), (false, false));
    assert_eq!(first.max_idle(), Duration::from_secs(20));
    assert_eq!((first.flow_limit(), first.min_revalidate_pps()), (200_000, 5));
    assert_eq!(first.bridges.keys().collect::<Vec<_>>(), ["br0", "br1"]);
    let (br0, br1) = (&first.bridges["br0"], &first.bridges["br1"]);
    assert_eq!((br0.datapath_type.as_str(), br1.datapath_type.as_str()), ("netdev", "system"));
    assert_eq!((br0.mirrors, br0.sflow, br0.ipfix, br0.netflow), (true, false, false, false));
    assert!(!br1.mirrors);
    assert_eq!(br0.ports.keys().collect::<Vec<_>>(), ["br0", "nonesuch", "tap0", "tap1", "tap2"]);
    let tap1 = &br0.ports["tap1"];
    assert_eq!((tap1.tag, tap1.trunks.as_slice()), (Some(7), &[10, 20, 30][..]));
    assert_eq!((tap1.vlan_mode.as_deref(), &tap1.qos), (Some("native-tagged"), &None));
    let (home, tap0) = first.port("tap0").unwrap();
    assert_eq!((home, tap0.qos.as_deref(), tap0.tag), (br0, Some("linux-htb"), None));
    let interface = &tap0.interfaces["tap0"];
    assert_eq!(interface.external_ids["iface-id"], "a b");
    assert_eq!(interface.external_ids["owner"], "x");
    assert_eq!((interface.ingress_policing_rate, interface.ingress_policing_kpkts_rate), (1000, 0));
    assert_eq!((interface.mtu, interface.mtu_request, interface.ifindex), (Some(1500), None, Some(4)));
    assert_eq!((interface.ofport, &interface.error, interface.kind.as_str()), (Some(3), &None, ""));
    let broken = &br0.ports["nonesuch"].interfaces["nonesuch"];
    assert_eq!(broken.ofport, None);
    assert!(broken.error.as_ref().unwrap().contains("No such device"));
    assert_eq!(br0.ports["br0"].interfaces["br0"].kind, "internal");

    let mut expected = (*first).clone();
    let bridge = expected.bridges.get_mut("br0").unwrap();
    let tap0 = bridge.ports.get_mut("tap0").unwrap();
    tap0.interfaces.get_mut("tap0").unwrap().external_ids.insert("owner".into(), "y".into());
    go.send(()).unwrap();
    assert_eq!(*snapshot(&events), expected);
    expected.bridges.get_mut("br0").unwrap().mirrors = false;
    go.send(()).unwrap();
    assert_eq!(*snapshot(&events), expected);
    expected.bridges.get_mut("br0").unwrap().ports.remove("nonesuch");
    go.send(()).unwrap();
    assert_eq!(*snapshot(&events), expected);
    expected.other_config.insert("flow-limit".into(), "5000".into());
    go.send(()).unwrap();
    assert_eq!(*snapshot(&events), expected);
    assert_eq!(expected.flow_limit(), 5000);

    drop(watcher);
    let asked = server.join().unwrap();
    assert_eq!(asked["QoS"], json!({"columns": ["type"]}));
    assert_eq!(asked["Interface"]["columns"].as_array().unwrap().len(), 10);
}

#[test]
fn only_columns_of_the_schema_are_asked_for() {
    let dir = tempfile::tempdir().unwrap();
    let (remote, server) = serve(&dir.path().join("db.sock"), |mut peer| {
        let old = json!({"tables": {
            "Open_vSwitch": {"columns": {"bridges": {}, "other_config": {}, "dpdk_version": {}}},
            "Bridge": {"columns": {"ports": {}, "name": {}, "flood_vlans": {}}},
            "Controller": {"columns": {"target": {}}},
        }});
        let asked = greet(&mut peer, old, one_bridge("old"));
        idle(&mut peer);
        asked
    });
    let (watcher, events) = watch(remote);
    let old = snapshot(&events);
    assert_eq!((old.ovs_version.as_ref(), old.bridges["old"].datapath_type.as_str()), (None, "system"));
    drop(watcher);
    let columns = |names: &[&str]| json!({"columns": names});
    let wanted =
        json!({"Open_vSwitch": columns(&["bridges", "other_config"]), "Bridge": columns(&["name", "ports"])});
    assert_eq!(server.join().unwrap(), wanted);
}

#[test]
fn an_update_of_some_columns_leaves_the_others_and_nonsense_is_survived() {
    let dir = tempfile::tempdir().unwrap();
    let (go, next) = channel();
    let (remote, server) = serve(&dir.path().join("db.sock"), move |mut peer| {
        greet(&mut peer, schema(), one_bridge("br0"));
        let update = |change: Value| json!({"method": "update", "params": [null, change], "id": null});
        let bridge = |new: Value| update(json!({"Bridge": {"b": {"new": new}}}));
        // The same again, and what was never asked for: no news.
        peer.send(bridge(json!({"name": "br0"})));
        peer.send(json!({"method": "locked", "params": ["x"], "id": null}));
        peer.send(bridge(json!({"sflow": ["uuid", "s"], "trap": 3})));
        next.recv_timeout(PATIENCE).unwrap();
        // Columns of the wrong types count as absent.
        peer.send(bridge(
            json!({"ports": ["uuid", 3], "datapath_type": 7, "ipfix": ["set", []], "mirrors": ["uuid", "m"]}),
        ));
        next.recv_timeout(PATIENCE).unwrap();
        peer.send(update(json!({"Bridge": 3})));
        peer.next();
    });
    let (_watcher, events) = watch(remote);
    let mut expected = (*snapshot(&events)).clone();
    expected.bridges.get_mut("br0").unwrap().sflow = true;
    assert_eq!(*snapshot(&events), expected);
    go.send(()).unwrap();
    expected.bridges.get_mut("br0").unwrap().mirrors = true;
    assert_eq!(*snapshot(&events), expected);
    go.send(()).unwrap();
    let reason = lost(&events);
    assert!(reason.contains("not understood") && !reason.contains('\n'), "{reason}");
    drop(events);
    server.join().unwrap();
}

#[test]
fn a_server_that_dies_is_told_once_and_found_again() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("db.sock");
    let (watcher, events) = watch(Remote::Unix(path.clone()));
    assert!(lost(&events).contains("cannot connect"));
    for name in ["first", "second"] {
        let (go, end) = channel();
        let (_, server) = serve(&path, move |mut peer| {
            greet(&mut peer, schema(), one_bridge(name));
            end.recv_timeout(PATIENCE).unwrap();
        });
        assert!(snapshot(&events).bridges.contains_key(name));
        go.send(()).unwrap();
        server.join().unwrap();
        // Several attempts fail before the next one succeeds, and only the first is told.
        assert!(lost(&events).contains("closed the connection"));
        assert!(events.recv_timeout(Duration::from_millis(800)).is_err());
    }
    drop(watcher);
    assert!(events.try_recv().is_err());
}

#[test]
fn a_database_that_refuses_is_lost() {
    let dir = tempfile::tempdir().unwrap();
    let (remote, server) = serve(&dir.path().join("db.sock"), |mut peer| {
        let (_, id) = peer.expect("get_schema");
        let error =
            json!({"error": "unknown database", "details": "get_schema request specifies unknown database"});
        peer.send(json!({"id": id, "result": null, "error": error}));
    });
    let (_watcher, events) = watch(remote);
    assert!(lost(&events).contains("unknown database"));
    server.join().unwrap();
}

#[test]
fn a_server_that_hangs_is_noticed_and_a_quiet_one_is_not_lost() {
    let dir = tempfile::tempdir().unwrap();
    let (remote, server) = serve(&dir.path().join("db.sock"), |mut peer| {
        greet(&mut peer, schema(), one_bridge("br0"));
        // One probe is answered; the next is not.
        let (params, id) = peer.expect("echo");
        peer.answer(id, params);
        let start = Instant::now();
        peer.expect("echo");
        assert!(peer.next().is_none());
        start.elapsed()
    });
    let (_watcher, events) = watch(remote);
    snapshot(&events);
    assert!(lost(&events).contains("does not answer in time"));
    assert!(server.join().unwrap() >= Duration::from_secs(2));
}

#[test]
fn a_watcher_ends_at_once_whatever_it_waits_for() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("db.sock");
    // Waiting to try again.
    let (watcher, events) = watch(Remote::Unix(path.clone()));
    lost(&events);
    let start = Instant::now();
    drop(watcher);
    let mut took = start.elapsed();
    // Waiting for an answer that never comes.
    let (asked, ready) = channel();
    let (remote, server) = serve(&path, move |mut peer| {
        peer.expect("get_schema");
        asked.send(()).unwrap();
        assert!(peer.next().is_none());
    });
    let (watcher, _events) = watch(remote);
    ready.recv_timeout(PATIENCE).unwrap();
    let start = Instant::now();
    drop(watcher);
    took += start.elapsed();
    server.join().unwrap();
    // Less than the time that an answer may take.
    assert!(took < Duration::from_secs(4), "{took:?}");
}

/// Serves one change: the three selects are answered with `found`, the operations after that with `result`; as often as
/// there are results. Returns the operations.
fn change(path: &Path, found: Value, results: Vec<Value>) -> (Database, std::thread::JoinHandle<Vec<Value>>) {
    let (remote, server) = serve(path, move |mut peer| {
        let mut seen = Vec::new();
        for result in results {
            let (params, id) = peer.expect("transact");
            assert_eq!(params[0], "Open_vSwitch");
            assert!((1..=3).all(|at| params[at]["op"] == "select"), "{params}");
            peer.answer(id, found.clone());
            let (params, id) = peer.expect("transact");
            let count = params.as_array().unwrap().len() - 1;
            let result = if result.is_null() { json!(vec![json!({}); count]) } else { result };
            seen.push(params);
            peer.answer(id, result);
        }
        if let Some(message) = peer.next() {
            // A plan that comes to nothing.
            peer.answer(message["id"].clone(), found);
            assert!(peer.next().is_none());
        }
        seen
    });
    (Database::new(remote), server)
}

/// What the selects find: bridges br0 with p0 (and a bond) and br1.
fn found(ports: Value, interfaces: Value) -> Value {
    let ports_of_br0 = json!(["set", [["uuid", "P-br0"], ["uuid", "P-p0"]]]);
    json!([
        {"rows": [
            {"_uuid": ["uuid", "B0"], "name": "br0", "ports": ports_of_br0},
            {"_uuid": ["uuid", "B1"], "name": "br1", "ports": ["uuid", "P-br1"]},
        ]},
        {"rows": ports},
        {"rows": interfaces},
    ])
}

fn p0() -> Value {
    found(
        json!([{"_uuid": ["uuid", "P-p0"], "interfaces": ["uuid", "I-p0"]}]),
        json!([{"_uuid": ["uuid", "I-p0"]}]),
    )
}

fn row() -> PortRow {
    PortRow {
        name: "p0".into(),
        external_ids: [("iface-id".to_owned(), "vm 1".to_owned())].into(),
        tag: Some(5),
        trunks: vec![7, 8],
        vlan_mode: Some("native-untagged".into()),
        mtu_request: Some(9000),
    }
}

#[test]
fn a_port_is_added_under_a_guard() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("db.sock");
    // The first attempt comes too late.
    let late = json!([{"error": "timed out", "details": "\"where\" clause test failed"}, null, null, null, null, null]);
    let (database, server) = change(&path, found(json!([]), json!([])), vec![late, Value::Null]);
    database.add_port("br1", &row()).unwrap();
    let seen = server.join().unwrap();
    assert_eq!(seen[0], seen[1]);
    let this = json!([["_uuid", "==", ["uuid", "B1"]]]);
    let wanted = json!(["Open_vSwitch",
        {"op": "wait", "timeout": 0, "table": "Bridge", "where": this, "columns": ["name"], "until": "==",
         "rows": [{"name": "br1"}]},
        {"op": "wait", "timeout": 0, "table": "Port", "where": [["name", "==", "p0"]], "columns": ["name"],
         "until": "==", "rows": []},
        {"op": "insert", "table": "Interface", "uuid-name": "interface",
         "row": {"name": "p0", "external_ids": ["map", [["iface-id", "vm 1"]]], "mtu_request": 9000}},
        {"op": "insert", "table": "Port", "uuid-name": "port",
         "row": {"name": "p0", "interfaces": ["named-uuid", "interface"], "tag": 5, "trunks": ["set", [7, 8]],
                 "vlan_mode": "native-untagged"}},
        {"op": "mutate", "table": "Bridge", "where": this,
         "mutations": [["ports", "insert", ["named-uuid", "port"]]]},
        {"op": "comment", "comment": "pointworkd: add-port br1 p0"},
        {"op": "mutate", "table": "Open_vSwitch", "where": [], "mutations": [["next_cfg", "+=", 1]]},
    ]);
    assert_eq!(seen[0], wanted);
}

#[test]
fn of_a_port_that_exists_only_what_is_given_is_set() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("db.sock");
    let (database, server) = change(&path, p0(), vec![Value::Null]);
    let port = PortRow { trunks: Vec::new(), mtu_request: None, vlan_mode: None, ..row() };
    database.add_port("br0", &port).unwrap();
    let seen = server.join().unwrap();
    let operations: Vec<&Value> = seen[0].as_array().unwrap()[1..].iter().collect();
    let kinds: Vec<&str> = operations.iter().map(|operation| operation["op"].as_str().unwrap()).collect();
    assert_eq!(kinds, ["wait", "wait", "mutate", "update", "comment", "mutate"]);
    let mutations = json!([
        ["external_ids", "delete", ["set", ["iface-id"]]],
        ["external_ids", "insert", ["map", [["iface-id", "vm 1"]]]],
    ]);
    assert_eq!(operations[2]["mutations"], mutations);
    assert_eq!(operations[2]["where"], json!([["_uuid", "==", ["uuid", "I-p0"]]]));
    assert_eq!((&operations[3]["table"], &operations[3]["row"]), (&json!("Port"), &json!({"tag": 5})));
}

#[test]
fn a_port_that_is_released_stays() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("db.sock");
    let mut there = p0();
    let ids = json!(["map", [["our-a", "1"], ["iface-id", "x"], ["our-b", "2"]]]);
    there[2]["rows"][0]["external_ids"] = ids.clone();
    let (database, server) = change(&path, there, vec![Value::Null]);
    assert!(database.release_port("p0", "our-").unwrap());
    let seen = server.join().unwrap();
    let kinds: Vec<&Value> =
        seen[0].as_array().unwrap()[1..].iter().map(|operation| &operation["op"]).collect();
    assert_eq!(kinds, ["wait", "mutate", "comment", "mutate"]);
    assert_eq!(seen[0][1]["rows"], json!([{"external_ids": ids}]));
    assert_eq!(
        (&seen[0][2]["table"], &seen[0][2]["where"]),
        (&json!("Interface"), &json!([["_uuid", "==", ["uuid", "I-p0"]]]))
    );
    assert_eq!(seen[0][2]["mutations"], json!([["external_ids", "delete", ["set", ["our-a", "our-b"]]]]));
    let (database, server) = change(&path, found(json!([]), json!([])), vec![]);
    assert!(!database.release_port("p0", "our-").unwrap());
    assert!(server.join().unwrap().is_empty());
}

#[test]
fn a_port_is_removed_under_a_guard_and_a_missing_one_is_no_error() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("db.sock");
    let (database, server) = change(&path, p0(), vec![Value::Null]);
    assert!(database.del_port("p0").unwrap());
    let seen = server.join().unwrap();
    let there = json!([["_uuid", "==", ["uuid", "B0"]], ["ports", "includes", ["uuid", "P-p0"]]]);
    assert_eq!((&seen[0][1]["op"], &seen[0][1]["where"]), (&json!("wait"), &there));
    assert_eq!(seen[0][2]["mutations"], json!([["ports", "delete", ["uuid", "P-p0"]]]));
    assert_eq!(seen[0][4]["mutations"], json!([["next_cfg", "+=", 1]]));
    let (database, server) = change(&path, found(json!([]), json!([])), vec![]);
    assert!(!database.del_port("p0").unwrap());
    assert!(server.join().unwrap().is_empty());
}

#[test]
fn what_cannot_be_changed_is_one_clear_line() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("db.sock");
    let refuse = |found: Value, results, ask: &dyn Fn(&Database) -> Result<(), TransactError>| {
        let (database, server) = change(&path, found, results);
        let error = ask(&database).unwrap_err().to_string();
        server.join().unwrap();
        assert!(!error.contains('\n'), "{error}");
        error
    };
    let add = |bridge: &'static str| move |database: &Database| database.add_port(bridge, &row());
    assert!(refuse(p0(), vec![], &add("br7")).contains("no bridge 'br7'"));
    let error = refuse(p0(), vec![], &add("br1"));
    assert!(error.contains("'p0' exists on bridge 'br0' and not on 'br1'"), "{error}");
    let ports =
        json!([{"_uuid": ["uuid", "P-p0"], "interfaces": ["set", [["uuid", "I-1"], ["uuid", "I-2"]]]}]);
    assert!(refuse(found(ports, json!([])), vec![], &add("br0")).contains("bond"));
    let local = json!([{"_uuid": ["uuid", "P-br0"], "interfaces": ["uuid", "I-br0"]}]);
    let error = refuse(found(local, json!([])), vec![], &|database| database.del_port("br0").map(drop));
    assert!(error.contains("local port"), "{error}");
    // The error of the commit follows the results of the operations.
    let failed =
        json!([{}, {}, {}, {}, {}, {}, {}, {"error": "constraint violation", "details": "two\nlines"}]);
    let error = refuse(found(json!([]), json!([])), vec![failed], &add("br0"));
    assert_eq!(error, "the database refuses: constraint violation: two; lines");
    let short = json!([{}]);
    let error = refuse(found(json!([]), json!([])), vec![short], &add("br0"));
    assert!(error.contains("not understood"), "{error}");
    let late = json!([{"error": "timed out"}]);
    let error = refuse(found(json!([]), json!([])), vec![late; 20], &add("br0"));
    assert!(error.contains("all the time"), "{error}");
    let error = Database::new(Remote::Unix(path.clone())).del_port("p0").unwrap_err().to_string();
    assert!(error.contains("cannot connect"), "{error}");
}
