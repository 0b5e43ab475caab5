//! The kernel's datapath (`openvswitch`) as a source of flows, by generic netlink.
//!
//! The kernel tells every change of one flow to the group `ovs_flow`, so a listener that first dumps and then follows has
//! the table. What it does not tell, and what is done about it: a flush, and the end of a datapath or port, pass over the
//! flows in silence (datapath and port events ask for a [`Change::Resync`], and the sweep finds the rest); a deleted flow is
//! named by its UFID alone; an event carries only what its requester wanted (what is missing is asked for); events are
//! dropped when the socket's buffer is full (`ENOBUFS`, a [`Change::Lost`]).

mod actions;
mod cookie;
pub mod execute;
mod flow;
mod key;
mod layout;
mod ports;
mod socket;
#[cfg(test)]
mod tests;
mod tunnel;
mod wire;

pub use flow::Reader;
pub use ports::{Vport, Vports};
pub use wire::Malformed;

use super::source::{Change, DatapathFlow, FlowSource, Sighting, SourceError};
use crate::wake::Waker;
use flow::{FlowMessage, Found, Lookup, OMIT_ALL, flow_attr};
use ports::Ports;
use socket::{Events, Family, NetlinkError, Requests};
use std::collections::{BTreeMap, HashSet};
use std::hash::RandomState;
use std::time::{Duration, Instant};
use switch_core::flow::{PortNames, Ufid};
use wire::{Attr, Attrs, Message, Request, u32_at};

/// The datapath that OVS makes for all bridges of type `system`.
const DEFAULT_DATAPATH: &str = "ovs-system";
/// Room for events. A burst of a hundred thousand new flows fits.
const RECEIVE_BUFFER: usize = 32 << 20;
/// Datagrams that [`FlowSource::wait`] takes before it gives its caller a turn.
const DATAGRAMS_PER_WAIT: usize = 1024;
/// How often an inconsistent dump of the few ports is tried again.
const PORT_DUMPS: usize = 10;
/// A silent flush is found within two sweeps.
const SWEEP: Duration = Duration::from_millis(1500);

/// The families and the versions that this decoder knows (`OVS_*_FAMILY`, `OVS_*_VERSION`).
const FAMILIES: [(&str, u32); 3] = [("ovs_datapath", 2), ("ovs_vport", 1), ("ovs_flow", 1)];
/// `OVS_*_CMD_NEW`, the same in all three families.
const NEW: u8 = 1;
/// `OVS_*_CMD_DEL`.
const DEL: u8 = 2;
/// `OVS_*_CMD_GET`.
const GET: u8 = 3;
/// `OVS_*_CMD_SET`.
const SET: u8 = 4;
/// Length of `struct ovs_header`.
const OVS_HEADER: usize = 4;
/// `OVS_DP_ATTR_NAME`.
const DP_NAME: u16 = 1;
/// What is not understood of a flow, in a few words.
#[derive(Debug, thiserror::Error)]
enum DecodeError {
    #[error(transparent)]
    Malformed(#[from] Malformed),
    #[error("{0} is not understood")]
    Unknown(String),
}

impl DecodeError {
    fn new(what: impl Into<String>) -> DecodeError {
        DecodeError::Unknown(what.into())
    }

    fn length(name: &str, attr: Attr<'_>) -> DecodeError {
        DecodeError::Unknown(format!("{name} (attribute {}) of {} bytes", attr.kind, attr.data.len()))
    }
}

/// Bytes as hexadecimal digits.
fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

/// The flows of a datapath of the kernel's.
pub struct KernelSource {
    /// The datapath's name.
    datapath: String,
    receive_buffer: usize,
    requests: Requests,
    events: Events,
    /// As in [`FAMILIES`].
    families: [Family; 3],
    /// The datapath's number, which is its device's index; none while there is no such datapath.
    ifindex: Option<u32>,
    vports: Vports,
    /// Flows whose ingress is none of the caller's ports, so that [`FlowSource::dump_ids`] can leave them out.
    left_out: HashSet<Ufid>,
    /// For [`Sighting::print`].
    seed: RandomState,
}

impl KernelSource {
    /// Connects to the kernel, and follows the datapath of this name, by default `ovs-system`. It need not be there yet.
    ///
    /// # Errors
    /// The kernel has no such module, or a version of it that is not known, or does not permit it.
    pub fn open(datapath: Option<&str>) -> Result<KernelSource, SourceError> {
        Self::open_with(datapath, RECEIVE_BUFFER)
    }

    fn open_with(datapath: Option<&str>, receive_buffer: usize) -> Result<KernelSource, SourceError> {
        let mut requests = Requests::open().map_err(|error| denied("netlink", &error.into()))?;
        let families = resolve(&mut requests)?;
        let events = listen(&families, receive_buffer)?;
        let mut source = KernelSource {
            datapath: datapath.unwrap_or(DEFAULT_DATAPATH).to_owned(),
            receive_buffer,
            requests,
            events,
            families,
            ifindex: None,
            vports: Vports::new(),
            left_out: HashSet::new(),
            seed: RandomState::new(),
        };
        source.read_ports()?;
        Ok(source)
    }

    /// The datapath's ports by name: their number in the datapath, and the index of their network device.
    pub fn datapath_ports(&self) -> BTreeMap<String, (u32, u32)> {
        self.vports.values().map(|vport| (vport.name.clone(), (vport.number, vport.ifindex))).collect()
    }

    /// The datapath's ports as the kernel describes them.
    pub fn vports(&self) -> impl Iterator<Item = &Vport> {
        self.vports.values()
    }

    /// A request about our datapath to the family at this place of [`FAMILIES`].
    fn request(&self, family: usize, command: u8, flags: u16, ifindex: u32) -> Request {
        let version = FAMILIES[family].1 as u8;
        Request::new(self.families[family].id, command, version, flags).raw(&ifindex.to_ne_bytes())
    }

    fn failed(&self, what: &str, error: &NetlinkError) -> SourceError {
        denied(&format!("{what} of the kernel's datapath {}", self.datapath), error)
    }

    /// Connects again if the module was loaded anew: the families have other numbers then, and the groups no members.
    fn reconnect(&mut self) -> Result<(), SourceError> {
        let families = resolve(&mut self.requests)?;
        if families != self.families {
            self.events = listen(&families, self.receive_buffer)?;
            self.families = families;
        }
        Ok(())
    }

    /// Looks up the datapath and its ports.
    fn read_ports(&mut self) -> Result<(), SourceError> {
        let mut name = self.datapath.as_bytes().to_vec();
        name.push(0);
        let request = self.request(0, GET, wire::F_ACK, 0).attr(DP_NAME, &name);
        let mut ifindex = None;
        let result = self.requests.call(request, &mut |_, body| {
            ifindex = u32_at(body, 0);
            Ok(())
        });
        match result {
            Ok(_) => {}
            Err(error) if error.errno() == Some(libc::ENODEV) => ifindex = None,
            Err(error) => return Err(self.failed("looking", &error)),
        }
        self.ifindex = ifindex;
        self.vports.clear();
        let Some(ifindex) = ifindex else { return Ok(()) };
        for _ in 0..PORT_DUMPS {
            let request = self.request(1, GET, wire::F_DUMP, ifindex);
            let mut vports = Vports::new();
            let consistent = self.requests.call(request, &mut |_, body| {
                let attrs = body.get(OVS_HEADER..).ok_or(Malformed)?;
                if let Some(vport) = Vport::decode(Attrs(attrs))? {
                    vports.insert(vport.number, vport);
                }
                Ok(())
            });
            match consistent {
                Ok(consistent) => {
                    self.vports = vports;
                    if consistent {
                        break;
                    }
                }
                Err(error) if error.errno() == Some(libc::ENODEV) => {
                    self.ifindex = None;
                    break;
                }
                Err(error) => return Err(self.failed("reading the ports", &error)),
            }
        }
        Ok(())
    }

    /// Asks for one flow in full; none if it is gone.
    fn get(&mut self, lookup: &Lookup, names: &dyn PortNames) -> Option<Found> {
        let ifindex = self.ifindex?;
        let request = self.request(2, GET, wire::F_ACK, ifindex);
        let request = match lookup {
            Lookup::Ufid(ufid) => request.attr(flow_attr::UFID, ufid),
            Lookup::Key(key) => request.attr(flow_attr::KEY, key),
        };
        let ports = Ports::new(&self.vports, names);
        let mut found = None;
        let result = self.requests.call(request, &mut |_, body| {
            let message = FlowMessage::decode(body.get(OVS_HEADER..).ok_or(Malformed)?)?;
            if message.actions.is_some() {
                found = message.to_flow(&ports);
            }
            Ok(())
        });
        result.ok().and(found)
    }

    /// Takes the events that have come.
    fn read_events(&mut self, names: &dyn PortNames, changes: &mut Vec<Change>) -> Result<(), SourceError> {
        for _ in 0..DATAGRAMS_PER_WAIT {
            let datagram = match self.events.receive() {
                // The next one overwrites the buffer, and to take it apart may need a request.
                Ok(datagram) => datagram.to_vec(),
                Err(error) => match error.raw_os_error() {
                    Some(libc::EAGAIN) => return Ok(()),
                    Some(libc::EINTR) => continue,
                    Some(libc::ENOBUFS | libc::EMSGSIZE) => {
                        changes.push(Change::Lost);
                        // All is read anew now, and what is still queued is older: to go through it would take long.
                        self.events = listen(&self.families, self.receive_buffer)?;
                        return Ok(());
                    }
                    _ => return Err(self.failed("following the events", &error.into())),
                },
            };
            let mut rest = &datagram[..];
            while let Some(message) = Message::take(&mut rest) {
                if message.and_then(|message| self.event(message, names, changes)).is_err() {
                    log::warn!(
                        "a malformed event of the kernel's datapath {}: reading all again",
                        self.datapath
                    );
                    resync(changes);
                }
            }
        }
        Ok(())
    }

    /// What an event says about our datapath.
    fn event(
        &mut self,
        message: Message<'_>,
        names: &dyn PortNames,
        changes: &mut Vec<Change>,
    ) -> Result<(), Malformed> {
        let Some(family) = self.families.iter().position(|family| family.id == message.kind) else {
            return Ok(());
        };
        let (command, body) = message.generic()?;
        let ifindex = u32_at(body, 0).ok_or(Malformed)?;
        let attrs = Attrs(&body[OVS_HEADER..]);
        if family == 0 {
            return self.datapath_event(command, ifindex, attrs, changes);
        }
        if self.ifindex != Some(ifindex) || !matches!(command, NEW | SET | DEL) {
            return Ok(());
        }
        if family == 1 {
            if let Some(vport) = Vport::decode(attrs)? {
                match command {
                    DEL => self.vports.remove(&vport.number),
                    _ => self.vports.insert(vport.number, vport),
                };
            }
            resync(changes);
            return Ok(());
        }
        let flow = FlowMessage::decode(attrs.0)?;
        let id = flow.id()?;
        if command == DEL {
            if !self.left_out.remove(&id) {
                changes.push(Change::Delete(id));
            }
            return Ok(());
        }
        // The kernel gives a mask even if all is exact, unless who asked for the change did not want it.
        let complete = flow.key.is_some() && flow.mask.is_some() && flow.actions.is_some();
        let found = match complete {
            true => flow.to_flow(&Ports::new(&self.vports, names)),
            false => self.get(&flow.lookup()?, names),
        };
        match found {
            Some(Found::Flow(flow)) => changes.push(Change::Put(flow)),
            Some(Found::LeftOut(id)) => drop(self.left_out.insert(id)),
            None => {}
        }
        Ok(())
    }

    fn datapath_event(
        &mut self,
        command: u8,
        ifindex: u32,
        attrs: Attrs<'_>,
        changes: &mut Vec<Change>,
    ) -> Result<(), Malformed> {
        let named = match attrs.find(DP_NAME)? {
            Some(name) => name.text()? == self.datapath,
            None => false,
        };
        if !matches!(command, NEW | SET | DEL) || !named && self.ifindex != Some(ifindex) {
            return Ok(());
        }
        if command == DEL {
            self.ifindex = None;
            self.vports.clear();
        } else {
            self.ifindex = Some(ifindex);
        }
        resync(changes);
        Ok(())
    }
}

impl FlowSource for KernelSource {
    fn describe(&self) -> String {
        format!("kernel datapath {}", self.datapath)
    }

    fn dump(&mut self, names: &dyn PortNames, each: &mut dyn FnMut(Sighting<'_>)) -> Result<(), SourceError> {
        self.reconnect()?;
        self.read_ports()?;
        self.left_out.clear();
        let Some(ifindex) = self.ifindex else { return Ok(()) };
        let request = self.request(2, GET, wire::F_DUMP, ifindex);
        let mut reader = Reader::new(&self.vports, names, &self.seed, &mut self.left_out);
        let result = self.requests.call(request, &mut |_, body| reader.take(body, each));
        let cut = reader.cut;
        match result {
            Ok(_) => {}
            // It has just gone; its event is on the way.
            Err(error) if error.errno() == Some(libc::ENODEV) => return Ok(()),
            Err(error) => return Err(self.failed("reading the flows", &error)),
        }
        for lookup in cut {
            match self.get(&lookup, names) {
                Some(Found::Flow(flow)) => {
                    let DatapathFlow { id, flow } = *flow;
                    each(Sighting { id, print: None, read: &|| flow.clone() });
                }
                Some(Found::LeftOut(id)) => drop(self.left_out.insert(id)),
                None => {}
            }
        }
        Ok(())
    }

    /// Flows that the last [`FlowSource::dump`] or an event left out are left out here too.
    fn dump_ids(&mut self, each: &mut dyn FnMut(Ufid)) -> Result<bool, SourceError> {
        // Without a datapath the module may go and be loaded anew, and no event would tell: a full read connects again.
        let Some(ifindex) = self.ifindex else { return Ok(false) };
        let request = self.request(2, GET, wire::F_DUMP, ifindex);
        let request = request.attr(flow_attr::UFID_FLAGS, &OMIT_ALL.to_ne_bytes());
        let mut still_left_out = HashSet::new();
        let left_out = &self.left_out;
        let result = self.requests.call(request, &mut |_, body| {
            let id = Reader::id(body)?;
            match left_out.contains(&id) {
                true => drop(still_left_out.insert(id)),
                false => each(id),
            }
            Ok(())
        });
        match result {
            Ok(_) => self.left_out = still_left_out,
            Err(error) if error.errno() == Some(libc::ENODEV) => {}
            Err(error) => return Err(self.failed("reading the flows", &error)),
        }
        Ok(true)
    }

    fn sweep_interval(&self) -> Duration {
        SWEEP
    }

    fn wait(
        &mut self,
        names: &dyn PortNames,
        waker: &Waker,
        timeout: Duration,
        changes: &mut Vec<Change>,
    ) -> Result<(), SourceError> {
        let end = Instant::now() + timeout;
        let before = changes.len();
        loop {
            self.read_events(names, changes)?;
            let left = end.saturating_duration_since(Instant::now());
            if changes.len() > before || left.is_zero() {
                return Ok(());
            }
            // Rounded up, so as not to spin through the last millisecond.
            if !waker.sleep_on(self.events.as_raw_fd(), left.as_millis() as u64 + 1) {
                return Ok(());
            }
        }
    }
}

/// Asks for a resync, once in a row.
fn resync(changes: &mut Vec<Change>) {
    if changes.last() != Some(&Change::Resync) {
        changes.push(Change::Resync);
    }
}

/// Looks up the families and checks their versions.
fn resolve(requests: &mut Requests) -> Result<[Family; 3], SourceError> {
    let mut families = [Family::default(); 3];
    for (family, (name, version)) in families.iter_mut().zip(FAMILIES) {
        *family = requests.family(name).map_err(|error| match error.errno() {
            Some(libc::ENOENT) => SourceError(
                "the kernel has no openvswitch module (modprobe openvswitch; a bridge with datapath_type=netdev needs none), \
                 or OVS runs in another network namespace"
                    .into(),
            ),
            _ => denied(&format!("the netlink family {name}"), &error),
        })?;
        if family.version != version || family.group == 0 {
            return Err(SourceError(format!(
                "the kernel's netlink family {name} has version {}, and only {version} is known",
                family.version
            )));
        }
    }
    Ok(families)
}

fn listen(families: &[Family; 3], receive_buffer: usize) -> Result<Events, SourceError> {
    let groups = families.map(|family| family.group);
    Events::open(&groups, receive_buffer).map_err(|error| denied("the events of openvswitch", &error.into()))
}

/// The error of a request, with what is missing if it was not permitted.
fn denied(what: &str, error: &NetlinkError) -> SourceError {
    match error.errno() {
        Some(libc::EPERM | libc::EACCES) => {
            SourceError(format!("{what}: not permitted; the capability CAP_NET_ADMIN is needed"))
        }
        Some(libc::EAGAIN) => SourceError(format!("{what}: the kernel does not answer")),
        _ => SourceError(format!("{what}: {error}")),
    }
}
