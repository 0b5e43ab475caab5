//! The database of Open vSwitch (RFC 7047; tables: `ovs-vswitchd.conf.db(5)`): what is configured, as a [`Snapshot`] that a
//! [`Watcher`] keeps up to date, and the changes that ports of ours need, by [`Database`].

mod rows;
mod snapshot;
#[cfg(test)]
mod tests;
mod transact;
mod watcher;

pub use snapshot::{Bridge, Interface, Port, Snapshot};
pub use transact::{Database, PortRow, TransactError};
pub use watcher::{Event, Watcher};

/// The database's name.
const DATABASE: &str = "Open_vSwitch";
/// Bytes of the longest message that the server may send: some hundred thousand ports.
const MESSAGE_LIMIT: usize = 256 << 20;
