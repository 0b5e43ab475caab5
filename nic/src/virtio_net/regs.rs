//! Numbers of virtio over PCI and of its network device (virtio 1.2, §4.1, §5.1 and §6).

/// Vendor id: Red Hat's, for virtio.
pub const VENDOR: u16 = 0x1af4;
/// Device id of a network device without the legacy interface.
pub const DEVICE: u16 = 0x1041;

/// PCI capabilities of virtio: offsets in one.
pub mod cap {
    /// 8 bits: length of the capability.
    pub const LEN: u16 = 2;
    /// 8 bits: what it describes.
    pub const TYPE: u16 = 3;
    /// 8 bits: BAR.
    pub const BAR: u16 = 4;
    /// 32 bits: offset in the BAR.
    pub const OFFSET: u16 = 8;
    /// 32 bits: length in the BAR.
    pub const LENGTH: u16 = 12;
    /// 32 bits, of [`NOTIFY`]: bytes between the doorbells of queues.
    pub const MULTIPLIER: u16 = 16;

    /// Type: common configuration.
    pub const COMMON: u8 = 1;
    /// Type: doorbells.
    pub const NOTIFY: u8 = 2;
    /// Type: configuration of this kind of device.
    pub const DEVICE: u8 = 4;
}

/// Common configuration.
pub mod common {
    /// 32 bits: which half of the device's features is read.
    pub const DEVICE_FEATURE_SELECT: u64 = 0x00;
    /// 32 bits: features that the device offers.
    pub const DEVICE_FEATURE: u64 = 0x04;
    /// 32 bits: which half of the driver's features is written.
    pub const DRIVER_FEATURE_SELECT: u64 = 0x08;
    /// 32 bits: features that the driver takes.
    pub const DRIVER_FEATURE: u64 = 0x0c;
    /// 16 bits: vector of changes of the configuration.
    pub const CONFIG_VECTOR: u64 = 0x10;
    /// 16 bits: number of queues.
    pub const QUEUES: u64 = 0x12;
    /// 8 bits: see [`super::status`].
    pub const STATUS: u64 = 0x14;
    /// 8 bits: changes with the configuration.
    pub const GENERATION: u64 = 0x15;
    /// 16 bits: the queue that the rest is about.
    pub const QUEUE_SELECT: u64 = 0x16;
    /// 16 bits: slots.
    pub const QUEUE_SIZE: u64 = 0x18;
    /// 16 bits: vector.
    pub const QUEUE_VECTOR: u64 = 0x1a;
    /// 16 bits: 1 gives the queue to the device.
    pub const QUEUE_ENABLE: u64 = 0x1c;
    /// 16 bits: number of its doorbell.
    pub const QUEUE_NOTIFY: u64 = 0x1e;
    /// 64 bits, written in halves: descriptors.
    pub const QUEUE_DESCRIPTORS: u64 = 0x20;
    /// 64 bits: what is available.
    pub const QUEUE_AVAILABLE: u64 = 0x28;
    /// 64 bits: what is used.
    pub const QUEUE_USED: u64 = 0x30;
    /// Bytes of all that.
    pub const LEN: u64 = 0x38;
}

/// Device status.
pub mod status {
    /// A driver has noticed the device.
    pub const ACKNOWLEDGE: u8 = 1;
    /// It can drive it.
    pub const DRIVER: u8 = 2;
    /// It does.
    pub const DRIVER_OK: u8 = 4;
    /// Features are agreed upon.
    pub const FEATURES_OK: u8 = 8;
    /// The device has met an error that it cannot recover from.
    pub const NEEDS_RESET: u8 = 64;
    /// All ones: there is no device.
    pub const GONE: u8 = 0xff;
}

/// "No vector", also for "there was none left".
pub const NO_VECTOR: u16 = 0xffff;

/// Features.
pub mod feature {
    /// The device completes checksums.
    pub const CSUM: u64 = 1 << 0;
    /// The driver takes frames whose checksum is not complete, or was verified.
    pub const GUEST_CSUM: u64 = 1 << 1;
    /// The device has an MTU.
    pub const MTU: u64 = 1 << 3;
    /// The device has a MAC address.
    pub const MAC: u64 = 1 << 5;
    /// The device segments TCP over IPv4.
    pub const HOST_TSO4: u64 = 1 << 11;
    /// The device segments TCP over IPv6.
    pub const HOST_TSO6: u64 = 1 << 12;
    /// The device segments TCP with congestion marks.
    pub const HOST_ECN: u64 = 1 << 13;
    /// The device knows the state of its link.
    pub const STATUS: u64 = 1 << 16;
    /// Notifications and interrupts at a given index only.
    pub const EVENT_IDX: u64 = 1 << 29;
    /// As virtio 1.0 and later have it.
    pub const VERSION_1: u64 = 1 << 32;
    /// Addresses are translated as those of other devices are.
    pub const ACCESS_PLATFORM: u64 = 1 << 33;
    /// Memory is ordered as the platform orders it for devices.
    pub const ORDER_PLATFORM: u64 = 1 << 36;
    /// The device knows its speed.
    pub const SPEED_DUPLEX: u64 = 1 << 63;
}

/// Configuration of a network device.
pub mod net {
    /// 6 bytes: its address, with [`super::feature::MAC`].
    pub const MAC: u64 = 0;
    /// 16 bits: bit 0 is the link, with [`super::feature::STATUS`].
    pub const STATUS: u64 = 6;
    /// 16 bits, with [`super::feature::MTU`].
    pub const MTU: u64 = 10;
    /// 32 bits: Mbit/s, with [`super::feature::SPEED_DUPLEX`].
    pub const SPEED: u64 = 12;
    /// Status: the link is up.
    pub const LINK_UP: u16 = 1;
    /// The least MTU (virtio 1.2 §5.1.4.1).
    pub const MIN_MTU: u16 = 68;
}
