//! `OVS_PACKET_CMD_EXECUTE`: a packet that did not come by the kernel is given to the datapath as if it had, at a port.
//!
//! The action is `recirc(0)`: the packet is looked up like any other that comes in. Of the key only the ingress port is sent,
//! the rest the kernel reads from the packet itself.

use super::socket::{Events, Family, NetlinkError, Requests};
use super::wire::{self, Attrs, Malformed, Request, put_attr, u32_at};
use super::{GET, OVS_HEADER, Vport};
use crate::host::Millis;
use std::collections::HashMap;
use std::io;

/// The families and the versions of their messages that are sent (`OVS_*_FAMILY`, `OVS_*_VERSION`).
const PACKET: (&str, u8) = ("ovs_packet", 1);
const VPORT: (&str, u8) = ("ovs_vport", 1);
/// `OVS_PACKET_CMD_EXECUTE`.
const EXECUTE: u8 = 3;
/// `OVS_PACKET_ATTR_*`.
mod packet_attr {
    pub const PACKET: u16 = 1;
    pub const KEY: u16 = 2;
    pub const ACTIONS: u16 = 3;
}
/// `OVS_KEY_ATTR_IN_PORT`.
const IN_PORT: u16 = 3;
/// `OVS_ACTION_ATTR_RECIRC`.
const RECIRC: u16 = 7;
/// `OVS_VPORT_ATTR_NAME`.
const VPORT_NAME: u16 = 3;
/// Longest frame of a message: an attribute's length has 16 bits.
pub const LONGEST: usize = u16::MAX as usize - 4;
/// Room for events of ports. When there are more, all numbers are asked for anew.
const RECEIVE_BUFFER: usize = 64 << 10;
/// Pause before the kernel is asked again that could not be asked at all.
const PAUSE: Millis = 100;

/// Why a packet is not in the datapath.
#[derive(Debug, thiserror::Error)]
pub enum ExecuteError {
    /// The device is no port of a datapath.
    #[error("the device is no port of Open vSwitch's kernel datapath")]
    NoPort,
    /// The kernel cannot be asked, or was not a moment ago.
    #[error("the kernel's datapath cannot be reached")]
    Unreachable,
    /// Longer than [`LONGEST`].
    #[error("the packet is too long")]
    TooLong,
    /// The kernel does not want it.
    #[error(transparent)]
    Failed(#[from] NetlinkError),
}

/// A port in its datapath: the datapath's number, and the port's.
type Place = (u32, u32);

/// Sockets and family numbers, which end with the module.
struct Connection {
    requests: Requests,
    packet: u16,
    vport: u16,
    /// Of ports: what is known of their numbers holds until one comes.
    events: Events,
    places: HashMap<String, Place>,
}

impl Connection {
    fn open() -> Result<Connection, NetlinkError> {
        let mut requests = Requests::open()?;
        let packet: Family = requests.family(PACKET.0)?;
        let vport = requests.family(VPORT.0)?;
        let events = Events::open(&[vport.group], RECEIVE_BUFFER)?;
        Ok(Connection { requests, packet: packet.id, vport: vport.id, events, places: HashMap::new() })
    }

    /// Forgets all numbers if a port has come or gone. Another may have its number by now.
    fn follow_events(&mut self) -> io::Result<()> {
        loop {
            match self.events.receive() {
                Ok(_) => {}
                Err(error) => match error.raw_os_error() {
                    Some(libc::EAGAIN) => return Ok(()),
                    Some(libc::EINTR) => continue,
                    Some(libc::ENOBUFS | libc::EMSGSIZE) => {}
                    _ => return Err(error),
                },
            }
            self.places.clear();
        }
    }

    fn place(&mut self, device: &str) -> Result<Place, ExecuteError> {
        if let Some(&place) = self.places.get(device) {
            return Ok(place);
        }
        let mut name = device.as_bytes().to_vec();
        name.push(0);
        let request = Request::new(self.vport, GET, VPORT.1, wire::F_ACK).raw(&0u32.to_ne_bytes());
        let mut found = None;
        let result = self.requests.call(request.attr(VPORT_NAME, &name), &mut |_, body| {
            let datapath = u32_at(body, 0).ok_or(Malformed)?;
            let vport = Vport::decode(Attrs(body.get(OVS_HEADER..).ok_or(Malformed)?))?;
            found = vport.map(|vport| (datapath, vport.number));
            Ok(())
        });
        match result {
            Err(error) if error.errno() == Some(libc::ENODEV) => return Err(ExecuteError::NoPort),
            result => result?,
        };
        let place = found.ok_or(ExecuteError::NoPort)?;
        self.places.insert(device.to_owned(), place);
        Ok(place)
    }

    fn execute(&mut self, device: &str, head: &[u8], tail: &[u8]) -> Result<(), ExecuteError> {
        self.follow_events().map_err(NetlinkError::from)?;
        let place = self.place(device)?;
        let request = message(self.packet, place, head, tail).ok_or(ExecuteError::TooLong)?;
        match self.requests.call(request, &mut |_, _| Ok(())) {
            Ok(_) => Ok(()),
            Err(error) => {
                self.places.remove(device);
                Err(error.into())
            }
        }
    }
}

/// The message for a frame in two parts; none if it is too long.
fn message(family: u16, (datapath, port): Place, head: &[u8], tail: &[u8]) -> Option<Request> {
    if head.len() + tail.len() > LONGEST {
        return None;
    }
    let (mut key, mut actions) = (Vec::new(), Vec::new());
    put_attr(&mut key, IN_PORT, &port.to_ne_bytes());
    put_attr(&mut actions, RECIRC, &0u32.to_ne_bytes());
    Some(
        Request::new(family, EXECUTE, PACKET.1, wire::F_ACK)
            .raw(&datapath.to_ne_bytes())
            .attr_in_parts(packet_attr::PACKET, &[head, tail])
            .attr(packet_attr::KEY, &key)
            .attr(packet_attr::ACTIONS, &actions),
    )
}

/// The way back into the kernel's datapath.
#[derive(Default)]
pub struct Execute {
    connection: Option<Connection>,
    /// When the kernel may be asked again.
    retry: Millis,
}

impl Execute {
    /// Has the datapath treat a frame, in two parts, as one that has just come in at `device`. It has when this returns.
    ///
    /// # Errors
    /// As [`ExecuteError`] lists.
    pub fn packet(
        &mut self,
        device: &str,
        head: &[u8],
        tail: &[u8],
        now: Millis,
    ) -> Result<(), ExecuteError> {
        let connection = match &mut self.connection {
            Some(connection) => connection,
            None if now < self.retry => return Err(ExecuteError::Unreachable),
            none => match Connection::open() {
                Ok(connection) => none.insert(connection),
                Err(error) => {
                    self.retry = now + PAUSE;
                    return Err(error.into());
                }
            },
        };
        let result = connection.execute(device, head, tail);
        if let Err(ExecuteError::Failed(error)) = &result
            && error.errno() != Some(libc::ENODEV)
        {
            // The module may have been loaded anew: the families have other numbers then.
            self.connection = None;
            self.retry = now + PAUSE;
        }
        result
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_message_has_the_frame_its_port_and_nothing_else() {
        let bytes = message(29, (7, 3), b"head of ", b"a frame").unwrap().finish(5);
        let words: Vec<u8> = [
            &68u32.to_ne_bytes()[..],
            &29u16.to_ne_bytes(),
            &5u16.to_ne_bytes(), // request, to be acknowledged
            &5u32.to_ne_bytes(),
            &0u32.to_ne_bytes(),
            &[3, 1, 0, 0],
            &7u32.to_ne_bytes(),
            &19u16.to_ne_bytes(),
            &1u16.to_ne_bytes(),
            b"head of a frame\0",
            &12u16.to_ne_bytes(),
            &2u16.to_ne_bytes(),
            &8u16.to_ne_bytes(),
            &3u16.to_ne_bytes(),
            &3u32.to_ne_bytes(),
            &12u16.to_ne_bytes(),
            &3u16.to_ne_bytes(),
            &8u16.to_ne_bytes(),
            &7u16.to_ne_bytes(),
            &0u32.to_ne_bytes(),
        ]
        .concat();
        assert_eq!(bytes, words);
        assert!(message(29, (7, 3), &[0; 4], &vec![0; LONGEST - 4]).is_some());
        assert!(message(29, (7, 3), &[0; 4], &vec![0; LONGEST - 3]).is_none());
    }
}
