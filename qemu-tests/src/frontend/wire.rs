//! Messages that the `vhost` crate's endpoint does not send, byte by byte.

use std::io::{self, Read, Write};
use std::os::unix::net::UnixStream;

use vhost::vhost_user::message::FrontendReq;

use super::{Error, Result};

/// The version of the protocol, in a header's flags.
const VERSION: u32 = 1;
/// In a header's flags: an answer is wanted (`REPLY_ACK`).
const NEED_REPLY: u32 = 1 << 3;
/// In the number of a ring: the message has no descriptor (vhost-user protocol, "A vring index for file descriptors").
const NO_DESCRIPTOR: u64 = 1 << 8;

/// A message without descriptors, of request number `request`, be there such a request or not.
pub fn message(request: u32, payload: &[u8]) -> Vec<u8> {
    with_flags(request, VERSION, payload)
}

fn with_flags(request: u32, flags: u32, payload: &[u8]) -> Vec<u8> {
    let header = [request, flags, payload.len() as u32].map(u32::to_ne_bytes);
    [header.as_flattened(), payload].concat()
}

/// Sends a message whose answer is a 64-bit number.
fn ask(mut socket: &UnixStream, message: &[u8]) -> io::Result<u64> {
    socket.write_all(message)?;
    // A header and the number.
    let mut answer = [0; 20];
    socket.read_exact(&mut answer)?;
    let [.., a, b, c, d, e, f, g, h] = answer;
    Ok(u64::from_ne_bytes([a, b, c, d, e, f, g, h]))
}

/// The queue pairs that the backend says it has. The endpoint cannot ask: it takes the answer for a number of rings, and
/// refuses to use more.
pub(super) fn max_queue_pairs(socket: &UnixStream) -> Result<u64> {
    ask(socket, &message(FrontendReq::GET_QUEUE_NUM.into(), &[]))
        .map_err(Error::io("ask for the number of queues"))
}

/// Gives ring `ring` no descriptor: `request` is `SET_VRING_KICK` or `SET_VRING_CALL`. `acked`: the backend says whether it is
/// content.
pub(super) fn take_descriptor(
    mut socket: &UnixStream,
    request: FrontendReq,
    ring: usize,
    acked: bool,
) -> Result<()> {
    let payload = (ring as u64 | NO_DESCRIPTOR).to_ne_bytes();
    let outcome = match acked {
        true => ask(socket, &with_flags(request.into(), VERSION | NEED_REPLY, &payload)),
        false => socket.write_all(&message(request.into(), &payload)).map(|()| 0),
    };
    match outcome.map_err(Error::io("give a ring no descriptor"))? {
        0 => Ok(()),
        _ => Err(Error::Lacks("rings without a descriptor".into())),
    }
}
