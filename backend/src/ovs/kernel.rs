//! The kernel's datapath as a source that need not be there yet: the module may be loaded later.

use super::netlink::KernelSource;
use super::source::{Change, FlowSource, Sighting, SourceError};
use crate::wake::Waker;
use std::time::Duration;
use switch_core::flow::{PortNames, Ufid};

/// Opens the kernel's datapath when it is first read, and again until that works.
#[derive(Default)]
pub struct Kernel(Option<KernelSource>);

impl FlowSource for Kernel {
    fn describe(&self) -> String {
        self.0.as_ref().map_or_else(|| "kernel datapath".into(), FlowSource::describe)
    }

    fn dump(&mut self, names: &dyn PortNames, each: &mut dyn FnMut(Sighting<'_>)) -> Result<(), SourceError> {
        let source = match &mut self.0 {
            Some(source) => source,
            none => none.insert(KernelSource::open(None)?),
        };
        source.dump(names, each)
    }

    fn dump_ids(&mut self, each: &mut dyn FnMut(Ufid)) -> Result<bool, SourceError> {
        // What cannot be opened has no ids to give; the full read that follows says why.
        self.0.as_mut().map_or(Ok(false), |source| source.dump_ids(each))
    }

    fn sweep_interval(&self) -> Duration {
        self.0.as_ref().map_or(Duration::from_secs(1), FlowSource::sweep_interval)
    }

    fn wait(
        &mut self,
        names: &dyn PortNames,
        waker: &Waker,
        timeout: Duration,
        changes: &mut Vec<Change>,
    ) -> Result<(), SourceError> {
        match &mut self.0 {
            Some(source) => source.wait(names, waker, timeout, changes),
            None => {
                waker.sleep(timeout.as_millis() as u64, || false);
                Ok(())
            }
        }
    }
}
