//! Ports of Open vSwitch's bridges that are devices of the host's, such as a bridge's own: what the kernel lays a tunnel's header around
//! enters the datapath there a second time, if the route leads by one.
//!
//! The flow that such a packet meets is found here, when a way is looked for, and not packet by packet: the header is known but for
//! little, and if the flow does not look at that little it is the flow of all of them. Then the chain is resolved, down to the wire,
//! before a packet leaves. In doubt there is no way, and the packets are the host's.

use crate::ovs::mirror::Restriction;
use std::collections::HashMap;
use std::fmt;
use std::net::IpAddr;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use switch_core::action::{Action, PortRef, TunnelOpts};
use switch_core::flow::{FlowSpec, Match, Ufid};
use switch_core::key::{ETH_P_IP, ETH_P_IPV6, Field, Key, Mask, TUN_DF, VLAN_PRESENT, WORDS, ipproto};
use switch_core::packet::PortId;
use switch_core::tunnel::{Encapsulation, Origin, OuterSpec};
use vmm_sys_util::eventfd::EventFd;

/// A port of a bridge that is a device of the host's.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct HostPort {
    /// The slot that its flows name as their ingress.
    pub id: PortId,
    /// Its flows.
    pub flows: Arc<HostFlows>,
    /// What its packets must not pass by: `ingress` of the host, which gets what the bridge outputs, and `egress`.
    pub restriction: Restriction,
}

/// Flows of the datapath whose ingress is such a port, as the mirror tells of them.
pub struct HostFlows {
    flows: Mutex<HashMap<Ufid, FlowSpec>>,
    bell: EventFd,
}

impl HostFlows {
    /// None yet; `bell` is rung when there are others.
    pub(super) fn new(bell: EventFd) -> HostFlows {
        HostFlows { flows: Mutex::default(), bell }
    }

    fn with<T>(&self, work: impl FnOnce(&mut HashMap<Ufid, FlowSpec>) -> T) -> T {
        work(&mut self.flows.lock().unwrap_or_else(PoisonError::into_inner))
    }

    fn ring(&self) {
        // It fails only when it has been rung often enough.
        let _ = self.bell.write(1);
    }

    /// The datapath has this flow now.
    pub fn put(&self, id: Ufid, spec: FlowSpec) {
        let is_new = self.with(|flows| {
            let is_new = flows.get(&id) != Some(&spec);
            if is_new {
                flows.insert(id, spec);
            }
            is_new
        });
        if is_new {
            self.ring();
        }
    }

    /// The datapath has the flow no longer.
    pub fn delete(&self, id: Ufid) {
        if self.with(|flows| flows.remove(&id)).is_some() {
            self.ring();
        }
    }
}

impl fmt::Debug for HostFlows {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} flows", self.with(|flows| flows.len()))
    }
}

/// Two are the same if they are of the same port.
impl PartialEq for HostFlows {
    fn eq(&self, other: &HostFlows) -> bool {
        std::ptr::eq(self, other)
    }
}

impl Eq for HostFlows {}

/// Whether the kernel tells packets of tunnels apart by their outer header's "don't fragment": newer ones do, and which those are is only
/// known when a flow says so.
pub struct DontFragment {
    is_seen: AtomicBool,
    bell: EventFd,
}

impl DontFragment {
    /// Not seen yet; `bell` is rung when it is.
    pub(super) fn new(bell: EventFd) -> DontFragment {
        DontFragment { is_seen: AtomicBool::new(false), bell }
    }

    /// A flow of what is inside of tunnels matches this.
    pub fn learn(&self, matches: &Match) {
        let is_told = matches.key.get(Field::TunFlags) as u16 & TUN_DF != 0;
        if is_told && !self.is_seen.swap(true, Ordering::Relaxed) {
            // It fails only when it has been rung often enough.
            let _ = self.bell.write(1);
        }
    }

    /// Whether a flow has said so.
    pub(super) fn is_seen(&self) -> bool {
        self.is_seen.load(Ordering::Relaxed)
    }
}

impl fmt::Debug for DontFragment {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.is_seen())
    }
}

/// There is one for all tunnels.
impl PartialEq for DontFragment {
    fn eq(&self, other: &DontFragment) -> bool {
        std::ptr::eq(self, other)
    }
}

impl Eq for DontFragment {}

impl HostPort {
    /// The port by which packets with this header leave that the host sends by the device `name`; the header gets what the flow adds.
    ///
    /// # Errors
    /// Why that is not known, or is more than to forward them.
    pub(super) fn onward(&self, name: &str, header: &mut OuterSpec) -> Result<PortId, String> {
        if let Some(why) = &self.restriction.egress {
            return Err(format!("{name}: {why}"));
        }
        let (key, known) = key(header, self.id);
        let mut is_split = false;
        let actions = self.flows.with(|flows| {
            let found = flows.values().find(|flow| {
                let fit = fit(flow, &key, &known);
                is_split |= fit == Fit::Some;
                fit == Fit::All
            });
            found.map(|flow| match &flow.held {
                Some(why) => Err(format!("{name}: {why}")),
                None => Ok(flow.actions.clone()),
            })
        });
        match actions.transpose()?.as_deref() {
            Some([Action::Output(PortRef::Ours(to))]) => Ok(*to),
            Some([Action::PushVlan { tpid, tci }, Action::Output(PortRef::Ours(to))])
                if header.link.vlan.is_none() =>
            {
                header.link.vlan = Some((*tpid, tci & !VLAN_PRESENT));
                Ok(*to)
            }
            Some(_) => Err(format!("the flow of {name} does more than to forward")),
            None if is_split => Err(format!("flows of {name} look at what differs between packets")),
            None => Err(format!("no flow of {name} to {} yet", header.dst)),
        }
    }
}

/// Of how many packets of a header a flow is.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Fit {
    None,
    Some,
    All,
}

fn fit(flow: &FlowSpec, key: &Key, known: &Mask) -> Fit {
    let (mut fit, wanted) = (Fit::All, &flow.matches);
    for at in 0..WORDS {
        let mask = wanted.mask.0.words[at];
        if (wanted.key.words[at] ^ key.words[at]) & mask & known.0.words[at] != 0 {
            return Fit::None;
        }
        if mask & !known.0.words[at] != 0 {
            fit = Fit::Some;
        }
    }
    if wanted.tunnel != TunnelOpts::default() { Fit::Some } else { fit }
}

/// What the datapath's key of packets with this header is, and which of its bits are the same for all.
fn key(header: &OuterSpec, in_port: PortId) -> (Key, Mask) {
    let mut key = Key::default();
    let mac = |[a, b, c, d, e, f]: [u8; 6]| u64::from_be_bytes([0, 0, a, b, c, d, e, f]).into();
    key.set(Field::InPort, in_port.slot.into());
    key.set(Field::EthDst, mac(header.link.dst));
    key.set(Field::EthSrc, mac(header.link.src));
    if let Some((tpid, tci)) = header.link.vlan {
        key.set(Field::VlanTpid, tpid.into());
        key.set(Field::VlanTci, (tci | VLAN_PRESENT).into());
    }
    match (header.src, header.dst) {
        (IpAddr::V4(src), IpAddr::V4(dst)) => {
            key.set(Field::EthType, ETH_P_IP.into());
            key.set(Field::Ipv4Src, src.to_bits().into());
            key.set(Field::Ipv4Dst, dst.to_bits().into());
        }
        (IpAddr::V6(src), IpAddr::V6(dst)) => {
            key.set(Field::EthType, ETH_P_IPV6.into());
            key.set(Field::Ipv6Src, src.to_bits());
            key.set(Field::Ipv6Dst, dst.to_bits());
        }
        _ => {} // there is no such header
    }
    let ports = match &header.encapsulation {
        Encapsulation::Vxlan { ports, .. } | Encapsulation::Geneve { ports, .. } => Some(ports),
        Encapsulation::Gre { .. } => None,
    };
    key.set(Field::IpProto, if ports.is_some() { ipproto::UDP } else { ipproto::GRE }.into());
    key.set(Field::TpDst, ports.map_or(0, |ports| ports.dst.into()));

    // The source port goes by the packet inside, and so do marks of congestion. What the kernel has beside a packet's bytes, this
    // does not know.
    let mut unknown = Mask::EMPTY;
    let beside = [Field::Ipv6Label, Field::SkbPriority, Field::DpHash, Field::PacketType, Field::Ipv6Exthdrs];
    let tracked = |field: &&Field| field.name().starts_with("ct_") || field.name().starts_with("nsh.");
    let beside = beside.iter().chain(Field::ALL.iter().filter(tracked));
    [Field::TpSrc, Field::Shape].iter().chain(beside).for_each(|&field| unknown.set_exact(field));
    let mut fixed = |field, origin: Origin, differs: u8| match origin {
        Origin::Exact(value) => key.set(field, value.into()),
        Origin::Set(value) => {
            key.set(field, value.into());
            unknown.set(field, differs.into());
        }
        Origin::Inner => unknown.set_exact(field),
    };
    fixed(Field::IpTos, header.tos, 0b11);
    fixed(Field::IpTtl, header.ttl, 0);
    let mut known = Mask::EMPTY;
    known.0.words.iter_mut().zip(unknown.0.words).for_each(|(word, unknown)| *word = !unknown);
    (key, known)
}

#[cfg(test)]
mod tests {
    use super::*;
    use switch_core::tunnel::{Link, UdpPorts};
    use vmm_sys_util::eventfd::EFD_NONBLOCK;

    const WIRE: PortId = PortId { slot: 4, generation: 1 };
    const OUTPUT: Action = Action::Output(PortRef::Ours(WIRE));

    fn header() -> OuterSpec {
        OuterSpec {
            link: Link { dst: [2, 0, 0, 0, 0, 2], src: [2, 0, 0, 0, 0, 1], vlan: None },
            src: "192.0.2.1".parse().unwrap(),
            dst: "192.0.2.2".parse().unwrap(),
            tos: Origin::Set(0x60),
            ttl: Origin::Set(64),
            df: true,
            checksum: false,
            encapsulation: Encapsulation::Vxlan {
                vni: 42,
                gbp: None,
                ports: UdpPorts { src: 32768..=60999, dst: 4789 },
            },
        }
    }

    fn flow(fields: &[(Field, u128, u128)], actions: &[Action]) -> FlowSpec {
        let mut matches = Match::default();
        let exact = [(Field::InPort, 9, u32::MAX.into()), (Field::RecircId, 0, u32::MAX.into())];
        for &(field, value, mask) in exact.iter().chain(fields) {
            matches.key.set(field, value);
            matches.mask.set(field, mask);
        }
        FlowSpec { matches, actions: actions.to_vec(), ufid: None, held: None }
    }

    fn port() -> HostPort {
        let flows = Arc::new(HostFlows::new(EventFd::new(EFD_NONBLOCK).unwrap()));
        HostPort { id: PortId { slot: 9, generation: 1 }, flows, restriction: Restriction::default() }
    }

    #[test]
    fn the_flow_of_all_packets_of_a_header_says_where_they_leave() {
        let port = port();
        let onward = |header: &mut OuterSpec| port.onward("br-ex", header);
        assert_eq!(onward(&mut header()), Err("no flow of br-ex to 192.0.2.2 yet".into()));
        // What a bridge that learns makes, and an unrelated one.
        let normal = [
            (Field::EthSrc, 0x0200_0000_0001, (1 << 48) - 1),
            (Field::EthDst, 0x0200_0000_0002, (1 << 48) - 1),
            (Field::EthType, 0x800, 0xffff),
            (Field::VlanTci, 0, 0xffff),
            (Field::IpFrag, 0, 0xff),
        ];
        let mut arp = normal;
        arp[2].1 = 0x806;
        port.flows.put(Ufid(1), flow(&arp, &[]));
        assert!(onward(&mut header()).is_err());
        port.flows.put(Ufid(2), flow(&normal, &[OUTPUT]));
        assert_eq!(onward(&mut header()), Ok(WIRE));
        // A tag that it puts on is one of the header; there may be one below.
        let push = Action::PushVlan { tpid: 0x8100, tci: 0x100a };
        port.flows.put(Ufid(2), flow(&normal, &[push, OUTPUT]));
        let mut tagged = header();
        assert_eq!((onward(&mut tagged), tagged.link.vlan), (Ok(WIRE), Some((0x8100, 10))));
        assert_eq!(
            onward(&mut tagged),
            Err("no flow of br-ex to 192.0.2.2 yet".into()),
            "of untagged packets"
        );
        // More, or nothing, is not to forward.
        for actions in [&[][..], &[OUTPUT, OUTPUT], &[Action::Output(PortRef::Foreign("br-ex".into()))]] {
            port.flows.put(Ufid(2), flow(&normal, actions));
            assert_eq!(onward(&mut header()), Err("the flow of br-ex does more than to forward".into()));
        }
        port.flows.put(Ufid(2), FlowSpec { held: Some("QoS".into()), ..flow(&normal, &[OUTPUT]) });
        assert_eq!(onward(&mut header()), Err("br-ex: QoS".into()));
        port.flows.delete(Ufid(2));
        assert_eq!(onward(&mut header()), Err("no flow of br-ex to 192.0.2.2 yet".into()));
        port.flows.put(Ufid(2), flow(&normal, &[OUTPUT]));
        let restriction = Restriction { egress: Some("tc qdisc htb".into()), ingress: None };
        let restricted = HostPort { restriction, ..port.clone() };
        assert_eq!(restricted.onward("br-ex", &mut header()), Err("br-ex: tc qdisc htb".into()));
    }

    #[test]
    fn a_flow_of_some_of_the_packets_is_no_way() {
        let udp = [(Field::EthType, 0x800, 0xffff), (Field::IpProto, 17, 0xff)];
        let cases = [
            (Field::TpDst, 4789, 0xffff, Ok(WIRE)),
            (Field::TpDst, 6081, 0xffff, Err(false)),
            (Field::TpSrc, 0x8000, 0x8000, Err(true)),
            (Field::IpTos, 0x60, 0xfc, Ok(WIRE)),
            (Field::IpTos, 0x60, 0xff, Err(true)),
            (Field::IpTos, 0x20, 0xff, Err(false)),
            (Field::IpTtl, 64, 0xff, Ok(WIRE)),
            (Field::Ipv4Dst, 0xc000_0200, 0xffff_ff00, Ok(WIRE)),
            (Field::Ipv4Src, 0xc000_0209, 0xffff_ffff, Err(false)),
            (Field::CtState, 0, 0x20, Err(true)),
            (Field::SkbMark, 0, 1, Ok(WIRE)),
            (Field::SkbMark, 1, 1, Err(false)),
            (Field::SkbPriority, 0, 1, Err(true)),
            (Field::RecircId, 1, u32::MAX.into(), Err(false)),
        ];
        for (field, value, mask, expected) in cases {
            let port = port();
            port.flows.put(Ufid(1), flow(&[&udp[..], &[(field, value, mask)]].concat(), &[OUTPUT]));
            let expected = expected.map_err(|is_split: bool| match is_split {
                true => "flows of br-ex look at what differs between packets".to_owned(),
                false => "no flow of br-ex to 192.0.2.2 yet".to_owned(),
            });
            assert_eq!(
                port.onward("br-ex", &mut header()),
                expected,
                "{} {value:#x}/{mask:#x}",
                field.name()
            );
        }
    }

    #[test]
    fn who_follows_the_network_is_told_of_other_flows() {
        let port = port();
        let rung = || port.flows.bell.read().is_ok();
        port.flows.put(Ufid(1), flow(&[], &[OUTPUT]));
        assert!(rung());
        port.flows.put(Ufid(1), flow(&[], &[OUTPUT]));
        port.flows.delete(Ufid(2));
        assert!(!rung());
        port.flows.delete(Ufid(1));
        assert!(rung());
    }
}
