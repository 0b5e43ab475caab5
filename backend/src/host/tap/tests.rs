//! TAPs in network namespaces of their own.

use super::testing::*;
use super::*;

const KERNEL: TapConfig = TapConfig { offloads: true, silenced: false, mtu: 1500 };
const USERSPACE: TapConfig = TapConfig { offloads: false, silenced: true, mtu: 1500 };

/// Linux's `IFF_LOWER_UP`.
const CARRIER: u32 = 1 << 16;

fn flags(tap: &Tap) -> u32 {
    Rtnetlink::new().unwrap().link(tap.index()).unwrap().flags
}

/// An ARP request of 10.9.0.2 for `address`.
fn arp(address: [u8; 4]) -> Vec<u8> {
    let mut frame = vec![0xff; 6];
    frame.extend([2, 0, 0, 0, 0, 2, 8, 6, 0, 1, 8, 0, 6, 4, 0, 1, 2, 0, 0, 0, 0, 2, 10, 9, 0, 2]);
    frame.extend([0; 6]);
    frame.extend(address);
    frame
}

#[test]
fn it_persists_is_adopted_and_goes_when_removed() {
    in_namespace(|| {
        let tap = Tap::open("vm1", TapConfig { mtu: 1400, ..KERNEL }).unwrap();
        let index = tap.index();
        let busy = Tap::open("vm1", KERNEL).unwrap_err();
        assert!(matches!(busy, TapError::Busy(_)), "{busy}");
        assert_eq!(tap.mtu().unwrap(), 1400);
        tap.set_mtu(9000).unwrap();
        assert_eq!(tap.mtu().unwrap(), 9000);
        drop(tap);
        for config in [KERNEL, USERSPACE, USERSPACE, KERNEL, KERNEL] {
            let tap = Tap::open("vm1", config).unwrap();
            assert_eq!((tap.index(), tap.mtu().unwrap()), (index, 1500), "{config:?}");
            assert_eq!(tap.features() != 0, config.offloads);
        }
        Tap::open("vm1", KERNEL).unwrap().remove().unwrap();
        assert!(index_of("vm1").is_err());
    });
}

#[test]
fn it_is_a_wire_and_no_more() {
    in_namespace(|| {
        let tap = Tap::open("vm1", KERNEL).unwrap();
        let wanted = (IFF_UP | IFF_NOARP) as u32;
        assert_eq!(flags(&tap) & (wanted | IFF_MULTICAST as u32 | CARRIER), wanted);
        for on in [true, true, false, true] {
            tap.set_carrier(on).unwrap();
            assert_eq!(flags(&tap) & CARRIER != 0, on);
        }
        assert_eq!(ip("-o addr show dev vm1"), "", "no addresses");
        let sysctl = std::fs::read_to_string("/proc/sys/net/ipv6/conf/vm1/disable_ipv6");
        assert!(sysctl.is_err() || sysctl.unwrap().trim() == "1");
        // Where that may not be written: it must be something that the kernel takes.
        Rtnetlink::new().unwrap().make_no_addresses(tap.index()).unwrap();
        assert!(ip("-d link show dev vm1").contains("addrgenmode none"));
    });
}

#[test]
fn what_is_in_the_way_is_said_in_one_line() {
    in_namespace(|| {
        let error = Tap::open("lo", KERNEL).unwrap_err();
        assert!(matches!(error, TapError::OtherDevice(_)), "{error}");
        ip("tuntap add dev tun7 mode tun");
        let error = Tap::open("tun7", KERNEL).unwrap_err();
        assert!(matches!(error, TapError::OtherDevice(_)), "{error}");
        ip("tuntap add dev many mode tap multi_queue");
        let error = Tap::open("many", KERNEL).unwrap_err();
        assert!(matches!(error, TapError::OtherDevice(_)), "{error}");
        for name in ["", "vm%d", "a-name-that-is-too-long"] {
            let error = Tap::open(name, KERNEL).unwrap_err().to_string();
            assert!(error.ends_with("no name of a network interface"), "{error}");
        }
    });
}

#[test]
fn the_hosts_stack_answers_only_without_the_filter() {
    in_namespace(|| {
        let mut answers = Vec::new();
        for config in [KERNEL, USERSPACE, USERSPACE, KERNEL] {
            let tap = Tap::open("vm1", config).unwrap();
            if answers.is_empty() {
                ip("addr add 10.9.0.1/24 dev vm1");
            }
            // Our own setting would be enough for ARP, but not for other protocols.
            ip("link set dev vm1 arp on");
            tap.set_carrier(true).unwrap();
            let ovs = PacketSocket::new(tap.index());
            // What the kernel does with a frame it does before the write returns.
            tap.write(&NetHeader::default(), &arp([10, 9, 0, 1]), &[]).unwrap();
            assert_eq!(ovs.receive().1, arp([10, 9, 0, 1]), "OVS sees it");
            let mut frame = [0; 2000];
            let answer =
                std::iter::from_fn(|| tap.read(&mut frame).unwrap().map(|(_, len)| frame[..len].to_vec()))
                    .any(|frame| frame[12..22] == [8, 6, 0, 1, 8, 0, 6, 4, 0, 2]);
            answers.push(answer);
        }
        assert_eq!(answers, [true, false, false, true]);
    });
}

#[test]
fn segments_and_partial_checksums_pass_both_ways() {
    in_namespace(|| {
        let tap = Tap::open("vm1", KERNEL).unwrap();
        tap.set_carrier(true).unwrap();
        let ovs = PacketSocket::new(tap.index());
        let mut buffer = vec![0; 70_000];
        for (payload, size) in [(60_000, 1400), (900, 0)] {
            let (header, frame) = tcp(payload, size);
            let (head, tail) = frame.split_at(200);
            tap.write(&header, head, tail).unwrap();
            let (seen, bytes) = ovs.receive();
            assert_eq!((seen.gso_type, seen.gso_size, seen.csum_start), (header.gso_type, size, 34));
            assert_eq!(bytes, frame);
            ovs.send(&header, &frame);
            let (seen, len) = wait_for("a frame", || tap.read(&mut buffer).unwrap());
            assert_eq!(
                (seen.gso_type, seen.gso_size, seen.flags),
                (header.gso_type, size, NetHeader::NEEDS_CSUM)
            );
            assert_eq!((seen.csum_start, seen.csum_offset), (34, 16));
            assert_eq!(buffer[..len], frame);
        }
        let wrong = NetHeader { csum_start: 2000, ..tcp(900, 0).0 };
        assert_eq!(tap.write(&wrong, &tcp(900, 0).1, &[]), Err(Errno::INVAL));
        ip("link set dev vm1 down");
        assert_eq!(tap.write(&NetHeader::default(), &tcp(9, 0).1, &[]), Err(Errno::IO));
        ip("link delete dev vm1");
        assert_eq!(tap.write(&NetHeader::default(), &tcp(9, 0).1, &[]), Err(Errno::BADFD));
    });
}

#[test]
fn without_offloads_the_kernel_completes_and_cuts() {
    in_namespace(|| {
        let tap = Tap::open("vm1", USERSPACE).unwrap();
        tap.set_carrier(true).unwrap();
        let ovs = PacketSocket::new(tap.index());
        let (header, frame) = tcp(3000, 1400);
        ovs.send(&header, &frame);
        let mut buffer = vec![0; 70_000];
        for payload in [1400, 1400, 200] {
            let (seen, len) = wait_for("a frame", || tap.read(&mut buffer).unwrap());
            assert_eq!((seen.flags & NetHeader::NEEDS_CSUM, seen.gso_type, len), (0, 0, 54 + payload));
            assert!(is_complete(&buffer[..len]));
        }
    });
}
