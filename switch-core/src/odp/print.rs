//! Actions: printing them.

use super::actions::{NSH_MD_TYPES, SET_GROUPS, is_context, nsh, probability};
use super::flow::format_port;
use super::groups::{find_group, format_hex, format_mac, from_sets};
use super::tunnel::format_tunnel;
use crate::action::{Action, Ct, FieldSet, PortRef, SetGroup, Userspace};
use crate::flow::PortNames;
use crate::key::{ETH_P_8021Q, Field, VLAN_PRESENT};

/// A list of actions' text; see [`super::format_actions`].
pub(super) fn format_list(actions: &[Action], names: &dyn PortNames) -> String {
    if actions.is_empty() {
        return "drop".into();
    }
    actions.iter().map(|action| format_action(action, names)).collect::<Vec<_>>().join(",")
}

fn format_action(action: &Action, names: &dyn PortNames) -> String {
    let list = |actions: &[Action]| format_list(actions, names);
    match action {
        Action::Output(port) => format_port_ref(port, names),
        Action::Drop(reason) => format!("drop({reason})"),
        Action::Userspace(userspace) => format_userspace(userspace, names),
        Action::Set(group, sets) => format!("set({})", format_set(*group, sets)),
        Action::SetTunnel(sets, opts) => {
            let (key, mask) = from_sets(sets);
            format!("set({})", format_tunnel(&key, &mask, opts).unwrap_or_else(|| "tunnel()".into()))
        }
        Action::PushVlan { tpid, tci } => {
            let tpid = if *tpid == ETH_P_8021Q { String::new() } else { format!("tpid={tpid:#06x},") };
            let cfi = if tci & VLAN_PRESENT == 0 { ",cfi=0" } else { "" };
            format!("push_vlan({tpid}vid={},pcp={}{cfi})", tci & 0xfff, tci >> 13)
        }
        Action::PopVlan => "pop_vlan".into(),
        Action::Sample { probability, actions } => {
            format!("sample(sample={}%,actions({}))", format_percent(*probability), list(actions))
        }
        Action::Recirc(id) => format!("recirc({})", format_hex(*id as u128)),
        Action::Hash { algorithm: 0, basis } => format!("hash(l4({basis}))"),
        Action::Hash { algorithm: 1, basis } => format!("hash(sym_l4({basis}))"),
        Action::Hash { algorithm, basis } => format!("hash({algorithm}({basis}))"),
        Action::PushMpls { lse, ethertype } => {
            format!("push_mpls({},eth_type={ethertype:#06x})", format_lse(*lse))
        }
        Action::PopMpls { ethertype } => format!("pop_mpls(eth_type={ethertype:#06x})"),
        Action::AddMpls { lse, ethertype, flags } => {
            let flags = if *flags == 0 { String::new() } else { format!(",tun_flags={flags:#x}") };
            format!("add_mpls({},eth_type={ethertype:#06x}{flags})", format_lse(*lse))
        }
        Action::Ct(ct) => format_ct(ct),
        Action::CtClear => "ct_clear".into(),
        Action::Trunc(length) => format!("trunc({length})"),
        Action::PushEth { src, dst } => {
            format!("push_eth(src={},dst={})", format_mac(*src), format_mac(*dst))
        }
        Action::PopEth => "pop_eth".into(),
        Action::PushNsh(sets, metadata) => format_push_nsh(sets, metadata),
        Action::PopNsh => "pop_nsh()".into(),
        Action::Meter(id) => format!("meter({id})"),
        Action::Clone(actions) => format!("clone({})", list(actions)),
        Action::CheckPktLen { size, greater, less_equal } => {
            format!("check_pkt_len(size={size},gt({}),le({}))", list(greater), list(less_equal))
        }
        Action::DecTtl(actions) => format!("dec_ttl(le_1({}))", list(actions)),
        Action::Psample(psample) if psample.cookie.is_empty() => format!("psample(group={})", psample.group),
        Action::Psample(psample) => {
            format!("psample(group={},cookie={})", psample.group, format_bytes(&psample.cookie))
        }
        Action::TnlPush(text) => format!("tnl_push({text})"),
        Action::TnlPop(port) => format!("tnl_pop({})", format_port_ref(port, names)),
        Action::LbOutput(bond) => format!("lb_output({bond})"),
        Action::Opaque(text) => text.clone(),
    }
}

fn format_port_ref(port: &PortRef, names: &dyn PortNames) -> String {
    match port {
        PortRef::Ours(id) => format_port(names, id.slot),
        PortRef::Foreign(name) => name.clone(),
    }
}

fn format_userspace(userspace: &Userspace, names: &dyn PortNames) -> String {
    let mut items = vec![format!("pid={}", userspace.pid)];
    if !userspace.userdata.is_empty() {
        items.push(userspace.userdata.clone());
    }
    if userspace.actions {
        items.push("actions".into());
    }
    if let Some(port) = &userspace.tunnel_out_port {
        items.push(format!("tunnel_out_port={}", format_port_ref(port, names)));
    }
    format!("userspace({})", items.join(","))
}

fn format_set(set: SetGroup, sets: &[FieldSet]) -> String {
    let (key, mask) = from_sets(sets);
    let name = SET_GROUPS.iter().find(|(own, _)| *own == set).map_or("", |&(_, name)| name);
    let text = find_group(name).and_then(|group| group.format(&key, &mask));
    text.unwrap_or_else(|| format!("{name}()"))
}

/// A percentage with as many decimals as it takes to read the same probability back, at least one.
fn format_percent(value: u32) -> String {
    let percent = 100.0 * value as f64 / u32::MAX as f64;
    let precise = |decimals: usize| format!("{percent:.decimals$}");
    let reads_back = |text: &String| text.parse().is_ok_and(|percent| probability(percent) == value);
    (1..12).map(precise).find(reads_back).unwrap_or_else(|| precise(12))
}

fn format_lse(lse: u32) -> String {
    format!("label={},tc={},ttl={},bos={}", lse >> 12, lse >> 9 & 7, lse & 0xff, lse >> 8 & 1)
}

fn format_ct(ct: &Ct) -> String {
    let mut items = Vec::new();
    if ct.force {
        items.push("force_commit".into());
    } else if ct.commit {
        items.push("commit".into());
    }
    if ct.zone != 0 {
        items.push(format!("zone={}", ct.zone));
    }
    if let Some((value, mask)) = ct.mark {
        items.push(format!("mark={}/{}", format_hex(value as u128), format_hex(mask as u128)));
    }
    if let Some((value, mask)) = ct.label {
        let mask = if mask == u128::MAX { String::new() } else { format!("/{}", format_hex(mask)) };
        items.push(format!("label={}{mask}", format_hex(value)));
    }
    items.extend(ct.helper.as_ref().map(|name| format!("helper={name}")));
    items.extend(ct.timeout.as_ref().map(|name| format!("timeout={name}")));
    items
        .extend(ct.nat.as_ref().map(|nat| if nat.is_empty() { "nat".into() } else { format!("nat({nat})") }));
    if items.is_empty() { "ct".into() } else { format!("ct({})", items.join(",")) }
}

fn format_push_nsh(sets: &[FieldSet], metadata: &[u8]) -> String {
    let (key, mask) = from_sets(sets);
    let is_type_1 = key.get(Field::NshMdType) == NSH_MD_TYPES[0];
    let shown = nsh().filter(|part| is_type_1 || !is_context(part));
    let value = |part: &super::groups::Part| format!("{}={}", part.name, part.format_value(&key, &mask));
    let mut items: Vec<String> = shown.map(value).collect();
    if !metadata.is_empty() {
        items.push(format!("md2={}", format_bytes(metadata)));
    }
    format!("push_nsh({})", items.join(","))
}

/// All bytes, leading zeros included.
fn format_bytes(bytes: &[u8]) -> String {
    format!("0x{}", bytes.iter().map(|byte| format!("{byte:02x}")).collect::<String>())
}
