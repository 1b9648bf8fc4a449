//! The pipelines that chaos runs: owns their definitions, and what the books and the auditor must know of them.

/// A pipeline.
#[derive(Debug)]
pub(crate) struct Spec {
    pub(crate) name: &'static str,
    pub(crate) definition: &'static str,
    /// Each stage with what it needs.
    pub(crate) stages: &'static [(&'static str, &'static [&'static str])],
    /// How many of a hundred submits are of it.
    pub(crate) share: u32,
}

/// The canonical DAG is `canonical`; `uncached` is the same with the cache off, so that answers are kept for their run
/// alone; `gated` has a gate that sends some answers back; `held` waits for a person; `fragile` fails at the first error, and
/// is the one whose calls are also refused for good.
pub(crate) const PIPELINES: [Spec; 5] = [
    Spec {
        name: "canonical",
        share: 45,
        stages: &[("one", &[]), ("two", &["one"]), ("three", &["two"]), ("four", &["three"]), ("five", &["three"])],
        definition: r#"
name: canonical
input: { type: object, required: [key], properties: { key: { type: string } } }
deadline: 30m
budget: { max_cost_usd: 5 }
defaults: { model: storm/m, timeout: 5s, retry: { max_attempts: 10, backoff: 100ms..1s } }
stages:
  - { id: one, prompt: "key={{ input.key }} stage=one begin" }
  - { id: two, needs: [one], prompt: "key={{ input.key }} stage=two after {{ stages.one.output }}" }
  - { id: three, needs: [two], prompt: "key={{ input.key }} stage=three after {{ stages.two.output }}" }
  - { id: four, needs: [three], prompt: "key={{ input.key }} stage=four after {{ stages.three.output }}" }
  - { id: five, needs: [three], prompt: "key={{ input.key }} stage=five after {{ stages.three.output }}" }
"#,
    },
    Spec {
        name: "uncached",
        share: 12,
        stages: &[("one", &[]), ("two", &["one"]), ("three", &["one"])],
        definition: r#"
name: uncached
input: { type: object, required: [key], properties: { key: { type: string } } }
deadline: 30m
defaults: { model: storm/m, timeout: 5s, retry: { max_attempts: 10, backoff: 100ms..1s }, cache: { mode: 'off' } }
stages:
  - { id: one, prompt: "key={{ input.key }} stage=one begin" }
  - { id: two, needs: [one], prompt: "key={{ input.key }} stage=two after {{ stages.one.output }}" }
  - { id: three, needs: [one], prompt: "key={{ input.key }} stage=three after {{ stages.one.output }}" }
"#,
    },
    Spec {
        name: "gated",
        share: 18,
        stages: &[("json", &[]), ("gate", &["json"])],
        definition: r#"
name: gated
input: { type: object, required: [key], properties: { key: { type: string } } }
deadline: 30m
defaults: { model: storm/m, timeout: 5s, retry: { max_attempts: 6, backoff: 100ms..1s } }
stages:
  - id: json
    prompt: "key={{ input.key }} stage=json begin"
    output: { schema: { type: object, required: [mark, word], properties: { mark: { type: string }, word: { type: string } } } }
  - id: gate
    needs: [json]
    prompt: "key={{ input.key }} stage=gate after {{ stages.json.output.mark }}"
    gate: { checks: [ { not_contains: BAD } ] }
"#,
    },
    Spec {
        name: "held",
        share: 12,
        stages: &[("one", &[]), ("hold", &["one"]), ("two", &["hold"])],
        definition: r#"
name: held
input: { type: object, required: [key], properties: { key: { type: string } } }
deadline: 30m
defaults: { model: storm/m, timeout: 5s, retry: { max_attempts: 10, backoff: 100ms..1s } }
stages:
  - { id: one, prompt: "key={{ input.key }} stage=one begin" }
  - id: hold
    needs: [one]
    prompt: "key={{ input.key }} stage=hold after {{ stages.one.output }}"
    gate: { checks: [ { contains: NEVER } ], on_fail: hold }
  - { id: two, needs: [hold], prompt: "key={{ input.key }} stage=two after {{ stages.hold.output }}" }
"#,
    },
    Spec {
        name: "fragile",
        share: 13,
        stages: &[("frail", &[]), ("frail_after", &["frail"])],
        definition: r#"
name: fragile
input: { type: object, required: [key], properties: { key: { type: string } } }
deadline: 30m
defaults: { model: storm/m, timeout: 5s, retry: { max_attempts: 1 } }
stages:
  - { id: frail, prompt: "key={{ input.key }} stage=frail begin" }
  - { id: frail_after, needs: [frail], prompt: "key={{ input.key }} stage=frail_after after {{ stages.frail.output }}" }
"#,
    },
];

/// The stage of `held` that waits for a person: no answer passes its gate, so that none stays cached.
pub(crate) const HELD: (&str, &str) = ("held", "hold");

/// The pipeline of this name.
pub(crate) fn of(name: &str) -> Option<&'static Spec> {
    PIPELINES.iter().find(|spec| spec.name == name)
}

/// A pipeline by its share; `drawn` is in 0..100.
pub(crate) fn by_share(mut drawn: u32) -> &'static Spec {
    for spec in &PIPELINES {
        if drawn < spec.share {
            return spec;
        }
        drawn -= spec.share;
    }
    &PIPELINES[0]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_shares_make_a_hundred() {
        assert_eq!(PIPELINES.iter().map(|spec| spec.share).sum::<u32>(), 100);
    }
}
