//! What was measured: a line for each measurement, a table of all, and JSON.

use std::collections::BTreeMap;
use std::fmt;

use anyhow::{Result, ensure};
use clap::ValueEnum;
use qemu_tests::load::{Outcome, Sample, cycles_per_second};
use serde::Serialize;

use crate::iperf::{Table, Transfer};
use crate::rows::Row;
use crate::switches::{Spent, Testpmd};

/// Who is measured.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, ValueEnum, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Peer {
    /// pointworkd, with explicit flows.
    Pointwork,
    /// Open vSwitch with DPDK.
    Ovs,
    /// DPDK's vhost port, forwarding from port to port.
    Testpmd,
    /// No switch: long frames are copied from one guest's memory to the other's, which bounds every switch.
    Copy,
}

impl Peer {
    pub const ALL: [Self; 4] = [Self::Pointwork, Self::Ovs, Self::Testpmd, Self::Copy];

    /// Whether the row is one for it.
    pub fn suits(self, row: &Row) -> bool {
        match self {
            Self::Pointwork | Self::Ovs => true,
            Self::Testpmd => Testpmd::suits(row),
            Self::Copy => row.needs_tso(),
        }
    }
}

impl fmt::Display for Peer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Self::Pointwork => "pointwork",
            Self::Ovs => "OVS-DPDK",
            Self::Testpmd => "testpmd io",
            Self::Copy => "memcpy",
        })
    }
}

/// A switch's figures for one row in one round.
#[derive(Clone, Debug, Serialize)]
pub struct Measurement {
    switch: Peer,
    row: &'static str,
    /// Whether rings are packed, or else split.
    packed: bool,
    round: u32,
    rules: Vec<String>,
    packets_per_second: f64,
    bits_per_second: f64,
    /// By the switch's own count of busy cycles and packets.
    cycles_per_packet: f64,
    /// The share of its time in which the switch had something to do; by testpmd's busy cycles and the rate.
    switch_busy: f64,
    load_busy: f64,
    l1_flows: Option<u64>,
    #[serde(skip)]
    masked_share: Option<f64>,
    switch_counts: BTreeMap<String, f64>,
    load: Outcome,
}

impl Measurement {
    pub fn new(
        switch: Peer,
        row: &Row,
        round: u32,
        rules: &[String],
        sample: Sample,
        spent: Spent,
        load: Outcome,
    ) -> Self {
        let busy = spent.busy_cycles as f64;
        let all = match spent.idle_cycles {
            Some(idle) => busy + idle as f64,
            None => sample.seconds * cycles_per_second(),
        };
        Self {
            switch,
            row: row.name,
            packed: row.packed,
            round,
            rules: rules.to_vec(),
            packets_per_second: sample.packets_per_second(),
            bits_per_second: sample.bits_per_second(),
            cycles_per_packet: busy / spent.packets.max(1) as f64,
            switch_busy: (busy / all.max(1.0)).min(1.0),
            load_busy: sample.busy(),
            l1_flows: spent.l1_flows,
            masked_share: spent.masked_share,
            switch_counts: spent.more,
            load,
        }
    }

    /// That it was what it is said to be.
    pub fn check(&self, row: &Row) -> Result<()> {
        let load = &self.load;
        let first = load.first_wrong.as_deref().unwrap_or_default();
        ensure!(load.wrong == 0 && load.disordered == 0, "packets are not as they should be: {first}");
        if let Some(l1) = self.l1_flows.filter(|_| row.fits()) {
            let flows = 2 * u64::from(row.rules.told_apart(&row.traffic));
            ensure!(l1 == flows, "{l1} flows in the exact-match table, and {flows} were sent");
        }
        if row.tunnel.is_some() && self.switch == Peer::Pointwork {
            let share = self.switch_counts.get("share of l1 hits").copied().unwrap_or(0.0)
                + self.masked_share.unwrap_or(0.0);
            ensure!(share > 0.99, "workers have carried {:.1} % of the packets only", 100.0 * share);
        }
        if let Some(share) = self.masked_share.filter(|_| row.masked) {
            ensure!(share > 0.95, "the masked table has found {:.1} % of the packets only", 100.0 * share);
        }
        Ok(())
    }

    /// The load is what keeps the rate down: the switch is to be judged by its cycles.
    fn limited_by_load(&self) -> bool {
        self.load_busy > 0.95 && self.switch_busy < 0.95
    }
}

impl fmt::Display for Measurement {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "{:<42} {:>2} {:<10} {:>7.3} Mpps {:>7.2} Gbit/s {:>8.0} cycles/packet, busy {:>3.0} %, load {:>3.0} %{}",
            self.row,
            self.round,
            self.switch,
            self.packets_per_second / 1e6,
            self.bits_per_second / 1e9,
            self.cycles_per_packet,
            100.0 * self.switch_busy,
            100.0 * self.load_busy,
            if self.limited_by_load() { " (the limit)" } else { "" },
        )?;
        if let Some(l1) = self.l1_flows {
            write!(f, ", L1 {l1}")?;
        }
        if self.load.lost != 0 {
            write!(f, ", {} lost of {}", self.load.lost, self.load.sent)?;
        }
        let times = self.load.latency;
        if times.count == 0 {
            return Ok(());
        }
        write!(f, ", {:.1}/{:.1}/{:.1} µs", times.median, times.p99, times.p999)
    }
}

/// All of a run.
#[derive(Debug, Serialize)]
pub struct Report {
    processor: String,
    processors: [usize; 2],
    versions: BTreeMap<&'static str, String>,
    rounds: u32,
    seconds: f64,
    measurements: Vec<Measurement>,
    transfers: Vec<Transfer>,
}

impl Report {
    pub fn new(processors: [usize; 2], rounds: u32, seconds: f64) -> Self {
        let info = std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
        let model = info.lines().find_map(|line| line.strip_prefix("model name")?.split_once(": "));
        let first_line = |program: &str| {
            let output = std::process::Command::new(program).arg("--version").output().ok()?;
            String::from_utf8(output.stdout).ok()?.lines().next().map(str::to_owned)
        };
        let ovs = first_line("/usr/lib/openvswitch-switch-dpdk/ovs-vswitchd-dpdk");
        let versions = [("pointwork", Some(env!("CARGO_PKG_VERSION").to_owned())), ("OVS-DPDK", ovs)];
        Self {
            processor: model.map_or_else(|| "unknown".into(), |(_, name)| name.to_owned()),
            processors,
            versions: versions.into_iter().filter_map(|(name, version)| Some((name, version?))).collect(),
            rounds,
            seconds,
            measurements: Vec::new(),
            transfers: Vec::new(),
        }
    }

    pub fn add(&mut self, measurement: Measurement) {
        self.measurements.push(measurement);
    }

    pub fn add_transfer(&mut self, transfer: Transfer) {
        self.transfers.push(transfer);
    }

    /// The rows, in the order in which they were run.
    fn rows(&self) -> Vec<&'static str> {
        let mut rows: Vec<&str> = Vec::new();
        for measurement in &self.measurements {
            if !rows.contains(&measurement.row) {
                rows.push(measurement.row);
            }
        }
        rows
    }

    fn of(&self, row: &str, switch: Peer) -> Vec<&Measurement> {
        self.measurements.iter().filter(|m| m.row == row && m.switch == switch).collect()
    }

    /// What the peer needs of ours, round by round: its value over ours, or ours over its.
    fn ratios(&self, row: &str, peer: Peer, ratio: impl Fn(&Measurement, &Measurement) -> f64) -> Spread {
        let ours = self.of(row, Peer::Pointwork);
        let theirs = self.of(row, peer);
        let in_round = |m: &&Measurement| Some(ratio(ours.iter().find(|our| our.round == m.round)?, m));
        Spread::of(theirs.iter().filter_map(in_round))
    }
}

/// Median, least and greatest.
pub struct Spread(pub Option<[f64; 3]>);

impl Spread {
    pub fn of(values: impl Iterator<Item = f64>) -> Self {
        let mut values: Vec<f64> = values.filter(|value| value.is_finite()).collect();
        values.sort_by(f64::total_cmp);
        let ends = values.first().copied().zip(values.last().copied());
        Self(ends.map(|(least, greatest)| [median(&values), least, greatest]))
    }
}

fn median(sorted: &[f64]) -> f64 {
    let middle = sorted.len() / 2;
    if sorted.len() % 2 == 1 { sorted[middle] } else { (sorted[middle - 1] + sorted[middle]) / 2.0 }
}

impl fmt::Display for Spread {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let text = match self.0 {
            Some([median, least, greatest]) => format!("{median:.2} ({least:.2}–{greatest:.2})"),
            None => "–".into(),
        };
        f.pad(&text)
    }
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let [load, switch] = self.processors;
        writeln!(f, "{}: load on processor {load}, switch on {switch}", self.processor)?;
        for (name, version) in &self.versions {
            writeln!(f, "{name}: {version}")?;
        }
        writeln!(
            f,
            "medians of {} rounds of {} s; ratios by round, least and greatest",
            self.rounds, self.seconds
        )?;
        if !self.measurements.is_empty() {
            self.write_rows(f)?;
        }
        if !self.transfers.is_empty() {
            writeln!(f, "\n{}", Table(&self.transfers))?;
        }
        Ok(())
    }
}

impl Report {
    fn write_rows(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "cycles x: theirs over ours, busy cycles a packet; rate x: ours over theirs\n")?;
        writeln!(
            f,
            "{:<42} {:<10} {:>8} {:>8} {:>7} {:>5} {:>5} {:>19} {:>19} {:>9} {:>7} {:>13}",
            "ROW",
            "SWITCH",
            "MPPS",
            "GBIT/S",
            "CYCLES",
            "BUSY",
            "LOAD",
            "CYCLES X",
            "RATE X",
            "L1 FLOWS",
            "LOST",
            "µs 50/99 %"
        )?;
        for row in self.rows() {
            for peer in Peer::ALL {
                let of = self.of(row, peer);
                if of.is_empty() {
                    continue;
                }
                let median = |value: fn(&Measurement) -> f64| {
                    Spread::of(of.iter().map(|m| value(m))).0.map_or(f64::NAN, |[median, ..]| median)
                };
                let cycles =
                    self.ratios(row, peer, |our, their| their.cycles_per_packet / our.cycles_per_packet);
                let rate =
                    self.ratios(row, peer, |our, their| our.packets_per_second / their.packets_per_second);
                let blank = peer == Peer::Pointwork;
                let ratio = |spread: Spread| if blank { String::new() } else { spread.to_string() };
                writeln!(
                    f,
                    "{row:<42} {peer:<10} {:>8.3} {:>8.2} {:>7.0} {:>4.0}% {:>4.0}% {:>19} {:>19} {:>9} {:>7} {:>13}{}",
                    median(|m| m.packets_per_second) / 1e6,
                    median(|m| m.bits_per_second) / 1e9,
                    median(|m| m.cycles_per_packet),
                    100.0 * median(|m| m.switch_busy),
                    100.0 * median(|m| m.load_busy),
                    ratio(cycles),
                    ratio(rate),
                    of[0].l1_flows.map_or_else(|| "–".into(), |flows| flows.to_string()),
                    of.iter().map(|m| m.load.lost).sum::<i64>(),
                    match peer {
                        Peer::Copy => "–".into(),
                        _ => {
                            format!(
                                "{:.1}/{:.1}",
                                median(|m| m.load.latency.median),
                                median(|m| m.load.latency.p99)
                            )
                        }
                    },
                    if of.iter().any(|m| m.limited_by_load()) {
                        "  load is the limit: go by cycles"
                    } else {
                        ""
                    },
                )?;
            }
        }
        writeln!(f, "\nRules from the first port to the second (back likewise; all are in the JSON):")?;
        // Rows that differ in their traffic only have the same.
        let mut shown: Vec<(Vec<&str>, Vec<&[String]>)> = Vec::new();
        for row in self.rows() {
            let rules = |peer| self.of(row, peer).first().map(|m| &m.rules[..m.rules.len() / 2]);
            let rules: Vec<&[String]> = [Peer::Pointwork, Peer::Ovs].into_iter().filter_map(rules).collect();
            match shown.iter_mut().find(|(_, same)| *same == rules) {
                Some((rows, _)) => rows.push(row),
                None => shown.push((vec![row], rules)),
            }
        }
        const SHOWN: usize = 3;
        for (rows, rules) in shown {
            writeln!(f, "{}", rows.join("; "))?;
            for one_way in rules {
                for rule in one_way.iter().take(SHOWN) {
                    writeln!(f, "  {rule}")?;
                }
                if one_way.len() > SHOWN {
                    writeln!(f, "  … and {} more", one_way.len() - SHOWN)?;
                }
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_spread_is_median_and_ends() {
        assert_eq!(Spread::of([3.0, 1.0, 2.0].into_iter()).to_string(), "2.00 (1.00–3.00)");
        assert_eq!(Spread::of([4.0, 1.0].into_iter()).to_string(), "2.50 (1.00–4.00)");
        assert_eq!(Spread::of([f64::NAN].into_iter()).to_string(), "–");
    }
}
