//! docs/benchmarks.md: owns the measured tables in it, each between two markers that name its cell and store. Touches
//! nothing else of the page.

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
    std::fs::write(path, replaced(&page, &name, &text)?)?;
    Ok(())
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

    /// Whatever can be measured has its place on the page.
    #[test]
    fn every_cell_has_its_place() {
        let page = std::fs::read_to_string(root().join("docs/benchmarks.md")).expect("the page");
        for name in [
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
