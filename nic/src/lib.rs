//! PCI network functions driven from user space: how to reach one, drivers, packet I/O and flow offload.
//!
//! [`pci`] is what a driver stands on. [`io::PacketIo`] and [`offload::FlowOffload`] are what it offers. A driver is one
//! folder: [`rocker`], [`igb`] and [`virtio_net`]; [`model`] is a SmartNIC made of software. `docs/adding-a-nic.md` says how another one is written.

pub mod host;
pub mod igb;
pub mod io;
mod layers;
pub mod model;
pub mod offload;
pub mod pci;
pub mod rocker;
pub mod virtio_net;
