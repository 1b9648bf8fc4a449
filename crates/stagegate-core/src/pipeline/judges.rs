//! What a judge is asked with: owns the meaning of its keys, and compiles its templates. Asks no model.

use serde_json::{Map, Value};

use super::{
    Scale,
    check::{CompiledStage, Report, template},
    path::Path,
    template::Scope,
};
use crate::{Code, Violation, error::nearest, pipeline::path::cut};

const TEXTS: [&str; 2] = ["rubric", "prompt"];

/// Compiles a judge's templates; every mistake is reported.
pub(super) fn compile(
    judge: &Map<String, Value>,
    path: &Path,
    scope: &Scope<'_>,
    compiled: &mut CompiledStage,
    report: &mut Report<'_>,
) {
    check_threshold(judge, path, report);
    let text = |key: &str| judge.get(key).and_then(Value::as_str);
    let own = Scope { output: true, ..scope.clone() };
    match (judge.contains_key("rubric"), judge.contains_key("prompt")) {
        (true, true) => {
            let message = "`rubric` and `prompt` exclude each other";
            let mend = "keep one of them; a prompt of one's own says itself what a good output is";
            report.at_key(&path.key("prompt"), Violation::new(Code::WrongValue, "", message).mend(mend));
        }
        (true, false) => compiled.rubric = template(text("rubric"), &path.key("rubric"), scope, report),
        (false, true) => {
            compiled.rubric = template(text("prompt"), &path.key("prompt"), &own, report);
            let shows_nothing = compiled.rubric.as_ref().is_some_and(|prompt| !prompt.names_output());
            if shows_nothing {
                let violation =
                    Violation::new(Code::TemplateReference, "", "the prompt does not show what is to be judged");
                report.at_value(&path.key("prompt"), violation.mend("put `{{ output }}` into it"));
            }
        }
        (false, false) => {
            // A misspelt key has been told already.
            if !judge.keys().any(|key| nearest(&cut(key, 40), TEXTS).is_some()) {
                let violation = Violation::new(Code::MissingKey, "", "`rubric` is missing");
                let mend = "add `rubric:` (a template that says what a good output is), or a `prompt:` of your own";
                report.at_value(&path.key("rubric"), violation.mend(mend));
            }
        }
    }
    compiled.judge_system = template(text("system"), &path.key("system"), &own, report);
}

/// A threshold is one of the scale's scores.
fn check_threshold(judge: &Map<String, Value>, path: &Path, report: &mut Report<'_>) {
    let scale = match judge.get("scale") {
        None => Scale::default(),
        Some(scale) => match <Scale as serde::Deserialize>::deserialize(scale) {
            Ok(scale) => scale,
            Err(_) => return, // Told already.
        },
    };
    let Some(threshold) = judge.get("threshold").and_then(Value::as_f64) else { return };
    let path = path.key("threshold");
    let wrong = |message: String| Violation::new(Code::WrongValue, "", message);
    if scale == Scale::PassFail {
        let violation = wrong("a judge that says pass or fail has no threshold".to_owned());
        return report.at_key(&path, violation.mend("remove it"));
    }
    let (lowest, highest) = scale.range();
    if (0.0..=5.0).contains(&threshold) && !(lowest..=highest).contains(&threshold) {
        let is = if threshold < lowest { format!("at least {lowest}") } else { format!("at most {highest}") };
        let violation = wrong(format!("is `{threshold}`, but must be {is}"));
        let mend = match scale {
            Scale::Unit if threshold > 1.0 => "write a part of 1, such as 0.7, or add `scale: 1..5`",
            _ => "write a score of the judge's scale",
        };
        report.at_value(&path, violation.mend(mend));
    }
}
