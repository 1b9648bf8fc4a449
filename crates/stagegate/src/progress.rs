//! Live progress of a run: owns how events look while they happen. Writes to stderr alone: a table of stages that
//! moves on a terminal, plain lines elsewhere.

use std::time::Duration;

use anstyle::Style;
use chrono::{DateTime, Utc};
use indicatif::{MultiProgress, ProgressBar, ProgressStyle};
use stagegate_core::{Event, EventKind, Totals, Verdict};

use crate::output::{self, BAD, DIM, GOOD, REUSED, WARN, grouped, paint, time};

/// The longest reason that is shown, in characters.
const REASON_MAX: usize = 80;

/// The progress of one run.
#[derive(Debug)]
pub(crate) struct Progress {
    live: Option<MultiProgress>,
    rows: Vec<Row>,
    width: usize,
}

#[derive(Debug)]
struct Row {
    stage: String,
    bar: Option<ProgressBar>,
    started_at: Option<DateTime<Utc>>,
    /// How it ended, to be left on the screen.
    ended: Option<String>,
}

impl Progress {
    /// For a run of these stages, in this order; `live` on a terminal.
    pub(crate) fn new<'a>(stages: impl IntoIterator<Item = &'a str>, live: bool) -> Self {
        let live = live.then(MultiProgress::new);
        let names: Vec<&str> = stages.into_iter().collect();
        let width = names.iter().map(|name| name.chars().count()).max().unwrap_or(0);
        let row = |name: &str| {
            let bar = live.as_ref().map(|multi| {
                let bar = multi.add(ProgressBar::new_spinner().with_style(template("{msg}")));
                bar.set_message(seen(&styled(DIM, &format!("· {name:width$}  waits for its needs"))));
                bar
            });
            Row { stage: name.to_owned(), bar, started_at: None, ended: None }
        };
        let rows = names.into_iter().map(row).collect();
        Self { live, rows, width }
    }

    /// Shows an event.
    pub(crate) fn event(&mut self, event: &Event) {
        let line = self.describe(event);
        let width = self.width;
        let row = event.kind.stage().and_then(|stage| self.rows.iter_mut().find(|row| row.stage == stage.as_str()));
        if let (EventKind::StageStarted { attempt, .. }, Some(row)) = (&event.kind, row) {
            row.started_at = Some(event.at);
            if let Some(bar) = &row.bar {
                bar.set_style(template("{spinner:.cyan} {msg} {elapsed:.dim}"));
                bar.set_message(format!("{:width$}  attempt {attempt}", row.stage));
                bar.reset_elapsed();
                bar.enable_steady_tick(Duration::from_millis(100));
            }
            return;
        }
        let Some(line) = line else { return };
        let ends = matches!(
            event.kind,
            EventKind::StageSucceeded { .. } | EventKind::StageFailed { .. } | EventKind::StageHeld { .. }
        );
        let row = event.kind.stage().and_then(|stage| self.rows.iter_mut().find(|row| row.stage == stage.as_str()));
        match (&self.live, row) {
            (None, _) => output::note(&format!("  {line}")),
            (Some(_), Some(row)) if ends => {
                if let Some(bar) = &row.bar {
                    bar.disable_steady_tick();
                    bar.set_style(template("{msg}"));
                    bar.set_message(seen(&line));
                }
                row.ended = Some(line);
            }
            (Some(multi), _) => {
                // A line that wraps would tear the table below it.
                let columns = usize::from(console::Term::stderr().size().1);
                let line = console::truncate_str(&line, columns.saturating_sub(3), "…").into_owned();
                let _ = multi.println(seen(&format!("  {line}")));
            }
        }
    }

    /// Ends the display; how each stage ended stays on the screen.
    pub(crate) fn done(&mut self) {
        if let Some(multi) = self.live.take() {
            for row in &mut self.rows {
                if let Some(bar) = row.bar.take() {
                    bar.finish_and_clear();
                }
            }
            let _ = multi.clear();
            for line in self.rows.iter_mut().filter_map(|row| row.ended.take()) {
                output::note(&format!("  {line}"));
            }
        }
    }

    /// An event as a line; None for what needs none.
    fn describe(&self, event: &Event) -> Option<String> {
        let line = match &event.kind {
            EventKind::RunAccepted { .. }
            | EventKind::RunStarted
            | EventKind::StageStarted { .. }
            | EventKind::RunFinished { .. }
            | EventKind::Unknown(_) => return None,
            EventKind::RunResumed { checkpoints } => {
                styled(WARN, &format!("↷ resumed: {checkpoints} stages have their checkpoint already"))
            }
            EventKind::RunRetried { stages } => styled(WARN, &format!("↻ started over: {}", joined(stages))),
            EventKind::RunWaiting { until: Some(until), .. } => {
                styled(DIM, &format!("… waits until {}", until.format("%H:%M:%S UTC")))
            }
            EventKind::RunWaiting { until: None, .. } => styled(WARN, "… waits for a person"),
            EventKind::StageRetrying { stage, attempt, verdict, score, reason, totals, .. } => {
                let what = if *verdict == Verdict::Retry { "gate failed" } else { verdict.as_str() };
                let took = self.took(stage.as_str(), event.at);
                let facts = facts(Some(*attempt), what, *score, totals, took);
                let reason = styled(DIM, &format!("{} → next attempt", short(reason)));
                format!("{} {:width$}  {facts}  {reason}", styled(WARN, "↻"), stage.as_str(), width = self.width)
            }
            EventKind::StageHeld { stage, attempt, score, reason, totals } => {
                let facts = facts(Some(*attempt), "held", *score, totals, self.took(stage.as_str(), event.at));
                let name = stage.as_str();
                format!("{} {name:width$}  {facts}  {}", styled(WARN, "‖"), short(reason), width = self.width)
            }
            EventKind::StageSucceeded { stage, attempt, verdict, score, totals, latency_ms, .. } => {
                let cached = totals.calls == 0 && totals.hits > 0;
                let (mark, style) = match (cached, verdict) {
                    (_, Verdict::Accepted) => ("!", WARN),
                    (true, _) => ("●", REUSED),
                    (false, _) => ("✓", GOOD),
                };
                let facts =
                    facts(Some(*attempt), verdict.as_str(), *score, totals, Some(Duration::from_millis(*latency_ms)));
                format!("{} {:width$}  {facts}", styled(style, mark), stage.as_str(), width = self.width)
            }
            EventKind::StageFailed { stage, attempt, score, failure, totals } => {
                let facts = facts(Some(*attempt), "failed", *score, totals, self.took(stage.as_str(), event.at));
                let reason = format!("{} {}", failure.code, short(&failure.message));
                format!("{} {:width$}  {facts}  {reason}", styled(BAD, "✗"), stage.as_str(), width = self.width)
            }
        };
        Some(line)
    }

    fn took(&self, stage: &str, at: DateTime<Utc>) -> Option<Duration> {
        let row = self.rows.iter().find(|row| row.stage == stage);
        row.and_then(|row| row.started_at).and_then(|start| (at - start).to_std().ok())
    }
}

/// Attempt, verdict, score, tokens, cost and time, in columns.
fn facts(attempt: Option<u32>, verdict: &str, score: Option<f64>, totals: &Totals, took: Option<Duration>) -> String {
    let attempt = attempt.map_or_else(String::new, |attempt| format!("attempt {attempt}"));
    let score = score.map_or_else(|| "-".to_owned(), |score| format!("{score:.2}"));
    let cost = if totals.calls == 0 && totals.hits > 0 {
        let hits = if totals.hits == 1 { "cached".to_owned() } else { format!("cached ×{}", totals.hits) };
        format!("{hits}, saved {}", output::usd(totals.saved_usd))
    } else if totals.calls == 0 {
        "no model".to_owned()
    } else {
        format!("{:>6} tokens  {}", grouped(totals.usage.total_tokens()), output::paid(totals))
    };
    let took = took.map_or_else(String::new, time);
    format!("{attempt}  {verdict:<11} score {score:<4}  {cost:<24}  {took:>7}").trim_end().to_owned()
}

fn joined(stages: &[stagegate_core::StageId]) -> String {
    stages.iter().map(stagegate_core::StageId::as_str).collect::<Vec<_>>().join(", ")
}

/// A reason in one bounded line.
pub(crate) fn short(text: &str) -> String {
    let text = stagegate_telemetry::text::visible(text);
    let line = text.split_whitespace().collect::<Vec<_>>().join(" ");
    if line.chars().count() <= REASON_MAX {
        return line;
    }
    let cut: String = line.chars().take(REASON_MAX - 1).collect();
    format!("{}…", cut.trim_end())
}

fn styled(style: Style, text: &str) -> String {
    paint(style, text)
}

/// The live display writes past `anstream`, so it asks here whether colours are wanted.
fn seen(line: &str) -> String {
    match anstream::AutoStream::choice(&std::io::stderr()) {
        anstream::ColorChoice::Never => anstream::adapter::strip_str(line).to_string(),
        _ => line.to_owned(),
    }
}

fn template(template: &str) -> ProgressStyle {
    let style = ProgressStyle::with_template(&format!("  {template}"));
    // The templates are literals of this file.
    style.unwrap_or_else(|_| ProgressStyle::default_spinner()).tick_chars("⠋⠙⠹⠸⠼⠴⠦⠧⠇⠏ ")
}

#[cfg(test)]
mod tests {
    use stagegate_core::{Origin, StageId, Usage, Usd};

    use super::*;

    fn at(seconds: i64) -> DateTime<Utc> {
        DateTime::from_timestamp(seconds, 0).expect("in range")
    }

    fn stage() -> StageId {
        StageId::new("design").expect("valid")
    }

    fn bought() -> Totals {
        let usage = Usage { input_tokens: 1_000, output_tokens: 204, ..Usage::default() };
        Totals { usage, calls: 1, cost_usd: Usd::from_dollars(0.0021), ..Totals::default() }
    }

    fn line(progress: &Progress, at: DateTime<Utc>, kind: EventKind) -> String {
        let line = progress.describe(&Event::new(1, at, kind)).expect("a line");
        anstream::adapter::strip_str(&line).to_string()
    }

    #[test]
    fn a_failed_gate_tells_its_score_its_price_its_time_and_its_reason() {
        let mut progress = Progress::new(["design"], false);
        progress.event(&Event::new(1, at(1), EventKind::StageStarted { stage: stage(), attempt: 1 }));
        let retrying = EventKind::StageRetrying {
            stage: stage(),
            attempt: 1,
            verdict: Verdict::Retry,
            score: Some(0.4),
            reason: "judge:\n two requirements are open".to_owned(),
            next_at: at(3),
            totals: bought(),
        };
        let line = line(&progress, at(3), retrying);
        for part in ["↻ design", "attempt 1", "gate failed", "0.40", "1,204 tokens", "$0.002100", "2.0 s"] {
            assert!(line.contains(part), "{part}: {line}");
        }
        assert!(line.contains("judge: two requirements are open → next attempt"), "{line}");
    }

    #[test]
    fn a_cached_stage_tells_what_it_saved_and_no_cost() {
        let progress = Progress::new(["design"], false);
        let totals = Totals { hits: 2, saved_usd: Usd::from_dollars(0.5), ..Totals::default() };
        let succeeded = EventKind::StageSucceeded {
            stage: stage(),
            attempt: 1,
            verdict: Verdict::Passed,
            score: Some(1.0),
            model: None,
            origin: Origin::CacheShared,
            latency_ms: 3,
            totals,
        };
        let line = line(&progress, at(1), succeeded);
        assert!(line.contains("● design") && line.contains("cached ×2, saved $0.5000"), "{line}");
        assert!(!line.contains("tokens"), "{line}");
    }

    #[test]
    fn a_long_reason_is_cut() {
        let cut = short(&"word ".repeat(100));
        assert!(cut.chars().count() <= REASON_MAX && cut.ends_with('…'), "{cut}");
    }
}
