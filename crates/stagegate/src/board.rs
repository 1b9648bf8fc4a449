//! The stages of one run as a table that moves: owns what is known of each stage from the events so far, and how that
//! looks at a width and a height. Pure: it is told the time and writes nothing.

use std::time::Duration;

use anstyle::Style;
use chrono::{DateTime, Utc};
use stagegate_core::{Event, EventKind, StageId, Totals, Verdict};
use tokio::time::Instant;

use crate::{
    layout::{Cell, Column, KEPT, Row, Table},
    output::{self, BAD, DIM, GOOD, REUSED, WARN, grouped, paint, time},
};

/// The longest reason that is shown, in characters.
const REASON_MAX: usize = 1_000;
/// The longest reason in a table that still moves.
const REASON_LIVE_MAX: usize = 140;
/// Ended attempts that are shown under a stage: the newest. An outage can bring hundreds.
const PAST_SHOWN: usize = 5;
/// What moves while a stage works.
const FRAMES: [&str; 10] = ["⠋", "⠙", "⠹", "⠸", "⠼", "⠴", "⠦", "⠧", "⠇", "⠏"];
/// How long one frame stands.
const FRAME_MS: u128 = 100;
/// Lines that the terminal keeps for what stands around the table.
const SPARE_LINES: usize = 3;

const COLUMNS: [Column; 7] = [
    Column::left("", KEPT),
    Column::left("stage", KEPT),
    Column::left("gate", 60),
    Column::right("score", 30),
    Column::right("tokens", 20),
    Column::right("cost", 50),
    Column::right("time", 40),
];

/// The stages of one run.
#[derive(Debug)]
pub(crate) struct Board {
    stages: Vec<Stage>,
    began: Instant,
    /// What the whole run waits for.
    waits: Option<String>,
}

#[derive(Debug)]
struct Stage {
    name: String,
    phase: Phase,
    /// Every attempt that ended, the newest last; the one that ended the stage among them.
    ended: Vec<Ended>,
    attempt: u32,
    started_at: Option<DateTime<Utc>>,
    since: Option<Instant>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Phase {
    Waits,
    Runs,
    Pauses,
    /// The last of what ended tells how.
    Over,
}

#[derive(Debug)]
struct Ended {
    attempt: u32,
    mark: &'static str,
    style: Style,
    gate: String,
    score: Option<f64>,
    totals: Totals,
    took: Option<Duration>,
    reason: String,
}

impl Board {
    /// Of a run of these stages, in this order.
    pub(crate) fn new<'a>(stages: impl IntoIterator<Item = &'a str>, now: Instant) -> Self {
        let stage = |name: &str| Stage {
            name: name.to_owned(),
            phase: Phase::Waits,
            ended: Vec::new(),
            attempt: 0,
            started_at: None,
            since: None,
        };
        Self { stages: stages.into_iter().map(stage).collect(), began: now, waits: None }
    }

    /// Takes an event in. The line tells it where there is no table; None for what needs no line.
    pub(crate) fn event(&mut self, event: &Event, now: Instant) -> Option<String> {
        if !matches!(event.kind, EventKind::RunWaiting { .. }) {
            self.waits = None;
        }
        match &event.kind {
            EventKind::RunAccepted { .. }
            | EventKind::RunStarted
            | EventKind::RunFinished { .. }
            | EventKind::Unknown(_) => None,
            EventKind::RunResumed { checkpoints } => {
                Some(paint(WARN, &format!("↷ resumed: {checkpoints} stages have their checkpoint already")))
            }
            EventKind::RunRetried { stages } => {
                for stage in &mut self.stages {
                    if stages.iter().any(|id| id.as_str() == stage.name) {
                        stage.phase = Phase::Waits;
                    }
                }
                Some(paint(WARN, &format!("↻ started over: {}", joined(stages))))
            }
            EventKind::RunWaiting { until, reason } => {
                let text = waiting(*until, reason.as_deref());
                self.waits = Some(text.clone());
                Some(paint(if until.is_some() { DIM } else { WARN }, &text))
            }
            EventKind::StageStarted { stage, attempt } => {
                let stage = self.stage(stage)?;
                stage.phase = Phase::Runs;
                stage.attempt = *attempt;
                stage.started_at = Some(event.at);
                stage.since = Some(now);
                None
            }
            kind => {
                let width = self.stages.iter().map(|stage| stage.name.len()).max().unwrap_or(0);
                let stage = self.stage(kind.stage()?)?;
                let ended = ended(
                    kind,
                    |at: DateTime<Utc>| stage.started_at.and_then(|start| (at - start).to_std().ok()),
                    event.at,
                )?;
                let line = ended.line(&stage.name, width, matches!(kind, EventKind::StageRetrying { .. }));
                stage.phase = if matches!(kind, EventKind::StageRetrying { .. }) { Phase::Pauses } else { Phase::Over };
                stage.attempt = ended.attempt;
                stage.ended.push(ended);
                Some(line)
            }
        }
    }

    fn stage(&mut self, id: &StageId) -> Option<&mut Stage> {
        self.stages.iter_mut().find(|stage| stage.name == id.as_str())
    }

    /// The table while the run goes on: no line is wider than the terminal, and no more lines than it has.
    pub(crate) fn moving(&self, now: Instant, width: usize, height: usize) -> Vec<String> {
        let room = height.saturating_sub(SPARE_LINES).max(1);
        let mut lines = Vec::new();
        // From the most that can be shown to the least.
        for detail in [Detail::Reasons, Detail::Attempts, Detail::Stages, Detail::Unfinished] {
            lines = self.table(now, detail).lines(Some(width));
            if lines.len() <= room {
                break;
            }
        }
        if lines.len() > room {
            lines.truncate(room.saturating_sub(1));
            lines.push(paint(DIM, "  …"));
        }
        if let Some(waits) = &self.waits {
            lines.push(paint(DIM, &crate::layout::cut(&format!("  {waits}"), width)));
        }
        lines
    }

    /// The table at its end, with every reason.
    pub(crate) fn ended(&self, now: Instant, width: Option<usize>) -> Vec<String> {
        self.table(now, Detail::Whole).lines(width)
    }

    fn table(&self, now: Instant, detail: Detail) -> Table {
        let mut table = Table::new(COLUMNS).indented(2);
        for stage in &self.stages {
            if detail == Detail::Unfinished && matches!(stage.phase, Phase::Over | Phase::Waits) {
                continue;
            }
            table.push(self.stage_row(stage, now, detail));
            let past = stage.past();
            if !matches!(detail, Detail::Whole | Detail::Reasons | Detail::Attempts) {
                continue;
            }
            let hidden = past.len().saturating_sub(PAST_SHOWN);
            if hidden > 0 {
                table.push(Row::new([Cell::from(""), Cell::styled(DIM, format!("  {hidden} earlier attempts"))]));
            }
            for ended in &past[hidden..] {
                table.push(ended.row(&format!("  attempt {}", ended.attempt), detail));
            }
        }
        let count = |phase| self.stages.iter().filter(|stage| stage.phase == phase).count();
        if detail == Detail::Unfinished {
            let text = format!("{} done, {} to come", count(Phase::Over), count(Phase::Waits));
            table.push(Row::new([Cell::from(""), Cell::styled(DIM, text)]));
        }
        table
    }

    fn stage_row(&self, stage: &Stage, now: Instant, detail: Detail) -> Row {
        let started = stage.since.map_or_else(String::new, |since| time(now.saturating_duration_since(since)));
        let cells = |mark: Cell, gate: String, took: String| {
            Row::new([
                mark,
                Cell::from(stage.name.as_str()),
                Cell::from(gate),
                "".into(),
                "".into(),
                "".into(),
                took.into(),
            ])
        };
        match (stage.phase, stage.ended.last()) {
            (Phase::Over, Some(last)) => last.row(&stage.name, detail),
            (Phase::Runs, _) => {
                let frame = now.saturating_duration_since(self.began).as_millis() / FRAME_MS;
                let frame = FRAMES[usize::try_from(frame % FRAMES.len() as u128).unwrap_or(0)];
                cells(Cell::styled(REUSED, frame), format!("attempt {}", stage.attempt), started)
            }
            (Phase::Pauses, _) => cells(Cell::styled(DIM, "…"), "waits to retry".to_owned(), String::new()),
            _ => {
                let text = if detail == Detail::Whole { "not reached" } else { "waits" };
                let dim = |text: &str| Cell::styled(DIM, text);
                Row::new([dim("·"), dim(&stage.name), dim(text)])
            }
        }
    }
}

/// How much is shown.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Detail {
    Whole,
    Reasons,
    Attempts,
    Stages,
    Unfinished,
}

impl Stage {
    /// The attempts before the one that the stage's own row tells of.
    fn past(&self) -> &[Ended] {
        let own = usize::from(self.phase == Phase::Over);
        &self.ended[..self.ended.len().saturating_sub(own)]
    }
}

impl Ended {
    fn row(&self, name: &str, detail: Detail) -> Row {
        let (tokens, cost) = match (self.totals.calls, self.totals.hits) {
            (0, 0) => ("-".to_owned(), "-".to_owned()),
            (0, 1) => ("cached".to_owned(), format!("saved {}", output::usd(self.totals.saved_usd))),
            (0, hits) => (format!("cached ×{hits}"), format!("saved {}", output::usd(self.totals.saved_usd))),
            _ => (grouped(self.totals.usage.total_tokens()), output::paid(&self.totals)),
        };
        let cells = [
            Cell::styled(self.style, self.mark),
            Cell::from(name),
            Cell::from(self.gate.as_str()),
            Cell::from(score(self.score)),
            Cell::from(tokens),
            Cell::from(cost),
            Cell::from(self.took.map_or_else(String::new, time)),
        ];
        let row = Row::new(cells);
        match detail {
            Detail::Whole => row.with_note(Cell::styled(DIM, shortened(&self.reason, REASON_MAX))),
            Detail::Reasons => row.with_note(Cell::styled(DIM, shortened(&self.reason, REASON_LIVE_MAX))),
            _ => row,
        }
    }

    /// The same as one line that stands alone.
    fn line(&self, name: &str, width: usize, goes_on: bool) -> String {
        let cost = if self.totals.calls == 0 && self.totals.hits > 0 {
            let hits =
                if self.totals.hits == 1 { "cached".to_owned() } else { format!("cached ×{}", self.totals.hits) };
            format!("{hits}, saved {}", output::usd(self.totals.saved_usd))
        } else if self.totals.calls == 0 {
            "no model".to_owned()
        } else {
            format!("{:>6} tokens  {}", grouped(self.totals.usage.total_tokens()), output::paid(&self.totals))
        };
        let took = self.took.map_or_else(String::new, time);
        let facts = format!(
            "attempt {}  {:<11} score {:<4}  {cost:<24}  {took:>7}",
            self.attempt,
            self.gate,
            score(self.score)
        );
        let line = format!("{} {name:width$}  {}", paint(self.style, self.mark), facts.trim_end());
        let next = if goes_on { " → next attempt" } else { "" };
        if self.reason.is_empty() {
            return format!("{line}{next}");
        }
        format!("{line}  {}", paint(DIM, &format!("{}{next}", shortened(&self.reason, REASON_MAX))))
    }
}

/// How an attempt ended, from the event that tells it.
fn ended(kind: &EventKind, took: impl Fn(DateTime<Utc>) -> Option<Duration>, at: DateTime<Utc>) -> Option<Ended> {
    let made =
        |attempt: u32, (mark, style): (&'static str, Style), gate: &str, score, totals: &Totals, reason: String| {
            Ended { attempt, mark, style, gate: gate.to_owned(), score, totals: *totals, took: took(at), reason }
        };
    Some(match kind {
        EventKind::StageRetrying { attempt, verdict, score, reason, totals, .. } => {
            let gate = if *verdict == Verdict::Retry { "gate failed" } else { verdict.as_str() };
            made(*attempt, ("↻", WARN), gate, *score, totals, reason.clone())
        }
        EventKind::StageHeld { attempt, score, reason, totals, .. } => {
            made(*attempt, ("‖", WARN), "held", *score, totals, reason.clone())
        }
        EventKind::StageSucceeded { attempt, verdict, score, totals, latency_ms, .. } => {
            let mark = match (totals.calls == 0 && totals.hits > 0, *verdict) {
                (_, Verdict::Accepted) => ("!", WARN),
                (true, _) => ("●", REUSED),
                (false, _) => ("✓", GOOD),
            };
            let ended = made(*attempt, mark, verdict.as_str(), *score, totals, String::new());
            Ended { took: Some(Duration::from_millis(*latency_ms)), ..ended }
        }
        EventKind::StageFailed { attempt, score, failure, totals, .. } => {
            made(*attempt, ("✗", BAD), "failed", *score, totals, format!("{} {}", failure.code, failure.message))
        }
        _ => return None,
    })
}

fn waiting(until: Option<DateTime<Utc>>, reason: Option<&str>) -> String {
    let what = match until {
        Some(until) => format!("… waits until {}", until.format("%H:%M:%S UTC")),
        None => "… waits for a person".to_owned(),
    };
    reason.map_or_else(|| what.clone(), |reason| format!("{what}: {}", shortened(reason, REASON_LIVE_MAX)))
}

fn score(score: Option<f64>) -> String {
    score.map_or_else(|| "-".to_owned(), stagegate_core::score::short)
}

fn joined(stages: &[StageId]) -> String {
    stages.iter().map(StageId::as_str).collect::<Vec<_>>().join(", ")
}

/// A text in one bounded line, without anything that a terminal would obey.
pub(crate) fn shortened(text: &str, chars_max: usize) -> String {
    let text = stagegate_telemetry::text::visible(text);
    let line = text.split_whitespace().collect::<Vec<_>>().join(" ");
    if line.chars().count() <= chars_max {
        return line;
    }
    let cut: String = line.chars().take(chars_max - 1).collect();
    format!("{}…", cut.trim_end())
}

#[cfg(test)]
mod tests {
    use stagegate_core::{Code, Failure, Origin, Usage, Usd};
    use unicode_width::UnicodeWidthStr as _;

    use super::*;

    fn at(seconds: i64) -> DateTime<Utc> {
        DateTime::from_timestamp(seconds, 0).expect("in range")
    }

    fn id(name: &str) -> StageId {
        StageId::new(name).expect("valid")
    }

    fn bought(tokens: u64, usd: f64) -> Totals {
        let usage = Usage { input_tokens: tokens, output_tokens: 204, ..Usage::default() };
        Totals { usage, calls: 1, cost_usd: Usd::from_dollars(usd), ..Totals::default() }
    }

    fn plain(lines: &[String]) -> String {
        lines.iter().map(|line| anstream::adapter::strip_str(line).to_string() + "\n").collect()
    }

    fn retrying(stage: &str, attempt: u32, reason: &str) -> EventKind {
        EventKind::StageRetrying {
            stage: id(stage),
            attempt,
            verdict: Verdict::Retry,
            score: Some(0.4),
            reason: reason.to_owned(),
            next_at: at(3),
            totals: bought(1_000, 0.0021),
        }
    }

    fn succeeded(stage: &str, attempt: u32, totals: Totals) -> EventKind {
        EventKind::StageSucceeded {
            stage: id(stage),
            attempt,
            verdict: Verdict::Passed,
            score: Some(0.92),
            model: None,
            origin: Origin::Provider,
            latency_ms: 1_540,
            totals,
            decision: None,
        }
    }

    /// Everything that a run can show: a cached stage, a retried one, a failed one, one that works, one that waits.
    fn board(now: Instant) -> Board {
        let names = ["requirements", "design", "spec", "test-plan", "risk-review"];
        let mut board = Board::new(names, now);
        let cached = Totals { hits: 1, saved_usd: Usd::from_dollars(0.0021), ..Totals::default() };
        let failure = Failure::new(Code::GateFailed, "the gate failed 3 times: min_chars: 12 of 400 characters");
        let started = |stage: &str, attempt| EventKind::StageStarted { stage: id(stage), attempt };
        let critique = "judge: the answer names the points and carries none of them out; two requirements are open";
        let kinds = [
            started("requirements", 1),
            succeeded("requirements", 1, cached),
            started("design", 1),
            retrying("design", 1, critique),
            started("design", 2),
            succeeded("design", 2, bought(1_000, 0.0021)),
            started("spec", 1),
            EventKind::StageFailed {
                stage: id("spec"),
                attempt: 1,
                score: None,
                failure,
                totals: bought(88_000, 0.5),
                decision: None,
            },
            started("test-plan", 1),
        ];
        for (seq, kind) in (1_u32..).zip(kinds) {
            board.event(&Event::new(seq.into(), at(2 * i64::from(seq)), kind), now);
        }
        board
    }

    #[test]
    fn a_moving_table_fits_80_and_120_columns() {
        let now = Instant::now();
        let later = now + Duration::from_millis(3_200);
        for width in [80, 120] {
            let text = plain(&board(now).moving(later, width, 40));
            insta::assert_snapshot!(format!("moving_{width}"), text);
            assert!(text.lines().all(|line| line.width() <= width), "{text}");
        }
    }

    #[test]
    fn a_table_at_its_end_fits_80_and_120_columns_and_is_whole_when_piped() {
        let now = Instant::now();
        for width in [Some(80), Some(120), None] {
            let name = width.map_or_else(|| "piped".to_owned(), |width: usize| width.to_string());
            insta::assert_snapshot!(format!("ended_{name}"), plain(&board(now).ended(now, width)));
        }
    }

    #[test]
    fn a_low_terminal_is_given_what_matters_most_and_never_more_lines_than_it_has() {
        let now = Instant::now();
        let names: Vec<String> = (0..60).map(|n| format!("stage-{n}")).collect();
        let mut board = Board::new(names.iter().map(String::as_str), now);
        board.event(&Event::new(1, at(1), succeeded("stage-0", 1, bought(1, 0.1))), now);
        board.event(&Event::new(2, at(1), EventKind::StageStarted { stage: id("stage-1"), attempt: 1 }), now);
        for height in [2, 5, 24, 100] {
            let lines = board.moving(now, 80, height);
            assert!(lines.len() <= height.saturating_sub(SPARE_LINES).max(1), "{height}: {lines:#?}");
        }
        let text = plain(&board.moving(now, 80, 24));
        assert!(text.contains("stage-1 ") && text.contains("1 done, 58 to come"), "{text}");
    }

    #[test]
    fn a_failed_gate_tells_its_score_its_price_its_time_and_its_reason_in_one_line() {
        let now = Instant::now();
        let mut board = Board::new(["design"], now);
        board.event(&Event::new(1, at(1), EventKind::StageStarted { stage: id("design"), attempt: 1 }), now);
        let event = Event::new(2, at(3), retrying("design", 1, "judge:\n two requirements are open"));
        let line = board.event(&event, now).expect("a line");
        let line = anstream::adapter::strip_str(&line).to_string();
        for part in ["↻ design", "attempt 1", "gate failed", "0.40", "1,204 tokens", "$0.002100", "2.0 s"] {
            assert!(line.contains(part), "{part}: {line}");
        }
        assert!(line.contains("judge: two requirements are open → next attempt"), "{line}");
    }

    #[test]
    fn a_cached_stage_tells_what_it_saved_and_no_cost() {
        let now = Instant::now();
        let mut board = Board::new(["design"], now);
        let totals = Totals { hits: 2, saved_usd: Usd::from_dollars(0.5), ..Totals::default() };
        let line = board.event(&Event::new(1, at(1), succeeded("design", 1, totals)), now).expect("a line");
        let line = anstream::adapter::strip_str(&line).to_string();
        assert!(line.contains("● design") && line.contains("cached ×2, saved $0.5000"), "{line}");
        assert!(!line.contains("tokens"), "{line}");
    }

    #[test]
    fn a_stage_that_starts_over_waits_again_and_keeps_its_attempts() {
        let now = Instant::now();
        let mut board = board(now);
        let before = board.ended(now, None).len();
        board.event(&Event::new(20, at(30), EventKind::RunRetried { stages: vec![id("spec")] }), now);
        let text = plain(&board.ended(now, Some(80)));
        assert!(text.contains("·  spec"), "{text}");
        assert!(text.contains("✗    attempt 1   failed"), "{text}");
        assert!(board.ended(now, None).len() > before);
    }

    #[test]
    fn a_long_reason_is_cut_and_obeys_nothing() {
        let cut = shortened(&"word ".repeat(1_000), REASON_MAX);
        assert!(cut.chars().count() <= REASON_MAX && cut.ends_with('…'), "{cut}");
        assert!(!shortened("\u{1b}[2J", 100).contains('\u{1b}'));
    }
}
