//! The command `pointwork` against a control server that answers what the test wants.

mod common;

use backend::control::protocol::*;
use backend::control::server::{Limits, Reply};
use backend::port_config::{FileMode, Kind, Mode, PortConfig, Socket, XdpChoice, XdpDevice};
use common::FakeDaemon;
use std::io::{BufRead, BufReader};
use std::path::Path;
use std::process::{Command, Output, Stdio};
use std::sync::mpsc::{Receiver, channel};
use std::time::Duration;

/// A daemon that answers every request with something, and what it was asked.
fn daemon() -> (FakeDaemon, Receiver<Request>) {
    let (sender, requests) = channel();
    let mut packets = 0;
    let daemon = FakeDaemon::start(Limits::default(), move |request: Request| {
        let _ = sender.send(request.clone());
        packets += 1000;
        Reply::ok(match request {
            Request::Show {} => Response::Show(Box::new(show())),
            Request::Stats { port: Some(port) } if port != "vm1" => {
                return Reply::error(format!("no port '{port}': there are vm1, vm2"));
            }
            Request::Stats { .. } => Response::Stats(Box::new(stats(packets))),
            Request::DumpFlows { .. } => Response::Flows(flows()),
            Request::AddFlow { flow, .. } => Response::FlowAdded(FlowAdded { id: "7.1".into(), flow }),
            Request::DelFlow { .. } => Response::FlowsDeleted(FlowsDeleted { deleted: 2 }),
            Request::AddPort { .. } | Request::SetPort { .. } | Request::DelPort { .. } => {
                Response::Done(Done { ok: true })
            }
            Request::Trace { .. } => Response::Trace(Trace {
                steps: vec![TraceStep { layer: "parse".into(), text: "an ARP request".into() }],
                outcome: "flooded to vm2".into(),
            }),
            Request::Sync { .. } => Response::Synced(Synced { flows: 12 }),
            Request::Version {} => Response::Version(Version { version: "9.8.7".into(), protocol: 1 }),
        })
    });
    (daemon, requests)
}

fn show() -> Show {
    let port = |name: &str, slot, state, link| PortShow {
        name: name.into(),
        slot,
        state,
        link,
        socket: format!("/run/pointwork/{name}.sock"),
        queues: 2,
        active_queues: 1,
        features: vec!["csum".into(), "tso4".into()],
        mtu: 1500,
        vlan: "trunk all".into(),
        flows: 12_345,
        memory: MemoryShow {
            tables: 3 << 19,
            queues: 7000,
            guest: 4 << 30,
            used: 1 << 30,
            page: 2 << 20,
            nodes: [(0, 3 << 28), (1, 1 << 28)].into(),
        },
        ..PortShow::default()
    };
    let queue = |port: &str, queue, pinned| PolledQueue { port: port.into(), queue, pinned };
    let faulted =
        PortShow { fault: Some("a descriptor loop".into()), ..port("vm2", 2, PortState::Faulted, false) };
    Show {
        version: "9.8.7".into(),
        uptime: 3725.0,
        host: "bridge".into(),
        workers: vec![
            WorkerShow {
                id: 0,
                cpu: Some(1),
                ports: vec!["vm1".into(), "vm2".into()],
                queues: vec![queue("vm1", 0, false), queue("vm1", 1, false), queue("vm2", 1, true)],
                asleep: 0.995,
                node: Some(0),
                memory: 99 << 20,
            };
            2
        ],
        spread: SpreadShow {
            rebalance: true,
            moves: 3,
            last: Some(LastMove {
                port: "vm1".into(),
                queue: 1,
                to: 1,
                seconds: 70.0,
                ..LastMove::default()
            }),
        },
        ports: vec![faulted, port("vm1", 1, PortState::Connected, true)],
        tunnels: vec![TunnelShow {
            name: "vxlan_sys_4789".into(),
            slot: 3,
            kind: "vxlan".into(),
            udp_port: Some(4789),
            flows: 2345,
            masks: 5,
            host_path: vec![
                HostPathShow {
                    what: "encapsulate".into(),
                    why: "eth9 is no port of ours".into(),
                    places: 1200,
                    first: vec!["192.0.2.2".into(), "192.0.2.3".into()],
                },
                HostPathShow {
                    what: "decapsulate".into(),
                    why: "nftables chain 'inet filter input'".into(),
                    ..HostPathShow::default()
                },
            ],
        }],
        nics: vec![NicShow {
            name: "nic1".into(),
            address: "0000:01:00.0".into(),
            driver: "rocker".into(),
            tables: true,
            offload: true,
            ports: vec![NicPortShow {
                number: 2,
                name: "sw.2".into(),
                mac: "52:54:00:12:35:02".into(),
                link: true,
                speed: 10_000,
                does: vec!["checksum".into(), "vlan".into()],
                port: Some("uplink1".into()),
            }],
            resets: 1,
            forwarded: 2345,
            ..NicShow::default()
        }],
        flows: FlowCounts { explicit: 3, learned: 12_345 },
        paths: Paths { l1: 990, l2: 5, miss: 1, punt: 3, keepalive: 1 },
        punts: vec![Punted { reason: "foreign port br0".into(), packets: 3, flows: 2 }],
        ovs: Some(OvsShow {
            bridge: "br0".into(),
            version: Some("3.1.0".into()),
            database: "unix:/run/openvswitch/db.sock".into(),
            datapath: Some("kernel datapath ovs-system".into()),
            read_seconds: Some(0.25),
            resyncs: 2,
            lost_events: 1,
            keepalives_per_second: 12.0,
            given_up: 7,
            ..OvsShow::default()
        }),
        offload: Vec::new(),
        warnings: vec!["the state cannot be kept".into()],
    }
}

fn stats(packets: u64) -> Stats {
    let mut counters = [0; switch_core::drop::DropReason::COUNT];
    counters[switch_core::drop::DropReason::MissRate as usize] = 4321;
    let port = PortStats {
        rx_packets: packets,
        rx_bytes: packets * 100,
        rx_drops: drops(&counters),
        ..PortStats::default()
    };
    Stats {
        ports: [("vm1".to_string(), port)].into(),
        deleted: PortStats::default(),
        paths: Paths { l1: 75, l2: 20, miss: 5, ..Paths::default() },
        workers: vec![WorkerStats {
            id: 0,
            packets: 100,
            bursts: 10,
            busy_cycles: 7740,
            cycles_per_packet: 77.4,
            queues: vec![QueueStats { port: "vm1".into(), queue: 1, polled: true, busy_cycles: 1935 }],
            ..WorkerStats::default()
        }],
        ..Stats::default()
    }
}

fn flows() -> Flows {
    let flow = |index: usize| Flow {
        id: format!("{index}.1"),
        ufid: None,
        source: FlowSource::Explicit,
        flow: format!("in_port(vm1),eth_type(0x{index:04x})"),
        actions: "vm2".into(),
        handling: "fast".into(),
        packets: 3,
        bytes: 180,
        tcp_flags: 0,
        used_seconds: None,
        offloaded: None,
        estimated: false,
    };
    Flows { flows: (0..20_000).map(flow).collect() }
}

fn pointwork(control: &Path, words: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_pointwork"))
        .env("POINTWORK_CONTROL", control)
        .args(words)
        .stdin(Stdio::null())
        .output()
        .unwrap()
}

/// Standard output of a success.
fn text(control: &Path, words: &[&str]) -> String {
    let output = pointwork(control, words);
    let error = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success() && error.is_empty(), "{words:?}: {error}");
    String::from_utf8(output.stdout).unwrap()
}

/// The line of a failure, without the command's name.
fn failure(control: &Path, words: &[&str]) -> String {
    let output = pointwork(control, words);
    assert_eq!(output.status.code(), Some(1), "{words:?}");
    assert!(output.stdout.is_empty(), "{words:?}");
    let error = String::from_utf8(output.stderr).unwrap();
    assert_eq!(error.matches('\n').count(), 1, "{words:?}: {error}");
    error.trim_end().strip_prefix("pointwork: ").expect(&error).to_owned()
}

fn json(control: &Path, words: &[&str]) -> serde_json::Value {
    serde_json::from_str(&text(control, words)).unwrap()
}

#[test]
fn show_is_sorted_and_aligned() {
    let (daemon, _requests) = daemon();
    let text = text(&daemon.path, &["show"]);
    let lines: Vec<&str> = text.lines().collect();
    assert_eq!(lines[0], "pointworkd 9.8.7, up 1h 2m, host: bridge, flows: 3 explicit, 12,345 learned");
    assert_eq!(lines[1], "Open vSwitch 3.1.0: bridge br0, database unix:/run/openvswitch/db.sock: connected");
    assert!(lines[2].starts_with(
        "flows: kernel datapath ovs-system, all read 0.2 s ago, 2 resyncs (1 for lost events), 12 keep"
    ));
    assert!(lines[2].ends_with(", 7 flows too cold to be kept alive"));
    let traffic =
        "traffic: 99.5 % fast, 0.3 % punted, 0.1 % without a flow, 0.1 % keep-alives, of 1,000 packets";
    assert_eq!(lines[3], traffic);
    assert_eq!(lines[4], "punted: foreign port br0: 3 packets, 2 flows");
    assert!(lines[6].starts_with("PORT  SLOT  STATE      LINK  QUEUES   MTU  VLAN"), "{text}");
    assert!(lines[7].starts_with("vm1      1  connected  up       1/2  1500  trunk all"), "{text}");
    assert!(lines[8].starts_with("vm2      2  faulted    down     1/2"), "{text}");
    assert!(text.contains("\nvm1   csum tso4\n"), "{text}");
    let memory = "\nvm1   1.50 MiB  6.84 KiB  4 GiB  1 GiB  2 MiB  0: 75.0 %, 1: 25.0 %\n";
    assert!(text.contains(memory), "{text}");
    assert!(text.contains("     0    1     0  99 MiB  99.5 %  vm1 0,1, vm2 1 (pinned)\n"), "{text}");
    for row in [
        "\nvxlan_sys_4789     3  vxlan      4789  2,345      5\n",
        "\nvxlan_sys_4789  encapsulate   192.0.2.2, 192.0.2.3 and 1,198 more  eth9 is no port of ours\n",
        "\nvxlan_sys_4789  decapsulate   all                                  nftables chain 'inet filter input'\n",
        "\nnic1  0000:01:00.0  rocker  for flows       1      2,345          0\n",
        "\nnic1/2    sw.2  52:54:00:12:35:02  up    10,000 Mbit/s  checksum, vlan  uplink1\n",
    ] {
        assert!(text.contains(row), "{text}");
    }
    let moved =
        "may move; moved so far: 3, the last 1m 10s ago: vm1 queue 1 from worker 0 to 1, rebalanced\n";
    assert!(text.contains(moved), "{text}");
    assert!(text.contains("99.5 %  vm1 0,1, vm2 1 (pinned)"), "{text}");
    assert!(
        text.ends_with("warning: port 'vm2': a descriptor loop\nwarning: the state cannot be kept\n"),
        "{text}"
    );
    let json = json(&daemon.path, &["--json", "show"]);
    assert_eq!((&json["ports"][1]["name"], &json["ports"][1]["link"]), (&"vm1".into(), &true.into()));
}

#[test]
fn stats_hide_reasons_at_zero_unless_asked() {
    let (daemon, requests) = daemon();
    let short = text(&daemon.path, &["stats"]);
    assert!(short.contains("miss_rate    4,321"), "{short}");
    assert!(!short.contains("runt"), "{short}");
    assert!(short.contains("L1, exact match           75  75.0 %"), "{short}");
    let queue: Vec<&str> = short.lines().last().unwrap().split_whitespace().collect();
    assert_eq!(queue, ["0", "vm1", "1", "1.94", "k", "25.0", "%", "here"], "{short}");
    let all = text(&daemon.path, &["stats", "--all", "vm1"]);
    assert!(all.contains("runt") && all.contains("rx_ring_full"), "{all}");
    let json = json(&daemon.path, &["stats", "vm1", "--json"]);
    assert_eq!(json["ports"]["vm1"]["rx_drops"]["miss_rate"], 4321);
    assert_eq!(json["paths"]["l1"], 75);
    let asked: Vec<Request> = requests.try_iter().collect();
    let of = |port: Option<&str>| Request::Stats { port: port.map(String::from) };
    assert_eq!(asked, [of(None), of(Some("vm1")), of(Some("vm1"))]);
    assert_eq!(failure(&daemon.path, &["stats", "vm7"]), "no port 'vm7': there are vm1, vm2");
}

#[test]
fn watch_shows_rates() {
    let (daemon, _requests) = daemon();
    let rates = text(&daemon.path, &["stats", "--watch", "0.1", "vm1", "--count", "2"]);
    let rows: Vec<&str> = rates.lines().filter(|line| line.starts_with("vm1")).collect();
    assert_eq!(rows.len(), 2, "{rates}");
    // 1000 packets in 0.1 s or, on a busy machine, in more.
    assert_ne!(rows[0].split_whitespace().nth(1), Some("0"), "{rates}");
    let samples = text(&daemon.path, &["stats", "--watch", "0.1", "--count", "2", "--json"]);
    let packets: Vec<u64> = samples
        .lines()
        .map(|line| serde_json::from_str::<Stats>(line).unwrap().ports["vm1"].rx_packets)
        .collect();
    assert_eq!(packets.len(), 2);
    assert_eq!(packets[1] - packets[0], 1000);
}

#[test]
fn flows_are_listed_like_ovs_does() {
    let (daemon, requests) = daemon();
    let all = text(&daemon.path, &["dump-flows", "vm1", "--source", "explicit"]);
    assert_eq!(all.lines().count(), 20_000);
    assert_eq!(
        all.lines().next(),
        Some("in_port(vm1),eth_type(0x0000), packets:3, bytes:180, used:never, actions:vm2")
    );
    let expected = Request::DumpFlows { port: Some("vm1".into()), source: Some(FlowSource::Explicit) };
    assert_eq!(requests.recv().unwrap(), expected);
    assert!(
        text(&daemon.path, &["dump-flows", "--more"]).starts_with("id:0.1, source:explicit, in_port(vm1)")
    );
    assert_eq!(json(&daemon.path, &["dump-flows", "--json"])["flows"][1]["id"], "1.1");
}

#[test]
fn a_reader_that_stops_early_is_no_failure() {
    let (daemon, _requests) = daemon();
    let mut child = Command::new(env!("CARGO_BIN_EXE_pointwork"))
        .args(["--control", daemon.path.to_str().unwrap(), "dump-flows"])
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let mut line = String::new();
    BufReader::new(child.stdout.take().unwrap()).read_line(&mut line).unwrap();
    let output = child.wait_with_output().unwrap();
    assert!(output.status.success());
    assert_eq!(String::from_utf8_lossy(&output.stderr), "");
}

#[test]
fn changes_ask_for_what_the_arguments_say() {
    let (daemon, requests) = daemon();
    let port = PortConfig {
        queues: Some(4),
        trunks: Some(vec![10, 20]),
        native_vlan: Some(7),
        mtu: Some(9000),
        max_masks: 16,
        miss_rate: 500,
        workers: Some(vec![1, 0]),
        ..PortConfig::of("vm3", Kind::VhostUser(Socket { mode: Mode::Client, ..Socket::new("/run/vm3") }))
    };
    let access = PortConfig {
        vlan: Some(5),
        ..PortConfig::of(
            "vm4",
            Kind::VhostUser(Socket {
                permissions: Some(FileMode(0o666)),
                group: Some("kvm".into()),
                ..Socket::new(std::path::absolute("vm4.sock").unwrap())
            }),
        )
    };
    let device = XdpDevice { name: "eth1".into(), mode: XdpChoice::Copy };
    let wire = PortConfig { queues: Some(2), ..PortConfig::of("wire1", Kind::Xdp(device)) };
    let flow = || "in_port(vm1)".to_string();
    let cases: &[(&str, Request, &str)] = &[
        (
            "add-flow in_port(vm1) vm2,vm3",
            Request::AddFlow { flow: flow(), actions: "vm2,vm3".into() },
            "flow 7.1 added: in_port(vm1)\n",
        ),
        (
            "del-flow in_port(vm1)",
            Request::DelFlow { which: FlowSelector::Flow(flow()) },
            "2 flows deleted\n",
        ),
        ("del-flow 3.1", Request::DelFlow { which: FlowSelector::Id("3.1".into()) }, "2 flows deleted\n"),
        ("del-flow --all", Request::DelFlow { which: FlowSelector::All }, "2 flows deleted\n"),
        (
            "add-port vm3 --socket /run/vm3 --mode client --queues 4 --trunks 10,20 --native-vlan 7 --mtu 9000 --max-masks 16 --miss-rate 500 --workers 1,0",
            Request::AddPort { port },
            "port vm3 added\n",
        ),
        (
            "add-port vm4 --socket vm4.sock --vlan 5 --socket-mode 0666 --socket-group kvm",
            Request::AddPort { port: access },
            "port vm4 added\n",
        ),
        (
            "add-port wire1 --kind xdp --device eth1 --xdp-mode copy --queues 2",
            Request::AddPort { port: wire },
            "port wire1 added\n",
        ),
        (
            "add-port uplink1 --nic nic1/2 --vlan 5",
            Request::AddPort { port: PortConfig { vlan: Some(5), ..PortConfig::nic("uplink1", "nic1", 2) } },
            "port uplink1 added\n",
        ),
        (
            "set-port vm3 --workers 0,2",
            Request::SetPort { name: "vm3".into(), workers: vec![0, 2] },
            "port vm3 set: queues are pinned to workers 0,2\n",
        ),
        (
            "set-port vm3 --workers auto",
            Request::SetPort { name: "vm3".into(), workers: vec![] },
            "port vm3 set: workers are chosen automatically\n",
        ),
        ("del-port vm3", Request::DelPort { name: "vm3".into() }, "port vm3 deleted\n"),
        (
            "trace vm1 ffff 0806",
            Request::Trace { port: "vm1".into(), packet: "ffff 0806".into() },
            "parse:   an ARP request\noutcome: flooded to vm2\n",
        ),
        ("sync --timeout 2.5", Request::Sync { timeout: 2.5 }, "in sync: 12 flows\n"),
    ];
    for (words, request, answer) in cases {
        let words: Vec<&str> = words.split(' ').collect();
        assert_eq!(text(&daemon.path, &words), *answer);
        assert_eq!(requests.recv_timeout(Duration::from_secs(10)).unwrap(), *request);
    }
    assert_eq!(json(&daemon.path, &["--json", "del-flow", "--all"]), serde_json::json!({"deleted": 2}));
    assert!(text(&daemon.path, &["version"]).ends_with("pointworkd 9.8.7 (protocol 1)\n"));
}

#[test]
fn failures_are_one_line_that_says_what_to_do() {
    let (daemon, requests) = daemon();
    let nowhere = daemon.path.with_file_name("nowhere");
    assert_eq!(
        failure(&nowhere, &["show"]),
        format!(
            "no daemon answers at {}: is pointworkd running? (systemctl status pointworkd)",
            nowhere.display()
        )
    );
    drop(std::os::unix::net::UnixListener::bind(&nowhere).unwrap());
    assert!(failure(&nowhere, &["stats"]).starts_with("no daemon answers at"));
    let long = Path::new("/").join("x".repeat(200));
    assert!(failure(&long, &["show"]).contains("path must be shorter"), "{}", failure(&long, &["show"]));

    for (words, reason) in [
        (&["quux"][..], "unrecognized subcommand 'quux'; 'pointwork --help' shows how"),
        (&["shwo"], "unrecognized subcommand 'shwo' (tip: a similar subcommand exists: 'show')"),
        (&[], "requires a subcommand"),
        (&["add-flow", "in_port(a)"], "required arguments were not provided: <ACTIONS>"),
        (&["del-flow"], "required arguments were not provided: <FLOW|ID>"),
        (&["del-flow", "--all", "3.1"], "cannot be used with"),
        (&["add-port", "a"], "--socket <PATH>"),
        (&["add-port", "a", "--socket", "/a", "--queues", "0"], "port 'a': queues = 0: must be 1 to 8"),
        (&["add-port", "a", "--socket", "/a", "--queues", "two"], "invalid value 'two' for '--queues <N>'"),
        (&["add-port", "a", "--socket", ""], "a value is required for '--socket <PATH>'"),
        (&["add-port", "a", "--socket", "/a", "--mode", "serve"], "[possible values: server, client]"),
        (
            &["add-port", "a", "--kind", "xdp", "--mode", "client"],
            "key 'mode' is for kind = \"vhost-user\", not \"xdp\"",
        ),
        (&["add-port", "a", "--socket", "/a", "--device", "b"], "key 'device' is for kind = \"xdp\""),
        (
            &["add-port", "name-that-is-too-long", "--socket", "/a"],
            "the name has 21 characters, 15 are allowed",
        ),
        (
            &["add-port", "a", "--socket", "/a", "--vlan", "1", "--trunks", "2"],
            "vlan and trunks exclude each other",
        ),
        (&["add-port", "a", "--socket", "/a", "--socket-mode", "999"], "'999' is not a file mode"),
        (&["add-port", "a", "--socket", "/a", "--workers", "1,x"], "numbers of workers expected"),
        (&["set-port", "a"], "--workers <N,N|auto>"),
        (
            &["set-port", "a", "--workers", ""],
            "invalid value '' for '--workers <N,N|auto>': numbers of workers",
        ),
        (&["set-port", "a", "--workers", "-1"], "'-1'"),
        (&["stats", "--watch", "0"], "--watch 0: must be 0.1 to 86400 seconds"),
        (&["sync", "--timeout=-1"], "must be 0 to 3600 seconds"),
        (&["trace", "vm1"], "<PACKET>..."),
    ] {
        let error = failure(&daemon.path, words);
        assert!(error.contains(reason), "{words:?}: '{error}' does not say '{reason}'");
    }
    assert_eq!(requests.try_iter().count(), 0, "the daemon was asked for nonsense");
}

#[test]
fn help_teaches_on_standard_output() {
    let nowhere = Path::new("/nonexistent");
    assert!(text(nowhere, &["--help"]).contains("pointwork add-port vm3 --socket"));
    assert!(text(nowhere, &["add-port", "--help"]).contains("-netdev vhost-user"));
    assert!(text(nowhere, &["help", "trace"]).contains("Examples:"));
    assert!(text(nowhere, &["--version"]).starts_with("pointwork "));
}

#[test]
fn permission_is_named_by_group() {
    // Root may do everything, so look from another user.
    let (daemon, _requests) = daemon();
    let directory = daemon.path.parent().unwrap();
    let command = directory.join("pointwork");
    std::fs::copy(env!("CARGO_BIN_EXE_pointwork"), &command).unwrap();
    let searchable = std::os::unix::fs::PermissionsExt::from_mode(0o755);
    std::fs::set_permissions(directory, searchable).unwrap();
    let mut run = Command::new(&command);
    run.args(["--control", daemon.path.to_str().unwrap(), "show"]);
    let meta = std::fs::metadata(&daemon.path).unwrap();
    if std::os::unix::fs::MetadataExt::uid(&meta) != 0 {
        // Not root: take the permission from ourselves.
        std::fs::set_permissions(&daemon.path, std::os::unix::fs::PermissionsExt::from_mode(0o000)).unwrap();
    } else {
        std::os::unix::process::CommandExt::uid(&mut run, 65_534);
        std::os::unix::process::CommandExt::gid(&mut run, 65_534);
    }
    let output = run.output().unwrap();
    assert_eq!(output.status.code(), Some(1));
    let group = backend::socket_file::group_name(std::os::unix::fs::MetadataExt::gid(&meta));
    assert_eq!(
        String::from_utf8(output.stderr).unwrap(),
        format!(
            "pointwork: no permission to use {}: it needs root or membership in group '{group}'\n",
            daemon.path.display()
        )
    );
}
