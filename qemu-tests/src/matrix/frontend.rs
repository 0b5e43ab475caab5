//! Two guests whose front-end is the library of this package.

use std::time::{Duration, Instant};

use anyhow::{Result, ensure};

use super::{BULK, PINGS, Row, Subject};
use crate::daemon::DaemonConfig;
use crate::frontend::{Builder, Features, NetHeader};
use crate::host::WorkDir;
use crate::net::{Net, QUIET};

/// Frames under way at a time.
const AT_ONCE: usize = 32;

pub(super) struct Pair {
    net: Net,
    offloads: bool,
}

impl Pair {
    pub(super) fn start(row: &Row, packed: bool, offloads: bool, kicks: bool) -> Result<Self> {
        let dir = WorkDir::new()?;
        let ports = ["p1", "p2"].map(|name| row.port(name, &dir));
        let none = Features::GUEST_OFFLOADS | Features::CSUM; // and what depends on it
        let shape = |_, builder: Builder| {
            let builder = if packed { builder.packed() } else { builder };
            let builder = if kicks { builder } else { builder.without_kicks() };
            if offloads { builder } else { builder.without(none) }
        };
        let mut net = Net::start(dir, DaemonConfig::new(ports), shape)?;
        net.greet()?;
        let features = net.guests[0].frontend.features();
        ensure!(features.contains(Features::RING_PACKED) == packed, "{features:?}");
        ensure!(features.contains(Features::GUEST_TSO4 | Features::HOST_TSO4) == offloads, "{features:?}");
        Ok(Self { net, offloads })
    }

    /// So many frames each way, some at a time.
    fn exchange(&mut self, frames: usize, at_once: usize) -> Result<()> {
        for (from, to) in [(0, 1), (1, 0)] {
            for first in (0..frames).step_by(at_once) {
                let numbers = first..frames.min(first + at_once);
                let sent: Vec<_> = numbers
                    .map(|number| {
                        self.net.packet(from, to).udp(number as u16, 7).payload_len(number % 1400).build()
                    })
                    .collect();
                for frame in &sent {
                    self.net.guests[from].send(frame)?;
                }
                let mut came = Vec::new();
                for _ in &sent {
                    let (_, frame, _) = self.net.guests[to].expect_checked()?;
                    came.push(frame);
                }
                // Several queues are read in turn.
                let order = |mut frames: Vec<Vec<u8>>| {
                    frames.sort();
                    frames
                };
                ensure!(order(sent) == order(came), "frames were changed");
            }
        }
        Ok(())
    }
}

impl Subject for Pair {
    fn ping(&mut self) -> Result<String> {
        self.exchange(PINGS, 1)?;
        Ok(format!("{PINGS} of {PINGS}"))
    }

    fn bulk(&mut self) -> Result<String> {
        const SUPER_FRAMES: usize = 200;
        if !self.offloads {
            self.exchange(BULK, AT_ONCE)?;
            return Ok(format!("{BULK} frames"));
        }
        for number in 0..SUPER_FRAMES {
            let (from, to) = (number % 2, 1 - number % 2);
            let (header, frame) =
                self.net.packet(from, to).tcp(number as u16, 5001).payload_len(60_000).build_gso(1448);
            self.net.guests[from].send_with(&header, &frame)?;
            let (received, whole, _) = self.net.guests[to].expect_checked()?;
            ensure!(whole == frame, "a super-frame was changed");
            ensure!(received.flags & NetHeader::NEEDS_CSUM != 0 && received.gso_size == 1448, "{received:?}");
        }
        Ok(format!("{SUPER_FRAMES} of 60 kB"))
    }

    fn reconnect(&mut self) -> Result<Duration> {
        let start = Instant::now();
        let guest = &mut self.net.guests[0];
        guest.frontend.abandon();
        guest.frontend.resume()?;
        while guest.receive(QUIET)?.is_some() {}
        self.exchange(1, 1)?;
        Ok(start.elapsed())
    }

    fn restart(&mut self) -> Result<Duration> {
        let start = Instant::now();
        self.net.daemon.kill()?;
        self.net.restart()?;
        self.exchange(1, 1)?;
        Ok(start.elapsed())
    }

    fn finish(&mut self) -> Result<()> {
        self.net.daemon.balanced_stats().map(drop)
    }
}
