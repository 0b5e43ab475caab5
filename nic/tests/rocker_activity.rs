//! Whether rocker's rules are used, as the driver finds it out with QEMU's switch.

mod common;

use std::time::{Duration, Instant};

use anyhow::Result;
use common::switch::{A, ARP, B, Switch, matches, output, set};
use common::{frame, until};
use nic::io::PacketIo;
use nic::offload::{CounterKind, FlowOffload, RuleId};
use nic::rocker::Config;
use switch_core::action::Action;
use switch_core::key::Field;

#[test]
fn rules_that_are_used_say_so() -> Result<()> {
    // Long enough for a machine that is busy with other things.
    let probe = Duration::from_millis(150);
    let mut switch = Switch::start(2, Config { probe, ..Config::default() })?;
    assert_eq!(switch.flows.caps().counters, CounterKind::Activity);
    // Rules of every kind of copy: untagged, tagged, with a priority, VLAN 1, dropped, rewritten. The last ones are idle.
    let tags = [None, Some(10), Some(0x6000 | 11), Some(1), None, Some(12), None, Some(13)];
    let frames: Vec<_> =
        (0..).zip(tags).map(|(rule, tci)| frame(B + rule, A, tci, ARP, &[rule as u8])).collect();
    for (rule, tci) in (0..).zip(tags) {
        let actions = match rule {
            4 => vec![],
            5 => vec![set(Field::EthDst, 0x0200_0000_00dd), Action::PopVlan, output(2)],
            _ => vec![output(2)],
        };
        assert_eq!(switch.insert(rule, &matches(1, B + rule, tci, ARP), &actions)?, Ok(()));
    }
    let groups = switch.groups()?.len();
    for _ in 0..3 {
        let all: Vec<_> = (0..=8).map(RuleId).collect();
        switch.flows.sample(&all);
        let stats = switch.answers(8, &frames[..6])?;
        let used: Vec<_> = stats.iter().map(|&(rule, packets)| (rule, packets > 0)).collect();
        let expected: Vec<_> = (0..8).map(|rule| (rule, rule < 6)).collect();
        assert_eq!(used, expected, "each rule answers once");
        switch.is_forwarded_alone(&frames[0])?;
        switch.is_forwarded_alone(&frames[1])?;
        assert_eq!(switch.groups()?.len(), groups, "those of the copies are gone");
    }
    assert_eq!(switch.resets, 0);
    // More than can be probed at once.
    for rule in 8..100 {
        assert_eq!(switch.insert(rule, &matches(1, B + rule, Some(20), ARP), &[output(2)])?, Ok(()));
    }
    let all: Vec<_> = (0..100).map(RuleId).collect();
    switch.flows.sample(&all);
    switch.flows.sample(&all);
    let one = frame(B + 77, A, Some(20), ARP, b"one of many");
    let stats = switch.answers(100, &[one.clone(), frames[3].clone()])?;
    let used: Vec<_> = stats.iter().filter(|(_, packets)| *packets > 0).map(|(rule, _)| *rule).collect();
    assert_eq!((stats.len(), used), (100, vec![3, 77]));
    switch.is_forwarded_alone(&one)
}

#[test]
fn what_happens_to_a_rule_in_a_probe_ends_it() -> Result<()> {
    let mut switch = Switch::start(2, Config { probe: Duration::from_secs(3600), ..Config::default() })?;
    let (one, other) = (frame(B, A, Some(5), ARP, b"one"), frame(B + 1, A, Some(5), ARP, b"other"));
    let rules = [matches(1, B, Some(5), ARP), matches(1, B + 1, Some(5), ARP)];
    for (rule, matches) in (0..).zip(&rules) {
        assert_eq!(switch.insert(rule, matches, &[output(2)])?, Ok(()));
    }
    let both = [RuleId(0), RuleId(1)];
    // Removed while the probe is open, before it was begun, and while it waits for its end.
    switch.flows.sample(&both);
    switch.poll();
    switch.poll();
    assert_eq!(switch.remove(0)?, Ok(()));
    assert_eq!(switch.insert(0, &rules[0], &[output(2)])?, Ok(()));
    switch.is_forwarded_alone(&one)?;
    switch.flows.sample(&both);
    assert_eq!(switch.remove(0)?, Ok(()));
    assert_eq!(switch.insert(0, &rules[0], &[output(2)])?, Ok(()));
    switch.is_forwarded_alone(&one)?;
    // The other rule's probe goes on, and is told only of its own copies.
    assert_eq!(switch.answers(1, &[one.clone(), other.clone()])?.first().map(|(rule, _)| *rule), Some(1));
    // Replaced: the new form copies nothing, and can be asked for.
    switch.flows.sample(&both);
    switch.poll();
    assert_eq!(switch.replace(0, &rules[0], &[output(2), output(2)])?, Ok(()));
    assert_eq!(switch.replace(0, &rules[0], &[output(2)])?, Ok(()));
    switch.is_forwarded_alone(&one)?;
    switch.flows.sample(&both);
    let stats = switch.answers(2, &[one.clone(), other.clone()])?;
    assert!(matches!(stats[..], [(0, 1..), (1, 1..)]), "{stats:?}");
    // A reset: nothing answers, and the new rules copy nothing.
    switch.flows.sample(&both);
    switch.poll();
    switch.poll();
    switch.machine.wires[0].send(&one)?;
    until("a copy", || {
        let mut copies = 0;
        switch.ports.receive(10, &mut |received| copies += usize::from(received.forwarded))?;
        Ok((copies > 0).then_some(()))
    })?;
    switch.flows.flush(Instant::now());
    switch.poll();
    assert_eq!((switch.resets, switch.stats.len()), (1, 0));
    switch.links_up()?;
    for (rule, matches) in (0..).zip(&rules) {
        assert_eq!(switch.insert(rule, matches, &[output(2)])?, Ok(()));
    }
    switch.is_forwarded_alone(&one)?;
    // The copy from before the reset is nobody's.
    switch.flows.sample(&both);
    let stats = switch.answers(1, std::slice::from_ref(&other))?;
    assert!(matches!(stats[..], [(1, 1..)]), "{stats:?}");
    assert_eq!(switch.resets, 1);
    Ok(())
}
