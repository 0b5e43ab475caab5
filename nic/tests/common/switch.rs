//! QEMU's switch with its driver, and what tests do with both.

use std::collections::BTreeMap;
use std::time::Instant;

use anyhow::{Context, Result, ensure};
use nic::io::PacketIo;
use nic::offload::{Event, FlowOffload, FlowRule, OpError, PortMap, RuleId, Token};
use nic::rocker::{self, Config, RockerFlows, RockerPorts};
use serde_json::{Value, json};
use switch_core::action::{Action, FieldSet, PortRef, SetGroup};
use switch_core::flow::Match;
use switch_core::key::{Field, VLAN_PRESENT};
use switch_core::packet::PortId;

use super::{Machine, frame, until};

pub const A: u64 = 0x0200_0000_000a;
pub const B: u64 = 0x0200_0000_000b;
pub const ARP: u16 = 0x0806;
/// An ethertype without a meaning (802, local experimental).
pub const EXPERIMENT: u16 = 0x88b5;

/// A switch and its two halves.
pub struct Switch {
    pub ports: RockerPorts,
    pub flows: RockerFlows,
    pub machine: Machine,
    pub map: PortMap,
    pub next: u64,
    /// How each operation ended.
    pub done: BTreeMap<u64, Result<(), OpError>>,
    /// What rules have answered: rule and packets.
    pub stats: Vec<(u64, u64)>,
    pub resets: usize,
}

/// The switch-core port that stands for a port of the switch.
pub fn port(number: u32) -> PortId {
    PortId { slot: number + 100, generation: 3 }
}

pub fn output(number: u32) -> Action {
    Action::Output(PortRef::Ours(port(number)))
}

pub fn set(field: Field, value: u64) -> Action {
    Action::Set(SetGroup::Eth, vec![FieldSet { field, value: value.into(), mask: (1 << 48) - 1 }])
}

/// A match as Open vSwitch makes it.
pub fn matches(in_port: u32, dst: u64, tci: Option<u16>, eth_type: u16) -> Match {
    let mut matches = Match::default();
    let mut exact = |field, value: u128| {
        matches.key.set(field, value);
        matches.mask.set_exact(field);
    };
    exact(Field::InPort, port(in_port).slot.into());
    exact(Field::RecircId, 0);
    exact(Field::EthDst, dst.into());
    exact(Field::EthType, eth_type.into());
    exact(Field::VlanTci, tci.map_or(0, |tci| (tci | VLAN_PRESENT).into()));
    exact(Field::VlanTpid, if tci.is_some() { 0x8100 } else { 0 });
    matches
}

impl Switch {
    pub fn start(count: usize, config: Config) -> Result<Switch> {
        let nets: Vec<String> = (0..count).map(|net| format!("n{net}")).collect();
        let device = json!({ "driver": "rocker", "id": "sw", "name": "sw", "addr": "05.0", "ports": nets });
        let machine = Machine::start(count, &[device])?;
        let (ports, flows) = rocker::open(machine.function(5)?, config)?;
        let map = PortMap::new((1..=count as u32).map(|number| (port(number), number)));
        let (done, stats) = (BTreeMap::new(), Vec::new());
        let mut switch = Switch { ports, flows, machine, map, next: 0, done, stats, resets: 0 };
        switch.links_up()?;
        Ok(switch)
    }

    pub fn links_up(&mut self) -> Result<()> {
        let mut events = Vec::new();
        until("links", || {
            self.ports.poll_events(&mut events)?;
            Ok(self.ports.ports().iter().all(|port| port.link.up).then_some(()))
        })
    }

    pub fn poll(&mut self) {
        let mut events = Vec::new();
        self.flows.kick(Instant::now());
        self.flows.poll(Instant::now(), &mut events);
        for event in events {
            match event {
                Event::Done { token, result, .. } => {
                    assert!(self.done.insert(token.0, result).is_none(), "an operation ends once");
                }
                Event::Stats { rule, delta } => self.stats.push((rule.0, delta.packets)),
                Event::Reset => self.resets += 1,
                other => panic!("{other:?}"),
            }
        }
    }

    pub fn wait(&mut self, token: Token) -> Result<Result<(), OpError>> {
        until("an operation", || {
            self.poll();
            Ok(self.done.get(&token.0).cloned())
        })
    }

    pub fn token(&mut self) -> Token {
        self.next += 1;
        Token(self.next)
    }

    pub fn insert(&mut self, rule: u64, matches: &Match, actions: &[Action]) -> Result<Result<(), OpError>> {
        let plan = self.flows.compile(&FlowRule { matches, actions, ports: &self.map });
        let plan = plan.map_err(|refusal| anyhow::anyhow!("{refusal}"))?;
        let token = self.token();
        match self.flows.insert(RuleId(rule), plan, token) {
            Ok(()) => self.wait(token),
            Err(error) => Ok(Err(error)),
        }
    }

    pub fn replace(&mut self, rule: u64, matches: &Match, actions: &[Action]) -> Result<Result<(), OpError>> {
        let plan = self.flows.compile(&FlowRule { matches, actions, ports: &self.map });
        let token = self.token();
        self.flows.replace(RuleId(rule), plan.map_err(|refusal| anyhow::anyhow!("{refusal}"))?, token)?;
        self.wait(token)
    }

    pub fn remove(&mut self, rule: u64) -> Result<Result<(), OpError>> {
        let token = self.token();
        self.flows.remove(RuleId(rule), token)?;
        self.wait(token)
    }

    /// The next frame that comes to the CPU: port, bytes, whether it is a copy.
    pub fn next_for_cpu(&mut self) -> Result<(u32, Vec<u8>)> {
        until("a frame for the CPU", || {
            let mut got = None;
            self.ports.receive(1, &mut |received| got = Some((received.port, received.frame.to_vec())))?;
            Ok(got)
        })
    }

    /// That nothing is on its way to the CPU: a frame that is known to go there arrives first.
    pub fn cpu_is_quiet(&mut self) -> Result<()> {
        let marker = frame(0x0202_0202_0202, A, None, EXPERIMENT, b"marker");
        self.machine.wires[0].send(&marker)?;
        let (_, got) = self.next_for_cpu()?;
        ensure!(got == marker, "a frame came to the CPU: {got:02x?}");
        Ok(())
    }

    /// Sends frames by the first wire, again and again, until so many rules have answered. Copies come to the CPU, and
    /// nothing else does.
    pub fn answers(&mut self, count: usize, frames: &[Vec<u8>]) -> Result<Vec<(u64, u64)>> {
        until("answers", || {
            for frame in frames {
                self.machine.wires[0].send(frame)?;
            }
            self.ports.receive(100, &mut |received| {
                assert!(received.forwarded, "not a copy: {:02x?}", received.frame);
                assert!(frames.iter().any(|frame| frame == received.frame));
            })?;
            self.poll();
            while self.machine.wires[1].try_receive()?.is_some() {}
            Ok((self.stats.len() >= count).then_some(()))
        })?;
        let mut stats = std::mem::take(&mut self.stats);
        stats.sort_unstable();
        Ok(stats)
    }

    /// That a frame is forwarded, with no copy to the CPU any more.
    pub fn is_forwarded_alone(&mut self, one: &[u8]) -> Result<()> {
        let marker = frame(0x0202_0202_0202, A, None, EXPERIMENT, b"no more");
        self.machine.wires[0].send(&marker)?;
        // What was on its way has passed before the marker.
        until("the marker", || {
            let mut found = false;
            self.ports.receive(1, &mut |received| found = received.frame == marker)?;
            Ok(found.then_some(()))
        })?;
        while self.machine.wires[1].try_receive()?.is_some() {}
        self.machine.wires[0].send(one)?;
        assert_eq!(self.machine.wires[1].receive()?, one);
        self.cpu_is_quiet()
    }

    /// Rules of the ACL table, as the switch itself has them: ingress port and hits of each.
    pub fn acl(&mut self) -> Result<Vec<(u64, u64)>> {
        let table = json!({ "name": "sw", "tbl-id": 60 });
        let flows = self.machine.qmp("query-rocker-of-dpa-flows", table)?;
        let flows = flows.as_array().context("flows")?;
        // The two that lead to the CPU have the lowest priorities.
        let rules = flows.iter().filter(|flow| flow["key"]["priority"].as_u64() > Some(1));
        Ok(rules
            .map(|flow| (flow["key"]["in-pport"].as_u64().unwrap_or(0), flow["hits"].as_u64().unwrap_or(0)))
            .collect())
    }

    pub fn groups(&mut self) -> Result<Vec<Value>> {
        let mut all = Vec::new();
        for kind in 0..=8 {
            let of_kind = json!({ "name": "sw", "type": kind });
            let groups = self.machine.qmp("query-rocker-of-dpa-groups", of_kind)?;
            all.extend_from_slice(groups.as_array().context("groups")?);
        }
        Ok(all)
    }
}
