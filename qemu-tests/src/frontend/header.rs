//! `struct virtio_net_hdr_v1` (virtio 1.2, §5.1.6), which stands before every frame in a ring.

use virtio_bindings::virtio_net as net;

/// Offload information of one frame. Written in 12 bytes, or in 10 (without `num_buffers`) by a legacy driver that has
/// neither `VERSION_1` nor `MRG_RXBUF`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct NetHeader {
    /// `NEEDS_CSUM`, `DATA_VALID`.
    pub flags: u8,
    /// `GSO_NONE`, `GSO_TCPV4`, …, with `GSO_ECN` or'ed in.
    pub gso_type: u8,
    /// Bytes of all headers up to the payload that is segmented.
    pub hdr_len: u16,
    /// Payload bytes of each segment.
    pub gso_size: u16,
    /// Where summing starts, from the start of the frame.
    pub csum_start: u16,
    /// Where the sum goes, from `csum_start`.
    pub csum_offset: u16,
    /// Receive only: how many buffers the frame spans.
    pub num_buffers: u16,
}

impl NetHeader {
    /// The checksum from `csum_start` on is left to the receiver.
    pub const NEEDS_CSUM: u8 = net::VIRTIO_NET_HDR_F_NEEDS_CSUM as u8;
    /// The checksum has been verified.
    pub const DATA_VALID: u8 = net::VIRTIO_NET_HDR_F_DATA_VALID as u8;
    /// Not segmented.
    pub const GSO_NONE: u8 = net::VIRTIO_NET_HDR_GSO_NONE as u8;
    /// TCP over IPv4.
    pub const GSO_TCPV4: u8 = net::VIRTIO_NET_HDR_GSO_TCPV4 as u8;
    /// TCP over IPv6.
    pub const GSO_TCPV6: u8 = net::VIRTIO_NET_HDR_GSO_TCPV6 as u8;
    /// UDP over either, each segment a datagram (USO).
    pub const GSO_UDP_L4: u8 = net::VIRTIO_NET_HDR_GSO_UDP_L4 as u8;
    /// Modifier: the TCP segment has CWR set.
    pub const GSO_ECN: u8 = net::VIRTIO_NET_HDR_GSO_ECN as u8;
    /// Size of the header with `num_buffers`.
    pub const LEN: usize = 12;
    /// Size of the header of a legacy driver without mergeable buffers.
    pub const LEGACY_LEN: usize = 10;

    /// The header in ring byte order; take the first [`Self::LEGACY_LEN`] bytes for the short form.
    pub fn to_bytes(self) -> [u8; Self::LEN] {
        let mut bytes = [0; Self::LEN];
        bytes[0] = self.flags;
        bytes[1] = self.gso_type;
        let words = [self.hdr_len, self.gso_size, self.csum_start, self.csum_offset, self.num_buffers];
        for (at, word) in bytes[2..].chunks_exact_mut(2).zip(words) {
            at.copy_from_slice(&word.to_le_bytes());
        }
        bytes
    }

    /// The inverse of [`Self::to_bytes`].
    pub fn from_bytes(bytes: [u8; Self::LEN]) -> Self {
        let word = |at: usize| u16::from_le_bytes([bytes[at], bytes[at + 1]]);
        Self {
            flags: bytes[0],
            gso_type: bytes[1],
            hdr_len: word(2),
            gso_size: word(4),
            csum_start: word(6),
            csum_offset: word(8),
            num_buffers: word(10),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn fields_stand_where_virtio_puts_them() {
        let header = NetHeader {
            flags: 1,
            gso_type: 4,
            hdr_len: 0x1122,
            gso_size: 0x3344,
            csum_start: 0x5566,
            csum_offset: 0x7788,
            num_buffers: 0x99aa,
        };
        let bytes = header.to_bytes();
        assert_eq!(bytes, [1, 4, 0x22, 0x11, 0x44, 0x33, 0x66, 0x55, 0x88, 0x77, 0xaa, 0x99]);
        assert_eq!(NetHeader::from_bytes(bytes), header);
    }
}
