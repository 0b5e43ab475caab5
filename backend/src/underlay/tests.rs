use super::model::*;
use super::*;
use crate::host_state::tests::{in_namespace, run};
use std::net::IpAddr;
use std::sync::mpsc::{Receiver, channel};
use std::time::{Duration, Instant};
use switch_core::action::Action;
use switch_core::flow::{FlowSpec, Match, Ufid};
use switch_core::key::{Field, TUN_DF};

const LATE: Duration = Duration::from_secs(10);
const GATEWAY_MAC: [u8; 6] = [2, 0, 0, 0, 0, 0xfe];

fn ip(text: &str) -> IpAddr {
    text.parse().unwrap()
}

fn target(dst: &str) -> Target {
    Target { dst: ip(dst), src: None, udp_port: None }
}

fn device(index: u32, name: &str) -> Device {
    let mac = Some([2, 0, 0, 0, 1, index as u8]);
    Device { index, name: name.into(), mac, up: true, mtu: 1500, is_enslaved: false, vlan: None }
}

fn neighbour(device: u32, address: &str, state: NeighbourState) -> Event {
    Event::Neighbour(Neighbour { device, address: ip(address), mac: Some(GATEWAY_MAC), state })
}

fn route(device: u32, gateway: Option<&str>) -> Route {
    Route { device, gateway: gateway.map(ip), src: Some(ip("192.0.2.1")), ttl: None, mtu: None }
}

/// Two devices, a gateway behind the first, and the route to 198.51.100.1 by it.
fn model() -> Model {
    let mut model = Model::default();
    model.apply(Event::Device(device(1, "eth1")));
    model.apply(Event::Device(device(2, "eth2")));
    model.apply(neighbour(1, "192.0.2.254", NeighbourState::Reachable));
    model.answer(target("198.51.100.1"), Ok(route(1, Some("192.0.2.254"))));
    model
}

#[test]
fn a_way_is_a_route_a_device_and_a_neighbour() {
    let mut model = model();
    let there = target("198.51.100.1");
    let hop = model.way_of(&there).unwrap();
    let link = tunnel::Link { dst: GATEWAY_MAC, src: [2, 0, 0, 0, 1, 1], vlan: None };
    let expected =
        Hop { device: "eth1".into(), is_enslaved: false, link, src: ip("192.0.2.1"), ttl: None, mtu: 1500 };
    assert_eq!(hop, expected);
    assert_eq!(model.to_be_asked(&there), None);
    let why = |model: &Model, to: &str| model.way_of(&target(to)).unwrap_err().to_string();
    assert_eq!(why(&model, "198.51.100.2"), "route to 198.51.100.2 is being looked up");

    // Of a neighbour that has been silent, or is being asked again, the address holds.
    for (state, resolved, asked) in [
        (NeighbourState::Stale, true, true),
        (NeighbourState::Permanent, true, false),
        (NeighbourState::Asked, false, false),
        (NeighbourState::Unresolved, false, true),
        (NeighbourState::Reachable, true, false),
    ] {
        model.apply(neighbour(1, "192.0.2.254", state));
        assert_eq!(model.way_of(&there).is_ok(), resolved, "{state:?}");
        assert_eq!(model.to_be_asked(&there).is_some(), asked, "{state:?}");
    }
    // On the link itself, the other end is the next hop.
    model.answer(target("192.0.2.9"), Ok(Route { ttl: Some(9), ..route(1, None) }));
    assert_eq!(why(&model, "192.0.2.9"), "neighbour of 192.0.2.9 unresolved");
    assert_eq!(model.to_be_asked(&target("192.0.2.9")), Some((1, ip("192.0.2.9"))));
    model.apply(neighbour(1, "192.0.2.9", NeighbourState::Reachable));
    let hop = model.way_of(&target("192.0.2.9")).unwrap();
    assert_eq!(hop.ttl, Some(9));
    // Of the same address behind another device nothing follows.
    model.answer(target("192.0.2.9"), Ok(route(2, None)));
    assert_eq!(why(&model, "192.0.2.9"), "neighbour of 192.0.2.9 unresolved");

    model.answer(there, Err("Network is unreachable".into()));
    assert_eq!(why(&model, "198.51.100.1"), "no route to 198.51.100.1: Network is unreachable");
    model.answer(there, Ok(Route { src: None, ..route(1, Some("192.0.2.254")) }));
    assert_eq!(why(&model, "198.51.100.1"), "no address of ours on the way to 198.51.100.1");
    let given = Target { src: Some(ip("192.0.2.3")), ..there };
    model.answer(given, Ok(route(1, Some("192.0.2.254"))));
    assert_eq!(model.way_of(&given).unwrap().src, ip("192.0.2.3"));
}

#[test]
fn a_vlan_device_is_a_tag_on_the_device_below() {
    let mut model = model();
    let vlan = Some(VlanOf { below: 1, tpid: ETH_P_8021Q, id: 10 });
    model.apply(Event::Device(Device { vlan, ..device(3, "eth1.10") }));
    model.apply(neighbour(3, "192.0.2.9", NeighbourState::Reachable));
    let there = target("192.0.2.9");
    model.answer(there, Ok(route(3, None)));
    let hop = model.way_of(&there).unwrap();
    assert_eq!((hop.device.as_str(), hop.link.vlan), ("eth1", Some((0x8100, 10))));
    assert_eq!(hop.link.src, [2, 0, 0, 0, 1, 3]);
    model.apply(Event::Device(Device { up: false, ..device(1, "eth1") }));
    model.answer(there, Ok(route(3, None)));
    assert_eq!(model.way_of(&there), Err(WhyNot::Down("eth1".into())));
    // Two tags are more than is made here.
    model.apply(Event::Device(Device {
        vlan: Some(VlanOf { below: 2, tpid: 0x88a8, id: 5 }),
        ..device(1, "eth1")
    }));
    model.answer(there, Ok(route(3, None)));
    assert_eq!(model.way_of(&there), Err(WhyNot::NoEthernet("eth1.10".into())));
    model.apply(Event::Device(Device { mac: None, ..device(3, "tun3") }));
    model.answer(there, Ok(route(3, None)));
    assert_eq!(model.way_of(&there), Err(WhyNot::NoEthernet("tun3".into())));
    assert_eq!(model.to_be_asked(&there), None, "it has no neighbours");
}

#[test]
fn whatever_may_move_routes_has_them_asked_for_again() {
    let there = target("198.51.100.1");
    let down = || Event::Device(Device { up: false, ..device(2, "eth2") });
    for (event, moves) in [
        (Event::Routes, true),
        (Event::DeviceGone(2), true),
        (Event::Address(2, ip("192.0.2.7"), true), true),
        (down(), true),
        (Event::Device(device(9, "new")), true),
        (Event::Device(Device { mac: Some([2; 6]), ..device(1, "eth1") }), false),
        (neighbour(2, "192.0.2.254", NeighbourState::Stale), false),
    ] {
        let mut model = model();
        assert!(!model.is_unasked(&there));
        model.apply(event.clone());
        assert_eq!(model.is_unasked(&there), moves, "{event:?}");
        assert_eq!(model.way_of(&there).is_err(), moves);
    }
    let mut model = model();
    model.apply(Event::DeviceGone(1));
    model.answer(there, Ok(route(1, Some("192.0.2.254"))));
    assert_eq!(model.way_of(&there), Err(WhyNot::Down("device 1".into())));
    // With the device its neighbours are gone, even if it comes back.
    model.apply(Event::Device(device(1, "eth1")));
    model.answer(there, Ok(route(1, Some("192.0.2.254"))));
    assert_eq!(model.way_of(&there), Err(WhyNot::Unresolved(ip("192.0.2.254"))));
}

const PORT: PortId = PortId { slot: 4, generation: 1 };
const WIRE: PortId = PortId { slot: 1, generation: 1 };
const VXLAN: TunnelDevice = TunnelDevice { kind: Kind::Vxlan, udp_port: Some(4789), gbp: false };

fn remote(dst: &str) -> Remote {
    Remote {
        id: Some(7),
        src: None,
        dst: ip(dst),
        tos: 0,
        ttl: 0,
        port: None,
        df: true,
        checksum: false,
        oam: false,
        gbp: None,
        options: Vec::new(),
    }
}

fn wires() -> HashMap<String, Wire> {
    [("eth1".to_owned(), Wire { id: WIRE, shut: None })].into()
}

#[test]
fn a_way_that_no_flow_wants_is_forgotten() {
    let tunnels = Tunnels::new().unwrap();
    let mut model = model();
    model.apply(Event::Device(device(6, "vxlan_sys_4789")));
    let there = Target { udp_port: Some(4789), ..target("198.51.100.1") };
    model.answer(there, Ok(route(1, Some("192.0.2.254"))));
    tunnels.add(PORT, "vxlan_sys_4789", VXLAN, false);
    let exits = Exits { wires: wires(), ..Exits::default() };
    assert!(!tunnels.set_exits(exits));
    let refresh = |after: Duration| tunnels.refresh(&model, &Defaults::default(), Instant::now() + after);
    let ask = |dst: &str| tunnels.way(PORT, &remote(dst));
    let followed = || tunnels.targets().len();
    assert!(ask("198.51.100.1").is_err() && ask("198.51.100.9").is_err());
    assert!(refresh(Duration::ZERO));
    let plan = ask("198.51.100.1").unwrap();
    assert_eq!(followed(), 2);
    assert!(!refresh(KEEP / 2));
    assert_eq!(followed(), 2);
    // Of the flow that was refused nobody knows whether it is there: it would ask again.
    assert!(refresh(KEEP));
    assert_eq!(followed(), 1);
    assert!(!refresh(10 * KEEP));
    assert_eq!(followed(), 1, "a flow goes by it");
    drop(plan);
    assert!(!refresh(12 * KEEP));
    assert_eq!(followed(), 0);
    assert!(ask("198.51.100.1").is_err(), "it is looked up again");
}

#[test]
fn a_way_goes_through_a_bridges_own_port_down_to_the_wire_and_back() {
    let tunnels = Tunnels::new().unwrap();
    let flows = tunnels.host_flows().unwrap();
    let mut model = Model::default();
    let (bridge, vxlan) = (device(5, "br-ex"), device(6, "vxlan_sys_4789"));
    model.apply(Event::Device(bridge.clone()));
    model.apply(Event::Device(vxlan.clone()));
    model.apply(Event::Address(5, ip("192.0.2.1"), true));
    model.apply(neighbour(5, "192.0.2.9", NeighbourState::Reachable));
    let there = Target { udp_port: Some(4789), ..target("192.0.2.9") };
    model.answer(there, Ok(route(5, None)));
    tunnels.add(PORT, "vxlan_sys_4789", VXLAN, false);
    let open = Restriction::default();
    let id = PortId { slot: 9, generation: 1 };
    let port = HostPort { id, flows: flows.clone(), restriction: open.clone() };
    let exits =
        Exits { wires: wires(), hosts: [("br-ex".to_owned(), port.clone())].into(), stack: open.clone() };
    assert!(!tunnels.set_exits(exits.clone()));
    let way = || tunnels.way(PORT, &remote("192.0.2.9"));
    let behind = || tunnels.endpoints(&PortRef::Foreign("br-ex".into()));
    let refresh = |model: &Model| tunnels.refresh(model, &Defaults::default(), Instant::now());
    assert!(way().is_err() && behind().is_none(), "nobody has looked yet");
    assert!(refresh(&model));
    assert_eq!(way(), Err("no flow of br-ex to 192.0.2.9 yet".into()));
    let mut spec = FlowSpec { matches: Match::default(), actions: Vec::new(), ufid: None, held: None };
    spec.matches.key.set(Field::InPort, 9);
    spec.matches.mask.set_exact(Field::InPort);
    flows.put(Ufid(1), spec.clone());
    assert!(refresh(&model));
    assert_eq!(way(), Err("the flow of br-ex does more than to forward".into()));
    spec.actions = vec![Action::Output(PortRef::Ours(WIRE))];
    flows.put(Ufid(1), spec.clone());
    assert!(refresh(&model) && !refresh(&model));
    // Frames for which there is room beside 36 bytes of headers.
    assert!(way().is_ok_and(|way| way.to == WIRE && way.limit == 1464), "{:?}", way());
    model.answer(there, Ok(Route { mtu: Some(1400), ..route(5, None) }));
    assert!(refresh(&model));
    assert_eq!(way().map(|way| way.limit), Ok(1364));

    let end = behind().unwrap();
    let expected = Endpoint {
        mac: Some([2, 0, 0, 0, 1, 5]),
        vlan: Vlan::Untagged,
        local: Some(ip("192.0.2.1")),
        kind: Kind::Vxlan,
        port: 4789,
        gbp: false,
        df: false,
        as_linux: true,
        in_port: PORT,
    };
    assert_eq!(*end, [expected]);
    let mut inner = Match::default();
    tunnels.dont_fragment().learn(&inner);
    assert!(!refresh(&model));
    inner.key.set(Field::TunFlags, TUN_DF.into());
    tunnels.dont_fragment().learn(&inner);
    assert!(refresh(&model));
    assert_eq!(*behind().unwrap(), [Endpoint { df: true, ..expected }]);

    // What the host does, or a device does, is not passed by.
    let seen = |change: &dyn Fn(&mut Exits)| {
        let mut exits = exits.clone();
        change(&mut exits);
        let is_less = tunnels.set_exits(exits);
        let closed = (way().is_err(), behind().is_none());
        refresh(&model);
        assert!(!is_less || closed != (false, false), "not at once");
        (way().err(), behind().is_some())
    };
    let some = || Some("nftables".to_owned());
    let restrict = |exits: &mut Exits, restriction| {
        exits.hosts.insert("br-ex".into(), HostPort { restriction, ..port.clone() });
    };
    /// A change, why the way is closed then, and whether the tunnel has ends.
    type Case<'a> = (&'a dyn Fn(&mut Exits), Option<&'static str>, bool);
    let cases: [Case<'_>; 8] = [
        (&|_| {}, None, true),
        (&|exits| exits.stack.egress = some(), Some("nftables"), true),
        (&|exits| exits.stack.ingress = some(), None, false),
        (
            &|exits| restrict(exits, Restriction { egress: some(), ingress: None }),
            Some("br-ex: nftables"),
            true,
        ),
        (&|exits| restrict(exits, Restriction { egress: None, ingress: some() }), None, false),
        (&|exits| exits.wires.clear(), Some("it leaves by no wire of ours"), true),
        (&|exits| exits.wires.values_mut().for_each(|wire| wire.shut = some()), Some("eth1: nftables"), true),
        (&|exits| exits.hosts.clear(), Some("br-ex is no port of ours"), false),
    ];
    for (at, (change, why, has_ends)) in cases.into_iter().enumerate() {
        assert_eq!(seen(change), (why.map(str::to_owned), has_ends), "{at}");
        let held = why.map(|why| (why.to_owned(), [ip("192.0.2.9")].into()));
        assert_eq!(tunnels.held(PORT), held.into_iter().collect(), "{at}");
    }
    let _ = tunnels.set_exits(exits.clone());
    assert!(refresh(&model));
    let gone = Exits {
        wires: HashMap::new(),
        stack: Restriction { egress: None, ingress: some() },
        ..exits.clone()
    };
    assert!(tunnels.set_exits(gone));
    assert_eq!((way(), behind()), (Err("its way is being looked up".into()), None), "at once");
    let _ = tunnels.set_exits(exits.clone());
    model.apply(Event::Device(Device { is_enslaved: true, ..bridge.clone() }));
    refresh(&model);
    assert_eq!(way().err(), Some("the route leads by a VRF of br-ex".into()));
    assert!(behind().is_none(), "of another network");
    model.apply(Event::Device(bridge));
    // Nor is what it does at a device above, which nobody watches.
    let vlan = Some(VlanOf { below: 5, tpid: ETH_P_8021Q, id: 10 });
    model.apply(Event::Device(Device { vlan, ..device(7, "br-ex.10") }));
    model.apply(neighbour(7, "192.0.2.9", NeighbourState::Reachable));
    model.answer(there, Ok(route(7, None)));
    refresh(&model);
    assert_eq!(way().err(), Some("the route leads by a VLAN device of br-ex".into()));
    model.apply(Event::Address(5, ip("192.0.2.1"), false));
    model.answer(there, Ok(route(5, None)));
    refresh(&model);
    assert!(way().is_ok() && behind().is_none(), "without an address");
    model.apply(Event::Address(5, ip("192.0.2.1"), true));
    model.apply(Event::Device(Device { up: false, ..vxlan }));
    model.answer(there, Ok(route(5, None)));
    refresh(&model);
    assert_eq!((way().err(), behind().is_some()), (Some("vxlan_sys_4789 is down".into()), false));
}

/// Waits until the way to `dst` is as `is` wants it, and for each change until it is told.
fn wait(
    tunnels: &Tunnels,
    told: &Receiver<()>,
    dst: &str,
    is: impl Fn(&Result<Way, String>) -> bool,
) -> Duration {
    let start = Instant::now();
    loop {
        let way = tunnels.way(PORT, &remote(dst));
        if is(&way) {
            return start.elapsed();
        }
        let left = LATE.saturating_sub(start.elapsed());
        told.recv_timeout(left).unwrap_or_else(|_| panic!("it stays: {way:?}"));
    }
}

fn says(text: &str) -> impl Fn(&Result<Way, String>) -> bool {
    let text = text.to_owned();
    move |way| way.as_ref().is_err_and(|why| why.starts_with(&text))
}

/// What a way's header must say, besides what is the same in all of this test.
fn leads(to: [u8; 6], from: [u8; 6], src: &str, dst: &str) -> impl Fn(&Result<Way, String>) -> bool {
    let underlay = tunnel::Underlay {
        kind: Kind::Vxlan,
        link: tunnel::Link { dst: to, src: from, vlan: None },
        src: ip(src),
        ttl: 64,
        port: 4789,
        src_ports: Defaults::read().ports,
    };
    let outer = Outer::new(&remote(dst).outer(&underlay).unwrap()).unwrap();
    move |way| way.as_ref().is_ok_and(|way| *way.outer == outer && way.to == WIRE)
}

/// A thread that follows the namespace of the caller, and what it tells.
fn follow() -> (Arc<Tunnels>, Underlay, Receiver<()>) {
    let tunnels = Arc::new(Tunnels::new().unwrap());
    let (sender, told) = channel();
    let underlay =
        Underlay::spawn(tunnels.clone(), Box::new(move || sender.send(()).unwrap_or_default())).unwrap();
    run("ip link add vxlan_sys_4789 type veth peer name far0");
    run("ip link set far0 up");
    run("ip link set vxlan_sys_4789 up");
    tunnels.add(PORT, "vxlan_sys_4789", VXLAN, false);
    let _ = tunnels.set_exits(Exits { wires: wires(), ..Exits::default() });
    (tunnels, underlay, told)
}

#[test]
fn the_kernels_network_is_followed() {
    in_namespace(|| {
        run("ip link add eth1 address 02:00:00:00:01:01 type veth peer name far1");
        run("ip link add eth2 address 02:00:00:00:01:02 type veth peer name far2");
        let (tunnels, underlay, told) = follow();
        let wait = |dst: &str, is: &dyn Fn(&Result<Way, String>) -> bool| wait(&tunnels, &told, dst, is);
        wait("192.0.2.9", &says("no route to 192.0.2.9: Network is unreachable"));
        for device in ["eth1", "far1", "eth2", "far2"] {
            run(&format!("ip link set {device} up"));
        }
        run("ip address add 192.0.2.1/24 dev eth1");
        // Nobody answers: the kernel asks, and it stays unresolved.
        wait("192.0.2.9", &says("neighbour of 192.0.2.9 unresolved"));
        let (a, b) = ([2, 0, 0, 0, 9, 1], [2, 0, 0, 0, 9, 2]);
        let own = [2, 0, 0, 0, 1, 1];
        run("ip neighbour replace 192.0.2.9 dev eth1 lladdr 02:00:00:00:09:01 nud permanent");
        wait("192.0.2.9", &leads(a, own, "192.0.2.1", "192.0.2.9"));
        // Within a second of the change.
        run("ip neighbour replace 192.0.2.9 dev eth1 lladdr 02:00:00:00:09:02 nud reachable");
        wait("192.0.2.9", &leads(b, own, "192.0.2.1", "192.0.2.9"));
        // Behind a gateway, which moves.
        wait("198.51.100.1", &says("no route to 198.51.100.1"));
        run("ip route add 198.51.100.0/24 via 192.0.2.9");
        wait("198.51.100.1", &leads(b, own, "192.0.2.1", "198.51.100.1"));
        run("ip neighbour replace 192.0.2.8 dev eth1 lladdr 02:00:00:00:09:01 nud permanent");
        run("ip route replace 198.51.100.0/24 via 192.0.2.8");
        wait("198.51.100.1", &leads(a, own, "192.0.2.1", "198.51.100.1"));
        run("ip address add 192.0.2.2/24 dev eth1");
        run("ip route replace 198.51.100.0/24 via 192.0.2.8 src 192.0.2.2");
        wait("198.51.100.1", &leads(a, own, "192.0.2.2", "198.51.100.1"));
        // A rule may lead elsewhere, or nowhere.
        run("ip rule add to 198.51.100.1 blackhole");
        wait("198.51.100.1", &says("no route to 198.51.100.1"));
        run("ip rule del to 198.51.100.1 blackhole");
        wait("198.51.100.1", &leads(a, own, "192.0.2.2", "198.51.100.1"));
        run("ip rule add to 198.51.100.1 ipproto udp dport 4789 blackhole");
        wait("198.51.100.1", &says("no route to 198.51.100.1"));
        run("ip rule del to 198.51.100.1 ipproto udp dport 4789 blackhole");
        run("ip rule add to 198.51.100.1 ipproto udp dport 4790 blackhole");
        wait("198.51.100.1", &leads(a, own, "192.0.2.2", "198.51.100.1"));
        // By a device that is no port of ours.
        run("ip address add 203.0.113.1/24 dev eth2");
        run("ip neighbour replace 203.0.113.9 dev eth2 lladdr 02:00:00:00:09:01 nud permanent");
        run("ip route replace 198.51.100.0/24 via 203.0.113.9");
        wait("198.51.100.1", &says("eth2 is no port of ours"));
        run("ip route del 198.51.100.0/24");
        wait("198.51.100.1", &says("no route to"));
        // The carrier goes, and the routes with the device.
        run("ip link set far1 down");
        wait("192.0.2.9", &|way: &Result<Way, String>| way.is_err());
        run("ip link set far1 up");
        run("ip neighbour replace 192.0.2.9 dev eth1 lladdr 02:00:00:00:09:01 nud permanent");
        wait("192.0.2.9", &leads(a, own, "192.0.2.1", "192.0.2.9"));
        // With the address of the device, the kernel forgets its neighbours.
        run("ip link set eth1 address 02:00:00:00:01:77");
        run("ip neighbour replace 192.0.2.9 dev eth1 lladdr 02:00:00:00:09:01 nud permanent");
        wait("192.0.2.9", &leads(a, [2, 0, 0, 0, 1, 0x77], "192.0.2.1", "192.0.2.9"));
        wait("127.0.0.1", &|way: &Result<Way, String>| way.is_err());
        wait("192.0.2.1", &says("no route to 192.0.2.1: it is not another host's address"));
        drop(underlay);
    });
}

#[test]
fn more_events_than_the_queue_holds_have_all_read_again() {
    in_namespace(|| {
        run("ip link add eth1 address 02:00:00:00:01:01 type veth peer name far1");
        run("ip link set eth1 up");
        run("ip link set far1 up");
        run("ip address add 192.0.2.1/24 dev eth1");
        let (tunnels, underlay, told) = follow();
        wait(&tunnels, &told, "192.0.2.9", says("neighbour of 192.0.2.9 unresolved"));
        let mut batch = tempfile::NamedTempFile::new().unwrap();
        for mtu in 0..3000 {
            use std::io::Write;
            writeln!(batch, "link set far1 mtu {}", 1280 + mtu % 100).unwrap();
        }
        use std::io::Write;
        writeln!(batch, "neighbour replace 192.0.2.9 dev eth1 lladdr 02:00:00:00:09:01 nud permanent")
            .unwrap();
        run(&format!("ip -batch {}", batch.path().display()));
        let mac = [2, 0, 0, 0, 9, 1];
        wait(&tunnels, &told, "192.0.2.9", leads(mac, [2, 0, 0, 0, 1, 1], "192.0.2.1", "192.0.2.9"));
        drop(underlay);
    });
}

#[test]
fn an_ipv6_underlay_is_followed_too() {
    in_namespace(|| {
        run("ip link add eth1 address 02:00:00:00:01:01 type veth peer name far1");
        run("ip link set eth1 up");
        run("ip link set far1 up");
        run("ip address add 2001:db8::1/64 dev eth1 nodad");
        let (tunnels, underlay, told) = follow();
        wait(&tunnels, &told, "2001:db8::9", says("neighbour of 2001:db8::9 unresolved"));
        run("ip neighbour replace 2001:db8::9 dev eth1 lladdr 02:00:00:00:09:01 nud permanent");
        let leads = leads([2, 0, 0, 0, 9, 1], [2, 0, 0, 0, 1, 1], "2001:db8::1", "2001:db8::9");
        wait(&tunnels, &told, "2001:db8::9", leads);
        drop(underlay);
    });
}
