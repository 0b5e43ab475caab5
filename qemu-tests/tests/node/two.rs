//! Two compute nodes on a virtual wire, each with Open vSwitch on the kernel's datapath: `br0` with a guest and the tunnel's port,
//! `br-ex` with the node's address and the wire. The first node has `pointworkd`; the second has it too, and then has not.

use std::time::Duration;

use anyhow::{Context, Result, ensure};
use qemu_tests::daemon::PortStats;
use qemu_tests::guest::{Nic, NicBackend};
use qemu_tests::host::{WorkDir, wait_for};
use qemu_tests::node::NodeConfig;
use qemu_tests::overlay::{Kind, Site};
use qemu_tests::tools::{Iperf, Ping};

use crate::bench::{Bench, DEADLINE};

/// The wire's device, on each node.
const WIRE: &str = "eth0";
/// A guest behind a port of ours, and one behind a veth.
const VM: &str = "vm1";
const PLAIN: &str = "vm2";
const VNI: u32 = 42;
/// The kernel of Debian 12 has no multi-buffer for AF_XDP, and its virtio-net drops what fits in no page with its own needs.
const JUMBO: u16 = 3400;
const CONFIG: &str = r#"control = "/run/pointwork/control.sock"
state = "/run/pointwork/state.json"
[datapath]
l1_entries = 65536
[host]
kind = "ovs"
bridge = "br0"
[[port]]
name = "vm1"
socket = "/run/pointwork/vm1.sock"
"#;

/// A guest's address in the tunnel's network.
fn address(guest: u8) -> String {
    format!("10.1.0.{guest}")
}

struct End {
    bench: Bench,
    site: Site,
}

impl End {
    /// Boots a node with its underlay.
    fn boot(site: Site, nic: Nic) -> Result<Self> {
        let Site(number) = site;
        let bench = Bench::boot(|programs| {
            let name = format!("node{number}");
            Ok(NodeConfig { nics: vec![nic], memory: 768, ..NodeConfig::new(&name, programs) })
        })?;
        bench.node.sh("echo 1 >/proc/sys/net/ipv6/conf/default/disable_ipv6")?;
        bench
            .node
            .sh(&format!("echo 1 >/proc/sys/net/ipv6/conf/{WIRE}/disable_ipv6; ip link set {WIRE} up"))?;
        bench.vsctl(&format!(
            "add-br br0 -- add-br br-ex -- add-port br-ex {WIRE} -- \
             set interface {WIRE} external_ids:pointwork-device={WIRE}"
        ))?;
        bench.node.sh(&format!("ip link set br-ex up && ip address add {}/24 dev br-ex", site.v4()))?;
        bench.node.configure_pointworkd(CONFIG)?;
        bench.start_pointworkd()?;
        bench.start_guest(VM, number, 1500)?;
        Ok(Self { bench, site })
    }

    fn other(&self) -> Site {
        Site(3 - self.site.0)
    }

    /// The MTU of the wire, and of what is on it.
    fn mtu(&self, mtu: u16) -> Result<()> {
        self.bench.node.sh(&format!("ip link set {WIRE} mtu {mtu}"))?;
        self.bench.vsctl(&format!("set interface br-ex mtu_request={mtu}")).map(drop)
    }

    /// A tunnel to the other node, and the MTU that it leaves to the guest.
    fn tunnel(&self, kind: Kind, guest: &str, mtu: u16) -> Result<()> {
        let remote = self.other().v4();
        self.bench.vsctl(&format!(
            "--if-exists del-port br0 tun0 -- add-port br0 tun0 -- \
             set interface tun0 type={kind} options:remote_ip={remote} options:key={VNI}"
        ))?;
        if guest == VM {
            self.bench.vsctl(&format!("set interface {VM} mtu_request={mtu}"))?;
        }
        self.bench.node.sh(&format!("ip -n {guest} link set eth0 mtu {mtu}")).map(drop)
    }

    /// What the port counts.
    fn port(&self, name: &str) -> Result<PortStats> {
        self.bench.stats()?.ports.remove(name).with_context(|| format!("no port {name}"))
    }

    /// Why packets take the way that they take.
    fn told(&self) -> String {
        let dump = self.bench.node.sh("ovs-dpctl dump-flows -m --names").unwrap_or_default();
        let warnings = self.bench.warnings().unwrap_or_default();
        format!("node{}: {:#?}\n{warnings}\n{dump}", self.site.0, self.bench.flows())
    }

    /// Leaves all to Open vSwitch, with a guest behind a veth that has the addresses of the one before.
    fn plain(&self) -> Result<()> {
        let number = self.site.0;
        self.bench.node.sh(&format!(
            "ip -n {VM} address flush dev eth0 && ip netns add {PLAIN} && ip link add veth type veth peer name eth0 address 02:00:00:00:00:0{number} netns {PLAIN} && \
             ip link set veth mtu {JUMBO} up && ip -n {PLAIN} address add {}/24 dev eth0 && ip -n {PLAIN} link set eth0 up",
            address(number)
        ))?;
        self.bench.stop_pointworkd()?;
        self.bench.vsctl(&format!(
            "del-port br0 {VM} -- remove interface {WIRE} external_ids pointwork-device -- add-port br0 veth"
        ))?;
        self.bench.node.sh(&format!("ip netns exec {PLAIN} iperf3 -s -D")).map(drop)
    }
}

struct Pair {
    ends: [End; 2],
    /// The wire is in it.
    _dir: WorkDir,
}

impl Pair {
    fn boot() -> Result<Self> {
        let dir = WorkDir::new()?;
        let socket = dir.path("wire.sock");
        let nic = |listen| Nic::on(NicBackend::Stream { socket: socket.clone(), listen });
        // The first listens, so it comes first.
        let ends = [End::boot(Site(1), nic(true))?, End::boot(Site(2), nic(false))?];
        ends[1].bench.node.sh(&format!("ip netns exec {VM} iperf3 -s -D"))?;
        Ok(Self { ends, _dir: dir })
    }

    fn told(&self) -> String {
        self.ends.each_ref().map(End::told).join("\n")
    }

    fn ping(&self, count: u32) -> Result<Ping> {
        self.ends[0].bench.ping(&address(2), count)
    }

    fn wait_reachable(&self) -> Result<()> {
        wait_for("the guests to reach each other", DEADLINE, || {
            Ok(self.ping(3).is_ok_and(|ping| ping.lost() == 0).then_some(()))
        })
        .with_context(|| self.told())
    }

    fn iperf3(&self, options: &str) -> Result<Iperf> {
        self.ends[0].bench.iperf3(VM, &address(2), options)
    }

    /// Lays a tunnel between both.
    fn tunnel(&self, kind: Kind, second: &str, underlay: u16, inside: u16) -> Result<()> {
        let mtu = underlay - kind.overhead(false) - inside;
        for (end, guest) in self.ends.iter().zip([VM, second]) {
            end.tunnel(kind, guest, mtu)?;
        }
        Ok(())
    }

    /// Guests talk, and the first node's packets into the tunnel and, if so, out of it are ours. What was seen.
    fn talk(&self, what: &str, out: bool) -> Result<()> {
        self.wait_reachable().with_context(|| what.to_owned())?;
        let first = &self.ends[0];
        let mut seen = (0.0, 0);
        // Flows are read again and again; the first packets of each are the host's.
        wait_for(&format!("{what} by workers"), DEADLINE, || {
            let before = [first.port(VM)?, first.port(WIRE)?];
            let ping = self.ping(20)?;
            let after = [first.port(VM)?, first.port(WIRE)?];
            let into = after[0].rx_forwarded - before[0].rx_forwarded;
            let taken = after[1].rx_forwarded - before[1].rx_forwarded;
            seen = (into as f64 / f64::from(ping.sent), taken);
            Ok((ping.lost() == 0 && into >= 19 && (!out || taken >= 19)).then_some(()))
        })
        .with_context(|| format!("{seen:?}\n{}", self.told()))?;
        let before = [first.port(VM)?, first.port(WIRE)?];
        let [there, back] = ["", "-R"].map(|options| self.iperf3(options));
        let (there, back) = (there?, back?);
        let after = [first.port(VM)?, first.port(WIRE)?];
        let count = |i: usize| {
            let fast = after[i].rx_forwarded - before[i].rx_forwarded;
            (fast as f64 / (after[i].rx_packets - before[i].rx_packets).max(1) as f64, fast)
        };
        let (into, from) = (count(0), count(1));
        println!(
            "{what}: {:.0} and {:.0} Mbit/s; by workers {:.1} % of the guest's packets, and {} out of the wire",
            there.megabits(),
            back.megabits(),
            100.0 * into.0,
            from.1
        );
        ensure!(there.megabits() > 0.5 && back.megabits() > 0.5, "{what}: {there:?}, {back:?}");
        ensure!(into.0 >= 0.95, "{what}: {into:?}\n{}", self.told());
        ensure!(!out || (from.0 >= 0.95 && from.1 > 100), "{what}: {from:?}\n{}", self.told());
        Ok(())
    }
}

#[test]
fn two_nodes() -> Result<()> {
    let pair = Pair::boot()?;
    let [first, second] = &pair.ends;
    for kind in Kind::ALL {
        pair.tunnel(kind, VM, 1500, 0)?;
        // The kernel takes GRE out of packets itself: it is no UDP, by which a device could tell whose they are.
        pair.talk(&format!("{kind}"), kind != Kind::Gre)?;
    }
    pair.tunnel(Kind::Vxlan, VM, 1500, 4)?;
    for end in &pair.ends {
        end.bench.vsctl(&format!("set port {VM} tag=10"))?;
    }
    pair.talk("VLAN inside", true)?;
    for end in &pair.ends {
        end.bench.vsctl("set port br-ex tag=100")?;
    }
    pair.talk("VLAN inside and outside", true)?;
    for end in &pair.ends {
        end.bench.vsctl(&format!("clear port {VM} tag -- clear port br-ex tag"))?;
    }
    for end in &pair.ends {
        end.mtu(JUMBO)?;
    }
    pair.tunnel(Kind::Geneve, VM, JUMBO, 0)?;
    pair.talk("jumbo", true)?;

    // The second node gets another address in the underlay while packets go: its neighbour says so.
    let job = first.bench.node.spawn(&format!("ip netns exec {VM} ping -n -q -i 0.05 {}", address(2)))?;
    second.bench.vsctl("set bridge br-ex other-config:hwaddr=02:00:00:00:f0:22")?;
    first.bench.node.sh(&format!(
        "ip neighbour replace {} lladdr 02:00:00:00:f0:22 dev br-ex nud reachable",
        second.site.v4()
    ))?;
    pair.talk("another MAC address", true)?;
    let (sent, lost) = crate::bench::lost(job)?;
    println!("another MAC address: {lost} of {sent} lost");
    ensure!(lost <= 40, "{lost} of {sent} lost");

    second.plain()?;
    for kind in Kind::ALL {
        pair.tunnel(kind, PLAIN, 1500, 0)?;
        pair.talk(&format!("{kind}, plain Open vSwitch at the other end"), kind != Kind::Gre)?;
    }
    wait_for("the counters to balance", Duration::from_secs(30), || {
        Ok(first.bench.stats()?.imbalance().is_none().then_some(()))
    })?;
    pair.ends.into_iter().try_for_each(|end| end.bench.node.shut_down())
}
