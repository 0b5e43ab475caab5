//! Tunnels as the host has them: their logical ports, and the network that they go over.
//!
//! Flows are compiled with [`Tunnels`]: it says where packets are decapsulated, and which way those go that are put into a
//! tunnel. A thread ([`Underlay`]) follows the host's devices, addresses, routes and neighbours by rtnetlink, keeps a
//! [`model`] of them, and tells when a way has changed that a flow has asked for.

mod follow;
mod host_port;
pub mod model;
mod rtnetlink;
#[cfg(test)]
mod tests;

pub use follow::Underlay;
pub use host_port::{DontFragment, HostFlows, HostPort};

use crate::ovs::mirror::Restriction;
use model::{Model, Target};
use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::fmt;
use std::io;
use std::net::IpAddr;
use std::ops::RangeInclusive;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};
use switch_core::action::PortRef;
use switch_core::compile::{Way, Ways};
use switch_core::packet::PortId;
use switch_core::tunnel::{self, Endpoint, Kind, Outer, Remote, Vlan};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

/// Ways that are known at a time.
const MAX_WAYS: usize = 65_536;
/// How long a way is followed that no flow goes by, and its next hop is asked for.
const KEEP: Duration = Duration::from_secs(60);

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
    df: Arc<DontFragment>,
    /// Rung when a flow has asked for a way that is not known yet, or there are other ports.
    bell: EventFd,
}

#[derive(Default)]
struct Known {
    /// By slot.
    ports: HashMap<u32, Tunnel>,
    /// What flows have asked for, and the answers.
    ways: HashMap<(PortId, Remote), Asked>,
    /// Whether flows were refused since there were [`MAX_WAYS`].
    is_full: bool,
    exits: Exits,
    /// What is decapsulated of packets that are given to a port of [`Exits::hosts`].
    behind: HashMap<String, Arc<[Endpoint]>>,
}

struct Asked {
    way: Result<Way, String>,
    /// When a flow was last known to want it.
    wanted: Instant,
}

impl Asked {
    /// Whether a flow wants it, or did a moment ago.
    fn is_wanted(&mut self, now: Instant) -> bool {
        // The plan of a flow that goes by it has its header.
        if self.way.as_ref().is_ok_and(|way| Arc::strong_count(&way.outer) > 1) {
            self.wanted = now;
        }
        now.duration_since(self.wanted) < KEEP
    }
}

/// Where the host's network and the switch meet.
#[derive(Clone, Default, PartialEq, Eq, Debug)]
pub struct Exits {
    /// Ports of ours that are devices of the host's, by their names: packets that the host would send by them leave by us.
    pub wires: HashMap<String, Wire>,
    /// Ports of bridges that are devices of the host's, by their names.
    pub hosts: HashMap<String, HostPort>,
    /// Of the kernel's datapath: what the host's network does with all packets, beside sending them where routes lead.
    pub stack: Restriction,
}

/// A port of ours that is a device of the host's.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Wire {
    /// The port.
    pub id: PortId,
    /// Why nothing that the host would send may leave by it, if so.
    pub shut: Option<String>,
}

struct Tunnel {
    id: PortId,
    /// Of its device, in the kernel's datapath.
    name: String,
    device: TunnelDevice,
    /// Of packets that a flow has chosen.
    endpoints: Arc<[Endpoint]>,
    userspace: bool,
}

impl Tunnel {
    /// What a route is asked for. Userspace OVS asks for addresses alone.
    fn target(&self, remote: &Remote) -> Target {
        let udp_port = self.device.udp_port.filter(|_| !self.userspace);
        Target {
            dst: remote.dst,
            src: remote.src,
            udp_port: udp_port.map(|port| remote.port.unwrap_or(port)),
        }
    }
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
        let bell = EventFd::new(EFD_NONBLOCK)?;
        let df = Arc::new(DontFragment::new(bell.try_clone()?));
        Ok(Tunnels { known: Mutex::default(), df, bell })
    }

    fn lock(&self) -> MutexGuard<'_, Known> {
        self.known.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A device has this logical port from now on. Flows that name it are compiled with it when they are put. `userspace`: it is a
    /// device of the userspace datapath, which leaves congestion marks to flows.
    pub fn add(&self, id: PortId, name: &str, device: TunnelDevice, userspace: bool) {
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
        let (name, endpoints) = (name.to_owned(), [endpoint].into());
        self.lock().ports.insert(id.slot, Tunnel { id, name, device, endpoints, userspace });
        self.ring();
    }

    /// The logical port is gone. Flows that name it go, or are put anew.
    pub fn remove(&self, id: PortId) {
        let mut known = self.lock();
        known.ports.remove(&id.slot);
        known.ways.retain(|(port, _), _| *port != id);
    }

    /// Flows of a port that is a device of the host's.
    ///
    /// # Errors
    /// The system gives no descriptor.
    pub fn host_flows(&self) -> io::Result<Arc<HostFlows>> {
        Ok(Arc::new(HostFlows::new(self.bell.try_clone()?)))
    }

    /// Who is to be told of the flows of what is inside of the kernel's tunnels.
    pub fn dont_fragment(&self) -> Arc<DontFragment> {
        self.df.clone()
    }

    /// These are the exits from now on. What they rule out is ruled out at once, and the rest looked for anew. Whether flows are to be
    /// compiled anew before anything that is gone may go.
    #[must_use]
    pub fn set_exits(&self, exits: Exits) -> bool {
        let mut known = self.lock();
        if known.exits == exits {
            return false;
        }
        let mut is_less = false;
        let Known { ways, behind, exits: before, .. } = &mut *known;
        *before = exits;
        let Exits { wires, hosts, stack } = before;
        for Asked { way, .. } in ways.values_mut() {
            let is_open = |way: &Way| wires.values().any(|wire| wire.id == way.to && wire.shut.is_none());
            let leads = |way: &Way| stack.egress.is_none() && is_open(way);
            if way.as_ref().is_ok_and(|way| !leads(way)) {
                *way = Err("its way is being looked up".into());
                is_less = true;
            }
        }
        behind.retain(|name, _| {
            let is_open = |port: &HostPort| stack.ingress.is_none() && port.restriction.ingress.is_none();
            let stays = hosts.get(name).is_some_and(is_open);
            is_less |= !stays;
            stays
        });
        drop(known);
        self.ring();
        is_less
    }

    /// Other ends to which packets of a tunnel take the host path, by the reason.
    pub fn held(&self, port: PortId) -> BTreeMap<String, BTreeSet<IpAddr>> {
        let mut held: BTreeMap<String, BTreeSet<IpAddr>> = BTreeMap::new();
        let known = self.lock();
        let ways = known.ways.iter().filter(|((of, _), _)| *of == port);
        for ((_, remote), Asked { way, .. }) in ways {
            way.as_ref().err().into_iter().for_each(|why| {
                held.entry(why.clone()).or_default().insert(remote.dst);
            });
        }
        held
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
        let known = self.lock();
        let target = |(port, remote): &(PortId, Remote)| Some(known.ports.get(&port.slot)?.target(remote));
        known.ways.keys().filter_map(target).collect()
    }

    /// Answers anew what flows have asked for, and forgets what none wants any more; whether flows are to ask again, as any answer is
    /// another.
    fn refresh(&self, model: &Model, defaults: &Defaults, now: Instant) -> bool {
        let mut known = self.lock();
        let Known { ports, ways, is_full, exits, behind } = &mut *known;
        let df = self.df.is_seen();
        let of_host =
            |(name, port): (&String, &HostPort)| (name.clone(), ends(model, exits, ports, name, port, df));
        let found = exits.hosts.iter().map(of_host);
        let found = found.filter(|(_, ends)| !ends.is_empty()).collect();
        let mut has_changed = *behind != found;
        *behind = found;
        ways.retain(|_, asked| {
            let is_wanted = asked.is_wanted(now);
            // A flow that was refused asks again if it is still there; and there is room for others.
            has_changed |= !is_wanted && (asked.way.is_err() || std::mem::take(is_full));
            is_wanted
        });
        for ((port, remote), known) in ways {
            let Some(tunnel) = ports.get(&port.slot).filter(|tunnel| tunnel.id == *port) else {
                continue;
            };
            let way = find(model, defaults, exits, tunnel, remote);
            if way != known.way {
                *known = Asked { way, wanted: now };
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
    exits: &Exits,
    tunnel: &Tunnel,
    remote: &Remote,
) -> Result<Way, String> {
    let Tunnel { name, device, userspace, .. } = tunnel;
    if !userspace {
        exits.stack.egress.clone().map_or(Ok(()), Err)?;
        model.device(name).ok_or_else(|| format!("{name} is down"))?;
    }
    let hop = model.way_of(&tunnel.target(remote)).map_err(|why| why.to_string())?;
    // What the host does at a device above is not watched: queueing, filters, priorities of the tag.
    if !userspace && exits.hosts.contains_key(&hop.device) {
        let above = |what: &str| Err(format!("the route leads by a {what} of {}", hop.device));
        hop.link.vlan.map_or(Ok(()), |_| above("VLAN device"))?;
        if hop.is_enslaved {
            above("VRF")?
        }
    }
    let ttl = if remote.dst.is_ipv4() { defaults.ttl } else { defaults.hop_limit };
    let underlay = tunnel::Underlay {
        kind: device.kind,
        link: hop.link,
        src: hop.src,
        ttl: hop.ttl.unwrap_or(ttl),
        port: device.udp_port.unwrap_or_default(),
        src_ports: defaults.ports.clone(),
    };
    let mut header = remote.outer(&underlay).map_err(str::to_owned)?;
    let (device, wire) = match (exits.wires.get(&hop.device), exits.hosts.get(&hop.device)) {
        (Some(wire), _) => (&hop.device, wire),
        (None, Some(port)) => {
            let to = port.onward(&hop.device, &mut header)?;
            let found = exits.wires.iter().find(|(_, wire)| wire.id == to);
            found.ok_or("it leaves by no wire of ours")?
        }
        (None, None) => return Err(format!("{} is no port of ours", hop.device)),
    };
    wire.shut.as_ref().map_or(Ok(()), |why| Err(format!("{device}: {why}")))?;
    let outer = Outer::new(&header).map_err(|error| error.to_string())?;
    // Userspace OVS sends on what is too long, for the port to drop it.
    let limit = match userspace {
        true => u32::MAX,
        false => hop.mtu.saturating_sub(outer.network_overhead() as u32),
    };
    Ok(Way { outer: Arc::new(outer), to: wire.id, limit })
}

/// The ends of the kernel's tunnels behind a port that is a device of the host's: none, if what the host would do with their packets is
/// more than to take them for a tunnel's.
fn ends(
    model: &Model,
    exits: &Exits,
    tunnels: &HashMap<u32, Tunnel>,
    name: &str,
    port: &HostPort,
    df: bool,
) -> Arc<[Endpoint]> {
    let is_open = exits.stack.ingress.is_none() && port.restriction.ingress.is_none();
    let Some(host) = model.device(name).filter(|host| is_open && !host.is_enslaved && host.mac.is_some())
    else {
        return [].into();
    };
    let tunnels = tunnels.values().filter(|tunnel| !tunnel.userspace && model.device(&tunnel.name).is_some());
    let ends = tunnels.flat_map(|tunnel| {
        let of_tunnel = tunnel.endpoints.iter();
        let at = |end: &Endpoint| {
            let end = Endpoint { df, ..*end };
            model.addresses(host.index).map(move |local| Endpoint {
                mac: host.mac,
                local: Some(local),
                ..end
            })
        };
        of_tunnel.flat_map(at)
    });
    let mut ends: Vec<Endpoint> = ends.collect();
    ends.sort_unstable_by_key(|end| (end.in_port, end.local));
    ends.into()
}

impl Ways for Tunnels {
    fn is_tunnel(&self, port: PortId) -> bool {
        self.lock().ports.get(&port.slot).is_some_and(|tunnel| tunnel.id == port)
    }

    fn way(&self, port: PortId, remote: &Remote) -> Result<Way, String> {
        let place = (port, remote.clone());
        let mut known = self.lock();
        if let Some(asked) = known.ways.get_mut(&place) {
            asked.wanted = Instant::now();
            return asked.way.clone();
        }
        if known.ways.len() >= MAX_WAYS {
            known.is_full = true;
            return Err(format!("there are {MAX_WAYS} ways of tunnels already"));
        }
        let way = Err(format!("route to {} is being looked up", remote.dst));
        known.ways.insert(place, Asked { way: way.clone(), wanted: Instant::now() });
        self.ring();
        way
    }

    fn endpoints(&self, port: &PortRef) -> Option<Arc<[Endpoint]>> {
        let known = self.lock();
        let id = match port {
            PortRef::Ours(id) => id,
            PortRef::Foreign(name) => return known.behind.get(name).cloned(),
        };
        known.ports.get(&id.slot).filter(|tunnel| tunnel.id == *id).map(|tunnel| tunnel.endpoints.clone())
    }
}
