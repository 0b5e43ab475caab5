//! Registers of the 82576 (Intel 82576EB Datasheet, chapter 8), all of 32 bits in BAR 0.

/// Vendor id: Intel.
pub const VENDOR: u16 = 0x8086;
/// Device ids of the 82576 in its forms: copper, fibre, backplane, quad port.
pub const DEVICES: [u16; 8] = [0x10c9, 0x10e6, 0x10e7, 0x10e8, 0x150a, 0x150d, 0x1518, 0x1526];

/// Device control.
pub const CTRL: u64 = 0x0000;
/// Control: set link up.
pub const CTRL_SLU: u32 = 1 << 6;
/// Control: tags of VLANs are put on, and taken off if there are no pools.
pub const CTRL_VME: u32 = 1 << 30;
/// Control: reset; clears itself.
pub const CTRL_RST: u32 = 1 << 26;
/// Device status.
pub const STATUS: u64 = 0x0008;
/// Status: link is up.
pub const STATUS_LU: u32 = 1 << 1;
/// Extended control.
pub const CTRL_EXT: u64 = 0x0018;
/// Extended control: a driver is there.
pub const CTRL_EXT_DRV_LOAD: u32 = 1 << 28;
/// VLAN tags are the second ones of frames.
pub const CTRL_EXT_EXT_VLAN: u32 = 1 << 26;
/// What tags of VLANs begin with, those inside others and the outer ones of two.
pub const VET: u64 = 0x0038;
/// Tags of 802.1Q.
pub const VET_8021Q: u32 = 0x8100_8100;
/// Access to the PHY.
pub const MDIC: u64 = 0x0020;
/// PHY access: write to register 0 of PHY 1 "enable and restart autonegotiation".
pub const MDIC_AUTONEGOTIATE: u32 = 0x1200 | 1 << 21 | 1 << 26;
/// PHY access is done.
pub const MDIC_READY: u32 = 1 << 28;
/// Interrupt mask, to set, and to clear.
pub const IMS: u64 = 0x00d0;
/// Interrupt mask, to clear.
pub const IMC: u64 = 0x00d8;
/// Interrupt cause: the link changed.
pub const CAUSE_LINK: u32 = 1 << 2;
/// Interrupt causes; read to clear.
pub const ICR: u64 = 0x00c0;
/// Receive control.
pub const RCTL: u64 = 0x0100;
/// Receive: enabled, all unicast, all multicast, long frames, broadcast, FCS taken off.
pub const RCTL_ON: u32 = 1 << 1 | 1 << 3 | 1 << 4 | 1 << 5 | 1 << 15 | 1 << 26;
/// Transmit control.
pub const TCTL: u64 = 0x0400;
/// Transmit: enabled, short frames padded.
pub const TCTL_ON: u32 = 1 << 1 | 1 << 3;
/// General purpose interrupt enable.
pub const GPIE: u64 = 0x1514;
/// MSI-X with automatic masking, one cause per vector, pending bits cleared.
pub const GPIE_MSIX: u32 = 1 | 1 << 4 | 1 << 30 | 1 << 31;
/// Extended interrupt mask, to set.
pub const EIMS: u64 = 0x1524;
/// Extended interrupt mask, to clear.
pub const EIMC: u64 = 0x1528;
/// Vectors that clear their causes.
pub const EIAC: u64 = 0x152c;
/// Vectors that mask themselves.
pub const EIAM: u64 = 0x1530;
/// Vectors of queues 0 and 8.
pub const IVAR0: u64 = 0x1700;
/// Vectors of other causes.
pub const IVAR_MISC: u64 = 0x1740;
/// Longest frame, FCS included.
pub const RLPML: u64 = 0x5004;
/// Receive checksums.
pub const RXCSUM: u64 = 0x5000;
/// Receive checksums: of IP, and of TCP and UDP.
pub const RXCSUM_ON: u32 = 1 << 8 | 1 << 9;
/// Number of receive addresses.
pub const ADDRESSES: u32 = 24;
/// Upper half of a receive address: it is valid.
pub const RAH_VALID: u32 = 1 << 31;

/// Receive address `index`, lower and upper half. The first one is the port's own after a reset.
pub const fn address(index: u32) -> (u64, u64) {
    let low = if index < 16 { 0x5400 + 8 * index as u64 } else { 0x54e0 + 8 * (index as u64 - 16) };
    (low, low + 4)
}

/// Multiple receive queues.
pub const MRQC: u64 = 0x5818;
/// Multiple receive queues: pools by address and VLAN.
pub const MRQC_POOLS: u32 = 3;
/// Number of pools, each of which has one queue of the same number.
pub const POOLS: u8 = 8;
/// Multicast table: one bit for each of 4096 hashes.
pub const MTA: u64 = 0x5200;
/// Its words.
pub const MTA_WORDS: u64 = 128;
/// VLAN table: one bit for each id.
pub const VFTA: u64 = 0x5600;
/// Receive control: VLANs are looked at.
pub const RCTL_VLAN_FILTER: u32 = 1 << 18;
/// Pools; the first one is the default.
pub const VT_CTL: u64 = 0x581c;
/// Pools: a frame may come to several.
pub const VT_CTL_REPLICATE: u32 = 1 << 30;
/// Pools that receive.
pub const VFRE: u64 = 0x0c8c;
/// Pools that send.
pub const VFTE: u64 = 0x0c90;
/// Queues that drop frames for which they have no room.
pub const QDE: u64 = 0x2408;
/// Frames that come to several pools.
pub const RPLOLR: u64 = 0x5af0;
/// Frames that come to several pools: FCS taken off, and tags of VLANs.
pub const RPLOLR_STRIP: u32 = 1 << 31 | 1 << 30;
/// Options of pool 0, with the longest frame in the lower bits.
pub const VMOLR: u64 = 0x5ad0;
/// Options of a pool: FCS and tags of VLANs taken off, and long frames.
pub const VMOLR_ON: u32 = 1 << 31 | 1 << 30 | 1 << 16;
/// Options of a pool: untagged frames.
pub const VMOLR_UNTAGGED: u32 = 1 << 24;
/// Options of a pool: broadcasts, and multicasts, by their table or all.
pub const VMOLR_GROUPS: u32 = 1 << 27 | 1 << 25 | 1 << 28;
/// VLANs with their pools, from bit 12 on.
pub const VLVF: u64 = 0x5d00;
/// A VLAN with its pools is valid.
pub const VLVF_VALID: u32 = 1 << 31;

/// A receive queue: address of the ring, lower half.
pub const fn rdbal(queue: u8) -> u64 {
    0xc000 + 0x40 * queue as u64
}

/// Offset from the address: buffers of a receive queue.
pub const QUEUE_BUFFERS: u64 = 0x0c;
/// Buffers: advanced descriptors, one buffer each.
pub const SRRCTL_ONE_BUFFER: u32 = 1 << 25;
/// Buffers: frames are dropped where there is none.
pub const SRRCTL_DROP: u32 = 1 << 31;
/// Transmit queue 0: address of the ring, lower half.
pub const TDBAL: u64 = 0xe000;
/// Offset from the address: upper half.
pub const QUEUE_HIGH: u64 = 0x04;
/// Offset from the address: bytes of the ring.
pub const QUEUE_LEN: u64 = 0x08;
/// Offset from the address: the device's index.
pub const QUEUE_HEAD: u64 = 0x10;
/// Offset from the address: the driver's index.
pub const QUEUE_TAIL: u64 = 0x18;
/// Offset from the address: control.
pub const QUEUE_CONTROL: u64 = 0x28;
/// Queue control: enabled.
pub const QUEUE_ENABLE: u32 = 1 << 25;
