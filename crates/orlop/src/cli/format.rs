//! Tables, ages and the machine-readable formats.

use std::io::Write as _;

use jiff::{Span, SpanRound, Timestamp, Unit};
use serde::Serialize;

use crate::args::Format;

/// A table with aligned columns, as kubectl prints them.
#[derive(Debug, Default)]
pub(crate) struct Table {
    rows: Vec<Vec<String>>,
}

impl Table {
    /// A table with these column heads.
    pub(crate) fn new(heads: &[&str]) -> Self {
        Self { rows: vec![heads.iter().map(|head| (*head).to_owned()).collect()] }
    }

    /// Adds a row.
    pub(crate) fn push(&mut self, row: Vec<String>) {
        self.rows.push(row);
    }

    /// Whether it has no rows below its heads.
    pub(crate) fn is_empty(&self) -> bool {
        self.rows.len() < 2
    }

    /// The text: columns padded to their widest cell and three spaces apart.
    pub(crate) fn render(&self) -> String {
        let columns = self.rows.iter().map(Vec::len).max().unwrap_or(0);
        let width =
            |column: usize| self.rows.iter().filter_map(|row| row.get(column)).map(|cell| cell.chars().count()).max();
        let widths: Vec<usize> = (0..columns).map(|column| width(column).unwrap_or(0)).collect();
        let mut text = String::new();
        for row in &self.rows {
            let cells = row.iter().zip(&widths).map(|(cell, width)| format!("{cell:<width$}"));
            text.push_str(cells.collect::<Vec<_>>().join("   ").trim_end());
            text.push('\n');
        }
        text
    }
}

/// Prints `text`; a reader that went away (as `| head`) is no error.
pub(crate) fn print(text: &str) {
    let mut stdout = std::io::stdout().lock();
    // A closed pipe is the reader's way to say that it has seen enough.
    let _ = stdout.write_all(text.as_bytes()).and_then(|()| stdout.flush());
}

/// Prints `values` as JSON or YAML; returns false when a table is wanted instead.
///
/// # Errors
/// A value that JSON cannot carry, or the names of what has none.
pub(crate) fn print_machine<T: Serialize>(format: Format, values: &T) -> anyhow::Result<bool> {
    match format {
        Format::Json => print(&format!("{}\n", serde_json::to_string_pretty(values)?)),
        Format::Yaml => print(&serde_saphyr::to_string(values)?),
        Format::Table | Format::Wide => return Ok(false),
        Format::Name => anyhow::bail!("only `ps` and `get` print names; write -o table, json or yaml"),
    }
    Ok(true)
}

/// The time since `then` in kubectl's short form: `35s`, `4m10s`, `3h5m`, `2d4h`.
pub(crate) fn age(then: Option<Timestamp>, now: Timestamp) -> String {
    let Some(then) = then else { return "<unknown>".to_owned() };
    let seconds = now.duration_since(then).as_secs().max(0);
    let (days, hours, minutes) = (seconds / 86400, seconds / 3600, seconds / 60);
    match seconds {
        0..=119 => format!("{seconds}s"),
        120..=599 => pair(minutes, 'm', seconds % 60, 's'),
        600..=10_799 => format!("{minutes}m"),
        10_800..=28_799 => pair(hours, 'h', minutes % 60, 'm'),
        28_800..=172_799 => format!("{hours}h"),
        172_800..=691_199 => pair(days, 'd', hours % 24, 'h'),
        _ => format!("{days}d"),
    }
}

fn pair(large: i64, large_unit: char, small: i64, small_unit: char) -> String {
    if small == 0 { format!("{large}{large_unit}") } else { format!("{large}{large_unit}{small}{small_unit}") }
}

/// Bytes with a binary unit: `512Ki`, `64Mi`, `1.5Gi`.
pub(crate) fn bytes(count: u64) -> String {
    const UNITS: [(u64, &str); 3] = [(1 << 30, "Gi"), (1 << 20, "Mi"), (1 << 10, "Ki")];
    for (size, unit) in UNITS {
        if count >= size {
            let tenths = count * 10 / size;
            let fraction =
                if tenths.is_multiple_of(10) || tenths >= 1000 { String::new() } else { format!(".{}", tenths % 10) };
            return format!("{}{fraction}{unit}", tenths / 10);
        }
    }
    count.to_string()
}

/// Parses a duration as kubectl writes it: `90s`, `5m`, `1h30m`.
///
/// # Errors
/// The text is not one.
pub(crate) fn parse_duration(text: &str) -> anyhow::Result<u64> {
    let span: Span = text.parse().map_err(|_| anyhow::anyhow!("{text:?} is no duration; write 30s, 5m or 1h30m"))?;
    let seconds = span.round(SpanRound::new().largest(Unit::Second))?.get_seconds();
    u64::try_from(seconds).map_err(|_| anyhow::anyhow!("{text:?} lies in the future"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ages_as_kubectl_prints_them() {
        let then = Timestamp::UNIX_EPOCH;
        for (seconds, expect) in [
            (5, "5s"),
            (119, "119s"),
            (250, "4m10s"),
            (600, "10m"),
            (11_100, "3h5m"),
            (187_200, "2d4h"),
            (900_000, "10d"),
        ] {
            let now = Timestamp::from_second(seconds).unwrap();
            assert_eq!(age(Some(then), now), expect);
        }
    }

    #[test]
    fn bytes_have_binary_units() {
        for (count, expect) in [(0, "0"), (1023, "1023"), (1536, "1.5Ki"), (64 << 20, "64Mi"), (3 << 29, "1.5Gi")] {
            assert_eq!(bytes(count), expect);
        }
    }

    #[test]
    fn durations() {
        assert_eq!(parse_duration("1h30m").unwrap(), 5400);
        assert!(parse_duration("soon").is_err());
    }

    #[test]
    fn columns_are_aligned() {
        let mut table = Table::new(&["NAME", "READY"]);
        table.push(vec!["a-long-name".into(), "1/1".into()]);
        assert_eq!(table.render(), "NAME          READY\na-long-name   1/1\n");
    }
}
