//! Ports on veth pairs between network namespaces of their own. They need root, and a kernel with AF_XDP and veth.

mod net;
mod open;
mod program;
mod tags;
mod traffic;
mod wire;
