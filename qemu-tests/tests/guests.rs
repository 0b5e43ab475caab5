//! Real guests through a running `pointworkd`, in all the ways in which they come, go and differ.
//!
//! Guests boot in seconds even under emulation, yet a machine has few processors: run with `--test-threads=1`.

use std::net::{IpAddr, Ipv4Addr};
use std::time::Duration;

use qemu_tests::daemon::{Daemon, DaemonConfig, PortConfig, PortStats};
use qemu_tests::guest::{Guest, GuestConfig, NO_OFFLOADS, Nic};
use qemu_tests::host::{WorkDir, wait_for};
use qemu_tests::tools::{IperfOptions, Ping};

/// The longest that traffic may take to go on after something was restarted.
const RECOVERY: Duration = Duration::from_secs(15);

const fn ip(network: u8, host: u8) -> IpAddr {
    IpAddr::V4(Ipv4Addr::new(10, network, 0, host))
}

const A: IpAddr = ip(0, 1);
const B: IpAddr = ip(0, 2);

fn config<const N: usize>(ports: [PortConfig; N]) -> DaemonConfig {
    DaemonConfig::new(ports)
}

fn on(port: &PortConfig) -> GuestConfig {
    let nic = if port.client { Nic::listen(&port.socket) } else { Nic::connect(&port.socket) };
    GuestConfig::new(&port.name, nic.queues(port.queues))
}

/// Gives the guests 10.0.0.1, 10.0.0.2, … and waits until each reaches the first.
fn introduce(guests: &[&Guest]) {
    for (guest, last) in guests.iter().zip(1..) {
        guest.address(&format!("10.0.0.{last}/24")).unwrap();
        guest.wait_reachable(A, RECOVERY).unwrap();
    }
}

/// All of a train of pings must come back.
fn assert_pings(from: &Guest, to: IpAddr) -> Ping {
    let ping = from.ping(to, 50, Duration::from_millis(20)).unwrap();
    assert_eq!((ping.sent, ping.received), (50, 50), "{} to {to}", from.name());
    ping
}

/// TCP from `from` to the server at `to`, in Mbit/s.
fn tcp(from: &Guest, to: IpAddr, options: &IperfOptions) -> f64 {
    let result = from.iperf3(to, options).unwrap();
    assert!(result.megabits() > 5.0, "{} to {to}: {result:?}", from.name());
    result.megabits()
}

fn short() -> IperfOptions {
    IperfOptions { seconds: 1, ..Default::default() }
}

/// Ends a scenario: nothing is uncounted, and the daemon goes when it is told to.
fn finish(mut daemon: Daemon) {
    let stats = daemon.balanced_stats().unwrap();
    println!("{:?}; drops {:?}; {} flows", stats.paths, stats.drops(), daemon.flows().unwrap());
    daemon.terminate().unwrap();
}

#[test]
fn server_mode_one_queue_pair() {
    let dir = WorkDir::new().unwrap();
    let [vm1, vm2] = ["vm1", "vm2"].map(|name| PortConfig::server(name, &dir));
    let daemon = Daemon::start(&config([vm1.clone(), vm2.clone()]), &dir).unwrap();
    daemon.wait_link(&["vm1", "vm2"], false, RECOVERY).unwrap();
    let [a, b] = Guest::start_all([on(&vm1), on(&vm2)], &dir).unwrap();
    introduce(&[&a, &b]);
    daemon.wait_link(&["vm1", "vm2"], true, RECOVERY).unwrap();
    let shown = daemon.show().unwrap();
    assert!(shown.iter().all(|port| port.mode == "server" && port.queues == 1), "{shown:?}");

    println!("ping: {}", assert_pings(&a, B));
    println!("ping: {}", assert_pings(&b, A));
    b.iperf3_server().unwrap();
    for reverse in [false, true] {
        println!("TCP: {:.0} Mbit/s", tcp(&a, B, &IperfOptions { reverse, ..Default::default() }));
        let bitrate = Some("10M".to_owned());
        let udp = a.iperf3(B, &IperfOptions { udp: true, reverse, bitrate, ..Default::default() }).unwrap();
        println!("UDP: {:.1} Mbit/s, {:?}", udp.megabits(), udp.datagrams);
        let (lost, sent) = udp.datagrams.unwrap();
        assert!(sent > 1000 && lost * 20 < sent, "{udp:?}");
    }
    a.sh("ip addr add fd00::1/64 dev eth0 nodad").unwrap();
    b.sh("ip addr add fd00::2/64 dev eth0 nodad").unwrap();
    assert_pings(&a, "fd00::2".parse().unwrap());

    let stats = daemon.balanced_stats().unwrap();
    let (vm1, vm2) = (&stats.ports["vm1"], &stats.ports["vm2"]);
    assert!(vm1.rx_packets > 1000 && vm2.tx_packets > 1000 && vm1.rx_bytes > vm1.rx_packets, "{stats:?}");
    let paths = stats.paths;
    let all = paths.l1 + paths.l2 + paths.miss + paths.punt;
    assert!(
        paths.l1 * 100 >= all * 95,
        "the exact-match table carries nearly all packets of few flows: {paths:?}"
    );
    assert!(paths.miss < 100, "only the first packets of a flow miss: {paths:?}");
    assert!(daemon.flows().unwrap() > 0);

    // A cable that is pulled and plugged again.
    a.set_link(0, false).unwrap();
    assert_eq!(b.ping(A, 2, Duration::from_millis(100)).unwrap().received, 0);
    a.set_link(0, true).unwrap();
    b.wait_reachable(A, RECOVERY).unwrap();

    // With nothing to do it does nothing: the guests' background packets are few.
    let usage = daemon.cpu_usage(Duration::from_secs(5)).unwrap();
    println!("idle: {:.2} % of a core", usage * 100.0);
    assert!(usage < 0.01, "an idle daemon used {:.2} % of a core", usage * 100.0);
    finish(daemon);
}

#[test]
fn client_mode_many_queue_pairs_and_restarts_of_the_daemon() {
    let dir = WorkDir::new().unwrap();
    let (vm1, vm2) = (PortConfig::client("vm1", &dir).queues(2), PortConfig::client("vm2", &dir).queues(4));
    let config = config([vm1.clone(), vm2.clone()]);
    let mut daemon = Daemon::start(&config, &dir).unwrap();
    let guest = |port| GuestConfig { vcpus: 2, ..on(port) };
    let [a, b] = Guest::start_all([guest(&vm1), guest(&vm2)], &dir).unwrap();
    introduce(&[&a, &b]);
    b.iperf3_server().unwrap();
    for (queues_a, queues_b) in [(2, 4), (1, 2), (2, 3)] {
        a.sh(&format!("ethtool -L eth0 combined {queues_a}")).unwrap_or_default();
        b.sh(&format!("ethtool -L eth0 combined {queues_b}")).unwrap_or_default();
        let now = |guest: &Guest| {
            guest.sh("ethtool -l eth0 | awk '/Combined/ { n = $2 } END { print n }'").unwrap()
        };
        assert_eq!((now(&a).trim(), now(&b).trim()), (&*queues_a.to_string(), &*queues_b.to_string()));
        assert_pings(&a, B);
        let parallel = IperfOptions { parallel: 4, seconds: 2, ..Default::default() };
        println!("TCP, {queues_a} to {queues_b} queue pairs: {:.0} Mbit/s", tcp(&a, B, &parallel));
        tcp(&a, B, &IperfOptions { reverse: true, ..parallel });
    }

    // The guests stay; the daemon is killed, then told to end, and comes back each time.
    let stream = a.spawn("ping -n -q -i 0.1 10.0.0.2").unwrap();
    daemon.balanced_stats().unwrap();
    daemon.kill().unwrap();
    daemon = Daemon::start(&config, &dir).unwrap();
    a.wait_reachable(B, RECOVERY).unwrap();
    daemon.wait_link(&["vm1", "vm2"], true, RECOVERY).unwrap();
    finish(daemon);
    daemon = Daemon::start(&config, &dir).unwrap();
    a.wait_reachable(B, RECOVERY).unwrap();
    assert!(stream.running());
    let pings = Ping::parse(&stream.interrupt(RECOVERY).unwrap().stdout).unwrap();
    println!("over two restarts: {pings}");
    assert!(pings.received > 0);
    assert_pings(&a, B);
    tcp(&a, B, &IperfOptions { parallel: 4, ..short() });
    finish(daemon);
}

#[test]
fn guests_and_drivers_come_and_go() {
    let dir = WorkDir::new().unwrap();
    let [vm1, vm2] = ["vm1", "vm2"].map(|name| PortConfig::server(name, &dir));
    let config = config([vm1.clone(), vm2.clone()]);
    let mut daemon = Daemon::start(&config, &dir).unwrap();
    let [a, mut b] = Guest::start_all([on(&vm1), on(&vm2)], &dir).unwrap();
    introduce(&[&a, &b]);

    // QEMU vanishes in the midst of traffic, and comes back.
    b.iperf3_server().unwrap();
    let load = a.spawn("iperf3 -c 10.0.0.2 -t 30").unwrap();
    std::thread::sleep(Duration::from_secs(1));
    b.kill().unwrap();
    daemon.wait_link(&["vm2"], false, RECOVERY).unwrap();
    load.kill().unwrap();
    b = Guest::start(on(&vm2), &dir).unwrap();
    introduce(&[&a, &b]);
    assert_pings(&a, B);
    println!("killed and started again: {:?}", daemon.balanced_stats().unwrap().drops());

    // Reboot from inside, and by the reset button, while pings go on.
    let stream = a.spawn("ping -n -q -i 0.1 10.0.0.2").unwrap();
    b.reboot().unwrap();
    introduce(&[&a, &b]);
    b.reset().unwrap();
    introduce(&[&a, &b]);
    assert!(Ping::parse(&stream.interrupt(RECOVERY).unwrap().stdout).unwrap().received > 0);
    assert_pings(&a, B);

    // The driver is unloaded and loaded, and the device unbound and bound.
    for _ in 0..3 {
        b.sh("rmmod virtio_net && modprobe virtio_net").unwrap();
        introduce(&[&a, &b]);
    }
    let device = b.sh("basename $(readlink /sys/class/net/eth0/device)").unwrap();
    let driver = "/sys/bus/virtio/drivers/virtio_net";
    b.sh(&format!("echo {0} >{driver}/unbind && echo {0} >{driver}/bind", device.trim())).unwrap();
    introduce(&[&a, &b]);
    assert_pings(&a, B);
    b.iperf3_server().unwrap();
    tcp(&a, B, &short());

    // The processors halt for a while; nothing is lost but what did not fit.
    b.stop().unwrap();
    assert_eq!(a.ping(B, 1, Duration::from_millis(100)).unwrap().received, 0);
    b.cont().unwrap();
    a.wait_reachable(B, RECOVERY).unwrap();

    // In this mode it is QEMU that comes back to a daemon that was killed.
    daemon.balanced_stats().unwrap();
    daemon.kill().unwrap();
    daemon = Daemon::start(&config, &dir).unwrap();
    a.wait_reachable(B, RECOVERY).unwrap();
    assert_pings(&a, B);
    b.quit().unwrap();
    daemon.wait_link(&["vm2"], false, RECOVERY).unwrap();
    finish(daemon);
}

#[test]
fn offloads_pay() {
    let dir = WorkDir::new().unwrap();
    let ports = ["vm1", "vm2", "vm3", "vm4"].map(|name| PortConfig::server(name, &dir));
    let daemon = Daemon::start(&config(ports.clone()), &dir).unwrap();
    let without = |port: &PortConfig| {
        let config = on(port);
        GuestConfig { nics: vec![config.nics[0].clone().options(NO_OFFLOADS)], ..config }
    };
    let configs = [on(&ports[0]), on(&ports[1]), without(&ports[2]), without(&ports[3])];
    let [a, b, c, d] = Guest::start_all(configs, &dir).unwrap();
    introduce(&[&a, &b, &c, &d]);
    assert!(a.sh("ethtool -k eth0").unwrap().contains("tcp-segmentation-offload: on"));
    assert!(c.sh("ethtool -k eth0").unwrap().contains("tcp-segmentation-offload: off"));
    b.iperf3_server().unwrap();
    d.iperf3_server().unwrap();
    // What offloads save is packets; how much faster that is, a machine that does other things too cannot say.
    let packets_per_mib = |from: &Guest, port: &str, to: IpAddr| {
        let sent = |what: fn(&PortStats) -> u64| what(&daemon.balanced_stats().unwrap().ports[port]);
        let before = (sent(|p| p.rx_packets), sent(|p| p.rx_bytes));
        let rate = tcp(from, to, &IperfOptions { seconds: 2, ..Default::default() });
        let (packets, bytes) = (sent(|p| p.rx_packets) - before.0, sent(|p| p.rx_bytes) - before.1);
        println!("{port}: {rate:.0} Mbit/s, {} bytes a packet", bytes / packets);
        (packets << 20) / bytes
    };
    let (with, without) = (packets_per_mib(&a, "vm1", B), packets_per_mib(&c, "vm3", ip(0, 4)));
    assert!(without >= 690, "frames of 1514 bytes at most: {without} a MiB");
    assert!(with <= without / 2, "packets a MiB: {with} with offloads, {without} without");
    // Large segments cross to a guest that cannot take them whole, and the other way about.
    tcp(&a, ip(0, 4), &short());
    tcp(&c, B, &short());
    finish(daemon);
}

#[test]
fn packed_rings() {
    let dir = WorkDir::new().unwrap();
    let [vm1, vm2] = ["vm1", "vm2"].map(|name| PortConfig::server(name, &dir));
    let config = config([vm1.clone(), vm2.clone()]);
    let mut daemon = Daemon::start(&config, &dir).unwrap();
    let packed = |port: &PortConfig, more: &str| {
        GuestConfig::new(&port.name, Nic::connect(&port.socket).options(&format!("packed=on{more}")))
    };
    // A driver that does not know what is in order leaves it.
    let [a, b] = Guest::start_all([packed(&vm1, ""), packed(&vm2, ",in_order=on")], &dir).unwrap();
    introduce(&[&a, &b]);
    let shown = daemon.show().unwrap();
    assert!(shown.iter().all(|port| port.features.iter().any(|name| name == "packed")), "{shown:?}");
    [&a, &b].into_iter().for_each(|guest| guest.iperf3_server().unwrap());
    assert_pings(&b, A);
    tcp(&a, B, &short());
    tcp(&b, A, &short());
    // The driver takes its device over again, with rings from the first place on.
    b.sh("rmmod virtio_net && modprobe virtio_net").unwrap();
    introduce(&[&a, &b]);
    assert_pings(&a, B);
    tcp(&a, B, &short());
    // The rings are stopped where they are, and go on there.
    a.stop().unwrap();
    a.cont().unwrap();
    assert_pings(&a, B);
    // The daemon is killed under traffic. Nobody has told QEMU where it was in the rings, and the next one goes on there.
    for _ in 0..2 {
        let load = a.spawn("iperf3 -c 10.0.0.2 -t 30").unwrap();
        let sent = || daemon.stats().map(|stats| stats.ports["vm2"].tx_packets);
        let before = sent().unwrap();
        wait_for("traffic", RECOVERY, || Ok((sent()? > before + 500).then_some(()))).unwrap();
        daemon.kill().unwrap();
        daemon = Daemon::start(&config, &dir).unwrap();
        a.wait_reachable(B, RECOVERY).unwrap();
        b.wait_reachable(A, RECOVERY).unwrap();
        load.kill().unwrap();
        assert_pings(&a, B);
        assert_pings(&b, A);
    }
    finish(daemon);
}

#[test]
fn devices_of_all_sorts() {
    let dir = WorkDir::new().unwrap();
    let [vm1, vm2] = ["vm1", "vm2"].map(|name| PortConfig::server(name, &dir));
    let narrow = PortConfig::server("narrow", &dir).with("mtu = 1280");
    let daemon = Daemon::start(&config([vm1.clone(), vm2.clone(), narrow.clone()]), &dir).unwrap();
    // Memory in two regions; buffers come from both once some of it is in use.
    let a = Guest::start(GuestConfig { memory: 512, segments: 2, ..on(&vm1) }, &dir).unwrap();
    a.address("10.0.0.1/24").unwrap();
    a.iperf3_server().unwrap();
    let check = |b: &Guest| {
        introduce(&[&a, b]);
        assert_pings(b, A);
        for size in [0, 1, 1400, 9000] {
            b.sh(&format!("ping -n -q -c 3 -i 0.02 -s {size} 10.0.0.1")).unwrap();
        }
        for reverse in [false, true] {
            tcp(b, A, &IperfOptions { reverse, ..short() });
        }
    };
    for options in [
        "mrg_rxbuf=off",
        "mrg_rxbuf=off,guest_tso4=off,guest_tso6=off,guest_ecn=off,guest_ufo=off",
        "event_idx=off",
        "indirect_desc=off,event_idx=off",
        "rx_queue_size=1024,tx_queue_size=1024",
        "csum=off",
        "guest_csum=off",
    ] {
        println!("{options}");
        let config = on(&vm2);
        let b = GuestConfig { nics: vec![config.nics[0].clone().options(options)], ..config };
        let b = Guest::start(b, &dir).unwrap();
        check(&b);
        daemon.balanced_stats().unwrap();
        b.quit().unwrap();
    }

    // A narrow port: its guest is told, and what is too long for it is dropped.
    let config = on(&narrow);
    let b = GuestConfig { nics: vec![config.nics[0].clone().options("host_mtu=1280")], ..config };
    let b = Guest::start(b, &dir).unwrap();
    assert_eq!(b.sh("cat /sys/class/net/eth0/mtu").unwrap().trim(), "1280");
    introduce(&[&a, &b]);
    tcp(&b, A, &short());
    assert_eq!(a.run("ping -n -q -c 2 -W 1 -M do -s 1400 10.0.0.2", RECOVERY).unwrap().status, 1);
    let stats = daemon.balanced_stats().unwrap();
    assert!(stats.drops().keys().any(|drop| drop.contains("mtu")), "{:?}", stats.drops());
    finish(daemon);
}

#[test]
fn vlans_of_the_embedded_bridge() {
    let dir = WorkDir::new().unwrap();
    // The combinations of mode and queues that the other scenarios leave out, too.
    let red = PortConfig::server("red", &dir).queues(2).with("vlan = 10");
    let blue = PortConfig::server("blue", &dir).with("vlan = 20");
    let trunk = PortConfig::client("trunk", &dir).with("trunks = [10, 20]");
    let daemon = Daemon::start(&config([red.clone(), blue.clone(), trunk.clone()]), &dir).unwrap();
    let two = GuestConfig { vcpus: 2, ..on(&red) };
    let [r, b, t] = Guest::start_all([two, on(&blue), on(&trunk)], &dir).unwrap();
    assert_eq!(r.sh("ethtool -l eth0 | awk '/Combined/ { n = $2 } END { print n }'").unwrap().trim(), "2");
    t.sh("modprobe 8021q && ip link set eth0 up").unwrap();
    for vlan in [10, 20] {
        let name = format!("eth0.{vlan}");
        t.sh(&format!("ip link add link eth0 name {name} type vlan id {vlan}")).unwrap();
        t.sh(&format!("ip addr add 10.{vlan}.0.3/24 dev {name} && ip link set {name} up")).unwrap();
    }
    r.address("10.10.0.1/24").unwrap();
    b.address("10.20.0.2/24").unwrap();
    t.wait_reachable(ip(10, 1), RECOVERY).unwrap();
    t.wait_reachable(ip(20, 2), RECOVERY).unwrap();
    assert_pings(&t, ip(10, 1));
    assert_pings(&b, ip(20, 3));
    r.iperf3_server().unwrap();
    for reverse in [false, true] {
        println!(
            "TCP between trunk and access: {:.0} Mbit/s",
            tcp(&t, ip(10, 1), &IperfOptions { reverse, ..short() })
        );
    }
    // The same network on both access ports: what keeps them apart is the VLAN alone.
    b.sh("ip addr add 10.10.0.2/24 dev eth0").unwrap();
    assert_eq!(r.ping(ip(10, 2), 3, Duration::from_millis(100)).unwrap().received, 0);
    // A VLAN that is in no list stays out, in both directions.
    t.sh("ip link add link eth0 name eth0.30 type vlan id 30").unwrap();
    t.sh("ip addr add 10.20.0.30/24 dev eth0.30 && ip link set eth0.30 up").unwrap();
    assert_eq!(t.run("ping -n -q -c 2 -W 1 -I eth0.30 10.20.0.2", RECOVERY).unwrap().status, 1);
    finish(daemon);
}
