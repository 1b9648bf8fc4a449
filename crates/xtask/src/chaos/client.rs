//! The client of the API, through HAProxy: owns its timeouts, and the count of every answer that was not as it should
//! be. It never repeats a request by itself; whoever calls decides that.

use std::{
    collections::BTreeMap,
    sync::{Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use serde::Serialize;
use serde_json::Value;

use super::timeline::Timeline;

/// How long an answer may take until it counts as lost.
const ANSWER_LIMIT: Duration = Duration::from_secs(20);
/// How long a connection may take to be made.
const CONNECT_LIMIT: Duration = Duration::from_secs(3);
/// Troubles that are kept one by one; beyond, they are only counted.
const TROUBLES_MAX: usize = 500;

/// A request that was not answered as it should be.
#[derive(Debug, Clone, Serialize)]
pub(crate) struct Trouble {
    pub(crate) at_s: f64,
    pub(crate) asked: &'static str,
    pub(crate) what: String,
}

/// An answer.
#[derive(Debug)]
pub(crate) struct Answer {
    pub(crate) status: u16,
    pub(crate) body: Value,
}

#[derive(Debug, Default)]
struct Counts {
    by_outcome: BTreeMap<(&'static str, String), u64>,
    troubles: Vec<Trouble>,
}

/// A client. Shared by all that make load.
#[derive(Debug)]
pub(crate) struct Client {
    http: reqwest::Client,
    url: String,
    timeline: Timeline,
    counts: Mutex<Counts>,
}

impl Client {
    pub(crate) fn new(url: &str, timeline: Timeline) -> anyhow::Result<Self> {
        let http = reqwest::Client::builder().no_proxy().connect_timeout(CONNECT_LIMIT).build()?;
        Ok(Self { http, url: url.to_owned(), timeline, counts: Mutex::default() })
    }

    fn counts(&self) -> MutexGuard<'_, Counts> {
        self.counts.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Counts what came of a request; what is no answer, or a 5xx, is kept.
    fn note(&self, asked: &'static str, outcome: &str, trouble: Option<String>) {
        let mut counts = self.counts();
        *counts.by_outcome.entry((asked, outcome.to_owned())).or_default() += 1;
        if let Some(what) = trouble
            && counts.troubles.len() < TROUBLES_MAX
        {
            let at_s = self.timeline.now_s();
            counts.troubles.push(Trouble { at_s, asked, what });
        }
    }

    /// How often each request came out how.
    pub(crate) fn outcomes(&self) -> BTreeMap<(&'static str, String), u64> {
        self.counts().by_outcome.clone()
    }

    /// Requests that were answered with 5xx or not at all.
    pub(crate) fn troubles(&self) -> Vec<Trouble> {
        self.counts().troubles.clone()
    }

    pub(crate) async fn get(&self, asked: &'static str, path: &str) -> Option<Answer> {
        self.send(asked, self.http.get(format!("{}{path}", self.url))).await
    }

    pub(crate) async fn post(&self, asked: &'static str, path: &str, body: Option<&Value>) -> Option<Answer> {
        let request = self.http.post(format!("{}{path}", self.url));
        let request = match body {
            Some(body) => request.json(body),
            None => request,
        };
        self.send(asked, request).await
    }

    pub(crate) async fn register(&self, definition: &str) -> Option<Answer> {
        let request = self.http.post(format!("{}/v1/pipelines", self.url));
        self.send("register", request.header("content-type", "application/yaml").body(definition.to_owned())).await
    }

    /// Submits under a key. `patience` is how long the answer is waited for: a short one is a client that hangs up.
    pub(crate) async fn submit(&self, key: &str, body: &Value, patience: Option<Duration>) -> Option<Answer> {
        let request = self.http.post(format!("{}/v1/runs", self.url)).header("idempotency-key", key).json(body);
        match patience {
            None => self.send("submit", request).await,
            Some(patience) => {
                let _ = request.timeout(patience).send().await;
                self.note("submit", "hung up on purpose", None);
                None
            }
        }
    }

    /// Opens the event stream of a run after a seq.
    pub(crate) async fn events(&self, run: &str, after: u64) -> Option<reqwest::Response> {
        let mut request = self.http.get(format!("{}/v1/runs/{run}/events", self.url));
        request = request.header("accept", "text/event-stream");
        if after > 0 {
            request = request.header("last-event-id", after.to_string());
        }
        match tokio::time::timeout(ANSWER_LIMIT, request.send()).await {
            Ok(Ok(response)) => {
                let status = response.status().as_u16();
                let trouble = (status >= 500).then(|| format!("{status}"));
                self.note("events", &status.to_string(), trouble);
                Some(response)
            }
            Ok(Err(error)) => self.lost("events", &error),
            Err(_) => {
                self.note("events", "no answer in time", Some("no answer in time".to_owned()));
                None
            }
        }
    }

    fn lost<T>(&self, asked: &'static str, error: &reqwest::Error) -> Option<T> {
        let what = if error.is_timeout() {
            "no answer in time"
        } else if error.is_connect() {
            "no connection"
        } else {
            "the connection broke"
        };
        self.note(asked, what, Some(format!("{what}: {error:?}")));
        None
    }

    async fn send(&self, asked: &'static str, request: reqwest::RequestBuilder) -> Option<Answer> {
        let answered = async {
            let response = request.timeout(ANSWER_LIMIT).send().await?;
            Ok::<_, reqwest::Error>((response.status().as_u16(), response.text().await?))
        };
        match answered.await {
            Err(error) => self.lost(asked, &error),
            Ok((status, text)) => {
                let body: Value = serde_json::from_str(&text).unwrap_or(Value::Null);
                let trouble = (status >= 500).then(|| {
                    let code = body["code"].as_str().map_or("from HAProxy", |code| code);
                    format!("{status} {code}: {}", body["detail"].as_str().unwrap_or_default())
                });
                let outcome = match body["code"].as_str() {
                    Some(code) if status >= 400 => format!("{status} {code}"),
                    None if status >= 500 => format!("{status} from HAProxy"),
                    _ => status.to_string(),
                };
                self.note(asked, &outcome, trouble);
                Some(Answer { status, body })
            }
        }
    }
}
