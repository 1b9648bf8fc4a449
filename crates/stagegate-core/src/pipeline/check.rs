//! Everything that a schema cannot say: owns the meaning of a definition, and what it takes to run it compiled once.
//! Each part is looked at even where its neighbour is broken, so that an author sees every mistake at once.

use std::{
    collections::{HashMap, HashSet},
    hash::{DefaultHasher, Hash, Hasher},
    rc::Rc,
};

use jsonschema::error::ValidationErrorKind;
use serde::de::DeserializeOwned;
use serde_json::{Map, Value};

use super::{
    Budget, Check, Definition, ModelChain, Models, Role, graph,
    json_schema::Schema,
    params,
    path::{Path, Segment, cut, listed},
    pattern::{self, Pattern},
    schema, slips,
    source::{DEPTH_MAX, MISTAKES_MAX, Source},
    template::{Flaw, Keys, Scope, Template},
};
use crate::{Code, Violation, error::nearest, evaluation};

/// The longest message of a mistake, and the longest that says what to do about it.
const MESSAGE_MAX_CHARS: usize = 2_000;
/// The most stages.
pub(super) const STAGES_MAX: usize = 100;
/// The most regular expressions in a definition, those in its schemas included.
const REGEXES_MAX: usize = 200;

/// The most templates in an output mapping. Each reads what it names anew.
const OUTPUT_TEMPLATES_MAX: usize = 200;

/// What has been compiled of a definition; stages in the author's order.
#[derive(Debug, Default)]
pub(super) struct Compiled {
    pub(super) input: Option<Schema>,
    pub(super) stages: Vec<CompiledStage>,
    pub(super) output: Option<OutputNode>,
    pub(super) concurrency_key: Option<Template>,
}

/// What has been compiled of a stage.
#[derive(Debug, Default)]
pub(super) struct CompiledStage {
    pub(super) messages: Vec<(Role, Template)>,
    /// The rest of the conversation, made from data.
    pub(super) history: Option<Template>,
    pub(super) transform: Option<Template>,
    pub(super) schema: Option<Schema>,
    pub(super) checks: Vec<CompiledCheck>,
    /// The rubric of the judge, or its own prompt.
    pub(super) rubric: Option<Template>,
    pub(super) judge_system: Option<Template>,
}

impl CompiledStage {
    fn templates(&self) -> impl Iterator<Item = &Template> {
        let expressions = self.checks.iter().filter_map(|check| match check {
            CompiledCheck::Expression(expression) => Some(expression),
            _ => None,
        });
        let own = self.messages.iter().map(|(_, text)| text).chain(&self.history).chain(&self.transform);
        own.chain(&self.rubric).chain(&self.judge_system).chain(expressions)
    }
}

impl Compiled {
    /// Something in a template that the release before this one cannot render.
    pub(super) fn newest(&self) -> Option<String> {
        let mut newest = self.stages.iter().flat_map(CompiledStage::templates).find_map(Template::newest);
        newest = newest.or_else(|| self.concurrency_key.as_ref()?.newest());
        let mut newest = newest.map(str::to_owned);
        if let Some(output) = &self.output {
            output.each_template(&mut |template| {
                if newest.is_none() {
                    newest = template.newest().map(str::to_owned);
                }
            });
        }
        newest
    }
}

/// What has been compiled of a check.
#[derive(Debug)]
pub(super) enum CompiledCheck {
    /// Nothing; the check says it all.
    Plain,
    Regex(Pattern),
    Schema(Schema),
    Expression(Template),
}

/// The output mapping with its strings as templates.
#[derive(Debug)]
pub(super) enum OutputNode {
    Plain(Value),
    Template(Template),
    List(Vec<Self>),
    Map(Vec<(String, Self)>),
}

impl OutputNode {
    /// Shows each template.
    pub(super) fn each_template(&self, each: &mut impl FnMut(&Template)) {
        match self {
            Self::Plain(_) => {}
            Self::Template(template) => each(template),
            Self::List(items) => items.iter().for_each(|item| item.each_template(each)),
            Self::Map(map) => map.iter().for_each(|(_, inner)| inner.each_template(each)),
        }
    }

    fn templates(&self) -> usize {
        match self {
            Self::Plain(_) => 0,
            Self::Template(_) => 1,
            Self::List(items) => items.iter().map(Self::templates).sum(),
            Self::Map(map) => map.iter().map(|(_, inner)| inner.templates()).sum(),
        }
    }
}

/// Collects mistakes and gives each its place.
#[derive(Debug)]
pub(super) struct Report<'a> {
    source: &'a Source,
    found: Vec<Violation>,
    /// What was found, by a hash, so that nothing is told twice.
    told: HashSet<u64>,
    /// How many regular expressions have been met.
    regexes: usize,
}

impl<'a> Report<'a> {
    pub(super) fn new(source: &'a Source, found: Vec<Violation>) -> Self {
        Self { source, found, told: HashSet::new(), regexes: 0 }
    }

    fn add(&mut self, mut violation: Violation, path: &Path, at_key: bool) {
        if self.found.len() >= 10 * MISTAKES_MAX {
            return; // More than will be told.
        }
        if violation.message.starts_with("is ") && path.segments().is_empty() {
            violation.message.insert_str(0, "the document ");
        }
        let mark = if at_key { self.source.key_mark(path) } else { self.source.value_mark(path) };
        violation.path = path.to_string();
        violation.line = violation.line.or(mark.map(|m| m.line));
        violation.column = violation.column.or(mark.map(|m| m.column));
        violation.message = cut(&violation.message, MESSAGE_MAX_CHARS);
        violation.mend = violation.mend.map(|mend| cut(&mend, MESSAGE_MAX_CHARS));
        let mut hasher = DefaultHasher::new();
        (&violation.path, violation.code).hash(&mut hasher);
        if violation.code != Code::WrongValue {
            violation.message.hash(&mut hasher);
        }
        if self.told.insert(hasher.finish()) {
            self.found.push(violation);
        }
    }

    pub(super) fn at_value(&mut self, path: &Path, violation: Violation) {
        self.add(violation, path, false);
    }

    pub(super) fn at_key(&mut self, path: &Path, violation: Violation) {
        self.add(violation, path, true);
    }

    fn inside(&mut self, path: &Path, flaw: Flaw) {
        let mark = self.source.inner_mark(path, flaw.line.max(1), flaw.column);
        let message = match (mark, flaw.line) {
            (None, line) if line > 1 => format!("{} (in line {line} of the text)", flaw.message),
            _ => flaw.message,
        };
        let mut violation = Violation::new(flaw.code, "", message);
        violation.mend = flaw.mend;
        violation.line = mark.map(|m| m.line);
        violation.column = mark.map(|m| m.column);
        self.at_value(path, violation);
    }

    /// How many mistakes there are.
    pub(super) fn count(&self) -> usize {
        self.found.len()
    }

    /// Whether there are too many regular expressions to compile any.
    pub(super) fn has_too_many_regexes(&self) -> bool {
        self.regexes > REGEXES_MAX
    }

    /// Counts a regular expression; past the limit none is compiled any more.
    pub(super) fn regex(&mut self, path: &Path) {
        self.regexes += 1;
        if self.regexes == REGEXES_MAX + 1 {
            let message = format!("the definition has more than {REGEXES_MAX} regular expressions");
            self.at_value(path, Violation::new(Code::DefinitionTooLarge, "", message).mend("join some with `|`"));
        }
    }

    /// All mistakes in the order of the text, or that there are none.
    pub(super) fn finish(mut self) -> Result<(), Vec<Violation>> {
        if self.found.is_empty() {
            return Ok(());
        }
        self.found.sort_by_key(|v| (v.line.unwrap_or(u32::MAX), v.column.unwrap_or(u32::MAX), v.code));
        self.found.truncate(MISTAKES_MAX);
        Err(self.found)
    }
}

/// A definition as far as it can be read.
struct Draft<'a> {
    default_model: Option<ModelChain>,
    has_default_model: bool,
    budget: Option<Budget>,
    input: Option<&'a Value>,
    output: Option<&'a Value>,
    stages: Vec<StageDraft<'a>>,
}

/// A stage as far as it can be read.
struct StageDraft<'a> {
    path: Path,
    raw: &'a Map<String, Value>,
    /// Its id as written, valid or not.
    id: Option<&'a str>,
    model: Option<ModelChain>,
}

impl<'a> StageDraft<'a> {
    fn text(&self, key: &str) -> Option<&'a str> {
        self.raw.get(key).and_then(Value::as_str)
    }
}

fn field<T: DeserializeOwned>(map: &Map<String, Value>, key: &str) -> Option<T> {
    map.get(key).and_then(|value| T::deserialize(value).ok())
}

fn draft(root: &Map<String, Value>) -> Draft<'_> {
    let default_map = root.get("defaults").and_then(Value::as_object);
    let stages = root.get("stages").and_then(Value::as_array).into_iter().flatten().take(STAGES_MAX).enumerate();
    Draft {
        default_model: default_map.and_then(|map| field(map, "model")),
        has_default_model: default_map.is_some_and(|map| map.contains_key("model")),
        budget: field(root, "budget"),
        input: root.get("input"),
        output: root.get("output"),
        stages: stages.filter_map(|(index, stage)| stage_draft(index, stage)).collect(),
    }
}

fn stage_draft(index: usize, stage: &Value) -> Option<StageDraft<'_>> {
    let raw = stage.as_object()?;
    let path = Path::root().key("stages").index(index);
    Some(StageDraft { path, raw, id: raw.get("id").and_then(Value::as_str), model: field(raw, "model") })
}

/// Finds every mistake, of form and of meaning, and compiles what is right.
pub(super) fn check(source: &Source, models: &dyn Models, report: &mut Report<'_>) -> Compiled {
    for mistake in schema::mistakes(&source.value) {
        report.add(mistake.violation, &mistake.path, mistake.at_key);
    }
    let Some(root) = source.value.as_object() else { return Compiled::default() };
    let draft = draft(root);
    let (needs, uncertain) = needs(&draft, report);
    let upstream = graph::upstream(&needs);
    let ids: Vec<&str> = draft.stages.iter().filter_map(|stage| stage.id).collect();
    let path = Path::root().key("defaults").key("model");
    check_chain(draft.default_model.as_ref(), &path, &draft, models, report);
    params::check_defaults(root, report);
    let strict = source.has_text();
    let input_keys = declared_keys(draft.input, true).map(Rc::new);
    let outputs: HashMap<&str, Keys<'_>> = draft
        .stages
        .iter()
        .filter_map(|stage| Some((stage.id?, declared_keys(stage.raw.get("output")?.get("schema"), false)?)))
        .collect();
    let outputs = Rc::new(outputs);
    let mut compiled = Compiled {
        input: draft.input.and_then(|schema| Schema::compile(schema, &Path::root().key("input"), report)),
        ..Compiled::default()
    };
    if let (Some(schema), Some(validator), true) = (draft.input, &compiled.input, strict) {
        check_defaults_fit(schema, validator, report);
    }
    for (index, stage) in draft.stages.iter().enumerate() {
        let scope = Scope {
            stage: stage.id,
            stages: ids.clone(),
            upstream: if uncertain[index] {
                ids.iter().copied().collect()
            } else {
                upstream[index].iter().filter_map(|above| draft.stages[*above].id).collect()
            },
            input: input_keys.clone(),
            outputs: Rc::clone(&outputs),
            run: true,
            output: false,
            strict,
        };
        if !evaluation::is_wanted() {
            break; // The caller drops the partial result.
        }
        check_kind(stage, report);
        check_models(stage, &draft, models, report);
        params::check(stage.raw, &stage.path, root, models, report);
        compiled.stages.push(compile_stage(stage, &scope, report));
    }
    let key_scope = Scope { stages: ids.clone(), input: input_keys.clone(), ..Scope::default() };
    compiled.concurrency_key = concurrency_key(root, &key_scope, report);
    let scope = Scope {
        upstream: ids.iter().copied().collect(),
        stages: ids,
        input: input_keys,
        outputs,
        run: true,
        strict,
        ..Scope::default()
    };
    let path = Path::root().key("output");
    compiled.output = draft.output.map(|output| compile_output(output, &path, &scope, report));
    if compiled.output.as_ref().is_some_and(|output| output.templates() > OUTPUT_TEMPLATES_MAX) {
        let message = format!("the output has more than {OUTPUT_TEMPLATES_MAX} templates");
        let violation = Violation::new(Code::DefinitionTooLarge, "", message);
        report.at_value(&path, violation.mend("put a `transform` stage before it that makes the map as a whole"));
    }
    compiled
}

/// A default of the input's schema that does not fit would fail each run that leaves its key out. Told is what is wrong only
/// once the defaults are filled in, for an input that leaves out what it can and for one that has every map.
fn check_defaults_fit(schema: &Value, validator: &Schema, report: &mut Report<'_>) {
    for mut input in [Value::Object(Map::new()), skeleton(schema, 0)] {
        let before: HashSet<String> = flaws(validator, &input).into_iter().map(|(_, told, _)| told).collect();
        super::assess::filled(schema, &mut input);
        for (keys, told, sentence) in flaws(validator, &input) {
            if before.contains(&told) {
                continue;
            }
            let root = Path::root().key("input");
            let (path, violation) = if keys.is_empty() {
                let message = format!("with its defaults filled in, an input that leaves them out {sentence}");
                (
                    root,
                    Violation::new(Code::InvalidSchema, "", message)
                        .mend("remove defaults, or let the schema take them"),
                )
            } else {
                let path = keys.iter().fold(root, |path, key| path.key("properties").key(key)).key("default");
                let violation = Violation::new(Code::InvalidSchema, "", format!("the default {sentence}"));
                (path, violation.mend("write a default that fits its schema"))
            };
            report.at_value(&path, violation);
        }
    }
}

/// The mistakes in an input: the path of each, an identity that quotes no value, and a sentence.
fn flaws(validator: &Schema, input: &Value) -> Vec<(Vec<String>, String, String)> {
    let Ok(errors) = validator.errors(input) else { return Vec::new() };
    let flaw = |error: jsonschema::ValidationError<'_>| {
        let place = Path::root().below(error.instance_path());
        let keys = place.segments().iter().filter_map(key_of).collect();
        let sentence = match error.kind() {
            ValidationErrorKind::Required { property } => {
                format!("lacks `{}`", cut(property.as_str().unwrap_or_default(), 80))
            }
            _ => schema::sentence(&error),
        };
        // By its place in the schema: its words may quote what was filled in.
        (keys, format!("{place} {} {:?}", error.schema_path(), error.kind().keyword()), sentence)
    };
    errors.take(MISTAKES_MAX).map(flaw).collect()
}

/// An input that has every map that its schema describes, and nothing else.
fn skeleton(schema: &Value, depth: usize) -> Value {
    let properties = schema.get("properties").and_then(Value::as_object).into_iter().flatten();
    let inner = properties.filter(|(_, inner)| {
        depth < DEPTH_MAX && inner.get("properties").is_some_and(Value::is_object) && inner.get("default").is_none()
    });
    Value::Object(inner.map(|(key, inner)| (key.clone(), skeleton(inner, depth + 1))).collect())
}

fn key_of(segment: &Segment) -> Option<String> {
    match segment {
        Segment::Key(key) => Some(key.clone()),
        Segment::Index(_) => None,
    }
}

/// The concurrency key, which is known before any stage has run.
fn concurrency_key(root: &Map<String, Value>, scope: &Scope<'_>, report: &mut Report<'_>) -> Option<Template> {
    let path = Path::root().key("concurrency");
    let given = root.get("concurrency")?.as_object()?;
    let Some(key) = given.get("key").and_then(Value::as_str) else {
        if given.contains_key("max_runs_per_key") && !given.contains_key("key") {
            let violation = Violation::new(Code::MissingKey, "", "`max_runs_per_key` has no `key` to count by");
            report.at_value(&path, violation.mend("add `key:` with an expression such as `input.customer`"));
        }
        return None;
    };
    expression(key, &path.key("key"), scope, report)
}

/// An expression; its flaws are told as those of an expression.
fn expression(text: &str, path: &Path, scope: &Scope<'_>, report: &mut Report<'_>) -> Option<Template> {
    match Template::expression(text, scope) {
        Ok(expression) => Some(expression),
        Err(flaws) => {
            for flaw in flaws {
                let code = if flaw.code == Code::TemplateSyntax { Code::InvalidExpression } else { flaw.code };
                let message = flaw.message.replace("the template could", "the expression could");
                report.inside(path, Flaw { code, message, ..flaw });
            }
            None
        }
    }
}

/// Needs as numbers; every wrong one is reported. Beside them, for each stage, whether it names a need that is not
/// there: what is upstream of it is then anybody's guess, and no further mistake.
fn needs(draft: &Draft<'_>, report: &mut Report<'_>) -> (Vec<Vec<usize>>, Vec<bool>) {
    let mut index_of = HashMap::new();
    for (index, stage) in draft.stages.iter().enumerate() {
        let Some(id) = stage.id else { continue };
        if let Some(first) = index_of.get(id) {
            let message = format!("the stage id `{id}` is given twice, first at stages[{first}]");
            report.at_value(
                &stage.path.key("id"),
                Violation::new(Code::Duplicate, "", message).mend("rename one of them"),
            );
        } else {
            index_of.insert(id, index);
        }
    }
    let mut known: Vec<&str> = index_of.keys().copied().collect();
    known.sort_unstable();
    let mut edges = vec![Vec::new(); draft.stages.len()];
    let mut uncertain = vec![false; draft.stages.len()];
    for (index, stage) in draft.stages.iter().enumerate() {
        let list = stage.raw.get("needs").and_then(Value::as_array);
        // Told already; what was meant is no further mistake.
        uncertain[index] |= list.is_none() && stage.raw.contains_key("needs");
        let list = list.into_iter().flatten();
        for (position, need) in list.enumerate().filter_map(|(position, need)| Some((position, need.as_str()?))) {
            let path = stage.path.key("needs").index(position);
            match index_of.get(need) {
                None => {
                    uncertain[index] = true;
                    report.at_value(&path, unknown_need(need, &known));
                }
                Some(needed) if *needed == index => {
                    let message = format!("stage `{need}` needs itself");
                    report.at_value(&path, Violation::new(Code::Cycle, "", message).mend("remove it from `needs`"));
                }
                Some(needed) if edges[index].contains(needed) => {
                    let message = format!("`{need}` is needed twice");
                    report.at_value(&path, Violation::new(Code::Duplicate, "", message).mend("remove one of them"));
                }
                Some(needed) => edges[index].push(*needed),
            }
        }
    }
    for cycle in graph::cycles(&edges) {
        let named: Vec<_> = cycle.iter().chain(cycle.first()).filter_map(|stage| draft.stages[*stage].id).collect();
        let Some(first) = cycle.first() else { continue };
        let named: Vec<_> = named.into_iter().map(|id| cut(id, 64)).collect();
        let message = format!("the stages need each other in a circle: {}", named.join(" → "));
        let violation = Violation::new(Code::Cycle, "", message).mend("remove one of these from a `needs`");
        report.at_value(&draft.stages[*first].path.key("needs"), violation);
    }
    (edges, uncertain)
}

fn unknown_need(need: &str, ids: &[&str]) -> Violation {
    let mend = match nearest(need, ids.iter().copied()) {
        Some(near) => format!("did you mean `{near}`?"),
        None => format!("known stages: {}", listed(ids.iter().copied())),
    };
    Violation::new(Code::UnknownNeed, "", format!("there is no stage `{}`", cut(need, 80))).mend(mend)
}

const KINDS: [&str; 3] = ["prompt", "messages", "transform"];

/// A stage does exactly one thing, and has only the keys that go with it.
fn check_kind(stage: &StageDraft<'_>, report: &mut Report<'_>) {
    let has = |key: &&str| stage.raw.contains_key(*key);
    let given: Vec<&str> = KINDS.into_iter().filter(has).collect();
    let wrong = |message: String, mend: &str| Violation::new(Code::WrongValue, "", message).mend(mend);
    match given.as_slice() {
        [] => {
            // A misspelt key has been told already.
            let misspelt = stage.raw.keys().any(|key| nearest(&cut(key, 40), KINDS).is_some());
            if !misspelt {
                let message = "the stage does nothing: it has no `prompt`, `messages` or `transform`";
                let violation = Violation::new(Code::MissingKey, "", message).mend("add `prompt:` with a template");
                report.at_value(&stage.path, violation);
            }
        }
        [_] => {}
        [first, others @ ..] => {
            for other in others {
                let message = format!("`{first}` and `{other}` exclude each other");
                report.at_key(&stage.path.key(other), wrong(message, "keep one of them"));
            }
        }
    }
    let goes_with = stage.raw.contains_key("prompt") || stage.raw.get("messages").is_some_and(Value::is_object);
    if stage.raw.contains_key("system") && !goes_with && given != [""; 0] {
        let message = "`system` goes with `prompt`, or with `messages: { from: … }`, alone".to_owned();
        report.at_key(&stage.path.key("system"), wrong(message, "write it as a message with `role: system`"));
    }
    if given == ["transform"] {
        for key in ["model", "params", "cache", "sample"].iter().filter(|key| has(key)) {
            let message = format!("a transform calls no model, so that `{key}` means nothing");
            report.at_key(&stage.path.key(key), wrong(message, "remove it; a judge has its own `model`"));
        }
    }
}

fn check_models(stage: &StageDraft<'_>, draft: &Draft<'_>, models: &dyn Models, report: &mut Report<'_>) {
    let is_transform = stage.raw.contains_key("transform");
    let has_model = stage.raw.contains_key("model") || draft.has_default_model;
    check_chain(stage.model.as_ref(), &stage.path.key("model"), draft, models, report);
    if !has_model && !is_transform && KINDS.iter().any(|key| stage.raw.contains_key(*key)) {
        let violation = Violation::new(Code::MissingKey, "", "no model is named, neither here nor in `defaults`");
        report.at_value(&stage.path.key("model"), violation.mend("add `model: provider/model` here or in `defaults`"));
    }
    let gate = stage.raw.get("gate").and_then(Value::as_object);
    let Some(judge) = gate.and_then(|gate| gate.get("judge")).and_then(Value::as_object) else { return };
    let path = stage.path.key("gate").key("judge").key("model");
    check_chain(field::<ModelChain>(judge, "model").as_ref(), &path, draft, models, report);
    if is_transform && !judge.contains_key("model") {
        let violation = Violation::new(Code::MissingKey, "", "a transform has no model that its judge could use");
        report.at_value(&path, violation.mend("add `model: provider/model` to the judge"));
    }
}

fn check_chain(
    chain: Option<&ModelChain>,
    path: &Path,
    draft: &Draft<'_>,
    models: &dyn Models,
    report: &mut Report<'_>,
) {
    let Some(chain) = chain else { return };
    let mut seen = HashSet::new();
    for (position, model) in chain.models().iter().enumerate() {
        let path = match chain {
            ModelChain::One(_) => path.clone(),
            ModelChain::Chain(_) => path.index(position),
        };
        if !seen.insert(model) {
            let violation =
                Violation::new(Code::Duplicate, "", format!("`{model}` stands twice in the fallback chain"));
            report.at_value(&path, violation.mend("remove one of them"));
        } else if let Err(error) = models.check(model) {
            report.at_value(&path, Violation::new(error.code, "", error.detail));
        } else if draft.budget.is_some() && !models.is_priced(model) {
            let message = format!("the pipeline has a budget, but `{model}` has no price");
            let mend = "add its price to the price table, use a model that has one, or remove `budget`";
            report.at_value(&path, Violation::new(Code::BudgetUnpriced, "", message).mend(mend));
        }
    }
}

/// The keys that a schema declares. None where it declares none, or says that there can be others: then any may be
/// there. A key that is used but not declared is nearly always misspelt, and would fail every run.
fn declared_keys(schema: Option<&Value>, with_defaults: bool) -> Option<Keys<'_>> {
    const OPENERS: [&str; 8] =
        ["patternProperties", "$ref", "$dynamicRef", "allOf", "anyOf", "oneOf", "if", "propertyNames"];
    let schema = schema?.as_object()?;
    let others = schema.get("additionalProperties").is_some_and(|others| others != &Value::Bool(false));
    if others || OPENERS.iter().any(|opener| schema.contains_key(*opener)) {
        return None;
    }
    let properties = schema.get("properties")?.as_object()?;
    let required = schema.get("required").and_then(Value::as_array);
    let is_required = |key: &str| required.is_some_and(|required| required.iter().any(|name| name == key));
    // What the input leaves out is filled in.
    let is_filled =
        |key: &str| with_defaults && properties.get(key).is_some_and(|inner| inner.get("default").is_some());
    let keys: Keys<'_> = properties.keys().map(String::as_str).collect();
    let keys =
        keys.optional(|key| !is_required(key) && !is_filled(key)).filled(|key| !is_required(key) && is_filled(key));
    (!keys.is_empty()).then_some(keys)
}

pub(super) fn template(
    text: Option<&str>,
    path: &Path,
    scope: &Scope<'_>,
    report: &mut Report<'_>,
) -> Option<Template> {
    match Template::text(text?, scope) {
        Ok(template) => Some(template),
        Err(flaws) => {
            for flaw in flaws {
                report.inside(path, flaw);
            }
            None
        }
    }
}

fn compile_stage(stage: &StageDraft<'_>, scope: &Scope<'_>, report: &mut Report<'_>) -> CompiledStage {
    let path = &stage.path;
    let mut compiled = CompiledStage::default();
    for (role, key) in [(Role::System, "system"), (Role::User, "prompt")] {
        let template = template(stage.text(key), &path.key(key), scope, report);
        compiled.messages.extend(template.map(|template| (role, template)));
    }
    compiled.messages.extend(compile_messages(stage, scope, report));
    let from = stage.raw.get("messages").and_then(|messages| messages.as_object()?.get("from")?.as_str());
    let from_path = path.key("messages").key("from");
    compiled.history = from.and_then(|from| expression(from, &from_path, scope, report));
    compiled.transform = template(stage.text("transform"), &path.key("transform"), scope, report);
    if let Some(schema) = stage.raw.get("output").and_then(|output| output.as_object()?.get("schema")) {
        compiled.schema = Schema::compile(schema, &path.key("output").key("schema"), report);
    }
    if let Some(output) = stage.raw.get("output").and_then(Value::as_object)
        && !output.contains_key("schema")
        && !output
            .keys()
            .any(|key| slips::key(Some("OutputSchema"), key).is_some() || nearest(&cut(key, 40), ["schema"]).is_some())
    {
        let violation = Violation::new(Code::MissingKey, "", "`schema` is missing");
        report.at_value(&path.key("output").key("schema"), violation.mend("add `schema:` with a JSON Schema"));
    }
    let Some(gate) = stage.raw.get("gate").and_then(Value::as_object) else { return compiled };
    let path = path.key("gate");
    let checks = gate.get("checks").and_then(Value::as_array).into_iter().flatten().enumerate();
    // Where a key is missing, the check has not passed: nothing fails by it.
    let expression_scope = Scope { run: false, output: true, strict: false, ..scope.clone() };
    for (index, check) in
        checks.filter_map(|(i, value)| Some((i, <Check as serde::Deserialize>::deserialize(value).ok()?)))
    {
        let path = path.key("checks").index(index);
        compiled.checks.extend(compile_check(&check, &path, &expression_scope, report));
    }
    if let Some(judge) = gate.get("judge").and_then(Value::as_object) {
        super::judges::compile(judge, &path.key("judge"), scope, &mut compiled, report);
    }
    compiled
}

fn compile_messages(stage: &StageDraft<'_>, scope: &Scope<'_>, report: &mut Report<'_>) -> Vec<(Role, Template)> {
    let Some(list) = stage.raw.get("messages").and_then(Value::as_array) else { return Vec::new() };
    let path = stage.path.key("messages");
    let role = |message: &Value| message.as_object().and_then(|map| field::<Role>(map, "role"));
    // Stored definitions of instructions alone go on.
    if scope.strict && !list.is_empty() && list.iter().filter_map(role).all(|role| role != Role::User) {
        let violation = Violation::new(Code::WrongValue, "", "no message is the user's, so that nothing is asked");
        report.at_value(&path, violation.mend("add a message with `role: user`"));
    }
    let messages = list.iter().enumerate().filter_map(|(index, message)| {
        let content = message.get("content").and_then(Value::as_str);
        let template = template(content, &path.index(index).key("content"), scope, report)?;
        Some((role(message)?, template))
    });
    messages.collect()
}

fn compile_check(check: &Check, path: &Path, scope: &Scope<'_>, report: &mut Report<'_>) -> Option<CompiledCheck> {
    let invalid = |message: String| Violation::new(Code::InvalidExpression, "", message);
    match check {
        Check::MinChars(_) | Check::MaxChars(_) | Check::Contains(_) | Check::NotContains(_) => {
            Some(CompiledCheck::Plain)
        }
        Check::Matches(pattern) | Check::NotMatches(pattern) => {
            let path = path.key(check.name());
            report.regex(&path);
            if report.has_too_many_regexes() {
                return None;
            }
            match Pattern::compile(pattern) {
                Ok(regex) => Some(CompiledCheck::Regex(regex)),
                Err(error) => {
                    let (message, mend) = pattern::why_not(pattern, &error);
                    report.at_value(&path, invalid(message).mend(mend));
                    None
                }
            }
        }
        Check::Schema(schema) => Schema::compile(schema, &path.key("schema"), report).map(CompiledCheck::Schema),
        Check::Expression(text) => {
            expression(text, &path.key("expression"), scope, report).map(CompiledCheck::Expression)
        }
    }
}

fn compile_output(value: &Value, path: &Path, scope: &Scope<'_>, report: &mut Report<'_>) -> OutputNode {
    match value {
        Value::String(text) => match template(Some(text), path, scope, report) {
            Some(template) => OutputNode::Template(template),
            None => OutputNode::Plain(Value::Null),
        },
        Value::Array(items) => OutputNode::List(
            items.iter().enumerate().map(|(i, item)| compile_output(item, &path.index(i), scope, report)).collect(),
        ),
        Value::Object(map) => OutputNode::Map(
            map.iter().map(|(key, item)| (key.clone(), compile_output(item, &path.key(key), scope, report))).collect(),
        ),
        plain => OutputNode::Plain(plain.clone()),
    }
}

/// The definition itself, once nothing was found. Should decoding fail all the same, that is one mistake more.
pub(super) fn decode(source: &Source) -> Result<Definition, Vec<Violation>> {
    serde_path_to_error::deserialize(&source.value).map_err(|error: serde_path_to_error::Error<serde_json::Error>| {
        let path = error.path().iter().fold(Path::root(), |path, segment| match segment {
            serde_path_to_error::Segment::Seq { index } => path.index(*index),
            serde_path_to_error::Segment::Map { key } => path.key(key),
            _ => path,
        });
        let mut report = Report::new(source, Vec::new());
        report.at_value(&path, Violation::new(Code::WrongValue, "", cut(&error.inner().to_string(), 300)));
        report.found
    })
}
