//! Aligned columns for terminals, and numbers that people can read.

use std::fmt;

/// How a column is aligned.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Align {
    /// Text.
    Left,
    /// Numbers.
    Right,
}

/// Rows of text in aligned columns, two spaces between them, with a heading.
pub struct Table {
    align: Vec<Align>,
    rows: Vec<Vec<String>>,
}

impl Table {
    /// A table with these columns.
    pub fn new<const N: usize>(columns: [(&str, Align); N]) -> Table {
        Table {
            align: columns.iter().map(|&(_, align)| align).collect(),
            rows: vec![columns.iter().map(|&(heading, _)| heading.to_owned()).collect()],
        }
    }

    /// Adds a row; cells beyond the columns are not shown.
    pub fn row<const N: usize>(&mut self, cells: [String; N]) {
        self.rows.push(cells.into());
    }

    /// Whether there is nothing but the heading.
    pub fn is_empty(&self) -> bool {
        self.rows.len() == 1
    }
}

impl fmt::Display for Table {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let width = |column: usize| {
            let cells = self.rows.iter().filter_map(|row| row.get(column));
            cells.map(|cell| cell.chars().count()).max().unwrap_or(0)
        };
        let widths: Vec<usize> = (0..self.align.len()).map(width).collect();
        for row in &self.rows {
            let mut line = String::new();
            for ((cell, align), width) in row.iter().zip(&self.align).zip(&widths) {
                if !line.is_empty() {
                    line.push_str("  ");
                }
                match align {
                    Align::Left => line.push_str(&format!("{cell:<width$}")),
                    Align::Right => line.push_str(&format!("{cell:>width$}")),
                }
            }
            writeln!(f, "{}", line.trim_end())?;
        }
        Ok(())
    }
}

/// `1234567` as `1,234,567`.
pub fn grouped(number: u64) -> String {
    let digits = number.to_string();
    let mut text = String::with_capacity(digits.len() + digits.len() / 3);
    for (i, digit) in digits.chars().enumerate() {
        if i > 0 && (digits.len() - i).is_multiple_of(3) {
            text.push(',');
        }
        text.push(digit);
    }
    text
}

/// A quantity with a decimal prefix and three digits or so: `1.23 G`, `45.6 k`, `789`.
pub fn scaled(number: f64) -> String {
    let (mut value, mut prefix) = (number, "");
    for next in ["k", "M", "G", "T", "P", "E"] {
        if value < 999.5 {
            break;
        }
        value /= 1000.0;
        prefix = next;
    }
    let decimals = match value {
        _ if prefix.is_empty() && value.fract() == 0.0 => 0,
        v if v < 9.995 => 2,
        v if v < 99.95 => 1,
        _ => 0,
    };
    if prefix.is_empty() { format!("{value:.decimals$}") } else { format!("{value:.decimals$} {prefix}") }
}

/// Bytes with a binary prefix and three digits or so: `1.23 GiB`, `45.6 KiB`, `789 B`.
pub fn bytes(number: u64) -> String {
    let (mut value, mut prefix) = (number as f64, "");
    for next in ["Ki", "Mi", "Gi", "Ti", "Pi", "Ei"] {
        if value < 1023.5 {
            break;
        }
        value /= 1024.0;
        prefix = next;
    }
    let decimals = match value {
        v if prefix.is_empty() || v.fract() == 0.0 => 0,
        v if v < 9.995 => 2,
        v if v < 99.95 => 1,
        _ => 0,
    };
    format!("{value:.decimals$} {prefix}B")
}

/// `part` of `whole` in percent; `-` if there is no whole.
pub fn percent(part: u64, whole: u64) -> String {
    if whole == 0 { "-".into() } else { format!("{:.1} %", part as f64 * 100.0 / whole as f64) }
}

/// Seconds as the two largest units: `3d 4h`, `5m 6s`, `7s`.
pub fn duration(seconds: f64) -> String {
    let seconds = seconds.max(0.0) as u64;
    let units =
        [("d", seconds / 86_400), ("h", seconds / 3600 % 24), ("m", seconds / 60 % 60), ("s", seconds % 60)];
    let first = units.iter().position(|&(_, n)| n > 0).unwrap_or(3);
    let shown: Vec<String> = units.iter().skip(first).take(2).map(|(unit, n)| format!("{n}{unit}")).collect();
    shown.join(" ")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bytes_are_powers_of_two() {
        let shown = [0, 1023, 1024, 1 << 30, 3 << 29, 45_000, 999 << 20].map(bytes);
        assert_eq!(shown, ["0 B", "1023 B", "1 KiB", "1 GiB", "1.50 GiB", "43.9 KiB", "999 MiB"]);
    }

    #[test]
    fn columns_are_aligned() {
        let mut table = Table::new([("PORT", Align::Left), ("N", Align::Right), ("TEXT", Align::Left)]);
        assert!(table.is_empty());
        table.row(["a".into(), "1,000".into(), "x".into()]);
        table.row(["longer".into(), "7".into(), String::new()]);
        assert!(!table.is_empty());
        assert_eq!(table.to_string(), "PORT        N  TEXT\na       1,000  x\nlonger      7\n");
    }

    #[test]
    fn numbers_are_readable() {
        for (number, text) in [
            (0, "0"),
            (999, "999"),
            (1000, "1,000"),
            (1_234_567, "1,234,567"),
            (u64::MAX, "18,446,744,073,709,551,615"),
        ] {
            assert_eq!(grouped(number), text);
        }
        for (number, text) in [
            (0.0, "0"),
            (7.0, "7"),
            (0.5, "0.50"),
            (999.0, "999"),
            (999.9, "1.00 k"),
            (1000.0, "1.00 k"),
            (12_345.0, "12.3 k"),
            (9.996e6, "10.0 M"),
            (123_456_789.0, "123 M"),
            (1.8e19, "18.0 E"),
        ] {
            assert_eq!(scaled(number), text);
        }
        assert_eq!((percent(1, 3), percent(0, 0)), ("33.3 %".into(), "-".into()));
        for (seconds, text) in [
            (0.0, "0s"),
            (7.9, "7s"),
            (306.0, "5m 6s"),
            (3600.0, "1h 0m"),
            (273_601.0, "3d 4h"),
            (-1.0, "0s"),
        ] {
            assert_eq!(duration(seconds), text);
        }
    }
}
