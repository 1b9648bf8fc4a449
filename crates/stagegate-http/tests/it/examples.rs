//! The examples of the document: they fit their schemas, and a daemon takes them and answers in their form.
//! `UPDATE_DOCS=1` records them anew.

use std::collections::BTreeMap;

use http::Method;
use jsonschema::Validator;
use serde_json::{Map, Value, json};

use crate::app::{Answer, TestApp, spawn_app};

const FILE: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/src/examples.json");

fn definition() -> Value {
    json!({
        "name": "summary",
        "description": "A summary that a person may edit.",
        "input": { "type": "object", "required": ["text"], "properties": { "text": { "type": "string", "minLength": 1 } } },
        "defaults": { "model": "sim/quick" },
        "stages": [{
            "id": "draft",
            "prompt": "Summarise in one sentence: {{ input.text }}",
            "gate": { "checks": [{ "matches": "^Summary: " }], "on_fail": "hold" }
        }],
        "output": { "summary": "{{ stages.draft.output }}" }
    })
}

/// Sends what is to be shown, and keeps it.
struct Recorder {
    app: TestApp,
    recorded: Map<String, Value>,
    ids: BTreeMap<String, usize>,
}

impl Recorder {
    async fn send(&mut self, operation: &str, method: Method, path: &str, request: Option<(&str, Value)>) -> Answer {
        let mut asked = self.app.request(method, path);
        if let Some((kind, body)) = &request {
            let text = body.as_str().map_or_else(|| body.to_string(), str::to_owned);
            asked = asked.header("content-type", *kind).body(text);
        }
        let answer = self.app.send(asked).await;
        assert!(answer.status.is_success(), "{operation}: {}", answer.text);
        if let Some((kind, body)) = request {
            self.place(&[operation, "request"]).insert(kind.to_owned(), body);
        }
        self.keep(operation, &answer);
        answer
    }

    fn keep(&mut self, operation: &str, answer: &Answer) {
        let kind = answer.header("content-type").split(';').next().unwrap_or_default().to_owned();
        if !kind.is_empty() {
            let shown = if answer.body.is_null() { answer.text.clone().into() } else { answer.body.clone() };
            let shown = self.settle("", shown);
            self.place(&[operation, "responses", answer.status.as_str()]).insert(kind, shown);
        }
    }

    fn place(&mut self, path: &[&str]) -> &mut Map<String, Value> {
        path.iter().fold(&mut self.recorded, |place, part| {
            place.entry((*part).to_owned()).or_insert_with(|| json!({})).as_object_mut().expect("a map")
        })
    }

    async fn get(&mut self, operation: &str, path: &str) -> Answer {
        self.send(operation, Method::GET, path, None).await
    }

    async fn post(&mut self, operation: &str, path: &str, body: Value) -> Answer {
        self.send(operation, Method::POST, path, Some(("application/json", body))).await
    }

    /// What differs from run to run is shown as something that does not.
    fn settle(&mut self, key: &str, value: Value) -> Value {
        match value {
            Value::Object(map) => map.into_iter().map(|(key, part)| (key.clone(), self.settle(&key, part))).collect(),
            Value::Array(items) => items.into_iter().map(|part| self.settle(key, part)).collect(),
            Value::Number(_) if key.ends_with("_ms") || key.ends_with("_bytes") || key == "uptime_s" => 1_200.into(),
            Value::String(text) if chrono::DateTime::parse_from_rfc3339(&text).is_ok() => match key {
                "deadline_at" => "2026-11-30T09:00:00Z".into(),
                "finished_at" => "2026-11-29T09:00:02Z".into(),
                _ => "2026-11-29T09:00:00Z".into(),
            },
            Value::String(text) => self.without_ids(&text).into(),
            other => other,
        }
    }

    fn without_ids(&mut self, text: &str) -> String {
        let mut shown = text.to_owned();
        for at in 0..text.len().saturating_sub(35) {
            let Some(id) = text.get(at..at + 36).filter(|part| part.as_bytes()[8] == b'-') else { continue };
            if uuid::Uuid::try_parse(id).is_ok() {
                let next = self.ids.len() + 1;
                let number = *self.ids.entry(id.to_owned()).or_insert(next);
                shown = shown.replace(id, &format!("01985c2d-7c3e-7b1a-8f0e-{number:012}"));
            }
        }
        shown
    }

    async fn until(&self, run: &str, event: &str) {
        let mut cursor = String::new();
        loop {
            let page = self.app.get(&format!("/v1/runs/{run}/events?cursor={cursor}")).await.body;
            if page["items"].as_array().expect("events").iter().any(|one| one["type"] == event) {
                return;
            }
            page["next_cursor"].as_str().unwrap_or_else(|| panic!("no {event} in {page:#}")).clone_into(&mut cursor);
            tokio::task::yield_now().await;
        }
    }

    async fn pipelines(&mut self) {
        let path = "/v1/pipelines";
        for status in [201, 200] {
            assert_eq!(self.post("registerPipeline", path, definition()).await.status, status);
        }
        self.post("validatePipeline", "/v1/pipelines/validate", definition()).await;
        self.get("listPipelines", path).await;
        self.get("getPipeline", "/v1/pipelines/summary").await;
        self.get("listVersions", "/v1/pipelines/summary/versions").await;
        self.get("getVersion", "/v1/pipelines/summary/versions/1").await;
        self.get("getPipelineSchema", "/v1/schemas/pipeline").await;
        self.post("planRun", "/v1/plan", json!({ "pipeline": "summary", "input": { "text": TEXT } })).await;
    }

    async fn submit(&mut self) -> String {
        let body = json!({ "pipeline": "summary", "input": { "text": TEXT }, "labels": { "team": "docs" } });
        let run = self.post("submitRun", "/v1/runs", body).await.body["id"].as_str().expect("an id").to_owned();
        self.until(&run, "run.waiting").await;
        run
    }

    async fn runs(&mut self) {
        let run = self.submit().await;
        let path = format!("/v1/runs/{run}");
        self.get("getQueue", "/v1/queue").await;
        self.get("listReplicas", "/v1/replicas").await;
        let edited = "Summary: each stage of a pipeline is gated, checkpointed and metered.";
        let body = json!({ "attempt": 1, "comment": "The first word was missing.", "output": edited });
        self.post("approveStage", &format!("{path}/stages/draft/approve"), body).await;
        self.until(&run, "run.finished").await;
        self.get("getRun", &path).await;
        self.get("getStage", &format!("{path}/stages/draft")).await;
        self.get("listRuns", "/v1/runs").await;
        self.get("getEvents", &format!("{path}/events")).await;
        let stream = self.app.request(Method::GET, &format!("{path}/events")).header("accept", "text/event-stream");
        let stream = self.app.send(stream).await;
        self.keep("getEvents", &stream);

        let run = self.submit().await;
        let path = format!("/v1/runs/{run}");
        self.post("rejectStage", &format!("{path}/stages/draft/reject"), json!({ "reason": "Off topic." })).await;
        self.until(&run, "run.finished").await;
        self.send("retryRun", Method::POST, &format!("{path}/retry"), None).await;
        self.send("cancelRun", Method::POST, &format!("{path}/cancel"), None).await;
        while self.app.get(&path).await.body["state"] != "cancelled" {
            tokio::task::yield_now().await;
        }
        self.send("deleteRun", Method::DELETE, &path, None).await;
    }

    async fn others(&mut self) {
        self.post("invalidateCache", "/v1/cache/invalidate", json!({ "scope": "pipeline", "pipeline": "summary" }))
            .await;
        self.get("getCache", "/v1/cache").await;
        for (operation, path) in [
            ("getHealthz", "/healthz"),
            ("getReadyz", "/readyz"),
            ("getHealth", "/health"),
            ("getMetrics", "/metrics"),
            ("getOpenapi", "/openapi.json"),
        ] {
            self.get(operation, path).await;
        }
    }
}

const TEXT: &str =
    "Stagegate runs staged LLM pipelines: each stage gated, checkpointed, cached, metered and resumable.";

/// What would fill pages is shown by its beginning.
fn shorten(recorded: &mut Map<String, Value>) {
    let mut keep = |operation: &str, kind: &str, keys: &[&str]| {
        let shown = &mut recorded[operation]["responses"]["200"][kind];
        if let Some(map) = shown.as_object_mut() {
            map.retain(|key, _| keys.contains(&key.as_str()));
        }
    };
    keep("getPipelineSchema", "application/json", &["$schema", "title", "type", "required"]);
    keep("getOpenapi", "application/json", &["openapi", "info"]);
    let metrics = "# HELP stagegate_runs_accepted_total Runs accepted by this replica.\n\
                   # TYPE stagegate_runs_accepted_total counter\nstagegate_runs_accepted_total 2\n";
    recorded["getMetrics"]["responses"]["200"]["text/plain"] = metrics.into();
    recorded["getHealthz"]["responses"]["503"] = json!({ "text/plain": "stuck\n" });
    let mut unready = recorded["getReadyz"]["responses"]["200"].clone();
    unready["application/json"]["ready"] = false.into();
    unready["application/json"]["state"] = "down".into();
    unready["application/json"]["draining"] = true.into();
    recorded["getReadyz"]["responses"]["503"] = unready;
    for replica in
        recorded["listReplicas"]["responses"]["200"]["application/json"]["items"].as_array_mut().into_iter().flatten()
    {
        replica["name"] = "stagegate-0".into();
    }
}

/// Whether a value has the form of an example: the same keys with values of the same types. Null stands for any.
fn has_form(value: &Value, example: &Value) -> bool {
    match (value, example) {
        (Value::Null, _) | (_, Value::Null) => true,
        (Value::Object(value), Value::Object(example)) => {
            value.len() == example.len()
                && example.iter().all(|(key, part)| value.get(key).is_some_and(|value| has_form(value, part)))
        }
        (Value::Array(value), Value::Array(example)) => match (value.first(), example.first()) {
            (Some(value), Some(example)) => has_form(value, example),
            _ => true,
        },
        (value, example) => std::mem::discriminant(value) == std::mem::discriminant(example),
    }
}

#[tokio::test]
async fn the_examples_are_what_a_daemon_takes_and_answers() {
    let mut asking = Recorder { app: spawn_app().await, recorded: Map::new(), ids: BTreeMap::new() };
    asking.pipelines().await;
    asking.runs().await;
    asking.others().await;
    let mut recorded = asking.recorded;
    shorten(&mut recorded);
    let recorded = Value::Object(recorded);
    if std::env::var_os("UPDATE_DOCS").is_some() {
        let text = serde_json::to_string_pretty(&recorded).expect("JSON");
        std::fs::write(FILE, text + "\n").expect("written");
    }
    let written: Value = serde_json::from_str(&std::fs::read_to_string(FILE).expect("the file")).expect("JSON");
    let names = |value: &Value| value.as_object().expect("a map").keys().cloned().collect::<Vec<_>>();
    assert_eq!(names(&recorded), names(&written));
    for (operation, now) in recorded.as_object().expect("a map") {
        let then = &written[operation];
        assert_eq!(now["request"], then["request"], "{operation}: another request is shown than is sent");
        assert!(has_form(&now["responses"], &then["responses"]), "{operation} answers {now:#}, shown is {then:#}");
    }
}

#[test]
fn every_request_and_answer_has_an_example_that_fits_its_schema() {
    let document = stagegate_http::openapi_document();
    let fits = |schema: &Value, example: &Value, what: &str| {
        let mut root = json!({ "allOf": [schema] });
        root["components"] = document["components"].clone();
        let validator: Validator = jsonschema::validator_for(&root).expect("a schema");
        let mistakes: Vec<String> =
            validator.iter_errors(example).map(|e| format!("{e} at {}", e.instance_path())).collect();
        assert!(mistakes.is_empty(), "{what}: {mistakes:#?}\n{example:#}");
    };
    let items = document["paths"].as_object().expect("paths").values();
    for operation in items.flat_map(|item| item.as_object().expect("an item").values()) {
        let id = operation["operationId"].as_str().expect("an id");
        let responses = operation["responses"].as_object().expect("responses").iter();
        let bodies = responses.map(|(status, response)| (format!("{id} {status}"), &response["content"]));
        let request = (format!("{id} request"), &operation["requestBody"]["content"]);
        for (what, content) in bodies.chain([request]) {
            for (kind, media) in content.as_object().into_iter().flatten() {
                let what = format!("{what} {kind}");
                assert!(media.get("example").is_some(), "{what} has no example");
                fits(&media["schema"], &media["example"], &what);
            }
        }
    }
}
