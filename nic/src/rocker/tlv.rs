//! Type, length, value: how messages to and from the switch are made.
//!
//! A header is 8 bytes: 32 bits of type, 16 bits of length (the header's own 8 bytes included), 16 bits unused. What
//! follows is filled up to a multiple of 8. A nested value is a list of the same kind.

const HEADER: usize = 8;

/// A message that is being written.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub(super) struct Writer(Vec<u8>);

impl Writer {
    /// A value of any length up to 65527 bytes.
    pub fn bytes(&mut self, kind: u32, value: &[u8]) -> &mut Self {
        debug_assert!(value.len() <= usize::from(u16::MAX) - HEADER);
        self.0.extend_from_slice(&kind.to_le_bytes());
        self.0.extend_from_slice(&((HEADER + value.len()) as u16).to_le_bytes());
        self.0.extend_from_slice(&[0; 2]);
        self.0.extend_from_slice(value);
        self.0.resize(self.0.len().next_multiple_of(8), 0);
        self
    }

    /// 8 bits.
    pub fn u8(&mut self, kind: u32, value: u8) -> &mut Self {
        self.bytes(kind, &[value])
    }

    /// 16 bits, little-endian.
    pub fn u16(&mut self, kind: u32, value: u16) -> &mut Self {
        self.bytes(kind, &value.to_le_bytes())
    }

    /// 16 bits in network order.
    pub fn be16(&mut self, kind: u32, value: u16) -> &mut Self {
        self.bytes(kind, &value.to_be_bytes())
    }

    /// 32 bits, little-endian.
    pub fn u32(&mut self, kind: u32, value: u32) -> &mut Self {
        self.bytes(kind, &value.to_le_bytes())
    }

    /// 64 bits, little-endian.
    pub fn u64(&mut self, kind: u32, value: u64) -> &mut Self {
        self.bytes(kind, &value.to_le_bytes())
    }

    /// The low 48 bits as a MAC address.
    pub fn mac(&mut self, kind: u32, value: u64) -> &mut Self {
        let bytes = value.to_be_bytes();
        self.bytes(kind, &bytes[2..])
    }

    /// A list.
    pub fn nest(&mut self, kind: u32, fill: impl FnOnce(&mut Writer)) -> &mut Self {
        let mut inner = Writer::default();
        fill(&mut inner);
        self.bytes(kind, &inner.0)
    }

    /// The message.
    pub fn finish(self) -> Vec<u8> {
        self.0
    }
}

/// A message from the device is cut short, or lies about a length.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) struct Malformed;

/// One value of a message.
#[derive(Clone, Copy, Debug)]
pub(super) struct Value<'m>(pub &'m [u8]);

impl Value<'_> {
    /// The value as a little-endian number of exactly `N` bytes.
    fn exact<const N: usize>(self) -> Result<[u8; N], Malformed> {
        self.0.try_into().map_err(|_| Malformed)
    }

    /// 16 bits, little-endian.
    pub fn u16(self) -> Result<u16, Malformed> {
        self.exact().map(u16::from_le_bytes)
    }

    /// 32 bits, little-endian.
    pub fn u32(self) -> Result<u32, Malformed> {
        self.exact().map(u32::from_le_bytes)
    }

    /// A MAC address.
    pub fn mac(self) -> Result<[u8; 6], Malformed> {
        self.exact()
    }
}

/// The values of a message, which is in private memory already.
#[derive(Clone, Copy, Debug)]
pub(super) struct Message<'m>(pub &'m [u8]);

impl<'m> Message<'m> {
    /// The first value of a type. All of the message up to it must make sense.
    pub fn find(self, kind: u32) -> Result<Option<Value<'m>>, Malformed> {
        let mut rest = self.0;
        while !rest.is_empty() {
            let (header, _) = rest.split_first_chunk::<HEADER>().ok_or(Malformed)?;
            let [a, b, c, d, e, f, _, _] = *header;
            let len = usize::from(u16::from_le_bytes([e, f]));
            let value = rest.get(HEADER..len).ok_or(Malformed)?;
            if u32::from_le_bytes([a, b, c, d]) == kind {
                return Ok(Some(Value(value)));
            }
            rest = rest.get(len.next_multiple_of(8)..).unwrap_or_default();
        }
        Ok(None)
    }

    /// The first value of a type that must be there.
    pub fn get(self, kind: u32) -> Result<Value<'m>, Malformed> {
        self.find(kind)?.ok_or(Malformed)
    }

    /// A list that must be there.
    pub fn nested(self, kind: u32) -> Result<Message<'m>, Malformed> {
        Ok(Message(self.get(kind)?.0))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn what_is_written_is_read() {
        let mut writer = Writer::default();
        writer.u8(9, 1).be16(2, 0x8100).nest(3, |inner| {
            inner.u32(1, 7).mac(2, 0x0200_0000_0001);
        });
        let message = writer.finish();
        assert_eq!(message.len(), 16 + 16 + 8 + 16 + 16);
        assert_eq!(&message[..10], [9, 0, 0, 0, 9, 0, 0, 0, 1, 0]);
        let message = Message(&message);
        assert_eq!(message.get(2).unwrap().0, [0x81, 0x00]);
        let inner = message.nested(3).unwrap();
        assert_eq!(inner.get(1).unwrap().u32(), Ok(7));
        assert_eq!(inner.get(2).unwrap().mac(), Ok([2, 0, 0, 0, 0, 1]));
        assert!(inner.find(5).unwrap().is_none());
        assert_eq!(inner.get(1).unwrap().u16(), Err(Malformed), "another width");
    }

    proptest! {
        #[test]
        fn no_message_harms(bytes in prop::collection::vec(any::<u8>(), 0..64), kind in 0u32..4) {
            if let Ok(Some(value)) = Message(&bytes).find(kind) {
                prop_assert!(value.0.len() < bytes.len());
                let _ = (value.u16(), value.u32(), value.mac());
            }
        }
    }
}
