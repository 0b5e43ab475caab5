//! Groups: where ACL entries lead, shared by rules and counted.
//!
//! The switch does not check that a group is there when a flow names it, nor that none does when it is deleted, and
//! silently drops then; so a rule goes in only after all its groups are, and a group goes out after its last rule.

use std::collections::HashMap;

use super::regs::flow;
use super::rule::UNTAGGED;
use super::tlv::Writer;

/// What a group does. Its id follows from [`Groups`].
#[derive(Clone, PartialEq, Eq, Hash, Debug)]
pub(super) enum Group {
    /// Out by a port (0 is the CPU), the tag taken off if `vlan` is [`UNTAGGED`].
    Interface {
        /// VLAN id that is part of the group's id.
        vlan: u16,
        /// Port.
        port: u32,
    },
    /// Rewritten, then out as [`Group::Interface`].
    Rewrite {
        /// Of the interface group below.
        vlan: u16,
        /// Of the interface group below.
        port: u32,
        /// New TCI of a frame that came untagged.
        tci: Option<u16>,
        /// New source MAC, not 0.
        src: Option<u64>,
        /// New destination MAC, not 0.
        dst: Option<u64>,
    },
    /// Each of several, all beginning with the frame as it came in.
    Flood {
        /// VLAN id of the frames inside the switch.
        vlan: u16,
        /// Interface groups of that VLAN, and rewrites.
        members: Vec<Group>,
    },
}

impl Group {
    /// The groups that it names.
    pub fn below(&self) -> Vec<Group> {
        match self {
            Group::Interface { .. } => Vec::new(),
            Group::Rewrite { vlan, port, .. } => vec![Group::Interface { vlan: *vlan, port: *port }],
            Group::Flood { members, .. } => members.clone(),
        }
    }

    /// All groups that it takes, itself included, each once.
    pub fn count(&self) -> u32 {
        fn collect(groups: impl IntoIterator<Item = Group>, all: &mut Vec<Group>) {
            for group in groups {
                collect(group.below(), all);
                if !all.contains(&group) {
                    all.push(group);
                }
            }
        }
        let mut all = Vec::new();
        collect([self.clone()], &mut all);
        all.len() as u32
    }
}

/// How far a group is.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Progress {
    /// The device was not heard of yet.
    Pending,
    /// It is there.
    Ready,
    /// The device refused, with this error.
    Failed(u16),
}

#[derive(Debug)]
struct Entry {
    id: u32,
    references: u32,
    progress: Progress,
}

/// What the device is to be told.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(super) enum Change {
    /// Add a group: its arguments.
    Add(Group, Vec<u8>),
    /// Delete the group of this id.
    Delete(u32),
}

/// The groups of a switch.
#[derive(Debug, Default)]
pub(super) struct Groups {
    entries: HashMap<Group, Entry>,
    /// Indices that were in use and are free: of rewrites, and of lists (which share one space over all VLANs).
    free: [Vec<u32>; 2],
    /// The next fresh index of each.
    next: [u32; 2],
}

/// Bits of an index: of rewrites, and of lists.
const INDEX_BITS: [u32; 2] = [28, 16];

impl Groups {
    /// Number of groups.
    pub fn len(&self) -> u32 {
        self.entries.len() as u32
    }

    /// Forgets all: the device has.
    pub fn clear(&mut self) {
        *self = Groups::default();
    }

    /// Takes one more reference to a group and gives its id. What the device must be told first is appended to `changes`.
    /// `None`: there are too many groups.
    pub fn acquire(&mut self, group: &Group, changes: &mut Vec<Change>) -> Option<u32> {
        if let Some(entry) = self.entries.get_mut(group) {
            entry.references += 1;
            return Some(entry.id);
        }
        let mut below = Vec::new();
        for lower in group.below() {
            match self.acquire(&lower, changes) {
                Some(id) => below.push((lower, id)),
                None => {
                    below.iter().for_each(|(lower, _)| self.release(lower, changes));
                    return None;
                }
            }
        }
        let id = match group {
            Group::Interface { vlan, port } => Some(interface_id(*vlan, *port)),
            Group::Rewrite { .. } => self.index(0).map(|index| 1 << 28 | index),
            Group::Flood { vlan, .. } => self.index(1).map(|index| 4 << 28 | u32::from(*vlan) << 16 | index),
        };
        let Some(id) = id else {
            below.iter().for_each(|(lower, _)| self.release(lower, changes));
            return None;
        };
        let ids: Vec<u32> = below.into_iter().map(|(_, id)| id).collect();
        changes.push(Change::Add(group.clone(), arguments(group, id, &ids)));
        self.entries.insert(group.clone(), Entry { id, references: 1, progress: Progress::Pending });
        Some(id)
    }

    /// Gives a reference back. The last one's end is the group's.
    pub fn release(&mut self, group: &Group, changes: &mut Vec<Change>) {
        let Some(entry) = self.entries.get_mut(group) else { return };
        entry.references = entry.references.saturating_sub(1);
        if entry.references > 0 {
            return;
        }
        let (id, progress) = (entry.id, entry.progress);
        self.entries.remove(group);
        match group {
            Group::Interface { .. } => {}
            Group::Rewrite { .. } => self.free[0].push(id & 0x0fff_ffff),
            Group::Flood { .. } => self.free[1].push(id & 0xffff),
        }
        if !matches!(progress, Progress::Failed(_)) {
            changes.push(Change::Delete(id));
        }
        for lower in group.below() {
            self.release(&lower, changes);
        }
    }

    /// The id of a group that is there.
    pub fn id(&self, group: &Group) -> Option<u32> {
        self.entries.get(group).map(|entry| entry.id)
    }

    /// The device has answered an addition.
    pub fn added(&mut self, group: &Group, error: u16) {
        if let Some(entry) = self.entries.get_mut(group) {
            entry.progress = if error == 0 { Progress::Ready } else { Progress::Failed(error) };
        }
    }

    /// How far a group is, and all below it.
    pub fn progress(&self, group: &Group) -> Progress {
        let own = self.entries.get(group).map_or(Progress::Failed(0), |entry| entry.progress);
        group.below().iter().fold(own, |all, lower| match (all, self.progress(lower)) {
            (failed @ Progress::Failed(_), _) | (_, failed @ Progress::Failed(_)) => failed,
            (Progress::Pending, _) | (_, Progress::Pending) => Progress::Pending,
            _ => Progress::Ready,
        })
    }

    fn index(&mut self, kind: usize) -> Option<u32> {
        if let Some(index) = self.free[kind].pop() {
            return Some(index);
        }
        let index = self.next[kind];
        (index < 1 << INDEX_BITS[kind]).then(|| self.next[kind] += 1)?;
        Some(index)
    }
}

/// The id of an interface group.
pub(super) fn interface_id(vlan: u16, port: u32) -> u32 {
    u32::from(vlan) << 16 | port & 0xffff
}

/// The arguments that add a group; `below` are the ids of what it names.
pub(super) fn arguments(group: &Group, id: u32, below: &[u32]) -> Vec<u8> {
    let mut to = Writer::default();
    to.u32(flow::GROUP, id);
    match group {
        Group::Interface { vlan, port } => {
            to.u32(flow::OUT_PORT, *port).u8(flow::POP_VLAN, (*vlan == UNTAGGED).into());
        }
        Group::Rewrite { tci, src, dst, .. } => {
            to.u32(flow::GROUP_LOWER, below.first().copied().unwrap_or_default());
            if let Some(src) = src {
                to.mac(flow::SRC_MAC, *src);
            }
            if let Some(dst) = dst {
                to.mac(flow::DST_MAC, *dst);
            }
            if let Some(tci) = tci {
                to.be16(flow::VLAN, *tci);
            }
        }
        Group::Flood { .. } => {
            to.u16(flow::GROUP_COUNT, below.len() as u16).nest(flow::GROUP_IDS, |list| {
                for (kind, id) in (1..).zip(below) {
                    list.u32(kind, *id);
                }
            });
        }
    }
    to.finish()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn interface(port: u32) -> Group {
        Group::Interface { vlan: UNTAGGED, port }
    }

    fn rewrite(port: u32, src: u64) -> Group {
        Group::Rewrite { vlan: UNTAGGED, port, tci: None, src: Some(src), dst: None }
    }

    #[test]
    fn groups_are_shared_and_go_in_order() {
        let mut groups = Groups::default();
        let mut changes = Vec::new();
        let flood = Group::Flood { vlan: UNTAGGED, members: vec![interface(1), rewrite(2, 5)] };
        assert_eq!(flood.count(), 4);
        groups.acquire(&flood, &mut changes).unwrap();
        let added: Vec<_> =
            changes.drain(..).map(|c| if let Change::Add(group, _) = c { group } else { panic!() }).collect();
        assert_eq!(
            added,
            [interface(1), interface(2), rewrite(2, 5), flood.clone()],
            "what is below comes first"
        );
        assert_eq!(groups.progress(&flood), Progress::Pending);
        for group in &added {
            groups.added(group, 0);
        }
        assert_eq!(groups.progress(&flood), Progress::Ready);
        let id = groups.acquire(&interface(1), &mut changes).unwrap();
        assert!(changes.is_empty(), "it is there already");
        groups.release(&flood, &mut changes);
        assert_eq!(changes.len(), 3, "all but the shared one");
        assert!(!changes.contains(&Change::Delete(id)));
        groups.release(&interface(1), &mut changes);
        assert_eq!(changes.last(), Some(&Change::Delete(id)));
        assert_eq!(groups.len(), 0);
    }

    #[test]
    fn a_failure_below_is_a_failure() {
        let mut groups = Groups::default();
        let mut changes = Vec::new();
        groups.acquire(&rewrite(1, 9), &mut changes).unwrap();
        groups.added(&rewrite(1, 9), 0);
        groups.added(&interface(1), 12);
        assert_eq!(groups.progress(&rewrite(1, 9)), Progress::Failed(12));
        changes.clear();
        groups.release(&rewrite(1, 9), &mut changes);
        assert_eq!(changes.len(), 1, "what was never added is not deleted");
    }

    #[test]
    fn indices_come_back() {
        let mut groups = Groups::default();
        let mut changes = Vec::new();
        let first = groups.acquire(&rewrite(1, 1), &mut changes);
        let second = groups.acquire(&rewrite(1, 2), &mut changes);
        assert_ne!(first, second);
        groups.release(&rewrite(1, 1), &mut changes);
        assert_eq!(groups.acquire(&rewrite(1, 3), &mut changes), first);
    }
}
