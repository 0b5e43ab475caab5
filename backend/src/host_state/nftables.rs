//! nftables chains that hook into single devices, from nfnetlink.
//!
//! Layouts: the kernel's `include/uapi/linux/netfilter/nf_tables.h`. Numbers in attributes are in network byte order.

use super::netlink::{Events, Malformed, Message, Request, Requests, attributes, text};
use netlink_sys::protocols::NETLINK_NETFILTER;
use std::io;

/// nftables of a network namespace.
pub struct Nftables {
    pub(super) requests: Requests,
    /// Tells of changes of the ruleset.
    pub events: Events,
}

/// A chain with a hook at devices.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Chain {
    /// Its family, table and name, as `nft` takes them: `netdev filter input`.
    pub name: String,
    /// Whether it sees packets that leave by the device, not those that come in.
    pub egress: bool,
    /// The devices.
    pub devices: Vec<DeviceName>,
}

/// The device or devices that a chain hooks into.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum DeviceName {
    /// The one of this name.
    Exact(String),
    /// All whose names begin like this.
    Prefix(String),
}

impl Chain {
    /// Whether packets of the device `name` go through the chain.
    pub fn hooks(&self, name: &str) -> bool {
        self.devices.iter().any(|device| match device {
            DeviceName::Exact(exact) => exact == name,
            DeviceName::Prefix(prefix) => name.starts_with(prefix),
        })
    }

    /// What keeps a device's packets from going around it, for people.
    pub fn reason(&self) -> String {
        format!("nftables {} chain '{}'", if self.egress { "egress" } else { "ingress" }, self.name)
    }
}

impl Nftables {
    /// Opens nftables of the calling thread's network namespace.
    ///
    /// # Errors
    /// The kernel has no nfnetlink, or we may not use it (`CAP_NET_ADMIN`).
    pub fn open() -> io::Result<Nftables> {
        let events = Events::open(NETLINK_NETFILTER, &[NFNLGRP_NFTABLES])?;
        Ok(Nftables { requests: Requests::open(NETLINK_NETFILTER)?, events })
    }

    /// Reads all chains that hook into devices.
    ///
    /// # Errors
    /// Those of [`Requests::ask`]; see [`is_unavailable`].
    pub fn chains(&mut self) -> io::Result<Vec<Chain>> {
        let mut chains = Vec::new();
        for family in [NFPROTO_NETDEV, NFPROTO_INET] {
            // struct nfgenmsg: the family, the version, and a resource that is not used.
            let request = Request::dump(GET_CHAIN, &[family, 0, 0, 0]);
            chains.extend(self.requests.ask(&request, decode_chain)?);
        }
        Ok(chains)
    }
}

/// Whether this error of [`Nftables`] means that the kernel has no nftables or that we may not read them, which another
/// attempt will not change.
pub fn is_unavailable(error: &io::Error) -> bool {
    use libc::{EACCES, EAFNOSUPPORT, EINVAL, EOPNOTSUPP, EPERM, EPROTONOSUPPORT};
    let unavailable = [EACCES, EAFNOSUPPORT, EINVAL, EOPNOTSUPP, EPERM, EPROTONOSUPPORT];
    error.raw_os_error().is_some_and(|errno| unavailable.contains(&errno))
}

/// Whether a notification says that a chain, or a table with all of its chains, has come or gone. Rules and sets of
/// elements, which change more often, do not matter.
pub fn concerns(message: &Message) -> bool {
    message.kind & 0xff00 == NFNL_SUBSYS_NFTABLES
        && matches!(
            message.kind & 0xff,
            NFT_MSG_NEWTABLE | NFT_MSG_DELTABLE | NFT_MSG_NEWCHAIN | NFT_MSG_DELCHAIN
        )
}

/// [`concerns`] where rules matter too.
pub fn concerns_with_rules(message: &Message) -> bool {
    let is_rule = matches!(message.kind & 0xff, NFT_MSG_NEWRULE | NFT_MSG_DELRULE);
    concerns(message) || message.kind & 0xff00 == NFNL_SUBSYS_NFTABLES && is_rule
}

/// Decodes the body of `NFT_MSG_NEWCHAIN`; nothing for a chain that hooks into no device.
pub fn decode_chain(body: &[u8]) -> Result<Option<Chain>, Malformed> {
    let family = *body.first().ok_or(Malformed)?;
    let (mut table, mut name, mut hook) = (String::new(), String::new(), None);
    for attribute in attributes(body.get(NFGENMSG..).ok_or(Malformed)?) {
        match attribute? {
            (NFTA_CHAIN_TABLE, value) => table = text(value),
            (NFTA_CHAIN_NAME, value) => name = text(value),
            (NFTA_CHAIN_HOOK, nested) => hook = Some(nested),
            _ => {}
        }
    }
    let Some(hook) = hook else { return Ok(None) };
    let (mut number, mut devices) = (None, Vec::new());
    for attribute in attributes(hook) {
        match attribute? {
            (NFTA_HOOK_HOOKNUM, value) => {
                number = value.first_chunk().map(|bytes| u32::from_be_bytes(*bytes))
            }
            (NFTA_HOOK_DEV, value) => devices.push(device_name(value)),
            (NFTA_HOOK_DEVS, nested) => {
                for attribute in attributes(nested) {
                    match attribute? {
                        (NFTA_DEVICE_NAME, value) => devices.push(device_name(value)),
                        (NFTA_DEVICE_PREFIX, value) => devices.push(DeviceName::Prefix(text(value))),
                        _ => {}
                    }
                }
            }
            _ => {}
        }
    }
    let (family, egress) = match (family, number.ok_or(Malformed)?) {
        (NFPROTO_NETDEV, NF_NETDEV_INGRESS) => ("netdev", false),
        (NFPROTO_NETDEV, NF_NETDEV_EGRESS) => ("netdev", true),
        (NFPROTO_INET, NF_INET_INGRESS) => ("inet", false),
        _ => return Ok(None),
    };
    Ok(Some(Chain { name: format!("{family} {table} {name}"), egress, devices }))
}

/// A device's name as it is given to the kernel: without its closing NUL it stands for all that begin like it.
fn device_name(value: &[u8]) -> DeviceName {
    if value.contains(&0) { DeviceName::Exact(text(value)) } else { DeviceName::Prefix(text(value)) }
}

const NFNLGRP_NFTABLES: u32 = 7;
const NFNL_SUBSYS_NFTABLES: u16 = 10 << 8;
/// The type of a request for chains.
pub(super) const GET_CHAIN: u16 = NFNL_SUBSYS_NFTABLES | NFT_MSG_GETCHAIN;
const NFT_MSG_NEWTABLE: u16 = 0;
const NFT_MSG_DELTABLE: u16 = 2;
const NFT_MSG_NEWCHAIN: u16 = 3;
const NFT_MSG_GETCHAIN: u16 = 4;
const NFT_MSG_DELCHAIN: u16 = 5;

/// Size of `struct nfgenmsg`.
const NFGENMSG: usize = 4;
pub(super) const NFPROTO_INET: u8 = 1;
const NFPROTO_NETDEV: u8 = 5;
pub(super) const NFTA_CHAIN_TABLE: u16 = 1;
pub(super) const NFTA_CHAIN_NAME: u16 = 3;
pub(super) const NFTA_CHAIN_HOOK: u16 = 4;
pub(super) const NFTA_HOOK_HOOKNUM: u16 = 1;
const NFTA_HOOK_DEV: u16 = 3;
const NFTA_HOOK_DEVS: u16 = 4;
const NFTA_DEVICE_NAME: u16 = 1;
const NFTA_DEVICE_PREFIX: u16 = 2;
const NF_NETDEV_INGRESS: u32 = 0;
const NF_NETDEV_EGRESS: u32 = 1;
const NF_INET_INGRESS: u32 = 5;
const NFT_MSG_NEWRULE: u16 = 6;
const NFT_MSG_DELRULE: u16 = 8;
