//! Actions as OVS's datapath interface (ODP) has them: what flows carry, what the text syntax reads and prints.
//!
//! This is the complete vocabulary (`enum ovs_action_attr`, `linux/openvswitch.h`, and userspace's additions). What the
//! switch can execute of it is decided in [`crate::compile`]; the rest is kept, shown and punted.

use crate::key::Field;
use crate::packet::PortId;

/// An output's target.
#[derive(Clone, PartialEq, Eq, Debug, Hash)]
pub enum PortRef {
    /// A port of this switch.
    Ours(PortId),
    /// A port of the datapath that is not ours, by name or number as the source of the flow gave it.
    Foreign(String),
}

/// A part of a field that `set` rewrites: `field = field & !mask | value`.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Hash)]
pub struct FieldSet {
    /// Which field.
    pub field: Field,
    /// The new bits, within `mask`.
    pub value: u128,
    /// The bits that change; all of the field's for a plain `set`.
    pub mask: u128,
}

/// The netlink attribute that a `set` names: its fields are rewritten in one action.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Hash)]
pub enum SetGroup {
    /// `eth(src,dst)`.
    Eth,
    /// `ipv4(src,dst,tos,ttl)`.
    Ipv4,
    /// `ipv6(src,dst,label,tclass,hlimit)`.
    Ipv6,
    /// `tcp(src,dst)`.
    Tcp,
    /// `udp(src,dst)`.
    Udp,
    /// `sctp(src,dst)`.
    Sctp,
    /// `icmp(type,code)`.
    Icmp,
    /// `icmpv6(type,code)`.
    Icmpv6,
    /// `arp(sip,tip,op,sha,tha)`.
    Arp,
    /// `nd(target,sll,tll)`.
    Nd,
    /// `mpls(label,tc,ttl,bos)`.
    Mpls,
    /// `nsh(...)`.
    Nsh,
    /// `skb_mark(N)`.
    SkbMark,
    /// `skb_priority(N)`.
    SkbPriority,
}

/// A GENEVE option in a match or in `set(tunnel(...))`.
#[derive(Clone, PartialEq, Eq, Debug, Hash)]
pub struct GeneveOpt {
    /// Option class, and its mask.
    pub class: (u16, u16),
    /// Option type, critical bit included, and its mask.
    pub kind: (u8, u8),
    /// Value, a multiple of 4 bytes, at most 124.
    pub value: Vec<u8>,
    /// Mask of the value, of the same length.
    pub mask: Vec<u8>,
}

/// Options of the tunnel header that do not have a fixed place in the key.
#[derive(Clone, PartialEq, Eq, Debug, Hash, Default)]
pub struct TunnelOpts {
    /// GENEVE options, in order.
    pub geneve: Vec<GeneveOpt>,
    /// What the text or netlink gave beside that and is only carried (`erspan(...)`, `gtpu(...)`), as ODP text.
    pub other: Option<String>,
}

/// Arguments of `userspace(...)`.
#[derive(Clone, PartialEq, Eq, Debug, Hash, Default)]
pub struct Userspace {
    /// Netlink port id that the kernel sends to.
    pub pid: u32,
    /// The cookie, as ODP text (`sFlow(...)`, `slow_path(...)`, `controller(...)`, `userdata(...)`), empty if none.
    pub userdata: String,
    /// `actions`: the upcall carries the flow's actions.
    pub actions: bool,
    /// Port of the tunnel on whose way out the sample is taken.
    pub tunnel_out_port: Option<PortRef>,
}

/// Arguments of `ct(...)`.
#[derive(Clone, PartialEq, Eq, Debug, Hash, Default)]
pub struct Ct {
    /// Commit the connection.
    pub commit: bool,
    /// With commit: replace an entry of the other direction.
    pub force: bool,
    /// Zone.
    pub zone: u16,
    /// Mark and its mask.
    pub mark: Option<(u32, u32)>,
    /// Label and its mask.
    pub label: Option<(u128, u128)>,
    /// ALG.
    pub helper: Option<String>,
    /// Timeout policy.
    pub timeout: Option<String>,
    /// NAT arguments as ODP text without the word `nat`: empty for plain `nat`.
    pub nat: Option<String>,
}

/// Arguments of `psample(...)`.
#[derive(Clone, PartialEq, Eq, Debug, Hash, Default)]
pub struct Psample {
    /// Group.
    pub group: u32,
    /// Cookie.
    pub cookie: Vec<u8>,
}

/// One action.
#[derive(Clone, PartialEq, Eq, Debug, Hash)]
pub enum Action {
    /// Send the packet as it stands to a port.
    Output(PortRef),
    /// Drop, with a userspace reason code (`OVS_ACTION_ATTR_DROP`).
    Drop(u32),
    /// Send to userspace.
    Userspace(Userspace),
    /// `set(...)`, masked or not.
    Set(SetGroup, Vec<FieldSet>),
    /// `set(tunnel(...))`: fields and options of the tunnel header.
    SetTunnel(Vec<FieldSet>, TunnelOpts),
    /// Push an 802.1Q or 802.1ad tag; `tci` has the present bit set.
    PushVlan {
        /// Tag protocol id.
        tpid: u16,
        /// Tag control information.
        tci: u16,
    },
    /// Pop the outer tag.
    PopVlan,
    /// Execute on a copy with probability `probability / 2^32`.
    Sample {
        /// `u32::MAX` is always.
        probability: u32,
        /// What is executed.
        actions: Vec<Action>,
    },
    /// Look up again under another recirculation id.
    Recirc(u32),
    /// Compute `dp_hash`.
    Hash {
        /// Algorithm: 0 is `hash_l4`, 1 is `sym_l4`.
        algorithm: u32,
        /// Basis.
        basis: u32,
    },
    /// Push an MPLS label stack entry.
    PushMpls {
        /// The entry in host order.
        lse: u32,
        /// New ethertype.
        ethertype: u16,
    },
    /// Pop an MPLS label stack entry.
    PopMpls {
        /// Ethertype of what is below.
        ethertype: u16,
    },
    /// Add an MPLS entry at layer 2 or 3.
    AddMpls {
        /// The entry in host order.
        lse: u32,
        /// New ethertype.
        ethertype: u16,
        /// Flags (`OVS_MPLS_L3_TUNNEL_FLAG_MASK`).
        flags: u16,
    },
    /// Connection tracking.
    Ct(Ct),
    /// Forget connection tracking state.
    CtClear,
    /// Cut the packet to this many bytes for the next output.
    Trunc(u32),
    /// Push an Ethernet header: source, destination.
    PushEth {
        /// Source MAC.
        src: u64,
        /// Destination MAC.
        dst: u64,
    },
    /// Pop the Ethernet header.
    PopEth,
    /// Push an NSH header: base fields and metadata as fields.
    PushNsh(Vec<FieldSet>, Vec<u8>),
    /// Pop the NSH header.
    PopNsh,
    /// Meter.
    Meter(u32),
    /// Execute on a copy.
    Clone(Vec<Action>),
    /// Branch on the length of the packet, or of a segment of it.
    CheckPktLen {
        /// Length, link header included.
        size: u16,
        /// If longer.
        greater: Vec<Action>,
        /// If not.
        less_equal: Vec<Action>,
    },
    /// Decrement the TTL; when it is 1 or less, do this instead of what follows.
    DecTtl(Vec<Action>),
    /// Sample to the psample group.
    Psample(Psample),
    /// Userspace datapath: push a prebuilt tunnel header, as ODP text.
    TnlPush(String),
    /// Userspace datapath: pop a tunnel header and continue at this tunnel port.
    TnlPop(PortRef),
    /// Userspace datapath: output to a bond's member by hash.
    LbOutput(u32),
    /// An action, or a list of them, that is not understood, as its source gave it. Never read from text.
    Opaque(String),
}
