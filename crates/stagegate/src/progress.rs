//! Live progress of a run: owns where it is drawn. Writes to stderr alone: a table of stages that moves on a terminal,
//! plain lines elsewhere. How it looks is the [`Board`]'s.
//!
//! The cursor stands below the table, and each picture clears everything from the table's first line on. So what a terminal
//! writes by itself (`^C`) is gone with the next picture.

use std::{
    fmt::Write as _,
    io::Write as _,
    sync::{Arc, Mutex, MutexGuard, PoisonError, mpsc},
    thread::JoinHandle,
    time::Duration,
};

use stagegate_core::Event;
use tokio::time::Instant;

use crate::{board::Board, output};

/// How often the table moves.
const TICK: Duration = Duration::from_millis(100);
/// The size of a terminal that does not tell it, in lines and columns.
const SIZE_USUAL: (u16, u16) = (24, 80);
/// The rightmost columns are left free, so that no line wraps.
const MARGIN: usize = 1;

/// The progress of one run.
#[derive(Debug)]
pub(crate) struct Progress {
    picture: Arc<Mutex<Picture>>,
    /// Draws while it lives.
    drawing: Option<Drawing>,
}

/// The stages, and how many lines of them stand on the screen.
#[derive(Debug)]
struct Picture {
    board: Board,
    drawn: usize,
}

#[derive(Debug)]
struct Drawing {
    stop: mpsc::Sender<()>,
    thread: JoinHandle<()>,
}

impl Progress {
    /// For a run of these stages, in this order; `live` on a terminal.
    pub(crate) fn new<'a>(stages: impl IntoIterator<Item = &'a str>, live: bool) -> Self {
        let picture = Picture { board: Board::new(stages, Instant::now()), drawn: 0 };
        let picture = Arc::new(Mutex::new(picture));
        let drawing = live.then(|| Drawing::start(Arc::clone(&picture)));
        Self { picture, drawing }
    }

    /// Shows an event.
    pub(crate) fn event(&mut self, event: &Event) {
        self.event_if(event, true);
    }

    /// Takes an event in; one that is not new was told before, and fills the table alone.
    pub(crate) fn event_if(&mut self, event: &Event, is_new: bool) {
        let line = lock(&self.picture).board.event(event, Instant::now()).filter(|_| is_new);
        match (&self.drawing, line) {
            (None, Some(line)) => output::note(&format!("  {line}")),
            // What is about no stage is no row of the table.
            (Some(_), Some(line)) if event.kind.stage().is_none() => self.note(&format!("  {line}")),
            _ => {}
        }
    }

    /// Writes a line above what moves.
    pub(crate) fn note(&self, line: &str) {
        if self.drawing.is_none() {
            return output::note(line);
        }
        let (_, columns) = size();
        lock(&self.picture).draw(Some(&console::truncate_str(line, columns, "…")));
    }

    /// Takes the table away.
    fn clear(&mut self) {
        if let Some(Drawing { stop, thread }) = self.drawing.take() {
            drop(stop);
            // It ends with its next look at most; if it panicked there is nothing on the screen that it would clear.
            let _ = thread.join();
            lock(&self.picture).clear();
        }
    }

    /// Ends the display; how each stage ended stays on the screen.
    pub(crate) fn done(&mut self) {
        if self.drawing.is_none() {
            return;
        }
        self.clear();
        for line in lock(&self.picture).board.ended(Instant::now(), output::stderr_width()) {
            output::note(&line);
        }
    }
}

impl Drop for Progress {
    fn drop(&mut self) {
        self.clear();
    }
}

impl Drawing {
    fn start(picture: Arc<Mutex<Picture>>) -> Self {
        let (stop, stopped) = mpsc::channel::<()>();
        let draw = move || {
            while stopped.recv_timeout(TICK) == Err(mpsc::RecvTimeoutError::Timeout) {
                lock(&picture).draw(None);
            }
        };
        Self { stop, thread: std::thread::spawn(draw) }
    }
}

impl Picture {
    /// Draws the table anew, with a line above it that stays.
    fn draw(&mut self, above: Option<&str>) {
        let (lines, columns) = size();
        let lines = self.board.moving(Instant::now(), columns, lines);
        write(&frame(self.drawn, above, &lines));
        self.drawn = lines.len();
    }

    fn clear(&mut self) {
        write(&frame(self.drawn, None, &[]));
        self.drawn = 0;
    }
}

/// What turns a screen with so many lines of the table into one with these.
fn frame(drawn: usize, above: Option<&str>, lines: &[String]) -> String {
    let mut text = String::new();
    if drawn > 0 {
        let _ = write!(text, "\u{1b}[{drawn}A");
    }
    text.push_str("\r\u{1b}[J");
    for line in above.into_iter().chain(lines.iter().map(String::as_str)) {
        let _ = writeln!(text, "{}", seen(line));
    }
    text
}

/// In one piece, so that nothing comes in between. A terminal that is gone is no error.
fn write(text: &str) {
    let mut stderr = std::io::stderr().lock();
    let _ = stderr.write_all(text.as_bytes()).and_then(|()| stderr.flush());
}

fn lock(picture: &Mutex<Picture>) -> MutexGuard<'_, Picture> {
    picture.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Lines and columns that may be drawn on, asked anew for every picture: a terminal changes its size.
fn size() -> (usize, usize) {
    let (lines, columns) = console::Term::stderr().size_checked().unwrap_or(SIZE_USUAL);
    (usize::from(lines), usize::from(columns).saturating_sub(MARGIN))
}

/// The live display writes past `anstream`, so it asks here whether colours are wanted.
fn seen(line: &str) -> String {
    match anstream::AutoStream::choice(&std::io::stderr()) {
        anstream::ColorChoice::Never => anstream::adapter::strip_str(line).to_string(),
        _ => line.to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_picture_clears_the_one_before_and_what_the_terminal_wrote_below_it() {
        let lines = ["one".to_owned(), "two".to_owned()];
        assert_eq!(frame(0, None, &lines), "\r\u{1b}[Jone\ntwo\n");
        assert_eq!(frame(2, Some("above"), &lines), "\u{1b}[2A\r\u{1b}[Jabove\none\ntwo\n");
        assert_eq!(frame(2, None, &[]), "\u{1b}[2A\r\u{1b}[J");
    }
}
