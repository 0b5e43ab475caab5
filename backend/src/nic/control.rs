//! The thread of a NIC: opens it, follows its links, lets go of it when it vanishes, and opens it again when it is back.

use super::card::Card;
use super::shared::SETTLING;
use super::{Attached, FlowSettings, NicStatus, Open, Opened, Ports, Shared, lock, tell_link, tell_opened};
use log::{info, warn};
use nic::io::{NicError, Port, PortEvent};
use nic::offload::FlowOffload;
use nic::pci::PciError;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fd::{AsFd, OwnedFd};
use std::io::{self, PipeReader};
use std::sync::Arc;
use std::time::{Duration, Instant};

/// How often an open NIC is looked at without an interrupt: it may have been lost, and none is asked for while workers are busy.
const LOOK: Timespec = Timespec { tv_sec: 0, tv_nsec: 100_000_000 };
/// How often it is tried to open one that is not.
const RETRY: Timespec = Timespec { tv_sec: 1, tv_nsec: 0 };
/// How long a device may take nothing before it is opened anew.
const USELESS: Duration = Duration::from_secs(3);

/// A NIC while it is open.
struct Current {
    card: Arc<Card>,
    interrupts: Vec<OwnedFd>,
    /// Its tables, if nobody else has them.
    tables: Option<Box<dyn FlowOffload>>,
    /// Somebody else has them.
    given: bool,
    useless_since: Option<Instant>,
}

/// The control side of a NIC.
pub(super) struct Control {
    shared: Arc<Shared>,
    open: Open,
    settings: FlowSettings,
    stopped: PipeReader,
    current: Option<Current>,
    /// What has happened, while it is carried out.
    events: Vec<PortEvent>,
}

impl Control {
    pub(super) fn new(
        shared: Arc<Shared>,
        open: Open,
        settings: FlowSettings,
        stopped: PipeReader,
    ) -> Control {
        Control { shared, open, settings, stopped, current: None, events: Vec::new() }
    }

    pub(super) fn run(mut self) {
        while let Some(interrupted) = self.wait() {
            self.look(interrupted);
        }
        self.close();
    }

    /// Waits until there is reason to look at the NIC, and gives whether it has interrupted. `None`: it is to be let go of for
    /// good.
    fn wait(&self) -> Option<bool> {
        let interrupts = self.current.as_ref().map_or(&[][..], |current| &current.interrupts);
        let fds = [self.stopped.as_fd(), self.shared.wake.as_fd()].into_iter();
        let mut fds: Vec<PollFd<'_>> = fds
            .chain(interrupts.iter().map(AsFd::as_fd))
            .map(|fd| PollFd::from_borrowed_fd(fd, PollFlags::IN))
            .collect();
        let timeout = if self.current.is_some() { LOOK } else { RETRY };
        // An interrupted wait is a short one.
        let _ = poll(&mut fds, Some(&timeout));
        let mut ready = fds.iter().map(|fd| !fd.revents().is_empty());
        if ready.next() == Some(true) {
            return None;
        }
        let mut count = [0; 8];
        if ready.next() == Some(true) {
            let _ = rustix::io::read(&self.shared.wake, &mut count);
        }
        let mut interrupted = false;
        for (_, fd) in ready.zip(interrupts).filter(|(ready, _)| *ready) {
            interrupted = true;
            let _ = rustix::io::read(fd, &mut count);
        }
        Some(interrupted)
    }

    /// Brings what is known of the NIC in step with how it is.
    pub(super) fn look(&mut self, interrupted: bool) {
        if self.current.is_some()
            && let Err(error) = self.follow(interrupted)
        {
            warn!("NIC {}: {error}; it is closed", self.shared.name);
            self.close();
        }
        if self.current.is_none()
            && let Err(error) = self.try_open()
        {
            self.failed(&error);
        }
    }

    fn try_open(&mut self) -> Result<(), NicError> {
        let Opened { driver, io, mut offload } = (self.open)()?;
        let refused =
            |cause: io::Error| PciError::Transport { what: "an interrupt's descriptor".into(), cause };
        let interrupts: io::Result<Vec<OwnedFd>> =
            io.interrupts().into_iter().map(|fd| fd.try_clone_to_owned()).collect();
        let interrupts = interrupts.map_err(refused)?;
        let names: Vec<String> =
            io.ports().iter().map(|port| format!("{} ({})", port.number, port.name)).collect();
        info!("NIC {}: driver {driver}, ports {}", self.shared.name, names.join(", "));
        {
            let mut status = lock(&self.shared.status);
            let NicStatus { resets, forwarded, unclaimed, .. } = *status;
            let (ports, has_tables) = (io.ports().to_vec(), offload.is_some());
            *status = NicStatus {
                driver,
                fault: None,
                absent: false,
                has_tables,
                ports,
                resets,
                forwarded,
                unclaimed,
            };
        }
        let card = Arc::new(Card::new(io, self.shared.wake.clone()));
        let mut ports = lock(&self.shared.ports);
        ports.card = Some(card.clone());
        let mut given = false;
        if let Some(owner) = &self.shared.tables
            && let Some(tables) = offload.take()
        {
            owner.opened(&self.shared.name, tables, &self.settings, ports.map());
            given = true;
        }
        let current = Current { card: card.clone(), interrupts, tables: offload, given, useless_since: None };
        self.current = Some(current);
        let start = |port: &Attached| {
            let mtu = self.shared.start(Some(&card), port)?;
            Some((port.shared.clone(), port.on_event.clone(), mtu))
        };
        let opened: Vec<_> = ports.attached.values().filter_map(start).collect();
        drop(ports);
        for (shared, on_event, mtu) in opened {
            tell_opened(&shared, &on_event, mtu);
        }
        Ok(())
    }

    /// Follows an open NIC. An error means that it is of no use any more.
    fn follow(&mut self, interrupted: bool) -> Result<(), NicError> {
        let Some(current) = &mut self.current else { return Ok(()) };
        if let Some(failure) = current.card.failure() {
            return Err(NicError::Config(failure.to_owned()));
        }
        let now = Instant::now();
        let usable = {
            let mut guard = current.card.lock();
            let Some(inner) = guard.as_mut() else { return Ok(()) };
            inner.look(interrupted, now, &mut self.events)?;
            inner.is_usable()
        };
        let since = *current.useless_since.get_or_insert(now);
        if usable {
            current.useless_since = None;
        } else if now.duration_since(since) > USELESS {
            return Err(NicError::Device("takes nothing any more".into()));
        }
        if let Some(tables) = &mut current.tables {
            // Nobody has put anything in: what it has to say is of no interest, but it sets itself up again after a reset.
            tables.poll(now, &mut Vec::new());
        }
        for event in std::mem::take(&mut self.events) {
            match event {
                PortEvent::Reset => {
                    warn!("NIC {}: it was reset; its ports go on", self.shared.name);
                    lock(&self.shared.status).resets += 1;
                }
                PortEvent::Link { number, link } => {
                    let mut status = lock(&self.shared.status);
                    if let Some(port) = status.ports.iter_mut().find(|port| port.number == number) {
                        port.link = link;
                    }
                    drop(status);
                    self.set_up(number, link.up);
                }
            }
        }
        Ok(())
    }

    /// A port's link has changed, or not.
    fn set_up(&self, number: u32, up: bool) {
        let changed = {
            let ports = lock(&self.shared.ports);
            let port = ports.attached.get(&number).filter(|port| port.shared.set_up(up));
            port.map(|Attached { name, shared, on_event, .. }| {
                (name.clone(), shared.clone(), on_event.clone())
            })
        };
        if let Some((name, shared, on_event)) = changed {
            info!("port {name}: link {}", if up { "up" } else { "down" });
            tell_link(&shared, &on_event);
        }
    }

    /// Says why the NIC is not open, once.
    fn failed(&self, error: &NicError) {
        let absent = matches!(error, NicError::Pci(PciError::Transport { cause, .. })
            if matches!(cause.kind(), io::ErrorKind::NotFound | io::ErrorKind::ConnectionRefused));
        let fault = error.to_string();
        {
            let mut status = lock(&self.shared.status);
            if status.fault.as_ref() == Some(&fault) {
                return;
            }
            warn!("NIC {}: {fault}; trying on", self.shared.name);
            let NicStatus { resets, forwarded, unclaimed, .. } = *status;
            *status = NicStatus {
                fault: Some(fault),
                absent,
                resets,
                forwarded,
                unclaimed,
                ..NicStatus::default()
            };
        }
        // So do its ports.
        let ports = lock(&self.shared.ports);
        for port in ports.attached.values() {
            self.shared.start(None, port);
        }
    }

    /// Lets go of the NIC; no worker uses it when this returns.
    fn close(&mut self) {
        let Some(Current { card, tables, given, .. }) = self.current.take() else { return };
        let mut down = Vec::new();
        {
            let Ports { attached, card: known } = &mut *lock(&self.shared.ports);
            *known = None;
            for Attached { name, shared, on_event, .. } in attached.values() {
                if shared.set_up(false) {
                    info!("port {name}: link down");
                    down.push((shared.clone(), on_event.clone()));
                }
                shared.stop();
            }
            self.shared.quiescence.barrier();
            let mut inner = card.lock().take();
            // One moment for all: the device may be gone, and others wait for this lock.
            let deadline = Instant::now() + SETTLING;
            for (&number, port) in attached.iter() {
                port.shared.bury(deadline, || inner.as_mut()?.stock(number));
            }
            if let Some(inner) = &inner {
                let mut status = lock(&self.shared.status);
                status.forwarded += inner.forwarded;
                status.unclaimed += inner.unclaimed;
                // A link that is not looked at is not known.
                status.ports.iter_mut().for_each(|port: &mut Port| port.link.up = false);
            }
            drop(inner);
            if let Some(owner) = self.shared.tables.as_ref().filter(|_| given) {
                owner.closed(&self.shared.name);
            }
            drop(tables);
        }
        down.into_iter().for_each(|(shared, on_event)| tell_link(&shared, &on_event));
    }
}
