//! The control socket: how `pointwork` and other programs ask the daemon.
//!
//! One JSON object a line, each way, over a Unix socket. [`protocol`] has the objects, [`server`] is driven by the daemon's
//! event loop, [`client`] is what the command uses.

pub mod client;
pub mod protocol;
pub mod server;
