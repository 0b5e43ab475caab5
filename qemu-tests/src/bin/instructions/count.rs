//! Builds the benchmarks and counts their instructions.
//!
//! So that the same code gives the same counts everywhere: the environment is empty (its length moves the stack), libc's
//! functions for memory are those that every x86-64 processor has, and the benchmarks themselves draw nothing at random and
//! decide nothing by a clock.

use std::fmt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

use anyhow::{Context, Result, bail, ensure};
use serde_json::Value;
use tempfile::TempDir;

use crate::table::Row;

/// Benchmarks that count, by package.
const BENCHMARKS: [(&str, &str); 2] = [("switch-core", "switch"), ("backend", "worker")];

/// Older and newer libraries have different names for the same; what they do not know they pass over.
const TUNABLES: &str =
    "glibc.cpu.hwcaps=-AVX512F,-AVX512VL,-AVX2,-AVX2_Usable,-AVX_Fast_Unaligned_Load,-ERMS,-FSRM";

/// The compiler, as far as counts depend on it.
pub struct Compiler {
    version: String,
    target: String,
}

impl Compiler {
    /// The one that cargo uses here.
    pub fn present() -> Result<Compiler> {
        let text = output(Command::new("rustc").arg("-vV"))?;
        let target = text.lines().find_map(|line| line.strip_prefix("host: "));
        Ok(Compiler {
            version: text.lines().next().unwrap_or_default().to_owned(),
            target: target.context("rustc names no host")?.to_owned(),
        })
    }
}

impl fmt::Display for Compiler {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} for {}", self.version, self.target)
    }
}

/// The commit that is measured, as the table names it.
pub fn commit(root: &Path) -> Result<String> {
    let git = |arguments: &[&str]| output(Command::new("git").current_dir(root).args(arguments));
    let head = git(&["rev-parse", "--short=12", "HEAD"])?;
    let changes = git(&["status", "--porcelain", "--", ".", ":!docs"])?;
    let changed = if changes.is_empty() { "" } else { " and what was changed together with this table" };
    Ok(format!("`{}`{changed}", head.trim()))
}

fn output(command: &mut Command) -> Result<String> {
    let output = command.stderr(Stdio::inherit()).output().with_context(|| format!("{command:?}"))?;
    ensure!(output.status.success(), "{command:?}: {}", output.status);
    Ok(String::from_utf8(output.stdout)?)
}

/// Instructions of all rows, in the order of the benchmarks.
pub fn measure(root: &Path) -> Result<Vec<Row>> {
    let benchmarks = build(root)?;
    // One processor each.
    let running = benchmarks.iter().map(|benchmark| Running::start(benchmark)).collect::<Result<Vec<_>>>()?;
    let mut rows = vec![];
    for run in running {
        rows.extend(run.finish()?);
    }
    Ok(rows)
}

/// Builds the benchmarks as they are released; flags of the environment would change what is counted.
fn build(root: &Path) -> Result<Vec<PathBuf>> {
    let mut cargo = Command::new("cargo");
    cargo.args(["bench", "--quiet", "--no-run", "--message-format=json-render-diagnostics"]);
    for (package, benchmark) in BENCHMARKS {
        cargo.args(["--package", package, "--bench", benchmark]);
    }
    for flags in ["RUSTFLAGS", "CARGO_ENCODED_RUSTFLAGS", "CARGO_BUILD_RUSTFLAGS"] {
        cargo.env_remove(flags);
    }
    let messages = output(cargo.current_dir(root))?;
    let artifacts = messages.lines().filter_map(|line| serde_json::from_str::<Value>(line).ok());
    let built: Vec<_> = artifacts
        .filter(|artifact| artifact["target"]["kind"][0] == "bench")
        .filter_map(|artifact| {
            Some((artifact["target"]["name"].as_str()?.to_owned(), artifact["executable"].as_str()?.into()))
        })
        .collect();
    BENCHMARKS
        .iter()
        .map(|(_, name)| {
            let found = built.iter().find(|(built, _): &&(String, PathBuf)| built == name);
            Ok(found.with_context(|| format!("cargo did not build the benchmark {name}"))?.1.clone())
        })
        .collect()
}

/// A benchmark under callgrind.
struct Running {
    child: Child,
    dir: TempDir,
}

impl Running {
    fn start(benchmark: &Path) -> Result<Running> {
        let dir = tempfile::tempdir()?;
        let file = |name: &str| std::fs::File::create(dir.path().join(name));
        let child = Command::new("valgrind")
            .args(["--tool=callgrind", "--callgrind-out-file=dump"])
            // The functions of switch-core/benches/switch/meter.rs.
            .args([
                "--toggle-collect=*meter*measured*",
                "--zero-before=*warmed_up*",
                "--dump-before=*row_ends*",
            ])
            .arg(benchmark)
            .arg("--instructions")
            .current_dir(dir.path())
            .env_clear()
            .env("PATH", "/usr/local/bin:/usr/bin:/bin")
            .env("GLIBC_TUNABLES", TUNABLES)
            .stdin(Stdio::null())
            .stdout(file("rows")?)
            .stderr(file("log")?)
            .spawn()
            .context("valgrind")?;
        Ok(Running { child, dir })
    }

    /// The rows that it has printed, each with what callgrind has dumped for it.
    fn finish(mut self) -> Result<Vec<Row>> {
        let status = self.child.wait()?;
        let read = |name: &str| std::fs::read_to_string(self.dir.path().join(name));
        if !status.success() {
            bail!("a benchmark failed under callgrind ({status}):\n{}", read("log")?);
        }
        let rows = read("rows")?;
        let rows = rows.lines().zip(1..).map(|(line, number)| {
            let (name, units) = line.split_once('\t').with_context(|| format!("not a row: {line}"))?;
            let dump = read(&format!("dump.{number}")).with_context(|| format!("{name} was not counted"))?;
            let total = dump.lines().find_map(|line| line.strip_prefix("totals: "));
            let total: u64 = total.with_context(|| format!("{name}: a dump without its total"))?.parse()?;
            ensure!(total > 0, "{name}: nothing was collected");
            Ok(Row { name: name.to_owned(), instructions: total as f64 / units.parse::<f64>()? })
        });
        rows.collect()
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        // Another benchmark has failed; neither call does anything to a program that has ended.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
