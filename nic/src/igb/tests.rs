//! Devices that fail, lie, or keep silent.

use std::collections::HashMap;

use proptest::prelude::*;

use super::*;
use crate::pci::fake::{Fake, Memory};

/// A device that answers as the driver needs at the start, and fills receive descriptors with `word`.
fn fake(word: Option<u64>, answers: bool) -> Box<Fake> {
    let mut tails: HashMap<u64, u64> = HashMap::new();
    let registers = HashMap::from([(regs::STATUS, u64::from(regs::STATUS_LU))]);
    let hook = move |registers: &mut HashMap<u64, u64>, memory: &Memory, offset: u64, value: u64| {
        if !answers {
            return;
        }
        match offset {
            regs::CTRL => drop(registers.insert(offset, value & !u64::from(regs::CTRL_RST))),
            regs::MDIC => drop(registers.insert(offset, u64::from(regs::MDIC_READY))),
            _ => {}
        }
        let Some(word) = word.filter(|_| offset == regs::RDBAL + regs::QUEUE_TAIL) else { return };
        let at = registers.get(&regs::RDBAL).copied().unwrap_or(0);
        let slots = registers.get(&(regs::RDBAL + regs::QUEUE_LEN)).copied().unwrap_or(0) / 16;
        let tail = tails.entry(offset).or_default();
        while slots > 0 && *tail != value {
            memory.0.store_u64((at + *tail * 16 + 8) as usize, word).unwrap();
            *tail = (*tail + 1) % slots;
        }
    };
    Box::new(Fake::new(0x10c9_8086, 0x2_0000, registers, Box::new(hook)))
}

fn config() -> Config {
    Config { ring: 8, max_frame: 1522 }
}

#[test]
fn a_silent_or_foreign_device_is_an_error() {
    assert!(matches!(Igb::open(fake(None, false), config()), Err(NicError::Device(_))));
    let other = Fake::new(0x1533_8086, 0x2_0000, HashMap::new(), Box::new(|_, _, _, _| {}));
    assert!(matches!(Igb::open(Box::new(other), config()), Err(NicError::Pci(PciError::Foreign { .. }))));
    let wrong = |config| matches!(Igb::open(fake(None, true), config), Err(NicError::Config(_)));
    assert!(wrong(Config { ring: 9, ..config() }) && wrong(Config { max_frame: 9729, ..config() }));
}

#[test]
fn completions_that_never_come_end_in_back_pressure() {
    let mut igb = Igb::open(fake(None, true), config()).unwrap();
    igb.poll_events(&mut Vec::new()).unwrap();
    for _ in 0..7 {
        igb.send(0, &[&[0; 60]], &Offload::default()).unwrap();
        igb.flush().unwrap();
    }
    assert_eq!(igb.send(0, &[&[0; 60]], &Offload::default()), Err(SendError::Full));
    assert_eq!(igb.counters(0).unwrap().sent, 0);
}

#[test]
fn contexts_are_for_what_the_device_can_do() {
    let mut head = [0; 32];
    head[12..14].copy_from_slice(&[0x08, 0x00]);
    let tcp = Offload { needs_csum: true, csum_start: 34, csum_offset: 16, ..Offload::default() };
    assert_eq!(context(&head, &tcp), Some((14 << 9 | 20, CONTEXT_MARK | 1 << 10 | 1 << 11)));
    assert_eq!(context(&head, &Offload { csum_offset: 10, ..tcp }), None, "neither TCP nor UDP");
    assert_eq!(context(&head, &Offload { csum_start: 33, ..tcp }), None, "no room for an IP header");
    assert_eq!(context(&head[..13], &tcp), None, "cut short");
    head[12..14].copy_from_slice(&[0x86, 0xdd]);
    let udp = Offload { csum_start: 54, csum_offset: 6, ..tcp };
    assert_eq!(context(&head, &udp), Some((14 << 9 | 40, CONTEXT_MARK)));
    let mut tags = [0x81, 0x00].repeat(16);
    tags[0] = 0;
    assert_eq!(context(&tags, &tcp), None, "tags without end");
}

proptest! {
    /// Whatever the device writes into receive descriptors, there is no more than a budget of sane frames.
    #[test]
    fn wild_receive_descriptors_do_no_harm(word in prop_oneof![any::<u64>(), (0u64..4, 0u64..2000).prop_map(|(bits, len)| len << 32 | bits)]) {
        let mut igb = Igb::open(fake(Some(word), true), config()).unwrap();
        for _ in 0..20 {
            let got = igb.receive(5, &mut |received| assert!((14..=1522).contains(&received.frame.len()))).unwrap();
            prop_assert!(got <= 5);
        }
        let counters = igb.counters(0).unwrap();
        let seen = counters.received + counters.rx_error + counters.rx_too_long;
        prop_assert_eq!(seen > 0, word & 1 == 1);
    }
}
