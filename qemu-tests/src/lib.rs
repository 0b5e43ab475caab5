//! Guests to talk to a running `pointworkd`: their image, QEMU, the channel into them, a vhost-user front-end of our own,
//! a load generator on it, and what the end-to-end tests and the demo share.
//!
//! Everything that is started here ends with the value that stands for it, and with this process at the latest.

pub mod agent;
pub mod daemon;
pub mod differential;
pub mod frames;
pub mod frontend;
pub mod guest;
pub mod host;
pub mod image;
pub mod load;
pub mod matrix;
pub mod net;
pub mod netns;
pub mod nics;
pub mod node;
pub mod overlay;
pub mod ovs;
pub mod qmp;
pub mod random;
pub mod report;
pub mod service;
pub mod tap;
pub mod testpmd;
pub mod tools;
pub mod traffic;
