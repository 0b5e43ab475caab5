//! Two guests of QEMU's, with Linux's driver.

use std::net::{IpAddr, Ipv4Addr};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};

use super::{DEADLINE, PINGS, Row, Subject};
use crate::daemon::{Daemon, DaemonConfig};
use crate::guest::{Guest, GuestConfig, NO_OFFLOADS, Nic};
use crate::host::{WorkDir, wait_for};

const A: IpAddr = IpAddr::V4(Ipv4Addr::new(10, 0, 0, 1));
const B: IpAddr = IpAddr::V4(Ipv4Addr::new(10, 0, 0, 2));
/// Connections of a bulk transfer, so that each queue has some, and what each carries, in MiB.
const CONNECTIONS: u16 = 4;
const MEGABYTES: usize = 4;
/// Where the first of them leads.
const PORT: u16 = 7001;
/// Packets that make the guests' traffic.
const TRAFFIC: u64 = 500;

/// The guests of a row.
pub(super) struct Pair {
    guests: [Guest; 2],
    configs: [GuestConfig; 2],
    daemon: Daemon,
    config: DaemonConfig,
    dir: WorkDir,
}

impl Pair {
    pub(super) fn start(row: &Row, packed: bool, in_order: bool, offloads: bool) -> Result<Self> {
        let dir = WorkDir::new()?;
        let ports = ["vm1", "vm2"].map(|name| row.port(name, &dir));
        let options = [(packed, "packed=on"), (in_order, "in_order=on"), (!offloads, NO_OFFLOADS)];
        let options: Vec<&str> = options.iter().filter(|(on, _)| *on).map(|(_, option)| *option).collect();
        let configs = ports.each_ref().map(|port| {
            let nic = if port.client { Nic::listen(&port.socket) } else { Nic::connect(&port.socket) };
            let nic = nic.queues(port.queues).options(&options.join(","));
            // Linux uses as many queue pairs as it has processors.
            GuestConfig { vcpus: port.queues.into(), ..GuestConfig::new(&port.name, nic) }
        });
        let config = DaemonConfig::new(ports);
        let daemon = Daemon::start(&config, &dir)?;
        let guests = Guest::start_all(configs.clone(), &dir)?;
        let mut pair = Self { guests, configs, daemon, config, dir };
        pair.introduce()?;
        pair.guests[1].iperf3_server()?;
        for port in pair.daemon.show()? {
            let has = |name: &str| port.features.iter().any(|feature| feature == name);
            let as_wanted = has("packed") == packed
                && ["csum", "guest-csum", "tso", "guest-tso"].into_iter().all(|name| has(name) == offloads);
            ensure!(as_wanted && port.active_queues == row.queues, "{port:?}");
        }
        Ok(pair)
    }

    /// Gives both their addresses, and waits until they reach each other.
    fn introduce(&mut self) -> Result<()> {
        self.guests[0].address("10.0.0.1/24")?;
        self.guests[1].address("10.0.0.2/24")?;
        self.reach()
    }

    fn reach(&self) -> Result<()> {
        self.guests[0].wait_reachable(B, DEADLINE)?;
        self.guests[1].wait_reachable(A, DEADLINE)
    }

    /// A file of random bytes from one to the other, by all connections at once; each must arrive as it was sent.
    fn transfer(&self, from: &Guest, to: &Guest, address: IpAddr) -> Result<()> {
        let all = |each: &str| {
            let ports: Vec<String> = (PORT..PORT + CONNECTIONS).map(|port| port.to_string()).collect();
            format!("for p in {}; do ({each}) & done; wait", ports.join(" "))
        };
        // An end of input that came first would end the connection: a pipe that is open for writing too has none.
        to.sh("rm -f /run/got.* /run/open && mkfifo /run/open")?;
        let receive = to.spawn(&all("nc -l -p $p <>/run/open | sha256sum >/run/got.$p"))?;
        from.sh(&format!("head -c {} /dev/urandom >/run/file", MEGABYTES << 20))?;
        // Whoever is not listening yet refuses.
        let send = from.spawn(&all(&format!("until nc {address} $p </run/file; do sleep 0.1; done")))?;
        send.wait(DEADLINE)?.success()?;
        receive.wait(DEADLINE)?.success()?;
        let sum = |guest: &Guest, command: &str| -> Result<Vec<String>> {
            let sums = guest.sh(command)?;
            Ok(sums.lines().filter_map(|line| line.split_whitespace().next()).map(str::to_owned).collect())
        };
        let (sent, got) = (sum(from, "sha256sum /run/file")?, sum(to, "cat /run/got.*")?);
        ensure!(sent.len() == 1 && got == vec![sent[0].clone(); CONNECTIONS.into()], "{sent:?}, {got:?}");
        Ok(())
    }
}

impl Subject for Pair {
    fn ping(&mut self) -> Result<String> {
        for (from, to) in [(0, B), (1, A)] {
            let ping = self.guests[from].ping(to, PINGS as u32, Duration::from_millis(20))?;
            ensure!(ping.received as usize == PINGS, "to {to}: {ping}");
        }
        Ok(format!("{PINGS} of {PINGS}"))
    }

    fn bulk(&mut self) -> Result<String> {
        let [a, b] = &self.guests;
        self.transfer(a, b, B)?;
        self.transfer(b, a, A)?;
        Ok(format!("{} MiB of TCP", usize::from(CONNECTIONS) * MEGABYTES))
    }

    fn reconnect(&mut self) -> Result<Duration> {
        let start = Instant::now();
        self.guests[0].kill()?;
        self.guests[0] = Guest::start(self.configs[0].clone(), &self.dir)?;
        self.introduce()?;
        Ok(start.elapsed())
    }

    /// In the midst of a transfer.
    fn restart(&mut self) -> Result<Duration> {
        let load = self.guests[0].spawn(&format!("iperf3 -c {B} -t 600"))?;
        let sent = |daemon: &Daemon| -> Result<u64> {
            Ok(daemon.stats()?.ports.get("vm2").context("the port vm2")?.tx_packets)
        };
        let before = sent(&self.daemon)?;
        wait_for("traffic", DEADLINE, || Ok((sent(&self.daemon)? > before + TRAFFIC).then_some(())))?;
        let start = Instant::now();
        self.daemon.kill()?;
        self.daemon = Daemon::start(&self.config, &self.dir)?;
        self.reach()?;
        let took = start.elapsed();
        // What it has under way would keep pings from fitting into a ring.
        load.kill()?;
        load.wait(DEADLINE)?;
        Ok(took)
    }

    fn finish(&mut self) -> Result<()> {
        self.daemon.balanced_stats()?;
        let shown = self.daemon.show()?;
        ensure!(shown.iter().all(|port| port.link && port.fault.is_none()), "{shown:?}");
        self.daemon.terminate()
    }
}
