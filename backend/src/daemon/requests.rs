//! The control socket's requests, each carried out by the daemon.

use super::{Daemon, explicit::flow_id, lock};
use crate::control::protocol::{
    Done, FlowAdded, FlowSelector, FlowsDeleted, Request, Response, Synced, Version,
};
use crate::control::server::{Answer, ControlHandler, Reply};
use crate::datapath::Mark;
use anyhow::Result;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, TryRecvError};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

/// How long `add-port`, `del-port` and `del-flow` wait for the workers, which answer in microseconds.
const PATIENCE: Duration = Duration::from_secs(10);

/// The daemon behind the control socket.
pub struct Handler(pub Arc<Mutex<Daemon>>);

impl ControlHandler for Handler {
    fn handle(&mut self, request: Request) -> Reply {
        lock(&self.0).handle(request).unwrap_or_else(|error| Reply::error(format!("{error:#}")))
    }
}

impl Daemon {
    fn handle(&mut self, request: Request) -> Result<Reply> {
        Ok(match request {
            Request::Show {} => Reply::ok(Response::Show(Box::new(self.show()))),
            Request::Stats { port } => Reply::ok(Response::Stats(Box::new(self.stats(port.as_deref())?))),
            Request::DumpFlows { port, source } => {
                Reply::ok(Response::Flows(self.dump_flows(port.as_deref(), source)?))
            }
            Request::AddFlow { flow, actions } => {
                let (flow, text) = self.add_flow(&flow, &actions)?;
                self.when_applied(Response::FlowAdded(FlowAdded { id: flow_id(flow), flow: text }))
            }
            Request::DelFlow { which } => {
                let deleted = match which {
                    FlowSelector::Flow(text) => self.del_flow(&text).map(|()| 1),
                    FlowSelector::Id(id) => self.del_flow_by_id(&id).map(|()| 1),
                    FlowSelector::All => self.del_all_flows(),
                }?;
                self.when_applied(Response::FlowsDeleted(FlowsDeleted { deleted: deleted as u64 }))
            }
            Request::AddPort { port } => {
                self.add_port(port)?;
                self.when_applied(Done { ok: true }.into())
            }
            Request::SetPort { name, workers } => {
                let late = format!(
                    "port '{name}': a queue is still with its old worker, the host takes long; it follows"
                );
                when_done(self.set_workers(&name, workers)?, late)
            }
            Request::DelPort { name } => {
                when_done(self.del_port(&name)?, "the port is still being closed".into())
            }
            Request::Trace { port, packet } => self.trace(&port, &packet)?,
            Request::Sync { timeout } => self.sync(timeout),
            Request::Version {} => Reply::ok(Response::Version(Version::own())),
        })
    }

    /// Answers when every worker has all that was sent to it until now.
    fn when_applied(&self, response: Response) -> Reply {
        let marks = lock(&self.datapath.flows).marks();
        let deadline = Instant::now() + PATIENCE;
        wait_for(marks, deadline, response)
    }

    /// Has the host read its flows in full, then waits for the workers.
    fn sync(&self, timeout: f64) -> Reply {
        let deadline = Instant::now() + Duration::from_secs_f64(timeout);
        let mut read = match (&self.ovs, &self.host) {
            (Some(ovs), _) => match ovs.mirror() {
                Some(mirror) => Some(Reading::Mirror(mirror.start_sync())),
                None => return Reply::error(format!("flows cannot be read: {}", ovs.waiting_for())),
            },
            (None, Some(host)) => Some(Reading::Bridge(host.start_sync())),
            (None, None) => return Reply::error("the daemon is stopping"),
        };
        let flows = self.datapath.flows.clone();
        let mut marks = None;
        Reply::Later(Box::new(move |now| {
            if let Some(waiting) = &read {
                match waiting.poll() {
                    Ok(Ok(())) => read = None,
                    Ok(Err(reason)) => return Some(Err(format!("flows cannot be read: {reason}"))),
                    Err(TryRecvError::Disconnected) => return Some(Err("the daemon is stopping".into())),
                    Err(TryRecvError::Empty) if now > deadline => {
                        return Some(Err(format!("the flows could not be read within {timeout} s")));
                    }
                    Err(TryRecvError::Empty) => return None,
                }
            }
            let marks = marks.get_or_insert_with(|| lock(&flows).marks());
            if marks.iter().all(Mark::is_reached) {
                let flows = lock(&flows).iter().count() as u64;
                return Some(Ok(Response::Synced(Synced { flows })));
            }
            (now > deadline).then(|| Err(late(marks)))
        }))
    }
}

/// A read of the source of flows that was asked for.
enum Reading {
    Bridge(Receiver<()>),
    Mirror(Receiver<Result<usize, String>>),
}

impl Reading {
    /// Whether it is done, and how.
    fn poll(&self) -> Result<Result<(), String>, TryRecvError> {
        match self {
            Reading::Bridge(done) => done.try_recv().map(Ok),
            Reading::Mirror(done) => done.try_recv().map(|result| result.map(drop)),
        }
    }
}

fn late(marks: &[Mark]) -> String {
    let waiting = marks.iter().enumerate().filter(|(_, mark)| !mark.is_reached());
    let workers: Vec<String> =
        waiting.filter(|(_, mark)| mark.is_worker()).map(|(i, _)| i.to_string()).collect();
    match workers.is_empty() {
        true => "a NIC has not followed the change yet".into(),
        false => format!("worker {} has not taken the change yet", workers.join(", ")),
    }
}

fn wait_for(marks: Vec<Mark>, deadline: Instant, response: Response) -> Reply {
    if marks.iter().all(Mark::is_reached) {
        return Reply::ok(response);
    }
    let mut response = Some(response);
    Reply::Later(Box::new(move |now| -> Option<Answer> {
        if marks.iter().all(Mark::is_reached) {
            return response.take().map(Ok);
        }
        (now > deadline).then(|| Err(late(&marks)))
    }))
}

fn when_done(done: Arc<AtomicBool>, late: String) -> Reply {
    let deadline = Instant::now() + PATIENCE;
    Reply::Later(Box::new(move |now| {
        if done.load(Ordering::Acquire) {
            return Some(Ok(Done { ok: true }.into()));
        }
        (now > deadline).then(|| Err(late.clone()))
    }))
}
