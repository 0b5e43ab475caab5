//! How costs grow with ports, flows and workers. `name=n` is a point of a curve.
//!
//! L1 has an entry for each 5-tuple: a flow that no packet matches looks at it. Each sending port has a burst of 32 packets
//! in each round.

use crate::matches::{exact, five_tuple, from};
use crate::meter::Meter;
use crate::output;
use crate::rig::{BURST, Kind, Rig, Setup};
use switch_core::action::Action;
use switch_core::flow::Match;
use switch_core::key::{ETH_P_IP, Field};

/// Ports of the curve of workers: two for each of sixteen.
const PORTS: usize = 32;

/// All curves.
pub fn all(meter: &Meter) {
    let next = |ports| move |port| [(port + 1) % ports];
    for ports in [1, 2, 4, 16, 64, 256] {
        curve(meter, "ports", ports, setup(ports, (0..ports).collect(), 64, next(ports)));
    }
    // Nothing comes from any but two.
    for ports in [2, 4, 16, 64, 256] {
        curve(meter, "idle-ports", ports, setup(ports, vec![0, ports - 1], 64, next(ports)));
    }
    for flows in [1, 64, 4096, 1 << 16, 1 << 20] {
        curve(meter, "flows", flows, setup(2, vec![0], flows, |_| [1]));
    }
    // One after the other in one thread, each with tables of its own: what they share is the rings that packets leave by.
    // Half of a port's packets go to one port and half to another, of other workers, and each ring is filled by two.
    for workers in [1, 2, 4, 8, 16] {
        let ways = |port| [(port + 1) % PORTS, (port + PORTS / 2 + 1) % PORTS];
        let setup = Setup { workers, ..setup(PORTS, (0..PORTS).collect(), 64, ways) };
        curve(meter, "workers", workers, setup);
    }
}

fn curve(meter: &Meter, name: &str, n: usize, setup: Setup) {
    meter.row(&format!("{name}={n}"), setup.flows.div_ceil(usize::from(BURST)), || {
        let mut rig = Rig::new(&setup);
        move |watch| rig.step(watch)
    });
}

/// One worker; the packets of a port to address `i` go to the `i`th of the ports that `ways` names.
fn setup<const WAYS: usize>(
    ports: usize,
    senders: Vec<usize>,
    flows: usize,
    ways: impl Fn(usize) -> [usize; WAYS],
) -> Setup {
    let rules = |&port: &usize| {
        let unmatched = (port, five_tuple(port, 0, 0xc000_0201), vec![]);
        let to = |(i, to)| (port, to_address(port, i), vec![output(to)]);
        ways(port)
            .into_iter()
            .enumerate()
            .map(to)
            .chain([unmatched])
            .collect::<Vec<(_, Match, Vec<Action>)>>()
    };
    let rules = senders.iter().flat_map(rules).collect();
    Setup {
        ports,
        workers: 1,
        senders,
        len: 64,
        flows,
        ways: WAYS,
        kind: Kind::Split,
        rules,
        outer: vec![],
        pushed: 0,
    }
}

fn to_address(port: usize, i: usize) -> Match {
    let fields = [(Field::EthType, ETH_P_IP as u128), (Field::Ipv4Dst, 0x0a01_0001 + i as u128)];
    exact(&[&from(port)[..], &fields].concat())
}
