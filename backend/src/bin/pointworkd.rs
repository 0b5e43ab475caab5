//! The daemon's command line.

use anyhow::Result;
use backend::config::{Config, SAMPLE};
use clap::Parser;
use log::{LevelFilter, warn};
use std::io::Write;
use std::path::PathBuf;
use std::process::ExitCode;

/// Gives QEMU guests a switch that carries every known flow itself.
///
/// Stays in the foreground, logs to standard error, tells systemd when it is ready, and ends within a second on SIGTERM.
/// Ports are used with `pointwork`; see `pointwork --help`.
#[derive(Parser)]
#[command(version, after_help = after_help())]
struct Arguments {
    /// The configuration, in TOML; see below
    #[arg(long, value_name = "FILE")]
    config: PathBuf,
    /// Read the configuration, say what is wrong with it, and do nothing else
    #[arg(long)]
    check: bool,
    /// Say what the program is to who looks for vhost-user backends, as JSON, and do nothing else
    #[arg(long)]
    print_capabilities: bool,
    /// How much to log: error, warn, info, debug or trace
    #[arg(long, value_name = "LEVEL", default_value = "info")]
    log: LevelFilter,
}

fn after_help() -> String {
    format!("A configuration with every key:\n\n{SAMPLE}")
}

/// What `--print-capabilities` says (QEMU's docs/interop/vhost-user.json): nothing is defined for networks but their type.
const CAPABILITIES: &str = r#"{ "type": "net" }"#;

fn main() -> ExitCode {
    // By the conventions for backends (docs/interop/vhost-user.rst) all else is to be ignored, whether it is known or not.
    if std::env::args_os().skip(1).any(|argument| argument == "--print-capabilities") {
        let printed = writeln!(std::io::stdout(), "{CAPABILITIES}");
        return if printed.is_ok() { ExitCode::SUCCESS } else { ExitCode::FAILURE };
    }
    let arguments = match Arguments::try_parse() {
        Ok(arguments) => arguments,
        Err(error) => {
            // Standard output or error is gone: there is nobody to tell.
            let _ = error.print();
            return if error.use_stderr() { ExitCode::FAILURE } else { ExitCode::SUCCESS };
        }
    };
    match run(arguments) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("pointworkd: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run(arguments: Arguments) -> Result<()> {
    let mut log = env_logger::Builder::new();
    log.filter_level(arguments.log).format_target(false);
    if std::env::var_os("JOURNAL_STREAM").is_some() {
        // The journal has its own clock.
        log.format_timestamp(None);
    }
    log.init();
    let config = Config::load(&arguments.config)?;
    if arguments.check {
        return Ok(());
    }
    backend::daemon::run(config, || {
        if let Err(error) = sd_notify::notify(&[sd_notify::NotifyState::Ready]) {
            warn!("systemd cannot be told that the daemon is ready: {error}");
        }
    })
}
