//! One call to one model: owns the way from a request to an answer that can be used, or to the reason why not. Breaker
//! and pace, then a slot, then the provider; then it is weighed, priced, counted and stored.

#![expect(clippy::result_large_err, reason = "a failure carries what its call took; it ends a call that took seconds")]

use std::{collections::BTreeMap, fmt::Write, sync::Arc, time::Duration};

use stagegate_core::{
    CallPurpose, Clock, Code, LedgerEntry, ModelRef, Origin, Usage, Usd, answer,
    cache::{CacheKey, CacheTier},
    decide::FailureKind,
    pipeline::{Message, OutputFormat, Params},
};
use stagegate_telemetry::Metrics;
use tokio::time::Instant;

use crate::{
    Partial, Request,
    breaker::{BreakerState, Permit},
    cache::{
        AnswerCache, Found, Look,
        entry::{Buyer, Entry, NewEntry, Only, jittered},
        floors::{Reader, Standing},
    },
    config::{DEFAULT_MAX_CONCURRENCY, LlmConfig},
    door::{Door, Doors, Shut},
    inflight::{Flights, Progress},
    limit::Served,
    meter::Meter,
    prices::{DEFAULT_MAX_OUTPUT_TOKENS, Prices, count_tokens_typical, count_tokens_upper, text_tokens_typical},
    provider::{Answer, Finish, Provider, ProviderError, ProviderRequest},
    purse::Reservation,
    turns::{Full, Turn},
};

/// When to come back where too many wait.
const FULL_WAIT: Duration = Duration::from_secs(2);

/// Which flight a request may join: the one that will be stored under its key. One that refreshes joins only others
/// that do, since its caller does not want what somebody else began to buy before it asked.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) struct FlightKey {
    pub(crate) key: CacheKey,
    pub(crate) refresh: bool,
}

/// After a wait for its turn that is longer than this a call looks into the cache again: a look-up costs a millisecond, and
/// another replica may have bought the answer meanwhile.
const LONG_TURN: Duration = Duration::from_secs(1);

/// Everything that a call needs, shared by all of them.
#[derive(Debug)]
pub(crate) struct Caller {
    pub(crate) providers: BTreeMap<String, Served>,
    pub(crate) prices: Arc<Prices>,
    pub(crate) doors: Doors,
    /// The longest wait that a provider is granted.
    retry_after_max: Duration,
    /// A call that was given up counts as the model's failure only where it had so long.
    pub(crate) slow_call: Duration,
    pub(crate) cache: Arc<AnswerCache>,
    pub(crate) flights: Arc<Flights<FlightKey, Landed>>,
    pub(crate) meter: Meter,
}

/// What is to be asked, and where its answer goes. Owned, since a flight outlives the one who began it.
#[derive(Debug)]
pub(crate) struct Job {
    pub(crate) reader: Reader,
    pub(crate) messages: Vec<Message>,
    pub(crate) params: Params,
    pub(crate) format: OutputFormat,
    pub(crate) sample: u32,
    pub(crate) key: CacheKey,
    pub(crate) ttl: Duration,
    pub(crate) buyer: Buyer,
    pub(crate) purpose: CallPurpose,
    /// What is set aside for the call; None where its caller has no purse.
    pub(crate) reservation: Option<Box<dyn Reservation>>,
    /// The row that is booked if nobody hears what came of the call.
    pub(crate) worst: LedgerEntry,
    pub(crate) refresh: bool,
    pub(crate) standing: Standing,
}

/// How a flight ended.
#[derive(Debug)]
pub(crate) enum Landed {
    /// Another flight had just stored it.
    Cached(Arc<Entry>),
    /// It was bought.
    Bought(Bought),
    /// It failed.
    Failed(Failed),
    /// The caller that was to pay left before the request was sent. Those who are left begin anew.
    Unpaid,
    /// Others probe whether the model is back, and keep their places so long at most. Whether that is worth a wait is each
    /// caller's to say: it may have another model to ask.
    Probing(Duration),
}

/// A usable answer.
#[derive(Debug, Clone)]
pub(crate) struct Bought {
    pub(crate) content: String,
    pub(crate) paid: Paid,
}

/// What a call took.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Paid {
    pub(crate) usage: Usage,
    pub(crate) cost: Usd,
    pub(crate) priced: bool,
    pub(crate) latency: Duration,
    /// True where nobody heard what came of it: then the cost is the most that it can have been.
    pub(crate) unknown: bool,
}

impl Paid {
    /// The row of the ledger. Whoever pays has the cost; whoever shares is told what that saved.
    pub(crate) fn entry(
        &self,
        purpose: CallPurpose,
        model: &ModelRef,
        origin: Origin,
        error: Option<Code>,
    ) -> LedgerEntry {
        let (cost_usd, saved_usd) = if origin.is_hit() { (Usd::ZERO, self.cost) } else { (self.cost, Usd::ZERO) };
        LedgerEntry {
            purpose,
            model: model.clone(),
            origin,
            usage: self.usage,
            cost_usd,
            saved_usd,
            unknown: self.unknown,
            priced: self.priced,
            // One of unknown outcome that was sent took its time; see `LedgerEntry::is_presumed`.
            latency_ms: millis(self.latency).max(u64::from(self.unknown)),
            error,
            rest: stagegate_core::Rest::default(),
        }
    }
}

pub(crate) fn millis(duration: Duration) -> u64 {
    u64::try_from(duration.as_millis()).unwrap_or(u64::MAX)
}

/// Why there is no usable answer.
#[derive(Debug, Clone)]
pub(crate) struct Failed {
    pub(crate) code: Code,
    pub(crate) message: String,
    /// The provider's words, where it had some.
    pub(crate) detail: Option<String>,
    pub(crate) kind: FailureKind,
    pub(crate) partial: Option<Partial>,
    /// None where no provider was asked.
    pub(crate) paid: Option<Paid>,
}

impl Failed {
    /// A failure before any provider was asked.
    pub(crate) fn unasked(code: Code, message: String, kind: FailureKind) -> Self {
        Self { code, message, detail: None, kind, partial: None, paid: None }
    }

    /// Whether the model gave an answer that was charged for and cannot be used.
    pub(crate) fn has_paid_answer(&self) -> bool {
        let is_paid = || self.paid.is_some_and(|paid| paid.unknown || paid.usage != Usage::default());
        match self.kind {
            FailureKind::Unusable => true,
            FailureKind::Final => is_paid(),
            FailureKind::Outage { .. } => false,
        }
    }
}

impl Caller {
    pub(crate) fn new(
        providers: BTreeMap<String, Arc<dyn Provider>>,
        prices: Prices,
        config: &LlmConfig,
        tier: Option<Arc<dyn CacheTier>>,
        metrics: Metrics,
        clock: Arc<dyn Clock>,
    ) -> Self {
        let prices = Arc::new(prices);
        let meter = Meter::new(metrics, Arc::clone(&prices), providers.keys().cloned());
        let serve = |(name, provider): (String, Arc<dyn Provider>)| {
            let limit = config.providers.get(&name).map_or(DEFAULT_MAX_CONCURRENCY, |p| p.max_concurrency);
            (name, Served::new(provider, limit))
        };
        Self {
            providers: providers.into_iter().map(serve).collect(),
            prices,
            doors: Doors::new(config.breaker.clone()),
            retry_after_max: config.retry_after_max.0,
            slow_call: config.breaker.slow_call.0,
            cache: Arc::new(AnswerCache::new(config, tier, clock, meter.clone())),
            flights: Arc::default(),
            meter,
        }
    }

    /// A flight, from its first look to the stored answer.
    pub(crate) async fn fly(self: Arc<Self>, mut job: Job, progress: Arc<Progress>) -> Landed {
        // Between this one's look-up and its beginning, another flight may have landed.
        if let Some(entry) = self.cache.find_local(look_of(&job)) {
            return Landed::Cached(entry);
        }
        let mut reservation = job.reservation.take();
        match self.call(&mut job, &mut reservation, &progress).await {
            Err(Stopped::Unpaid) => Landed::Unpaid,
            Err(Stopped::Probing(left)) => Landed::Probing(left),
            Err(Stopped::Cached(entry)) => Landed::Cached(entry),
            Err(Stopped::Failed(failed)) => {
                if let (Some(reservation), Some(paid)) = (reservation, failed.paid) {
                    let row = paid.entry(job.purpose, &job.reader.model, Origin::Provider, Some(failed.code));
                    reservation.settle(row);
                }
                Landed::Failed(failed)
            }
            Ok(bought) => {
                if let Some(reservation) = reservation {
                    let row = bought.paid.entry(job.purpose, &job.reader.model, Origin::Provider, None);
                    reservation.settle(row);
                }
                progress.stores();
                self.store(&job, &bought).await;
                Landed::Bought(bought)
            }
        }
    }

    async fn store(&self, job: &Job, bought: &Bought) {
        if !is_well_formed(&job.format, &bought.content) {
            return;
        }
        let entry = Entry::new(&NewEntry {
            content: &bought.content,
            model: &job.reader.model,
            usage: bought.paid.usage,
            cost: bought.paid.cost,
            priced: bought.paid.priced,
            stored_at_ms: self.cache.now_ms(),
            ttl: jittered(job.ttl, job.key),
            buyer: &job.buyer,
        });
        self.cache.store(&job.reader.tenant, job.key, entry, job.standing).await;
    }

    async fn call(
        &self,
        job: &mut Job,
        reservation: &mut Option<Box<dyn Reservation>>,
        progress: &Progress,
    ) -> Result<Bought, Stopped> {
        let model = &job.reader.model;
        let served = self.served(model)?;
        let door = self.doors.of(model);
        let queued_at = Instant::now();
        let (_slot, permit) = enter(served, &door, job).await.map_err(|shut| match shut {
            Shut::Probing(left) => Stopped::Probing(left),
            shut => unasked(model, shut).into(),
        })?;
        if queued_at.elapsed() >= LONG_TURN {
            match self.cache.find(look_of(job)).await {
                Found::Hit(entry, _) => return Err(Stopped::Cached(entry)),
                // The request is sent from here on; and a cache that was away at the first look may be back.
                Found::Miss(standing) => job.standing = standing,
            }
        }
        if door.state() == BreakerState::HalfOpen {
            self.doors.publish(model, &self.meter);
        }
        if reservation.as_mut().is_some_and(|reservation| !reservation.send()) {
            return Err(Stopped::Unpaid);
        }
        progress.calls();
        let mut under_way = UnderWay { caller: self, model, progress, permit: Some(permit), started: Instant::now() };
        let request = ProviderRequest {
            model: model.model(),
            messages: &job.messages,
            params: &job.params,
            format: &job.format,
            sample: job.sample,
        };
        let answer = served.provider.call(request).await;
        let latency = under_way.started.elapsed();
        let permit = under_way.permit.take();
        drop(under_way);
        self.tell_breaker(model, permit, answer.as_ref().err());
        match answer {
            Ok(answer) => {
                served.note(answer.limits, None);
                door.answered();
                Ok(self.weigh(job, answer, latency)?)
            }
            Err(mut error) => {
                served.note(error.limits, Some(error.code));
                self.grant(&mut error);
                if let Some(told) = error.retry_after.filter(|_| is_outage(&error)) {
                    door.asked_to_wait(told);
                }
                if error.code == Code::ProviderModel {
                    self.doors.forget(model, door);
                }
                Err(self.failed(job, error, latency).into())
            }
        }
    }

    /// The provider that serves a model.
    pub(crate) fn served(&self, model: &ModelRef) -> Result<&Served, Failed> {
        match self.providers.get(model.provider()) {
            Some(served) if served.provider.is_configured() => Ok(served),
            Some(_) => {
                let message = format!("the provider `{}` has no key", model.provider());
                Err(Failed::unasked(Code::ProviderWithoutKey, message, FailureKind::Final))
            }
            None => {
                let message = format!("no configured provider serves `{model}`");
                Err(Failed::unasked(Code::UnknownModel, message, FailureKind::Final))
            }
        }
    }

    fn tell_breaker(&self, model: &ModelRef, permit: Option<Permit>, error: Option<&ProviderError>) {
        let Some(permit) = permit else { return };
        let changed = match error {
            None => permit.success(),
            Some(error) if is_illness(error) => permit.failure(),
            Some(_) => permit.reached(),
        };
        if changed {
            self.doors.publish(model, &self.meter);
            if error.is_some_and(is_illness) {
                tracing::warn!(%model, "a model fails too often and is spared");
            } else {
                tracing::info!(%model, "a model is back");
            }
        }
    }

    fn price(&self, model: &ModelRef, usage: Usage, latency: Duration) -> Paid {
        let cost = self.prices.cost(model, &usage);
        self.meter.bought(model, &usage, cost);
        Paid { usage, cost: cost.unwrap_or_default(), priced: cost.is_some(), latency, unknown: false }
    }

    /// The row of a call to a model whose end nobody hears: at its worst case, which holds for any text. Where no bound
    /// on the answer is sent, it is the bound that budgets reckon with.
    pub(crate) fn worst_case(&self, request: &Request, model: &ModelRef) -> LedgerEntry {
        let input = count_tokens_upper(&request.messages, &request.format);
        let output = u64::from(request.params.max_output_tokens.unwrap_or(DEFAULT_MAX_OUTPUT_TOKENS));
        let worst = self.prices.worst_case(model, input, output);
        LedgerEntry {
            purpose: request.purpose,
            model: model.clone(),
            origin: Origin::Provider,
            usage: Usage::default(),
            cost_usd: worst.unwrap_or_default(),
            saved_usd: Usd::ZERO,
            unknown: true,
            priced: worst.is_some(),
            latency_ms: 0,
            error: Some(Code::ProviderTimeout),
            rest: stagegate_core::Rest::default(),
        }
    }

    /// Whether the answer can be used. What cannot is paid for all the same.
    fn weigh(&self, job: &Job, answer: Answer, latency: Duration) -> Result<Bought, Failed> {
        let Answer { content, finish, usage, limits: _ } = answer;
        let model = &job.reader.model;
        let usage = usage.unwrap_or_else(|| Usage {
            input_tokens: count_tokens_typical(&job.messages),
            output_tokens: text_tokens_typical(&content),
            estimated: true,
            ..Usage::default()
        });
        let usage = believed(model, usage);
        let paid = self.price(model, usage, latency);
        let flaw = flaw(job, &finish, content.trim().is_empty(), &usage);
        self.log(model, flaw.as_ref().map(|(code, ..)| *code), &paid);
        let Some((code, message, kind)) = flaw else { return Ok(Bought { content, paid }) };
        let is_partial = matches!(finish, Finish::Length | Finish::Paused | Finish::Other(_));
        let partial = (is_partial && !content.trim().is_empty()).then(|| Partial {
            content,
            model: model.clone(),
            message: message.clone(),
            is_too_long: finish == Finish::Length,
        });
        Err(Failed { partial, paid: Some(paid), ..Failed::unasked(code, message, kind) })
    }

    fn failed(&self, job: &Job, error: ProviderError, latency: Duration) -> Failed {
        let kind = kind_of(&error);
        let ProviderError { code, message, detail, usage, unheard, .. } = error;
        let model = &job.reader.model;
        let message = format!("`{model}`: {message}");
        let paid = match usage {
            Some(usage) => self.price(model, believed(model, usage), latency),
            None if unheard => unheard_of(&job.worst, latency),
            None => self.unpaid(model, latency),
        };
        self.log(model, Some(code), &paid);
        Failed { code, message, detail, kind, partial: None, paid: Some(paid) }
    }

    /// Cuts the wait that a provider asked for to what it is granted, and says so.
    fn grant(&self, error: &mut ProviderError) {
        let Some(told) = error.retry_after.filter(|told| *told > self.retry_after_max) else { return };
        let max = self.retry_after_max;
        let _ = write!(error.message, " (it asked to wait {told:?}; it is granted {max:?}, `llm.retry_after_max`)");
        error.retry_after = Some(max);
    }

    /// A call that failed before anything could be charged.
    pub(crate) fn unpaid(&self, model: &ModelRef, latency: Duration) -> Paid {
        let priced = self.prices.is_priced(model);
        Paid { usage: Usage::default(), cost: Usd::ZERO, priced, latency, unknown: false }
    }

    /// Counts and traces a call. Never what was asked or answered.
    fn log(&self, model: &ModelRef, error: Option<Code>, paid: &Paid) {
        self.meter.call(model, error, paid.latency);
        tracing::debug!(
            provider = model.provider(),
            model = model.model(),
            origin = Origin::Provider.as_str(),
            outcome = error.map_or("ok", Code::label),
            latency_ms = millis(paid.latency),
            input_tokens = paid.usage.input_tokens,
            output_tokens = paid.usage.output_tokens,
            cost_usd = paid.cost.dollars(),
            "model call"
        );
    }
}

/// What keeps an answer from being used, and whether another try may help. One that asked the same and ended the same way
/// would be paid for again.
fn flaw(job: &Job, finish: &Finish, is_empty: bool, usage: &Usage) -> Option<(Code, String, FailureKind)> {
    let key = match job.purpose {
        CallPurpose::Judge => "gate.judge.params.max_output_tokens",
        _ => "params.max_output_tokens",
    };
    let limit = || job.params.max_output_tokens.map_or("the provider's own".to_owned(), |n| n.to_string());
    let (message, kind) = match finish {
        Finish::Length if is_empty && usage.reasoning_tokens > 0 => {
            let (limit, reasoning) = (limit(), usage.reasoning_tokens);
            let message = format!(
                "the model used up max_output_tokens = {limit} while reasoning ({reasoning} tokens), before a word was \
                 said: raise `{key}`"
            );
            (message, FailureKind::Final)
        }
        Finish::Length => {
            let cut = format!("the answer was cut at the token limit (max_output_tokens = {})", limit());
            match job.purpose {
                // Nobody can be told to be briefer.
                _ if is_empty => (format!("{cut} before a word was said: raise `{key}`"), FailureKind::Final),
                CallPurpose::Judge => (format!("{cut}: raise `{key}`"), FailureKind::Unusable),
                _ => (cut, FailureKind::Unusable),
            }
        }
        Finish::Refused => {
            let message = "the model refused, or the provider filtered the prompt or the answer".to_owned();
            return Some((Code::ProviderRefused, message, FailureKind::Final));
        }
        Finish::ContextFull => {
            let message = "prompt and answer filled the model's context before the answer was whole: shorten the prompt, \
                           or name a model with a larger context";
            (message.to_owned(), FailureKind::Final)
        }
        Finish::Silent => {
            let message = "the model reasoned, and then ended without an answer: ask for less reasoning, or word the \
                           prompt otherwise";
            (message.to_owned(), FailureKind::Final)
        }
        Finish::Paused => (
            "the provider paused its turn (`pause_turn`) before the answer was whole".to_owned(),
            FailureKind::Unusable,
        ),
        Finish::Other(reason) => {
            let message = format!("the answer ended for a reason that is not known as an end (`{reason}`)");
            (message, FailureKind::Unusable)
        }
        Finish::Stop if is_empty && usage.reasoning_tokens > 0 => return flaw(job, &Finish::Silent, is_empty, usage),
        Finish::Stop if is_empty => ("the answer was empty".to_owned(), FailureKind::Unusable),
        Finish::Stop => return None,
    };
    Some((Code::ProviderMalformed, message, kind))
}

/// Where an answer to this may lie.
fn look_of(job: &Job) -> Look<'_> {
    let only = job.refresh.then_some(Only::Stage(&job.buyer));
    Look { reader: &job.reader, key: job.key, ttl: job.ttl, only }
}

/// Why a call brought no answer.
#[expect(clippy::large_enum_variant, reason = "it ends a call that took seconds, and is taken apart at once")]
enum Stopped {
    Failed(Failed),
    /// The one who was to pay left before the request was sent.
    Unpaid,
    /// Others probe.
    Probing(Duration),
    /// Another replica bought the same while this call waited for its turn.
    Cached(Arc<Entry>),
}

impl From<Failed> for Stopped {
    fn from(failed: Failed) -> Self {
        Self::Failed(failed)
    }
}

/// What a call can have taken whose end nobody heard.
pub(crate) fn unheard_of(worst: &LedgerEntry, latency: Duration) -> Paid {
    let LedgerEntry { usage, cost_usd, priced, .. } = *worst;
    Paid { usage, cost: cost_usd, priced, latency, unknown: true }
}

/// The usage that a provider told, as far as it can be.
fn believed(model: &ModelRef, usage: Usage) -> Usage {
    let Some(capped) = usage.capped() else { return usage };
    tracing::warn!(%model, "the provider reported more tokens than a call can use; the booked number is capped");
    capped
}

/// Waits until the call may go out: for the model's pace and a slot of its provider. Neither is the model's doing, so that
/// no clock runs.
async fn enter(served: &Served, door: &Door, job: &Job) -> Result<(Turn, Permit), Shut> {
    let tenant = &job.reader.tenant;
    door.pass(tenant).await?;
    let slot = served.slot(tenant).await.map_err(|Full| Shut::Full)?;
    // The breaker is checked twice: before queuing, so that no caller waits for an open breaker, and after, because it may
    // have opened meanwhile.
    Ok((slot, door.admit()?))
}

/// Why a model was not asked. It is an outage like one of the model's own, for which nobody is to blame.
pub(crate) fn unasked(model: &ModelRef, shut: Shut) -> Failed {
    let (code, message, told) = match shut {
        Shut::Breaker(left) => {
            (Code::BreakerOpen, format!("`{model}` failed too often; its circuit breaker is open"), left)
        }
        Shut::Told(left) => {
            (Code::ProviderRateLimited, format!("`{model}` asked for a pause, and gets no calls until its end"), left)
        }
        Shut::Probing(left) => (
            Code::BreakerOpen,
            format!("`{model}` failed too often, and other calls probe whether it works again"),
            left,
        ),
        Shut::Full => (Code::ProviderTimeout, format!("too many calls wait for `{model}` already"), FULL_WAIT),
    };
    Failed::unasked(code, message, FailureKind::Outage { told: Some(told) })
}

/// What an error says about another try.
fn kind_of(error: &ProviderError) -> FailureKind {
    if is_outage(error) {
        FailureKind::Outage { told: error.retry_after }
    } else if error.retryable {
        FailureKind::Unusable
    } else {
        FailureKind::Final
    }
}

/// Whether an error says that no answer came for a reason that may pass.
fn is_outage(error: &ProviderError) -> bool {
    error.retryable
        && !error.answered
        && matches!(
            error.code,
            Code::ProviderUnreachable | Code::ProviderFailed | Code::ProviderTimeout | Code::ProviderRateLimited
        )
}

/// Whether an error says that the model is ill, rather than that it did not like the request, wants less of them, or
/// answered in a way that cannot be used.
fn is_illness(error: &ProviderError) -> bool {
    error.retryable
        && !error.answered
        && matches!(
            error.code,
            Code::ProviderUnreachable | Code::ProviderFailed | Code::ProviderTimeout | Code::ProviderMalformed
        )
}

/// Whether an answer is of the form that was asked for, so far that it is worth keeping. Only that JSON is JSON: whether
/// it fits its schema is the gate's to say, which then evicts it.
fn is_well_formed(format: &OutputFormat, content: &str) -> bool {
    match format {
        OutputFormat::Text => !content.trim().is_empty(),
        OutputFormat::Json { .. } => answer::find(content).is_ok(),
    }
}

/// A call under way. Dropped before its end, because everybody's deadline passed or because nobody wants it any more.
struct UnderWay<'a> {
    caller: &'a Caller,
    model: &'a ModelRef,
    progress: &'a Progress,
    permit: Option<Permit>,
    started: Instant,
}

impl Drop for UnderWay<'_> {
    fn drop(&mut self) {
        let Some(permit) = self.permit.take() else { return };
        if !self.progress.is_late() {
            return;
        }
        // A caller's short time-out says nothing about the model.
        if self.started.elapsed() >= self.caller.slow_call && permit.failure() {
            self.caller.doors.publish(self.model, &self.caller.meter);
            tracing::warn!(model = %self.model, "a model fails too often and is spared");
        }
        let paid = self.caller.unpaid(self.model, self.started.elapsed());
        self.caller.log(self.model, Some(Code::ProviderTimeout), &paid);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn json_may_come_with_words_around() {
        let json = OutputFormat::Json { schema: None };
        for good in ["{}", " [1]\n", "```json\n{\"a\": 1}\n```", "```\n1\n```\n", "\"text\"", "Sure: {\"a\": 1}"] {
            assert!(is_well_formed(&json, good), "{good}");
        }
        for bad in ["", "{", "{} {}", "Sure: {}", "```json\n{\n```", "``````", "```json```"] {
            assert!(!is_well_formed(&json, bad), "{bad}");
        }
        assert!(is_well_formed(&OutputFormat::Text, "Sure: {}"));
        assert!(!is_well_formed(&OutputFormat::Text, " \n"));
    }

    #[test]
    fn only_illness_counts_for_the_breaker() {
        let error = |code, retryable| ProviderError {
            code,
            message: String::new(),
            detail: None,
            retryable,
            retry_after: None,
            usage: None,
            unheard: false,
            answered: false,
            limits: crate::provider::Limits::default(),
        };
        for code in [Code::ProviderUnreachable, Code::ProviderFailed, Code::ProviderTimeout, Code::ProviderMalformed] {
            assert!(is_illness(&error(code, true)), "{code}");
            assert!(!is_illness(&error(code, false)), "{code}");
        }
        for code in [Code::ProviderRateLimited, Code::ProviderQuota, Code::ProviderAuth, Code::ProviderRejected] {
            assert!(!is_illness(&error(code, true)), "{code}");
        }
    }
}
