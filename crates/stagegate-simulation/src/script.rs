//! What a seed makes up: pipelines, and what is asked of the world when.

use std::collections::BTreeMap;

use rand::{Rng, rngs::StdRng, seq::IndexedRandom};
use serde_json::{Value, json};
use stagegate_core::{PipelineName, StageId};

use crate::provider::GOOD;

/// A definition, and the needs of its stages.
#[derive(Debug, Clone)]
pub(crate) struct Made {
    pub(crate) name: PipelineName,
    pub(crate) source: String,
    pub(crate) needs: BTreeMap<StageId, Vec<StageId>>,
}

fn id(n: usize) -> String {
    format!("s{n}")
}

/// A random DAG of one to eight stages.
pub(crate) fn pipeline(rng: &mut StdRng, n: usize) -> Made {
    let name = format!("p{n}");
    let count = rng.random_range(1..=8_usize);
    let (mut stages, mut needs) = (Vec::new(), BTreeMap::new());
    for at in 0..count {
        let upstream: Vec<usize> = (0..at).filter(|_| rng.random_bool(0.4)).take(3).collect();
        stages.push(stage(rng, &name, at, &upstream));
        let ids = |n: &usize| StageId::new(id(*n)).ok();
        if let Some(own) = ids(&at) {
            needs.insert(own, upstream.iter().filter_map(ids).collect());
        }
    }
    let models = if rng.random_bool(0.3) { json!(["sim/quick", "sim/other"]) } else { json!("sim/quick") };
    let mut definition = json!({ "name": name, "defaults": { "model": models }, "stages": stages });
    if rng.random_bool(0.2) {
        definition["deadline"] = json!(format!("{}s", rng.random_range(10..60)));
    }
    if rng.random_bool(0.15) {
        definition["concurrency"] = json!({ "max_runs": rng.random_range(1..3) });
    } else if rng.random_bool(0.05) {
        definition["concurrency"] = json!({ "key": "input.tag" });
    }
    if count % 4 == 1 {
        // Too large to be rendered while deciding, so that a run can be lost between its last checkpoint and its end.
        definition["output"] = json!({ "text": "{% for i in range(2000) %}{{ i }}{% endfor %}" });
    }
    let name = PipelineName::new(name).unwrap_or_else(|error| unreachable!("{error}"));
    Made { name, source: definition.to_string(), needs }
}

fn stage(rng: &mut StdRng, pipeline: &str, at: usize, upstream: &[usize]) -> Value {
    let needs: Vec<String> = upstream.iter().map(|n| id(*n)).collect();
    let mut seen = String::new();
    for need in &needs {
        seen.push_str(" {{ stages.");
        seen.push_str(need);
        seen.push_str(".output }}");
    }
    let mut stage = json!({ "id": id(at), "needs": needs });
    if at > 0 && rng.random_bool(0.15) {
        stage["transform"] = json!(format!("joined:{seen}"));
        return stage;
    }
    let mode = if rng.random_bool(0.8) { "use" } else { "off" };
    // With the cache off an answer belongs to its run, so that the same question of another run is another one.
    let whose = if mode == "off" { " {{ run.id }}" } else { "" };
    stage["prompt"] = json!(format!("<<{{{{ input.tag }}}} {}>> {pipeline}{whose}{seen}", id(at)));
    stage["timeout"] = json!(format!("{}s", rng.random_range(3..20)));
    let backoff = ["100ms..1s", "500ms..4s", "4s..20s", "8s..30s"].choose(rng).copied().unwrap_or("1s..30s");
    stage["retry"] = json!({ "max_attempts": rng.random_range(1..6), "backoff": backoff });
    stage["cache"] = json!({ "mode": mode });
    let on_fail = ["retry", "retry", "hold", "accept", "fail"].choose(rng).copied().unwrap_or("retry");
    let on_exhausted = ["fail", "hold", "accept"].choose(rng).copied().unwrap_or("fail");
    let mut gate = json!({ "on_fail": on_fail, "on_exhausted": on_exhausted });
    if rng.random_bool(0.2) {
        stage["output"] = json!({ "schema": { "type": "object", "required": ["v"] } });
    } else if rng.random_bool(0.7) {
        gate["checks"] = json!([{ "contains": GOOD }]);
    }
    if rng.random_bool(0.2) {
        let rubric = format!("<<{{{{ input.tag }}}} judge-{}>> {pipeline}{whose}", id(at));
        gate["judge"] = json!({ "rubric": rubric, "threshold": 0.5 });
    }
    stage["gate"] = gate;
    stage
}

/// What happens from outside, by itself.
#[derive(Debug, Clone)]
pub(crate) enum Act {
    /// A client submits.
    Submit { pipeline: usize, tag: String, priority: i16, start_in_ms: Option<u64>, keyed: bool, watchers: usize },
    /// A client cancels some run.
    Cancel,
    /// A person approves or rejects what is held.
    Decide,
    /// A person retries what failed.
    Retry,
    /// A process is killed.
    Kill,
    /// A process is stopped for so long.
    Pause(u64),
    /// A process is asked to stop, with so much grace.
    Drain(u64),
    /// The cache loses everything.
    Flush,
    /// The cache cannot be reached for so long.
    Away(u64),
}

/// What happens when, in milliseconds.
pub(crate) fn acts(rng: &mut StdRng, pipelines: usize, storm_ms: u64, ttl_ms: u64) -> Vec<(u64, Act)> {
    let mut acts = Vec::new();
    let runs = rng.random_range(1..=6_u32);
    for n in 0..runs {
        let pipeline = rng.random_range(0..pipelines);
        let tag = if n > 0 && rng.random_bool(0.15) { format!("t{}", n - 1) } else { format!("t{n}") };
        let priority = rng.random_range(-3..=3);
        let start_in_ms = rng.random_bool(0.2).then(|| rng.random_range(500..15_000));
        let watchers = [0, 1, 1, 2].choose(rng).copied().unwrap_or(1);
        let submit = Act::Submit { pipeline, tag, priority, start_in_ms, keyed: rng.random_bool(0.7), watchers };
        acts.push((rng.random_range(0..storm_ms * 2 / 3), submit));
    }
    let mut some = |act: fn(&mut StdRng, u64) -> Act, most: usize| {
        for _ in 0..rng.random_range(0..=most) {
            let at = rng.random_range(0..storm_ms);
            let act = act(rng, ttl_ms);
            acts.push((at, act));
        }
    };
    some(|_, _| Act::Cancel, 4);
    some(|_, _| Act::Decide, 5);
    some(|_, _| Act::Retry, 4);
    some(|_, _| Act::Kill, 2);
    some(|rng, ttl| Act::Pause(rng.random_range(ttl / 3..ttl * 3)), 2);
    some(|rng, _| Act::Drain(rng.random_range(0..3_000)), 1);
    some(|_, _| Act::Flush, 1);
    some(|rng, _| Act::Away(rng.random_range(1_000..15_000)), 1);
    acts.sort_by_key(|(at, _)| *at);
    acts
}
