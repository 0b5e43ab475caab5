//! Open vSwitch with Pointwork: the ports are guests on a daemon.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};

use super::offloads::{Load, finish};
use super::{PORTS, Side, add_bridges, bridge, is_first, port_name, port_number};
use crate::daemon::{Daemon, DaemonConfig, PortConfig};
use crate::frames::EXPERIMENTAL;
use crate::frontend::{Features, Frontend, NetHeader};
use crate::host::{WorkDir, wait_for};
use crate::net::builder;
use crate::ovs::Ovs;

/// How long many ports may take to open on a busy machine.
const START: Duration = Duration::from_secs(60);
/// Between packets, so that what Open vSwitch has to decide about is not lost in its queues.
const PACE: Duration = Duration::from_micros(250);

/// How many of a hundred packets whose flows are known must have been forwarded by the daemon alone.
const FAST: u64 = 75;

/// The side that must do the same.
pub struct Guests {
    /// Dropped first, then the daemon, then OVS.
    guests: Vec<Frontend>,
    daemon: Daemon,
    ovs: Ovs,
    /// Packets sent, without barriers.
    sent: u64,
    /// That, and the packets that took the fast path, when the last round began.
    before: (u64, u64),
    /// By round, both for all cases.
    rounds: Vec<(u64, u64)>,
    /// Flows seen in the daemon after the first rounds, and those met after a recirculation.
    flows: [usize; 2],
    /// Why flows were punted then, and how many for each reason.
    punted: BTreeMap<String, usize>,
    _dir: WorkDir,
}

/// What the guest behind a port leaves to the others: the first three of a lane get what is on the wire, the others take
/// checksums that are left out, and the last takes packets that are to be cut.
fn refused(port: usize) -> Features {
    let segments = Features(Features::GUEST_OFFLOADS.0 & !Features::GUEST_CSUM.0);
    [Features::GUEST_OFFLOADS, Features::GUEST_OFFLOADS, Features::GUEST_OFFLOADS, segments, Features(0)]
        [port % PORTS]
}

impl Guests {
    /// Starts an Open vSwitch with this many lanes, a daemon under it, and a guest on each port.
    pub fn start(lanes: usize) -> Result<Self> {
        let dir = WorkDir::new()?;
        let ovs = Ovs::start_for_tests(&dir)?;
        add_bridges(&ovs, lanes)?;
        let daemon = Daemon::start(&DaemonConfig::under(&ovs, []), &dir)?;
        let ports: Vec<PortConfig> =
            (0..lanes * PORTS).map(|port| PortConfig::server(&port_name(port), &dir)).collect();
        for (port, PortConfig { name, socket, .. }) in ports.iter().enumerate() {
            let bridge = bridge(port / PORTS);
            let number = format!("ofport_request={}", port_number(port));
            let socket = format!("external_ids:pointwork-socket={}", socket.display());
            let set = ["--", "set", "interface", name, &number, &socket];
            ovs.vsctl(&[&["--no-wait", "add-port", &bridge, name], &set[..]].concat())?;
        }
        wait_for("the sockets of the ports", START, || {
            Ok(ports.iter().all(|port| port.socket.exists()).then_some(()))
        })
        .with_context(|| daemon.log_tail(20))?;
        let mut guests = Vec::new();
        for (index, port) in ports.iter().enumerate() {
            let mut guest = builder(port).without(refused(index)).start()?;
            guest.queue(0).rx.rx_fill(2048, 128)?;
            guests.push(guest);
        }
        let names: Vec<String> = ports.iter().map(|port| port.name.clone()).collect();
        daemon.wait_link(&names.iter().map(String::as_str).collect::<Vec<_>>(), true, START)?;
        for (port, name) in names.iter().enumerate() {
            // A port whose link is down is left out when packets are flooded.
            wait_for(&format!("port {name} of the bridge"), START, || {
                let shown = ovs.vsctl(&["get", "interface", name, "ofport", "link_state"])?;
                Ok((shown.split_whitespace().eq([port_number(port).to_string().as_str(), "up"]))
                    .then_some(()))
            })?;
        }
        Ok(Self {
            guests,
            daemon,
            ovs,
            sent: 0,
            before: (0, 0),
            rounds: Vec::new(),
            flows: [0; 2],
            punted: BTreeMap::new(),
            _dir: dir,
        })
    }

    /// Sends what `next` gives, packet by packet, while `change` is made to Open vSwitch. Gives what comes out meanwhile.
    pub fn send_during(
        &mut self,
        change: impl FnOnce(&Ovs) -> Result<()> + Send,
        mut next: impl FnMut() -> (usize, Vec<u8>),
    ) -> Result<Vec<(usize, Vec<u8>)>> {
        let Self { guests, ovs, .. } = self;
        let mut out = Vec::new();
        std::thread::scope(|scope| {
            let change = scope.spawn(|| change(ovs));
            while !change.is_finished() {
                let (port, frame) = next();
                guests[port].queue(0).tx.tx(&frame, &NetHeader::default())?;
                out.extend(drain(guests, PACE)?);
            }
            change.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
        })?;
        Ok(out)
    }

    /// The daemon.
    pub fn daemon(&self) -> &Daemon {
        &self.daemon
    }
}

/// The next frame that a guest has got.
fn receive(guest: &mut Frontend, wait: Duration) -> Result<Option<(NetHeader, Vec<u8>)>> {
    let ring = &mut guest.queue(0).rx;
    // Looking costs no system call.
    match ring.rx_poll()? {
        None if !wait.is_zero() => Ok(ring.rx_wait(wait)?),
        received => Ok(received),
    }
}

/// What [`Side::drain`] gives.
fn drain(guests: &mut [Frontend], patience: Duration) -> Result<Vec<(usize, Vec<u8>)>> {
    let deadline = Instant::now() + patience;
    let mut frames = Vec::new();
    loop {
        for (port, guest) in guests.iter_mut().enumerate() {
            // Waits on the first guest only, and briefly: the others are looked at again.
            let wait = if port == 0 { Duration::from_micros(200).min(patience) } else { Duration::ZERO };
            while let Some((header, frame)) = receive(guest, wait)? {
                let refused = refused(port);
                let takes = (!refused.contains(Features::GUEST_CSUM)
                    || header.flags & NetHeader::NEEDS_CSUM == 0)
                    && (!refused.contains(Features::GUEST_TSO4) || header.gso_type == NetHeader::GSO_NONE);
                ensure!(takes, "p{} got an offload that its guest does not take: {header:?}", port + 1);
                frames.extend(finish(&header, frame)?.into_iter().map(|frame| (port, frame)));
            }
        }
        if !frames.is_empty() || Instant::now() >= deadline {
            return Ok(frames);
        }
    }
}

impl Side for Guests {
    fn name(&self) -> &'static str {
        "Open vSwitch with Pointwork"
    }

    fn lanes(&self) -> usize {
        self.guests.len() / PORTS
    }

    fn ovs(&self) -> &Ovs {
        &self.ovs
    }

    fn inject(&mut self, port: usize, frame: &[u8], load: Load) -> Result<()> {
        self.sent += u64::from(frame.get(12..14) != Some(&EXPERIMENTAL.to_be_bytes()));
        let (header, frame) = load.offered(frame);
        Ok(self.guests[port].queue(0).tx.tx(&frame, &header)?)
    }

    fn drain(&mut self, patience: Duration) -> Result<Vec<(usize, Vec<u8>)>> {
        drain(&mut self.guests, patience)
    }

    /// OVS revises its flows, and then the daemon reads them.
    fn settle(&mut self) -> Result<()> {
        self.ovs.revalidate()?;
        self.daemon.ctl(&["sync"]).context("the flows of OVS do not arrive")?;
        Ok(())
    }

    fn observe(&mut self, round: usize) -> Result<()> {
        let paths = self.daemon.stats()?.paths;
        let now = (self.sent, paths.l1 + paths.l2);
        self.rounds.resize(self.rounds.len().max(round + 1), (0, 0));
        self.rounds[round].0 += now.0 - self.before.0;
        self.rounds[round].1 += now.1 - self.before.1;
        self.before = now;
        if round == 0 {
            let dump = self.daemon.ctl(&["dump-flows"])?;
            let barrier = format!("eth_type({EXPERIMENTAL:#06x})");
            for flow in dump["flows"].as_array().context("no flows in the dump")? {
                let [text, handling] = ["flow", "handling"].map(|key| flow[key].as_str().unwrap_or_default());
                if text.contains(&barrier) {
                    continue;
                }
                ensure!(flow["actions"] != "?", "a flow of OVS is not read, {handling}: {text}");
                self.flows[0] += 1;
                self.flows[1] += usize::from(!text.contains("recirc_id(0)"));
                if let Some(why) = handling.strip_prefix("punt: ") {
                    // The bridges' own ports are all alike.
                    let why = why.trim_end_matches(|char: char| char.is_ascii_digit());
                    *self.punted.entry(why.into()).or_default() += 1;
                }
            }
        }
        Ok(())
    }

    /// Without this, a daemon that gives everything to Open vSwitch would do everything as Open vSwitch does.
    fn conclude(&mut self) -> Result<String> {
        let stats = self.daemon.balanced_stats()?;
        let [flows, recirculated] = self.flows;
        let mut punted: Vec<(&String, &usize)> = self.punted.iter().collect();
        punted.sort_by_key(|(_, count)| std::cmp::Reverse(**count));
        let percent = |(sent, fast): &(u64, u64)| 100 * fast / (*sent).max(1);
        let shares: Vec<u64> = self.rounds.iter().map(percent).collect();
        // Flows are there by then.
        let known = self.rounds.iter().enumerate().filter(|(round, _)| !is_first(*round));
        let later = known.fold((0, 0), |all, (_, round)| (all.0 + round.0, all.1 + round.1));
        let said = format!(
            "{shares:?} % on the fast path, round by round, {} % where flows are known; {flows} flows, {recirculated} after a recirculation, \
             punted: {punted:?}; {:?}",
            percent(&later),
            stats.paths
        );
        ensure!(later.0 == 0 || percent(&later) >= FAST, "too little took the fast path: {said}");
        Ok(said)
    }
}
