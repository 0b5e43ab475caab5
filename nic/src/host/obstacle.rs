//! What keeps a driver of ours from a function, and what to do about it.

use std::fmt;

use super::{Function, Host, PciAddress, VFIO, text};
use crate::pci::vfio::locked_limit;

/// What a NIC's rings take at least, and a little more.
const LOCKED: u64 = 64 << 20;

/// Another function of an IOMMU group.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Companion {
    /// Where it is.
    pub address: PciAddress,
    /// The kernel's driver.
    pub driver: Option<String>,
}

impl Companion {
    /// Whether it keeps the group from being used: a program gets all of a group, or nothing.
    fn is_in_the_way(&self) -> bool {
        // Those that do nothing by themselves (linux/Documentation/driver-api/vfio.rst).
        !matches!(self.driver.as_deref(), None | Some(VFIO | "pci-stub" | "pcieport"))
    }
}

impl fmt::Display for Companion {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} ({})", self.address, self.driver.as_deref().unwrap_or("no driver"))
    }
}

/// What stands in the way.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Obstacle {
    /// No driver of ours knows the device.
    Unknown,
    /// The function has no IOMMU group.
    NoIommu,
    /// A module of the kernel is not loaded.
    Module(&'static str),
    /// The function is with another driver, or with none; the host uses it.
    NotBound {
        /// The driver.
        driver: Option<String>,
        /// How the host uses the function.
        uses: Option<String>,
    },
    /// These are in the same IOMMU group and with drivers of the kernel.
    Group {
        /// Number of the group.
        group: u32,
        /// Who they are.
        with: Vec<Companion>,
    },
    /// The IOMMU does not remap interrupts, so a device could raise any.
    Interrupts,
    /// Too little memory may be locked.
    LockedMemory(u64),
}

impl fmt::Display for Obstacle {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Obstacle::Unknown => f.write_str("no driver of Pointwork knows it"),
            Obstacle::NoIommu => f.write_str("no IOMMU"),
            Obstacle::Module(name) => write!(f, "module {name} is not loaded"),
            Obstacle::NotBound { driver: Some(driver), uses: Some(uses) } => {
                write!(f, "bound to {driver} ({uses})")
            }
            Obstacle::NotBound { driver: Some(driver), uses: None } => write!(f, "bound to {driver}"),
            Obstacle::NotBound { driver: None, .. } => write!(f, "not bound to {VFIO}"),
            Obstacle::Group { group, with } => {
                let with: Vec<String> = with.iter().map(Companion::to_string).collect();
                write!(f, "IOMMU group {group} is shared with {}", with.join(", "))
            }
            Obstacle::Interrupts => f.write_str("the IOMMU does not remap interrupts"),
            Obstacle::LockedMemory(limit) => {
                write!(f, "this user may lock {} KiB of memory", limit >> 10)
            }
        }
    }
}

impl Obstacle {
    /// What to do about it at the function `address`.
    pub fn remedy(&self, address: PciAddress) -> String {
        match self {
            Obstacle::Unknown => "see docs/adding-a-nic.md".into(),
            Obstacle::NoIommu => {
                "switch it on in the firmware (VT-d, AMD-Vi) and for the kernel (intel_iommu=on)".into()
            }
            Obstacle::Module(name) => format!("modprobe {name}"),
            Obstacle::NotBound { uses: Some(_), .. } => {
                format!("take it out of use and 'pointwork nic bind {address}', or add --force")
            }
            Obstacle::NotBound { uses: None, .. } => format!("pointwork nic bind {address}"),
            Obstacle::Group { with, .. } => {
                let each: Vec<String> =
                    with.iter().map(|other| format!("'pointwork nic bind {}'", other.address)).collect();
                format!("give them up too, by {}, or put the NIC into another slot", each.join(", "))
            }
            Obstacle::Interrupts => {
                "switch it on in the firmware, or, if all devices and their users are trusted, set \
                 vfio_iommu_type1's parameter allow_unsafe_interrupts to 1"
                    .into()
            }
            Obstacle::LockedMemory(_) => {
                "raise RLIMIT_MEMLOCK (LimitMEMLOCK= of the service) or grant CAP_IPC_LOCK".into()
            }
        }
    }
}

impl Host {
    /// What stands between a function and a driver of ours: nothing if it is ready.
    pub fn obstacles(&self, function: &Function) -> Vec<Obstacle> {
        let mut obstacles = Vec::new();
        if function.model.is_none() {
            obstacles.push(Obstacle::Unknown);
        }
        let Some(group) = function.group else {
            obstacles.push(Obstacle::NoIommu);
            return obstacles;
        };
        obstacles.extend(self.missing_module().map(Obstacle::Module));
        if !function.is_bound() {
            let (driver, uses) = (function.driver.clone(), function.uses());
            obstacles.push(Obstacle::NotBound { driver, uses });
        }
        let with: Vec<Companion> =
            function.companions.iter().filter(|other| other.is_in_the_way()).cloned().collect();
        if !with.is_empty() {
            obstacles.push(Obstacle::Group { group, with });
        }
        if function.remaps_interrupts == Some(false) && !self.allows_unsafe_interrupts() {
            obstacles.push(Obstacle::Interrupts);
        }
        if let Some(limit) = locked_limit().filter(|&limit| limit < LOCKED) {
            obstacles.push(Obstacle::LockedMemory(limit));
        }
        obstacles
    }

    /// The module of VFIO that is missing.
    pub(super) fn missing_module(&self) -> Option<&'static str> {
        if !self.path("sys/bus/pci/drivers").join(VFIO).exists() {
            return Some(VFIO);
        }
        let has_iommu = self.path("sys/module/vfio_iommu_type1").exists() || self.path("dev/iommu").exists();
        (!has_iommu).then_some("vfio_iommu_type1")
    }

    fn allows_unsafe_interrupts(&self) -> bool {
        let path = self.path("sys/module/vfio_iommu_type1/parameters/allow_unsafe_interrupts");
        text(&path).is_some_and(|text| text.trim() == "Y")
    }
}
