//! iperf3 between two QEMU guests, through each switch as it comes, and without any.
//!
//! Each guest has an interface for every way to the other one, so all are measured in the same guests, in turn.

use std::collections::BTreeMap;
use std::fmt;
use std::net::{IpAddr, Ipv4Addr};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use qemu_tests::guest::{Guest, GuestConfig, Nic, NicBackend};
use qemu_tests::host::{WorkDir, run_time};
use qemu_tests::load::Socket;
use qemu_tests::tools::IperfOptions;
use rustix::thread::{CpuSet, Pid, sched_setaffinity};
use serde::Serialize;

use crate::report::{Peer, Spread};
use crate::switches::{OvsDpdk, Pointwork, Switch};

/// What a person calls the row, and picks it by.
pub const ROW: &str = "iperf3, two guests";
/// A transfer's time: the row is not to take a minute.
const SECONDS: u32 = 1;
/// More rounds than that would make it longer.
const ROUNDS: u32 = 3;
/// How long guests may take to reach each other.
const REACH: Duration = Duration::from_secs(30);

/// How packets get from one guest to the other.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Way {
    /// By pointworkd and its embedded bridge.
    Pointwork,
    /// By Open vSwitch with DPDK, as a learning switch, to `dpdkvhostuserclient` ports.
    Ovs,
    /// By a socket from QEMU to QEMU, which takes no offloads.
    Direct,
    /// Not at all: both ends are in the first guest. No network makes its system faster.
    Loopback,
}

impl Way {
    const ALL: [Self; 4] = [Self::Pointwork, Self::Ovs, Self::Direct, Self::Loopback];

    /// The address of the second guest, of that interface.
    fn server(self) -> IpAddr {
        match self {
            Self::Loopback => IpAddr::V4(Ipv4Addr::LOCALHOST),
            way => IpAddr::V4(Ipv4Addr::new(10, 0, way as u8, 2)),
        }
    }
}

impl fmt::Display for Way {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Pointwork => Peer::Pointwork.fmt(f),
            Self::Ovs => Peer::Ovs.fmt(f),
            Self::Direct => f.pad("QEMU socket"),
            Self::Loopback => f.pad("loopback"),
        }
    }
}

/// One transfer.
#[derive(Clone, Debug, Serialize)]
pub struct Transfer {
    way: Way,
    round: u32,
    /// The second guest sends.
    reverse: bool,
    rules: Vec<String>,
    /// Payload that arrived.
    bits_per_second: f64,
    /// TCP segments sent again.
    retransmits: Option<u64>,
    /// What the switch did, if there was one; acknowledgements are packets too.
    packets: Option<u64>,
    /// Processors that the switch had, all its threads together: guests use the same ones, so its own count of busy cycles
    /// would say nothing.
    switch_processors: Option<f64>,
}

impl fmt::Display for Transfer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let arrow = if self.reverse { "←" } else { "→" };
        let Self { way, round, .. } = self;
        write!(f, "{ROW:<40} {arrow} {round:>2} {way:<12} {:>8.1} Mbit/s", self.bits_per_second / 1e6)?;
        if let Some(share) = self.switch_processors {
            write!(f, ", {:>3.0} % of a processor", 100.0 * share)?;
        }
        match self.retransmits {
            Some(count) if count > 0 => write!(f, ", {count} segments sent again"),
            _ => Ok(()),
        }
    }
}

/// Boots two guests and measures all ways in turn; `done` gets each transfer.
///
/// # Errors
/// If a part does not start, the guests do not reach each other, or nothing arrives.
pub fn run(peers: &[Peer], cpu: usize, rounds: u32, mut done: impl FnMut(Transfer)) -> Result<()> {
    let dir = WorkDir::new()?;
    let mut ours =
        peers.contains(&Peer::Pointwork).then(|| Pointwork::bridge(cpu, None, &dir)).transpose()?;
    let mut ovs = peers.contains(&Peer::Ovs).then(|| OvsDpdk::start(false, None, cpu)).transpose()?;
    if let Some(ovs) = &mut ovs {
        ovs.resume_normal()?;
    }
    let ways: Vec<Way> = Way::ALL
        .into_iter()
        .filter(|way| match way {
            Way::Pointwork => ours.is_some(),
            Way::Ovs => ovs.is_some(),
            Way::Direct | Way::Loopback => true,
        })
        .collect();
    let [ours_at, ovs_at] = [ours.as_ref().map(Switch::sockets), ovs.as_ref().map(Switch::sockets)];
    let nic = |way: &Way, guest: usize| {
        let at = |sockets: &Option<Vec<Socket>>| sockets.as_ref().map(|sockets| sockets[guest].path.clone());
        match way {
            Way::Pointwork => at(&ours_at).map(Nic::connect),
            Way::Ovs => at(&ovs_at).map(Nic::listen),
            Way::Direct => {
                Some(Nic::on(NicBackend::Stream { socket: dir.path("cable"), listen: guest == 0 }))
            }
            Way::Loopback => None,
        }
    };
    let config = |name: &str, guest| {
        let nics = ways.iter().filter_map(|way| nic(way, guest)).collect();
        GuestConfig { name: name.into(), nics, ..GuestConfig::default() }
    };
    let guests = Guest::start_all([config("vm1", 0), config("vm2", 1)], &dir)?;
    // The switch's processor too: a guest is not kept off one that the switch leaves free.
    guests.iter().try_for_each(|guest| use_all_processors(guest.pid()))?;
    let a = &guests[0];
    for (index, way) in ways.iter().filter(|&&way| way != Way::Loopback).enumerate() {
        for (guest, last) in guests.iter().zip(1..) {
            let address = format!("10.0.{}.{last}/24", *way as u8);
            guest.sh(&format!("ip addr add {address} dev eth{index} && ip link set eth{index} up"))?;
        }
        a.wait_reachable(way.server(), REACH)?;
    }
    guests.iter().try_for_each(Guest::iperf3_server)?;
    pause(&ovs, true)?;
    for round in 1..=rounds.min(ROUNDS) {
        for &way in &ways {
            pause(&ovs, way != Way::Ovs)?;
            // Both ends of a loopback are alike.
            let directions: &[bool] = if way == Way::Loopback { &[false] } else { &[false, true] };
            for &reverse in directions {
                let mut switch: Option<&mut dyn Switch> = match way {
                    Way::Pointwork => ours.as_mut().map(|switch| switch as _),
                    Way::Ovs => ovs.as_mut().map(|switch| switch as _),
                    Way::Direct | Way::Loopback => None,
                };
                let what = || format!("by {way}, round {round}");
                done(transfer(a, way, round, reverse, &mut switch).with_context(what)?);
            }
        }
    }
    // Who ends while it is halted does not say good-bye.
    pause(&ovs, false)
}

fn pause(ovs: &Option<OvsDpdk>, pause: bool) -> Result<()> {
    ovs.as_ref().map_or(Ok(()), |ovs| ovs.pause(pause))
}

fn transfer(
    client: &Guest,
    way: Way,
    round: u32,
    reverse: bool,
    switch: &mut Option<&mut dyn Switch>,
) -> Result<Transfer> {
    let mut before = None;
    if let Some(switch) = switch {
        switch.begin()?;
        before = Some((Instant::now(), run_time(switch.pid()?)?));
    }
    let options = IperfOptions { seconds: SECONDS, reverse, ..IperfOptions::default() };
    let result = client.iperf3(way.server(), &options)?;
    ensure!(result.bits_per_second > 0.0, "nothing has arrived");
    let (mut packets, mut switch_processors) = (None, None);
    if let (Some(switch), Some((start, then))) = (switch.as_mut(), before) {
        let spent = run_time(switch.pid()?)?.saturating_sub(then);
        switch_processors = Some(spent.as_secs_f64() / start.elapsed().as_secs_f64());
        packets = Some(switch.end()?.packets);
    }
    Ok(Transfer {
        way,
        round,
        reverse,
        rules: switch.as_ref().map_or_else(Vec::new, |switch| switch.rules().to_vec()),
        bits_per_second: result.bits_per_second,
        retransmits: result.retransmits,
        packets,
        switch_processors,
    })
}

/// Lets all threads of a process run wherever this machine lets any.
fn use_all_processors(process: u32) -> Result<()> {
    let mut all = CpuSet::new();
    (0..CpuSet::MAX_CPU).for_each(|cpu| all.set(cpu));
    for task in std::fs::read_dir(format!("/proc/{process}/task"))? {
        let task = task?.file_name().into_string().ok().and_then(|name| Pid::from_raw(name.parse().ok()?));
        sched_setaffinity(Some(task.context("unreadable /proc/PID/task")?), &all)?;
    }
    Ok(())
}

/// A table of all transfers.
pub struct Table<'a>(pub &'a [Transfer]);

impl fmt::Display for Table<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(
            f,
            "{ROW}: TCP, {SECONDS} s each way in each round, switches as they come; rate x: ours over theirs\n"
        )?;
        writeln!(
            f,
            "{:<12} {:>10} {:>10} {:>19} {:>15} {:>12}",
            "BY", "MBIT/S →", "MBIT/S ←", "RATE X", "OF A PROCESSOR", "SENT AGAIN"
        )?;
        let rates: BTreeMap<(u32, bool), f64> = self
            .0
            .iter()
            .filter(|transfer| transfer.way == Way::Pointwork)
            .map(|transfer| ((transfer.round, transfer.reverse), transfer.bits_per_second))
            .collect();
        for way in Way::ALL {
            let of = || self.0.iter().filter(move |transfer| transfer.way == way);
            if of().next().is_none() {
                continue;
            }
            let text = |values: Spread, scale: f64, digits: usize| match values.0 {
                Some([median, ..]) => format!("{:.digits$}", median * scale),
                None => "–".into(),
            };
            let rate = |reverse| {
                let there = of().filter(move |transfer| transfer.reverse == reverse);
                text(Spread::of(there.map(|transfer| transfer.bits_per_second)), 1e-6, 0)
            };
            let ratios = of().filter_map(|transfer| {
                let ours = rates.get(&(transfer.round, transfer.reverse))?;
                (way != Way::Pointwork).then(|| ours / transfer.bits_per_second)
            });
            let processors = of().filter_map(|transfer| transfer.switch_processors);
            writeln!(
                f,
                "{way:<12} {:>10} {:>10} {:>19} {:>14}% {:>12}",
                rate(false),
                rate(true),
                Spread::of(ratios),
                text(Spread::of(processors), 100.0, 0),
                of().filter_map(|transfer| transfer.retransmits).sum::<u64>(),
            )?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn transfer(way: Way, round: u32, reverse: bool, megabits: f64) -> Transfer {
        Transfer {
            way,
            round,
            reverse,
            rules: Vec::new(),
            bits_per_second: megabits * 1e6,
            retransmits: Some(1),
            packets: None,
            switch_processors: None,
        }
    }

    #[test]
    fn ratios_are_taken_by_round_and_direction() {
        let transfers = [
            transfer(Way::Pointwork, 1, false, 300.0),
            transfer(Way::Pointwork, 1, true, 200.0),
            transfer(Way::Ovs, 1, false, 100.0),
            transfer(Way::Ovs, 1, true, 200.0),
            transfer(Way::Loopback, 1, false, 600.0),
        ];
        let text = Table(&transfers).to_string();
        let line = |name| -> Vec<&str> {
            text.lines().find(|line| line.starts_with(name)).unwrap_or_default().split_whitespace().collect()
        };
        assert_eq!(line("pointwork")[1..4], ["300", "200", "–"]);
        assert_eq!(line("OVS-DPDK")[1..5], ["100", "200", "2.00", "(1.00–3.00)"]);
        assert_eq!(line("loopback")[1..5], ["600", "–", "0.50", "(0.50–0.50)"]);
        assert_eq!(line("OVS-DPDK").last(), Some(&"2"));
        assert!(line("QEMU").is_empty());
    }
}
