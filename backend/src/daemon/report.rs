//! What the daemon tells about itself: `show`, `stats`, `dump-flows`.

use super::ovs::Ovs;
use super::ports::{Port, Side};
use super::{Daemon, explicit::flow_id, lock};
use crate::clock;
use crate::control::protocol::{
    self, Flow, FlowCounts, FlowSource, Flows, MAX_PUNTS, MemoryShow, NicPortShow, NicShow, OffloadShow,
    OffloadStats, Paths, PolledQueue, PortShow, PortState, PortStats, Punted, QueueStats, Show, Stats,
    WorkerShow, WorkerStats,
};
use crate::counters::{Count, Drops, PortCounters, WorkerCounters};
use crate::nic::{Nic, NicPort};
use crate::numa;
use crate::offload::NicReport;
use crate::port_config::{Kind, KindName, NicPlace, Socket, XdpDevice};
use crate::vhost::PortShared;
use crate::virtio::Placement;
use crate::wire::Wire;
use crate::worker::port::WorkerPort;
use anyhow::{Context, Result};
use nic::offload::Counts;
use std::collections::BTreeSet;
use std::sync::Arc;
use switch_core::drop::DropReason;
use switch_core::flow::{FlowSpec, Source, Ufid};
use switch_core::key::Field;
use switch_core::odp;
use switch_core::packet::PortId;
use switch_core::slab::Disposition;
use switch_core::tables::PathStats;

/// How busy the workers were, from one look to the next.
#[derive(Default)]
pub struct Load {
    /// Cycles, and cycles awake by worker.
    then: (u64, Vec<u64>),
    asleep: Vec<f64>,
}

/// Shortest time between looks, in microseconds: what happened in less says little.
const LOOK_MICROS: u64 = 1_000_000;

impl Load {
    fn look(&mut self, awake: Vec<u64>) -> &[f64] {
        let now = clock::cycles();
        let elapsed = now.saturating_sub(self.then.0);
        if self.asleep.is_empty() || elapsed > LOOK_MICROS * clock::cycles_per_micro() {
            let share = |(i, &awake): (usize, &u64)| {
                let before = self.then.1.get(i).copied().unwrap_or(0);
                (1.0 - awake.saturating_sub(before) as f64 / elapsed.max(1) as f64).clamp(0.0, 1.0)
            };
            self.asleep = awake.iter().enumerate().map(share).collect();
            self.then = (now, awake);
        }
        &self.asleep
    }
}

fn sum(counters: &[Arc<PortCounters>], count: impl Fn(&PortCounters) -> &Count) -> u64 {
    counters.iter().map(|counters| count(counters).get()).sum()
}

fn sum_drops(
    counters: &[Arc<PortCounters>],
    drops: impl Fn(&PortCounters) -> &Drops,
) -> std::collections::BTreeMap<String, u64> {
    let mut totals = [0; DropReason::COUNT];
    counters.iter().for_each(|counters| drops(counters).sum_into(&mut totals));
    protocol::drops(&totals)
}

fn port_stats(c: &[Arc<PortCounters>]) -> PortStats {
    PortStats {
        rx_packets: sum(c, |c| &c.rx_packets),
        rx_bytes: sum(c, |c| &c.rx_bytes),
        tx_packets: sum(c, |c| &c.tx_packets),
        tx_bytes: sum(c, |c| &c.tx_bytes),
        rx_forwarded: sum(c, |c| &c.rx_forwarded),
        rx_to_host: sum(c, |c| &c.rx_to_host),
        rx_drops: sum_drops(c, |c| &c.rx_drops),
        tx_drops: sum_drops(c, |c| &c.tx_drops),
        host_drops: sum_drops(c, |c| &c.host_drops),
        fast_copies: sum(c, |c| &c.fast_copies),
        host_copies: sum(c, |c| &c.host_copies),
        ring_faults: sum(c, |c| &c.ring_faults),
    }
}

fn paths(stats: &PathStats) -> Paths {
    Paths {
        l1: stats.l1_hits,
        l2: stats.l2_hits,
        miss: stats.misses,
        punt: stats.punts + stats.unparsable,
        keepalive: stats.keepalives,
    }
}

impl Port {
    /// What was counted of it: by the workers, and by the kernel or the NIC that had packets for them.
    pub(super) fn stats(&self) -> PortStats {
        let mut stats = port_stats(&self.datapath.counters);
        let mut add = |losses: &[(DropReason, u64)]| {
            for &(reason, lost) in losses.iter().filter(|(_, lost)| *lost > 0) {
                stats.rx_packets += lost;
                *stats.rx_drops.entry(reason.name().to_owned()).or_default() += lost;
            }
        };
        match &self.side {
            Side::Guest(_) => {}
            Side::Wire(wire) => add(&wire.shared().losses().received()),
            Side::Nic(port) => add(&port.shared().losses().received()),
        }
        stats
    }
}

/// What `show` says of a guest.
fn guest(shared: &PortShared, fault: Option<String>, socket: &Socket, mtu: u32) -> PortShow {
    PortShow {
        kind: KindName::VhostUser,
        state: match (&fault, shared.is_connected()) {
            (Some(_), true) => PortState::Faulted,
            (_, true) => PortState::Connected,
            (_, false) => PortState::Waiting,
        },
        link: shared.link_up(),
        socket: socket.path.display().to_string(),
        mode: socket.mode,
        active_queues: shared.queues() as u16,
        features: crate::vhost::feature_names(shared.features()),
        mtu,
        fault,
        ..PortShow::default()
    }
}

impl Port {
    /// What it costs in memory, with so many bytes of tables.
    fn memory(&self, tables: u64) -> MemoryShow {
        let queues = self.config.queues().into();
        let (each, shared) = WorkerPort::bytes(queues);
        let own = (each * self.datapath.counters.len() + shared) as u64;
        let frames = match &self.side {
            Side::Guest(_) | Side::Nic(_) => 0,
            Side::Wire(wire) => wire.shared().memory(),
        };
        let Placement { shared: guest, used, page, nodes } = self.placement().unwrap_or_default();
        MemoryShow { tables, queues: own + frames, guest, used, page, nodes }
    }

    /// Where its guest's memory is.
    fn placement(&self) -> Option<Placement> {
        match &self.side {
            Side::Guest(vhost) => lock(vhost).shared().placement(),
            Side::Wire(_) | Side::Nic(_) => None,
        }
    }
}

/// Which workers look for a guest's packets on another NUMA node than theirs. `nodes` are the workers'.
fn far_memory(name: &str, placement: &Placement, polled_by: &[usize], nodes: &[Option<u32>]) -> Vec<String> {
    let Some(memory) = numa::mostly(&placement.nodes) else { return Vec::new() };
    let is_far = |worker: &usize| nodes.get(*worker).copied().flatten().is_some_and(|node| node != memory);
    let far: BTreeSet<usize> = polled_by.iter().copied().filter(is_far).collect();
    let line = |worker: usize| {
        let node = nodes[worker].unwrap_or_default();
        format!(
            "port '{name}': its guest's memory is on NUMA node {memory}, worker {worker}, which polls it, on node {node}: each packet \
             crosses between them"
        )
    };
    far.into_iter().map(line).collect()
}

/// What `show` says of a wire's device.
fn device_show(wire: &Wire, device: &XdpDevice) -> PortShow {
    let (status, shared) = (wire.status(), wire.shared());
    PortShow {
        kind: KindName::Xdp,
        state: match &status.fault {
            None => PortState::Connected,
            Some(_) if status.absent => PortState::Waiting,
            Some(_) => PortState::Faulted,
        },
        link: shared.link_up(),
        device: device.name.clone(),
        active_queues: shared.queues() as u16,
        features: status.features,
        mtu: status.mtu,
        fault: status.fault,
        ..PortShow::default()
    }
}

/// What `show` says of a port of a NIC.
fn nic_port(port: &NicPort, place: &NicPlace) -> PortShow {
    let (status, shared) = (port.status(), port.shared());
    PortShow {
        kind: KindName::Nic,
        state: match &status.fault {
            None => PortState::Connected,
            Some(_) if status.absent => PortState::Waiting,
            Some(_) => PortState::Faulted,
        },
        link: shared.link_up(),
        nic: place.to_string(),
        active_queues: shared.queues() as u16,
        mtu: status.mtu,
        fault: status.fault,
        ..PortShow::default()
    }
}

/// What `show` says of a NIC; `port` gives the port of the switch for one of its own.
fn nic(nic: &Nic, port: impl Fn(u32) -> Option<String>) -> NicShow {
    let (config, status) = (nic.config(), nic.status());
    let does = |of: &::nic::io::Port| {
        let all = [("checksum", of.send.checksum), ("tso", of.send.tso), ("vlan", of.tags)];
        all.into_iter().filter(|(_, can)| *can).map(|(what, _)| what.to_owned()).collect()
    };
    let show = |of: &::nic::io::Port| NicPortShow {
        number: of.number,
        name: of.name.clone(),
        mac: of.mac.map(|byte| format!("{byte:02x}")).join(":"),
        link: of.link.up,
        speed: of.link.speed,
        does: does(of),
        port: port(of.number),
    };
    NicShow {
        name: config.name.clone(),
        address: config.pci.to_string(),
        driver: status.driver.to_owned(),
        tables: status.has_tables,
        offload: config.offload,
        ports: status.ports.iter().map(show).collect(),
        fault: status.fault,
        resets: status.resets,
        forwarded: status.forwarded,
        unclaimed: status.unclaimed,
    }
}

/// What `show` says of a NIC's tables.
fn offload_show(nic: NicReport) -> OffloadShow {
    let NicReport { name, rules, max_rules, groups, operations, resets, waiting, reasons, .. } = nic;
    OffloadShow { nic: name, rules, max_rules, groups, operations, resets, waiting, not_offloaded: reasons }
}

/// What `stats` says of what a NIC has carried.
fn offload_stats(nic: NicReport) -> (String, OffloadStats) {
    let Counts { packets, bytes } = nic.carried;
    (nic.name, OffloadStats { packets, bytes, estimated: nic.estimated })
}

/// What deleted ports have counted, so that sums over all ports go on to balance.
#[derive(Default)]
pub struct Gone {
    ports: PortStats,
    paths: Paths,
}

impl Gone {
    /// Takes over the counters of a port that nobody uses any more.
    pub fn add(&mut self, port: &PortStats, stats: &PathStats) {
        self.ports.add(port);
        self.paths.add(&paths(stats));
    }
}

impl Daemon {
    pub(super) fn show(&mut self) -> Show {
        let macs = self.host.as_ref().map(|host| host.macs()).unwrap_or_default();
        let losing = self.host.as_ref().map(|host| host.losing()).unwrap_or_default();
        let awake: Vec<u64> =
            self.datapath.worker_counters.iter().map(|c| c.busy_cycles.get() + c.idle_cycles.get()).collect();
        let asleep = self.load.look(awake).to_vec();
        let nics = self.nics.iter().map(|(name, of)| {
            nic(of, |number| {
                let place = Kind::Nic(NicPlace { nic: name.clone(), port: number });
                self.ports
                    .values()
                    .find(|port| port.config.kind == place)
                    .map(|port| port.config.name.clone())
            })
        });
        let nics = nics.collect();
        // The mirror locks the flows to answer, and NICs may wait for who puts flows into them, so they are asked before the
        // flows are locked here.
        let ovs = self.ovs.as_ref().map(Ovs::show);
        let offload = self.offload_reports().into_iter().map(offload_show).collect();
        let unsent: Vec<(&String, u64)> = self
            .ports
            .iter()
            .filter_map(|(name, port)| match &port.side {
                Side::Nic(port) => Some((name, port.shared().losses().unsent)),
                Side::Guest(_) | Side::Wire(_) => None,
            })
            .filter(|&(_, unsent)| unsent > 0)
            .collect();
        let flows = lock(&self.datapath.flows);
        let mut counts = FlowCounts::default();
        let mut by_slot = std::collections::HashMap::<PortId, u64>::new();
        for flow in flows.iter() {
            match flow.source {
                Source::Explicit => counts.explicit += 1,
                Source::Learned => counts.learned += 1,
            }
            *by_slot.entry(flow.port).or_default() += 1;
        }
        let port = |port: &Port| {
            let id = port.datapath.id;
            let side = match (&port.side, &port.config.kind) {
                (Side::Guest(vhost), Kind::VhostUser(socket)) => {
                    guest(lock(vhost).shared(), lock(&port.fault).clone(), socket, port.mtu)
                }
                (Side::Wire(wire), Kind::Xdp(device)) => device_show(wire, device),
                (Side::Nic(port), Kind::Nic(place)) => nic_port(port, place),
                // A port's side is made by its kind.
                _ => PortShow::default(),
            };
            PortShow {
                name: port.config.name.clone(),
                slot: id.slot,
                queues: port.config.queues(),
                vlan: port.config.vlan_mode().to_string(),
                flows: by_slot.get(&id).copied().unwrap_or(0),
                masks: flows.masks(id) as u32,
                memory: port.memory(flows.bytes(id)),
                macs: macs.iter().find(|(port, _)| *port == id).map_or(0, |(_, n)| *n as u32),
                ..side
            }
        };
        let there = self.workers();
        let queues = |port: &Port, worker: usize| {
            let polled = port.datapath.polled_by.iter().enumerate().filter(|(_, by)| **by == worker);
            let queue = |(queue, _): (usize, _)| PolledQueue {
                port: port.config.name.clone(),
                queue: queue as u16,
                pinned: port.config.pinned_to(queue, there).is_some(),
            };
            polled.map(queue).collect::<Vec<_>>()
        };
        let worker = |(id, cpu): (usize, &Option<usize>)| WorkerShow {
            id: id as u32,
            cpu: cpu.map(|cpu| cpu as u32),
            ports: self
                .ports
                .values()
                .filter(|port| port.datapath.polled_by.contains(&id))
                .map(|port| port.config.name.clone())
                .collect(),
            queues: self.ports.values().flat_map(|port| queues(port, id)).collect(),
            asleep: asleep.get(id).copied().unwrap_or(0.0),
            node: cpu.and_then(numa::node_of),
            memory: self.datapath.worker_bytes.get(id).copied().unwrap_or(0),
        };
        let mut all_paths = self.gone.paths;
        let tunnels = self.tunnels.values().map(|tunnel| tunnel.id);
        for id in self.ports.values().map(|port| port.datapath.id).chain(tunnels) {
            all_paths.add(&paths(&flows.paths(id)));
        }
        let mut punts: Vec<Punted> = flows
            .punts()
            .into_iter()
            .map(|(reason, (packets, flows))| Punted { reason, packets, flows })
            .collect();
        punts.sort_by_key(|punt| std::cmp::Reverse((punt.packets, punt.flows)));
        punts.truncate(MAX_PUNTS);
        let mut warnings = self.state.warnings();
        warnings.extend(unsent.into_iter().map(|(name, unsent)| {
            format!(
                "port '{name}': {unsent} packets that are counted as sent could not be sent by the NIC, or were not sent yet when \
                 it was reset or closed"
            )
        }));
        warnings.extend(self.ovs.iter().flat_map(Ovs::warnings));
        let nodes: Vec<Option<u32>> =
            self.datapath.cpus.iter().map(|cpu| cpu.and_then(numa::node_of)).collect();
        for (name, port) in &self.ports {
            if let Side::Wire(wire) = &port.side {
                let lines = wire.status().warnings.into_iter();
                warnings.extend(lines.map(|warning| format!("port '{name}': {warning}")));
            }
            if let Some(placement) = port.placement() {
                warnings.extend(far_memory(name, &placement, &port.datapath.polled_by, &nodes));
            }
            if let Err(invalid) = port.config.check_workers(there) {
                warnings.push(format!("{invalid}: its workers are chosen automatically"));
            }
            let reasons = losing.iter().filter(|(id, _)| *id == port.datapath.id);
            warnings.extend(reasons.map(|(_, why)| format!("port '{name}': {why}")));
        }
        for (flow, explicit) in &self.explicit {
            if let Err(reason) = &explicit.installed {
                warnings.push(format!("explicit flow {flow} waits: {reason}"));
            }
        }
        Show {
            version: env!("CARGO_PKG_VERSION").into(),
            uptime: self.started.elapsed().as_secs_f64(),
            host: self.config.host.to_string(),
            workers: self.datapath.cpus.iter().enumerate().map(worker).collect(),
            spread: self.spread.show(self.config.datapath.rebalance),
            ports: self.ports.values().map(port).collect(),
            tunnels: self.show_tunnels(&flows, |id| by_slot.get(&id).copied().unwrap_or(0)),
            nics,
            flows: counts,
            paths: all_paths,
            punts,
            ovs,
            offload,
            warnings,
        }
    }

    /// How the NICs stand that flows are put into.
    fn offload_reports(&self) -> Vec<NicReport> {
        self.offload.as_ref().map(|manager| manager.nics()).unwrap_or_default()
    }

    /// The port of that name.
    pub(super) fn port(&self, name: &str) -> Result<&Port> {
        self.ports.get(name).with_context(|| format!("there is no port '{name}'"))
    }

    pub(super) fn stats(&self, only: Option<&str>) -> Result<Stats> {
        if let Some(name) = only {
            self.port(name)?;
        }
        let asked = || self.ports.iter().filter(|(name, _)| only.is_none_or(|only| only == *name));
        // The manager locks the flows to answer, and a NIC may be busy being set up, so they are asked before the flows are locked
        // here.
        let offload = self.offload_reports();
        let ports = asked().map(|(name, port)| (name.clone(), port.stats())).collect();
        let flows = lock(&self.datapath.flows);
        let mut stats = Stats { ports, ..Stats::default() };
        for (_, port) in asked() {
            stats.paths.add(&paths(&flows.paths(port.datapath.id)));
        }
        if only.is_none() {
            // What came out of tunnels is counted there.
            for tunnel in self.tunnels.values() {
                stats.paths.add(&paths(&flows.paths(tunnel.id)));
            }
            stats.paths.add(&self.gone.paths);
            stats.deleted = self.gone.ports.clone();
        }
        let shown = || self.ports.values().filter(|port| only.is_none_or(|only| only == port.config.name));
        let queues = |port: &Port, worker: usize| {
            let queue = |(queue, &by): (usize, &usize)| {
                let busy_cycles = port.datapath.counters.get(worker)?.queue_cycles.get(queue)?.get();
                let polled = by == worker;
                let name = port.config.name.clone();
                (polled || busy_cycles > 0).then_some(QueueStats {
                    port: name,
                    queue: queue as u16,
                    polled,
                    busy_cycles,
                })
            };
            port.datapath.polled_by.iter().enumerate().filter_map(queue).collect::<Vec<_>>()
        };
        let worker = |(id, c): (usize, &Arc<WorkerCounters>)| WorkerStats {
            id: id as u32,
            loops: c.loops.get(),
            busy_cycles: c.busy_cycles.get(),
            idle_cycles: c.idle_cycles.get(),
            packets: c.packets.get(),
            cycles_per_packet: c.busy_cycles.get() as f64 / c.packets.get().max(1) as f64,
            bursts: c.bursts.get(),
            burst_sizes: c.burst_sizes.iter().map(Count::get).collect(),
            empty_polls: c.empty_polls.get(),
            sleeps: c.sleeps.get(),
            l1_entries: c.l1_entries.get(),
            queues: shown().flat_map(|port| queues(port, id)).collect(),
        };
        stats.workers = self.datapath.worker_counters.iter().enumerate().map(worker).collect();
        if only.is_none() {
            stats.offload = offload.into_iter().map(offload_stats).collect();
        }
        Ok(stats)
    }

    pub(super) fn dump_flows(&self, port: Option<&str>, source: Option<FlowSource>) -> Result<Flows> {
        let tunnel = |name: &str| self.tunnels.get(name).map(|tunnel| Ok(tunnel.id));
        let id = |name| tunnel(name).unwrap_or_else(|| self.port(name).map(|port| port.datapath.id));
        let only = port.map(id).transpose()?;
        let names = self.names();
        let now = clock::millis();
        let mirrored = self.ovs.as_ref().map(Ovs::report);
        let offload = self.offload.as_ref().map(|manager| manager.flows());
        let flows = lock(&self.datapath.flows);
        let shown = flows.iter().filter(|flow| {
            only.is_none_or(|id| flow.port == id) && source.is_none_or(|source| source == flow.source.into())
        });
        let mut list: Vec<Flow> = shown
            .map(|flow| {
                let stats = flow.stats();
                let offload = offload.as_ref().map(|report| report.get(flow.flow));
                Flow {
                    id: flow_id(flow.flow),
                    ufid: flow.spec.ufid.map(|ufid| ufid.to_string()),
                    source: flow.source.into(),
                    flow: odp::format_flow(&flow.spec.matches, &names),
                    actions: odp::format_actions(&flow.spec.actions, &names),
                    handling: match &flow.disposition {
                        Disposition::Fast(_) => "fast".into(),
                        Disposition::Punt(reason) => format!("punt: {reason}"),
                    },
                    packets: stats.packets,
                    bytes: stats.bytes,
                    tcp_flags: stats.tcp_flags,
                    used_seconds: (stats.last_used != 0)
                        .then(|| now.saturating_sub(stats.last_used) as f64 / 1000.0),
                    estimated: offload.as_ref().is_some_and(|(_, estimated)| *estimated),
                    offloaded: offload.map(|(offloaded, _)| offloaded.to_string()),
                }
            })
            .collect();
        // Explicit flows that wait for a port belong to no ingress that is there.
        if only.is_none() && source.is_none_or(|source| source == FlowSource::Explicit) {
            list.extend(self.explicit.iter().filter_map(|(flow, explicit)| {
                let reason = explicit.installed.as_ref().err()?;
                Some(Flow {
                    id: "-".into(),
                    ufid: None,
                    source: FlowSource::Explicit,
                    flow: flow.clone(),
                    actions: explicit.actions.clone(),
                    handling: format!("waits: {reason}"),
                    packets: 0,
                    bytes: 0,
                    tcp_flags: 0,
                    used_seconds: None,
                    offloaded: None,
                    estimated: false,
                })
            }));
        }
        // Flows of the datapath that cannot be in the tables: their packets miss.
        let absent = |flow: String, ufid: Option<Ufid>, actions: String, reason: &str| Flow {
            id: "-".into(),
            ufid: ufid.map(|ufid| ufid.to_string()),
            source: FlowSource::Learned,
            flow,
            actions,
            handling: format!("host: {reason}"),
            packets: 0,
            bytes: 0,
            tcp_flags: 0,
            used_seconds: None,
            offloaded: None,
            estimated: false,
        };
        if let Some(report) = mirrored.filter(|_| source.is_none_or(|source| source == FlowSource::Learned)) {
            let port_of = |spec: &FlowSpec| spec.matches.key.get(Field::InPort) as u32;
            let refused = report
                .refused_flows
                .iter()
                .filter(|refused| only.is_none_or(|id| id.slot == port_of(&refused.spec)));
            list.extend(refused.map(|refused| {
                let FlowSpec { matches, actions, ufid, .. } = &refused.spec;
                let (flow, actions) =
                    (odp::format_flow(matches, &names), odp::format_actions(actions, &names));
                absent(flow, *ufid, actions, &refused.reason)
            }));
            let unreadable = report.unreadable_flows.iter().filter(|_| only.is_none());
            list.extend(unreadable.map(|flow| absent(flow.text.clone(), None, "?".into(), &flow.reason)));
        }
        Ok(Flows { flows: list })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn memory_on_another_node_than_the_workers_is_told_of() {
        let placement = Placement { nodes: [(0, 1 << 20), (1, 5 << 20)].into(), ..Placement::default() };
        let nodes = [Some(0), Some(1), None, Some(0)];
        let told = far_memory("vm1", &placement, &[1, 0, 2, 3, 0], &nodes);
        assert_eq!(told.len(), 2, "{told:?}");
        assert!(told[0].contains("'vm1': its guest's memory is on NUMA node 1, worker 0"), "{told:?}");
        assert!(told[1].contains("worker 3, which polls it, on node 0"), "{told:?}");
        assert!(far_memory("vm1", &Placement::default(), &[0, 1], &nodes).is_empty(), "nothing is used yet");
    }
}
