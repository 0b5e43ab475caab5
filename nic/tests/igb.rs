//! The igb driver against QEMU's 82576.

mod common;

use anyhow::Result;
use common::{Machine, frame, until};
use nic::igb::{Config, Igb};
use nic::io::{PacketIo, PortEvent, SendError};
use serde_json::json;
use switch_core::packet::Offload;

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

fn link(igb: &mut Igb, up: bool) -> Result<()> {
    let mut events = Vec::new();
    until("the link", || {
        igb.poll_events(&mut events)?;
        Ok((igb.ports()[0].link.up == up).then_some(()))
    })
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
    // CTRL.RST behind the driver's back.
    let bar = machine.bar(5, 0)?;
    machine.qtest().command(&format!("writel {bar:#x} {:#x}", 1 << 26))?;
    let mut events = Vec::new();
    until("the reset to be seen", || {
        igb.poll_events(&mut events)?;
        Ok(events.contains(&PortEvent::Reset).then_some(()))
    })?;
    link(&mut igb, true)?;
    machine.wires[0].send(&one)?;
    assert_eq!(next(&mut igb)?.0, one);
    Ok(())
}
