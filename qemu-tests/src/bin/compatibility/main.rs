//! Runs front-ends against `pointworkd`, and writes `docs/compatibility.md`.

use std::path::{Path, PathBuf};
use std::process::ExitCode;

use anyhow::{Context, Result, ensure};
use clap::Parser;
use qemu_tests::host::run_to_end;
use qemu_tests::matrix::page::{Part, counts, table};
use qemu_tests::matrix::{Outcome, Row, rows};
use qemu_tests::report::step;

/// Puts front-ends through the same: packets one by one and many at a time, the end and return of the front-end
/// and of the daemon; and says what became of each.
#[derive(Parser)]
#[command(name = "scripts/test --matrix")]
struct Options {
    /// Run only rows whose description has this in it.
    #[arg(long, default_value = "", conflicts_with = "update")]
    only: String,
    /// Write the table into docs/compatibility.md.
    #[arg(long)]
    update: bool,
    /// The output of runs of the hostile suite, the migration tests and the fuzzers, whose counts are written there too.
    #[arg(long, requires = "update")]
    log: Option<PathBuf>,
    /// Write what was measured to this file, as JSON.
    #[arg(long)]
    json: Option<PathBuf>,
}

fn main() -> ExitCode {
    let options = Options::parse();
    run_to_end(|| run(&options))
}

fn run(options: &Options) -> Result<()> {
    let mut done: Vec<(Row, Outcome)> = Vec::new();
    for row in rows() {
        let name = row.to_string();
        if name.contains(&options.only) {
            let outcome =
                step(&format!("{name:<84}"), |o: &Outcome| format!("{}; {}", o.ping, o.bulk), || row.run())?;
            done.push((row, outcome));
        }
    }
    ensure!(!done.is_empty(), "no row has '{}' in its description", options.only);
    if let Some(path) = &options.json {
        let rows: Vec<_> = done.iter().map(|(row, outcome)| (row.to_string(), outcome)).collect();
        std::fs::write(path, serde_json::to_string_pretty(&rows)?)
            .with_context(|| path.display().to_string())?;
    }
    if options.update {
        let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../docs/compatibility.md");
        let page = std::fs::read_to_string(&path).with_context(|| path.display().to_string())?;
        let mut page = Part::Matrix.replace(&page, &table(&done))?;
        if let Some(log) = &options.log {
            let log = std::fs::read_to_string(log).with_context(|| log.display().to_string())?;
            let counts: String = counts(&log).iter().map(|line| format!("* {line}\n")).collect();
            ensure!(!counts.is_empty(), "nothing was counted");
            page = Part::Counts.replace(&page, &counts)?;
        }
        std::fs::write(&path, page)?;
    }
    Ok(())
}
