//! Ports: opened from settings, closed in an order that leaves nobody with something that is gone.

use super::{Daemon, Pending, lock};
use crate::datapath::{DatapathPort, PortSettings};
use crate::flows;
use crate::host::HostPort;
use crate::host::bridge::Vlans;
use crate::nic::NicPort;
use crate::port_config::{Kind, NicPlace, PortConfig, Socket, XdpDevice};
use crate::vhost::{PortEvent, VhostUserPort};
use crate::wire::{Wire, WireEvent};
use crate::worker::rings::Rings;
use crate::xdp::Selection;
use anyhow::{Context, Result, bail};
use event_manager::SubscriberId;
use log::info;
use std::sync::atomic::AtomicBool;
use std::sync::{Arc, Mutex};
use switch_core::packet::PortId;

/// What comes after a port is closed.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Closing {
    /// Nothing: it is deleted.
    Deleted,
    /// It is opened again with other settings; its representor stays.
    Reopened,
}

/// What is behind a port.
pub enum Side {
    /// A guest, by its vhost-user side.
    Guest(Arc<Mutex<VhostUserPort>>),
    /// A network device.
    Wire(Wire),
    /// A port of a NIC.
    Nic(NicPort),
}

impl Side {
    fn rings(&self) -> Rings {
        match self {
            Side::Guest(vhost) => Rings::Guest(lock(vhost).shared().clone()),
            Side::Wire(wire) => Rings::Wire(wire.shared().clone()),
            Side::Nic(port) => Rings::Nic(port.shared().clone()),
        }
    }

    /// Lets go of guest or device.
    pub fn shutdown(&mut self) {
        match self {
            Side::Guest(vhost) => lock(vhost).shutdown(),
            Side::Wire(wire) => wire.shutdown(),
            Side::Nic(port) => port.shutdown(),
        }
    }
}

/// A port of the daemon.
pub struct Port {
    /// Its settings.
    pub config: PortConfig,
    /// What is behind it.
    pub side: Side,
    /// A guest's place in the event loop.
    pub subscriber: Option<SubscriberId>,
    /// The datapath's side.
    pub datapath: DatapathPort,
    /// MTU that is enforced on the way to the guest; that of a wire or a NIC is its device's.
    pub mtu: u32,
    /// What was wrong with a guest's rings last, until the driver has reset them.
    pub fault: Arc<Mutex<Option<String>>>,
}

impl Daemon {
    /// Opens a port and gives it to the workers and the host; the event loop takes it up at its next turn. A wire whose
    /// device is not to be had waits for it, as does a port of a NIC.
    pub(super) fn open_port(&mut self, config: &PortConfig) -> Result<()> {
        let Some(id) = self.datapath.reserve_slot() else {
            bail!("there are {} ports already", crate::worker::MAX_PORTS);
        };
        let fault = Arc::new(Mutex::new(None));
        let side = match &config.kind {
            Kind::VhostUser(socket) => self.guest_side(id, config, socket, fault.clone()),
            Kind::Xdp(device) => self.wire_side(id, config, device),
            Kind::Nic(place) => Ok(self.nic_side(id, config, place)),
        };
        let mut side = match side {
            Ok(side) => side,
            Err(error) => {
                self.datapath.release_slot(id);
                return Err(error);
            }
        };
        let mtu = match &side {
            Side::Guest(_) => config.mtu().into(),
            Side::Wire(wire) => wire.status().mtu,
            Side::Nic(port) => port.status().mtu,
        };
        let polled_by = self.choose_workers(config);
        let settings = PortSettings {
            name: &config.name,
            polled_by: &polled_by,
            mtu,
            max_masks: config.max_masks as usize,
            miss_rate: config.miss_rate,
        };
        let datapath = match self.datapath.add_port(id, &side.rings(), settings) {
            Ok(datapath) => datapath,
            Err(error) => {
                self.datapath.release_slot(id);
                return Err(error.into());
            }
        };
        let vlans = Vlans::from(&config.vlan_mode());
        if let Some(host) = &self.host {
            let is_device = config.is_own_device();
            let port = HostPort { id, name: config.name.clone(), vlans, mtu, is_device, polled_by };
            if let Err(error) = host.port_added(port) {
                self.leave_datapath(id);
                return Err(error.into());
            }
        }
        match &mut side {
            Side::Guest(vhost) => {
                self.pending.push(Pending::Watch(config.name.clone(), vhost.clone()));
            }
            Side::Wire(wire) => {
                if let Err(error) = wire.start() {
                    if let Some(host) = &self.host {
                        host.port_removed(id, false);
                    }
                    self.leave_datapath(id);
                    return Err(error.into());
                }
            }
            Side::Nic(port) => port.start(),
        }
        let port = Port { config: config.clone(), side, subscriber: None, datapath, mtu, fault };
        self.ports.insert(config.name.clone(), port);
        match &config.kind {
            Kind::VhostUser(socket) => {
                info!("port {}: {} {}", config.name, socket.mode, socket.path.display());
            }
            Kind::Xdp(device) => info!("port {}: device {}", config.name, device.name),
            Kind::Nic(place) => info!("port {}: NIC port {place}", config.name),
        }
        self.tell_mirror();
        self.reapply_flows(&config.name);
        Ok(())
    }

    fn guest_side(
        &self,
        id: PortId,
        config: &PortConfig,
        socket: &Socket,
        fault: Arc<Mutex<Option<String>>>,
    ) -> Result<Side> {
        let tell_link = self.host.as_ref().map(|host| host.link_teller(id));
        let on_event = move |event| {
            let up = matches!(event, PortEvent::LinkUp { .. });
            match event {
                PortEvent::Fault(text) => *lock(&fault) = Some(text),
                PortEvent::LinkUp { .. } | PortEvent::LinkDown => {
                    *lock(&fault) = None;
                    if let Some(tell) = &tell_link {
                        tell(up);
                    }
                }
            }
        };
        let quiescence = self.datapath.quiescence.clone();
        let queues = config.queues().into();
        // Beside the control socket, which no other daemon has.
        let record = self.config.control.with_extension("rings").join(&config.name);
        let (name, on_event) = (&config.name, Box::new(on_event));
        let vhost = VhostUserPort::new(name, queues, socket.clone(), Some(&record), quiescence, on_event)?;
        Ok(Side::Guest(Arc::new(Mutex::new(vhost))))
    }

    fn wire_side(&self, id: PortId, config: &PortConfig, device: &XdpDevice) -> Result<Side> {
        let tell_link = self.host.as_ref().map(|host| host.link_teller(id));
        // A device that stays OVS's own: nothing is taken of it before flows are there, and it serves OVS without us.
        let own = self.ovs.as_ref().filter(|_| config.is_own_device());
        let selection = own.map(|_| Arc::new(Selection::default()));
        let tell_ovs = own.map(|ovs| ovs.wire_teller()).transpose()?;
        let flows = self.datapath.flows.clone();
        let on_event = move |event| match event {
            WireEvent::Mtu(mtu) => lock(&flows).set_mtu(id, mtu),
            WireEvent::Link(up) => {
                if let Some(tell) = &tell_link {
                    tell(up);
                }
                if let Some(tell) = &tell_ovs {
                    tell();
                }
            }
        };
        let quiescence = self.datapath.quiescence.clone();
        let on_event = Box::new(on_event);
        let wire = Wire::new(&config.name, device, config.queues, selection, quiescence, on_event)?;
        Ok(Side::Wire(wire))
    }

    fn nic_side(&self, id: PortId, config: &PortConfig, place: &NicPlace) -> Side {
        let tell_link = self.host.as_ref().map(|host| host.link_teller(id));
        let flows = self.datapath.flows.clone();
        let on_event = move |event| match event {
            WireEvent::Mtu(mtu) => lock(&flows).set_mtu(id, mtu),
            WireEvent::Link(up) => {
                if let Some(tell) = &tell_link {
                    tell(up);
                }
            }
        };
        Side::Nic(match self.nics.get(&place.nic) {
            Some(nic) => nic.port(id, &config.name, place.port, config.queues().into(), Arc::new(on_event)),
            None => NicPort::without_nic(&place.nic, &self.datapath.quiescence, id, place.port),
        })
    }

    /// Why a port that was just asked for is of no use yet: its device cannot be had.
    pub(super) fn unusable(&self, name: &str) -> Option<String> {
        match &self.ports.get(name)?.side {
            Side::Guest(_) => None,
            Side::Wire(wire) => wire.status().fault,
            Side::Nic(port) => port.status().fault,
        }
    }

    /// `add-port`: opens a port and remembers it.
    pub(super) fn add_port(&mut self, config: PortConfig) -> Result<()> {
        config.validate()?;
        self.check_control(&config)?;
        config.check_workers(self.workers())?;
        let others: Vec<PortConfig> = self.ports.values().map(|port| port.config.clone()).collect();
        config.check_unique(&others)?;
        if self.ovs.is_some() {
            return self.add_ovs_port(&config).with_context(|| format!("port '{}'", config.name));
        }
        self.open_usable(&config).with_context(|| format!("port '{}'", config.name))?;
        if let Err(error) = self.state.record_add_port(&config) {
            self.take_port(&config.name, Closing::Deleted);
            return Err(error.into());
        }
        Ok(())
    }

    /// Opens a port that somebody asks for now, who is told if its device cannot be had.
    pub(super) fn open_usable(&mut self, config: &PortConfig) -> Result<()> {
        self.open_port(config)?;
        if let Some(reason) = self.unusable(&config.name) {
            self.take_port(&config.name, Closing::Deleted);
            bail!("{reason}");
        }
        Ok(())
    }

    /// Refuses the control socket as a port's.
    pub(super) fn check_control(&self, config: &PortConfig) -> Result<()> {
        if config.socket().is_some_and(|socket| socket.path == self.config.control) {
            bail!("port '{}': its socket is the control socket", config.name);
        }
        Ok(())
    }

    /// `del-port`: forgets a port; the flag is set when nobody uses it any more.
    pub(super) fn del_port(&mut self, name: &str) -> Result<Arc<AtomicBool>> {
        if !self.ports.contains_key(name) {
            bail!("there is no port '{name}'");
        }
        if self.ovs.is_some() {
            self.del_ovs_port(name)?;
        }
        self.state.record_del_port(name)?;
        self.take_port(name, Closing::Deleted).with_context(|| format!("there is no port '{name}'"))
    }

    /// Takes a port out; it is closed when the event loop has let go of it. The flag is set then.
    pub(super) fn take_port(&mut self, name: &str, closing: Closing) -> Option<Arc<AtomicBool>> {
        let port = self.ports.remove(name)?;
        if let (Side::Guest(vhost), Closing::Deleted) = (&port.side, closing) {
            // At once: the next port of that name makes a file of its own.
            lock(vhost).shared().forget_records();
        }
        let done = Arc::new(AtomicBool::new(false));
        self.pending.push(Pending::Close(Box::new(port), closing, done.clone()));
        self.reapply_flows(name);
        Some(done)
    }

    /// Takes a port apart that the event loop no longer knows: its guest first, then what the host knows of it (so that
    /// nobody makes flows for it any more), then its flows and the workers' knowledge of it.
    pub(super) fn close_port(&mut self, mut port: Port, closing: Closing) {
        let id = port.datapath.id;
        port.side.shutdown();
        if let Some(host) = &self.host {
            host.port_removed(id, closing == Closing::Reopened);
        }
        self.tell_mirror();
        // Counters outlive what counts.
        let paths = lock(&self.datapath.flows).path_counters(id);
        self.leave_datapath(id);
        self.gone.add(&port.stats(), &flows::sum_paths(&paths));
        info!(
            "port {}: {}",
            port.config.name,
            if closing == Closing::Deleted { "deleted" } else { "closed" }
        );
    }

    /// Takes a port from the workers and NICs; returns when they know nothing of it any more.
    pub(super) fn leave_datapath(&mut self, id: PortId) {
        let marks = {
            let mut table = lock(&self.datapath.flows);
            table.remove_port(id);
            table.marks()
        };
        for mark in marks {
            while !mark.is_reached() {
                match mark.is_worker() {
                    true => std::thread::yield_now(),
                    // A device takes its time, up to a second if it has to be reset.
                    false => std::thread::sleep(std::time::Duration::from_millis(1)),
                }
            }
        }
        self.datapath.release_slot(id);
    }
}
