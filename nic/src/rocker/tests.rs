//! Devices that fail, lie, or keep silent.

use std::collections::HashMap;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use proptest::prelude::*;
use switch_core::action::{Action, PortRef};
use switch_core::flow::Match;
use switch_core::key::Field;
use switch_core::packet::{Offload, PortId};

use super::tlv::Writer;
use super::*;
use crate::io::{PacketIo, PortEvent};
use crate::offload::{Counts, Event, FlowOffload, FlowRule, OpError, PortMap, RuleId, Token};
use crate::pci::fake::{Fake, Memory};

/// How the fake switch answers commands.
#[derive(Clone, Debug, Default)]
pub(super) struct Behaviour {
    silent: bool,
    /// Error by type of command.
    errors: HashMap<u16, u16>,
    /// What it writes over the message of the first command of this type, and how long it says that is.
    answer: Option<(u16, Vec<u8>, u16)>,
    /// What completions of receive descriptors are made of: word, length, message.
    receive: Option<(u16, u16, Vec<u8>)>,
}

pub(super) type Shared = Arc<Mutex<Behaviour>>;

fn fake(ports: u64, behaviour: &Shared) -> Box<Fake> {
    let registers = HashMap::from([(regs::PORT_COUNT, ports), (regs::LINK_STATUS, u64::MAX)]);
    let behaviour = behaviour.clone();
    let mut tails: HashMap<u64, u64> = HashMap::new();
    let hook = move |registers: &mut HashMap<u64, u64>, memory: &Memory, offset: u64, value: u64| {
        let behaviour = behaviour.lock().unwrap();
        if offset == regs::TEST_REG {
            registers.insert(offset, value * 2);
        }
        if offset < 0x1000 {
            return;
        }
        let base = offset & !31;
        if offset == base + regs::ring::SIZE {
            tails.insert(base, 0);
        }
        if offset != base + regs::ring::HEAD {
            return;
        }
        let number = (base - 0x1000) / 32;
        let (at, size) = (registers[&base] as usize, registers[&(base + regs::ring::SIZE)]);
        let tail = tails.entry(base).or_default();
        while *tail != value {
            let descriptor = at + 32 * *tail as usize;
            let buffer = memory.0.load_u64(descriptor).unwrap() as usize;
            if number == 0 && !behaviour.silent {
                let kind = memory.0.load_u16(buffer + 8).unwrap();
                let first = memory.0.load_u32(buffer).unwrap();
                let error = behaviour.errors.get(&kind).filter(|_| first == 1).copied().unwrap_or(0);
                match &behaviour.answer {
                    Some((wanted, answer, len)) if *wanted == kind => {
                        memory.0.write(buffer, answer).unwrap();
                        memory.0.store_u16(descriptor + 18, *len).unwrap();
                    }
                    _ => {}
                }
                memory.0.store_u16(descriptor + 30, 0x8000 | error).unwrap();
            }
            if let (Some((word, len, message)), true) = (&behaviour.receive, number >= 3 && number % 2 == 1) {
                memory.0.write(buffer, message).unwrap();
                memory.0.store_u16(descriptor + 18, *len).unwrap();
                memory.0.store_u16(descriptor + 30, *word).unwrap();
            }
            *tail = (*tail + 1) & (size - 1);
        }
    };
    Box::new(Fake::new(0x0006_1b36, 0x2000, registers, Box::new(hook)))
}

fn settings() -> Vec<u8> {
    let mut to = Writer::default();
    to.nest(command::INFO, |info| {
        info.u32(settings::SPEED, 10_000).mac(settings::MAC, 0x0200_0000_0001).bytes(settings::NAME, b"sw.1");
    });
    to.finish()
}

pub(super) fn good() -> Shared {
    let answer = settings();
    let len = answer.len() as u16;
    Arc::new(Mutex::new(Behaviour {
        answer: Some((command::GET_PORT_SETTINGS, answer, len)),
        ..Behaviour::default()
    }))
}

fn config() -> Config {
    Config { ring: 8, max_frame: 256, timeout: Duration::from_millis(20), ..Config::default() }
}

pub(super) fn started(behaviour: &Shared) -> (RockerPorts, RockerFlows) {
    open(fake(2, behaviour), config()).unwrap()
}

const IN: PortId = PortId { slot: 1, generation: 1 };
const OUT: PortId = PortId { slot: 2, generation: 1 };

pub(super) fn insert(flows: &mut RockerFlows, rule: u64, token: u64) -> Result<(), OpError> {
    let mut matches = Match::default();
    for (field, value) in [(Field::InPort, IN.slot.into()), (Field::EthType, 0x0806), (Field::VlanTci, 0)] {
        matches.key.set(field, value);
        matches.mask.set_exact(field);
    }
    let ports = PortMap::new([(IN, 1), (OUT, 2)]);
    let actions = [Action::Output(PortRef::Ours(OUT))];
    let plan = flows.compile(&FlowRule { matches: &matches, actions: &actions, ports: &ports }).unwrap();
    flows.insert(RuleId(rule), plan, Token(token))
}

/// How operations ended, by their tokens.
pub(super) type Results = Vec<(u64, Result<(), OpError>)>;

/// Lets all commands pass and returns the results of operations and the number of resets.
pub(super) fn settle(flows: &mut RockerFlows, now: Instant) -> (Results, usize) {
    let mut events = Vec::new();
    for _ in 0..4 {
        flows.kick(now);
        flows.poll(now, &mut events);
    }
    let mut results = Vec::new();
    let mut resets = 0;
    for event in events {
        match event {
            Event::Done { token, result, .. } => results.push((token.0, result)),
            Event::Reset => resets += 1,
            other => panic!("{other:?}"),
        }
    }
    (results, resets)
}

#[test]
fn a_lost_completion_ends_in_a_reset_and_a_dead_device_in_retries() {
    let behaviour = good();
    let (mut ports, mut flows) = started(&behaviour);
    let start = Instant::now();
    assert_eq!(insert(&mut flows, 1, 1), Ok(()));
    assert_eq!(settle(&mut flows, start), (vec![(1, Ok(()))], 0));
    behaviour.lock().unwrap().silent = true;
    assert_eq!(insert(&mut flows, 2, 2), Ok(()));
    assert_eq!(settle(&mut flows, start), (vec![], 0), "there is time still");
    let later = start + Duration::from_millis(50);
    assert_eq!(settle(&mut flows, later), (vec![(2, Err(OpError::Unknown))], 1));
    assert_eq!(flows.occupancy().rules, 0, "the first rule is gone too");
    assert_eq!(insert(&mut flows, 3, 3), Err(OpError::Reset), "the device is still silent");
    assert_eq!(ports.receive(8, &mut |_| panic!()).unwrap(), 0);
    behaviour.lock().unwrap().silent = false;
    assert_eq!(settle(&mut flows, later), (vec![], 0), "not yet");
    settle(&mut flows, later + Duration::from_secs(2));
    assert_eq!(insert(&mut flows, 3, 3), Ok(()));
    assert_eq!(settle(&mut flows, later + Duration::from_secs(2)), (vec![(3, Ok(()))], 0));
    let mut events = Vec::new();
    ports.poll_events(&mut events).unwrap();
    assert!(events.contains(&PortEvent::Reset));
}

#[test]
fn refusals_of_the_device_are_told_and_leave_nothing_behind() {
    let behaviour = good();
    let (_ports, mut flows) = started(&behaviour);
    let now = Instant::now();
    for (kind, error, told) in [
        (command::FLOW_ADD, 12, OpError::NoSpace),
        (command::FLOW_ADD, 22, OpError::Rejected(22)),
        (command::GROUP_ADD, 105, OpError::NoSpace),
        (command::GROUP_ADD, 0x7fff, OpError::Rejected(0x7fff)),
    ] {
        behaviour.lock().unwrap().errors = HashMap::from([(kind, error)]);
        assert_eq!(insert(&mut flows, 1, 1), Ok(()));
        assert_eq!(settle(&mut flows, now), (vec![(1, Err(told))], 0));
        let occupancy = flows.occupancy();
        assert_eq!((occupancy.rules, occupancy.groups, occupancy.operations), (0, 0, 0));
    }
    // A rule that cannot be deleted is one that is not where it should be.
    behaviour.lock().unwrap().errors = HashMap::new();
    assert_eq!(insert(&mut flows, 1, 1), Ok(()));
    assert_eq!(settle(&mut flows, now), (vec![(1, Ok(()))], 0));
    behaviour.lock().unwrap().errors = HashMap::from([(command::FLOW_DEL, 2)]);
    assert_eq!(flows.remove(RuleId(1), Token(2)), Ok(()));
    assert_eq!(settle(&mut flows, now), (vec![(2, Err(OpError::Unknown))], 1));
}

#[test]
fn probes_that_a_device_refuses_or_never_ends_are_mended() {
    let behaviour = good();
    let (_ports, mut flows) = started(&behaviour);
    let now = Instant::now();
    let later = now + Duration::from_millis(15);
    assert_eq!(insert(&mut flows, 1, 1), Ok(()));
    assert_eq!(settle(&mut flows, now), (vec![(1, Ok(()))], 0));
    let stats = |flows: &mut RockerFlows, now| {
        let mut events = Vec::new();
        for _ in 0..4 {
            flows.kick(now);
            flows.poll(now, &mut events);
        }
        events
    };
    // It will not copy: there is no answer, and nothing else happens. It can be asked again.
    behaviour.lock().unwrap().errors = HashMap::from([(command::FLOW_MOD, 95)]);
    for _ in 0..3 {
        flows.sample(&[RuleId(1), RuleId(2), RuleId(1)]);
        assert_eq!(stats(&mut flows, now), []);
        assert_eq!(stats(&mut flows, later), []);
    }
    // Given up while the refusal is on its way.
    flows.sample(&[RuleId(1)]);
    flows.kick(now);
    assert_eq!(flows.remove(RuleId(1), Token(2)), Ok(()));
    assert_eq!(settle(&mut flows, now), (vec![(2, Ok(()))], 0));
    // No copies: idle, and the windows are kept.
    behaviour.lock().unwrap().errors.clear();
    assert_eq!(insert(&mut flows, 1, 1), Ok(()));
    assert_eq!(settle(&mut flows, now), (vec![(1, Ok(()))], 0));
    flows.sample(&[RuleId(1)]);
    assert_eq!(stats(&mut flows, now), []);
    assert_eq!(stats(&mut flows, later), []);
    let idle = Event::Stats { rule: RuleId(1), delta: Counts::default() };
    assert_eq!(stats(&mut flows, later + Duration::from_millis(15)), [idle]);
    // It will not stop: it is reset, and there is no answer.
    flows.sample(&[RuleId(1)]);
    assert_eq!(stats(&mut flows, now), []);
    behaviour.lock().unwrap().errors = HashMap::from([(command::FLOW_MOD, 2)]);
    assert_eq!(settle(&mut flows, later), (vec![], 1));
    // It keeps silent: the same.
    behaviour.lock().unwrap().errors.clear();
    assert_eq!(insert(&mut flows, 1, 3), Ok(()));
    assert_eq!(settle(&mut flows, now), (vec![(3, Ok(()))], 0));
    behaviour.lock().unwrap().silent = true;
    flows.sample(&[RuleId(1)]);
    assert_eq!(settle(&mut flows, now), (vec![], 0), "there is time still");
    assert_eq!(settle(&mut flows, now + Duration::from_millis(50)), (vec![], 1));
}

#[test]
fn a_device_that_lies_at_the_start_is_an_error() {
    for ports in [0, 63, 0xffff_ffff] {
        assert!(open(fake(ports, &good()), config()).is_err());
    }
    let good_answer = settings();
    let cut = |len: usize| good_answer.get(..len).unwrap_or_default().to_vec();
    for (answer, len) in [(vec![], 0), (cut(20), 20), (good_answer.clone(), 0xffff), (vec![0xff; 64], 64)] {
        let behaviour = good();
        behaviour.lock().unwrap().answer = Some((command::GET_PORT_SETTINGS, answer, len));
        assert!(open(fake(2, &behaviour), config()).is_err());
    }
    let behaviour = good();
    behaviour.lock().unwrap().silent = true;
    assert!(open(fake(2, &behaviour), config()).is_err());
    let registers = HashMap::from([(regs::PORT_COUNT, 2)]);
    let other = Fake::new(0x0006_1b36, 0x2000, registers.clone(), Box::new(|_, _, _, _| {}));
    assert!(open(Box::new(other), config()).is_err(), "the register test fails");
    let other = Fake::new(0x10c9_8086, 0x2000, registers, Box::new(|_, _, _, _| {}));
    assert!(matches!(open(Box::new(other), config()), Err(NicError::Pci(PciError::Foreign { .. }))));
    let wrong = |config: Config| matches!(open(fake(2, &good()), config), Err(NicError::Config(_)));
    assert!(wrong(Config { ring: 12, ..config() }) && wrong(Config { max_frame: 10, ..config() }));
}

#[test]
fn frames_in_a_ring_at_a_reset_are_counted() {
    let behaviour = good();
    let (mut ports, mut flows) = started(&behaviour);
    ports.send(1, &[&[0; 60]], &Offload::default()).unwrap();
    ports.flush().unwrap();
    flows.flush(Instant::now());
    assert_eq!(ports.receive(1, &mut |_| {}).unwrap(), 0);
    assert_eq!(ports.counters(1).unwrap().tx_reset, 1);
}

proptest! {
    /// Whatever completions of receive descriptors say, there is no more than a budget of sane frames and a count.
    #[test]
    fn wild_receive_completions_do_no_harm(
        word in any::<u16>(),
        len in prop_oneof![Just(80u16), 0u16..200, any::<u16>()],
        wild in any::<bool>(),
        frame_len in any::<u16>(),
        mut message in prop::collection::vec(any::<u8>(), 128),
    ) {
        let behaviour = good();
        if !wild {
            let mut to = Writer::default();
            to.u16(regs::receive::FLAGS, word).u16(regs::receive::LEN, frame_len % 300);
            let sane = to.finish();
            message[..sane.len()].copy_from_slice(&sane);
        }
        behaviour.lock().unwrap().receive = Some((word, len, message));
        let (mut ports, _flows) = started(&behaviour);
        for _ in 0..20 {
            let got = ports.receive(5, &mut |received| assert!((14..=256).contains(&received.frame.len()))).unwrap();
            prop_assert!(got <= 5);
        }
        let counters = ports.counters(1).unwrap();
        let seen = counters.received + counters.rx_error + counters.rx_too_long;
        prop_assert_eq!(seen > 0, word & 0x8000 != 0);
    }
}
