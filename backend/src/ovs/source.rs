//! Where the mirror reads the flows of OVS's datapath: one trait for the kernel's and the userspace datapath.

use crate::wake::Waker;
use std::time::Duration;
use switch_core::flow::{FlowSpec, PortNames, Ufid};

/// A flow of the datapath, as its source has it.
#[derive(Clone, Debug, PartialEq)]
pub struct DatapathFlow {
    /// Its identity. A source whose flow has no UFID makes a stable one from the unmasked key.
    pub id: Ufid,
    /// Its match and actions, or why its match cannot be represented; such a flow cannot be in the tables.
    pub flow: Result<FlowSpec, Unreadable>,
}

/// A flow that a dump comes across. Most are as they were in the dump before, and are not taken apart again.
pub struct Sighting<'a> {
    /// As [`DatapathFlow::id`].
    pub id: Ufid,
    /// A hash of match and actions as the source has them, keyed by chance: while it stays, what [`Sighting::read`] gives
    /// stays, as long as the caller's names of ports mean the same.
    /// None if that is not known.
    pub print: Option<u64>,
    /// Takes match and actions apart: [`DatapathFlow::flow`].
    pub read: &'a dyn Fn() -> Result<FlowSpec, Unreadable>,
}

/// A flow whose match is not understood, as text.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Unreadable {
    /// The flow as far as it can be shown.
    pub text: String,
    /// What is not understood, in a few words.
    pub reason: String,
}

/// What has happened to the datapath's table.
#[derive(Clone, Debug, PartialEq)]
pub enum Change {
    /// A flow is new, or has other actions.
    Put(Box<DatapathFlow>),
    /// A flow is gone.
    Delete(Ufid),
    /// Something may have changed in silence: everything is to be read again.
    Resync,
    /// Events came faster than they were taken, and some are lost: everything is to be read again.
    Lost,
}

/// Why the datapath cannot be read: one line that a person can act on.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub struct SourceError(pub String);

/// A way to OVS's datapath. All calls come from the mirror's thread.
///
/// Flows whose ingress is none of `names` are left out of everything: their packets never come by here. Outputs to ports
/// that are none of `names` are [`switch_core::action::PortRef::Foreign`].
pub trait FlowSource: Send {
    /// What it reads, for people: `kernel datapath ovs-system`, `userspace datapath by /run/…ctl`.
    fn describe(&self) -> String;

    /// Reads all flows. A flow may be given twice and one that comes or goes meanwhile may be missed: what
    /// [`FlowSource::wait`] tells later puts it right. Connects again if the connection was lost.
    fn dump(&mut self, names: &dyn PortNames, each: &mut dyn FnMut(Sighting<'_>)) -> Result<(), SourceError>;

    /// Whether a dump gives each flow that is there all the time, so that to be absent once is to be gone. The kernel's may
    /// skip flows while its table grows.
    fn is_exact(&self) -> bool {
        false
    }

    /// Reads only which flows there are (those without UFID by the identity made for them), for the sweep after silent
    /// flushes. A source that cannot do it cheaper than [`FlowSource::dump`] is not asked: it gives `false` and nothing else.
    fn dump_ids(&mut self, each: &mut dyn FnMut(Ufid)) -> Result<bool, SourceError>;

    /// What ends a call that waits for OVS, from another thread, and has those after it fail at once; none if no call waits.
    fn ender(&self) -> Option<Box<dyn Fn() + Send>> {
        None
    }

    /// How often the mirror reads everything ([`FlowSource::dump_ids`] if possible), as long as nothing else calls for it
    /// and it does not cost too much.
    fn sweep_interval(&self) -> Duration;

    /// Waits for changes, at most `timeout`, and adds them to `changes`. Comes back early, with none, when `waker`
    /// was rung. A source without events only waits.
    fn wait(
        &mut self,
        _names: &dyn PortNames,
        waker: &Waker,
        timeout: Duration,
        _changes: &mut Vec<Change>,
    ) -> Result<(), SourceError> {
        // Rounded up, so that whoever waits for a time does not come back before it again and again.
        waker.sleep(timeout.as_micros().div_ceil(1000) as u64, || false);
        Ok(())
    }
}
