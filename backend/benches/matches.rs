//! What the flows of benchmarks look at.

use switch_core::flow::Match;
use switch_core::key::{ETH_P_IP, Field, Key, Mask, ipproto};

/// A match of exactly these values.
pub fn exact(fields: &[(Field, u128)]) -> Match {
    let mut matches = Match { key: Key::default(), mask: Mask::EMPTY, ..Match::default() };
    for &(field, value) in fields {
        matches.key.set(field, value);
        matches.mask.set_exact(field);
    }
    matches
}

/// What each flow looks at: the ingress port, in the first stage.
pub fn from(slot: usize) -> Vec<(Field, u128)> {
    vec![(Field::RecircId, 0), (Field::InPort, slot as u128)]
}

/// A match of the 5-tuple of UDP packets of the port in `slot`, from address and port number `i` to an address.
pub fn five_tuple(slot: usize, i: u32, to: u32) -> Match {
    let fields = [
        (Field::EthType, ETH_P_IP as u128),
        (Field::IpProto, ipproto::UDP as u128),
        (Field::IpFrag, 0),
        (Field::Ipv4Src, u128::from(10 << 24 | i)),
        (Field::Ipv4Dst, to.into()),
        (Field::TpSrc, u128::from(i as u16)),
        (Field::TpDst, 53),
    ];
    exact(&[&from(slot)[..], &fields].concat())
}
