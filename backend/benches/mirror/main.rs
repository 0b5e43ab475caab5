//! What it costs to follow Open vSwitch's flows: `cargo bench -p backend --bench mirror [FLOWS]`.
//!
//! The mirror runs as in the daemon, with a worker and its tables; what it reads is made up, so that only our own work is
//! counted: the processor time of the thread `mirror`. What OVS and the kernel do for a read is not in it; see
//! `docs/performance.md`.

use backend::datapath::{Datapath, PortSettings};
use backend::ovs::mirror::{Mirror, MirrorPort, Misses, PortKind, Restriction, Settings};
use backend::ovs::source::FlowSource;
use backend::ovs::unixctl::{Unixctl, UnixctlSource};
use backend::port_config::{Mode, Socket};
use backend::vhost::VhostUserPort;
use backend::worker::rings::Rings;
use replay::Replay;
use std::io::{Read, Write};
use std::os::unix::net::UnixListener;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

mod replay;

const PORTS: [&str; 2] = ["p1", "p2"];
/// How long a share is measured.
const WHILE: Duration = Duration::from_secs(15);
const READS: u32 = 5;
/// A sweep that does not come.
const NEVER: Duration = Duration::from_secs(3600);

/// A mirror and what it fills.
struct Rig {
    mirror: Mirror,
    workers: Datapath,
}

impl Rig {
    fn new(source: impl FlowSource + 'static) -> Rig {
        let (mut workers, ends) = Datapath::start(&[], 1 << 16, 8).expect("workers");
        // Nothing misses: there are no packets.
        drop(ends);
        let ports = PORTS.map(|name| {
            let id = workers.reserve_slot().expect("a slot");
            let socket = Socket { mode: Mode::Client, ..Socket::new("/nowhere") };
            let vhost =
                VhostUserPort::new(name, 1, socket, None, workers.quiescence.clone(), Box::new(|_| {}));
            let settings = PortSettings { name, polled_by: &[0], mtu: 1500, max_masks: 64, miss_rate: 1000 };
            workers.add_port(id, &Rings::Guest(vhost.expect(name).shared().clone()), settings).expect(name);
            MirrorPort { name: name.into(), id, restriction: Restriction::default(), kind: PortKind::Own }
        });
        let misses = Arc::new(Misses::new().expect("a waker"));
        let mirror = Mirror::spawn(Box::new(source), workers.flows.clone(), Settings::default(), misses);
        let mirror = mirror.expect("a thread");
        mirror.start_ports(ports.into()).recv().expect("the mirror lives");
        Rig { mirror, workers }
    }

    fn sync(&self) -> usize {
        self.mirror.start_sync().recv().expect("the mirror lives").expect("a read")
    }

    /// Processor time of the mirror for `work`.
    fn cost(&self, work: impl FnOnce(&Rig)) -> Duration {
        let before = cpu_time();
        work(self);
        cpu_time() - before
    }

    fn share(&self) -> f64 {
        let start = Instant::now();
        self.cost(|_| std::thread::sleep(WHILE)).as_secs_f64() / start.elapsed().as_secs_f64()
    }

    /// Each flow has a packet, as if its worker had counted it: there are no others.
    fn credit(&self) {
        let flows = self.workers.flows.lock().expect("no panic");
        flows.iter().for_each(|flow| flow.counters[0].slot().expect("applied").credit(64, 0, 1));
    }

    /// The share while every flow is busy, which it is if it has a packet between two looks.
    fn busy_share(&self) -> f64 {
        let start = Instant::now();
        let cost = self.cost(|rig| {
            while start.elapsed() < WHILE {
                rig.credit();
                std::thread::sleep(Duration::from_millis(500));
            }
        });
        cost.as_secs_f64() / start.elapsed().as_secs_f64()
    }

    fn end(mut self) {
        drop(self.mirror);
        self.workers.stop();
    }
}

/// What the thread `mirror` of this process has had of a processor.
fn cpu_time() -> Duration {
    let tasks = std::fs::read_dir("/proc/self/task").expect("/proc").flatten();
    let is_mirror =
        |path: &Path| std::fs::read_to_string(path.join("comm")).is_ok_and(|name| name.trim() == "mirror");
    let task = tasks.map(|task| task.path()).find(|path| is_mirror(path)).expect("the mirror's thread");
    let stat = std::fs::read_to_string(task.join("schedstat")).expect("schedstat");
    Duration::from_nanos(stat.split(' ').next().and_then(|nanos| nanos.parse().ok()).expect("nanoseconds"))
}

/// `VmRSS` of this process, in bytes.
fn resident() -> usize {
    let status = std::fs::read_to_string("/proc/self/status").expect("/proc");
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).expect("VmRSS");
    line.trim().trim_end_matches(" kB").parse::<usize>().expect("a number") << 10
}

/// An ovs-vswitchd that answers everything with a dump of so many flows, as 3.1 prints them.
fn vswitchd(dir: &Path, flows: u32) {
    std::fs::write(dir.join("ovs-vswitchd.pid"), "1\n").expect("a PID file");
    let listener = UnixListener::bind(dir.join("ovs-vswitchd.1.ctl")).expect("a socket");
    let mut text = r#"{"error":null,"id":0,"result":"flow-dump from the main thread:\n"#.to_owned();
    for flow in 0..flows {
        let [_, a, b, c] = flow.to_be_bytes();
        text += &format!(
            "ufid:{flow:08x}-52f5-4021-a838-fbb63a3dc689, skb_priority(0/0),skb_mark(0/0),ct_state(0/0),ct_zone(0/0),\
             ct_mark(0/0),ct_label(0/0),recirc_id(0),dp_hash(0/0),in_port(p1),packet_type(ns=0,id=0),\
             eth(src=02:00:00:00:00:01,dst=02:00:00:00:00:02),eth_type(0x0800),ipv4(src=10.{a}.{b}.{c},dst=10.0.0.2,\
             proto=17,tos=0/0,ttl=64/0,frag=no),udp(src={},dst=53), packets:{flow}, bytes:0, used:never, dp:ovs, \
             actions:p2, dp-extra-info:miniflow_bits(5,3)\\n",
            flow & 0xffff
        );
    }
    text += "\"}";
    std::thread::spawn(move || {
        for mut peer in listener.incoming().flatten() {
            // One request, which is short. The client hangs up when it has what it wants.
            if peer.read(&mut [0; 4096]).is_ok() && peer.write_all(text.as_bytes()).is_ok() {
                let _ = peer.read(&mut [0; 1]);
            }
        }
    });
}

fn main() {
    let flows: u32 = std::env::args().find_map(|word| word.parse().ok()).unwrap_or(100_000);
    let row = |what: &str, value: f64, unit: &str| println!("{what:<58}{value:>10.2} {unit}");
    let load = |name: &str, rig: &Rig| {
        let loaded = rig.cost(|rig| assert_eq!(rig.sync(), flows as usize));
        row(&format!("{name}: first read of {flows} flows"), loaded.as_secs_f64() * 1e3, "ms");
        row(&format!("{name}: flows a second, first read"), flows as f64 / loaded.as_secs_f64(), "");
        let read = rig.cost(|rig| assert!((0..READS).all(|_| rig.sync() == flows as usize))) / READS;
        row(&format!("{name}: full read, nothing new"), read.as_secs_f64() * 1e3, "ms");
    };

    let mut replay = Replay::new(PORTS, flows);
    replay.interval = NEVER;
    let before = resident();
    let rig = Rig::new(replay);
    load("netlink", &rig);
    row("memory of a flow, one worker", (resident() - before) as f64 / flows as f64, "bytes");
    let idle = rig.share();
    row("keep-alive: share of a processor, all flows idle", idle * 100.0, "%");
    row("keep-alive: share of a processor, all flows busy", rig.busy_share() * 100.0, "%");
    rig.end();

    let rig = Rig::new(Replay::new(PORTS, flows));
    rig.sync();
    let share = rig.share();
    let sweep = replay::SWEEP;
    row("netlink: terse sweep", (share - idle).max(0.0) * sweep.as_secs_f64() * 1e3, "ms");
    row("netlink: share of a processor, all flows idle", share * 100.0, "%");
    row("netlink: share of a processor, all flows busy", rig.busy_share() * 100.0, "%");
    rig.end();

    let dir = tempfile::tempdir().expect("a directory");
    vswitchd(dir.path(), flows);
    let rig = Rig::new(UnixctlSource::new(Unixctl::new(dir.path().to_owned())));
    load("unixctl", &rig);
    row("unixctl: share of a processor, all flows idle", rig.share() * 100.0, "%");
    row("unixctl: share of a processor, all flows busy", rig.busy_share() * 100.0, "%");
    rig.end();
}
