//! Devices, queueing disciplines and traffic-control filters, from rtnetlink.
//!
//! Layouts: the kernel's `include/uapi/linux/rtnetlink.h`, `if_link.h` and `pkt_cls.h`.

use super::netlink::{Malformed, Message, Request, Requests, attributes, text, u16_at, u32_at};
use std::collections::{BTreeMap, BTreeSet};
use std::io;

/// The multicast groups that tell of what this module reads: devices (`RTNLGRP_LINK`) and traffic control
/// (`RTNLGRP_TC`).
pub const GROUPS: [u32; 2] = [1, 4];

/// The name that the daemon gives to its own filter, if that is an eBPF program. Such a filter is no reason.
pub const OUR_FILTER: &str = "pointwork";

/// A network device.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Link {
    /// Its name.
    pub name: String,
    /// Its index in its network namespace.
    pub ifindex: u32,
    /// Its MTU in bytes, as `ip link` shows it.
    pub mtu: u32,
    /// Whether an XDP program is attached, in any mode.
    pub xdp: bool,
}

/// A queueing discipline.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Qdisc {
    /// The device's index.
    pub ifindex: u32,
    /// Its handle; 0 for those that the kernel makes by itself.
    pub handle: u32,
    /// Its kind: `fq_codel`, `htb`, `clsact`.
    pub kind: String,
}

/// A filter, or the head of a list of filters.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Filter {
    /// The classifier's kind: `u32`, `bpf`, `matchall`.
    pub kind: String,
    /// Whether it is the one that the daemon itself puts at the ingress of representors under a userspace datapath, and
    /// which drops all, so that the host's own stack never answers.
    pub ours: bool,
}

/// What rtnetlink has about a device that packets around it would miss.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Reasons {
    /// For packets that come in at the device.
    pub ingress: Option<String>,
    /// For packets that leave by it.
    pub egress: Option<String>,
}

/// Reads the device of this name; none if there is no such device.
///
/// # Errors
/// Those of [`Requests::ask`].
pub fn link(requests: &mut Requests, name: &str) -> io::Result<Option<Link>> {
    let request = Request::get(RTM_GETLINK, &[0; IFINFOMSG])
        .attribute(IFLA_IFNAME, &[name.as_bytes(), &[0]].concat())
        .attribute(IFLA_EXT_MASK, &RTEXT_FILTER_SKIP_STATS.to_ne_bytes());
    match requests.ask(&request, |body| decode_link(body).map(Some)) {
        // A device that has it as an alternative name is another.
        Ok(links) => Ok(links.into_iter().find(|link| link.name == name)),
        Err(error) if error.raw_os_error() == Some(libc::ENODEV) => Ok(None),
        // A name that no device can have, such as one longer than 15 bytes.
        Err(error) if matches!(error.raw_os_error(), Some(libc::EINVAL | libc::ERANGE)) => Ok(None),
        Err(error) => Err(error),
    }
}

/// Reads the queueing disciplines of all devices, by device; none if the kernel has no traffic control.
///
/// # Errors
/// Those of [`Requests::ask`].
pub fn qdiscs(requests: &mut Requests) -> io::Result<BTreeMap<u32, Vec<Qdisc>>> {
    // The kernel offers no way to ask for those of one device.
    let request = Request::dump(RTM_GETQDISC, &tcmsg(0, 0));
    let mut by_device = BTreeMap::<u32, Vec<Qdisc>>::new();
    for qdisc in none_if_unsupported(requests.ask(&request, |body| decode_qdisc(body).map(Some)))? {
        by_device.entry(qdisc.ifindex).or_default().push(qdisc);
    }
    Ok(by_device)
}

/// Reads the filters of a device at `parent`: a qdisc's handle, or one of the two hooks of `clsact`. An empty list for a
/// `parent` that cannot have any.
fn filters(requests: &mut Requests, ifindex: u32, parent: u32) -> io::Result<Vec<Filter>> {
    // A block of filters that devices share answers with an index of its own, so the answer's is not compared.
    none_if_unsupported(requests.ask(&Request::dump(RTM_GETTFILTER, &tcmsg(ifindex, parent)), decode_filter))
}

/// Says what the `qdiscs` of a device and their filters do that packets around it would miss.
///
/// # Errors
/// Those of [`Requests::ask`].
pub fn reasons(requests: &mut Requests, ifindex: u32, qdiscs: &[Qdisc]) -> io::Result<Reasons> {
    let mut reasons = Reasons::default();
    let mut ask = |parent, hook: Hook, slot: &mut Option<String>| -> io::Result<()> {
        let found = filters(requests, ifindex, parent)?;
        let found = found.iter().find(|filter| hook == Hook::Egress || !filter.ours);
        *slot =
            slot.take().or_else(|| found.map(|filter| format!("tc {} filter {}", hook.name(), filter.kind)));
        Ok(())
    };
    let mut classifying = BTreeSet::new();
    for qdisc in qdiscs {
        match qdisc.kind.as_str() {
            "ingress" => ask(qdisc.handle, Hook::Ingress, &mut reasons.ingress)?,
            "clsact" => {
                ask(TC_H_CLSACT_INGRESS, Hook::Ingress, &mut reasons.ingress)?;
                ask(TC_H_CLSACT_EGRESS, Hook::Egress, &mut reasons.egress)?;
            }
            // Those of the kernel have no handle; asked for 0 it gives the filters of the root.
            kind if DEFAULT_QDISCS.contains(&kind) => {
                classifying.insert(qdisc.handle);
            }
            kind => reasons.egress = Some(format!("tc qdisc {kind}")),
        }
    }
    for handle in classifying {
        ask(handle, Hook::Egress, &mut reasons.egress)?;
    }
    Ok(reasons)
}

/// Whether a notification is about one of these devices, by its name or index, or may be.
pub fn concerns(message: &Message, names: &BTreeSet<String>, indexes: &BTreeSet<u32>) -> bool {
    match message.kind {
        RTM_NEWLINK | RTM_DELLINK => decode_link(message.body)
            .map_or(true, |link| indexes.contains(&link.ifindex) || names.contains(&link.name)),
        // Those of a block of filters that devices share do not name the devices.
        _ => u32_at(message.body, 4)
            .map_or(true, |ifindex| indexes.contains(&ifindex) || ifindex == TCM_IFINDEX_MAGIC_BLOCK),
    }
}

/// Decodes the body of `RTM_NEWLINK` or `RTM_DELLINK`.
pub fn decode_link(body: &[u8]) -> Result<Link, Malformed> {
    let mut link = Link { name: String::new(), ifindex: u32_at(body, 4)?, mtu: 0, xdp: false };
    for attribute in attributes(body.get(IFINFOMSG..).ok_or(Malformed)?) {
        match attribute? {
            (IFLA_IFNAME, value) => link.name = text(value),
            (IFLA_MTU, value) => link.mtu = u32_at(value, 0)?,
            (IFLA_XDP, nested) => {
                for attribute in attributes(nested) {
                    if let (IFLA_XDP_ATTACHED, value) = attribute? {
                        link.xdp = *value.first().ok_or(Malformed)? != XDP_ATTACHED_NONE;
                    }
                }
            }
            _ => {}
        }
    }
    Ok(link)
}

/// Decodes the body of `RTM_NEWQDISC`.
pub fn decode_qdisc(body: &[u8]) -> Result<Qdisc, Malformed> {
    let mut kind = None;
    for attribute in attributes(body.get(TCMSG..).ok_or(Malformed)?) {
        if let (TCA_KIND, value) = attribute? {
            kind = Some(text(value));
        }
    }
    Ok(Qdisc { ifindex: u32_at(body, 4)?, handle: u32_at(body, 8)?, kind: kind.ok_or(Malformed)? })
}

/// Decodes the body of `RTM_NEWTFILTER`; nothing for what cannot do anything to a packet.
pub fn decode_filter(body: &[u8]) -> Result<Option<Filter>, Malformed> {
    let (handle, info) = (u32_at(body, 8)?, u32_at(body, 16)?);
    let (mut kind, mut options, mut chain) = (None, None, 0);
    for attribute in attributes(body.get(TCMSG..).ok_or(Malformed)?) {
        match attribute? {
            (TCA_KIND, value) => kind = Some(text(value)),
            (TCA_OPTIONS, value) => options = Some(value),
            (TCA_CHAIN, value) => chain = u32_at(value, 0)?,
            _ => {}
        }
    }
    let kind = kind.ok_or(Malformed)?;
    // In front of its filters comes the head of their list. Without filters of its own, bpf does nothing; others may
    // (fw goes by the packet's mark).
    if kind == "bpf" && handle == 0 {
        return Ok(None);
    }
    let ours = match options {
        // The lower half is the protocol, in network byte order.
        Some(options) if kind == "bpf" && chain == 0 && (info as u16).to_be() == ETH_P_ALL => ours(options)?,
        _ => false,
    };
    Ok(Some(Filter { kind, ours }))
}

/// Whether these options of a bpf filter are those of the daemon's own: an eBPF program of our name, or the classic
/// program of one instruction, whose result is the verdict, and that is to drop: `bpf da bytecode '1,6 0 0 2'`.
fn ours(options: &[u8]) -> Result<bool, Malformed> {
    let (mut program, mut name, mut flags, mut actions) = (None, None, 0, false);
    for attribute in attributes(options) {
        match attribute? {
            (TCA_BPF_ACT | TCA_BPF_POLICE, _) => actions = true,
            (TCA_BPF_OPS, value) => program = Some(value),
            (TCA_BPF_NAME, value) => name = Some(text(value)),
            (TCA_BPF_FLAGS, value) => flags = u32_at(value, 0)?,
            _ => {}
        }
    }
    let ours = match (program, name) {
        (Some(program), None) => {
            // struct sock_filter: the code, two jump offsets, and the constant.
            program.len() == 8
                && u16_at(program, 0)? == BPF_RET_CONSTANT
                && program.get(2..4) == Some(&[0, 0])
                && u32_at(program, 4)? == TC_ACT_SHOT
        }
        (None, Some(name)) => name == OUR_FILTER,
        _ => false,
    };
    Ok(ours && !actions && flags & TCA_BPF_FLAG_ACT_DIRECT != 0)
}

/// A kernel without traffic control, or without filters, has none.
fn none_if_unsupported<T>(answers: io::Result<Vec<T>>) -> io::Result<Vec<T>> {
    match answers {
        Err(error) if error.raw_os_error() == Some(libc::EOPNOTSUPP) => Ok(Vec::new()),
        answers => answers,
    }
}

/// `struct tcmsg`.
fn tcmsg(ifindex: u32, parent: u32) -> [u8; TCMSG] {
    let mut bytes = [0; TCMSG];
    bytes[4..8].copy_from_slice(&ifindex.to_ne_bytes());
    bytes[12..16].copy_from_slice(&parent.to_ne_bytes());
    bytes
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Hook {
    Ingress,
    Egress,
}

impl Hook {
    fn name(self) -> &'static str {
        match self {
            Hook::Ingress => "ingress",
            Hook::Egress => "egress",
        }
    }
}

/// The qdiscs that a device may have without anybody having asked for more than a queue.
const DEFAULT_QDISCS: [&str; 6] = ["noqueue", "pfifo_fast", "pfifo", "fq_codel", "fq", "mq"];

const RTM_NEWLINK: u16 = 16;
const RTM_DELLINK: u16 = 17;
const RTM_GETLINK: u16 = 18;
const RTM_GETQDISC: u16 = 38;
const RTM_GETTFILTER: u16 = 46;

/// Size of `struct ifinfomsg`.
const IFINFOMSG: usize = 16;
const IFLA_IFNAME: u16 = 3;
const IFLA_MTU: u16 = 4;
const IFLA_EXT_MASK: u16 = 29;
const IFLA_XDP: u16 = 43;
const IFLA_XDP_ATTACHED: u16 = 2;
const XDP_ATTACHED_NONE: u8 = 0;
const RTEXT_FILTER_SKIP_STATS: u32 = 8;

/// Size of `struct tcmsg`.
const TCMSG: usize = 20;
const TCA_KIND: u16 = 1;
const TCA_OPTIONS: u16 = 2;
const TCA_CHAIN: u16 = 11;
const TCM_IFINDEX_MAGIC_BLOCK: u32 = 0xffff_ffff;
const TC_H_CLSACT_INGRESS: u32 = 0xffff_fff2;
const TC_H_CLSACT_EGRESS: u32 = 0xffff_fff3;
const TC_ACT_SHOT: u32 = 2;

const TCA_BPF_ACT: u16 = 1;
const TCA_BPF_POLICE: u16 = 2;
const TCA_BPF_OPS: u16 = 5;
const TCA_BPF_NAME: u16 = 7;
const TCA_BPF_FLAGS: u16 = 8;
const TCA_BPF_FLAG_ACT_DIRECT: u32 = 1;
/// `BPF_RET | BPF_K`: return the constant.
const BPF_RET_CONSTANT: u16 = 0x06;
const ETH_P_ALL: u16 = 3;
