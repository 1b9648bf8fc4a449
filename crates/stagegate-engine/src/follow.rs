//! Following runs: owns how their events reach whoever watches, wherever they are executed. The store is the truth.
//!
//! Every watched run has one [`Feed`] in this process, and every watcher has a cursor: the seq of the last event that
//! it has. A feed learns of events from three sides, in any order: the commits of this replica, once they are
//! acknowledged; the one poller of this replica, which asks the store for what is new of all runs that are executed
//! elsewhere; and watchers that catch up from the store. It keeps the last few batches, without a gap between them. A
//! watcher takes the batch that follows its cursor; where the feed has news but no longer (or not yet) that batch, the
//! watcher reads the store. So nothing is kept for a slow watcher, and none can be given an event twice or out of turn.

use std::{
    collections::{HashMap, VecDeque},
    sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError, Weak},
    time::Duration,
};

use bytes::Bytes;
use futures::stream::{self, BoxStream, StreamExt};
use stagegate_core::{Error, Event, RunId, Store, TenantId};
use tokio::{
    sync::{Notify, Semaphore},
    time::Instant,
};

use crate::shared::Shared;

/// Events that a watcher reads at once.
const PAGE: u32 = 500;
/// Watchers that read the store at once. The others wait, so that ten thousand who come together exhaust no pool.
const READS_MAX: usize = 16;
/// Texts that a watcher is given at once, in bytes: a slow one holds its page twice, and there may be ten thousand.
const PAGE_MAX_BYTES: usize = 32 * 1024;
/// Events that a feed keeps, and their texts in bytes. A watcher that is further behind reads the store.
const RECENT_MAX: usize = 64;
/// See [`RECENT_MAX`].
const RECENT_MAX_BYTES: usize = 32 * 1024;
/// Runs asked about in one question, and events of each in its answer; what is left comes with the next.
const NEWS_RUNS_MAX: usize = 500;
/// See [`NEWS_RUNS_MAX`].
const NEWS_EVENTS_MAX: u32 = 25;
/// The pause between looks for news, while there are some and at its longest.
const POLL_SHORTEST: Duration = Duration::from_millis(250);
/// See [`POLL_SHORTEST`].
const POLL_LONGEST: Duration = Duration::from_secs(1);
/// The pause before a look that was hinted at: what else is hinted in it is looked for with it.
const HINTED_PAUSE: Duration = Duration::from_millis(20);

/// Consecutive events of one run; never empty. Shared by everybody who watches it.
#[derive(Debug)]
pub struct EventBatch {
    events: Vec<Event>,
    first: u64,
    last: u64,
    /// The bytes of its texts.
    text_bytes: usize,
    rendered: OnceLock<Bytes>,
}

impl EventBatch {
    fn of(events: Vec<Event>) -> Option<Arc<Self>> {
        let (first, last) = (events.first()?.seq, events.last()?.seq);
        let text_bytes = events.iter().map(Event::text_bytes).sum();
        Some(Arc::new(Self { events, first, last, text_bytes, rendered: OnceLock::new() }))
    }

    /// The events, in order and gap-free.
    pub fn events(&self) -> &[Event] {
        &self.events
    }

    /// The events in the caller's form, made once for all who watch. Every caller must give the same `render`.
    pub fn rendered(&self, render: impl FnOnce(&[Event]) -> Bytes) -> Bytes {
        self.rendered.get_or_init(|| render(&self.events)).clone()
    }

    /// What of it comes after a seq inside of it.
    fn after(self: &Arc<Self>, seen: u64) -> Arc<Self> {
        let rest = self.events.iter().filter(|event| event.seq > seen).cloned().collect();
        Self::of(rest).unwrap_or_else(|| Arc::clone(self))
    }

    fn ends_run(&self) -> bool {
        self.events.last().is_some_and(|event| event.kind.ends_run())
    }
}

/// What this process knows of a watched run's events.
#[derive(Debug, Default)]
struct Feed {
    known: Mutex<Known>,
    news: Notify,
}

#[derive(Debug, Default)]
struct Known {
    /// The newest seq that is known to be durable; 0 before anything is known.
    last: u64,
    /// The newest batches: without a gap, up to `last`.
    recent: VecDeque<Arc<EventBatch>>,
    /// Changed under the hub's lock alone.
    watchers: usize,
}

/// What follows a cursor.
enum Following {
    Nothing,
    Batch(Arc<EventBatch>),
    /// There is more, but not here.
    InStore,
}

impl Feed {
    fn known(&self) -> MutexGuard<'_, Known> {
        self.known.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Takes in durable events, from wherever they come.
    fn learn(&self, batch: &Arc<EventBatch>) {
        if self.known().learn(batch) {
            self.news.notify_waiters();
        }
    }

    /// There are events up to this seq.
    fn reaches(&self, seq: u64) {
        let mut known = self.known();
        if seq > known.last {
            known.recent.clear();
            known.last = seq;
            drop(known);
            self.news.notify_waiters();
        }
    }
}

impl Known {
    /// Whether there was anything new in it.
    fn learn(&mut self, batch: &Arc<EventBatch>) -> bool {
        if batch.last <= self.last {
            return false;
        }
        if batch.first > self.last + 1 {
            self.recent.clear(); // A gap: whoever stands before it reads the store.
        }
        let fresh = if batch.first > self.last { Arc::clone(batch) } else { batch.after(self.last) };
        self.recent.push_back(fresh);
        self.last = batch.last;
        let sizes = self.recent.iter().map(|batch| (batch.events.len(), batch.text_bytes));
        let (mut kept, mut bytes) = sizes.fold((0, 0), |(kept, bytes), (more, texts)| (kept + more, bytes + texts));
        while kept > RECENT_MAX || bytes > RECENT_MAX_BYTES {
            let Some(oldest) = self.recent.pop_front() else { break };
            kept -= oldest.events.len();
            bytes -= oldest.text_bytes;
        }
        true
    }

    fn after(&mut self, seen: u64) -> Following {
        if seen >= self.last {
            return Following::Nothing;
        }
        let Some(index) = self.recent.iter().position(|batch| batch.first <= seen + 1 && seen < batch.last) else {
            return Following::InStore;
        };
        let batch = Arc::clone(&self.recent[index]);
        if self.watchers == 1 {
            self.recent.drain(..=index); // Nobody else will ask for it.
        }
        Following::Batch(if batch.first == seen + 1 { batch } else { batch.after(seen) })
    }
}

/// Who watches what, in this process.
#[derive(Debug)]
pub(crate) struct Hub {
    feeds: Mutex<HashMap<RunId, Arc<Feed>>>,
    reads: Semaphore,
    /// The poller has something to do: somebody watches, a hint came, or the engine is gone.
    poke: Notify,
    hinted: Mutex<Vec<RunId>>,
}

impl Default for Hub {
    fn default() -> Self {
        let (feeds, hinted) = (Mutex::default(), Mutex::default());
        Self { feeds, reads: Semaphore::new(READS_MAX), poke: Notify::new(), hinted }
    }
}

impl Hub {
    fn feeds(&self) -> MutexGuard<'_, HashMap<RunId, Arc<Feed>>> {
        self.feeds.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn feed(&self, run: RunId) -> Option<Arc<Feed>> {
        self.feeds().get(&run).cloned()
    }

    /// Hands durable events of a run to those who watch it.
    pub(crate) fn tell(&self, run: RunId, events: Vec<Event>) {
        if let Some(feed) = self.feed(run)
            && let Some(batch) = EventBatch::of(events)
        {
            feed.learn(&batch);
        }
    }

    /// Another replica says that there is news of a run.
    pub(crate) fn hinted(&self, run: RunId) {
        let mut hinted = self.hinted.lock().unwrap_or_else(PoisonError::into_inner);
        if hinted.len() < NEWS_RUNS_MAX && self.feeds().contains_key(&run) {
            hinted.push(run);
            self.poke.notify_one();
        }
    }

    /// Ends the poller.
    pub(crate) fn close(&self) {
        self.poke.notify_one();
    }

    /// The watched runs of which something is known, each with the newest seq that is. All of them, or of these.
    fn watched(&self, only: Option<&[RunId]>) -> Vec<(RunId, u64)> {
        let feeds = self.feeds();
        let seen = |(run, feed): (&RunId, &Arc<Feed>)| (*run, feed.known().last);
        let watched: Vec<_> = match only {
            None => feeds.iter().map(seen).collect(),
            Some(runs) => runs.iter().filter_map(|run| feeds.get_key_value(run)).map(seen).collect(),
        };
        watched.into_iter().filter(|(_, last)| *last > 0).collect()
    }

    /// Each run once, however often it was hinted at: the store is asked for each of what it is given, and a run that is
    /// named twice would have its events twice.
    fn take_hinted(&self) -> Vec<RunId> {
        let mut hinted = std::mem::take(&mut *self.hinted.lock().unwrap_or_else(PoisonError::into_inner));
        hinted.sort_unstable();
        hinted.dedup();
        hinted
    }

    fn is_watched(&self) -> bool {
        !self.feeds().is_empty()
    }

    fn watch(self: &Arc<Self>, run: RunId) -> Watch {
        let mut feeds = self.feeds();
        if feeds.is_empty() {
            self.poke.notify_one();
        }
        let feed = Arc::clone(feeds.entry(run).or_default());
        feed.known().watchers += 1;
        Watch { hub: Arc::clone(self), feed, run }
    }
}

/// One watcher's share in a feed. The last one takes the feed with it.
#[derive(Debug)]
struct Watch {
    hub: Arc<Hub>,
    feed: Arc<Feed>,
    run: RunId,
}

impl Drop for Watch {
    fn drop(&mut self) {
        let mut feeds = self.hub.feeds();
        let mut known = self.feed.known();
        known.watchers -= 1;
        if known.watchers == 0 {
            feeds.remove(&self.run);
        }
    }
}

/// Somebody who watches a run.
struct Watcher {
    store: Arc<dyn Store>,
    watch: Watch,
    tenant: TenantId,
    /// The seq of the last event that was handed over.
    seen: u64,
    stage: Stage,
}

/// How far a watcher is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Stage {
    /// It reads the store, which also checks whose run it is, until it has seen what is there.
    CatchingUp,
    /// It has seen what was there, and the feed tells what comes.
    Joined,
    /// The run has ended, and all was handed over.
    Ended,
}

/// See [`crate::Engine::watch`].
pub(crate) fn watch(
    store: Arc<dyn Store>,
    hub: &Arc<Hub>,
    tenant: TenantId,
    run: RunId,
    after: u64,
) -> BoxStream<'static, Result<Arc<EventBatch>, Error>> {
    let watcher = Watcher { store, watch: hub.watch(run), tenant, seen: after, stage: Stage::CatchingUp };
    stream::unfold(Some(watcher), |watcher| async move {
        let mut watcher = watcher?;
        match watcher.next().await {
            Ok(Some(batch)) => Some((Ok(batch), Some(watcher))),
            Ok(None) => None,
            Err(error) => Some((Err(error), None)),
        }
    })
    .boxed()
}

impl Watcher {
    /// The next events; None where the run has ended and all were handed over.
    async fn next(&mut self) -> Result<Option<Arc<EventBatch>>, Error> {
        loop {
            let batch = match self.stage {
                Stage::CatchingUp => match self.read().await? {
                    Some(batch) => Some(batch),
                    None => self.join().await?,
                },
                Stage::Joined => self.wait().await,
                Stage::Ended => return Ok(None),
            };
            if let Some(batch) = batch {
                self.seen = batch.last;
                return Ok(Some(batch));
            }
        }
    }

    /// There is nothing more in the store: either the run has ended, or the feed tells what comes.
    async fn join(&mut self) -> Result<Option<Arc<EventBatch>>, Error> {
        match self.store.run_record(&self.tenant, self.watch.run).await? {
            Some(record) if !record.state.is_terminal() || record.last_seq > self.seen => {
                // Whoever claims to have seen what has not happened yet would wait past the end.
                self.seen = self.seen.min(record.last_seq);
                self.watch.feed.reaches(record.last_seq);
                self.stage = Stage::Joined;
                let known = self.watch.feed.known().last;
                if known > record.last_seq {
                    tokio::time::sleep(POLL_SHORTEST).await; // A store that lags behind is not asked without a pause.
                }
            }
            _ => self.stage = Stage::Ended,
        }
        Ok(None)
    }

    /// Waits for what follows in the feed; None where the store has to be read for it.
    async fn wait(&mut self) -> Option<Arc<EventBatch>> {
        loop {
            let news = self.watch.feed.news.notified();
            tokio::pin!(news);
            news.as_mut().enable(); // Before the look, so that nothing falls between.
            let following = self.watch.feed.known().after(self.seen);
            match following {
                Following::Batch(batch) => {
                    if batch.ends_run() {
                        self.stage = Stage::Ended; // Told as it happens: whoever wants to see a retry comes back.
                    }
                    return Some(batch);
                }
                Following::InStore => {
                    self.stage = Stage::CatchingUp;
                    return None;
                }
                Following::Nothing => news.await,
            }
        }
    }

    /// Reads what the store has after the cursor. What it reads to the end it tells the others.
    async fn read(&mut self) -> Result<Option<Arc<EventBatch>>, Error> {
        let hub = Arc::clone(&self.watch.hub);
        let permit = hub.reads.acquire().await;
        let mut events = self.store.events(&self.tenant, self.watch.run, self.seen, PAGE).await?;
        drop(permit);
        let is_last = events.len() < PAGE as usize && !shorten(&mut events);
        let Some(batch) = EventBatch::of(events) else { return Ok(None) };
        let alone = self.watch.feed.known().watchers == 1;
        if alone {
            self.watch.feed.reaches(batch.last);
        } else {
            self.watch.feed.learn(&batch);
        }
        // A run that has ended may have been retried since: that is for its record to say.
        if is_last && !batch.ends_run() {
            self.stage = Stage::Joined;
        }
        Ok(Some(batch))
    }
}

/// Leaves the events of a page whose texts are no more than one may have, and one at least. Whether any were taken off.
fn shorten(events: &mut Vec<Event>) -> bool {
    let mut bytes = 0;
    let fits = events.iter().take_while(|event| {
        bytes += event.text_bytes();
        bytes <= PAGE_MAX_BYTES
    });
    let fits = fits.count().max(1);
    let is_shortened = fits < events.len();
    events.truncate(fits);
    events.shrink_to_fit();
    is_shortened
}

/// Looks for news of the watched runs that are executed elsewhere, for everybody in this process, as long as there is
/// an engine. Watchers outlive a drain, so this does too.
pub(crate) async fn poll(hub: Arc<Hub>, shared: Weak<Shared>) {
    let (mut pause, mut next, mut failing) = (POLL_SHORTEST, Instant::now(), false);
    loop {
        if hub.is_watched() {
            if tokio::time::timeout_at(next, hub.poke.notified()).await.is_ok() {
                tokio::time::sleep(HINTED_PAUSE).await;
            }
        } else {
            hub.poke.notified().await;
        }
        let Some(shared) = shared.upgrade() else { return };
        let hinted = hub.take_hinted();
        let all = Instant::now() >= next;
        let mut asked = hub.watched((!all).then_some(hinted.as_slice()));
        shared.retain_elsewhere(&mut asked);
        asked.sort_unstable(); // So that a simulation's seed decides that too.
        if all && !asked.is_empty() {
            shared.whisper.watching();
        }
        match look(&shared, &asked).await {
            Ok(true) => (pause, failing) = (POLL_SHORTEST, false),
            Ok(false) if all => (pause, failing) = ((pause * 5 / 4).min(POLL_LONGEST), false),
            Ok(false) => {}
            Err(error) => {
                pause = POLL_LONGEST;
                if !std::mem::replace(&mut failing, true) {
                    tracing::warn!(%error, runs = asked.len(), "no look for events of other replicas was possible");
                }
            }
        }
        if all {
            next = Instant::now() + pause.mul_f64(0.8 + shared.random::<f64>() * 0.4);
        }
    }
}

/// One look. Whether there was anything.
async fn look(shared: &Shared, asked: &[(RunId, u64)]) -> Result<bool, Error> {
    let mut any = false;
    for part in asked.chunks(NEWS_RUNS_MAX) {
        for (run, events) in shared.store.news(part, NEWS_EVENTS_MAX).await? {
            any = true;
            shared.hub.tell(run, events);
        }
    }
    Ok(any)
}

#[cfg(test)]
mod tests {
    use chrono::DateTime;
    use stagegate_core::EventKind;

    use rand::{Rng, SeedableRng, rngs::SmallRng};

    use super::*;

    fn event(seq: u64, kind: EventKind) -> Event {
        Event::new(seq, DateTime::from_timestamp_millis(0).expect("in range"), kind)
    }

    fn events(seqs: impl IntoIterator<Item = u64>) -> Vec<Event> {
        seqs.into_iter().map(|seq| event(seq, EventKind::RunStarted)).collect()
    }

    fn batch(seqs: impl IntoIterator<Item = u64>) -> Arc<EventBatch> {
        EventBatch::of(events(seqs)).expect("events")
    }

    fn seqs(batch: &EventBatch) -> Vec<u64> {
        batch.events().iter().map(|event| event.seq).collect()
    }

    /// A watcher as [`Watcher`] goes about it, with a store that has `durable` events.
    struct Reader {
        seen: u64,
        catching_up: bool,
        had: Vec<u64>,
    }

    impl Reader {
        fn step(&mut self, known: &mut Known, durable: u64) {
            let got = if self.catching_up {
                self.catching_up = false;
                let read: Vec<u64> = (self.seen + 1..=durable).collect();
                EventBatch::of(events(read)).inspect(|batch| {
                    known.learn(batch);
                })
            } else {
                match known.after(self.seen) {
                    Following::Nothing => None,
                    Following::Batch(batch) => Some(batch),
                    Following::InStore => {
                        self.catching_up = true;
                        None
                    }
                }
            };
            if let Some(batch) = got {
                self.had.extend(seqs(&batch));
                self.seen = batch.last;
            }
        }
    }

    /// Commits here and elsewhere, news that arrives late, and watchers who come and read whenever they like, in any
    /// order: each has every event once and in turn.
    #[test]
    fn whatever_the_order_every_watcher_has_every_event_once_and_in_turn() {
        for seed in 0..2_000 {
            let mut rng = SmallRng::seed_from_u64(seed);
            let (mut known, mut durable) = (Known::default(), 0_u64);
            let mut late: Vec<Arc<EventBatch>> = Vec::new();
            let mut readers: Vec<Reader> = Vec::new();
            for _ in 0..rng.random_range(10..200) {
                match rng.random_range(0..8) {
                    0 => {
                        let from = durable + 1;
                        durable += rng.random_range(1..4);
                        known.learn(&batch(from..=durable));
                    }
                    1 => durable += rng.random_range(1..40), // Elsewhere.
                    2 if durable > known.last => {
                        let end = rng.random_range(known.last + 1..=durable);
                        late.push(batch(known.last + 1..=end));
                    }
                    3 if !late.is_empty() => {
                        let news = late.swap_remove(rng.random_range(0..late.len()));
                        known.learn(&news);
                    }
                    4 if readers.len() < 4 => {
                        let seen = rng.random_range(0..=durable);
                        readers.push(Reader { seen, catching_up: true, had: vec![seen] });
                        known.watchers = readers.len();
                    }
                    _ if !readers.is_empty() => {
                        let which = rng.random_range(0..readers.len());
                        readers[which].step(&mut known, durable);
                    }
                    _ => {}
                }
                assert!(known.recent.iter().map(|batch| batch.events.len()).sum::<usize>() <= RECENT_MAX);
            }
            if durable > known.last {
                known.learn(&batch(known.last + 1..=durable));
            }
            for reader in &mut readers {
                while reader.seen < durable {
                    reader.step(&mut known, durable);
                }
                let whole: Vec<u64> = (reader.had[0]..=durable).collect();
                assert_eq!(reader.had, whole, "seed {seed}");
            }
        }
    }

    #[test]
    fn a_slow_watcher_costs_a_feed_nothing_and_reads_the_store() {
        let mut known = Known { watchers: 2, ..Known::default() };
        for seq in 1..=10_000 {
            known.learn(&batch([seq]));
        }
        assert_eq!(known.recent.len(), RECENT_MAX);
        assert!(matches!(known.after(5), Following::InStore));
        assert!(matches!(known.after(9_999), Following::Batch(last) if seqs(&last) == [10_000]));
        assert!(matches!(known.after(10_000), Following::Nothing));
    }

    #[test]
    fn a_feed_and_a_page_hold_so_many_bytes_however_few_events_they_are() {
        let long = |seq| {
            let reason = Some("r".repeat(PAGE_MAX_BYTES * 2 / 5));
            event(seq, EventKind::RunWaiting { until: None, reason })
        };
        let mut known = Known { watchers: 2, ..Known::default() };
        for seq in 1..=10 {
            known.learn(&EventBatch::of(vec![long(seq)]).expect("events"));
        }
        assert_eq!(known.recent.len(), 2);
        let mut page: Vec<_> = (1..=10).map(long).collect();
        assert!(shorten(&mut page) && page.len() == 2);
        assert!(!shorten(&mut page) && page.len() == 2);
        let mut huge = vec![event(1, EventKind::RunWaiting { until: None, reason: Some("r".repeat(PAGE_MAX_BYTES)) })];
        assert!(!shorten(&mut huge) && huge.len() == 1, "a page is never empty");
    }

    #[test]
    fn what_the_only_watcher_has_taken_is_not_kept() {
        let mut known = Known { watchers: 1, ..Known::default() };
        known.learn(&batch([1, 2]));
        known.learn(&batch([3]));
        assert!(matches!(known.after(0), Following::Batch(_)));
        assert_eq!(known.recent.len(), 1);
        assert!(matches!(known.after(2), Following::Batch(_)));
        assert!(known.recent.is_empty());
        assert!(matches!(known.after(0), Following::InStore), "whoever comes later reads");
    }

    #[test]
    fn events_are_rendered_once_for_all_who_watch() {
        let batch = batch([1, 2]);
        let mut times = 0;
        for _ in 0..3 {
            batch.rendered(|events| {
                times += 1;
                Bytes::from(events.len().to_string())
            });
        }
        assert_eq!(times, 1);
    }

    #[tokio::test]
    async fn a_run_that_is_hinted_at_twice_is_asked_about_once() {
        let hub = Arc::new(Hub::default());
        let (one, two) = (RunId(uuid::Uuid::from_u128(1)), RunId(uuid::Uuid::from_u128(2)));
        let _watchers = (hub.watch(one), hub.watch(two));
        for run in [two, one, two, one, one] {
            hub.hinted(run);
        }
        assert_eq!(hub.take_hinted(), [one, two]);
        assert!(hub.take_hinted().is_empty());
    }

    #[tokio::test]
    async fn nothing_is_kept_of_a_run_that_nobody_watches_any_more() {
        let hub = Arc::new(Hub::default());
        let run = RunId(uuid::Uuid::from_u128(1));
        let (one, two) = (hub.watch(run), hub.watch(run));
        drop(one);
        assert!(hub.is_watched());
        drop(two);
        assert!(!hub.is_watched());
    }
}
