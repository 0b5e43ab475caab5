//! The same flows and the same packets through two switches: whatever comes out must be the same, byte for byte.
//!
//! A [`Side`] is one switch with ports that the test holds the other end of. A [`Case`] is what both get: OpenFlow tables
//! and packets, all made from one seed by [`generate`]. [`Player`] runs a case on a side packet by packet, and [`differences`]
//! says where two runs part.

pub mod change;
pub mod generate;
pub mod guests;
pub mod offloads;
pub mod taps;

use std::collections::BTreeMap;
use std::fmt::{self, Display, Write as _};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};

use crate::frames::{EXPERIMENTAL, hex};
use crate::host::{check_interrupt, tail};
use crate::ovs::{BRIDGE, Ovs};
use offloads::Load;

/// Ports of each side: `p1` and on.
pub const PORTS: usize = 5;
/// The bridge's own port, which no accelerator has, takes no part in flooding; actions that name it, and ALL, go there.
const NO_FLOOD: &[&str] = &["mod-port", BRIDGE, BRIDGE, "no-flood"];

/// How often a case's packets are sent: as the first of their flow, when flows have just been made, and later.
pub const ROUNDS: usize = 3;
/// How often they are sent after the tables have changed.
pub const LATER_ROUNDS: usize = 2;

/// How long the slowest way through a switch may take on a busy machine.
const DEADLINE: Duration = Duration::from_secs(10);

/// The name of a port, counted from 0.
pub fn port_name(port: usize) -> String {
    format!("p{}", port + 1)
}

/// One switch, under an Open vSwitch with the bridge [`BRIDGE`] and [`PORTS`] ports numbered from 1.
pub trait Side: Send {
    /// What it is called in messages.
    fn name(&self) -> &'static str;

    /// The Open vSwitch that has its tables.
    fn ovs(&self) -> &Ovs;

    /// Sends `frame` into `port`, counted from 0, as `load` says.
    fn inject(&mut self, port: usize, frame: &[u8], load: Load) -> Result<()>;

    /// All frames that have come out, with their ports. If there are none, waits up to `patience` for the first.
    fn drain(&mut self, patience: Duration) -> Result<Vec<(usize, Vec<u8>)>>;

    /// Waits until packets are treated as the tables of OVS say at this moment.
    fn settle(&mut self) -> Result<()>;

    /// Looks at what the side has done in a round of a case, counted from 0, and what it keeps.
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
    /// Packets with the ports that they come from, counted from 0.
    pub packets: Vec<(usize, Vec<u8>)>,
}

impl Case {
    /// The tables for `ovs-ofctl bundle`, which replaces all at once, with a flow that sends a [`barrier`] everywhere. The
    /// bridge's own port is among the places, so that no accelerator can do it alone.
    fn bundle(&self, flows: &[String]) -> String {
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
            let _ = writeln!(text, "flow add {flow}");
        }
        text
    }
}

impl Display for Case {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let learning = if self.learns { ", learning" } else { "" };
        writeln!(f, "# seed {}{learning}, packets {:?}", self.seed, self.load)?;
        writeln!(f, "# ovs-vsctl set open . other_config:vlan-limit={}", self.vlan_limit)?;
        for (port, mode) in self.ports.iter().enumerate() {
            writeln!(f, "# ovs-vsctl set port {} {}", port_name(port), mode.columns().join(" "))?;
        }
        write!(f, "{}", self.bundle(&self.flows))?;
        for flows in &self.later {
            write!(f, "# later:\n{}", self.bundle(flows))?;
        }
        for (index, (port, frame)) in self.packets.iter().enumerate() {
            writeln!(f, "# packet {index} into {}: {}", port_name(*port), hex(frame))?;
        }
        Ok(())
    }
}

/// What came out for one packet: each port's frames, in their order.
pub type Outcome = BTreeMap<usize, Vec<Vec<u8>>>;

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
        Self { side, vlan_limit: 1, ports: vec![VlanMode::All; PORTS], barriers: 0 }
    }

    /// The side.
    pub fn side(&mut self) -> &mut S {
        &mut self.side
    }

    /// Runs a case: what came out for each packet, round by round.
    ///
    /// # Errors
    /// If the case is not one that OVS accepts, or the side does not get still.
    pub fn play(&mut self, case: &Case) -> Result<Vec<Outcome>> {
        let name = self.side.name();
        self.prepare(case).with_context(|| format!("setting up {name}"))?;
        let mut outcomes = Vec::new();
        for round in 0..ROUNDS + case.later.len() * LATER_ROUNDS {
            let changes = round >= ROUNDS && (round - ROUNDS).is_multiple_of(LATER_ROUNDS);
            if changes {
                self.replace(case, &case.later[(round - ROUNDS) / LATER_ROUNDS])?;
                self.side.settle()?;
            }
            // After the first round everybody is known.
            let learns = case.learns && (round == 0 || changes);
            for (index, (port, frame)) in case.packets.iter().enumerate() {
                let outcome = self.step(*port, frame, case.load, learns);
                outcomes.push(outcome.with_context(|| format!("{name}, round {round}, packet {index}"))?);
            }
            self.side.settle()?;
            self.side.observe(round)?;
        }
        Ok(outcomes)
    }

    fn prepare(&mut self, case: &Case) -> Result<()> {
        check_interrupt()?;
        let ovs = self.side.ovs();
        if self.vlan_limit != case.vlan_limit {
            ovs.vsctl(&["set", "open", ".", &format!("other_config:vlan-limit={}", case.vlan_limit)])?;
            self.vlan_limit = case.vlan_limit;
        }
        for (port, mode) in case.ports.iter().enumerate() {
            if self.ports[port] == *mode {
                continue;
            }
            let columns = mode.columns();
            let columns: Vec<&str> = columns.iter().map(String::as_str).collect();
            ovs.vsctl(&[&["set", "port", &port_name(port)], &columns[..]].concat())?;
            self.ports[port] = mode.clone();
        }
        self.replace(case, &case.flows)?;
        // Nothing that the case before left behind: neither flows nor addresses nor connections.
        let ovs = self.side.ovs();
        ovs.appctl(&["revalidator/purge"])?;
        ovs.appctl(&["fdb/flush", BRIDGE])?;
        ovs.appctl(&["dpctl/flush-conntrack"])?;
        self.side.settle()?;
        self.quiesce(0, &mut Outcome::new())
    }

    /// Puts other flows into the tables, all at once.
    fn replace(&mut self, case: &Case, flows: &[String]) -> Result<()> {
        write_tables(self.side.ovs(), &case.bundle(flows))
    }

    fn step(&mut self, port: usize, frame: &[u8], load: Load, learns: bool) -> Result<Outcome> {
        let mut outcome = Outcome::new();
        self.side.inject(port, frame, load)?;
        self.quiesce(port, &mut outcome)?;
        if load == Load::Segments {
            // One packet that is cut after it was copied gives the segments in another order than segments that are copied.
            outcome.values_mut().for_each(|frames| frames.sort());
        }
        if learns {
            self.side.settle()?;
        }
        Ok(outcome)
    }

    /// Collects what comes out until nothing that was sent into `port` before is still on its way.
    fn quiesce(&mut self, port: usize, outcome: &mut Outcome) -> Result<()> {
        // A barrier that is received in one burst with a packet may overtake it, but leaves at the same time. The second
        // enters after the first has left.
        for _ in 0..2 {
            self.barriers += 1;
            let barrier = barrier(port, self.barriers);
            self.side.inject(port, &barrier, Load::Whole)?;
            let mut missing: Vec<usize> = (0..PORTS).collect();
            let deadline = Instant::now() + DEADLINE;
            while !missing.is_empty() {
                if Instant::now() >= deadline {
                    let log = tail(&self.side.ovs().rundir().join("ovs-vswitchd.log"), 20);
                    bail!("a barrier did not come out of the ports {missing:?}; ovs-vswitchd said:\n{log}");
                }
                for (port, frame) in self.side.drain(Duration::from_millis(100))? {
                    if frame == barrier {
                        missing.retain(|&other| other != port);
                    } else {
                        outcome.entry(port).or_default().push(frame);
                    }
                }
            }
        }
        Ok(())
    }
}

/// Gives OVS a bundle.
fn write_tables(ovs: &Ovs, bundle: &str) -> Result<()> {
    let file = ovs.rundir().join("bundle");
    std::fs::write(&file, bundle)?;
    ovs.ofctl(&["bundle", BRIDGE, &file.to_string_lossy()])?;
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
    let count = case.packets.len().max(1);
    for (step, pair) in one.iter().zip(other).enumerate().filter(|(_, (one, other))| one != other) {
        let (round, index) = (step / count, step % count);
        let (one, other) = (show(pair.0), show(pair.1));
        lines.push(format!("round {round}, packet {index}:\n  {one}\n  {other}"));
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

/// Runs a case on both sides at the same time.
pub fn play_both<A: Side, B: Side>(
    one: &mut Player<A>,
    other: &mut Player<B>,
    case: &Case,
) -> Result<(Vec<Outcome>, Vec<Outcome>)> {
    std::thread::scope(|scope| {
        let thread = scope.spawn(|| one.play(case));
        let second = other.play(case);
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
