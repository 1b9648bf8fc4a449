//! Evaluation of templates, checks, schemas and definitions: owns the threads and the memory that each tenant may use for
//! it. Decides nothing, and knows nothing of the work.
//!
//! Most evaluations take microseconds: they run on the caller's thread, up to a small amount of work
//! ([`stagegate_core::evaluation`]). A larger evaluation begins again on a thread of the pool, so that a template
//! or a regular expression never delays heartbeats, probes or other runs. A tenant never has all of these threads, and
//! waiting tenants take turns. An evaluation stops when its caller drops it.
//!
//! In a simulation everything runs inline.

use std::{
    collections::{BTreeMap, VecDeque},
    fmt,
    sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError},
    thread,
    time::Duration,
};

use stagegate_core::{
    Code, Error, Failure, StageId, TenantId,
    evaluation::{Stop, Unfinished, brief, whole},
};
use stagegate_telemetry::Metrics;
use tokio::{sync::oneshot, time::Instant};

use crate::memory::{Budget, Memory, Permit};

/// How long a thread waits for work before it ends.
const IDLE: Duration = Duration::from_secs(10);

/// Why an evaluation has no result.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Unevaluated {
    /// It took longer than the limit.
    TooLong(Duration),
    /// The values that it names would take more memory than the limit.
    TooLarge {
        /// Estimated bytes of the values.
        bytes: u64,
        /// The limit.
        max_bytes: u64,
    },
    /// A defect of ours.
    Panicked,
    /// The engine is gone.
    Gone,
}

impl Unevaluated {
    fn told(self) -> (Code, String) {
        match self {
            Self::TooLong(longest) => (
                Code::TemplateFailed,
                format!(
                    "the evaluation took longer than {longest:?} (engine.evaluation_timeout): write simpler templates, \
                     patterns and schemas, or pass less data"
                ),
            ),
            Self::TooLarge { bytes, max_bytes } => (
                Code::TemplateFailed,
                format!(
                    "the values that the evaluation names would take about {} MB of memory; the limit is {} MB \
                     (engine.memory_max_bytes): name fewer or smaller values",
                    bytes >> 20,
                    max_bytes >> 20
                ),
            ),
            Self::Panicked => (
                Code::Internal,
                "the evaluation failed by a defect in Stagegate; the log names the place. Please report it".to_owned(),
            ),
            Self::Gone => (Code::Draining, "this replica is shutting down; send the request again".to_owned()),
        }
    }

    /// As the end of an attempt or a run.
    pub(crate) fn failure(self, stage: Option<StageId>) -> Failure {
        let (code, message) = self.told();
        Failure { stage, ..Failure::new(code, message) }
    }
}

impl From<Unevaluated> for Error {
    fn from(unevaluated: Unevaluated) -> Self {
        let (code, detail) = unevaluated.told();
        Self::new(code, detail)
    }
}

/// Evaluates what callers wrote.
#[derive(Debug)]
pub(crate) struct Evaluations {
    /// None runs everything inline.
    pool: Option<Pool>,
    longest: Duration,
    /// Room for the values of all evaluations together; small ones are not counted.
    values: Budget,
    /// The most bytes that the values of one evaluation may take.
    value_max_bytes: u64,
    metrics: Metrics,
}

impl Evaluations {
    /// Everything runs where it is asked for: for simulations.
    pub(crate) fn inline(longest: Duration, memory: &Memory, metrics: Metrics) -> Self {
        Self { pool: None, longest, values: memory.values.clone(), value_max_bytes: memory.max_bytes, metrics }
    }

    /// The same, with large evaluations on threads of their own, which start when they are needed.
    pub(crate) fn on_threads(self, threads: usize) -> Self {
        Self { pool: Some(Pool::new(threads)), ..self }
    }

    /// Waits for room for `bytes` of values. The caller holds the permit as long as the values.
    pub(crate) async fn room(&self, tenant: &TenantId, bytes: u64) -> Result<Permit, Unevaluated> {
        if bytes > self.value_max_bytes {
            self.metrics.evaluations.with_label_values(&["refused"]).inc();
            return Err(Unevaluated::TooLarge { bytes, max_bytes: self.value_max_bytes });
        }
        Ok(self.values.acquire_for(tenant, bytes).await)
    }

    /// Evaluates inline if the work is small, else on the pool: so `work` may begin twice. `value_bytes` returns the size of
    /// the values that it parses. Dropped, the evaluation stops.
    pub(crate) async fn evaluate<T, W>(
        &self,
        tenant: &TenantId,
        value_bytes: impl FnOnce() -> u64,
        work: W,
    ) -> Result<T, Unevaluated>
    where
        T: Send + 'static,
        W: Fn() -> T + Send + 'static,
    {
        match brief(&work) {
            Ok(result) => Ok(result),
            Err(Unfinished::Panicked) => {
                self.metrics.evaluations.with_label_values(&["panicked"]).inc();
                Err(Unevaluated::Panicked)
            }
            // Rare, and larger than what thousands of attempts should hold.
            Err(Unfinished::TooLong | Unfinished::Stopped) => {
                Box::pin(self.evaluate_large(tenant, value_bytes(), work)).await
            }
        }
    }

    /// The same for an evaluation that is known to be large.
    pub(crate) async fn evaluate_large<T, W>(
        &self,
        tenant: &TenantId,
        value_bytes: u64,
        work: W,
    ) -> Result<T, Unevaluated>
    where
        T: Send + 'static,
        W: FnOnce() -> T + Send + 'static,
    {
        let room = self.room(tenant, value_bytes).await?;
        let work = move || {
            let _room = room; // As long as the values are there, whether their caller still waits or not.
            work()
        };
        let (began, stop) = (Instant::now(), Stop::default());
        let result = match &self.pool {
            None => whole(&stop, self.longest, work).map_err(|unfinished| self.unevaluated(unfinished)),
            Some(pool) => self.on_pool(pool, tenant, &stop, work).await,
        };
        let outcome = match &result {
            Ok(_) if stop.has_refused() => "refused",
            Ok(_) => "done",
            Err(Unevaluated::TooLarge { .. }) => "refused",
            Err(Unevaluated::TooLong(_)) => "late",
            Err(Unevaluated::Panicked) => "panicked",
            Err(Unevaluated::Gone) => "abandoned",
        };
        self.metrics.evaluations.with_label_values(&[outcome]).inc();
        self.metrics.evaluation_duration.observe(began.elapsed().as_secs_f64());
        result
    }

    async fn on_pool<T, W>(&self, pool: &Pool, tenant: &TenantId, stop: &Stop, work: W) -> Result<T, Unevaluated>
    where
        T: Send + 'static,
        W: FnOnce() -> T + Send + 'static,
    {
        let (longest, stop, span) = (self.longest, stop.clone(), tracing::Span::current());
        let (start, started) = oneshot::channel();
        let (end, ended) = oneshot::channel();
        let asked = stop.clone();
        let job = move || {
            // The caller may have dropped the receiver: then the result is dropped.
            if start.send(()).is_ok() {
                let _ = end.send(span.in_scope(|| whole(&asked, longest, work)));
            }
        };
        let waiting = Waiting::enter(&self.metrics);
        let _wanted = Wanted { stop, job: pool.offer(tenant, Box::new(job)) };
        // Its time begins when it does: to wait for others is no fault of its own.
        started.await.map_err(|_| Unevaluated::Gone)?;
        drop(waiting);
        match tokio::time::timeout(longest, ended).await {
            Ok(Ok(result)) => result.map_err(|unfinished| self.unevaluated(unfinished)),
            Ok(Err(_)) => Err(Unevaluated::Gone),
            Err(_) => Err(Unevaluated::TooLong(longest)),
        }
    }

    fn unevaluated(&self, unfinished: Unfinished) -> Unevaluated {
        match unfinished {
            Unfinished::Panicked => Unevaluated::Panicked,
            Unfinished::TooLong | Unfinished::Stopped => Unevaluated::TooLong(self.longest),
        }
    }
}

/// Counts an evaluation among those that wait for a thread.
struct Waiting<'a>(&'a Metrics);

impl<'a> Waiting<'a> {
    fn enter(metrics: &'a Metrics) -> Self {
        metrics.evaluations_waiting.inc();
        Self(metrics)
    }
}

impl Drop for Waiting<'_> {
    fn drop(&mut self) {
        self.0.evaluations_waiting.dec();
    }
}

/// Dropped, it stops the evaluation, or takes it out of the queue with all that it holds.
struct Wanted {
    stop: Stop,
    job: Arc<Job>,
}

impl Drop for Wanted {
    fn drop(&mut self) {
        self.stop.ask();
        drop(self.job.take());
    }
}

type Work = Box<dyn FnOnce() + Send>;

/// Work that waits for a thread, unless it was taken back.
struct Job(Mutex<Option<Work>>);

impl Job {
    fn take(&self) -> Option<Work> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).take()
    }
}

/// Threads that evaluate, and the work that waits for them.
struct Pool(Arc<Lanes>);

struct Lanes {
    state: Mutex<State>,
    /// There is work, or the pool is closed.
    ready: Condvar,
    threads_max: usize,
}

#[derive(Default)]
struct State {
    /// One for each tenant that has something waiting or running.
    lanes: BTreeMap<TenantId, Lane>,
    /// Those that have something waiting, in the order of their turns.
    turns: VecDeque<TenantId>,
    /// Work in all lanes, also what was taken back since.
    queued: usize,
    threads: usize,
    idle: usize,
    closed: bool,
}

#[derive(Default)]
struct Lane {
    waiting: VecDeque<Arc<Job>>,
    running: usize,
}

impl fmt::Debug for Pool {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Pool").field("threads_max", &self.0.threads_max).finish_non_exhaustive()
    }
}

impl Drop for Pool {
    fn drop(&mut self) {
        let mut state = self.0.state();
        state.closed = true;
        state.lanes.clear();
        state.turns.clear();
        drop(state);
        self.0.ready.notify_all();
    }
}

impl Pool {
    fn new(threads: usize) -> Self {
        Self(Arc::new(Lanes { state: Mutex::default(), ready: Condvar::new(), threads_max: threads.max(1) }))
    }

    /// Queues work behind that of its own tenant.
    fn offer(&self, tenant: &TenantId, work: Work) -> Arc<Job> {
        let job = Arc::new(Job(Mutex::new(Some(work))));
        let mut state = self.0.state();
        let lane = state.lanes.entry(tenant.clone()).or_default();
        lane.waiting.push_back(Arc::clone(&job));
        if lane.waiting.len() == 1 {
            state.turns.push_back(tenant.clone());
        }
        state.queued += 1;
        if state.queued > state.idle && state.threads < self.0.threads_max {
            state.threads += 1;
            let lanes = Arc::clone(&self.0);
            if let Err(error) = thread::Builder::new().name("evaluation".to_owned()).spawn(move || lanes.serve()) {
                state.threads -= 1;
                tracing::error!(%error, threads = state.threads, "the replica could not start a thread for evaluations");
                if state.threads == 0 {
                    drop(state);
                    job.take().into_iter().for_each(|work| work());
                }
            }
        } else {
            self.0.ready.notify_one();
        }
        job
    }
}

impl Lanes {
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The most threads that one tenant has: one stays for the other tenants, so that they do not wait for this one.
    fn share(&self) -> usize {
        (self.threads_max - 1).max(1)
    }

    /// A thread's life.
    fn serve(&self) {
        let mut state = self.state();
        loop {
            if let Some((tenant, work)) = state.next(self.share()) {
                drop(state);
                work();
                state = self.state();
                state.ended(&tenant);
            } else if state.closed {
                break;
            } else {
                state.idle += 1;
                let (woken, waited) = self.ready.wait_timeout(state, IDLE).unwrap_or_else(PoisonError::into_inner);
                state = woken;
                state.idle -= 1;
                if waited.timed_out() && state.turns.is_empty() {
                    break;
                }
            }
        }
        state.threads -= 1;
    }
}

impl State {
    /// The next work of the tenant whose turn it is, among those that do not have their share already.
    fn next(&mut self, share: usize) -> Option<(TenantId, Work)> {
        for _ in 0..self.turns.len() {
            let tenant = self.turns.pop_front()?;
            let Some(lane) = self.lanes.get_mut(&tenant) else { continue };
            if lane.running >= share {
                self.turns.push_back(tenant);
                continue;
            }
            let mut work = None;
            while work.is_none()
                && let Some(job) = lane.waiting.pop_front()
            {
                self.queued -= 1;
                work = job.take();
            }
            if !lane.waiting.is_empty() {
                self.turns.push_back(tenant.clone());
            }
            match work {
                Some(work) => {
                    lane.running += 1;
                    return Some((tenant, work));
                }
                None => self.forget_idle(&tenant),
            }
        }
        None
    }

    fn ended(&mut self, tenant: &TenantId) {
        if let Some(lane) = self.lanes.get_mut(tenant) {
            lane.running -= 1;
        }
        self.forget_idle(tenant);
    }

    fn forget_idle(&mut self, tenant: &TenantId) {
        if self.lanes.get(tenant).is_some_and(|lane| lane.running == 0 && lane.waiting.is_empty()) {
            self.lanes.remove(tenant);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::{
        sync::{
            atomic::{AtomicUsize, Ordering},
            mpsc,
        },
        time::Duration,
    };

    use futures::FutureExt;
    use stagegate_core::evaluation::is_wanted;

    use super::*;

    const LONG: Duration = Duration::from_mins(10);

    fn tenant(name: &str) -> TenantId {
        TenantId::new(name).expect("valid")
    }

    fn pooled(threads: usize, longest: Duration) -> Arc<Evaluations> {
        Arc::new(Evaluations::inline(longest, &Memory::new(0), Metrics::new()).on_threads(threads))
    }

    /// Work that has begun and goes on until it is let go.
    async fn held(evaluations: &Arc<Evaluations>, of: &str) -> (mpsc::Sender<()>, tokio::task::JoinHandle<()>) {
        let (release, released) = mpsc::channel::<()>();
        let (begins, under_way) = oneshot::channel();
        let (evaluations, of) = (Arc::clone(evaluations), tenant(of));
        let task = tokio::spawn(async move {
            let work = move || {
                let _ = begins.send(());
                let _ = released.recv();
            };
            evaluations.evaluate_large(&of, 0, work).await.expect("done");
        });
        under_way.await.expect("it begins");
        (release, task)
    }

    #[tokio::test]
    async fn a_tenant_that_has_its_share_leaves_a_thread_to_the_others() {
        let evaluations = pooled(2, LONG);
        let (release, first) = held(&evaluations, "greedy").await;
        let greedy = tenant("greedy");
        let second = evaluations.evaluate_large(&greedy, 0, || "second");
        tokio::pin!(second);
        assert_eq!(second.as_mut().now_or_never(), None);
        for _ in 0..3 {
            assert_eq!(evaluations.evaluate_large(&tenant("other"), 0, || "other").await, Ok("other"));
        }
        assert_eq!(second.as_mut().now_or_never(), None, "it waits for its own tenant's first");
        release.send(()).expect("it waits");
        first.await.expect("done");
        assert_eq!(second.await, Ok("second"));
    }

    #[tokio::test]
    async fn tenants_that_wait_take_turns() {
        let evaluations = pooled(1, LONG);
        let (release, first) = held(&evaluations, "holder").await;
        let order = Arc::new(Mutex::new(Vec::new()));
        let waiting: Vec<_> = ["many", "many", "many", "one"]
            .into_iter()
            .map(|of| {
                let (evaluations, order) = (Arc::clone(&evaluations), Arc::clone(&order));
                let task = async move {
                    let work = move || order.lock().expect("no panic").push(of);
                    evaluations.evaluate_large(&tenant(of), 0, work).await.expect("done");
                };
                let mut task = Box::pin(task);
                assert_eq!(task.as_mut().now_or_never(), None);
                task
            })
            .collect();
        release.send(()).expect("it waits");
        first.await.expect("done");
        futures::future::join_all(waiting).await;
        assert_eq!(*order.lock().expect("no panic"), ["many", "one", "many", "many"]);
    }

    #[tokio::test]
    async fn a_dropped_evaluation_never_begins_and_frees_its_memory() {
        let evaluations = pooled(1, LONG);
        let (release, first) = held(&evaluations, "holder").await;
        let payload = Arc::new(());
        let kept = Arc::clone(&payload);
        let of = tenant("gone");
        let mut waiting = Box::pin(evaluations.evaluate_large(&of, 0, move || drop(kept)));
        assert_eq!(waiting.as_mut().now_or_never(), None);
        assert_eq!(Arc::strong_count(&payload), 2);
        drop(waiting);
        assert_eq!(Arc::strong_count(&payload), 1, "what it held is free at once");
        release.send(()).expect("it waits");
        first.await.expect("done");
        assert_eq!(evaluations.evaluate_large(&of, 0, || 1).await, Ok(1), "the thread goes on");
    }

    #[tokio::test]
    async fn an_evaluation_past_its_time_limit_fails_and_stops() {
        let evaluations = pooled(1, Duration::from_millis(20));
        let (end, ended) = mpsc::channel();
        let work = move || {
            while is_wanted() {
                std::thread::yield_now();
            }
            end.send(()).expect("the test waits");
        };
        let late = evaluations.evaluate_large(&tenant("slow"), 0, work).await;
        assert_eq!(late, Err(Unevaluated::TooLong(Duration::from_millis(20))));
        ended.recv_timeout(Duration::from_mins(1)).expect("it was asked to stop");
        assert!(Error::from(Unevaluated::TooLong(LONG)).detail.contains("engine.evaluation_timeout"));
    }

    #[tokio::test]
    async fn a_panic_is_an_error_and_the_thread_lives_on() {
        for evaluations in [pooled(1, LONG), Arc::new(Evaluations::inline(LONG, &Memory::new(0), Metrics::new()))] {
            let of = tenant("t");
            let broken = || std::panic::resume_unwind(Box::new("a defect"));
            assert_eq!(evaluations.evaluate::<(), _>(&of, || 0, broken).await, Err(Unevaluated::Panicked));
            assert_eq!(evaluations.evaluate_large::<(), _>(&of, 0, broken).await, Err(Unevaluated::Panicked));
            assert_eq!(evaluations.evaluate_large(&of, 0, || 1).await, Ok(1));
        }
    }

    #[tokio::test]
    async fn a_small_evaluation_begins_once_and_where_it_is_asked_for() {
        let evaluations = pooled(1, LONG);
        let begun = Arc::new(AtomicUsize::new(0));
        let counted = Arc::clone(&begun);
        let here = std::thread::current().id();
        let work = move || {
            counted.fetch_add(1, Ordering::Relaxed);
            std::thread::current().id()
        };
        assert_eq!(evaluations.evaluate(&tenant("t"), || 0, work).await, Ok(here));
        assert_eq!(begun.load(Ordering::Relaxed), 1);
    }

    #[tokio::test]
    async fn an_evaluation_holds_room_for_its_values_until_its_thread_is_done_with_them() {
        let memory = Memory::new(0);
        let evaluations = Evaluations::inline(LONG, &memory, Metrics::new()).on_threads(2);
        let (release, released) = mpsc::channel::<()>();
        let (begins, under_way) = oneshot::channel();
        let of = tenant("t");
        let work = move || {
            let _ = begins.send(());
            let _ = released.recv();
        };
        let bytes = memory.values.max_bytes();
        let mut hung_up = Box::pin(evaluations.evaluate_large(&of, bytes, work));
        assert_eq!((&mut hung_up).now_or_never(), None);
        under_way.await.expect("it begins");
        drop(hung_up);
        assert_eq!(memory.values.held(), bytes, "its thread still has them");
        let mut next = Box::pin(evaluations.evaluate_large(&of, bytes, || "next"));
        assert_eq!((&mut next).now_or_never(), None);
        release.send(()).expect("it waits");
        assert_eq!(next.await, Ok("next"));
    }

    #[tokio::test]
    async fn values_larger_than_all_memory_that_there_is_are_refused_unread() {
        let memory = Memory::new(0);
        let evaluations = Evaluations::inline(LONG, &memory, Metrics::new()).on_threads(1);
        let large = memory.max_bytes + 1;
        let refused = evaluations.evaluate_large(&tenant("t"), large, || panic!("it is not begun")).await;
        assert_eq!(refused, Err::<(), _>(Unevaluated::TooLarge { bytes: large, max_bytes: memory.max_bytes }));
    }
}
