//! The follower against the real kernel, in network namespaces of their own, and the decoders against the kernel's bytes.

use super::netlink::{Malformed, attributes, messages};
use super::nftables::{self, Chain, DeviceName};
use super::rtnetlink::{self, Filter, Link, Qdisc};
use super::*;
use rustix::thread::{
    CapabilitySet, LinkNameSpaceType, capabilities, move_into_link_name_space, set_capabilities,
};
use std::fs::File;
use std::io::{Read, Write};
use std::os::fd::AsFd;
use std::process::{Command, Stdio};
use std::sync::mpsc::{Receiver, channel};

/// What is sure to have happened by then, if it ever happens.
const DEADLINE: Duration = Duration::from_secs(30);
/// A sweep that never comes, so that what a test sees was notified.
const NEVER: Duration = Duration::from_secs(1_000_000);

/// Runs `body` in a thread in a network namespace of its own, which is gone when all that uses it is.
pub(crate) fn in_namespace(body: impl FnOnce() + Send + 'static) {
    let thread = std::thread::spawn(|| {
        // A process that makes the namespace and says when it is there.
        let mut maker = Command::new("unshare")
            .args(["--net", "cat"])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .expect("unshare is missing: install the package util-linux");
        let mut stdin = maker.stdin.take().unwrap();
        stdin.write_all(b"x").unwrap();
        maker.stdout.take().unwrap().read_exact(&mut [0]).expect("unshare --net: this test needs root");
        let namespace = File::open(format!("/proc/{}/ns/net", maker.id())).unwrap();
        move_into_link_name_space(namespace.as_fd(), Some(LinkNameSpaceType::Network)).unwrap();
        drop(stdin);
        maker.wait().unwrap();
        body();
    });
    if let Err(panic) = thread.join() {
        std::panic::resume_unwind(panic);
    }
}

/// Runs a command, which must succeed. What is in single quotes is one argument.
pub(crate) fn run(command: &str) {
    let mut words = Vec::new();
    for (index, part) in command.split('\'').enumerate() {
        if index % 2 == 1 { words.push(part) } else { words.extend(part.split_whitespace()) }
    }
    let (program, package) = match words[0] {
        "nft" => ("nft", "nftables"),
        program => (program, "iproute2"),
    };
    let output = Command::new(program)
        .args(&words[1..])
        .output()
        .unwrap_or_else(|error| panic!("{program}: {error}: install the package {package}"));
    assert!(
        output.status.success(),
        "{command}: {} (does the kernel have what it asks for?)",
        String::from_utf8_lossy(&output.stderr)
    );
}

/// A follower, and what it tells.
struct Watch {
    state: HostState,
    told: Receiver<()>,
    mtu: u32,
}

impl Watch {
    fn over(names: &[&str]) -> Watch {
        Watch::sweeping(names, NEVER)
    }

    fn sweeping(names: &[&str], sweep: Duration) -> Watch {
        let (tell, told) = channel();
        let state = HostState::start(Box::new(move || _ = tell.send(())), sweep).unwrap();
        state.watch(names.iter().map(|name| name.to_string()).collect(), BTreeSet::new(), false);
        Watch { state, told, mtu: 1000 }
    }

    /// Waits until the follower has told of a state like this.
    fn until(&self, what: &str, mut is_so: impl FnMut(&BTreeMap<String, Device>) -> bool) {
        let deadline = Instant::now() + DEADLINE;
        while !is_so(&self.state.state()) {
            let left = deadline.saturating_duration_since(Instant::now());
            if self.told.recv_timeout(left).is_err() {
                panic!("never: {what}; but {:?}, {:?}", self.state.state(), self.state.warnings());
            }
        }
    }

    /// Waits until it has told that the device has exactly these reasons.
    fn until_reasons(&self, name: &str, ingress: Option<&str>, egress: Option<&str>) {
        self.until(&format!("{name} with {ingress:?}, {egress:?}"), |devices| {
            devices.get(name).is_some_and(|device| {
                (device.ingress.as_deref(), device.egress.as_deref()) == (ingress, egress)
            })
        });
    }

    /// The device after a reading that began after this call.
    fn settled(&mut self, name: &str) -> Device {
        self.mtu += 1;
        run(&format!("ip link set {name} mtu {}", self.mtu));
        self.until("the new MTU", |devices| devices.get(name).is_some_and(|device| device.mtu == self.mtu));
        self.state.state()[name].clone()
    }

    /// Checks, after a change that should not matter, that the device has no reasons.
    fn has_none(&mut self, name: &str) {
        let device = self.settled(name);
        assert_eq!((device.ingress, device.egress), (None, None));
    }

    fn reads(&self) -> u64 {
        lock(&self.state.shared.answer).reads
    }
}

fn tap(name: &str) {
    run(&format!("ip tuntap add {name} mode tap"));
    run(&format!("ip link set {name} up"));
}

#[test]
fn filters_come_and_go() {
    in_namespace(|| {
        tap("t0");
        let mut watch = Watch::over(&["t0"]);
        watch.until_reasons("t0", None, None);

        run("tc qdisc add dev t0 clsact");
        watch.has_none("t0");
        run("tc filter add dev t0 ingress protocol ip u32 match u32 0 0 flowid 1:1");
        watch.until_reasons("t0", Some("tc ingress filter u32"), None);
        run("tc filter add dev t0 egress protocol all bpf da bytecode '1,6 0 0 2'");
        watch.until_reasons("t0", Some("tc ingress filter u32"), Some("tc egress filter bpf"));
        run("tc filter del dev t0 ingress");
        watch.until_reasons("t0", None, Some("tc egress filter bpf"));
        run("tc qdisc del dev t0 clsact");
        watch.until_reasons("t0", None, None);

        run("tc qdisc add dev t0 ingress");
        watch.has_none("t0");
        run(
            "tc filter add dev t0 parent ffff: protocol all u32 match u32 0 0 action mirred egress redirect dev lo",
        );
        watch.until_reasons("t0", Some("tc ingress filter u32"), None);
        run("tc qdisc del dev t0 ingress");
        watch.until_reasons("t0", None, None);
    });
}

#[test]
fn the_daemons_own_filter_is_no_reason_and_nothing_but_it() {
    in_namespace(|| {
        tap("t0");
        run("tc qdisc add dev t0 clsact");
        run("tc filter add dev t0 ingress protocol all pref 10 bpf da bytecode '1,6 0 0 2'");
        let mut watch = Watch::over(&["t0"]);
        watch.until_reasons("t0", None, None);
        for other in [
            "protocol all pref 1 bpf da bytecode '1,6 0 0 0'",
            "protocol ip pref 1 bpf da bytecode '1,6 0 0 2'",
            "protocol all pref 1 bpf bytecode '1,6 0 0 2'",
            "protocol all pref 1 bpf bytecode '1,6 0 0 2' action mirred egress redirect dev lo",
            "protocol all pref 1 bpf da bytecode '2,6 0 0 2,6 0 0 2'",
            "protocol all pref 1 chain 1 bpf da bytecode '1,6 0 0 2'",
        ] {
            run(&format!("tc filter add dev t0 ingress {other}"));
            watch.until_reasons("t0", Some("tc ingress filter bpf"), None);
            let chain = if other.contains("chain") { "chain 1" } else { "" };
            run(&format!("tc filter del dev t0 ingress pref 1 {chain}"));
            watch.until_reasons("t0", None, None);
        }
        // Under the qdisc of the old kind it is the same filter.
        run("tc qdisc del dev t0 clsact");
        run("tc qdisc add dev t0 ingress");
        run("tc filter add dev t0 ingress protocol all bpf da bytecode '1,6 0 0 2'");
        watch.has_none("t0");
    });
}

#[test]
fn filters_that_devices_share_are_seen_at_each() {
    in_namespace(|| {
        tap("t0");
        tap("t1");
        run("tc qdisc add dev t0 ingress_block 7 ingress");
        run("tc qdisc add dev t1 ingress_block 7 ingress");
        let watch = Watch::over(&["t1"]);
        watch.until_reasons("t1", None, None);
        run("tc filter add block 7 protocol ip u32 match u32 0 0 flowid 1:1");
        watch.until_reasons("t1", Some("tc ingress filter u32"), None);
        run("tc filter del block 7");
        watch.until_reasons("t1", None, None);
    });
}

#[test]
fn qdiscs_come_and_go() {
    in_namespace(|| {
        tap("t0");
        let mut watch = Watch::over(&["t0"]);
        watch.until_reasons("t0", None, None);
        run("tc qdisc add dev t0 root handle 1: htb default 1");
        watch.until_reasons("t0", None, Some("tc qdisc htb"));
        run("tc qdisc replace dev t0 root pfifo limit 100");
        watch.until_reasons("t0", None, None);
        run("tc qdisc replace dev t0 root tbf rate 1mbit burst 10k latency 10ms");
        watch.until_reasons("t0", None, Some("tc qdisc tbf"));
        run("tc qdisc del dev t0 root");
        watch.until_reasons("t0", None, None);
        run("tc qdisc add dev t0 root noqueue");
        watch.has_none("t0");
    });
}

#[test]
fn a_qdisc_below_mq_is_a_reason() {
    in_namespace(|| {
        run("ip tuntap add t0 mode tap multi_queue");
        run("ip link set t0 up");
        let mut watch = Watch::over(&["t0"]);
        watch.until_reasons("t0", None, None);
        run("tc qdisc replace dev t0 root handle 1: mq");
        watch.has_none("t0");
        run("tc qdisc replace dev t0 parent 1:1 tbf rate 1mbit burst 10k latency 10ms");
        watch.until_reasons("t0", None, Some("tc qdisc tbf"));
    });
}

#[test]
fn nftables_chains_come_and_go() {
    in_namespace(|| {
        tap("t0");
        tap("t1");
        let mut watch = Watch::over(&["t0"]);
        watch.until_reasons("t0", None, None);
        assert_eq!(watch.state.warnings(), Vec::<String>::new());

        run("nft 'add table netdev f'");
        run("nft 'add chain netdev f other { type filter hook ingress device t1 priority 0; }'");
        run("nft 'add chain netdev f plain'");
        watch.has_none("t0");
        run("nft 'add chain netdev f in { type filter hook ingress device t0 priority 0; }'");
        watch.until_reasons("t0", Some("nftables ingress chain 'netdev f in'"), None);
        run("nft 'add chain netdev f out { type filter hook egress devices = { t1, t0 } priority 0; }'");
        let out = Some("nftables egress chain 'netdev f out'");
        watch.until_reasons("t0", Some("nftables ingress chain 'netdev f in'"), out);
        run("nft 'delete chain netdev f in'");
        watch.until_reasons("t0", None, out);
        run("nft 'delete table netdev f'");
        watch.until_reasons("t0", None, None);

        run("nft 'add table inet f'");
        run("nft 'add chain inet f forward { type filter hook forward priority 0; }'");
        watch.has_none("t0");
        run("nft 'add chain inet f in { type filter hook ingress device t0 priority 0; }'");
        watch.until_reasons("t0", Some("nftables ingress chain 'inet f in'"), None);
        run("nft 'flush ruleset'");
        watch.until_reasons("t0", None, None);
    });
}

#[test]
fn xdp_programs_come_and_go() {
    in_namespace(|| {
        tap("t0");
        let mut object = tempfile::NamedTempFile::new().unwrap();
        object.write_all(&xdp_object()).unwrap();
        let watch = Watch::over(&["t0"]);
        watch.until_reasons("t0", None, None);
        for mode in ["xdpgeneric", "xdpdrv"] {
            run(&format!("ip link set dev t0 {mode} obj {} sec xdp", object.path().display()));
            watch.until_reasons("t0", Some("XDP program"), None);
            run(&format!("ip link set dev t0 {mode} off"));
            watch.until_reasons("t0", None, None);
        }
    });
}

/// The smallest object file with an XDP program, which passes everything (`r0 = XDP_PASS; exit`).
fn xdp_object() -> Vec<u8> {
    let names = b"\0.strtab\0xdp\0.symtab\0pass\0\0\0\0\0\0";
    let program = [0xb7, 0, 0, 0, 2, 0, 0, 0, 0x95, 0, 0, 0, 0, 0, 0, 0];
    // The null symbol, then the function: its name, global function, in section 2, of 16 bytes.
    let mut symbols = vec![0; 24];
    symbols.extend([21, 0, 0, 0, 0x12, 0, 2, 0]);
    symbols.extend([0u64, 16].map(u64::to_le_bytes).concat());

    // Behind the header of 64 bytes come the three contents, then the headers of the sections.
    let (names_at, program_at) = (64, 64 + names.len() as u64);
    let symbols_at = program_at + program.len() as u64;
    let sections_at = symbols_at + symbols.len() as u64;
    let mut object = b"\x7fELF\x02\x01\x01\0\0\0\0\0\0\0\0\0".to_vec();
    object.extend([1, 0, 247, 0, 1, 0, 0, 0]); // relocatable, for BPF
    object.extend([0, 0, sections_at].map(u64::to_le_bytes).concat());
    object.extend([0u16, 0, 64, 0, 0, 64, 4, 1].map(u16::to_le_bytes).concat());
    object.extend(names);
    object.extend(program);
    object.extend(&symbols);
    object.extend([0; 64]);
    let mut section =
        |name: u32, kind: u32, flags: u64, at: u64, size: u64, link: u32, info: u32, entry: u64| {
            object.extend([name, kind].map(u32::to_le_bytes).concat());
            object.extend([flags, 0, at, size].map(u64::to_le_bytes).concat());
            object.extend([link, info].map(u32::to_le_bytes).concat());
            object.extend([8, entry].map(u64::to_le_bytes).concat());
        };
    section(1, 3, 0, names_at, names.len() as u64, 0, 0, 0);
    section(9, 1, 6, program_at, 16, 0, 0, 0);
    section(13, 2, 0, symbols_at, 48, 1, 1, 24);
    object
}

#[test]
fn devices_change_go_and_come_again() {
    in_namespace(|| {
        let watch = Watch::over(&["t0", "t1", "no-device-can-have-this-name"]);
        tap("t0");
        watch.until("t0", |devices| devices.len() == 1 && devices["t0"].mtu == 1500);
        let first = watch.state.state()["t0"].clone();
        run("ip link set t0 mtu 1400");
        watch.until("its MTU", |devices| devices["t0"] == Device { mtu: 1400, ..first.clone() });
        run("tc qdisc add dev t0 root handle 1: htb");
        watch.until_reasons("t0", None, Some("tc qdisc htb"));

        run("ip tuntap del t0 mode tap");
        watch.until("none", |devices| devices.is_empty());
        tap("t0");
        watch.until("t0 anew", |devices| devices.get("t0").is_some_and(|device| device.mtu == 1500));
        let second = watch.state.state()["t0"].clone();
        assert_ne!(second.ifindex, first.ifindex);
        assert_eq!(second.egress, None);

        run("ip link property add dev t0 altname t1");
        run("ip link set t0 mtu 1401");
        watch.until("t0 alone", |devices| devices.get("t0").is_some_and(|device| device.mtu == 1401));
        assert_eq!(watch.state.state().len(), 1, "an alternative name is not the name");
        run("ip link property del dev t0 altname t1");
        run("ip link set t0 down");
        run("ip link set t0 name t1");
        watch.until("the new name", |devices| devices.keys().eq(["t1"]));
        watch.state.watch(BTreeSet::new(), BTreeSet::new(), false);
        watch.until("nothing watched", |devices| devices.is_empty());
    });
}

#[test]
fn what_happens_elsewhere_costs_no_reading() {
    in_namespace(|| {
        tap("t0");
        tap("u0");
        let mut watch = Watch::over(&["t0"]);
        watch.settled("t0");
        run("nft 'add table netdev f'");
        run("nft 'add chain netdev f c'");
        watch.settled("t0");
        let (start, before) = (Instant::now(), watch.reads());
        while start.elapsed() < 10 * LEAST_INTERVAL {
            run("ip link set u0 mtu 1300");
            run("ip link set u0 mtu 1500");
            run("tc qdisc replace dev u0 root handle 1: htb");
            run("tc qdisc del dev u0 root");
            run("nft 'add rule netdev f c accept'");
        }
        watch.settled("t0");
        // A change of the MTU is told more than once: each of the two may have been read twice.
        assert!(watch.reads() <= before + 3, "{} readings", watch.reads() - before);
    });
}

#[test]
fn a_burst_is_read_a_few_times() {
    in_namespace(|| {
        tap("t0");
        let mut watch = Watch::over(&["t0"]);
        watch.settled("t0");
        let (start, before) = (Instant::now(), watch.reads());
        for mtu in 1100..1200 {
            run(&format!("ip link set t0 mtu {mtu}"));
        }
        watch.settled("t0");
        let reads = watch.reads() - before;
        let allowed = start.elapsed().as_millis() / LEAST_INTERVAL.as_millis() + 2;
        assert!(u128::from(reads) <= allowed, "{reads} readings, where {allowed} would do");
    });
}

#[test]
fn what_is_not_notified_is_found_by_the_sweep() {
    in_namespace(|| {
        tap("t0");
        let watch = Watch::sweeping(&["t0"], Duration::from_millis(1));
        watch.until_reasons("t0", None, None);
        let deadline = Instant::now() + DEADLINE;
        while watch.reads() < 5 {
            assert!(Instant::now() < deadline, "no sweep");
            std::thread::yield_now();
        }
    });
}

#[test]
fn without_permission_for_nftables_the_rest_works() {
    in_namespace(|| {
        tap("t0");
        run("nft 'add table netdev f'");
        run("nft 'add chain netdev f in { type filter hook ingress device t0 priority 0; }'");
        // For this thread and those that it starts; commands get it back, because they run as root.
        let mut sets = capabilities(None).unwrap();
        sets.effective.remove(CapabilitySet::NET_ADMIN);
        set_capabilities(None, sets).unwrap();
        let mut watch = Watch::over(&["t0"]);
        watch.has_none("t0");
        run("tc qdisc add dev t0 root handle 1: htb");
        watch.until_reasons("t0", None, Some("tc qdisc htb"));
        let warnings = watch.state.warnings();
        assert_eq!(warnings.len(), 1, "{warnings:?}");
        assert!(warnings[0].starts_with("nftables cannot be read"), "{warnings:?}");
    });
}

fn hex(text: &str) -> Vec<u8> {
    (0..text.len()).step_by(2).map(|at| u8::from_str_radix(&text[at..at + 2], 16).unwrap()).collect()
}

/// Bodies as Linux 6.18 sent them (the link's without its statistics).
const LINK: &str = "000001000200000003100000000000000700030074300000080004007805000008000d00e803000005001000020000001c002b0008\
    0006006f0000000500020002000000080004006f000000";
const HTB: &str = "000000000200000000000100ffffffff020000000800010068746200240002001800\
    0200110003000a00000000000000000000000000000008000500e803000005000c0000000000";
const CLSACT: &str =
    "00000000020000000000fffff1ffffff010000000b000100636c7361637400000400020005000c0000000000";
const BPF_HEAD: &str = "000000000200000000000000f2ffffff000300c0080001006270660008000b0000000000";
const BPF_DROP: &str = "000000000200000001000000f2ffffff000300c0080001006270660008000b00000000002800020006000400010000000c000500\
    060000000200000008000800010000000800090008000000";
/// The same with an eBPF program, but for its name.
const EBPF: &str = "000000000200000001000000f2ffffff000300c0080001006270660008000b0000000000380002000e000700706f696e74776f72\
    6b00000008000b00730000000c000a00614b434cd8324ecc08000800010000000800090008000000";
const U32: &str =
    "000000000200000000000080f3ffffff080000c0080001007533320008000b00000000000c0002000800040001000000";
const NETDEV_EGRESS: &str = "05000002060001007400000006000300630000000c0002000000000000000001280004000800010000000001080002000000\
    0000140004000700010075300000070001007430000008000500000000010b00070066696c746572000008000a0000000001\
    0800060000000000";
const INET_INGRESS: &str = "01000002060001006900000006000300630000000c0002000000000000000001280004000800010000000005080002000000\
    00000c0004000700010074300000070003007430000008000500000000010b00070066696c746572000008000a0000000001\
    0800060000000000";
const INET_PLAIN: &str = "01000002060001006900000006000300640000000c00020000000000000000020800060000000000";
const NETDEV_PREFIX: &str = "05000002060001007400000006000300630000000c0002000000000000000001200004000800010000000000080002000000\
    00000c000400060002007400000008000500000000010b00070066696c746572000008000a00000000010800060000000000";

#[test]
fn the_kernels_devices_are_decoded() {
    let link = Link { name: "t0".into(), ifindex: 2, mtu: 1400, xdp: true };
    assert_eq!(rtnetlink::decode_link(&hex(LINK)), Ok(link));
    let htb = Qdisc { ifindex: 2, handle: 0x10000, kind: "htb".into() };
    assert_eq!(rtnetlink::decode_qdisc(&hex(HTB)), Ok(htb));
    let clsact = Qdisc { ifindex: 2, handle: 0xffff_0000, kind: "clsact".into() };
    assert_eq!(rtnetlink::decode_qdisc(&hex(CLSACT)), Ok(clsact));
}

#[test]
fn the_kernels_filters_are_decoded() {
    let filter = |kind: &str, ours| Ok(Some(Filter { kind: kind.into(), ours }));
    assert_eq!(rtnetlink::decode_filter(&hex(BPF_HEAD)), Ok(None));
    assert_eq!(rtnetlink::decode_filter(&hex(BPF_DROP)), filter("bpf", true));
    assert_eq!(rtnetlink::decode_filter(&hex(EBPF)), filter("bpf", true));
    assert_eq!(rtnetlink::decode_filter(&hex(&EBPF.replace("706f", "716f"))), filter("bpf", false));
    assert_eq!(rtnetlink::decode_filter(&hex(U32)), filter("u32", false));
}

#[test]
fn the_kernels_chains_are_decoded() {
    let exact = |name: &str| DeviceName::Exact(name.into());
    let egress = Chain { name: "netdev t c".into(), egress: true, devices: vec![exact("u0"), exact("t0")] };
    assert_eq!(nftables::decode_chain(&hex(NETDEV_EGRESS)), Ok(Some(egress)));
    let ingress = Chain { name: "inet i c".into(), egress: false, devices: vec![exact("t0"), exact("t0")] };
    assert!(ingress.hooks("t0") && !ingress.hooks("t00") && !ingress.hooks("t"));
    assert_eq!(nftables::decode_chain(&hex(INET_INGRESS)), Ok(Some(ingress)));
    assert_eq!(nftables::decode_chain(&hex(INET_PLAIN)), Ok(None));

    let chain = nftables::decode_chain(&hex(NETDEV_PREFIX)).unwrap().unwrap();
    assert!(chain.hooks("t0") && chain.hooks("tap") && !chain.hooks("u0"));
    // Linux 6.16 gives a prefix as a name that is not closed: here "t" and a byte that is cut off.
    let unclosed = NETDEV_PREFIX.replace("0600020074000000", "0500010074000000");
    assert_eq!(nftables::decode_chain(&hex(&unclosed)), Ok(Some(chain)));
}

/// Nothing that the kernel could send, cut or broken, makes a decoder panic; and what is cut short is noticed.
#[test]
fn broken_bytes_never_panic() {
    fn decode_all(body: &[u8]) {
        let _ = rtnetlink::decode_link(body);
        let _ = rtnetlink::decode_qdisc(body);
        let _ = rtnetlink::decode_filter(body);
        let _ = nftables::decode_chain(body);
        let _ = messages(body).count();
        let _ = attributes(body).count();
        for message in messages(body).flatten() {
            let _ = nftables::concerns(&message);
            let _ = rtnetlink::concerns(&message, &BTreeSet::new(), &BTreeSet::new());
        }
    }
    let all = [
        LINK,
        HTB,
        CLSACT,
        BPF_HEAD,
        BPF_DROP,
        EBPF,
        U32,
        NETDEV_EGRESS,
        INET_INGRESS,
        INET_PLAIN,
        NETDEV_PREFIX,
    ];
    for body in all.map(hex) {
        for end in 0..body.len() {
            decode_all(&body[..end]);
            for value in [0, 1, 3, 4, 0x7f, 0x80, 0xff] {
                let mut broken = body.clone();
                broken[end] = value;
                decode_all(&broken);
            }
        }
    }
    let body = hex(LINK);
    assert_eq!(rtnetlink::decode_link(&body[..body.len() - 1]), Err(Malformed));
    assert_eq!(rtnetlink::decode_qdisc(&hex(HTB)[..20]), Err(Malformed));
    assert_eq!(rtnetlink::decode_filter(&hex(BPF_DROP)[..45]), Err(Malformed));
    assert_eq!(nftables::decode_chain(&hex(NETDEV_EGRESS)[..70]), Err(Malformed));
}
