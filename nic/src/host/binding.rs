//! Giving functions to `vfio-pci`, and back to the kernel's driver.

use std::fs::OpenOptions;
use std::io;

use rustix::io::Errno;

use super::{BRIDGE, Function, Holder, Host, HostError, Obstacle, PciAddress, VFIO};

/// What binding has done.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Bound {
    /// The function had it already.
    pub already: bool,
    /// The driver that it was taken from.
    pub from: Option<String>,
    /// What still stands in the way of using it.
    pub left: Vec<Obstacle>,
}

/// What unbinding has done.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Unbound {
    /// It was not bound to `vfio-pci`.
    pub already: bool,
    /// The kernel's driver that has it now; `None` if no loaded one takes it.
    pub driver: Option<String>,
}

impl Host {
    /// Gives a function to `vfio-pci`. Nothing of it outlives a boot. One that the host uses is taken only with `force`.
    pub fn bind(&self, address: PciAddress, force: bool) -> Result<Bound, HostError> {
        let function = self.function(address)?;
        if function.base_class() == BRIDGE {
            return Err(HostError::Bridge(address));
        }
        let obstacle = |obstacle| HostError::Obstacle { address, obstacle };
        if function.group.is_none() {
            return Err(obstacle(Obstacle::NoIommu));
        }
        if function.is_bound() {
            return Ok(Bound { already: true, from: None, left: self.left(&function) });
        }
        if let Some(module) = self.missing_module() {
            return Err(obstacle(Obstacle::Module(module)));
        }
        if !force {
            if !function.is_network() {
                return Err(HostError::NotNetwork { address, class: function.class });
            }
            if let Some(uses) = function.uses() {
                return Err(HostError::InUse { address, uses });
            }
        }
        let path = self.of(address);
        let overriding = path.join("driver_override");
        self.tell(&overriding, VFIO)?;
        let moved = self.release(&function).and_then(|()| self.probe(address));
        let now = moved.and_then(|()| self.function(address));
        match now {
            Ok(now) if now.is_bound() => {
                Ok(Bound { already: false, from: function.driver, left: self.left(&now) })
            }
            failed => {
                // As it was before, as far as the kernel lets it.
                let _ = self.tell(&overriding, "\n").and_then(|()| self.probe(address));
                Err(failed.err().unwrap_or(HostError::NotTaken { address, driver: VFIO.into() }))
            }
        }
    }

    /// Gives a function back to the driver that the kernel has for it.
    pub fn unbind(&self, address: PciAddress) -> Result<Unbound, HostError> {
        let function = self.function(address)?;
        if !function.is_bound() && function.driver.is_some() {
            return Ok(Unbound { already: true, driver: function.driver });
        }
        // The kernel would wait until its user lets it go.
        self.check_unused(&function)?;
        self.tell(&self.of(address).join("driver_override"), "\n")?;
        self.release(&function)?;
        self.probe(address)?;
        Ok(Unbound { already: !function.is_bound(), driver: self.function(address)?.driver })
    }

    /// That no program has a function that is bound to `vfio-pci`.
    pub(super) fn check_unused(&self, function: &Function) -> Result<(), HostError> {
        let address = function.address;
        if let Some(holder) = function.holder.clone() {
            return Err(HostError::Held { address, holder });
        }
        let Some(group) = function.group.filter(|_| function.is_bound()) else { return Ok(()) };
        // A program that cannot be seen, in another namespace: a group is opened once.
        let path = self.path("dev/vfio").join(group.to_string());
        match OpenOptions::new().read(true).write(true).open(&path) {
            Err(cause) if Errno::from_io_error(&cause) == Some(Errno::BUSY) => {
                Err(HostError::Held { address, holder: Holder { pid: None, name: String::new() } })
            }
            Err(cause) if cause.kind() != io::ErrorKind::NotFound => Err(HostError::Io { path, cause }),
            _ => Ok(()),
        }
    }

    pub(super) fn left(&self, function: &Function) -> Vec<Obstacle> {
        let mut left = self.obstacles(function);
        left.retain(|obstacle| !matches!(obstacle, Obstacle::Unknown));
        left
    }

    /// Takes a function from its driver.
    fn release(&self, function: &Function) -> Result<(), HostError> {
        if function.driver.is_some() {
            let path = self.of(function.address).join("driver/unbind");
            self.tell(&path, &function.address.to_string())?;
        }
        Ok(())
    }

    /// Has the kernel look for a driver.
    fn probe(&self, address: PciAddress) -> Result<(), HostError> {
        self.tell(&self.path("sys/bus/pci/drivers_probe"), &address.to_string())
    }
}
