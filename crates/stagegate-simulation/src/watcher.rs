//! Whoever watches a run: follows its events, loses the connection, and goes on from the last event on some replica.

use std::{sync::Arc, time::Duration};

use futures::StreamExt;
use stagegate_core::{RunId, TenantId};

use crate::world::{Standing, World};

/// The pause before the next connection.
const PAUSE: Duration = Duration::from_millis(700);
/// How long a connection is kept at the end, when every event is there.
const LAST_LOOK: Duration = Duration::from_secs(10);

/// Watches until the world closes and every event was seen.
pub(crate) async fn watch(world: Arc<World>, run: RunId) {
    let watcher = {
        let inner = &mut *world.lock();
        inner.watching += 1;
        inner.checks.watch(run)
    };
    follow(&world, run, watcher).await;
    world.lock().watching -= 1;
}

async fn follow(world: &World, run: RunId, watcher: usize) {
    let mut cursor = 0;
    loop {
        let connection = world.any_engine();
        // The last look is one on a replica, and begins after the last event.
        let closing = connection.is_some() && world.lock().closing;
        if let Some((process, engine)) = connection {
            let patience = if closing { LAST_LOOK } else { world.between(300, 8_000) };
            let mut events = engine.follow(TenantId::default(), run, cursor);
            let cut = tokio::time::sleep(patience);
            tokio::pin!(cut);
            loop {
                tokio::select! {
                    biased;
                    () = &mut cut => break,
                    batch = events.next() => match batch {
                        Some(Ok(batch)) if world.standing(process) == Standing::Up => {
                            world.note("watcher", || {
                                let (from, to) = (batch.first().map_or(0, |e| e.seq), batch.last().map_or(0, |e| e.seq));
                                format!("sees {} {from} to {to} after {cursor}", world.name_of(run))
                            });
                            world.check(|checks| checks.watched(run, watcher, &batch));
                            cursor = batch.last().map_or(cursor, |event| event.seq);
                        }
                        // From beyond the grave, an error, or the end: connect anew.
                        Some(_) | None => break,
                    },
                }
            }
        }
        if closing {
            return;
        }
        tokio::time::sleep(PAUSE).await;
    }
}
