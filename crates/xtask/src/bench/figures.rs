//! What was measured: owns medians over rounds, the table and the JSON line of a cell. Measures nothing.

use std::{collections::BTreeMap, io::Write as _, path::PathBuf, time::Duration};

use comfy_table::{CellAlignment, Table, presets};
use serde_json::{Value, json};

use super::machine::Machine;
use crate::{quantile::nearest_rank, system::target_dir};

/// What a figure should come to.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) enum Reach {
    AtLeast(f64),
    AtMost(f64),
}

impl Reach {
    pub(crate) fn is_met(self, value: f64) -> bool {
        match self {
            Self::AtLeast(bound) => value >= bound,
            Self::AtMost(bound) => value <= bound,
        }
    }

    fn text(self) -> String {
        match self {
            Self::AtLeast(bound) => format!("≥ {}", number(bound)),
            Self::AtMost(bound) => format!("≤ {}", number(bound)),
        }
    }
}

/// One measured value. The key is its name in the JSON line and ends in its unit.
#[derive(Debug, Clone)]
pub(crate) struct Figure {
    pub(crate) key: &'static str,
    pub(crate) label: &'static str,
    pub(crate) value: f64,
    pub(crate) reach: Option<Reach>,
}

/// The values of one round, or the medians of several.
#[derive(Debug, Clone, Default)]
pub(crate) struct Figures(pub(crate) Vec<Figure>);

impl Figures {
    pub(crate) fn push(&mut self, key: &'static str, label: &'static str, value: f64) {
        self.0.push(Figure { key, label, value, reach: None });
    }

    pub(crate) fn goal(&mut self, key: &'static str, label: &'static str, value: f64, reach: Reach) {
        self.0.push(Figure { key, label, value, reach: Some(reach) });
    }

    pub(crate) fn get(&self, key: &str) -> Option<f64> {
        self.0.iter().find(|figure| figure.key == key).map(|figure| figure.value)
    }

    /// Figure by figure the median of the rounds, in the order in which they first come.
    pub(crate) fn medians(rounds: &[Self]) -> Self {
        let mut merged: Vec<Figure> = Vec::new();
        for figure in rounds.iter().flat_map(|round| &round.0) {
            if merged.iter().any(|known| known.key == figure.key) {
                continue;
            }
            let values = rounds.iter().filter_map(|round| round.get(figure.key)).collect();
            merged.push(Figure { value: median(values), ..figure.clone() });
        }
        Self(merged)
    }

    fn json(&self) -> Value {
        let rounded = |value: f64| json!((value * 1e6).round() / 1e6);
        Value::Object(self.0.iter().map(|figure| (figure.key.to_owned(), rounded(figure.value))).collect())
    }
}

/// What a cell found on one store.
#[derive(Debug, Clone)]
pub(crate) struct Report {
    pub(crate) cell: &'static str,
    pub(crate) store: &'static str,
    pub(crate) parameters: Value,
    pub(crate) rounds: Vec<Figures>,
}

impl Report {
    pub(crate) fn medians(&self) -> Figures {
        Figures::medians(&self.rounds)
    }

    pub(crate) fn title(&self) -> String {
        format!("{} on {}", self.cell, self.store)
    }

    pub(crate) fn table(&self) -> Table {
        let mut table = Table::new();
        table.load_style(presets::ASCII_MARKDOWN);
        table.set_header(["figure", "measured", "to reach", "rounds"]);
        for figure in &self.medians().0 {
            let (reach, mark) = match figure.reach {
                Some(reach) => (reach.text(), if reach.is_met(figure.value) { " ✓" } else { " ✗" }),
                None => (String::new(), ""),
            };
            let rounds: Vec<String> =
                self.rounds.iter().filter_map(|round| round.get(figure.key)).map(number).collect();
            let rounds = if rounds.len() > 1 { rounds.join(", ") } else { String::new() };
            table.add_row([figure.label.to_owned(), number(figure.value), format!("{reach}{mark}"), rounds]);
        }
        if let Some(column) = table.column_mut(1) {
            column.set_cell_alignment(CellAlignment::Right);
        }
        table
    }

    /// Appends the JSON line to the file that keeps every measurement of this cell on this machine.
    pub(crate) fn append(&self, machine: &Machine) -> anyhow::Result<PathBuf> {
        let folder = target_dir().join("bench");
        std::fs::create_dir_all(&folder)?;
        let path = folder.join(format!("{}.jsonl", self.cell));
        let mut file = std::fs::OpenOptions::new().create(true).append(true).open(&path)?;
        let mut line = BTreeMap::from([
            ("cell", json!(self.cell)),
            ("store", json!(self.store)),
            ("parameters", self.parameters.clone()),
            ("figures", self.medians().json()),
            ("rounds", self.rounds.iter().map(Figures::json).collect()),
        ]);
        line.extend(machine.facts());
        writeln!(file, "{}", serde_json::to_string(&line)?)?;
        Ok(path)
    }
}

/// A number with as many digits as it is worth.
pub(crate) fn number(value: f64) -> String {
    let digits = match value.abs() {
        _ if value.is_nan() => return "–".to_owned(),
        size if size >= 1000.0 => return grouped(value),
        size if size >= 100.0 => 0,
        size if size >= 10.0 => 1,
        size if size >= 1.0 => 2,
        _ => 3,
    };
    let text = format!("{value:.digits$}");
    if text.contains('.') { text.trim_end_matches('0').trim_end_matches('.').to_owned() } else { text }
}

fn grouped(value: f64) -> String {
    let text = format!("{value:.0}");
    let (sign, digits) = text.strip_prefix('-').map_or(("", text.as_str()), |digits| ("-", digits));
    let first = digits.len() % 3;
    let groups = digits.as_bytes()[first..].chunks(3).map(|group| String::from_utf8_lossy(group).into_owned());
    let head = (first > 0).then(|| digits[..first].to_owned());
    format!("{sign}{}", head.into_iter().chain(groups).collect::<Vec<_>>().join(","))
}

/// Times of single events, for their quantiles.
#[derive(Debug, Clone, Default)]
pub(crate) struct Times {
    ms: Vec<f64>,
    is_sorted: bool,
}

impl Times {
    pub(crate) fn add(&mut self, took: Duration) {
        self.add_ms(took.as_secs_f64() * 1000.0);
    }

    pub(crate) fn add_ms(&mut self, ms: f64) {
        self.ms.push(ms);
        self.is_sorted = false;
    }

    pub(crate) fn len(&self) -> usize {
        self.ms.len()
    }

    /// The measured value at or below which `percent` of them lie (nearest rank), in milliseconds.
    pub(crate) fn quantile(&mut self, percent: usize) -> f64 {
        if !self.is_sorted {
            self.ms.sort_by(f64::total_cmp);
            self.is_sorted = true;
        }
        nearest_rank(&self.ms, percent)
    }
}

/// The middle value, or the mean of the two in the middle.
pub(crate) fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    let middle = values.len() / 2;
    match values.len() {
        0 => f64::NAN,
        length if length % 2 == 1 => values[middle],
        _ => f64::midpoint(values[middle - 1], values[middle]),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn times(ms: impl IntoIterator<Item = u64>) -> Times {
        let mut times = Times::default();
        ms.into_iter().for_each(|ms| times.add(Duration::from_millis(ms)));
        times
    }

    #[test]
    fn quantiles_are_measured_values() {
        let mut forty = times((1..=40).rev());
        assert!((forty.quantile(50) - 20.0).abs() < 1e-9);
        assert!((forty.quantile(95) - 38.0).abs() < 1e-9);
        assert!((forty.quantile(99) - 40.0).abs() < 1e-9);
        assert!((forty.quantile(100) - 40.0).abs() < 1e-9);
        assert!((times([1]).quantile(95) - 1.0).abs() < 1e-9);
        assert!(times([]).quantile(50).is_nan());
    }

    #[test]
    fn a_value_added_after_a_look_counts() {
        let mut values = times([5, 7]);
        assert!((values.quantile(100) - 7.0).abs() < 1e-9);
        values.add_ms(9.0);
        assert!((values.quantile(100) - 9.0).abs() < 1e-9);
        assert_eq!(values.len(), 3);
    }

    #[test]
    fn a_median_lies_in_the_middle() {
        assert!((median(vec![3.0, 1.0, 2.0]) - 2.0).abs() < 1e-9);
        assert!((median(vec![4.0, 1.0, 2.0, 3.0]) - 2.5).abs() < 1e-9);
        assert!(median(Vec::new()).is_nan());
    }

    #[test]
    fn rounds_are_merged_figure_by_figure() {
        let round = |a: f64, b: Option<f64>| {
            let mut figures = Figures::default();
            figures.goal("a", "a", a, Reach::AtMost(2.0));
            if let Some(b) = b {
                figures.push("b", "b", b);
            }
            figures
        };
        let merged = Figures::medians(&[round(1.0, None), round(9.0, Some(4.0)), round(2.0, Some(6.0))]);
        assert_eq!(merged.0.len(), 2);
        assert!((merged.get("a").expect("there") - 2.0).abs() < 1e-9);
        assert!((merged.get("b").expect("there") - 5.0).abs() < 1e-9);
        assert!(merged.0[0].reach.is_some_and(|reach| reach.is_met(2.0) && !reach.is_met(2.1)));
    }

    #[test]
    fn numbers_have_the_digits_that_they_are_worth() {
        let shown = [0.0, 0.1234, 1.5, 12.34, 123.4, 1234.5, 1_234_567.0, -1234.0].map(number);
        assert_eq!(shown, ["0", "0.123", "1.5", "12.3", "123", "1,234", "1,234,567", "-1,234"]);
        assert_eq!(number(f64::NAN), "–");
    }
}
