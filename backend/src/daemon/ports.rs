//! Ports: opened from settings, closed in an order that leaves nobody with something that is gone.

use super::{Daemon, Pending, lock};
use crate::datapath::{DatapathPort, PortSettings};
use crate::flows;
use crate::host::HostPort;
use crate::host::bridge::Vlans;
use crate::port_config::PortConfig;
use crate::vhost::{PortEvent, VhostUserPort};
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

/// A port of the daemon.
pub struct Port {
    /// Its settings.
    pub config: PortConfig,
    /// The vhost-user side.
    pub vhost: Arc<Mutex<VhostUserPort>>,
    /// Its place in the event loop.
    pub subscriber: Option<SubscriberId>,
    /// The datapath's side.
    pub datapath: DatapathPort,
    /// MTU that is enforced on the way to the guest.
    pub mtu: u32,
    /// What was wrong with its rings last, until the driver has reset them.
    pub fault: Arc<Mutex<Option<String>>>,
}

impl Daemon {
    /// Opens a port and gives it to the workers and the host; the event loop takes it up at its next turn.
    pub(super) fn open_port(&mut self, config: &PortConfig) -> Result<()> {
        let Some(id) = self.datapath.reserve_slot() else {
            bail!("there are {} ports already", crate::worker::MAX_PORTS);
        };
        let fault = Arc::new(Mutex::new(None));
        let vhost = VhostUserPort::new(config.clone(), self.datapath.quiescence.clone(), {
            let fault = fault.clone();
            let tell_link = self.host.as_ref().map(|host| host.link_teller(id));
            Box::new(move |event| {
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
            })
        });
        let vhost = match vhost {
            Ok(vhost) => vhost,
            Err(error) => {
                self.datapath.release_slot(id);
                return Err(error.into());
            }
        };
        let settings = PortSettings {
            name: &config.name,
            queues: config.queues.into(),
            mtu: config.mtu().into(),
            max_masks: config.max_masks as usize,
            miss_rate: config.miss_rate,
        };
        let datapath = match self.datapath.add_port(id, vhost.shared(), settings) {
            Ok(datapath) => datapath,
            Err(error) => {
                self.datapath.release_slot(id);
                return Err(error.into());
            }
        };
        let vlans = Vlans::from(&config.vlan_mode());
        if let Some(host) = &self.host {
            let port = HostPort {
                id,
                name: config.name.clone(),
                vlans,
                mtu: config.mtu().into(),
                polled_by: datapath.polled_by.clone(),
            };
            if let Err(error) = host.port_added(port) {
                self.leave_datapath(id);
                return Err(error.into());
            }
        }
        let vhost = Arc::new(Mutex::new(vhost));
        self.pending.push(Pending::Watch(config.name.clone(), vhost.clone()));
        let mtu = config.mtu().into();
        let port = Port { config: config.clone(), vhost, subscriber: None, datapath, mtu, fault };
        self.ports.insert(config.name.clone(), port);
        info!("port {}: {} {}", config.name, config.mode, config.socket.display());
        self.tell_mirror();
        self.reapply_flows(&config.name);
        Ok(())
    }

    /// `add-port`: opens a port and remembers it.
    pub(super) fn add_port(&mut self, config: PortConfig) -> Result<()> {
        config.validate()?;
        if config.socket == self.config.control {
            bail!("port '{}': its socket is the control socket", config.name);
        }
        let others: Vec<PortConfig> = self.ports.values().map(|port| port.config.clone()).collect();
        config.check_unique(&others)?;
        if self.ovs.is_some() {
            return self.add_ovs_port(&config).with_context(|| format!("port '{}'", config.name));
        }
        self.open_port(&config).with_context(|| format!("port '{}'", config.name))?;
        if let Err(error) = self.state.record_add_port(&config) {
            self.take_port(&config.name, Closing::Deleted);
            return Err(error.into());
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
        let done = Arc::new(AtomicBool::new(false));
        self.pending.push(Pending::Close(Box::new(port), closing, done.clone()));
        self.reapply_flows(name);
        Some(done)
    }

    /// Takes a port apart that the event loop no longer knows: its guest first, then what the host knows of it (so that
    /// nobody makes flows for it any more), then its flows and the workers' knowledge of it.
    pub(super) fn close_port(&mut self, port: Port, closing: Closing) {
        let id = port.datapath.id;
        lock(&port.vhost).shutdown();
        if let Some(host) = &self.host {
            host.port_removed(id, closing == Closing::Reopened);
        }
        self.tell_mirror();
        // Counters outlive what counts.
        let paths = lock(&self.datapath.flows).path_counters(id);
        self.leave_datapath(id);
        self.gone.add(&port.datapath.counters, &flows::sum_paths(&paths));
        info!(
            "port {}: {}",
            port.config.name,
            if closing == Closing::Deleted { "deleted" } else { "closed" }
        );
    }

    /// Takes a port from the workers; returns when they know nothing of it any more.
    fn leave_datapath(&mut self, id: PortId) {
        let marks = {
            let mut table = lock(&self.datapath.flows);
            table.remove_port(id);
            table.marks()
        };
        for mark in marks {
            while !mark.is_reached() {
                std::thread::yield_now();
            }
        }
        self.datapath.release_slot(id);
    }
}
