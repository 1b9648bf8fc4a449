//! The two writers: submits and steps, each in batches. Owns what happens when the store fails under them.
//!
//! Steps are written one batch after the other, each of all that has gathered meanwhile. What goes wrong with one step
//! must not hold up the others, so:
//! - A batch that takes long goes on by itself while the next one is written, in as many lanes as there are.
//! - A batch that failed though the database answers is written again in parts, and those that fail again in single
//!   steps. A step that fails alone (somebody holds its run's row) is set aside and repeated on its own schedule.
//! - While the database does not answer, a batch stays as it is and keeps its lane. When all lanes are taken nothing
//!   more is read from the queue, and when that is full the senders wait.
//!
//! A run has at most one step under way, wherever it is, so that none of this changes the order of its steps.

use std::{sync::Arc, time::Duration};

use futures::{FutureExt, future::BoxFuture};
use stagegate_core::{
    Error, Store, StoreError, StoreResult,
    store::{Commit, Committed, NewRun, Submitted},
};
use stagegate_telemetry::Metrics;
use tokio::{
    sync::{OwnedSemaphorePermit, Semaphore},
    time::Instant,
};
use tokio_util::task::TaskTracker;

use crate::batch::{Batcher, Entry};

/// The pause before a failed commit is tried again: from the first to the longest.
const RETRY_FIRST: Duration = Duration::from_millis(50);
const RETRY_LONGEST: Duration = Duration::from_secs(2);
/// A batch that takes longer than this goes on beside the next one.
const SLOW: Duration = Duration::from_millis(250);
/// Batches under way at once, and with them connections.
const LANES: usize = 3;
/// Steps that were set aside and are being tried at once; each may hold a connection until its statement times out.
const ASIDE_AT_ONCE: usize = 2;
/// Into how many parts a batch is split that failed.
const PARTS: usize = 16;

type Step = Entry<Commit, Committed>;

/// Starts the writer of steps. It repeats a step until the store answers: it must not be lost, and a repeated one is
/// recognised. An author who has stopped waiting (it was fenced) is left out of the next try.
pub(crate) fn steps(
    tracker: &TaskTracker,
    store: &Arc<dyn Store>,
    metrics: &Metrics,
    batch_max: usize,
) -> Batcher<Commit, Committed> {
    let writer = Arc::new(StepWriter {
        tracker: tracker.clone(),
        store: Arc::clone(store),
        metrics: metrics.clone(),
        lanes: Arc::new(Semaphore::new(LANES)),
        aside: Semaphore::new(ASIDE_AT_ONCE),
    });
    Batcher::start(tracker, batch_max, Commit::text_bytes, move |batch| Arc::clone(&writer).write(batch))
}

/// See [`steps`].
struct StepWriter {
    tracker: TaskTracker,
    store: Arc<dyn Store>,
    metrics: Metrics,
    lanes: Arc<Semaphore>,
    aside: Semaphore,
}

impl StepWriter {
    /// Writes a batch; returns when it is written or goes on by itself.
    async fn write(self: Arc<Self>, batch: Vec<Step>) {
        let Ok(lane) = Arc::clone(&self.lanes).acquire_owned().await else { return };
        let mut writing = Arc::clone(&self).attempt(batch, lane);
        tokio::select! {
            biased;
            () = &mut writing => return,
            () = tokio::time::sleep(SLOW) => {}
        }
        self.tracker.spawn(writing);
    }

    /// Writes a batch until it is written, or in parts from where it must be split.
    fn attempt(self: Arc<Self>, batch: Vec<Step>, lane: OwnedSemaphorePermit) -> BoxFuture<'static, ()> {
        let work = async move {
            let (mut commits, mut answers): (Vec<_>, Vec<_>) = batch.into_iter().unzip();
            let mut pause = RETRY_FIRST;
            loop {
                let error = match self.commit(&commits).await {
                    Ok(results) => return answer(answers, results),
                    Err(error) => error,
                };
                if !error.is_retryable() {
                    drop(lane);
                    return self.refused(commits, answers, error);
                }
                tracing::warn!(%error, steps = commits.len(), "a commit failed; it is tried again");
                let answers_at_all = matches!(error, StoreError::Unavailable(_)) && self.store.ping().await.is_ok();
                let mut waiting = answers.iter().map(|answer| !answer.is_closed()).collect::<Vec<_>>().into_iter();
                commits.retain(|_| waiting.next().unwrap_or(false));
                answers.retain(|answer| !answer.is_closed());
                if commits.is_empty() {
                    return;
                }
                if answers_at_all {
                    drop(lane);
                    return self.split(commits, answers);
                }
                tokio::time::sleep(pause).await;
                pause = (pause * 2).min(RETRY_LONGEST);
            }
        };
        work.boxed()
    }

    async fn commit(&self, commits: &[Commit]) -> StoreResult<Vec<Committed>> {
        let started = Instant::now();
        let results = self.store.commit(commits).await?;
        self.metrics.checkpoint_save.observe(started.elapsed().as_secs_f64());
        #[expect(clippy::cast_precision_loss, reason = "a batch is small")]
        self.metrics.commit_batch.observe(commits.len() as f64);
        Ok(results)
    }

    /// The database answers, and this batch failed: somewhere in it is a step that holds up the others.
    fn split(self: &Arc<Self>, commits: Vec<Commit>, answers: Vec<Answer>) {
        let size = commits.len().div_ceil(PARTS);
        let mut steps = commits.into_iter().zip(answers);
        loop {
            let part: Vec<Step> = steps.by_ref().take(size).collect();
            let writer = Arc::clone(self);
            match part.len() {
                0 => return,
                1 => self.tracker.spawn(async move {
                    for step in part {
                        writer.alone(step).await;
                    }
                }),
                _ => self.tracker.spawn(async move {
                    tokio::time::sleep(RETRY_FIRST).await;
                    if let Ok(lane) = Arc::clone(&writer.lanes).acquire_owned().await {
                        writer.attempt(part, lane).await;
                    }
                }),
            };
        }
    }

    /// Writes one step, however long it takes. The first try has a lane, as it is probably not the one that fails.
    async fn alone(&self, (commit, answer): Step) {
        let mut pause = RETRY_FIRST;
        let mut lanes = &*self.lanes;
        loop {
            tokio::time::sleep(pause).await;
            let permit = lanes.acquire().await;
            if answer.is_closed() {
                return;
            }
            match self.commit(std::slice::from_ref(&commit)).await {
                Ok(results) => return self::answer(vec![answer], results),
                Err(error) if error.is_retryable() => {
                    tracing::warn!(%error, run_id = %commit.lease.run, "the commit of this run fails; the others go on");
                }
                Err(error) => {
                    let _ = answer.send(Err(error.into()));
                    return;
                }
            }
            drop(permit);
            lanes = &self.aside;
            pause = (pause * 2).min(RETRY_LONGEST);
        }
    }

    /// The store refuses the batch for good: it holds a step that cannot be taken. It alone must fail.
    fn refused(self: &Arc<Self>, commits: Vec<Commit>, answers: Vec<Answer>, error: StoreError) {
        if commits.len() > 1 {
            tracing::error!(%error, steps = commits.len(), "the store refused a batch; its steps are tried apart");
            return self.split(commits, answers);
        }
        let error = Error::from(error);
        for answer in answers {
            let _ = answer.send(Err(error.clone()));
        }
    }
}

type Answer = tokio::sync::oneshot::Sender<Result<Committed, Error>>;

fn answer(answers: Vec<Answer>, results: Vec<Committed>) {
    for (answer, result) in answers.into_iter().zip(results) {
        let _ = answer.send(Ok(result)); // An author who is gone was fenced.
    }
}

/// Starts the writer of submits. A failure goes to the caller: it may have happened, which the idempotency key and
/// the next look at what this replica owns resolve.
pub(crate) fn submits(tracker: &TaskTracker, store: &Arc<dyn Store>, batch_max: usize) -> Batcher<NewRun, Submitted> {
    let store = Arc::clone(store);
    let weigh = |run: &NewRun| run.input.text_bytes();
    Batcher::start(tracker, batch_max, weigh, move |batch| {
        write_submits(Arc::clone(&store), batch, |store, runs| store.submit(runs))
    })
}

/// [`Store::submit`].
type Insert = for<'a> fn(&'a dyn Store, &'a [NewRun]) -> BoxFuture<'a, StoreResult<Vec<Submitted>>>;

/// Writes a batch. One that the store refuses for good holds a run that cannot be taken: it is halved until that one fails
/// alone, with its reason.
async fn write_submits(store: Arc<dyn Store>, batch: Vec<Entry<NewRun, Submitted>>, insert: Insert) {
    let (mut runs, mut answers): (Vec<_>, Vec<_>) = batch.into_iter().unzip();
    // What is still to be written ends in parts of these sizes.
    let mut parts = vec![runs.len()];
    while let Some(size) = parts.pop() {
        let part = runs.split_off(runs.len() - size);
        match insert(&*store, &part).await {
            Ok(results) => {
                for (answer, result) in answers.split_off(answers.len() - size).into_iter().zip(results) {
                    let _ = answer.send(Ok(result)); // A caller who hung up finds its run by its key.
                }
            }
            Err(error) if size > 1 && !error.is_retryable() => {
                tracing::error!(%error, runs = size, "the store refused a batch of submits; it is halved");
                runs.extend(part);
                parts.extend([size / 2, size - size / 2]);
            }
            Err(error) => {
                let error = Error::from(error);
                for answer in answers.split_off(answers.len() - size) {
                    let _ = answer.send(Err(error.clone()));
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use stagegate_core::Code;
    use stagegate_store_sqlite::SqliteStore;
    use stagegate_testkit::store::fixtures::new_run;

    use super::*;

    const BAD: i16 = 13;

    /// Refuses a batch with a bad run, as a database does: whole.
    fn refusing<'a>(store: &'a dyn Store, runs: &'a [NewRun]) -> BoxFuture<'a, StoreResult<Vec<Submitted>>> {
        if runs.iter().any(|run| run.priority == BAD) {
            return std::future::ready(Err(StoreError::Defect("no such value".to_owned()))).boxed();
        }
        store.submit(runs)
    }

    fn away<'a>(_: &'a dyn Store, _: &'a [NewRun]) -> BoxFuture<'a, StoreResult<Vec<Submitted>>> {
        std::future::ready(Err(StoreError::Unavailable("away".to_owned()))).boxed()
    }

    async fn written(runs: Vec<NewRun>, insert: Insert) -> Vec<Result<Submitted, Error>> {
        let store: Arc<dyn Store> = Arc::new(SqliteStore::in_memory().await.expect("a store"));
        let (mut batch, mut answers) = (Vec::new(), Vec::new());
        for run in runs {
            let (answer, answered) = tokio::sync::oneshot::channel();
            batch.push((run, answer));
            answers.push(answered);
        }
        write_submits(store, batch, insert).await;
        futures::future::join_all(answers).await.into_iter().map(|answer| answer.expect("answered")).collect()
    }

    #[tokio::test]
    async fn a_submit_that_the_store_refuses_fails_alone_with_its_reason() {
        let run = |n: i64| NewRun { priority: if n == 3 || n == 7 { BAD } else { 0 }, ..new_run(n) };
        for (n, answer) in (0..).zip(written((0..11).map(run).collect(), refusing).await) {
            match answer {
                Ok(answer) => assert!(n != 3 && n != 7 && matches!(answer, Submitted::Accepted(None)), "{n}"),
                Err(error) => {
                    assert!((n == 3 || n == 7) && error.to_string().contains("no such value"), "{n}: {error}");
                }
            }
        }
    }

    #[tokio::test]
    async fn submits_that_meet_an_outage_are_asked_for_once_and_all_told() {
        let answers = written((0..4).map(new_run).collect(), away).await;
        assert!(answers.iter().all(|answer| matches!(answer, Err(error) if error.code == Code::Unavailable)));
    }
}
