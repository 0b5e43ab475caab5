//! The table in `docs/performance.md`, and what is to be said about a difference.

use std::collections::BTreeSet;
use std::fmt::Write;

use anyhow::{Context, Result, ensure};

/// The table is between these lines.
const BEGIN: &str = "<!-- Written by scripts/instructions --update. -->";
const END: &str = "<!-- End of what scripts/instructions has written. -->";

/// How much a row may grow without a new table, and how far apart the points of a curve may be.
const TOLERANCE: f64 = 1.05;

/// A measured row.
#[derive(Clone, Debug, PartialEq)]
pub struct Row {
    /// As the benchmark calls it. `curve=n` is the point of a curve.
    pub name: String,
    /// For a packet, or what else the row is about.
    pub instructions: f64,
}

/// What was measured, when and by what.
#[derive(Debug, PartialEq)]
pub struct Table {
    /// What was measured.
    pub commit: String,
    /// What compiled it.
    pub compiler: String,
    /// The rows.
    pub rows: Vec<Row>,
}

/// What there is to say about a measurement.
#[derive(Debug, Default)]
pub struct Findings {
    /// What a new table makes right.
    pub problems: Vec<String>,
    /// What it does not.
    pub curves: Vec<String>,
    /// What nobody has to act on.
    pub hints: Vec<String>,
}

impl Table {
    /// Reads it out of the page.
    pub fn read(page: &str) -> Result<Table> {
        let (_, text, _) = split(page)?;
        let after = |label: &str| {
            let found = text.lines().find_map(|line| line.strip_prefix(label));
            found.map(|line| line.trim_end_matches('\\').to_owned())
        };
        let mut rows = vec![];
        for line in text.lines().filter(|line| line.starts_with("| ")).skip(1) {
            let mut cells = line.trim_matches('|').split('|').map(str::trim);
            let (name, instructions) = (cells.next(), cells.next().and_then(|cell| cell.parse().ok()));
            let (name, instructions) =
                name.zip(instructions).with_context(|| format!("not a row: {line}"))?;
            rows.push(Row { name: name.to_owned(), instructions });
        }
        Ok(Table {
            commit: after(COMMIT).unwrap_or_default(),
            compiler: after(COMPILER).unwrap_or_default(),
            rows,
        })
    }

    /// The page with this table in the place of its own.
    pub fn write(&self, page: &str) -> Result<String> {
        let (before, _, after) = split(page)?;
        let Table { commit, compiler, rows } = self;
        let mut text =
            format!("\n{COMMIT}{commit}\\\n{COMPILER}{compiler}\n\n| row | instructions |\n|---|---|\n");
        for row in rows {
            let _ = writeln!(text, "| {} | {} |", row.name, shown(row.instructions));
        }
        Ok(format!("{before}{BEGIN}\n{text}\n{END}{after}"))
    }

    /// Every row that was measured, beside what the table has.
    pub fn differences(&self, rows: &[Row]) -> String {
        let mut text = format!("{:32} {:>8} {:>8}\n", "instructions", "table", "now");
        for row in rows {
            let old = self.get(&row.name);
            let (was, change) = match old {
                Some(old) => (shown(old), change(old, row.instructions)),
                None => ("-".into(), String::new()),
            };
            let line = format!("{:32} {:>8} {:>8}  {change}", row.name, was, shown(row.instructions));
            let _ = writeln!(text, "{}", line.trim_end());
        }
        text
    }

    fn get(&self, name: &str) -> Option<f64> {
        self.rows.iter().find(|row| row.name == name).map(|row| row.instructions)
    }
}

const COMMIT: &str = "Commit: ";
const COMPILER: &str = "Compiler: ";

fn split(page: &str) -> Result<(&str, &str, &str)> {
    let missing = || format!("docs/performance.md lacks the line {BEGIN} or {END}");
    let (before, rest) = page.split_once(BEGIN).with_context(missing)?;
    let (text, after) = rest.split_once(END).with_context(missing)?;
    ensure!(!after.contains(BEGIN), "docs/performance.md has two tables");
    Ok((before, text, after))
}

fn shown(instructions: f64) -> String {
    if instructions < 100.0 { format!("{instructions:.1}") } else { format!("{instructions:.0}") }
}

fn change(from: f64, to: f64) -> String {
    match (to / from - 1.0) * 100.0 {
        percent if percent.abs() < 0.5 => String::new(),
        percent => format!("{percent:+.1} %"),
    }
}

/// Judges what was measured with `compiler`.
pub fn compare(table: &Table, rows: &[Row], compiler: &str) -> Findings {
    let mut findings = Findings::default();
    let same_compiler = table.compiler == compiler;
    if !same_compiler {
        findings.hints.push(format!(
            "the table was measured with another compiler, so growth is shown but not judged: {} there, {compiler} here",
            table.compiler
        ));
    }
    for Row { name, instructions } in rows {
        let Some(old) = table.get(name) else {
            findings.problems.push(format!("{name} is not in the table"));
            continue;
        };
        if !same_compiler {
            continue;
        }
        let said = format!("{} instructions in the table, {} now", shown(old), shown(*instructions));
        if *instructions > old * TOLERANCE {
            findings.problems.push(format!("{name} has grown: {said} ({})", change(old, *instructions)));
        } else if *instructions * TOLERANCE < old {
            findings.hints.push(format!(
                "{name} has shrunk: {said} ({}); scripts/instructions --update keeps it so",
                change(old, *instructions)
            ));
        }
    }
    for Row { name, .. } in &table.rows {
        if rows.iter().all(|row| row.name != *name) {
            findings.problems.push(format!("{name} is in the table, but there is no such row any more"));
        }
    }
    for name in rows.iter().filter_map(curve).collect::<BTreeSet<_>>() {
        let points = rows.iter().filter(|row| curve(row) == Some(name));
        let by = |a: &&Row, b: &&Row| a.instructions.total_cmp(&b.instructions);
        let (Some(least), Some(most)) = (points.clone().min_by(by), points.max_by(by)) else { continue };
        if most.instructions > least.instructions * TOLERANCE {
            findings.curves.push(format!(
                "the curve of {name} is not flat: {} instructions at {}, {} at {} ({})",
                shown(least.instructions),
                least.name,
                shown(most.instructions),
                most.name,
                change(least.instructions, most.instructions)
            ));
        }
    }
    findings
}

/// The curve that a row is a point of.
fn curve(row: &Row) -> Option<&str> {
    row.name.split_once('=').map(|(curve, _)| curve)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn rows(rows: &[(&str, f64)]) -> Vec<Row> {
        rows.iter().map(|&(name, instructions)| Row { name: name.into(), instructions }).collect()
    }

    fn table(of: &[(&str, f64)]) -> Table {
        Table { commit: "`abc`".into(), compiler: "rustc 1".into(), rows: rows(of) }
    }

    #[test]
    fn a_table_is_read_as_it_was_written() {
        let page = format!("# Page\n\n{BEGIN}\nold\n{END}\n\nmore\n");
        let new = table(&[("parse/udp4", 54.46), ("flows=64", 434.9)]);
        let written = new.write(&page).unwrap();
        assert!(written.starts_with("# Page\n\n<!--") && written.ends_with("-->\n\nmore\n"), "{written}");
        let read = Table::read(&written).unwrap();
        assert_eq!(read.rows, rows(&[("parse/udp4", 54.5), ("flows=64", 435.0)]));
        assert_eq!((&read.commit, &read.compiler), (&new.commit, &new.compiler));
        assert_eq!(read.write(&written).unwrap(), written);
        assert!(Table::read("# Page\n").is_err());
        assert!(Table::read(&written.replace("| 435 |", "| many |")).is_err());
    }

    #[test]
    fn growth_is_found_and_shrinking_is_said() {
        let old = table(&[("a", 100.0), ("b", 100.0), ("c", 100.0)]);
        let findings = compare(&old, &rows(&[("a", 104.9), ("b", 105.1), ("c", 94.0)]), "rustc 1");
        assert_eq!(findings.problems, ["b has grown: 100 instructions in the table, 105 now (+5.1 %)"]);
        assert_eq!(findings.hints.len(), 1);
        assert!(findings.hints[0].starts_with("c has shrunk"), "{findings:?}");
    }

    #[test]
    fn another_compiler_is_not_judged_but_rows_and_curves_are() {
        let old = table(&[("a", 100.0), ("gone", 1.0)]);
        let new = rows(&[("a", 200.0), ("flows=1", 100.0), ("flows=2", 103.0), ("flows=4", 106.0)]);
        let findings = compare(&old, &new, "rustc 2");
        assert!(findings.problems.iter().all(|problem| !problem.contains("grown")), "{findings:?}");
        let said = findings.problems.join("\n");
        assert!(said.contains("gone") && said.contains("flows=4 is not in the table"), "{said}");
        assert_eq!(
            findings.curves,
            ["the curve of flows is not flat: 100 instructions at flows=1, 106 at flows=4 (+6.0 %)"]
        );
        assert!(findings.hints[0].contains("another compiler"));
    }

    #[test]
    fn what_is_as_before_is_clean() {
        let old = table(&[("a", 100.0), ("flows=1", 10.0), ("flows=2", 10.4)]);
        let findings = compare(&old, &old.rows, "rustc 1");
        let Findings { problems, curves, hints } = findings;
        assert!(problems.is_empty() && curves.is_empty() && hints.is_empty());
    }
}
