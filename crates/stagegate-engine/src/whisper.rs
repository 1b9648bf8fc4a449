//! Hints between replicas: owns what this one tells the others, and what it does when it is told something. Without a
//! way for them, or with one that loses every hint, all happens the same, at the next look at the store.

use std::{
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use stagegate_core::{
    RunId,
    hint::{Hint, Hints},
};
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use crate::shared::Shared;

/// How long one who said that it watches is told of news. It says so at every look for news, a second apart at most.
const WATCHING_FOR: Duration = Duration::from_secs(5);

/// What this replica tells the others.
#[derive(Debug)]
pub(crate) struct Whisper {
    hints: Option<Arc<dyn Hints>>,
    began: Instant,
    /// Until then somebody wants to hear of news: milliseconds since `began`.
    listened_until_ms: AtomicU64,
}

impl Whisper {
    pub(crate) fn new(hints: Option<Arc<dyn Hints>>) -> Self {
        Self { hints, began: Instant::now(), listened_until_ms: AtomicU64::new(0) }
    }

    fn say(&self, hint: Hint) {
        if let Some(hints) = &self.hints {
            hints.publish(hint);
        }
    }

    /// There is something to be claimed that this replica has no room for, or handed back.
    pub(crate) fn work(&self) {
        self.say(Hint::Work);
    }

    /// Somebody asked something of a run that another replica owns.
    pub(crate) fn signal(&self, run: RunId) {
        self.say(Hint::Signal(run));
    }

    /// Runs of other replicas are watched here.
    pub(crate) fn watching(&self) {
        self.say(Hint::Watching);
    }

    /// A run has new events. Said only while somebody listens: without watchers there is no traffic.
    pub(crate) fn news(&self, run: RunId) {
        if self.hints.is_some() && self.elapsed_ms() < self.listened_until_ms.load(Ordering::Relaxed) {
            self.say(Hint::News(run));
        }
    }

    fn listened(&self) {
        let until = self.elapsed_ms() + u64::try_from(WATCHING_FOR.as_millis()).unwrap_or(u64::MAX);
        self.listened_until_ms.store(until, Ordering::Relaxed);
    }

    fn elapsed_ms(&self) -> u64 {
        u64::try_from(self.began.elapsed().as_millis()).unwrap_or(u64::MAX)
    }
}

/// Does what hints suggest, until `stop`.
pub(crate) async fn hear(shared: Arc<Shared>, stop: CancellationToken) {
    let Some(hints) = shared.whisper.hints.clone() else { return };
    loop {
        let heard = tokio::select! {
            () = stop.cancelled() => return,
            heard = hints.next() => heard,
        };
        for hint in heard {
            match hint {
                Hint::Work => shared.work.notify_one(),
                Hint::Signal(run) => drop(shared.notify(run)),
                Hint::Watching => shared.whisper.listened(),
                Hint::News(run) => shared.hub.hinted(run),
            }
        }
    }
}
