use super::*;

fn socket(port: &mut PortConfig) -> &mut Socket {
    match &mut port.kind {
        Kind::VhostUser(socket) => socket,
        Kind::Xdp(_) | Kind::Nic(_) => unreachable!("it is a guest's"),
    }
}

fn port(change: impl FnOnce(&mut PortConfig)) -> PortConfig {
    let mut port = PortConfig::new("vm1", "/run/vm1.sock");
    change(&mut port);
    port
}

#[test]
fn refuses_bad_settings_by_port_and_key() {
    type Case = (fn(&mut PortConfig), &'static str, &'static str);
    let cases: &[Case] = &[
        (|p| p.name = "".into(), "name", "port '': the name is empty"),
        (|p| p.name = "sixteen-letters-".into(), "name", "16 characters, 15 are allowed"),
        (|p| p.name = "a b".into(), "name", "' ' in the name"),
        (|p| p.name = "a/b".into(), "name", "'/' in the name"),
        (|p| p.name = "a\nb".into(), "name", r"'\n' in the name"),
        (|p| p.name = "-x".into(), "name", "starts with '-'"),
        (|p| p.name = "..".into(), "name", "needs a letter"),
        (|p| p.name = "12".into(), "name", "needs a letter"),
        (|p| p.name = "drop".into(), "name", "the word for an action"),
        (|p| socket(p).path = "".into(), "socket", "port 'vm1': socket path is empty"),
        (|p| socket(p).path = "vm1.sock".into(), "socket", "must be absolute"),
        (|p| socket(p).path = "/a\0b".into(), "socket", "zero byte"),
        (|p| socket(p).path = format!("/{}", "x".repeat(107)).into(), "socket", "108 bytes, 107 are allowed"),
        (|p| p.queues = Some(0), "queues", "port 'vm1': queues = 0: must be 1 to 8"),
        (|p| p.queues = Some(9), "queues", "queues = 9"),
        (|p| p.mtu = Some(67), "mtu", "mtu = 67: must be 68 to 9216"),
        (|p| p.mtu = Some(9217), "mtu", "mtu = 9217"),
        (|p| p.vlan = Some(0), "vlan", "VLAN 0 does not exist"),
        (|p| p.vlan = Some(4095), "vlan", "VLAN 4095"),
        (|p| p.trunks = Some(vec![10, 4095]), "trunks", "VLAN 4095"),
        (|p| p.trunks = Some(vec![]), "trunks", "leave it out"),
        (|p| p.native_vlan = Some(5000), "native_vlan", "VLAN 5000"),
        (|p| (p.vlan, p.trunks) = (Some(1), Some(vec![2])), "trunks", "exclude each other"),
        (|p| (p.vlan, p.native_vlan) = (Some(1), Some(2)), "native_vlan", "is for trunks"),
        (
            |p| {
                (socket(p).mode, socket(p).permissions) = (Mode::Client, Some(FileMode(0o600)));
            },
            "socket_mode",
            "file is QEMU's",
        ),
        (
            |p| {
                (socket(p).mode, socket(p).group) = (Mode::Client, Some("kvm".into()));
            },
            "socket_group",
            "file is QEMU's",
        ),
        (|p| p.max_masks = 0, "max_masks", "max_masks = 0"),
        (|p| p.miss_rate = 0, "miss_rate", "miss_rate = 0"),
        (|p| p.workers = Some(vec![]), "workers", "workers is empty: leave it out"),
        (|p| p.workers = Some(vec![0; 9]), "workers", "workers has 9 entries"),
    ];
    for (change, key, reason) in cases {
        let invalid = port(change).validate().expect_err(reason);
        assert_eq!(invalid.key, *key);
        assert!(invalid.reason.contains(reason), "'{}' does not say '{reason}'", invalid.reason);
        assert!(!invalid.reason.contains('\n'));
    }
}

#[test]
fn accepts_the_limits() {
    let cases: &[fn(&mut PortConfig)] = &[
        |p| p.name = "fifteen-letters".into(),
        |p| p.name = "vhost0.1_a".into(),
        |p| socket(p).path = format!("/{}", "x".repeat(106)).into(),
        |p| p.queues = Some(8),
        |p| p.mtu = Some(68),
        |p| p.mtu = Some(9216),
        |p| p.vlan = Some(4094),
        |p| (p.trunks, p.native_vlan) = (Some(vec![1, 4094]), Some(7)),
    ];
    for change in cases {
        assert_eq!(port(change).validate(), Ok(()));
    }
}

#[test]
fn queues_are_pinned_in_turn_to_workers_that_are_there() {
    let pins = |list: &[u16], workers| {
        let port = port(|p| p.workers = Some(list.to_vec()));
        (0..4).map(|queue| port.pinned_to(queue, workers)).collect::<Vec<_>>()
    };
    assert_eq!(pins(&[1, 0, 1], 2), [Some(1), Some(0), Some(1), Some(1)]);
    assert_eq!(pins(&[1, 2], 2), [None; 4]);
    assert_eq!(port(|_| ()).pinned_to(0, 2), None);
    let refused = |workers| port(|p| p.workers = Some(vec![0, 3])).check_workers(workers).unwrap_err();
    assert_eq!(refused(3).key, "workers");
    assert_eq!(
        refused(3).reason,
        "port 'vm1': workers: no worker 3, there are workers 0 to 2 (one for each of [datapath] cpus)"
    );
    assert!(refused(1).reason.contains("no worker 3, only worker 0 is there"));
    assert!(port(|p| p.workers = Some(vec![0, 3])).check_workers(4).is_ok());
}

#[test]
fn names_and_sockets_are_unique() {
    let (a, b) = (PortConfig::new("a", "/a"), PortConfig::new("b", "/b"));
    assert_eq!(a.check_unique([&b]), Ok(()));
    let same_name = PortConfig::new("a", "/c").check_unique([&b, &a]).unwrap_err();
    assert_eq!(
        (same_name.key, &*same_name.reason),
        ("name", "port 'a': there is a port of this name already")
    );
    let same_socket = PortConfig::new("c", "/b").check_unique([&a, &b]).unwrap_err();
    assert_eq!(
        (same_socket.key, &*same_socket.reason),
        ("socket", "port 'c': socket /b belongs to port 'b' already")
    );
}

#[test]
fn vlan_modes() {
    assert_eq!(port(|p| p.vlan = Some(7)).vlan_mode().to_string(), "access 7");
    assert_eq!(port(|_| ()).vlan_mode(), VlanMode::Trunk { vlans: None, native: 0 });
    assert_eq!(port(|p| p.native_vlan = Some(3)).vlan_mode().to_string(), "trunk all native 3");
    assert_eq!(port(|p| p.trunks = Some(vec![10, 20])).vlan_mode().to_string(), "trunk 10,20");
}

#[test]
fn file_modes_are_octal_text() {
    assert_eq!("0660".parse(), Ok(FileMode(0o660)));
    assert_eq!(FileMode(0o600).to_string(), "0600");
    for text in ["", "0888", "1777", "+60", "-1", "rw"] {
        text.parse::<FileMode>().expect_err(text);
    }
    let json = serde_json::to_string(&port(|p| socket(p).permissions = Some(FileMode(0o666)))).unwrap();
    assert!(json.contains(r#""socket_mode":"0666""#));
    let read = serde_json::from_str::<PortConfig>(&json).unwrap();
    assert_eq!(read.socket().unwrap().permissions(), FileMode(0o666));
}

#[test]
fn a_wire_has_a_device_and_no_socket() {
    let read = |json: &str| serde_json::from_str::<PortConfig>(json).map_err(|error| error.to_string());
    let wire = read(r#"{"name":"eth1","kind":"xdp"}"#).unwrap();
    assert_eq!(wire, PortConfig::wire("eth1", "eth1"));
    assert_eq!((wire.queues(), wire.validate()), (MAX_QUEUES, Ok(())));
    let again = serde_json::to_string(&wire).unwrap();
    assert_eq!(read(&again).unwrap(), wire);
    for (json, reason) in [
        (r#"{"name":"a"}"#, "port 'a': missing key 'socket'"),
        (r#"{"name":"a","socket":"/a","device":"b"}"#, r#"'device' is for kind = "xdp", not "vhost-user""#),
        (r#"{"name":"a","kind":"xdp","socket":"/a"}"#, r#"'socket' is for kind = "vhost-user", not "xdp""#),
        (r#"{"name":"a","kind":"xdp","mtu":9000}"#, "'mtu' is for"),
        (r#"{"name":"a","kind":"xdp","xdp_mode":"best"}"#, "unknown variant `best`"),
        (r#"{"name":"a","kind":"tap"}"#, "unknown variant `tap`"),
    ] {
        let error = read(json).unwrap_err();
        assert!(error.contains(reason), "{error}");
    }
    for device in ["", "sixteen-letters-", "a b", "a/b", ".."] {
        assert_eq!(PortConfig::wire("w", device).validate().unwrap_err().key, "device", "{device:?}");
    }
    let twice = PortConfig::wire("w", "eth1").check_unique([&PortConfig::wire("v", "eth1")]).unwrap_err();
    assert_eq!((twice.key, &*twice.reason), ("device", "port 'w': device eth1 belongs to port 'v' already"));
    let other = PortConfig::wire("w", "eth1");
    assert!(other.check_under_ovs(true).is_ok() && wire.check_under_ovs(false).is_ok());
    let refused = [wire.check_under_ovs(true), other.check_under_ovs(false)].map(|check| check.unwrap_err());
    assert!(
        refused[0].reason.contains("a name of its own")
            && refused[1].reason.contains("the name of its device")
    );
}

#[test]
fn a_port_of_a_nic_has_a_nic_and_a_number() {
    let read = |json: &str| serde_json::from_str::<PortConfig>(json).map_err(|error| error.to_string());
    let port = read(r#"{"name":"up","kind":"nic","nic":"n1","nic_port":2}"#).unwrap();
    assert_eq!(port, PortConfig::nic("up", "n1", 2));
    assert_eq!((port.queues(), port.validate()), (1, Ok(())));
    assert_eq!(read(&serde_json::to_string(&port).unwrap()).unwrap(), port);
    for (json, reason) in [
        (r#"{"name":"a","kind":"nic","nic_port":1}"#, "port 'a': missing key 'nic', the name"),
        (r#"{"name":"a","kind":"nic","nic":"n"}"#, "port 'a': missing key 'nic_port', the NIC's number"),
        (r#"{"name":"a","kind":"nic","nic":"n","nic_port":1,"mtu":9000}"#, "'mtu' is for"),
        (r#"{"name":"a","socket":"/a","nic":"n"}"#, r#"'nic' is for kind = "nic", not "vhost-user""#),
    ] {
        let error = read(json).unwrap_err();
        assert!(error.contains(reason), "{error}");
    }
    let key = |port: PortConfig| port.validate().unwrap_err().key;
    assert_eq!(key(PortConfig::nic("a", "n/1", 1)), "nic");
    assert_eq!(PortConfig { queues: Some(2), ..port.clone() }.validate(), Ok(()));
    assert_eq!(key(PortConfig { queues: Some(9), ..port.clone() }), "queues");
    let twice = PortConfig::nic("v", "n1", 2).check_unique([&port]).unwrap_err();
    assert_eq!(
        (twice.key, &*twice.reason),
        ("nic_port", "port 'v': NIC port n1/2 belongs to port 'up' already")
    );
    assert!(PortConfig::nic("v", "n1", 3).check_unique([&port]).is_ok());
    assert!(port.check_nic(["n", "n1"]).is_ok());
    let unknown = port.check_nic(["n"]).unwrap_err();
    assert_eq!(
        (unknown.key, &*unknown.reason),
        ("nic", "port 'up': there is no NIC 'n1' in the configuration file")
    );
    for text in ["", "n", "n/", "/1", "n/+1", "n/-1", "n/x", "n/4294967296"] {
        assert!(text.parse::<NicPlace>().unwrap_err().contains("is not NIC/PORT"), "{text}");
    }
    assert_eq!("n1/2".parse::<NicPlace>().unwrap().to_string(), "n1/2");
}
