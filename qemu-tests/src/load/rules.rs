//! The rules that carry the load: the same ones in the words of `pointwork add-flow` and of `ovs-ofctl add-flow`.

use std::fmt::Write as _;
use std::net::Ipv4Addr;

use super::{Ends, Sizes, TTL, Traffic};

/// What a switch is told to do with the packets from one port of a pair to the other.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Rules {
    /// All of them go there: one rule, which looks at no header. All flows are one to an exact-match table.
    Port,
    /// A rule for each class of the traffic, each with a mask of its own, on addresses, protocol and ports; MAC addresses are
    /// rewritten and the TTL is decremented. One more rule, which no packet matches, names the whole 5-tuple, so that every
    /// flow is one of its own to an exact-match table.
    Routes,
}

impl Rules {
    /// Whether packets are rewritten as [`super::LoadConfig::routed`] expects it.
    pub fn routed(self) -> bool {
        self == Self::Routes
    }

    /// Flows of one direction that an exact-match table has to tell apart.
    pub fn told_apart(self, traffic: &Traffic) -> u32 {
        if self == Self::Routes { traffic.flows } else { 1 }
    }

    /// For the direction from the port `from` to the port `to`, whose numbers among the load's ports are `numbers`: flows
    /// and actions of `pointwork add-flow`.
    pub fn pointwork(
        self,
        [from, to]: [&str; 2],
        numbers: [u8; 2],
        traffic: &Traffic,
    ) -> Vec<(String, String)> {
        if self == Self::Port {
            return vec![(format!("in_port({from})"), to.into())];
        }
        let (ends, protocol) = (Ends::between(numbers[0], numbers[1]), Protocol::of(traffic));
        let [src, dst] = ends.routed().macs.map(mac);
        let actions = format!("set(eth(src={src},dst={dst})),set(ipv4(ttl={})),{to}", TTL - 1);
        let start = format!("in_port({from}),eth_type(0x0800)");
        let mut rules: Vec<_> = (0..traffic.classes)
            .map(|class| {
                let (network, mask) = network(ends.ips[1], class);
                let (port, port_mask) = Traffic::class_ports(class);
                let flow = format!(
                    "{start},ipv4(src=10.0.0.0/255.0.0.0,dst={network}/{mask},proto={},ttl={TTL},frag=no),\
                     {}(dst={port}/{port_mask:#x})",
                    protocol.number, protocol.name
                );
                (flow, actions.clone())
            })
            .collect();
        let witness = format!(
            "{start},ipv4(src=192.0.2.1,dst=192.0.2.2,proto={},frag=no),{}(src=1,dst=1)",
            protocol.number, protocol.name
        );
        rules.push((witness, "drop".into()));
        rules
    }

    /// The same for `ovs-ofctl add-flow`, between OpenFlow ports.
    pub fn openflow(self, [from, to]: [u32; 2], numbers: [u8; 2], traffic: &Traffic) -> Vec<String> {
        if self == Self::Port {
            return vec![format!("in_port={from},actions=output:{to}")];
        }
        let (ends, protocol) = (Ends::between(numbers[0], numbers[1]), Protocol::of(traffic));
        let [src, dst] = ends.routed().macs.map(mac);
        let name = protocol.name;
        let mut rules: Vec<_> = (0..traffic.classes)
            .map(|class| {
                let (network, mask) = network(ends.ips[1], class);
                let (port, port_mask) = Traffic::class_ports(class);
                // Of different priority, or the classifier would look at all masks, and all megaflows have their union.
                let mut rule = format!("priority={},in_port={from},{name},ip_frag=no", 1000 - class);
                let _ = write!(
                    rule,
                    ",nw_src=10.0.0.0/8,nw_dst={network}/{mask},tp_dst={port}/{port_mask:#x},\
                     actions=mod_dl_src:{src},mod_dl_dst:{dst},dec_ttl,output:{to}"
                );
                rule
            })
            .collect();
        rules.push(format!(
            "priority=1,in_port={from},{name},nw_src=192.0.2.1,nw_dst=192.0.2.2,tp_src=1,tp_dst=1,actions=drop"
        ));
        rules
    }
}

struct Protocol {
    name: &'static str,
    number: u8,
}

impl Protocol {
    fn of(traffic: &Traffic) -> Self {
        match traffic.sizes {
            Sizes::Tso => Self { name: "tcp", number: 6 },
            _ => Self { name: "udp", number: 17 },
        }
    }
}

/// The network of `address` that a class's rule matches, with its mask: one bit longer for each class.
fn network(address: [u8; 4], class: u32) -> (Ipv4Addr, Ipv4Addr) {
    let mask = u32::MAX << (24 - class.min(24));
    (Ipv4Addr::from_bits(u32::from_be_bytes(address) & mask), Ipv4Addr::from_bits(mask))
}

fn mac(address: [u8; 6]) -> String {
    address.map(|byte| format!("{byte:02x}")).join(":")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::load::Order;
    use std::collections::HashSet;

    #[test]
    fn every_class_has_a_mask_of_its_own_and_both_switches_are_told_the_same() {
        let traffic = Traffic { flows: 65_536, order: Order::Walk, sizes: Sizes::Fixed(64), classes: 16 };
        let masks: HashSet<_> = (0..16).map(|class| network([10, 0, 0, 2], class).1).collect();
        assert_eq!(masks.len(), 16);
        let ours = Rules::Routes.pointwork(["p1", "p2"], [0, 1], &traffic);
        let theirs = Rules::Routes.openflow([1, 2], [0, 1], &traffic);
        assert_eq!((ours.len(), theirs.len()), (17, 17));
        for ((flow, actions), rule) in ours.iter().zip(&theirs).take(16) {
            let between = |text: &str, start: &str, end: char| {
                text.split_once(start)
                    .and_then(|(_, rest)| rest.split(end).next())
                    .map(str::to_owned)
                    .unwrap()
            };
            assert_eq!(
                between(flow, "proto=17,ttl=64,frag=no),udp(dst=", ')'),
                between(rule, "tp_dst=", ',')
            );
            assert_eq!(between(flow, ",dst=", ','), between(rule, "nw_dst=", ','));
            assert_eq!(between(actions, "src=", ','), between(rule, "mod_dl_src:", ','));
            assert_eq!(between(actions, "dst=", ')'), between(rule, "mod_dl_dst:", ','));
        }
    }
}
