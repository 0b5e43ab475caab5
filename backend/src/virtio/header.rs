//! The virtio-net header (virtio 1.2, 5.1.6), `struct virtio_net_hdr_v1`.

use virtio_bindings::virtio_net as net;

/// What precedes each frame in a virtio-net ring. Offsets and sizes are in bytes from the start of the frame.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct NetHeader {
    /// [`NEEDS_CSUM`](Self::NEEDS_CSUM), [`DATA_VALID`](Self::DATA_VALID).
    pub flags: u8,
    /// One of `GSO_*`, with or without the [`GSO_ECN`](Self::GSO_ECN) bit.
    pub gso_type: u8,
    /// Ethernet, IP and transport header together; a hint.
    pub hdr_len: u16,
    /// Payload bytes of each segment.
    pub gso_size: u16,
    /// Where the checksum begins.
    pub csum_start: u16,
    /// Where, from there, it is stored.
    pub csum_offset: u16,
    /// Chains that the frame takes in a receive ring; set by [`GuestRx`](super::GuestRx).
    pub num_buffers: u16,
}

impl NetHeader {
    /// `flags`: the transport checksum is still to be completed from `csum_start` on.
    pub const NEEDS_CSUM: u8 = net::VIRTIO_NET_HDR_F_NEEDS_CSUM as u8;
    /// `flags`: the transport checksum was verified.
    pub const DATA_VALID: u8 = net::VIRTIO_NET_HDR_F_DATA_VALID as u8;
    /// `gso_type`: one whole frame.
    pub const GSO_NONE: u8 = net::VIRTIO_NET_HDR_GSO_NONE as u8;
    /// `gso_type`: TCP over IPv4.
    pub const GSO_TCPV4: u8 = net::VIRTIO_NET_HDR_GSO_TCPV4 as u8;
    /// `gso_type`: TCP over IPv6.
    pub const GSO_TCPV6: u8 = net::VIRTIO_NET_HDR_GSO_TCPV6 as u8;
    /// `gso_type`: UDP fragmentation offload.
    pub const GSO_UDP: u8 = net::VIRTIO_NET_HDR_GSO_UDP as u8;
    /// `gso_type`: UDP segmentation offload (USO).
    pub const GSO_UDP_L4: u8 = net::VIRTIO_NET_HDR_GSO_UDP_L4 as u8;
    /// A bit in `gso_type`: the TCP segment carries ECN marks.
    pub const GSO_ECN: u8 = net::VIRTIO_NET_HDR_GSO_ECN as u8;

    /// Bytes with `VIRTIO_F_VERSION_1` or `VIRTIO_NET_F_MRG_RXBUF`.
    pub const LEN: usize = 12;
    /// Bytes of a legacy header without `num_buffers`.
    pub const LEGACY_LEN: usize = 10;

    /// Nothing is left to do.
    pub const EMPTY: NetHeader = NetHeader {
        flags: 0,
        gso_type: 0,
        hdr_len: 0,
        gso_size: 0,
        csum_start: 0,
        csum_offset: 0,
        num_buffers: 0,
    };

    /// Reads the wire form, little-endian. A legacy header is passed with two zero bytes at its end.
    #[inline]
    pub fn from_bytes(b: &[u8; Self::LEN]) -> Self {
        let word = |i: usize| u16::from_le_bytes([b[i], b[i + 1]]);
        NetHeader {
            flags: b[0],
            gso_type: b[1],
            hdr_len: word(2),
            gso_size: word(4),
            csum_start: word(6),
            csum_offset: word(8),
            num_buffers: word(10),
        }
    }

    /// The wire form; a legacy header is its first [`LEGACY_LEN`](Self::LEGACY_LEN) bytes.
    #[inline]
    pub fn to_bytes(&self) -> [u8; Self::LEN] {
        let mut b = [0; Self::LEN];
        b[0] = self.flags;
        b[1] = self.gso_type;
        for (i, word) in [self.hdr_len, self.gso_size, self.csum_start, self.csum_offset, self.num_buffers]
            .iter()
            .enumerate()
        {
            b[2 + 2 * i..4 + 2 * i].copy_from_slice(&word.to_le_bytes());
        }
        b
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn wire_form() {
        let h = NetHeader {
            flags: 1,
            gso_type: 0x81,
            hdr_len: 0x0203,
            gso_size: 0x0405,
            csum_start: 0x0607,
            csum_offset: 0x0809,
            num_buffers: 0x0a0b,
        };
        assert_eq!(h.to_bytes(), [1, 0x81, 3, 2, 5, 4, 7, 6, 9, 8, 0xb, 0xa]);
        assert_eq!(NetHeader::from_bytes(&h.to_bytes()), h);
    }
}
