//! The two writers: submits and steps, each in batches. Owns what happens when the store fails under them.

use std::{sync::Arc, time::Duration};

use stagegate_core::{
    Error, Store,
    store::{Commit, Committed, NewRun, Submitted},
};
use stagegate_telemetry::Metrics;
use tokio::time::Instant;
use tokio_util::task::TaskTracker;

use crate::batch::{Batcher, Entry};

/// The pause before a failed commit is tried again: from the first to the longest.
const RETRY_FIRST: Duration = Duration::from_millis(50);
const RETRY_LONGEST: Duration = Duration::from_secs(2);

/// Starts the writer of steps. It repeats a batch until the store answers: a step must not be lost, and a repeated
/// one is recognised. An author who has stopped waiting (it was fenced) is left out of the next try.
pub(crate) fn steps(
    tracker: &TaskTracker,
    store: &Arc<dyn Store>,
    metrics: &Metrics,
    batch_max: usize,
) -> Batcher<Commit, Committed> {
    let (store, metrics) = (Arc::clone(store), metrics.clone());
    Batcher::start(tracker, batch_max, move |batch| write_steps(Arc::clone(&store), metrics.clone(), batch))
}

async fn write_steps(store: Arc<dyn Store>, metrics: Metrics, batch: Vec<Entry<Commit, Committed>>) {
    let (mut commits, mut answers): (Vec<_>, Vec<_>) = batch.into_iter().unzip();
    let mut pause = RETRY_FIRST;
    loop {
        let started = Instant::now();
        match store.commit(&commits).await {
            Ok(results) => {
                metrics.checkpoint_save.observe(started.elapsed().as_secs_f64());
                #[expect(clippy::cast_precision_loss, reason = "a batch is small")]
                metrics.commit_batch.observe(commits.len() as f64);
                for (answer, result) in answers.into_iter().zip(results) {
                    let _ = answer.send(Ok(result)); // An author who is gone was fenced.
                }
                return;
            }
            Err(error) if error.is_retryable() => {
                tracing::warn!(%error, steps = commits.len(), "a commit failed; it is tried again");
                tokio::time::sleep(pause).await;
                pause = (pause * 2).min(RETRY_LONGEST);
                let mut waiting = answers.iter().map(|answer| !answer.is_closed()).collect::<Vec<_>>().into_iter();
                commits.retain(|_| waiting.next().unwrap_or(false));
                answers.retain(|answer| !answer.is_closed());
                if commits.is_empty() {
                    return;
                }
            }
            Err(error) if commits.len() == 1 => {
                let _ = answers.remove(0).send(Err(error.into()));
                return;
            }
            Err(error) => {
                // A batch that the store refuses for good holds a step that it cannot take: it alone must fail.
                tracing::error!(%error, steps = commits.len(), "the store refused a batch; each step is tried alone");
                for alone in commits.into_iter().zip(answers) {
                    Box::pin(write_steps(Arc::clone(&store), metrics.clone(), vec![alone])).await;
                }
                return;
            }
        }
    }
}

/// Starts the writer of submits. A failure goes to the caller: it may have happened, which the idempotency key and
/// the next look at what this replica owns resolve.
pub(crate) fn submits(tracker: &TaskTracker, store: &Arc<dyn Store>, batch_max: usize) -> Batcher<NewRun, Submitted> {
    let store = Arc::clone(store);
    Batcher::start(tracker, batch_max, move |batch| write_submits(Arc::clone(&store), batch))
}

async fn write_submits(store: Arc<dyn Store>, batch: Vec<Entry<NewRun, Submitted>>) {
    let (runs, answers): (Vec<_>, Vec<_>) = batch.into_iter().unzip();
    match store.submit(&runs).await {
        Ok(results) => {
            for (answer, result) in answers.into_iter().zip(results) {
                let _ = answer.send(Ok(result)); // A caller who hung up finds its run by its key.
            }
        }
        Err(error) => {
            let error = Error::from(error);
            for answer in answers {
                let _ = answer.send(Err(error.clone()));
            }
        }
    }
}
