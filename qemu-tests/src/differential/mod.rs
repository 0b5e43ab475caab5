//! The same flows and the same packets through two switches: whatever comes out must be the same, byte for byte.
//!
//! A [`Side`] is one switch with ports that the test holds the other end of. A [`Case`] is what both get: OpenFlow tables
//! and packets, all made from one seed by [`generate`]. [`Player`] runs several cases at once on a side, each on a bridge of
//! its own, its *lane*, and [`differences`] says where two runs part. [`batches`] says what is run at once.

pub mod batches;
pub mod change;
pub mod generate;
pub mod guests;
pub mod offloads;
pub mod taps;
pub mod tunnels;

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::{self, Display, Write as _};
use std::ops::Range;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};

use crate::frames::{EXPERIMENTAL, hex};
use crate::host::{check_interrupt, tail, wait_for};
use crate::ovs::{BRIDGE, Ovs};
use offloads::Load;

/// Ports of each lane.
pub const PORTS: usize = 5;
/// Cases that are run at once. All lanes share one datapath.
pub const LANES: usize = 8;

/// How often a case's packets are sent: as the first of their flow, when flows have just been made, and later.
pub const ROUNDS: usize = 3;
/// How often they are sent after the tables have changed.
pub const LATER_ROUNDS: usize = 2;

/// Whether packets may meet tables in this round, counted from 0, that none has met before.
fn is_first(round: usize) -> bool {
    match round.checked_sub(ROUNDS) {
        None => round == 0,
        Some(since) => since.is_multiple_of(LATER_ROUNDS),
    }
}

/// How long the slowest way through a switch may take on a busy machine.
const DEADLINE: Duration = Duration::from_secs(10);

/// The name of a port, counted from 0: lane by lane, [`PORTS`] each.
pub fn port_name(port: usize) -> String {
    format!("p{}", port + 1)
}

/// The number of a port on its bridge.
fn port_number(port: usize) -> usize {
    port % PORTS + 1
}

/// The bridge of a lane.
fn bridge(lane: usize) -> String {
    if lane == 0 { BRIDGE.into() } else { format!("br{lane}") }
}

/// Makes the bridges of these lanes. What is the bridge's own, which no accelerator has, takes no part in flooding;
/// actions that name it, and ALL, go there.
fn add_bridges(ovs: &Ovs, lanes: usize) -> Result<()> {
    for lane in 0..lanes {
        let bridge = &*bridge(lane);
        if lane > 0 {
            let kind = ["datapath_type=netdev", "fail_mode=secure"];
            ovs.vsctl(&[&["add-br", bridge, "--", "set", "bridge", bridge], &kind[..]].concat())?;
            ovs.namespace().ip(&["link", "set", bridge, "up"])?;
        }
        wait_for(&format!("bridge {bridge}"), DEADLINE, || {
            // Later versions of OpenFlow do not have the flag.
            Ok(ovs.ofctl(&["--protocols=OpenFlow10", "mod-port", bridge, bridge, "no-flood"]).ok())
        })?;
    }
    Ok(())
}

/// One switch, under an Open vSwitch whose bridges have [`PORTS`] ports each, numbered from 1.
pub trait Side: Send {
    /// What it is called in messages.
    fn name(&self) -> &'static str;

    /// How many lanes it has.
    fn lanes(&self) -> usize;

    /// The Open vSwitch that has its tables.
    fn ovs(&self) -> &Ovs;

    /// Sends `frame` into `port`, counted from 0, as `load` says.
    fn inject(&mut self, port: usize, frame: &[u8], load: Load) -> Result<()>;

    /// All frames that have come out, with their ports. If there are none, waits up to `patience` for the first.
    fn drain(&mut self, patience: Duration) -> Result<Vec<(usize, Vec<u8>)>>;

    /// Waits until packets are treated as the tables of OVS say at this moment.
    fn settle(&mut self) -> Result<()>;

    /// Looks at what the side has done in a round of its cases, counted from 0, and what it keeps.
    fn observe(&mut self, _round: usize) -> Result<()> {
        Ok(())
    }

    /// What is to be said after all cases.
    ///
    /// # Errors
    /// If the cases were not dealt with in the way that they are there to try.
    fn conclude(&mut self) -> Result<String> {
        Ok(String::new())
    }
}

/// How a port takes part in VLANs (`vlan_mode`, ovs-vswitchd.conf.db(5)); only the action NORMAL asks for it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum VlanMode {
    /// A trunk of all VLANs.
    #[default]
    All,
    /// A trunk of these.
    Trunk(Vec<u16>),
    /// An access port.
    Access(u16),
    /// A trunk whose untagged packets are in this VLAN.
    NativeUntagged(u16),
}

impl VlanMode {
    /// The columns of the port's record.
    fn columns(&self) -> [String; 3] {
        let (mode, tag, trunks) = match self {
            Self::All => ("[]", None, &[][..]),
            Self::Trunk(vlans) => ("trunk", None, &vlans[..]),
            Self::Access(vlan) => ("access", Some(vlan), &[][..]),
            Self::NativeUntagged(vlan) => ("native-untagged", Some(vlan), &[][..]),
        };
        let tag = tag.map_or("[]".into(), u16::to_string);
        [format!("vlan_mode={mode}"), format!("tag={tag}"), format!("trunks={trunks:?}").replace(' ', "")]
    }
}

/// What both sides get.
#[derive(Clone, Debug, Default)]
pub struct Case {
    /// What it was made from.
    pub seed: u64,
    /// Whether packets change what happens to later ones (NORMAL, `learn`): then each is let sink in before the next.
    pub learns: bool,
    /// How many VLAN tags OVS reads (`vlan-limit`, ovs-vswitchd.conf.db(5)): 1 by default, 2 at most.
    pub vlan_limit: usize,
    /// The ports.
    pub ports: Vec<VlanMode>,
    /// Groups as `ovs-ofctl add-group` takes them.
    pub groups: Vec<String>,
    /// Flows as `ovs-ofctl add-flow` takes them.
    pub flows: Vec<String>,
    /// The flows of each later time, which replace those before while they are in use.
    pub later: Vec<Vec<String>>,
    /// How guests hand the packets over.
    pub load: Load,
    /// How many packets of one port are sent at once. What they make is then compared without regard to its order.
    pub burst: usize,
    /// Packets with the ports that they come from, counted from 0.
    pub packets: Vec<(usize, Vec<u8>)>,
}

impl Case {
    /// The tables for `ovs-ofctl bundle`, which replaces all at once, with a flow that sends a [`barrier`] everywhere. The
    /// bridge's own port is among the places, so that no accelerator can do it alone.
    fn bundle(&self, lane: usize, flows: &[String]) -> String {
        let mut text = String::from("flow delete\ngroup delete group_id=4294967292\n");
        let ports: Vec<String> = (0..PORTS).map(|port| format!("output:{}", port + 1)).collect();
        let _ = writeln!(
            text,
            "flow add table=0,priority=65535,dl_type={EXPERIMENTAL:#06x},actions={},in_port,LOCAL",
            ports.join(",")
        );
        for group in &self.groups {
            let _ = writeln!(text, "group add {group}");
        }
        for flow in flows {
            // Bridges share the zones of connections.
            let flow = flow.replace("zone=", &format!("zone={lane}"));
            let _ = writeln!(text, "flow add {flow}");
        }
        text
    }

    /// How often its packets are sent.
    fn rounds(&self) -> usize {
        ROUNDS + self.later.len() * LATER_ROUNDS
    }

    /// How many packets are sent in all.
    pub fn sent(&self) -> usize {
        self.rounds() * self.packets.len()
    }

    /// The flows that come into its tables before this round.
    fn change(&self, round: usize) -> Option<&Vec<String>> {
        let since = round.checked_sub(ROUNDS).filter(|_| is_first(round))?;
        self.later.get(since / LATER_ROUNDS)
    }

    /// Which packets are sent at once, one after the other, in each round.
    fn steps(&self) -> Vec<Range<usize>> {
        let mut steps: Vec<Range<usize>> = Vec::new();
        for (index, (port, _)) in self.packets.iter().enumerate() {
            match steps.last_mut() {
                Some(step) if step.len() < self.burst && self.packets[step.start].0 == *port => step.end += 1,
                _ => steps.push(index..index + 1),
            }
        }
        steps
    }
}

impl Display for Case {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let learning = if self.learns { ", learning" } else { "" };
        writeln!(
            f,
            "# seed {}{learning}, packets {:?}, {} at once",
            self.seed,
            self.load,
            self.burst.max(1)
        )?;
        writeln!(f, "# ovs-vsctl set open . other_config:vlan-limit={}", self.vlan_limit)?;
        for (port, mode) in self.ports.iter().enumerate() {
            writeln!(f, "# ovs-vsctl set port {} {}", port_name(port), mode.columns().join(" "))?;
        }
        write!(f, "{}", self.bundle(0, &self.flows))?;
        for flows in &self.later {
            write!(f, "# later:\n{}", self.bundle(0, flows))?;
        }
        for (index, (port, frame)) in self.packets.iter().enumerate() {
            writeln!(f, "# packet {index} into {}: {}", port_name(*port), hex(frame))?;
        }
        Ok(())
    }
}

/// What came out for the packets of one step: each port's frames, in their order if it was one packet.
pub type Outcome = BTreeMap<usize, Vec<Vec<u8>>>;

/// What is sent at once in a lane: packets of one port, and how guests hand them over.
type Part<'a> = (usize, &'a [(usize, Vec<u8>)], Load);

/// A side with what it is set up for.
pub struct Player<S> {
    side: S,
    vlan_limit: usize,
    ports: Vec<VlanMode>,
    /// Barriers sent so far.
    barriers: u64,
}

impl<S: Side> Player<S> {
    /// A player on a side that has just been started.
    pub fn new(side: S) -> Self {
        let ports = vec![VlanMode::All; side.lanes() * PORTS];
        Self { side, vlan_limit: 1, ports, barriers: 0 }
    }

    /// The side.
    pub fn side(&mut self) -> &mut S {
        &mut self.side
    }

    /// Runs cases, each on a lane, all with the same `vlan_limit`: what came out for each step of each, round by round.
    ///
    /// # Errors
    /// If a case is not one that OVS accepts, or the side does not get still.
    pub fn play(&mut self, cases: &[Case]) -> Result<Vec<Vec<Outcome>>> {
        let name = self.side.name();
        self.prepare(cases).with_context(|| format!("setting up {name}"))?;
        let mut outcomes = vec![Vec::new(); cases.len()];
        let steps: Vec<Vec<Range<usize>>> = cases.iter().map(Case::steps).collect();
        for round in 0..cases.iter().map(Case::rounds).max().unwrap_or(0) {
            let mut learns = Vec::new();
            let mut changed = false;
            for (lane, case) in cases.iter().enumerate() {
                if let Some(flows) = case.change(round) {
                    write_tables(self.side.ovs(), lane, &case.bundle(lane, flows))?;
                    changed = true;
                }
                // After the first round everybody is known.
                learns.push(case.learns && (round == 0 || case.change(round).is_some()));
            }
            if changed {
                self.side.settle()?;
            }
            for step in 0..steps.iter().map(Vec::len).max().unwrap_or(0) {
                let takes_part = |lane: usize| steps[lane].get(step).filter(|_| round < cases[lane].rounds());
                let parts: Vec<Part<'_>> = (cases.iter().enumerate())
                    .filter_map(|(lane, case)| {
                        let range = takes_part(lane)?.clone();
                        Some((lane, &case.packets[range], case.load))
                    })
                    .collect();
                let all = self.step(&parts).with_context(|| format!("{name}, round {round}, step {step}"))?;
                for (lane, outcome) in all {
                    outcomes
                        .get_mut(lane)
                        .context("a frame came out of a bridge without a case")?
                        .push(outcome);
                }
                if parts.iter().any(|(lane, ..)| learns[*lane]) {
                    self.side.settle()?;
                }
            }
            self.side.settle()?;
            self.side.observe(round)?;
        }
        Ok(outcomes)
    }

    fn prepare(&mut self, cases: &[Case]) -> Result<()> {
        check_interrupt()?;
        let ovs = self.side.ovs();
        let vlan_limit = cases.iter().map(|case| case.vlan_limit).max().unwrap_or(1);
        if self.vlan_limit != vlan_limit {
            ovs.vsctl(&["set", "open", ".", &format!("other_config:vlan-limit={vlan_limit}")])?;
            self.vlan_limit = vlan_limit;
        }
        let mut modes = Vec::new();
        for (lane, case) in cases.iter().enumerate() {
            for (port, mode) in case.ports.iter().enumerate().map(|(port, mode)| (lane * PORTS + port, mode))
            {
                if self.ports[port] != *mode {
                    modes.extend(["--".into(), "set".into(), "port".into(), port_name(port)]);
                    modes.extend(mode.columns());
                    self.ports[port] = mode.clone();
                }
            }
        }
        if let Some((_, modes)) = modes.split_first() {
            ovs.vsctl(&modes.iter().map(String::as_str).collect::<Vec<_>>())?;
        }
        for (lane, case) in cases.iter().enumerate() {
            write_tables(ovs, lane, &case.bundle(lane, &case.flows)).with_context(|| case.to_string())?;
        }
        // Nothing that the cases before left behind: neither flows nor addresses nor connections.
        ovs.appctl(&["revalidator/purge"])?;
        ovs.appctl(&["fdb/flush"])?;
        ovs.appctl(&["dpctl/flush-conntrack"])?;
        self.side.settle()?;
        let first: Vec<usize> = (0..cases.len()).map(|lane| lane * PORTS).collect();
        self.quiesce(&first, &mut Outcome::new())
    }

    /// Sends these packets of these lanes, those of a lane from one port. What comes out by lane, with an outcome for each
    /// lane that takes part.
    fn step(&mut self, parts: &[Part<'_>]) -> Result<BTreeMap<usize, Outcome>> {
        let mut ports = Vec::new();
        for &(lane, packets, load) in parts {
            for (port, frame) in packets {
                self.side.inject(lane * PORTS + port, frame, load)?;
            }
            ports.extend(packets.last().map(|(port, _)| lane * PORTS + port));
        }
        let mut outcome = Outcome::new();
        self.quiesce(&ports, &mut outcome)?;
        let mut outcomes: BTreeMap<usize, Outcome> =
            parts.iter().map(|&(lane, ..)| (lane, Outcome::new())).collect();
        for (port, frames) in outcome {
            outcomes.entry(port / PORTS).or_default().insert(port % PORTS, frames);
        }
        for &(lane, packets, load) in parts {
            // One packet that is cut after it was copied gives the segments in another order than segments that are copied;
            // and the first packet of a flow may be late.
            if load == Load::Segments || packets.len() > 1 {
                outcomes.entry(lane).or_default().values_mut().for_each(|frames| frames.sort());
            }
        }
        Ok(outcomes)
    }

    /// Collects what comes out until nothing that was sent into `ports` before is still on its way.
    fn quiesce(&mut self, ports: &[usize], outcome: &mut Outcome) -> Result<()> {
        // A barrier that is received in one burst with a packet may overtake it, but leaves at the same time. The second
        // enters after the first has left.
        for _ in 0..2 {
            let mut missing = BTreeSet::new();
            for &port in ports {
                self.barriers += 1;
                let barrier = barrier(port % PORTS, self.barriers);
                self.side.inject(port, &barrier, Load::Whole)?;
                let first = port - port % PORTS;
                missing.extend((first..first + PORTS).map(|port| (port, barrier.clone())));
            }
            let deadline = Instant::now() + DEADLINE;
            while !missing.is_empty() {
                if Instant::now() >= deadline {
                    let log = tail(&self.side.ovs().rundir().join("ovs-vswitchd.log"), 20);
                    let ports: Vec<String> = missing.iter().map(|(port, _)| port_name(*port)).collect();
                    bail!("a barrier did not come out of the ports {ports:?}; ovs-vswitchd said:\n{log}");
                }
                for frame in self.side.drain(Duration::from_millis(100))? {
                    if !missing.remove(&frame) {
                        outcome.entry(frame.0).or_default().push(frame.1);
                    }
                }
            }
        }
        Ok(())
    }
}

/// Gives the bridge of a lane a bundle.
fn write_tables(ovs: &Ovs, lane: usize, bundle: &str) -> Result<()> {
    let file = ovs.rundir().join("bundle");
    std::fs::write(&file, bundle)?;
    ovs.ofctl(&["bundle", &bridge(lane), &file.to_string_lossy()])?;
    Ok(())
}

/// A frame that goes to every port, the one that it came from included, and that no case has.
fn barrier(port: usize, number: u64) -> Vec<u8> {
    let mut frame = vec![2, 0, 0, 0xba, 0, 0, 2, 0, 0, 0xba, 0, port as u8 + 1];
    frame.extend(EXPERIMENTAL.to_be_bytes());
    frame.extend(number.to_be_bytes());
    frame.resize(60, 0);
    frame
}

/// Where two runs of a case part, one line for each step; nothing if they agree.
pub fn differences(case: &Case, one: &[Outcome], other: &[Outcome]) -> Vec<String> {
    let mut lines = Vec::new();
    let steps = case.steps();
    let count = steps.len().max(1);
    for (step, pair) in one.iter().zip(other).enumerate().filter(|(_, (one, other))| one != other) {
        let (round, range) = (step / count, steps.get(step % count).cloned().unwrap_or_default());
        let index = match range.len() {
            0 | 1 => range.start.to_string(),
            _ => format!("{} to {}", range.start, range.end - 1),
        };
        let (one, other) = (show(pair.0), show(pair.1));
        lines.push(format!("round {round}, packet {index}:\n  {one}\n  {other}"));
    }
    if lines.is_empty() && one.len() != other.len() {
        lines.push("a frame came out after all others".into());
    }
    lines
}

fn show(outcome: &Outcome) -> String {
    if outcome.is_empty() {
        return "nothing".into();
    }
    let frames = |frames: &Vec<Vec<u8>>| frames.iter().map(|frame| hex(frame)).collect::<Vec<_>>().join(" ");
    let ports = outcome.iter().map(|(port, out)| format!("{}: {}", port_name(*port), frames(out)));
    ports.collect::<Vec<_>>().join("; ")
}

/// What came out on each of two sides, for each of the cases.
pub type Both = (Vec<Vec<Outcome>>, Vec<Vec<Outcome>>);

/// Runs cases on both sides at the same time.
pub fn play_both<A: Side, B: Side>(
    one: &mut Player<A>,
    other: &mut Player<B>,
    cases: &[Case],
) -> Result<Both> {
    std::thread::scope(|scope| {
        let thread = scope.spawn(|| one.play(cases));
        let second = other.play(cases);
        let first = thread.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic));
        Ok((first?, second?))
    })
}

/// A case as small as can be that still `fails`: without the packets and flows that it fails without.
pub fn minimise(case: &Case, mut fails: impl FnMut(&Case) -> bool) -> Case {
    let mut small = case.clone();
    shrink(&mut small, |case| &mut case.packets, &mut fails);
    shrink(&mut small, |case| &mut case.later, &mut fails);
    for index in 0..small.later.len() {
        shrink(&mut small, |case| &mut case.later[index], &mut fails);
    }
    shrink(&mut small, |case| &mut case.flows, &mut fails);
    shrink(&mut small, |case| &mut case.groups, &mut fails);
    small
}

/// Takes away ever smaller parts of a list, as long as the case fails without them.
fn shrink<T: Clone>(
    case: &mut Case,
    list: impl Fn(&mut Case) -> &mut Vec<T>,
    fails: &mut impl FnMut(&Case) -> bool,
) {
    let mut part = list(case).len().div_ceil(2);
    while part > 0 {
        let mut at = 0;
        while at < list(case).len() {
            let mut without = case.clone();
            let items = list(&mut without);
            let end = (at + part).min(items.len());
            items.drain(at..end);
            if fails(&without) {
                *case = without;
            } else {
                at = end;
            }
        }
        part = if part == 1 { 0 } else { part.div_ceil(2) };
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_case_is_made_as_small_as_it_can_be() {
        let flows = (0..17).map(|number| number.to_string()).collect();
        let packets = (0..9).map(|number| (0, vec![number])).collect();
        let case = Case { flows, packets, ..Case::default() };
        let small = minimise(&case, |case| {
            case.flows.contains(&"3".into())
                && case.flows.contains(&"12".into())
                && case.packets.contains(&(0, vec![7]))
        });
        assert_eq!((small.flows, small.packets), (vec!["3".into(), "12".into()], vec![(0, vec![7])]));
    }

    #[test]
    fn packets_of_one_port_are_sent_at_once() {
        let packets = [0, 0, 0, 1, 1, 0].map(|port| (port, vec![])).into();
        let mut case = Case { packets, burst: 2, ..Case::default() };
        assert_eq!(case.steps(), [0..2, 2..3, 3..5, 5..6]);
        case.burst = 1;
        assert_eq!(case.steps().len(), 6);
    }

    #[test]
    fn a_difference_names_its_step() {
        let case = Case { packets: vec![(0, vec![]), (1, vec![])], ..Case::default() };
        let out = Outcome::from([(2, vec![vec![0xab]])]);
        let (one, mut other) = (vec![out.clone(); 4], vec![out; 4]);
        assert!(differences(&case, &one, &other).is_empty());
        other[3].clear();
        let lines = differences(&case, &one, &other);
        assert_eq!(lines, ["round 1, packet 1:\n  p3: ab\n  nothing"]);
    }
}
