//! Which packets are taken from devices that stay Open vSwitch's own: those of classes that have flows which are forwarded
//! here.
//!
//! A flow is of the class of its destination address, or, if it matches that in part only, of its ethertype; both with the
//! VLAN of the packet that it was made for, so that each packet of the class may be the flow's. What the host would carry out
//! anyway, or what the tables refuse, is better left to the kernel: an ethertype with such a flow is not taken, nor an address of
//! which some goes to ports that are not ours, such as the bridge's own. Groups and what is dropped are the kernel's too.
//!
//! Of the packets that go to the bridge's own port, those are taken that are decapsulated here: by their destination address and port, and
//! as long as what is inside of some is forwarded here.

use super::packed::Packed;
use super::ports::{PortKind, Ports, find_output};
use crate::xdp::Class;
use std::collections::{BTreeSet, HashMap};
use switch_core::action::PortRef;
use switch_core::flow::{FlowSpec, Ufid};
use switch_core::key::{Field, VLAN_PRESENT};
use switch_core::tunnel::{Endpoint, Kind};

/// Below this a type field is a length (IEEE 802.3 §3.2.6).
const ETHERTYPE_MIN: u16 = 0x0600;

/// What a flow counts for.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Share {
    /// A class of the device in a slot.
    Device { slot: u32, class: Class, fast: bool },
    /// A class of the device in a slot, which has packets of the tunnels of another.
    Tunnel { slot: u32, class: Class, tunnels: u32 },
    /// What is inside of packets of the tunnels of a slot, and is forwarded here.
    Inside(u32),
}

/// The flows of a class.
#[derive(Default)]
struct Count {
    fast: usize,
    punted: usize,
    /// Of packets of tunnels: whose.
    tunnels: Option<u32>,
}

/// The classes of all such devices.
#[derive(Default)]
pub struct Taking {
    shares: HashMap<Ufid, Box<[Share]>>,
    counts: HashMap<(u32, Class), Count>,
    /// By slot of tunnels: flows of what is inside.
    inside: HashMap<u32, usize>,
    /// Those that may be wanted from now on, or no longer, since the last [`Taking::changes`].
    changed: BTreeSet<(u32, Class)>,
}

impl Taking {
    /// A flow is in the tables, or is treated there in another way; or the tables refuse it, which is not `fast`. These are the `ends` of
    /// tunnels for which its packets are decapsulated.
    pub fn enter(&mut self, id: Ufid, flow: &Packed, fast: bool, ends: &[Endpoint], ports: &Ports) {
        let slot = flow.in_port();
        let shares = match ports.kind(slot) {
            Some(PortKind::Shared(_)) => of_device(slot, flow, &flow.unpack(id), fast, ends),
            Some(PortKind::Tunnels(_)) if fast => [Share::Inside(slot)].into(),
            _ => Box::default(),
        };
        if self.shares.get(&id).map_or(&[][..], |known| &**known) == &*shares {
            return;
        }
        self.leave(id);
        if !shares.is_empty() {
            shares.iter().for_each(|share| *self.count(share) += 1);
            self.reconsider(&shares);
            self.shares.insert(id, shares);
        }
    }

    /// A flow is in the tables no longer.
    pub fn leave(&mut self, id: Ufid) {
        let Some(shares) = self.shares.remove(&id) else { return };
        for share in shares.iter() {
            let count = self.count(share);
            *count = count.saturating_sub(1);
        }
        self.reconsider(&shares);
    }

    fn count(&mut self, share: &Share) -> &mut usize {
        match *share {
            Share::Inside(tunnels) => self.inside.entry(tunnels).or_default(),
            Share::Device { slot, class, fast } => {
                let count = self.counts.entry((slot, class)).or_default();
                if fast { &mut count.fast } else { &mut count.punted }
            }
            Share::Tunnel { slot, class, tunnels } => {
                let count = self.counts.entry((slot, class)).or_default();
                count.tunnels = Some(tunnels);
                &mut count.fast
            }
        }
    }

    /// The counts of these shares have changed.
    fn reconsider(&mut self, shares: &[Share]) {
        let Taking { counts, inside, changed, .. } = self;
        for share in shares {
            match share {
                Share::Device { slot, class, .. } | Share::Tunnel { slot, class, .. } => {
                    changed.insert((*slot, *class));
                }
                // One more or less of several makes no difference.
                Share::Inside(tunnels) if inside.get(tunnels).is_some_and(|&flows| flows > 1) => {}
                Share::Inside(tunnels) => {
                    let theirs = counts.iter().filter(|(_, count)| count.tunnels == Some(*tunnels));
                    changed.extend(theirs.map(|(at, _)| *at));
                }
            }
        }
    }

    /// The classes that may have changed since the last call, by slot, and whether they are to be taken.
    pub fn changes(&mut self) -> Vec<(u32, Class, bool)> {
        let Taking { counts, inside, changed, .. } = self;
        inside.retain(|_, flows| *flows > 0);
        let change = |(slot, class): (u32, Class)| {
            let Some(Count { fast, punted, tunnels }) = counts.get(&(slot, class)) else {
                return (slot, class, false);
            };
            let wanted = *fast > 0 && *punted == 0 && tunnels.is_none_or(|slot| inside.contains_key(&slot));
            if fast + punted == 0 {
                counts.remove(&(slot, class));
            }
            (slot, class, wanted)
        };
        std::mem::take(changed).into_iter().map(change).collect()
    }
}

/// What a flow from a device counts for. One that decapsulates leaves to the host what is for none of the ends.
fn of_device(slot: u32, flow: &Packed, spec: &FlowSpec, fast: bool, ends: &[Endpoint]) -> Box<[Share]> {
    let device = |class, fast| Share::Device { slot, class, fast };
    if fast && ends.is_empty() {
        let class = class(spec).filter(|_| leads_to(flow, Whose::Ours));
        return class.map(|class| device(class, true)).into_iter().collect();
    }
    let ethertype = ethertype(spec);
    let address = class(spec).filter(|_| leads_to(flow, Whose::Foreign));
    let address = address.filter(|class| Some(*class) != ethertype);
    let tunnels = ends.iter().filter_map(|end| {
        // What has no UDP port the device's program does not tell apart.
        let (Some(address), true) = (end.local, end.kind != Kind::Gre) else { return None };
        let class = Class::Tunnel { address, port: end.port, vlan: vlan(spec)? };
        Some(Share::Tunnel { slot, class, tunnels: end.in_port.slot })
    });
    ethertype.into_iter().chain(address).map(|class| device(class, false)).chain(tunnels).collect()
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
    use switch_core::tunnel::Vlan;

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
        let wire = MirrorPort { kind: PortKind::Shared(Arc::default()), ..port("eth1", 1) };
        let ports = Ports::default().with_ports(vec![wire, port("vm1", 2)]);
        let mut taking = Taking::default();
        let (arp, ip) = ((Field::EthType, 0x0806), (Field::EthType, 0x0800));
        let to = (Field::EthDst, MAC);
        let ethertype = |ethertype| Class::Ethertype { ethertype, vlan: None };
        taking.enter(Ufid(1), &Packed::new(spec(1, &[to, arp], &[])), true, &[], &ports);
        taking.enter(Ufid(2), &Packed::new(spec(1, &[to, ip], &[])), true, &[], &ports);
        taking.enter(Ufid(3), &Packed::new(spec(2, &[to, ip], &[])), true, &[], &ports); // a guest's own
        assert_eq!(taking.changes(), [(1, mac(None), true)]);
        taking.leave(Ufid(1));
        assert_eq!(taking.changes(), [(1, mac(None), true)]);
        // It is punted from now on: nothing is left of the class.
        taking.enter(Ufid(2), &Packed::new(spec(1, &[to, ip], &[])), false, &[], &ports);
        assert_eq!(taking.changes(), [(1, mac(None), false), (1, ethertype(0x0800), false)]);
        // An ethertype with a flow for the host stays the kernel's, whatever its address.
        taking.enter(Ufid(4), &Packed::new(spec(1, &[ip], &[])), true, &[], &ports);
        taking.enter(Ufid(5), &Packed::new(spec(1, &[arp], &[])), true, &[], &ports);
        assert_eq!(taking.changes(), [(1, ethertype(0x0800), false), (1, ethertype(0x0806), true)]);
        taking.leave(Ufid(2));
        assert_eq!(taking.changes(), [(1, ethertype(0x0800), true)]);
        [4, 5, 3, 2].into_iter().for_each(|id| taking.leave(Ufid(id)));
        assert_eq!(taking.changes(), [(1, ethertype(0x0800), false), (1, ethertype(0x0806), false)]);
        assert!(taking.counts.is_empty() && taking.shares.is_empty() && taking.changes().is_empty());
    }

    #[test]
    fn what_is_the_hosts_stays_the_kernels() {
        let wire = MirrorPort { kind: PortKind::Shared(Arc::default()), ..port("eth1", 1) };
        let ports = Ports::default().with_ports(vec![wire, port("vm1", 2)]);
        let mut taking = Taking::default();
        let (ip, arp, to) = ((Field::EthType, 0x0800), (Field::EthType, 0x0806), (Field::EthDst, MAC));
        let flow = |exact: &[(Field, u128)], actions: &[Action]| {
            Packed::new(FlowSpec { actions: actions.to_vec(), ..spec(1, exact, &[]) })
        };
        let guest = Action::Output(PortRef::Ours(PortId { slot: 2, generation: 1 }));
        let bridge = Action::Output(PortRef::Foreign("br0".into()));
        // A drop of some of what is for the bridge's own address, and a broadcast.
        taking.enter(Ufid(1), &flow(&[to, ip], &[]), true, &[], &ports);
        taking.enter(
            Ufid(2),
            &flow(&[(Field::EthDst, (1 << 48) - 1), arp], std::slice::from_ref(&guest)),
            true,
            &[],
            &ports,
        );
        assert_eq!(taking.changes(), []);
        // Of one address, some for a guest and some for the bridge, also inside of other actions.
        taking.enter(Ufid(3), &flow(&[to, ip], std::slice::from_ref(&guest)), true, &[], &ports);
        assert_eq!(taking.changes(), [(1, mac(None), true)]);
        taking.enter(Ufid(4), &flow(&[to, arp], &[Action::Clone(vec![bridge])]), false, &[], &ports);
        assert!(taking.changes().contains(&(1, mac(None), false)));
        taking.leave(Ufid(4));
        assert!(taking.changes().contains(&(1, mac(None), true)));
        // What is punted for another reason is a guest's all the same.
        taking.enter(Ufid(5), &flow(&[to, arp], &[guest]), false, &[], &ports);
        assert!(!taking.changes().contains(&(1, mac(None), false)));
    }

    #[test]
    fn packets_of_tunnels_are_taken_while_some_of_what_is_inside_is_forwarded_here() {
        let wire = MirrorPort { kind: PortKind::Shared(Arc::default()), ..port("eth1", 1) };
        let tunnels = MirrorPort { kind: PortKind::Tunnels(None), ..port("vxlan_sys_4789", 3) };
        let ports = Ports::default().with_ports(vec![wire, port("vm1", 2), tunnels]);
        let mut taking = Taking::default();
        let (ip, to) = ((Field::EthType, 0x0800), (Field::EthDst, MAC));
        let bridge = vec![Action::Output(PortRef::Foreign("br-ex".into()))];
        let outer = Packed::new(FlowSpec { actions: bridge, ..spec(1, &[to, ip], &[]) });
        let inner = Packed::new(spec(3, &[to], &[]));
        let address = "192.0.2.1".parse().unwrap();
        let end = |kind| Endpoint {
            mac: None,
            vlan: Vlan::Untagged,
            local: Some(address),
            kind,
            port: 4789,
            gbp: false,
            df: false,
            as_linux: true,
            in_port: PortId { slot: 3, generation: 1 },
        };
        let ends = [end(Kind::Vxlan), end(Kind::Gre)];
        let class = Class::Tunnel { address, port: 4789, vlan: None };
        let ethertype = Class::Ethertype { ethertype: 0x0800, vlan: None };
        let outer_changes = |taken| [(1, mac(None), false), (1, ethertype, false), (1, class, taken)];
        taking.enter(Ufid(1), &outer, true, &ends, &ports);
        assert_eq!(taking.changes(), outer_changes(false));
        taking.enter(Ufid(2), &inner, false, &[], &ports);
        assert_eq!(taking.changes(), [], "what is inside is the host's");
        taking.enter(Ufid(2), &inner, true, &[], &ports);
        assert_eq!(taking.changes(), [(1, class, true)]);
        taking.enter(Ufid(3), &inner, true, &[], &ports);
        taking.leave(Ufid(2));
        assert!(taking.changes().iter().all(|change| *change == (1, class, true)));
        taking.enter(Ufid(3), &inner, false, &[], &ports);
        assert_eq!(taking.changes(), [(1, class, false)]);
        taking.enter(Ufid(3), &inner, true, &[], &ports);
        assert_eq!(taking.changes(), [(1, class, true)]);
        taking.enter(Ufid(1), &outer, false, &[], &ports);
        assert_eq!(taking.changes(), outer_changes(false));
        taking.enter(Ufid(1), &outer, true, &ends, &ports);
        assert_eq!(taking.changes(), outer_changes(true));
        [1, 3].into_iter().for_each(|id| taking.leave(Ufid(id)));
        assert_eq!(taking.changes(), outer_changes(false));
        assert!(taking.counts.is_empty() && taking.shares.is_empty() && taking.inside.is_empty());
    }

    #[test]
    fn what_the_tables_refuse_stays_the_kernels() {
        let selection = Arc::new(Selection::default());
        let wire = MirrorPort { kind: PortKind::Shared(selection.clone()), ..port("eth1", 1) };
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
            let wire = MirrorPort { kind: PortKind::Shared(selection.clone()), restriction, ..port("a", 1) };
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
