//! What the host's own network does with packets that it gets and sends, beside sending them where routes lead: chains of nftables, tables of
//! the older iptables, and policies of IPsec. What the kernel's datapath puts into tunnels, or takes out, goes through it.
//!
//! Not seen: programs attached by BPF, and addresses of senders that are refused by their routes (`rp_filter`). The flow of what is inside a
//! tunnel matches the sender of what is outside, and is made when a packet of that sender has come through.

use super::netlink::{Events, Malformed, Request, Requests, attributes, text, u32_at};
use super::nftables::{NFPROTO_INET, Nftables, is_unavailable};
use super::nftables::{NFTA_CHAIN_HOOK, NFTA_CHAIN_NAME, NFTA_CHAIN_TABLE, NFTA_HOOK_HOOKNUM};
use netlink_sys::protocols::NETLINK_XFRM;
use std::io;
use std::path::Path;

/// What the host's own network does with packets, in a few words; none if nothing is there.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Stack {
    /// To packets that come for the host.
    pub ingress: Option<String>,
    /// To those that it sends.
    pub egress: Option<String>,
}

impl Stack {
    /// It does this with all packets.
    pub fn both(why: &str) -> Stack {
        Stack { ingress: Some(why.into()), egress: Some(why.into()) }
    }

    fn add(&mut self, other: Stack) {
        self.ingress = self.ingress.take().or(other.ingress);
        self.egress = self.egress.take().or(other.egress);
    }
}

/// IPsec of a network namespace.
pub struct Xfrm {
    requests: Requests,
    /// Tells of changes of the policies.
    pub events: Events,
}

impl Xfrm {
    /// Opens IPsec of the calling thread's network namespace; none if the kernel has none.
    pub fn open() -> io::Result<Option<Xfrm>> {
        match Events::open(NETLINK_XFRM, &[XFRMNLGRP_POLICY]) {
            Ok(events) => Ok(Some(Xfrm { requests: Requests::open(NETLINK_XFRM)?, events })),
            Err(error) if error.raw_os_error() == Some(libc::EPROTONOSUPPORT) => Ok(None),
            Err(error) => Err(error),
        }
    }

    fn has_policies(&mut self) -> io::Result<bool> {
        let request = Request::dump(XFRM_MSG_GETPOLICY, &[0; XFRM_USERPOLICY_ID]);
        Ok(!self.requests.ask(&request, |_| Ok(Some(())))?.is_empty())
    }
}

/// Reads all of it.
pub fn read(nftables: &mut Result<Nftables, String>, xfrm: &mut Result<Option<Xfrm>, String>) -> Stack {
    let mut stack = Stack { ingress: None, egress: None };
    match xfrm.as_mut().map(|xfrm| xfrm.as_mut().map_or(Ok(false), Xfrm::has_policies)) {
        Ok(Ok(false)) => {}
        Ok(Ok(true)) => stack.add(Stack::both("IPsec policies")),
        Ok(Err(error)) => stack.add(Stack::both(&format!("IPsec unknown: {error}"))),
        Err(error) => stack.add(Stack::both(&format!("IPsec unknown: {error}"))),
    }
    // The kernel does not tell of these.
    for tables in ["/proc/thread-self/net/ip_tables_names", "/proc/thread-self/net/ip6_tables_names"] {
        if let Some(why) = tables_in(Path::new(tables)) {
            stack.add(Stack::both(&why));
        }
    }
    let Ok(nftables) = nftables else { return stack };
    match chains(&mut nftables.requests) {
        Ok(chains) => chains.into_iter().for_each(|chain| stack.add(chain)),
        Err(error) if is_unavailable(&error) => {}
        Err(error) => stack.add(Stack::both(&format!("nftables unknown: {error}"))),
    }
    stack
}

/// What a list of iptables' tables says, which are there from their first use on.
fn tables_in(path: &Path) -> Option<String> {
    match std::fs::read_to_string(path) {
        Ok(names) => names.split_whitespace().next().map(|table| format!("iptables table '{table}'")),
        Err(error) if error.kind() == io::ErrorKind::NotFound => None,
        Err(error) => Some(format!("iptables unknown: {error}")),
    }
}

/// What each chain of nftables does that sees packets on their way through the host's network.
fn chains(requests: &mut Requests) -> io::Result<Vec<Stack>> {
    let mut chains = Vec::new();
    for family in [NFPROTO_INET, NFPROTO_IPV4, NFPROTO_IPV6] {
        let request = Request::dump(super::nftables::GET_CHAIN, &[family, 0, 0, 0]);
        chains.extend(requests.ask(&request, decode_chain)?);
    }
    Ok(chains)
}

/// What the chain does of which this is the body of `NFT_MSG_NEWCHAIN`; nothing if it has no such hook, or no rules and lets all
/// pass.
pub(super) fn decode_chain(body: &[u8]) -> Result<Option<Stack>, Malformed> {
    let family = match *body.first().ok_or(Malformed)? {
        NFPROTO_INET => "inet",
        NFPROTO_IPV4 => "ip",
        NFPROTO_IPV6 => "ip6",
        _ => return Ok(None),
    };
    let (mut table, mut name, mut hook, mut rules, mut policy) =
        (String::new(), String::new(), None, 1, NF_ACCEPT);
    let number = |value: &[u8]| u32_at(value, 0).map(u32::from_be);
    for attribute in attributes(body.get(NFGENMSG..).ok_or(Malformed)?) {
        match attribute? {
            (NFTA_CHAIN_TABLE, value) => table = text(value),
            (NFTA_CHAIN_NAME, value) => name = text(value),
            (NFTA_CHAIN_HOOK, nested) => {
                for attribute in attributes(nested) {
                    if let (NFTA_HOOK_HOOKNUM, value) = attribute? {
                        hook = Some(number(value)?);
                    }
                }
            }
            (NFTA_CHAIN_POLICY, value) => policy = number(value)?,
            (NFTA_CHAIN_USE, value) => rules = number(value)?,
            _ => {}
        }
    }
    if rules == 0 && policy == NF_ACCEPT {
        return Ok(None);
    }
    let why = Some(format!("nftables chain '{family} {table} {name}'"));
    Ok(match hook {
        Some(NF_INET_PRE_ROUTING | NF_INET_LOCAL_IN) => Some(Stack { ingress: why, egress: None }),
        Some(NF_INET_LOCAL_OUT | NF_INET_POST_ROUTING) => Some(Stack { ingress: None, egress: why }),
        _ => None,
    })
}

const NFPROTO_IPV4: u8 = 2;
const NFPROTO_IPV6: u8 = 10;
const NFGENMSG: usize = 4;
const NFTA_CHAIN_POLICY: u16 = 5;
const NFTA_CHAIN_USE: u16 = 6;
const NF_ACCEPT: u32 = 1;
const NF_INET_PRE_ROUTING: u32 = 0;
const NF_INET_LOCAL_IN: u32 = 1;
const NF_INET_LOCAL_OUT: u32 = 3;
const NF_INET_POST_ROUTING: u32 = 4;
const XFRM_MSG_GETPOLICY: u16 = 0x15;
const XFRMNLGRP_POLICY: u32 = 4;
/// Size of `struct xfrm_userpolicy_id`.
const XFRM_USERPOLICY_ID: usize = 64;

#[cfg(test)]
mod tests {
    use super::super::tests::{in_namespace, run};
    use super::*;

    fn seen() -> (Option<String>, Option<String>) {
        let (mut nftables, mut xfrm) = (
            Nftables::open().map_err(|error| error.to_string()),
            Xfrm::open().map_err(|error| error.to_string()),
        );
        let Stack { ingress, egress } = read(&mut nftables, &mut xfrm);
        (ingress, egress)
    }

    #[test]
    fn what_is_done_to_packets_of_the_host_is_seen() {
        in_namespace(|| {
            let says = |name: &str| Some(format!("nftables chain '{name}'"));
            assert_eq!(seen(), (None, None));
            // Chains that do nothing, and such as see no packet of the host's.
            run("nft add table inet t");
            run("nft 'add chain inet t input { type filter hook input priority 0; }'");
            run("nft 'add chain inet t output { type filter hook output priority 0; }'");
            run("nft 'add chain inet t forward { type filter hook forward priority 0; policy drop; }'");
            run("nft add chain inet t aside");
            run("nft add rule inet t aside drop");
            assert_eq!(seen(), (None, None));
            run("nft add rule inet t input udp dport 4789 drop");
            assert_eq!(seen(), (says("inet t input"), None));
            run("nft flush chain inet t input");
            run("nft add rule inet t output counter");
            assert_eq!(seen(), (None, says("inet t output")));
            run("nft delete table inet t");
            for (hook, ingress) in
                [("prerouting", true), ("input", true), ("output", false), ("postrouting", false)]
            {
                for family in ["ip", "ip6"] {
                    run(&format!("nft add table {family} u"));
                    run(&format!(
                        "nft 'add chain {family} u c {{ type filter hook {hook} priority 0; policy drop; }}'"
                    ));
                    let why = says(&format!("{family} u c"));
                    assert_eq!(seen(), if ingress { (why, None) } else { (None, why) }, "{family} {hook}");
                    run(&format!("nft delete table {family} u"));
                }
            }
            assert_eq!(seen(), (None, None));
        });
    }

    #[test]
    fn ipsec_is_seen_where_the_kernel_has_it() {
        in_namespace(|| {
            let Some(mut xfrm) = Xfrm::open().unwrap() else { return };
            assert!(!xfrm.has_policies().unwrap());
            run("ip xfrm policy add src 192.0.2.1 dst 192.0.2.2 dir out action block");
            assert!(xfrm.has_policies().unwrap());
            assert!(xfrm.events.drain(|_| true));
        });
    }

    #[test]
    fn tables_of_iptables_are_there_when_they_are_named() {
        let mut list = tempfile::NamedTempFile::new().unwrap();
        assert_eq!(tables_in(list.path()), None);
        io::Write::write_all(&mut list, b"filter\nnat\n").unwrap();
        assert_eq!(tables_in(list.path()), Some("iptables table 'filter'".into()));
        assert_eq!(tables_in(Path::new("/nowhere")), None);
        assert!(tables_in(Path::new("/")).unwrap().starts_with("iptables unknown"));
    }
}
