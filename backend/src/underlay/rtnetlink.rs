//! The kernel's messages about devices, neighbours, and what moves routes (`rtnetlink(7)`).
//!
//! Layouts: the kernel's `include/uapi/linux/if_link.h`, `neighbour.h` and `rtnetlink.h`.

use super::model::{Device, ETH_P_8021Q, Event, Neighbour, NeighbourState, Route, Target, VlanOf};
use crate::host_state::netlink::{Malformed, Message, Request, Requests, attributes, text, u16_at, u32_at};
use std::io;
use std::net::IpAddr;
use switch_core::key::ipproto;

/// The multicast groups of what this module reads: devices, neighbours, addresses, routes and rules of either family, next hops.
pub const GROUPS: [u32; 9] = [1, 3, 5, 7, 8, 9, 11, 19, 32];

/// Reads everything that events tell of, but for routes, which are asked for one by one.
///
/// # Errors
/// Those of [`Requests::ask`].
pub fn read(requests: &mut Requests) -> io::Result<Vec<Event>> {
    let mut events = requests.ask(&Request::dump(RTM_GETLINK, &[0; IFINFOMSG]), decode_link)?;
    events.extend(requests.ask(&Request::dump(RTM_GETNEIGH, &[0; NDMSG]), |body| {
        Ok(decode_neighbour(body)?.map(Event::Neighbour))
    })?);
    events.extend(
        requests.ask(&Request::dump(RTM_GETADDR, &[0; IFADDRMSG]), |body| decode_address(body, true))?,
    );
    Ok(events)
}

/// What a notification says, if it matters.
///
/// # Errors
/// It is malformed: all is to be read again.
pub fn event(message: &Message) -> Result<Option<Event>, Malformed> {
    let body = message.body;
    Ok(match message.kind {
        RTM_NEWLINK => decode_link(body)?,
        // A port that leaves a bridge is told as one of the bridge's family, and goes on to exist.
        RTM_DELLINK if body.first() == Some(&AF_UNSPEC) => Some(Event::DeviceGone(u32_at(body, 4)?)),
        RTM_NEWNEIGH => decode_neighbour(body)?.map(Event::Neighbour),
        RTM_DELNEIGH => decode_neighbour(body)?
            .map(|known| Event::Neighbour(Neighbour { state: NeighbourState::Unresolved, ..known })),
        RTM_NEWADDR => decode_address(body, true)?,
        RTM_DELADDR => decode_address(body, false)?,
        RTM_NEWROUTE | RTM_DELROUTE | RTM_NEWRULE | RTM_DELRULE | RTM_NEWNEXTHOP | RTM_DELNEXTHOP => {
            Some(Event::Routes)
        }
        _ => None,
    })
}

/// Asks for a route.
///
/// # Errors
/// The kernel's own, such as `ENETUNREACH`; `AddrNotAvailable` for an address of our own, and for what is no single station's.
pub fn route(requests: &mut Requests, target: &Target) -> io::Result<Route> {
    let (family, bits) = match target.dst {
        IpAddr::V4(_) => (AF_INET, 32),
        IpAddr::V6(_) => (AF_INET6, 128),
    };
    let mut header = [0; RTMSG];
    (header[0], header[1]) = (family, bits);
    let mut request = Request::get(RTM_GETROUTE, &header);
    if let Some(src) = target.src {
        header[2] = bits;
        request = Request::get(RTM_GETROUTE, &header).attribute(RTA_SRC, &octets(src));
    }
    let mut request = request.attribute(RTA_DST, &octets(target.dst));
    if let Some(port) = target.udp_port {
        request = request.attribute(RTA_IP_PROTO, &[ipproto::UDP]).attribute(RTA_DPORT, &port.to_be_bytes());
    }
    let routes = requests.ask(&request, |body| decode_route(body).map(Some))?;
    let (kind, route) = routes.into_iter().next().ok_or(Malformed)?;
    match kind {
        RTN_UNICAST => route.ok_or_else(|| io::Error::other("it has an encapsulation of its own")),
        _ => Err(io::Error::new(io::ErrorKind::AddrNotAvailable, "it is not another host's address")),
    }
}

/// Tells the kernel that a neighbour is in use: it is asked for if it is not known, and asked again when it has been silent for long.
///
/// # Errors
/// The kernel's own.
pub fn use_neighbour(requests: &mut Requests, device: u32, address: IpAddr) -> io::Result<()> {
    let mut header = [0; NDMSG];
    header[0] = if address.is_ipv4() { AF_INET } else { AF_INET6 };
    header[4..8].copy_from_slice(&device.to_ne_bytes());
    header[10] = NTF_USE;
    let request = Request::set(RTM_NEWNEIGH, &header).attribute(NDA_DST, &octets(address));
    requests.ask::<()>(&request, |_| Ok(None)).map(drop)
}

fn octets(address: IpAddr) -> Vec<u8> {
    match address {
        IpAddr::V4(v4) => v4.octets().to_vec(),
        IpAddr::V6(v6) => v6.octets().to_vec(),
    }
}

fn address(bytes: &[u8]) -> Option<IpAddr> {
    match bytes.len() {
        4 => Some(IpAddr::from(*bytes.first_chunk::<4>()?)),
        16 => Some(IpAddr::from(*bytes.first_chunk::<16>()?)),
        _ => None,
    }
}

/// A device; nothing of a message that a bridge sends about its port.
fn decode_link(body: &[u8]) -> Result<Option<Event>, Malformed> {
    if body.first() != Some(&AF_UNSPEC) {
        return Ok(None);
    }
    let (kind, index, flags) = (u16_at(body, 2)?, u32_at(body, 4)?, u32_at(body, 8)?);
    let (mut name, mut mac, mut below, mut vlan) = (String::new(), None, None, None);
    let (mut mtu, mut is_enslaved, mut is_split) = (0, false, false);
    for attribute in attributes(body.get(IFINFOMSG..).ok_or(Malformed)?) {
        match attribute? {
            (IFLA_IFNAME, value) => name = text(value),
            (IFLA_ADDRESS, value) if kind == ARPHRD_ETHER => mac = value.first_chunk().copied(),
            (IFLA_MTU, value) => mtu = u32_at(value, 0)?,
            (IFLA_MASTER, value) => is_enslaved = u32_at(value, 0)? != 0,
            (IFLA_LINK, value) => below = Some(u32_at(value, 0)?),
            (IFLA_LINK_NETNSID, _) => is_split = true,
            (IFLA_LINKINFO, nested) => vlan = decode_vlan(nested)?,
            _ => {}
        }
    }
    if is_split && vlan.is_some() {
        // The index of the device below is one of another network namespace: no packet leaves by it here.
        (mac, vlan) = (None, None);
    }
    let vlan = below.zip(vlan).map(|(below, (tpid, id))| VlanOf { below, tpid, id });
    let up = flags & (IFF_UP | IFF_RUNNING) == IFF_UP | IFF_RUNNING;
    Ok(Some(Event::Device(Device { index, name, mac, up, mtu, is_enslaved, vlan })))
}

/// TPID and id of a VLAN device.
fn decode_vlan(info: &[u8]) -> Result<Option<(u16, u16)>, Malformed> {
    let (mut is_vlan, mut tpid, mut id) = (false, ETH_P_8021Q, None);
    for attribute in attributes(info) {
        match attribute? {
            (IFLA_INFO_KIND, kind) => is_vlan = text(kind) == "vlan",
            (IFLA_INFO_DATA, nested) if is_vlan => {
                for attribute in attributes(nested) {
                    match attribute? {
                        (IFLA_VLAN_ID, value) => id = Some(u16_at(value, 0)?),
                        (IFLA_VLAN_PROTOCOL, value) => tpid = u16::from_be(u16_at(value, 0)?),
                        _ => {}
                    }
                }
            }
            _ => {}
        }
    }
    Ok(id.map(|id| (tpid, id)))
}

fn decode_neighbour(body: &[u8]) -> Result<Option<Neighbour>, Malformed> {
    let (family, device, state) = (*body.first().ok_or(Malformed)?, u32_at(body, 4)?, u16_at(body, 8)?);
    if ![AF_INET, AF_INET6].contains(&family) {
        return Ok(None); // of a bridge
    }
    let (mut found, mut mac) = (None, None);
    for attribute in attributes(body.get(NDMSG..).ok_or(Malformed)?) {
        match attribute? {
            (NDA_DST, value) => found = address(value),
            (NDA_LLADDR, value) => mac = value.first_chunk().copied(),
            _ => {}
        }
    }
    let state = match state {
        NUD_PERMANENT => NeighbourState::Permanent,
        NUD_REACHABLE | NUD_DELAY | NUD_PROBE => NeighbourState::Reachable,
        NUD_STALE => NeighbourState::Stale,
        NUD_INCOMPLETE => NeighbourState::Asked,
        _ => NeighbourState::Unresolved,
    };
    Ok(found.map(|address| Neighbour { device, address, mac, state }))
}

/// An address of ours.
fn decode_address(body: &[u8], is_there: bool) -> Result<Option<Event>, Malformed> {
    let device = u32_at(body, 4)?;
    let (mut local, mut other) = (None, None);
    for attribute in attributes(body.get(IFADDRMSG..).ok_or(Malformed)?) {
        match attribute? {
            (IFA_LOCAL, value) => local = address(value),
            (IFA_ADDRESS, value) => other = address(value),
            _ => {}
        }
    }
    // Of a link between two, the latter is the other end's.
    Ok(local.or(other).map(|address| Event::Address(device, address, is_there)))
}

/// The kind of a route, and the route; none if it does more to packets than to lead them somewhere.
fn decode_route(body: &[u8]) -> Result<(u8, Option<Route>), Malformed> {
    let kind = *body.get(7).ok_or(Malformed)?;
    let mut route = Route { device: 0, gateway: None, src: None, ttl: None, mtu: None };
    let mut is_plain = true;
    for attribute in attributes(body.get(RTMSG..).ok_or(Malformed)?) {
        match attribute? {
            (RTA_OIF, value) => route.device = u32_at(value, 0)?,
            (RTA_GATEWAY, value) => route.gateway = address(value),
            // The family, then the address: an IPv6 next hop of an IPv4 route.
            (RTA_VIA, value) => route.gateway = value.get(2..).and_then(address),
            (RTA_PREFSRC, value) => route.src = address(value),
            (RTA_METRICS, nested) => {
                for attribute in attributes(nested) {
                    match attribute? {
                        (RTAX_HOPLIMIT, value) => {
                            let ttl = u8::try_from(u32_at(value, 0)?).ok();
                            route.ttl = ttl.filter(|&ttl| ttl != 0);
                        }
                        (RTAX_MTU, value) => route.mtu = Some(u32_at(value, 0)?).filter(|&mtu| mtu != 0),
                        _ => {}
                    }
                }
            }
            // MPLS, segment routing, BPF …
            (RTA_NEWDST | RTA_ENCAP_TYPE | RTA_ENCAP, _) => is_plain = false,
            _ => {}
        }
    }
    Ok((kind, is_plain.then_some(route)))
}

const AF_UNSPEC: u8 = 0;
const AF_INET: u8 = libc::AF_INET as u8;
const AF_INET6: u8 = libc::AF_INET6 as u8;

const RTM_NEWLINK: u16 = 16;
const RTM_DELLINK: u16 = 17;
const RTM_GETLINK: u16 = 18;
const RTM_NEWADDR: u16 = 20;
const RTM_DELADDR: u16 = 21;
const RTM_GETADDR: u16 = 22;
const RTM_NEWROUTE: u16 = 24;
const RTM_DELROUTE: u16 = 25;
const RTM_GETROUTE: u16 = 26;
const RTM_NEWNEIGH: u16 = 28;
const RTM_DELNEIGH: u16 = 29;
const RTM_GETNEIGH: u16 = 30;
const RTM_NEWRULE: u16 = 32;
const RTM_DELRULE: u16 = 33;
const RTM_NEWNEXTHOP: u16 = 104;
const RTM_DELNEXTHOP: u16 = 105;

/// Size of `struct ifinfomsg`.
const IFINFOMSG: usize = 16;
const IFF_UP: u32 = 0x1;
const IFF_RUNNING: u32 = 0x40;
const ARPHRD_ETHER: u16 = 1;
const IFLA_ADDRESS: u16 = 1;
const IFLA_IFNAME: u16 = 3;
const IFLA_MTU: u16 = 4;
const IFLA_LINK: u16 = 5;
const IFLA_MASTER: u16 = 10;
const IFLA_LINKINFO: u16 = 18;
const IFLA_LINK_NETNSID: u16 = 37;
const IFLA_INFO_KIND: u16 = 1;
const IFLA_INFO_DATA: u16 = 2;
const IFLA_VLAN_ID: u16 = 1;
const IFLA_VLAN_PROTOCOL: u16 = 5;

/// Size of `struct ifaddrmsg`.
const IFADDRMSG: usize = 8;
const IFA_ADDRESS: u16 = 1;
const IFA_LOCAL: u16 = 2;

/// Size of `struct ndmsg`.
const NDMSG: usize = 12;
const NDA_DST: u16 = 1;
const NDA_LLADDR: u16 = 2;
const NTF_USE: u8 = 0x01;
const NUD_INCOMPLETE: u16 = 0x01;
const NUD_REACHABLE: u16 = 0x02;
const NUD_STALE: u16 = 0x04;
const NUD_DELAY: u16 = 0x08;
const NUD_PROBE: u16 = 0x10;
const NUD_PERMANENT: u16 = 0x80;

/// Size of `struct rtmsg`.
const RTMSG: usize = 12;
const RTN_UNICAST: u8 = 1;
const RTA_DST: u16 = 1;
const RTA_SRC: u16 = 2;
const RTA_OIF: u16 = 4;
const RTA_GATEWAY: u16 = 5;
const RTA_PREFSRC: u16 = 7;
const RTA_METRICS: u16 = 8;
const RTA_VIA: u16 = 18;
const RTA_NEWDST: u16 = 19;
const RTA_ENCAP_TYPE: u16 = 21;
const RTA_ENCAP: u16 = 22;
const RTA_IP_PROTO: u16 = 27;
const RTA_DPORT: u16 = 29;
const RTAX_MTU: u16 = 2;
const RTAX_HOPLIMIT: u16 = 10;

#[cfg(test)]
mod tests {
    use super::*;

    /// A message's body of a header and attributes.
    fn body(header: &[u8], attributes: &[(u16, &[u8])]) -> Vec<u8> {
        let mut body = header.to_vec();
        for (kind, value) in attributes {
            body.extend((value.len() as u16 + 4).to_ne_bytes());
            body.extend(kind.to_ne_bytes());
            body.extend(*value);
            body.resize(body.len().next_multiple_of(4), 0);
        }
        body
    }

    #[test]
    fn a_route_that_does_more_than_to_lead_is_none() {
        let header = [AF_INET, 32, 0, 0, 0, 0, 0, RTN_UNICAST, 0, 0, 0, 0];
        let device = (RTA_OIF, &5u32.to_ne_bytes()[..]);
        let route = |more: &[(u16, &[u8])]| {
            decode_route(&body(&header, &[&[device], more].concat())).unwrap().1.map(|route| route.device)
        };
        assert_eq!(route(&[]), Some(5));
        for (kind, value) in [(RTA_ENCAP_TYPE, &[1, 0][..]), (RTA_ENCAP, &[0; 8]), (RTA_NEWDST, &[0; 4])] {
            assert_eq!(route(&[(kind, value)]), None, "{kind}");
        }
    }

    #[test]
    fn a_vlan_of_a_device_elsewhere_is_no_ethernet() {
        let mut header = [0; IFINFOMSG];
        header[2..4].copy_from_slice(&ARPHRD_ETHER.to_ne_bytes());
        let data = body(&[], &[(IFLA_VLAN_ID, &10u16.to_ne_bytes())]);
        let info = body(&[], &[(IFLA_INFO_KIND, b"vlan\0"), (IFLA_INFO_DATA, &data)]);
        let attributes: [(u16, &[u8]); 4] = [
            (IFLA_ADDRESS, &[2, 0, 0, 0, 0, 1]),
            (IFLA_LINK, &5u32.to_ne_bytes()),
            (IFLA_LINKINFO, &info),
            (IFLA_LINK_NETNSID, &0u32.to_ne_bytes()),
        ];
        let device = |count: usize| match decode_link(&body(&header, &attributes[..count])) {
            Ok(Some(Event::Device(device))) => (device.mac.is_some(), device.vlan.map(|vlan| vlan.below)),
            other => panic!("{other:?}"),
        };
        assert_eq!(device(3), (true, Some(5)));
        assert_eq!(device(4), (false, None));
    }
}
