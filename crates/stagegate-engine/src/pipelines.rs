//! Compiled pipelines: owns which versions are in memory, and how the newest one is found without a query per submit.

use std::{
    collections::{BTreeMap, HashMap},
    sync::{Arc, Mutex, PoisonError},
};

use stagegate_core::{
    Capability, Code, Error, Pipeline, PipelineName, Store, TenantId,
    pipeline::{Stage, Work},
    store::{PipelineQuota, PipelineVersion},
};
use tokio_util::task::TaskTracker;

use crate::{
    batch::{Batcher, Entry},
    evaluation::Evaluations,
};

/// Compiled versions kept in memory at most, however small they are.
const COMPILED_MAX: usize = 4_096;
/// Questions for a newest version that share one look.
const LOOKS_MAX: usize = 1_024;

type Name = (TenantId, PipelineName);
type Newest = Option<Arc<PipelineVersion>>;

/// See the module's documentation.
#[derive(Debug)]
pub(crate) struct Pipelines {
    store: Arc<dyn Store>,
    newest: Batcher<Name, Newest>,
    evaluations: Arc<Evaluations>,
    compiled: Mutex<Compiled>,
}

type Version = (TenantId, PipelineName, u32);

/// The compiled versions that were asked for last, up to a number of bytes.
#[derive(Debug, Default)]
struct Compiled {
    max_bytes: u64,
    bytes: u64,
    /// Grows with every use.
    uses: u64,
    /// Each with its last use.
    versions: HashMap<Version, (Arc<Pipeline>, u64)>,
    by_use: BTreeMap<u64, Version>,
}

impl Compiled {
    fn get(&mut self, version: &Version) -> Option<Arc<Pipeline>> {
        self.uses += 1;
        let (pipeline, used) = self.versions.get_mut(version)?;
        if let Some(version) = self.by_use.remove(used) {
            self.by_use.insert(self.uses, version);
        }
        *used = self.uses;
        Some(Arc::clone(pipeline))
    }

    /// Keeps a version, and lets go of those that were not used for the longest. One that is larger than all that may be
    /// kept is not kept: its runs hold it while they are under way.
    fn keep(&mut self, version: Version, pipeline: &Arc<Pipeline>) {
        self.forget(&version);
        let bytes = pipeline.compiled_bytes();
        if bytes > self.max_bytes {
            return;
        }
        while self.bytes + bytes > self.max_bytes || self.versions.len() >= COMPILED_MAX {
            let Some(oldest) = self.by_use.first_key_value().map(|(_, version)| version.clone()) else { break };
            self.forget(&oldest);
        }
        self.uses += 1;
        self.bytes += bytes;
        self.by_use.insert(self.uses, version.clone());
        self.versions.insert(version, (Arc::clone(pipeline), self.uses));
    }

    fn forget(&mut self, version: &Version) {
        if let Some((pipeline, used)) = self.versions.remove(version) {
            self.bytes -= pipeline.compiled_bytes();
            self.by_use.remove(&used);
        }
    }
}

impl Pipelines {
    pub(crate) fn new(
        tracker: &TaskTracker,
        store: Arc<dyn Store>,
        evaluations: Arc<Evaluations>,
        max_bytes: u64,
    ) -> Self {
        let asked = Arc::clone(&store);
        let newest = Batcher::start(tracker, LOOKS_MAX, |_| 0, move |batch| look(Arc::clone(&asked), batch));
        let compiled = Mutex::new(Compiled { max_bytes, ..Compiled::default() });
        Self { store, newest, evaluations, compiled }
    }

    /// A version, or with None the newest at this moment: one that was registered before is seen.
    pub(crate) async fn get(
        &self,
        tenant: &TenantId,
        name: &PipelineName,
        version: Option<u32>,
    ) -> Result<Option<(Arc<Pipeline>, u32)>, Error> {
        if let Some(version) = version
            && let Some(pipeline) = self.compiled(tenant, name, version)
        {
            return Ok(Some((pipeline, version)));
        }
        let record = match version {
            Some(_) => self.store.pipeline(tenant, name, version).await?.map(Arc::new),
            None => self.newest.offer((tenant.clone(), name.clone())).await?,
        };
        let Some(record) = record else { return Ok(None) };
        let version = record.version;
        if let Some(pipeline) = self.compiled(tenant, name, version) {
            return Ok(Some((pipeline, version)));
        }
        let definition = record.definition.clone();
        let compiling = self.evaluations.evaluate_large(tenant, 0, move || Pipeline::from_stored(definition));
        let pipeline = compiling.await?.map_err(|violations| Error::violations(Code::InvalidDefinition, violations))?;
        let pipeline = Arc::new(pipeline);
        let mut compiled = self.compiled.lock().unwrap_or_else(PoisonError::into_inner);
        compiled.keep((tenant.clone(), name.clone(), version), &pipeline);
        drop(compiled);
        Ok(Some((pipeline, version)))
    }

    fn compiled(&self, tenant: &TenantId, name: &PipelineName, version: u32) -> Option<Arc<Pipeline>> {
        let mut compiled = self.compiled.lock().unwrap_or_else(PoisonError::into_inner);
        compiled.get(&(tenant.clone(), name.clone(), version))
    }
}

/// A key of a stage that came before the others: releases with an open vocabulary read it.
pub(crate) fn newer_key(stage: &Stage) -> Option<&'static str> {
    match &stage.work {
        Work::Model(work) if work.sample != 0 => Some("sample"),
        _ if stage.retry.max_wait.is_some() => Some("retry.max_wait"),
        _ => None,
    }
}

/// What of a pipeline some live replica could not read, given what is common to all of them.
pub(crate) fn unreadable(pipeline: &Pipeline, common: impl Fn(Capability) -> bool) -> Option<String> {
    let newer = || pipeline.stages.iter().find_map(newer_key).map(str::to_owned);
    let newest = pipeline.newest().filter(|_| !common(Capability::OwnJudges)).map(str::to_owned);
    newest.or_else(|| newer().filter(|_| !common(Capability::OpenVocabulary)))
}

/// The digest of a definition that comes back after the version `replaced`. A content is one version for each digest; replicas
/// that bring it back at the same time must still make one version together.
pub(crate) fn reverted_digest(content: [u8; 32], replaced: u32) -> [u8; 32] {
    let mut hasher = blake3::Hasher::new();
    hasher.update(&content).update(&replaced.to_be_bytes());
    *hasher.finalize().as_bytes()
}

/// The refusal of a version for which a tenant's quota has no room.
pub(crate) fn full(quota: PipelineQuota, pipelines: u64, versions: u64) -> Error {
    let (count, what, max, key) = if versions >= u64::from(quota.versions) {
        (versions, "versions of pipelines", quota.versions, "max_versions")
    } else {
        (pipelines, "pipelines", quota.pipelines, "max_pipelines")
    };
    let detail = format!(
        "the tenant has {count} {what} and may have {max}: register again what is there, which makes no new version, or \
         ask for a higher engine.tenants.NAME.{key}"
    );
    Error::new(Code::QuotaReached, detail)
}

/// Answers a batch: one query per name, however many ask for it. Each began to wait before its query began, so that none
/// is answered with what was the newest before it asked.
async fn look(store: Arc<dyn Store>, batch: Vec<Entry<Name, Newest>>) {
    // In the order of their names, so that a simulation's seed decides that too.
    let mut askers: BTreeMap<Name, Vec<_>> = BTreeMap::new();
    for (name, answer) in batch {
        askers.entry(name).or_default().push(answer);
    }
    let looks = askers.into_iter().map(|((tenant, name), answers)| {
        let store = &store;
        async move {
            let found = store.pipeline(&tenant, &name, None).await;
            let found = found.map(|record| record.map(Arc::new)).map_err(Error::from);
            for answer in answers {
                let _ = answer.send(found.clone()); // Whoever is gone has hung up.
            }
        }
    });
    futures::future::join_all(looks).await;
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn a_key_that_the_release_before_cannot_read_is_found_in_whichever_stage_has_it() {
        let key_of = |second: serde_json::Value| {
            let mut stages = vec![json!({ "id": "a", "prompt": "p", "model": "m/m" }), second];
            stages[1]["id"] = json!("b");
            let pipeline = Pipeline::from_stored(json!({ "name": "p", "stages": stages })).expect("valid");
            pipeline.stages.iter().find_map(newer_key)
        };
        let model = |more: serde_json::Value| {
            let mut stage = json!({ "prompt": "p", "model": "m/m" });
            stage.as_object_mut().expect("a map").extend(more.as_object().expect("a map").clone());
            stage
        };
        assert_eq!(key_of(model(json!({ "retry": { "max_attempts": 2 } }))), None);
        assert_eq!(key_of(model(json!({ "sample": 1 }))), Some("sample"));
        assert_eq!(key_of(model(json!({ "retry": { "max_wait": "1h" } }))), Some("retry.max_wait"));
    }

    #[test]
    fn what_only_this_release_reads_waits_for_every_replica_to_be_of_it() {
        let unreadable_of = |more: serde_json::Value, known: &[Capability]| {
            let mut stage = json!({ "id": "a", "model": "m/m" });
            stage.as_object_mut().expect("a map").extend(more.as_object().expect("a map").clone());
            if stage.get("messages").is_none() && stage.get("prompt").is_none() {
                stage["prompt"] = json!("p");
            }
            let pipeline = Pipeline::from_stored(json!({ "name": "p", "stages": [stage] })).expect("valid");
            unreadable(&pipeline, |capability| known.contains(&capability))
        };
        let older = [Capability::OpenVocabulary];
        let own = [Capability::OpenVocabulary, Capability::OwnJudges];
        for (more, key) in [
            (json!({ "params": { "frequency_penalty": 1 } }), "params.frequency_penalty"),
            (json!({ "params": { "presence_penalty": 1 } }), "params.presence_penalty"),
            (json!({ "params": { "logit_bias": { "7": 1 } } }), "params.logit_bias"),
            (json!({ "params": { "reasoning": { "effort": "low" } } }), "params.reasoning"),
            (json!({ "params": { "extra": { "top_k": 1 } } }), "params.extra"),
            (json!({ "messages": { "from": "input.history" } }), "messages.from"),
            (json!({ "gate": { "on_pass": "hold" } }), "gate.on_pass"),
            (json!({ "gate": { "judge": { "prompt": "{{ output }}" } } }), "gate.judge.prompt"),
            (json!({ "gate": { "judge": { "rubric": "r", "system": "s" } } }), "gate.judge.system"),
            (json!({ "gate": { "judge": { "rubric": "r", "scale": "1..5" } } }), "gate.judge.scale"),
            (json!({ "gate": { "judge": { "rubric": "r", "params": {} } } }), "gate.judge.params"),
            (json!({ "prompt": "{{ 'a' | truncate }}" }), "the filter `truncate`"),
            (json!({ "prompt": "{{ 'a'.upper() }}" }), "the method `upper`"),
            (json!({ "prompt": "{{ 'a' if true }}b" }), "an `if` without `else`"),
        ] {
            assert_eq!(unreadable_of(more.clone(), &older).as_deref(), Some(key), "{more}");
            assert_eq!(unreadable_of(more.clone(), &own), None, "{more}");
        }
        let old = json!({ "gate": { "judge": { "rubric": "r", "threshold": 0.5 }, "on_fail": "hold" }, "params": { "seed": 1 } });
        assert_eq!(unreadable_of(old, &[]), None);
    }
}
