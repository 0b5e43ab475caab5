//! What the planner refuses, and what it gives back.

use super::*;
use crate::key::{ETH_P_IP, ETH_P_IPV6, ipproto};

const PORT: PortId = PortId { slot: 2, generation: 4 };

fn planner(masks: usize, flows: usize) -> Planner {
    let workers = [1, 2].map(|seed| Slots::new(flows, Hasher::new(seed)).into()).into();
    let mut planner = Planner::new(PlannerConfig { ports: 4, flows, masks, seed: 1 }, workers);
    planner.add_port(PORT, 10).unwrap();
    planner
}

fn spec(fields: &[(Field, u128, u128)]) -> FlowSpec {
    let mut matches = Match::default();
    for &(field, value, mask) in
        [(Field::InPort, 2, u128::MAX), (Field::RecircId, 0, u128::MAX)].iter().chain(fields)
    {
        matches.key.set(field, value);
        matches.mask.set(field, mask);
    }
    FlowSpec { matches, actions: Vec::new(), ufid: None, held: None }
}

fn add(planner: &mut Planner, fields: &[(Field, u128, u128)]) -> Result<FlowRef, PlanError> {
    planner.add(PORT, Source::Learned, spec(fields), IfExists::Refuse).map(|(flow, updates)| {
        assert_eq!(updates.len(), 2);
        flow
    })
}

const ALL: u128 = u128::MAX;

#[test]
fn masks_need_their_prerequisites() {
    let mut planner = planner(8, 8);
    let ip = (Field::EthType, ETH_P_IP as u128, ALL);
    let tcp = (Field::IpProto, ipproto::TCP as u128, ALL);
    let needs = |a: Field, b: Field| Err(PlanError::Prerequisite(a.name(), b.name()));
    let src = (Field::Ipv4Src, 1, ALL);
    assert_eq!(add(&mut planner, &[src]), needs(Field::Ipv4Src, Field::EthType));
    assert_eq!(add(&mut planner, &[ip, (Field::TpDst, 80, ALL)]), needs(Field::TpDst, Field::IpProto));
    let partly = (Field::IpProto, 0, 0xf0);
    assert_eq!(
        add(&mut planner, &[ip, partly, (Field::TpDst, 80, ALL)]),
        needs(Field::TpDst, Field::IpProto)
    );
    let ipv6 = (Field::EthType, ETH_P_IPV6 as u128, ALL);
    assert_eq!(add(&mut planner, &[ipv6, (Field::ArpSha, 1, ALL)]), needs(Field::ArpSha, Field::IpProto));
    assert!(matches!(add(&mut planner, &[(Field::VlanTci, 5, 0xfff)]), Err(PlanError::Prerequisite(..))));
    assert_eq!(add(&mut planner, &[(Field::Shape, 1, ALL)]), Err(PlanError::Field("shape")));
    assert_eq!(add(&mut planner, &[(Field::InPort, 3, ALL)]), Err(PlanError::InPort));
    assert_eq!(add(&mut planner, &[(Field::RecircId, 0, 0)]), needs(Field::InPort, Field::RecircId));
    assert!(planner.is_empty());
    assert!(add(&mut planner, &[ip, tcp, src, (Field::TpDst, 80, ALL)]).is_ok());
}

#[test]
fn budgets_are_kept_and_given_back() {
    let mut planner = planner(2, 3);
    let eth = |field, value| [(field, value, ALL)];
    let a = add(&mut planner, &eth(Field::EthDst, 1)).unwrap();
    assert_eq!(add(&mut planner, &eth(Field::EthDst, 1)), Err(PlanError::Exists(a)));
    assert_eq!(add(&mut planner, &eth(Field::EthSrc, 1)), Err(PlanError::Overlaps(a)));
    let both = [(Field::EthDst, 2, ALL), (Field::EthSrc, 1, ALL)];
    let b = add(&mut planner, &both).unwrap();
    let third = [(Field::EthDst, 3, ALL), (Field::EthType, 5, ALL)];
    assert_eq!(add(&mut planner, &third), Err(PlanError::Masks(2)));
    planner.remove(b).unwrap();
    assert_eq!(planner.remove(b).err(), Some(PlanError::NoFlow));
    let c = add(&mut planner, &third).unwrap();
    assert_eq!(c.index, b.index);
    assert_ne!(c.generation, b.generation);
    assert!(planner.get(b).is_none() && planner.get(c).is_some());
    add(&mut planner, &eth(Field::EthDst, 7)).unwrap();
    assert_eq!(add(&mut planner, &eth(Field::EthDst, 8)), Err(PlanError::Full(3)));
    assert_eq!((planner.len(), planner.masks(PORT)), (3, 2));
    let stranger = PortId { slot: 2, generation: 5 };
    let error = planner.add(stranger, Source::Learned, spec(&[]), IfExists::Refuse).err();
    assert_eq!(error, Some(PlanError::NoPort(stranger)));
    assert_eq!(planner.add_port(stranger, 1).err(), Some(PlanError::Slot(stranger)));
    assert_eq!(planner.remove_port(PORT).unwrap().len(), 4);
    assert!(planner.is_empty() && planner.add_port(stranger, 1).is_ok());
}

/// Overlaps are found through the masks' common bits, among many flows whose masks nest and cross.
#[test]
fn overlaps_are_found_among_thousands() {
    let mut planner = planner(64, 10_000);
    let ip = (Field::EthType, ETH_P_IP as u128, ALL);
    for i in 0..3000u128 {
        add(&mut planner, &[ip, (Field::Ipv4Src, i << 8, 0xffff_ff00)]).unwrap();
        add(&mut planner, &[ip, (Field::Ipv4Src, 0x8000_0000 | i, ALL), (Field::IpTos, 4, ALL)]).unwrap();
    }
    let by = |planner: &mut Planner, fields: &[_]| match add(planner, fields) {
        Err(PlanError::Overlaps(flow)) => planner.get(flow).unwrap().spec.matches.key.get(Field::Ipv4Src),
        other => panic!("{other:?}"),
    };
    assert_eq!(by(&mut planner, &[ip, (Field::Ipv4Src, 77 << 8 | 9, ALL)]), 77 << 8);
    let mixed = [ip, (Field::Ipv4Src, 0x8000_0010, 0xffff_fff0), (Field::IpTos, 0, 0xf0)];
    assert_eq!(by(&mut planner, &mixed) & !0xf, 0x8000_0010);
    let flows: Vec<_> = planner.flows().map(|flow| flow.flow).collect();
    flows.into_iter().for_each(|flow| drop(planner.remove(flow).unwrap()));
    assert!(add(&mut planner, &mixed).is_ok());
}
