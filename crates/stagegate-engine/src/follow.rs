//! Following a run: owns how its events reach whoever watches, wherever the run is executed. The store is the truth;
//! a commit of this replica only wakes its watchers earlier.

use std::{
    collections::HashMap,
    sync::{Arc, Mutex, PoisonError, Weak},
    time::Duration,
};

use futures::stream::{self, BoxStream, StreamExt};
use stagegate_core::{Error, Event, RunId, Store, TenantId};
use tokio::sync::Notify;

/// Events read at once.
const PAGE: u32 = 500;
/// The pause between looks at a run that another replica executes.
const POLL: Duration = Duration::from_millis(250);

/// Who watches what, in this process.
#[derive(Debug, Default)]
pub(crate) struct Hub {
    watched: Mutex<HashMap<RunId, Weak<Notify>>>,
}

impl Hub {
    /// Wakes the watchers of a run.
    pub(crate) fn wake(&self, run: RunId) {
        let watched = self.watched.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(notify) = watched.get(&run).and_then(Weak::upgrade) {
            notify.notify_waiters();
        }
    }

    fn watch(&self, run: RunId) -> Arc<Notify> {
        let mut watched = self.watched.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(notify) = watched.get(&run).and_then(Weak::upgrade) {
            return notify;
        }
        // Nobody watches what is dropped: forget it when the map has doubled, so that it stays in proportion.
        if watched.len() == watched.capacity() {
            watched.retain(|_, notify| notify.strong_count() > 0);
        }
        let notify = Arc::new(Notify::new());
        watched.insert(run, Arc::downgrade(&notify));
        notify
    }
}

/// See [`crate::Engine::follow`].
pub(crate) fn follow(
    store: Arc<dyn Store>,
    hub: &Hub,
    tenant: TenantId,
    run: RunId,
    after: u64,
) -> BoxStream<'static, Result<Vec<Event>, Error>> {
    let notify = hub.watch(run);
    let state = Some((store, notify, tenant, after));
    stream::unfold(state, move |state| async move {
        let (store, notify, tenant, after) = state?;
        match next(&store, &notify, &tenant, run, after).await {
            Ok(events) => {
                // After `run.finished` the next look ends the stream, unless the run was retried since.
                let after = events.last()?.seq;
                Some((Ok(events), Some((store, notify, tenant, after))))
            }
            Err(error) => Some((Err(error), None)),
        }
    })
    .boxed()
}

/// The next events; none where the run has ended and all were seen.
async fn next(
    store: &Arc<dyn Store>,
    notify: &Notify,
    tenant: &TenantId,
    run: RunId,
    mut after: u64,
) -> Result<Vec<Event>, Error> {
    let mut first_look = true;
    loop {
        let woken = notify.notified();
        tokio::pin!(woken);
        woken.as_mut().enable(); // Before the look, so that no commit falls between.
        let events = store.events(tenant, run, after, PAGE).await?;
        if !events.is_empty() {
            return Ok(events);
        }
        if first_look {
            first_look = false;
            match store.run_record(tenant, run).await? {
                Some(record) if record.state.is_terminal() && record.last_seq <= after => return Ok(Vec::new()),
                None => return Ok(Vec::new()),
                // Whoever claims to have seen what has not happened yet would wait past the end.
                Some(record) => after = after.min(record.last_seq),
            }
        }
        let _ = tokio::time::timeout(POLL, woken).await;
    }
}
