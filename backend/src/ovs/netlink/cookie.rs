//! The cookie that OVS gives to `userspace(…)`, as ODP text (`struct user_action_cookie`, `lib/odp-util.h`).

use super::hex;
use super::ports::Ports;
use super::wire::{u16_at, u32_at};

/// The cookie's size since OVS 2.10.
const LENGTH: usize = 48;
/// Where what depends on the type begins.
const BODY: usize = 24;
/// `enum slow_path_reason`, lowest bit first.
const SLOW_PATHS: [&str; 7] = ["cfm", "bfd", "lacp", "stp", "lldp", "action", "match"];

/// The cookie as OVS prints it: by type if it has one, else in hexadecimal.
pub fn format(data: &[u8], ports: &Ports<'_>) -> String {
    typed(data, ports).unwrap_or_else(|| format!("userdata({})", hex(data)))
}

fn typed(data: &[u8], ports: &Ports<'_>) -> Option<String> {
    let body = data.get(BODY..).filter(|_| data.len() == LENGTH)?;
    let (u16, u32) = (|at| u16_at(body, at), |at| u32_at(body, at));
    Some(match u16_at(data, 0)? {
        1 => {
            let tci = u16::from_be(u16(0)?);
            format!("sFlow(vid={},pcp={},output={})", tci & 0xfff, tci >> 13, u32(4)?)
        }
        2 => format!("slow_path({})", slow_path(u32(4)?)),
        3 => {
            let direction = match u32(20)? {
                1 => ",ingress",
                2 => ",egress",
                _ => "",
            };
            format!(
                "flow_sample(probability={},collector_set_id={},obs_domain_id={},obs_point_id={},output_port={}{direction})",
                u16(0)?,
                u32(4)?,
                u32(8)?,
                u32(12)?,
                ports.name(u32(16)?)
            )
        }
        4 => format!("ipfix(output_port={})", ports.name(u32(0)?)),
        5 => {
            let rule_cookie = u64::from_be_bytes(body.get(8..16)?.try_into().ok()?);
            let rule_cookie = if rule_cookie == 0 { "0".into() } else { format!("{rule_cookie:#x}") };
            let (dont_send, continuation) = (u8::from(body[0] != 0), u8::from(body[1] != 0));
            format!(
                "controller(reason={},dont_send={dont_send},continuation={continuation},recirc_id={},\
                 rule_cookie={rule_cookie},controller_id={},max_len={})",
                u16(2)?,
                u32(4)?,
                u16(16)?,
                u16(18)?
            )
        }
        _ => return None,
    })
}

fn slow_path(reasons: u32) -> String {
    if reasons == 0 {
        return "0".into();
    }
    let named = SLOW_PATHS.iter().enumerate().filter(|(bit, _)| reasons >> bit & 1 != 0);
    let mut items: Vec<String> = named.map(|(_, name)| (*name).to_owned()).collect();
    let unknown = reasons >> SLOW_PATHS.len() << SLOW_PATHS.len();
    if unknown != 0 {
        items.push(format!("{unknown:#x}"));
    }
    items.join(",")
}
