//! One request to the layer: owns the order of things. For each model of the chain the cache, then a flight that may be
//! shared, then the next model; and who pays, who shares, and what the caller is told when all of them failed.

use std::{sync::Arc, task::Poll, time::Duration};

use futures::poll;
use stagegate_core::{
    Code, LedgerEntry, ModelRef, Origin,
    cache::CacheKey,
    decide::{FailureKind, Tried},
    pipeline::CacheMode,
};
use tokio::time::{Instant, sleep_until, timeout_at};

use crate::{
    CallContext, CallError, Reply, Request,
    cache::{
        Found, Look,
        entry::{Buyer, Entry, Only, RUN_TTL},
        floors::{Reader, Standing},
    },
    call::{Caller, Failed, FlightKey, Job, Landed, Paid, millis, unasked, unheard_of},
    door::Shut,
    inflight::Ticket,
    key::{answer_key, stage_key},
    prices::DEFAULT_MAX_OUTPUT_TOKENS,
    purse::{Refusal, Reservation},
};

/// Where an answer may be read from or is written to.
#[derive(Debug, Clone, Copy)]
struct Place {
    key: CacheKey,
    ttl: Duration,
    /// Only what the reader's own stage bought counts.
    only_own: bool,
}

/// Where one model's answer to a request is kept, by the cache mode.
///
/// Whatever the mode, an answer that a run has received is there for whoever takes the run over (a crash buys nothing
/// twice): `refresh` reads back what its own stage bought, and the modes that write nothing for others keep it for their
/// stage alone.
#[derive(Debug)]
struct Places {
    reads: [Option<Place>; 2],
    write: Place,
    refresh: bool,
}

impl Places {
    fn of(context: &CallContext, request: &Request, model: &ModelRef) -> Self {
        let key = answer_key(&context.tenant, model, request);
        let shared = Place { key, ttl: context.cache_ttl, only_own: false };
        let own = Place { key: stage_key(key, context.run, &context.stage), ttl: RUN_TTL, only_own: false };
        let (reads, write) = match context.cache_mode {
            CacheMode::Use => ([Some(shared), None], shared),
            CacheMode::Refresh => ([Some(Place { only_own: true, ..shared }), None], shared),
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

fn buyer(context: &CallContext) -> Buyer {
    Buyer { run: context.run, stage: context.stage.clone(), attempt: context.attempt }
}

fn look<'a>(reader: &'a Reader, place: Place, buyer: &'a Buyer) -> Look<'a> {
    Look { reader, key: place.key, ttl: place.ttl, only: place.only_own.then_some(Only::Stage(buyer)) }
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
    if let Some(reply) = inherited(caller, context, request).await {
        return Ok(reply);
    }
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

/// The answer that a former owner of this attempt bought from any model of the chain. Its successor books it as the purchase,
/// not as a saving. Calls that the former owners may have made besides are booked at their worst case: to the models before
/// the one whose answer is found, or to all models of the chain if none is found.
async fn inherited(caller: &Arc<Caller>, context: &CallContext, request: &Request) -> Option<Reply> {
    let purse = context.purse.as_ref().filter(|purse| purse.inherits())?;
    let (started, buyer) = (Instant::now(), buyer(context));
    let worst_cases = |models: &[ModelRef]| models.iter().map(|model| caller.worst_case(request, model)).collect();
    for (index, model) in request.models.iter().enumerate().filter(|(_, model)| caller.served(model).is_ok()) {
        let (places, reader) = (Places::of(context, request, model), reader(context, model));
        for place in places.reads.iter().flatten() {
            let look = Look { only: Some(Only::Attempt(&buyer)), ..look(&reader, *place, &buyer) };
            let found = timeout_at(context.deadline, caller.cache.find(look)).await.ok()?;
            if let Found::Hit(entry, _) = found {
                let (usage, cost, priced, latency) = (entry.usage, entry.cost(), entry.priced, started.elapsed());
                let paid = Paid { usage, cost, priced, latency, unknown: false };
                let row = paid.entry(request.purpose, &entry.model, Origin::Provider, None);
                let (before, rest) = request.models.split_at(index);
                purse.inherited(row.clone(), worst_cases(before), worst_cases(rest));
                return Some(Reply { content: entry.content.clone(), calls: vec![row], key: place.key });
            }
        }
    }
    purse.lost(worst_cases(&request.models));
    None
}

/// The rows of the calls that failed; where no provider was asked there is none.
fn rows(failures: &[(&ModelRef, Failed)], request: &Request) -> Vec<LedgerEntry> {
    let row = |(model, failed): &(&ModelRef, Failed)| {
        failed.paid.map(|paid| paid.entry(request.purpose, model, Origin::Provider, Some(failed.code)))
    };
    failures.iter().filter_map(row).collect()
}

/// What a chain comes to that brought no answer: an outage, where one of its models may answer later; else the last model's
/// error, which is worth another try where one of them gave an answer that cannot be used.
fn give_up(mut failures: Vec<(&ModelRef, Failed)>, request: &Request) -> CallError {
    let calls = rows(&failures, request);
    let partial = failures.iter_mut().rev().find_map(|(_, failed)| failed.partial.take());
    let is_unusable = failures.iter().any(|(_, failed)| failed.kind == FailureKind::Unusable);
    let is_away = |(_, failed): &&(&ModelRef, Failed)| matches!(failed.kind, FailureKind::Outage { .. });
    let tried = Tried {
        away: failures.iter().filter(is_away).map(|(model, _)| (*model).clone()).collect(),
        answered: failures.iter().any(|(_, failed)| failed.has_paid_answer()),
    };
    // The outage that passes first; one that did not say when may pass at once.
    let rank = |failed: &Failed| match failed.kind {
        FailureKind::Outage { told } => (true, std::cmp::Reverse(told)),
        FailureKind::Unusable | FailureKind::Final => (false, std::cmp::Reverse(None)),
    };
    let speaks = failures.into_iter().map(|(_, failed)| failed).max_by_key(rank);
    let missing = || Failed::unasked(Code::UnknownModel, "the request names no model".to_owned(), FailureKind::Final);
    let Failed { code, message, detail, mut kind, .. } = speaks.unwrap_or_else(missing);
    if kind == FailureKind::Final && is_unusable {
        kind = FailureKind::Unusable;
    }
    CallError { code, message, detail, kind, tried, partial, calls }
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
    let found = timeout_at(context.deadline, find(caller, context, &reader, &places)).await;
    let mut standing = match found {
        Ok(Ok((entry, origin, key))) => return Ok(hit(caller, request, &entry, origin, key, started)),
        Ok(Err(standing)) => standing,
        Err(_) => return Err(late(model, "looked in the cache")),
    };
    if Instant::now() >= context.deadline {
        return Err(late(model, "had not begun"));
    }
    let mut patience_until = None;
    loop {
        match board(caller, context, request, reader.clone(), &places, standing, started).await? {
            Boarded::Answered(answered) => return Ok(answered),
            Boarded::Anew => {}
            Boarded::Probing(left) => {
                // The wait for a probe is for the model, so that it is an outage like any other once it takes long: then it
                // is told, recorded, and bounded by `max_wait`. A chain has others to ask.
                let until = *patience_until
                    .get_or_insert_with(|| (Instant::now() + caller.slow_call).min(context.outage_until));
                let shut = Shut::Probing(left);
                if request.models.len() > 1 || Instant::now() >= until {
                    return Err(unasked(model, shut));
                }
                match timeout_at(until.min(context.deadline), caller.doors.of(model).probed()).await {
                    Ok(Ok(())) => {}
                    Ok(Err(shut)) => return Err(unasked(model, shut)),
                    Err(_) => return Err(unasked(model, shut)),
                }
                // The request is sent from here on; and another replica may have bought the answer meanwhile.
                match timeout_at(context.deadline, find(caller, context, &reader, &places)).await {
                    Ok(Ok((entry, origin, key))) => return Ok(hit(caller, request, &entry, origin, key, started)),
                    Ok(Err(now)) => standing = now,
                    Err(_) => return Err(late(model, "looked in the cache")),
                }
            }
        }
    }
}

/// How a share in a flight ended, where it did not fail.
#[expect(clippy::large_enum_variant, reason = "it is taken apart at once")]
enum Boarded {
    Answered(Answered),
    /// It ended before its request was sent, since the caller that was to pay had left.
    Anew,
    /// Others probe whether the model is back.
    Probing(Duration),
}

/// Looks in each place; the standing of the last one where nothing is found.
async fn find(
    caller: &Caller,
    context: &CallContext,
    reader: &Reader,
    places: &Places,
) -> Result<(Arc<Entry>, Origin, CacheKey), Standing> {
    let (mut last, buyer) = (None, buyer(context));
    for place in places.reads.iter().flatten() {
        match caller.cache.find(look(reader, *place, &buyer)).await {
            Found::Hit(entry, origin) => return Ok((entry, origin, place.key)),
            Found::Miss(standing) => last = Some(standing),
        }
    }
    Err(last.unwrap_or(Standing { generation: 0, floor: 0, shared: false }))
}

/// A reused answer: the original tokens, and what they cost then as what is saved now.
fn hit(caller: &Caller, request: &Request, entry: &Entry, origin: Origin, key: CacheKey, started: Instant) -> Answered {
    let (usage, cost, priced, latency) = (entry.usage, entry.cost(), entry.priced, started.elapsed());
    let paid = Paid { usage, cost, priced, latency, unknown: false };
    caller.meter.saved(&entry.model, paid.cost);
    tracing::debug!(model = %entry.model, origin = origin.as_str(), latency_ms = millis(paid.latency), "cache hit");
    let call = paid.entry(request.purpose, &entry.model, origin, None);
    Answered { content: entry.content.clone(), key, call }
}

/// Joins the flight of identical requests, or sets the worst case aside and begins one; waits for it until the deadline.
async fn board(
    caller: &Arc<Caller>,
    context: &CallContext,
    request: &Request,
    reader: Reader,
    places: &Places,
    standing: Standing,
    started: Instant,
) -> Result<Boarded, Failed> {
    let (key, model) = (places.write.key, reader.model.clone());
    let flight_key = FlightKey { key, refresh: places.refresh };
    let worst = caller.worst_case(request, &model);
    let mut ticket = if let Some(ticket) = caller.flights.follow(&flight_key, standing.floor, context.timeout) {
        ticket
    } else {
        let reservation = reserve(context, request, &worst).await?;
        let worst = worst.clone();
        caller.flights.join(&flight_key, standing.generation, standing.floor, context.timeout, |progress| {
            let job = Job {
                reader,
                messages: request.messages.clone(),
                params: request.params.clone(),
                format: request.format.clone(),
                sample: request.sample,
                key,
                ttl: places.write.ttl,
                buyer: buyer(context),
                purpose: request.purpose,
                reservation,
                worst,
                refresh: places.refresh,
                standing,
            };
            Arc::clone(caller).fly(job, progress)
        })
    };
    let mut landed = landing(&mut ticket, context).await;
    if landed.is_none() && ticket.progress.is_storing() {
        // It is paid for and there; a slow cache does not take it away.
        landed = Some((&mut ticket.flight).await);
    }
    // Whoever began it pays, whatever became of it.
    let pays = ticket.began;
    let Some(landed) = landed else {
        // Before this share is dropped: should it be the last one, the call ends as one that was too slow.
        ticket.progress.note_deadline();
        let Some(called_at) = ticket.progress.called_at() else {
            return Err(late(&model, "waited for a slot of its provider (max_concurrency)"));
        };
        let paid = pays.then(|| unheard_of(&worst, called_at.elapsed()));
        let failed =
            if Instant::now() >= context.deadline { late(&model, "was under way") } else { slow(&model, context) };
        return Err(Failed { paid, ..failed });
    };
    match &*landed {
        Landed::Unpaid => Ok(Boarded::Anew),
        Landed::Probing(left) => Ok(Boarded::Probing(*left)),
        Landed::Cached(entry) => Ok(Boarded::Answered(hit(caller, request, entry, Origin::CacheLocal, key, started))),
        Landed::Bought(bought) => {
            let (origin, paid) = if pays {
                (Origin::Provider, bought.paid)
            } else {
                caller.meter.saved(&model, bought.paid.cost);
                (Origin::Coalesced, Paid { latency: started.elapsed(), ..bought.paid })
            };
            let call = paid.entry(request.purpose, &model, origin, None);
            Ok(Boarded::Answered(Answered { content: bought.content.clone(), key, call }))
        }
        // The call is one row of the ledger, however many waited for it.
        Landed::Failed(failed) => Err(Failed { paid: failed.paid.filter(|_| pays), ..failed.clone() }),
    }
}

/// Sets the worst case of a call aside, where the caller has a purse.
async fn reserve(
    context: &CallContext,
    request: &Request,
    worst: &LedgerEntry,
) -> Result<Option<Box<dyn Reservation>>, Failed> {
    let Some(purse) = &context.purse else { return Ok(None) };
    let model = &worst.model;
    let message = match timeout_at(context.deadline, purse.reserve(worst.clone())).await {
        Ok(Ok(reservation)) => return Ok(Some(reservation)),
        Ok(Err(Refusal::TooDear { left })) => format!(
            "the next call may cost up to {:.6} USD (`{model}`; its longest answer is {} tokens: \
             `params.max_output_tokens`); {:.6} USD of the run's budget is left",
            worst.cost_usd.dollars(),
            request.params.max_output_tokens.unwrap_or(DEFAULT_MAX_OUTPUT_TOKENS),
            left.dollars()
        ),
        Ok(Err(Refusal::Unpriced)) => format!("`{model}` has no price, so that the run's budget cannot bound its cost"),
        Err(_) => return Err(late(model, "waited for other calls of its run to leave room in the budget")),
    };
    Err(Failed::unasked(Code::BudgetExhausted, message, FailureKind::Final))
}

/// Waits for a flight: without a clock while it waits for its turn, then for as long as one call may take.
async fn landing(ticket: &mut Ticket<Landed>, context: &CallContext) -> Option<Arc<Landed>> {
    let joined = Instant::now();
    // Mostly the call goes out at once: then there is one timer, and no more.
    if let Poll::Ready(landed) = poll!(&mut ticket.flight) {
        return Some(landed);
    }
    let called_at = if let Some(at) = ticket.progress.called_at() {
        at
    } else {
        tokio::select! {
            biased;
            landed = &mut ticket.flight => return Some(landed),
            at = ticket.progress.called() => at,
            () = sleep_until(context.deadline) => return None,
        }
    };
    let until =
        called_at.max(joined).checked_add(context.timeout).map_or(context.deadline, |at| at.min(context.deadline));
    timeout_at(until, &mut ticket.flight).await.ok()
}

fn late(model: &ModelRef, what: &str) -> Failed {
    let message = format!("the deadline passed while the call to `{model}` {what}");
    Failed::unasked(Code::ProviderTimeout, message, FailureKind::Outage { told: None })
}

fn slow(model: &ModelRef, context: &CallContext) -> Failed {
    let message = format!("`{model}` did not answer within {:?} (the stage's `timeout`)", context.timeout);
    Failed::unasked(Code::ProviderTimeout, message, FailureKind::Outage { told: None })
}

pub(crate) async fn peek(caller: &Arc<Caller>, context: &CallContext, request: &Request) -> Option<Reply> {
    let started = Instant::now();
    let model = request.models.first()?;
    let (places, reader, buyer) = (Places::of(context, request, model), reader(context, model), buyer(context));
    for place in places.reads.iter().flatten() {
        if let Some((entry, origin)) = caller.cache.peek(look(&reader, *place, &buyer)).await {
            let latency = started.elapsed();
            let (usage, cost, priced) = (entry.usage, entry.cost(), entry.priced);
            let paid = Paid { usage, cost, priced, latency, unknown: false };
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
    let original = Place { key: reply.key, ttl: Duration::MAX, only_own: false };
    let Some((entry, standing)) = caller.cache.stored(look(&reader, original, &buyer(context))).await else { return };
    let write = Places::of(context, request, &answered.model).write;
    caller.cache.store(&context.tenant, write.key, Entry::clone(&entry), standing).await;
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Partial;

    fn failed(code: Code, kind: FailureKind) -> Failed {
        Failed::unasked(code, code.title().to_owned(), kind)
    }

    fn outage(code: Code, told_s: Option<u64>) -> Failed {
        failed(code, FailureKind::Outage { told: told_s.map(Duration::from_secs) })
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
    fn a_chain_waits_for_the_outage_that_passes_first() {
        let model = ModelRef::new("sim/a").expect("a model");
        let mut cut = failed(Code::ProviderMalformed, FailureKind::Unusable);
        let partial = Partial {
            content: "half an ans".to_owned(),
            model: model.clone(),
            message: "it was cut".to_owned(),
            is_too_long: true,
        };
        cut.partial = Some(partial.clone());
        let mut failures = vec![
            (&model, outage(Code::ProviderRateLimited, Some(30))),
            (&model, outage(Code::BreakerOpen, Some(5))),
            (&model, cut),
            (&model, failed(Code::ProviderQuota, FailureKind::Final)),
        ];
        let error = give_up(failures.clone(), &request());
        assert_eq!((error.code, error.kind.told()), (Code::BreakerOpen, Some(Duration::from_secs(5))));
        assert_eq!(error.partial, Some(partial), "an answer stays what it is, with what was wrong with it");
        assert!(error.calls.is_empty(), "no provider was called");
        failures.push((&model, outage(Code::ProviderFailed, None)));
        let error = give_up(failures.clone(), &request());
        assert_eq!((error.code, error.kind), (Code::ProviderFailed, FailureKind::Outage { told: None }));
    }

    #[test]
    fn without_an_outage_the_last_error_is_told_and_an_answer_that_cannot_be_used_counts() {
        let model = ModelRef::new("sim/a").expect("a model");
        let unusable = failed(Code::ProviderMalformed, FailureKind::Unusable);
        let refused = failed(Code::ProviderAuth, FailureKind::Final);
        let error = give_up(vec![(&model, unusable), (&model, refused.clone())], &request());
        assert_eq!((error.code, error.kind), (Code::ProviderAuth, FailureKind::Unusable));
        let error = give_up(vec![(&model, refused)], &request());
        assert_eq!((error.code, error.kind), (Code::ProviderAuth, FailureKind::Final));
    }
}
