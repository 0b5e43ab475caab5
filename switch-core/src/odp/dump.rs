//! Lines of `ovs-dpctl dump-flows` and `ovs-appctl dpctl/dump-flows`.

use super::actions::parse_list;
use super::cursor::Cursor;
use super::error::OdpError;
use super::flow::FlowParser;
use crate::action::Action;
use crate::flow::{FlowSpec, PortNames};
use std::time::Duration;

/// A flow as a datapath dumps it.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct DumpedFlow {
    /// Match, actions and UFID.
    pub spec: FlowSpec,
    /// Packets that have matched.
    pub packets: u64,
    /// Their bytes.
    pub bytes: u64,
    /// How long ago the last one was; none if there was none.
    pub used: Option<Duration>,
    /// All TCP flags seen.
    pub tcp_flags: u16,
    /// What else the line says (`dp`, `offloaded`, `dp-extra-info`), name and value as they stand.
    pub extra: Vec<(String, String)>,
}

/// Letters that `flags:` shows for TCP flags (`packet_format_tcp_flags` in `lib/packets.c`).
const FLAG_LETTERS: &[(&str, u16)] = &[
    ("none", 0),
    ("S", 0x002),
    ("F", 0x001),
    ("P", 0x008),
    ("R", 0x004),
    ("U", 0x020),
    (".", 0x010),
    ("E", 0x040),
    ("C", 0x080),
    ("N", 0x100),
    ("[200]", 0x200),
    ("[400]", 0x400),
    ("[800]", 0x800),
];

/// Reads a line; see [`super::parse_dump_line`].
pub(super) fn parse(text: &str, names: &dyn PortNames) -> Result<DumpedFlow, OdpError> {
    let mut c = Cursor::new(text);
    let (matches, ufid) = FlowParser::new(names).parse(&mut c, true)?;
    let mut flow = DumpedFlow {
        spec: FlowSpec { matches, actions: Vec::new(), ufid, held: None },
        packets: 0,
        bytes: 0,
        used: None,
        tcp_flags: 0,
        extra: Vec::new(),
    };
    let mut has_actions = false;
    loop {
        c.separators();
        if c.is_end() {
            break;
        }
        let name = c.take_while(|next| next.is_ascii_alphanumeric() || next == '-' || next == '_');
        if !name.is_empty() && !c.sees(":") {
            flow.extra.push((name.to_owned(), String::new()));
            continue;
        }
        c.expect(":")?;
        match name {
            "packets" => flow.packets = c.number(64)? as u64,
            "bytes" => flow.bytes = c.number(64)? as u64,
            "used" => flow.used = parse_used(&mut c)?,
            "flags" => flow.tcp_flags = parse_letters(&mut c)?,
            "actions" => {
                // A line that was cut off here must not read as a drop.
                if c.is_end() || c.sees(",") || c.sees(" ") {
                    return Err(c.error("actions expected"));
                }
                let text = c.rest();
                flow.spec.actions = match parse_list(&mut c, names, true) {
                    Ok(actions) if !c.sees(")") => actions,
                    // Actions stand last: what newer datapaths have is kept and shown as it stands.
                    _ => {
                        return Ok(DumpedFlow {
                            spec: FlowSpec {
                                actions: vec![Action::Opaque(text.trim_end().to_owned())],
                                ..flow.spec
                            },
                            ..flow
                        });
                    }
                };
                has_actions = true;
            }
            _ => flow.extra.push((name.to_owned(), take_value(&mut c).to_owned())),
        }
    }
    if has_actions { Ok(flow) } else { Err(c.error("actions:… is missing")) }
}

/// `never`, or seconds.
fn parse_used(c: &mut Cursor<'_>) -> Result<Option<Duration>, OdpError> {
    let at = c.at();
    if c.eat("never") {
        return Ok(None);
    }
    let seconds = c.take_while(|next| next.is_ascii_digit() || next == '.' || next == '-').parse::<f64>();
    // A clock that jumped gives negative ages.
    let used = seconds.ok().and_then(|seconds| Duration::try_from_secs_f64(seconds.max(0.0)).ok());
    let Some(used) = used else { return Err(c.error_at(at, "'never' or seconds expected")) };
    c.expect("s")?;
    Ok(Some(used))
}

fn parse_letters(c: &mut Cursor<'_>) -> Result<u16, OdpError> {
    let mut flags = 0;
    while !c.is_end() && !c.sees(",") && !c.sees(" ") {
        match FLAG_LETTERS.iter().find(|&&(letter, _)| c.eat(letter)) {
            Some((_, flag)) => flags |= flag,
            None => return Err(c.error("TCP flags expected")),
        }
    }
    Ok(flags)
}

/// Everything up to the next comma that is not in parentheses.
fn take_value<'a>(c: &mut Cursor<'a>) -> &'a str {
    let mut open = 0usize;
    let rest = c.rest();
    let end = rest.find(|next| {
        match next {
            '(' => open += 1,
            ')' => open = open.saturating_sub(1),
            _ => {}
        }
        next == ',' && open == 0
    });
    let value = &rest[..end.unwrap_or(rest.len())];
    c.eat(value);
    value.trim_end()
}
