//! Which packets are taken from devices that stay Open vSwitch's own: those of classes that have flows which are forwarded
//! here.
//!
//! A flow is of the class of its destination address, or, if it matches that in part only, of its ethertype; both with the
//! VLAN of the packet that it was made for, so that each packet of the class may be the flow's. What the host would carry out
//! anyway, or what the tables refuse, is better left to the kernel: an ethertype with such a flow is not taken, nor an address of
//! which some goes to ports that are not ours, such as the bridge's own. Groups and what is dropped are the kernel's too.

use super::packed::Packed;
use super::ports::{Ports, find_output};
use crate::xdp::Class;
use std::collections::{BTreeSet, HashMap};
use switch_core::action::PortRef;
use switch_core::flow::{FlowSpec, Ufid};
use switch_core::key::{Field, VLAN_PRESENT};

/// Below this a type field is a length (IEEE 802.3 §3.2.6).
const ETHERTYPE_MIN: u16 = 0x0600;

/// What a flow counts for: a class of the port in a slot.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
struct Share {
    slot: u32,
    class: Class,
    fast: bool,
}

/// The flows of a class.
#[derive(Default)]
struct Count {
    fast: usize,
    punted: usize,
}

/// The classes of all such devices.
#[derive(Default)]
pub struct Taking {
    shares: HashMap<Ufid, [Option<Share>; 2]>,
    counts: HashMap<(u32, Class), Count>,
    /// Those whose counts have changed since the last [`Taking::changes`].
    changed: BTreeSet<(u32, Class)>,
}

impl Taking {
    /// A flow is in the tables, or is treated there in another way; or the tables refuse it, which is not `fast`.
    pub fn enter(&mut self, id: Ufid, flow: &Packed, fast: bool, ports: &Ports) {
        let slot = flow.in_port();
        let shares = match ports.selection(slot) {
            None => [None; 2],
            Some(_) if fast => [class(&flow.unpack(id)).filter(|_| leads_to(flow, Whose::Ours)), None],
            Some(_) => {
                let spec = flow.unpack(id);
                let address = class(&spec).filter(|_| leads_to(flow, Whose::Foreign));
                let ethertype = ethertype(&spec);
                [ethertype, address.filter(|class| Some(*class) != ethertype)]
            }
        };
        let shares = shares.map(|class| class.map(|class| Share { slot, class, fast }));
        if self.shares.get(&id).copied().unwrap_or_default() == shares {
            return;
        }
        self.leave(id);
        if shares != [None; 2] {
            shares.into_iter().flatten().for_each(|share| *self.count(share) += 1);
            self.shares.insert(id, shares);
        }
    }

    /// A flow is in the tables no longer.
    pub fn leave(&mut self, id: Ufid) {
        for share in self.shares.remove(&id).into_iter().flatten().flatten() {
            let count = self.count(share);
            *count = count.saturating_sub(1);
        }
    }

    fn count(&mut self, Share { slot, class, fast }: Share) -> &mut usize {
        self.changed.insert((slot, class));
        let count = self.counts.entry((slot, class)).or_default();
        if fast { &mut count.fast } else { &mut count.punted }
    }

    /// The classes that may have changed since the last call, by slot, and whether they are to be taken.
    pub fn changes(&mut self) -> Vec<(u32, Class, bool)> {
        let Taking { counts, changed, .. } = self;
        let change = |(slot, class): (u32, Class)| {
            let Count { fast, punted } = counts.get(&(slot, class)).unwrap_or(&Count { fast: 0, punted: 0 });
            let wanted = *fast > 0 && *punted == 0;
            if fast + punted == 0 {
                counts.remove(&(slot, class));
            }
            (slot, class, wanted)
        };
        std::mem::take(changed).into_iter().map(change).collect()
    }
}

/// Whether the flow is of packets as they come in, and of which VLAN was the one that it was made for.
fn vlan(spec: &FlowSpec) -> Option<Option<u16>> {
    let key = &spec.matches.key;
    let tci = key.get(Field::VlanTci) as u16;
    (key.get(Field::RecircId) == 0).then(|| (tci & VLAN_PRESENT != 0).then_some(tci & 0xfff))
}

/// The class of a flow.
fn class(spec: &FlowSpec) -> Option<Class> {
    if !spec.matches.mask.is_exact(Field::EthDst) {
        return ethertype(spec);
    }
    let [_, _, mac @ ..] = (spec.matches.key.get(Field::EthDst) as u64).to_be_bytes();
    let is_group = mac[0] & 1 != 0;
    if is_group { None } else { Some(Class::Mac { mac, vlan: vlan(spec)? }) }
}

#[derive(Clone, Copy, PartialEq)]
enum Whose {
    Ours,
    Foreign,
}

/// Whether the flow outputs to a port that is ours, or one that is not.
fn leads_to(flow: &Packed, whose: Whose) -> bool {
    let is_such = |port: &PortRef| matches!(port, PortRef::Ours(_)) == (whose == Whose::Ours);
    find_output(flow.actions(), &mut |port| is_such(port).then_some(())).is_some()
}

/// The class of a flow's ethertype, which for us is the one behind the first tag.
fn ethertype(spec: &FlowSpec) -> Option<Class> {
    let (key, mask) = (&spec.matches.key, &spec.matches.mask);
    let field = if key.get(Field::CvlanTci) == 0 { Field::EthType } else { Field::CvlanTpid };
    let ethertype = key.get(field) as u16;
    let vlan = vlan(spec)?;
    (mask.is_exact(field) && ethertype >= ETHERTYPE_MIN).then_some(Class::Ethertype { ethertype, vlan })
}

#[cfg(test)]
mod tests {
    use super::super::keepalive::KeepAlive;
    use super::super::state::State;
    use super::super::testing::{FakeTable, Rig, dp, port};
    use super::super::{MirrorPort, Restriction, Settings};
    use super::*;
    use crate::ovs::source::{Change, DatapathFlow};
    use crate::xdp::Selection;
    use std::sync::Arc;
    use switch_core::action::Action;
    use switch_core::packet::PortId;

    const MAC: u128 = 0x0200_0000_0001;

    fn spec(slot: u32, exact: &[(Field, u128)], masked: &[(Field, u128, u128)]) -> FlowSpec {
        let actions = vec![Action::Output(PortRef::Ours(PortId { slot: 2, generation: 1 }))];
        let mut spec = FlowSpec { matches: Default::default(), actions, ufid: None, held: None };
        let (key, mask) = (&mut spec.matches.key, &mut spec.matches.mask);
        for &(field, value) in [(Field::InPort, slot.into()), (Field::RecircId, 0)].iter().chain(exact) {
            key.set(field, value);
            mask.set_exact(field);
        }
        for &(field, value, bits) in masked {
            key.set(field, value);
            mask.set(field, bits);
        }
        spec
    }

    fn mac(vlan: Option<u16>) -> Class {
        Class::Mac { mac: [2, 0, 0, 0, 0, 1], vlan }
    }

    #[test]
    fn a_class_is_of_packets_that_are_the_flows_own() {
        let ipv4 = (Field::EthType, 0x0800);
        let to = (Field::EthDst, MAC);
        let untagged = (Field::VlanTci, 0);
        let ip = |vlan| Some(Class::Ethertype { ethertype: 0x0800, vlan });
        let tagged = (Field::VlanTci, 0x700a);
        assert_eq!(class(&spec(1, &[to, ipv4, untagged], &[])), Some(mac(None)));
        assert_eq!(class(&spec(1, &[to, ipv4, tagged], &[])), Some(mac(Some(10))));
        assert_eq!(class(&spec(1, &[ipv4, untagged], &[])), ip(None));
        // An address in part, such as the bit of groups, and a tag that the rules do not read (its own bits are the mask).
        let group = (Field::EthDst, 0, 1 << 40);
        assert_eq!(class(&spec(1, &[ipv4], &[group, (Field::VlanTci, 0x100a, 0x100a)])), ip(Some(10)));
        let inner = [(Field::CvlanTpid, 0x8100), (Field::CvlanTci, 0x1005), tagged, ipv4];
        let service = Class::Ethertype { ethertype: 0x8100, vlan: Some(10) };
        assert_eq!(class(&spec(1, &inner, &[])), Some(service));
        // No class: a length, any ethertype, a later stage.
        assert_eq!(class(&spec(1, &[(Field::EthType, 4)], &[])), None);
        assert_eq!(class(&spec(1, &[], &[(Field::EthType, 0x800, 0xff00)])), None);
        assert_eq!(class(&spec(1, &[to, (Field::RecircId, 3)], &[])), None);
    }

    #[test]
    fn a_class_is_taken_as_long_as_it_has_fast_flows() {
        let wire = MirrorPort { classes: Some(Arc::new(Selection::default())), ..port("eth1", 1) };
        let ports = Ports::default().with_ports(vec![wire, port("vm1", 2)]);
        let mut taking = Taking::default();
        let (arp, ip) = ((Field::EthType, 0x0806), (Field::EthType, 0x0800));
        let to = (Field::EthDst, MAC);
        let ethertype = |ethertype| Class::Ethertype { ethertype, vlan: None };
        taking.enter(Ufid(1), &Packed::new(spec(1, &[to, arp], &[])), true, &ports);
        taking.enter(Ufid(2), &Packed::new(spec(1, &[to, ip], &[])), true, &ports);
        taking.enter(Ufid(3), &Packed::new(spec(2, &[to, ip], &[])), true, &ports); // a guest's own
        assert_eq!(taking.changes(), [(1, mac(None), true)]);
        taking.leave(Ufid(1));
        assert_eq!(taking.changes(), [(1, mac(None), true)]);
        // It is punted from now on: nothing is left of the class.
        taking.enter(Ufid(2), &Packed::new(spec(1, &[to, ip], &[])), false, &ports);
        assert_eq!(taking.changes(), [(1, mac(None), false), (1, ethertype(0x0800), false)]);
        // An ethertype with a flow for the host stays the kernel's, whatever its address.
        taking.enter(Ufid(4), &Packed::new(spec(1, &[ip], &[])), true, &ports);
        taking.enter(Ufid(5), &Packed::new(spec(1, &[arp], &[])), true, &ports);
        assert_eq!(taking.changes(), [(1, ethertype(0x0800), false), (1, ethertype(0x0806), true)]);
        taking.leave(Ufid(2));
        assert_eq!(taking.changes(), [(1, ethertype(0x0800), true)]);
        [4, 5, 3, 2].into_iter().for_each(|id| taking.leave(Ufid(id)));
        assert_eq!(taking.changes(), [(1, ethertype(0x0800), false), (1, ethertype(0x0806), false)]);
        assert!(taking.counts.is_empty() && taking.shares.is_empty() && taking.changes().is_empty());
    }

    #[test]
    fn what_is_the_hosts_stays_the_kernels() {
        let wire = MirrorPort { classes: Some(Arc::new(Selection::default())), ..port("eth1", 1) };
        let ports = Ports::default().with_ports(vec![wire, port("vm1", 2)]);
        let mut taking = Taking::default();
        let (ip, arp, to) = ((Field::EthType, 0x0800), (Field::EthType, 0x0806), (Field::EthDst, MAC));
        let flow = |exact: &[(Field, u128)], actions: &[Action]| {
            Packed::new(FlowSpec { actions: actions.to_vec(), ..spec(1, exact, &[]) })
        };
        let guest = Action::Output(PortRef::Ours(PortId { slot: 2, generation: 1 }));
        let bridge = Action::Output(PortRef::Foreign("br0".into()));
        // A drop of some of what is for the bridge's own address, and a broadcast.
        taking.enter(Ufid(1), &flow(&[to, ip], &[]), true, &ports);
        taking.enter(
            Ufid(2),
            &flow(&[(Field::EthDst, (1 << 48) - 1), arp], std::slice::from_ref(&guest)),
            true,
            &ports,
        );
        assert_eq!(taking.changes(), []);
        // Of one address, some for a guest and some for the bridge, also inside of other actions.
        taking.enter(Ufid(3), &flow(&[to, ip], std::slice::from_ref(&guest)), true, &ports);
        assert_eq!(taking.changes(), [(1, mac(None), true)]);
        taking.enter(Ufid(4), &flow(&[to, arp], &[Action::Clone(vec![bridge])]), false, &ports);
        assert!(taking.changes().contains(&(1, mac(None), false)));
        taking.leave(Ufid(4));
        assert!(taking.changes().contains(&(1, mac(None), true)));
        // What is punted for another reason is a guest's all the same.
        taking.enter(Ufid(5), &flow(&[to, arp], &[guest]), false, &ports);
        assert!(!taking.changes().contains(&(1, mac(None), false)));
    }

    #[test]
    fn what_the_tables_refuse_stays_the_kernels() {
        let selection = Arc::new(Selection::default());
        let wire = MirrorPort { classes: Some(selection.clone()), ..port("eth1", 1) };
        let mut state = State::new();
        state.set_ports(Ports::default().with_ports(vec![wire, port("vm1", 2)]));
        let mut table = FakeTable::default();
        table.max = Some(1);
        let mut alive = KeepAlive::new(Settings::default());
        let mut run = |state: &mut State, change| {
            assert!(state.absorb(change));
            while state.apply(0, &mut table, &mut alive, 8) {}
            state.select(|| {});
            selection.taken()
        };
        let put = |id, flow| Change::Put(Box::new(DatapathFlow { id: Ufid(id), flow: Ok(flow) }));
        let ip =
            |dst| spec(1, &[(Field::EthType, 0x0800), (Field::VlanTci, 0)], &[(Field::Ipv4Dst, dst, 0xff00)]);
        let taken = [Class::Ethertype { ethertype: 0x0800, vlan: None }];
        assert_eq!(run(&mut state, put(1, ip(0x0100))), taken);
        // The tables are full.
        assert_eq!(run(&mut state, put(2, ip(0x0200))), []);
        assert_eq!(run(&mut state, Change::Delete(Ufid(2))), taken);
        // It overlaps.
        let to = spec(1, &[(Field::EthType, 0x0800), (Field::VlanTci, 0), (Field::EthDst, MAC)], &[]);
        assert_eq!(run(&mut state, put(3, to.clone())), []);
        // The other goes: this one is an address's alone.
        assert_eq!(run(&mut state, Change::Delete(Ufid(1))), [mac(None)]);
        // One that waits for this one, and has its place when that goes; one that is refused, until it is another's.
        assert_eq!(run(&mut state, put(1, ip(0x0100))), [mac(None)]);
        assert_eq!(run(&mut state, Change::Delete(Ufid(3))), taken);
        assert_eq!(run(&mut state, put(2, ip(0x0200))), []);
        let arp = [(Field::EthType, 0x0806), (Field::VlanTci, 0), (Field::EthDst, MAC)];
        assert_eq!(run(&mut state, put(2, spec(1, &arp, &[]))), taken);
        assert_eq!(run(&mut state, Change::Delete(Ufid(1))), []);
    }

    #[test]
    fn classes_come_and_go_with_the_datapaths_flows() {
        let mut rig = Rig::new();
        let selection = Arc::new(Selection::default());
        let mac = |last| Class::Mac { mac: [0, 0, 0, 0, 0, last], vlan: None };
        let ports = |ingress: Option<&str>| {
            let restriction = Restriction { ingress: ingress.map(str::to_owned), egress: None };
            let wire = MirrorPort { classes: Some(selection.clone()), restriction, ..port("a", 1) };
            vec![wire, port("b", 2)]
        };
        rig.follower.set_ports(ports(None));
        rig.datapath().put(1, dp("a", 1, "b"));
        rig.datapath().put(2, dp("a", 2, "host")); // would only come back
        rig.datapath().put(3, dp("b", 3, "a"));
        rig.run(1);
        assert_eq!(selection.taken(), [mac(1)]);
        rig.datapath().put(2, dp("a", 2, "b"));
        rig.run(1);
        assert_eq!(selection.taken(), [mac(1), mac(2)]);
        rig.datapath().put(1, dp("a", 1, "host"));
        rig.run(1);
        assert_eq!(selection.taken(), [mac(2)]);
        // Flushed in silence.
        rig.datapath().flows.remove(&Ufid(2));
        rig.run(3000);
        assert_eq!(selection.taken(), []);
        rig.datapath().put(1, dp("a", 1, "b"));
        rig.run(1);
        assert_eq!(selection.taken(), [mac(1)]);
        rig.follower.set_ports(ports(Some("ingress policing")));
        assert_eq!(selection.taken(), []);
        rig.follower.set_ports(ports(None));
        assert_eq!(selection.taken(), [mac(1)]);
        rig.follower.set_slow(Some("hw-offload".into()));
        assert_eq!(selection.taken(), []);
        rig.follower.set_slow(None);
        assert_eq!(selection.taken(), [mac(1)]);
        // The device's flows overtake each other: one has the place of the other until that goes.
        rig.datapath().put(4, dp("a", 1, "b"));
        rig.datapath().delete(1);
        rig.run(1);
        assert_eq!(selection.taken(), [mac(1)]);
        rig.datapath().delete(4);
        rig.run(1);
        assert_eq!(selection.taken(), []);
    }
}
