//! Named reasons for packets that go nowhere.

macro_rules! reasons {
    ($($(#[$doc:meta])* $name:ident = $text:literal;)*) => {
        /// Why a packet, or one output of it, was dropped. Each has a counter per port, shown by `pointwork stats`.
        #[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, PartialOrd, Ord)]
        #[repr(u8)]
        pub enum DropReason { $($(#[$doc])* $name),* }

        impl DropReason {
            /// Every reason, in order: `ALL[r as usize] == r`.
            pub const ALL: &'static [DropReason] = &[$(DropReason::$name),*];

            /// Number of reasons.
            pub const COUNT: usize = Self::ALL.len();

            /// The counter's name.
            pub const fn name(self) -> &'static str {
                match self { $(DropReason::$name => $text),* }
            }
        }
    };
}

reasons! {
    /// The flow says so: an empty action list or an explicit `drop`.
    FlowDrop = "flow_drop";
    /// Shorter than an Ethernet header.
    Runt = "runt";
    /// Longer than 64 KiB and its headers.
    Oversized = "oversized";
    /// The virtio-net header lies: offsets, sizes or types that do not fit the packet.
    BadOffload = "bad_offload";
    /// An action needs a header that the packet does not have in full.
    TruncatedHeader = "truncated_header";
    /// `dec_ttl` on a packet whose TTL is used up.
    TtlExpired = "ttl_expired";
    /// More recirculations or nested copies than are allowed.
    TooDeep = "too_deep";
    /// Larger than the egress port's MTU and not to be segmented.
    Mtu = "mtu";
    /// The output port is gone.
    NoPort = "no_port";
    /// The output port's guest is not connected, or its driver not ready.
    LinkDown = "link_down";
    /// The guest's receive ring stayed full.
    RxRingFull = "rx_ring_full";
    /// The guest gave a receive buffer that is too small and may not be merged.
    RxBufferSmall = "rx_buffer_small";
    /// The guest's receive ring is malformed.
    RxRingFault = "rx_ring_fault";
    /// The ingress port has used up its rate of misses.
    MissRate = "miss_rate";
    /// The ingress port's share of the queue to the host is full.
    HostQueueFull = "host_queue_full";
    /// Too many packets of one flow while its first is being decided about.
    MissPending = "miss_pending";
    /// The host (bridge or OVS) sent it nowhere.
    HostDrop = "host_drop";
    /// The queue of the ingress port's representor was full.
    HostTapFull = "host_tap_full";
    /// The ingress port's representor is down or gone.
    HostTapDown = "host_tap_down";
    /// OVS's datapath did not take back what came by a device of its own.
    HostExecute = "host_execute";
    /// A device has brought packets faster than they were taken, or larger ones than fit: the kernel had no place for it.
    RxOverrun = "rx_overrun";
    /// It had come by a device's queue that was closed before it was taken.
    DeviceClosed = "device_closed";
    /// The device says that receiving it has failed, or what it says of it makes no sense.
    RxError = "rx_error";
    /// No buffer was free to segment or hold the packet.
    NoBuffer = "no_buffer";
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reasons_index_their_counters() {
        for (i, &reason) in DropReason::ALL.iter().enumerate() {
            assert_eq!(reason as usize, i);
        }
    }
}
