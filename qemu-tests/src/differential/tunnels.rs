//! Cases with tunnels: the first lane has the guests and a tunnel's port, the second is the underlay, whose first port is the
//! uplink.
//!
//! They are made of the cases of [`generate`]: some of their flows look at packets out of the tunnel, some of their outputs go into
//! it, and some of their packets come by the uplink, in the tunnel's header. What is wrong with a header is left to other
//! tests: Open vSwitch gives such packets to the kernel, which answers some and not others.

use std::time::Duration;

use anyhow::{Context, Result, ensure};

use super::offloads::Load;
use super::{Case, PORTS, Side, bridge, generate};
use crate::host::wait_for;
use crate::overlay::{Envelope, Kind, Site, text};
use crate::ovs::Ovs;
use crate::random::Random;

/// Lanes that such cases take.
pub const LANES: usize = 2;
/// The uplink, counted from 0 over all lanes.
const UPLINK: usize = PORTS;
/// The number of the tunnel's port on the bridge of the first lane.
const TUNNEL: usize = PORTS + 4;
/// Our end of the tunnels and the other one.
const ENDS: [Site; 2] = [Site(1), Site(2)];
/// Virtual networks.
const VNIS: [u32; 3] = [42, 43, 0x12_3456];
/// GENEVE's options that the bridge knows: class 0x102, types 1 and 2, of 4 and 8 bytes.
const OPTIONS: &str = "{class=0x102,type=1,len=4}->tun_metadata0,{class=0x102,type=2,len=8}->tun_metadata1";
/// Values of the first option.
const VALUES: [u32; 2] = [0x1122_3344, 0x1122_0000];
/// Source ports of encapsulated packets (RFC 7348 §5).
const SOURCES: std::ops::RangeFrom<u16> = 32_768..;
const DEADLINE: Duration = Duration::from_secs(20);

/// How the tunnel's port is configured beside its kind.
const SETTINGS: [&[&str]; 4] = [
    &[],
    &["options:tos=inherit", "options:ttl=inherit"],
    &["options:csum=true", "options:df_default=false"],
    &["options:tos=0x28", "options:ttl=9"],
];

/// The number of ways in which a tunnel's port can be configured.
pub const CONFIGURATIONS: usize = Kind::ALL.len() * SETTINGS.len();

/// A side of two lanes with a tunnel.
pub struct Tunnelled<S>(pub S);

impl<S: Side> Tunnelled<S> {
    /// Gives the side its underlay.
    ///
    /// # Errors
    /// If Open vSwitch or the kernel refuses.
    pub fn new(side: S) -> Result<Self> {
        let (ovs, underlay) = (side.ovs(), bridge(1));
        let [here, _] = ENDS;
        let address = format!("other-config:hwaddr={}", text(here.mac()));
        ovs.vsctl(&["set", "bridge", &underlay, &address])?;
        ovs.namespace().ip(&["addr", "add", &format!("{}/24", here.v4()), "dev", &underlay])?;
        // Flows that use it keep it from being changed.
        ovs.ofctl(&["add-tlv-map", &bridge(0), OPTIONS])?;
        Ok(Self(side))
    }

    /// Gives the first lane a tunnel of this configuration, in place of any before.
    ///
    /// # Errors
    /// If Open vSwitch refuses.
    pub fn configure(&self, configuration: usize) -> Result<()> {
        let (kind, settings) = of(configuration);
        let (ovs, guests, underlay) = (self.0.ovs(), bridge(0), bridge(1));
        ovs.vsctl(&["--if-exists", "del-port", &guests, "tun0"])?;
        let (kind, number) = (format!("type={kind}"), format!("ofport_request={TUNNEL}"));
        let port = ["add-port", &guests, "tun0", "--", "set", "interface", "tun0", &kind, &number];
        ovs.vsctl(&[&port[..], &["options:remote_ip=flow", "options:key=flow"], settings].concat())?;
        let [_, there] = ENDS;
        let (ip, mac) = (there.v4().to_string(), text(there.mac()));
        // As if it had answered; the underlay's address has to be known first.
        wait_for("the underlay's address", DEADLINE, || {
            let addresses = ovs.appctl(&["ovs/route/show"])?;
            Ok(addresses.contains(&ENDS[0].v4().to_string()).then_some(()))
        })?;
        ovs.appctl(&["tnl/arp/set", &underlay, &ip, &mac])?;
        wait_for("the tunnel's port", DEADLINE, || {
            let ports = ovs.appctl(&["tnl/ports/show"])?;
            Ok(ports.contains("ref_cnt").then_some(()))
        })
    }
}

/// Kind and settings of a configuration.
fn of(configuration: usize) -> (Kind, &'static [&'static str]) {
    let kinds = Kind::ALL.len();
    (Kind::ALL[configuration % kinds], SETTINGS[configuration / kinds % SETTINGS.len()])
}

/// The sum of 16-bit words in one's complement; of what has its checksum in it, 0xffff.
fn sum(parts: &[&[u8]]) -> u32 {
    let word = |pair: &[u8]| u32::from(pair[0]) << 8 | u32::from(*pair.get(1).unwrap_or(&0));
    let mut sum = parts.iter().flat_map(|part| part.chunks(2)).map(word).sum::<u32>();
    while sum > 0xffff {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    sum
}

/// Makes equal what may differ in a packet that leaves by the uplink, if it is as it should be: the identification of an outer
/// packet, its UDP source port, which is from a hash that is each switch's own, and the checksums over them.
fn level(frame: &mut [u8]) -> Result<()> {
    let Some([0x08, 0, 0x45, ..]) = frame.get(12..) else { return Ok(()) };
    let is_udp = frame[23] == 17 && matches!(frame.get(36..38), Some([0x12, 0xb5] | [0x17, 0xc1]));
    if !is_udp && frame[23] != 47 {
        return Ok(());
    }
    ensure!(sum(&[&frame[14..34]]) == 0xffff, "the outer header's checksum is wrong");
    frame[18..20].fill(0);
    frame[24..26].fill(0);
    if is_udp {
        let source = u16::from_be_bytes([frame[34], frame[35]]);
        ensure!(SOURCES.contains(&source), "source port {source}");
        if frame[40..42] != [0; 2] {
            let end = 34 + usize::from(u16::from_be_bytes([frame[38], frame[39]]));
            let udp = frame.get(34..end).context("a UDP length beyond the end")?;
            let is_right = sum(&[&frame[26..34], &[0, 17], &frame[38..40], udp]) == 0xffff;
            ensure!(is_right, "the outer checksum is wrong");
            frame[40..42].fill(0xff);
        }
        frame[34..36].fill(0);
    }
    Ok(())
}

impl<S: Side> Side for Tunnelled<S> {
    fn name(&self) -> &'static str {
        self.0.name()
    }

    fn lanes(&self) -> usize {
        LANES
    }

    fn ovs(&self) -> &Ovs {
        self.0.ovs()
    }

    fn inject(&mut self, port: usize, frame: &[u8], load: Load) -> Result<()> {
        self.0.inject(port, frame, load)
    }

    fn drain(&mut self, patience: Duration) -> Result<Vec<(usize, Vec<u8>)>> {
        let mut frames = self.0.drain(patience)?;
        for (_, frame) in frames.iter_mut().filter(|(port, _)| *port == UPLINK) {
            level(frame).with_context(|| format!("{frame:02x?}"))?;
        }
        Ok(frames)
    }

    fn settle(&mut self) -> Result<()> {
        self.0.settle()
    }

    fn observe(&mut self, round: usize) -> Result<()> {
        self.0.observe(round)
    }

    fn conclude(&mut self) -> Result<String> {
        self.0.conclude()
    }
}

/// What the second lane does: all that comes by the uplink is for the node itself, and all that is the node's leaves by it.
pub fn underlay() -> Case {
    let flows = ["priority=9,in_port=1,actions=LOCAL", "priority=9,in_port=LOCAL,actions=output:1"];
    Case {
        vlan_limit: 1,
        ports: vec![Default::default(); PORTS],
        flows: flows.map(|flow| format!("table=0,{flow}")).into(),
        burst: 1,
        ..Case::default()
    }
}

/// The first case from `seed` on that is fit for tunnels, and the seed after it.
pub fn case(configuration: usize, seed: u64) -> (Case, u64) {
    let (kind, _) = of(configuration);
    let (seed, mut case) = (seed..)
        .map(|seed| (seed, generate::case(seed)))
        .find(|(_, case)| !case.learns && case.vlan_limit == 1)
        .expect("there is a fit case among all");
    let mut random = Random::new(seed ^ 0x7c5_9a31);
    for flows in std::iter::once(&mut case.flows).chain(&mut case.later) {
        for flow in flows {
            *flow = with_tunnels(&mut random, kind, flow);
        }
    }
    case.burst = 1;
    // Checksums and segments that are left to others are so for guests only.
    if case.load == Load::Whole {
        for (port, frame) in &mut case.packets {
            if random.chance(50) {
                (*port, *frame) = (UPLINK, wrapped(&mut random, kind, frame));
            }
        }
    }
    (case, seed + 1)
}

/// A flow that looks at tunnels or goes into one, if chance wants it.
fn with_tunnels(random: &mut Random, kind: Kind, flow: &str) -> String {
    let Some((matches, actions)) = flow.split_once("actions=") else { return flow.into() };
    let mut words: Vec<String> = matches.split(',').map(str::to_owned).collect();
    if random.chance(50) {
        words.retain(|word| !word.starts_with("in_port="));
        let vni = random.pick(&VNIS);
        let value = random.pick(&VALUES);
        let more = match random.below(6) {
            0 => format!("in_port={TUNNEL},tun_id={vni:#x}"),
            1 => format!("in_port={TUNNEL},tun_id={:#x}/0xff", vni & 0xff),
            2 => format!("in_port={TUNNEL},tun_src={}", ENDS[1].v4()),
            3 if kind == Kind::Geneve => format!("in_port={TUNNEL},tun_metadata0={value:#x}"),
            4 if kind == Kind::Geneve => format!("in_port={TUNNEL},tun_metadata0={value:#x}/0xffff0000"),
            _ => format!("in_port={TUNNEL}"),
        };
        // The last word is what is before `actions=`: nothing.
        words.insert(words.len() - 1, more);
    }
    let mut out = String::new();
    let mut rest = actions;
    while let Some(at) = rest.find("output:").filter(|_| !actions.contains("write_actions")) {
        let (before, behind) = rest.split_at(at);
        let behind = &behind["output:".len()..];
        out += before;
        let is_port = behind.starts_with(|c: char| c.is_ascii_digit());
        if is_port && random.chance(40) {
            out +=
                &format!("set_field:{:#x}->tun_id,set_field:{}->tun_dst,", random.pick(&VNIS), ENDS[1].v4());
            if kind == Kind::Geneve && random.chance(50) {
                out += &format!("set_field:{:#x}->tun_metadata0,", random.pick(&VALUES));
            }
            out += &format!("output:{TUNNEL}");
            rest = behind.trim_start_matches(|c: char| c.is_ascii_digit());
        } else {
            out += "output:";
            rest = behind;
        }
    }
    format!("{}actions={out}{rest}", words.join(","))
}

/// A packet as it comes from the other end.
fn wrapped(random: &mut Random, kind: Kind, inner: &[u8]) -> Vec<u8> {
    let [here, there] = ENDS;
    let envelope = Envelope { vni: random.pick(&VNIS), ..Envelope::between(kind, there, here) };
    let mut header = kind.header(envelope.vni);
    if kind == Kind::Geneve && random.chance(50) {
        header[0] = 2;
        header.extend([0x01, 0x02, 0x01, 1]);
        header.extend(random.pick(&VALUES).to_be_bytes());
    }
    let mut frame = envelope.wrap_as(&header, inner, 40_000 + random.below(3) as u16);
    let tos = random.pick(&[0u8, 0, 1, 2, 3, 0xb8]);
    let ttl = random.pick(&[64, 64, 2]);
    (frame[15], frame[22]) = (tos, ttl);
    frame[24..26].fill(0);
    let checksum = !sum(&[&frame[14..34]]) as u16;
    frame[24..26].copy_from_slice(&checksum.to_be_bytes());
    frame
}
