//! Copies of forwarded frames, on their way from [`super::RockerPorts`], where they arrive, to [`super::RockerFlows`],
//! which has asked for them: what a rule could look at, by a bounded queue.

use std::sync::atomic::Ordering;
use std::sync::mpsc::{Receiver, SyncSender, TrySendError, sync_channel};

use switch_core::key::ETH_P_8021Q;

use super::Shared;
use super::rule::{Rule, UNTAGGED};

/// Copies that may wait to be looked at.
const COPIES: usize = 1024;

/// What a rule looks at, of one frame that was copied.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) struct Copied {
    /// Of the setup of the device that it comes from.
    pub epoch: u32,
    /// Ingress port.
    port: u32,
    dst: u64,
    src: u64,
    /// TCI, or [`UNTAGGED`].
    tci: u16,
    /// Ethertype after the outer tag.
    eth_type: u16,
}

impl Copied {
    /// Reads a frame; `None` if it is too short.
    fn of(frame: &[u8], port: u32, epoch: u32) -> Option<Copied> {
        let bytes = |at: usize| {
            frame.get(at..at + 6).map(|mac| mac.iter().fold(0, |all, &b| all << 8 | u64::from(b)))
        };
        let word = |at: usize| Some(u16::from_be_bytes([*frame.get(at)?, *frame.get(at + 1)?]));
        let (dst, src) = (bytes(0)?, bytes(6)?);
        let (tci, eth_type) = match word(12)? {
            ETH_P_8021Q => (word(14)?, word(16)?),
            eth_type => (UNTAGGED, eth_type),
        };
        Some(Copied { epoch, port, dst, src, tci, eth_type })
    }

    /// Whether it is this rule that has made the copy: a copy does not say so, but rules are disjoint.
    pub fn is_of(&self, rule: &Rule) -> bool {
        let same = |value: u64, (wanted, mask): (u64, u64)| value & mask == wanted & mask;
        (self.port, self.eth_type) == (rule.in_port, rule.eth_type)
            && self.tci & rule.tci_mask == rule.tci & rule.tci_mask
            && same(self.src, rule.src)
            && same(self.dst, rule.dst)
    }
}

/// The end of the queue where copies are put in.
#[derive(Debug)]
pub(super) struct Reporter {
    queue: SyncSender<Copied>,
    /// The last one, and the probes that had begun by then: a rule's packets are often alike.
    last: Option<(u32, Copied)>,
}

/// The queue of copies.
pub(super) fn queue() -> (Reporter, Receiver<Copied>) {
    let (sender, receiver) = sync_channel(COPIES);
    (Reporter { queue: sender, last: None }, receiver)
}

impl Reporter {
    /// Reports a frame that is a copy.
    pub fn report(&mut self, frame: &[u8], port: u32, epoch: u32, shared: &Shared) {
        let Some(copied) = Copied::of(frame, port, epoch) else { return };
        let this = Some((shared.probes.load(Ordering::Acquire), copied));
        if this == self.last {
            return;
        }
        self.last = this;
        if let Err(TrySendError::Full(_)) = self.queue.try_send(copied) {
            shared.lost.store(true, Ordering::Release);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn rule(tci: u16, tci_mask: u16) -> Rule {
        Rule {
            in_port: 1,
            eth_type: 0x0806,
            tci,
            tci_mask,
            src: (0, 0xff),
            dst: (0x0202_0202_0202, 0xffff_ffff_ffff),
            output: None,
            ignores_fragments: false,
        }
    }

    #[test]
    fn copies_are_those_of_one_rule() {
        let mut frame = [2; 60];
        (frame[11], frame[12], frame[13]) = (0, 0x08, 0x06);
        let copied = Copied::of(&frame, 1, 7).unwrap();
        let plain = rule(UNTAGGED, 0xfff);
        assert!(copied.is_of(&plain));
        assert!(!copied.is_of(&rule(10, 0xfff)), "another tag");
        assert!(!copied.is_of(&Rule { in_port: 2, ..plain.clone() }));
        assert!(!copied.is_of(&Rule { eth_type: 0x0800, ..plain.clone() }));
        assert!(!copied.is_of(&Rule { src: (1, 0xff), ..plain.clone() }));
        assert!(copied.is_of(&Rule { src: (0x0900, 0xff), ..plain }), "bits that the rule leaves open");
        frame[12..18].copy_from_slice(&[0x81, 0x00, 0x60, 0x0a, 0x08, 0x06]);
        let copied = Copied::of(&frame, 1, 7).unwrap();
        assert!(copied.is_of(&rule(10, 0xfff)) && copied.is_of(&rule(0x600a, 0xefff)));
        assert!(!copied.is_of(&rule(10, 0xefff)), "another priority");
        assert!(!copied.is_of(&rule(UNTAGGED, 0xfff)));
        assert_eq!(Copied::of(&frame[..17], 1, 7), None);
    }

    #[test]
    fn a_full_queue_is_told_of_and_repetitions_do_not_fill_it() {
        let shared = Shared::default();
        let (mut reporter, copies) = queue();
        for _ in 0..2 * COPIES {
            reporter.report(&[1; 60], 1, 1, &shared);
        }
        assert_eq!(copies.try_iter().count(), 1);
        shared.probes.fetch_add(1, Ordering::Release);
        reporter.report(&[1; 60], 1, 1, &shared);
        assert_eq!(copies.try_iter().count(), 1, "news to the next probe");
        assert!(!shared.lost.load(Ordering::Acquire));
        for at in 0..2 * COPIES {
            reporter.report(&[at as u8; 60], 1, at as u32, &shared);
        }
        assert!(shared.lost.load(Ordering::Acquire));
        assert_eq!(copies.try_iter().count(), COPIES);
    }
}
