//! One request to the layer: owns the order of things. For each model of the chain the cache, then a flight that may be
//! shared, then the next model; and who pays, who shares, and what the caller is told when all of them failed.

use std::{sync::Arc, time::Duration};

use stagegate_core::{Code, LedgerEntry, ModelRef, Origin, RunId, cache::CacheKey, pipeline::CacheMode};
use tokio::time::{Instant, timeout_at};

use crate::{
    CallContext, CallError, Reply, Request,
    cache::{
        Found, Look,
        entry::{Entry, RUN_TTL},
        floors::{Reader, Standing},
    },
    call::{Caller, Failed, FlightKey, Job, Landed, Paid, millis},
    key::{answer_key, run_key},
};

/// Where an answer may be read from or is written to.
#[derive(Debug, Clone, Copy)]
struct Place {
    key: CacheKey,
    ttl: Duration,
    only_run: Option<RunId>,
}

/// Where one model's answer to a request is kept, by the cache mode.
///
/// Whatever the mode, an answer that a run has received is there for whoever takes the run over (a crash buys nothing
/// twice): `refresh` reads back what its own run bought, and the modes that write nothing for others keep it for their
/// run alone.
#[derive(Debug)]
struct Places {
    reads: [Option<Place>; 2],
    write: Place,
    refresh: bool,
}

impl Places {
    fn of(context: &CallContext, request: &Request, model: &ModelRef) -> Self {
        let key = answer_key(&context.tenant, model, request);
        let shared = Place { key, ttl: context.cache_ttl, only_run: None };
        let own = Place { key: run_key(key, context.run), ttl: RUN_TTL, only_run: None };
        let (reads, write) = match context.cache_mode {
            CacheMode::Use => ([Some(shared), None], shared),
            CacheMode::Refresh => ([Some(Place { only_run: Some(context.run), ..shared }), None], shared),
            CacheMode::ReadOnly => ([Some(shared), Some(own)], own),
            CacheMode::Off => ([Some(own), None], own),
        };
        Self { reads, write, refresh: context.cache_mode == CacheMode::Refresh }
    }
}

fn reader(context: &CallContext, model: &ModelRef) -> Reader {
    Reader {
        tenant: context.tenant.clone(),
        pipeline: context.pipeline.clone(),
        version: context.version,
        stage: context.stage.clone(),
        model: model.clone(),
    }
}

fn look(reader: &Reader, place: Place) -> Look<'_> {
    Look { reader, key: place.key, ttl: place.ttl, only_run: place.only_run }
}

/// An answer, and the row that it is worth.
struct Answered {
    content: String,
    key: CacheKey,
    call: LedgerEntry,
}

pub(crate) async fn complete(
    caller: &Arc<Caller>,
    context: &CallContext,
    request: &Request,
) -> Result<Reply, CallError> {
    let mut failures = Vec::new();
    for model in &request.models {
        match ask(caller, context, request, model).await {
            Ok(Answered { content, key, call }) => {
                let mut calls = rows(&failures, request);
                calls.push(call);
                return Ok(Reply { content, calls, key });
            }
            Err(failed) => {
                tracing::debug!(%model, code = %failed.code, "a model of the chain failed");
                failures.push((model, failed));
            }
        }
        if Instant::now() >= context.deadline {
            break;
        }
    }
    Err(give_up(failures, request))
}

/// The rows of the calls that failed; where no provider was asked there is none.
fn rows(failures: &[(&ModelRef, Failed)], request: &Request) -> Vec<LedgerEntry> {
    let row = |(model, failed): &(&ModelRef, Failed)| {
        failed.paid.map(|paid| paid.entry(request.purpose, model, Origin::Provider, Some(failed.code)))
    };
    failures.iter().filter_map(row).collect()
}

/// The last model's error, with what the others said about trying again.
fn give_up(mut failures: Vec<(&ModelRef, Failed)>, request: &Request) -> CallError {
    let calls = rows(&failures, request);
    let retryable = failures.iter().any(|(_, failed)| failed.retryable);
    let waits = failures.iter().filter(|(_, failed)| failed.retryable).filter_map(|(_, failed)| failed.retry_after);
    let retry_after = waits.min();
    let partial = failures.iter_mut().rev().find_map(|(_, failed)| failed.partial.take());
    let (code, message) = match failures.pop() {
        Some((_, last)) => (last.code, last.message),
        None => (Code::UnknownModel, "the request names no model".to_owned()),
    };
    CallError { code, message, retryable, retry_after, partial, calls }
}

async fn ask(
    caller: &Arc<Caller>,
    context: &CallContext,
    request: &Request,
    model: &ModelRef,
) -> Result<Answered, Failed> {
    let started = Instant::now();
    // A model that cannot be asked is not looked up either: what is not configured does not answer.
    caller.served(model)?;
    let places = Places::of(context, request, model);
    let reader = reader(context, model);
    let found = timeout_at(context.deadline, find(caller, &reader, &places)).await;
    let standing = match found {
        Ok(Ok((entry, origin, key))) => return Ok(hit(caller, request, &entry, origin, key, started)),
        Ok(Err(standing)) => standing,
        Err(_) => return Err(late(model, "looked in the cache")),
    };
    if Instant::now() >= context.deadline {
        return Err(late(model, "had not begun"));
    }
    board(caller, context, request, reader, &places, standing, started).await
}

/// Looks in each place; the standing of the last one where nothing is found.
async fn find(caller: &Caller, reader: &Reader, places: &Places) -> Result<(Arc<Entry>, Origin, CacheKey), Standing> {
    let mut last = None;
    for place in places.reads.iter().flatten() {
        match caller.cache.find(look(reader, *place)).await {
            Found::Hit(entry, origin) => return Ok((entry, origin, place.key)),
            Found::Miss(standing) => last = Some(standing),
        }
    }
    Err(last.unwrap_or(Standing { generation: 0, floor: 0, shared: false }))
}

/// A reused answer: the original tokens, and what they cost then as what is saved now.
fn hit(caller: &Caller, request: &Request, entry: &Entry, origin: Origin, key: CacheKey, started: Instant) -> Answered {
    let paid = Paid { usage: entry.usage, cost: entry.cost(), priced: entry.priced, latency: started.elapsed() };
    caller.meter.saved(&entry.model, paid.cost);
    tracing::debug!(model = %entry.model, origin = origin.as_str(), latency_ms = millis(paid.latency), "cache hit");
    let call = paid.entry(request.purpose, &entry.model, origin, None);
    Answered { content: entry.content.clone(), key, call }
}

/// Joins the flight of identical requests, or begins it, and waits for it until the deadline.
async fn board(
    caller: &Arc<Caller>,
    context: &CallContext,
    request: &Request,
    reader: Reader,
    places: &Places,
    standing: Standing,
    started: Instant,
) -> Result<Answered, Failed> {
    let (key, model) = (places.write.key, reader.model.clone());
    let flight_key = FlightKey { key, refresh: places.refresh };
    let mut ticket = caller.flights.join(&flight_key, standing.generation, standing.floor, |progress| {
        let job = Job {
            reader,
            messages: request.messages.clone(),
            params: request.params.clone(),
            format: request.format.clone(),
            sample: request.sample,
            key,
            ttl: places.write.ttl,
            run: context.run,
            refresh: places.refresh,
            standing,
        };
        Arc::clone(caller).fly(job, progress)
    });
    let mut landed = timeout_at(context.deadline, &mut ticket.flight).await.ok();
    if landed.is_none() && ticket.progress.is_storing() {
        // It is paid for and there; a slow cache does not take it away.
        landed = Some((&mut ticket.flight).await);
    }
    let Some(landed) = landed else {
        // Before this share is dropped: should it be the last one, the call ends as one that was too slow.
        ticket.progress.note_deadline();
        if !ticket.progress.is_calling() {
            return Err(late(&model, "waited for a slot of its provider (max_concurrency)"));
        }
        let paid = ticket.began.then(|| caller.unpaid(&model, started.elapsed()));
        return Err(Failed { paid, ..late(&model, "was under way") });
    };
    let pays = ticket.progress.take();
    match &*landed {
        Landed::Cached(entry) => Ok(hit(caller, request, entry, Origin::CacheLocal, key, started)),
        Landed::Bought(bought) => {
            let (origin, paid) = if pays {
                (Origin::Provider, bought.paid)
            } else {
                caller.meter.saved(&model, bought.paid.cost);
                (Origin::Coalesced, Paid { latency: started.elapsed(), ..bought.paid })
            };
            let call = paid.entry(request.purpose, &model, origin, None);
            Ok(Answered { content: bought.content.clone(), key, call })
        }
        // The call is one row of the ledger, however many waited for it.
        Landed::Failed(failed) => Err(Failed { paid: failed.paid.filter(|_| pays), ..failed.clone() }),
    }
}

fn late(model: &ModelRef, what: &str) -> Failed {
    let message = format!("the deadline passed while the call to `{model}` {what}");
    Failed::unasked(Code::ProviderTimeout, message, true)
}

pub(crate) async fn peek(caller: &Arc<Caller>, context: &CallContext, request: &Request) -> Option<Reply> {
    let started = Instant::now();
    let model = request.models.first()?;
    let (places, reader) = (Places::of(context, request, model), reader(context, model));
    for place in places.reads.iter().flatten() {
        if let Some((entry, origin)) = caller.cache.peek(look(&reader, *place)).await {
            let latency = started.elapsed();
            let paid = Paid { usage: entry.usage, cost: entry.cost(), priced: entry.priced, latency };
            let calls = vec![paid.entry(request.purpose, &entry.model, origin, None)];
            return Some(Reply { content: entry.content.clone(), calls, key: place.key });
        }
    }
    None
}

pub(crate) async fn remember(caller: &Arc<Caller>, context: &CallContext, request: &Request, reply: &Reply) {
    let Some(answered) = reply.calls.last() else { return };
    if !request.models.contains(&answered.model) {
        return;
    }
    let reader = reader(context, &answered.model);
    // Its own generation, not today's: an invalidation since it was asked for must reach the copy too.
    let original = Place { key: reply.key, ttl: Duration::MAX, only_run: None };
    let Some((entry, standing)) = caller.cache.stored(look(&reader, original)).await else { return };
    let write = Places::of(context, request, &answered.model).write;
    caller.cache.store(&context.tenant, write.key, Entry::clone(&entry), standing).await;
}

#[cfg(test)]
mod tests {
    use super::*;

    fn failed(code: Code, retryable: bool, retry_after: Option<u64>) -> Failed {
        Failed {
            retry_after: retry_after.map(Duration::from_secs),
            ..Failed::unasked(code, code.title().to_owned(), retryable)
        }
    }

    fn request() -> Request {
        Request {
            models: vec![],
            messages: vec![],
            params: stagegate_core::pipeline::Params::default(),
            format: stagegate_core::pipeline::OutputFormat::Text,
            sample: 0,
            purpose: stagegate_core::CallPurpose::Stage,
        }
    }

    #[test]
    fn the_error_is_the_last_models_and_can_be_retried_if_any_can() {
        let model = ModelRef::new("sim/a").expect("a model");
        let mut truncated = failed(Code::ProviderMalformed, true, None);
        truncated.partial = Some("half an ans".to_owned());
        let failures = vec![
            (&model, failed(Code::ProviderRateLimited, true, Some(30))),
            (&model, failed(Code::BreakerOpen, true, Some(5))),
            (&model, truncated),
            (&model, failed(Code::ProviderQuota, false, Some(1))),
        ];
        let error = give_up(failures, &request());
        assert_eq!((error.code, error.retryable), (Code::ProviderQuota, true));
        assert_eq!(error.retry_after, Some(Duration::from_secs(5)), "what cannot be retried has no say");
        assert_eq!(error.partial.as_deref(), Some("half an ans"));
        assert!(error.calls.is_empty(), "nobody was called");

        let final_one = give_up(vec![(&model, failed(Code::ProviderAuth, false, Some(1)))], &request());
        assert_eq!((final_one.retryable, final_one.retry_after), (false, None));
    }
}
