//! Front-ends, all put through the same: what `docs/compatibility.md` shows.
//!
//! A [`Row`] is a front-end and how it is set up. [`Row::run`] starts it on a port of a daemon of its own, exchanges single packets and
//! many at a time with another guest, and looks at every byte of them; then the front-end is killed and comes back, then
//! the daemon. What is sent to the front-end comes back, or else there are two of its kind that talk to each other.

mod frontend;
pub mod page;
mod qemu;
mod virtio_user;

use std::time::Duration;

use anyhow::{Context, Result};
use serde::Serialize;

pub use virtio_user::Path;

use crate::daemon::PortConfig;
use crate::host::WorkDir;

/// Longer than anything takes that should happen.
const DEADLINE: Duration = Duration::from_secs(60);
/// Packets of a train of pings, and frames of a bulk transfer where they are counted.
const PINGS: usize = 50;
const BULK: usize = 2000;

/// Who speaks vhost-user to the port.
#[derive(Clone, Copy, Debug)]
pub enum Kind {
    /// QEMU, and Linux's driver in its guest.
    Qemu {
        /// Whether rings are packed.
        packed: bool,
        /// Whether the device offers to be used in order; Linux's driver need not know how.
        in_order: bool,
        /// Whether the device has any.
        offloads: bool,
    },
    /// The `vhost` crate's front-end, in process.
    Library {
        /// Whether rings are packed.
        packed: bool,
        /// Whether the driver takes what offloads there are.
        offloads: bool,
        /// Whether it kicks, or wants to be polled.
        kicks: bool,
    },
    /// DPDK's virtio-user, driven by `dpdk-testpmd`, which sends everything back.
    VirtioUser(Path),
}

/// A row of the table.
#[derive(Clone, Copy, Debug)]
pub struct Row {
    /// Who it is.
    pub kind: Kind,
    /// Kind of rings, in words.
    pub rings: &'static str,
    /// What the driver leaves to the device, in words.
    pub offloads: &'static str,
    /// Queue pairs.
    pub queues: u16,
    /// Whether the port connects and the front-end listens, or the other way round.
    pub client: bool,
}

/// What became of a row; it is complete if there is no error.
#[derive(Clone, Debug, Serialize)]
pub struct Outcome {
    /// Of packets that were sent one by one.
    pub ping: String,
    /// Of packets that were sent many at a time.
    pub bulk: String,
    /// The time from the end of the front-end until packets passed again, another one having been started.
    pub reconnect: Duration,
    /// The same from the end of the daemon.
    pub restart: Duration,
}

/// A front-end on a port, and who it talks to.
trait Subject {
    /// Sends packets one by one, all of which must come through unchanged; says how many.
    fn ping(&mut self) -> Result<String>;
    /// Sends many; says what came through.
    fn bulk(&mut self) -> Result<String>;
    /// Kills the front-end, and has it back. How long until packets passed again.
    fn reconnect(&mut self) -> Result<Duration>;
    /// Kills the daemon, and has it back. How long until packets passed again.
    fn restart(&mut self) -> Result<Duration>;
    /// Every packet must be accounted for.
    fn finish(&mut self) -> Result<()>;
}

impl Row {
    /// What it is called in the table.
    pub fn frontend(&self) -> &'static str {
        match self.kind {
            Kind::Qemu { .. } => "QEMU, Linux guest",
            Kind::Library { kicks: true, .. } => "`vhost` crate",
            Kind::Library { kicks: false, .. } => "`vhost` crate, no kicks",
            Kind::VirtioUser(_) => "DPDK virtio-user",
        }
    }

    /// The port's mode.
    pub fn mode(&self) -> &'static str {
        if self.client { "client" } else { "server" }
    }

    /// A port of this name for it, with its socket in `dir`.
    fn port(&self, name: &str, dir: &WorkDir) -> PortConfig {
        let port = if self.client { PortConfig::client(name, dir) } else { PortConfig::server(name, dir) };
        port.queues(self.queues)
    }

    /// Puts it through everything.
    ///
    /// # Errors
    /// What did not work.
    pub fn run(&self) -> Result<Outcome> {
        self.try_run().with_context(|| self.to_string())
    }

    fn try_run(&self) -> Result<Outcome> {
        let mut subject: Box<dyn Subject> = match self.kind {
            Kind::Qemu { packed, in_order, offloads } => {
                Box::new(qemu::Pair::start(self, packed, in_order, offloads)?)
            }
            Kind::Library { packed, offloads, kicks } => {
                Box::new(frontend::Pair::start(self, packed, offloads, kicks)?)
            }
            Kind::VirtioUser(path) => Box::new(virtio_user::Echo::start(self, path)?),
        };
        let ping = subject.ping().context("ping")?;
        let bulk = subject.bulk().context("bulk transfer")?;
        let mut timed = |what: &'static str, act: fn(&mut dyn Subject) -> Result<Duration>| {
            let took = act(&mut *subject).context(what)?;
            subject.ping().with_context(|| format!("ping after {what}"))?;
            anyhow::Ok(took)
        };
        let reconnect = timed("reconnect", |subject| subject.reconnect())?;
        let restart = timed("restart", |subject| subject.restart())?;
        subject.finish()?;
        Ok(Outcome { ping, bulk, reconnect, restart })
    }
}

impl std::fmt::Display for Row {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Row { rings, offloads, queues, .. } = self;
        write!(
            f,
            "{}: {rings}; offloads: {offloads}; queue pairs: {queues}; {}",
            self.frontend(),
            self.mode()
        )
    }
}

/// All rows, in the table's order.
pub fn rows() -> Vec<Row> {
    let mut rows = Vec::new();
    for (rings, packed, in_order) in
        [("split", false, false), ("packed", true, false), ("packed, in order offered", true, true)]
    {
        // With each kind of rings, any two of the other properties in all their combinations.
        for (offloads, queues, client) in
            [(true, 1, false), (true, 2, true), (false, 1, true), (false, 2, false)]
        {
            let kind = Kind::Qemu { packed, in_order, offloads };
            rows.push(Row { kind, rings, offloads: if offloads { "all" } else { "none" }, queues, client });
        }
    }
    for packed in [false, true] {
        for (offloads, kicks, queues, client) in
            [(true, true, 1, false), (false, true, 1, true), (true, true, 4, true), (true, false, 1, false)]
        {
            rows.push(Row {
                kind: Kind::Library { packed, offloads, kicks },
                rings: if packed { "packed" } else { "split" },
                offloads: if offloads { "all" } else { "none" },
                queues,
                client,
            });
        }
    }
    for path in Path::ALL {
        for (queues, client) in [(1, false), (2, true)] {
            let kind = Kind::VirtioUser(path);
            rows.push(Row { kind, rings: path.rings(), offloads: "none", queues, client });
        }
    }
    rows
}
