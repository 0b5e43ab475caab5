//! The rocker driver against QEMU's switch: what the driver says is compared with the frames on the wires and with the
//! switch's own tables as QEMU's monitor shows them.

mod common;

use std::time::Instant;

use anyhow::{Context, Result};
use common::switch::{A, ARP, B, EXPERIMENT, Switch, matches, output, port, set};
use common::{frame, until};
use nic::io::{PacketIo, PortEvent, SendError};
use nic::offload::{FlowOffload, FlowRule, OpError, PortMap, Refusal, RuleId};
use nic::rocker::Config;
use serde_json::json;
use switch_core::action::Action;
use switch_core::flow::Match;
use switch_core::key::{Field, VLAN_PRESENT};
use switch_core::packet::Offload;

#[test]
fn frames_pass_between_every_port_and_the_cpu() -> Result<()> {
    let mut switch = Switch::start(3, Config::default())?;
    assert_eq!(switch.ports.ports().len(), 3);
    assert!(switch.ports.ports().iter().all(|port| port.link.speed > 0 && port.mac[0] & 1 == 0));
    for number in 1..=3u32 {
        for tci in [None, Some(100), Some(0x6005), Some(4094), Some(0x2000)] {
            let sent = frame(B, A, tci, EXPERIMENT, &[number as u8; 100]);
            switch.machine.wires[number as usize - 1].send(&sent)?;
            assert_eq!(switch.next_for_cpu()?, (number, sent.clone()), "tag {tci:x?}");
            switch.ports.send(number, &[&sent[..20], &sent[20..]], &Offload::default())?;
            switch.ports.flush()?;
            assert_eq!(switch.machine.wires[number as usize - 1].receive()?, sent);
        }
        let counters = switch.ports.counters(number).context("counters")?;
        assert_eq!((counters.received, counters.sent), (5, 5));
    }
    // A tag of VLAN 4095, which must not exist, would be taken for none; it is dropped.
    switch.machine.wires[0].send(&frame(B, A, Some(4095), EXPERIMENT, &[]))?;
    switch.cpu_is_quiet()
}

#[test]
fn rings_go_round_and_back_pressure_is_told() -> Result<()> {
    let mut switch = Switch::start(1, Config { ring: 8, ..Config::default() })?;
    for round in 0..50u8 {
        for index in 0..5 {
            switch.machine.wires[0].send(&frame(B, A, None, EXPERIMENT, &[round, index]))?;
        }
        for index in 0..5 {
            assert_eq!(switch.next_for_cpu()?.1[14..16], [round, index]);
        }
    }
    let one = frame(B, A, None, EXPERIMENT, b"full");
    for _ in 0..7 {
        switch.ports.send(1, &[&one], &Offload::default())?;
    }
    assert_eq!(switch.ports.send(1, &[&one], &Offload::default()), Err(SendError::Full));
    switch.ports.flush()?;
    for _ in 0..7 {
        assert_eq!(switch.machine.wires[0].receive()?, one);
    }
    switch.ports.send(1, &[&one], &Offload::default())?;
    let long = vec![0; 9217];
    assert_eq!(switch.ports.send(1, &[&long], &Offload::default()), Err(SendError::TooLong));
    assert_eq!(switch.ports.send(1, &[&one[..13]], &Offload::default()), Err(SendError::TooShort));
    assert_eq!(switch.ports.send(2, &[&one], &Offload::default()), Err(SendError::NoPort));
    assert_eq!(switch.ports.send(0, &[&one], &Offload::default()), Err(SendError::NoPort));
    let unfinished = Offload { needs_csum: true, ..Offload::default() };
    assert_eq!(switch.ports.send(1, &[&one], &unfinished), Err(SendError::Offload));
    // A frame that is longer than a buffer is counted.
    let mut switch = Switch::start(1, Config { max_frame: 256, ..Config::default() })?;
    switch.machine.wires[0].send(&vec![2; 300])?;
    switch.cpu_is_quiet()?;
    assert_eq!(switch.ports.counters(1).context("counters")?.rx_too_long, 1);
    Ok(())
}

#[test]
fn links_follow_their_cables_and_interrupts_come() -> Result<()> {
    let mut switch = Switch::start(2, Config::default())?;
    let mut events = Vec::new();
    switch.ports.poll_events(&mut events)?;
    for _ in 0..3 {
        for up in [false, true] {
            events.clear();
            switch.machine.set_link("sw.2", up).or_else(|_| switch.machine.set_link("n1", up))?;
            let state = until("the link to change", || {
                switch.ports.poll_events(&mut events)?;
                let change = events.iter().find_map(|event| match event {
                    PortEvent::Link { number: 2, link } => Some(link.up),
                    _ => None,
                });
                Ok(change)
            })?;
            assert_eq!(state, up);
            let one = frame(B, A, None, EXPERIMENT, b"link");
            let sent = switch.ports.send(2, &[&one], &Offload::default());
            assert_eq!(sent, if up { Ok(()) } else { Err(SendError::LinkDown) });
        }
    }
    // Armed, a frame raises an interrupt; one that came before is told of at once.
    while !switch.ports.arm()? {
        switch.ports.poll_events(&mut events)?;
        switch.ports.receive(100, &mut |_| {})?;
    }
    for event in switch.ports.interrupts() {
        let _ = rustix::io::read(event, &mut [0; 8]);
    }
    let one = frame(B, A, None, EXPERIMENT, b"wake");
    switch.machine.wires[1].send(&one)?;
    until("an interrupt", || {
        Ok(switch
            .ports
            .interrupts()
            .iter()
            .any(|event| rustix::io::read(event, &mut [0; 8]).is_ok())
            .then_some(()))
    })?;
    assert!(!switch.ports.arm()?, "there is a frame");
    assert_eq!(switch.next_for_cpu()?, (2, one));
    Ok(())
}

#[test]
fn rules_forward_without_the_cpu() -> Result<()> {
    let mut switch = Switch::start(3, Config::default())?;
    let untagged = frame(B, A, None, ARP, b"untagged");
    let tagged = frame(B, A, Some(0x6000 | 10), ARP, b"tagged");
    // Before there is a rule, both go to the CPU.
    for one in [&untagged, &tagged] {
        switch.machine.wires[0].send(one)?;
        assert_eq!(&switch.next_for_cpu()?.1, one);
    }
    let rewritten = |tci| frame(0x0200_0000_00dd, 0x0200_0000_00cc, tci, ARP, b"untagged");
    let new_addresses = [set(Field::EthDst, 0x0200_0000_00dd), set(Field::EthSrc, 0x0200_0000_00cc)];
    let push = |tci: u16| Action::PushVlan { tpid: 0x8100, tci: tci | VLAN_PRESENT };
    let plain = matches(1, B, None, ARP);
    let vlan = matches(1, B, Some(0x6000 | 10), ARP);
    let with = |first: &[Action], then: Vec<Action>| [first, &then].concat();
    let popped = frame(B, A, None, ARP, b"tagged");
    let pushed = frame(B, A, Some(0xa000 | 77), ARP, b"untagged");
    type Case = (&'static str, Match, Vec<Action>, Vec<u8>, [Vec<Vec<u8>>; 2]);
    let cases: Vec<Case> = vec![
        ("output", plain.clone(), vec![output(2)], untagged.clone(), [vec![untagged.clone()], vec![]]),
        (
            "two outputs",
            plain.clone(),
            vec![output(2), output(3)],
            untagged.clone(),
            [vec![untagged.clone()], vec![untagged.clone()]],
        ),
        (
            "twice the same",
            plain.clone(),
            vec![output(2), output(2)],
            untagged.clone(),
            [vec![untagged.clone(); 2], vec![]],
        ),
        ("drop", plain.clone(), vec![], untagged.clone(), [vec![], vec![]]),
        (
            "push",
            plain.clone(),
            vec![push(0xa000 | 77), output(3)],
            untagged.clone(),
            [vec![], vec![pushed.clone()]],
        ),
        (
            "pop",
            vlan.clone(),
            vec![Action::PopVlan, output(2)],
            tagged.clone(),
            [vec![popped.clone()], vec![]],
        ),
        (
            "tagged",
            vlan.clone(),
            vec![output(2), output(3)],
            tagged.clone(),
            [vec![tagged.clone()], vec![tagged.clone()]],
        ),
        (
            "addresses",
            plain.clone(),
            with(&new_addresses, vec![output(2)]),
            untagged.clone(),
            [vec![rewritten(None)], vec![]],
        ),
        (
            "addresses and push",
            plain.clone(),
            with(&new_addresses, vec![push(9), output(2)]),
            untagged.clone(),
            [vec![rewritten(Some(9))], vec![]],
        ),
        (
            "different copies",
            plain.clone(),
            with(
                &[output(2), push(0xa000 | 77), output(3), Action::PopVlan],
                with(&new_addresses, vec![output(2)]),
            ),
            untagged.clone(),
            [vec![untagged.clone(), rewritten(None)], vec![pushed.clone()]],
        ),
        (
            "copies with and without the tag",
            vlan.clone(),
            vec![output(3), Action::PopVlan, output(2), output(3)],
            tagged.clone(),
            [vec![popped.clone()], vec![tagged.clone(), popped.clone()]],
        ),
        (
            "the same tag again",
            vlan.clone(),
            vec![Action::PopVlan, push(0x6000 | 10), output(2)],
            tagged.clone(),
            [vec![tagged.clone()], vec![]],
        ),
    ];
    for (name, matches, actions, sent, expected) in cases {
        assert_eq!(switch.insert(1, &matches, &actions)?, Ok(()), "{name}");
        switch.machine.wires[0].send(&sent)?;
        switch.cpu_is_quiet().context(name)?;
        for (wire, expected) in switch.machine.wires[1..].iter().zip(expected) {
            for expected in expected {
                assert_eq!(wire.receive()?, expected, "{name}");
            }
            assert_eq!(wire.try_receive()?, None, "{name}");
        }
        assert_eq!(switch.acl()?, [(1, 1)], "{name}: the switch has counted the frame");
        assert_eq!(switch.remove(1)?, Ok(()));
        assert_eq!(switch.acl()?, []);
        assert_eq!(switch.groups()?.len(), 2, "{name}: only those to the CPU are left");
        switch.machine.wires[0].send(&sent)?;
        assert_eq!(switch.next_for_cpu()?.1, sent, "{name}: the CPU has the flow again");
    }
    Ok(())
}

#[test]
fn near_misses_stay_with_the_cpu() -> Result<()> {
    let mut switch = Switch::start(2, Config::default())?;
    let mut some = matches(1, B, None, ARP);
    some.key.set(Field::EthSrc, 0x0200_0000_0000);
    some.mask.set(Field::EthSrc, 0xffff_ffff_ff00);
    assert_eq!(switch.insert(1, &some, &[output(2)])?, Ok(()));
    let tagged = matches(1, B, Some(10), ARP);
    assert_eq!(switch.insert(2, &tagged, &[output(2)])?, Ok(()));
    let near = [
        frame(B + 1, A, None, ARP, &[]),
        frame(B, A | 0x0100, None, ARP, &[]),
        frame(B, A, None, EXPERIMENT, &[]),
        frame(B, A, Some(11), ARP, &[]),
        frame(B, A, Some(0x2000 | 10), ARP, &[]),
        frame(B, A, Some(0), ARP, &[]),
        frame(B, A, None, 0x88a8, &[0, 10, 8, 6]),
        frame(B, A, Some(10), 0x8100, &[0, 10, 8, 6]),
    ];
    for one in &near {
        switch.machine.wires[0].send(one)?;
        assert_eq!(&switch.next_for_cpu()?, &(1, one.clone()));
    }
    let other = frame(B, A, None, ARP, &[]);
    switch.machine.wires[1].send(&other)?;
    assert_eq!(switch.next_for_cpu()?, (2, other.clone()), "another port");
    assert_eq!(switch.machine.wires[1].try_receive()?, None);
    switch.machine.wires[0].send(&other)?;
    assert_eq!(switch.machine.wires[1].receive()?, other);
    Ok(())
}

#[test]
fn a_full_table_says_so_and_rules_are_replaced_without_a_gap() -> Result<()> {
    let mut switch = Switch::start(3, Config { max_rules: 20, ..Config::default() })?;
    for rule in 0..20 {
        assert_eq!(switch.insert(rule, &matches(1, B + rule, None, ARP), &[output(2)])?, Ok(()));
    }
    assert_eq!(switch.insert(20, &matches(1, A, None, ARP), &[output(2)])?, Err(OpError::NoSpace));
    assert_eq!(switch.insert(3, &matches(1, A, None, ARP), &[output(2)])?, Err(OpError::Exists));
    assert_eq!(switch.flows.occupancy().rules, 20);
    assert_eq!(switch.flows.occupancy().groups, 1, "one output, one group");
    assert_eq!(switch.acl()?.len(), 20);
    for round in 0..10u32 {
        let to = 2 + round % 2;
        assert_eq!(switch.replace(5, &matches(1, B + 5, None, ARP), &[output(to)])?, Ok(()));
        let one = frame(B + 5, A, None, ARP, &[round as u8]);
        switch.machine.wires[0].send(&one)?;
        assert_eq!(switch.machine.wires[to as usize - 1].receive()?, one);
    }
    assert_eq!(switch.acl()?.len(), 20);
    assert_eq!(switch.remove(7)?, Ok(()));
    assert_eq!(switch.insert(20, &matches(1, A, None, ARP), &[output(3)])?, Ok(()));
    let token = switch.token();
    assert_eq!(switch.flows.remove(RuleId(7), token), Err(OpError::NoRule));
    switch.flows.flush(Instant::now());
    switch.poll();
    assert_eq!((switch.resets, switch.flows.occupancy().rules), (1, 0));
    assert_eq!(switch.acl()?, []);
    switch.links_up()?;
    switch.cpu_is_quiet()
}

#[test]
fn a_thousand_rules_in_batches() -> Result<()> {
    let mut switch = Switch::start(2, Config { max_rules: 1000, ..Config::default() })?;
    let mut tokens = Vec::new();
    for rule in 0..1000 {
        let matches = matches(1, B + rule, None, ARP);
        let actions = [set(Field::EthSrc, A + rule % 7), output(2)];
        let plan =
            switch.flows.compile(&FlowRule { matches: &matches, actions: &actions, ports: &switch.map });
        let token = switch.token();
        switch.flows.insert(RuleId(rule), plan.map_err(|refusal| anyhow::anyhow!("{refusal}"))?, token)?;
        tokens.push(token);
    }
    for token in tokens {
        assert_eq!(switch.wait(token)?, Ok(()));
    }
    assert_eq!(switch.acl()?.len(), 1000);
    assert_eq!(switch.flows.occupancy().groups, 8, "seven rewrites over one interface");
    assert_eq!(switch.groups()?.len(), 10);
    Ok(())
}

#[test]
fn a_reset_from_outside_is_noticed_and_mended() -> Result<()> {
    let mut switch = Switch::start(2, Config::default())?;
    assert_eq!(switch.insert(1, &matches(1, B, None, ARP), &[output(2)])?, Ok(()));
    // What a reset of the machine does: the device forgets rings, tables and bus mastering.
    switch.machine.qmp("system_reset", json!({}))?;
    // It has lost its addresses too, so it stays out of reach, and nothing may hang.
    until("the reset to be seen", || {
        switch.poll();
        Ok((switch.resets == 1).then_some(()))
    })?;
    assert_eq!(switch.flows.occupancy().rules, 0);
    let token = switch.token();
    let plan = switch.flows.compile(&FlowRule {
        matches: &matches(1, B, None, ARP),
        actions: &[output(2)],
        ports: &switch.map,
    });
    let refused =
        switch.flows.insert(RuleId(1), plan.map_err(|refusal| anyhow::anyhow!("{refusal}"))?, token);
    assert_eq!(refused, Err(OpError::Reset), "the device is out of reach");
    let one = frame(B, A, None, ARP, &[]);
    assert_eq!(switch.ports.send(1, &[&one], &Offload::default()), Err(SendError::Device));
    assert_eq!(switch.ports.receive(10, &mut |_| {})?, 0);
    let mut events = Vec::new();
    switch.ports.poll_events(&mut events)?;
    assert!(switch.ports.ports().iter().all(|port| !port.link.up), "no link while it is down");
    Ok(())
}

#[test]
fn a_reset_of_the_switch_alone_is_mended() -> Result<()> {
    let mut switch = Switch::start(2, Config::default())?;
    assert_eq!(switch.insert(1, &matches(1, B, None, ARP), &[output(2)])?, Ok(()));
    // CONTROL.RESET behind the driver's back.
    let address = switch.machine.bar(5, 0)?;
    switch.machine.qtest().command(&format!("writel {:#x} 1", address + 0x300))?;
    until("the reset to be seen", || {
        switch.poll();
        Ok((switch.resets == 1).then_some(()))
    })?;
    assert_eq!(switch.acl()?, []);
    let mut events = Vec::new();
    switch.ports.poll_events(&mut events)?;
    assert!(events.contains(&PortEvent::Reset));
    switch.links_up()?;
    switch.cpu_is_quiet()?;
    assert_eq!(switch.insert(1, &matches(1, B, None, ARP), &[output(2)])?, Ok(()));
    let one = frame(B, A, None, ARP, b"again");
    switch.machine.wires[0].send(&one)?;
    assert_eq!(switch.machine.wires[1].receive()?, one);
    Ok(())
}

#[test]
fn lost_interrupts_delay_nothing_for_ever() -> Result<()> {
    let mut switch = Switch::start(2, Config::default())?;
    // Every vector is masked in the device's table, behind the driver's back.
    let table = switch.machine.bar(5, 1)?;
    for vector in 0..8 {
        switch.machine.qtest().command(&format!("writel {:#x} 1", table + 16 * vector + 12))?;
    }
    let one = frame(B, A, None, ARP, b"unannounced");
    for _ in 0..300 {
        switch.ports.arm()?;
        switch.machine.wires[0].send(&one)?;
        assert_eq!(switch.next_for_cpu()?, (1, one.clone()), "a sleeper that looks again finds it");
    }
    switch.machine.set_link("sw.2", false).or_else(|_| switch.machine.set_link("n1", false))?;
    let mut events = Vec::new();
    until("the link to go", || {
        switch.ports.poll_events(&mut events)?;
        Ok((!switch.ports.ports()[1].link.up).then_some(()))
    })?;
    assert_eq!(switch.insert(1, &matches(1, B, None, ARP), &[])?, Ok(()));
    Ok(())
}

#[test]
fn what_would_bring_the_device_down_is_refused() -> Result<()> {
    let mut switch = Switch::start(2, Config::default())?;
    let map = PortMap::new([(port(1), 1), (port(2), 2), (port(3), 3), (port(4), 0)]);
    let matches = matches(1, B, None, ARP);
    for beyond in [3, 4] {
        let actions = [output(beyond)];
        let refused = switch.flows.compile(&FlowRule { matches: &matches, actions: &actions, ports: &map });
        assert_eq!(refused.map(drop), Err(Refusal::Port));
    }
    let one = frame(B, A, None, ARP, &[]);
    assert_eq!(switch.ports.send(3, &[&one], &Offload::default()), Err(SendError::NoPort));
    assert!(switch.machine.is_running()?);
    // The driver goes: the switch forwards nothing by itself any more.
    assert_eq!(switch.insert(1, &matches, &[output(2)])?, Ok(()));
    let Switch { ports, flows, mut machine, .. } = switch;
    drop((ports, flows));
    let left = machine.qmp("query-rocker-of-dpa-flows", json!({ "name": "sw" }))?;
    assert_eq!(left.as_array().map(Vec::len), Some(0));
    Ok(())
}
