//! The harness by itself: two guests on one virtual cable, no switch in between.

use std::net::{IpAddr, Ipv4Addr};
use std::time::{Duration, Instant};

use qemu_tests::guest::{Guest, GuestConfig, Nic, NicBackend};
use qemu_tests::host::WorkDir;
use qemu_tests::tools::IperfOptions;

const B: IpAddr = IpAddr::V4(Ipv4Addr::new(10, 0, 0, 2));

#[test]
fn two_guests_on_a_cable() {
    let dir = WorkDir::new().unwrap();
    let end = |listen| Nic::on(NicBackend::Stream { socket: dir.path("cable"), listen });
    let start = Instant::now();
    let [a, b] =
        Guest::start_all([GuestConfig::new("a", end(true)), GuestConfig::new("b", end(false))], &dir)
            .unwrap();
    println!("two guests were up after {:.1} s", start.elapsed().as_secs_f64());
    a.address("10.0.0.1/24").unwrap();
    b.address("10.0.0.2/24").unwrap();

    let ping = a.ping(B, 10, Duration::from_millis(100)).unwrap();
    println!("ping: {ping}");
    assert_eq!((ping.sent, ping.received), (10, 10));
    b.iperf3_server().unwrap();
    for reverse in [false, true] {
        let tcp = a.iperf3(B, &IperfOptions { seconds: 2, reverse, ..Default::default() }).unwrap();
        println!("TCP: {:.0} Mbit/s, {:?} retransmits", tcp.megabits(), tcp.retransmits);
        assert!(tcp.megabits() > 1.0);
        let bitrate = Some("5M".to_owned());
        let udp = a
            .iperf3(B, &IperfOptions { udp: true, seconds: 2, reverse, bitrate, ..Default::default() })
            .unwrap();
        println!("UDP: {:.1} Mbit/s, lost and sent {:?}", udp.megabits(), udp.datagrams);
        let (lost, sent) = udp.datagrams.unwrap();
        assert!(sent > 100 && lost * 10 < sent && udp.megabits() > 4.0, "{udp:?}");
    }

    // Every way in which a command can end.
    assert_eq!(a.run("echo out; echo err >&2; exit 3", Duration::from_secs(10)).unwrap().status, 3);
    assert!(a.sh("false").is_err());
    let job = a.spawn("ping -q -n -i 0.1 10.0.0.2").unwrap();
    assert!(a.run("sleep 100", Duration::from_secs(1)).unwrap_err().to_string().contains("guest a"));
    assert!(job.running());
    assert!(job.interrupt(Duration::from_secs(10)).unwrap().stdout.contains(" 0% packet loss"));
    assert_eq!(a.sh("pidof sleep || echo none").unwrap().trim(), "none", "a command outlived its deadline");

    // A pulled cable, a halted machine, a reboot, a kill.
    b.set_link(0, false).unwrap();
    assert_eq!(a.ping(B, 2, Duration::from_millis(100)).unwrap().received, 0);
    b.set_link(0, true).unwrap();
    a.wait_reachable(B, Duration::from_secs(20)).unwrap();
    b.stop().unwrap();
    assert_eq!(a.ping(B, 1, Duration::from_millis(100)).unwrap().received, 0);
    b.cont().unwrap();
    a.wait_reachable(B, Duration::from_secs(20)).unwrap();
    let start = Instant::now();
    b.reboot().unwrap();
    println!("rebooted in {:.1} s", start.elapsed().as_secs_f64());
    b.reset().unwrap();
    b.address("10.0.0.2/24").unwrap();
    a.wait_reachable(B, Duration::from_secs(20)).unwrap();
    a.sh("rmmod virtio_net && modprobe virtio_net").unwrap();
    a.address("10.0.0.1/24").unwrap();
    a.wait_reachable(B, Duration::from_secs(20)).unwrap();
    let pid = b.pid();
    b.kill().unwrap();
    assert!(!std::path::Path::new(&format!("/proc/{pid}")).exists());
    a.quit().unwrap();
}

#[test]
fn memory_segments_and_processors() {
    let dir = WorkDir::new().unwrap();
    let config = GuestConfig { name: "big".into(), memory: 384, segments: 2, vcpus: 2, ..Default::default() };
    let guest = Guest::start(config, &dir).unwrap();
    assert_eq!(guest.sh("nproc").unwrap().trim(), "2");
    assert_eq!(guest.sh("ls -d /sys/devices/system/node/node[0-9]* | wc -l").unwrap().trim(), "2");
    assert_eq!(guest.sh("hostname").unwrap().trim(), "big");
    for tool in ["ip", "bridge", "tc", "ss", "ethtool", "iperf3", "ping", "arping", "modprobe"] {
        guest.sh(&format!("type {tool}")).unwrap();
    }
    guest
        .sh("modprobe 8021q && modprobe dummy && ip link add link dummy0 name vlan5 type vlan id 5")
        .unwrap();
}

#[test]
fn a_guest_that_cannot_start_says_why() {
    let dir = WorkDir::new().unwrap();
    let cable = NicBackend::Stream { socket: dir.path("cable"), listen: true };
    let nic = Nic::on(cable).options("no_such_option=on");
    let error = format!("{:#}", Guest::launch(GuestConfig::new("odd", nic), &dir).unwrap_err());
    assert!(error.contains("no_such_option"), "{error}");
}
