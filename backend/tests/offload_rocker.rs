//! The offload manager with QEMU's rocker switch: a hot flow is carried by the switch alone, and leaves it before its deletion
//! is answered. Needs `qemu-system-x86_64` in `PATH`, no privileges.

#[path = "../../nic/tests/common/mod.rs"]
mod common;

use anyhow::{Context, Result, ensure};
use backend::clock;
use backend::datapath::{Datapath, Mark, PortSettings};
use backend::host::FlowTable;
use backend::offload::{Manager, Offloaded, Settings};
use backend::port_config::{Mode, Socket};
use backend::quiesce::Quiescence;
use backend::vhost::VhostUserPort;
use backend::worker::rings::Rings;
use common::{Machine, frame, until};
use nic::io::PacketIo;
use nic::offload::PortMap;
use nic::rocker::{self, Config, RockerPorts};
use serde_json::json;
use std::sync::{Arc, PoisonError};
use switch_core::action::{Action, PortRef};
use switch_core::flow::{FlowSpec, Match, Source};
use switch_core::key::Field;
use switch_core::packet::PortId;
use switch_core::slab::FlowCounters;

const A: u64 = 0x0200_0000_000a;
const B: u64 = 0x0200_0000_000b;
/// An ethertype without a meaning (802, local experimental).
const EXPERIMENT: u16 = 0x88b5;

/// A flow as Open vSwitch makes it.
fn flow(from: PortId, to: PortId) -> FlowSpec {
    let mut matches = Match::default();
    let fields: [(Field, u128); 6] = [
        (Field::InPort, from.slot.into()),
        (Field::RecircId, 0),
        (Field::EthDst, B.into()),
        (Field::EthType, EXPERIMENT.into()),
        (Field::VlanTci, 0),
        (Field::VlanTpid, 0),
    ];
    for (field, value) in fields {
        matches.key.set(field, value);
        matches.mask.set_exact(field);
    }
    FlowSpec { matches, actions: vec![Action::Output(PortRef::Ours(to))], ufid: None, held: None }
}

/// The software: what the switch leaves to it. Gives the number of frames; those of a flow are counted and sent on.
fn serve(ports: &mut RockerPorts, counters: Option<&FlowCounters>) -> Result<u64> {
    let mut frames = Vec::new();
    ports.receive(64, &mut |received| {
        if !received.forwarded {
            frames.push(received.frame.to_vec());
        }
    })?;
    if let Some(slot) = counters.and_then(FlowCounters::slot) {
        for frame in &frames {
            slot.add(1, frame.len() as u64, clock::millis());
            ports.send(2, &[frame], &Default::default())?;
        }
        ports.flush()?;
    }
    Ok(frames.len() as u64)
}

#[test]
fn a_hot_flow_is_carried_by_the_switch_until_it_is_deleted() -> Result<()> {
    let device =
        json!({ "driver": "rocker", "id": "sw", "name": "sw", "addr": "05.0", "ports": ["n0", "n1"] });
    let machine = Machine::start(2, &[device])?;
    let (mut ports, tables) = rocker::open(machine.function(5)?, Config::default())?;
    let mut events = Vec::new();
    until("links", || {
        ports.poll_events(&mut events)?;
        Ok(ports.ports().iter().all(|port| port.link.up).then_some(()))
    })?;

    let (mut datapath, _ends) = Datapath::start(&[], 1024, 8)?;
    let manager = Manager::start(datapath.flows.clone())?;
    let socket = Socket { mode: Mode::Client, ..Socket::new("/nowhere") };
    let vhost = VhostUserPort::new("p", 1, socket, None, Arc::new(Quiescence::new()), Box::new(|_| {}))?;
    let rings = Rings::Guest(vhost.shared().clone());
    let mut ids = Vec::new();
    for name in ["up1", "up2"] {
        let id = datapath.reserve_slot().context("a slot")?;
        let settings = PortSettings { name, polled_by: &[0], mtu: 1500, max_masks: 16, miss_rate: 100 };
        datapath.add_port(id, &rings, settings)?;
        ids.push(id);
    }
    manager.add_nic("sw", Box::new(tables), Settings::default());
    manager.set_ports("sw", PortMap::new([(ids[0], 1), (ids[1], 2)])).recv_timeout(common::PATIENCE)?;

    let lock = || datapath.flows.lock().unwrap_or_else(PoisonError::into_inner);
    let flow = lock().put(Source::Learned, flow(ids[0], ids[1]))?;
    let counters = lock().get(flow).context("the flow")?.counters[0].clone();
    let packet = frame(B, A, None, EXPERIMENT, b"hot");
    until("the worker to have it", || Ok(counters.slot().map(drop)))?;
    let (mut sent, mut arrived) = (0, 0);
    until("the flow to go in", || {
        machine.wires[0].send(&packet)?;
        sent += 1;
        serve(&mut ports, Some(&counters))?;
        while machine.wires[1].try_receive()?.is_some() {
            arrived += 1;
        }
        Ok((manager.flows().get(flow).0 == Offloaded::Yes).then_some(()))
    })?;
    // What is still on its way.
    until("the frames of before", || {
        serve(&mut ports, Some(&counters))?;
        while machine.wires[1].try_receive()?.is_some() {
            arrived += 1;
        }
        Ok((arrived == sent).then_some(()))
    })?;

    for _ in 0..50 {
        machine.wires[0].send(&packet)?;
        ensure!(machine.wires[1].receive()? == packet, "another frame");
    }
    ensure!(serve(&mut ports, None)? == 0, "the switch has left frames to software that it forwarded");
    ensure!(machine.wires[1].try_receive()?.is_none(), "a frame left twice");
    until("an estimate", || Ok(manager.flows().get(flow).1.then_some(())))?;
    ensure!(manager.nics()[0].rules == 1 && manager.nics()[0].estimated, "{:?}", manager.nics());

    lock().delete(flow);
    let marks = lock().marks();
    until("the deletion to be followed", || Ok(marks.iter().all(Mark::is_reached).then_some(())))?;
    machine.wires[0].send(&packet)?;
    until("the frame to come to software", || Ok((serve(&mut ports, None)? == 1).then_some(())))?;
    ensure!(machine.wires[1].try_receive()?.is_none(), "the switch forwards what was deleted");
    ensure!(manager.nics()[0].rules == 0, "{:?}", manager.nics());
    drop(manager);
    datapath.stop();
    Ok(())
}
