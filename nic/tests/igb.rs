//! The igb driver against QEMU's 82576.

mod common;

use anyhow::Result;
use common::{Machine, frame, until};
use nic::igb::{Config, Igb, SteerError};
use nic::io::{PacketIo, PortEvent, SendError, Steering};
use serde_json::json;
use switch_core::checksum;
use switch_core::packet::{Gso, Offload};

const A: u64 = 0x0200_0000_000a;
const B: u64 = 0x0200_0000_000b;
const EXPERIMENT: u16 = 0x88b5;

fn start(config: Config) -> Result<(Machine, Igb)> {
    let device =
        json!({ "driver": "igb", "id": "nic", "addr": "05.0", "netdev": "n0", "mac": "02:00:00:00:00:11" });
    let machine = Machine::start(1, &[device])?;
    let mut igb = Igb::open(machine.function(5)?, config)?;
    link(&mut igb, true)?;
    Ok((machine, igb))
}

/// Where the next frame came to, and its bytes.
fn steered(igb: &mut Igb) -> Result<(u32, Vec<u8>)> {
    until("a frame", || {
        let mut got = None;
        igb.receive(1, &mut |received| got = Some((received.mark, received.frame.to_vec())))?;
        Ok(got)
    })
}

fn link(igb: &mut Igb, up: bool) -> Result<()> {
    let mut events = Vec::new();
    until("the link", || {
        igb.poll_events(&mut events)?;
        Ok((igb.ports()[0].link.up == up).then_some(()))
    })
}

/// Resets the device behind the driver's back (CTRL.RST), which sees it and sets it up again.
fn reset(machine: &Machine, igb: &mut Igb) -> Result<()> {
    let bar = machine.bar(5, 0)?;
    machine.qtest().command(&format!("writel {bar:#x} {:#x}", 1 << 26))?;
    let mut events = Vec::new();
    until("the reset to be seen", || {
        igb.poll_events(&mut events)?;
        Ok(events.contains(&PortEvent::Reset).then_some(()))
    })?;
    link(igb, true)
}

fn next(igb: &mut Igb) -> Result<(Vec<u8>, bool)> {
    until("a frame", || {
        let mut got = None;
        igb.receive(1, &mut |received| got = Some((received.frame.to_vec(), received.offload.csum_valid)))?;
        Ok(got)
    })
}

/// A UDP datagram in a frame, and the same with the pseudo-header's sum alone.
fn udp(tci: Option<u16>) -> (Vec<u8>, Vec<u8>, Offload) {
    let payload = b"a datagram whose checksum counts, long enough that no padding follows it";
    let len = 8 + payload.len() as u16;
    let mut ip = vec![0x45, 0, 0, 0, 0, 1, 0, 0, 64, 17, 0, 0, 10, 0, 0, 1, 10, 0, 0, 2];
    ip[2..4].copy_from_slice(&(20 + len).to_be_bytes());
    let sum = |bytes: &[u8], start: u64| {
        let words =
            bytes.chunks(2).map(|pair| u64::from(pair[0]) << 8 | pair.get(1).map_or(0, |&b| u64::from(b)));
        let mut sum = words.sum::<u64>() + start;
        while sum >> 16 != 0 {
            sum = (sum & 0xffff) + (sum >> 16);
        }
        sum as u16
    };
    let header = !sum(&ip, 0);
    ip[10..12].copy_from_slice(&header.to_be_bytes());
    let mut datagram = vec![0x30, 0x39, 0x00, 0x35, 0, 0, 0, 0];
    datagram[4..6].copy_from_slice(&len.to_be_bytes());
    datagram.extend_from_slice(payload);
    let pseudo = sum(&ip[12..20], 17 + u64::from(len));
    let whole = !sum(&datagram, pseudo.into());
    let with = |value: u16| {
        let mut datagram = datagram.clone();
        datagram[6..8].copy_from_slice(&value.to_be_bytes());
        frame(B, A, tci, 0x0800, &[&ip[..], &datagram].concat())
    };
    let csum_start = if tci.is_some() { 38 } else { 34 };
    let offload = Offload { needs_csum: true, csum_start, csum_offset: 6, ..Offload::default() };
    (with(whole), with(pseudo), offload)
}

#[test]
fn frames_pass_both_ways_round_and_round() -> Result<()> {
    let (machine, mut igb) = start(Config { ring: 16, ..Config::default() })?;
    assert_eq!(igb.ports()[0].mac, [2, 0, 0, 0, 0, 0x11]);
    for round in 0..60u8 {
        for tci in [None, Some(0x6005)] {
            let one = frame(B + u64::from(round), A, tci, EXPERIMENT, &[round; 300]);
            machine.wires[0].send(&one)?;
            assert_eq!(next(&mut igb)?.0, one);
            igb.send(0, &[&one[..7], &one[7..]], &Offload::default())?;
            igb.flush()?;
            assert_eq!(machine.wires[0].receive()?, one);
        }
    }
    until("completions", || {
        igb.flush()?;
        Ok((igb.counters(0).is_some_and(|counters| (counters.received, counters.sent) == (120, 120)))
            .then_some(()))
    })?;
    // A frame that is longer than the port takes does not come, and does not harm the next.
    machine.wires[0].send(&[2; 1600])?;
    let one = frame(B, A, None, EXPERIMENT, b"after");
    machine.wires[0].send(&one)?;
    assert_eq!(next(&mut igb)?.0, one);
    let small = |len: usize| vec![2; len];
    assert_eq!(igb.send(0, &[&small(13)], &Offload::default()), Err(SendError::TooShort));
    assert_eq!(igb.send(0, &[&small(1523)], &Offload::default()), Err(SendError::TooLong));
    assert_eq!(igb.send(1, &[&one], &Offload::default()), Err(SendError::NoPort));
    for _ in 0..15 {
        igb.send(0, &[&one], &Offload::default())?;
    }
    assert_eq!(igb.send(0, &[&one], &Offload::default()), Err(SendError::Full));
    igb.flush()?;
    for _ in 0..15 {
        assert_eq!(machine.wires[0].receive()?, one);
    }
    Ok(())
}

#[test]
fn checksums_are_completed_and_checked() -> Result<()> {
    let (machine, mut igb) = start(Config::default())?;
    for tci in [None, Some(5)] {
        let (whole, part, offload) = udp(tci);
        for _ in 0..200 {
            igb.send(0, &[&part], &offload)?;
            igb.flush()?;
            assert_eq!(machine.wires[0].receive()?, whole, "tag {tci:?}");
        }
        machine.wires[0].send(&whole)?;
        assert_eq!(next(&mut igb)?, (whole.clone(), true));
        machine.wires[0].send(&part)?;
        assert_eq!(next(&mut igb)?, (part.clone(), false), "a wrong sum is not called right");
        for lie in [
            Offload { csum_offset: 10, ..offload },
            Offload { csum_start: 20, ..offload },
            Offload { csum_start: 0xffff, ..offload },
        ] {
            assert_eq!(igb.send(0, &[&part], &lie), Err(SendError::Offload));
        }
    }
    Ok(())
}

/// How many buffers of the device have these bytes at their beginning, or behind the room that a tag has left.
fn buffers(machine: &Machine, bytes: &[u8]) -> Result<usize> {
    Ok(machine
        .memory()?
        .chunks(1024)
        .filter(|chunk| chunk.starts_with(bytes) || chunk[4..].starts_with(bytes))
        .count())
}

#[test]
fn tags_are_put_on_and_taken_off_by_the_device() -> Result<()> {
    for queues in [1, 4] {
        let (machine, mut igb) = start(Config { queues, ..Config::default() })?;
        assert!(igb.ports()[0].tags);
        let both_ways = |igb: &mut Igb, one: &[u8], at: usize| {
            machine.wires[0].send(one)?;
            assert_eq!(next(igb)?.0, one, "received");
            igb.send(0, &[&one[..at], &one[at..]], &Offload::default())?;
            igb.flush()?;
            assert_eq!(machine.wires[0].receive()?, one, "sent");
            anyhow::Ok(())
        };
        // A priority and a VLAN; a priority alone; the same again, of which the device has the context.
        for tci in [Some(5), Some(0xe005), Some(0x2000), Some(0x2000), None, Some(0x2000), Some(0x1fff)] {
            for dst in [B, BROADCAST, MULTICAST] {
                // The last one is in two pieces, and goes with its tag inside.
                for at in [40, 16, 15] {
                    both_ways(&mut igb, &frame(dst, A, tci, EXPERIMENT, b"tagged"), at)?;
                }
            }
        }
        // Two tags: the outer one is the device's, if it is one of 802.1Q.
        for outer in [0x8100, 0x88a8] {
            let inner = [&[0, 7, 0x81, 0, 0, 9][..], &EXPERIMENT.to_be_bytes(), &[outer as u8; 64]].concat();
            both_ways(&mut igb, &frame(B, A, None, outer, &inner), 60)?;
        }
        // What is shorter than its headers is padded by the device, as it was.
        let mut short = frame(B, A, Some(6), EXPERIMENT, &[]);
        short.truncate(16);
        machine.wires[0].send(&short)?;
        short.resize(60, 0);
        assert_eq!(next(&mut igb)?.0, short);

        // The witness: neither frame stands in the device's memory with its tag.
        let of = |tci, payload| frame(B, A, tci, EXPERIMENT, payload);
        let (sent, came) = (b"this was sent with a tag", b"this has come with a tag");
        igb.send(0, &[&of(Some(0x3007), sent)], &Offload::default())?;
        igb.flush()?;
        assert_eq!(machine.wires[0].receive()?, of(Some(0x3007), sent));
        machine.wires[0].send(&of(Some(0x3008), came))?;
        assert_eq!(next(&mut igb)?.0, of(Some(0x3008), came));
        for (tci, payload) in [(0x3007, sent), (0x3008, came)] {
            let seen = (buffers(&machine, &of(None, payload))?, buffers(&machine, &of(Some(tci), payload))?);
            assert_eq!(seen, (1, 0));
        }
    }
    Ok(())
}

#[test]
fn a_context_serves_until_another_is_needed() -> Result<()> {
    let (machine, mut igb) = start(Config { ring: 16, ..Config::default() })?;
    let of = |vid: usize| frame(B, A, Some(vid as u16), EXPERIMENT, b"in a VLAN");
    let fill = |igb: &mut Igb, vid: &dyn Fn(usize) -> usize| {
        let count = (0..).take_while(|&at| igb.send(0, &[&of(vid(at))], &Offload::default()).is_ok()).count();
        igb.flush()?;
        for at in 0..count {
            assert_eq!(machine.wires[0].receive()?, of(vid(at)));
        }
        igb.flush()?;
        anyhow::Ok(count)
    };
    assert_eq!(fill(&mut igb, &|_| 5)?, 14, "one of fifteen slots is the context's");
    assert_eq!(fill(&mut igb, &|_| 5)?, 15, "which the device has still");
    assert_eq!(fill(&mut igb, &|at| 6 + at % 2)?, 7, "each has its own");
    // A sum to be completed needs one with more in it, and the next frame needs its own again.
    let (whole, part, offload) = udp(Some(5));
    for _ in 0..3 {
        igb.send(0, &[&part], &offload)?;
        igb.send(0, &[&of(5)], &Offload::default())?;
        igb.send(0, &[&frame(B, A, None, EXPERIMENT, b"without")], &Offload::default())?;
        igb.flush()?;
        for expected in [&whole, &of(5), &frame(B, A, None, EXPERIMENT, b"without")] {
            assert_eq!(machine.wires[0].receive()?, *expected);
        }
    }
    // A device that was reset has none.
    assert_eq!(fill(&mut igb, &|_| 5)?, 15);
    reset(&machine, &mut igb)?;
    assert_eq!(fill(&mut igb, &|_| 5)?, 14);
    Ok(())
}

/// A TCP segment in a frame, its checksum that of the pseudo-header, with this many bytes of payload.
fn tcp(tci: Option<u16>, ipv4: bool, payload: usize) -> (Vec<u8>, Offload) {
    let len = 32 + payload;
    let mut segment = vec![0x30, 0x39, 0x00, 0x50, 1, 2, 3, 4, 5, 6, 7, 8, 0x80, 0x18, 1, 0, 0, 0, 0, 0];
    segment.extend([1, 1, 8, 10, 0, 0, 0, 1, 0, 0, 0, 2]);
    segment.extend((0..payload).map(|at| (at / 7) as u8));
    let (eth_type, mut ip, pseudo) = if ipv4 {
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
    segment[16..18].copy_from_slice(&checksum::fold(pseudo).to_be_bytes());
    let csum_start = (14 + ip.len() + if tci.is_some() { 4 } else { 0 }) as u16;
    ip.extend(segment);
    let offload = Offload { needs_csum: true, csum_start, csum_offset: 16, ..Offload::default() };
    (frame(B, A, tci, eth_type, &ip), offload)
}

#[test]
fn super_frames_are_segmented() -> Result<()> {
    let (machine, mut igb) = start(Config::default())?;
    assert!(igb.ports()[0].send.tso);
    for (tci, ipv4, payload) in [
        (None, true, 4000),
        (None, false, 4000),
        (Some(9), true, 20_000),
        (None, true, 65_000),
        (Some(9), false, 65_000),
        (None, true, 900),
    ] {
        let (sent, offload) = tcp(tci, ipv4, payload);
        let start = usize::from(offload.csum_start);
        let gso = if ipv4 { Gso::Tcp4 } else { Gso::Tcp6 };
        let offload = Offload { gso, gso_size: 1400, ..offload };
        igb.send(0, &[&sent[..3], &sent[3..60], &sent[60..]], &offload)?;
        igb.flush()?;
        let mut data = Vec::new();
        while data.len() < payload {
            let got = machine.wires[0].receive()?;
            let what = format!("{tci:?}, IPv4 {ipv4}, byte {} of {payload}", data.len());
            let network = if ipv4 { start - 20 } else { start - 40 };
            assert_eq!(got[..network], sent[..network]);
            let size = (payload - data.len()).min(1400);
            assert_eq!(got.len(), start + 32 + size, "{what}");
            // Sums, lengths and numbers are those of a segment.
            let told = |at: usize| usize::from(u16::from_be_bytes([got[at], got[at + 1]]));
            let len = (32 + size) as u32;
            let pseudo = if ipv4 {
                assert_eq!(
                    (told(network + 2), checksum::checksum(&got[network..start])),
                    (52 + size, 0),
                    "{what}"
                );
                checksum::pseudo_v4(0x0a00_0001, 0x0a00_0002, 6, len)
            } else {
                assert_eq!(told(network + 4), 32 + size, "{what}");
                checksum::pseudo_v6(&[0x20; 16], &[0x21; 16], 6, len)
            };
            assert_eq!(checksum::fold(checksum::add(pseudo, &got[start..])), 0xffff, "{what}");
            let sequence =
                u32::from_be_bytes([got[start + 4], got[start + 5], got[start + 6], got[start + 7]]);
            assert_eq!(sequence as usize, 0x0102_0304 + data.len(), "{what}");
            data.extend_from_slice(&got[start + 32..]);
        }
        assert_eq!(data, sent[start + 32..], "{tci:?} {ipv4} {payload}");
    }
    until("completions", || {
        igb.flush()?;
        Ok((igb.counters(0).is_some_and(|counters| counters.sent == 6)).then_some(()))
    })?;
    let (sent, offload) = tcp(None, true, 4000);
    let segmented = Offload { gso: Gso::Tcp4, gso_size: 1400, ..offload };
    for lie in [
        Offload { gso: Gso::Tcp6, ..segmented },
        Offload { gso: Gso::UdpL4, ..segmented },
        Offload { gso_size: 0, ..segmented },
        Offload { gso_size: 1500, ..segmented },
        Offload { needs_csum: false, ..segmented },
        Offload { csum_start: 54, ..segmented },
    ] {
        assert_eq!(igb.send(0, &[&sent], &lie), Err(SendError::Offload), "{lie:?}");
    }
    // As many as fit, by one context, and then all of them again.
    for _ in 0..3 {
        let mut count = 0;
        while igb.send(0, &[&sent], &segmented).is_ok() {
            count += 1;
        }
        assert_eq!((count, igb.send(0, &[&sent], &segmented)), (127, Err(SendError::Full)));
        igb.flush()?;
        for _ in 0..3 * count {
            machine.wires[0].receive()?;
        }
        igb.flush()?;
    }
    // A ring that is shorter than a frame says so.
    let (_machine, mut igb) = start(Config { ring: 8, ..Config::default() })?;
    let (long, _) = tcp(None, true, 13_000);
    assert_eq!(igb.send(0, &[&long], &segmented), Err(SendError::TooLong));
    Ok(())
}

#[test]
fn padding_is_not_counted_in() -> Result<()> {
    let (machine, mut igb) = start(Config::default())?;
    for ipv4 in [true, false] {
        let (mut sent, offload) = tcp(None, ipv4, 40);
        let len = sent.len();
        // A switch may have left anything behind the packet.
        sent.extend([0x55; 9]);
        igb.send(0, &[&sent[..50], &sent[50..len + 2], &sent[len + 2..]], &offload)?;
        igb.flush()?;
        let got = machine.wires[0].receive()?;
        let start = usize::from(offload.csum_start);
        let pseudo = match ipv4 {
            true => checksum::pseudo_v4(0x0a00_0001, 0x0a00_0002, 6, 72),
            false => checksum::pseudo_v6(&[0x20; 16], &[0x21; 16], 6, 72),
        };
        assert_eq!(got.len(), len);
        assert_eq!(checksum::fold(checksum::add(pseudo, &got[start..])), 0xffff);
    }
    Ok(())
}

const BROADCAST: u64 = 0xffff_ffff_ffff;
const MULTICAST: u64 = 0x3333_0000_0001;

fn mac(last: u64) -> [u8; 6] {
    [2, 0, 0, 0, 1, last as u8]
}

/// A frame for the station of [`mac`].
fn to(last: u64, tci: Option<u16>) -> Vec<u8> {
    frame(0x0200_0000_0100 | last, A, tci, EXPERIMENT, b"to a queue")
}

#[test]
fn frames_are_steered_by_their_address() -> Result<()> {
    let (machine, mut igb) = start(Config { queues: 8, ..Config::default() })?;
    let arrives = |igb: &mut Igb, frame: &[u8], queue: u32| {
        machine.wires[0].send(frame)?;
        assert_eq!(steered(igb)?, (queue, frame.to_vec()));
        anyhow::Ok(())
    };
    arrives(&mut igb, &to(1, None), 0)?;
    for last in 1..=23 {
        igb.steer(mac(last), None, (last % 8) as u8)?;
    }
    assert!(matches!(igb.steer(mac(24), None, 1), Err(SteerError::NoSpace)));
    assert!(matches!(igb.steer(mac(1), None, 8), Err(SteerError::NoQueue(8))));
    assert!(matches!(igb.steer([1, 0, 0, 0, 0, 1], None, 1), Err(SteerError::NoStation(_))));
    assert!(matches!(igb.steer(mac(1), Some(5), 1), Err(SteerError::NoVlan(5))));
    assert_eq!(igb.steered().len(), 23);
    let own = frame(0x0200_0000_0011, A, None, EXPERIMENT, b"own");
    for round in 0..2 {
        for last in 0..=24 {
            let queue = if (1..24).contains(&last) { last as u32 % 8 } else { 0 };
            for tci in [None, Some(7), Some(4094)] {
                arrives(&mut igb, &to(last, tci), queue)?;
            }
        }
        // What is for many, or for nobody that is known, comes to the first queue, once.
        for dst in [BROADCAST, MULTICAST, 0x0100_5e00_0001, 0x0299_9999_9999] {
            arrives(&mut igb, &frame(dst, A, Some(3), EXPERIMENT, &[round]), 0)?;
        }
        arrives(&mut igb, &own, if round == 0 { 0 } else { 5 })?;
        // The own address too; and sending is as ever.
        igb.steer([2, 0, 0, 0, 0, 0x11], None, 5)?;
        arrives(&mut igb, &own, 5)?;
        igb.send(0, &[&own], &Offload::default())?;
        igb.flush()?;
        assert_eq!(machine.wires[0].receive()?, own);
        // A rule is another one, and then gone.
        igb.steer(mac(9), None, 6)?;
        arrives(&mut igb, &to(9, None), 6)?;
        assert!(igb.unsteer(mac(9), None)? && !igb.unsteer(mac(9), None)?);
        arrives(&mut igb, &to(9, None), 0)?;
        igb.steer(mac(9), None, 1)?;
        // All is there again after a reset.
        reset(&machine, &mut igb)?;
        assert_eq!(igb.ports()[0].mac, [2, 0, 0, 0, 0, 0x11]);
    }
    Ok(())
}

#[test]
fn as_many_stations_have_a_queue_as_there_is_room_for() -> Result<()> {
    let (machine, mut igb) = start(Config { queues: 4, ..Config::default() })?;
    let rule = |last| Steering { mac: mac(last), vid: None, queue: (last % 4) as u8 };
    let rules: Vec<Steering> = (1..=30).map(rule).collect();
    let arrive = |igb: &mut Igb, known: std::ops::RangeInclusive<u64>| {
        for last in 1..=30 {
            machine.wires[0].send(&to(last, None))?;
            let queue = if known.contains(&last) { last as u32 % 4 } else { 0 };
            assert_eq!(steered(igb)?, (queue, to(last, None)), "station {last}");
        }
        anyhow::Ok(())
    };
    assert_eq!((igb.queues(), igb.set_steering(0, &rules)?), (4, 23));
    arrive(&mut igb, 1..=23)?;
    assert_eq!(igb.set_steering(1, &[])?, 0, "of no port");
    arrive(&mut igb, 1..=23)?;
    assert_eq!(igb.set_steering(0, &rules[24..])?, 6);
    arrive(&mut igb, 25..=30)?;
    let wrong = Steering { queue: 4, ..rules[2] };
    assert_eq!(igb.set_steering(0, &[rules[0], rules[1], wrong, rules[3]])?, 2);
    arrive(&mut igb, 1..=2)
}

#[test]
fn a_full_queue_does_not_hold_up_the_others() -> Result<()> {
    let (machine, mut igb) = start(Config { ring: 8, queues: 2, ..Config::default() })?;
    igb.steer(mac(1), None, 1)?;
    for _ in 0..20 {
        machine.wires[0].send(&to(1, None))?;
    }
    machine.wires[0].send(&to(2, None))?;
    let mut marks = Vec::new();
    until("the first queue's frame", || {
        // One after another, and from both queues in turn.
        igb.receive(1, &mut |received| marks.push(received.mark))?;
        Ok(marks.contains(&0).then_some(()))
    })?;
    machine.wires[0].send(&to(1, None))?;
    until("the second queue's frame", || {
        igb.receive(100, &mut |received| marks.push(received.mark))?;
        Ok((marks.last() == Some(&1)).then_some(()))
    })
}

#[test]
fn frames_are_steered_by_their_vlan() -> Result<()> {
    let vlans = (10..41).collect();
    let (machine, mut igb) = start(Config { queues: 4, vlans, ..Config::default() })?;
    igb.steer(mac(1), Some(10), 1)?;
    igb.steer(mac(1), Some(40), 2)?;
    igb.steer(mac(1), Some(0), 2)?;
    igb.steer(mac(2), None, 3)?;
    assert!(matches!(igb.steer(mac(3), Some(41), 1), Err(SteerError::NoVlan(41))));
    let conflict = igb.steer(mac(2), Some(10), 2);
    assert!(matches!(conflict, Err(SteerError::Conflict { vid: 10, wanted: 1, .. })), "{conflict:?}");
    assert!(!igb.unsteer(mac(2), Some(10))?, "it was not taken");
    let cases = [
        (to(1, Some(10)), 1),
        (to(1, Some(0xe000 | 10)), 1),
        (to(1, Some(40)), 2),
        (to(1, Some(11)), 0),
        (to(1, None), 2),
        (to(1, Some(0x2000)), 2),
        (to(2, None), 3),
        (to(2, Some(10)), 3),
        (to(2, Some(25)), 3),
        (to(3, Some(10)), 0),
        (frame(BROADCAST, A, Some(10), EXPERIMENT, &[]), 0),
        (frame(BROADCAST, A, None, EXPERIMENT, &[]), 0),
        (frame(MULTICAST, A, Some(40), EXPERIMENT, &[]), 0),
    ];
    for (frame, queue) in cases {
        // One of a VLAN that is none of the port's comes nowhere.
        machine.wires[0].send(&to(1, Some(9)))?;
        machine.wires[0].send(&crate::frame(BROADCAST, A, Some(41), EXPERIMENT, &[]))?;
        machine.wires[0].send(&frame)?;
        assert_eq!(steered(&mut igb)?, (queue, frame));
    }
    Ok(())
}

#[test]
fn vlans_are_told_apart_with_one_queue_too() -> Result<()> {
    let (machine, mut igb) = start(Config { vlans: vec![10, 4094], ..Config::default() })?;
    igb.steer(mac(1), Some(10), 0)?;
    assert!(matches!(igb.steer(mac(1), Some(10), 1), Err(SteerError::NoQueue(1))));
    for tci in [None, Some(10), Some(4094), Some(0xe000)] {
        for dst in [1, 2] {
            machine.wires[0].send(&to(dst, Some(11)))?;
            machine.wires[0].send(&to(dst, tci))?;
            assert_eq!(steered(&mut igb)?, (0, to(dst, tci)));
        }
    }
    Ok(())
}

#[test]
fn lost_interrupts_delay_nothing_for_ever() -> Result<()> {
    let (mut machine, mut igb) = start(Config { ring: 8, queues: 2, ..Config::default() })?;
    igb.steer(mac(1), None, 1)?;
    // Both vectors are masked in the device's table, behind the driver's back.
    let table = machine.bar(5, 3)?;
    for vector in 0..2 {
        machine.qtest().command(&format!("writel {:#x} 1", table + 16 * vector + 12))?;
    }
    for round in 0..100 {
        igb.arm()?;
        let one = to(round & 1, None);
        machine.wires[0].send(&one)?;
        assert_eq!(steered(&mut igb)?, (round as u32 & 1, one), "a sleeper that looks again finds it");
    }
    for up in [false, true, false] {
        machine.set_link("nic", up)?;
        link(&mut igb, up)?;
    }
    Ok(())
}

#[test]
fn links_interrupts_and_resets() -> Result<()> {
    let (mut machine, mut igb) = start(Config::default())?;
    let one = frame(B, A, None, EXPERIMENT, b"link");
    for up in [false, true] {
        machine.set_link("nic", up)?;
        link(&mut igb, up)?;
        let sent = igb.send(0, &[&one], &Offload::default());
        assert_eq!(sent, if up { Ok(()) } else { Err(SendError::LinkDown) });
    }
    igb.flush()?;
    assert_eq!(machine.wires[0].receive()?, one);
    until("quiet", || {
        igb.poll_events(&mut Vec::new())?;
        igb.receive(100, &mut |_| {})?;
        Ok(igb.arm()?.then_some(()))
    })?;
    for event in igb.interrupts() {
        let _ = rustix::io::read(event, &mut [0; 8]);
    }
    machine.wires[0].send(&one)?;
    until("an interrupt", || {
        Ok(igb.interrupts().iter().any(|event| rustix::io::read(event, &mut [0; 8]).is_ok()).then_some(()))
    })?;
    assert!(!igb.arm()?, "there is a frame");
    assert_eq!(next(&mut igb)?.0, one);
    reset(&machine, &mut igb)?;
    machine.wires[0].send(&one)?;
    assert_eq!(next(&mut igb)?.0, one);
    Ok(())
}
