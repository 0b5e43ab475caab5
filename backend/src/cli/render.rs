//! What `pointwork` prints for people.

use super::table::{Align::Left, Align::Right, Table, bytes, duration, grouped, percent, scaled};
use crate::control::protocol::{
    Flow, Flows, MemoryShow, NicShow, OffloadShow, OvsShow, Paths, PolledQueue, PortShow, PortState,
    PortStats, Punted, QueueStats, Show, SpreadShow, Stats, Trace, TunnelShow, WorkerStats,
};
use crate::port_config::KindName;
use std::collections::BTreeMap;
use std::fmt::Write;

/// `show`.
pub fn show(show: &Show) -> String {
    let mut text = format!(
        "pointworkd {}, up {}, host: {}, flows: {} explicit, {} learned\n",
        show.version,
        duration(show.uptime),
        show.host,
        grouped(show.flows.explicit),
        grouped(show.flows.learned)
    );
    if let Some(ovs) = &show.ovs {
        text += &open_vswitch(ovs);
    }
    text += &traffic(&show.paths, &show.punts);
    let mut ports: Vec<_> = show.ports.iter().collect();
    ports.sort_by(|a, b| a.name.cmp(&b.name));
    let mut table = Table::new([
        ("PORT", Left),
        ("SLOT", Right),
        ("STATE", Left),
        ("LINK", Left),
        ("QUEUES", Right),
        ("MTU", Right),
        ("VLAN", Left),
        ("FLOWS", Right),
        ("MASKS", Right),
        ("MACS", Right),
        ("MODE", Left),
        ("SOCKET OR DEVICE", Left),
    ]);
    for port in &ports {
        let (mode, place) = match port.kind {
            KindName::VhostUser => (port.mode.to_string(), &port.socket),
            KindName::Xdp => ("xdp".to_owned(), &port.device),
            KindName::Nic => ("nic".to_owned(), &port.nic),
        };
        let state = match port.state {
            PortState::Waiting => "waiting",
            PortState::Connected => "connected",
            PortState::Faulted => "faulted",
        };
        table.row([
            port.name.clone(),
            port.slot.to_string(),
            state.into(),
            if port.link { "up" } else { "down" }.into(),
            format!("{}/{}", port.active_queues, port.queues),
            port.mtu.to_string(),
            port.vlan.clone(),
            grouped(port.flows),
            port.masks.to_string(),
            port.macs.to_string(),
            mode,
            place.clone(),
        ]);
    }
    section(&mut text, &table);
    let mut features = Table::new([("PORT", Left), ("FEATURES", Left)]);
    for port in ports.iter().filter(|port| !port.features.is_empty()) {
        features.row([port.name.clone(), port.features.join(" ")]);
    }
    section(&mut text, &features);
    memory(&mut text, &ports);
    tunnels(&mut text, &show.tunnels);
    nics(&mut text, &show.nics);
    let mut workers = Table::new([
        ("WORKER", Right),
        ("CPU", Right),
        ("NODE", Right),
        ("MEMORY", Right),
        ("ASLEEP", Right),
        ("POLLS", Left),
    ]);
    for worker in &show.workers {
        workers.row([
            worker.id.to_string(),
            worker.cpu.map_or("any".into(), |cpu| cpu.to_string()),
            worker.node.map_or("-".into(), |node| node.to_string()),
            bytes(worker.memory),
            format!("{:.1} %", worker.asleep * 100.0),
            polled(&worker.queues),
        ]);
    }
    section(&mut text, &workers);
    if show.workers.len() > 1 {
        text += &spread(&show.spread);
    }
    offload(&mut text, &show.offload);
    let faults =
        ports.iter().filter_map(|port| Some(format!("port '{}': {}", port.name, port.fault.as_ref()?)));
    let nics =
        show.nics.iter().filter_map(|nic| Some(format!("NIC '{}': {}", nic.name, nic.fault.as_ref()?)));
    let notices: Vec<String> = nics.chain(faults).chain(show.warnings.iter().cloned()).collect();
    if !notices.is_empty() {
        text.push('\n');
    }
    for notice in notices {
        let _ = writeln!(text, "warning: {notice}");
    }
    text
}

/// What ports cost in memory.
fn memory(text: &mut String, ports: &[&PortShow]) {
    let mut table = Table::new([
        ("PORT", Left),
        ("TABLES", Right),
        ("QUEUES", Right),
        ("GUEST", Right),
        ("USED", Right),
        ("PAGES", Right),
        ("NODES", Left),
    ]);
    for port in ports {
        let MemoryShow { tables, queues, guest, used, page, nodes } = &port.memory;
        let of_guest = |size: u64| if *guest == 0 { "-".into() } else { bytes(size) };
        let all: u64 = nodes.values().sum();
        let share = |(node, part): (&u32, &u64)| match nodes.len() {
            1 => node.to_string(),
            _ => format!("{node}: {}", percent(*part, all)),
        };
        let nodes: Vec<String> = nodes.iter().map(share).collect();
        table.row([
            port.name.clone(),
            bytes(*tables),
            bytes(*queues),
            of_guest(*guest),
            of_guest(*used),
            of_guest(*page),
            if nodes.is_empty() { "-".into() } else { nodes.join(", ") },
        ]);
    }
    section(text, &table);
}

/// Logical ports of tunnels.
fn tunnels(text: &mut String, tunnels: &[TunnelShow]) {
    let mut table = Table::new([
        ("TUNNEL", Left),
        ("SLOT", Right),
        ("KIND", Left),
        ("UDP PORT", Right),
        ("FLOWS", Right),
        ("MASKS", Right),
    ]);
    for tunnel in tunnels {
        table.row([
            tunnel.name.clone(),
            tunnel.slot.to_string(),
            tunnel.kind.clone(),
            tunnel.udp_port.map_or("-".into(), |port| port.to_string()),
            grouped(tunnel.flows),
            tunnel.masks.to_string(),
        ]);
    }
    section(text, &table);
    let mut table = Table::new([("TUNNEL", Left), ("HOST PATH TO", Left), ("AT", Left), ("WHY", Left)]);
    for (tunnel, reason) in
        tunnels.iter().flat_map(|tunnel| tunnel.host_path.iter().map(move |why| (tunnel, why)))
    {
        let more = reason.places.saturating_sub(reason.first.len() as u64);
        let at = match (reason.first.join(", "), more) {
            (places, _) if places.is_empty() => "all".into(),
            (places, 0) => places,
            (places, more) => format!("{places} and {} more", grouped(more)),
        };
        table.row([tunnel.name.clone(), reason.what.clone(), at, reason.why.clone()]);
    }
    section(text, &table);
}

/// NICs, and their ports.
fn nics(text: &mut String, nics: &[NicShow]) {
    let mut table = Table::new([
        ("NIC", Left),
        ("ADDRESS", Left),
        ("DRIVER", Left),
        ("TABLES", Left),
        ("RESETS", Right),
        ("FORWARDED", Right),
        ("UNCLAIMED", Right),
    ]);
    let mut ports = Table::new([
        ("NIC PORT", Left),
        ("NAME", Left),
        ("MAC", Left),
        ("LINK", Left),
        ("SPEED", Right),
        ("DOES", Left),
        ("PORT", Left),
    ]);
    for nic in nics {
        let tables = match (nic.tables, nic.offload) {
            (false, _) => "none",
            (true, true) => "for flows",
            (true, false) => "not used",
        };
        table.row([
            nic.name.clone(),
            nic.address.clone(),
            if nic.driver.is_empty() { "-".into() } else { nic.driver.clone() },
            if nic.driver.is_empty() { "-" } else { tables }.into(),
            grouped(nic.resets),
            grouped(nic.forwarded),
            grouped(nic.unclaimed),
        ]);
        for port in &nic.ports {
            ports.row([
                format!("{}/{}", nic.name, port.number),
                port.name.clone(),
                port.mac.clone(),
                if port.link { "up" } else { "down" }.into(),
                if port.speed == 0 { "-".into() } else { format!("{} Mbit/s", grouped(port.speed.into())) },
                if port.does.is_empty() { "-".into() } else { port.does.join(", ") },
                port.port.clone().unwrap_or_else(|| "-".into()),
            ]);
        }
    }
    section(text, &table);
    section(text, &ports);
}

/// A worker's queues, those of a port together: `vm1 0,2, vm2 0 (pinned)`.
fn polled(queues: &[PolledQueue]) -> String {
    let of_port = |queues: &[PolledQueue]| {
        let numbers: Vec<String> = queues.iter().map(|queue| queue.queue.to_string()).collect();
        let name = queues.first().map_or("", |queue| &queue.port);
        let pinned = if queues.iter().any(|queue| queue.pinned) { " (pinned)" } else { "" };
        format!("{name} {}{pinned}", numbers.join(","))
    };
    queues.chunk_by(|a, b| a.port == b.port).map(of_port).collect::<Vec<_>>().join(", ")
}

/// How full the tables of NICs are, and why flows are not in them.
fn offload(text: &mut String, nics: &[OffloadShow]) {
    let mut table = Table::new([
        ("NIC", Left),
        ("RULES", Right),
        ("GROUPS", Right),
        ("OPERATIONS", Right),
        ("WAITING", Right),
        ("RESETS", Right),
    ]);
    for nic in nics {
        table.row([
            nic.nic.clone(),
            format!("{} of {}", grouped(nic.rules.into()), grouped(nic.max_rules.into())),
            grouped(nic.groups.into()),
            grouped(nic.operations.into()),
            grouped(nic.waiting),
            grouped(nic.resets),
        ]);
    }
    section(text, &table);
    for nic in nics.iter().filter(|nic| !nic.not_offloaded.is_empty()) {
        let mut reasons: Vec<_> = nic.not_offloaded.iter().collect();
        reasons.sort_by_key(|&(reason, &flows)| (std::cmp::Reverse(flows), reason));
        let reasons: Vec<String> = reasons
            .into_iter()
            .map(|(reason, &flows)| format!("{reason}: {} flows", grouped(flows)))
            .collect();
        let _ = writeln!(text, "not in {}: {}", nic.nic, reasons.join("; "));
    }
}

/// By which rule queues are spread, and what it has done.
fn spread(spread: &SpreadShow) -> String {
    let rule = if spread.rebalance { "may move" } else { "stay where they are (rebalance = false)" };
    let mut text = format!("queues that are not pinned {rule}; moved so far: {}", grouped(spread.moves));
    if let Some(last) = &spread.last {
        let why = if last.pinned { "pinned" } else { "rebalanced" };
        let _ = write!(
            text,
            ", the last {} ago: {} queue {} from worker {} to {}, {why}",
            duration(last.seconds),
            last.port,
            last.queue,
            last.from,
            last.to
        );
    }
    text + "\n"
}

/// What there is to say about Open vSwitch: a line each about its database and its datapath.
fn open_vswitch(ovs: &OvsShow) -> String {
    let version = ovs.version.as_deref().map_or(String::new(), |version| format!(" {version}"));
    let database = ovs.database_error.as_deref().unwrap_or("connected");
    // The error names what could not be reached, as this line does.
    let database = database.strip_prefix(&format!("{}: ", ovs.database)).unwrap_or(database);
    let mut text =
        format!("Open vSwitch{version}: bridge {}, database {}: {database}\n", ovs.bridge, ovs.database);
    let datapath = ovs.datapath.as_deref().unwrap_or("the datapath is not known yet");
    let _ = match (&ovs.datapath_error, ovs.read_seconds) {
        (Some(error), _) => writeln!(text, "flows: {datapath}: {error}"),
        (None, Some(seconds)) => writeln!(
            text,
            "flows: {datapath}, all read {seconds:.1} s ago, {} resyncs{}, {:.0} keep-alives/s needed{}",
            grouped(ovs.resyncs),
            match ovs.lost_events {
                0 => String::new(),
                lost => format!(" ({} for lost events)", grouped(lost)),
            },
            ovs.keepalives_per_second,
            if ovs.given_up > 0 {
                format!(", {} flows too cold to be kept alive", grouped(ovs.given_up))
            } else {
                String::new()
            }
        ),
        (None, None) => writeln!(text, "flows: {datapath}, not read yet"),
    };
    text
}

/// Which way packets go, in a line, and why not the fast one, in another.
fn traffic(paths: &Paths, punts: &[Punted]) -> String {
    let all = paths.l1 + paths.l2 + paths.miss + paths.punt + paths.keepalive;
    if all == 0 {
        return "traffic: none yet\n".into();
    }
    let mut text = format!(
        "traffic: {} fast, {} punted, {} without a flow, {} keep-alives, of {} packets\n",
        percent(paths.l1 + paths.l2, all),
        percent(paths.punt, all),
        percent(paths.miss, all),
        percent(paths.keepalive, all),
        grouped(all)
    );
    let reasons: Vec<String> = punts
        .iter()
        .map(|punt| {
            format!("{}: {} packets, {} flows", punt.reason, grouped(punt.packets), grouped(punt.flows))
        })
        .collect();
    if !reasons.is_empty() {
        let _ = writeln!(text, "punted: {}", reasons.join("; "));
    }
    text
}

/// `stats` since the daemon started; `all` shows drop reasons at zero too.
pub fn stats(stats: &Stats, all: bool) -> String {
    let mut text = String::new();
    let mut table = Table::new([
        ("PORT", Left),
        ("RX PACKETS", Right),
        ("RX BYTES", Right),
        ("FORWARDED", Right),
        ("TO HOST", Right),
        ("RX DROPS", Right),
        ("TX PACKETS", Right),
        ("TX BYTES", Right),
        ("FAST COPIES", Right),
        ("HOST COPIES", Right),
        ("TX DROPS", Right),
    ]);
    let deleted = (stats.deleted.rx_packets != 0).then(|| ("(deleted)".to_owned(), &stats.deleted));
    for (name, port) in stats.ports.iter().map(|(name, port)| (name.clone(), port)).chain(deleted) {
        table.row([
            name,
            grouped(port.rx_packets),
            scaled(port.rx_bytes as f64),
            grouped(port.rx_forwarded),
            grouped(port.rx_to_host),
            grouped(total(&port.rx_drops)),
            grouped(port.tx_packets),
            scaled(port.tx_bytes as f64),
            grouped(port.fast_copies),
            grouped(port.host_copies),
            grouped(total(&port.tx_drops)),
        ]);
    }
    section(&mut text, &table);

    let mut drops =
        Table::new([("DROPPED AT", Left), ("ON ITS WAY", Left), ("REASON", Left), ("PACKETS", Right)]);
    for (name, port) in &stats.ports {
        let ways = [("in", &port.rx_drops), ("at the host", &port.host_drops), ("out", &port.tx_drops)];
        for (way, reasons) in ways {
            for (reason, &count) in reasons.iter().filter(|&(_, &count)| all || count > 0) {
                drops.row([name.clone(), way.into(), reason.clone(), grouped(count)]);
            }
        }
    }
    section(&mut text, &drops);

    let paths = stats.paths;
    let lookups = paths.l1 + paths.l2 + paths.miss + paths.punt + paths.keepalive;
    let mut table = Table::new([("PATH", Left), ("PACKETS", Right), ("SHARE", Right)]);
    for (name, count) in [
        ("L1, exact match", paths.l1),
        ("L2, masked", paths.l2),
        ("miss, to host", paths.miss),
        ("punt, to host", paths.punt),
        ("keep-alive, to host", paths.keepalive),
    ] {
        table.row([name.into(), grouped(count), percent(count, lookups)]);
    }
    section(&mut text, &table);

    let mut table = Table::new([("NIC", Left), ("PACKETS BY ITS TABLES", Right), ("BYTES", Right)]);
    for (name, nic) in &stats.offload {
        let about = if nic.estimated { "~" } else { "" };
        table.row([
            name.clone(),
            format!("{about}{}", grouped(nic.packets)),
            format!("{about}{}", scaled(nic.bytes as f64)),
        ]);
    }
    section(&mut text, &table);

    section(&mut text, &workers(&[], &stats.workers));
    section(&mut text, &queues(&[], &stats.workers));
    text
}

/// What queues have cost their workers between two answers, the first of which may be empty.
fn queues(before: &[WorkerStats], after: &[WorkerStats]) -> Table {
    let mut table = Table::new([
        ("WORKER", Right),
        ("PORT", Left),
        ("QUEUE", Right),
        ("BUSY CYCLES", Right),
        ("OF BUSY", Right),
        ("POLLED", Left),
    ]);
    for now in after {
        let then = before.iter().find(|then| then.id == now.id);
        let busy = now.busy_cycles.saturating_sub(then.map_or(0, |then| then.busy_cycles));
        for queue in &now.queues {
            let is_same = |other: &&QueueStats| (&other.port, other.queue) == (&queue.port, queue.queue);
            let earlier = then.and_then(|then| then.queues.iter().find(is_same));
            let cycles = queue.busy_cycles.saturating_sub(earlier.map_or(0, |queue| queue.busy_cycles));
            if !queue.polled && cycles == 0 {
                continue;
            }
            table.row([
                now.id.to_string(),
                queue.port.clone(),
                queue.queue.to_string(),
                scaled(cycles as f64),
                percent(cycles, busy),
                if queue.polled { "here" } else { "moved away" }.into(),
            ]);
        }
    }
    table
}

/// What workers did with their time between two answers, the first of which may be empty.
fn workers(before: &[WorkerStats], after: &[WorkerStats]) -> Table {
    let mut table = Table::new([
        ("WORKER", Right),
        ("PACKETS", Right),
        ("CYCLES/PACKET", Right),
        ("PACKETS/BURST", Right),
        ("BURSTS OF 1/2-3/4-7/8-15/16-31/32-63/64", Right),
        ("BUSY CYCLES", Right),
        ("IDLE CYCLES", Right),
        ("BUSY", Right),
        ("EMPTY POLLS", Right),
        ("SLEEPS", Right),
        ("L1 FLOWS", Right),
    ]);
    let none = WorkerStats::default();
    for now in after {
        let then = before.iter().find(|then| then.id == now.id).unwrap_or(&none);
        let since = |value: fn(&WorkerStats) -> u64| value(now).saturating_sub(value(then));
        let (busy, idle) = (since(|w| w.busy_cycles), since(|w| w.idle_cycles));
        let (taken, bursts) = (since(|w| w.packets), since(|w| w.bursts));
        let each = |count: u64, of: u64| if of == 0 { 0.0 } else { count as f64 / of as f64 };
        let sizes = now.burst_sizes.iter().enumerate().map(|(i, &size)| {
            let size = size.saturating_sub(then.burst_sizes.get(i).copied().unwrap_or(0));
            format!("{:.0}", 100.0 * each(size, bursts))
        });
        table.row([
            now.id.to_string(),
            grouped(taken),
            format!("{:.0}", each(busy, taken)),
            format!("{:.1}", each(taken, bursts)),
            if bursts == 0 { "-".into() } else { sizes.collect::<Vec<_>>().join("/") + " %" },
            scaled(busy as f64),
            scaled(idle as f64),
            percent(busy, busy.saturating_add(idle)),
            scaled(since(|w| w.empty_polls) as f64),
            grouped(since(|w| w.sleeps)),
            grouped(now.l1_entries),
        ]);
    }
    table
}

/// `stats --watch`: rates between two answers that are `seconds` apart.
pub fn rates(before: &Stats, after: &Stats, seconds: f64) -> String {
    let mut table = Table::new([
        ("PORT", Left),
        ("RX PACKETS/S", Right),
        ("RX BIT/S", Right),
        ("TX PACKETS/S", Right),
        ("TX BIT/S", Right),
        ("TO HOST/S", Right),
        ("RX DROPS/S", Right),
        ("TX DROPS/S", Right),
    ]);
    let none = PortStats::default();
    for (name, now) in &after.ports {
        let then = before.ports.get(name).unwrap_or(&none);
        // A port that was deleted and added between the two starts again at zero.
        let rate = |value: fn(&PortStats) -> u64| value(now).saturating_sub(value(then)) as f64 / seconds;
        table.row([
            name.clone(),
            scaled(rate(|p| p.rx_packets).round()),
            scaled((rate(|p| p.rx_bytes) * 8.0).round()),
            scaled(rate(|p| p.tx_packets).round()),
            scaled((rate(|p| p.tx_bytes) * 8.0).round()),
            scaled(rate(|p| p.rx_to_host).round()),
            scaled(rate(|p| total(&p.rx_drops)).round()),
            scaled(rate(|p| total(&p.tx_drops)).round()),
        ]);
    }
    let mut text = table.to_string();
    section(&mut text, &workers(&before.workers, &after.workers));
    section(&mut text, &queues(&before.workers, &after.workers));
    text
}

/// `dump-flows`, a line each in the form of `ovs-dpctl dump-flows`.
pub fn flows(flows: &Flows, more: bool) -> String {
    let mut sorted: Vec<&Flow> = flows.flows.iter().collect();
    sorted.sort_by(|a, b| (a.source, &a.flow, &a.id).cmp(&(b.source, &b.flow, &b.id)));
    sorted.iter().fold(String::new(), |mut text, flow| {
        if more {
            let source = format!("{:?}", flow.source).to_lowercase();
            let _ = write!(text, "id:{}, source:{source}, ", flow.id);
        }
        let about = if flow.estimated { "~" } else { "" };
        let Flow { packets, bytes, .. } = flow;
        let _ = write!(text, "{}, packets:{about}{packets}, bytes:{about}{bytes}, used:", flow.flow);
        let _ = match flow.used_seconds {
            Some(seconds) => write!(text, "{seconds:.3}s"),
            None => write!(text, "never"),
        };
        if flow.tcp_flags != 0 {
            let _ = write!(text, ", flags:{}", tcp_flags(flow.tcp_flags));
        }
        if more || flow.handling != "fast" {
            let _ = write!(text, ", handling:{}", flow.handling);
        }
        if let Some(offloaded) = &flow.offloaded {
            let _ = write!(text, ", offloaded:{offloaded}");
        }
        let _ = writeln!(text, ", actions:{}", if flow.actions.is_empty() { "drop" } else { &flow.actions });
        text
    })
}

/// `trace`.
pub fn trace(trace: &Trace) -> String {
    let width = trace.steps.iter().map(|step| step.layer.chars().count()).chain([7]).max().unwrap_or(7);
    let mut text = String::new();
    let outcome = ("outcome".to_owned(), trace.outcome.as_str());
    let steps = trace.steps.iter().map(|step| (step.layer.clone(), step.text.as_str()));
    for (layer, body) in steps.chain([outcome]) {
        for (i, line) in body.lines().enumerate() {
            let label = if i == 0 { format!("{layer}:") } else { String::new() };
            let _ = writeln!(text, "{label:<0$} {line}", width + 1);
        }
    }
    text
}

/// TCP flags in OVS's letters (`packet_format_tcp_flags()`): `SF.` and the like, bits without a letter in hex.
fn tcp_flags(flags: u16) -> String {
    let letters = ["F", "S", "R", "P", ".", "U", "E", "C", "N"];
    let mut text: String = letters
        .iter()
        .enumerate()
        .filter(|(bit, _)| flags >> bit & 1 == 1)
        .map(|(_, &letter)| letter)
        .collect();
    if flags >> letters.len() != 0 {
        let _ = write!(text, "[{:x}]", flags & !0x1ff);
    }
    text
}

fn total(reasons: &BTreeMap<String, u64>) -> u64 {
    reasons.values().fold(0, |sum, &count| sum.saturating_add(count))
}

/// Adds a table, an empty line before it, unless it has no rows.
fn section(text: &mut String, table: &Table) {
    if table.is_empty() {
        return;
    }
    if !text.is_empty() {
        text.push('\n');
    }
    let _ = write!(text, "{table}");
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::control::protocol::{FlowSource, OffloadStats, TraceStep};

    #[test]
    fn flags_in_letters() {
        assert_eq!(tcp_flags(0x012), "S.");
        assert_eq!(tcp_flags(0x1ff), "FSRP.UECN");
        assert_eq!(tcp_flags(0x202), "S[200]");
    }

    #[test]
    fn flows_look_like_those_of_ovs() {
        let flow = |source, flow: &str, handling: &str, used_seconds: Option<f64>| Flow {
            id: "3.1".into(),
            ufid: None,
            source,
            flow: flow.into(),
            actions: if handling == "fast" { "vm2".into() } else { String::new() },
            handling: handling.into(),
            packets: 5,
            bytes: 490,
            tcp_flags: if used_seconds.is_some() { 2 } else { 0 },
            used_seconds,
            offloaded: None,
            estimated: false,
        };
        let dump = Flows {
            flows: vec![
                flow(FlowSource::Learned, "in_port(b)", "punt: foreign port", None),
                flow(FlowSource::Explicit, "in_port(c)", "fast", Some(0.25)),
            ],
        };
        assert_eq!(
            flows(&dump, false),
            "in_port(c), packets:5, bytes:490, used:0.250s, flags:S, actions:vm2\n\
             in_port(b), packets:5, bytes:490, used:never, handling:punt: foreign port, actions:drop\n"
        );
        assert!(flows(&dump, true).starts_with("id:3.1, source:explicit, in_port(c), "));
        assert!(flows(&dump, true).contains(", handling:fast, actions:vm2\n"));
    }

    #[test]
    fn what_nics_carry_is_shown() {
        let flow = Flow {
            id: "3.1".into(),
            ufid: None,
            source: FlowSource::Learned,
            flow: "in_port(up1)".into(),
            actions: "up2".into(),
            handling: "fast".into(),
            packets: 5,
            bytes: 490,
            tcp_flags: 0,
            used_seconds: None,
            offloaded: Some("yes".into()),
            estimated: true,
        };
        assert_eq!(
            flows(&Flows { flows: vec![flow] }, false),
            "in_port(up1), packets:~5, bytes:~490, used:never, offloaded:yes, actions:up2\n"
        );
        let nic = OffloadShow {
            nic: "nic0".into(),
            rules: 12,
            max_rules: 2048,
            not_offloaded: [("punt".into(), 2), ("match on ip.proto".into(), 7)].into(),
            ..OffloadShow::default()
        };
        let text = show(&Show { offload: vec![nic], ..Show::default() });
        assert!(text.contains("12 of 2,048"), "{text}");
        assert!(text.ends_with("not in nic0: match on ip.proto: 7 flows; punt: 2 flows\n"), "{text}");
        let carried = OffloadStats { packets: 7, bytes: 700, estimated: true };
        let text = stats(&Stats { offload: [("nic0".into(), carried)].into(), ..Stats::default() }, false);
        let row = text.lines().find(|line| line.starts_with("nic0")).unwrap();
        assert_eq!(row.split_whitespace().collect::<Vec<_>>(), ["nic0", "~7", "~700"]);
    }

    #[test]
    fn rates_are_differences_and_never_negative() {
        let sample = |rx_packets, rx_bytes| {
            let port = PortStats { rx_packets, rx_bytes, ..PortStats::default() };
            Stats { ports: [("vm1".to_string(), port)].into(), ..Stats::default() }
        };
        let text = rates(&sample(1000, 0), &sample(4000, 1_000_000), 2.0);
        let row: Vec<&str> = text.lines().nth(1).unwrap().split_whitespace().collect();
        assert_eq!(row, ["vm1", "1.50", "k", "4.00", "M", "0", "0", "0", "0", "0"]);
        let text = rates(&sample(9, 9), &sample(0, 0), 1.0);
        assert!(text.lines().nth(1).unwrap().split_whitespace().skip(1).all(|cell| cell == "0"), "{text}");
    }

    #[test]
    fn a_worker_is_judged_by_what_it_did_between_two_looks() {
        let look = |packets, busy_cycles, idle_cycles, singles, full| {
            let burst_sizes = vec![singles, 0, 0, 0, 0, full, 0];
            let bursts = singles + full;
            let worker = WorkerStats {
                packets,
                busy_cycles,
                idle_cycles,
                bursts,
                burst_sizes,
                l1_entries: 64,
                ..WorkerStats::default()
            };
            Stats { workers: vec![worker], ..Stats::default() }
        };
        let text = rates(&look(1000, 900_000, 0, 1000, 0), &look(1325, 932_500, 97_500, 1005, 10), 1.0);
        let row: Vec<&str> = text.lines().last().unwrap().split_whitespace().collect();
        assert_eq!(row[..5], ["0", "325", "100", "21.7", "33/0/0/0/0/67/0"], "{text}");
        assert!(row.contains(&"25.0") && row.last() == Some(&"64"), "{text}");
    }

    #[test]
    fn traces_have_a_line_for_each_line_of_a_layer() {
        let step = |layer: &str, text: &str| TraceStep { layer: layer.into(), text: text.into() };
        let answer =
            Trace { steps: vec![step("parse", "a\nb"), step("L1", "miss")], outcome: "to vm2".into() };
        assert_eq!(trace(&answer), "parse:   a\n         b\nL1:      miss\noutcome: to vm2\n");
    }
}
