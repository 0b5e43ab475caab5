//! The switch's parser against Open vSwitch's own: `ovs-ofctl parse-pcap` prints the flow that it extracts from each packet.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::process::Command;

use anyhow::{Context, Result, bail, ensure};
use qemu_tests::frames::{Frame, combinations, hex};
use qemu_tests::host::WorkDir;
use qemu_tests::random::Random;
use switch_core::key::{
    ETH_P_802_2, ETH_P_ARP, ETH_P_IP, ETH_P_IPV6, ETH_P_MPLS_MC, ETH_P_MPLS_UC, ETH_P_RARP, FRAG_LATER,
    Field, Key, VLAN_PRESENT, ipproto, shape,
};
use switch_core::packet::{Packet, PortId};
use switch_core::parse::{Extracted, extract};

/// A capture file (pcap-savefile(5)): microseconds, Ethernet.
fn pcap(frames: &[Vec<u8>]) -> Vec<u8> {
    let mut file = Vec::new();
    for word in [0xa1b2_c3d4u32, 4 << 16 | 2, 0, 0, 65_535, 1] {
        file.extend(word.to_le_bytes());
    }
    for frame in frames {
        let len = frame.len() as u32;
        for word in [0, 0, len, len] {
            file.extend(word.to_le_bytes());
        }
        file.extend(frame);
    }
    file
}

/// What Open vSwitch prints for each frame.
fn flows(frames: &[Vec<u8>]) -> Result<Vec<String>> {
    let dir = WorkDir::new()?;
    let file = dir.path("frames.pcap");
    std::fs::write(&file, pcap(frames))?;
    let output = Command::new("ovs-ofctl").arg("parse-pcap").arg(&file).output().context("ovs-ofctl")?;
    ensure!(output.status.success(), "ovs-ofctl: {}", String::from_utf8_lossy(&output.stderr));
    Ok(String::from_utf8(output.stdout)?.lines().map(str::to_owned).collect())
}

/// A flow as Open vSwitch prints it, as a key. TPIDs are not printed.
fn key(flow: &str) -> Result<Key> {
    let mut key = Key::default();
    let network = |key: &mut Key, eth_type: u16, proto: Option<u8>| {
        key.set(Field::EthType, eth_type.into());
        if let Some(proto) = proto {
            key.set(Field::IpProto, proto.into());
        }
    };
    let mut entries = [0u32; 3];
    for word in flow.split(',') {
        let (name, value) = word.split_once('=').unwrap_or((word, ""));
        let number = || -> Result<u128> {
            let parsed = match value.strip_prefix("0x") {
                Some(digits) => u128::from_str_radix(digits, 16),
                None => value.parse(),
            };
            parsed.with_context(|| format!("{word} in {flow}"))
        };
        let mac = || -> Result<u128> { Ok(u128::from_str_radix(&value.replace(':', ""), 16)?) };
        let v4 = || -> Result<u128> { Ok(value.parse::<std::net::Ipv4Addr>()?.to_bits().into()) };
        let v6 = || -> Result<u128> { Ok(value.parse::<std::net::Ipv6Addr>()?.to_bits()) };
        let plain = match name {
            "dl_src" => (Field::EthSrc, mac()?),
            "dl_dst" => (Field::EthDst, mac()?),
            "dl_type" => (Field::EthType, if number()? == 0x05ff { ETH_P_802_2.into() } else { number()? }),
            "dl_vlan" | "dl_vlan1" | "dl_vlan_pcp" | "dl_vlan_pcp1" => {
                let field = if name.ends_with('1') { Field::CvlanTci } else { Field::VlanTci };
                let bits = if name.starts_with("dl_vlan_pcp") { number()? << 13 } else { number()? };
                (field, key.get(field) | bits | u128::from(VLAN_PRESENT))
            }
            "nw_src" | "arp_spa" => (Field::Ipv4Src, v4()?),
            "nw_dst" | "arp_tpa" => (Field::Ipv4Dst, v4()?),
            "ipv6_src" => (Field::Ipv6Src, v6()?),
            "ipv6_dst" => (Field::Ipv6Dst, v6()?),
            "ipv6_label" => (Field::Ipv6Label, number()?),
            "nw_proto" | "arp_op" => (Field::IpProto, number()?),
            "nw_tos" | "nw_ecn" => (Field::IpTos, key.get(Field::IpTos) | number()?),
            "nw_ttl" => (Field::IpTtl, number()?),
            "nw_frag" => {
                let kind = ["no", "first", "later"].iter().position(|&kind| kind == value);
                (Field::IpFrag, kind.with_context(|| word.to_owned())? as u128)
            }
            "tp_src" | "icmp_type" => (Field::TpSrc, number()?),
            "tp_dst" | "icmp_code" => (Field::TpDst, number()?),
            "tcp_flags" => (Field::TcpFlags, tcp_flags(value)?),
            "arp_sha" | "nd_sll" => (Field::ArpSha, mac()?),
            "arp_tha" | "nd_tll" => (Field::ArpTha, mac()?),
            "nd_target" => (Field::NdTarget, v6()?),
            "mpls_label" | "mpls_tc" | "mpls_bos" | "mpls_ttl" => {
                let shift = [("mpls_label", 12), ("mpls_tc", 9), ("mpls_bos", 8), ("mpls_ttl", 0)];
                let shift = shift.iter().find(|(part, _)| *part == name).map_or(0, |(_, shift)| *shift);
                entries[0] |= (number()? as u32) << shift;
                continue;
            }
            "mpls_lse1" => {
                entries[1] = number()? as u32;
                continue;
            }
            "mpls_lse2" => {
                entries[2] = number()? as u32;
                continue;
            }
            "in_port" | "vlan_tci" | "vlan_tci1" => continue,
            "ip" => {
                network(&mut key, ETH_P_IP, None);
                continue;
            }
            "ipv6" => {
                network(&mut key, ETH_P_IPV6, None);
                continue;
            }
            "tcp" | "udp" | "sctp" | "icmp" | "igmp" | "tcp6" | "udp6" | "sctp6" | "icmp6" => {
                let proto = match name {
                    "icmp6" => ipproto::ICMPV6,
                    "icmp" => ipproto::ICMP,
                    "igmp" => ipproto::IGMP,
                    "tcp" | "tcp6" => ipproto::TCP,
                    "udp" | "udp6" => ipproto::UDP,
                    _ => ipproto::SCTP,
                };
                network(&mut key, if name.ends_with('6') { ETH_P_IPV6 } else { ETH_P_IP }, Some(proto));
                continue;
            }
            "arp" | "rarp" => {
                network(&mut key, if name == "arp" { ETH_P_ARP } else { ETH_P_RARP }, None);
                continue;
            }
            "mpls" | "mplsm" => {
                network(&mut key, if name == "mpls" { ETH_P_MPLS_UC } else { ETH_P_MPLS_MC }, None);
                continue;
            }
            _ => bail!("{word} in {flow}"),
        };
        key.set(plain.0, plain.1);
    }
    for (field, entry) in [Field::Mpls0, Field::Mpls1, Field::Mpls2].into_iter().zip(entries) {
        key.set(field, entry.into());
    }
    Ok(key)
}

/// `syn|ack|[200]`.
fn tcp_flags(text: &str) -> Result<u128> {
    const NAMES: [&str; 9] = ["fin", "syn", "rst", "psh", "ack", "urg", "ece", "cwr", "ns"];
    if text == "0" {
        return Ok(0);
    }
    let mut flags = 0;
    for name in text.split('|') {
        flags |= match NAMES.iter().position(|&flag| flag == name) {
            Some(bit) => 1 << bit,
            None => {
                u128::from_str_radix(name.trim_matches(['[', ']']), 16).with_context(|| name.to_owned())?
            }
        };
    }
    Ok(flags)
}

/// What the switch's parser finds, without what Open vSwitch does not print; the parse shape; and where the network header
/// is. Nothing for a frame that the switch leaves to its host.
fn parse(frame: &[u8]) -> Option<(Key, u16, usize)> {
    let mut packet = Packet::from_frame(PortId { slot: 0, generation: 1 }, frame);
    let mut key = Key::default();
    if extract(&mut packet, &mut key) != Extracted::Done {
        return None;
    }
    let shape = key.get(Field::Shape) as u16;
    for field in [Field::Shape, Field::VlanTpid, Field::CvlanTpid, Field::MplsCount] {
        key.set(field, 0);
    }
    Some((key, shape, packet.layout.l3.into()))
}

/// How a frame fares.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Verdict {
    /// Both find the same. Bytes after an IP packet are not shown to our parser: Linux's module, which it follows, takes them
    /// for headers if those before say so, and userspace cuts them off.
    Same,
    /// Ours does not decide.
    LeftToHost,
    /// The IP length goes past the frame or into the header. Userspace then finds no network header at all; the module does
    /// not look at the length. What is before the network header is the same.
    IpLength,
    /// TCP's data offset goes past the packet or into the header. The module then finds no transport header; userspace of
    /// this version does not look at the offset. Everything else is the same.
    TcpOffset,
    /// A SNAP header whose control field is not 3: no SNAP header to userspace, one like others to the module. The
    /// addresses and tags are the same.
    SnapControl,
}

fn judge(frame: &[u8], flow: &str) -> Result<Verdict> {
    let (Some((mut ours, _, l3)), theirs) = (parse(frame), key(flow)?) else {
        return Ok(Verdict::LeftToHost);
    };
    let mut verdict = Verdict::Same;
    // Where a header is cut short, there is none behind it.
    let rest = frame.get(l3..).unwrap_or_default();
    let tags = frame[12..]
        .chunks_exact(4)
        .take(2)
        .take_while(|tag| matches!(tag[..2], [0x81, 0] | [0x88, 0xa8]))
        .count();
    let llc = frame.get(14 + 4 * tags..).unwrap_or_default();
    if theirs.eth_type() == ETH_P_802_2 && llc.starts_with(&[0xaa, 0xaa]) && llc.get(2) != Some(&3) {
        verdict = Verdict::SnapControl;
    }
    let lengths = match ours.eth_type() {
        ETH_P_IP if rest.len() >= 20 => Some((word(rest, 2), usize::from(rest[0] & 15) * 4)),
        ETH_P_IPV6 if rest.len() >= 40 => Some((40 + word(rest, 4), 40)),
        _ => None,
    };
    match lengths {
        _ if verdict == Verdict::SnapControl => {}
        Some((len, header)) if (header..=rest.len()).contains(&len) => {
            let packet = &frame[..l3 + len];
            let Some((key, shape, _)) = parse(packet) else { return Ok(Verdict::LeftToHost) };
            ours = key;
            let tcp = ours.ip_proto() == ipproto::TCP && ours.ip_frag() != FRAG_LATER;
            if tcp && shape & shape::L4 == 0 && tcp_offset_lies(&packet[l3..], header) {
                verdict = Verdict::TcpOffset;
            }
        }
        Some(_) => verdict = Verdict::IpLength,
        None => {}
    }
    // ICMPv6 over IPv4, ICMP over IPv6 and IGMP: what userspace keeps of them, no flow can match.
    let stray = matches!(
        (theirs.eth_type(), theirs.ip_proto()),
        (ETH_P_IP, ipproto::ICMPV6 | ipproto::IGMP) | (ETH_P_IPV6, ipproto::ICMP | ipproto::IGMP)
    );
    let excepted = |field: &Field| match verdict {
        Verdict::SnapControl => {
            !matches!(field, Field::EthDst | Field::EthSrc | Field::VlanTci | Field::CvlanTci)
        }
        Verdict::IpLength => field.place().0 >= Field::IpProto.place().0,
        _ if stray || verdict == Verdict::TcpOffset => {
            matches!(field, Field::TpSrc | Field::TpDst | Field::TcpFlags)
        }
        _ => false,
    };
    let mut differences = String::new();
    for &field in Field::ALL.iter().filter(|field| !excepted(field)) {
        if ours.get(field) != theirs.get(field) {
            let _ = write!(
                differences,
                " {}: {:#x}, not {:#x};",
                field.name(),
                ours.get(field),
                theirs.get(field)
            );
        }
    }
    ensure!(differences.is_empty(), "{differences} in {}, which is {flow}", hex(frame));
    Ok(verdict)
}

/// Whether the TCP header in an IP packet is there, but with an impossible data offset. `header` is the length of the IP header.
fn tcp_offset_lies(packet: &[u8], header: usize) -> bool {
    let (mut next, mut at) =
        if header == 40 && packet[0] >> 4 == 6 { (packet[6], 40) } else { (packet[9], header) };
    while next != ipproto::TCP {
        let Some([following, len]) = packet.get(at..).and_then(|rest| rest.first_chunk()) else {
            return false;
        };
        at += match next {
            44 => 8,
            51 => 4 * (usize::from(*len) + 2),
            0 | 43 | 60 => 8 * (usize::from(*len) + 1),
            _ => return false,
        };
        next = *following;
    }
    let Some(offset) = packet.get(at + 12) else { return false };
    let len = usize::from(offset >> 4) * 4;
    packet.len() >= at + 20 && !(20..=packet.len() - at).contains(&len)
}

fn word(bytes: &[u8], at: usize) -> usize {
    usize::from(u16::from_be_bytes([bytes[at], bytes[at + 1]]))
}

fn random_frames(count: usize) -> Vec<Vec<u8>> {
    let mut random = Random::new(1);
    let mut frames = Vec::new();
    for number in 0..count {
        let port = random.below(3);
        let mut frame = Frame::random(&mut random, port, 3);
        for _ in 0..random.pick(&[0, 0, 1, 1, 2, 3]) {
            frame.damage(&mut random);
        }
        if number % 100 == 0 {
            frames.extend((14..frame.bytes.len().min(120)).map(|len| frame.bytes[..len].to_vec()));
        }
        frames.push(frame.bytes);
    }
    frames
}

/// Judges all frames; how many fared how.
fn judge_all(frames: &[Vec<u8>]) -> Result<BTreeMap<Verdict, usize>> {
    let flows = flows(frames)?;
    ensure!(flows.len() == frames.len(), "{} flows for {} frames", flows.len(), frames.len());
    let mut verdicts = BTreeMap::new();
    for (frame, flow) in frames.iter().zip(&flows) {
        *verdicts.entry(judge(frame, flow)?).or_default() += 1;
    }
    Ok(verdicts)
}

#[test]
fn every_combination_of_open_vswitchs_own_test_gives_the_same_key() -> Result<()> {
    ensure!(judge_all(&combinations())? == BTreeMap::from([(Verdict::Same, 240)]));
    Ok(())
}

#[test]
fn frames_of_every_kind_whole_cut_and_damaged_give_the_same_key() -> Result<()> {
    let frames = random_frames(20_000);
    let verdicts = judge_all(&frames)?;
    println!("{verdicts:?}");
    let count = |verdict| verdicts.get(&verdict).copied().unwrap_or(0);
    // The exceptions are all met, and remain exceptions.
    for verdict in [Verdict::IpLength, Verdict::TcpOffset, Verdict::SnapControl, Verdict::LeftToHost] {
        ensure!(count(verdict) > 0, "there is no {verdict:?}");
    }
    ensure!(count(Verdict::Same) * 10 > frames.len() * 7, "{verdicts:?}");
    Ok(())
}

#[test]
fn a_wrong_key_would_be_noticed() -> Result<()> {
    let frame = &combinations()[0];
    let flow = &flows(std::slice::from_ref(frame))?[0];
    ensure!(judge(frame, flow)? == Verdict::Same);
    for (right, wrong) in [
        ("tp_src=6667", "tp_src=6666"),
        ("nw_tos=44", "nw_tos=40"),
        ("tcp", "udp"),
        ("vlan_tci=0x0000", "dl_vlan=5"),
    ] {
        ensure!(flow.contains(right), "{flow}");
        ensure!(judge(frame, &flow.replacen(right, wrong, 1)).is_err(), "{wrong} is not noticed");
    }
    Ok(())
}
