//! What goes to stdout and stderr: owns how errors, costs and tables look. Results go to stdout and to nowhere else;
//! a closed pipe never panics.

use std::{
    borrow::Cow,
    fmt::Write as _,
    io::{ErrorKind, IsTerminal as _, Write as _},
    time::Duration,
};

use anstyle::{AnsiColor, Style};
use stagegate_core::{Code, Error, Totals, Usd, Violation};
use stagegate_telemetry::text::visible;

/// For what went well.
pub(crate) const GOOD: Style = AnsiColor::Green.on_default();
/// For what wants attention.
pub(crate) const WARN: Style = AnsiColor::Yellow.on_default();
/// For what failed.
pub(crate) const BAD: Style = AnsiColor::Red.on_default();
/// For what was reused.
pub(crate) const REUSED: Style = AnsiColor::Cyan.on_default();
/// For what can be passed over.
pub(crate) const DIM: Style = Style::new().dimmed();
/// For headings.
pub(crate) const STRONG: Style = Style::new().bold();

/// The columns of a terminal that does not tell them.
const COLUMNS_USUAL: usize = 80;

/// A text in a style.
pub(crate) fn paint(style: Style, text: &str) -> String {
    format!("{style}{text}{style:#}")
}

/// Writes a result to stdout. A reader that went away is no error.
pub(crate) fn result(text: &str) -> Result<(), Error> {
    let mut stdout = anstream::stdout();
    // What a model wrote is for a program as it is; a person's terminal is shown what it must not obey.
    let shown = if std::io::stdout().is_terminal() { Cow::Owned(shown(text)) } else { Cow::Borrowed(text) };
    match stdout.write_all(shown.as_bytes()).and_then(|()| stdout.flush()) {
        Err(error) if error.kind() != ErrorKind::BrokenPipe => {
            Err(Error::new(Code::Internal, format!("stdout could not be written: {error}")))
        }
        _ => Ok(()),
    }
}

/// A text whose only escape sequences are styles: any other one, and every other control, is shown instead of sent.
fn shown(text: &str) -> String {
    let mut parts = text.split('\u{1b}');
    let mut out = visible(parts.next().unwrap_or_default()).into_owned();
    for part in parts {
        let rest = part.strip_prefix('[').map(|rest| rest.trim_start_matches(|c: char| c.is_ascii_digit() || c == ';'));
        match rest.and_then(|rest| rest.strip_prefix('m')) {
            Some(rest) => {
                let (style, _) = part.split_at(part.len() - rest.len());
                let _ = write!(out, "\u{1b}{style}{}", visible(rest));
            }
            None => out.push_str(&visible(&format!("\u{1b}{part}"))),
        }
    }
    out
}

/// Writes a line to stderr, as well as it goes.
pub(crate) fn note(text: &str) {
    let _ = writeln!(anstream::stderr(), "{}", shown(text));
}

/// Whether a person looks at stderr.
pub(crate) fn stderr_is_live() -> bool {
    std::io::stderr().is_terminal() && std::env::var_os("TERM").is_none_or(|term| term != "dumb")
}

/// Whether a person can be asked: they look at stderr, and stdin is theirs.
pub(crate) fn can_ask() -> bool {
    stderr_is_live() && std::io::stdin().is_terminal()
}

/// How many columns stdout has; None where it is no terminal, and what is written is to be whole.
pub(crate) fn stdout_width() -> Option<usize> {
    columns(&console::Term::stdout(), std::io::stdout().is_terminal())
}

/// How many columns stderr has; None where it is no terminal.
pub(crate) fn stderr_width() -> Option<usize> {
    columns(&console::Term::stderr(), std::io::stderr().is_terminal())
}

fn columns(terminal: &console::Term, is_terminal: bool) -> Option<usize> {
    let columns = || terminal.size_checked().map_or(COLUMNS_USUAL, |(_, columns)| usize::from(columns));
    is_terminal.then(columns)
}

/// Writes a text to stderr, wrapped where that is a terminal; lines that follow are moved in.
pub(crate) fn note_wrapped(text: &str) {
    for line in fitted(text, stderr_width()) {
        note(&line);
    }
}

/// A text in lines that fit; those that follow a break are moved in by two beyond the line's own margin.
pub(crate) fn fitted(text: &str, width: Option<usize>) -> Vec<String> {
    let Some(width) = width else { return text.lines().map(str::to_owned).collect() };
    let mut lines = Vec::new();
    for line in text.lines() {
        if console::measure_text_width(line) <= width {
            lines.push(line.to_owned());
            continue;
        }
        let margin = " ".repeat(line.len() - line.trim_start().len());
        let options = textwrap::Options::new(width).initial_indent(&margin);
        let next = format!("{margin}  ");
        let wrapped = textwrap::wrap(line.trim_start(), options.subsequent_indent(&next));
        lines.extend(wrapped.into_iter().map(std::borrow::Cow::into_owned));
    }
    lines
}

/// Tells an error on stderr: one line, its mistakes below, and where to read on.
pub(crate) fn error(error: &Error) {
    let label = paint(BAD.bold(), "error:");
    let mut text = match error.violations.as_slice() {
        [] => format!("{label} {} {}", error.code, visible(&error.detail)),
        _ => format!("{label} {} {}", error.code, error.code.title()),
    };
    for violation in &error.violations {
        let _ = write!(text, "\n  {}", violation_line(error.code, violation));
    }
    if let Some(wait) = error.retry_after.filter(|wait| !wait.is_zero()) {
        let _ = write!(text, "\n  try again in {} s", wait.as_secs().max(1));
    }
    let _ = write!(text, "\n{}", paint(DIM, &format!("  see `stagegate explain {}`", error.code)));
    note_wrapped(&text);
}

/// A mistake in one line; its code is left out where it is the error's own.
fn violation_line(code: Code, violation: &Violation) -> String {
    let mut text = String::new();
    if let (Some(line), Some(column)) = (violation.line, violation.column) {
        let _ = write!(text, "{line}:{column}: ");
    }
    if violation.code != code {
        let _ = write!(text, "{} ", violation.code);
    }
    if !violation.path.is_empty() {
        let _ = write!(text, "{}: ", visible(&violation.path));
    }
    text.push_str(&visible(&violation.message));
    if let Some(mend) = &violation.mend {
        let _ = write!(text, " ({})", visible(mend));
    }
    text
}

/// A mistake in a file, as compilers tell it: `file:line:col: SGnnnn path: message (mend)`.
pub(crate) fn located(file: &str, violation: &Violation) -> String {
    let text = match (violation.line, violation.column) {
        (Some(_), Some(_)) => format!("{file}:{violation}"),
        _ => format!("{file}: {violation}"),
    };
    visible(&text).into_owned()
}

/// The exit code of an error: 2 for a mistake in what was given, else 1. What is only too early or too much is no mistake:
/// the same can be right later.
pub(crate) fn exit_code(code: Code) -> u8 {
    let text = code.as_str();
    let given = text.starts_with("SG01") || text.starts_with("SG02");
    let given = given || matches!(code, Code::InvalidRequest | Code::InvalidConfig | Code::OpenListener);
    let is_early = matches!(code.status(), 429 | 503) || matches!(code, Code::OlderReplica | Code::QuotaReached);
    if given && !is_early { 2 } else { 1 }
}

/// Dollars with enough digits to tell small costs apart.
pub(crate) fn usd(amount: Usd) -> String {
    let dollars = amount.dollars();
    if amount == Usd::ZERO {
        "$0".to_owned()
    } else if dollars.abs() < 0.01 {
        format!("${dollars:.6}")
    } else {
        format!("${dollars:.4}")
    }
}

/// What was paid, and whether some of it is unknown.
pub(crate) fn paid(totals: &Totals) -> String {
    match (totals.unpriced_calls, totals.cost_usd) {
        (0, cost) => usd(cost),
        (_, Usd::ZERO) => "cost unknown".to_owned(),
        (calls, cost) => format!("{} + {calls} unpriced", usd(cost)),
    }
}

/// A whole number in groups of three.
pub(crate) fn grouped(number: u64) -> String {
    let digits = number.to_string();
    let mut text = String::new();
    for (at, digit) in digits.chars().enumerate() {
        if at > 0 && (digits.len() - at).is_multiple_of(3) {
            text.push(',');
        }
        text.push(digit);
    }
    text
}

/// A time as people say it.
pub(crate) fn time(duration: Duration) -> String {
    match duration.as_secs() {
        0 if duration.as_millis() < 1_000 => format!("{} ms", duration.as_millis()),
        0..60 => format!("{:.1} s", duration.as_secs_f64()),
        seconds => format!("{} min {} s", seconds / 60, seconds % 60),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn small_costs_are_told_apart() {
        assert_eq!(usd(Usd::ZERO), "$0");
        assert_eq!(usd(Usd::from_dollars(0.000_012)), "$0.000012");
        assert_eq!(usd(Usd::from_dollars(1.5)), "$1.5000");
    }

    #[test]
    fn a_long_line_is_wrapped_on_a_terminal_and_whole_when_piped() {
        let text = format!("error: SG0100 {}\n  short", "word ".repeat(40).trim_end());
        assert_eq!(fitted(&text, None).len(), 2);
        let lines = fitted(&text, Some(80));
        assert!(lines.len() > 3 && lines.iter().all(|line| line.len() <= 80), "{lines:#?}");
        assert!(lines[1].starts_with("  word") && lines.last().is_some_and(|line| line == "  short"), "{lines:#?}");
    }

    #[test]
    fn an_unknown_cost_is_never_told_as_none() {
        let totals = Totals { unpriced_calls: 2, ..Totals::default() };
        assert_eq!(paid(&totals), "cost unknown");
        let totals = Totals { cost_usd: Usd::from_dollars(0.5), ..totals };
        assert_eq!(paid(&totals), "$0.5000 + 2 unpriced");
    }

    #[test]
    fn numbers_and_times_read_well() {
        assert_eq!((grouped(7), grouped(1234), grouped(1_234_567)), ("7".into(), "1,234".into(), "1,234,567".into()));
        assert_eq!(time(Duration::from_millis(320)), "320 ms");
        assert_eq!(time(Duration::from_millis(1_540)), "1.5 s");
        assert_eq!(time(Duration::from_secs(61)), "1 min 1 s");
    }

    #[test]
    fn mistakes_in_what_was_given_exit_with_2() {
        for code in [Code::InvalidDefinition, Code::InvalidInput, Code::InvalidConfig, Code::OpenListener] {
            assert_eq!(exit_code(code), 2, "{code}");
        }
        let early = [Code::QueueFull, Code::OlderReplica, Code::QuotaReached, Code::Unavailable, Code::Overloaded];
        for code in early.into_iter().chain([Code::DatabaseUnreachable, Code::SchemaBehind, Code::Internal]) {
            assert_eq!(exit_code(code), 1, "{code}");
        }
    }

    #[test]
    fn a_terminal_is_sent_styles_alone_whatever_a_text_holds() {
        for (text, seen) in [
            ("\u{1b}]52;c;cm0gLXJm\u{7}", "\\u{1b}]52;c;cm0gLXJm\\u{7}"),
            ("a\u{1b}[2Jb", "a\\u{1b}[2Jb"),
            ("\u{1b}", "\\u{1b}"),
            ("\u{1b}[1;31mred\u{1b}[0m", "\u{1b}[1;31mred\u{1b}[0m"),
            ("\u{1b}[m\u{1b}[?25l\u{9b}2J", "\u{1b}[m\\u{1b}[?25l\\u{9b}2J"),
            ("\u{1b}\u{1b}[0m", "\\u{1b}\u{1b}[0m"),
        ] {
            assert_eq!(shown(text), seen, "{text:?}");
        }
    }

    #[test]
    fn a_mistake_obeys_nothing_wherever_its_file_put_the_escape() {
        let escape = "\u{1b}[2J";
        let violation = Violation::new(Code::UnknownKey, escape, escape).mend(escape);
        for line in [located(escape, &violation), violation_line(Code::UnknownKey, &violation)] {
            assert!(!line.contains('\u{1b}') && line.matches("\\u{1b}[2J").count() >= 3, "{line}");
        }
    }

    #[test]
    fn a_mistake_in_a_file_is_told_as_compilers_do() {
        let mut violation = Violation::new(Code::UnknownKey, "stages[0].promt", "unknown key").mend("write `prompt`");
        assert_eq!(located("a.yaml", &violation), "a.yaml: SG0102 stages[0].promt: unknown key (write `prompt`)");
        (violation.line, violation.column) = (Some(3), Some(5));
        assert_eq!(located("a.yaml", &violation), "a.yaml:3:5: SG0102 stages[0].promt: unknown key (write `prompt`)");
    }
}
