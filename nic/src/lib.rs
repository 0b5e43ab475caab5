//! PCI network functions driven from user space: VFIO, drivers, packet I/O and flow offload.
//!
//! Nothing is here yet: ports of this release are vhost-user ports of package `backend`. What belongs here, and
//! what it may not know of (OVS, vhost-user), is in ARCHITECTURE.md.
