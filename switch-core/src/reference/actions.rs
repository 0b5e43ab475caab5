//! Actions executed in the plainest way.
//!
//! A frame is a vector of bytes and is copied wherever an action might need it again. Every rewrite finds its header
//! anew and then brings all checksums up to date: one that was right before is computed in full, one that was wrong
//! keeps its error.

use crate::action::{Action, FieldSet, PortRef, SetGroup};
use crate::checksum::{add, fold, pseudo_v4, pseudo_v6};
use crate::crc32c::crc32c;
use crate::drop::DropReason;
use crate::exec::Metadata;
use crate::key::{self, Field, ipproto};
use crate::packet::{Gso, Offload, PortId};

/// A frame on its way.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Frame {
    /// All of its bytes.
    pub bytes: Vec<u8>,
    /// Checksum and segmentation state; a checksum to be completed is that of the transport header.
    pub offload: Offload,
    /// What it carries beside its bytes.
    pub metadata: Metadata,
    /// What the next output is cut to, the outer VLAN tag not counted.
    pub max_len: Option<u32>,
}

impl Frame {
    /// A frame that has just come in.
    pub fn new(bytes: Vec<u8>, offload: Offload) -> Frame {
        Frame { bytes, offload, metadata: Metadata::default(), max_len: None }
    }
}

/// What left.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Sent {
    /// By which port.
    pub port: PortId,
    /// The bytes, cut as asked.
    pub bytes: Vec<u8>,
    /// Checksum and segmentation state.
    pub offload: Offload,
}

/// What became of a frame.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Outcome {
    /// At least one output, in order.
    Sent(Vec<Sent>),
    /// No output, and why.
    Dropped(DropReason),
    /// A stage or an action is unknown: the frame as it came in is to be punted.
    Unresolved,
}

/// What the actions ask of the world.
pub struct World<'w> {
    /// The actions of the stage that [`Metadata::recirc_id`] names, if there is a flow for the frame.
    pub recirculate: &'w mut dyn FnMut(&Frame) -> Option<Vec<Action>>,
    /// Random bits for `sample`.
    pub random: &'w mut dyn FnMut() -> u32,
}

/// Executes a list of actions on a frame.
pub fn execute(actions: &[Action], frame: Frame, world: &mut World<'_>) -> Outcome {
    let mut run = Run { world, sent: Vec::new(), reason: DropReason::FlowDrop };
    match run.list(actions, frame) {
        Err(Stop::Unresolved) => Outcome::Unresolved,
        _ if run.sent.is_empty() => Outcome::Dropped(run.reason),
        _ => Outcome::Sent(run.sent),
    }
}

enum Stop {
    Failed,
    Unresolved,
}

struct Run<'a, 'w> {
    world: &'a mut World<'w>,
    sent: Vec<Sent>,
    /// The first reason other than the flow's will.
    reason: DropReason,
}

impl Run<'_, '_> {
    fn list(&mut self, actions: &[Action], mut frame: Frame) -> Result<(), Stop> {
        for action in actions {
            match action {
                Action::Output(PortRef::Ours(port)) => {
                    let tag = Headers::find(&frame.bytes).outer_tag as u32;
                    let mut bytes = frame.bytes.clone();
                    if let Some(len) = frame.max_len.take() {
                        bytes.truncate((len.max(14) + tag) as usize);
                    }
                    let mut offload = frame.offload;
                    if let (true, Some(l4)) = (offload.needs_csum, Headers::find(&frame.bytes).l4) {
                        offload.csum_start = l4 as u16;
                    }
                    self.sent.push(Sent { port: *port, bytes, offload });
                }
                Action::Drop(_) => return Ok(()),
                Action::Set(SetGroup::SkbMark, sets) => {
                    frame.metadata.skb_mark = set_u32(frame.metadata.skb_mark, sets);
                }
                Action::Set(SetGroup::SkbPriority, sets) => {
                    frame.metadata.skb_priority = set_u32(frame.metadata.skb_priority, sets);
                }
                Action::Set(group, sets) => set(&mut frame, *group, sets).map_err(|r| self.fail(r))?,
                Action::PushVlan { tpid, tci } => {
                    let tag = [tpid.to_be_bytes(), (tci & !key::VLAN_PRESENT).to_be_bytes()].concat();
                    frame.bytes.splice(12..12, tag);
                }
                Action::PopVlan => match Headers::find(&frame.bytes) {
                    Headers { outer_tag: 4, .. } => drop(frame.bytes.drain(12..16)),
                    Headers { eth_type: key::ETH_P_8021Q | key::ETH_P_8021AD, .. } => {
                        return Err(self.fail(DropReason::TruncatedHeader));
                    }
                    _ => {}
                },
                Action::DecTtl(exception) => match dec_ttl(&mut frame) {
                    Err(DropReason::TtlExpired) => {
                        self.fail(DropReason::TtlExpired);
                        return self.list(exception, frame);
                    }
                    result => result.map_err(|r| self.fail(r))?,
                },
                Action::Trunc(len) => frame.max_len = Some(*len),
                Action::Clone(actions) => self.list(actions, frame.clone())?,
                Action::Sample { probability, actions } => {
                    if *probability == u32::MAX || *probability != 0 && (self.world.random)() <= *probability
                    {
                        self.list(actions, frame.clone())?;
                    }
                }
                Action::CheckPktLen { size, greater, less_equal } => {
                    let actions = if longest(&frame) > *size as usize { greater } else { less_equal };
                    self.list(actions, frame.clone())?;
                }
                Action::Recirc(id) => {
                    let mut frame = frame.clone();
                    frame.metadata.recirc_id = *id;
                    let actions = (self.world.recirculate)(&frame).ok_or(Stop::Unresolved)?;
                    match self.list(&actions, frame) {
                        Err(Stop::Failed) => {}
                        result => result?,
                    }
                }
                Action::CtClear => {}
                _ => return Err(Stop::Unresolved),
            }
        }
        Ok(())
    }

    fn fail(&mut self, reason: DropReason) -> Stop {
        if self.reason == DropReason::FlowDrop {
            self.reason = reason;
        }
        Stop::Failed
    }
}

fn set_u32(old: u32, sets: &[FieldSet]) -> u32 {
    sets.iter().fold(old, |v, set| v & !(set.mask as u32) | (set.value & set.mask) as u32)
}

/// Length of the frame, or of a segment if it is to be segmented, without the outer VLAN tag.
fn longest(frame: &Frame) -> usize {
    let headers = Headers::find(&frame.bytes);
    let len = frame.bytes.len() - headers.outer_tag;
    let Some(l4) = headers.l4 else { return len };
    let transport = match frame.offload.gso {
        Gso::None => return len,
        Gso::UdpL4 => 8,
        Gso::Tcp4 | Gso::Tcp6 => (frame.bytes[l4 + 12] >> 4) as usize * 4,
    };
    len.min(l4 - headers.outer_tag + transport + frame.offload.gso_size as usize)
}

fn dec_ttl(frame: &mut Frame) -> Result<(), DropReason> {
    let headers = Headers::find(&frame.bytes);
    if headers.l3 > 14 + headers.outer_tag {
        return Ok(()); // a second tag hides the network header
    }
    let (at, group, len) = match headers.eth_type {
        key::ETH_P_IP => (headers.l3 + 8, SetGroup::Ipv4, ipv4_len(&frame.bytes, headers.l3)),
        key::ETH_P_IPV6 => (headers.l3 + 7, SetGroup::Ipv6, 40),
        _ => return Ok(()),
    };
    if frame.bytes.len() < headers.l3 + len {
        return Err(DropReason::TruncatedHeader);
    }
    match frame.bytes[at] {
        0 | 1 => Err(DropReason::TtlExpired),
        ttl => set(frame, group, &[FieldSet { field: Field::IpTtl, value: ttl as u128 - 1, mask: 0xff }]),
    }
}

/// Length of the IPv4 header at `l3`, options included.
fn ipv4_len(bytes: &[u8], l3: usize) -> usize {
    bytes.get(l3).map_or(20, |first| (first & 15).max(5) as usize * 4)
}

/// Rewrites fields of one header and brings the checksums up to date.
fn set(frame: &mut Frame, group: SetGroup, sets: &[FieldSet]) -> Result<(), DropReason> {
    let headers = Headers::find(&frame.bytes);
    let l3 = headers.l3;
    let (base, needed) = match group {
        SetGroup::Eth => (0, 12),
        SetGroup::Ipv4 => (l3, ipv4_len(&frame.bytes, l3)),
        SetGroup::Ipv6 => (l3, 40),
        SetGroup::Arp => (l3, 28),
        _ if headers.later_fragment => return Ok(()),
        _ => (headers.l4.ok_or(DropReason::TruncatedHeader)?, 4),
    };
    if frame.bytes.len() < base + needed {
        return Err(DropReason::TruncatedHeader);
    }
    let before = checksums(frame);
    for set in sets {
        // Where the field lies, in bits from the header's start, and how wide it is.
        let (at, width) = match (group, set.field) {
            (SetGroup::Eth, Field::EthDst) => (0, 48),
            (SetGroup::Eth, Field::EthSrc) => (48, 48),
            (SetGroup::Ipv4, Field::IpTos) => (8, 8),
            (SetGroup::Ipv4, Field::IpTtl) => (64, 8),
            (SetGroup::Ipv4, Field::Ipv4Src) => (96, 32),
            (SetGroup::Ipv4, Field::Ipv4Dst) => (128, 32),
            (SetGroup::Ipv6, Field::IpTos) => (4, 8),
            (SetGroup::Ipv6, Field::Ipv6Label) => (12, 20),
            (SetGroup::Ipv6, Field::IpTtl) => (56, 8),
            (SetGroup::Ipv6, Field::Ipv6Src) => (64, 128),
            (SetGroup::Ipv6, Field::Ipv6Dst) => (192, 128),
            (SetGroup::Tcp | SetGroup::Udp | SetGroup::Sctp, Field::TpSrc) => (0, 16),
            (SetGroup::Tcp | SetGroup::Udp | SetGroup::Sctp, Field::TpDst) => (16, 16),
            (SetGroup::Icmp | SetGroup::Icmpv6, Field::TpSrc) => (0, 8),
            (SetGroup::Icmp | SetGroup::Icmpv6, Field::TpDst) => (8, 8),
            (SetGroup::Arp, Field::IpProto) => {
                if set.mask == 0xff {
                    frame.bytes[base + 6] = 0;
                }
                (56, 8)
            }
            (SetGroup::Arp, Field::ArpSha) => (64, 48),
            (SetGroup::Arp, Field::Ipv4Src) => (112, 32),
            (SetGroup::Arp, Field::ArpTha) => (144, 48),
            (SetGroup::Arp, Field::Ipv4Dst) => (192, 32),
            (SetGroup::Nd, _) => match nd_field(&frame.bytes[base..], set.field) {
                Some(place) => place,
                None => continue,
            },
            // A protocol or fragment type that a plain `set` names is the one that the packet has.
            _ => continue,
        };
        for bit in 0..width {
            let place = at + bit;
            let (byte, shift) = (base + place / 8, 7 - place % 8);
            let from = width - 1 - bit;
            if set.mask >> from & 1 != 0 {
                frame.bytes[byte] &= !(1 << shift);
                frame.bytes[byte] |= ((set.value >> from & 1) as u8) << shift;
            }
        }
    }
    for (before, after) in before.iter().zip(checksums(frame)) {
        after.renew(before, &mut frame.bytes);
    }
    Ok(())
}

/// Place of a field in a neighbour discovery message. The link-layer address is in the first such option of either kind.
fn nd_field(message: &[u8], field: Field) -> Option<(usize, usize)> {
    if field == Field::NdTarget {
        return (message.len() >= 24).then_some((64, 128));
    }
    let mut at = 24;
    while at + 8 <= message.len() && message[at + 1] != 0 {
        match (message[at], message[at + 1], field) {
            (1, 1, Field::ArpSha) | (2, 1, Field::ArpTha) => return Some(((at + 2) * 8, 48)),
            (1 | 2, 1, _) => return None,
            (_, len, _) => at += len as usize * 8,
        }
    }
    None
}

/// Where things are in a frame.
struct Headers {
    /// Bytes of the outer VLAN tag: 4 or 0.
    outer_tag: usize,
    /// Ethertype behind all tags.
    eth_type: u16,
    /// Network header, wherever the frame ends.
    l3: usize,
    /// Transport protocol and header, if that is complete.
    proto: u8,
    l4: Option<usize>,
    /// An IP fragment other than the first.
    later_fragment: bool,
    /// A routing header has segments left.
    routed: bool,
}

impl Headers {
    fn find(bytes: &[u8]) -> Headers {
        let be16 = |at: usize| match bytes.get(at..at + 2) {
            Some(&[a, b]) => u16::from_be_bytes([a, b]),
            _ => 0,
        };
        let mut h = Headers {
            outer_tag: 0,
            eth_type: be16(12),
            l3: 14,
            proto: 0,
            l4: None,
            later_fragment: false,
            routed: false,
        };
        while matches!(h.eth_type, key::ETH_P_8021Q | key::ETH_P_8021AD) && bytes.len() >= h.l3 + 4 {
            h.outer_tag = 4;
            h.eth_type = be16(h.l3 + 2);
            h.l3 += 4;
        }
        let l4 = match h.eth_type {
            key::ETH_P_IP if bytes.len() >= h.l3 + ipv4_len(bytes, h.l3) => {
                h.proto = bytes[h.l3 + 9];
                h.later_fragment = be16(h.l3 + 6) & 0x1fff != 0;
                h.l3 + (bytes[h.l3] & 15) as usize * 4
            }
            key::ETH_P_IPV6 if bytes.len() >= h.l3 + 40 => {
                h.proto = bytes[h.l3 + 6];
                let mut at = h.l3 + 40;
                while let Some(&[next, len, a, b]) = bytes.get(at..at + 4) {
                    at += match h.proto {
                        0 | 60 => (len as usize + 1) * 8,
                        43 => {
                            h.routed |= b != 0;
                            (len as usize + 1) * 8
                        }
                        44 => {
                            h.later_fragment |= u16::from_be_bytes([a, b]) & 0xfff8 != 0;
                            8
                        }
                        51 => (len as usize + 2) * 4,
                        _ => break,
                    };
                    h.proto = next;
                }
                at
            }
            _ => return h,
        };
        let complete = match h.proto {
            ipproto::TCP => match bytes.get(l4 + 12) {
                Some(offset) => (offset >> 4).max(5) as usize * 4,
                None => usize::MAX,
            },
            ipproto::UDP | ipproto::ICMP | ipproto::ICMPV6 => 8,
            ipproto::SCTP => 12,
            _ => usize::MAX,
        };
        if !h.later_fragment && bytes.len().checked_sub(l4).is_some_and(|rest| rest >= complete) {
            h.l4 = Some(l4);
        }
        h
    }
}

/// A checksum in a frame, and what it should be.
struct Checksum {
    at: usize,
    kind: Kind,
    right: u32,
}

#[derive(PartialEq)]
enum Kind {
    Internet,
    /// Zero stands for "none", so a sum of zero is sent as all ones.
    Udp,
    Crc32c,
}

impl Checksum {
    /// Writes the checksum that was right `before`, or the same error on top of what is right now.
    fn renew(&self, before: &Checksum, bytes: &mut [u8]) {
        let at = self.at;
        if self.kind == Kind::Crc32c {
            for (byte, change) in bytes[at..at + 4].iter_mut().zip((before.right ^ self.right).to_le_bytes())
            {
                *byte ^= change;
            }
            return;
        }
        let stored = u16::from_be_bytes([bytes[at], bytes[at + 1]]);
        let mut renewed = match stored {
            0 if self.kind == Kind::Udp => return,
            _ if stored as u32 == before.right => self.right as u16,
            _ => fold(stored as u64 + !(before.right as u16) as u64 + self.right as u64),
        };
        if renewed == 0 && self.kind == Kind::Udp {
            renewed = 0xffff;
        }
        bytes[at..at + 2].copy_from_slice(&renewed.to_be_bytes());
    }
}

/// All checksums of a frame.
fn checksums(frame: &Frame) -> Vec<Checksum> {
    let bytes = &frame.bytes;
    let headers = Headers::find(bytes);
    let mut found = Vec::new();
    let l3 = headers.l3;
    let without = |from: usize, to: usize, at: usize| {
        let mut covered = bytes[from..to].to_vec();
        covered[at - from..at - from + 2].fill(0);
        add(0, &covered)
    };
    let v4 = headers.eth_type == key::ETH_P_IP;
    if v4 && bytes.len() >= l3 + 20 {
        let end = (l3 + (bytes[l3] & 15) as usize * 4).clamp(l3 + 20, bytes.len());
        let right = !fold(without(l3, end, l3 + 10)) as u32;
        found.push(Checksum { at: l3 + 10, kind: Kind::Internet, right });
    }
    let Some(l4) = headers.l4 else { return found };
    let mut end = if v4 {
        l3 + u16::from_be_bytes([bytes[l3 + 2], bytes[l3 + 3]]) as usize
    } else {
        l3 + 40 + u16::from_be_bytes([bytes[l3 + 4], bytes[l3 + 5]]) as usize
    };
    let least = match headers.proto {
        ipproto::TCP => 20,
        ipproto::SCTP => 12,
        _ => 8,
    };
    if end < l4 + least || end > bytes.len() {
        end = bytes.len();
    }
    let (at, kind) = match headers.proto {
        ipproto::TCP => (l4 + 16, Kind::Internet),
        ipproto::UDP => (l4 + 6, if frame.offload.needs_csum { Kind::Internet } else { Kind::Udp }),
        ipproto::ICMP if v4 => (l4 + 2, Kind::Internet),
        ipproto::ICMPV6 if !v4 => (l4 + 2, Kind::Internet),
        ipproto::SCTP => (l4 + 8, Kind::Crc32c),
        _ => return found,
    };
    let proto = headers.proto;
    let len = (end - l4) as u32;
    let address = |at: usize| -> [u8; 16] {
        let mut address = [0; 16];
        address.copy_from_slice(&bytes[at..at + 16]);
        address
    };
    let word = |at: usize| u32::from_be_bytes([bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]]);
    let pseudo = match proto {
        ipproto::ICMP | ipproto::SCTP => 0,
        _ if v4 => pseudo_v4(word(l3 + 12), word(l3 + 16), proto, len),
        // The final destination is in the routing header; what it is does not change.
        _ if headers.routed => pseudo_v6(&address(l3 + 8), &[0; 16], proto, len),
        _ => pseudo_v6(&address(l3 + 8), &address(l3 + 24), proto, len),
    };
    let right = match kind {
        Kind::Crc32c => {
            let mut covered = bytes[l4..end].to_vec();
            covered[8..12].fill(0);
            crc32c(&covered)
        }
        _ if frame.offload.needs_csum => fold(pseudo) as u32,
        _ => match !fold(pseudo + without(l4, end, at)) {
            0 if kind == Kind::Udp => 0xffff,
            sum => sum as u32,
        },
    };
    found.push(Checksum { at, kind, right });
    found
}

/// Makes all checksums of a frame right: with [`Offload::needs_csum`], the pseudo-header's sum.
pub fn complete_checksums(frame: &mut Frame) {
    for sum in checksums(frame) {
        let at = sum.at;
        match sum.kind {
            Kind::Crc32c => frame.bytes[at..at + 4].copy_from_slice(&sum.right.to_le_bytes()),
            _ => frame.bytes[at..at + 2].copy_from_slice(&(sum.right as u16).to_be_bytes()),
        }
    }
}
