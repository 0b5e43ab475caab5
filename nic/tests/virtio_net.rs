//! The virtio-net driver against QEMU's device.

mod common;

use anyhow::{Context, Result};
use common::{Machine, frame, until};
use nic::io::{NicError, PacketIo, PortEvent, SendError};
use nic::virtio_net::{Config, VirtioNet};
use serde_json::{Value, json};
use switch_core::checksum;
use switch_core::packet::{Gso, Offload};

const A: u64 = 0x0200_0000_000a;
const B: u64 = 0x0200_0000_000b;
const EXPERIMENT: u16 = 0x88b5;
/// Offsets in the common configuration (virtio 1.2 §4.1.4.3), which QEMU has at the beginning of BAR 4.
const STATUS: u64 = 0x14;
const QUEUE_SELECT: u64 = 0x16;
const QUEUE_AVAILABLE: u64 = 0x28;
/// QEMU's doorbells: where they begin, and the bytes of each.
const DOORBELLS: (u64, u64) = (0x3000, 4);

/// A machine with a network device that has these properties besides.
fn machine(more: Value) -> Result<Machine> {
    let mut device = json!({
        "driver": "virtio-net-pci", "id": "nic", "addr": "05.0", "netdev": "n0", "romfile": "",
        "mac": "02:00:00:00:00:11", "disable-legacy": "on", "iommu_platform": true,
    });
    if let (Some(device), Value::Object(more)) = (device.as_object_mut(), more) {
        device.extend(more);
    }
    Machine::start(1, &[device])
}

fn start(more: Value, config: Config) -> Result<(Machine, VirtioNet)> {
    let machine = machine(more)?;
    let port = VirtioNet::open(machine.function(5)?, config)?;
    Ok((machine, port))
}

fn next(port: &mut VirtioNet) -> Result<Vec<u8>> {
    until("a frame", || {
        let mut got = None;
        port.receive(1, &mut |received| got = Some(received.frame.to_vec()))?;
        Ok(got)
    })
}

fn until_reset(port: &mut VirtioNet) -> Result<()> {
    let mut events = Vec::new();
    until("the reset to be seen", || {
        port.poll_events(&mut events)?;
        Ok(events.contains(&PortEvent::Reset).then_some(()))
    })
}

/// Empties the eventfds and returns how many had something.
fn interrupts(port: &VirtioNet) -> usize {
    port.interrupts().iter().filter(|event| rustix::io::read(event, &mut [0; 8]).is_ok()).count()
}

fn until_quiet(port: &mut VirtioNet) -> Result<()> {
    until("quiet", || {
        port.poll_events(&mut Vec::new())?;
        port.receive(100, &mut |_| {})?;
        Ok(port.arm()?.then_some(()))
    })
}

#[test]
fn frames_pass_both_ways_round_and_round() -> Result<()> {
    for by_index in [true, false] {
        let config = Config { ring: 16, ..Config::default() };
        let (machine, mut port) = start(json!({ "event_idx": by_index }), config)?;
        assert_eq!(port.ports()[0].mac, [2, 0, 0, 0, 0, 0x11]);
        assert!(port.ports()[0].link.up);
        for round in 0..60u8 {
            for tci in [None, Some(0x6005)] {
                let one = frame(B + u64::from(round), A, tci, EXPERIMENT, &[round; 300]);
                machine.wires[0].send(&one)?;
                assert_eq!(next(&mut port)?, one);
                port.send(0, &[&one[..7], &one[7..]], &Offload::default())?;
                port.flush()?;
                assert_eq!(machine.wires[0].receive()?, one);
            }
        }
        until("completions", || {
            port.flush()?;
            let counters = port.counters(0).context("counters")?;
            Ok(((counters.received, counters.sent) == (120, 120)).then_some(()))
        })?;
        // A frame that is longer than a buffer does not come, and does not harm the next.
        machine.wires[0].send(&[2; 1800])?;
        let one = frame(B, A, None, EXPERIMENT, b"after");
        machine.wires[0].send(&one)?;
        assert_eq!(next(&mut port)?, one);
        assert_eq!(port.send(0, &[&[2; 1523]], &Offload::default()), Err(SendError::TooLong));
        for _ in 0..16 {
            port.send(0, &[&one], &Offload::default())?;
        }
        assert_eq!(port.send(0, &[&one], &Offload::default()), Err(SendError::Full));
        port.flush()?;
        for _ in 0..16 {
            assert_eq!(machine.wires[0].receive()?, one);
        }
    }
    Ok(())
}

#[test]
fn features_are_those_of_the_device() -> Result<()> {
    // Without an IOMMU the device must not be taken unless it is said so.
    let plain = machine(json!({ "iommu_platform": false }))?;
    let refused = VirtioNet::open(plain.function(5)?, Config::default());
    assert!(matches!(refused, Err(NicError::Device(what)) if what.contains("iommu_platform=on")));
    let untranslated = Config { untranslated: true, ..Config::default() };
    let mut port = VirtioNet::open(plain.function(5)?, untranslated)?;
    let one = frame(B, A, None, EXPERIMENT, b"plain");
    plain.wires[0].send(&one)?;
    assert_eq!(next(&mut port)?, one);
    // A ring is no larger than the device's, and an MTU and a speed are taken.
    let more = json!({ "host_mtu": 1000, "speed": 25000, "tx_queue_size": 256, "rx_queue_size": 256 });
    let (machine, mut port) = start(more, Config { ring: 1024, ..Config::default() })?;
    assert_eq!((port.ports()[0].max_frame, port.ports()[0].link.speed), (1022, 25_000));
    let longest = frame(B, A, None, EXPERIMENT, &[1; 1000]);
    port.send(0, &[&longest], &Offload::default())?;
    port.flush()?;
    assert_eq!(machine.wires[0].receive()?, longest);
    assert_eq!(port.send(0, &[&longest, &[0]], &Offload::default()), Err(SendError::TooLong));
    until("the completion", || {
        port.flush()?;
        Ok(port.counters(0).is_some_and(|counters| counters.sent == 1).then_some(()))
    })?;
    for _ in 0..256 {
        port.send(0, &[&one], &Offload::default())?;
    }
    assert_eq!(port.send(0, &[&one], &Offload::default()), Err(SendError::Full));
    // The cable's other end takes no offloads, so the device has none.
    let offload = Offload { needs_csum: true, csum_start: 34, csum_offset: 6, ..Offload::default() };
    assert_eq!(port.send(0, &[&longest], &offload), Err(SendError::Offload));
    Ok(())
}

/// A TCP segment for B in a frame, its checksum that of the pseudo-header, with this many bytes of payload.
fn tcp(ipv4: bool, payload: usize) -> (Vec<u8>, Offload) {
    let len = 20 + payload;
    let (eth_type, mut packet, pseudo) = if ipv4 {
        let mut ip = vec![0x45, 0, 0, 0, 0x12, 0x34, 0x40, 0, 64, 6, 0, 0, 10, 0, 0, 1, 10, 0, 0, 2];
        ip[2..4].copy_from_slice(&(20 + len as u16).to_be_bytes());
        let sum = checksum::checksum(&ip);
        ip[10..12].copy_from_slice(&sum.to_be_bytes());
        (0x0800, ip, checksum::pseudo_v4(0x0a00_0001, 0x0a00_0002, 6, len as u32))
    } else {
        let mut ip = vec![0x60, 0, 0, 0];
        ip.extend((len as u16).to_be_bytes());
        ip.extend([6, 64]);
        ip.extend([0x20; 16]);
        ip.extend([0x21; 16]);
        (0x86dd, ip, checksum::pseudo_v6(&[0x20; 16], &[0x21; 16], 6, len as u32))
    };
    let csum_start = (14 + packet.len()) as u16;
    packet.extend([0x30, 0x39, 0x00, 0x50, 1, 2, 3, 4, 5, 6, 7, 8, 0x50, 0x10, 1, 0]);
    packet.extend(checksum::fold(pseudo).to_be_bytes());
    packet.extend([0, 0]);
    packet.extend((0..payload).map(|at| (at / 7) as u8));
    let offload = Offload { needs_csum: true, csum_start, csum_offset: 16, ..Offload::default() };
    (frame(B, A, None, eth_type, &packet), offload)
}

#[test]
fn offloads_pass_from_device_to_device() -> Result<()> {
    let device = |slot: u8, tap: &str| {
        json!({
            "driver": "virtio-net-pci", "addr": format!("{slot:02}.0"), "netdev": tap, "romfile": "",
            "disable-legacy": "on", "iommu_platform": true,
        })
    };
    let machine = Machine::start_bridged(&[device(5, "t0"), device(6, "t1")])?;
    let mut from = VirtioNet::open(machine.function(5)?, Config::default())?;
    let mut to = VirtioNet::open(machine.function(6)?, Config::default())?;
    assert!(from.ports()[0].send.checksum && from.ports()[0].send.tso);
    for (ipv4, payload) in
        [(true, 900), (false, 901), (true, 20_000), (false, 20_000), (true, 65_000), (false, 65_000)]
    {
        let (sent, offload) = tcp(ipv4, payload);
        let (start, gso) = (usize::from(offload.csum_start), if ipv4 { Gso::Tcp4 } else { Gso::Tcp6 });
        let offload = if payload > 1400 { Offload { gso, gso_size: 1400, ..offload } } else { offload };
        from.send(0, &[&sent[..3], &sent[3..60], &sent[60..]], &offload)?;
        from.flush()?;
        let mut data = Vec::new();
        until("all segments", || {
            to.receive(100, &mut |received| {
                let got = received.frame;
                // The kernel has something to say on the bridge too.
                if got[..12] != sent[..12] {
                    return;
                }
                let len = (got.len() - start) as u32;
                let pseudo = match ipv4 {
                    true => checksum::pseudo_v4(0x0a00_0001, 0x0a00_0002, 6, len),
                    false => checksum::pseudo_v6(&[0x20; 16], &[0x21; 16], 6, len),
                };
                assert_eq!(checksum::fold(checksum::add(pseudo, &got[start..])), 0xffff);
                data.extend_from_slice(&got[start + 20..]);
            })?;
            Ok((data.len() >= payload).then_some(()))
        })?;
        assert_eq!(data, sent[start + 20..], "IPv4 {ipv4}, {payload} bytes");
    }
    until("completions", || {
        from.flush()?;
        Ok(from.counters(0).is_some_and(|counters| counters.sent == 6).then_some(()))
    })
}

#[test]
fn links_flap_and_interrupts_come() -> Result<()> {
    for by_index in [true, false] {
        let (mut machine, mut port) = start(json!({ "event_idx": by_index }), Config::default())?;
        let one = frame(B, A, None, EXPERIMENT, b"link");
        for up in [false, true, false, true] {
            until_quiet(&mut port)?;
            interrupts(&port);
            machine.set_link("nic", up)?;
            until("an interrupt of the configuration", || Ok((interrupts(&port) > 0).then_some(())))?;
            let mut events = Vec::new();
            port.poll_events(&mut events)?;
            assert!(matches!(events[..], [PortEvent::Link { number: 0, link }] if link.up == up));
            let sent = port.send(0, &[&one], &Offload::default());
            assert_eq!(sent, if up { Ok(()) } else { Err(SendError::LinkDown) });
        }
        port.flush()?;
        for _ in 0..2 {
            assert_eq!(machine.wires[0].receive()?, one);
        }
        for _ in 0..20 {
            until_quiet(&mut port)?;
            interrupts(&port);
            machine.wires[0].send(&one)?;
            // One of before may still come; then the port is armed again, and there must be another.
            until("an interrupt, and a frame", || Ok((interrupts(&port) > 0 && !port.arm()?).then_some(())))?;
            assert_eq!(next(&mut port)?, one);
        }
    }
    Ok(())
}

#[test]
fn lost_interrupts_delay_nothing_for_ever() -> Result<()> {
    let (mut machine, mut port) = start(json!({}), Config { ring: 8, ..Config::default() })?;
    // Every vector is masked in the device's table, behind the driver's back.
    let table = machine.bar(5, 1)?;
    for vector in 0..3 {
        machine.qtest().command(&format!("writel {:#x} 1", table + 16 * vector + 12))?;
    }
    let one = frame(B, A, None, EXPERIMENT, b"unannounced");
    for _ in 0..100 {
        port.arm()?;
        machine.wires[0].send(&one)?;
        assert_eq!(next(&mut port)?, one, "a sleeper that looks again finds it");
        port.send(0, &[&one], &Offload::default())?;
        port.flush()?;
        assert_eq!(machine.wires[0].receive()?, one);
    }
    machine.set_link("nic", false)?;
    until("the link to go", || {
        port.poll_events(&mut Vec::new())?;
        Ok((!port.ports()[0].link.up).then_some(()))
    })?;
    assert_eq!(interrupts(&port), 0);
    Ok(())
}

#[test]
fn resets_are_noticed_and_mended() -> Result<()> {
    let (machine, mut port) = start(json!({}), Config::default())?;
    let common = machine.bar(5, 4)?;
    let command = |command: String| machine.qtest().command(&command);
    let number =
        |answer: String| Ok::<_, anyhow::Error>(u64::from_str_radix(answer.trim_start_matches("0x"), 16)?);
    let one = frame(B, A, None, EXPERIMENT, b"again");
    let passes = |port: &mut VirtioNet| {
        machine.wires[0].send(&one)?;
        assert_eq!(next(port)?, one);
        port.send(0, &[&one], &Offload::default())?;
        port.flush()?;
        assert_eq!(machine.wires[0].receive()?, one);
        anyhow::Ok(())
    };
    passes(&mut port)?;
    // A reset behind the driver's back.
    command(format!("writeb {:#x} 0", common + STATUS))?;
    port.send(0, &[&one], &Offload::default())?;
    until_reset(&mut port)?;
    assert_eq!(port.counters(0).context("counters")?.tx_reset, 1, "it was in the ring");
    passes(&mut port)?;
    // An available chain that cannot be: the device says that it needs a reset.
    command(format!("writew {:#x} 1", common + QUEUE_SELECT))?;
    let available = number(command(format!("readl {:#x}", common + QUEUE_AVAILABLE))?)?;
    let index = number(command(format!("readw {:#x}", available + 2))?)?;
    command(format!("writew {:#x} 0xffff", available + 4 + 2 * (index & 0xff)))?;
    command(format!("writew {:#x} {:#x}", available + 2, index + 1))?;
    command(format!("writew {:#x} 1", common + DOORBELLS.0 + DOORBELLS.1))?;
    until("DEVICE_NEEDS_RESET", || {
        let status = number(command(format!("readb {:#x}", common + STATUS))?)?;
        Ok((status & 0x40 != 0).then_some(()))
    })?;
    until_reset(&mut port)?;
    passes(&mut port)?;
    // A used index that is nonsense: the driver says so.
    command(format!("writew {:#x} 0", common + QUEUE_SELECT))?;
    let used = number(command(format!("readl {:#x}", common + QUEUE_AVAILABLE + 8))?)?;
    command(format!("writew {:#x} 0x7000", used + 2))?;
    assert_eq!(port.receive(10, &mut |_| {})?, 0);
    assert_eq!(port.counters(0).context("counters")?.rx_error, 1);
    assert_eq!(port.send(0, &[&one], &Offload::default()), Err(SendError::Device));
    until_reset(&mut port)?;
    passes(&mut port)?;
    // The driver goes: the device is left reset.
    drop(port);
    command(format!("outl 0xcf8 {:#x}", 1u32 << 31 | 5 << 11 | 4))?;
    assert_eq!(number(command("inl 0xcfc".into())?)? & 4, 0, "it masters the bus no more");
    assert_eq!(number(command(format!("readb {:#x}", common + STATUS))?)?, 0);
    Ok(())
}
