//! Ending what a device does for a program that is dead: DMA into memory that is gone, and rules that nobody knows any more.

use std::fmt;

use super::{Host, HostError, Obstacle, PciAddress};
use crate::pci::vfio::{Options, VfioFunction};
use crate::pci::{PciError, PciFunction};
use crate::{igb, rocker};

/// How a device was reset.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum ResetBy {
    /// By the kernel: the function itself, or its bus.
    Kernel,
    /// By a register of the device.
    Register,
}

impl fmt::Display for ResetBy {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            ResetBy::Kernel => "by the kernel",
            ResetBy::Register => "by a register of its own",
        })
    }
}

impl Host {
    /// Ends all that a function does, which must be bound to `vfio-pci` and which no program may have.
    pub fn reset(&self, address: PciAddress) -> Result<ResetBy, HostError> {
        let function = self.function(address)?;
        if !function.is_bound() {
            return Err(HostError::NotBound(address));
        }
        self.check_unused(&function)?;
        // No memory is locked for it.
        let mut left = self.left(&function).into_iter();
        if let Some(obstacle) = left.find(|obstacle| !matches!(obstacle, Obstacle::LockedMemory(_))) {
            return Err(HostError::Obstacle { address, obstacle });
        }
        let failed = |cause| HostError::Pci { address, cause };
        let mut function = VfioFunction::open(&address.to_string(), Options::default()).map_err(failed)?;
        reset(&mut function).map_err(failed)?.ok_or(HostError::NoReset(address))
    }
}

/// Takes bus mastering away, and resets the device by what it has; `None` if it has nothing.
pub(super) fn reset(function: &mut dyn PciFunction) -> Result<Option<ResetBy>, PciError> {
    function.set_bus_master(false)?;
    match function.reset() {
        Ok(()) => return Ok(Some(ResetBy::Kernel)),
        Err(PciError::NoReset) => {}
        Err(error) => return Err(error),
    }
    let (vendor, device) = function.id()?;
    let (register, bit) = match super::model(vendor, device).map(|model| model.driver) {
        Some("rocker") => (rocker::regs::CONTROL, rocker::regs::CONTROL_RESET),
        Some("igb") => (igb::regs::CTRL, igb::regs::CTRL_RST),
        _ => return Ok(None),
    };
    let bar = function.bar(0)?;
    bar.write32(register, bar.read32(register)? | bit)?;
    Ok(Some(ResetBy::Register))
}
