//! Guests played by the frontend library on a running daemon, and what they say to each other.

use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};

use crate::daemon::{Daemon, DaemonConfig, PortConfig};
use crate::frontend::packet::{BROADCAST, Checked, Mac, Packet, check};
use crate::frontend::{Builder, Error, Features, Frontend, Layout, NetHeader};
use crate::host::{WorkDir, wait_for};

/// Longer than anything that should happen takes.
pub const SOON: Duration = Duration::from_secs(5);
/// How long nothing has to happen for us to believe that it will not.
pub const QUIET: Duration = Duration::from_millis(100);

/// A daemon with its guests, one on each port.
pub struct Net {
    /// The daemon.
    pub daemon: Daemon,
    /// Its guests, in the order of the ports.
    pub guests: Vec<Guest>,
    /// What the daemon was started with.
    pub config: DaemonConfig,
    /// Where its files are.
    pub dir: WorkDir,
}

/// One guest with its addresses.
pub struct Guest {
    /// Its device.
    pub frontend: Frontend,
    /// Its Ethernet address.
    pub mac: Mac,
    /// Its IPv4 address.
    pub ip: [u8; 4],
    /// Its IPv6 address.
    pub ip6: [u8; 16],
}

impl Net {
    /// Starts a daemon with its files in `dir`, and a guest on each port as `shape` makes it (by the port's index).
    pub fn start(
        dir: WorkDir,
        config: DaemonConfig,
        shape: impl Fn(usize, Builder) -> Builder,
    ) -> Result<Self> {
        let mut frontends = Vec::new();
        for (index, port) in config.ports.iter().enumerate() {
            frontends.push(shape(index, builder(port)).build()?);
        }
        let daemon = Daemon::start(&config, &dir)?;
        let mut net = Self { daemon, guests: Vec::new(), config, dir };
        for frontend in frontends {
            net.attach(frontend)?;
        }
        Ok(net)
    }

    /// `count` ordinary ports, p1 and on.
    pub fn plain(count: usize) -> Result<Self> {
        let dir = WorkDir::new()?;
        let ports: Vec<PortConfig> =
            (1..=count).map(|number| PortConfig::server(&format!("p{number}"), &dir)).collect();
        Self::start(dir, DaemonConfig::new(ports), |_, builder| builder)
    }

    /// A guest on a port that was added at run time; gives its index.
    pub fn join(&mut self, port: &PortConfig) -> Result<usize> {
        self.attach(builder(port).build()?)
    }

    fn attach(&mut self, mut frontend: Frontend) -> Result<usize> {
        frontend.start()?;
        let number = self.guests.len() as u8 + 1;
        let mut ip6 = [0; 16];
        (ip6[0], ip6[15]) = (0xfd, number);
        let mut guest = Guest { frontend, mac: [2, 0, 0, 0, 0, number], ip: [10, 0, 0, number], ip6 };
        guest.post_buffers()?;
        self.guests.push(guest);
        Ok(self.guests.len() - 1)
    }

    /// Starts the daemon again that was killed or terminated; each guest reconnects and goes on with its rings.
    pub fn restart(&mut self) -> Result<()> {
        for guest in &self.guests {
            ensure!(guest.frontend.wait_disconnected(SOON), "a connection outlives the daemon");
        }
        self.reconnect()?;
        for guest in &mut self.guests {
            while guest.receive(QUIET)?.is_some() {}
        }
        Ok(())
    }

    /// As [`restart`](Self::restart), of guests that have noticed the daemon's end, the last one first; what comes to them is theirs
    /// to take.
    pub fn reconnect(&mut self) -> Result<()> {
        self.daemon = Daemon::start(&self.config, &self.dir)?;
        for guest in self.guests.iter_mut().rev() {
            guest.frontend.resume()?;
        }
        Ok(())
    }

    /// Lets the bridge learn everybody: each guest in turn broadcasts, and all others hear it.
    pub fn greet(&mut self) -> Result<()> {
        for from in 0..self.guests.len() {
            let (mac, ip) = (self.guests[from].mac, self.guests[from].ip);
            let hello = Packet::eth(mac, BROADCAST).arp_request(ip, ip).build();
            self.guests[from].send(&hello)?;
            for to in (0..self.guests.len()).filter(|&to| to != from) {
                self.guests[to]
                    .expect(&hello)
                    .with_context(|| format!("greeting of guest {from} at {to}"))?;
            }
        }
        Ok(())
    }

    /// A packet from one guest to another, its transport header still to be chosen.
    pub fn packet(&self, from: usize, to: usize) -> Packet {
        let (from, to) = (&self.guests[from], &self.guests[to]);
        Packet::eth(from.mac, to.mac).ipv4(from.ip, to.ip)
    }

    /// Sends `packet` from one guest; exactly the guests in `to` must get it, unchanged.
    pub fn reaches(&mut self, from: usize, packet: &Packet, to: &[usize]) -> Result<()> {
        let frame = packet.build();
        self.guests[from].send(&frame)?;
        for &index in to {
            self.guests[index].expect(&frame).with_context(|| format!("from guest {from} to {index}"))?;
        }
        // Whoever else was to get it would have it by now, or soon.
        for (index, guest) in self.guests.iter_mut().enumerate().filter(|(index, _)| !to.contains(index)) {
            guest.expect_nothing().with_context(|| format!("from guest {from}, at {index}"))?;
        }
        Ok(())
    }
}

/// The frontend for a port.
pub fn builder(port: &PortConfig) -> Builder {
    let builder = Frontend::builder(&port.socket).queue_pairs(port.queues.into());
    if port.client { builder.listen() } else { builder }
}

impl Guest {
    /// Gives the device receive buffers on all queues, as many as its rings take of some: pages if they can be merged, else chains
    /// that hold 64 KiB.
    pub fn post_buffers(&mut self) -> Result<()> {
        let mergeable = self.frontend.features().contains(Features::MRG_RXBUF);
        for pair in 0..self.frontend.queue_pairs() {
            let rx = &mut self.frontend.queue(pair).rx;
            if mergeable {
                rx.rx_fill(2048, rx.free().min(128))?;
            } else {
                rx.rx_fill_with(65_562, (rx.free() / 17).min(8), &Layout::chain(17))?;
            }
        }
        Ok(())
    }

    /// Sends a frame that leaves nothing to the device, on the first queue.
    pub fn send(&mut self, frame: &[u8]) -> Result<()> {
        self.send_with(&NetHeader::default(), frame)
    }

    /// Sends a frame with an offload header. Waits for room in the ring, as a guest's queue does.
    pub fn send_with(&mut self, header: &NetHeader, frame: &[u8]) -> Result<()> {
        let tx = &mut self.frontend.queue(0).tx;
        wait_for("room in a transmit ring", SOON, || match tx.tx(frame, header) {
            Err(Error::RingFull(_)) => Ok(None),
            sent => Ok(Some(sent?)),
        })
    }

    /// The next frame on any queue, with the index of its pair. Announcements that the switch makes itself (RARP) are
    /// passed over.
    pub fn receive(&mut self, timeout: Duration) -> Result<Option<(usize, NetHeader, Vec<u8>)>> {
        let deadline = Instant::now() + timeout;
        loop {
            for pair in 0..self.frontend.queue_pairs() {
                let rx = &mut self.frontend.queue(pair).rx;
                let wait = deadline.saturating_duration_since(Instant::now()).min(Duration::from_millis(1));
                match rx.rx_wait(wait)? {
                    Some((_, frame)) if frame.get(12..14) == Some(&[0x80, 0x35]) => {}
                    Some((header, frame)) => return Ok(Some((pair, header, frame))),
                    None => {}
                }
            }
            if Instant::now() >= deadline {
                return Ok(None);
            }
        }
    }

    /// The next frame must come soon and be this one.
    pub fn expect(&mut self, frame: &[u8]) -> Result<()> {
        let (_, header, received) = self.receive(SOON)?.context("nothing came")?;
        check(&header, &received).map_err(anyhow::Error::msg)?;
        ensure!(received == frame, "another frame came: {received:02x?}, not {frame:02x?}");
        Ok(())
    }

    /// This frame must come soon, whatever comes before it.
    pub fn expect_among_others(&mut self, frame: &[u8]) -> Result<()> {
        let deadline = Instant::now() + SOON;
        while let Some((_, _, received)) = self.receive(deadline.saturating_duration_since(Instant::now()))? {
            if received == frame {
                return Ok(());
            }
        }
        bail!("it did not come");
    }

    /// The next frame must come soon and be in order; what was found in it.
    pub fn expect_checked(&mut self) -> Result<(NetHeader, Vec<u8>, Checked)> {
        let (_, header, received) = self.receive(SOON)?.context("nothing came")?;
        let checked = check(&header, &received).map_err(anyhow::Error::msg)?;
        Ok((header, received, checked))
    }

    /// Nothing must come.
    pub fn expect_nothing(&mut self) -> Result<()> {
        match self.receive(QUIET)? {
            None => Ok(()),
            Some((_, header, frame)) => bail!("a frame came: {header:?} {frame:02x?}"),
        }
    }
}
