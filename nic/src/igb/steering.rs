//! Steering: frames for an address, and in a VLAN, to a queue of their own (82576 datasheet, 7.10.3).
//!
//! The device has *pools*, each with a queue. An address leads to a set of pools and so does a VLAN; a frame comes to those
//! that are in both, and to the first one if there are none. Rules say more than that can express, so what the device
//! would do is worked out first, and a rule that it would not follow is refused.

use crate::io::{NicError, Steering};

use super::regs;

/// The most queues.
pub(super) const QUEUES: u8 = regs::POOLS;
/// The most addresses, the port's own included.
const MACS: usize = regs::ADDRESSES as usize;
/// The most VLANs: the device's 32, and one of them is for frames with a priority alone.
pub(super) const VLANS: usize = 31;

/// Why frames are not steered.
#[derive(Debug, thiserror::Error)]
pub enum SteerError {
    /// There is no such queue.
    #[error("the port has no queue {0}")]
    NoQueue(u8),
    /// A group address, or none at all.
    #[error("{} is not the address of one station", text(.0))]
    NoStation([u8; 6]),
    /// The VLAN is not in [`super::Config::vlans`].
    #[error("VLAN {0} is not one of the port's VLANs")]
    NoVlan(u16),
    /// All of the device's addresses are taken.
    #[error("the device has no room for more than {} addresses beside its own", MACS - 1)]
    NoSpace,
    /// The device would give these frames to another queue, or to two.
    #[error("with the rules that are there, frames of VLAN {vid} for {} would come to queues {got:?}, not {wanted}", text(.mac))]
    Conflict {
        /// Their address.
        mac: [u8; 6],
        /// Their VLAN id; 0 is "untagged".
        vid: u16,
        /// Where they should come to.
        wanted: u8,
        /// Where they would come to.
        got: Vec<u8>,
    },
    /// The device.
    #[error(transparent)]
    Device(#[from] NicError),
}

fn text(bytes: &[u8; 6]) -> String {
    bytes.map(|byte| format!("{byte:02x}")).join(":")
}

/// The device's tables.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub(super) struct Tables {
    /// Addresses and their pools, one bit each; the first is the port's own.
    pub macs: Vec<([u8; 6], u8)>,
    /// VLAN ids and their pools; empty if VLANs are not looked at.
    pub vlans: Vec<(u16, u8)>,
    /// The pools of untagged frames.
    pub untagged: u8,
}

/// Where a frame should come to.
fn wanted(rules: &[Steering], mac: [u8; 6], vid: u16) -> u8 {
    let of = |wanted: Option<u16>| rules.iter().find(|rule| rule.mac == mac && rule.vid == wanted);
    of(Some(vid)).or_else(|| of(None)).map_or(0, |rule| rule.queue)
}

/// The tables for rules, no two of which have the same address and VLAN, on a port with this address, these VLANs, and so
/// many queues.
pub(super) fn tables(
    rules: &[Steering],
    own: [u8; 6],
    vlans: &[u16],
    queues: u8,
) -> Result<Tables, SteerError> {
    // The first place is where the device itself puts its address, and where whoever has it next looks for it.
    let of_own = if rules.iter().any(|rule| rule.mac == own) { 0 } else { 1 };
    let mut tables = Tables { macs: vec![(own, of_own)], untagged: u8::MAX, ..Tables::default() };
    for rule in rules {
        if rule.queue >= queues {
            return Err(SteerError::NoQueue(rule.queue));
        }
        if rule.mac[0] & 1 != 0 || rule.mac == [0; 6] {
            return Err(SteerError::NoStation(rule.mac));
        }
        match rule.vid {
            Some(vid) if vlans.is_empty() || vid != 0 && !vlans.contains(&vid) => {
                return Err(SteerError::NoVlan(vid));
            }
            _ => {}
        }
        match tables.macs.iter_mut().find(|(mac, _)| *mac == rule.mac) {
            Some((_, pools)) => *pools |= 1 << rule.queue,
            None => tables.macs.push((rule.mac, 1 << rule.queue)),
        }
    }
    if tables.macs.len() > MACS {
        return Err(SteerError::NoSpace);
    }
    if vlans.is_empty() {
        return Ok(tables);
    }
    // The first pool has broadcasts and multicasts, of all VLANs.
    let pools = |vid| tables.macs.iter().fold(1, |pools, (mac, _)| pools | 1 << wanted(rules, *mac, vid));
    let by_vlan: Vec<_> =
        std::iter::once(0).chain(vlans.iter().copied()).map(|vid| (vid, pools(vid))).collect();
    for &(mac, of_mac) in &tables.macs {
        for &(vid, of_vlan) in &by_vlan {
            let wanted = wanted(rules, mac, vid);
            let got = match of_mac & of_vlan {
                0 => 1,
                pools => pools,
            };
            if got != 1u8 << wanted {
                let got = (0..QUEUES).filter(|queue| got >> queue & 1 != 0).collect();
                return Err(SteerError::Conflict { mac, vid, wanted, got });
            }
        }
    }
    tables.untagged = pools(0);
    tables.vlans = by_vlan;
    Ok(tables)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const VIDS: [u16; 3] = [10, 20, 30];
    const OWN: [u8; 6] = [2, 0, 0, 0, 0, 3];

    fn rule(mac: u8, vid: Option<u16>, queue: u8) -> Steering {
        Steering { mac: [2, 0, 0, 0, 0, mac], vid, queue }
    }

    #[test]
    fn what_does_not_fit_is_refused() {
        let of = |rules: &[Steering], vlans: &[u16]| tables(rules, OWN, vlans, 4);
        assert!(matches!(of(&[rule(1, None, 4)], &[]), Err(SteerError::NoQueue(4))));
        assert!(matches!(of(&[rule(1, Some(10), 1)], &[]), Err(SteerError::NoVlan(10))));
        assert!(matches!(of(&[rule(1, Some(11), 1)], &VIDS), Err(SteerError::NoVlan(11))));
        let group = Steering { mac: [1, 0, 0, 0, 0, 1], ..rule(1, None, 1) };
        let error = of(&[group], &[]).unwrap_err();
        assert_eq!(error.to_string(), "01:00:00:00:00:01 is not the address of one station");
        let many: Vec<_> = (0..25).map(|mac| rule(mac, None, 1)).collect();
        assert!(of(&many[..24], &[]).is_ok(), "one of them is the port's own");
        assert!(matches!(of(&many, &[]), Err(SteerError::NoSpace)));
        assert!(matches!(of(&many[4..], &[]), Ok(tables) if tables.macs[0] == (OWN, 1)));
        // One address in two VLANs goes to two queues, and so do two addresses in one VLAN.
        assert!(of(&[rule(1, Some(10), 1), rule(1, Some(20), 2), rule(1, None, 3)], &VIDS).is_ok());
        assert!(of(&[rule(1, Some(10), 1), rule(2, Some(10), 2), rule(3, None, 3)], &VIDS).is_ok());
        // But not all of that together.
        let crossed = [rule(1, Some(10), 1), rule(1, Some(20), 2), rule(2, Some(10), 2)];
        let error = of(&crossed, &VIDS).unwrap_err();
        assert!(
            matches!(&error, SteerError::Conflict { vid: 10, wanted: 1, got, .. } if *got == [1, 2]),
            "{error}"
        );
    }

    proptest! {
        /// What is not refused, the device does.
        #[test]
        fn tables_do_what_the_rules_say(
            rules in prop::collection::hash_map((0u8..4, prop::option::of(prop::sample::select(vec![0u16, 10, 20, 30]))), 0u8..4, 0..8),
        ) {
            let rules: Vec<_> = rules.into_iter().map(|((mac, vid), queue)| rule(mac, vid, queue)).collect();
            let Ok(tables) = tables(&rules, OWN, &VIDS, 4) else { return Ok(()) };
            for mac in 0..5 {
                for vid in [0, 10, 20, 30] {
                    let mac = rule(mac, None, 0).mac;
                    let of_mac = tables.macs.iter().find(|(known, _)| *known == mac).map_or(0, |(_, pools)| *pools);
                    let of_vlan = tables.vlans.iter().find(|(known, _)| *known == vid).unwrap().1;
                    let pools = if of_mac & of_vlan == 0 { 1 } else { of_mac & of_vlan };
                    prop_assert_eq!(pools, 1 << wanted(&rules, mac, vid));
                    prop_assert_eq!(of_vlan & 1, 1, "broadcasts");
                }
            }
            prop_assert_eq!(tables.untagged, tables.vlans[0].1);
        }
    }
}
