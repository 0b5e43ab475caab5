//! Open vSwitch alone: its ports are TAPs whose other ends are ours.

use std::time::Duration;

use anyhow::Result;
use rustix::event::{PollFd, PollFlags, Timespec, poll};

use super::offloads::Load;
use super::{PORTS, Side, add_bridges, bridge, port_name, port_number};
use crate::host::WorkDir;
use crate::ovs::Ovs;
use crate::tap::Tap;

/// The side that is right by definition.
pub struct Taps {
    /// Dropped before the namespace that they are in.
    taps: Vec<Tap>,
    ovs: Ovs,
    keeps_flows: bool,
    _dir: WorkDir,
}

impl Taps {
    /// Starts an Open vSwitch with this many lanes. To settle, it either keeps the flows of its datapath and revises them, or
    /// forgets them, so that the tables themselves decide about each packet.
    pub fn start(lanes: usize, keeps_flows: bool) -> Result<Self> {
        let dir = WorkDir::new()?;
        let ovs = Ovs::start_for_tests(&dir)?;
        add_bridges(&ovs, lanes)?;
        let mut taps = Vec::new();
        for port in 0..lanes * PORTS {
            let name = port_name(port);
            taps.push(Tap::new(ovs.namespace(), &name)?);
            let number = format!("ofport_request={}", port_number(port));
            let bridge = bridge(port / PORTS);
            ovs.vsctl(&["add-port", &bridge, &name, "--", "set", "interface", &name, &number])?;
        }
        Ok(Self { taps, ovs, keeps_flows, _dir: dir })
    }
}

impl Side for Taps {
    fn name(&self) -> &'static str {
        if self.keeps_flows { "Open vSwitch alone, with its flows" } else { "Open vSwitch alone" }
    }

    fn lanes(&self) -> usize {
        self.taps.len() / PORTS
    }

    fn ovs(&self) -> &Ovs {
        &self.ovs
    }

    fn inject(&mut self, port: usize, frame: &[u8], load: Load) -> Result<()> {
        load.on_wire(frame).iter().try_for_each(|frame| self.taps[port].send(frame))
    }

    fn drain(&mut self, patience: Duration) -> Result<Vec<(usize, Vec<u8>)>> {
        let mut fds: Vec<PollFd<'_>> = self.taps.iter().map(|tap| PollFd::new(tap, PollFlags::IN)).collect();
        poll(&mut fds, Some(&Timespec::try_from(patience)?))?;
        let ready: Vec<bool> = fds.iter().map(|fd| !fd.revents().is_empty()).collect();
        let mut frames = Vec::new();
        for (port, tap) in self.taps.iter_mut().enumerate().filter(|(port, _)| ready[*port]) {
            while let Some(frame) = tap.receive()? {
                frames.push((port, frame));
            }
        }
        Ok(frames)
    }

    fn settle(&mut self) -> Result<()> {
        if self.keeps_flows {
            return self.ovs.revalidate();
        }
        self.ovs.appctl(&["revalidator/purge"]).map(drop)
    }
}
