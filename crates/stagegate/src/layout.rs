//! Tables and texts that fit a terminal: owns widths, which columns are dropped, and where lines break. Pure: it is
//! told the width and writes nothing.
//!
//! Where there is a width, columns are dropped by weight until the rest fits, and what stands under a row is wrapped.
//! Where there is none (the output is piped), everything is shown whole.

use anstyle::Style;
use unicode_width::{UnicodeWidthChar as _, UnicodeWidthStr as _};

use stagegate_telemetry::text::visible;

use crate::output::paint;

/// Between two columns.
const GAP: &str = "  ";
/// How far what stands under a row is moved in.
const NOTE_INDENT: usize = 4;
/// No column is cut to less than this, and no text is wrapped to less.
const NARROWEST: usize = 8;

/// A column is dropped before all that weigh more. This one never is.
pub(crate) const KEPT: u8 = u8::MAX;

/// A column of a table.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Column {
    head: &'static str,
    weight: u8,
    is_right: bool,
}

impl Column {
    /// Of texts.
    pub(crate) const fn left(head: &'static str, weight: u8) -> Self {
        Self { head, weight, is_right: false }
    }

    /// Of numbers.
    pub(crate) const fn right(head: &'static str, weight: u8) -> Self {
        Self { head, weight, is_right: true }
    }
}

/// A cell: one line in one style. What a terminal would obey is shown instead.
#[derive(Debug, Clone, Default)]
pub(crate) struct Cell {
    text: String,
    style: Style,
}

impl Cell {
    /// A text in a style.
    pub(crate) fn styled(style: Style, text: impl Into<String>) -> Self {
        Self { text: visible(&text.into()).into_owned(), style }
    }
}

impl<T: Into<String>> From<T> for Cell {
    fn from(text: T) -> Self {
        Self::styled(Style::new(), text)
    }
}

/// A row, and what stands under it.
#[derive(Debug, Clone, Default)]
pub(crate) struct Row {
    cells: Vec<Cell>,
    notes: Vec<Cell>,
}

impl Row {
    /// Of cells, one a column.
    pub(crate) fn new<C: Into<Cell>>(cells: impl IntoIterator<Item = C>) -> Self {
        Self { cells: cells.into_iter().map(Into::into).collect(), notes: Vec::new() }
    }

    /// With a text under it. An empty one is left out.
    pub(crate) fn with_note(mut self, note: impl Into<Cell>) -> Self {
        let note = note.into();
        if !note.text.trim().is_empty() {
            self.notes.push(note);
        }
        self
    }
}

/// A table without borders.
#[derive(Debug, Clone)]
pub(crate) struct Table {
    columns: Vec<Column>,
    rows: Vec<Row>,
    indent: usize,
    has_head: bool,
}

impl Table {
    /// Of columns, without rows yet.
    pub(crate) fn new(columns: impl IntoIterator<Item = Column>) -> Self {
        Self { columns: columns.into_iter().collect(), rows: Vec::new(), indent: 0, has_head: true }
    }

    /// Moved in by so many columns.
    pub(crate) fn indented(mut self, columns: usize) -> Self {
        self.indent = columns;
        self
    }

    /// Adds a row.
    pub(crate) fn push(&mut self, row: Row) {
        self.rows.push(row);
    }

    /// Its lines: none is wider than `width`, where there is one.
    pub(crate) fn lines(&self, width: Option<usize>) -> Vec<String> {
        let room = width.map(|width| width.saturating_sub(self.indent).max(NARROWEST));
        let widths = self.widths(room);
        let indent = " ".repeat(self.indent);
        let mut lines = Vec::new();
        if self.has_head && !self.rows.is_empty() {
            let heads: Vec<Cell> = self.columns.iter().map(|column| Cell::from(column.head)).collect();
            lines.push(self.line(&heads, &widths, room, &indent));
        }
        for row in &self.rows {
            lines.push(self.line(&row.cells, &widths, room, &indent));
            for note in &row.notes {
                let margin = self.indent + NOTE_INDENT;
                let texts = wrap(&note.text, width.map(|width| width.saturating_sub(margin)));
                lines.extend(texts.iter().map(|text| format!("{}{}", " ".repeat(margin), styled(note.style, text))));
            }
        }
        lines
    }

    /// The same as one text that ends with a line break; empty without rows.
    pub(crate) fn text(&self, width: Option<usize>) -> String {
        self.lines(width).into_iter().map(|line| line + "\n").collect()
    }

    /// How wide each column is shown; None for those that are not.
    fn widths(&self, room: Option<usize>) -> Vec<Option<usize>> {
        let natural = |(at, column): (usize, &Column)| {
            let cells = self.rows.iter().filter_map(|row| row.cells.get(at)).map(|cell| cell.text.width());
            let widest = cells.max().unwrap_or(0);
            // A column that says nothing takes no room.
            (widest > 0).then(|| widest.max(if self.has_head { column.head.width() } else { 0 }))
        };
        let mut widths: Vec<Option<usize>> = self.columns.iter().enumerate().map(natural).collect();
        let Some(room) = room else { return widths };
        while total(&widths) > room {
            let shown =
                self.columns.iter().enumerate().filter(|(at, column)| widths[*at].is_some() && column.weight < KEPT);
            match shown.rev().min_by_key(|(_, column)| column.weight) {
                Some((lightest, _)) => widths[lightest] = None,
                None => break,
            }
        }
        // Only what is never dropped is left: its widest text is cut.
        while total(&widths) > room {
            let over = total(&widths) - room;
            let texts = self.columns.iter().enumerate().filter(|(_, column)| !column.is_right);
            let widest = texts.filter_map(|(at, _)| widths[at].map(|width| (width, at))).max();
            match widest {
                Some((width, at)) if width > NARROWEST => widths[at] = Some(width.saturating_sub(over).max(NARROWEST)),
                _ => break,
            }
        }
        widths
    }

    fn line(&self, cells: &[Cell], widths: &[Option<usize>], room: Option<usize>, indent: &str) -> String {
        let mut parts = Vec::new();
        for ((column, cell), width) in self.columns.iter().zip(cells).zip(widths) {
            let Some(width) = width else { continue };
            let text = cut(&cell.text, *width);
            let padding = " ".repeat(width.saturating_sub(text.width()));
            let text = styled(cell.style, &text);
            parts.push(if column.is_right { format!("{padding}{text}") } else { format!("{text}{padding}") });
        }
        let line = format!("{indent}{}", parts.join(GAP));
        let line = line.trim_end().to_owned();
        match room {
            // Even the narrowest columns can be too many: the line is cut before it wraps.
            Some(room) if total(widths) > room => console::truncate_str(&line, room + indent.len(), "…").into_owned(),
            _ => line,
        }
    }
}

fn styled(style: Style, text: &str) -> String {
    if style == Style::new() || text.is_empty() { text.to_owned() } else { paint(style, text) }
}

fn total(widths: &[Option<usize>]) -> usize {
    let shown = widths.iter().flatten().count();
    widths.iter().flatten().sum::<usize>() + shown.saturating_sub(1) * GAP.len()
}

/// A text of one line, at most so wide; what is cut off is told by an ellipsis.
pub(crate) fn cut(text: &str, width: usize) -> String {
    if text.width() <= width {
        return text.to_owned();
    }
    let mut taken = 0;
    let mut end = 0;
    for (at, character) in text.char_indices() {
        let wide = character.width().unwrap_or(0);
        if taken + wide > width.saturating_sub(1) {
            break;
        }
        taken += wide;
        end = at + character.len_utf8();
    }
    format!("{}…", text[..end].trim_end())
}

/// A text in lines that fit; whole where there is no width. Its own line breaks are kept.
pub(crate) fn wrap(text: &str, width: Option<usize>) -> Vec<String> {
    match width {
        None => text.lines().map(str::to_owned).collect(),
        Some(width) => {
            let lines = textwrap::wrap(text.trim_end(), width.max(NARROWEST));
            lines.into_iter().map(|line| line.trim_end().to_owned()).collect()
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn table() -> Table {
        let columns = [Column::left("stage", KEPT), Column::left("model", 1), Column::right("cost", 2)];
        let mut table = Table::new(columns);
        table.push(Row::new(["design", "openai/gpt-5-mini", "$0.0021"]).with_note("two requirements are open"));
        table.push(Row::new(["spécification", "sim/quick", "$1.5000"]));
        table
    }

    fn widest(lines: &[String]) -> usize {
        lines.iter().map(|line| line.as_str().width()).max().unwrap_or(0)
    }

    #[test]
    fn a_piped_table_is_whole() {
        let mut table = table();
        table.push(Row::new(["x", "y", "z"]).with_note("word ".repeat(60)));
        let lines = table.lines(None);
        assert!(lines[1].contains("openai/gpt-5-mini") && lines[1].contains("$0.0021"), "{lines:#?}");
        assert!(widest(&lines) > 200, "a note is one line: {lines:#?}");
    }

    #[test]
    fn columns_are_dropped_by_weight_until_the_rest_fits() {
        let all = table().lines(Some(80)).join("\n");
        assert!(all.contains("model") && all.contains("cost"), "{all}");
        let fewer = table().lines(Some(30)).join("\n");
        assert!(!fewer.contains("model") && fewer.contains("$0.0021"), "{fewer}");
        let one = table().lines(Some(14)).join("\n");
        assert!(one.contains("design") && !one.contains("cost"), "{one}");
    }

    #[test]
    fn no_line_is_ever_wider_than_the_terminal() {
        for width in 14..120 {
            let lines = table().indented(2).lines(Some(width));
            assert!(widest(&lines) <= width, "{width}: {lines:#?}");
        }
    }

    #[test]
    fn wide_characters_take_the_room_that_a_terminal_gives_them() {
        let mut table = Table::new([Column::left("name", KEPT), Column::left("state", KEPT)]);
        table.push(Row::new(["仕様書", "done"]));
        table.push(Row::new(["é", "done"]));
        let lines = table.lines(None);
        let place = |line: &String| line[..line.find("done").expect("there")].width();
        assert_eq!(place(&lines[1]), place(&lines[2]), "{lines:#?}");
        assert_eq!(cut("仕様書仕様書", 7), "仕様書…");
        assert!(wrap(&"仕様書".repeat(20), Some(20)).iter().all(|line| line.as_str().width() <= 20));
    }

    #[test]
    fn what_stands_under_a_row_is_wrapped_and_moved_in() {
        let mut table = Table::new([Column::left("stage", KEPT)]);
        table.push(Row::new(["design"]).with_note("The answer names the points and carries none of them out."));
        let lines = table.lines(Some(40));
        assert!(lines.len() > 3 && lines[2..].iter().all(|line| line.starts_with("    ")), "{lines:#?}");
    }

    #[test]
    fn no_cell_and_no_note_drives_the_terminal() {
        let mut table = Table::new([Column::left("name", KEPT), Column::left("state", KEPT)]);
        let cells = [Cell::from("\u{1b}[2J"), Cell::styled(Style::new().bold(), "\u{9b}2J")];
        table.push(Row::new(cells).with_note("\u{1b}]52;c;eA==\u{7}"));
        for width in [None, Some(80)] {
            let lines = table.lines(width);
            assert!(lines[1].starts_with("\\u{1b}[2J") && lines[1].contains("\\u{9b}2J"), "{lines:#?}");
            assert!(lines[2].contains("\\u{1b}]52"), "{lines:#?}");
        }
    }

    #[test]
    fn a_column_without_a_word_takes_no_room() {
        let mut table = Table::new([Column::left("a", KEPT), Column::left("b", KEPT), Column::left("c", KEPT)]);
        table.push(Row::new(["1", "", "3"]));
        assert_eq!(table.lines(None), ["a  c", "1  3"]);
    }
}
