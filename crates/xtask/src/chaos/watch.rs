//! A watcher of a run: owns one client's way through its event stream, which reconnects with `Last-Event-ID` to
//! whichever replica HAProxy picks, and what it saw.

use std::{fmt::Write as _, time::Duration};

use rand::{Rng, SeedableRng, rngs::StdRng};
use tokio::{sync::watch, time::timeout};

use super::client::Client;

/// Longer than a replica's keep-alive comments: who hears nothing for so long reconnects.
const SILENCE_LIMIT: Duration = Duration::from_secs(7);
/// One connection in so many is dropped by the watcher itself.
const FICKLE: u32 = 6;

/// What a watcher saw.
#[derive(Debug)]
pub(crate) struct Watched {
    pub(crate) run: String,
    /// Each event's `id` and `event`, as they came, and over which connection.
    pub(crate) events: Vec<(u64, String, u32)>,
    pub(crate) connections: u32,
    /// It came to `run.finished`.
    pub(crate) finished: bool,
    /// An answer that no watcher should get.
    pub(crate) wrong: Option<String>,
}

impl Watched {
    /// The seqs as they came, a group for each connection.
    pub(crate) fn course(&self) -> String {
        let mut text = String::new();
        let mut connection = 0;
        for (seq, _, over) in &self.events {
            if *over != connection {
                let _ = write!(text, "{}#{over}:", if text.is_empty() { "" } else { " " });
                connection = *over;
            }
            let _ = write!(text, " {seq}");
        }
        text
    }
}

/// Follows a run to its end, or until `over`.
pub(crate) async fn follow(client: &Client, run: String, seed: u64, mut over: watch::Receiver<bool>) -> Watched {
    let mut rng = StdRng::seed_from_u64(seed);
    let mut watched = Watched { run, events: Vec::new(), connections: 0, finished: false, wrong: None };
    tokio::select! {
        () = reconnecting(client, &mut watched, &mut rng) => {}
        _ = over.wait_for(|over| *over) => {}
    }
    watched
}

async fn reconnecting(client: &Client, watched: &mut Watched, rng: &mut StdRng) {
    loop {
        let last = watched.events.last().map_or(0, |(seq, ..)| *seq);
        let leave_after = (rng.random_range(0..FICKLE) == 0).then(|| rng.random_range(1..6_usize));
        watched.connections += 1;
        if let Some(response) = client.events(&watched.run, last).await {
            match response.status().as_u16() {
                200 => read(response, watched, leave_after).await,
                204 => watched.finished = true,
                500..=599 | 429 => {}
                status => watched.wrong = Some(format!("{status} after event {last}")),
            }
        }
        if watched.finished || watched.wrong.is_some() {
            return;
        }
        tokio::time::sleep(Duration::from_millis(rng.random_range(20..300))).await;
    }
}

/// Reads one connection until it ends, falls silent, or the watcher has had enough of it.
async fn read(mut response: reqwest::Response, watched: &mut Watched, leave_after: Option<usize>) {
    let leave_at = leave_after.map(|more| watched.events.len() + more);
    let mut text = String::new();
    while let Ok(Ok(Some(chunk))) = timeout(SILENCE_LIMIT, response.chunk()).await {
        text.push_str(&String::from_utf8_lossy(&chunk));
        while let Some(end) = text.find("\n\n") {
            let message: String = text.drain(..end + 2).collect();
            let field = |name: &str| message.lines().find_map(|line| line.strip_prefix(name)).map(str::trim);
            if let (Some(id), Some(event)) = (field("id:").and_then(|id| id.parse().ok()), field("event:")) {
                watched.finished = event == "run.finished";
                watched.events.push((id, event.to_owned(), watched.connections));
            }
        }
        if watched.finished || leave_at.is_some_and(|at| watched.events.len() >= at) {
            return;
        }
    }
}
