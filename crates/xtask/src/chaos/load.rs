//! The load: owns who submits what and when, by the clock and not by the answers; and who approves, rejects, cancels,
//! retries and watches. A submit whose answer was lost is repeated under the same key until it is accepted.

use std::{
    collections::{BTreeSet, HashMap},
    hash::{DefaultHasher, Hash, Hasher},
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicUsize, Ordering},
    },
    time::Duration,
};

use rand::{Rng, SeedableRng, rngs::StdRng};
use serde_json::{Value, json};
use tokio::{sync::watch, task::JoinSet};

use super::{
    client::Client,
    pipelines::{self, HELD},
    timeline::Timeline,
    watch::{Watched, follow},
};

/// Of a hundred runs: how many are cancelled, watched, submitted twice at once, and submitted by a client that hangs up.
const CANCELLED: u32 = 6;
const WATCHED: u32 = 30;
const TWICE: u32 = 4;
const HUNG_UP: u32 = 3;
/// Of a hundred held outputs: how many are rejected. Of a hundred failed runs: how many are retried, each so often.
const REJECTED: u64 = 25;
const RETRIED: u64 = 60;
const RETRIES_MAX: u32 = 2;

/// One submit and what came of it.
#[derive(Debug, Clone, Default)]
pub(crate) struct Submitted {
    pub(crate) key: String,
    /// Every run that an answer named. More than one breaks a promise.
    pub(crate) runs: BTreeSet<String>,
    /// Requests until there was a 202.
    pub(crate) requests: u32,
    /// When it was to be sent, and when it was accepted.
    pub(crate) due_s: f64,
    pub(crate) accepted_s: Option<f64>,
    /// An answer that no submit should get.
    pub(crate) refused: Option<String>,
}

/// What the load did.
#[derive(Debug, Default)]
pub(crate) struct Done {
    pub(crate) submitted: Vec<Submitted>,
    pub(crate) watched: Vec<Watched>,
    pub(crate) actions: HashMap<&'static str, u64>,
}

/// The load's settings.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Settings {
    pub(crate) seed: u64,
    /// Submits a second.
    pub(crate) rate: f64,
}

/// A load under way.
#[derive(Debug)]
pub(crate) struct Load {
    client: Arc<Client>,
    timeline: Timeline,
    settings: Settings,
    done: Arc<Mutex<Done>>,
    /// Watchers that are not at the end yet.
    watching: AtomicUsize,
    /// True when no more submits and retries are to begin.
    ending: watch::Sender<bool>,
    /// True when everybody is to go home.
    over: watch::Sender<bool>,
    tasks: Mutex<JoinSet<()>>,
}

fn locked<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// A number in 0..100 that depends on the text and the seed alone.
fn percent(seed: u64, text: &str, what: &str) -> u64 {
    let mut hasher = DefaultHasher::new();
    (seed, text, what).hash(&mut hasher);
    hasher.finish() % 100
}

impl Load {
    pub(crate) fn begin(client: Arc<Client>, timeline: Timeline, settings: Settings) -> Arc<Self> {
        let load = Arc::new(Self {
            client,
            timeline,
            settings,
            done: Arc::default(),
            watching: AtomicUsize::new(0),
            ending: watch::Sender::new(false),
            over: watch::Sender::new(false),
            tasks: Mutex::new(JoinSet::new()),
        });
        let submitting = Arc::clone(&load);
        load.spawn(async move { submitting.submits().await });
        let deciding = Arc::clone(&load);
        load.spawn(async move { deciding.decisions().await });
        let retrying = Arc::clone(&load);
        load.spawn(async move { retrying.retries().await });
        load
    }

    fn spawn(&self, task: impl Future<Output = ()> + Send + 'static) {
        locked(&self.tasks).spawn(task);
    }

    fn count(&self, what: &'static str) {
        *locked(&self.done).actions.entry(what).or_default() += 1;
    }

    /// No more submits and retries; decisions and watchers go on.
    pub(crate) fn end(&self) {
        self.ending.send_replace(true);
    }

    /// How many were submitted, and how many of those accepted.
    pub(crate) fn counts(&self) -> (usize, usize) {
        let done = locked(&self.done);
        (done.submitted.len(), done.submitted.iter().filter(|submit| submit.accepted_s.is_some()).count())
    }

    /// How many watchers are not at the end of their run.
    pub(crate) fn watching(&self) -> usize {
        self.watching.load(Ordering::Relaxed)
    }

    /// Sends everybody home, waits for them, and tells what was done.
    pub(crate) async fn finish(&self) -> Done {
        self.end();
        self.over.send_replace(true);
        let mut tasks = std::mem::take(&mut *locked(&self.tasks));
        while tasks.join_next().await.is_some() {}
        std::mem::take(&mut *locked(&self.done))
    }

    async fn submits(self: Arc<Self>) {
        let mut ending = self.ending.subscribe();
        let begun_s = self.timeline.now_s();
        for number in 0_u32.. {
            let due_s = begun_s + f64::from(number) / self.settings.rate;
            tokio::select! {
                () = self.timeline.until(due_s) => {}
                _ = ending.wait_for(|ending| *ending) => return,
            }
            let load = Arc::clone(&self);
            self.spawn(async move { load.one(number, due_s).await });
        }
    }

    /// One run, as its client sees it.
    async fn one(self: Arc<Self>, number: u32, due_s: f64) {
        let seed = self.settings.seed.wrapping_mul(0x9E37_79B9_7F4A_7C15) ^ u64::from(number);
        let mut rng = StdRng::seed_from_u64(seed);
        let spec = pipelines::by_share(rng.random_range(0..100));
        let key = format!("c{}-{number}", self.settings.seed);
        let index = {
            let mut done = locked(&self.done);
            let submitted = Submitted { key: key.clone(), due_s, ..Submitted::default() };
            done.submitted.push(submitted);
            done.submitted.len() - 1
        };
        let body = json!({ "pipeline": spec.name, "input": { "key": key }, "labels": { "chaos": "yes" } });
        if rng.random_range(0..100) < HUNG_UP {
            let patience = Duration::from_micros(rng.random_range(200..8_000));
            self.client.submit(&key, &body, Some(patience)).await;
        }
        let twice = rng.random_range(0..100) < TWICE;
        let accepted = if twice {
            tokio::join!(self.until_accepted(index, &key, &body), self.until_accepted(index, &key, &body)).0
        } else {
            self.until_accepted(index, &key, &body).await
        };
        let Some(run) = accepted else { return };
        if rng.random_range(0..100) < WATCHED {
            let (load, run, seed) = (Arc::clone(&self), run.clone(), rng.random());
            self.watching.fetch_add(1, Ordering::Relaxed);
            self.spawn(async move {
                let watched = follow(&load.client, run, seed, load.over.subscribe()).await;
                load.watching.fetch_sub(1, Ordering::Relaxed);
                locked(&load.done).watched.push(watched);
            });
        }
        if rng.random_range(0..100) < CANCELLED {
            tokio::time::sleep(Duration::from_millis(rng.random_range(0..1_500))).await;
            self.act("cancel", &format!("/v1/runs/{run}/cancel"), None).await;
        }
    }

    /// Repeats a submit until it is accepted; None where it never was.
    async fn until_accepted(&self, index: usize, key: &str, body: &Value) -> Option<String> {
        let mut over = self.over.subscribe();
        let mut pause = Duration::from_millis(100);
        loop {
            let answer = tokio::select! {
                answer = self.client.submit(key, body, None) => answer,
                _ = over.wait_for(|over| *over) => return None,
            };
            let now_s = self.timeline.now_s();
            {
                let mut done = locked(&self.done);
                let submit = &mut done.submitted[index];
                submit.requests += 1;
                match answer {
                    Some(answer) if answer.status == 202 => {
                        let run = answer.body["id"].as_str().unwrap_or_default().to_owned();
                        submit.runs.insert(run.clone());
                        submit.accepted_s.get_or_insert(now_s);
                        return Some(run);
                    }
                    Some(answer) if answer.status < 500 && answer.status != 429 => {
                        submit.refused = Some(format!("{} {}", answer.status, answer.body));
                        return None;
                    }
                    _ => {}
                }
            }
            tokio::time::sleep(pause).await;
            pause = (pause * 2).min(Duration::from_secs(1));
        }
    }

    /// Asks something of a run until there is an answer to it.
    async fn act(&self, what: &'static str, path: &str, body: Option<&Value>) {
        let mut over = self.over.subscribe();
        loop {
            let answer = tokio::select! {
                answer = self.client.post(what, path, body) => answer,
                _ = over.wait_for(|over| *over) => return,
            };
            match answer {
                Some(answer) if answer.status == 202 => return self.count(what),
                Some(answer) if answer.status == 409 => return self.count("came too late, or twice"),
                Some(answer) if answer.status < 500 => return self.count("refused"),
                _ => tokio::time::sleep(Duration::from_millis(300)).await,
            }
        }
    }

    /// Ids of the runs in a list.
    async fn list(&self, query: &str) -> Vec<String> {
        let Some(answer) = self.client.get("list", &format!("/v1/runs?{query}")).await else { return Vec::new() };
        let items = answer.body["items"].as_array().cloned().unwrap_or_default();
        items.iter().filter_map(|run| run["id"].as_str().map(str::to_owned)).collect()
    }

    /// A person who approves and rejects what is held.
    async fn decisions(self: Arc<Self>) {
        let mut over = self.over.subscribe();
        while !*over.borrow_and_update() {
            for run in self.list(&format!("state=waiting&pipeline={}&limit=100", HELD.0)).await {
                let path = format!("/v1/runs/{run}/stages/{}", HELD.1);
                if percent(self.settings.seed, &run, "reject") < REJECTED {
                    let body = json!({ "reason": "not to our liking" });
                    self.act("reject", &format!("{path}/reject"), Some(&body)).await;
                } else {
                    self.act("approve", &format!("{path}/approve"), None).await;
                }
            }
            let _ = tokio::time::timeout(Duration::from_millis(500), over.wait_for(|over| *over)).await;
        }
    }

    /// A person who tries failed runs again.
    async fn retries(self: Arc<Self>) {
        let mut ending = self.ending.subscribe();
        let mut retried: HashMap<String, u32> = HashMap::new();
        while !*ending.borrow_and_update() {
            for run in self.list("state=failed&limit=50").await {
                let tries = retried.entry(run.clone()).or_default();
                if *tries < RETRIES_MAX && percent(self.settings.seed, &run, "retry") < RETRIED && !*ending.borrow() {
                    *tries += 1;
                    self.act("retry", &format!("/v1/runs/{run}/retry"), None).await;
                }
            }
            let _ = tokio::time::timeout(Duration::from_millis(900), ending.wait_for(|ending| *ending)).await;
        }
    }
}
