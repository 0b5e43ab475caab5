//! Feature bits of a virtio-net device, and which of them a Linux driver takes.

use std::fmt;
use std::ops::{BitAnd, BitOr};

use virtio_bindings::{virtio_config as config, virtio_net as net, virtio_ring as ring};

/// A set of virtio feature bits (virtio 1.2, §5.1.3 and §6).
#[derive(Clone, Copy, PartialEq, Eq, Default)]
pub struct Features(pub u64);

impl Features {
    /// Device computes checksums for us (`NEEDS_CSUM` on transmit).
    pub const CSUM: Self = Self::bit(net::VIRTIO_NET_F_CSUM);
    /// We take packets with partial checksums.
    pub const GUEST_CSUM: Self = Self::bit(net::VIRTIO_NET_F_GUEST_CSUM);
    /// Device reports its MTU.
    pub const MTU: Self = Self::bit(net::VIRTIO_NET_F_MTU);
    /// Device gives us a MAC address.
    pub const MAC: Self = Self::bit(net::VIRTIO_NET_F_MAC);
    /// We take TCPv4 segments larger than the MTU.
    pub const GUEST_TSO4: Self = Self::bit(net::VIRTIO_NET_F_GUEST_TSO4);
    /// We take TCPv6 segments larger than the MTU.
    pub const GUEST_TSO6: Self = Self::bit(net::VIRTIO_NET_F_GUEST_TSO6);
    /// We take TSO with ECN.
    pub const GUEST_ECN: Self = Self::bit(net::VIRTIO_NET_F_GUEST_ECN);
    /// We take UDP segmentation over IPv4.
    pub const GUEST_USO4: Self = Self::bit(net::VIRTIO_NET_F_GUEST_USO4);
    /// We take UDP segmentation over IPv6.
    pub const GUEST_USO6: Self = Self::bit(net::VIRTIO_NET_F_GUEST_USO6);
    /// Device takes TCPv4 segments larger than the MTU.
    pub const HOST_TSO4: Self = Self::bit(net::VIRTIO_NET_F_HOST_TSO4);
    /// Device takes TCPv6 segments larger than the MTU.
    pub const HOST_TSO6: Self = Self::bit(net::VIRTIO_NET_F_HOST_TSO6);
    /// Device takes TSO with ECN.
    pub const HOST_ECN: Self = Self::bit(net::VIRTIO_NET_F_HOST_ECN);
    /// Device takes UDP segmentation.
    pub const HOST_USO: Self = Self::bit(net::VIRTIO_NET_F_HOST_USO);
    /// A received packet may span several buffers.
    pub const MRG_RXBUF: Self = Self::bit(net::VIRTIO_NET_F_MRG_RXBUF);
    /// Configuration space has a link status.
    pub const STATUS: Self = Self::bit(net::VIRTIO_NET_F_STATUS);
    /// The driver may be told to announce itself.
    pub const GUEST_ANNOUNCE: Self = Self::bit(net::VIRTIO_NET_F_GUEST_ANNOUNCE);
    /// Several queue pairs.
    pub const MQ: Self = Self::bit(net::VIRTIO_NET_F_MQ);
    /// Control virtqueue. Most VMMs serve it themselves.
    pub const CTRL_VQ: Self = Self::bit(net::VIRTIO_NET_F_CTRL_VQ);
    /// Commands of the control virtqueue about what is received: modes, addresses, VLANs.
    pub const CTRL_FILTERS: Self = Self(
        1 << net::VIRTIO_NET_F_CTRL_RX
            | 1 << net::VIRTIO_NET_F_CTRL_RX_EXTRA
            | 1 << net::VIRTIO_NET_F_CTRL_VLAN
            | 1 << net::VIRTIO_NET_F_CTRL_MAC_ADDR,
    );
    /// Descriptors may point to a table of descriptors.
    pub const INDIRECT_DESC: Self = Self::bit(ring::VIRTIO_RING_F_INDIRECT_DESC);
    /// Notifications are suppressed by index instead of by flag.
    pub const EVENT_IDX: Self = Self::bit(ring::VIRTIO_RING_F_EVENT_IDX);
    /// The backend logs the pages that it writes.
    pub const LOG_ALL: Self = Self::bit(26);
    /// vhost-user's own bit: there are protocol features to negotiate.
    pub const PROTOCOL_FEATURES: Self = Self::bit(30);
    /// Virtio 1.0 and later, as opposed to the legacy interface.
    pub const VERSION_1: Self = Self::bit(config::VIRTIO_F_VERSION_1);
    /// Packed ring layout.
    pub const RING_PACKED: Self = Self::bit(config::VIRTIO_F_RING_PACKED);

    /// What Linux's `virtio_net` acknowledges from a device that offers everything but packed rings.
    pub const LINUX: Self = Self(
        Self::CSUM.0
            | Self::GUEST_CSUM.0
            | Self::MTU.0
            | Self::MAC.0
            | Self::GUEST_TSO4.0
            | Self::GUEST_TSO6.0
            | Self::GUEST_ECN.0
            | Self::GUEST_USO4.0
            | Self::GUEST_USO6.0
            | Self::HOST_TSO4.0
            | Self::HOST_TSO6.0
            | Self::HOST_ECN.0
            | Self::HOST_USO.0
            | Self::MRG_RXBUF.0
            | Self::STATUS.0
            | Self::GUEST_ANNOUNCE.0
            | Self::MQ.0
            | Self::CTRL_VQ.0
            | Self::INDIRECT_DESC.0
            | Self::EVENT_IDX.0
            | Self::VERSION_1.0,
    );

    /// All receive offloads: without them every frame arrives complete and at most MTU-sized.
    pub const GUEST_OFFLOADS: Self = Self(
        Self::GUEST_CSUM.0
            | Self::GUEST_TSO4.0
            | Self::GUEST_TSO6.0
            | Self::GUEST_ECN.0
            | Self::GUEST_USO4.0
            | Self::GUEST_USO6.0,
    );

    const fn bit(number: u32) -> Self {
        Self(1 << number)
    }

    /// Whether every bit of `other` is in this set.
    pub const fn contains(self, other: Self) -> bool {
        self.0 & other.0 == other.0
    }

    /// This set without the bits of `other`.
    pub const fn without(self, other: Self) -> Self {
        Self(self.0 & !other.0)
    }

    /// Drops every bit whose prerequisite is missing (virtio 1.2, §5.1.3.1), as QEMU does for its guests.
    pub fn with_prerequisites(mut self) -> Self {
        let rules = [
            (Self::GUEST_TSO4 | Self::GUEST_TSO6 | Self::GUEST_USO4 | Self::GUEST_USO6, Self::GUEST_CSUM),
            (Self::HOST_TSO4 | Self::HOST_TSO6 | Self::HOST_USO, Self::CSUM),
        ];
        for (dependent, needed) in rules {
            if !self.contains(needed) {
                self = self.without(dependent);
            }
        }
        // These two need any one of a pair.
        if (self & (Self::GUEST_TSO4 | Self::GUEST_TSO6)).0 == 0 {
            self = self.without(Self::GUEST_ECN);
        }
        if (self & (Self::HOST_TSO4 | Self::HOST_TSO6)).0 == 0 {
            self = self.without(Self::HOST_ECN);
        }
        self
    }
}

impl BitOr for Features {
    type Output = Self;
    fn bitor(self, other: Self) -> Self {
        Self(self.0 | other.0)
    }
}

impl BitAnd for Features {
    type Output = Self;
    fn bitand(self, other: Self) -> Self {
        Self(self.0 & other.0)
    }
}

impl fmt::Debug for Features {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Features({:#x})", self.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_missing_prerequisite_takes_its_dependents_along() {
        let features = Features::LINUX.without(Features::GUEST_CSUM).with_prerequisites();
        assert_eq!((features & Features::GUEST_OFFLOADS).0, 0);
        assert!(features.contains(Features::HOST_TSO4 | Features::HOST_ECN | Features::HOST_USO));

        let tso6_only = Features::LINUX.without(Features::HOST_TSO4).with_prerequisites();
        assert!(tso6_only.contains(Features::HOST_ECN), "ECN needs only one of the two");
        assert_eq!(Features::LINUX.with_prerequisites(), Features::LINUX);
    }
}
