//! Registers, ring numbers and identifiers of messages (QEMU, docs/specs/rocker.rst and hw/net/rocker/rocker_hw.h).

/// Vendor id: Red Hat's, for devices of QEMU.
pub const VENDOR: u16 = 0x1b36;
/// Device id.
pub const DEVICE: u16 = 0x0006;
/// The most front-panel ports; ports are numbered from 1, 0 is the CPU.
pub const MAX_PORTS: u32 = 62;

/// Reads back twice what was written.
pub const TEST_REG: u64 = 0x0010;
/// Control; bit 0 resets the switch.
pub const CONTROL: u64 = 0x0300;
/// Bit of [`CONTROL`].
pub const CONTROL_RESET: u32 = 1;
/// Number of front-panel ports.
pub const PORT_COUNT: u64 = 0x0304;
/// 64 bits, one per port: link is up.
pub const LINK_STATUS: u64 = 0x0310;
/// 64 bits, one per port: port is enabled.
pub const PORT_ENABLE: u64 = 0x0318;

/// Number of the command ring.
pub const RING_COMMAND: u32 = 0;
/// Number of the event ring.
pub const RING_EVENT: u32 = 1;
/// Interrupt vector of the event ring.
pub const VECTOR_EVENT: usize = 1;

/// Number of the transmit ring of the port with this index (port number - 1).
pub const fn ring_transmit(index: u32) -> u32 {
    2 + 2 * index
}

/// Number of the receive ring of the port with this index.
pub const fn ring_receive(index: u32) -> u32 {
    3 + 2 * index
}

/// Interrupt vector of the receive ring of the port with this index.
pub const fn vector_receive(index: u32) -> usize {
    5 + 2 * index as usize
}

/// First register of a ring.
pub const fn ring_base(ring: u32) -> u64 {
    0x1000 + 32 * ring as u64
}

/// Offsets from [`ring_base`].
pub mod ring {
    /// 64 bits: where the descriptors are.
    pub const ADDRESS: u64 = 0x00;
    /// Number of descriptors, a power of two.
    pub const SIZE: u64 = 0x08;
    /// The driver's index, and the doorbell.
    pub const HEAD: u64 = 0x0c;
    /// Control; bit 0 resets the ring, address and size included.
    pub const CONTROL: u64 = 0x14;
    /// Completions that were handled; the device interrupts when the first is outstanding again.
    pub const CREDITS: u64 = 0x18;
}

/// Errors in completions are Linux's numbers.
pub mod errno {
    /// Out of memory.
    pub const ENOMEM: u16 = 12;
    /// Message too long.
    pub const EMSGSIZE: u16 = 90;
    /// No buffer space.
    pub const ENOBUFS: u16 = 105;
}

/// Parts of a command.
pub mod command {
    /// 16 bits: what is asked.
    pub const TYPE: u32 = 1;
    /// Nested: the arguments.
    pub const INFO: u32 = 2;
    /// Type: read settings of a port.
    pub const GET_PORT_SETTINGS: u16 = 1;
    /// Type: change settings of a port.
    pub const SET_PORT_SETTINGS: u16 = 2;
    /// Type: add a flow.
    pub const FLOW_ADD: u16 = 3;
    /// Type: change a flow; what is left out stays.
    pub const FLOW_MOD: u16 = 4;
    /// Type: delete a flow.
    pub const FLOW_DEL: u16 = 5;
    /// Type: add a group.
    pub const GROUP_ADD: u16 = 7;
    /// Type: delete a group.
    pub const GROUP_DEL: u16 = 9;
}

/// Settings of a port.
pub mod settings {
    /// 32 bits: port number.
    pub const PORT: u32 = 1;
    /// 32 bits: Mbit/s.
    pub const SPEED: u32 = 2;
    /// MAC address.
    pub const MAC: u32 = 5;
    /// 8 bits: 0 is OF-DPA, the world with flow tables.
    pub const MODE: u32 = 6;
    /// 8 bits: whether it reports addresses that it sees.
    pub const LEARNING: u32 = 7;
    /// Name, not terminated.
    pub const NAME: u32 = 8;
}

/// Parts of a receive descriptor.
pub mod receive {
    /// 16 bits: see [`FLAG_FORWARDED`].
    pub const FLAGS: u32 = 1;
    /// 64 bits: where the frame goes.
    pub const ADDRESS: u32 = 3;
    /// 16 bits: how long it may be.
    pub const MAX_LEN: u32 = 4;
    /// 16 bits: how long it is.
    pub const LEN: u32 = 5;
    /// Flag: a copy; the frame itself was forwarded.
    pub const FLAG_FORWARDED: u16 = 0x100;
    /// Space for a completion, the parts above and a checksum, in bytes.
    pub const BUFFER: u16 = 128;
}

/// Parts of a transmit descriptor.
pub mod transmit {
    /// Nested: list of fragments.
    pub const FRAGMENTS: u32 = 5;
    /// Nested: one fragment.
    pub const FRAGMENT: u32 = 1;
    /// 64 bits, in a fragment: where it is.
    pub const ADDRESS: u32 = 1;
    /// 16 bits, in a fragment: how long it is.
    pub const LEN: u32 = 2;
}

/// Parts of flows and groups (OF-DPA).
pub mod flow {
    /// 16 bits: table.
    pub const TABLE: u32 = 1;
    /// 32 bits: priority, the highest wins.
    pub const PRIORITY: u32 = 2;
    /// 32 bits: hard timeout; must be there, is not looked at.
    pub const HARD_TIME: u32 = 3;
    /// 64 bits: the flow's name.
    pub const COOKIE: u32 = 5;
    /// 32 bits: ingress port.
    pub const IN_PORT: u32 = 6;
    /// Mask of [`IN_PORT`].
    pub const IN_PORT_MASK: u32 = 7;
    /// 32 bits: egress port of a group.
    pub const OUT_PORT: u32 = 8;
    /// 16 bits: next table.
    pub const GOTO_TABLE: u32 = 9;
    /// 32 bits: group.
    pub const GROUP: u32 = 10;
    /// 32 bits: the group below a group.
    pub const GROUP_LOWER: u32 = 11;
    /// 16 bits: number of groups in a list.
    pub const GROUP_COUNT: u32 = 12;
    /// Nested: list of groups, 32 bits each, numbered from 1.
    pub const GROUP_IDS: u32 = 13;
    /// TCI in network order.
    pub const VLAN: u32 = 14;
    /// Mask of [`VLAN`].
    pub const VLAN_MASK: u32 = 15;
    /// VLAN id given to untagged frames, in network order.
    pub const NEW_VLAN: u32 = 19;
    /// Ethertype in network order.
    pub const ETHERTYPE: u32 = 23;
    /// Destination MAC.
    pub const DST_MAC: u32 = 24;
    /// Mask of [`DST_MAC`].
    pub const DST_MAC_MASK: u32 = 25;
    /// Source MAC.
    pub const SRC_MAC: u32 = 26;
    /// Mask of [`SRC_MAC`].
    pub const SRC_MAC_MASK: u32 = 27;
    /// 8 bits: the group takes the outer tag off.
    pub const POP_VLAN: u32 = 59;
    /// 8 bits: the flow sends copies to the CPU, by the interface group of its VLAN and port 0.
    pub const COPY_TO_CPU: u32 = 61;

    /// The VLAN table.
    pub const TABLE_VLAN: u16 = 10;
    /// The termination MAC table, where the VLAN table leads.
    pub const TABLE_TERMINATION: u16 = 20;
    /// The ACL table, where what hits nothing before arrives.
    pub const TABLE_ACL: u16 = 60;
}
