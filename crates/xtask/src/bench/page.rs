//! docs/benchmarks.md: owns the measured tables in it, each between two markers that name its cell and store. Touches
//! nothing else of the page.

use std::fmt::Write as _;

use anyhow::bail;
use stagegate_core::{Clock as _, SystemClock};

use super::{figures::Report, machine::Machine};
use crate::system::root;

/// Puts the report in place of what stands between its markers.
pub(crate) fn write(report: &Report, machine: &Machine) -> anyhow::Result<()> {
    let path = root().join("docs/benchmarks.md");
    let page = std::fs::read_to_string(&path)?;
    let name = format!("{} {}", report.cell, report.store);
    let date = SystemClock.now().format("%Y-%m-%d %H:%M UTC");
    let parameters = report.parameters.to_string();
    let text = format!("{date}; {}.\nParameters: `{parameters}`\n\n{}\n", machine.line(), report.table());
    let page = replaced(&page, &name, &text)?;
    let summary = summary(&page);
    std::fs::write(path, replaced(&page, SUMMARY, &summary)?)?;
    Ok(())
}

/// The marker of the table that gathers what is to be reached.
const SUMMARY: &str = "summary";

/// Every figure that has a goal, as the page's own tables tell them.
fn summary(page: &str) -> String {
    let mut text = String::from("| cell | figure | measured | to reach |\n| --- | --- | --- | --- |\n");
    for part in page.split("<!-- measured: ").skip(1) {
        let Some((name, rest)) = part.split_once(" -->") else { continue };
        let table = rest.split("<!-- end -->").next().unwrap_or_default();
        if name == SUMMARY {
            continue;
        }
        for line in table.lines() {
            let columns: Vec<&str> = line.split('|').map(str::trim).collect();
            let [_, label, measured, reach, ..] = columns[..] else { continue };
            if reach.starts_with(['≥', '≤']) {
                // Writing into a string cannot fail.
                let _ = writeln!(text, "| `{name}` | {label} | {measured} | {reach} |");
            }
        }
    }
    text
}

/// The page with this text between the markers of that name.
fn replaced(page: &str, name: &str, text: &str) -> anyhow::Result<String> {
    let (begin, end) = (format!("<!-- measured: {name} -->\n"), "<!-- end -->");
    let Some((before, rest)) = page.split_once(&begin) else { bail!("docs/benchmarks.md has no marker of `{name}`") };
    let Some((_, after)) = rest.split_once(end) else { bail!("the marker of `{name}` is not closed") };
    Ok(format!("{before}{begin}{text}{end}{after}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_is_between_its_markers_changes() {
        let page = "a\n<!-- measured: x y -->\nold\n<!-- end -->\nb\n<!-- measured: z y -->\nkept\n<!-- end -->\n";
        let new = replaced(page, "x y", "new\n").expect("a marker");
        assert_eq!(new, page.replace("old", "new"));
        assert!(replaced(page, "q y", "").is_err());
    }

    #[test]
    fn the_summary_has_what_is_to_be_reached() {
        let page = "<!-- measured: summary -->\n| `x y` | old | 1 | ≥ 2 ✗ |\n<!-- end -->\n<!-- measured: x y -->\n\
            | figure | measured | to reach | rounds |\n|---|---|---|---|\n| runs/s | 5 | ≥ 2 ✓ | 4, 5 |\n\
            | other | 1 | | |\n<!-- end -->\n";
        let rows: Vec<_> = summary(page).lines().skip(2).map(str::to_owned).collect();
        assert_eq!(rows, ["| `x y` | runs/s | 5 | ≥ 2 ✓ |"]);
    }

    /// Whatever can be measured has its place on the page.
    #[test]
    fn every_cell_has_its_place() {
        let page = std::fs::read_to_string(root().join("docs/benchmarks.md")).expect("the page");
        for name in [
            SUMMARY,
            "engine postgres",
            "engine sqlite",
            "latency postgres",
            "latency sqlite",
            "submit postgres",
            "submit sqlite",
            "read postgres",
            "read sqlite",
            "sse postgres",
            "sse sqlite",
            "recovery postgres",
            "growth postgres",
        ] {
            assert!(replaced(&page, name, "").is_ok(), "{name}");
        }
    }
}
