//! Tunnels as the host has them: their logical ports, and the network that they go over.
//!
//! Flows are compiled with [`Tunnels`]: it says where packets are decapsulated, and which way those go that are put into a
//! tunnel. A thread ([`Underlay`]) follows the host's devices, addresses, routes and neighbours by rtnetlink, keeps a
//! [`model`] of them, and tells when a way has changed that a flow has asked for.

mod follow;
pub mod model;
mod rtnetlink;
#[cfg(test)]
mod tests;

pub use follow::Underlay;

use model::{Model, Target};
use std::collections::HashMap;
use std::fmt;
use std::io;
use std::ops::RangeInclusive;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use switch_core::action::PortRef;
use switch_core::compile::{Way, Ways};
use switch_core::packet::PortId;
use switch_core::tunnel::{self, Endpoint, Kind, Outer, Remote, Vlan};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

/// Ways that are known at a time.
const MAX_WAYS: usize = 65_536;

/// A device of tunnels in OVS's datapath, such as `vxlan_sys_4789`: it stands for the tunnels of all bridges that are of this
/// kind and have this UDP port.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct TunnelDevice {
    /// What kind of tunnels.
    pub kind: Kind,
    /// UDP port at which their packets come; none of GRE.
    pub udp_port: Option<u16>,
    /// VXLAN: whether group policies are read.
    pub gbp: bool,
}

impl fmt::Display for TunnelDevice {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(kind_name(self.kind))?;
        self.udp_port.map_or(Ok(()), |port| write!(f, " {port}"))
    }
}

/// The kind of a tunnel as OVS calls it.
pub fn kind_name(kind: Kind) -> &'static str {
    match kind {
        Kind::Vxlan => "vxlan",
        Kind::Geneve => "geneve",
        Kind::Gre => "gre",
    }
}

/// The tunnels' logical ports, and what flows that have to do with them are compiled with.
pub struct Tunnels {
    known: Mutex<Known>,
    /// Rung when a flow has asked for a way that is not known yet, or there are other ports.
    bell: EventFd,
}

#[derive(Default)]
struct Known {
    /// By slot.
    ports: HashMap<u32, Tunnel>,
    /// What flows have asked for, and the answers.
    ways: HashMap<(PortId, Remote), Result<Way, String>>,
    /// Ports of ours that are devices of the host's, by their names.
    exits: HashMap<String, PortId>,
}

struct Tunnel {
    id: PortId,
    device: TunnelDevice,
    endpoints: Arc<[Endpoint]>,
}

/// What the kernel puts into headers of which nobody says it.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Defaults {
    /// TTL of IPv4.
    pub ttl: u8,
    /// Hop limit of IPv6.
    pub hop_limit: u8,
    /// UDP source ports.
    pub ports: RangeInclusive<u16>,
}

impl Default for Defaults {
    /// Those that Linux begins with.
    fn default() -> Defaults {
        Defaults { ttl: 64, hop_limit: 64, ports: 32_768..=60_999 }
    }
}

impl Defaults {
    /// Those of the calling thread's network namespace, as far as they can be read.
    pub fn read() -> Defaults {
        let read = |name: &str| std::fs::read_to_string(format!("/proc/sys/net/{name}")).unwrap_or_default();
        let number = |name| read(name).trim().parse().ok().filter(|&ttl| ttl != 0);
        let default = Defaults::default();
        let range = read("ipv4/ip_local_port_range");
        let mut ends = range.split_whitespace().map_while(|end| end.parse::<u16>().ok());
        Defaults {
            ttl: number("ipv4/ip_default_ttl").unwrap_or(default.ttl),
            hop_limit: number("ipv6/conf/all/hop_limit").unwrap_or(default.hop_limit),
            ports: ends.next().zip(ends.next()).map_or(default.ports, |(first, last)| first..=last),
        }
    }
}

impl Tunnels {
    /// None yet.
    ///
    /// # Errors
    /// The system gives no eventfd.
    pub fn new() -> io::Result<Tunnels> {
        Ok(Tunnels { known: Mutex::default(), bell: EventFd::new(EFD_NONBLOCK)? })
    }

    fn lock(&self) -> MutexGuard<'_, Known> {
        self.known.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A device has this logical port from now on. Flows that name it are compiled with it when they are put. `userspace`: it is a
    /// device of the userspace datapath, which leaves congestion marks to flows.
    pub fn add(&self, id: PortId, device: TunnelDevice, userspace: bool) {
        let endpoint = Endpoint {
            mac: None,
            // A tag that the flow leaves on, userspace OVS takes for a part of the network header.
            vlan: Vlan::Untagged,
            local: None,
            kind: device.kind,
            port: device.udp_port.unwrap_or_default(),
            // Userspace OVS takes packets with a group policy for malformed.
            gbp: device.gbp && !userspace,
            df: false,
            as_linux: !userspace,
            in_port: id,
        };
        self.lock().ports.insert(id.slot, Tunnel { id, device, endpoints: [endpoint].into() });
        self.ring();
    }

    /// The logical port is gone. Flows that name it go, or are put anew.
    pub fn remove(&self, id: PortId) {
        let mut known = self.lock();
        known.ports.remove(&id.slot);
        known.ways.retain(|(port, _), _| *port != id);
    }

    /// Ports of ours that are devices of the host's: packets that the host would send by them leave by us.
    pub fn set_exits(&self, exits: HashMap<String, PortId>) {
        let mut known = self.lock();
        if known.exits != exits {
            known.exits = exits;
            drop(known);
            self.ring();
        }
    }

    /// Wakes the thread that follows the network.
    fn ring(&self) {
        // It fails only when it has been rung often enough.
        let _ = self.bell.write(1);
    }

    fn bell(&self) -> &EventFd {
        &self.bell
    }

    /// Whether there is nothing to be followed.
    fn has_none(&self) -> bool {
        self.lock().ports.is_empty()
    }

    /// Where flows lead.
    fn targets(&self) -> Vec<Target> {
        self.lock().ways.keys().map(|(_, remote)| Target { dst: remote.dst, src: remote.src }).collect()
    }

    /// Answers anew what flows have asked for; whether any answer is another.
    fn refresh(&self, model: &Model, defaults: &Defaults) -> bool {
        let mut known = self.lock();
        let Known { ports, ways, exits } = &mut *known;
        let mut has_changed = false;
        for ((port, remote), known) in ways {
            let Some(Tunnel { device, .. }) = ports.get(&port.slot).filter(|tunnel| tunnel.id == *port)
            else {
                continue;
            };
            let way = find(model, defaults, exits, device, remote);
            if way != *known {
                *known = way;
                has_changed = true;
            }
        }
        has_changed
    }
}

/// The way of packets to the other end.
fn find(
    model: &Model,
    defaults: &Defaults,
    exits: &HashMap<String, PortId>,
    device: &TunnelDevice,
    remote: &Remote,
) -> Result<Way, String> {
    let target = Target { dst: remote.dst, src: remote.src };
    let hop = model.way_of(&target).map_err(|why| why.to_string())?;
    let to = exits.get(&hop.device).ok_or_else(|| format!("{} is no port of ours", hop.device))?;
    let ttl = if remote.dst.is_ipv4() { defaults.ttl } else { defaults.hop_limit };
    let underlay = tunnel::Underlay {
        kind: device.kind,
        link: hop.link,
        src: hop.src,
        ttl: hop.ttl.unwrap_or(ttl),
        port: device.udp_port.unwrap_or_default(),
        src_ports: defaults.ports.clone(),
    };
    let header = remote.outer(&underlay).map_err(str::to_owned)?;
    let outer = Outer::new(&header).map_err(|error| error.to_string())?;
    Ok(Way { outer: Arc::new(outer), to: *to, limit: u32::MAX })
}

impl Ways for Tunnels {
    fn is_tunnel(&self, port: PortId) -> bool {
        self.lock().ports.get(&port.slot).is_some_and(|tunnel| tunnel.id == port)
    }

    fn way(&self, port: PortId, remote: &Remote) -> Result<Way, String> {
        let place = (port, remote.clone());
        let mut known = self.lock();
        if let Some(way) = known.ways.get(&place) {
            return way.clone();
        }
        if known.ways.len() >= MAX_WAYS {
            // No flow has those any more of which nobody holds the header.
            known.ways.retain(|_, way| way.as_ref().is_ok_and(|way| Arc::strong_count(&way.outer) > 1));
        }
        let why = format!("route to {} is being looked up", remote.dst);
        if known.ways.len() < MAX_WAYS {
            known.ways.insert(place, Err(why.clone()));
            self.ring();
        }
        Err(why)
    }

    fn endpoints(&self, port: &PortRef) -> Option<Arc<[Endpoint]>> {
        let PortRef::Ours(id) = port else { return None };
        let known = self.lock();
        known.ports.get(&id.slot).filter(|tunnel| tunnel.id == *id).map(|tunnel| tunnel.endpoints.clone())
    }
}
