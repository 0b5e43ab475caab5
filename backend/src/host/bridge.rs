//! The embedded bridge: MAC learning per VLAN, ageing, flooding, access and trunk ports (IEEE 802.1Q).
//!
//! It sees only packets that no flow matches. For each it learns the source, decides the outputs, and puts a megaflow
//! on (ingress, MACs, VLAN) that carries the rest. Whatever changes a decision (a station that is learned, moves or ages
//! out, a port that comes or goes) deletes the flows that were made from it; their next packet asks again.

use super::{Decision, FlowTable, Host, HostError, HostPort, Millis};
use crate::port_config::VlanMode;
use log::{debug, warn};
use std::collections::{BTreeMap, HashMap, HashSet};
use std::sync::Arc;
use switch_core::action::{Action, PortRef};
use switch_core::compile::compile;
use switch_core::drop::DropReason;
use switch_core::flow::{FlowRef, FlowSpec, Match, Source};
use switch_core::key::{ETH_P_8021Q, Field, Key, VLAN_PRESENT};
use switch_core::packet::{Packet, PortId};

/// A flow that carried nothing for this long is taken out, as OVS does (its `max-idle`).
const FLOW_IDLE: Millis = 10_000;
/// Flows of one port at most; a port that needs more is served packet by packet, at its rate of misses.
const MAX_FLOWS_PER_PORT: usize = 16_384;

/// Which VLANs a port belongs to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Vlans {
    /// VLAN of untagged frames, both ways; `None`: untagged frames are refused.
    pub native: Option<u16>,
    /// VLANs whose frames are tagged.
    pub tagged: Tagged,
}

/// The tagged VLANs of a port.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Tagged {
    /// Every VLAN.
    All,
    /// These; none for an access port.
    Only(Vec<u16>),
}

impl From<&VlanMode> for Vlans {
    fn from(mode: &VlanMode) -> Vlans {
        match mode {
            VlanMode::Access(vid) => Vlans { native: Some(*vid), tagged: Tagged::Only(Vec::new()) },
            VlanMode::Trunk { vlans: None, native } => Vlans { native: Some(*native), tagged: Tagged::All },
            // VLAN 0, of untagged frames, is not in a list that does not name it.
            VlanMode::Trunk { vlans: Some(vlans), native } => {
                Vlans { native: (*native != 0).then_some(*native), tagged: Tagged::Only(vlans.clone()) }
            }
        }
    }
}

impl Vlans {
    fn is_tagged(&self, vid: u16) -> bool {
        match &self.tagged {
            Tagged::All => true,
            Tagged::Only(vids) => vids.contains(&vid),
        }
    }

    /// The VLAN of a frame with this tag (VLAN id 0 is a priority tag: as good as none).
    fn ingress(&self, tag: Option<u16>) -> Option<u16> {
        match tag {
            None | Some(0) => self.native,
            Some(vid) => (self.is_tagged(vid) || self.native == Some(vid)).then_some(vid),
        }
    }

    /// How a frame of VLAN `vid` leaves: `Some(true)` tagged, `Some(false)` untagged, `None` not at all.
    fn egress(&self, vid: u16) -> Option<bool> {
        if self.native == Some(vid) { Some(false) } else { self.is_tagged(vid).then_some(true) }
    }
}

/// A station: VLAN and MAC address.
type Station = (u16, u64);

struct Learned {
    port: PortId,
    seen: Millis,
}

struct BridgeFlow {
    flow: FlowRef,
    stations: [Station; 2],
    in_port: PortId,
}

/// The bridge's state.
pub struct Bridge {
    ports: BTreeMap<u32, HostPort>,
    stations: HashMap<Station, Learned>,
    /// By the flow's index, which a replaced flow keeps.
    flows: HashMap<u32, BridgeFlow>,
    by_station: HashMap<Station, HashSet<u32>>,
    flows_of_port: HashMap<PortId, usize>,
    stations_of_port: HashMap<PortId, usize>,
    ageing: Millis,
    max_stations: usize,
    /// It has been logged since the last tick that the table takes no flow.
    refusal_told: bool,
}

const BROADCAST: u64 = 0xffff_ffff_ffff;

fn is_multicast(mac: u64) -> bool {
    mac >> 40 & 1 == 1
}

/// Whether a frame can come from this address. Linux's bridge drops the others too.
fn is_station(mac: u64) -> bool {
    !is_multicast(mac) && mac != 0
}

/// Link-local control frames (IEEE 802.1Q table 8-1), which a bridge never forwards.
fn is_reserved(mac: u64) -> bool {
    mac & 0xffff_ffff_fff0 == 0x0180_c200_0000
}

impl Bridge {
    /// A bridge that forgets a station after `ageing` milliseconds of silence and knows at most `max_stations`.
    pub fn new(ageing: Millis, max_stations: usize) -> Bridge {
        Bridge {
            ports: BTreeMap::new(),
            stations: HashMap::new(),
            flows: HashMap::new(),
            by_station: HashMap::new(),
            flows_of_port: HashMap::new(),
            stations_of_port: HashMap::new(),
            ageing,
            max_stations: max_stations.max(1),
            refusal_told: false,
        }
    }

    /// Learns that `station` is behind `port`. Flows made while it was unknown, or elsewhere, go.
    fn learn(&mut self, station: Station, port: PortId, now: Millis, table: &mut dyn FlowTable) {
        if let Some(known) = self.stations.get_mut(&station) {
            known.seen = now;
            if known.port != port {
                let old = std::mem::replace(&mut known.port, port);
                self.uncount_station(old);
                *self.stations_of_port.entry(port).or_default() += 1;
                self.forget_flows(station, table);
            }
            return;
        }
        // One port's storm of addresses must not push out the stations of others.
        let share = (self.max_stations / self.ports.len().max(1)).max(1);
        if self.stations_of_port.get(&port).is_some_and(|&n| n >= share) {
            return;
        }
        self.stations.insert(station, Learned { port, seen: now });
        *self.stations_of_port.entry(port).or_default() += 1;
        self.forget_flows(station, table);
    }

    fn uncount_station(&mut self, port: PortId) {
        if let Some(n) = self.stations_of_port.get_mut(&port) {
            *n -= 1;
            if *n == 0 {
                self.stations_of_port.remove(&port);
            }
        }
    }

    fn unlearn(&mut self, station: Station, table: &mut dyn FlowTable) {
        if let Some(known) = self.stations.remove(&station) {
            self.uncount_station(known.port);
            self.forget_flows(station, table);
        }
    }

    /// Deletes the flows from and to a station.
    fn forget_flows(&mut self, station: Station, table: &mut dyn FlowTable) {
        for index in self.by_station.get(&station).cloned().unwrap_or_default() {
            self.forget_flow(index, table);
        }
    }

    fn forget_flow(&mut self, index: u32, table: &mut dyn FlowTable) {
        if let Some(flow) = self.take_flow(index) {
            table.delete(flow);
        }
    }

    fn take_flow(&mut self, index: u32) -> Option<FlowRef> {
        let BridgeFlow { flow, stations, in_port } = self.flows.remove(&index)?;
        for station in stations {
            if let Some(flows) = self.by_station.get_mut(&station) {
                flows.remove(&index);
                if flows.is_empty() {
                    self.by_station.remove(&station);
                }
            }
        }
        if let Some(n) = self.flows_of_port.get_mut(&in_port) {
            *n -= 1;
            if *n == 0 {
                self.flows_of_port.remove(&in_port);
            }
        }
        Some(flow)
    }

    /// Deletes every flow: the set of ports has changed, and with it what flooding means.
    fn forget_all_flows(&mut self, table: &mut dyn FlowTable) {
        let flows: Vec<u32> = self.flows.keys().copied().collect();
        for index in flows {
            self.forget_flow(index, table);
        }
    }

    /// Puts a flow into the table, as long as the port has a place for one more.
    fn add_flow(
        &mut self,
        spec: FlowSpec,
        stations: [Station; 2],
        in_port: PortId,
        table: &mut dyn FlowTable,
    ) {
        if self.flows_of_port.get(&in_port).is_some_and(|&n| n >= MAX_FLOWS_PER_PORT) {
            return;
        }
        match table.put(Source::Learned, spec) {
            Ok(flow) => self.remember_flow(flow, stations, in_port),
            Err(_) if self.refusal_told => {}
            Err(error) => {
                warn!("bridge: packets are answered one by one, for there can be no flow: {error}");
                self.refusal_told = true;
            }
        }
    }

    fn remember_flow(&mut self, flow: FlowRef, stations: [Station; 2], in_port: PortId) {
        // What it replaces, if it does, is gone from the table already.
        self.take_flow(flow.index);
        self.flows.insert(flow.index, BridgeFlow { flow, stations, in_port });
        *self.flows_of_port.entry(in_port).or_default() += 1;
        for station in stations {
            self.by_station.entry(station).or_default().insert(flow.index);
        }
    }

    /// The actions that take a frame of `vlan`, with or without a tag on it now, to `targets`.
    fn deliver(&self, vlan: u16, tag: Option<u16>, targets: impl Iterator<Item = u32>) -> Vec<Action> {
        let (mut tagged, mut untagged) = (Vec::new(), Vec::new());
        for slot in targets {
            let Some(port) = self.ports.get(&slot) else { continue };
            let output = Action::Output(PortRef::Ours(port.id));
            match port.vlans.egress(vlan) {
                Some(true) => tagged.push(output),
                Some(false) => untagged.push(output),
                None => {}
            }
        }
        let mut actions = Vec::new();
        match tag {
            Some(vid) if vid != 0 => {
                actions.append(&mut tagged);
                if !untagged.is_empty() {
                    actions.push(Action::PopVlan);
                    actions.append(&mut untagged);
                }
            }
            _ => {
                if tag.is_some() && !(tagged.is_empty() && untagged.is_empty()) {
                    actions.push(Action::PopVlan);
                }
                actions.append(&mut untagged);
                if !tagged.is_empty() {
                    actions.push(Action::PushVlan { tpid: ETH_P_8021Q, tci: vlan | VLAN_PRESENT });
                    actions.append(&mut tagged);
                }
            }
        }
        actions
    }

    /// What a bridge does with a frame, by its addresses and VLAN.
    fn actions(&self, in_port: PortId, vlan: u16, tag: Option<u16>, (src, dst): (u64, u64)) -> Vec<Action> {
        if is_reserved(dst) || !is_station(src) {
            return Vec::new();
        }
        match self.stations.get(&(vlan, dst)) {
            Some(known) if known.port == in_port => Vec::new(),
            Some(known) => self.deliver(vlan, tag, std::iter::once(known.port.slot)),
            None => {
                let flood = self.ports.keys().copied().filter(|&slot| slot != in_port.slot);
                self.deliver(vlan, tag, flood)
            }
        }
    }
}

/// VLAN id of the outer tag, if there is one.
fn tag_of(key: &Key) -> Option<u16> {
    let tci = key.get(Field::VlanTci) as u16;
    (tci & VLAN_PRESENT != 0).then_some(tci & 0x0fff)
}

/// A match on the ingress and on the VLAN id of the outer tag, or on there being none.
fn match_vlan(key: &Key) -> Match {
    let mut m = Match::default();
    m.mask.set_exact(Field::InPort);
    m.mask.set_exact(Field::RecircId);
    if tag_of(key).is_some() {
        m.mask.set_exact(Field::VlanTpid);
        m.mask.set(Field::VlanTci, (VLAN_PRESENT | 0x0fff) as u128);
    } else {
        // As OVS writes "untagged": both TCIs exactly nothing.
        m.mask.set_exact(Field::VlanTci);
        m.mask.set_exact(Field::CvlanTci);
    }
    m.key = key.masked(&m.mask);
    m
}

fn match_stations(key: &Key) -> Match {
    let mut m = match_vlan(key);
    m.mask.set_exact(Field::EthSrc);
    m.mask.set_exact(Field::EthDst);
    m.key = key.masked(&m.mask);
    m
}

impl Host for Bridge {
    fn packet(
        &mut self,
        packet: &Packet,
        _: &[u8],
        key: &Key,
        now: Millis,
        flows: &mut dyn FlowTable,
    ) -> Decision {
        let in_port = packet.in_port;
        let Some(port) = self.ports.get(&in_port.slot).filter(|port| port.id == in_port) else {
            return Decision::Drop(DropReason::HostDrop);
        };
        let tag = tag_of(key);
        let src = key.get(Field::EthSrc) as u64;
        let dst = key.get(Field::EthDst) as u64;
        let Some(vlan) = port.vlans.ingress(tag) else {
            // One flow for the whole VLAN: addresses do not matter in one that the port is not in.
            let spec = FlowSpec { matches: match_vlan(key), actions: Vec::new(), ufid: None, held: None };
            self.add_flow(spec, [(0, BROADCAST); 2], in_port, flows);
            return Decision::Drop(DropReason::HostDrop);
        };
        if is_station(src) {
            self.learn((vlan, src), in_port, now, flows);
        }
        let actions = self.actions(in_port, vlan, tag, (src, dst));
        let spec = FlowSpec { matches: match_stations(key), actions, ufid: None, held: None };
        let plan = compile(&spec);
        let nothing = spec.actions.is_empty();
        self.add_flow(spec, [(vlan, src), (vlan, dst)], in_port, flows);
        match plan {
            Ok(plan) if !nothing => Decision::Execute(Arc::new(plan)),
            _ => Decision::Drop(DropReason::HostDrop),
        }
    }

    fn port_added(&mut self, port: HostPort, flows: &mut dyn FlowTable) -> Result<(), HostError> {
        self.ports.insert(port.id.slot, port);
        self.forget_all_flows(flows);
        Ok(())
    }

    fn port_removed(&mut self, id: PortId, _: bool, flows: &mut dyn FlowTable) {
        if self.ports.get(&id.slot).is_some_and(|port| port.id == id) {
            self.ports.remove(&id.slot);
        }
        let gone: Vec<Station> =
            self.stations.iter().filter(|(_, known)| known.port == id).map(|(&station, _)| station).collect();
        for station in gone {
            self.unlearn(station, flows);
        }
        self.forget_all_flows(flows);
    }

    fn tick(&mut self, now: Millis, flows: &mut dyn FlowTable) {
        self.refusal_told = false;
        let mut idle = Vec::new();
        for (&index, made) in &self.flows {
            let used = flows.last_used(made.flow);
            if let Some(known) = self.stations.get_mut(&made.stations[0])
                && known.port == made.in_port
            {
                known.seen = known.seen.max(used);
            }
            if now.saturating_sub(used) > FLOW_IDLE {
                idle.push(index);
            }
        }
        for index in idle {
            self.forget_flow(index, flows);
        }
        let old: Vec<Station> = self
            .stations
            .iter()
            .filter(|(_, known)| now.saturating_sub(known.seen) > self.ageing)
            .map(|(&station, _)| station)
            .collect();
        if !old.is_empty() {
            debug!("bridge: {} MAC addresses aged out", old.len());
        }
        for station in old {
            self.unlearn(station, flows);
        }
    }

    fn sync(&mut self, _now: Millis, _flows: &mut dyn FlowTable) {}

    fn explain(&self, key: &Key, in_port: PortId) -> Option<Vec<Action>> {
        let tag = tag_of(key);
        let port = self.ports.get(&in_port.slot).filter(|port| port.id == in_port);
        match port.and_then(|port| port.vlans.ingress(tag)) {
            Some(vlan) => {
                let macs = (key.get(Field::EthSrc) as u64, key.get(Field::EthDst) as u64);
                Some(self.actions(in_port, vlan, tag, macs))
            }
            None => Some(Vec::new()),
        }
    }

    fn macs(&self) -> Vec<(PortId, usize)> {
        self.stations_of_port.iter().map(|(&port, &n)| (port, n)).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use switch_core::planner::PlanError;

    /// A table that remembers flows and lets the test say when they were used.
    #[derive(Default)]
    struct Table {
        flows: HashMap<FlowRef, (FlowSpec, Millis)>,
        next: u32,
        now: Millis,
    }

    impl FlowTable for Table {
        fn put(&mut self, _: Source, spec: FlowSpec) -> Result<FlowRef, PlanError> {
            self.flows.retain(|_, (old, _)| old.matches != spec.matches);
            for (old, _) in self.flows.values() {
                let (a, b) = (&old.matches, &spec.matches);
                assert!(!a.key.overlaps(&a.mask, &b.key, &b.mask), "overlap: {a:?} and {b:?}");
            }
            self.next += 1;
            let flow = FlowRef { index: self.next, generation: 1 };
            self.flows.insert(flow, (spec, self.now));
            Ok(flow)
        }

        fn delete(&mut self, flow: FlowRef) {
            self.flows.remove(&flow);
        }

        fn last_used(&self, flow: FlowRef) -> Millis {
            self.flows.get(&flow).map_or(0, |(_, used)| *used)
        }
    }

    const A: u64 = 0x0200_0000_000a;
    const B: u64 = 0x0200_0000_000b;

    fn port(slot: u32) -> PortId {
        PortId { slot, generation: 7 }
    }

    fn trunk(vlans: Option<&[u16]>, native: u16) -> VlanMode {
        VlanMode::Trunk { vlans: vlans.map(<[u16]>::to_vec), native }
    }

    fn from(slot: u32) -> Packet {
        Packet::from_frame(port(slot), &[])
    }

    struct Lan {
        bridge: Bridge,
        table: Table,
    }

    impl Lan {
        fn new(vlans: &[Vlans]) -> Lan {
            let mut lan = Lan { bridge: Bridge::new(60_000, 64), table: Table::default() };
            for (slot, vlans) in vlans.iter().enumerate() {
                let id = port(slot as u32);
                let new = HostPort {
                    id,
                    name: format!("p{slot}"),
                    vlans: vlans.clone(),
                    mtu: 1500,
                    is_device: false,
                    polled_by: vec![0],
                };
                lan.bridge.port_added(new, &mut lan.table).unwrap();
            }
            lan
        }

        fn plain(ports: usize) -> Lan {
            Lan::new(&vec![Vlans::from(&trunk(None, 0)); ports])
        }

        fn key(slot: u32, src: u64, dst: u64, tag: Option<u16>) -> Key {
            let mut key = Key::default();
            key.set(Field::InPort, slot as u128);
            key.set(Field::EthSrc, src as u128);
            key.set(Field::EthDst, dst as u128);
            if let Some(vid) = tag {
                key.set(Field::VlanTpid, ETH_P_8021Q as u128);
                key.set(Field::VlanTci, (vid | VLAN_PRESENT | 0x2000) as u128);
            }
            key
        }

        /// Sends a packet up and gives the actions of the flow that now carries its like.
        fn send(&mut self, slot: u32, src: u64, dst: u64, tag: Option<u16>) -> Vec<Action> {
            let key = Self::key(slot, src, dst, tag);
            let now = self.table.now;
            let decision = self.bridge.packet(&from(slot), &[], &key, now, &mut self.table);
            let actions = self.carried(slot, src, dst, tag).expect("a flow for the packet");
            assert_eq!(actions.is_empty(), matches!(decision, Decision::Drop(_)));
            actions
        }

        fn carried(&self, slot: u32, src: u64, dst: u64, tag: Option<u16>) -> Option<Vec<Action>> {
            let key = Self::key(slot, src, dst, tag);
            let mut flows =
                self.table.flows.values().filter(|(f, _)| key.matches(&f.matches.key, &f.matches.mask));
            flows.next().map(|(flow, _)| flow.actions.clone())
        }
    }

    fn out(slot: u32) -> Action {
        Action::Output(PortRef::Ours(port(slot)))
    }

    fn push(vid: u16) -> Action {
        Action::PushVlan { tpid: ETH_P_8021Q, tci: vid | VLAN_PRESENT }
    }

    #[test]
    fn floods_then_learns() {
        let mut lan = Lan::plain(3);
        assert_eq!(lan.send(0, A, B, None), [out(1), out(2)]);
        assert_eq!(lan.send(1, B, A, None), [out(0)]);
        assert_eq!(lan.carried(0, A, B, None), None, "the flooding flow ends when B is learned");
        assert_eq!(lan.send(0, A, B, None), [out(1)]);
        assert_eq!(lan.send(0, A, BROADCAST, None), [out(1), out(2)]);
        assert_eq!(lan.send(0, A, 0x0180_c200_0003, None), [], "link-local frames stay on their link");
        assert_eq!(lan.send(1, 0x0200_0000_00bb, B, None), [], "not back to where it came from");
        assert_eq!(lan.send(0, 0x0100_5e00_0001, B, None), [], "nobody sends from a group's address");
        assert_eq!(lan.send(0, 0, B, None), []);
    }

    #[test]
    fn a_station_moves() {
        let mut lan = Lan::plain(3);
        lan.send(1, B, A, None);
        assert_eq!(lan.send(0, A, B, None), [out(1)]);
        assert_eq!(lan.send(2, B, A, None), [out(0)]);
        assert_eq!(lan.carried(0, A, B, None), None);
        assert_eq!(
            lan.carried(1, B, A, None),
            None,
            "its flows at the old port end: were it back, we must learn"
        );
        assert_eq!(lan.send(0, A, B, None), [out(2)]);
    }

    #[test]
    fn access_and_trunk_ports() {
        let modes = [VlanMode::Access(10), trunk(Some(&[10, 20]), 0), trunk(Some(&[10]), 20), trunk(None, 0)];
        let mut lan = Lan::new(&modes.each_ref().map(Vlans::from));
        assert_eq!(lan.send(0, A, BROADCAST, None), [push(10), out(1), out(2), out(3)]);
        assert_eq!(lan.send(0, A, BROADCAST, Some(10)), [out(1), out(2), out(3)], "its own VLAN, tagged");
        assert_eq!(lan.send(0, A, BROADCAST, Some(20)), [], "a VLAN that it is not in");
        assert_eq!(lan.send(0, B, BROADCAST, Some(0)), [Action::PopVlan, push(10), out(1), out(2), out(3)]);
        assert_eq!(lan.send(1, B, BROADCAST, Some(10)), [out(2), out(3), Action::PopVlan, out(0)]);
        assert_eq!(lan.send(1, B, BROADCAST, None), [], "a trunk without native VLAN");
        assert_eq!(lan.send(1, B, A, Some(10)), [Action::PopVlan, out(0)]);
        assert_eq!(lan.send(2, B, BROADCAST, None), [push(20), out(1), out(3)]);
        assert_eq!(lan.send(3, B, BROADCAST, None), [], "VLAN 0 is nobody else's");
        assert_eq!(lan.send(1, A, B, Some(20)), [Action::PopVlan, out(2)], "the same MAC in another VLAN");
    }

    #[test]
    fn stations_age_by_their_flows() {
        let mut lan = Lan::plain(2);
        lan.send(1, B, A, None);
        lan.send(0, A, B, None);
        lan.send(1, B, A, None);
        for step in 1..=10 {
            lan.table.now = step * 10_000;
            let now = lan.table.now;
            lan.table.flows.values_mut().for_each(|(_, used)| *used = now);
            lan.bridge.tick(now, &mut lan.table);
        }
        assert_eq!(lan.table.flows.len(), 2, "traffic on the fast path keeps stations and flows");
        lan.bridge.tick(lan.table.now + 10_001, &mut lan.table);
        assert_eq!(lan.table.flows.len(), 0, "idle flows go");
        assert_eq!(lan.bridge.stations.len(), 2, "stations stay longer");
        lan.bridge.tick(lan.table.now + 60_001, &mut lan.table);
        assert_eq!(lan.bridge.stations.len(), 0);
        assert!(lan.bridge.stations_of_port.is_empty() && lan.bridge.by_station.is_empty());
    }

    #[test]
    fn a_port_goes_and_takes_its_stations() {
        let mut lan = Lan::plain(3);
        lan.send(1, B, A, None);
        lan.send(0, A, B, None);
        lan.bridge.port_removed(port(1), false, &mut lan.table);
        assert!(lan.table.flows.is_empty());
        assert_eq!(lan.send(0, A, B, None), [out(2)]);
        assert_eq!(lan.bridge.macs(), [(port(0), 1)]);
        let gone = lan.bridge.packet(&from(1), &[], &Lan::key(1, B, A, None), 0, &mut lan.table);
        assert!(
            matches!(gone, Decision::Drop(DropReason::HostDrop)),
            "a packet of the gone port that was still queued"
        );
    }

    #[test]
    fn a_storm_of_addresses_stays_within_its_share() {
        let mut lan = Lan::plain(2);
        for i in 0..1000 {
            lan.send(0, A + 0x100 + i, BROADCAST, None);
        }
        assert_eq!(lan.bridge.macs(), [(port(0), 32)]);
        lan.send(1, B, A, None);
        assert_eq!(lan.send(0, A, B, None), [out(1)], "others are still learned");
    }
}
