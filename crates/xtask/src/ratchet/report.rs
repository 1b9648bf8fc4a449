//! What the command prints: a table that fits 80 columns, details of single figures, or JSON.

use std::io::{self, Write};

use serde::Serialize;

use super::{
    ceilings::{Ceilings, Verdict},
    circles::Circle,
    figures::{Found, Measure},
};

/// How many things of a figure that rose are told.
const TOLD_MAX: usize = 12;

/// Everything that was measured.
pub(super) struct Summary<'r> {
    pub(super) figures: &'r [Measure],
    pub(super) ceilings: &'r Ceilings,
    /// For each crate: its name, lines of code, lines of tests.
    pub(super) lines: &'r [(String, usize, usize)],
}

impl Summary<'_> {
    /// Whether a figure rose.
    pub(super) fn fails(&self) -> bool {
        self.figures.iter().any(|figure| self.ceilings.judge(figure).fails())
    }

    /// The table, then what to do.
    pub(super) fn table(&self, out: &mut impl Write) -> io::Result<()> {
        writeln!(out, "{:<50} {:>6} {:>7} {:>5}", "figure", "now", "ceiling", "goal")?;
        for figure in self.figures {
            let known = self.ceilings.0.get(figure.name);
            let (ceiling, goal) = known
                .map_or(("-".to_owned(), "-".to_owned()), |known| (known.ceiling.to_string(), known.goal.to_string()));
            let mark = match self.ceilings.judge(figure) {
                Verdict::Rose => "ROSE",
                Verdict::Fell => "fell",
                Verdict::Done => "done",
                Verdict::Unknown => "new",
                Verdict::Holds => "",
            };
            let line = format!("{:<50} {:>6} {ceiling:>7} {goal:>5}  {mark}", figure.what, figure.value);
            writeln!(out, "{}", line.trim_end())?;
        }
        writeln!(out, "\n{:<50} {:>6} {:>7}", "lines without blanks and comments", "code", "tests")?;
        let (mut code_sum, mut tests_sum) = (0, 0);
        for (name, code, tests) in self.lines {
            (code_sum, tests_sum) = (code_sum + code, tests_sum + tests);
            writeln!(out, "{name:<50} {code:>6} {tests:>7}")?;
        }
        writeln!(out, "{:<50} {code_sum:>6} {tests_sum:>7}", "all")?;
        self.advice(out)
    }

    fn advice(&self, out: &mut impl Write) -> io::Result<()> {
        for figure in self.figures {
            match self.ceilings.judge(figure) {
                Verdict::Rose => {
                    let ceiling = self.ceilings.0.get(figure.name).map_or(0, |known| known.ceiling);
                    writeln!(out, "\n{} rose from {ceiling} to {}:", figure.name, figure.value)?;
                    list(out, &self.ceilings.news(figure), TOLD_MAX)?;
                    writeln!(out, "To mend it, {}.", figure.advice)?;
                }
                Verdict::Unknown => {
                    writeln!(out, "\n{} has no ceiling: `cargo xtask ratchet --lower`", figure.name)?;
                }
                Verdict::Done | Verdict::Holds | Verdict::Fell => {}
            }
        }
        let fell: Vec<&str> =
            self.figures.iter().filter(|figure| self.ceilings.judge(figure) == Verdict::Fell).map(|f| f.name).collect();
        if !fell.is_empty() {
            writeln!(out, "\nLower the ceiling with `cargo xtask ratchet --lower`, and commit it, of:")?;
            fell.iter().try_for_each(|name| writeln!(out, "  {name}"))?;
        }
        Ok(())
    }

    /// Everything that one figure counts.
    pub(super) fn details(&self, out: &mut impl Write, name: &str, circles: &[Circle]) -> io::Result<()> {
        let Some(figure) = self.figures.iter().find(|figure| figure.name == name) else { return Ok(()) };
        writeln!(out, "{}: {} ({})", figure.name, figure.value, figure.what)?;
        if name == "files_in_circles" {
            return circles.iter().try_for_each(|circle| edges(out, circle));
        }
        list(out, &figure.found.iter().collect::<Vec<_>>(), usize::MAX)
    }

    /// One object, for tools.
    pub(super) fn json(&self, out: &mut impl Write, circles: &[Circle]) -> io::Result<()> {
        #[derive(Serialize)]
        struct Line<'l> {
            #[serde(flatten)]
            figure: &'l Measure,
            ceiling: Option<usize>,
            goal: Option<usize>,
            verdict: Verdict,
        }
        let figures: Vec<Line<'_>> = self
            .figures
            .iter()
            .map(|figure| {
                let known = self.ceilings.0.get(figure.name);
                let (ceiling, goal) = (known.map(|known| known.ceiling), known.map(|known| known.goal));
                Line { figure, ceiling, goal, verdict: self.ceilings.judge(figure) }
            })
            .collect();
        let lines = self
            .lines
            .iter()
            .map(|(name, code, tests)| serde_json::json!({"crate": name, "code": code, "tests": tests}));
        let lines: Vec<_> = lines.collect();
        let whole = serde_json::json!({"figures": figures, "circles": circles, "lines": lines});
        writeln!(out, "{whole:#}")
    }
}

/// Each thing in a line of its own, and what is said of it in the next.
fn list(out: &mut impl Write, found: &[&Found], most: usize) -> io::Result<()> {
    for Found { name, place, note } in found.iter().take(most) {
        // What the place does not say: a function, a dependency, a type.
        let rest =
            name.rsplit_once(": ").map(|(_, rest)| rest).filter(|rest| !place.contains(rest)).unwrap_or_default();
        writeln!(out, "  {place}")?;
        let said: Vec<&str> = [rest, note].into_iter().filter(|text| !text.is_empty()).collect();
        if !said.is_empty() {
            writeln!(out, "      {}", said.join(": "))?;
        }
    }
    if found.len() > most {
        writeln!(out, "  and {} more", found.len() - most)?;
    }
    Ok(())
}

/// A circle's files, and what each needs of the others; few names mean that an edge is cheap to cut.
fn edges(out: &mut impl Write, circle: &Circle) -> io::Result<()> {
    let base = circle.files.first().and_then(|file| file.split_once("/src/")).map_or("", |(base, _)| base);
    let short = |path: &str| path.trim_start_matches(base).trim_start_matches("/src/").to_owned();
    writeln!(out, "\n{base}: a circle of {} files; its edges, those with the fewest names first", circle.files.len())?;
    for edge in &circle.edges {
        writeln!(out, "  {} -> {}", short(&edge.from), short(&edge.to))?;
        let names = edge.names.iter().map(|(name, line)| format!("{name} ({line})"));
        writeln!(out, "      {}", names.collect::<Vec<_>>().join(", "))?;
    }
    Ok(())
}
