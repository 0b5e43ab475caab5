//! Back to OVS: what comes by a device that is itself the port of OVS's bridge has no TAP to be written to. It is given to
//! the kernel's datapath as if the device had received it.

use crate::host::{Decision, Millis};
use crate::ovs::netlink::execute::{Execute, ExecuteError};
use log::{info, warn};
use switch_core::drop::DropReason;
use switch_core::packet::Packet;

/// The way back.
#[derive(Default)]
pub struct Back {
    execute: Execute,
}

impl Back {
    /// Gives the datapath a packet that came by `device`; what comes by AF_XDP leaves nothing to be done. `lost` is why the
    /// device's last one was lost, if it was.
    pub fn give(
        &mut self,
        device: &str,
        lost: &mut Option<String>,
        packet: &Packet,
        tail: &[u8],
        now: Millis,
    ) -> Decision {
        match self.execute.packet(device, packet.head(), tail, now) {
            Ok(()) => {
                if lost.take().is_some() {
                    info!("{device}: packets go back to Open vSwitch again");
                }
                Decision::Taken
            }
            Err(ExecuteError::TooLong) => Decision::Drop(DropReason::Oversized),
            // Why is known already, by this device or another.
            Err(ExecuteError::Unreachable) if lost.is_some() => Decision::Drop(DropReason::HostExecute),
            Err(error) => {
                let text = format!("packets cannot go back to Open vSwitch: {error}");
                if lost.as_ref() != Some(&text) {
                    warn!("{device}: {text}");
                    *lost = Some(text);
                }
                Decision::Drop(DropReason::HostExecute)
            }
        }
    }
}
