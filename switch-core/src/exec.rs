//! Execution of plans: what becomes of a packet, and by which ports it leaves.
//!
//! The semantics are those of `do_execute_actions` in Linux's `net/openvswitch/actions.c`: an output sends the packet as
//! it stands; `clone`, `sample`, `check_pkt_len` and `recirc` work on a copy unless nothing comes after them; an action
//! that fails ends its list and the lists around it up to the last recirculation; reaching a list's end drops the packet.
//! Lengths that actions speak of do not count the outer VLAN tag, which the kernel keeps beside the packet.
//!
//! Execution is a function of the packet, the plans and what the [`Env`] answers, so a dry run with the same answers
//! takes the same way.

use crate::checksum;
use crate::compile::{CheckLen, Op, Plan, Ttl, Way};
use crate::drop::DropReason;
use crate::edit::LinkPatch;
use crate::key::{self, Field, Key};
use crate::packet::{self, Gso, Packet, PortId};
use crate::tunnel::Outer;

/// What a packet carries from stage to stage beside its bytes.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Metadata {
    /// Recirculation id of the stage.
    pub recirc_id: u32,
    /// Packet mark.
    pub skb_mark: u32,
    /// Packet priority.
    pub skb_priority: u32,
}

impl Metadata {
    /// Whether there is a mark or priority.
    fn is_marked(&self) -> bool {
        (self.skb_mark, self.skb_priority) != (0, 0)
    }

    /// Writes the metadata into a key whose packet words have been extracted.
    pub fn write_to(&self, key: &mut Key) {
        key.set(Field::RecircId, self.recirc_id as u128);
        key.set(Field::SkbMark, self.skb_mark as u128);
        key.set(Field::SkbPriority, self.skb_priority as u128);
    }
}

/// The world that a plan acts on.
pub trait Env<'p> {
    /// The packet as it stands leaves by `port`, cut to `max_len` bytes of frame (`u32::MAX`: whole). With `last` nothing
    /// of it is needed afterwards, and the caller may keep the buffer; otherwise the packet must come back unchanged.
    fn output(&mut self, packet: &mut Packet, port: PortId, max_len: u32, last: bool);

    /// The plan of the packet's next stage, or `None` if there is no flow for it or that flow is a punt. The packet has
    /// been edited since it was parsed: its layout is true, but a key is to be extracted anew.
    fn recirculate(&mut self, packet: &mut Packet, metadata: &Metadata) -> Option<&'p Plan>;

    /// 32 random bits, for `sample`.
    fn random(&mut self) -> u32;
}

/// How the execution of a plan ended.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Verdict {
    /// At least one output was made.
    Done,
    /// No output was made.
    Dropped(DropReason),
    /// A stage of the packet's way has no executable plan. Outputs may have been made: plans that are not
    /// [certain](Plan::is_certain) are run dry first.
    Unresolved,
}

/// Copies that may be alive at once: of `clone`, `sample`, `check_pkt_len` and `recirc` that are not last.
pub const MAX_COPIES: usize = 8;
/// Recirculations that one packet may go through.
pub const MAX_RECIRCULATIONS: u32 = 16;

/// Preallocated packets for the copies that execution makes.
pub struct Scratch {
    copies: Box<[Packet]>,
}

impl Default for Scratch {
    fn default() -> Self {
        Scratch { copies: vec![Packet::default(); MAX_COPIES].into() }
    }
}

/// Executes `plan` on a packet that has just come in and been parsed. The packet is used up.
#[inline]
pub fn execute<'p, E: Env<'p>>(
    plan: &'p Plan,
    packet: &mut Packet,
    scratch: &mut Scratch,
    env: &mut E,
) -> Verdict {
    let mut run = Run { env, sent: false, reason: None };
    let state = State { metadata: Metadata::default(), max_len: u32::MAX, recirculations: 0 };
    match run.list(&plan.ops, packet, &mut scratch.copies, state) {
        Err(Stop::Unresolved) => Verdict::Unresolved,
        _ if run.sent => Verdict::Done,
        _ => Verdict::Dropped(run.reason.unwrap_or(DropReason::FlowDrop)),
    }
}

/// Executes a plan that comes to a [`Rewrite`](crate::compile::Rewrite) and nothing `more`, but for the output: shorter than
/// [`execute`], of which the outcome is the same.
///
/// # Errors
/// Why the packet is dropped instead.
#[inline(always)]
pub(crate) fn rewrite(patch: &LinkPatch, ttl: Ttl, packet: &mut Packet) -> Result<(), DropReason> {
    let at = packet.layout.l3 as usize;
    let head = packet.head_mut();
    // The frequent case is spelled out, of the same outcome.
    if at == ETH_HEADER as usize
        && let Some((link, rest)) = head.split_first_chunk_mut::<{ ETH_HEADER as usize }>()
        && let [macs @ .., 0x08, 0x00] = link
        && let Some(header) = rest.first_chunk_mut()
    {
        patch.apply(macs);
        match ttl {
            Ttl::Keep => {}
            Ttl::Decrement => return dec_ttl_v4(header),
            Ttl::Set4(ttl) => set_ttl_v4(header, ttl),
            Ttl::Set6(_) => return Err(DropReason::TruncatedHeader), // such flows have no IPv4 packets
        }
        return Ok(());
    }
    patch.apply(head.first_chunk_mut().ok_or(DropReason::TruncatedHeader)?);
    match ttl {
        Ttl::Keep => {}
        Ttl::Decrement => return dec_ttl(packet),
        Ttl::Set4(ttl) => set_ttl_v4(header_at::<20>(packet, at)?, ttl),
        Ttl::Set6(ttl) => header_at::<40>(packet, at)?[7] = ttl,
    }
    Ok(())
}

fn header_at<const N: usize>(packet: &mut Packet, at: usize) -> Result<&mut [u8; N], DropReason> {
    packet.head_mut().get_mut(at..).and_then(<[u8]>::first_chunk_mut).ok_or(DropReason::TruncatedHeader)
}

#[inline(always)]
fn set_ttl_v4(header: &mut [u8; 20], ttl: u8) {
    let [old, proto, a, b] = [header[8], header[9], header[10], header[11]];
    if ttl != old {
        let word = |ttl| u16::from_be_bytes([ttl, proto]);
        let check = checksum::update_word(u16::from_be_bytes([a, b]), word(old), word(ttl));
        header[8] = ttl;
        header[10..12].copy_from_slice(&check.to_be_bytes());
    }
}

/// Executes a plan that comes to some [`Rewrite`](crate::compile::Rewrite), but for the output.
///
/// # Errors
/// Why the packet is dropped instead.
pub fn rewrite_by_ops(plan: &Plan, packet: &mut Packet) -> Result<(), DropReason> {
    for op in &plan.ops {
        match op {
            Op::Edit(edit) => edit.apply(packet)?,
            Op::DecTtl(_) => dec_ttl(packet)?,
            Op::PushVlan(tag) => push_vlan(packet, tag)?,
            Op::PopVlan => pop_vlan(packet)?,
            _ => {} // the output
        }
    }
    Ok(())
}

/// What goes along with a packet, or a copy of it, through lists and stages.
#[derive(Clone, Copy)]
struct State {
    metadata: Metadata,
    /// Of the next output, without the outer VLAN tag.
    max_len: u32,
    recirculations: u32,
}

/// Why a list of ops ended before its end.
enum Stop {
    /// An action failed and the packet, or copy, is dropped. The reason has been noted.
    Failed,
    /// A header could not be laid around the packet. Only this copy is dropped: what the lists around it do goes on.
    NotPushed,
    /// The packet is to be punted.
    Unresolved,
}

struct Run<'e, E> {
    env: &'e mut E,
    sent: bool,
    /// Why the first packet or copy was dropped for another reason than that its flow says so.
    reason: Option<DropReason>,
}

impl<'p, E: Env<'p>> Run<'_, E> {
    /// Executes a list on a packet that nothing else needs afterwards.
    fn list(
        &mut self,
        ops: &'p [Op],
        packet: &mut Packet,
        copies: &mut [Packet],
        mut state: State,
    ) -> Result<(), Stop> {
        for (i, op) in ops.iter().enumerate() {
            let last = i + 1 == ops.len();
            match op {
                Op::Output(port) => {
                    let max_len = match state.max_len {
                        u32::MAX => u32::MAX,
                        len => len.max(ETH_HEADER) + outer_tag(packet),
                    };
                    self.env.output(packet, *port, max_len, last);
                    self.sent = true;
                    state.max_len = u32::MAX;
                }
                Op::Edit(edit) => self.check(edit.apply(packet))?,
                Op::SetMark { value, mask } => {
                    state.metadata.skb_mark = state.metadata.skb_mark & !mask | value;
                }
                Op::SetPriority { value, mask } => {
                    state.metadata.skb_priority = state.metadata.skb_priority & !mask | value;
                }
                Op::PushVlan(tag) => self.check(push_vlan(packet, tag))?,
                Op::PopVlan => self.check(pop_vlan(packet))?,
                Op::Trunc(len) => state.max_len = *len,
                Op::Through(_) | Op::Push(_) if state.max_len != u32::MAX => {
                    // An earlier stage has cut the packet inside, not the outer one.
                    return Err(Stop::Unresolved);
                }
                // The host may send the one, or what an earlier stage has marked, another way.
                Op::Through(way) if way.is_exceeded_by(packet) || state.metadata.is_marked() => {
                    return Err(Stop::Unresolved);
                }
                Op::Through(way) => self.through(way, packet, copies, last),
                Op::Push(outer) => self.push(outer, packet)?,
                Op::DecTtl(exception) => match dec_ttl(packet) {
                    Err(DropReason::TtlExpired) => {
                        self.note(DropReason::TtlExpired);
                        return self.list(exception, packet, copies, state);
                    }
                    result => self.check(result)?,
                },
                Op::Clone(ops) => self.nested(ops, packet, copies, state, last)?,
                Op::Sample { probability, ops } => {
                    if self.env.random() <= *probability {
                        self.nested(ops, packet, copies, state, last)?;
                    }
                }
                Op::CheckLen(branch) => {
                    let CheckLen { size, greater, less_equal } = &**branch;
                    let ops = if exceeds(packet, *size) { greater } else { less_equal };
                    self.nested(ops, packet, copies, state, last)?;
                }
                Op::Recirc(id) => {
                    let metadata = Metadata { recirc_id: *id, ..state.metadata };
                    let state = State { metadata, recirculations: state.recirculations + 1, ..state };
                    if let Some((packet, copies)) = self.copy_unless(last, packet, copies) {
                        self.recirculate(packet, copies, state)?;
                    }
                }
                Op::Punt => return Err(Stop::Unresolved),
            }
        }
        Ok(())
    }

    /// Output of the packet, or a copy of it, inside a tunnel's header. If that cannot be, what follows is done all the same: it
    /// is as if the tunnel's device had dropped it.
    #[inline(never)] // so that lists without it are executed as before
    fn through(&mut self, way: &Way, packet: &mut Packet, copies: &mut [Packet], last: bool) {
        let id = self.env.random() as u16;
        let Some((packet, _)) = self.copy_unless(last, packet, copies) else { return };
        match way.outer.push(packet, id) {
            Ok(()) => {
                self.env.output(packet, way.to, u32::MAX, true);
                self.sent = true;
            }
            Err(reason) => self.note(reason),
        }
    }

    #[inline(never)] // as above
    fn push(&mut self, outer: &Outer, packet: &mut Packet) -> Result<(), Stop> {
        let id = self.env.random() as u16;
        self.check(outer.push(packet, id)).map_err(|_| Stop::NotPushed)
    }

    /// Executes a list inside a list.
    fn nested(
        &mut self,
        ops: &'p [Op],
        packet: &mut Packet,
        copies: &mut [Packet],
        state: State,
        last: bool,
    ) -> Result<(), Stop> {
        if !ops.is_empty()
            && let Some((packet, copies)) = self.copy_unless(last, packet, copies)
        {
            return match self.list(ops, packet, copies, state) {
                Err(Stop::NotPushed) => Ok(()),
                result => result,
            };
        }
        Ok(())
    }

    /// A copy of the packet, or if it is the `last` time that it is needed the packet itself; and the copies that are
    /// left. `None` if there are none.
    fn copy_unless<'a>(
        &mut self,
        last: bool,
        packet: &'a mut Packet,
        copies: &'a mut [Packet],
    ) -> Option<(&'a mut Packet, &'a mut [Packet])> {
        if last {
            return Some((packet, copies));
        }
        let Some((copy, copies)) = copies.split_first_mut() else {
            self.note(DropReason::TooDeep);
            return None;
        };
        copy.copy_from(packet);
        Some((copy, copies))
    }

    /// Goes on at the next stage. What fails there does not end the lists here.
    fn recirculate(&mut self, packet: &mut Packet, copies: &mut [Packet], state: State) -> Result<(), Stop> {
        if state.recirculations > MAX_RECIRCULATIONS {
            self.note(DropReason::TooDeep);
            return Ok(());
        }
        let plan = self.env.recirculate(packet, &state.metadata).ok_or(Stop::Unresolved)?;
        match self.list(&plan.ops, packet, copies, state) {
            Err(Stop::Failed | Stop::NotPushed) => Ok(()),
            result => result,
        }
    }

    fn check(&mut self, result: Result<(), DropReason>) -> Result<(), Stop> {
        result.map_err(|reason| {
            self.note(reason);
            Stop::Failed
        })
    }

    fn note(&mut self, reason: DropReason) {
        self.reason.get_or_insert(reason);
    }
}

const ETH_HEADER: u32 = 14;
const VLAN_TAG: usize = 4;

/// The 16 bits at offset `at`.
fn be16(packet: &Packet, at: usize) -> Option<u16> {
    packet.head().get(at..)?.first_chunk().map(|bytes| u16::from_be_bytes(*bytes))
}

fn is_vlan(tpid: u16) -> bool {
    tpid == key::ETH_P_8021Q || tpid == key::ETH_P_8021AD
}

/// Bytes of the outer VLAN tag: a frame too short for a tag and an ethertype has none.
fn outer_tag(packet: &Packet) -> u32 {
    match be16(packet, 12) {
        Some(tpid) if is_vlan(tpid) && packet.len >= ETH_HEADER + VLAN_TAG as u32 => VLAN_TAG as u32,
        _ => 0,
    }
}

fn push_vlan(packet: &mut Packet, tag: &[u8; 4]) -> Result<(), DropReason> {
    packet.insert(12, VLAN_TAG)?;
    packet.head_mut()[12..16].copy_from_slice(tag);
    Ok(())
}

/// Takes the outer tag off; without a tag there is nothing to do.
fn pop_vlan(packet: &mut Packet) -> Result<(), DropReason> {
    match be16(packet, 12) {
        Some(tpid) if !is_vlan(tpid) => Ok(()),
        Some(_) if outer_tag(packet) != 0 => packet.remove(12, VLAN_TAG),
        _ => Err(DropReason::TruncatedHeader),
    }
}

/// Decrements the TTL of an IP packet behind at most one tag; any other packet is left as it is.
fn dec_ttl(packet: &mut Packet) -> Result<(), DropReason> {
    let mut eth_type = be16(packet, 12 + outer_tag(packet) as usize);
    if eth_type.is_some_and(is_vlan) {
        return Ok(()); // the kernel does not look behind the second
    }
    let l3 = packet.layout.l3 as usize;
    if packet.layout.l3 != packet::NONE {
        eth_type = be16(packet, l3.wrapping_sub(2)); // which a SNAP header may have moved
    }
    let head = packet.head_mut().get_mut(l3..).unwrap_or_default();
    match eth_type {
        Some(key::ETH_P_IP) => dec_ttl_v4(head.first_chunk_mut().ok_or(DropReason::TruncatedHeader)?)?,
        Some(key::ETH_P_IPV6) => {
            let header = head.first_chunk_mut::<40>().ok_or(DropReason::TruncatedHeader)?;
            if header[7] <= 1 {
                return Err(DropReason::TtlExpired);
            }
            header[7] -= 1;
        }
        _ => {}
    }
    Ok(())
}

#[inline(always)]
fn dec_ttl_v4(header: &mut [u8; 20]) -> Result<(), DropReason> {
    let [ttl, _, a, b] = [header[8], header[9], header[10], header[11]];
    if ttl <= 1 {
        return Err(DropReason::TtlExpired);
    }
    // The word of the TTL becomes smaller by 0x100, whatever it is.
    let check = checksum::update_word(u16::from_be_bytes([a, b]), 0x100, 0);
    header[8] = ttl - 1;
    header[10..12].copy_from_slice(&check.to_be_bytes());
    Ok(())
}

/// Whether the packet is longer than `size`, and if it is to be segmented, so are its segments.
fn exceeds(packet: &Packet, size: u32) -> bool {
    segment_len(packet).saturating_sub(outer_tag(packet)) > size
}

/// Length of the packet, or if it is to be segmented, of its longest segment.
pub(crate) fn segment_len(packet: &Packet) -> u32 {
    let segment = match packet.offload.gso {
        Gso::None => packet.len,
        Gso::Tcp4 | Gso::Tcp6 | Gso::UdpL4 => {
            let payload = packet.offload.inner.map_or(packet.layout.payload, |inner| inner.payload);
            payload as u32 + packet.offload.gso_size as u32
        }
    };
    segment.min(packet.len)
}

#[cfg(test)]
mod tests;
