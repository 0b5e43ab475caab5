//! The page that shows the matrix: what is written between its marks, and whether its rows are those that are run.

use std::fmt::Write as _;
use std::time::Duration;

use anyhow::{Context, Result};

use super::{Outcome, Row, rows};

/// The columns that say which row it is, and those that say what became of it.
const NAMES: [&str; 5] = ["front-end", "rings", "offloads", "queue pairs", "port's mode"];
const OUTCOMES: [&str; 4] = ["ping", "bulk", "reconnect", "restart"];

/// A part of the page that is written by a run.
#[derive(Clone, Copy, Debug)]
pub enum Part {
    /// The table.
    Matrix,
    /// What other runs have counted.
    Counts,
}

impl Part {
    fn marks(self) -> [&'static str; 2] {
        match self {
            Part::Matrix => ["<!-- matrix -->\n", "<!-- end of matrix -->\n"],
            Part::Counts => ["<!-- counts -->\n", "<!-- end of counts -->\n"],
        }
    }

    /// What the page has there.
    ///
    /// # Errors
    /// If the page has no such part.
    pub fn of(self, page: &str) -> Result<&str> {
        let [begin, end] = self.marks();
        let inside = page.split_once(begin).and_then(|(_, rest)| rest.split_once(end));
        Ok(inside.with_context(|| format!("the page has no {}", begin.trim()))?.0)
    }

    /// The page with `text` there.
    ///
    /// # Errors
    /// As for [`of`](Self::of).
    pub fn replace(self, page: &str, text: &str) -> Result<String> {
        let [begin, end] = self.marks();
        let old = self.of(page)?;
        Ok(page.replace(&format!("{begin}{old}{end}"), &format!("{begin}{text}{end}")))
    }
}

fn cells(row: &Row) -> [String; 5] {
    [row.frontend(), row.rings, row.offloads, &row.queues.to_string(), row.mode()].map(str::to_owned)
}

/// The table of these rows.
pub fn table(rows: &[(Row, Outcome)]) -> String {
    let line = |cells: &[String]| format!("| {} |\n", cells.join(" | "));
    let mut text = line(&NAMES.iter().chain(&OUTCOMES).map(|name| (*name).to_owned()).collect::<Vec<_>>());
    let _ = writeln!(text, "|{}", "---|".repeat(NAMES.len() + OUTCOMES.len()));
    let seconds = |time: Duration| format!("{:.1} s", time.as_secs_f64());
    for (row, Outcome { ping, bulk, reconnect, restart }) in rows {
        let outcome = [ping.clone(), bulk.clone(), seconds(*reconnect), seconds(*restart)];
        text += &line(&[cells(row).as_slice(), &outcome].concat());
    }
    text
}

/// How the rows of the page's table differ from those that are run; nothing if they do not.
///
/// # Errors
/// If the page has no table.
pub fn differences(page: &str) -> Result<Vec<String>> {
    let listed: Vec<String> = Part::Matrix
        .of(page)?
        .lines()
        .skip(2)
        .filter_map(|line| {
            Some(line.strip_prefix("| ")?.split(" | ").take(NAMES.len()).collect::<Vec<_>>().join(" | "))
        })
        .collect();
    let run: Vec<String> = rows().iter().map(|row| cells(row).join(" | ")).collect();
    let only_in = |some: &[String], others: &[String], what: &str| -> Vec<String> {
        some.iter().filter(|row| !others.contains(row)).map(|row| format!("{what}: {row}")).collect()
    };
    let mut found =
        [only_in(&listed, &run, "listed, not run"), only_in(&run, &listed, "run, not listed")].concat();
    if found.is_empty() && listed != run {
        found.push("rows are listed twice, or in another order than they are run".to_owned());
    }
    Ok(found)
}

/// What the hostile suite, the fuzzers and the migration tests say of themselves in the output of a run, as a list.
pub fn counts(log: &str) -> Vec<String> {
    let mut target = "?";
    // Of this target; a crash is written before its numbers are.
    let (mut crashed, mut inputs) = (false, "?");
    let mut found = Vec::new();
    for line in log.lines() {
        if let Some(name) = line.strip_prefix("== ") {
            (target, crashed, inputs) = (name, false, "?");
        } else if let Some((_, executed)) = line.split_once("stat::number_of_executed_units:") {
            inputs = executed.trim();
        } else if let Some((_, files)) = line.split_once("stat::corpus_files:") {
            let outcome = if crashed { "a crash" } else { "no crash" };
            let corpus = files.trim();
            found.push(format!("fuzzing `{target}`: {inputs} inputs, {corpus} in the corpus, {outcome}"));
        } else if let Some(artifact) = line.split_once("Test unit written to ") {
            crashed = true;
            found.push(format!("fuzzing: a crash, {}", artifact.1.rsplit('/').next().unwrap_or_default()));
        } else if line.contains(" cases: ") && line.contains("faults") {
            found.push(format!("hostile guests: {line}"));
        } else if line.contains(": complete in ") && line.contains("downtime") {
            // Without captured output the test's name comes first.
            let line = line.split_once(" ... ").map_or(line, |(_, line)| line);
            // Or, where tests are not named, a dot for the one before.
            found.push(format!("live migration, {}", line.trim_start_matches('.')));
        }
    }
    found
}

#[cfg(test)]
mod tests {
    use super::*;

    fn page() -> String {
        let [begin, end] = Part::Matrix.marks();
        format!("# Title\n\n{begin}{end}\nmore\n")
    }

    #[test]
    fn a_table_that_was_written_lists_what_is_run() {
        assert_eq!(differences(&page()).unwrap().len(), rows().len(), "nothing is listed");
        let outcome = Outcome {
            ping: "all".into(),
            bulk: "much".into(),
            reconnect: Duration::from_millis(1240),
            restart: Duration::from_secs(2),
        };
        let mut all: Vec<_> = rows().into_iter().map(|row| (row, outcome.clone())).collect();
        let written = Part::Matrix.replace(&page(), &table(&all)).unwrap();
        assert_eq!(differences(&written).unwrap(), Vec::<String>::new());
        assert!(
            written.contains(" | all | much | 1.2 s | 2.0 s |\n") && written.ends_with("\nmore\n"),
            "{written}"
        );
        all.swap(0, 1);
        let swapped = Part::Matrix.replace(&written, &table(&all)).unwrap();
        assert_eq!(differences(&swapped).unwrap().len(), 1);
        let (row, _) = all.pop().unwrap();
        let short = Part::Matrix.replace(&written, &table(&all)).unwrap();
        assert_eq!(differences(&short).unwrap(), [format!("run, not listed: {}", cells(&row).join(" | "))]);
        assert!(differences("no table").is_err());
    }

    #[test]
    fn rows_differ_in_what_is_shown_of_them() {
        let mut shown: Vec<_> = rows().iter().map(cells).collect();
        let all = shown.len();
        shown.sort();
        shown.dedup();
        assert_eq!(shown.len(), all);
    }

    #[test]
    fn counts_are_found_in_a_run() {
        let log = "== bad\nTest unit written to artifacts/bad/crash-1\nstat::number_of_executed_units: 9\n\
                   stat::corpus_files: 4\n\
                   == odp\nINFO: x\nstat::number_of_executed_units: 123\nstat::corpus_files: 45\nrunning 1 test\n\
                   10000 cases: [1, 2] faults, [3, 4] frames delivered (split, packed)\n\
                   test moves ... packed true: complete in 2s, downtime 60ms as QEMU says; 70 pings\ntest ok\n\
                   .packed false: complete in 2s, downtime 60ms as QEMU says; 70 pings\n";
        let counts = counts(log);
        assert_eq!(counts.len(), 6, "{counts:?}");
        let bad = "fuzzing `bad`: 9 inputs, 4 in the corpus, a crash";
        assert_eq!(counts[..2], ["fuzzing: a crash, crash-1", bad]);
        assert_eq!(counts[2], "fuzzing `odp`: 123 inputs, 45 in the corpus, no crash");
        assert!(counts[3].starts_with("hostile guests: 10000 cases"), "{counts:?}");
        assert!(counts[4].starts_with("live migration, packed true"), "{counts:?}");
        assert!(counts[5].starts_with("live migration, packed false"), "{counts:?}");
    }
}
