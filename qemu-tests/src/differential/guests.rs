//! Open vSwitch with Pointwork: the ports are guests on a daemon.

use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};

use super::{PORTS, Side, port_name};
use crate::daemon::{Daemon, DaemonConfig, PortConfig};
use crate::frontend::{Features, Frontend, NetHeader};
use crate::host::{WorkDir, wait_for};
use crate::net::{SOON, builder};
use crate::ovs::Ovs;

/// The side that must do the same.
pub struct Guests {
    /// Dropped first, then the daemon, then OVS.
    guests: Vec<Frontend>,
    daemon: Daemon,
    ovs: Ovs,
    _dir: WorkDir,
}

impl Guests {
    /// Starts an Open vSwitch, a daemon under it, and a guest on each port. The guests leave all checksums to themselves, so
    /// that what they get is what is on the wire.
    pub fn start() -> Result<Self> {
        let dir = WorkDir::new()?;
        let ovs = Ovs::start(&dir)?;
        let ports: Vec<PortConfig> =
            (0..PORTS).map(|port| PortConfig::server(&port_name(port), &dir)).collect();
        let daemon = Daemon::start(&DaemonConfig::under(&ovs, ports.clone()), &dir)?;
        for port in 0..PORTS {
            // The daemon adds its ports; the numbers that flows have for them are for us to choose.
            let (name, number) = (port_name(port), format!("ofport_request={}", port + 1));
            wait_for(&format!("{name} in the database"), SOON, || {
                Ok(ovs.vsctl(&["set", "interface", &name, &number]).ok())
            })?;
        }
        let mut guests = Vec::new();
        for port in &ports {
            let mut guest = builder(port).without(Features::GUEST_OFFLOADS).start()?;
            guest.queue(0).rx.rx_fill(2048, 128)?;
            guests.push(guest);
        }
        let names: Vec<String> = (0..PORTS).map(port_name).collect();
        daemon.wait_link(&names.iter().map(String::as_str).collect::<Vec<_>>(), true, SOON)?;
        for (port, name) in names.iter().enumerate() {
            // A port whose link is down is left out when packets are flooded.
            wait_for(&format!("port {name} of the bridge"), SOON, || {
                let shown = ovs.vsctl(&["get", "interface", name, "ofport", "link_state"])?;
                Ok((shown.split_whitespace().eq([(port + 1).to_string().as_str(), "up"])).then_some(()))
            })?;
        }
        Ok(Self { guests, daemon, ovs, _dir: dir })
    }

    /// The daemon.
    pub fn daemon(&self) -> &Daemon {
        &self.daemon
    }
}

impl Side for Guests {
    fn name(&self) -> &'static str {
        "Open vSwitch with Pointwork"
    }

    fn ovs(&self) -> &Ovs {
        &self.ovs
    }

    fn inject(&mut self, port: usize, frame: &[u8]) -> Result<()> {
        Ok(self.guests[port].queue(0).tx.tx(frame, &NetHeader::default())?)
    }

    fn drain(&mut self, patience: Duration) -> Result<Vec<(usize, Vec<u8>)>> {
        let deadline = Instant::now() + patience;
        let mut frames = Vec::new();
        loop {
            for (port, guest) in self.guests.iter_mut().enumerate() {
                // Waits on the first guest only, and briefly: the others are looked at again.
                let wait = if port == 0 { Duration::from_micros(200) } else { Duration::ZERO };
                while let Some((header, frame)) = guest.queue(0).rx.rx_wait(wait)? {
                    let plain =
                        header.flags & NetHeader::NEEDS_CSUM == 0 && header.gso_type == NetHeader::GSO_NONE;
                    ensure!(plain, "p{} got an offload that its guest does not take: {header:?}", port + 1);
                    frames.push((port, frame));
                }
            }
            if !frames.is_empty() || Instant::now() >= deadline {
                return Ok(frames);
            }
        }
    }

    /// OVS revises its flows, and then the daemon reads them.
    fn settle(&mut self) -> Result<()> {
        self.ovs.revalidate()?;
        self.daemon.ctl(&["sync"]).context("the flows of OVS do not arrive")?;
        Ok(())
    }
}
