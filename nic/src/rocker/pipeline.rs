//! The entries that are always there: they make the switch a bundle of ports of the CPU, until rules say more.
//!
//! * VLAN table, per port: untagged frames get VLAN id 4095 inside the switch; tagged ones pass as they are. One entry
//!   cannot say "any tag", as it would let untagged frames through without a VLAN id, which the emulated switch does not
//!   survive; and an id of 4095 from the wire must not pass, since it would look untagged. Twelve entries say it: an id is
//!   neither all zeros nor all ones exactly if some bit of it is 1 and the next one (in a circle) is 0.
//! * The tables between are empty, which leads to the ACL table.
//! * ACL table: two entries of low priority that lead to the CPU, for untagged frames and for the others.

use super::group::{Group, arguments, interface_id};
use super::regs::{command, flow};
use super::rule::UNTAGGED;
use super::tlv::Writer;

/// Priority of rules, above that of the entries here.
pub(super) const PRIORITY_RULE: u32 = 8;
/// The first cookie of rules; smaller ones are of the entries here.
pub(super) const FIRST_COOKIE: u64 = 1 << 32;
/// VLAN id of the group by which tagged frames go to the CPU.
const TAGGED: u16 = 1;

/// A command with its arguments.
pub(super) fn message(kind: u16, arguments: &[u8]) -> Vec<u8> {
    let mut to = Writer::default();
    to.u16(command::TYPE, kind).bytes(command::INFO, arguments);
    to.finish()
}

/// The group by which copies of frames of a VLAN go to the CPU, unless it is one of those that are always there.
pub(super) fn copy_group(vlan: u16) -> Option<Group> {
    (![UNTAGGED, TAGGED].contains(&vlan)).then_some(Group::Interface { vlan, port: 0 })
}

/// The parts that every ACL entry has.
pub(super) fn acl(to: &mut Writer, cookie: u64, priority: u32, tci: u16, tci_mask: u16) {
    entry(to, flow::TABLE_ACL, cookie, priority);
    to.be16(flow::VLAN, tci).be16(flow::VLAN_MASK, tci_mask);
}

fn entry(to: &mut Writer, table: u16, cookie: u64, priority: u32) {
    to.u16(flow::TABLE, table)
        .u32(flow::PRIORITY, priority)
        .u32(flow::HARD_TIME, 0)
        .u64(flow::COOKIE, cookie);
}

/// VLAN ids and masks that together match all ids but 0 and 4095.
pub(super) fn tagged() -> impl Iterator<Item = (u16, u16)> {
    (0..12).map(|bit| (1 << bit, 1 << bit | 1 << ((bit + 1) % 12)))
}

/// The commands that set the switch up, in order.
pub(super) fn commands(ports: u32) -> Vec<Vec<u8>> {
    let mut commands = Vec::new();
    for vlan in [UNTAGGED, TAGGED] {
        let id = interface_id(vlan, 0);
        commands.push(message(command::GROUP_ADD, &arguments(&Group::Interface { vlan, port: 0 }, id, &[])));
    }
    let mut cookie = 0;
    let mut add = |fill: &dyn Fn(&mut Writer, u64)| {
        cookie += 1;
        let mut to = Writer::default();
        fill(&mut to, cookie);
        commands.push(message(command::FLOW_ADD, &to.finish()));
    };
    for (priority, vlan, mask) in [(1, UNTAGGED, 0xfff), (0, TAGGED, 0)] {
        add(&|to, cookie| {
            acl(to, cookie, priority, vlan, mask);
            to.u32(flow::IN_PORT, 0).u32(flow::IN_PORT_MASK, 0).be16(flow::ETHERTYPE, 0);
            to.u32(flow::GROUP, interface_id(vlan, 0));
        });
    }
    for port in 1..=ports {
        let vlan = |to: &mut Writer, cookie, priority, id, mask| {
            entry(to, flow::TABLE_VLAN, cookie, priority);
            to.u32(flow::IN_PORT, port).be16(flow::VLAN, id).be16(flow::VLAN_MASK, mask);
            to.u16(flow::GOTO_TABLE, flow::TABLE_TERMINATION);
        };
        add(&|to, cookie| {
            vlan(to, cookie, 2, 0, 0xfff);
            to.be16(flow::NEW_VLAN, UNTAGGED);
        });
        for (id, mask) in tagged() {
            add(&|to, cookie| vlan(to, cookie, 1, id, mask));
        }
    }
    commands
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn all_vlan_ids_pass_but_those_two() {
        for id in 0..=4095u16 {
            let passes = tagged().any(|(value, mask)| id & mask == value);
            assert_eq!(passes, id != 0 && id != 4095, "{id}");
        }
        assert!(tagged().all(|(value, _)| value != 0), "an entry of id 0 is one for untagged frames");
    }

    #[test]
    fn commands_fit_and_cookies_are_apart_from_those_of_rules() {
        let commands = commands(62);
        assert_eq!(commands.len(), 4 + 62 * 13);
        assert!((commands.len() as u64) < FIRST_COOKIE);
        assert!(commands.iter().all(|command| command.len() < 256));
    }
}
