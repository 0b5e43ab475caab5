//! The host's network as far as tunnels go over it: a model that is told of events and asked for ways. It knows no sockets.

use std::collections::{BTreeSet, HashMap};
use std::fmt;
use std::net::IpAddr;
use switch_core::tunnel::Link;

/// 802.1Q, the TPID of VLAN devices that do not say another.
pub const ETH_P_8021Q: u16 = 0x8100;

/// A network device.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Device {
    /// Its index in the network namespace.
    pub index: u32,
    /// Its name.
    pub name: String,
    /// Its MAC address; none of what is no Ethernet.
    pub mac: Option<[u8; 6]>,
    /// Whether it is up and has a carrier.
    pub up: bool,
    /// Its MTU in bytes.
    pub mtu: u32,
    /// Whether another device has it for its own: a bridge, a bond, a VRF, or Open vSwitch's datapath.
    pub is_enslaved: bool,
    /// Of a VLAN of another device: which.
    pub vlan: Option<VlanOf>,
}

/// A VLAN of a device, as a device.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct VlanOf {
    /// Index of the other device.
    pub below: u32,
    /// TPID of the tag.
    pub tpid: u16,
    /// VLAN id.
    pub id: u16,
}

/// A neighbour as the kernel knows it.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Neighbour {
    /// Index of the device behind which it is.
    pub device: u32,
    /// Its address.
    pub address: IpAddr,
    /// Its MAC address, as far as it is known.
    pub mac: Option<[u8; 6]>,
    /// How well it is known.
    pub state: NeighbourState,
}

/// How well a neighbour is known (`NUD_*` of `neighbour.h`).
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum NeighbourState {
    /// Not, or no longer.
    Unresolved,
    /// It is asked for.
    Asked,
    /// It answered, a while ago, and nobody has sent to it since.
    Stale,
    /// It answered, or is just being asked again.
    Reachable,
    /// By configuration, for ever.
    Permanent,
}

impl NeighbourState {
    /// Whether packets can be sent to it.
    pub fn is_resolved(self) -> bool {
        use NeighbourState::*;
        matches!(self, Stale | Reachable | Permanent)
    }
}

/// What has changed.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Event {
    /// A device is new, or has changed.
    Device(Device),
    /// The device with this index is gone.
    DeviceGone(u32),
    /// A neighbour is new, or has changed; one that is gone is unresolved.
    Neighbour(Neighbour),
    /// The device with this index has an address of ours, or no longer.
    Address(u32, IpAddr, bool),
    /// Routes may lead elsewhere: a route, rule or next hop has changed.
    Routes,
}

/// What a route is asked for.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub struct Target {
    /// The other end.
    pub dst: IpAddr,
    /// Our address, if it is given.
    pub src: Option<IpAddr>,
    /// UDP destination port of what the kernel sends there, which rules may look at.
    pub udp_port: Option<u16>,
}

/// What the kernel answers.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Route {
    /// Index of the device that packets leave by.
    pub device: u32,
    /// The next hop; none if the other end is a neighbour.
    pub gateway: Option<IpAddr>,
    /// Our address.
    pub src: Option<IpAddr>,
    /// TTL or hop limit, if the route says it.
    pub ttl: Option<u8>,
    /// MTU, if the route says it.
    pub mtu: Option<u32>,
}

/// How packets leave the host.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Hop {
    /// Name of the device by which they leave: of a VLAN, the one below it.
    pub device: String,
    /// Whether the route's own device is in a VRF or otherwise another's.
    pub is_enslaved: bool,
    /// Addresses of the link, and the tag of a VLAN device.
    pub link: Link,
    /// Our address.
    pub src: IpAddr,
    /// TTL or hop limit, if the route says it.
    pub ttl: Option<u8>,
    /// Longest packet, IP header included.
    pub mtu: u32,
}

/// Why there is no way, or none yet.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum WhyNot {
    /// The kernel has not been asked yet.
    NotAsked(IpAddr),
    /// The kernel has no route, and says why.
    NoRoute(IpAddr, String),
    /// The next hop does not say its MAC address.
    Unresolved(IpAddr),
    /// A device on the way is not up, or has gone.
    Down(String),
    /// The device on the way is no Ethernet.
    NoEthernet(String),
    /// The kernel does not say which address is ours.
    NoSource(IpAddr),
}

impl fmt::Display for WhyNot {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            WhyNot::NotAsked(to) => write!(f, "route to {to} is being looked up"),
            WhyNot::NoRoute(to, why) => write!(f, "no route to {to}: {why}"),
            WhyNot::Unresolved(next) => write!(f, "neighbour of {next} unresolved"),
            WhyNot::Down(device) => write!(f, "{device} is down"),
            WhyNot::NoEthernet(device) => write!(f, "{device} is no Ethernet"),
            WhyNot::NoSource(to) => write!(f, "no address of ours on the way to {to}"),
        }
    }
}

/// What is known.
#[derive(Default, PartialEq, Eq, Debug)]
pub struct Model {
    devices: HashMap<u32, Device>,
    neighbours: HashMap<(u32, IpAddr), Neighbour>,
    /// Our addresses, by device.
    addresses: BTreeSet<(u32, IpAddr)>,
    /// The kernel's answers since routes changed last.
    routes: HashMap<Target, Result<Route, String>>,
}

impl Model {
    /// Takes an event in.
    pub fn apply(&mut self, event: Event) {
        match event {
            Event::Device(device) => {
                // When a device goes down or comes up the kernel moves routes, and does not tell of each.
                if self.devices.get(&device.index).is_none_or(|known| known.up != device.up) {
                    self.routes.clear();
                }
                self.devices.insert(device.index, device);
            }
            Event::DeviceGone(index) => {
                self.devices.remove(&index);
                self.neighbours.retain(|(device, _), _| *device != index);
                self.addresses.retain(|(device, _)| *device != index);
                self.routes.clear();
            }
            Event::Neighbour(neighbour) => {
                let place = (neighbour.device, neighbour.address);
                match neighbour.state {
                    NeighbourState::Unresolved => drop(self.neighbours.remove(&place)),
                    _ => drop(self.neighbours.insert(place, neighbour)),
                }
            }
            Event::Address(device, address, is_there) => {
                match is_there {
                    true => self.addresses.insert((device, address)),
                    false => self.addresses.remove(&(device, address)),
                };
                self.routes.clear();
            }
            Event::Routes => self.routes.clear(),
        }
    }

    /// Whether the kernel is to be asked for this route: it has not been, since routes changed last.
    pub fn is_unasked(&self, target: &Target) -> bool {
        !self.routes.contains_key(target)
    }

    /// The kernel is to be asked for all routes again.
    pub fn forget_routes(&mut self) {
        self.routes.clear();
    }

    /// Whether the kernel has been asked for any.
    pub fn has_routes(&self) -> bool {
        !self.routes.is_empty()
    }

    /// What the kernel has answered.
    pub fn answer(&mut self, target: Target, route: Result<Route, String>) {
        self.routes.insert(target, route);
    }

    /// The way to the other end.
    ///
    /// # Errors
    /// Why there is none, or none yet.
    pub fn way_of(&self, target: &Target) -> Result<Hop, WhyNot> {
        let route = self.routes.get(target).ok_or(WhyNot::NotAsked(target.dst))?;
        let route = route.as_ref().map_err(|why| WhyNot::NoRoute(target.dst, why.clone()))?;
        let there = |index: u32| {
            let device = self.devices.get(&index).ok_or_else(|| WhyNot::Down(format!("device {index}")))?;
            if device.up { Ok(device) } else { Err(WhyNot::Down(device.name.clone())) }
        };
        let device = there(route.device)?;
        let no_ethernet = || WhyNot::NoEthernet(device.name.clone());
        let (below, tag) = match device.vlan {
            None => (device, None),
            Some(VlanOf { below, tpid, id }) => (there(below)?, Some((tpid, id))),
        };
        if below.vlan.is_some() {
            return Err(no_ethernet()); // two tags are more than a header of ours has
        }
        let next = route.gateway.unwrap_or(target.dst);
        let neighbour = self.neighbours.get(&(route.device, next)).filter(|known| known.state.is_resolved());
        let dst = neighbour.and_then(|known| known.mac).ok_or(WhyNot::Unresolved(next))?;
        Ok(Hop {
            device: below.name.clone(),
            is_enslaved: device.is_enslaved,
            link: Link { dst, src: device.mac.ok_or_else(no_ethernet)?, vlan: tag },
            src: target.src.or(route.src).ok_or(WhyNot::NoSource(target.dst))?,
            ttl: route.ttl,
            mtu: route.mtu.map_or(device.mtu, |mtu| mtu.min(device.mtu)),
        })
    }

    /// The device of this name, if it is there and up.
    pub fn device(&self, name: &str) -> Option<&Device> {
        self.devices.values().find(|device| device.name == name && device.up)
    }

    /// Our addresses on the device with this index.
    pub fn addresses(&self, device: u32) -> impl Iterator<Item = IpAddr> {
        self.addresses.iter().filter(move |(of, _)| *of == device).map(|(_, address)| *address)
    }

    /// The next hop to the other end, by device and address, if the kernel is to be told that it is in use: it is not resolved, or
    /// was not asked for so long that it may have moved.
    pub fn to_be_asked(&self, target: &Target) -> Option<(u32, IpAddr)> {
        let route = self.routes.get(target)?.as_ref().ok()?;
        let next = route.gateway.unwrap_or(target.dst);
        self.devices.get(&route.device).filter(|device| device.up && device.mac.is_some())?;
        let state = self.neighbours.get(&(route.device, next)).map(|known| known.state);
        let is_due = matches!(state, None | Some(NeighbourState::Unresolved | NeighbourState::Stale));
        is_due.then_some((route.device, next))
    }
}
