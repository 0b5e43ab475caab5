//! Generic netlink by hand, as far as the facts need it (Linux, include/uapi/linux/{netlink,genetlink,openvswitch}.h).
//!
//! Deliberately independent of the daemon's own codec.

use std::io::ErrorKind;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use netlink_sys::constants::NETLINK_GENERIC;
use netlink_sys::{Socket, SocketAddr};
use qemu_tests::host::wait_for;

/// Longer than the kernel ever takes to answer.
const ANSWER: Duration = Duration::from_secs(10);

const NLMSG_ERROR: u16 = 2;
const NLMSG_DONE: u16 = 3;
const REQUEST: u16 = 1;
const ACK: u16 = 4;
/// Request flag: all there are.
const DUMP: u16 = 0x300;

/// Operations, the same numbers in the families of datapaths, ports and flows.
pub mod cmd {
    pub const NEW: u8 = 1;
    pub const DEL: u8 = 2;
    pub const GET: u8 = 3;
    pub const SET: u8 = 4;
    /// Of the packet family: apply actions to a packet.
    pub const EXECUTE: u8 = 3;
}

/// Attributes of flows (`enum ovs_flow_attr`).
pub mod flow {
    pub const KEY: u16 = 1;
    pub const ACTIONS: u16 = 2;
    pub const STATS: u16 = 3;
    pub const USED: u16 = 5;
    pub const MASK: u16 = 7;
    pub const UFID: u16 = 9;
}

/// Fields of a key (`enum ovs_key_attr`).
pub mod key {
    pub const ENCAP: u16 = 1;
    pub const IN_PORT: u16 = 3;
    pub const ETHERNET: u16 = 4;
    pub const VLAN: u16 = 5;
    pub const ETHERTYPE: u16 = 6;
    pub const RECIRC_ID: u16 = 20;
}

/// Attributes of packets (`enum ovs_packet_attr`).
pub mod packet {
    pub const PACKET: u16 = 1;
    pub const KEY: u16 = 2;
    pub const ACTIONS: u16 = 3;
}

/// Attributes of ports (`enum ovs_vport_attr`).
pub mod vport {
    pub const PORT_NO: u16 = 1;
    pub const NAME: u16 = 3;
}

/// Actions (`enum ovs_action_attr`).
pub mod action {
    pub const OUTPUT: u16 = 1;
    pub const RECIRC: u16 = 7;
    pub const CT: u16 = 12;
}

/// A sequence of attributes.
#[derive(Clone, Default, PartialEq, Eq)]
pub struct Attrs(pub Vec<u8>);

impl Attrs {
    /// With one more.
    pub fn with(mut self, kind: u16, value: &[u8]) -> Self {
        self.0.extend((value.len() as u16 + 4).to_ne_bytes());
        self.0.extend(kind.to_ne_bytes());
        self.0.extend(value);
        self.0.resize(self.0.len().next_multiple_of(4), 0);
        self
    }

    /// With a number more.
    pub fn with_u32(self, kind: u16, value: u32) -> Self {
        self.with(kind, &value.to_ne_bytes())
    }

    /// Each with its type, as far as they are whole. The flags for nesting and byte order are taken off the type.
    pub fn iter(&self) -> impl Iterator<Item = (u16, &[u8])> {
        let mut rest = &self.0[..];
        std::iter::from_fn(move || {
            let (head, _) = rest.split_first_chunk::<4>()?;
            let len = usize::from(u16::from_ne_bytes([head[0], head[1]]));
            let kind = u16::from_ne_bytes([head[2], head[3]]) & 0x3fff;
            let value = rest.get(4..len)?;
            rest = rest.get(len.next_multiple_of(4)..).unwrap_or_default();
            Some((kind, value))
        })
    }

    /// The value of the first of that type.
    pub fn get(&self, kind: u16) -> Option<&[u8]> {
        self.iter().find(|(found, _)| *found == kind).map(|(_, value)| value)
    }

    /// The attributes inside the first of that type.
    pub fn nested(&self, kind: u16) -> Option<Self> {
        self.get(kind).map(|value| Self(value.to_vec()))
    }

    /// The number in the first of that type.
    pub fn u32(&self, kind: u16) -> Option<u32> {
        self.get(kind)?.first_chunk().map(|bytes| u32::from_ne_bytes(*bytes))
    }

    /// The types there are, in order.
    pub fn kinds(&self) -> Vec<u16> {
        self.iter().map(|(kind, _)| kind).collect()
    }
}

impl std::fmt::Debug for Attrs {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_map().entries(self.iter().map(|(kind, value)| (kind, Hex(value)))).finish()
    }
}

struct Hex<'a>(&'a [u8]);

impl std::fmt::Debug for Hex<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        self.0.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
    }
}

/// A message of one of Open vSwitch's families.
#[derive(Debug, Clone)]
pub struct Message {
    /// The family's number.
    pub family: u16,
    /// What it says, of [`cmd`].
    pub cmd: u8,
    /// When it was read.
    pub at: Instant,
    /// All that stands behind `struct ovs_header`.
    pub attrs: Attrs,
}

impl Message {
    /// The flow's unique identifier.
    pub fn ufid(&self) -> Option<&[u8]> {
        self.attrs.get(flow::UFID)
    }

    /// The flow's key.
    pub fn key(&self) -> Attrs {
        self.attrs.nested(flow::KEY).unwrap_or_default()
    }

    /// The flow's mask.
    pub fn mask(&self) -> Attrs {
        self.attrs.nested(flow::MASK).unwrap_or_default()
    }

    /// The flow's actions.
    pub fn actions(&self) -> Attrs {
        self.attrs.nested(flow::ACTIONS).unwrap_or_default()
    }

    /// Packets and bytes; absent attributes say that there were none (`ovs_flow_cmd_fill_stats`).
    pub fn stats(&self) -> (u64, u64) {
        let Some(stats) = self.attrs.get(flow::STATS) else { return (0, 0) };
        let number =
            |at: usize| stats.get(at..at + 8).and_then(|b| b.try_into().ok()).map_or(0, u64::from_ne_bytes);
        (number(0), number(8))
    }

    /// Which ports its packets come from, and in which stage of recirculation they are.
    pub fn ingress(&self) -> (Option<u32>, u32) {
        let key = self.key();
        (key.u32(key::IN_PORT), key.u32(key::RECIRC_ID).unwrap_or(0))
    }

    /// The ports in its plain output actions.
    pub fn outputs(&self) -> Vec<u32> {
        let actions = self.actions();
        let number = |value: &[u8]| value.first_chunk().map(|bytes| u32::from_ne_bytes(*bytes));
        actions
            .iter()
            .filter(|(kind, _)| *kind == action::OUTPUT)
            .filter_map(|(_, value)| number(value))
            .collect()
    }
}

/// One of Open vSwitch's generic netlink families.
#[derive(Debug, Clone, Copy)]
pub struct Family {
    /// Its number, which this boot of the kernel gave it.
    pub id: u16,
    /// Its multicast group, if it has one.
    group: Option<u32>,
}

/// A socket for requests, with the families resolved.
pub struct Netlink {
    socket: Socket,
    sequence: u32,
    /// The interface that stands for the one datapath of all system bridges.
    pub datapath: u32,
    pub datapaths: Family,
    pub vports: Family,
    pub flows: Family,
    pub packets: Family,
}

impl Netlink {
    /// Opens the socket and resolves the families; the datapath must be there.
    pub fn new() -> Result<Self> {
        let unknown = Family { id: 0, group: None };
        let mut netlink = Self {
            socket: open()?,
            sequence: 0,
            datapath: 0,
            datapaths: unknown,
            vports: unknown,
            flows: unknown,
            packets: unknown,
        };
        netlink.datapaths = netlink.family("ovs_datapath")?;
        netlink.vports = netlink.family("ovs_vport")?;
        netlink.flows = netlink.family("ovs_flow")?;
        netlink.packets = netlink.family("ovs_packet")?;
        let index = std::fs::read_to_string("/sys/class/net/ovs-system/ifindex").context("no datapath")?;
        netlink.datapath = index.trim().parse()?;
        Ok(netlink)
    }

    /// `CTRL_CMD_GETFAMILY` of the controller.
    fn family(&mut self, name: &str) -> Result<Family> {
        let attrs = Attrs::default().with(2, format!("{name}\0").as_bytes());
        let answer = self.exchange(16, 3, 0, &attrs.0)?;
        let attrs = Attrs(answer.into_iter().next().context("no answer")?.1);
        let id = attrs.get(1).and_then(|id| id.first_chunk()).context("a family has a number")?;
        // CTRL_ATTR_MCAST_GROUPS: a list, of which each has name (1) and number (2).
        let groups = attrs.nested(7).unwrap_or_default();
        let group = groups.iter().find_map(|(_, group)| Attrs(group.to_vec()).u32(2));
        Ok(Family { id: u16::from_ne_bytes(*id), group })
    }

    /// Sends a request about the datapath and returns what answers it.
    ///
    /// # Errors
    /// With the kernel's error as an [`std::io::Error`] in the chain.
    pub fn request(&mut self, family: Family, cmd: u8, attrs: &Attrs) -> Result<Vec<Message>> {
        self.request_with(family, cmd, 0, attrs)
    }

    fn request_with(&mut self, family: Family, cmd: u8, flags: u16, attrs: &Attrs) -> Result<Vec<Message>> {
        let mut body = self.datapath.to_ne_bytes().to_vec();
        body.extend(&attrs.0);
        let answers = self.exchange(family.id, cmd, flags, &body)?;
        Ok(answers.into_iter().filter_map(|(cmd, body)| message(family.id, cmd, &body)).collect())
    }

    /// All flows of the datapath.
    pub fn dump_flows(&mut self) -> Result<Vec<Message>> {
        self.request_with(self.flows, cmd::GET, DUMP, &Attrs::default())
    }

    /// The flow with that identifier, if it is there.
    pub fn flow(&mut self, ufid: &[u8]) -> Result<Option<Message>> {
        match self.request(self.flows, cmd::GET, &Attrs::default().with(flow::UFID, ufid)) {
            Ok(answers) => Ok(answers.into_iter().next()),
            Err(error) if errno(&error) == Some(libc::ENOENT) => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// The number of the port called `name`, if the datapath has it.
    pub fn port(&mut self, name: &str) -> Result<Option<u32>> {
        let attrs = Attrs::default().with(vport::NAME, format!("{name}\0").as_bytes());
        match self.request(self.vports, cmd::GET, &attrs) {
            Ok(answers) => Ok(answers.first().and_then(|answer| answer.attrs.u32(vport::PORT_NO))),
            Err(error) if errno(&error) == Some(libc::ENODEV) => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// Has the kernel apply `actions` to `frame` with these metadata.
    pub fn execute(&mut self, frame: &[u8], key: &Attrs, actions: &Attrs) -> Result<()> {
        let attrs = Attrs::default()
            .with(packet::PACKET, frame)
            .with(packet::KEY, &key.0)
            .with(packet::ACTIONS, &actions.0);
        self.request(self.packets, cmd::EXECUTE, &attrs).map(drop)
    }

    fn exchange(&mut self, family: u16, cmd: u8, flags: u16, body: &[u8]) -> Result<Vec<(u8, Vec<u8>)>> {
        self.sequence += 1;
        let mut bytes = (20 + body.len() as u32).to_ne_bytes().to_vec();
        bytes.extend(family.to_ne_bytes());
        bytes.extend((REQUEST | ACK | flags).to_ne_bytes());
        bytes.extend(self.sequence.to_ne_bytes());
        // The kernel fills in the sender. Version 1 is that of the controller and of every family but datapaths.
        bytes.extend([0; 4]);
        bytes.extend([cmd, 1, 0, 0]);
        bytes.extend(body);
        self.socket.send(&bytes, 0)?;
        let mut answers = Vec::new();
        let deadline = Instant::now() + ANSWER;
        loop {
            ensure!(Instant::now() < deadline, "no answer from netlink");
            for (header, payload) in receive(&self.socket)? {
                if header.sequence != self.sequence {
                    continue;
                }
                match header.kind {
                    NLMSG_DONE => return Ok(answers),
                    NLMSG_ERROR => {
                        let code = payload.first_chunk().map_or(0, |code| i32::from_ne_bytes(*code));
                        if code == 0 {
                            return Ok(answers);
                        }
                        return Err(std::io::Error::from_raw_os_error(-code).into());
                    }
                    _ => answers.push((*payload.first().context("short")?, payload[4..].to_vec())),
                }
            }
        }
    }
}

/// The kernel's error in a failed request.
pub fn errno(error: &anyhow::Error) -> Option<i32> {
    error.downcast_ref::<std::io::Error>()?.raw_os_error()
}

/// A socket that hears all events of datapaths, ports and flows.
pub struct Listener {
    socket: Socket,
    families: [Family; 3],
    /// What has come so far.
    pub events: Vec<Message>,
}

impl Listener {
    /// Joins the three groups.
    pub fn new(netlink: &Netlink) -> Result<Self> {
        let families = [netlink.datapaths, netlink.vports, netlink.flows];
        let socket = open()?;
        for family in families {
            socket.add_membership(family.group.context("a family without a group")?)?;
        }
        Ok(Self { socket, families, events: Vec::new() })
    }

    /// Takes in all that has come.
    pub fn read(&mut self) -> Result<()> {
        loop {
            let messages = receive(&self.socket)?;
            if messages.is_empty() {
                return Ok(());
            }
            for (header, payload) in messages {
                ensure!(self.families.iter().any(|family| family.id == header.kind), "unexpected {header:?}");
                let Some((head, body)) = payload.split_first_chunk::<4>() else { bail!("short") };
                self.events.extend(message(header.kind, head[0], body));
            }
        }
    }

    /// Goes on taking in what comes for `time`.
    pub fn read_for(&mut self, time: Duration) -> Result<()> {
        let end = Instant::now() + time;
        while Instant::now() < end {
            self.read()?;
        }
        Ok(())
    }

    /// Waits for an event that `wanted` recognises, among those that have been read already too.
    pub fn wait(
        &mut self,
        what: &str,
        deadline: Duration,
        wanted: impl Fn(&Message) -> bool,
    ) -> Result<Message> {
        wait_for(what, deadline, || {
            self.read()?;
            Ok(self.events.iter().find(|event| wanted(event)).cloned())
        })
        .with_context(|| format!("events so far: {:#?}", self.events))
    }

    /// Forgets what has come.
    pub fn clear(&mut self) -> Result<()> {
        self.read()?;
        self.events.clear();
        Ok(())
    }
}

/// What a message says of itself.
#[derive(Debug)]
pub struct Header {
    /// Its type, or the family that it belongs to.
    pub kind: u16,
    sequence: u32,
}

fn open() -> Result<Socket> {
    let mut socket = Socket::new(NETLINK_GENERIC)?;
    socket.bind_auto()?;
    socket.connect(&SocketAddr::new(0, 0))?;
    socket.set_non_blocking(true)?;
    socket.set_rx_buf_sz(8 << 20)?;
    Ok(socket)
}

/// The messages of one datagram, none if nothing has come yet.
pub fn receive(socket: &Socket) -> Result<Vec<(Header, Vec<u8>)>> {
    let datagram = match socket.recv_from_full() {
        Ok((datagram, _)) => datagram,
        Err(error) if error.kind() == ErrorKind::WouldBlock => {
            std::thread::sleep(Duration::from_millis(1));
            return Ok(Vec::new());
        }
        Err(error) => return Err(error.into()),
    };
    let mut rest = &datagram[..];
    let mut messages = Vec::new();
    while let Some((head, _)) = rest.split_first_chunk::<16>() {
        let len = u32::from_ne_bytes([head[0], head[1], head[2], head[3]]) as usize;
        let payload = rest.get(16..len).context("a message longer than its datagram")?;
        let kind = u16::from_ne_bytes([head[4], head[5]]);
        let sequence = u32::from_ne_bytes([head[8], head[9], head[10], head[11]]);
        messages.push((Header { kind, sequence }, payload.to_vec()));
        rest = rest.get(len.next_multiple_of(4)..).unwrap_or_default();
    }
    Ok(messages)
}

/// What stands behind the generic netlink header: `struct ovs_header` and attributes.
fn message(family: u16, cmd: u8, body: &[u8]) -> Option<Message> {
    let attrs = Attrs(body.get(4..)?.to_vec());
    Some(Message { family, cmd, at: Instant::now(), attrs })
}
