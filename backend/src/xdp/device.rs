//! What the kernel says of a network device, as far as AF_XDP cares.

use super::XdpError;
use super::netlink::{self, Netlink, find, put, text, word};
use std::io;

const RTM_GETLINK: u16 = 18;
/// Bytes of `struct ifinfomsg`.
const IFINFO: usize = 16;
const ARPHRD_ETHER: u16 = 1;
const IFF_UP: u32 = 1;
const IFF_LOWER_UP: u32 = 1 << 16;
const IFLA_ADDRESS: u16 = 1;
const IFLA_IFNAME: u16 = 3;
const IFLA_MTU: u16 = 4;
const IFLA_LINK: u16 = 5;
const IFLA_MASTER: u16 = 10;
const IFLA_LINKINFO: u16 = 18;
const IFLA_INFO_KIND: u16 = 1;
const IFLA_INFO_SLAVE_KIND: u16 = 4;
const IFLA_LINK_NETNSID: u16 = 37;
const IFLA_XDP: u16 = 43;
const IFLA_XDP_ATTACHED: u16 = 2;
const IFLA_XDP_PROG_ID: u16 = 4;

/// linux/ethtool_netlink.h
const ETHTOOL_MSG_FEATURES_GET: u8 = 11;
const ETHTOOL_MSG_CHANNELS_GET: u8 = 17;
const ETHTOOL_A_HEADER: u16 = 1;
const ETHTOOL_A_HEADER_DEV_INDEX: u16 = 1;
const ETHTOOL_A_CHANNELS_RX_COUNT: u16 = 6;
const ETHTOOL_A_CHANNELS_COMBINED_COUNT: u16 = 9;
const ETHTOOL_A_FEATURES_ACTIVE: u16 = 4;
const ETHTOOL_A_BITSET_BITS: u16 = 3;
const ETHTOOL_A_BITSET_BIT_NAME: u16 = 2;

/// linux/netdev.h
const NETDEV_CMD_DEV_GET: u8 = 1;
const NETDEV_A_DEV_IFINDEX: u16 = 1;
const NETDEV_A_DEV_XDP_ZC_MAX_SEGS: u16 = 4;

/// A device at the time of asking.
#[derive(Debug, Clone, Default)]
pub(super) struct Device {
    pub index: u32,
    pub name: String,
    /// Hardware address.
    pub mac: [u8; 6],
    /// Bytes, without the link header.
    pub mtu: u32,
    pub up: bool,
    /// Whether there is somebody at the other end.
    pub carrier: bool,
    /// Kind of a virtual device ("veth", "bridge"); of others empty.
    pub kind: String,
    /// Kind of the device that this one is part of ("bridge", "bond"); empty if of none.
    pub master_kind: String,
    pub is_ethernet: bool,
    /// Id of the XDP program on it; 0 if it has one without an id to tell.
    pub program: Option<u32>,
    /// Receive queues in use.
    pub queues: u32,
    /// Active features by their ethtool names, if they are known.
    pub features: Option<Vec<String>>,
    /// Index of the device that this one is tied to (the other end of a veth), if it is in the same network namespace.
    pub link: Option<u32>,
    /// Active features of that one.
    pub link_features: Option<Vec<String>>,
    /// Pieces that a packet may have in zero copy; 1: no more than one.
    pub zero_copy_pieces: u32,
}

impl Device {
    /// Asks about the device called `name`, in the thread's network namespace.
    ///
    /// # Errors
    /// [`XdpError::NoDevice`], [`XdpError::Ask`].
    pub(super) fn ask(name: &str) -> Result<Device, XdpError> {
        let failed = |error| XdpError::Ask { device: name.to_owned(), error };
        let mut device = Device::look(name)?;
        let mut generic = Netlink::generic().map_err(failed)?;
        // Drivers need not tell any of this.
        device.queues = channels(&mut generic, device.index).unwrap_or(1).max(1);
        device.features = features(&mut generic, device.index).ok();
        device.link_features = device.link.and_then(|link| features(&mut generic, link).ok());
        device.zero_copy_pieces = zero_copy_pieces(&mut generic, device.index).unwrap_or(1).max(1);
        Ok(device)
    }

    /// As [`ask`](Self::ask), but without what ethtool knows.
    ///
    /// # Errors
    /// [`XdpError::NoDevice`], [`XdpError::Ask`].
    pub(super) fn look(name: &str) -> Result<Device, XdpError> {
        link(name).map_err(|error| match error.raw_os_error() {
            Some(libc::ENODEV | libc::EINVAL | libc::ERANGE) => XdpError::NoDevice(name.to_owned()),
            _ => XdpError::Ask { device: name.to_owned(), error },
        })
    }

    /// Why AF_XDP cannot serve the device, if it cannot.
    pub(super) fn unfit(&self) -> Option<String> {
        match (&*self.kind, &*self.master_kind) {
            _ if !self.is_ethernet => Some("it is not an Ethernet device".into()),
            (kind @ ("bridge" | "bond" | "team" | "openvswitch"), _) => {
                Some(format!("it is a {kind} and has no receive queues of its own: give the device below it"))
            }
            (_, kind @ ("bridge" | "bond" | "team")) => {
                Some(format!("it is part of a {kind}, which would miss the packets: take it out first"))
            }
            _ => None,
        }
    }

    /// Whether feature `name` is active.
    pub(super) fn has(&self, name: &str) -> bool {
        self.features.iter().flatten().any(|f| f == name)
    }

    /// Why packets may have VLAN tags that are not among their bytes, if they may, and what ends it. The kernel keeps such a
    /// tag beside the packet, where no XDP program sees it, be it run by the driver or by the kernel.
    pub(super) fn hides_tags(&self) -> Option<String> {
        const PARSE: [(&str, &str); 2] =
            [("rx-vlan-hw-parse", "rxvlan"), ("rx-vlan-stag-hw-parse", "rx-vlan-stag-hw-parse")];
        const INSERT: [(&str, &str); 2] =
            [("tx-vlan-hw-insert", "txvlan"), ("tx-vlan-stag-hw-insert", "tx-vlan-stag-hw-insert")];
        let Device { name, kind, features, link_features, .. } = self;
        let active = |features: &[String], [ctag, stag]: [(&str, &str); 2]| {
            let options = [ctag, stag].into_iter().filter(|(name, _)| features.iter().any(|f| f == name));
            options.map(|(_, option)| format!(" {option} off")).collect::<String>()
        };
        let parsed = features.as_ref().map(|features| active(features, PARSE));
        let why = match (&**kind, link_features) {
            // Its own features do nothing: a packet comes as the other end has left it.
            ("veth", Some(features)) => match active(features, INSERT) {
                on if on.is_empty() => return None,
                on => {
                    format!("the other end of the veth does not insert tags: 'ethtool -K DEVICE{on}' there")
                }
            },
            // Of a virtual device that is not known not to, it is supposed that it passes on what others have kept aside.
            (kind, _) if !matches!(kind, "" | "veth" | "tun" | "dummy") => {
                format!("a {kind} may get packets whose tags are taken off: give the device below it")
            }
            _ if parsed.as_ref().is_some_and(String::is_empty) => return None,
            (_, None) if parsed.is_none() => {
                "the kernel does not tell whether the device takes tags off (ethtool's netlink family)".into()
            }
            ("veth", None) => format!(
                "the other end of the veth may not insert tags, which cannot be seen from here: 'ethtool -K DEVICE txvlan off tx-vlan-stag-hw-insert off' there, and to say so 'ethtool -K {name}{}'",
                parsed.unwrap_or_default()
            ),
            _ => {
                format!("the device takes tags off: 'ethtool -K {name}{}'", parsed.unwrap_or_default())
            }
        };
        Some(why)
    }
}

/// What rtnetlink says of the device called `name`.
fn link(name: &str) -> io::Result<Device> {
    let mut request = vec![0; IFINFO];
    let mut terminated = name.as_bytes().to_vec();
    terminated.push(0);
    put(&mut request, IFLA_IFNAME, &terminated);
    let answers = Netlink::route()?.ask(RTM_GETLINK, &request)?;
    answers.first().and_then(|a| parse_link(a)).ok_or_else(|| io::ErrorKind::InvalidData.into())
}

fn parse_link(answer: &[u8]) -> Option<Device> {
    let (info, attributes) = answer.split_at_checked(IFINFO)?;
    let info_attributes = find(attributes, IFLA_LINKINFO).unwrap_or_default();
    let kind = |of| find(info_attributes, of).map(text).unwrap_or_default();
    let xdp = find(attributes, IFLA_XDP).unwrap_or_default();
    let attached = find(xdp, IFLA_XDP_ATTACHED).and_then(|a| a.first()).is_some_and(|&a| a != 0);
    let master_kind = match find(attributes, IFLA_MASTER) {
        Some(_) => kind(IFLA_INFO_SLAVE_KIND),
        None => String::new(),
    };
    Some(Device {
        index: word(info.get(4..)?)?,
        name: find(attributes, IFLA_IFNAME).map(text)?,
        mac: find(attributes, IFLA_ADDRESS).and_then(|a| a.first_chunk().copied()).unwrap_or_default(),
        mtu: find(attributes, IFLA_MTU).and_then(word)?,
        up: word(info.get(8..)?)? & IFF_UP != 0,
        carrier: word(info.get(8..)?)? & IFF_LOWER_UP != 0,
        kind: kind(IFLA_INFO_KIND),
        master_kind,
        is_ethernet: u16::from_ne_bytes(*info.get(2..)?.first_chunk()?) == ARPHRD_ETHER,
        link: find(attributes, IFLA_LINK)
            .and_then(word)
            .filter(|&link| link != 0 && find(attributes, IFLA_LINK_NETNSID).is_none()),
        program: attached.then(|| find(xdp, IFLA_XDP_PROG_ID).and_then(word).unwrap_or_default()),
        ..Device::default()
    })
}

/// A request's attribute that names the device, for ethtool.
fn ethtool_header(index: u32) -> Vec<u8> {
    let (mut header, mut request) = (vec![], vec![]);
    put(&mut header, ETHTOOL_A_HEADER_DEV_INDEX, &index.to_ne_bytes());
    put(&mut request, ETHTOOL_A_HEADER | 0x8000, &header);
    request
}

/// Receive queues in use.
fn channels(generic: &mut Netlink, index: u32) -> io::Result<u32> {
    let answer = generic.ask_family("ethtool", ETHTOOL_MSG_CHANNELS_GET, &ethtool_header(index))?;
    let count = |kind| find(&answer, kind).and_then(word).unwrap_or_default();
    Ok(count(ETHTOOL_A_CHANNELS_RX_COUNT).saturating_add(count(ETHTOOL_A_CHANNELS_COMBINED_COUNT)))
}

/// Names of the active features.
fn features(generic: &mut Netlink, index: u32) -> io::Result<Vec<String>> {
    let answer = generic.ask_family("ethtool", ETHTOOL_MSG_FEATURES_GET, &ethtool_header(index))?;
    let active = find(&answer, ETHTOOL_A_FEATURES_ACTIVE).unwrap_or_default();
    let bits = find(active, ETHTOOL_A_BITSET_BITS).unwrap_or_default();
    // A bitset without a mask lists just the bits that are set.
    Ok(netlink::attributes(bits)
        .filter_map(|(_, bit)| find(bit, ETHTOOL_A_BITSET_BIT_NAME).map(text))
        .collect())
}

/// Pieces that a packet may have in zero copy.
fn zero_copy_pieces(generic: &mut Netlink, index: u32) -> io::Result<u32> {
    let mut request = vec![];
    put(&mut request, NETDEV_A_DEV_IFINDEX, &index.to_ne_bytes());
    let answer = generic.ask_family("netdev", NETDEV_CMD_DEV_GET, &request)?;
    find(&answer, NETDEV_A_DEV_XDP_ZC_MAX_SEGS).and_then(word).ok_or_else(|| io::ErrorKind::NotFound.into())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_answer_is_parsed_and_a_short_one_is_none() {
        let mut answer = vec![0, 0, 1, 0, 7, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0];
        let (mut info, mut xdp) = (vec![], vec![]);
        put(&mut info, IFLA_INFO_KIND, b"veth\0");
        put(&mut info, IFLA_INFO_SLAVE_KIND, b"bond\0");
        put(&mut xdp, IFLA_XDP_ATTACHED, &[1]);
        put(&mut xdp, IFLA_XDP_PROG_ID, &42u32.to_ne_bytes());
        put(&mut answer, IFLA_IFNAME, b"eth0\0");
        put(&mut answer, IFLA_MTU, &1500u32.to_ne_bytes());
        put(&mut answer, IFLA_MASTER, &9u32.to_ne_bytes());
        put(&mut answer, IFLA_LINKINFO, &info);
        put(&mut answer, IFLA_XDP, &xdp);
        let device = parse_link(&answer).unwrap();
        assert_eq!((device.index, &*device.name, device.mtu, device.up), (7, "eth0", 1500, true));
        assert_eq!((&*device.kind, &*device.master_kind, device.program), ("veth", "bond", Some(42)));
        assert!(device.unfit().unwrap().contains("part of a bond"));
        put(&mut answer, IFLA_LINK, &8u32.to_ne_bytes());
        assert_eq!(parse_link(&answer).unwrap().link, Some(8));
        put(&mut answer, IFLA_LINK_NETNSID, &0u32.to_ne_bytes());
        assert_eq!(parse_link(&answer).unwrap().link, None);
        for cut in 0..IFINFO {
            assert!(parse_link(&answer[..cut]).is_none());
        }
    }

    #[test]
    fn tags_are_hidden_where_somebody_keeps_them_aside() {
        let features = |names: &[&str]| names.iter().map(|name| name.to_string()).collect::<Vec<_>>();
        let hidden = |kind: &str, own: &[&str], other: Option<&[&str]>| {
            let device = Device {
                name: "eth1".into(),
                kind: kind.into(),
                features: Some(features(own)),
                link_features: other.map(features),
                ..Device::default()
            };
            device.hides_tags()
        };
        let on = ["rx-vlan-hw-parse"];
        assert_eq!(hidden("", &["rx-gro", "tx-vlan-hw-insert"], None), None);
        let said = hidden("", &["rx-vlan-stag-hw-parse"], None).unwrap();
        assert!(said.ends_with("'ethtool -K eth1 rx-vlan-stag-hw-parse off'"), "{said}");
        assert!(hidden("", &on, None).is_some() && hidden("macvlan", &[], None).is_some());
        let silent = Device { name: "eth1".into(), ..Device::default() };
        assert!(silent.hides_tags().is_some_and(|said| said.contains("does not tell")));
        // Of a veth the other end counts, or, where that cannot be seen, what somebody says of it.
        assert_eq!(hidden("veth", &on, Some(&["rx-vlan-hw-parse"])), None);
        let said = hidden("veth", &[], Some(&["tx-vlan-hw-insert"])).unwrap();
        assert!(said.ends_with("'ethtool -K DEVICE txvlan off' there"), "{said}");
        let said = hidden("veth", &on, None).unwrap();
        assert!(said.ends_with("and to say so 'ethtool -K eth1 rxvlan off'"), "{said}");
        assert_eq!(hidden("veth", &[], None), None);
    }
}
