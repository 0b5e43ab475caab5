//! Two chassis of OVN: logical switches and a logical router, by GENEVE with OVN's option. The first has pointworkd under its Open
//! vSwitch, the second has plain Open vSwitch.

use std::net::{IpAddr, Ipv4Addr, SocketAddr, TcpListener, TcpStream};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use qemu_tests::daemon::{Daemon, DaemonConfig, PortConfig};
use qemu_tests::host::{Process, WorkDir, wait_for};
use qemu_tests::net::SOON;
use qemu_tests::netns::Namespace;
use qemu_tests::overlay::{Nodes, Site, WIRE, leave_nothing, text};
use qemu_tests::ovs::BRIDGE;
use serde_json::Value;

use crate::bed::{BULK, FAST, LATE, MTU, bulk, join_guest, mac, share, state};

/// What GENEVE with one option of four bytes lays around.
const OVERHEAD: u16 = 58;
const SCHEMAS: &str = "/usr/share/ovn";

/// A guest: its logical port is called as its port is.
struct Guest {
    port: &'static str,
    /// Of chassis.
    node: usize,
    /// Of logical switches.
    switch: u8,
    number: u8,
}

const GUESTS: [Guest; 4] = [
    Guest { port: "p1", node: 0, switch: 0, number: 1 },
    Guest { port: "g2", node: 1, switch: 0, number: 2 },
    Guest { port: "p3", node: 0, switch: 1, number: 3 },
    Guest { port: "g4", node: 1, switch: 1, number: 4 },
];
/// Who talks to whom: by one switch and by the router to the other chassis, and by the router on the first.
const PAIRS: [(&str, usize, usize); 4] = [
    ("switched, to the other chassis", 0, 1),
    ("switched, from the other chassis", 1, 0),
    ("routed, to the other chassis", 0, 3),
    ("routed, from the other chassis", 3, 0),
];
const ON_ONE_CHASSIS: (&str, usize, usize) = ("routed on one chassis", 0, 2);

impl Guest {
    fn address(&self) -> Ipv4Addr {
        Ipv4Addr::new(10, 1, self.switch, self.number)
    }
}

/// The router's address in a switch.
fn gateway(switch: u8) -> Ipv4Addr {
    Ipv4Addr::new(10, 1, switch, 254)
}

/// The central database with its `ovn-northd`, and a controller on each chassis.
struct Ovn {
    /// They end in this order.
    processes: Vec<Process>,
    socket: PathBuf,
}

impl Ovn {
    fn start(nodes: &Nodes, dir: &WorkDir) -> Result<Self> {
        let mut processes = Vec::new();
        for (file, schema) in [("nb.db", "ovn-nb"), ("sb.db", "ovn-sb")] {
            let schema = format!("{SCHEMAS}/{schema}.ovsschema");
            ensure!(Path::new(&schema).exists(), "{schema} is missing (ovn-central, ovn-common)");
            let mut create = Command::new("ovsdb-tool");
            said(create.arg("create").arg(dir.path(file)).arg(schema))?;
        }
        let socket = dir.path("ovn.sock");
        let remote = format!("unix:{}", socket.display());
        let spawn = |name: &str, namespace: Option<&Namespace>, rundir: &Path, arguments: &[String]| {
            let log = dir.path(&format!("{name}.log"));
            let configure = |command: &mut Command| {
                if let Some(namespace) = namespace {
                    command.arg(format!("--net={}", namespace.path().display())).args(["--", program(name)]);
                }
                command.args(arguments).env("OVS_RUNDIR", rundir).env("OVN_RUNDIR", dir.root());
            };
            let program = if namespace.is_some() { "nsenter" } else { program(name) };
            Process::spawn(name, Path::new(program), configure, &log)
        };
        let database = |file| dir.path(file).display().to_string();
        // The others have sockets of their names in their directory.
        let control = |name| format!("--unixctl={}", dir.path(name).display());
        let served = [
            format!("--remote=p{remote}"),
            control("ovsdb-server.ctl"),
            database("nb.db"),
            database("sb.db"),
        ];
        processes.push(spawn("ovsdb-server", None, dir.root(), &served)?);
        wait_for("OVN's database", LATE, || Ok(UnixStream::connect(&socket).ok()))?;
        let databases = [format!("--ovnnb-db={remote}"), format!("--ovnsb-db={remote}")];
        processes.push(spawn("ovn-northd", None, dir.root(), &databases)?);
        for (ovs, number) in nodes.ovs.iter().zip(1..) {
            let settings = [
                format!("external_ids:system-id=chassis{number}"),
                format!("external_ids:ovn-remote={remote}"),
                "external_ids:ovn-encap-type=geneve".into(),
                format!("external_ids:ovn-encap-ip={}", Site(number).v4()),
                format!("external_ids:ovn-bridge={BRIDGE}"),
                "external_ids:ovn-bridge-datapath-type=netdev".into(),
            ];
            let words: Vec<&str> = settings.iter().map(String::as_str).collect();
            ovs.vsctl(&[&["set", "Open_vSwitch", "."], &words[..]].concat())?;
            let name = format!("ovn-controller{number}");
            processes.push(spawn(&name, Some(ovs.namespace()), ovs.rundir(), &[ovs.db()])?);
        }
        // Whoever needs another goes first.
        processes.reverse();
        Ok(Self { processes, socket })
    }

    /// `ovn-nbctl`; returns when all chassis have done it.
    fn nbctl(&self, arguments: &[&str]) -> Result<String> {
        let mut command = Command::new("ovn-nbctl");
        command.arg(format!("--db=unix:{}", self.socket.display())).args(["--timeout=30", "--wait=hv"]);
        said(command.args(arguments))
    }
}

/// What a process of this name runs.
fn program(name: &str) -> &str {
    name.trim_end_matches(|c: char| c.is_ascii_digit())
}

fn said(command: &mut Command) -> Result<String> {
    let output = command.stdin(Stdio::null()).output().with_context(|| format!("{command:?}"))?;
    ensure!(output.status.success(), "{command:?}: {}", String::from_utf8_lossy(&output.stderr));
    Ok(String::from_utf8(output.stdout)?)
}

/// The network, the chassis, and the guests.
struct Cloud {
    /// Ends before the namespaces that they are in.
    _joined: Vec<Process>,
    ovn: Ovn,
    daemon: Daemon,
    guests: Vec<Namespace>,
    nodes: Nodes,
    _dir: WorkDir,
}

impl Cloud {
    fn start() -> Result<Self> {
        let dir = WorkDir::new()?;
        let nodes = Nodes::start(MTU)?;
        let ours: Vec<&Guest> = GUESTS.iter().filter(|guest| guest.node == 0).collect();
        let ports: Vec<PortConfig> = ours.iter().map(|guest| PortConfig::server(guest.port, &dir)).collect();
        let daemon = Daemon::start(&DaemonConfig::under(&nodes.ovs[0], ports.clone()), &dir)?;
        nodes.plug(MTU)?;
        let ovn = Ovn::start(&nodes, &dir)?;
        ovn.nbctl(&["lr-add", "lr0"])?;
        for switch in [0, 1] {
            let [name, router, peer] = ["sw", "r", "s"].map(|stem| format!("{stem}{switch}"));
            let (mac, address) = (format!("02:00:00:00:fe:0{switch}"), format!("{}/24", gateway(switch)));
            ovn.nbctl(&["ls-add", &name])?;
            ovn.nbctl(&["lrp-add", "lr0", &router, &mac, &address])?;
            ovn.nbctl(&["lsp-add", &name, &peer])?;
            ovn.nbctl(&["lsp-set-type", &peer, "router"])?;
            ovn.nbctl(&["lsp-set-addresses", &peer, "router"])?;
            ovn.nbctl(&["lsp-set-options", &peer, &format!("router-port={router}")])?;
        }
        let mut cloud = Self { _joined: Vec::new(), ovn, daemon, guests: Vec::new(), nodes, _dir: dir };
        for (number, guest) in GUESTS.iter().enumerate() {
            let port = ports.iter().find(|port| port.name == guest.port);
            cloud.add(number, guest, port)?;
        }
        let linked: Vec<&str> = ours.iter().map(|guest| guest.port).chain([WIRE]).collect();
        cloud.daemon.wait_link(&linked, true, LATE)?;
        Ok(cloud)
    }

    /// A guest, behind a port of ours if it is given.
    fn add(&mut self, number: usize, guest: &Guest, port: Option<&PortConfig>) -> Result<()> {
        let Guest { port: name, node, switch, .. } = guest;
        let (mac, address) = (text(mac(number)), guest.address());
        let namespace = Namespace::new()?;
        let ovs = &self.nodes.ovs[*node];
        self.ovn.nbctl(&["lsp-add", &format!("sw{switch}"), name])?;
        self.ovn.nbctl(&["lsp-set-addresses", name, &format!("{mac} {address}")])?;
        match port {
            Some(port) => self._joined.push(join_guest(&namespace, number, &port.socket, &self._dir)?),
            None => {
                let there = ovs.namespace();
                let peer = ["type", "veth", "peer", "name", "eth0", "netns", namespace.name()];
                there.ip(&[&["link", "add", name][..], &peer].concat())?;
                there.ip(&["link", "set", name, "up"])?;
                namespace.ip(&["link", "set", "eth0", "address", &mac, "up"])?;
                leave_nothing(&namespace, "eth0")?;
                ovs.vsctl(&["add-port", BRIDGE, name])?;
            }
        }
        ovs.vsctl(&["set", "interface", name, &format!("external_ids:iface-id={name}")])?;
        wait_for("a guest's device", SOON, || {
            Ok(namespace.ip(&["addr", "add", &format!("{address}/24"), "dev", "eth0"]).ok())
        })?;
        namespace.ip(&["link", "set", "eth0", "mtu", &(MTU - OVERHEAD).to_string()])?;
        // When the device is up.
        let route = ["route", "add", "default", "via", &gateway(*switch).to_string()];
        wait_for("a guest's route", SOON, || Ok(namespace.ip(&route).ok()))?;
        self.guests.push(namespace);
        Ok(())
    }
}

impl Cloud {
    /// What there is to know for whoever looks into a failure.
    fn state(&self) -> String {
        let logs: Vec<String> = self.ovn.processes.iter().map(|process| process.log_tail(20)).collect();
        format!("{}\n{}", state(&self.nodes, &self.daemon), logs.join("\n"))
    }

    /// Whether a guest reaches another at this TCP port; it is tried for a while if it must, and once if it must not.
    fn reaches(&self, from: usize, to: usize, port: u16) -> Result<bool> {
        let address = SocketAddr::new(GUESTS[to].address().into(), port);
        let _listener = self.guests[to].run(|| Ok(TcpListener::bind(address)?))?;
        let connect = || Ok(TcpStream::connect_timeout(&address, Duration::from_millis(500)).is_ok());
        self.guests[from].run(connect)
    }

    fn wait_reachable(&self, is: bool, port: u16) -> Result<()> {
        for (what, from, to) in PAIRS.into_iter().chain([ON_ONE_CHASSIS]) {
            // Policies of the test are the first switch's.
            if !is && GUESTS[to].switch != 0 {
                continue;
            }
            wait_for(&format!("{what}: to be reached at port {port}: {is}"), LATE, || {
                Ok((self.reaches(from, to, port)? == is).then_some(()))
            })
            .with_context(|| self.state())?;
        }
        Ok(())
    }

    fn send(&self, from: usize, to: usize, len: usize) -> Result<f64> {
        let address = SocketAddr::new(IpAddr::V4(GUESTS[to].address()), 80);
        bulk(&self.guests[from], &self.guests[to], address, len).with_context(|| self.state())
    }

    /// Guests send to each other; workers carry it as soon as the flows are known.
    fn fast(&self, when: &str) -> Result<()> {
        for (what, from, to) in PAIRS.into_iter().chain([ON_ONE_CHASSIS]) {
            // What comes by the wire, and what this chassis' guests send: a stream's other direction is its acknowledgements.
            let ports: Vec<&str> =
                [GUESTS[0].port, if GUESTS[to].node == GUESTS[from].node { GUESTS[2].port } else { WIRE }]
                    .into();
            let transfer = |len: usize| {
                let (mut rate, mut second) = (0.0, (0.0, 0));
                let first = share(&self.daemon, ports[0], || {
                    second = share(&self.daemon, ports[1], || {
                        rate = self.send(from, to, len)?;
                        Ok(())
                    })?;
                    Ok(())
                })?;
                Ok::<_, anyhow::Error>((rate, first, second))
            };
            let is_fast =
                |(_, first, second): &(f64, (f64, u64), (f64, u64))| first.0 >= FAST && second.0 >= FAST;
            wait_for(&format!("{when}, {what}: workers to carry it"), LATE, || {
                Ok(is_fast(&transfer(BULK / 16)?).then_some(()))
            })
            .with_context(|| self.state())?;
            let measured = transfer(BULK)?;
            let (rate, first, second) = measured;
            println!(
                "{when}, {what}: {rate:.0} Mbit/s, by workers {:.2} % of {} from {} and {:.2} % of {} from {}",
                100.0 * first.0,
                first.1,
                ports[0],
                100.0 * second.0,
                second.1,
                ports[1]
            );
            ensure!(is_fast(&measured), "{when}, {what}: {measured:?}: {}", self.state());
        }
        Ok(())
    }

    /// How flows that name this are handled.
    fn handling(&self, text: &str) -> Result<Vec<String>> {
        let flows = self.daemon.ctl(&["dump-flows"])?;
        let flows = flows["flows"].as_array().context("no flows")?;
        let part = |value: &Value| value.as_str().unwrap_or_default().to_owned();
        let such = flows
            .iter()
            .filter(|flow| part(&flow["flow"]).contains(text) || part(&flow["actions"]).contains(text));
        Ok(such.map(|flow| part(&flow["handling"])).collect())
    }
}

#[test]
fn two_chassis_of_ovn() -> Result<()> {
    let mut cloud = Cloud::start()?;
    cloud.wait_reachable(true, 7)?;
    cloud.fast("without policies")?;

    // Where a packet goes in the logical network is in OVN's option (class 0x102, type 0x80), both ways.
    for option in ["geneve({class=0x102,type=0x80", "options({class=0x102,type=0x80"] {
        let flows = cloud.handling(option)?;
        let is_fast = flows.iter().filter(|handling| *handling == "fast").count();
        ensure!(is_fast >= 2, "{option}: {flows:?}\n{}", cloud.state());
    }

    // Stateful policies: connections are tracked, which is the host's to do.
    for (priority, direction, rule, verdict) in [
        ("1000", "to-lport", "ip4", "allow-related"),
        ("1000", "from-lport", "ip4", "allow-related"),
        ("2000", "to-lport", "tcp.dst == 81", "drop"),
    ] {
        cloud.ovn.nbctl(&["acl-add", "sw0", direction, priority, rule, verdict])?;
    }
    cloud.wait_reachable(false, 81)?;
    cloud.wait_reachable(true, 7)?;
    for (what, from, to) in PAIRS {
        println!("with policies, {what}: {:.0} Mbit/s", cloud.send(from, to, BULK / 4)?);
    }
    let tracked = cloud.handling("ct(")?;
    ensure!(!tracked.is_empty(), "{}", cloud.state());
    ensure!(tracked.iter().all(|handling| handling.starts_with("punt")), "{tracked:?}");
    println!("flows with ct: {} of {tracked:?}", tracked.len());

    cloud.ovn.nbctl(&["acl-del", "sw0"])?;
    cloud.wait_reachable(true, 81)?;
    cloud.fast("without policies again")?;
    let stats = cloud.daemon.balanced_stats()?;
    println!("{:?}; drops {:?}", stats.paths, stats.drops());
    cloud.daemon.terminate()
}
