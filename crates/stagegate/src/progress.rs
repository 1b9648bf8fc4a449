//! Live progress of a run: owns where it is drawn. Writes to stderr alone: a table of stages that moves on a terminal,
//! plain lines elsewhere. How it looks is the [`Board`]'s.

use std::{
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use indicatif::{ProgressBar, ProgressState, ProgressStyle};
use stagegate_core::Event;
use tokio::time::Instant;

use crate::{board::Board, output};

/// How often the table moves.
const TICK: Duration = Duration::from_millis(100);
/// The size of a terminal that does not tell it, in lines and columns.
const SIZE_USUAL: (u16, u16) = (24, 80);
/// The rightmost columns are left free: there a terminal shows `^C`, which must not wrap.
const MARGIN: usize = 3;

/// The progress of one run.
#[derive(Debug)]
pub(crate) struct Progress {
    board: Arc<Mutex<Board>>,
    bar: Option<ProgressBar>,
}

impl Progress {
    /// For a run of these stages, in this order; `live` on a terminal.
    pub(crate) fn new<'a>(stages: impl IntoIterator<Item = &'a str>, live: bool) -> Self {
        let board = Arc::new(Mutex::new(Board::new(stages, Instant::now())));
        let bar = live.then(|| {
            let bar = ProgressBar::new_spinner().with_style(style(Arc::clone(&board)));
            bar.enable_steady_tick(TICK);
            bar
        });
        Self { board, bar }
    }

    /// Shows an event.
    pub(crate) fn event(&mut self, event: &Event) {
        self.event_if(event, true);
    }

    /// Takes an event in; one that is not new was told before, and fills the table alone.
    pub(crate) fn event_if(&mut self, event: &Event, is_new: bool) {
        let line = lock(&self.board).event(event, Instant::now()).filter(|_| is_new);
        match (&self.bar, line) {
            (None, Some(line)) => output::note(&format!("  {line}")),
            // What is about no stage is no row of the table.
            (Some(_), Some(line)) if event.kind.stage().is_none() => self.note(&format!("  {line}")),
            _ => {}
        }
    }

    /// Writes a line above what moves.
    pub(crate) fn note(&self, line: &str) {
        match &self.bar {
            None => output::note(line),
            Some(bar) => {
                let (_, columns) = size();
                bar.println(seen(&console::truncate_str(line, columns, "…")));
            }
        }
    }

    /// Takes the table away for as long as a person is asked, or for good.
    pub(crate) fn pause(&mut self) {
        if let Some(bar) = self.bar.take() {
            bar.disable_steady_tick();
            bar.finish_and_clear();
        }
    }

    /// Ends the display; how each stage ended stays on the screen.
    pub(crate) fn done(&mut self) {
        if self.bar.is_none() {
            return;
        }
        self.pause();
        for line in lock(&self.board).ended(Instant::now(), output::stderr_width()) {
            output::note(&line);
        }
    }
}

fn lock(board: &Mutex<Board>) -> std::sync::MutexGuard<'_, Board> {
    board.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Lines and columns that may be drawn on, asked anew for every picture: a terminal changes its size.
fn size() -> (usize, usize) {
    let (lines, columns) = console::Term::stderr().size_checked().unwrap_or(SIZE_USUAL);
    (usize::from(lines), usize::from(columns).saturating_sub(MARGIN))
}

fn style(board: Arc<Mutex<Board>>) -> ProgressStyle {
    let draw = move |_: &ProgressState, to: &mut dyn std::fmt::Write| {
        let (lines, columns) = size();
        let lines = lock(&board).moving(Instant::now(), columns, lines);
        let _ = write!(to, "{}", seen(&lines.join("\n")));
    };
    // The template is a literal.
    let style = ProgressStyle::with_template("{board}").unwrap_or_else(|_| ProgressStyle::default_spinner());
    style.with_key("board", draw)
}

/// The live display writes past `anstream`, so it asks here whether colours are wanted.
fn seen(line: &str) -> String {
    match anstream::AutoStream::choice(&std::io::stderr()) {
        anstream::ColorChoice::Never => anstream::adapter::strip_str(line).to_string(),
        _ => line.to_owned(),
    }
}
