//! `stagegate explain`: the page of an error code, without a network. The pages are those of `docs/errors`.

use std::fmt::Write as _;

use clap::builder::{PossibleValue, StringValueParser, TypedValueParser};
use stagegate_core::{Code, Error, error::nearest};

use crate::{
    layout::{Column, KEPT, Row, Table, wrap},
    output::{self, REUSED, STRONG, paint},
};

/// Every page by its code, in order.
const PAGES: &[(&str, &str)] = include!(concat!(env!("OUT_DIR"), "/error_pages.rs"));

/// No page is shown wider than this: longer lines are hard to read.
const WIDEST: usize = 100;

const EXAMPLES: &str = "\
Examples:
  stagegate explain SG0200
  stagegate explain 303
  stagegate explain                every code, a line each";

/// Tell what an error code means, and how to mend it.
#[derive(Debug, clap::Args)]
#[command(after_help = EXAMPLES)]
pub(crate) struct Explain {
    /// The code, as an error tells it [default: list them all]
    #[arg(value_name = "CODE", value_parser = Codes, hide_possible_values = true)]
    code: Option<String>,
}

/// Any text; shells complete it to the codes that there are.
#[derive(Debug, Clone)]
struct Codes;

impl TypedValueParser for Codes {
    type Value = String;

    fn parse_ref(
        &self,
        command: &clap::Command,
        argument: Option<&clap::Arg>,
        value: &std::ffi::OsStr,
    ) -> Result<String, clap::Error> {
        StringValueParser::new().parse_ref(command, argument, value)
    }

    fn possible_values(&self) -> Option<Box<dyn Iterator<Item = PossibleValue> + '_>> {
        Some(Box::new(PAGES.iter().map(|(code, _)| PossibleValue::new(*code))))
    }
}

impl Explain {
    pub(crate) fn run(self) -> Result<u8, Error> {
        let width = output::stdout_width();
        let text = match self.code {
            None => listed().text(width),
            Some(given) => page(&given).map(|page| rendered(page, width.map(|width| width.min(WIDEST))))?,
        };
        output::result(&text)?;
        Ok(0)
    }
}

/// The page of a code, however it is written: `SG0200`, `sg0200`, `0200`, `200`.
fn page(given: &str) -> Result<&'static str, Error> {
    let text = given.trim().to_uppercase();
    let digits = text.strip_prefix("SG").unwrap_or(&text);
    let code = format!("SG{digits:0>4}");
    let found = PAGES.iter().find(|(known, _)| *known == code).map(|(_, page)| *page);
    found.ok_or_else(|| {
        let near = nearest(&code, PAGES.iter().map(|(known, _)| *known));
        let mend =
            near.map_or_else(|| "`stagegate explain` lists all".to_owned(), |near| format!("did you mean {near}?"));
        Error::new(Code::InvalidParameter, format!("there is no error code `{}`: {mend}", given.trim()))
    })
}

fn listed() -> Table {
    let mut table = Table::new([Column::left("code", KEPT), Column::left("what it says", KEPT)]);
    for (code, page) in PAGES {
        let title = page.lines().next().unwrap_or_default().trim_start_matches('#').trim();
        let title = title.trim_start_matches(code).trim_start_matches([':', ' ', '–', '-']);
        table.push(Row::new([*code, title]));
    }
    table
}

/// A page as it is where it is piped; on a terminal wrapped, its marks made styles.
fn rendered(page: &str, width: Option<usize>) -> String {
    let Some(width) = width else { return page.to_owned() };
    let mut out = String::new();
    let mut paragraph = String::new();
    let mut is_code = false;
    for line in page.lines().chain([""]) {
        let is_fence = line.trim_start().starts_with("```");
        let is_own = is_code || is_fence || line.is_empty() || line.starts_with(['#', '|', '>']);
        if is_own || line.trim_start().starts_with(['-', '*']) || starts_numbered(line) {
            flush(&mut out, &mut paragraph, width);
        }
        if is_fence {
            is_code = !is_code;
        } else if is_code {
            let _ = writeln!(out, "    {}", paint(REUSED, line));
        } else if let Some(heading) = line.strip_prefix('#') {
            let _ = writeln!(out, "{}", paint(STRONG, heading.trim_start_matches('#').trim()));
        } else if line.is_empty() {
            out.push('\n');
        } else if is_own {
            let _ = writeln!(out, "{line}");
        } else {
            paragraph.push_str(if paragraph.is_empty() { "" } else { " " });
            paragraph.push_str(if paragraph.is_empty() { line.trim_end() } else { line.trim() });
        }
    }
    out.trim_end().to_owned() + "\n"
}

fn starts_numbered(line: &str) -> bool {
    line.trim_start()
        .split_once(". ")
        .is_some_and(|(number, _)| !number.is_empty() && number.bytes().all(|b| b.is_ascii_digit()))
}

fn flush(out: &mut String, paragraph: &mut String, width: usize) {
    let text = std::mem::take(paragraph);
    if text.is_empty() {
        return;
    }
    let is_item = text.trim_start().starts_with(['-', '*']) || starts_numbered(&text);
    for (at, line) in wrap(&text, Some(width.saturating_sub(2))).iter().enumerate() {
        let _ = if is_item && at > 0 { writeln!(out, "  {line}") } else { writeln!(out, "{line}") };
    }
}

#[cfg(test)]
mod tests {
    use unicode_width::UnicodeWidthStr as _;

    use super::*;

    #[test]
    fn every_code_has_its_page_in_the_binary() {
        for code in Code::ALL {
            assert!(page(code.as_str()).is_ok_and(|page| page.contains(code.as_str())), "{code}");
        }
    }

    #[test]
    fn a_code_is_found_however_it_is_written() {
        for given in ["SG0200", "sg0200", "0200", "200", " SG0200 "] {
            assert_eq!(page(given), page("SG0200"), "{given}");
        }
        let error = page("SG0201x").expect_err("unknown");
        assert!(error.detail.contains("did you mean SG0201"), "{error}");
        assert!(page("nonsense").is_err());
    }

    #[test]
    fn every_page_fits_80_and_120_columns_and_is_whole_when_piped() {
        for (code, page) in PAGES {
            assert_eq!(rendered(page, None), *page);
            for width in [80, 120] {
                let text = anstream::adapter::strip_str(&rendered(page, Some(width))).to_string();
                // Code and tables are never broken.
                let prose = text.lines().filter(|line| !line.starts_with("    ") && !line.starts_with('|'));
                let long: Vec<&str> = prose.filter(|line| line.width() > width).collect();
                assert!(long.is_empty(), "{code} at {width}: {long:#?}");
            }
        }
    }

    #[test]
    fn a_page_and_the_list_look_as_they_did() {
        for width in [80, 120] {
            let text = rendered(page("SG0200").expect("known"), Some(width));
            insta::assert_snapshot!(format!("page_{width}"), anstream::adapter::strip_str(&text).to_string());
        }
    }
}
