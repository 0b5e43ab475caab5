//! Netlink's bytes: messages, their headers, and attributes (`linux/netlink.h`, `linux/genetlink.h`).
//!
//! Integers are in host order unless a name says otherwise. Nothing here trusts a length.

/// Header of a message: length, type, flags, sequence number, port id.
pub const MESSAGE_HEADER: usize = 16;
/// Generic netlink's header behind it: command, version, reserved.
pub const GENERIC_HEADER: usize = 4;
/// `NLMSG_NOOP`.
pub const NOOP: u16 = 1;
/// `NLMSG_ERROR`: an error, or an acknowledgement if it is 0.
pub const ERROR: u16 = 2;
/// `NLMSG_DONE`: the end of a dump.
pub const DONE: u16 = 3;
/// `NLM_F_REQUEST`.
pub const F_REQUEST: u16 = 0x1;
/// `NLM_F_ACK`.
pub const F_ACK: u16 = 0x4;
/// `NLM_F_DUMP_INTR`: what is dumped has changed meanwhile.
pub const F_DUMP_INTERRUPTED: u16 = 0x10;
/// `NLM_F_DUMP`: everything, one message each.
pub const F_DUMP: u16 = 0x300;

const ATTR_HEADER: usize = 4;
/// The bits of an attribute's type that are flags (`NLA_F_NESTED`, `NLA_F_NET_BYTEORDER`).
const ATTR_FLAGS: u16 = 0xc000;

/// The bytes are not netlink: a length is wrong.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
#[error("malformed netlink message")]
pub struct Malformed;

/// A message and its generic netlink header, if its type has one.
#[derive(Clone, Copy, Debug)]
pub struct Message<'a> {
    /// The family's id, or [`ERROR`] and the like.
    pub kind: u16,
    /// `NLM_F_*`.
    pub flags: u16,
    /// Sequence number: the request's, 0 for events.
    pub sequence: u32,
    /// What is behind the header.
    pub body: &'a [u8],
}

impl<'a> Message<'a> {
    /// Takes the first message of a datagram; none at its end.
    pub fn take(datagram: &mut &'a [u8]) -> Option<Result<Message<'a>, Malformed>> {
        if datagram.is_empty() {
            return None;
        }
        let length = u32_at(datagram, 0).map_or(0, |length| length as usize);
        let taken = if length < MESSAGE_HEADER { None } else { datagram.get(..length) };
        let Some(message) = taken else {
            *datagram = &[];
            return Some(Err(Malformed));
        };
        *datagram = datagram.get(length.next_multiple_of(4)..).unwrap_or_default();
        let header = (u16_at(message, 4), u16_at(message, 6), u32_at(message, 8));
        let (Some(kind), Some(flags), Some(sequence)) = header else { return Some(Err(Malformed)) };
        Some(Ok(Message { kind, flags, sequence, body: &message[MESSAGE_HEADER..] }))
    }

    /// The generic netlink command and what is behind its header.
    pub fn generic(&self) -> Result<(u8, &'a [u8]), Malformed> {
        let rest = self.body.get(GENERIC_HEADER..).ok_or(Malformed)?;
        Ok((self.body[0], rest))
    }

    /// Of an [`ERROR`] or [`DONE`]: the error number, positive; 0 is success.
    pub fn error(&self) -> Result<i32, Malformed> {
        u32_at(self.body, 0).map(|error| (error as i32).wrapping_neg()).ok_or(Malformed)
    }
}

/// An attribute.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Attr<'a> {
    /// Its type, without flags.
    pub kind: u16,
    /// Its payload.
    pub data: &'a [u8],
}

impl<'a> Attr<'a> {
    /// The payload as a list of attributes.
    pub fn nested(&self) -> Attrs<'a> {
        Attrs(self.data)
    }

    /// The payload as a `u16`.
    pub fn u16(&self) -> Result<u16, Malformed> {
        self.data.try_into().map(u16::from_ne_bytes).map_err(|_| Malformed)
    }

    /// The payload as a `be16`.
    pub fn be16(&self) -> Result<u16, Malformed> {
        self.data.try_into().map(u16::from_be_bytes).map_err(|_| Malformed)
    }

    /// The payload as a `u32`.
    pub fn u32(&self) -> Result<u32, Malformed> {
        self.data.try_into().map(u32::from_ne_bytes).map_err(|_| Malformed)
    }

    /// The payload as a `u64`.
    pub fn u64(&self) -> Result<u64, Malformed> {
        self.data.try_into().map(u64::from_ne_bytes).map_err(|_| Malformed)
    }

    /// The payload as text that may end in NUL.
    pub fn text(&self) -> Result<&'a str, Malformed> {
        let end = self.data.iter().position(|&byte| byte == 0).unwrap_or(self.data.len());
        std::str::from_utf8(&self.data[..end]).map_err(|_| Malformed)
    }
}

/// A list of attributes: an iterator, which ends behind the first that is malformed.
#[derive(Clone, Copy, Debug)]
pub struct Attrs<'a>(pub &'a [u8]);

impl<'a> Attrs<'a> {
    /// The first attribute of this type.
    pub fn find(self, kind: u16) -> Result<Option<Attr<'a>>, Malformed> {
        for attr in self {
            match attr? {
                attr if attr.kind == kind => return Ok(Some(attr)),
                _ => {}
            }
        }
        Ok(None)
    }
}

impl<'a> Iterator for Attrs<'a> {
    type Item = Result<Attr<'a>, Malformed>;

    fn next(&mut self) -> Option<Self::Item> {
        if self.0.is_empty() {
            return None;
        }
        let length = u16_at(self.0, 0).map_or(0, |length| length as usize);
        let taken = if length < ATTR_HEADER { None } else { self.0.get(..length) };
        let (Some(attr), Some(kind)) = (taken, u16_at(self.0, 2)) else {
            self.0 = &[];
            return Some(Err(Malformed));
        };
        // The last one may lack its padding.
        self.0 = self.0.get(length.next_multiple_of(4)..).unwrap_or_default();
        Some(Ok(Attr { kind: kind & !ATTR_FLAGS, data: &attr[ATTR_HEADER..] }))
    }
}

/// The `u16` at this offset.
pub fn u16_at(bytes: &[u8], at: usize) -> Option<u16> {
    bytes.get(at..at + 2)?.try_into().ok().map(u16::from_ne_bytes)
}

/// The `u32` at this offset.
pub fn u32_at(bytes: &[u8], at: usize) -> Option<u32> {
    bytes.get(at..at + 4)?.try_into().ok().map(u32::from_ne_bytes)
}

/// A request that is being written.
pub struct Request(Vec<u8>);

impl Request {
    /// A request of `family` with `NLM_F_*` flags, to which the family's own header is added by [`Request::raw`].
    pub fn new(family: u16, command: u8, version: u8, flags: u16) -> Request {
        let mut bytes = vec![0; MESSAGE_HEADER + GENERIC_HEADER];
        bytes[4..6].copy_from_slice(&family.to_ne_bytes());
        bytes[6..8].copy_from_slice(&(flags | F_REQUEST).to_ne_bytes());
        bytes[16] = command;
        bytes[17] = version;
        Request(bytes)
    }

    /// Adds bytes as they are.
    pub fn raw(mut self, bytes: &[u8]) -> Request {
        self.0.extend_from_slice(bytes);
        self
    }

    /// Adds an attribute.
    pub fn attr(mut self, kind: u16, data: &[u8]) -> Request {
        put_attr(&mut self.0, kind, data);
        self
    }

    /// Adds an attribute whose payload is in several parts.
    pub fn attr_in_parts(mut self, kind: u16, parts: &[&[u8]]) -> Request {
        put_parts(&mut self.0, kind, parts);
        self
    }

    /// The message with this sequence number.
    pub fn finish(mut self, sequence: u32) -> Vec<u8> {
        let length = self.0.len() as u32;
        self.0[0..4].copy_from_slice(&length.to_ne_bytes());
        self.0[8..12].copy_from_slice(&sequence.to_ne_bytes());
        self.0
    }
}

/// Appends an attribute and its padding.
pub fn put_attr(bytes: &mut Vec<u8>, kind: u16, data: &[u8]) {
    put_parts(bytes, kind, &[data]);
}

fn put_parts(bytes: &mut Vec<u8>, kind: u16, parts: &[&[u8]]) {
    let length: usize = parts.iter().map(|part| part.len()).sum();
    bytes.reserve(ATTR_HEADER + length.next_multiple_of(4));
    bytes.extend_from_slice(&((ATTR_HEADER + length) as u16).to_ne_bytes());
    bytes.extend_from_slice(&kind.to_ne_bytes());
    parts.iter().for_each(|part| bytes.extend_from_slice(part));
    bytes.resize(bytes.len().next_multiple_of(4), 0);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn attributes_read_back_and_bad_lengths_end_the_list() {
        let mut bytes = Vec::new();
        put_attr(&mut bytes, 7, b"abc");
        put_attr(&mut bytes, 0x8000 | 9, &5u32.to_ne_bytes());
        let attrs: Vec<Attr<'_>> = Attrs(&bytes).map(|attr| attr.unwrap()).collect();
        assert_eq!(attrs, [Attr { kind: 7, data: b"abc" }, Attr { kind: 9, data: &5u32.to_ne_bytes() }]);
        assert_eq!(Attrs(&bytes).find(9).unwrap().unwrap().u32(), Ok(5));
        // An unpadded end is what some senders leave.
        assert!(Attrs(&bytes[..7]).all(|attr| attr.is_ok()));
        for (at, value) in [(0, 3u8), (0, 0), (8, 200), (1, 1)] {
            let mut bad = bytes.clone();
            bad[at] = value;
            assert!(Attrs(&bad).any(|attr| attr == Err(Malformed)), "{at} {value}");
        }
        for cut in 1..bytes.len() {
            assert!(Attrs(&bytes[..cut]).count() <= 2);
        }
    }

    #[test]
    fn messages_come_one_after_another() {
        let mut datagram = Request::new(20, 3, 1, F_DUMP).raw(&[1, 2, 3, 4]).attr(1, b"x").finish(77);
        datagram.extend(Request::new(21, 4, 1, 0).finish(78));
        let mut rest = &datagram[..];
        let first = Message::take(&mut rest).unwrap().unwrap();
        assert_eq!((first.kind, first.flags, first.sequence), (20, F_DUMP | F_REQUEST, 77));
        assert_eq!(first.generic().unwrap().0, 3);
        assert_eq!(Message::take(&mut rest).unwrap().unwrap().kind, 21);
        assert!(Message::take(&mut rest).is_none());
        for cut in 1..datagram.len() {
            let mut rest = &datagram[..cut];
            let mut seen = 0;
            while let Some(message) = Message::take(&mut rest) {
                seen += 1;
                assert!(message.is_ok() || rest.is_empty());
            }
            assert!(seen <= 2);
        }
    }
}
