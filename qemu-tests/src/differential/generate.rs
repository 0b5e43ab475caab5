//! Tables and packets made from a seed.
//!
//! Flows are made from the packets that will meet them, so that most packets match something. Left out is what OVS itself
//! does not do twice alike: overlapping flows of one priority; addresses that move between ports (a packet that matches
//! a flow of the datapath teaches nothing until the flow's statistics are looked at, which is later by chance); packets
//! cut to a bare Ethernet header (a packet socket refuses them, and what is sent in the same burst is lost with them);
//! learning, or a change of tables, with a `vlan-limit` of 2 (the flow of a packet with two tags is not revised);
//! rewriting a received MPLS label (the datapath's flow sets the whole label stack entry, but matches only the bits that the
//! tables looked at), and popping one inside a `clone` (what follows gets the label of the packet that the flow was made for:
//! docs/ovs-facts.md); timeouts, meters, tracked fragments and bonds that rebalance.
//!
//! Tables do not change under cases that learn either: what packets of a flow in use teach by the new tables, OVS learns
//! from its datapath's statistics, and with Pointwork when the flow is next shown alive.

use super::offloads::Load;
use super::{Case, PORTS, VlanMode};
use crate::frames::{self, Frame, IPV4, IPV6, Layer, VLANS, mac_text, station};
use crate::random::Random;

/// The case of a seed.
pub fn case(seed: u64) -> Case {
    let mut random = Random::new(seed);
    let learns = random.chance(30);
    let vlan_limit = if !learns && random.chance(20) { 2 } else { 1 };
    let mut frames = frames(&mut random);
    let (tables, groups, recirculates) = (random.between(1, 4), random.below(4), random.chance(60));
    let commits = recirculates && random.chance(30);
    let load = random.pick(&[Load::Whole, Load::Whole, Load::Partial, Load::Segments]);
    let mut maker = Maker { random, learns, recirculates, commits, load, tables, groups };
    let groups = (1..=maker.groups).map(|number| maker.group(number)).collect();
    let policy: Vec<Vec<String>> = (0..=tables).map(|table| maker.table(table, &frames)).collect();
    let changes = if learns || vlan_limit == 2 { 0 } else { maker.random.pick(&[0, 0, 0, 1, 2]) };
    let later: Vec<Vec<String>> = (0..changes)
        .map(|_| {
            // What changes is one table.
            let mut policy = policy.clone();
            let table = maker.random.below(tables + 1);
            policy[table] = maker.table(table, &frames);
            policy.concat()
        })
        .collect();
    let flows = policy.concat();
    let mut random = maker.random;
    let ports =
        if learns && random.chance(40) { vlan_modes(&mut random) } else { vec![VlanMode::All; PORTS] };
    for (_, frame) in &mut frames {
        if random.chance(8) {
            frame.damage(&mut random);
        }
    }
    let mut packets: Vec<(usize, Vec<u8>)> = Vec::new();
    for (port, frame) in &frames {
        packets.push((*port, frame.bytes.clone()));
        if random.chance(25) {
            let again = random.pick(&packets);
            packets.push(again);
        }
        // Others that differ in what flows may or may not look at.
        while random.chance(40) {
            let mut other = frame.clone();
            other.vary(&mut random);
            packets.push((*port, other.bytes));
        }
    }
    for (_, frame) in &mut packets {
        // The userspace datapath's way to a TAP clears the drop-eligible bit of the first tag, as it lets the kernel take the
        // tag off and puts it on again by itself (`netdev_linux_rxq_recv`); guests' packets do not pass there.
        if let [0x81 | 0x88, 0x00 | 0xa8, high] = frame.get_mut(12..15).unwrap_or_default() {
            *high &= !0x10;
        }
    }
    // What one packet teaches or commits is for the next.
    let one_by_one = learns || commits || random.chance(20);
    let burst = if one_by_one { 1 } else { random.between(2, 16) };
    if !one_by_one {
        packets.sort_by_key(|(port, _)| *port);
    }
    Case { seed, learns, vlan_limit, ports, groups, flows, later, load, burst, packets }
}

fn frames(random: &mut Random) -> Vec<(usize, Frame)> {
    let count = random.between(6, 14);
    (0..count)
        .map(|_| {
            let port = random.below(PORTS);
            (port, Frame::random(random, port, PORTS))
        })
        .collect()
}

fn vlan_modes(random: &mut Random) -> Vec<VlanMode> {
    let mode = |random: &mut Random| match random.below(6) {
        0 | 1 => VlanMode::All,
        2 => VlanMode::Trunk(vec![10, 20]),
        3 => VlanMode::Access(random.pick(&[10, 20])),
        4 => VlanMode::Access(30),
        _ => VlanMode::NativeUntagged(10),
    };
    (0..PORTS).map(|_| mode(random)).collect()
}

struct Maker {
    random: Random,
    learns: bool,
    /// Whether packets go round again (MPLS labels, connection tracking); if not, flows look at lengths and write actions to
    /// be done at the end. Both together end ovs-vswitchd 3.1 by an assertion: a packet with more labels than OVS knows
    /// inside `check_pkt_larger`, and `ct` of a packet whose action set is not empty.
    recirculates: bool,
    /// Whether connections are committed.
    commits: bool,
    /// How packets are handed over: what looks at lengths does not treat the last segment and the whole alike.
    load: Load,
    /// Tables 0 to `tables - 1` go on to later ones; table `tables` only sends, so groups may go on there.
    tables: usize,
    /// Groups 1 to this.
    groups: usize,
}

/// What a flow's match guarantees, and so what its actions may touch (ovs-actions(7)).
#[derive(Clone, Copy)]
struct Known<'a> {
    /// The table that the flow is in.
    table: usize,
    /// `ip`, `ipv6`, `arp`, `mpls` or none of them.
    network: &'a str,
    /// `tcp`, `udp6` and the like, or nothing.
    transport: &'a str,
    /// The ND type, if the match names one.
    discovery: u128,
    /// How many tags there are at least.
    tags: usize,
    /// Whether it is an IP packet, no fragment, and not known to belong to no connection: what `ct` takes.
    whole: bool,
}

impl Maker {
    /// Flows of one table, the highest priority first. All differ in priority.
    fn table(&mut self, table: usize, frames: &[(usize, Frame)]) -> Vec<String> {
        let mut flows = Vec::new();
        let count = self.random.between(2, 8);
        for index in 0..count {
            let (port, frame) = self.random.pick(frames);
            let (words, known) = self.matching(table, port, &frame);
            let known = Known {
                network: &known.0,
                transport: &known.1,
                table,
                discovery: known.2,
                tags: known.3.into(),
                whole: words.contains("ip_frag=no") && !words.contains("+inv"),
            };
            let actions = self.actions(known);
            let priority = 1000 - 10 * index;
            flows.push(format!("table={table},priority={priority},{words}actions={actions}"));
        }
        let rest = match self.random.below(10) {
            0 => return flows,
            1..=4 if table < self.tables => format!("resubmit(,{})", table + 1),
            1..=4 => "FLOOD".into(),
            5..=7 if self.learns => "NORMAL".into(),
            5 => "FLOOD".into(),
            _ => self.output(),
        };
        flows.push(format!("table={table},priority=1,actions={rest}"));
        flows
    }

    /// A match that `frame` from `port` has, or nearly; and the words of [`Known`] for it.
    fn matching(
        &mut self,
        table: usize,
        port: usize,
        frame: &Frame,
    ) -> (String, (String, String, u128, bool)) {
        let deepest = match (self.random.below(10), frame.transport) {
            (0..=1, _) => Layer::Link,
            (2..=4, _) | (_, None) => Layer::Network,
            (5..=8, _) => Layer::Transport,
            _ => Layer::Discovery,
        };
        let mut words = Vec::new();
        if self.random.chance(40) {
            words.push(format!("in_port={}", port + 1));
        }
        let network = if deepest >= Layer::Network { frame.network.as_str() } else { "" };
        let transport = match frame.transport {
            Some(word) if deepest >= Layer::Transport => word,
            _ => "",
        };
        if !transport.is_empty() {
            words.push(transport.into());
        } else if !network.is_empty() {
            words.push(network.into());
        }
        let discovery = frame.fields.iter().any(|field| field.layer == Layer::Discovery);
        let deep = discovery && deepest == Layer::Discovery;
        let (mut tagged, mut kind) = (false, 0);
        for field in &frame.fields {
            let needed = deep && matches!(field.name, "icmp_type" | "icmp_code");
            let redundant = field.name == "nw_proto" && !transport.is_empty();
            if field.layer > deepest || redundant || !(needed || self.random.chance(20)) {
                continue;
            }
            let mut field = *field;
            if self.random.chance(8) && !needed && field.bits > 3 && field.name != "vlan_tci" {
                field.value ^= 1 << self.random.below(field.bits as usize);
            }
            if field.name == "nw_tos" {
                field.value &= 0xfc;
            }
            let mask = match field.name {
                // What OpenFlow can say of a tag: there is none, there is one, bits of its VLAN, and its priority.
                "vlan_tci" if field.value == 0 => 0x1fff,
                "vlan_tci" => {
                    tagged = true;
                    let bits = self.random.bits() as u128 & 0xfff;
                    self.random.pick(&[0x1000, 0x1fff, 0xffff, 0x1000 | bits])
                }
                _ => self.mask(field.bits),
            };
            if field.name == "icmp_type" && deep {
                kind = field.value;
            }
            words.push(field.matching(mask));
        }
        if table > 0 && self.random.chance(25) {
            let (value, mask) = (self.random.below(64), self.random.pick(&[0x20, 0x3, 0xff, 0xffff_ffffu32]));
            words.push(format!("reg{}={:#x}/{mask:#x}", self.random.below(4), value as u32 & mask));
        }
        if table > 0 && self.random.chance(8) {
            words.push(format!("metadata={:#x}/0x3", self.random.below(4)));
        }
        for (percent, word) in [
            (3, "ct_state=-trk"),
            (3, "ct_state=+trk+new"),
            (1, "ct_state=+trk+inv"),
            (3 * usize::from(self.commits), "ct_state=+trk+est"),
            (2 * usize::from(self.commits), "ct_state=+rpl"),
            (2, "pkt_mark=0"),
        ] {
            if self.random.chance(percent) {
                words.push(word.into());
            }
        }
        words.push(String::new());
        (words.join(","), (network.into(), transport.into(), kind, tagged))
    }

    /// A mask of any kind for a field this wide: all of it, a prefix, some bits.
    fn mask(&mut self, bits: u32) -> u128 {
        let all = if bits == 128 { u128::MAX } else { (1 << bits) - 1 };
        let mask = match self.random.below(10) {
            0..=5 => all,
            6..=7 => all & !(all >> self.random.between(1, bits as usize - 1).min(127)),
            8 => 1 << self.random.below(bits as usize),
            _ => self.random.wide_bits() & all,
        };
        match (mask, bits) {
            (0, _) => all,
            // ovs-ofctl takes a mask that begins with a digit for the length of a prefix.
            (_, 128) => mask | 0xf << 124,
            _ => mask,
        }
    }

    fn port(&mut self) -> usize {
        self.random.between(1, PORTS)
    }

    /// One action that lets the packet go somewhere.
    fn output(&mut self) -> String {
        let port = self.port();
        match self.random.below(24) {
            0 => "in_port".into(),
            1 => "FLOOD".into(),
            // The bridge's own port is not for the fast path.
            2 if self.random.chance(25) => self.random.pick(&["ALL", "LOCAL"]).into(),
            4 if self.load == Load::Whole => {
                format!("output(port={port},max_len={})", self.random.pick(&[20, 34, 60, 100, 1000]))
            }
            5 => format!("load:{port}->NXM_NX_REG3[0..15],output:NXM_NX_REG3[0..15]"),
            6 => format!("bundle(eth_src,0,hrw,ofport,members:{port},{})", self.port()),
            _ => format!("output:{port}"),
        }
    }

    fn actions(&mut self, mut known: Known<'_>) -> String {
        if self.random.chance(5) {
            return "drop".into();
        }
        let mut actions: Vec<String> = Vec::new();
        for _ in 0..self.random.pick(&[0, 0, 1, 1, 2, 3]) {
            // Not all of it leaves changed.
            if self.random.chance(15) {
                actions.push(self.output());
            }
            actions.push(self.change(&mut known));
        }
        actions.retain(|action| !action.is_empty());
        let inner = known.table < self.tables;
        let next = self.random.between(known.table + 1, self.tables);
        match self.random.below(20) {
            0..=4 if inner => actions.push(format!("resubmit(,{next})")),
            5 if inner && !self.recirculates && self.load != Load::Segments => {
                actions
                    .push(format!("check_pkt_larger({})->NXM_NX_REG0[5]", self.random.pick(&[60, 100, 300])));
                actions.push(format!("resubmit(,{next})"));
            }
            6 if inner => actions.extend([format!("resubmit(,{next})"), self.output()]),
            7 if inner && !self.recirculates => {
                let change = format!("set_field:{}->eth_dst", self.mac());
                actions.push(format!("write_actions({change},output:{})", self.port()));
                actions.push(format!("goto_table:{next}"));
                return actions.join(",");
            }
            8..=9 if inner && self.groups > 0 => {
                actions.push(format!("group:{}", self.random.between(1, self.groups)));
            }
            // Without a commit, every packet of a connection is its first.
            17..=18 if inner && known.whole && self.recirculates => {
                let commit = if self.commits && self.random.chance(60) { "commit," } else { "" };
                actions.push(format!("ct({commit}zone={},table={next})", self.random.below(2)));
            }
            // Testing's own: nothing else goes round again without something that only the host does.
            10..=11 | 19 if inner && self.recirculates => {
                actions.extend(["debug_recirc".into(), format!("resubmit(,{next})")]);
            }
            12 => {
                actions.push(self.clone_of(known));
                actions.push(self.output());
            }
            13..=15 if self.learns => actions.push("NORMAL".into()),
            16 if self.learns && inner => {
                // Everybody who is heard gets a flow in the last table.
                actions.push(format!(
                    "learn(table={},priority=2000,NXM_OF_ETH_DST[]=NXM_OF_ETH_SRC[],output:NXM_OF_IN_PORT[])",
                    self.tables
                ));
                actions.push(format!("resubmit(,{})", self.tables));
            }
            _ => {}
        }
        if actions.is_empty() || self.random.chance(70) {
            actions.push(self.output());
        }
        if self.random.chance(10) {
            actions.push(self.output());
        }
        actions.join(",")
    }

    /// A `clone`, maybe with another inside. Nothing in it pops a label that was received.
    fn clone_of(&mut self, mut known: Known<'_>) -> String {
        if known.network.starts_with("mpls") {
            known.network = "";
        }
        let mut actions = vec![self.change(&mut known)];
        if self.random.chance(40) {
            actions.push(self.clone_of(known));
            actions.push(self.change(&mut known));
        }
        actions.push(self.output());
        actions.retain(|action| !action.is_empty());
        format!("clone({})", actions.join(","))
    }

    fn mac(&mut self) -> String {
        let (port, which) = (self.random.below(PORTS), self.random.between(1, 2));
        mac_text(station(port, which))
    }

    /// An action that changes the packet or what is known of it; nothing if none fits.
    fn change(&mut self, known: &mut Known<'_>) -> String {
        match self.random.below(16) {
            0..=2 => self.change_link(),
            3..=5 => self.change_tag(known),
            6..=10 if known.transport.is_empty() => self.change_network(known),
            6..=8 => self.change_network(known),
            9..=13 => self.change_transport(known),
            _ => self.change_metadata(),
        }
    }

    fn change_link(&mut self) -> String {
        let mac = self.mac();
        match self.random.below(5) {
            0 => format!("mod_dl_dst:{mac}"),
            1 => "set_field:00:00:00:00:02:01/00:00:00:00:ff:0f->eth_dst".into(),
            // The stations of a bridge that learns stay where they are.
            _ if self.learns => format!("set_field:{mac}->eth_dst"),
            2 => format!("mod_dl_src:{mac}"),
            3 => "move:NXM_OF_ETH_DST[]->NXM_OF_ETH_SRC[]".into(),
            _ => {
                "push:NXM_OF_ETH_SRC[],push:NXM_OF_ETH_DST[],pop:NXM_OF_ETH_SRC[],pop:NXM_OF_ETH_DST[]".into()
            }
        }
    }

    fn change_tag(&mut self, known: &mut Known<'_>) -> String {
        let (vlan, priority) = (self.random.pick(&VLANS), self.random.below(8));
        match self.random.below(6) {
            0..=1 if known.tags > 0 => {
                known.tags -= 1;
                "strip_vlan".into()
            }
            2 => {
                known.tags = known.tags.max(1);
                format!("mod_vlan_vid:{vlan}")
            }
            3 => {
                known.tags = known.tags.max(1);
                format!("mod_vlan_pcp:{priority}")
            }
            // OVS knows of two.
            _ if known.tags == 2 => String::new(),
            _ => {
                known.tags += 1;
                let tpid = self.random.pick(&["0x8100", "0x8100", "0x88a8"]);
                let vid = 0x1000 | vlan;
                format!("push_vlan:{tpid},set_field:{vid}->vlan_vid,set_field:{priority}->vlan_pcp")
            }
        }
    }

    fn change_network(&mut self, known: &mut Known<'_>) -> String {
        let (v4, v6) = (
            std::net::Ipv4Addr::from(self.random.pick(&IPV4)),
            std::net::Ipv6Addr::from(self.random.pick(&IPV6)),
        );
        let end = self.random.pick(&["src", "dst"]);
        let choice = self.random.below(8);
        match known.network {
            "ip" | "ipv6" if choice == 0 => "dec_ttl".into(),
            "ip" | "ipv6" if choice == 1 => format!("mod_nw_ttl:{}", self.random.pick(&[1, 64, 255])),
            "ip" | "ipv6" if choice == 2 => format!("mod_nw_tos:{}", self.random.pick(&[0, 4, 184])),
            "ip" | "ipv6" if choice == 3 => format!("mod_nw_ecn:{}", self.random.below(4)),
            "ip" if choice == 4 => format!("set_field:10.{choice}.0.0/255.255.0.0->ip_{end}"),
            "ip" => format!("mod_nw_{end}:{v4}"),
            "ipv6" if choice == 4 => {
                format!("set_field:{}->ipv6_label", self.random.pick(&["0", "0x12345", "0xfffff"]))
            }
            "ipv6" if choice == 5 => format!("set_field:2001::/ffff::->ipv6_{end}"),
            "ipv6" => format!("set_field:{v6}->ipv6_{end}"),
            "arp" if choice == 0 => format!("set_field:{}->arp_op", self.random.between(1, 2)),
            "arp" if choice < 4 => format!("set_field:{v4}->arp_{}", self.random.pick(&["spa", "tpa"])),
            "arp" => format!("set_field:{}->arp_{}", self.mac(), self.random.pick(&["sha", "tha"])),
            "mpls" | "mplsm" if choice < 6 && self.recirculates => {
                // What is below has to be read first: the packet goes round again.
                (known.network, known.transport) = ("ip", "");
                "pop_mpls:0x0800".into()
            }
            _ if choice < 2 && self.recirculates => {
                (known.network, known.transport) = ("mpls", "");
                format!("push_mpls:0x8847,set_mpls_label:{},set_mpls_ttl:9", self.random.below(100))
            }
            _ => String::new(),
        }
    }

    fn change_transport(&mut self, known: &mut Known<'_>) -> String {
        let port = self.random.pick(&frames::PORTS);
        let end = self.random.pick(&["src", "dst"]);
        match known.transport {
            "" => String::new(),
            "icmp" => format!(
                "set_field:{}->icmp_{}",
                self.random.pick(&[0, 3, 8]),
                self.random.pick(&["type", "code"])
            ),
            "icmp6" => match known.discovery {
                135 => format!("set_field:{}->nd_sll", self.mac()),
                136 => format!("set_field:{}->nd_tll", self.mac()),
                _ => String::new(),
            },
            word => {
                let word = word.trim_end_matches('6');
                let mask = self.random.pick(&["", "", "/0xff"]);
                let port = if mask.is_empty() { port } else { port & 0xff };
                format!("set_field:{port}{mask}->{word}_{end}")
            }
        }
    }

    fn change_metadata(&mut self) -> String {
        let register = self.random.below(4);
        match self.random.below(13) {
            12 => format!("set_field:{:#x}/0x3->metadata", self.random.below(4)),
            0..=2 => format!("load:{:#x}->NXM_NX_REG{register}[0..5]", self.random.below(64)),
            3..=4 => format!("move:NXM_OF_ETH_SRC[0..5]->NXM_NX_REG{register}[0..5]"),
            5 => "move:NXM_OF_IN_PORT[0..5]->NXM_NX_REG1[0..5]".into(),
            6 => "note:01.02.03".into(),
            7 => "ct_clear".into(),
            8 => "set_queue:1".into(),
            9 => format!("load:{:#x}->NXM_NX_PKT_MARK[]", self.random.below(3)),
            10 => format!("multipath(symmetric_l4,50,modulo_n,4,0,NXM_NX_REG{register}[0..1])"),
            _ if self.random.chance(75) => String::new(),
            _ => "controller(max_len=64)".into(),
        }
    }

    fn group(&mut self, number: usize) -> String {
        let kind = self.random.pick(&["all", "indirect", "select", "select", "ff"]);
        let buckets = if kind == "indirect" { 1 } else { self.random.between(1, 4) };
        let mut text = format!("group_id={number},type={kind}");
        if kind == "select" && self.recirculates && self.random.chance(30) {
            text += ",selection_method=dp_hash";
        } else if kind == "select" {
            let fields = self.random.pick(&[
                "eth_src,eth_dst",
                "ip_src,ip_dst",
                "eth_dst,ip_src=255.255.255.0,tcp_dst",
                "ipv6_src,ipv6_dst,udp_src",
                "vlan_vid,eth_type,ip_proto",
            ]);
            text += &format!(",selection_method=hash,fields({fields})");
        }
        for bucket in 1..=buckets {
            text += &format!(",bucket=bucket_id={bucket},");
            match kind {
                "select" => text += &format!("weight:{},", self.random.between(1, 100)),
                "ff" => text += &format!("watch_port:{},", self.port()),
                _ => {}
            }
            let change = match self.random.below(4) {
                0 => self.change_link() + ",",
                1 => format!("mod_vlan_vid:{},", self.random.pick(&VLANS)),
                _ => String::new(),
            };
            let end = match self.random.below(10) {
                0..=1 => format!("resubmit(,{})", self.tables),
                2 if number > 1 => format!("group:{}", self.random.between(1, number - 1)),
                _ => self.output(),
            };
            text += &format!("actions={change}{end}");
        }
        text
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_seed_always_gives_the_same_case() {
        for seed in 0..50 {
            let (one, other) = (case(seed), case(seed));
            assert_eq!(one.to_string(), other.to_string());
            assert!(!one.flows.is_empty() && one.packets.len() >= 6);
        }
    }
}
