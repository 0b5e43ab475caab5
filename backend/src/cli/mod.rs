//! The command `pointwork`: arguments to a request, the answer to text.

pub mod args;
pub mod nic;
pub mod render;
pub mod table;

use crate::control::client;
use crate::control::protocol::{Done, FlowAdded, Flows, FlowsDeleted, Request, Stats, Synced, Version};
use anyhow::{Context, Result, anyhow};
use args::{Args, Command, StatsArgs, selector};
use clap::Parser;
use clap::error::ErrorKind;
use serde::de::DeserializeOwned;
use serde_json::Value;
use std::io::{self, IsTerminal, Write};
use std::path::Path;
use std::process::ExitCode;
use std::time::{Duration, Instant};

/// How long the daemon may take for an answer.
const TIMEOUT: Duration = Duration::from_secs(30);

/// Runs the command: 0, or 1 after one line on standard error.
pub fn main() -> ExitCode {
    let args = match Args::try_parse() {
        Ok(args) => args,
        Err(error) if matches!(error.kind(), ErrorKind::DisplayHelp | ErrorKind::DisplayVersion) => {
            let _ = error.print();
            return ExitCode::SUCCESS;
        }
        Err(error) => return failure(&usage(&error)),
    };
    let control = args.control(std::env::var_os("POINTWORK_CONTROL"));
    match run(&args, &control) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) if is_broken_pipe(&error) => ExitCode::SUCCESS,
        Err(error) => failure(&format!("{error:#}")),
    }
}

fn failure(reason: &str) -> ExitCode {
    eprintln!("pointwork: {}", reason.replace('\n', " "));
    ExitCode::FAILURE
}

/// `pointwork dump-flows | head` is no failure.
fn is_broken_pipe(error: &anyhow::Error) -> bool {
    error.downcast_ref::<io::Error>().is_some_and(|error| error.kind() == io::ErrorKind::BrokenPipe)
}

/// What is wrong with the arguments in one line: clap's first paragraph and its tip.
fn usage(error: &clap::Error) -> String {
    let text = error.render().to_string();
    let mut paragraphs = text.split("\n\n").map(|p| p.split_whitespace().collect::<Vec<_>>().join(" "));
    let first = paragraphs.next().unwrap_or_default();
    let first = first.strip_prefix("error: ").unwrap_or(&first);
    let tip = paragraphs.find(|p| p.starts_with("tip: ")).map(|tip| format!(" ({tip})")).unwrap_or_default();
    format!("{first}{tip}; 'pointwork --help' shows how")
}

fn run(args: &Args, control: &Path) -> Result<()> {
    let daemon = Daemon { control, json: args.json };
    match &args.command {
        Command::Show => daemon.ask(Request::Show {}, render::show),
        Command::Stats(stats) => run_stats(&daemon, stats),
        Command::DumpFlows { port, source, more } => {
            let request = Request::DumpFlows { port: port.clone(), source: *source };
            daemon.ask(request, |flows: &Flows| render::flows(flows, *more))
        }
        Command::AddFlow { flow, actions } => {
            let request = Request::AddFlow { flow: flow.clone(), actions: actions.clone() };
            daemon.ask(request, |added: &FlowAdded| format!("flow {} added: {}\n", added.id, added.flow))
        }
        Command::DelFlow { flow, .. } => {
            let plural = |n: u64| if n == 1 { "flow" } else { "flows" };
            daemon.ask(Request::DelFlow { which: selector(flow) }, |&FlowsDeleted { deleted }| {
                format!("{deleted} {} deleted\n", plural(deleted))
            })
        }
        Command::AddPort(port) => {
            let port = port.to_config().map_err(|reason| anyhow!(reason))?;
            let text = format!("port {} added\n", port.name);
            daemon.ask(Request::AddPort { port }, |_: &Done| text)
        }
        Command::SetPort { name, workers } => {
            let text = match workers.0[..] {
                [] => format!("port {name} set: workers are chosen automatically\n"),
                _ => format!("port {name} set: queues are pinned to workers {}\n", list(&workers.0)),
            };
            let request = Request::SetPort { name: name.clone(), workers: workers.0.clone() };
            daemon.ask(request, |_: &Done| text)
        }
        Command::DelPort { name } => {
            let text = format!("port {name} deleted\n");
            daemon.ask(Request::DelPort { name: name.clone() }, |_: &Done| text)
        }
        Command::Trace { port, packet } => {
            daemon.ask(Request::Trace { port: port.clone(), packet: packet.join(" ") }, render::trace)
        }
        Command::Sync { timeout } => daemon
            .ask(Request::Sync { timeout: timeout.as_secs_f64() }, |synced: &Synced| {
                format!("in sync: {} flows\n", synced.flows)
            }),
        Command::Nic { command } => nic::run(command, args.json),
        Command::Version => daemon.ask(Request::Version {}, |daemon: &Version| {
            let own = Version::own();
            format!(
                "pointwork {} (protocol {})\npointworkd {} (protocol {})\n",
                own.version, own.protocol, daemon.version, daemon.protocol
            )
        }),
    }
}

fn list(numbers: &[u16]) -> String {
    numbers.iter().map(u16::to_string).collect::<Vec<_>>().join(",")
}

/// The daemon, and how its answers are to be printed.
struct Daemon<'a> {
    control: &'a Path,
    json: bool,
}

impl Daemon<'_> {
    /// Asks, and prints the answer as JSON or as `render` has it.
    fn ask<T: DeserializeOwned>(&self, request: Request, render: impl FnOnce(&T) -> String) -> Result<()> {
        let answer = self.answer(&request)?;
        if self.json {
            return print(&format!("{answer:#}\n"));
        }
        print(&render(&typed(answer)?))
    }

    fn answer(&self, request: &Request) -> Result<Value> {
        let timeout = match request {
            // The daemon gives up first and says what it waited for.
            Request::Sync { timeout } => Duration::from_secs_f64(*timeout) + Duration::from_secs(10),
            _ => TIMEOUT,
        };
        Ok(client::ask(self.control, request, timeout)?)
    }
}

fn typed<T: DeserializeOwned>(answer: Value) -> Result<T> {
    serde_json::from_value(answer)
        .context("the daemon's answer is not understood: are pointwork and pointworkd of the same version?")
}

fn run_stats(daemon: &Daemon, stats: &StatsArgs) -> Result<()> {
    let (port, watch) = stats.resolve().map_err(|reason| anyhow!(reason))?;
    let request = Request::Stats { port };
    let Some(interval) = watch else {
        return daemon.ask(request, |answer: &Stats| render::stats(answer, stats.all));
    };
    let mut before: Option<(Stats, Instant)> = None;
    let mut shown = 0;
    while stats.count.is_none_or(|count| shown < count) {
        let (answer, now) = (daemon.answer(&request)?, Instant::now());
        if daemon.json {
            // A sample a line; its reader makes the differences.
            print(&format!("{answer}\n"))?;
            shown += 1;
        } else {
            let after: Stats = typed(answer)?;
            if let Some((before, then)) = &before {
                let start = match (io::stdout().is_terminal(), shown) {
                    (true, _) => "\x1b[H\x1b[2J",
                    (false, 0) => "",
                    (false, _) => "\n",
                };
                print(&format!("{start}{}", render::rates(before, &after, (now - *then).as_secs_f64())))?;
                shown += 1;
            }
            before = Some((after, now));
        }
        if stats.count.is_none_or(|count| shown < count) {
            std::thread::sleep(interval.saturating_sub(now.elapsed()));
        }
    }
    Ok(())
}

/// Unlike `print!`, without a panic when nobody reads.
fn print(text: &str) -> Result<()> {
    let mut out = io::stdout().lock();
    out.write_all(text.as_bytes())?;
    out.flush()?;
    Ok(())
}
