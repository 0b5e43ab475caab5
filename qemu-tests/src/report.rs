//! What a person sees of a run: a line for each step, and a table at the end.

use std::io::Write as _;
use std::time::Instant;

use anyhow::Result;

/// Runs one step of a longer run: its name is printed before it, its result and how long it took after it.
pub fn step<T>(name: &str, result: impl FnOnce(&T) -> String, work: impl FnOnce() -> Result<T>) -> Result<T> {
    let start = Instant::now();
    print!("{name:<36}");
    // Only the look of the progress depends on it.
    let _ = std::io::stdout().flush();
    let outcome = work();
    match &outcome {
        Ok(value) => println!(" {} ({:.1} s)", result(value), start.elapsed().as_secs_f64()),
        Err(_) => println!(" failed"),
    }
    outcome
}

/// A table of two columns.
#[derive(Debug, Default)]
pub struct Table(Vec<(String, String)>);

impl Table {
    /// Adds a row.
    pub fn row(&mut self, label: &str, value: impl ToString) {
        self.0.push((label.into(), value.to_string()));
    }
}

impl std::fmt::Display for Table {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let width = |side: fn(&(String, String)) -> &String| {
            self.0.iter().map(|row| side(row).chars().count()).max().unwrap_or(0)
        };
        let (left, right) = (width(|row| &row.0), width(|row| &row.1));
        let line = format!("+{}+{}+", "-".repeat(left + 2), "-".repeat(right + 2));
        writeln!(f, "{line}")?;
        for (label, value) in &self.0 {
            writeln!(f, "| {label:<left$} | {value:<right$} |")?;
        }
        writeln!(f, "{line}")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_table_is_as_wide_as_its_content() {
        let mut table = Table::default();
        table.row("ping", "0 lost");
        table.row("flows", 12);
        let expected = "+-------+--------+\n| ping  | 0 lost |\n| flows | 12     |\n+-------+--------+\n";
        assert_eq!(table.to_string(), expected);
    }
}
