//! A flow given without its prerequisites is completed or refused.
//!
//! A mask that looks at a field of a header must look at all of what says that the header is there: the ethertype, the
//! protocol, and the fragment type, since later fragments have no transport header. What can mean only one thing is filled
//! in; what could mean several, or contradicts itself, is refused.

use super::cursor::Cursor;
use super::error::{OdpError, OdpErrorKind};
use super::groups::{Group, Place};
use crate::flow::Match;
use crate::key::{ETH_P_IP, FRAG_LATER, FRAG_NONE, Field};

/// ICMPv6 types of neighbour solicitation and advertisement (RFC 4861 §4.3, §4.4).
const ND_TYPES: [u128; 2] = [135, 136];

/// A group that a text names.
pub(super) struct Named {
    pub group: &'static Group,
    /// Where, for messages.
    pub at: usize,
    /// It asks for something; otherwise all of its fields are wildcards and it only must not contradict the others.
    pub asks: bool,
}

/// Adds to `m` what the groups in `named` need.
pub(super) fn complete(c: &Cursor<'_>, m: &mut Match, named: &[Named]) -> Result<(), OdpError> {
    complete_eth_type(c, m, named)?;
    complete_proto(c, m, named)?;
    complete_frag(c, m, named)?;
    complete_nd(c, m, named)
}

fn refuse<T>(c: &Cursor<'_>, named: &Named, message: String) -> Result<T, OdpError> {
    Err(c.error_of(OdpErrorKind::Prerequisite, named.at, message))
}

fn complete_eth_type(c: &Cursor<'_>, m: &mut Match, named: &[Named]) -> Result<(), OdpError> {
    // Packets of other protocols have no original tuple either, so OVS prints one that is all wildcards with any.
    let counts = |n: &&Named| !n.group.ethertypes.is_empty() && (n.asks || n.group.place == Place::Network);
    let fits = |m: &Match, t: u16| (t as u128 ^ m.key.get(Field::EthType)) & m.mask.get(Field::EthType) == 0;
    let mut candidates: Option<(Vec<u16>, &str)> = None;
    for n in named.iter().filter(counts) {
        let name = n.group.name;
        let own = n.group.ethertypes.iter().copied().filter(|&t| fits(m, t));
        let (left, rival) = match &candidates {
            None => (own.collect::<Vec<u16>>(), ""),
            Some((earlier, rival)) => (own.filter(|t| earlier.contains(t)).collect(), *rival),
        };
        if left.is_empty() {
            let eth_type = m.key.get(Field::EthType);
            return refuse(
                c,
                n,
                match rival {
                    "" => format!("{name} contradicts eth_type({eth_type:#06x})"),
                    rival => format!("{name} contradicts {rival}"),
                },
            );
        }
        candidates = Some((left, name));
    }
    let (Some((candidates, _)), Some(first)) = (candidates, named.iter().filter(counts).find(|n| n.asks))
    else {
        return Ok(());
    };
    // Of ARP and RARP, and of MPLS unicast and multicast, the first is what is meant unless the other is given.
    if candidates.len() > 1 && candidates[0] == ETH_P_IP {
        return refuse(c, first, format!("{} needs eth_type(0x0800) or eth_type(0x86dd)", first.group.name));
    }
    m.key.set(Field::EthType, candidates[0] as u128);
    m.mask.set_exact(Field::EthType);
    Ok(())
}

fn complete_proto(c: &Cursor<'_>, m: &mut Match, named: &[Named]) -> Result<(), OdpError> {
    let given = (m.key.get(Field::IpProto), m.mask.get(Field::IpProto));
    let mut first: Option<(&str, u8)> = None;
    for n in named {
        let Some(proto) = n.group.proto else { continue };
        let name = n.group.name;
        if (proto as u128 ^ given.0) & given.1 != 0 {
            return refuse(c, n, format!("{name} contradicts proto={}", given.0));
        }
        if let Some((rival, _)) = first.filter(|&(_, other)| other != proto) {
            return refuse(c, n, format!("{name} contradicts {rival}"));
        }
        first = Some((name, proto));
        if n.asks {
            m.key.set(Field::IpProto, proto as u128);
            m.mask.set_exact(Field::IpProto);
        }
    }
    Ok(())
}

fn complete_frag(c: &Cursor<'_>, m: &mut Match, named: &[Named]) -> Result<(), OdpError> {
    for n in named.iter().filter(|n| n.asks && n.group.proto.is_some()) {
        if !m.mask.has(Field::IpFrag) {
            m.key.set(Field::IpFrag, FRAG_NONE as u128);
            m.mask.set_exact(Field::IpFrag);
        } else if m.key.ip_frag() == FRAG_LATER {
            return refuse(c, n, format!("a later fragment has no {} header", n.group.name));
        }
    }
    Ok(())
}

fn complete_nd(c: &Cursor<'_>, m: &mut Match, named: &[Named]) -> Result<(), OdpError> {
    let Some(nd) = named.iter().find(|n| n.asks && n.group.name == "nd") else { return Ok(()) };
    if !m.mask.is_exact(Field::TpSrc) || !ND_TYPES.contains(&m.key.get(Field::TpSrc)) {
        return refuse(c, nd, "nd needs icmpv6(type=135) or icmpv6(type=136)".into());
    }
    if m.key.get(Field::TpDst) != 0 {
        return refuse(c, nd, format!("nd contradicts code={}", m.key.get(Field::TpDst)));
    }
    m.mask.set_exact(Field::TpDst);
    Ok(())
}
