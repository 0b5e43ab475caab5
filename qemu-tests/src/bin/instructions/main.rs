//! Counts instructions of the benchmarks' rows, and compares them with the table in `docs/performance.md`.

mod count;
mod table;

use std::path::{Path, PathBuf};
use std::process::ExitCode;

use anyhow::{Context, Result, ensure};
use clap::Parser;

use count::{Compiler, commit, measure};
use qemu_tests::host::run_to_end;
use table::{Table, compare};

/// Counts the instructions that a packet costs, under callgrind, and shows how they differ from the table in
/// docs/performance.md.
///
/// Counts do not depend on how fast a machine is or what else it does, so this can run anywhere. They do depend on the
/// compiler: the table names it, and with another one no difference is judged.
#[derive(Parser)]
#[command(name = "scripts/instructions")]
struct Options {
    /// Fail if a row has grown by more than 5 %, if rows and table are not the same, or if a curve is not flat.
    #[arg(long)]
    check: bool,
    /// Write what was measured into the table, with the commit.
    #[arg(long, conflicts_with = "check")]
    update: bool,
}

fn main() -> ExitCode {
    let options = Options::parse();
    run_to_end(|| run(&options))
}

fn run(options: &Options) -> Result<()> {
    let root: PathBuf = Path::new(env!("CARGO_MANIFEST_DIR")).join("..");
    let path = root.join("docs/performance.md");
    let page = std::fs::read_to_string(&path).with_context(|| path.display().to_string())?;
    let table = Table::read(&page)?;
    let compiler = Compiler::present()?.to_string();
    let rows = measure(&root)?;
    let findings = compare(&table, &rows, &compiler);
    print!("{}", table.differences(&rows));
    for hint in &findings.hints {
        println!("{hint}");
    }
    if options.update {
        let table = Table { commit: commit(&root)?, compiler, rows };
        std::fs::write(&path, table.write(&page)?).with_context(|| path.display().to_string())?;
        println!("the table in docs/performance.md is new");
    }
    // A new table makes good what is wrong with the old one, but no curve flat.
    let of_table = if options.update { &[][..] } else { &findings.problems };
    let problems: Vec<_> = of_table.iter().chain(&findings.curves).collect();
    problems.iter().for_each(|problem| eprintln!("{problem}"));
    ensure!(
        problems.is_empty() || !options.check,
        "instructions are not as docs/performance.md has them. If that is meant, run scripts/instructions --update and commit \
         the table with the change; else see there how to find what has grown"
    );
    Ok(())
}
