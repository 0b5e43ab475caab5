//! The control socket of ovs-vswitchd (`lib/unixctl.c`, what `ovs-appctl` speaks to), and the flows of the userspace
//! datapath, which it alone can show.

use super::jsonrpc::{Closer, Connection, DEFAULT_RUN_DIR, Remote, RpcError};
use super::source::{FlowSource, Sighting, SourceError, Unreadable};
use memchr::memmem::Finder;
use serde_json::{Value, json};
use std::hash::{BuildHasher, RandomState};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;
use switch_core::action::{Action, SetGroup};
use switch_core::flow::{FlowSpec, Match, PortNames, Ufid};
use switch_core::key::{ETH_P_802_2, FRAG_LATER, Field};
use switch_core::odp::parse_dump_line;
use switch_core::packet::PortId;

/// How long to connect, and to be answered. ovs-vswitchd answers between two rounds of its main loop.
const ANSWER: Duration = Duration::from_secs(5);
/// Bytes of the longest answer: some hundred thousand flows.
const ANSWER_LIMIT: usize = 512 << 20;
/// The datapath of all bridges with `datapath_type=netdev`.
pub const DATAPATH: &str = "netdev@ovs-netdev";
/// How often flows are read at most. A change of OVS's policy takes effect here as soon as it is read.
const SWEEP: Duration = Duration::from_millis(100);

/// The directory of ovs-vswitchd's PID file and control socket: that of the database's socket, or OVS's usual one.
pub fn run_dir(database: &Remote) -> PathBuf {
    match database {
        Remote::Unix(path) => path.parent().unwrap_or(Path::new("/")).to_owned(),
        Remote::Tcp(_) => PathBuf::from(DEFAULT_RUN_DIR),
    }
}

/// Why a command has no answer: one line.
#[derive(Debug, thiserror::Error)]
pub enum UnixctlError {
    /// There is no PID file, or it holds no PID.
    #[error("ovs-vswitchd is not running: {}: {}", .0.display(), .1)]
    NoPid(PathBuf, String),
    /// The daemon cannot be asked, or refuses.
    #[error(transparent)]
    Rpc(#[from] RpcError),
}

/// The control socket of ovs-vswitchd. Each command has a connection of its own, so that a restart of the daemon, which
/// changes the socket's name, is no matter.
#[derive(Clone, Debug)]
pub struct Unixctl {
    run_dir: PathBuf,
}

/// A line of `upcall/show`: the flows that OVS has put into a datapath.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct FlowUsage {
    /// The datapath, such as `system@ovs-system`.
    pub datapath: String,
    /// How many there are.
    pub current: u64,
    /// How many there may be now; revalidators lower it when they are slow.
    pub limit: u64,
}

impl Unixctl {
    /// The daemon with PID file and socket in `run_dir` ([`run_dir`]). Nothing is asked yet.
    pub fn new(run_dir: PathBuf) -> Unixctl {
        Unixctl { run_dir }
    }

    /// The socket of the daemon that runs now.
    pub fn socket(&self) -> Result<PathBuf, UnixctlError> {
        let file = self.run_dir.join("ovs-vswitchd.pid");
        let pid = std::fs::read_to_string(&file).map_err(|error| error.to_string());
        let pid = pid.and_then(|text| text.trim().parse::<u32>().map_err(|_| "holds no PID".to_owned()));
        match pid {
            Ok(pid) => Ok(self.run_dir.join(format!("ovs-vswitchd.{pid}.ctl"))),
            Err(reason) => Err(UnixctlError::NoPid(file, reason)),
        }
    }

    /// Carries out a command, as `ovs-appctl COMMAND ARGS…` does, and returns what it prints. Takes 10 s at most.
    pub fn command(&self, command: &str, args: &[&str]) -> Result<String, UnixctlError> {
        self.command_until(&Ending::default(), command, args)
    }

    /// As [`Unixctl::command`], until the end is wanted.
    pub(super) fn command_until(
        &self,
        ending: &Ending,
        command: &str,
        args: &[&str],
    ) -> Result<String, UnixctlError> {
        let remote = Remote::Unix(self.socket()?);
        let mut connection = Connection::connect(&remote, ANSWER, ANSWER_LIMIT)?;
        {
            let mut end = ending.lock();
            if end.wanted {
                return Err(RpcError::Closed(remote).into());
            }
            end.connection = Some(connection.closer());
        }
        let answer = connection.call(command, json!(args), ANSWER, &mut |_| {});
        // It is what keeps the connection open.
        ending.lock().connection = None;
        match answer? {
            Value::String(text) => Ok(text),
            _ => Err(connection.malformed("the answer to a command is no text").into()),
        }
    }

    /// How many flows each datapath has and may have.
    pub fn flow_usage(&self) -> Result<Vec<FlowUsage>, UnixctlError> {
        Ok(parse_usage(&self.command("upcall/show", &[])?))
    }
}

/// Reads `upcall/show` (`upcall_unixctl_show` in `ofproto/ofproto-dpif-upcall.c`): a datapath's name and a colon without
/// indentation, and below it `flows : (current N) (avg N) (max N) (limit N)`.
fn parse_usage(text: &str) -> Vec<FlowUsage> {
    let mut datapath = "";
    let mut all = Vec::new();
    for line in text.lines() {
        if !line.starts_with(' ') {
            datapath = line.trim_end_matches(':');
        }
        let Some((name, counts)) = line.split_once(':') else { continue };
        let count = |word: &str| {
            let (_, rest) = counts.split_once(&format!("({word} "))?;
            rest.split_once(')')?.0.parse().ok()
        };
        if name.trim() == "flows"
            && let (Some(current), Some(limit)) = (count("current"), count("limit"))
        {
            all.push(FlowUsage { datapath: datapath.to_owned(), current, limit });
        }
    }
    all
}

/// How commands that wait for ovs-vswitchd are ended.
#[derive(Default)]
pub(super) struct Ending(Mutex<End>);

#[derive(Default)]
struct End {
    wanted: bool,
    connection: Option<Closer>,
}

impl Ending {
    fn lock(&self) -> MutexGuard<'_, End> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Ends the command that waits, and all that follow at once.
    pub(super) fn end(&self) {
        let mut end = self.lock();
        end.wanted = true;
        if let Some(connection) = end.connection.take() {
            connection.close();
        }
    }
}

/// The flows of the userspace datapath. It tells nothing by itself, so they are read again and again.
pub struct UnixctlSource {
    unixctl: Unixctl,
    /// Two hashes make the identity of a flow without UFID.
    hashes: [RandomState; 2],
    marks: Marks,
    ending: Arc<Ending>,
}

/// What the parts of a line are found by.
struct Marks {
    port: Finder<'static>,
    statistics: Finder<'static>,
    actions: Finder<'static>,
}

impl Default for Marks {
    fn default() -> Marks {
        let [port, statistics, actions] = ["in_port(", ", packets:", " actions:"].map(Finder::new);
        Marks { port, statistics, actions }
    }
}

/// What is before the mark, and behind it.
fn split<'a>(text: &'a str, mark: &Finder) -> Option<(&'a str, &'a str)> {
    let at = mark.find(text.as_bytes())?;
    Some((text.get(..at)?, text.get(at + mark.needle().len()..)?))
}

impl UnixctlSource {
    /// The userspace datapath of the daemon that `unixctl` reaches.
    pub fn new(unixctl: Unixctl) -> UnixctlSource {
        let hashes = [RandomState::new(), RandomState::new()];
        UnixctlSource { unixctl, hashes, marks: Marks::default(), ending: Arc::default() }
    }

    /// Gives the flow of a line of the dump to `each`, unless it is a heading, or its ingress port is not among `names`.
    fn see(&self, line: &str, names: &dyn PortNames, each: &mut dyn FnMut(Sighting<'_>)) {
        // The ingress port comes first: a flow of others may be as strange as it likes.
        let Some((_, behind)) = split(line, &self.marks.port) else { return };
        if behind.split_once(')').and_then(|(port, _)| names.by_name(port)).is_none() {
            return;
        }
        // Between what the flow matches and what it does stand its statistics, which change.
        let (key, rest) = split(line, &self.marks.statistics).unwrap_or((line, ""));
        let (_, actions) = split(rest, &self.marks.actions).unwrap_or(("", rest));
        let id = ufid(line).unwrap_or_else(|| {
            let [high, low] = self.hashes.each_ref().map(|hash| hash.hash_one(key) as u128);
            Ufid(high << 64 | low)
        });
        each(Sighting {
            id,
            print: Some(self.hashes[0].hash_one((key, actions))),
            read: &|| read(line, names),
        });
    }
}

/// The UFID that a line of a dump begins with.
fn ufid(line: &str) -> Option<Ufid> {
    let (digits, _) = line.strip_prefix("ufid:")?.split_once(',')?;
    let mut value: u128 = 0;
    for (at, byte) in digits.bytes().enumerate() {
        match (at, byte) {
            (8 | 13 | 18 | 23, b'-') => {}
            (8 | 13 | 18 | 23, _) => return None,
            _ => value = value << 4 | (byte as char).to_digit(16)? as u128,
        }
    }
    (digits.len() == 36).then_some(Ufid(value))
}

/// Takes a line of a dump apart.
fn read(line: &str, names: &dyn PortNames) -> Result<FlowSpec, Unreadable> {
    match parse_dump_line(line, names) {
        Ok(mut dumped) => {
            name_802_2(line, &mut dumped.spec.matches);
            name_outer_tos(line, &mut dumped.spec.matches);
            dumped.spec.held = peculiarity(&dumped.spec).map(str::to_owned);
            Ok(dumped.spec)
        }
        Err(error) => Err(Unreadable { text: line.to_owned(), reason: error.message }),
    }
}

/// Behind a tag OVS prints nothing for an 802.2 frame (`encap()`), which in a text is any ethertype. The userspace datapath
/// matches the ethertype in every flow, be it the TPID of a tag that it does not read.
fn name_802_2(line: &str, matches: &mut Match) {
    if line.contains("encap()") && !matches.mask.has(Field::EthType) {
        matches.key.set(Field::EthType, ETH_P_802_2 as u128);
        matches.mask.set_exact(Field::EthType);
    }
}

/// What a flow does that the userspace datapath does otherwise than the kernel's, whose plans we execute:
///
/// * It counts a tag when it looks at lengths and when it cuts packets (`dp_packet_size`).
/// * With the addresses of a later fragment it rewrites where a checksum would be, were it not one
///   (`packet_set_ipv4_addr` in `lib/packets.c`).
///
/// A flow of a tunnel matches the outer type of service in any case, for its congestion marks (`tnl_wc_init` of OVS's
/// `ofproto/tunnel.c`), but one of 0 is not printed (`tun_key_to_attr` of its `lib/odp-util.c`).
fn name_outer_tos(line: &str, matches: &mut Match) {
    let outer = line.split_once("tunnel(").and_then(|(_, rest)| rest.split_once("),recirc_id("));
    if outer.is_some_and(|(outer, _)| !outer.contains("tos=")) {
        matches.mask.set_exact(Field::TunTos);
    }
}

/// A flow always matches whether there is a tag, and the fragment type of IP packets.
fn peculiarity(spec: &FlowSpec) -> Option<&'static str> {
    fn any(actions: &[Action], is: fn(&Action) -> bool) -> bool {
        actions.iter().any(|action| {
            is(action)
                || match action {
                    Action::Clone(actions) | Action::Sample { actions, .. } | Action::DecTtl(actions) => {
                        any(actions, is)
                    }
                    Action::CheckPktLen { greater, less_equal, .. } => {
                        any(greater, is) || any(less_equal, is)
                    }
                    _ => false,
                }
        })
    }
    let has = |is| any(&spec.actions, is);
    let is_tagged =
        spec.matches.key.get(Field::VlanTci) != 0 || has(|action| matches!(action, Action::PushVlan { .. }));
    if is_tagged && has(|action| matches!(action, Action::Trunc(_) | Action::CheckPktLen { .. })) {
        return Some("length of a tagged packet");
    }
    let is_later = spec.matches.key.get(Field::IpFrag) as u8 == FRAG_LATER;
    let readdresses = has(|action| match action {
        Action::Set(SetGroup::Ipv4, sets) => {
            sets.iter().any(|set| matches!(set.field, Field::Ipv4Src | Field::Ipv4Dst))
        }
        _ => false,
    });
    (is_later && readdresses).then_some("address of a later fragment")
}

/// Ports by their names only: OVS prints the number of a port that it does not find, which is no slot of ours.
struct NamesOnly<'a>(&'a dyn PortNames);

impl PortNames for NamesOnly<'_> {
    fn by_name(&self, name: &str) -> Option<PortId> {
        let number = name.bytes().all(|byte| byte.is_ascii_digit());
        if number { None } else { self.0.by_name(name) }
    }

    fn name(&self, slot: u32) -> Option<String> {
        self.0.name(slot)
    }
}

impl FlowSource for UnixctlSource {
    fn describe(&self) -> String {
        let socket = self.unixctl.socket().unwrap_or_else(|_| self.unixctl.run_dir.clone());
        format!("userspace datapath {DATAPATH} by {}", socket.display())
    }

    fn dump(&mut self, names: &dyn PortNames, each: &mut dyn FnMut(Sighting<'_>)) -> Result<(), SourceError> {
        let text = self.unixctl.command_until(&self.ending, "dpctl/dump-flows", &["-m", "--names", DATAPATH]);
        let text = match text {
            Ok(text) => text,
            // The datapath goes with its last bridge, and its flows with it.
            Err(UnixctlError::Rpc(RpcError::Refused(_, why))) if why.contains("datapath not found") => {
                String::new()
            }
            Err(error) => return Err(SourceError(error.to_string())),
        };
        let names = NamesOnly(names);
        text.lines().for_each(|line| self.see(line, &names, each));
        Ok(())
    }

    fn is_exact(&self) -> bool {
        true
    }

    fn dump_ids(&mut self, _: &mut dyn FnMut(Ufid)) -> Result<bool, SourceError> {
        Ok(false)
    }

    fn ender(&self) -> Option<Box<dyn Fn() + Send>> {
        let ending = self.ending.clone();
        Some(Box::new(move || ending.end()))
    }

    fn sweep_interval(&self) -> Duration {
        SWEEP
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ovs::source::DatapathFlow;
    use crate::ovs::testing::{PATIENCE, serve};
    use crate::wake::Waker;
    use std::sync::Arc;
    use std::thread::JoinHandle;
    use std::time::Instant;
    use switch_core::action::PortRef;
    use switch_core::key::Key;
    use switch_core::odp::parse_flow;
    use switch_core::packet::Packet;
    use switch_core::parse::{Extracted, extract};

    /// What ovs-vswitchd 3.1 printed for `dpctl/dump-flows -m --names netdev@ovs-netdev`, with two PMD threads.
    const FLOWS: &str = include_str!("testdata/ovs-3.1-netdev-flows.txt");
    const USAGE: &str = include_str!("testdata/ovs-3.1-upcall-show.txt");

    /// Ports in slots by their place.
    struct Names(&'static [&'static str]);

    impl PortNames for Names {
        fn by_name(&self, name: &str) -> Option<PortId> {
            let slot = self.0.iter().position(|&known| known == name).or_else(|| name.parse().ok())?;
            Some(PortId { slot: slot as u32, generation: 1 })
        }

        fn name(&self, slot: u32) -> Option<String> {
            self.0.get(slot as usize).map(|&name| name.to_owned())
        }
    }

    /// A daemon whose PID is `pid`, which answers one command.
    fn daemon(dir: &Path, pid: u32, answer: Value) -> JoinHandle<Value> {
        std::fs::write(dir.join("ovs-vswitchd.pid"), format!("{pid}\n")).unwrap();
        let (_, server) = serve(&dir.join(format!("ovs-vswitchd.{pid}.ctl")), move |mut peer| {
            let message = peer.next().unwrap();
            let mut reply = answer;
            reply["id"] = message["id"].clone();
            peer.send(reply);
            assert!(peer.next().is_none());
            json!([message["method"], message["params"]])
        });
        server
    }

    fn text(text: &str) -> Value {
        json!({"result": text, "error": null})
    }

    fn dump(text: &str, names: &Names) -> Vec<DatapathFlow> {
        let dir = tempfile::tempdir().unwrap();
        let server = daemon(dir.path(), 7, self::text(text));
        let mut source = UnixctlSource::new(Unixctl::new(dir.path().to_owned()));
        let mut flows = Vec::new();
        source
            .dump(names, &mut |seen| flows.push(DatapathFlow { id: seen.id, flow: (seen.read)() }))
            .unwrap();
        let asked = server.join().unwrap();
        assert_eq!(asked, json!(["dpctl/dump-flows", ["-m", "--names", "netdev@ovs-netdev"]]));
        flows
    }

    #[test]
    fn a_real_dump_is_read() {
        let flows = dump(FLOWS, &Names(&["tap0", "pmd0"]));
        // Four of tap0; the one of pmd0 is in the dumps of two threads; those of tap1 and tap2 are not ours.
        assert_eq!(flows.len(), 6);
        assert_eq!(flows.iter().filter(|flow| *flow == &flows[0]).count(), 2);
        let specs: Vec<&FlowSpec> = flows.iter().map(|flow| flow.flow.as_ref().unwrap()).collect();
        for (flow, spec) in flows.iter().zip(&specs) {
            assert_eq!(spec.ufid, Some(flow.id));
            assert!(spec.matches.mask.is_exact(Field::InPort));
        }
        let pmd = &flows[0];
        assert_eq!(pmd.id.to_string(), "9c6b7d46-c487-4ecb-896f-2ea634f5016c");
        let ours = PortRef::Ours(PortId { slot: 0, generation: 1 });
        let expected = [Action::Output(PortRef::Foreign("br0".into())), Action::Output(ours)];
        assert_eq!(specs[0].actions, expected);
        let vlan = specs[2];
        assert_eq!(vlan.actions.len(), 5, "{:?}", vlan.actions);
        assert_eq!(specs[3].matches.key.get(Field::EthType), 0x0800);
        assert_eq!(dump(FLOWS, &Names(&[])).len(), 0);
        assert_eq!(dump("", &Names(&["tap0"])).len(), 0);
    }

    /// As ovs-vswitchd 3.1 prints it for a tagged spanning tree frame.
    #[test]
    fn a_tag_with_nothing_behind_it_is_of_an_802_2_frame() {
        let line = "ufid:7024bd68-78f3-4f2f-bb60-2b7cae8c9aed, skb_priority(0/0),recirc_id(0),in_port(tap0),\
                    packet_type(ns=0,id=0),eth(src=02:00:00:00:03:01/00:00:00:00:00:00,dst=02:00:00:00:03:02/\
                    00:00:00:00:00:00),eth_type(0x8100),vlan(vid=10,pcp=0/0x0),encap(), packets:0, bytes:0, \
                    used:never, dp:ovs, actions:drop, dp-extra-info:miniflow_bits(4,0)\n";
        let flows = dump(line, &Names(&["tap0", "tap1"]));
        let matches = &flows[0].flow.as_ref().unwrap().matches;
        assert!(matches.mask.is_exact(Field::EthType));
        assert_eq!(matches.key.eth_type(), ETH_P_802_2);
    }

    /// As ovs-vswitchd 3.1 prints it for a frame with two tags, with its `vlan-limit` of 1.
    #[test]
    fn a_second_tag_that_ovs_does_not_read_is_any_with_its_tpid() {
        let line = "ufid:3570a377-8447-4f12-9a9b-eba3b156ee6f, skb_priority(0/0),recirc_id(0),in_port(tap0),\
                    packet_type(ns=0,id=0),eth(src=02:00:00:00:01:01/00:00:00:00:00:00,dst=02:00:00:00:02:01/\
                    00:00:00:00:00:00),eth_type(0x8100),vlan(vid=10,pcp=0/0x0),encap(eth_type(0x8100)), \
                    packets:1, bytes:20, used:0.041s, dp:ovs, actions:tap1, dp-extra-info:miniflow_bits(4,0)\n";
        let flows = dump(line, &Names(&["tap0", "tap1"]));
        let spec = flows[0].flow.as_ref().unwrap();
        assert_eq!(spec.held, None);
        for (tags, meant) in [
            (&[0x8100_000a, 0x8100_0014, 0x0800_4500][..], true),
            (&[0x8100_e00a, 0x8100_f015, 0x0806_0001], true),
            // No Ethernet II frame, and a third tag: both behind what is read.
            (&[0x8100_000a, 0x8100_0014, 0x0040_4242], true),
            (&[0x8100_000a, 0x8100_0014, 0x8100_0001, 0x0800_4500], true),
            (&[0x8100_000b, 0x8100_0014, 0x0800_4500], false),
            (&[0x8100_000a, 0x88a8_0014, 0x0800_4500], false),
            (&[0x8100_000a, 0x0800_4500], false),
            (&[0x8100_000a, 0x0040_4242], false),
            (&[0x0800_4500], false),
        ] {
            let mut frame = vec![2; 12];
            frame.extend(tags.iter().flat_map(|tag: &u32| tag.to_be_bytes()));
            frame.resize(80, 0);
            let mut packet = Packet::from_frame(PortId { slot: 0, generation: 1 }, &frame);
            let mut key = Key::default();
            assert_eq!(extract(&mut packet, &mut key), Extracted::Done);
            assert_eq!(key.matches(&spec.matches.key, &spec.matches.mask), meant, "{tags:08x?}");
        }
    }

    #[test]
    fn what_the_kernel_does_otherwise_is_held() {
        let ip = |frag| format!("eth_type(0x0800),ipv4(src=10.0.0.1,frag={frag})");
        let (first, later) = (&*ip("first"), &*ip("later"));
        let tagged = "eth_type(0x8100),vlan(vid=5,pcp=0),encap(eth_type(0x1234))";
        for (matches, actions, held) in [
            ("eth_type(0x1234)", "trunc(60),tap1", false),
            ("eth_type(0x1234)", "push_vlan(vid=5,pcp=0),tap1", false),
            ("eth_type(0x1234)", "push_vlan(vid=5,pcp=0),trunc(60),tap1", true),
            (
                "eth_type(0x1234)",
                "check_pkt_len(size=60,gt(tap1),le(clone(push_vlan(vid=5,pcp=0),tap1)))",
                true,
            ),
            (tagged, "tap1", false),
            (tagged, "trunc(60),tap1", true),
            (tagged, "clone(trunc(60),tap1),tap1", true),
            (first, "set(ipv4(src=10.0.0.2)),tap1", false),
            (later, "set(ipv4(src=10.0.0.2)),tap1", true),
            (later, "set(ipv4(ttl=3)),tap1", false),
        ] {
            let line = format!(
                "ufid:00000000-0000-0000-0000-000000000001, recirc_id(0),in_port(tap0),{matches}, packets:3, \
                 bytes:9, used:1.5s, dp:ovs, actions:{actions}\n"
            );
            let flows = dump(&line, &Names(&["tap0", "tap1"]));
            assert_eq!(flows[0].flow.as_ref().unwrap().held.is_some(), held, "{matches} {actions}");
        }
    }

    #[test]
    fn a_read_without_an_answer_can_be_ended() {
        let dir = tempfile::tempdir().unwrap();
        std::fs::write(dir.path().join("ovs-vswitchd.pid"), "7\n").unwrap();
        // It listens, takes the connection, and says nothing.
        let silent = std::os::unix::net::UnixListener::bind(dir.path().join("ovs-vswitchd.7.ctl")).unwrap();
        let mut source = UnixctlSource::new(Unixctl::new(dir.path().to_owned()));
        let end = source.ender().unwrap();
        let start = Instant::now();
        let reader = std::thread::spawn(move || {
            let first = source.dump(&Names(&[]), &mut |_| {});
            (first, source.dump(&Names(&[]), &mut |_| {}))
        });
        let accepted = silent.accept().unwrap();
        end();
        let (first, second) = reader.join().unwrap();
        assert!(first.is_err() && second.is_err());
        assert!(start.elapsed() < ANSWER, "{:?}", start.elapsed());
        drop(accepted);
    }

    #[test]
    fn what_is_strange_is_kept_if_it_is_ours() {
        let tail = "packets:3, bytes:9, used:1.5s, dp:ovs, actions:7,tap0";
        let text = format!(
            "ufid:00000000-0000-0000-0000-000000000001, odd(1),in_port(tap0),eth(), {tail}\n\
             ufid:00000000-0000-0000-0000-000000000002, odd(1),in_port(tap9),eth(), {tail}\n\
             recirc_id(0),in_port(tap0),eth(),eth_type(0x0806), {tail}\n\
             recirc_id(0),in_port(1),eth(),eth_type(0x0806), {tail}\n\
             odd(2),in_port(tap0),eth(), {tail}\n\
             not a flow\n"
        );
        let flows = dump(&text, &Names(&["tap0", "tap1"]));
        assert_eq!(flows.len(), 3);
        let odd = flows[0].flow.as_ref().unwrap_err();
        assert_eq!((flows[0].id, odd.text.as_str()), (Ufid(1), text.lines().next().unwrap()));
        assert!(odd.reason.contains("'odd'") && !odd.reason.contains('\n'), "{}", odd.reason);
        let spec = flows[1].flow.as_ref().unwrap();
        // The number of a port of OVS is no slot of ours.
        assert_eq!(spec.actions[0], Action::Output(PortRef::Foreign("7".into())));
        assert_eq!(spec.ufid, None);
        assert!(flows[2].flow.is_err());
    }

    #[test]
    fn statistics_are_no_change() {
        let source = UnixctlSource::new(Unixctl::new(PathBuf::new()));
        let see = |line: &str| {
            let mut seen = None;
            source.see(line, &Names(&["tap0", "tap1"]), &mut |flow| {
                seen = Some((flow.id, flow.print.unwrap()))
            });
            seen.unwrap()
        };
        let ufid = "ufid:00000000-0000-0000-0000-000000000001, ";
        for ufid in ["", ufid] {
            let line = |port: &str, stats: &str, actions: &str| {
                see(&format!(
                    "{ufid}recirc_id(0),in_port({port}),eth(), packets:{stats}, dp:ovs, actions:{actions}"
                ))
            };
            let first = line("tap0", "0, bytes:0, used:never", "drop");
            assert_eq!(line("tap0", "9, bytes:5, used:1.0s, flags:SP.", "drop"), first);
            let other = line("tap0", "0, bytes:0, used:never", "tap1");
            assert!(other.0 == first.0 && other.1 != first.1);
            let other = line("tap1", "0, bytes:0, used:never", "drop");
            assert!((other.0 == first.0) != ufid.is_empty() && other.1 != first.1);
        }
    }

    #[test]
    fn ufids_are_read() {
        let text = "ufid:9c6b7d46-c487-4ecb-896f-2ea634f5016c";
        let (_, whole) = parse_flow(&format!("{text},in_port(tap0)"), &Names(&["tap0"])).unwrap();
        assert_eq!(ufid(&format!("{text}, rest")), whole);
        for wrong in
            ["", "ufid:", "x,", &text[..30], &text.replace('-', "0"), &text.replace('9', "g"), "ufid:é-,"]
        {
            assert_eq!(ufid(&format!("{wrong}, rest")), None, "{wrong}");
        }
    }

    #[test]
    fn each_command_goes_to_the_daemon_that_runs_now() {
        let dir = tempfile::tempdir().unwrap();
        let unixctl = Unixctl::new(dir.path().to_owned());
        let error = unixctl.command("version", &[]).unwrap_err().to_string();
        assert!(
            error.starts_with("ovs-vswitchd is not running: ") && error.contains("No such file"),
            "{error}"
        );
        let server = daemon(dir.path(), 10, text("one"));
        assert_eq!(unixctl.command("version", &[]).unwrap(), "one");
        assert_eq!(server.join().unwrap(), json!(["version", []]));
        let error = unixctl.command("version", &[]).unwrap_err().to_string();
        assert!(error.contains("ovs-vswitchd.10.ctl: cannot connect"), "{error}");
        let server = daemon(dir.path(), 11, json!({"result": null, "error": "no such\ncommand\n"}));
        let error = unixctl.command("x", &["1", "b c"]).unwrap_err().to_string();
        assert!(error.ends_with("11.ctl: no such; command"), "{error}");
        assert_eq!(server.join().unwrap(), json!(["x", ["1", "b c"]]));
        let server = daemon(dir.path(), 12, json!({"result": [1], "error": null}));
        assert!(unixctl.command("x", &[]).unwrap_err().to_string().contains("no text"));
        server.join().unwrap();
        std::fs::write(dir.path().join("ovs-vswitchd.pid"), "pid").unwrap();
        assert!(unixctl.command("x", &[]).unwrap_err().to_string().contains("holds no PID"));
    }

    #[test]
    fn the_use_of_flows_is_read() {
        let usage = |datapath: &str, current, limit| FlowUsage { datapath: datapath.into(), current, limit };
        assert_eq!(parse_usage(USAGE), [usage("netdev@ovs-netdev", 6, 5000)]);
        let two = format!("system@ovs-system:\n  flows : (current 1) (avg 0) (max 9) (limit 10)\n\n{USAGE}");
        assert_eq!(
            parse_usage(&two),
            [usage("system@ovs-system", 1, 10), usage("netdev@ovs-netdev", 6, 5000)]
        );
        assert_eq!(parse_usage("x\n flows: (current\n flows: (current 1) (limit -)\n:\n"), []);
        let dir = tempfile::tempdir().unwrap();
        let server = daemon(dir.path(), 1, text(USAGE));
        assert_eq!(Unixctl::new(dir.path().to_owned()).flow_usage().unwrap().len(), 1);
        assert_eq!(server.join().unwrap(), json!(["upcall/show", []]));
    }

    #[test]
    fn the_run_directory_is_that_of_the_database() {
        let dir = |text: &str| run_dir(&text.parse().unwrap());
        assert_eq!(dir("unix:/a/b/db.sock"), Path::new("/a/b"));
        assert_eq!(dir("unix:db.sock"), Path::new(DEFAULT_RUN_DIR));
        assert_eq!(dir("tcp:127.0.0.1:6640"), Path::new(DEFAULT_RUN_DIR));
    }

    #[test]
    fn waiting_ends_when_rung_and_at_the_timeout() {
        let mut source = UnixctlSource::new(Unixctl::new(PathBuf::new()));
        let waker = Arc::new(Waker::new().unwrap());
        let mut changes = Vec::new();
        let start = Instant::now();
        let mut wait = |timeout| source.wait(&Names(&[]), &waker, timeout, &mut changes).unwrap();
        wait(Duration::from_micros(1500));
        assert!(start.elapsed() >= Duration::from_micros(1500));
        let start = Instant::now();
        waker.ring();
        wait(PATIENCE * 2);
        assert!(start.elapsed() < PATIENCE);
        assert!(changes.is_empty() && !source.dump_ids(&mut |_| {}).unwrap());
        assert_eq!(source.sweep_interval(), SWEEP);
    }
}
