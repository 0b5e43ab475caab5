//! Which recirculation chains may be remembered whole.
//!
//! An L1 entry speaks for every packet that agrees with its key. It may name the flow of a later stage only if all these
//! packets look the same there, in each bit that some flow of the port looks at. That holds when what the earlier stages
//! did to the packet is one of: nothing (the bit is in the key), a constant, or a function of what is wholly in the key.
//! In doubt a chain is cut, and its later stages are looked up each time.

use crate::compile::{Op, Plan};
use crate::edit::Edit;
use crate::flow::FlowRef;
use crate::key::{Field, Key, Mask, shape};
use crate::l1::Chain;
use crate::slab::{Disposition, Slab};

/// A plan that always goes on at one further stage, as its last act, after steps whose effect on the key is known.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Onward {
    /// It counts the TTL down.
    ttl: bool,
    /// It takes a VLAN tag off.
    pops: bool,
    /// VLAN tags that it puts on.
    pushes: u8,
}

impl Onward {
    /// What `plan` is in this respect: `None` if it does not go on, goes on in several ways, or changes what the key cannot
    /// tell.
    pub fn of(plan: &Plan) -> Option<Onward> {
        let (last, ops) = plan.ops.split_last()?;
        let mut onward = Onward { ttl: false, pops: false, pushes: 0 };
        let mut cut = false;
        for op in ops {
            match op {
                Op::Output(_) => cut = false,
                // The next stage may be one that cannot be executed for it.
                Op::Trunc(_) => cut = true,
                Op::Through(way) if way.limit != u32::MAX => return None,
                Op::Through(_) | Op::SetMark { .. } | Op::SetPriority { .. } => {}
                Op::Edit(Edit::Eth(_) | Edit::Ipv4(_) | Edit::Ipv6(_)) => {}
                Op::Edit(Edit::Tcp(_) | Edit::Udp(_) | Edit::Sctp(_)) => {}
                // What the parser reads after these headers depends on them.
                Op::Edit(Edit::Icmp(_) | Edit::Arp(_) | Edit::Nd(_)) => return None,
                Op::PushVlan(_) => onward.pushes = onward.pushes.saturating_add(1),
                Op::PopVlan => onward.pops = true,
                Op::DecTtl(exception) if ends_here(exception) => onward.ttl = true,
                // On copies: the packet itself goes on unchanged.
                Op::Clone(ops) | Op::Sample { ops, .. } if ends_here(ops) => {}
                Op::CheckLen(branch) if ends_here(&branch.greater) && ends_here(&branch.less_equal) => {}
                _ => return None,
            }
        }
        (matches!(last, Op::Recirc(_)) && !cut).then_some(onward)
    }

    /// Whether all packets that agree with `key` under `union`, and have had `pushed` tags put on by earlier stages, look
    /// alike after the plan.
    fn is_determined(&self, key: &Key, union: &Mask, pushed: u8) -> bool {
        let ttl = union.is_exact(Field::IpTtl) || !union.has(Field::IpTtl);
        // A third tag hides what is below from the parser, and what it hid comes into sight when a tag is taken off.
        let tags = [Field::VlanTpid, Field::CvlanTpid].iter().filter(|&&tag| key.get(tag) != 0).count();
        let deep = key.get(Field::Shape) as u16 & shape::VLAN_DEEP != 0;
        let hidden = deep || tags + pushed as usize + self.pushes as usize > 2;
        (ttl || !self.ttl) && !((self.pops || self.pushes > 0) && hidden)
    }
}

/// Whether a list of ops neither goes on at another stage nor to the host.
fn ends_here(ops: &[Op]) -> bool {
    ops.iter().all(|op| match op {
        Op::Recirc(_) | Op::Punt => false,
        Op::Through(way) => way.limit == u32::MAX,
        Op::Clone(ops) | Op::Sample { ops, .. } | Op::DecTtl(ops) => ends_here(ops),
        Op::CheckLen(branch) => ends_here(&branch.greater) && ends_here(&branch.less_equal),
        _ => true,
    })
}

/// How much a chain says about a packet's way.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Extent {
    /// All of it: every stage has a plan.
    Whole,
    /// It ends at this flow, a punt.
    Punt(FlowRef),
    /// Only the beginning; or a flow of it is gone.
    Open,
}

/// How much the flows, in order, say.
#[inline]
pub(crate) fn extent(flows: &[FlowRef], slab: &Slab) -> Extent {
    for &flow in flows {
        let Some(entry) = slab.get(flow) else { return Extent::Open };
        match &entry.disposition {
            Disposition::Punt(_) => return Extent::Punt(flow),
            Disposition::Fast(plan) if plan.is_certain() => return Extent::Whole,
            Disposition::Fast(_) if entry.onward.is_none() => return Extent::Open,
            Disposition::Fast(_) => {}
        }
    }
    Extent::Open
}

/// The beginning of a resolved chain that every packet of the same L1 key shares.
pub(crate) fn fuse(flows: &[FlowRef], slab: &Slab, key: &Key, union: &Mask) -> Chain {
    let (mut chain, mut pushed) = (Chain::default(), 0u8);
    for &flow in flows {
        if !chain.push(flow) {
            break;
        }
        let onward = slab.get(flow).and_then(|entry| entry.onward);
        let Some(onward) = onward.filter(|onward| onward.is_determined(key, union, pushed)) else { break };
        pushed = pushed.saturating_add(onward.pushes);
    }
    chain
}
